"""Views of images with boxes: what a box says is where the object is, whatever was done to it."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.test_scaled import Blocks
from train.striped import pictures
from vitrail.data.batches.batch import Batch
from vitrail.data.batches.loader import Reading, TrainLoader
from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.targets import Boxes, Said
from vitrail.data.views import mosaic as module
from vitrail.data.views.augment import Augment, AugmentConfig, view_of
from vitrail.data.views.mosaic import blend, mosaic
from vitrail.data.views.preprocess import Preprocess, Resize
from vitrail.data.views.scaled import window
from vitrail.data.views.seen import Seen
from vitrail.errors import DataError, UsageError
from vitrail.training.grow import drawn_size, resized

OFF = AugmentConfig.off()
NAMES = ("red", "green", "blue")
VIEW = (96, 128)
BLACK = Preprocess(
    size=VIEW, resize="squash", interpolation="bilinear", background=0, mean=(0.0,) * 3,
    std=(1.0,) * 3,
)  # fmt: skip
STRONG = replace(OFF, scale=(0.6, 1.6), hflip=0.5, mosaic=0.6, blend=0.5)


class Rectangles:
    """Black images of several sizes, each with a rectangle of one colour or two."""

    def __init__(self, n: int = 12, sides: tuple[int, int] = (80, 400)) -> None:
        rng = np.random.default_rng(1)
        self.sizes = [(int(h), int(w)) for h, w in rng.integers(*sides, (n, 2))]
        self.boxes, self.unreadable, self.foreign = [], set[int](), set[int]()
        for i, (h, w) in enumerate(self.sizes):
            low, high = rng.uniform(0.05, 0.45, (1 + i % 2, 2)), rng.uniform(0.55, 0.95, (2, 2))
            corners = np.hstack((low, high[: len(low)])) * [w, h, w, h]
            labels = (i + np.arange(len(low))) % 3
            self.boxes.append(Said(corners.round(), labels, np.zeros(len(low), bool)))
        said = (
            one._replace(corners=one.corners / [w, h, w, h])
            for one, (h, w) in zip(self.boxes, self.sizes, strict=True)
        )
        self.targets = Boxes.listed(NAMES, said, self.frame)

    def __len__(self) -> int:
        return len(self.sizes)

    def key(self, i: int) -> str:
        return str(i)

    def stamp(self, i: int) -> str:
        return str(i)

    def frame(self, i: int) -> tuple[int, int]:
        if i in self.foreign:
            raise UnreadableImage("its boxes are of an image of another size")
        return self.sizes[i]

    def load(self, i: int) -> Image.Image:
        if i in self.unreadable:
            raise UnreadableImage("it is damaged")
        pixels = np.zeros((*self.sizes[i], 3), np.uint8)
        for (left, top, right, bottom), label in zip(
            self.boxes[i].corners.astype(int), self.boxes[i].labels, strict=True
        ):
            pixels[top:bottom, left:right, label] = 255
        return Image.fromarray(pixels)


def loader(config: AugmentConfig, source: Any = None, **options: Any) -> TrainLoader:
    options = {"batch_size": 6, "seed": 3, "workers": 1, **options}
    preprocess = options.pop("preprocess", BLACK)
    return TrainLoader(source or Rectangles(), preprocess, config, **options)


def found(batch: Batch, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one image its boxes, labels, and which are ignored; without the padding."""
    labels = batch.targets["labels"][i].numpy()
    real = labels >= 0
    return (
        batch.targets["boxes"][i].numpy()[real],
        labels[real],
        batch.targets["ignored"][i].numpy()[real] > 0,
    )


def filled(boxes: np.ndarray, size: tuple[int, int], grown: float) -> np.ndarray:
    """Which pixels lie in one of the boxes, each of them grown by so many pixels."""
    rows, columns = (np.arange(n) + 0.5 for n in size)
    inside = np.zeros(size, bool)
    for left, top, right, bottom in boxes + np.array([-grown, -grown, grown, grown]):
        tall, wide = (rows > top) & (rows < bottom), (columns > left) & (columns < right)
        inside |= tall[:, None] & wide
    return inside


