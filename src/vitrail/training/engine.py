"""A step's forward and backward pass: in which numbers, how much at a time, on which processes.

The task itself stays in float32, is what the optimiser changes, checkpoints keep and averages
follow. In bfloat16 a copy of it does the work; its weights are the task's, rounded after each step.
Half the memory moves, and nothing is cast on the way, as automatic mixed precision would.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from vitrail.data.batches.batch import Batch
from vitrail.data.views.canvas import Canvas
from vitrail.errors import DataError, setting
from vitrail.nn import ConvStem
from vitrail.nn.conv import StdConv2d
from vitrail.runs import TrainConfig
from vitrail.runs.world import ALONE, World
from vitrail.tasks import Task
from vitrail.tasks.task import ByVectors

_PRECISE = (_BatchNorm, StdConv2d)
"""What stays float32: statistics, and what is computed from weights before they are used."""


class StepLoss(NamedTuple):
    """The mean loss of a step's images, over all processes, and its parts."""

    total: float
    parts: dict[str, float]


class Engine:
    """What computes the gradients of `task`; made before its optimiser, for FSDP shards it."""

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        device: torch.device,
        world: World = ALONE,
        notify: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.task = task
        self.device = device
        self.world = world
        self.notify = notify
        self.half = config.precision == "bfloat16"
        self.micro = config.micro_batch
        self.sharded = config.parallel == "fsdp" and world.size > 1
        self.working = task if self.sharded or not self.half else _in_bfloat16(task)
        model = self.working.model
        if config.checkpointing:
            recompute_blocks(model)
        names = model.block_names() if config.compile else []
        self._compiled = [model.get_submodule(name) for name in names]
        for block in self._compiled:
            block.compile()
        if self.sharded:
            _shard(self.working, device, half=self.half)
        self._share: nn.Module = _Share(self.working)
        self._learns: tuple[bool, ...] = ()
        self._norms: Sequence[nn.Module] = ()
        self._stem: nn.Module | None = None
        self.apart = ""
        """What of a step sees only the images computed at once, in words; empty: nothing does."""
        self._told = False
        self._handles: list[RemovableHandle] = []
        self._pairs: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])

    def enter(self) -> None:
        """Follow what of the task learns now, which may have changed since the last step."""
        learns = tuple(p.requires_grad for p in self.task.parameters())
        if learns == self._learns:
            return
        self._learns = learns
        ours, theirs = list(self.task.parameters()), list(self.working.parameters())
        for parameter, learning in zip(theirs, learns, strict=True):
            parameter.requires_grad_(learning)
            parameter.grad = None
        for mine, its in zip(self.task.modules(), self.working.modules(), strict=True):
            its.training = mine.training
        self._find_norms()
        self._pairs = (
            [p for p in ours if p.requires_grad],
            [p for p in theirs if p.requires_grad],
        )
        for handle in self._handles:
            handle.remove()
        if self.sharded:
            _follow_sharded(self.task)
        if self.working is not self.task and self.world.size == 1:
            self._handles = [
                its.register_post_accumulate_grad_hook(partial(_bring_home, mine))
                for mine, its in zip(*self._pairs, strict=True)
            ]
        if self.world.size > 1 and not self.sharded:
            # Its buckets hold what learns, so another set of parameters needs another wrapper.
            self._share = DistributedDataParallel(_Share(self.working), forward_sync_buffers=False)

    def gradients(
        self, batches: Sequence[Batch], weight: float, share: int | None = None
    ) -> StepLoss:
        """Put the gradient of the mean loss into the task's parameters. `batches` are this
        process's share of what weighs `weight` in all processes; of each batch it has `share`
        images, if all can be read.

        Where memory runs out, half as many images are computed at once from then on, and where a
        block cannot be compiled, none is; what a step computes stays the same, but for what is
        `apart` in a batch that is cut, of which the run is told.
        """
        statistics = [buffer for norm in self._norms for buffer in norm.buffers()]
        before = [buffer.clone() for buffer in statistics]
        while True:
            try:
                return self._gradients(batches, weight, share)
            except (RuntimeError, MemoryError) as error:
                if not self._not_compiled(error):
                    self._halve(error, batches)
            for parameter in (*self.working.parameters(), *self.task.parameters()):
                parameter.grad = None
            for buffer, value in zip(statistics, before, strict=True):
                buffer.copy_(value)

    def follow(self) -> None:
        """After the optimiser's step: round the task's weights into the copy that computes."""
        if self.working is not self.task:
            rounded = [p.data for p in self.working.parameters()]
            torch._foreach_copy_(rounded, [p.data for p in self.task.parameters()])

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that the config asks for, for what runs the task or its copy."""
        if self.device.type == "meta":  # where `paper` does what a GPU would
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def _find_norms(self) -> None:
        """Which batch norms learn, and what they keep a step from being cut without a trace."""
        model = self.working.model
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
        stem = getattr(model, "stem", None)
        whole = isinstance(stem, ConvStem) and not self.sharded and {*norms} <= {*stem.modules()}
        self._norms, self._stem = norms, stem if norms and whole else None
        of_norms = f"{len(norms)} batch norms" if norms and not whole else ""
        self.apart = " and ".join(each for each in (of_norms, self.task.apart) if each)

    def _halve(self, error: RuntimeError | MemoryError, batches: Sequence[Batch]) -> None:
        """Go on with half as many images at once; raise what is no lack of memory, or too great."""
        if not out_of_memory(error):
            raise error
        most = max(len(batch.indices) for batch in batches)
        at_once = min(self.micro or most, most)
        text = f"not enough memory for {at_once} images at once on {self.device}"
        if self.task.coupled and not isinstance(self.task, ByVectors):
            raise DataError(
                f"{text}, and a batch is not cut, for its loss looks across its images: take "
                f"{setting('data.batch_size', max(1, at_once // 2))}, "
                f"{setting('checkpointing', True)}, or smaller images"
            ) from error
        if self.world.size > 1 or at_once < 2:
            raise DataError(
                f"{text}: take {setting('micro_batch', max(1, at_once // 2))}, "
                f"{setting('checkpointing', True)}, or smaller images"
            ) from error
        self.micro = at_once // 2
        self.notify(f"{text}: from now on {self.micro}, as with --micro-batch {self.micro}")

    def _not_compiled(self, error: RuntimeError | MemoryError) -> bool:
        """Whether a block could not be compiled; the blocks then run as they are, as all others."""
        if not self._compiled:
            return False
        from torch._dynamo.exc import TorchDynamoException  # there by now, and slow to import

        if not isinstance(error, TorchDynamoException):
            return False
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        self.notify(
            f"torch.compile failed, and the run goes on without it: {reason.strip()} (vitrail "
            f"doctor looks at the compiler)"
        )
        for block in self._compiled:
            block._compiled_call_impl = None  # what Module.compile sets, and nothing takes back
        self._compiled = []
        return True

    def _gradients(self, batches: Sequence[Batch], weight: float, images: int | None) -> StepLoss:
        found: dict[str, Tensor] = {}
        for batch in batches:
            with self.cut(batch, images) as pieces:
                if len(pieces) > 1 and isinstance(self.working, ByVectors):
                    share = self.task.weight(batch) / weight
                    total, parts = self._by_vectors(batch, pieces, share, batch is batches[-1])
                    _add(found, total, parts, share)
                    continue
                for piece in pieces:
                    last = batch is batches[-1] and piece is pieces[-1]
                    share = self.task.weight(piece) / weight if len(piece.indices) else 0.0
                    with self._unsynchronised(last):
                        with record_function("vitrail/forward"), self.autocast():
                            # DDP and FSDP take the mean over the processes.
                            total, parts = self._share(piece, share * self.world.size)
                        with record_function("vitrail/backward"):
                            total.backward()
                    _add(found, total / self.world.size, parts, share)
        if self.working is not self.task and self.world.size > 1:
            self._bring_home()
        values = self.world.sum(torch.stack(list(found.values())))
        named = dict(zip(found, values.tolist(), strict=True))
        return StepLoss(named.pop(""), named)

    def _by_vectors(
        self, batch: Batch, pieces: Sequence[Batch], share: float, last: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of a loss that looks across a batch, whose pieces are computed one by one:
        first their vectors, then the loss of all of these, then each piece again with the gradient
        of its own (GradCache, arXiv 2101.06983). Twice the forward pass, and no negative is lost.
        """
        task, made = self.working, []
        assert isinstance(task, ByVectors)
        seeds = torch.randint(2**31, (len(pieces),)).tolist()
        with torch.no_grad(), record_function("vitrail/forward"), self.autocast():
            for seed, piece in zip(seeds, pieces, strict=True):
                torch.manual_seed(seed)  # what is dropped is the same both times
                made.append(task.vectors(piece))
        rows = list(zip(*made, strict=True))
        common = [each[0].shape == (1,) for each in rows]
        whole = [
            (each[0] if one else torch.cat(each)).detach().requires_grad_()
            for one, each in zip(common, rows, strict=True)
        ]
        with record_function("vitrail/forward"), self.autocast():
            losses = task.of_vectors(batch, type(made[0])(*whole))
        found = torch.autograd.grad(
            losses.total * share * self.world.size, whole, allow_unused=True
        )
        parts = []
        for one, vectors, each, grad in zip(common, whole, rows, found, strict=True):
            grad = torch.zeros_like(vectors) if grad is None else grad
            if one:  # what the pieces have in common learns with the first of them
                parts.append([grad, *[torch.zeros_like(grad)] * (len(pieces) - 1)])
            else:
                parts.append([*grad.split([len(some) for some in each])])
        for seed, piece, grads in zip(seeds, pieces, zip(*parts, strict=True), strict=True):
            torch.manual_seed(seed)
            with self._unsynchronised(last and piece is pieces[-1]):
                with record_function("vitrail/forward"), self.autocast():
                    total, _ = self._share(piece, 1.0, grads)
                with record_function("vitrail/backward"):
                    total.backward()
        return losses.total * share, losses.parts

    def _bring_home(self) -> None:
        """With DDP the copy's gradients are whole only when all processes have exchanged them."""
        for mine, its in zip(*self._pairs, strict=True):
            if its.grad is not None:
                mine.grad, its.grad = its.grad.float(), None

    @contextmanager
    def cut(self, batch: Batch, share: int | None = None) -> Iterator[list[Batch]]:
        """A batch in pieces that fit into memory, each to be learned from once and in turn.

        A stem that has all of the batch norms computes the whole batch at once, and learns at the
        end what its pieces ask for: statistics and gradients are the batch's.
        """
        pieces, stem = self._pieces(batch, share), self._stem
        if len(pieces) < 2 or stem is None:
            if len(pieces) > 1 and self.apart and not self._told:
                self._told = True
                self.notify(sentence_on(self.apart, self.micro))
            yield pieces
            return
        images, extent = batch.views[0] if len(batch.indices) else pieces[0].views[0]
        with record_function("vitrail/forward"), self.autocast():
            tokens, grid = stem(images, extent)
        parts = tokens.split(len(pieces[0].images))
        # Beyond them come the pieces that another process has more.
        more = [tokens.new_zeros(1, *tokens.shape[1:])] * (len(pieces) - len(parts))
        shown = [part.detach().requires_grad_() for part in (*parts, *more)]
        each = iter(shown)
        stem.forward = lambda *_: (next(each), grid)
        try:
            yield pieces
        finally:
            del stem.forward
        with record_function("vitrail/backward"):
            grads = [part.grad for part in shown[: len(parts)]]
            torch.autograd.backward(parts, grads)

    def _pieces(self, batch: Batch, share: int | None) -> list[Batch]:
        """A batch in parts that fit into memory: the same number of them on every process, for
        each waits for the others' part in the exchange. Where images cannot be read, the last
        ones show nothing and weigh nothing.
        """
        n = len(batch.indices)
        size = self.micro or max(n, share or 0, 1)
        pieces = [batch.rows(slice(start, start + size)) for start in range(0, n, size)]
        if self.world.size > 1:
            wanted = max(1, -(-(share or n) // size))
            pieces += [_blank(batch)] * (wanted - len(pieces))
        return pieces

    def _unsynchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged once a step, with its last part."""
        if isinstance(self._share, DistributedDataParallel) and not last:
            return self._share.no_sync()
        return nullcontext()


def _bring_home(mine: nn.Parameter, its: nn.Parameter) -> None:
    """Add the copy's gradient to the task's, in float32, where many small ones add up rightly; and
    at once, so that there are never all of both.
    """
    assert its.grad is not None
    if mine.grad is None:
        mine.grad = its.grad.float()
    else:
        mine.grad.add_(its.grad)
    its.grad = None


def _blank(batch: Batch) -> Batch:
    """A piece of one image that is none: it has no index, and so no weight."""
    return Batch(
        tuple(
            Canvas(view.images.new_zeros(1, *view.images.shape[1:]), None) for view in batch.views
        ),
        {name: said.new_zeros(1, *said.shape[1:]) for name, said in batch.targets.items()},
        batch.indices[:0],
        batch.epoch,
    )


class _Share(nn.Module):
    """The task's loss as a forward pass, which is what DDP can wrap."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(
        self,
        batch: Batch,
        share: float,
        grads: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss times `share`, and its parts; with the `grads` of vectors the product of both,
        whose gradient is that of the loss they are from.
        """
        if grads is not None:
            assert isinstance(self.task, ByVectors)
            made = zip(self.task.vectors(batch), grads, strict=True)
            return torch.stack([(vectors * grad).sum() for vectors, grad in made]).sum(), {}
        losses = self.task.loss(batch)
        return losses.total * share, losses.parts


def _add(found: dict[str, Tensor], total: Tensor, parts: dict[str, Tensor], share: float) -> None:
    """What a piece adds to a step's loss and to its parts, of which each has its share."""
    for name, value in {"": total, **parts}.items():
        value = value.detach().float() * (share if name else 1)
        found[name] = found[name] + value if name in found else value


def _in_bfloat16(task: Task) -> Task:
    """A copy of `task` whose weights are bfloat16, and whose buffers are the task's own."""
    working = copy.deepcopy(task)
    for mine, its in zip(task.modules(), working.modules(), strict=True):
        for name, buffer in mine.named_buffers(recurse=False):
            its._buffers[name] = buffer
        if not isinstance(its, _PRECISE):
            for parameter in its.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()
    return working


def recompute_blocks(model: Any) -> None:
    """Keep only each block's input, and compute the block again for the backward pass.

    Chen et al., "Training deep nets with sublinear memory cost" (arXiv 1604.06174).
    """
    for name in model.block_names():
        block = model.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _shard(task: Task, device: torch.device, *, half: bool) -> None:
    """FSDP2: each process holds its rows of every parameter, gradient and optimiser state."""
    # Half a second, for sharded runs alone.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    model = task.model
    # What it warns of, changing an output in place, no model here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32
    )
    precise: list[nn.Module] = [
        module for module in model.modules() if isinstance(module, _PRECISE)
    ]
    if half and precise:
        fully_shard(precise, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    for name in model.block_names():
        fully_shard(model.get_submodule(name), mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in ("features", "logits", "predictions", "shown", "taps", "both", "texts"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)
    for name, beside in task.named_children():
        if name != "model" and any(True for _ in beside.parameters()):
            # What no backward pass goes through would stay whole after its forward pass.
            fully_shard(beside, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def _follow_sharded(model: nn.Module) -> None:
    """Let what FSDP gathers for a pass learn what its shards learn: it asks them only once."""
    from torch.distributed.fsdp import FSDPModule

    learns = [p.requires_grad for p in model.parameters()]
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    for parameter, learning in zip(model.parameters(), learns, strict=True):
        parameter.requires_grad_(learning)
    for part in parts:
        part.reshard()


def sentence_on(apart: str, at_once: int | None) -> str:
    """What is to be said where so many images of a batch are computed at once: `Engine.apart`."""
    return (
        f"{at_once} images of a batch are computed at once, and {apart} can only see those: "
        f"gradients are not quite those of the whole batch"
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that there is no memory left, on whatever device."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        word in str(error) for word in words
    )
