"""Small data sets with boxes, in every format that people have them in."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

Box = tuple[str, float, float, float, float]
"""Class, and left, top, right, bottom in pixels from 0."""
WIDTH, HEIGHT = 64, 48
TRUTH: dict[str, list[Box]] = {
    "train/a": [("cat", 0, 0, 20, 10), ("dog", 30.5, 8, 64, 48)],
    "train/b": [],
    "val/c": [("dog", 5, 6, 25, 36)],
}


def picture(file: Path, size: tuple[int, int] = (WIDTH, HEIGHT), orientation: int = 1) -> None:
    """`size` is (width, height) as stored."""
    file.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(file.name.encode())
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise).save(file, exif=exif.tobytes() if orientation > 1 else b"")


def coco(root: Path) -> None:
    """With a gap in its ids."""
    for part in ("train", "val"):
        keys = [key for key in TRUTH if key.startswith(part)]
        for key in keys:
            picture(root / f"images/{key}.jpg")
        write_coco(
            root / f"annotations/instances_{part}.json",
            {f"{key.split('/')[1]}.jpg": TRUTH[key] for key in keys},
        )


def write_coco(file: Path, images: dict[str, list[Box]], **more: object) -> None:
    ids = {"cat": 3, "dog": 7}
    found = {
        "images": [
            {"id": 10 + i, "file_name": name, "width": WIDTH, "height": HEIGHT}
            for i, name in enumerate(images)
        ],
        "categories": [{"id": k, "name": name} for name, k in ids.items()],
        "annotations": [
            {
                "id": 0,
                "image_id": 10 + i,
                "category_id": ids[name],
                "bbox": [left, top, right - left, bottom - top],
                "iscrowd": 0,
            }
            for i, boxes in enumerate(images.values())
            for name, left, top, right, bottom in boxes
        ],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**found, **more}))


def roboflow(root: Path) -> None:
    for part in ("train", "val"):
        folder = root / {"train": "train", "val": "valid"}[part]
        keys = [key for key in TRUTH if key.startswith(part)]
        names = {f"{key.split('/')[1]}.jpg": TRUTH[key] for key in keys}
        for name in names:
            picture(folder / name)
        rows = [
            {"id": 0, "name": "pets", "supercategory": "none"},
            {"id": 3, "name": "cat", "supercategory": "pets"},
            {"id": 7, "name": "dog", "supercategory": "pets"},
        ]
        write_coco(folder / "_annotations.coco.json", names, categories=rows)


def voc_text(filename: str, boxes: list[Box], first: int = 1, **more: str) -> str:
    objects = "".join(
        f"<object><name>{name}</name>{more.get('object', '')}<bndbox><xmin>{left + first}</xmin>"
        f"<ymin>{top + first}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        for name, left, top, right, bottom in boxes
    )
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    return (
        f"<annotation><folder>odd</folder><filename>{filename}</filename>{size}{objects}"
        "</annotation>"
    )


def voc(root: Path) -> None:
    for key, boxes in TRUTH.items():
        stem = key.split("/")[1]
        picture(root / f"JPEGImages/{stem}.jpg")
        file = root / f"Annotations/{stem}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(voc_text(f"{stem}.jpg", boxes))
    lists = root / "ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\n")


def voc_folders(root: Path) -> None:
    """Images and files side by side, with coordinates from 0."""
    for key, boxes in TRUTH.items():
        picture(root / f"{key}.jpg")
        (root / f"{key}.xml").write_text(voc_text(f"{key.split('/')[1]}.jpg", boxes, first=0))


def yolo_row(box: Box) -> str:
    name, left, top, right, bottom = box
    x, y, w, h = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    return f"{['cat', 'dog'].index(name)} {x / WIDTH} {y / HEIGHT} {w / WIDTH} {h / HEIGHT}"


def yolo_bare(root: Path) -> None:
    for key, boxes in TRUTH.items():
        picture(root / f"images/{key}.jpg")
        file = root / f"labels/{key}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        if boxes:
            file.write_text("\n".join(map(yolo_row, boxes)))
    (root / "classes.txt").write_text("cat\ndog\n")


def yolo(root: Path) -> None:
    """As Roboflow writes it, with paths that lead nowhere as they stand."""
    for key, boxes in TRUTH.items():
        part, stem = key.split("/")
        folder = root / {"train": "train", "val": "valid"}[part]
        picture(folder / f"images/{stem}.jpg")
        (folder / "labels").mkdir(parents=True, exist_ok=True)
        (folder / f"labels/{stem}.txt").write_text("\n".join(map(yolo_row, boxes)))
    (root / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['cat', 'dog']\n"
    )


def box2d(box: Box) -> dict[str, object]:
    name, *corners = box
    return {"category": name, "box2d": dict(zip(("x1", "y1", "x2", "y2"), corners, strict=True))}


def bdd_2018(root: Path) -> None:
    for part in ("train", "val"):
        frames = []
        for key in (key for key in TRUTH if key.startswith(part)):
            picture(root / f"images/100k/{key}.jpg")
            lane = {"category": "lane", "poly2d": [], "id": 3}
            labels = [*map(box2d, TRUTH[key]), lane]
            name = f"{key.split('/')[1]}.jpg"
            frames.append({"name": name, "timestamp": 10000, "labels": labels})
        (root / "labels").mkdir(exist_ok=True)
        file = root / f"labels/bdd100k_labels_images_{part}.json"
        file.write_text(json.dumps(frames))


def bdd_2020(root: Path) -> None:
    for part in ("train", "val"):
        frames = []
        for key in (key for key in TRUTH if key.startswith(part)):
            picture(root / f"images/100k/{key}.jpg")
            name = f"{key.split('/')[1]}.jpg"
            labels = {"labels": list(map(box2d, TRUTH[key]))} if TRUTH[key] else {}
            frames.append({"name": name, "timestamp": 10000, **labels})
        (root / "labels/det_20").mkdir(exist_ok=True, parents=True)
        file = root / f"labels/det_20/det_{part}.json"
        file.write_text(json.dumps(frames))


def bdd_each(root: Path) -> None:
    for key, boxes in TRUTH.items():
        picture(root / f"images/100k/{key}.jpg")
        file = root / f"labels/100k/{key}.json"
        file.parent.mkdir(exist_ok=True, parents=True)
        frame = {"timestamp": 10000, "objects": list(map(box2d, boxes))}
        file.write_text(json.dumps({"name": key.split("/")[1], "frames": [frame]}))


def table(root: Path) -> None:
    rows = ["image_path,xmin,ymin,xmax,ymax,label,split"]
    for key, boxes in TRUTH.items():
        picture(root / f"{key.replace('/', '_')}.jpg")
        name, part = f"{key.replace('/', '_')}.jpg", key.split("/")[0]
        told = [[*map(str, corners), of] for of, *corners in boxes] or [[""] * 5]
        rows += [",".join([name, *one, part]) for one in told]
    (root / "boxes.csv").write_text("\n".join(rows))


FORMATS = {
    make.__name__: make
    for make in (
        *(coco, roboflow, voc, voc_folders, yolo, yolo_bare, bdd_2018, bdd_2020, bdd_each, table),
    )
}
