"""Measure `gptfast.Engine` against llama.cpp, CTranslate2 and transformers, and against itself.

Shapes: GPT-2 124M with random weights; 128 new tokens after a prompt of 32, or one token after a
prompt of 512. The values of the weights do not change the time, but they matter to the check: the
matrices of the blocks are 3 times as large as at the start of training, so that greedy text is not
one id repeated. No two prompts begin with the same id, because the engine keeps the keys and values
of prompts it has seen.

Bytes counted per token: every matrix once, with the tied head, in the case's precision; they are
only read. Scales, vectors, keys and values are not counted. FLOPs counted per token and row: 2 for
each parameter of a matrix; in a prompt the head counts for the last token only. No int8 product is
measured as a limit, so int8 prefill has no share.

Check: each id that a side generates must have the largest logit in `GPT`'s fp32 logits of the text
so far, up to MAX_LACK. A wrong id lacks 4 standard deviations or more.

Lookup gains where a text repeats what it has said, and random weights do not. So that row's model
has the same shape but is trained here until it has memorised a function of the standard library
followed by the same function with two names changed. It stands for a model that was asked for such
an edit; the share of accepted guesses is printed. If `make train` has left a run, a second row
shows the gain of a small model that does not know the text. Both sides of both rows compute their
whole prompt, which the check verifies.
"""

import atexit
import colorsys
import inspect
import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from harness import Case, Pair, both_sides, kept_directory
from limits import DTYPES
from peers import MAX_ROWS, PRECISIONS, Peer
from timing import OWN_PROCESSES

from gptfast import GPT, AdamW, Engine, GPTConfig, get_tokenizer

PROMPT, LONG_PROMPT = 32, 512
ITEM_BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5}
MAX_LACK = {"fp32": 0.02, "bf16": 0.3, "int8": 0.6, "int4": 2.0}
"""How far below the largest logit rounding may put an id, in standard deviations of the logits."""
SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}
RUN = Path(__file__).parents[1] / "runs" / "train"

Prompts = list[list[int]]

DECODE = (
    ("fp32", "llama.cpp", 1, 1.1),
    ("fp32", "transformers", 1, 1.4),
    ("bf16", "llama.cpp", 1, 1.35),
    ("bf16", "transformers", 1, 2.7),
    ("int8", "llama.cpp", 1, 2.7),
    ("int8", "CTranslate2", 1, 3.5),
    ("int8", "CTranslate2", MAX_ROWS, 1.5),
    ("int8", "llama.cpp", MAX_ROWS, 1.5),
    ("int4", "llama.cpp", 1, 1.2),
)
"""The decode cases: precision, peer, rows, target."""
PREFILL = tuple(
    (p, name) for p in ("fp32", "bf16", "int8") for name in PRECISIONS if p in PRECISIONS[name]
)


_directory = cache(kept_directory)


@cache
def _model(config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("h.") and parameter.dim() == 2:
                parameter.mul_(3)
    return model


@cache
def _engine(config: GPTConfig, precision: str) -> Engine:
    return Engine(_model(config), dtype=precision)


@cache
def _peer(config: GPTConfig, name: str, precision: str) -> Peer:
    peer = Peer(name, _model(config), precision, _directory())
    OWN_PROCESSES.add(peer.process.pid)
    atexit.register(peer.close)
    return peer


_first_ids = itertools.count()
"""First ids of prompts: each is used once, so that no prompt is served from an earlier one."""


def _endless_prompts(B: int, T: int) -> Iterator[Prompts]:
    """Yield prompts without end, for both sides, without the last id: CTranslate2 skips it."""
    generator = torch.Generator().manual_seed(1)
    while True:
        prompts = torch.randint(50256, (B, T), generator=generator).tolist()
        yield [[next(_first_ids) % 50256, *prompt[1:]] for prompt in prompts]


@contextmanager
def _computing(engine: Engine, tokens: int) -> Iterator[None]:
    """Raise AssertionError unless the engine computes exactly `tokens` tokens of prompts."""
    before = engine.stats.prompt_tokens
    yield
    computed = engine.stats.prompt_tokens - before
    assert computed == tokens, f"{computed} tokens of prompts were computed, not {tokens}"


def _check_greedy(model: GPT, prompts: Prompts, new: Prompts, max_lack: float) -> None:
    """Raise AssertionError for an id that is not the model's choice after the text before it."""
    for prompt, ids in zip(prompts, new, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + ids[:-1]]))[0, len(prompt) - 1 :]  # (n, V)
        of_ids = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
        lack = ((logits.amax(1) - of_ids) / logits.std(1)).max().item()
        assert lack <= max_lack, f"an id lacks {lack:.3g} standard deviations of its logits"


