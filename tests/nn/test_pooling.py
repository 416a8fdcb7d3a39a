from functools import partial

import pytest
import torch
from timm.layers import AttentionPoolLatent

from close import close
from vitrail.nn import AttentionPool


@pytest.mark.parametrize("activation, act", [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_attention_pooling_equals_timms(activation, act, randomised):
    ours = randomised(AttentionPool(48, 4, 96, activation, norm_eps=0.1))
    theirs = AttentionPoolLatent(
        48,
        num_heads=4,
        mlp_ratio=2,
        norm_layer=partial(torch.nn.LayerNorm, eps=0.1),
        act_layer=partial(torch.nn.GELU, approximate=act),
    ).eval()
    state = ours.state_dict()
    theirs.load_state_dict({"latent": state.pop("probe"), **state})
    x = torch.randn(3, 10, 48)
    close(ours(x), theirs(x))


def test_attention_pooling_does_not_mind_the_order_of_the_tokens(randomised):
    pool = randomised(AttentionPool(48, 4, 96, "gelu"))
    x = torch.randn(3, 10, 48)
    close(pool(x[:, torch.randperm(10)]), pool(x))
