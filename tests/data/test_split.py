"""How a data set becomes images for training, validation and test."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.data import PARTS, ArraySource, Source, Splits, open_data, open_splits, write_split
from vitrail.data.sources.layout import FolderRules
from vitrail.errors import DataError, UsageError


def keys(source: Source | None) -> list[str]:
    return [] if source is None else [source.key(i) for i in range(len(source))]


def parts(splits: Splits) -> tuple[set[str], set[str], set[str]]:
    return set(keys(splits.train)), set(keys(splits.val)), set(keys(splits.test))


def save(folder: Path, **counts: int) -> Path:
    """So many images in each class folder."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("L", (2, 2), i).save(folder / name / f"{i}.png")
    return folder


def write_csv(folder: Path, *rows: str) -> Path:
    """A list, and files of the names in its first column."""
    file = folder / "labels.csv"
    file.write_text("\n".join(rows) + "\n")
    for row in rows[1:]:
        (folder / row.partition(",")[0]).touch()
    return file


# A validation part is drawn


def test_each_class_gives_its_share_to_validation(tmp_path: Path) -> None:
    splits = open_splits(save(tmp_path, cat=20, dog=10, owl=2), seed=0)
    assert np.bincount(splits.train.targets.values).tolist() == [16, 8, 1]
    assert np.bincount(splits.val.targets.values).tolist() == [4, 2, 1]
    assert splits.test is None
    assert splits.notes == ("validation: 7 of the 32 training images, drawn by seed 0",)
    train, val, _ = parts(splits)
    assert not train & val
    assert len(train | val) == 32


@pytest.mark.parametrize("fraction, expected", [(0.01, 1), (0.25, 5), (0.5, 10), (0.99, 19)])
def test_validation_is_never_empty_and_never_all(
    tmp_path: Path, fraction: float, expected: int
) -> None:
    splits = open_splits(save(tmp_path, cat=20, dog=20), seed=0, val_fraction=fraction)
    assert np.bincount(splits.val.targets.values).tolist() == [expected, expected]


def test_the_same_seed_gives_the_same_split_and_another_seed_another(tmp_path: Path) -> None:
    save(tmp_path, cat=20, dog=20)
    one, again, other = (parts(open_splits(tmp_path, seed=seed)) for seed in (0, 0, 1))
    assert one == again != other


def test_the_split_is_pinned(tmp_path: Path) -> None:
    splits = open_splits(save(tmp_path, cat=10, dog=10), seed=0)
    assert keys(splits.val) == ["cat/0.png", "cat/9.png", "dog/5.png", "dog/8.png"]


def test_an_image_more_moves_no_image_of_another_class_and_at_most_one_of_its_own(
    tmp_path: Path,
) -> None:
    save(tmp_path, cat=20, dog=20)
    _, before, _ = parts(open_splits(tmp_path, seed=0))
    for i in range(20, 40):
        Image.new("L", (2, 2), i).save(tmp_path / "cat" / f"{i}.png")
        _, after, _ = parts(open_splits(tmp_path, seed=0))
        moved = (before ^ after) - {f"cat/{i}.png"}
        assert len(moved) <= 1
        assert all(key.startswith("cat/") for key in moved)
        before = after


def test_several_labels_an_image_are_split_so_that_training_sees_each(tmp_path: Path) -> None:
    rows = [f"{i}.png,{'red|round' if i % 2 else 'red'}" for i in range(19)]
    write_csv(tmp_path, "file,label", *rows, "19.png,rare|red")
    for seed in range(20):
        splits = open_splits(tmp_path, seed=seed)
        assert len(splits.val) in (3, 4)
        assert splits.train.targets.values.any(axis=0).all()


# The maker's split


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_folders_for_train_val_and_test(tmp_path: Path, val: str) -> None:
    save(tmp_path / "train", cat=3, dog=2)
    save(tmp_path / val, cat=1, dog=1)
    save(tmp_path / "test", dog=2)
    splits = open_splits(tmp_path, seed=0)
    assert parts(splits) == (
        {
            "train/cat/0.png",
            "train/cat/1.png",
            "train/cat/2.png",
            "train/dog/0.png",
            "train/dog/1.png",
        },
        {f"{val}/cat/0.png", f"{val}/dog/0.png"},
        {"test/dog/0.png", "test/dog/1.png"},
    )
    assert splits.test is not None
    assert (
        splits.train.targets.names
        == splits.val.targets.names
        == splits.test.targets.names
        == ("cat", "dog")
    )
    assert splits.test.targets.values.tolist() == [1, 1]
    assert splits.notes == ()


