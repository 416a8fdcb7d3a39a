"""Several looks at an image."""

from dataclasses import replace

import pytest
import torch

from close import close
from parts import labelled, named
from vitrail.data.views.canvas import Canvas
from vitrail.errors import UsageError
from vitrail.models import ViT, ViTConfig
from vitrail.tasks import Classify, ClassifyConfig
from vitrail.tasks.tta import LOOKS, Look, looks, probabilities, seen

CONFIG = ViTConfig(depth=1, width=32, heads=2, mlp=48, patch=(8, 4), image_size=(32, 16), classes=5)
PATCH = CONFIG.patch
EXTENT = torch.tensor([[4, 4], [2, 6], [1, 1]])


@pytest.fixture
def model(randomised) -> ViT:
    return randomised(ViT(CONFIG))


def test_one_look_is_the_model_itself(model):
    x = torch.randn(3, 3, 32, 16)
    assert torch.equal(probabilities(model, x, multi_label=False), model(x).softmax(dim=1))
    assert torch.equal(probabilities(model, x, multi_label=True), model(x).sigmoid())


@pytest.mark.parametrize("multi_label", [False, True])
def test_flip_is_the_mean_of_two_passes(model, multi_label):
    task = Classify(model, ClassifyConfig(), named(*"abcde", several=multi_label)).eval()
    x = torch.randn(3, 3, 32, 16)
    batch = labelled(x, torch.zeros(3, 5))
    expected = (task.predict(batch) + task.predict(labelled(x.flip(-1), torch.zeros(3, 5)))) / 2
    plain = task.predict(batch)
    task.tta = "flip"
    close(task.predict(batch), expected)
    assert not torch.equal(plain, expected)


def test_scales_are_three_sizes_in_whole_patches():
    x = torch.randn(2, 3, 14 * 8, 7 * 4)
    sizes = [seen(Canvas(x, None), look, PATCH).images.shape[2:] for look in LOOKS["scales"]]
    assert sizes == [(12 * 8, 6 * 4), (14 * 8, 7 * 4), (16 * 8, 8 * 4)]
    flat = seen(Canvas(torch.ones(1, 3, 32, 16), None), Look(scale=0.6), PATCH).images
    close(flat, torch.ones(1, 3, 16, 8))
    assert {look.scale for look in LOOKS["flip+scales"] if look.mirrored} == {
        look.scale for look in LOOKS["scales"]
    }


@pytest.mark.parametrize("name", LOOKS)
def test_an_image_among_others_gets_the_looks_that_it_gets_alone(name, model):
    canvas = torch.randn(3, 3, 40, 28)
    together = probabilities(model, canvas, EXTENT, multi_label=False, tta=name)
    for i, (rows, columns) in enumerate(EXTENT.tolist()):
        image = canvas[i : i + 1, :, : rows * 8, : columns * 4]
        alone = probabilities(model, image, multi_label=False, tta=name)
        close(together[i : i + 1], alone)


def test_a_mirror_image_stays_at_the_top_left():
    canvas = torch.randn(3, 3, 40, 28)
    mirrored = seen(Canvas(canvas, EXTENT), Look(mirrored=True), PATCH)
    assert mirrored.extent is EXTENT
    for image, before, (rows, columns) in zip(mirrored.images, canvas, EXTENT, strict=True):
        shown = before[:, : rows * 8, : columns * 4]
        assert torch.equal(image[:, : rows * 8, : columns * 4], shown.flip(-1))
    twice = seen(mirrored, Look(mirrored=True), PATCH)
    assert torch.equal(twice.images, canvas)


def test_a_misspelt_name_is_answered_with_the_near_one():
    with pytest.raises(UsageError, match="unknown test-time augmentation 'flips': did you mean"):
        looks("flips")


def test_looks_are_whole_patches_however_small_the_image(randomised):
    model = randomised(ViT(replace(CONFIG, image_size=(8, 4))))
    x = torch.randn(2, 3, 8, 4)
    assert probabilities(model, x, multi_label=False, tta="flip+scales").shape == (2, 5)
