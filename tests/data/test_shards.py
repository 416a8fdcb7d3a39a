"""Data sets as tar files: written, listed, read at any place; and tar files of strangers."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrail.cli import main
from vitrail.data import Source, UnreadableImage, open_data, open_splits
from vitrail.data.sources import listing as listing_module
from vitrail.data.sources.listing import list_images
from vitrail.data.sources.shards import INDEX, ShardSource, changed_shards
from vitrail.data.sources.source import PartedSource
from vitrail.data.sources.tar import TarReader
from vitrail.data.sources.write_shards import Written, encoded_image, write_shards
from vitrail.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache"
    monkeypatch.setenv("VITRAIL_CACHE", str(place))
    return place


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with parts, files of several kinds, and names that are no easy ones."""
    names = ["1.jpg", "a.b.png", "grüße 猫.webp", "new\nline.png", "%2E.png", "x" * 200 + ".png"]
    folder = tmp_path / "photos"
    for part in ("train", "val", "test"):
        for number, label in enumerate(("cat", "dog", "owl")):
            for i, name in enumerate([*names, os.fsdecode(b"\xe9.jpg")]):
                file = folder / part / label / "old" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                kind = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}[file.suffix]
                file.write_bytes(picture(100 * number + i, kind))
    return folder


def described(source: PartedSource) -> list[tuple[object, ...]]:
    """All that a run on a source can follow from."""
    return [
        (
            source.key(i),
            source.targets.values[i].tolist(),
            int(source.part[i]),
            *encoded_image(source, i),
        )
        for i in range(len(source))
    ]


def tree(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def shard(data: Path | str, out: Path, **how: Any) -> Written:
    return write_shards(open_data(data), out, data=Path(data), **how)


# Written and read again


def test_shards_give_back_what_they_were_written_from(photos: Path, tmp_path: Path) -> None:
    before = tree(photos)
    written = shard(photos, tmp_path / "out", images=4)
    assert tree(photos) == before
    assert written.images == 63 and written.left_out == ()
    assert written.shards == tuple(
        f"{part}-{i:05}.tar" for part in ("train", "val", "test") for i in range(6)
    )
    source, found = open_data(photos), open_data(tmp_path / "out")
    assert isinstance(found, ShardSource)
    assert (found.targets.names, found.notes) == (source.targets.names, ())
    assert described(found) == described(source)
    for i in (0, 30, 62):
        assert found.load(i).tobytes() == source.load(i).tobytes()


def test_a_split_by_seed_is_the_same_on_the_shards(photos: Path, tmp_path: Path) -> None:
    shard(photos / "train", tmp_path / "out", images=5)
    parts = [open_splits(data, seed=3) for data in (photos / "train", tmp_path / "out")]
    for one, other in zip(*[(p.train, p.val) for p in parts], strict=True):
        assert [one.key(i) for i in range(len(one))] == [other.key(i) for i in range(len(other))]
        assert (one.targets.values == other.targets.values).all()


def test_several_labels_an_image(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    text = "file,label,split\n0.png,red|round,train\n1.png,red,val\n2.png,big;red,test\n"
    (tmp_path / "labels.csv").write_text(text)
    shard(tmp_path / "labels.csv", tmp_path.parent / f"{tmp_path.name}-out")
    found = open_data(tmp_path.parent / f"{tmp_path.name}-out")
    assert found.targets.names == ("big", "red", "round")
    assert found.targets.values.tolist() == [[0, 1, 1], [0, 1, 0], [1, 1, 0]]
    assert found.part.tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 5, 4, 3)])
def test_arrays_keep_their_pixels_and_labels_that_none_has(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    labels = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0]] * 2)
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels)
    shard(tmp_path / "a.npz", tmp_path / "out")
    found = open_data(tmp_path / "out")
    assert found.targets.names == ("0", "1", "2")
    assert found.targets.values.tolist() == labels.tolist()
    for i, pixels in enumerate(images):
        assert found.key(i) == f"train/{i}"
        assert (
            np.asarray(found.load(i).convert("L" if pixels.ndim == 2 else "RGB")) == pixels
        ).all()


