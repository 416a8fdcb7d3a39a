"""Who may ask: tokens, other pages, other names; and that nothing else can be reached."""

import base64
import itertools
import random
import socket
from http.client import HTTPConnection

import pytest

from deploy.serve.harness import ADMIN, TOKEN, Fake, picture, raw, running
from vitrail.deploy.serve.gate import Tokens
from vitrail.deploy.serve.server import is_loopback

ADDRESSES = [
    "http://127.0.0.1:{port}/x",
    "http://localhost:{port}/x",
    "http://[::1]:{port}/x",
    "http://0.0.0.0:{port}/x",
    "http://2130706433:{port}/x",
    "http://0177.0.0.1:{port}/x",
    "http://0x7f.1:{port}/x",
    "http://[::ffff:127.0.0.1]:{port}/x",
    "http://user@127.0.0.1:{port}/x",
    "http://127.1:{port}/x",
    "file:///etc/passwd",
    "gopher://127.0.0.1:{port}/x",
]


@pytest.fixture(scope="module")
def live():
    with running(room=64) as one:
        yield one


@pytest.fixture(scope="module")
def locked():
    with running(Fake(), tokens=Tokens(TOKEN, ADMIN), room=64) as one:
        yield one


def bearer(token: bytes) -> dict[str, str]:
    return {"authorization": f"Bearer {token.decode()}"}


