"""Models of other code bases in the shape of one of our configs."""

import timm
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
