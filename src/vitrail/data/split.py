"""From what the user names to images for training, validation and test.

The split of the data's maker is kept. Where there is no validation part, one is drawn from the
training images, class by class: they are ordered by a hash of (seed, key), and the first go to
validation. So the split depends on nothing but the data and the seed, and an image that is added
moves at most one other, of its own class, instead of shuffling all.
"""

import csv
import os
from difflib import get_close_matches
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from vitrail.data.names import shortened
from vitrail.data.sources.arrays import has_idx, open_idx, open_npz
from vitrail.data.sources.boxed import BoxedSource, has_boxes
from vitrail.data.sources.csvfile import Columns, CsvSource, NoImageColumn, list_file
from vitrail.data.sources.folder import FolderSource
from vitrail.data.sources.hub import (
    HUB_PREFIX,
    STREAM_PREFIX,
    has_tables,
    open_hub,
    open_hub_pairs,
    open_streams,
)
from vitrail.data.sources.layout import USUAL, FolderRules
from vitrail.data.sources.mask_meaning import AS_THEY_SAY, MaskRules
from vitrail.data.sources.mask_told import idle_masks
from vitrail.data.sources.mask_told import told as mask_told
from vitrail.data.sources.masked import MaskedSource, has_masks
from vitrail.data.sources.pairs import has_texts, open_coco_captions, pair_table, read_pairs
from vitrail.data.sources.samples import (
    BOXED_SAMPLES,
    MASKED_SAMPLES,
    PAIRED_SAMPLES,
    SAMPLES,
    open_sample,
)
from vitrail.data.sources.shards import PairShards, ShardSource, UnlabelledShards, has_shards
from vitrail.data.sources.source import PARTS, PartedSource, Source, Subset, Tally
from vitrail.data.sources.stream import HeldImages, StreamSettings, StreamSource
from vitrail.data.sources.unlabelled import UnlabelledFiles, open_unlabelled
from vitrail.data.targets import Boxes, Classes, Masks, Nothing, Targets, Texts
from vitrail.errors import DataError, UsageError, setting
from vitrail.units import bytes_text

_TRAIN, _VAL, _TEST = range(len(PARTS))
_LEFT_OUT = 255
_SAMPLES_PREFIX = "samples:"
_SPLIT_HEADER = ("split", "key", "label")
_CHOSEN_BY_TEST = "validation: the test images, so a best epoch is chosen by them"

_Part = UInt8[np.ndarray, " n"]


class Splits(NamedTuple):
    """What a run trains on, chooses by and is measured on; all share one table of classes.

    `train` is a stream where the data is one. `val` and `test` are one object where the user wants
    no validation part. `notes` are sentences for the user: what was left out, and how the split was
    made.
    """

    train: Source | StreamSource
    val: Source
    test: Source | None
    notes: tuple[str, ...] = ()

    @property
    def stream(self) -> StreamSource | None:
        """What is trained on, where it is read from front to back and has no end."""
        return self.train if isinstance(self.train, StreamSource) else None

    @property
    def parts(self) -> dict[str, Source]:
        """By name, the parts whose images can be had at any place; one that is both validation and
        test is `test`.
        """
        train = {} if isinstance(self.train, StreamSource) else {"train": self.train}
        val = {} if self.val is self.test else {"val": self.val}
        return {**train, **val, **({} if self.test is None else {"test": self.test})}


