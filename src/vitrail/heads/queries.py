"""EoMT: a ViT that segments by itself (Kerssies et al., "Your ViT is Secretly an Image Segmentation
Model", arXiv 2503.19108).

Learned queries go through the last blocks with the patches. Each then has a class, or none, and a
mask: its product with every cell of the patches' map, enlarged. In training there are predictions
before each of these blocks too, and queries look only where their masks say so; that is taken back
block by block, the first one first, until at the end the model is a plain ViT (section 3.3).

Letters: b batch, q queries, c classes, d width, h w cells of the masks, gh gw token grid, t tokens,
n blocks that queries go through.
"""

import math
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitrail.errors import UsageError, setting
from vitrail.heads.maps import cells


class Prediction(NamedTuple):
    """What each query says, after some block."""

    classes: Float[Tensor, "b q c+1"]
    """Logits; the last is of no object."""
    masks: Float[Tensor, "b q h w"]
    """Logits, of cells that show the image."""


@runtime_checkable
class Jointly(Protocol):
    """What a ViT does with queries: `vitrail.models.ViT.joined`."""

    def joined(
        self, x: Tensor, queries: Tensor, blocks: int, look: "Look | None" = None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Queries and the image's tokens after the final norm, and the patches' grid."""
        ...


@runtime_checkable
class Look(Protocol):
    """What is asked before each block of which tokens each may attend to."""

    def __call__(self, tokens: Tensor, grid: tuple[int, int], /) -> Tensor | None: ...


class Upscale(nn.Module):
    """Twice the rows and columns: transposed 2x2 convolution, GELU, 3x3 depth-wise, norm of each
    cell.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d _h _w"]:
        x = self.conv(F.gelu(self.up(x)))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MaskMlp(nn.Module):
    """What a query looks for in the cells: three linear maps with GELUs between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b q d"]) -> Float[Tensor, "b q d"]:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


def upscales(patch: tuple[int, int]) -> int:
    """How often the patches' map is doubled: to stride 4 of patches of 16, to 7 of those of 14.

    >>> upscales((16, 16)), upscales((14, 14)), upscales((8, 8)), upscales((32, 32))
    (2, 1, 1, 3)
    """
    return max(1, int(math.log2(min(patch))) - 2)


def usual_joint_blocks(width: int, depth: int) -> int:
    """Through how many of the last blocks queries go, as published: 3 in S, B, 4 in L, 5 in g."""
    return min(depth, 3 if width <= 768 else 4 if width <= 1024 else 5)


def masked_shares(done: float, blocks: int) -> tuple[float, ...]:
    """With which probability a query looks only within its mask, before each of `blocks` blocks,
    when `done` (0 to 1) of a run is over.

    From 1 to 0, as `(1 - t) ** 0.9`, in one block after the other: at ADE20K's recipe for L, with
    four of them, within the second to the fifth sixth of the run.

    >>> [round(share, 2) for share in masked_shares(0.25, 4)]
    [0.54, 1.0, 1.0, 1.0]
    """
    parts = blocks + 2
    gone = (min(max(done * parts - (i + 1), 0.0), 1.0) for i in range(blocks))
    return tuple((1 - share) ** 0.9 for share in gone)


class QueryHead(nn.Module):
    """Queries, what they say, and the mask that each looks through in training."""

    shares: Tensor

    def __init__(
        self, width: int, patch: tuple[int, int], classes: int, queries: int, blocks: int
    ) -> None:
        """`blocks`: through how many of the ViT's last blocks the queries go."""
        super().__init__()
        times = upscales(patch)
        if patch[0] % 2**times or patch[1] % 2**times:
            raise UsageError(
                f"the masks of queries double the map of patches {times} times, so the patches' "
                f"sides must be divisible by {2**times}, not {patch[0]}x{patch[1]}: use another "
                f"model, or {setting('head', 'deeplab')}"
            )
        self.blocks = blocks
        self.stride = (patch[0] // 2**times, patch[1] // 2**times)
        # No name of torch's own layer around them: queries are parameters as class tokens are.
        self.queries = nn.Parameter(torch.empty(queries, width))
        if not self.queries.is_meta:
            nn.init.normal_(self.queries)
        self.classifier = nn.Linear(width, classes + 1)
        self.mask = MaskMlp(width)
        self.upscale = nn.Sequential(*(Upscale(width) for _ in range(times)))
        # Beside the weights, not among them: it follows from how much of a run is over.
        self.register_buffer("shares", torch.ones(blocks), persistent=False)

    def enter(self, done: float) -> None:
        """Before a step, of a run of which `done` (0 to 1) is over: see `masked_shares`."""
        self.shares.copy_(torch.tensor(masked_shares(done, self.blocks)))

    def forward(self, backbone: Jointly, x: Float[Tensor, "b _c _h _w"]) -> Prediction:
        """What the queries say in the end, with nothing masked: a plain pass, also in training."""
        tokens, grid = backbone.joined(x, self.queries, self.blocks)
        return self._shown(self.say(tokens, grid), (x.shape[2], x.shape[3]))

    def training_predictions(
        self,
        backbone: Jointly,
        x: Float[Tensor, "b _c _h _w"],
        draws: Float[Tensor, "n b q"] | None = None,
    ) -> tuple[Prediction, ...]:
        """What they say before each of their blocks, and in the end: `n + 1` predictions.

        `draws`: a number in [0, 1) for each block, image and query, which looks through its mask
        where that is below the block's share. None draws them as dropout does.
        """
        if draws is None:
            draws = torch.rand(self.blocks, len(x), len(self.queries), device=x.device)
        found: list[Prediction] = []

        def look(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
            i = len(found)
            found.append(self.say(tokens, grid))
            return self.seen(found[i].masks, grid, tokens.shape[1], draws[i] < self.shares[i])

        tokens, grid = backbone.joined(x, self.queries, self.blocks, look)
        size = (x.shape[2], x.shape[3])
        return tuple(self._shown(one, size) for one in (*found, self.say(tokens, grid)))

    def say(self, tokens: Float[Tensor, "b t d"], grid: tuple[int, int]) -> Prediction:
        """Classes and masks, of tokens after the final norm: queries, prefix, patches of `grid`."""
        queries = tokens[:, : len(self.queries)]
        patches = tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
        masks = torch.einsum("bqd,bdhw->bqhw", self.mask(queries), self.upscale(patches))
        return Prediction(self.classifier(queries), masks)

    def seen(
        self,
        masks: Float[Tensor, "b q h w"],
        grid: tuple[int, int],
        tokens: int,
        masked: Bool[Tensor, "b q"],
    ) -> Bool[Tensor, "b t t"]:
        """What each of `tokens` tokens may attend to: all, but for `masked` queries, to which only
        those patches are shown that are in their masks.
        """
        b, q = masks.shape[:2]
        inside = F.interpolate(masks.detach(), grid, mode="bilinear").flatten(2) > 0
        inside = inside | ~masked[:, :, None]
        # Queries and prefix are always seen, so that a query with an empty mask has keys too.
        others = inside.new_ones(b, q, tokens - inside.shape[2])
        rows = inside.new_ones(b, tokens - q, tokens)
        return torch.cat([torch.cat([others, inside], dim=2), rows], dim=1)

    def _shown(self, found: Prediction, size: tuple[int, int]) -> Prediction:
        """Without cells that lie in the padding of an image of `size` pixels."""
        rows, columns = cells(size, self.stride)
        return found._replace(masks=found.masks[:, :, :rows, :columns])


def semantic(found: Prediction) -> Float[Tensor, "b c h w"]:
    """How much speaks for each class at each cell: the queries' masks, each times its classes.

    `sum_q sigmoid(mask) softmax(class)`, without the class of no object (MaskFormer, arXiv
    2107.06278, section 3.4). Not normalised: the largest counts.
    """
    classes = found.classes.softmax(dim=-1)[..., :-1]
    return torch.einsum("bqc,bqhw->bchw", classes, found.masks.sigmoid())
