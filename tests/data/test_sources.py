"""Folders, CSV files and arrays as sources of labelled images."""

import gzip
import hashlib
import os
import pickle
import struct
import tempfile
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrail.data import (
    FORMATS,
    ArraySource,
    Classes,
    FolderSource,
    Source,
    Subset,
    UnreadableImage,
    open_data,
)
from vitrail.data.sources.layout import FolderRules
from vitrail.errors import DataError, UsageError

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
no_plug_in = pytest.mark.skipif("HEIF" in FORMATS, reason="a plug-in for HEIC is installed")


def save(*files: Path) -> None:
    """A tiny picture under each name, each of another colour."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        colour = tuple(hashlib.blake2b(os.fsencode(file.name), digest_size=3).digest())
        Image.new("RGB", (2, 2), colour).save(file, "PNG")


def keys(source: Source) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def labels(source: Source) -> list[str]:
    return [source.targets.names[target] for target in source.targets.values]


def tree(folder: Path) -> dict[str, str]:
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


# Folders


def test_class_folders_become_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    save(*(tmp_path / name for name in ("dog/2.png", "cat/b.PNG", "dog/1.jpg", "cat/old/a.webp")))
    source = FolderSource(tmp_path)
    assert source.targets.names == ("cat", "dog")
    assert keys(source) == ["cat/b.PNG", "cat/old/a.webp", "dog/1.jpg", "dog/2.png"]
    assert labels(source) == ["cat", "cat", "dog", "dog"]
    assert source.targets.values.dtype == np.int64
    assert source.load(3).getpixel((0, 0)) == Image.open(tmp_path / "dog/2.png").getpixel((0, 0))
    assert source.notes == source.left_out == ()


def test_the_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    names = [f"{c}/{i}.png" for c in "ba" for i in (3, 10, 1, 2)]
    save(*(tmp_path / "one" / name for name in names))
    save(*(tmp_path / "two" / name for name in reversed(names)))
    assert keys(FolderSource(tmp_path / "one")) == keys(FolderSource(tmp_path / "two"))


@no_plug_in
def test_every_file_is_used_or_counted_with_its_reason(tmp_path: Path) -> None:
    """40 of 50 files were dropped, and `data check` said that every image can be read."""
    save(*(tmp_path / f"cat/{name}" for name in ("1.png", "2.jpe", "3.jpg_large", "4.jpg?w=200")))
    save(tmp_path / "cat/5", tmp_path / "stray.png", tmp_path / "cat/.2.png")
    Image.new("RGB", (9, 9), (9, 9, 9)).save(tmp_path / "cat/6.jp2", "JPEG2000")
    Image.new("RGB", (9, 9)).save(tmp_path / "cat/7.tga", "TGA")
    Image.new("RGB", (9, 9)).save(tmp_path / "cat/8.icon", "ICO")
    for i in range(12):
        (tmp_path / f"cat/IMG_{i:02}.HEIC").write_bytes(HEIC)
    (tmp_path / "cat/9.nef").write_bytes(b"II*\0" + bytes(500))  # else a thumbnail, as TIFF
    (tmp_path / "cat/notes.txt").write_text("BMW, P6 and other words that begin like images")
    (tmp_path / "labels.csv").write_text("ClassId,Name\n0,cat\n")
    (tmp_path / "cat/none").touch()
    (tmp_path / "cat/Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "__MACOSX/cat").mkdir(parents=True)
    (tmp_path / "__MACOSX/cat/._1.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "cat/empty.png").touch()  # an image by its ending: told when it is read
    (tmp_path / "dog").mkdir()
    os.mkfifo(tmp_path / "cat/pipe.png")
    os.mkfifo(tmp_path / "cat/pipe")
    source = FolderSource(tmp_path)
    assert keys(source) == [
        *("cat/1.png", "cat/2.jpe", "cat/3.jpg_large", "cat/4.jpg?w=200", "cat/5", "cat/6.jp2"),
        "cat/empty.png",
    ]
    for i in range(6):
        assert source.load(i).size in ((2, 2), (9, 9))
    assert {one.kind: (one.count, one.examples) for one in source.left_out} == {
        "images outside the class folders": (1, ("stray.png",)),
        "hidden and system files": (3, ("__MACOSX", "cat/.2.png", "cat/Thumbs.db")),
        "TGA images": (1, ("cat/7.tga",)),
        "ICO images": (1, ("cat/8.icon",)),
        "camera raw images": (1, ("cat/9.nef",)),
        "HEIC images": (12, tuple(f"cat/IMG_{i:02}.HEIC" for i in range(5))),
        "other files": (2, ("labels.csv", "cat/notes.txt")),
        "empty files": (1, ("cat/none",)),
        "devices, pipes and sockets": (2, ("cat/pipe", "cat/pipe.png")),
    }
    assert all(one.reason for one in source.left_out)
    assert source.notes == ("class folders without images: dog",)


@given(
    st.lists(st.sampled_from(["image", "text", "heic", "empty", "hidden", "link", "gone"])),
    st.lists(st.sampled_from(["train", "val", "valid", "extra", "train_part2"]), min_size=1),
)
@settings(max_examples=30, deadline=None)
def test_nothing_is_lost(kinds: list[str], folders: list[str]) -> None:
    """However the files lie, as many are used and told as there are."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        save(root / "train/cat/0.png", root / "val/cat/0.png")
        for i, kind in enumerate(kinds):
            folder = root / folders[i % len(folders)] / "cat"
            folder.mkdir(parents=True, exist_ok=True)
            match kind:
                case "image":
                    save(folder / f"new{i}.odd")
                case "link" | "gone":
                    target = root / ("train" if kind == "link" else "gone") / "cat/0.png"
                    (folder / f"new{i}.png").symlink_to(target)
                case "hidden":
                    save(folder / f"._{i}.png")
                case _:
                    content = {"text": b"words", "heic": HEIC, "empty": b""}[kind]
                    (folder / f"{i}.odd").write_bytes(content)
        source = FolderSource(root)
        told = sum(one.count for one in source.left_out)
        assert len(source) + told == 2 + len(kinds)


