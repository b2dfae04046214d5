"""Test `gptfast download` against a local server that drops connections, states wrong lengths and
serves damaged files: a finished download is whole, and good data is not fetched twice."""

import base64
import hashlib
import pwd
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast import GPT
from gptfast.cli import main
from gptfast.weights import download as module
from gptfast.weights.download import FILES, download

FIXTURE = Path(__file__).parent / "fixtures" / "openai"
DATA = "model.ckpt.data-00000-of-00001"


class Server(ThreadingHTTPServer):
    """Serves `files` under 124M/ with the faults that its attributes set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {path.name: path.read_bytes() for path in FIXTURE.iterdir()}
        self.files |= {"encoder.json": b"{}", "vocab.bpe": b"#", "model.ckpt.meta": b"m" * 3000}
        self.requests: list[tuple[str, str | None]] = []
        self.cut: int | None = None  # bytes after which the connection is dropped
        self.ranges = True
        self.longer: dict[str, int] = {}  # by how much Content-Length is wrong
        self.damaged: dict[str, int] = {}  # how often a file is served with a flipped bit
        self.status: dict[str, int] = {}
        self.md5 = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        server, name = self.server, self.path.rpartition("/")[2]
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked))
        content = server.files.get(name)
        if content is None or "/124M/" not in self.path:
            return self.send_error(404)
        if name in server.status:
            return self.send_error(server.status[name])
        if server.md5:
            digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        if server.damaged.get(name, 0) > 0:
            server.damaged[name] -= 1
            content = content[:10] + bytes([content[10] ^ 1]) + content[11:]
        start = 0
        if asked and server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body) + server.longer.get(name, 0)))
        if server.md5:
            self.send_header("x-ms-blob-content-md5", digest)
        self.end_headers()
        if server.cut is not None and len(body) > server.cut:
            body = body[: server.cut]
        self.wfile.write(body)
        self.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set an empty cache, the fixture's sizes and checksums for GPT-2's, and no huggingface_hub."""
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 24}
    monkeypatch.setattr(module, "PRESETS", {"gpt2": sizes})
    small = {"encoder.json": b"{}", "vocab.bpe": b"#"}
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in small.items()}
    monkeypatch.setattr(module, "SHA256", sums)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return tmp_path / "cache"


def fetch(server: Server, **options: Any) -> Path:
    return download("gpt2", url=server.url, pause=0.0, quiet=True, **options)


def assert_whole(path: Path, server: Server) -> None:
    assert {p.name: p.read_bytes() for p in path.iterdir()} == server.files
    assert [p.name for p in path.parent.iterdir()] == ["gpt2"]


def test_a_second_download_fetches_nothing(server: Server, cache: Path) -> None:
    path = fetch(server)
    assert path == cache / "gpt2"
    assert_whole(path, server)
    assert [name for name, _ in server.requests] == [f"/124M/{name}" for name in FILES]
    assert fetch(server) == path
    assert len(server.requests) == 7
    theirs = GPT.from_pretrained(FIXTURE).state_dict()
    ours = GPT.from_pretrained("gpt2").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_dropped_connections_are_taken_up_again(server: Server) -> None:
    server.cut = 9000
    assert_whole(fetch(server), server)
    ranges = [asked for name, asked in server.requests if name.endswith(DATA)]
    assert ranges == [None, *(f"bytes={9000 * i}-" for i in range(1, 8))]


def test_a_download_that_was_given_up_goes_on(server: Server, cache: Path) -> None:
    server.cut, server.ranges = 9000, False
    with pytest.raises(OSError, match=f"gpt2 could not be downloaded: {DATA}: cut off after 9,000"):
        fetch(server, attempts=2)
    assert not (cache / "gpt2").exists()
    before = len(server.requests)
    server.cut, server.ranges = None, True
    assert_whole(fetch(server), server)
    assert server.requests[before:] == [(f"/124M/{DATA}", "bytes=9000-")]


@pytest.mark.parametrize("by", [500, -500])
def test_a_wrong_length(server: Server, cache: Path, by: int) -> None:
    """If the length is too large, the rest never comes; if too small, the checksums fail."""
    server.longer = {DATA: by}
    if by > 0:
        # The whole file came, and it passes every check.
        assert_whole(fetch(server, attempts=2), server)
        return
    with pytest.raises(OSError, match="the download of gpt2 is damaged: .* truncated"):
        fetch(server, attempts=2)
    assert not (cache / "gpt2").exists()
    server.longer = {}
    assert_whole(fetch(server), server)


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("checkpoint",)])
@pytest.mark.parametrize("md5", [False, True], ids=["", "md5"])
def test_damage_is_found_and_fetched_again(
    server: Server, cache: Path, name: str, md5: bool
) -> None:
    if name == "model.ckpt.meta" and not md5:
        pytest.skip("nothing but the server knows what is in it; it is never read")
    server.damaged, server.md5 = {name: 1}, md5
    if len(server.files[name]) < 11:
        server.files[name] = server.files[name].ljust(20)
        module.SHA256[name] = hashlib.sha256(server.files[name]).hexdigest()
    with pytest.raises(OSError, match="is damaged: .*; try again"):
        fetch(server)
    assert not (cache / "gpt2").exists()
    assert_whole(fetch(server), server)


