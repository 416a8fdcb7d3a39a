"""RF-DETR (arXiv 2511.09554): Roboflow's detector with queries on a DINOv2 in windows.

Its authors' files and Hugging Face's have the same names; transformers has others in memory, which
are read too. What no shape shows (windows, which blocks are read, heads, the epsilon of the
projector's norms) is in the config.json that Hugging Face's have beside them. Without one it is
what the published models of that patch size have.

The authors' windows mix up height and width, so that only square images are cut as theirs; ours are
right on others too. The number of a class is its number in COCO, so that there are classes that
nothing is of.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrail.data.views.preprocess import Preprocess
from vitrail.errors import DataError, UsageError
from vitrail.heads.deformable import QueryBoxes, QueryBoxesConfig
from vitrail.models import ViTConfig
from vitrail.weights.classes import named_by_config
from vitrail.weights.huggingface import DINOV2
from vitrail.weights.names import State, rename, some

_BACKBONE = "backbone.0.encoder.encoder."
_STAGE = "backbone.0.projector.stages.{s}"
_LAYER = "transformer.decoder.layers.{i}"
_HEAD: Mapping[str, str] = {
    "projectors.{s}.resize.{j}": "backbone.0.projector.stages_sampling.{s}.{j}.0",
    "projectors.{s}.conv1": f"{_STAGE}.0.cv1",
    "projectors.{s}.conv2": f"{_STAGE}.0.cv2",
    "projectors.{s}.blocks.{j}.0": f"{_STAGE}.0.m.{{j}}.cv1",
    "projectors.{s}.blocks.{j}.1": f"{_STAGE}.0.m.{{j}}.cv2",
    "projectors.{s}.norm": f"{_STAGE}.1",
    "classifier": "class_embed",
    "box.{j}": "bbox_embed.layers.{j}",
    "proposals.{g}.proj": "transformer.enc_output.{g}",
    "proposals.{g}.norm": "transformer.enc_output_norm.{g}",
    "proposals.{g}.classifier": "transformer.enc_out_class_embed.{g}",
    "proposals.{g}.box.{j}": "transformer.enc_out_bbox_embed.{g}.layers.{j}",
    "queries": "query_feat.weight",
    "references": "refpoint_embed.weight",
    "place.{j}": "transformer.decoder.ref_point_head.layers.{j}",
    "norm": "transformer.decoder.norm",
    "layers.{i}.attn.qk": f"{_LAYER}.self_attn.qk",
    "layers.{i}.attn.v": f"{_LAYER}.self_attn.v",
    "layers.{i}.attn.proj": f"{_LAYER}.self_attn.out_proj",
    "layers.{i}.norm1": f"{_LAYER}.norm1",
    "layers.{i}.cross.offsets": f"{_LAYER}.cross_attn.sampling_offsets",
    "layers.{i}.cross.weights": f"{_LAYER}.cross_attn.attention_weights",
    "layers.{i}.cross.value": f"{_LAYER}.cross_attn.value_proj",
    "layers.{i}.cross.proj": f"{_LAYER}.cross_attn.output_proj",
    "layers.{i}.norm2": f"{_LAYER}.norm2",
    "layers.{i}.mlp.fc1": f"{_LAYER}.linear1",
    "layers.{i}.mlp.fc2": f"{_LAYER}.linear2",
    "layers.{i}.norm3": f"{_LAYER}.norm3",
}
"""Our module or tensor of the head -> theirs, where `self_attn.in_proj_` is two: the first two
thirds of its rows are `qk`, the last `v`. Norms beside convolutions are `bn` there."""
_IN_PROJ = re.compile(r"(.*\.self_attn)\.in_proj_(weight|bias)")
_IN_MEMORY: tuple[tuple[str, str], ...] = (
    (r"^model\.", ""),
    (r"^backbone\.backbone\.", _BACKBONE),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"^backbone\.projector\.projector_layer\.", f"{_STAGE.format(s=0)}.0."),
    (r"^backbone\.projector\.layer_norm\.", f"{_STAGE.format(s=0)}.1."),
    (r"(projector.*)\.bottlenecks\.", r"\1.m."),
    (r"(projector.*)\.conv(\d)\.", r"\1.cv\2."),
    (r"(projector.*\.cv\d)\.norm\.", r"\1.bn."),
    (r"^(decoder|enc_out)", r"transformer.\1"),
    (r"^reference_point_embed\.", "refpoint_embed."),
    (r"\.decoder\.layernorm\.", ".decoder.norm."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.cross_attn_layer_norm\.", ".norm2."),
    (r"(decoder\.layers\.\d+)\.layer_norm\.", r"\1.norm3."),
    (r"(decoder\.layers\.\d+)\.mlp\.fc(\d)\.", r"\1.linear\2."),
    (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
)
"""What in the keys of transformers' own model is called how in the files, one after another."""
_MASKS = "segmentation_head."
"""Of models that segment too: what only their masks are made of."""
_PUBLISHED: Mapping[int, tuple[int, tuple[int, ...]]] = {
    12: (2, (3, 6, 9, 12)),
    14: (4, (2, 5, 8, 11)),
    16: (2, (3, 6, 9, 12)),
}
"""Patch size -> windows along a side, and after how many blocks maps are read: Roboflow's
configs (rfdetr/config.py)."""
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HEAD_WIDTH = 64
_DINOV2 = replace(DINOV2, name="rfdetr", whose="RF-DETR")


