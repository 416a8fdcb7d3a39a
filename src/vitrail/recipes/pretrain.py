"""Learning without labels: MoCo v3 (arXiv 2104.02057)."""

from dataclasses import replace

from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.moco import PUBLISHED
from vitrail.models import ViTConfig, model_config
from vitrail.recipes.facts import Facts
from vitrail.recipes.finetune import data_of, row_of
from vitrail.recipes.scratch import batch_size, precision
from vitrail.runs import DataConfig, OptimConfig, TrainConfig, TuneConfig
from vitrail.tasks import MocoConfig
from vitrail.weights import started

_PLAIN = replace(AugmentConfig.off(), crop_scale=(0.2, 1.0), hflip=0.5, solarize=0.2)
"""Where minutes must do, what is unlike in its colours stays so, but for some second views."""


def mocov3(facts: Facts) -> TrainConfig:
    """Features from images without labels.

    Command: `vitrail train photos/ --task mocov3`; the run is then a `--weights` of any other.
    As in the paper, positions are sines and cosines, and the patch projection stays as it is drawn;
    4,096 images a batch and 300 epochs are made smaller. On a CPU, where ten minutes are some
    hundred steps, two blocks learn more than six, and views keep their colours; projector and
    predictor are 1,024 wide, the rate is higher and the teacher quicker. From weights on, views are
    the paper's. A named `--model` has its own positions. Score: see benchmarks/results/mocov3.md.
    """
    row = "vit_s16" if facts.gpu else "vit_pico8"
    model = model_config(row, classes=0, channels=facts.channels)
    assert isinstance(model, ViTConfig)
    config = TrainConfig(
        task="mocov3",
        data=DataConfig(path=facts.data, batch_size=batch_size(facts, 256 if facts.gpu else 128)),
        model=replace(model, stem="patch", position="sincos_moco"),
        row=row,
        augment=PUBLISHED if facts.gpu else _PLAIN,
        moco=MocoConfig(hidden=4096, momentum=0.99)
        if facts.gpu
        else MocoConfig(hidden=1024, momentum=0.98),
        optim=OptimConfig(lr=6e-4 if facts.gpu else 1.5e-3, weight_decay=0.1, warmup=0.1),
        minutes=60 if facts.gpu else 10,
        precision=precision(facts),
        evaluations=4,
    )
    if facts.start is None:
        return config
    opened = facts.start
    model = started(opened, (), classes=0, channels=facts.channels)
    if isinstance(model, ViTConfig):
        height, width = ((224 if facts.gpu else 112) // p * p for p in model.patch)
        model = replace(model, image_size=(height, width), dropout=0.0)
    return replace(
        config,
        data=data_of(facts, opened, config.data.batch_size),
        model=model,
        augment=PUBLISHED,
        row=row_of(opened),
        weights=opened.source,
        optim=OptimConfig(lr=5e-5, weight_decay=0.1, warmup=0.1),
        tune=TuneConfig(layer_decay=0.75, head_warmup=0.0),
    )
