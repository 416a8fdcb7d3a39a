"""A bundle's card: what the model is, what it was measured to do, and how to use it elsewhere."""

from collections.abc import Mapping
from typing import Any

from vitrail.deploy.bundle import Bundle
from vitrail.deploy.export.tensorrt import command
from vitrail.units import bytes_text

_NUMBERS = {
    "top1": "top-1 accuracy",
    "map": "mAP",
    "miou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "ap": "AP",
    "ap50": "AP50",
    "knn": "k-NN accuracy",
    "probe": "linear probe",
    "rankme": "RankMe",
}
"""What a card says of metrics, and what to call it."""


def card(bundle: Bundle) -> str:
    """The text of CARD.md."""
    told, reading = bundle.metrics, bundle.reading
    before, after = (told.get(when, {}) for when in ("before", "after"))
    names = ", ".join(reading.names[:_MOST]) + (", ..." if len(reading.names) > _MOST else "")
    lines = [
        f"# {bundle.name}",
        "",
        f"A vitrail model ({bundle.made.get('model')}), exported to {bundle.runtime} in "
        f"{bundle.precision}. It was made from checkpoint {bundle.made.get('checkpoint')}, SHA-256 "
        f"`{bundle.made.get('sha256')}`.",
        "",
        f"- answers: {_ANSWERS[reading.kind]}",
        f"- classes, {len(reading.names)}: {names}" if reading.names else "- classes: none",
        f"- model: `{bundle.file}`, {bytes_text(bundle.model.stat().st_size)}",
        f"- input: {_INPUTS[bundle.takes]}",
        f"- preprocessing: {_preprocessing(bundle)}",
        "",
        f"## Measured on {told.get('images')} held-out images",
        "",
        "| | the run | this model |",
        "|---|---|---|",
        *(
            f"| {label} | {_number(before[name])} | {_number(after[name])} |"
            for name, label in _NUMBERS.items()
            if before.get(name)
        ),
        "",
        f"{told.get('agreement', 0):.1%} of the answers are the same.{_resizing(told)}",
        "",
        "## Use",
        "",
        "    vitrail predict BUNDLE image.jpg",
        "    vitrail evaluate BUNDLE --data labelled/",
        "    vitrail serve BUNDLE --port 8000",
        *_elsewhere(bundle),
    ]
    return "\n".join(lines) + "\n"


_MOST = 20
"""Classes that are named."""
_ANSWERS = {
    "classify": "`logits` and `probabilities`, [images, classes]",
    "segment": "`scores`, [images, classes, rows, columns]: the largest is a cell's class",
    "detect": "`boxes` [images, candidates, 4] as left, top, right, bottom in pixels of the view, "
    "`scores` and `labels` [images, candidates], the likeliest first, overlapping ones among them",
    "features": "`features`, [images, dimensions], of length 1",
}
_INPUTS = {
    "image": "`image`, uint8 [images, height, width, channels], decoded and upright, of any size: "
    "the model scales it itself",
    "views": "`views`, uint8 [images, channels, height, width], scaled already as below; the model "
    "normalises them itself",
}


_ALONE = "It takes one image at a time, scaled by the program around it, as said above."
_PHONES = {
    "executorch": (
        _ALONE + " With ExecuTorch's runtime, its XNNPACK backend and its own kernels: the method "
        "`forward`, whose outputs are in the order that the method `outputs` tells.",
    ),
    "litert": (_ALONE + " With LiteRT's runtime: the default signature, by the names above.",),
}


def _preprocessing(bundle: Bundle) -> str:
    how = bundle.preprocess
    height, width = how.size
    return (
        f"{how.resize} to {height}x{width}, {how.interpolation} with antialiasing, "
        f"{how.crop:g} of it shown"
    )


def _resizing(told: Mapping[str, Any]) -> str:
    """What is different where the model scales images itself."""
    if not (far := told.get("resizing")):
        return ""
    return (
        f" Images that it scales itself are at most {far['most']} of 255 levels from those that "
        f"Pillow scales ({far['at_all']:.2%} of the pixels differ); {far['same']:.1%} of "
        f"{far['images']} answers are the same."
    )


def _number(estimate: Mapping[str, Any] | None) -> str:
    if not estimate:
        return ""
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _elsewhere(bundle: Bundle) -> list[str]:
    """What a graph needs in other programs."""
    if bundle.runtime in _PHONES:
        return ["", "## On a phone", "", *_PHONES[bundle.runtime]]
    if bundle.runtime != "onnx":
        return []
    lines = ["", "## TensorRT", ""]
    if bundle.takes == "image":
        return [
            *lines,
            "It has no antialiased resizing: export again with `--preprocess outside`.",
        ]
    if complaints := bundle.made.get("tensorrt"):
        return [*lines, "Its parser would not take the model:", "", *(f"- {c}" for c in complaints)]
    how = bundle.preprocess
    return [
        *lines,
        "Shapes, types and operators are those that its parser takes (checked on the graph; no "
        "engine was built):",
        "",
        f"    {command(bundle.file, how.size, how.channels)}",
    ]