def open_splits(
    data: Path | str,
    *,
    seed: int,
    val_fraction: float = 0.2,
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    caption_column: str | None = None,
    rules: FolderRules = USUAL,
    masks: MaskRules = AS_THEY_SAY,
    targets: type[Targets] = Classes,
    assignment: Path | None = None,
    allow_missing: bool = False,
    source: PartedSource | None = None,
) -> Splits:
    """Open `data`, as `open_data` does, unless it is open as `source`, and split it.

    Where the data has no validation part, `val_fraction` of its training images become one; with
    0, the test part takes that role. `assignment` is a file of `write_split`, whose split is
    restored instead; `allow_missing` goes on without those of its images that are gone.

    Raises UsageError for a fraction that cannot be, and DataError for data that
    is not there or that nothing can be learned from.
    """
    if not 0 <= val_fraction < 1:
        raise UsageError(
            f"{setting('val_fraction')} is {val_fraction}: it must be at least 0 and less than 1"
        )
    columns = Columns(image_column, label_column, split_column, caption_column)
    if source is None:
        source = open_data(data, columns, rules, masks=masks, targets=targets)
    _refuse_unlearnable(data, source)
    if assignment is None:
        part, notes = _divide(source, seed, val_fraction)
    else:
        part, notes = _restore(source, assignment, allow_missing)
    _refuse_unseen(source, part)
    notes = (*notes, *_leave_out_idle(source, part))
    subsets = _subsets(source, part)
    test = subsets.get(_TEST)
    val = subsets.get(_VAL, test)
    if val is None:
        raise DataError(f"no image of {data} is left for validation: it has too few")
    told = [one.sentence() for one in source.left_out]
    if isinstance(source.targets, Masks):
        notes = (*notes, *mask_told(source.targets, part))
    if targets is Nothing and (names := source.targets.names):
        told.append(f"labels: {len(names)} classes, only to measure by: {shortened(names)}")
    return Splits(subsets[_TRAIN], val, test, (*told, *source.notes, *notes))


