from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from vitrail.errors import UsageError
from vitrail.models import MODELS, ViT, ViTConfig, build, model_config

TINY = ViTConfig(
    depth=2, width=32, heads=2, mlp=48, patch=(8, 8), image_size=(32, 32), classes=5, dropout=0.0
)
# A change of each field that a user would notice: in the weights, in the output, or as an error.
CHANGES = {
    "depth": 3,
    "width": 64,
    "heads": 4,
    "mlp": 64,
    "patch": (4, 8),
    "image_size": (32, 40),
    "channels": 1,
    "classes": 6,
    "stem": "conv",
    "stem_norm": True,
    "stem_bias": False,
    "stem_depths": (1,),
    "stem_eps": "timm",
    "indivisible": "pad",
    "scales": "hierarchical",
    "fine": 0.5,
    "saliency": "learned",
    "position": "sincos_mae",
    "prefix_position": False,
    "resample": "bilinear_aligned",
    "pre_norm": True,
    "class_token": False,
    "distilled": True,
    "registers": 2,
    "pool": "mean",
    "pool_norm": True,
    "activation": "gelu_tanh",
    "qkv_bias": False,
    "qk_norm": True,
    "layer_scale": 0.1,
    "norm_eps": 0.5,
    "representation": 24,
    "head_bias": False,
    "dropout": 0.5,
    "drop_path": 0.5,
    "merge": 4,
}
# Fields that only mean something beside a certain value of another.
BESIDE = {
    "stem_depths": {"stem": "resnet"},
    "stem_eps": {"stem": "resnet", "stem_depths": (3, 3)},
    "fine": {"scales": "adaptive"},
    "saliency": {"scales": "adaptive"},
}


def beside(field: str) -> ViTConfig:
    return replace(TINY, **BESIDE.get(field, {}))


def shapes(config: ViTConfig) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in ViT(config).state_dict().items()}


