"""The engine gives the model's logits by the parity rule, gives each token the same bits in any
batch, and leaves no memory behind."""

import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from helpers import (
    random_ids,
    random_model,
)
from parity import DTYPES as TORCH_DTYPES
from parity import assert_parity
from seeds import shifted, torch_generator
from torch import Tensor

from gptfast import GPT, AdamW, generate, get_tokenizer
from gptfast.data.embedded import embedded_text
from gptfast.data.tokens import as_tokens
from gptfast.engine import Engine
from gptfast.engine.rows import MAX_STEP_TOKENS
from gptfast.evaluate.loss import sliding_score, text_score
from gptfast.generate import generate_text, stream_text
from gptfast.generation.decoder import Job
from gptfast.generation.options import Options
from gptfast.ops.backend import EXTENSION

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")
DTYPES = ("fp32", "bf16", "int8", "int4")
SHAPES = {
    "D=12": {},
    "D=16, one head": {"n_head": 1, "n_embd": 16},
    "D=64": {"n_embd": 128, "block_size": 200},
    "D=80": {"n_embd": 160},
    "D=128": {"n_embd": 128, "n_head": 1},
    "no bias, untied, V prime": {"qkv_bias": False, "tie_weights": False, "vocab_size": 257},
    "C=50": {"n_head": 5, "n_embd": 50},
}
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 7},
    "penalty": {"repetition_penalty": 1.5, "seed": 3},
}


def logits_of(model: GPT, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0]


@pytest.fixture
def model() -> GPT:
    return random_model(block_size=64, vocab_size=211).eval()


def prompts(*lengths: int, vocab_size: int = 211) -> list[list[int]]:
    return [random_ids(n, vocab_size=vocab_size, seed=n).tolist() for n in lengths]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_logits_by_the_parity_rule(engine_isa: str, dtype: str, shape: str) -> None:
    model = random_model(**SHAPES[shape]).eval()
    sizes = {"vocab_size": model.config.vocab_size}
    texts = [random_ids(model.config.block_size, seed=n, **sizes).tolist() for n in range(8)]
    tested, engine = TORCH_DTYPES[dtype], Engine(model, dtype)

    def every(logits: Callable[[list[int]], Tensor]) -> Tensor:
        return torch.stack([logits(ids) for ids in texts])

    out = every(engine.logits)
    plain = every(partial(logits_of, model.to(tested)))
    # The model's weights are now rounded to the dtype, like the engine's.
    ref = every(partial(logits_of, model.double()))
    assert_parity("logits", out.to(tested), ref, plain)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.03), ("int4", 0.3)])
def test_whole_numbers_are_near(engine_isa: str, shape: str, dtype: str, share: float) -> None:
    """Rounding weights to 1/127 of a row's maximum and inputs to 1/127 of a group's costs 1%;
    rounding weights to 1/15 of a group's range costs ten times as much."""
    model = random_model(std=0.08, **SHAPES[shape]).eval()
    ids = random_ids(model.config.block_size, vocab_size=model.config.vocab_size).tolist()
    out, ref = Engine(model, dtype).logits(ids), logits_of(model, ids)
    assert (out - ref).std() < share * ref.std()


