"""Which checkpoint layouts there are, and which one a file has.

A layout is recognised by keys that no other has; which model has the tensors is for `infer.py`.
"""

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias

from torch import Size, Tensor

from vitrail.errors import DataError, setting, unknown_name
from vitrail.models import ModelConfig, ViTConfig
from vitrail.weights import (
    clip,
    dinov3,
    dynamicvit,
    eomt,
    facebook,
    google,
    huggingface,
    mixer,
    mobilevit,
    resnet,
    timm,
    torchvision,
    twins,
    vitdet,
)
from vitrail.weights.family import FamilyLayout
from vitrail.weights.infer import infer
from vitrail.weights.names import Layout, State, prefixes, some
from vitrail.weights.torchfile import PREFERRED
from vitrail.weights.unseen import SHOWN, UNSEEN, Unseen, lines


class Found(NamedTuple):
    """A file, understood."""

    layout: Layout | FamilyLayout
    config: ModelConfig
    state: dict[str, Tensor]
    """Under our names: exactly the state dict of the config."""
    left_out: tuple[str, ...]
    """Their keys that are no part of an image model."""
    assumed: tuple[str, ...]
    """What no shape shows and nobody told, in words."""
    unseen: tuple[Unseen, ...] = ()
    """Each thing that shapes do not show of every such model, and where it is from."""
    keys: Mapping[str, Size] = {}
    """What the tensors that are used are called in the file, and their shapes there."""


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        google.GOOGLE,
        vitdet.DETECTRON2,
        vitdet.HUGGING_FACE,
        timm.TIMM_PE,
        timm.TIMM_PE_DENSE,
        timm.TIMM_EVA02,
        timm.TIMM_ROPE_GAP,
        timm.TIMM_ROPE_VIT,
        timm.TIMM_EVA02_PACKED,
        timm.EVA02,
        timm.EVA02_PACKED,
        timm.TIMM_EVA,
        dinov3.DINOV3,
        dinov3.TIMM,
        dinov3.HUGGING_FACE,
        facebook.DEIT3,
        facebook.MAE,
        facebook.TIPSV2,
        facebook.TIPS,
        facebook.DINOV2_REGISTERS,
        facebook.DINOV2,
        facebook.DINO,
        facebook.MOCO,
        timm.TIMM_NAFLEX_SIGLIP,
        timm.TIMM_NAFLEX,
        timm.TIMM_SIGLIP,
        timm.TIMM_CLIP,
        timm.TIMM_HYBRID,
        timm.TIMM_ROOT,
        timm.TIMM,
        huggingface.DEIT_TEACHER,
        huggingface.DEIT,
        huggingface.DEIT_BARE,
        huggingface.VIT,
        huggingface.VIT_BARE,
        huggingface.IJEPA,
        huggingface.IJEPA_BARE,
        huggingface.DINOV2_REGISTERS,
        huggingface.DINOV2,
        eomt.HUGGING_FACE,
        huggingface.CLIP,
        huggingface.CLIP_BARE,
        huggingface.SIGLIP2,
        huggingface.SIGLIP,
        huggingface.SIGLIP_HEADLESS,
        clip.PE,
        clip.PE_DENSE,
        clip.OPEN_CLIP,
        torchvision.TORCHVISION,
    )
}
"""The first whose marks a file has is the file's: more telling ones stand first."""

FAMILY_LAYOUTS: dict[str, FamilyLayout] = {
    layout.name: layout
    for layout in (
        *dynamicvit.LAYOUTS,
        *mixer.LAYOUTS,
        *mobilevit.LAYOUTS,
        *resnet.LAYOUTS,
        *twins.LAYOUTS,
    )
}
"""Those of the other families; looked at before the ViTs', whose keys some of them share."""


class Refused(NamedTuple):
    """A layout that is known, and not read."""

    keys: tuple[str, ...]
    """Globs: a file that has a key of each is of this layout."""
    why: str
    unless: str = "-"
    """Glob of a key that such a file does not have."""
    width: int | None = None
    """How many channels the tensor of the last of `keys` has, where only that tells."""


