"""Optimisers take the steps that their papers and other people's code take, and resume exactly."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from close import close
from vitrail.errors import DataError, UsageError
from vitrail.models import ViTConfig, build
from vitrail.nn.lora import add_lora
from vitrail.runs import OptimConfig, read_checkpoint, write_checkpoint
from vitrail.runs.checkpoint import flatten_optimizer, restore_optimizer
from vitrail.training import muon
from vitrail.training.muon import directions, orthogonalised
from vitrail.training.optim import build_optimizer, hidden_matrices, learning_rate, weight_decay
from vitrail.training.rules import RuleOptimizer
from vitrail.training.step import cut_each

NAMES = ("adamw", "sgd", "muon", "lamb", "adafactor")
SMALL = ViTConfig(
    depth=2, width=48, heads=2, mlp=96, patch=(4, 4), image_size=(16, 16), channels=3, classes=3
)


def small(depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return build(replace(SMALL, depth=depth))


def give_gradients(module: nn.Module, step: int, skip: str = "nothing") -> None:
    """Gradients that depend on the step alone, and are small for some parameters."""
    random = torch.Generator().manual_seed(step)
    for i, (name, parameter) in enumerate(module.named_parameters()):
        size = 10.0 ** -(i % 3)
        value = torch.randn(parameter.shape, generator=random) * size
        parameter.grad = None if name.startswith(skip) else torch.empty_like(parameter).copy_(value)


def stepped(
    module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5, lr: float = 0.01
) -> list[Tensor]:
    for step in range(steps):
        give_gradients(module, step)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + step) * group.get("scale", 1.0)
        optimizer.step()
    return [p.detach() for p in module.parameters()]


def ours(rule: str, module: nn.Module, state: str = "float32", **changes: float) -> RuleOptimizer:
    settings = {"lr": 0.0, "weight_decay": 0.05, "beta1": 0.9, "beta2": 0.999, "momentum": 0.95}
    groups = [{"params": list(module.parameters()), "rule": rule, "parts": 1}]
    return RuleOptimizer(groups, settings | {"state": state} | changes)


def peer(rule: str, module: nn.Module) -> torch.optim.Optimizer:
    import timm.optim

    everything = list(module.parameters())
    if rule == "adamw":
        return torch.optim.AdamW(everything, weight_decay=0.05)
    if rule == "sgd":
        return torch.optim.SGD(everything, momentum=0.9, weight_decay=0.05)
    if rule == "lamb":
        return timm.optim.Lamb(everything, weight_decay=0.05, max_grad_norm=None)
    return timm.optim.AdafactorBigVision(
        everything, weight_decay=0.05, momentum_dtype="float32", min_dim_size_to_factor=32
    )


@pytest.mark.parametrize("rule", ["adamw", "sgd", "lamb", "adafactor"])
def test_steps_are_those_of_torch_and_timm(rule):
    module, other, rounded = small(), small(), small()
    before = [p.detach().clone() for p in module.parameters()]
    mine = stepped(module, ours(rule, module))
    theirs = stepped(other, peer(rule, other))
    for start, a, b in zip(before, mine, theirs, strict=True):
        close(a, b)
        assert (a - start).norm() > 1e-2 * start.norm()
    # In bfloat16 a momentum is right to 2^-9 at each step, and steps may cancel.
    half = stepped(rounded, ours(rule, rounded, "bfloat16"))
    for start, a, b in zip(before, mine, half, strict=True):
        assert 0 < (a - b).norm() < 2**-6 * (a - start).norm()


def test_lamb_leaves_adams_step_to_what_has_no_weight_decay():
    import timm.optim

    module, other = small(), small()
    config = OptimConfig(name="lamb", weight_decay=0.02)
    groups = build_optimizer(other, config).param_groups
    groups = [{k: g[k] for k in ("params", "weight_decay")} for g in groups]
    mine = stepped(module, build_optimizer(module, config))
    theirs = stepped(other, timm.optim.Lamb(groups, max_grad_norm=None))
    for a, b in zip(mine, theirs, strict=True):
        close(a, b)


def test_muons_steps_are_torchs_on_matrices_and_adamws_on_all_else():
    module, other = small(), small()
    config = OptimConfig(name="muon", weight_decay=0.1)
    optimizer = build_optimizer(module, config)
    named = dict(module.named_parameters())
    assert {n for n, p in named.items() if hidden_matrices(n, p)} == {
        f"encoder.blocks.{i}.{layer}.weight"
        for i in range(2)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    mine = dict(zip(named, stepped(module, optimizer), strict=True))

    rest = nn.Module()
    for i, (name, parameter) in enumerate(other.named_parameters()):
        rest.register_parameter(str(i), nn.Parameter(parameter.detach().clone()))
        assert name in mine
    adamw = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 * (p.ndim > 1)} for p in rest.parameters()]
    )
    all_adamw = dict(zip(named, stepped(rest, adamw), strict=True))

    apart = nn.Module()  # the same gradients, with q, k and v as parameters of their own
    pieces: dict[str, list[nn.Parameter]] = {}
    for name, parameter in other.named_parameters():
        if parts := hidden_matrices(name, parameter):
            assert parts == (3 if "qkv" in name else 1)
            pieces[name] = [nn.Parameter(p.detach().clone()) for p in parameter.chunk(parts)]
            for p in pieces[name]:
                apart.register_parameter(str(len(apart._parameters)), p)
    torchs = torch.optim.Muon(apart.parameters(), weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        give_gradients(other, step)
        for name, parameter in other.named_parameters():
            if name in pieces:
                grads = parameter.grad.chunk(len(pieces[name]))
                for piece, grad in zip(pieces[name], grads, strict=True):
                    piece.grad = grad
        torchs.param_groups[0]["lr"] = 0.01 * (1 + step)
        torchs.step()

    for name, value in mine.items():
        start = dict(small().named_parameters())[name]
        if name in pieces:
            theirs = torch.cat(list(pieces[name]))
            # torch's is in bfloat16; so is ours where the machine has that, and then only the
            # rounding differs between one product and a stack of them.
            assert (value - theirs).norm() < 0.05 * (value - start).norm(), name
        elif not name.startswith(("prefix", "position")):  # those have no weight decay here
            close(value, all_adamw[name])


def test_orthogonalised_matrices_have_singular_values_near_one():
    left, _, right = torch.linalg.svd(torch.randn(3, 20, 50).double(), full_matrices=False)
    values = torch.logspace(0, -2, 20).double() / 3
    matrices = left @ torch.diag_embed(values.expand(3, -1)) @ right
    found = orthogonalised(matrices.clone())
    inner = left.mT @ found @ right.mT
    assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 1e-9
    assert 0.65 < inner.diagonal(dim1=1, dim2=2).min() < inner.max() < 1.21
    rough = orthogonalised(matrices.bfloat16()).double()
    assert (rough - found).norm() < 0.05 * found.norm()
    assert not orthogonalised(torch.zeros(1, 3, 4)).any()


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5),
    parts=st.integers(1, 3),
)
def test_a_direction_is_as_long_as_adamws_whatever_the_shape(shapes, parts):
    torch.manual_seed(0)
    updates = [torch.randn(parts * rows, columns) for rows, columns in shapes]
    for update, found in zip(updates, directions(updates, parts), strict=True):
        assert found.shape == update.shape
        assert 0.05 < found.float().square().mean().sqrt() < 0.26
        for piece, its in zip(update.chunk(parts), found.float().chunk(parts), strict=True):
            assert (piece * its).sum() > 0
            alone = next(iter(directions([piece], 1))).float()
            close(its, alone, 0.03)


def test_where_bfloat16_is_emulated_directions_are_computed_in_float32(monkeypatch):
    update = torch.randn(64, 32)
    found = {}
    for precision in ("float32", "bfloat16"):
        monkeypatch.setattr(muon, "native_precision", lambda device, p=precision: p)
        (direction,) = directions([update], 1)
        assert direction.dtype == getattr(torch, precision)
        found[precision] = direction.float()
    assert (found["bfloat16"] - found["float32"]).norm() < 0.05 * found["float32"].norm()


def test_muon_takes_a_convolution_for_the_matrix_of_a_patch():
    kernel = torch.randn(8, 3, 2, 2)
    (found,) = directions([kernel], 1)
    (flat,) = directions([kernel.flatten(1)], 1)
    assert torch.equal(found, flat.view(8, 3, 2, 2))
    (tall,) = directions([torch.randn(8, 3, 1, 1)], 1)
    assert tall.shape == (8, 3, 1, 1)


def test_what_is_muons_in_other_families():
    def chosen(name: str, **changes: object) -> dict[str, int]:
        model = build(name, **changes)
        parts = {n: hidden_matrices(n, p) for n, p in model.named_parameters()}
        return {n: k for n, k in parts.items() if k}

    twins = chosen("twins_svt_s")
    assert twins["stages.0.blocks.1.attn.kv.weight"] == 2
    assert "stages.0.blocks.1.attn.reduce.proj.weight" in twins
    assert not any("peg" in n or n.startswith(("stem", "head")) for n in twins)
    pruned = chosen("dynamicvit_s16")
    assert not any("predictors" in n for n in pruned) and len(pruned) == 4 * 12
    assert {n.split(".")[0] for n in chosen("resnet50")} == {"stages"}
    assert all(p > 0 for p in chosen("mixer_s16").values())


def test_muon_without_a_matrix_says_so():
    model = build(SMALL)
    names = [f"encoder.blocks.{i}.attn.qkv" for i in range(2)]
    model.requires_grad_(False)
    add_lora(model, names, 2, 4.0)
    with pytest.raises(UsageError, match="use adamw"):
        build_optimizer(model, OptimConfig(name="muon"))


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_optimiser_goes_on_bit_by_bit(name, state, tmp_path):
    config = OptimConfig(name=name, state=state, lr=0.01)

    def scale(parameter: str) -> float:
        return 0.5 if parameter.startswith("stem") else 1.0

    def run(module: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            # The head alone learns at first, as in a warm-up of it.
            give_gradients(module, step, skip="encoder" if step < 2 else "nothing")
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + step) * group["scale"]
            optimizer.step()

    straight = small()
    run(straight, build_optimizer(straight, config, scale), 0, 6)

    before = small()
    optimizer = build_optimizer(before, config, scale)
    run(before, optimizer, 0, 3)
    tensors = {"model": before.state_dict(), "optimizer": flatten_optimizer(optimizer)}
    write_checkpoint(tmp_path / "last", tensors, {})

    saved = read_checkpoint(tmp_path / "last").tensors
    after = small()
    again = build_optimizer(after, config, scale)
    after.load_state_dict(saved["model"])
    restore_optimizer(again, saved["optimizer"])
    old, new = optimizer.state_dict()["state"], again.state_dict()["state"]
    assert {k: v.dtype for s in old.values() for k, v in s.items()} == {
        k: v.dtype for s in new.values() for k, v in s.items()
    }
    run(after, again, 3, 6)
    for a, b in zip(straight.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)


def test_half_the_states_are_half_as_large():
    def per_parameter(name: str, state: str) -> float:
        module = small()
        optimizer = build_optimizer(module, OptimConfig(name=name, state=state))
        stepped(module, optimizer, 1)
        size = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
        return size / sum(p.numel() for p in module.parameters())

    found = {(n, s): per_parameter(n, s) for n in NAMES for s in ("float32", "bfloat16")}
    assert found["adamw", "float32"] == found["lamb", "float32"] == 8
    assert found["adamw", "bfloat16"] == found["lamb", "bfloat16"] == 6
    assert found["sgd", "float32"] == 4 and found["sgd", "bfloat16"] == 2
    assert found["adafactor", "float32"] < 4.6 and found["adafactor", "bfloat16"] < 2.6
    assert found["muon", "float32"] - found["muon", "bfloat16"] == 2


def test_states_take_the_memory_format_of_the_weights():
    """What comes back from a file is contiguous, and torch's fused kernel believes it."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    config = OptimConfig(state="bfloat16")
    optimizer = build_optimizer(conv, config)
    stepped(conv, optimizer, 2)
    again = build_optimizer(conv, config)
    saved = {k: v.contiguous() for k, v in flatten_optimizer(optimizer).items()}
    restore_optimizer(again, saved)
    assert again.state[conv.weight]["variance"].stride() == conv.weight.stride()
    for name, value in optimizer.state[conv.weight].items():
        assert torch.equal(value, again.state[conv.weight][name])


