"""Data sets of the Hugging Face hub, and local ones that its library `datasets` reads.

    hf:beans   hf:OWNER/NAME   hf:OWNER/NAME:CONFIG@REVISION    on the hub, or in its cache
    hf:FOLDER                                                    local: parquet, arrow, images, tar
    hf:imagefolder:FOLDER  hf:parquet:'data/*.parquet'  hf:webdataset:FOLDER  hf:arrow:FILE

`open_hub` opens one whole, for reading at any place; `open_streams` (the same names, but with
hf-stream:) reads it from front to back without having it. Images are decoded by vitrail, from the
bytes as they are stored. The library is imported when such a set is named, and reaches the network
when that set is remote: not for local data, and not to count or to report anything. It has run no
data set's own code since version 4.

The library keeps what it fetches, and an Arrow copy of it, in its own cache (HF_HOME).
"""

import os
import re
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vitrail.data.names import label_name, text_line
from vitrail.data.pixels.decode import UnreadableImage, read_image
from vitrail.data.sources.csvfile import Columns
from vitrail.data.sources.parts import most_usual, part_within
from vitrail.data.sources.shards import class_table, read_class_names
from vitrail.data.sources.source import PARTS, LeftOut, PartedSource, Tally, file_stamp
from vitrail.data.sources.stream import Label, StreamSettings, StreamSource
from vitrail.data.sources.switches import switched
from vitrail.data.targets import Classes, Texts
from vitrail.errors import DataError, UsageError, setting

HUB_PREFIX = "hf:"
STREAM_PREFIX = "hf-stream:"

_BUILDERS = ("imagefolder", "parquet", "arrow", "webdataset")
_SAVED = ("dataset_dict.json", "state.json")  # of save_to_disk
_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
_TEXT_NAMES = ("caption", "captions", "text", "texts", "txt", "title", "sentence", "sentences")
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "cls", "fine_label", "txt")
_PROXIES = ("https_proxy", "http_proxy", "all_proxy")


class Streams(NamedTuple):
    """The streams of a data set."""

    parts: dict[str, StreamSource]
    """By the part, which is in PARTS."""
    left_out: tuple[LeftOut, ...]


def has_tables(folder: Path) -> bool:
    """Whether `folder` was saved by `datasets`, or holds parquet files and no class folders."""
    if not folder.is_dir():
        return False
    if any((folder / name).is_file() for name in _SAVED):
        return True
    has_parquet = next(folder.glob("*.parquet"), None) is not None
    return has_parquet and not any(entry.is_dir() for entry in folder.iterdir())


def open_hub(name: str, columns: Columns) -> PartedSource:
    """The data set `name` (without hf:), whole; the splits train, validation and test are kept.

    `columns` names its columns; without it, the image is the one column of images, and the label
    the one of classes, or what is usually called so. Raises UsageError for a name or a column that
    cannot be, DataError where the data cannot be had, saying what would do.
    """
    tables, left_out = _tables(name)
    return HubSource(name, tables, columns, left_out)


def open_hub_pairs(name: str, columns: Columns) -> PartedSource:
    """As `open_hub`, with a column of texts, of which each may be a list."""
    tables, left_out = _tables(name)
    return HubPairs(name, tables, columns, left_out)


def _tables(name: str) -> "tuple[_Tables, tuple[LeftOut, ...]]":
    datasets = _library()
    with _opening(datasets, name) as place:
        if place.is_saved:
            found = datasets.load_from_disk(place.path)
        else:
            builder = _builder(datasets, place)
            builder.download_and_prepare()
            found = builder.as_dataset()
    splits = found if isinstance(found, Mapping) else {"train": found}
    chosen, left_out = _parts(name, splits)
    return {part: (split, splits[split]) for part, split in chosen.items()}, left_out


def place_of(data: str) -> tuple[str, Path]:
    """The prefix that the name of data may have, and its path, if it is local.

    >>> place_of("hf:parquet:photos"), place_of("photos")
    (('hf:parquet:', PosixPath('photos')), ('', PosixPath('photos')))
    """
    kinds, builders = f"{HUB_PREFIX}|{STREAM_PREFIX}", "|".join(_BUILDERS)
    found = re.match(f"(?:(?:{kinds})(?:(?:{builders}):)?)?", data)
    assert found is not None
    return found[0], Path(data[found.end() :]).expanduser()


