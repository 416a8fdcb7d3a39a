"""From marks to `Boxes`: which frame boxes are drawn in, how they lie in the upright image, and
what of them cannot be.

An image may lie in its file on its side, with a word of EXIF's that it be turned. Somebody drew
boxes on what is shown, or on what is stored: where the annotation says the image's size, that
tells, or else boxes that fit only one of both. What neither tells (an image turned upside down, a
square) is as the others of the data set are, or else as it is shown.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8

from vitrail.data.names import printable, shortened
from vitrail.data.pixels.decode import MAX_SIDE
from vitrail.data.sources.image_headers import Headers, read_headers
from vitrail.data.sources.marks import Marked, Marks
from vitrail.data.targets.boxes import ANY, Boxes, Said, Sizes

MISFITS = "images of another shape than their boxes' file says"
_LEAST = 1.0
"""Pixels of a box that is cut at the image's edge."""
_SLACK = 1.0
"""Pixels by which sizes differ, and boxes reach beyond, for rounding alone."""


class Framed(NamedTuple):
    """What `framed` makes of marks; one row an image, ordered by part and path."""

    paths: list[str]
    part: UInt8[np.ndarray, " n"]
    boxes: Boxes
    told: int
    """Boxes that the files told of these images."""
    ignored: int
    """Of all boxes, those that do not count."""
    cut: int
    """Boxes that reach beyond their image, and are cut there."""
    notes: tuple[str, ...]


class _Drawn(NamedTuple):
    """All boxes, one after another."""

    corners: Float64[np.ndarray, "k 4"]
    labels: Int64[np.ndarray, " k"]
    ignored: Bool[np.ndarray, " k"]
    image: Int64[np.ndarray, " k"]

    def kept(self, which: Bool[np.ndarray, " k"]) -> "_Drawn":
        return _Drawn(*(part[which] for part in self))


def framed(root: str, marks: Marks) -> Framed:
    """Hold `marks` against the images; what cannot be is added to `marks.left`."""
    images = sorted(marks.images.items(), key=lambda item: (item[1].part, item[0]))
    paths = [path for path, _ in images]
    headers = read_headers(root, paths)
    stated = np.array([one.size or (0, 0) for _, one in images], np.int64).reshape(-1, 2)
    drawn = _gathered(marks, [one for _, one in images])
    notes: list[str] = []
    frame, turned, fits = _frames(headers, stated, drawn, paths, notes)
    unread = headers.stored[:, 0] == 0
    marks.left.add(
        "boxes of images that cannot be read",
        "nobody knows where they lie",
        *(paths[i] for i in drawn.image[unread[drawn.image]]),
    )
    marks.left.add(
        MISFITS,
        "their boxes cannot be told; is the image another one, or was it cut?",
        *_some(paths, ~fits & ~unread),
    )
    names, place = marks.classes()
    told = int((fits | unread)[drawn.image].sum())
    drawn = drawn.kept((fits & ~unread)[drawn.image])
    drawn, cut = _cleaned(marks, drawn, frame, paths)
    height, width = frame[drawn.image].T
    corners = drawn.corners / np.stack([width, height, width, height], axis=1)
    which = turned[drawn.image]
    corners[which] = _upright(corners[which], headers.orientation[drawn.image][which])
    labels = np.array([*place, ANY], np.int64)[np.where(drawn.labels < 0, len(place), drawn.labels)]
    keep = np.flatnonzero(fits | unread)
    counts = np.bincount(drawn.image, minlength=len(paths))[keep]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    said = Said(corners.clip(0, 1), labels, drawn.ignored)
    boxes = Boxes(names, said, starts, Sizes(headers.shown[keep]))
    part = np.array([one.part for _, one in images], np.uint8)[keep]
    if cut:
        notes.append(
            f"boxes that reach beyond their image by more than a pixel, and are cut there: "
            f"{cut:,} of {told:,} ({cut / told:.2%})"
        )
    ignored = int(drawn.ignored.sum())
    return Framed([paths[i] for i in keep], part, boxes, told, ignored, cut, tuple(notes))


