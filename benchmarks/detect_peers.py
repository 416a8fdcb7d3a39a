"""What detectors of other libraries learn in the same time, from the start they have offline.

    python benchmarks/detect_peers.py learn fcos|yolox COCO [--tile 280] [--minutes 15] --out FILE
    python benchmarks/detect_peers.py judge FILE COCO [--most 100]

`learn` runs in an environment of its own, without vitrail: `pip install torch==2.13.0 numpy pillow`
and, with --no-deps, torchvision==0.28.0 for fcos, libreyolo==1.6.0 (MIT) for yolox, with what it
imports. `judge` runs in ours. COCO is what `vitrail data convert DATA --to coco COCO` writes.

- fcos: torchvision's FCOS on a ResNet-18 with a feature pyramid; its ResNet-50 is slower still.
  AdamW, warm-up and cosine by the clock, mirror images, scales of 0.5 to 2.
- yolox: libreyolo's YOLOX-nano by its own `train` and defaults, as many epochs as fit by the time
  of the first two; it warms up for a tenth of them, and the last tenth is without mosaic.

Both start from random weights: theirs are on servers, ours in a wheel. With --tile images are cut
into windows that overlap by a quarter, in training and in prediction. torchvision's compiled
operators do not load beside a torch for CPUs: its suppression is written here, and slower; it runs
after training only. One run each.
"""

import argparse
import json
import math
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Found = tuple[Tensor, Tensor, Tensor]
"""Boxes [n 4] (left, top, right, bottom), scores [n], labels [n]."""
_SUPPRESS = 0.6
_LEAST = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    learn = parts.add_parser("learn")
    learn.add_argument("peer", choices=sorted(_PEERS))
    learn.add_argument("coco", type=Path)
    learn.add_argument("--tile", type=int)
    learn.add_argument("--side", type=int, default=336, help="pixels of a view's longer side")
    learn.add_argument("--minutes", type=float, default=15)
    learn.add_argument("--out", type=Path, required=True)
    judge = parts.add_parser("judge")
    judge.add_argument("found", type=Path)
    judge.add_argument("coco", type=Path)
    judge.add_argument("--most", type=int, default=100)
    args = parser.parse_args()
    if args.part == "judge":
        print(json.dumps(_judge(args.found, args.coco, args.most)))
        return 0
    _without_compiled()
    torch.manual_seed(0)
    random.seed(0)
    began = time.perf_counter()
    predict, steps = _PEERS[args.peer](args)
    took = time.perf_counter() - began
    found = _all(predict, args.coco, args.tile)
    args.out.write_text(json.dumps({"steps": steps, "seconds": took, "found": found}))
    print(f"{args.peer}: {steps} steps in {took / 60:.1f} min, {len(found)} boxes", file=sys.stderr)
    return 0


