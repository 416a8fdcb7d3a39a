"""Every task by name: what it learns from, and how it is made of a run's config."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from vitrail.data.targets import (
    Boxes,
    Classes,
    Coding,
    MaskArrays,
    Masks,
    Nothing,
    Targets,
    Texts,
)
from vitrail.data.views.augment import AugmentConfig
from vitrail.data.views.dino import dino_views, small_size
from vitrail.data.views.moco import moco_views
from vitrail.errors import DataError, UsageError, setting
from vitrail.heads.detector import Detector, build_detector
from vitrail.heads.segmenter import Segmenter, build_segmenter
from vitrail.models import ViT, build
from vitrail.tasks.classify import Classify
from vitrail.tasks.detect import Detect
from vitrail.tasks.dino import Dino
from vitrail.tasks.distill import Distill, DistillConfig, Teacher
from vitrail.tasks.distill_features import DistillFeatures
from vitrail.tasks.embed import Embed
from vitrail.tasks.kept import KeptMaps
from vitrail.tasks.lejepa import Lejepa, lejepa_views
from vitrail.tasks.mae import Mae
from vitrail.tasks.moco import Moco, draw_as_moco, pooled_width
from vitrail.tasks.pair import Pair
from vitrail.tasks.prune import Prune
from vitrail.tasks.segment import Segment
from vitrail.tasks.task import Task
from vitrail.text import TextConfig, build_text
from vitrail.text.two_towers import TwoTowers

if TYPE_CHECKING:
    from vitrail.runs import TrainConfig


class Kind(NamedTuple):
    """How a task is made. `targets` are those of the training data."""

    targets: type[Targets]
    """What it learns from; of `Nothing`, labels are kept where there are any, to measure by."""
    classifies: bool
    """Whether the backbone has a classifier of its own."""
    model: Callable[["TrainConfig", Any], Any]
    """config, targets -> the model that is judged, as it is before it has learned."""
    learn: Callable[[Any, "TrainConfig", Any, Teacher | None], Task]
    """model, config, targets, teacher -> the task as it is trained."""
    judge: Callable[[Any, "TrainConfig", Any, str], Task]
    """model, config, targets, test-time augmentation -> the task as it is measured and asked."""
    stated: Callable[[Mapping[str, Any]], Targets]
    """What a checkpoint's state says of the targets, of no image."""
    why: str = ""
    """Why a run cannot follow what is `refused`."""
    refused: Callable[["TrainConfig"], Mapping[str, bool]] = lambda config: {}
    """config -> settings beside those that only classification has, in words, and whether they are
    asked for: the task would have to ignore them."""
    views: Callable[["TrainConfig"], tuple[AugmentConfig, ...]] = lambda config: (config.augment,)
    """config -> what happens to each view of a training image."""
    facts: Callable[["TrainConfig"], Iterable[tuple[str, str]]] = lambda config: ()
    """config -> what the report says of how it learned: names and values."""
    teacher: Literal["none", "answers", "features"] = "none"
    """What a teacher may be asked for (`distill.teacher`)."""
    few: Callable[[], str] = lambda: ""
    """What to say to a run that starts at random from fewer than `FEW` images."""


def _classifier(config: "TrainConfig", targets: Classes) -> Any:
    if len(targets.names) != config.model.classes:
        raise DataError(
            f"there are {len(targets.names)} classes, but the model has {config.model.classes}"
        )
    return build(config.model)


def _classify(model: Any, config: "TrainConfig", targets: Classes, teacher: Teacher | None) -> Task:
    if config.model.family == "dynamicvit":
        return Prune(model, config.classify, targets, config.prune, teacher)
    if teacher:
        return Distill(model, config.classify, targets, teacher, config.distill)
    return Classify(model, config.classify, targets)


def _classified(model: Any, config: "TrainConfig", targets: Classes, tta: str) -> Task:
    return Classify(model, config.classify, targets, tta)


def _classes(state: Mapping[str, Any]) -> Classes:
    names = tuple(map(str, state["classes"]))
    empty = np.zeros((0, len(names)), np.uint8) if state["multi_label"] else np.zeros(0, np.int64)
    return Classes(names, empty)


def _segmenter(config: "TrainConfig", targets: Masks) -> Segmenter:
    return build_segmenter(build(config.model), config.segment, len(targets.names))


