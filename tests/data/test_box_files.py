"""Whatever lies in the files of labels, it is one message or a counted skip."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from command import contents
from data.boxed import FORMATS, picture, voc_text
from vitrail.data.check_boxes import check_boxes
from vitrail.data.sources.boxed import BoxedSource, has_boxes
from vitrail.errors import DataError, UsageError

NUMBERS = st.one_of(
    st.floats(-10, 80),
    st.floats(),
    st.integers(-3, 80),
    st.integers(),
    st.sampled_from([0, 1, 64, -1, 10**400, float("nan"), float("inf"), 1e-300]),
)
NAMES = st.one_of(st.sampled_from(["cat", "dog", "ignore", "a.jpg", "b.jpg", ""]), st.text())
SCALARS = st.one_of(NUMBERS, NAMES, st.booleans(), st.none())
JUNK = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3)
)


def mostly(*usual: Any) -> st.SearchStrategy[Any]:
    """Hardly ever something else."""
    return st.integers(0, 30).flatmap(lambda k: JUNK if k == 0 else st.sampled_from(usual))


def usually(whole: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Fifteen times of sixteen."""
    return st.integers(0, 15).flatmap(lambda k: JUNK if k == 0 else whole)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """With all of the fields; once of sixteen without one."""
    lost = st.integers(0, 15).flatmap(
        lambda k: st.sampled_from(sorted(fields)) if k == 0 else st.none()
    )
    return st.builds(
        lambda lost, row: {key: value for key, value in row.items() if key != lost},
        lost,
        st.fixed_dictionaries(fields),
    )


def image(number: int, name: str) -> st.SearchStrategy[Any]:
    return usually(
        some(
            id=mostly(number),
            file_name=mostly(name, name, name, "c.jpg", "../a.jpg"),
            width=mostly(64, 48, 0),
            height=mostly(48, 64, -1),
        )
    )


def category(number: int, name: str) -> st.SearchStrategy[Any]:
    return usually(some(id=mostly(number), name=mostly(name, "ignore"), supercategory=NAMES))


BOX = usually(st.lists(NUMBERS, min_size=4, max_size=4))
COCO = some(
    images=usually(st.tuples(image(1, "a.jpg"), image(2, "b.jpg"))),
    categories=usually(st.tuples(category(0, "cat"), category(7, "dog"))),
    annotations=usually(
        st.lists(
            some(image_id=mostly(1, 2), category_id=mostly(0, 7), bbox=BOX, iscrowd=mostly(0, 1)),
            max_size=5,
        )
    ),
)
LABEL = some(
    category=NAMES,
    box2d=usually(some(x1=NUMBERS, y1=NUMBERS, x2=NUMBERS, y2=NUMBERS)),
    attributes=usually(some(crowd=st.booleans())),
)
LABELS = usually(st.lists(usually(LABEL), max_size=3))
BDD = st.one_of(
    st.lists(
        usually(some(name=mostly("a.jpg", "b"), labels=LABELS, timestamp=st.just(0))), max_size=3
    ),
    some(name=NAMES, frames=st.lists(some(objects=LABELS), max_size=2)),
)
ROWS = st.lists(st.lists(SCALARS, max_size=9), max_size=6)


def coco_file(root: Path, content: Any, text: str) -> None:
    (root / "boxes.json").write_text(json.dumps(content))


def bdd_file(root: Path, content: Any, text: str) -> None:
    (root / "labels.json").write_text(json.dumps(content))


def voc_file(root: Path, content: Any, text: str) -> None:
    rows = [[*map(str, row), *["1"] * 5][:5] for row in content]
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
        f"<ymax>{d}</ymax></bndbox></object>"
        for name, a, b, c, d in rows
    )
    whole = voc_text("a.jpg", []).replace("</annotation>", objects + "</annotation>")
    (root / "a.xml").write_text(voc_text("b.jpg", [("cat", 1, 1, 9, 9)]))
    (root / "b.xml").write_bytes(whole.encode("utf-8", "replace"))