def test_with_train_and_test_only_validation_comes_from_train(tmp_path: Path) -> None:
    save(tmp_path / "train", cat=10, dog=10)
    save(tmp_path / "test", cat=5, dog=5)
    splits = open_splits(tmp_path, seed=0)
    assert [len(part) for part in parts(splits)] == [16, 4, 10]
    assert all(key.startswith("train/") for key in keys(splits.val))


def test_without_a_share_for_validation_the_test_part_takes_its_role(tmp_path: Path) -> None:
    save(tmp_path / "train", cat=10, dog=10)
    save(tmp_path / "test", cat=5, dog=5)
    splits = open_splits(tmp_path, seed=0, val_fraction=0)
    assert (len(splits.train), len(splits.val)) == (20, 10)
    assert splits.val is splits.test
    assert splits.notes == ("validation: the test images, so a best epoch is chosen by them",)


def test_test_images_without_labels_are_left_out(tmp_path: Path) -> None:
    save(tmp_path / "train", cat=10, dog=10)
    save(tmp_path, test=2)
    splits = open_splits(tmp_path, seed=0)
    assert splits.test is None
    assert splits.notes[0] == (
        "left out: images outside the class folders, 2 (a folder is a class): test/0.png, "
        "test/1.png"
    )


def test_a_train_folder_alone(tmp_path: Path) -> None:
    save(tmp_path / "train", cat=5, dog=5)
    assert open_splits(tmp_path, seed=0).train.targets.names == ("cat", "dog")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    save(tmp_path, train=5, bus=5)
    assert open_splits(tmp_path, seed=0).train.targets.names == ("bus", "train")


def save_parts(root: Path, *folders: str) -> Path:
    """Folders of cats and dogs."""
    for folder in folders:
        save(root / folder, cat=4, dog=4)
    return root


@pytest.mark.parametrize(
    "folders",
    [
        {"train": "train", "dev": "val"},
        {"train": "train", "eval": "val"},
        {"train": "train", "dev": "val", "test": "test"},
        {"train2017": "train", "val2017": "val", "test-dev2017": "test"},
        {"training_set/training_set": "train", "test_set/test_set": "test"},
        {"seg_train/seg_train": "train", "seg_test/seg_test": "test"},
        {"Train_Images": "train", "Valid images": "val", "TestImages": "test"},
        {"trainset": "train", "testset": "test"},
        {"trn": "train", "tst": "test", "validation_data": "val"},
        {"fish_train": "train", "fish_val": "val", "fish_test": "test"},
        {"train/images": "train", "test/images": "test"},
        {"train": "train", "test/archive": "test"},
        {"archive/train": "train", "archive/validation": "val"},
        {"train": "train", "val": "val", "valid": "val"},
        {"train": "train", "test": "test", "testing": "test"},
        {"val": "val", "test": "test"},
        {"train_a/train": "train", "val_a/val": "val"},
    ],
    ids=lambda folders: "+".join(folders),
)
def test_parts_are_known_by_all_their_usual_names(tmp_path: Path, folders: dict[str, str]) -> None:
    """Intel, Kaggle and COCO downloads were trained with the classes "train" and "dev"."""
    source = open_data(save_parts(tmp_path, *folders))
    assert source.targets.names == ("cat", "dog")
    found = {(source.key(i).rsplit("/", 2)[0], PARTS[source.part[i]]) for i in range(len(source))}
    assert found == set(folders.items())
    plain = all(name in ("train", "val", "test") for name in folders)
    assert plain or source.notes[0].startswith("parts: ")
    assert source.left_out == ()


def test_an_image_that_strays_into_a_part_does_not_make_it_a_class(tmp_path: Path) -> None:
    for part in ("train", "test"):
        save(save_parts(tmp_path, part), **{part: 1})
    source = open_data(tmp_path)
    assert (source.targets.names, source.left_out[0].count) == (("cat", "dog"), 2)


def test_what_lies_beside_the_parts_is_told(tmp_path: Path) -> None:
    data = save_parts(tmp_path, "train", "val", "extra", "train_part2")
    source = open_data(data)
    assert len(source) == 16
    (beside,) = source.left_out
    assert (beside.kind, beside.count) == ("images beside the parts", 16)
    assert "data.parts" in beside.reason and beside.examples[0] == "extra/cat/0.png"
    rules = FolderRules(parts="train=train,train=extra,train=train_part2,val=val")
    assert np.bincount(open_data(data, rules=rules).part).tolist() == [24, 8]