class RfDetr(NamedTuple):
    """A detector out of a file."""

    backbone: ViTConfig
    head: QueryBoxesConfig
    state: dict[str, Tensor]
    """Ours: of the ViT behind `backbone.`, of the head behind `head.`."""
    classes: int
    names: tuple[str, ...]
    """Of the classes; none where nothing says them."""
    preprocess: Preprocess
    """As its authors show it images, where nothing beside the file says so."""
    assumed: tuple[str, ...]
    """What nothing in the file says and was taken to be so, a clause each."""
    left_out: tuple[str, ...]


def is_one(state: State) -> bool:
    """Whether these are the tensors of an RF-DETR, whole or not."""
    return all(
        any(key.endswith(mark) for key in state)
        for mark in ("query_feat.weight", "enc_output.0.weight")
    )


def read_rfdetr(state: State, config: Mapping[str, Any] | None = None) -> RfDetr:
    """The detector that these tensors are, with the config.json beside them, if there is one.

    `QueryBoxes((backbone.width,) * len(head.taps), classes, head)` takes the head's tensors,
    `ViT(backbone)` the others. Raises `DataError` for keys that are missing, unexpected or of
    another shape, and for a model that vitrail has not.
    """
    config = config or {}
    if not is_one(state):
        raise DataError(
            f"this is no RF-DETR: it has no 'query_feat.weight' and 'transformer.enc_output.0."
            f"weight', but {some(list(state))}"
        )
    theirs = plain(state)
    left_out = tuple(key for key in theirs if key.startswith(_MASKS))
    theirs = {key: tensor for key, tensor in theirs.items() if key not in left_out}
    assumed: list[str] = []
    own = {k.removeprefix(_BACKBONE): t for k, t in theirs.items() if k.startswith(_BACKBONE)}
    try:
        backbone, taps = _backbone_of(own, _part(config, "backbone_config"), assumed)
        head = _head_of(theirs, config, taps, assumed)
        classes = len(theirs["class_embed.weight"])
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise DataError(f"this RF-DETR is not whole: it has no {error}. Fetch it again") from error
    except (UsageError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"this is no RF-DETR that vitrail has: {error}") from error
    body = _DINOV2.read(own, backbone)
    tensors = {k: t for k, t in theirs.items() if not k.startswith(_BACKBONE)}
    state = {
        **{f"backbone.{key}": tensor for key, tensor in body.items()},
        **{f"head.{k}": t for k, t in _gathered(tensors, backbone, head, classes).items()},
    }
    names = _names(config, classes, assumed)
    preprocess = _preprocess(backbone)
    return RfDetr(backbone, head, state, classes, names, preprocess, tuple(assumed), left_out)


