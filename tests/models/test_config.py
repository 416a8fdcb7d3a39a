from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from models.families import VIT, VIT_BESIDE
from vitrail.errors import UsageError
from vitrail.models import MODELS, ViT, ViTConfig, build, model_config


def beside(field: str) -> ViTConfig:
    return replace(VIT, **VIT_BESIDE.get(field, {}))


def shapes(config: ViTConfig) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in ViT(config).state_dict().items()}


def test_indivisible_decides_between_padding_and_an_error():
    x = torch.zeros(1, 3, 30, 30)
    assert ViT(replace(VIT, indivisible="pad"))(x).shape == (1, 5)
    with pytest.raises(UsageError, match="indivisible='pad'"):
        ViT(VIT)(x)


def test_class_token_takes_its_weights_along():
    with_token, without = replace(VIT, pool="mean"), replace(VIT, pool="mean", class_token=False)
    assert shapes(with_token).keys() - shapes(without).keys() == {"prefix"}


@pytest.mark.parametrize("field", ["position", "pool", "activation", "stem", "scales", "saliency"])
def test_no_two_values_of_a_choice_are_the_same_model(field, randomised):
    seen = []
    for choice in get_args(ViTConfig.__annotations__[field]):
        torch.manual_seed(0)
        model = randomised(ViT(replace(beside(field), classes=0, **{field: choice})))
        torch.manual_seed(1)
        seen.append(model(torch.randn(2, 3, 32, 48)))
    for i, one in enumerate(seen):
        alike = [other for other in seen[:i] if other.shape == one.shape]
        assert all((one - other).abs().max() > 1e-6 for other in alike)


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
        build(VIT, classes=3)


def test_num_classes_is_understood_as_classes():
    assert model_config("vit_ti16", num_classes=7) == model_config("vit_ti16", classes=7)


def test_a_config_can_neither_be_changed_nor_hide_a_row():
    with pytest.raises(AttributeError):
        VIT.depth = 3
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
    "pe_core_ti16": _BLOCK,
    "eva02_b16_clip": _BLOCK,  # norms within attention and MLP
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
