"""Which checkpoint layouts there are, which one a file has, and which model is in it.

A layout is recognised by keys that no other has, the model by the shapes of its tensors. Some
things no shape shows (`unseen.py` lists them): how many heads, which GELU, the norms' epsilon.
Those come from what was told (a row of WEIGHTS, a config.json beside the file, the user), else
from what the layout's own code fixes; and where that leaves a choice, the user is asked. Nothing
is guessed in silence: `Found.assumed` says what was taken to be so, and why.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeAlias, get_args

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
from vitrail.weights.unseen import IF_ASKED, SHOWN, UNSEEN, Settled, Unseen, lines


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
        for key in ("*blocks.0.attn.rel_pos*", "*layers.0.attn.rel_pos_h")
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
    "huggingface": lambda state, config, like: huggingface.to_huggingface(state, config),
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


def _width(state: State, glob: str) -> int:
    return next(t.shape[-1] if t.ndim else 0 for key, t in state.items() if fnmatchcase(key, glob))


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
    whence: str,
) -> tuple[ViTConfig, tuple[Unseen, ...], tuple[str, ...]]:
    """The config of the model whose tensors these are; of what they do not show, where each is
    from; and what else had to be assumed for it.

    A hint takes the place of an assumption. Where it is the same, there is still no proof of it,
    and that is said: whoever hints may only have followed an earlier assumption.
    """
    shapes = translate(layout.turn(state), layout.names)
    shown = layout.shows(state)
    facts = {**shown, **_facts(shapes, layout, {**told, **shown}, where, hints)}
    _check_beside(facts, beside, where)
    notes = _of_the_grid(facts, told, hints)
    if (said := told.get("image_size")) and facts.get("image_size", said) != said:
        notes.append(f"image_size {facts['image_size']}, by its positions, though {said} is said")
    known = {name: told[name] for name in told if name in ViTConfig.__dataclass_fields__}
    hints = _possible(hints, facts)
    settled = Settled(facts, known, hints, beside=beside, whence=whence)
    if "image_size" in facts:  # it has a table
        rows, columns = (s // p for s, p in zip(facts["image_size"], facts["patch"], strict=True))
        square = f"the square that its {rows * columns} positions make"
        settled.explain("image_size", square if rows == columns else IF_ASKED)
    code = f"as in the code of {layout.whose}"
    if "pool_norm" not in facts:  # there is one name for the last norm, wherever it acts
        settled.take("pool_norm", False, code, aloud=False)
    for name, value in _fixed(layout, settled.fields).items():
        value = value(facts) if callable(value) else value
        settled.take(name, value, f"{code}{_doubt(layout, name, facts)}")
    settled.take("position", "learned", "by default", aloud=False)
    turned = settled.fields["position"] in ("rope", "learned_rope")
    if turned and "rope" not in settled.fields:
        if settled.fields["position"] == "learned_rope" and "rope" not in hints:
            raise DataError(
                f"{where}: no tensor shows by whose angles queries and keys are turned: say "
                f"{setting('model.rope', 'axial')} for RoPE-ViT, {setting('model.rope', 'eva')} "
                f"for EVA-02, {setting('model.rope', 'pe')} for Perception Encoders"
            )
        settled.take("rope", "dinov3", "nothing says whose angles it has")
    for name, ask in layout.asks.items():
        if name not in settled.fields and all(facts[k] == v for k, v in ask.when.items()):
            if name not in hints:
                raise DataError(f"{where}: {_question(name, ask)}")
            settled.take(name, None, "")
    rivals = (facebook.DINO, facebook.MAE, facebook.MOCO) if layout is timm.TIMM else ()
    if "heads" not in settled.fields:
        heads, why = _heads(facts, where, hints.get("heads"))
        doubts = (_doubt(x, "heads", facts, x.asks) for x in rivals)
        why = f"{why}{''.join(doubts)}" if why else ""
        settled.take("heads", heads, why or IF_ASKED, aloud=why != "")
    modes = [f"{x.resample} in {x.whose}'s" for x in rivals if x.resample != layout.resample]
    other = f"; under the same names {', '.join(modes)}" if modes else ""
    other += _doubt(layout, "resample", facts)
    aloud = bool(other) and not named
    settled.take("resample", layout.resample, f"{code}{other}", aloud=aloud)
    for name, usual in _USUAL.items():
        settled.take(name, usual, "by default", aloud=False)
    if not named:
        notes += [words for words in layout.takes if not (turned and words == timm.TABLE_ALONE)]
    try:
        config = ViTConfig(**settled.fields)
    except UsageError as error:
        raise DataError(f"{where} holds no ViT that can be built: {error}") from error
    return config, settled.lines(config), tuple(notes)


def _check_beside(facts: Mapping[str, Any], beside: Mapping[str, Any], where: str) -> None:
    """Raise `DataError` for a config.json that tells another shape than the tensors show."""
    for name in ("width", "depth", "mlp", "patch"):
        if beside.get(name, facts[name]) != facts[name]:
            raise DataError(
                f"{where}: the config.json beside it says {name} {beside[name]}, its tensors have "
                f"{facts[name]}: one of the two belongs to other weights. Move the config.json away"
            )


_USUAL: Mapping[str, Any] = {
    "layer_scale": 1e-5,  # no output depends on what it began with
    "image_size": (224, 224),
    "stem_eps": "vision_transformer",
}
"""What is taken where neither tensors nor code say it."""


def _fixed(layout: Layout, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that its code fixes. How tokens become one vector it always does."""
    pool = layout.assumes.get("pool", "class")
    if pool.startswith("class") and (not fields["class_token"] or fields["pool_norm"]):
        pool = "mean"
    return {**layout.assumes, "pool": pool}


