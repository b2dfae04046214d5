"""`Weights`, which the reader of every form returns, and what these readers have in common."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gptfast.config import GPTConfig, parameter_shapes
from gptfast.tokenizer.characters import characters_file
from gptfast.tokenizer.vocabulary import has_gpt2, vocabulary_in
from gptfast.weights.lazy_tensor import FLOATS, CheckpointError, LazyTensor
from gptfast.weights.names import Named, equal, file_name
from gptfast.weights.said import SIZES, Said

_LOG = logging.getLogger(__name__)


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
    vocabulary: str | None = None
    """What identifies the vocabulary of its training, as `tokenizer.bpe.vocabulary`, if known."""
    eos_ids: tuple[int, ...] = ()
    """The ids that end a text, as far as the files name any."""
    names: Mapping[str, str] = field(default_factory=dict)
    """The file's own names of the tensors, for messages."""
    notes: tuple[str, ...] = ()
    """What was assumed or left out, which is logged when the values are read."""

    def __post_init__(self) -> None:
        shapes = parameter_shapes(self.config)
        for name, shape in shapes.items():
            theirs = file_name(name, self.names)
            if name not in self.tensors:
                raise CheckpointError(f"{self.source} has no tensor {theirs!r}")
            tensor = self.tensors[name]
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{self.source}: {theirs} has shape {tensor.shape}, the model needs {shape}"
                )
            if tensor.dtype not in FLOATS:
                raise CheckpointError(
                    f"{self.source}: {theirs} is {tensor.dtype}, not floating-point"
                )
        if extra := sorted(self.tensors.keys() - shapes.keys()):
            theirs = file_name(extra[0], self.names)
            raise CheckpointError(f"{self.source} has a tensor the model does not know: {theirs!r}")

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name and values. Raises CheckpointError for damaged files."""
        self._say()
        for name in self._largest_first():
            yield name, self.tensors[name].read()

    def move_into(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        after_each: Callable[[str], None] | None = None,
    ) -> None:
        """Replace a model's parameters by these, all in one dtype.

        dtype: None takes that of the token embedding. model: one of this configuration; its own
        parameters may be on the meta device. To be called once: each tensor is released as it is
        moved, so that no more is held than the model. after_each: called with the name of each
        parameter once it is there; may replace its module. Raises CheckpointError for damaged
        files.
        """
        self._say()
        dtype = dtype or self.tensors["wte.weight"].dtype
        for name in self._largest_first():
            module, _, leaf = name.rpartition(".")
            values = self.tensors.pop(name).load().to(dtype)
            setattr(model.get_submodule(module), leaf, nn.Parameter(values))
            if after_each is not None:
                after_each(name)

    @torch.no_grad()
    def copy_to(self, config: GPTConfig, state: Mapping[str, Tensor]) -> None:
        """Copy the values into the state dictionary of a model with this configuration.

        Raises ValueError, with nothing changed, if config is of another shape, and
        CheckpointError for damaged files.
        """
        self.check_shape(config)
        for name, values in self.read():
            state[name].copy_(values)

    def check_shape(self, config: GPTConfig) -> None:
        """Raise ValueError, with the remedy, if a configuration is of another shape."""
        for name in (*SIZES, "n_head", "tie_weights", "qkv_bias"):
            theirs, ours = getattr(self.config, name), getattr(config, name)
            if theirs != ours:
                raise ValueError(
                    f"{self.source} is a model of another shape: its {name} is {theirs}, not "
                    f"{ours}; {_remedy(name, theirs, ours)}"
                )

    def resized(self, vocab_size: int) -> "Weights":
        """Return these weights for a vocabulary that grew.

        The rows of new tokens, in the embedding and in the head, are the mean of the old rows.
        Raises ValueError for fewer tokens than there are.
        """
        old = self.config.vocab_size
        if vocab_size < old:
            raise ValueError(
                f"{self.source} has {old:,} tokens, and --resize-vocab only adds, got "
                f"{vocab_size:,}"
            )
        tensors = dict(self.tensors)
        for name in {"wte.weight", "lm_head.weight"} & tensors.keys() if vocab_size > old else ():
            tensors[name] = _grown(tensors[name], vocab_size)
        config = replace(self.config, vocab_size=vocab_size)
        return replace(self, config=config, tensors=tensors)

    def _say(self) -> None:
        for note in self.notes:
            _LOG.warning("%s: %s", self.source, note)

    def _largest_first(self) -> list[str]:
        """Return the names by size: a large tensor is then read while little else is held."""
        return sorted(self.tensors, key=lambda name: -self.tensors[name].numel())


def _remedy(name: str, theirs: int, ours: int) -> str:
    """Return what to do where the model to start from has another value than was asked for."""
    if name == "block_size":
        return "leave --block-size out; --max-length makes windows shorter"
    if name != "vocab_size":
        return f"leave --{name.replace('_', '-')} out"
    if ours > theirs:
        return "for a vocabulary that grew, --resize-vocab adds rows for the new tokens"
    return "choose the tokenizer that it was trained with"


def tokenizer_in(directory: Path) -> str | None:
    """Return the directory as a name for `get_tokenizer`, or None if no vocabulary is in it."""
    found = vocabulary_in(directory) or characters_file(directory)
    return str(directory.resolve()) if found else None


def named_or_kept(name: str | None, directory: Path) -> str | None:
    """Return a tokenizer's name if it is nobody's to change, else the files in a directory."""
    if name == "byte" or name == "gpt2" and has_gpt2():
        return name
    return tokenizer_in(directory) or name


def _grown(rows: LazyTensor, n: int) -> LazyTensor:
    """Return an embedding (V, C) with rows up to n, of which the new ones are the mean."""

    def read() -> Tensor:
        old = rows.read()
        mean = old.float().mean(0, keepdim=True).to(old.dtype)
        return torch.cat([old, mean.expand(n - len(old), -1)])

    return LazyTensor((n, *rows.shape[1:]), rows.dtype, read, fresh=True)


def infer_config(
    source: str, named: Named, said: Said, n_head: int | None
) -> tuple[GPTConfig, list[str]]:
    """Return the configuration of tensors that come without a config.json, and what was assumed.

    Sizes are those of the shapes, which must be the stated ones. n_head: no shape shows it; None
    takes what the file states, else heads of 64 channels. Raises CheckpointError if there is no
    such configuration.
    """
    tensors, notes = named.tensors, []
    for name in ("wte.weight", "wpe.weight"):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise CheckpointError(f"{source} has no tensor {named.file_name(name)!r}")
    V, C = tensors["wte.weight"].shape
    layers = [int(found[1]) for name in tensors if (found := re.match(r"h\.(\d{1,5})\.", name))]
    sizes = {"vocab_size": V, "n_embd": C, "n_layer": max(layers, default=0) + 1}
    sizes["block_size"] = tensors["wpe.weight"].shape[0]
    for name in SIZES:
        if said.get(name, sizes[name]) != sizes[name]:
            raise CheckpointError(
                f"{source} contradicts itself: {said.places[name]} is {said.get(name)}, but its "
                f"tensors have {name} {sizes[name]}"
            )
    heads = said.get("n_head", n_head)  # open_weights compares the two
    if heads is None and C % 64:
        raise CheckpointError(
            f"{source} does not say how many heads it has; n_head ({C} channels) must be given "
            "(gptfast convert --n-head)"
        )
    if heads is None:
        heads = C // 64
        notes.append(
            f"it does not say how many heads it has: {heads} are assumed, of 64 channels each; "
            "gptfast convert --n-head sets another number"
        )
    try:
        config = GPTConfig(
            **sizes,
            n_head=heads,
            dropout=said.get("dropout", 0.0),
            qkv_bias="h.0.attn.c_attn.bias" in tensors,
            tie_weights="lm_head.weight" not in tensors or _tied(tensors),
        )
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    return config, notes


def weights_of(
    source: str,
    named: Named,
    said: Said,
    *,
    config: GPTConfig | None = None,
    n_head: int | None = None,
    tokenizer: str | None = None,
    notes: tuple[str, ...] = (),
) -> Weights:
    """Return the Weights of a file's tensors and of what it states.

    config: that of a config.json, if there is one. n_head: see `infer_config`. Where tensors and
    configuration differ harmlessly, this settles it: a head that equals the token embedding is left
    out of a tied model, as is a zero bias of a model without qkv_bias; with other values, the
    tensors stay and the configuration is changed. Raises CheckpointError.
    """
    named, spoken = _completed(source, named, said, config)
    if config is None:
        config, assumed = infer_config(source, named, said, n_head)
        spoken += assumed
    tensors, head = named.tensors, "lm_head.weight"
    if config.tie_weights and head in tensors:
        if _tied(tensors):
            del tensors[head]
        else:
            config = replace(config, tie_weights=False)
    biases = [name for name in tensors if name.endswith("attn.c_attn.bias")]
    if not config.qkv_bias and biases:
        if any(tensors[name].read().any() for name in biases):
            config = replace(config, qkv_bias=True)
        else:
            tensors = {name: t for name, t in tensors.items() if name not in biases}
    notes = (*notes, *spoken)
    return Weights(source, config, tensors, tokenizer, names=named.names, notes=notes)


def _tied(tensors: Mapping[str, LazyTensor]) -> bool:
    head, embedding = tensors["lm_head.weight"], tensors.get("wte.weight")
    return embedding is not None and equal(head, embedding)


def _completed(
    source: str, named: Named, said: Said, config: GPTConfig | None
) -> tuple[Named, list[str]]:
    """Return the tensors after what GPT-2 has in one way only, and what is to be said about it.

    A tied embedding stored as the head alone is put in its place, a head of another task is left
    out, and a model without biases gets zeros.
    """
    tensors, notes, left = dict(named.tensors), [], list(named.left)
    tied = said.get("tie_weights", True) if config is None else config.tie_weights
    if tied and "wte.weight" not in tensors and "lm_head.weight" in tensors:
        tensors["wte.weight"] = tensors.pop("lm_head.weight")
    head, embedding = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    if head and embedding and embedding.shape and head.shape:
        if 2 * head.shape[0] < embedding.shape[0]:  # classes, not tokens: the book's chapter 6
            left += [named.names[name] for name in _HEAD if tensors.pop(name, None)]
    if (bias := tensors.pop("lm_head.bias", None)) is not None and bias.read().any():
        raise CheckpointError(
            f"{source} is another architecture: its head has a bias, "
            f"{named.file_name('lm_head.bias')!r}, and GPT-2's has none"
        )
    if left:
        notes.append(f"left out what belongs to another task: {', '.join(left)}")
    has_bias = [name for name in tensors if name.endswith(".bias")]
    if said.get("bias") is False and any(tensors[name].read().any() for name in has_bias):
        raise CheckpointError(
            f"{source} contradicts itself: {said.places['bias']} is False, but "
            f"{named.file_name(has_bias[0])!r} is there"
        )
    if not has_bias and said.get("bias") is not True:
        tensors |= _zero_biases(tensors)
        if said.get("bias") is None:
            notes.append("it has no biases: zeros are taken for them")
    return replace(named, tensors=tensors), notes


_HEAD = ("lm_head.weight", "lm_head.bias")


def _zero_biases(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Return a bias of zeros, which changes nothing, for every layer and norm without a bias."""

    def zeros(n: int, dtype: torch.dtype) -> LazyTensor:
        return LazyTensor((n,), dtype, lambda: torch.zeros(n, dtype=dtype), fresh=True)

    return {
        name.removesuffix("weight") + "bias": zeros(tensor.shape[0], tensor.dtype)
        for name, tensor in tensors.items()
        if name.startswith(("h.", "ln_f.")) and name.endswith("weight") and tensor.shape
    }
