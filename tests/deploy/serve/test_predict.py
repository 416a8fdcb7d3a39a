"""POST /predict: every way to send images, every answer that of the image alone."""

import base64
import gzip
import random
import socket
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from deploy.serve.harness import POISON, Fake, as_file, expected, picture, post, running, until


@pytest.fixture(scope="module")
def live():
    with running(decoders=2, room=64, batch=8) as one:
        yield one


@pytest.fixture
def client(live):
    with live.client() as one:
        yield one


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_each_way_to_send_an_image_gives_the_same_answer(live, client):
    image = picture(1)
    right = expected(live.model, image)
    ways = [
        {"content": image},
        {"content": image, "headers": {"content-type": "image/png"}},
        {"content": image, "headers": {"content-type": "application/x-www-form-urlencoded"}},
        {"files": {"image": ("a.png", image, "image/png")}},
        {"files": {"anything": ('"; evil=\r\n', image)}},
        {"json": {"image": b64(image)}},
        {"json": {"image": f"data:image/png;base64,{b64(image)}"}},
        {"content": gzip.compress(image), "headers": {"content-encoding": "gzip"}},
        {"content": zlib.compress(image), "headers": {"content-encoding": "deflate"}},
    ]
    for way in ways:
        answer = client.post("/predict", **way)
        assert (answer.status_code, answer.json()) == (200, right), way


def test_several_images_are_answered_in_their_order_and_a_bad_one_says_so(live, client):
    images = [picture(i) for i in range(3)]
    right = [expected(live.model, image) for image in images]
    answer = client.post("/predict", json={"images": [b64(i) for i in [*images, b"no image"]]})
    *found, last = answer.json()["answers"]
    assert answer.status_code == 200 and found == right and list(last) == ["error"]
    files = [("image", (f"{i}.png", image)) for i, image in enumerate(images)]
    assert client.post("/predict", files=files).json() == {"answers": right}
    assert client.post("/predict", json={"images": [b64(images[0])]}).json() == {
        "answers": right[:1]
    }


def test_top_and_what_is_out_of_range(live, client):
    image = picture(2)
    right = expected(live.model, image)
    found = client.post("/predict?top=1", content=image).json()
    first = right["probabilities"][right["label"]]
    assert found == {"label": right["label"], "probabilities": {right["label"]: first}}
    for query in ("top=0", "top=x", "score=2", "score=nan"):
        answer = client.post(f"/predict?{query}", content=image)
        assert answer.status_code == 422 and query[:3] in answer.json()["error"]


def test_images_of_any_shape_and_mode(live, client):
    shapes = [Image.new("RGB", (1, 1), (1, 2, 3)), Image.new("L", (20000, 10), 7)]
    shapes += [Image.new("RGBA", (30, 20), (9, 8, 7, 100)), Image.new("P", (10, 500), 3)]
    for image in shapes:
        data = as_file(image)
        answer = client.post("/predict", content=data)
        assert (answer.status_code, answer.json()) == (200, expected(live.model, data))