def test_shards_of_shards_are_the_shards(photos: Path, tmp_path: Path) -> None:
    shard(photos, tmp_path / "one")
    shard(tmp_path / "one", tmp_path / "two")
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_the_same_images_give_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    shard(photos, tmp_path / "one", images=10)
    for file in photos.rglob("*.*"):
        os.utime(file, (1, 1))
    photos.rename(tmp_path / "elsewhere")
    shard(tmp_path / "elsewhere", tmp_path / "two", images=10)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_who_reads_from_front_to_back_gets_mixed_classes(tmp_path: Path) -> None:
    shard("samples:emoji", tmp_path / "out", images=200)
    with tarfile.open(tmp_path / "out/train-00000.tar") as tar:
        contents = [tar.extractfile(m).read() for m in tar if m.name.endswith(".cls")]  # type: ignore[union-attr]
    assert len(contents) == 200
    assert len(set(contents[:50])) >= 6


def test_the_members_are_those_of_webdataset(photos: Path, tmp_path: Path) -> None:
    shard(photos, tmp_path / "out", images=10)
    for file in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(file) as tar:
            members = tar.getmembers()
        assert all(m.isfile() and (m.mtime, m.uid, m.gname) == (0, 0, "") for m in members)
        names = [m.name for m in members]
        assert all(name.isascii() and not {"/", "\n"} & set(name) for name in names)
        for image, label in zip(names[::2], names[1::2], strict=True):
            key, ending = image.split(".")
            assert label == f"{key}.cls" and ending in ("jpg", "png", "webp")


def test_a_shard_is_no_larger_than_asked_for(photos: Path, tmp_path: Path) -> None:
    written = shard(photos, tmp_path / "out", megabytes=0.02)
    sizes = [(tmp_path / "out" / name).stat().st_size for name in written.shards]
    assert max(sizes) <= 20_000 + 1024 and written.size == sum(sizes)
    assert len(sizes) > 6
    assert shard(photos, tmp_path / "tiny", megabytes=1e-6).shards[20:22] == (
        "train-00020.tar",
        "val-00000.tar",
    )


def test_what_cannot_be_read_is_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "1.png").write_bytes(picture(1))
    (data / "2.png").write_bytes(b"no image")  # for whoever reads it to tell
    os.mkfifo(data / "pipe.png")
    (data / "labels.csv").write_text("file,label\ngone.png,a\n1.png,a\n2.png,b\npipe.png,b\n")
    assert main(["data", "shard", str(data), str(out), "--json"]) == 3
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["images"] == 2 and told["shards"] == ["train-00000.tar"]
    assert told["left_out"] == [
        {"key": "gone.png", "count": 1, "reason": "no such file or directory"},
        {"key": "pipe.png", "count": 1, "reason": "it is not a regular file"},
    ]
    found = open_data(out)
    assert [found.key(i) for i in range(2)] == ["1.png", "2.png"]
    with pytest.raises(UnreadableImage, match=r"2\.png: its content is none of the formats"):
        found.load(1)


