"""Arguments to a typed value, by tyro, with our exit code for bad usage."""

from collections.abc import Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")


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
