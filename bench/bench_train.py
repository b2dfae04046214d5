"""Measure a whole training step (forward, backward, clipping, AdamW) against other models' steps.

FLOPs counted per token: 6 for each parameter of a matrix (with the head, without the embeddings),
and 14 D for each visible key and head of attention. Both sides start from the same weights and see
the same batch. The losses before and after an update must agree; for the book's model, whose head
is not tied and so differs after an update, only the losses before it.

Kinds of step: "fp32"; "bf16", both sides under autocast; "fp32 high", where ours computes products
from two bf16 parts and the peer in fp32. The last two are measured where the CPU has instructions
for them.
"""

import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from book_gpt import BookGPT
from harness import Case, Pair, both_sides, child_bytes, level
from plain_gpt import PlainGPT, decay_groups
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from gptfast import GPT, AdamW, GPTConfig
from gptfast.weights.book import to_content

LR, MAX_NORM = 1e-4, 1.0
TOLERANCE = {"fp32": 1e-4, "fp32 high": 1e-4, "bf16": 2e-2}
"""The difference of the losses by kind of step."""

Step = Callable[[], Tensor]


def _stepper(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Step, clip: bool) -> Step:
    params = list(model.parameters())

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        if clip:
            clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        return value.detach()

    return step


def _loss_of(model: Callable[..., Tensor], idx: Tensor, target: Tensor, bf16: bool) -> Step:
    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(idx, target)

    return loss


def _our_step(model: GPT, idx: Tensor, target: Tensor, kind: str = "fp32") -> Step:
    optimizer = AdamW(decay_groups(model), lr=LR, max_norm=MAX_NORM)
    step = _stepper(model, optimizer, _loss_of(model, idx, target, kind == "bf16"), clip=False)
    if kind != "fp32 high":
        return step

    def with_parts() -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return step()
        finally:
            torch.set_float32_matmul_precision(before)

    return with_parts


def _ours(config: GPTConfig, idx: Tensor, target: Tensor) -> tuple[GPT, Step]:
    model = GPT(config)
    return model, _our_step(model, idx, target)


def _our_fp32(model: GPT, idx: Tensor, target: Tensor) -> Step:
    return _our_step(deepcopy(model), idx, target)


def _plain(
    model: GPT, idx: Tensor, target: Tensor, compiled: bool = False, bf16: bool = False
) -> Step:
    plain = PlainGPT(model.config)
    plain.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(decay_groups(plain), lr=LR, fused=True)
    run = torch.compile(plain) if compiled else plain
    return _stepper(plain, optimizer, _loss_of(run, idx, target, bf16), clip=True)


def transformers_step(model: GPT, idx: Tensor, target: Tensor, accelerated: bool = False) -> Step:
    """Return a step of GPT2LMHeadModel, with its own loss and torch's AdamW; `accelerated` applies
    `gptfast.accelerate` and takes gptfast.AdamW."""
    from transformers import GPT2LMHeadModel

    from gptfast import accelerate

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        theirs = GPT2LMHeadModel.from_pretrained(directory).train()
    labels = torch.cat(
        (idx[:, :1], target[:, :-1]), 1
    )  # the model shifts its labels: labels[t + 1] follows t
    if accelerated:
        accelerate(theirs)
        optimizer = AdamW(decay_groups(theirs), lr=LR, max_norm=MAX_NORM)
    else:
        optimizer = torch.optim.AdamW(decay_groups(theirs), lr=LR, fused=True)
    return _stepper(theirs, optimizer, lambda: theirs(idx, labels=labels).loss, not accelerated)


def _book(model: GPT, idx: Tensor, target: Tensor) -> Step:
    book = BookGPT(model.config)
    book.load_state_dict(to_content(model.config, model.state_dict()))
    optimizer = torch.optim.AdamW(book.parameters(), lr=LR, weight_decay=0.1)
    return _stepper(book, optimizer, lambda: book(idx, target), clip=True)


def _pair(
    config: GPTConfig, B: int, T: int, peer_of: Callable[..., Step], kind: str = "fp32"
) -> Callable[[], Pair]:
    def build() -> Pair:
        torch.manual_seed(0)
        idx, target = torch.randint(config.vocab_size, (2, B, T))
        if peer_of is transformers_step:
            target[:, -1] = -100  # the labels cannot name the token after the last one
        model = GPT(config)
        peer, ours = peer_of(model, idx, target), _our_step(model, idx, target, kind)

        def check() -> None:
            # The book's head has weights of its own, so it differs after the first update.
            for _ in range(1 if peer_of is _book else 2):
                torch.testing.assert_close(ours(), peer(), rtol=0, atol=TOLERANCE[kind])

        return Pair(ours, peer, check)

    return build


