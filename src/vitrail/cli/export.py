"""`vitrail export RUN`: a trained model for another runtime, with the proof that it is the same."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vitrail.cli.parse import parse
from vitrail.cli.screen import say
from vitrail.deploy.export.int8 import KindName
from vitrail.deploy.export.make import ExportConfig, Precision, export
from vitrail.report.words import megabytes, percent
from vitrail.runs import Run

_ABOUT = """Export a run's model: one folder with the model, its preprocessing inside as far as the
runtime can carry it, its classes, what was measured before and after, and a checksum of every file.

It refuses to finish where the exported model does not give the run's answers to its held-out
images: in float32 to 99.9% of them; in a lower precision where it lost more than --budget."""


@dataclass(frozen=True)
class ExportArgs:
    """What `vitrail export` takes."""

    run: Annotated[Path, tyro.conf.Positional]
    """The folder that vitrail train wrote."""
    to: str = "onnx"
    """The runtime: onnx, openvino or torch; for phones executorch or litert."""
    precision: Precision = "float32"
    """int8: quantised with images of the training part, as far as --budget allows."""
    budget: float = 0.5
    """Points of top-1, mIoU or AP that a lower precision may cost."""
    preprocess: Literal["inside", "outside"] = "inside"
    """outside: the model takes views that were scaled already, as TensorRT needs it; vitrail does
    that wherever it asks the model."""
    int8: KindName = "static"
    """Of int8: static quantises weights and activations, by the ranges that calibration images
    have; weights is weights alone; dynamic has the ranges of the batch at hand. executorch has
    dynamic, litert dynamic and weights, of one image at a time."""
    out: Path | None = None
    """The bundle's folder. Default: RUN/export-TO-PRECISION."""
    checkpoint: str | None = None
    """last, best or step-NUMBER. Default: the one that the run keeps."""
    tokens: str | None = None
    """Work with fewer tokens: tome:r=13 merges so many in each block of any ViT,
    dynamicvit:keep=0.5 changes what a DynamicViT keeps."""


def export_run(args: Sequence[str]) -> dict[str, Any]:
    """Export, prove, and say what it cost."""
    given = parse(ExportArgs, args, "export", _ABOUT)
    started = time.perf_counter()
    run = Run(given.run)
    name = f"export-{given.to}-{given.precision}"
    name += "" if given.tokens is None else "-" + given.tokens.replace(":", "-").replace("=", "")
    out = given.out or run.path / name
    config = ExportConfig(
        to=given.to,
        precision=given.precision,
        budget=given.budget,
        int8=given.int8,
        preprocess=given.preprocess,
        checkpoint=given.checkpoint,
        tokens=given.tokens,
    )
    bundle, proof = export(run, out, config, say)
    headline = proof.before.headline
    before, after = (metrics.summary[headline] for metrics in (proof.before, proof.after))
    lost = proof.lost
    print(f"before    {percent(before.value)} {headline}, {proof.images} held-out images")
    print(
        f"after     {percent(after.value)}, {100 * lost.value:.1f} points lost (95% interval "
        f"{100 * lost.low:.1f} to {100 * lost.high:.1f})"
    )
    print(f"the same  {percent(proof.agreement)} of the answers")
    print(f"bundle    {bundle.folder}, {megabytes(bundle.bytes)}")
    return {
        "bundle": str(bundle.folder),
        "to": bundle.runtime,
        "precision": bundle.precision,
        "metrics": {
            "before": proof.before.values(),
            "after": proof.after.values(),
        },
        "lost": lost._asdict(),
        "agreement": proof.agreement,
        "differ": list(proof.differ),
        "images": proof.images,
        "bytes": bundle.bytes,
        "seconds": round(time.perf_counter() - started, 1),
    }
