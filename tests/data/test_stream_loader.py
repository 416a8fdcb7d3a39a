"""Batches of a stream: the same whoever makes them, and wherever they are gone on with."""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrail.data.batches.batch import Batch
from vitrail.data.batches.stream_loader import StreamLoader
from vitrail.data.pixels.reading import Reading
from vitrail.data.sources.stream import Label, Position, StreamSource, joined
from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import DataError, UsageError

SMALL = Preprocess(size=(16, 16))
OFF = AugmentConfig.off()
ALL = AugmentConfig(shift=2, policy="randaugment", jitter=0.2, erase=0.5, mixup=0.4, cutmix=1.0)


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


PICTURES = [[picture(100 * shard + i) for i in range(8 + shard)] for shard in range(6)]


class Shards:
    """Six shards of 8 to 13 images, that count what is read; `damaged` ones are no images."""

    def __init__(self, damaged: frozenset[str]) -> None:
        self.damaged = damaged
        self.reads = 0

    def __len__(self) -> int:
        return len(PICTURES)

    def read(self, shard: int, start: int) -> Iterator[tuple[bytes, Label | None]]:
        for i, content in islice(enumerate(PICTURES[shard]), start, None):
            self.reads += 1
            yield b"damaged" if f"{shard}/{i}" in self.damaged else content, (shard + i) % 3


def stream(damaged: Iterable[str] = (), **how: Any) -> StreamSource:
    how = {"seed": 5, "lanes": 4, "buffer": 16, "epoch": 40, **how}
    return StreamSource(Shards(frozenset(damaged)), ("a", "b", "c"), **how)


def loader(augment: AugmentConfig = ALL, source: Any = None, **options: Any) -> StreamLoader:
    options = {"batch_size": 8, "seed": 3, "max_unreadable": 0.5, **options}
    return StreamLoader(source or stream(), SMALL, augment, **options)


def endless(train: StreamLoader) -> Iterator[Batch]:
    for epoch in count():
        yield from train.epoch(epoch)


def content(batch: Batch) -> dict[int, bytes]:
    """What is in it of each image."""
    rows = zip(batch.indices.tolist(), batch.images, batch.targets["classes"], strict=True)
    return {i: x.numpy().tobytes() + y.numpy().tobytes() for i, x, y in rows}


def contents(batches: Iterable[Batch]) -> list[dict[int, bytes]]:
    return [content(batch) for batch in batches]


WHOLE = contents(islice(endless(loader()), 15))


def test_batches_hold_one_image_after_another() -> None:
    assert [sorted(batch) for batch in WHOLE] == [list(range(8 * k, 8 * k + 8)) for k in range(15)]
    assert len({picture for batch in WHOLE for picture in batch.values()}) == 8 * 15
    train = loader()
    assert len(train) == 5 and len(list(train.epoch(0))) == 5


@pytest.mark.parametrize(
    "how",
    [
        {"workers": 1},
        {"workers": 5},
        {"reading": Reading(decoders="processes")},
        {"reading": Reading(cache="none")},
    ],
)
def test_nothing_but_seed_and_stream_decides_what_a_batch_is(how: dict[str, Any]) -> None:
    assert contents(islice(endless(loader(**how)), 7)) == WHOLE[:7]
    other = contents(loader(seed=4, **how).epoch(0))
    assert other[0].keys() == WHOLE[0].keys() and other != WHOLE[:5]


@pytest.mark.parametrize("damaged", [(), ("0/0", "0/1", "1/2", "2/5", "3/3", "5/7", "5/8")])
@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.0, "cutmix": 0.0}])
@pytest.mark.parametrize("lanes", [1, 4])
def test_processes_share_each_batch(
    damaged: tuple[str, ...], mixing: dict[str, float], lanes: int
) -> None:
    augment = replace(ALL, **mixing)

    def made(part: tuple[int, int]) -> list[dict[int, bytes]]:
        train = loader(augment, stream(damaged, lanes=lanes), part=part)
        return contents(islice(endless(train), 7))

    whole = made((0, 1))
    for size in (2, 4):
        parts = [made((rank, size)) for rank in range(size)]
        for one, *shares in zip(whole, *parts, strict=True):
            assert sum(map(len, shares)) == len(one)
            assert {i: x for share in shares for i, x in share.items()} == one


def resumed(position: Position, **options: Any) -> StreamLoader:
    train = loader(**options)
    train.seek(json.loads(json.dumps(position)))
    return train


