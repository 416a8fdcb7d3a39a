"""What the name of a folder, a file or a split says of the part of a data set that it holds."""

import re
from typing import NamedTuple

from vitrail.data.sources.source import PARTS

_WORDS = {
    "train": ("train", "training", "trn", "trainval"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation", "validate", "development"),
    "test": ("test", "testing", "tst"),
}
"""The usual words for each part, the most usual first."""

_PART_OF = {word: part for part in PARTS for word in _WORDS[part]}

_NEUTRAL = (
    *("set", "sets", "data", "dataset", "datasets", "image", "images", "img", "imgs", "photo"),
    *("photos", "picture", "pictures", "pics", "file", "files", "folder", "dir", "jpg", "png"),
)
"""Words beside the part's that say nothing more: train_images, testset."""


class PartName(NamedTuple):
    """A name that has the word for a part in it."""

    part: str
    """One of PARTS."""
    word: str
    """Which it is called by: "valid"."""
    rest: tuple[str, ...]
    """The other words, but for years, numbers and those that say nothing: ("seg",) of seg_test."""


def part_within(name: str) -> PartName | None:
    """The part that one word of `name` stands for; None if none does, or words of several parts.

    >>> part_within("seg_train")
    PartName(part='train', word='train', rest=('seg',))
    >>> part_within("test-dev2017").part, part_within("cat"), part_within("test_val")
    ('test', None, None)
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    found, rest = [], []
    for word in re.findall(r"[^\W\d_]+", spaced.lower()):
        if usual := _usual(word):
            found.append(usual)
        elif word not in _NEUTRAL:
            rest.append(word)
    parts = [_PART_OF[word] for word in found]
    # COCO's test-dev is for testing, and train_val is what is learned from.
    if not found or (len(set(parts)) > 1 and parts not in (["train", "val"], ["test", "val"])):
        return None
    if parts == ["test", "val"] and found[1] != "dev":
        return None
    return PartName(parts[0], found[0], tuple(rest))


def part_named(name: str) -> str | None:
    """The part that `name` stands for as a whole: train2017, Validation, test_images.

    >>> part_named("train2017"), part_named("testset"), part_named("seg_train")
    ('train', 'test', None)
    """
    found = part_within(name)
    return found.part if found and not found.rest else None


def most_usual(names: dict[str, PartName]) -> str:
    """Of several names of one part, the one that is most usually called so."""
    return min(names, key=lambda name: (_WORDS[names[name].part].index(names[name].word), name))


def _usual(word: str) -> str | None:
    """The word for a part that `word` is, or begins with before a word that says nothing."""
    if word in _PART_OF:
        return word
    return next((w for w in _PART_OF if word.startswith(w) and word[len(w) :] in _NEUTRAL), None)
