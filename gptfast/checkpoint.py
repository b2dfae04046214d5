"""Models and checkpoints on disk. Only safetensors and JSON: nothing is ever unpickled.

A checkpoint is a directory:
    config.json, model.safetensors     as transformers' GPT2LMHeadModel reads them
    optimizer.safetensors              <parameter>.<exp_avg | exp_avg_sq | step | master>
    state.json                         format, progress, RNG, configs, SHA-256 of every file
It is written to a temporary sibling, each file and the directory synced, then renamed: at any
moment a directory of that name is a whole checkpoint.
"""

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.model import GPT

FORMAT = 1
# transformers keeps these four as Conv1D: (in, out) where nn.Linear has (out, in).
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def _hf_config(config: GPTConfig, dtype: torch.dtype) -> dict[str, Any]:
    eot = 50256 if config.vocab_size == 50257 else None
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "tie_word_embeddings": config.tie_weights,
        "qkv_bias": config.qkv_bias,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _gpt_config(raw: dict[str, Any], path: Path) -> GPTConfig:
    if raw.get("model_type") != "gpt2":
        raise ValueError(
            f"{path} describes a model of type {raw.get('model_type')!r}, not GPT-2's architecture"
        )
    try:
        config = GPTConfig(
            vocab_size=raw["vocab_size"],
            block_size=raw["n_positions"],
            n_layer=raw["n_layer"],
            n_head=raw["n_head"],
            n_embd=raw["n_embd"],
            dropout=raw.get("resid_pdrop", 0.0),
            qkv_bias=raw.get("qkv_bias", True),
            tie_weights=raw.get("tie_word_embeddings", True),
        )
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]!r}") from None
    except TypeError as error:
        raise ValueError(f"{path} has a value of the wrong type: {error}") from None
    fixed = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * config.n_embd),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    }
    for name, allowed in fixed.items():
        if name in raw and raw[name] not in allowed:
            raise ValueError(f"{path}: {name} is {raw[name]!r}, gptfast's GPT has {allowed[0]!r}")
    return config


def _hf_tensors(model: GPT) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu()
        if name.endswith(_CONV1D):
            tensor = tensor.t()
        prefix = "" if name.startswith("lm_head") else "transformer."
        tensors[prefix + name] = tensor.contiguous()
        if name.endswith("c_attn.weight") and not model.config.qkv_bias:
            # GPT-2's layout has no switch for it: a zero bias is the same function.
            bias = tensor.new_zeros(3 * model.config.n_embd)
            tensors[f"transformer.{name.removesuffix('weight')}bias"] = bias
    return tensors


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_files(
    directory: Path, tensors: dict[str, dict[str, Tensor]], texts: dict[str, Any]
) -> None:
    for name, named in tensors.items():
        save_file(named, directory / name, metadata={"format": "pt"})
    for name, value in texts.items():
        (directory / name).write_text(json.dumps(value, indent=2) + "\n")
    for name in (*tensors, *texts):
        _fsync(directory / name)


def _temporary(path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def save_model(model: GPT, directory: str | PathLike) -> None:
    """Write config.json and model.safetensors into `directory`, each replaced whole."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(directory / "model")
    try:
        config = _hf_config(model.config, model.wte.weight.dtype)
        _write_files(temporary, {"model.safetensors": _hf_tensors(model)}, {"config.json": config})
        for file in temporary.iterdir():
            file.replace(directory / file.name)
        _fsync(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return value


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _from_hf(tensors: dict[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    state = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # old files' causal masks
            continue
        if name == "lm_head.weight" and config.tie_weights:
            continue
        if name.endswith("c_attn.bias") and not config.qkv_bias:
            continue
        state[name] = tensor.t().contiguous() if name.endswith(_CONV1D) else tensor
    return state


def _check_state(state: dict[str, Tensor], model: GPT, source: str) -> None:
    """ValueError naming the first tensor of `state` that does not fit the model."""
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name not in state:
            raise ValueError(f"{source} has no tensor {name!r}; is it of another architecture?")
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(state[name].shape)}, the model needs "
                f"{tuple(tensor.shape)}"
            )
    if extra := sorted(state.keys() - wanted.keys()):
        raise ValueError(f"{source} has a tensor the model does not know: {extra[0]!r}")


def _open_model(path: str | PathLike) -> tuple[Path, GPTConfig]:
    """The directory `path` stands for and its config; a checkpoint's two files are verified."""
    directory = find_checkpoint(path)
    if (directory / "state.json").is_file():
        _verify(directory, _read_state(directory), ("config.json", "model.safetensors"))
    return directory, _gpt_config(_read_json(directory / "config.json"), directory / "config.json")


def load_model(path: str | PathLike) -> GPT:
    """The model of a directory with config.json and model.safetensors, in evaluation mode.

    `path` may be such a directory, a checkpoint, or the output directory of a training run, whose
    latest checkpoint is taken. Raises ValueError for anything else, naming what is wrong.
    """
    directory, config = _open_model(path)
    with torch.device("meta"):
        model = GPT(config)
    state = _from_hf(_read_tensors(directory / "model.safetensors"), config)
    _check_state(state, model, str(directory / "model.safetensors"))
    model.load_state_dict(state, assign=True)
    return model.eval()


def load_weights(model: GPT, path: str | PathLike) -> None:
    """Copy the weights of another model's directory into `model`; ValueError if they do not fit."""
    directory, config = _open_model(path)
    shape = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "tie_weights", "qkv_bias")
    for name in shape:
        theirs, ours = getattr(config, name), getattr(model.config, name)
        if theirs != ours:
            raise ValueError(
                f"{directory} is another architecture: its {name} is {theirs}, not {ours}"
            )
    state = _from_hf(_read_tensors(directory / "model.safetensors"), config)
    _check_state(state, model, str(directory / "model.safetensors"))
    model.load_state_dict(state)


