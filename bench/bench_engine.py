"""`gptfast.Engine` against llama.cpp, CTranslate2 and transformers, and against itself.

Shapes: GPT-2 124M with random weights, 128 new tokens after a prompt of 32, or a prompt of 512 and
one token. What the weights are does not matter to the time; that they are not GPT-2's first ones
does to the check: matrices in blocks are 3 times as large, so that greedy text is not one id
repeated. No two prompts begin alike: the engine keeps the keys and values of those it has seen.

Bytes counted: every matrix once a token (the tied head's included) in the case's precision, read
only; scales, vectors, keys and values not. FLOPs counted: 2 per parameter of a matrix, token and
row; of a prompt, the head's for its last token alone.

Checked: each id that a side writes has, in `GPT`'s own fp32 logits of the text so far, the largest
logit up to `SLACK`. A wrong id lacks 4 standard deviations and more.

Random weights do not repeat a text, and what a lookup gains is decided by how much of one they do.
The model of that row has the same shape and is trained here until it knows by heart a function of
the standard library followed by the same function with two names changed. It stands for a model
that was asked for such an edit; the share of guesses that came true is printed. The run that `make
train` left, if it is there, shows what a small model that knows nothing of the text gains.
"""

import atexit
import colorsys
import inspect
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from harness import Case, Pair, both_sides
from peers import BATCH, PRECISIONS, Peer
from timing import OWN_PROCESSES

from gptfast import GPT, AdamW, Engine, GPTConfig, get_tokenizer

PROMPT, LONG = 32, 512
ITEM_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
SLACK = {"fp32": 0.02, "bf16": 0.3, "int8": 0.6}
"""Standard deviations of the logits by which rounding may cost an id its first place."""
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
    ("int8", "CTranslate2", BATCH, 1.5),
    ("int8", "llama.cpp", BATCH, 1.5),
)
"""Precision, peer, rows, target."""
PREFILL = tuple((p, name) for p in ITEM_BYTES for name, known in PRECISIONS.items() if p in known)


@cache
def _directory() -> Path:
    kept = tempfile.TemporaryDirectory()
    atexit.register(kept.cleanup)
    return Path(kept.name)


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
"""A prompt's first id, which no other of the process has: what any call computed serves none."""


def _texts(B: int, T: int) -> Iterator[Prompts]:
    """Prompts without end, for both sides; no id is the last, which CTranslate2 skips."""
    generator = torch.Generator().manual_seed(1)
    while True:
        prompts = torch.randint(50256, (B, T), generator=generator).tolist()
        yield [[next(_first_ids) % 50256, *prompt[1:]] for prompt in prompts]


@contextmanager
def _computes(engine: Engine, tokens: int) -> Iterator[None]:
    """AssertionError unless so many tokens of prompts are computed meanwhile."""
    before = engine.stats.prompt_tokens
    yield
    computed = engine.stats.prompt_tokens - before
    assert computed == tokens, f"{computed} tokens of prompts were computed, not {tokens}"


def _check_greedy(model: GPT, prompts: Prompts, new: Prompts, slack: float) -> None:
    """AssertionError for an id that is not the model's choice after what stands before it."""
    for prompt, ids in zip(prompts, new, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + ids[:-1]]))[0, len(prompt) - 1 :]  # (n, V)
        of_ids = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
        lack = ((logits.amax(1) - of_ids) / logits.std(1)).max().item()
        assert lack <= slack, f"an id lacks {lack:.3g} standard deviations of its logits"


def _greedy_pair(
    config: GPTConfig, precision: str, name: str, B: int, T: int, n: int
) -> Callable[[], Pair]:
    def build() -> Pair:
        engine, theirs = _engine(config, precision), _peer(config, name, precision)
        texts = _texts(B, T)

        def ours(prompts: Prompts) -> Prompts:
            return [row[T:] for row in engine.generate(prompts, n, temperature=0.0)]

        def peer(prompts: Prompts) -> Prompts:
            return theirs.greedy(prompts, n) if n > 1 else [[theirs.prefill(prompts[0])]]

        def check() -> None:
            prompts = next(texts)
            with _computes(engine, B * T):
                results = [side(prompts) for side in (ours, peer)]
            for new in results:
                assert all(len(ids) == n for ids in new)
                _check_greedy(_model(config), prompts, new, SLACK[precision])

        return Pair(lambda: ours(next(texts)), lambda: peer(next(texts)), check)

    return build