def _fcos(args: argparse.Namespace) -> tuple[Any, int]:
    """A trained FCOS as a function of an image, and its steps."""
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    pictures, classes = _learned(args.coco, args.tile)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256), norm_layer=torch.nn.BatchNorm2d,
    )  # fmt: skip
    model = FCOS(
        backbone, classes, min_size=args.side, max_size=args.side, detections_per_img=1000,
        score_thresh=_LEAST, topk_candidates=1000,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    model.train()
    began, steps, order = time.perf_counter(), 0, []
    while (share := (time.perf_counter() - began) / (60 * args.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * min(share / 0.05, 0.5 + 0.5 * math.cos(math.pi * share))
        views, targets = [], []
        for _ in range(8):
            order = order or random.sample(range(len(pictures)), len(pictures))
            view, boxes, labels = _view(*pictures[order.pop()])
            views.append(view)
            targets.append({"boxes": boxes, "labels": labels})
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(views, targets)
        loss = sum(part.float() for part in losses.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if steps % 20 == 0:
            print(f"{steps} {float(loss.detach()):.3f}", file=sys.stderr)
    model.eval()

    @torch.inference_mode()
    def predict(image: Image.Image) -> Found:
        said = model([_tensor(image)])[0]
        return said["boxes"], said["scores"], said["labels"]

    return predict, steps


def _view(image: Image.Image, boxes: Tensor, labels: Tensor) -> Found:
    """A picture for training: mirrored or not, 0.5 to 2 times as large, cut to its size."""
    width, height = image.size
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        boxes = torch.stack(
            [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1
        )
    factor = 2 ** random.uniform(-1, 1)
    large = image.resize((max(1, round(width * factor)), max(1, round(height * factor))))
    left, top = (
        random.uniform(min(0, have - had), max(0, have - had))
        for have, had in zip(large.size, image.size, strict=True)
    )
    canvas = Image.new("RGB", image.size, (124, 116, 104))
    canvas.paste(large, (round(-left), round(-top)))
    before = boxes * factor - torch.tensor([round(left), round(top)] * 2)
    after = before.clamp(min=0).minimum(torch.tensor([width, height] * 2))
    area, whole = (
        (b[:, 2] - b[:, 0]).clamp(min=0) * (b[:, 3] - b[:, 1]).clamp(min=0) for b in (after, before)
    )
    kept = (area > 0.25 * whole) & (area > 4)
    return _tensor(canvas), after[kept], labels[kept]


def _yolox(args: argparse.Namespace) -> tuple[Any, int]:
    """A trained YOLOX-nano as a function of an image, and its steps."""
    from libreyolo import LibreYOLOX

    folder = args.out.with_suffix(".yolo")
    shutil.rmtree(folder, ignore_errors=True)  # a longer run's pictures would be learned from too
    pictures, classes = _learned(args.coco, args.tile)
    for kind in ("images", "labels"):
        (folder / kind / "train").mkdir(parents=True, exist_ok=True)
    for i, (image, boxes, labels) in enumerate(pictures):
        image.save(folder / "images/train" / f"{i}.png")
        size = torch.tensor(image.size * 2)
        rows = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1) / size
        (folder / "labels/train" / f"{i}.txt").write_text(
            "".join(
                f"{k} " + " ".join(f"{x:.6f}" for x in row) + "\n"
                for k, row in zip(labels.tolist(), rows.tolist(), strict=True)
            )
        )
    names = [str(k) for k in range(classes)]
    # Its judgement of itself is not asked for: what it validates on is one of its pictures.
    (folder / "one.txt").write_text(f"{(folder / 'images/train/0.png').resolve()}\n")
    (folder / "data.yaml").write_text(
        f"path: {folder.resolve()}\ntrain: images/train\nval: one.txt\nnames: {json.dumps(names)}\n"
    )
    batch, side = 8, args.side // 32 * 32

    def trained(epochs: int, name: str) -> Any:
        model = LibreYOLOX(size="n", nb_classes=classes, device="cpu")
        calm = max(1, epochs // 10)
        model.train(
            str(folder / "data.yaml"), epochs=epochs, batch=batch, imgsz=side, device="cpu",
            workers=0, amp=False, pretrained=False, patience=0, exist_ok=True, name=name,
            project=str(folder), warmup_epochs=calm, no_aug_epochs=calm, eval_interval=10**6,
            save_period=10**6,
        )  # fmt: skip
        return model

    began = time.perf_counter()
    trained(1, "one")
    middle = time.perf_counter()
    trained(2, "two")
    # What the second epoch adds is an epoch; what is left of the first run is the start.
    first, both = middle - began, time.perf_counter() - middle
    epoch = max(both - first, 0.1 * first)
    epochs = max(1, int((60 * args.minutes - max(first - epoch, 0)) / epoch))
    print(f"an epoch takes {epoch:.1f} s: {epochs} of them", file=sys.stderr)
    began = time.perf_counter()
    model = trained(epochs, "all")
    print(f"trained for {(time.perf_counter() - began) / 60:.1f} minutes", file=sys.stderr)

    model.model.eval()

    def predict(image: Image.Image) -> Found:
        said = model(image, conf=_LEAST, iou=0.65, imgsz=side, max_det=1000).boxes
        return tuple(torch.as_tensor(x) for x in (said.xyxy, said.conf, said.cls))

    return predict, epochs * (len(pictures) // batch)


_PEERS = {"fcos": _fcos, "yolox": _yolox}


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _learned(coco: Path, tile: int | None) -> tuple[list[tuple[Image.Image, Tensor, Tensor]], int]:
    """The pictures to learn from, with boxes and labels from 0, and how many classes there are."""
    said = json.loads((coco / "annotations/instances_train.json").read_text())
    place = {each["id"]: k for k, each in enumerate(said["categories"])}
    pictures = []
    for about in said["images"]:
        image = Image.open(coco / "images/train" / about["file_name"]).convert("RGB")
        here = [x for x in said["annotations"] if x["image_id"] == about["id"] and not x["iscrowd"]]
        boxes = torch.tensor([x["bbox"] for x in here]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([place[x["category_id"]] for x in here], dtype=torch.int64)
        for left, top, right, bottom in _windows(image.size, tile):
            window = torch.tensor([left, top, right, bottom])
            inside = boxes.maximum(window[:2].repeat(2)).minimum(window[2:].repeat(2))
            area, whole = (
                (b[:, 2] - b[:, 0]).clamp(min=0) * (b[:, 3] - b[:, 1]).clamp(min=0)
                for b in (inside, boxes)
            )
            kept = area > 0.4 * whole
            pictures.append(
                (
                    image.crop((left, top, right, bottom)),
                    inside[kept] - window[:2].repeat(2),
                    labels[kept],
                )
            )
    return pictures, len(place)


def _windows(size: tuple[int, int], tile: int | None) -> list[tuple[int, int, int, int]]:
    if tile is None:
        return [(0, 0, *size)]
    starts = []
    for length in size:
        count = 1 + max(0, math.ceil((length - tile) / (0.75 * tile)))
        last = max(0, length - tile)
        starts.append([round(i * last / max(1, count - 1)) for i in range(count)])
    return [
        (x, y, min(x + tile, size[0]), min(y + tile, size[1])) for y in starts[1] for x in starts[0]
    ]


def _all(predict: Any, coco: Path, tile: int | None) -> list[dict[str, Any]]:
    """COCO results of all held-out images."""
    said = json.loads((coco / "annotations/instances_val.json").read_text())
    found = []
    for about in said["images"]:
        image = Image.open(coco / "images/val" / about["file_name"]).convert("RGB")
        parts = []
        for left, top, right, bottom in _windows(image.size, tile):
            boxes, scores, labels = predict(image.crop((left, top, right, bottom)))
            parts.append(
                (boxes.float() + torch.tensor([left, top] * 2), scores.float(), labels.long())
            )
        boxes, scores, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        if tile is not None:
            kept = _suppressed(boxes + labels[:, None] * 1e5, scores, _SUPPRESS)
            boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True):
            found.append(
                {
                    "image_id": about["id"],
                    "category_id": said["categories"][label]["id"],
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "score": score,
                }
            )
    return found


def _suppressed(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """The places of boxes of which no better one overlaps more, the best first."""
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    both = (high - low).clamp(min=0).prod(dim=2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    over = both / (area[:, None] + area[None] - both).clamp(min=1e-9) > threshold
    kept = torch.ones(len(boxes), dtype=torch.bool)
    for i in range(len(boxes)):
        if kept[i]:
            kept[i + 1 :] &= ~over[i, i + 1 :]
    return order[kept]


def _without_compiled() -> None:
    """Let torchvision be imported without its compiled operators, and suppress in Python."""
    names = ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", _suppressed, "CPU")
    for name in (*names, *(f"_{name}_backward" for name in names), "qnms", "qroi_align"):
        library.define(f"{name}(Tensor input) -> Tensor")
    globals()["_library"] = library  # it undoes its definitions when it goes
    import torchvision.extension

    torchvision.extension._has_ops = lambda: True


def _judge(found: Path, coco: Path, most: int) -> dict[str, Any]:
    """The figures that vitrail's own runs have, of detections of another."""
    from vitrail.found import Found as Boxes
    from vitrail.metrics.boxes import count, detection

    truth = json.loads((coco / "annotations/instances_val.json").read_text())
    said = json.loads(found.read_text())
    place = {each["id"]: k for k, each in enumerate(truth["categories"])}

    def corners(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        boxes = torch.tensor([x["bbox"] for x in rows], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes, torch.tensor([place[x["category_id"]] for x in rows], dtype=torch.int64)

    counts = []
    for about in truth["images"]:
        boxes, labels = corners([x for x in said["found"] if x["image_id"] == about["id"]])
        scores = [x["score"] for x in said["found"] if x["image_id"] == about["id"]]
        real = [x for x in truth["annotations"] if x["image_id"] == about["id"]]
        objects, classes = corners(real)
        asked = {
            "boxes": objects,
            "labels": classes,
            "ignored": torch.tensor([x["iscrowd"] for x in real]),
        }
        made = Boxes(boxes.numpy(), np.array(scores, np.float64), labels.numpy())
        counts.append(count(made, asked, len(place), most))
    rows = {name: torch.stack([each[name] for each in counts]) for name in counts[0]}
    metrics = detection(rows, tuple(each["name"] for each in truth["categories"]), most)
    loose = metrics.best_loose
    return {
        "steps": said["steps"],
        "minutes": round(said["seconds"] / 60, 1),
        **{name: metrics.to_dict()[name] for name in ("ap", "ap50", "ap75", "f1")},
        "f1_at_0.4": None if loose is None else loose.f1.value,
    }


if __name__ == "__main__":
    sys.exit(main())