def _greedy_pair(
    config: GPTConfig, precision: str, name: str, B: int, T: int, n: int
) -> Callable[[], Pair]:
    def build() -> Pair:
        engine, theirs = _engine(config, precision), _peer(config, name, precision)
        texts = _endless_prompts(B, T)

        def ours(prompts: Prompts) -> Prompts:
            return [row[T:] for row in engine.generate(prompts, n, temperature=0.0)]

        def peer(prompts: Prompts) -> Prompts:
            return theirs.greedy(prompts, n) if n > 1 else [[theirs.prefill(prompts[0])]]

        def check() -> None:
            prompts = next(texts)
            with _computing(engine, B * T):
                results = [side(prompts) for side in (ours, peer)]
            for new in results:
                assert all(len(ids) == n for ids in new)
                _check_greedy(_model(config), prompts, new, MAX_LACK[precision])

        return Pair(lambda: ours(next(texts)), lambda: peer(next(texts)), check)

    return build


def _int4_pair(config: GPTConfig, n: int) -> Callable[[], Pair]:
    """Return decoding one row in int4 against int8."""

    def build() -> Pair:
        texts = _endless_prompts(1, PROMPT)

        def new_ids(precision: str, prompts: Prompts) -> Prompts:
            rows = _engine(config, precision).generate(prompts, n, temperature=0.0)
            return [row[PROMPT:] for row in rows]

        def check() -> None:
            for precision in ("int4", "int8"):
                prompts = next(texts)
                new = new_ids(precision, prompts)
                _check_greedy(_model(config), prompts, new, MAX_LACK[precision])

        ours = lambda: new_ids("int4", next(texts))  # noqa: E731
        peer = lambda: new_ids("int8", next(texts))  # noqa: E731
        return Pair(ours, peer, check)

    return build


def _sampling_pair(config: GPTConfig, precision: str, n: int) -> Callable[[], Pair]:
    def build() -> Pair:
        engine = _engine(config, precision)
        texts, seeds = _endless_prompts(1, PROMPT), itertools.count()

        def ours() -> Prompts:
            return engine.generate(next(texts), n, seed=next(seeds), **SAMPLING)

        def peer() -> Prompts:
            return engine.generate(next(texts), n, temperature=0.0)

        def check() -> None:
            for side in (ours, peer):
                with _computing(engine, PROMPT):
                    side()
            prompts = next(texts)
            first, again, other = (
                engine.generate(prompts, n, seed=seed, **SAMPLING) for seed in (0, 0, 1)
            )
            assert first == again != other, "the seed does not decide which ids are sampled"

        return Pair(ours, peer, check)

    return build


def _code(tokenizer_name: str) -> tuple[list[int], list[int]]:
    """Return a function of the standard library, and the same with two names changed."""
    tokenizer = get_tokenizer(tokenizer_name)
    source = inspect.getsource(colorsys.rgb_to_hsv)
    edited = re.sub(r"\bmaxc\b", "value", re.sub(r"\bh\b", "hue", source))
    return tokenizer.encode(source), tokenizer.encode(edited)


