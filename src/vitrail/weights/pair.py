"""Text towers by name or file, and whole models of an image and a text tower: in, and out.

    config, state, tokenizer = open_text_weights("minilm_l6")
    pair = open_pair("clip_b32_openai")       # or a file or folder of CLIP, SigLIP, LiT

A pair's image half is what `open_weights` makes of the same file. Towers are compared by the cosine
of their vectors, times `scale`, plus `bias`.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.errors import DataError, UsageError, setting, unknown_name
from vitrail.models import ViTConfig
from vitrail.text import ClipTokenizer, TextConfig, Tokenizer, open_tokenizer
from vitrail.text.opening import find_file
from vitrail.weights.beside_text import told_of_text
from vitrail.weights.clip import OPEN_CLIP
from vitrail.weights.files import WeightsFile
from vitrail.weights.layouts import write_as
from vitrail.weights.load import Opened, open_file, read_source
from vitrail.weights.names import State, some
from vitrail.weights.text_table import TEXT_WEIGHTS
from vitrail.weights.texts import (
    TEXT_LAYOUTS,
    FoundText,
    find_text,
    read_text,
    text_fields,
)
from vitrail.weights.write import write_npz, write_safetensors

Notify = Callable[[str], None]

_SCALES = ("logit_scale", "t")
_BIASES = ("logit_bias", "b")
_GREATEST = 20.0
"""Of the logarithm of a scale: those that were learned are below 5."""
PAIR_TARGETS = ("huggingface", "open_clip", "google")
"""What a whole model can be written as."""


class TextWeights(NamedTuple):
    """A text tower, read and understood."""

    config: TextConfig
    state: dict[str, Tensor]
    """Exactly its state dict."""
    tokenizer: Tokenizer | None
    """None where the file of its vocabulary is not there."""


class Pair(NamedTuple):
    """An image tower and a text tower that were trained together."""

    image: Opened
    """The projection to the joint space, where there is one, is its head."""
    text: TextWeights
    """Its projection is a part of the tower."""
    scale: float
    """What cosines are multiplied by."""
    bias: float | None
    """What is added then; None where there is none (softmax)."""
    text_layout: str
    notes: tuple[str, ...]
    """What was assumed or left out, a line each."""


def open_text_weights(
    source: str | Path,
    told: Mapping[str, Any] | None = None,
    *,
    vocabulary: str | Path | None = None,
    notify: Notify = lambda sentence: None,
) -> TextWeights:
    """A published text tower by name (`TEXT_WEIGHTS`, or one in WEIGHTS that holds two towers),
    path, https address or `hf:owner/name`; fetched if need be.

    `told` has fields of its config that no shape shows. `vocabulary` is the file of its tokenizer,
    or the folder of that; None looks beside the weights. `notify` is told, a sentence each, what
    was left out and assumed, and where there is no vocabulary. Raises `DataError` for a file that
    is damaged, hostile, unknown or ambiguous, `UsageError` for what is told in vain.
    """
    file, told, published = read_source(source, told, notify)
    activation = getattr(published.config, "activation", None) if published else None
    found, tokenizer, notes = _text_of(file, str(source), told, activation, vocabulary)
    left_out = [key for key in file.tensors if key not in found.keys]
    if left_out:
        notes.append(f"{len(left_out)} tensors are no text tower's: {some(left_out)}")
    for note in notes:
        notify(note)
    return TextWeights(found.config, found.state, tokenizer)


def open_pair(
    source: str | Path,
    told: Mapping[str, Any] | None = None,
    text_told: Mapping[str, Any] | None = None,
    *,
    vocabulary: str | Path | None = None,
    notify: Notify = lambda sentence: None,
) -> Pair:
    """Both towers of a whole model: CLIP's, SigLIP's, SigLIP 2's or LiT's.

    `told` is for the image tower as in `open_weights`, the others as in `open_text_weights`. Raises
    as those do, and `DataError` for a file with one tower alone.
    """
    name = str(source)
    file, told, published = read_source(source, told, notify)
    if find_text(file.tensors) is None:
        raise DataError(
            f"{name} holds no text tower, so it is no pair of one: its image tower alone can be "
            f"given as {setting('weights', name)}, a text tower beside it"
        )
    image = open_file(name, file, told, published)
    activation = getattr(image.config, "activation", None)
    found, tokenizer, notes = _text_of(file, name, text_told or {}, activation, vocabulary)
    left_out = [key for key in file.tensors if key not in found.keys and key not in image.keys]
    last = {key: key.replace("/", ".").rpartition(".")[2] for key in left_out}
    numbers = {name: key for key, name in last.items() if name in (*_SCALES, *_BIASES)}
    scale, bias = (_number(file.tensors, numbers, names, name) for names in (_SCALES, _BIASES))
    if scale is None:
        raise DataError(f"{name} has no temperature ({' or '.join(_SCALES)}): it is no whole model")
    if not abs(scale) < _GREATEST:
        raise DataError(f"{name} has a temperature of exp({scale:.3g}): it is damaged")
    left_out = [key for key in left_out if key not in numbers.values()]
    if left_out:
        notes.append(f"{len(left_out)} tensors are no part of either tower: {some(left_out)}")
    image_width = image.config.classes or _width(image)
    text_width = found.config.out or found.config.width
    if image_width != text_width:
        raise DataError(
            f"{name}: its images' vectors have {image_width} numbers, its texts' {text_width}: "
            f"they cannot be compared"
        )
    return Pair(
        image=image._replace(left_out=tuple(left_out)),
        text=TextWeights(found.config, found.state, tokenizer),
        scale=math.exp(scale),
        bias=bias,
        text_layout=found.layout.name,
        notes=(*image.notes, *image.assumed, *notes),
    )


def _text_of(
    file: WeightsFile,
    source: str,
    told: Mapping[str, Any],
    activation: str | None,
    vocabulary: str | Path | None,
) -> tuple[FoundText, Tokenizer | None, list[str]]:
    """The text tower of a file, its tokenizer if that is there, and what is to be said."""
    folder = file.path if file.path.is_dir() else file.path.parent
    row = TEXT_WEIGHTS.get(source)
    if row is not None:
        known = text_fields(row.config)
    else:
        known = {} if file.kind == "npz" else told_of_text(file.config, folder, source)
    found = read_text(file.tensors, source, known, told, activation)
    notes = list(found.assumed)
    place = vocabulary
    if place is None:  # LiT's is called as its weights are
        alike = (file.path.with_suffix(ending) for ending in (".txt", ".model"))
        place = next((name for name in alike if name.is_file()), folder)
    clip, words = found.config.family == "clip", found.config.vocabulary
    if clip and words != ClipTokenizer.vocabulary:
        notes.append(
            f"{source} has {words:,} words where CLIP has {ClipTokenizer.vocabulary:,}: vitrail "
            f"has no tokenizer for it"
        )
        return found, None, notes
    if clip or vocabulary is not None or find_file(found.config, place):
        return found, open_tokenizer(found.config, vocabulary if clip else place), notes
    where = f": {row.vocabulary}" if row is not None and row.vocabulary else ""
    notes.append(
        f"no vocabulary lies beside {source}{where}; give it with {setting('vocabulary', 'FILE')} "
        f"to read texts"
    )
    return found, None, notes


def _number(
    tensors: State, keys: Mapping[str, str], names: tuple[str, ...], source: str
) -> float | None:
    """The one number of one of these names; `keys`: from a name to what the file calls it."""
    for name in names:
        if name in keys:
            tensor = tensors[keys[name]]
            if tensor.numel() != 1:
                raise DataError(f"{keys[name]} in {source} has {tensor.numel()} numbers, not one")
            return float(tensor)
    return None


def _width(image: Opened) -> int:
    config = image.config
    assert isinstance(config, ViTConfig)  # no other family has a text tower beside it
    return config.width


def save_pair(out: Path, pair: Pair, to: str, *, overwrite: bool = False) -> None:
    """Write a whole model in the layout of `huggingface` or `open_clip` (.safetensors), or of
    `google` (.npz), which is LiT's.

    Raises `DataError` where that layout has no place for one of the towers.
    """
    if to not in PAIR_TARGETS:
        raise unknown_name("layout of two towers", to, PAIR_TARGETS)
    if (to == "google") != (out.suffix == ".npz"):
        ending = ".npz" if to == "google" else ".safetensors"
        raise UsageError(f"the layout {to} is written as {ending}: call it {out.stem}{ending}")
    text = next(
        layout.write(pair.text.state, pair.text.config)
        for layout in TEXT_LAYOUTS.values()
        if layout.name.split("-")[0] == to and layout.family is type(pair.text.config)
    )
    image = _image_as(pair.image, to)
    scale = torch.tensor(math.log(pair.scale))
    if to == "google":
        tensors = {
            **{f"img/{key}": tensor for key, tensor in image.items()},
            **{f"txt/{key}": tensor for key, tensor in text.items()},
            "t": scale[None],
        }
        bias = "b"
    else:
        tensors = {**image, **text, "logit_scale": scale if pair.bias is None else scale[None]}
        bias = "logit_bias"
    if pair.bias is not None:
        tensors[bias] = torch.tensor([pair.bias])
    if to == "google":
        write_npz(out, tensors, overwrite=overwrite)
    else:
        write_safetensors(out, tensors, {"format": "pt"}, overwrite=overwrite)


def _image_as(image: Opened, to: str) -> dict[str, Tensor]:
    config = image.config
    if to != "open_clip":
        return write_as(to, image.state, config)
    if not isinstance(config, ViTConfig) or not config.pre_norm:
        raise DataError(
            f"{image.source}: open_clip has SigLIP's image tower by timm: write "
            f"{setting('to', 'huggingface')}"
        )
    return {f"visual.{key}": tensor for key, tensor in OPEN_CLIP.write(image.state, config).items()}
