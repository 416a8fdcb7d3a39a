"""Tables on a terminal of any width: what has no room is left out and named, and nothing is cut."""

import shutil
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_ENDLESS = 10_000
"""Columns of what is no terminal: a file or a pipe takes lines of any length."""


class Column(NamedTuple):
    """One column of a table."""

    title: str
    rank: int = 0
    """Of the columns that have no room, those of the greatest rank go first; 0 always stays."""
    justify: Literal["left", "right"] = "right"


def width() -> int:
    """Columns of the terminal: COLUMNS where that is set, as shells do."""
    return shutil.get_terminal_size((_ENDLESS, 24)).columns


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
    """Print the columns that there is room for, and in a line below which are left out."""
    rows, room, kept = list(rows), width(), list(range(len(columns)))
    while _needed(table := _table(columns, rows, kept)) > room:
        last = max(kept, key=lambda i: (columns[i].rank, i))
        if columns[last].rank == 0:
            break  # there is nothing else to leave out, so the terminal breaks the lines
        kept.remove(last)
    Console(width=max(room, _needed(table)), highlight=False).print(table)
    if hidden := [column.title for i, column in enumerate(columns) if i not in kept]:
        print_text(f"(no room for {', '.join(hidden)}: --json has all)")


def print_facts(rows: Iterable[Sequence[str | Text]]) -> None:
    """Print rows without a header, the last cell of each broken between words where it is long."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for cells in rows:
        for _ in cells[len(table.columns) : -1]:
            table.add_column(no_wrap=True)
        table.add_row(*cells)
    Console(width=width(), highlight=False).print(table)


def print_text(sentence: str) -> None:
    """Print a sentence below a table, its lines broken between words."""
    Console(width=width(), highlight=False).print(Text(sentence))


def _needed(table: Table) -> int:
    """Columns of the terminal that a table takes when none of its cells is cut."""
    free = Console(width=_ENDLESS)
    return Measurement.get(free, free.options, table).maximum


def _table(columns: Sequence[Column], rows: Sequence[Sequence[str]], kept: Sequence[int]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i in kept:
        table.add_column(columns[i].title, justify=columns[i].justify, no_wrap=True)
    for row in rows:
        table.add_row(*(row[i] for i in kept))
    return table
