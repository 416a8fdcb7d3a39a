"""From any source to shards: tar files that `ShardSource`, and WebDataset, read."""

import hashlib
import io
import json
import os
import shutil
import stat
import tarfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote

import numpy as np

from vitrail.data.pixels.decode import Slice, UnreadableImage
from vitrail.data.sources.formats import HEAD_BYTES, image_format
from vitrail.data.sources.shards import FORMAT, INDEX, MOST_IMAGE_BYTES
from vitrail.data.sources.source import PARTS, PartedSource, Source, encoded, refuse_inside
from vitrail.data.sources.tar import BLOCK
from vitrail.data.targets import classes_of
from vitrail.disk import flush_file, flush_folder, write_whole
from vitrail.errors import DataError, UsageError
from vitrail.units import bytes_text

IMAGES_PER_SHARD = 5000


class Written(NamedTuple):
    """What `write_shards` made; `left_out` are (key, reason) of images that cannot be read."""

    shards: tuple[str, ...]
    images: int
    size: int
    """Of all shards, in bytes."""
    left_out: tuple[tuple[str, str], ...]


def write_shards(
    source: PartedSource,
    out: Path,
    *,
    data: Path | None = None,
    images: int | None = None,
    megabytes: float | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Written:
    """Write `source` into the new folder `out`, as shards of so many images or megabytes.

    An image's file goes in as it is, byte by byte; an array, as PNG. Each part gets shards of its
    own: train-00000.tar. Within a part the images are in the order of a hash of their keys, for
    whoever reads shards from front to back gets mixed classes; `ShardSource` restores the order of
    `source`. The same source gives the same bytes. `out` appears whole or not at all. `data` is
    where the source lies, and `on_done` is called with the number of images done.

    Raises UsageError for sizes that cannot be and an `out` that is not empty or lies in `data`,
    DataError where it cannot be written.
    """
    if images is not None and megabytes is not None:
        raise UsageError("a shard's size is given as images or as megabytes, not as both")
    images = IMAGES_PER_SHARD if images is None and megabytes is None else images
    if (images is not None and images < 1) or (megabytes is not None and not megabytes > 0):
        raise UsageError("a shard must hold at least one image")
    refuse_place(out, data)
    labels = classes_of(source.targets, "writing shards")
    limit = _Limit(images or len(source), int((megabytes or 0) * 1e6) or 1 << 62)
    done = _Done(len(source), on_done)
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        shards = [s for part in PARTS for s in _write_part(source, part, beside, limit, done)]
        about = {
            "format": FORMAT,
            "classes": labels.names,
            "labels": "several" if labels.several else "one",
            "images": sum(shard["images"] for shard in shards),
            "shards": shards,
        }
        write_whole(beside / INDEX, json.dumps(about, indent=1, ensure_ascii=False).encode())
        beside.rename(out)
        flush_folder(out.parent)
    except OSError as error:
        raise DataError(
            f"cannot write the shards to {out}: {error.strerror or error} ({done.count} of "
            f"{len(source)} images were written, {bytes_text(done.size)}, and are removed "
            "again); make room, or choose another place"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Written(
        tuple(shard["name"] for shard in shards),
        sum(shard["images"] for shard in shards),
        sum(shard["bytes"] for shard in shards),
        tuple(sorted(done.left_out)),
    )


class _Limit(NamedTuple):
    """How much goes into a shard at most; at least one image does."""

    images: int
    size: int

    def fits(self, images: int, shard: "_Summed", more: bytes) -> bool:
        """Whether an image more goes into a shard of so many."""
        return images < self.images and shard.size + len(more) <= self.size


class _Done:
    """How far the writing has come."""

    def __init__(self, total: int, on_done: Callable[[int], None] | None) -> None:
        self.total = total
        self.count = 0
        self.size = 0
        self.left_out: list[tuple[str, str]] = []
        self._on_done = on_done

    def one(self, size: int) -> None:
        self.count += 1
        self.size += size
        if self._on_done:
            self._on_done(self.count)


def refuse_place(out: Path, data: Path | None) -> None:
    """Raise `UsageError` for a new folder that lies in `data`, or is there and not empty, or is the
    one that we are in: it comes by being renamed, and a shell would stay in what it replaces.
    """
    if data is not None:
        refuse_inside(out, data)
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out} is there already, and not empty: choose another place")
        if out.resolve() == Path.cwd():
            raise UsageError(f"{out} is the folder that you are in: give the name of a new one")
    except OSError as error:
        raise DataError(f"cannot list {out}: {error.strerror}") from error


def _write_part(
    source: PartedSource, part: str, folder: Path, limit: _Limit, done: _Done
) -> Iterator[dict[str, Any]]:
    """Write the shards of one part; for each, what `index.json` says of it."""
    chosen = np.flatnonzero(source.part == PARTS.index(part)).tolist()
    chosen.sort(key=lambda i: hashlib.blake2b(source.key(i).encode(), digest_size=8).digest())
    pending = filter(None, (_members(source, i, done) for i in chosen))
    members = next(pending, None)
    for number in count():
        if members is None:
            return
        name = f"{part}-{number:05}.tar"
        with (folder / name).open("wb") as stream:
            shard = _Summed(stream)
            images = 0
            while members is not None and (not images or limit.fits(images, shard, members)):
                shard.write(members)
                images += 1
                members = next(pending, None)
            shard.write(bytes(2 * BLOCK))  # the end mark
            flush_file(stream)
        yield {
            "name": name,
            "part": part,
            "images": images,
            "bytes": shard.size,
            "sha256": shard.digest.hexdigest(),
        }


class _Summed:
    """A stream whose bytes are counted and summed as they are written."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, content: bytes) -> None:
        self._stream.write(content)
        self.digest.update(content)
        self.size += len(content)


def _members(source: PartedSource, i: int, done: _Done) -> bytes:
    """The members of image `i` as a tar file has them; nothing if it cannot be read."""
    key = source.key(i)
    try:
        ending, content = encoded_image(source, i)
    except UnreadableImage as error:
        done.left_out.append((key, error.reason))
        done.one(0)
        return b""
    # Numbered, so that the order can be restored; and in ASCII without dots and slashes, since a
    # key ends at the first dot, and somebody may unpack it.
    name = f"{i:09}-{quote(key, safe='').replace('.', '%2E')}"
    said = classes_of(source.targets, "writing shards")
    if said.several:
        labels = {"labels": np.flatnonzero(said.values[i]).tolist()}
        label = _member(f"{name}.json", json.dumps(labels).encode())
    else:
        label = _member(f"{name}.cls", str(int(said.values[i])).encode())
    members = _member(f"{name}.{ending}", content) + label
    done.one(len(members))
    return members


def _member(name: str, content: bytes) -> bytes:
    """Header, content and padding; owner, time and mode are the same for all."""
    about = tarfile.TarInfo(name)
    about.size = len(content)
    header = about.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
    return header + content + bytes(-len(content) % BLOCK)


_ENDINGS = {
    **{"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"},
    **{"PPM": "ppm", "JPEG2000": "jp2", "AVIF": "avif", "HEIF": "heic"},
}


def encoded_image(source: Source, i: int) -> tuple[str, bytes]:
    """The usual ending for image `i` and the bytes of its file; or, of an array, of a PNG.

    Raises UnreadableImage for a file that cannot be read; whether it is an image is not looked at.
    """
    match encoded(source, i):
        case bytes(content):
            pass
        case Path() as file:
            content = _read(file, 0, None)
        case Slice(file, start, size):
            content = _read(file, start, size)
        case None:
            stream = io.BytesIO()
            source.load(i).save(stream, "PNG")
            content = stream.getvalue()
    # Others go by the ending. What is no image goes in as it is, for whoever reads it to tell.
    return _ENDINGS.get(image_format(content[:HEAD_BYTES]) or "", "jpg"), content


def _read(file: Path, start: int, size: int | None) -> bytes:
    """So many bytes of a file from `start` on, or all of them; or UnreadableImage."""
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableImage("it is not a regular file")
        wanted = found.st_size if size is None else size
        if wanted > MOST_IMAGE_BYTES:
            raise UnreadableImage(f"it has {wanted} bytes, more than {MOST_IMAGE_BYTES}")
        with file.open("rb") as stream:
            stream.seek(start)
            content = stream.read(wanted)
    except OSError as error:
        raise UnreadableImage((error.strerror or str(error)).lower()) from error
    if len(content) < wanted:
        raise UnreadableImage("it is cut short")
    return content
