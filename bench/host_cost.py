"""What a launch, a launcher and a training step cost the host, without a GPU.

.venv/bin/python bench/host_cost.py [--samples 200] [--json FILE]

Triton's own driver runs over a libcuda that launches nothing (stub_cuda.py), and our operators run
their Triton launchers on tiny CPU tensors. So a call takes the time that the host needs until it
has queued the kernels. Beside each launcher stands PyTorch's operator on the same tensors, which
computes on the CPU as well: at these sizes that is mostly its dispatch, without oneDNN. The last
rows are a whole step of GPT-2 with 12 layers and 16 channels, eager: forward, backward, norm,
clipping and AdamW, ours and in plain PyTorch.

The figures are medians of the CPU time of one thread, in microseconds, ours and PyTorch's in turn:
the time that the thread waited for a core does not count. Nothing here says how long a kernel runs.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import stub_cuda
import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[], object]
BF16 = torch.bfloat16


class Case(NamedTuple):
    """What is measured: ours and PyTorch's; `before` runs before both and does not count."""

    name: str
    ours: Run
    plain: Run
    before: Run = lambda: None


def use_triton_on_cpu() -> list[torch.library.Library]:
    """Register every operator's GPU implementation for CPU tensors; return what must stay alive."""
    from gptfast import GPT, AdamW  # noqa: F401 - they define the operators
    from gptfast.kernels.triton import cross_entropy, embedding
    from gptfast.ops import library as operators

    # On a GPU these return at once; on CPU tensors they would look at the values.
    cross_entropy.check_targets = embedding.check_ids = lambda *args: None

    libraries, launchers = [], operators.IMPLEMENTATIONS["triton"]
    operators._IN_PYTHON["cpu"] = launchers
    with warnings.catch_warnings(action="ignore"):  # about the kernels that it overrides on purpose
        for op, implementation in launchers.items():
            library = torch.library.Library("gptfast", "IMPL")
            name = op.name().removeprefix("gptfast::").removesuffix(".default")
            library.impl(name, implementation, "CPU", allow_override=True)
            libraries.append(library)
    return libraries


def attention_cases() -> Iterator[Case]:
    from gptfast.kernels.triton import attention

    B, T, H, D = 2, 64, 12, 64
    qkv, dout = torch.zeros(B, T, 3 * H * D, dtype=BF16), torch.zeros(B, T, H * D, dtype=BF16)
    options = (D**-0.5, 0.0, None, None)
    out, lse = attention.attention_qkv_fwd(qkv, H, *options)
    small = torch.zeros(3, 1, 2, 4, 8, dtype=BF16, requires_grad=True)

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(*small, is_causal=True)

    loss = plain()
    yield Case("attention forward", lambda: attention.attention_qkv_fwd(qkv, H, *options), plain)
    yield Case(
        "attention backward (2 kernels)",
        lambda: attention.attention_qkv_bwd(dout, qkv, out, lse, H, *options),
        lambda: torch.autograd.grad(loss, small, loss, retain_graph=True),
    )
    q, k = torch.zeros(B, H, 1, D, dtype=BF16), torch.zeros(B, H, 1024, D, dtype=BF16)
    one = small.detach()[:, :, :, :1]
    yield Case(
        "attention decode (2 kernels)",
        lambda: attention.attention_fwd(q, k, k, *options),
        lambda: F.scaled_dot_product_attention(*one),
    )


def loss_cases() -> Iterator[Case]:
    from gptfast.kernels.triton import cross_entropy

    options = (-100, 0.0, 0.0)
    logits, target = torch.zeros(4, 64, dtype=BF16), torch.zeros(4, dtype=torch.int64)
    loss, stats = cross_entropy.cross_entropy_fwd(logits, target, *options)
    leaf = logits.clone().requires_grad_()
    plain = F.cross_entropy(leaf, target)
    yield Case(
        "cross_entropy forward",
        lambda: cross_entropy.cross_entropy_fwd(logits, target, *options),
        lambda: F.cross_entropy(leaf, target),
    )
    yield Case(
        "cross_entropy backward",
        lambda: cross_entropy.cross_entropy_bwd(loss, logits, target, stats, *options),
        lambda: torch.autograd.grad(plain, leaf, retain_graph=True),
    )


