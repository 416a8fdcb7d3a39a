"""What a user may have to be told: one message that says what, where and what to do.

Everything that is expected to go wrong (a missing folder, a misspelt field, a full disk) is raised
as a `VitrailError`; the command line prints its text and leaves with its exit code. Any other
exception is a fault of ours and keeps its traceback.

A message that names a setting does so by `setting`: the same fault is told to a program, whose
writer gives arguments, and at the command line, whose reader types flags.
"""

from collections.abc import Callable, Iterable
from difflib import get_close_matches


class VitrailError(Exception):
    """Something the user can mend. `exit_code` is the status that the command line leaves with."""

    exit_code = 3


class UsageError(VitrailError, ValueError):
    """The request itself is wrong: an unknown name, a value out of range."""

    exit_code = 2


class DataError(VitrailError):
    """The data, a file or the machine under it is at fault."""


Spelling = Callable[[str, tuple[object, ...]], str]
"""From the name of a setting, and its value if one is meant, to what its reader can type."""


def _as_argument(name: str, value: tuple[object, ...]) -> str:
    return f"{name.rpartition('.')[2]}={value[0]!r}" if value else name


_spelling: Spelling = _as_argument


def spell(how: Spelling = _as_argument) -> None:
    """Say how the settings in the messages of this process are spelt from now on.

    For the command line, which knows its verb's flags; without `how`, as in Python again.
    """
    global _spelling
    _spelling = how


def setting(name: str, *value: object) -> str:
    """The setting `name` of a config or function, with a value to give it, as its reader gives it.

    >>> setting("model.image_size", (32, 160))
    'image_size=(32, 160)'

    At the command line that is `--model.image-size 32 160`, or `--image-size 32 160` where a verb
    calls it so. A dotted name is one of a run's config.
    """
    return _spelling(name, value)


_MOST_NAMES = 20


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that does not exist, with the nearest one that does.

    >>> print(unknown_name("model", "vit_b_16", ["vit_b16", "vit_s16"]))
    unknown model 'vit_b_16': did you mean 'vit_b16'?
    """
    known = sorted(known)
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    more = f" and {len(known) - _MOST_NAMES} more" if len(known) > _MOST_NAMES else ""
    listed = f"known: {', '.join(known[:_MOST_NAMES])}{more}"
    hint = f"did you mean '{near[0]}'?" if near else listed
    return UsageError(f"unknown {kind} '{name}': {hint}")
