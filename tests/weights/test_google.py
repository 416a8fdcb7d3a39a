"""Google's .npz files: each age against a forward pass written in numpy, and timm's reader."""

from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from close import close
from vitrail.errors import DataError
from vitrail.models import ViT, ViTConfig, build
from vitrail.nn import resample_table
from vitrail.weights import convert, open_weights, pretrained
from vitrail.weights.files import read_weights
from vitrail.weights.google import from_google, to_google
from vitrail.weights.layouts import Found, understand, write_as
from vitrail.weights.write import write_npz
from weights.sources import in_turns, one_of_each

Arrays = dict[str, np.ndarray]

D, H, M, DEPTH, P, CLASSES = 24, 3, 40, 2, 8, 5
SIZE = (16, 24)
N = 2 * 3
CONFIG = ViTConfig(
    depth=DEPTH,
    width=D,
    heads=H,
    mlp=M,
    patch=(P, P),
    image_size=SIZE,
    classes=CLASSES,
    activation="gelu_tanh",
    resample="bilinear_aligned",
)


# --- files of every age, from the published key tables (systems.md, 3.1) ---


def flat(parts: Arrays, path: str = "") -> Arrays:
    """Nested parameters as the keys of a .npz."""
    arrays = {}
    for name, part in parts.items():
        arrays |= flat(part, f"{path}{name}/") if isinstance(part, dict) else {path + name: part}
    return arrays


def normal(*shape: int, std: float = 0.3) -> np.ndarray:
    return np.random.normal(size=shape, scale=std).astype(np.float32)


def norm() -> Arrays:
    return {"scale": 1 + normal(D), "bias": normal(D)}


def dense(n_in: int, n_out: int) -> Arrays:
    return {"kernel": normal(n_in, n_out, std=n_in**-0.5), "bias": normal(n_out)}


