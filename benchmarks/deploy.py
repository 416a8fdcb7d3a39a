"""A ViT in each engine, precision and number of tokens, beside timm's own model: how fast, how big.

    python benchmarks/deploy.py [--model vit_s16 --batch 16] [--threads 2] [--rounds 15]
        [--kept FOLDER] [--json]

Three sides: timm's model in eager torch, the same in the engines (float32, and int8 as each engine
makes it best), and ours. All are asked the same batch in turns, in changing order; a ratio is the
median, over turns, of the ratio within the turn, so that a slow moment of the machine hits both.
`ratio_to_timm_eager` is to eager float32, `ratio_to_best_engine` to the fastest of timm's model in
int8. Weights are random: how fast a model is does not depend on them; how accurate int8 is, is
benchmarks/int8.py's to say.

Making the files takes minutes (NNCF and ONNX Runtime look for ranges), measuring them seconds:
`--kept` takes those that a folder has already, so that they can be made while others work.

OpenVINO compiles for the batch at hand: with a batch of any size it is 6 to 9% slower. With two
`streams` a batch is two halves, each on a core of its own (OpenVINO's THROUGHPUT); with one it is
one call on all threads. `article` is what is often written, `quantize_dynamic(file, out)`: as it
stands it fails on a graph that torch exports with a linear head ("Inferred shape and existing shape
differ"), so it is given the graph that ours is.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

from vitrail.deploy.engines.calm import core, openvino
from vitrail.deploy.export.int8 import KindName
from vitrail.deploy.export.int8_onnx import OnnxInt8
from vitrail.deploy.export.int8_openvino import OpenVinoInt8
from vitrail.models import build
from vitrail.models.tokens import tokens_from

try:
    import torchvision  # noqa: F401  (timm imports it)
except RuntimeError:  # none matches a CPU-only torch, and timm needs the names alone
    OPERATORS = torch.library.Library("torchvision", "DEF")
    OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm

TIMM = {"vit_s16": "vit_small_patch16_224", "vit_ti16": "vit_tiny_patch16_224"}
CALIBRATION = 16
WARM = 3

Call = Callable[[], object]


@dataclass(frozen=True)
class Side:
    """One way to have the model's answers."""

    whose: str
    engine: str
    precision: str
    tokens: str = "none"
    streams: int = 1

    @property
    def name(self) -> str:
        said = [self.whose, self.engine, self.precision]
        said += [self.tokens] * (self.tokens != "none") + ["2 streams"] * (self.streams > 1)
        return " ".join(said)


class Scaled(nn.Module):
    """From pixels to logits, as a bundle has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        return self.model(views.float() / 127.5 - 1)


def drawn(model: nn.Module) -> nn.Module:
    """With numbers where fresh heads have zeros."""
    with torch.no_grad():
        for tensor in model.parameters():
            if not tensor.any():
                tensor.normal_(std=0.02)
    return model.eval()


def export(model: nn.Module, views: np.ndarray, file: Path) -> Path:
    if file.exists():
        return file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Scaled(model).eval(),
            (torch.from_numpy(views[:2]),),
            dynamo=True,
            dynamic_shapes=({0: "batch"},),
            input_names=["views"],
            output_names=["logits"],
            opset_version=20,
            verbose=False,
        )
    assert program is not None
    program.save(file)
    return file


class Machine:
    """How models are asked here."""

    def __init__(self, views: np.ndarray, threads: int) -> None:
        self.views, self.threads = views, threads

    def eager(self, model: nn.Module, dtype: torch.dtype) -> Call:
        images = torch.from_numpy(self.views)

        @torch.inference_mode()
        def call() -> object:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                return model(images)

        return call

    def onnx(self, file: Path) -> Call:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        # The engines take turns: one that waits must not keep the next from its cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(file.read_bytes(), options)
        return lambda: session.run(None, {"views": self.views})

    def openvino(self, file: Path, precision: str, streams: int) -> Call:
        settings = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": streams,
            "INFERENCE_PRECISION_HINT": precision,
        }
        halves = np.array_split(self.views, streams)
        graph = core().read_model(file)
        graph.reshape({0: list(halves[0].shape)})
        model = core().compile_model(graph, "CPU", settings)
        requests = [model.create_infer_request() for _ in halves]

        def call() -> object:
            for request, half in zip(requests, halves, strict=True):
                request.start_async({"views": half}, share_inputs=True)
            for request in requests:
                request.wait()
            return requests

        return call


def bytes_of(file: Path) -> int:
    """Of OpenVINO's two files, or of the one that ONNX is."""
    beside = [file.with_suffix(".bin")] if file.suffix == ".xml" else []
    return sum(part.stat().st_size for part in (file, *beside))


