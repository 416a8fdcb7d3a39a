"""Training views and augmentation, driven by numbers keyed by (seed, epoch, sample index, view).

- `view_of`: one image to uint8 pixels of the training size; Pillow crops and scales in one call
- `Augment`: everything else, on whole batches of such pixels, on whatever device they lie

What happens to an image depends on its own index alone, whatever shares its batch. A task that
looks at each image several times (MoCo v3, DINO) numbers its views, and each draws anew.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int, Int64, UInt8
from PIL import Image
from torch import Tensor

from vitrail.data.keyed import uniform
from vitrail.data.views.ops import (
    GEOMETRIC,
    MAX_BLUR,
    PHOTOMETRIC,
    brightness,
    color,
    contrast,
    hue,
    warp,
)
from vitrail.data.views.policy import Draw, Plan, Policy, randaugment, three, trivial
from vitrail.data.views.preprocess import Preprocess
from vitrail.data.views.seen import Seen
from vitrail.errors import UsageError, setting, unknown_name


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What may happen to a training image; a value out of range is a `UsageError`.

    `AugmentConfig.off()` is the start for a list of one's own.
    """

    size: tuple[int, int] | None = None
    """(height, width) of one of a task's several views of an image; None: of training images."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Random resized crop (Inception, arXiv 1409.4842): the part of the image's area it shows."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Its width over its height; where images keep their shape (resize pad and native), as a part
    of the image's own. With (1, 1) and a scale of (1, 1): the evaluation view."""
    scale: tuple[float, float] | None = None
    """Instead of such a crop: the image covers the view, times a factor in this range, and is cut
    to it or lies in it with background around, as targets that lie in the image want it."""
    dominance: float = 1.0
    """With `scale`: the largest share of the pixels that one class should have; another window is
    drawn up to ten times (mmsegmentation has 0.75)."""
    shift: int = 0
    """Moves the image by up to so many pixels each way ("pad by 4 and crop" is 4)."""
    hflip: float = 0.5
    """The probability of a mirror image."""
    vflip: float = 0.0
    policy: Policy = "none"
    ops: int = 2
    """Operations an image, for randaugment."""
    magnitude: float = 9.0
    """Their strength out of 10, for randaugment."""
    jitter: float = 0.0
    """Brightness, contrast and saturation are each scaled by 1 - jitter to 1 + jitter."""
    saturation: float | None = None
    """Of jitter, where saturation has a range of its own; None: it has that of the others."""
    hue: float = 0.0
    """Of jitter: colours are turned by up to this part of the wheel, either way."""
    jitter_probability: float = 1.0
    """Of jitter: the share of images that get it, all of it at once."""
    grey: float = 0.0
    """The probability of an image without colours."""
    blur: float = 0.0
    """The probability of a Gaussian blur, of 0.1 to 2 pixels (SimCLR, arXiv 2002.05709). Of MoCo
    v3's two views the second has it a tenth as often."""
    solarize: float = 0.0
    """The probability that what is brighter than middle grey becomes its negative (BYOL, arXiv
    2006.07733). Of MoCo v3's two views only the second is."""
    erase: float = 0.0
    """The probability that a box of noise covers 2% to 33% of the image (arXiv 1708.04896)."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution (arXiv 1710.09412); 0 is none."""
    cutmix: float = 0.0
    """Alpha for cutmix (arXiv 1905.04899); with mixup as well, each has half of the pairs."""
    mosaic: float = 0.0
    """For boxes: the probability of a view of 2 x 2 images around a random centre (YOLOv4, arXiv
    2004.10934). Each covers its quadrant, times a factor of `scale`."""
    blend: float = 0.0
    """For boxes: the probability that another image is added, nearly half and half, and its boxes
    count as well: what detectors call mixup (YOLOX, arXiv 2107.08430)."""
    calm: float = 0.1
    """The share of the run, at its end, in which there is no mosaic and no blend (YOLOX)."""
    fill: int = 128
    """The grey level where a shift or a turn uncovers nothing."""

    def __post_init__(self) -> None:
        for field, most in (("crop_scale", 1.0), ("crop_ratio", 100.0)):
            bounds = getattr(self, field)
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= most:
                raise UsageError(
                    f"{setting(field)} {bounds}: give 0 < least <= greatest <= {most:g}"
                )
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 100:
            raise UsageError(f"{setting('scale')} {self.scale}: give 0 < least <= greatest <= 100")
        if self.policy not in get_args(Policy):
            raise unknown_name("augmentation policy", str(self.policy), get_args(Policy))
        for field, (least, most) in _RANGES.items():
            value = getattr(self, field)
            if value is None and field in _MAY_BE_NONE:
                continue
            if not least <= value <= most:
                raise UsageError(f"{setting(field)} must be {least:g} to {most:g}, not {value}")
            if field in _WHOLE and not isinstance(value, int):
                raise UsageError(f"{setting(field)} must be a whole number, not {value}")

    @classmethod
    def off(cls) -> "AugmentConfig":
        """Nothing at all: the evaluation view."""
        return cls(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0)

    @property
    def crops(self) -> bool:
        """Whether `view` differs from the evaluation view."""
        return self.scale is None and (self.crop_scale != (1, 1) or self.crop_ratio != (1, 1))

    @property
    def jitters(self) -> tuple[float, float, float, float]:
        """How far brightness, contrast, saturation and hue go, each way."""
        saturation = self.jitter if self.saturation is None else self.saturation
        return self.jitter, self.jitter, saturation, self.hue

    @property
    def mixes(self) -> bool:
        """Whether `mix` does anything."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def joins(self) -> bool:
        """Whether a view may show several images with their boxes."""
        return self.mosaic > 0 or self.blend > 0


_RANGES: dict[str, tuple[float, float]] = {
    "dominance": (0.1, 1),
    "shift": (0, 4096),
    "hflip": (0, 1),
    "vflip": (0, 1),
    "ops": (1, 16),
    "magnitude": (0, 10),
    "jitter": (0, 1),
    "saturation": (0, 1),
    "hue": (0, 0.5),
    "jitter_probability": (0, 1),
    "grey": (0, 1),
    "blur": (0, 1),
    "solarize": (0, 1),
    "erase": (0, 1),
    "mixup": (0, 100),
    "cutmix": (0, 100),
    "mosaic": (0, 1),
    "blend": (0, 1),
    "calm": (0, 1),
    "fill": (0, 255),
}
_WHOLE = ("shift", "ops", "fill")
_MAY_BE_NONE = ("saturation",)


def view_of(
    image: Image.Image,
    preprocess: Preprocess,
    config: AugmentConfig,
    *,
    seed: int,
    epoch: int,
    index: int,
    view: int = 0,
    draws: list[float] | None = None,
) -> tuple[UInt8[np.ndarray, "c h w"], Seen]:
    """One view of sample `index` in one epoch, a random resized crop or the evaluation view: its
    pixels, and how they lie in the image.

    The crop is cut between pixels, not at them, and scaled with antialiasing; size, its rule,
    interpolation and channels are `preprocess`'s. `draws` are those of `crop_draws`, where they are
    made of a whole batch at once. Raises as `Preprocess.convert` does.
    """
    if not config.crops:
        return preprocess.view(image), preprocess.seen(image.height, image.width)
    image = preprocess.convert(image)
    draws = draws or crop_draws(seed, epoch, np.array([index]), view)[0]
    own = 1.0 if preprocess.one_size else image.width / image.height
    ratios = config.crop_ratio[0] * own, config.crop_ratio[1] * own
    box = crop_box(image.width, image.height, config.crop_scale, ratios, draws)
    seen = preprocess.seen_part(box, image.height, image.width)
    return preprocess.view_part(image, box), seen


def purpose(of: str, view: int) -> str:
    """What the draws of one view are keyed by: those of the first are what they always were."""
    return f"{of} {view}" if view else of


CROP_TRIES = 10


def crop_draws(
    seed: int, epoch: int, indices: Int64[np.ndarray, " b"], view: int
) -> list[list[float]]:
    """What each image's crop is drawn by: numbers in [0, 1)."""
    return uniform(seed, epoch, indices, purpose("crop", view), 2 * CROP_TRIES + 2).tolist()


