"""Test models that are sent to the Hugging Face Hub, on a stand-in of its HTTP interface here."""

import base64
import json
import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_trainer, random_model

from gptfast import GPT
from gptfast.cli import main
from gptfast.installed import commit, version
from gptfast.lora import add_adapters
from gptfast.weights.adapter import AdapterConfig
from gptfast.weights.card import facts_of

constants = pytest.importorskip("huggingface_hub.constants")
TOKEN = "hf_thisIsASecretOfTheTests"


class Hub(ThreadingHTTPServer):
    """Answers what a commit of small files asks, and keeps it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, Any, str | None]] = []
        self.files: dict[str, bytes] = {}
        self.refuses = False
        self.is_private = True


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        if self.path in ("/api/models/user/name", "/api/models/user/base"):
            self.reply(200, {"id": "user/name", "private": self.server.is_private, "tags": []})
        elif self.path.startswith("/api/models/"):
            self.reply(404, {"error": "Repository not found"}, "RepoNotFound")
        else:  # what the library wants to know of the Hub itself
            self.reply(404, {})

    def do_POST(self) -> None:
        hub = self.server
        content = self.rfile.read(int(self.headers["Content-Length"]))
        hub.asked.append((self.path, content, self.headers["Authorization"]))
        if hub.refuses:
            self.reply(403, {"error": f"not with {self.headers['Authorization']}"})
        elif self.path == "/api/repos/create":
            self.reply(200, {"url": f"{hub.address}/user/name", "name": "user/name"})
        elif self.path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif self.path == "/api/models/user/name/preupload/main":
            paths = [file["path"] for file in json.loads(content)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            self.reply(200, {"files": [{"path": path, **how} for path in paths]})
        else:
            assert self.path == "/api/models/user/name/commit/main"
            for line in content.splitlines():
                value = json.loads(line)["value"]
                if "path" in value:
                    hub.files[value["path"]] = base64.b64decode(value["content"])
            address = f"{hub.address}/user/name/commit/abc"
            self.reply(200, {"success": True, "commitOid": "abc", "commitUrl": address})

    def reply(self, status: int, value: dict[str, Any], error: str | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        if error is not None:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run of the command on text in a folder with a telling name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private").mkdir()
    Path("private/a|b.txt").write_text("the cat sat on the mat. " * 60)
    sizes = "--n-layer 1 --n-head 1 --n-embd 16 --block-size 16 --sample-tokens 0 --max-steps 3"
    data = ["--data", "private/a|b.txt", "--tokenizer", "byte", "--out", "run"]
    assert main(["train", *data, *sizes.split()]) == 0
    return tmp_path / "run"


def test_a_run_is_sent_with_its_card(
    hub: Hub, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    assert main(["convert", "run", "hf:user/name", "--private"]) == 0
    asked = [path for path, _, _ in hub.asked]
    assert asked[0] == "/api/repos/create" and asked[-1].endswith("/commit/main")
    created = json.loads(hub.asked[0][1])
    assert (created["name"], created["organization"]) == ("name", "user")
    assert created.get("visibility") == "private" or created.get("private") is True
    assert {token for _, _, token in hub.asked} == {f"Bearer {TOKEN}"}
    # Nothing of the run but the model: no optimizer, no settings with paths.
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files)
    assert not {name for name in hub.files if "optimizer" in name or "train" in name}
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in hub.files.items():
        (copy / name).write_bytes(content)
        assert str(tmp_path).encode() not in content
    same = GPT.from_pretrained(copy).state_dict(), GPT.from_pretrained(run).state_dict()
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[1])
    printed = capfd.readouterr()
    assert "done: " in printed.out and "user/name" in printed.out
    assert TOKEN not in printed.out + printed.err + caplog.text


def test_the_card_tells_the_run(hub: Hub, run: Path) -> None:
    assert main(["convert", "run", "hf:user/name", "--dtype", "bf16"]) == 0
    card = hub.files["README.md"].decode()
    facts = facts_of(run / "checkpoints/step-00000003")
    assert facts is not None and facts.loss is not None and facts.loss[0] == 3
    assert facts.data == ("a|b.txt",) and "private" not in card
    assert "| Data | a\\|b.txt |" in card
    assert f"| Steps | 3, with {facts.targets:,} targets |" in card
    assert f"| Validation loss | {facts.loss[1]:.4f} nats per token" in card
    assert f"gptfast-torch {version()}" in card and commit() in card
    assert 'AutoModelForCausalLM.from_pretrained("user/name")' in card
    assert "hf download user/name --local-dir name" in card
    _, front, _ = card.split("---\n", 2)
    values = dict(re.findall(r"^(\w+): (.*)$", front, re.M))
    assert values["pipeline_tag"] == '"text-generation"'


def test_facts_are_of_these_weights(hub: Hub, run: Path) -> None:
    """A model that was changed since it was loaded is not what the run's card would tell."""
    model = GPT.from_pretrained(run)
    model.save_pretrained("same", push_to_hub="user/name")
    assert "| Steps | 3," in Path("same/README.md").read_text()
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight.add_(1)
    model.save_pretrained("changed", push_to_hub="user/name")
    assert "| Training | not on record |" in Path("changed/README.md").read_text()
    model.save_pretrained("named", push_to_hub="user/name", run="run")
    assert "| Steps | 3," in Path("named/README.md").read_text()