def open_streams(name: str, columns: Columns, *, seed: int, settings: StreamSettings) -> Streams:
    """The data set `name` (without hf-stream:) as streams, one for each of PARTS that it has.

    A stream cannot be looked through for its classes: `settings.classes` is a file that names them
    where the data does not. Raises as `open_hub` does.
    """
    datasets = _library()
    with _opening(datasets, name) as place:
        if place.is_saved:
            raise UsageError(
                f"{place.path} lies on this machine, where images can be read at any place: "
                f"give it as it is, without {STREAM_PREFIX}"
            )
        builder = _builder(datasets, place)
        splits = builder.as_streaming_dataset()
    file = settings.classes
    classes = None if file is None else read_class_names(Path(file).expanduser())
    sizes = builder.info.splits or {}
    streams: dict[str, StreamSource] = {}
    chosen, left_out = _parts(name, splits)
    for part, split in chosen.items():
        table = splits[split]
        if table.features is None:
            raise DataError(f"{name} does not say what columns it has: it cannot be streamed")
        image, label = _columns(name, table.features, columns)
        labels = _Labels(name, label, table.features[label], classes)
        if labels.names is None:
            whole = f"; or read it whole: {HUB_PREFIX}{name}" if place.is_local else ""
            raise UsageError(
                f"{name} does not name its classes, and a stream cannot be looked through for "
                f"them: list them, one a line in the order of their numbers, in a file for "
                f"{setting('data.stream.classes')}{whole}"
            )
        if table.num_shards < settings.lanes:
            with suppress(Exception), _silent_where_local(datasets, place):
                table = table.reshard()  # by the row groups of parquet files
        streams[part] = StreamSource(
            _HubShards(name, _undecoded(datasets, table, image, label), image, label, labels),
            labels.names,
            several=labels.several,
            seed=seed,
            lanes=settings.lanes,
            buffer=settings.buffer,
            # Not the name, which is another text from another folder.
            stamp=f"{builder.repo_id or ''} {builder.config_id} {builder.hash} {image} {label}",
            images=sizes[split].num_examples if split in sizes else None,
            epoch=settings.epoch,
        )
    return Streams(streams, left_out)


_Tables = Mapping[str, tuple[str, Any]]
"""By the part, which is in PARTS: the split's own name, and its table."""


class HubImages:
    """The images of Arrow tables, memory-mapped, one table a part: those rows of each of which
    something is said.
    """

    def __init__(self, tables: _Tables, image: str, rows: Mapping[str, list[int]]) -> None:
        datasets = _library()
        self._image = image
        self._splits = [split for split, _ in tables.values()]
        self._tables = [_undecoded(datasets, table, image) for _, table in tables.values()]
        self.notes: tuple[str, ...] = ()
        counts = [len(rows[part]) for part in tables]
        numbers = np.array([PARTS.index(part) for part in tables], np.uint8)
        self.part: UInt8[np.ndarray, " n"] = np.repeat(numbers, counts)
        self._table = np.repeat(np.arange(len(tables), dtype=np.uint8), counts)
        self._row = np.array([row for part in tables for row in rows[part]], np.int64)

    def __len__(self) -> int:
        return len(self._row)

    def key(self, i: int) -> str:
        return f"{self._splits[self._table[i]]}/{self._row[i]}"

    def load(self, i: int) -> Image.Image:
        try:
            return read_image(self._stored(i))
        except UnreadableImage as error:
            raise UnreadableImage(error.reason, self.key(i)) from error

    def encoded(self, i: int) -> bytes | Path | None:
        """Image `i` as it is stored, in the table or in a file of its own; None if it is not."""
        try:
            return self._stored(i)
        except UnreadableImage:
            return None

    def _stored(self, i: int) -> bytes | Path:
        try:
            value = self._tables[self._table[i]][int(self._row[i])][self._image]
        except Exception as error:  # whatever Arrow throws, the table is at fault
            raise UnreadableImage(f"its table cannot be read ({error})") from error
        content = _content(value)
        if content is None:
            raise UnreadableImage("its row holds no image")
        return content

    def stamp(self, i: int) -> str:
        content = self.encoded(i)
        if isinstance(content, Path):
            return file_stamp(content)
        files = (file["filename"] for file in self._tables[self._table[i]].cache_files)
        return " ".join([*(file_stamp(Path(file)) for file in files), str(self._row[i])])