def _some(paths: list[str], which: Bool[np.ndarray, " n"]) -> list[str]:
    return [paths[i] for i in np.flatnonzero(which)]


def _gathered(marks: Marks, images: list[Marked]) -> _Drawn:
    counts = [len(one.labels) for one in images]
    corners, labels, ignored = (
        np.concatenate([np.zeros(0, kind), *(np.asarray(getattr(one, name)) for one in images)])
        for name, kind in (("corners", np.float64), ("labels", np.int64), ("ignored", np.int8))
    )
    return _Drawn(
        corners.reshape(-1, 4),
        labels.astype(np.int64),
        ignored.astype(bool),
        np.repeat(np.arange(len(images)), counts),
    )


def _frames(
    headers: Headers,
    stated: Int64[np.ndarray, "n 2"],
    drawn: _Drawn,
    paths: list[str],
    notes: list[str],
) -> tuple[Int64[np.ndarray, "n 2"], Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """(height, width) of what boxes are drawn on; whether that is the image as it is stored, which
    is then turned; and whether they can be the image's at all.
    """
    stored, shown, lying = headers.stored, headers.shown, headers.lying
    far = _reach(drawn, len(paths))
    known = (stated[:, 0] > 0) & (stored[:, 0] > 0)  # 0 is of what nobody can read
    square = np.abs(stored[:, 0] - stored[:, 1]) <= _SLACK
    tells = lying & ~square
    upright = known & _near(stated, shown)
    raw = known & tells & ~upright & _near(stated, stored)
    # A copy of another size: boxes lie in it as they do in the image.
    scaled = known & ~upright & ~raw & _alike(stated, shown)
    scaled_raw = known & tells & ~upright & ~raw & ~scaled & _alike(stated, stored)
    # Height and width exchanged in the annotation alone, where boxes fit the image as it is.
    settled = upright | raw | scaled | scaled_raw
    swapped = known & ~settled & _near(stated[:, ::-1], shown) & _within(far, shown)
    raw |= ~known & tells & ~_within(far, shown) & _within(far, stored)
    straight = tells & (upright | scaled | (~known & _within(far, shown) & ~_within(far, stored)))
    by_all = bool((raw | scaled_raw).any()) and not straight.any()
    unsure = (headers.orientation > 1) & ~(raw | scaled_raw | straight | swapped)
    unsure &= ~known | upright | scaled
    turned = raw | scaled_raw | (unsure & by_all)
    frame = np.where(turned[:, None], stored, shown)
    frame = np.where((scaled | scaled_raw)[:, None], stated, frame)
    for which, sentence in (
        (turned, "EXIF turns images whose boxes are drawn on what is stored: turned with them"),
        (
            unsure & ~turned,
            "EXIF turns images, and no size tells what boxes are drawn on: taken "
            "is the image as it is shown",
        ),
        (scaled | scaled_raw, "images of another size than their boxes' file says: scaled"),
        (swapped, "height and width are exchanged in the boxes' file, and not in the image"),
    ):
        if which.any():
            called = shortened(map(printable, _some(paths, which)), 3)
            notes.append(f"{sentence}: {int(which.sum()):,} of {len(paths):,}: {called}")
    return frame, turned, ~known | settled | swapped


def _near(a: Int64[np.ndarray, "n 2"], b: Int64[np.ndarray, "n 2"]) -> Bool[np.ndarray, " n"]:
    return np.asarray((np.abs(a - b) <= _SLACK).all(axis=1))


def _alike(a: Int64[np.ndarray, "n 2"], b: Int64[np.ndarray, "n 2"]) -> Bool[np.ndarray, " n"]:
    """Whether sides have one ratio, but for the rounding of the smaller."""
    apart = np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])
    return (a > 0).all(axis=1) & (apart <= np.maximum(a, b).max(axis=1))


