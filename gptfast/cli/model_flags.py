"""The flags that `gptfast generate` and `gptfast chat` share: the model, sampling and speed."""

import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from gptfast.checks import integer
from gptfast.cli.flags import Positional, UsageError
from gptfast.cli.ranges import MAX_THREADS, check_whole
from gptfast.cli.terminal import is_terminal
from gptfast.cli.threads import set_threads
from gptfast.cli.vocabularies import check_draft, chosen_tokenizer
from gptfast.device import choose_device
from gptfast.generation.decoder import Decoder
from gptfast.generation.model_decoder import as_decoder
from gptfast.generation.options import Options, new_tokens
from gptfast.model import GPT
from gptfast.ops.backend import EXTENSION, MISSING
from gptfast.tokenizer.bpe import Tokenizer
from gptfast.weights.lazy_tensor import CheckpointError

if TYPE_CHECKING:
    from gptfast.engine import Engine

Dtype = Literal["fp32", "bf16", "int8", "int4"]
Device = Literal["auto", "cpu", "cuda"]
NEEDS_ENGINE = (
    f"needs the engine, which on the CPU needs the C++ kernels, and there are none: {MISSING}"
)


INTEGER_SETTINGS = ("top_k", "seed", "max_new_tokens")
SETTINGS = (*INTEGER_SETTINGS, "temperature", "top_p", "min_p", "repetition_penalty")
"""The flags that a chat can change while it runs."""