def test_what_is_no_image_gets_one_clear_answer(client):
    whole = picture(3, form="JPEG")
    bad = {
        "html": b"<!doctype html><html>hello</html>",
        "exe": b"MZ\x90\x00" + bytes(200),
        "pickle": b"cos\nsystem\n(S'touch owned'\ntR.",
        "cut": whole[: len(whole) // 2],
        "psd": b"8BPS" + bytes(100),
        "huge": as_file(Image.new("1", (3000, 2000))),
    }
    for name, data in bad.items():
        answer = client.post("/predict", content=data)
        assert answer.status_code == 422, name
        assert answer.json()["error"].startswith("cannot read the image: "), name


def test_bodies_that_are_not_what_they_say_get_one_clear_answer(client):
    image = picture(4)
    cases = [
        (400, {"content": b""}),
        (415, {"content": image, "headers": {"content-type": "text/html"}}),
        (415, {"content": image, "headers": {"content-encoding": "br"}}),
        (400, {"content": image, "headers": {"content-encoding": "gzip"}}),
        (400, {"content": gzip.compress(image)[:-9], "headers": {"content-encoding": "gzip"}}),
        (400, {"content": gzip.compress(image) + b"x", "headers": {"content-encoding": "gzip"}}),
        (413, {"content": gzip.compress(bytes(2**22)), "headers": {"content-encoding": "gzip"}}),
        (400, {"content": b"{", "headers": {"content-type": "application/json"}}),
        (400, {"content": b"[" * 5000, "headers": {"content-type": "application/json"}}),
        (413, {"content": b"[" * 30000, "headers": {"content-type": "application/json"}}),
        (400, {"content": b"9" * 100000, "headers": {"content-type": "application/json"}}),
        (400, {"json": {"image": "%%%"}}),
        (400, {"json": {"image": 3}}),
        (400, {"json": {"images": []}}),
        (400, {"json": {"images": ["", ""]}}),
        (413, {"json": {"images": [b64(image)] * 9}}),
        (400, {"json": {"image": b64(image), "more": 1}}),
        (400, {"json": ["image"]}),
        (400, {"data": {"image": b64(image)}, "files": {"": b""}}),
    ]
    for status, request in cases:
        answer = client.post("/predict", **request)
        assert answer.status_code == status, (answer.text, request)
        assert list(answer.json()) == ["error"]


def _form(*parts: bytes, end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + end


def test_hostile_forms_get_one_clear_answer_and_stop_nobody(live, client):
    """H5."""
    image = picture(4)
    head = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n'
    whole = head + b"\r\n" + image
    cases = {
        b"": _form(whole),
        b"; boundary=": _form(whole),
        b"; boundary=b": b"",
        b"; boundary=c": _form(whole),
        b"; boundary=" + b"b" * 5000: _form(whole),
        b'; boundary="b"': _form(whole, whole[:50], end=b""),
        b"; boundary=b;": _form(*[b"\r\n"] * 100_000),
        b"; boundary=b; a=1": _form(*[head + b"\r\n"] * 5_000),
        b"; boundary=b; a=2": _form(head + b"X: " + b"x" * 900_000 + b"\r\n\r\n" + image),
        b"; boundary=b; a=3": _form(head + b"X: 1\r\n" * 50_000 + b"\r\n" + image),
        b"; boundary=b; a=4": b"\r\n--" * 200_000 + _form(b"X: 1\r\n\r\n"),
        b"; boundary=b; a=5": _form(b'Content-Disposition: form-data; name="image"\r\n\r\nx'),
        b"; boundary=b; a=6": _form(b"Content-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n"),
        b"; boundary=b; a=7": _form(b"no header at all"),
    }
    for kind, body in cases.items():
        headers = {b"content-type": b"multipart/form-data" + kind}
        answer = client.post("/predict", content=body, headers=headers)
        assert answer.status_code in (400, 413), (kind, answer.text)
        assert list(answer.json()) == ["error"]
        assert answer.elapsed.total_seconds() < 2
    after = _form(whole) + b"--b\r\n" * 1000  # what follows the end is no part of it
    headers = {"content-type": "multipart/form-data; boundary=b"}
    answer = client.post("/predict", content=after, headers=headers)
    assert answer.json() == expected(live.model, image)


@pytest.mark.parametrize(
    "count", [200, pytest.param(100_000, marks=pytest.mark.slow)], ids="{} requests".format
)
def test_each_of_many_mixed_requests_gets_its_own_answer(live, count):
    """H13: batches are made of whatever comes, and nobody gets a neighbour's answer."""
    rng = random.Random(0)
    images = [picture(i, (rng.randint(1, 90), rng.randint(1, 90))) for i in range(60)]
    right = [expected(live.model, image) for image in images]
    live.model.calls.clear()

    def some(seed: int) -> int:
        wrong, order = 0, random.Random(seed)
        with live.client() as client:
            for _ in range(count // 8):
                k = order.randrange(60)
                answer = client.post("/predict", content=images[k])
                wrong += (answer.status_code, answer.json()) != (200, right[k])
        return wrong

    live.model.each = 0.001
    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(some, range(8))) == 0
    live.model.each = 0.0
    assert max(live.model.calls) > 1  # so that there were neighbours


@pytest.mark.parametrize(
    "count", [60, pytest.param(10_000, marks=pytest.mark.slow)], ids="{} mixes".format
)
def test_a_bad_request_harms_no_neighbour(live, count):
    """H14: damaged files, and an image at which the engine itself fails."""
    good, cut = picture(5), picture(6, form="JPEG")[:300]
    poison = as_file(Image.fromarray(np.full((30, 40, 3), POISON, np.uint8)))
    right, statuses = expected(live.model, good), {good: 200, cut: 422, poison: 500}

    def ask(seed: int) -> list:
        order, found = random.Random(seed), []
        with live.client() as client:
            for _ in range(count // 6):
                image = order.choice([good, good, cut, poison])
                answer = client.post("/predict", content=image)
                found.append(answer.status_code == statuses[image])
                found.append(image != good or answer.json() == right)
        return found

    live.model.each = 0.001
    with ThreadPoolExecutor(6) as threads:
        assert all(all(found) for found in threads.map(ask, range(6)))
    live.model.each = 0.0


def test_no_work_is_done_for_who_is_too_late_or_gone():
    """H2: a client says how long it waits; or it hangs up."""
    image = picture(0)
    with running(Fake(), room=64, batch=1) as live, live.client() as client:
        live.model.calls.clear()
        live.model.held = threading.Event()
        with socket.create_connection(("127.0.0.1", live.port)) as first:
            first.sendall(post("/predict", image))
            until(lambda: live.service.counts.value("vitrail_seconds_count", stage="decode") == 2)
            for _ in range(3):
                answer = client.post(
                    "/predict", content=image, headers={"x-request-timeout": "0.1"}
                )
                assert answer.status_code == 504 and "in time" in answer.json()["error"]
            for _ in range(3):
                with socket.create_connection(("127.0.0.1", live.port)) as gone:
                    gone.sendall(post("/predict", image))
                    until(lambda: live.service.admission.inside == 2)
                until(lambda: live.service.admission.inside == 1)
            live.model.held.set()
            assert first.recv(4096).startswith(b"HTTP/1.1 200")
        assert client.post("/predict", content=image).status_code == 200
        assert live.model.calls == [1, 1] and live.service.admission.inside == 0
        for wrong in ("-1", "x", "nan", "0"):
            answer = client.post("/predict", headers={"x-request-timeout": wrong})
            assert answer.status_code == 400