def yolo_file(root: Path, content: Any, text: str) -> None:
    rows = "\n".join(" ".join(map(str, row)) for row in content)
    (root / "a.txt").write_bytes(rows.encode("utf-8", "replace"))
    (root / "b.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    about = f"train: .\nnames: {text}\n" if len(text) % 2 else "train: .\nnames: [cat, dog]\n"
    (root / "data.yaml").write_bytes(about.encode("utf-8", "replace"))


def csv_file(root: Path, content: Any, text: str) -> None:
    rows = "\n".join(",".join(["a.jpg", *map(str, row)]) for row in content)
    head = "image_path,xmin,ymin,xmax,ymax,label\n"
    (root / "boxes.csv").write_bytes((head + rows).encode("utf-8", "replace"))


FILES: dict[str, tuple[Callable[[Path, Any, str], None], st.SearchStrategy[Any]]] = {
    "coco": (coco_file, COCO),
    "bdd": (bdd_file, BDD),
    "voc": (voc_file, ROWS),
    "yolo": (yolo_file, ROWS),
    "csv": (csv_file, ROWS),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    picture(root / "a.jpg")
    picture(root / "b.jpg", orientation=6)
    return root


def opened(root: Path) -> BoxedSource | None:
    """The data, looked at through and through; None where it is refused."""
    has_boxes(root)
    try:
        source = BoxedSource(root)
    except (DataError, UsageError) as error:
        str(error).encode()
        return None
    for sentence in (*source.notes, *(one.sentence() for one in source.left_out)):
        sentence.encode()
    check_boxes(source)
    for i in range(len(source)):
        said = source.targets.target(i, None)
        height, width = said["size"]
        assert (said["boxes"][:, 2:] > said["boxes"][:, :2] - 1e-3).all()
        assert (said["boxes"] >= 0).all()
        assert (said["boxes"] <= [width, height, width, height]).all()
        assert (said["labels"] < len(source.targets.names)).all()
        assert ((said["labels"] >= 0) | said["ignored"].astype(bool)).all()
        source.targets.text(i).encode()
    return source


def many(name: str, root: Path, count: int) -> int:
    """How many of `count` generated files were taken."""
    write, contents = FILES[name]
    taken = 0

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(contents, st.text(max_size=12))
    def run(content: Any, text: str) -> None:
        nonlocal taken
        for file in root.iterdir():
            if file.suffix != ".jpg":
                file.unlink()
        try:
            write(root, content, text)
        except ValueError:  # an integer that Python does not write
            return
        taken += opened(root) is not None

    run()
    return taken


@pytest.mark.parametrize("name", FILES)
def test_generated_files_are_taken_or_refused(name: str, place: Path) -> None:
    assert many(name, place, 40) > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_hundred_thousand_generated_files(name: str, place: Path) -> None:
    assert many(name, place, 20_000) > 2_000


def harmed(root: Path, draw: random.Random) -> None:
    """A file of annotations with some bytes cut, doubled or changed."""
    files = [file for file in root.rglob("*") if file.is_file() and file.suffix != ".jpg"]
    file = draw.choice(sorted(files))
    content = bytearray(file.read_bytes())
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        match draw.randrange(4):
            case 0:
                del content[at:]
            case 1:
                content[at:at] = content[at // 2 : at]
            case 2:
                content[at : at + 1] = bytes([draw.randrange(256)])
            case 3:
                del content[at : at + draw.randint(1, 30)]
    file.write_bytes(content)


@pytest.mark.parametrize("name", FORMATS)
def test_harmed_files_are_taken_or_refused(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / "whole")
    draw = random.Random(name)
    for number in range(8):
        shutil.copytree(tmp_path / "whole", place := tmp_path / str(number))
        harmed(place, draw)
        before = contents(place)
        opened(place)
        assert contents(place) == before
