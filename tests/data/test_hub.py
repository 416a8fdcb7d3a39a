"""Hugging Face data sets, local ones: whole and as streams. Nothing here needs a network."""

import io
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrail.data import UnreadableImage, open_data, open_splits, open_streamed
from vitrail.data.sources.csvfile import Columns
from vitrail.data.sources.hub import HubSource, open_streams, place_of
from vitrail.data.sources.source import LeftOut, PartedSource
from vitrail.data.sources.stream import (
    Label,
    Position,
    Streamed,
    StreamSettings,
    StreamSource,
    joined,
)
from vitrail.data.sources.write_shards import encoded_image, write_shards
from vitrail.errors import DataError, UsageError

datasets: Any = pytest.importorskip("datasets", reason="needs the extra `data`")
huggingface_hub: Any = pytest.importorskip("huggingface_hub")


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Caches of our own, and a list of whom anything tried to reach."""
    asked: list[str] = []

    def refused(host: str, *_: object, **__: object) -> None:
        asked.append(str(host))
        raise socket.gaierror(socket.EAI_NONAME, "no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: refused(address))
    for proxy in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.lower(), raising=False)
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    return asked


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


NAMES = ["cat", "dog", "owl"]


def table(rows: int, start: int = 0, label: Any = None, **columns: list[Any]) -> Any:
    """A table of `rows` images; `columns` are more, or the label of another type."""
    features = {"image": datasets.Image()}
    content: dict[str, list[Any]] = {
        "image": [{"bytes": picture(start + i), "path": None} for i in range(rows)]
    }
    if label is not None or not columns:
        features["label"] = label or datasets.ClassLabel(names=NAMES)
        content["label"] = [(start + i) % 3 for i in range(rows)]
    made = datasets.Dataset.from_dict(content, features=datasets.Features(features))
    for name, values in columns.items():
        made = made.add_column(name, values)
    return made


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Three files for training and one for validation, as the hub has them."""
    folder = tmp_path / "beans"
    folder.mkdir()
    for i, size in enumerate((7, 5, 6)):
        table(size, 10 * i).to_parquet(folder / f"train-{i:05}-of-00003.parquet")
    table(4, 100).to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder


def contents(source: PartedSource) -> list[bytes]:
    return [encoded_image(source, i)[1] for i in range(len(source))]


# Whole


@pytest.mark.parametrize("name", ["{}", "hf:{}", "hf:parquet:{}"])
def test_parquet_files(parquet: Path, name: str, no_network: list[str]) -> None:
    source = open_data(name.format(parquet))
    assert source.targets.names == tuple(NAMES)
    assert source.part.tolist() == [0] * 18 + [1] * 4
    assert source.targets.values.tolist() == [
        (s + i) % 3 for s, n in ((0, 7), (10, 5), (20, 6), (100, 4)) for i in range(n)
    ]
    assert [source.key(i) for i in (0, 17, 18)] == ["train/0", "train/17", "validation/0"]
    seeds = [*range(7), *range(10, 15), *range(20, 26), *range(100, 104)]
    assert contents(source) == [picture(seed) for seed in seeds]
    assert source.load(0).mode == "RGB" and source.load(0).size == (5, 6)
    assert no_network == []
    splits = open_splits(name.format(parquet), seed=0)
    assert (len(splits.train), len(splits.val)) == (18, 4)


def test_what_save_to_disk_wrote(tmp_path: Path, no_network: list[str]) -> None:
    made = datasets.DatasetDict({"train": table(5), "test": table(2, 50), "extra": table(1)})
    made.save_to_disk(tmp_path / "saved")
    source = open_data(tmp_path / "saved")
    assert source.part.tolist() == [0] * 5 + [2] * 2
    assert [(one.kind, one.count, one.examples) for one in source.left_out] == [
        ("splits", 1, ("extra",))
    ]
    assert contents(source) == [picture(seed) for seed in (0, 1, 2, 3, 4, 50, 51)]
    table(3).select([2, 0]).save_to_disk(tmp_path / "one")
    source = open_data(f"hf:{tmp_path / 'one'}")
    assert contents(source) == [picture(2), picture(0)]
    assert source.targets.values.tolist() == [2, 0] and source.part.tolist() == [0, 0]
    assert no_network == []