def test_int4_is_the_nearest_of_sixteen_numbers() -> None:
    """csrc/engine.h describes the groups. Rounding a minimum to bf16 costs up to 1/256 of it."""
    model = random_model(n_embd=64, n_head=2, vocab_size=32).eval()
    with torch.no_grad():
        model.wte.weight[:, 32:] += 0.3
        model.wte.weight[5] = 0.25
    groups = Engine(model, "int4").packed.data[: 2 * 640].view(2, 640)  # wte is the first matrix
    numbers = groups[:, :512].reshape(2, 4, 1, 32, 4)
    halves = torch.cat([numbers & 15, numbers >> 4], 2)  # (groups, eights, halves, outputs, 4)
    q = halves.permute(3, 0, 1, 2, 4).reshape(32, 2, 32).float()
    scale, minimum = (
        groups[:, 512:].contiguous().view(torch.bfloat16).view(2, 2, 32).float().unbind(1)
    )
    scale, minimum = scale.T[..., None], minimum.T[..., None]
    off = (q * scale + minimum - model.wte.weight.detach().view(32, 2, 32)).abs()
    assert (off <= 0.75 * scale + minimum.abs() / 256).all()
    assert off.pow(2).mean() < 0.6 * scale.pow(2).mean() / 6
    assert (q.amax(-1) == 15).float().mean() > 0.7 and (off[5] < 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_however_computed(engine_isa: str, dtype: str, model: GPT) -> None:
    """A prompt gets the same bits whole, by token, in pieces, in a batch and with more threads."""
    ids, others = prompts(50)[0], prompts(1, 13, 33, 7)
    engine = Engine(model, dtype)
    rows = engine.rows
    whole = engine.logits(ids)
    one, pieces, beside = rows.new(), rows.new(), rows.new()
    with torch.inference_mode():
        alone = torch.cat([rows.forward([one], [[i]])[0] for i in ids])
        cuts = [0, 1, 4, 17, 19, 31, 50]
        parts = [ids[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        cut = torch.cat([rows.forward([pieces], [part], [len(part)])[0] for part in parts])
        more = [rows.new() for _ in others]
        batch, _ = rows.forward([*more[:2], beside, *more[2:]], [*others[:2], ids, *others[2:]])
    assert torch.equal(alone, whole) and torch.equal(cut, whole)
    assert torch.equal(batch[2], whole[-1])
    for n in (2, 3, 8):
        torch.set_num_threads(n)
        assert torch.equal(engine.logits(ids), whole)


def test_prompts_longer_than_a_chunk(model: GPT) -> None:
    model = random_model(block_size=2 * MAX_STEP_TOKENS + 100).eval()
    ids = random_ids(2 * MAX_STEP_TOKENS + 50).tolist()
    engine = Engine(model)
    row = engine.rows.new()
    with torch.inference_mode():
        logits, _ = engine.rows.forward([row], [ids])
    assert torch.equal(logits[0], engine.logits(ids)[-1])


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_alone_in_any_batch_and_streamed(dtype: str, name: str, model: GPT) -> None:
    """The rule holds past block_size too, where rows are recomputed at each token."""
    asked, options = prompts(1, 2, 30, 63, 64, 70, 5, 5), SAMPLING[name]
    engine = Engine(model, dtype, max_batch=3)
    rows = engine.generate(asked, 20, **options)
    for prompt, row in zip(asked, rows, strict=True):
        assert engine.generate([prompt], 20, **options) == [row]
        assert [*prompt, *engine.stream(prompt, 20, **options)] == row
    if dtype == "fp32":
        assert rows == generate(model, asked, 20, **options)


def test_rows_with_different_options(model: GPT) -> None:
    engine, asked = Engine(model, max_batch=2), prompts(3, 9, 20)
    options = {"temperature": [0.0, 0.7, 1.5], "top_k": [3, 50, 9], "seed": [1, 2, 3]}
    options["repetition_penalty"] = [1.0, 1.4, 2.0]
    rows = engine.generate(asked, 15, **options)
    for n, prompt in enumerate(asked):
        one = {name: values[n] for name, values in options.items()}
        assert engine.generate([prompt], 15, **one) == [rows[n]]


def test_100_000_tokens_leave_nothing_behind() -> None:
    model = random_model(block_size=64, n_layer=1, vocab_size=211).eval()
    engine = Engine(model, "int8", max_batch=16)
    asked = prompts(*range(1, 60)) * 4
    lengths = [1 + n * 7 % 60 for n in range(len(asked))]  # the caller ends each there
    wanted = {}
    sizes = []
    tokens = 0
    while tokens < 100_000:
        rows: dict[int, list[int]] = {n: [] for n in range(len(asked))}
        for request, token in engine.draw(Job(asked, 60, Options(seed=5))):
            rows[request.index].append(token.id)
            request.done = len(rows[request.index]) == lengths[request.index]
            tokens += 1
        wanted = wanted or rows
        assert rows == wanted
        with open("/proc/self/statm") as file:
            sizes.append(int(file.read().split()[1]))
    assert max(sizes[1:]) <= 1.01 * sizes[1]
    for n in (0, 17, 58, 200):
        alone = engine.generate([asked[n]], lengths[n], seed=5)[0]
        assert alone == asked[n] + wanted[n]
    held = sum(len(engine.rows.ids[row]) for row in engine._ended)
    assert held <= 64
    for row in engine._ended:
        engine.rows.release(row)
    assert len(engine.rows._free) == engine.rows._n_slots and not any(engine.rows._users)


def test_a_common_prefix_is_computed_once(model: GPT) -> None:
    engine = Engine(model, max_batch=8)
    common = prompts(40)[0]
    asked = [[*common, *p] for p in prompts(3, 5, 9, 1)]
    rows = engine.generate(asked, 6, temperature=0.0)
    assert rows == [Engine(model).generate([p], 6, temperature=0.0)[0] for p in asked]
    # The cache holds the common part once, and each row's own part.
    assert engine.rows._n_slots - len(engine.rows._free) < 40 + sum(map(len, asked)) - 4 * 40 + 30
    assert engine.stats.prompt_tokens == 40 + 3 + 5 + 9 + 1


def test_earlier_turns_are_not_computed_again(model: GPT) -> None:
    engine = Engine(model)
    said = engine.generate(prompts(20), 6, temperature=0.0)[0]
    before = engine.stats.prompt_tokens
    follow_up = said + [7, 8]
    rows = engine.generate([follow_up], 4, temperature=0.0)
    assert rows == Engine(model).generate([follow_up], 4, temperature=0.0)
    assert engine.stats.prompt_tokens - before == 3  # the last drawn token and two new ones


def test_beams_share_their_common_tokens(model: GPT) -> None:
    engine, prompt = Engine(model), prompts(30)[0]
    most = 0
    real = engine.rows.forward

    def forward(*args: Any, **options: Any) -> Any:
        nonlocal most
        result = real(*args, **options)
        most = max(most, engine.rows._n_slots - len(engine.rows._free))
        return result

    engine.rows.forward = forward
    found = engine.generate([prompt], 12, num_beams=4)
    assert found == generate(model, [prompt], 12, num_beams=4)
    assert most <= 30 + 4 * 12
    assert engine.rows._n_slots == len(engine.rows._free)


def test_a_stream_that_is_left_frees_its_row(model: GPT) -> None:
    engine = Engine(model)
    ids = engine.stream(prompts(5)[0], 50, seed=1)
    next(ids)
    ids.close()
    assert sum(map(len, engine.rows.ids)) <= 64 and len(engine._ended) == 1
    assert engine.rows.ids[engine._ended[0]][:5] == prompts(5)[0]


def test_threads_take_turns(model: GPT) -> None:
    engine, asked = Engine(model, max_batch=2), prompts(3, 7, 12, 20, 40, 9)
    wanted = [engine.generate([p], 30, seed=2)[0] for p in asked]
    found: dict[int, list[int]] = {}

    def one(n: int) -> None:
        found[n] = asked[n] + list(engine.stream(asked[n], 30, seed=2))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(asked))] == wanted


def test_an_interrupted_prompt_is_not_kept(model: GPT) -> None:
    """If a prompt is interrupted between its pieces, no later prompt reuses its tokens."""
    model = random_model(block_size=3 * MAX_STEP_TOKENS).eval()
    engine, prompt = Engine(model), random_ids(2 * MAX_STEP_TOKENS + 10).tolist()
    step, calls = engine.rows._step, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*args)

    engine.rows._step = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.generate([prompt], 4, temperature=0.0)
    assert engine.rows._n_slots == len(engine.rows._free) and not engine._ended
    assert engine.generate([prompt], 4, temperature=0.0) == Engine(model).generate(
        [prompt], 4, temperature=0.0
    )


