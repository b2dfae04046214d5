"""Tensors whose values are computed when somebody needs them: the logits of an accelerated model.

`deferred_linear` returns a `DeferredTensor`, which knows its shape, dtype, device and place in
autograd's graph, and nothing else until a function asks for its values. Hooks, detach, clone and
casts do not ask; everything else does.
"""

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from gptfast.torch_private import (
    DisableTorchFunctionSubclass,
    are_transforms_active,
    make_wrapper_subclass,
    set_throw_on_mutable_data_ptr,
    temporarily_clear_interpreter_stack,
    tree_map_only,
)

aten: Any = torch.ops.aten
_ROWS_IN_SAMPLE = 16  # and columns


class _Product:
    """hidden (B, T, C) times weight (V, C), to be computed as it would have been at once.

    It keeps the modes of the forward, and the weight's storage. An optimizer's step copies the
    weight first, while a value is pending.
    """

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden, self.weight = hidden, weight
        self.values = hidden.detach(), weight.detach()  # they stay if `weight.data` is replaced
        self.versions = [_version(x) for x in self.values]
        self.sample = _sample(self.values[1])
        self.copy: _Copy | None = None
        self.inference = torch.is_inference_mode_enabled()
        kind = hidden.device.type
        self.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    @property
    def dtype(self) -> torch.dtype:
        _, dtype, enabled = self.autocast
        # autocast leaves fp64 as it is
        return dtype if enabled and self.hidden.dtype != torch.float64 else self.hidden.dtype

    def unchanged(self) -> bool:
        """Return whether autograd sees the tensors of the forward in hidden and weight."""
        return self.copy is None and [_version(x) for x in self.values] == self.versions

    def compute(self) -> Tensor:
        """Return the product, without a graph. Raises RuntimeError if an input has changed."""
        hidden, weight = self.values
        same = [_version(x) for x in self.values] == self.versions
        # A change through `weight.data` leaves the version as it is; FSDP frees the storage.
        if not same or not weight.untyped_storage().nbytes() or not self._same_sample():
            raise RuntimeError(
                "output.logits are computed when first read, and the head's weight or its input "
                "has changed since the forward; read them before the change"
            )
        # A layer, so that those who count or time layers see the head.
        V, C = weight.shape
        head = nn.Linear(C, V, bias=False, device="meta")
        head.weight = nn.Parameter(weight, requires_grad=False)
        kind, dtype, enabled = self.autocast
        with (
            torch.inference_mode(self.inference),
            torch.no_grad(),
            torch.autocast(kind, dtype=dtype, enabled=enabled),
        ):
            return head(hidden)  # (B, T, V)

    def _same_sample(self) -> bool:
        now = _sample(self.values[1])
        return now is None or self.sample is None or torch.equal(now, self.sample)

    def keep(self, copy: "_Copy") -> None:
        """Use a copy of the weight from now on."""
        hidden, _ = self.values
        self.values, self.copy = (hidden, copy.tensor), copy
        self.versions[1] = _version(copy.tensor)


class _Copy:
    """A copy of a weight. When it goes, its memory stays for the next copy: new memory is slow."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, now = weight, weight.detach()
        spare = _spares.pop(weight, None)
        fits = spare is not None and (spare.shape, spare.dtype, spare.device) == (
            (now.shape, now.dtype, now.device)
        )
        self.tensor: Tensor = spare.copy_(now) if spare is not None and fits else now.clone()

    def __del__(self) -> None:
        _spares[self.weight] = self.tensor


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _sample(weight: Tensor) -> Tensor | None:
    """Return the bytes of some entries, where NaN equals itself, or None if there are none."""
    if type(weight) is not Tensor or weight.is_meta:  # a fake tensor, for example
        return None
    steps = [max(1, size // _ROWS_IN_SAMPLE) for size in weight.shape]
    some = weight[:: steps[0], :: steps[1]]
    return some.clone(memory_format=torch.contiguous_format).view(torch.uint8)


class Deferred:
    """A tensor without a graph, computed once; every DeferredTensor with these values shares it."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute: Callable[[], Tensor] | None = compute
        self._tensor: Tensor | None = None
        self._version = 0

    @property
    def pending(self) -> bool:
        return self._compute is not None

    def get(self) -> Tensor:
        if self._compute is not None:
            self._tensor = self._compute()
            self._version = _version(self._tensor)
            self._compute = None  # it holds what the values came from
        assert self._tensor is not None
        return self._tensor

    def then(self, change: Callable[[Tensor], Tensor]) -> "Deferred":
        """Return a copy, changed, of the values of now."""

        def compute() -> Tensor:
            tensor = self.get()
            if _version(tensor) != self._version:
                raise RuntimeError(
                    "logits were changed in place before a copy of them was first read; read the "
                    "copy before the change"
                )
            with torch.no_grad():
                return change(tensor)

        return Deferred(compute)


