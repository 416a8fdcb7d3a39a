"""Images with boxes, in every format that people have them in."""

import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.boxed import FORMATS, HEIGHT, TRUTH, WIDTH, Box, coco, picture, voc_text, write_coco
from vitrail.cli import main
from vitrail.data.check_boxes import check_boxes
from vitrail.data.sources.boxed import BoxedSource, has_boxes
from vitrail.data.sources.layout import FolderRules
from vitrail.data.sources.write_boxes import write_boxes
from vitrail.data.split import open_data, open_splits, task_of
from vitrail.data.targets import ANY, Boxes
from vitrail.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path_factory.mktemp("cache")))


def boxes_of(source: BoxedSource, i: int) -> list[Box]:
    said = source.targets.target(i, None)
    rows = zip(said["boxes"].tolist(), said["labels"].tolist(), strict=True)
    return sorted((source.targets.names[label], *corners) for corners, label in rows)


def found(source: BoxedSource) -> dict[str, list[Box]]:
    """By part and name without ending."""
    parts = ("train", "val", "test")
    return {
        f"{parts[source.part[i]]}/{Path(source.key(i)).stem.split('_')[-1]}": boxes_of(source, i)
        for i in range(len(source))
    }


def left(source: BoxedSource) -> dict[str, int]:
    count: Counter[str] = Counter()
    for one in source.left_out:
        count[one.kind] += one.count
    return dict(count)


def noted(source: BoxedSource, part: str) -> str:
    (sentence,) = (note for note in source.notes if part in note)
    return sentence


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_the_same(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path)
    assert has_boxes(tmp_path)
    assert task_of(str(tmp_path)) == "detect"
    source = BoxedSource(tmp_path)
    expected = {key: sorted(boxes) for key, boxes in TRUTH.items()}
    assert found(source) == {
        key: [(of, *map(pytest.approx, corners)) for of, *corners in boxes]
        for key, boxes in expected.items()
    }
    assert "images without an object, which show what is none: 1" in source.notes
    assert not set(left(source)) - {"labels without a box"}
    assert pickle.loads(pickle.dumps(source)).targets.text(0) == "cat 1|dog 1"
    if "bdd" not in name:
        assert source.targets.names == ("cat", "dog")
    splits = open_splits(tmp_path, seed=0, targets=Boxes)
    assert (len(splits.train), len(splits.val)) == (2, 1)


@pytest.mark.parametrize("name", ["roboflow", "yolo", "voc", "table"])
def test_a_json_file_of_something_else_is_passed_over(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path)
    before = found(BoxedSource(tmp_path))
    (tmp_path / "meta.json").write_text('{"images": 5000, "annotations": "by hand"}')
    if name != "roboflow":
        captions = [{"image_id": 0, "caption": "a cat"}]
        write_coco(tmp_path / "captions.json", {"a.jpg": []}, annotations=captions)
    assert has_boxes(tmp_path)
    source = BoxedSource(tmp_path)
    assert found(source) == before
    told = [*source.notes, *(one.sentence() for one in source.left_out)]
    assert any("passed over" in each or "meta.json" in each for each in told)


def one(root: Path, boxes: list[Box] | None = None, **more: object) -> BoxedSource:
    """A COCO file of one image, a.jpg."""
    picture(root / "a.jpg")
    write_coco(root / "boxes.json", {"a.jpg": [("cat", 1, 2, 30, 40)] if boxes is None else boxes})
    if more:
        content = json.loads((root / "boxes.json").read_text())
        (root / "boxes.json").write_text(json.dumps(content | more))
    return BoxedSource(root)


