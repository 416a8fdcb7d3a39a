"""Tiny models of every code base whose files we read, and the files that they write.

Depth 2 and width 24 run every line that depth 12 and width 768 do.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from vitrail.models import ViTConfig
from vitrail.nn import sincos_table

State = dict[str, Tensor]

D, H, M, DEPTH, P, CLASSES = 24, 3, 48, 2, 8, 5
OBLONG, SQUARE = (16, 24), (24, 24)
SHAPE: dict[str, Any] = {
    "depth": DEPTH,
    "width": D,
    "heads": H,
    "mlp": M,
    "patch": (P, P),
    "classes": CLASSES,
}


def one_of_each(keys: Iterable[str]) -> list[str]:
    """Of keys that differ in their first number, which is the block's, the first."""
    return list({re.sub(r"\d+", "", key, count=1): key for key in reversed(list(keys))}.values())


def in_turns(*shapes: tuple[int, ...]) -> pytest.MarkDecorator:
    """A test that gives each tensor one of `shapes`; each of the others, slowly."""
    turns = [shapes[i:] + shapes[:i] for i in range(len(shapes))]
    slow = (pytest.param(turn, marks=pytest.mark.slow) for turn in turns[1:])
    ids = [str(turn[0]) for turn in turns]
    return pytest.mark.parametrize("shapes", [turns[0], *slow], ids=ids)


@dataclass(frozen=True, kw_only=True)
class Source:
    """One kind of file: who writes it, and what ours makes of it."""

    layout: str
    """The name in LAYOUTS."""
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)
    """Their outputs for images."""
    file: Callable[[State], State] = dict
    """Their state dict as the file has it."""
    size: tuple[int, int] = OBLONG
    config: Mapping[str, Any] = field(default_factory=dict)
    """What differs from SHAPE in ours."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """What has to be told, besides heads and image size."""
    left_out: frozenset[str] = frozenset()
    key_bias: bool = True
    """Whether keys may have a bias."""
    exact: bool = True
    """Whether the file comes back bit by bit; else the same function does."""

    @property
    def expected(self) -> ViTConfig:
        return ViTConfig(**{**SHAPE, "image_size": self.size, **self.config})

    def tensors(self, model: nn.Module, folder: Path) -> State:
        """The tensors of the file: what `save_pretrained` writes, where there is such a thing."""
        if isinstance(model, hf.PreTrainedModel):
            model.save_pretrained(folder)
            return self.file(load_file(folder / "model.safetensors"))
        return self.file({k: t.clone() for k, t in model.state_dict().items()})


def _timm(kind: type[nn.Module] = timm.models.VisionTransformer, **changes: Any) -> nn.Module:
    arguments = {
        "img_size": OBLONG,
        "patch_size": P,
        "embed_dim": D,
        "depth": DEPTH,
        "num_heads": H,
        "mlp_ratio": M / D,
        "num_classes": CLASSES,
    }
    return kind(**{**arguments, **changes})


def _hybrid(depths: tuple[int, ...], **arguments: Any) -> nn.Module:
    """The stem of a hybrid: P pixels are a cell of two stages' map, or 2x2 of the root's."""
    from timm.models.vision_transformer_hybrid import _resnetv2

    arguments["patch_size"] = 1 if depths else 2
    return timm.layers.HybridEmbed(_resnetv2(depths), **arguments)


def _under(prefix: str, **beside: Tensor) -> Callable[[State], State]:
    """The file of a checkpoint of which the model is a part."""
    return lambda state: (
        {f"{prefix}{key}": t for key, t in state.items()}
        | {name.replace("__", "."): t for name, t in beside.items()}
    )


def _fixed(state: State, kind: Any) -> State:
    """With the fixed positions that MAE and MoCo v3 have, none for the class token."""
    rows = sincos_table((3, 3), D, kind)
    return {**state, "pos_embed": torch.cat([torch.zeros(1, D), rows])[None]}


def _at_fixed(model: nn.Module, x: Tensor, kind: Any) -> Tensor:
    model.load_state_dict(_fixed(model.state_dict(), kind))
    return model(x)


def _deit3(state: State) -> State:
    return {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t
        for key, t in state.items()
    }


def _dinov2(state: State) -> State:
    """As facebookresearch/dinov2 has it: the class token's row in the table, a mask token."""
    row = torch.randn(1, 1, D)
    theirs = {key.replace("reg_token", "register_tokens"): t for key, t in state.items()}
    theirs["pos_embed"] = torch.cat([row, state["pos_embed"]], dim=1)
    theirs["cls_token"] = state["cls_token"] - row
    return theirs | {"mask_token": torch.zeros(1, D)}