class DeferredTensor(Tensor):
    """Stands for a tensor whose values are pending. Any function gets the plain tensor instead."""

    deferred: Deferred
    plain: Tensor | None

    @staticmethod
    def __new__(
        cls, deferred: Deferred, shape: Iterable[int], dtype: torch.dtype, device: torch.device
    ) -> "DeferredTensor":
        self = make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        self.deferred, self.plain = deferred, None
        set_throw_on_mutable_data_ptr(self)  # an error instead of a null pointer
        return self

    def like(self, deferred: Deferred, dtype: torch.dtype | None = None) -> "DeferredTensor":
        """Return a DeferredTensor of this shape with other values."""
        return DeferredTensor(deferred, self.shape, dtype or self.dtype, self.device)

    def read(self) -> Tensor:
        """Return the plain tensor: always the same one, and autograd knows it as this one."""
        if self.plain is None:
            if are_transforms_active():  # the forward was outside of them
                with temporarily_clear_interpreter_stack():
                    return self.read()
            if self.requires_grad:
                with torch.inference_mode(False), torch.enable_grad():
                    self.plain = _Read.apply(self)
            else:
                self.plain = self.deferred.get().detach()  # it may get requires_grad of its own
        return self.plain

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self = args[0] if args else None
        if func in _WITHOUT_VALUES and (not isinstance(self, DeferredTensor) or self.plain is None):
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(DeferredTensor, DeferredTensor.read, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Serve what passes __torch_function__ by, such as the functions that are written in C++.

        Here autograd has done its part.
        """
        kwargs = kwargs or {}
        if func in _SAME or (func is aten.view.default and list(args[1]) == list(args[0].shape)):
            return args[0].like(args[0].deferred)
        # An inference tensor does not count its changes, so it cannot be copied later.
        if func in _COPIES and kwargs.keys() <= {"dtype"} and not args[0].is_inference():
            change = functools.partial(func, **kwargs)
            return args[0].like(args[0].deferred.then(change), kwargs.get("dtype"))
        args, kwargs = tree_map_only(DeferredTensor, lambda x: x.deferred.get(), (args, kwargs))
        return func(*args, **kwargs)


_SAME = aten.detach.default, aten.alias.default
_COPIES = aten.clone.default, aten._to_copy.default
_PROPERTIES = "shape dtype device layout ndim requires_grad grad_fn is_leaf is_cpu is_cuda itemsize"
_METHODS = (
    "size dim ndimension numel nelement element_size stride is_floating_point is_complex "
    "__len__ is_inference register_hook detach clone float half bfloat16 double to"
)
_WITHOUT_VALUES = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES.split()),
    *(getattr(Tensor, name) for name in _METHODS.split()),
    *(torch.numel, torch.is_floating_point, torch.is_complex, torch.detach, torch.clone),
}


class _Read(torch.autograd.Function):
    """The identity, from a DeferredTensor to the plain tensor."""

    @staticmethod
    def forward(ctx: Any, x: DeferredTensor) -> Tensor:
        return x.deferred.get().detach()  # an alias, which autograd may mark

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx


class _DeferredLinear(torch.autograd.Function):
    """A node of the graph that stands where the product's own node would."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, product: _Product) -> Tensor:
        ctx.product = product
        shape = (*hidden.shape[:-1], weight.shape[0])
        deferred = Deferred(product.compute)
        _pending[deferred] = product
        return DeferredTensor(deferred, shape, product.dtype, hidden.device)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        product: _Product = ctx.product
        if not product.unchanged():
            raise RuntimeError(
                "the head's weight or its input has changed since the forward, so output.logits "
                "have no gradient any more; call backward before the change"
            )
        # With a graph of the gradients, they need the inputs' own place in the graph.
        hidden, weight = (
            (product.hidden, product.weight) if torch.is_grad_enabled() else product.values
        )
        dhidden = dweight = None
        if ctx.needs_input_grad[0]:
            dhidden = (dout @ weight.to(dout.dtype)).to(hidden.dtype)  # (B, T, C)
        if ctx.needs_input_grad[1]:
            rows = hidden.to(dout.dtype).reshape(-1, hidden.shape[-1])  # (N, C)
            dweight = (dout.reshape(-1, dout.shape[-1]).mT @ rows).to(weight.dtype)  # (V, C)
        return dhidden, dweight, None


def deferred_linear(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return F.linear(hidden, weight), computed when a function first needs its values.

    hidden is (B, T, C), weight (V, C). The values, their dtype and their gradients are those of a
    product computed now, also when they are read under other modes or after the step of a
    torch.optim.Optimizer; a backward through them after the step raises RuntimeError, as it does in
    PyTorch. So does reading them after another change of the weight, if PyTorch counts it or the
    entries that are compared show it: a few entries written through `weight.data` may be missed.
    """
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
    return _DeferredLinear.apply(hidden, weight, _Product(hidden, weight))


# A product is dropped from here when nobody can ask for its values any more.
_pending: weakref.WeakKeyDictionary[Deferred, _Product] = weakref.WeakKeyDictionary()
_spares = WeakTensorKeyDictionary()  # the memory of old copies, by weight
_hooks: list[Any] = []


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Give the pending products of an optimizer's weights one copy of the weight."""
    if torch.compiler.is_compiling():
        return
    waiting = [x for deferred, x in _pending.items() if deferred.pending and x.unchanged()]
    own = {id(p) for group in optimizer.param_groups for p in group["params"]} if waiting else ()
    copies: dict[int, _Copy] = {}
    for product in waiting:
        key = id(product.weight)
        if key in own:
            copies[key] = copies.get(key) or _Copy(product.weight)
            product.keep(copies[key])
    _spares.clear()
