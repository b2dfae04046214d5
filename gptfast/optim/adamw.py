"""AdamW that clips gradients to a global norm inside its step."""

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from gptfast import dtensor
from gptfast.ops.adamw import adamw, grad_norm
from gptfast.optim.state import Call, Columns, StateOptions, Work, check_gradient, fit_state

# torch.optim.AdamW's other keywords, with their defaults. Those that choose an implementation are
# ignored; those that change the mathematics are refused.
_IGNORED = {"foreach": None, "fused": None, "capturable": False}
_REFUSED = {"amsgrad": False, "maximize": False, "differentiable": False}

_dtype = attrgetter("dtype")


def _refuse(options: dict[str, Any]) -> None:
    """Raise ValueError for a keyword that changes the mathematics."""
    for name in _REFUSED:
        if options.get(name):
            raise ValueError(f"gptfast.AdamW has no {name}; use torch.optim.AdamW for it")


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, 2019), a drop-in replacement for `torch.optim.AdamW`.

    params, lr, betas, eps, weight_decay and param groups are torch's. `state_dict` can be exchanged
    with torch's in both directions. One call updates all tensors of a group, in fp32 arithmetic.

    max_norm: clip the gradients of all groups together to this 2-norm inside the step, as
    `clip_grad_norm_` does (coefficient max_norm / (norm + 1e-6)), but leave `.grad` unchanged.
    `grad_norm` then holds the last norm, a 0-d tensor on the parameters' device; it is None before
    the first step and without max_norm. `max_norm=float("inf")` measures the norm without clipping.
    With max_norm, a step whose norm is not finite changes no parameter, moment or step count, and
    neither does one whose norm is above the `norm_limit` of `step`.
    bf16_update: for 16-bit parameters, "master" keeps an fp32 copy in the state; "stochastic" (bf16
    only) rounds stochastically, and `seed` makes the rounding reproducible. What others write to a
    parameter between two steps (`load_state_dict`, averaging, an edit under `no_grad`) counts: the
    next step starts from the parameter wherever it differs from the rounded fp32 copy.
    moment_dtype: data type of the moments; None is fp32, or fp64 for fp64 parameters.
    torch.bfloat16, for bfloat16 parameters only, halves the memory of the moments.

    Parameters may be DTensors, as `torch.distributed.fsdp.fully_shard` and tensor parallelism make
    them. Each process updates its own part, and one all-reduce makes the norm that of all parts, so
    every process must call `step`. Under `FullyShardedDataParallel`, `step` works without max_norm
    only.

    After the first step on a GPU, a step can be captured in a CUDA graph. Replays use the current
    lr if it is a tensor on the GPU, and the captured value if it is a number.

    Raises ValueError for values out of range, for amsgrad, maximize and differentiable, and for
    other tensor subclasses.
    """

    # Of the class: a copy of an optimizer begins without.
    _work: Work | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float | None = None,
        bf16_update: str = "master",
        moment_dtype: torch.dtype | None = None,
        seed: int = 0,
        **torch_options: Any,
    ) -> None:
        for name in torch_options:
            if name not in _IGNORED | _REFUSED:
                raise TypeError(f"AdamW got an unexpected keyword argument {name!r}")
        _refuse(torch_options)
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be > 0, got {max_norm}")
        if bf16_update not in ("master", "stochastic"):
            raise ValueError(f"bf16_update must be 'master' or 'stochastic', got {bf16_update!r}")
        if moment_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(
                f"moment_dtype must be None, torch.float32 or torch.bfloat16, got {moment_dtype}"
            )
        self.max_norm, self.bf16_update, self.seed = max_norm, bf16_update, seed
        self.moment_dtype = moment_dtype
        self.grad_norm: Tensor | None = None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # torch tells AdamW from Adam by decoupled_weight_decay when it loads our state_dict.
        super().__init__(
            params, {**defaults, **_IGNORED, **_REFUSED, "decoupled_weight_decay": True}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters. Raises ValueError for values out of range."""
        group = {**self.defaults, **param_group}
        _refuse(group)
        beta1, beta2 = group["betas"]
        checks = [
            ("lr", float(group["lr"]), float(group["lr"]) >= 0, ">= 0"),
            ("betas", group["betas"], 0 <= beta1 < 1 and 0 <= beta2 < 1, "in [0, 1)"),
            ("eps", group["eps"], group["eps"] >= 0, ">= 0"),
            ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0, ">= 0"),
        ]
        for name, value, fits, must in checks:
            if not fits:
                raise ValueError(f"{name} must be {must}, got {value}")
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.requires_grad:
                dtensor.check_parameter(param)
            self._state_options.check(param.dtype)

    def __getstate__(self) -> dict[str, Any]:
        # The base class copies the groups only; a copy without these could not step.
        own = ("max_norm", "bf16_update", "moment_dtype", "seed", "grad_norm")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    @property
    def _state_options(self) -> StateOptions:
        return StateOptions(self.bf16_update, self.moment_dtype)

    def _prepare(
        self, params: list[Tensor], grads: list[Tensor | None]
    ) -> tuple[Iterable[tuple[Call, Columns]], object]:
        """Return the calls of a step with the states, which are made or fitted where necessary.

        Also returns what stands for the layout of all tensors.
        """
        options, groups = self._state_options, self.param_groups
        columns = None
        if self._work is not None:
            columns = self._work.still(options, groups, params, grads, self.state)
        if self._work is None or columns is None:
            # Nothing is updated before all checks have passed.
            for dtype in set(map(_dtype, params)):
                options.check(dtype)
            used = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None]
            for param, grad in used:
                check_gradient(param, grad)
                fit_state(self.state[param], param, options)
            self._work = Work(options, groups, grads, self.state)
            columns = self._work.look_up(self.state)
            assert columns is not None
        return zip(self._work.calls, columns, strict=True), self._work.layout

    def _check_limit(self, norm_limit: Tensor | None) -> None:
        if norm_limit is None:
            return
        if self.max_norm is None:
            raise ValueError("norm_limit limits the norm that max_norm measures: give max_norm too")
        if not isinstance(norm_limit, Tensor) or norm_limit.dim():
            raise ValueError(
                f"norm_limit must be a 0-d tensor, such as torch.tensor(2.0); got {norm_limit!r}"
            )

    def _measure(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        split: bool,
        layout: object,
        norm_limit: Tensor | None,
    ) -> Tensor | None:
        """Set `grad_norm`; return the norm for the kernels, NaN above the limit, None without."""
        if self.max_norm is None:
            return None
        norm = self._norm(params, grads, split, layout)
        if norm is None:
            return None
        self.grad_norm = norm
        if norm_limit is None:
            return norm
        return norm.where(norm <= norm_limit.to(norm.device), torch.nan)

    def _norm(
        self, params: list[Tensor], grads: list[Tensor | None], split: bool, layout: object
    ) -> Tensor | None:
        """Return the norm of all gradients, 0-d, or None without a gradient."""
        if split:
            return dtensor.global_norm(params, grads)
        present = [grad for grad in grads if grad is not None]
        return grad_norm(present, layout) if present else None

    def make_state(self) -> None:
        """Make the states of all parameters that require gradients, as the first step does."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad:
                    fit_state(self.state[param], param, self._state_options)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        norm_limit: Tensor | None = None,
    ) -> Any:
        """Update every parameter that has a gradient.

        closure: recomputes the loss and the gradients; its result is returned.
        norm_limit: 0-d; with max_norm, a larger norm changes nothing, and under a limit of NaN no
        norm changes anything. The kernels decide, so that nobody waits for the norm.

        Raises ValueError for a sparse gradient, for a parameter whose shape has changed since its
        first step, for norm_limit without max_norm, and with max_norm under
        `FullyShardedDataParallel`.
        """
        self._check_limit(norm_limit)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        if self.max_norm is not None:
            dtensor.check_whole(params)
        grads = [p.grad for p in params]
        calls, layout = self._prepare(params, grads)
        split = dtensor.any_in(params)
        if split:
            grads = [dtensor.local_gradient(p, g) for p, g in zip(params, grads, strict=True)]
            layout = None
        norm = self._measure(params, grads, split, layout, norm_limit)
        for call, columns in calls:
            of_call = [grads[place] for place in call.places]
            self._update(call, columns, of_call, norm, split, layout)
        return loss

    def _update(
        self,
        call: Call,
        columns: Columns,
        grads: list[Tensor | None],
        norm: Tensor | None,
        split: bool,
        layout: object,
    ) -> None:
        """Update the parameters of a call.

        grads: theirs; norm: of all gradients; split: whether there are DTensors; layout: as
        `_prepare` returns it.
        """
        group, params, ids = self.param_groups[call.group], call.params, call.places
        stochastic = call.dtype == torch.bfloat16 and self.bf16_update == "stochastic"
        if stochastic and split:
            ids = [self._id_of_part(i, p) for i, p in zip(ids, params, strict=True)]
        lr = group["lr"]
        if not isinstance(lr, Tensor):
            # On the CPU: a copy to the GPU would wait for it and break a CUDA graph's capture.
            lr = torch.tensor(lr, dtype=torch.float64, device="cpu")
        exp_avgs, exp_avg_sqs, masters, steps = columns
        local: Callable[[list[Tensor]], list[Tensor]] = dtensor.local if split else list
        adamw(
            local(params),
            grads,
            local(exp_avgs),
            local(exp_avg_sqs),
            local(masters),
            steps,
            lr,
            norm if norm is None else norm.to(call.device),
            self.max_norm or 0.0,
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            ids,
            stochastic,
            self.seed,
            layout=layout,
        )
        if split:
            # A DTensor counts its versions apart from its local tensor.
            torch.autograd.graph.increment_version(params)

    def _id_of_part(self, param_id: int, param: Tensor) -> int:
        """Return a number for this process's part of a parameter: each part rounds differently."""
        n_params = sum(len(group["params"]) for group in self.param_groups)
        return param_id + n_params * dtensor.shard_index(param)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this class or of torch's AdamW, in the data types it was saved in.

        The base class would round fp32 moments to the data type of a 16-bit parameter.

        Raises ValueError if only one of a parameter and its state is a DTensor.
        """
        for group in state_dict["param_groups"]:
            _refuse(group)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        # Before anything changes. The base class sees to groups that do not fit.
        states = [
            (param, _placed(state_dict["state"].get(saved_id, {}), param))
            for saved_id, param in zip(saved_ids, params, strict=False)
        ]
        super().load_state_dict(state_dict)
        for param, state in states:
            self.state[param].update(state)


def _placed(saved: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
    """Return copies of the tensors of a parameter's saved state, where the parameter is."""
    state = {}
    for name, value in saved.items():
        if name == "step":
            step = torch.as_tensor(value, dtype=torch.float32)
            state[name] = step.to(param.device, copy=True)
        elif isinstance(value, Tensor):
            # torch's AdamW rounds a master, like all of the state, to the parameter's dtype.
            dtype = torch.float32 if name == "master" else value.dtype
            copy = value.to(param.device, dtype, copy=True)
            state[name] = dtensor.placed_as(copy, param, name)
    return state