def outputs(config: ViTConfig, state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What the model says of an image of another height, in training and in evaluation."""
    model = ViT(config)
    model.load_state_dict(state)
    x = torch.linspace(-1, 1, 4 * 3 * 40 * 32).sin().view(4, 3, 40, 32)
    torch.manual_seed(1)
    return [model.train()(x), model.eval()(x)]


def test_every_field_is_tried():
    assert {field.name for field in fields(ViTConfig)} == {"family", *CHANGES}


@pytest.mark.parametrize("field", [f for f in CHANGES if f not in ("indivisible", "class_token")])
def test_every_field_has_an_effect(field, randomised):
    base = beside(field)
    changed = replace(base, **{field: CHANGES[field]})
    if shapes(changed) == shapes(base):
        state = randomised(ViT(base)).state_dict()
        before, after = outputs(base, state), outputs(changed, state)
        assert max((x - y).abs().max() for x, y in zip(before, after, strict=True)) > 1e-5


def test_indivisible_decides_between_padding_and_an_error():
    x = torch.zeros(1, 3, 30, 30)
    assert ViT(replace(TINY, indivisible="pad"))(x).shape == (1, 5)
    with pytest.raises(UsageError, match="indivisible='pad'"):
        ViT(TINY)(x)


def test_class_token_takes_its_weights_along():
    with_token, without = replace(TINY, pool="mean"), replace(TINY, pool="mean", class_token=False)
    assert shapes(with_token).keys() - shapes(without).keys() == {"prefix"}


@pytest.mark.parametrize("field", ["position", "pool", "activation", "stem", "scales", "saliency"])
def test_no_two_values_of_a_choice_are_the_same_model(field, randomised):
    seen = []
    for choice in get_args(ViTConfig.__annotations__[field]):
        torch.manual_seed(0)
        model = randomised(ViT(replace(beside(field), classes=0, **{field: choice})))
        torch.manual_seed(1)
        seen.append(model(torch.randn(2, 3, 32, 32)))
    for i, one in enumerate(seen):
        alike = [other for other in seen[:i] if other.shape == one.shape]
        assert all((one - other).abs().max() > 1e-6 for other in alike)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stem": "convv"}, "unknown stem 'convv': did you mean 'conv'"),
        ({"position": "learnt"}, "unknown position 'learnt': did you mean 'learned'"),
        ({"position": "sincos"}, "unknown position 'sincos': did you mean 'sincos_1d'"),
        ({"scales": "adaptve"}, "unknown scales 'adaptve': did you mean 'adaptive'"),
        ({"saliency": "variances"}, "unknown saliency 'variances': did you mean 'variance'"),
        ({"fine": 0.0}, r"fine is a share of the patches, in \(0, 1\], not 0.0"),
        ({"fine": 1.5}, r"in \(0, 1\], not 1.5"),
        ({"pool": "clas"}, "unknown pool 'clas': did you mean 'class'"),
        ({"activation": "gelu_tan"}, "did you mean 'gelu_tanh'"),
        ({"indivisible": "padd"}, "did you mean 'pad'"),
        ({"depth": 0}, "depth must be at least 1, not 0"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"classes": -1}, "classes cannot be negative"),
        ({"registers": -1}, "registers cannot be negative"),
        ({"image_size": 32}, r"image_size is a pair \(height, width\) in pixels, not 32"),
        ({"patch": (8,)}, "patch is a pair"),
        ({"patch": (0, 8)}, "patch is a pair"),
        ({"image_size": (33, 32)}, "33x32 .* cannot be cut into patches of 8x8: use 32x32"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"drop_path": -0.1}, "drop_path must be in"),
        ({"norm_eps": 0.0}, "norm_eps must be in"),
        ({"heads": 3}, "width 32 is not divisible by 3 heads"),
        ({"width": 34, "position": "sincos_mae"}, "width divisible by 4"),
        ({"heads": 16, "position": "rope"}, "heads whose width is divisible by 4"),
        ({"class_token": False}, "pool='class' needs class_token=True"),
        ({"pool": "mean", "distilled": True}, "needs pool='class'"),
    ],
    ids=str,
)
def test_a_bad_value_is_refused_and_the_message_says_what_is_right(change, message):
    with pytest.raises(UsageError, match=message):
        replace(TINY, **change)


def test_a_misspelt_model_is_answered_with_the_near_name():
    with pytest.raises(UsageError, match="unknown model 'vit_b_16': did you mean 'vit_b16'"):
        build("vit_b_16")


def test_a_misspelt_field_is_answered_with_the_near_name():
    with pytest.raises(UsageError, match="'layerscale': did you mean 'layer_scale'"):
        build("vit_ti16", layerscale=1e-5)


def test_the_family_is_no_change_to_a_model():
    with pytest.raises(UsageError, match="unknown field of ViTConfig 'family'"):
        build("vit_ti16", family="mixer")


def test_changes_go_with_a_name():
    with pytest.raises(UsageError, match=r"dataclasses\.replace"):
        build(TINY, classes=3)


def test_num_classes_is_understood_as_classes():
    assert model_config("vit_ti16", num_classes=7) == model_config("vit_ti16", classes=7)


def test_a_config_can_neither_be_changed_nor_hide_a_row():
    with pytest.raises(AttributeError):
        TINY.depth = 3
    build("vit_ti16", depth=1, classes=3)
    assert MODELS["vit_ti16"].depth == 12


KEYS = Path(__file__).with_name("keys.txt")
_BLOCK: dict[str, object] = {"depth": 1}
_STAGES: dict[str, object] = {"depths": (1, 2), "widths": (128, 256)}
ROWS = {
    "vit_ti16": _BLOCK,
    "deit_ti16_distilled": _BLOCK,
    "deit3_s16": _BLOCK,
    "dinov2_s14_reg": _BLOCK,
    "vit_mini16": _BLOCK,  # a convolutional stem
    "vit_so400m14": _BLOCK,
    "r26_s32": {**_BLOCK, "stem_depths": (1, 2)},
    "resnet18": _STAGES,
    "resnet50": _STAGES,
    "bit_r50x1": _STAGES,
}


def test_the_names_in_a_checkpoint_stay_as_they_are():
    """A renamed key orphans every checkpoint: change keys.txt only with a way to read old ones."""
    lines = []
    for name, changes in ROWS.items():
        with torch.device("meta"):
            keys = build(name, **changes).state_dict()
        lines += [f"# {name}", *sorted(keys), ""]
    assert KEYS.read_text(encoding="utf-8").splitlines() == lines[:-1]
