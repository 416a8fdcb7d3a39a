"""Low-rank adaptation: learn a small change of large matrices (Hu et al., arXiv 2106.09685)."""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_DOWN, _UP = "lora_down", "lora_up"


class LoraLinear(nn.Linear):
    """`y = W x + b + (alpha / rank) up down x` (equation 3), around a linear layer's own W and b.

    `weight` and `bias` keep their names, so a checkpoint of the plain model loads as it is. `up`
    starts at zero: at first the layer is what it was.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        device = base.weight.device
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = alpha / rank
        down = torch.randn(rank, base.in_features, device=device) / base.in_features**0.5
        self.lora_down = nn.Parameter(down)
        self.lora_up = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, input: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        change = F.linear(F.linear(input, self.lora_down), self.lora_up)
        return F.linear(input, self.weight, self.bias) + self.scale * change

    def merged(self) -> Float[Tensor, "e d"]:
        """The one matrix that does the same: `W + (alpha / rank) up down`."""
        return self.weight + self.scale * self.lora_up @ self.lora_down


def add_lora(
    model: nn.Module, names: Collection[str], rank: int, alpha: float
) -> list[nn.Parameter]:
    """Put a low-rank change beside the linear layers `names` of `model`; the new parameters."""
    added: list[nn.Parameter] = []
    for name in names:
        parent, _, last = name.rpartition(".")
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        layer = LoraLinear(base, rank, alpha)
        setattr(model.get_submodule(parent), last, layer)
        added += [layer.lora_down, layer.lora_up]
    return added


def has_lora(model: nn.Module) -> bool:
    """Whether any layer of `model` has a low-rank change."""
    return any(isinstance(module, LoraLinear) for module in model.modules())


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model that does what `model` does, its changes folded in."""
    state = {k: v for k, v in model.state_dict().items() if not k.endswith((_DOWN, _UP))}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            state[f"{name}.weight"] = module.merged()
    return state
