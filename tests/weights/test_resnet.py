"""ResNet's and BiT's files: Google's own, the oldest, and those of other ResNets."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from close import close
from vitrail.errors import DataError
from vitrail.models import build, model_config
from vitrail.weights.layouts import Found, understand
from vitrail.weights.resnet import GOOGLE_BIT, RESNET
from vitrail.weights.write import write_npz

State = dict[str, Tensor]
CLASSES = 7


def model_of(found: Found) -> nn.Module:
    model = build(found.config).eval()
    model.load_state_dict(found.state)
    return model


# --- Google's BiT ---


@cache
def google() -> dict[str, np.ndarray]:
    """A file by our own hand, from the names that timm reads: counted from 1, outputs last."""
    theirs = timm.create_model("resnetv2_50x1_bit", num_classes=CLASSES)
    arrays = {}

    def conv(name: str, module: nn.Conv2d) -> None:
        arrays[f"resnet/{name}/kernel"] = module.weight.detach().numpy().transpose(2, 3, 1, 0)

    def norm(name: str, module: nn.GroupNorm) -> None:
        n = module.num_channels
        arrays[f"resnet/{name}/gamma"] = np.random.uniform(0.5, 1.5, n).astype(np.float32)
        arrays[f"resnet/{name}/beta"] = np.random.normal(size=n, scale=0.5).astype(np.float32)

    conv("root_block/standardized_conv2d", theirs.stem.conv)
    for i, stage in enumerate(theirs.stages, start=1):
        for j, block in enumerate(stage.blocks, start=1):
            at = f"block{i}/unit{j:02d}"
            for letter, n in zip("abc", "123", strict=True):
                conv(f"{at}/{letter}/standardized_conv2d", getattr(block, f"conv{n}"))
                norm(f"{at}/{letter}/group_norm", getattr(block, f"norm{n}"))
            if block.downsample is not None:
                conv(f"{at}/a/proj/standardized_conv2d", block.downsample.conv)
    norm("group_norm", theirs.norm)
    conv("head/conv2d", theirs.head.fc)
    arrays["resnet/head/conv2d/bias"] = np.random.normal(size=CLASSES).astype(np.float32)
    return arrays


def tensors(arrays: dict[str, np.ndarray]) -> State:
    return {key: torch.from_numpy(array.copy()) for key, array in arrays.items()}


def test_googles_file_is_understood_as_timm_understands_it(tmp_path):
    found = understand(tensors(google()), {}, "a file")
    assert found.layout is GOOGLE_BIT
    assert found.config == model_config("bit_r50x1", classes=CLASSES)
    assert found.config.eps == "big_transfer"
    np.savez(tmp_path / "file.npz", **google())
    theirs = timm.create_model("resnetv2_50x1_bit", num_classes=CLASSES).eval()
    theirs.load_pretrained(str(tmp_path / "file.npz"))
    ours = model_of(found._replace(config=replace(found.config, eps="timm")))
    x = torch.randn(2, 3, 32, 64)
    with torch.inference_mode():
        expected = theirs(x)
        assert expected.std() > 0.05, "of the order of its head"
        close(ours(x), expected)


def test_googles_file_comes_back_and_timm_reads_it(tmp_path):
    found = understand(tensors(google()), {}, "a file")
    back = GOOGLE_BIT.write(found.state, found.config)
    assert back.keys() == google().keys()
    for key, array in google().items():
        assert np.array_equal(back[key].numpy(), array), key
    write_npz(tmp_path / "ours.npz", back)
    theirs = timm.create_model("resnetv2_50x1_bit", num_classes=CLASSES)
    theirs.load_pretrained(str(tmp_path / "ours.npz"))
    for key, tensor in understand(theirs.state_dict(), {}, "it").state.items():
        assert torch.equal(tensor, found.state[key]), key


# --- what is not quite as expected ---


def resnet18() -> State:
    config = model_config("resnet18", classes=CLASSES)
    return RESNET.write(build(config).state_dict(), config)


def test_the_oldest_files_lack_a_counter_that_no_output_needs():
    state = {k: t for k, t in resnet18().items() if not k.endswith("num_batches_tracked")}
    found = understand(state, {}, "a file")
    counters = [t for k, t in found.state.items() if k.endswith("num_batches_tracked")]
    assert len(counters) == 20 and not any(counters)
    assert found.config == model_config("resnet18", classes=CLASSES)


@pytest.mark.parametrize("theirs", ["resnet34", "seresnet18"])
def test_another_resnet_is_refused(theirs):
    with torch.device("meta"):
        state = timm.create_model(theirs).state_dict()
    with pytest.raises(DataError, match="ResNet, and fits none of 'resnet18'"):
        understand(state, {}, "a file")
