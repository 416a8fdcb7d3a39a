"""Which model has these tensors: what their shapes show, and where the rest is from.

Some things no shape shows (`unseen.py` lists them): how many heads, which GELU, the norms' epsilon.
Those come from what was told (a row of WEIGHTS, a config.json beside the file, the user), else from
what the layout's own code fixes; and where that leaves a choice, the user is asked. Nothing is
guessed in silence: what was taken to be so is said, and why.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, get_args

from torch import Size

from vitrail.errors import DataError, UsageError, setting
from vitrail.models import MODELS, ViTConfig
from vitrail.nn import Position, backbone_stride
from vitrail.weights import facebook, timm
from vitrail.weights.names import Ask, Layout, State, ask_for_grid, oblong, translate
from vitrail.weights.unseen import IF_ASKED, Settled, Unseen


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
        said = {"position": hints.get("position"), **layout.assumes, **told}
        if said["position"] != "learned_rope":
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
