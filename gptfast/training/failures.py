"""Find out which process is to blame when several can no longer work together.

A process that fails by itself leaves its message in the store that all share. A process whose peers
fail only sees a broken connection or a time-out: it leaves a note too, and waits a moment for the
notes of the others. Whoever leaves none has died, hangs or is cut off. Each process also writes a
beat every second, from a thread of its own connection, so that a wait for a process that works
alone (a save) need not end before that process does.
"""

import atexit
import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from gptfast.checks import one_line

BEAT_S = 1.0
"""Seconds between two beats."""
REPORT_S = 3.0
"""How long a process that lost the others waits for their notes."""
POLL_S = 0.02
_COMMUNICATION = re.compile(
    r"gloo|nccl|connection|socket|broken pipe|timed? ?out|store|recv|peer", re.IGNORECASE
)


class ProcessesError(RuntimeError):
    """The processes of a run can no longer work together; the message names who is to blame."""


def is_communication(error: BaseException) -> bool:
    """Return whether an error is one of a connection to other processes."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and bool(_COMMUNICATION.search(str(error)))


class Failures:
    """The notes and beats of the processes of a run.

    connect: returns a new connection to their store. timeout_s: how long a process may be silent.
    """

    def __init__(
        self, rank: int, size: int, connect: Callable[[], dist.Store], timeout_s: float
    ) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self._store, self._beats = connect(), connect()
        self._limit_s, self._is_cut_off, self._lost_store = timeout_s, False, False
        self._host = socket.gethostname()
        self._store.set(f"who/{rank}", f"{os.getpid()} {self._host}")
        self._who: dict[int, tuple[int, str]] = {}
        self._ended = threading.Event()
        self._deadlines: dict[int, tuple[float, Callable[[], str]]] = {}
        self._told: tuple[str, Callable[[], str]] | None = None
        self._watched: dict[int, tuple[str | None, float]] | None = None
        self._beating = threading.Thread(target=self._beat, name="gptfast-beats", daemon=True)
        self._beating.start()
        atexit.register(self.end)

    def introduce(self) -> None:
        """Learn the number and the machine of every process, once all are connected."""
        for rank in range(self.size):
            process, _, host = self.wait(f"who/{rank}", rank).partition(" ")
            self._who[rank] = int(process), host

    def is_one_machine(self) -> bool:
        """Return whether all processes are on this process's machine."""
        return {host for _, host in self._who.values()} == {self._host}

    def _beat(self) -> None:
        count = 0
        while not self._ended.is_set():
            count += 1
            try:
                self._beats.set(f"beat/{self.rank}", str(count))
                if (told := self._told) is not None:
                    self._beats.set(f"{told[0]}/{self.rank}", told[1]())
            except RuntimeError:  # the store has ended, which the others notice too
                return
            for end, message in list(self._deadlines.values()):
                if time.monotonic() > end:
                    self._give_up(RuntimeError(message()))
            if (silent := self._silent()) is not None:
                self._give_up(silent)
            self._ended.wait(BEAT_S)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """End this process with a message if another one no longer beats.

        For a block in which others may be silent for long, in which torch.distributed would wait.
        """
        self._watched = {}
        try:
            yield
        finally:
            self._watched = None

    def _silent(self) -> ProcessesError | None:
        """Return the error of a watched process that no longer beats."""
        watched, now = self._watched, time.monotonic()
        if watched is None:
            return None
        try:
            for rank in set(range(self.size)) - {self.rank}:
                beat = self._read(f"beat/{rank}")
                if rank not in watched or watched[rank][0] != beat:
                    watched[rank] = beat, now
                elif now - watched[rank][1] > self.timeout_s:
                    return self._gone([rank])
        except RuntimeError as error:  # of the store
            return self.explain(error)
        return None

    @contextlib.contextmanager
    def telling(self, what: str, state: Callable[[], str]) -> Iterator[None]:
        """Tell the others what `state` returns at each beat in the block, for `told`."""
        self._told = what, state
        try:
            yield
        finally:
            self._told = None

    def told(self, what: str, text: str) -> list[str]:
        """Return the names of the processes that told this text last, if the store answers."""
        ranks: list[int] = []
        with contextlib.suppress(RuntimeError):
            ranks += [rank for rank in range(self.size) if self._read(f"{what}/{rank}") == text]
        return [self._name(rank) for rank in ranks]

    @contextlib.contextmanager
    def ending_after(self, limit_s: float, message: Callable[[], str]) -> Iterator[None]:
        """End this process with a message, and so all, if the block takes more than limit_s."""
        thread = threading.get_ident()  # a checkpoint may be written beside the steps
        self._deadlines[thread] = time.monotonic() + limit_s, message
        try:
            yield
        finally:
            del self._deadlines[thread]

    def _give_up(self, error: RuntimeError) -> None:
        """End this process from the thread of the beats: the main thread hangs in the system."""
        self.note(error)
        with contextlib.suppress(OSError, ValueError):
            if self.may_speak(error):
                print(f"gptfast: {error}", file=sys.stderr, flush=True)
        self.linger()
        os._exit(1)

    def end(self) -> None:
        """Stop the beats, and wait for one under way: in C++ it would abort Python's own end."""
        self._ended.set()
        self._beating.join(BEAT_S)
        atexit.unregister(self.end)

    def set(self, key: str, value: str) -> None:
        """Set a key for `wait`."""
        self._ask(self._store.set, key, value)

    def _ask(self, function: Callable, *args: Any) -> Any:
        """Return function(*args), a question to the store. Raises RuntimeError without an answer.

        The store itself would wait without end for a machine that is cut off.
        """
        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(function(*args))
            except RuntimeError as error:
                answers.append(error)

        if not self._is_cut_off:
            thread = threading.Thread(target=ask, daemon=True)
            thread.start()
            thread.join(self._limit_s)
        if not answers:
            self._is_cut_off = True
            raise RuntimeError("the store does not answer")
        if isinstance(answers[0], RuntimeError):
            raise answers[0]
        return answers[0]

    def _has(self, key: str) -> bool:
        return self._ask(self._store.check, [key])

    def _read(self, key: str) -> str | None:
        return self._ask(self._store.get, key).decode() if self._has(key) else None

    def note(self, error: BaseException) -> None:
        """Leave a note for the others about what ended this process."""
        kind = "lost" if isinstance(error, ProcessesError) else "failed"
        with contextlib.suppress(RuntimeError):
            self.set(f"{kind}/{self.rank}", one_line(error)[:2000] or type(error).__name__)

    def wait(self, key: str, rank: int, *, hurried: Callable[[], bool] = lambda: False) -> str:
        """Return the value of a key that a process will set.

        hurried: whether this process was asked to end, so that it waits for a silent one no longer
        than for a note. Raises ProcessesError if a process fails or is silent for too long. What
        `ending_after` allows does not run out meanwhile.
        """
        begin, thread = time.monotonic(), threading.get_ident()
        deadline = self._deadlines.pop(thread, None)
        try:
            return self._value_of(key, rank, hurried)
        finally:
            if deadline is not None:
                self._deadlines[thread] = deadline[0] + time.monotonic() - begin, deadline[1]

    def _value_of(self, key: str, rank: int, hurried: Callable[[], bool]) -> str:
        beat, since = self._read(f"beat/{rank}"), time.monotonic()
        while (value := self._read(key)) is None:
            if (failed := self._failed()) is not None:
                raise failed
            now = self._read(f"beat/{rank}")
            if now != beat:
                beat, since = now, time.monotonic()
            silent = time.monotonic() - since
            if silent > self.timeout_s or hurried() and silent > 2 * REPORT_S:
                raise self._gone([rank])
            time.sleep(POLL_S)
        return value

    def _failed(self) -> ProcessesError | None:
        """Return the error of a process that left a note about a fault of its own."""
        for rank in range(self.size):
            if rank != self.rank and (why := self._read(f"failed/{rank}")) is not None:
                return ProcessesError(f"rank {rank} ended the run: {why}")
        return None

    def explain(self, error: BaseException) -> ProcessesError:
        """Return an error that names the process because of which communication failed."""
        self._limit_s = min(self._limit_s, REPORT_S)
        try:
            return self._explain(error)
        except RuntimeError:  # of the store
            self._lost_store = True
            self._kill([0] if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" else [])
            return ProcessesError(
                f"rank {self.rank} no longer reaches rank 0, whose machine has what they share "
                f"({os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}): dead, hanging "
                "or cut off; the run ends, and --resume continues it from its last checkpoint"
            )

    def _explain(self, error: BaseException) -> ProcessesError:
        self.set(f"lost/{self.rank}", "")
        others = [rank for rank in range(self.size) if rank != self.rank]
        before = {rank: self._read(f"beat/{rank}") for rank in others}
        end = time.monotonic() + REPORT_S
        while True:
            if (failed := self._failed()) is not None:
                return failed
            silent = [rank for rank in others if self._read(f"lost/{rank}") is None]
            if not silent or time.monotonic() > end:
                break
            time.sleep(POLL_S)
        if not silent:
            return ProcessesError(f"the processes lost one another: {one_line(error):.300}")
        stopped = [rank for rank in silent if self._read(f"beat/{rank}") == before[rank]]
        return self._gone(stopped or silent)

    def _gone(self, ranks: list[int]) -> ProcessesError:
        """Return the error about processes that do not answer, and end those on this machine."""
        self._kill(ranks)
        named = map(self._name, ranks)
        verb = "does" if len(ranks) == 1 else "do"
        return ProcessesError(
            f"{' and '.join(named)} {verb} not answer: dead, hanging or cut off; the run ends, and "
            "--resume continues it from its last checkpoint"
        )

    def _name(self, rank: int) -> str:
        process, host = self._who.get(rank, ("?", "?"))
        return f"rank {rank} (process {process} on {host})"

    def _kill(self, ranks: list[int]) -> None:
        """End processes of this machine that hang: they would keep its memory and its ports."""
        for rank in ranks:
            process, host = self._who.get(rank, (0, ""))
            if host == self._host:
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)

    def may_speak(self, error: BaseException) -> bool:
        """Return whether this process prints why the run ended: one does, the first if it can.

        error: what ended this process, of which it has left a note.
        """
        try:
            # A process that was left alone has waited for the notes of the others already.
            waits = bool(self.rank) and not isinstance(error, ProcessesError)
            end = time.monotonic() + REPORT_S
            while time.monotonic() < end and (waits or self._lower_has_noted()):
                if self._has("told"):
                    return False
                time.sleep(POLL_S)
            speaks = self._ask(self._store.add, "spoken", 1) == 1
            self.set("told", "")
            return speaks
        except RuntimeError:
            # Without torchrun, the store ends with the first process, which has spoken by then.
            return not isinstance(error, ProcessesError) or self._lost_store

    def linger(self) -> None:
        """Wait a moment until the others have ended: the store ends with this process."""
        end = time.monotonic() + REPORT_S
        keys = [f"ended/{rank}" for rank in range(1, self.size)]
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < end and not all(map(self._has, keys)):
                time.sleep(POLL_S)

    def _lower_has_noted(self) -> bool:
        keys = [f"{kind}/{rank}" for kind in ("lost", "failed") for rank in range(self.rank)]
        return any(map(self._has, keys))
