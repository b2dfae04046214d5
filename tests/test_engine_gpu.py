"""Compare the engine's rows on a device with the plain model, alone and in changing batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import GPU
from helpers import (
    random_ids,
    random_model,
)
from torch import Tensor

from gptfast import GPT, Engine, generate, get_tokenizer, use_backend
from gptfast.engine import gpu_rows as gpu
from gptfast.engine.gpu_model import GpuModel
from gptfast.engine.gpu_rows import GraphRows, gpu_rows
from gptfast.engine.sequences import EngineSequences
from gptfast.generation.options import Options
from gptfast.kernels.reference.decode_linear import quantize

both = pytest.mark.parametrize("backend", ["reference", "triton"], indirect=True)
needs_gpu = pytest.mark.skipif(not GPU, reason="CUDA graphs and bf16 kernels need a GPU")
SAMPLED = {"temperature": 1.2, "top_k": 9, "top_p": 0.9, "seed": [3, 4, 5]}


def lively_model(**changes: Any) -> GPT:
    """Return a model in which positions weigh more than tokens, so greedy text keeps changing."""
    with torch.device("cpu"):
        model = random_model(std=0.4, **changes).eval()
    with torch.no_grad():
        model.wpe.weight.mul_(3)
        model.ln_f.bias.zero_()
    return model


def on_device(model: GPT, dtype: torch.dtype = torch.float32) -> GPT:
    """Return a copy on the device where the kernels run."""
    with torch.device("cpu"):
        copy = GPT(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.to("cuda" if GPU else "cpu", dtype).eval()


def expected(model: GPT, prompts: Sequence[Sequence[int]], n: int, **options: Any) -> list:
    """Generate on the reference path: the plain model with its cache, on the CPU."""
    with torch.device("cpu"), use_backend("reference"):
        return generate(model, [list(p) for p in prompts], n, **options)


@torch.no_grad()
def all_logits(model: GPT, ids: Sequence[int]) -> Tensor:
    with torch.device("cpu"), use_backend("reference"):
        return model(torch.tensor([list(ids)]))[0].float()  # (T, V)


def prompts_of(*lengths: int) -> list[list[int]]:
    with torch.device("cpu"):
        return [random_ids(n, seed=n).tolist() for n in lengths]


class Loop:
    """Generates several rows together, each to its own length, as the engine does."""

    def __init__(self, rows: GraphRows, prompts: Sequence[list[int]], **options: Any) -> None:
        self.rows, self.texts = rows, [list(p) for p in prompts]
        asked = Options(**{"temperature": 0.0, **options})
        self._sampling = [*asked.sampling(len(prompts), rows.device).values()]
        self._row: dict[int, int] = {}
        self._live: tuple[int, ...] = ()
        self.lacking: Tensor | None = None

    def step(self, *live: int) -> None:
        """Add a token to each of these texts; a new text's whole prompt is computed first."""
        size, new = self.rows.block_size, []
        for i in live:
            text = self.texts[i]
            if i not in self._row:
                self._row[i] = self.rows.start(text[-size:])
                new.append(text[-size:][len(self.rows.ids[self._row[i]]) :])
            else:
                new.append(text[-1:])
        if live != self._live:
            self._live, self._chosen = live, [one[list(live)] for one in self._sampling]
        positions = [len(self.texts[i]) for i in live]
        rows = [self._row[i] for i in live]
        logits, ids = self.rows.forward(rows, new, None, self._chosen, positions, self.lacking)
        assert logits.shape[0] == len(live) and logits.dtype == torch.float32
        for i, drawn in zip(live, ids.tolist(), strict=True):
            self.texts[i].append(drawn)

    def end(self, i: int) -> None:
        self.rows.release(self._row.pop(i))


@both
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_ids_are_the_references(backend: str, options: dict[str, Any]) -> None:
    """Generate from unequal prompts in one batch, two of which slide past block_size."""
    model, prompts = lively_model(), prompts_of(3, 11, 14)
    loop = Loop(gpu_rows(on_device(model), "fp32", 4), prompts, **options)
    for _ in range(5):
        loop.step(0, 1, 2)
    assert loop.texts == expected(model, prompts, 5, **{"temperature": 0.0, **options})


@both
def test_rows_come_and_go(backend: str) -> None:
    model, prompts = lively_model(qkv_bias=False, tie_weights=False), prompts_of(2, 5, 7, 4)
    loop = Loop(gpu_rows(on_device(model), "fp32", 4), prompts)
    loop.step(0)
    loop.step(1)
    loop.step(2)
    loop.step(0, 1, 2)
    loop.step(2, 1)  # in another order, while row 0 rests
    loop.end(1)
    loop.step(3)
    loop.step(3, 0)
    loop.step(0, 2, 3)
    loop.step(2)
    assert loop.texts == [
        expected(model, [prompt], len(text) - len(prompt), temperature=0.0)[0]
        for prompt, text in zip(prompts, loop.texts, strict=True)
    ]


