"""What `check` tells about a data set."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.data import ArraySource, CsvSource, FolderSource
from vitrail.data.check import CheckReport, Spread, check


def save(file: Path, size: tuple[int, int], grey: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(file)


@pytest.mark.parametrize("threads", [1, 3])
def test_everything_is_found(tmp_path: Path, threads: int) -> None:
    save(tmp_path / "cat/1.png", (10, 4), 1)
    save(tmp_path / "cat/2.bmp", (10, 4), 1)
    save(tmp_path / "cat/3.png", (20, 8), 2)
    save(tmp_path / "dog/1.png", (90, 2), 3)
    save(tmp_path / "dog/2.png", (20, 8), 2)
    (tmp_path / "dog/3.jpg").write_text("<html>")
    (tmp_path / "dog/4.jpg").write_bytes(b"")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*")}
    done: list[int] = []
    report = check(FolderSource(tmp_path), threads, done.append)
    assert report == CheckReport(
        images=7,
        unreadable=(
            ("dog/3.jpg", dict(report.unreadable)["dog/3.jpg"]),
            ("dog/4.jpg", "it is empty"),
        ),
        counts={"cat": 3, "dog": 4},
        width=Spread(10, 20, 90),
        height=Spread(2, 4, 8),
        duplicates=(("cat/1.png", "cat/2.bmp"), ("cat/3.png", "dog/2.png")),
        conflicts=(("cat/3.png", "dog/2.png"),),
    )
    assert "none of the formats" in report.unreadable[0][1]
    assert done == [1, 2, 3, 4, 5, 6, 7]
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*")} == before


def test_the_same_bytes_in_another_shape_are_no_duplicate(tmp_path: Path) -> None:
    save(tmp_path / "cat/wide.png", (8, 2), 0)
    save(tmp_path / "cat/square.png", (4, 4), 0)
    assert check(FolderSource(tmp_path), 1).duplicates == ()


def test_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\n1.png,a|b\n2.png,b\n")
    (tmp_path / "1.png").touch()
    report = check(CsvSource(tmp_path / "labels.csv"), 2)
    assert [key for key, _ in report.unreadable] == ["1.png", "2.png"]
    assert (report.width, report.height, report.duplicates) == (None, None, ())
    assert report.counts == {"a": 1, "b": 2}


def test_many_images_are_looked_at_in_blocks() -> None:
    images = np.arange(300, dtype=np.uint16).view(np.uint8).reshape(300, 1, 2)
    report = check(ArraySource(images, np.arange(300) % 2, ("a", "b"), "train"), 2)
    assert report.images == 300
    assert report.duplicates == ()