REFUSED: tuple[Refused, ...] = (
    Refused(
        ("*to_patch_embedding.*",),
        "vit-pytorch's (lucidrains), which is another model: it norms patches before and after "
        "their projection, takes their pixels in another order, has queries, keys and values "
        "without bias and another head",
    ),
    Refused(
        ("*patch_embed.backbone.conv1.*",),
        "timm's own hybrids: their ResNet-D is not Google's ResNet",
    ),
    Refused(("*patch_embed.backbone.0.*",), "MobileCLIP's hybrids: their stem is no ResNet"),
    Refused(
        ("*patch_embeddings.backbone.*",),
        "transformers' ViTHybrid, which transformers itself has dropped: take Google's or timm's "
        "file of the same model",
    ),
    Refused(
        ("*relative_position_bias_table",),
        "Swin, BEiT or their like: positions relative to each other",
    ),
    *(
        Refused((key,), "Swin V2 or its like: attention in windows, with positions of its own")
        for key in ("*cpb_mlp.*", "*continuous_position_bias_mlp.*", "*attn.meta_mlp.*")
    ),
    *(
        Refused(
            (key,),
            "timm's vit_relpos, Segment Anything or their like: positions relative to each other",
        )
        for key in ("*blocks.0.attn.rel_pos.*", "*layers.0.attn.rel_pos_h")
    ),
    *(
        Refused(keys, "Segment Anything, whose encoder is ViTDet's and ends in a neck of its own")
        for keys in (
            ("*image_encoder.blocks.0.attn.rel_pos_h",),
            ("*blocks.0.attn.rel_pos_h", "*neck.0.weight"),
        )
    ),
    Refused(("*rope.freqs",), "timm's vit_*_rope_mixed: learned rotary positions"),
    Refused(
        ("*blocks.0.attn.q_bias", "*cls_token"),
        "EVA-02-CLIP-E (timm's eva02_enormous_*): norms behind attention and MLP",
        width=1792,
    ),
    Refused(("*blocks.0.attn.lambda_q1",), "timm's differential attention"),
    Refused(("*blocks.0.attn.proj_l.*",), "CaiT: attention that mixes its heads"),
    Refused(("*blocks.0.attns.1.*",), "timm's parallel blocks: two attentions side by side"),
    Refused(
        ("*blocks.0.mlp_out_proj.weight",),
        "timm's parallel blocks (pwee, xp): attention and MLP side by side",
    ),
    *(
        Refused((key,), "Hiera, or SAM 2 on it: stages of attention in windows")
        for key in (
            *("*pos_embed_window", "*blocks.[1-9].proj.weight"),
            "*encoder.stages.0.layers.0.attn.qkv.weight",
        )
    ),
    *(
        Refused((key,), "AIMv2: RMS norms and a gated MLP", unless="*blocks.0.norm1.bias")
        for key in (
            *("*embeddings.rms_norm.weight", "*trunk.blocks.0.mlp.fc3.weight"),
            "*blocks.0.mlp.fc1_g.weight",
        )
    ),
    *(
        Refused(keys, "C-RADIO: positions cut from a table, class tokens of several teachers")
        for keys in (
            ("*input_conditioner.norm_mean",),
            ("*patch_generator.pos_embed",),
            ("*embeds.cls_token", "*embeds.pos_embed"),
        )
    ),
    Refused(
        ("*embeds.pos_embed_y", "*embeds.pos_embed_x"),
        "timm's naflexvit_*_parfac_*: a table of rows and one of columns",
    ),
    *(
        Refused(keys, "BEiT-3 or its like: norms within attention and MLP")
        for keys in (
            ("*blocks.0.attn.norm.weight", "*blocks.0.attn.qkv.bias"),
            ("*self_attn.inner_attn_ln.weight",),
        )
    ),
    *(
        Refused((key,), "InternViT: no norm after the last block")
        for key in ("*encoder.layers.0.ls1", "*encoder.layer.0.attention.projection_layer.weight")
    ),
    Refused(
        ("*patch_embed.proj.weight", "*blocks.0.attn.qkv.weight", "*blocks.0.ls1.gamma"),
        "InternViT in timm's names (vit_intern300m_*): no norm after the last block",
        unless="*norm.weight",
    ),
    Refused(("*encoder.layer.0.lambda_1",), "BEiT, Data2Vec or their like: keys without bias"),
    Refused(("*class_pos_emb",), "MLCD: queries and keys turned by their place, as no other's are"),
    Refused(
        ("*encoder.embeddings.patch_embeddings.proj.weight",),
        "V-JEPA 2: videos, whose patches have an axis of time",
    ),
    Refused(
        ("*class_embedding", "*transformer.resblocks.0.*", "*conv1.weight", "*ln_post.weight"),
        "CLIPA's in open_clip's names: no norm before the first block, and the mean of the tokens "
        "where CLIP has its class token",
        unless="*ln_pre.weight",
    ),
)

