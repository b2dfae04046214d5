"""`gptfast serve` as a process: its flags, its signals and its end."""

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_model, save
from serving import Process

from gptfast import cli
from gptfast.cli.serve import Serve
from gptfast.ops.backend import EXTENSION
from gptfast.serve.run import bound_socket

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")
WAIT_S = 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny"
    save(random_model(vocab_size=257, block_size=64), path)
    return path


SMALL = ("--tokenizer", "byte", "--threads", "1")


@pytest.fixture
def process(checkpoint: Path) -> Iterator[Process]:
    running = Process(str(checkpoint), *SMALL)
    yield running
    running.close()


def test_signals(process: Process, checkpoint: Path) -> None:
    assert process.first.startswith("serving tiny at http://127.0.0.1:")
    body = {"prompt": "a", "max_tokens": 5, "seed": 1}
    before = process.ask("POST", "/v1/completions", body)
    assert before[0] == 200
    assert process.hang_up() == "the model was read again\n"
    after = process.ask("POST", "/v1/completions", body)
    assert after[1]["choices"] == before[1]["choices"]
    moved = checkpoint.rename(checkpoint.with_name("moved"))
    assert process.hang_up().startswith("the model was not read again, the old one stays: ")
    moved.rename(checkpoint)
    assert process.ask("POST", "/v1/completions", body)[0] == 200
    # Running requests end before the server does, and new ones are refused meanwhile.
    response = process.opened_stream({"prompt": ["a"] * 64, "max_tokens": 60, "ignore_eos": True})
    response.read(1)
    process.process.send_signal(signal.SIGTERM)
    assert response.read().endswith(b"data: [DONE]\n\n")
    assert process.process.wait(WAIT_S) == 0
    assert process.process.stderr is not None and process.process.stderr.read() == ""


def test_a_model_that_is_not_there_ends_the_process(tmp_path: Path) -> None:
    running = Process(str(tmp_path / "none"))
    assert running.process.wait(WAIT_S) == 1
    assert running.first.startswith("gptfast: ") and "none" in running.first


def test_a_model_without_logits_is_not_served(process: Process, tmp_path: Path) -> None:
    """Not at the start, and not in place of one that is good."""
    model = random_model(vocab_size=257, block_size=64)
    with torch.no_grad():
        model.ln_f.weight[3] = float("nan")
    save(model, tmp_path / "broken")
    running = Process(str(tmp_path / "broken"), *SMALL)
    assert running.process.wait(WAIT_S) == 1
    assert running.first.startswith("gptfast: the model's logits had NaN, +inf or nothing but -inf")
    running.close()


@pytest.mark.parametrize("asked", [{"max_tokens": 9}, {"echo": True, "logprobs": 1}])
def test_a_broken_model_ends_the_process_with_a_line(asked: Any, tmp_path: Path) -> None:
    """Those who stream, who wait for all of it, and who wait in the queue get the message."""
    model = random_model(vocab_size=257, block_size=64)
    with torch.no_grad():
        model.wpe.weight[2, 3] = float("nan")  # nobody sees it before a third token
    save(model, tmp_path / "broken")
    running = Process(str(tmp_path / "broken"), *SMALL, "--max-batch", "2")
    body = {"prompt": ["abc"] * 9, **asked}
    with ThreadPoolExecutor(4) as pool:
        whole = [pool.submit(running.ask, "POST", "/v1/completions", body) for _ in range(2)]
        streams = [pool.submit(running.stream, body) for _ in range(2)]
        assert running.process.wait(WAIT_S) == 1
        assert sum(told(one) for one in [*whole, *streams]) >= 1
    assert running.process.stderr is not None
    assert running.process.stderr.read() == f"gptfast: {BROKEN}\n"
    running.close()


BROKEN = (
    "the engine failed: the model's logits had NaN, +inf or nothing but -inf; check its weights"
)


def told(reply: "Future[Any]") -> bool:
    """Return whether a reply has the message. One that came too late finds no server."""
    try:
        found = reply.result(WAIT_S)
    except OSError:
        return False
    error = found[1] if isinstance(found, tuple) else json.loads(found[-1].removeprefix("data: "))
    assert error["error"]["type"] == "server_error"
    return error["error"]["message"] == BROKEN


