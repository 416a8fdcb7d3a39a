"""The sample sets: what is there, and what is said where it is not."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from vitrail.data import cache_folder, fetch, open_data, open_splits
from vitrail.errors import DataError, UsageError


def test_the_cache_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("VITRAIL_CACHE", "/mine")
    assert cache_folder() == Path("/mine")
    monkeypatch.delenv("VITRAIL_CACHE")
    assert cache_folder() == Path("/cache/vitrail")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path("/home/me/.cache/vitrail")


def test_an_unknown_set_gets_a_near_name() -> None:
    for attempt in (lambda: open_data("samples:emojis"), lambda: fetch("emojis", print)):
        with pytest.raises(UsageError, match="unknown sample set 'emojis': did you mean 'emoji'"):
            attempt()


def test_emoji() -> None:
    try:
        source = open_data("samples:emoji")
    except DataError:
        pytest.skip("the emoji are not in this checkout")
    assert len(source.targets.names) == 9
    assert source.load(0).mode == "RGB"
    assert source.load(0).size == (128, 128)


def test_fashion_mnist_keeps_its_official_split() -> None:
    try:
        splits = open_splits("samples:fashion-mnist", seed=0, val_fraction=0)
    except DataError:
        pytest.skip("run `vitrail data fetch fashion-mnist`")
    assert splits.val is splits.test
    assert np.bincount(splits.train.targets.values).tolist() == [6000] * 10
    assert np.bincount(splits.val.targets.values).tolist() == [1000] * 10
    assert splits.train.targets.names[splits.train.targets.values[0]] == "ankle_boot"
    assert (splits.train.key(0), splits.train.load(0).size) == ("train/0", (28, 28))
    assert len(open_splits("samples:fashion-mnist", seed=0).val) == 12_000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for Fashion-MNIST in a fresh cache."""
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path))
    return tmp_path / "data" / "fashion-mnist"


def test_a_set_that_is_not_fetched_says_how_to_fetch_it(cache: Path) -> None:
    with pytest.raises(DataError, match=r"run `vitrail data fetch fashion-mnist`"):
        open_data("samples:fashion-mnist")


def test_without_apt_the_files_can_be_put_by_hand(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError) as caught:
        fetch("fashion-mnist", print)
    assert "this machine has no apt-get" in str(caught.value)
    assert f"put into {cache} by hand: train-images-idx3-ubyte, train-" in str(caught.value)


def command(folder: Path, name: str, script: str) -> None:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_when_apt_fails_its_own_words_are_passed_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command(tmp_path, "apt-get", "echo 'E: Unable to locate package' >&2; exit 100")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        DataError, match=r"failed \(E: Unable to locate package\); `apt-get update`"
    ):
        fetch("fashion-mnist", print)


def test_a_package_with_other_files_is_refused_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = gzip.compress(b"another file")
    member = tarfile.TarInfo("./usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz")
    member.size = len(content)
    with tarfile.open(tmp_path / "package.tar", "w") as archive:
        archive.addfile(member, io.BytesIO(content))
    command(tmp_path, "apt-get", "/bin/touch dataset.deb")
    command(tmp_path, "dpkg-deb", f"/bin/cat {tmp_path}/package.tar")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="is not the file pinned here"):
        fetch("fashion-mnist", print)
    assert list(cache.iterdir()) == []


def test_other_files_put_by_hand_do_not_pass_for_it(cache: Path) -> None:
    cache.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (cache / f"{name}-ubyte.gz").write_bytes(gzip.compress(b"MNIST, but not Fashion-MNIST"))
    with pytest.raises(DataError, match=r"not in .* or is damaged: run `vitrail data fetch"):
        open_data("samples:fashion-mnist")


def test_what_is_there_is_checked_and_kept() -> None:
    folder = cache_folder() / "data" / "fashion-mnist"
    if not folder.exists():
        pytest.skip("run `vitrail data fetch fashion-mnist`")
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    said: list[str] = []
    assert fetch("fashion-mnist", said.append) == folder
    assert said == [f"checking what is in {folder}"]
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
