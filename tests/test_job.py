"""The main job as a caller in Python sees it."""

import numpy as np
import pytest
import torch
from PIL import Image

import command
import vitrail
from vitrail.data.views.augment import AugmentConfig
from vitrail.errors import UsageError
from vitrail.models import ViTConfig
from vitrail.runs import DataConfig, TrainConfig
from vitrail.weights import load

MODEL = ViTConfig(depth=1, width=16, heads=2, mlp=16, patch=(8, 8), image_size=(16, 16), classes=2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(16):
        file = folder / ("dark", "light")[i % 2] / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 120, (16, 16, 3)) + 120 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    return folder


def config(photos, **changes) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(path=str(photos), batch_size=4, workers=1),
        model=MODEL,
        augment=AugmentConfig.off(),
        epochs=1,
        evaluations=1,
        **changes,
    )


def state() -> tuple:
    drawn = torch.get_rng_state()
    return torch.get_num_threads(), drawn.numpy().tobytes()


def test_a_job_leaves_the_process_as_it_found_it(photos, tmp_path):
    before = state()
    torch_default = torch.get_default_dtype(), torch.is_grad_enabled()
    vitrail.train(config(photos, threads=1, seed=7), tmp_path / "run")
    assert state() == before
    vitrail.evaluate(tmp_path / "run")
    vitrail.Predictor(tmp_path / "run")(photos / "dark" / "0.png")
    with pytest.raises(UsageError):  # nor does one that fails
        vitrail.train(config(photos, threads=1, accumulate=100), tmp_path / "other")
    assert state() == before
    assert (torch.get_default_dtype(), torch.is_grad_enabled()) == torch_default


@pytest.mark.parametrize("flags", [[], ["--micro-batch", "auto"], ["--plan"], ["--find-lr"]])
def test_weights_are_read_once_a_command(flags, photos, tmp_path, monkeypatch, capfd):
    file, read, real = tmp_path / "weights.safetensors", [], load.read_weights
    load.save_weights(file, MODEL, vitrail.build(MODEL).state_dict())
    monkeypatch.setattr(load, "read_weights", lambda *args: read.append(args) or real(*args))
    more = ["--minutes", "None", "--epochs", 1, "--data.batch-size", 4, *flags]
    more += ["--out", tmp_path / "run", "--tune.layer-decay", 1, "--threads", 1]
    code, _, said = command.vitrail(capfd, "train", photos, "--weights", file, *more)
    assert code == 0 and len(read) == 1, said


def test_held_out_images_are_measured_once_at_the_end(photos, tmp_path, monkeypatch):
    from vitrail.tasks import Classify

    measured = []
    measure = Classify.measure

    def counting(self, batch):
        measured.append(len(batch.indices))
        return measure(self, batch)

    monkeypatch.setattr(Classify, "measure", counting)
    outcome = vitrail.train(config(photos), tmp_path / "run")
    assert sum(measured) == outcome.evaluation.metrics.images == 4
    # Measured anew, the numbers are the same.
    again = vitrail.evaluate(tmp_path / "run")
    assert again.metrics == outcome.evaluation.metrics and sum(measured) == 8
    rows = outcome.evaluation.rows
    assert all(torch.equal(rows[name], again.rows[name]) for name in rows)
