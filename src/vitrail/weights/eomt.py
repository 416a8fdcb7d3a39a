"""EoMT (arXiv 2503.19108) in two layouts: its authors' and Hugging Face's, of segmenters with
queries on a DINOv2; and Hugging Face's on a DINOv3.

|                    | its authors'                  | Hugging Face's                  |
|--------------------|-------------------------------|---------------------------------|
| the ViT            | timm's, in encoder.backbone   | its own names, q k v apart      |
| positions          | pos_embed [1 n d]             | an embedding [n d]              |
| beside the weights | mean and deviation of pixels  | weights of the loss's classes   |
| both               | attn_mask_probs: 1 before the training, 0 after it              |

What is published of DINOv3s are differences, to be added to DINOv3's own weights, whose licence
does not allow to pass them on.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vitrail.errors import DataError
from vitrail.heads import SegmentHeadConfig, build_segmenter
from vitrail.models import ViTConfig, build
from vitrail.weights import dinov3
from vitrail.weights.names import Layout, Names, State, position_rows, rename, some
from vitrail.weights.timm import NAMES, TIMM

EomtLayout = Literal["huggingface", "authors"]

_HEAD: dict[EomtLayout, dict[str, str]] = {
    "huggingface": {
        "queries": "query.weight",
        "classifier": "class_predictor",
        "mask.fc1": "mask_head.fc1",
        "mask.fc2": "mask_head.fc2",
        "mask.fc3": "mask_head.fc3",
        "upscale.{i}.up": "upscale_block.block.{i}.conv1",
        "upscale.{i}.conv": "upscale_block.block.{i}.conv2",
        "upscale.{i}.norm": "upscale_block.block.{i}.layernorm2d",
    },
    "authors": {
        "queries": "q.weight",
        "classifier": "class_head",
        "mask.fc1": "mask_head.0",
        "mask.fc2": "mask_head.2",
        "mask.fc3": "mask_head.4",
        "upscale.{i}.up": "upscale.{i}.conv1",
        "upscale.{i}.conv": "upscale.{i}.conv2",
        "upscale.{i}.norm": "upscale.{i}.norm",
    },
}
"""Our module or tensor of the head -> theirs."""
_SHARES = "attn_mask_probs"
_EMPTY = "criterion.empty_weight"
_NETWORK = "network."
"""In front of all keys in the authors' files but the loss's: what Lightning calls the model."""
_ENCODER = "encoder.backbone."
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_TABLE = "embeddings.position_embeddings.weight"
_LAYER = "layers.{i}"
_HF: Names = {
    "prefix.class": "embeddings.cls_token",
    "prefix.registers": "embeddings.register_tokens",
    "position.table": _TABLE,
    "stem.proj": "embeddings.patch_embeddings.projection",
    "encoder.blocks.{i}.norm1": f"{_LAYER}.norm1",
    "encoder.blocks.{i}.attn.qkv": tuple(f"{_LAYER}.attention.{part}_proj" for part in "qkv"),
    "encoder.blocks.{i}.attn.proj": f"{_LAYER}.attention.out_proj",
    "encoder.blocks.{i}.scale1.gamma": f"{_LAYER}.layer_scale1.lambda1",
    "encoder.blocks.{i}.norm2": f"{_LAYER}.norm2",
    "encoder.blocks.{i}.mlp.fc1": f"{_LAYER}.mlp.fc1",
    "encoder.blocks.{i}.mlp.fc2": f"{_LAYER}.mlp.fc2",
    "encoder.blocks.{i}.scale2.gamma": f"{_LAYER}.layer_scale2.lambda1",
    "encoder.norm": "layernorm",
}


def _hf_turn(state: State) -> dict[str, Tensor]:
    """The table with an axis for the batch; a gated MLP's first two layers as one."""
    theirs = dinov3.HUGGING_FACE.turn(state)
    if (table := theirs.get(_TABLE)) is not None:
        theirs = {**theirs, _TABLE: table[None]}
    return rename(
        theirs, lambda key: key.replace(".up_proj.", ".fc1.").replace(".down_proj.", ".fc2.")
    )


