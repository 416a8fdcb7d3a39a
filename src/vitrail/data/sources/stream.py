"""StreamSource: labelled images that are read from front to back, for data too large to have.

Where images can be read at any place (a folder, shards on a disk), that is better: the order is
then a permutation of all. A stream has less, but as firm:

- Its shards are dealt, anew for each pass, to a fixed number of lanes; image `number` of the stream
  comes from lane `number % lanes`. Within a lane, blocks of images are shuffled. All of that is
  keyed by (seed, pass), so the order depends on nothing but the data, the seed, `lanes` and
  `buffer`, which belong to a run's configuration.
- Of several processes, each takes every so many-th image. If their count divides `lanes`, each
  reads its own lanes only; else each reads all and keeps its share.
- A lane that is through its shards begins its next pass at once, so a stream never ends and no
  process waits for another. One lane shows every image once a pass; several do so only if their
  shards are of one size and their count is a multiple of the lanes, else nearly.
- A position is a few numbers a lane. To seek it, no more than a shard a lane is read again.

Images to measure on are kept in memory (`HeldImages`).
"""

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from typing import NamedTuple, Protocol, TypedDict

import numpy as np
from PIL import Image

from vitrail.data import keyed
from vitrail.data.pixels.decode import UnreadableImage, read_image
from vitrail.data.targets import Classes
from vitrail.errors import DataError, UsageError, setting

LANES = 8
"""Divided by 1, 2, 4 and 8 processes; so many shards are open at once."""

BUFFER = 2048
"""Images in memory (encoded, not decoded), in all lanes together."""

EPOCH = 10_000
"""Images that count as an epoch where nobody says how many there are."""

_EMPTY_PASSES = 64


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """How a stream is read. A value out of range is a `UsageError`."""

    lanes: int = LANES
    """Shards that are read at the same time; best a multiple of the number of processes."""
    buffer: int = BUFFER
    """Images in memory, encoded, among which the order is shuffled."""
    held_out: int = 2000
    """Most images that are measured on, kept in memory: those of the stream's own part for
    validation or test; where it has none, some of its first, which are then not trained on."""
    epoch: int | None = None
    """Images that count as an epoch. None: as many as there are, where the data says so."""
    classes: str | None = None
    """A file with the names of the classes, one a line in the order of their numbers, for data that
    does not name them."""

    def __post_init__(self) -> None:
        for name, number in (
            ("lanes", self.lanes),
            ("buffer", self.buffer),
            ("held_out", self.held_out),
            ("epoch", self.epoch),
        ):
            if number is not None and number < 1:
                raise UsageError(
                    f"{setting(f'data.stream.{name}')} must be at least 1, not {number}"
                )


Label = int | tuple[int, ...]
"""A class's index, or several."""


class StreamShards(Protocol):
    """Where a stream comes from: shards that can only be read from front to back."""

    def __len__(self) -> int: ...

    def read(self, shard: int, start: int) -> Iterator[tuple[bytes, Label | None]]:
        """The images of a shard, less the first `start`, with their labels; None if there is none.

        Raises DataError where they cannot be had.
        """
        ...


class Streamed(NamedTuple):
    """One image of a stream."""

    number: int
    """Its place in the whole stream, over all processes: what its augmentation is keyed by."""
    key: str
    """Its shard and its place there: "12/345"."""
    content: bytes
    """Encoded."""
    label: Label


class Position(TypedDict):
    """Where a stream is, as plain values for a checkpoint."""

    drawn: int
    """Images taken so far, by all processes together."""
    order: list[int | str]
    """What the order follows from: seed, lanes, buffer, shards, images held out, and the data's own
    stamp."""
    lanes: dict[str, list[int]]
    """For each lane: pass, shard (its place in the pass), image of it at which the current block
    begins, and how many images of the block are taken."""