def checkpoints(out: str | PathLike) -> list[Path]:
    """The checkpoints of a training run's output directory, oldest first."""
    return sorted(p for p in Path(out).glob("checkpoints/step-*") if p.is_dir())


def find_checkpoint(path: str | PathLike) -> Path:
    """`path` if it holds a model, else the latest checkpoint of the run in it; or ValueError."""
    path = Path(path)
    if not path.is_dir():
        why = "it is not a directory" if path.exists() else "there is no such directory"
        raise ValueError(f"{path} is no checkpoint: {why}")
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        return path
    if found := checkpoints(path):
        return found[-1]
    raise ValueError(
        f"{path} is no checkpoint: it has no config.json and model.safetensors, and no checkpoints/"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _optimizer_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, param in model.named_parameters()
        for key, value in optimizer.state.get(param, {}).items()
    }


def save_checkpoint(
    out: str | PathLike,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    progress: dict[str, Any],
    keep: int,
) -> Path:
    """Write out/checkpoints/step-<progress["step"]>, then delete all but the latest `keep`.

    progress: whatever else JSON can hold that a resumed run needs; it ends up in state.json.
    Returns the checkpoint's path.
    """
    target = Path(out) / "checkpoints" / f"step-{progress['step']:08d}"
    temporary = _temporary(target)
    try:
        tensors = {
            "model.safetensors": _hf_tensors(model),
            "optimizer.safetensors": _optimizer_tensors(model, optimizer),
        }
        hf_config = _hf_config(model.config, model.wte.weight.dtype)
        _write_files(temporary, tensors, {"config.json": hf_config})
        state = {
            "format": FORMAT,
            **progress,
            "rng": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
            "sha256": {name: _sha256(temporary / name) for name in (*tensors, "config.json")},
        }
        if torch.cuda.is_available():
            states = torch.cuda.get_rng_state_all()
            state["cuda_rng"] = [base64.b64encode(s.numpy().tobytes()).decode() for s in states]
        state["digest"] = _digest(state)
        _write_files(temporary, {}, {"state.json": state})
        _fsync(temporary)
        shutil.rmtree(target, ignore_errors=True)  # a resumed run that passes this step again
        temporary.rename(target)
        _fsync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in checkpoints(out)[:-keep]:
        shutil.rmtree(old)
    return target


def _digest(state: dict[str, Any]) -> str:
    """SHA-256 of all of state.json but the digest itself."""
    rest = {name: value for name, value in state.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_state(path: Path) -> dict[str, Any]:
    state = _read_json(path / "state.json")
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{path / 'state.json'} has checkpoint format {state.get('format')!r}, "
            f"expected {FORMAT}"
        )
    if state.get("digest") != _digest(state):
        raise ValueError(f"{path / 'state.json'} is damaged: its digest is not that of its values")
    return state


def _verify(path: Path, state: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if not (path / name).is_file() or _sha256(path / name) != state["sha256"][name]:
            raise ValueError(
                f"{path / name} is damaged: its SHA-256 is not the one it was saved with"
            )


def read_state(path: str | PathLike) -> dict[str, Any]:
    """state.json of a checkpoint, after checking its format and every file's SHA-256."""
    path = Path(path)
    if not (path / "state.json").is_file():
        raise ValueError(f"{path} cannot be resumed: it has no state.json (weights only)")
    state = _read_state(path)
    _verify(path, state, state["sha256"])
    return state


def load_checkpoint(
    path: str | PathLike, model: GPT, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore model, optimizer and random state from a checkpoint; returns its state.json."""
    path = Path(path)
    state = read_state(path)
    load_weights(model, path)
    names = dict(model.named_parameters())
    for key, tensor in _read_tensors(path / "optimizer.safetensors").items():
        name, _, field = key.rpartition(".")
        if name not in names:
            raise ValueError(
                f"{path} has optimizer state for {name!r}, which the model does not have"
            )
        optimizer.state[names[name]][field] = tensor.to(names[name].device)
    torch.set_rng_state(_tensor_of_bytes(state["rng"]))
    if torch.cuda.is_available() and "cuda_rng" in state:
        torch.cuda.set_rng_state_all([_tensor_of_bytes(s) for s in state["cuda_rng"]])
    return state


def _tensor_of_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