def _segment(model: Any, config: "TrainConfig", targets: Masks, teacher: Teacher | None) -> Task:
    kept = KeptMaps() if config.tune.kept_views else None
    return Segment(model, config.segment, targets, config.preprocess(), config.seed, kept=kept)


def _segmented(model: Any, config: "TrainConfig", targets: Masks, tta: str) -> Task:
    return Segment(model, config.segment, targets, config.preprocess(), config.seed, tta)


def _masks(state: Mapping[str, Any]) -> Masks:
    return Masks(tuple(map(str, state["classes"])), MaskArrays((), ""), Coding({}))


def _detector(config: "TrainConfig", targets: Boxes) -> Detector:
    return build_detector(build(config.model), config.detect, len(targets.names))


def _detect(model: Any, config: "TrainConfig", targets: Boxes, teacher: Teacher | None) -> Task:
    return Detect(model, config.detect, targets, config.preprocess())


def _detected(model: Any, config: "TrainConfig", targets: Boxes, tta: str) -> Task:
    return Detect(model, config.detect, targets, config.preprocess(), tta)


def _boxes(state: Mapping[str, Any]) -> Boxes:
    return Boxes.listed(tuple(map(str, state["classes"])), (), lambda i: (1, 1))


def _headless(config: "TrainConfig", targets: Targets) -> Any:
    return build(config.model)


def _featured(config: "TrainConfig", targets: Targets) -> Any:
    model = build(config.model)
    if config.weights is None and isinstance(model, ViT):
        draw_as_moco(model)
    return model


def _moco(model: Any, config: "TrainConfig", targets: Targets, teacher: Teacher | None) -> Task:
    return Moco(model, config.moco, targets, config.embed)


def _moco_facts(config: "TrainConfig") -> Iterable[tuple[str, str]]:
    moco = config.moco
    yield "contrast", f"temperature {moco.temperature:g}, vectors of {moco.out} numbers"
    yield "teacher", f"running average, momentum {moco.momentum:g} rising to 1"


def _dino(model: Any, config: "TrainConfig", targets: Targets, teacher: Teacher | None) -> Task:
    return Dino(model, config.dino, targets, config.embed, config.seed)


def _dino_views(config: "TrainConfig") -> tuple[AugmentConfig, ...]:
    dino, large = config.dino, config.train_preprocess().size
    size = dino.small_size or small_size(large, config.model.stride)
    return dino_views(config.augment, dino.small_views, dino.small_scale, size)


def _dino_facts(config: "TrainConfig") -> Iterable[tuple[str, str]]:
    dino = config.dino
    start, end = dino.teacher_temperature
    kept_even = {"mean": "less their mean", "sinkhorn": "by Sinkhorn and Knopp"}
    yield "prototypes", f"{dino.prototypes:,}, {kept_even[dino.centring]}"
    yield "temperatures", f"{dino.temperature:g}, the teacher's {start:g} rising to {end:g}"
    yield "teacher", f"running average, momentum {dino.momentum:g} rising to 1"
    for name, weight in (("hidden patches (iBOT)", dino.ibot), ("KoLeo", dino.koleo)):
        if weight:
            yield name, f"weight {weight:g}"


def _mae(model: Any, config: "TrainConfig", targets: Targets, teacher: Teacher | None) -> Task:
    return Mae(model, config.mae, targets, config.embed, config.seed)


def _mae_facts(config: "TrainConfig") -> Iterable[tuple[str, str]]:
    shape = config.mae.decoder
    yield "hidden", f"{config.mae.mask:.0%} of the patches"
    yield "decoder", f"{shape.depth} blocks, width {shape.width}, {shape.heads} heads"


def _lejepa(model: Any, config: "TrainConfig", targets: Targets, teacher: Teacher | None) -> Task:
    return Lejepa(model, config.lejepa, targets, config.embed, config.seed)


def _lejepa_facts(config: "TrainConfig") -> Iterable[tuple[str, str]]:
    said = config.lejepa
    yield "Gaussian", f"{said.weight:.1%} of the loss, along {said.directions} directions"
    yield "projections", f"vectors of {said.out} numbers"


