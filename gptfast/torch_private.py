"""The private names of PyTorch that gptfast uses, and the oldest PyTorch that it is tested with.

PyTorch promises nothing about these names: a new version may break this file, and no other one
(tests/test_architecture.py). They are the same objects here under public names, because
torch.compile knows some of them by identity.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as hooks
from torch.optim import optimizer as optimizers

OLDEST_TORCH = (2, 11)


def check_version(version: str) -> None:
    """Raise ImportError for a PyTorch older than the oldest that gptfast is tested with."""
    found = re.match(r"(\d+)\.(\d+)", version)
    # The first two numbers alone: builds from source name themselves 2.11.0a0.
    if found and tuple(map(int, found.groups())) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"gptfast needs torch {oldest} or newer, got {version}; run pip install -U torch"
        )


check_version(torch.__version__)

# Only now: an older PyTorch may lack some of these names.
from torch._functorch.pyfunctorch import (  # noqa: E402
    temporarily_clear_interpreter_stack as temporarily_clear_interpreter_stack,
)
from torch._library.autograd import Info, make_autograd_impl  # noqa: E402
from torch._ops import OpOverload as OpOverload  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor  # noqa: E402
from torch._subclasses.functional_tensor import FunctionalTensor as FunctionalTensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # noqa: E402
from torch.utils._python_dispatch import _disable_current_modes as disable_modes  # noqa: E402, F401
from torch.utils._pytree import tree_map_only as tree_map_only  # noqa: E402

# The dispatcher.
DispatchKeySet = torch._C.DispatchKeySet
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
len_dispatch_stack = torch._C._len_torch_dispatch_stack

# Autograd and torch.func.
any_requires_grad = torch._C._any_requires_grad
are_transforms_active = torch._C._are_functorch_transforms_active
is_wrapped_tensor = torch._C._functorch.is_functorch_wrapped_tensor
is_batchedtensor = torch._C._functorch.is_batchedtensor
is_legacy_batchedtensor = torch._C._functorch.is_legacy_batchedtensor
get_unwrapped = torch._C._functorch.get_unwrapped
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph

# Subclasses of Tensor.
DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass
make_wrapper_subclass = Tensor._make_wrapper_subclass
set_throw_on_mutable_data_ptr = torch._C._set_throw_on_mutable_data_ptr


def excluded(key: str) -> torch._C._ExcludeDispatchKeyGuard:
    """Return a context in which the dispatcher passes over a key."""
    return torch._C._ExcludeDispatchKeyGuard(DispatchKeySet(getattr(torch._C.DispatchKey, key)))


def below_autograd(op: OpOverload, keyset: DispatchKeySet, args: tuple) -> object:
    """Call an operator's kernel without a place in autograd's graph."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def autograd_kernel(op: OpOverload, backward: Callable, setup: Callable) -> Callable:
    """Return what torch.library.register_autograd registers for an operator.

    PyTorch makes new objects of the operator's arguments for each look at one in each call, which
    takes 10 to 20 microseconds. So it is given those of one look.
    """
    schema = op._schema
    arguments = [
        SimpleNamespace(
            name=a.name, type=a.type, kwarg_only=a.kwarg_only, default_value=a.default_value
        )
        for a in schema.arguments
    ]
    names = ("_namespace", "_opname", "_overloadname", "redispatch")
    stand_in: Any = SimpleNamespace(
        _schema=SimpleNamespace(arguments=arguments, returns=list(schema.returns)),
        tags=tuple(op.tags),
        **{name: getattr(op, name) for name in names},
    )
    return make_autograd_impl(stand_in, Info(backward, setup))


def is_transformed() -> bool:
    """Return whether this code runs under a transform of torch.func or in forward mode."""
    # torch.compile does not follow the first question, so it leaves this function as it is.
    level = torch._C._functorch.maybe_current_level()
    return level is not None or forward_ad._current_level >= 0


def is_transformed_in_graph() -> bool:
    """Return `is_transformed`; torch.compile asks once a graph, which then holds the answer."""
    return is_transformed()


# What torch.compiler.assume_constant_result does, without importing the compiler.
is_transformed_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def use_counts(tensor: Tensor, storage: torch.UntypedStorage) -> tuple[int, int]:
    """Return how many references a tensor and its memory have in C++."""
    tensor_count = tensor._use_count()  # type: ignore[attr-defined]
    return tensor_count, torch._C._storage_Use_Count(storage._cdata)


def likeness(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Return a function of as many tensors, which returns whether each is like that of this list.

    Like means: of the same class, dtype, device, layout, sizes, strides and requires_grad; where
    the memory is does not count. The answer is also False for a tensor that is given twice, and
    where autocast or a mode of the dispatcher has come between. No tensor is kept alive.
    """
    # What torch.compile asks before each call of compiled code, in C++.
    guards = torch._C._dynamo.guards.TensorGuards(
        *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
    )
    return guards.check


def any_global_hooks() -> bool:
    """Return whether anyone asked to see what passes through all modules."""
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Return whether anyone asked to be called with the gradient of a tensor."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether anyone but gptfast wants calls before or after the steps of an optimizer."""
    every = (
        *optimizer._optimizer_step_pre_hooks.values(),
        *optimizer._optimizer_step_post_hooks.values(),
        *optimizers._global_optimizer_pre_hooks.values(),
        *optimizers._global_optimizer_post_hooks.values(),
    )
    return any(not getattr(hook, "__module__", "").startswith("gptfast.") for hook in every)


def set_group_timeouts(timeout: timedelta) -> None:
    """Set how long the processes of this one's groups in torch.distributed may be silent."""
    c10d = torch.distributed.distributed_c10d
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timeout, group)


_COMPILER = ("_dynamo/convert_frame.py", "_inductor/compile_fx.py")


def is_compiling(thread: int) -> bool:
    """Return whether a thread of this process, by its `threading.get_ident`, is in torch.compile.

    Compiled code that computes does not count.
    """
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_filename.replace(os.sep, "/").endswith(_COMPILER):
            return True
        frame = frame.f_back
    return False


def forget_gathered_at_once(module: Any) -> None:
    """Let an FSDPModule free what it gathered as soon as it is copied to the parameters.

    By default it is kept until the next group is gathered, so that a GPU's copies overlap.
    """
    module._set_unshard_async_op(True)