def test_the_place_must_be_new_and_outside_of_the_data(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(photos)
    with pytest.raises(UsageError, match="there already, and not empty"):
        shard(photos, tmp_path / "full")
    for inside in (photos, photos / "new", photos / "train/cat/new", tmp_path / "link/new"):
        with pytest.raises(UsageError, match="never written to"):
            shard(photos, inside)
    (tmp_path / "empty").mkdir()
    shard(photos, tmp_path / "empty")
    assert (tmp_path / "full/mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "how", [{"images": 3, "megabytes": 3}, {"images": 0}, {"megabytes": 0}, {"megabytes": -1}]
)
def test_sizes_that_cannot_be(photos: Path, tmp_path: Path, how: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        shard(photos, tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_is_one_message_and_leaves_nothing(
    photos: Path, tmp_path: Path
) -> None:
    source = open_data(photos)
    place = tmp_path / "new/out"
    with files_no_larger_than(20_000), pytest.raises(DataError) as failed:
        write_shards(source, place, data=photos)
    assert "cannot write the shards" in str(failed.value) and "make room" in str(failed.value)
    assert list(place.parent.iterdir()) == []


def test_a_stop_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    def stop(count: int) -> None:
        if count == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shard(photos, tmp_path / "new/out", images=5, on_done=stop)
    assert list((tmp_path / "new").iterdir()) == []


# In threads and processes


def digests(source: Source) -> list[str]:
    return [hashlib.sha256(source.load(i).tobytes()).hexdigest() for i in range(len(source))]


def test_many_threads_and_processes_read_the_same(photos: Path, tmp_path: Path) -> None:
    shard(photos, tmp_path / "out", images=2)
    source = ShardSource(tmp_path / "out")
    expected = digests(source)  # the files are open now, and go with a fork
    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(digests, [source] * 8))
    with multiprocessing.get_context("fork").Pool(3) as processes:
        assert all(found == expected for found in processes.map(digests, [source] * 6))
    assert digests(pickle.loads(pickle.dumps(source))) == expected


def test_more_shards_than_files_may_be_open(photos: Path, tmp_path: Path) -> None:
    shard(photos, tmp_path / "out", images=1)
    source = ShardSource(tmp_path / "out")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (here + 140, before[1]))
        assert len(set(digests(source))) > 10
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# Listed once


def test_a_tar_file_is_listed_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(photos, tmp_path / "out", images=10)
    listed: list[str] = []

    def counted(file: Path, **how: bool) -> listing_module.Listing:
        listed.append(file.name)
        return list_images(file, **how)

    monkeypatch.setattr(listing_module, "list_images", counted)
    first = described(ShardSource(tmp_path / "out"))
    assert len(listed) == len(list((tmp_path / "out").glob("*.tar")))
    assert described(ShardSource(tmp_path / "out")) == first
    os.utime(tmp_path / "out/val-00001.tar", ns=(1, 1))
    assert described(ShardSource(tmp_path / "out")) == first
    assert listed[-2:] != ["val-00001.tar"] * 2 and listed.count("val-00001.tar") == 2


def test_a_damaged_cache_is_no_matter(photos: Path, tmp_path: Path, cache: Path) -> None:
    shard(photos, tmp_path / "out")
    first = described(ShardSource(tmp_path / "out"))
    files = sorted((cache / "shards").iterdir())
    assert len(files) == 3 and all(file.suffix == ".safetensors" for file in files)
    content = files[0].read_bytes()
    for at in range(0, len(content), 97):
        files[0].write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        assert described(ShardSource(tmp_path / "out")) == first
    for cut in range(0, len(content), 211):
        files[0].write_bytes(content[:cut])
        assert described(ShardSource(tmp_path / "out")) == first


def test_a_cache_that_cannot_be_written_is_no_matter(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(photos, tmp_path / "out")
    (tmp_path / "file").touch()
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "file/below"))
    assert len(ShardSource(tmp_path / "out")) == 63


# Shards that are not what they were


def test_a_shard_that_changes_during_a_run_is_unreadable_not_wrong(
    photos: Path, tmp_path: Path
) -> None:
    shard(photos, tmp_path / "out", images=30)
    source = ShardSource(tmp_path / "out")
    (tmp_path / "out/val-00000.tar").unlink()
    file = tmp_path / "out/test-00000.tar"
    file.write_bytes(file.read_bytes())
    for part in (1, 2):
        i = int(np.flatnonzero(source.part == part)[0])
        with pytest.raises(UnreadableImage, match="is gone, or has changed") as failed:
            source.load(i)
        assert source.key(i) in str(failed.value)
    assert source.stamp(i) != ShardSource.stamp(pickle.loads(pickle.dumps(source)), 0)