def test_a_folder_of_images(tmp_path: Path) -> None:
    for i, name in enumerate(("cat/1.png", "cat/2.png", "dog/3.png")):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(picture(i))
    source = open_data(f"hf:imagefolder:{tmp_path / 'data'}")
    assert source.targets.names == ("cat", "dog") and source.targets.values.tolist() == [0, 0, 1]
    assert contents(source) == [picture(i) for i in range(3)]
    before = source.stamp(0), source.stamp(1)
    (tmp_path / "data/cat/1.png").unlink()
    assert (source.stamp(0) == before[0], source.stamp(1) == before[1]) == (False, True)
    with pytest.raises(UnreadableImage, match="train/0: no such file"):
        source.load(0)


def test_our_shards_are_read_by_the_library(parquet: Path, tmp_path: Path) -> None:
    source = open_data(parquet)
    write_shards(source, tmp_path / "out", images=4)
    found = open_data(f"hf:webdataset:{tmp_path / 'out'}")
    ours = open_data(tmp_path / "out")
    assert sorted(contents(found)) == sorted(contents(source)) and contents(ours) == contents(
        source
    )
    expected = dict(zip(contents(source), source.targets.values.tolist(), strict=True))
    assert dict(zip(contents(found), found.targets.values.tolist(), strict=True)) == expected


def test_a_source_goes_to_other_processes(parquet: Path) -> None:
    source = open_data(parquet)
    again = pickle.loads(pickle.dumps(source))
    assert contents(again) == contents(source)
    assert [again.stamp(i) for i in (0, 20)] == [source.stamp(i) for i in (0, 20)]
    assert source.stamp(0) != source.stamp(1)


def test_test_images_without_a_label_are_left_out(tmp_path: Path) -> None:
    column = [0, -1, 2, None]
    made = table(4, label=datasets.ClassLabel(names=NAMES)).remove_columns("label")
    made = made.add_column("label", column, feature=datasets.ClassLabel(names=NAMES))
    made.save_to_disk(tmp_path / "saved")
    source = open_data(tmp_path / "saved")
    assert [source.key(i) for i in range(len(source))] == ["train/0", "train/2"]
    assert source.left_out == (LeftOut("rows", 2, "they have no label", ("train/1", "train/3")),)


@pytest.mark.parametrize(
    "values, classes, targets",
    [
        (["b", "a", " b "], ("a", "b"), [1, 0, 1]),
        ([10, 9, 10], ("9", "10"), [1, 0, 1]),
        ([True, False, True], ("False", "True"), [1, 0, 1]),
        ([["a", "b"], [], ["b"]], ("a", "b"), [[1, 1], [0, 0], [0, 1]]),
    ],
)
def test_labels_that_are_no_classes_of_the_library(
    tmp_path: Path, values: list[Any], classes: tuple[str, ...], targets: list[Any]
) -> None:
    table(3, label=None, kind=values).save_to_disk(tmp_path / "saved")
    source = open_data(tmp_path / "saved", Columns(None, "kind", None))
    assert (source.targets.names, source.targets.values.tolist()) == (classes, targets)


