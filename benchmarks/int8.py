"""What int8 costs a run in accuracy, kind by kind, and what its budget keeps in float.

    python benchmarks/int8.py RUN [--budget 0.5] [--tokens none tome:r=8] [--threads 2] [--json]

RUN is a classifier's. Each kind of int8, by each runtime that has it, is measured on the run's
held-out images beside the float model: `lost` in points with its 95% interval, `agree` the share of
images with the same answer. Then the search of vitrail.deploy.export.budget, for each runtime:
calibrated on some training images, decided on others, judged on the held-out ones.

`article` is what is often written, `quantize_dynamic(file, out)` and nothing else; as it stands it
fails on a graph that torch exports with a linear head, so it is given the graph that ours is.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

from vitrail.data import Source
from vitrail.deploy.engines.calm import openvino
from vitrail.deploy.export.budget import (
    Attempt,
    Variant,
    lost,
    points_text,
    search,
)
from vitrail.deploy.export.int8 import KINDS, Quantiser, draw
from vitrail.deploy.export.int8_onnx import OnnxInt8
from vitrail.deploy.export.int8_openvino import OpenVinoInt8
from vitrail.errors import DataError
from vitrail.runs.data import open_data_of
from vitrail.runs.load import LoadedRun, load

ENDINGS = {"onnx": ".onnx", "openvino": ".xml"}
CHOOSE, FEW, BATCH = 1000, 16, 16


class Graph(nn.Module):
    """From pixels to logits, as a bundle has it."""

    def __init__(self, loaded: LoadedRun) -> None:
        super().__init__()
        self.model, self.preprocess = loaded.model, loaded.preprocess

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        scale = torch.tensor([1 / (255 * std) for std in self.preprocess.std])
        pairs = zip(self.preprocess.mean, self.preprocess.std, strict=True)
        shift = torch.tensor([mean / std for mean, std in pairs])
        return self.model(views.float() * scale[:, None, None] - shift[:, None, None])


def export(loaded: LoadedRun, views: np.ndarray, file: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Graph(loaded).eval(),
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


def shown(source: Source, rows: Collection[int], loaded: LoadedRun) -> np.ndarray:
    return np.stack([loaded.preprocess.view(source.load(int(i))) for i in rows])


def parts(file: Path) -> list[Path]:
    """OpenVINO's two files, or the one that ONNX is."""
    return [file, *([file.with_suffix(".bin")] if file.suffix == ".xml" else [])]


class Asked:
    """A file in its runtime."""

    def __init__(self, file: Path, threads: int) -> None:
        self.bytes = sum(part.stat().st_size for part in parts(file))
        if file.suffix == ".onnx":
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            session = onnxruntime.InferenceSession(file.read_bytes(), options)
            self.run = lambda views: session.run(["logits"], {"views": views})[0]
        else:
            model = openvino().Core().compile_model(file, "CPU", {"INFERENCE_NUM_THREADS": threads})
            self.run = lambda views: model(views)["logits"]

    def logits(self, views: np.ndarray) -> np.ndarray:
        cuts = range(0, len(views), BATCH)
        return np.concatenate([self.run(views[i : i + BATCH]) for i in cuts])

    def seconds(self, views: np.ndarray, rounds: int = 9) -> float:
        """For an image of a batch, the median."""
        times = []
        for _ in range(rounds):
            asked = time.perf_counter()
            self.run(views)
            times.append(time.perf_counter() - asked)
        return statistics.median(times) / len(views)


