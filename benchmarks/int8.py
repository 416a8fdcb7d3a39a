"""What each kind of int8 costs a run in accuracy, beside the float model.

    python benchmarks/int8.py RUN [--tokens none tome:r=8] [--runtimes onnx openvino] [--json]

RUN is a classifier's. Each kind, by each runtime that has it, is measured on the run's held-out
images: `lost` in points with its 95% interval, `agree` the share of images with the same answer.
What a budget keeps in float is `vitrail export --precision int8`'s to say.

`article` is what is often written, `quantize_dynamic(file, out)` and nothing else; as it stands it
fails on a graph that torch exports with a linear head, so it is given the graph that ours is.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime.quantization import QuantType, quantize_dynamic

from vitrail.deploy.engines import Engine, Setting, onnxruntime
from vitrail.deploy.engines import openvino as openvino_engine
from vitrail.deploy.export.budget import lost
from vitrail.deploy.export.graph import Graph
from vitrail.deploy.export.int8 import KINDS, Quantiser, draw
from vitrail.deploy.export.int8_onnx import OnnxInt8
from vitrail.deploy.export.int8_openvino import OpenVinoInt8
from vitrail.deploy.export.onnx import save, to_onnx
from vitrail.runs.data import open_data_of
from vitrail.runs.load import load

ENDINGS = {"onnx": ".onnx", "openvino": ".xml"}
BATCH = 16


def engine(file: Path, threads: int) -> Engine:
    """A file in its runtime, in float32 where it is in float."""
    setting = Setting(threads)
    if file.suffix == ".onnx":
        return onnxruntime.load_file(file, "views", setting)
    return openvino_engine.load_file(file, "views", "float32", setting)


def logits_of(asked: Engine, views: list[np.ndarray]) -> np.ndarray:
    cuts = range(0, len(views), BATCH)
    return np.concatenate([asked.run(views[i : i + BATCH])["logits"] for i in cuts])


def milliseconds(asked: Engine, views: list[np.ndarray], rounds: int) -> float:
    """For an image, the median."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        asked.run(views)
        times.append(time.perf_counter() - started)
    return round(1000 * statistics.median(times) / len(views), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", nargs="+", default=["none"])
    parser.add_argument("--runtimes", nargs="+", choices=ENDINGS, default=list(ENDINGS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    own = load(args.run)
    splits = open_data_of(own.config, own.run.split_file)
    train: Any = splits.train
    held = splits.test or splits.val
    truth = held.targets.strata()
    drawn = draw(train.targets.strata(), len(train), 0)
    calibration = [own.preprocess.view(train.load(int(i))) for i in drawn.calibrate]
    views = [own.preprocess.view(held.load(i)) for i in range(len(held))]
    rows: list[dict[str, Any]] = []
    before: np.ndarray | None = None
    with tempfile.TemporaryDirectory() as name:
        # What is lost is to the model with all its tokens, so that it comes first.
        for tokens in ["none", *(each for each in args.tokens if each != "none")]:
            work = Path(name) / tokens.replace(":", "-")
            work.mkdir()
            of = own if tokens == "none" else load(args.run, tokens=tokens)
            file = work / "float.onnx"
            save(to_onnx(Graph(of.task, of.preprocess), of.preprocess), file)
            made = {("onnx", "float32"): file}
            for runtime in args.runtimes:
                tool: Quantiser = (
                    OnnxInt8(file, calibration, work)
                    if runtime == "onnx"
                    else OpenVinoInt8(file, calibration)
                )
                if runtime == "onnx":
                    made["onnx", "article"] = work / "article.onnx"
                    prepared = work / "prepared.onnx"
                    quantize_dynamic(prepared, work / "article.onnx", weight_type=QuantType.QInt8)
                for kind, row in KINDS.items():
                    if runtime in row.runtimes:
                        out = work / f"{runtime}-{kind}{ENDINGS[runtime]}"
                        made[runtime, kind] = tool.write(out, kind)
            for (runtime, kind), each in made.items():
                asked = engine(each, args.threads)
                logits = logits_of(asked, views)
                before = logits if before is None else before
                right = [(x.argmax(1) == truth).astype(float) for x in (before, logits)]
                parts = each.parent.glob(f"{each.stem}.*")
                rows.append(
                    {
                        "tokens": tokens,
                        "runtime": runtime,
                        "kind": kind,
                        "top1": round(100 * float(right[1].mean()), 2),
                        "lost": [round(100 * end, 2) for end in lost(*right)],
                        "agree": round(
                            100 * float((logits.argmax(1) == before.argmax(1)).mean()), 1
                        ),
                        "far": round(
                            float(np.linalg.norm(logits - before) / np.linalg.norm(before)), 4
                        ),
                        "bytes": sum(part.stat().st_size for part in parts),
                        "ms": milliseconds(asked, views[:BATCH], 9),
                        "ms_alone": milliseconds(asked, views[:1], 25),
                    }
                )
                print("  ".join(f"{value!s:<9}" for value in rows[-1].values()), flush=True)
    if args.json:
        print(json.dumps({"run": str(args.run), "kinds": rows}))


if __name__ == "__main__":
    main()
