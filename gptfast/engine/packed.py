"""A model packed for the C++ engine: one tensor of bytes, and the directory that keeps it.

csrc/engine.h says how matrices lie in it. A packed directory holds packed.safetensors, which says
what model it is, and the tokenizer's files.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gptfast.checks import one_line
from gptfast.config import GPTConfig, parameter_names
from gptfast.model import GPT, MLP, Attention, Block
from gptfast.ops.backend import EXTENSION, MISSING, check_isa
from gptfast.ops.library import LIBRARY
from gptfast.tokenizer.bpe import Tokenizer
from gptfast.weights.stored import CheckpointError
from gptfast.weights.weights import Weights, tokenizer_in

DTYPES = ("fp32", "bf16", "int8")  # in the order of WeightType
CACHE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float16}
FILE = "packed.safetensors"
FORMAT = "gptfast-packed-1"
PIECE = 2**20
LIBRARY.define("engine_new(int bytes) -> Tensor")
LIBRARY.define("engine_bytes(int[] shape) -> int")
LIBRARY.define("engine_pack(Tensor(a!) packed, int[] shape, int index, Tensor weight) -> ()")
LIBRARY.define(
    "engine_step(Tensor packed, int[] shape, Tensor(a!) cache, Tensor slots, int[] rows, "
    "int[] starts, int[] counts, int[] ids, int[] wanted, Tensor[] sampling, int[] positions) "
    "-> (Tensor, Tensor)"
)


@dataclass(frozen=True)
class Packed:
    """A GPT-2 ready to run. data: (n,) uint8; shape: what the operators ask to know of it."""

    config: GPTConfig
    dtype: str
    data: Tensor
    tokenizer: str | None = None
    """A name or directory for `get_tokenizer`, if one is on record."""

    @property
    def weight_bytes(self) -> int:
        """Bytes that a step reads: all but the position embeddings."""
        return len(self.data) - 4 * self.config.block_size * self.config.n_embd

    @property
    def shape(self) -> list[int]:
        return _shape(self.config, self.dtype)


def _shape(config: GPTConfig, dtype: str) -> list[int]:
    sizes = (config.n_layer, config.n_head, config.n_embd, config.vocab_size, config.block_size)
    return [DTYPES.index(dtype), *sizes, int(config.tie_weights)]


def _new(config: GPTConfig, dtype: str) -> Tensor:
    check_isa()
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if EXTENSION is None:
        raise RuntimeError(f"the engine needs the C++ extension ({MISSING}); reinstall gptfast")
    return torch.ops.gptfast.engine_new(torch.ops.gptfast.engine_bytes(_shape(config, dtype)))


@torch.no_grad()
def _pack(
    config: GPTConfig, dtype: str, tensors: Iterable[tuple[str, Tensor]], tokenizer: str | None
) -> Packed:
    packed = Packed(config, dtype, _new(config, dtype), tokenizer)
    index = {name: i for i, name in enumerate(parameter_names(config))}
    for name, tensor in tensors:
        torch.ops.gptfast.engine_pack(packed.data, packed.shape, index[name], tensor.detach())
    return packed


def pack_model(model: GPT, dtype: str) -> Packed:
    """Of a model on the CPU that `is_plain`; it is left as it is."""
    tensors = model.named_parameters(remove_duplicate=False)
    return _pack(model.config, dtype, tensors, model.tokenizer_name)


_PLAIN = (GPT, Block, Attention, MLP, nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout)
_PLAIN += (nn.ModuleList,)


def is_plain(model: GPT) -> bool:
    """Whether modules and parameters are as GPT made them, so that its packed weights say all."""
    for module in model.modules():
        if type(module) not in _PLAIN or isinstance(module, nn.LayerNorm) and module.eps != 1e-5:
            return False
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    wanted = set(parameter_names(model.config))
    if not model.config.qkv_bias:
        wanted = {name for name in wanted if not name.endswith("c_attn.bias")}
    return names == wanted


def pack_weights(weights: Weights, dtype: str) -> Packed:
    """Of files, one tensor after the other, so that no more is held than what is packed."""
    return _pack(weights.config, dtype, weights.read(), weights.tokenizer)


def is_packed(path: str | PathLike) -> bool:
    """Whether `path` is a directory that `save` wrote."""
    try:
        return (Path(path) / FILE).is_file()
    except OSError:  # a name that no file can have
        return False


def _checksum(dtype: str, config: str) -> Any:
    """A CRC-32C that begins with what says how the bytes after it are to be read."""
    import google_crc32c  # only where there are files

    return google_crc32c.Checksum(f"{dtype} {config}".encode())


def _header(packed: Packed) -> bytes:
    buffer, config = memoryview(packed.data.numpy()), json.dumps(asdict(packed.config))
    crc = _checksum(packed.dtype, config)
    for begin in range(0, len(buffer), PIECE):
        crc.update(bytes(buffer[begin : begin + PIECE]))
    metadata = {
        "format": FORMAT,
        "dtype": packed.dtype,
        "config": config,
        "crc32c": crc.hexdigest().decode(),
    }
    if packed.tokenizer and not Path(packed.tokenizer).is_dir():
        metadata["tokenizer"] = packed.tokenizer
    tensor = {"dtype": "U8", "shape": [len(packed.data)], "data_offsets": [0, len(packed.data)]}
    text = json.dumps({"__metadata__": metadata, "packed": tensor}).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text


def save(
    packed: Packed, directory: str | PathLike, tokenizer: Tokenizer | str | None = None
) -> None:
    """Write a packed directory, whole or not at all. ValueError for a path that exists."""
    path = Path(directory)
    if path.exists():
        raise ValueError(f"{path} exists; name another or delete it")
    # Loading a packed model takes none of them.
    from gptfast.files import fsync
    from gptfast.weights.pretrained import tokenizer_texts

    texts, _ = tokenizer_texts(tokenizer or packed.tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with (temporary / FILE).open("wb") as file:
            file.write(_header(packed))
            file.write(memoryview(packed.data.numpy()))
            file.flush()
            os.fsync(file.fileno())
        for name, text in texts.items():
            (temporary / name).write_text(text, "utf-8")
            fsync(temporary / name)
        fsync(temporary)
        temporary.rename(path)
        fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _metadata(path: Path) -> tuple[GPTConfig, dict[str, str]]:
    """Shape, and what else a packed file says of itself; CheckpointError if it does not."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names, size = list(file.keys()), file.get_slice("packed").get_shape()
        if metadata.get("format") != FORMAT or names != ["packed"]:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        config, dtype = GPTConfig(**json.loads(metadata["config"])), metadata["dtype"]
        if dtype not in DTYPES or size != [torch.ops.gptfast.engine_bytes(_shape(config, dtype))]:
            raise ValueError(f"{size} bytes are no model of this shape in {dtype!r}")
        return config, metadata
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from None


