"""Test how tensors and batches get to a device, with tensors that note what is asked of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_trainer, without_speed
from torch import Tensor

from gptfast.device import choose_device, moved, pinned
from gptfast.training import feed
from gptfast.training.feed import Feed

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Noted:
    """Notes the calls by which a tensor is copied."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.calls = device, []  # type: ignore[var-annotated]

    def pin_memory(self) -> "Noted":
        self.calls.append("pin")
        return self

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Noted":
        self.calls.append((device.type, non_blocking))
        return self


@pytest.mark.parametrize(
    ("source", "target", "calls"),
    [
        (CPU, CUDA, ["pin", ("cuda", True)]),
        (CUDA, CUDA, [("cuda", True)]),
        (CUDA, CPU, [("cpu", False)]),  # whoever reads the values must find them there
        (CPU, CPU, [("cpu", False)]),
    ],
    ids=["to-gpu", "on-gpu", "from-gpu", "on-cpu"],
)
def test_moved(source: torch.device, target: torch.device, calls: list[Any]) -> None:
    tensor: Any = Noted(source)
    moved(tensor, target)
    assert tensor.calls == calls


def test_nothing_is_copied_on_the_cpu() -> None:
    x = torch.ones(3)
    assert moved(x, CPU) is x and pinned(x, CPU) is x


def test_an_absent_gpu_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, lacks in ((None, "is built without CUDA"), ("13.0", "finds no GPU")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(ValueError) as caught:
            choose_device("cuda")
        message = str(caught.value)
        assert message.startswith("device must be auto or cpu, got 'cuda': this torch")
        assert lacks in message and "use --device cpu" in message and "\n" not in message


def numbered() -> Iterator[tuple[Tensor, Tensor]]:
    for i in range(7):
        yield torch.full((1, 2), i), torch.full((1, 2), -i)
    raise OSError("the file is gone")


def first_ids(batches: list[tuple[Tensor, Tensor]]) -> list[int]:
    return [int(x[0, 0]) for x, _ in batches]


@pytest.fixture
def pins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the tensors that are pinned instead of pinning them."""
    pins: list[int] = []
    monkeypatch.setattr(feed, "pinned", lambda x, device: pins.append(1) or x)
    return pins


def test_the_next_batches_are_ready(pins: list[int]) -> None:
    fed = Feed(numbered(), 2, CUDA)
    assert first_ids(fed.take()) == [0, 1]
    fed.prepare()
    fed.prepare()
    assert len(pins) == 8
    assert first_ids(fed.take()) == [2, 3] and len(pins) == 8
    assert first_ids(fed.take()) == [4, 5]
    fed.prepare()  # does not raise: the step under way must end
    for _ in range(2):
        with pytest.raises(OSError, match="the file is gone"):
            fed.take()


def test_a_run_prepares_during_each_step(
    pins: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose batches are loaded ahead sees those of a run that loads them when asked."""
    wanted = make_trainer(tmp_path / "wanted", max_steps=3, accumulation_steps=2)
    wanted.fit()
    monkeypatch.setattr(
        "gptfast.training.trainer.Feed", lambda stream, n, device: Feed(stream, n, CUDA)
    )
    pins.clear()
    trainer = make_trainer(tmp_path / "run", max_steps=3, accumulation_steps=2)
    trainer.fit()
    assert without_speed(trainer.history) == without_speed(wanted.history)
    assert len(pins) == 4 * 2 * 2  # those of a fourth step were prepared in vain


def test_the_cpu_prepares_nothing() -> None:
    stream = numbered()
    fed = Feed(stream, 1, CPU)
    assert first_ids(fed.take()) == [0]
    fed.prepare()
    assert int(next(stream)[0][0, 0]) == 1
