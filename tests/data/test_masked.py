"""Images with masks, in every layout that people have them in."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.data import FolderSource
from vitrail.data.pixels.decode import UnreadableImage
from vitrail.data.sources import mask_told
from vitrail.data.sources.coco_masks import read_runs
from vitrail.data.sources.layout import FolderRules
from vitrail.data.sources.mask_meaning import MaskRules
from vitrail.data.sources.mask_values import present
from vitrail.data.sources.masked import MaskedSource, has_masks
from vitrail.errors import DataError, UsageError

SIZE = (12, 16)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VITRAIL_CACHE", str(folder))
    return folder


def image(file: Path, size: tuple[int, int] = SIZE, seed: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (*size, 3)).astype(np.uint8)
    Image.fromarray(noise).save(file)


def mask(file: Path, *values: int, size: tuple[int, int] = SIZE, palette: bool = False) -> None:
    """Columns of the values in turn."""
    file.parent.mkdir(parents=True, exist_ok=True)
    deep = np.uint16 if max(values) > 255 else np.uint8
    columns = np.array(values, deep)[np.arange(size[1]) * len(values) // size[1]]
    found = Image.fromarray(np.broadcast_to(columns, size).copy())
    if palette:
        found = Image.frombytes("P", size[::-1], found.tobytes())
        found.putpalette([c for k in range(256) for c in (k, 255 - k, 7)])
    found.save(file)


def colours(file: Path, *values: tuple[int, int, int]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = np.array(values, np.uint8)[np.arange(SIZE[1]) * len(values) // SIZE[1]]
    Image.fromarray(np.broadcast_to(columns, (*SIZE, 3)).copy()).save(file)


def told(source: MaskedSource) -> tuple[str, ...]:
    return mask_told.told(source.targets, source.part)


def classes_of(source: MaskedSource, i: int = 0) -> list[int]:
    """The class indices along a mask, one a column, each once."""
    row = source.targets.target(i, None)["mask"][0].tolist()
    return [k for place, k in enumerate(row) if place == 0 or k != row[place - 1]]


LAYOUTS = {
    "parts below": (
        "images/train/a.jpg",
        "masks/train/a.png",
        "images/val/b.jpg",
        "masks/val/b.png",
    ),
    "parts above": ("train/img/a.jpg", "train/mask/a.png", "val/img/b.jpg", "val/mask/b.png"),
    "ade": (
        *("images/training/a.jpg", "annotations/training/a.png"),
        *("images/validation/b.jpg", "annotations/validation/b.png"),
    ),
    "suffix": (
        "train/images/a.jpg",
        "train/labels/a_mask.png",
        "val/images/b.jpg",
        "val/labels/b_seg.png",
    ),
    "beside": ("train/a.jpg", "train/a_mask.png", "val/b.jpg", "val/b_mask.png"),
    "camvid": ("train/a.png", "trainannot/a.png", "val/b.png", "valannot/b.png"),
    "kaggle": ("train/a.png", "train_labels/a_L.png", "val/b.png", "val_labels/b_L.png"),
    "words": (
        *("DUTS/train_images/a.jpg", "DUTS/train_masks/a.png"),
        *("DUTS/valid_images/b.jpg", "DUTS/valid_masks/b.png"),
    ),
    "supervisely": (
        *("data/train/img/a.jpg", "data/train/ann_masks/a.jpg.png"),
        *("data/val/img/b.jpg", "data/val/ann_masks/b.jpg.png"),
    ),
    "keras": (
        *("train_images/img/a.png", "train_masks/img/a.png"),
        *("val_images/img/b.png", "validation_masks/img/b.png"),
    ),
    "around all": (
        *("segmentation set/train/images/a.png", "segmentation set/train/labels/a.png"),
        *("segmentation set/val/images/b.png", "segmentation set/val/labels/b.png"),
    ),
    "bdd100k": (
        *("images/100k/train/a.jpg", "sem_seg/masks/train/a.png"),
        *("images/100k/val/b.jpg", "sem_seg/masks/val/b.png"),
    ),
    "stuff": (
        *("images/train2017/a.jpg", "stuffthingmaps/train2017/a.png"),
        *("images/val2017/b.jpg", "stuffthingmaps/val2017/b.png"),
    ),
    "deep": (
        *("leftImg8bit/train/ulm/a_leftImg8bit.png", "gt/train/ulm/a_gtFine_label.png"),
        *("leftImg8bit/val/bonn/b_leftImg8bit.png", "gt/val/bonn/b_gtFine_label.png"),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, layout: str) -> None:
    first, its_mask, second, other_mask = LAYOUTS[layout]
    image(tmp_path / first)
    image(tmp_path / second, (20, 30))
    mask(tmp_path / its_mask, 0, 1, 2)
    mask(tmp_path / other_mask, 2, 1, size=(20, 30))
    assert has_masks(tmp_path)
    source = MaskedSource(tmp_path)
    assert [source.key(0), source.key(1)] == [first, second]
    assert source.part.tolist() == [0, 1]
    assert source.targets.names == ("0", "1", "2")
    assert (classes_of(source), classes_of(source, 1)) == ([0, 1, 2], [2, 1])
    assert [source.targets.text(0), source.targets.text(1)] == [its_mask, other_mask]
    assert source.left_out == ()
    assert source.load(1).size == (30, 20)
    assert source.encoded(0) == tmp_path / first
    mixed = MaskedSource(tmp_path, FolderRules(parts="none"))
    assert mixed.part.tolist() == [0, 0]


def test_what_is_left_alone_is_told(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        image(tmp_path / f"images/{name}.jpg")
    image(tmp_path / "images/a.png")
    for name in ("a", "b", "z"):
        mask(tmp_path / f"masks/{name}.png", 0, 1)
    mask(tmp_path / "masks/b_mask_1.png", 0, 1)
    mask(tmp_path / "instances/b.png", 0, 1)
    (tmp_path / "masks/.hidden.png").write_text("")
    source = MaskedSource(tmp_path)
    assert len(source) == 2
    assert {one.kind: (one.count, one.examples) for one in source.left_out} == {
        "other annotations": (1, ("instances/b.png",)),
        "images of one name": (1, ("images/a.png",)),
        "further masks of one image": (1, ("masks/b_mask_1.png",)),
        "masks without an image": (1, ("masks/z.png",)),
        "images without a mask": (1, ("images/c.jpg",)),
        "hidden and system files": (1, ("masks/.hidden.png",)),
    }


def test_folders_that_have_only_the_names_of_files_in_common(tmp_path: Path) -> None:
    image(tmp_path / "Task1-2_Input/a.jpg")
    mask(tmp_path / "Task1_GroundTruth/a_segmentation.png", 0, 1)
    assert MaskedSource(tmp_path).targets.text(0) == "Task1_GroundTruth/a_segmentation.png"


def test_classes_that_are_called_like_masks_are_classes(tmp_path: Path) -> None:
    for folder in ("with_mask", "without_mask", "masks", "labels"):
        for name in ("1.jpg", "2.jpg"):
            image(tmp_path / "faces" / folder / name)
    image(tmp_path / "birds/images/hat/1_mask.jpg")
    assert not has_masks(tmp_path / "faces")
    assert not has_masks(tmp_path / "birds")
    assert not has_masks(tmp_path / "nowhere")
    assert len(FolderSource(tmp_path / "faces")) == 8
    with pytest.raises(DataError, match=r"no image in .* has a mask: masks lie as in images/17"):
        MaskedSource(tmp_path / "birds")


def test_photographs_of_two_classes_are_no_masks(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        image(tmp_path / folder / "1.png", (40, 40), seed=len(folder))
    assert not has_masks(tmp_path)


def test_a_damaged_mask_does_not_make_masks_a_class(tmp_path: Path) -> None:
    for k in range(5):
        image(tmp_path / f"images/{k}.jpg")
        mask(tmp_path / f"masks/{k}.png", 0, 1)
    for k in range(5):
        (tmp_path / f"masks/{k}.png").write_text("damaged")
        assert has_masks(tmp_path)


# --- values


def test_0_and_255_are_two_classes_and_that_is_said(tmp_path: Path) -> None:
    image(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/a.png", 0, 255)
    source = MaskedSource(tmp_path)
    assert source.targets.names == ("0", "255")
    assert classes_of(source) == [0, 1]
    assert source.notes == ("masks hold 0 and 255: these are two classes, 0 and 1",)


def test_255_beside_others_is_ignored_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    image(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/a.png", 0, 3, 255)
    source = MaskedSource(tmp_path)
    assert (source.targets.names, classes_of(source)) == (("0", "3"), [0, 1, -1])
    assert told(source) == ("ignored values: 1, in 1 of 1 masks, 31.25% of all pixels: 255",)
    other = MaskedSource(tmp_path, masks=MaskRules(ignore=(0,)))
    assert (other.targets.names, classes_of(other)) == (("3", "255"), [-1, 0, 1])
    reduced = MaskedSource(tmp_path, masks=MaskRules(reduce_zero=True))
    assert (reduced.targets.names, classes_of(reduced)) == (("3",), [-1, 0, -1])


def test_what_masks_hold_is_told_once(tmp_path: Path) -> None:
    held = {"train/a": (0, 1, 9), "train/b": (255,), "val/c": (2, 1), "train/d": (0, 1)}
    for name, values in held.items():
        image(tmp_path / f"images/{name}.jpg")
        mask(tmp_path / f"masks/{name}.png", *values)
    (tmp_path / "masks/train/d.png").write_text("damaged")
    (tmp_path / "classes.txt").write_text("sky\nsea\nship\nstar\n")
    notes = told(MaskedSource(tmp_path))
    starts = (
        "masks that cannot be read, and are left out: masks/train/d.png (its content is none",
        "unknown values, ignored: 1, in 1 of 3 masks, 10.42% of all pixels: 9 (nearest 3)",
        "ignored values: 1, in 1 of 3 masks, 33.33% of all pixels: 255",
        "without a pixel that counts, so that they say nothing: 1 of 4 masks: masks/tr",
        "classes in held-out masks only, which cannot be learned: 1 of 4: ship",
        "classes in no mask (are names and values the right ones?): 1 of 4: star",
    )
    assert len(notes) == len(starts)
    assert all(note.startswith(start) for note, start in zip(notes, starts, strict=True)), notes


def test_300_classes_in_8_bits_are_told_once(tmp_path: Path) -> None:
    image(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/a.png", 0, 43)
    (tmp_path / "classes.txt").write_text("\n".join(f"class {k}" for k in range(300)))
    source = MaskedSource(tmp_path)
    assert sum("8 bits" in note for note in (*source.notes, *told(source))) == 1
    mask(tmp_path / "masks/a.png", 0, 299)
    source = MaskedSource(tmp_path)
    assert not any("8 bits" in note for note in (*source.notes, *told(source)))


def test_values_for_masks_of_colours_and_colours_for_grey_ones(tmp_path: Path) -> None:
    image(tmp_path / "images/a.jpg")
    colours(tmp_path / "masks/a.png", (255, 0, 0), (0, 0, 255))
    (tmp_path / "classes.txt").write_text("sky\nsea\n")
    with pytest.raises(DataError, match=r"gives the classes values, .* \(#0000ff, #ff0000\)"):
        MaskedSource(tmp_path)
    mask(tmp_path / "masks/a.png", 0, 255)
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "classes.json").write_text('{"sky": [0, 0, 0], "sea": [255, 255, 255]}')
    source = MaskedSource(tmp_path)
    assert classes_of(source) == [0, 1]
    assert told(source) == ()


def test_smoothed_colours_without_a_map_are_told_with_the_frequent_ones(tmp_path: Path) -> None:
    image(tmp_path / "images/a.jpg", (160, 160))
    disc = np.hypot(*np.mgrid[-80:80, -80:80]) < 50
    picture = Image.fromarray(np.where(disc[..., None], np.uint8([250, 0, 0]), np.uint8([0, 0, 9])))
    (tmp_path / "masks").mkdir()
    small = picture.resize((120, 120), Image.Resampling.BILINEAR)
    small.resize((160, 160), Image.Resampling.NEAREST).save(tmp_path / "masks/a.png")
    (note,) = MaskedSource(tmp_path).notes
    assert "the most frequent are #000009 (" in note
    assert "), #fa0000 (" in note


def test_palettes_are_numbers_and_16_bits_are_kept(tmp_path: Path) -> None:
    image(tmp_path / "p/images/a.jpg")
    mask(tmp_path / "p/masks/a.png", 0, 5, palette=True)
    source = MaskedSource(tmp_path / "p")
    assert source.targets.names == ("0 #00ff07", "5 #05fa07")
    assert classes_of(source) == [0, 1]
    image(tmp_path / "deep/images/a.jpg")
    mask(tmp_path / "deep/masks/a.png", 0, 256, 1000, 65_535)
    deep = MaskedSource(tmp_path / "deep")
    assert (deep.targets.names, classes_of(deep)) == (("0", "256", "1000"), [0, 1, 2, -1])


def test_colours_with_and_without_a_class_map(tmp_path: Path) -> None:
    image(tmp_path / "images/a.jpg")
    colours(tmp_path / "masks/a.png", (0, 0, 0), (255, 0, 0), (1, 2, 3))
    source = MaskedSource(tmp_path)
    assert source.targets.names == ("#000000", "#010203", "#ff0000")
    assert classes_of(source) == [0, 2, 1]
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nroad,255,0,0\nvoid,0,0,0\nsea,9,9,9\n")
    mapped = MaskedSource(tmp_path)
    assert (mapped.targets.names, classes_of(mapped)) == (("road", "sea"), [-1, 0, -1])
    assert mapped.notes == ("classes are those of class_dict.csv",)
    assert told(mapped) == (
        "unknown colours, ignored: 1, in 1 of 1 masks, 31.25% of all pixels: #010203 (nearest "
        "#000000)",
        "ignored colours: 1, in 1 of 1 masks, 37.50% of all pixels: #000000",
        "classes in no mask (are names and values the right ones?): 1 of 2: sea",
    )


def test_greys_of_three_channels_are_read_as_grey_and_that_is_said(tmp_path: Path) -> None:
    image(tmp_path / "images/a.jpg")
    colours(tmp_path / "masks/a.png", (0, 0, 0), (4, 4, 4))
    source = MaskedSource(tmp_path)
    assert (source.targets.names, classes_of(source)) == (("0", "4"), [0, 1])
    assert told(source) == ("masks of grey in three channels, read as grey: 1 of 1 masks",)


def test_two_values_are_still_two_where_jpeg_left_others(tmp_path: Path) -> None:
    image(tmp_path / "images/a.jpg", (160, 160))
    disc = np.hypot(*np.mgrid[-80:80, -80:80]) < 50
    (tmp_path / "masks").mkdir()
    Image.fromarray((disc * 255).astype(np.uint8)).save(tmp_path / "masks/a.jpg", quality=100)
    source = MaskedSource(tmp_path)
    found = source.targets.target(0, None)["mask"]
    assert (found[disc] == 0).sum() == 0
    assert set(np.unique(found)) == {-1, 0, 1}
    assert "JPEG files?" in source.notes[0]


def test_values_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    image(tmp_path / "images/a.jpg", (40, 40))
    (tmp_path / "masks").mkdir()
    noise = np.random.default_rng(0).integers(0, 9000, (40, 40)).astype(np.uint16)
    Image.fromarray(noise).save(tmp_path / "masks/a.png")
    with pytest.raises(
        DataError, match=r"different values, which are no classes \(numbers of inst"
    ):
        MaskedSource(tmp_path)


CLASS_FILES = {
    "classes.txt": "sky\nsea\nship\n",
    "codes.txt": "0: sky\n1: sea\n2: ship\n",
    "labels.txt": "0 sky\n1 sea\n2 ship\n",
    "classes.json": '["sky", "sea", "ship"]',
    "id2label.json": '{"0": "sky", "1": "sea", "2": "ship"}',
    "label2id.json": '{"sky": 0, "sea": 1, "ship": 2}',
    "labels.json": '[{"id": 2, "name": "ship"}, {"id": 0, "name": "sky"}, {"id": 1, "name": "sea"}'
    "]",
    "classes.yaml": "names: {0: sky, 1: sea, 2: ship}",
    "names.yml": "- sky\n- sea\n- ship",
    "classes.csv": "id,name\n0,sky\n1,sea\n2,ship\n",
    "classmap.json": '{"0": {"name": "sky"}, "1": {"name": "sea"}, "2": {"name": "ship"}}',
}


@pytest.mark.parametrize("name", CLASS_FILES)
def test_files_that_name_classes(tmp_path: Path, name: str) -> None:
    image(tmp_path / "images/a.jpg")
    mask(tmp_path / "annotations/a.png", 0, 1, 2, 7)
    (tmp_path / "annotations" / name).write_text(CLASS_FILES[name])
    source = MaskedSource(tmp_path)
    of_value = [source.targets.names[k] if k >= 0 else None for k in classes_of(source)]
    assert of_value == ["sky", "sea", "ship", None]
    assert source.notes == (f"classes are those of annotations/{name}",)
    assert told(source) == (
        "unknown values, ignored: 1, in 1 of 1 masks, 25.00% of all pixels: 7 (nearest 2)",
    )


COLOUR_FILES = {
    "labelmap.txt": "# label:color_rgb:parts:actions\nsea:0,0,255::\nroad:255,0,0::\n",
    "label_colors.txt": "0 0 255 sea\n255 0 0\troad\n",
    "classes.json": '{"sea": [0, 0, 255], "road": "#ff0000"}',
    "class_map.yaml": "'#0000ff': sea\n'255, 0, 0': road\n",
    "categories.json": '[{"name": "sea", "color": [0, 0, 255]}, '
    '{"name": "road", "color": [255, 0, 0]}]',
}


@pytest.mark.parametrize("name", COLOUR_FILES)
@pytest.mark.parametrize("palette", [False, True])
def test_files_that_give_colours(tmp_path: Path, name: str, palette: bool) -> None:
    image(tmp_path / "images/a.jpg")
    colours(tmp_path / "masks/a.png", (255, 0, 0), (0, 0, 255), (1, 1, 1))
    if palette:
        with Image.open(tmp_path / "masks/a.png") as opened:
            opened.quantize(3).save(tmp_path / "masks/a.png")
    (tmp_path / name).write_text(COLOUR_FILES[name])
    source = MaskedSource(tmp_path)
    of_value = [source.targets.names[k] if k >= 0 else None for k in classes_of(source)]
    assert of_value == ["road", "sea", None]


def test_a_class_file_that_is_none(tmp_path: Path) -> None:
    image(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/a.png", 0, 1)
    (tmp_path / "classes.json").write_text('{"sea": 1.5}')
    source = MaskedSource(tmp_path)
    assert source.targets.names == ("0", "1")
    assert source.notes[0].startswith("passed over: ")
    with pytest.raises(DataError, match=r"does not say what the classes are .* a name a line"):
        MaskedSource(tmp_path, masks=MaskRules(classes=tmp_path / "classes.json"))
    for content in (
        "",
        "[]",
        "[1]",
        "{",
        '{"a": [1, 2]}',
        '{"a": 0, "b": 0}',
        '{"a": 0, "b": "c"}',
    ):
        (tmp_path / "classes.json").write_text(content)
        with pytest.raises(DataError, match="does not say what the classes are"):
            MaskedSource(tmp_path, masks=MaskRules(classes=tmp_path / "classes.json"))


def test_one_name_too_few_is_asked_about(tmp_path: Path) -> None:
    image(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/a.png", 0, 1, 2)
    (tmp_path / "classes.txt").write_text("sea\nship\n")
    with pytest.raises(DataError, match=r"names 2 classes, but the masks hold the values 0 to 2"):
        MaskedSource(tmp_path)
    reduced = MaskedSource(tmp_path, masks=MaskRules(reduce_zero=True))
    assert (reduced.targets.names, classes_of(reduced)) == (("sea", "ship"), [-1, 0, 1])


# --- data sets that are known


def test_voc(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit/VOC2012"
    for name in ("a", "b", "c", "d"):
        image(root / f"JPEGImages/{name}.jpg")
    for name in ("a", "b", "c"):
        mask(root / f"SegmentationClass/{name}.png", 0, 20, 255, palette=True)
        mask(root / f"SegmentationObject/{name}.png", 0, 1, palette=True)
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b\n")
    (lists / "val.txt").write_text("a\n")
    (lists / "trainval.txt").write_text("a\nb\n")
    assert has_masks(tmp_path)
    source = MaskedSource(tmp_path)
    assert [source.key(i)[-5:] for i in range(len(source))] == ["b.jpg", "a.jpg"]
    assert source.part.tolist() == [0, 1]
    assert classes_of(source) == [0, 20, -1]
    assert source.targets.names[20] == "tvmonitor"
    assert {one.kind: one.count for one in source.left_out} == {
        "images that no list names": 1,
        "other annotations": 3,
        "images without a mask": 1,
    }
    assert source.notes == ("masks are understood as Pascal VOC's",)


def test_ade20k_and_its_zero(tmp_path: Path) -> None:
    image(tmp_path / "images/training/ADE_train_1.jpg")
    mask(tmp_path / "annotations/training/ADE_train_1.png", 0, 1, 150)
    source = MaskedSource(tmp_path)
    assert classes_of(source) == [-1, 0, 149]
    rows = "".join(f"{k}\t0.1\t10\t5\t1\tthing {k}, other\n" for k in range(1, 151))
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + rows)
    named = MaskedSource(tmp_path)
    assert (len(named.targets.names), named.targets.names[149]) == (150, "thing 150")
    assert classes_of(named) == [-1, 0, 149]


def test_cityscapes_takes_train_ids_where_they_are(tmp_path: Path) -> None:
    image(tmp_path / "leftImg8bit/train/ulm/ulm_0_leftImg8bit.png")
    place = tmp_path / "gtFine/train/ulm"
    mask(place / "ulm_0_gtFine_labelIds.png", 0, 7, 33, 34)
    mask(place / "ulm_0_gtFine_instanceIds.png", 0, 26_001)
    colours(place / "ulm_0_gtFine_color.png", (0, 0, 0), (128, 64, 128))
    source = MaskedSource(tmp_path)
    assert classes_of(source) == [-1, 0, 18, -1]
    assert source.targets.names[18] == "bicycle"
    assert source.notes == ("masks are understood as Cityscapes's",)
    mask(place / "ulm_0_gtFine_labelTrainIds.png", 255, 0, 18)
    assert classes_of(MaskedSource(tmp_path)) == [-1, 0, 18]
    image(tmp_path / "leftImg8bit/train/ulm/ulm_1_leftImg8bit.png")
    mask(place / "ulm_1_gtFine_labelIds.png", 0, 7)
    with pytest.raises(DataError, match="some masks are labelIds and some labelTrainIds"):
        MaskedSource(tmp_path)


def test_names_of_a_known_data_set_are_not_its_values(tmp_path: Path) -> None:
    image(tmp_path / "leftImg8bit/train/ulm/ulm_0_leftImg8bit.png")
    mask(tmp_path / "gtFine/train/ulm/ulm_0_gtFine_labelIds.png", 0, 7, 33)
    (tmp_path / "classes.txt").write_text("\n".join(f"class {k}" for k in range(19)))
    source = MaskedSource(tmp_path)
    assert (source.targets.names[18], classes_of(source)) == ("class 18", [-1, 0, 18])


def test_coco_stuff_has_ids_one_more_than_its_maps(tmp_path: Path) -> None:
    image(tmp_path / "images/train2017/a.jpg")
    mask(tmp_path / "stuffthingmaps/train2017/a.png", 0, 1, 255)
    (tmp_path / "labels.txt").write_text("0: unlabeled\n1: person\n2: bicycle\n")
    source = MaskedSource(tmp_path)
    assert (source.targets.names, classes_of(source)) == (("person", "bicycle"), [0, 1, -1])


# --- sizes


def test_a_mask_of_another_size(tmp_path: Path) -> None:
    image(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/a.png", 0, 1, size=(6, 8))
    source = MaskedSource(tmp_path)
    with pytest.raises(
        UnreadableImage, match=r"masks/a.png: the mask is 8 x 6 .* image is 16 x 12"
    ):
        source.targets.target(0, None)
    told = MaskedSource(tmp_path, masks=MaskRules(any_size=True))
    assert told.targets.target(0, None)["mask"].shape == (6, 8)


def test_parts_are_found_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="of images with masks it is auto or none"):
        MaskedSource(tmp_path, FolderRules(parts="train=a"))


def test_images_beside_the_parts_are_not_mixed_in(tmp_path: Path) -> None:
    for place in ("train", "val", "extra"):
        image(tmp_path / place / f"images/{place}.jpg")
        mask(tmp_path / place / f"masks/{place}.png", 0, 1)
    source = MaskedSource(tmp_path)
    assert [source.key(i) for i in range(len(source))] == [
        "train/images/train.jpg",
        "val/images/val.jpg",
    ]
    (left,) = source.left_out
    assert (left.kind, left.examples) == ("images beside the parts", ("extra/images/extra.jpg",))
    assert len(MaskedSource(tmp_path, FolderRules(parts="none"))) == 3


def test_without_a_folder_for_training_the_others_are_for_it(tmp_path: Path) -> None:
    for place in ("test drive", "highway", "test"):
        image(tmp_path / "images" / place / "a.jpg")
        mask(tmp_path / "masks" / place / "a.png", 0, 1)
    source = MaskedSource(tmp_path)
    assert [source.key(i) for i in range(3)] == [
        "images/highway/a.jpg",
        "images/test drive/a.jpg",
        "images/test/a.jpg",
    ]
    assert source.part.tolist() == [0, 0, 2]


def test_a_source_goes_to_other_processes(tmp_path: Path) -> None:
    image(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/a.png", 0, 1)
    here = MaskedSource(tmp_path)
    present(here.targets.store)
    source = pickle.loads(pickle.dumps(here))
    assert classes_of(source) == [0, 1]
    assert here.targets.store.held is not None and source.targets.store.held is None


def test_what_the_user_ignores_is_no_class(tmp_path: Path) -> None:
    image(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/a.png", 0, 1, 2, 255)
    (tmp_path / "classes.txt").write_text("sky\nsea\nship\n")
    assert classes_of(MaskedSource(tmp_path)) == [0, 1, 2, -1]
    told = MaskedSource(tmp_path, masks=MaskRules(ignore=(1,)))
    assert (told.targets.names, classes_of(told)) == (("sky", "ship"), [0, -1, 1, -1])
    assert told.targets.coding.unknown(np.array([[1, 255]], np.uint8)) == {255: 1}


def test_what_was_counted_is_kept_until_a_mask_changes(tmp_path: Path, cache: Path) -> None:
    image(tmp_path / "images/a.jpg")
    mask(tmp_path / "masks/a.png", 0, 1)
    MaskedSource(tmp_path)
    (kept,) = (cache / "masks").iterdir()
    content = json.loads(kept.read_text())
    kept.write_text(json.dumps(content | {"pixels": {"0": 1, "9": 1}}))
    assert MaskedSource(tmp_path).targets.names == ("0", "9")
    mask(tmp_path / "masks/a.png", 0, 1, 2)
    assert MaskedSource(tmp_path).targets.names == ("0", "1", "2")
    kept.write_text("damaged")
    assert MaskedSource(tmp_path).targets.names == ("0", "1", "2")


# --- COCO


def coco(*annotations: dict[str, object], images: int = 1) -> dict[str, object]:
    return {
        "images": [
            {"id": 10 + k, "file_name": f"{k}.jpg", "height": SIZE[0], "width": SIZE[1]}
            for k in range(images)
        ],
        "categories": [{"id": 90, "name": "ship"}, {"id": 7, "name": "sea"}],
        "annotations": [{"id": k, "image_id": 10, **one} for k, one in enumerate(annotations)],
    }


def write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


SQUARE = {"category_id": 7, "segmentation": [[0, 0, 8, 0, 8, 12, 0, 12]], "area": 96}
RUNS = {"category_id": 90, "segmentation": {"size": [12, 16], "counts": [25, 4, 163]}, "area": 4}


def test_coco_outlines_are_drawn(tmp_path: Path) -> None:
    for part in ("train", "val"):
        image(tmp_path / f"{part}2017/0.jpg")
        write(tmp_path / f"annotations/instances_{part}2017.json", coco(RUNS, SQUARE))
    write(tmp_path / "annotations/captions_train2017.json", {"images": [], "annotations": []})
    image(tmp_path / "train2017/more.jpg")
    assert has_masks(tmp_path)
    source = MaskedSource(tmp_path)
    assert [source.key(0), source.key(1)] == ["train2017/0.jpg", "val2017/0.jpg"]
    assert source.part.tolist() == [0, 1]
    assert source.targets.names == ("background", "sea", "ship")
    expected = np.zeros(SIZE, int)
    expected[:, :8] = 1
    expected[1:5, 2] = 2  # the smaller one over the larger
    assert np.array_equal(source.targets.target(0, None)["mask"], expected)
    assert "Pillow's ImageDraw.polygon" in source.notes[0]
    assert {one.kind: one.examples for one in source.left_out} == {
        "images without a mask": ("train2017/more.jpg",),
        "other files": ("annotations/captions_train2017.json",),
    }
    before = source.targets.hashes()
    write(tmp_path / "annotations/instances_val2017.json", coco(SQUARE))
    after = MaskedSource(tmp_path).targets.hashes()
    assert [before[0] == after[0], before[1] == after[1]] == [True, False]


def panoptic(
    tmp_path: Path, part: str, suffix: str, name: str = "0", masks: str = "", **changes: object
) -> np.ndarray:
    """An image and its panoptic mask of three segments, one of them void; their numbers."""
    numbers = np.zeros(SIZE, int)
    numbers[:, :8], numbers[:4, 8:] = 300, 70_000
    colours = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65_536], axis=-1)
    image(tmp_path / f"{part}2017/{name}{suffix}")
    file = tmp_path / (masks or f"annotations/panoptic_{part}2017") / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(colours.astype(np.uint8)).save(file)
    segments = [{"id": 300, "category_id": 90}, {"id": 70_000, "category_id": 7, "iscrowd": 1}]
    said = {"image_id": 10, "file_name": f"{name}.png", "segments_info": segments, **changes}
    content = coco() | {"annotations": [said]}
    content["images"][0]["file_name"] = f"{name}{suffix}"
    write(tmp_path / f"annotations/panoptic_{part}2017.json", content)
    return numbers


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("names", [("0", "0"), ("10", "20")])
@pytest.mark.parametrize("masks", ["", "{part}_segments"])
def test_coco_panoptic_masks(
    tmp_path: Path, suffix: str, names: tuple[str, str], masks: str
) -> None:
    for part, name in zip(("train", "val"), names, strict=True):
        numbers = panoptic(tmp_path, part, suffix, name, masks.format(part=part))
    write(tmp_path / "annotations/instances_train2017.json", coco(SQUARE))
    assert has_masks(tmp_path)
    source = MaskedSource(tmp_path)
    expected = [f"{part}2017/{n}{suffix}" for part, n in zip(("train", "val"), names, strict=True)]
    assert [source.key(0), source.key(1)] == expected
    assert source.part.tolist() == [0, 1]
    assert source.targets.names == ("sea", "ship")
    shown = np.select([numbers == 300, numbers == 70_000], [1, 0], -1)
    assert np.array_equal(source.targets.target(0, None)["mask"], shown)
    assert source.left_out == () and "instances_train2017.json are not used" in source.notes[0]
    before = source.targets.hashes()
    swapped = [{"id": 300, "category_id": 7}, {"id": 70_000, "category_id": 90}]
    place = masks.format(part="val")
    panoptic(tmp_path, "val", suffix, names[1], place, segments_info=swapped)
    after = MaskedSource(tmp_path).targets.hashes()
    assert before[1] != after[1]


def test_a_panoptic_mask_is_no_other_parts_and_no_image(tmp_path: Path) -> None:
    panoptic(tmp_path, "train", ".png")
    panoptic(tmp_path, "val", ".png")
    (tmp_path / "annotations/panoptic_val2017/0.png").unlink()
    source = MaskedSource(tmp_path)
    assert [source.key(i) for i in range(len(source))] == ["train2017/0.png"]
    assert {one.kind: one.examples for one in source.left_out} == {
        "masks": ("0.png",),
        "images without a mask": ("val2017/0.png",),
    }


def test_outlines_are_used_where_panoptic_masks_are_not_unpacked(tmp_path: Path) -> None:
    panoptic(tmp_path, "train", ".jpg")
    (tmp_path / "annotations/panoptic_train2017/0.png").unlink()
    write(tmp_path / "annotations/instances_train2017.json", coco(SQUARE))
    source = MaskedSource(tmp_path)
    assert source.targets.names == ("background", "sea", "ship")
    assert "panoptic_train2017.json names are not there" in source.notes[0]


def test_faults_of_panoptic_masks_are_said(tmp_path: Path) -> None:
    panoptic(tmp_path, "train", ".jpg")
    panoptic(tmp_path, "val", ".jpg", segments_info=[{"id": 300, "category_id": 90}])
    masks = MaskedSource(tmp_path).targets
    assert masks.coding.unknown(masks.values(1)) == {-2: 32}  # of a segment that nobody named
    for changes, words in (
        ({"file_name": "9.png"}, "names is not there"),
        ({"segments_info": [{"id": 300, "category_id": 4}]}, "that the file lists"),
        ({"segments_info": [{"id": 1 << 24, "category_id": 7}]}, "is none of a colour"),
        ({"segments_info": [{"id": float("inf"), "category_id": 7}]}, "that the file lists"),
        ({"segments_info": 3}, "that the file lists"),
    ):
        panoptic(tmp_path, "val", ".jpg", **changes)
        found = MaskedSource(tmp_path)
        assert len(found) == 1
        assert any(words in one.sentence() for one in found.left_out), words


def test_an_image_that_may_be_two_is_left_out(tmp_path: Path) -> None:
    for place in ("a", "b"):
        image(tmp_path / place / "0.jpg")
    image(tmp_path / "a/1.jpg")
    write(tmp_path / "annotations/all.json", coco(SQUARE, images=2))
    source = MaskedSource(tmp_path)
    assert source.key(0) == "a/1.jpg"
    assert source.left_out[0].examples == ("a/0.jpg", "b/0.jpg")


def test_outlines_beside_masks_are_not_used_and_that_is_said(tmp_path: Path) -> None:
    image(tmp_path / "images/0.jpg")
    mask(tmp_path / "masks/0.png", 0, 1)
    write(tmp_path / "annotations/instances.json", coco(SQUARE))
    source = MaskedSource(tmp_path)
    assert source.targets.names == ("0", "1")
    assert source.notes == ("outlines in annotations/instances.json are not used: there are masks",)


def test_roboflow_layout(tmp_path: Path) -> None:
    for part in ("train", "valid"):
        image(tmp_path / part / "0.jpg")
        write(tmp_path / part / "_annotations.coco.json", coco(SQUARE))
    source = MaskedSource(tmp_path)
    assert [source.key(0), source.key(1)] == ["train/0.jpg", "valid/0.jpg"]
    assert source.part.tolist() == [0, 1]


def test_boxes_alone_are_no_masks(tmp_path: Path) -> None:
    image(tmp_path / "train/0.jpg")
    box = {"category_id": 7, "segmentation": [], "bbox": [0, 0, 3, 3]}
    write(tmp_path / "train/_annotations.coco.json", coco(box))
    assert not has_masks(tmp_path)


def compressed(runs: list[int]) -> str:
    """As pycocotools' rleToString writes them."""
    text = ""
    for k, run in enumerate(runs):
        x = run - (runs[k - 2] if k > 2 else 0)
        more = True
        while more:
            letter = x & 31
            x >>= 5
            more = x != -1 if letter & 16 else x != 0
            text += chr((letter | 32 if more else letter) + 48)
    return text


