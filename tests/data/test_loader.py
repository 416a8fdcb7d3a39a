"""Batches: the same whoever makes them, of images of any size, and of files that go wrong."""

import hashlib
import os
import random
import signal
import threading
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import faulty
from parts import labelled
from vitrail.data import keyed, read_image
from vitrail.data.batches.batch import Batch
from vitrail.data.batches.loader import EvalLoader, Reading, TrainLoader
from vitrail.data.pixels import reading as module
from vitrail.data.pixels.workers import Workers
from vitrail.data.sources.source import file_stamp
from vitrail.data.targets import Classes
from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.canvas import input_of
from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import DataError, UsageError
from vitrail.units import bytes_text as size_text

SHAPES = [(40, 40), (20, 80), (80, 20), (40, 40), (30, 60), (40, 40), (16, 128), (57, 31)]
OFF = AugmentConfig.off()
NATIVE = Preprocess(size=(32, 32), resize="native", patch=(8, 8))


class Oblong:
    """Images of SHAPES, in which red tells the column and green the row."""

    targets = Classes(("a", "b"), np.arange(len(SHAPES)) % 2)

    def __len__(self) -> int:
        return len(SHAPES)

    def key(self, i: int) -> str:
        return str(i)

    def load(self, i: int) -> Image.Image:
        height, width = SHAPES[i]
        x, y = np.meshgrid(np.linspace(10, 250, width), np.linspace(10, 250, height))
        return Image.fromarray(np.stack((x, y, 0 * x), -1).round().astype(np.uint8))


def images(batch: Batch) -> dict[int, torch.Tensor]:
    """What shows each image, by its index."""
    if batch.extent is None:
        return dict(zip(batch.indices.tolist(), batch.images, strict=True))
    sizes = (batch.extent * 8).tolist()
    return {
        i: image[:, :h, :w]
        for i, image, (h, w) in zip(batch.indices.tolist(), batch.images, sizes, strict=True)
    }


@pytest.mark.parametrize("resize", ["pad", "native"])
def test_evaluation_shows_every_image_at_the_top_left(resize: Any) -> None:
    preprocess = replace(NATIVE, resize=resize)
    loader = EvalLoader(Oblong(), preprocess, batch_size=5)
    for _ in range(2):  # from the files, then from memory
        seen: dict[int, torch.Tensor] = {}
        for batch in loader:
            assert batch.extent is not None
            seen |= images(batch)
        for i in range(len(SHAPES)):
            assert torch.equal(seen[i], input_of(preprocess, Oblong().load(i)))


def test_images_of_one_size_need_no_extent() -> None:
    (batch,) = EvalLoader(Oblong(), replace(NATIVE, resize="squash"))
    assert batch.extent is None and batch.images.shape == (8, 3, 32, 32)


def train(augment: AugmentConfig, batch_size: int, **options: Any) -> dict[int, torch.Tensor]:
    loader = TrainLoader(
        Oblong(), replace(NATIVE, **options), augment, batch_size=batch_size, seed=0
    )
    return {i: image for batch in loader.epoch(0) for i, image in images(batch).items()}


@pytest.mark.parametrize("resize", ["pad", "native"])
@pytest.mark.parametrize("policy", ["none", "randaugment", "trivial"])
def test_what_happens_to_an_image_depends_on_its_index_alone(policy: Any, resize: Any) -> None:
    augment = AugmentConfig(shift=2, vflip=0.5, policy=policy, jitter=0.3, erase=0.5)
    together, alone = train(augment, 8, resize=resize), train(augment, 1, resize=resize)
    assert together.keys() == alone.keys() == set(range(len(SHAPES)))
    for i, image in together.items():
        assert torch.equal(image, alone[i])


def test_a_mirror_image_stays_at_the_top_left() -> None:
    plain, flipped = train(OFF, 8), train(replace(OFF, hflip=1.0), 8)
    for i, image in plain.items():
        assert torch.equal(flipped[i], image.flip(-1))


@pytest.mark.parametrize("mixing", [{"mixup": 0.2}, {"cutmix": 1.0}])
@pytest.mark.parametrize("resize", ["pad", "native"])
def test_images_of_different_sizes_are_not_mixed(resize: Any, mixing: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"resize='{resize}' .*mixup=0 and cutmix=0"):
        train(replace(OFF, **mixing), 8, resize=resize)


