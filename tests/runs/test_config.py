from dataclasses import replace

import pytest

from vitrail.errors import DataError, UsageError
from vitrail.models import model_config
from vitrail.runs import DataConfig, TrainConfig
from vitrail.runs.config import from_dict, read_changes, to_dict, with_changes, write_yaml

CONFIG = TrainConfig(data=DataConfig(path="photos"), model=model_config("vit_s16"), minutes=4)


def changed(tmp_path, text: str) -> TrainConfig:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return with_changes(CONFIG, read_changes(file), "run.yaml")


def test_the_articles_yaml_runs_as_it_stands(tmp_path):
    config = changed(
        tmp_path,
        'train: {batch_size: 512, precision: "bf16", gradient_clipping: 1.0, '
        "optimizer: {name: adamw, lr: 3e-4, weight_decay: 0.05}}",
    )
    assert config.data.batch_size == 512
    assert config.precision == "bfloat16"
    assert config.optim.clip == 1.0
    assert config.optim.lr == 3e-4 and config.optim.weight_decay == 0.05


def test_a_config_is_the_same_after_a_file(tmp_path):
    config = replace(CONFIG, model=model_config("deit3_s16", image_size=(96, 160)), epochs=2.5)
    assert from_dict(to_dict(config), "x") == config
    assert changed(tmp_path, write_yaml(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"unknown field in run.yaml: 'epoch': did you mean 'epochs'"),
        ("optim: {learning_rat: 1}", "learning_rat"),
        ("optim: {lr: quick}", r"optim.lr: .*number"),
        ("epochs: -1", "epochs must be positive"),
        ("data: {batch_size: 0}", "batch_size must be at least 1"),
        ("precision: float8", r"precision: .*'float32' or 'bfloat16'"),
        ("model: {heads: 5}", "not divisible by 5 heads"),
        ("augment: {mixup: -1}", "mixup"),
        ("model: {width: 3.5}", r"model.*width"),
        ("optim: {schedule: step}", "schedule"),
        ("minutes: .nan", "minutes must be a finite number, not nan"),
        ("epochs: .inf", "epochs must be a finite number"),
        ("optim: {lr: .nan}", "optim.lr must be a finite number"),
        ("data: {mean: [.nan]}", "data.mean must be a finite number"),
        ("optim: {clip: -1}", "clip must be above 0"),
        ("optim: {weight_decay: -1}", "weight_decay cannot be negative"),
        ("threads: 0", "threads must be at least 1"),
        ("patience: 0", "patience must be at least 1"),
        ("profile: -1", "profile is a number of steps"),
        ("seed: 99999999999999999999", "seed must fit into 64 bits"),
        ("data: {train_size: [0, 0]}", "size"),
    ],
)
def test_a_wrong_value_gets_one_message_that_names_it(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        changed(tmp_path, text)


@pytest.mark.parametrize("text", ["{", "- a\n- b", "x: !!python/object/apply:os.system [echo]"])
def test_what_is_no_plain_yaml_mapping_is_refused(tmp_path, text):
    with pytest.raises(DataError, match=r"run\.yaml"):
        changed(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no\.yaml: No such file"):
        read_changes(tmp_path / "no.yaml")


def test_a_run_needs_a_length():
    with pytest.raises(UsageError, match="epochs or minutes"):
        replace(CONFIG, minutes=None)


def test_training_crops_may_have_another_size_than_evaluation_shows():
    config = with_changes(CONFIG, {"data.train_size": [48, 64]}, "here")
    assert config.train_preprocess().size == (48, 64)
    assert config.preprocess() == CONFIG.preprocess() == CONFIG.train_preprocess()
    with pytest.raises(UsageError, match="cannot be cut into patches"):
        with_changes(CONFIG, {"data.train_size": [48, 65]}, "here")


def test_training_images_may_grow_from_a_first_size():
    config = with_changes(CONFIG, {"data.train_size": [48, 64], "data.first_size": [32, 48]}, "")
    assert config.train_sizes() == ((32, 48), (48, 64)) and CONFIG.train_sizes() == ((224, 224),)
    with pytest.raises(UsageError, match="first_size 240x48 must be within 224x224"):
        with_changes(CONFIG, {"data.first_size": [240, 48]}, "")
    with pytest.raises(UsageError, match="images of one size"):
        with_changes(CONFIG, {"data.first_size": [48, 48], "data.resize": "native"}, "")


def test_training_images_may_change_their_size():
    config = with_changes(CONFIG, {"data.multiscale": [0.75, 1.25]}, "")
    sizes = config.train_sizes()
    assert sizes[0] == (176, 176) and sizes[-1] == (272, 272) and len(sizes) == 7
    changes = {"data.multiscale": [0.5, 1.0], "data.train_size": [48, 96]}
    assert with_changes(CONFIG, changes, "").train_sizes() == ((32, 64), (48, 96))
    for change, says in (
        ({"data.multiscale": [1.25, 0.75]}, "least < greatest"),
        ({"data.multiscale": [0.01, 1.0]}, "0.1 <= least"),
        ({"data.multiscale": [1.0, 1.01]}, "no two"),
        ({"data.multiscale": [0.5, 1.0], "data.first_size": [48, 48]}, "follow data.first_size"),
        ({"data.multiscale": [0.5, 1.0], "data.resize": "native"}, "images of one size"),
        ({"data.multiscale": [0.5, 1.0], "task": "segment"}, "cannot follow data.multiscale"),
    ):
        with pytest.raises(UsageError, match=says):
            with_changes(CONFIG, change, "")