def test_compressed_run_lengths() -> None:
    assert read_runs("61X13mN000`0").tolist() == [6, 1, 40, 4, 5, 4, 5, 4, 21]  # pycocotools' own
    runs = np.random.default_rng(0).integers(0, 70_000, 40).tolist()
    assert read_runs(compressed(runs)).tolist() == runs
    for text in ("\x01", "o", "oooooooooooooooo0"):
        with pytest.raises(ValueError, match="run lengths"):
            read_runs(text)


@pytest.mark.parametrize(
    ("outline", "reason"),
    [
        ({"size": [12, 16], "counts": [10**12]}, "do not add up"),
        ({"size": [12, 16], "counts": [-5, 197]}, "do not add up"),
        ({"size": [10**6, 10**6], "counts": [10**12]}, "another size"),
        ({"size": [12, 16], "counts": "0" * 10_000}, "more run lengths"),
        ([[0, 0, 1, 1]], "three corners"),
        ([[0, 0, 1]], "odd number"),
        ([[0, 0, 1e30, 0, 5, 5]], "far beyond"),
        ([[0, 0, float("nan"), 0, 5, 5]], "far beyond"),
        ([], "at least one polygon"),
        (None, "polygons, or run lengths"),
        (5, "polygons, or run lengths"),
        ([["a", "b", "c", "d", "e", "f"]], "polygons, or run lengths"),
        ({"size": [12, 16], "counts": {"a": 1}}, "polygons, or run lengths"),
        ({"size": [12, 1e400], "counts": []}, "polygons, or run lengths"),
        ({"size": [12, 16], "counts": [10**400]}, "polygons, or run lengths"),
    ],
)
def test_outlines_that_are_none_are_left_out(tmp_path: Path, outline: object, reason: str) -> None:
    image(tmp_path / "train/0.jpg")
    bad = {"category_id": 7, "segmentation": outline}
    write(tmp_path / "train/_annotations.coco.json", coco(SQUARE, bad))
    source = MaskedSource(tmp_path)
    (left,) = source.left_out
    assert reason in left.reason
    assert left.examples == ("annotation 1 of train/_annotations.coco.json",)
    assert (source.targets.target(0, None)["mask"] == 1).sum() == 96