# The same batches, whoever makes them


class Files:
    """The images of a folder, in the order of their names; every other one is a "b"."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.*g"))
        self.targets = Classes(("a", "b"), np.arange(len(self.files)) % 2)
        self.loaded: list[str] = []

    def __len__(self) -> int:
        return len(self.files)

    def key(self, i: int) -> str:
        return self.files[i].name

    def load(self, i: int) -> Image.Image:
        self.loaded.append(self.key(i))
        return read_image(self.files[i])

    def stamp(self, i: int) -> str:
        return file_stamp(self.files[i])

    def encoded(self, i: int) -> Path:
        self.loaded.append(self.key(i))
        return self.files[i]


def photo(seed: int, width: int = 60, height: int = 48) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images; some large enough to be reduced."""
    (tmp_path / "data").mkdir()
    for i in range(12):
        big = 3 if i % 3 == 0 else 1
        image = photo(i, 60 * big, 48 * big)
        image.save(tmp_path / "data" / f"{i:02}.{'png' if i % 4 == 0 else 'jpg'}")
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


SMALL = Preprocess(size=(16, 16))
ALL = AugmentConfig(shift=2, policy="randaugment", jitter=0.2, erase=0.5, mixup=0.4, cutmix=1.0)
THREADS, PROCESSES = Reading(decoders="threads"), Reading(decoders="processes")


def digest(batches: Iterable[Batch]) -> list[str]:
    """Of each batch, all that is in it."""
    return [
        hashlib.sha256(
            batch.images.numpy().tobytes()
            + batch.targets["classes"].numpy().tobytes()
            + bytes(batch.indices)
        ).hexdigest()
        for batch in batches
    ]


def joined(parts: Iterable[Batch]) -> Batch:
    rows = [(part.images, part.targets["classes"], part.indices) for part in parts]
    images, targets, indices = zip(*rows, strict=True)
    return labelled(torch.cat(images), torch.cat(targets), np.concatenate(indices))


def loader(source: Any, augment: AugmentConfig = ALL, **options: Any) -> TrainLoader:
    options = {"batch_size": 8, "seed": 3, "max_unreadable": 0.9, **options}
    return TrainLoader(source, SMALL, augment, **options)


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_nothing_but_the_config_decides_what_a_batch_is(folder: Path, decode: Any) -> None:
    def made(**how: Any) -> list[str]:
        reading = Reading(**{"decoders": "threads", "decode": decode, **how.pop("reading", {})})
        train = loader(Files(folder), reading=reading, batch_size=4, **how)
        return [digest(train.epoch(epoch)) for epoch in (0, 1)]

    expected = made(workers=1)
    assert len({one for epoch in expected for one in epoch}) == 6
    for cache in ("memory", "disk", "none"):
        assert made(reading={"cache": cache}) == expected
    assert made(workers=4) == expected
    assert made(workers=2, reading={"decoders": "processes", "cache": "none"}) == expected
    assert made(reading={"decoders": "processes", "cache": "disk"}) == expected


def test_a_resumed_epoch_goes_on_with_the_batches_that_are_left(folder: Path) -> None:
    train = loader(Files(folder), batch_size=2)
    whole = digest(train.epoch(5))
    for first in range(7):
        assert digest(loader(Files(folder), batch_size=2).epoch(5, first)) == whole[first:]


@pytest.mark.parametrize("damaged", [(), (0, 3, 7, 8)])
@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.0, "cutmix": 0.0}])
def test_processes_share_each_batch(
    folder: Path, mixing: dict[str, float], damaged: tuple[int, ...]
) -> None:
    for i in damaged:
        Files(folder).files[i].write_bytes(b"damaged")
    augment = replace(ALL, **mixing)
    for epoch, size in product((0, 1), (1, 2, 4)):
        alone = loader(Files(folder), augment, batch_size=8).epoch(epoch)
        parts = [
            loader(Files(folder), augment, batch_size=8, part=(rank, size)).epoch(epoch)
            for rank in range(size)
        ]
        for whole, *own in zip(alone, *parts, strict=True):
            both = joined(own)
            assert (both.indices == whole.indices).all() and len(whole.indices) <= 8
            assert torch.equal(both.images, whole.images)
            assert torch.equal(both.targets["classes"], whole.targets["classes"])