def _distilled(
    model: Any, config: "TrainConfig", targets: Targets, teacher: Teacher | None
) -> Task:
    if teacher is None:
        raise UsageError(
            f"{setting('task', config.task)} learns from a teacher, and there is none: give "
            f"{setting('distill.teacher')} RUN_OR_WEIGHTS, or bring the default one with "
            f"`vitrail weights fetch focus_s14`"
        )
    kept = KeptMaps() if config.tune.kept_views else None
    return DistillFeatures(
        model, config.distill_features, targets, config.embed, teacher, config.seed, kept
    )


def _distilled_facts(config: "TrainConfig") -> Iterable[tuple[str, str]]:
    said = config.distill_features
    parts = {"v1": "its vector", "v2": "its patches", "v3": "its vector, and how patches lie"}
    yield "teacher", f"{config.distill.teacher}, form {said.form}: {parts[said.form]}"
    yield "mixed views", "in pairs" if said.mixup else "none"


def _embeds(model: Any, config: "TrainConfig", targets: Targets, tta: str) -> Task:
    if tta != "none":
        raise UsageError(
            f"{setting('tta', tta)} averages what is said of classes, and {config.task} gives "
            f"features, of one look at an image: leave it out"
        )
    return Embed(model, targets, config.embed)


def _labels(state: Mapping[str, Any]) -> Targets:
    return _classes(state) if state["classes"] else Nothing(0)


def _one_size(config: "TrainConfig") -> dict[str, bool]:
    """What makes images of several sizes of a batch."""
    return {
        setting("augment.scale"): config.augment.scale is not None,
        f"{setting('data.resize')} {config.data.resize}": config.data.resize
        not in ("crop", "squash"),
    }


def _no_features(config: "TrainConfig") -> dict[str, bool]:
    """What features without labels cannot follow, whatever learns them."""
    return {setting("tune.lora_rank"): config.tune.lora_rank > 0, **_one_size(config)}


def _across(config: "TrainConfig") -> dict[str, bool]:
    """And where a loss looks across images."""
    return {
        setting("micro_batch"): config.micro_batch is not None,
        setting("data.batch_size", 1): config.data.batch_size == 1,
        **_no_features(config),
    }


def _taught(config: "TrainConfig") -> dict[str, bool]:
    """And where a teacher is asked for features, of which it has no labels to give."""
    logits = replace(config.distill, teacher=None) != DistillConfig()
    return {
        f"{setting('distill.kind')}, alpha and temperature": logits,
        f"{setting('tune.kept_views')} with {setting('distill_features.mixup', True)}": bool(
            config.tune.kept_views and config.distill_features.mixup
        ),
        setting("micro_batch"): config.micro_batch is not None,
        **_no_features(config),
    }


def _coupled(config: "TrainConfig") -> dict[str, bool]:
    """And where a loss looks across images, and a momentum teacher is beside the model."""
    return {
        setting("micro_batch"): config.micro_batch is not None,
        setting("ema"): config.ema > 0,
        **_no_features(config),
    }


_COUPLED = "its loss looks across the images of a batch, and its teacher is an average already"


FEW = 10_000
"""Images from which on features may be learned from nothing, as far as is published."""


def _better_than_from_scratch() -> str:
    """What does better with few images, the best first: see the measurements of lightly and of
    stable-pretraining on 9,469 images, and dinov2#204.
    """
    ways = {
        "distill-features": "published features distilled into a small model",
        "lejepa": "LeJEPA",
        "dino": "DINO with 1,024 to 8,192 prototypes",
    }
    known = [f"{words} ({setting('task', name)})" for name, words in ways.items() if name in TASKS]
    return ", then ".join(["published features as they are (weights and a probe)", *known])


def text_of(config: "TrainConfig", pooled: int) -> TextConfig:
    """The text tower of a config, whose own projection brings it to what is compared."""
    assert config.text is not None
    width = config.pair.width or pooled
    same = (config.text.out or config.text.width) == width
    return config.text if same else replace(config.text, out=width)


def _towers(config: "TrainConfig", targets: Targets) -> TwoTowers:
    image = build(config.model)
    pooled = pooled_width(image)
    return TwoTowers(
        image,
        build_text(text_of(config, pooled)),
        pooled,
        projected=config.pair.width is not None,
        scale=config.pair.scale,
        bias=config.pair.bias if config.pair.loss == "sigmoid" else None,
    )


def _pair(model: Any, config: "TrainConfig", targets: Targets, teacher: Teacher | None) -> Task:
    return Pair(model, config.pair, targets, config.seed, locked=config.locked)


