"""The tokenizers of SigLIP, SigLIP 2 and LiT's small towers: pieces of a text, no words.

- `siglip`: lower case, no punctuation, spaces for `_` and for runs of spaces; padded with the end
  of text; spiece.model, 32,000 pieces
- `siglip2`: lower case; padded with a token of its own; tokenizer.json, 256,000
- `lit`: as it stands; padded with the end of text; a sentencepiece model, 16,000

Then its pieces, the end of text, and padding on the right to the whole context: the towers read
their last place. (big_vision, pp/ops_text.py and prompt_engineering.py; vit_jax, models_lit.) The
files are Google's and are not shipped; `sentencepiece` reads a .model, `tokenizers` a .json.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from vitrail.errors import DataError, UsageError, unknown_name
from vitrail.text.siglip import Reading
from vitrail.text.tokenizer import Tokens, check_context, checked, padded

_NO_PUNCTUATION = str.maketrans("_", " ", string.punctuation.replace("_", ""))


def _canonical(text: str) -> str:
    return " ".join(text.translate(_NO_PUNCTUATION).lower().split())


_CLEAN: Mapping[Reading, Callable[[str], str]] = {
    "siglip": _canonical,
    "siglip2": str.lower,
    "lit": lambda text: text,
}


class _Model(NamedTuple):
    """What a library makes of a file."""

    pieces: Callable[[str], Sequence[int]]
    size: int
    end: int
    pad: int


class Pieces:
    """Texts for these towers, padded to `context` tokens."""

    def __init__(self, name: str, content: bytes, reading: Reading, context: int = 64) -> None:
        """`name` and `content` of the file. Raises `DataError` for one that is damaged or of
        something else, `UsageError` where the library for it is not installed.
        """
        check_context(context, 2)
        if reading not in _CLEAN:
            raise unknown_name("reading", str(reading), _CLEAN)
        read = _read_json if name.endswith(".json") else _read_sentencepiece
        self._model = read(name, content)
        self._name = name
        self.vocabulary = self._model.size
        self.context = context
        self.reading: Reading = reading
        self.files: Mapping[str, bytes] = {name: content}

    def state(self) -> dict[str, Any]:
        """What JSON can say of it."""
        return {
            "kind": "pieces",
            "file": self._name,
            "context": self.context,
            "reading": self.reading,
        }

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """The texts' tokens `[b context]`."""
        room, rows, cut = self.context - 1, [], 0
        for text in checked(texts):
            ids = self._model.pieces(_CLEAN[self.reading](text))
            cut += len(ids) > room
            rows.append([*ids[:room], self._model.end])
        pad = self._model.pad if self.reading == "siglip2" else self._model.end
        return padded(rows, self.context, pad, cut)


def _read_sentencepiece(name: str, content: bytes) -> _Model:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise _missing("sentencepiece", name) from error
    try:
        model = SentencePieceProcessor(model_proto=content)
        ends = model.eos_id(), max(model.pad_id(), 0)
        count = model.get_piece_size()
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise DataError(f"{name} is no model of sentencepiece, or is damaged: {error}") from error
    if not 0 <= ends[0] < count:
        raise DataError(f"{name} has no piece for the end of a text, which the tower needs")
    return _Model(model.encode, count, *ends)


def _read_json(name: str, content: bytes) -> _Model:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise _missing("tokenizers", name) from error
    try:
        model = Tokenizer.from_str(content.decode())
        model.no_padding()
        model.no_truncation()
        count = model.get_vocab_size(with_added_tokens=True)
        known = [model.token_to_id(word) for word in ("<eos>", "</s>", "<pad>")]
    except BaseException as error:  # a panic of its Rust code is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise DataError(f"{name} is no tokenizer.json, or is damaged: {error}") from error
    end = next((word for word in known[:2] if word is not None), None)
    if end is None:
        raise DataError(f"{name} has no <eos> or </s> for the end of a text, which the tower needs")

    def pieces(text: str) -> Sequence[int]:
        return model.encode(text, add_special_tokens=False).ids

    return _Model(pieces, count, end, known[2] or 0)


def _missing(package: str, name: str) -> UsageError:
    return UsageError(
        f"{name} is read by {package}, which is not installed: pip install 'vitrail[text]'"
    )
