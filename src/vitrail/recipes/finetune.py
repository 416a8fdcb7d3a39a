"""From published weights to the user's own images: the usual ways, cheapest first.

| recipe        | what learns                         | source                               |
|---------------|-------------------------------------|--------------------------------------|
| `probe`       | the head, on features computed once | logistic regression, as DINOv2's     |
| `last-blocks` | the last four blocks and the head   | Yosinski et al., 1411.1792           |
| `lora`        | low-rank changes of attention, head | Hu et al., 2106.09685                |
| `finetune`    | everything, early layers less       | BEiT 2106.08254, MAE 2111.06377      |
| `vit-sgd`     | everything, as the ViT paper does   | 2010.11929, appendix B.1.1           |

All but the last start from the probe's head ("linear probe, then fine-tune", Kumar et al.,
2202.10054): a random head would first of all pull good features apart. Of a stream, which cannot be
looked through first, they start from zeros. What `probe` and `finetune`
reach on the sample set is in benchmarks/results/finetune.md.
"""

from dataclasses import replace
from typing import Any, Literal

from vitrail.data.views.augment import AugmentConfig
from vitrail.errors import UsageError, setting
from vitrail.models import ModelConfig, ViTConfig
from vitrail.recipes.facts import Facts
from vitrail.recipes.scratch import batch_size, precision
from vitrail.runs import DataConfig, OptimConfig, TrainConfig, TuneConfig
from vitrail.tasks import ClassifyConfig
from vitrail.weights import Opened, started

_TOKENS = 10
"""Tokens along a side, on a CPU."""
_TOKENS_TO_TRAIN = 8
"""Random crops enlarge what they show: fewer tokens show it in the same size (1906.06423)."""
_TOKENS_TO_PROBE = 12
_SIDE_ON_GPU = 224


def finetune(facts: Facts) -> TrainConfig:
    """Everything learns, each layer less than the one above it: the default with `--weights`.

    Command: `vitrail train my_photos/ --weights focus_s14`. On 2 CPU cores four minutes at 8x8
    tokens; with a GPU half an hour at 224 pixels.
    """
    opened = _start(facts)
    data = data_of(facts, opened, batch_size(facts, 128 if facts.gpu else 16))
    if isinstance(opened.config, ViTConfig) and not facts.gpu:
        height, width = opened.config.patch
        data = replace(data, train_size=(_TOKENS_TO_TRAIN * height, _TOKENS_TO_TRAIN * width))
    return TrainConfig(
        data=data,
        model=_model(facts, opened, _TOKENS),
        row=row_of(opened),
        weights=opened.source,
        augment=AugmentConfig(crop_scale=(0.5, 1.0)),
        classify=ClassifyConfig(label_smoothing=0.1),
        optim=OptimConfig(lr=4e-4),
        tune=TuneConfig(layer_decay=0.65, head_init=_head_init(facts)),
        minutes=30 if facts.gpu else 3.9,
        precision=precision(facts),
        ema=0.99,
        evaluations=4,
    )


def probe(facts: Facts) -> TrainConfig:
    """A linear probe: the backbone stays as it is, and looks at every image once.

    Command: `vitrail train my_photos/ --weights focus_s14 --recipe probe`.
    """
    opened = _start(facts)
    config = finetune(facts)
    return replace(
        config,
        method="probe",
        data=replace(config.data, train_size=None),
        model=_model(facts, opened, _TOKENS_TO_PROBE),
        augment=AugmentConfig.off(),
        classify=ClassifyConfig(),
        tune=TuneConfig(),
        ema=0.0,
    )


def last_blocks(facts: Facts) -> TrainConfig:
    """The last four blocks learn: two thirds of the cost of a step, and less to go wrong.

    Command: `vitrail train my_photos/ --weights focus_s14 --recipe last-blocks`.
    """
    config = finetune(facts)
    tune = TuneConfig(last_blocks=4, layer_decay=0.9, head_init=_head_init(facts))
    return replace(config, tune=tune)


def lora(facts: Facts) -> TrainConfig:
    """Low-rank changes of every block's attention learn: a fiftieth of the optimiser's memory.

    Command: `vitrail train my_photos/ --weights focus_s14 --recipe lora`.
    """
    config = finetune(facts)
    return replace(
        config,
        optim=OptimConfig(lr=1e-3, weight_decay=0.0),
        tune=TuneConfig(lora_rank=8, lora_alpha=16.0, head_init=_head_init(facts)),
    )


def vit_sgd(facts: Facts) -> TrainConfig:
    """As the ViT paper fine-tunes: SGD with momentum, no weight decay, cosine, clipped at norm 1.

    Command: `vitrail train my_photos/ --weights augreg_vit_b16 --recipe vit-sgd`. Crops are of
    Inception's kind (5% to all of the area), a new head starts at zero. The paper's learning rate
    of 0.03 is for batches of 512, and follows the batch here.
    """
    config = finetune(facts)
    return replace(
        config,
        augment=AugmentConfig(crop_scale=(0.05, 1.0)),
        classify=ClassifyConfig(),
        optim=OptimConfig(
            name="sgd", lr=0.03 * config.data.batch_size / 512, weight_decay=0.0, final_lr=0.0
        ),
        tune=TuneConfig(),
        ema=0.0,
    )


def demo(facts: Facts) -> TrainConfig:
    """`make demo`: the emoji sample set, from a pretrained ViT-S/14, in four minutes on 2 cores.

    Command: `vitrail train samples:emoji --recipe demo`. Score: see benchmarks/results/finetune.md.
    The first ten of its twelve blocks: the last two were bent to finding what stands out, and a
    probe of the tenth knows more of what things are.
    """
    config = finetune(facts)
    if not isinstance(config.model, ViTConfig):
        return config
    return replace(config, model=replace(config.model, depth=min(10, config.model.depth)))


def _start(facts: Facts) -> Opened:
    if facts.start is None:
        raise UsageError(
            f"this recipe starts from published weights: add {setting('weights')} NAME_OR_FILE "
            "(`vitrail weights` lists names)"
        )
    return facts.start


def _head_init(facts: Facts) -> Literal["zeros", "probe"]:
    return "zeros" if facts.streamed else "probe"


def row_of(opened: Opened) -> str:
    """The name in MODELS that the weights are of; empty if they have a shape of their own."""
    return next(iter(opened.fits), "")


def _model(facts: Facts, opened: Opened, tokens: int) -> ModelConfig:
    """The published model at a size that the machine can afford; no ViT: at its own size."""
    config = opened.config
    changes: dict[str, Any] = {"classes": facts.classes, "channels": facts.channels}
    if not isinstance(config, ViTConfig):
        return started(opened, facts.labels, **changes)
    sides = (tokens * p if not facts.gpu else _SIDE_ON_GPU // p * p for p in config.patch)
    changes |= {"image_size": tuple(sides), "dropout": 0.0}
    if config.pool == "class" and not config.classes:
        # Self-supervised: nothing was ever read off the class token alone.
        changes["pool"] = "class_mean"
    return started(opened, facts.labels, **changes)


def data_of(facts: Facts, opened: Opened, batch: int) -> DataConfig:
    """Images as the weights were taught to see them."""
    data = DataConfig(path=facts.data, batch_size=batch)
    shown = opened.preprocess
    if shown is None:
        return data
    if facts.channels == 1:
        shown = shown.grey
    return replace(data, mean=shown.mean, std=shown.std, interpolation=shown.interpolation)