class HubSource(HubImages):
    """A data set with labels. Rows without one are left out, and told in `left_out`."""

    def __init__(
        self, name: str, tables: _Tables, columns: Columns, left_out: tuple[LeftOut, ...]
    ) -> None:
        image, labels, kept = "", list[tuple[str, ...]](), dict[str, list[int]]()
        names: tuple[str, ...] | None = None
        several, unused = False, Tally()
        for part, (split, table) in tables.items():
            image, label = _columns(name, table.features, columns)
            read = _Labels(name, label, table.features[label], None)
            if kept and (read.names, read.several) != (names, several):
                raise DataError(f"the splits of {name} have different classes in '{label}'")
            names, several = read.names, read.several
            found = [read(value) for value in _values(table, label)]
            kept[part] = [row for row, one in enumerate(found) if one is not None]
            unlabelled = [f"{split}/{row}" for row, one in enumerate(found) if one is None]
            unused.add("rows", "they have no label", *unlabelled)
            labels += [one for one in found if one is not None]
        if not labels:
            raise DataError(f"no row of {name} has a label")
        super().__init__(tables, image, kept)
        self.left_out = (*left_out, *unused.told())
        known = class_table(name, labels) if names is None else names
        self.targets = Classes.named(known, labels, several=several)


class HubPairs(HubImages):
    """A data set with texts. Rows without one are left out, and told in `left_out`."""

    def __init__(
        self, name: str, tables: _Tables, columns: Columns, left_out: tuple[LeftOut, ...]
    ) -> None:
        image, texts, kept = "", list[tuple[str, ...]](), dict[str, list[int]]()
        unused = Tally()
        for part, (split, table) in tables.items():
            image = _image_column(name, table.features, columns)
            named = [each for each in table.features if each.lower() in _TEXT_NAMES]
            text = _column(name, table.features, "caption", columns.caption, named, _TEXT_NAMES)
            found = [_texts(value) for value in _values(table, text)]
            kept[part] = [row for row, one in enumerate(found) if one]
            empty = [f"{split}/{row}" for row, one in enumerate(found) if not one]
            unused.add("rows", "they have no text", *empty)
            texts += filter(None, found)
        if not texts:
            raise DataError(f"no row of {name} has a text")
        super().__init__(tables, image, kept)
        self.left_out = (*left_out, *unused.told())
        self.notes = (f"images in column '{image}', texts in '{text}'",)
        self.targets = Texts.written(texts)


def _texts(value: Any) -> tuple[str, ...]:
    """Of one row, which may have a list of them."""
    lines = map(text_line, value if isinstance(value, list) else [value])
    return tuple(filter(None, lines))


