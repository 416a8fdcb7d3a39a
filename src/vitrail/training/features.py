"""What a model's head sees of every image, computed once and kept on disk.

A file's name is the SHA-256 of all that its content follows from: the backbone's weights and
shape, the preprocessing, the precision, and every image by key and stamp. So what was changed is
never served stale, and there is nothing to invalidate; the folder may be emptied at any time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.data.batches.loader import EvalLoader
from vitrail.data.sources.kept import keep, kept_place, read_kept
from vitrail.data.views.canvas import Canvas
from vitrail.errors import DataError, UsageError, setting
from vitrail.models import Model
from vitrail.tasks.kept import key_of
from vitrail.tasks.tta import Look, seen, whole_of

_FORMAT = "vitrail features 3"
HEADS = ("head", "head_distilled")
"""What a model calls its linear classifiers."""
_LOOKS = (Look(), Look(mirrored=True))

Tell = Callable[[int], None]
"""Told how many images have been looked at, after each batch."""


class HeadInputs(NamedTuple):
    """The input of a model's head, or of its heads side by side, on the CPU in float32."""

    values: Float[Tensor, "v n d"]
    """Of `v` views: the evaluation view, and, if asked for, its mirror image."""
    indices: Int[np.ndarray, " n"]
    """Which images of the source these are."""
    skipped: dict[str, str]
    """Key and reason of every image that cannot be read."""


def heads(model: Model) -> list[nn.Linear]:
    """The linear classifiers, whose logits are averaged: one, or two in DeiT.

    Raises `UsageError` for a model whose head has no bias to put a solution into.
    """
    found = [head for name in HEADS if (head := getattr(model, name, None)) is not None]
    if not found or any(head.bias is None for head in found):
        raise UsageError(f"a probe needs a head with a bias: {setting('model.head_bias', True)}")
    return found


def head_inputs(
    model: Model,
    loader: EvalLoader,
    *,
    precision: str,
    mirrored: bool = False,
    tell: Tell = lambda images: None,
) -> HeadInputs:
    """The head's inputs for every readable image, from the cache if they are there.

    The model is left in evaluation mode. A cache that is damaged, or cannot be written, costs the
    time to compute anew and nothing else.
    """
    facts = (_FORMAT, precision, mirrored)
    key = key_of(model, loader.preprocess, loader.source, facts, without=HEADS)
    file = kept_place("features", key)
    if known := read_kept(file):
        loader.skipped.update(known.about)
        values = torch.from_numpy(known.arrays["values"])
        return HeadInputs(values, known.arrays["indices"], known.about)
    views = _LOOKS if mirrored else _LOOKS[:1]
    parts, indices = [], []
    model.eval()
    mixed = torch.autocast(loader.device.type, torch.bfloat16, enabled=precision == "bfloat16")
    with torch.no_grad(), mixed, _listening(heads(model)) as heard:
        for batch in loader:
            canvas = Canvas(batch.images, batch.extent)
            rows = []
            for look in views:
                model(*seen(canvas, look, whole_of(model)))
                rows.append(torch.cat(heard, dim=1).float().cpu())
                heard.clear()
            parts.append(torch.stack(rows))
            indices.append(batch.indices)
            tell(sum(map(len, indices)))
    if not parts:
        raise DataError(f"none of the {len(loader.source)} images can be read")
    found = HeadInputs(torch.cat(parts, dim=1), np.concatenate(indices), dict(loader.skipped))
    keep(file, {"values": found.values.numpy(), "indices": found.indices}, found.skipped)
    return found


@contextmanager
def _listening(listened: list[nn.Linear]) -> Iterator[list[Tensor]]:
    """A list that the layers' inputs are added to whenever they run."""
    heard: list[Tensor] = []

    def hear(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heard.append(inputs[0])

    hooks = [layer.register_forward_pre_hook(hear) for layer in listened]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()