class StreamSource:
    """Labelled images of `shards` without an end, in an order that the seed says.

    `lanes` and `buffer` are as above; there are never more lanes than shards. `stamp` is a text
    that changes with the data, as far as its keeper can tell; `images` how many there are, if
    that is known, and `epoch` how many of them count as an epoch, if that is another number.
    Raises UsageError for numbers that cannot be, DataError if there are no shards.
    """

    def __init__(
        self,
        shards: StreamShards,
        classes: tuple[str, ...],
        *,
        several: bool = False,
        seed: int,
        lanes: int = LANES,
        buffer: int = BUFFER,
        stamp: str = "",
        images: int | None = None,
        epoch: int | None = None,
    ) -> None:
        if lanes < 1 or buffer < 1:
            raise UsageError(f"lanes are {lanes} and buffer is {buffer}: both must be at least 1")
        if not len(shards):
            raise DataError("a stream without shards has no images")
        self.shards = shards
        self.targets = Classes.numbered(classes, (), several=several)
        """Of no image: nobody knows them before they come."""
        self.seed = seed
        self.lanes = min(lanes, len(shards))
        self.block = max(1, buffer // self.lanes)
        self.stamp = stamp
        self.images = images
        self.epoch = epoch
        self.left_out: frozenset[str] = frozenset()
        """Keys of images that it passes over."""

    def __len__(self) -> int:
        """Images that count as an epoch: nothing ends with them, nor begins."""
        return self.epoch or self.images or EPOCH

    def reader(self, part: tuple[int, int] = (0, 1)) -> "StreamReader":
        """The images of `part` (which process, of how many), from the beginning on."""
        return StreamReader(self, part)

    def sample(self, most: int) -> "HeldImages":
        """Images from the beginning of all lanes, each once, in memory: fewer only if there are.

        Raises DataError if there are none.
        """
        rows: list[tuple[str, bytes, Label]] = []
        lanes = deque(_Lane(self, number) for number in range(self.lanes))
        while lanes and len(rows) < most:
            lane = lanes.popleft()
            image = lane.draw()
            if lane.position()[0] == 0:  # else it has begun again
                rows.append(image)
                lanes.append(lane)
        return HeldImages(rows, self.targets.names, self.targets.several)

    def without(self, held: "HeldImages") -> "StreamSource":
        """The stream less some of its images."""
        rest = copy.copy(self)
        rest.left_out = self.left_out | {held.key(i) for i in range(len(held))}
        rest.images = self.images and max(0, self.images - len(held))
        return rest

    @property
    def order(self) -> list[int | str]:
        """What the order follows from."""
        numbers = [self.seed, self.lanes, self.block, len(self.shards), len(self.left_out)]
        return [*numbers, self.stamp]

    def renewed(self, position: Position) -> Position:
        """Where this stream goes on for one that has changed: a new pass, after as many images."""
        passes = 1 + max(lane[0] for lane in position["lanes"].values())
        lanes = {str(number): [passes, 0, 0, 0] for number in range(self.lanes)}
        return {"drawn": position["drawn"], "order": self.order, "lanes": lanes}


class StreamReader:
    """One process's share of a stream, as an iterator without an end.

    For use in one thread. `position` is that of the next image, whoever has taken the others.
    """

    def __init__(self, source: StreamSource, part: tuple[int, int]) -> None:
        self._which, self._parts = part
        if not 0 <= self._which < self._parts:
            raise UsageError(f"part {part}: give (which, of how many), counted from 0")
        own = source.lanes % self._parts == 0
        self._source = source
        self._drawn = 0
        self._lanes = {
            lane: _Lane(source, lane)
            for lane in range(source.lanes)
            if not own or lane % self._parts == self._which
        }

    def __iter__(self) -> "StreamReader":
        return self

    def __next__(self) -> Streamed:
        """The next image of this process; those of the others are passed over."""
        mine = None
        for number in range(self._drawn, self._drawn + self._parts):
            lane = self._lanes.get(number % self._source.lanes)
            if lane is not None:
                image = lane.draw()
                if number % self._parts == self._which:
                    mine = Streamed(number, *image)
        assert mine is not None
        self._drawn += self._parts
        return mine

    @property
    def drawn(self) -> int:
        """Images taken so far, by all processes together."""
        return self._drawn

    def position(self) -> Position:
        """Where the stream is; of its lanes, those that this process reads."""
        lanes = {str(number): lane.position() for number, lane in self._lanes.items()}
        return {"drawn": self._drawn, "order": self._source.order, "lanes": lanes}

    def seek(self, position: Position) -> None:
        """Go on from a position of all lanes (`joined`), or of those that this process reads.

        Raises DataError for a position of another stream, or one that cannot be.
        """
        try:
            order, drawn = list(position["order"]), int(position["drawn"])
            lanes = {
                number: tuple(map(int, position["lanes"][str(number)])) for number in self._lanes
            }
            if drawn % self._parts or any(len(p) != 4 or min(p) < 0 for p in lanes.values()):
                raise ValueError(drawn)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"the saved position of the stream is none of {self._parts} processes: {error}"
            ) from error
        if order != self._source.order:
            names = ("seed", "lanes", "images a block", "shards", "images held out", "stamp")
            was = zip(names, order, self._source.order, strict=True)
            changed = [f"{name} was {old}, is {new}" for name, old, new in was if old != new]
            raise DataError(f"the stream is not the one that was saved: {'; '.join(changed)}")
        self._drawn = drawn
        for number, lane in self._lanes.items():
            lane.seek(lanes[number])


