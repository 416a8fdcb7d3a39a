"""Which checkpoint layouts there are, which one a file has, and which model is in it.

A layout is recognised by keys that no other has, the model by the shapes of its tensors. Some
things no shape shows: how many heads, which GELU, the norms' epsilon. Those come from what was
told (a row of WEIGHTS, a config.json beside the file, the user), else from what the layout's own
code fixes; and where that leaves a choice, the user is asked. Nothing is guessed in silence:
`Found.assumed` says what was taken to be so, and why.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, get_args

from torch import Size, Tensor

from vitrail.errors import DataError, UsageError, setting, unknown_name
from vitrail.models import MODELS, ModelConfig, ViTConfig
from vitrail.nn import Position, backbone_stride
from vitrail.weights import (
    clip,
    dinov3,
    dynamicvit,
    facebook,
    google,
    huggingface,
    mixer,
    mobilevit,
    resnet,
    timm,
    torchvision,
    twins,
)
from vitrail.weights.family import FamilyLayout
from vitrail.weights.names import Ask, Layout, State, ask_for_grid, oblong, some, translate
from vitrail.weights.torchfile import PREFERRED


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


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        google.GOOGLE,
        dinov3.DINOV3,
        dinov3.TIMM,
        dinov3.HUGGING_FACE,
        facebook.DEIT3,
        facebook.MAE,
        facebook.TIPSV2,
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
        huggingface.CLIP,
        huggingface.CLIP_BARE,
        huggingface.SIGLIP2,
        huggingface.SIGLIP,
        huggingface.SIGLIP_HEADLESS,
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
        for key in ("*blocks.0.attn.rel_pos*", "*layers.0.attn.rel_pos_h")
    ),
    Refused(
        ("*blocks.0.attn.q_bias",),
        "EVA, BEiT or their like: keys without bias, positions that are turned or relative",
        unless="*reg_token",  # DINOv3 has registers
    ),
    Refused(("*rope.freqs",), "timm's vit_*_rope_mixed: learned rotary positions"),
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
        ("*norm_pre.weight", "*attn_pool.latent"),
        "a Perception Encoder (timm's vit_pe_core_*): rotary positions besides its table",
    ),
    Refused(
        ("*class_embedding", "*transformer.resblocks.0.*", "*conv1.weight", "*ln_post.weight"),
        "CLIPA's in open_clip's names: no norm before the first block, and the mean of the tokens "
        "where CLIP has its class token",
        unless="*ln_pre.weight",
    ),
)

_VIT_WRITERS: Mapping[str, Callable[[State, ViTConfig], dict[str, Tensor]]] = {
    "timm": timm.to_timm,
    "huggingface": huggingface.to_huggingface,
    "google": google.to_google,
}


def write_as(to: str, state: State, config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict in the layout of `timm`, `huggingface` or `google`.

    Raises `DataError` for a model that has no counterpart there, and says what it lacks.
    """
    if to not in _VIT_WRITERS:
        raise unknown_name("layout to write", to, _VIT_WRITERS)
    if type(config) is ViTConfig:
        if dinov3.is_one(config) and to in dinov3.WRITTEN:
            return dinov3.WRITTEN[to](state, config)
        return _VIT_WRITERS[to](state, config)
    for layout in FAMILY_LAYOUTS.values():
        if layout.family is type(config) and to in layout.writes:
            return layout.write(state, config)
    raise DataError(f"{to} has no counterpart of the family '{config.family}' that vitrail knows")


_LEFT_OPEN = (
    "heads",
    "activation",
    "norm_eps",
    "position",
    "layer_scale",
    "stem_eps",
    "image_size",
)
"""Fields that a file may leave open, and the model that is to be made of it then settles."""


