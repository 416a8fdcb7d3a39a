"""Detection: boxes of objects, from published weights or from scratch."""

from dataclasses import replace
from math import floor

from vitrail.data.views.augment import AugmentConfig
from vitrail.models import ViTConfig, model_config
from vitrail.recipes.facts import Facts
from vitrail.recipes.finetune import data_of, row_of
from vitrail.recipes.scratch import batch_size, precision
from vitrail.runs import DataConfig, OptimConfig, TrainConfig, TuneConfig
from vitrail.tasks import DetectConfig
from vitrail.weights import started

_LEAST_TOKENS, _MOST_TOKENS = 16, 24
"""Tokens along the longer side, on a CPU: at 14 pixels each, 224 to 336. Few are fast: in as long a
model takes 2.8 times as many steps of 224 pixels as of 336 (benchmarks/results/detect.md)."""
_SIDE_ON_GPU = 640
_SMALL = 24.0
"""Pixels of a view: where most objects would be smaller, images are cut into tiles."""
_WANTED = 48.0
"""Pixels of a view that objects have, about: by them go the tokens of a view, and tiles."""
_MOST_ENLARGED = 2
"""Times: a tile's pixels. A view is as many times as large as its image, along each side."""
_AUGMENT = replace(AugmentConfig.off(), scale=(0.5, 2.0), hflip=0.5, jitter=0.3)
"""Large-scale jitter (2012.07177), a mirror image, colours."""


def detect(facts: Facts) -> TrainConfig:
    """A box around each object: the default where DATA holds boxes.

    Command: `vitrail train samples:trees --weights focus_s14`. A dense head on maps of several
    strides, which learns from a few hundred images; with weights early layers learn less, on a CPU
    the first half of a ViT nothing at all, and the head three times as fast. Images keep their
    shape. Where objects are so small in them that they would be lost, images are cut into tiles.
    Score: AP 28.9%, AP50 43.0% on samples:scenes after 15 minutes on 2 cores
    (benchmarks/results/detect.md).
    """
    opened = facts.start
    if opened is None:
        row = "vit_s16" if facts.gpu else "vit_mini16"
        model = model_config(row, classes=0, channels=facts.channels)
        data = DataConfig(path=facts.data)
        optim, tune = OptimConfig(lr=1e-3), TuneConfig()
    else:
        row = row_of(opened)
        model = started(opened, (), classes=0, channels=facts.channels)
        data = data_of(facts, opened, 0)
        optim = OptimConfig(lr=1e-4, weight_decay=0.05)
        tune = TuneConfig(layer_decay=0.75, head_lr=3.0)
    if isinstance(model, ViTConfig):
        model = replace(model, image_size=_size(facts, model), dropout=0.0)
        if opened and not facts.gpu:
            tune = replace(tune, last_blocks=(model.depth + 1) // 2)
    side, tile = max(model.image_size), None
    if _small(facts, side) and facts.object_side is not None:
        tile = max(round(side * facts.object_side / _WANTED), -(-side // _MOST_ENLARGED))
    most = 8 if facts.gpu else 4  # where steps are dear, many of few images teach more
    return TrainConfig(
        task="detect",
        data=replace(
            data,
            batch_size=most if tile else batch_size(facts, most),  # of tiles there are many
            resize="tiles" if tile else "letterbox",
            tile=tile,
        ),
        model=model,
        row=row,
        weights=opened and opened.source,
        augment=_AUGMENT,
        detect=_head(facts),
        optim=optim,
        tune=tune,
        minutes=60 if facts.gpu else 15,
        precision=precision(facts),
        ema=0.99,
        evaluations=4,
    )


def _small(facts: Facts, side: int) -> bool:
    """Whether most objects would be lost in views whose longer side has so many pixels."""
    return facts.object_share is not None and facts.object_share * side < _SMALL


def _size(facts: Facts, model: ViTConfig) -> tuple[int, int]:
    """(height, width) of a view: of the shape that images have, for else what is around them would
    be computed too, or of a square tile; on a CPU no larger than objects need it.
    """
    longer = float(_SIDE_ON_GPU)
    if not facts.gpu:
        most, least = (n * max(model.patch) for n in (_MOST_TOKENS, _LEAST_TOKENS))
        needed = _WANTED / facts.object_share if facts.object_share else most
        longer = min(max(needed, least), most)
    aspect = 1.0 if _small(facts, round(longer)) else facts.aspect
    wanted = longer * min(1, aspect), longer * min(1, 1 / aspect)
    # Whole patches, of the largest size that the model has, and whole windows: mostly one more,
    # lest the image be made smaller for the want of a few pixels.
    units = (p * n for p, n in zip(model.coarsest, model.window or (1, 1), strict=True))
    height, width = (n * max(1, floor(w / n + 0.75)) for w, n in zip(wanted, units, strict=True))
    return height, width


def _head(facts: Facts) -> DetectConfig:
    """That of the weights, if they have one; else a dense one that the machine can afford."""
    if facts.start and facts.start.boxes:
        return DetectConfig(**vars(facts.start.boxes.config))
    return DetectConfig() if facts.gpu else DetectConfig(width=128, convs=2, levels=4)
