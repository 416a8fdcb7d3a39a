"""What has to be computed in full where all else is in half precision."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def precise(x: Tensor) -> Tensor:
    """In float32, where it is not more precise already: the smallest chances decide a loss."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Without mixed precision, of which there is none where nothing is computed."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
