"""A bundle: an exported model, with all that is needed to use it rightly, in one folder.

    model.onnx, ...  the model, in its runtime's own format
    bundle.json      what it is: runtime, precision, preprocessing, how its arrays are read, what it
                     was measured to do before and after, and of which run it is
    CARD.md          the same for people, with what it needs elsewhere
    SHA256SUMS       of every file, as `sha256sum -c` reads it

It is written beside its place and renamed into it: a name always holds a whole bundle. A file that
was cut or edited is an error, never a wrong answer. Nothing here imports torch.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from vitrail.data.views.preprocess import Preprocess
from vitrail.disk import flush_folder, sha256, write_text
from vitrail.errors import DataError, UsageError, VitrailError, setting
from vitrail.tasks.answers import Reading

ABOUT, CARD, SUMS = "bundle.json", "CARD.md", "SHA256SUMS"
_FORMAT = 1
_MOST = 2**24
"""Bytes of bundle.json: beyond that it is damaged or hostile."""
_LINE = re.compile(r"([0-9a-f]{64})  ([\w.-]+)")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What bundle.json says."""

    folder: Path
    name: str
    """What to call the model: of the run that it was."""
    runtime: str
    """A name in `vitrail.deploy.engines.ENGINES`."""
    precision: str
    """float32, bfloat16 or int8."""
    file: str
    """The model's, in the folder."""
    takes: str
    """image: pixels `[b h w c]` of any size, uint8, which the model scales itself; views: `[b c h
    w]` of its own size, or of several with their extents, scaled as `preprocess` says."""
    preprocess: Preprocess
    reading: Reading
    coupled: bool = False
    """Whether what is said of an image depends on those that are looked at together with it."""
    threshold: float | None = None
    """Of boxes: the score that gave the best F1 on the held-out images."""
    made: Mapping[str, Any] = field(default_factory=dict)
    """By what, of what: versions, the run as seen from the folder, its checkpoint's SHA-256."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """`before` and `after`, each number by its name with its interval, and `agreement`."""
    learned: Mapping[str, Any] = field(default_factory=dict)
    """The run's config, without where its data lies: what measuring needs."""

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Read a bundle, and hold every file of it against its SHA-256.

        Raises `DataError` for a folder that is none, or a file that was lost, cut or edited.
        """
        folder = Path(folder)
        check_whole(folder)
        if (folder / ABOUT).stat().st_size > _MOST:
            raise DataError(f"{folder / ABOUT} is damaged: it is far too large")
        try:
            said = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            if said.pop("format") != _FORMAT:
                raise DataError(
                    f"{folder} is a bundle of another vitrail ({said['made'].get('vitrail')}): "
                    f"export the run again"
                )
            names = {each.name for each in fields(cls)} - {"folder"}
            if unknown := said.keys() - names:
                raise ValueError(f"'{min(unknown)}' is no field of a bundle")
            preprocess = Preprocess.from_dict(said.pop("preprocess"))
            reading = reading_of(said.pop("reading"))
            bundle = cls(folder=folder, preprocess=preprocess, reading=reading, **said)
            bundle._check()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"{folder / ABOUT} is damaged: {error}") from error
        except UsageError as error:
            raise DataError(f"{folder / ABOUT} is damaged: {error}") from error
        return bundle

    def _check(self) -> None:
        texts = ("name", "runtime", "precision", "file", "takes")
        for name in texts:
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"'{name}' is no text")
        if self.takes not in ("image", "views"):
            raise ValueError(f"'takes' is {self.takes!r}, and can be image or views")
        if Path(self.file).name != self.file or not (self.folder / self.file).is_file():
            raise ValueError(f"its model {self.file!r} is no file in it")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError("'threshold' is not 0 to 1")
        if not isinstance(self.coupled, bool):
            raise ValueError("'coupled' is neither true nor false")
        for name in ("made", "metrics", "learned"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"'{name}' is no table")

    @property
    def model(self) -> Path:
        """The model's file."""
        return self.folder / self.file

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(file.stat().st_size for file in self.folder.iterdir())

    @property
    def card(self) -> dict[str, Any]:
        """What a user of the model wants to know of it, in plain values."""
        return {
            "name": self.name,
            "task": self.reading.kind,
            "classes": list(self.reading.names),
            "engine": self.runtime,
            "precision": self.precision,
            "image_size": list(self.preprocess.size),
            "resize": self.preprocess.resize,
            "metrics": self.metrics.get("after", {}),
            "images": self.metrics.get("images"),
            **{name: value for name, value in self.made.items() if name != "run"},
        }

    def to_dict(self) -> dict[str, Any]:
        """What bundle.json holds."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        del values["folder"]
        return {
            "format": _FORMAT,
            **values,
            "preprocess": self.preprocess.to_dict(),
            "reading": asdict(self.reading),
        }


def is_bundle(place: Path | str) -> bool:
    """Whether this is a folder that `vitrail export` wrote."""
    return (Path(place) / ABOUT).is_file()


def reading_of(values: Mapping[str, Any]) -> Reading:
    """The inverse of `asdict`, for values of a file. Raises `ValueError` for what cannot be."""
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    reading = Reading(**tuples)  # type: ignore[arg-type]  # what matters is looked at below
    if reading.kind not in ("classify", "segment", "detect", "features"):
        raise ValueError(f"there is no kind of answer called {reading.kind!r}")
    if not all(isinstance(name, str) for name in reading.names):
        raise ValueError("the classes have names that are no text")
    pair = all(isinstance(n, int) and n > 0 for n in (*reading.stride, *(reading.window or ())))
    if not pair or len(reading.stride) != 2 or len(reading.window or (1, 1)) != 2:
        raise ValueError("a stride or a window is not two whole numbers")
    if not isinstance(reading.most, int) or reading.most < 1:
        raise ValueError("the most boxes of an image are no number")
    return reading


def check_whole(folder: Path) -> None:
    """Raise `DataError` where a file of a bundle was lost, cut, edited or added."""
    if not is_bundle(folder):
        raise DataError(f"{folder} is no bundle: give the folder that vitrail export wrote")
    try:
        lines = (folder / SUMS).read_text(encoding="ascii").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} has no {SUMS} that can be read: export the run again") from error
    listed = {}
    for line in lines:
        if not (found := _LINE.fullmatch(line)):
            raise DataError(f"{folder / SUMS} is damaged: export the run again")
        listed[found[2]] = found[1]
    there = {file.name for file in folder.iterdir()} - {SUMS}
    if lost := listed.keys() - there:
        raise DataError(f"{folder} has lost {min(lost)}: copy it anew, or export the run again")
    if added := there - listed.keys():
        raise DataError(f"{folder} has {min(added)}, which is none of its files: move it away")
    for name, digest in listed.items():
        if (folder / name).is_symlink() or sha256(folder / name) != digest:
            raise DataError(
                f"{folder / name} is not the file that was exported: copy the bundle anew, or "
                f"export the run again"
            )


def refuse_there(out: Path) -> None:
    """Raise `UsageError` where something lies."""
    if os.path.lexists(out):
        raise UsageError(
            f"{out} is there already, and nothing is replaced: choose another {setting('out')}, or "
            f"move it away"
        )


def write_bundle(
    out: Path, make: Callable[[Path], Bundle], card: Callable[[Bundle], str]
) -> Bundle:
    """A bundle at `out`: `make` writes the model's files into a folder, and says what they are.

    Raises `UsageError` where something lies there already, `DataError` for a full disk and the
    like; of what was begun nothing is left.
    """
    refuse_there(out)
    beside = out.with_name(f".{out.name}.{os.getpid()}.writing")
    try:
        beside.mkdir(parents=True)
        bundle = make(beside)
        write_text(beside / ABOUT, json.dumps(bundle.to_dict(), indent=1, ensure_ascii=False))
        write_text(beside / CARD, card(bundle))
        files = sorted(file.name for file in beside.iterdir())
        sums = "".join(f"{sha256(beside / name)}  {name}\n" for name in files)
        write_text(beside / SUMS, sums)
        flush_folder(beside)
        beside.rename(out)
        flush_folder(out.parent)
    except VitrailError:
        raise
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Bundle.open(out)
