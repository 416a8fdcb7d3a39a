"""Which formats of images are read, and how a file shows which one it is.

A file whose ending is a usual one is taken for an image without a look into it, so that a million
of them are listed at once; of every other file the first bytes say what it is.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from PIL import features

_AVIF = features.check("avif")
_JPEG2000 = features.check("jpg_2000")


def _register_heif() -> bool:
    """Let Pillow know of HEIC, where a plug-in for it is installed; it knows by itself of others.

    That adds an entry to Pillow's table of formats, once and here only.
    """
    for plugin in ("pi_heif", "pillow_heif"):
        try:
            import_module(plugin).register_heif_opener()
        except ImportError:
            continue
        return True
    return False


_HEIF = _register_heif()

# Pillow opens an MPO, a JPEG with more pictures behind the first, through its JPEG plugin.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"),
    *(("JPEG2000",) if _JPEG2000 else ()),
    *(("AVIF",) if _AVIF else ()),
    *(("HEIF",) if _HEIF else ()),
)

IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    *((".jp2", ".j2k") if _JPEG2000 else ()),
    *((".avif",) if _AVIF else ()),
    *((".heic", ".heif", ".hif") if _HEIF else ()),
)

HEAD_BYTES = 192
"""So many bytes from the beginning of a file show its format."""

# Raw files pass as TIFF or ISO media, so they come first. What is too short to be sure of, such as
# the two letters of a BMP, is taken together with the fields behind it.
_SIGNATURES = tuple(
    (re.compile(pattern, re.DOTALL), name)
    for pattern, name in (
        (
            rb"II\*\0....CR|II\x2b\0....CR|IIRO|IIU\0|MMOR|FUJIFILMCCD-RAW|....ftypcrx ",
            "camera raw",
        ),
        (rb"\xff\xd8\xff", "JPEG"),
        (rb"\x89PNG\r\n\x1a\n", "PNG"),
        (rb"RIFF....WEBP", "WEBP"),
        (rb"GIF8[79]a", "GIF"),
        (rb"BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP"),
        (rb"II[*+]\0|MM\0[*+]", "TIFF"),
        (rb"P[1-6]\s+(#[^\n]*\n\s*)*\d+\s+\d+\s|P[Ff]\s+\d+\s+\d+\s+-?[\d.]+\s", "PPM"),
        (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG2000"),
        (rb"....ftyp(avi[fs]|m[is]f1.{4}.*avi[fs])", "AVIF"),
        (rb"....ftyp(he(i[cxms]|v[cxms])|m[is]f1)", "HEIF"),
        (rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a", "JPEG XL"),
        (rb"\0\0\x01\0[\x01-\x40]\0.{3}\0", "ICO"),
        (rb"8BPS\0[\1\2]", "PSD"),
        (rb".{128}DICM", "DICOM"),
        (rb"\x76\x2f\x31\x01", "OpenEXR"),
        (rb"#\?RADIANCE|#\?RGBE", "HDR"),
        (rb"DDS \x7c", "DDS"),
        (rb"SIMPLE  = ", "FITS"),
        (rb"qoif", "QOI"),
        (
            rb"(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?(<!--.*-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg",
            "SVG",
        ),
    )
)

_BY_ENDING = {
    ".tga": "TGA",
    ".pcx": "PCX",
    **dict.fromkeys((".dng", ".nef", ".arw", ".cr2", ".cr3", ".orf", ".pef", ".rw2"), "camera raw"),
    **dict.fromkeys((".raf", ".srw", ".sr2", ".x3f", ".nrw", ".iiq", ".3fr"), "camera raw"),
}
"""Formats that no first bytes tell: TGA and PCX have none, most raw files have those of TIFF."""


def image_format(head: bytes, name: str = "") -> str | None:
    """The format of an image, by its first HEAD_BYTES and, where these do not tell it, its `name`.

    One of FORMATS, or of another format that is known to hold images; None for all else.

    >>> image_format(b"GIF89a and more"), image_format(b"<html>"), image_format(b"", "icon.TGA")
    ('GIF', None, 'TGA')
    """
    by_name = _BY_ENDING.get(Path(name).suffix.lower())
    found = next((kind for pattern, kind in _SIGNATURES if pattern.match(head)), None)
    return by_name if by_name and found in (None, "TIFF") else found


class Unread(NamedTuple):
    """A format that is known, but not read."""

    name: str
    """As people call it."""
    reason: str
    """Why, and what the user can do."""


def unread(form: str) -> Unread:
    """What to say of images of a format that is not in FORMATS."""
    if form == "HEIF":
        return Unread("HEIC", "readable after pip install pillow-heif")
    if form == "camera raw":
        return Unread(form, "to be developed to JPEG or PNG")
    if form in ("AVIF", "JPEG2000"):
        return Unread(form, "this Pillow lacks it: pip install -U pillow")
    return Unread(form, "a format that is not read: convert to PNG")
