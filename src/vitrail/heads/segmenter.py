"""A backbone with a head for each pixel's class.

| `head`    | what it is                                           | source                 |
|-----------|------------------------------------------------------|------------------------|
| `linear`  | batch norm and one matrix a cell                     | DINOv2, 2304.07193     |
| `deeplab` | ASPP and a decoder at stride 4                       | DeepLabV3+, 1802.02611 |
| `queries` | queries in a ViT's last blocks, masks of their cells | EoMT, 2503.19108       |

Letters: b batch, c channels, h w pixels.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import UsageError, setting, unknown_name
from vitrail.heads.backbone import Backbone, Tapped, quarters_of, refuse_extent, shapes_of
from vitrail.heads.deeplab import FINE, Deconv, DeepLabHead, Side, rates_at
from vitrail.heads.linear import LinearHead
from vitrail.heads.maps import at_stride
from vitrail.heads.queries import Prediction, QueryHead, semantic, usual_joint_blocks

HeadKind = Literal["linear", "deeplab", "queries"]
Taps = Literal["last", "four"]
Fine = Literal["deconv", "side", "tap"]


@dataclass(frozen=True, kw_only=True)
class SegmentHeadConfig:
    """What is put on a backbone that it may say a class of each pixel."""

    head: HeadKind = "linear"
    taps: Taps = "last"
    """Of head="linear": what it reads, the last map or four: of a ViT after every quarter of its
    blocks, of a backbone of several stages the last four maps, at the finest one's stride."""
    fine: Fine = "deconv"
    """Of head="deeplab": where a backbone whose maps all are of one stride has that of stride 4
    from: its last map by transposed convolutions, the image by one of stride 2 and pooling, or the
    patches after the first quarter of its blocks, bilinearly."""
    queries: int = 100
    """Of head="queries": how many things an image can have at once; 200 for panoptic ones."""
    joint_blocks: int | None = None
    """Of head="queries": through how many of the last blocks they go. None: 3 of a ViT of a width
    of up to 768, 4 up to 1024, 5 above."""
    width: int = 256
    """Of head="deeplab": channels of the pyramid's branches, and of the decoder."""
    low_width: int = 48
    """Of head="deeplab": channels that the fine map has in the decoder: few, that the coarse one,
    which knows more, counts for more."""
    rates: tuple[int, ...] = (6, 12, 18)
    """Of head="deeplab": the dilations of the pyramid's convolutions, in cells of 16 pixels: those
    of a coarse map of another stride reach as far."""
    dropout: float = 0.1
    """Of head="linear", of whole channels before the norm; of head="deeplab", after the pyramid."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for what no head could be."""
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                raise unknown_name(field, str(getattr(self, field)), known)
        for field in ("queries", "width", "low_width"):
            if getattr(self, field) < 1:
                raise UsageError(f"{setting(field)} must be at least 1, not {getattr(self, field)}")
        if self.joint_blocks is not None and self.joint_blocks < 1:
            raise UsageError(f"{setting('joint_blocks')} must be at least 1: queries need a block")
        if not self.rates or min(self.rates) < 1:
            raise UsageError(
                f"{setting('rates')} are dilations from 1, 6 12 18 for instance, not {self.rates}"
            )
        if not 0 <= self.dropout < 1:
            raise UsageError(f"{setting('dropout')} must be in [0, 1), not {self.dropout}")


_CHOICES: dict[str, tuple[str, ...]] = {
    "head": get_args(HeadKind),
    "taps": get_args(Taps),
    "fine": get_args(Fine),
}