def _library() -> Any:
    """The library `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{HUB_PREFIX} needs the library datasets: pip install 'vitrail[data]'"
        ) from error
    return datasets


class _Place(NamedTuple):
    """What a name means."""

    path: str
    """A name on the hub, or what is local."""
    config: str | None = None
    revision: str | None = None
    builder: str | None = None
    """One of _BUILDERS, if it is named."""

    @property
    def is_local(self) -> bool:
        return Path(self.path).exists() or (self.builder is not None and "://" not in self.path)

    @property
    def is_saved(self) -> bool:
        return self.builder is None and any(Path(self.path, n).is_file() for n in _SAVED)


def _place(name: str) -> _Place:
    builder, colon, rest = name.partition(":")
    if colon and builder in _BUILDERS:
        path = os.path.expanduser(rest)
        if "://" not in path and not (Path(path).exists() or re.search(r"[*?\[]", path)):
            raise DataError(f"no such file or folder: {path}")
        return _Place(path, builder=builder)
    path = os.path.expanduser(name)
    if path and Path(path).exists():
        return _Place(path)
    path, _, revision = name.partition("@")
    path, _, config = path.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        raise UsageError(
            f"'{name}' is neither a local file or folder, nor a name on the Hugging Face hub: "
            f"{HUB_PREFIX}OWNER/NAME, with :CONFIG and @REVISION where needed, or "
            f"{HUB_PREFIX}BUILDER:PATH with one of {', '.join(_BUILDERS)}"
        )
    return _Place(path, config or None, revision or None)


def _builder(datasets: Any, place: _Place) -> Any:
    if place.builder is None:
        return datasets.load_dataset_builder(place.path, place.config, revision=place.revision)
    kind = "data_dir" if Path(place.path).is_dir() else "data_files"
    return datasets.load_dataset_builder(place.builder, **{kind: place.path})


@contextmanager
def _opening(datasets: Any, name: str) -> Iterator[_Place]:
    """The place that `name` means; what the library throws becomes one message."""
    place = _place(name)
    try:
        with _silent_where_local(datasets, place):
            yield place
    except (DataError, UsageError):
        raise
    except Exception as error:  # of many libraries
        if isinstance(error, ConnectionError) or "offline" in str(error).lower():
            raise DataError(
                f"cannot reach {name} on the Hugging Face hub, and it is not in the cache of "
                f"`datasets` ({datasets.config.HF_DATASETS_CACHE}). Without a connection these "
                f"work: a folder that save_to_disk wrote, {HUB_PREFIX}FOLDER with parquet files, "
                f"{HUB_PREFIX}imagefolder:FOLDER, and tar files of WebDataset"
            ) from error
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"cannot open {name} by the library datasets: {said[0]}") from error


@contextmanager
def _silent_where_local(datasets: Any, place: _Place) -> Iterator[None]:
    """No connection is tried for local data; nor in vain, for that takes half a minute; and none
    only to count. All this for what is opened here: others of this process use the library too.
    """
    import huggingface_hub.constants as hub

    with ExitStack() as stack:
        stack.enter_context(switched(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False))
        if place.is_local or not _is_reachable(hub.ENDPOINT):
            for module in (datasets.config, hub):
                stack.enter_context(switched(module, "HF_HUB_OFFLINE", True))
        if not (sys.stderr.isatty() or datasets.are_progress_bars_disabled()):
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        yield


def _is_reachable(address: str) -> bool:
    """Whether the host's name is known; behind a proxy it need not be."""
    if any(os.environ.get(name) or os.environ.get(name.upper()) for name in _PROXIES):
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(address).hostname, None))
    except OSError:
        return False


def _parts(name: str, splits: Iterable[str]) -> tuple[dict[str, str], tuple[LeftOut, ...]]:
    """The split for each part that there is; and the splits left out."""
    left = list(splits)
    named = {split: found for split in left if (found := part_within(split)) and not found.rest}
    chosen: dict[str, str] = {}
    for part in PARTS:
        own = {split: found for split, found in named.items() if found.part == part}
        if own:
            chosen[part] = most_usual(own)
            left.remove(chosen[part])
    if not chosen and len(left) == 1:
        return {"train": left[0]}, ()
    if "train" not in chosen:
        have = ", ".join([*chosen.values(), *left]) or "none"
        raise DataError(f"{name} has no split for training: it has {have}")
    unused = Tally()
    unused.add("splits", "they are called like no part, or another is called like theirs", *left)
    return chosen, unused.told()


def _columns(name: str, features: Any, columns: Columns) -> tuple[str, str]:
    """The columns of the image and of the label."""
    image = _image_column(name, features, columns)
    classes = [
        column
        for column, feature in features.items()
        if hasattr(_item(feature), "names") and column != image
    ]
    named = [column for column in features if column.lower() in _LABEL_NAMES and column != image]
    label = _column(name, features, "label", columns.label, classes or named, _LABEL_NAMES)
    return image, label


def _image_column(name: str, features: Any, columns: Columns) -> str:
    if columns.split is not None:
        raise UsageError(f"{name} has splits of its own: no column can be named for that")
    images = [column for column, feature in features.items() if _is_image(feature)]
    return _column(name, features, "image", columns.image, images, _IMAGE_NAMES)


def _column(
    name: str,
    features: Any,
    kind: str,
    chosen: str | None,
    candidates: list[str],
    usual: tuple[str, ...],
) -> str:
    if chosen is not None:
        if chosen not in features:
            raise UsageError(f"{name} has no column '{chosen}': it has {', '.join(features)}")
        return chosen
    best = [column for word in usual for column in candidates if column.lower() == word]
    if len(candidates) == 1 or best:
        return (best or candidates)[0]
    raise UsageError(
        f"which column of {name} holds the {kind}? Name it with {setting(f'data.{kind}_column')}: "
        f"it has "
        f"{', '.join(f'{column} ({_kind(feature)})' for column, feature in features.items())}"
    )


