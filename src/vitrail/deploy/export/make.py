"""A run made into a bundle: exported, held to what it was, and only then given its name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vitrail import __version__
from vitrail.data import Source, Splits
from vitrail.data.views.preprocess import Preprocess
from vitrail.deploy.bundle import Bundle, write_bundle
from vitrail.deploy.engines import engine_of, runtime
from vitrail.deploy.export.card import card
from vitrail.deploy.export.graph import Graph
from vitrail.deploy.export.proof import Proof, measure, prove
from vitrail.deploy.exported import told
from vitrail.errors import DataError, UsageError, setting
from vitrail.runs import Run
from vitrail.runs.config import to_dict
from vitrail.runs.data import open_data_of
from vitrail.runs.load import LoadedRun, load

Precision = Literal["float32", "bfloat16", "int8"]
Notify = Callable[[str], None]

_MOST_NAMED = 100
"""Images that a bundle says have other answers."""
LEAST_AGREEMENT = 0.999
"""Of the answers of a model in float32 with the run's own."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What a bundle is to be."""

    to: str = "onnx"
    precision: Precision = "float32"
    budget: float = 0.5
    """Points (hundredths) of top-1, mIoU or AP that may be lost to a lower precision."""
    checkpoint: str | None = None
    tokens: str | None = None

    def __post_init__(self) -> None:
        runtime(self.to)
        if not 0 <= self.budget <= 100:
            raise UsageError(f"{setting('budget')} must be 0 to 100 points, not {self.budget:g}")


def export(
    run: Run | Path | str, out: Path, config: ExportConfig, notify: Notify = lambda _: None
) -> tuple[Bundle, Proof]:
    """Export a run's model into a bundle at `out`, and prove it on the run's held-out images.

    Raises `DataError` where it does not give the run's answers, or lost more than the budget, and
    leaves nothing behind; `UsageError` for what cannot be exported, or would replace something.
    """
    loaded = load(run, config.checkpoint, config.tokens)
    source = held_out(loaded)
    notify(f"measuring the run on {len(source)} held-out images")
    before = measure(loaded.task, source, loaded.preprocess, loaded)
    if not len(before.indices):
        raise DataError(
            f"no held-out image of {loaded.run.path} can be read: nothing to prove it by"
        )
    proofs: list[Proof] = []

    def make(folder: Path) -> Bundle:
        notify(f"exporting to {config.to}, {config.precision}")
        bundle = _exported(loaded, folder, config)
        engine = engine_of(bundle)
        notify("asking the exported model about the same images")
        proof = prove(loaded, source, engine, before)
        hold(proof, config)
        proofs.append(proof)
        return replace(bundle, metrics=measurements(proof))

    bundle = write_bundle(out, make, card)
    return bundle, proofs[0]


def held_out(loaded: LoadedRun) -> Source:
    """The images that the run never learned from, and its report judges."""
    file = loaded.run.split_file
    splits: Splits = open_data_of(loaded.config, file if file.is_file() else None)
    return splits.test if splits.test is not None else splits.val


def _exported(loaded: LoadedRun, folder: Path, config: ExportConfig) -> Bundle:
    """The model's file in `folder`, and what there is to say of it but how good it is."""
    graph = Graph(loaded.task, loaded.preprocess)
    written = WRITERS[config.to](graph, loaded.preprocess, folder)
    return Bundle(
        folder=folder,
        name=loaded.run.path.resolve().name,
        runtime=config.to,
        precision=config.precision,
        file=written.file,
        takes=written.takes,
        preprocess=loaded.preprocess,
        reading=loaded.task.reading,
        made=made(loaded, config),
        learned=told(to_dict(loaded.config)),
    )


def made(loaded: LoadedRun, config: ExportConfig) -> dict[str, Any]:
    """By what, and of what."""
    return {
        "vitrail": __version__,
        "run": str(loaded.run.path),
        "checkpoint": loaded.folder.name,
        "sha256": loaded.sha256,
        "tokens": config.tokens,
        "model": loaded.config.row or loaded.config.model.family,
    }


def measurements(proof: Proof) -> dict[str, Any]:
    """What a bundle keeps of its proof."""
    named = {"before": proof.before, "after": proof.after}
    return {
        "images": proof.images,
        **{
            when: {name: value and value._asdict() for name, value in metrics.summary.items()}
            for when, metrics in named.items()
        },
        "agreement": proof.agreement,
        "lost": proof.lost._asdict(),
        "differ": list(proof.differ[:_MOST_NAMED]),
    }


def hold(proof: Proof, config: ExportConfig) -> None:
    """Raise `DataError` where an exported model is not what the run is."""
    named = ", ".join(proof.differ[:5]) + (", ..." if len(proof.differ) > 5 else "")
    if config.precision == "float32" and proof.agreement < LEAST_AGREEMENT:
        raise DataError(
            f"the exported model gives other answers to {len(proof.differ)} of {proof.images} "
            f"held-out images ({named}): nothing was written"
        )


class Written(NamedTuple):
    """A model's file, and what it takes."""

    file: str
    takes: str


def _onnx(graph: Graph, preprocess: Preprocess, folder: Path) -> Written:
    from vitrail.deploy.export.onnx import save, to_onnx

    save(to_onnx(graph, preprocess), folder / "model.onnx")
    return Written("model.onnx", "views")


def _torch(graph: Graph, preprocess: Preprocess, folder: Path) -> Written:
    from vitrail.deploy.export.torch import save

    save(graph, preprocess, folder / "model.pt2")
    return Written("model.pt2", "views")


WRITERS: Mapping[str, Callable[[Graph, Preprocess, Path], Written]] = {
    "onnx": _onnx,
    "torch": _torch,
}
