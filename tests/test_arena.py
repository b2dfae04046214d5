"""The memory of the C++ kernels' tensors is reused, given back and never shared."""

import resource
import threading
from pathlib import Path

import pytest
import torch

from gptfast import empty_cache, ops
from gptfast.ops.backend import EXTENSION

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the C++ extension is not built")

MB = 2**18  # floats


def tensor(megabytes: int, value: float) -> torch.Tensor:
    """Return an operation's output of so many MB that holds one value everywhere."""
    x = torch.full((256, 1), value)
    return ops.linear(x, torch.ones(megabytes * MB // 256, 1))


def test_memory_is_reused_and_never_shared() -> None:
    first = tensor(4, 1.0)
    address = first.data_ptr()
    view = first[1:]
    del first
    second = tensor(4, 2.0)
    assert second.data_ptr() != address and (view == 1).all()  # the view keeps the memory
    del view
    third = tensor(3, 3.0)
    assert third.data_ptr() == address
    fourth = tensor(1, 4.0)  # takes the rest of the first block
    assert address < fourth.data_ptr() < address + 4 * MB * 4
    for t, value in ((second, 2), (third, 3), (fourth, 4)):
        assert (t == value).all()


def test_neighbours_that_are_free_become_one() -> None:
    blocks = [tensor(2, float(i)) for i in range(3)]
    address = min(t.data_ptr() for t in blocks)
    whole = {t.data_ptr() - address for t in blocks}
    for i in (1, 0, 2):
        blocks[i] = None
    if whole == {0, 2 * MB * 4, 4 * MB * 4}:
        assert tensor(6, 1.0).data_ptr() == address


def test_tensors_outlive_the_cache() -> None:
    kept, gone = tensor(3, 5.0), tensor(3, 6.0)
    del gone
    empty_cache()
    assert (kept == 5).all()
    assert (tensor(3, 7.0) == 7).all()


def test_the_cache_goes_back_to_the_system() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    x = tensor(256, 1.0)
    del x
    before = resident()
    empty_cache()
    assert before - resident() > 200 * 2**20


def test_storage_can_be_shared_but_not_resized() -> None:
    """PyTorch resizes only what its own allocators gave; its stable interface takes no others."""
    x = tensor(2, 3.0)
    with pytest.raises(RuntimeError, match="storage that is not resizable"):
        x.untyped_storage().resize_(16)
    assert (x == 3).all()
    y = tensor(2, 4.0).share_memory_()
    assert y.is_shared() and (y == 4).all()


def test_threads() -> None:
    wrong = []

    def work(value: float) -> None:
        for size in (1, 3, 2, 4) * 5:
            if not (tensor(size, value) == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