def test_missing_foreign_and_changed_shards(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard(photos, out, images=10)
    (out / "val-00001.tar").rename(tmp_path / "away.tar")
    with pytest.raises(DataError, match=r"lacks 1 shards: val-00001\.tar"):
        ShardSource(out)
    shutil.copy(tmp_path / "away.tar", out / "val-00001.tar")
    shutil.copy(tmp_path / "away.tar", out / "more.tar")
    with pytest.raises(DataError, match=r"does not list: more\.tar"):
        ShardSource(out)
    (out / "more.tar").unlink()
    shutil.copy(out / "val-00000.tar", out / "val-00001.tar")
    with pytest.raises(DataError, match="is not the shard that was written"):
        ShardSource(out)
    for text in ("[]x", '{"format": "vitrail shards 1"}', "[" * 100_000):
        (out / INDEX).write_text(text)
        with pytest.raises(DataError, match="cannot read"):
            ShardSource(out)


def test_an_index_beside_shards_that_it_is_not_of(tmp_path: Path) -> None:
    for names, message in (
        (["7-a", "8-a"], "two images .* have one key"),
        (["a", "b"], "'a', which was not written with index.json: remove"),
    ):
        members = {f"{n}.{e}": c for n in names for e, c in (("png", picture(0)), ("cls", b"0"))}
        file = write_tar(tmp_path / "data/x.tar", members)
        entry = {"name": "x.tar", "images": 2, "bytes": file.stat().st_size, "sha256": ""}
        about = {"format": "vitrail shards 1", "classes": ["a"], "labels": "one", "shards": [entry]}
        (tmp_path / "data" / INDEX).write_text(json.dumps(about))
        with pytest.raises(DataError, match=message):
            open_data(tmp_path / "data")


def test_check_finds_a_flipped_bit(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shard(photos, out, images=10)
    assert changed_shards(out) == ()
    assert main(["data", "check", str(out), "--json"]) == 0
    content = bytearray((out / "test-00000.tar").read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    (out / "test-00000.tar").write_bytes(content)
    capsys.readouterr()
    assert main(["data", "check", str(out), "--json"]) == 3
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["changed_shards"] == ["test-00000.tar"]


# Tar files of others


def write_tar(file: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=form) as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return file


def test_classes_by_number_text_or_json(tmp_path: Path) -> None:
    members = {
        "./00/a.jpg": picture(0, "JPEG"),
        "./00/a.cls": b"7\n",
        "./00/b.cls": b"10",
        "./00/b.PNG": picture(1),
        "c.webp": picture(2, "WEBP"),
        "c.txt": b"not taken",
        "c.json": b'{"label": 7, "more": [1, {}]}',
        "d.jpg": picture(3, "JPEG"),
        "d.txt": b"0010",
    }
    source = ShardSource(write_tar(tmp_path / "x.tar", members))
    assert source.targets.names == ("7", "10") and source.notes == ()
    assert [source.key(i) for i in range(4)] == ["x/00/a", "x/00/b", "x/c", "x/d"]
    assert source.targets.values.tolist() == [0, 1, 0, 1]
    assert source.load(1).size == (7, 9)


def test_class_names_beside_the_shards(tmp_path: Path) -> None:
    members = {"a.png": picture(0), "a.cls": b"2", "b.png": picture(1), "b.txt": b" cat "}
    data = write_tar(tmp_path / "data/x.tar", members).parent
    (data / "classes.txt").write_text("cat\ndog\nowl\n")
    source = open_data(data)
    assert source.targets.names == ("cat", "dog", "owl") and source.targets.values.tolist() == [
        2,
        0,
    ]
    (data / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"not among its 2 classes: 2; classes\.txt must"):
        open_data(data)
    (data / "classes.txt").write_text("cat\ncat\n")
    with pytest.raises(DataError, match="none twice"):
        open_data(data)


def test_several_labels_in_json(tmp_path: Path) -> None:
    members = {"a.png": picture(0), "a.json": b'{"labels": ["red", "round"]}'}
    members |= {"b.png": picture(1), "b.json": b'{"labels": []}', "c.png": b"", "c.cls": b"red"}
    source = ShardSource(write_tar(tmp_path / "x.tar", members))
    assert source.targets.names == ("red", "round")
    assert source.targets.values.tolist() == [[1, 1], [0, 0], [1, 0]]


@pytest.mark.parametrize(
    "names, parts",
    [
        (["set-train-000.tar", "set-val-000.tar", "set-test-0.tar"], [2, 0, 1]),
        (["train/0.tar", "validation/0.tar", "test/0.tar"], [2, 0, 1]),
        (["val/train-0.tar", "train/train-0.tar"], [0, 1]),
        (["a.tar", "evaluate.tar", "latest.tar"], [0, 0, 0]),
    ],
)
def test_parts_by_name(tmp_path: Path, names: list[str], parts: list[int]) -> None:
    for i, name in enumerate(names):
        write_tar(tmp_path / name, {"a.png": picture(i), "a.cls": b"1"})
    source = open_data(tmp_path)
    assert isinstance(source, ShardSource)
    assert source.part.tolist() == parts
    assert len({source.key(i) for i in range(len(names))}) == len(names)


def test_a_folder_of_photos_with_an_archive_beside_them_stays_one(tmp_path: Path) -> None:
    for i, name in enumerate(("cat/1.png", "dog/2.png")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(picture(i))
    write_tar(tmp_path / "photos.tar", {"a.png": picture(0), "a.cls": b"1"})
    assert open_data(tmp_path).targets.names == ("cat", "dog")


@pytest.mark.parametrize(
    "members, message",
    [
        ({"a.mp3": b"", "a.cls": b"1"}, r"members end in: cls, mp3"),
        ({"a.png": b"x"}, r"no image with a label .* members end in: png"),
        ({}, r"nothing, they are empty"),
        ({"a.png": b"x", "a.json": b"[" * 60_000}, r"no image with a label"),
        ({"a.png": b"x", "a.json": b'{"label": {"a": 1}}'}, r"no image with a label"),
        ({"a.png": b"x", "a.cls": b"\xff"}, r"no image with a label"),
        (
            {f"{i}.{e}": f"text {i}".encode() for i in range(150) for e in ("png", "txt")},
            r"captions, not classes",
        ),
    ],
)
def test_tar_files_without_labelled_images(
    tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ShardSource(write_tar(tmp_path / "x.tar", members))


def test_packed_tar_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"compressed tar files only \(x\.tar\.gz\).*gunzip"):
        open_data(tmp_path)
    with pytest.raises(DataError, match=r"unpacked first"):
        open_data(tmp_path / "x.tar.gz")


# Hostile ones


def test_what_is_no_plain_file_in_place_is_left_out_and_told(tmp_path: Path) -> None:
    file = tmp_path / "data/x.tar"
    file.parent.mkdir()
    (tmp_path / "secret.png").write_bytes(picture(9))
    with tarfile.open(file, "w") as tar:

        def add(
            name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", to: str = ""
        ) -> None:
            about = tarfile.TarInfo(name)
            about.type, about.size, about.linkname = kind, len(content), to
            tar.addfile(about, io.BytesIO(content))

        for name in (
            "good",
            "/etc/abs",
            "../up",
            "a/../../up",
            "link",
            "hard",
            "dev",
            "pipe",
            "lone",
        ):
            add(f"{name}.cls", content=b"1")
        add("/etc/abs.png", content=picture(0))
        add("../up.png", content=picture(0))
        add("a/../../up.png", content=picture(0))
        add("link.png", tarfile.SYMTYPE, to=str(tmp_path / "secret.png"))
        add("hard.png", tarfile.LNKTYPE, to="good.png")
        add("dev.png", tarfile.CHRTYPE)
        add("pipe.png", tarfile.FIFOTYPE)
        add("folder", tarfile.DIRTYPE)
        add("._good.png", content=b"of a Mac")
        add("good.png", content=picture(1))
        add("good.PNG", content=picture(2))
        add("bare.png", content=picture(3))
        add("good.jpe", content=picture(4))
        add("b.jxl", content=b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99))
        add("good.npy", content=b"\x93NUMPY")
    before = tree(tmp_path / "data")
    source = open_data(file)
    assert [source.key(i) for i in range(len(source))] == ["x/good"]
    assert source.load(0).tobytes() == Image.open(io.BytesIO(picture(1))).tobytes()
    assert {one.kind: (one.count, one.examples) for one in source.left_out} == {
        "names that lead out of the shard": (
            6,
            tuple(
                f"x.tar: {name}"
                for name in (
                    *("/etc/abs.cls", "../up.cls", "a/../../up.cls", "/etc/abs.png", "../up.png"),
                )
            ),
        ),
        "links, devices and sparse files": (
            4,
            tuple(f"x.tar: {name}.png" for name in ("link", "hard", "dev", "pipe")),
        ),
        "hidden and system files": (1, ("x.tar: ._good.png",)),
        "further images of one key": (1, ("x.tar: good.PNG",)),
        "images of other endings": (1, ("x.tar: good.jpe",)),
        "JPEG XL images": (1, ("x.tar: b.jxl",)),
        "members that are neither": (1, ("x.tar: good.npy",)),
        "labels without an image": (
            5,
            tuple(f"x.tar: {name}" for name in ("link", "hard", "dev", "pipe", "lone")),
        ),
        "images without a label": (1, ("x.tar: bare",)),
    }
    assert tree(tmp_path / "data") == before and not (tmp_path / "up.png").exists()


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program")
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_files_are_left_out_and_what_follows_is_found(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    with (folder / "a.png").open("wb") as stream:
        for i in range(60):  # so many pieces that the map goes on after its header
            stream.seek(i * 65536)
            stream.write(b"x" * 4096)
    (folder / "a.cls").write_text("1")
    (folder / "b.png").write_bytes(picture(1))
    (folder / "b.cls").write_text("1")
    command = ["tar", "--sparse", f"--format={form}", "-cf", str(tmp_path / "x.tar")]
    subprocess.run([*command, "a.png", "a.cls", "b.png", "b.cls"], cwd=folder, check=True)
    if (tmp_path / "x.tar").stat().st_size > 1_000_000:
        pytest.skip("this disk keeps no sparse files")
    source = ShardSource(tmp_path / "x.tar")
    assert [source.key(i) for i in range(len(source))] == ["x/b"]
    assert source.load(0).size == (7, 9)
    assert any("sparse" in one.kind for one in source.left_out)


def test_a_claimed_size_is_checked_before_memory_is_taken(tmp_path: Path) -> None:
    for size in (10_000, 8**11 - 1, 1 << 60):
        about = tarfile.TarInfo("a.png")
        about.size = size
        file = tmp_path / "x.tar"
        file.write_bytes(about.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        with pytest.raises(
            DataError, match=rf"cut short: 'a\.png' should end at byte {512 + size}"
        ):
            ShardSource(file)


def test_two_tar_files_in_one_are_told(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "a.tar", {"a.png": picture(0), "a.cls": b"1"}).read_bytes()
    (tmp_path / "x.tar").write_bytes(one + os.urandom(100_000))
    (left_out,) = ShardSource(tmp_path / "x.tar").left_out
    assert left_out.kind == "bytes behind the end mark"


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"PK\x03\x04" + b"x" * 5000, b"x" * 511])
def test_what_is_no_tar_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.tar"):
        open_data(tmp_path / "x.tar")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(DataError):
        open_data(tmp_path / "x.tar")
    with pytest.raises(DataError):
        ShardSource(tmp_path / "x.tar")


def test_a_cut_or_a_flipped_bit_is_a_message_or_changes_no_other_image(tmp_path: Path) -> None:
    members = {
        f"{'long' * 40}{i}.{e}": c
        for i in range(3)
        for e, c in (("png", picture(i)), ("cls", b"1"))
    }
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    listed = list_images(tmp_path / "whole.tar")
    good = list(zip(listed.keys, listed.offsets.tolist(), listed.sizes.tolist(), strict=True))
    file = tmp_path / "x.tar"
    end = max(offset + size for _, offset, size in good) + 2048
    for cut in range(0, end, 127):
        file.write_bytes(whole[:cut])
        try:
            found = list_images(file)
        except DataError as error:
            assert "cut short" in str(error) or "no header" in str(error)
        else:
            rows = list(zip(found.keys, found.offsets.tolist(), found.sizes.tolist(), strict=True))
            assert rows == good[: len(rows)]
    for at in range(0, end, 29):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            list_images(file)
        except DataError as error:
            assert str(file) in str(error)


_NAMES = st.text(
    st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=20
)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.builds(lambda name, times: "/".join([name] * times), _NAMES, st.integers(1, 20)),
            st.sampled_from([b"0", b"0", b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"Q"]),
            st.binary(max_size=1100),
        ),
        max_size=6,
    ),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
    st.dictionaries(st.sampled_from(["comment", "path"]), _NAMES),
)
def test_members_are_those_that_tarfile_finds(
    tmp_path: Path, members: list[tuple[str, bytes, bytes]], form: int, shared: dict[str, str]
) -> None:
    file = tmp_path / "x.tar"
    headers = shared if form == tarfile.PAX_FORMAT else None
    with tarfile.open(file, "w", format=form, pax_headers=headers) as tar:
        for name, kind, content in members:
            about = tarfile.TarInfo(name)
            about.type = kind
            about.size = len(content) if kind in b"07Q" else 0
            try:
                tar.addfile(about, io.BytesIO(content))
            except ValueError:  # ustar has no place for such a name
                continue
        tar.addfile(tarfile.TarInfo("last"))  # tarfile opens no file with shared headers alone
    with tarfile.open(file) as tar:
        expected = [(m.name.rstrip("/"), m.offset_data, m.size) for m in tar]
    with TarReader(file) as reader:
        found = [(m.name.rstrip("/"), m.offset, m.size) for m in reader.members()]
    assert found == expected


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_bytes_give_members_or_a_message(tmp_path: Path, data: st.DataObject) -> None:
    """Headers whose sums are right and whose fields are anything."""
    blocks = []
    for _ in range(data.draw(st.integers(1, 4))):
        header = bytearray(512)
        for start, end in ((0, 100), (124, 136), (156, 157), (257, 265), (345, 500), (482, 483)):
            field = data.draw(st.one_of(st.just(b""), st.binary(max_size=end - start)))
            header[start : start + len(field)] = field
        if data.draw(st.booleans()):
            header[124:136] = b"%011o\0" % data.draw(st.integers(0, 1500))
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
        blocks.append(bytes(header) + data.draw(st.binary(max_size=600)).ljust(512, b"\0"))
    file = tmp_path / "x.tar"
    file.write_bytes(b"".join(blocks) + bytes(1024))
    try:
        with TarReader(file) as reader:
            for member in reader.members():
                assert member.offset >= 0 and member.offset + member.size <= file.stat().st_size
        list_images(file)
    except DataError as error:
        assert str(file) in str(error)


