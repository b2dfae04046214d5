"""OpenAI's form: a directory of hparams.json, a TensorFlow checkpoint, encoder.json, vocab.bpe."""

import re
from pathlib import Path

from gptfast.config import GPTConfig, parameter_shapes
from gptfast.weights.lazy_tensor import CheckpointError, LazyTensor, read_json
from gptfast.weights.tensor_bundle import read_bundle
from gptfast.weights.weights import Weights, tokenizer_in

_SIZES = {
    "vocab_size": "n_vocab",
    "block_size": "n_ctx",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
_NAME = re.compile(
    r"model/(wte|wpe|ln_f/[gb]|h\d{1,5}/(ln_[12]/[gb]|attn/c_(attn|proj)/[wb]|mlp/c_(fc|proj)/[wb]))"
)
_LEAVES = {"g": "weight", "w": "weight", "b": "bias"}


def _prefix(directory: Path) -> Path:
    """Return the path of a directory's TensorFlow checkpoint, without .index.

    It is the one that the file `checkpoint` names, or the only one there is.
    """
    file = directory / "checkpoint"
    if file.is_file() and file.stat().st_size < 2**20:
        text = file.read_text("utf-8", errors="replace")
        if named := re.search(r'^model_checkpoint_path: "([^"\n]+)"', text, re.M):
            # Only the name counts: the directory may have been moved since.
            prefix = directory / Path(named[1]).name
            if prefix.with_name(f"{prefix.name}.index").is_file():
                return prefix
    found = sorted(directory.glob("*.index"))
    if len(found) != 1:
        raise CheckpointError(
            f"{directory} has {len(found)} TensorFlow checkpoints (*.index) and no file "
            "'checkpoint' that names one"
        )
    return found[0].with_suffix("")


def _gpt_name(name: str) -> str:
    """Return GPT's name of a variable: model/h0/attn/c_attn/w -> h.0.attn.c_attn.weight."""
    *path, leaf = re.sub(r"^model/h(\d+)/", r"h/\1/", name).removeprefix("model/").split("/")
    return ".".join([*path, _LEAVES[leaf]] if leaf in _LEAVES else [*path, leaf, "weight"])


def _their_name(name: str) -> str:
    """Return the variable's name of a parameter: h.0.attn.c_attn.weight -> model/h0/attn/c_attn/w.

    It is for messages.
    """
    path, _, leaf = re.sub(r"^h\.(\d+)", r"h\1", name).replace(".", "/").rpartition("/")
    if path in ("wte", "wpe"):
        return f"model/{path}"
    weight = "g" if path.split("/")[-1].startswith("ln_") else "w"
    return f"model/{path}/{'b' if leaf == 'bias' else weight}"


def _gpt_tensor(name: str, tensor: LazyTensor) -> LazyTensor:
    """Return a convolution's (1, in, out) as a linear layer's (out, in), any other as it is."""
    if not name.endswith("/w"):
        return tensor
    if len(tensor.shape) != 3 or tensor.shape[0] != 1:
        raise CheckpointError(f"{name} has shape {tensor.shape}, not (1, in, out)")
    shape = tensor.shape[1:]
    return LazyTensor(shape, tensor.dtype, lambda: tensor.read()[0]).t()


def open_directory(directory: Path) -> Weights:
    """Return the weights of a directory that OpenAI's download gives.

    Other variables, such as an optimizer's, are left out. Raises CheckpointError.
    """
    hparams = read_json(directory / "hparams.json")
    for theirs in _SIZES.values():
        if theirs not in hparams:
            raise CheckpointError(f"{directory / 'hparams.json'} has no {theirs!r}")
    try:
        config = GPTConfig(**{ours: hparams[theirs] for ours, theirs in _SIZES.items()})
    except ValueError as error:
        raise CheckpointError(f"{directory / 'hparams.json'}: {error}") from None
    prefix = _prefix(directory)
    raw = {name: t for name, t in read_bundle(prefix).items() if _NAME.fullmatch(name)}
    tensors = {_gpt_name(name): _gpt_tensor(name, tensor) for name, tensor in raw.items()}
    names = {name: _their_name(name) for name in parameter_shapes(config)}
    return Weights(str(prefix), config, tensors, tokenizer_in(directory), names=names)
