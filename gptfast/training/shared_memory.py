"""Memory that the processes of one machine share: a file without a name, which each of them maps.

The first process makes the file, and the others find it by its number among that process's open
files. It is gone when the last of them has ended, however they end.
"""

import contextlib
import mmap
import os
import secrets
import sys
from collections.abc import Callable

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes: of a cache line, so that no two processes write to the same one."""
_MARK_BYTES = 16


def _mapped(file: int, n_bytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(file, n_bytes + _MARK_BYTES), dtype=torch.uint8)


def _mark(memory: Tensor) -> str:
    return bytes(memory[-_MARK_BYTES:].tolist()).hex()


def _found(place: str, mark: str, n_bytes: int) -> Tensor | None:
    """Return the memory of a file of another process; None if it is not what that process made."""
    # The number may mean another process here, in a container of its own.
    with contextlib.suppress(OSError, ValueError):
        file = os.open(f"/proc/{place}", os.O_RDWR)
        try:
            memory = _mapped(file, n_bytes)
        finally:
            os.close(file)
        return memory if _mark(memory) == mark else None
    return None


def share_memory(n_bytes: int, is_first: bool, exchange: Callable) -> Tensor | None:
    """Return zeros, (n_bytes,) uint8, that all processes share, or None where they cannot.

    All must call it. exchange: returns the texts of all, given a name and that of this process.
    """
    file, memory, offer = -1, None, ""
    # Some Pythons for Linux lack it too: they were built for older systems.
    if is_first and sys.platform == "linux" and hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):
            file = os.memfd_create("gptfast")
            os.ftruncate(file, n_bytes + _MARK_BYTES)
            memory = _mapped(file, n_bytes)
            memory[-_MARK_BYTES:] = torch.tensor(
                list(secrets.token_bytes(_MARK_BYTES)), dtype=torch.uint8, device="cpu"
            )
            offer = f"{os.getpid()}/fd/{file} {_mark(memory)}"
    place, _, mark = exchange("is offered", offer)[0].partition(" ")
    if place and not is_first:
        memory = _found(place, mark, n_bytes)
    have_it = exchange("is there", "yes" if memory is not None else "no")
    if file >= 0:
        os.close(file)
    return memory[:n_bytes] if memory is not None and set(have_it) == {"yes"} else None


def padded(n_bytes: int) -> int:
    """Return the bytes that a tensor of n_bytes takes in an `Allotment`."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


class Allotment:
    """Gives out parts of a memory, (n_bytes,) uint8, one after the other."""

    def __init__(self, memory: Tensor) -> None:
        self._memory, self._used = memory, 0

    def like(self, t: Tensor) -> Tensor:
        """Return room for a tensor like t, contiguous, whose storage is this room alone."""
        begin, self._used = self._used, self._used + padded(t.nbytes)
        if not t.numel():
            return torch.empty_like(t)
        # A view would have the storage of all, which torch.save writes with it.
        buffer = self._memory.numpy()
        room = torch.frombuffer(buffer, dtype=t.dtype, count=t.numel(), offset=begin)
        return room.view(t.shape)
