"""Measure a step of two processes of one thread each (ddp, gloo) against one of two threads.

python bench/bench_distributed.py [--trace FILE.json]

Both sides take the same batches as the trainer does, in processes of their own, in turn. As a
command, it profiles rank 0 of a step of a small model, writes a trace for chrome://tracing, and
prints how much of the time in which gradients were summed the backward computed.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_train import flops
from harness import Case, Pair, both_sides
from peers import PeerDied
from timing import OWN_PROCESSES

from gptfast import GPT, GPTConfig, TrainConfig
from gptfast.training.launched import world_of
from gptfast.training.step import TrainStep

Shape = tuple[dict[str, int], int, int, int]
"""Fields of a GPTConfig, rows of a batch, their tokens, batches of a step."""
SMALL: Shape = ({"block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 256}, 4, 256, 1)
"""Four layers of 256; the tied embedding has most of its parameters, and is summed last."""
Interval = tuple[float, float]


class Team:
    """Processes that take the same steps, each of which begins with a line on their stdin."""

    def __init__(self, n: int, threads: int, shape: Shape, trace: str = "") -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.processes = []
        for rank in range(n):
            own = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "RANK": rank, "LOCAL_RANK": rank}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
            of_rank = [json.dumps(shape), str(threads), trace if rank == 0 else ""]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, "--worker", *of_rank],
                    env={**os.environ, **{name: str(value) for name, value in own.items()}},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        OWN_PROCESSES.update(process.pid for process in self.processes)
        self._answers()

    def _answers(self) -> list[float]:
        answers = []
        for rank, process in enumerate(self.processes):
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise PeerDied(f"rank {rank} ended; its error, if it wrote one, is above")
            answers.append(float(line))
        return answers

    def step(self) -> float:
        """Take a step and return its loss, which all processes must agree upon."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("step\n")
            process.stdin.flush()
        losses = self._answers()
        assert len(set(losses)) == 1, losses
        return losses[0]

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.communicate()
            OWN_PROCESSES.discard(process.pid)


class _Pair(Pair):
    """A pair that ends its processes with itself."""

    def __del__(self) -> None:
        for side in (self.ours, self.peer):
            side.__self__.close()  # type: ignore[attr-defined]


def _pair(shape: Shape) -> Callable[[], Pair]:
    def build() -> Pair:
        ours, peer = Team(2, 1, shape), Team(1, 2, shape)

        def check() -> None:
            for _ in range(2):
                torch.testing.assert_close(ours.step(), peer.step(), rtol=1e-5, atol=0)

        return _Pair(ours.step, peer.step, check)

    return build


def cases(quick: bool) -> Iterator[Case]:
    """Yield GPT-2 124M with one batch a step and with eight, or a model of 4 layers."""
    name, shapes = "GPT-2 124M", [(({}, 4, 512, 1), 0.0), (({}, 4, 512, 8), 0.95)]
    if quick:
        name, shapes = "4 layers of 256", [(SMALL, 0.0)]
    for shape, target in shapes:
        fields, B, T, accumulation = shape
        count = accumulation * flops(GPTConfig(**fields), B, T)
        yield Case(
            "distributed",
            f"ddp step {name} fp32, 2 processes",
            f"B={B} T={T}, {accumulation} a step",
            "1 process, 2 threads",
            _pair(shape),
            flops=count,
            target=target,
        )


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=True)))
def test_distributed(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    pair.check()
    benchmark(getattr(pair, side))


def worker(shape: Shape, threads: int, trace: str) -> None:
    """Take a step for each line of stdin and print its loss; profile the third into `trace`."""
    fields, B, T, accumulation = shape
    config = TrainConfig(device="cpu", accumulation_steps=accumulation)
    device, world = torch.device("cpu"), world_of(config)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**fields)).train()
    idx = torch.randint(model.config.vocab_size, (accumulation, 2, B, T))
    batches: list[Any] = [tuple(batch) for batch in idx]
    if world.size == 1:
        step = TrainStep(model, config, device)
    else:
        from gptfast.training.sharded_step import parallel_step

        step = parallel_step(model, config, device, print, world, B)
    print(0.0, flush=True)
    for i, _ in enumerate(sys.stdin):
        profiler = torch.profiler.profile() if trace and i == 2 else None
        with profiler or nullcontext():
            loss = step.run(batches, 1e-4)["loss"]
        if profiler is not None:
            profiler.export_chrome_trace(trace)
        print(loss, flush=True)


def _union(intervals: list[Interval]) -> list[Interval]:
    """Return the same times as intervals that do not meet."""
    out: list[Interval] = []
    for begin, end in sorted(intervals):
        if out and begin <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((begin, end))
    return out


def _common(ours: list[Interval], theirs: list[Interval]) -> float:
    """Return how long two lists of intervals that do not meet overlap."""
    pairs = ((max(a, c), min(b, d)) for a, b in ours for c, d in theirs)
    return sum(max(0.0, end - begin) for begin, end in pairs)


def overlap(trace: Path) -> tuple[float, float]:
    """Return the seconds in which a trace sums gradients, and in how many the backward computes."""
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("ph") == "X"]
    named = {
        word: _union([(e["ts"], e["ts"] + e["dur"]) for e in events if word in e["name"]])
        for word in ("gloo:all_reduce", "autograd::engine::evaluate_function")
    }
    summed, backward = named.values()
    return sum(b - a for a, b in summed) * 1e-6, _common(summed, backward) * 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, default=Path("build/ddp-trace.json"))
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        shape, threads, trace = args.worker
        worker(json.loads(shape), int(threads), trace)
        return
    args.trace.parent.mkdir(parents=True, exist_ok=True)
    team = Team(2, 1, SMALL, str(args.trace))
    for _ in range(3):
        team.step()
    team.close()
    summed, computed = overlap(args.trace)
    print(
        f"gradients were summed for {summed:.2f} s, in {computed:.2f} s of which "
        f"({computed / summed:.0%}) the backward computed; the trace is {args.trace}"
    )


if __name__ == "__main__":
    main()