def test_plain_parquet_that_does_not_say_what_an_image_is(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [picture(0), picture(1), None]
    for name, column in (
        ("bytes", images),
        ("struct", [{"bytes": content, "path": "x.png"} for content in images]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        pq.write_table(pa.table({"photo": column, "label": ["a", "b", "a"]}), folder / "x.parquet")
        source = open_data(folder)
        assert source.load(1).tobytes() == Image.open(io.BytesIO(picture(1))).tobytes()
        if name == "bytes":
            assert isinstance(source, HubSource) and source.encoded(2) is None
            with pytest.raises(UnreadableImage, match="train/2: its row holds no image"):
                source.load(2)


@pytest.mark.parametrize(
    "columns, message",
    [
        (Columns("photo", None, None), r"no column 'photo': it has image, label, other"),
        (Columns(None, "kind", None), r"no column 'kind': it has image, label, other"),
        (Columns(None, "other", None), r"'other' of .* is float64: labels are classes"),
        (Columns(None, None, "part"), r"has splits of its own"),
    ],
)
def test_columns_that_cannot_be(tmp_path: Path, columns: Columns, message: str) -> None:
    made = table(2).add_column("other", [0.5, 1.5])
    made.save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match=message):
        open_data(tmp_path / "saved", columns)


def test_a_column_that_is_not_clear_must_be_named(tmp_path: Path) -> None:
    made = table(2, coarse=[0, 1], fine=[1, 0])
    for name in ("coarse", "fine"):
        made = made.cast_column(name, datasets.ClassLabel(names=["a", "b"]))
    made.save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match=r"which column .* holds the label\? .*data.label_column"):
        open_data(tmp_path / "saved")
    assert open_data(tmp_path / "saved", Columns(None, "fine")).targets.values.tolist() == [1, 0]


def test_an_image_that_cannot_be_decoded_is_unreadable(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": b"no image", "path": "hf://datasets/x/y.png"}] * 2,
            "label": ["a", "b"],
        }
    ).cast_column("image", datasets.Image())
    made.save_to_disk(tmp_path / "saved")
    source = open_data(tmp_path / "saved")
    with pytest.raises(UnreadableImage, match=r"train/0: its content is none of the formats"):
        source.load(0)


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("hf:parquet:/no/such/folder", DataError, "no such file or folder: /no/such/folder"),
        ("hf:/no/such/folder", UsageError, "neither a local file or folder, nor a name"),
        ("hf:a/b/c", UsageError, "neither a local file or folder, nor a name"),
        ("hf:", UsageError, "neither a local file or folder, nor a name"),
        ("hf-stream:owner/name", UsageError, "read in any order, as hf:owner/name"),
    ],
)
def test_names_that_cannot_be(
    name: str, kind: type[Exception], message: str, no_network: list[str]
) -> None:
    with pytest.raises(kind, match=message):
        open_data(name)
    assert no_network == []


