"""Every flag that a message names is one that can be typed there; in Python it is an argument."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from command import vitrail
from vitrail.data import open_splits
from vitrail.errors import UsageError, setting
from vitrail.models import ViTConfig, build, model_config
from vitrail.weights import to_timm

OBLONG = ViTConfig(depth=12, width=192, heads=3, mlp=768, image_size=(32, 160), classes=2)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Photos in two classes, weights with an oblong table, and a place to be."""
    for name, level in (("dark", 40), ("light", 200)):
        for i in range(6):
            file = tmp_path / "photos" / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((20, 20, 3), level + i, np.uint8)).save(file)
    save_file(to_timm(build(OBLONG).state_dict(), OBLONG), tmp_path / "oblong.safetensors")
    (tmp_path / "half.yaml").write_text("optim: {lr: -1}\ndata: {val_fraction: 3}\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags_of(command: str, capfd) -> set[str]:
    """What `vitrail COMMAND --help` lists, of whatever family the model may be."""
    asked = ["photos", "--model", "vit_s16"] if command == "train" else []
    code, said, err = vitrail(capfd, *command.split(), *asked, "--help")
    assert code == 0, err
    return set(re.findall(r"--[a-z][a-z.-]*[a-z]", said))


FAULTS = {
    "train": [
        "photos --data.val-fraction 0",
        "photos --data.val-fraction 3",
        "photos --config half.yaml",
        "photos --optim.lr -1",
        "photos --optim.clip 0",
        "photos --keep-checkpoints 1",
        "photos --epochs None --minutes None",
        "photos --tune.layer-decay 2",
        "photos --tune.lora-rank 4 --tune.lora-targets",
        "photos --augment.hflip 2",
        "photos --augment.mixup 1 --data.resize pad",
        "photos --model vit_s16 --model.image-size 30 30",
        "photos --model vit_s16 --model.pool class --model.class-token False",
        "photos --model vit_s16 --model.position rope --model.merge 4",
        "photos --model vit_s16 --model.scales adaptive --model.position peg",
        "photos --model vit_mini16 --model.patch 10 10",
        "photos --model.channels 4",
        "photos --model.channels 1 --data.mean 0.4 0.5 0.6",
        "photos --method probe --data.first-size 8 8",
        "photos --method probe --find-lr",
        "photos --distill.kind soft",
        "photos --distill.teacher oblong.safetensors",
        "photos --recipe finetune",
        "photos --out full",
        "photos --device cuda:7",
        "photos --devices 2 --device cuda:0",
        "photos --cluster.gpus 8",
        "photos --restarts 3",
        "photos --weights oblong.safetensors",
        "photos --weights oblong.safetensors --model.image-size 64 64",
        "photos --weights oblong.safetensors --model.image-size 32 160 --model.heads 5",
        "photos --out photos/run",
        "photos --accumulate 100 --epochs 1",
        "hf-stream:photos --epochs 1",
        "photos --data.stream.buffer 5",
    ],
    "weights show": [
        "oblong.safetensors",
        "oblong.safetensors --model.image-size 64 64",
        "oblong.safetensors --model.image-size 32 160 --model.pool map",
    ],
    "weights convert": ["oblong.safetensors out.safetensors --to timm"],
    "bench compare": ["photos --minutes 0", "photos --weights x", "photos --out full"],
    "bench speed": ["vit_s16 --device cuda:7"],
    "data check": ["nothing"],
    "data shard": ["photos photos/shards"],
}


@pytest.mark.parametrize("verb", FAULTS)
def test_every_flag_in_a_message_is_one_of_its_verb(verb, place, capfd):
    known = flags_of(verb, capfd)
    for fault in FAULTS[verb]:
        code, out, err = vitrail(capfd, *verb.split(), *fault.split())
        assert code in (2, 3), f"{fault}: {out}{err}"
        said = " ".join(re.sub("[│╭╮╰╯─]", " ", err).split())
        # A whole command that is to be typed instead has the flags of its own verb.
        said = re.sub(r"vitrail (weights convert|train|weights|data) [^.,;]*", "", said)
        for flag in re.findall(r"--[a-z][a-z.-]*[a-z]", said):
            assert flag in known, f"{fault}: {said}"
        for name in ("image_size", "val_fraction", "_column", "head_init", "first_size"):
            assert name not in said, f"{fault}: {said}"


def test_what_a_message_says_at_the_command_line_works(place, capfd):
    asked = ["weights", "show", "oblong.safetensors", "--json"]
    code, _, err = vitrail(capfd, *asked)
    assert code == 3 and "--model.image-size 64 80 if that was 4x5 patches" in err
    for size in ((64, 80), (32, 160)):
        code, out, err = vitrail(capfd, *asked, "--model.image-size", *size)
        assert code == 0 and f"({size[0]}, {size[1]})" in out, err
    short = ["--epochs", "1", "--evaluations", "1", "--model.image-size", "32", "160"]
    code, out, err = vitrail(
        capfd, "train", "photos", "--weights", "oblong.safetensors", *short, "--out", "run"
    )
    assert code == 0, err
    assert "positions 2x10" in out + err


def test_in_python_a_message_names_arguments(place):
    assert setting("model.image_size", (32, 160)) == "image_size=(32, 160)"
    with pytest.raises(UsageError, match=r"val_fraction is 3: it must"):
        open_splits("photos", seed=0, val_fraction=3)
    with pytest.raises(UsageError, match="pool='class' needs class_token=True; or use pool='mean'"):
        model_config("vit_s16", class_token=False)


def test_after_a_command_messages_are_for_python_again(place, capfd):
    assert vitrail(capfd, "train", "photos", "--optim.lr", "-1")[0] == 2
    with pytest.raises(UsageError, match=r"^val_fraction is 3"):
        open_splits("photos", seed=0, val_fraction=3)
