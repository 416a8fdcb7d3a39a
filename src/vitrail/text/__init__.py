"""Text towers and their tokenizers: from texts to one vector each."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeAlias

from vitrail.errors import UsageError, unknown_name
from vitrail.text.bert import ROWS as BERT_ROWS
from vitrail.text.bert import Bert as Bert
from vitrail.text.bert import BertConfig as BertConfig
from vitrail.text.bpe import ClipTokenizer as ClipTokenizer
from vitrail.text.clip import ROWS as CLIP_ROWS
from vitrail.text.clip import ClipText as ClipText
from vitrail.text.clip import ClipTextConfig as ClipTextConfig
from vitrail.text.opening import open_tokenizer as open_tokenizer
from vitrail.text.opening import tokenizer_of as tokenizer_of
from vitrail.text.pieces import Pieces as Pieces
from vitrail.text.siglip import ROWS as SIGLIP_ROWS
from vitrail.text.siglip import SiglipText as SiglipText
from vitrail.text.siglip import SiglipTextConfig as SiglipTextConfig
from vitrail.text.tokenizer import Tokenizer as Tokenizer
from vitrail.text.tokenizer import Tokens as Tokens
from vitrail.text.wordpiece import WordPiece as WordPiece

TextConfig: TypeAlias = ClipTextConfig | SiglipTextConfig | BertConfig
"""The union of the families' configs; `family` tells them apart in a file."""
TextTower: TypeAlias = ClipText | SiglipText | Bert
"""The union of the families' modules."""

TEXTS: Mapping[str, TextConfig] = {**CLIP_ROWS, **SIGLIP_ROWS, **BERT_ROWS}
TEXT_FAMILIES: Mapping[type[TextConfig], type[TextTower]] = {
    ClipTextConfig: ClipText,
    SiglipTextConfig: SiglipText,
    BertConfig: Bert,
}


def text_config(name: str, **changes: Any) -> TextConfig:
    """The row `name` of `TEXTS` with fields changed; `UsageError` for a name it does not know.

    >>> text_config("clip_b32", out=256).width
    512
    """
    if name not in TEXTS:
        raise unknown_name("text tower", name, TEXTS)
    row = TEXTS[name]
    known = {field.name for field in fields(row)} - {"family"}
    for field in changes:
        if field not in known:
            raise unknown_name(f"field of {type(row).__name__}", field, known)
    return replace(row, **changes)


def build_text(text: str | TextConfig, **changes: Any) -> TextTower:
    """A freshly initialised tower, by name or from a config.

    >>> build_text("minilm_l6", depth=1).width
    384
    """
    config = text_config(text, **changes) if isinstance(text, str) else text
    if changes and not isinstance(text, str):
        raise UsageError("changes go with a name; change a config with dataclasses.replace")
    return TEXT_FAMILIES[type(config)](config)  # type: ignore[arg-type]  # its own config
