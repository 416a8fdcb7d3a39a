"""The command line as a user meets it, on a small folder of real image files."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command import last_json, vitrail
from vitrail.cli import VERBS, main
from vitrail.data import FORMATS
from vitrail.data.views.preprocess import Preprocess
from vitrail.runs import Run

TINY = [
    "--model.depth",
    "1",
    "--model.width",
    "32",
    "--model.heads",
    "2",
    "--model.mlp",
    "64",
    "--model.patch",
    "8",
    "8",
]
TINY += [
    "--model.image-size",
    "32",
    "32",
    "--model.stem",
    "patch",
    "--data.batch-size",
    "8",
    "--epochs",
    "1",
]


def picture(file: Path, colour: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 90, (80, 100, 3), dtype=np.uint8)
    pixels[..., colour] += 160
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for colour, name in enumerate(("red", "green", "blue")):
        for i in range(10):
            picture(tmp_path / "photos" / name / f"{i}.png", colour, i)
    return tmp_path / "photos"


def tree(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_main_job_from_photos_to_predictions(photos, capfd):
    before = tree(photos)
    code, out, err = vitrail(capfd, "train", "photos/", *TINY, "--out", "runs/x", "--json")
    assert code == 0, err
    result = last_json(out)
    assert result["run"] == "runs/x" and Path(result["checkpoint"]).is_dir()
    assert 0 <= result["metrics"]["top1"] <= 1 and result["seconds"] > 0
    assert Path("runs/x/report.html").stat().st_size > 10_000
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "predictions.csv"):
        assert Path("runs/x", name).is_file(), name
    assert "held-out accuracy" in err

    code, out, _ = vitrail(capfd, "evaluate", "runs/x", "--json")
    assert code == 0 and last_json(out)["metrics"] == result["metrics"]

    code, out, _ = vitrail(capfd, "predict", "runs/x", "photos/red/1.png", "photos/blue", "--json")
    assert code == 0
    rows = last_json(out)["predictions"]
    assert len(rows) == 11 and rows[0]["label"] in ("red", "green", "blue")
    assert tree(photos) == before

    code, _, err = vitrail(capfd, "train", "photos/", *TINY, "--out", "runs/x")
    assert code == 2 and "not empty" in err and "--resume" in err
    code, out, err = vitrail(capfd, "train", "--resume", "runs/x", "--epochs", "2", "--json")
    assert code == 0 and last_json(out)["run"] == "runs/x", err
    code, _, err = vitrail(capfd, "train", "--resume", "runs/x", "--optim.lr", "0.5")
    assert code == 2 and "--optim.lr was" in err


@pytest.mark.parametrize(
    ("stem", "resize"),
    [
        ("patch", "pad"),
        ("conv", "native"),
        pytest.param("patch", "native", marks=pytest.mark.slow),
        pytest.param("conv", "pad", marks=pytest.mark.slow),
    ],
)
def test_oblong_photos_keep_their_shape(photos, capfd, resize, stem):
    for i in range(10):  # beside those of 80 x 100 pixels
        wide = np.full((30, 120, 3), (20 * i, 200, 90), np.uint8)
        Image.fromarray(wide).save(photos / "green" / f"wide-{i}.png")
        Image.fromarray(wide.transpose(1, 0, 2).copy()).save(photos / "blue" / f"tall-{i}.png")
    tiny = list(TINY)
    tiny[tiny.index("--model.stem") + 1] = stem
    tiny += ["--precision", "float32"]  # in which an image alone is what it is in a batch
    train = ["train", photos, *tiny, "--data.resize", resize, "--out", "r"]
    code, _, err = vitrail(capfd, *train, "--augment.mixup", "0.2")
    assert code == 2 and "switch them off" in err and not Path("r").exists()
    code, _, err = vitrail(capfd, *train)
    assert code == 0, err
    assert "keeps its shape" in Path("r/report.html").read_text()

    report = Path("r/metrics.json").read_bytes(), Path("r/report.html").read_bytes()
    code, out, err = vitrail(capfd, "evaluate", "r", "--tta", "flip+scales", "--json")
    assert code == 0 and 0 <= last_json(out)["metrics"]["top1"] <= 1, err
    assert "evaluate r --tta flip+scales" in Path("r/report-tta-flip+scales.html").read_text()
    assert report == (Path("r/metrics.json").read_bytes(), Path("r/report.html").read_bytes())
    code, out, _ = vitrail(capfd, "predict", "r", photos / "green", "--tta", "flip", "--json")
    assert code == 0 and len(last_json(out)["predictions"]) == 20
    code, _, err = vitrail(capfd, "predict", "r", photos / "green", "--tta", "flop")
    assert code == 2 and "did you mean 'flip'" in err
    from vitrail.deploy import Predictor

    predictor, files = Predictor("r", tta="scales"), sorted((photos / "green").iterdir())
    for file, together in zip(files, predictor.many(files), strict=True):
        assert predictor(file).probability == pytest.approx(together.probability, rel=1e-5)


def test_without_out_a_run_gets_the_next_free_name(photos, capfd):
    for number in (1, 2):
        code, out, err = vitrail(capfd, "train", photos, *TINY, "--json")
        assert code == 0, err
        assert last_json(out)["run"] == f"runs/photos-{number}"


def test_a_yaml_file_and_flags_that_win(photos, capfd):
    Path("run.yaml").write_text(
        'train: {batch_size: 6, precision: "bf16", gradient_clipping: 1.0, '
        "optimizer: {name: adamw, lr: 3e-4, weight_decay: 0.05}}"
    )
    args = ["train", photos, *TINY, "--config", "run.yaml", "--out", "r", "--optim.lr", "1e-4"]
    assert vitrail(capfd, *args)[0] == 0
    from vitrail.runs import Run

    config = Run("r").config()
    assert config.optim.lr == 1e-4 and config.optim.weight_decay == 0.05
    assert config.precision == "bfloat16" and config.data.batch_size == 8


def test_several_labels_an_image(photos, capfd):
    rows = [
        f"photos/{c}/{i}.png,{c}{'|warm' * (c == 'red')}"
        for c in ("red", "blue")
        for i in range(10)
    ]
    Path("labels.csv").write_text("file,label\n" + "\n".join(rows))
    code, out, err = vitrail(capfd, "train", "labels.csv", *TINY, "--json")
    assert code == 0, err
    assert "map" in last_json(out)["metrics"]


def test_the_column_that_a_message_asks_for_is_named_alike_in_every_verb(photos, capfd):
    rows = [f"photos/{c}/{i}.png  {i % 2}.0  {c}" for c in ("red", "blue") for i in range(4)]
    Path("list.txt").write_text("\n".join(rows))
    named = ("--data.label-column", "3")
    for verb in (("data", "check", "list.txt"), ("train", "list.txt"), ("doctor", "list.txt")):
        _, out, err = vitrail(capfd, *verb)
        assert " ".join(named) in " ".join((out + err).split()), verb
    assert vitrail(capfd, "data", "check", "list.txt", *named)[0] == 0
    assert vitrail(capfd, "data", "check", "list.txt", "--label-column", "3")[0] == 0
    assert vitrail(capfd, "data", "shard", "list.txt", "shards", *named)[0] == 0
    assert "2 classes" in vitrail(capfd, "doctor", "list.txt", *named)[1]
    code, out, err = vitrail(capfd, "train", "list.txt", *named, *TINY, "--out", "r")
    assert code == 0, err
    assert "list.txt, which has no header" in out + err
    assert vitrail(capfd, "evaluate", "r", "--data", "list.txt")[0] == 0
    Path("other.csv").write_text("file,x,y\nphotos/red/0.png,red,blue\n")
    assert "--data.label-column" in vitrail(capfd, "evaluate", "r", "--data", "other.csv")[2]
    assert vitrail(capfd, "evaluate", "r", "--data", "other.csv", "--label-column", "x")[0] == 0


def test_npz_with_a_test_part(photos, capfd):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 40), ("val", 10), ("test", 12)):
        arrays[f"{part}_images"] = rng.integers(0, 255, (n, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(n) % 2)[:, None]
    np.savez("med.npz", **arrays)
    tiny = [
        *TINY[:8],
        "--model.image-size",
        "28",
        "28",
        "--model.patch",
        "7",
        "7",
        "--model.stem",
        "patch",
        "--epochs",
        "1",
    ]
    code, _out, err = vitrail(capfd, "train", "med.npz", *tiny, "--out", "m", "--json")
    assert code == 0, err
    assert len(Path("m/predictions.csv").read_text().splitlines()) == 1 + 12


def bad_no_folder(photos):
    return ["train", "photo"], 3, "did you mean photos"


def bad_no_images(photos):
    Path("empty/a").mkdir(parents=True)
    return ["train", "empty"], 3, "image"


def bad_one_class(photos):
    picture(Path("one/cat/1.png"), 0, 0)
    picture(Path("one/cat/2.png"), 0, 1)
    return ["train", "one"], 3, "only one class, 'cat'"


def bad_lonely(photos):
    picture(photos / "pink" / "1.png", 0, 0)
    return ["train", "photos"], 3, "pink"


def bad_files(photos):
    (photos / "red" / "0.png").write_bytes(b"")
    (photos / "red" / "1.png").write_text("<html>")
    whole = (photos / "blue" / "1.png").read_bytes()
    (photos / "blue" / "1.png").write_bytes(whole[:500])
    return ["train", "photos", *TINY], 3, "cannot be read"


def bad_column(photos):
    Path("x.csv").write_text("picture,kind,day\nphotos/red/1.png,a,1\nphotos/blue/1.png,b,1\n")
    return ["train", "x.csv"], 3, "--data.label-column"


def bad_unseen(photos):
    for part, label in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "c")):
        for i in range(3):
            picture(Path("parts", part, label, f"{i}.png"), 0, i)
    return ["train", "parts"], 3, "unseen in training"


def bad_model(photos):
    return ["train", "photos", "--model", "vit_b_16"], 2, "did you mean 'vit_b16'"


def bad_recipe(photos):
    return ["train", "photos", "--recipe", "scrath"], 2, "did you mean 'scratch'"


def bad_key(photos):
    Path("run.yaml").write_text("epoch: 3")
    return ["train", "photos", "--config", "run.yaml"], 2, "did you mean 'epochs'"


def bad_flag(photos):
    return ["train", "photos", "--optim.lrate", "3"], 2, "--optim.lr"


def bad_rate(photos):
    wild = ["--optim.lr", "1e9", "--optim.warmup", "0", "--optim.clip", "None", "--epochs", "40"]
    return ["train", "photos", *TINY[:-2], *wild], 3, "no longer a number at step"


def bad_device(photos):
    return ["train", "photos", *TINY, "--device", "cuda:9"], 3, "no device 'cuda:9'"


def bad_size(photos):
    return ["train", "photos", "--model.image-size", "100", "96"], 2, "cannot be cut into patches"


def bad_no_data(photos):
    return ["train", "--epochs", "3"], 2, "DATA comes first"


def bad_place(photos):
    return ["train", "photos", *TINY, "--out", "photos/runs/x"], 2, "lies within the data"


def bad_restarts(photos):
    return ["train", "photos", *TINY, "--restarts", "2"], 2, "goes with --devices"


def bad_threads(photos):
    return ["train", "photos", *TINY, "--threads", "-3"], 2, "threads must be at least 1"


def bad_resume(photos):
    return ["train", "--resume"], 2, "--resume RUN"


def bad_verb(photos):
    return ["trian"], 2, "did you mean 'train'"


def bad_run(photos):
    return ["evaluate", "photos"], 3, "config.yaml"


def bad_image(photos):
    return ["data", "check", "nothing.csv"], 3, "nothing.csv"


BAD = [value for name, value in sorted(globals().items()) if name.startswith("bad_")]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.__name__[4:])
def test_bad_input_gets_one_message_and_its_exit_code(photos, capfd, case):
    args, expected, message = case(photos)
    before = tree(photos)
    code, out, err = vitrail(capfd, *args)
    assert code == expected, err
    assert message in err and "Traceback" not in err + out
    assert tree(photos) == before
    runs = Path("runs")
    assert case in (bad_files, bad_rate) or not runs.exists()  # these are found while it trains


def test_a_damaged_image_among_many_is_listed_and_training_goes_on(photos, capfd):
    (photos / "red" / "0.png").write_bytes(b"\x89PNG\r\n")
    args = ["train", photos, *TINY, "--data.max-unreadable", "0.1", "--out", "r"]
    code, out, err = vitrail(capfd, *args)
    assert code == 0, err
    assert "red/0.png" in Path("r/skipped.csv").read_text()
    assert "1 images unreadable" in out and "red/0.png" in Path("r/report.html").read_text()


def test_checking_data_names_what_is_wrong(photos, capfd):
    (photos / "red" / "0.png").write_bytes(b"")
    twin = (photos / "blue" / "1.png").read_bytes()
    (photos / "green" / "twin.png").write_bytes(twin)
    code, out, _ = vitrail(capfd, "data", "check", photos, "--json")
    result = last_json(out)
    assert code == 3 and [row["key"] for row in result["unreadable"]] == ["red/0.png"]
    assert result["conflicts"] == [["blue/1.png", "green/twin.png"]]
    assert "red/0.png" in out


@pytest.mark.skipif("HEIF" in FORMATS, reason="a plug-in for HEIC is installed")
def test_every_verb_has_one_rule_for_what_a_folder_holds(photos, capfd):
    """predict took what training leaves out, and nobody said a word of HEIC."""
    (photos / "red" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    (photos / "red" / "._0.png").write_bytes(b"of a Mac")
    (photos / "red" / "10.jpg_large").write_bytes((photos / "red" / "1.png").read_bytes())
    shutil.copytree(photos / "blue", photos / ".Trashes" / "blue")
    (photos / "red" / "far").symlink_to(photos.parent)
    code, out, _ = vitrail(capfd, "data", "check", photos, "--json")
    told = last_json(out)
    assert (code, told["images"], told["parts"]) == (0, 31, {"train": 31})
    counts = {one["kind"]: one["count"] for one in told["left_out"]}
    links = "symbolic links to folders elsewhere"
    assert counts == {"HEIC images": 1, "hidden and system files": 2, links: 1}
    assert all(one["reason"] for one in told["left_out"])
    assert "every image can be read" not in out and "every image that is used can be read" in out
    sentence = "left out: HEIC images, 1 (readable after pip install pillow-heif): red/IMG_1.HEIC"
    assert sentence in out
    _, _, err = vitrail(capfd, "train", photos, *TINY, "--out", "r")
    assert sentence in re.sub(r"\s+", " ", err)
    _, out, _ = vitrail(capfd, "predict", "r", photos, "--json")
    predicted = last_json(out)
    assert len(predicted["predictions"]) == 31 and sentence in out
    assert predicted["left_out"] == told["left_out"]
    for verb in (["evaluate", "r", "--data"], ["doctor"], ["data", "shard"]):
        _, out, _ = vitrail(capfd, *verb, photos, *(["out"] if "shard" in verb else []))
        assert sentence in re.sub(r"\s+", " ", out), verb


def test_parts_that_are_not_certain_are_asked_for_and_settled_by_a_flag(photos, capfd):
    for site in ("siteA", "siteB"):
        shutil.copytree(photos, f"sites/{site}")
    shutil.rmtree("sites/siteB/red/")
    for verb in (["train"], ["data", "check"], ["bench", "compare"]):
        code, _, err = vitrail(capfd, *verb, "sites")
        assert code == 2 and "--data.parts train=siteA,test=siteB" in err, verb
    parts = ("--data.parts", "train=siteA,test=siteB")
    code, out, _ = vitrail(capfd, "data", "check", "sites", *parts, "--json")
    assert code == 0 and last_json(out)["parts"] == {"train": 30, "test": 20}
    assert vitrail(capfd, "train", "sites", *TINY, *parts, "--out", "r")[0] == 0
    assert "siteA/red/0.png" in Path("r/split.csv").read_text()
    assert Run("r").config().data.parts == parts[1]
    code, out, _ = vitrail(capfd, "evaluate", "r")
    assert code == 0 and "of 20 held-out images" in out
    code, _, err = vitrail(capfd, "evaluate", "r", "--data", "sites")
    assert code == 2 and "--data.parts" in err
    assert vitrail(capfd, "evaluate", "r", "--data", "sites", *parts)[0] == 0


def test_predicting_a_damaged_image_does_not_stop_the_others(photos, capfd):
    assert vitrail(capfd, "train", photos, *TINY, "--out", "r")[0] == 0
    (photos / "red" / "0.png").write_bytes(b"")
    code, out, _ = vitrail(capfd, "predict", "r", photos / "red", "--json")
    rows = last_json(out)["predictions"]
    assert code == 3 and "error" in rows[0] and all("label" in row for row in rows[1:])
    code, _, err = vitrail(capfd, "predict", "r", "no.jpg")
    assert code == 3 and "no such image: no.jpg" in err


def test_an_interrupted_run_says_how_to_go_on(photos):
    command = [
        sys.executable,
        "-m",
        "vitrail",
        "train",
        str(photos),
        *TINY[:-2],
        "--epochs",
        "9999",
    ]
    process = subprocess.Popen([*command, "--out", "r"], stderr=subprocess.PIPE, text=True)
    metrics = Path("r/metrics.jsonl")
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > 500):
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "vitrail train --resume r" in err


def test_models_can_be_listed_and_shown(capfd):
    code, out, _ = vitrail(capfd, "models", "--json")
    rows = {row["name"]: row for row in last_json(out)["models"]}
    assert code == 0 and rows["vit_b16"]["parameters"] == 86_567_656 and "86,567,656" in out
    code, out, _ = vitrail(capfd, "models", "vit_s16", "--json")
    assert code == 0 and last_json(out)["config"]["width"] == 384


def test_help_is_quick_and_does_without_torch():
    code = "import sys, vitrail.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict", "models", "data"])
def test_every_verb_has_help(verb, capfd):
    code, out, _ = vitrail(capfd, verb, "--help")
    assert code == 0 and f"vitrail {verb}" in out


def test_an_error_is_json_too(capfd):
    code, out, err = vitrail(capfd, "evaluate", "nowhere", "--json")
    assert code == 3 and last_json(out)["exit_code"] == 3 and "nowhere" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "asked, code, said",
    [
        ("data list >/dev/full", 3, "cannot write: No space left on device"),
        ("data list >&-", 0, ""),
        ("data list 2>&-", 0, ""),
        ("data list | true", 0, ""),
        ("data check $(printf 'nothing\\303\\251')", 3, "no such file or folder"),
    ],
)
def test_standard_streams_that_are_full_closed_or_of_another_tongue(tmp_path, asked, code, said):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m vitrail {asked}"],
        cwd=tmp_path, env=os.environ | plain, capture_output=True,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert said in done.stderr.decode() and b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_the_module_runs_like_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "vitrail", "--version"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""},
    )
    assert done.stdout.startswith("vitrail 0.")


def test_weights_are_shown_and_converted(tmp_path, capsys):
    from vitrail.models import build, model_config
    from vitrail.weights import save_weights

    config = model_config("vit_ti16", depth=12, image_size=(32, 32), classes=3)
    file, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_weights(file, config, build(config).state_dict())
    assert main(["weights", "convert", str(file), str(out), "--to", "timm", "--json"]) == 0
    assert main(["weights", "show", str(out), "--model", "deit_ti16", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["layout"] == "timm" and shown["config"]["heads"] == 3
    assert "positions: 2x2 resampled to 14x14, bicubic_antialias" in shown["into"]
    assert main(["weights", "show", str(out), "--model", "vit_b16"]) == 3
    said = capsys.readouterr().err
    assert "width 192 there and 768 here" in said and "It fits 'vit_ti16', 'deit_ti16'" in said
    assert main(["weights", "convert", str(file), str(out), "--to", "timm"]) != 0


def test_weights_that_do_not_fit_the_named_model_stop_a_run_before_it_begins(
    photos, tmp_path, capsys
):
    from vitrail.models import build, model_config
    from vitrail.weights import save_weights

    config = model_config("vit_ti16", depth=2, image_size=(32, 32), classes=3)
    file, out = tmp_path / "a.safetensors", tmp_path / "run"
    save_weights(file, config, build(config).state_dict())
    asked = ["train", str(photos), "--weights", str(file), "--out", str(out)]
    assert main([*asked, "--model", "vit_ti16"]) == 3
    assert "depth 2 there and 12 here" in capsys.readouterr().err and not out.exists()
    assert main([*asked, "--recipe", "nothing"]) == 2


def test_fine_tuning_from_a_file_and_then_from_that_run(photos, tmp_path, capsys):
    from vitrail.models import build, model_config
    from vitrail.weights import save_weights

    config = model_config("vit_ti16", depth=2, image_size=(32, 32), classes=3)
    file, first, second = tmp_path / "a.safetensors", tmp_path / "one", tmp_path / "two"
    save_weights(file, config, build(config).state_dict())
    short = ["--minutes", "0.005", "--evaluations", "1", "--model.image-size", "32", "48"]
    assert main(["train", str(photos), "--weights", str(file), "--out", str(first), *short]) == 0
    said = json.loads((first / "weights.json").read_text())
    assert said["source"] == str(file) and len(said["sha256"]) == 64
    assert "positions: 2x2 resampled to 2x3, bicubic_antialias" in said["notes"]
    assert main(["train", str(photos), "--weights", str(first), "--out", str(second), *short]) == 0
    said = json.loads((second / "weights.json").read_text())
    assert said["new"] == [], "the same classes keep the head"
    assert "head: kept, its 3 classes are those of the data" in said["notes"]
    capsys.readouterr()


def test_grey_models_of_colour_weights_are_trained_and_it_is_said_how(photos, tmp_path, capsys):
    from vitrail.models import build, model_config
    from vitrail.weights import save_weights

    config = model_config("vit_ti16", depth=2, image_size=(32, 32), classes=3)
    shown = Preprocess(size=(32, 32), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    file = tmp_path / "colour.safetensors"
    save_weights(file, config, build(config).state_dict(), shown)
    short = ["--epochs", "1", "--evaluations", "1", "--model.image-size", "32", "32"]
    asked = ["train", str(photos), "--weights", str(file), *short]
    assert main([*asked, "--model.channels", "1", "--out", "grey"]) == 0
    assert "for greys normalised by mean 0.449 and deviation 0.226" in capsys.readouterr().err
    kept = Run("grey").config()
    assert kept.model.channels == 1 and kept.data.mean == pytest.approx((0.449,), abs=5e-4)
    assert main([*asked, "--model.channels", "4", "--out", "four"]) == 2
    assert "--model.channels 4: images are read in grey (1)" in capsys.readouterr().err


def test_the_demo_without_a_network_trains_from_scratch_and_says_so(monkeypatch, capsys):
    from vitrail.cli import defaults as module
    from vitrail.errors import DataError

    def no_network(*args: object, **options: object) -> None:
        raise DataError("cannot fetch focus_s14: no network")

    monkeypatch.setattr(module, "open_start", no_network)
    given = module.defaults(["samples:emoji", "--recipe", "demo"])
    assert given.settings.weights is None and given.settings.row == "vit_mini16"
    assert "training from scratch instead" in capsys.readouterr().err