def test_a_card_of_an_earlier_push_is_not_sent_again(hub: Hub, run: Path) -> None:
    """It would tell of other weights; but what somebody wrote or changed stays."""
    model = GPT.from_pretrained(run)
    model.save_pretrained("same", push_to_hub="user/name")
    card = Path("same/README.md")
    assert "| Steps | 3," in card.read_text()
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight.add_(1)
    model.save_pretrained("same", push_to_hub="user/name")
    assert b"| Training | not on record |" in hub.files["README.md"]
    for text in ("mine\n", card.read_text() + "mine\n", card.read_text().replace("record", "my")):
        card.write_text(text)
        model.save_pretrained("same", push_to_hub="user/name")
        assert hub.files["README.md"].decode() == text


def test_private_weights_go_to_no_open_repository(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.is_private = False
    assert main(["convert", "run", "hf:user/name", "--private"]) == 1
    assert "user/name is there already, and all can see it" in capsys.readouterr().err
    assert not hub.files
    assert main(["convert", "run", "hf:user/name"]) == 0
    assert "model.safetensors" in hub.files


def test_an_adapter_is_sent_for_a_base_that_others_have(hub: Hub, tmp_path: Path) -> None:
    model = random_model()
    add_adapters(model, AdapterConfig(2))
    with pytest.raises(ValueError, match="is on this machine only: send the whole model"):
        model.save_pretrained(tmp_path / "adapter", push_to_hub="user/name")
    assert not (tmp_path / "adapter").exists()
    assert model.adapter is not None
    for base in ("runs/gone", "./gone", "../a/b/c"):
        model.adapter = model.adapter.of_base(base, model.adapter.fingerprint)
        with pytest.raises(ValueError, match=f"{base}, is no model of the Hub .* the whole model"):
            model.save_pretrained(tmp_path / "adapter", push_to_hub="user/name")
    assert not (tmp_path / "adapter").exists() and not hub.asked
    model.adapter = model.adapter.of_base("user/base", model.adapter.fingerprint)
    model.save_pretrained(tmp_path / "of_theirs", push_to_hub="user/name")
    assert 'base_model: "user/base"' in hub.files.pop("README.md").decode()
    model.adapter = model.adapter.of_base("gpt2", model.adapter.fingerprint)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/model.safetensors").write_bytes(b"of another")
    model.save_pretrained(tmp_path / "adapter", push_to_hub="user/name")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == set(hub.files)
    card = hub.files["README.md"].decode()
    assert 'base_model: "gpt2"' in card and 'library_name: "peft"' in card
    assert 'PeftModel.from_pretrained(base, "user/name")' in card


def test_nothing_is_sent_unasked(hub: Hub, run: Path) -> None:
    assert main(["convert", "run", "saved"]) == 0
    GPT.from_pretrained("saved").save_pretrained("again")
    trainer = make_trainer(Path("other"), max_steps=1)
    trainer.fit()
    assert not hub.asked and not Path("saved/README.md").exists()


def test_the_token_is_in_no_message(
    hub: Hub, run: Path, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.refuses = True
    assert main(["convert", "run", "hf:user/name"]) == 1
    printed = capfd.readouterr()
    assert "user/name could not be sent to the Hub" in printed.err
    assert printed.err.count("\n") == 1
    assert TOKEN not in printed.out + printed.err + caplog.text
    as_transformers: Any = True
    with pytest.raises(ValueError, match="True is no repository of the Hub: name it as USER/NAME"):
        GPT.from_pretrained("run").save_pretrained("saved", push_to_hub=as_transformers)
    with pytest.raises(OSError) as error:
        GPT.from_pretrained("run").save_pretrained("saved", push_to_hub="user/name")
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["hf:name"], 1, "is no repository of the Hub: name it as USER/NAME"),
        (["hf:user/name/more"], 1, "is no repository of the Hub"),
        (["hf:user/name", "--to", "llm.c"], 2, "leave out --to"),
        (["hf:user/name", "--dtype", "int8"], 2, "not packed weights"),
        (["saved", "--private"], 2, "--private is for hf:USER/NAME"),
    ],
)
def test_refused(
    flags: list[str],
    code: int,
    said: str,
    hub: Hub,
    run: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["convert", "run", *flags]) == code
    assert said in capsys.readouterr().err
    assert not hub.asked