def test_a_batch_that_cannot_be_shared_says_which_could(folder: Path) -> None:
    source, plain = Files(folder), AugmentConfig()
    with pytest.raises(UsageError, match=r"a batch of 8 .* by 3 processes: .*batch_size to 6 or 9"):
        loader(source, plain, part=(0, 3))
    with pytest.raises(UsageError, match=r"shared evenly in pairs, .* set data\.batch_size to 8$"):
        loader(source, ALL, batch_size=4, part=(0, 4))
    with pytest.raises(UsageError, match=r"a batch of 12 .*set data\.batch_size to 10$"):
        loader(source, plain, batch_size=64, part=(0, 5))
    with pytest.raises(UsageError, match="there are only 12 images, so take fewer processes"):
        loader(source, plain, batch_size=64, part=(0, 13))
    with pytest.raises(UsageError, match=r"part \(2, 2\)"):
        loader(source, plain, part=(2, 2))
    assert loader(source, plain, part=(0, 4)).share == 2


@settings(max_examples=200, deadline=None)
@given(
    images=st.integers(1, 60),
    batch=st.integers(1, 80),
    size=st.integers(1, 9),
    mixing=st.booleans(),
)
def test_the_batch_sizes_that_are_advised_work(
    images: int, batch: int, size: int, mixing: bool
) -> None:
    class Blank:
        classes = ("a",)
        targets = np.zeros(images, np.int64)

        def __len__(self) -> int:
            return images

    augment = AugmentConfig(mixup=0.2 if mixing else 0.0)

    def train(batch: int) -> TrainLoader:
        options: Any = {"batch_size": batch, "seed": 0, "part": (0, size)}
        return TrainLoader(Blank(), SMALL, augment, **options)  # type: ignore[arg-type]

    try:
        assert train(batch).share * size == min(batch, images)
    except UsageError as error:
        advice = str(error).partition("batch_size to ")[2]
        for other in advice.split(" or ") if advice else ():
            assert train(int(other)).share * size == int(other)


def test_every_image_is_evaluated_by_one_process(folder: Path) -> None:
    Files(folder).files[4].write_bytes(b"damaged")
    (whole,) = EvalLoader(Files(folder), SMALL)
    for size, batch_size in product((1, 2, 5, 13), (1, 4, 64)):
        loaders = [
            EvalLoader(Files(folder), SMALL, batch_size=batch_size, part=(rank, size))
            for rank in range(size)
        ]
        for _ in range(2):  # from the files, then from memory
            passes = [list(each) for each in loaders]
            if size > 1:  # all take the same number of steps
                assert {len(batches) for batches in passes} == {len(loaders[0])}
            together = joined(batch for batches in passes for batch in batches)
            assert (together.indices == whole.indices).all()
            assert torch.equal(together.images, whole.images)
        assert [key for each in loaders for key in each.skipped] == ["04.png"]


# Images that cannot be read


def test_a_batch_without_images_keeps_its_place(folder: Path) -> None:
    order = [batch.indices.tolist() for batch in loader(Files(folder), batch_size=2).epoch(0)]
    for i in order[2]:
        Files(folder).files[i].write_bytes(b"damaged")
    train = loader(Files(folder), batch_size=2)
    found = list(train.epoch(0))
    assert [batch.indices.tolist() for batch in found] == [*order[:2], [], *order[3:]]
    assert found[2].images.shape == (0, 3, 16, 16) and found[2].targets["classes"].shape == (0, 2)
    assert digest(loader(Files(folder), batch_size=2).epoch(0, first=3)) == digest(found[3:])
    assert len(train.skipped) == 2


