"""`gptfast convert`: write a model in another format."""

import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from gptfast.checks import one_line
from gptfast.cli.flags import Positional, UsageError
from gptfast.cli.ranges import check_whole
from gptfast.cli.vocabularies import GPT2_ROWS
from gptfast.config import MAX_SIZE
from gptfast.data.embedded import embedded_text
from gptfast.data.hub import is_hub
from gptfast.data.tokens import as_tokens
from gptfast.evaluate.loss import rounding_cost, text_score
from gptfast.model import GPT
from gptfast.tokenizer.bpe import Tokenizer, end_of_text
from gptfast.tokenizer.vocabulary import get_tokenizer
from gptfast.weights.checkpoint import is_run
from gptfast.weights.convert import check, check_name, format_of, save
from gptfast.weights.found_in import preset_of
from gptfast.weights.open import is_adapter
from gptfast.weights.packed import is_packed
from gptfast.weights.push import check_repository

if TYPE_CHECKING:
    from gptfast.engine import Engine

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# As llama.cpp calls them.
_SAME = {"f32": "fp32", "f16": "fp16"}
_GGUF_ONLY = ("q8_0", "q4_0")
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
    .bin, the .pth of Raschka's book, llama.cpp's .gguf, a run or checkpoint of gptfast, or gpt2 if
    it was downloaded.

    ONNX (.onnx) is written only: a graph of a prompt and of each token after it.

    The format "packed" holds the weights as the CPU engine uses them, so that it starts at once.
    `generate`, `chat` and `eval` read it. It cannot be converted back.

    gptfast convert models/124M gpt2-transformers

    gptfast convert gpt2 gpt2_124M.bin --dtype bf16

    gptfast convert gpt2 gpt2-int8 --dtype int8

    gptfast convert gpt2 gpt2-int4 --dtype int4

    gptfast convert gpt2 gpt2.gguf --dtype q8_0

    gptfast convert --merge runs/tuned tuned

    gptfast convert runs/book hf:USER/NAME --private
    """

    src: Positional[str]
    """The model to read."""
    dst: Positional[str]
    """The file or directory to write; it must not exist yet. Or hf:USER/NAME, a repository of the
    Hugging Face Hub, which gets transformers' form with a model card (needs huggingface_hub, and a
    token: hf auth login)."""
    to: Literal["transformers", "llm.c", "nanogpt", "book", "gguf", "onnx", "packed"] | None = None
    """The format to write (default: from the suffix of DST: llm.c for .bin, nanogpt for .pt, book
    for .pth, gguf for .gguf, onnx for .onnx, a directory without a suffix for transformers; with
    --dtype int8 or int4, packed)."""
    dtype: Literal["fp32", "bf16", "fp16", "int8", "int4", "f32", "f16", "q8_0", "q4_0"] | None = (
        None
    )
    """Data type to convert the weights to (default: unchanged; for packed, fp32). f32 and f16 are
    fp32 and fp16; q8_0 and q4_0 are GGUF's 8 and 4 bits."""
    n_head: int | None = None
    """Number of heads per block, if SRC does not say, as the book's own .pth (default: one head
    per 64 channels)."""
    resize_vocab: int | None = None
    """Give the model this many tokens, for a vocabulary that grew. The rows of the new tokens are
    the mean of the old ones."""
    merge: bool = False
    """Write the base of an adapter with the adapter in it. SRC is the adapter, of gptfast train
    --lora-rank or of peft. They are added in fp32, and --dtype fp32 keeps that beside a base of 16
    bits."""
    base: str | None = None
    """With --merge: the model that the adapter was trained beside (default: the one that it
    names)."""
    private: bool = False
    """Create a private repository with hf:USER/NAME. An existing public one is refused."""
    set_first: ClassVar = ("to", "dtype", "merge", "resize_vocab", "private")

    def __post_init__(self) -> None:
        check_whole(self, "n_head", "resize_vocab", most=MAX_SIZE)

    def run(self) -> None:
        if is_adapter(self.src) != self.merge:
            raise UsageError(
                f"{self.src} is no adapter: leave out --merge"
                if self.merge
                else f"{self.src} is an adapter: --merge writes its base with the adapter in it"
            )
        if self.base is not None and not self.merge:
            raise UsageError("--base is the base of an adapter: give --merge, or leave it out")
        if self.private and not is_hub(self.dst):
            raise UsageError("--private is for hf:USER/NAME: leave it out")
        if self.to == "packed" or self.dtype in ("int8", "int4"):
            self._pack()
            return
        if is_hub(self.dst):
            self._push(self.dst.removeprefix("hf:"))
            return
        check(self.dst, self.to)
        form = self.to or format_of(self.dst)
        if self.dtype in _GGUF_ONLY and form != "gguf":
            raise ValueError(
                f"{form} has no {self.dtype} weights, only GGUF has: name a .gguf, or take int8 or "
                "int4 for a directory of packed ones"
            )
        model = self._load(self._read_dtype(form))
        notes = self._save_gguf(model) if form == "gguf" else self._save(model)
        n = sum(p.numel() for p in model.parameters())
        print("\n".join([f"done: {n:,} parameters in {self.dst} ({form})", *notes]))

    def _read_dtype(self, form: str) -> torch.dtype | None:
        """Return what all weights are read as; None for what they are."""
        if form == "gguf":  # which rounds them itself, and not all of them
            return torch.float32 if self.merge and self.dtype is not None else None
        return None if self.dtype is None else _DTYPES[_SAME.get(self.dtype, self.dtype)]

    def _save(self, model: GPT) -> list[str]:
        """Write any other form; return what the file lacks, in lines."""
        with _written(self.dst):
            save(
                model.config,
                model.state_dict(),
                self.dst,
                self.to,
                tokenizer=model.tokenizer_name,
                eos_ids=model.eos_ids,
            )
        form = self.to or format_of(self.dst)
        if form == "onnx":  # which gptfast itself does not read
            return ["the file holds no vocabulary: convert to a directory too, which has it"]
        return [] if form == "transformers" else _what_is_left(model)

    def _save_gguf(self, model: GPT) -> list[str]:
        """Write GGUF with the model's vocabulary; return what it lacks, in lines."""
        tokenizer = _tokenizer_of(model)
        kinds = {theirs: ours for ours, theirs in _SAME.items()}
        with _written(self.dst):
            save(
                model.config,
                model.state_dict(),
                self.dst,
                "gguf",
                tokenizer=tokenizer,
                eos_ids=model.eos_ids,
                kind=None if self.dtype is None else kinds.get(self.dtype, self.dtype),
                license="mit" if preset_of(str(model.source)) else None,
            )
        notes = []
        if tokenizer is None:
            notes.append("the file holds no vocabulary: nothing says which one the model has")
        if left := [str(i) for i in model.eos_ids[2:]]:
            notes.append(f"the file does not say that id {', '.join(left)} ends a text, only two")
        return notes

    def _push(self, repository: str) -> None:
        """Send the model, in transformers' form and with a card, to the Hugging Face Hub."""
        if self.to not in (None, "transformers"):
            raise UsageError(f"the Hub gets transformers' form, not {self.to}: leave out --to")
        if self.dtype in _GGUF_ONLY:
            raise UsageError(f"the Hub gets transformers' form, which has no {self.dtype} weights")
        check_repository(repository)
        model = self._load(self._read_dtype("transformers"))
        run = model.source if is_run(Path(str(model.source))) else None
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory, push_to_hub=repository, private=self.private, run=run)
        n = sum(p.numel() for p in model.parameters())
        print(f"done: {n:,} parameters in https://huggingface.co/{repository}")

    def _load(self, dtype: torch.dtype | None = None) -> GPT:
        return GPT.from_pretrained(
            self.src,
            n_head=self.n_head,
            resize_vocab=self.resize_vocab,
            dtype=dtype,
            base=self.base,
        )

    def _pack(self) -> None:
        """Write the packed format, which only the engine can."""
        if is_hub(self.dst):
            raise UsageError("the Hub gets transformers' form, not packed weights")
        form = self.to or format_of(self.dst)
        if form not in ("packed", "transformers") or self.to == "transformers":
            here = ", or take q8_0 or q4_0" if form == "gguf" else ""
            raise ValueError(
                f"{form} has no {self.dtype} weights: name a directory for packed ones{here}"
            )
        check_name(self.dst, "packed")
        dtype = _SAME.get(self.dtype or "", self.dtype)
        if dtype not in (None, "fp32", "bf16", "int8", "int4"):
            raise ValueError(f"packed weights are fp32, bf16, int8 or int4, not {self.dtype}")
        if os.path.lexists(self.dst):  # before the work, not after it
            raise ValueError(f"{self.dst} exists; name another or delete it")
        from gptfast.engine import Engine

        plain = self.n_head is None and self.resize_vocab is None
        # In fp32, what an adapter added to a base of 16 bits is not rounded twice.
        model = self.src if plain else self._load(torch.float32)
        engine = Engine(model, dtype, base=self.base if plain else None)
        with _written(self.dst):
            engine.save(self.dst)
        size = f"{engine.weight_bytes / 1e6:,.1f} MB of {engine.dtype} weights"
        print(f"done: {size} in {self.dst} (packed); try\n  gptfast chat {shlex.quote(self.dst)}")
        if engine.dtype == "int4" and engine.tokenizer_name is not None and not is_packed(self.src):
            try:
                exact = Engine(model, base=self.base if plain else None)
                cost = _cost(engine, exact, engine.tokenizer_name)
                print(f"int4 costs {cost} of English; gptfast eval --dtype int4 measures your text")
            except (ValueError, IndexError, OSError) as error:
                print(f"what int4 costs was not measured: {one_line(error)}")


