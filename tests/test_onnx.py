"""ONNX: onnxruntime gives the logits of GPT, for a prompt, with padding and for the steps after."""

import contextlib
import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Capture, refused, run
from helpers import hide_library, random_ids, random_model

from gptfast import GPT
from gptfast.cli import main
from gptfast.weights import onnx as writer
from gptfast.weights.convert import save

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "fp16": (torch.float16, {"tie_weights": False, "qkv_bias": False}),
}
# So many products in a row round their sums; the longest sum has so many terms.
PRODUCTS, TERMS = 9, 4 * 24


@pytest.fixture(scope="module", params=CASES)
def written(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Path]:
    """A model, in another dtype and with other parameters in each case, and what convert wrote."""
    dtype, changes = CASES[request.param]
    directory = tmp_path_factory.mktemp("onnx")
    path, model = directory / "m.onnx", random_model(**changes)
    model.save_pretrained(directory / "a")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert not main(["convert", str(directory / "a"), str(path), "--dtype", request.param])
    assert f"in {path} (onnx)\nthe file holds no vocabulary" in out.getvalue()
    assert sorted(p.name for p in directory.iterdir()) == ["a", "m.onnx"]
    return model.to(dtype).eval(), path


class Session:
    """onnxruntime on a file, with the cache between calls."""

    def __init__(self, path: Path, model: GPT, B: int) -> None:
        runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        self._session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._names = [i.name for i in self._session.get_inputs() if i.name.startswith("past")]
        c = model.config
        empty = torch.zeros(B, c.n_head, 0, c.n_embd // c.n_head, dtype=model.wte.weight.dtype)
        self.past = dict.fromkeys(self._names, empty.numpy())
        self.mask = torch.zeros(B, 0, dtype=torch.int64)

    def logits(self, idx: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits (B, T, V) of tokens (B, T) after those before. visible: (B, T)."""
        visible = torch.ones_like(idx) if visible is None else visible
        self.mask = torch.cat([self.mask, visible], 1)
        position = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -idx.shape[1] :]
        given = {"input_ids": idx, "attention_mask": self.mask, "position_ids": position}
        feeds = {name: tensor.numpy() for name, tensor in given.items()}
        logits, *present = self._session.run(None, {**feeds, **self.past})
        self.past = dict(zip(self._names, present, strict=True))
        return torch.from_numpy(logits)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    unit = torch.finfo(expected.dtype).eps
    limit = PRODUCTS * math.sqrt(TERMS) * unit * expected.float().abs().max().item()
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=limit)


@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 5), (3, 7)])
def test_a_prompt_and_its_continuation(written: tuple[GPT, Path], B: int, T: int) -> None:
    """Steps of several tokens and of one, from the cache that the step before returned."""
    model, path = written
    session, idx = Session(path, model, B), random_ids(B, T + 6)
    with torch.no_grad():
        expected = model(idx)
    found = [session.logits(part) for part in idx.split([T, 2, 1, 1, 2], dim=1)]
    close(torch.cat(found, 1), expected)
    shapes = {value.shape for value in session.past.values()}
    assert shapes == {(B, model.config.n_head, T + 6, model.config.n_embd // model.config.n_head)}


def test_padding_before_a_prompt(written: tuple[GPT, Path]) -> None:
    """What the mask hides changes nothing, in the prompt and in the step after it."""
    model, path = written
    session, idx = Session(path, model, 2), random_ids(2, 6)
    visible = torch.ones_like(idx)
    visible[1, :3] = 0
    first = session.logits(idx, visible)
    step = session.logits(random_ids(2, 1, seed=2))
    assert first.isfinite().all()
    with torch.no_grad():
        whole = torch.cat([idx, random_ids(2, 1, seed=2)], 1)
        close(torch.cat([first[:1], step[:1]], 1), model(whole[:1]))
        close(torch.cat([first[1:, 3:], step[1:]], 1), model(whole[1:, 3:]))


def test_the_pages_example(written: tuple[GPT, Path]) -> None:
    """docs/weights.md's lines give the logits of a prompt, and its last three inputs the next."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, path = written
    page = Path(__file__).parents[1] / "docs/weights.md"
    (code,) = re.findall(r"^```py\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    for old, new in {
        "tuned/model.onnx": str(path),
        "[[464, 1988]]": "[[5, 9]]",
        "np.float32": f"np.{model.wte.weight.numpy(force=True).dtype}",
    }.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/weights.md", "exec"), names)
    step = {"input_ids": [[7]], "attention_mask": [[1, 1, 1]], "position_ids": [[2]]}
    feeds = {name: torch.tensor(ids).numpy() for name, ids in step.items()} | names["past"]
    found = [names["logits"], names["session"].run(None, feeds)[0]]
    with torch.no_grad():
        expected = model(torch.tensor([[5, 9, 7]]))
    close(torch.cat([torch.from_numpy(logits) for logits in found], 1), expected)


def test_large_products_in_fp16() -> None:
    """Queries times keys may be beyond fp16 where they are not once divided by the root of D."""
    model = random_model().eval()
    with torch.no_grad():
        for block in model.h:
            block.attn.c_attn.bias[: 2 * model.config.n_embd] = 90.0
    state = {name: p.half() for name, p in model.state_dict().items()}
    decoder, idx = writer._decoder(model.config, state), random_ids(1, 5)
    empty = torch.zeros(1, model.config.n_head, 0, 12, dtype=torch.float16)
    past = [(empty, empty)] * model.config.n_layer
    logits, _ = decoder(idx, torch.ones_like(idx), torch.arange(5)[None], past)
    assert 12 * 90**2 > torch.finfo(torch.float16).max and logits.isfinite().all()


def test_the_graph(written: tuple[GPT, Path]) -> None:
    """It is valid, of ONNX's own operators, with free sizes, and names no file of this machine."""
    model, path = written
    graph = onnx.load(path)
    onnx.checker.check_model(graph, full_check=True)
    assert {node.domain for node in graph.graph.node} == {""}
    layers = range(model.config.n_layer)
    cache = [f"{i}.{part}" for i in layers for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids"]
    past, present = ([f"{kind}.{n}" for n in cache] for kind in ("past_key_values", "present"))
    assert [value.name for value in graph.graph.input] == [*inputs, *past]
    assert [value.name for value in graph.graph.output] == ["logits", *present]
    sizes = {v.name: [d.dim_param for d in v.type.tensor_type.shape.dim] for v in graph.graph.input}
    assert sizes["input_ids"] == ["batch", "sequence"]
    assert sizes["past_key_values.1.value"] == ["batch", "", "past", ""]
    assert b"weights/onnx.py" not in path.read_bytes()


def test_large_weights_stand_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of protobuf holds 2 GiB: the weights of a larger model are in another."""
    monkeypatch.setattr(writer, "_MAX_FILE_BYTES", 0)
    model = random_model(n_layer=1).eval()
    path = tmp_path / "m.onnx"
    save(model.config, model.state_dict(), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert path.with_name("m.onnx.data").stat().st_size > 4 * model.wte.weight.numel()
    idx = random_ids(1, 4)
    with torch.no_grad():
        close(Session(path, model, 1).logits(idx), model(idx))
    path.unlink()
    with pytest.raises(ValueError, match="m.onnx.data exists; name another or delete it"):
        save(model.config, model.state_dict(), path)


def test_refusals(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random_model().save_pretrained("a")
    refused(run(capsys, "convert", "a", "m.onnx", "--dtype", "bf16"), "fp32 or fp16", "dtype")
    refused(run(capsys, "convert", "a", "m.onnx", "--dtype", "int8"), "onnx has no int8 weights")
    refused(run(capsys, "convert", "a", "m.onnx", "--dtype", "q8_0"), "only GGUF has")
    refused(run(capsys, "convert", "a", "m.onnx", "--to", "llm.c"), "no .onnx file")
    hide_library(monkeypatch, "onnx")
    refused(run(capsys, "convert", "a", "m.onnx"), "needs onnx: pip install", "[onnx]")
    assert sorted(path.name for path in Path().iterdir()) == ["a"]


def test_it_is_no_checkpoint(written: tuple[GPT, Path], capsys: Capture) -> None:
    refused(run(capsys, "generate", written[1], "--prompt", "a"), "m.onnx is not a checkpoint")