def test_another_optimisers_states_are_refused():
    module = small()
    adamw = build_optimizer(module, OptimConfig(state="bfloat16"))
    stepped(module, adamw, 1)
    sgd = build_optimizer(module, OptimConfig(name="sgd", state="bfloat16"))
    with pytest.raises(DataError, match="another optimiser"):
        restore_optimizer(sgd, flatten_optimizer(adamw))


def test_a_trapezoid():
    config = OptimConfig(lr=2.0, schedule="trapezoid", warmup=0.1, cooldown=0.4, final_lr=0.0)
    rates = [learning_rate(config, p) for p in (0.05, 0.1, 0.6, 0.8, 1.0, 1.1)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1.0, 0.0, 0.0])
    with pytest.raises(UsageError, match="more than the run"):
        OptimConfig(schedule="trapezoid", warmup=0.5, cooldown=0.6)
    for wrong in ({"cooldown": 0.0}, {"beta1": 1.0}, {"beta2": -0.1}, {"muon_momentum": math.nan}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            OptimConfig(**wrong)


def _sharded(rank: int, folder: Path) -> None:
    """One of two processes: every optimiser, over rows of the parameters."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.set_num_threads(1)
    # Over a file, not over a port that another test may take.
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name in NAMES:
        for state in ("float32", "bfloat16")[: 2 if name in ("adamw", "muon") else 1]:
            whole, parts = small(depth=1), small(depth=1)
            for module in parts.modules():
                for key, parameter in list(module._parameters.items()):
                    if parameter is not None:
                        rows = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
                        setattr(module, key, nn.Parameter(rows))
            config = OptimConfig(name=name, state=state)
            alone, together = build_optimizer(whole, config), build_optimizer(parts, config)
            for step in range(3):
                give_gradients(whole, step)
                for mine, its in zip(whole.parameters(), parts.parameters(), strict=True):
                    its.grad = distribute_tensor(mine.grad, mesh, [Shard(0)])
                alone.step()
                together.step()
                if step == 1 and isinstance(together, RuleOptimizer):
                    # From whole tensors, as a checkpoint holds them.
                    saved = {
                        key: value.full_tensor() if hasattr(value, "full_tensor") else value
                        for key, value in flatten_optimizer(together).items()
                    }
                    together = build_optimizer(parts, config)
                    restore_optimizer(together, saved)
            worst = max(
                float(
                    (mine - its.full_tensor()).detach().norm()
                    / mine.detach().norm().clamp(min=1e-9)
                )
                for mine, its in zip(whole.parameters(), parts.parameters(), strict=True)
            )
            norms = [cut_each(each.parameters(), 0.5) for each in (whole, parts)]
            assert norms[0] == pytest.approx(norms[1], rel=1e-6)
            for mine, its in zip(whole.parameters(), parts.parameters(), strict=True):
                close(its.grad.full_tensor(), mine.grad, 1e-5)
            if rank == 0:
                (folder / f"{name}-{state}.worst").write_text(str(worst))
    dist.destroy_process_group()
    # Not by way of the interpreter's end: gloo's thread may still be letting go of the last tensor,
    # for which it needs the interpreter, and would end the process with SIGABRT (1 in 40 did). A
    # run has its last words over the store before it ends.
    os._exit(0)


def test_sharded_parameters_take_the_same_steps(tmp_path):
    torch.multiprocessing.spawn(_sharded, (tmp_path,), nprocs=2)
    worst = {file.name: float(file.read_text()) for file in tmp_path.glob("*.worst")}
    assert len(worst) == len(NAMES) + 2
    assert max(worst.values()) < 1e-6, worst


@pytest.mark.gpu
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_takes_the_same_steps_and_resumes(name, state):
    config = OptimConfig(name=name, state=state)
    cpu, gpu = small(), small().cuda()
    slow = stepped(cpu, build_optimizer(cpu, config), 4)
    optimizer = build_optimizer(gpu, config)
    stepped(gpu, optimizer, 4)
    for a, b in zip(slow, gpu.parameters(), strict=True):
        close(a, b.detach().cpu(), 1e-2)
    again = build_optimizer(gpu, config)
    restore_optimizer(again, {k: v.cpu() for k, v in flatten_optimizer(optimizer).items()})
    before = [p.detach().clone() for p in gpu.parameters()]
    give_gradients(gpu, 9)
    optimizer.step()
    after = [p.detach().clone() for p in gpu.parameters()]
    with torch.no_grad():
        for parameter, value in zip(gpu.parameters(), before, strict=True):
            parameter.copy_(value)
    again.step()
    for a, b in zip(after, gpu.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weight_decay_goes_to_its_end_on_a_cosine():
    config = OptimConfig(weight_decay=0.04, final_weight_decay=0.4)
    found = [weight_decay(config, done) for done in (0.0, 0.25, 0.5, 1.0, 1.2)]
    quarter = 0.4 - 0.36 * (1 + math.cos(math.pi / 4)) / 2
    assert found == pytest.approx([0.04, quarter, 0.22, 0.4, 0.4])
    assert weight_decay(OptimConfig(weight_decay=0.04), 0.7) == 0.04


def test_each_gradient_is_cut_by_its_own_norm():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5)), nn.Parameter()]
    grads = [torch.randn(3, 4) * 9, torch.randn(5) * 0.01]
    for parameter, grad in zip(parameters, grads, strict=False):
        parameter.grad = grad.clone()
    norm = cut_each(parameters, 2.0)
    assert norm == pytest.approx(math.hypot(*(grad.norm().item() for grad in grads)), rel=1e-5)
    close(parameters[0].grad, grads[0] * 2 / grads[0].norm())
    assert torch.equal(parameters[1].grad, grads[1])
    assert cut_each(parameters[:1], math.inf) == pytest.approx(2.0, rel=1e-5)
