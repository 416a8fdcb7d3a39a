"""The KServe v2 protocol: Triton's own client as it is, and requests that are wrong."""

import base64
import gzip
import io
import json
import struct

import numpy as np
import pytest
from PIL import Image

from deploy.serve.harness import ADMIN, TOKEN, Fake, expected, picture, running
from vitrail.deploy.serve.gate import Tokens

triton = pytest.importorskip("tritonclient.http")


@pytest.fixture(scope="module")
def live():
    with running(room=64) as one:
        yield one


def caller(live):
    return triton.InferenceServerClient(f"127.0.0.1:{live.port}")


@pytest.fixture
def client(live):
    with caller(live) as one:
        yield one


def given(images: list[bytes], binary: bool = True):
    one = triton.InferInput("image", [len(images)], "BYTES")
    data = images if binary else [base64.b64encode(image) for image in images]
    one.set_data_from_numpy(np.array(data, object), binary_data=binary)
    return [one]


def test_a_server_and_its_model_say_what_they_are(live, client):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("a-fake") and client.is_model_ready("a-fake", "1")
    assert not client.is_model_ready("another") and not client.is_model_ready("a-fake", "2")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    about = client.get_model_metadata("a-fake")
    assert about["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]} in about["outputs"]
    assert client.get_model_config("a-fake")["max_batch_size"] == 8
    assert client.get_model_repository_index()[0]["state"] == "READY"
    with pytest.raises(triton.InferenceServerException, match="unknown model 'another'"):
        client.get_model_metadata("another")


def test_an_admin_reloads_the_model_and_nobody_unloads_it(client):
    with pytest.raises(triton.InferenceServerException, match="a token that may do this"):
        client.load_model("a-fake")
    headers = {"authorization": f"Bearer {ADMIN.decode()}"}
    with running(tokens=Tokens(TOKEN, ADMIN)) as locked, caller(locked) as admin:
        admin.load_model("a-fake", headers=headers)
        with pytest.raises(triton.InferenceServerException, match="one model, and keeps it"):
            admin.unload_model("a-fake", headers=headers)


@pytest.mark.parametrize("asked", [None, "gzip", "deflate"])
@pytest.mark.parametrize("sent", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary_in", [True, False], ids=["binary", "base64"])
def test_tensors_go_in_and_out_in_every_way(live, client, binary_in, sent, asked):
    images = [picture(i, (200, 100)) for i in range(3)]
    right = [expected(live.model, image)["probabilities"] for image in images]
    outputs = [
        triton.InferRequestedOutput("probabilities", binary_data=True),
        triton.InferRequestedOutput("label", binary_data=False),
    ]
    for wanted in (None, outputs):
        found = client.infer(
            "a-fake",
            given(images, binary_in),
            outputs=wanted,
            request_id="me",
            request_compression_algorithm=sent,
            response_compression_algorithm=asked,
        )
        rows = [[each[name] for name in live.model.names] for each in right]
        np.testing.assert_array_equal(found.as_numpy("probabilities"), np.float32(rows))
        labels = [np.array(x).item() for x in found.as_numpy("label")]
        said = [one.decode() if isinstance(one, bytes) else one for one in labels]
        assert said == [max(each, key=each.get) for each in right]
        assert found.get_response()["id"] == "me"


def _check_plain(live, image: bytes) -> None:
    """The same by POST /predict."""
    with live.client() as client:
        answer = client.post("/predict", content=image).json()
        assert answer == expected(live.model, image)
        if live.model.kind == "segment":
            mask = client.post("/predict?mask=1", content=image).json()["mask"]
            with Image.open(io.BytesIO(base64.b64decode(mask))) as found:
                assert (found.mode, found.size) == ("P", (41, 31))
                assert np.asarray(found).sum() == 15 * 41
        if live.model.kind == "detect":
            assert client.post("/predict?score=1", content=image).json() == {"boxes": []}
            assert len(answer["boxes"]) == 2


def test_masks_boxes_and_features():
    images = [picture(0, (41, 31)), picture(1, (20, 40))]
    for kind in ("segment", "detect", "features"):
        with running(Fake(kind=kind)) as live, caller(live) as client:
            told = {o["name"]: o for o in client.get_model_metadata("a-fake")["outputs"]}
            found = client.infer("a-fake", given(images))
            arrays = {name: found.as_numpy(name) for name in told}
            _check_plain(live, images[0])
        for name, array in arrays.items():
            shape = told[name]["shape"]
            assert len(array.shape) == len(shape)
            assert all(want in (-1, has) for want, has in zip(shape, array.shape, strict=True))
        if kind == "segment":
            for file, size in zip(arrays["mask"], [(41, 31), (20, 40)], strict=True):
                with Image.open(io.BytesIO(file)) as mask:
                    assert (mask.mode, mask.size) == ("P", size)
            np.testing.assert_allclose(arrays["shares"].sum(1), 1, rtol=1e-6)
        if kind == "detect":
            assert arrays["count"].tolist() == [2, 1]
            assert arrays["boxes"][0].tolist() == [[0, 0, 20.5, 15.5]] * 2
            assert arrays["boxes"][1, 1].tolist() == [0] * 4 and arrays["scores"][1, 1] == 0
            assert arrays["labels"].tolist() == [[b"<b>dog</b>"] * 2, [b"<b>dog</b>", b""]]


def test_the_client_reads_our_errors(live, client):
    with pytest.raises(triton.InferenceServerException, match="cannot read the image"):
        client.infer("a-fake", given([b"no image"]))
    with pytest.raises(triton.InferenceServerException, match="at most 8 go into one request"):
        client.infer("a-fake", given([picture(0)] * 9))
    with pytest.raises(triton.InferenceServerException, match="there is no output 'x'"):
        client.infer("a-fake", given([picture(0)]), outputs=[triton.InferRequestedOutput("x")])
    wrong = triton.InferInput("pixels", [1, 2], "FP32")
    wrong.set_data_from_numpy(np.zeros((1, 2), np.float32))
    with pytest.raises(triton.InferenceServerException, match="one input 'image'"):
        client.infer("a-fake", [wrong])


def test_a_timeout_in_microseconds_is_kept():
    late = pytest.raises(triton.InferenceServerException, match="no answer in time")
    with running(Fake(seconds=0.3)) as live, caller(live) as client, late:
        client.infer("a-fake", given([picture(0)]), timeout=50_000)


def test_the_statistics_count_images_and_calls(live, client):
    before = client.get_inference_statistics()["model_stats"][0]
    client.infer("a-fake", given([picture(0)] * 3))
    after = client.get_inference_statistics("a-fake")["model_stats"][0]
    assert after["inference_count"] - before["inference_count"] == 3
    stats = after["inference_stats"]
    assert stats["success"]["count"] == after["inference_count"] and stats["success"]["ns"] > 0


def test_a_body_without_json_is_the_image(live):
    image = picture(3)
    with live.client() as client:
        answer = client.post(
            "/v2/models/a-fake/infer",
            content=image,
            headers={"inference-header-content-length": "0"},
        )
        head = json.loads(answer.content[: int(answer.headers["inference-header-content-length"])])
    assert answer.status_code == 200 and head["outputs"][0]["shape"] == [1]


def test_requests_that_are_wrong_get_one_clear_answer(live):
    image = picture(0)
    tensor = struct.pack("<I", len(image)) + image
    size = {"binary_data_size": len(tensor)}

    def asked(**changes) -> dict:
        one = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": size, **changes}
        return {"inputs": [one]}

    cases: list[tuple[dict | bytes, bytes]] = [
        (b"", b""),
        (b"\xff\xfe", b""),
        (b"[" * 9000, b""),
        (b"[]", b""),
        ({"inputs": []}, b""),
        ({"inputs": [1]}, b""),
        ({"inputs": [asked()["inputs"][0]] * 2}, tensor),
        (asked(shape=[2]), tensor),
        (asked(shape=[10**30]), tensor),
        (asked(shape=[-1]), tensor),
        (asked(shape="x"), tensor),
        (asked(datatype="FP32"), tensor),
        (asked(parameters={"binary_data_size": 10**20}), tensor),
        (asked(parameters={"binary_data_size": -1}), tensor),
        (asked(parameters={"binary_data_size": 5}), tensor),
        (asked(parameters={"shared_memory_region": "x"}), b""),
        (asked(parameters={}), b""),
        (asked(parameters={}, data=["%"]), b""),
        (asked(parameters={}, data=["aGk="]), b"more"),
        (asked(), tensor[:-1] + b""),
        (asked(parameters={"binary_data_size": 3}), b"abc"),
        (asked(parameters={"binary_data_size": 4}), b"\xff" * 4),
        ({**asked(), "parameters": {"timeout": -1}}, tensor),
    ]
    with live.client() as client:
        for head, tail in cases:
            text = head if isinstance(head, bytes) else json.dumps(head).encode()
            headers = {"inference-header-content-length": str(len(text))} if text else {}
            answer = client.post("/v2/models/a-fake/infer", content=text + tail, headers=headers)
            assert answer.status_code == 400, (head, answer.text)
            assert list(answer.json()) == ["error"]
        for length in ("-1", "x", "1e3", "99999", "9" * 5000, "²"):
            headers = {"inference-header-content-length": length.encode()}
            answer = client.post("/v2/models/a-fake/infer", content=b"{}", headers=headers)
            assert answer.status_code == 400, length
        many = asked(shape=[100_000], parameters={"binary_data_size": 400_000})
        text = json.dumps(many).encode()
        headers = {
            "inference-header-content-length": str(len(text)),
            "content-encoding": "gzip",
        }
        answer = client.post(
            "/v2/models/a-fake/infer", content=gzip.compress(text + bytes(400_000)), headers=headers
        )
        assert answer.status_code == 413
