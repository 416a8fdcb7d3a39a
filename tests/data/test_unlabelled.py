"""Images of which nothing is said: folders of any nesting, lists, shards."""

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrail.data import FolderSource, UnreadableImage
from vitrail.data.sources.layout import FolderRules
from vitrail.data.sources.shards import ShardSource
from vitrail.data.sources.unlabelled import Unlabelled, _parts, open_unlabelled
from vitrail.data.targets import Nothing
from vitrail.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))


def content(name: str) -> bytes:
    """A tiny picture, of another colour for each name."""
    colour = tuple(hashlib.blake2b(os.fsencode(name), digest_size=3).digest())
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(stream, "PNG")
    return stream.getvalue()


def save(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content(file.name))


def keys(source: Unlabelled) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def colours(source: Unlabelled) -> list[object]:
    return [source.load(i).getpixel((0, 0)) for i in range(len(source))]


def sentences(source: Unlabelled) -> str:
    return " ".join(one.sentence() for one in source.left_out)


# Folders


def test_a_folder_is_all_its_images_in_the_order_of_their_paths(tmp_path: Path) -> None:
    names = ["b.png", "2019/summer/a.jpg", "2019/c.webp", "no ending", "a/b/c/d/e.png", "z.PNG"]
    save(*(tmp_path / "photos" / name for name in names))
    source = open_unlabelled(tmp_path / "photos")
    assert keys(source) == sorted(names)
    assert isinstance(source.targets, Nothing) and len(source.targets) == len(source) == 6
    assert not source.part.any() and source.part.dtype == np.uint8
    assert source.notes == source.left_out == ()
    assert colours(source) == [
        Image.open(tmp_path / "photos" / name).getpixel((0, 0)) for name in sorted(names)
    ]
    assert source.stamp(0) and source.stamp(0) != "" and source.encoded(0).is_file()
    again = pickle.loads(pickle.dumps(source))
    assert keys(again) == keys(source) and colours(again) == colours(source)


def test_content_decides_and_what_is_left_out_is_told(tmp_path: Path) -> None:
    save(tmp_path / "a.png", tmp_path / "in/b")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "in/empty").write_bytes(b"")
    (tmp_path / ".hidden.png").write_bytes(content("x"))
    (tmp_path / "in/loop").symlink_to(tmp_path)
    (tmp_path / "photo.nef").write_bytes(b"II*\0" + bytes(300))
    source = open_unlabelled(tmp_path)
    assert keys(source) == ["a.png", "in/b"]
    kinds = {one.kind: one.count for one in source.left_out}
    assert kinds == {
        "symbolic links": 1,
        "empty files": 1,
        "other files": 1,
        "camera raw images": 1,
        "hidden and system files": 1,
    }


def test_class_folders_do_not_count(tmp_path: Path) -> None:
    save(*(tmp_path / f"{c}/{i}.png" for c in ("cat", "dog") for i in range(3)))
    source = open_unlabelled(tmp_path)
    labelled = FolderSource(tmp_path)
    assert keys(source) == [labelled.key(i) for i in range(6)]
    assert [source.stamp(i) for i in range(6)] == [labelled.stamp(i) for i in range(6)]


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ("a.png b/c.png", "train train"),
        ("train/a.png val/b.png", "train val"),
        ("test2017/a.png train2017/b.png unlabeled2017/c.png", "test train train"),
        ("a.png validation/x/y/b.png", "train val"),
        # Nothing would be left to learn from.
        ("test/a.png", "train"),
        ("test/a.png val/b.png", "train train"),
        # Not a part further down.
        ("me/test/a.png you/val/b.png", "train train"),
        ("val.png train.png", "train train"),
    ],
)
def test_folders_called_like_parts_are_parts(tmp_path: Path, names: str, parts: str) -> None:
    save(*(tmp_path / name for name in names.split()))
    source = open_unlabelled(tmp_path)
    assert [("train", "val", "test")[p] for p in source.part] == parts.split()
    assert bool(source.notes) == (len(set(parts.split())) > 1)
    none = open_unlabelled(tmp_path, rules=FolderRules(parts="none"))
    assert not none.part.any() and keys(none) == keys(source) and not none.notes


def test_parts_can_be_told(tmp_path: Path) -> None:
    save(*(tmp_path / name for name in ("new/a.png", "old/b.png", "rest/c.png")))
    source = open_unlabelled(tmp_path, rules=FolderRules(parts="train=new,val=old"))
    assert keys(source) == ["new/a.png", "old/b.png"] and source.part.tolist() == [0, 1]
    assert "images beside the parts, 1" in sentences(source)
    with pytest.raises(UsageError, match="no folder nwe"):
        open_unlabelled(tmp_path, rules=FolderRules(parts="train=nwe"))


NAMES = st.lists(
    st.lists(st.sampled_from(["train", "val", "test", "cat", "x1"]), min_size=1, max_size=3),
    min_size=1,
    max_size=8,
    unique_by=tuple,
)