def open_streamed(
    data: str,
    *,
    seed: int,
    settings: StreamSettings,
    val_fraction: float = 0.2,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Splits:
    """Open the stream `data` (hf-stream:NAME), and keep up to `settings.held_out` images in memory.

    They are of its own part for validation, and as many of that for test; where it has neither, of
    its first images, and training passes over them. Where it is known how many images there are,
    those are no more than `val_fraction` of them.

    Raises as `open_splits` does.
    """
    name, columns = data.removeprefix(STREAM_PREFIX), Columns(image_column, label_column)
    streams, left_out = open_streams(name, columns, seed=seed, settings=settings)
    train, most = streams.pop("train"), settings.held_out
    if not train.targets.several:
        _refuse_one_class(data, train.targets.names)
    held = {part: stream.sample(most) for part, stream in streams.items()}
    told = tuple(one.sentence() for one in left_out)
    notes = told + tuple(
        f"{part}: no more than {most:,} images, kept in memory (data.stream.held_out)"
        for part, images in held.items()
        if len(images) == most
    )
    if test := held.get("test"):
        own = "val" in held
        return Splits(
            train, held.get("val", test), test, notes if own else (*notes, _CHOSEN_BY_TEST)
        )
    if "val" in held:
        return Splits(train, held["val"], None, notes)
    val = _beginning(data, train, most, val_fraction)
    how = (
        f"validation: {len(val):,} images from the beginning of the stream, which training passes "
        f"over; they take {bytes_text(val.bytes)} of memory"
    )
    return Splits(train.without(val), val, None, (*told, how))


def _beginning(data: str, stream: StreamSource, most: int, fraction: float) -> HeldImages:
    """Images of a stream to hold out of training."""
    if fraction == 0:
        raise _nothing_held_out()
    if stream.images is not None:
        most = min(most, max(1, round(fraction * stream.images)))
    held = stream.sample(most)
    if len(held) < most:
        raise DataError(
            f"{data} has only {len(held)} images, and all of them would be held out: hold out "
            f"fewer, {setting('data.stream.held_out')} {max(1, len(held) // 5)}"
        )
    seen = held.targets.present()
    if len(seen) == 1:
        raise DataError(
            f"the {len(held)} images from the beginning of {data}, which are to be held out, are "
            f"all of the class '{seen[0]}': hold out more "
            f"({setting('data.stream.held_out')}); or, if the data lies sorted by class, which no "
            f"stream can shuffle, read it whole: {HUB_PREFIX}{data.removeprefix(STREAM_PREFIX)}"
        )
    return held


def open_data(
    data: Path | str,
    columns: Columns | None = None,
    rules: FolderRules = USUAL,
    *,
    masks: MaskRules = AS_THEY_SAY,
    targets: type[Targets] = Classes,
) -> PartedSource:
    """Open the data set at `data`, whole, with what a task learns from: `targets`.

    With `Masks`: a folder of images and their masks (`vitrail.data.sources.masked`), or a sample
    set that has some; `masks` says how they are understood. With `Boxes`: a folder of images and
    of what tells their boxes, or a file in it that does (`vitrail.data.sources.boxed`), or a sample
    set that has some. With `Texts`: images and what is written of them
    (`vitrail.data.sources.pairs`). With `Nothing`: whatever holds images; where they have classes,
    these are kept. With `Classes` as follows.

    It is a folder of class folders, or of train/, val/ and test/ with class folders; a folder with
    a labels.csv; a .csv, .tsv or .txt file that lists images; a .npz file of MedMNIST's layout; a
    folder of MNIST's IDX files; tar files of WebDataset, or a folder of them; a folder that Hugging
    Face's `datasets` saved, or of parquet files; samples:NAME; or hf:NAME. `columns` names columns
    of a list or a Hugging Face data set; `rules` are for folders of images. Raises DataError for
    anything else.
    """
    name, columns = os.path.expanduser(str(data)), columns or Columns()
    try:
        if targets is Boxes and not name.startswith(_SAMPLES_PREFIX):
            return _open_boxed(name, columns, rules, masks)
        if targets is Texts:
            return _open_pairs(name, columns, rules, masks)
        if targets is Masks and not name.startswith(_SAMPLES_PREFIX):
            return _open_masked(name, columns, rules, masks)
        if masks != AS_THEY_SAY:
            raise UsageError(f"{setting('data.masks')} is for folders of images with masks")
        if targets is Boxes and name.removeprefix(_SAMPLES_PREFIX) in BOXED_SAMPLES:
            return open_sample(name.removeprefix(_SAMPLES_PREFIX), boxes=True)
        source = _open_or_bare(name, columns, rules, bare=targets is Nothing)
    except OSError as error:
        raise DataError(f"cannot open {data}: {error.strerror}") from error
    if targets is not Nothing and not isinstance(source.targets, targets):
        tasks = {"masks": "segment", "classes": "classify", "boxes": "detect", "texts": "clip"}
        task = tasks.get(source.targets.kind, "mocov3")
        raise DataError(
            f"{data} comes with {source.targets.kind}, not with {targets.kind}: learn that with "
            f"{setting('task', task)}"
        )
    if isinstance(source, UnlabelledFiles | UnlabelledShards):
        return source
    if rules != USUAL and not isinstance(source, FolderSource):
        raise UsageError(
            f"{setting('data.parts')} and {setting('data.follow_links')} are for folders of "
            f"images, but {data} is none"
        )
    return source


def _open_boxed(name: str, columns: Columns, rules: FolderRules, masks: MaskRules) -> PartedSource:
    if masks != AS_THEY_SAY:
        raise UsageError(f"{setting('data.masks')} is for folders of images with masks")
    if any(columns):
        raise UsageError(
            f"a column is named, but boxes of {name} are found by the usual names of columns"
        )
    if not os.path.exists(name):
        raise _no_data_set(Path(name))
    return BoxedSource(name, rules)


def _open_pairs(name: str, columns: Columns, rules: FolderRules, masks: MaskRules) -> PartedSource:
    if masks != AS_THEY_SAY or rules != USUAL:
        raise UsageError(
            f"{setting('data.masks')}, {setting('data.parts')} and {setting('data.follow_links')} "
            f"are for folders of images, and {name} is to say texts of them"
        )
    path = Path(name)
    if (table := pair_table(path)) is not None:
        return read_pairs(table, columns, whole_folder=path.is_dir())
    if name.startswith(HUB_PREFIX) or has_tables(path):
        return open_hub_pairs(name.removeprefix(HUB_PREFIX), columns)
    if any(columns):
        raise UsageError(f"a column is named, but {name} is no table or Hugging Face data set")
    if name.removeprefix(_SAMPLES_PREFIX) in PAIRED_SAMPLES:
        return open_sample(name.removeprefix(_SAMPLES_PREFIX))
    shards = has_shards(path) if path.is_dir() else path.suffix.lower() == ".tar"
    if shards and path.exists():
        return PairShards(path)
    if has_texts(path):
        return open_coco_captions(path)
    if path.exists() or name.startswith(_SAMPLES_PREFIX):
        raise DataError(
            f"{name} says no texts of images: give a .csv or .tsv with a column of files and one "
            f"of texts, COCO's captions, tar files of WebDataset with KEY.jpg and KEY.txt, hf:NAME "
            f"or samples:{PAIRED_SAMPLES[0]}"
        )
    raise _no_data_set(path)


def _open_masked(name: str, columns: Columns, rules: FolderRules, masks: MaskRules) -> PartedSource:
    if any(columns):
        raise UsageError(f"a column is named, but {name} is a folder of images and masks")
    if not os.path.isdir(name):
        if os.path.exists(name):
            raise DataError(f"{name} is no folder: images with masks lie in one")
        raise _no_data_set(Path(name))
    return MaskedSource(name, rules, masks)


def _open_or_bare(name: str, columns: Columns, rules: FolderRules, *, bare: bool) -> PartedSource:
    """With labels; where there are none, and none are needed, without."""
    try:
        return _open(name, columns, rules)
    except DataError as error:
        if not bare or not os.path.exists(name):
            raise
        source = open_unlabelled(name, image_column=columns.image, rules=rules)
        source.notes = (*source.notes, f"no labels to measure by: {why_bare(error)}")
        return source


def why_bare(error: DataError) -> str:
    """Why data has no labels, of an error that also says how to do without."""
    return str(error).partition("; or learn from them without labels")[0]


def task_of(data: str, masks: MaskRules = AS_THEY_SAY) -> str:
    """The task that data asks for by what it holds: segment where there are masks, or where it is
    said how they are understood; detect where there are boxes alone; clip where texts are.
    """
    if masks != AS_THEY_SAY:
        return "segment"
    if data.startswith(_SAMPLES_PREFIX):
        name = data.removeprefix(_SAMPLES_PREFIX)
        if name in MASKED_SAMPLES:
            return "segment"
        if name in PAIRED_SAMPLES:
            return "clip"
        return "detect" if name in BOXED_SAMPLES else "classify"
    place = os.path.expanduser(data)
    if has_masks(place):
        return "segment"
    if has_boxes(place):
        return "detect"
    return "clip" if has_texts(place) else "classify"


def _open(name: str, columns: Columns, rules: FolderRules) -> PartedSource:
    path = Path(name)
    listed = list_file(path)
    if listed is None:
        return _open_unlisted(name, columns, rules)
    try:
        return CsvSource(listed, *columns[:3], whole_folder=path.is_dir())
    except NoImageColumn as no_list:
        if not path.is_dir() or any(columns):
            raise
        try:
            source = _open_unlisted(name, columns, rules)
        except DataError as error:
            raise DataError(f"{no_list}; and without it: {error}") from error
        source.notes = (*source.notes, f"passed over: {no_list}")
        return source


def _open_unlisted(name: str, columns: Columns, rules: FolderRules) -> PartedSource:
    path = Path(name)
    if name.startswith(HUB_PREFIX) or has_tables(path):
        return open_hub(name.removeprefix(HUB_PREFIX), columns)
    if name.startswith(STREAM_PREFIX):
        raise UsageError(
            f"{name} is a stream, which is read from front to back and trained on: here it takes "
            f"data that is read in any order, as {HUB_PREFIX}{name.removeprefix(STREAM_PREFIX)}"
        )
    if any(columns):
        raise UsageError(f"a column is named, but {name} is no CSV file or Hugging Face data set")
    if name.startswith(_SAMPLES_PREFIX):
        return open_sample(name.removeprefix(_SAMPLES_PREFIX))
    if path.is_dir():
        if has_idx(path):
            return open_idx(path)
        return ShardSource(path) if has_shards(path) else FolderSource(path, rules)
    if path.suffix.lower() == ".tar" and path.is_file():
        return ShardSource(path)
    if path.suffix.lower() == ".npz" and path.is_file():
        return open_npz(path)
    raise _no_data_set(path)


def _no_data_set(path: Path) -> DataError:
    if path.exists():
        return DataError(
            f"{path} is no data set: give a folder of class folders, a .csv, .txt or .npz file "
            "(an archive must be unpacked first, unless it is a .tar of WebDataset)"
        )
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = [str(path.parent / name) for name in get_close_matches(path.name, siblings, n=1)]
    near += [_SAMPLES_PREFIX + name for name in SAMPLES if name == path.name]
    hint = f": did you mean {near[0]}?" if near else ""
    return DataError(f"no such file or folder: {path}{hint}")


def _refuse_unlearnable(data: Path | str, source: PartedSource) -> None:
    if not (source.part == _TRAIN).any():
        there = [name for number, name in enumerate(PARTS) if (source.part == number).any()]
        raise DataError(
            f"{data} has no images to train with: all are for {' and '.join(there)} (which folder "
            f"is which part, {setting('data.parts')} says)"
        )
    if isinstance(source.targets, Classes) and not source.targets.several:
        _refuse_one_class(data, source.targets.names)
    if isinstance(source.targets, Boxes):
        learned = source.targets.rows(np.flatnonzero(source.part == _TRAIN))
        if not learned.counts().sum():
            raise DataError(
                f"no image of {data} to train with has an object that counts: look at it with: "
                f"vitrail data check {data}"
            )
    if isinstance(source.targets, Texts):
        texts = source.targets.rows(np.flatnonzero(source.part == _TRAIN))
        if texts.different() < 2:
            raise DataError(
                f"the images of {data} to train with have the same text, or there is only one: to "
                f"tell which text is whose takes at least two"
            )
    if isinstance(source.targets, Masks) and len(source.targets.names) < 2:
        only = ", ".join(source.targets.names) or "none"
        raise DataError(
            f"the masks of {data} hold only one class ({only}): to tell pixels apart takes at "
            f"least two. Look at them with: vitrail data check {data}"
        )


def _refuse_one_class(data: Path | str, classes: tuple[str, ...]) -> None:
    if len(classes) == 1:
        only = classes[0]
        raise DataError(
            f"{data} has only one class, '{only}': to tell classes apart takes at least two (if "
            f"the class folders lie inside {only}, give that folder)"
        )


def _refuse_unseen(source: Source, part: _Part) -> None:
    """Refuse labels of validation and test that no training image has."""
    if not isinstance(targets := source.targets, Classes):
        return
    trained = targets.rows(np.flatnonzero(part == _TRAIN)).present()
    asked = targets.rows(np.flatnonzero((part == _VAL) | (part == _TEST))).present()
    if unseen := [name for name in asked if name not in {*trained}]:
        raise DataError(
            "labels unseen in training, though validation or test has them: "
            f"{shortened(unseen)}; add training images of them, or take those images out"
        )


def _leave_out_idle(source: PartedSource, part: _Part) -> tuple[str, ...]:
    """Leave out a test part of whose masks no pixel counts, as Cityscapes publishes its own: that
    would be found only when all is learned. Of validation, that is refused.
    """
    if not isinstance(source.targets, Masks):
        return ()
    idle, said = idle_masks(source.targets), []
    for number, name in ((_VAL, "validation"), (_TEST, "test")):
        chosen = part == number
        if not chosen.any() or not idle[chosen].all():
            continue
        what = f"{name}: none of its {int(chosen.sum()):,} masks has a pixel that counts"
        if number == _VAL or not (part == _VAL).any():
            raise DataError(
                f"{what}, so that nothing can be measured by them (where they are drawn, another "
                f"{setting('seed')} draws others)"
            )
        part[chosen] = _LEFT_OUT
        said.append(f"{what}, so it is left out, and validation is what is measured")
    return tuple(said)


def _subsets(source: Source, part: _Part) -> dict[int, Subset]:
    """The images of each part, without the labels that only images left out have."""
    targets, numbers = source.targets, (_TRAIN, _VAL, _TEST)
    indices = {n: rows for n in numbers if len(rows := np.flatnonzero(part == n))}
    if isinstance(targets, Classes):
        used, unused = (
            targets.rows(np.flatnonzero(chosen)).counts() > 0
            for chosen in (part != _LEFT_OUT, part == _LEFT_OUT)
        )
        kept = np.flatnonzero(used | ~unused)
        return {n: Subset(source, rows, targets.rows(rows).of(kept)) for n, rows in indices.items()}
    return {number: Subset(source, rows) for number, rows in indices.items()}


def _divide(source: PartedSource, seed: int, fraction: float) -> tuple[_Part, tuple[str, ...]]:
    """The maker's split, with a validation part drawn from the training images if it has none."""
    part = source.part.copy()
    if (part == _VAL).any():
        return part, ()
    if fraction > 0:
        pool = np.flatnonzero(part == _TRAIN)
        chosen = _validation(source, pool, seed, fraction)
        part[chosen] = _VAL
        how = f"validation: {len(chosen)} of the {len(pool)} training images, drawn by seed {seed}"
        return part, (how,)
    if (part == _TEST).any():
        return part, (_CHOSEN_BY_TEST,)
    raise _nothing_held_out()


def _nothing_held_out() -> UsageError:
    return UsageError(
        f"{setting('val_fraction')} is 0, but the data has no part for validation or test"
    )


def _validation(
    source: Source, pool: Int64[np.ndarray, " n"], seed: int, fraction: float
) -> Int64[np.ndarray, " v"]:
    """Those of the training images `pool` that go to validation."""
    draws = np.array([_draw(seed, source.key(int(i))) for i in pool], np.uint64)
    order = pool[np.argsort(draws, kind="stable")]
    targets = source.targets
    if isinstance(targets, Classes) and targets.several:
        return _validation_of_several_labels(targets.values, order, fraction)
    strata = targets.strata()
    if strata is None:
        return order[: _share(len(order), fraction)]
    by_class = order[np.argsort(strata[order], kind="stable")]
    groups = np.split(by_class, np.flatnonzero(np.diff(strata[by_class])) + 1)
    lonely = [targets.text(int(group[0])) for group in groups if len(group) == 1]
    if lonely:
        raise DataError(
            "a class needs at least two images, one to train with and one to validate with; "
            f"these have one: {shortened(lonely)}"
        )
    return np.concatenate([group[: _share(len(group), fraction)] for group in groups])


def _validation_of_several_labels(
    targets: UInt8[np.ndarray, "n c"], order: Int64[np.ndarray, " n"], fraction: float
) -> Int64[np.ndarray, " v"]:
    """The first of `order`, less those with a label that training would then never see."""
    chosen, rest = np.split(order, [_share(len(order), fraction)])
    untrained = ~targets[rest].any(axis=0)
    return chosen[~targets[chosen][:, untrained].any(axis=1)]


def _draw(seed: int, key: str) -> int:
    return int.from_bytes(blake2b(f"{seed}/{key}".encode(), digest_size=8).digest(), "big")


def _share(n: int, fraction: float) -> int:
    """How many of `n` images go to validation: at least one, and never all."""
    return min(max(1, round(n * fraction)), n - 1)


def write_split(splits: Splits, file: Path) -> None:
    """Store which image is in which part, as CSV: split,key,label (several labels as a|b).

    Of a stream that is the held-out images only: it passes over these, and all others it trains on.

    Raises DataError where it cannot be written.
    """
    try:
        with file.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(_SPLIT_HEADER)
            for name, source in splits.parts.items():
                rows = ((name, source.key(i), source.targets.text(i)) for i in range(len(source)))
                writer.writerows(rows)
    except OSError as error:
        raise DataError(f"cannot write the split to {file}: {error.strerror}") from error


def _restore(
    source: PartedSource, file: Path, allow_missing: bool
) -> tuple[_Part, tuple[str, ...]]:
    """The split that `write_split` stored: every image of it, and no other."""
    numbers = {source.key(i): i for i in range(len(source))}
    stored = _read_split(file)
    missing = [key for key in stored if key not in numbers]
    if missing and not allow_missing:
        raise DataError(
            f"{len(missing)} images of the split in {file} are no longer in the data: "
            f"{shortened(missing)}; put them back, or start a new run to split anew, or train on "
            f"without them: vitrail train --resume RUN --accept-changes"
        )
    stored = {key: part for key, part in stored.items() if key in numbers}
    part = np.full(len(source), _LEFT_OUT, np.uint8)
    part[[numbers[key] for key in stored]] = list(stored.values())
    unused = Tally()
    new = (source.key(int(i)) for i in np.flatnonzero(part == _LEFT_OUT))
    unused.add("images", f"the split in {file} does not list them", *new)
    return part, tuple(one.sentence() for one in unused.told())


def _read_split(file: Path) -> dict[str, int]:
    """Each image's key and part."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.reader(stream))
        if tuple(rows[0]) != _SPLIT_HEADER:
            raise ValueError(f"its header is not {','.join(_SPLIT_HEADER)}")
        return {key: PARTS.index(name) for name, key, _ in rows[1:]}
    except (OSError, ValueError, IndexError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(
            f"cannot restore the split from {file}: {reason}. Put it back from a copy of the run, "
            f"or start a new one"
        ) from error