GOOD = {"image_id": 10, "category_id": 3, "bbox": [1, 2, 3, 4]}
FAULTS = {
    "boxes without an area": [{**GOOD, "bbox": [5, 5, 0, 9]}, {**GOOD, "bbox": [9, 9, -4, 2]}],
    "boxes with corners that are no numbers": [{**GOOD, "bbox": [float("nan"), 0, 1, 1]}],
    "boxes far beyond any image": [{**GOOD, "bbox": [0, 0, 1e300, 5]}],
    "boxes outside their image": [{**GOOD, "bbox": [64, 3, 9, 9]}, {**GOOD, "bbox": [-9, 3, 9, 9]}],
    "boxes that are told twice": [GOOD],
    "annotations": [
        {**GOOD, "image_id": 99},
        {**GOOD, "category_id": 99},
        {**GOOD, "bbox": [1, 2, 3]},
        {**GOOD, "bbox": "none"},
        {**GOOD, "bbox": [10**400, 0, 1, 1]},
        {"image_id": 10, "category_id": 3},
        {**GOOD, "category_id": {}},
        None,
        7,
    ],
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_cannot_be_a_box_is_left_out_and_counted(kind: str, tmp_path: Path) -> None:
    source = one(tmp_path, annotations=[GOOD, *FAULTS[kind]])
    assert boxes_of(source, 0) == [("cat", 1, 2, 4, 6)]
    assert left(source) == {kind: len(FAULTS[kind])}


def test_boxes_are_cut_at_the_edge_and_their_share_is_told(tmp_path: Path) -> None:
    source = one(tmp_path, [("cat", -9, -1, 20, 30), ("dog", 40, 40, 64.5, 48)])
    assert boxes_of(source, 0) == [("cat", 0, 0, 20, 30), ("dog", 40, 40, 64, 48)]
    assert noted(source, "cut there").endswith(": 1 of 2 (50.00%)")
    (finding,) = (f for f in check_boxes(source).findings if f.name == "boxes beyond their image")
    assert "so many are no slips" in finding.sentence


def test_crowds_and_regions_are_ignored(tmp_path: Path) -> None:
    source = one(
        tmp_path,
        annotations=[
            GOOD,
            {**GOOD, "bbox": [9, 9, 9, 9], "iscrowd": 1},
            {**GOOD, "category_id": 8},
        ],
        categories=[{"id": 3, "name": "cat"}, {"id": 8, "name": "Ignore"}],
    )
    said = source.targets.of(0)
    assert (said.labels.tolist(), said.ignored.tolist()) == ([0, 0, ANY], [False, True, True])
    assert source.targets.names == ("cat",)
    assert "objects and regions that are ignored: 2" in source.notes


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"images": [', "no COCO file that can be read"),
        ('{"images": ' + "[" * 100_000, "nested too deeply"),
        ('{"images": [{"id": 1}, {"id": 1}], "categories": [], "annotations": []}', "one id"),
        ('{"images": [], "annotations": []}', "does not list images and categories"),
        (
            '{"images": [], "categories": [{"id": 1, "name": "a"}], "annotations": []}',
            "none of the",
        ),
        ('{"images": 7, "annotations": {"bbox": [1]}}', "no COCO file"),
    ],
)
def test_a_damaged_file_is_one_message(content: str, said: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(DataError, match=said):
        open_data(tmp_path, targets=Boxes)


def test_images_that_nobody_annotated_and_annotations_of_none(tmp_path: Path) -> None:
    picture(tmp_path / "b.jpg")
    picture(tmp_path / "a.jpg")
    named = {"a.jpg": [], "gone.jpg": [("cat", 1, 1, 9, 9)], "../../etc/x.jpg": []}
    write_coco(tmp_path / "boxes.json", named)
    source = BoxedSource(tmp_path)
    assert [source.key(i) for i in range(len(source))] == ["a.jpg"]
    assert left(source) == {
        "images that are named and not there": 1,
        "images outside the folder": 1,
        "annotations": 1,
        "images without boxes or a word that they have none": 1,
    }
    with pytest.raises(DataError, match="has an object that counts"):
        open_splits(tmp_path, seed=0, targets=Boxes)


TURNED = {2: (44, 2, 63, 10), 3: (44, 38, 63, 46), 6: (38, 1, 46, 20), 8: (2, 44, 10, 63)}


@pytest.mark.parametrize("orientation", [6, 8])
def test_boxes_drawn_on_what_is_stored_are_turned_with_it(orientation: int, tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", orientation=orientation)
    write_coco(tmp_path / "boxes.json", {"a.jpg": [("cat", 1, 2, 20, 10)]})
    source = BoxedSource(tmp_path)
    assert source.load(0).size == (HEIGHT, WIDTH)
    assert source.targets.size(0) == (WIDTH, HEIGHT)
    (_, *corners) = boxes_of(source, 0)[0]
    assert corners == pytest.approx(TURNED[orientation])
    assert noted(source, "turned with them").endswith("1 of 1: a.jpg")
    # The pixels under the box are the same ones.
    stored = np.asarray(Image.open(tmp_path / "a.jpg"))[2:10, 1:20]
    left_, top, right, bottom = (round(side) for side in corners)
    shown = np.asarray(source.load(0))[top:bottom, left_:right]
    turned = {6: np.rot90(stored, -1), 8: np.rot90(stored)}[orientation]
    assert np.array_equal(turned, shown)


def test_boxes_drawn_on_what_is_shown_stay(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", (HEIGHT, WIDTH), orientation=6)
    write_coco(tmp_path / "boxes.json", {"a.jpg": [("cat", 1, 2, 60, 10)]})
    source = BoxedSource(tmp_path)
    assert boxes_of(source, 0) == [("cat", 1, 2, 60, 10)]
    assert not any("EXIF" in note for note in source.notes)


def test_where_no_size_tells_the_boxes_of_a_table_do(tmp_path: Path) -> None:
    """Of a.jpg they fit what is stored alone; b.jpg, upside down, goes with it."""
    picture(tmp_path / "a.jpg", orientation=6)
    picture(tmp_path / "b.jpg", orientation=3)
    (tmp_path / "boxes.csv").write_text(
        "filename,xmin,ymin,xmax,ymax,class\na.jpg,1,2,20,10,x\na.jpg,50,2,63,9,x\n"
        "b.jpg,1,2,20,10,x\n"
    )
    source = BoxedSource(tmp_path)
    assert ("x", *TURNED[6]) in [(n, *np.round(c)) for n, *c in boxes_of(source, 0)]
    assert [("x", *TURNED[3])] == [(n, *np.round(c)) for n, *c in boxes_of(source, 1)]


def test_a_copy_of_another_size_and_an_image_of_another_shape(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", (2 * WIDTH, 2 * HEIGHT))
    picture(tmp_path / "b.jpg", (WIDTH, WIDTH))
    cat: list[Box] = [("cat", 1, 2, 20, 10)]
    write_coco(tmp_path / "boxes.json", {"a.jpg": cat, "b.jpg": cat})
    source = BoxedSource(tmp_path)
    assert [boxes_of(source, 0), len(source)] == [[("cat", 2, 4, 40, 20)], 1]
    assert left(source) == {"images of another shape than their boxes' file says": 1}
    assert check_boxes(source).unusable == 1


def test_an_image_that_nobody_can_read_is_neither_scaled_nor_a_negative(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8\xff cut")
    cat: list[Box] = [("cat", 1, 2, 20, 10)]
    write_coco(tmp_path / "boxes.json", {"a.jpg": cat, "b.jpg": cat * 2})
    source = BoxedSource(tmp_path)
    assert not source.targets.empty()
    assert not any("scaled" in note or "none" in note for note in source.notes)
    assert (left(source), source.told) == ({"boxes of images that cannot be read": 2}, 3)


def test_outlines_are_masks_unless_boxes_are_asked_for(tmp_path: Path) -> None:
    outline = {**GOOD, "segmentation": [[1, 1, 9, 1, 9, 9]]}
    one(tmp_path, annotations=[outline])
    assert task_of(str(tmp_path)) == "segment"
    assert not has_boxes(tmp_path)
    assert open_data(tmp_path, targets=Boxes).targets.text(0) == "cat 1"


@pytest.mark.parametrize("first", [0, 1])
def test_where_vocs_coordinates_begin_is_decided_of_the_whole_set(
    first: int, tmp_path: Path
) -> None:
    for name, left_ in (("a", 0), ("b", 5)):
        picture(tmp_path / f"{name}.png")
        text = voc_text(f"{name}.png", [("cat", left_, 9, 20, 30)], first=first)
        (tmp_path / f"{name}.xml").write_text(text)
    source = BoxedSource(tmp_path)
    assert [boxes_of(source, i)[0][1] for i in range(2)] == [0, 5]
    assert noted(source, f"begin at {first}")


@pytest.mark.parametrize(
    ("lefts", "first"),
    [
        ([-3, 7, 9], 1),  # a slip, which says nothing
        ([0, 1, 1, 1, 1, 1, 9], 1),
        ([-2, 0, 1, 1, 9], 0),
        ([-1, -1, -1, 9], 0),  # where 1 was taken away before
        ([5, 0], 0),
    ],
)
def test_a_slip_does_not_shift_vocs_boxes(lefts: list[float], first: int, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    boxes: list[Box] = [("cat", left_, 9 + k, 20, 30) for k, left_ in enumerate(lefts)]
    (tmp_path / "a.xml").write_text(voc_text("a.png", boxes, first=0))
    source = BoxedSource(tmp_path)
    assert max(box[1] for box in boxes_of(source, 0)) == max(lefts) - first
    assert noted(source, f"begin at {first}")


def test_difficult_objects_parts_of_objects_and_odd_names_of_voc(tmp_path: Path) -> None:
    for name in ("a.png", "a.tif", "b.png"):
        picture(tmp_path / name)
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    more = f"<difficult>1</difficult>{part}"
    text = voc_text("a.tif", [("cat", 5, 5, 20, 30)], object=more)
    (tmp_path / "a.xml").write_text(text)
    (tmp_path / "b.xml").write_text(voc_text("other.png", [("dog", 5, 5, 20, 30)]))
    source = BoxedSource(tmp_path)
    assert [source.key(i) for i in range(2)] == ["a.tif", "b.png"]
    assert source.targets.of(0).ignored.tolist() == [True]
    assert noted(source, "called like the file").startswith("1 files name an image")


@pytest.mark.parametrize(
    "text",
    [
        '<!DOCTYPE a [<!ENTITY b "c">]><annotation><filename>&b;</filename></annotation>',
        "<annotation><object>",
        "<annotation>" + "<a>" * 999,
        "<svg></svg>",
        '<?xml version="1.0" encoding="xxx"?><annotation></annotation>',
        "",
    ],
)
def test_xml_that_is_none_of_vocs_is_left_out(text: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "a.xml").write_text(voc_text("a.png", [("cat", 5, 5, 20, 30)]))
    (tmp_path / "b.xml").write_text(text)
    source = BoxedSource(tmp_path)
    assert left(source)["files that are no annotation of VOC's"] == 1
    assert len(source) == 1


def test_polygons_pixels_and_unknown_classes_of_yolo(tmp_path: Path) -> None:
    picture(tmp_path / "images/train/a.jpg")
    rows = (
        *("0 0.5 0.5 0.5 0.5", "1 0.25 0.25 0.75 0.25 0.5 0.75", "7 0.5 0.5 0.1 0.1"),
        *("0 320 240 90 90", "0 0.5 0.5", "0 x y z w", "nan 0.5 0.5 0.1 0.1", "0 0.5 0.5 0.5 0.5"),
    )
    (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / "labels/train/a.txt").write_text("\n".join(rows))
    (tmp_path / "labels/train/z.txt").write_text("")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images/train\nnames: {0: cat, 1: dog}")
    source = BoxedSource(tmp_path)
    assert boxes_of(source, 0) == [("cat", 16, 12, 48, 36), ("dog", 16, 12, 48, 36)]
    assert noted(source, "polygons").endswith("1")
    assert left(source) == {
        "rows": 3,
        "rows of classes that no name is for": 1,
        "boxes outside their image": 1,
        "boxes that are told twice": 1,
        "texts of labels without an image": 1,
    }


_MERGES = "".join(f"k{k}: &k{k} {{<<: [{', '.join([f'*k{k - 1}'] * 10)}]}}\n" for k in range(1, 9))


@pytest.mark.parametrize(
    "text",
    [
        "names: !!python/object:os.system x\ntrain: a",
        "names: [\ntrain: a",
        'nc: !!int ""\ntrain: a',
        "nc: !!bool q\ntrain: a",
        "nc: !!timestamp q\ntrain: a",
        f"nc: !!float 1{':1' * 500}\ntrain: a",
        f"k0: &k0 {{a: b}}\n{_MERGES}nc: 2\ntrain: a",
    ],
)
def test_a_yaml_that_is_none_is_one_message(text: str, tmp_path: Path) -> None:
    picture(tmp_path / "images/a.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=r"data\.yaml"):
        BoxedSource(tmp_path)


_LISTS = "".join(f"k{k}: &k{k} [{', '.join([f'*k{k - 1}'] * 10)}]\n" for k in range(1, 10))


@pytest.mark.parametrize(
    "text",
    [
        f"k0: &k0 [a]\n{_LISTS}train: [*k9]",
        f"path: 0x{'f' * 4000}\ntrain: images",
        "train: &a [*a]",
    ],
)
def test_places_of_yolos_that_are_no_text_are_told(text: str, tmp_path: Path) -> None:
    picture(tmp_path / "images/train/a.jpg")
    (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / "labels/train/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "data.yaml").write_text(f"{text}\nnames: [cat]")
    source = BoxedSource(tmp_path)
    assert source.targets.text(0) == "cat 1"
    assert noted(source, "no text").startswith("data.yaml names places")


def test_rows_without_an_image_and_rows_of_several_parts_are_counted(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / name)
    (tmp_path / "boxes.csv").write_text(
        "filename,xmin,ymin,xmax,ymax,class,split\n,1,2,3,4,x,val\n,1,2,3,4,x,val\n"
        "a.jpg,1,2,20,10,x,val\na.jpg,3,2,20,10,x,train\nb.jpg,3,2,20,10,x,train\n"
    )
    source = BoxedSource(tmp_path)
    assert left(source) == {"rows without an image": 2}
    assert source.part.tolist() == [0, 1]
    assert noted(source, "several parts").endswith("the first is taken: 1: a.jpg")


def test_a_class_of_thousands_of_digits_is_a_name(tmp_path: Path) -> None:
    long = "7" * 5000
    (tmp_path / "boxes.csv").write_text(
        f"filename,xmin,ymin,xmax,ymax,class\na.jpg,1,2,20,10,{long}\na.jpg,3,2,20,10,8\n"
    )
    picture(tmp_path / "a.jpg")
    assert BoxedSource(tmp_path).targets.names == (long, "8")


def test_bdds_names_regions_and_crowds(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    box = {"x1": 1, "y1": 2, "x2": 30, "y2": 40}
    labels = [
        {"category": "person", "box2d": box},
        {"category": "car", "box2d": box, "attributes": {"crowd": True}},
        {"category": "other vehicle", "box2d": box},
    ]
    frames = [{"name": "a.jpg", "timestamp": 1, "labels": labels}]
    (tmp_path / "det_train.json").write_text(json.dumps(frames))
    said = BoxedSource(tmp_path).targets.of(0)
    assert (said.labels.tolist(), said.ignored.tolist()) == ([0, 2, ANY], [False, True, True])


@pytest.mark.parametrize("first", ["coco", "yolo", "voc"])
def test_boxes_survive_every_format(first: str, tmp_path: Path) -> None:
    """coco -> yolo -> voc -> coco, from each of them, within a thousandth of a pixel."""
    FORMATS["coco"](tmp_path / "data")
    file = tmp_path / "data/annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"].append({**GOOD, "bbox": [3, 3, 9.123456, 9], "iscrowd": 1})
    file.write_text(json.dumps(content))
    before = source = BoxedSource(tmp_path / "data")
    order = ["coco", "yolo", "voc"]
    place = order.index(first)
    flags = True
    for to in [*order[place:], *order[: place + 1]]:
        out = tmp_path / f"{to}{len(list(tmp_path.iterdir()))}"
        written = write_boxes(source, out, to=to)
        flags &= to != "yolo"
        assert bool(written.notes) == (to == "yolo" and source.targets.of(0).ignored.any())
        source = BoxedSource(out)
        assert not source.left_out
        assert source.targets.names == before.targets.names
        for i in range(len(before)):
            old, new = before.targets.of(i), source.targets.of(i)
            kept = np.ones(len(old.labels), bool) if flags else ~old.ignored
            for a, b in zip(old, new, strict=True):
                assert np.allclose(a[kept], b, rtol=0, atol=1e-3 / WIDTH)
            assert source.encoded(i).read_bytes() == before.encoded(i).read_bytes()
        assert source.part.tolist() == before.part.tolist()


def test_boxes_of_less_than_a_pixel_are_no_inverted_ones_of_voc(tmp_path: Path) -> None:
    thin: list[Box] = [
        *(("cat", 10.2, 5.3, 10.7, 9), ("cat", 0, 0, 0.7, 0.2), ("dog", 63.5, 47.6, 64, 48)),
        ("dog", 3, 3, 4, 4),
    ]
    source = one(tmp_path / "data", thin)
    written = write_boxes(source, tmp_path / "out", to="voc")
    assert [note.split(": ")[1] for note in written.notes] == [
        "3 boxes of less than a pixel across are written as one pixel across"
    ]
    text = (tmp_path / "out/Annotations/a.xml").read_text()
    corners = np.array(re.findall(r"<[xy]m\w+>([^<]+)", text), float).reshape(-1, 4)
    assert (corners[:, :2] >= 1).all()
    assert (corners[:, 2:] >= corners[:, :2]).all()
    assert (corners[:, 2:] <= [WIDTH, HEIGHT]).all()
    back = boxes_of(BoxedSource(tmp_path / "out"), 0)
    apart = [np.subtract(a[1:], b[1:]) for a, b in zip(sorted(thin), back, strict=True)]
    assert np.abs(apart).max() < 1
    assert np.allclose(apart[2], 0, atol=1e-5)


def test_nothing_is_written_into_the_data_or_over_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = one(tmp_path / "data")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("")
    for out in (tmp_path / "data/out", tmp_path / "full", tmp_path / "data"):
        with pytest.raises(UsageError):
            write_boxes(source, out, to="coco")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for here in (Path("."), tmp_path / "here"):
        with pytest.raises(UsageError, match="the folder that you are in"):
            write_boxes(source, here, to="coco")
    assert sorted(file.name for file in (tmp_path / "data").iterdir()) == ["a.jpg", "boxes.json"]


def test_a_million_boxes_in_a_file(tmp_path: Path) -> None:
    """Twenty thousand here, which take as long each."""
    rows = np.random.default_rng(0).uniform(0, 30, (20_000, 4)).round(3)
    annotations = [{**GOOD, "bbox": row} for row in rows.tolist()]
    source = one(tmp_path, annotations=annotations)
    assert source.targets.most > 19_000


def test_boxes_behind_a_mib_of_images_and_before_one_of_annotations_are_seen(
    tmp_path: Path,
) -> None:
    """As in COCO's own files of a hundred thousand images, and in ours."""
    picture(tmp_path / "a.jpg")
    more = [{"id": 99 + k, "file_name": f"{k:0150}.jpg"} for k in range(9000)]
    image = {"id": 10, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT}
    boxes = [GOOD] * 30_000
    outlines = [{"image_id": 1, "segmentation": [[1, 2, 3, 4, 5, 6]]}] * 20_000
    content = {"images": [image, *more], "annotations": boxes}
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps({**content, "categories": [{"id": 3, "name": "cat"}]}))
    assert has_boxes(tmp_path)
    assert has_boxes(file)
    assert task_of(str(file)) == "detect"
    assert BoxedSource(file).targets.text(0) == "cat 1"
    for other in (
        {**content, "annotations": [{"image_id": 1, "segments_info": [GOOD]}]},
        {**content, "annotations": outlines},
        boxes,  # somebody's answers
        {"images": 9000, "boxes": boxes},
    ):
        file.write_text(json.dumps(other))
        assert not has_boxes(file)


def test_coco_itself(tmp_path: Path) -> None:
    coco(tmp_path)
    assert set(TRUTH) == set(found(BoxedSource(tmp_path / "annotations/instances_train.json"))) | {
        "val/c"
    }


def test_the_command_line_checks_and_converts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one(tmp_path / "data", [("cat", -9, 2, 30, 40), ("dog", 5, 5, 5, 9)])
    assert main(["data", "check", str(tmp_path / "data"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["box_counts"]["objects"] == 1
    assert [each["name"] for each in found["boxes"]] == [
        "boxes without an area",
        "boxes beyond their image",
        "classes without an object",
    ]
    out = tmp_path / "out"
    assert main(["data", "convert", str(tmp_path / "data"), "--to", "voc", str(out)]) == 0
    told = capsys.readouterr().out
    assert "left out: boxes without an area, 1" in told
    assert boxes_of(BoxedSource(out), 0) == [("cat", 0, 2, 30, 40)]
    assert main(["data", "convert", str(tmp_path / "data"), "--to", "pdf", str(out)]) == 2


def test_bdds_file_two_levels_below_its_images(tmp_path: Path) -> None:
    FORMATS["bdd_2020"](tmp_path)
    file = tmp_path / "labels/det_20/det_train.json"
    assert has_boxes(file)
    assert set(found(BoxedSource(file))) == {"train/a", "train/b"}
    with pytest.raises(DataError, match=r"none of the 0 images .* Name the one above, with both"):
        BoxedSource(file.parent)


def test_a_file_means_the_image_of_its_own_sequence(tmp_path: Path) -> None:
    for sequence, right in (("seq_1", 20), ("seq_2", 30)):
        picture(tmp_path / sequence / "JPEGImages/0001.jpg")
        (tmp_path / sequence / "Annotations").mkdir()
        file = tmp_path / sequence / "Annotations/0001.xml"
        file.write_text(voc_text("0001.jpg", [("cat", 1, 2, right, 40)]))
    source = BoxedSource(tmp_path)
    assert [boxes_of(source, i)[0][3] for i in range(2)] == [20, 30]


def test_annotations_are_seen_wherever_a_folder_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last of thousands of files, or in the last of many folders."""
    scandir = os.scandir

    @contextmanager
    def listed(place: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        with scandir(place) as entries:
            first = (".jpg", "f")
            yield iter(sorted(entries, key=lambda entry: not entry.name.endswith(first)))

    for k in range(5000):
        (tmp_path / f"flat/{k}.jpg").parent.mkdir(exist_ok=True)
        (tmp_path / f"flat/{k}.jpg").touch()
    head = "image_path,xmin,ymin,xmax,ymax,label"
    (tmp_path / "flat/boxes.csv").write_text(f"{head}\n1.jpg,1,2,3,4,cat\n")
    for k in range(70):
        (tmp_path / f"deep/{k}f").mkdir(parents=True)
    (tmp_path / "deep/labels/train").mkdir(parents=True)
    (tmp_path / "deep/labels/train/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    monkeypatch.setattr(os, "scandir", listed)
    assert has_boxes(tmp_path / "flat")
    assert has_boxes(tmp_path / "deep")


@pytest.mark.parametrize("inside", [True, False])
def test_labels_in_a_linked_folder_are_read_as_its_images_are(inside: bool, tmp_path: Path) -> None:
    root, kept = tmp_path / "data", tmp_path / ("data/kept" if inside else "kept")
    picture(kept / "images/a.jpg")
    (kept / "labels").mkdir()
    (kept / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (kept / "circle").symlink_to(kept)
    (kept / "labels/loop.txt").symlink_to(kept / "labels/loop.txt")
    picture(root / "val/images/b.jpg")
    (root / "val/labels").mkdir()
    (root / "val/labels/b.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "train").symlink_to(kept)
    source = BoxedSource(root, FolderRules(follow_links=not inside))
    linked = [source.key(i) for i in range(len(source))].index("train/images/a.jpg")
    assert source.targets.text(linked) == "0 1"
    assert not source.targets.empty()


def test_folders_of_classes_have_no_boxes(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        picture(tmp_path / f"train/{name}/a.jpg")
    (tmp_path / "labels.csv").write_text("file,label\ntrain/cat/a.jpg,cat")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "README.txt").write_text("5 pictures of 2 kinds\n")
    (tmp_path / "about.json").write_text('{"frames": []}')
    assert not has_boxes(tmp_path)
    assert task_of(str(tmp_path)) == "classify"


def test_boxes_of_an_image_that_is_not_there_go_to_no_other(tmp_path: Path) -> None:
    """Whatever the format, whichever of both is named first, and wherever the names are from."""
    boxes: dict[str, list[Box]] = {
        "cam0/001.jpg": [("cat", 1, 2, 20, 10)],
        "cam1/001.jpg": [("dog", 5, 6, 25, 36)],
    }
    for at in ("", "/data/set/", "C:\\set\\"):
        for to in ("csv", "coco"):
            for names in (["cam0/001.jpg", "cam1/001.jpg"], ["cam1/001.jpg", "cam0/001.jpg"]):
                root = tmp_path / f"{len(list(tmp_path.iterdir()))}"
                picture(root / "cam1/001.jpg")
                named = {at + name: boxes[name] for name in names}
                if to == "coco":
                    write_coco(root / "boxes.json", named)
                else:
                    rows = [f"{name},1,1,9,9,{of[0][0]}\n" for name, of in named.items()]
                    head = "image_path,xmin,ymin,xmax,ymax,label\n"
                    (root / "boxes.csv").write_text(head + "".join(rows))
                source = BoxedSource(root)
                assert [of for of, *_ in boxes_of(source, 0)] == ["dog"]
                gone = ("images that are named and not there", "images outside the folder")
                assert sum(left(source).get(kind, 0) for kind in gone) == 1
    for part in ("seq01", "seq02"):
        file = tmp_path / f"voc/{part}/Annotations/1.xml"
        file.parent.mkdir(parents=True)
        file.write_text(voc_text("1.jpg", boxes[f"cam{part[-1] == '2':d}/001.jpg"]))
    picture(tmp_path / "voc/seq02/JPEGImages/1.jpg")
    source = BoxedSource(tmp_path / "voc")
    assert [of for of, *_ in boxes_of(source, 0)] == ["dog"]
    assert left(source) == {"images that are named and not there": 1}
    picture(tmp_path / "moved/train/1.jpg")
    text = voc_text("pictures_of_may/1.jpg", boxes["cam1/001.jpg"])
    (tmp_path / "moved/train/1.xml").write_text(text)
    assert len(BoxedSource(tmp_path / "moved")) == 1


@pytest.mark.parametrize(
    ("called", "path"),
    [
        ("C:\\data\\set\\img\\1.jpg", "img/1.jpg"),
        ("C:\\data\\set\\img\\1.jpg", "train/img/1.jpg"),
        ("/home/x/set/img/1.jpg", "img/1.jpg"),
        ("/home/x/photos/1.jpg", "train/1.jpg"),
        ("images/1.jpg", "1.jpg"),
        ("images/1.jpg", "train/1.jpg"),
        ("cam0/1.jpg", "1.jpg"),
        ("Cam0/1.jpg", "cam0/images/1.jpg"),
    ],
)
def test_names_of_another_machine_find_their_images(called: str, path: str, tmp_path: Path) -> None:
    picture(tmp_path / path)
    picture(tmp_path / "img/2.jpg")
    head = "image_path,xmin,ymin,xmax,ymax,label\n"
    (tmp_path / "boxes.csv").write_text(f"{head}{called},1,1,9,9,cat\nimg/2.jpg,1,1,9,9,cat\n")
    source = BoxedSource(tmp_path)
    assert {source.key(i) for i in range(len(source))} == {path, "img/2.jpg"}
    assert not source.left_out


def test_two_names_are_never_one_image_unsaid(tmp_path: Path) -> None:
    """Of a flat folder, whose table has folders."""
    picture(tmp_path / "1.jpg")
    head = "image_path,xmin,ymin,xmax,ymax,label\n"
    rows = "cam0/1.jpg,1,1,9,9,cat\ncam1/1.jpg,2,2,9,9,dog\ncam0/1.jpg,3,3,9,9,cat\n"
    (tmp_path / "boxes.csv").write_text(head + rows)
    source = BoxedSource(tmp_path)
    assert boxes_of(source, 0) == [("cat", 1, 1, 9, 9), ("cat", 3, 3, 9, 9)]
    assert left(source) == {"names of images that are not there, or named twice": 1}


@pytest.mark.parametrize(
    ("row", "last", "kinds"),
    [
        ("0.5,0.5,,0.75", None, {"boxes with corners that are no numbers": 1}),
        ("-0.001,0.25,0.5,1.0000000000000002", (0, 12, 32, 48), {}),
        ("320,200,400,300", None, {"boxes outside their image": 1}),
    ],
)
def test_one_odd_row_makes_no_pixels_of_shares(
    row: str, last: tuple[float, ...] | None, kinds: dict[str, int], tmp_path: Path
) -> None:
    """Of Open Images' corners in 0..1."""
    picture(tmp_path / "a.jpg")
    good = [f"a.jpg,0.25,0.25,0.75,0.{k},cat\n" for k in range(50, 60)]
    head = "ImageID,XMin,YMin,XMax,YMax,LabelName\n"
    (tmp_path / "boxes.csv").write_text(head + "".join(good) + f"a.jpg,{row},dog\n")
    source = BoxedSource(tmp_path)
    cats = [corners for name, *corners in boxes_of(source, 0) if name == "cat"]
    assert np.allclose(cats[0], [16, 12, 48, 24])
    dogs = [corners for name, *corners in boxes_of(source, 0) if name == "dog"]
    assert dogs == ([pytest.approx(last)] if last else [])
    assert left(source) == kinds
    assert ("but those of 1 of 11 boxes" in noted(source, "corners")) == ("320" in row)


def test_boxes_of_pixels_among_which_some_look_like_shares(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    rows = "a.jpg,0.2,0.2,0.9,0.9,x\na.jpg,1,2,30,40,x\na.jpg,4,4,30,40,x\n"
    (tmp_path / "boxes.csv").write_text("filename,xmin,ymin,xmax,ymax,class\n" + rows)
    source = BoxedSource(tmp_path)
    assert ("x", 1, 2, 30, 40) in boxes_of(source, 0)
    assert "of 1 of 3 boxes lie in 0..1" in noted(source, "taken as pixels")


def of_flag(root: Path, to: str, flag: object) -> None:
    """A data set of one image, and of one box that has this flag."""
    picture(root / "a.jpg")
    box = {"x1": 1, "y1": 2, "x2": 4, "y2": 6}
    row = {"category": "car", "box2d": box, "attributes": {"crowd": flag}}
    text = voc_text("a.jpg", [("cat", 1, 2, 4, 6)], object=f"<difficult>{flag}</difficult>")
    content = {
        "coco": json.dumps(
            {
                "images": [{"id": 10, "file_name": "a.jpg"}],
                "categories": [{"id": 3, "name": "cat"}],
                "annotations": [{**GOOD, "iscrowd": flag}],
            }
        ),
        "bdd": json.dumps([{"name": "a.jpg", "labels": [row]}]),
        "voc": text,
        "csv": f"filename,xmin,ymin,xmax,ymax,class,IsGroupOf\na.jpg,1,2,4,6,x,{flag}\n",
    }[to]
    ending = {"voc": "xml", "csv": "csv"}.get(to, "json")
    (root / f"a.{ending}").write_text(content)


@pytest.mark.parametrize("to", ["coco", "bdd", "voc", "csv"])
@pytest.mark.parametrize(
    ("flag", "ignored"),
    [*((f, True) for f in ("TRUE", "1.0", 1, True)), *((f, False) for f in ("0", "false", "", 0))],
)
def test_flags_are_read_alike_whatever_the_format(
    to: str, flag: object, ignored: bool, tmp_path: Path
) -> None:
    of_flag(tmp_path, to, flag)
    source = BoxedSource(tmp_path)
    assert source.targets.of(0).ignored.tolist() == [ignored]
    assert not source.left_out


@pytest.mark.parametrize("to", ["coco", "bdd", "voc", "csv"])
def test_what_is_no_flag_is_counted(to: str, tmp_path: Path) -> None:
    of_flag(tmp_path, to, "-1")
    source = BoxedSource(tmp_path)
    assert source.targets.of(0).ignored.tolist() == [False]
    assert left(source) == {"flags of ignored objects": 1}


def test_the_name_of_a_file_says_no_part(tmp_path: Path) -> None:
    """The folders' names do."""
    cat: list[Box] = [("cat", 1, 2, 20, 10)]
    names = ("crash_test_001.jpg", "val/train_7.jpg")
    for name in names:
        picture(tmp_path / name)
    write_coco(tmp_path / "boxes.json", dict.fromkeys(names, cat))
    source = BoxedSource(tmp_path)
    assert [source.key(i) for i in range(2)] == [*names]
    assert source.part.tolist() == [0, 1]


def test_lists_of_voc_whose_names_have_blanks(tmp_path: Path) -> None:
    for name in ("photo", "photo (2)", "other", "flagged", "twice"):
        picture(tmp_path / f"JPEGImages/{name}.jpg")
        file = tmp_path / f"Annotations/{name}.xml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(voc_text(f"{name}.jpg", [("cat", 1, 2, 20, 10)]))
    lists = tmp_path / "ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("photo\nflagged  1\ntwice\n")
    (lists / "val.txt").write_text("photo (2)\nother 3\nother\ntwice\n")
    (lists / "trainval.txt").write_text("photo\nphoto (2)\nother\n")
    source = BoxedSource(tmp_path)
    parts = {Path(source.key(i)).stem: int(source.part[i]) for i in range(5)}
    assert parts == {"photo": 0, "flagged": 0, "photo (2)": 1, "other": 1, "twice": 1}
    assert left(source) == {"second parts of images that two lists name": 1}


def yolo_texts(root: Path, **texts: str) -> BoxedSource:
    """Texts, by path without ending, in a data set of one class, whose images are there."""
    for path, content in texts.items():
        file = root / f"{path}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    if not (root / "data.yaml").exists():
        (root / "classes.txt").write_text("cat\n")
    return BoxedSource(root)


def counts(source: BoxedSource) -> dict[str, int]:
    return {source.key(i): len(source.targets.of(i).labels) for i in range(len(source))}


ROW = "0 0.5 0.5 0.25 0.25\n"


def test_a_text_of_several_images_of_yolo_is_told(tmp_path: Path) -> None:
    for name in ("images/cam1/1.jpg", "images/cam2/1.jpg", "a.png", "a.tif"):
        picture(tmp_path / "equal" / name)
    source = yolo_texts(tmp_path / "equal", **{"labels/1": ROW, "labels/a": ROW})
    assert set(counts(source).values()) == {1}
    assert ": 2, of 4 images: " in noted(source, "several images have")
    for name in ("images/1.jpg", "images/cam1/1.jpg", "images/cam2/1.jpg"):
        picture(tmp_path / "nearer" / name)
    texts = {"labels/1": ROW, "labels/cam2/1": 2 * ROW + "0 0.2 0.2 0.1 0.1\n"}
    source = yolo_texts(tmp_path / "nearer", **texts)
    assert counts(source) == {"images/1.jpg": 1, "images/cam1/1.jpg": 0, "images/cam2/1.jpg": 2}
    assert noted(source, "without a text").endswith("1 of 3: images/cam1/1.jpg")
    assert not any("several" in note for note in source.notes)


def test_texts_of_images_that_are_called_like_lists(tmp_path: Path) -> None:
    names = ("test", "train", "a")
    for name in names:
        picture(tmp_path / f"images/{name}.jpg")
    texts = {f"labels/{name}": ROW for name in names}
    source = yolo_texts(tmp_path, **texts, train="images/a.jpg\n", **{"labels/classes": "cat\n"})
    assert counts(source) == {f"images/{name}.jpg": 1 for name in names}
    assert not source.left_out


@pytest.mark.parametrize("each", [2, 3])
def test_of_poses_of_yolo_the_box_is_taken(each: int, tmp_path: Path) -> None:
    picture(tmp_path / "images/a.jpg")
    (tmp_path / "data.yaml").write_text(f"train: images\nnames: [cat]\nkpt_shape: [4, {each}]\n")
    pose = " ".join(["0 0.5 0.5 0.25 0.25", *["0.9"] * 4 * each])
    source = yolo_texts(tmp_path, **{"labels/a": f"{pose}\n0 0.5 0.5 0.5 0.5\n{pose} 0.1 0.1\n"})
    assert boxes_of(source, 0) == [("cat", 16, 12, 48, 36), ("cat", 24, 18, 40, 30)]
    assert noted(source, "poses").endswith(": 1")
    assert left(source) == {"rows": 1}
    (tmp_path / "data.yaml").write_text("train: images\nnames: [cat]\nkpt_shape: 17\n")
    with pytest.raises(DataError, match="kpt_shape is how many points"):
        BoxedSource(tmp_path)