@pytest.mark.skipif("HEIF" not in FORMATS, reason="no plug-in for HEIC is installed")
def test_heic_is_read_where_its_plug_in_is_installed(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(tmp_path / "cat/1.HEIC", "HEIF")
    source = FolderSource(tmp_path)
    assert (source.load(0).size, source.left_out) == ((64, 48), ())


# Symbolic links


def test_a_subset_made_of_links_is_a_data_set(tmp_path: Path) -> None:
    save(*(tmp_path / f"full/{c}/{i}.png" for c in ("cat", "dog") for i in range(3)))
    for name in ("cat/1.png", "dog/2.png"):
        (tmp_path / "few" / name).parent.mkdir(parents=True)
        (tmp_path / "few" / name).symlink_to(f"../../full/{name}")
    source = FolderSource(tmp_path / "few")
    assert (keys(source), source.left_out) == (["cat/1.png", "dog/2.png"], ())
    assert source.load(1).tobytes() == Image.open(tmp_path / "full/dog/2.png").tobytes()


def test_links_lead_to_files_and_within_the_data_but_not_in_a_circle(tmp_path: Path) -> None:
    data = tmp_path / "data"
    save(data / "cat/1.png", data / "more/deep/2.png", tmp_path / "elsewhere/3.png")
    (data / "cat/here").symlink_to("../more")
    (data / "cat/loop").symlink_to(data)
    (data / "more/deep/back").symlink_to("../../more")
    (data / "cat/self.png").symlink_to("self.png")
    (data / "cat/gone.png").symlink_to("gone")
    (data / "cat/zero.png").symlink_to("/dev/zero")
    (data / "far").symlink_to(tmp_path / "elsewhere")
    source = FolderSource(data)
    assert keys(source) == ["cat/1.png", "cat/here/deep/2.png", "more/deep/2.png"]
    assert {(one.kind, one.reason): one.examples for one in source.left_out} == {
        ("symbolic links", "they lead nowhere"): ("cat/gone.png", "cat/self.png"),
        ("symbolic links", "they lead in a circle"): (
            *("cat/loop", "cat/here/deep/back", "more/deep/back"),
        ),
        ("devices, pipes and sockets", "they are no files"): ("cat/zero.png",),
        (
            "symbolic links to folders elsewhere",
            "follow_links=True follows them",
        ): ("far",),
    }
    followed = FolderSource(data, FolderRules(follow_links=True))
    assert keys(followed)[2] == "far/3.png" and len(followed.left_out) == 3


def test_links_among_folders_do_not_multiply(tmp_path: Path) -> None:
    for a in range(12):  # 12! paths without a circle
        save(tmp_path / f"{a}/{a}.png")
        for b in range(12):
            (tmp_path / f"{a}/to{b}").symlink_to(f"../{b}")
    assert len(FolderSource(tmp_path)) < 12**3


def test_data_behind_a_link_is_data(tmp_path: Path) -> None:
    save(tmp_path / "real/cat/1.png")
    (tmp_path / "real/cat/2.png").symlink_to("1.png")
    (tmp_path / "link").symlink_to("real")
    assert len(FolderSource(tmp_path / "link")) == 2


def test_odd_names_are_kept_apart_and_can_be_printed(tmp_path: Path) -> None:
    odd = ["a b", "a'\"b", "-x", "grüße", "猫🐈", "שלום", "new\nline", "x" * 250, "back\\slash"]
    save(*(tmp_path / "cat" / f"{name}.png" for name in odd))
    save(*(tmp_path / "cat" / os.fsdecode(name) for name in (b"\xe9.png", b"\\xe9.png")))
    source = FolderSource(tmp_path)
    assert len(set(keys(source))) == len(source) == len(odd) + 2
    assert r"cat/\xe9.png" in keys(source)
    for i in range(len(source)):
        source.key(i).encode()
        assert source.load(i).size == (2, 2)


def test_class_names_typed_on_a_mac_and_elsewhere_are_one(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        save(tmp_path / unicodedata.normalize(form, "café") / f"{form}.png")
    assert FolderSource(tmp_path).targets.names == (unicodedata.normalize("NFC", "café"),)


def test_case_counts_in_class_names(tmp_path: Path) -> None:
    save(tmp_path / "Cat/1.png", tmp_path / "cat/1.png")
    assert FolderSource(tmp_path).targets.names == ("Cat", "cat")


def test_an_image_deleted_meanwhile_is_unreadable_no_crash(tmp_path: Path) -> None:
    save(tmp_path / "cat/1.png")
    source = FolderSource(tmp_path)
    (tmp_path / "cat/1.png").unlink()
    with pytest.raises(UnreadableImage, match=r"cat/1\.png: no such file"):
        source.load(0)


def test_many_paths_take_little_memory_and_survive_a_worker(tmp_path: Path) -> None:
    save(tmp_path / "cat/1.png")
    for i in range(2000):
        os.link(tmp_path / "cat/1.png", tmp_path / f"cat/{i:05}.png")
    packed = pickle.dumps(FolderSource(tmp_path))
    assert len(packed) < 2001 * 40
    assert pickle.loads(packed).key(7) == "cat/00007.png"


# Arrays


def test_arrays_of_one_channel_load_as_grey_and_of_three_as_rgb() -> None:
    two, grey, rgb = (np.full((2, 3, 4, *c), 9, np.uint8) for c in ((), (1,), (3,)))
    for images, mode in ((two, "L"), (grey, "L"), (rgb, "RGB")):
        source = ArraySource(images, np.array([0, 1]), ("a", "b"), "test")
        assert (source.load(1).mode, source.load(1).size) == (mode, (4, 3))
        assert keys(source) == ["test/0", "test/1"]


@pytest.mark.parametrize("shape, dtype", [((2, 3, 4, 4), "u1"), ((2, 9), "u1"), ((2, 3, 4), "f4")])
def test_arrays_of_another_shape_or_type_are_refused(shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(DataError, match=r"they must be uint8 \[n h w\]"):
        ArraySource(np.zeros(shape, dtype), np.array([0, 1]), ("a", "b"), "train")


def test_as_many_labels_as_images() -> None:
    with pytest.raises(DataError, match="train has 2 images but 3 labels"):
        ArraySource(np.zeros((2, 3, 4), np.uint8), np.array([0, 1, 1]), ("a", "b"), "train")


def test_a_subset_is_a_source() -> None:
    images = np.arange(4, dtype=np.uint8)[:, None, None] * np.ones((2, 2), np.uint8)
    source = ArraySource(images, np.array([0, 2, 2, 1]), ("a", "b", "c"), "train")
    subset = Subset(source, np.array([2, 0]))
    assert (len(subset), keys(subset), labels(subset)) == (2, ["train/2", "train/0"], ["c", "a"])
    assert subset.load(0).getpixel((0, 0)) == 2


# MedMNIST's .npz


def medmnist(file: Path, **changes: np.ndarray) -> Path:
    arrays = {}
    for part, n in (("train", 6), ("val", 3), ("test", 2)):
        arrays[f"{part}_images"] = np.full((n, 4, 5, 3), n, np.uint8)
        arrays[f"{part}_labels"] = np.arange(n)[:, None] % 2
    np.savez_compressed(file, **{**arrays, **changes})
    return file


def test_npz(tmp_path: Path) -> None:
    source = open_data(medmnist(tmp_path / "set.npz"))
    assert source.targets.names == ("0", "1")
    assert source.part.tolist() == [0] * 6 + [1] * 3 + [2] * 2
    assert source.targets.values.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0, 0, 1]
    assert (source.key(6), source.load(6).size) == ("val/0", (5, 4))
    assert source.load(10).getpixel((0, 0)) == (2, 2, 2)


def test_npz_with_several_labels_an_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    several = {
        f"{p}_labels": rng.integers(0, 2, (n, 14))
        for p, n in zip(("train", "val", "test"), (6, 3, 2), strict=True)
    }
    source = open_data(medmnist(tmp_path / "set.npz", **several))
    assert source.targets.values.dtype == np.uint8
    assert source.targets.values.shape == (11, 14)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_images": np.zeros((6, 4, 4, 4, 3), np.uint8)}, "they must be uint8"),
        ({"train_labels": np.zeros((5, 1), int)}, "train has 6 images but 5 labels"),
        ({"val_labels": np.zeros((3, 2), int)}, "differ in shape"),
        ({"val_labels": np.zeros((3, 1), np.float32)}, "must be whole numbers"),
        ({"train_labels": np.array([{"a": 1}] * 6, object)}, "as plain arrays"),
    ],
)
def test_an_npz_of_another_kind(
    tmp_path: Path, changes: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_data(medmnist(tmp_path / "set.npz", **changes))


def test_an_npz_without_training_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x_train=np.zeros(3), y_train=np.zeros(3))
    with pytest.raises(DataError, match="its arrays are x_train, y_train"):
        open_data(tmp_path / "set.npz")


