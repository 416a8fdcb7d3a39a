"""From the body of a request to the images in it. Every byte is hostile."""

import asyncio
import base64
import binascii
import json
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import HTTPException, Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import Headers

from vitrail.deploy.serve.limits import Limits
from vitrail.deploy.serve.service import Full, Service
from vitrail.units import bytes_text

RAW = ("", "application/octet-stream", "application/x-www-form-urlencoded")
"""Besides image/..., what a body of one image may be called; the last is what curl says unasked."""
_FIELDS = 16
"""Of a form, that are no files: they are not looked at."""
_WINDOW = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
"""Of zlib, by Content-Encoding."""
_WAYS = (
    "send the image's bytes as they are, as multipart/form-data, or as JSON: "
    '{"image": "its bytes in base64"}, or "images" and a list'
)


@asynccontextmanager
async def whole_body(request: Request, service: Service) -> AsyncIterator[bytes]:
    """A request's body, unpacked. Raises `HTTPException` and `Full`."""
    size, body = 0, bytearray()
    try:
        async for chunk in request.stream():
            size += len(chunk)
            service.held += len(chunk)
            if service.held > service.limits.bodies:
                raise Full
            body += chunk
        coding = request.headers.get("content-encoding", "identity").strip().lower()
        if coding == "identity":
            yield bytes(body)
        elif coding in _WINDOW:
            async with service.unpacking:
                content = await asyncio.to_thread(_unpacked, body, coding, service.limits)
            size += len(content)
            service.held += len(content)
            yield content
        else:
            known = ", ".join(_WINDOW)
            raise HTTPException(415, f"Content-Encoding '{coding[:40]}' is not known, but: {known}")
    finally:
        service.held -= size


def _unpacked(body: bytearray, coding: str, limits: Limits) -> bytes:
    unpacking = zlib.decompressobj(_WINDOW[coding])
    try:
        content = unpacking.decompress(body, limits.body + 1)
    except zlib.error:
        raise HTTPException(400, f"the body is no {coding}, as its Content-Encoding says") from None
    if len(content) > limits.body:
        raise HTTPException(413, f"the body is longer than {bytes_text(limits.body)}, unpacked")
    if not unpacking.eof or unpacking.unused_data:
        raise HTTPException(400, f"the body is no whole {coding}: it was cut short, or has an end")
    return content


async def images_in(headers: Headers, body: bytes, limits: Limits) -> tuple[list[bytes], bool]:
    """The images of a request to /predict, and whether they were given as a list.

    Raises `HTTPException`.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        images = await _of_form(headers, body, limits)
        several = len(images) > 1
    elif kind == "application/json":
        images, several = _of_json(body, limits)
    elif kind in RAW or kind.startswith("image/"):
        images, several = [body], False
    else:
        raise HTTPException(415, f"Content-Type '{kind[:60]}' is not read: {_WAYS}")
    check_number(len(images), limits)
    if not all(images):
        raise HTTPException(400, f"an image of no bytes: {_WAYS}")
    return images, several


def check_number(images: int, limits: Limits) -> None:
    """Raises `HTTPException` for none and for too many."""
    if not images:
        raise HTTPException(400, f"there is no image in the request: {_WAYS}")
    if images > limits.images:
        raise HTTPException(413, f"{images} images: at most {limits.images} go into one request")


def of_base64(text: str) -> bytes:
    """The bytes; those of a data: address too. Raises `HTTPException`."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise HTTPException(400, "an image in JSON is given in base64, and this is none") from None


def check_json(body: bytes, limits: Limits) -> None:
    """Raises `HTTPException` for what would take long to parse."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > limits.marks:
        raise HTTPException(413, f"JSON with more than {limits.marks} values")


def _of_json(body: bytes, limits: Limits) -> tuple[list[bytes], bool]:
    check_json(body, limits)
    try:
        found: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is no JSON, as its Content-Type says") from None
    if isinstance(found, dict) and len(found) == 1:
        if isinstance(text := found.get("image"), str):
            return [of_base64(text)], False
        texts = found.get("images")
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            check_number(len(texts), limits)
            return [of_base64(text) for text in texts], True
        if "url" in found or "urls" in found:
            raise HTTPException(400, f"this server fetches nothing: {_WAYS}")
    raise HTTPException(400, f"JSON of another form: {_WAYS}")


async def _of_form(headers: Headers, body: bytes, limits: Limits) -> list[bytes]:
    """The files of a form, in their order; what is no file is not looked at."""
    boundary = parse_options_header(headers["content-type"])[1].get(b"boundary")
    if not boundary:
        raise HTTPException(400, "multipart/form-data without a boundary in its Content-Type")
    parts = _Parts(limits.images + _FIELDS)
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        await asyncio.to_thread(parser.write, body)
    except FormParserError as error:
        raise HTTPException(400, f"the form cannot be read: {error}") from None
    if not parts.whole:
        raise HTTPException(400, "the form ends before its last boundary")
    return [bytes(file) for file in parts.files]


class _Parts:
    """What a parser of a form tells, of at most so many parts."""

    def __init__(self, most: int) -> None:
        self.files: list[bytearray] = []
        self.whole = False
        self._left = most
        self._header = self._value = b""
        self._file: bytearray | None = None

    def callbacks(self) -> Any:
        """By the parser's names."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._name,
            "on_header_value": self._more,
            "on_header_end": self._end_of_header,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise FormParserError("it has too many parts")
        self._file = None

    def _name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _more(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_of_header(self) -> None:
        about_it = self._header.lower() == b"content-disposition"
        if about_it and b"filename" in parse_options_header(self._value)[1]:
            self._file = bytearray()
            self.files.append(self._file)
        self._header = self._value = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file += data[start:end]

    def _end(self) -> None:
        self.whole = True
