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

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import DataError
from vitrail.heads import SegmentHeadConfig
from vitrail.models import ModelConfig, ViTConfig
from vitrail.weights import dinov3
from vitrail.weights.heads import HeadWeights, head_shapes
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
HUGGING_FACE = Layout(
    name="huggingface-eomt",
    whose="Hugging Face EoMT",
    marks=("layers.0.attention.q_proj.weight", _TABLE),
    names=_HF,
    turn=_hf_turn,
    back=_hf_back,
    assumes={"activation": "gelu", "norm_eps": 1e-6, "pool": "class"},
    always=_ALWAYS,
)
"""Of the ViT, without the head."""
_AUTHORS = replace(TIMM, name="eomt", whose="EoMT", names=NAMES, always=_ALWAYS)
_BACKBONES: dict[EomtLayout, Layout] = {"huggingface": HUGGING_FACE, "authors": _AUTHORS}


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
    turned = dinov3.is_one(config)
    tensors = backbone_of(state, differences=base is not None)
    _check_activation(config)
    layout = dinov3.HUGGING_FACE if turned else _BACKBONES[layout_of(state)]
    backbone = layout.read(tensors, config)
    if base is not None:
        _check_base(backbone, base)
        backbone = {key: tensor + base[key].to(tensor) for key, tensor in backbone.items()}
    return {
        **{f"backbone.{key}": tensor for key, tensor in backbone.items()},
        **{f"head.{key}": tensor for key, tensor in head_weights(state, config).state.items()},
    }


def is_one(state: State) -> bool:
    """Whether these are the tensors of an EoMT, whole or not."""
    bare = _bare(state)
    return _SHARES in bare and ("query.weight" in bare or "q.weight" in bare)


def backbone_of(state: State, *, differences: bool = False) -> dict[str, Tensor]:
    """The tensors of its ViT, under the names of a layout that `vitrail.weights.layouts` knows.

    Raises `DataError` for differences to the weights of a DINOv3, unless `differences` are wanted.
    """
    layout, bare = layout_of(state), _bare(state)
    turned = not any(key in bare for key in (_TABLE, f"{_ENCODER}pos_embed"))
    if layout == "authors" and turned:
        raise DataError(
            "the files of EoMT's authors on a DINOv3 are differences to DINOv3's weights, in names "
            "that vitrail does not know: use those that transformers writes of a whole model "
            "(EomtDinov3ForUniversalSegmentation), or EoMT on a DINOv2"
        )
    if turned and not differences and _are_differences(state):
        raise DataError(
            "these are differences to DINOv3's weights, not weights: half of its norms' factors "
            "are negative. Give those of the DINOv3 too: "
            "vitrail.weights.eomt.from_eomt(state, config, base=...)"
        )
    beside = {_SHARES, _EMPTY, "encoder.pixel_mean", "encoder.pixel_std"}
    others = {k: t for k, t in bare.items() if k not in beside and not _of_head(k, layout)}
    if turned:
        return rename(others, _dinov3_names)
    return {key.removeprefix(_ENCODER): tensor for key, tensor in others.items()}


def head_weights(state: State, config: ViTConfig, names: tuple[str, ...] = ()) -> HeadWeights:
    """Its head, under our names, on a ViT of `config`.

    Raises `DataError` for keys that are missing or of another shape.
    """
    head, classes = head_of(state)
    layout, bare = layout_of(state), _bare(state)
    _check_activation(config)
    wanted = head_shapes(config, head, classes)
    theirs = _head_names(wanted, layout)
    missing = [key for key in theirs.values() if key not in bare]
    unexpected = [key for key in bare if _of_head(key, layout) and key not in theirs.values()]
    wrong = [
        f"{key} {tuple(bare[key].shape)}"
        for ours, key in theirs.items()
        if key in bare and bare[key].shape != wanted[ours]
    ]
    if missing or unexpected or wrong:
        faults = [f"missing {some(missing)}"] * bool(missing)
        faults += [f"unexpected {some(unexpected)}"] * bool(unexpected)
        faults += [f"of another shape {some(wrong)}"] * bool(wrong)
        raise DataError(f"this EoMT's head does not fit the config: {'; '.join(faults)}")
    state_dict = {ours: bare[key] for ours, key in theirs.items()}
    return HeadWeights(head, state_dict, names if len(names) == classes else ())


