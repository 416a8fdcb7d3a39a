"""A run made into a bundle: exported, held to what it was, and only then given its name."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from vitrail import __version__
from vitrail.data import Splits
from vitrail.deploy.bundle import Bundle, refuse_there, write_bundle
from vitrail.deploy.engines import check_installed, engine_of, runtime
from vitrail.deploy.export.card import card
from vitrail.deploy.export.graph import Graph
from vitrail.deploy.export.inside import compare
from vitrail.deploy.export.int8 import KindName, check
from vitrail.deploy.export.lower import Lowered, in_int8
from vitrail.deploy.export.proof import Proof, prove
from vitrail.deploy.exported import measure, portable
from vitrail.deploy.running import threshold_in
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
    preprocess: Literal["inside", "outside"] = "inside"
    """Whether the model resizes images itself, where its views have one size."""
    int8: KindName = "static"
    """How, of int8: a name in `vitrail.deploy.export.int8.KINDS`."""
    checkpoint: str | None = None
    tokens: str | None = None

    def __post_init__(self) -> None:
        runtime(self.to)
        if self.precision not in PRECISIONS[self.to]:
            raise UsageError(
                f"{setting('precision', self.precision)} is nothing that a bundle for {self.to} "
                f"has: choose {' or '.join(PRECISIONS[self.to])}"
            )
        if self.precision == "int8":
            check(self.to, self.int8, images=1)
        if not 0 <= self.budget <= 100:
            raise UsageError(f"{setting('budget')} must be 0 to 100 points, not {self.budget:g}")


def export(
    run: Run | Path | str, out: Path, config: ExportConfig, notify: Notify = lambda _: None
) -> tuple[Bundle, Proof]:
    """Export a run's model into a bundle at `out`, and prove it on the run's held-out images.

    It is held to the model as it was trained: fewer tokens and a lower precision have one budget.

    Raises `DataError` where it does not give the run's answers, or lost more than the budget, and
    leaves nothing behind; `UsageError` for what cannot be exported, or would replace something.
    """
    refuse_there(out)
    check_installed(config.to)
    own = load(run, config.checkpoint)
    loaded = own if config.tokens is None else load(run, config.checkpoint, config.tokens)
    file = own.run.split_file
    splits = open_data_of(own.config, file if file.is_file() else None)
    source = splits.test if splits.test is not None else splits.val
    notify(f"measuring the run on {len(source)} held-out images")
    before = measure(own.task, source, own.preprocess, own.config)
    if not len(before.indices):
        raise DataError(f"no held-out image of {own.run.path} can be read: nothing to prove it by")
    proofs: list[Proof] = []

    def make(folder: Path) -> Bundle:
        notify(f"exporting to {config.to}, {config.precision}")
        bundle = _exported(Order(own, loaded, splits, folder, config, notify), out)
        engine = engine_of(bundle)
        notify("asking the exported model about the same images")
        proof = prove(own, source, engine, before)
        if config.precision == "float32":
            graph = proof
            if config.tokens is not None:  # the graph is of the model with fewer
                said = measure(loaded.task, source, loaded.preprocess, loaded.config)
                graph = prove(loaded, source, engine, said)
            hold_answers(graph)
        if config.precision != "float32" or config.tokens is not None:
            hold_budget(proof, config, notify)
        proofs.append(proof)
        measured = measurements(proof)
        if bundle.takes == "image":
            inside = compare(bundle, engine, source)
            notify(inside.sentence())
            measured["resizing"] = {**inside.pixels._asdict(), "same": inside.same}
        return replace(bundle, metrics=measured, threshold=threshold_in(proof.after.to_dict()))

    bundle = write_bundle(out, make, card)
    return bundle, proofs[0]


def _exported(order: "Order", out: Path) -> Bundle:
    """The model's file, and what there is to say of it but how good it is."""
    loaded, config = order.loaded, order.config
    if config.preprocess == "inside" and (why := outside(loaded, config)):
        order.notify(f"resizing stays outside of the model: {why}")
    written = WRITERS[config.to](order)
    return Bundle(
        folder=order.folder,
        name=loaded.run.path.resolve().name,
        runtime=config.to,
        precision=config.precision,
        file=written.file,
        takes=written.takes,
        preprocess=loaded.preprocess,
        reading=loaded.task.reading,
        coupled=written.coupled,
        made={**made(loaded, config, out), **written.made},
        learned=portable(to_dict(loaded.config)),
    )


def outside(loaded: LoadedRun, config: ExportConfig) -> str:
    """Why resizing cannot be inside of the model; nothing where it can."""
    if not loaded.preprocess.one_size:
        return f"by the rule {loaded.preprocess.resize} views are as large as their images"
    if config.to not in ("onnx", "openvino"):
        return f"a bundle for {config.to} takes views that the engine has scaled"
    return ""


