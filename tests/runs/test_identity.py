"""What a resumed run says has changed, on real folders and on any two sets of images."""

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrail.data import Splits
from vitrail.data.sources.stream import StreamSource
from vitrail.data.targets import Classes
from vitrail.errors import DataError, UsageError
from vitrail.models import model_config
from vitrail.runs import DataConfig, Run, TrainConfig
from vitrail.runs.data import open_data_of
from vitrail.runs.identity import (
    IDENTITY,
    changes,
    differences,
    identity,
    read_identity,
    refuse_changes,
)
from vitrail.runs.sketch import Sketch

CONFIG = TrainConfig(data=DataConfig(path="photos"), model=model_config("vit_s16"), minutes=4)


class Listed:
    """A source that is nothing but a list: key -> (label, stamp)."""

    def __init__(self, images, classes):
        self._rows = [(key, stamp) for key, (_, stamp) in images.items()]
        labels = [classes.index(label) for label, _ in images.values()]
        self.targets = Classes(classes, np.array(labels, np.int64))

    def __len__(self):
        return len(self._rows)

    def key(self, i):
        return self._rows[i][0]

    def stamp(self, i):
        return self._rows[i][1]

    def load(self, i):
        raise AssertionError("no image is decoded")


def of(images, classes=("cat", "dog"), held_out=None):
    held_out = held_out or {"held": ("cat", "1")}
    return identity(CONFIG, Splits(Listed(images, classes), Listed(held_out, classes), None))


def stored(found):
    """As the run folder gives it back."""
    return json.loads(json.dumps(found))


IMAGES = {f"{label}/{i}.jpg": (label, f"{i} 7") for label in ("cat", "dog") for i in range(20)}


def test_nothing_changed_is_nothing_said():
    assert differences(stored(of(IMAGES)), of(IMAGES)) == ()
    assert refuse_changes(stored(of(IMAGES)), of(IMAGES)) == ()
    assert refuse_changes({}, of(IMAGES)) == ()


def test_each_image_that_differs_is_named():
    now = dict(IMAGES)
    del now["cat/3.jpg"], now["dog/0.jpg"]
    now |= {"cat/1.jpg": ("cat", "1 8"), "dog/5.jpg": ("cat", "5 7"), "dog/new.jpg": ("dog", "")}
    before, after = stored(of(IMAGES)), of(now)
    said = (
        "1 training image was added (dog/new.jpg), 2 removed (cat/3.jpg, dog/0.jpg), "
        "1 changed (cat/1.jpg), 1 relabelled (dog/5.jpg)"
    )
    assert differences(before, after) == (said,)
    with pytest.raises(UsageError, match=r"1 relabelled \(dog/5.jpg\)[^$]*accept_changes=True"):
        refuse_changes(before, after)
    assert refuse_changes(before, after, accept=True) == (said,)


def test_held_out_images_count_as_well():
    after = of(IMAGES, held_out={"held": ("dog", "1"), "more": ("dog", "1")})
    assert differences(of(IMAGES), after) == (
        "1 validation image was added (more), 1 relabelled (held)",
    )


def test_another_order_is_another_run():
    shuffled = dict(reversed(IMAGES.items()))
    assert differences(of(IMAGES), of(shuffled)) == ("the training images are in another order",)
    with pytest.raises(UsageError, match="another order"):
        refuse_changes(of(IMAGES), of(shuffled))


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (("cat", "wolf"), "class 'dog' is gone, 'wolf' is new"),
        (("cat", "dog", "owl"), "class 'owl' is new"),
        (("cat", "owl", "wolf"), "classes 'dog' is gone, 'owl', 'wolf' are new"),
        (("dog", "cat"), "the classes are in another order: cat, dog; now dog, cat"),
    ],
)
def test_other_classes_are_never_accepted(classes, said):
    images = {key: (("cat", s) if label == "cat" else (classes[-1], s))
              for key, (label, s) in IMAGES.items()}  # fmt: skip
    after = of(images, classes)
    assert differences(of(IMAGES), after)[0] == said
    for accept in (False, True):
        with pytest.raises(DataError, match=said):
            refuse_changes(of(IMAGES), after, accept=accept)


