"""Where the tokens lie in a token file, and as which integers: by its header or by its bytes.

A file without a header does not say what its integers are. nanoGPT writes uint16, but NumPy writes
int64 unless told otherwise. Read as the wrong type, such a file gives other tokens without any
error. So its bytes are looked at: ids are small, and the high parts of wide integers are zeros.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

MAGIC, VERSION = 20240520, 1
LLAMA_MAGIC = 20240801
HEADER_BYTES = 1024
NUMPY_MAGIC = b"\x93NUMPY"
# What zip files (.npz, .pt), gzip, xz and zstd begin with.
_PACKED = (b"PK\x03\x04", b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
UINT16 = np.dtype("<u2")
# Zeros of 16 bits that are enough to tell that they are the high parts of wide integers: each of 64
# bits has three. And as many floating-point numbers.
MIN_ZEROS = 16
# Wide integers that may have other high parts than zero, as ids beyond 65,535 have.
_MIN_WIDE = 4
# Samples of a large file.
_SAMPLES, _SAMPLE_BYTES = 64, 4096
# No tokenizer has more tokens than that.
_MAX_ID = 1 << 20
_WIDE_ID = 1 << 12
# Of the bytes of a text: those above ASCII, and (as 8-bit ids) those that are 0.
_MAX_HIGH_SHARE, _MAX_ZERO_SHARE = 0.02, 0.2


@dataclass(frozen=True)
class TokenLayout:
    """The bytes before a file's tokens, their number and their type."""

    offset: int
    count: int
    dtype: np.dtype = UINT16


def token_layout(path: Path) -> TokenLayout:
    """Return where the tokens of a file are, and as what.

    Raises ValueError for a file of another size than its header says, and for bytes that are no
    tokens; OSError.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        start = file.read(12)
        if not size:
            raise ValueError(f"{path} is empty; write it again")
        if start.startswith(NUMPY_MAGIC):
            return _numpy_layout(path)
        if start.startswith(_PACKED):
            raise ValueError(
                f"{path} is a compressed file, or an archive such as a model's: it is no token "
                "file as it stands; unpack it, or give another"
            )
        if path.suffix == ".npy":
            raise ValueError(f"{path} is no NumPy array, as its name says; name it .bin")
        head = np.frombuffer(start.ljust(12, b"\0"), "<i4").tolist()
        if head[0] == LLAMA_MAGIC:
            raise ValueError(
                f"{path} has Llama 3's 32-bit tokens; give GPT-2's, which have 16 bits"
            )
        if head[0] == MAGIC:
            return _headed_layout(path, size, head[1], head[2])
        dtype = _type_of(path, size, _samples(file, size))
        if size % dtype.itemsize:
            raise ValueError(
                f"{path} has {size} bytes, an odd number: it is cut off, or its tokens are not "
                "uint16; write it again"
            )
        return TokenLayout(0, size // dtype.itemsize, dtype)


def _headed_layout(path: Path, size: int, version: int, count: int) -> TokenLayout:
    """Return the layout that llm.c's header describes."""
    if version != VERSION:
        raise ValueError(f"{path} has version {version} of llm.c's header; only 1 can be read")
    if size != HEADER_BYTES + 2 * count:
        raise ValueError(
            f"{path} has {size} bytes, but its header says {count} tokens, "
            f"{HEADER_BYTES + 2 * count} bytes: it is cut off or damaged; write it again"
        )
    if not count:
        raise ValueError(f"{path} is empty: its header says 0 tokens; write it again")
    return TokenLayout(HEADER_BYTES, count)