_Writer: TypeAlias = Callable[[State, ViTConfig, Mapping[str, Size]], dict[str, Tensor]]
_VIT_WRITERS: Mapping[str, _Writer] = {
    "timm": timm.to_timm,
    "huggingface": lambda state, config, like: (
        vitdet.HUGGING_FACE.write(state, config)
        if config.relative is not None
        else huggingface.to_huggingface(state, config)
    ),
    "google": google.to_google,
}


def write_as(
    to: str, state: State, config: ModelConfig, like: Mapping[str, Size] | None = None
) -> dict[str, Tensor]:
    """Our state dict in the layout of `timm`, `huggingface` or `google`.

    Where a layout knows several ways to write the same model, `like` has the tensors' names and
    shapes in the file of that layout that it came from (`Found.keys`): it goes back as it came.
    Raises `DataError` for a model that has no counterpart there, and says what it lacks.
    """
    if to not in _VIT_WRITERS:
        raise unknown_name("layout to write", to, _VIT_WRITERS)
    if type(config) is ViTConfig:
        if dinov3.is_one(config) and to in dinov3.WRITTEN:
            return dinov3.WRITTEN[to](state, config)
        return _VIT_WRITERS[to](state, config, like or {})
    for layout in FAMILY_LAYOUTS.values():
        if layout.family is type(config) and to in layout.writes:
            theirs = layout.write(state, config)
            return _prefixed(theirs, like) if like and to == google.GOOGLE.name else theirs
    raise DataError(f"{to} has no counterpart of the family '{config.family}' that vitrail knows")


def _prefixed(theirs: dict[str, Tensor], like: Mapping[str, Size]) -> dict[str, Tensor]:
    """The tensors behind the prefix that they had in the file `like`: params/, opt/target/."""
    first = next(iter(theirs))
    prefix = next((key.removesuffix(first) for key in like if key.endswith(f"/{first}")), "")
    return {prefix + key: tensor for key, tensor in theirs.items()}


