r"""ShardSource: images in tar files (WebDataset), read at any place in any order.

A shard is a tar file in which the files of one image lie side by side under one key: KEY.jpg and
KEY.cls. Data sets of millions of files become a few large ones, which disks, networks and object
stores read many times faster. Other programs read them from front to back; here every tar file is
listed once (listing.py) and then read by position. So order, splits, resuming and evaluation are
what they are for a folder, and there is no state of a stream to save.

What `write_shards` makes, `ShardSource` gives back image by image: the same keys in the same order
with the same bytes, so that a run on the shards is the run on the folder, bit for bit.

Format: https://github.com/webdataset/webdataset.
"""

import json
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np
from jaxtyping import Int, Int32, UInt8
from PIL import Image

from vitrail.data.names import PackedNames, label_name, printable, shortened
from vitrail.data.pixels.decode import Slice, UnreadableImage, read_image
from vitrail.data.sources.formats import unread
from vitrail.data.sources.listing import LEFT_OUT, Listing, Said, listed
from vitrail.data.sources.parts import part_named, part_within
from vitrail.data.sources.source import PARTS, LeftOut, Tally, file_stamp
from vitrail.data.sources.walk import HIDDEN, is_hidden
from vitrail.data.targets import Classes, Nothing, Texts
from vitrail.disk import sha256
from vitrail.errors import DataError

INDEX = "index.json"
"""Beside our shards: names of the classes, parts, counts, and the SHA-256 of every shard."""

FORMAT = "vitrail shards 1"
MOST_IMAGE_BYTES = 256 << 20

_OPEN_FILES = 128
_CAPTIONS = 100  # so many images, each with a label of its own, are no classes
_PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")


class ShardImages:
    """The images of tar files, read at their place, whatever is said of them."""

    def __init__(
        self, place: Path, files: Sequence[Path], listings: Sequence[Listing], *, ours: bool
    ) -> None:
        """`ours`: whether we wrote these shards, and keys are as we write them."""
        self._files = tuple(map(str, files))
        self._stamps = tuple(file_stamp(file) for file in files)
        self.left_out = (*_beside(place, files), *_left_out(files, listings))
        self.notes: tuple[str, ...] = ()
        sizes = [len(listing.offsets) for listing in listings]
        shard = np.repeat(np.arange(len(files), dtype=np.int32), sizes)
        parts = np.array([_part(place, file) for file in files], np.uint8)
        keys = list(_keys(place, files, listings, ours=ours))
        if len({key for _, key in keys}) < len(keys):
            raise DataError(f"two images in the shards of {place} have one key: write them anew")
        # Ours in the order of the source that they were written from, others as they lie there.
        order = np.argsort([number for number, _ in keys], kind="stable")
        self._order: Int[np.ndarray, " n"] = order
        self._names = PackedNames(keys[i][1] for i in order)
        self._shard: Int32[np.ndarray, " n"] = shard[order]
        self._offset = np.concatenate([listing.offsets for listing in listings])[order]
        self._size = np.concatenate([listing.sizes for listing in listings])[order]
        self.part: UInt8[np.ndarray, " n"] = parts[self._shard]

    def __len__(self) -> int:
        return len(self._names)

    def key(self, i: int) -> str:
        return self._names[i]

    def load(self, i: int) -> Image.Image:
        try:
            return read_image(self._content(i))
        except UnreadableImage as error:
            raise UnreadableImage(error.reason, self.key(i)) from error

    def encoded(self, i: int) -> Slice:
        """Where image `i` lies, for whoever reads it elsewhere."""
        file = Path(self._files[self._shard[i]])
        return Slice(file, int(self._offset[i]), int(self._size[i]))

    def _content(self, i: int) -> bytes:
        file, offset, size = self.encoded(i)
        if size > MOST_IMAGE_BYTES:
            raise UnreadableImage(f"it has {size} bytes, more than {MOST_IMAGE_BYTES}")
        try:
            opened = _opened(str(file), self._stamps[self._shard[i]])
            content = os.pread(opened.fd, size, offset)
        except OSError as error:
            raise UnreadableImage(f"{file}: {(error.strerror or str(error)).lower()}") from error
        if len(content) < size:
            raise UnreadableImage(f"{file} ends before it does")
        return content

    def stamp(self, i: int) -> str:
        return f"{file_stamp(Path(self._files[self._shard[i]]))} {self._offset[i]}"