def _tokenizer_of(model: GPT) -> Tokenizer | None:
    """Return the tokenizer of a model: that on record, or GPT-2's if it has GPT-2's rows."""
    if model.tokenizer_name is not None:
        return get_tokenizer(model.tokenizer_name)
    if model.config.vocab_size in GPT2_ROWS:
        with suppress(OSError):  # it is not on this machine
            return get_tokenizer("gpt2")
    return None


def _cost(rounded: "Engine", plain: "Engine", tokenizer_name: str) -> str:
    """Say what rounded weights cost, measured on a part of the embedded text."""
    tokenizer = get_tokenizer(tokenizer_name)
    tokens = as_tokens(embedded_text()[-8 * COST_TOKENS :], tokenizer)[-COST_TOKENS:]
    sizes = {"max_length": min(COST_TOKENS, plain.config.block_size)}
    scores = (text_score(engine, tokens, tokenizer, **sizes) for engine in (rounded, plain))
    return rounding_cost(*scores)


def _what_is_left(model: GPT) -> list[str]:
    """Return what of a model's text a single file cannot hold, in lines."""
    notes, name = [], model.tokenizer_name
    if name is not None and name != "gpt2":
        notes.append(f"the file holds no vocabulary: use it with --tokenizer {shlex.quote(name)}")
    try:
        end = end_of_text(get_tokenizer(name or "gpt2"))
    except (OSError, ValueError):  # it is not there
        end = None
    if others := [str(i) for i in model.eos_ids if i != end]:
        notes.append(
            f"the file does not say that id {', '.join(others)} ends a text: convert to a "
            "directory to keep it"
        )
    return notes