def test_annotations_of_nothing_are_left_out(tmp_path: Path) -> None:
    image(tmp_path / "train/0.jpg")
    of_none = [SQUARE | {"image_id": 3}, SQUARE | {"category_id": [3]}]
    content = coco(SQUARE, *of_none)
    content["annotations"] += [None, 5, "x", {}]  # type: ignore[operator]
    write(tmp_path / "train/_annotations.coco.json", content)
    (left,) = MaskedSource(tmp_path).left_out
    assert (left.kind, left.count) == ("outlines", 6)
    assert left.reason == "an annotation needs an image and a category that the file lists"


def test_an_image_without_a_size_costs_no_other(tmp_path: Path) -> None:
    for k in range(2):
        image(tmp_path / f"train/{k}.jpg")
    content = coco(SQUARE, SQUARE | {"image_id": 11}, images=2)
    content["images"][0]["height"] = "tall"  # type: ignore[index]
    write(tmp_path / "train/_annotations.coco.json", content)
    source = MaskedSource(tmp_path)
    assert [source.key(i) for i in range(len(source))] == ["train/1.jpg"]
    assert [one.kind for one in source.left_out] == [
        "images",
        "outlines",
        "images without a mask",
    ]


def test_categories_of_one_name_are_one_class(tmp_path: Path) -> None:
    image(tmp_path / "train/0.jpg")
    content = coco(SQUARE, RUNS)
    names = {7: "sea", 90: "sea", 91: "background"}
    content["categories"] = [{"id": key, "name": name} for key, name in names.items()]
    write(tmp_path / "train/_annotations.coco.json", content)
    source = MaskedSource(tmp_path)
    assert source.targets.names == ("background", "sea")
    assert set(classes_of(source)) == {0, 1}


def test_json_that_is_not_what_it_should_be(tmp_path: Path) -> None:
    image(tmp_path / "train/0.jpg")
    file = tmp_path / "train/_annotations.coco.json"
    twice = coco(SQUARE, images=2)
    twice["images"] = [{**one, "id": 1} for one in twice["images"]]  # type: ignore[attr-defined]
    for content, reason in (
        ({"images": []}, "does not list images"),
        (twice, "two images have one id"),
        ([{"images": 1}], "does not list images"),
    ):
        write(file, content)
        with pytest.raises(DataError, match=reason):
            MaskedSource(tmp_path)
    other = coco(SQUARE)
    other["images"] = [{"id": 1, "file_name": "gone.jpg", "height": 3, "width": 3}]
    other["annotations"] = []
    write(file, other)
    with pytest.raises(DataError, match="none of the images"):
        MaskedSource(tmp_path)
