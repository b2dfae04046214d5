"""Measure loading GPT-2 124M from every form against transformers' loader: time and peak memory.

Both sides load and then read every parameter once, because transformers maps the files into memory
and reads them later. Bytes counted: the parameters, read and written. Memory: the peak of a process
that loads and reads, minus its memory before that.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from bundle import write_openai
from harness import Case, Pair, both_sides, child_bytes, kept_directory
from torch import nn

from gptfast import GPT, GPTConfig
from gptfast.weights.convert import save
from gptfast.weights.pretrained import hf_tensors

FORMS = {
    "OpenAI's directory": "openai",
    "safetensors": "transformers",
    "pytorch_model.bin": "pickle",
    "pytorch_model.bin, before torch 1.6": "legacy",
    "nanoGPT's ckpt.pt": "ckpt.pt",
    "llm.c's .bin": "model.bin",
    "the book's .pth": "model.pth",
}


@cache
def _files(config: GPTConfig) -> Path:
    """Return a directory with the same random weights in every form; it is removed at exit."""
    root = kept_directory()
    torch.manual_seed(0)
    model = GPT(config)
    for name in ("openai", "pickle", "legacy"):
        (root / name).mkdir()
    write_openai(root / "openai", model)
    for name in ("transformers", "ckpt.pt", "model.bin", "model.pth"):
        save(model.config, model.state_dict(), root / name)
    for name, zipped in (("pickle", True), ("legacy", False)):
        path = root / name / "pytorch_model.bin"
        torch.save(
            hf_tensors(model.config, model.state_dict()),
            path,
            _use_new_zipfile_serialization=zipped,
        )
        (root / name / "config.json").write_bytes((root / "transformers/config.json").read_bytes())
    return root


def _read(model: nn.Module) -> float:
    return sum(p.sum().item() for p in model.parameters())


def _load_pair(config: GPTConfig, form: str) -> Callable[[], Pair]:
    def build() -> Pair:
        from transformers import GPT2LMHeadModel

        root = _files(config)
        ours = lambda: _read(GPT.from_pretrained(root / form))  # noqa: E731
        theirs = form if form in ("pickle", "legacy") else "transformers"
        peer = lambda: _read(GPT2LMHeadModel.from_pretrained(root / theirs))  # noqa: E731

        def check() -> None:
            idx = torch.arange(8)[None]
            models = (
                GPT.from_pretrained(root / form),
                GPT2LMHeadModel.from_pretrained(root / theirs),
            )
            with torch.no_grad():
                logits = models[0](idx), models[1](idx).logits
            torch.testing.assert_close(*logits, rtol=0, atol=1e-4)

        return Pair(ours, peer, check)

    return build


_CHILD = """
import sys, gptfast, gptfast.weights.open
from gptfast.device import peak_memory
load = gptfast.GPT.from_pretrained
if sys.argv[2] == "peer":
    from transformers import GPT2LMHeadModel
    load = GPT2LMHeadModel.from_pretrained
open("/proc/self/clear_refs", "w").write("5")
before = peak_memory("cpu")
sum(p.sum().item() for p in load(sys.argv[1]).parameters())
print(peak_memory("cpu") - before)
"""


def _memory_pair(config: GPTConfig, form: str) -> Callable[[], Pair]:
    def build() -> Pair:
        root = _files(config)
        theirs = form if form in ("pickle", "legacy") else "transformers"
        ours = lambda: child_bytes(_CHILD, root / form, "ours")  # noqa: E731
        peer = lambda: child_bytes(_CHILD, root / theirs, "peer")  # noqa: E731
        return Pair(ours, peer, lambda: None)

    return build


def cases(quick: bool) -> Iterator[Case]:
    """Yield time and memory for each form of GPT-2 124M, or of a model of 4 layers of width 256."""
    config = GPTConfig(n_layer=4, n_head=4, n_embd=256) if quick else GPTConfig()
    n = sum(p.numel() for p in GPT(config).parameters())
    for label, form in FORMS.items():
        theirs = "pickle" if form in ("pickle", "legacy") else "safetensors"
        shape, peer = f"{n / 1e6:.0f}M parameters", f"transformers, {theirs}"
        build = _load_pair(config, form)
        yield Case("weights", f"load {label}", shape, peer, build, n_bytes=8.0 * n)
        if not quick:
            build, name = _memory_pair(config, form), f"peak memory, {label}"
            yield Case("weights", name, shape, peer, build, unit="bytes", returns_cost=True)


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=True)))
def test_weights(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    pair.check()
    benchmark(getattr(pair, side))
