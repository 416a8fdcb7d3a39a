"""A bundle, from the command line: made of a run, proved, asked, measured; damaged on purpose."""

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

import vitrail as toolkit
from command import last_json, vitrail
from deploy.serve.harness import Process, until
from vitrail.deploy.answers import told
from vitrail.deploy.bundle import ABOUT, SUMS, Bundle, check_whole
from vitrail.deploy.engines.onnxruntime import OnnxEngine
from vitrail.deploy.predict import Bundled
from vitrail.disk import sha256
from vitrail.errors import DataError, UsageError


@pytest.fixture(scope="module")
def made(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A bundle, and what `--json` said of it."""
    out = tmp_path_factory.mktemp("bundles") / "one"
    done = subprocess.run(
        [sys.executable, "-m", "vitrail", "export", run, "--out", out, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out, last_json(done.stdout)


@pytest.fixture
def bundle(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> Iterator[Path]:
    """One to be damaged."""
    return shutil.copytree(made[0], tmp_path / "bundle")  # type: ignore[return-value]


def signed(folder: Path) -> Path:
    """With sums that fit what is there, as somebody with bad intentions would leave it."""
    files = sorted(file.name for file in folder.iterdir() if file.name != SUMS)
    (folder / SUMS).write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in files))
    return folder


def edited(folder: Path, **changes: Any) -> Path:
    said = json.loads((folder / ABOUT).read_text()) | changes
    (folder / ABOUT).write_text(json.dumps(said))
    return signed(folder)


def test_what_export_says(made: tuple[Path, dict[str, Any]], run: Path) -> None:
    folder, said = made
    assert said["bundle"] == str(folder) and said["agreement"] == 1 and said["differ"] == []
    assert said["metrics"]["before"]["top1"] == said["metrics"]["after"]["top1"]
    assert said["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert said["images"] == 8
    listed = subprocess.run(["sha256sum", "-c", SUMS], cwd=folder, capture_output=True, check=False)
    assert listed.returncode == 0
    card = (folder / "CARD.md").read_text()
    assert "dark, light" in card and "8 held-out images" in card and "--preprocess outside" in card
    text = (folder / ABOUT).read_text()
    assert json.loads(text)["learned"]["data"]["path"] == "data"


def test_a_bundle_answers_as_the_run_does(
    made: tuple[Path, dict[str, Any]], run: Path, photos: Path
) -> None:
    files = sorted(photos.glob("*/*.png"))[::5]
    asked, own = toolkit.Predictor(made[0]), toolkit.Predictor(run)
    assert asked.names == own.names and asked.kind == own.kind and not asked.coupled
    for found, wanted in zip(asked.many(files), own.many(files), strict=True):
        assert found.label == wanted.label
        assert found.probability == pytest.approx(wanted.probability, rel=1e-4)
    assert asked.card["metrics"]["top1"] == pytest.approx(own.card["metrics"]["top1"])


def test_the_model_scales_images_itself(made: tuple[Path, dict[str, Any]], photos: Path) -> None:
    session = onnxruntime.InferenceSession(made[0] / "model.onnx")
    (taken,) = session.get_inputs()
    assert taken.name == "image" and taken.shape == ["batch", "height", "width", 3]
    asked = toolkit.Predictor(made[0])
    for file in (photos / "dark" / "3.png", photos / "light" / "7.png"):
        pixels = np.asarray(Image.open(file))[None]
        (found,) = session.run(["probabilities"], {"image": pixels})
        wanted = asked(file).probabilities
        said = dict(zip(asked.names, found[0], strict=True))
        assert said == pytest.approx(wanted, abs=0.02)  # a pixel may be a level off Pillow's


def test_torch_is_not_needed(made: tuple[Path, dict[str, Any]], photos: Path) -> None:
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "import vitrail.deploy\n"
        "from vitrail.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    image = photos / "dark" / "1.png"
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", made[0], image, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["predictions"][0]["label"] in ("dark", "light")


def test_measured_and_timed(
    made: tuple[Path, dict[str, Any]], run: Path, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, said = made
    code, out, err = vitrail(capfd, "evaluate", folder, "--json")
    assert code == 0, err
    found = last_json(out)
    assert found["metrics"] == pytest.approx(said["metrics"]["after"]) and found["images"] == 8
    code, out, err = vitrail(capfd, "evaluate", folder, "--data", photos, "--json")
    assert code == 0 and last_json(out)["images"] == 40, err
    code, out, err = vitrail(
        capfd, "bench", "speed", folder, run, "--batch", 4, "--seconds", 0.1, "--json"
    )
    assert code == 0, err
    rows = last_json(out)["rows"]
    assert [row["name"] for row in rows] == [str(folder), str(run)]
    assert all(row["images_per_second"] > 0 and row["latency_ms"] > 0 for row in rows)
    check_whole(folder)  # nothing was written into it


def test_without_the_run_its_images_are_named(
    bundle: Path, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = json.loads((bundle / ABOUT).read_text())["made"] | {"run": "/no/such/run"}
    edited(bundle, made=made)
    code, _, err = vitrail(capfd, "evaluate", bundle)
    assert code == 3 and "/no/such/run any more" in err and "--data" in err
    code, _, err = vitrail(capfd, "evaluate", bundle, "--data", photos)
    assert code == 0, err


def test_what_was_settled_when_it_was_made(
    made: tuple[Path, dict[str, Any]], photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image = photos / "dark" / "1.png"
    for verb in (["predict", made[0], image], ["evaluate", made[0]]):
        for flags in (["--tta", "flip"], ["--tokens", "tome:r=1"], ["--checkpoint", "best"]):
            code, _, err = vitrail(capfd, *verb, *flags)
            assert code == 2 and "is for runs" in err


def test_damage_is_seen(bundle: Path) -> None:
    model = bundle / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="is not the file that was exported"):
        Bundle.open(bundle)
    model.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(DataError, match="is not the file that was exported"):
        toolkit.Predictor(bundle)
    model.write_bytes(whole)
    (bundle / "more.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"more\.bin, which is none of its files"):
        Bundle.open(bundle)
    (bundle / "more.bin").unlink()
    Bundle.open(bundle)
    model.unlink()
    with pytest.raises(DataError, match=r"has lost model\.onnx"):
        Bundle.open(bundle)
    (bundle / SUMS).unlink()
    with pytest.raises(DataError, match="has no SHA256SUMS"):
        Bundle.open(bundle)
    with pytest.raises(DataError, match=r"no run at|is not a run"):
        toolkit.Predictor(bundle.parent)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 9}, "another vitrail"),
        ({"file": "../model.onnx"}, "is no file in it"),
        ({"file": "/etc/passwd"}, "is no file in it"),
        ({"takes": "anything"}, "image or views"),
        ({"runtime": "nothing"}, "nothing"),
        ({"reading": {"kind": "classify"}}, "damaged"),
        ({"reading": {"kind": "magic", "names": []}}, "magic"),
        ({"preprocess": {"size": [0, 3]}}, "size"),
        ({"preprocess": None}, "damaged"),
        ({"coupled": "yes"}, "coupled"),
        ({"surprise": 1}, "surprise"),
        ({"threshold": 7}, "threshold"),
    ],
)
def test_a_hostile_description(bundle: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        toolkit.Predictor(edited(bundle, **changes))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_description_that_is_none(bundle: Path, content: bytes) -> None:
    (bundle / ABOUT).write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        Bundle.open(signed(bundle))


def test_a_graph_that_reaches_for_other_files(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    model = onnx.load(bundle / "model.onnx")
    weight = next(each for each in model.graph.initializer if len(each.raw_data) > 4000)
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../secret.bin")
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="not taken by ONNX Runtime"):
        toolkit.Predictor(signed(bundle))
    (bundle / "model.onnx").write_bytes(b"MZ" + bytes(100))
    with pytest.raises(DataError, match="not taken by ONNX Runtime"):
        toolkit.Predictor(signed(bundle))


@pytest.mark.parametrize("shape", [(2**34,), (2**17, 2**17)], ids="{} long".format)
def test_a_graph_that_asks_for_all_memory_takes_down_no_server(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """A constant of 64 GiB in thirty bytes, for the sake of a number that is added."""
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    model = onnx.load(bundle / "model.onnx")
    asked = onnx.numpy_helper.from_array(np.array(shape, np.int64), "asked")
    model.graph.initializer.append(asked)
    last = model.graph.node[-1]
    out, last.output[0] = last.output[0], "before"
    model.graph.node.extend(
        [
            onnx.helper.make_node("ConstantOfShape", ["asked"], ["huge"]),
            onnx.helper.make_node("ReduceMax", ["huge"], ["most"], keepdims=0),
            onnx.helper.make_node("Add", ["before", "most"], [out]),
        ]
    )
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="bundle"):
        Bundled(signed(bundle), many=True)
    assert not (tmp_path / "cache").exists()


def test_other_answers_are_refused(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = OnnxEngine.run

    def wrong(self: OnnxEngine, views: Any) -> Any:
        found = dict(own(self, views))
        return found | {"logits": -found["logits"]}

    monkeypatch.setattr(OnnxEngine, "run", wrong)
    out = tmp_path / "out"
    code, _, err = vitrail(capfd, "export", run, "--out", out)
    assert code == 3 and "other answers to 8 of 8 held-out images" in err and ".png" in err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vitrail.deploy.export.onnx.save", full)
    code, _, err = vitrail(capfd, "export", run, "--out", tmp_path / "out")
    assert code == 3 and "No space left" in err
    assert not list(tmp_path.iterdir())


def test_a_runtime_that_is_not_installed_is_told_at_once(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitrail.deploy.engines.engine.find_spec", lambda name: None)
    code, out, err = vitrail(capfd, "export", run, "--to", "openvino", "--out", tmp_path / "x")
    assert code == 2 and not out and "pip install 'vitrail[openvino]'" in err
    assert "measuring" not in err and not list(tmp_path.iterdir())


def test_what_export_refuses_at_once(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    asked = {
        ("--to", "tensorflow"): "onnx",
        ("--to", "torch", "--precision", "int8"): "choose float32",
        ("--budget", "-1"): "0 to 100",
        ("--precision", "int8", "--to", "openvino", "--int8", "dynamic"): "static or weights",
        ("--out", str(tmp_path / "there")): "is there already",
    }
    for flags, said in asked.items():
        code, _, err = vitrail(capfd, "export", run, *flags)
        assert code == 2 and said in err, flags
    with pytest.raises(DataError):
        toolkit.Predictor(tmp_path / "there")
    with pytest.raises(UsageError):
        toolkit.Predictor(run, tta="never")


def test_a_bundle_is_served(bundle: Path, photos: Path) -> None:
    """As the predictor answers; what is damaged meanwhile does not take its place."""
    file = photos / "dark" / "3.png"
    right = told(toolkit.Predictor(bundle)(file))
    with Process("vitrail", "serve", str(bundle), "--port", "0", "--grace", "0") as server:

        def ask() -> None:
            answer = httpx.post(f"{server.address}/predict", content=file.read_bytes())
            assert answer.status_code == 200 and answer.json() == right

        ask()
        assert httpx.get(f"{server.address}/card").json()["engine"] == "onnx"
        (bundle / "model.onnx").write_bytes(b"damaged")
        server.signal(signal.SIGHUP)
        refused = 'vitrail_reloads_total{result="refused"} 1'
        until(lambda: refused in httpx.get(f"{server.address}/metrics").text)
        ask()
        server.signal(signal.SIGTERM)
        code, said = server.end()
    assert code == 0 and "not reloaded, the old model stays" in said
