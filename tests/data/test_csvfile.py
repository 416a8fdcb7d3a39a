"""Lists of images as they are found in the world: any dialect, odd names, no header."""

import csv
import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrail.data import CsvSource, Source, UnreadableImage, open_data
from vitrail.data.names import label_name
from vitrail.data.sources.csvfile import Columns
from vitrail.errors import DataError


def save(folder: Path, *names: str) -> Path:
    """A tiny picture under each name, each of another colour."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        colour = tuple(hashlib.blake2b(os.fsencode(file.name), digest_size=3).digest())
        Image.new("RGB", (2, 2), colour).save(file, "PNG")
    return folder


def write(folder: Path, text: str, encoding: str = "utf-8", name: str = "labels.csv") -> Path:
    file = folder / name
    file.write_bytes(text.encode(encoding))
    return file


def keys(source: Source) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def labels(source: Source) -> list[str]:
    return [source.targets.names[target] for target in source.targets.values]


def pairs(source: Source) -> list[tuple[str, str]]:
    return list(zip(keys(source), labels(source), strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path, "1.png", "2.png", "3.png", "big, 1.png", "real/brick/1.png")


# Columns


@pytest.mark.parametrize("image", ["file", "Image", "path", " filename ", "file_name"])
@pytest.mark.parametrize("label", ["label", "CLASS", "category"])
def test_columns_are_found_by_their_usual_names(tmp_path: Path, image: str, label: str) -> None:
    save(tmp_path, "a/1.png")
    file = write(tmp_path, f"id,{label},{image}\n7,cat,a/1.png\n8,dog,a/2.png\n")
    source = CsvSource(file)
    assert source.targets.names == ("cat", "dog")
    assert pairs(source) == [("a/1.png", "cat"), ("a/2.png", "dog")]
    assert source.load(0).size == (2, 2)
    with pytest.raises(UnreadableImage, match=r"a/2\.png: no such file"):
        source.load(1)


def test_columns_can_be_named(folder: Path) -> None:
    file = write(folder, "file,photo,label,kind,when\nx,1.png,y,cat,train\nx,2.png,y,dog,test\n")
    source = CsvSource(file, "photo", "Kind", "when")
    assert pairs(source) == [("1.png", "cat"), ("2.png", "dog")]
    assert source.part.tolist() == [0, 2]
    assert source.notes == ()


def test_columns_of_other_names_are_told_by_what_they_hold(folder: Path) -> None:
    file = write(folder, "nr,foto,art,wofür\n1,1.png,01,train\n2,2.png,1,testing\n")
    source = CsvSource(file, label_column="art")
    assert pairs(source) == [("1.png", "01"), ("2.png", "1")]
    assert source.part.tolist() == [0, 2]
    assert source.notes == (
        "labels.csv has the images in column 'foto', the splits in column 'wofür'",
    )
    assert CsvSource(write(folder, "foto;art\n1.png;cat\n")).notes == (
        "labels.csv has the images in column 'foto', the labels in column 'art'",
    )


def test_a_usual_name_does_not_make_a_column_of_files(folder: Path) -> None:
    source = CsvSource(write(folder, "image,photo,label\nfirst,1.png,cat\nsecond,2.png,dog\n"))
    assert keys(source) == ["1.png", "2.png"]
    assert source.notes == ("labels.csv has the images in column 'photo'",)


def test_classes_may_be_called_as_parts_are(folder: Path) -> None:
    source = CsvSource(write(folder, "file,vehicle\n1.png,train\n2.png,test\n"))
    assert (labels(source), source.part.tolist()) == (["train", "test"], [0, 0])


def test_the_split_column(folder: Path) -> None:
    file = write(folder, "file,label,Split\n1.png,a,train\n2.png,a,VAL\n3.png,a,valid\n")
    assert CsvSource(file).part.tolist() == [0, 1, 1]


def test_several_labels_in_a_cell(folder: Path) -> None:
    file = write(folder, "file,label\n1.png,red|round\n2.png,red\n3.png,big; red;red\n")
    source = CsvSource(file)
    assert source.targets.names == ("big", "red", "round")
    assert source.targets.values.dtype == np.uint8
    assert source.targets.values.tolist() == [[0, 1, 1], [0, 1, 0], [1, 1, 0]]


# Dialects

NAMES = ["a, b.png", "c.png", 'say "ah".png', "d\te.png", "two\nlines.png", "grün | 猫; it's.png"]
TEXTS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0|;\r\n"), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=150)
@given(
    classes=st.lists(TEXTS.filter(label_name), min_size=len(NAMES), max_size=len(NAMES)),
    comments=st.lists(TEXTS, min_size=len(NAMES), max_size=len(NAMES)),
    delimiter=st.sampled_from(",;\t| "),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    end=st.sampled_from(["\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    order=st.permutations(["file", "label", "comment"]),
)
def test_what_the_csv_module_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    classes: list[str],
    comments: list[str],
    delimiter: str,
    quoting: int,
    end: str,
    encoding: str,
    order: list[str],
) -> None:
    folder = tmp_path_factory.getbasetemp() / "dialects"
    if not folder.is_dir():
        save(folder, *NAMES)
    rows = [
        {"file": name, "label": label, "comment": comment}
        for name, label, comment in zip(NAMES, classes, comments, strict=True)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, order, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    source = CsvSource(write(folder, text.getvalue(), encoding))
    assert keys(source) == NAMES
    assert labels(source) == [label_name(label) for label in classes]
    assert source.left_out == ()


@settings(deadline=None, max_examples=150)
@given(
    rows=st.dictionaries(
        st.sampled_from(NAMES),
        st.sampled_from(
            ["big cat", "cat, fresh", "1,5", "x y, z", "it's", '5" pipe', "a\tb", "01"]
        ),
        min_size=1,
    ),
    header=st.sampled_from([[], ["foto", "art"], ["my photo", "my art, now"]]),
    delimiter=st.sampled_from(",;\t| "),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_few_rows_tell_the_dialect_without_a_header_that_is_known(
    tmp_path_factory: pytest.TempPathFactory,
    rows: dict[str, str],
    header: list[str],
    delimiter: str,
    quoting: int,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "few"
    if not folder.is_dir():
        save(folder, *NAMES)
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting)
    writer.writerows([header, *rows.items()] if header else rows.items())
    assert pairs(CsvSource(write(folder, text.getvalue()))) == list(rows.items())


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.sampled_from(["file", "label", "split", "c.png", "c", "train", "\\", "\ufeff", "é"])
        | st.sampled_from([*",;\t| \"'/.1\n\r\n\n"])
        | st.characters(exclude_categories=["Cs"])
    ).map("".join)
)
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    if not folder.is_dir():
        save(folder, "c.png")
    try:
        source = CsvSource(write(folder, text))
    except DataError:
        return
    assert keys(source) and all(label_name(name) for name in source.targets.names)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_as_spreadsheets_write_it(folder: Path, delimiter: str) -> None:
    text = f'file{delimiter}label{delimiter}\r\n"big, 1.png"{delimiter}grün{delimiter}\r\n\r\n'
    text += f"1.png{delimiter} rot {delimiter}{delimiter}\r\n{delimiter}{delimiter}\r\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        source = CsvSource(write(folder, text, encoding))
        assert pairs(source) == [("big, 1.png", "grün"), ("1.png", "rot")]


@pytest.mark.parametrize(
    "text",
    [
        '"file", "label"\n"1.png", "cat, fresh"\n"big, 1.png", "dog"\n',
        "'file','label'\n'1.png','cat, fresh'\n'big, 1.png','dog'\n",
        "file;label;price\n1.png;cat, fresh;1,5\nbig, 1.png;dog;2,5\n",
        "file\tlabel\n1.png \tcat, fresh\nbig, 1.png\t dog\n",
        'file   label\n1.png   "cat, fresh"\n"big, 1.png" dog  \n',
    ],
)
def test_the_delimiter_is_told_by_the_table(folder: Path, text: str) -> None:
    assert pairs(CsvSource(write(folder, text))) == [("1.png", "cat, fresh"), ("big, 1.png", "dog")]


def test_rows_that_do_not_fit_are_refused_together_with_the_way_out(folder: Path) -> None:
    more = "".join(f"{i}.png\n" for i in range(10, 20))
    file = write(folder, f"file,label\n1.png,apple,odd\n2.png,b\n\nbig, 1.png,c\n{more}")
    with pytest.raises(DataError) as refusal:
        CsvSource(file)
    text = str(refusal.value)
    assert "12 rows without the 2 fields of its header (file, label)" in text
    assert "line 2 has 3: 1.png,apple,odd; line 5 has 3: big, 1.png,c; line 6 has 1: 10.png" in text
    assert "and 7 more" in text
    assert 'as in "big,1.png"' in text and "as in red|round" in text


@pytest.mark.parametrize(
    "text, message",
    [
        ('file,label\n1.png,"cat\n2.png,dog\n', "line 2: a quotation mark opens a field, and none"),
        ('file,label\n"1" x.png,cat\n2.png,dog\n', r"1 row without .*line 2: .* is written twice"),
        ('"file,label\n1.png,cat\n', "line 1: a quotation mark opens a field, and none closes it"),
        (
            "file,kind,x\n1.png,cat,1\n",
            r"no label column \(.*its columns are file, kind, x; .* label_column='x'",
        ),
        ("", "lists no images: it is empty"),
        ("file,label\n", "lists no images"),
        ("file\n1.png\n", "no label column .*its columns are file"),
        ("file,label\n1.png,cat\n2.png,\n,\n,a\n", r"2 rows .*line 3: 'label' is .*line 5: 'file'"),
        ("file,label\n1.png,|;\n", "line 2: 'label' is empty for '1.png'"),
        ("file,label\n1.png,cat\n./1.png,dog\n", r"line 3: '\./1\.png' is in line 2 already"),
        ("file,label,split\n1.png,cat,tran\n", "line 2: the split is 'tran'.*train, val, test"),
        ("file,label,label\n1.png,cat,dog\n", "has 2 columns 'label'"),
        ("file,label\n1.png,a\0b\n", "it has zero bytes"),
    ],
)
def test_what_cannot_be_understood_is_refused_by_its_line(
    folder: Path, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        CsvSource(write(folder, text))


def test_a_named_column_that_is_not_there(folder: Path) -> None:
    file = write(folder, "file,label\n1.png,cat\n")
    for data in (file, folder):
        with pytest.raises(DataError, match=r"no column 'foto': its columns are file, label"):
            open_data(data, Columns(image="foto"))


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le"])
def test_another_encoding_is_refused(folder: Path, encoding: str) -> None:
    with pytest.raises(DataError, match=r"not text in UTF-8 \(line 3\).*iconv|has zero bytes"):
        CsvSource(write(folder, "file,label\n1.png,x\n2.png,grün\n", encoding))


# Lists without a header


@pytest.mark.parametrize("name", ["labels.csv", "val.txt"])
@pytest.mark.parametrize(
    "text", ["1.png 65\n2.png 7\n", "1.png\t65\n2.png\t7\n", "1.png,65\n2.png,7"]
)
def test_a_list_without_a_header(folder: Path, name: str, text: str) -> None:
    source = open_data(write(folder, text, name=name))
    assert pairs(source) == [("1.png", "65"), ("2.png", "7")]
    assert source.notes == (
        f"{name}, which has no header, has the images in column '1', the labels in column '2'",
    )


def test_a_class_that_is_called_as_a_column_makes_no_header(folder: Path) -> None:
    assert pairs(CsvSource(write(folder, "1.png,class\n2.png,path\n"))) == [
        ("1.png", "class"),
        ("2.png", "path"),
    ]


def test_of_several_columns_without_names_one_is_asked_for(tmp_path: Path) -> None:
    save(tmp_path, "images/cell0001.png", "images/cell0002.png")
    file = write(tmp_path, "images/cell0001.png  1.0  mono\nimages/cell0002.png  0.0  poly\n")
    with pytest.raises(
        DataError,
        match=r"no header.*1 \(images/cell0001\.png\), 2 \(1\.0\), 3 \(mono\); .*"
        r"label_column='3'",
    ):
        CsvSource(file)
    assert labels(CsvSource(file, label_column="3")) == ["mono", "poly"]
    assert labels(CsvSource(file, label_column="2")) == ["1.0", "0.0"]


# Names of files


def test_paths_may_be_absolute(tmp_path: Path) -> None:
    save(tmp_path, "elsewhere/1.png")
    (tmp_path / "lists").mkdir()
    source = CsvSource(write(tmp_path / "lists", f"file,label\n{tmp_path}/elsewhere/1.png,cat\n"))
    assert source.load(0).size == (2, 2)
    assert source.left_out == ()


def test_paths_of_windows_are_found(folder: Path) -> None:
    save(folder, "odd\\name.png")
    file = write(folder, "file,label\nreal\\brick\\1.png,a\nodd\\name.png,b\n")
    source = CsvSource(file)
    assert pairs(source) == [("real/brick/1.png", "a"), ("odd\\name.png", "b")]
    assert source.load(0).size == (2, 2)
    assert source.notes == ("labels.csv: \\ was read as / in 1 of 2 names",)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("C:\\real\\brick\\9.png", "on a Windows machine"),
        ("\\\\server\\9.png", "on a Windows machine"),
        ("https://example.org/9.png", "download the images"),
        ("brick/1.png", "'real/brick/1.png' is there: names are relative to the list's folder"),
        ("photos/2.png", "'2.png' is there"),
        ("9.png", "move it to the images"),
    ],
)
def test_where_no_image_is_there_the_likely_cause_is_told(
    folder: Path, name: str, hint: str
) -> None:
    with pytest.raises(DataError) as refusal:
        CsvSource(write(folder, f"file,label\n{name},cat\nnone.png,dog\n"))
    assert f"none of the 2 files that {folder}/labels.csv lists is in {folder}" in str(
        refusal.value
    )
    assert f"(line 2: {name}, line 3: none.png)" in str(refusal.value)
    assert hint in str(refusal.value)


def test_images_that_lie_above_the_list_are_pointed_at(folder: Path) -> None:
    (folder / "lists").mkdir()
    file = write(folder / "lists", "file,label\nreal/brick/1.png,cat\n")
    with pytest.raises(DataError, match=r"'\.\./real/brick/1\.png' is there"):
        CsvSource(file)


def test_images_that_are_not_there_are_counted(folder: Path) -> None:
    file = write(folder, "file,label\n1.png,cat\n7.png,dog\n2.png,dog\n8.png,dog\n")
    assert CsvSource(file).notes == (
        f"labels.csv: 2 of 4 files are not in {folder} (line 3: 7.png, line 5: 8.png)",
    )


def test_endings_that_a_list_leaves_out_are_found(tmp_path: Path) -> None:
    save(tmp_path, "a.png", "b.JPG", "c.d.png")
    file = write(tmp_path, "id_code,diagnosis\na,0\nb,01\nc.d,1\n")
    source = CsvSource(file)
    assert pairs(source) == [("a.png", "0"), ("b.JPG", "01"), ("c.d.png", "1")]
    assert source.notes[1] == (
        "labels.csv: names lack their ending, which was added: .png to 2, .JPG to 1"
    )
    save(tmp_path, "a.jpg")
    with pytest.raises(DataError, match=r"line 2: 'a' may be a\.jpg or a\.png"):
        CsvSource(file)


# What a list does not list


def test_images_beside_the_listed_ones_are_counted(tmp_path: Path) -> None:
    save(tmp_path, "in/1.png", "in/2.png", "in/3.png", "in/.h.png", "extra/4.png", "5.png")
    write(tmp_path, "file,label\nin/1.png,cat\n./in/2.png,dog\n")
    whole, file = open_data(tmp_path), open_data(tmp_path / "labels.csv")
    assert keys(whole) == keys(file) == ["in/1.png", "./in/2.png"]
    left, hidden = whole.left_out
    assert hidden.examples == ("in/.h.png",)
    assert (left.kind, left.count) == ("images that labels.csv does not list", 3)
    assert left.examples == ("5.png", "extra/4.png", "in/3.png")
    assert [(left.count, left.examples) for left in file.left_out] == [(1, ("in/3.png",))]


@pytest.mark.parametrize("text", ["ClassId,Name\n0,stop\n1,go\n", "ClassId,Name\n0,stop, now\n1\n"])
def test_a_labels_csv_of_something_else_is_no_reason_to_stop(tmp_path: Path, text: str) -> None:
    save(tmp_path, "0/a.png", "1/b.png")
    file = write(tmp_path, text)
    source = open_data(tmp_path)
    assert pairs(source) == [("0/a.png", "0"), ("1/b.png", "1")]
    assert any("labels.csv has no image column" in note for note in source.notes)
    for data, columns in ((file, Columns()), (tmp_path, Columns(label="Name"))):
        with pytest.raises(DataError, match=r"no image column .*its columns are ClassId, Name"):
            open_data(data, columns)


def test_without_images_both_ways_to_read_a_folder_are_told(tmp_path: Path) -> None:
    write(tmp_path, "ClassId,Name\n0,stop\n")
    with pytest.raises(DataError, match=r"no image column .*; and without it: no images in"):
        open_data(tmp_path)


def test_a_list_of_images_in_a_folder_below_says_so(tmp_path: Path) -> None:
    save(tmp_path, "train_images/a.png")
    file = write(tmp_path, "id_code,diagnosis\na,0\nb,1\n")
    with pytest.raises(DataError, match=r"no image column .*but 'train_images/a\.png' is there"):
        CsvSource(file)
