"""What of a model learns, when, and how fast: freezing, low-rank changes, layer-wise rates."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from vitrail.errors import UsageError, setting, unknown_name
from vitrail.nn.lora import add_lora
from vitrail.runs import TrainConfig, TuneConfig
from vitrail.tasks import TASKS, Task
from vitrail.training.features import HEADS, heads

_NEW = (*HEADS, "neck", "predictors")
"""Head and what else no published ViT has: a detector's pyramid, and what tells a DynamicViT which
tokens to keep."""
_FIRST = ("stem", "stem_second", "prefix", "position", "pre_norm")
_MOST_FOR_ADAMW = 1e-3


class Tuning:
    """A `TuneConfig` at work on a task's model, from the first step to the last."""

    def __init__(self, task: Task, config: TuneConfig) -> None:
        """Freeze, and add low-rank changes. Raises `UsageError` for what the model has not."""
        self.task = task
        self.config = config
        self.blocks = task.model.block_names()
        prepare(task.model, config)
        named = task.model.named_parameters()
        self.trained = frozenset(name for name, p in named if p.requires_grad)
        self._head_only: bool | None = None

    def scale(self, name: str) -> float:
        """The learning rate of parameter `name`, as a share of the schedule's.

        `layer_decay ^ (depth + 1 - layer)`, as BEiT and MAE have it (2106.08254, 2111.06377).
        """
        above = len(self.blocks) + 1 - layer_of(name, self.blocks)
        # What lies beside the model is as new as a head.
        of_head = self.config.head_lr if _of(name, _NEW) or name not in self.trained else 1.0
        return self.config.layer_decay**above * of_head

    def enter(self, progress: float) -> float:
        """Make the model ready to learn what it learns at `progress` (0 to 1) of the run.

        Returns how much of this part is done: `head_warmup` of the run is the head's alone, the
        rest is everything's.
        """
        warmup = self.config.head_warmup
        head_only = progress < warmup
        if head_only is not self._head_only or not self.task.training:
            self._head_only = head_only
            # By name: sharding has put other parameters in the place of those that were there.
            for name, parameter in self.task.model.named_parameters():
                learns = name in self.trained and (not head_only or _of(name, _NEW))
                parameter.requires_grad_(learns)
            self.task.train()
            # What does not learn is one fixed function: no dropout, no new batch statistics.
            for module in self.task.modules():
                parameters = list(module.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
                    module.eval()
        return progress / warmup if head_only else (progress - warmup) / (1 - warmup)


def check_tuning(config: TrainConfig, model: Any) -> None:
    """Raise the `UsageError` that a run would meet in its `model`, before anything is computed."""
    if "probe" in (config.method, config.tune.head_init):
        heads(model)
    prepare(model, config.tune)
    if config.tune.kept_views and TASKS[config.task].teacher != "features":
        asked = setting("tune.kept_views", config.tune.kept_views)
        if not getattr(model, "reads_maps", False):
            raise UsageError(
                f"{asked} is for a head that reads a backbone's maps: {setting('task', 'segment')} "
                f"with {setting('segment.head', 'linear')} or deeplab; or for the teacher of "
                f"{setting('task', 'distill-features')}"
            )
        if any(parameter.requires_grad for parameter in model.backbone.parameters()):
            raise UsageError(
                f"{asked} is for a backbone that does not learn: add "
                f"{setting('tune.freeze', 'backbone.*')}"
            )


def prepare(model: Any, config: TuneConfig) -> None:
    """Freeze what `config` says, then add its low-rank changes to what is left."""
    frozen = _frozen(model, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in frozen)
    if config.lora_rank:
        targets = _lora_targets(model, config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and _of(name, _NEW))
        add_lora(model, targets, config.lora_rank, config.lora_alpha)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    if not learning:
        raise UsageError("tune freezes every parameter of the model: leave some to learn")
    # What learns features has its heads beside the model.
    headless = not any(_of(name, _NEW) for name, _ in model.named_parameters())
    if config.head_warmup and not headless and not any(_of(name, _NEW) for name in learning):
        raise UsageError(
            f"{setting('tune.head_warmup')} needs a head that learns, but {setting('tune.freeze')} "
            f"freezes it"
        )


def layer_of(name: str, blocks: Sequence[str]) -> int:
    """The layer of a parameter: 0 up to the first block, i + 1 in block i, and one more after all.

    What lies between two blocks (the reduction that begins a stage) is of the first one's layer.

    >>> blocks = ["encoder.blocks.0", "encoder.blocks.1"]
    >>> layer_of("encoder.blocks.1.attn.qkv.weight", blocks), layer_of("head.bias", blocks)
    (2, 3)
    """
    for i, block in enumerate(blocks):
        if name.startswith(f"{block}."):
            return i + 1
    if _bare(name).startswith("encoder.peg."):  # it acts between the first block and the second
        return 1
    if _of(name, _FIRST):
        return 0
    # Of a stage that has no number of its own among the blocks: a reduction before its first one.
    stage = [i for i, block in enumerate(blocks) if _stage(block) == _stage(name)]
    return stage[0] + 1 if stage and _stage(name) else len(blocks) + 1


def _stage(name: str) -> str:
    """`stages.2` of `stages.2.blocks.0`; empty where a model has no stages."""
    parts = _bare(name).split(".")
    return ".".join(parts[:2]) if parts[0] == "stages" else ""


def _bare(name: str) -> str:
    """A parameter's name in its backbone, where that has another task's head."""
    return name.removeprefix("backbone.")


def lr_warning(config: TrainConfig) -> str | None:
    """What to say of a learning rate that is likely to ruin pretrained weights; None if it is not.

    For a run that starts from weights. A rate that suits a random start undoes in a few steps what
    the weights know, and the run looks merely bad, not wrong.
    """
    rate = config.optim.lr
    if config.method == "probe" or config.optim.name in ("sgd", "lamb") or rate <= _MOST_FOR_ADAMW:
        return None
    return (
        f"{setting('optim.lr')} {rate:g} is high for AdamW on pretrained weights, which 5e-5 to "
        f"5e-4 suits: if the result is poor, try {setting('optim.lr')} 2e-4, or look with "
        f"{setting('find_lr')}"
    )


def _of(name: str, tops: Iterable[str]) -> bool:
    """Whether a parameter belongs to one of these parts of the model."""
    return _bare(name).split(".")[0] in tops


def _frozen(model: Any, config: TuneConfig) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for pattern in config.freeze:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise _no_match(pattern, names)
        frozen |= found
    if config.last_blocks is not None:
        blocks = model.block_names()
        if config.last_blocks > len(blocks):
            raise UsageError(
                f"{setting('tune.last_blocks')} is {config.last_blocks}, but the model has "
                f"{len(blocks)} blocks: give so many or fewer, or None for all (without the flag "
                f"the recipe chooses)"
            )
        first = len(blocks) - config.last_blocks + 1
        frozen |= {name for name in names if layer_of(name, blocks) < first}
    return frozen


def _no_match(pattern: str, names: list[str]) -> UsageError:
    parts = [name.split(".") for name in names]
    modules = {".".join([*part[:i], "*"]) for part in parts for i in range(1, len(part))}
    near = get_close_matches(pattern, [*names, *modules], n=1, cutoff=0.6)
    tops = sorted({f"{name.split('.')[0]}.*" if "." in name else name for name in names})
    hint = f"did you mean '{near[0]}'? " if near else ""
    return UsageError(
        f"tune.freeze: no parameter of the model is called '{pattern}': {hint}its parts are "
        f"{', '.join(tops)}"
    )


def _lora_targets(model: Any, config: TuneConfig) -> list[str]:
    """The linear layers that get a low-rank change: those named, where they are not frozen."""
    layers: dict[str, nn.Linear] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not _of(name, _NEW)
    }
    known = {name.split(".")[-1] for name in layers}
    for target in config.lora_targets:
        if target not in known:
            raise unknown_name(f"layer in {setting('tune.lora_targets')}:", target, known)
    return [
        name
        for name, layer in layers.items()
        if name.split(".")[-1] in config.lora_targets and layer.weight.requires_grad
    ]
