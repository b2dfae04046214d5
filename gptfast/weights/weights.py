"""What every format's reader makes of its files, and how a model is built from it."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gptfast.config import GPTConfig
from gptfast.model import GPT
from gptfast.tokenizer.vocabulary import vocabulary_in
from gptfast.weights.stored import FLOATS, CheckpointError, Stored

# What wrappers put before a parameter's name: torch.compile, DistributedDataParallel.
_WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")


@dataclass(frozen=True)
class Weights:
    """A GPT-2 in files: its shape, and a tensor for each of GPT's parameters, in GPT's layout."""

    source: str
    """What messages call it."""
    config: GPTConfig
    tensors: dict[str, Stored]
    tokenizer: str | None = None
    """A name or directory for `get_tokenizer`, if one is on record."""

    def build(self) -> GPT:
        """A model in evaluation mode, in the dtype of its embedding. Raises CheckpointError.

        Called once: what has been read is let go of, so that no more is held than the model.
        """
        model, dtype = self._empty(), self.tensors["wte.weight"].dtype
        for name in self._names(model):
            module, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(self.tensors.pop(name).load().to(dtype))
            setattr(model.get_submodule(module), leaf, parameter)
        model.tokenizer_name = self.tokenizer
        return model.eval()

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter of GPT and its values, one after the other. Raises CheckpointError."""
        for name in self._names(self._empty()):
            yield name, self.tensors[name].read()

    def _empty(self) -> GPT:
        """A model of the shape, on the meta device."""
        self._check_size()
        with torch.device("meta"), _NothingDrawn():
            return GPT(self.config)

    @torch.no_grad()
    def copy_to(self, model: GPT) -> None:
        """Copy into a model of the same architecture; ValueError, and nothing changed, if not."""
        shape = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        for name in (*shape, "tie_weights", "qkv_bias"):
            theirs, ours = getattr(self.config, name), getattr(model.config, name)
            if theirs != ours:
                shorter = "; --max-length makes windows shorter" if name == "block_size" else ""
                raise ValueError(
                    f"{self.source} is another architecture: its {name} is {theirs}, not "
                    f"{ours}{shorter}"
                )
        parameters = dict(model.named_parameters())
        for name in self._names(model):
            parameters[name].copy_(self.tensors[name].read())

    def _check_size(self) -> None:
        """CheckpointError if the shape is not that of the tensors, before a model is made of it."""
        config = self.config
        sizes = {"wte.weight": config.vocab_size, "wpe.weight": config.block_size}
        for name, rows in sizes.items():
            self._check(name, (rows, config.n_embd))
        for i in range(config.n_layer):  # not the last alone: ten thousand layers take a while
            self._check(f"h.{i}.ln_1.weight", (config.n_embd,))

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.source} has no tensor {name!r}; is it of another architecture?"
            )
        stored = self.tensors[name]
        if stored.shape != shape:
            raise CheckpointError(
                f"{self.source}: {name} has shape {stored.shape}, the model needs {shape}"
            )
        if stored.dtype not in FLOATS:
            raise CheckpointError(f"{self.source}: {name} is {stored.dtype}, not floating-point")

    def _names(self, model: GPT) -> Iterator[str]:
        """The parameters' names, checked, largest first: then least is held beside the model."""
        parameters = model.state_dict()
        for name, parameter in parameters.items():
            self._check(name, tuple(parameter.shape))
        if extra := sorted(self.tensors.keys() - parameters.keys()):
            raise CheckpointError(
                f"{self.source} has a tensor the model does not know: {extra[0]!r}"
            )
        yield from sorted(parameters, key=lambda name: -parameters[name].numel())


class _NothingDrawn(TorchFunctionMode):
    """normal_ does nothing: on the meta device it would, to no end, import 150 MB of Python."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.init.normal_ or func is torch.Tensor.normal_:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def tokenizer_in(directory: Path) -> str | None:
    """The directory as a tokenizer's name, if a vocabulary is there."""
    return str(directory.resolve()) if vocabulary_in(directory) else None


def unwrapped(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors without the prefixes that wrappers of the model gave them."""
    return renamed(tensors, lambda name: _WRAPPERS.sub("", name))


def renamed(tensors: Mapping[str, Stored], rename: Callable[[str], str]) -> dict[str, Stored]:
    """The tensors under other names; CheckpointError if two get the same."""
    result: dict[str, Stored] = {}
    for name, stored in tensors.items():
        if rename(name) in result:
            raise CheckpointError(f"there are two tensors for {rename(name)!r}, {name!r} for one")
        result[rename(name)] = stored
    return result


def infer_config(
    source: str, tensors: Mapping[str, Stored], n_head: int | None, *, tie_weights: bool
) -> GPTConfig:
    """The shape that tensors in GPT's names have; heads show in none: n_head of them, or C / 64."""
    for name in ("wte.weight", "wpe.weight"):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise CheckpointError(
                f"{source} has no tensor {name!r}; is it of another architecture?"
            )
    (V, C), T = tensors["wte.weight"].shape, tensors["wpe.weight"].shape[0]
    layers = [int(found[1]) for name in tensors if (found := re.match(r"h\.(\d{1,5})\.", name))]
    if n_head is None and C % 64:
        raise CheckpointError(
            f"{source} does not say how many heads it has; n_head ({C} channels) must be given "
            "(gptfast convert --n-head)"
        )
    qkv_bias = "h.0.attn.c_attn.bias" in tensors
    sizes = (V, T, max(layers, default=0) + 1, C // 64 if n_head is None else n_head, C)
    try:
        return GPTConfig(*sizes, qkv_bias=qkv_bias, tie_weights=tie_weights)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None


def fitted(
    source: str, tensors: dict[str, Stored], config: GPTConfig, tokenizer: str | None = None
) -> Weights:
    """Weights without what the model does not keep: a tied head's copy, a zero bias. Where the
    values say that the head is not tied, or that the bias counts, they are believed."""
    head = "lm_head.weight"
    if config.tie_weights and head in tensors:
        if _same(tensors, head, "wte.weight"):
            del tensors[head]
        else:
            config = replace(config, tie_weights=False)
    biases = [name for name in tensors if name.endswith("attn.c_attn.bias")]
    if not config.qkv_bias and biases:
        if any(tensors[name].read().any() for name in biases):
            config = replace(config, qkv_bias=True)
        else:
            tensors = {name: s for name, s in tensors.items() if name not in biases}
    return Weights(source, config, tensors, tokenizer)


def with_head(source: str, tensors: dict[str, Stored], n_head: int | None) -> Weights:
    """Weights of tensors whose configuration no file tells: the head is tied if it is absent or
    the token embedding once more."""
    tied = "lm_head.weight" not in tensors or _same(tensors, "lm_head.weight", "wte.weight")
    return fitted(source, tensors, infer_config(source, tensors, n_head, tie_weights=tied))


def _same(tensors: Mapping[str, Stored], a: str, b: str) -> bool:
    if b not in tensors or tensors[a].shape != tensors[b].shape:
        return False
    return torch.equal(tensors[a].read(), tensors[b].read())
