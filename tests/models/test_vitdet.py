"""ViTDet's backbone gives transformers' outputs, whatever the image's size and the windows'."""

from dataclasses import replace

import pytest
import torch
import transformers as hf

from vitrail.models import ViT, ViTConfig, model_config
from vitrail.nn import tokens_to_map
from vitrail.weights.layouts import understand, write_as

SMALL = replace(
    model_config("vitdet_b"),
    depth=4,
    width=48,
    heads=3,
    mlp=192,
    image_size=(64, 64),
    window=(3, 3),
    global_blocks=(1, 3),
    relative=(8, 8),
)


def theirs(config: ViTConfig) -> hf.VitDetBackbone:
    """transformers' model of that shape, at random, with tables that tell."""
    assert config.window is not None and config.relative is not None
    torch.manual_seed(0)
    model = hf.VitDetBackbone(
        hf.VitDetConfig(
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            image_size=config.relative[0] * 16,
            pretrain_image_size=config.image_size[0],
            window_size=config.window[0],
            window_block_indices=[i for i in range(config.depth) if i not in config.global_blocks],
            use_relative_position_embeddings=True,
            out_indices=list(range(1, config.depth + 1)),
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.5 if "rel_pos" in name or "position" in name else 0.1)
    return model.eval()


# Grids of 8x8, 6x12 (windows divide it), 5x7, 2x10 and 11x4 tokens.
@pytest.mark.parametrize("size", [(128, 128), (96, 192), (80, 112), (32, 160), (176, 64)])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_every_block_is_theirs(size, batch):
    their = theirs(SMALL)
    found = understand(their.state_dict(), {}, "it")
    assert found.config == SMALL
    our = ViT(found.config).eval()
    our.load_state_dict(found.state)
    x = torch.randn(batch, 3, *size)
    maps = our.taps(x, range(SMALL.depth))
    for ours, expected in zip(maps, their(x).feature_maps, strict=True):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
    features = our.features(x)
    last = tokens_to_map(features.patches, features.grid)
    assert torch.equal(last, features.maps[-1]) and torch.allclose(last, maps[-1], atol=1e-4)


def test_the_published_shape_has_their_parameters():
    config = model_config("vitdet_b")
    with torch.device("meta"):
        ours = sum(p.numel() for p in ViT(config).parameters())
    # Theirs has a position for a class token besides, which nothing reads.
    assert ours + config.width == 85_889_024


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@torch.no_grad()
def test_what_it_learns_has_gradients_and_bfloat16_is_near(kind):
    their = theirs(SMALL)
    our = ViT(SMALL).train()
    our.load_state_dict(understand(their.state_dict(), {}, "it").state)
    x = torch.randn(2, 3, 80, 112)
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, kind == "bfloat16"):
        pooled = our(x)
        pooled.float().square().sum().backward()
    expected = their(x).feature_maps[-1].mean(dim=(2, 3))
    share = 1e-5 if kind == "float32" else 0.03
    assert (pooled.float() - expected).abs().max() <= share * expected.abs().max() + 1e-6
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in our.parameters())


def test_weights_come_back_as_they_were():
    before = theirs(SMALL).state_dict()
    found = understand(before, {}, "it")
    after = write_as("huggingface", found.state, found.config)
    assert after.keys() == before.keys()
    before["embeddings.position_embeddings"][:, 0] = 0  # the class token's, which nothing reads
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


RF_DETR = {  # part of a name there -> in DINOv2's files
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


@torch.no_grad()
def test_windows_with_prefix_tokens_of_their_own_are_rf_detrs():
    """On squares: on oblong images transformers swaps the rows and columns of its windows."""
    from transformers.models.rf_detr.modeling_rf_detr import (
        RfDetrDinov2Backbone,
        RfDetrDinov2Config,
    )

    torch.manual_seed(0)
    shape = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "mlp_ratio": 2}
    their = RfDetrDinov2Backbone(
        RfDetrDinov2Config(**shape, image_size=112, num_windows=2, out_indices=[1, 3])
    ).eval()
    for name, parameter in their.named_parameters():
        if "norm" not in name:
            parameter.normal_(std=0.3 if "embeddings" in name else 0.1)
    state = {}
    for key, tensor in their.state_dict().items():
        for part, dinov2 in RF_DETR.items():
            key = key.replace(part, dinov2)
        state[key] = tensor
    found = understand(state, {"heads": 3, "layer_scale": 1.0}, "it")
    # Maps are those after 1 and after 3 blocks; the blocks of these numbers, from 0, are global.
    our = ViT(replace(found.config, windows=2, global_blocks=(1, 3))).eval()
    our.load_state_dict(found.state)
    x = torch.randn(3, 3, 112, 112)
    for ours, expected in zip(our.taps(x, (0, 2)), their(x).feature_maps, strict=True):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