def understand(
    state: State,
    told: Mapping[str, Any],
    where: str,
    wanted: Mapping[str, Any] | None = None,
    *,
    beside: Mapping[str, Any] | None = None,
    named: bool = False,
) -> Found:
    """What the tensors of a file are. `told` has fields of the config that the user tells; `beside`
    those that a config.json beside the file does, or a row of WEIGHTS; `wanted` has some of the
    model that is to be made of it, which count where nothing else tells; `named` says that the
    architecture is known by its name, to be one of ours.

    Raises `DataError` for tensors of no known layout, for one that lacks something or has too
    much, and for a model of which something has to be known that neither shapes nor `told` say.
    """
    layout, prefix = recognise(state, where)
    beside = {name: value for name, value in (beside or {}).items() if name not in told}
    told = {**beside, **told}
    inner = {key[len(prefix) :]: key for key in state if key.startswith(prefix)}
    theirs = {name: state[key] for name, key in inner.items() if not layout.leaves_out(name)}
    used = {inner[name] for name in theirs}
    hints = {name: wanted[name] for name in _LEFT_OPEN if wanted and name in wanted}
    if hints.get("activation") == "swiglu":  # which shapes show
        del hints["activation"]
    if isinstance(layout, Layout) and "position" in layout.assumes:  # which its names show
        hints.pop("position", None)
    config: ModelConfig
    if isinstance(layout, FamilyLayout):
        config = layout.infer(theirs, told, where, hints.get("image_size"))
        fixed = ((name, value) for name, value in layout.changes.items() if name not in told)
        assumed = tuple(f"{name} {x}, as in the code of {layout.whose}" for name, x in fixed)
        assumed += () if named else layout.takes
        ours = layout.read(theirs, config)
    else:
        config, assumed = infer(theirs, layout, told, where, hints, beside, named)
        ours = layout.read(theirs, config)
    left_out = tuple(key for key in state if key not in used)
    return Found(layout, config, ours, left_out, assumed)