def write_rfdetr(state: State, backbone: ViTConfig, head: QueryBoxesConfig) -> dict[str, Tensor]:
    """The inverse, as in the files. Windows, taps and heads are no tensors: they belong into the
    config.json beside it. Raises `DataError` for what has no counterpart.
    """
    whole = replace(backbone, windows=0, global_blocks=())
    body = {k.removeprefix("backbone."): t for k, t in state.items() if k.startswith("backbone.")}
    found = {f"{_BACKBONE}{key}": tensor for key, tensor in _DINOV2.write(body, whole).items()}
    for key, tensor in state.items():
        if key.startswith("head."):
            ours = key.removeprefix("head.")
            flat = tensor.flatten(0, 1) if ours in _OF_QUERIES else tensor
            found[their_name(ours)] = flat
    for i in range(head.layers):
        attention = f"{_LAYER.format(i=i)}.self_attn"
        for leaf in ("weight", "bias"):
            parts = [found.pop(f"{attention}.{part}.{leaf}") for part in ("qk", "v")]
            found[f"{attention}.in_proj_{leaf}"] = torch.cat(parts)
    return found


_OF_QUERIES = ("queries", "references")
"""Ours are of groups, theirs of all queries one after another."""


def plain(state: State) -> dict[str, Tensor]:
    """The tensors as `_HEAD` calls them, of a file or of transformers' own model."""
    if any(key.endswith("reference_point_embed.weight") for key in state):
        state = rename(state, _in_files)
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if match := _IN_PROJ.fullmatch(key):
            rows = len(tensor) // 3
            found[f"{match[1]}.qk.{match[2]}"] = tensor[: 2 * rows]
            found[f"{match[1]}.v.{match[2]}"] = tensor[2 * rows :]
        elif ".self_attn.q_proj." in key and (other := key.replace(".q_", ".k_")) in state:
            found[key.replace(".q_proj.", ".qk.")] = torch.cat([tensor, state[other]])
        elif ".self_attn.k_proj." not in key:
            found[key.replace(".self_attn.v_proj.", ".self_attn.v.")] = tensor
    return found


def _in_files(key: str) -> str:
    for pattern, name in _IN_MEMORY:
        key = re.sub(pattern, name, key)
    return key


def _backbone_of(
    own: State, told: Mapping[str, Any], assumed: list[str]
) -> tuple[ViTConfig, tuple[int, ...]]:
    """The ViT, and the blocks after which it is read."""
    if any(".mlp.gate_proj." in key or "register_tokens" in key for key in own):
        raise DataError("this RF-DETR has gated MLPs or registers: none that is published has")
    kernel = own["embeddings.patch_embeddings.projection.weight"]
    width, patch = kernel.shape[0], kernel.shape[2]
    cells = own["embeddings.position_embeddings"].shape[1] - 1
    side = math.isqrt(cells)
    if side**2 != cells or kernel.shape[3] != patch:
        raise DataError(f"this RF-DETR has positions for {cells} patches, which are no square")
    depth = _count(own, r"encoder\.layer\.(\d+)\.norm1\.weight")
    if told:
        windows, heads = _whole(told, "num_windows", 4), _whole(told, "num_attention_heads", 12)
        after = tuple(_whole({"out_indices": n}, "out_indices") for n in told["out_indices"])
        if told.get("hidden_act", "gelu") != "gelu" or not told.get("apply_layernorm", True):
            raise DataError("this RF-DETR's ViT is read without its norm, or has no GELU")
    elif patch in _PUBLISHED:
        (windows, after), heads = _PUBLISHED[patch], width // _HEAD_WIDTH
        assumed.append(
            f"{windows}x{windows} windows, maps after blocks {', '.join(map(str, after))} and "
            f"heads of {_HEAD_WIDTH}, as in RF-DETR's own of patches of {patch}"
        )
    else:
        raise DataError(
            f"nothing says the windows of this RF-DETR of patches of {patch}: put the config.json "
            f"of Hugging Face's beside it"
        )
    if not after or min(after) < 1 or max(after) > depth:
        raise DataError(f"this RF-DETR is read after blocks {after}, and has {depth}")
    apart = set(range(after[-1] + 1)) - set(after)
    config = ViTConfig(
        width=width,
        depth=depth,
        heads=heads,
        mlp=len(own["encoder.layer.0.mlp.fc1.weight"]),
        patch=(patch, patch),
        image_size=(side * patch, side * patch),
        channels=kernel.shape[1],
        classes=0,
        layer_scale=1.0,
        norm_eps=float(told.get("layer_norm_eps", 1e-6)),
        resample="bicubic_antialias",
        windows=windows if windows > 1 else 0,
        global_blocks=tuple(i for i in range(depth) if i not in apart) if windows > 1 else (),
    )
    return config, tuple(n - 1 for n in after)