PLAIN: list[dict[str, Any]] = [
    {},
    {"hflip": 1.0, "vflip": 0.5, "shift": 9, "fill": 0},
    {"crop_scale": (0.3, 1.0), "crop_ratio": (0.75, 1.33), "hflip": 0.5},
    {"scale": (0.4, 2.0)},
    {"scale": (0.4, 2.0), "hflip": 0.5, "vflip": 0.5, "shift": 5, "fill": 0},
    {"mosaic": 1.0},
    {"mosaic": 1.0, "scale": (0.5, 1.5), "hflip": 0.5, "shift": 3, "fill": 0},
    {"blend": 1.0, "crop_scale": (0.5, 1.0)},
    {"mosaic": 0.5, "blend": 0.5, "scale": (0.4, 2.0), "hflip": 0.5},
]
RULES = [rule for rule in get_args(Resize) if rule not in ("short", "tiles")]


@pytest.mark.parametrize("changes", PLAIN)
@pytest.mark.parametrize("resize", RULES)
def test_each_object_is_where_its_box_is_and_nowhere_else(changes, resize) -> None:
    config, boxes = AugmentConfig(**{**OFF.__dict__, **changes}), 0
    preprocess = replace(BLACK, resize=resize, patch=(8, 8))
    for batch in loader(config, preprocess=preprocess).epoch(0):
        for i, image in enumerate(batch.images.numpy()):
            places, labels, ignored = found(batch, i)
            for k, channel in enumerate(image):
                own = places[labels == k]
                # A quarter of the light: of a blend each image has a third at the least.
                assert not (channel > 0.25)[~filled(own, channel.shape, 3.0)].any()
                sure = filled(own[~ignored[labels == k]], channel.shape, -3.0)
                assert (channel[sure] > 0.25).all()
                boxes += int((~ignored[labels == k]).sum())
    assert boxes >= 12


@pytest.mark.parametrize("policy", ["randaugment", "trivial"])
def test_a_turned_box_is_the_one_around_it(policy) -> None:
    """Photometric operations may take the colour away: what is seen of it lies in the box all the
    same, and fills it where it is seen well.
    """
    config = replace(OFF, policy=policy, scale=(0.5, 1.0), fill=0)
    tight = tried = 0
    for epoch in range(6):
        for batch in loader(config).epoch(epoch):
            for i, image in enumerate(batch.images.numpy()):
                places, labels, _ = found(batch, i)
                if len(places) != 1 or image.max(axis=(1, 2)).min() > 0.05:
                    continue  # other colours: black was made another
                rows, columns = np.nonzero(image[labels[0]] > 0.3)
                if len(rows) == 0:
                    continue
                seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                outside = np.maximum(places[0, :2] - seen[:2], seen[2:] - places[0, 2:])
                assert (outside < 2).all()
                tight += bool((np.abs(seen - places[0]) < 2.5).all())
                tried += 1
    assert tried > 15 and tight > 0.6 * tried  # corners that were turned out of the view are lost


# There and back

SIDES = st.integers(16, 2000)
UNIT = st.floats(0, 1, exclude_max=True)
INSIDE = st.tuples(*[st.floats(0.02, 0.48)] * 2, *[st.floats(0.52, 0.98)] * 2)


def one_box(size: tuple[int, int], corners: Sequence[float]) -> Boxes:
    said = Said(np.array([corners]), np.array([0]), np.array([False]))
    return Boxes.listed(("thing",), [said], lambda i: size)