def test_without_a_token_nothing_is_said_of_the_model(locked):
    image = picture(0)
    with locked.client() as client:
        for path in ("/", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"):
            assert client.get(path).status_code == 200, path
        for path in ("/card", "/metrics", "/openapi.json", "/v2", "/v2/models/a-fake", "/nothing"):
            answer = client.get(path)
            assert answer.status_code == 401 and "Bearer" in answer.json()["error"], path
        assert client.post("/predict", content=image).status_code == 401
        answer = client.post("/predict", content=image, headers=bearer(TOKEN))
        assert answer.status_code == 200
        assert client.get("/metrics", headers=bearer(ADMIN)).status_code == 200


def test_only_an_admin_reloads(live, locked):
    path = "/v2/repository/models/a-fake/load"
    with locked.client() as client:
        assert client.post(path, headers=bearer(TOKEN)).status_code == 401
        assert client.post(path, headers=bearer(ADMIN)).status_code == 200
    with live.client() as client:  # where there is no admin, nobody is
        assert client.post(path).status_code == 401


@pytest.mark.parametrize(
    "count", [300, pytest.param(10_000, marks=pytest.mark.slow)], ids="{} tries".format
)
def test_no_other_header_is_taken_for_the_token(locked, count):
    """H10."""
    rng, token = random.Random(0), TOKEN.decode()
    fixed = [
        f"Bearer {token}x",
        f"Bearer {token[:-1]}",
        f"Bearer {token.upper()}",
        f"Bearer {token}, Bearer {token}",
        f"Basic {base64.b64encode(TOKEN).decode()}",
        f"Basic {token}",
        f"Bearer\t{token}",
        token,
        "Bearer",
        "Bearer ",
        "",
    ]
    for i in range(count):
        value = fixed[i] if i < len(fixed) else None
        if value is None:
            letters = list(f"Bearer {token}")
            for _ in range(rng.randint(1, 3)):
                letters[rng.randrange(7, len(letters))] = chr(rng.randint(33, 126))
            value = "".join(letters)
        if value == f"Bearer {token}":
            continue
        said = raw(locked.port, _get("/card", f"Authorization: {value}"))
        assert said.startswith(b"HTTP/1.1 401"), (value, said)
    twice = ["Authorization: Bearer wrong", f"Authorization: Bearer {token}"]
    for pair in (twice, twice[::-1], twice[1:] * 2):
        assert raw(locked.port, _get("/card", *pair)).startswith(b"HTTP/1.1 401")
    right = raw(locked.port, _get("/card", f"authorization: bearer {token}"))
    assert right.startswith(b"HTTP/1.1 200")


def _get(path: str, *headers: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def test_pages_of_others_cannot_use_a_server_of_this_machine(live):
    """A page may send requests from its reader's browser, and lend its own name to 127.0.0.1."""
    image = picture(0)
    with live.client() as client:
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.x"):
            assert client.get("/card", headers={"host": host}).status_code == 403, host
        for origin in ("http://evil.example", "null", f"https://localhost:{live.port}x"):
            answer = client.post("/predict", content=image, headers={"origin": origin})
            assert answer.status_code == 403, origin
        own = {"origin": live.address}
        assert client.post("/predict", content=image, headers=own).status_code == 200
        assert client.get("/card", headers={"host": "[::1]:8000"}).status_code == 200


def test_with_a_token_a_proxy_may_stand_in_front(locked):
    proxied = {"host": "model.example", "origin": "https://model.example:8443", **bearer(TOKEN)}
    with locked.client() as client:
        answer = client.post("/predict", content=picture(0), headers=proxied)
        assert answer.status_code == 200


def test_what_only_this_machine_can_call():
    inside = ("127.0.0.1", "127.9.9.9", "::1", "localhost")
    outside = ("0.0.0.0", "::", "10.0.0.1", "127.example.com", "", "::ffff:10.0.0.1")
    assert all(map(is_loopback, inside)) and not any(map(is_loopback, outside))


def test_nothing_is_fetched_for_a_client(live):
    """H6: there is no way to give an image by its address, in any form."""
    with socket.create_server(("127.0.0.1", 0)) as canary:
        canary.settimeout(0.3)
        port = canary.getsockname()[1]
        addresses = [address.format(port=port) for address in ADDRESSES]
        with live.client() as client:
            for address in addresses:
                for body in ({"url": address}, {"image": address}, {"images": [address]}):
                    answer = client.post("/predict", json=body)
                    assert answer.status_code == 400 and list(answer.json()) == ["error"]
                tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [address]}
                answer = client.post("/v2/models/a-fake/infer", json={"inputs": [tensor]})
                assert answer.status_code == 400
                assert client.post("/predict", content=address.encode()).status_code == 422
        with pytest.raises(TimeoutError):
            canary.accept()


def test_no_path_leads_to_a_file(live):
    """H7."""
    ups = ["..", "%2e%2e", "%2e.", "..%2f", "..%5c", "....//", "%252e%252e", "..%c0%af", "..\\"]
    targets = ["etc/passwd", "etc/passwd%00.png", "proc/self/environ", "page.html", "__init__.py"]
    starts = ["", "v2/models/", "v2/models/a-fake/versions/", "predict/"]
    seen = set()
    for up, target, start in itertools.product(ups, targets, starts):
        said = raw(live.port, _get(f"/{start}{'/'.join([up] * 4)}/{target}"))
        seen.add(said[9:12])
        assert b"root:" not in said and b"PATH=" not in said and b"<script>" not in said
    assert seen <= {b"404", b"400", b"405"}


def test_the_page_runs_no_script_but_its_own(live):
    live.model.names = ("</script><script>alert(1)</script>", "b", "c")
    with live.client() as client:
        page = client.get("/")
        assert "alert(1)" not in page.text  # names come as JSON, and are set as text
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "http" not in page.text.replace("http-equiv", "")  # and it asks nobody else
        assert client.get("/card").json()["classes"][0] == live.model.names[0]
        for path in ("/", "/card", "/health/live", "/nothing"):
            assert client.get(path).headers["x-content-type-options"] == "nosniff"


def test_what_is_named_in_openapi_is_what_there_is(live):
    with live.client() as client:
        told = client.get("/openapi.json").json()["paths"]
        for path, methods in told.items():
            where = path.format(model="a-fake", version="1")
            for method in methods:
                answer = client.request(method, where)
                assert str(answer.status_code) in methods[method]["responses"], (path, answer)
            other = client.request("DELETE", where)
            assert other.status_code in (401, 405) and list(other.json()) == ["error"]


def test_a_refusal_on_a_kept_connection_leaves_it_usable(locked):
    connection = HTTPConnection("127.0.0.1", locked.port, timeout=5)
    sockets = set()
    for token, status in ((b"wrong", 401), (TOKEN, 200), (b"wrong", 401), (TOKEN, 200)):
        connection.request("POST", "/predict", picture(0), bearer(token))
        sockets.add(connection.sock.fileno())
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (status, True)
    assert len(sockets) == 1
    connection.close()
