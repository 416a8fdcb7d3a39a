"""Hybrids R+ViT: Google's ResNet before the encoder, against timm, transformers and numpy."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import transformers as hf

from close import close
from models.families import HYBRID
from vitrail.errors import UsageError
from vitrail.models import ViT, ViTConfig, build, count_parameters, model_config
from vitrail.nn import ResNetStem, backbone_stride
from vitrail.weights import from_timm, to_timm

CASES = {  # r50_l32 is r26_s32 with other numbers
    "r_ti16": "vit_tiny_r_s16_p8_224",
    "r26_s32": "vit_small_r26_s32_224",
    "r50_b16": "vit_base_r50_s16_224",
}
SIZES = [(64, 96), (128, 64)]


def test_r_ti16_has_32_pixels_a_token_and_could_not_have_16():
    assert model_config("r_ti16").grid == (7, 7)
    with torch.device("meta"):
        as_named, as_published = build("r_ti16", patch=(16, 16)), build("r_ti16")
        assert count_parameters(as_named) != count_parameters(as_published)


# --- the same outputs ---


def pair(name: str, size: tuple[int, int]) -> tuple[ViTConfig, torch.nn.Module]:
    theirs = timm.create_model(CASES[name], img_size=size, depth=2, num_classes=1000)
    config = model_config(name, image_size=size, depth=2, dropout=0.0, stem_eps="timm")
    return config, theirs


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_logits_with_timms_weights(name, size, randomised):
    config, theirs = pair(name, size)
    ours = ViT(config).eval()
    ours.load_state_dict(from_timm(randomised(theirs).state_dict(), config))
    x = torch.randn(3, 3, *size)
    with torch.inference_mode():
        expected = theirs(x)
        assert 0.3 < expected.std() < 3, "logits of order 1"
        close(ours(x), expected)
        close(ours(x[:1]), theirs(x[:1]))


@pytest.mark.parametrize("name", ["r_ti16", "r26_s32"])
def test_timms_names_both_ways(name, randomised):
    config, theirs = pair(name, (32, 64))
    state = randomised(theirs).state_dict()
    back = to_timm(from_timm(state, config), config)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor), key


@pytest.mark.parametrize("depths", [(1,), (1, 2, 1)], ids=str)
def test_the_maps_are_those_of_transformers(depths, randomised):
    """Its BiT has the hybrids' blocks too: what its ViTHybrid was built on."""
    theirs = randomised(
        hf.BitModel(
            hf.BitConfig(
                layer_type="bottleneck",
                global_padding="same",
                embedding_dynamic_padding=True,
                depths=list(depths),
                hidden_sizes=[256, 512, 1024, 2048][: len(depths)],
            )
        )
    )
    ours = ResNetStem(3, (32, 32), 16, depths=depths, eps="timm").eval()
    names = {
        "root.conv": "embedder.convolution",
        "root.norm": "embedder.norm",
        "shortcut": "downsample",
        "stages": "encoder.stages",
    }
    state = theirs.state_dict()
    for key, tensor in ours.state_dict().items():
        if not key.startswith("proj"):
            for our, their in names.items():
                key = key.replace(our, their)
            if key.startswith("encoder"):
                _, stages, stage, rest = key.split(".", 3)
                key = f"encoder.{stages}.{stage}.layers.{rest}"
            tensor.copy_(state.pop(key))
    assert not state
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        _, *expected = theirs(x, output_hidden_states=True).hidden_states
        for map_, theirs_ in zip(ours.maps(x), expected, strict=True):
            close(map_ / theirs_.max(), theirs_ / theirs_.max())


# --- Google's own arithmetic: float64, its padding, its epsilons ---


def windows(x: np.ndarray, kernel: int, stride: int, fill: float) -> np.ndarray:
    """SAME windows of a map [c h w]: [c gh gw kernel kernel]."""
    for axis in (1, 2):
        size = x.shape[axis]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads = [(0, 0)] * 3
        pads[axis] = (total // 2, total - total // 2)
        x = np.pad(x, pads, constant_values=fill)
    cut = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(1, 2))
    return cut[:, ::stride, ::stride]


class Google:
    """`vit_jax/models_resnet.py` on our tensors."""

    def __init__(self, stem: ResNetStem) -> None:
        self.p = {k: t.double().numpy() for k, t in stem.state_dict().items()}

    def conv(self, x: np.ndarray, name: str, stride: int = 1) -> np.ndarray:
        kernels = self.p[f"{name}.weight"]
        standard = [(w - w.mean()) / (w.std() + 1e-5) for w in kernels]
        cut = windows(x, kernels.shape[-1], stride, 0.0)
        return np.einsum("cyxhw,dchw->dyx", cut, np.stack(standard), optimize=True)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        groups = x.reshape(32, -1)
        normal = groups - groups.mean(1, keepdims=True)
        normal /= np.sqrt(groups.var(1, keepdims=True) + 1e-6)
        scale, bias = self.p[f"{name}.weight"], self.p[f"{name}.bias"]
        return normal.reshape(x.shape) * scale[:, None, None] + bias[:, None, None]

    def block(self, x: np.ndarray, at: str, stride: int) -> np.ndarray:
        y = self.norm(self.conv(x, f"{at}.conv1"), f"{at}.norm1").clip(0)
        y = self.norm(self.conv(y, f"{at}.conv2", stride), f"{at}.norm2").clip(0)
        y = self.norm(self.conv(y, f"{at}.conv3"), f"{at}.norm3")
        if f"{at}.shortcut.conv.weight" in self.p:
            x = self.norm(self.conv(x, f"{at}.shortcut.conv", stride), f"{at}.shortcut.norm")
        return (x + y).clip(0)

    def maps(self, image: np.ndarray, depths: tuple[int, ...]) -> list[np.ndarray]:
        x = self.norm(self.conv(image, "root.conv", 2), "root.norm").clip(0)
        x = windows(x, 3, 2, -np.inf).max((3, 4))
        maps = []
        for i, depth in enumerate(depths):
            for j in range(depth):
                x = self.block(x, f"stages.{i}.{j}", 2 if i and not j else 1)
            maps.append(x)
        return maps or [x]