def test_an_error_leaves_the_engine_free(model: GPT) -> None:
    engine = Engine(model)
    with pytest.raises(IndexError):
        engine.losses([1, 2, 3], torch.tensor([1, 2, 999]))
    with ThreadPoolExecutor(1) as pool:
        assert len(pool.submit(engine.logits, [1, 2]).result(timeout=20)) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_not_locked_out(model: GPT) -> None:
    engine = Engine(model)
    wanted = engine.generate(prompts(5), 4, temperature=0.0)
    with engine._lock:  # held by a thread that the child does not have
        child = os.fork()
        if not child:
            os._exit(0 if engine.generate(prompts(5), 4, temperature=0.0) == wanted else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_nan_token_leaves_earlier_logits_alone(model: GPT) -> None:
    model = random_model(tie_weights=False, block_size=64).eval()
    with torch.no_grad():
        model.wte.weight[5] = torch.nan
    for dtype in DTYPES:
        engine = Engine(model, dtype)
        logits = engine.logits([1, 2, 3, 5])
        assert torch.equal(logits[:3], engine.logits([1, 2, 3])) and logits[3].isnan().all()


@pytest.fixture
def parrot() -> GPT:
    """Return a model that repeats itself: its head prefers the token it has just read."""
    model = random_model(seed=3, std=0.05, block_size=128, vocab_size=97).eval()
    with torch.no_grad():
        model.wte.weight.mul_(8)
        model.wpe.weight.mul_(0.1)
    return model


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("by", ["lookup", "draft"])
def test_guesses_change_nothing(parrot: GPT, by: str, name: str) -> None:
    asked = prompts(4, 30, 90, 11, vocab_size=97)
    asked[1] *= 2
    options = {**SAMPLING[name], "logprobs": True, "top_logprobs": 2}
    wanted = Engine(parrot, max_batch=3).generate(asked, 60, **options)
    engine = Engine(parrot, max_batch=3)
    guess = {"lookup": True} if by == "lookup" else {"draft": Engine(parrot, "int8")}
    assert engine.generate(asked, 60, **options, **guess) == wanted
    if name != "penalty" or by == "draft":
        assert engine.stats.accepted > 20
        assert engine.stats.steps < engine.stats.new_tokens


def test_guesses_end_where_the_row_does(parrot: GPT) -> None:
    engine, prompt = Engine(parrot), prompts(20, vocab_size=97)[0] * 2
    free = engine.generate([prompt], 40, temperature=0.0)[0]
    eos = free[60]
    cut = engine.generate([prompt], 40, temperature=0.0, eos_id=eos, lookup=True)[0]
    assert cut == engine.generate([prompt], 40, temperature=0.0, eos_id=eos)[0]
    for n in range(1, 9):
        assert engine.generate([prompt], n, temperature=0.0, lookup=True)[0] == free[: 40 + n]


def test_a_useless_draft(model: GPT) -> None:
    other = Engine(random_model(seed=9, n_layer=1, block_size=20, vocab_size=211), "int8")
    engine, asked = Engine(model), prompts(5, 18, 40)
    wanted = engine.generate(asked, 30, seed=4)
    assert engine.generate(asked, 30, seed=4, draft=other) == wanted


def test_logprobs_are_the_logits(model: GPT) -> None:
    engine, prompt = Engine(model), prompts(9)[0]
    rows, chosen, tops = engine.generate([prompt], 12, seed=1, logprobs=True, top_logprobs=4)
    logprobs = engine.logits(rows[0][:-1])[8:].log_softmax(-1)
    assert chosen[0] == [logprobs[t, i].item() for t, i in enumerate(rows[0][9:])]
    for t, top in enumerate(tops[0]):
        values, ids = logprobs[t].topk(4)
        assert top == list(zip(ids.tolist(), values.tolist(), strict=True))
    streamed = list(engine.stream(prompt, 12, seed=1, top_logprobs=4))
    assert streamed == list(zip(rows[0][9:], chosen[0], tops[0], strict=True))


def test_scores_are_the_models(model: GPT) -> None:
    tokens = random_ids(1000, vocab_size=211)
    tokenizer = get_tokenizer("byte")
    sizes = {"max_length": 64, "batch_size": 4}
    ours, theirs = (text_score(x, tokens, tokenizer, **sizes) for x in (Engine(model), model))
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert (ours.n_tokens, ours.n_bytes) == (theirs.n_tokens, theirs.n_bytes)
    ours, theirs = (
        sliding_score(x, tokens, tokenizer, stride=20, **sizes) for x in (Engine(model), model)
    )
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)


