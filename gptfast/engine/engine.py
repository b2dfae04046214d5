"""The engine: a scheduler of sequences over packed weights, one pass over the weights a step."""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from os import PathLike
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gptfast import ops
from gptfast.checks import integer
from gptfast.config import GPTConfig
from gptfast.engine import packed as packing
from gptfast.engine.gpu_model import GpuModel
from gptfast.engine.gpu_rows import rows_of
from gptfast.engine.packed import Packed
from gptfast.engine.request import Request
from gptfast.engine.rows import BaseRows
from gptfast.engine.sequences import EngineSequences
from gptfast.engine.task import Sampled, Task
from gptfast.generation import continuation
from gptfast.generation.decoder import Continuation, Decoder, Job, SampledToken, Stats
from gptfast.generation.options import LogprobOptions, Options, token_ids
from gptfast.generation.sequences import Sequences
from gptfast.generation.stop import Stops, id_stream
from gptfast.model import GPT, foreign_part
from gptfast.tokenizer.bpe import Tokenizer
from gptfast.weights.packed import is_packed

LOGITS_CHUNK_TOKENS = 128
"""Tokens whose logits are computed at a time: those of one GPT-2 token are 200 KB."""


class Engine(Decoder):
    """A GPT-2 with its weights packed for generation: in the order in which they are read.

    model_or_path: a GPT, which does not change; what `GPT.from_pretrained` takes; or a directory
    that `save` wrote. A GPT on a GPU runs there, everything else on the CPU.
    dtype: of the weights, "fp32", "bf16", "int8" (with one scale per row of a matrix, and inputs
    rounded to int8 with one scale per 64) or, on the CPU, "int4" (with a scale and a minimum per 32
    weights of a row, and inputs as for int8); None takes that of a packed directory, else "fp32".
    The KV cache is in fp32, bf16 or, for int8 and int4, fp16 on the CPU (up to 65,504) and bf16 on
    a GPU.
    max_batch: how many sequences run at a time.

    On the CPU a token's logits are the same bits alone and in any batch, streamed or not, with any
    number of threads, and but for fp32 at every instruction-set level. Several threads may
    generate with one engine; their steps take turns.

    Raises CheckpointError for a path without a model, ValueError for another dtype, RuntimeError
    without the C++ extension.
    """

    can_guess = True
    stats: Stats

    def __init__(
        self,
        model_or_path: GPT | str | PathLike,
        dtype: str | None = None,
        *,
        max_batch: int = 16,
        base: str | PathLike | None = None,
    ) -> None:
        self.max_batch = integer("max_batch", max_batch, 1)
        self.packed = _pack(model_or_path, dtype, base)
        self.stats = Stats()
        self.rows = rows_of(self.packed, min(self.max_batch, 4))
        self._lock = threading.Lock()
        # Rows of ended requests: a later prompt may begin with their tokens.
        self._ended: deque[int] = deque()
        # Ended requests whose rows are not in `_ended` yet.
        self._to_release: deque[tuple[Task, Request]] = deque()
        _ENGINES.add(self)

    @property
    def config(self) -> GPTConfig:
        return self.packed.config

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def dtype(self) -> str:
        """ "fp32", "bf16", "int8" or "int4"."""
        return self.packed.dtype

    @property
    def tokenizer_name(self) -> str | None:
        """A name or directory for `get_tokenizer`, if the model's files have one."""
        return self.packed.tokenizer

    @property
    def vocabulary(self) -> str | None:
        """What identifies the vocabulary of the model's training, if it is on record."""
        return self.packed.vocabulary

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.packed.eos_ids

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes that a decode step reads: all weights but the position embeddings."""
        return self.packed.weight_bytes

    def save(self, directory: str | PathLike, *, tokenizer: Tokenizer | str | None = None) -> None:
        """Write packed weights and the tokenizer's files to a new directory that Engine reads.

        Raises ValueError if it exists, and for an engine on a GPU.
        """
        if not isinstance(self.packed, Packed):
            raise ValueError("an engine on a GPU cannot be saved: make an engine from model.cpu()")
        packing.save(self.packed, directory, tokenizer)

    def generate(
        self,
        prompts: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        logprobs: bool = False,
        top_logprobs: int = 0,
        **options: Any,
    ) -> Any:
        """Continue prompts with this engine: see `gptfast.generate`."""
        asked = LogprobOptions(logprobs, top_logprobs)
        checked = Options.of(options)
        job = continuation.checked_job(self, prompts, max_new_tokens, checked, asked)
        return continuation.generate(self, job)

    def stream(
        self,
        prompt: Sequence[int] | Tensor,
        max_new_tokens: int,
        *,
        logprobs: bool = False,
        top_logprobs: int = 0,
        **options: Any,
    ) -> Iterator[Any]:
        """Return the new ids of one prompt one by one: see `gptfast.generate.stream`."""
        asked = LogprobOptions(logprobs, top_logprobs)
        checked = Options.of(options)
        job = continuation.checked_stream_job(self, prompt, max_new_tokens, checked, asked)
        return continuation.stream_job(self, job)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Raise TypeError for copy, deepcopy and pickle: the lock and the cache are not values."""
        raise TypeError(
            "an Engine is neither copied nor pickled: call engine.save(directory) and make another "
            "one with Engine(directory), or Engine(model) on a GPU"
        )

    # The methods of Decoder.

    def decode(self, job: Job) -> list[Continuation]:
        """Sample all continuations; where one ends, the next prompt takes its place."""
        found = [Continuation() for _ in job.prompts]
        ends = [id_stream(job.options.tokenizer, job.stops) for _ in job.prompts]
        watched = job.stops != Stops()
        for request, token in self.draw(job):
            found[request.index].append(token)
            if watched:
                ends[request.index].feed(token.id)
                request.done = ends[request.index].ended
        return found

    def decode_stream(self, job: Job) -> Iterator[SampledToken]:
        return (token for _, token in self.draw(job))

    @contextmanager
    def sequences(self, prompts: Sequence[Sequence[int]]) -> Iterator[Sequences]:
        """Return the prompts as sequences for a search; nothing else runs meanwhile."""
        with self.turn() as rows:
            sequences = EngineSequences(rows, prompts)
            try:
                yield sequences
            finally:
                sequences.close()

    def token_losses(self, x: Tensor, y: Tensor) -> Tensor:
        losses = torch.zeros(y.shape, dtype=torch.float32)
        for loss, ids, target in zip(losses, x, y, strict=True):
            asked = (target != -100).nonzero()[:, 0].tolist()
            if asked:
                n = asked[-1] + 1  # the rest is padding
                loss[:n] = self.losses(ids[:n].tolist(), target[:n])
        return losses

    # Logits and losses of one sequence.

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits (T, V) fp32 after each of 1 to block_size ids.

        Raises ValueError for another number of ids, IndexError for one outside the vocabulary.
        """
        return torch.cat(list(self._logits(ids)))

    def losses(self, ids: Sequence[int], target: Tensor) -> Tensor:
        """Return the loss of each target (T,) int64 after ids (T): fp32 nats, 0 where it is -100.

        Raises what `logits` raises, and IndexError for a target outside the vocabulary.
        """
        with closing(self._logits(ids)) as logits:
            targets = target.to(self.device).split(LOGITS_CHUNK_TOKENS)
            pairs = zip(logits, targets, strict=True)
            return torch.cat([ops.cross_entropy(*pair, reduction="none") for pair in pairs])

    def _logits(self, ids: Sequence[int]) -> Generator[Tensor, None, None]:
        """Yield the logits after LOGITS_CHUNK_TOKENS ids at a time."""
        prompt = token_ids([ids], self.config.vocab_size)[0]
        if len(prompt) > self.config.block_size:
            raise ValueError(
                f"{len(prompt)} ids are more than block_size={self.config.block_size}; give fewer"
            )
        with self.turn() as rows:
            row = rows.new()
            try:
                for i in range(0, len(prompt), LOGITS_CHUNK_TOKENS):
                    chunk = prompt[i : i + LOGITS_CHUNK_TOKENS]
                    with torch.inference_mode():
                        logits = rows.forward([row], [chunk], [len(chunk)])[0]
                    yield logits
            finally:
                rows.release(row)

    # The scheduler of one call; `gptfast.serve.scheduler` has the one of a server.

    @contextmanager
    def turn(self) -> Iterator[BaseRows]:
        """Return the rows for a step; other threads wait meanwhile. Ended requests are released."""
        with self._lock:
            self._release_ended()
            yield self.rows

    def draw(self, job: Job) -> Iterator[Sampled]:
        """Return a job's tokens as they are sampled, each with its request. No beams, no stops.

        The caller sets `request.done` where a request is to end early. Options are checked by
        the call.
        """
        task = Task(job, self.device, self.config.vocab_size)
        requests = [Request(i, list(ids), job.n) for i, ids in enumerate(job.prompts)]
        return self._draw(task, requests)

    def _draw(self, task: Task, requests: list[Request]) -> Iterator[Sampled]:
        waiting = deque(request for request in requests if request.left)
        live: list[Request] = []
        try:
            while waiting or live:
                if waiting and len(live) < self.max_batch:
                    request = waiting.popleft()
                    live.append(request)
                    sampled = self._prefill(task, request)
                else:
                    sampled = self._decode_step(task, live)
                for request, token in sampled:
                    if not request.done:
                        yield request, token
                for request in live:
                    if request.done or not request.left:
                        self.end(task, request)
                live = [request for request in live if request.left and not request.done]
        finally:
            for request in live:
                self.end(task, request)

    def _prefill(self, task: Task, request: Request) -> list[Sampled]:
        """Compute a prompt, except what another row begins with too; return its first new token."""
        start = time.perf_counter()
        with self.turn() as rows, torch.inference_mode():
            request.row = rows.start(request.ids[-rows.block_size :])
            new = request.ids[-rows.block_size :][len(rows.ids[request.row]) :]
            sampled = task.step(rows, [request], [new], [[]])
        self.stats.prompt_tokens += len(new)
        self.stats.prompt_seconds += time.perf_counter() - start
        return sampled

    def _decode_step(self, task: Task, live: list[Request]) -> list[Sampled]:
        """Return the next token of each live request, or several where guesses are right."""
        start = time.perf_counter()
        with self.turn() as rows, torch.inference_mode():
            guesses = task.guess(live, rows)
            tokens = [
                [request.ids[-1], *guess] for request, guess in zip(live, guesses, strict=True)
            ]
            sampled = task.step(rows, live, tokens, guesses)
        self.stats.seconds += time.perf_counter() - start
        self.stats.steps += 1
        self.stats.bytes_read += self.weight_bytes
        self.stats.new_tokens += len(sampled)
        self.stats.guessed += sum(map(len, guesses))
        self.stats.accepted += len(sampled) - len(live)
        return sampled

    def end(self, task: Task, request: Request) -> None:
        """Release a request's row now, or before the next step if a step is running.

        Garbage collection may close a stream, and so call this, in the middle of a step.
        """
        self._to_release.append((task, request))
        if self._lock.acquire(blocking=False):
            try:
                self._release_ended()
            finally:
                self._lock.release()

    def _release_ended(self) -> None:
        """Release rows of ended requests, but keep the latest for prompts that begin with them.

        Up to block_size tokens are kept in all.
        """
        while self._to_release:
            task, request = self._to_release.popleft()
            if request.row < 0:
                continue
            if task.guesser:
                task.guesser.forget(request)
            self._ended.append(request.row)
            request.row = -1
        for row in [row for row in self._ended if not self.rows.ids[row]]:
            self._ended.remove(row)
            self.rows.release(row)
        while sum(len(self.rows.ids[row]) for row in self._ended) > self.rows.block_size:
            self.rows.release(self._ended.popleft())


_ENGINES: "weakref.WeakSet[Engine]" = weakref.WeakSet()


def _unlock_after_fork() -> None:
    """Give each engine of a forked child a new lock: the child lacks the threads that held it."""
    for engine in _ENGINES:
        engine._lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock_after_fork)


def _pack(
    model_or_path: GPT | str | PathLike, dtype: str | None, base: str | PathLike | None
) -> Packed | GpuModel:
    """Return the packed weights of a model or path that Engine takes."""
    if base is not None and (isinstance(model_or_path, nn.Module) or is_packed(model_or_path)):
        raise ValueError("base is for the path of an adapter: leave it out (--base)")
    if isinstance(model_or_path, nn.Module):
        if getattr(model_or_path, "adapter", None) is not None:
            raise ValueError(
                "the engine takes no model with an adapter beside its weights: give it the "
                "directory of save_pretrained, or merge it (gptfast.lora.merge_adapters)"
            )
        part = foreign_part(model_or_path)
        if part is not None or not isinstance(model_or_path, GPT):
            raise ValueError(
                f"the engine takes an unchanged gptfast.GPT, but {part}; merge it (peft: "
                "merge_and_unload), remove it, or generate with the model itself"
            )
        if model_or_path.wte.weight.device.type != "cpu":
            return GpuModel(model_or_path, dtype or "fp32")
        return packing.pack_model(model_or_path, dtype or "fp32")
    if not isinstance(model_or_path, (str, PathLike)):
        raise ValueError(f"an engine takes a GPT or a path, got {model_or_path!r:.100}")
    if not is_packed(model_or_path):
        from gptfast.weights.open import open_weights

        return packing.pack_weights(open_weights(model_or_path, base=base), dtype or "fp32")
    packed = packing.load(model_or_path)
    if dtype not in (None, packed.dtype):
        raise ValueError(
            f"{model_or_path} is packed as {packed.dtype}, not {dtype}; pack the model again"
        )
    return packed
