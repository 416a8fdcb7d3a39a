"""Arguments to a typed value, by tyro, with our exit code for bad usage."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

import tyro

from vitrail.data.csvfile import Columns

T = TypeVar("T")


@dataclass(frozen=True)
class ColumnFlags:
    """The columns of DATA, called as in `vitrail train`, or in short."""

    image_column: Annotated[str | None, tyro.conf.arg(aliases=("--image-column",))] = None
    """Its name; in a list without a header its number, from 1."""
    label_column: Annotated[str | None, tyro.conf.arg(aliases=("--label-column",))] = None
    split_column: Annotated[str | None, tyro.conf.arg(aliases=("--split-column",))] = None

    def columns(self) -> Columns:
        """As `open_data` takes them."""
        return Columns(self.image_column, self.label_column, self.split_column)


DataColumns = Annotated[ColumnFlags, tyro.conf.arg(name="data")]
NO_COLUMNS = ColumnFlags()
"""None named: they are found by their names, or their values."""


def parse(
    kind: type[T],
    args: Sequence[str],
    verb: str,
    about: str,
    default: T | None = None,
    *,
    flags: bool = False,
) -> T:
    """Parse `args` into the dataclass `kind`; tyro prints its own message and leaves with 2.

    With `flags` a switch is `--again`, without a value; in a config it is `--name True`.
    """
    switch = tyro.conf.FlagCreatePairsOff if flags else tyro.conf.FlagConversionOff
    settings = (switch, tyro.conf.AvoidSubcommands)
    if default is None:
        return tyro.cli(kind, args=args, prog=f"vitrail {verb}", description=about, config=settings)
    return tyro.cli(
        kind,
        args=args,
        prog=f"vitrail {verb}",
        description=about,
        default=default,
        config=settings,
    )