def test_another_model_is_refused(server: Server) -> None:
    server.files["hparams.json"] = server.files["hparams.json"].replace(
        b'"n_head": 2', b'"n_head": 4'
    )
    with pytest.raises(OSError, match="hparams.json is not gpt2's: n_head differs"):
        fetch(server)


def test_a_file_that_shrank_after_a_cut(server: Server) -> None:
    """A file is fetched again if the part on disk is longer than the file now is."""
    server.cut, server.ranges = 2500, False
    with pytest.raises(OSError, match="could not be downloaded"):
        fetch(server, attempts=1)
    server.cut, server.ranges = None, True
    server.files["model.ckpt.meta"] = b"n" * 100
    assert_whole(fetch(server), server)


@pytest.mark.parametrize("status", [404, 403, 500, 503])
def test_an_error_of_the_server(server: Server, cache: Path, status: int) -> None:
    server.status = {"hparams.json": status}
    with pytest.raises(OSError, match=rf"{status}.* put the files .* into .*cache/gpt2 by hand"):
        fetch(server, attempts=3)
    tries = sum(name.endswith("hparams.json") for name, _ in server.requests)
    assert tries == (3 if status >= 500 else 1)


def test_offline(cache: Path) -> None:
    with pytest.raises(OSError, match="no answer") as error:
        download("gpt2", url="http://127.0.0.1:9", attempts=2, pause=0.0, quiet=True)
    message = str(error.value)
    assert (
        "\n" not in message
        and str(cache / "gpt2") in message
        and "install huggingface_hub" in message
    )
    assert list(cache.iterdir()) == []


def test_the_proxy_of_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("http_proxy", server.url)
    path = download("gpt2", url="http://nowhere.invalid/models", pause=0.0, quiet=True)
    assert_whole(path, server)
    assert server.requests[0][0] == "http://nowhere.invalid/models/124M/checkpoint"


def test_hugging_face_where_openai_fails(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def snapshot(repo: str, *, allow_patterns: list[str], local_dir: Path) -> None:
        assert repo == "openai-community/gpt2" and "model.safetensors" in allow_patterns
        GPT.from_pretrained(FIXTURE).save_pretrained(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    server.status = {"checkpoint": 404}
    path = fetch(server)
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]
    assert GPT.from_pretrained("gpt2").config.n_embd == 24


def test_an_error_page_in_the_place_of_files(server: Server, cache: Path) -> None:
    """A network's sign-in page is detected at once; later, no good file is fetched twice."""
    whole = dict(server.files)
    server.files = dict.fromkeys(whole, b"<html>sign in</html>")
    with pytest.raises(OSError, match="the download of gpt2 is damaged: checkpoint has no"):
        fetch(server)
    server.files = whole | {"hparams.json": b"<html>sign in</html>"}
    with pytest.raises(OSError, match="hparams.json is damaged"):
        fetch(server)
    server.files = whole
    before = len(server.requests)
    assert_whole(fetch(server), server)
    assert len(server.requests) - before == 6  # all but `checkpoint`


def test_hugging_face_fails_too(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Transport(Exception):
        pass

    def broken(*_: Any, local_dir: Path, **__: Any) -> None:
        local_dir.mkdir(exist_ok=True)
        if not list(local_dir.iterdir()):
            (local_dir / "config.json").write_text("{}")
            return
        raise Transport

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    server.status = {"checkpoint": 404}
    for kind in ("CheckpointError", "Transport"):
        with pytest.raises(OSError, match=rf"nor from Hugging Face \({kind}\)"):
            fetch(server)
        assert not (cache / "gpt2").exists()


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="no model 'gpt3'; choose from gpt2, gpt2-medium"):
        download("gpt3")


def test_a_cache_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()  # root may write to any directory
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path / "file"))
    assert main(["download", "gpt2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'file'}, the directory of downloaded models, cannot be written" in line
    assert line.endswith("; set GPTFAST_CACHE to one that can")


def test_a_user_without_a_home_directory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One line says what to set; a path needs no cache directory."""
    for name in ("HOME", "GPTFAST_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    for command in (["download", "gpt2"], ["generate", "gpt2", "--prompt", "a"]):
        assert main(command) == 1
        line = capsys.readouterr().err
        assert line.startswith("gptfast: this user has no home directory; set GPTFAST_CACHE")
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path))
    assert main(["generate", "gpt2", "--prompt", "a"]) == 1
    assert f"gpt2 is not in {tmp_path}" in capsys.readouterr().err
