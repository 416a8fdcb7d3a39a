"""Hybrids R+ViT in Google's .npz files: their names, their shapes of 2020, and timm's reader.

That the ResNet computes what Google's does is shown in tests/models/test_hybrid.py, and the same of
the encoder in test_google.py. Here the two come out of one file.
"""

from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer_hybrid import _resnetv2
from torch import nn

from close import close
from vitrail.errors import DataError
from vitrail.models import ViT, ViTConfig
from vitrail.weights.files import read_weights
from vitrail.weights.fit import fit
from vitrail.weights.google import to_google
from vitrail.weights.layouts import Found, understand
from vitrail.weights.write import write_npz
from weights.sources import in_turns

Arrays = dict[str, np.ndarray]

D, H, M, CLASSES = 24, 3, 40, 5
SIZE = (32, 48)
CONFIG = ViTConfig(
    depth=2,
    width=D,
    heads=H,
    mlp=M,
    stem="resnet",
    stem_depths=(1, 2),
    patch=(16, 16),
    image_size=SIZE,
    classes=CLASSES,
    activation="gelu_tanh",
    resample="bilinear_aligned",
)
ROOT = replace(CONFIG, stem_depths=())
both = pytest.mark.parametrize("config", [CONFIG, ROOT], ids=["two stages", "the root alone"])


def normal(*shape: int) -> np.ndarray:
    std = 0.3 if len(shape) < 2 else np.prod(shape[:-1]) ** -0.5
    return np.random.normal(size=shape, scale=std).astype(np.float32)


def norm(name: str, *shape: int) -> Arrays:
    return {f"{name}/scale": 1 + normal(*shape), f"{name}/bias": normal(*shape)}


def unit(at: str, c_in: int, middle: int, first: bool) -> Arrays:
    """As the published files have it: a group norm's leaves are [1, 1, 1, C]."""
    arrays = {
        f"{at}/conv1/kernel": normal(1, 1, c_in, middle),
        f"{at}/conv2/kernel": normal(3, 3, middle, middle),
        f"{at}/conv3/kernel": normal(1, 1, middle, 4 * middle),
        **norm(f"{at}/gn1", 1, 1, 1, middle),
        **norm(f"{at}/gn2", 1, 1, 1, middle),
        **norm(f"{at}/gn3", 1, 1, 1, 4 * middle),
    }
    if first:
        arrays[f"{at}/conv_proj/kernel"] = normal(1, 1, c_in, 4 * middle)
        arrays |= norm(f"{at}/gn_proj", 1, 1, 1, 4 * middle)
    return arrays