def test_a_damaged_npz(tmp_path: Path) -> None:
    whole = medmnist(tmp_path / "set.npz").read_bytes()
    for cut in range(0, len(whole), 37):
        (tmp_path / "cut.npz").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"cut\.npz"):
            open_data(tmp_path / "cut.npz")
    for start in range(0, len(whole) - 40, 17):
        (tmp_path / "cut.npz").write_bytes(whole[:start] + bytes(40) + whole[start + 40 :])
        try:
            open_data(tmp_path / "cut.npz")
        except DataError:
            continue


# MNIST's IDX files


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    return header + array.tobytes()


IMAGES, LABELS = np.arange(24, dtype=np.uint8).reshape(4, 3, 2), np.array([5, 7, 5, 7], np.uint8)


def mnist(folder: Path, end: str = "", dash: str = "-") -> Path:
    for stem in ("train", "t10k"):
        for name, array in (("images{}idx3", IMAGES), ("labels{}idx1", LABELS)):
            content = idx(array)
            file = folder / f"{stem}-{name.format(dash)}-ubyte{end}"
            file.write_bytes(gzip.compress(content) if end else content)
    return folder


@pytest.mark.parametrize("end, dash", [("", "-"), (".gz", "-"), ("", ".")])
def test_idx(tmp_path: Path, end: str, dash: str) -> None:
    source = open_data(mnist(tmp_path, end, dash))
    assert source.targets.names == ("5", "7")
    assert source.targets.values.tolist() == [0, 1] * 4
    assert source.part.tolist() == [0] * 4 + [2] * 4
    assert (source.key(5), source.load(5).size, source.load(5).mode) == ("test/1", (2, 3), "L")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not an IDX file"),
        (b"\0\0\x08\x03\0\0", "not an IDX file"),
        (idx(IMAGES, kind=13), "not an IDX file of uint8"),
        (idx(LABELS), "not an IDX file of uint8 with 3"),
        (idx(IMAGES)[:-1], "is damaged"),
        (idx(IMAGES) + b"x", "is damaged"),
        (idx(IMAGES)[:4] + b"\xff" * 12 + idx(IMAGES)[16:], "claims"),
        (idx(IMAGES[:3]), "train has 3 images but 4 labels"),
    ],
)
def test_a_damaged_idx_file(tmp_path: Path, content: bytes, message: str) -> None:
    file = mnist(tmp_path) / "train-images-idx3-ubyte"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_data(tmp_path)


