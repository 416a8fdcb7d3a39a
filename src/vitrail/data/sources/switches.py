"""Switches of another library, set for one thread: `datasets` has no parameters for what it asks.

A switch is a variable of a module that is true or false. While it is set here, others who look at
it (a server's other threads, a notebook's own loading) see what they would see without us.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_LOCK = threading.Lock()


class _Switch:
    """True or false by the thread that looks: some have a value of their own."""

    def __init__(self, others: object) -> None:
        self.others = others
        self.own: dict[int, list[bool]] = {}

    def __bool__(self) -> bool:
        own = self.own.get(threading.get_ident())
        return own[-1] if own else bool(self.others)


@contextmanager
def switched(module: ModuleType, name: str, value: bool) -> Iterator[None]:
    """While this lasts, `module.name` is as true as `value` in this thread, and as it was in all
    others; then it is the very object that it was.
    """
    me = threading.get_ident()
    with _LOCK:
        found = getattr(module, name)
        switch = found if isinstance(found, _Switch) else _Switch(found)
        switch.own.setdefault(me, []).append(value)
        setattr(module, name, switch)
    try:
        yield
    finally:
        with _LOCK:
            switch.own[me].pop()
            if not switch.own[me]:
                del switch.own[me]
            if not switch.own and getattr(module, name) is switch:  # else somebody has set it
                setattr(module, name, switch.others)
