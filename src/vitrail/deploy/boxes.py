"""What a detector says of images, as files: COCO's result file, and the boxes drawn."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from vitrail.data.names import printable
from vitrail.data.pixels.decode import AnyPicture, eight_bits, read_image
from vitrail.deploy.answers import drawn, writing
from vitrail.disk import write_whole
from vitrail.tasks.answers import Detections

RESULTS, NUMBERED = "detections.json", "detections-images.json"
USUAL_SCORE = 0.3
"""Of boxes that are shown, where a model was not measured, or nothing in it is right."""


class Boxed(NamedTuple):
    """An image with its boxes drawn."""

    overlay: Path

    @classmethod
    def of(cls, out: Path, name: str) -> "Boxed":
        """`out/NAME-overlay.jpg`."""
        return cls(out / f"{name}-overlay.jpg")

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.overlay,)

    def write(
        self,
        answer: Detections,
        picture: AnyPicture,
        grey_range: tuple[float, float] | None = None,
    ) -> dict[str, str]:
        with writing(self.overlay.parent):
            image = eight_bits(read_image(picture), grey_range).convert("RGB")
            drawn(image, answer, 0.0).save(self.overlay, quality=90)
        return {"overlay": str(self.overlay)}


def write_results(found: Mapping[str, Detections], out: Path) -> Path:
    """Write what was found in images, by their names, as COCO's result file: a list of `image_id`,
    `category_id`, `bbox` and `score`, with the names of both. Images and categories are numbered
    from 1, images in the order of `found`; a second file has these numbers, as COCO's annotations
    have them, of images in which nothing was found too.
    """
    rows = [
        {
            "image_id": number,
            "file_name": printable(name),
            "category_id": int(label) + 1,
            "category": one.names[label],
            "bbox": [round(float(v), 2) for v in (x, y, right - x, bottom - y)],
            "score": round(float(score), 5),
        }
        for number, (name, one) in enumerate(found.items(), 1)
        for (x, y, right, bottom), label, score in zip(
            one.boxes, one.labels, one.scores, strict=True
        )
    ]
    names = next((one.names for one in found.values()), ())
    numbered = {
        "images": [{"id": n, "file_name": printable(name)} for n, name in enumerate(found, 1)],
        "categories": [{"id": n, "name": name} for n, name in enumerate(names, 1)],
    }
    file = out / RESULTS
    with writing(out):
        write_whole(out / NUMBERED, json.dumps(numbered, indent=0).encode())
        write_whole(file, json.dumps(rows, indent=0).encode())
    return file
