"""Where a run may start from: published weights, a file, or another run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitrail.heads import Detector, Segmenter
from vitrail.runs.checkpoint import read_checkpoint
from vitrail.runs.folder import Run
from vitrail.runs.load import LoadedRun, load
from vitrail.tasks import backbone_of
from vitrail.weights import OURS, Opened, open_weights
from vitrail.weights.box_heads import box_head_of
from vitrail.weights.heads import head_of
from vitrail.weights.load import check_told
from vitrail.weights.mae import DecoderWeights
from vitrail.weights.unseen import UNSEEN, lines


def open_start(
    source: str,
    told: Mapping[str, Any] | None = None,
    *,
    row: str | None = None,
    wanted: Mapping[str, Any] | None = None,
    notify: Callable[[str], None] = lambda sentence: None,
) -> Opened:
    """What `--weights` names: as `open_weights`, or the folder of a run of our own, which says all
    of itself.
    """
    folder = Path(source).expanduser()
    if not (folder / "config.yaml").is_file():
        return open_weights(source, told, row=row, wanted=wanted, notify=notify)
    loaded = load(Run(folder))
    check_told(told or {}, loaded.config.model, source)
    return Opened(
        source=source,
        sha256=loaded.sha256,
        layout=OURS,
        config=loaded.config.model,
        state=backbone_of(loaded.model).state_dict(),
        preprocess=loaded.preprocess,
        classes=loaded.names,
        notes=(),
        left_out=(),
        head=head_of(loaded.model, loaded.names) if isinstance(loaded.model, Segmenter) else None,
        boxes=box_head_of(loaded.model, loaded.names)
        if isinstance(loaded.model, Detector)
        else None,
        unseen=lines(loaded.config.model, dict.fromkeys(UNSEEN, "by the run's config")),
        decoder=_decoder(loaded),
    )


def _decoder(loaded: LoadedRun) -> DecoderWeights | None:
    """Of a run of MAE, what its checkpoint has beside the model."""
    if loaded.config.task != "mae":
        return None
    beside = read_checkpoint(loaded.folder).tensors.get("beside", {})
    state = {k.removeprefix("decoder."): t for k, t in beside.items() if k.startswith("decoder.")}
    return DecoderWeights(loaded.config.mae.decoder, state)
