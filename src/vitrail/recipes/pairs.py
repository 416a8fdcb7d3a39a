"""Learning from images and their texts: CLIP (arXiv 2103.00020), SigLIP (2303.15343), LiT
(2111.07991).
"""

from dataclasses import replace

from vitrail.data.views.augment import AugmentConfig
from vitrail.errors import UsageError, setting
from vitrail.models import ViTConfig, model_config
from vitrail.recipes.facts import Facts
from vitrail.recipes.finetune import data_of, row_of
from vitrail.recipes.scratch import batch_size, precision
from vitrail.runs import DataConfig, OptimConfig, TrainConfig
from vitrail.tasks import PairConfig
from vitrail.text import text_config
from vitrail.weights import Opened, started

_TOKENS = 8
"""Along a side, on a CPU, where the image tower learns."""
_TOKENS_SEEN_ONCE = 12
"""Where it is locked."""


def clip(facts: Facts) -> TrainConfig:
    """Both towers learn, by softmax.

    Command: `vitrail train pairs.csv --task clip`. From scratch, on a CPU, both are small, and a
    few thousand pairs teach them little: with `--weights` and `--text-weights` they know something
    to begin with.
    """
    row = "vit_s16" if facts.gpu else "vit_mini16"
    model = model_config(row, classes=0, channels=facts.channels)
    config = TrainConfig(
        task="clip",
        data=DataConfig(path=facts.data, batch_size=batch_size(facts, 512 if facts.gpu else 128)),
        model=replace(model, image_size=(224, 224) if facts.gpu else (64, 64)),
        row=row,
        text=text_config("clip_s32_alt", depth=10 if facts.gpu else 4),
        text_row="clip_s32_alt",
        pair=PairConfig(width=256),
        augment=AugmentConfig(crop_scale=(0.5, 1.0)),
        optim=OptimConfig(lr=5e-4, weight_decay=0.2, beta2=0.98, warmup=0.1),
        minutes=60 if facts.gpu else 10,
        precision=precision(facts),
        evaluations=4,
    )
    if facts.start is None:
        return config
    return _from_weights(config, facts, _TOKENS, lr=1e-4)


def siglip(facts: Facts) -> TrainConfig:
    """Both towers learn, by a sigmoid for each pair, which small batches suit better.

    Command: `vitrail train pairs.csv --task siglip`. As `clip` otherwise.
    """
    config = clip(facts)
    pair = PairConfig(loss="sigmoid", width=config.pair.width, scale=10.0)
    return replace(config, task="siglip", pair=pair)


def lit(facts: Facts) -> TrainConfig:
    """The text tower learns what a locked image tower knows: the cheapest, and the best from few
    pairs.

    Command: `vitrail train samples:emoji-names --task lit --weights focus_s14 --text-weights
    minilm_l6`. The images are looked at once; a step then costs what the texts cost.
    """
    if facts.start is None:
        raise UsageError(
            f"LiT locks an image tower that knows something: add {setting('weights')} NAME_OR_FILE "
            f"(`vitrail weights` lists names)"
        )
    config = clip(facts)
    config = _from_weights(config, facts, _TOKENS_SEEN_ONCE, lr=3e-4)
    return replace(
        config,
        task="lit",
        pair=replace(config.pair, loss="softmax"),
        augment=AugmentConfig.off(),
        minutes=30 if facts.gpu else 5,
    )


def _joint_width(opened: Opened) -> int | None:
    """Of a CLIP's image tower, what its projection gives: it is kept. None: there is none."""
    config = opened.config
    projects = isinstance(config, ViTConfig) and not config.head_bias and not opened.classes
    return config.classes or None if projects else None


def _from_weights(config: TrainConfig, facts: Facts, tokens: int, lr: float) -> TrainConfig:
    """With a published image tower, at a size that the machine can afford."""
    opened = facts.start
    assert opened is not None
    model = started(opened, (), classes=0, channels=facts.channels)
    if isinstance(model, ViTConfig):
        height, width = ((224 // p if facts.gpu else tokens) * p for p in model.patch)
        model = replace(model, image_size=(height, width), dropout=0.0)
        if model.pool == "class" and not opened.config.classes:
            # Self-supervised: nothing was ever read off the class token alone.
            model = replace(model, pool="class_mean")
    return replace(
        config,
        data=data_of(facts, opened, config.data.batch_size),
        model=model,
        row=row_of(opened),
        weights=opened.source,
        pair=replace(config.pair, width=_joint_width(opened)),
        optim=replace(config.optim, lr=lr),
    )