def crop_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratios: tuple[float, float],
    draws: list[float],
) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in the image, by Inception's rule.

    Area and ratio are drawn until the box fits, ten times at most; then it is the largest box of a
    ratio in the range. Its place is random.
    """
    narrow, wide = ratios
    for area, shape in zip(draws[2::2], draws[3::2], strict=True):
        surface = width * height * _between(scale, area)
        ratio = exp(_between((log(narrow), log(wide)), shape))
        w, h = sqrt(surface * ratio), sqrt(surface / ratio)
        if w <= width and h <= height:
            break
    else:
        w, h = min(width, height * wide), min(height, width / narrow)
    left, top = draws[0] * (width - w), draws[1] * (height - h)
    return left, top, min(left + w, width), min(top + h, height)


class Augment:
    """Augments batches of uint8 images of about `size` (height, width), by its config.

    In this order: shift, flips, the policy, colour jitter, grey, blur, solarising, erasing. Of a
    policy, the operations that change pixels come first, in the order drawn; then those that move
    them, as one map: an image is resampled once, and `fill` is what was asked for.

    MoCo v3 and DINO flip last. It is the same: what comes between takes pixels one by one, or alike
    on both sides. The four of the jitter always come in one order, which torchvision draws.

    >>> augment = Augment(AugmentConfig(policy="randaugment"), seed=0, size=(32, 32))
    >>> images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    >>> tuple(augment(images, np.arange(4), epoch=0).shape)
    (4, 3, 32, 32)
    """

    def __init__(
        self, config: AugmentConfig, seed: int, size: tuple[int, int], view: int = 0
    ) -> None:
        """`view`: which of an image's views, each with draws of its own."""
        if config.shift >= min(size):
            raise UsageError(
                f"shift {config.shift} would move images of {size[0]}x{size[1]} pixels out of "
                f"sight: give less than {min(size)}"
            )
        self.config = config
        self.seed = seed
        self.size = size
        self.view = view
        self._noise = _noise(seed, size) if config.erase else torch.empty(0)

    def __call__(
        self, images: UInt8[Tensor, "b c h w"], indices: Int[np.ndarray, " b"], epoch: int
    ) -> UInt8[Tensor, "b c h w"]:
        """`indices` are the samples' own, not places in the batch; `images` is left as it is."""
        assert len(images) == len(indices)
        config, size = self.config, (images.shape[2], images.shape[3])
        draw = self._draw(indices, epoch)
        if config.shift:
            reach = min(config.shift, min(size) - 1)  # of a long image something stays in sight
            images = _shift(images, draw("shift", 2), reach, config.fill)
        rows = list(images.unbind(0))
        for axis, name, probability in ((3, "hflip", config.hflip), (2, "vflip", config.vflip)):
            if probability:
                chosen = draw(name, 1)[:, 0] < probability
                _change(rows, chosen, torch.flip, (axis,))
        plan = self._plan(draw, size)
        if plan is not None:
            _recolour(rows, plan)
            _move(rows, plan, config.fill)
        if any(config.jitters):
            *levels, chance = draw("jitter", 5).T
            chosen = chance < config.jitter_probability
            _change(rows, chosen, _jitter, np.stack(levels, 1)[chosen], config.jitters)
        for name, probability, level in (
            ("grayscale", config.grey, (0.0, 0.0)),
            ("blur", config.blur, (0.1, MAX_BLUR)),
            ("solarize", config.solarize, (128.0, 128.0)),
        ):
            if probability:
                chance, strength = draw(name, 2).T
                chosen = chance < probability
                drawn = torch.from_numpy(level[0] + (level[1] - level[0]) * strength[chosen])
                _change(rows, chosen, PHOTOMETRIC[name], drawn.to(rows[0].device))
        images = torch.stack(rows)
        if config.erase:
            self._noise = self._noise.to(images.device)
            _erase(images, draw("erase", 7), config.erase, self._noise)
        return images

    def moves(
        self, indices: Int[np.ndarray, " b"], epoch: int, size: tuple[int, int]
    ) -> Float64[np.ndarray, "b 3 3"]:
        """Where a call takes the places (x, y, 1) of views of `size`, in pixels: what lies in the
        images moves with them.
        """
        config, draw = self.config, self._draw(indices, epoch)
        moves = np.tile(np.eye(3), (len(indices), 1, 1))
        if config.shift:
            reach = min(config.shift, min(size) - 1)
            moves[:, 1::-1, 2] = reach - (draw("shift", 2) * (2 * reach + 1)).astype(np.int64)
        for axis, name, probability in ((0, "hflip", config.hflip), (1, "vflip", config.vflip)):
            flip = np.eye(3)
            flip[axis, axis], flip[axis, 2] = -1, size[1 - axis]
            chosen = draw(name, 1)[:, 0] < probability
            moves[chosen] = flip @ moves[chosen]
        plan = self._plan(draw, size)
        return moves if plan is None else np.linalg.inv(_maps(plan, size)) @ moves

    def _draw(self, indices: Int[np.ndarray, " b"], epoch: int) -> Draw:
        def draw(of: str, n: int) -> Float[np.ndarray, "b n"]:
            return uniform(self.seed, epoch, indices, purpose(of, self.view), n)

        return draw

    def _plan(self, draw: Draw, size: tuple[int, int]) -> Plan | None:
        match self.config.policy:
            case "randaugment":
                return randaugment(draw, self.config.ops, self.config.magnitude)
            case "trivial":
                return trivial(draw, size)
            case "three":
                return three(draw)
        return None


