"""Images with texts: every format, what is found in it, what is left out, what is refused."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command import last_json, vitrail
from vitrail.data import open_data, open_splits
from vitrail.data.sources.csvfile import Columns
from vitrail.data.split import task_of
from vitrail.data.targets import Texts
from vitrail.errors import DataError, UsageError


def picture(seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (16, 20, 3), np.uint8))


@pytest.fixture
def photos(tmp_path) -> Path:
    (tmp_path / "photos").mkdir()
    for i in range(6):
        picture(i).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path


def written(folder: Path, name: str, text: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def opened(place, **columns: str):
    return open_data(place, Columns(**columns), targets=Texts)


def said(source) -> dict[str, tuple[str, ...]]:
    return {source.key(i): source.targets.of(i) for i in range(len(source))}


EXPECTED = {
    "photos/0.png": ("a cat", "a red cat"),
    "photos/1.png": ("a dog, asleep",),
    "photos/2.png": ("a cat",),
}


@pytest.mark.parametrize(
    ("name", "mark", "header"),
    [
        ("pairs.csv", ",", "filepath,caption"),
        ("pairs.tsv", "\t", "image\ttitle"),
        ("pairs.csv", ";", "file_name;text"),
        ("pairs.txt", "|", "image_name|comment"),
        ("pairs.tsv", "\t", ""),
        ("pairs.csv", ",", ""),
    ],
)
def test_a_table_of_any_delimiter_with_several_rows_an_image(name, mark, header, photos):
    rows = [
        ("photos/0.png", "a cat"),
        ("photos/1.png", '"a dog, asleep"'),
        ("photos/0.png", " a  red cat"),
        ("./photos/2.png", "a cat"),
    ]
    lines = [header, *(mark.join(row) for row in rows)] if header else map(mark.join, rows)
    source = opened(written(photos, name, "\n".join(lines)))
    assert said(source) == EXPECTED
    assert source.targets.table == ("a cat", "a red cat", "a dog, asleep")  # equal ones are one
    assert source.load(0).size == (20, 16) and source.targets.target(1, None)["texts"].tolist() == [
        2,
        -1,
    ]
    assert (
        "texts in" in source.notes[0]
        and f"'{'tab' if mark == chr(9) else mark}'" in (source.notes[0])
    )
    assert "images that" in source.left_out[-1].sentence()  # 3, 4 and 5 are not listed


def test_labels_and_parts_are_kept_and_empty_texts_counted(photos):
    lines = ["file,caption,label,split,source"]
    for i in range(6):
        text, part = "" if i == 3 else f"text {i}", "test" if i == 5 else "train"
        lines.append(f"photos/{i}.png,{text},{'ab'[i % 2]},{part},x")
    source = opened(written(photos, "pairs.csv", "\n".join(lines)))
    assert source.targets.names == ("a", "b") and source.part.tolist() == [0, 0, 0, 0, 2]
    assert source.targets.classes.values.tolist() == [0, 1, 0, 0, 1]
    assert source.left_out[0].sentence().startswith("left out: rows without a text, 1")
    assert "not used: source" in source.notes[0]
    target = source.targets.target(1, None)
    assert target["classes"].tolist() == [0, 1]
    splits = open_splits(photos / "pairs.csv", seed=0, targets=Texts, val_fraction=0)
    assert splits.train.targets.table is splits.val.targets.table
    assert len(splits.train) == 4 and splits.val is splits.test


def test_a_named_column_and_one_that_cannot_be_told(photos):
    file = written(photos, "pairs.csv", "file,one,two\nphotos/0.png,a,b\nphotos/1.png,c,d\n")
    assert said(opened(file, caption="TWO")) == {"photos/0.png": ("b",), "photos/1.png": ("d",)}
    with pytest.raises(DataError, match=r"its columns are file, one, two; say it, as in .*two"):
        opened(file)
    with pytest.raises(DataError, match="has no column 'three'"):
        opened(file, caption="three")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("cc3m.tsv", "a cat on a mat\thttp://x.org/1.jpg\n" * 3, "as CC3M's list does"),
        ("cc12m.tsv", "https://x.org/a?b=1\ta cat on a mat\n" * 3, "as CC12M's list does"),
        ("urls.csv", "url,caption,id\nhttp://x.org/1.jpg,a cat,1\n", "lists addresses of images ("),
        ("no.csv", "caption,more\na cat,b\n", "lists no images: its columns are caption, more"),
        ("empty.csv", "file,caption\nphotos/0.png,\n", "no row with an image and a text"),
        ("latin.csv", "file,caption\nphotos/0.png,caf\xe9\n".encode("latin-1"), "UTF-8 (line 2)"),
        ("cut.csv", 'file,caption\nphotos/0.png,"a cat\n', "1 row without"),
        ("commas.csv", "file,caption\nphotos/0.png,a cat, red\nphotos/1.png,b\n", "1 row without"),
        ("gone.csv", "file,caption\nnone/0.png,a cat\nnone/1.png,b\n", "none of the 2 files"),
    ],
)
def test_a_table_that_cannot_be_is_one_message(name, text, words, photos):
    with pytest.raises(DataError) as error:
        opened(written(photos, name, text))
    assert words in str(error.value), error.value
    assert str(error.value).count("\n") == 0


def test_a_folder_with_a_table_is_one_too(photos):
    written(photos, "captions.txt", "image,caption\nphotos/0.png,a\nphotos/1.png,b\n")
    assert len(opened(photos)) == 2 and task_of(str(photos)) == "clip"
    with pytest.raises(DataError, match="says no texts of images"):
        opened(photos / "photos")


def coco(photos: Path) -> Path:
    (photos / "annotations").mkdir()
    for part, numbers in (("train", (0, 1, 2)), ("val", (3, 4))):
        content = {
            "images": [{"id": 10 + i, "file_name": f"{i}.png"} for i in (*numbers, 9)],
            "annotations": [
                *({"image_id": 10 + i, "caption": f"number {i}\n"} for i in numbers),
                *({"image_id": 10 + i, "caption": f"a {part} picture"} for i in numbers),
                {"image_id": 10 + numbers[0], "caption": "  "},
                {"image_id": 99, "caption": "nobody's"},
                {"caption": 7},
            ],
        }
        written(photos, f"annotations/captions_{part}2017.json", json.dumps(content))
    return photos


def test_coco_captions_of_a_folder_and_of_a_file(photos):
    source = opened(coco(photos))
    assert task_of(str(photos)) == "clip"
    assert said(source)["photos/3.png"] == ("number 3", "a val picture")
    assert source.part.tolist() == [0, 0, 0, 1, 1]
    kinds = Counter(one.kind for one in source.left_out for _ in range(one.count))
    assert kinds["annotations whose caption is empty"] == 2 and kinds["annotations"] == 4
    assert kinds["images that are named and not there"] == 2
    assert kinds["images without a caption"] == 1
    one = opened(photos / "annotations" / "captions_val2017.json")
    assert [*said(one)] == ["photos/3.png", "photos/4.png"]
    written(photos, "annotations/captions_val2017.json", '{"annotations": [{"caption": "a"}]}')
    with pytest.raises(DataError, match="no COCO file that can be read"):
        opened(photos)


def shard(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def test_tar_files_with_texts(tmp_path):
    stream = io.BytesIO()
    picture().save(stream, "PNG")
    png = stream.getvalue()
    members = {
        **{"a.png": png, "a.txt": b"a cat ", "a.json": b'{"caption": "not this"}'},
        **{"b.png": png, "b.json": b'{"caption": ["one", "two", "one"], "url": "x"}'},
        **{"c.png": png, "c.txt": b"\xff\xfe\xff"},
        **{"d.png": png, "d.txt": b" \n"},
        **{"e.png": png},
        **{"f.txt": b"no image", "g.png": png, "g.cls": b"7"},
    }
    source = opened(shard(tmp_path / "0000.tar", members))
    assert [*said(source).values()] == [("a cat",), ("one", "two")]
    assert {one.kind: one.count for one in source.left_out} == {
        "images whose text is not UTF-8": 1,
        "images whose text is empty": 1,
        "images without a text": 2,
        "labels without an image": 1,
        "members that are neither": 1,
    }
    assert source.load(1).size == (20, 16)
    assert said(opened(tmp_path / "0000.tar")) == said(source)  # from the cache
    bare = shard(tmp_path / "bare.tar", {"a.png": png})
    with pytest.raises(DataError, match="no image with a text"):
        opened(bare)


def test_hugging_face_sets_with_texts(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict(
        {"image": [picture(i) for i in range(4)], "caption": [["a", "b "], [], ["c"], None]},
        features=datasets.Features(
            {"image": datasets.Image(), "caption": datasets.Sequence(datasets.Value("string"))}
        ),
    )
    table.save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved")
    assert said(source) == {"train/0": ("a", "b"), "train/2": ("c",)}
    assert source.left_out[0].count == 2 and source.load(1).size == (20, 16)
    with pytest.raises(UsageError, match="no column 'text'"):
        opened(tmp_path / "saved", caption="text")


def test_the_emoji_and_their_names():
    source = opened("samples:emoji-names")
    assert len(source) == len(source.targets.table) == 1819 and len(source.targets.names) == 9
    splits = open_splits("samples:emoji-names", seed=0, targets=Texts)
    train, val = (
        {splits.parts[p].targets.text(i) for i in range(len(splits.parts[p]))}
        for p in ("train", "val")
    )
    assert not train & val  # held-out emoji have names that nobody has seen
    assert task_of("samples:emoji-names") == "clip"
    with pytest.raises(DataError, match="learn that with"):
        open_data("samples:emoji-names")


def test_texts_are_what_they_are():
    texts = Texts.written([("a", "b"), ("c",), ("b",)])
    again = texts.rows(np.array([2, 0]))
    assert again.of(1) == ("a", "b") and again.table is texts.table and again.different() == 2
    assert texts.text(0) == "a | b" and texts.strata() is None and texts.present() == ()
    hashes = texts.hashes()
    assert len({*hashes.tolist()}) == 3
    assert (texts.rows(np.array([1])).hashes() == hashes[1]).all()
    assert (Texts.written([("b", "a"), ("c",)]).hashes()[0] != hashes[0]).all()
    joined = Texts.joined([texts.rows(np.array([1])), again])
    assert [joined.of(i) for i in range(3)] == [("c",), ("b",), ("a", "b")]
    assert texts.blank((4, 4))["texts"].tolist() == [-1, -1]


def test_data_check_tells_them(photos, capfd):
    file = written(
        photos, "pairs.csv", "file,caption\nphotos/0.png,a\nphotos/1.png,\nphotos/2.png,a"
    )
    code, out, err = vitrail(capfd, "data", "check", file, "--json")
    assert code == 0, err
    found = last_json(out)
    assert found["images"] == 2 and found["texts"] == {"different": 1, "most": 1, "shared": 2}
    assert "with texts" in out and "rows without a text, 1" in out