def _hf_back(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    theirs = {}
    for key, tensor in state.items():
        if config.activation == "swiglu" and ".mlp.fc1." in key:
            gate, up = tensor.chunk(2)
            theirs[key.replace(".fc1.", ".gate_proj.")] = gate
            theirs[key.replace(".fc1.", ".up_proj.")] = up
        elif config.activation == "swiglu":
            theirs[key.replace(".mlp.fc2.", ".mlp.down_proj.")] = tensor
        else:
            theirs[key] = tensor
    return {**theirs, _TABLE: theirs[_TABLE][0]}


_ALWAYS = {
    "class_token": (True,),
    "prefix_position": (False,),
    "distilled": (False,),
    "stem_bias": (True,),
    "qkv_bias": (True,),
    "qk_norm": (False,),
    "pre_norm": (False,),
    "pool_norm": (False,),
    "activation": ("gelu", "swiglu"),
}
_BACKBONES: dict[EomtLayout, Layout] = {
    "huggingface": Layout(
        name="huggingface-eomt",
        whose="Hugging Face EoMT",
        marks=("query.weight", _TABLE),
        names=_HF,
        turn=_hf_turn,
        back=_hf_back,
        always=_ALWAYS,
    ),
    "authors": replace(
        TIMM,
        name="eomt",
        whose="EoMT",
        marks=("q.weight", f"{_ENCODER}patch_embed.proj.weight"),
        names=NAMES,
        always=_ALWAYS,
    ),
}


def layout_of(state: State) -> EomtLayout:
    """Whose names these are. Raises `DataError` for what is no EoMT."""
    if "query.weight" in state:
        return "huggingface"
    if "q.weight" in state or f"{_NETWORK}q.weight" in state:
        return "authors"
    raise DataError(
        f"this is no EoMT: it has neither 'query.weight', as Hugging Face's files, nor 'q.weight', "
        f"as its authors' have, but {some(list(state))}"
    )


def head_of(state: State) -> tuple[SegmentHeadConfig, int]:
    """The head that a file has, and for how many classes."""
    layout = layout_of(state)
    bare = _bare(state)
    names = _HEAD[layout]
    for key in (names["queries"], f"{names['classifier']}.weight", _SHARES):
        if key not in bare or not bare[key].ndim:
            raise DataError(f"this EoMT has no '{key}': it is not whole. Fetch the file again")
    blocks, queries = (len(bare[key]) for key in (_SHARES, names["queries"]))
    config = SegmentHeadConfig(head="queries", queries=queries, joint_blocks=blocks)
    return config, len(bare[f"{names['classifier']}.weight"]) - 1


def from_eomt(
    state: Mapping[str, Tensor], config: ViTConfig, base: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of an EoMT under our names, for `build_segmenter(ViT(config), *head_of(state))`.

    `base`: our state dict of the DINOv3 that the file's tensors are differences to.
    Raises `DataError` for keys that are missing, unexpected or of another shape, and for
    differences without what they are differences to.
    """
    layout = layout_of(state)
    turned = dinov3.is_one(config)
    if layout == "authors" and turned:
        raise DataError(
            "the files of EoMT's authors on a DINOv3 are differences to DINOv3's weights, in names "
            "that vitrail does not know: use those that transformers writes of a whole model "
            "(EomtDinov3ForUniversalSegmentation), or EoMT on a DINOv2"
        )
    _check_activation(config)
    if turned and base is None and _are_differences(state):
        raise DataError(
            "these are differences to DINOv3's weights, not weights: half of its norms' factors "
            "are negative. Give those of the DINOv3 too: from_eomt(state, config, base=...)"
        )
    bare = _bare(state)
    if layout == "authors":
        bare = {
            k: t for k, t in bare.items() if k not in ("encoder.pixel_mean", "encoder.pixel_std")
        }
    head = _ours_of_head(bare, layout, config)
    others = {key: tensor for key, tensor in bare.items() if key not in head.values()}
    others = {key: tensor for key, tensor in others.items() if key not in (_SHARES, _EMPTY)}
    if turned:
        others = rename(others, _dinov3_names)
        backbone = dinov3.HUGGING_FACE.read(others, config)
    else:
        others = {key.removeprefix(_ENCODER): tensor for key, tensor in others.items()}
        backbone = _BACKBONES[layout].read(others, config)
    if base is not None:
        _check_base(backbone, base)
        backbone = {key: tensor + base[key].to(tensor) for key, tensor in backbone.items()}
    return {
        **{f"backbone.{key}": tensor for key, tensor in backbone.items()},
        **{ours: bare[theirs] for ours, theirs in head.items()},
    }


def to_eomt(
    state: Mapping[str, Tensor],
    config: ViTConfig,
    joint_blocks: int,
    layout: EomtLayout = "huggingface",
) -> dict[str, Tensor]:
    """The inverse of `from_eomt`, as after a training: no query looks through its mask.

    Raises `DataError` for a model that has no counterpart there.
    """
    backbone = {
        key.removeprefix("backbone."): tensor
        for key, tensor in state.items()
        if key.startswith("backbone.")
    }
    rows = int(config.prefix_position) * (int(config.class_token) + int(config.distilled))
    if config.has_table and rows:  # a class token's row can be added to it once and for all
        backbone = position_rows(backbone, rows, 0)
        config = replace(config, prefix_position=False)
    head = {theirs: state[f"head.{key}"] for key, theirs in _head_names(state, layout).items()}
    queries = state["head.queries"]
    classes = len(state["head.classifier.bias"])
    shares = queries.new_zeros(joint_blocks)
    empty = torch.ones(classes, device=queries.device)
    empty[-1] = 0.1
    if layout == "authors":
        theirs = _BACKBONES[layout].write(backbone, config)
        theirs = {f"{_ENCODER}{key}": tensor for key, tensor in theirs.items()}
        colours = {
            f"encoder.pixel_{name}": torch.tensor(values, device=queries.device).view(1, 3, 1, 1)
            for name, values in (("mean", _MEAN), ("std", _DEVIATION))
        }
        network = {**theirs, **head, **colours, _SHARES: shares}
        return {**{f"{_NETWORK}{k}": t for k, t in network.items()}, _EMPTY: empty}
    if dinov3.is_one(config):
        _check_activation(config)
        theirs = dinov3.HUGGING_FACE.write(backbone, config)
        del theirs["embeddings.mask_token"]
        theirs = rename(theirs, _eomt_names)
    else:
        theirs = _BACKBONES[layout].write(backbone, config)
    return {**theirs, **head, _SHARES: shares, _EMPTY: empty}


def _bare(state: State) -> dict[str, Tensor]:
    return {key.removeprefix(_NETWORK): tensor for key, tensor in state.items()}


def _dinov3_names(key: str) -> str:
    """As a DINOv3 of Hugging Face's calls it."""
    if key.startswith("layernorm."):
        return key.removeprefix("layer")
    return f"layer.{key.removeprefix('layers.')}" if key.startswith("layers.") else key


def _eomt_names(key: str) -> str:
    if key.startswith("norm."):
        return f"layer{key}"
    return f"layers.{key.removeprefix('layer.')}" if key.startswith("layer.") else key


def _check_activation(config: ViTConfig) -> None:
    """Refuse a DINOv3 of gated MLPs."""
    if dinov3.is_one(config) and config.activation != "gelu":
        raise DataError(
            "transformers' EoMT on a DINOv3 has one activation for its blocks and its head, and "
            f"that of activation='{config.activation}' is not the head's: it would give something "
            "else"
        )


def _are_differences(state: State) -> bool:
    """Whether the norms' factors are around 0: those of a trained model are above it."""
    factors = [
        tensor.flatten().float()
        for key, tensor in state.items()
        if key.endswith(("norm1.weight", "norm2.weight")) and not tensor.is_meta
    ]
    return bool(factors) and bool((torch.cat(factors) > 0).float().mean() < 0.75)


def _check_base(backbone: State, base: State) -> None:
    wrong = [
        key
        for key, tensor in backbone.items()
        if key not in base or base[key].shape != tensor.shape
    ]
    if wrong:
        raise DataError(
            f"the weights that these are differences to do not fit: {some(wrong)} are missing, or "
            f"of another shape"
        )


def _ours_of_head(state: State, layout: EomtLayout, config: ViTConfig) -> dict[str, str]:
    """Our keys of the head -> theirs, all of which are there, of the shapes that they must have."""
    head, classes = head_of(state)
    with torch.device("meta"):
        built = build_segmenter(build(replace(config, classes=0)), head, classes)
    wanted = {k: t.shape for k, t in built.state_dict().items() if k.startswith("head.")}
    names = {f"head.{k}": v for k, v in _head_names(wanted, layout).items()}
    missing = [theirs for theirs in names.values() if theirs not in state]
    wrong = [
        f"{theirs} {tuple(state[theirs].shape)}"
        for ours, theirs in names.items()
        if theirs in state and state[theirs].shape != wanted[ours]
    ]
    if missing or wrong:
        faults = [f"missing {some(missing)}"] * bool(missing)
        faults += [f"of another shape {some(wrong)}"] * bool(wrong)
        raise DataError(f"this EoMT's head does not fit the config: {'; '.join(faults)}")
    return names


def _head_names(keys: Mapping[str, object], layout: EomtLayout) -> dict[str, str]:
    """Our keys of the head, without `head.`, -> theirs."""
    names: dict[str, str] = {}
    for key in keys:
        if not key.startswith("head."):
            continue
        ours = key.removeprefix("head.")
        module, _, leaf = ours.rpartition(".")
        if ours in _HEAD[layout]:
            names[ours] = _HEAD[layout][ours]
        elif module.startswith("upscale."):
            _, i, part = module.split(".")
            names[ours] = f"{_HEAD[layout][f'upscale.{{i}}.{part}'].format(i=i)}.{leaf}"
        elif module in _HEAD[layout]:
            names[ours] = f"{_HEAD[layout][module]}.{leaf}"
        else:
            raise DataError(f"EoMT has no counterpart of '{key}': it is not of head='queries'")
    return names
