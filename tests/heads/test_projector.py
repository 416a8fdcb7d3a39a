"""MoCo v3's projector and predictor."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from close import close
from vitrail.heads.projector import Predictor, Projector


def counted(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameters_by_hand() -> None:
    hidden, out, width = 4096, 256, 384
    of_norms = 2 * 2 * hidden  # two with scale and shift; the last has neither
    with torch.device("meta"):
        assert counted(Projector(width)) == (
            width * hidden + hidden * hidden + hidden * out + of_norms
        )
        assert counted(Projector(width)) == 19_415_040
        assert counted(Predictor()) == out * hidden + hidden * out + 2 * hidden == 2_105_344


def test_keys_are_the_authors() -> None:
    matrices = {name for name, p in Projector(8, 16, 4).named_parameters() if p.ndim == 2}
    assert matrices == {"0.weight", "3.weight", "6.weight"}
    learned = {name.split(".")[0] for name, _ in Projector(8, 16, 4).named_parameters()}
    assert learned == {"0", "1", "3", "4", "6"}
    kept = {name.split(".")[0] for name in Projector(8, 16, 4).state_dict()}
    assert kept == learned | {"7"}


@pytest.mark.parametrize("training", [True, False])
def test_a_plain_one_gives_the_same(training: bool) -> None:
    ours = Projector(6, 10, 4).double().train(training)
    plain = nn.Sequential(
        *(nn.Linear(6, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU()),
        *(nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU()),
        *(nn.Linear(10, 4, bias=False), nn.BatchNorm1d(4, affine=False)),
    )
    plain.double().train(training).load_state_dict(ours.state_dict())
    x = torch.randn(5, 6, dtype=torch.float64)
    close(ours(x), plain(x), 1e-12)
    for name, value in plain.state_dict().items():
        if training or "running" in name:
            close(ours.state_dict()[name].double(), value.double(), 1e-12, size=1)


def test_what_comes_out_of_a_batch_is_standardised() -> None:
    z = Predictor(8, 32)(torch.randn(40, 8))
    close(z.mean(dim=0), torch.zeros(8), size=10)
    close(z.var(dim=0, correction=0), torch.ones(8), 1e-3)


def test_one_image_and_bfloat16_pass() -> None:
    projector = Projector(8, 16, 4)
    assert projector(torch.randn(1, 8)).shape == (1, 4)  # by the running statistics
    with torch.autocast("cpu", torch.bfloat16):
        z = projector(torch.randn(6, 8))
    assert z.isfinite().all() and F.normalize(z.float(), dim=1).norm(dim=1).allclose(torch.ones(6))
