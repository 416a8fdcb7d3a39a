"""Arguments to a typed value, by tyro, with our exit code for bad usage."""

import dataclasses
import functools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import tyro

from vitrail.errors import spell

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

    With `flags` a switch is `--again`, without a value; in a config it is `--name True`. From here
    on messages name the flags of `kind`.
    """
    spell_flags(kind, flags=flags)
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


def parse_among(kind: type[T], args: Sequence[str], verb: str) -> tuple[T, list[str]]:
    """The flags of `kind` among `args`, which may hold others as well; and those others."""
    return tyro.cli(
        kind, args=args, prog=f"vitrail {verb}", return_unknown_args=True, add_help=False
    )


def flags_among(
    paths: Sequence[str], args: Sequence[str], verb: str
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The words behind those flags among `args` that are for fields of a config, by their dotted
    names; and the arguments that are left.
    """
    # tyro names a flag by its field or by a mark, and a field's name has no dots.
    marked = ((path, Annotated[tuple[str, ...] | None, tyro.conf.arg(name=path)]) for path in paths)
    fields = [(f"flag{i}", hint, None) for i, (_, hint) in enumerate(marked)]
    kind: type[Any] = dataclasses.make_dataclass("Flags", fields)
    found, rest = parse_among(kind, args, verb)
    said = zip(paths, dataclasses.astuple(found), strict=True)
    return {path: words for path, words in said if words is not None}, rest


def spell_flags(kind: type[Any], *, flags: bool = False) -> None:
    """Let messages name settings as the flags of `kind`, and in words where it has no such flag."""

    def flag(name: str, value: tuple[object, ...]) -> str:
        known = _known(kind, flags)  # type: ignore[arg-type]  # a class can be a key
        same = [path for path in known if path == name or path.endswith(f".{name}")]
        others = [path for path in known if name.endswith(f".{path}")]
        # A bare name is one of a model's config, of which a text tower's has some too.
        nearest = sorted(same or others, key=lambda path: (path.startswith("text."), len(path)))
        path = nearest[0] if nearest else ""
        words = [f"--{path.replace('_', '-')}" if path else name.rpartition(".")[2]]
        if value != (True,) or not known.get(path):
            for each in value:
                words += map(str, each) if isinstance(each, tuple) else [shlex.quote(str(each))]
        return " ".join(words)

    spell(flag)


@functools.cache
def _known(kind: type[Any], flags: bool) -> Mapping[str, bool]:
    return dict(_walk(kind, "", flags))


def _walk(kind: type[Any], prefix: str, flags: bool) -> Iterator[tuple[str, bool]]:
    """The dotted names of all that a flag of `kind` can be for, and whether it is a switch."""
    hints = get_type_hints(kind, include_extras=True)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        marks = getattr(hint, "__metadata__", ())
        if tyro.conf.Positional in marks or tyro.conf.Suppress in marks:
            continue
        names = [mark.name for mark in marks if getattr(mark, "name", None) is not None]
        path = f"{prefix}{(names or [item.name])[0].replace('-', '_')}"
        switches = flags and tyro.conf.FlagConversionOff not in marks
        nested = list(_dataclasses(hint))
        for part in nested:  # several, where a value may be of one family or another
            yield from _walk(part, f"{path}." if path else "", switches)
        if not nested:
            yield path, switches and hint is bool


def _dataclasses(hint: Any) -> Iterator[type[Any]]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for part in get_args(hint):
        yield from _dataclasses(part)
