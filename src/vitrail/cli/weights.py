"""`vitrail weights`: the published weights, what is in a file of weights, and the way to others."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from vitrail.cli.parse import parse
from vitrail.cli.screen import say
from vitrail.cli.table import Column, print_table, print_text
from vitrail.cli.told import Told
from vitrail.cli.words import Word, run_word
from vitrail.data.sources.shards import read_class_names
from vitrail.errors import UsageError, unknown_name
from vitrail.models import model_config, parameters_of
from vitrail.runs.start import open_start
from vitrail.text import TEXTS
from vitrail.units import bytes_text
from vitrail.weights import OURS, Opened, convert, open_pair, open_text_weights, save_pair
from vitrail.weights.fetch import NAMES, cached_file, fetch, parse_source
from vitrail.weights.fit import fit
from vitrail.weights.heads import to_header
from vitrail.weights.load import decoder_is_written, head_is_written
from vitrail.weights.names import some
from vitrail.weights.pair import TextWeights
from vitrail.weights.table import WEIGHTS
from vitrail.weights.text_table import TEXT_WEIGHTS
from vitrail.weights.texts import find_text, text_parameters

_COLUMNS = (
    Column("weights", justify="left"),
    Column("model", 4, "left"),
    Column("params", 1),
    Column("size", 3),
    Column("top-1", 2),
    Column("images", 6, "left"),
    Column("licence", 5, "left"),
    Column("source", 8, "left"),
    Column("cached", 7, "left"),
)
_TEXT_COLUMNS = (
    Column("text weights", justify="left"),
    Column("tower", 4, "left"),
    Column("params", 1),
    Column("size", 3),
    Column("tokens", 2),
    Column("licence", 5, "left"),
    Column("source", 8, "left"),
    Column("cached", 7, "left"),
)


@dataclass(frozen=True)
class ListArgs:
    """What `vitrail weights list` takes."""

    word: Annotated[str, tyro.conf.Positional] = ""
    """Only names with this in them: dino, in21k."""


@dataclass(frozen=True)
class FetchArgs:
    """What `vitrail weights fetch` takes."""

    name: Annotated[str, tyro.conf.Positional]
    """A name of the list, an https:// address, or hf:owner/name[/file][@revision]."""
    again: bool = False
    """Replace what is in the cache."""


@dataclass(frozen=True)
class ShowArgs:
    """What `vitrail weights show` takes."""

    source: Annotated[str, tyro.conf.Positional]
    """A name of the list, a file or folder, an https:// address, hf:owner/name, or a run."""
    model: str | None = None
    """A row of `vitrail models` that it should be: says what becomes of it there."""
    told: Annotated[Told, tyro.conf.arg(name="model")] = field(default_factory=Told)
    """What no tensor shows, where the file alone cannot tell."""
    part: str | None = None
    """Which model of a file that holds several: model_ema, or what stands before its keys."""
    classes: Path | None = None
    """A file with the names of its classes, one a line in the order of its logits."""


@dataclass(frozen=True, kw_only=True)
class ConvertArgs(ShowArgs):
    """What `vitrail weights convert` takes."""

    out: Annotated[Path, tyro.conf.Positional]
    """The file to write: .safetensors, or .npz for google."""
    to: str
    """vitrail, timm, huggingface, google; eomt: its authors', of a ViT with queries; mae: Meta's,
    of an encoder with its decoder."""
    overwrite: bool = False
    both: bool = False
    """Of a model with a text tower, both: huggingface, open_clip, or google (LiT's)."""


def weights(args: Sequence[str]) -> dict[str, Any]:
    """List, fetch, show or convert."""
    words = {
        "list": Word(_list, "[list [WORD]]", "the published weights"),
        "fetch": Word(_fetch, "fetch NAME", "bring them into the cache"),
        "show": Word(_show, "show SOURCE", "what a file of weights holds"),
        "convert": Word(_convert, "convert SOURCE OUT --to LAYOUT", "in another layout"),
    }
    return run_word("weights", words, args, usual="list")


def _list(args: Sequence[str]) -> dict[str, Any]:
    word = parse(ListArgs, args, "weights list", "List the published weights.").word
    rows = [_describe(name) for name in WEIGHTS if word in name]
    texts = [_describe_text(name) for name in TEXT_WEIGHTS if word in name]
    if not rows and not texts:
        raise UsageError(f"no weights have '{word}' in their name: `vitrail weights` lists all")
    if rows:
        print_table(_COLUMNS, map(_cells, rows))
        print_text("top-1: published, ImageNet-1k, percent; * with a linear probe, or fine-tuned")
        print_text("images: side, how it is fitted, share that is shown, mean; --json has all")
    if texts:
        print_table(_TEXT_COLUMNS, map(_text_cells, texts))
        print_text("text towers, for --text-weights; * an image tower lies beside it")
    return {"weights": rows, "texts": texts}