def far(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--tokens", nargs="+", default=["none"])
    parser.add_argument("--runtimes", nargs="+", choices=ENDINGS, default=list(ENDINGS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    # What is lost is to the model with all its tokens.
    args.tokens = [each for each in args.tokens if each != "none"] + ["none"]
    torch.set_num_threads(args.threads)
    loaded = load(args.run)
    splits = open_data_of(loaded.config, loaded.run.split_file)
    train: Any = splits.train
    held = splits.test or splits.val
    drawn = draw(train.targets.strata(), len(train), CHOOSE)
    calibration, deciding = (shown(train, rows, loaded) for rows in drawn)
    judging = shown(held, range(len(held)), loaded)
    truth = {"choose": train.targets.strata()[drawn.choose], "judge": held.targets.strata()}
    print(f"{len(calibration)} calibrate, {len(deciding)} decide, {len(judging)} judge", flush=True)
    result: dict[str, Any] = {"kinds": [], "budgets": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quantisers: dict[tuple[str, str], Quantiser] = {}
        files = {}
        for tokens in args.tokens:
            work = folder / tokens.replace(":", "-")
            work.mkdir()
            # Of the run itself where no tokens are merged: its own setting.
            of = load(args.run, tokens=None if tokens == "none" else tokens)
            files[tokens] = export(of, calibration, work / "float.onnx")
            quantisers[tokens, "onnx"] = OnnxInt8(files[tokens], list(calibration), work)
            quantisers[tokens, "openvino"] = OpenVinoInt8(files[tokens], list(calibration))
        # In ONNX Runtime, which is in float32 wherever it runs.
        base = Asked(files["none"], args.threads)
        before = {"choose": base.logits(deciding), "judge": base.logits(judging)}
        right = {
            part: (logits.argmax(1) == truth[part]).astype(float) for part, logits in before.items()
        }
        print(
            f"float32: {100 * right['choose'].mean():.1f}% of those that decide are right, "
            f"{100 * right['judge'].mean():.1f}% of those that judge",
            flush=True,
        )
        for tokens in args.tokens:
            made = {("onnx", "float32"): files[tokens]}
            for runtime in args.runtimes:
                if runtime == "onnx":
                    article = folder / "article.onnx"
                    prepared = files[tokens].with_name("prepared.onnx")
                    quantize_dynamic(prepared, article, weight_type=QuantType.QInt8)
                    made["onnx", "article"] = article
                for kind, row in KINDS.items():
                    if runtime in row.runtimes:
                        file = folder / f"{tokens.replace(':', '-')}-{kind}{ENDINGS[runtime]}"
                        made[runtime, kind] = quantisers[tokens, runtime].write(file, kind)
            for (runtime, kind), file in made.items():
                model = Asked(file, args.threads)
                logits = model.logits(judging)
                found = lost(right["judge"], (logits.argmax(1) == truth["judge"]).astype(float))
                told = {
                    "tokens": tokens,
                    "runtime": runtime,
                    "kind": kind,
                    "top1": round(100 * float((logits.argmax(1) == truth["judge"]).mean()), 2),
                    "lost": [round(100 * each, 2) for each in found],
                    "agree": round(
                        100 * float((logits.argmax(1) == before["judge"].argmax(1)).mean()), 1
                    ),
                    "far": round(far(logits, before["judge"]), 4),
                    "bytes": model.bytes,
                    "ms": round(1000 * model.seconds(judging[:BATCH]), 2),
                    "ms_alone": round(1000 * model.seconds(judging[:1], 25), 2),
                }
                result["kinds"].append(told)
                print("  ".join(f"{value!s:<9}" for value in told.values()), flush=True)
        for runtime in args.runtimes:
            started = time.perf_counter()

            def variant(tokens: str, runtime: str = runtime) -> Variant:
                tool = quantisers[tokens, runtime]

                def quantise(floats: Collection[str]) -> Path:
                    return tool.write(folder / f"trial{ENDINGS[runtime]}", "static", floats)

                def measure(file: Path) -> Attempt:
                    model = Asked(file, args.threads)
                    hits = (model.logits(deciding).argmax(1) == truth["choose"]).astype(float)
                    kept = folder / f"kept-{time.monotonic_ns()}{file.suffix}"
                    for part in parts(file):
                        part.rename(kept.with_suffix(part.suffix))
                    return Attempt(kept, hits, model.seconds(deciding[:BATCH]), model.bytes)

                def distance(file: Path) -> float:
                    return far(
                        Asked(file, args.threads).logits(deciding[:FEW]), before["choose"][:FEW]
                    )

                return Variant(
                    name=f"{runtime} static, {tokens}",
                    layers=tool.layers,
                    quantise=quantise,
                    measure=measure,
                    far=distance,
                )

            lines: list[str] = []

            def tell(line: str, lines: list[str] = lines) -> None:
                print(line, flush=True)
                lines.append(line)

            try:
                best = search(
                    [variant(each) for each in args.tokens], right["choose"], args.budget, tell
                )
            except DataError as error:
                print(error)
                result["budgets"].append({"runtime": runtime, "trials": lines, "error": str(error)})
                continue
            after = (
                Asked(best.attempt.file, args.threads).logits(judging).argmax(1) == truth["judge"]
            )
            found = lost(right["judge"], after.astype(float))
            print(f"{runtime}: {best.line()}; of the held-out {points_text(found)}", flush=True)
            result["budgets"].append(
                {
                    "runtime": runtime,
                    "trials": lines,
                    "chosen": best.line(),
                    "floats": best.floats,
                    "lost": [round(100 * each, 2) for each in found],
                    "seconds": round(time.perf_counter() - started, 1),
                }
            )
    if args.json:
        print(json.dumps({"run": str(args.run), "budget": args.budget, **result}))


if __name__ == "__main__":
    main()
