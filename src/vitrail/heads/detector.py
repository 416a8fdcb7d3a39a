"""A backbone with a head for boxes.

| `head`    | what it is                                         | source                        |
|-----------|----------------------------------------------------|-------------------------------|
| `dense`   | maps of several strides, boxes from each cell      | ViTDet 2203.16527, FCOS       |
| `queries` | queries that look at a few points around their box | RF-DETR 2511.09554            |

Letters: b batch, c channels, h w pixels.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import UsageError, setting, unknown_name
from vitrail.heads import deformable, dense
from vitrail.heads.backbone import Backbone, Tapped, quarters, refuse_extent, shapes_of
from vitrail.heads.deformable import BoxPrediction, QueryBoxes, QueryBoxesConfig
from vitrail.heads.dense import Dense, DenseHead
from vitrail.heads.pyramid import FeaturePyramid, SimplePyramid
from vitrail.nn.boxes import Candidates

BoxHeadKind = Literal["dense", "queries"]
Assign = Literal["centre", "aligned"]

_FINEST = 8
"""Pixels: maps of smaller strides cost much, and small objects are found at this one."""


@dataclass(frozen=True, kw_only=True)
class DetectHeadConfig:
    """What is put on a backbone that it may say where things are."""

    head: BoxHeadKind = "dense"
    """`queries` want a detector's weights, or many images and epochs."""
    width: int = 256
    """Channels of the pyramid's maps and of the head."""
    convs: int = 4
    """Convolutions in each of the two towers."""
    levels: int = 5
    """Maps, each of half the size of the one before."""
    assign: Assign = "aligned"
    """Which cells answer for an object: those that already say best what and where it is
    (task-aligned, TOOD), or those near its centre, on the map of its size (FCOS with centre
    sampling). The first learned more in as long here (benchmarks/results/detect.md)."""
    query: QueryBoxesConfig = field(default_factory=QueryBoxesConfig)
    """Of head="queries", of which the fields above are not."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for what no head could be."""
        for name, known in (("head", get_args(BoxHeadKind)), ("assign", get_args(Assign))):
            if getattr(self, name) not in known:
                raise unknown_name(name, str(getattr(self, name)), known)
        for name, (least, most) in _RANGES.items():
            if not least <= getattr(self, name) <= most:
                raise UsageError(
                    f"{setting(name)} must be {least} to {most:,}, not {getattr(self, name)}"
                )


_RANGES = {"width": (1, 8192), "convs": (0, 64), "levels": (1, 8)}
"""Beyond that a config is damaged or hostile."""


class Detector(nn.Module, ABC):
    """A backbone and its head. `build_detector` puts them together.

    `config` is the backbone's, `head_config` and `classes` what the rest was built from.
    """

    backbone: Any
    head: nn.Module
    doubles: ClassVar[bool]
    """Whether several candidates may be one object's."""

    def __init__(self, backbone: Backbone, config: DetectHeadConfig, classes: int) -> None:
        super().__init__()
        self.config = backbone.config
        self.head_config = config
        self.classes = classes
        self.backbone = backbone
        for name in backbone.pooling:
            # Processes that wait for each other's gradients would wait for these for ever.
            if (module := getattr(backbone, name)) is not None:
                module.requires_grad_(False)

    @abstractmethod
    def candidates(self, x: Float[Tensor, "b c h w"], most: int) -> Candidates:
        """What may be an object in views of one size, of which `most` an image are wanted."""

    def beside(self) -> dict[str, Tensor]:
        """The state dict of what lies beside the backbone."""
        return {k: t for k, t in self.state_dict().items() if not k.startswith("backbone.")}

    def block_names(self) -> list[str]:
        """The backbone's blocks by their names here, first to last."""
        return [f"backbone.{name}" for name in self.backbone.block_names()]


