"""Detection: boxes of objects, from published weights or from scratch."""

from dataclasses import replace
from math import ceil

from vitrail.data.views.augment import AugmentConfig
from vitrail.models import ViTConfig, model_config
from vitrail.recipes.facts import Facts
from vitrail.recipes.finetune import data_of, row_of
from vitrail.recipes.scratch import batch_size, precision
from vitrail.runs import DataConfig, OptimConfig, TrainConfig, TuneConfig
from vitrail.tasks import DetectConfig
from vitrail.weights import started

_LEAST_TOKENS, _MOST_TOKENS = 16, 24
"""Tokens along a side, on a CPU: at 14 pixels each, 224 to 336. Few are fast: in as long a model
takes 2.8 times as many steps of 224 pixels as of 336 (benchmarks/results/detect.md)."""
_SIDE_ON_GPU = 640
_SMALL = 24.0
"""Pixels of a view: where most objects would be smaller, images are cut into tiles."""
_WANTED = 48.0
"""Pixels of a view that objects have, about: by them go the tokens of a view, and tiles."""
_AUGMENT = replace(AugmentConfig.off(), scale=(0.5, 2.0), hflip=0.5, jitter=0.3)
"""Large-scale jitter (2012.07177), a mirror image, colours."""


def detect(facts: Facts) -> TrainConfig:
    """A box around each object: the default where DATA holds boxes.

    Command: `vitrail train samples:trees --weights focus_s14`. A dense head on maps of several
    strides, which learns from a few hundred images; with weights early layers learn less, on a CPU
    the first half of a ViT nothing at all, and the head three times as fast. Images keep their shape. Where objects are so small in
    them that they would be lost, images are cut into tiles. Score: AP 13.8%, AP50 47.3% on two
    photographs held out, after 15 minutes on 2 cores (benchmarks/results/detect.md).
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
        height, width = (_side(facts, patch) for patch in model.patch)
        model = replace(model, image_size=(height, width), dropout=0.0)
        if opened and not facts.gpu:
            tune = replace(tune, last_blocks=(model.depth + 1) // 2)
    side = max(model.image_size)
    small = facts.object_side is not None and facts.object_side * side / facts.side < _SMALL
    tile = max(1, round(side * (facts.object_side or 0) / _WANTED)) if small else None
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


def _side(facts: Facts, patch: int) -> int:
    """Pixels of a view: on a CPU no more than its objects need, in patches of so many pixels."""
    if facts.gpu:
        return _SIDE_ON_GPU // patch * patch
    if not facts.object_side:
        return _MOST_TOKENS * patch
    tokens = ceil(_WANTED * facts.side / facts.object_side / patch)
    return patch * min(max(tokens, _LEAST_TOKENS), _MOST_TOKENS)


def _head(facts: Facts) -> DetectConfig:
    """That of the weights, if they have one; else a dense one that the machine can afford."""
    if facts.start and facts.start.boxes:
        return DetectConfig(**vars(facts.start.boxes.config))
    return DetectConfig() if facts.gpu else DetectConfig(width=128, convs=2, levels=4)