def test_a_server_killed_under_load_and_started_again(checkpoint: Path) -> None:
    running = Process(str(checkpoint), *SMALL, "--max-batch", "1")
    body = {"prompt": ["a"] * 32, "max_tokens": 60, "ignore_eos": True, "seed": 1}
    with ThreadPoolExecutor(6) as pool:
        first = running.opened_stream(body)
        streams = [pool.submit(running.stream, body) for _ in range(3)]
        whole = [pool.submit(running.ask, "POST", "/v1/completions", body) for _ in range(3)]
        assert first.read(1)
        running.close()
        with pytest.raises(http.client.HTTPException):
            first.read()
        for one in [*streams, *whole]:
            with pytest.raises((OSError, http.client.HTTPException)):
                one.result(WAIT_S)
    again = Process(str(checkpoint), *SMALL, port=running.port)
    assert again.ask("POST", "/v1/completions", {"prompt": "a"})[0] == 200
    again.close()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from elsewhere: give --api-key-fi"),
        (["--port", "65536"], "--port must be an integer from 0 to 65535, got 65536"),
        (["--max-batch", "0"], "--max-batch must be an integer >= 1, got 0"),
        (["--timeout", "-1"], "--timeout must be at least 0 seconds"),
        (["--template", "x"], "--template must have {prompt} in it once, got 'x'"),
        (["--temperature", "-1"], "temperature must be"),
        (["--lookup", "--draft", "gpt2"], "--lookup and --draft do not go together"),
    ],
)
def test_flags_out_of_range(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "nothing", *argv]) == cli.USAGE_ERROR
    assert message in capsys.readouterr().err


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(" one \n\ntwo\n")
    assert Serve(checkpoint="x", api_key_file=str(path))._keys() == ["one", "two"]
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no key; write one on each line"):
        Serve(checkpoint="x", api_key_file=str(path))._keys()
    path.write_text("café\n")
    with pytest.raises(ValueError, match="key 1 of .* has other characters than ASCII"):
        Serve(checkpoint="x", api_key_file=str(path))._keys()
    for wrong, why in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"cannot read --api-key-file {wrong}: {why}.*a key"):
            Serve(checkpoint="x", api_key_file=str(wrong))._keys()


@pytest.mark.parametrize("host", ["ü" * 80, "192.0.2.1", "::1::"])
def test_a_host_that_is_none_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match=f"cannot listen at {host}, port 0: .*; choose another"):
        bound_socket(host, 0)


LOADING = """
import sys
import torch
from gptfast.cli import main
from gptfast.cli.serve import Serve

def service(self, on_failure):
    fails.append(on_failure)
    return made(self, on_failure)

def model(self):
    print("begun")
    print("loading", file=sys.stderr, flush=True)
    if self.checkpoint == "failing":
        fails[0]("the engine failed: it is broken")
    weights = torch.ones(64, 64)
    while True:
        weights = (weights @ weights).softmax(-1)

fails, made = [], Serve._service
Serve._service, Serve._model = service, model
sys.exit(main())
"""


@pytest.mark.parametrize("how", ["asked", "failing"])
def test_an_end_while_the_model_is_read(how: str, tmp_path: Path) -> None:
    """The interpreter does not end: it would stop the reading thread within PyTorch's frames."""
    script, pipe = tmp_path / "gptfast", subprocess.PIPE
    script.write_text(LOADING)
    command = [sys.executable, str(script), "serve", how, "--port", "0"]
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env={**os.environ, **path}) as loading:
        assert loading.stdout is not None and loading.stderr is not None
        assert loading.stderr.readline() == b"loading\n"
        if how == "asked":
            loading.send_signal(signal.SIGTERM)
        try:
            code = loading.wait(WAIT_S / 4)
        finally:
            loading.kill()
        line = b"gptfast: the engine failed: it is broken\n"
        assert (code, loading.stderr.read()) == ((0, b"") if how == "asked" else (1, line))
        assert loading.stdout.read() == b"begun\n"


def test_a_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["serve", "nothing"]) == 1
    assert "pip install 'gptfast-torch[serve]'" in capsys.readouterr().err