def understand(
    state: State,
    told: Mapping[str, Any],
    where: str,
    wanted: Mapping[str, Any] | None = None,
    *,
    beside: Mapping[str, Any] | None = None,
    named: bool = False,
    whence: str = "by the config.json beside it",
) -> Found:
    """What the tensors of a file are. `told` has fields of the config that the user tells; `beside`
    those that a config.json beside the file does, or a row of WEIGHTS, which `whence` says;
    `wanted` has some of the model that is to be made of it, which count where nothing else tells;
    `named` says that the architecture is known by its name, to be one of ours.

    Raises `DataError` for tensors of no known layout, for one that lacks something or has too
    much, and for a model of which something has to be known that neither shapes nor `told` say.
    """
    layout, prefix = recognise(state, where)
    beside = {name: value for name, value in (beside or {}).items() if name not in told}
    told = {**beside, **told}
    inner = {key[len(prefix) :]: key for key in state if key.startswith(prefix)}
    if prefix.endswith("trunk."):  # a tower of timm's in open_clip, whose projection is beside it
        beside_it = f"{prefix.removesuffix('trunk.')}head.proj."
        inner |= {
            f"head.{key.removeprefix(beside_it)}": key for key in state if key.startswith(beside_it)
        }
    theirs = {name: state[key] for name, key in inner.items() if not layout.leaves_out(name)}
    used = {inner[name] for name in theirs}
    hints = {name: x for name in UNSEEN if wanted and (x := wanted.get(name)) is not None}
    if hints.get("activation") == "swiglu":  # which shapes show
        del hints["activation"]
    if isinstance(layout, Layout) and "position" in layout.assumes:  # which its names show
        hints.pop("position", None)
    config: ModelConfig
    unseen: tuple[Unseen, ...] = ()
    if isinstance(layout, FamilyLayout):
        config = layout.infer(theirs, told, where, hints.get("image_size"))
        fixed = ((name, value) for name, value in layout.changes.items() if name not in told)
        assumed = tuple(f"{name} {x}, as in the code of {layout.whose}" for name, x in fixed)
        assumed += () if named else layout.takes
        from_where = dict.fromkeys(UNSEEN, SHOWN)
        from_where |= dict.fromkeys(layout.changes, f"as in the code of {layout.whose}")
        from_where |= {name: whence if name in beside else "as told" for name in told}
        unseen = lines(config, from_where, layout.changes.keys() - told.keys())
        ours = layout.read(theirs, config)
    else:
        config, unseen, notes = infer(theirs, layout, told, where, hints, beside, named, whence)
        assumed = (*(str(one) for one in unseen if one.assumed), *notes)
        ours = layout.read(theirs, config)
    left_out = tuple(key for key in state if key not in used)
    keys = {key: state[key].shape for key in state if key in used}
    return Found(layout, config, ours, left_out, assumed, unseen, keys)


def recognise(state: State, where: str) -> tuple[Layout | FamilyLayout, str]:
    """The layout of a file's keys, and the prefix that the image model's keys have in it."""
    for keys, why, unless, width in REFUSED:
        if (
            all(_any(state, glob) for glob in keys)
            and not _any(state, unless)
            and (width is None or _width(state, keys[-1]) == width)
        ):
            raise DataError(f"{where} has a layout that vitrail does not read: {why}")
    layouts: list[Layout | FamilyLayout] = [*FAMILY_LAYOUTS.values(), *LAYOUTS.values()]
    found = [
        (layout, prefix)
        for layout in layouts
        for prefix in prefixes(state, layout.marks)
        if isinstance(layout, FamilyLayout) or layout.own(state, prefix)
    ]
    # What lies within another model is a part of it: the ResNet of a hybrid.
    outer = [
        (layout, prefix)
        for layout, prefix in found
        if not any(prefix != other and prefix.startswith(other) for _, other in found)
    ]
    if outer:
        layout = outer[0][0]
        return layout, _one_of([prefix for x, prefix in outer if x is layout], where)
    known = ", ".join(dict.fromkeys(layout.whose for layout in layouts))
    raise DataError(
        f"{where} has the layout of no model that vitrail knows: its tensors are called "
        f"{some(list(state))}. Known are the layouts of {known}"
    )


def _any(state: State, glob: str) -> bool:
    return any(fnmatchcase(key, glob) for key in state)


def _width(state: State, glob: str) -> int:
    return next(t.shape[-1] if t.ndim else 0 for key, t in state.items() if fnmatchcase(key, glob))


def _one_of(prefixes: list[str], where: str) -> str:
    """The model that its authors evaluate, of several in one file."""

    def rank(prefix: str) -> list[int]:
        words = re.findall(r"[^./]+", prefix)
        return [PREFERRED.index(x) if x in PREFERRED else len(PREFERRED) for x in words]

    first, *others = sorted(prefixes, key=rank)
    if others and rank(first) == rank(others[0]):
        either, other = (setting("part", prefix.rstrip("./")) for prefix in (first, others[0]))
        raise DataError(
            f"{where} holds several models, under {some(prefixes)}: say which one is meant, "
            f"{either} or {other}, or make a file of it: "
            f"`vitrail weights convert FILE ONE.safetensors --to vitrail --part NAME`"
        )
    return first
