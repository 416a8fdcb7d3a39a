"""A backbone with a head for boxes.

| `head`    | what it is                                         | source                        |
|-----------|----------------------------------------------------|-------------------------------|
| `dense`   | maps of several strides, boxes from each cell      | ViTDet 2203.16527, FCOS       |

Letters: b batch, c channels, h w pixels.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.errors import UsageError, setting, unknown_name
from vitrail.heads.backbone import Backbone, shapes_of
from vitrail.heads.dense import Dense, DenseHead
from vitrail.heads.pyramid import FeaturePyramid, SimplePyramid

BoxHeadKind = Literal["dense"]
Assign = Literal["centre", "aligned"]

_FINEST = 8
"""Pixels: maps of smaller strides cost much, and small objects are found at this one."""


@dataclass(frozen=True, kw_only=True)
class DetectHeadConfig:
    """What is put on a backbone that it may say where things are."""

    head: BoxHeadKind = "dense"
    width: int = 256
    """Channels of the pyramid's maps and of the head."""
    convs: int = 4
    """Convolutions in each of the two towers."""
    levels: int = 5
    """Maps, each of half the size of the one before."""
    assign: Assign = "centre"
    """Which cells answer for an object: those near its centre, on the map of its size (FCOS with
    centre sampling), or those that already say best what and where it is (task-aligned, TOOD)."""

    def __post_init__(self) -> None:
        """Raise `UsageError` for what no head could be."""
        for field, known in (("head", get_args(BoxHeadKind)), ("assign", get_args(Assign))):
            if getattr(self, field) not in known:
                raise unknown_name(field, str(getattr(self, field)), known)
        for field, least in (("width", 1), ("convs", 0), ("levels", 1)):
            if getattr(self, field) < least:
                raise UsageError(
                    f"{setting(field)} must be at least {least}, not {getattr(self, field)}"
                )
        if self.levels > 8:
            raise UsageError(f"{setting('levels')} must be at most 8, not {self.levels}")


class Detector(nn.Module):
    """A backbone, a pyramid of its maps, and a head. `build_detector` puts them together.

    `config` is the backbone's, `head_config` and `classes` what the rest was built from.
    """

    def __init__(self, backbone: Backbone, config: DetectHeadConfig, classes: int) -> None:
        super().__init__()
        self.config = backbone.config
        self.head_config = config
        self.classes = classes
        self.backbone: Any = backbone
        for name in backbone.pooling:
            # Processes that wait for each other's gradients would wait for these for ever.
            if (module := getattr(backbone, name)) is not None:
                module.requires_grad_(False)
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
        if extent is not None:
            raise UsageError(
                f"images of different sizes in one batch ({setting('data.resize')} native or pad) "
                f"have no maps of one size for a head: use {setting('data.resize', 'letterbox')}"
            )
        maps = self.backbone.features(x).maps
        if isinstance(self.neck, SimplePyramid):
            return self.head(self.neck(maps[-1]), self.neck.strides)
        size = x.shape[2], x.shape[3]
        return self.head(self.neck(maps[self.first :], size), self.neck.strides)

    def block_names(self) -> list[str]:
        """The backbone's blocks by their names here, first to last."""
        return [f"backbone.{name}" for name in self.backbone.block_names()]


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
    return Detector(backbone, config, classes)