def test_too_many_are_judged_by_each_process_for_its_share(folder: Path) -> None:
    for i in (1, 2, 3):
        Files(folder).files[i].write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"3 of 12 images cannot be read, more than the 20% "):
        list(loader(Files(folder), max_unreadable=0.2).epoch(0))
    list(loader(Files(folder), max_unreadable=0.25).epoch(0))
    train = loader(Files(folder), max_unreadable=0.25)
    train.leave_out({"other": "why", "another": "why", "one more": "why"})
    with pytest.raises(DataError, match="4 of 12"):
        train.leave_out({"the fourth": "why"})
    # In many epochs each of two processes comes to see all of the images, and all of the damage.
    for rank in (0, 1):
        train = loader(Files(folder), max_unreadable=0.5, batch_size=4, part=(rank, 2))
        for epoch in range(12):
            list(train.epoch(epoch))
        assert len(train.skipped) == 3


def test_images_that_vanish_or_change_during_training(folder: Path) -> None:
    """D6: they are left out, counted, and at last too many; nothing is ever written there."""
    source = Files(folder)
    train = loader(source, batch_size=4, max_unreadable=0.2, reading=Reading(cache="none"))
    batches = train.epoch(0)
    next(batches)
    source.files[0].unlink()
    source.files[1].write_bytes(b"replaced")
    list(batches)
    list(train.epoch(1))
    assert set(train.skipped) == {"00.png", "01.jpg"}
    source.files[2].unlink()
    with pytest.raises(DataError, match=r"3 of 12 .*(\n.*)*02\.jpg: .*no such file"):
        list(train.epoch(2))
        list(train.epoch(3))


