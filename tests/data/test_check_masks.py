"""Every fault of masks that users report is found, and called by its name."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.data.check_masks import Finding, check_masks
from vitrail.data.sources.mask_meaning import MaskRules
from vitrail.data.sources.masked import MaskedSource
from vitrail.data.sources.masked_arrays import MaskedArrays
from vitrail.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path_factory.mktemp("cache")))


def pair(root: Path, name: str, mask: np.ndarray, ending: str = "png", part: str = "train") -> None:
    for folder in ("images", "masks"):
        (root / folder / part).mkdir(parents=True, exist_ok=True)
    size = mask.shape[1::-1]
    Image.new("RGB", size, (9, 99, 200)).save(root / f"images/{part}/{name}.jpg")
    Image.fromarray(mask).save(root / f"masks/{part}/{name}.{ending}")


def classes(root: Path, *names: str) -> None:
    (root / "classes.txt").write_text("\n".join(names))


def halves(first: int, second: int) -> np.ndarray:
    return np.repeat(np.array([first, second], np.uint8), 20)[None].repeat(30, axis=0)


def found(root: Path, rules: MaskRules | None = None) -> dict[str, Finding]:
    findings = check_masks(MaskedSource(root, masks=rules or MaskRules()), threads=2).findings
    assert all(finding.sentence and finding.count for finding in findings)
    return {finding.name: finding for finding in findings}


def test_nothing_is_said_of_masks_in_order(tmp_path: Path) -> None:
    for part in ("train", "val"):
        pair(tmp_path, part, halves(0, 1), part=part)
    done: list[int] = []
    assert check_masks(MaskedSource(tmp_path), 1, done.append).findings == ()
    assert done == [1, 2]


def test_unknown_values_are_counted_and_the_nearest_named(tmp_path: Path) -> None:
    pair(tmp_path, "a", halves(0, 9))
    pair(tmp_path, "b", halves(0, 1))
    classes(tmp_path, "sky", "sea")
    (finding,) = found(tmp_path).values()
    assert (finding.name, finding.count, finding.examples) == (
        "masks with unknown values",
        1,
        ("masks/train/a.png",),
    )
    assert finding.sentence.startswith("25.00% of all pixels are ignored for them; values: 1: ")
    assert "9 (25.00%; nearest 1)" in finding.sentence


def test_unknown_colours_name_the_nearest_colour(tmp_path: Path) -> None:
    mask = np.array([[[250, 0, 0], [0, 0, 255]]], np.uint8).repeat(8, 0).repeat(8, 1)
    pair(tmp_path, "a", mask)
    (tmp_path / "classes.json").write_text('{"road": [255, 0, 0], "sea": [0, 0, 255]}')
    assert (
        "#fa0000 (50.00%; nearest #ff0000)" in found(tmp_path)["masks with unknown values"].sentence
    )
    assert found(tmp_path)["classes never seen"].examples == ("road",)


def test_smoothed_and_jpeg_masks(tmp_path: Path) -> None:
    disc = (np.hypot(*np.mgrid[-80:80, -80:80]) < 50).astype(np.uint8) * 255
    smooth = Image.fromarray(disc).resize((300, 300), Image.Resampling.BILINEAR)
    pair(tmp_path, "a", np.asarray(smooth))
    findings = found(tmp_path)
    assert "were smoothed" in findings["masks with unknown values"].sentence
    assert "JPEG masks" not in findings
    pair(tmp_path, "b", disc, "jpg")
    assert found(tmp_path)["JPEG masks"].examples == ("masks/train/b.jpg",)
    classes(tmp_path, "sky", "sea", "ship")
    with pytest.raises(DataError, match=r"masks in JPEG files, 1 of 2: masks/train/b.jpg. .* PNG"):
        MaskedSource(tmp_path)


def test_masks_that_teach_nothing(tmp_path: Path) -> None:
    pair(tmp_path, "a", halves(255, 255))
    pair(tmp_path, "b", halves(0, 1))
    classes(tmp_path, "sky", "sea")
    assert found(tmp_path, MaskRules(ignore=(255,)))[
        "masks without a pixel that counts"
    ].examples == ("masks/train/a.png",)


def test_masks_that_cannot_be_used(tmp_path: Path) -> None:
    pair(tmp_path, "a", halves(0, 1))
    pair(tmp_path, "b", halves(0, 1))
    pair(tmp_path, "c", halves(0, 1))
    Image.new("RGB", (80, 60)).save(tmp_path / "images/train/a.jpg")
    (tmp_path / "masks/train/b.png").write_text("no picture")
    findings = found(tmp_path)
    (said,) = findings["masks of another size"].examples
    assert said.startswith(
        "masks/train/a.png: the mask is 40 x 30 pixels, but its image is 80 x 60"
    )
    (said,) = findings["unreadable masks"].examples
    assert said.startswith("masks/train/b.png: its content is none of the formats")
    assert "masks of another size" not in found(tmp_path, MaskRules(any_size=True))


def test_greys_in_three_channels(tmp_path: Path) -> None:
    pair(tmp_path, "a", np.stack([halves(0, 1)] * 3, axis=2))
    assert found(tmp_path)["masks of grey in three channels"].count == 1


def test_classes_that_are_never_or_only_elsewhere_seen(tmp_path: Path) -> None:
    pair(tmp_path, "a", halves(0, 1))
    pair(tmp_path, "b", halves(0, 2), part="val")
    classes(tmp_path, "sky", "sea", "ship", "star")
    findings = found(tmp_path)
    assert findings["classes only in held-out masks"].examples == ("ship",)
    assert findings["classes never seen"].examples == ("star",)


def test_more_classes_than_8_bits_hold() -> None:
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    names = tuple(f"class {k}" for k in range(300))
    source = MaskedArrays([mask], [mask], names, np.zeros(1, np.uint8), "a")
    first, second = check_masks(source).findings
    assert (first.name, first.count) == ("classes in masks of 8 bits", 300)
    assert (second.name, second.count) == ("classes never seen", 44)


def test_outlines_beyond_the_image(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "train/0.jpg")
    inside, beyond = [0, 0, 20, 0, 20, 30], [0, 0, 90, 0, 90, 30]
    annotations = [
        {"image_id": 1, "category_id": 1, "segmentation": [corners]} for corners in (inside, beyond)
    ]
    content = {
        "images": [{"id": 1, "file_name": "0.jpg", "height": 30, "width": 40}],
        "categories": [{"id": 1, "name": "sea"}],
        "annotations": annotations,
    }
    (tmp_path / "train/_annotations.coco.json").write_text(json.dumps(content))
    finding = found(tmp_path)["outlines beyond the image"]
    assert (finding.count, finding.examples) == (1, ("train/0.jpg",))


def test_what_each_class_has(tmp_path: Path) -> None:
    pair(tmp_path, "a", halves(0, 1))
    pair(tmp_path, "b", halves(0, 9))
    pair(tmp_path, "c", halves(255, 0), part="val")
    (tmp_path / "classes.txt").write_text("sky\nsea\n")
    report = check_masks(MaskedSource(tmp_path))
    assert [(one.name, one.pixels, one.images, one.images_without) for one in report.classes] == [
        ("sky", 1800, 3, 0),
        ("sea", 600, 1, 2),
    ]
    shares = (*(one.share for one in report.classes), report.ignored, report.unknown)
    assert shares == pytest.approx((1 / 2, 1 / 6, 1 / 6, 1 / 6))


@pytest.mark.parametrize(
    ("orientation", "size", "kind"),
    [
        (3, (40, 30), "masks of turned images"),  # upside down: no size shows how a mask lies
        (6, (40, 30), "masks of another size"),  # drawn on the image as it is stored
        (6, (30, 40), None),  # drawn on the image as it is shown
        (1, (40, 30), None),
    ],
)
def test_images_that_exif_turns(
    tmp_path: Path, orientation: int, size: tuple[int, int], kind: str | None
) -> None:
    values = halves(0, 1)
    pair(tmp_path, "a", values if size == (40, 30) else np.ascontiguousarray(values.T))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 30)).save(tmp_path / "images/train/a.jpg", exif=exif)
    findings = found(tmp_path)
    assert [name for name in findings if name.startswith("masks")] == ([kind] if kind else [])
    if kind:
        assert findings[kind].examples[0].startswith("masks/train/a.png")