def test_int8_costs_half_a_percent_of_perplexity_at_most_and_int4_two() -> None:
    """Train a small model, then compare perplexities on text that was held back."""
    tokenizer = get_tokenizer("byte")
    tokens = as_tokens(embedded_text()[:200_000], tokenizer)
    torch.manual_seed(shifted(0))
    model = random_model(std=0.02, vocab_size=tokenizer.n_vocab, block_size=64, n_embd=64)
    optimizer = AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        at = torch.randint(180_000, (16, 1), generator=torch_generator(step))
        window = tokens[at + torch.arange(65)]
        model(window[:, :-1], window[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    sizes = {"max_length": 64, "batch_size": 16}
    plain, int8, int4 = (
        text_score(x, tokens[180_000:190_000], tokenizer, **sizes)
        for x in (model.eval(), Engine(model, "int8"), Engine(model, "int4"))
    )
    assert plain.loss < 0.75 * math.log(tokenizer.n_vocab)  # it has learnt something
    assert abs(int8.loss - plain.loss) < 0.005 and abs(int4.loss - plain.loss) < 0.02


def test_text_from_an_engine(model: GPT) -> None:
    tokenizer = get_tokenizer("byte")
    model = random_model(vocab_size=tokenizer.n_vocab, block_size=64).eval()
    engine = Engine(model)
    whole = generate_text(engine, tokenizer, "abc", 30, temperature=0.7, seed=2)
    assert whole == generate_text(model, tokenizer, "abc", 30, temperature=0.7, seed=2)
    pieces = stream_text(engine, tokenizer, "abc", 30, temperature=0.7, seed=2)
    assert "abc" + "".join(pieces) == whole