def _dinov2_giant(state: State) -> State:
    names = {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"}
    for ours, theirs in names.items():
        state = {key.replace(ours, theirs): t for key, t in state.items()}
    return _dinov2(state)


def _chunked(state: State) -> State:
    """Two chunks of one block each, in a teacher: what its training writes."""
    theirs = {}
    for key, tensor in _dinov2(state).items():
        block = key.split(".")[1] if key.startswith("blocks.") else ""
        theirs["backbone." + key.replace(f"blocks.{block}.", f"blocks.{block}.{block}.")] = tensor
    return theirs | {"dino_head.mlp.0.weight": torch.zeros(2, D)}


def _eva(**changes: Any) -> nn.Module:
    """DINOv3 in timm."""
    arguments = {
        "init_values": 0.1,
        "rope_type": "dinov3",
        "rope_temperature": 100,
        "rope_rotate_half": True,
        "use_rot_pos_emb": True,
        "use_abs_pos_emb": False,
        "num_reg_tokens": 4,
        "use_fc_norm": False,
        "norm_layer": partial(nn.LayerNorm, eps=1e-5),
        "num_classes": 0,
        "dynamic_img_size": True,
    }
    return _timm(timm.models.Eva, **{**arguments, **changes})


def _dinov3(state: State) -> State:
    """As facebookresearch/dinov3 has it: a masked bias, periods in bfloat16, a mask token."""
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    names |= {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2"}
    gated = any("fc1_g" in key for key in state)
    theirs = {}
    for key, tensor in state.items():
        for timms, own in (names | ({"mlp.fc2": "mlp.w3"} if gated else {})).items():
            key = key.replace(timms, own)
        theirs[key] = tensor
    for i in range(DEPTH):
        q, v = (theirs.pop(f"blocks.{i}.attn.{part}_bias", None) for part in "qv")
        if q is not None:
            theirs[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.zeros(D), v])
            mask = torch.cat([torch.ones(D), torch.zeros(D), torch.ones(D)])
            theirs[f"blocks.{i}.attn.qkv.bias_mask"] = mask
    periods = 100 ** (torch.arange(D // H // 4) / (D // H // 4))
    theirs["rope_embed.periods"] = periods.bfloat16()
    return theirs | {"mask_token": torch.zeros(1, D)}


EXACT = {"activation": "gelu", "norm_eps": 1e-6}
DINOV2_TIMM = partial(_timm, init_values=0.1, no_embed_class=True, reg_tokens=4, num_classes=0)
DINOV2_CONFIG = {
    "classes": 0,
    "layer_scale": 1e-5,
    "registers": 4,
    "resample": "bicubic_antialias",
}
NO_ROW = {"prefix_position": False}
MEAN = {"class_token": False, "pool": "mean", "prefix_position": False}
SIGLIP = {**MEAN, "pool": "map", "classes": 0, "activation": "gelu_tanh"}
CLIP = {"pre_norm": True, "stem_bias": False, "norm_eps": 1e-5}
BICUBIC = {"resample": "bicubic"}

DINOV3_CONFIG = {
    "classes": 0,
    "position": "rope",
    "layer_scale": 1e-5,
    "registers": 4,
    "norm_eps": 1e-5,
}
GATED = {"activation": "swiglu"}
NAFLEX = {"embed_dim": D, "depth": DEPTH, "num_heads": H, "mlp_ratio": M / D, "patch_size": P}


def _naflex(**changes: Any) -> nn.Module:
    cfg = timm.models.naflexvit.NaFlexVitCfg(pos_embed_grid_size=(2, 3), **NAFLEX, **changes)
    return timm.models.NaFlexVit(cfg, num_classes=0 if cfg.global_pool == "map" else CLASSES)


TIMM = {
    "timm": Source(layout="timm", build=_timm),
    "timm, no_embed_class and registers": Source(
        layout="timm",
        build=partial(_timm, no_embed_class=True, reg_tokens=4),
        config={"registers": 4, **NO_ROW},
    ),
    "timm, registers with positions": Source(
        layout="timm",
        build=partial(_timm, reg_tokens=4),
        config={"registers": 4},
        exact=False,
    ),
    "timm, average pooling before the norm": Source(
        layout="timm",
        build=partial(_timm, global_pool="avg"),
        config={"pool": "mean", "pool_norm": True},
    ),
    "timm, no class token": Source(
        layout="timm",
        build=partial(_timm, global_pool="avg", class_token=False, fc_norm=False),
        config=MEAN,
    ),
    "timm, qk_norm and no qkv bias": Source(
        layout="timm",
        build=partial(_timm, qk_norm=True, qkv_bias=False),
        config={"qk_norm": True, "qkv_bias": False},
    ),
    "timm, distilled": Source(
        layout="timm",
        build=partial(_timm, timm.models.deit.VisionTransformerDistilled),
        config={"distilled": True},
    ),
    "timm, wrapped by Lightning": Source(
        layout="timm",
        build=_timm,
        file=_under("model.", loss__weight=torch.zeros(3)),
        left_out=frozenset({"loss.weight"}),
    ),
    "timm, a hybrid": Source(
        layout="timm-hybrid",
        build=partial(_timm, embed_layer=partial(_hybrid, (1, 2))),
        config={"stem": "resnet", "stem_depths": (1, 2), "stem_eps": "timm"},
    ),
    "timm, a hybrid of the root alone": Source(
        layout="timm-root",
        build=partial(_timm, patch_size=2, embed_layer=partial(_hybrid, ())),
        config={"stem": "resnet", "stem_eps": "timm"},
    ),
    "timm, CLIP": Source(
        layout="timm-clip",
        build=partial(
            _timm,
            pre_norm=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-5),
            act_layer="quick_gelu",
        ),
        config={**CLIP, "activation": "gelu_quick"},
        told={"activation": "gelu_quick"},
    ),
    "timm, SigLIP": Source(
        layout="timm-siglip",
        build=partial(
            _timm, class_token=False, global_pool="map", act_layer="gelu_tanh", num_classes=0
        ),
        config={**SIGLIP, "resample": "bilinear_aligned"},
    ),
    "timm, DINOv3": Source(
        layout="timm-dinov3",
        build=partial(_eva, qkv_bias=False),
        config={**DINOV3_CONFIG, "qkv_bias": False, "pool": "mean"},
    ),
    "timm, DINOv3 with biases, gated": Source(
        layout="timm-dinov3",
        build=partial(_eva, swiglu_mlp=True, swiglu_align_to=8, global_pool="token"),
        config={**DINOV3_CONFIG, **GATED},
        told={"pool": "class"},
        key_bias=False,
    ),
    "timm, DINOv3 with a head": Source(
        layout="timm-dinov3",
        build=partial(_eva, num_classes=CLASSES),
        config={**DINOV3_CONFIG, "pool": "mean", "classes": CLASSES},
        key_bias=False,
    ),
    "timm, NaFlex": Source(
        layout="timm-naflex",
        build=partial(_naflex, init_values=0.1, global_pool="avg", reg_tokens=4, fc_norm=True),
        config={**MEAN, "pool_norm": True, "registers": 4, "layer_scale": 1e-5},
    ),
    "timm, SigLIP 2 of any size": Source(
        layout="timm-naflex-siglip",
        build=partial(
            _naflex, act_layer="gelu_tanh", global_pool="map", pos_embed_interp_mode="bilinear"
        ),
        config={**SIGLIP, "resample": "bilinear_antialias"},
    ),
    "open_clip, SigLIP": Source(
        layout="timm-siglip",
        build=partial(
            _timm, class_token=False, global_pool="map", act_layer="gelu_tanh", num_classes=0
        ),
        file=_under("visual.trunk.", logit_scale=torch.zeros(()), text__ln__weight=torch.ones(2)),
        config={**SIGLIP, "resample": "bilinear_aligned"},
        left_out=frozenset({"logit_scale", "text.ln.weight"}),
    ),
}

FACEBOOK = {
    "DeiT-III": Source(
        layout="deit3",
        build=partial(_timm, init_values=0.1, no_embed_class=True),
        file=_deit3,
        config={"layer_scale": 1e-5, **NO_ROW, **BICUBIC},
    ),
    "DINO, the backbone": Source(
        layout="timm", build=partial(_timm, num_classes=0), config={"classes": 0}
    ),
    "DINO, a student": Source(
        layout="dino",
        build=partial(_timm, num_classes=0),
        file=_under(
            "module.backbone.",
            module__head__mlp__0__weight=torch.zeros(2, D),
            module__head__last_layer__weight_g=torch.ones(9, 1),
        ),
        config={"classes": 0, "resample": "bicubic_offset"},
        left_out=frozenset({"module.head.mlp.0.weight", "module.head.last_layer.weight_g"}),
    ),
    "DINOv2": Source(
        layout="dinov2-registers",
        build=DINOV2_TIMM,
        file=_dinov2,
        config=DINOV2_CONFIG,
        left_out=frozenset({"mask_token"}),
    ),
    "TIPS": Source(
        layout="tips",
        build=partial(DINOV2_TIMM, reg_tokens=1),
        file=_dinov2,
        config={**DINOV2_CONFIG, "registers": 1, "resample": "bilinear_antialias"},
        left_out=frozenset({"mask_token"}),
    ),
    "DINOv2, in chunks": Source(
        layout="dinov2-registers",
        build=DINOV2_TIMM,
        file=_chunked,
        config=DINOV2_CONFIG,
        left_out=frozenset({"backbone.mask_token", "dino_head.mlp.0.weight"}),
        exact=False,
    ),
    "DINOv2, giant": Source(
        layout="dinov2",
        build=partial(
            DINOV2_TIMM,
            reg_tokens=0,
            mlp_ratio=2 * M / D,
            mlp_layer=timm.layers.SwiGLUPacked,
            act_layer=nn.SiLU,
        ),
        file=_dinov2_giant,
        config={
            **DINOV2_CONFIG,
            "registers": 0,
            "resample": "bicubic_offset",
            "activation": "swiglu",
        },
        left_out=frozenset({"mask_token"}),
    ),
    "DINOv3": Source(
        layout="dinov3",
        build=partial(_eva, global_pool="token"),
        file=_dinov3,
        config=DINOV3_CONFIG,
        left_out=frozenset({"mask_token"}),
        key_bias=False,
    ),
    "DINOv3, gated, without biases": Source(
        layout="dinov3",
        build=partial(
            _eva, global_pool="token", qkv_bias=False, swiglu_mlp=True, swiglu_align_to=8
        ),
        file=lambda state: {
            **_under("teacher.backbone.")(_dinov3(state)),
            **{f"teacher.backbone.local_cls_norm.{x}": torch.ones(D) for x in ("weight", "bias")},
        },
        config={**DINOV3_CONFIG, **GATED, "qkv_bias": False},
        left_out=frozenset(
            f"teacher.backbone.{x}"
            for x in ("mask_token", "local_cls_norm.weight", "local_cls_norm.bias")
        ),
    ),
    "MAE, with its decoder": Source(
        layout="mae",
        build=partial(_timm, num_classes=0),
        file=_under(
            "",
            mask_token=torch.zeros(1, 1, 16),
            decoder_embed__weight=torch.zeros(16, D),
            decoder_blocks__0__attn__qkv__weight=torch.zeros(48, 16),
        ),
        config={"classes": 0, **BICUBIC},
        left_out=frozenset(
            {"mask_token", "decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight"}
        ),
    ),
    "MoCo v3": Source(
        layout="mocov3",
        build=partial(_timm, num_classes=0),
        file=_under(
            "module.base_encoder.",
            module__base_encoder__head__0__weight=torch.zeros(16, D),
            module__base_encoder__head__1__running_mean=torch.zeros(16),
            module__momentum_encoder__cls_token=torch.zeros(1, 1, D),
            module__predictor__0__weight=torch.zeros(16, D),
        ),
        config={"classes": 0, **BICUBIC},
        left_out=frozenset(
            {
                "module.base_encoder.head.0.weight",
                "module.base_encoder.head.1.running_mean",
                "module.momentum_encoder.cls_token",
                "module.predictor.0.weight",
            }
        ),
    ),
    "MoCo v3, linear probe": Source(
        layout="mocov3",
        build=partial(_timm, img_size=SQUARE),
        file=lambda state: _under("module.")(_fixed(state, "sincos_moco")),
        run=lambda model, x: _at_fixed(model, x, "sincos_moco"),
        size=SQUARE,
        config=BICUBIC,
    ),
    "MAE, the encoder": Source(
        layout="mae",
        build=partial(_timm, img_size=SQUARE, num_classes=0),
        file=lambda state: _fixed(state, "sincos_mae"),
        run=lambda model, x: _at_fixed(model, x, "sincos_mae"),
        size=SQUARE,
        config={"classes": 0, **BICUBIC},
    ),
}


_EVA = partial(_timm, timm.models.eva.Eva)
_TURNED: dict[str, Any] = {"use_rot_pos_emb": True, "ref_feat_shape": (16, 16)}
_PE = partial(
    _EVA,
    img_size=SQUARE,
    attn_type="rope",
    use_pre_transformer_norm=True,
    use_rot_pos_emb=True,
    ref_feat_shape=(3, 3),
    rope_grid_offset=1.0,
    rope_grid_indexing="xy",
    norm_layer=partial(nn.LayerNorm, eps=1e-5),
)
_PE_CORE = partial(_PE, global_pool="map", attn_pool_num_heads=8, attn_pool_mlp_ratio=3.0)
_PE_DENSE = partial(
    _PE, num_classes=0, use_post_transformer_norm=False, use_fc_norm=False, init_values=0.1
)
_EVA02 = partial(_EVA, swiglu_mlp=True, **_TURNED)
_EVA02_NORMS = partial(_EVA02, qkv_fused=False, scale_mlp=True)

POOLED = {"pool": "mean", "pool_norm": True}
EVA_ROPE = {"position": "learned_rope", "rope": "eva", "rope_grid": (16, 16)}
EVA02 = {**POOLED, **EVA_ROPE, "activation": "swiglu"}
EVA02_CLIP = {**EVA02, "mlp_norm": True, "attn_norm": True, "pool": "class", "pool_norm": False}
PE = {
    "position": "learned_rope",
    "rope": "pe",
    "rope_grid": (3, 3),
    "norm_eps": 1e-5,
    "pre_norm": True,
    "stem_bias": False,
}
PE_CORE = {**PE, "pool": "map", "pool_heads": 8, "pool_mlp": 72, "pool_prefix": True}
PE_DENSE = {**PE, "classes": 0, "pool": "mean", "final_norm": False, "layer_scale": 1e-5}

_META = (  # what timm's function for these files renames, in its order
    *(("attn_pool.latent", "attn_pool.probe"), ("attn_pool.norm", "attn_pool.layernorm")),
    *(("attn_pool.proj", "attn_pool.attn.out_proj"), ("norm_pre", "ln_pre")),
    *(("patch_embed.proj", "conv1"), ("pos_embed", "positional_embedding")),
    *(("cls_token", "class_embedding"), (".attn.qkv.", ".attn.in_proj_")),
    *((".attn.proj.", ".attn.out_proj."), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")),
    *(("blocks.", "transformer.resblocks."), (".norm1", ".ln_1"), (".norm2", ".ln_2")),
    *(("gamma_1", "ls_1.gamma"), ("gamma_2", "ls_2.gamma")),
)


def _meta(state: State) -> State:
    """As Meta's own file has a Perception Encoder."""
    theirs = {}
    for key, tensor in state.items():
        name = f"ln_post.{key[5:]}" if key.startswith("norm.") else key
        for old, new in _META:
            name = name.replace(old, new)
        theirs[name] = (
            tensor.reshape(tensor.shape[-1 if "class" in name else -2 :])
            if (name in ("class_embedding", "positional_embedding"))
            else tensor
        )
    if "head.weight" in theirs:
        theirs["proj"] = theirs.pop("head.weight").T
        del theirs["head.bias"]
    for leaf in ("weight", "bias"):
        parts = [theirs.pop(f"attn_pool.{x}.{leaf}", None) for x in ("q", "kv")]
        if parts[0] is not None:
            theirs[f"attn_pool.attn.in_proj_{leaf}"] = torch.cat(parts)
    return theirs


_BAAI = (
    *(("attn.q_proj.bias", "attn.q_bias"), ("attn.v_proj.bias", "attn.v_bias")),
    *(("mlp.norm", "mlp.ffn_ln"), ("attn.norm", "attn.inner_attn_ln")),
    *(("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.fc1", "mlp.w12")),
    ("mlp.fc2", "mlp.w3"),
)


def _baai(state: State) -> State:
    """As BAAI's own files have EVA-02, with the angles that its code stores."""
    theirs = {"rope.freqs_cos": torch.ones(6, 8), "blocks.0.attn.rope.freqs_sin": torch.ones(6, 8)}
    for key, tensor in state.items():
        for old, new in _BAAI:
            key = key.replace(old, new)
        theirs[key] = tensor
    return theirs


_ANGLES = frozenset({"rope.freqs_cos", "blocks.0.attn.rope.freqs_sin"})

EVA = {
    "timm, EVA": Source(layout="timm-eva", build=_EVA, config=POOLED),
    "timm, EVA-CLIP": Source(layout="timm-eva", build=partial(_EVA, global_pool="token")),
    "timm, EVA-02, small": Source(layout="timm-eva02-packed", build=_EVA02, config=EVA02),
    "timm, EVA-02": Source(
        layout="timm-eva02", build=_EVA02_NORMS, config={**EVA02, "mlp_norm": True}
    ),
    "timm, EVA-02-CLIP": Source(
        layout="timm-eva02",
        build=partial(_EVA02_NORMS, global_pool="token", scale_attn_inner=True),
        config=EVA02_CLIP,
    ),
    "EVA-02, small": Source(
        layout="eva02-packed", build=_EVA02, file=_baai, config=EVA02, left_out=_ANGLES
    ),
    "EVA-02-CLIP": Source(
        layout="eva02",
        build=partial(_EVA02_NORMS, global_pool="token", scale_attn_inner=True),
        file=_baai,
        config=EVA02_CLIP,
        left_out=_ANGLES,
    ),
    "timm, rotary, registers": Source(
        layout="timm-rope-gap",
        build=partial(
            _EVA,
            class_token=False,
            num_reg_tokens=2,
            use_abs_pos_emb=False,
            init_values=0.1,
            **_TURNED,
        ),
        config={
            **POOLED,
            **EVA_ROPE,
            "position": "rope",
            "class_token": False,
            "registers": 2,
            "layer_scale": 1e-5,
        },
    ),
    "timm, RoPE-ViT": Source(
        layout="timm-rope-vit",
        build=partial(
            _EVA,
            global_pool="token",
            attn_type="rope",
            use_abs_pos_emb=False,
            use_rot_pos_emb=True,
            rope_grid_indexing="xy",
            rope_temperature=100.0,
            init_values=0.1,
        ),
        config={"position": "rope", "rope": "axial", "layer_scale": 1e-5},
    ),
    "timm, PE Core": Source(layout="timm-pe", build=_PE_CORE, size=SQUARE, config=PE_CORE),
    "timm, PE Core without class token": Source(
        layout="timm-pe",
        build=partial(_PE_CORE, class_token=False, rope_grid_offset=0.0),
        size=SQUARE,
        config={**PE_CORE, "class_token": False, "prefix_position": False},
    ),
    "timm, PE Lang": Source(layout="timm-pe-dense", build=_PE_DENSE, size=SQUARE, config=PE_DENSE),
    "PE Core": Source(
        layout="pe",
        build=partial(_PE_CORE, ref_feat_shape=None),
        run=lambda model, x: model(x) - model.head.bias,
        file=lambda state: _under("visual.", logit_scale=torch.zeros(()))(_meta(state)),
        size=SQUARE,
        config={**PE_CORE, "rope_grid": None, "head_bias": False, "resample": "bilinear"},
        left_out=frozenset({"logit_scale"}),
    ),
    "PE Lang": Source(
        layout="pe-dense",
        build=partial(_PE_DENSE, ref_feat_shape=None, class_token=False),
        file=_meta,
        size=SQUARE,
        config={
            **PE_DENSE,
            "rope_grid": None,
            "class_token": False,
            "prefix_position": False,
            "resample": "bilinear",
        },
    ),
}


def _hf(kind: type, config: type, size: tuple[int, int] = OBLONG, **changes: Any) -> nn.Module:
    arguments = {
        "hidden_size": D,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": H,
        "image_size": size,
        "patch_size": P,
        "num_labels": CLASSES,
    }
    if not config.__name__.startswith("Dinov2"):
        arguments["intermediate_size"] = M
    return kind(config(**{**arguments, **changes}))


def _tower(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": D,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": H,
        "intermediate_size": M,
        "image_size": SQUARE[0],
        "patch_size": P,
    } | changes


def _text() -> dict[str, Any]:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return sizes | {"num_attention_heads": 1, "vocab_size": 9, "projection_size": CLASSES}


def _output(name: str) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, x: model(x)[name]


def _clip() -> nn.Module:
    return hf.CLIPModel(
        hf.CLIPConfig(text_config=_text(), vision_config=_tower(), projection_dim=CLASSES)
    )


def _chinese_clip() -> nn.Module:
    return hf.ChineseCLIPModel(
        hf.ChineseCLIPConfig(text_config=_text(), vision_config=_tower(), projection_dim=CLASSES)
    )


def _siglip() -> nn.Module:
    return hf.SiglipModel(hf.SiglipConfig(text_config=_text(), vision_config=_tower()))


def _text_keys(model: Callable[[], nn.Module], *more: str) -> frozenset[str]:
    """Whatever a two-tower file has besides the image tower."""
    keys = model().state_dict()
    return frozenset({k for k in keys if not k.startswith("vision_model")} - set(more))


def _pooled_image(model: nn.Module, x: Tensor) -> Tensor:
    return model.vision_model(x).pooler_output


HF_EPS = {"norm_eps": 1e-12, **BICUBIC}
HF_DINOV2 = {"classes": 0, "layer_scale": 1e-5, "mlp": 4 * D, **BICUBIC}
HF_REGISTERS = {**HF_DINOV2, "registers": 4, "resample": "bicubic_antialias"}
HF_TIPSV2 = {**HF_REGISTERS, "registers": 1, "resample": "bilinear_antialias"}
MASK = "embeddings.mask_token"

HF_DINOV3 = partial(_hf, hf.DINOv3ViTModel, hf.DINOv3ViTConfig, num_register_tokens=4)


def naflex_inputs(x: Tensor, shapes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Images at the top left of `x`, each of so many patches, as NaFlex models take them."""
    patches = x.unfold(2, P, P).unfold(3, P, P).permute(0, 2, 3, 4, 5, 1).flatten(3)
    length = max(rows * columns for rows, columns in shapes)
    values = x.new_zeros(len(x), length, patches.shape[-1])
    mask = torch.zeros(len(x), length, dtype=torch.long)
    for i, (rows, columns) in enumerate(shapes):
        values[i, : rows * columns] = patches[i, :rows, :columns].flatten(0, 1)
        mask[i, : rows * columns] = 1
    return {
        "pixel_values": values,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor(shapes),
    }


def naflex_pooled(
    model: nn.Module, x: Tensor, shapes: list[tuple[int, int]] | None = None
) -> Tensor:
    """What a SigLIP 2 makes of images, whole ones or of so many patches."""
    shapes = shapes or [(x.shape[2] // P, x.shape[3] // P)] * len(x)
    tower = getattr(model, "vision_model", model)
    return tower(**naflex_inputs(x, shapes)).pooler_output


def _any_size(**changes: Any) -> dict[str, Any]:
    tower = _tower(num_patches=9, **changes)
    del tower["image_size"]
    return tower


def _siglip2() -> nn.Module:
    return hf.Siglip2Model(hf.Siglip2Config(text_config=_text(), vision_config=_any_size()))


def _mean(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).last_hidden_state.mean(dim=1)


HEADLESS = {**MEAN, "classes": 0, "activation": "gelu_tanh", **BICUBIC}


HUGGING_FACE = {
    "HF ViT": Source(
        layout="huggingface-vit",
        build=partial(_hf, hf.ViTForImageClassification, hf.ViTConfig),
        run=_output("logits"),
        config=HF_EPS,
    ),
    "HF ViT, bare, with its pooler": Source(
        layout="huggingface-vit-bare",
        build=partial(_hf, hf.ViTModel, hf.ViTConfig),
        run=_output("pooler_output"),
        config={"classes": 0, "representation": D, **HF_EPS},
    ),
    "HF ViT, masked images": Source(
        layout="huggingface-vit-bare",
        build=partial(_hf, hf.ViTForMaskedImageModeling, hf.ViTConfig, encoder_stride=P),
        run=lambda model, x: model.vit(x).last_hidden_state[:, 0],
        config={"classes": 0, **HF_EPS},
        left_out=frozenset({"vit.embeddings.mask_token", "decoder.0.weight", "decoder.0.bias"}),
    ),
    "HF DeiT with teacher": Source(
        layout="huggingface-deit-teacher",
        build=partial(_hf, hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig),
        run=_output("logits"),
        config={"distilled": True, **HF_EPS},
    ),
    "HF DeiT": Source(
        layout="huggingface-deit",
        build=partial(_hf, hf.DeiTForImageClassification, hf.DeiTConfig),
        run=_output("logits"),
        config={"registers": 1, **HF_EPS},
        exact=False,
    ),
    "HF DeiT, bare": Source(
        layout="huggingface-deit-bare",
        build=partial(_hf, hf.DeiTModel, hf.DeiTConfig),
        run=lambda model, x: model(x).last_hidden_state[:, 0],
        config={"classes": 0, "distilled": True, **HF_EPS},
        left_out=frozenset({"pooler.dense.weight", "pooler.dense.bias"}),
    ),
    "HF DINOv2": Source(
        layout="huggingface-dinov2",
        build=partial(_hf, hf.Dinov2Model, hf.Dinov2Config, size=SQUARE),
        run=_output("pooler_output"),
        size=SQUARE,
        config=HF_DINOV2,
        left_out=frozenset({MASK}),
    ),
    "HF DINOv2, a classifier": Source(
        layout="huggingface-dinov2",
        build=partial(_hf, hf.Dinov2ForImageClassification, hf.Dinov2Config, size=SQUARE),
        run=lambda model, x: model.dinov2(x).pooler_output,
        size=SQUARE,
        config=HF_DINOV2,
        left_out=frozenset({f"dinov2.{MASK}", "classifier.weight", "classifier.bias"}),
    ),
    "HF DINOv2 with registers": Source(
        layout="huggingface-dinov2-registers",
        build=partial(_hf, hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig, size=SQUARE),
        run=_output("pooler_output"),
        size=SQUARE,
        config=HF_REGISTERS,
        left_out=frozenset({MASK}),
    ),
    "HF DINOv2 with registers, giant, a classifier": Source(
        layout="huggingface-dinov2-registers",
        build=partial(
            _hf,
            hf.Dinov2WithRegistersForImageClassification,
            hf.Dinov2WithRegistersConfig,
            size=SQUARE,
            use_swiglu_ffn=True,
        ),
        run=lambda model, x: model.dinov2_with_registers(x).pooler_output,
        size=SQUARE,
        config={**HF_REGISTERS, "activation": "swiglu", "mlp": 64},
        left_out=frozenset(
            {f"dinov2_with_registers.{MASK}", "classifier.weight", "classifier.bias"}
        ),
    ),
    "HF MAE": Source(
        layout="huggingface-vit-bare",
        build=partial(_hf, hf.ViTMAEModel, hf.ViTMAEConfig, size=SQUARE, mask_ratio=0.0),
        run=lambda model, x: model(x).last_hidden_state[:, 0],
        size=SQUARE,
        config={"classes": 0, **HF_EPS},
    ),
    "HF DINOv3": Source(
        layout="huggingface-dinov3",
        build=partial(HF_DINOV3, mlp_bias=True),
        run=_output("pooler_output"),
        config=DINOV3_CONFIG,
        left_out=frozenset({MASK}),
    ),
    "HF DINOv3, gated, as it is in memory": Source(
        layout="huggingface-dinov3",
        build=partial(HF_DINOV3, use_gated_mlp=True, hidden_act="silu"),
        run=_output("pooler_output"),
        file=lambda state: {k.replace("layer.", "model.layer.", 1): t for k, t in state.items()},
        config={**DINOV3_CONFIG, **GATED},
        left_out=frozenset({MASK}),
        exact=False,
    ),
    "HF DINOv3, keys with a bias": Source(
        layout="huggingface-dinov3",
        build=partial(HF_DINOV3, key_bias=True),
        run=_output("pooler_output"),
        config=DINOV3_CONFIG,
        left_out=frozenset({MASK}),
    ),
    "HF TIPSv2, the image tower": Source(
        layout="tipsv2",
        build=partial(
            _hf, hf.Tipsv2VisionModel, hf.Tipsv2VisionConfig, size=SQUARE, num_register_tokens=1
        ),
        run=_output("pooler_output"),
        size=SQUARE,
        config=HF_TIPSV2,
        left_out=frozenset({"mask_token"}),
    ),
    "HF TIPSv2, giant": Source(
        layout="tipsv2",
        build=partial(
            _hf,
            hf.Tipsv2VisionModel,
            hf.Tipsv2VisionConfig,
            size=SQUARE,
            num_register_tokens=1,
            use_swiglu_ffn=True,
        ),
        run=_output("pooler_output"),
        size=SQUARE,
        file=_under("vision_encoder.", logit_scale=torch.zeros(())),
        config={**HF_TIPSV2, "activation": "swiglu", "mlp": 64},
        left_out=frozenset({"vision_encoder.mask_token", "logit_scale"}),
    ),
    "HF I-JEPA": Source(
        layout="huggingface-ijepa-bare",
        build=partial(_hf, hf.IJepaModel, hf.IJepaConfig),
        run=_mean,
        config={**MEAN, "classes": 0, **HF_EPS},
    ),
    "HF I-JEPA, a classifier": Source(
        layout="huggingface-ijepa",
        build=partial(_hf, hf.IJepaForImageClassification, hf.IJepaConfig),
        run=_output("logits"),
        config={**MEAN, **HF_EPS},
    ),
    "HF MSN": Source(
        layout="huggingface-vit-bare",
        build=partial(_hf, hf.ViTMSNModel, hf.ViTMSNConfig),
        run=lambda model, x: model(x).last_hidden_state[:, 0],
        config={"classes": 0, **BICUBIC},
        told={"norm_eps": 1e-6},
    ),
    "HF MetaCLIP 2, the image tower": Source(
        layout="huggingface-clip",
        build=lambda: hf.MetaClip2VisionModelWithProjection(
            hf.MetaClip2VisionConfig(**_tower(projection_dim=CLASSES))
        ),
        run=_output("image_embeds"),
        size=SQUARE,
        config={**CLIP, **BICUBIC, "head_bias": False, "activation": "gelu_quick"},
        told={"activation": "gelu_quick"},
    ),
    "HF Chinese CLIP": Source(
        layout="huggingface-clip",
        build=_chinese_clip,
        run=lambda model, x: model.visual_projection(_pooled_image(model, x)),
        size=SQUARE,
        config={**CLIP, **BICUBIC, "head_bias": False, "activation": "gelu_quick"},
        told={"activation": "gelu_quick"},
        left_out=_text_keys(_chinese_clip, "visual_projection.weight"),
    ),
    "HF SigLIP 2 of any size": Source(
        layout="huggingface-siglip2",
        build=_siglip2,
        run=naflex_pooled,
        size=SQUARE,
        config={**SIGLIP, "resample": "bilinear_antialias"},
        left_out=_text_keys(_siglip2),
    ),
    "HF SigLIP 2 of any size, the image tower": Source(
        layout="huggingface-siglip2",
        build=lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**_any_size())),
        run=naflex_pooled,
        size=SQUARE,
        config={**SIGLIP, "resample": "bilinear_antialias"},
    ),
    "HF SigLIP without its head, as in PaliGemma": Source(
        layout="huggingface-siglip-headless",
        build=lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**_tower(vision_use_head=False))),
        run=_mean,
        size=SQUARE,
        config=HEADLESS,
    ),
    "HF Idefics3": Source(
        layout="huggingface-siglip-headless",
        build=lambda: hf.Idefics3VisionTransformer(hf.Idefics3VisionConfig(**_tower())),
        run=_mean,
        size=SQUARE,
        file=_under("model.vision_model."),
        config={**HEADLESS, "resample": "nearest"},
        told={"resample": "nearest"},
    ),
    "HF SmolVLM": Source(
        layout="huggingface-siglip-headless",
        build=lambda: hf.SmolVLMVisionTransformer(hf.SmolVLMVisionConfig(**_tower())),
        run=_mean,
        size=SQUARE,
        file=_under("model.vision_model.", lm_head__weight=torch.zeros(9, 8)),
        config={**HEADLESS, "resample": "nearest"},
        told={"resample": "nearest"},
        left_out=frozenset({"lm_head.weight"}),
    ),
    "HF CLIP": Source(
        layout="huggingface-clip",
        build=_clip,
        run=lambda model, x: model.visual_projection(_pooled_image(model, x)),
        size=SQUARE,
        config={**CLIP, **BICUBIC, "head_bias": False, "activation": "gelu_quick"},
        told={"activation": "gelu_quick"},
        left_out=_text_keys(_clip, "visual_projection.weight"),
    ),
    "HF CLIP, the image tower": Source(
        layout="huggingface-clip",
        build=lambda: hf.CLIPVisionModelWithProjection(
            hf.CLIPVisionConfig(**_tower(projection_dim=CLASSES, hidden_act="gelu"))
        ),
        run=_output("image_embeds"),
        size=SQUARE,
        config={**CLIP, **BICUBIC, "head_bias": False, "activation": "gelu"},
        told={"activation": "gelu"},
    ),
    "HF CLIP, without projection": Source(
        layout="huggingface-clip-bare",
        build=lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**_tower())),
        run=_output("pooler_output"),
        size=SQUARE,
        config={**CLIP, **BICUBIC, "classes": 0, "activation": "gelu_quick"},
        told={"activation": "gelu_quick"},
    ),
    "HF SigLIP": Source(
        layout="huggingface-siglip",
        build=_siglip,
        run=_pooled_image,
        size=SQUARE,
        config={**SIGLIP, **BICUBIC},
        left_out=_text_keys(_siglip),
    ),
    "HF SigLIP, the image tower": Source(
        layout="huggingface-siglip",
        build=lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**_tower())),
        run=_output("pooler_output"),
        size=SQUARE,
        config={**SIGLIP, **BICUBIC},
    ),
}


def _open_clip(quick_gelu: bool, **vision: Any) -> nn.Module:
    tower = {"image_size": OBLONG, "layers": DEPTH, "width": D, "head_width": D // H}
    return open_clip.CLIP(
        embed_dim=CLASSES,
        vision_cfg={**tower, "patch_size": P, "mlp_ratio": M / D, **vision},
        text_cfg={"context_length": 7, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1},
        quick_gelu=quick_gelu,
    )


_OPEN_CLIP_TEXT = frozenset(
    k for k in _open_clip(False).state_dict() if not k.startswith("visual.")
)


def _encode(model: nn.Module, x: Tensor) -> Tensor:
    return model.encode_image(x)


OTHERS = {
    "OpenAI's CLIP": Source(
        layout="open_clip",
        build=partial(_open_clip, True),
        run=_encode,
        config={**CLIP, "head_bias": False, "activation": "gelu_quick"},
        told={"activation": "gelu_quick"},
        left_out=_OPEN_CLIP_TEXT,
    ),
    "open_clip": Source(
        layout="open_clip",
        build=partial(_open_clip, False),
        run=_encode,
        config={**CLIP, "head_bias": False, "activation": "gelu"},
        told={"activation": "gelu"},
        left_out=_OPEN_CLIP_TEXT,
    ),
    "open_clip, LayerScale": Source(
        layout="open_clip",
        build=partial(_open_clip, False, ls_init_value=0.1),
        run=_encode,
        config={**CLIP, "head_bias": False, "activation": "gelu", "layer_scale": 1e-5},
        told={"activation": "gelu"},
        left_out=_OPEN_CLIP_TEXT,
    ),
    "torchvision": Source(
        layout="torchvision",
        build=lambda: VisionTransformer(SQUARE[0], P, DEPTH, H, D, M, num_classes=CLASSES),
        size=SQUARE,
        config=BICUBIC,
    ),
    "torchvision, pre-logits, as before 0.13": Source(
        layout="torchvision",
        build=lambda: VisionTransformer(
            SQUARE[0], P, DEPTH, H, D, M, num_classes=CLASSES, representation_size=16
        ),
        file=lambda state: {
            k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): t
            for k, t in state.items()
        },
        size=SQUARE,
        config={"representation": 16, **BICUBIC},
        exact=False,
    ),
}

SOURCES: dict[str, Source] = {**TIMM, **EVA, **FACEBOOK, **HUGGING_FACE, **OTHERS}