def made(loaded: LoadedRun, config: ExportConfig, out: Path) -> dict[str, Any]:
    """By what, and of what: where the run lies, seen from the bundle at `out`."""
    return {
        "vitrail": __version__,
        "run": os.path.relpath(loaded.run.path.resolve(), out.resolve()),
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


def hold_answers(proof: Proof) -> None:
    """Raise `DataError` where a model in float32 does not give the answers that it was made of."""
    if proof.agreement < LEAST_AGREEMENT:
        raise DataError(
            f"the exported model gives other answers to {len(proof.differ)} of {proof.images} "
            f"held-out images ({_named(proof)}): nothing was written"
        )


def hold_budget(proof: Proof, config: ExportConfig, notify: Notify) -> None:
    """Raise `DataError` where more is lost than the budget.

    It holds where the 95% interval of what is lost ends within it. Where the images are so few that
    the interval is wider than the budget on either side, whatever is lost, the number alone
    decides, and that is said.
    """
    value, low, high = (100 * end for end in proof.lost)
    told = f"{value:.2f} points lost (95% interval {low:.2f} to {high:.2f})"
    half = (high - low) / 2
    few, needed = half > config.budget, round(proof.images * (half / (config.budget or 0.1)) ** 2)
    if high > config.budget and not (few and value <= config.budget):
        raise DataError(
            f"{told} on {proof.images} held-out images, and the budget is {config.budget:g}: "
            f"nothing was written. Other answers to {len(proof.differ)} ({_named(proof)}). Give a "
            f"larger {setting('budget')}, or another {setting('precision')}"
        )
    if high > config.budget:
        notify(
            f"{proof.images} images are too few to show that no more than {config.budget:g} points "
            f"are lost, whatever was: {told}. About {needed:,} could"
        )


def _named(proof: Proof) -> str:
    return ", ".join(proof.differ[:5]) + (", ..." if len(proof.differ) > 5 else "")


PRECISIONS: Mapping[str, tuple[Precision, ...]] = {
    "onnx": ("float32", "int8"),
    "openvino": ("float32", "bfloat16", "int8"),
    "torch": ("float32",),
    "executorch": ("float32", "int8"),
    "litert": ("float32", "int8"),
}
"""What each runtime has on a CPU; of ONNX Runtime, bfloat16 is for GPUs."""


class Order(NamedTuple):
    """What a writer is asked for."""

    own: LoadedRun
    """The run as it was trained."""
    loaded: LoadedRun
    """With the tokens that were ordered."""
    splits: Splits
    folder: Path
    config: ExportConfig
    notify: Notify

    @property
    def graph(self) -> Graph:
        """From views to what the task says."""
        return Graph(self.loaded.task, self.loaded.preprocess)

    @property
    def inside(self) -> bool:
        """Whether the model is to resize images itself."""
        return self.config.preprocess == "inside" and not outside(self.loaded, self.config)

    @property
    def takes(self) -> str:
        """What the model's input is called."""
        return "image" if self.inside else "views"


def _lowered(order: Order, file: Path, work: Path) -> Lowered:
    """The graph of a float file in the precision that was ordered."""
    config = order.config
    if config.precision != "int8":  # bfloat16 is how a runtime computes, not how it keeps
        return Lowered(file)
    train = order.splits.parts.get("train")
    if train is None:
        raise UsageError(
            f"int8 is calibrated with training images, and those of {order.loaded.run.path} are a "
            f"stream: use another {setting('precision')}"
        )
    return in_int8(
        order.own,
        order.loaded,
        train,
        file,
        config.to,
        config.int8,
        config.budget,
        work,
        order.notify,
    )


class Written(NamedTuple):
    """A model's file, and what there is to know of it."""

    file: str
    takes: str
    coupled: bool = False
    made: Mapping[str, Any] = MappingProxyType({})
    """How."""


def _onnx(order: Order) -> Written:
    from vitrail.deploy.export import tensorrt
    from vitrail.deploy.export.compose import onnx_with_resizing
    from vitrail.deploy.export.onnx import OPSET, read, save, to_onnx

    with TemporaryDirectory() as place:
        work = Path(place)
        save(to_onnx(order.graph, order.loaded.preprocess), work / "float.onnx")
        chosen = _lowered(order, work / "float.onnx", work)
        model = read(chosen.file)
    made = {**chosen.made, "opset": OPSET, "tensorrt": tensorrt.complaints(model)}
    if order.inside:
        model = onnx_with_resizing(model, order.loaded.preprocess)
    save(model, order.folder / "model.onnx")
    return Written("model.onnx", order.takes, chosen.coupled, made)


def _openvino(order: Order) -> Written:
    from vitrail.deploy.engines.calm import core, openvino
    from vitrail.deploy.export.compose import openvino_with_resizing
    from vitrail.deploy.export.onnx import save, to_onnx

    ov = openvino()
    with TemporaryDirectory() as place:
        work = Path(place)
        save(to_onnx(order.graph, order.loaded.preprocess), work / "float.onnx")
        chosen = _lowered(order, work / "float.onnx", work)
        model = core().read_model(str(chosen.file))
        if order.inside:
            model = openvino_with_resizing(model, order.loaded.preprocess)
        ov.save_model(model, str(order.folder / "model.xml"), compress_to_fp16=False)
    return Written("model.xml", order.takes, chosen.coupled, chosen.made)


def _torch(order: Order) -> Written:
    from vitrail.deploy.export.torch import save

    save(order.graph, order.loaded.preprocess, order.folder / "model.pt2")
    return Written("model.pt2", "views")


def _executorch(order: Order) -> Written:
    from vitrail.deploy.export.executorch import save

    return _for_phones(order, save, "model.pte")


def _litert(order: Order) -> Written:
    from vitrail.deploy.export.litert import save

    return _for_phones(order, save, "model.tflite")


def _for_phones(order: Order, save: Callable[..., None], file: str) -> Written:
    """int8 is that of all layers here, or none: the proof alone holds it to the budget."""
    int8 = order.config.int8 if order.config.precision == "int8" else None
    save(order.graph, order.loaded.preprocess, order.folder / file, int8)
    made = {"batch": 1, **({"int8": int8} if int8 else {})}
    return Written(file, "views", made=made)


WRITERS: Mapping[str, Callable[[Order], Written]] = {
    "onnx": _onnx,
    "openvino": _openvino,
    "torch": _torch,
    "executorch": _executorch,
    "litert": _litert,
}
