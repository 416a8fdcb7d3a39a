"""Update rules for parameters: AdamW, SGD, LAMB, Adafactor and Muon, and the optimiser of them.

torch's own AdamW and SGD keep every state in the parameters' format, and torch has no LAMB, no
Adafactor of vision's kind and no Muon beside another rule. So this one optimiser updates each of
its parameter groups by the rule that the group names, and keeps the momentum, the first moment, in
float32 or bfloat16.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw as fused_adamw
from torch.optim.sgd import sgd as fused_sgd

from vitrail.errors import DataError, setting
from vitrail.training.muon import directions
from vitrail.training.shards import held, norms, part_of, settled, whole

State = dict[str, Tensor]
Group = dict[str, Any]

_CACHED = 2**19
_BUSY = 2**23
"""Numbers updated at a time, which bounds what updates need beside the optimiser's states: on a CPU
as many as its cache holds, elsewhere enough to keep the device busy."""
_ADAMW_EPS = 1e-8
_LAMB_EPS = 1e-6
_SMALLEST_FACTORED = 32


class Chunk(NamedTuple):
    """Some parameters of one group, and what belongs to each."""

    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    """In the parameters' number format, whatever they are kept in. To be updated in place."""
    states: list[State]


class Rule(NamedTuple):
    """How parameters follow their gradients."""

    start: Callable[[Tensor], State]
    """A parameter's state beside its momentum, before the first step."""
    update: Callable[[Chunk, Group], None]
    cached: int = _CACHED
    """How many numbers a CPU is to update at a time."""


class RuleOptimizer(torch.optim.Optimizer):
    """Updates each group by `RULES[group["rule"]]`; its momenta are kept as `group["state"]` says.

    A group also has `lr`, `weight_decay`, `beta1`, `beta2`, and for Muon `momentum` and `parts`.
    Parameters may be DTensors, sharded along any dimension.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rule = RULES[group["rule"]]
            learning = (p for p in group["params"] if p.grad is not None)
            for params in _chunks(learning, rule.cached):
                for parameter in params:
                    if not self.state[parameter]:
                        self.state[parameter] = _start(parameter, group)
                states = [self.state[p] for p in params]
                kept = [state["momentum"] for state in states]
                momenta = [m.to(p.dtype) for m, p in zip(kept, params, strict=True)]
                grads = [p.grad for p in params if p.grad is not None]
                rule.update(Chunk(params, grads, momenta, states), group)
                for mine, new in zip(kept, momenta, strict=True):
                    if mine is not new:
                        mine.copy_(new)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over states as `state_dict` gives them.

        torch would cast them all to the parameters' number format, and leave them in whatever
        memory format they have been saved: here they become what this optimiser would have made.
        Whole tensors are sharded as the parameters are. Raises `DataError` for another rule's.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                loaded = self.state.get(parameter)
                if not loaded:
                    continue
                fresh = _start(parameter, group)
                if fresh.keys() != loaded.keys():
                    raise DataError(
                        f"the checkpoint's optimiser keeps {', '.join(sorted(loaded))}; "
                        f"{group['rule']} keeps {', '.join(sorted(fresh))}: it is of another "
                        f"optimiser, so start a new run from its weights, with {setting('weights')}"
                    )
                for name, value in fresh.items():
                    value.copy_(part_of(loaded[name].to(value.device), value))
                self.state[parameter] = fresh


def _start(parameter: Tensor, group: Group) -> State:
    dtype = torch.bfloat16 if group["state"] == "bfloat16" else parameter.dtype
    momentum = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return {"momentum": momentum, **RULES[group["rule"]].start(parameter)}


def _chunks(params: Iterable[Tensor], cached: int) -> Iterator[list[Tensor]]:
    """Parameters in turn, some at a time; the same ones on every process, whatever it holds."""
    chunk: list[Tensor] = []
    size = 0
    for parameter in params:
        most = cached if parameter.device.type == "cpu" else _BUSY
        if chunk and size + parameter.numel() > most:
            yield chunk
            chunk, size = [], 0
        chunk.append(parameter)
        size += parameter.numel()
    if chunk:
        yield chunk


def _nothing(parameter: Tensor) -> State:
    return {}


def _start_adamw(parameter: Tensor) -> State:
    # torch's kernel wants the number of steps where the parameter is.
    step = torch.zeros((), device=parameter.device)
    return {"variance": torch.zeros_like(parameter, requires_grad=False), "step": step}


def _adamw(chunk: Chunk, group: Group) -> None:
    """AdamW (arXiv 1711.05101, algorithm 2) by torch's fused kernel."""
    fused_adamw(
        held(chunk.params),
        held(chunk.grads),
        held(chunk.momenta),
        held([state["variance"] for state in chunk.states]),
        [],
        [state["step"] for state in chunk.states],
        fused=True,
        amsgrad=False,
        beta1=group["beta1"],
        beta2=group["beta2"],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=_ADAMW_EPS,
        maximize=False,
    )