def joined(positions: Sequence[Position]) -> Position:
    """The position of the whole stream, from those of all processes after as many images each."""
    first = positions[0]
    if any((p["drawn"], p["order"]) != (first["drawn"], first["order"]) for p in positions):
        raise ValueError("these positions are not of one moment of one stream")
    lanes = {number: lane for p in positions for number, lane in p["lanes"].items()}
    in_order = sorted(lanes.items(), key=lambda item: int(item[0]))
    return {"drawn": first["drawn"], "order": first["order"], "lanes": dict(in_order)}


class _Place(NamedTuple):
    """An image of a lane: the pass, the shard's place in the pass, and its own in the shard."""

    number: int
    shard: int
    image: int


class _Lane:
    """Some of the shards, one after the other, in shuffled blocks.

    While one block is given out, the next one is read, image by image: there is one block's worth
    of images in memory, and no long wait between two blocks.
    """

    def __init__(self, source: StreamSource, lane: int) -> None:
        self._source = source
        self._lane = lane
        self._begin(_Place(0, 0, 0))

    def _begin(self, place: _Place) -> None:
        self._start = place
        self._block: deque[tuple[str, bytes, Label]] = deque()
        self._taken = 0
        self._coming: list[tuple[_Place, tuple[str, bytes, Label]]] = []
        self._rows = self._from(place)
        self._ahead: tuple[_Place, tuple[str, bytes, Label]] | None = None

    def draw(self) -> tuple[str, bytes, Label]:
        """Key, content and label of the next image."""
        if not self._block:
            self._turn()
        image = self._block.popleft()
        self._taken += 1
        self._fetch()
        return image

    def position(self) -> list[int]:
        return [*self._start, self._taken]

    def seek(self, position: tuple[int, ...]) -> None:
        number, shard, image, taken = position
        self._begin(_Place(number, shard, image))
        if taken:
            self._turn()
            if self._start != (number, shard, image) or taken > len(self._block):
                raise DataError("the stream has other images than when its position was saved")
            self._taken = taken
            for _ in range(taken):
                self._block.popleft()

    def _turn(self) -> None:
        """Make the block that was to come the current one."""
        while self._fetch():
            pass
        places = [place for place, _ in self._coming]
        images = [image for _, image in self._coming]
        self._start, self._coming, self._taken = places[0], [], 0
        which = np.array([(place.shard << 32) + place.image for place in places])
        draws = keyed.uniform(
            self._source.seed, self._start.number, which, f"stream {self._lane}", 1
        )
        self._block = deque(images[i] for i in np.argsort(draws[:, 0], kind="stable"))

    def _fetch(self) -> bool:
        """Read one image of the block to come; False if that is whole. A pass ends a block."""
        if self._ahead is None:
            self._ahead = next(self._rows)
        of_this_pass = not self._coming or self._coming[0][0].number == self._ahead[0].number
        if len(self._coming) == self._source.block or not of_this_pass:
            return False
        self._coming.append(self._ahead)
        self._ahead = None
        return True

    def _from(self, place: _Place) -> Iterator[tuple[_Place, tuple[str, bytes, Label]]]:
        """All images from `place` on, pass after pass."""
        source = self._source
        empty = 0
        for number in count(place.number):
            order = keyed.permutation(source.seed, number, len(source.shards))
            found = False
            for at, shard in enumerate(order[self._lane :: source.lanes].tolist()):
                if (number, at) < place[:2]:
                    continue
                start = place.image if (number, at) == place[:2] else 0
                for i, (content, label) in enumerate(source.shards.read(shard, start), start):
                    key = f"{shard}/{i}"
                    if label is not None and key not in source.left_out:
                        found = True
                        yield _Place(number, at, i), (key, content, label)
            empty = 0 if found else empty + 1
            if empty == _EMPTY_PASSES:
                beside = f", beside {len(source.left_out)} held out" if source.left_out else ""
                raise DataError(f"the stream's shards hold no image with a label{beside}")


class HeldImages:
    """Encoded images in memory, as a source. Raises DataError if there are none."""

    def __init__(
        self,
        rows: Iterable[tuple[str, bytes, Label]],
        classes: tuple[str, ...],
        several: bool,
    ) -> None:
        self._rows = tuple(rows)
        if not self._rows:
            raise DataError("the stream's shards hold no image with a label")
        labels = (label for _, _, label in self._rows)
        self.targets = Classes.numbered(classes, labels, several=several)

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, i: int) -> str:
        return self._rows[i][0]

    def encoded(self, i: int) -> bytes:
        """The image as it came."""
        return self._rows[i][1]

    def load(self, i: int) -> Image.Image:
        try:
            return read_image(self.encoded(i))
        except UnreadableImage as error:
            raise UnreadableImage(error.reason, self.key(i)) from error

    def stamp(self, i: int) -> str:
        return blake2b(self.encoded(i), digest_size=16).hexdigest()

    @property
    def bytes(self) -> int:
        """How large they are, as they came."""
        return sum(len(content) for _, content, _ in self._rows)
