from typing import get_args

import pytest
import torch

from close import close
from vitrail.models import ViT, ViTConfig
from vitrail.nn import Position

TINY = {"depth": 2, "width": 32, "heads": 2, "mlp": 48, "patch": (8, 8), "image_size": (32, 48)}
TOKENS = [  # and how many prefix tokens they make
    ({"pool": "class"}, 1),
    ({"pool": "class", "registers": 4}, 5),
    ({"pool": "class", "distilled": True}, 2),
    ({"pool": "class", "distilled": True, "registers": 2}, 4),
    ({"pool": "class", "prefix_position": False}, 1),
    ({"pool": "mean", "class_token": False}, 0),
    ({"pool": "mean", "class_token": False, "registers": 2}, 2),
    ({"pool": "mean", "registers": 4}, 5),
    ({"pool": "map", "class_token": False}, 0),
    ({"pool": "map", "registers": 4}, 5),
]


@pytest.mark.parametrize("position", get_args(Position))
@pytest.mark.parametrize("tokens, prefix", TOKENS, ids=str)
def test_every_combination_gives_the_parts_it_promises(position, tokens, prefix, randomised):
    model = randomised(ViT(ViTConfig(**TINY, **tokens, position=position, classes=7)))
    for size, grid in [((32, 48), (4, 6)), ((64, 24), (8, 3))]:
        x = torch.randn(2, 3, *size)
        features = model.features(x)
        n = grid[0] * grid[1]
        assert features.grid == grid
        assert features.patches.shape == (2, n, 32)
        assert features.prefix.shape == (2, prefix, 32)
        assert features.pooled.shape == (2, 32)
        assert [m.shape for m in features.maps] == [(2, 32, *grid)]
        assert features.strides == ((8, 8),)
        assert torch.equal(features.maps[0][:, :, 2, 1], features.patches[:, 2 * grid[1] + 1])
        assert model(x).shape == (2, 7)
        assert model(x).isfinite().all()


def test_pooling_reads_what_its_name_says(randomised):
    x = torch.randn(2, 3, 32, 48)
    by_class = randomised(ViT(ViTConfig(**TINY, registers=2))).features(x)
    assert torch.equal(by_class.pooled, by_class.prefix[:, 0])
    by_mean = randomised(ViT(ViTConfig(**TINY, pool="mean", registers=2))).features(x)
    close(by_mean.pooled, by_mean.patches.mean(dim=1))


def test_without_classes_the_model_gives_its_pooled_features(randomised):
    model = randomised(ViT(ViTConfig(**TINY, classes=0)))
    x = torch.randn(2, 3, 32, 48)
    assert torch.equal(model(x), model.features(x).pooled)


def test_a_distilled_model_averages_its_two_heads(randomised):
    model = randomised(ViT(ViTConfig(**TINY, distilled=True, classes=7)))
    x = torch.randn(2, 3, 32, 48)
    features = model.features(x)
    one, two = model.head(features.prefix[:, 0]), model.head_distilled(features.prefix[:, 1])
    close(model.logits(features), torch.stack([one, two], dim=1))
    close(model(x), (one + two) / 2)


def test_each_image_of_a_batch_is_treated_alone(randomised):
    model = randomised(ViT(ViTConfig(**TINY, classes=7)))
    x = torch.randn(3, 3, 32, 48)
    close(model(x)[1:2], model(x[1:2]))


@pytest.mark.parametrize("position", ["sincos_moco", "rope", "peg", "learned"])
def test_positions_tell_the_model_where_a_patch_is(position, randomised):
    model = randomised(ViT(ViTConfig(**TINY, position=position, classes=7)))
    x = torch.randn(1, 3, 32, 48)
    assert (model(x) - model(x.flip(-1))).abs().max() > 1e-3


def test_without_positions_the_model_sees_a_set_of_patches(randomised):
    model = randomised(ViT(ViTConfig(**TINY, position="none", classes=7)))
    x = torch.randn(1, 3, 32, 48)
    shuffled = torch.cat([x[..., 24:], x[..., :24]], dim=-1)  # whole patches change places
    close(model(shuffled), model(x))


def test_padding_a_model_to_whole_patches(randomised):
    model = randomised(ViT(ViTConfig(**TINY | {"image_size": (30, 41)}, indivisible="pad")))
    assert model.features(torch.randn(1, 3, 30, 41)).grid == (4, 6)
