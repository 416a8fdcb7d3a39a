"""Segmentation: a class for each pixel, from published weights or from scratch."""

from dataclasses import asdict, replace

from vitrail.data.views.augment import AugmentConfig
from vitrail.models import GmlpConfig, MixerConfig, ModelConfig, ViTConfig, model_config
from vitrail.recipes.facts import Facts
from vitrail.recipes.finetune import data_of, row_of
from vitrail.recipes.scratch import batch_size, precision
from vitrail.runs import DataConfig, OptimConfig, TrainConfig, TuneConfig
from vitrail.tasks import SegmentConfig
from vitrail.weights import Opened, started

_TOKENS = 16
"""Tokens along a side, on a CPU: at 14 pixels each, 224."""
_SIDE_ON_GPU = 512
_AUGMENT = replace(AugmentConfig.off(), scale=(0.5, 2.0), dominance=0.75, hflip=0.5, jitter=0.3)
"""Scale jitter, a crop that no class fills, a mirror image, colours: as mmsegmentation's."""


def segment(facts: Facts) -> TrainConfig:
    """A class for each pixel: the default where DATA holds masks.

    Command: `vitrail train samples:scenes --weights focus_s14`. With weights everything learns,
    early layers less, and the head, linear on four maps, ten times as fast; without, a small ViT
    whose fine map a few convolutions of the image make. Score: 40.9% mean IoU on samples:scenes in
    4 minutes on 2 cores (benchmarks/results/segment.md).
    """
    if facts.start is None:
        return _scratch(facts)
    opened = facts.start
    changes = {"classes": 0, "channels": facts.channels}
    model = started(opened, (), **changes)
    if isinstance(model, ViTConfig):
        height, width = (_SIDE_ON_GPU // p * p if facts.gpu else _TOKENS * p for p in model.patch)
        model = replace(model, image_size=(height, width), dropout=0.0)
    data = data_of(facts, opened, batch_size(facts, 16))
    return TrainConfig(
        task="segment",
        data=replace(data, resize="squash"),
        model=model,
        row=row_of(opened),
        weights=opened.source,
        augment=_AUGMENT,
        segment=_head_of(opened, model),
        optim=OptimConfig(lr=1e-4, weight_decay=0.05),
        tune=TuneConfig(layer_decay=0.75, head_lr=10.0),
        minutes=30 if facts.gpu else 8,
        precision=precision(facts),
        ema=0.99,
        evaluations=4,
    )


def _head_of(opened: Opened, model: ModelConfig) -> SegmentConfig:
    """That of the weights, if they have one; else what learns most in a few minutes."""
    if opened.head is not None:
        return SegmentConfig(**asdict(opened.head.config))
    one_map = isinstance(model, MixerConfig | GmlpConfig)
    short = isinstance(model, ViTConfig) and model.depth < 4
    return SegmentConfig(head="linear", taps="last" if one_map or short else "four")


def _scratch(facts: Facts) -> TrainConfig:
    row = "vit_s16" if facts.gpu else "vit_mini16"
    side = 384 if facts.gpu else 224
    return TrainConfig(
        task="segment",
        data=DataConfig(path=facts.data, batch_size=batch_size(facts, 16), resize="squash"),
        model=model_config(row, classes=0, channels=facts.channels, image_size=(side, side)),
        row=row,
        augment=_AUGMENT,
        segment=SegmentConfig(head="deeplab", fine="side"),
        optim=OptimConfig(lr=1e-3),
        minutes=30 if facts.gpu else 8,
        precision=precision(facts),
        ema=0.99,
        evaluations=4,
    )