def _paired(model: Any, config: "TrainConfig", targets: Targets, tta: str) -> Task:
    if tta != "none":
        raise UsageError(
            f"{setting('tta', tta)} averages what is said of classes, and {config.task} gives "
            f"vectors, of one look at an image: leave it out"
        )
    return Pair(model, config.pair, targets, config.seed)


def _texts(state: Mapping[str, Any]) -> Texts:
    none = np.zeros((0, 1), np.int32)
    return Texts((), none, _classes(state) if state["classes"] else None)


def _no_pairs(config: "TrainConfig") -> dict[str, bool]:
    """What images and texts cannot follow; what they need is refused with its own words."""
    name = setting("task", config.task)
    if config.text is None:
        raise UsageError(
            f"{name} needs a text tower: name one with {setting('text', 'minilm_l6')} or "
            f"{setting('text_weights', 'minilm_l6')}"
        )
    needed = {"clip": "softmax", "siglip": "sigmoid"}.get(config.task, config.pair.loss)
    if config.pair.loss != needed:
        raise UsageError(
            f"{name} learns by {needed}: leave out {setting('pair.loss', config.pair.loss)}, or "
            f"use {setting('task', 'siglip' if config.task == 'clip' else 'clip')}"
        )
    if config.data.batch_size < 2:
        raise UsageError(
            f"{name} tells the texts of a batch apart, and "
            f"{setting('data.batch_size', config.data.batch_size)} has one: give a larger one"
        )
    if config.locked and config.augment != AugmentConfig.off():
        raise UsageError(
            f"{name} locks the image tower, which looks at each image once, as it is: leave "
            f"out augment"
        )
    usual = replace(type(config.tune)(), freeze=config.tune.freeze)
    return {"tune, but for freeze": config.tune != usual, **_one_size(config)}


def _pair_facts(config: "TrainConfig") -> Iterable[tuple[str, str]]:
    locked = ", the image tower locked" if config.locked else ""
    yield "loss", f"{config.pair.loss} over {config.data.batch_size} images and texts{locked}"


_PAIRS = Kind(
    *(Texts, False, _towers, _pair, _paired, _texts),
    why="it is learned which text goes with which image",
    refused=_no_pairs,
    facts=_pair_facts,
)

TASKS: Mapping[str, Kind] = {
    "classify": Kind(
        *(Classes, True, _classifier, _classify, _classified, _classes), teacher="answers"
    ),
    "segment": Kind(
        *(Masks, False, _segmenter, _segment, _segmented, _masks),
        why="a class of each pixel is learned",
    ),
    "detect": Kind(*(Boxes, False, _detector, _detect, _detected, _boxes), why="boxes are learned"),
    "mocov3": Kind(
        *(Nothing, False, _featured, _moco, _embeds, _labels),
        why=_COUPLED,
        refused=_coupled,
        views=lambda config: moco_views(config.augment),
        facts=_moco_facts,
        few=_better_than_from_scratch,
    ),
    "dino": Kind(
        *(Nothing, False, _headless, _dino, _embeds, _labels),
        why=_COUPLED,
        refused=_coupled,
        views=_dino_views,
        facts=_dino_facts,
        few=_better_than_from_scratch,
    ),
    "lejepa": Kind(
        *(Nothing, False, _headless, _lejepa, _embeds, _labels),
        why="its loss looks across the images of a batch",
        refused=_across,
        views=lambda config: lejepa_views(
            config.augment, config.lejepa, config.train_preprocess().size, config.model.stride
        ),
        facts=_lejepa_facts,
        few=_better_than_from_scratch,
    ),
    "mae": Kind(
        *(Nothing, False, _headless, _mae, _embeds, _labels),
        why="its pixels are those of whole images of one size, and all of a model learns",
        refused=_no_features,
        facts=_mae_facts,
        few=_better_than_from_scratch,
    ),
    "distill-features": Kind(
        *(Nothing, False, _headless, _distilled, _embeds, _labels),
        why="its loss looks across the images of a batch, and takes of a teacher the features",
        refused=_taught,
        facts=_distilled_facts,
        teacher="features",
    ),
    "clip": _PAIRS,
    "siglip": _PAIRS,
    "lit": _PAIRS,
}
"""Name -> kind, as in `--task NAME`."""


def backbone_of(model: Any) -> Any:
    """Of a model with a head for another task, what is below that; else the model itself."""
    return getattr(model, "backbone", model)
