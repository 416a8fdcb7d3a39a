"""Learning without labels: MoCo v3 (arXiv 2104.02057), DINO (2104.14294), LeJEPA (2511.08544), MAE
(2111.06377), and distillation of published features.
"""

from dataclasses import replace

from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.dino import PUBLISHED as DINO_VIEWS
from vitrail.data.views.moco import PUBLISHED
from vitrail.heads.masked import DecoderConfig
from vitrail.models import ViTConfig, model_config
from vitrail.recipes.facts import Facts
from vitrail.recipes.finetune import data_of, row_of
from vitrail.recipes.scratch import batch_size, precision
from vitrail.runs import DataConfig, OptimConfig, TrainConfig, TuneConfig
from vitrail.tasks import DinoConfig, DistillConfig, LejepaConfig, MaeConfig, MocoConfig
from vitrail.weights import started
from vitrail.weights.fetch import cached_file

_PLAIN = replace(AugmentConfig.off(), crop_scale=(0.2, 1.0), hflip=0.5, solarize=0.2)
"""Where minutes must do, what is unlike in its colours stays so, but for some second views."""
_JEPA = replace(PUBLISHED, crop_scale=(0.3, 1.0), blur=0.5)
_TAUGHT = replace(PUBLISHED, crop_scale=(0.14, 1.0), blur=0.0, solarize=0.0)
_TEACHER = "focus_s14"


