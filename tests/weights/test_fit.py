"""Weights in a model of another geometry: what follows by rule, and what is refused."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from close import close
from vitrail.errors import DataError
from vitrail.models import ViT, ViTConfig, model_config
from vitrail.nn import resample_table
from vitrail.weights.fit import fit, models_like

TINY = ViTConfig(
    depth=1, width=16, heads=2, mlp=24, patch=(4, 4), image_size=(56, 56), classes=5, registers=2
)


def fitted(model: ViT, **changes: object) -> ViT:
    """The model's weights in a model with some fields changed."""
    wanted = replace(model.config, **changes)
    other = ViT(wanted).eval()
    result = fit(model.state_dict(), model.config, wanted, "these")
    other.load_state_dict(other.state_dict() | result.state)
    return other


EVERY = list(product(range(8, 31), repeat=2))


@pytest.mark.parametrize(
    "side, rows, grids", [(14, True, EVERY), (37, True, EVERY), (37, False, EVERY[::40])]
)
def test_every_grid_from_8_to_30_loads(side, rows, grids, randomised):
    model = randomised(ViT(replace(TINY, image_size=(4 * side,) * 2, prefix_position=rows)))
    state, stored = model.state_dict(), model.config
    table = state["position.table"][int(rows) :]
    for grid in grids:
        wanted = replace(stored, image_size=(4 * grid[0], 4 * grid[1]))
        there = fit(state, stored, wanted, "these")
        assert there.new == there.left_out == ()
        found = there.state["position.table"]
        assert found.shape == (int(rows) + grid[0] * grid[1], 16)
        assert torch.equal(found[: int(rows)], state["position.table"][: int(rows)])
        assert torch.equal(found[int(rows) :], resample_table(table, (side, side), grid))


def test_a_fitted_table_gives_what_resampling_on_the_fly_gives(randomised):
    model = randomised(ViT(TINY))
    x = torch.randn(3, 3, 40, 64)
    with torch.inference_mode():
        expected = model(x)
        close(fitted(model, image_size=(40, 64))(x), expected)


def test_a_head_for_other_classes_is_new_and_the_rest_is_not(randomised):
    model = randomised(ViT(TINY))
    result = fit(model.state_dict(), TINY, replace(TINY, classes=3), "these")
    assert result.new == ("head.weight", "head.bias") == result.left_out
    assert result.notes == ("head: a new one for 3 classes; the old one tells 5 apart",)
    assert torch.equal(result.state["encoder.norm.bias"], model.encoder.norm.bias)


def test_a_head_is_left_out_when_its_classes_are_others(randomised):
    model = randomised(ViT(TINY))
    assert fit(model.state_dict(), TINY, TINY, "these").new == ()
    assert fit(model.state_dict(), TINY, TINY, "these", new_head="others").new == (
        "head.weight",
        "head.bias",
    )


@pytest.mark.parametrize("changes", [{"pool": "mean"}, {"pool": "class_mean"}])
def test_a_head_that_would_read_something_else_is_new(changes, randomised):
    model = randomised(ViT(TINY))
    assert "head.weight" in fit(model.state_dict(), TINY, replace(TINY, **changes), "these").new


@pytest.mark.parametrize("there, here", [(True, False), (False, True)])
def test_class_rows_merge_into_the_token_and_come_apart_again(there, here, randomised):
    model = randomised(ViT(replace(TINY, prefix_position=there)))
    x = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        close(fitted(model, prefix_position=here)(x), model(x))


def test_deits_second_token_and_head_may_be_left_out(randomised):
    model = randomised(ViT(replace(TINY, distilled=True)))
    result = fit(model.state_dict(), model.config, TINY, "these")
    assert result.left_out == ("head_distilled.weight", "head_distilled.bias")
    assert result.notes == ("left out: distilled",)
    assert torch.equal(result.state["prefix"][0], model.prefix[0])
    assert torch.equal(result.state["prefix"][1:], model.prefix[2:])
    assert torch.equal(result.state["position.table"][1:], model.position.table[2:])
    assert torch.equal(result.state["head.weight"], model.head.weight)


def test_the_first_blocks_of_a_deeper_model_are_a_model_too(randomised):
    model = randomised(ViT(replace(TINY, depth=3)))
    result = fit(model.state_dict(), model.config, replace(TINY, depth=2), "these")
    assert result.new == () and len(result.left_out) == 12
    assert all(key.startswith("encoder.blocks.2.") for key in result.left_out)
    assert result.notes == ("depth: the first 2 of 3 blocks",)
    shallow = fitted(model, depth=2)
    model.encoder.blocks = model.encoder.blocks[:2]
    x = torch.randn(3, 3, 56, 56)
    with torch.inference_mode():
        close(shallow(x), model(x))


def test_patches_of_twice_the_size_see_the_same_in_an_image_of_twice_the_size(randomised):
    model = randomised(ViT(TINY))
    larger = fitted(model, patch=(8, 8), image_size=(112, 112))
    x = torch.randn(2, 3, 56, 56)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4)  # [b c gh gw 4 4], each enlarged on its own
    big = torch.nn.functional.interpolate(
        patches.reshape(-1, 1, 4, 4), size=(8, 8), mode="bicubic", antialias=True
    )
    big = big.view(2, 3, 14, 14, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 112, 112)
    with torch.inference_mode():
        close(larger(big), model(x), 1e-4)


def test_a_grey_model_sees_what_the_rgb_one_saw(randomised):
    model = randomised(ViT(TINY))
    x = torch.randn(2, 1, 56, 56)
    with torch.inference_mode():
        expected = model(x.expand(-1, 3, -1, -1))
        close(fitted(model, channels=1)(x), expected)
    assert fitted(model, channels=5)(torch.randn(1, 5, 56, 56)).shape == (1, 5)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"depth": 2}, "depth 1 there and 2 here.*the model also has 'encoder.blocks.1"),
        (
            {"width": 32},
            r"width 16 there and 32 here.*'stem.proj.bias' is \(16,\), the model.s \(32,\)",
        ),
        ({"heads": 4}, "heads 2 there and 4 here.*same shape, and another meaning"),
        ({"layer_scale": 0.1}, "also has 'encoder.blocks.0.scale1.gamma'"),
        ({"activation": "swiglu"}, "activation gelu there and swiglu here"),
        ({"registers": 4}, "registers 2 there and 4 here"),
        ({"distilled": True}, "'prefix' is"),
        ({"pool": "map"}, "the model also has 'pool.probe'"),
        ({"position": "rope", "heads": 2}, "position learned there and rope here"),
    ],
)
def test_another_structure_is_refused_with_tensors_and_shapes(changes, words, randomised):
    model = randomised(ViT(TINY))
    with pytest.raises(DataError, match=f"(?s)these does not fit the model: .*{words}"):
        fit(model.state_dict(), TINY, replace(TINY, **changes), "these")


def test_the_models_that_would_fit_are_named():
    small = model_config("deit_s16")
    with pytest.raises(DataError, match=r"It fits .*'vit_s16', 'deit_s16'"):
        fit({}, small, model_config("vit_b16"), "x.pth")
    assert models_like(model_config("dinov2_s14")) == ["dinov2_s14"]
    assert models_like(model_config("deit_s16_distilled", image_size=(384, 384))) == [
        "vit_s16",
        "deit_s16",
        "deit_s16_distilled",
    ]