@settings(max_examples=50, deadline=None)
@given(NAMES)
def test_there_is_always_something_to_learn_from(paths: list[list[str]]) -> None:
    names = sorted("/".join([*path, f"{i}.png"]) for i, path in enumerate(paths))
    part, _ = _parts(names, told=False)
    assert len(part) == len(names) and (part == 0).any()


# Lists


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "a.png\nin/b c.png\n"),
        ("list.csv", "file\na.png\nin/b c.png\n"),
        ("list.csv", "path,width\na.png,3\nin/b c.png,4\n"),
        ("list.tsv", "id\tname\n1\ta.png\n2\tin/b c.png\n"),
        ("list.txt", "a\nin\\b c.png\n"),
    ],
)
def test_a_list_needs_no_labels(tmp_path: Path, name: str, text: str) -> None:
    save(tmp_path / "a.png", tmp_path / "in/b c.png", tmp_path / "other.png")
    (tmp_path / name).write_text(text)
    source = open_unlabelled(tmp_path / name)
    assert keys(source) == ["a.png", "in/b c.png"]
    assert isinstance(source.targets, Nothing) and len(source.targets) == 2
    assert colours(source) == [
        Image.open(tmp_path / key).getpixel((0, 0)) for key in ("a.png", "in/b c.png")
    ]
    assert "images that" in sentences(source) and "other.png" in sentences(source)


def test_a_list_may_say_parts_and_what_is_not_used_is_told(tmp_path: Path) -> None:
    save(tmp_path / "a.png", tmp_path / "b.png")
    file = tmp_path / "list.csv"
    file.write_text("split,label,image\ntrain,cat,a.png\nval,dog,b.png\n")
    source = open_unlabelled(file)
    assert source.part.tolist() == [0, 1]
    assert "not used are the columns label" in " ".join(source.notes)
    file.write_text("first,second\na.png,b.png\n")
    assert keys(open_unlabelled(file, image_column="second")) == ["b.png"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "lists no images"),
        ("file\n", "lists no images"),
        ("file,split\na.png,train\n,val\n", "line 3: 'file' is empty"),
        ("file,split\na.png,training\nb.png,later\n", "line 3: the split is 'later'"),
        ("file\na.png\na.png\n", "line 3: 'a.png' is in line 2 already"),
        ("file\nnone.png\n", "none of the 1 files"),
    ],
)
def test_a_list_that_cannot_be_understood_is_refused(tmp_path: Path, text: str, says: str) -> None:
    save(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        open_unlabelled(tmp_path / "list.csv")
    with pytest.raises(DataError):
        open_unlabelled(tmp_path / "list.csv", image_column="picture")


def test_a_file_that_is_gone_shows_when_it_is_loaded(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\ngone.png\n")
    source = open_unlabelled(tmp_path / "list.txt")
    assert len(source) == 2 and "1 of 2 files are not" in " ".join(source.notes)
    with pytest.raises(UnreadableImage):
        source.load(1)


# Shards


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_shards_need_no_labels(tmp_path: Path) -> None:
    place = tmp_path / "shards"
    write_tar(place / "train-0.tar", {"b.png": content("b"), "a.png": content("a"), "a.cls": b"3"})
    write_tar(
        place / "val-0.tar", {"c.png": content("c"), "c.txt": b"a long caption", "d.txt": b"x"}
    )
    source = open_unlabelled(place)
    assert keys(source) == ["train-0/b", "train-0/a", "val-0/c"]
    assert source.part.tolist() == [0, 0, 1] and len(source.targets) == 3
    assert colours(source) == [
        Image.open(io.BytesIO(content(name))).getpixel((0, 0)) for name in "bac"
    ]
    assert source.encoded(1).file == place / "train-0.tar"
    assert keys(open_unlabelled(place)) == keys(source)  # from the cache
    # Which does not mix up what is known of the same files with labels.
    labelled = ShardSource(place)
    assert [labelled.key(i) for i in range(len(labelled))] == ["train-0/a", "val-0/c"]
    assert "images without a label, 1" in " ".join(o.sentence() for o in labelled.left_out)
    assert len(open_unlabelled(place)) == 3 and len(open_unlabelled(place / "val-0.tar")) == 1


def test_shards_without_images_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.cls": b"3"})
    with pytest.raises(DataError, match="no image is in the tar files"):
        open_unlabelled(tmp_path / "0.tar")


# What is none of them


def test_what_holds_no_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.md").write_text("nothing")
    with pytest.raises(DataError, match=r"no images in .*other files, 1"):
        open_unlabelled(tmp_path / "empty")
    with pytest.raises(DataError, match="no such file or folder"):
        open_unlabelled(tmp_path / "gone")
    with pytest.raises(DataError, match="holds no images"):
        open_unlabelled(tmp_path / "empty/notes.md")
    with pytest.raises(UsageError, match="no list of images"):
        open_unlabelled(tmp_path / "empty", image_column="file")
    (tmp_path / "list.txt").write_text("a.png\n")
    with pytest.raises(UsageError, match="for folders of images"):
        open_unlabelled(tmp_path / "list.txt", rules=FolderRules(parts="none"))
