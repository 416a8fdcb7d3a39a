"""What the processes of a run leave for their launcher, and for those that it starts after them."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import Store

from vitrail.disk import write_whole

TOLD_IN = "VITRAIL_TOLD_IN"
"""The variable with the folder in which `vitrail train --devices N` looks for what went wrong."""

LINGER_SECONDS = 5.0
"""A launcher ends all processes when one ends: this long the others leave to the one that tells."""


class Notes:
    """Values by name: in the folder that a launcher of ours gives (`TOLD_IN`), else in the store of
    another's.
    """

    def __init__(self, store: Store | None = None) -> None:
        self.folder = os.environ.get(TOLD_IN)
        self._store = store

    def put(self, name: str, value: Any) -> bool:
        """Leave `value`, if there is nothing of that name yet; whether there was nothing."""
        text = json.dumps(value)
        if self.folder:
            place = Path(self.folder) / name
            if place.exists():
                return False
            write_whole(place, text.encode())
            return True
        with suppress(RuntimeError):  # the store is gone
            if self._store and self._store.add(f"{name} count", 1) > 1:
                return False
            if self._store:
                self._store.set(name, text)
        return True

    def get(self, name: str) -> Any:
        """What was left; None if nothing was."""
        if self.folder:
            place = Path(self.folder) / name
            return json.loads(place.read_text(encoding="utf-8")) if place.exists() else None
        there = self._store is not None and self._store.check([name])
        return json.loads(self._store.get(name)) if self._store and there else None