@pytest.fixture
def breakable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes that the names of files can bring down."""

    def shared(count: int, seconds: float) -> Workers:
        return Workers(count, seconds=seconds, task=faulty.decode)

    monkeypatch.setattr(module, "shared_workers", shared)


@pytest.mark.usefixtures("breakable")
def test_a_decoder_that_dies_or_hangs_costs_its_image(folder: Path) -> None:
    """T11 and D8: the epoch goes on, with the very same batches but for the images at fault."""
    fine = Files(folder).files[1]
    for name in ("signal-11.jpg", "exit-1.jpg", "sleep-1.jpg"):
        (folder / name).write_bytes(fine.read_bytes())
    source, plain = Files(folder), AugmentConfig(policy="randaugment")
    faults = {i for i in range(len(source)) if "-" in source.key(i)}
    reading = replace(PROCESSES, image_seconds=2.0)
    train = loader(source, plain, batch_size=5, reading=reading)
    workers = train._shelf.reader._workers
    assert workers is not None
    left: list[int] = []
    for epoch in (0, 1):
        expected = loader(Files(folder), plain, batch_size=5, reading=THREADS).epoch(epoch)
        for found, whole in zip(train.epoch(epoch), expected, strict=True):
            good = ~np.isin(whole.indices, list(faults))
            assert (found.indices == whole.indices[good]).all()
            assert torch.equal(found.images, whole.images[torch.from_numpy(good)])
        assert epoch == 0 or workers.pids == left  # what was given up is not tried again
        left = workers.pids
    assert set(train.skipped) == {"signal-11.jpg", "exit-1.jpg", "sleep-1.jpg"}
    assert "its decoder crashed (signal 11)" in train.skipped["signal-11.jpg"]
    assert "it took longer than 2 s to read" in train.skipped["sleep-1.jpg"]


@pytest.mark.usefixtures("breakable")
def test_workers_killed_at_any_time_change_nothing(folder: Path) -> None:
    expected = digest(loader(Files(folder), batch_size=4).epoch(0))
    train = loader(Files(folder), batch_size=4, reading=replace(PROCESSES, cache="none"))
    workers = train._shelf.reader._workers
    assert workers is not None
    found = []
    for killed, batch in enumerate(train.epoch(0)):
        found += digest([batch])
        for pid in workers.pids[:killed]:
            os.kill(pid, 9)
    assert found == expected and not train.skipped


@pytest.mark.slow
@pytest.mark.usefixtures("breakable")
def test_fifty_workers_killed_at_random_times(folder: Path) -> None:
    """T11: one a batch, for an image is tried twice."""
    chance = random.Random(0)
    reading = replace(PROCESSES, cache="none")
    train = loader(Files(folder), batch_size=6, reading=reading)
    workers = train._shelf.reader._workers
    assert workers is not None
    hit = 0

    def strike() -> None:
        nonlocal hit
        for pid in chance.sample(workers.pids, min(1, len(workers.pids))):
            with suppress(ProcessLookupError):
                os.kill(pid, chance.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT]))
                hit += 1

    for epoch in count():
        expected = digest(loader(Files(folder), batch_size=6).epoch(epoch))
        batches, found = train.epoch(epoch), []
        for _ in range(2):
            striking = threading.Timer(chance.uniform(0, 0.05), strike)
            striking.start()
            found += digest([next(batches)])
            striking.join()
        assert found == expected
        if hit >= 50:
            break
    assert not train.skipped


@pytest.mark.usefixtures("breakable")
def test_an_epoch_that_is_left_waits_for_no_decoder(folder: Path) -> None:
    (folder / "00.png").rename(folder / "sleep-0.png")
    source = Files(folder)
    hanging = source.files.index(folder / "sleep-0.png")
    epoch = next(e for e in count() if keyed.permutation(3, e, len(source))[1] == hanging)
    reading = replace(PROCESSES, image_seconds=3600.0)
    # Beside a GPU, batches are made ahead.
    train = loader(source, OFF, batch_size=1, reading=reading, device="meta")
    batches = cast(Generator[Batch], train.epoch(epoch))
    next(batches)
    leave = threading.Thread(target=batches.close, daemon=True)
    leave.start()
    leave.join(60)
    assert not leave.is_alive()


def test_processes_decode_files_that_are_not_few(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoders(source: Any, **how: Any) -> bool:
        return loader(source, OFF, reading=Reading(**how))._shelf.reader._workers is not None

    assert not decoders(Files(folder))
    assert decoders(Files(folder), decoders="processes")
    monkeypatch.setattr(module, "_FEW", 12)
    assert decoders(Files(folder))
    assert not decoders(Files(folder), decoders="threads")
    assert not decoders(Oblong(), decoders="processes")  # in memory
    with pytest.raises(UsageError, match=r"unknown decoders 'process': did you mean 'processes'"):
        Reading(decoders="process")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="image_seconds must be above 0"):
        Reading(image_seconds=0)


def test_evaluation_is_the_same_in_processes_and_from_the_disk(folder: Path) -> None:
    expected = digest(EvalLoader(Files(folder), SMALL, batch_size=5))
    for cache, decoders in product(("none", "memory", "disk"), ("threads", "processes")):
        reading = Reading(cache=cache, decoders=decoders, decode="fast")  # type: ignore[arg-type]
        each = EvalLoader(Files(folder), SMALL, batch_size=5, reading=reading)
        assert digest(each) == digest(each) == expected


# The cache on the disk


def test_what_was_decoded_once_serves_later_runs(folder: Path, cache_folder: Path) -> None:
    before = {file: file.read_bytes() for file in folder.iterdir()}
    told: list[str] = []
    reading = Reading(cache="disk", decoders="threads")
    first, second = Files(folder), Files(folder)
    expected = digest(loader(first, batch_size=12, reading=reading, notify=told.append).epoch(0))
    assert len(first.loaded) == 12
    file = pixels_file(cache_folder)
    assert told == [f"decoded images take {size_text(file.stat().st_size)} in {file}"]
    again = loader(second, batch_size=12, reading=reading, notify=told.append)
    assert digest(again.epoch(0)) == expected
    assert not second.loaded and len(told) == 2
    for change in ({"size": (20, 20)}, {"mean": (0.5,), "std": (0.5,)}):
        other = TrainLoader(
            second, replace(SMALL, **change), OFF, batch_size=12, seed=0, reading=reading
        )  # fmt: skip
        list(other.epoch(0))
        assert len(second.loaded) == 12
        second.loaded.clear()
    os.utime(second.files[0], ns=(1, 1))
    list(loader(second, batch_size=12, reading=reading).epoch(0))
    assert len(second.loaded) == 12
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def pixels_file(cache_folder: Path) -> Path:
    (file,) = (cache_folder / "decoded").glob("*.pixels")
    return file


@pytest.mark.parametrize("ending", ["pixels", "index"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_damage_to_the_cache_is_seen(
    tmp_path_factory: pytest.TempPathFactory, ending: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("data")
    for i in range(2):
        photo(i, 20, 20).save(folder / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITRAIL_CACHE", str(tmp_path_factory.mktemp("cache")))
        reading = Reading(cache="disk", decoders="threads")
        expected = digest(loader(Files(folder), reading=reading).epoch(0))
        file = pixels_file(Path(os.environ["VITRAIL_CACHE"])).with_suffix(f".{ending}")
        content = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content = content[:at]
        else:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
        for _ in range(2):
            assert digest(loader(Files(folder), reading=reading).epoch(0)) == expected
        last = Files(folder)
        assert digest(loader(last, reading=reading).epoch(0)) == expected
        assert not last.loaded  # it was mended


def test_several_may_write_at_once(folder: Path, cache_folder: Path) -> None:
    reading = Reading(cache="disk", decoders="threads")
    expected = digest(loader(Files(folder), batch_size=2).epoch(0))
    runs = [loader(Files(folder), batch_size=2, reading=reading).epoch(0) for _ in range(4)]
    for _ in range(6):
        assert len({digest([next(run)])[0] for run in runs}) == 1
    last = Files(folder)
    assert digest(loader(last, batch_size=2, reading=reading).epoch(0)) == expected
    assert not last.loaded


def test_a_full_disk_costs_time_only(
    folder: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    reading = Reading(cache="disk", decoders="threads")
    expected = digest(loader(Files(folder), batch_size=2).epoch(0))
    train = loader(Files(folder), batch_size=2, reading=reading, notify=told.append)
    batches = train.epoch(0)
    found = digest([next(batches), next(batches)])
    monkeypatch.setattr("vitrail.data.pixels.cache.LEAVE_FREE", 2**62)
    train._shelf.cache._unlooked = 2**40  # type: ignore[union-attr]
    assert found + digest(batches) == expected
    assert any("are not kept on the disk any more (only" in sentence for sentence in told)
    assert len([sentence for sentence in told if "any more" in sentence]) == 1
    last = Files(folder)
    assert digest(loader(last, batch_size=2, reading=reading).epoch(0)) == expected
    assert len(last.loaded) == 8


def test_a_cache_folder_that_cannot_be_written(folder: Path, cache_folder: Path) -> None:
    cache_folder.write_text("a file is in the way")
    told: list[str] = []
    reading = Reading(cache="disk", decoders="threads")
    expected = digest(loader(Files(folder)).epoch(0))
    train = loader(Files(folder), reading=reading, notify=told.append)
    assert digest(train.epoch(0)) == expected
    (sentence,) = told
    assert sentence.startswith(f"decoded images cannot be kept in {cache_folder / 'decoded'}: ")


# Fast decoding and cropping


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_fast_views_are_nearly_the_exact_ones(tmp_path: Path, interpolation: Any) -> None:
    for i in range(4):
        photo(i, 500, 400).save(tmp_path / f"{i}.jpg", quality=90)
    preprocess = replace(SMALL, size=(64, 64), interpolation=interpolation)
    exact, fast = (
        TrainLoader(
            Files(tmp_path), preprocess, AugmentConfig(), batch_size=4, seed=0,
            reading=Reading(decode=decode, decoders="threads"),
        )
        for decode in ("exact", "fast")
    )  # fmt: skip
    for epoch in range(5):
        (a,), (b,) = exact.epoch(epoch), fast.epoch(epoch)
        assert (a.indices == b.indices).all()
        assert ((a.images - b.images).abs().mean() * 127.5).item() < 2  # of 255 grey levels


@pytest.mark.parametrize("change", [{"resize": "pad"}, {"interpolation": "lanczos"}])
def test_what_torch_does_not_do_is_done_by_pillow(folder: Path, change: dict[str, Any]) -> None:
    preprocess = replace(SMALL, size=(80, 80), **change)  # so large that nothing is reduced
    both = [
        TrainLoader(
            Files(folder), preprocess, AugmentConfig(), batch_size=12, seed=0,
            reading=Reading(decode=decode, decoders="threads"),
        )
        for decode in ("exact", "fast")
    ]  # fmt: skip
    assert digest(both[0].epoch(0)) == digest(both[1].epoch(0))