def test_a_step_begun_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """After two equal steps the next is begun early; a change costs one step and no wrong token."""
    model, prompts = lively_model(), prompts_of(2, 3, 4)
    loop, steps = Loop(gpu_rows(on_device(model), "fp32", 4), prompts, **SAMPLED), []
    launch = gpu._Step.launch
    monkeypatch.setattr(gpu._Step, "launch", lambda step: steps.append(step._n) or launch(step))
    counts = []
    for live in [(0, 1)] * 6 + [(1, 0), (1, 0), (1, 0, 2), (1, 0, 2), (1, 0, 2)]:
        loop.step(*live)
        counts.append(len(steps))
    # A prompt launches no step, the first step one, and the second also the next; so do new rows.
    assert counts == [0, 1, 3, 4, 5, 6, 7, 9, 9, 10, 12]
    # Replace row 1's last token: the step that was begun must not be used.
    row = loop._row[1]
    loop.rows.truncate(row, len(loop.rows.ids[row]) - 1)
    loop.texts[1][-2:] = [(loop.texts[1][-2] + 1) % 61]
    loop.step(1, 0, 2)
    seeds = [SAMPLED["seed"][i] for i in (1,)]
    text = loop.texts[1]
    assert expected(model, [text[:-1]], 1, **{**SAMPLED, "seed": seeds}) == [text]


