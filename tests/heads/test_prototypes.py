"""DINO's head: cosines with prototypes of length 1."""

import pytest
import torch
import torch.nn.functional as F

from close import close
from vitrail.heads.prototypes import PrototypeHead


def test_it_gives_cosines_whatever_the_lengths() -> None:
    torch.manual_seed(0)
    head, x = PrototypeHead(12, hidden=16, out=8, prototypes=20), torch.randn(3, 5, 12)
    found = head(x)
    assert found.shape == (3, 5, 20) and found.abs().max() <= 1 + 1e-6
    plain = F.gelu(F.gelu(x @ head.mlp[0].weight.T) @ head.mlp[2].weight.T) @ head.mlp[4].weight.T
    close(found, F.cosine_similarity(plain[..., None, :], head.last.weight, dim=-1))
    with torch.no_grad():
        head.last.weight.mul_(torch.rand(20, 1) + 0.1)
    close(head(x), found)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(x).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_it_is_lightlys() -> None:
    pytest.importorskip("lightly")
    from lightly.models.modules import DINOProjectionHead

    theirs = DINOProjectionHead(12, 16, 8, 20, norm_last_layer=True)
    ours = PrototypeHead(12, hidden=16, out=8, prototypes=20)
    linear = [each for each in theirs.layers if isinstance(each, torch.nn.Linear)]
    with torch.no_grad():
        for mine, its in zip((ours.mlp[0], ours.mlp[2], ours.mlp[4]), linear, strict=True):
            mine.weight.copy_(its.weight)
            mine.bias.copy_(its.bias)
        ours.last.weight.copy_(theirs.last_layer.weight)
    x = torch.randn(6, 12)
    close(ours(x), theirs(x))
