"""Measure a step of two processes of one thread each (ddp) against one process of two threads.

python bench/bench_distributed.py [--small] [--trace FILE | --memory | --step B T | --speed B T]

Both sides take the same batches as the trainer does, in processes of their own, in turn. As a
command, it profiles rank 0 of a step of a small model, writes a trace for chrome://tracing, and
prints how much of the time in which gradients were summed the backward computed. --memory prints
how much main memory each of two processes takes to build GPT-2 124M, to train, save and load it.
--speed prints the tokens per second of both sides, for GPT-2 124M or, with --small, for 4 layers
of 256. --step prints the CPU time of a step in one process of one thread, and in two together,
which depends less on what else the machine does.
"""

import argparse
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_train import flops
from harness import Case, Pair, both_sides
from peers import PeerDied
from timing import OWN_PROCESSES, time_pair

from gptfast import GPT, GPTConfig, TrainConfig
from gptfast.cli import main as run_command
from gptfast.cli.train import Train
from gptfast.device import peak_memory
from gptfast.training.failures import Failures
from gptfast.training.launched import world_of
from gptfast.training.progress import RunCheckpoints
from gptfast.training.step import TrainStep
from gptfast.training.trainer import Trainer

Shape = tuple[dict[str, int], int, int, int]
"""Fields of a GPTConfig, rows of a batch, their tokens, batches of a step."""
SMALL: Shape = ({"block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 256}, 4, 256, 1)
"""Four layers of 256; the tied embedding has most of its parameters, and is summed last."""
Interval = tuple[float, float]


def _start(n: int, threads: int, argv: list[str]) -> list[subprocess.Popen]:
    """Start n processes of this file, as torchrun would."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = []
    for rank in range(n):
        own = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "RANK": rank, "LOCAL_RANK": rank}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, *argv],
                env={**os.environ, **{name: str(value) for name, value in own.items()}},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    OWN_PROCESSES.update(process.pid for process in processes)
    return processes


class Team:
    """Processes that take the same steps, each of which begins with a line on their stdin."""

    def __init__(self, n: int, threads: int, shape: Shape, trace: str = "") -> None:
        command = ["--worker", json.dumps(shape), str(threads), trace]
        self.processes = _start(n, threads, command)
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
        profiled = trace and i == 2 and world.is_first
        profiler = None
        if profiled:
            # Gradients are summed in gloo's threads.
            every = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
            profiler = torch.profiler.profile(experimental_config=every)
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
        for word in ("gptfast::sum_gradients", "autograd::engine::evaluate_function")
    }
    summed, backward = named.values()
    return sum(b - a for a, b in summed) * 1e-6, _common(summed, backward) * 1e-6


def _peaks() -> dict[str, int]:
    """Let a run fill the dictionary that is returned: phases, and the MB held at most in each.

    Linux alone forgets a peak at a word in /proc.
    """
    peaks = {"begin": peak_memory("cpu") // 2**20}
    phases = [(Train, "trainer", "build"), (Trainer, "train_step", "step")]
    phases += [(RunCheckpoints, "save", "save"), (RunCheckpoints, "restore", "load")]
    for kind, name, phase in phases:

        def measured(self: Any, *args: Any, phase: str, real: Callable, **options: Any) -> Any:
            Path("/proc/self/clear_refs").write_text("5")
            result = real(self, *args, **options)
            peaks[phase] = max(peaks.get(phase, 0), peak_memory("cpu") // 2**20)
            return result

        setattr(kind, name, partialmethod(measured, phase=phase, real=getattr(kind, name)))
    return peaks


def memory_worker(out: str, *more: str) -> None:
    """Train GPT-2 124M for two steps as one of the processes, and print the peaks in MB."""
    torch.set_num_threads(1)
    # As if each had a machine of its own: pages that are shared would count in both.
    Failures.is_one_machine = lambda self: False  # type: ignore[method-assign]
    run = "--n-layer 12 --n-head 12 --n-embd 768 --vocab-size 50257 --max-length 128 --batch-size 2"
    run += " --tokenizer byte --dropout 0 --eval-batches 1 --sample-tokens 0 --keep 1 --device cpu"
    peaks = _peaks()
    with contextlib.redirect_stdout(io.StringIO()):
        code = run_command(["train", "--data", __file__, "--out", out, *run.split(), *more])
    print(json.dumps(peaks), flush=True)
    raise SystemExit(code)


def print_memory() -> None:
    """Print the peak memory of each phase of a run and of its resumption, under ddp and fsdp."""
    for how in ("ddp", "fsdp"):
        with tempfile.TemporaryDirectory() as out:
            for more in (["--max-steps", "2"], ["--max-steps", "3", "--resume"]):
                command = ["--memory-worker", f"{out}/run", *more, "--parallel", how]
                processes = _start(2, 1, command)
                for rank, process in enumerate(processes):
                    answer = process.communicate()[0]
                    if process.returncode:
                        raise PeerDied(f"rank {rank} ended; its error is above")
                    print(how, *more, f"rank {rank}", *json.loads(answer).items())


def print_step(shape: Shape) -> None:
    """Print the CPU time of a step in one process of one thread and in two."""
    seconds = []
    for n in (1, 2):
        team = Team(n, 1, shape)
        times = []
        for _ in range(4):  # the first makes what the others share
            before = _cpu_seconds(team)
            team.step()
            times.append(_cpu_seconds(team) - before)
        team.close()
        seconds.append(min(times[1:]))
    one, both = seconds
    print(
        f"{_tokens(shape):,} tokens a step, CPU time of one process of one thread {one:.2f} s, ",
        end="",
    )
    print(f"of two together {both:.2f} s: {one / both:.3f}")


def print_speed(shape: Shape, seconds: float) -> None:
    """Print the tokens per second of two processes of one thread and of one of two, in turn."""
    timing = time_pair(_pair(shape)(), seconds, timeout_s=0.0)
    for name, cost in (("two processes", timing.gptfast_cost), ("one process", timing.peer_cost)):
        print(f"{name}: {_tokens(shape) / cost:,.0f} tokens/s (median)")
    print(f"{_tokens(shape):,} tokens a step, {timing.pairs} pairs: {timing.ratio:.3f} (median)")


def _tokens(shape: Shape) -> int:
    _, B, T, accumulation = shape
    return B * T * accumulation


def _cpu_seconds(team: Team) -> float:
    """Return the CPU time that the processes of a team have used, with all their threads."""
    ticks = 0
    for process in team.processes:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, default=Path("build/ddp-trace.json"))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--step", nargs=2, type=int, metavar=("B", "T"))
    parser.add_argument("--speed", nargs=2, type=int, metavar=("B", "T"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--memory-worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        shape, threads, trace = args.worker
        worker(json.loads(shape), int(threads), trace)
        return
    if args.memory_worker:
        memory_worker(*args.memory_worker)
    if args.memory:
        print_memory()
        return
    fields = SMALL[0] if args.small else {}
    if args.step:
        print_step((fields, *args.step, 1))
        return
    if args.speed:
        print_speed((fields, *args.speed, 1), 30.0 if args.small else 100.0)
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