def mocov3(facts: Facts) -> TrainConfig:
    """Features from images without labels.

    Command: `vitrail train photos/ --task mocov3`; the run is then a `--weights` of any other.
    As in the paper, positions are sines and cosines, and the patch projection stays as it is drawn;
    4,096 images a batch and 300 epochs are made smaller. On a CPU, where ten minutes are some
    hundred steps, two blocks learn more than six, and views keep their colours; projector and
    predictor are 1,024 wide, the rate is higher and the teacher quicker. From weights on, views are
    the paper's. A named `--model` has its own positions. Score: see benchmarks/results/mocov3.md.
    """
    row, model = _fresh(facts)
    config = TrainConfig(
        task="mocov3",
        data=DataConfig(path=facts.data, batch_size=batch_size(facts, 256 if facts.gpu else 128)),
        model=model,
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
    return continued(facts, config, PUBLISHED)


def dino(facts: Facts) -> TrainConfig:
    """Features from images without labels.

    Command: `vitrail train photos/ --task dino`; the run is then a `--weights` of any other. The
    paper has 65,536 prototypes, batches of 1,024 and 300 epochs; with few images fewer prototypes
    and batches of 256 have served (benchmarks of lightly and stable-pretraining). On a CPU, where
    ten minutes are some hundred steps, two blocks learn, views keep their colours, the teacher is
    quick and stays sure, and Sinkhorn and Knopp keep prototypes apart: with the mean, of a teacher
    that grew less sure, all images were as like to all of them (a loss of 6.82 after 76 steps; ln
    1,024 is 6.93).
    """
    row, model = _fresh(facts)
    config = TrainConfig(
        task="dino",
        data=DataConfig(path=facts.data, batch_size=batch_size(facts, 256 if facts.gpu else 128)),
        model=model,
        row=row,
        augment=DINO_VIEWS if facts.gpu else replace(_PLAIN, crop_scale=(0.4, 1.0)),
        dino=DinoConfig(prototypes=prototypes(facts.images))
        if facts.gpu
        else DinoConfig(
            prototypes=1024,
            hidden=512,
            out=128,
            small_views=4,
            momentum=0.98,
            freeze_last=0.05,
            centring="sinkhorn",
            teacher_temperature=(0.04, 0.04),
        ),
        optim=OptimConfig(
            lr=5e-4 if facts.gpu else 1e-3,
            weight_decay=0.04,
            final_weight_decay=0.4,
            warmup=0.1,
            clip=3.0,
            clip_by="tensor",
        ),
        minutes=60 if facts.gpu else 10,
        precision=precision(facts),
        evaluations=4,
        keep="best" if facts.classes else "last",
    )
    return continued(facts, config, DINO_VIEWS)


def lejepa(facts: Facts) -> TrainConfig:
    """Features from images without labels, by the rule with the fewest knobs.

    Command: `vitrail train photos/ --task lejepa`. Weights, rate and crops are the paper's
    (2511.08544); its 800 epochs are made minutes. On a CPU two blocks learn, from two views that
    show much of an image and two that show little, and keep their colours.
    """
    row, model = _fresh(facts)
    config = TrainConfig(
        task="lejepa",
        data=DataConfig(path=facts.data, batch_size=batch_size(facts, 256 if facts.gpu else 128)),
        model=model,
        row=row,
        augment=_JEPA if facts.gpu else replace(_PLAIN, crop_scale=(0.3, 1.0), solarize=0.0),
        lejepa=LejepaConfig() if facts.gpu else LejepaConfig(hidden=1024, locals=2),
        optim=OptimConfig(lr=5e-4 if facts.gpu else 1.5e-3, warmup=0.1, final_lr=0.001),
        minutes=60 if facts.gpu else 10,
        precision=precision(facts),
        evaluations=4,
    )
    return continued(facts, config, _JEPA)


def mae(facts: Facts) -> TrainConfig:
    """A start for fine-tuning from images without labels; as they are its features tell little.

    Command: `vitrail train photos/ --task mae`. Crops, rate and decay are the paper's (2111.06377);
    a decoder of 4 blocks of width 256 is for a ViT-S, one of 2 of width 128 for the two blocks that
    learn on a CPU. From weights of MAE its decoder learns on, and its positions stay.
    """
    decoder = (
        DecoderConfig(depth=4, width=256)
        if facts.gpu
        else DecoderConfig(depth=2, width=128, heads=4)
    )
    row, model = _fresh(facts)
    config = TrainConfig(
        task="mae",
        data=DataConfig(path=facts.data, batch_size=batch_size(facts, 512 if facts.gpu else 128)),
        model=replace(model, position="sincos_mae", pool="mean"),
        row=row,
        augment=replace(AugmentConfig.off(), crop_scale=(0.2, 1.0), hflip=0.5),
        mae=MaeConfig(decoder=decoder),
        optim=OptimConfig(lr=6e-4 if facts.gpu else 1.5e-3, beta2=0.95, warmup=0.1, final_lr=0.0),
        minutes=60 if facts.gpu else 10,
        precision=precision(facts),
        evaluations=4,
    )
    config = continued(facts, config, config.augment)
    if facts.start is None or (old := facts.start.decoder) is None:
        return config
    tune = replace(config.tune, head_warmup=0.0)  # the decoder knows its encoder
    if isinstance(config.model, ViTConfig) and config.model.has_table:
        tune = replace(tune, freeze=("position.table",))
    return replace(config, mae=MaeConfig(decoder=old.config), tune=tune)


def distill_features(facts: Facts) -> TrainConfig:
    """A small model learns what a published one says of images without labels.

    Command: `vitrail train photos/ --task distill-features`. The teacher is `focus_s14`, where it
    is fetched (`vitrail weights fetch focus_s14`), or `--distill.teacher`. Form, rate and queue are
    LightlyTrain's third. On a CPU nearly all of a step is the teacher's.
    """
    row, model = _fresh(facts)
    config = TrainConfig(
        task="distill-features",
        data=DataConfig(path=facts.data, batch_size=batch_size(facts, 128)),
        model=model,
        row=row,
        augment=_TAUGHT if facts.gpu else replace(_PLAIN, solarize=0.0),
        distill=DistillConfig(teacher=_TEACHER if cached_file(_TEACHER).is_file() else None),
        optim=OptimConfig(lr=5e-4 if facts.gpu else 1.5e-3, weight_decay=0.04, warmup=0.05),
        minutes=60 if facts.gpu else 10,
        precision=precision(facts),
        evaluations=4,
    )
    return continued(facts, config, _TAUGHT)


def _fresh(facts: Facts) -> tuple[str, ViTConfig]:
    """A row of MODELS, and what is made of it: positions that are no weights, a plain stem."""
    row = "vit_s16" if facts.gpu else "vit_pico8"
    model = model_config(row, classes=0, channels=facts.channels)
    assert isinstance(model, ViTConfig)
    return row, replace(model, stem="patch", position="sincos_moco")


def prototypes(images: int) -> int:
    """Of so many images: a power of 2 of about as many, from 1,024 to 65,536.

    >>> prototypes(1_455), prototypes(10_000), prototypes(1_281_167)
    (1024, 8192, 65536)
    """
    return 2 ** min(max(images.bit_length() - 1, 10), 16)


def continued(facts: Facts, config: TrainConfig, augment: AugmentConfig) -> TrainConfig:
    """The recipe where it starts from published weights, which fresh heads can spoil (k-NN from 80%
    to 10% in dinov2#204): the heads learn alone in the first quarter, after which the features are
    measured as they came; then all learns, slowly, until nothing has been better for a while.
    """
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
        augment=augment,
        row=row_of(opened),
        weights=opened.source,
        optim=replace(config.optim, lr=1e-5),
        tune=TuneConfig(layer_decay=0.75, head_warmup=0.25, head_lr=50.0),
        evaluations=8,
        patience=3,
        keep="best" if facts.classes else "last",
    )
