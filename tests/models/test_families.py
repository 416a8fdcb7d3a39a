"""What every family promises, in one test each: features, sizes, fields, and that it can learn."""

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from close import close
from models.families import KINDS, Kind
from vitrail.errors import UsageError
from vitrail.models import FAMILIES, MODELS, ViT, build
from vitrail.models.family import StagedConfig
from vitrail.nn import DropPath

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
ANY_SIZE = {name: kind for name, kind in KINDS.items() if isinstance(kind.config, StagedConfig)}


def images(kind: Kind, count: int = 3) -> torch.Tensor:
    return torch.randn(count, kind.config.channels, *kind.size)


def test_every_family_is_here():
    assert {type(kind.config) for kind in KINDS.values()} == set(FAMILIES)


# --- features ---


@every_kind
def test_features(kind, randomised):
    model = randomised(build(kind.config))
    x = images(kind)
    features = model.features(x)
    assert [m.shape[1:] for m in features.maps] == list(kind.maps)
    assert features.strides == tuple((kind.stride * 2**i,) * 2 for i in range(len(kind.maps)))
    _, rows, columns = kind.maps[-1]
    assert features.grid == (rows, columns)
    assert features.patches.shape == (3, rows * columns, kind.pooled)
    assert features.prefix.shape == (3, kind.prefix, kind.pooled)
    if features.maps[-1].shape[1] == kind.pooled:  # MobileViT pools more channels than its map has
        cell = features.maps[-1][1, :, 1, 1]
        assert torch.equal(features.patches[1, columns + 1], cell), "row by row"
    one = features.prefix[:, 0] if kind.prefix else features.patches.mean(1)
    close(features.pooled, one)
    assert model.logits(features).shape == (3, 1, 5)
    assert torch.equal(model(x), model.logits(features)[:, 0])


@every_kind
def test_a_model_without_a_head_gives_what_is_pooled(kind, randomised):
    model = randomised(build(kind.config))
    bare = build(replace(kind.config, classes=0)).eval()
    assert bare.head is None
    bare.load_state_dict({k: t for k, t in model.state_dict().items() if "head" not in k})
    x = images(kind)
    assert torch.equal(bare(x), model.features(x).pooled)


@every_kind
def test_how_images_lie_in_memory_changes_nothing(kind, randomised):
    model = randomised(build(kind.config))
    x = images(kind)
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    close(model(strided), model(x))


@every_kind
def test_grid_and_stride_are_known_beforehand(kind):
    config = replace(kind.config, image_size=kind.size)
    assert config.grid == kind.maps[-1][1:]
    assert config.stride == (kind.stride * 2 ** (len(kind.maps) - 1),) * 2


@pytest.mark.parametrize("size", [(224, 224), (225, 224), (31, 65), (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["twins_svt_s", "mobilevit_xxs", "resnet18", "bit_r50x1"])
def test_a_row_of_stages_takes_images_of_any_size(name, size):
    with torch.device("meta"):
        model = build(name, image_size=size).eval()
        assert model.config.stride == (32, 32)
        assert model.features(torch.zeros(1, 3, *size)).grid == model.config.grid


SHAPES = {
    "vit_b16": "12 blocks, width 768, 12 heads",
    "dynamicvit_s16": "12 blocks, width 384, 6 heads, 0.7 of the patches kept before each of "
    "3, 6, 9",
    "mixer_b16": "12 blocks, width 768, 14x14 tokens",
    "gmlp_s16": "30 blocks, width 256, 14x14 tokens",
    "twins_svt_s": "4 stages of 2, 2, 10, 4 blocks, widths 64, 128, 256, 512, windows of 7x7",
    "twins_pcpvt_s": "4 stages of 3, 4, 6, 3 blocks, widths 64, 128, 320, 512, no windows",
    "mobilevit_s": "5 stages, widths 32, 64, 96, 128, 160, the last 3 with transformers of 2, 4, 3 "
    "blocks, widths 144, 192, 240",
    "resnet50": "4 stages of 3, 4, 6, 3 bottleneck blocks, widths 256, 512, 1024, 2048",
    "bit_r50x1": "4 stages of 3, 4, 6, 3 bottleneck blocks, widths 256, 512, 1024, 2048",
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_build_in_words(name):
    assert MODELS[name].shape == SHAPES[name]


@every_kind
def test_blocks_are_named_first_to_last(kind):
    model = build(kind.config)
    assert model.block_names() == list(kind.blocks)
    assert [name for name, _ in model.named_modules() if name in kind.blocks] == list(kind.blocks)


# --- learning ---


@every_kind
def test_a_new_model_says_nothing_and_can_learn(kind):
    model = build(kind.config).train()
    x = images(kind, 4)
    assert model(x).abs().max() == 0, "a head of zeros"
    step = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x), torch.arange(4))
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@every_kind
def test_every_weight_learns_from_one_image_in_bfloat16(kind, randomised):
    model = randomised(build(kind.config)).train()
    x = torch.randn(1, *kind.size[::-1], 3).permute(0, 3, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x).float(), torch.tensor([1]))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (32, 32), (50, 31)], ids=str)
