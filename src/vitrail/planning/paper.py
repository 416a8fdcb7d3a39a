"""What a training step takes, counted on paper: no image is read, and no number computed.

The step runs on the meta device, where tensors have a shape and no values, with the operations that
an NVIDIA GPU would run: fused attention, and in bfloat16 the formats that CUDA's autocast gives.
Whatever is allocated is counted while it lives, and matrix products, convolutions and attention are
counted as they are called. What a library takes for itself inside of one call is not seen.

`Tally` counts real steps just as well.
"""

import copy
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from vitrail.data.batches.batch import Batch
from vitrail.data.views.canvas import Canvas
from vitrail.models import build
from vitrail.runs import TrainConfig
from vitrail.tasks import Task, Teacher
from vitrail.training.engine import Engine, recompute_blocks
from vitrail.training.optim import build_optimizer
from vitrail.training.tune import Tuning

META = torch.device("meta")

Args = tuple[Any, ...]


class Held(NamedTuple):
    """Bytes that are there from the first step to the last, in one process that has everything."""

    weights: int
    """Parameters and buffers, float32: 4 bytes a parameter."""
    copy: int
    """What computes in bfloat16: 2 bytes a parameter, 4 of norms over batches; else none."""
    gradients: int
    """Of what learns: 4 bytes a parameter."""
    copy_gradients: int
    """Of what learns of the copy: with DDP they are there until all have exchanged them, while one
    process adds each to the gradients above as soon as it is done."""
    optimizer: int
    """AdamW, LAMB: 8 bytes for each parameter that learns; SGD: 4; Muon: 4 for a matrix, 8 for the
    rest; Adafactor: a little more than 4. With `optim.state bfloat16` 2 less of each."""
    average: int
    """The running average of the weights: 4 bytes a parameter, or none."""
    teacher: int
    """Of distillation: 4 bytes a parameter, or none."""

    @property
    def alone(self) -> int:
        """What one process holds."""
        return sum(self) - self.copy_gradients


class Sizes(NamedTuple):
    """How large what is trained is."""

    parameters: int
    learning: int
    """Of these, how many learn."""
    largest_block: int
    """Parameters of the largest block, and of all that is in none: FSDP gathers block by block."""
    outside_blocks: int
    held: Held
    checkpoint: int
    """Bytes of one checkpoint: model, optimiser, and what the average or LoRA keep besides."""
    apart: str = ""
    """`Engine.apart`."""
    coupled: bool = False
    """`Task.coupled`: a batch is computed whole."""


class Step(NamedTuple):
    """One forward and backward pass over so many images, without what `Held` counts."""

    images: int
    saved: int
    """Bytes that the forward pass leaves behind for the backward pass."""
    peak: int
    """The most bytes alive at one time; gradients count until they are added to what there is."""
    flops: int
    """Twice the multiply-accumulates of both passes. Of a ViT that learns as a whole it is 3 times
    the forward pass, within a hundredth, for the backward pass has two products for each of the
    forward pass. With checkpointing 3.7 times, and not 4: torch computes a block again only as far
    as its backward pass needs, and the last product it does not."""
    forward_flops: int
    """Of the forward pass alone."""