def check_back(target, seen: Seen, size: tuple[int, int], corners: Sequence[float]) -> bool:
    """What is said of the one box in a view leads back to it; False: it is not wholly visible."""
    ends = seen.there(np.array(corners).reshape(2, 2))
    (left, top), (right, bottom) = ends.min(axis=0), ends.max(axis=0)
    cut = np.array(seen.part)
    if (corners[:2] < cut[:2]).any() or (corners[2:] > cut[2:]).any():
        return False
    if min(left, top) < 0 or right > seen.size[1] or bottom > seen.size[0]:
        return False
    back = np.sort(seen.back(target["boxes"].astype(np.float64).reshape(-1, 2)), axis=0)
    off = np.abs(back.reshape(-1) - corners) * np.tile(size[::-1], 2)
    assert off.max() < 1e-3
    return True


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(SIDES, SIDES),
    view=st.tuples(st.integers(4, 60), st.integers(4, 60)),
    resize=st.sampled_from(RULES),
    way=st.sampled_from(["whole", "crop", "window"]),
    factor=st.floats(0.1, 3),
    corners=INSIDE,
    moves=st.fixed_dictionaries({"hflip": st.floats(0, 1), "vflip": st.floats(0, 1)}),
    index=st.integers(0, 10**9),
)
def test_a_box_finds_its_way_back(size, view, resize, way, factor, corners, moves, index) -> None:
    preprocess = Preprocess(size=(8 * view[0], 8 * view[1]), resize=resize, patch=(8, 8))
    config = replace(OFF, shift=2, **moves)
    if way == "window":
        draws = np.random.default_rng(index).random(3)
        box = window(size, preprocess.size, (factor, factor), draws)
        seen = Seen.of_box(box, size, preprocess.size)
    elif way == "crop":
        config = replace(config, crop_scale=(0.5, 1.0))
        image = Image.new("RGB", size[::-1])
        _, seen = view_of(image, preprocess, config, seed=0, epoch=0, index=index)
    else:
        seen = preprocess.seen(*size)
    moved = Augment(config, 0, preprocess.size).moves(np.array([index]), 0, seen.size)
    seen = seen.then(moved[0])
    target = one_box(size, corners).target(0, seen)
    check_back(target, seen, size, corners)


