"""Token merging, ToMe: a ViT made faster without training it (Bolya et al., arXiv 2210.09461).

After the attention of each block, the r patch tokens that are most like another one are averaged
into it. What "like" means is the cosine between the tokens' keys, averaged over the heads; who may
be averaged into whom, a bipartite matching, which needs no iterations: every second token (those at
even places of the sequence) may go into one of the others. A token that stands for s patches weighs
s times as much in averages, and in attention (`attend`'s `keys`). Prefix tokens are not merged.

The order of the tokens afterwards decides who may be merged next: as in the authors' code, prefix,
then what is left of the one half, then the other, each in its former order.

Letters: b batch, t tokens, k prefix tokens, n patches, d width, e width of a head.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.nn.attention import attend
from vitrail.nn.encoder import Block, Encoder


class Merged(NamedTuple):
    """What an encoder has found, in fewer tokens."""

    tokens: Float[Tensor, "b t d"]
    """After the final norm: the prefix, then the merged patches."""
    sizes: Float[Tensor, "b t"]
    """How many patches each token stands for; 1 for each of the prefix."""
    home: Int[Tensor, "b n"]
    """The place, in `tokens`, of the token that each patch has been merged into."""


def decreasing(r: int, depth: int) -> list[int]:
    """How many tokens to merge after each of `depth` blocks: 2 r at first, none at the end, which
    is nearly as many in all as r after each. Fewer tokens sooner make a model faster, and cost more
    accuracy (section 4.1).

    >>> decreasing(13, 12)
    [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]
    """
    return [int(2 * r * (1 - i / max(depth - 1, 1))) for i in range(depth)]


def encode_merging(
    encoder: Encoder, x: Float[Tensor, "b t d"], prefix: int, r: int | Sequence[int]
) -> Merged:
    """Run the encoder, with `r` patch tokens fewer after each block, or after each its own, but no
    more than half of them.

    >>> encoder = Encoder([Block(32, 2, 64), Block(32, 2, 64)], 32, 1e-6)
    >>> encode_merging(encoder, torch.randn(1, 17, 32), prefix=1, r=5).tokens.shape
    torch.Size([1, 7, 32])
    """
    b, t, _ = x.shape
    home = torch.arange(prefix, t, device=x.device).expand(b, -1)
    sizes = torch.ones(b, t, device=x.device)
    counts = [r] * len(encoder.blocks) if isinstance(r, int) else r
    for block, wanted in zip(encoder.blocks, counts, strict=True):
        assert isinstance(block, Block)
        q, k, v = block.attn.apart(block.norm1(x))
        merged_before = x.shape[1] < t  # until then all sizes are 1, which changes no attention
        values = block.attn.joined(attend(q, k, v, sizes if merged_before else None))
        x = x + block.drop_path(block.scale1(values))
        count = min(wanted, (x.shape[1] - prefix) // 2)
        if count:
            # The sum of the heads' keys points where their mean does. Slice by slice it is twice as
            # fast as torch's reduction over an axis between others.
            if torch.compiler.is_exporting():
                x, sizes, moved = merge_by_products(x, sizes, k.sum(dim=1), prefix, count)
            else:
                metric = reduce(torch.add, k.unbind(dim=1))
                x, sizes, moved = merge(x, sizes, match(metric, prefix, count))
            home = moved.gather(1, home)
        x = block.fed_forward(x)
    return Merged(encoder.norm(x), sizes, home)


class Match(NamedTuple):
    """Which tokens to merge; all numbers are places in the sequence."""

    stay: Int[Tensor, "b s"]
    """Of the tokens that go on, as they are or with others merged into them, in their new order."""
    gone: Int[Tensor, "b r"]
    """Of those that are merged into another."""
    into: Int[Tensor, "b r"]
    """The new places of those others."""


@torch.no_grad()
def match(metric: Float[Tensor, "b t e"], prefix: int, r: int) -> Match:
    """The `r` tokens, among those at even places, that have the nearest neighbour at an odd one.

    `r` is from 1 to half of the patch tokens.
    """
    b, t, _ = metric.shape
    metric = F.normalize(metric.float(), dim=-1)
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    near, partner = (metric[:, even::2] @ metric[:, odd::2].transpose(1, 2)).max(dim=2)
    order = near.argsort(dim=1, descending=True)
    first, rest = order[:, :r], order[:, r:].sort(dim=1).values
    places = torch.arange(t, device=metric.device).expand(b, -1)
    stay = torch.cat([places[:, :prefix], even + 2 * rest, places[:, odd::2]], dim=1)
    into = prefix + rest.shape[1] + partner.gather(1, first)
    return Match(stay, even + 2 * first, into)


def merge(
    x: Float[Tensor, "b t d"], sizes: Float[Tensor, "b t"], match: Match
) -> tuple[Float[Tensor, "b s d"], Float[Tensor, "b s"], Int[Tensor, "b t"]]:
    """The merged tokens, their sizes, and where each of the old tokens is now."""
    stay, gone, into = match
    leaving = sizes.gather(1, gone)
    sizes = sizes.gather(1, stay).scatter_add(1, into, leaving)
    # A weighted mean moves from its old value towards what joins it, by its share of the new
    # weight: that touches r tokens, where summing and dividing would touch them all.
    kept = take(x, stay)
    share = (leaving / sizes.gather(1, into)).to(x.dtype)
    change = (take(x, gone) - take(kept, into)) * share[..., None]
    b, s, d = kept.shape
    merged = kept.view(b * s, d).index_add_(0, _rows(into, s), change.view(-1, d)).view(b, s, d)
    moved = torch.empty(x.shape[:2], dtype=torch.long, device=x.device)
    new = torch.arange(s, device=x.device).expand(b, -1)
    return merged, sizes, moved.scatter(1, stay, new).scatter(1, gone, into)


def merge_by_products(
    x: Float[Tensor, "b t d"],
    sizes: Float[Tensor, "b t"],
    metric: Float[Tensor, "b t e"],
    prefix: int,
    r: int,
) -> tuple[Float[Tensor, "b s d"], Float[Tensor, "b s"], Int[Tensor, "b t"]]:
    """What `merge` makes of `match`, without sorting and scattering, which cost other runtimes more
    than the block's own products: every place is found by comparing, and one product moves and
    adds the tokens.
    """
    t = x.shape[1]
    places = torch.arange(t, device=x.device)
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    metric = metric.float()
    metric = metric / metric.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    likeness = metric[:, even::2] @ metric[:, odd::2].transpose(1, 2)
    near, e = likeness.amax(dim=2), likeness.shape[1]
    # The first of the nearest. An argmax is a sort in OpenVINO, ten times as slow; and its least of
    # whole numbers (2026.4) reads beyond the end of a row, so these are no whole numbers.
    others = places[: likeness.shape[2]].float()
    partner = torch.where(likeness == near[..., None], others, float(t)).amin(dim=2).int()
    # A token goes if fewer than r go before it: those nearer to another, and of equal ones the
    # first.
    mine, theirs, first = near[:, :, None], near[:, None], places[:e] < places[:e, None]
    goes = ((theirs > mine) | ((theirs == mine) & first)).float().sum(dim=2) < r
    into = torch.where(goes, prefix + e - r + partner, prefix - 1 + (~goes).int().cumsum(dim=1))
    # The others' new places are known. Each has a slot among those of the even ones, any one.
    slot = ((places - even) // 2).clamp(0, e - 1)
    known = torch.where(places < prefix, places, prefix + e - r + (places - odd) // 2)
    known_is = (places < prefix) | ((places - odd) % 2 == 0)
    moved = torch.where(known_is, known, into.index_select(1, slot))
    shares = (places[: t - r, None] == moved[:, None]) * sizes[:, None]
    sizes = shares.sum(dim=2)
    shares = (shares / sizes[..., None]).to(x.dtype)
    # AMX multiplies bfloat16 by pairs of rows: with one too few, OpenVINO goes without it.
    return F.pad(shares, (0, t % 2)) @ F.pad(x, (0, 0, 0, t % 2)), sizes, moved


def take(x: Float[Tensor, "b t d"], places: Int[Tensor, "b m"]) -> Float[Tensor, "b m d"]:
    """The tokens at these places. Whole rows are copied, which `gather` would do number by number.

    >>> x = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    >>> take(x, torch.tensor([[1, 1], [0, 1]])).squeeze().tolist()
    [[2.0, 2.0], [3.0, 4.0]]
    """
    b, t, d = x.shape
    return x.reshape(b * t, d).index_select(0, _rows(places, t)).view(b, -1, d)


def _rows(places: Int[Tensor, "b m"], t: int) -> Int[Tensor, " rows"]:
    """Places in sequences of `t` tokens as rows of all of them, one below the other."""
    first = torch.arange(0, len(places) * t, t, device=places.device)
    return (places + first[:, None]).flatten()
