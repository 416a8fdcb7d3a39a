"""What the recipe of detection makes of data: views, tiles, and what of a model learns."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vitrail.cli.defaults import defaults
from vitrail.data.views.preprocess import Preprocess
from vitrail.data.views.scaled import window
from vitrail.errors import UsageError
from vitrail.heads.deformable import QueryBoxesConfig
from vitrail.heads.detector import Detector, build_detector
from vitrail.models import build, model_config
from vitrail.recipes import RECIPES, Facts
from vitrail.runs import TrainConfig, TuneConfig
from vitrail.tasks import DetectConfig
from vitrail.training.tune import Tuning, prepare
from vitrail.weights import Opened

PHOTOS = Facts("photos", 1000, 3, 3, 720, gpu=False, bfloat16=False, aspect=720 / 1280)


def chosen(changes: dict[str, Any], **start: Any) -> TrainConfig:
    """The recipe's config of oblong photographs, and from a ViT's weights if its fields are
    given.
    """
    if start:
        model = model_config("vit_s16", classes=0, **start)
        opened = Opened("vit_s16", "", "vitrail", model, {}, None, (), (), ())
        changes = changes | {"start": opened}
    return RECIPES["detect"].config(PHOTOS._replace(**changes))


def of_objects(pixels: float) -> dict[str, Any]:
    return {"object_side": pixels, "object_share": pixels / 1280}


@pytest.mark.parametrize(
    ("pixels", "size", "tile"),
    [
        (200, (176, 304), None),  # 19.2 tokens of 16 pixels: the objects have 48
        (600, (144, 256), None),  # no fewer than 16 tokens
        (100, (224, 384), None),  # no more than 24: the objects have 30
        (60, (384, 384), 480),  # 18 pixels would be too few
        (10, (384, 384), 192),  # enlarged twice, and no more
    ],
)
def test_a_view_has_the_images_shape_and_is_as_large_as_objects_need(
    pixels: float, size: tuple[int, int], tile: int | None
) -> None:
    config = chosen(of_objects(pixels))
    assert config.model.image_size == size
    assert (config.data.resize, config.data.tile) == ("tiles" if tile else "letterbox", tile)


def test_upright_images_have_upright_views_and_mixed_ones_square_ones() -> None:
    assert chosen(of_objects(200) | {"aspect": 16 / 9}).model.image_size == (304, 176)
    assert chosen(of_objects(200) | {"aspect": 1.0}).model.image_size == (304, 304)
    assert chosen(of_objects(200) | {"gpu": True}).model.image_size == (368, 640)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("pixels", [60, 130, 200])
def test_views_are_whole_patches_and_windows_of_any_vit(gpu: bool, pixels: float) -> None:
    two = chosen({"gpu": gpu} | of_objects(pixels), scales="hierarchical", image_size=(224, 224))
    assert all(side % 32 == 0 for side in two.model.image_size)
    changes = {"window": (14, 14), "global_blocks": (11,), "indivisible": "pad"}
    windows = chosen({"gpu": gpu} | of_objects(pixels), image_size=(224, 224), **changes)
    assert all(side % (14 * 16) == 0 for side in windows.model.image_size)


def test_on_a_cpu_the_first_half_of_published_blocks_stays() -> None:
    assert chosen(of_objects(200), image_size=(224, 224)).tune.last_blocks == 6
    assert chosen(of_objects(200) | {"gpu": True}, image_size=(224, 224)).tune.last_blocks is None
    assert chosen(of_objects(200)).tune.last_blocks is None  # nothing is published of these


def test_an_oblong_image_is_learned_from_as_large_as_it_is_judged() -> None:
    judged = Preprocess(size=(336, 336), resize="letterbox")
    image = 720, 1280
    left, top, right, bottom = window(
        image, judged.size, (1.0, 1.0), np.full(3, 0.5), judged.zoom(*image)
    )
    assert right - left == pytest.approx(1280) and bottom - top > 720
    start, end = judged.seen(*image).there(np.array([[0.0, 0.0], [1.0, 1.0]]))
    assert (end - start)[0] / 1280 == pytest.approx(judged.zoom(*image))
    # What covers its view is cut, as before.
    crop = replace(judged, resize="squash")
    assert crop.zoom(*image) == pytest.approx(336 / 720)


@pytest.mark.parametrize("size", [(280, 280), (100, 120), (280, 60), (1, 1)])
def test_a_tile_that_an_image_does_not_fill_is_not_enlarged_more(size: tuple[int, int]) -> None:
    whole = Preprocess(size=(336, 336), resize="tiles", tile=280)
    tile = replace(whole, resize="letterbox")
    assert tile.zoom(*size) == pytest.approx(1.2)
    shown, judged = (each.seen(*size).there(np.array([[1.0, 1.0]]))[0] for each in (tile, whole))
    assert abs(shown - judged).max() <= 1  # a fraction of a pixel is dropped, or rounded


def test_options_that_boxes_cannot_follow_are_refused() -> None:
    config = chosen(of_objects(200))
    with pytest.raises(UsageError, match=r"tile=280.*add resize='tiles'"):
        replace(config, data=replace(config.data, tile=280))
    with pytest.raises(UsageError, match="judged whole"):
        replace(config, data=replace(config.data, crop=0.875))
    with pytest.raises(UsageError, match="3 maps of its own"):
        build_detector(build("resnet18", num_classes=0), replace(config.detect, levels=2), 2)


def test_whoever_wants_whole_images_need_not_know_of_tiles(tmp_path, monkeypatch) -> None:
    small = PHOTOS._replace(**of_objects(20))
    monkeypatch.setattr("vitrail.cli.defaults._facts", lambda *args: small)
    monkeypatch.setattr("vitrail.cli.defaults._opened", lambda *args: None)
    words = [str(tmp_path), "--task", "detect"]
    assert defaults(words).settings.data.tile == 192
    whole = defaults([*words, "--data.resize", "letterbox"]).settings.data
    assert replace(whole, resize="letterbox").tile is None


def test_the_pyramid_is_new_and_learns_as_the_head_does() -> None:
    def detector() -> Detector:
        return build_detector(build("vit_nano8", num_classes=0), DetectConfig(levels=2), 2)

    model = detector()
    prepare(model, TuneConfig(lora_rank=2))
    learns = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".")[0] for name in learns} == {"backbone", "neck", "head"}
    assert all("lora" in name for name in learns if name.startswith("backbone."))
    task = nn.Module()
    task.model = detector()
    tuning = Tuning(task, TuneConfig(head_lr=3.0))  # type: ignore[arg-type]
    assert {tuning.scale(f"{part}.x") for part in ("neck", "head")} == {3.0}


def test_of_blocks_that_no_query_reads_nothing_learns() -> None:
    """Processes that wait for each other's gradients would wait for theirs for ever."""
    sizes = {"width": 32, "heads": 2, "cross_heads": 2, "queries": 4, "groups": 1, "mlp": 32}
    query = QueryBoxesConfig(**sizes, taps=(0, 1))
    backbone = build("vit_nano8", num_classes=0, depth=4)
    model = build_detector(backbone, DetectConfig(head="queries", query=query), 2)
    said = model.predictions(torch.randn(2, 3, 64, 64))  # type: ignore[operator]
    sum(part.float().square().sum() for one in said for part in one if part is not None).backward()
    waits = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not waits
    assert "backbone.encoder.blocks.1.mlp.fc1.weight" in dict(model.named_parameters())