class Segmenter(nn.Module):
    """A backbone and its head. `build_segmenter` puts them together.

    `config` is the backbone's, `head_config` and `classes` what the head was built from, `stride`
    the pixels (vertical, horizontal) of the image per cell of its logits.
    """

    backbone: Any
    head: nn.Module
    stride: tuple[int, int]
    reads_maps: ClassVar[bool] = True
    """Whether the head reads maps of the backbone, and nothing else of it."""

    def __init__(self, backbone: Backbone, config: SegmentHeadConfig, classes: int) -> None:
        super().__init__()
        self.config = backbone.config
        self.head_config = config
        self.classes = classes
        self.backbone = backbone
        for name in backbone.pooling:
            # Processes that wait for each other's gradients would wait for these for ever.
            if (module := getattr(backbone, name)) is not None:
                module.requires_grad_(False)

    def forward(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Float[Tensor, "b _classes _h _w"]:
        """Logits at the head's own stride: `ceil(h / stride)` rows from the image's top on.

        Raises `UsageError` for an `extent`: images of different sizes are to be padded, with pixels
        that have no class.
        """
        refuse_extent(extent, "squash")
        return self.of_maps(self.maps(x), x)

    def maps(self, x: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        """What the head reads of the backbone, each `[b d h w]`.

        Raises `UsageError` for a head that goes through the backbone's blocks.
        """
        raise self._no_maps()

    def of_maps(
        self, maps: tuple[Tensor, ...], x: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b _classes _h _w"]:
        """Logits of the images `x`, of which the backbone's maps are known. Raises as `maps`."""
        raise self._no_maps()

    def _no_maps(self) -> UsageError:
        return UsageError(
            f"{setting('head', self.head_config.head)} reads no maps of a backbone: it goes "
            f"through its blocks. Use {setting('head', 'linear')} or deeplab"
        )

    def predictions(
        self, x: Float[Tensor, "b c h w"], draws: Float[Tensor, "n b q"] | None = None
    ) -> tuple[Prediction, ...]:
        """What a loss of sets is of: in training, before each of the queries' blocks and in the
        end; else in the end. `draws` as for `QueryHead.training_predictions`.

        Raises `UsageError` for a head without queries.
        """
        raise UsageError(
            f"{setting('head', self.head_config.head)} has no predictions besides its logits: "
            f"those are of {setting('head', 'queries')}"
        )

    def enter(self, done: float) -> None:
        """Before a step, of a run of which `done` (0 to 1) is over."""

    def block_names(self) -> list[str]:
        """The backbone's blocks by their names here, first to last."""
        return [f"backbone.{name}" for name in self.backbone.block_names()]

    def pixels(
        self, logits: Float[Tensor, "b _classes _h _w"], size: tuple[int, int]
    ) -> Float[Tensor, "b _classes h w"]:
        """Logits of each pixel of images of `size` (height, width), bilinearly."""
        return at_stride(logits, self.stride, (1, 1), size)


class LinearSegmenter(Segmenter):
    """With a `LinearHead`."""

    head: LinearHead

    def __init__(self, backbone: Backbone, config: SegmentHeadConfig, classes: int) -> None:
        super().__init__(backbone, config, classes)
        self.blocks: tuple[int, ...] = ()
        maps = shapes_of(type(backbone), backbone.config)
        widths, strides = [m.shape[1] for m in maps.maps], maps.strides
        first = -1
        if config.taps == "four":
            if isinstance(backbone, Tapped):
                self.blocks = quarters_of(backbone)
                widths, strides = [widths[-1]] * 4, (strides[-1],) * 4
            elif len(maps.maps) == 1:
                raise UsageError(
                    f"a {self.config.family} has one map: use {setting('taps', 'last')}"
                )
            first = -4
        self.strides = strides[first:]
        self.stride = self.strides[0]
        self.head = LinearHead(tuple(widths[first:]), classes, config.dropout)

    def maps(self, x: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        """The last map, or four."""
        if self.blocks:
            return self.backbone.taps(x, self.blocks)
        return self.backbone.features(x).maps[-len(self.strides) :]

    def of_maps(
        self, maps: tuple[Tensor, ...], x: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b _classes _h _w"]:
        """Logits at the stride of the last map, or of the finest of several."""
        size = (x.shape[2], x.shape[3])
        maps = tuple(
            at_stride(m, stride, self.stride, size)
            for m, stride in zip(maps, self.strides, strict=True)
        )
        return self.head(maps)


class DeepLabSegmenter(Segmenter):
    """With a `DeepLabHead`. Its fine map is the backbone's own of stride 4; of one without, what
    `fine` says.
    """

    head: DeepLabHead

    def __init__(self, backbone: Backbone, config: SegmentHeadConfig, classes: int) -> None:
        super().__init__(backbone, config, classes)
        self.stride = FINE
        found = shapes_of(type(backbone), backbone.config)
        high, coarse = found.maps[-1].shape[1], found.strides[-1]
        self.coarse = coarse
        self.early: tuple[int, ...] = ()
        self.own = -1
        fine: Deconv | Side | None = None
        if FINE in found.strides[:-1]:
            self.own = found.strides.index(FINE)
            low = found.maps[self.own].shape[1]
        elif config.fine == "deconv":
            fine = Deconv(high, coarse)
            low = fine.width
        elif config.fine == "side":
            fine = Side(self.config.channels)
            low = fine.width
        elif isinstance(backbone, Tapped):
            self.early, low = quarters_of(backbone)[:1], high
        else:
            raise UsageError(
                f"{setting('fine', 'tap')} reads a ViT's blocks, and this is a "
                f"{self.config.family}: use {setting('fine', 'deconv')} or side"
            )
        # Of cells that are no squares, the mean of their sides.
        rates = rates_at(config.rates, (coarse[0] * coarse[1]) ** 0.5)
        self.head = DeepLabHead(
            high, low, classes, config.width, config.low_width, rates, config.dropout, fine
        )

    def maps(self, x: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        """The coarse map, behind a fine one where the backbone has it."""
        if self.early:
            return self.backbone.taps(x, (*self.early, self.config.depth - 1))
        maps = self.backbone.features(x).maps
        return maps[-1:] if self.head.fine else (maps[self.own], maps[-1])

    def of_maps(
        self, maps: tuple[Tensor, ...], x: Float[Tensor, "b c h w"]
    ) -> Float[Tensor, "b _classes _h _w"]:
        """Logits of stride 4."""
        size, high = (x.shape[2], x.shape[3]), maps[-1]
        if self.early:
            low = at_stride(maps[0], self.coarse, FINE, size)
        elif self.head.fine is None:
            low = at_stride(maps[0], FINE, FINE, size)
        elif isinstance(self.head.fine, Deconv):
            low = self.head.fine(high, size)
        else:
            low = self.head.fine(x)
        return self.head(high, self.coarse, low, size)


class QuerySegmenter(Segmenter):
    """With a `QueryHead`: EoMT."""

    head: QueryHead
    reads_maps = False

    def __init__(self, backbone: Backbone, config: SegmentHeadConfig, classes: int) -> None:
        super().__init__(backbone, config, classes)
        shape = backbone.config
        if not isinstance(backbone, Tapped):
            raise UsageError(
                f"queries go through a ViT's blocks with its patches, and this is a "
                f"{shape.family}: use {setting('head', 'deeplab')} or linear"
            )
        if shape.merge or shape.scales != "one":
            raise UsageError(
                f"queries look at patches of one size, each with a token of its own: use "
                f"{setting('merge', 0)} and {setting('scales', 'one')}"
            )
        blocks = config.joint_blocks or usual_joint_blocks(shape.width, shape.depth)
        if blocks > shape.depth:
            raise UsageError(
                f"{setting('joint_blocks', blocks)}: the backbone has {shape.depth} blocks"
            )
        self.head = QueryHead(shape.width, shape.patch, classes, config.queries, blocks)
        self.stride = self.head.stride

    def forward(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Float[Tensor, "b _classes _h _w"]:
        """What speaks for each class, from 0: `vitrail.heads.queries.semantic` of all queries."""
        refuse_extent(extent, "squash")
        return semantic(self.head(self.backbone, x))

    def predictions(
        self, x: Float[Tensor, "b c h w"], draws: Float[Tensor, "n b q"] | None = None
    ) -> tuple[Prediction, ...]:
        """In training, what the queries say before each of their blocks and in the end; else in the
        end.
        """
        if self.training:
            return self.head.training_predictions(self.backbone, x, draws)
        return (self.head(self.backbone, x),)

    def enter(self, done: float) -> None:
        """Before a step: queries look through their masks ever less."""
        self.head.enter(done)


_SEGMENTERS: dict[HeadKind, type[Segmenter]] = {
    "linear": LinearSegmenter,
    "deeplab": DeepLabSegmenter,
    "queries": QuerySegmenter,
}


def build_segmenter(backbone: Backbone, config: SegmentHeadConfig, classes: int) -> Segmenter:
    """A segmenter of a backbone, which keeps its weights, and a new head for so many classes.

    What only the image's one vector goes through (`backbone.pooling`) does not learn any more.
    Raises `UsageError` for a backbone that the head cannot be put on.
    """
    if classes < 1:
        raise UsageError(f"{setting('classes')} must be at least 1, not {classes}")
    if backbone.config.classes:
        raise UsageError(
            f"a segmenter's backbone has no classifier of its own: build it with "
            f"{setting('classes', 0)}"
        )
    if backbone.config.family == "dynamicvit":
        raise UsageError(
            "a DynamicViT drops patches, and each pixel is to have a class: use the same shape as "
            "a ViT"
        )
    return _SEGMENTERS[config.head](backbone, config, classes)
