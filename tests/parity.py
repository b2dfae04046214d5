"""The parity rule that holds reference, kernels and PyTorch together.

    max|out - ref| <= 2 max|pt - ref| + atol        (3 for bf16 gradients)

ref is the reference run in float64, with gradients by autograd through that forward; pt is plain
PyTorch in the tested dtype; atol = 2 max|(ref + 0.3 - 0.3) - ref| in the tested dtype. So a kernel
may round about as much as the PyTorch it replaces, and no constant is tuned. FlashAttention's and
QuACK's test suites use the same rule.

Where a softmax enlarges the rounding of a few sums, the largest error comes from one number, and it
is luck whether the kernel's or PyTorch's is larger. There `check` computes PyTorch's result several
times, with the terms of those sums in other orders, and takes the largest error of all.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# With fewer numbers than this, the largest error depends on single roundings: see `cases_of`.
ENOUGH_NUMBERS = 256
N_ORDERS = 8  # orders of summation in which `check` computes PyTorch's result
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def assert_parity(name: str, out: Tensor, ref: Tensor, pt: Tensor, factor: float = 2.0) -> None:
    """Apply the rule above to one tensor; pt may hold several results of PyTorch, one per row."""
    shape = pt.shape[-out.ndim :] if out.ndim else ()
    assert out.shape == ref.shape == shape, f"{name}: {out.shape}, {ref.shape}, {pt.shape}"
    assert out.dtype == pt.dtype, f"{name} is {out.dtype}, PyTorch gives {pt.dtype}"
    assert ref.dtype == torch.float64
    if not ref.numel():
        return
    rounded = ref.to(out.dtype)
    atol = 2 * ((rounded + 0.3 - 0.3) - rounded).abs().max().item()
    error = (out.double() - ref).abs().max().item()
    plain = (pt.double() - ref).abs().max().item()
    limit = factor * plain + atol
    assert error <= limit, f"{name}: error {error:.3g} > {limit:.3g} (PyTorch's own: {plain:.3g})"


def cases_of(smallest: int, at_least: int = 4) -> int:
    """Return how many cases to compare together if the smallest tensor has this many numbers."""
    return max(at_least, -(-ENOUGH_NUMBERS // smallest))


@contextmanager
def poisoned() -> Iterator[None]:
    """Make torch.empty return NaN, so that an element that is never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def forward_backward(
    f: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return f(*inputs) and the gradient of every input; dout=None is an expanded gradient of 1."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = f(*leaves)
    if dout is None:
        out.sum().backward()
    else:
        out.backward(dout.to(out.dtype))
    return out.detach(), [x.grad for x in leaves]


def forward_backward_in(
    order: Tensor, f: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor | None
) -> list[Tensor]:
    """Return the output and the gradients, with each group of the last dimension reordered.

    order: a permutation of the size of a group; empty keeps the order.
    """

    def groups_in(x: Tensor, order: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, len(order)))[..., order].flatten(-2) if len(order) else x

    moved = [groups_in(x, order) for x in inputs]
    out, grads = forward_backward(f, moved, None if dout is None else groups_in(dout, order))
    return [groups_in(x, order.argsort()) for x in (out, *grads)]


def check(
    ours: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    *cases: tuple[dict[str, Tensor], Tensor | None],
    reordered: int = 0,
) -> None:
    """Apply the rule to the output and the gradient of every input; each function takes the inputs.

    A case is (inputs, gradient of the output). Several cases share one maximum: for a scalar, or a
    handful of numbers, one case would compare the luck of single roundings. reordered: the size of
    the groups of every tensor's last dimension that the function sums over; PyTorch's result is
    computed with each group permuted in several orders. 0 keeps the given order.
    """
    orders = [torch.randperm(reordered) for _ in range(N_ORDERS if reordered else 1)]
    results = []
    for inputs, dout in cases:
        values = list(inputs.values())
        with poisoned():
            out, grads = forward_backward(ours, values, dout)
        ref, ref_grads = forward_backward(reference, [x.double() for x in values], dout)
        pt = [forward_backward_in(order, plain, values, dout) for order in orders]
        plains = [torch.stack(kind) for kind in zip(*pt, strict=True)]
        results.append(zip([out, *grads], [ref, *ref_grads], plains, strict=True))
    first = next(iter(cases[0][0].values()))
    for name, *tensors in zip(["out", *cases[0][0]], *results, strict=True):
        outs, refs, pts = zip(*tensors, strict=True)
        out, ref, pt = torch.stack(outs), torch.stack(refs), torch.stack(pts, 1)
        wide = name != "out" and first.dtype == torch.bfloat16
        name = name if name == "out" else f"d{name}"
        assert_parity(name, out, ref, pt, 3.0 if wide else 2.0)
