"""Files that are written tensor by tensor are those of safetensors' own writer, byte for byte."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import random_model
from safetensors.torch import save_file
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.weights.pretrained import hf_layouts, hf_tensors
from gptfast.weights.safetensors_file import Layout, write_safetensors


def test_same_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = {
        "z": torch.randn(3, 5),
        "scalar": torch.tensor(2.0),
        "bf16": torch.randn(4, 6).bfloat16().t(),
        "empty": torch.zeros(0, 3),
        "fp64": torch.randn(2, dtype=torch.float64),
    }
    layouts = {name: Layout(x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    write_safetensors(tmp_path / "ours", layouts, tensors.items(), {"more": "text"})
    plain = {name: x.contiguous() for name, x in tensors.items()}
    save_file(plain, tmp_path / "theirs", metadata={"format": "pt"})
    write_safetensors(tmp_path / "again", layouts, reversed(tensors.items()))
    assert (tmp_path / "again").read_bytes() == (tmp_path / "theirs").read_bytes()
    ours = (tmp_path / "ours").read_bytes()
    assert b'"more":"text"' in ours
    assert ours.endswith((tmp_path / "theirs").read_bytes()[-40:])


def test_a_tensor_is_asked_for_when_the_one_before_is_written(tmp_path: Path) -> None:
    sizes: list[int] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in "abc":
            sizes.append((tmp_path / "file").stat().st_size)
            yield name, torch.ones(2**18)

    write_safetensors(
        tmp_path / "file", {n: Layout(torch.float32, (2**18,)) for n in "abc"}, tensors()
    )
    assert sizes[1] - sizes[0] >= 2**19 and sizes[2] - sizes[1] >= 2**19


@pytest.mark.parametrize("changes", [{}, {"tie_weights": False}, {"qkv_bias": False}])
def test_layouts_are_those_of_the_tensors(changes: dict) -> None:
    model = random_model(**changes)
    config: GPTConfig = model.config
    tensors = hf_tensors(config, model.state_dict())
    assert hf_layouts(config, torch.float32) == {
        name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()
    }
