"""`gptfast convert`: write a model in another format."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from gptfast.checks import one_line
from gptfast.cli.flags import Positional, UsageError
from gptfast.cli.ranges import check_whole
from gptfast.config import MAX_SIZE
from gptfast.data.embedded import embedded_text
from gptfast.data.tokens import as_tokens
from gptfast.evaluate.loss import rounding_cost, text_score
from gptfast.model import GPT
from gptfast.tokenizer.bpe import end_of_text
from gptfast.tokenizer.vocabulary import get_tokenizer
from gptfast.weights.convert import check, check_name, format_of, save
from gptfast.weights.open import is_adapter
from gptfast.weights.packed import is_packed

if TYPE_CHECKING:
    from gptfast.engine import Engine

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COST_TOKENS = 2048
"""The number of tokens on which the cost of rounding is measured."""


@contextmanager
def _written(path: str) -> Iterator[None]:
    """Name the path in an error of writing it."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if why.startswith("cannot write"):
            raise
        raise OSError(f"cannot write {path}: {why}; is there room for it?") from None
    except RuntimeError as error:  # of PyTorch's writer of .pt and .pth, which hides the reason
        if "inline_container" not in str(error):
            raise
        raise OSError(f"cannot write {path}; is there room for it?") from None


@dataclass(frozen=True)
class Convert:
    """Write a model in another format. The format of SRC is recognised from its content.

    SRC may be OpenAI's directory, a directory or file of transformers, nanoGPT's ckpt.pt, llm.c's
    .bin, the .pth of Raschka's book, a run or checkpoint of gptfast, or gpt2 if it was downloaded.

    The format "packed" holds the weights as the CPU engine uses them, so that it starts at once.
    `generate`, `chat` and `eval` read it. It cannot be converted back.

    gptfast convert models/124M gpt2-transformers

    gptfast convert gpt2 gpt2_124M.bin --dtype bf16

    gptfast convert gpt2 gpt2-int8 --dtype int8

    gptfast convert gpt2 gpt2-int4 --dtype int4

    gptfast convert --merge runs/tuned tuned
    """

    src: Positional[str]
    """The model to read."""
    dst: Positional[str]
    """The file or directory to write; it must not exist yet."""
    to: Literal["transformers", "llm.c", "nanogpt", "book", "packed"] | None = None
    """The format to write (default: from the suffix of DST: llm.c for .bin, nanogpt for .pt, book
    for .pth, a directory without a suffix for transformers; with --dtype int8 or int4, packed)."""
    dtype: Literal["fp32", "bf16", "fp16", "int8", "int4"] | None = None
    """Data type to convert the weights to (default: unchanged; for packed, fp32)."""
    n_head: int | None = None
    """Number of heads per block, if SRC does not say, as the book's own .pth (default: one head
    per 64 channels)."""
    resize_vocab: int | None = None
    """Give the model this many tokens, for a vocabulary that grew. The rows of the new tokens are
    the mean of the old ones."""
    merge: bool = False
    """SRC is an adapter (of gptfast train --lora-rank or of peft): write its base with the adapter
    in it."""

    def __post_init__(self) -> None:
        check_whole(self, "n_head", "resize_vocab", most=MAX_SIZE)

    def run(self) -> None:
        if is_adapter(self.src) != self.merge:
            raise UsageError(
                f"{self.src} is no adapter: leave out --merge"
                if self.merge
                else f"{self.src} is an adapter: --merge writes its base with the adapter in it"
            )
        if self.to == "packed" or self.dtype in ("int8", "int4"):
            self._pack()
            return
        check(self.dst, self.to)
        model = self._load()
        if self.dtype is not None:
            model.to(_DTYPES[self.dtype])
        with _written(self.dst):
            save(
                model.config,
                model.state_dict(),
                self.dst,
                self.to,
                tokenizer=model.tokenizer_name,
                eos_ids=model.eos_ids,
            )
        n = sum(p.numel() for p in model.parameters())
        form = self.to or format_of(self.dst)
        print(f"done: {n:,} parameters in {self.dst} ({form})")
        if form != "transformers":
            _say_what_is_left(model)

    def _load(self) -> GPT:
        return GPT.from_pretrained(self.src, n_head=self.n_head, resize_vocab=self.resize_vocab)

    def _pack(self) -> None:
        """Write the packed format, which only the engine can."""
        form = self.to or format_of(self.dst)
        if form not in ("packed", "transformers") or self.to == "transformers":
            raise ValueError(
                f"{form} has no {self.dtype} weights: name a directory for packed ones"
            )
        check_name(self.dst, "packed")
        if self.dtype == "fp16":
            raise ValueError("packed weights are fp32, bf16, int8 or int4, not fp16")
        if os.path.lexists(self.dst):  # before the work, not after it
            raise ValueError(f"{self.dst} exists; name another or delete it")
        from gptfast.engine import Engine

        plain = self.n_head is None and self.resize_vocab is None
        model = self.src if plain else self._load()
        engine = Engine(model, self.dtype)
        with _written(self.dst):
            engine.save(self.dst)
        size = f"{engine.weight_bytes / 1e6:,.1f} MB of {engine.dtype} weights"
        print(f"done: {size} in {self.dst} (packed); try\n  gptfast chat {self.dst}")
        if engine.dtype == "int4" and engine.tokenizer_name is not None and not is_packed(self.src):
            try:
                cost = _cost(engine, Engine(model), engine.tokenizer_name)
                print(f"int4 costs {cost} of English; gptfast eval --dtype int4 measures your text")
            except (ValueError, IndexError, OSError) as error:
                print(f"what int4 costs was not measured: {one_line(error)}")


def _cost(rounded: "Engine", plain: "Engine", tokenizer_name: str) -> str:
    """Say what rounded weights cost, measured on a part of the embedded text."""
    tokenizer = get_tokenizer(tokenizer_name)
    tokens = as_tokens(embedded_text()[-8 * COST_TOKENS :], tokenizer)[-COST_TOKENS:]
    sizes = {"max_length": min(COST_TOKENS, plain.config.block_size)}
    scores = (text_score(engine, tokens, tokenizer, **sizes) for engine in (rounded, plain))
    return rounding_cost(*scores)


def _say_what_is_left(model: GPT) -> None:
    """Print what of a model's text a single file cannot hold."""
    name = model.tokenizer_name
    if name not in (None, "gpt2"):
        print(f"the file holds no vocabulary: use it with --tokenizer {name}")
    try:
        end = end_of_text(get_tokenizer(name or "gpt2"))
    except (OSError, ValueError):  # it is not there
        end = None
    if others := [str(i) for i in model.eos_ids if i != end]:
        print(
            f"the file does not say that id {', '.join(others)} ends a text: convert to a "
            "directory to keep it"
        )
