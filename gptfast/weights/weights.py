"""`Weights`, which the reader of every form returns, and what these readers have in common."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gptfast.config import GPTConfig, parameter_shapes
from gptfast.tokenizer.characters import characters_file
from gptfast.tokenizer.vocabulary import vocabulary_in
from gptfast.weights.lazy_tensor import FLOATS, CheckpointError, LazyTensor

# The prefixes of torch.compile and DistributedDataParallel before a parameter's name.
_WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")


@dataclass(frozen=True)
class Weights:
    """A GPT-2 in files: its configuration, and a tensor for each of its parameters.

    Raises CheckpointError when made of tensors that are not those of the configuration.
    """

    source: str
    """The path, for messages."""
    config: GPTConfig
    tensors: dict[str, LazyTensor]
    """By GPT's names and in its layout: matrices are (out, in)."""
    tokenizer: str | None = None
    """A name or directory for `get_tokenizer`, if one is on record."""

    def __post_init__(self) -> None:
        shapes = parameter_shapes(self.config)
        for name, shape in shapes.items():
            if name not in self.tensors:
                raise CheckpointError(
                    f"{self.source} has no tensor {name!r}; is it of another architecture?"
                )
            tensor = self.tensors[name]
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{self.source}: {name} has shape {tensor.shape}, the model needs {shape}"
                )
            if tensor.dtype not in FLOATS:
                raise CheckpointError(
                    f"{self.source}: {name} is {tensor.dtype}, not floating-point"
                )
        if extra := sorted(self.tensors.keys() - shapes.keys()):
            raise CheckpointError(
                f"{self.source} has a tensor the model does not know: {extra[0]!r}"
            )

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name and values. Raises CheckpointError for damaged files."""
        for name in self._largest_first():
            yield name, self.tensors[name].read()

    def move_into(self, model: nn.Module) -> None:
        """Replace a model's parameters by these, all in the dtype of the token embedding.

        model: one of this configuration; its own parameters may be on the meta device. To be called
        once: each tensor is released as it is moved, so that no more is held than the model.
        Raises CheckpointError for damaged files.
        """
        dtype = self.tensors["wte.weight"].dtype
        for name in self._largest_first():
            module, _, leaf = name.rpartition(".")
            values = self.tensors.pop(name).load().to(dtype)
            setattr(model.get_submodule(module), leaf, nn.Parameter(values))

    @torch.no_grad()
    def copy_to(self, config: GPTConfig, state: Mapping[str, Tensor]) -> None:
        """Copy the values into the state dictionary of a model with this configuration.

        Raises ValueError, with nothing changed, if config is of another architecture, and
        CheckpointError for damaged files.
        """
        sizes = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        for name in (*sizes, "tie_weights", "qkv_bias"):
            theirs, ours = getattr(self.config, name), getattr(config, name)
            if theirs != ours:
                shorter = "; --max-length makes windows shorter" if name == "block_size" else ""
                raise ValueError(
                    f"{self.source} is another architecture: its {name} is {theirs}, not "
                    f"{ours}{shorter}"
                )
        for name, values in self.read():
            state[name].copy_(values)

    def _largest_first(self) -> list[str]:
        """Return the names by size: a large tensor is then read while little else is held."""
        return sorted(self.tensors, key=lambda name: -self.tensors[name].numel())


def tokenizer_in(directory: Path) -> str | None:
    """Return the directory as a name for `get_tokenizer`, or None if no vocabulary is in it."""
    found = vocabulary_in(directory) or characters_file(directory)
    return str(directory.resolve()) if found else None


def unwrapped(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return the tensors without the prefixes that wrappers of the model put before their names."""
    return renamed(tensors, lambda name: _WRAPPERS.sub("", name))


def renamed(
    tensors: Mapping[str, LazyTensor], rename: Callable[[str], str]
) -> dict[str, LazyTensor]:
    """Return the tensors under new names; CheckpointError if two get the same one."""
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if rename(name) in result:
            raise CheckpointError(f"two tensors stand for {rename(name)!r}, one of them {name!r}")
        result[rename(name)] = tensor
    return result


def infer_config(
    source: str, tensors: Mapping[str, LazyTensor], n_head: int | None, *, tie_weights: bool
) -> GPTConfig:
    """Return the configuration that the shapes of tensors in GPT's names imply.

    n_head: no shape shows it; None takes heads of 64 channels. Raises CheckpointError if there is
    no such configuration.
    """
    for name in ("wte.weight", "wpe.weight"):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise CheckpointError(
                f"{source} has no tensor {name!r}; is it of another architecture?"
            )
    V, C = tensors["wte.weight"].shape
    layers = [int(found[1]) for name in tensors if (found := re.match(r"h\.(\d{1,5})\.", name))]
    if n_head is None and C % 64:
        raise CheckpointError(
            f"{source} does not say how many heads it has; n_head ({C} channels) must be given "
            "(gptfast convert --n-head)"
        )
    try:
        return GPTConfig(
            vocab_size=V,
            block_size=tensors["wpe.weight"].shape[0],
            n_layer=max(layers, default=0) + 1,
            n_head=C // 64 if n_head is None else n_head,
            n_embd=C,
            qkv_bias="h.0.attn.c_attn.bias" in tensors,
            tie_weights=tie_weights,
        )
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None


def reconciled(
    source: str, tensors: dict[str, LazyTensor], config: GPTConfig, tokenizer: str | None = None
) -> Weights:
    """Return Weights after settling where a form's tensors and its configuration differ.

    A head that equals the token embedding is left out of a tied model, as is a zero bias of a model
    without qkv_bias. With other values, the tensors stay and the configuration is changed.
    """
    head = "lm_head.weight"
    if config.tie_weights and head in tensors:
        if _equal(tensors, head, "wte.weight"):
            del tensors[head]
        else:
            config = replace(config, tie_weights=False)
    biases = [name for name in tensors if name.endswith("attn.c_attn.bias")]
    if not config.qkv_bias and biases:
        if any(tensors[name].read().any() for name in biases):
            config = replace(config, qkv_bias=True)
        else:
            tensors = {name: t for name, t in tensors.items() if name not in biases}
    return Weights(source, config, tensors, tokenizer)


def without_config(source: str, tensors: dict[str, LazyTensor], n_head: int | None) -> Weights:
    """Return the Weights of tensors in GPT's names that come with no configuration.

    The head is tied if it is absent or equal to the token embedding.
    """
    tied = "lm_head.weight" not in tensors or _equal(tensors, "lm_head.weight", "wte.weight")
    return reconciled(source, tensors, infer_config(source, tensors, n_head, tie_weights=tied))


def _equal(tensors: Mapping[str, LazyTensor], a: str, b: str) -> bool:
    if b not in tensors or tensors[a].shape != tensors[b].shape:
        return False
    return torch.equal(tensors[a].read(), tensors[b].read())