def _numpy_layout(path: Path) -> TokenLayout:
    """Return the layout of an array that np.save wrote."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OverflowError, MemoryError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a NumPy array: {error}") from None
    if not isinstance(array, np.memmap) or array.dtype.kind not in "iu":
        raise ValueError(f"{path} has {array.dtype} values; tokens are integers")
    if array.size != max(array.shape, default=0):
        raise ValueError(
            f"{path} has shape {array.shape}; tokens are one sequence: join its rows and save it "
            "again"
        )
    if not array.size:
        raise ValueError(f"{path} is empty; write it again")
    return TokenLayout(int(array.offset), array.size, array.dtype)


def _samples(file: BinaryIO, size: int) -> bytes:
    """Return the bytes of a short file, evenly spaced samples of a long one; whole words of 8."""
    starts: list[int] = [0]
    if size > _SAMPLES * _SAMPLE_BYTES:
        last = (size - _SAMPLE_BYTES) // 8
        starts = [8 * (i * last // (_SAMPLES - 1)) for i in range(_SAMPLES)]
    found = []
    for start in starts:
        file.seek(start)
        found.append(file.read(_SAMPLE_BYTES if len(starts) > 1 else size))
    return b"".join(found)


def _type_of(path: Path, size: int, content: bytes) -> np.dtype:
    """Return the type of a headerless file's tokens, given samples of its bytes.

    Raises ValueError for bytes that look like tokens of a type that is not read.
    """
    for name in ("<i8", "<f8", ">i8", "<i4", "<f4", ">i4"):
        dtype = np.dtype(name)
        if not _has_ids(content, dtype):
            continue
        n = len(content) // dtype.itemsize
        if n * (dtype.itemsize // 2 - 1) < MIN_ZEROS:
            if size % dtype.itemsize == 0:
                raise ValueError(_ambiguous(path, size, n, 8 * dtype.itemsize))
            continue
        if dtype.kind == "f" or name[0] == ">":
            what = "floating-point numbers" if dtype.kind == "f" else "big-endian integers"
            raise ValueError(
                f"{path} has {what} of {8 * dtype.itemsize} bits; write its tokens as 16-bit or "
                "32-bit little-endian integers"
            )
        bits = 8 * dtype.itemsize
        if size % dtype.itemsize:
            raise ValueError(
                f"{path} has tokens of {bits} bits and {size} bytes, which is no multiple: it is "
                "cut off; write it again"
            )
        if (lowest := int(_values(content, dtype).min())) < 0:
            raise ValueError(f"{path} has {bits}-bit tokens, one of them {lowest}; ids are >= 0")
        return dtype
    if _has_bytes(content):
        raise ValueError(
            f"{path} looks like text or like tokens of 8 bits, not of 16; name a text .txt, and "
            "write tokens as 16-bit integers"
        )
    return UINT16


def _ambiguous(path: Path, size: int, n: int, bits: int) -> str:
    """Return what is wrong with a short file whose type cannot be told."""
    return (
        f"{path} has {size} bytes, too few to tell {n} tokens of {bits} bits from {size // 2} of "
        "16; write them as .npy or with llm.c's header, which say what they are"
    )


def _values(content: bytes, dtype: np.dtype) -> np.ndarray:
    """Return as many values of this type as there are whole ones."""
    return np.frombuffer(content, dtype, len(content) // dtype.itemsize)


def _has_ids(content: bytes, dtype: np.dtype) -> bool:
    """Return whether bytes make sense as ids of this type, and not as narrower ones."""
    values = _values(content, dtype)
    if not len(values):
        return False
    if dtype.kind == "f":
        if len(values) < MIN_ZEROS:
            return False
        with np.errstate(invalid="ignore"):
            whole = bool((values == np.floor(values)).all())
        return whole and 0 <= values.min() and 1 <= values.max() < _MAX_ID
    low, high = int(values.min()), int(values.max())
    if not (-(1 << 15) <= low and 1 <= high < _MAX_ID):
        return False
    # Where all pairs of small 16-bit ids are small 32-bit ids too, no large id is among them.
    wide = len(values) >= _MIN_WIDE and int((values & 0xFFFF).max()) >= _WIDE_ID
    return (low >= 0 and high < 1 << 16) or wide


def _has_bytes(content: bytes) -> bool:
    """Return whether bytes are those of a text or of 8-bit ids.

    In 16-bit ids the low bytes take all values and the high bytes only few, or none but zero.
    """
    values = np.frombuffer(content, np.uint8)
    if len(values) < 4 * MIN_ZEROS or (values > 127).mean() > _MAX_HIGH_SHARE:
        return False
    high = values[1::2]
    return len(np.unique(high)) >= 8 and (high == 0).mean() < _MAX_ZERO_SHARE