def _possible(hints: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The hints that a model with these tensors can follow."""
    pool = str(hints.get("pool", ""))
    never = (
        {"pool"} if pool == "map" or (pool[:5] == "class" and not facts["class_token"]) else set()
    )
    if hints.get("position") not in ("rope", "learned_rope"):  # then it says nothing of angles
        never |= {"rope", "rope_grid"}
    return {name: hint for name, hint in hints.items() if name not in never}


def _doubt(
    layout: Layout, name: str, facts: Mapping[str, Any], asks: Mapping[str, Ask] | None = None
) -> str:
    """What else a field may be, with the way to say so; empty if its code knows one value alone."""
    doubt = (layout.doubts if asks is None else asks).get(name)
    if doubt is None or any(facts[k] != v for k, v in doubt.when.items()):
        return ""
    return f" ({_question(name, doubt)})"


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
    if "prefix_position" not in facts or "image_size" in told or "image_size" not in hints:
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
        **_pool(shapes, hidden),
        **({"pool_norm": "pool_norm.weight" in shapes} if "pool_norm" in layout.names else {}),
        "qkv_bias": "encoder.blocks.0.attn.qkv.bias" in shapes,
        "qk_norm": "encoder.blocks.0.attn.q_norm.weight" in shapes,
        "attn_norm": "encoder.blocks.0.attn.norm.weight" in shapes,
        "mlp_norm": "encoder.blocks.0.mlp.norm.weight" in shapes,
        "representation": rows("representation.weight"),
        "head_bias": "head.bias" in shapes or "head.weight" not in shapes,
    }
    if rows("encoder.blocks.0.mlp.fc1.weight") == 2 * hidden:
        facts["activation"] = "swiglu"
    if "encoder.blocks.0.scale1.gamma" not in shapes:
        facts["layer_scale"] = None
    if "position.table" in shapes:
        table = shape("position.table", 3 if layout.batch_axis else 2)
        tokens = (int(class_token) + int(distilled), registers)
        size, positioned = _grid(table[-2], tokens, patch, told, hints, where)
        facts |= {"image_size": size, "prefix_position": positioned}
        if told.get("position", layout.assumes.get("position")) != "learned_rope":
            facts["position"] = "learned"
    elif "position" not in {**told, **hints, **layout.assumes}:
        others = [kind for kind in get_args(Position) if not kind.startswith("learned")]
        first, whose = layout.tableless or (others[0], "")
        raise DataError(
            f"{where} has no position table, and nothing says what it has instead: say "
            f"{setting('model.position', first)}{whose}, or "
            f"{', '.join(kind for kind in others if kind != first)}"
        )
    return facts


def _depths(shapes: Mapping[str, list[Size]]) -> tuple[int, ...]:
    """How many blocks each stage of a hybrid's ResNet has."""
    blocks = {tuple(key.split(".")[2:4]) for key in shapes if key.startswith("stem.stages.")}
    counts = Counter(stage for stage, _ in blocks)
    return tuple(counts[str(i)] for i in range(len(counts)))


def _pool(shapes: Mapping[str, list[Size]], hidden: int) -> dict[str, Any]:
    if "pool.probe" not in shapes:
        return {}
    own = shapes.get("pool.mlp.fc2.weight", [Size()])[0][1:].numel()
    return {"pool": "map", "pool_mlp": own if own != hidden else 0}


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
