"""Training from scratch fits the machine, also a slow or a busy one."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command import vitrail
from vitrail.recipes import RECIPES, Facts


@pytest.mark.parametrize(
    "recipe, rate, side",
    [
        ("scratch", 700e9, 96),  # two cores with AVX-512 BF16
        ("scratch", 150e9, 64),  # two without
        ("demo-scratch", 700e9, 80),
        ("demo-scratch", 150e9, 64),
        ("scratch", 1e9, 64),
    ],
)
def test_images_are_as_large_as_will_be_seen_often_enough(recipe, rate, side):
    few = Facts("photos", 1455, 9, 3, 128, gpu=False, bfloat16=False, rate=rate)
    config = RECIPES[recipe].config(few)
    assert config.model.image_size == (side, side)
    assert (config.optim.name, config.optim.lr) == ("muon", 1e-3)


def test_a_slow_machine_is_told_what_it_gets_and_the_flag_wins(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    looks = sys.modules["vitrail.recipes.facts"]  # a function of the package has the same name
    monkeypatch.setattr(looks, "matrix_rate", lambda *_, **__: 150e9)
    for name in ("dark", "light"):
        Path("photos", name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((90, 90, 3), i, np.uint8)).save(
                Path("photos", name, f"{i}.png")
            )
    _, _, err = vitrail(capfd, "train", "photos", "--help")
    assert "images of 64x64 pixels, not 96x96" in err and "150 GFLOP/s" in err
    assert "--model.image-size" in err
    _, _, err = vitrail(capfd, "train", "photos", "--model.image-size", "96", "96", "--help")
    assert "GFLOP/s" not in err
    # Several processes would measure several rates, and have models of several sizes.
    _, _, err = vitrail(capfd, "train", "photos", "--devices", "2", "--help")
    assert "GFLOP/s" not in err
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, out, err = vitrail(capfd, "train", "photos", "--help")
    assert "GFLOP/s" not in err and "96 96" in out


@pytest.mark.parametrize("own, found", [(None, "1000"), ("PASSIVE", None)])
def test_threads_that_wait_leave_their_core_to_others(monkeypatch, capfd, own, found):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    if own:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    assert vitrail(capfd, "data", "list")[0] == 0
    assert os.environ.get("GOMP_SPINCOUNT") == found
