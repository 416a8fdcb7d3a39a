"""Where a run computes: from the name in its config to a device that works."""

import torch

from vitrail.errors import DataError, setting


def pick_device(name: str) -> torch.device:
    """The device `name` (cpu, cuda, cuda:1, mps); auto takes a GPU when there is one.

    Raises `DataError` for one that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(
            f"this machine has no device '{name}': use {setting('device')} cpu"
        ) from error
    return device
