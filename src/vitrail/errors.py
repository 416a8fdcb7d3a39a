"""What a user may have to be told: one message that says what, where and what to do.

Everything that is expected to go wrong (a missing folder, a misspelt field, a full disk) is raised
as a `VitrailError`; the command line prints its text and leaves with its exit code. Any other
exception is a fault of ours and keeps its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class VitrailError(Exception):
    """Something the user can mend. `exit_code` is the status that the command line leaves with."""

    exit_code = 3


class UsageError(VitrailError, ValueError):
    """The request itself is wrong: an unknown name, a value out of range."""

    exit_code = 2


class DataError(VitrailError):
    """The data, a file or the machine under it is at fault."""


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