MAX_VOCABULARY = 2**31
"""More tokens than any vocabulary has: what depends on it is checked once the model is there."""


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise UsageError if a setting is out of range, before a model is loaded for it."""
    options = dict(settings)
    try:
        integer("num_samples", options.pop("num_samples", 1), 1)
        new_tokens(options.pop("max_new_tokens"))
        checked = Options(**options)
        checked.sampling(1, torch.device("cpu"))
        checked.penalty(1, torch.device("cpu"))
        checked.check_beams(MAX_VOCABULARY)
    except ValueError as error:
        raise UsageError(str(error)) from None


def load(
    checkpoint: str,
    tokenizer: str | None,
    device: str,
    dtype: str | None = None,
    *,
    engine: bool = True,
    base: str | None = None,
) -> "tuple[GPT | Engine, Tokenizer]":
    """Return the model and its tokenizer, or the tokenizer given.

    base: for an adapter, the model that it was trained beside; None takes what it names.
    The model is an engine on its device. It is a GPT if the CPU has no C++ extension, and with
    engine=False unless dtype or a packed checkpoint needs the engine.
    """
    try:
        model = _load(checkpoint, device, dtype, engine, base)
    except CheckpointError as error:
        # A file that does not even say its heads: both remedies at once.
        if tokenizer is None and "--n-head" in str(error):
            remedy = "and give --tokenizer, which such a file does not name either"
            raise CheckpointError(f"{error}, {remedy}") from None
        raise
    return model, chosen_tokenizer(checkpoint, model, tokenizer)


def _device(checkpoint: str, device: str) -> torch.device:
    """Return the device of a model: "auto" means the CPU for a packed one."""
    from gptfast.engine import is_packed

    packed_for_cpu = device == "auto" and is_packed(checkpoint)
    return torch.device("cpu") if packed_for_cpu else choose_device(device)


def _load(
    checkpoint: str, device: str, dtype: str | None, engine: bool, base: str | None = None
) -> "GPT | Engine":
    """Return the model on its device, as `load` says."""
    from gptfast.engine import Engine, is_packed

    on, packed = _device(checkpoint, device), is_packed(checkpoint)
    if on.type == "cpu":
        if packed or dtype or engine and EXTENSION is not None:
            return Engine(checkpoint, dtype, base=base)
        return GPT.from_pretrained(checkpoint, base=base)
    if packed:
        raise ValueError(
            f"{checkpoint} is packed for the CPU: use --device cpu, or the model it was made from "
            "with --dtype"
        )
    model = GPT.from_pretrained(checkpoint, base=base).to(on)
    return Engine(model, dtype) if engine or dtype else model


def draft_engine(
    draft: str, dtype: str | None, checkpoint: str, device: str, tokenizer: str | None
) -> "Engine":
    """Return the engine of the draft model for a checkpoint, with the dtype unless it is packed.

    It is on the device of the model whose tokens it guesses.
    """
    from gptfast.engine import Engine, is_packed

    on = _device(checkpoint, device).type
    engine = _load(draft, on, None if is_packed(draft) else dtype, engine=True)
    assert isinstance(engine, Engine)  # else the model could not check guesses
    check_draft(draft, engine, checkpoint, tokenizer)
    return engine


def new_seed() -> int:
    """Return a seed that is short to type and another one each time."""
    return secrets.randbelow(10**9)


@dataclass(frozen=True, kw_only=True)
class GenerationFlags:
    """The flags that choose a model and how it generates text."""

    checkpoint: Positional[str]
    """The model: a run directory, one of its checkpoints, a model in any format that `gptfast
    convert` reads or writes, or gpt2."""
    max_new_tokens: int = 100
    """The largest number of tokens to generate."""
    temperature: float = 1.0
    """Divides the logits. Below 1 the text is more predictable; 0 always takes the most likely
    token."""
    top_k: int | None = None
    """Sample from the k most likely tokens only; 0 is off."""
    top_p: float | None = None
    """Sample from the smallest set of tokens whose probabilities add up to at least
    this; 1 is off."""
    min_p: float | None = None
    """Drop tokens whose probability is below this fraction of the most likely token's."""
    repetition_penalty: float = 1.0
    """Above 1, makes tokens that already occur in the text less likely, for example 1.2."""
    seed: int | None = None
    """Seed of the sampling: the same seed gives the same text (default: another one each time,
    which is printed)."""
    dtype: Dtype | None = None
    """Data type of the weights (default: that of a packed model, else fp32)."""
    lookup: bool = False
    """Prompt lookup: guess the next tokens from what followed the same tokens earlier. The text
    stays the same and is faster where it repeats itself."""
    draft: str | None = None
    """A smaller model with the same vocabulary that guesses the next tokens. The text stays the
    same and is faster where the guesses are right."""
    stats: Literal["auto", "on", "off"] = "auto"
    """Print tokens and gigabytes per second on stderr; auto does so if stderr is a terminal."""
    base: str | None = None
    """For an adapter: the model that it was trained beside (default: the one that it names)."""
    tokenizer: str | None = None
    """gpt2, byte, or a directory with a vocabulary's files (default: the checkpoint's)."""
    device: Device = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    threads: int | None = None
    """Number of threads (default: $OMP_NUM_THREADS, else one per core)."""

    def __post_init__(self) -> None:
        check_whole(self, "threads", most=MAX_THREADS)

    def load(self) -> tuple[Decoder, Tokenizer]:
        """Return the model and its tokenizer. Raises ValueError for flags that do not fit."""
        set_threads(self.threads)
        model, tokenizer = load(
            self.checkpoint, self.tokenizer, self.device, self.dtype, base=self.base
        )
        decoder = as_decoder(model)
        for name, given, works in (
            ("--lookup", self.lookup, decoder.can_guess),
            ("--draft", self.draft, decoder.can_guess),
            ("--stats on", self.stats == "on", decoder.stats is not None),
        ):
            if given and not works:
                raise ValueError(f"{name} {NEEDS_ENGINE}")
        return decoder, tokenizer

    def options(self) -> dict[str, Any]:
        """Return the flags that are options of `gptfast.generate`."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        options = {name: getattr(self, name) for name in names}
        if self.seed is None:
            options["seed"] = new_seed()
        if self.lookup:
            options["lookup"] = True
        if self.draft is not None:
            where = (self.checkpoint, self.device, self.tokenizer)
            options["draft"] = draft_engine(self.draft, self.dtype, *where)
        return options

    @property
    def shows_speed(self) -> bool:
        """Whether to print the speed if the model measures it."""
        return self.stats == "on" or self.stats == "auto" and is_terminal(sys.stderr)