def _sgd(chunk: Chunk, group: Group) -> None:
    """SGD with momentum by torch's fused kernel: `m <- beta1 m + g`, `w <- w - lr m`."""
    momenta: list[Tensor | None] = [*held(chunk.momenta)]
    fused_sgd(
        held(chunk.params),
        held(chunk.grads),
        momenta,
        fused=True,
        weight_decay=group["weight_decay"],
        momentum=group["beta1"],
        lr=group["lr"],
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


def _start_lamb(parameter: Tensor) -> State:
    return {"variance": torch.zeros_like(parameter, requires_grad=False), "step": torch.zeros(())}


def _lamb(chunk: Chunk, group: Group) -> None:
    """LAMB (arXiv 1904.00962, algorithm 2): Adam's step, as long as the tensor it changes.

    As DeiT-III uses it (apex's FusedLAMB, timm's Lamb): weight decay is a part of the step before
    its length is taken, what has no weight decay takes Adam's step as it is, and nothing bounds the
    ratio. Those clip the global norm of the gradients at 1 themselves; here the loop does.
    """
    params, grads, momenta = held(chunk.params), held(chunk.grads), held(chunk.momenta)
    variances = held([state["variance"] for state in chunk.states])
    beta1, beta2 = group["beta1"], group["beta2"]
    torch._foreach_lerp_(momenta, grads, 1 - beta1)
    torch._foreach_mul_(variances, beta2)
    torch._foreach_addcmul_(variances, grads, grads, value=1 - beta2)
    torch._foreach_add_([state["step"] for state in chunk.states], 1)
    steps = [state["step"].item() for state in chunk.states]
    # Both bias corrections as numbers, which saves a pass over the tensors for each:
    # (m / c1) / (sqrt(v / c2) + eps) = scale * m / (sqrt(v) + eps * sqrt(c2)).
    roots = [math.sqrt(1 - beta2**step) for step in steps]
    scales = [root / (1 - beta1**step) for root, step in zip(roots, steps, strict=True)]
    divisors = torch._foreach_sqrt(variances)
    torch._foreach_add_(divisors, [_LAMB_EPS * root for root in roots])
    if not group["weight_decay"]:
        shares = [-group["lr"] * scale for scale in scales]
        torch._foreach_addcdiv_(params, momenta, divisors, shares)
        return
    updates = torch._foreach_mul(params, group["weight_decay"])
    torch._foreach_addcdiv_(updates, momenta, divisors, scales)
    sizes, lengths = norms(params, chunk.params), norms(updates, chunk.params)
    ratios = torch.where((sizes > 0) & (lengths > 0), sizes / lengths, 1.0)
    torch._foreach_addcmul_(params, updates, list((-group["lr"] * ratios).unbind()))


def _factored(shape: torch.Size) -> tuple[int, int] | None:
    """The second largest dimension and the largest; None where they are too small to factor."""
    if len(shape) < 2:
        return None
    *_, second, largest = sorted(range(len(shape)), key=lambda i: (shape[i], i))
    return (second, largest) if shape[second] >= _SMALLEST_FACTORED else None


def _start_adafactor(parameter: Tensor) -> State:
    step = torch.zeros(())
    zeros = torch.zeros_like(parameter, requires_grad=False)
    if (dims := _factored(parameter.shape)) is None:
        return {"variance": zeros, "step": step}
    columns, rows = dims
    return {
        "rows": settled(zeros.sum(rows, keepdim=True)),
        "columns": settled(zeros.sum(columns, keepdim=True)),
        "step": step,
    }


def _adafactor(chunk: Chunk, group: Group) -> None:
    """Adafactor (arXiv 1804.04235, algorithm 4) as large ViTs are trained (2106.04560, 3.4).

    A matrix's second moments are the product of its rows' means and its columns' means; their decay
    is `min(beta2, 1 - step^-0.8)`. Unlike the first paper's: momentum, no scaling of the step by
    the size of the weights, and no clipping of it, so the learning rate is AdamW's.
    """
    for parameter, grad, momentum, state in zip(*chunk, strict=True):
        state["step"] += 1
        new = 1 - min(group["beta2"], 1 - state["step"].item() ** -0.8)
        squares = grad.square().add_(1e-30)
        if (dims := _factored(parameter.shape)) is None:
            update = grad * state["variance"].lerp_(squares, new).rsqrt()
        else:
            columns, rows = dims
            state["rows"].lerp_(_mean(squares, rows), new)
            state["columns"].lerp_(_mean(squares, columns), new)
            of_rows = (state["rows"] / _mean(state["rows"], columns)).rsqrt()
            update = grad * of_rows * state["columns"].rsqrt()
        momentum.lerp_(update, 1 - group["beta1"])
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(momentum, alpha=-group["lr"])


def _mean(tensor: Tensor, dim: int) -> Tensor:
    return settled(tensor.sum(dim, keepdim=True)) / tensor.shape[dim]


def _muon(chunk: Chunk, group: Group) -> None:
    """Muon with Nesterov momentum and AdamW's weight decay (arXiv 2502.16982, equation 3).

    Every process orthogonalises all matrices: half of what is exchanged would come back anyway.
    """
    params, grads, momenta = held(chunk.params), held(chunk.grads), held(chunk.momenta)
    torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
    ahead = [
        whole(grad.lerp(momentum, group["momentum"]).bfloat16())
        for grad, momentum in zip(chunk.grads, chunk.momenta, strict=True)
    ]
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
    found = zip(chunk.params, directions(ahead, group["parts"]), strict=True)
    steps = held([part_of(step, like) for like, step in found])
    for parameter, step in zip(params, steps, strict=True):
        parameter.add_(step, alpha=-group["lr"])


RULES: dict[str, Rule] = {
    "adamw": Rule(_start_adamw, _adamw),
    "sgd": Rule(_nothing, _sgd),
    "lamb": Rule(_start_lamb, _lamb),
    "adafactor": Rule(_start_adafactor, _adafactor),
    # Muon's time is in its matrix products, which are the faster the more matrices there are.
    "muon": Rule(_nothing, _muon, cached=2**22),
}
