"""Which images a tar file of WebDataset holds, where, and with what labels; found once and kept.

The list is kept in the user's cache, for the file as it is now: its path, size and time of change.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int32, Int64

from vitrail.data.names import label_name, printable, text_line
from vitrail.data.sources.formats import FORMATS, HEAD_BYTES, IMAGE_EXTENSIONS, image_format
from vitrail.data.sources.kept import keep, kept_place, read_kept
from vitrail.data.sources.source import file_stamp
from vitrail.data.sources.tar import TarReader

_VERSION = 2  # of what is cached
_MOST_LABEL_BYTES = 64 << 10
Said: TypeAlias = Literal["labels", "texts", "nothing"]
"""What of that which is said of images counts."""

# The first that an image has is taken.
_FIELDS = {
    "labels": ("cls", "json", "txt"),
    "texts": ("txt", "caption", "text", "json"),
    "nothing": ("cls", "json", "txt"),
}
_JSON_LABELS = ("labels", "label", "cls", "class", "class_name", "category")
_JSON_TEXTS = ("captions", "caption", "texts", "text", "TEXT", "title")


LEFT_OUT = {
    "hidden and system files": "what begins with a dot is no data",
    "links, devices and sparse files": "only plain files are read",
    "names that lead out of the shard": "only what is below it is read",
    "further images of one key": "the first one is taken",
    "images of other endings": "KEY.jpg, KEY.png and the like are looked for: rename them",
    "members that are neither": "no image, by their content, and no label",
    "bytes behind the end mark": "another tar file? Write it to a file of its own",
    "labels without an image": "KEY.cls needs KEY.jpg or the like beside it",
    "images without a label": "KEY.jpg needs KEY.cls, KEY.txt or KEY.json beside it",
    "images without a text": "KEY.jpg needs KEY.txt, or KEY.json with a caption, beside it",
    "images whose text is empty": "there is nothing to learn from",
    "images whose text is not UTF-8": "nobody says what it is: save it as UTF-8",
}
"""What of a tar file may be left out, and why."""


class Listing(NamedTuple):
    """What `ShardSource` needs to know of one tar file; in its order, one row an image."""

    keys: tuple[str, ...]
    offsets: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, " n"]
    codes: Int32[np.ndarray, " n"]
    """Which of `labels` an image has."""
    labels: tuple[tuple[str, ...], ...]
    several: bool
    """Whether labels came as lists."""
    left_out: dict[str, list[str]]
    """By a key of LEFT_OUT, or the name of a format, how many and a few names: ["12", "a", "b"]."""
    fields: tuple[str, ...]
    """Endings of members."""


def listed(file: Path, said: Said = "labels") -> Listing:
    """The listing of a tar file, from the cache where it is known there as it is now.

    `said`: only what has a label, or a text, is an image of the data set; with nothing every image
    is, and what is said of it does not count. Texts are in the place of labels.
    """
    digest = hashlib.blake2b(os.fsencode(file), digest_size=16).hexdigest()
    place = kept_place("shards", f"{digest}{_ENDINGS[said]}")
    stamp = f"{_VERSION} {' '.join(FORMATS)} {file_stamp(file)}"
    if (known := _read_listing(place, stamp)) is not None:
        return known
    listing = list_images(file, said=said)
    _keep_listing(place, stamp, listing)
    return listing


_ENDINGS = {"labels": "", "texts": "-texts", "nothing": "-bare"}


def list_images(file: Path, said: Said = "labels") -> Listing:
    """List a tar file by its headers, of what `listed` says.

    Raises DataError where it is damaged or cut short.
    """
    found = _Found(said)
    with TarReader(file) as tar:
        for name, kind, offset, size in tar.members():
            while name.startswith("./"):
                name = name[2:]
            folder, slash, last = name.rpartition("/")
            if kind == "folder":
                continue
            if last.startswith("."):
                found.leave_out("hidden and system files", name)
                continue
            if kind != "file":
                found.leave_out("links, devices and sparse files", name)
                continue
            if folder.startswith("/") or name.startswith("/") or ".." in folder.split("/"):
                found.leave_out("names that lead out of the shard", name)
                continue
            stem, _, field = last.partition(".")
            field = field.lower()
            if f".{field}" in IMAGE_EXTENSIONS:
                found.add_image(folder + slash + stem, name, offset, size)
            elif field in _FIELDS[said] and size <= _MOST_LABEL_BYTES:
                found.add_label(folder + slash + stem, field, tar.read(offset, size))
            else:
                form = image_format(tar.read(offset, min(size, HEAD_BYTES)), name)
                found.leave_out(_kind(form), name)
            found.fields.add(field.rpartition(".")[2][:20])
        if tar.trailing:
            found.leave_out("bytes behind the end mark", str(tar.trailing))
    return found.bare_listing() if said == "nothing" else found.listing()


def _kind(form: str | None) -> str:
    """What to call a member that ends like neither an image nor a label."""
    if form is None:
        return "members that are neither"
    return "images of other endings" if form in FORMATS else form


class _Found:
    """What has been seen of a tar file so far."""

    def __init__(self, said: Said) -> None:
        self._said = said
        self._row: dict[str, int] = {}
        self._offset: list[int] = []
        self._size: list[int] = []
        self._label: list[tuple[int, bytes]] = []  # rank in _FIELDS, content
        self._left_out: dict[str, list[str]] = {}
        self.fields: set[str] = set()

    def _at(self, key: str) -> int:
        row = self._row.setdefault(key, len(self._offset))
        if row == len(self._offset):
            self._offset.append(-1)
            self._size.append(0)
            self._label.append((len(_FIELDS[self._said]), b""))
        return row

    def add_image(self, key: str, name: str, offset: int, size: int) -> None:
        row = self._at(key)
        if self._offset[row] >= 0:
            self.leave_out("further images of one key", name)
        else:
            self._offset[row], self._size[row] = offset, size

    def add_label(self, key: str, field: str, content: bytes) -> None:
        row, rank = self._at(key), _FIELDS[self._said].index(field)
        if rank < self._label[row][0]:
            self._label[row] = rank, content

    def leave_out(self, reason: str, name: str) -> None:
        names = self._left_out.setdefault(reason, ["0"])
        names[0] = str(int(names[0]) + 1)
        if len(names) <= 5:
            names.append(printable(name))

    def listing(self) -> Listing:
        keys, rows, codes = [], [], []
        known: dict[tuple[int, bytes], tuple[str, ...] | None] = {}
        numbers: dict[tuple[str, ...], int] = {}
        several = False
        for key, row in self._row.items():
            label = self._label[row]
            if label not in known:
                known[label], is_list = _parsed(self._said, *label)
                several |= is_list
            labels = known[label]
            if self._offset[row] < 0:
                self.leave_out("labels without an image", key)
            elif labels is None:
                self.leave_out(_lacking(self._said, *label), key)
            else:
                keys.append(key)
                rows.append(row)
                codes.append(numbers.setdefault(labels, len(numbers)))
        return Listing(
            tuple(keys),
            np.array(self._offset, np.int64)[rows],
            np.array(self._size, np.int64)[rows],
            np.array(codes, np.int32),
            tuple(numbers),
            several,
            self._left_out,
            tuple(sorted(self.fields)),
        )

    def bare_listing(self) -> Listing:
        """Of every image, and of nothing that is said of any."""
        found = [(key, row) for key, row in self._row.items() if self._offset[row] >= 0]
        rows = [row for _, row in found]
        return Listing(
            tuple(key for key, _ in found),
            np.array(self._offset, np.int64)[rows],
            np.array(self._size, np.int64)[rows],
            np.zeros(len(rows), np.int32),
            ((),),
            False,
            self._left_out,
            tuple(sorted(self.fields)),
        )


def _lacking(said: Said, rank: int, content: bytes) -> str:
    """Why an image has no label or text, by a key of LEFT_OUT."""
    if said == "labels":
        return "images without a label"
    try:
        empty = rank < len(_FIELDS[said]) and not content.decode("utf-8").strip()
    except UnicodeDecodeError:
        return "images whose text is not UTF-8"
    return "images whose text is empty" if empty else "images without a text"


def _parsed(said: Said, rank: int, content: bytes) -> tuple[tuple[str, ...] | None, bool]:
    """The labels, or the texts, in the content of a field, None for none; and whether they were a
    list.
    """
    if rank == len(_FIELDS[said]):
        return None, False
    try:
        found: Any = content.decode("utf-8")
        if _FIELDS[said][rank] == "json":
            record, names = json.loads(found), _JSON_TEXTS if said == "texts" else _JSON_LABELS
            found = next((record[name] for name in names if name in record), None)
    except (ValueError, RecursionError, TypeError):
        return None, False
    is_list = isinstance(found, list)
    if said == "texts":
        texts = [text_line(each) for each in (found if is_list else [found])]
        return tuple(dict.fromkeys(filter(None, texts))) or None, is_list
    labels = [_label_text(label) for label in (found if is_list else [found])]
    kept = tuple(sorted({label for label in labels if label}))
    if None in labels or not (kept or is_list):
        return None, False
    return kept, is_list


def _label_text(label: object) -> str | None:
    """One label in one spelling: 7, "7" and "007" are the same class."""
    if not isinstance(label, str | int) or isinstance(label, bool):
        return None
    text = label_name(str(label))
    return str(int(text)) if text.isdecimal() and len(text) < 19 else text


def _read_listing(place: Path | None, stamp: str) -> Listing | None:
    """What the cache holds; None if there is none of this stamp."""
    found = read_kept(place)
    if found is None or found.about["stamp"] != stamp:
        return None
    arrays, about = found
    text = arrays["keys"].tobytes().decode("utf-8", "surrogateescape")
    return Listing(
        tuple(text.split("\0")) if len(arrays["offsets"]) else (),
        *(arrays["offsets"], arrays["sizes"], arrays["codes"]),
        tuple(tuple(names) for names in about["labels"]),
        *(about["several"], about["left_out"], tuple(about["fields"])),
    )


def _keep_listing(place: Path | None, stamp: str, listing: Listing) -> None:
    about = {
        "stamp": stamp,
        "labels": listing.labels,
        "several": listing.several,
        "left_out": listing.left_out,
        "fields": listing.fields,
    }
    text = "\0".join(listing.keys).encode("utf-8", "surrogateescape")
    arrays = {
        "keys": np.frombuffer(text, np.uint8),
        "offsets": listing.offsets,
        "sizes": listing.sizes,
        "codes": listing.codes,
    }
    keep(place, arrays, about)