@pytest.mark.parametrize("name", ["hf:owner/name", "hf:name:config@main"])
def test_without_a_network_the_message_says_what_works(name: str, no_network: list[str]) -> None:
    with pytest.raises(DataError, match=r"cannot reach .* on the Hugging Face hub.*save_to_disk"):
        open_data(name)
    assert no_network == ["huggingface.co"]
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("name", ["", "owner/name"])
def test_the_library_is_for_others_as_they_have_set_it(
    name: str, parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a set is opened, and after it, or after an error."""
    settings = {
        "HF_HUB_OFFLINE": (datasets.config, huggingface_hub.constants),
        "HF_UPDATE_DOWNLOAD_COUNTS": (datasets.config,),
    }
    seen: list[list[bool]] = []

    def look() -> None:
        seen.append([bool(getattr(m, name)) for name, modules in settings.items() for m in modules])

    def open_as_usual(*args: Any, **named: Any) -> Any:
        look()
        other = threading.Thread(target=look)
        other.start()
        other.join()
        return usual(*args, **named)

    usual = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", open_as_usual)
    datasets.enable_progress_bars()
    with nullcontext() if not name else pytest.raises(DataError):
        open_data(f"hf:{name or parquet}")
    look()
    assert seen == [[True, True, False], [False, False, True], [False, False, True]]
    assert datasets.config.HF_HUB_OFFLINE is huggingface_hub.constants.HF_HUB_OFFLINE is False
    assert not datasets.are_progress_bars_disabled()


def test_damaged_files_are_one_message(parquet: Path) -> None:
    file = parquet / "train-00001-of-00003.parquet"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"cannot open .* by the library datasets"):
        open_data(parquet)


def test_the_library_is_imported_for_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").mkdir()
    for name in ("cat/1.png", "dog/1.png"):
        (tmp_path / name).write_bytes(picture(0))
    code = (
        "import sys; from vitrail.data import open_data; open_data(sys.argv[1]); "
        "print([m for m in ('datasets', 'pyarrow', 'pandas', 'huggingface_hub', 'torch') "
        "if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# Streams


class Shards:
    """Shards in memory, that count what is read."""

    def __init__(self, *sizes: int, unlabelled: int = 0) -> None:
        self.sizes = sizes
        self.unlabelled = unlabelled
        self.opened: list[tuple[int, int]] = []
        self.read_images = 0

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, shard: int, start: int) -> Iterator[tuple[bytes, Label | None]]:
        self.opened.append((shard, start))
        for i in range(start, self.sizes[shard]):
            self.read_images += 1
            is_labelled = not self.unlabelled or (shard + i) % self.unlabelled
            yield f"{shard}.{i}".encode(), (shard % 3 if is_labelled else None)


def stream(*sizes: int, unlabelled: int = 0, **how: Any) -> StreamSource:
    how = {"seed": 0, "lanes": 3, "buffer": 12} | how
    return StreamSource(Shards(*sizes, unlabelled=unlabelled), ("a", "b", "c"), **how)


def streamed(name: str, part: str = "train", **how: Any) -> StreamSource:
    """One part of a Hugging Face data set."""
    return open_streams(name, Columns(), seed=0, settings=StreamSettings(**how)).parts[part]


def drawn(source: StreamSource, n: int, part: tuple[int, int] = (0, 1)) -> list[Streamed]:
    return list(islice(source.reader(part), n))


SIZES = (5, 9, 4, 7, 1, 6, 8, 3, 5)


def test_one_lane_shows_every_image_once_a_pass_in_another_order() -> None:
    n = sum(SIZES)
    images = drawn(stream(*SIZES, lanes=1, buffer=10), 3 * n)
    passes = [[image.content for image in images[i * n : (i + 1) * n]] for i in range(3)]
    everything = sorted(f"{s}.{i}".encode() for s, size in enumerate(SIZES) for i in range(size))
    assert all(sorted(one) == everything for one in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert [image.number for image in images] == list(range(3 * n))
    assert all(image.key.replace("/", ".").encode() == image.content for image in images)


def test_lanes_of_as_many_images_show_every_image_once_a_pass() -> None:
    images = drawn(stream(*[5] * 6), 2 * 30)
    for one in (images[:30], images[30:]):
        assert len({image.key for image in one}) == 30


def test_the_order_is_shuffled_and_is_the_seeds() -> None:
    orders = [[i.key for i in drawn(stream(*[20] * 6, seed=s), 120)] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    # Neighbours in a shard are not neighbours in the stream.
    near = sum(
        a.split("/")[0] == b.split("/")[0] for a, b in zip(orders[0], orders[0][3:], strict=False)
    )
    assert near < 120
    in_blocks = [int(key.split("/")[1]) for key in orders[0][::3]][:20]
    assert in_blocks != sorted(in_blocks)


@pytest.mark.parametrize("lanes, parts", [(1, 2), (3, 1), (3, 2), (3, 3), (4, 2), (4, 4), (9, 5)])
def test_all_processes_together_see_the_one_stream(lanes: int, parts: int) -> None:
    whole = drawn(stream(*SIZES, lanes=lanes), 30 * parts)
    shares = [drawn(stream(*SIZES, lanes=lanes), 30, (i, parts)) for i in range(parts)]
    assert [image for images in zip(*shares, strict=True) for image in images] == whole


def test_a_process_reads_its_own_lanes_only() -> None:
    source = stream(*[10] * 8, lanes=4, buffer=8)
    drawn(source, 15, (1, 4))
    shards = source.shards
    assert isinstance(shards, Shards) and shards.read_images <= 15 + 2 * 2 + 1


def resumed(source: StreamSource, position: Position, part: tuple[int, int]) -> Any:
    reader = source.reader(part)
    reader.seek(json.loads(json.dumps(position)))
    return reader


@pytest.mark.parametrize("how", [{}, {"lanes": 1}, {"lanes": 9, "buffer": 1}, {"unlabelled": 3}])
def test_a_stream_goes_on_from_every_position(how: dict[str, int]) -> None:
    whole = drawn(stream(*SIZES, **how), 150)
    reader = stream(*SIZES, **how).reader()
    for at in range(120):
        position = reader.position()
        again = resumed(stream(*SIZES, **how), position, (0, 1))
        assert again.position() == position
        assert list(islice(again, 25)) == whole[at : at + 25]
        assert next(reader) == whole[at]


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 3), (3, 2), (3, 6), (6, 1)])
def test_a_stream_goes_on_with_another_number_of_processes(before: int, after: int) -> None:
    whole = drawn(stream(*SIZES), 120)
    at = 36
    readers = [stream(*SIZES).reader((i, before)) for i in range(before)]
    for reader in readers:
        list(islice(reader, at // before))
    position = joined([reader.position() for reader in readers])
    assert position == joined([resumed(stream(*SIZES), position, (0, 1)).position()])
    n = 60 // after
    shares = [list(islice(resumed(stream(*SIZES), position, (i, after)), n)) for i in range(after)]
    assert [i for images in zip(*shares, strict=True) for i in images] == whole[at : at + 60]


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.integers(0, 8), min_size=1, max_size=6).filter(any),
    lanes=st.integers(1, 7),
    buffer=st.integers(1, 20),
    unlabelled=st.sampled_from([0, 2, 3]),
    at=st.integers(0, 60),
    parts=st.integers(1, 4),
)
def test_any_stream_goes_on_as_it_would_have(
    sizes: list[int], lanes: int, buffer: int, unlabelled: int, at: int, parts: int
) -> None:
    how = {"lanes": lanes, "buffer": buffer, "unlabelled": unlabelled}
    try:
        whole = drawn(stream(*sizes, **how), (at + 20) * parts)
    except DataError:
        return  # no image with a label
    readers = [stream(*sizes, **how).reader((i, parts)) for i in range(parts)]
    for reader in readers:
        list(islice(reader, at))
    position = joined([reader.position() for reader in readers])
    shares = [
        list(islice(resumed(stream(*sizes, **how), position, (i, parts)), 20)) for i in range(parts)
    ]
    assert [i for images in zip(*shares, strict=True) for i in images] == whole[at * parts :]


def test_to_seek_reads_one_shard_again_at_most() -> None:
    reader = stream(*[50] * 9, lanes=3, buffer=30).reader()
    list(islice(reader, 200))
    again = stream(*[50] * 9, lanes=3, buffer=30)
    resumed(again, reader.position(), (0, 1))
    shards = again.shards
    assert isinstance(shards, Shards)
    assert len(shards.opened) <= 2 * 3 and shards.read_images <= 3 * 11


def test_a_position_of_another_stream_is_refused() -> None:
    position = stream(*SIZES).reader().position()
    for how in ({"seed": 1}, {"lanes": 2}, {"buffer": 99}, {"stamp": "new"}):
        with pytest.raises(DataError, match=r"not the one that was saved: .* was .*, is "):
            resumed(stream(*SIZES, **how), position, (0, 1))
    with pytest.raises(DataError, match="shards was 9, is 4"):
        resumed(stream(*SIZES[:4]), position, (0, 1))
    bad: Any
    for bad in (
        {},
        position | {"lanes": {}},
        position | {"drawn": "x"},
        position | {"lanes": {"0": [0, 0, 0, -1], "1": [0] * 4, "2": [0] * 4}},
        position | {"lanes": {"0": [0, 0, 0], "1": [0] * 4, "2": [0] * 4}},
    ):
        with pytest.raises(DataError, match="saved position"):
            resumed(stream(*SIZES), bad, (0, 1))
    with pytest.raises(DataError, match="other images than when its position was saved"):
        resumed(
            stream(*SIZES), position | {"lanes": {str(i): [0, 0, 99, 3] for i in range(3)}}, (0, 1)
        )
    with pytest.raises(DataError, match="none of 2 processes"):
        resumed(stream(*SIZES), position | {"drawn": 3}, (0, 2))


@pytest.mark.parametrize("sizes, how", [((), {}), ((0, 0), {}), ((3,), {"unlabelled": 1})])
def test_streams_without_images(sizes: tuple[int, ...], how: dict[str, int]) -> None:
    with pytest.raises(DataError, match="no image"):
        drawn(stream(*sizes, **how), 1)


def test_numbers_of_a_stream_that_cannot_be() -> None:
    for how in ({"lanes": 0}, {"buffer": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            stream(3, **how)
    for part in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(UsageError, match="which, of how many"):
            stream(3).reader(part)


def test_a_streamed_data_set_has_its_images_and_goes_on(
    parquet: Path, no_network: list[str]
) -> None:
    def opened() -> StreamSource:
        return streamed(str(parquet), lanes=3, buffer=6)

    source = opened()
    assert (source.targets.names, source.targets.several) == (tuple(NAMES), False)
    whole = drawn(source, 40)
    assert {i.content: i.label for i in whole} == {
        picture(s + i): (s + i) % 3 for s, n in ((0, 7), (10, 5), (20, 6)) for i in range(n)
    }
    reader = source.reader()
    list(islice(reader, 11))
    assert list(islice(resumed(opened(), reader.position(), (0, 1)), 9)) == whole[11:20]
    held = streamed(str(parquet), "val").sample(99)
    found = {held.encoded(i): label for i, label in enumerate(held.targets.values.tolist())}
    assert found == {picture(100 + i): (100 + i) % 3 for i in range(4)}
    assert held.load(0).size == (5, 6) and len({held.stamp(i) for i in range(4)}) == 4
    assert no_network == []


def test_our_shards_as_a_stream(parquet: Path, tmp_path: Path) -> None:
    source = open_data(parquet)
    write_shards(source, tmp_path / "out", images=6)
    name = f"webdataset:{tmp_path / 'out'}"
    with pytest.raises(UsageError, match="does not name its classes"):
        streamed(name)
    file = tmp_path / "classes.txt"
    file.write_text("\n".join(NAMES))
    found = drawn(streamed(name, classes=str(file), lanes=1), 18)
    expected = dict(zip(contents(source), source.targets.values.tolist(), strict=True))
    assert {i.content: i.label for i in found}.items() <= expected.items() and len(found) == 18
    file.write_text("a\nb\n")
    with pytest.raises(DataError, match=r"'cls' of .* holds 2, but there are 2 classes"):
        drawn(streamed(name, classes=str(file)), 18)
    for names in ("a\na\n", ""):
        file.write_text(names)
        with pytest.raises(DataError, match=r"classes\.txt must hold one class a line"):
            streamed(name, classes=str(file))
    with pytest.raises(DataError, match=r"cannot read .*gone.txt: No such file"):
        streamed(name, classes=str(tmp_path / "gone.txt"))


def test_files_of_few_shards_are_read_by_row_groups(tmp_path: Path) -> None:
    table(40).to_parquet(tmp_path / "train.parquet", batch_size=10)
    source = streamed(f"parquet:{tmp_path / 'train.parquet'}")
    assert (len(source.shards), source.lanes) == (4, 4)
    assert len({image.key for image in drawn(source, 40)}) == 40


def test_what_a_stream_cannot_be(parquet: Path, tmp_path: Path) -> None:
    table(3).save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match="lies on this machine"):
        streamed(str(tmp_path / "saved"))
    for name in ("lanes", "buffer", "held_out", "epoch"):
        with pytest.raises(UsageError, match=f"data.stream.{name} must be at least 1, not 0"):
            streamed(str(parquet), **{name: 0})


@pytest.mark.parametrize("sizes, most", [(SIZES, 20), (SIZES, 99), ((0, 3, 0, 4), 7), ((5,), 2)])
def test_a_sample_has_every_image_once_and_the_rest_goes_without(
    sizes: tuple[int, ...], most: int
) -> None:
    source = stream(*sizes)
    sample = source.sample(most)
    keys = [sample.key(i) for i in range(len(sample))]
    assert len(set(keys)) == len(keys) == min(most, sum(sizes))
    rest = source.without(sample)
    if len(keys) == sum(sizes):
        with pytest.raises(DataError, match=f"no image with a label, beside {len(keys)} held out"):
            drawn(rest, 1)
    else:
        seen = {image.key for image in drawn(rest, 5 * sum(sizes))}
        assert not seen & set(keys) and len(seen) == sum(sizes) - len(keys)
    with pytest.raises(DataError, match="images held out was 0, is "):
        resumed(rest, source.reader().position(), (0, 1))


def test_a_sample_is_of_all_lanes() -> None:
    sample = stream(*[50] * 9).sample(12)
    assert len({sample.key(i).split("/")[0] for i in range(12)}) == 3


def test_a_changed_stream_goes_on_in_a_new_pass() -> None:
    reader = stream(*SIZES).reader()
    list(islice(reader, 60))
    changed = stream(*SIZES, 9, lanes=4)
    renewed = changed.renewed(reader.position())
    (first, *_) = list(islice(resumed(changed, renewed, (0, 1)), 30))
    assert first.number == 60
    before = {int(lane[0]) for lane in reader.position()["lanes"].values()}
    assert {lane[0] for lane in renewed["lanes"].values()} == {max(before) + 1}


# Streams, divided


def divided(data: str, fraction: float = 0.2, **how: Any) -> Any:
    return open_streamed(
        f"hf-stream:{data}", seed=0, settings=StreamSettings(**how), val_fraction=fraction
    )


def test_a_streams_own_parts_are_held_in_memory(parquet: Path) -> None:
    splits = divided(str(parquet))
    assert (len(splits.val), splits.test, splits.notes) == (4, None, ())
    assert splits.train.targets.names == splits.val.targets.names and not splits.train.left_out
    splits = divided(str(parquet), held_out=3)
    assert len(splits.val) == 3 and "no more than 3 images" in splits.notes[0]
    table(2, 200).to_parquet(parquet / "test-00000-of-00001.parquet")
    splits = divided(str(parquet))
    assert (len(splits.val), len(splits.test)) == (4, 2)
    (parquet / "validation-00000-of-00001.parquet").unlink()
    splits = divided(str(parquet))
    assert splits.val is splits.test and "chosen by them" in splits.notes[0]


def test_the_beginning_of_a_stream_is_held_out_and_not_trained_on(parquet: Path) -> None:
    (parquet / "validation-00000-of-00001.parquet").unlink()
    splits, again = divided(str(parquet), held_out=6), divided(str(parquet), held_out=6)
    keys = [[s.val.key(i) for i in range(6)] for s in (splits, again)]
    assert keys[0] == keys[1] and "which training passes over" in splits.notes[0]
    held = {splits.val.encoded(i) for i in range(6)}
    trained = {image.content for image in drawn(splits.train, 60)}
    assert not held & trained and len(held | trained) == 18
    with pytest.raises(UsageError, match="val_fraction is 0"):
        divided(str(parquet), 0.0)
    with pytest.raises(DataError, match=r"has only 18 images.*data.stream.held_out 3"):
        divided(str(parquet))
    # Where the data says how many there are, a share of them is enough.
    open_data(parquet)  # the library keeps that
    assert len(divided(str(parquet)).val) == 4


def test_streams_that_nothing_can_be_learned_from(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["cat"])
    one = datasets.Features({"image": datasets.Image(), "label": names})
    rows = {"image": [{"bytes": picture(0), "path": None}] * 3, "label": [0] * 3}
    datasets.Dataset.from_dict(rows, features=one).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="only one class, 'cat'"):
        divided(f"parquet:{tmp_path / 'train.parquet'}")
    for i in range(12):
        file = tmp_path / "data" / ("cat", "dog")[i // 6] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))
    with pytest.raises(DataError, match=r"all of the class 'cat': .*hf:imagefolder:.*data"):
        divided(f"imagefolder:{tmp_path / 'data'}", held_out=4, buffer=1)
    assert len(divided(f"imagefolder:{tmp_path / 'data'}", held_out=4).val) == 4


@pytest.mark.parametrize("name", ["", "hf:", "hf-stream:", "hf:parquet:", "hf-stream:imagefolder:"])
def test_a_name_is_a_prefix_and_a_place(name: str) -> None:
    assert place_of(f"{name}some/folder") == (name, Path("some/folder"))


def test_a_stream_that_breaks_off_says_so(parquet: Path) -> None:
    source = streamed(str(parquet), lanes=1)
    reader = source.reader()
    for file in parquet.glob("train-*.parquet"):
        os.truncate(file, 100)
    with pytest.raises(DataError, match=r"broke off in shard \d: .*--resume RUN"):
        next(reader)
