"""The emoji sample set as it ships: rows, pictures and attribution agree with each other."""

import csv
import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import vitrail

FOLDER = Path(vitrail.__file__).parent / "data" / "sources" / "emoji"

# Changes only with scripts/build_emoji.py or one of its two pinned sources.
PER_LABEL = {
    "smileys_emotion": 166,
    "people_body": 325,
    "animals_nature": 157,
    "food_drink": 128,
    "travel_places": 218,
    "activities": 85,
    "objects": 261,
    "symbols": 223,
    "flags": 256,
}
NOTO_FLAG = re.compile(r"images/(1f1[ef][0-9a-f]-1f1[ef][0-9a-f]|1f3f4-.*-e007f)\.webp")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with (FOLDER / "labels.csv").open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        assert reader.fieldnames == ["file", "label", "name"]
        return list(reader)


@pytest.fixture(scope="module")
def attribution() -> str:
    return (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")


def test_one_row_an_emoji_in_nine_groups(rows: list[dict[str, str]]) -> None:
    assert Counter(row["label"] for row in rows) == PER_LABEL
    assert len({row["file"] for row in rows}) == len({row["name"] for row in rows}) == 1819


def test_rows_are_in_the_order_of_unicodes_chart(rows: list[dict[str, str]]) -> None:
    assert list(dict.fromkeys(row["label"] for row in rows)) == list(PER_LABEL)
    assert [row["name"] for row in (rows[0], rows[-1])] == ["grinning face", "flag Wales"]


def test_no_row_has_a_skin_tone(rows: list[dict[str, str]]) -> None:
    assert not [row["file"] for row in rows if re.search(r"1f3f[b-f]", row["file"])]


def test_every_file_is_there_and_no_other(rows: list[dict[str, str]]) -> None:
    found = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    assert found == {"labels.csv", "ATTRIBUTION.md"} | {row["file"] for row in rows}


def test_every_picture_is_a_square_webp_with_alpha(rows: list[dict[str, str]]) -> None:
    headers: Counter[tuple[str | None, tuple[int, int], str]] = Counter()
    for row in rows:
        with Image.open(FOLDER / row["file"]) as picture:  # reads the header, decodes nothing
            headers[picture.format, picture.size, picture.mode] += 1
    assert headers == {("WEBP", (128, 128), "RGBA"): len(rows)}


def test_the_set_stays_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 7_000_000


@pytest.mark.parametrize(
    "words",
    [
        "@lobehub/fluent-emoji-3d` 1.1.0",
        "unicode-emoji-json` 0.9.0",
        "Copyright (c) Microsoft Corporation.",
        "Copyright (c) 2019 Mu-An Chiou",
        "Permission is hereby granted, free of charge",
        "Licensed under the Apache License, Version 2.0",
        "UNICODE LICENSE V3",
    ],
)
def test_attribution_names_its_sources_and_licences(attribution: str, words: str) -> None:
    assert words in attribution


def test_attribution_gives_each_artist_the_right_share(
    rows: list[dict[str, str]], attribution: str
) -> None:
    noto = sum(NOTO_FLAG.fullmatch(row["file"]) is not None for row in rows)
    shares = re.findall(r"^\|[^|]+\| ([\d,]+) \|", attribution, flags=re.MULTILINE)
    assert [int(share.replace(",", "")) for share in shares] == [len(rows) - noto, noto, len(rows)]