class ShardSource(ShardImages):
    """The images of a folder of tar files, or of one tar file, with their labels.

    The folder holds NAME.tar files, or train/, val/ and test/ with such files; else a part is
    known by a word in the file's name (imagenet-val-0001.tar). A label is the text of KEY.cls or
    KEY.txt, or in KEY.json under `label`, `labels` or the like, several as a list. Whole numbers
    are named by the lines of classes.txt, where there is one. Members that are no plain files are
    never read; what is not used is told in `left_out`.

    Images are read at their place, without the members before them. Safe in threads and worker
    processes. Raises DataError for a file that is no tar file, is damaged or cut short, or is not
    what `index.json` says, and where nothing has both an image and a label.
    """

    def __init__(self, root: Path | str) -> None:
        place = Path(os.path.abspath(root))
        files, listings, about = _read(place, "labels")
        if not any(len(listing.offsets) for listing in listings):
            raise DataError(_nothing_found(place, listings))
        super().__init__(place, files, listings, ours=about is not None)
        labels = [listing.labels[code] for listing in listings for code in listing.codes.tolist()]
        self.targets = _targets(place, labels, about).rows(self._order)


class UnlabelledShards(ShardImages):
    """The images of such files, all of them, whatever is said of them.

    Raises DataError as `ShardSource`, and where there is no image.
    """

    def __init__(self, root: Path | str) -> None:
        place = Path(os.path.abspath(root))
        files, listings, about = _read(place, "nothing")
        if not any(len(listing.offsets) for listing in listings):
            raise DataError(f"no image is in the tar files of {place}: KEY.jpg, KEY.png and so on")
        super().__init__(place, files, listings, ours=about is not None)
        self.targets = Nothing(len(self))


class PairShards(ShardImages):
    """The images of such files that have a text: KEY.txt or KEY.caption, or in KEY.json a caption
    or several (what img2dataset writes).

    Raises DataError as `ShardSource`, and where no image has a text.
    """

    def __init__(self, root: Path | str) -> None:
        place = Path(os.path.abspath(root))
        files, listings, about = _read(place, "texts")
        if not any(len(listing.offsets) for listing in listings):
            told = "".join(f"; {one.sentence()}" for one in _left_out(files, listings))
            raise DataError(f"no image with a text is in the tar files of {place}{told}")
        super().__init__(place, files, listings, ours=about is not None)
        texts = (listing.labels[code] for listing in listings for code in listing.codes.tolist())
        self.targets = Texts.written(texts).rows(self._order)


def _read(place: Path, said: Said) -> tuple[list[Path], list[Listing], "_About | None"]:
    """The tar files of a data set, what they hold, and our own index of them, to which they fit."""
    files = _shard_files(place)
    if not files:
        raise DataError(_no_shards(place))
    listings = [listed(file, said) for file in files]
    about = _read_about(place)
    if about is not None:
        _check_against(about, files, listings)
    return files, listings, about


class _OpenFile:
    """A descriptor that lives as long as somebody reads from it.

    It is read with `pread` only, which leaves no position behind: threads and forked processes
    may share it.
    """

    def __init__(self, file: str, stamp: str) -> None:
        if file_stamp(Path(file)) != stamp:
            raise OSError("it is gone, or has changed since the data was opened")
        self.fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


@lru_cache(_OPEN_FILES)  # of a process, not of a source: a source that is pickled has none
def _opened(file: str, stamp: str) -> _OpenFile:
    return _OpenFile(file, stamp)


