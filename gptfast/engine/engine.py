"""Generation from a packed model: rows that come and go, one pass over the weights a step."""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from gptfast import ops
from gptfast.config import GPTConfig
from gptfast.engine import packed as packing
from gptfast.engine.gpu_model import GpuModel
from gptfast.engine.gpu_rows import rows_of
from gptfast.engine.packed import Packed
from gptfast.engine.request import Drawn, Request
from gptfast.engine.sequences import EngineSequences
from gptfast.engine.task import Task
from gptfast.generation.decoder import Told
from gptfast.generation.options import Options, token_ids
from gptfast.model import GPT
from gptfast.ops.backend import EXTENSION, overruled
from gptfast.tokenizer.bpe import Tokenizer

PIECE = 128


@dataclass
class Stats:
    """What an engine has done since it was made, or since it was given new ones."""

    prompt_tokens: int = 0
    """Those that were computed: what a row shares with another is not."""
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    """Those that followed the first, which the prompt's pass gives."""
    steps: int = 0
    """Passes over the weights for them."""
    seconds: float = 0.0
    guessed: int = 0
    """Tokens that were tried before they were drawn, and of them those that came."""
    accepted: int = 0


class Engine:
    """A GPT-2 packed for generation on the CPU: its weights in the order in which they are read.

    model_or_path: a GPT, which is left as it is; what `GPT.from_pretrained` takes; or a directory
    that `save` wrote. dtype, of the weights: "fp32", "bf16" or "int8" (a scale a row, inputs as
    whole numbers with a scale for 64 of them); None takes a packed directory's own, else "fp32".
    Keys and values are kept in fp32, bf16 or, for int8, fp16, which ends at 65,504. max_batch: rows
    that run at a time. (A model on a GPU is run there: see `gptfast.engine.gpu`.)

    A token's logits are the same bits alone, in any batch, streamed or not, whatever the number of
    threads. Several threads may generate at once; they take turns.

    Raises CheckpointError for what is no model, ValueError for another dtype, RuntimeError where
    the C++ extension is missing.
    """

    def __init__(
        self, model_or_path: GPT | str | PathLike, dtype: str | None = None, *, max_batch: int = 16
    ) -> None:
        if type(max_batch) is not int or max_batch < 1:
            raise ValueError(f"max_batch must be an integer >= 1, got {max_batch!r}")
        self.packed = _pack(model_or_path, dtype)
        self.max_batch = max_batch
        self.stats = Stats()
        self.rows = rows_of(self.packed, min(max_batch, 4))
        self._lock = threading.Lock()
        # Rows that nobody runs, but a later prompt may begin with.
        self._ended: deque[int] = deque()
        self._left: deque[tuple[Task, Request]] = deque()  # to be let go of
        _ENGINES.add(self)

    @property
    def config(self) -> GPTConfig:
        return self.packed.config

    @property
    def dtype(self) -> str:
        return self.packed.dtype

    @property
    def tokenizer_name(self) -> str | None:
        return self.packed.tokenizer

    @property
    def weight_bytes(self) -> int:
        """Bytes that a step reads: all but the position embeddings."""
        return self.packed.weight_bytes

    def save(self, directory: str | PathLike, *, tokenizer: Tokenizer | str | None = None) -> None:
        """Write a directory that Engine reads without packing anything, with the tokenizer's files.

        Raises ValueError if it exists.
        """
        if not isinstance(self.packed, Packed):
            raise ValueError("what is saved is packed for the CPU: make the engine of model.cpu()")
        packing.save(self.packed, directory, tokenizer)

    def generate(
        self, prompts: Tensor | Sequence[Sequence[int]], max_new_tokens: int, **options: Any
    ) -> Any:
        """`gptfast.generate` with this engine: see there."""
        from gptfast.generate import generate

        return generate(self, prompts, max_new_tokens, **options)

    def stream(
        self, prompt: Sequence[int] | Tensor, max_new_tokens: int, **options: Any
    ) -> Iterator[Any]:
        """The new ids of one prompt, one by one: `gptfast.generate.stream` with this engine."""
        from gptfast.generate import stream

        return stream(self, prompt, max_new_tokens, **options)

    @contextmanager
    def sequences(self, prompts: Sequence[Sequence[int]]) -> Iterator[EngineSequences]:
        """Rows that go on together, for a search; nothing else runs meanwhile."""
        with self._lock:
            self._settle()
            sequences = EngineSequences(self.rows, prompts)
            try:
                yield sequences
            finally:
                sequences.close()

    def logits(self, ids: Sequence[int]) -> Tensor:
        """ids, from 1 to block_size of them -> the logits (T, V) fp32 behind each."""
        return torch.cat(list(self._logits(ids)))

    def losses(self, ids: Sequence[int], target: Tensor) -> Tensor:
        """The loss of each target (T,) int64 behind ids (T): fp32 nats, 0 where it is -100."""
        with closing(self._logits(ids)) as logits:
            pieces = zip(logits, target.to(self.rows.device).split(PIECE), strict=True)
            return torch.cat([ops.cross_entropy(*piece, reduction="none") for piece in pieces])

    def _logits(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """Of PIECE tokens at a time: their logits are 200 KB each."""
        prompt = token_ids([ids], self.config.vocab_size)[0]
        if len(prompt) > self.config.block_size:
            raise ValueError(f"{len(prompt)} ids are more than block_size={self.config.block_size}")
        with self._lock:
            self._settle()
            row = self.rows.new()
            try:
                for i in range(0, len(prompt), PIECE):
                    piece = prompt[i : i + PIECE]
                    with torch.inference_mode():
                        logits = self.rows.forward([row], [piece], [len(piece)])[0]
                    yield logits
            finally:
                self.rows.release(row)

    # ---- The loop

    def draw(
        self,
        prompts: Sequence[list[int]],
        n: int,
        options: Options,
        told: Told,
    ) -> Iterator[Drawn]:
        """Up to n tokens for each prompt, each as it is drawn. Options are checked by the call."""
        like = torch.empty(len(prompts), 0, device=self.rows.device)
        task = Task(options, like, told)
        return self._draw(task, [Request(i, list(ids), n) for i, ids in enumerate(prompts)])

    def _draw(self, task: "Task", requests: list[Request]) -> Iterator[Drawn]:
        waiting, live = deque(request for request in requests if request.left), []
        try:
            while waiting or live:
                if waiting and len(live) < self.max_batch:
                    request = waiting.popleft()
                    live.append(request)
                    drawn = self._prefill(task, request)
                else:
                    drawn = self._decode(task, live)
                for one in drawn:
                    if not one.request.done:
                        yield one
                for request in live:
                    if request.done or not request.left:
                        self._end(task, request)
                live = [request for request in live if request.left and not request.done]
        finally:
            for request in live:
                self._end(task, request)

    def _prefill(self, task: "Task", request: Request) -> list[Drawn]:
        """The prompt, but for what another row begins with too, and the first token after it."""
        start = time.perf_counter()
        with self._lock, torch.inference_mode():
            self._settle()
            request.row = self.rows.start(request.ids[-self.rows.block_size :])
            held = len(self.rows.ids[request.row])
            new = request.ids[-self.rows.block_size :][held:]
            drawn = task.step(self.rows, [request], [new], [[]])
        self.stats.prompt_tokens += len(new)
        self.stats.prompt_seconds += time.perf_counter() - start
        return drawn

    def _decode(self, task: "Task", live: list[Request]) -> list[Drawn]:
        """A token of every row, or several where guesses come true."""
        start = time.perf_counter()
        with self._lock, torch.inference_mode():
            self._settle()
            guesses = task.guess(live, self.rows)
            tokens = [
                [request.ids[-1], *guess] for request, guess in zip(live, guesses, strict=True)
            ]
            drawn = task.step(self.rows, live, tokens, guesses)
        self.stats.seconds += time.perf_counter() - start
        self.stats.steps += 1
        self.stats.new_tokens += len(drawn)
        self.stats.guessed += sum(map(len, guesses))
        self.stats.accepted += len(drawn) - len(live)
        return drawn

    def _end(self, task: Task, request: Request) -> None:
        """Let go of a request's row, now or, where a step is under way (a collection of garbage
        may call this in its midst), before the next one."""
        self._left.append((task, request))
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        """Rows of requests that have ended: their tokens stay for a prompt that begins with them,
        up to block_size of all such."""
        while self._left:
            task, request = self._left.popleft()
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


def _alone_after_fork() -> None:
    """The threads that held the locks are not there in a forked child."""
    for engine in _ENGINES:
        engine._lock = threading.Lock()


os.register_at_fork(after_in_child=_alone_after_fork)


def _pack(model_or_path: GPT | str | PathLike, dtype: str | None) -> Packed | GpuModel:
    if isinstance(model_or_path, nn.Module):
        if not isinstance(model_or_path, GPT) or not packing.is_plain(model_or_path):
            raise ValueError(
                f"the engine takes a GPT as it was made, got {type(model_or_path).__name__} with "
                "other modules or parameters; generate with the model itself"
            )
        if model_or_path.wte.weight.device.type != "cpu":
            return GpuModel(model_or_path, dtype or "fp32")
        return packing.pack_model(model_or_path, dtype or "fp32")
    if not isinstance(model_or_path, (str, PathLike)):
        raise ValueError(f"an engine is made of a GPT or a path, got {model_or_path!r:.100}")
    if not packing.is_packed(model_or_path):
        from gptfast.weights.open import open_weights, tokenizer_of

        packed = packing.pack_weights(open_weights(model_or_path), dtype or "fp32")
        if packed.tokenizer is None:
            packed = Packed(packed.config, packed.dtype, packed.data, tokenizer_of(model_or_path))
        return packed
    packed = packing.load(model_or_path)
    if dtype not in (None, packed.dtype):
        raise ValueError(
            f"{model_or_path} is packed as {packed.dtype}, not {dtype}; pack its model anew"
        )
    return packed


FEWEST = 16
"""New tokens from which packing a model for one call pays."""


def engine_for(model: GPT | Engine, n: int) -> Engine | None:
    """The engine to draw n tokens from a model with: itself, or one packed for the occasion; None
    where the model itself is to do it.
    """
    if isinstance(model, Engine):
        return model
    if n < FEWEST or EXTENSION is None or overruled() or torch.is_autocast_enabled("cpu"):
        return None
    dtypes = {(p.dtype, p.device.type) for p in model.parameters()}
    names = {(torch.float32, "cpu"): "fp32", (torch.bfloat16, "cpu"): "bf16"}
    if len(dtypes) != 1 or (dtype := names.get(*dtypes)) is None or _hooked(model):
        return None
    return Engine(model, dtype)


def _hooked(model: GPT) -> bool:
    """Whether there is anything that wants more of the model than its logits, or is not GPT's."""
    hooks = [nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks]
    for module in model.modules():
        hooks += [module._forward_hooks, module._forward_pre_hooks]
    return any(hooks) or not packing.is_plain(model)
