"""The data of a run: opened, divided, and what follows from it for the run's config."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vitrail.data import PartedSource, Splits, open_splits, open_streamed
from vitrail.data.pixels.greys import look_at_depths
from vitrail.data.sources.hub import place_of
from vitrail.data.targets import Boxes
from vitrail.errors import UsageError, setting
from vitrail.runs.config import TrainConfig
from vitrail.tasks import TASKS
from vitrail.tasks.detect import MOST, MOST_AT_ALL


def open_data_of(
    config: TrainConfig,
    assignment: Path | None = None,
    *,
    allow_missing: bool = False,
    source: PartedSource | None = None,
) -> Splits:
    """The images of a run, divided; `assignment` is its split.csv, to divide them as before, and
    `source` its data, where that is open already.

    A stream needs none: what it holds out follows from the config. Raises as `open_splits` does,
    and `UsageError` where nothing would be held out.
    """
    if config.data.streamed:
        splits = open_streamed(
            config.data.path,
            seed=config.seed,
            settings=config.data.stream,
            val_fraction=config.data.val_fraction,
            image_column=config.data.image_column,
            label_column=config.data.label_column,
        )
        stream = splits.stream
        if stream and config.epochs is not None and not (stream.epoch or stream.images):
            raise UsageError(
                f"nobody says how many images {config.data.path} has, so a run's length cannot be "
                f"told in epochs: say what counts as one ({setting('data.stream.epoch')} 100000), "
                f"or give the length in minutes ({setting('epochs', None)} "
                f"{setting('minutes', 60)})"
            )
        return splits
    return open_splits(
        config.data.path,
        seed=config.seed,
        val_fraction=config.data.val_fraction,
        image_column=config.data.image_column,
        label_column=config.data.label_column,
        split_column=config.data.split_column,
        caption_column=config.data.caption_column,
        rules=config.data.rules(),
        masks=config.data.masks,
        targets=TASKS[config.task].targets,
        assignment=assignment,
        allow_missing=allow_missing,
        source=source,
    )


def with_greys(config: TrainConfig, splits: Splits, notify: Callable[[str], None]) -> TrainConfig:
    """The config with the range of its data's deep greys, which a look at the training images
    finds unless it is given; `notify` is told. It is then the run's, whatever it is shown.
    """
    found = look_at_depths(splits.train, splits.val, config.data.grey_range)
    for sentence in found.sentences():
        notify(sentence)
    grey_range = found.greys.range if found.greys else config.data.grey_range
    return replace(config, data=replace(config.data, grey_range=grey_range))


def settled(config: TrainConfig, splits: Splits) -> TrainConfig:
    """The config as the data decides it, with names that hold from any folder."""
    prefix, place = place_of(config.data.path)
    classes, masks = config.data.stream.classes, config.data.masks
    stream = replace(config.data.stream, classes=classes and anywhere(classes))
    if masks.classes is not None:
        masks = replace(masks, classes=Path(anywhere(str(masks.classes))))
    detect = config.detect
    if isinstance(splits.train.targets, Boxes) and detect.max_detections is None:
        said = [part.targets for part in splits.parts.values()]
        objects = max(each.most for each in said if isinstance(each, Boxes))
        detect = replace(detect, max_detections=min(max(MOST, objects), MOST_AT_ALL))
    if splits.stream is not None:  # how many images there are is not always known
        held_out = len(splits.stream.left_out) or stream.held_out
        stream = replace(stream, epoch=len(splits.stream), held_out=held_out)
    return replace(
        config,
        model=replace(
            config.model,
            classes=len(splits.train.targets.names) if TASKS[config.task].classifies else 0,
        ),
        data=replace(
            config.data,
            path=f"{prefix}{place.resolve()}" if place.exists() else config.data.path,
            masks=masks,
            stream=stream,
        ),
        detect=detect,
        weights=config.weights and anywhere(config.weights),
        text_weights=config.text_weights and anywhere(config.text_weights),
        distill=replace(
            config.distill, teacher=config.distill.teacher and anywhere(config.distill.teacher)
        ),
    )


def anywhere(name: str) -> str:
    """The name of a file, of weights or of a run as it can be found from any folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