def has_shards(folder: Path) -> bool:
    """Whether `folder` holds tar files, itself or in train/, val/, test/, and no class folders."""
    with os.scandir(folder) as entries:
        names = {entry.name: entry.is_dir() for entry in entries if entry.name[0] != "."}
    folders = [name for name, is_folder in names.items() if is_folder]
    if any(name.endswith((".tar", *_PACKED)) for name, is_folder in names.items() if not is_folder):
        return not folders or (folder / INDEX).is_file()
    return bool(folders) and all(
        part_named(name) and any((folder / name).glob("*.tar")) for name in folders
    )


def _shard_files(root: Path) -> list[Path]:
    """The tar files of a data set in the order of their names."""
    if not root.is_dir():
        return [root]
    try:
        places = [root, *(p for p in root.iterdir() if p.is_dir() and part_named(p.name))]
        return sorted(
            file
            for place in places
            for file in place.iterdir()
            if file.suffix == ".tar" and not file.name.startswith(".") and file.is_file()
        )
    except OSError as error:
        raise DataError(f"cannot list {error.filename}: {error.strerror}") from error


def _no_shards(root: Path) -> str:
    packed = sorted(f.name for f in root.iterdir() if f.name.endswith(_PACKED))
    if packed:
        return (
            f"{root} has compressed tar files only ({shortened(packed)}), which cannot be read at "
            "random places: unpack them to plain .tar files first, as with `gunzip`"
        )
    return f"{root} has no .tar files"


def _nothing_found(root: Path, listings: Sequence[Listing]) -> str:
    fields = sorted({field for listing in listings for field in listing.fields})
    return (
        f"no image with a label is in the tar files of {root}: an image KEY.jpg (.png, .webp, ...) "
        f"needs its label beside it as KEY.cls, KEY.txt or KEY.json; their members end in: "
        f"{shortened(fields, 10) or 'nothing, they are empty'}"
    )


def _beside(root: Path, shards: Sequence[Path]) -> tuple[LeftOut, ...]:
    """Files that lie beside the shards and are not read."""
    unused = Tally()
    for folder in sorted({root, *(shard.parent for shard in shards)}) if root.is_dir() else ():
        for file in sorted({*folder.iterdir()} - {*shards, root / INDEX, root / "classes.txt"}):
            if is_hidden(file.name):
                unused.add(*HIDDEN, str(file.relative_to(root)))
            elif file.name.endswith(_PACKED):
                unused.add("compressed tar files", "to be unpacked to .tar", file.name)
            elif file.is_file():
                unused.add("other files", "they are no tar files", str(file.relative_to(root)))
    return unused.told()


def _left_out(files: Sequence[Path], listings: Sequence[Listing]) -> tuple[LeftOut, ...]:
    found: dict[str, tuple[int, list[str]]] = {}
    for file, listing in zip(files, listings, strict=True):
        for kind, (count, *names) in listing.left_out.items():
            total, shown = found.get(kind, (0, []))
            found[kind] = total + int(count), [*shown, *(f"{file.name}: {n}" for n in names)]
    told = []
    for key, (total, names) in found.items():
        name, reason = (key, LEFT_OUT[key]) if key in LEFT_OUT else unread(key)
        kind = name if key in LEFT_OUT else f"{name} images"
        told.append(LeftOut(kind, total, reason, tuple(names[:5])))
    return tuple(told)


def _part(root: Path, file: Path) -> int:
    """The part that a shard's folder names, or else a word of its own name; train if none does."""
    if file == root:
        return 0
    for name in (str(file.relative_to(root).parent), file.stem):
        if found := part_within(name):
            return PARTS.index(found.part)
    return 0


def _keys(
    root: Path, files: Sequence[Path], listings: Sequence[Listing], *, ours: bool
) -> Iterator[tuple[int, str]]:
    """For every image, its number in the source it was written from (0 elsewhere), and its key."""
    for file, listing in zip(files, listings, strict=True):
        prefix = file.stem if file == root else str(file.relative_to(root).with_suffix(""))
        for key in listing.keys:
            if not ours:
                yield 0, printable(f"{prefix}/{key}")
                continue
            number, dash, name = key.partition("-")
            if not (dash and number.isdecimal() and len(number) < 19):
                raise DataError(
                    f"{file} holds {printable(key)!r}, which was not written with {INDEX}: "
                    f"remove {INDEX} to open it as it is"
                )
            yield int(number), unquote(name)