class DenseDetector(Detector):
    """With a pyramid of the backbone's maps, and a `DenseHead`."""

    head: DenseHead
    doubles = True

    def __init__(self, backbone: Backbone, config: DetectHeadConfig, classes: int) -> None:
        super().__init__(backbone, config, classes)
        found = shapes_of(type(backbone), backbone.config)
        widths = [each.shape[1] for each in found.maps]
        self.neck: SimplePyramid | FeaturePyramid
        self.first = next(
            (i for i, stride in enumerate(found.strides) if max(stride) >= _FINEST),
            len(widths) - 1,
        )
        if len(widths) - self.first == 1:
            self.neck = SimplePyramid(widths[-1], found.strides[-1], config.width, config.levels)
        else:
            if (least := len(widths) - self.first) > config.levels:
                raise UsageError(
                    f"{setting('levels', config.levels)}: the backbone has {least} maps of its own "
                    f"that a detector reads: give {least} or more"
                )
            own = slice(self.first, None)
            self.neck = FeaturePyramid(widths[own], found.strides[own], config.width, config.levels)
        self.head = DenseHead(
            config.width,
            classes,
            len(self.neck.strides),
            config.convs,
            centred=config.assign == "centre",
        )

    def forward(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> Dense:
        """What each cell of each map says of images of one size.

        Raises `UsageError` for an `extent`: images of different sizes have no maps of one size.
        """
        refuse_extent(extent, "letterbox")
        maps = self.backbone.features(x).maps
        if isinstance(self.neck, SimplePyramid):
            return self.head(self.neck(maps[-1]), self.neck.strides)
        size = x.shape[2], x.shape[3]
        return self.head(self.neck(maps[self.first :], size), self.neck.strides)

    def candidates(self, x: Float[Tensor, "b c h w"], most: int) -> Candidates:
        """See `vitrail.heads.dense.decode`."""
        return dense.decode(self(x), (x.shape[2], x.shape[3]), most)


class QueryDetector(Detector):
    """With a `QueryBoxes`: of a ViT it reads several blocks, of another family the last map."""

    head: QueryBoxes
    doubles = False

    def __init__(self, backbone: Backbone, config: DetectHeadConfig, classes: int) -> None:
        super().__init__(backbone, config, classes)
        found = shapes_of(type(backbone), backbone.config)
        self.stride = found.strides[-1]
        self.blocks: tuple[int, ...] = ()
        if isinstance(backbone, Tapped):
            depth = backbone.config.depth
            usual = quarters(depth) if depth >= 4 else (depth - 1,)
            self.blocks = config.query.taps or usual
            if max(self.blocks) >= depth:
                raise UsageError(
                    f"{setting('query.taps', self.blocks)}: the backbone has {depth} blocks, "
                    f"counted from 0"
                )
        elif config.query.taps:
            raise UsageError(f"{setting('query.taps')} are of a ViT's blocks: leave them out")
        if self.blocks:
            for name in self.block_names()[max(self.blocks) + 1 :]:  # they are not computed
                self.get_submodule(name).requires_grad_(False)
        widths = [found.maps[-1].shape[1]] * max(1, len(self.blocks))
        self.head = QueryBoxes(widths, classes, config.query)

    def forward(
        self, x: Float[Tensor, "b c h w"], extent: Int[Tensor, "b 2"] | None = None
    ) -> BoxPrediction:
        """What the queries say in the end. Raises `UsageError` for an `extent`, as above."""
        refuse_extent(extent, "letterbox")
        return self.head(self._maps(x))

    def predictions(self, x: Float[Tensor, "b c h w"]) -> tuple[BoxPrediction, ...]:
        """What a loss is of: see `QueryBoxes.predictions`."""
        return self.head.predictions(self._maps(x))

    def covered(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) in pixels of what the maps of views of `size` cover: whole cells."""
        height, width = (-(-n // s) * s for n, s in zip(size, self.stride, strict=True))
        return height, width

    def candidates(self, x: Float[Tensor, "b c h w"], most: int) -> Candidates:
        """See `vitrail.heads.deformable.decode`."""
        return deformable.decode(self(x), self.covered((x.shape[2], x.shape[3])), most)

    def _maps(self, x: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        if self.blocks:
            return self.backbone.taps(x, self.blocks)
        return self.backbone.features(x).maps[-1:]


def build_detector(backbone: Backbone, config: DetectHeadConfig, classes: int) -> Detector:
    """A detector of a backbone, which keeps its weights, and a new head for so many classes.

    What only the image's one vector goes through (`backbone.pooling`) does not learn any more.
    Raises `UsageError` for a backbone that the head cannot be put on.
    """
    if classes < 1:
        raise UsageError(f"{setting('classes')} must be at least 1, not {classes}")
    if backbone.config.classes:
        raise UsageError(
            f"a detector's backbone has no classifier of its own: build it with "
            f"{setting('classes', 0)}"
        )
    if backbone.config.family == "dynamicvit":
        raise UsageError(
            "a DynamicViT drops patches, and any of them may show an object: use the same shape "
            "as a ViT"
        )
    return _DETECTORS[config.head](backbone, config, classes)


_DETECTORS: dict[BoxHeadKind, type[Detector]] = {"dense": DenseDetector, "queries": QueryDetector}
