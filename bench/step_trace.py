"""What a function launches on a GPU, recorded on a machine without one.

It runs on CPU tensors of a GPU's sizes whose memory is there in name only: pages that nobody
touches take no memory. Inside a `Trace`, our operators run their Triton launchers, as on a GPU.
PyTorch's operators are noted with the bytes that they move and the FLOPs of their products; they
are computed only where all their tensors are small, such as ids, tables of addresses and learning
rates: all other numbers are zeros.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

SMALL = 1 << 16
"""Elements of the largest tensor with which operators are computed."""
EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# They launch nothing, beside views.
FREE = (
    "_unsafe_view",
    "detach",
    "detach_",
    "lift_fresh",
    "_local_scalar_dense",
    "is_same_size",
    "set_",
)
# Of a larger tensor, they read or write some rows only, as many as this tensor has.
BY_ROWS: dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]] = {
    "embedding": lambda given, made: made[0],
    "index_put_": lambda given, made: given[-1],
}
# In place, they do not read what they overwrite.
OVERWRITING = ("copy_", "zero_", "fill_", "normal_")


class Operator(NamedTuple):
    """A call of one of PyTorch's operators; `shapes` are those of its tensors."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    n_bytes: int
    flops: int


def size_of(x: Tensor) -> int:
    """Return the bytes of a tensor; where a dimension repeats numbers, they count once."""
    n = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        n *= size if stride else 1
    return n * x.element_size() if x.numel() else 0


def zeros(like: Tensor) -> Tensor:
    """Return zeros with the form of a tensor, whose pages are not there until they are used."""
    n_bytes = max(like.untyped_storage().nbytes(), like.element_size())
    memory = torch.from_numpy(np.zeros(n_bytes, np.uint8)).view(like.dtype)
    return memory.as_strided(like.size(), like.stride(), like.storage_offset())


def _on_meta(x: Tensor) -> Tensor:
    """Return a tensor of the same form without memory."""
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that an operator overwrites."""
    out = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            out.append(args[i] if i < len(args) else kwargs[argument.name])
    return out


def flops_of(name: str, tensors: list[Tensor]) -> int:
    """Return the FLOPs of a product, two for each multiply-add; 0 for other operators."""
    if name == "linear":  # x (..., C), weight (O, C)
        return 2 * tensors[0].numel() * tensors[1].shape[0]
    if name in ("mm", "addmm"):
        a, b = tensors[-2:]
        return 2 * a.numel() * b.shape[1]
    return 0


class Trace(TorchDispatchMode):
    """Records the operators of PyTorch that are called inside; see the module.

    Launches of ours go wherever Triton's driver sends them (`ptx.launch.install`).
    """

    def __init__(self) -> None:
        super().__init__()
        from gptfast.ops.backend import IMPLEMENTATIONS

        self.operators: Counter[Operator] = Counter()
        self.launchers = IMPLEMENTATIONS["triton"]
        self._replaced: list[tuple[Any, Any, Any]] = []

    def __enter__(self) -> "Trace":
        from gptfast.kernels.triton import cross_entropy, embedding
        from gptfast.ops import library

        self._replaced.append(
            (cross_entropy.check_targets, embedding.check_ids, library.casts_itself)
        )
        # On a GPU these return at once; on CPU tensors they would look at the values.
        cross_entropy.check_targets = embedding.check_ids = lambda *args: None
        # And there autocast casts what operators get, where the C++ kernels would do it themselves.
        library.casts_itself = lambda *args: False
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        from gptfast.kernels.triton import cross_entropy, embedding
        from gptfast.ops import library

        super().__exit__(*error)
        cross_entropy.check_targets, embedding.check_ids, library.casts_itself = (
            self._replaced.pop()
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.launchers:
            with self:
                return self.launchers[func](*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace != "aten" or func.is_view or name in FREE:
            return func(*args, **kwargs)
        on_meta = tree_map_only(Tensor, _on_meta, (args, kwargs))
        if "device" in kwargs:
            on_meta[1]["device"] = torch.device("meta")
        shape = func(*on_meta[0], **on_meta[1])
        if name in EMPTY:
            return zeros(shape)
        written = _written(func, args, kwargs)
        tensors = list(_tensors((args, kwargs, shape)))
        if tensors:
            self._note(func, name, args, kwargs, written, shape)
        if all(x.numel() <= SMALL for x in tensors):
            return func(*args, **kwargs)
        if written:
            return written[0] if len(written) == 1 else tuple(written)
        return tree_map_only(Tensor, zeros, shape)

    def _note(
        self, func: Any, name: str, args: tuple, kwargs: dict, written: list, shape: Any
    ) -> None:
        given = list(_tensors((args, kwargs)))
        overwritten = [x for x in given if any(x is w for w in written)]
        in_place = overwritten and "out" not in func._overloadname and name not in OVERWRITING
        read = [x for x in given if in_place or not any(x is w for w in overwritten)]
        made = overwritten or list(_tensors(shape))
        n_bytes = sum(map(size_of, read)) + sum(map(size_of, made))
        if name in BY_ROWS:
            n_bytes = 2 * size_of(BY_ROWS[name](given, made))
        factors = [x for x in given if "out" not in func._overloadname or x is not overwritten[0]]
        shapes = tuple(tuple(x.shape) for x in factors)
        self.operators[Operator(name, shapes, n_bytes, flops_of(name, factors))] += 1


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor))
