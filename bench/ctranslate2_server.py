"""Serve CTranslate2 behind the application of `gptfast serve`, for bench_serve.py.

Everything but the engine is the same: requests, tokenizer, queue and streams. The folder is what
`peers.write_ctranslate2` wrote. Each worker computes one request at a time and tells each token as
it comes; a text is greedy and does not end by itself. CTranslate2 begins no text beside others that
it has begun, and of a batch it computes what is longer than the shortest prompt token by token: for
8 prompts of 32 to 512 tokens, a batch of all or two of similar lengths gained nothing.
"""

import argparse
import asyncio
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ctranslate2
import torch
from clients import HOST

from gptfast import GPTConfig, get_tokenizer
from gptfast.generation.conversation import QUESTIONS, Template
from gptfast.generation.decoder import SampledToken
from gptfast.serve.generation import Generation, Update
from gptfast.serve.model import Model
from gptfast.serve.run import bound_socket, serve
from gptfast.serve.service import Service


class Workers:
    """Computes requests; it has the methods of `gptfast.serve.scheduler.Scheduler`."""

    cache_usage = 0.0

    def __init__(self, generator: ctranslate2.Generator, workers: int) -> None:
        self._generator = generator
        self._waiting: deque[Generation] = deque()
        self._changed = threading.Condition()
        self.n_running = 0
        for _ in range(workers):
            threading.Thread(target=self._work, daemon=True).start()

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, generations: Sequence[Generation]) -> None:
        with self._changed:
            self._waiting += generations
            self._changed.notify_all()

    def cancel(self, generation: Generation) -> None:
        generation.cancelled = True

    def close(self, *, cancel: bool = False) -> None:
        for one in [*self._waiting] if cancel else ():
            one.cancelled = True

    def join(self, timeout: float | None = None) -> bool:
        return False

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                one = self._waiting.popleft()
                self.n_running += 1
            self._compute(one)
            with self._changed:
                self.n_running -= 1

    def _compute(self, one: Generation) -> None:
        def tell(step: ctranslate2.GenerationStepResult) -> bool:
            update = one.take([SampledToken(step.token_id)])
            if one.cancelled:
                update = Update(finish="cancelled")
            one.finish = update.finish
            one.notify(update)
            return one.finish is not None

        self._generator.generate_batch(
            [list(map(str, one.job.prompts[0]))],
            beam_size=1,
            sampling_topk=1,
            min_length=one.job.n,
            max_length=one.job.n,
            include_prompt_in_result=False,
            callback=tell,
        )


class WorkersService(Service):
    """A service that computes with `Workers`."""

    def __init__(self, make: Callable[[], Workers], *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._make = make

    async def load(self) -> None:
        self._schedulers = [self._make()]  # type: ignore[list-item]
        self._model = self._open_model()


def _model() -> Model:
    config = GPTConfig()
    engine: Any = SimpleNamespace(
        config=config,
        device=torch.device("cpu"),
        dtype="int8",
        eos_ids=(),
        can_guess=False,
        max_batch=1,
    )
    return Model(engine, get_tokenizer("gpt2"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name in ("port", "threads", "workers"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()

    def make() -> Workers:
        generator = ctranslate2.Generator(
            str(args.folder),
            compute_type="int8",
            inter_threads=args.workers,
            intra_threads=max(1, args.threads // args.workers),
        )
        return Workers(generator, args.workers)

    def service(on_failure: Callable[[str], None]) -> Service:
        return WorkersService(
            make,
            "ctranslate2",
            _model,
            template=Template.parse(QUESTIONS),
            new_seed=lambda: random.randrange(2**62),
            on_failure=on_failure,
        )

    with bound_socket(HOST, args.port) as sock:
        say = lambda text: print(text, file=sys.stderr)  # noqa: E731
        asyncio.run(serve(service, sock, say=say))


if __name__ == "__main__":
    main()