@settings(max_examples=15, deadline=None)
@given(at=st.integers(0, 9), before=st.sampled_from([1, 2, 4]), after=st.sampled_from([1, 2, 4]))
def test_any_number_of_processes_goes_on_from_any_batch(at: int, before: int, after: int) -> None:
    firsts = [loader(part=(rank, before)) for rank in range(before)]
    for train in firsts:
        list(islice(endless(train), at))  # and what was fetched ahead is given back
    position = joined([train.position for train in firsts])
    assert position["drawn"] == 8 * at
    parts = [resumed(position, part=(rank, after)) for rank in range(after)]
    found = [contents(islice(train.epoch(at // 5, at % 5), 2)) for train in parts]
    for k, shares in enumerate(zip(*found, strict=True)):
        assert {i: x for share in shares for i, x in share.items()} == WHOLE[at + k]


def test_a_position_only_spares_reading() -> None:
    for epoch, first in ((0, 3), (1, 0), (2, 2)):
        assert contents(loader().epoch(epoch, first)) == WHOLE[5 * epoch + first : 5 * epoch + 5]
    train = loader()
    list(islice(endless(train), 12))
    again = loader(source=stream())
    again.seek(train.position)
    assert contents(islice(again.epoch(2, 2), 2)) == WHOLE[12:14]
    assert again.source.shards.reads < 60 < train.source.shards.reads  # type: ignore[attr-defined]
    # Backwards as well: what was tried out is read again.
    for k in (3, 0, 1):
        assert contents(islice(train.epoch(0, k), 2)) == WHOLE[k : k + 2]


def test_beside_a_gpu_nothing_that_was_made_ahead_is_lost() -> None:
    train = loader(OFF, device="meta")
    (first, second) = islice(train.epoch(0), 2)
    assert train.position["drawn"] == 16
    (third,) = islice(train.epoch(0, 2), 1)
    assert [sorted(batch.indices) for batch in (first, second, third)] == [
        list(range(8 * k, 8 * k + 8)) for k in range(3)
    ]


def test_a_changed_stream_begins_a_new_pass() -> None:
    train, told = loader(), list[str]()
    list(islice(endless(train), 7))
    changed = loader(source=stream(stamp="new"), notify=told.append)
    changed.seek(train.position)
    assert told == ["the stream is not what it was: a new pass of it begins"]
    (batch,) = islice(changed.epoch(1, 2), 1)
    assert sorted(batch.indices.tolist()) == list(range(56, 64))


def test_damaged_images_are_left_out_and_told() -> None:
    damaged = {"0/0", "2/5", "5/7"}
    train = loader(OFF, stream(damaged))
    batches = list(islice(endless(train), 15))
    assert set(train.skipped) == damaged
    assert sum(len(batch.indices) for batch in batches) < 8 * 15
    everything = {
        f"{shard}/{i}" for shard, images in enumerate(PICTURES) for i in range(len(images))
    }
    nothing = next(loader(OFF, stream(everything), max_unreadable=0.99).epoch(0))
    assert nothing.images.shape == (0, 3, 16, 16) and nothing.targets["classes"].shape == (0, 3)
    with pytest.raises(
        DataError, match=r"cannot be read, more than the 2% .*(\n.*)*max_unreadable"
    ):
        list(islice(endless(loader(OFF, stream(damaged), max_unreadable=0.02)), 15))


def test_the_decoders_are_those_of_files() -> None:
    many = loader(OFF, stream(epoch=1000), batch_size=4)
    (batch,) = islice(many.epoch(0), 1)
    assert len(many) == 250 and len(batch.indices) == 4
    assert many._reader._workers is not None and loader()._reader._workers is None


def test_what_cannot_be_shared() -> None:
    with pytest.raises(UsageError, match=r"by 3 processes: .*batch_size to 6 or 9"):
        loader(OFF, part=(0, 3))
    with pytest.raises(UsageError, match="in pairs"):
        loader(ALL, batch_size=4, part=(0, 4))
    with pytest.raises(UsageError, match=r"part \(2, 2\)"):
        loader(OFF, part=(2, 2))
    told: list[str] = []
    loader(OFF, batch_size=9, part=(0, 3), notify=told.append)
    assert "data.stream.lanes 6" in told[0]
    assert loader(OFF, batch_size=500).batch_size == 40  # of an epoch


def test_a_stream_that_breaks_off_ends_the_epoch() -> None:
    class Broken(Shards):
        def read(self, shard: int, start: int) -> Iterator[tuple[bytes, Label | None]]:
            yield from islice(super().read(shard, start), 3)
            raise DataError("it broke off")

    source = StreamSource(Broken(frozenset()), ("a", "b", "c"), seed=0, lanes=1, epoch=40)
    with pytest.raises(DataError, match="it broke off"):
        list(loader(source=source).epoch(0))


def test_targets_of_several_labels() -> None:
    class Several(Shards):
        def read(self, shard: int, start: int) -> Iterator[tuple[bytes, Label | None]]:
            for i, (content, _) in enumerate(super().read(shard, start), start):
                yield content, (0, 2) if i % 2 else ()

    source = StreamSource(Several(frozenset()), ("a", "b", "c"), seed=0, several=True, epoch=40)
    (batch,) = islice(loader(OFF, source, batch_size=32).epoch(0), 1)
    assert {tuple(row) for row in batch.targets["classes"].tolist()} == {
        (1.0, 0.0, 1.0),
        (0.0, 0.0, 0.0),
    }
    assert torch.isfinite(batch.images).all()