def _head_of(
    theirs: State, told: Mapping[str, Any], taps: tuple[int, ...], assumed: list[str]
) -> QueryBoxesConfig:
    if told.get("decoder_activation_function", "relu") != "relu" or (
        told.get("activation_function", "silu") != "silu"
    ):
        raise DataError("this RF-DETR has other nonlinearities than ReLU and SiLU")
    groups = _count(theirs, r"transformer\.enc_output\.(\d+)\.weight")
    queries, width = theirs["query_feat.weight"].shape
    if queries % groups:
        raise DataError(f"this RF-DETR has {queries} queries, which are no {groups} groups")
    maps = _count(theirs, r"backbone\.0\.projector\.stages\.(\d+)\.1\.weight")
    cross = _whole(told, "decoder_cross_attention_heads", 16)
    if not told:
        assumed.append("8 heads among queries and 16 to the maps, as in RF-DETR's own")
    return QueryBoxesConfig(
        queries=queries // groups,
        groups=groups,
        layers=_count(theirs, r"transformer\.decoder\.layers\.(\d+)\.norm3\.weight"),
        width=width,
        heads=_whole(told, "decoder_self_attention_heads", 8),
        cross_heads=cross,
        points=len(theirs[f"{_LAYER.format(i=0)}.cross_attn.attention_weights.bias"])
        // (cross * maps),
        mlp=len(theirs[f"{_LAYER.format(i=0)}.linear1.weight"]),
        scales=tuple(_scale(theirs, s) for s in range(maps)),
        bottlenecks=_count(
            theirs, r"backbone\.0\.projector\.stages\.0\.0\.m\.(\d+)\.cv1\.bn\.bias"
        ),
        projector_eps=float(told.get("layer_norm_eps", 1e-5)) if told else 1e-6,
        taps=taps,
    )


def _scale(theirs: State, stage: int) -> float:
    """Of the map that a stage of the projector makes."""
    first = f"backbone.0.projector.stages_sampling.{stage}.0.0"
    return 0.5 if f"{first}.conv.weight" in theirs else 2.0 if f"{first}.weight" in theirs else 1.0


