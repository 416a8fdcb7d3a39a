"""Images with masks, as a user of the command line meets them."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from command import last_json, vitrail

TINY = ["--model", "vit_ti16", "--model.image-size", "32", "32", "--model.depth", "1"]
TINY += ["--epochs", "1"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def scenes(here: Path) -> Path:
    """Eight images, whose masks hold 0, 1 and 2."""
    for k in range(8):
        picture(Path(f"scenes/images/{k}.jpg"), k)
        mask(Path(f"scenes/masks/{k}.png"), np.roll([0, 1, 2], k))
    (here / "maps").mkdir()
    (here / "maps/names.txt").write_text("sky\nsea\nship\n")
    return here / "scenes"


def picture(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (36, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def mask(file: Path, values: np.ndarray | list[int], **how: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    stripes = np.repeat(np.asarray(values, np.uint8), 48 // len(values))
    Image.fromarray(stripes[None].repeat(36, axis=0)).save(file, **how)


def content(folder: Path) -> dict[str, str]:
    return {
        str(file): sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize("by", ["flags", "file"])
def test_what_is_said_of_masks_arrives_and_is_remembered(scenes, here, monkeypatch, capfd, by):
    before = content(scenes)
    (here / "m.yaml").write_text("data: {masks: {classes: maps/names.txt, ignore: [2]}}")
    flags = ["--data.masks.classes", "maps/names.txt", "--data.masks.ignore", "2"]
    said = ["--config", "m.yaml"] if by == "file" else flags
    code, _, err = vitrail(capfd, "train", "scenes", *said, *TINY, "--out", "run")
    assert code == 0, err
    assert err.count("ignored values: 1, in 8 of 8 masks, 33.33% of all pixels: 2") == 1
    kept = yaml.safe_load((here / "run/config.yaml").read_text())["data"]["masks"]
    assert (kept["classes"], kept["ignore"]) == (str(here / "maps/names.txt"), [2])

    if by == "file":
        return  # all else is as with flags
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    for words in (
        ["evaluate", "../run"],
        ["evaluate", "../run", "--data", "../scenes"],
        ["predict", "../run", "../scenes/images/0.jpg"],
        ["train", "--resume", "../run", "--epochs", "2"],
    ):
        code, out, err = vitrail(capfd, *words)
        assert code == 0, (words, err)
    # Other masks may be understood otherwise.
    told = ("--data.masks.ignore", "1", "2", "--json")
    code, out, err = vitrail(capfd, "evaluate", "../run", "--data", "../scenes", *told)
    assert code == 0 and last_json(out)["metrics"]["miou"] is not None, err
    code, _, err = vitrail(capfd, "evaluate", "../run", "--data.masks.ignore", "1")
    assert code == 2 and "go with --data: the run has its own" in " ".join(err.split())
    code, out, _ = vitrail(capfd, "predict", "../run", "../scenes/images/0.jpg", "--json")
    assert set(last_json(out)["predictions"][0]["shares"]) <= {"sky", "sea"}
    assert content(scenes) == before


def test_data_check_takes_the_same_flags(scenes, capfd):
    flags = ["--data.masks.classes", "maps/names.txt", "--data.masks.ignore", "2"]
    code, out, _ = vitrail(capfd, "data", "check", "scenes", *flags, "--json")
    assert code == 0
    assert "   33.33%        8        0  sky\n" in out
    assert "   33.33%                    (ignored)\n" in out
    found = last_json(out)
    assert [one["name"] for one in found["mask_classes"]] == ["sky", "sea"]
    assert found["mask_pixels"] == {"ignored": pytest.approx(1 / 3), "unknown": 0}
    zero, _, _ = vitrail(capfd, "data", "check", "scenes", "--data.masks.reduce-zero", "True")
    assert zero == 0
    code, _, err = vitrail(capfd, "data", "check", "scenes", "--data.masks.classes", "no.txt")
    assert (code, "no such file: no.txt (--data.masks.classes names it)" in err) == (3, True)


def test_data_check_names_every_mask_at_fault_in_80_columns(scenes, capfd):
    (scenes / "classes.txt").write_text(f"sky\n{'sea' * 40}\nship\n")
    Image.new("L", (24, 18)).save(scenes / "masks/0.png")
    (scenes / "masks/1.png").write_text("damaged")
    mask(scenes / "masks/2.png", [9])
    code, out, _ = vitrail(capfd, "data", "check", "scenes", "--json")
    assert code == 3
    table = out[out.index("   pixels") : out.index("{")]
    assert max(map(len, table.splitlines())) <= 80
    for k in range(3):
        assert f"masks/{k}.png" in table
    kinds = {one["name"]: one["count"] for one in last_json(out)["masks"]}
    assert kinds == {
        "unreadable masks": 1,
        "masks of another size": 1,
        "masks with unknown values": 1,
        "masks without a pixel that counts": 1,
    }
    code, out, err = vitrail(capfd, "train", "scenes", *TINY, "--data.max-unreadable", "0.5")
    assert code == 0, err
    assert "masks/1.png (its content is none" in err


def test_jpeg_masks_are_refused_by_name(scenes, capfd):
    (scenes / "masks/3.png").unlink()
    mask(scenes / "masks/3.jpg", [0, 1, 2], quality=60)
    for verb in (["data", "check", "scenes"], ["train", "scenes", *TINY]):
        code, _, err = vitrail(capfd, *verb)
        assert code == 3
        assert "masks in JPEG files, 1 of 8: masks/3.jpg" in err
        assert "as PNG" in err


def test_doctor_knows_masks_and_images_of_which_nothing_is_said(scenes, here, capfd):
    (scenes / "masks/0.png").write_text("damaged")
    for k in range(4):
        picture(here / f"bare/{k}.jpg", k)
    code, out, _ = vitrail(capfd, "doctor", "scenes", "--data.masks.ignore", "2")
    assert code == 3
    assert "8 images with masks of 2 classes" in out
    assert "1 of 8 that were tried cannot be read: images/0.jpg: its mask masks/0.png: its" in out
    _, out, _ = vitrail(capfd, "doctor", "bare")
    assert "4 images without labels" in out
    assert "vitrail train bare --task mocov3" in out
    assert "class for each" not in out
    assert "folder for each class" not in out
    code, out, _ = vitrail(capfd, "data", "check", "bare")
    assert code == 0
    assert "4 images with no labels" in out


@pytest.mark.parametrize("kind", ["P", "I;16"])
def test_one_mask_in_colours_does_not_make_the_others_unknown(scenes, here, kind, capfd):
    """Numbers of a palette, or of 16 bits, are counted as what they are."""
    (scenes / "classes.txt").write_text("sky\nsea\nship\n")
    for k in range(1, 8):
        values = np.repeat(np.roll([0, 1, 2], k), 16)[None].repeat(36, axis=0)
        if kind == "P":
            image = Image.fromarray(values.astype(np.uint8), "P")
            image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        else:
            image = Image.fromarray(values.astype(np.uint16))
        image.save(scenes / f"masks/{k}.png")
    Image.new("RGB", (48, 36), (200, 30, 0)).save(scenes / "masks/0.png")
    code, _, err = vitrail(capfd, "train", "scenes", *TINY, "--out", "run")
    assert code == 0, err
    assert "unknown values, ignored: 1, in 1 of 8 masks, 12.50% of all pixels" in err or (
        "unknown colours, ignored: 1, in 1 of 8 masks, 12.50% of all pixels" in err
    )
    assert "classes in no mask" not in err
    assert "that they say nothing: 1 of 8 masks: masks/0.png" in err


def test_what_other_masks_hold_is_said_when_they_are_measured(scenes, here, capfd):
    (scenes / "classes.txt").write_text("sky\nsea\nship\n")
    assert vitrail(capfd, "train", "scenes", *TINY, "--out", "run")[0] == 0
    mask(scenes / "masks/0.png", [0, 7, 7])
    _, out, err = vitrail(capfd, "evaluate", "run", "--data", "scenes")
    assert "unknown values, ignored: 1, in 1 of 8 masks, 8.33% of all pixels: 7" in out + err


def test_a_damaged_image_is_no_fault_of_its_mask(scenes, capfd):
    file = scenes / "images/7.jpg"
    file.write_bytes(b"damaged")
    code, out, _ = vitrail(capfd, "data", "check", "scenes", "--json")
    found = last_json(out)
    assert code == 3 and [one["key"] for one in found["unreadable"]] == ["images/7.jpg"]
    assert found["masks"] == [] and "masks/7.png" not in out


def test_two_values_in_jpeg_masks_may_have_names(scenes, capfd):
    for k in range(8):
        (scenes / f"masks/{k}.png").unlink()
        mask(scenes / f"masks/{k}.jpg", [0, 255], quality=95)
    for names in ("", "sky\nship\n"):
        if names:
            (scenes / "classes.txt").write_text(names)
        code, out, err = vitrail(capfd, "data", "check", "scenes", "--json")
        assert code == 0, err
        shown = {one["name"] for one in last_json(out)["mask_classes"]}
        assert shown == ({"sky", "ship"} if names else {"0", "255"})


def test_verbs_for_classes_do_not_take_masks_for_one(scenes, capfd):
    code, _, err = vitrail(capfd, "data", "shard", "scenes", "out")
    assert code == 3 and "scenes holds images with masks" in err
    code, _, err = vitrail(capfd, "bench", "compare", "scenes")
    assert code == 2 and "scenes asks for --task segment" in err


def test_a_test_part_that_nothing_is_judged_by_is_left_out(scenes, here, capfd):
    """Cityscapes publishes its test images so; it was found when all was learned."""
    for kind in ("images", "masks"):
        for part in ("train", "val", "test"):
            (scenes / kind / part).mkdir()
        for k in range(8):
            part = ("train", "val", "test")[max(0, k - 5)]
            (file,) = (scenes / kind).glob(f"{k}.*")
            file.rename(scenes / kind / part / file.name)
    (here / "scenes/classes.txt").write_text("sky\nsea\nship\n")
    mask(scenes / "masks/test/7.png", [255])
    code, _, err = vitrail(capfd, "train", "scenes", *TINY, "--out", "run")
    assert code == 0, err
    assert "test: none of its 1 masks has a pixel that counts" in err
    assert vitrail(capfd, "evaluate", "run")[0] == 0
    mask(scenes / "masks/val/6.png", [255])
    code, _, err = vitrail(capfd, "train", "scenes", *TINY, "--out", "other")
    assert code == 3
    assert "validation: none of its 1 masks has a pixel that counts" in err