def recognise(state: State, where: str) -> tuple[Layout | FamilyLayout, str]:
    """The layout of a file's keys, and the prefix that the image model's keys have in it."""
    for keys, why, unless in REFUSED:
        if all(_any(state, glob) for glob in keys) and not _any(state, unless):
            raise DataError(f"{where} has a layout that vitrail does not read: {why}")
    layouts: list[Layout | FamilyLayout] = [*FAMILY_LAYOUTS.values(), *LAYOUTS.values()]
    found = [
        (layout, prefix)
        for layout in layouts
        for prefix in _prefixes(state, layout.marks)
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


def _prefixes(state: State, marks: tuple[str, ...]) -> list[str]:
    """Whatever stands before the marks, all of them: what wrapped the model, part by part."""
    first, *others = marks
    return [
        prefix
        for key in state
        if key.endswith(first) and (prefix := key[: -len(first)])[-1:] in ("", ".", "/")
        if all(prefix + mark in state for mark in others)
    ]


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


def infer(
    state: State,
    layout: Layout,
    told: Mapping[str, Any],
    where: str,
    hints: Mapping[str, Any],
    beside: Mapping[str, Any],
    named: bool,
) -> tuple[ViTConfig, tuple[str, ...]]:
    """The config of the model whose tensors these are, and what had to be assumed for it.

    A hint takes the place of an assumption. Where it is the same, there is still no proof of it,
    and that is said: whoever hints may only have followed an earlier assumption.
    """
    shapes = translate(layout.turn(state), layout.names)
    shown = layout.shows(state)
    facts = {**shown, **_facts(shapes, layout, {**told, **shown}, where, hints)}
    for name in ("width", "depth", "mlp", "patch"):
        if beside.get(name, facts[name]) != facts[name]:
            raise DataError(
                f"{where}: the config.json beside it says {name} {beside[name]}, its tensors have "
                f"{facts[name]}: one of the two belongs to other weights. Move the config.json away"
            )
    assumed = _of_the_grid(facts, told, hints)
    if (said := told.get("image_size")) and facts.get("image_size", said) != said:
        assumed.append(f"image_size {facts['image_size']}, by its positions, though {said} is said")
    known = {name: told[name] for name in told if name in ViTConfig.__dataclass_fields__}
    settled = {"resample": layout.resample, **known, **facts}
    for name, value in layout.assumes.items():
        if name not in settled:
            settled[name] = hints.get(name, value)
            if settled[name] == value:
                assumed.append(f"{name} {value}, as in the code of {layout.whose}")
    for name, ask in layout.asks.items():
        if name not in settled and all(facts[k] == v for k, v in ask.when.items()):
            if name not in hints:
                raise DataError(f"{where}: {_question(name, ask)}")
            settled[name] = hints[name]
    rivals = (facebook.DINO, facebook.MAE, facebook.MOCO) if layout is timm.TIMM else ()
    if "heads" not in settled:
        settled["heads"], why = _heads(facts, where, hints.get("heads"))
        others = [
            f" ({_question('heads', doubt)})"
            for x in rivals
            if (doubt := x.asks.get("heads")) and all(facts[k] == v for k, v in doubt.when.items())
        ]
        if why:
            assumed.append(f"heads {settled['heads']}, {why}{''.join(others)}")
    if not named:
        modes = [f"{x.resample} in {x.whose}'s" for x in rivals if x.resample != layout.resample]
        if modes and "resample" not in told:
            assumed.append(
                f"resample {layout.resample}, as in the code of {layout.whose}; "
                f"under the same names {', '.join(modes)}"
            )
        assumed += layout.takes
    try:
        return ViTConfig(**settled), tuple(assumed)
    except UsageError as error:
        raise DataError(f"{where} holds no ViT that can be built: {error}") from error


def _question(name: str, ask: Ask) -> str:
    """What to ask of a field, with the ways to answer."""
    return ask.words.format(*(setting(f"model.{name}", answer) for answer in ask.answers))


def _heads(facts: Mapping[str, Any], where: str, hint: int | None) -> tuple[int, str]:
    """The heads of the published models of this shape, if they agree, and the reason; else `hint`,
    with none.
    """
    shape = {name: facts[name] for name in ("width", "depth", "mlp")}
    gated = facts.get("activation") == "swiglu"
    same = {
        name: row.heads
        for name, row in MODELS.items()
        if type(row) is ViTConfig
        and all(getattr(row, k) == v for k, v in shape.items())
        and (row.activation == "swiglu") == gated
    }
    if len(set(same.values())) == 1 and hint in (None, *same.values()):
        return next(iter(same.values())), f"as in {next(iter(same))}"
    if hint is not None:
        return hint, ""
    raise DataError(
        f"{where}: the number of heads cannot be known from the weights, and no published model "
        f"has width {shape['width']}, depth {shape['depth']} and MLP {shape['mlp']}. "
        f"Say it: {setting('model.heads', max(1, shape['width'] // 64))}, or as many as it has"
    )


def _of_the_grid(
    facts: Mapping[str, Any], told: Mapping[str, Any], hints: Mapping[str, Any]
) -> list[str]:
    """What to say of a position table that may be for another grid, of as many cells."""
    if facts.get("position") != "learned" or "image_size" in told or "image_size" not in hints:
        return []
    patch = facts["patch"]
    (rows, columns), asked = (
        tuple(side // p for side, p in zip(size, patch, strict=True))
        for size in (facts["image_size"], hints["image_size"])
    )
    if rows != columns:
        return [f"positions {rows}x{columns}, of the proportions that are asked for"]
    if asked != (rows, columns) and asked[0] * asked[1] == rows * columns:
        return [
            f"positions {rows}x{columns}, though {asked[0]}x{asked[1]} are as many: if they are "
            f"for that, write a file that says so: vitrail weights convert FILE OUT --to vitrail "
            f"--model.image-size {hints['image_size'][0]} {hints['image_size'][1]}"
        ]
    return []


def _facts(
    shapes: Mapping[str, list[Size]],
    layout: Layout,
    told: Mapping[str, Any],
    where: str,
    hints: Mapping[str, Any],
) -> dict[str, Any]:
    """What the shapes do show."""

    def shape(key: str, axes: int) -> Size:
        if key not in shapes:
            raise DataError(f"{where} looks like {layout.whose}'s, but lacks our '{key}'")
        found = shapes[key][0]
        if len(found) != axes or not found.numel():
            raise DataError(f"{where}: our '{key}' has {axes} axes, and is {tuple(found)} there")
        return found

    def rows(key: str) -> int:
        return sum(size[0] for size in shapes.get(key, []) if size)

    if [len(size) for size in shapes.get("stem.proj.weight", ())] == [5]:
        raise DataError(
            f"{where} has a layout that vitrail does not read: a model of videos (V-JEPA 2, "
            f"VideoMAE) or of pairs of frames (Qwen-VL), whose patches have an axis of time"
        )
    width, channels, *patch = shape("stem.proj.weight", 4)
    hybrid: dict[str, Any] = {}
    if "stem.root.conv.weight" in shapes:  # the projection is of its last map
        channels = shape("stem.root.conv.weight", 4)[1]
        hybrid = {"stem": "resnet", "stem_depths": _depths(shapes)}
        patch = [p * backbone_stride(hybrid["stem_depths"]) for p in patch]
    hidden = shape("encoder.blocks.0.mlp.fc2.weight", 2)[1]
    blocks = {key.split(".")[2] for key in shapes if key.startswith("encoder.blocks.")}
    class_token, distilled = "prefix.class" in shapes, "prefix.distilled" in shapes
    registers = shape("prefix.registers", 3)[1] if "prefix.registers" in shapes else 0
    facts: dict[str, Any] = {
        "depth": len(blocks),
        "width": width,
        "mlp": hidden,
        "patch": tuple(patch),
        "channels": channels,
        "classes": rows("head.weight"),
        **hybrid,
        "stem_bias": "stem.proj.bias" in shapes,
        "stem_norm": "stem.norm.weight" in shapes,
        "class_token": class_token,
        "distilled": distilled,
        "registers": registers,
        "pre_norm": "pre_norm.weight" in shapes,
        **_pool(shapes),
        "pool_norm": "pool_norm.weight" in shapes,
        "qkv_bias": "encoder.blocks.0.attn.qkv.bias" in shapes,
        "qk_norm": "encoder.blocks.0.attn.q_norm.weight" in shapes,
        "representation": rows("representation.weight"),
        "head_bias": "head.bias" in shapes or "head.weight" not in shapes,
    }
    if rows("encoder.blocks.0.mlp.fc1.weight") == 2 * hidden:
        facts["activation"] = "swiglu"
    if "encoder.blocks.0.scale1.gamma" in shapes:
        facts["layer_scale"] = told.get("layer_scale") or hints.get("layer_scale") or 1e-5
    if "position.table" in shapes:
        table = shape("position.table", 3 if layout.batch_axis else 2)
        tokens = (int(class_token) + int(distilled), registers)
        size, positioned = _grid(table[-2], tokens, patch, told, hints, where)
        facts |= {"image_size": size, "prefix_position": positioned, "position": "learned"}
    elif "position" not in {**told, **layout.assumes}:
        if "position" not in hints:
            others = [kind for kind in get_args(Position) if kind != "learned"]
            raise DataError(
                f"{where} has no position table, and nothing says what it has instead: say "
                f"{setting('model.position', others[0])}, or {', '.join(others[1:])}"
            )
        facts |= {name: hints[name] for name in ("position", "image_size") if name in hints}
    return facts


def _depths(shapes: Mapping[str, list[Size]]) -> tuple[int, ...]:
    """How many blocks each stage of a hybrid's ResNet has."""
    blocks = {tuple(key.split(".")[2:4]) for key in shapes if key.startswith("stem.stages.")}
    counts = Counter(stage for stage, _ in blocks)
    return tuple(counts[str(i)] for i in range(len(counts)))


def _pool(shapes: Mapping[str, list[Size]]) -> dict[str, Any]:
    if "pool.probe" in shapes:
        return {"pool": "map"}
    if "prefix.class" not in shapes or "pool_norm.weight" in shapes:
        return {"pool": "mean"}
    return {}


def _grid(
    rows: int,
    tokens: tuple[int, int],
    patch: list[int],
    told: Mapping[str, Any],
    hints: Mapping[str, Any],
    where: str,
) -> tuple[tuple[int, int], bool]:
    """The image size that a table of so many rows is for, and whether prefix tokens are in it.

    `tokens`: class and distillation tokens, and registers. What is told counts first, then a
    square, then the proportions of images that the model is to be made for.
    """
    possible = dict.fromkeys((tokens[0], sum(tokens), 0))
    if "image_size" in told:
        height, width = (s // p for s, p in zip(told["image_size"], patch, strict=True))
        for prefix in possible:
            if height * width == rows - prefix:  # of SigLIP's 384 pixels, patches of 14 show 378
                return (height * patch[0], width * patch[1]), prefix > 0
    for prefix in possible:
        side = math.isqrt(max(rows - prefix, 0))
        if side and side * side == rows - prefix:
            return (side * patch[0], side * patch[1]), prefix > 0
    if "image_size" in hints:
        for prefix in possible:
            if size := oblong([rows - prefix], patch, hints["image_size"]):
                return size, prefix > 0
    counts = [rows - prefix for prefix in possible]
    raise DataError(
        f"{where}: its position table has {rows} rows, no square grid: "
        f"{ask_for_grid(counts, patch)}"
    )