@pytest.mark.slow
def test_a_million_members(tmp_path: Path) -> None:
    with (tmp_path / "x.tar").open("wb") as stream:
        for i in range(500_000):
            for name, content in ((f"{i}.png", b"x"), (f"{i}.cls", b"%d" % (i % 1000))):
                about = tarfile.TarInfo(name)
                about.size = len(content)
                stream.write(about.tobuf(tarfile.USTAR_FORMAT) + content.ljust(512, b"\0"))
        stream.write(bytes(1024))
    source = ShardSource(tmp_path / "x.tar")
    assert (len(source), len(source.targets.names)) == (500_000, 1000)
    assert len(pickle.dumps(source)) < 500_000 * 60


def test_what_lies_beside_shards_is_told_and_their_parts_have_all_usual_names(
    tmp_path: Path,
) -> None:
    for part in ("train2017", "dev"):
        (tmp_path / part).mkdir()
        members = {f"{i}.{e}": c for i in range(2) for e, c in (("png", picture(i)), ("cls", b"1"))}
        write_tar(tmp_path / part / "0.tar", members)
    for name in ("README.md", "dev/1.tar.gz", "dev/.DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    source = open_data(tmp_path)
    assert source.part.tolist() == [1, 1, 0, 0]
    assert {one.kind: one.examples for one in source.left_out} == {
        "other files": ("README.md",),
        "compressed tar files": ("1.tar.gz",),
        "hidden and system files": ("dev/.DS_Store",),
    }