@pytest.mark.parametrize(
    "folders, asked, answer",
    [
        (("siteA", "siteB"), "same folders: cat, dog", "train=siteA,test=siteB"),
        (("train", "holdout"), "is train a part", "train=train,test=holdout"),
        (("train", "val", "eval"), "one for the last test", "train=train,val=val,test=eval"),
        (
            ("a_train", "a_test", "b_train", "b_test"),
            "several data sets",
            "train=a_train,train=b_train,test=a_test,test=b_test",
        ),
    ],
)
def test_where_parts_and_classes_cannot_be_told_apart_the_user_is_asked(
    tmp_path: Path, folders: tuple[str, ...], asked: str, answer: str
) -> None:
    save_parts(tmp_path, *folders)
    with pytest.raises(UsageError, match=rf"{asked}.* parts='none' .*parts='{answer}'$"):
        open_data(tmp_path)
    assert open_data(tmp_path, rules=FolderRules(parts="none")).targets.names == tuple(
        sorted(folders)
    )
    parted = open_data(tmp_path, rules=FolderRules(parts=answer))
    assert parted.targets.names == ("cat", "dog") and len(parted) == 8 * len(folders)


def test_parts_within_classes_and_parts_without_classes_are_no_classes(tmp_path: Path) -> None:
    for folder in ("cat", "dog"):
        save(tmp_path / "inside" / folder, train=2, test=2)
    with pytest.raises(UsageError, match=r"cat, dog hold test, train each.* as in train/cat"):
        open_data(tmp_path / "inside")
    save(tmp_path / "flat", train=3, test=3)
    with pytest.raises(UsageError, match="they hold images, and no class folders"):
        open_data(tmp_path / "flat")
    rules = FolderRules(parts="none")
    assert open_data(tmp_path / "flat", rules=rules).targets.names == ("test", "train")


@pytest.mark.parametrize("classes", [("train", "bus", "car"), ("bullet_train", "test_tube")])
def test_classes_that_are_called_like_parts_are_classes(
    tmp_path: Path, classes: tuple[str, ...]
) -> None:
    save(tmp_path, **dict.fromkeys(classes, 2))
    save(tmp_path / classes[0], steam=2, diesel=2)
    source = open_data(tmp_path)
    assert source.targets.names == tuple(sorted(classes)) and source.notes == ()


@pytest.mark.parametrize(
    "parts, message",
    [
        ("train", "train=DIR,val=DIR"),
        ("learn=siteA", "train=DIR,val=DIR"),
        ("train=sitesA", r"no folder sitesA: did you mean siteA\?"),
        ("train=siteA,val=siteA", "in two parts, or twice"),
        ("train=.,val=siteA", "in two parts, or twice"),
    ],
)
def test_parts_that_cannot_be(tmp_path: Path, parts: str, message: str) -> None:
    save_parts(tmp_path, "siteA", "siteB")
    with pytest.raises(UsageError, match=message):
        open_data(tmp_path, rules=FolderRules(parts=parts))


def test_only_folders_of_images_have_rules(tmp_path: Path) -> None:
    file = write_csv(tmp_path, "file,label,split", "1,a,train", "2,b,train2017", "3,a,dev")
    assert open_data(file).part.tolist() == [0, 0, 1]
    with pytest.raises(UsageError, match=r"data\.parts .* are for folders of images"):
        open_data(file, rules=FolderRules(parts="none"))


def test_a_csv_with_a_split_column(tmp_path: Path) -> None:
    file = write_csv(tmp_path, "file,label,split", "1,a,train", "2,b,train", "3,a,val", "4,b,test")
    for data in (file, tmp_path, str(tmp_path)):
        assert parts(open_splits(data, seed=0)) == ({"1", "2"}, {"3"}, {"4"})