def _sampling_pair(config: GPTConfig, precision: str, n: int) -> Callable[[], Pair]:
    def build() -> Pair:
        engine = _engine(config, precision)
        texts, seeds = _texts(1, PROMPT), itertools.count()

        def ours() -> Prompts:
            return engine.generate(next(texts), n, seed=next(seeds), **SAMPLING)

        def peer() -> Prompts:
            return engine.generate(next(texts), n, temperature=0.0)

        def check() -> None:
            for side in (ours, peer):
                with _computes(engine, PROMPT):
                    side()
            prompts = next(texts)
            first, again, other = (
                engine.generate(prompts, n, seed=seed, **SAMPLING) for seed in (0, 0, 1)
            )
            assert first == again != other, "a seed does not decide what is drawn"

        return Pair(ours, peer, check)

    return build


def _code(tokenizer_name: str) -> tuple[list[int], list[int]]:
    """A function of the standard library, and the same with two names changed."""
    tokenizer = get_tokenizer(tokenizer_name)
    source = inspect.getsource(colorsys.rgb_to_hsv)
    edited = re.sub(r"\bmaxc\b", "value", re.sub(r"\bh\b", "hue", source))
    return tokenizer.encode(source), tokenizer.encode(edited)


@cache
def _knows_by_heart(config: GPTConfig) -> GPT:
    """A model trained on the function and its edit alone, whatever the first id."""
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
        # The first id is drawn anew each time, so what follows it cannot be known.
        if loss.item() < 0.02:
            return model.eval()
    raise RuntimeError(f"the model still has a loss of {loss.item():.3g} after 400 steps")


def _lookup_pair(
    load: Callable[[], Engine], code: Callable[[Engine], tuple[list[int], list[int]]], n: int
) -> Callable[[], Pair]:
    """The first text and the beginning of the second as the prompt."""

    def build() -> Pair:
        engine = load()
        source, edited = code(engine)
        # All that the model sees, so that the first id is among it.
        prompt = (source + edited[:8])[-engine.config.block_size :]

        def generate(first: int, lookup: bool) -> Prompts:
            prompts = [[first % engine.config.vocab_size, *prompt[1:]]]
            return engine.generate(prompts, n, temperature=0.0, lookup=lookup)

        def check() -> None:
            for side in (ours, peer):
                with _computes(engine, len(prompt)):
                    side()
            first = next(_first_ids)
            guessed, accepted = engine.stats.guessed, engine.stats.accepted
            same = generate(first, True) == generate(first, False)
            assert same, "the lookup changes what is written"
            guessed, accepted = engine.stats.guessed - guessed, engine.stats.accepted - accepted
            print(f"[{accepted} of {guessed} guesses came true]", end=" ", file=sys.stderr)

        ours = lambda: generate(next(_first_ids), True)  # noqa: E731
        peer = lambda: generate(next(_first_ids), False)  # noqa: E731
        return Pair(ours, peer, check)

    return build


def _cold_start_pair(config: GPTConfig) -> Callable[[], Pair]:
    """From the shell to the first token, the files in the page cache."""

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
            n_bytes=ITEM_BYTES[precision] * (in_blocks + V * C) * n,
            flops=2 * B * (in_blocks + V * C) * n if precision == "fp32" else 0,
            target=target,
            reads_only=True,
            tokens=B * n,
        )
    for precision, name in PREFILL:
        yield Case(
            "prefill",
            f"{LONG} tokens {precision}",
            shape,
            f"{name} {PRECISIONS[name][precision]}",
            _greedy_pair(config, precision, name, 1, LONG, 1),
            n_bytes=ITEM_BYTES[precision] * (in_blocks + V * C),
            # The limit is that of an fp32 GEMM.
            flops=2 * (in_blocks * LONG + V * C) if precision == "fp32" else 0,
            target=1.2,
            reads_only=True,
        )


def _own_cases(config: GPTConfig, shape: str, n: int) -> Iterator[Case]:
    for precision, target in (("fp32", 0.98), ("int8", 0.95)):
        yield Case(
            "draw",
            f"{n} tokens {precision} temperature, top_k, top_p",
            shape,
            "our own greedy",
            _sampling_pair(config, precision, n),
            target=target,
            tokens=n,
        )
    by_heart = _lookup_pair(
        lambda: Engine(_knows_by_heart(config), dtype="fp32"), lambda engine: _code("gpt2"), n
    )
    own = "our own without"
    yield Case("lookup", f"{n} tokens fp32", f"{shape}, by heart", own, by_heart, 0, 0, 1.8)
    if RUN.exists():
        trained = _lookup_pair(
            lambda: Engine(RUN), lambda engine: _code(engine.tokenizer_name or "gpt2"), 64
        )
        yield Case("lookup", "64 tokens fp32", "make train's model", own, trained)
    cold = _cold_start_pair(config)
    yield Case("first token", "cold, packed int8", shape, "import torch", cold, target=0.667)


def cases(quick: bool) -> Iterator[Case]:
    """GPT-2 124M, or a model of 4 layers and width 256."""
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
