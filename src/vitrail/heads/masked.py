"""MAE's decoder: from the few patches that an encoder saw to the pixels of all (arXiv 2111.06377).

    embed       Linear, from the encoder's width to its own
                a learned token in each hidden patch's place; fixed positions on all patches
    encoder     blocks and a norm, as a ViT's, small: 8 blocks of width 512 in the paper
    predict     Linear, to the pixels of a patch in the order (row, column, channel)

Letters: b images, n patches, m of them seen, k prefix tokens, d the encoder's width, p q the sides
of a patch, c channels, o = p q c.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import UsageError, setting
from vitrail.nn import Block, Encoder, SinCosPosition, normal_


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder; its MLPs are four times as wide. The paper's is for a ViT-L."""

    depth: int = 8
    width: int = 512
    heads: int = 16

    def __post_init__(self) -> None:
        for field in ("depth", "width", "heads"):
            if getattr(self, field) < 1:
                raise UsageError(
                    f"a decoder's {setting(field)} must be at least 1, not {getattr(self, field)}"
                )
        if self.width % self.heads or self.width % 4:
            raise UsageError(
                f"a decoder's {setting('width')} must be divisible by its {setting('heads')} and "
                f"by 4, and {self.width} is not by {self.heads} and 4"
            )


class PatchDecoder(nn.Module):
    """A light transformer that is thrown away when the encoder has learned.

    >>> decoder = PatchDecoder(DecoderConfig(depth=1, width=16, heads=2), 24, (2, 2), 12)
    >>> decoder(torch.zeros(3, 2, 24), torch.zeros(3, 1, dtype=torch.long), (2, 2)).shape
    torch.Size([3, 4, 12])
    """

    def __init__(
        self,
        config: DecoderConfig,
        width: int,
        grid: tuple[int, int],
        out: int,
        norm_eps: float = 1e-6,
    ) -> None:
        """`width`: the encoder's; `grid`: rows and columns of patches that are usual, though any
        may come; `out`: numbers of a patch.
        """
        super().__init__()
        self.config = config
        e = config.width
        self.embed = nn.Linear(width, e)
        self.mask_token = nn.Parameter(torch.empty(e))
        self.position = SinCosPosition(grid, e, "sincos_mae")
        blocks = [Block(e, config.heads, 4 * e, norm_eps=norm_eps) for _ in range(config.depth)]
        self.encoder = Encoder(blocks, e, norm_eps)
        self.predict = nn.Linear(e, out)
        self.initialise()

    def initialise(self) -> None:
        """As the authors do: Xavier's uniform and zeros; the token of deviation 0.02."""
        normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens: Float[Tensor, "b t d"],
        places: Int[Tensor, "b m"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "b n o"]:
        """The pixels of all patches of `grid`, of prefix tokens and those at `places`."""
        seen = self.embed(tokens)
        k = tokens.shape[1] - places.shape[1]
        prefix, seen = seen[:, :k], seen[:, k:]
        b, _, e = seen.shape
        patches = self.mask_token.to(seen.dtype).expand(b, grid[0] * grid[1], e)
        patches = patches.scatter(1, places[:, :, None].expand(-1, -1, e), seen)
        patches, prefix = self.position(patches, prefix, grid)
        decoded = self.encoder(torch.cat([prefix, patches], dim=1), grid)
        return self.predict(decoded[:, k:])


def patch_pixels(
    images: Float[Tensor, "b c h w"], patch: tuple[int, int]
) -> Float[Tensor, "b n o"]:
    """The pixels of each patch, row by row of patches; in a patch by row, column, channel.

    >>> patch_pixels(torch.arange(8.0).view(1, 2, 2, 2), (1, 2)).tolist()
    [[[0.0, 4.0, 1.0, 5.0], [2.0, 6.0, 3.0, 7.0]]]
    """
    b, c, h, w = images.shape
    p, q = patch
    cut = images.view(b, c, h // p, p, w // q, q).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(b, (h // p) * (w // q), p * q * c)
