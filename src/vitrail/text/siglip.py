"""SigLIP's text tower (Zhai et al., arXiv 2303.15343), SigLIP 2's (2502.14786), LiT's plain ones.

Tokens plus positions -> pre-norm blocks, where every token sees all -> norm -> the last token's
vector -> projection with bias. There is no mask: padding is attended to, and the last token mostly
is padding, so a text has to be padded to the whole `context` as it was in training. Anything else
gives other vectors without an error (transformers#26522), and is refused here.

LiT-L16S and -L16Ti (Zhai et al., 2111.07991) have this shape too; their texts are read otherwise.

Letters: b texts, t tokens, d width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from vitrail.errors import UsageError, setting, unknown_name
from vitrail.nn import Activation, lecun_normal_, normal_
from vitrail.text.tower import Tower, TowerConfig, encoded, plain_encoder

Reading = Literal["siglip", "siglip2", "lit"]
"""How its tokenizer reads a text; `vitrail.text.pieces` says what each does."""


@dataclass(frozen=True, kw_only=True)
class SiglipTextConfig(TowerConfig):
    """The shape of one of these towers. The position table has `context` rows."""

    family: Literal["siglip"] = "siglip"
    vocabulary: int = 32000
    context: int = 64
    width: int = 768
    heads: int = 12
    mlp: int = 3072
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-6
    out: int = 768
    reading: Reading = "siglip"
    """How its tokenizer reads a text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reading not in get_args(Reading):
            raise unknown_name("reading", str(self.reading), get_args(Reading))


class SiglipText(Tower):
    """One vector a text: that at its last place."""

    config: SiglipTextConfig

    def __init__(self, config: SiglipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Parameter(torch.empty(config.context, config.width))
        self.encoder = plain_encoder(config)
        self.head = nn.Linear(config.width, config.out) if config.out else None
        self._initialise()

    def _initialise(self) -> None:
        """As big_vision's code."""
        normal_(self.tokens.weight, self.config.width**-0.5)
        normal_(self.position, self.config.width**-0.5)
        for name, module in self.encoder.named_modules():
            if isinstance(module, nn.Linear) and not module.weight.is_meta:
                nn.init.xavier_uniform_(module.weight)
                if ".mlp." in name:
                    nn.init.normal_(module.bias, std=1e-6)
                else:
                    nn.init.zeros_(module.bias)
        if self.head is not None and not self.head.weight.is_meta:
            lecun_normal_(self.head)

    def pooled(
        self, tokens: Int64[Tensor, "b t"], mask: Bool[Tensor, "b t"] | None
    ) -> Float[Tensor, "b d"]:
        """`mask` is not looked at. Raises `UsageError` for texts that are not padded."""
        if tokens.shape[1] != self.config.context:
            raise UsageError(
                f"this tower reads its last place: texts have to be padded to "
                f"{setting('text.context', self.config.context)} tokens, and these have "
                f"{tokens.shape[1]}; its own tokenizer does it"
            )
        x = self.tokens(tokens) + self.position
        return encoded(self.encoder, x)[:, -1]


_LARGE = {"depth": 24, "width": 1024, "heads": 16, "mlp": 4096, "out": 1024}
_SO400M = {"depth": 27, "width": 1152, "heads": 16, "mlp": 4304, "out": 1152}
_TWO = {"vocabulary": 256_000, "reading": "siglip2"}
_LIT = {"vocabulary": 16_000, "context": 16, "out": 1024, "reading": "lit"}

ROWS: Mapping[str, SiglipTextConfig] = {
    "siglip_b16": SiglipTextConfig(),
    "siglip_l16": SiglipTextConfig(**_LARGE),  # type: ignore[arg-type]
    "siglip_so400m14": SiglipTextConfig(**_SO400M, context=16),  # type: ignore[arg-type]
    "siglip2_b16": SiglipTextConfig(**_TWO),  # type: ignore[arg-type]
    "siglip2_l16": SiglipTextConfig(**_LARGE | _TWO),  # type: ignore[arg-type]
    "siglip2_so400m14": SiglipTextConfig(**_SO400M | _TWO),  # type: ignore[arg-type]
    "siglip2_g16": SiglipTextConfig(**_SO400M | _TWO | {"out": 1536}),  # type: ignore[arg-type]
    "lit_s": SiglipTextConfig(width=384, heads=6, mlp=1536, **_LIT),  # type: ignore[arg-type]
    "lit_ti": SiglipTextConfig(width=192, heads=3, mlp=768, **_LIT),  # type: ignore[arg-type]
}
"""`lit_s` is the text tower of LiT-L16S, `lit_ti` of LiT-L16Ti."""
