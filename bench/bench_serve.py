"""Measure `gptfast serve` with many clients against other servers and the engine.

Shapes: GPT-2 124M with random weights, int8 (Q8_0 at llama.cpp); 128 new tokens after prompts of 32
to 512 tokens, which no two begin alike; 1, 8 and 32 clients, each of which sends its next prompt
when it has all of the last reply. All replies are streams, greedy, without an end. The servers and
the clients are processes of this machine and share its cores; a server that is not measured is
stopped. llama-cpp-python[server] computes one request at a time, the others wait. CTranslate2 runs
behind the application of `gptfast serve` and computes as many requests at a time as there are
threads (see ctranslate2_server.py); its rows are left out where it is not installed.

Rows: "serve" is the time of a whole load of prompts; of the same loads, "first text" is the median
and the 99th percentile of the time from a request to its first text, and "next token" the median of
the mean time between a request's tokens. "gptfast.Engine" is the engine's own time for such a load
in one call, with as many rows as there are clients, up to 16.
"""

import atexit
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from bench_engine import _model as random_model
from clients import Answered, Server, Times, free_port, python
from harness import Case, Pair, both_sides, kept_directory
from peers import PeerDied, write_ctranslate2, write_gguf

from gptfast import Engine, GPTConfig, get_tokenizer

MAX_BATCH = 16
CLIENTS = ((1, 2), (8, 2), (32, 1))
"""The numbers of clients, and the prompts that each sends in a load."""
SHORTEST, LONGEST = 32, 512

_directory = cache(kept_directory)


@cache
def _gptfast(config: GPTConfig) -> Server:
    path, port, tokenizer = _directory() / "packed", free_port(), get_tokenizer("gpt2")
    Engine(random_model(config), dtype="int8").save(path, tokenizer=tokenizer)
    flags = ("--port", port, "--threads", torch.get_num_threads(), "--max-batch", MAX_BATCH)
    return _kept(Server(python("-m", "gptfast", "serve", path, *flags), port, {"ignore_eos": True}))


@cache
def _llama(config: GPTConfig) -> Server:
    path, port = _directory() / "Q8_0.gguf", free_port()
    write_gguf(random_model(config), path, "Q8_0", get_tokenizer("gpt2").transformers_files())
    n, threads = config.block_size, torch.get_num_threads()
    flags = {"model": path, "port": port, "n_ctx": n, "n_threads": threads, "verbose": False}
    # By default a new request would break the one before off.
    flags |= {"n_threads_batch": threads, "flash_attn": True, "interrupt_requests": False}
    argv = [text for name, value in flags.items() for text in (f"--{name}", value)]
    without_end = {"logit_bias": {str(get_tokenizer("gpt2").eot): -100.0}}
    return _kept(Server(python("-m", "llama_cpp.server", *argv), port, without_end))


@cache
def _ctranslate2(config: GPTConfig, workers: int) -> Server:
    path, port = _directory() / f"ctranslate2-{workers}", free_port()
    write_ctranslate2(random_model(config), path, "int8")
    flags = ("--port", port, "--threads", torch.get_num_threads(), "--workers", workers)
    command = python(Path(__file__).with_name("ctranslate2_server.py"), path, *flags)
    return _kept(Server(command, port, {"ignore_eos": True}))


def _ctranslate2_for(config: GPTConfig, clients: int) -> Server:
    """Return CTranslate2's server in the best form for so many clients."""
    return _ctranslate2(config, min(clients, torch.get_num_threads()))


PEERS = {
    "llama-cpp-python[server] Q8_0": ("llama_cpp", lambda config, clients: _llama(config)),
    "CTranslate2 int8, same application": ("ctranslate2", _ctranslate2_for),
}
"""The other servers: a module that is there where they are installed, and what starts them for a
model and a number of clients."""


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
    """The same kind of load for both servers and the engine, and what the clients noted."""

    def __init__(self, config: GPTConfig, clients: int, n: int, tokens: int) -> None:
        self.config, self.clients, self.n, self.tokens = config, clients, n, tokens
        self.rng = random.Random(0)
        self.answered: dict[str, list[Answered]] = {"ours": [], "peer": []}

    def answer(self, side: str, server: Server) -> None:
        """Have a server answer a load."""
        prompts = _prompts(self.n, self.rng)
        self.answered[side].append(server.answer(prompts, self.tokens, self.clients))

    def ours(self) -> None:
        self.answer("ours", _gptfast(self.config))

    def engine(self) -> None:
        """Compute a load in one call of the engine."""
        engine = _engine(self.config, min(MAX_BATCH, self.clients))
        ids = [get_tokenizer("gpt2").encode(text) for text in _prompts(self.n, self.rng)]
        engine.generate(ids, self.tokens, temperature=0.0)

    # Clients raise if a token is missing, so there is nothing more to check.

    def against(self, started: Callable[[GPTConfig, int], Server]) -> Callable[[], Pair]:
        """Return a pair with the server that `started` starts."""

        def build() -> Pair:
            server = started(self.config, self.clients)
            return Pair(self.ours, lambda: self.answer("peer", server), lambda: None)

        return build

    def against_engine(self) -> Pair:
        return Pair(self.ours, self.engine, lambda: None)

    def noted(self, measure: Callable[[Sequence[Times]], float]) -> Callable[[], Pair]:
        """Return a pair whose sides return a measure of what clients noted so far."""

        def of(side: str) -> float:
            if not self.answered[side]:
                raise PeerDied("no load was answered")
            return measure([one for load in self.answered[side] for one in load.times])

        def other_load() -> float:
            every = [load.other_load for side in self.answered.values() for load in side]
            return statistics.median(every)

        return lambda: Pair(lambda: of("ours"), lambda: of("peer"), lambda: None, other_load)


def _first(share: float) -> Callable[[Sequence[Times]], float]:
    def measure(times: Sequence[Times]) -> float:
        found = sorted(one.first for one in times)
        return found[min(len(found) - 1, int(share * len(found)))]

    return measure


def _between(tokens: int) -> Callable[[Sequence[Times]], float]:
    return lambda times: statistics.median(one.between(tokens) for one in times)


def cases(quick: bool) -> Iterator[Case]:
    """Yield the cases of GPT-2 124M, or of a model of 4 layers and width 256."""
    config, model, tokens = GPTConfig(), "GPT-2 124M", 128
    if quick:
        config, model, tokens = GPTConfig(n_layer=4, n_head=4, n_embd=256), "4 layers of 256", 64
    name = f"{tokens} tokens int8, prompts of {SHORTEST} to {LONGEST}"
    measures = {"first text, median": _first(0.5), "first text, 99%": _first(0.99)}
    measures["next token, median"] = _between(tokens)
    for clients, each in CLIENTS:
        shape, n = f"{model}, {clients} client{'s' * (clients > 1)}", clients * each
        for peer, (module, started) in PEERS.items():
            if find_spec(module) is None:
                continue
            load = Load(config, clients, n, tokens)
            target = 2.0 if clients > 1 and module == "llama_cpp" else 0.0
            pair = load.against(started)
            yield Case("serve", name, shape, peer, pair, target=target, tokens=n * tokens)
            for op, measure in measures.items():
                yield Case(op, name, shape, peer, load.noted(measure), returns_cost=True)
        pair = Load(config, clients, n, tokens).against_engine
        yield Case("serve", name, shape, "gptfast.Engine", pair, target=0.9, tokens=n * tokens)


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=False)))
def test_serve(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    benchmark(getattr(pair, side))