def survivors(size, view, scale, corners, draws, flips=(False, False)) -> int:
    """Of a mosaic with a blend, all of one image, how many of its boxes are wholly visible; each
    of these is led back.
    """
    image, drawn = Image.new("RGB", size[::-1]), np.array(draws)
    preprocess = Preprocess(size=view, interpolation="nearest")
    joined = mosaic(image, 0, 1, lambda i: image, preprocess, scale, drawn)
    joined = blend(joined, 1, lambda i: image, preprocess, scale, drawn)
    config = replace(OFF, hflip=float(flips[0]), vflip=float(flips[1]))
    (moved,) = Augment(config, 0, view).moves(np.array([0]), 0, view)
    parts = [(i, seen.then(moved)) for i, seen in joined.parts]
    boxes = one_box(size, corners)
    each = [boxes.joined_target([part]) for part in parts]
    together = boxes.joined_target(parts)
    for name, values in together.items():
        assert np.array_equal(values, np.concatenate([one[name] for one in each]))
    assert len(parts) == 5
    return sum(
        check_back(one, seen, size, corners) for one, (_, seen) in zip(each, parts, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(SIDES, SIDES),
    view=st.tuples(st.integers(16, 300), st.integers(16, 300)),
    scale=st.sampled_from([(1.0, 1.0), (0.2, 0.6), (0.3, 2.0)]),
    corners=INSIDE,
    draws=st.lists(UNIT, min_size=17, max_size=17),
    flips=st.tuples(st.booleans(), st.booleans()),
)
def test_a_box_finds_its_way_back_from_each_quadrant(size, view, scale, corners, draws, flips):
    assert survivors(size, view, scale, corners, draws, flips) <= 5


def test_all_of_an_image_is_seen_that_is_smaller_than_its_quadrant() -> None:
    corners, middle = (0.02, 0.1, 0.98, 0.9), [0.5] * 17
    assert survivors((300, 400), (96, 128), (0.5, 0.9), corners, middle, (True, True)) == 5
    assert survivors((300, 400), (96, 128), (1.5, 1.9), corners, middle) == 0


def test_what_a_quadrant_shows_too_little_of_is_ignored() -> None:
    boxes = one_box((100, 100), (0.2, 0.2, 0.8, 0.8))
    for shown, ignored in ((0.15, 1), (0.5, 0)):
        # The quadrant shows the image's left part, up to this share of the box.
        cut = Seen.of_box((0, 0, 20 + 60 * shown, 100), (100, 100), (40, 40))
        right = np.array([[1, 0, 10], [0, 1, 0], [0, 0, 1.0]])
        target = boxes.joined_target([(0, cut.then(right)._replace(size=(80, 80)))])
        assert target["ignored"].tolist() == [ignored]
        assert target["boxes"][0, 1:].tolist() == pytest.approx([8, 50, 32])


# The same, whoever makes it


def digest(batches) -> list[str]:
    return [
        hashlib.sha256(
            b"".join(t.numpy().tobytes() for t in (batch.images, *batch.targets.values()))
        ).hexdigest()
        for batch in batches
    ]


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_neither_workers_nor_cache_nor_a_resume_change_a_batch(decode) -> None:
    def made(epoch: int, first: int = 0, cache: Any = "memory", **how: Any) -> list[str]:
        reading = Reading(decode=decode, cache=cache)
        return digest(loader(STRONG, batch_size=3, reading=reading, **how).epoch(epoch, first))

    whole = [made(epoch) for epoch in (0, 1)]
    assert len({one for epoch in whole for one in epoch}) == 8
    for epoch in (0, 1):
        assert made(epoch, workers=4) == made(epoch, cache="none") == whole[epoch]
        for first in range(4):
            assert made(epoch, first) == whole[epoch][first:]


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_each_batch(size) -> None:
    alone = loader(STRONG).epoch(1)
    parts = [loader(STRONG, part=(rank, size)).epoch(1) for rank in range(size)]
    for whole, *own in zip(alone, *parts, strict=True):
        assert torch.equal(torch.cat([part.images for part in own]), whole.images)
        rows = iter(range(len(whole.images)))
        for part in own:
            for i in range(len(part.images)):
                for mine, theirs in zip(found(part, i), found(whole, next(rows)), strict=True):
                    assert np.array_equal(mine, theirs)


def views(config: AugmentConfig, epoch: int = 0, **how: Any) -> dict[int, torch.Tensor]:
    return {
        int(i): image
        for batch in loader(config, **how).epoch(epoch)
        for i, image in zip(batch.indices, batch.images, strict=True)
    }


def test_a_view_depends_on_its_seed_epoch_and_index_alone() -> None:
    together, alone = views(STRONG, batch_size=12), views(STRONG, batch_size=1)
    assert len(alone) == 12 and all(torch.equal(together[i], alone[i]) for i in alone)
    other = [views(STRONG, epoch=1), views(STRONG, seed=4)]
    assert all(not torch.equal(alone[i], each[i]) for each in other for i in alone)


def test_partners_are_of_the_whole_source_and_all_are_met(monkeypatch) -> None:
    met, partner = set[int](), module._partner

    def told(draw: float, images: int) -> int:
        met.add(partner(draw, images))
        return partner(draw, images)

    monkeypatch.setattr(module, "_partner", told)
    list(loader(replace(OFF, mosaic=1.0), batch_size=3, part=(0, 3)).epoch(0))
    assert len(met) >= 8  # of 12, in 12 draws for the 4 images of one of 3 processes
    assert partner(np.nextafter(np.float32(1), np.float32(0)), 2**31) < 2**31


def test_without_strong_ones_a_batch_is_as_if_there_were_none() -> None:
    plain = list(loader(replace(STRONG, mosaic=0.0, blend=0.0), batch_size=3).epoch(0))
    asked: list[int] = []

    def strong(batch: int) -> bool:
        asked.append(batch)
        return batch < 2

    calm = list(loader(STRONG, batch_size=3).epoch(0, 0, strong))
    assert asked == [0, 1, 2, 3]
    same = [a == b for a, b in zip(digest(plain), digest(calm), strict=True)]
    assert same == [False, False, True, True]
    assert digest(loader(STRONG, batch_size=3).epoch(0, 2, strong)) == digest(calm)[2:]


def test_how_often_there_are_mosaics_and_blends() -> None:
    draws = {"mosaic": 0, "blend": 0}
    for index in range(400):
        for purpose in draws:
            n = 1 + (module._MOSAIC_DRAWS if purpose == "mosaic" else module._BLEND_DRAWS)
            draws[purpose] += module.uniform(0, 0, np.array([index]), purpose, n)[0, 0] < 0.3
    assert all(80 < count < 160 for count in draws.values())


# What goes wrong


@pytest.mark.parametrize("fault", ["unreadable", "foreign"])
def test_an_unreadable_partner_is_background_and_counted(fault) -> None:
    source = Rectangles()
    getattr(source, fault).update(range(1, 12))
    for config in (replace(OFF, mosaic=1.0), replace(OFF, blend=1.0)):
        train = loader(config, source, batch_size=12, max_unreadable=1.0)
        (batch,) = train.epoch(0)
        assert batch.indices.tolist() == [0]
        places, labels, _ = found(batch, 0)
        again = labels.tolist()  # partners may be the image itself
        assert set(again) == {0}
        assert not (batch.images[0, 0].numpy() > 0.25)[~filled(places, VIEW, 3.0)].any()
        assert not batch.images[0, 1:].any()
        assert set(train.skipped) == {str(i) for i in range(1, 12)}
    with pytest.raises(DataError, match="cannot be read"):
        list(loader(replace(OFF, mosaic=1.0), source).epoch(0))


def test_a_damaged_partner_counts_in_a_process_that_has_no_share_of_it() -> None:
    source = Rectangles(4)
    source.unreadable.add(3)
    trains = [
        loader(replace(OFF, mosaic=1.0), source, batch_size=2, part=(rank, 2), max_unreadable=1.0)
        for rank in range(2)
    ]
    for train in trains:
        list(train.epoch(0))
        assert set(train.skipped) == {"3"}


def test_other_targets_cannot_be_joined() -> None:
    for source, kind in ((pictures(12, 1), "classes"), (Blocks(), "masks")):
        for changes in ({"mosaic": 0.5}, {"blend": 0.5}):
            with pytest.raises(UsageError, match=rf"but not {kind}: switch them off"):
                loader(replace(OFF, **changes), source)
    with pytest.raises(UsageError, match="shows the same views again"):
        loader(STRONG, kept_views=2)
    with pytest.raises(UsageError, match="mosaic must be 0 to 1"):
        replace(OFF, mosaic=1.5)


# Images that change their size


@pytest.mark.parametrize("size", [(64, 96), (128, 160), (96, 128)])
def test_boxes_are_scaled_with_their_images(size) -> None:
    for batch in loader(replace(STRONG, blend=0.0)).epoch(0):
        (other,) = resized([batch], size)
        assert other.images.shape[2:] == size
        assert torch.equal(other.targets["labels"], batch.targets["labels"])
        padding = batch.targets["labels"] < 0
        assert (other.targets["boxes"][padding] == -1).all() and padding.any()
        for i, image in enumerate(other.images.numpy()):
            places, labels, ignored = found(other, i)
            for k, channel in enumerate(image):
                own = labels == k
                assert not (channel > 0.3)[~filled(places[own], size, 3.0)].any()
                assert (channel[filled(places[own & ~ignored], size, -4.0)] > 0.7).all()


def test_a_steps_size_is_drawn_for_its_place_in_the_run() -> None:
    sizes = ((8, 8), (12, 12), (16, 16))
    drawn = [drawn_size(sizes, 0, epoch, batch) for epoch in range(3) for batch in range(40)]
    assert all(20 < drawn.count(size) < 60 for size in sizes)
    assert drawn == [drawn_size(sizes, 0, e, b) for e in range(3) for b in range(40)]
    assert drawn[:40] != drawn[40:80]