_CHILD = """
import sys, torch
from gptfast.device import peak_memory
sys.path.insert(0, sys.argv[1])
import bench_train
config = bench_train.GPTConfig(**eval(sys.argv[2]))
torch.manual_seed(0)
idx, target = torch.randint(config.vocab_size, (2, int(sys.argv[3]), int(sys.argv[4])))
model, step = bench_train._ours(config, idx, target)
if sys.argv[5] == "plain":
    plain = bench_train._plain(model, idx, target)
    del model, step
    step = plain
for _ in range(4):
    step()
print(peak_memory("cpu"))
"""


def _memory_pair(config: GPTConfig, B: int, T: int) -> Callable[[], Pair]:
    """Return a pair of peak resident bytes of four steps, each side in its own process."""

    here, shape = Path(__file__).parent, repr(vars(config))

    def side(name: str) -> Callable[[], float]:
        return lambda: child_bytes(_CHILD, here, shape, B, T, name)

    return lambda: Pair(side("ours"), side("plain"), lambda: None)


def flops(config: GPTConfig, B: int, T: int) -> float:
    """Return the FLOPs of a training step, as the module's docstring counts them."""
    C = config.n_embd
    in_matrices = config.n_layer * 12 * C * C + config.vocab_size * C
    return B * T * (6 * in_matrices + 14 * config.n_layer * C * (T + 1) / 2)


def _bf16_cases(config: GPTConfig, name: str) -> Iterator[Case]:
    """Yield the steps that use bf16 products, on CPUs that have instructions for them."""
    compiled_name, compiled = "plain PyTorch, torch.compile", partial(_plain, compiled=True)
    bf16 = [
        ("plain PyTorch", partial(_plain, bf16=True)),
        (compiled_name, partial(compiled, bf16=True)),
    ]
    steps = []
    if level() == "amx":
        steps = [("bf16", B, T, peer) for B, T in ((2, 1024), (8, 256)) for peer in bf16]
        steps.append(("fp32 high", 2, 1024, (compiled_name, compiled)))
    elif level() == "avx512_bf16":
        steps = [("bf16", 2, 1024, peer) for peer in (("gptfast fp32", _our_fp32), bf16[1])]
    for kind, B, T, (peer_name, peer) in steps:
        yield Case(
            "train",
            f"step {name} {kind}",
            f"B={B} T={T}",
            peer_name,
            _pair(config, B, T, peer, kind),
            flops=flops(config, B, T),
            products="bf16",
        )


def cases(quick: bool) -> Iterator[Case]:
    """Yield GPT-2 124M against every peer, or a model of 4 layers and width 256 against one."""
    config, name = GPTConfig(), "GPT-2 124M"
    peers = [
        ("plain PyTorch", _plain, 1.6),
        ("plain PyTorch, torch.compile", partial(_plain, compiled=True), 1.35),
        ("transformers", transformers_step, 1.6),
        ("the book's model", _book, 3.2),
    ]
    shapes = [(2, 1024, peers), (4, 256, [("plain PyTorch", _plain, 1.3)])]
    if quick:
        config, name = GPTConfig(block_size=256, n_layer=4, n_head=4, n_embd=256), "4 layers of 256"
        shapes = [(4, 256, [("plain PyTorch", _plain, 0.0)])]
    for B, T, of_shape in shapes:
        label, shape, count = f"step {name} fp32", f"B={B} T={T}", flops(config, B, T)
        for peer_name, peer, target in of_shape:
            build = _pair(config, B, T, peer)
            yield Case("train", label, shape, peer_name, build, flops=count, target=target)
    if not quick:
        yield from _bf16_cases(config, name)
        build, label = _memory_pair(config, 2, 1024), f"peak memory {name} fp32"
        target = 1 / 0.7
        shape = "B=2 T=1024"
        yield Case(
            "train",
            label,
            shape,
            "plain PyTorch",
            build,
            target=target,
            unit="bytes",
            returns_cost=True,
        )


@pytest.mark.parametrize(("case", "side"), both_sides(cases(quick=False)))
def test_train(benchmark, case: Case, side: str) -> None:  # type: ignore[no-untyped-def]
    pair = case.build()
    pair.check()
    benchmark(getattr(pair, side))