@both
def test_ids_that_are_lacking(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps with ids to leave out are begun ahead too, and change when these ids do."""
    model, prompts = lively_model(), prompts_of(2, 3)
    loop, steps = Loop(gpu_rows(on_device(model), "fp32", 4), prompts), []
    launch = gpu._Step.launch
    monkeypatch.setattr(gpu._Step, "launch", lambda step: steps.append(step._n) or launch(step))
    texts, counts, n_excluded = [list(prompt) for prompt in prompts], [], 0
    V = model.config.vocab_size
    masks = [torch.arange(V, device=loop.rows.device) % 3 != rest for rest in range(2)]
    for lacking in (*[masks[0]] * 3, masks[1], None, None, masks[1]):
        loop.lacking = lacking
        loop.step(0, 1)
        counts.append(len(steps))
        for text in texts:
            logits = all_logits(model, text[-model.config.block_size :])[-1]
            best = int(logits.argmax())
            if lacking is not None:
                logits[lacking.cpu()] = -torch.inf
            text.append(int(logits.argmax()))
            n_excluded += text[-1] != best
        assert loop.texts == texts
    assert n_excluded > 4
    # The second equal step begins the next one, whose tokens are of no use to other ids.
    assert counts == [0, 1, 3, 4, 5, 7, 9]


@both
def test_several_tokens_and_truncate(backend: str) -> None:
    """Logits of several tokens per row are right, in a batch or alone; truncation drops tokens."""
    model, (a, b, other) = lively_model(), prompts_of(9, 12, 6)
    rows = gpu_rows(on_device(model), "fp32", 2)
    first, second = rows.new(), rows.new()
    logits, ids = rows.forward([first, second], [a[:4], b[:3]], [2, 3])
    assert not len(ids)
    wanted = torch.cat([all_logits(model, a[:4])[2:], all_logits(model, b[:3])])
    torch.testing.assert_close(logits.cpu(), wanted, rtol=1e-4, atol=1e-4)
    rows.forward([second, first], [other, other], [0, 1])
    rows.truncate(first, 4)
    rows.truncate(second, 3)
    assert (rows.ids[first], rows.ids[second]) == (a[:4], b[:3])
    logits, _ = rows.forward([second, first], [b[3:], a[4:]], [9, 5])
    wanted = torch.cat([all_logits(model, b)[3:], all_logits(model, a)[4:]])
    torch.testing.assert_close(logits.cpu(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [1, 3, 14], ids="wanted-{}".format)
def test_chunks(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MAX_STEP_TOKENS", 4)
    model, (prompt,) = lively_model(), prompts_of(14)
    rows = gpu_rows(on_device(model), "fp32", 1)
    logits, _ = rows.forward([rows.new()], [prompt], [n])
    wanted = all_logits(model, prompt)[-n:]
    torch.testing.assert_close(logits.cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_rows_alone_where_they_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MAX_TOKENS_TO_BATCH", 2)
    model, prompts = lively_model(), prompts_of(3, 8)
    loop = Loop(gpu_rows(on_device(model), "fp32", 2), prompts)
    loop.step(0, 1)
    loop.step(0, 1)
    assert loop.texts == expected(model, prompts, 2, temperature=0.0)


def test_forks_and_more_rows_than_at_first() -> None:
    model, (prompt,) = lively_model(), prompts_of(8)
    rows = gpu_rows(on_device(model), "fp32", 1)
    first = rows.start(prompt)
    assert rows.ids[first] == []
    rows.forward([first], [prompt])
    assert rows.ids[rows.start(prompt[:5] + [60, 59])] == prompt[:5]
    assert rows.ids[rows.start(prompt)] == prompt[:7]
    forks = [rows.fork(first, n) for n in (3, None, 6)]
    assert [rows.ids[row] for row in forks] == [prompt[:3], prompt, prompt[:6]]
    logits, _ = rows.forward([*forks, first], [[i] for i in (5, 6, 7, 8)])
    texts = [prompt[:3] + [5], prompt + [6], prompt[:6] + [7], prompt + [8]]
    wanted = torch.stack([all_logits(model, text)[-1] for text in texts])
    torch.testing.assert_close(logits.cpu(), wanted, rtol=1e-4, atol=1e-4)
    for row in forks:
        rows.release(row)
    assert rows.ids[forks[1]] == []


@both
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_int8_is_the_rounded_model(backend: str, tied: bool) -> None:
    """The plain model with the same rounded matrices generates the same text."""
    model = lively_model(tie_weights=tied)
    with torch.device("cpu"):
        rounded = lively_model(tie_weights=False)
    state = model.state_dict()
    state.setdefault("lm_head.weight", model.head_weight.detach())
    for name, weight in state.items():
        if weight.dim() == 2 and name not in ("wte.weight", "wpe.weight"):
            values, scale = quantize(weight)
            state[name] = values * scale[:, None]
    rounded.load_state_dict(state)
    prompts = prompts_of(3, 9, 5)
    rows = GraphRows(GpuModel(on_device(model), "int8", torch.float32), 4)
    loop = Loop(rows, prompts)
    for _ in range(6):
        loop.step(0, 1, 2)
    assert loop.texts == expected(rounded, prompts, 6, temperature=0.0)


def test_the_weights_are_a_copy() -> None:
    model, prompts = lively_model(), prompts_of(4)
    mine = on_device(model)
    loop = Loop(gpu_rows(mine, "fp32", 1), prompts)
    with torch.no_grad():
        for p in mine.parameters():
            p.zero_()
    loop.step(0)
    assert loop.texts == expected(model, prompts, 1, temperature=0.0)


def test_weight_bytes() -> None:
    model = lively_model(tie_weights=False)
    V, C, layers = 61, 24, 2
    matrices, biases, norms = layers * 12 * C * C + V * C, layers * 9 * C, (2 * layers + 1) * 2 * C
    assert GpuModel(model, "fp32").weight_bytes == 4 * (matrices + biases + norms)
    assert GpuModel(model, "bf16").weight_bytes == 2 * (matrices + biases + norms)
    scales = layers * 9 * C + V
    assert GpuModel(model, "int8").weight_bytes == matrices + 2 * (biases + norms) + 4 * scales
    tied = GpuModel(lively_model(), "fp32")
    assert tied.head.weight is tied.wte


def test_another_dtype() -> None:
    with pytest.raises(ValueError, match="dtype must be one of fp32, bf16, int8, got 'fp8'"):
        gpu_rows(lively_model(), "fp8", 1)


@pytest.fixture
def engine(cpp: None) -> Iterator[Engine]:
    model = lively_model()
    with torch.device("cpu"):
        engine = Engine(model, max_batch=3)
        engine.rows = gpu_rows(model, "fp32", 3)
        engine.model = model
        yield engine


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0, "lookup": True},
        {"repetition_penalty": 1.7, "seed": 7},
        {"num_beams": 3},
        {"top_p": 0.8, "seed": 2, "eos_id": 7},
    ],
    ids=["lookup", "penalty", "beams", "eos"],
)
def test_engine(engine: Engine, options: dict[str, Any]) -> None:
    prompts = prompts_of(3, 9, 5, 4, 12)
    plain = {name: value for name, value in options.items() if name != "lookup"}
    assert engine.generate(prompts, 8, **options) == expected(engine.model, prompts, 8, **plain)


def test_engine_logprobs(engine: Engine) -> None:
    prompts = prompts_of(3, 9)
    ids, logprobs = engine.generate(prompts, 6, logprobs=True, seed=1)
    wanted_ids, wanted = expected(engine.model, prompts, 6, logprobs=True, seed=1)
    assert ids == wanted_ids
    torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(wanted), rtol=1e-4, atol=1e-4)


def test_engine_without_ids_that_the_tokenizer_lacks(cpp: None) -> None:
    """The steps sample themselves, as they do with all ids: they may become one CUDA graph."""
    model, prompts = lively_model(vocab_size=400), prompts_of(3, 9, 5)
    options = {"temperature": 0.8, "seed": 4, "tokenizer": get_tokenizer("byte")}
    with torch.device("cpu"):
        engine = Engine(model, max_batch=3)
        engine.rows = gpu_rows(model, "fp32", 3)
        texts = engine.generate(prompts, 8, **options)
    assert texts == expected(model, prompts, 8, **options)
    assert texts != expected(model, prompts, 8, temperature=0.8, seed=4)
    assert all(lacks_ids for _, lacks_ids in engine.rows._steps)


def test_sequences_select() -> None:
    model, prompts = lively_model(), prompts_of(4, 6)
    with torch.device("cpu"):
        sequences = EngineSequences(gpu_rows(model, "fp32", 2), prompts)
        sequences.logits()
        sequences.select(torch.tensor([1, 0, 1]))
        sequences.append(torch.tensor([5, 6, 7]))
        texts = [prompts[1] + [5], prompts[0] + [6], prompts[1] + [7]]
        wanted = torch.stack([all_logits(model, text)[-1] for text in texts])
        torch.testing.assert_close(sequences.logits(), wanted, rtol=1e-4, atol=1e-4)
        sequences.close()


@needs_gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_replay_is_the_eager_step(triton: str, dtype: str) -> None:
    """Captured steps give the same ids and logits as eager ones, bit for bit."""
    model = on_device(lively_model(n_embd=64, block_size=64))
    captured, eager = gpu_rows(model, dtype, 4), gpu_rows(model, dtype, 4)
    eager.captures = False
    texts, lacking = [], torch.arange(model.config.vocab_size) % 3 == 0
    for rows in (captured, eager):
        loop = Loop(rows, prompts_of(3, 9, 5), **SAMPLED)
        loop.step(0, 1, 2)
        for live in ((0, 1, 2),) * 4 + ((2, 0), (1,), (1, 0, 2), (2,)):
            loop.lacking = lacking if len(live) == 3 else None
            loop.step(*live)
        texts.append(loop.texts)
    assert texts[0] == texts[1]
    logits = [rows.forward([0, 1], [[5], [6]])[0].clone() for rows in (captured, eager)]
    assert torch.equal(*logits)


@needs_gpu
def test_graphs_are_captured_again_when_the_cache_grows(triton: str) -> None:
    model, prompts = lively_model(), prompts_of(3, 9, 5)
    loop = Loop(gpu_rows(on_device(model), "fp32", 1), prompts)
    for live in ((0,), (0,), (1,), (0, 1), (2,), (0, 1, 2), (0, 1, 2)):
        loop.step(*live)
    assert loop.texts == [
        expected(model, [prompt], len(text) - len(prompt), temperature=0.0)[0]
        for prompt, text in zip(prompts, loop.texts, strict=True)
    ]


@needs_gpu
def test_bf16_is_near_the_plain_model(triton: str) -> None:
    """Logits are at most twice as far from fp32 as PyTorch's, for a prompt and single tokens."""
    model, (prompt,) = lively_model(n_embd=64, block_size=64), prompts_of(40)
    exact = all_logits(model, prompt)
    plain = on_device(model, torch.bfloat16)(torch.tensor([prompt]))[0].float().cpu()
    rows = gpu_rows(on_device(model), "bf16", 1)
    row = rows.new()
    ours = [rows.forward([row], [prompt[:20]], [20])[0].cpu()]
    ours += [rows.forward([row], [[i]])[0].cpu() for i in prompt[20:]]
    error, limit = (torch.cat(ours) - exact).abs().max(), (plain - exact).abs().max()
    assert error <= 2 * limit


@needs_gpu
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"num_beams": 2}, {"seed": 5}], ids=str)
def test_engine_of_a_model_on_a_gpu(triton: str, options: dict[str, Any]) -> None:
    model, prompts = lively_model(), prompts_of(3, 9, 5)
    engine = Engine(on_device(model), "fp32", max_batch=2)
    assert isinstance(engine.rows, GraphRows)
    assert engine.weight_bytes == GpuModel(model, "fp32").weight_bytes
    assert engine.generate(prompts, 8, **options) == expected(model, prompts, 8, **options)