@pytest.mark.parametrize("std", [0.1, 1e-4], ids=str)
@pytest.mark.parametrize("depths", [(), (1, 2)], ids=str)
def test_the_maps_are_googles(depths, std, randomised):
    stem = randomised(ResNetStem(3, (32, 32), 16, depths=depths))
    with torch.no_grad():
        for name, parameter in stem.named_parameters():
            if "conv" in name:  # where kernels are small, an epsilon is not
                parameter.mul_(std / parameter.std())
    x = torch.randn(2, 3, 32, 64)
    with torch.inference_mode():
        ours = stem.maps(x)
    google = Google(stem)
    for i, image in enumerate(x.double().numpy()):
        for map_, expected in zip(ours, google.maps(image, depths), strict=True):
            close(map_[i], torch.from_numpy(expected).float())


def test_whose_epsilons_is_a_field(randomised):
    """timm adds 1e-8 to a kernel's variance, Google 1e-5 to its deviation."""
    ours = randomised(ViT(HYBRID))
    theirs = ViT(replace(HYBRID, stem_eps="timm")).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        assert 1e-6 < (ours(x) - theirs(x)).abs().max() < 1e-3


# --- the stem in a ViT ---


def test_the_maps_are_the_resnets_and_then_the_tokens(randomised):
    model = randomised(ViT(replace(HYBRID, stem_norm=False)))
    x = torch.randn(2, 3, 64, 96)
    features = model.features(x)
    assert features.strides == ((4, 4), (8, 8), (16, 16))
    assert [m.shape[1:] for m in features.maps] == [(256, 16, 24), (512, 8, 12), (32, 4, 6)]
    for map_, expected in zip(features.maps, model.stem.maps(x), strict=False):
        assert torch.equal(map_, expected)
    tokens, grid = model.stem(x)
    assert grid == features.grid == (4, 6)
    cells = features.maps[1].unfold(2, 2, 2).unfold(3, 2, 2)  # 16 pixels are 2x2 cells
    weight, bias = model.stem.proj.weight, model.stem.proj.bias
    expected = torch.einsum("bcyxhw,dchw->byxd", cells, weight) + bias
    close(tokens, expected.flatten(1, 2), 1e-4)


def test_without_stages_the_root_is_the_finest_map():
    features = build("r_ti16", depth=1).features(torch.zeros(1, 3, 64, 96))
    assert features.strides == ((4, 4), (32, 32))
    assert [m.shape[1:] for m in features.maps] == [(64, 16, 24), (192, 2, 3)]


@pytest.mark.parametrize("depths, stride", [((), 4), ((1,), 4), ((1, 1), 8), ((1, 2, 1, 1), 32)])
def test_strides(depths, stride):
    assert backbone_stride(depths) == stride
    stem = ResNetStem(3, (32, 32), 16, depths=depths)
    last = stem.maps(torch.zeros(1, 3, 32, 64))[-1]
    assert last.shape[2:] == (32 // stride, 64 // stride)


def test_a_new_block_is_its_shortcut():
    stem = ResNetStem(3, (4, 4), 16, depths=(2,)).eval()
    x = stem.stages[0][0](torch.randn(1, 64, 8, 8))
    assert torch.equal(stem.stages[0][1](x), x)


@pytest.mark.parametrize("size", [(60, 96), (64, 90)], ids=str)
def test_images_of_no_whole_patches_can_be_padded(size, randomised):
    x = torch.randn(2, 3, *size)
    padded = torch.zeros(2, 3, 64, 96)
    padded[:, :, : size[0], : size[1]] = x
    ours = randomised(ViT(replace(HYBRID, indivisible="pad")))
    assert torch.equal(ours(x), ours(padded))


def test_images_of_different_sizes_are_refused():
    with pytest.raises(UsageError, match=r"stem='resnet'.*take resize crop or squash"):
        ViT(HYBRID)(torch.zeros(1, 3, 64, 96), torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch": (16, 12)}, r"stem_depths=\(1, 2\).*a multiple of 8, not 16x12"),
        ({"patch": (6, 6), "image_size": (60, 60), "stem_depths": ()}, "a multiple of 4, not 6x6"),
    ],
    ids=str,
)
def test_a_patch_is_of_whole_cells(changes, message):
    with pytest.raises(UsageError, match=message):
        ViT(replace(HYBRID, **changes))