def _kind(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


def _is_image(feature: Any) -> bool:
    """Whether a column holds images: by its type, or, from plain parquet, as bytes."""
    if isinstance(feature, dict):
        return {"bytes", "path"} <= set(feature)
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", None) == "binary"


def _item(feature: Any) -> Any:
    """The type of a list's items; of anything else, its own."""
    return getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)


class _Labels:
    """What a column's values mean. Raises UsageError for a column that can hold no labels."""

    def __init__(
        self, name: str, column: str, feature: Any, classes: tuple[str, ...] | None
    ) -> None:
        item = _item(feature)
        own = getattr(item, "names", None)
        self.several = item is not feature
        self.names: tuple[str, ...] | None = tuple(map(label_name, own)) if own else classes
        if self.names is not None and len(set(self.names)) < len(self.names):
            raise DataError(f"two classes of '{column}' of {name} have one name")
        dtype = str(getattr(item, "dtype", type(item).__name__))
        self._are_numbers = dtype.startswith(("int", "uint"))
        if not (own or self._are_numbers or dtype in ("string", "large_string", "bool")):
            raise UsageError(
                f"the column '{column}' of {name} is {dtype}: labels are classes, whole numbers, "
                "or texts"
            )
        self._where = f"the column '{column}' of {name}"

    def __call__(self, value: Any) -> tuple[str, ...] | None:
        """The names of the labels in a value; None where there is none."""
        values = value if self.several else [value]
        if values is None or any(one is None for one in values):
            return None
        if self._are_numbers and any(one < 0 for one in values):
            return None  # as the hub marks test images whose labels are kept back
        return tuple(sorted({self._name(one) for one in values}))

    def _name(self, value: Any) -> str:
        if self.names is None or not self._are_numbers:
            found = label_name(str(value))
            if self.names is not None and found not in self.names:
                raise DataError(f"{self._where} holds '{found}', which is not among the classes")
            return found
        if value >= len(self.names):
            raise DataError(f"{self._where} holds {value}, but there are {len(self.names)} classes")
        return self.names[value]

    @cached_property
    def index(self) -> dict[str, int]:
        """The number of each name."""
        return {name: i for i, name in enumerate(self.names or ())}


def _values(table: Any, column: str) -> list[Any]:
    """A column, without reading the others."""
    arrow = table.select_columns([column]).with_format("arrow")[:]
    return list(arrow.column(column).to_pylist())


def _undecoded(datasets: Any, table: Any, image: str, *others: str) -> Any:
    """The image column, and others, with images as they are stored."""
    narrow = table.select_columns([image, *others])
    return narrow.cast_column(image, datasets.Image(decode=False))


def _content(value: Any) -> bytes | Path | None:
    """An image as the library keeps it: its bytes, or the file they are in."""
    if not isinstance(value, Mapping):
        return None
    if value.get("bytes") is not None:
        return bytes(value["bytes"])
    path = value.get("path")
    return Path(path) if path and "://" not in path else None


class _HubShards:
    """The shards of a streamed data set."""

    def __init__(self, name: str, table: Any, image: str, label: str, labels: _Labels) -> None:
        self._name = name
        self._table = table
        self._image = image
        self._label = label
        self._labels = labels

    def __len__(self) -> int:
        return int(self._table.num_shards)

    def read(self, shard: int, start: int) -> Iterator[tuple[bytes, Label | None]]:
        """As StreamShards has it."""
        try:
            rows = self._table.shard(num_shards=len(self), index=shard).skip(start)
            for row in rows:
                content = _content(row[self._image])
                if isinstance(content, Path):
                    with suppress(OSError):
                        content = content.read_bytes()
                yield (content if isinstance(content, bytes) else b""), self._read(row[self._label])
        except DataError:
            raise
        except Exception as error:  # of many libraries, and of the network under them
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"the stream {self._name} broke off in shard {shard}: {said[0]}; training goes on "
                f"from what was saved: vitrail train --resume RUN"
            ) from error

    def _read(self, value: Any) -> Label | None:
        found = self._labels(value)
        if found is None:
            return None
        numbers = tuple(self._labels.index[name] for name in found)
        return numbers if self._labels.several else numbers[0]