def test_a_gzip_bomb_stops_where_the_header_ends(tmp_path: Path) -> None:
    mnist(tmp_path, ".gz")
    bomb = gzip.compress(idx(IMAGES) + bytes(50_000_000), 1)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(bomb)
    with pytest.raises(DataError, match="is damaged"):
        open_data(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES))[:-12])
    with pytest.raises(DataError, match="cannot read"):
        open_data(tmp_path)


def test_idx_files_come_in_pairs(tmp_path: Path) -> None:
    (mnist(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="lacks t10k-labels-idx1-ubyte"):
        open_data(tmp_path)


# What is given


def test_a_near_name_is_offered(tmp_path: Path) -> None:
    (tmp_path / "my_photos").mkdir()
    with pytest.raises(DataError, match=r"no such file or folder: .* did you mean .*/my_photos\?"):
        open_data(tmp_path / "my_photo")
    with pytest.raises(DataError, match=r"did you mean samples:fashion-mnist\?"):
        open_data("fashion-mnist")
    with pytest.raises(DataError, match=r"nowhere$"):
        open_data(tmp_path / "no/where/nowhere")


def test_impossible_names(tmp_path: Path) -> None:
    for name in ("x" * 300, "nul\0nul", "~nobody_of_that_name/photos"):
        with pytest.raises(DataError):
            open_data(tmp_path / name)
    with pytest.raises(DataError):
        open_data("~nobody_of_that_name/photos")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="an archive must be unpacked first"):
        open_data(tmp_path / "photos.zip")