def embedding_cases() -> Iterator[Case]:
    from gptfast.kernels.triton import embedding

    weight, idx = torch.zeros(8, 64, dtype=BF16), torch.zeros(2, 4, dtype=torch.int64)
    leaf = weight.clone().requires_grad_()
    out = F.embedding(idx, leaf)
    dx = torch.zeros_like(out)
    yield Case(
        "embedding forward",
        lambda: embedding.embedding_fwd(weight, idx),
        lambda: F.embedding(idx, leaf),
    )
    yield Case(
        "embedding backward",
        lambda: embedding.embedding_bwd(weight, dx, idx),
        lambda: torch.autograd.grad(out, leaf, dx, retain_graph=True),
    )


def layer_cases() -> Iterator[Case]:
    from gptfast.kernels.triton import linear, mlp

    N, C, wide = 8, 16, 64
    x, ones, bias = (torch.zeros(*size, dtype=BF16) for size in ((N, C), (C,), (wide,)))
    weight, back = torch.zeros(wide, C, dtype=BF16), torch.zeros(C, wide, dtype=BF16)
    leaves = [t.clone().requires_grad_() for t in (x, ones, ones, weight, bias, back, ones)]
    norm, eps = (ones, ones), 1e-5

    def layer() -> Tensor:
        return F.linear(F.layer_norm(leaves[0], (C,), *leaves[1:3], eps), *leaves[3:5])

    def perceptron() -> Tensor:
        return F.linear(F.gelu(layer(), approximate="tanh"), *leaves[5:]) + leaves[0]

    def gradients(out: Tensor, inputs: list[Tensor]) -> Run:
        dout = torch.zeros_like(out)
        return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)

    y, stats = linear.linear_fwd(x, *norm, eps, weight, bias, None)
    yield Case(
        "norm and linear, forward",
        lambda: linear.linear_fwd(x, *norm, eps, weight, bias, None),
        layer,
    )
    yield Case(
        "norm and linear, backward",
        lambda: linear.linear_bwd(y, x, *norm, eps, weight, bias, stats, True, True),
        gradients(layer(), leaves[:5]),
    )
    layers = (*norm, eps, weight, bias, back, ones, True)
    y, h, stats = mlp.mlp_fwd(x, *layers)
    yield Case("norm and mlp, forward", lambda: mlp.mlp_fwd(x, *layers), perceptron)
    yield Case(
        "norm and mlp, backward",
        lambda: mlp.mlp_bwd(y, x, h, stats, *layers, True, True, True),
        gradients(perceptron(), leaves),
    )


def decoding_cases() -> Iterator[Case]:
    from gptfast.kernels.triton import decode_linear, sampling

    x, ones = torch.zeros(1, 16, dtype=BF16), torch.ones(16, dtype=BF16)
    weight = torch.zeros(64, 16, dtype=BF16)
    layer = (weight, None, None, None, False, False)
    yield Case(
        "norm and linear of one token",
        lambda: decode_linear.decode_linear(x, ones, ones, 1e-5, *layer),
        lambda: F.linear(F.layer_norm(x, (16,), ones, ones), weight),
    )
    numbers = (torch.ones(1), torch.full((1,), 9), torch.ones(1), torch.zeros(1))
    seeds = torch.zeros(2, 1, dtype=torch.int64)
    for V in (64, 16384):
        logits = torch.zeros(1, V, dtype=BF16)

        def plain(logits: Tensor = logits) -> Tensor:
            best, ids = torch.topk(logits[:, :64].float() / numbers[0], 9)
            return ids.gather(1, torch.multinomial(torch.softmax(best, -1), 1))

        kernels = "4 kernels" if V > 64 else "1 kernel"
        yield Case(
            f"sampling ({kernels})",
            lambda logits=logits: sampling.sample(logits, *numbers, *seeds),
            plain,
        )