def test_a_copy_that_lost_its_times_is_told_from_other_images():
    many = {f"cat/{i}.jpg": ("cat", "1") for i in range(2000)} | {"dog/1.jpg": ("dog", "1")}
    touched = {key: (label, "2") for key, (label, _) in many.items()}
    (said,) = differences(of(many), of(touched))
    assert "2,001 training images have another size or time" in said and "cp -a" in said
    relabelled = {key: ("dog", stamp) for key, (_, stamp) in many.items()}
    (said,) = differences(of(many), of(relabelled))
    assert said == "many of the 2,001 training images were relabelled"
    others = {f"cat/{i}.png": ("cat", "1") for i in range(500)} | {"dog/1.jpg": ("dog", "1")}
    (said,) = differences(of(many), of(others))
    assert said == (
        "many training images are others: 2,001 were, 501 are ('cat' had 2,000, now 500)"
    )


def test_code_that_has_no_part_in_a_run_may_change():
    code = of(IMAGES)["code"]
    assert {"training/loop.py", "data/views/augment.py", "runs/parts.py"} <= set(code)
    assert not [name for name in code if name.startswith(("report/", "cli/", "data/check"))]


@pytest.mark.parametrize(
    ("place", "value", "said", "refused"),
    [
        (("libraries", "torch"), "2.14.0", "torch was {}, now 2.14.0", True),
        (("libraries", "simplejpeg"), "1.9", "simplejpeg was {}, now 1.9", True),
        (("vitrail",), "9.9", "vitrail was {}, now 9.9", True),
        (("code", "training/loop.py"), "0", "vitrail's code changed: training/loop.py", True),
        (("code", "training/new.py"), "0", "vitrail's code changed: training/new.py", True),
        (("python",), "3.99.1", "Python was {}, now 3.99.1", False),
        (("machine", "threads"), 99, "threads were {}, now 99: sums may round differently", False),
        (("machine", "processor"), "Z80", "processor was {}, now Z80: sums may round", False),
    ],
)
def test_code_and_machine(place, value, said, refused):
    before, now = of(IMAGES), of(IMAGES)
    *parents, leaf = place
    branch = now
    for parent in parents:
        branch = branch[parent]
    said = said.format(branch.get(leaf, "none") or "none")
    branch[leaf] = value
    (sentence,) = differences(before, now)
    assert sentence.startswith(said)
    if refused:
        with pytest.raises(UsageError, match="accept_changes=True"):
            refuse_changes(before, now)
    else:
        assert refuse_changes(before, now) == (sentence,)


KEYS = st.text(  # longer ones than a sketch keeps
    st.characters(codec="utf-8", exclude_characters="\0("), min_size=1, max_size=90
)
SETS = st.dictionaries(KEYS, st.tuples(st.sampled_from(["cat", "dog"]), st.text(max_size=3)))


@settings(max_examples=80, deadline=None)
@given(before=SETS, now=SETS, kept=SETS)
def test_any_two_sets_of_images(before, now, kept):
    """Nothing is said if, and only if, they are equal; else the counts are exact."""
    before, now = {**before, **kept}, {**now, **kept}
    found = changes(stored(of(before)), of(now))
    if before == now and list(before) == list(now):
        assert found == ()
        return
    (change,) = found
    assert change.what == "inexact"
    expected = {
        "added": len(now.keys() - before.keys()),
        "removed": len(before.keys() - now.keys()),
        "changed": sum(before[k][1] != now[k][1] for k in before.keys() & now.keys()),
        "relabelled": sum(
            before[k][1] == now[k][1] and before[k] != now[k] for k in before.keys() & now.keys()
        ),
    }
    told = re.findall(
        r"(\d+) (?:training images? (?:was|were) )?(added|removed|changed|relabelled) \(",
        change.sentence,
    )
    assert {how: int(count) for count, how in told} == {h: n for h, n in expected.items() if n}
    if not any(expected.values()):
        assert change.sentence == "the training images are in another order"


RECORDS = st.lists(
    st.tuples(KEYS, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), unique=True, max_size=40
)


def filled(records):
    sketch = Sketch()
    names, labels, contents = zip(*records, strict=True) if records else ((), (), ())
    sketch.add(names, np.array(labels, np.uint64), np.array(contents, np.uint64))
    return sketch


