"""One rule: an image in a batch gets exactly what it would get alone."""

from copy import deepcopy
from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from close import close, largest
from vitrail.errors import UsageError
from vitrail.models import ViT, ViTConfig
from vitrail.nn import Grids, Position
from vitrail.nn.attention import attend

TINY = ViTConfig(depth=2, width=32, heads=2, mlp=48, patch=(8, 4), image_size=(32, 16), classes=7)
CONV = replace(TINY, stem="conv", patch=(8, 8), image_size=(32, 32))
GRIDS = [(4, 4), (2, 6), (1, 1), (3, 2), (2, 6)]
EXTENT = torch.tensor(GRIDS)
EVERY_KIND = [
    *({"position": position} for position in get_args(Position)),
    {"registers": 3},
    {"distilled": True, "registers": 1},
    {"prefix_position": False, "registers": 1},
    {"position": "rope", "registers": 2},
    {"pool": "mean"},
    {"pool": "mean", "class_token": False, "position": "peg"},
    {"pool": "map"},
    {"pool": "first", "class_token": False},
    {"pool": "class_mean", "pre_norm": True},
    {"pool": "mean", "pool_norm": True, "representation": 8},
    {"pool": "map", "class_token": False, "position": "rope"},
    {"position": "learned_rope", "rope": "pe", "rope_grid": (4, 4), "pool": "map"},
    {"position": "rope", "rope": "axial", "pool": "map", "pool_heads": 4, "pool_prefix": True},
    {"position": "rope", "rope": "eva", "pool": "mean", "pool_prefix": True, "registers": 2},
    {"stem": "conv", "patch": (8, 8), "image_size": (32, 32)},
    {"stem": "overlap"},
    {"stem": "patchify", "patch": (8, 8), "image_size": (32, 32)},
]


def batch(model: ViT) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Images of GRIDS on a canvas that is larger than any; and each alone."""
    p, q = model.config.patch
    canvas = torch.randn(len(GRIDS), 3, 5 * p, 7 * q)
    return canvas, [
        image[None, :, : rows * p, : columns * q]
        for image, (rows, columns) in zip(canvas, GRIDS, strict=True)
    ]


@pytest.mark.parametrize("kind", EVERY_KIND, ids=str)
def test_an_image_in_a_batch_gets_what_it_gets_alone(kind, randomised):
    model = randomised(ViT(replace(TINY, **kind)))
    canvas, images = batch(model)
    together, logits = model.features(canvas, EXTENT), model(canvas, EXTENT)
    assert together.grid == (5, 7) and together.valid is not None
    assert not together.patches[~together.valid].any(), "what shows nothing is zero"
    for i, image in enumerate(images):
        alone = model.features(image)
        assert alone.valid is None
        close(together.pooled[i], alone.pooled[0])
        close(together.prefix[i], alone.prefix[0])
        close(together.patches[i][together.valid[i]], alone.patches[0])
        rows, columns = GRIDS[i]
        close(together.maps[0][i, :, :rows, :columns], alone.maps[0][0])
        close(logits[i], model(image)[0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", EVERY_KIND, ids=str)
def test_pixels_beside_an_image_change_nothing(kind, training, randomised):
    model = randomised(ViT(replace(TINY, **kind))).train(training)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    canvas, _ = batch(model)
    shown = model.features(canvas, EXTENT).valid.view(-1, 1, 5, 7)
    for axis, side in ((2, model.config.patch[0]), (3, model.config.patch[1])):
        shown = shown.repeat_interleave(side, axis)
    noisy = torch.where(shown, canvas, 100 * torch.randn_like(canvas))
    outcomes = []
    for images in (canvas, noisy):
        model.load_state_dict(start)
        model.zero_grad()
        out = model(images, EXTENT)
        out.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        outcomes.append([out, *grads, *model.state_dict().values()])
    for one, other in zip(*outcomes, strict=True):
        close(one, other, size=largest(outcomes[1]))


def test_a_convolutional_stem_learns_its_statistics_from_what_is_shown(randomised):
    one = randomised(ViT(CONV)).train()
    other = deepcopy(one)
    images = torch.randn(2, 3, 16, 24)
    canvas = F.pad(images, (0, 8, 0, 16), value=9.0)
    together = one(canvas, torch.tensor([[2, 3], [2, 3]]))
    close(together, other(images))
    for (name, here), there in zip(one.named_buffers(), other.buffers(), strict=True):
        close(here, there, msg=name)


@pytest.mark.parametrize("position", ["learned", "rope", "peg"])
def test_a_batch_of_one(position, randomised):
    model = randomised(ViT(replace(TINY, position=position)))
    x = torch.randn(1, 3, 24, 24)
    alone = model(x[..., :16, :20])
    close(model(x, torch.tensor([[2, 5]])), alone)
    whole = torch.tensor([[3, 6]])
    close(model(x, whole), model(x))


def test_tokens_are_those_of_the_longest_sequence_and_not_of_the_canvas(randomised):
    model = randomised(ViT(TINY))
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    model(torch.randn(2, 3, 16 * 8, 16 * 4), torch.tensor([[4, 16], [16, 4]]))
    assert seen == [1 + 64]


def test_gradients_reach_every_image_and_every_weight(randomised):
    model = randomised(ViT(replace(TINY, pool="map"))).train()
    canvas, _ = batch(model)
    canvas.requires_grad_()
    model(canvas, EXTENT).square().sum().backward()
    for name, parameter in model.named_parameters():
        if "pool" in name or "patch" in name or "qkv" in name or "position" in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    p, q = model.config.patch
    for grad, (rows, columns) in zip(canvas.grad, GRIDS, strict=True):
        assert grad[:, : rows * p, : columns * q].abs().min() > 0
        assert not grad[:, rows * p :].any() and not grad[:, :, columns * q :].any()


def test_bfloat16_which_takes_another_way_on_a_cpu_masks_the_same_keys():
    q, k, v = torch.randn(3, 2, 4, 7, 16)
    keys = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    out = attend(q, k, v, keys)
    close(out[:1], attend(q[:1], k[:1, :, :5], v[:1, :, :5]))
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), keys)
    close(half.float(), out, 0.03)


def test_gathering_and_scattering_are_inverse():
    grids = Grids(EXTENT, (5, 7))
    tokens = torch.randn(len(GRIDS), 35, 4)
    assert grids.gather(tokens).shape == (len(GRIDS), 16, 4)
    back = grids.scatter(grids.gather(tokens))
    close(back, tokens * grids.shown[..., None])
    assert Grids(torch.tensor([[2, 6], [3, 4]]), (5, 7)).keys() is None


@pytest.mark.parametrize("extent", [[0, 1], [1, 8], [6, 1]])
def test_an_extent_beyond_the_canvas_is_refused(extent):
    model = ViT(TINY)
    with pytest.raises(UsageError, match=r"on a canvas of 5 x 7: give \(rows, columns\)"):
        model(torch.zeros(2, 3, 40, 28), torch.tensor([[1, 1], extent]))