def _change(
    rows: list[Tensor],
    chosen: Bool[np.ndarray, " b"],
    operation: Callable[..., Tensor],
    *arguments: object,
) -> None:
    """The chosen images are replaced by what the operation makes of them, as one batch."""
    if chosen.any():
        places = np.flatnonzero(chosen)
        changed = operation(torch.stack([rows[i] for i in places]), *arguments)
        for i, image in zip(places, changed, strict=True):
            rows[i] = image


def _shift(
    images: UInt8[Tensor, "b c h w"], draws: Float[np.ndarray, "b 2"], reach: int, fill: int
) -> UInt8[Tensor, "b c h w"]:
    h, w = images.shape[-2:]
    padded = F.pad(images, (reach,) * 4, value=fill)
    every_shift = padded.unfold(2, h, 1).unfold(3, w, 1)  # [b c shift shift h w], all one memory
    down, right = torch.from_numpy(draws * (2 * reach + 1)).long().to(images.device).T
    return every_shift[torch.arange(len(images), device=images.device), :, down, right]


def _recolour(rows: list[Tensor], plan: Plan) -> None:
    """What the plan says of the pixels' values."""
    for names, levels in zip(plan.names.T, plan.levels.T, strict=True):
        for name in PHOTOMETRIC.keys() & set(names.tolist()):
            chosen = names == name
            level = torch.from_numpy(levels[chosen]).to(rows[0].device, torch.float32)
            _change(rows, chosen, PHOTOMETRIC[name], level)