def _gathered(
    theirs: State, backbone: ViTConfig, head: QueryBoxesConfig, classes: int
) -> dict[str, Tensor]:
    """The head's tensors under our names."""
    with torch.device("meta"):
        wanted = QueryBoxes((backbone.width,) * len(head.taps), classes, head).state_dict()
    names = {key: their_name(key) for key in wanted}
    missing = [name for name in names.values() if name not in theirs]
    unexpected = [key for key in theirs if key not in names.values()]
    shapes = {
        key: like.flatten(0, 1).shape if key in _OF_QUERIES else like.shape
        for key, like in wanted.items()
    }
    wrong = [
        f"{name} {tuple(theirs[name].shape)}"
        for key, name in names.items()
        if name in theirs and theirs[name].shape != shapes[key]
    ]
    faults = [f"missing {some(missing)}"] * bool(missing)
    faults += [f"unexpected {some(unexpected)}"] * bool(unexpected)
    faults += [f"of another shape {some(wrong)}"] * bool(wrong)
    if faults:
        raise DataError(f"this RF-DETR's head is not as its parts say: {'; '.join(faults)}")
    return {key: theirs[names[key]].reshape(like.shape) for key, like in wanted.items()}


def their_name(key: str) -> str:
    """What a tensor of our head is called in the files."""
    for pattern, name in _PATTERNS:
        if match := pattern.fullmatch(key):
            leaf = match["leaf"].replace(".norm.", ".bn.")
            return name.format_map(match.groupdict()) + leaf
    raise DataError(f"RF-DETR has no counterpart of '{key}'")


def _pattern(template: str) -> re.Pattern[str]:
    numbered = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(template))
    return re.compile(rf"{numbered}(?P<leaf>(\.conv|\.norm)?(\.weight|\.bias)|)")


_PATTERNS = tuple((_pattern(ours), name) for ours, name in _HEAD.items())


def _count(state: State, pattern: str) -> int:
    """How many numbers, from 0 on, the keys of a pattern have: no more than there are keys."""
    numbers = {int(found[1]) for key in state if (found := re.fullmatch(pattern, key))}
    if not numbers:
        raise KeyError(pattern.replace("\\", "").replace("(d+)", "0"))
    if max(numbers) >= len(numbers):
        missing = next(i for i in range(len(numbers)) if i not in numbers)
        raise KeyError(pattern.replace("\\", "").replace("(d+)", str(missing)))
    return len(numbers)


def _names(config: Mapping[str, Any], classes: int, assumed: list[str]) -> tuple[str, ...]:
    """Of the classes: two of the same name, as those that are none, get their numbers too."""
    names = named_by_config(config, classes)
    if not names and not config and classes == len(COCO):
        assumed.append("classes by their numbers in COCO, for there are 91 of them")
        names = COCO
    return tuple(f"{name} {i}" if names.count(name) > 1 else name for i, name in enumerate(names))


def _preprocess(backbone: ViTConfig) -> Preprocess:
    """Squashed into a square that windows divide: of positions for 518 pixels, 560."""
    step = backbone.patch[0] * max(1, backbone.windows)
    side = math.ceil(backbone.image_size[0] / step) * step
    return Preprocess(
        size=(side, side), resize="squash", interpolation="bilinear", mean=_MEAN, std=_DEVIATION
    )


def _whole(config: Mapping[str, Any], name: str, usual: int = 0) -> int:
    """A number from 1 on in a config.json, or what its authors' code has where there is none."""
    found = config.get(name, usual)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise DataError(f"the config.json of this RF-DETR has {name} {found!r}, which is no number")
    return found


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


_NONE = "N/A"
COCO: tuple[str, ...] = (
    *(_NONE, "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    *("traffic light", "fire hydrant", _NONE, "stop sign", "parking meter", "bench", "bird", "cat"),
    *("dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", _NONE, "backpack"),
    *("umbrella", _NONE, _NONE, "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard"),
    *("sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", _NONE, "wine glass", "cup", "fork", "knife", "spoon", "bowl"),
    *("banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut"),
    *("cake", "chair", "couch", "potted plant", "bed", _NONE, "dining table", _NONE, _NONE),
    *("toilet", _NONE, "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave"),
    *("oven", "toaster", "sink", "refrigerator", _NONE, "book", "clock", "vase", "scissors"),
    *("teddy bear", "hair drier", "toothbrush"),
)
"""By their numbers, from 0: 80 names, and 11 numbers that are none's."""