@pytest.mark.parametrize("kind", ANY_SIZE.values(), ids=ANY_SIZE)
def test_it_trains_on_one_image_of_any_size(kind, size):
    """Where the last map is of one cell, a batch norm has no statistics."""
    model = build(kind.config).train()
    x = torch.randn(1, 3, *size)
    # On a CPU torch 2.13 leaves the gradient of a kernel partly unwritten in bfloat16, where a
    # stride meets a map one cell wide.
    unwritten = size == (1, 1) and kind.config.family in ("resnet", "bit", "mobilevit")
    with torch.autocast("cpu", torch.bfloat16, enabled=not unwritten):
        loss = F.cross_entropy(model(x).float(), torch.tensor([1]))
    loss.backward()
    assert model.head.weight.grad.any()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_kind
def test_inference_in_bfloat16_is_near(kind, randomised):
    model = randomised(build(kind.config))
    x = images(kind)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        low = model(x).float()
    expected = model(x)
    close(low, expected, 0.1)


@every_kind
def test_stochastic_depth_grows_and_acts_in_training_alone(kind, randomised):
    model = randomised(build(replace(kind.config, drop_path=0.8)))
    rates = []
    for name in kind.blocks:
        parts = model.get_submodule(name).modules()
        (rate,) = {part.rate for part in parts if isinstance(part, DropPath)}
        rates.append(rate)
    last = len(rates) - 1
    assert rates == pytest.approx([0.8 * i / last for i in range(last + 1)])
    plain = build(kind.config)
    plain.load_state_dict(model.state_dict())
    x = images(kind, 8)
    assert torch.equal(model(x), plain.eval()(x))
    model.train()
    assert not torch.equal(model(x), model(x))


class Drawing(TorchFunctionMode):
    """Remembers what was drawn from a normal distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.init.normal_, torch.Tensor.normal_):
            self.drawn += args[:1] or [kwargs["tensor"]]
        return func(*args, **(kwargs or {}))


@every_kind
def test_nothing_is_drawn_on_the_meta_device(kind):
    """There torch would import its compiler first, which takes longer than all of a command."""
    with Drawing() as mode:
        build(kind.config)
        assert mode.drawn
        mode.drawn.clear()
        with torch.device("meta"):
            build(kind.config)
        assert not mode.drawn


# --- fields ---


@every_kind
def test_every_field_is_tried(kind):
    tried = ["family", *kind.changes, *kind.elsewhere]
    assert sorted(tried) == sorted(item.name for item in fields(kind.config))


FIELDS = [
    pytest.param(kind, field, id=f"{name}-{field}")
    for name, kind in KINDS.items()
    for field in kind.changes
]


@pytest.mark.parametrize("kind, field", FIELDS)
def test_every_field_has_an_effect(kind, field, randomised):
    """On the shapes of weights, or on what is said of an image in training or in evaluation."""
    base = replace(kind.config, **kind.beside.get(field, {}))
    one, other = build(base), build(replace(base, **{field: kind.changes[field]}))
    shapes = [{k: t.shape for k, t in m.state_dict().items()} for m in (one, other)]
    if shapes[0] == shapes[1]:
        other.load_state_dict(randomised(one).state_dict())
        x, said = images(kind, 4), []
        for model in (one, other):
            torch.manual_seed(1)
            said.append((model.train()(x), model.eval()(x)))
        assert not all(torch.equal(a, b) for a, b in zip(*said, strict=True))


REFUSED = [
    pytest.param(kind, changes, message, id=f"{name}-{changes}")
    for name, kind in KINDS.items()
    for changes, message in (
        ({"family": "other"}, f"is of the family '{kind.config.family}', not 'other'"),
        ({"channels": 0}, "channels must be at least 1, not 0"),
        ({"classes": -1}, "classes cannot be negative"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), not 1.0"),
        ({"drop_path": -0.1}, r"drop_path must be in \[0, 1\), not -0.1"),
        ({"image_size": 32}, r"image_size is a pair \(height, width\) in pixels, not 32"),
        ({"image_size": (32,)}, r"image_size is a pair .* not \(32,\)"),
        ({"image_size": (0, 32)}, r"image_size is a pair .* not \(0, 32\)"),
        *kind.refused,
    )
]


@pytest.mark.parametrize("kind, changes, message", REFUSED)
def test_a_config_that_makes_no_sense_is_refused(kind, changes, message):
    with pytest.raises(UsageError, match=message):
        replace(kind.config, **changes)


ONE_SIZE = r"\(data\.resize native or pad\) are for ViTs: {} takes resize crop or squash"


@every_kind
def test_what_it_does_not_take_is_refused(kind):
    model, config = build(kind.config), kind.config
    with pytest.raises(UsageError, match="have 1 channels, the model takes 3: build it with chan"):
        model(torch.zeros(1, 1, *kind.size))
    for size, message in kind.sizes:
        with pytest.raises(UsageError, match=message):
            config.check_size(size)
        if min(size):
            with pytest.raises(UsageError, match=message):
                model(torch.zeros(1, 3, *size))
    config.check_size(kind.size)
    if type(model) is not ViT:
        with pytest.raises(UsageError, match=ONE_SIZE.format(config.family)):
            model(images(kind, 1), torch.tensor([[1, 1]]))