class Line(NamedTuple):
    """Bytes as a function of images at once: `fixed + each * images`, and `waiting` for each other
    image of the batch, of which there is what the stem made (`Engine.cut`).
    """

    fixed: float
    each: float
    waiting: float = 0.0

    @classmethod
    def through(cls, one: Step, other: Step, cut: Step | None = None) -> "Line":
        """The line through two steps' peaks; `cut` is the other with the images of the one at once.

        What a step allocates is proportional to its images, but for gradients on their way.
        """
        more = other.images - one.images
        each = (other.peak - one.peak) / more
        waiting = (cut.peak - one.peak) / more if cut else 0.0
        return cls(one.peak - each * one.images, each, min(max(0.0, waiting), each))

    def at(self, images: int, batch: int = 0) -> int:
        """Bytes for so many images at once, of a batch of so many."""
        others = max(0, batch - images)
        return max(0, round(self.fixed + self.each * images + self.waiting * others))

    def most(self, room: float, batch: int = 0) -> int:
        """How many images of such a batch fit at once into `room` bytes; 0: not even one."""
        left, each = room - self.fixed, self.each
        if left < each * batch:
            left, each = left - self.waiting * batch, each - self.waiting
        return max(0, int(left // each)) if each > 0 else 0


class Tally(TorchDispatchMode):
    """Counts bytes and FLOPs of the operations that run inside of its `with` block.

    Each storage counts once, from the operation that makes it until the last tensor on it is gone.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        """`known` was there before, and does not count."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.now = self.peak = self.flops = 0
        self._seen: dict[int, tuple[Any, int]] = {_key(each): (None, 0) for each in known}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.flops += _flops(func._overloadpacket, args, kwargs, out)
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self._see(each)
        return out

    def _see(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._seen:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._seen[key] = (weakref.ref(storage, lambda gone: self._gone(key)), size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._seen.pop(key)[1]


def _flops(packet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """By torch's own formulas, but for one that takes no notice of a convolution's groups."""
    if packet == torch.ops.aten.convolution_backward:
        grad, images, weight, *_, wanted = args
        return sum(wanted[:2]) * conv_flop_count(images.shape, weight.shape, grad.shape)
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class AsOnGPU(TorchFunctionMode):
    """Operations as PyTorch runs them on an NVIDIA GPU: attention that keeps no matrix of weights,
    and with `half` the number formats of CUDA's autocast.

    Attention with a mask is left as it is, and counts with its matrix: too much, where the GPU has
    a kernel for it.
    """

    def __init__(self, *, half: bool) -> None:
        super().__init__()
        self.half = half

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.half and name in _IN_BFLOAT16:
            args, kwargs = _in(torch.bfloat16, args, kwargs)
        elif self.half and name in _IN_FLOAT32:
            args, kwargs = _in(torch.float32, args, kwargs)
        if func is F.scaled_dot_product_attention and len(args) == 3 and not _masked(kwargs):
            if args[0].dtype == torch.bfloat16:
                return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, True)[0]
        return func(*args, **kwargs)


_IN_BFLOAT16 = {
    "linear", "conv1d", "conv2d", "matmul", "__matmul__", "bmm", "mm", "einsum",
    "scaled_dot_product_attention",
}  # fmt: skip
_IN_FLOAT32 = {
    "layer_norm", "group_norm", "softmax", "log_softmax", "cross_entropy", "kl_div", "mse_loss",
    "binary_cross_entropy_with_logits", "norm", "pow", "exp", "log", "sum", "softplus",
}  # fmt: skip
"""https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast"."""


def _masked(kwargs: Mapping[str, Any]) -> bool:
    return any(kwargs.get(name) for name in ("dropout_p", "is_causal")) or (
        kwargs.get("attn_mask") is not None
    )


def _in(
    dtype: torch.dtype, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with every floating tensor in `dtype`."""

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(dtype)
        return value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def count_sizes(task: Task, config: TrainConfig) -> Sizes:
    """How large `task` is, on the meta device, when it is trained as `config` says.

    The optimiser takes a step there, so its states are those of the real one, whichever it is.
    """
    plain = _bytes(task.state_dict().values())
    tensors = len(task.state_dict())
    with META:
        tuning = Tuning(task, config.tune)
        optimizer = build_optimizer(
            task.model, config.optim, tuning.scale, beside=task.named_beside()
        )
        tuning.enter(1.0)
        engine = _engine(task, config)
        for group in optimizer.param_groups:
            group["fused"] = False  # which torch's AdamW refuses where there are no values
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        with _Valueless():
            optimizer.step()
    model, working = task.model, engine.working
    parameters = list(model.parameters())
    learning = [p for p in task.parameters() if p.requires_grad]
    states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    blocks = [_numbers(model.get_submodule(name)) for name in model.block_names()]
    held = Held(
        weights=_bytes([*task.parameters(), *task.buffers()]),
        copy=0 if working is task else _bytes(working.parameters()),
        gradients=_bytes(learning),
        copy_gradients=0
        if working is task
        else _bytes(p for p in working.parameters() if p.requires_grad),
        optimizer=_bytes(states),
        average=_bytes(parameters) if config.ema else 0,
        teacher=_bytes(_of_teacher(task)),
    )
    checkpoint = plain + held.optimizer
    adapted = config.tune.lora_rank > 0
    if adapted or config.ema:
        checkpoint += _bytes(model.state_dict().values())
        tensors *= 2
    if adapted and config.ema:
        checkpoint += held.gradients
    return Sizes(
        parameters=sum(p.numel() for p in parameters),
        learning=sum(p.numel() for p in learning),
        largest_block=max(blocks, default=0),
        outside_blocks=_numbers(model) - sum(blocks),
        held=held,
        checkpoint=checkpoint + _HEADER * (tensors + len(states)),
        apart=engine.apart,
        coupled=engine.task.coupled,
    )


_HEADER = 110
"""Bytes that a safetensors file spends on a tensor's name, shape and place."""


def count_step(
    task: Task,
    config: TrainConfig,
    images: int,
    *,
    checkpointing: bool,
    at_once: int | None = None,
) -> Step:
    """One step's passes over `images` images, on paper, by a new `task` on the meta device.

    Images are taken to be of the model's (or training crops') size, the largest if it changes.
    """
    half = config.precision == "bfloat16"
    with META:
        Tuning(task, config.tune).enter(1.0)
        engine = _engine(task, config)
        engine.micro = at_once
        working = engine.working
        for name in working.model.block_names():
            # Checkpointing calls a block again from the backward pass, where no mode is on.
            block = working.model.get_submodule(name)
            block.forward = _under(AsOnGPU(half=half), block.forward)
        if checkpointing:
            recompute_blocks(working.model)
        height, width = config.train_sizes()[-1]
        sizes = [view.size or (height, width) for view in config.views()]
        shown = [torch.empty(images, config.model.channels, *size) for size in sizes]
        blank = task.targets.blank((height, width))
        batch = Batch(
            tuple(Canvas(view, None) for view in shown),
            {
                name: torch.from_numpy(values).expand(images, *values.shape).to(META)
                for name, values in blank.items()
            },
            np.arange(images),
        )
        known = [*held_by(engine), *tensors_of(batch)]
        saved = forward = 0
        with Tally(known) as tally, AsOnGPU(half=half), engine.cut(batch) as pieces:
            for piece in pieces:
                before = tally.flops
                loss = working.loss(piece).total
                saved, forward = max(saved, tally.now), forward + tally.flops - before
                loss.backward()
    return Step(images, saved, tally.peak, tally.flops, forward)


class _Valueless(TorchFunctionMode):
    """Lets an optimiser that looks at numbers, or calls a kernel of a real device, make its states.

    What the step would have done to them has no shape.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "item":
            return 1.0
        return None if name.startswith("_fused_") else func(*args, **(kwargs or {}))


def _under(mode: TorchFunctionMode, forward: Any) -> Any:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    return inside


def _engine(task: Task, config: TrainConfig) -> Engine:
    plain = replace(config, compile=False, checkpointing=False, devices=1)
    engine = Engine(task, plain, META)
    engine.enter()
    return engine


def teacher_on_paper(teacher: Teacher) -> Teacher:
    """The same teacher on the meta device; the one given stays where it is."""
    shadow = copy.copy(teacher)
    with META:
        shadow.model = build(teacher.model.config).eval().requires_grad_(False)
    return shadow


def held_by(engine: Engine) -> list[Tensor]:
    """All that `Held` counts but the optimiser's: gradients are made here, as zeros."""
    task, working = engine.task, engine.working
    learning = [p for p in task.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.grad = torch.zeros_like(parameter)
    grads = [p.grad for p in learning if p.grad is not None]
    modules = [task] if working is task else [task, working]
    weights = [each for module in modules for each in (*module.parameters(), *module.buffers())]
    return [*weights, *grads, *_of_teacher(task)]


def tensors_of(batch: Batch) -> list[Tensor]:
    """All that a batch holds."""
    return [*(view.images for view in batch.views), *batch.targets.values()]


def _of_teacher(task: Task) -> list[Tensor]:
    teacher = getattr(task, "teacher", None)
    if not isinstance(teacher, Teacher):  # a part of the task itself, or none
        return []
    return [*teacher.model.parameters(), *teacher.model.buffers()]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
