"""Pillow's warnings, kept from those who read images through vitrail, and from nobody else.

What Pillow only warns of is an error here (a huge image) or harmless (a damaged EXIF tag).
`warnings.catch_warnings` is not safe in threads, and a filter for all of Pillow would silence a
program's own use of it. So there is one filter that matches only while its thread reads here.
"""

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast


class _HerePattern(threading.local):
    """Stands where a filter has its pattern for the name of the module that warns."""

    reading = False
    pattern = "(?!)"
    """Matches nothing: for who copies filters into another thread or process (scikit-learn)."""

    def __reduce__(self) -> tuple[Any, ...]:
        return re.compile, (self.pattern,)

    def match(self, module: str) -> bool:
        return self.reading and module.startswith("PIL.")


_HERE = _HerePattern()
_FILTER = ("ignore", None, Warning, _HERE, 0)


@contextmanager
def pillow_is_quiet() -> Iterator[None]:
    """Nothing that Pillow warns of in this thread is seen, or becomes an error."""
    # The first filter that matches decides; whoever adds or resets filters does so to this list.
    filters = cast(list[Any], warnings.filters)
    if not filters or filters[0] is not _FILTER:
        with suppress(ValueError):
            filters.remove(_FILTER)
        filters.insert(0, _FILTER)
    before, _HERE.reading = _HERE.reading, True
    try:
        yield
    finally:
        _HERE.reading = before