def sides(
    model: str, tokens: Sequence[str], machine: Machine, folder: Path
) -> Iterator[tuple[Side, Call, int]]:
    """Each way, how it is asked, and the bytes of its file."""
    theirs = Scaled(drawn(timm.create_model(TIMM[model], pretrained=False))).eval()
    size = sum(each.nbytes for each in theirs.parameters())
    bfloat16 = "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    yield Side("timm", "eager", "float32"), machine.eager(theirs, torch.float32), size
    if bfloat16:
        yield Side("timm", "eager", "bfloat16"), machine.eager(theirs, torch.bfloat16), size
    files = {("timm", "none"): export(theirs.model, machine.views, folder / "timm.onnx")}
    for each in tokens:
        ours = drawn(build(model, classes=1000, **tokens_from(each)))
        file = folder / f"{each.replace(':', '-')}.onnx"
        files["vitrail", each] = export(ours, machine.views, file)
    streams = (1, 2) if len(machine.views) > 1 else (1,)
    rest = "bf16" if bfloat16 else "f32"
    for (whose, each), file in files.items():
        work = folder / file.stem
        work.mkdir(exist_ok=True)
        calibration = list(machine.views[:CALIBRATION])
        kinds: tuple[KindName, ...] = ("static", "dynamic", "weights")
        made = {f"int8 {kind}": work / f"{kind}.onnx" for kind in kinds}
        if not all(there.exists() for there in made.values()):
            quantiser = OnnxInt8(file, calibration, work)
            for kind in kinds:
                quantiser.write(made[f"int8 {kind}"], kind)
        if whose == "timm":
            made["int8 article"] = work / "article.onnx"
            if not made["int8 article"].exists():
                article = work / "prepared.onnx"
                quantize_dynamic(article, made["int8 article"], weight_type=QuantType.QInt8)
        made["float32"] = file
        for precision, graph in made.items():
            side = Side(whose, "onnxruntime", precision, each)
            yield side, machine.onnx(graph), graph.stat().st_size
        static, weights = (work / f"{kind}.xml" for kind in ("static", "weights"))
        for out, kind in ((static, "static"), (weights, "weights")):
            if not out.exists():
                OpenVinoInt8(file, calibration).write(out, kind)
        for precision, graph, hint in (
            ("float32", file, "f32"),
            *([("bfloat16", file, "bf16")] if bfloat16 else []),
            ("int8 static", static, rest),
            ("int8 weights", weights, rest),
        ):
            for count in streams:
                side = Side(whose, "openvino", precision, each, count)
                yield side, machine.openvino(graph, hint, count), bytes_of(graph)


def in_turns(calls: dict[Side, Call], rounds: int) -> dict[Side, list[float]]:
    """Seconds of each call, one a turn."""
    times: dict[Side, list[float]] = defaultdict(list)
    for call in calls.values():
        for _ in range(WARM):
            call()
    order = list(calls)
    for turn in range(rounds):
        start = turn % len(order)
        for side in order[start:] + order[:start]:
            asked = time.perf_counter()
            calls[side]()
            times[side].append(time.perf_counter() - asked)
    return times


def ratio(times: list[float], to: list[float]) -> float:
    return round(statistics.median(b / a for a, b in zip(times, to, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=TIMM, default="vit_s16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", nargs="+", default=["none", "tome:r=8", "tome:r=13"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kept", type=Path, help="a folder of files that were made before")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = args.batch, 3, 224, 224
    views = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.kept or temporary) / args.model
        folder.mkdir(parents=True, exist_ok=True)
        made = list(sides(args.model, args.tokens, Machine(views, args.threads), folder))
        times = in_turns({side: call for side, call, _ in made}, args.rounds)
    eager = times[Side("timm", "eager", "float32")]
    engines = [
        each
        for side, each in times.items()
        if side.whose == "timm" and side.engine != "eager" and side.precision.startswith("int8")
    ]
    best = min(engines, key=statistics.median)
    rows = []
    for side, _, size in sorted(made, key=lambda each: statistics.median(times[each[0]])):
        taken = statistics.median(times[side])
        row = {
            **asdict(side),
            "images_per_second": round(args.batch / taken, 1),
            "latency_ms": round(1000 * taken, 2),
            "bytes": size,
            "ratio_to_timm_eager": ratio(times[side], eager),
            "ratio_to_best_engine": ratio(times[side], best),
        }
        rows.append(row)
        print(
            f"{side.name:<48}{row['images_per_second']:>8} images/s{row['latency_ms']:>9} ms"
            f"{size / 1e6:>8.1f} MB{row['ratio_to_timm_eager']:>8}{row['ratio_to_best_engine']:>8}",
            flush=True,
        )
    if args.json:
        asked = vars(args) | {"kept": args.kept is not None}
        versions = {each.__name__: each.__version__ for each in (torch, timm, onnxruntime)}
        versions["openvino"] = openvino().__version__
        print(json.dumps({**versions, **asked, "rows": rows}))


if __name__ == "__main__":
    main()
