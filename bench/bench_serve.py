"""Measure `gptfast serve` with many clients against llama.cpp's Python server and the engine.

Shapes: GPT-2 124M with random weights, int8 (Q8_0 at llama.cpp); 128 new tokens after prompts of 32
to 512 tokens, which no two begin alike; 1, 8 and 32 clients, each of which sends its next prompt
when it has all of the last reply. All replies are streams, greedy, without an end. Both servers and
the clients are processes of this machine and share its cores; a server that is not measured is
stopped. llama-cpp-python[server] computes one request at a time, the others wait.

Rows: "serve" is the time of a whole load of prompts; of the same loads, "first text" is the median
and the 99th percentile of the time from a request to its first text, and "next token" the median of
the mean time between a request's tokens. "gptfast.Engine" is the engine's own time for such a load
in one call, with as many rows as there are clients, up to 16.
"""

import atexit
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from bench_engine import _model as random_model
from clients import Server, Times, free_port, python
from harness import Case, Pair, both_sides
from peers import write_gguf

from gptfast import Engine, GPTConfig, get_tokenizer

MAX_BATCH = 16
CLIENTS = ((1, 2), (8, 2), (32, 1))
"""The numbers of clients, and the prompts that each sends in a load."""
SHORTEST, LONGEST = 32, 512
PEER = "llama-cpp-python[server] Q8_0"


@cache
def _directory() -> Path:
    kept = tempfile.TemporaryDirectory()
    atexit.register(kept.cleanup)
    return Path(kept.name)


@cache
def _ours(config: GPTConfig) -> Server:
    path, port, tokenizer = _directory() / "packed", free_port(), get_tokenizer("gpt2")
    Engine(random_model(config), dtype="int8").save(path, tokenizer=tokenizer)
    flags = ("--port", port, "--threads", torch.get_num_threads(), "--max-batch", MAX_BATCH)
    return _kept(Server(python("gptfast", "serve", path, *flags), port, {"ignore_eos": True}))


@cache
def _peer(config: GPTConfig) -> Server:
    path, port = _directory() / "Q8_0.gguf", free_port()
    write_gguf(random_model(config), path, "Q8_0", get_tokenizer("gpt2").transformers_files())
    n, threads = config.block_size, torch.get_num_threads()
    flags = {"model": path, "port": port, "n_ctx": n, "n_threads": threads, "verbose": False}
    # By default a new request would break the one before off.
    flags |= {"n_threads_batch": threads, "flash_attn": True, "interrupt_requests": False}
    argv = [text for name, value in flags.items() for text in (f"--{name}", value)]
    without_end = {"logit_bias": {str(get_tokenizer("gpt2").eot): -100.0}}
    return _kept(Server(python("llama_cpp.server", *argv), port, without_end))


def _kept(server: Server) -> Server:
    atexit.register(server.close)
    return server


@cache
def _engine(config: GPTConfig, max_batch: int) -> Engine:
    return Engine(random_model(config), dtype="int8", max_batch=max_batch)


@cache
def _text() -> list[int]:
    return get_tokenizer("gpt2").encode(" ".join(topics.values()))


def _prompts(n: int, rng: random.Random) -> list[str]:
    """Return n prompts whose lengths are spread evenly over the logarithms of their range."""
    tokenizer, prompts = get_tokenizer("gpt2"), []
    for i in range(n):
        length = round(SHORTEST * (LONGEST / SHORTEST) ** ((i + 0.5) / n)) - 4
        start = rng.randrange(len(_text()) - length)
        text = tokenizer.decode(_text()[start : start + length])
        prompts.append(f"{rng.randrange(10**8):08d} {text}")
    rng.shuffle(prompts)
    return prompts


class Load:
    """The same kind of load for both servers and the engine, and the times that clients noted."""

    def __init__(self, config: GPTConfig, clients: int, n: int, tokens: int) -> None:
        self.config, self.clients, self.n, self.tokens = config, clients, n, tokens
        self.rng = random.Random(0)
        self.times: dict[str, list[Times]] = {"ours": [], "peer": []}

    def ours(self) -> None:
        self._answer("ours", _ours(self.config))

    def peer(self) -> None:
        self._answer("peer", _peer(self.config))

    def engine(self) -> None:
        """Compute a load in one call of the engine."""
        engine = _engine(self.config, min(MAX_BATCH, self.clients))
        ids = [get_tokenizer("gpt2").encode(text) for text in _prompts(self.n, self.rng)]
        engine.generate(ids, self.tokens, temperature=0.0)

    def _answer(self, side: str, server: Server) -> None:
        prompts = _prompts(self.n, self.rng)
        self.times[side] += server.answer(prompts, self.tokens, self.clients)

    def against_peer(self) -> Pair:
        return Pair(self.ours, self.peer, lambda: None)  # clients raise if a token is missing

    def against_engine(self) -> Pair:
        return Pair(self.ours, self.engine, lambda: None)

    def noted(self, measure: Callable[[Sequence[Times]], float]) -> Callable[[], Pair]:
        """Return a pair whose sides return a measure of what clients noted so far."""

        def build() -> Pair:
            ours, peer = self.times["ours"], self.times["peer"]
            return Pair(lambda: measure(ours), lambda: measure(peer), lambda: None)

        return build


def _first(share: float) -> Callable[[Sequence[Times]], float]:
    def measure(times: Sequence[Times]) -> float:
        found = sorted(one.first for one in times)
        return found[min(len(found) - 1, int(share * len(found)))]

    return measure


def _between(tokens: int) -> Callable[[Sequence[Times]], float]:
    return lambda times: statistics.median(one.between(tokens) for one in times)


def cases(quick: bool) -> Iterator[Case]:
    """Yield the cases of GPT-2 124M, or of a model of 4 layers and width 256."""
    config, shape, tokens = GPTConfig(), "GPT-2 124M", 128
    if quick:
        config, shape, tokens = GPTConfig(n_layer=4, n_head=4, n_embd=256), "4 layers of 256", 64
    for clients, each in CLIENTS:
        load = Load(config, clients, clients * each, tokens)
        name = f"{tokens} tokens int8, prompts of {SHORTEST} to {LONGEST}"
        shape_of = f"{shape}, {clients} client{'s' * (clients > 1)}"
        n, target = load.n * tokens, 2.0 if clients > 1 else 0.0
        yield Case("serve", name, shape_of, PEER, load.against_peer, target=target, tokens=n)
        for op, measure in (
            ("first text, median", _first(0.5)),
            ("first text, 99%", _first(0.99)),
            ("next token, median", _between(tokens)),
        ):
            yield Case(op, name, shape_of, PEER, load.noted(measure), returns_cost=True)
        own = Load(config, clients, clients * each, tokens)
        yield Case(
            "serve", name, shape_of, "gptfast.Engine", own.against_engine, target=0.9, tokens=n
        )


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=False)))
def test_serve(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    benchmark(getattr(pair, side))