def _describe(name: str) -> dict[str, Any]:
    row = WEIGHTS[name]
    parameters = parameters_of(row.config)
    return {
        "name": name,
        "model": row.model,
        "parameters": parameters,
        "bytes": row.size or 4 * parameters,  # in float32, and little else in the file
        "licence": row.licence,
        "terms": row.terms,
        "source": row.place.source,
        "preprocess": row.preprocess.to_dict(),
        "classes": row.config.classes,
        "layout": row.layout,
        "score": row.score and row.score._asdict(),
        "paper": row.paper,
        "sha256": row.sha256,
        "note": row.note,
        "file": str(cached_file(name)),
        "cached": cached_file(name).is_file(),
    }


def _describe_text(name: str) -> dict[str, Any]:
    row = TEXT_WEIGHTS[name]
    parameters = text_parameters(row.config)
    return {
        "name": name,
        "text": row.text,
        "parameters": parameters,
        "bytes": row.size,
        "context": row.config.context,
        "both": row.both,
        "licence": row.licence,
        "terms": row.terms,
        "source": row.place.source,
        "layout": row.layout,
        "paper": row.paper,
        "sha256": row.sha256,
        "note": row.note,
        "file": str(cached_file(name)),
        "cached": cached_file(name).is_file(),
    }


def _text_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Of `_TEXT_COLUMNS`."""
    return (
        row["name"],
        f"{row['text']}{'*' if row['both'] else ''}",
        f"{row['parameters'] / 1e6:.1f}M",
        "" if row["bytes"] is None else bytes_text(row["bytes"]),
        str(row["context"]),
        row["licence"],
        row["source"],
        "yes" if row["cached"] else "",
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Of `_COLUMNS`."""
    score, shown = row["score"], row["preprocess"]
    return (
        row["name"],
        row["model"],
        f"{row['parameters'] / 1e6:.1f}M",
        bytes_text(row["bytes"]),
        f"{score['top1']:.1f}{'*' if score['how'] else ' '}" if score else "",
        f"{shown['size'][0]} {shown['resize']} {shown['crop']:.2g}, mean {shown['mean'][0]:.2g}",
        row["licence"],
        row["source"],
        "yes" if row["cached"] else "",
    )


def _fetch(args: Sequence[str]) -> dict[str, Any]:
    given = parse(
        FetchArgs, args, "weights fetch", "Bring published weights into the cache.", flags=True
    )
    what = parse_source(given.name)
    if isinstance(what, Path):
        raise unknown_name("weights", given.name, NAMES)
    started = time.monotonic()
    file = fetch(what, say, again=given.again)
    print(f"{given.name} is in {file}")
    return {"name": given.name, "file": str(file), "seconds": time.monotonic() - started}


def _show(args: Sequence[str]) -> dict[str, Any]:
    given = parse(ShowArgs, args, "weights show", "What a file of weights holds.")
    if given.source in TEXT_WEIGHTS and not TEXT_WEIGHTS[given.source].both:
        found = open_text_weights(given.source, notify=say)
        return {"source": given.source, "text": _show_text(found)}
    opened = _open(given)
    result: dict[str, Any] = {
        "source": opened.source,
        "architecture": opened.architecture,
        "layout": opened.layout,
        "sha256": opened.sha256,
        "parameters": parameters_of(opened.config),
        "config": asdict(opened.config),
        "preprocess": opened.preprocess and opened.preprocess.to_dict(),
        "classes": list(opened.classes),
        "head": opened.head and to_header(opened.head),
        "boxes": opened.boxes and to_header(opened.boxes),
        "decoder": opened.decoder and opened.decoder.to_header(),
        "fits": list(opened.fits),
        "unseen": [one._asdict() for one in opened.unseen],
        "assumed": list(opened.assumed),
        "notes": list(opened.notes),
        "left_out": list(opened.left_out),
    }
    if given.model:
        result["into"] = _into(opened, given.model)
    for name, value in result.items():
        if name not in _BY_LINES:
            shown = "; ".join(value) if isinstance(value, list) else value
            print(f"{name:<12} {shown}")
    if opened.config.classes:
        named = some(list(opened.classes), 6) or "nothing names them"
        print(f"{'classes':<12} {opened.config.classes}: {named}")
    if head := opened.head or opened.boxes:
        print(f"{'head':<12} {head.line}")
    if opened.decoder:
        print(f"{'decoder':<12} {opened.decoder.line}")
    for name in ("config", "preprocess"):
        print(name)
        for part, value in (result[name] or {"": "not known"}).items():
            print(f"  {part:<18} {value}")
    _print_unseen(opened)
    for note in opened.notes:
        print(f"note         {note}")
    if find_text(dict.fromkeys(opened.left_out)):
        pair = open_pair(given.source, _told(given), notify=say)
        result |= {
            "text": _show_text(pair.text),
            "scale": pair.scale,
            "bias": pair.bias,
            "left_out": list(pair.image.left_out),
        }
        opened = pair.image
        print(f"{'scale':<12} {pair.scale:.6g}")
        print(f"{'bias':<12} {'none' if pair.bias is None else f'{pair.bias:.6g}'}")
        for note in pair.notes:
            print(f"note         {note}")
    if opened.left_out:
        print(f"left out     {len(opened.left_out)} tensors: {', '.join(opened.left_out[:6])}")
    return result


