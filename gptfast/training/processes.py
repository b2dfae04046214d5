"""The processes that torchrun started, connected by torch.distributed."""

import contextlib
import json
import os
import platform
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptfast.device import choose_device, threads_of
from gptfast.startup import ENDING
from gptfast.torch_private import is_compiling, set_group_timeouts
from gptfast.training.failures import REPORT_S, Failures, ProcessesError, is_communication
from gptfast.training.interrupt import SIGNALS, Interrupt
from gptfast.training.shared_memory import share_memory
from gptfast.training.world import World

CONNECT_S = 60
"""How long the processes may take to find one another, at least."""
WRITE_TIMEOUTS = 30
"""How many times --dist-timeout a process may take to write a checkpoint."""
COMPILE_TIMEOUTS = 30
"""How many times --dist-timeout a step may take in which the processes compile."""


class AgreedInterrupt(Interrupt):
    """An interrupt that all processes learn of at the same step.

    A signal to any process sets `asked` there; `agree` sets `requested` in all.
    """

    def __init__(self, world: "Processes") -> None:
        super().__init__()
        self._world = world
        self.asked: str | None = None

    def agree(self) -> bool:
        flags = [float(self.asked == number.name) for number in SIGNALS]
        asked = torch.tensor(flags, dtype=torch.float64)
        for number, count in zip(SIGNALS, self._world.sum(asked).tolist(), strict=True):
            if count and not self.requested:
                self.requested = number.name
        return bool(self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked = signal.Signals(number).name
            if self._world.is_first:
                self._announce(self.asked)


class Processes(World):
    """The processes of one run.

    device_name: of the configuration; GPUs talk by nccl, CPUs by gloo. timeout_s: how long one may
    be silent.
    """

    def __init__(self, device_name: str, timeout_s: float) -> None:
        environment = os.environ
        # Its groups of processes have threads and connections until the end, broken ones too.
        ENDING.at_once = True
        self.rank, self.size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        self.local_rank = int(environment.get("LOCAL_RANK", "0"))
        self.restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
        self._interrupt: AgreedInterrupt | None = None
        self._comparisons, self._memories = 0, 0
        self._share_cores(int(environment.get("LOCAL_WORLD_SIZE", "1")))
        device = self.device(device_name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Those that notice need a moment to find out who it was.
        self.silence = timedelta(seconds=max(timeout_s - REPORT_S - 1, timeout_s / 2))
        self._failures = Failures(self.rank, self.size, self._connect, timeout_s)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("groups", self._connect()),
            rank=self.rank,
            world_size=self.size,
            timeout=max(self.silence, timedelta(seconds=CONNECT_S)),
        )
        set_group_timeouts(self.silence)
        self._failures.introduce()

    def _share_cores(self, local_size: int) -> None:
        # torchrun itself sets OMP_NUM_THREADS=1 where nobody has set it.
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(threads_of(local_size))

    def _connect(self) -> dist.Store:
        """Return a connection to the store of this attempt of the run."""
        has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        serves = self.rank == 0 and not has_agent and not hasattr(self, "_store")
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=serves,
            timeout=timedelta(seconds=CONNECT_S),
            wait_for_workers=False,
        )
        if serves:
            self._store = store  # the server ends with it
        return dist.PrefixStore(f"gptfast/{self.restarts}", store)

    def device(self, name: str) -> torch.device:
        device = choose_device(name)
        if device.type == "cpu":
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"rank {self.rank} has no GPU: this machine has {torch.cuda.device_count()}; start "
                "as many processes as there are GPUs (--nproc-per-node), or take --device cpu"
            )
        return torch.device("cuda", self.local_rank)

    def interrupt(self) -> Interrupt:
        self._interrupt = AgreedInterrupt(self)
        return self._interrupt

    def _is_hurried(self) -> bool:
        return self._interrupt is not None and self._interrupt.asked is not None

    def sum(self, values: Tensor) -> Tensor:
        total = values.clone()
        with self.together():
            dist.all_reduce(total)
        return total

    def meet(self) -> None:
        self.sum(torch.zeros((), dtype=torch.float64, device="cpu"))

    def shared_memory(self, n_bytes: int) -> Tensor | None:
        if not self._failures.is_one_machine():
            return None
        self._memories += 1
        name = f"memory {self._memories}"

        def exchange(what: str, text: str) -> list[str]:
            return self.exchange(f"{name} {what}", text)

        return share_memory(n_bytes, self.is_first, exchange)

    def compare(self, values: Mapping[str, Any]) -> None:
        self._comparisons += 1
        versions = {"torch": torch.__version__, "Python": platform.python_version()}
        mine = json.loads(json.dumps({**_flat(values), **versions}))
        texts = self.exchange(f"settings/{self._comparisons}", json.dumps(mine))
        every = [json.loads(text) for text in texts]
        for rank, theirs in enumerate(every):
            for name, value in {**theirs, **every[0]}.items():
                if name not in theirs or name not in every[0] or theirs[name] != value:
                    first, other = (str(x.get(name))[:80] for x in (every[0], theirs))
                    raise ValueError(
                        f"the processes differ: rank {rank} has {name} {other}, rank 0 has "
                        f"{first}; start all with the same settings, data and versions"
                    )

    def exchange(self, what: str, text: str) -> list[str]:
        with self.together():
            self._failures.set(f"{what}/{self.rank}", text)
            return [self._wait(f"{what}/{rank}", rank) for rank in range(self.size)]

    def _wait(self, key: str, rank: int) -> str:
        return self._failures.wait(key, rank, hurried=self._is_hurried)

    def wait_for_first(self, what: str) -> None:
        with self.together():
            if self.is_first:
                self._failures.set(f"first/{what}", "")
            else:
                self._wait(f"first/{what}", 0)

    @contextlib.contextmanager
    def writing(self, where: Path) -> Iterator[None]:
        limit_s = self._failures.timeout_s * WRITE_TIMEOUTS
        message = (
            f"rank {self.rank} has been writing to {where} for {limit_s:.0f} s ({WRITE_TIMEOUTS} x "
            "--dist-timeout): its disk hangs or is slow; the run ends, and --resume continues it "
            "from its last checkpoint"
        )
        with self._failures.ending_after(limit_s, lambda: message):
            yield

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        limit_s = self._failures.timeout_s * COMPILE_TIMEOUTS
        failures, thread = self._failures, threading.get_ident()

        def state() -> str:
            return "compiles" if is_compiling(thread) else "computes"

        def message() -> str:
            who = " and ".join(failures.told("step", "compiles"))
            return (
                f"a step with compiled code has taken {limit_s:.0f} s ({COMPILE_TIMEOUTS} x "
                f"--dist-timeout): {f'the compiler of {who}' if who else 'a process'} hangs or is "
                "slow; raise --dist-timeout or leave out --compile. The run ends, and --resume "
                "continues it from its last checkpoint"
            )

        set_group_timeouts(timedelta(seconds=limit_s + REPORT_S))
        try:
            with (
                failures.watching(),
                failures.telling("step", state),
                failures.ending_after(limit_s, message),
            ):
                yield
        finally:
            set_group_timeouts(self.silence)

    @contextlib.contextmanager
    def in_turn(self, what: str) -> Iterator[None]:
        key = f"turn/{what}/{socket.gethostname()}"
        if self.local_rank:
            with self.together():
                self._wait(key, self.rank - self.local_rank)
        yield
        if not self.local_rank:
            with self.together():
                self._failures.set(key, "")

    def same_random_state(self, device: torch.device) -> None:
        # Generators of GPUs are saved by the number of the GPU, and here each rank has another.
        if device.type != "cuda":
            return
        state = torch.cuda.get_rng_state(device)
        with self.together():
            dist.broadcast(state, 0)
        torch.cuda.set_rng_state(state, device)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, ProcessesError) or not is_communication(error):
                raise
            raise self._failures.explain(error) from None

    def _disconnect(self) -> None:
        """Close the connections, which ends what the others wait for."""

        def close() -> None:
            with contextlib.suppress(RuntimeError, AssertionError):
                dist.destroy_process_group()

        # What is still under way may keep it waiting.
        closing = threading.Thread(target=close, daemon=True)
        closing.start()
        closing.join(1.0)

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        try:
            with self.together():
                yield
        except BaseException as error:
            self._failures.note(error)
            self._disconnect()
            speaks = self._failures.may_speak(error)
            with contextlib.suppress(RuntimeError):
                self._failures.set(f"ended/{self.rank}", "")
            if hasattr(self, "_store"):
                self._failures.linger()
            if speaks:
                raise
            raise SystemExit(1) from None
        self.wait_for_first("end")
        with contextlib.suppress(RuntimeError):
            dist.barrier()  # the first process may hold the store
            dist.destroy_process_group()
        self._failures.end()


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with those of each mapping among them in its place."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(value if isinstance(value, Mapping) else {name: value})
    return flat