def adamw_cases() -> Iterator[Case]:
    import gptfast

    shapes = [(4, 8), (8,), (4, 4), (4,)] * 37
    for moved in (False, True):
        of_each = [[torch.nn.Parameter(torch.zeros(s)) for s in shapes] for _ in range(2)]
        # Many sets of gradients take turns: no cache of ours has so many.
        sets = [[torch.zeros(s) for s in shapes] for _ in range(40 if moved else 1)]
        ours = gptfast.AdamW(of_each[0], max_norm=1.0)
        plain = torch.optim.AdamW(of_each[1], fused=True)

        def take(of_each=of_each, sets=sets) -> None:  # type: ignore[no-untyped-def]
            sets.append(sets.pop(0))
            for params in of_each:
                for p, g in zip(params, sets[0], strict=True):
                    p.grad = g

        def step(params=of_each[1], plain=plain) -> None:  # type: ignore[no-untyped-def]
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            plain.step()

        name = "new gradients" if moved else "the same gradients"
        yield Case(f"AdamW step, 148 tensors, {name}", ours.step, step, take)


def step_cases() -> Iterator[Case]:
    from plain_gpt import PlainGPT, decay_groups

    import gptfast

    sizes = {"vocab_size": 64, "block_size": 16, "n_layer": 12, "n_head": 2, "n_embd": 16}
    config = gptfast.GPTConfig(**sizes)
    idx = torch.zeros(2, 16, dtype=torch.int64)
    for dtype in (torch.float32, BF16):
        models = [gptfast.GPT(config).to(dtype), PlainGPT(config).to(dtype)]
        optimizers = [
            gptfast.AdamW(decay_groups(models[0]), max_norm=1.0),
            torch.optim.AdamW(decay_groups(models[1]), fused=True),
        ]

        def step(i: int, models=models, optimizers=optimizers) -> None:  # type: ignore[no-untyped-def]
            optimizers[i].zero_grad()
            models[i](idx, idx).backward()
            if i:
                torch.nn.utils.clip_grad_norm_(models[i].parameters(), 1.0)
            optimizers[i].step()

        name = "fp32" if dtype == torch.float32 else "bf16"
        yield Case(f"training step, 12 layers, {name}", lambda f=step: f(0), lambda f=step: f(1))


def sample(run: Run) -> float:
    """Return the CPU time of this thread for one call, in microseconds."""
    begin = time.thread_time_ns()
    run()
    return (time.thread_time_ns() - begin) / 1e3


def measure(case: Case, samples: int) -> tuple[float, float]:
    """Return the median costs of both, measured in turn."""
    costs = []
    for _ in range(2 + samples):
        case.before()
        costs.append((sample(case.ours), sample(case.plain)))
    del costs[:2]
    return tuple(map(statistics.median, zip(*costs, strict=True)))  # type: ignore[return-value]


def processor() -> str:
    """Return the name of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))


def row(name: str, *cells: str) -> str:
    """Return a line of the table."""
    return f"{name:42}" + "".join(f"{cell:>10}" for cell in cells)


def main() -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stub = stub_cuda.install(Path(folder))
        libraries = use_triton_on_cpu()
        # oneDNN prepares each product in 16 bits for 50 us, which are no cost of a GPU's host.
        torch.backends.mkldnn.set_flags(False)
        print(f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
        print(row("microseconds of the host", "ours", "PyTorch", "ratio", "launches"))
        rows = []
        kernels = (attention_cases, loss_cases, embedding_cases, layer_cases, decoding_cases)
        for cases in (*kernels, adamw_cases, step_cases):
            for case in cases():
                name = case.name
                few = max(10, options.samples // (10 if "training" in name else 1))
                mine, theirs = measure(case, few)
                before = stub.count()
                case.ours()
                rows.append((name, mine, theirs, stub.count() - before))
                ratio = f"{theirs / mine:.2f}"
                print(
                    row(name, f"{mine:.1f}", f"{theirs:.1f}", ratio, str(rows[-1][-1])), flush=True
                )
        del libraries
    if options.json:
        names = ("case", "ours_us", "pytorch_us", "launches")
        figures = [dict(zip(names, row, strict=True)) for row in rows]
        options.json.write_text(json.dumps({"cpu": processor(), "rows": figures}, indent=1))


if __name__ == "__main__":
    main()