@settings(max_examples=80, deadline=None)
@given(ours=RECORDS, theirs=RECORDS, both=RECORDS, data=st.data())
def test_a_sketch_tells_just_the_records_that_differ(ours, theirs, both, data):
    one = filled([*ours, *both])
    other = Sketch()
    rows = data.draw(st.permutations([*theirs, *both]))
    at = data.draw(st.integers(0, len(rows)))
    for part in (rows[:at], rows[at:]):  # in any order and any portions
        piece = filled(part)
        other.sums ^= piece.sums
        other.counts += piece.counts
    found = Sketch.parse(one.text()).differences(Sketch.parse(other.text()))
    expected = Counter(ours) - Counter(theirs), Counter(theirs) - Counter(ours)
    assert found is not None
    for records, rows in zip(found, expected, strict=True):
        assert Counter((r.label, r.content) for r in records) == Counter(r[1:] for r in rows)
        full = {row[1:]: row[0] for row in rows}
        for record in records:
            name = full[record[1:]]
            assert record.name == name or name.endswith(record.name.removeprefix("..."))


@pytest.mark.parametrize("seed", range(10))
def test_hundreds_of_differences_come_out_and_thousands_are_given_up(seed):
    rng = np.random.default_rng(seed)
    rows = [(f"{i}.png", int(a), int(b))
            for i, (a, b) in enumerate(rng.integers(0, 2**63, (3000, 2)))]  # fmt: skip
    one = filled(rows)
    found = one.differences(filled(rows[:-400]))
    assert found is not None and sorted(found[0]) == sorted(rows[-400:]) and found[1] == []
    assert one.differences(filled(rows[:1000])) is None
    assert len(one.text()) < 76_000


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": "vitrail identity 9"}', '{"format": "vitrail identity 1"}'],
)
def test_a_damaged_identity_is_said(tmp_path, text):
    run = Run.create(tmp_path / "a", CONFIG)
    assert read_identity(run) == {}
    run.write(IDENTITY, text)
    with pytest.raises(DataError, match=r"identity.json is damaged.*Remove it"):
        differences(read_identity(run), of(IMAGES))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_damage_of_the_file_is_told_or_harmless(data):
    good = of(IMAGES)
    text = list(json.dumps(good))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place] = data.draw(st.sampled_from('"{}[]:,0aZ/+='))
    try:
        before = json.loads("".join(text))
    except ValueError:
        return
    try:
        assert all(isinstance(s, str) for s in differences(before, good))
    except DataError as error:
        assert "damaged" in str(error)


class Shards:
    def __len__(self):
        return 3

    def read(self, shard, start):
        raise AssertionError("a stream is not read")


def test_a_stream_is_told_from_another():
    def streamed(seed):
        return StreamSource(Shards(), ("cat", "dog"), seed=seed, stamp="x")

    held_out = Listed({"held": ("cat", "1")}, ("cat", "dog"))
    one, other = (identity(CONFIG, Splits(streamed(seed), held_out, None)) for seed in (0, 1))
    assert differences(stored(one), one) == ()
    assert differences(stored(one), other) == ("the training stream is another, or its order is",)
    assert differences(stored(one), of(IMAGES))[0].startswith("the training stream is another")


def test_a_real_folder_and_several_labels(tmp_path):
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "photos" / label / f"{i}.png")
    config = replace(CONFIG, data=DataConfig(path=str(tmp_path / "photos")))
    before = identity(config, open_data_of(config))
    assert differences(before, identity(config, open_data_of(config))) == ()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "cat" / "0.png")
    (said,) = differences(before, identity(config, open_data_of(config)))
    assert re.fullmatch(r"1 (training|validation) image was changed \(cat/0.png\)", said)

    listed = tmp_path / "photos" / "labels.csv"
    rows = [f"{c}/{i}.png,{'red|' if i % 2 else ''}{c}" for c in ("cat", "dog") for i in range(5)]
    listed.write_text("file,label\n" + "\n".join(rows))
    before = identity(config, open_data_of(config))
    listed.write_text("file,label\n" + "\n".join(rows).replace("3.png,red|cat", "3.png,cat"))
    (said,) = differences(before, identity(config, open_data_of(config)))
    assert "relabelled (cat/3.png)" in said