def file(stages: bool = True) -> Arrays:
    """The file of systems.md, section 3.2, for two stages of 1 and 2 units, or for none."""
    arrays = {"conv_root/kernel": normal(7, 7, 3, 64), **norm("gn_root", 1, 1, 1, 64)}
    if stages:
        arrays |= unit("block1/unit1", 64, 64, True)
        arrays |= unit("block2/unit1", 256, 128, True)
        arrays |= unit("block2/unit2", 512, 128, False)
    cells, c = (2, 512) if stages else (4, 64)  # 16 pixels are so many cells of stride 8, 4
    arrays |= {"embedding/kernel": normal(cells, cells, c, D), "embedding/bias": normal(D)}
    arrays |= {"cls": normal(1, 1, D), "head/kernel": normal(D, CLASSES)}
    arrays |= {"head/bias": normal(CLASSES), **norm("Transformer/encoder_norm", D)}
    arrays["Transformer/posembed_input/pos_embedding"] = normal(1, 2 * 3 + 1, D)
    for i in range(CONFIG.depth):
        at = f"Transformer/encoderblock_{i}"
        arrays |= norm(f"{at}/LayerNorm_0", D) | norm(f"{at}/LayerNorm_2", D)
        attention = f"{at}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            arrays[f"{attention}/{part}/kernel"] = normal(D, H, D // H)
            arrays[f"{attention}/{part}/bias"] = normal(H, D // H)
        arrays[f"{attention}/out/kernel"] = normal(H, D // H, D)
        arrays[f"{attention}/out/bias"] = normal(D)
        for n, (n_in, n_out) in enumerate(((D, M), (M, D))):
            arrays[f"{at}/MlpBlock_3/Dense_{n}/kernel"] = normal(n_in, n_out)
            arrays[f"{at}/MlpBlock_3/Dense_{n}/bias"] = normal(n_out)
    return arrays


def read(arrays: Arrays) -> Found:
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}
    return understand(tensors, {"image_size": SIZE}, "a file")


def timms(path: Path, config: ViTConfig) -> nn.Module:
    """timm's hybrid, by timm's own reader of these files."""
    backbone = _resnetv2(config.stem_depths)
    patch = 16 // (8 if config.stem_depths else 4)
    model = timm.models.VisionTransformer(
        img_size=SIZE,
        patch_size=patch,
        embed_layer=partial(timm.layers.HybridEmbed, backbone=backbone),
        embed_dim=D,
        depth=config.depth,
        num_heads=H,
        mlp_ratio=M / D,
        num_classes=CLASSES,
        act_layer="gelu_tanh",
    )
    model.load_pretrained(str(path))
    return model.eval()


@both
def test_a_file_is_understood_as_timm_understands_it(config, tmp_path):
    arrays = file(stages=bool(config.stem_depths))
    found = read(arrays)
    assert found.layout.name == "google"
    assert found.config == config, "Google's epsilons among the rest"
    np.savez(tmp_path / "file.npz", **arrays)
    ours = ViT(replace(found.config, stem_eps="timm")).eval()
    ours.load_state_dict(found.state)
    x = torch.randn(3, 3, *SIZE)
    with torch.inference_mode():
        expected = timms(tmp_path / "file.npz", config)(x)
        assert 0.3 < expected.std() < 3, "logits of order 1"
        close(ours(x), expected)


@both
def test_a_file_comes_back_bit_by_bit(config):
    arrays = file(stages=bool(config.stem_depths))
    found = read(arrays)
    back = to_google(found.state, found.config)
    assert back.keys() == arrays.keys()
    for key, array in arrays.items():
        squeezed = array.reshape(back[key].shape)  # group norms are written as flax has them today
        assert np.array_equal(back[key].numpy(), squeezed), key


@both
def test_our_weights_come_back_bit_by_bit_through_a_file(config, randomised, tmp_path):
    ours = randomised(ViT(config))
    state = ours.state_dict()
    write_npz(tmp_path / "weights.npz", to_google(state, config))
    found = understand(read_weights(tmp_path / "weights.npz").tensors, {"image_size": SIZE}, "it")
    assert found.config == config
    assert found.state.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(found.state[key], tensor), key
    theirs = ViT(replace(config, stem_eps="timm")).eval()
    theirs.load_state_dict(state)
    x = torch.randn(2, 3, *SIZE)
    with torch.inference_mode():
        close(timms(tmp_path / "weights.npz", config)(x), theirs(x))


def test_timms_epsilons_have_no_counterpart_there(randomised):
    config = replace(CONFIG, stem_eps="timm")
    with pytest.raises(DataError, match="Google has no counterpart of stem_eps='timm'"):
        to_google(randomised(ViT(config)).state_dict(), config)


def test_weights_with_timms_epsilons_fit_a_model_with_googles_and_other_images(randomised):
    theirs = replace(CONFIG, stem_eps="timm")
    wanted = replace(CONFIG, image_size=(48, 48), channels=1, classes=3)
    fitted = fit(randomised(ViT(theirs)).state_dict(), theirs, wanted, "a file")
    assert set(fitted.new) == {"head.weight", "head.bias"}
    missing, unexpected = ViT(wanted).load_state_dict(fitted.state, strict=False)
    assert set(missing) == set(fitted.new) and not unexpected
    with pytest.raises(DataError, match=r"stem_depths \(1, 2\) there and \(1, 3\) here"):
        fit({}, theirs, replace(theirs, stem_depths=(1, 3)), "a file")


@pytest.mark.parametrize(
    "fault, message",
    [
        (lambda a: a.pop("block2/unit2/gn1/bias"), r"missing 'stages/1/1/gn1\.bias'"),
        (lambda a: a.pop("block1/unit1/conv1/kernel"), "missing 'stages/0/0/conv1"),
        (lambda a: a.update({"block2/unit4/conv1/kernel": normal(1, 1, 512, 128)}), "missing"),
        (lambda a: a.update({"block4/unit1/gn1/bias": normal(64)}), "no square grid"),
        (lambda a: a.update({"block1/unit1/odd/kernel": normal(2, 2)}), "unexpected 'stages/0/0"),
        (lambda a: a.update({"conv_root/kernel": normal(7, 7, 3)}), "has 4 axes"),
        (lambda a: a.update({"embedding/kernel": normal(3, 3, 512, D)}), "no square grid"),
    ],
)
def test_a_damaged_file_is_one_clear_error(fault, message):
    arrays = file()
    fault(arrays)
    with pytest.raises(DataError, match=message):
        read(arrays)


@in_turns((), (0,), (4,), (1, 0, 3), (7, 5), (1, 1, 1, 1, 1))
def test_an_array_of_any_other_shape_is_one_clear_error(shapes):
    arrays = file()
    for key, shape in zip(
        (key for key in arrays if key.startswith(("conv", "gn", "block1", "embedding"))),
        cycle(shapes),
        strict=False,
    ):
        with pytest.raises(DataError):
            read(arrays | {key: np.zeros(shape, np.float32)})
