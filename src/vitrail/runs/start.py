"""Where a run may start from: published weights, a file, or another run."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vitrail.errors import UsageError, setting
from vitrail.heads import Detector, Segmenter
from vitrail.models import ViTConfig
from vitrail.runs.checkpoint import read_checkpoint
from vitrail.runs.config import TrainConfig
from vitrail.runs.folder import Run
from vitrail.runs.load import LoadedRun, load
from vitrail.tasks import backbone_of
from vitrail.text import TextConfig, Tokenizer, open_tokenizer
from vitrail.text.two_towers import TwoTowers
from vitrail.weights import OURS, Opened, open_pair, open_text_weights, open_weights
from vitrail.weights.box_heads import box_head_of
from vitrail.weights.heads import head_of
from vitrail.weights.load import check_told
from vitrail.weights.mae import DecoderWeights
from vitrail.weights.unseen import UNSEEN, lines


class OpenedText(NamedTuple):
    """What a text tower starts from."""

    config: TextConfig
    tokenizer: Tokenizer
    state: Mapping[str, Tensor] | None
    """None: random weights."""
    scale: float | None = None
    """What likenesses were multiplied with, where its image tower is the run's start as well."""
    bias: float | None = None


def open_text(config: TrainConfig, notify: Callable[[str], None]) -> OpenedText:
    """What `--text-weights` names, a run of our own with texts among them; or else the tokenizer
    alone, where it is known.
    """
    assert config.text is not None
    if config.text_weights is None:
        return OpenedText(config.text, open_tokenizer(config.text), None)
    opened = open_text_source(config.text_weights, notify)
    if config.weights != config.text_weights:
        return opened._replace(scale=None, bias=None)  # of another pair
    if opened.scale is None:
        whole = open_pair(config.text_weights)
        return opened._replace(scale=whole.scale, bias=whole.bias)
    return opened


def open_text_source(
    source: str, notify: Callable[[str], None] = lambda sentence: None
) -> OpenedText:
    """Weights of a text tower by name, file or run, with their tokenizer. Raises `DataError` for
    what is none, and where there is no tokenizer.
    """
    folder = Path(source).expanduser()
    if (folder / "config.yaml").is_file():
        model = load(Run(folder)).model
        if not isinstance(model, TwoTowers):
            raise UsageError(
                f"{setting('text_weights', source)}: that run has learned without texts"
            )
        bias = None if model.bias is None else model.bias.item()
        opened = OpenedText(model.text.config, model.words.tokenizer, model.text.state_dict())
        return opened._replace(scale=model.scale.exp().item(), bias=bias)
    config, state, tokenizer = open_text_weights(source, notify=notify)
    if tokenizer is None:
        raise UsageError(
            f"{setting('text_weights', source)} has no tokenizer beside it, and without its own a "
            f"text tower reads nothing: put its file there"
        )
    return OpenedText(config, tokenizer, state)


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
    config, state = loaded.config.model, backbone_of(loaded.model).state_dict()
    projection = getattr(loaded.model, "projection", None)
    if projection is not None and isinstance(config, ViTConfig):  # as in a file of CLIP's
        config = replace(config, classes=projection.out_features, head_bias=False)
        state = {**state, "head.weight": projection.weight.detach()}
    return Opened(
        source=source,
        sha256=loaded.sha256,
        layout=OURS,
        config=config,
        state=state,
        preprocess=loaded.preprocess,
        # Those of a run of images and texts are only what it was measured by.
        classes=() if isinstance(loaded.model, TwoTowers) else loaded.names,
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