class _About(NamedTuple):
    """The content of `index.json`."""

    classes: tuple[str, ...]
    several: bool
    shards: dict[str, tuple[int, int, str]]
    """By name: images, bytes, and SHA-256."""


def _read_about(root: Path) -> _About | None:
    """Our own index of a folder of shards; None if it has none."""
    file = root / INDEX
    if not file.is_file():
        return None
    try:
        about = json.loads(file.read_bytes())
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            return None  # somebody else's
        classes = tuple(map(str, about["classes"]))
        shards = {
            str(shard["name"]): (int(shard["images"]), int(shard["bytes"]), str(shard["sha256"]))
            for shard in about["shards"]
        }
        return _About(classes, about["labels"] == "several", shards)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def _check_against(about: _About, files: Sequence[Path], listings: Sequence[Listing]) -> None:
    """Refuse shards that are missing, too many, or of another size than the index says."""
    here = {file.name: (file, listing) for file, listing in zip(files, listings, strict=True)}
    if missing := sorted(set(about.shards) - set(here)):
        raise DataError(f"{files[0].parent} lacks {len(missing)} shards: {shortened(missing)}")
    if foreign := sorted(set(here) - set(about.shards)):
        raise DataError(
            f"{files[0].parent} holds tar files that {INDEX} does not list: {shortened(foreign)}; "
            "take them away"
        )
    for name, (file, listing) in here.items():
        images, size, _ = about.shards[name]
        if (len(listing.offsets), file.stat().st_size) != (images, size):
            raise DataError(
                f"{file} is not the shard that was written: {INDEX} says {images} images and "
                f"{size} bytes; copy it again, or write the shards anew"
            )


def changed_shards(folder: Path) -> tuple[str, ...]:
    """The names of our shards in `folder` whose SHA-256 is not that of `index.json`.

    All bytes are read. Shards of others have no sums, and none is named.
    """
    about = _read_about(folder) if folder.is_dir() else None
    return tuple(
        name
        for name, (_, _, stated) in (about.shards if about else {}).items()
        if sha256(folder / name) != stated
    )


def _class_names(root: Path, about: _About | None) -> tuple[str, ...] | None:
    """The names of classes 0, 1, ...; None if nobody says them."""
    if about is not None:
        return about.classes
    file = root / "classes.txt"
    if not file.is_file():
        return None
    return read_class_names(file)


def read_class_names(file: Path) -> tuple[str, ...]:
    """The names of classes 0, 1, ..., one a line. Raises DataError for a file that has none."""
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read {file}: {reason}") from error
    names = tuple(map(label_name, lines))
    if not names or len(set(names)) < len(names) or "" in names:
        raise DataError(f"{file} must hold one class a line, none of them empty and none twice")
    return names


def _targets(root: Path, labels: Sequence[tuple[str, ...]], about: _About | None) -> Classes:
    names = _class_names(root, about)
    several = (about is not None and about.several) or any(len(found) != 1 for found in labels)
    if names is None:
        return Classes.named(class_table(str(root), labels), labels, several=several)
    index = {str(i): i for i in range(len(names))}
    if about is None:
        index |= {name: i for i, name in enumerate(names) if name not in index}
    if unknown := sorted(set(chain.from_iterable(labels)) - set(index)):
        raise DataError(
            f"labels of {root} that are not among its {len(names)} classes: "
            f"{shortened(unknown)}; {INDEX if about else 'classes.txt'} must list them all"
        )
    found = [tuple(names[index[label]] for label in one) for one in labels]
    return Classes.named(names, found, several=several)


def class_table(where: str, labels: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The names that occur, sorted; numbers by their size. Raises DataError for captions."""
    distinct = set(chain.from_iterable(labels))
    if len(distinct) == len(labels) >= _CAPTIONS:
        raise DataError(f"no two images of {where} have one label: these are captions, not classes")
    numbers = all(label.isdecimal() and len(label) < 19 for label in distinct)
    return tuple(sorted(distinct, key=int) if numbers else sorted(distinct))