def attention() -> Arrays:
    def projection() -> Arrays:
        return {"kernel": normal(D, H, D // H, std=D**-0.5), "bias": normal(H, D // H)}

    out = {"kernel": normal(H, D // H, D, std=D**-0.5), "bias": normal(D)}
    return {name: projection() for name in ("query", "key", "value")} | {"out": out}


def mlp() -> Arrays:
    return {"Dense_0": dense(D, M), "Dense_1": dense(M, D)}


def block() -> Arrays:
    return {
        "LayerNorm_0": norm(),
        "MultiHeadDotProductAttention_0": attention(),
        "LayerNorm_1": norm(),
        "MlpBlock_0": mlp(),
    }


def big_vision(cls: bool = True, pool: bool = False) -> Arrays:
    """big_vision's own layout: linen names, a position table without a row for the class token."""
    blocks = {f"encoderblock_{i}": block() for i in range(DEPTH)}
    parts = {
        "embedding": {"kernel": normal(P, P, 3, D, std=0.07), "bias": normal(D)},
        "pos_embedding": normal(1, N, D),
        "Transformer": blocks | {"encoder_norm": norm()},
        "head": dense(D, CLASSES),
    }
    if cls:
        parts["cls"] = normal(1, 1, D)
    if pool:
        parts["MAPHead_0"] = {
            "probe": normal(1, 1, D),
            "MultiHeadDotProductAttention_0": attention(),
            "LayerNorm_0": norm(),
            "MlpBlock_0": mlp(),
        }
    return flat(parts)


PRE_LINEN = {
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1",
    "LayerNorm_1": "LayerNorm_2",
    "MlpBlock_0": "MlpBlock_3",
}


def original(representation: bool = False) -> Arrays:
    """The file of 2020: one counter a block, the class token's position in the table."""
    arrays = {}
    for key, array in big_vision().items():
        for new, old in PRE_LINEN.items():
            key = key.replace(new, old)
        arrays[key] = array
    del arrays["pos_embedding"]
    arrays["Transformer/posembed_input/pos_embedding"] = normal(1, N + 1, D)
    if representation:
        arrays |= flat({"pre_logits": dense(D, D)})
    return arrays


def under(prefix: str, arrays: Arrays) -> Arrays:
    return {prefix + key: array for key, array in arrays.items()}


def scanned(arrays: Arrays) -> Arrays:
    stacked = {k: v for k, v in arrays.items() if "/encoderblock_" not in k}
    for key in arrays:
        if "/encoderblock_0/" in key:
            blocks = [arrays[key.replace("_0/", f"_{i}/", 1)] for i in range(DEPTH)]
            stacked[key.replace("encoderblock_0", "encoderblock")] = np.stack(blocks)
    return stacked


def pool_at_top() -> Arrays:
    return {k.removeprefix("MAPHead_0/"): v for k, v in big_vision(False, True).items()}


def linen_with_class_row() -> Arrays:
    """big_vision before 2022: new names, the old table, in the encoder."""
    arrays = big_vision()
    del arrays["pos_embedding"]
    return arrays | {"Transformer/pos_embedding": normal(1, N + 1, D)}


def lit() -> Arrays:
    text = {"txt/head/kernel": normal(4, D), "txt/Embed_0/embedding": normal(9, 4), "t": normal(1)}
    return under("params/img/", big_vision()) | under("params/", text)


def sincos() -> Arrays:
    """big_vision's posemb="sincos2d", as its ViT-S/16 of 90 to 300 epochs: no table, pre-logits."""
    arrays = big_vision(cls=False) | flat({"pre_logits": dense(D, D)})
    del arrays["pos_embedding"]
    return arrays


FILES: dict[str, Callable[[], Arrays]] = {
    "original": original,
    "original, with pre-logits": partial(original, representation=True),
    "original, in an optimiser": lambda: (
        under("opt/target/", original()) | {"opt/state/step": normal(1)}
    ),
    "big_vision": big_vision,
    "big_vision, the class token's position in the table": linen_with_class_row,
    "big_vision, no class token": partial(big_vision, cls=False),
    "big_vision, attention pooling": partial(big_vision, cls=False, pool=True),
    "attention pooling, at the top": pool_at_top,
    "params/": lambda: under("params/", big_vision()),
    "scanned": lambda: under("params/", scanned(big_vision())),
    "LiT": lit,
    "fixed positions": sincos,
    "the first patch": partial(big_vision, cls=False),
}
TOLD: dict[str, dict[str, str]] = {
    "fixed positions": {"position": "sincos_bigvision"},
    "the first patch": {"pool": "first"},
}
"""What no array of these shows."""


def fixed_table() -> np.ndarray:
    """`posemb_sincos_2d` of big_vision: columns, then rows, the last frequency 1 / 10000."""
    y, x = np.mgrid[: SIZE[0] // P, : SIZE[1] // P].reshape(2, -1, 1)
    omega = 1 / 10_000 ** (np.arange(D // 4) / (D // 4 - 1))
    parts = (np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega))
    return np.concatenate(parts, axis=1)


# --- the oracle: one image after the other, one head after the other, in float64 ---


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


class Oracle:
    """The forward pass of google-research/vision_transformer and big_vision on a flat file."""

    def __init__(self, arrays: Arrays, first: bool = False) -> None:
        """`first`: big_vision's pool_type="0"."""
        self.first, self.size, self.patch = first, SIZE, P
        prefix = next(k for k in arrays if k.endswith("embedding/kernel"))
        prefix = prefix.removesuffix("embedding/kernel")
        self.p = {k.removeprefix(prefix): v.astype(np.float64) for k, v in arrays.items()}
        for key, array in list(self.p.items()):
            if "/encoderblock/" in key:
                for i in range(DEPTH):
                    self.p[key.replace("encoderblock", f"encoderblock_{i}")] = array[i]

    def find(self, *names: str) -> str:
        return next(n for n in names if n in self.p or any(k.startswith(f"{n}/") for k in self.p))

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-6) * self.p[f"{name}/scale"] + self.bias(name)

    def bias(self, name: str) -> np.ndarray:
        return self.p[f"{name}/bias"]

    def dense(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.p[f"{name}/kernel"] + self.bias(name)

    def attend(self, of: np.ndarray, to: np.ndarray, name: str) -> np.ndarray:
        total = np.zeros((len(of), D)) + self.bias(f"{name}/out")
        for h in range(H):

            def head(x: np.ndarray, part: str, h: int = h) -> np.ndarray:
                return x @ self.p[f"{name}/{part}/kernel"][:, h] + self.bias(f"{name}/{part}")[h]

            logits = head(of, "query") @ head(to, "key").T / np.sqrt(D // H)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            total += weights @ head(to, "value") @ self.p[f"{name}/out/kernel"][h]
        return total

    def mlp(self, x: np.ndarray, name: str) -> np.ndarray:
        return self.dense(gelu(self.dense(x, f"{name}/Dense_0")), f"{name}/Dense_1")

    def tokens(self, image: np.ndarray) -> np.ndarray:
        kernel, p = self.p["embedding/kernel"], self.patch
        tokens = [
            np.einsum("chw,hwcd->d", image[:, y : y + p, x : x + p], kernel)
            for y in range(0, self.size[0], p)
            for x in range(0, self.size[1], p)
        ]
        x = np.stack(tokens) + self.bias("embedding")
        old = "Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding"
        fixed = not any("pos_embedding" in key for key in self.p)
        table = fixed_table() if fixed else self.p[self.find("pos_embedding", *old)][0]
        whole = len(table) > len(x)  # with a row for the class token
        if not whole:
            x = x + table
        if "cls" in self.p:
            x = np.concatenate([self.p["cls"][0], x])
        return x + table if whole else x

    def __call__(self, image: np.ndarray) -> np.ndarray:
        x = self.tokens(image)
        for i in range(DEPTH):
            at = f"Transformer/encoderblock_{i}"
            y = self.norm(x, f"{at}/LayerNorm_0")
            new, old = (f"{at}/MultiHeadDotProductAttention_{n}" for n in (0, 1))
            x = x + self.attend(y, y, self.find(new, old))
            y = self.norm(x, self.find(f"{at}/LayerNorm_1", f"{at}/LayerNorm_2"))
            x = x + self.mlp(y, self.find(f"{at}/MlpBlock_0", f"{at}/MlpBlock_3"))
        x = self.norm(x, "Transformer/encoder_norm")
        if "cls" in self.p:
            x = x[0]
        elif any(k.endswith("probe") for k in self.p):
            at = "" if "probe" in self.p else "MAPHead_0/"
            x = self.attend(self.p[f"{at}probe"][0], x, f"{at}MultiHeadDotProductAttention_0")[0]
            x = x + self.mlp(self.norm(x, f"{at}LayerNorm_0"), f"{at}MlpBlock_0")
        else:
            x = x[0] if self.first else x.mean(0)
        if "pre_logits/kernel" in self.p:
            x = np.tanh(self.dense(x, "pre_logits"))
        return self.dense(x, "head")


def read(arrays: Arrays, **told: object) -> Found:
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}
    return understand(tensors, {"image_size": SIZE} | told, "a file")


def model_of(found: Found) -> ViT:
    model = ViT(found.config).eval()
    model.load_state_dict(found.state)
    return model


@pytest.mark.parametrize("file", FILES)
def test_logits_are_those_of_the_numpy_forward_pass(file):
    arrays = FILES[file]()
    found = read(arrays, **TOLD.get(file, {}))
    assert found.layout.name == "google"
    assert found.config.heads == H, "which the shapes show"
    assert found.config.resample == "bilinear_aligned"
    oracle = Oracle(arrays, first=file == "the first patch")
    x = torch.randn(3, 3, *SIZE)
    expected = torch.from_numpy(np.stack([oracle(image.numpy()) for image in x])).float()
    assert 0.2 < expected.std() < 5, "logits of order 1"
    with torch.inference_mode():
        close(model_of(found)(x), expected)
        close(model_of(found)(x[:1]), expected[:1])


@pytest.mark.parametrize("file", FILES)
def test_what_no_array_shows_is_told_or_said_to_be_assumed(file):
    told = TOLD.get(file, {})
    found = read(FILES[file](), **told)
    assumed = {words.split(" ")[0]: words for words in found.assumed}
    expected = {"activation", "norm_eps", "pool", "resample"} - set(told)
    if found.config.pool == "map":
        expected -= {"pool"}  # its probe shows it
    if found.config.position != "learned":
        expected -= {"resample"}
    assert set(assumed) == expected
    if not found.config.class_token and "pool" in expected:
        assert "pool_type '0' has the same tensors: for that say pool='first'" in assumed["pool"]
    lines = {one.field: one for one in found.unseen}
    assert {name for name, one in lines.items() if one.assumed} == expected
    assert all(lines[name].how == "as told" for name in told)
    assert all(one.value == getattr(found.config, name) for name, one in lines.items())


def test_files_without_a_table_say_what_to_tell():
    with pytest.raises(
        DataError, match="say position='sincos_bigvision' for big_vision's posemb='sincos2d', or"
    ):
        read(sincos())


@pytest.mark.parametrize("file", FILES)
def test_what_is_no_image_model_is_left_out_and_named(file):
    expected = {
        "LiT": {"params/txt/head/kernel", "params/txt/Embed_0/embedding", "params/t"},
        "original, in an optimiser": {"opt/state/step"},
    }
    found = read(FILES[file](), **TOLD.get(file, {}))
    assert set(found.left_out) == expected.get(file, set())


@pytest.mark.parametrize("file", FILES)
def test_a_file_comes_back_bit_by_bit(file):
    """Whatever its age: with its prefix, its names, its counters, its place for the table."""
    arrays = FILES[file]()
    found = read(arrays, **TOLD.get(file, {}))
    back = write_as("google", found.state, found.config, found.keys)
    assert back.keys() == arrays.keys() - set(found.left_out)
    for key, array in back.items():
        assert array.shape == arrays[key].shape, key
        assert np.array_equal(array.numpy(), arrays[key]), key


@pytest.mark.parametrize("file", ["original", "params/", "fixed positions"])
def test_converting_a_file_of_googles_to_googles_layout_gives_it_back(file, tmp_path):
    arrays = FILES[file]()
    path, out = tmp_path / "in.npz", tmp_path / "out.npz"
    np.savez(path, **arrays)
    opened = open_weights(path, {"image_size": SIZE} | TOLD.get(file, {}))
    convert(opened, "google", out)
    with np.load(out) as back:
        assert set(back.files) == arrays.keys()
        assert all(np.array_equal(back[key], array) for key, array in arrays.items())


def shapes_of_vit_jax(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of vit_jax's VisionTransformer (models_vit.py): its table has a row for the
    class token, if there is one, and always lies in a module of its own."""
    head = (H, D // H)
    blocks: dict[str, tuple[int, ...]] = {}
    for i in range(DEPTH):
        at = f"Transformer/encoderblock_{i}"
        for part in ("query", "key", "value"):
            blocks[f"{at}/MultiHeadDotProductAttention_0/{part}/kernel"] = (D, *head)
            blocks[f"{at}/MultiHeadDotProductAttention_0/{part}/bias"] = head
        blocks[f"{at}/MultiHeadDotProductAttention_0/out/kernel"] = (*head, D)
        blocks[f"{at}/MultiHeadDotProductAttention_0/out/bias"] = (D,)
        for n, (n_in, n_out) in enumerate(((D, M), (M, D))):
            blocks[f"{at}/MlpBlock_0/Dense_{n}/kernel"] = (n_in, n_out)
            blocks[f"{at}/MlpBlock_0/Dense_{n}/bias"] = (n_out,)
            blocks |= {f"{at}/LayerNorm_{n}/{leaf}": (D,) for leaf in ("scale", "bias")}
    return {
        **({"cls": (1, 1, D)} if config.class_token else {}),
        "embedding/kernel": (P, P, 3, D),
        "embedding/bias": (D,),
        "Transformer/posembed_input/pos_embedding": (1, N + int(config.class_token), D),
        **blocks,
        **{f"Transformer/encoder_norm/{leaf}": (D,) for leaf in ("scale", "bias")},
        "head/kernel": (D, CLASSES),
        "head/bias": (CLASSES,),
    }


def convert_pre_linen(arrays: Arrays) -> Arrays:
    """As flax does, and so both codes when they load: a counter for each class of parts."""
    renamed = {}
    for key, array in arrays.items():
        for new, old in PRE_LINEN.items():
            key = key.replace(old, new)
        renamed[key] = array
    return renamed


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prefix_position": False},
        {"class_token": False, "pool": "mean"},
        {"class_token": False, "pool": "first"},
        {"position": "sincos_mae"},
        {"class_token": False, "pool": "mean", "position": "sincos_bigvision"},
    ],
    ids=str,
)
def test_what_we_write_has_the_parameters_of_vit_jax(changes, randomised):
    config = ViTConfig(**{**vars(CONFIG), **changes})
    ours = randomised(ViT(config))
    written = {key: t.numpy() for key, t in to_google(ours.state_dict(), config).items()}
    theirs = convert_pre_linen(written)
    assert {key: a.shape for key, a in theirs.items()} == shapes_of_vit_jax(config)
    x = torch.randn(2, 3, *SIZE)
    oracle = Oracle(written, first=config.pool == "first")
    with torch.inference_mode():
        expected = np.stack([oracle(image.numpy()) for image in x])
        close(ours(x), torch.from_numpy(expected).float())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"classes": 0},
        {"representation": 16},
        {"prefix_position": False},
        {"class_token": False, "pool": "mean"},
        {"class_token": False, "pool": "map"},
    ],
    ids=str,
)
def test_our_weights_come_back_bit_by_bit_through_a_file(changes, randomised, tmp_path):
    config = ViTConfig(**{**vars(CONFIG), **changes})
    if not config.class_token:
        config = ViTConfig(**{**vars(config), "prefix_position": False})
    state = randomised(ViT(config)).state_dict()
    write_npz(tmp_path / "weights.npz", to_google(state, config))
    found = understand(read_weights(tmp_path / "weights.npz").tensors, {"image_size": SIZE}, "it")
    if config.class_token and not config.prefix_position:  # there it always has one: zeros
        assert found.config == ViTConfig(**{**vars(config), "prefix_position": True})
        assert not found.state["position.table"][0].any()
        table = torch.cat([torch.zeros(1, D), state["position.table"]])
        state = state | {"position.table": table}
    else:
        assert found.config == config
    assert found.state.keys() == state.keys()
    for key, tensor in state.items():
        assert torch.equal(found.state[key], tensor), key


def test_the_class_tokens_position_may_be_in_the_token():
    """What big_vision does with an old file: the table's first row, added to the token."""
    old = original()
    table = old.pop("Transformer/posembed_input/pos_embedding")
    new = old | {"cls": old["cls"] + table[:, :1], "pos_embedding": table[:, 1:]}
    merged, kept = read(new), read(old | {"Transformer/posembed_input/pos_embedding": table})
    assert (merged.config.prefix_position, kept.config.prefix_position) == (False, True)
    x = torch.randn(2, 3, *SIZE)
    with torch.inference_mode():
        close(model_of(merged)(x), model_of(kept)(x))
    # And asked for, with the config of the other: rows that the file has too many are added.
    again = from_google(
        {k: torch.from_numpy(v) for k, v in (old | {"pos_embedding": table}).items()}, merged.config
    )
    for key, tensor in merged.state.items():
        assert torch.equal(again[key], tensor), key


def test_bfloat16_as_big_vision_stores_it(tmp_path):
    """Two-byte voids: numpy knows no bfloat16."""
    found = read(big_vision(cls=False))
    halves = {k: t.bfloat16() for k, t in to_google(found.state, found.config).items()}
    write_npz(tmp_path / "half.npz", halves)
    with np.load(tmp_path / "half.npz") as file:
        assert file["embedding/kernel"].dtype == np.dtype("V2")
    half = understand(read_weights(tmp_path / "half.npz").tensors, {"image_size": SIZE}, "it")
    for key, tensor in found.state.items():
        assert torch.equal(half.state[key], tensor.bfloat16()), key


def timms(path: Path, size: tuple[int, int], **changes: object) -> torch.nn.Module:
    """timm's model, by timm's own reader of these files."""
    model = timm.models.VisionTransformer(
        img_size=size,
        patch_size=P,
        embed_dim=D,
        depth=DEPTH,
        num_heads=H,
        mlp_ratio=M / D,
        num_classes=CLASSES,
        act_layer="gelu_tanh",
        **changes,
    )
    model.load_pretrained(str(path))
    return model.eval()


@pytest.mark.parametrize("file", ["original", "big_vision, no class token"])
def test_timm_reads_what_we_write(file, tmp_path):
    found = read(FILES[file]())
    path = tmp_path / "weights.npz"
    write_npz(path, to_google(found.state, found.config))
    cls = found.config.class_token
    kind = {} if cls else {"class_token": False, "global_pool": "avg", "fc_norm": False}
    x = torch.randn(3, 3, *SIZE)
    with torch.inference_mode():
        close(timms(path, SIZE, **kind)(x), model_of(found)(x))


def test_timm_resamples_the_table_of_such_a_file_bilinearly(randomised, tmp_path):
    """Its way, not Google's: our `bilinear`. It knows square tables alone."""
    square, size = (16, 16), (32, 24)
    config = ViTConfig(**{**vars(CONFIG), "image_size": square, "resample": "bilinear"})
    ours = randomised(ViT(config))
    write_npz(tmp_path / "square.npz", to_google(ours.state_dict(), config))
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        close(timms(tmp_path / "square.npz", size)(x), ours(x))


@pytest.mark.parametrize("new", [(5, 7), (2, 2), (1, 6)], ids=str)
def test_googles_own_resampling_keeps_the_corners(new):
    """`scipy.ndimage.zoom(order=1)`: linear between samples, the end points on the end points."""
    old = (3, 4)
    table = normal(*old, D)
    places = [
        np.linspace(0, o - 1, n) if n > 1 else np.zeros(1) for o, n in zip(old, new, strict=True)
    ]
    rows = np.stack(
        [table[int(y)] + (y % 1) * (table[min(int(y) + 1, 2)] - table[int(y)]) for y in places[0]]
    )
    both = np.stack(
        [
            rows[:, int(x)] + (x % 1) * (rows[:, min(int(x) + 1, 3)] - rows[:, int(x)])
            for x in places[1]
        ],
        axis=1,
    )
    ours = resample_table(torch.from_numpy(table).flatten(0, 1), old, new, "bilinear_aligned")
    close(ours, torch.from_numpy(both).flatten(0, 1).float())


# --- FlexiViT: patches of any size (arXiv 2212.08013) ---


def linear(old: int, new: int, antialias: bool) -> np.ndarray:
    """The matrix of resizing one axis: triangles at the new centres, borders repeated."""
    scale = old / new
    width = max(scale, 1.0) if antialias else 1.0
    matrix = np.zeros((new, old))
    for i, j in np.ndindex(new, 5 * old):
        place = j - 2 * old
        weight = max(0.0, 1 - abs(place - (i + 0.5) * scale + 0.5) / width)
        if 0 <= place < old or not antialias:
            matrix[i, min(max(place, 0), old - 1)] += weight
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize("patch", [4, 8, 12], ids=str)
def test_a_flexivit_at_another_patch_size(patch, tmp_path):
    """Its own code, in numpy: kernels by the pseudo-inverse of bilinear resizing, the table of
    FlexiViT's grid by jax.image.resize, then the plain model with both."""
    arrays = big_vision()
    np.savez(tmp_path / "flexivit.npz", **arrays)
    scale = patch / P
    height, width = (round(s * 3 * scale) // patch * patch for s in SIZE)  # 6 x 9 patches
    grid, old = (height // patch, width // patch), (SIZE[0] // P, SIZE[1] // P)
    model = pretrained(
        tmp_path / "flexivit.npz",
        **{"resample": "flexivit", "patch": (patch, patch), "image_size": (height, width)},
    )
    assert model.config.patch == (patch, patch) and model.config.grid == grid
    resize = np.kron(*(linear(P, patch, antialias=False) for _ in range(2)))
    kernel = arrays["embedding/kernel"].reshape(P * P, -1)
    kernel = (np.linalg.pinv(resize.T) @ kernel).reshape(patch, patch, 3, D)
    rows, columns = (linear(o, n, antialias=True) for o, n in zip(old, grid, strict=True))
    table = arrays["pos_embedding"].reshape(*old, D)
    table = np.einsum("ai,bj,ijd->abd", rows, columns, table).reshape(1, -1, D)
    oracle = Oracle(arrays | {"embedding/kernel": kernel, "pos_embedding": table})
    oracle.size, oracle.patch = (height, width), patch
    x = torch.randn(2, 3, height, width)
    expected = torch.from_numpy(np.stack([oracle(image.numpy()) for image in x])).float()
    with torch.inference_mode():
        close(model(x), expected)


# --- what cannot be read or written ---


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activation": "gelu"}, "no counterpart of activation='gelu': there it is 'gelu_tanh'"),
        ({"activation": "swiglu"}, "no counterpart of activation='swiglu'"),
        ({"norm_eps": 1e-5}, "no counterpart of norm_eps=1e-05"),
        ({"qkv_bias": False}, "no counterpart of qkv_bias=False"),
        ({"stem": "conv"}, r"no counterpart of 'stem\.convs\.0\.0\.weight'"),
        ({"layer_scale": 0.1}, r"no counterpart of 'encoder\.blocks\.0\.scale1\.gamma'"),
        ({"registers": 2}, "no counterpart of 'prefix.registers'"),
        ({"position": "rope", "heads": 6}, "no counterpart of position='rope'"),
        ({"pool": "mean"}, "no counterpart of pool='mean' beside a class token"),
    ],
    ids=str,
)
def test_a_model_that_google_has_no_place_for_is_refused(changes, message):
    config = ViTConfig(**{**vars(CONFIG), **changes})
    with pytest.raises(DataError, match=message):
        to_google(build(config).state_dict(), config)


def test_a_fixed_table_is_written_out(randomised):
    config = ViTConfig(**{**vars(CONFIG), "position": "sincos_bigvision"})
    ours = randomised(ViT(config))
    found = understand(to_google(ours.state_dict(), config), {"image_size": SIZE}, "it")
    x = torch.randn(2, 3, *SIZE)
    with torch.inference_mode():
        close(model_of(found)(x), ours(x))


@pytest.mark.parametrize(
    "fault, message",
    [
        (lambda a: a.pop("Transformer/encoderblock_1/LayerNorm_0/scale"), "missing 'Transformer"),
        (lambda a: a.update({"odd/kernel": normal(2, 2)}), r"unexpected 'odd\.weight'"),
        (lambda a: a.update({"head/kernel": normal(3, CLASSES)}), "has shape"),
        (lambda a: a.update({"pos_embedding": normal(N)}), "has 3 axes"),
        (lambda a: a.update({"embedding/kernel": normal(P * P * 3, D)}), "has 4 axes"),
        (lambda a: a.update({"Transformer/pos_embedding": normal(1, N, D)}), "are the same part"),
        (
            lambda a: a.update({"Transformer/encoderblock_0/MlpBlock_0/Dense_1/kernel": normal(1)}),
            "has 2 axes",
        ),
    ],
)
def test_a_damaged_file_is_one_clear_error(fault, message):
    arrays = big_vision()
    fault(arrays)
    with pytest.raises(DataError, match=message):
        read(arrays)


@in_turns((), (0,), (4,), (1, 0, 3), (7, 5), (1, 1, 1, 1, 1))
@pytest.mark.parametrize(
    "file", ["original, with pre-logits", "attention pooling, at the top", "scanned"]
)
def test_an_array_of_any_other_shape_is_one_clear_error(file, shapes):
    arrays = FILES[file]()
    for key, shape in zip(one_of_each(arrays), cycle(shapes), strict=False):
        with pytest.raises(DataError):
            read(arrays | {key: np.zeros(shape, np.float32)})