def _read(path: Path, data: Tensor, crc: Any) -> str:
    """Fill data with what follows the header; the checksum of all, in hexadecimal."""
    buffer = memoryview(data.numpy())
    with path.open("rb", buffering=0) as file:
        file.seek(int.from_bytes(file.read(8), "little"), os.SEEK_CUR)
        for begin in range(0, len(buffer), PIECE):
            piece = buffer[begin : begin + PIECE]
            if file.readinto(piece) != len(piece):
                raise CheckpointError(f"{path} is damaged: it ends too soon")
            crc.update(bytes(piece))
    return crc.hexdigest().decode()


def load(directory: str | PathLike) -> Packed:
    """Read a packed directory; its checksum is verified. Raises CheckpointError."""
    path = Path(directory) / FILE
    if EXTENSION is None:
        raise RuntimeError(f"the engine needs the C++ extension ({MISSING}); reinstall gptfast")
    config, metadata = _metadata(path)
    data = _new(config, metadata["dtype"])
    crc = _checksum(metadata["dtype"], metadata["config"])
    if _read(path, data, crc) != metadata.get("crc32c"):
        raise CheckpointError(f"{path} is damaged: its CRC-32C is not the one it was saved with")
    tokenizer = tokenizer_in(Path(directory)) or metadata.get("tokenizer")
    return Packed(config, metadata["dtype"], data, tokenizer)
