"""Tables kept as text (.csv, .tsv, .txt): their characters, their delimiter, their header, and rows
that all fit it.

The csv module parses; but csv.Sniffer is wrong about one small table in eighteen. Of the
delimiters , tab ; | and blanks, that one is taken under which the most of the first rows have as
many fields as the first of all, and a field that is known: a usual column's name, or an image.
Nothing is cut to fit: a row of another number of fields is refused, with its line.
"""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, product
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from vitrail.data.names import shortened
from vitrail.data.sources.formats import IMAGE_EXTENSIONS
from vitrail.errors import DataError

_DELIMITERS = ",\t;| "
_SAMPLE = 100
"""Lines that a delimiter is judged by."""
_LOOKED_AT = 20
"""Fields of a row that may be known."""
_SHOWN = 5
"""Rows at fault that a message tells."""
_FAULTS = {
    "unexpected end": "a quotation mark opens a field, and none closes it",
    "expected after": "a field goes on behind its quotation marks; one inside is written twice",
}
"""For what the csv module says."""


class Table(NamedTuple):
    """The rows of a table, each of `len(columns)` fields without blanks around them."""

    columns: tuple[str, ...]
    """The header's names; or, of a table without one, "1", "2", ..."""
    headed: bool
    rows: list[list[str]]
    lines: list[int]
    """Where in the file each row begins, from 1."""
    delimiter: str
    misfits: list[str]
    """What is wrong with the other rows."""


def read_table(file: Path, names: Sequence[str], is_file: Callable[[str], bool]) -> Table:
    """Read `file`, in UTF-8, or in UTF-16 with a byte order mark.

    A first row with an image's name, by its ending, is no header; nor is one with the name of a
    file (`is_file`), unless it has one of `names`, which are columns' in lower case. Raises
    DataError for a file that cannot be read.
    """
    text = _text(file)

    def is_known(field: str) -> bool:
        return (
            field.lower() in names
            or is_file(field)
            or (is_image_name(field) and not any(mark in field for mark in _DELIMITERS.strip()))
        )

    delimiter, quote = _dialect(text, is_known)
    found = list(_rows(text, delimiter, quote))
    if not found:
        return Table((), True, [], [], delimiter, [])
    first = found[0][1]
    if isinstance(first, str):
        raise DataError(f"{file}, line {found[0][0]}: {first}")
    width = len(_fitted(first, 0))
    headed = not any(map(is_image_name, first)) and (
        any(field.lower() in names for field in first) or not any(map(is_file, first))
    )
    columns = first[:width] if headed else [str(i + 1) for i in range(width)]
    table = Table(tuple(columns), headed, [], [], delimiter, [])
    written = io.StringIO(text, newline="").readlines()
    for line, row in found[1:] if headed else found:
        if isinstance(row, str):
            table.misfits.append(f"line {line}: {row}")
        elif len(fitted := _fitted(row, width)) == width:
            table.rows.append(fitted)
            table.lines.append(line)
        else:
            table.misfits.append(f"line {line} has {len(fitted)}: {shorten(written[line - 1], 80)}")
    return table


def refuse_misfits(file: Path, table: Table) -> None:
    """Raise DataError if there are rows that do not fit `table`, the content of `file`."""
    names = f"fields of its header ({shortened(table.columns)})"
    mark = {" ": "blank", "\t": "tab"}.get(table.delimiter, table.delimiter)
    refuse_rows(
        file,
        table.misfits,
        f"without the {len(table.columns)} {names if table.headed else 'fields of its first line'}",
        f'put a name with a {mark} in it into quotation marks, as in "big{table.delimiter}1.png", '
        "and several labels of one image into one field, as in red|round",
    )


def is_image_name(field: str) -> bool:
    """Whether a field ends as the name of an image does."""
    return field.lower().endswith(IMAGE_EXTENSIONS)


def refuse_rows(file: Path, faults: Sequence[str], what: str, way_out: str) -> None:
    """Raise DataError if there are `faults`, each a row's: all are counted, the first ones told."""
    if faults:
        rows = "1 row" if len(faults) == 1 else f"{len(faults):,} rows"
        more = f"; and {len(faults) - _SHOWN:,} more" if len(faults) > _SHOWN else ""
        told = "; ".join(faults[:_SHOWN]) + more
        raise DataError(f"{file}: {rows} {what}: {told}. To mend it, {way_out}")


def _text(file: Path) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file} is not text in {'UTF-16' if utf16 else f'UTF-8 (line {line})'}: save it as "
            f"UTF-8, in Excel as 'CSV UTF-8'; or, if it was made on Windows: "
            f"iconv -f WINDOWS-1252 -t UTF-8 {file.name} > utf8-{file.name}"
        ) from error
    if "\0" in text:
        raise DataError(f"{file} is no text, for it has zero bytes: save it as CSV in UTF-8")
    return text


def _dialect(text: str, is_known: Callable[[str], bool]) -> tuple[str, str]:
    """Delimiter and quotation mark; ' is one only where there is no " and more rows fit by it."""
    sample = "".join(islice(io.StringIO(text, newline=""), _SAMPLE))

    def likelihood(dialect: tuple[str, str]) -> float:
        rows = [[] if isinstance(row, str) else row for _, row in _rows(sample, *dialect)]
        width = len(_fitted(rows[0], 0)) if rows else 0
        if width < 2:
            return 0
        fit = sum(len(_fitted(row, width)) == width for row in rows)
        known = sum(any(map(is_known, row[:_LOOKED_AT])) for row in rows)
        return fit / len(rows) * (1 + known / len(rows))

    dialects = [(mark, quote) for quote, mark in product("\"'", _DELIMITERS)]
    return max(dialects[: len(_DELIMITERS)] if '"' in text else dialects, key=likelihood)


def _rows(text: str, delimiter: str, quote: str) -> Iterator[tuple[int, list[str] | str]]:
    """The first line, and the fields, of every row that is not blank; or what is wrong with it.

    Blanks before a quotation mark do not count; with blanks as the delimiter, any number is one.
    """
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quotechar=quote,
        skipinitialspace=True,
        strict=True,  # or else a quotation mark that is never closed would swallow the rest
    )
    while True:
        line = reader.line_num + 1
        try:
            row = [field.strip() for field in next(reader)]
        except StopIteration:
            return
        except csv.Error as error:
            told = (fault for words, fault in _FAULTS.items() if words in str(error))
            yield line, next(told, str(error))
        else:
            if any(row):
                yield line, row


def _fitted(row: list[str], width: int) -> list[str]:
    """The row without empty fields at its end that go beyond `width`."""
    end = len(row)
    while end > width and not row[end - 1]:
        end -= 1
    return row[:end]