def _reach(drawn: _Drawn, n: int) -> Float64[np.ndarray, "n 2"]:
    """How far (down, right) the boxes of each image reach."""
    far = np.zeros((n, 2))
    corners = np.nan_to_num(drawn.corners, nan=0, posinf=0, neginf=0)
    np.maximum.at(far[:, 0], drawn.image, corners[:, 3])
    np.maximum.at(far[:, 1], drawn.image, corners[:, 2])
    return far


def _within(
    far: Float64[np.ndarray, "n 2"], size: Int64[np.ndarray, "n 2"]
) -> Bool[np.ndarray, " n"]:
    return np.asarray((far <= size + _SLACK).all(axis=1))


def _cleaned(
    marks: Marks, drawn: _Drawn, frame: Int64[np.ndarray, "n 2"], paths: list[str]
) -> tuple[_Drawn, int]:
    """What can be learned from, cut to its image; and how many were cut."""

    def without(drawn: _Drawn, which: Bool[np.ndarray, " k"], kind: str, why: str) -> _Drawn:
        if which.any():
            marks.left.add(kind, why, *(paths[i] for i in drawn.image[which]))
            return drawn.kept(~which)
        return drawn

    finite = np.isfinite(drawn.corners).all(axis=1)
    drawn = without(drawn, ~finite, "boxes with corners that are no numbers", "nothing tells more")
    if marks.unit:
        height, width = frame[drawn.image].T
        sides = np.stack([width, height, width, height], axis=1)
        drawn = drawn._replace(corners=drawn.corners * sides)
    far = (np.abs(drawn.corners) > 4 * MAX_SIDE).any(axis=1)
    drawn = without(drawn, far, "boxes far beyond any image", "are they of pixels?")
    sides = drawn.corners[:, 2:] - drawn.corners[:, :2]
    none = (sides <= 0).any(axis=1)
    why = "right must lie beyond left, and bottom below top"
    drawn = without(drawn, none, "boxes without an area", why)
    limit = frame[drawn.image][:, [1, 0, 1, 0]]
    inside = drawn.corners.clip(0, limit)
    beyond = np.abs(inside - drawn.corners)
    left = inside[:, 2:] - inside[:, :2]
    out = (left <= 0).any(axis=1) | ((left < _LEAST) & (beyond[:, :2] + beyond[:, 2:] > 0)).any(1)
    cut = (beyond > _SLACK).any(axis=1) & ~out
    drawn = drawn._replace(corners=inside)
    drawn = without(drawn, out, "boxes outside their image", "less than a pixel lies in it")
    drawn = without(drawn, _again(drawn), "boxes that are told twice", "the first one is taken")
    return drawn, int(cut.sum())


def _again(drawn: _Drawn) -> Bool[np.ndarray, " k"]:
    """Which have the corners and the class of one before them in their image."""
    keys = (*drawn.corners.T, drawn.labels, drawn.image)
    order = np.lexsort(keys)
    same = np.zeros(len(order), bool)
    if len(order) > 1:
        alike = [key[order][1:] == key[order][:-1] for key in keys]
        same[order[1:]] = np.logical_and.reduce(alike)
    return same


def _upright(
    boxes: Float64[np.ndarray, "k 4"], orientation: Int64[np.ndarray, " k"]
) -> Float64[np.ndarray, "k 4"]:
    """Boxes in the unit square of an image as it is stored, in that of it upright."""
    x, y = boxes[:, [0, 2]], boxes[:, [1, 3]]
    how = orientation[:, None]
    across, down = np.where(how >= 5, y, x), np.where(how >= 5, x, y)
    across = np.where(np.isin(how, (2, 3, 6, 7)), 1 - across, across)
    down = np.where(np.isin(how, (3, 4, 7, 8)), 1 - down, down)
    return np.stack([across.min(1), down.min(1), across.max(1), down.max(1)], axis=1)
