"""The states of AdamW's parameters: made, fitted to what the parameters became, and found again.

To look at all of 150 parameters, gradients and states one by one takes Python a millisecond. So a
step keeps what it found as its `Work`. The next step asks whether that is still true: a few loops
over lists, and one question to PyTorch about all tensors. Only where it is not does it look at each
parameter again.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptfast import dtensor
from gptfast.torch_private import likeness

_HALVES = frozenset({torch.float16, torch.bfloat16})
# The dtype of the moments of a parameter, from its own.
_WIDEST = dict.fromkeys((torch.float32, *_HALVES), torch.float32) | {torch.float64: torch.float64}

State = dict[str, Tensor]
"""Of a parameter: "step", "exp_avg", "exp_avg_sq" and perhaps "master"."""


class StateOptions(NamedTuple):
    """The options of AdamW on which the states depend."""

    bf16_update: str
    moment_dtype: torch.dtype | None

    def check(self, dtype: torch.dtype) -> None:
        """Raise ValueError for a parameter's data type that the options do not allow."""
        if dtype.is_complex:
            raise ValueError("gptfast.AdamW takes real parameters, got a complex one")
        if self.moment_dtype == torch.bfloat16 and dtype != torch.bfloat16:
            raise ValueError(f"moment_dtype=torch.bfloat16 needs bfloat16 parameters, got {dtype}")
        if self.bf16_update == "stochastic" and dtype == torch.float16:
            raise ValueError("bf16_update='stochastic' is for bfloat16; use 'master' for float16")

    def want_master(self, dtype: torch.dtype) -> bool:
        """Return whether the state of a parameter of this dtype has an fp32 copy of it."""
        return dtype in _HALVES and self.bf16_update == "master"


def _fits(state: torch.dtype, param: torch.dtype) -> bool:
    """Return whether a state of this dtype can stand beside a parameter of that dtype."""
    return state is _WIDEST.get(param) or state is param is torch.bfloat16


def _init_state(state: State, param: Tensor, options: StateOptions) -> None:
    """Create the step count and the moments of a parameter."""
    dtensor.check_parameter(param)
    if param.dtype not in _WIDEST:
        raise ValueError(f"gptfast.AdamW takes float16 to float64 parameters, got {param.dtype}")
    widest = _WIDEST[param.dtype]
    dtype = torch.bfloat16 if options.moment_dtype == torch.bfloat16 else widest
    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
    state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
    state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)


def fit_state(state: State, param: Tensor, options: StateOptions) -> None:
    """Create the state of a parameter, or fit it to what the parameter has become since.

    Raises ValueError if the parameter has another shape now.
    """
    dtype = param.dtype
    if "step" not in state:
        _init_state(state, param, options)
    if not options.want_master(dtype):
        state.pop("master", None)
    elif "master" not in state:
        # It is also missing after loading torch's state, which has none.
        state["master"] = param.detach().float()
    for name in ("exp_avg", "exp_avg_sq", "master"):
        x = state.get(name)
        if x is None:
            continue
        if x.shape != param.shape:
            raise ValueError(
                f"a parameter has the shape {tuple(param.shape)}, but its {name} has "
                f"{tuple(x.shape)}; make a new optimizer after changing a shape"
            )
        if not _fits(x.dtype, dtype):
            state[name] = x.to(_WIDEST[dtype])


def check_gradient(param: Tensor, grad: Tensor) -> None:
    """Raise ValueError for a gradient that does not fit its parameter."""
    if grad.layout != torch.strided:
        raise ValueError("gptfast.AdamW takes dense gradients, got a sparse one")
    if grad.shape != param.shape:
        raise ValueError(
            f"a parameter has the shape {tuple(param.shape)}, but its gradient has "
            f"{tuple(grad.shape)}; call zero_grad() after changing a shape"
        )


class Call(NamedTuple):
    """The parameters that one call of the operator updates, of one group, device and dtype."""

    group: int
    device: torch.device
    dtype: torch.dtype
    params: list[Tensor]
    places: list[int]
    """Of the parameters among those of all groups."""
    slots: list[int]
    """Of their states among all states."""
    with_master: bool


class Columns(NamedTuple):
    """The states of a call's parameters."""

    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    masters: list[Tensor]
    steps: list[Tensor]


class Work:
    """The calls of a step, and all on which they depend.

    The states must fit their parameters, and so must the gradients.
    """

    def __init__(
        self,
        options: StateOptions,
        groups: Sequence[dict[str, Any]],
        grads: Sequence[Tensor | None],
        states: Mapping[Tensor, State],
    ) -> None:
        self._params = [p for group in groups for p in group["params"]]
        self._options, self._sizes = options, [len(group["params"]) for group in groups]
        self._absent, self._keys = [grad is None for grad in grads], list(states)
        slot_of = {id(param): slot for slot, param in enumerate(self._keys)}
        kinds: dict[tuple[int, torch.device, torch.dtype], list[int]] = {}
        number = [i for i, size in enumerate(self._sizes) for _ in range(size)]
        for place, (param, absent) in enumerate(zip(self._params, self._absent, strict=True)):
            if not absent:
                kind = number[place], param.device, param.dtype
                kinds.setdefault(kind, []).append(place)
        self.calls = []
        for (group, device, dtype), places in kinds.items():
            params = [self._params[place] for place in places]
            slots = [slot_of[id(param)] for param in params]
            with_master = options.want_master(dtype)
            self.calls.append(Call(group, device, dtype, params, places, slots, with_master))
        columns = self.look_up(states)
        assert columns is not None, "every state fits"
        every = self._every(grads, columns)
        self._are_alike = likeness(every)
        plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in every)
        self.layout = object() if plain else None
        """Stands for the layout of all tensors, for the operators; None if they are not plain."""

    def _every(self, grads: Sequence[Tensor | None], columns: list[Columns]) -> list[Tensor]:
        """Return all tensors whose dtypes, devices and sizes decide about the calls."""
        every = self._params + [grad for grad in grads if grad is not None]
        for of_call in columns:
            every += chain.from_iterable(of_call)
        return every

    def look_up(self, states: Mapping[Tensor, State]) -> list[Columns] | None:
        """Return the states for each call, or None if there are others than there were."""
        found, columns = list(states.values()), []
        for call in self.calls:
            used = [found[slot] for slot in call.slots]
            # The only tensor that a state may have too many.
            if not call.with_master and any(["master" in state for state in used]):
                return None
            try:
                masters = [state["master"] for state in used] if call.with_master else []
                exp_avgs = [state["exp_avg"] for state in used]
                exp_avg_sqs = [state["exp_avg_sq"] for state in used]
                steps = [state["step"] for state in used]
            except KeyError:
                return None
            columns.append(Columns(exp_avgs, exp_avg_sqs, masters, steps))
        return columns

    def still(
        self,
        options: StateOptions,
        groups: Sequence[dict[str, Any]],
        params: list[Tensor],
        grads: Sequence[Tensor | None],
        states: Mapping[Tensor, State],
    ) -> list[Columns] | None:
        """Return the states for each call, or None if anything that the calls depend on changed."""
        if (
            options != self._options
            or [len(group["params"]) for group in groups] != self._sizes
            or not _same(params, self._params)
            or [grad is None for grad in grads] != self._absent
            or not _same(list(states), self._keys)
        ):
            return None
        columns = self.look_up(states)
        if columns is None or not self._are_alike(*self._every(grads, columns)):
            return None
        return columns


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    """Return whether two lists have the same objects."""
    return len(some) == len(others) and all(map(is_, some, others))