@no_plug_in
def test_a_folder_without_images_says_what_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match=r"no images in .*: each class needs .*\.jpg .*\.webp"):
        open_data(tmp_path)
    (tmp_path / "cat/1.heic").write_bytes(HEIC)
    with pytest.raises(DataError, match=r"left out: HEIC images, 1 \(.*pillow-heif\): cat/1\.heic"):
        open_data(tmp_path)


def test_images_without_class_folders_are_told_how_to_lie(tmp_path: Path) -> None:
    save(tmp_path / "1.png", tmp_path / "2.png")
    with pytest.raises(DataError, match=r"as in .*/cat/1\.png, or list them in .*labels\.csv"):
        open_data(tmp_path)


def test_naming_columns_of_a_folder_is_a_mistake(tmp_path: Path) -> None:
    from vitrail.data.sources.csvfile import Columns

    save(tmp_path / "cat/1.png")
    with pytest.raises(UsageError, match="is no CSV file"):
        open_data(tmp_path, Columns(label="kind"))


def test_opening_and_loading_change_nothing(tmp_path: Path) -> None:
    save(tmp_path / "cat/1.png", tmp_path / "dog/1.png")
    (tmp_path / "cat/broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    before = tree(tmp_path)
    source = open_data(tmp_path)
    for i in range(len(source)):
        try:
            source.load(i)
        except UnreadableImage:
            continue
    assert tree(tmp_path) == before


def test_one_image_of_many_classes_takes_no_table_of_all() -> None:
    """ImageNet-21k has 21,843: a square of them would be two gigabytes for each image."""
    classes = Classes(tuple(map(str, range(3000))), np.arange(3000))
    tracemalloc.start()
    shares = classes.target(7, None)["classes"]
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shares.dtype == np.float32 and np.flatnonzero(shares).tolist() == [7]
    assert taken < 100_000
    rows = classes.shares(np.array([[2, 0], [5, 2]]))
    assert rows.shape == (2, 2, 3000) and rows.argmax(-1).tolist() == [[2, 0], [5, 2]]