def _move(rows: list[Tensor], plan: Plan, fill: int) -> None:
    """What the plan says of the pixels' places."""
    maps = _maps(plan, (rows[0].shape[1], rows[0].shape[2]))
    moved = np.isin(plan.names, list(GEOMETRIC)).max(axis=1)
    _change(rows, moved, warp, maps[moved], fill)


def _maps(plan: Plan, size: tuple[int, int]) -> Float64[np.ndarray, "b 3 3"]:
    """From places in the new images to those in the old ones, as `warp` wants them."""
    maps = np.tile(np.eye(3), (len(plan.names), 1, 1))
    for names, levels in zip(plan.names.T, plan.levels.T, strict=True):
        for name in GEOMETRIC.keys() & set(names.tolist()):
            chosen = names == name
            maps[chosen] = maps[chosen] @ GEOMETRIC[name](levels[chosen], size)
    return maps


def _jitter(
    images: UInt8[Tensor, "b c h w"],
    draws: Float[np.ndarray, "b 4"],
    strengths: tuple[float, float, float, float],
) -> UInt8[Tensor, "b c h w"]:
    """Brightness, contrast, saturation and hue, always in this order; those of no strength stay."""
    operations = (brightness, contrast, color, hue)
    around = (1, 1, 1, 0)
    changes = [
        (operation, torch.from_numpy(middle + strength * (2 * drawn - 1)).to(images.device))
        for operation, middle, strength, drawn in zip(
            operations, around, strengths, draws.T, strict=True
        )
        if strength
    ]
    at_once = max(1, 2**20 // images[0].numel())  # what fits a processor's cache is twice as fast
    parts = []
    for start in range(0, len(images), at_once):
        part = images[start : start + at_once]
        for operation, levels in changes:
            part = operation(part, levels[start : start + at_once])
        parts.append(part)
    return torch.cat(parts)


_ERASED = (0.02, 1 / 3)
_ERASED_RATIO = (0.3, 1 / 0.3)


def _erase(
    images: UInt8[Tensor, "b c h w"],
    draws: Float[np.ndarray, "b 7"],
    probability: float,
    noise: UInt8[Tensor, "3 _h _w"],
) -> None:
    """In place, a box of random size, ratio and place; the noise in it starts at a random place."""
    c, height, width = images.shape[1:]
    chosen = np.flatnonzero(draws[:, 0] < probability)
    for i, (area, shape, *places) in zip(chosen, draws[chosen, 1:].tolist(), strict=True):
        surface = height * width * _between(_ERASED, area)
        ratio = exp(_between((log(_ERASED_RATIO[0]), log(_ERASED_RATIO[1])), shape))
        h, w = min(height, round(sqrt(surface * ratio))), min(width, round(sqrt(surface / ratio)))
        spans = (height - h + 1, width - w + 1, height, width)
        top, left, down, right = (int(place * n) for place, n in zip(places, spans, strict=True))
        # A long image may reach beyond the sheet, which then goes on from its start.
        rows, columns = (
            (start + torch.arange(n, device=images.device)) % side
            for start, n, side in zip((down, right), (h, w), noise.shape[1:], strict=True)
        )
        box = noise[:c, rows[:, None], columns]
        images[i, :, top : top + h, left : left + w] = box


def _between(bounds: tuple[float, float], part: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * part


def _noise(seed: int, size: tuple[int, int]) -> UInt8[Tensor, "3 _h _w"]:
    """A sheet of noise of twice the size: each box takes its own from another place of it."""
    h, w = size
    sheet = uniform(seed, 0, np.arange(3 * 2 * h), "noise", 2 * w)
    return torch.from_numpy((sheet * 256).astype(np.uint8)).view(3, 2 * h, 2 * w)
