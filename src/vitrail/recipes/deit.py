"""As DeiT and DynamicViT were trained: the values of their published code, for fewer images too.

Touvron et al., arXiv 2012.12877; Rao et al., arXiv 2106.02034.
"""

from dataclasses import replace

from vitrail.data.views.augment import AugmentConfig
from vitrail.errors import UsageError
from vitrail.models import DynamicViTConfig, ViTConfig, model_config
from vitrail.models.dynamicvit import pruned
from vitrail.recipes.facts import Facts
from vitrail.recipes.finetune import finetune
from vitrail.recipes.scratch import batch_size, precision
from vitrail.runs import DataConfig, OptimConfig, TrainConfig, TuneConfig
from vitrail.tasks import ClassifyConfig, DistillConfig
from vitrail.weights import started

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
"""ImageNet's, per channel."""

_STEP = 1024
"""Images a step, of DeiT; accumulated where they do not fit at once."""
_AT_ONCE = {True: 256, False: 64}
"""With a GPU, and without."""


def deit(facts: Facts) -> TrainConfig:
    """Three hundred epochs of strong augmentation, from random weights: DeiT-S, at 224 pixels.

    Command: `vitrail train imagenet/ --recipe deit`; with a teacher, as the paper has it, `--model
    deit_s16_distilled --distill.teacher RUN_OR_WEIGHTS`. The authors' models have 79.9 and 81.2 on
    ImageNet (their teacher is a RegNetY-16GF).

    Left out are repeated augmentation (each image three times a batch, 1902.05509: our batches hold
    an image once) and ten more epochs at the last rate. The code's colour jitter is without effect
    beside RandAugment, and so is not here. With fewer images than ImageNet's a step is smaller, so
    that an epoch has eight, and the learning rate follows it.
    """
    at_once = batch_size(facts, _AT_ONCE[facts.gpu])
    accumulate = max(1, batch_size(facts, _STEP) // at_once)
    mean: tuple[float, ...] = _MEAN
    std: tuple[float, ...] = _STD
    if facts.channels == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    return TrainConfig(
        data=DataConfig(path=facts.data, batch_size=at_once, crop=0.875, mean=mean, std=std),
        model=model_config(
            "deit_s16", classes=facts.classes, channels=facts.channels, drop_path=0.1
        ),
        row="deit_s16",
        augment=AugmentConfig(
            policy="randaugment", ops=2, magnitude=9.0, erase=0.25, mixup=0.8, cutmix=1.0
        ),
        classify=ClassifyConfig(label_smoothing=0.1),
        optim=OptimConfig(
            lr=5e-4 * at_once * accumulate / 512,
            weight_decay=0.05,
            warmup=5 / 300,
            final_lr=0.01,
            clip=None,
        ),
        epochs=300,
        accumulate=accumulate,
        precision=precision(facts),
        ema=0.99996,
    )


def dynamicvit(facts: Facts) -> TrainConfig:
    """Teach a trained ViT to drop tokens, with itself as the teacher.

    Command: `vitrail train my_photos/ --recipe dynamicvit --weights RUN_OR_WEIGHTS --model.keep
    0.7`. Thirty epochs; for the first five only the predictors and the head learn, at a rate of
    1e-3, then the rest too, at a hundredth of it; class token and positions never. The authors'
    DeiT-S loses half a point on ImageNet for 35% fewer operations (79.3 instead of 79.85).

    Otherwise as `deit`, but for two things that ours has differently: the rates follow no batch
    size, and each of the two parts has a warm-up and a cosine of its own. The teacher is left out
    where the weights are not known to be for the same classes.
    """
    config = finetune(facts)
    opened = facts.start
    assert opened is not None  # finetune refuses
    model = started(
        opened, facts.labels, classes=facts.classes, channels=facts.channels, dropout=0.0
    )
    if not isinstance(model, ViTConfig):
        raise UsageError(
            f"recipe dynamicvit makes a ViT drop tokens: {opened.source} is of the family "
            f"'{model.family}'"
        )
    if not isinstance(model, DynamicViTConfig):
        quarters = {model.depth * i // 4 for i in (1, 2, 3)} - {0}
        model = pruned(model, prune_before=tuple(sorted(quarters)))
    frozen = {"prefix": model.class_token or model.registers > 0}
    frozen["position.*"] = model.has_table
    taught = opened.head_for(facts.labels).order is not None
    strong = deit(facts)
    return replace(
        strong,
        data=replace(
            config.data,
            batch_size=strong.data.batch_size,
            train_size=None,
            crop=opened.preprocess.crop if opened.preprocess else 1.0,
        ),
        model=replace(model, drop_path=0.1),
        row=config.row,
        weights=opened.source,
        distill=DistillConfig(teacher=opened.source if taught else None),
        optim=replace(strong.optim, lr=1e-5, warmup=1 / 6),
        tune=TuneConfig(
            freeze=tuple(name for name, there in frozen.items() if there),
            head_lr=100.0,
            head_warmup=5 / 30,
        ),
        epochs=30,
    )
