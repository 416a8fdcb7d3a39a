import pytest
import torch
import torch.nn.functional as F

from close import close
from vitrail.nn import Attention
from vitrail.nn.attention import attend


def test_equals_torch_multihead_attention_with_the_same_weights(randomised):
    ours = randomised(Attention(48, 4))
    theirs = torch.nn.MultiheadAttention(48, 4, batch_first=True).eval()
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x = torch.randn(3, 7, 48)
    close(ours(x), theirs(x, x, x)[0])


def test_without_bias_the_queries_keys_and_values_are_linear():
    assert Attention(48, 4, qkv_bias=False).qkv.bias is None


def test_qk_norm_is_a_layer_norm_over_each_head(randomised):
    attn = randomised(Attention(48, 4, qk_norm=True, norm_eps=1e-3))
    x = torch.randn(2, 5, 48)
    q, k, v = (y.view(2, 5, 4, 12).transpose(1, 2) for y in attn.qkv(x).chunk(3, dim=-1))
    q = F.layer_norm(q, (12,), attn.q_norm.weight, attn.q_norm.bias, 1e-3)
    k = F.layer_norm(k, (12,), attn.k_norm.weight, attn.k_norm.bias, 1e-3)
    out = (q @ k.mT / 12**0.5).softmax(dim=-1) @ v
    expected = attn.proj(out.transpose(1, 2).flatten(2))
    close(attn(x), expected)


def test_qk_norm_keeps_the_output_when_queries_grow_a_thousandfold(randomised):
    attn = randomised(Attention(48, 4, qk_norm=True))
    x = torch.randn(2, 5, 48)
    before = attn(x)
    with torch.no_grad():
        attn.qkv.weight[:48] *= 1000
        attn.qkv.bias[:48] *= 1000
    close(attn(x), before, 1e-4)


def test_dropout_acts_in_training_only(randomised):
    attn = randomised(Attention(48, 4, dropout=0.5))
    x = torch.randn(2, 5, 48)
    assert torch.equal(attn(x), attn(x))
    attn.train()
    assert not torch.equal(attn(x), attn(x))


def test_bfloat16_which_takes_another_way_on_a_cpu_says_the_same():
    q, k, v = torch.randn(3, 2, 4, 7, 16)
    expected = F.scaled_dot_product_attention(q, k, v)
    close(attend(q, k, v), expected)
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    close(half.float(), expected, 0.03)


def test_each_query_may_have_keys_of_its_own():
    q, k, v = torch.randn(3, 2, 4, 7, 16)
    keys = torch.rand(2, 7, 7) > 0.5
    keys[:, :, 0] = True
    logits = (q @ k.mT / 16**0.5).masked_fill(~keys[:, None], -torch.inf)
    expected = logits.softmax(dim=-1) @ v
    close(attend(q, k, v, keys), expected)
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), keys)
    close(half.float(), expected, 0.03)
    alike = keys[:, :1].expand(-1, 7, -1)
    close(attend(q, k, v, alike), attend(q, k, v, keys[:, 0]))


@pytest.mark.parametrize("keys", ["none", "counts", "booleans", "of each query"])
@torch.inference_mode()
def test_attention_is_the_same_where_a_graph_is_exported(keys, monkeypatch):
    q, k, v = torch.randn(3, 2, 4, 7, 16)
    given = {
        "none": None,
        "counts": torch.randint(1, 5, (2, 7)).float(),
        "booleans": torch.rand(2, 7) < 0.9,
        "of each query": (torch.rand(2, 7, 7) < 0.5) | torch.eye(7).bool(),
    }[keys]
    expected = attend(q, k, v, given)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    close(attend(q, k, v, given), expected)
