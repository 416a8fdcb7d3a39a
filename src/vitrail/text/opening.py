"""From a tower, and the files beside its weights, to the tokenizer that it was trained with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitrail.errors import DataError, UsageError, setting
from vitrail.text.bert import BertConfig
from vitrail.text.bpe import ClipTokenizer
from vitrail.text.clip import ClipTextConfig
from vitrail.text.pieces import Pieces
from vitrail.text.siglip import SiglipTextConfig
from vitrail.text.tokenizer import Tokenizer, check_fits
from vitrail.text.tower import TowerConfig
from vitrail.text.wordpiece import FILE, WordPiece

_MOST_BYTES = 64 << 20
"""Of a tokenizer's file: Gemma's tokenizer.json, the largest known, has 34 MB."""
_PIECES = ("spiece.model", "sentencepiece.model", "tokenizer.model", "tokenizer.json")
"""What the files of SigLIP's tokenizers are called; LiT's are `*.model`."""


def open_tokenizer(config: TowerConfig, files: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a tower. `files`: its vocabulary's file, or the folder that this lies in;
    only CLIP's ships with vitrail, and needs none.

    Raises `UsageError` where there is no such file, saying which it would be, and `DataError` for
    one that is damaged or does not fit the tower.
    """
    if isinstance(config, ClipTextConfig):
        if files is not None and Path(files).is_file():
            raise UsageError(f"CLIP's vocabulary ships with vitrail: leave {files} out")
        found: Tokenizer = ClipTokenizer(config.context)
        check_fits(found, config.vocabulary, "CLIP's vocabulary")
        return found
    file = find_file(config, files)
    if file is None:
        given = "none is given" if files is None else f"{files} has none"
        raise UsageError(
            f"the texts of this tower need its vocabulary, and {given}: it is the "
            f"{_wanted(config)} that its makers published beside the weights"
        )
    try:
        with file.open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    if len(content) > _MOST_BYTES:
        raise DataError(f"{file} is too large for a vocabulary: over {_MOST_BYTES >> 20} MiB")
    try:
        if isinstance(config, BertConfig):
            found = WordPiece(content, config.context, closed=config.closed, lower=config.lower)
        else:
            assert isinstance(config, SiglipTextConfig)
            found = Pieces(file.name, content, config.reading, config.context)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    check_fits(found, config.vocabulary, str(file))
    return found


def find_file(config: TowerConfig, place: str | Path | None) -> Path | None:
    """The vocabulary's file of a tower at `place`, a file or a folder; None if there is none."""
    if place is None:
        return None
    place = Path(place).expanduser()
    if place.is_file():
        return place
    names = (FILE,) if isinstance(config, BertConfig) else _PIECES
    found = next((place / name for name in names if (place / name).is_file()), None)
    if found is None and isinstance(config, SiglipTextConfig):
        others = sorted(place.glob("*.model"))
        return others[0] if len(others) == 1 else None
    return found


def tokenizer_of(state: Mapping[str, Any], files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer that `Tokenizer.state` and `.files` say, of a run or a checkpoint.

    Raises `DataError` where they say none, or a file is missing.
    """
    said = dict(state)
    kind = said.pop("kind", None)
    try:
        if kind == "clip":
            return ClipTokenizer(**said)
        if kind == "wordpiece":
            return WordPiece(files[FILE], **said)
        if kind == "pieces":
            name = str(said.pop("file"))
            return Pieces(name, files[name], **said)
    except KeyError as error:
        raise DataError(f"the tokenizer's file {error} is missing beside the weights") from error
    except TypeError as error:
        raise DataError(f"what is said of the tokenizer cannot be read: {error}") from error
    raise DataError(f"no tokenizer is called {setting('kind', kind)}: another vitrail wrote it")


def _wanted(config: TowerConfig) -> str:
    if isinstance(config, BertConfig):
        return FILE
    assert isinstance(config, SiglipTextConfig)
    return {
        "siglip": "spiece.model",
        "siglip2": "tokenizer.json",
        "lit": "sentencepiece model (*.model)",
    }[config.reading]