@cache
def _memorised(config: GPTConfig) -> GPT:
    """Return a model trained on the function and its edit alone, after any first id."""
    torch.manual_seed(0)
    model, lr = GPT(config), 0.768 / config.n_embd
    optimizer = AdamW(model.parameters(), lr=lr, weight_decay=0.0, max_norm=1.0)
    ids, target = torch.tensor([sum(_code("gpt2"), [])]).repeat(2, 1, 1)  # (1, T) each
    target = torch.cat((target[:, 1:], torch.full((1, 1), -100)), 1)
    for step in range(400):
        ids[:, 0] = torch.randint(config.vocab_size, (1,))
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 20)
        loss = model(ids, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.02:
            return model.eval()
    raise RuntimeError(f"the model still has a loss of {loss.item():.3g} after 400 steps")


def _lookup_pair(
    load: Callable[[], Engine], code: Callable[[Engine], tuple[list[int], list[int]]], n: int
) -> Callable[[], Pair]:
    """Return decoding with lookup against decoding without, `n` tokens.

    The prompt is the first text and the beginning of the second, cut at the front so that the new
    tokens fit the model's context: past it each token recomputes its window, with lookup or not.
    """

    def build() -> Pair:
        engine = load()
        source, edited = code(engine)
        prompt = (source + edited[:8])[n - engine.config.block_size :]

        def generate(first: int, lookup: bool) -> Prompts:
            prompts = [[first % engine.config.vocab_size, *prompt[1:]]]
            return engine.generate(prompts, n, temperature=0.0, lookup=lookup)

        def check() -> None:
            for side in (ours, peer):
                with _computing(engine, len(prompt)):
                    side()
            first = next(_first_ids)
            guessed, accepted = engine.stats.guessed, engine.stats.accepted
            same = generate(first, True) == generate(first, False)
            assert same, "lookup changes the generated ids"
            guessed, accepted = engine.stats.guessed - guessed, engine.stats.accepted - accepted
            print(f"[{accepted} of {guessed} guesses accepted]", end=" ", file=sys.stderr)

        ours = lambda: generate(next(_first_ids), True)  # noqa: E731
        peer = lambda: generate(next(_first_ids), False)  # noqa: E731
        return Pair(ours, peer, check)

    return build


def _cold_start_pair(config: GPTConfig) -> Callable[[], Pair]:
    """Return the time from the shell to the first token, with the files in the page cache."""

    def build() -> Pair:
        gptfast = str(Path(sys.executable).with_name("gptfast"))
        checkpoint, packed = _directory() / "checkpoint", _directory() / "packed"
        _model(config).save_pretrained(checkpoint, tokenizer=get_tokenizer("gpt2"))

        def run(*command: object) -> str:
            done = subprocess.run(
                list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True
            )
            return done.stdout

        def ours() -> str:
            prompt = ("--prompt", "The first token", "--max-new-tokens", 1)
            return run(gptfast, "generate", packed, *prompt)

        run(gptfast, "convert", checkpoint, packed, "--dtype", "int8")
        peer = lambda: run(sys.executable, "-c", "import torch")  # noqa: E731

        def check() -> None:
            assert ours().startswith("The first token")

        return Pair(ours, peer, check)

    return build


def _greedy_cases(config: GPTConfig, shape: str, n: int) -> Iterator[Case]:
    C, V = config.n_embd, config.vocab_size
    in_blocks = config.n_layer * 12 * C**2
    for precision, name, B, target in DECODE:
        yield Case(
            "decode",
            f"{n} tokens {precision}",
            f"{shape} B={B}",
            f"{name} {PRECISIONS[name][precision]}",
            _greedy_pair(config, precision, name, B, PROMPT, n),
            n_bytes=int(ITEM_BYTES[precision] * (in_blocks + V * C) * n),
            flops=2 * B * (in_blocks + V * C) * n if precision in DTYPES else 0,
            target=target,
            reads_only=True,
            working_set=int(ITEM_BYTES[precision] * (in_blocks + V * C)),
            products="bf16" if precision == "bf16" else "fp32",
            tokens=B * n,
        )
    for precision, name in PREFILL:
        yield Case(
            "prefill",
            f"{LONG_PROMPT} tokens {precision}",
            shape,
            f"{name} {PRECISIONS[name][precision]}",
            _greedy_pair(config, precision, name, 1, LONG_PROMPT, 1),
            # A long prompt is bound by products, and no int8 product is measured.
            flops=2 * (in_blocks * LONG_PROMPT + V * C) if precision in DTYPES else 0,
            target=1.2,
            products="bf16" if precision == "bf16" else "fp32",
        )


def _own_cases(config: GPTConfig, shape: str, n: int) -> Iterator[Case]:
    # Not all of decode's cases have a peer: half of the bytes should take two thirds of the time.
    yield Case(
        "decode",
        f"{n} tokens int4",
        f"{shape} B=1",
        "gptfast int8",
        _int4_pair(config, n),
        target=1.5,
        tokens=n,
    )
    for precision, target in (("fp32", 0.98), ("int8", 0.95)):
        yield Case(
            "sample",
            f"{n} tokens {precision}, temperature, top_k, top_p",
            shape,
            "gptfast greedy",
            _sampling_pair(config, precision, n),
            target=target,
            tokens=n,
        )
    memorised = _lookup_pair(
        lambda: Engine(_memorised(config), dtype="fp32"), lambda engine: _code("gpt2"), n
    )
    case, without = f"{n} tokens fp32", "gptfast without lookup"
    yield Case("lookup", case, f"{shape}, memorised text", without, memorised, target=1.8)
    if RUN.exists():
        trained = _lookup_pair(
            lambda: Engine(RUN), lambda engine: _code(engine.tokenizer_name or "gpt2"), 64
        )
        yield Case("lookup", "64 tokens fp32", "make train's model", without, trained)
    cold = _cold_start_pair(config)
    yield Case("first token", "cold, packed int8", shape, "import torch", cold, target=0.667)


def cases(quick: bool) -> Iterator[Case]:
    """Yield the cases of GPT-2 124M, or of a model of 4 layers and width 256."""
    config, shape, n = GPTConfig(), "GPT-2 124M", 128
    if quick:
        config, shape, n = GPTConfig(n_layer=4, n_head=4, n_embd=256), "4 layers of 256", 64
    yield from _greedy_cases(config, shape, n)
    yield from _own_cases(config, shape, n)


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=False)))
def test_engine(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    pair.check()
    benchmark(getattr(pair, side))