# What nothing can be learned from


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_a_fraction_out_of_range(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(UsageError, match="at least 0 and less than 1"):
        open_splits(save(tmp_path, cat=2, dog=2), seed=0, val_fraction=fraction)


def test_no_share_for_validation_and_no_test_part(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="val_fraction is 0, but the data has no part for"):
        open_splits(save(tmp_path, cat=2, dog=2), seed=0, val_fraction=0)


def test_one_class_only(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"only one class, 'photos'.* lie inside photos, give"):
        open_splits(save(tmp_path / "photos", cat=2, dog=2).parent, seed=0)


def test_classes_of_one_image_are_named_five_at_most(tmp_path: Path) -> None:
    save(tmp_path, cat=5, **{f"rare{i}": 1 for i in range(7)})
    with pytest.raises(DataError, match="have one: rare0, rare1, rare2, rare3, rare4 and 2 more"):
        open_splits(tmp_path, seed=0)


def test_labels_unseen_in_training_are_named(tmp_path: Path) -> None:
    save(tmp_path / "train", cat=2, dog=2, emu=0)
    save(tmp_path / "val", cat=1, emu=1)
    save(tmp_path / "test", yak=1)
    with pytest.raises(DataError, match=r"labels unseen in training, .*: emu, yak; add training"):
        open_splits(tmp_path, seed=0)


def test_no_training_images(tmp_path: Path) -> None:
    save(tmp_path / "train", cat=0)
    save(tmp_path / "val", cat=2, dog=2)
    with pytest.raises(DataError, match="has no images to train with"):
        open_splits(tmp_path, seed=0)


def test_a_single_image_with_several_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image of .* is left for validation"):
        open_splits(write_csv(tmp_path, "file,label", "1.png,a|b"), seed=0)


# A stored split


def stored(tmp_path: Path, **options: float) -> tuple[Path, Path, Splits]:
    data, file = save(tmp_path / "data", cat=10, dog=10), tmp_path / "split.csv"
    splits = open_splits(data, seed=0, **options)
    write_split(splits, file)
    return data, file, splits


def test_a_split_is_stored_and_restored(tmp_path: Path) -> None:
    data, file, splits = stored(tmp_path)
    lines = file.read_text().splitlines()
    assert lines[0] == "split,key,label"
    assert f"val,{keys(splits.val)[0]},cat" in lines
    restored = open_splits(data, seed=99, val_fraction=0.5, assignment=file)
    assert parts(restored) == parts(splits)
    assert restored.notes == ()


def test_a_split_whose_validation_is_its_test_part_is_restored_as_such(tmp_path: Path) -> None:
    save(tmp_path / "train", cat=3, dog=3)
    save(tmp_path / "test", cat=3, dog=3)
    write_split(open_splits(tmp_path, seed=0, val_fraction=0), tmp_path / "split.csv")
    restored = open_splits(tmp_path, seed=0, assignment=tmp_path / "split.csv")
    assert restored.val is restored.test


def test_several_labels_are_stored_in_one_cell(tmp_path: Path) -> None:
    write_csv(tmp_path, "file,label,split", "1,a|b,train", "2,b,val")
    write_split(open_splits(tmp_path, seed=0), tmp_path / "split.csv")
    assert "train,1,a|b" in (tmp_path / "split.csv").read_text()


def test_images_that_are_new_since_are_left_out_with_their_classes(tmp_path: Path) -> None:
    data, file, splits = stored(tmp_path)
    save(data, ant=2, dog=11)
    restored = open_splits(data, seed=0, assignment=file)
    assert parts(restored) == parts(splits)
    assert restored.train.targets.names == ("cat", "dog")
    assert restored.train.targets.values.tolist() == splits.train.targets.values.tolist()
    assert restored.notes[0].startswith("left out: images, 3 (the split in ")
    assert restored.notes[0].endswith("does not list them): ant/0.png, ant/1.png, dog/10.png")


def test_images_that_are_gone_are_named_five_at_most(tmp_path: Path) -> None:
    data, file, before = stored(tmp_path)
    gone = {f"cat/{i}.png" for i in range(7)}
    for name in gone:
        (data / name).unlink()
    with pytest.raises(DataError, match=r"7 images of .* no longer in the data: .* and 2 more"):
        open_splits(data, seed=0, assignment=file)
    accepted = open_splits(data, seed=0, assignment=file, allow_missing=True)
    assert parts(accepted) == tuple(part - gone for part in parts(before))


@pytest.mark.parametrize("text", ["", "a,b\n", "split,key,label\nmain,cat/0.png,cat\n"])
def test_a_file_that_stores_no_split(tmp_path: Path, text: str) -> None:
    data, file, _ = stored(tmp_path)
    file.write_text(text)
    with pytest.raises(DataError, match="cannot restore the split"):
        open_splits(data, seed=0, assignment=file)


def test_a_split_that_cannot_be_written(tmp_path: Path) -> None:
    source = ArraySource(np.zeros((2, 2, 2), np.uint8), np.array([0, 1]), ("a", "b"), "train")
    with pytest.raises(DataError, match=r"cannot write the split to .*: No such file"):
        write_split(Splits(source, source, None), tmp_path / "no" / "split.csv")


def test_the_data_are_not_written_to(tmp_path: Path) -> None:
    data = save(tmp_path / "data", cat=5, dog=5)
    before = {file: file.read_bytes() for file in data.rglob("*.*")}
    write_split(open_splits(data, seed=0), tmp_path / "split.csv")
    open_splits(data, seed=0, assignment=tmp_path / "split.csv")
    assert {file: file.read_bytes() for file in data.rglob("*.*")} == before
