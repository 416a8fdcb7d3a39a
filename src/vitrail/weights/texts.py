"""Checkpoint layouts of text towers: what each code base calls their tensors, what a file holds.

A tower lies in a file of its own (BERT, MiniLM) or beside an image tower (CLIP, SigLIP, LiT). A
layout is data, as those of images are (`names.py`); it is told by its keys, and the tower by its
shapes. What no shape shows is said by a config.json beside the file, by the user, or by the code of
whoever wrote it, and then it is said aloud.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from vitrail.errors import DataError, UsageError, setting, unknown_name
from vitrail.text import BertConfig, ClipTextConfig, SiglipTextConfig, TextConfig, build_text
from vitrail.weights.clip import ACTIVATION
from vitrail.weights.google import GOOGLE
from vitrail.weights.names import (
    Names,
    State,
    check_shapes,
    prefixes,
    rename,
    some,
    their_names,
    translate,
)


@dataclass(frozen=True, kw_only=True)
class TextLayout:
    """How one code base names and arranges the tensors of a text tower."""

    name: str
    whose: str
    """For messages."""
    family: type[TextConfig]
    marks: tuple[str, ...]
    """Keys, behind one prefix, that all of its files have and, with `own`, no other layout's."""
    own: Callable[[State, str], bool] = lambda state, prefix: True
    """Whether the marks of a file, behind the prefix, are this layout's."""
    parts: tuple[str, ...] = ("*",)
    """Globs of keys, behind the prefix, that are the tower's; others are an image tower's."""
    aside: tuple[str, ...] = ("*position_ids",)
    """Globs of those of them that hold nothing which is used."""
    names: Names
    """Our module or tensor -> theirs, as `Layout.names`."""
    turn: Callable[[State], State] = lambda state: state
    """Their tensors, as the table `names` calls them and as torch lays out its own."""
    back: Callable[[dict[str, Tensor], TextConfig], dict[str, Tensor]] = lambda state, config: state
    """The inverse of `turn`."""

    def of(self, state: State, prefix: str) -> dict[str, str]:
        """The keys of the tower and of what lies aside, behind the prefix, and in the file."""
        inner = {key[len(prefix) :]: key for key in state if key.startswith(prefix)}
        return {x: key for x, key in inner.items() if _any(x, self.parts) or _any(x, self.aside)}

    def read(self, state: State, config: TextConfig) -> dict[str, Tensor]:
        """Their tensors, without the prefix, under our names, for `load_state_dict`.

        Raises `DataError` with the name of a key that is missing, unexpected or of another shape.
        """
        turned, shapes = self.turn(state), text_shapes(config)
        pieces = {key: self._pieces(key, shape) for key, shape in shapes.items()}
        wanted = {name: shape for parts in pieces.values() for name, shape in parts}
        check_shapes(turned, wanted, self.whose)
        return {
            key: torch.cat([turned[name] for name, _ in parts]) for key, parts in pieces.items()
        }

    def write(self, state: State, config: TextConfig) -> dict[str, Tensor]:
        """The inverse of `read`. Raises `DataError` for a tower of another family."""
        if type(config) is not self.family:
            raise DataError(f"{self.whose} has no counterpart of a text tower of '{config.family}'")
        shapes = text_shapes(config)
        check_shapes(state, shapes, "vitrail")
        theirs: dict[str, Tensor] = {}
        for key, shape in shapes.items():
            parts = self._pieces(key, shape)
            split = state[key].split([piece[0] for _, piece in parts])
            theirs |= {name: tensor for (name, _), tensor in zip(parts, split, strict=True)}
        return self.back(theirs, config)

    def _pieces(self, key: str, shape: Size) -> list[tuple[str, Size]]:
        names = their_names(key, self)
        return [(name, Size((shape[0] // len(names), *shape[1:]))) for name in names]


class FoundText(NamedTuple):
    """The text tower in a file, understood."""

    layout: TextLayout
    config: TextConfig
    state: dict[str, Tensor]
    """Under our names: exactly the state dict of the config."""
    keys: frozenset[str]
    """What its tensors are called in the file, those that lie aside among them."""
    assumed: tuple[str, ...]
    """What no shape shows and nobody told, in words."""


def text_shapes(config: TextConfig) -> dict[str, Size]:
    """Every key of a tower's state dict and its shape, without memory for the weights."""
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in build_text(config).state_dict().items()}


def text_parameters(config: TextConfig) -> int:
    """How many numbers a tower learns."""
    return sum(shape.numel() for shape in text_shapes(config).values())


# --- open_clip and OpenAI ---

_RESBLOCK = "transformer.resblocks.{i}"
_OPEN_CLIP_NAMES: Names = {
    "tokens": "token_embedding",
    "position": "positional_embedding",
    "encoder.blocks.{i}.norm1": f"{_RESBLOCK}.ln_1",
    "encoder.blocks.{i}.attn.qkv.weight": f"{_RESBLOCK}.attn.in_proj_weight",
    "encoder.blocks.{i}.attn.qkv.bias": f"{_RESBLOCK}.attn.in_proj_bias",
    "encoder.blocks.{i}.attn.proj": f"{_RESBLOCK}.attn.out_proj",
    "encoder.blocks.{i}.norm2": f"{_RESBLOCK}.ln_2",
    "encoder.blocks.{i}.mlp.fc1": f"{_RESBLOCK}.mlp.c_fc",
    "encoder.blocks.{i}.mlp.fc2": f"{_RESBLOCK}.mlp.c_proj",
    "encoder.norm": "ln_final",
    "head": "text_projection",
}
_PROJECTION = "text_projection"


def _projection_turned(state: State) -> dict[str, Tensor]:
    """The projection, a matrix of inputs by outputs there, as a linear map's weight."""
    return {
        f"{k}.weight" if k == _PROJECTION else k: t.T if k == _PROJECTION and t.ndim == 2 else t
        for k, t in state.items()
    }


def _projection_back(state: dict[str, Tensor], config: TextConfig) -> dict[str, Tensor]:
    weight = f"{_PROJECTION}.weight"
    return {_PROJECTION if k == weight else k: t.T if k == weight else t for k, t in state.items()}


OPEN_CLIP = TextLayout(
    name="open_clip",
    whose="CLIP",
    family=ClipTextConfig,
    marks=(
        *("token_embedding.weight", "positional_embedding", "ln_final.weight"),
        "transformer.resblocks.0.attn.in_proj_weight",
    ),
    own=lambda state, prefix: f"{prefix}{_PROJECTION}.bias" not in state,
    parts=(
        *("token_embedding.*", "positional_embedding", "transformer.*", "ln_final.*", "cls_emb"),
        f"{_PROJECTION}*",
    ),
    aside=("attn_mask",),
    names=_OPEN_CLIP_NAMES,
    turn=_projection_turned,
    back=_projection_back,
)
OPEN_CLIP_SIGLIP = TextLayout(
    name="open_clip-siglip",
    whose="open_clip's SigLIP",
    family=SiglipTextConfig,
    marks=(*OPEN_CLIP.marks, f"{_PROJECTION}.bias"),
    parts=OPEN_CLIP.parts,
    aside=OPEN_CLIP.aside,
    names=_OPEN_CLIP_NAMES,
)

# --- Hugging Face ---

_LAYER = "text_model.encoder.layers.{i}"
_TOWER: Names = {
    "tokens": "text_model.embeddings.token_embedding",
    "position": "text_model.embeddings.position_embedding.weight",
    "encoder.blocks.{i}.norm1": f"{_LAYER}.layer_norm1",
    "encoder.blocks.{i}.attn.qkv": tuple(f"{_LAYER}.self_attn.{x}_proj" for x in "qkv"),
    "encoder.blocks.{i}.attn.proj": f"{_LAYER}.self_attn.out_proj",
    "encoder.blocks.{i}.norm2": f"{_LAYER}.layer_norm2",
    "encoder.blocks.{i}.mlp.fc1": f"{_LAYER}.mlp.fc1",
    "encoder.blocks.{i}.mlp.fc2": f"{_LAYER}.mlp.fc2",
    "encoder.norm": "text_model.final_layer_norm",
}

CLIP = TextLayout(
    name="huggingface-clip",
    whose="Hugging Face CLIP",
    family=ClipTextConfig,
    marks=(
        "text_model.embeddings.token_embedding.weight",
        "text_model.encoder.layers.0.self_attn.q_proj.weight",
        "text_model.final_layer_norm.weight",
    ),
    own=lambda state, prefix: f"{prefix}text_model.head.weight" not in state,
    parts=("text_model.*", "text_projection.*"),
    names={**_TOWER, "head": "text_projection"},
)
SIGLIP = TextLayout(
    name="huggingface-siglip",
    whose="Hugging Face SigLIP",
    family=SiglipTextConfig,
    marks=(*CLIP.marks, "text_model.head.weight"),
    parts=("text_model.*",),
    names={**_TOWER, "head": "text_model.head"},
)


def _bare(layout: TextLayout, *head: str) -> TextLayout:
    """The tower alone, as transformers 5 writes it: without the prefix."""

    def short(name: str) -> str:
        return name.removeprefix("text_model.")

    return replace(
        layout,
        name=f"{layout.name}-bare",
        marks=tuple(map(short, layout.marks)),
        own=lambda state, prefix: True,
        parts=("embeddings.*", "encoder.*", "final_layer_norm.*", *head),
        names={
            ours: short(name) if isinstance(name, str) else tuple(map(short, name))
            for ours, name in layout.names.items()
        },
    )


CLIP_BARE = _bare(CLIP)
SIGLIP_BARE = _bare(SIGLIP, "head.*")

_BERT_LAYER = "encoder.layer.{i}"
BERT = TextLayout(
    name="huggingface-bert",
    whose="Hugging Face BERT",
    family=BertConfig,
    marks=(
        "embeddings.word_embeddings.weight",
        "embeddings.token_type_embeddings.weight",
        "encoder.layer.0.attention.self.query.weight",
    ),
    aside=("*position_ids", "pooler.*", "cls.*"),
    names={
        "tokens": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings.weight",
        "segments": "embeddings.token_type_embeddings.weight",
        "norm": "embeddings.LayerNorm",
        "blocks.{i}.attn.qkv": tuple(
            f"{_BERT_LAYER}.attention.self.{x}" for x in ("query", "key", "value")
        ),
        "blocks.{i}.attn.proj": f"{_BERT_LAYER}.attention.output.dense",
        "blocks.{i}.norm1": f"{_BERT_LAYER}.attention.output.LayerNorm",
        "blocks.{i}.mlp.fc1": f"{_BERT_LAYER}.intermediate.dense",
        "blocks.{i}.mlp.fc2": f"{_BERT_LAYER}.output.dense",
        "blocks.{i}.norm2": f"{_BERT_LAYER}.output.LayerNorm",
    },
)

# --- Google's .npz: LiT, and SigLIP in big_vision's own files ---

_BLOCK = "Transformer/encoderblock_{i}"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"


def _plain_turn(state: State) -> State:
    """As an image tower's; some old files have two position tables, which are both added."""
    arrays = {
        key.replace("Encoder_0/", "Transformer/", 1) if key.startswith("Encoder_0/") else key: array
        for key, array in state.items()
    }
    old = arrays.pop("Transformer/pos_embedding", None)
    arrays["pos_embedding"] = arrays["pos_embedding"] + (0 if old is None else old)
    return {
        key: tensor.flatten(0, -2) if key == "pos_embedding" else tensor
        for key, tensor in GOOGLE.turn(arrays).items()
    }


def _plain_back(state: dict[str, Tensor], config: TextConfig) -> dict[str, Tensor]:
    arrays = GOOGLE.back(state, config)  # type: ignore[arg-type]  # it looks at the heads alone
    arrays["pos_embedding"] = arrays["pos_embedding"][None]
    return rename(arrays, lambda key: key.replace("Transformer/", "Encoder_0/", 1))


PLAIN_NPZ = TextLayout(
    name="google-text",
    whose="Google",
    family=SiglipTextConfig,
    marks=("Embed_0/embedding", "pos_embedding", "Encoder_0/encoder_norm/scale"),
    names={
        "tokens.weight": "Embed_0/embedding",
        "position": "pos_embedding",
        "encoder.blocks.{i}.norm1": f"{_BLOCK}/LayerNorm_0",
        "encoder.blocks.{i}.attn.qkv": tuple(
            f"{_ATTENTION}/{x}" for x in ("query", "key", "value")
        ),
        "encoder.blocks.{i}.attn.proj": f"{_ATTENTION}/out",
        "encoder.blocks.{i}.norm2": f"{_BLOCK}/LayerNorm_1",
        "encoder.blocks.{i}.mlp.fc1": f"{_BLOCK}/MlpBlock_0/Dense_0",
        "encoder.blocks.{i}.mlp.fc2": f"{_BLOCK}/MlpBlock_0/Dense_1",
        "encoder.norm": "Transformer/encoder_norm",
        "head": "head",
    },
    turn=_plain_turn,
    back=_plain_back,
)

_FLAX = "BertEncoder_0"
_FLAX_LAYER = f"{_FLAX}/encoder_block/layer_sequence/layers_{{i}}"
_FLAX_ATTENTION = f"{_FLAX_LAYER}/attention_block"
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def _flax_turn(state: State) -> dict[str, Tensor]:
    turned = {}
    for key, array in state.items():
        module, _, leaf = key.rpartition("/")
        name = f"{module}.{_LEAVES[leaf]}" if leaf in _LEAVES else key
        turned[name] = array.T if leaf == "kernel" and array.ndim == 2 else array
    return turned


def _flax_back(state: dict[str, Tensor], config: TextConfig) -> dict[str, Tensor]:
    arrays = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "weight":
            leaf = "kernel" if tensor.ndim == 2 else "scale"
        arrays[f"{module}/{leaf}" if module else key] = tensor.T if leaf == "kernel" else tensor
    return arrays


BERT_NPZ = TextLayout(
    name="google-bert",
    whose="Google's LiT",
    family=BertConfig,
    marks=(
        f"{_FLAX}/embedder/embedders_token_ids/embedding",
        f"{_FLAX}/layer_norm/scale",
    ),
    names={
        "tokens.weight": f"{_FLAX}/embedder/embedders_token_ids/embedding",
        "position": f"{_FLAX}/embedder/embedders_position_ids/embedding",
        "segments": f"{_FLAX}/embedder/embedders_segment_ids/embedding",
        "norm": f"{_FLAX}/layer_norm",
        "blocks.{i}.attn.qkv": tuple(
            f"{_FLAX_ATTENTION}/attention_layer/{x}" for x in ("query", "key", "value")
        ),
        "blocks.{i}.attn.proj": f"{_FLAX_ATTENTION}/dense_layer",
        "blocks.{i}.norm1": f"{_FLAX_ATTENTION}/layer_norm",
        "blocks.{i}.mlp.fc1": f"{_FLAX_LAYER}/mlp_block/mlp/dense_layer",
        "blocks.{i}.mlp.fc2": f"{_FLAX_LAYER}/mlp_block/dense_layer",
        "blocks.{i}.norm2": f"{_FLAX_LAYER}/mlp_block/layer_norm",
        "head": "head",
    },
    turn=_flax_turn,
    back=_flax_back,
)

TEXT_LAYOUTS: Mapping[str, TextLayout] = {
    layout.name: layout
    for layout in (
        *(OPEN_CLIP_SIGLIP, OPEN_CLIP, SIGLIP, CLIP, SIGLIP_BARE, CLIP_BARE),
        *(BERT, BERT_NPZ, PLAIN_NPZ),
    )
}
"""The first whose marks a file has is the file's."""

_HEAD_WIDTH = 64
_HEADS = {1152: 16}  # So400m's
_READINGS = {16_000: "lit", 256_000: "siglip2"}
_CLIP_WORDS = 49408


def find_text(state: Mapping[str, Any]) -> tuple[TextLayout, str] | None:
    """The layout of the text tower in a file, and what stands before its keys; None if none is.

    Only keys are looked at.
    """
    for layout in TEXT_LAYOUTS.values():
        for prefix in prefixes(state, layout.marks):
            if layout.own(state, prefix):
                return layout, prefix
    return None


def text_alone(state: State) -> bool:
    """Whether a file holds a text tower and nothing else."""
    found = find_text(state)
    return found is not None and len(found[0].of(state, found[1])) == len(state)


def read_text(
    state: State,
    where: str,
    known: Mapping[str, Any],
    told: Mapping[str, Any] | None = None,
    activation: str | None = None,
) -> FoundText:
    """The text tower among the tensors of a file.

    `known` has fields of its config that a file beside it says, or a row of a table; `told` those
    that the user does, which overrule them; `activation` is that of the image tower beside it, for
    a CLIP of which nothing else tells it.
    Raises `DataError` for a file without one, or of which something has to be known that nothing
    says; `UsageError` for what is told and no field, or which the tensors contradict.
    """
    found = find_text(state)
    if found is None:
        raise DataError(
            f"{where} holds no text tower that vitrail knows: its tensors are called "
            f"{some(list(state))}. Known are those of "
            f"{', '.join(dict.fromkeys(layout.whose for layout in TEXT_LAYOUTS.values()))}"
        )
    layout, prefix = found
    inner = layout.of(state, prefix)
    theirs = {x: state[key] for x, key in inner.items() if not _any(x, layout.aside)}
    others = [
        key for key in state if key.startswith(("text", "txt/")) and key not in inner.values()
    ]
    if others:
        raise DataError(
            f"the text tower in {where} has parts that {layout.whose} has not: {some(others)}"
        )
    shown = _shown(layout, theirs, where)
    told = dict(told or {})
    fields_known = {field.name for field in fields(layout.family)}
    for name, value in told.items():
        if name not in fields_known:
            raise unknown_name(f"field of {layout.family.__name__}", name, fields_known)
        if name in shown and shown[name] != value:
            raise UsageError(
                f"{where}: {setting(f'text.{name}', value)} is not what its tensors show, which is "
                f"{setting(f'text.{name}', shown[name])}: leave it out"
            )
    given = {name: value for name, value in {**known, **told}.items() if name in fields_known}
    usual, words = _usual(layout, shown, given, activation, where)
    # What shapes show wins over what is said beside them, which may be of another file.
    config = layout.family(**{**usual, **given, **shown})
    return FoundText(layout, config, layout.read(theirs, config), frozenset(inner.values()), words)


def _shown(layout: TextLayout, theirs: State, where: str) -> dict[str, Any]:
    """Fields that shapes show."""
    try:
        turned = layout.turn(theirs)
    except (RuntimeError, IndexError, KeyError, ValueError) as error:
        raise DataError(f"the text tower in {where} is damaged: {error}") from error
    shapes = {ours: found[0] for ours, found in translate(turned, layout.names).items()}
    stem = "blocks" if layout.family is BertConfig else "encoder.blocks"
    try:
        table, places = shapes["tokens.weight"], shapes["position"]
        shown: dict[str, Any] = {
            "vocabulary": table[0],
            "width": table[1],
            "depth": sum(key.endswith(".norm1.weight") for key in shapes),
            "mlp": shapes[f"{stem}.0.mlp.fc1.weight"][0],
            "out": shapes["head.weight"][0] if "head.weight" in shapes else 0,
        }
        if layout.family is BertConfig:
            shown |= {"positions": places[0], "segments": shapes["segments"][0]}
        else:
            shown |= {"context": places[0]}
    except (KeyError, IndexError) as error:
        raise DataError(f"the text tower in {where} is damaged: {error} is missing") from error
    queries = next((t for k, t in theirs.items() if k.endswith("query/kernel")), None)
    if queries is not None and queries.ndim >= 3:  # [D, H, d], or of all blocks
        shown["heads"] = queries.shape[-2]
    return shown


def _usual(
    layout: TextLayout,
    shown: Mapping[str, Any],
    given: Mapping[str, Any],
    activation: str | None,
    where: str,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fields that nothing shows or says, as its code has them; and what was taken to be so."""
    usual: dict[str, Any] = {}
    words: list[str] = []
    width = shown["width"]

    def take(name: str, value: Any, why: str) -> None:
        if name not in given and name not in shown:
            usual[name] = value
            words.append(f"text {name} {value}, {why}")

    if layout is BERT and "heads" not in given:
        raise DataError(
            f"no tensor of {where} shows how many heads its text tower has: say "
            f"{setting('text.heads', width // _HEAD_WIDTH or 1)}, or what its config.json says "
            f"(num_attention_heads)"
        )
    take("heads", _HEADS.get(width, width // _HEAD_WIDTH or 1), f"as in {layout.whose}")
    if layout.family is ClipTextConfig:
        if shown["vocabulary"] != _CLIP_WORDS and "vocabulary" not in given:
            raise DataError(
                f"the text tower in {where} has CLIP's names, and {shown['vocabulary']:,} words "
                f"where CLIP has {_CLIP_WORDS:,}: it is another model, which may read its texts "
                f"otherwise (CLIPA, MetaCLIP 2). If it is a CLIP, say "
                f"{setting('text.vocabulary', shown['vocabulary'])}"
            )
        if "activation" not in given:
            if activation is None:
                answers = (setting("text.activation", x) for x in ACTIVATION.answers)
                raise DataError(f"{where}: {ACTIVATION.words.format(*answers)}")
            usual["activation"] = activation
    elif layout.family is SiglipTextConfig:
        take("reading", _READINGS.get(shown["vocabulary"], "siglip"), "by its number of words")
    elif layout is BERT_NPZ:
        usual |= {"context": 16, "pool": "class", "activation": "gelu_tanh", "closed": False}
    else:
        if shown["segments"] == 1 and "segments" not in given:
            raise DataError(
                f"the text tower in {where} has one segment, as RoBERTa has, whose positions are "
                f"counted otherwise: vitrail reads BERT's"
            )
        usual["context"] = shown["positions"]
        take("pool", "mean", "as most towers for whole sentences have it")
    return usual, tuple(words)


def text_fields(config: TextConfig) -> dict[str, Any]:
    """The fields of a row, as `known` for `read_text`."""
    return {name: value for name, value in asdict(config).items() if name != "family"}


def _any(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
