"""Models of other code bases: in the shape of one of our configs, and with signals in them."""

import timm
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from vitrail.models import BiTConfig, GmlpConfig, MixerConfig, MobileViTConfig


def timm_mixer(config: MixerConfig | GmlpConfig, **changes: object) -> nn.Module:
    """timm's MLP-Mixer or gMLP."""
    ratio = config.mlp / config.width
    kind: dict[str, object]
    if isinstance(config, MixerConfig):
        kind = {"mlp_ratio": (config.tokens_mlp / config.width, ratio)}
    else:
        kind = {
            "mlp_ratio": ratio,
            "block_layer": timm.models.mlp_mixer.SpatialGatingBlock,
            "mlp_layer": timm.layers.GatedMlp,
        }
    return timm.models.MlpMixer(
        num_classes=config.classes,
        img_size=config.image_size,
        in_chans=config.channels,
        patch_size=config.patch[0],
        num_blocks=config.depth,
        embed_dim=config.width,
        **kind,
        **changes,
    )


def transformers_bit(config: BiTConfig) -> hf.BitConfig:
    return hf.BitConfig(
        num_channels=config.channels,
        embedding_size=config.widths[0] // 4,
        hidden_sizes=list(config.widths),
        depths=list(config.depths),
        num_labels=config.classes,
    )


def transformers_mobilevit(config: MobileViTConfig) -> hf.MobileViTConfig:
    return hf.MobileViTConfig(
        num_channels=config.channels,
        hidden_sizes=list(config.token_widths),
        neck_hidden_sizes=[config.stem_width, *config.widths, config.last_width],
        expand_ratio=float(config.expansion),
        num_labels=config.classes,
    )


@torch.no_grad()
def lively(model: nn.Module) -> nn.Module:
    """With the statistics of the batch norms' own inputs, so that images tell in the logits: at
    random the signal fades from block to block, and faults with it.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    first = next(p for p in model.parameters() if p.ndim == 4)
    model.train()(images(16, first.shape[1], (64, 96)))
    assert all(norm.running_var.min() > 0 for norm in norms)
    return model.eval()


def images(count: int, channels: int, size: tuple[int, int]) -> torch.Tensor:
    """Large shapes and some noise: of noise alone, every image has the same mean."""
    shapes = F.interpolate(torch.rand(count, channels, 2, 2).round(), size)
    return 0.8 * shapes + 0.2 * torch.rand(count, channels, *size)