def preprocess_of(state: State, size: tuple[int, int]) -> Preprocess:
    """What it is shown where nothing beside its file says so: as its code has it, or the file."""
    mean, deviation = (
        tuple(round(x, 6) for x in own.flatten().tolist())
        if (own := _bare(state).get(key)) is not None
        else usual
        for key, usual in (("encoder.pixel_mean", _MEAN), ("encoder.pixel_std", _DEVIATION))
    )
    return Preprocess(
        size=size, resize="squash", interpolation="bilinear", mean=mean, std=deviation
    )


def write(
    state: State,
    config: ModelConfig,
    head: HeadWeights,
    layout: EomtLayout,
    preprocess: Preprocess | None = None,
) -> dict[str, Tensor]:
    """A backbone and its head as `to_eomt` writes them. Raises `DataError`."""
    if not isinstance(config, ViTConfig) or head.config.joint_blocks is None:
        raise DataError(f"EoMT is a ViT with queries, not a {config.family}")
    both = {
        **{f"backbone.{key}": tensor for key, tensor in state.items()},
        **{f"head.{key}": tensor for key, tensor in head.state.items()},
    }
    colours = {} if preprocess is None else {"mean": preprocess.mean, "std": preprocess.std}
    return to_eomt(both, config, head.config.joint_blocks, layout, **colours)


def to_eomt(
    state: Mapping[str, Tensor],
    config: ViTConfig,
    joint_blocks: int,
    layout: EomtLayout = "huggingface",
    mean: tuple[float, ...] = _MEAN,
    std: tuple[float, ...] = _DEVIATION,
) -> dict[str, Tensor]:
    """The inverse of `from_eomt`, as after a training: no query looks through its mask. `mean` and
    `std` of the pixels lie in the authors' files.

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
    ours = {k.removeprefix("head."): t for k, t in state.items() if k.startswith("head.")}
    head = {theirs: ours[key] for key, theirs in _head_names(ours, layout).items()}
    queries = ours["queries"]
    classes = len(ours["classifier.bias"])
    shares = queries.new_zeros(joint_blocks)
    empty = torch.ones(classes, device=queries.device)
    empty[-1] = 0.1
    if layout == "authors":
        theirs = _BACKBONES[layout].write(backbone, config)
        theirs = {f"{_ENCODER}{key}": tensor for key, tensor in theirs.items()}
        colours = {
            f"encoder.pixel_{name}": torch.tensor(values, device=queries.device).view(1, -1, 1, 1)
            for name, values in (("mean", mean), ("std", std))
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


def _of_head(key: str, layout: EomtLayout) -> bool:
    """Whether a tensor of theirs is of the head."""
    return key.split(".")[0] in {name.split(".")[0] for name in _HEAD[layout].values()}


def _head_names(keys: Iterable[str], layout: EomtLayout) -> dict[str, str]:
    """Our keys of the head -> theirs."""
    names: dict[str, str] = {}
    for ours in keys:
        module, _, leaf = ours.rpartition(".")
        if ours in _HEAD[layout]:
            names[ours] = _HEAD[layout][ours]
        elif module.startswith("upscale."):
            _, i, part = module.split(".")
            names[ours] = f"{_HEAD[layout][f'upscale.{{i}}.{part}'].format(i=i)}.{leaf}"
        elif module in _HEAD[layout]:
            names[ours] = f"{_HEAD[layout][module]}.{leaf}"
        else:
            raise DataError(
                f"EoMT has no counterpart of 'head.{ours}': it is not of head='queries'"
            )
    return names