def _show_text(found: TextWeights) -> dict[str, Any]:
    """Prints what a text tower is, and returns it."""
    config, tokenizer = found.config, found.tokenizer
    row = next((name for name, row in TEXTS.items() if row == config), config.family)
    print(f"{'text':<12} {row}: {config.shape}")
    state = tokenizer and tokenizer.state()
    print(f"{'tokenizer':<12} {state or 'none: its vocabulary is not there'}")
    return {
        "config": asdict(config),
        "parameters": text_parameters(config),
        "tokenizer": state,
    }


_BY_LINES = {
    "config",
    "preprocess",
    "unseen",
    "assumed",
    "notes",
    "left_out",
    "classes",
    "head",
    "boxes",
    "decoder",
}


def _print_unseen(opened: Opened) -> None:
    """What no tensor shows, a line each: what was only taken to be so, and what is known."""
    for words in opened.assumed:
        print(f"assumed      {words}")
    for one in opened.unseen:
        if not one.assumed:
            print(f"known        {one}")


def _convert(args: Sequence[str]) -> dict[str, Any]:
    given = parse(
        ConvertArgs, args, "weights convert", "Write weights in another layout.", flags=True
    )
    if given.both:
        pair = open_pair(given.source, _told(given), notify=say)
        save_pair(given.out, pair, given.to, overwrite=given.overwrite)
        for note in pair.notes:
            print(f"note         {note}")
        print(f"{given.source} is in {given.out}, both towers, in the layout of {given.to}")
        return {"source": given.source, "to": given.to, "both": True, "file": str(given.out)}
    opened = _open(given)
    out = convert(opened, given.to, given.out, overwrite=given.overwrite)
    _print_unseen(opened)
    print(f"{given.source} is in {out}, in the layout of {given.to}")
    kept = opened.classes if given.to == OURS else ()
    if opened.classes:
        how = "with" if kept else "without"
        print(
            f"classes      {how} the names of its {len(opened.classes)}: "
            f"{some(list(opened.classes), 6)}"
        )
    if find_text(dict.fromkeys(opened.left_out)):
        print(f"{'text':<12} without its text tower: --both writes the two")
    if head := opened.head or opened.boxes:
        how = "with" if head_is_written(opened, given.to) else "without"
        what = "segmentation" if opened.head else "detection"
        print(f"{'head':<12} {how} that of {what}: {head.line}")
    if opened.decoder:
        how = "with" if decoder_is_written(opened, given.to) else "without"
        print(f"{'decoder':<12} {how} that of MAE: {opened.decoder.line}")
    return {
        "source": given.source,
        "to": given.to,
        "head": head_is_written(opened, given.to),
        "file": str(out),
        "unseen": [one._asdict() for one in opened.unseen],
        "assumed": list(opened.assumed),
        "classes": list(kept),
    }


def _told(given: ShowArgs) -> dict[str, Any]:
    return given.told.fields() | ({} if given.part is None else {"part": given.part})


def _open(given: ShowArgs) -> Opened:
    opened = open_start(given.source, _told(given), row=given.model, notify=say)
    if given.classes is None:
        return opened
    names = read_class_names(given.classes.expanduser())
    if len(names) != opened.config.classes:
        raise UsageError(
            f"{given.classes} names {len(names)} classes, and {given.source} has "
            f"{opened.config.classes} logits: one a line, in their order"
        )
    return opened._replace(classes=names)


def _into(opened: Opened, model: str) -> list[str]:
    """What becomes of the weights in the row `model`. Raises `DataError` where they do not fit."""
    row = replace(
        model_config(model),
        **{name: getattr(opened.config, name) for name in ("norm_eps", "resample")},
    )
    fitted = fit(opened.state, opened.config, row, opened.source)
    new = [f"new: {', '.join(fitted.new)}"] if fitted.new else []
    unused = [f"not used: {', '.join(fitted.left_out)}"] if fitted.left_out else []
    return [f"{len(fitted.state)} tensors of {len(opened.state)}", *fitted.notes, *new, *unused]
