"""Write TensorFlow's TensorBundle format, in parts that tests can damage."""

import json
from collections.abc import Mapping
from pathlib import Path

import google_crc32c
import numpy as np

from gptfast import GPT
from gptfast.weights.pretrained import hf_tensors

_DTYPES = {"float32": 1, "float64": 2, "int64": 9, "float16": 19}


def varint(n: int) -> bytes:
    """Return n in protobuf's variable-length encoding."""
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def masked(data: bytes) -> int:
    """Return the CRC-32C of data, masked as LevelDB stores it."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def field(number: int, value: int | bytes) -> bytes:
    """Return a protobuf field: an integer as a varint, bytes with their length."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def entry(array: np.ndarray, offset: int, shard: int = 0) -> bytes:
    """Return the BundleEntryProto of an array whose bytes begin at `offset`."""
    data = array.tobytes()
    shape = b"".join(field(2, field(1, n)) for n in array.shape)
    out = field(1, _DTYPES[array.dtype.name]) + field(2, shape) + field(3, shard)
    out += field(4, offset) + field(5, len(data))
    return out + varint(6 << 3 | 5) + masked(data).to_bytes(4, "little")


def block(entries: list[tuple[bytes, bytes]], restart_every: int = 16) -> bytes:
    """Return a block of a table with its trailer; keys share prefixes, as in LevelDB."""
    out, restarts, last = bytearray(), [], b""
    for i, (key, value) in enumerate(entries):
        shared = 0
        if i % restart_every == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        rest = key[shared:]
        out += varint(shared) + varint(len(rest)) + varint(len(value)) + rest + value
        last = key
    for number in [*(restarts or [0]), len(restarts or [0])]:
        out += number.to_bytes(4, "little")
    return bytes(out) + trailer(bytes(out))


def trailer(content: bytes) -> bytes:
    """Return a block's type (not compressed) and checksum."""
    return b"\0" + masked(content + b"\0").to_bytes(4, "little")


def table(entries: list[tuple[bytes, bytes]], per_block: int = 64) -> bytes:
    """Return a whole LevelDB table of sorted keys and values."""
    out, handles = b"", []
    for i in range(0, len(entries), per_block):
        part = block(entries[i : i + per_block])
        handles.append((entries[i : i + per_block][-1][0], (len(out), len(part) - 5)))
        out += part
    meta = varint(len(out)) + varint(len(block([])) - 5)
    out += block([])
    index = block([(key, varint(a) + varint(n)) for key, (a, n) in handles], 1)
    footer = meta + varint(len(out)) + varint(len(index) - 5)
    magic = 0xDB4775248B80FB57
    return out + index + footer.ljust(40, b"\0") + magic.to_bytes(8, "little")


def write(prefix: Path, arrays: Mapping[str, np.ndarray], per_block: int = 64) -> None:
    """Write `<prefix>.index` and one shard."""
    entries, at = [(b"", field(1, 1))], 0
    with prefix.with_name(f"{prefix.name}.data-00000-of-00001").open("wb") as file:
        for name in sorted(arrays):
            entries.append((name.encode(), entry(arrays[name], at)))
            at += file.write(arrays[name].tobytes())
    prefix.with_name(f"{prefix.name}.index").write_bytes(table(entries, per_block))


def write_openai(directory: Path, model: GPT) -> Path:
    """Write a model as OpenAI does: hparams.json and a checkpoint under OpenAI's names."""
    c = model.config
    sizes = {"n_vocab": c.vocab_size, "n_ctx": c.block_size, "n_embd": c.n_embd}
    sizes |= {"n_head": c.n_head, "n_layer": c.n_layer}
    (directory / "hparams.json").write_text(json.dumps(sizes))
    arrays = {}
    for name, tensor in hf_tensors(model).items():
        *path, leaf = name.removeprefix("transformer.").replace("h.", "h", 1).split(".")
        if path[-1] in ("wte", "wpe"):
            arrays[f"model/{path[-1]}"] = tensor.numpy()
            continue
        kind = "b" if leaf == "bias" else "g" if path[-1].startswith("ln") else "w"
        arrays["/".join(["model", *path, kind])] = (tensor[None] if kind == "w" else tensor).numpy()
    write(directory / "model.ckpt", arrays)
    return directory
