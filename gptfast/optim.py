"""AdamW that clips gradients to a global norm inside its step."""

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from gptfast import dtensor
from gptfast.ops.adamw import adamw, grad_norm

# torch.optim.AdamW's other keywords, with their defaults. Those that choose an implementation are
# ignored; those that change the mathematics are refused.
_IGNORED = {"foreach": None, "fused": None, "capturable": False}
_REFUSED = {"amsgrad": False, "maximize": False, "differentiable": False}

_HALVES = frozenset({torch.float16, torch.bfloat16})
# The dtype of the moments of a parameter, from its own.
_WIDEST = dict.fromkeys((torch.float32, *_HALVES), torch.float32) | {torch.float64: torch.float64}


_dtype = attrgetter("dtype")
_device = attrgetter("device")


def _fits(state: torch.dtype, param: torch.dtype) -> bool:
    """Return whether a state of this dtype can stand beside a parameter of that dtype."""
    return state is _WIDEST.get(param) or state is param is torch.bfloat16


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
            self._check_dtype(param.dtype)

    def _check_dtype(self, dtype: torch.dtype) -> None:
        """Raise ValueError for a parameter's data type that the options do not allow."""
        if dtype.is_complex:
            raise ValueError("gptfast.AdamW takes real parameters, got a complex one")
        if self.moment_dtype == torch.bfloat16 and dtype != torch.bfloat16:
            raise ValueError(f"moment_dtype=torch.bfloat16 needs bfloat16 parameters, got {dtype}")
        if self.bf16_update == "stochastic" and dtype == torch.float16:
            raise ValueError("bf16_update='stochastic' is for bfloat16; use 'master' for float16")

    def __getstate__(self) -> dict[str, Any]:
        # The base class copies the groups only; a copy without these could not step.
        own = ("max_norm", "bf16_update", "moment_dtype", "seed", "grad_norm")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def _init_state(self, param: Tensor) -> None:
        """Create the step count and the moments of a parameter."""
        dtensor.check_parameter(param)
        if param.dtype not in _WIDEST:
            raise ValueError(
                f"gptfast.AdamW takes float16 to float64 parameters, got {param.dtype}"
            )
        state = self.state[param]
        widest = _WIDEST[param.dtype]
        dtype = torch.bfloat16 if self.moment_dtype == torch.bfloat16 else widest
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)

    def _fit_state(self, param: Tensor) -> None:
        """Create the state of a parameter, or fit it to what the parameter has become since.

        Raises ValueError if the parameter has another shape now.
        """
        state, dtype = self.state[param], param.dtype
        if "step" not in state:
            self._init_state(param)
        if not self._wants_master(dtype):
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

    def _wants_master(self, dtype: torch.dtype) -> bool:
        return dtype in _HALVES and self.bf16_update == "master"

    def _fits_as_it_is(self, params: list[Tensor], grads: list[Tensor]) -> bool:
        """Return whether every gradient is right and every state fits its parameter.

        It looks at all of them at once, as this runs in each step, and at one moment of each state.
        """
        states = [self.state[param] for param in params]
        try:
            moments = [state["exp_avg"] for state in states]
        except KeyError:
            return False
        shapes = list(map(Tensor.size, params))
        kinds = zip(map(_dtype, params), map(_dtype, moments), strict=True)
        with_master = ["master" in state for state in states]
        return (
            {grad.layout for grad in grads} == {torch.strided}
            and shapes == list(map(Tensor.size, grads))
            and shapes == list(map(Tensor.size, moments))
            and all(
                _fits(moment, dtype) and master == self._wants_master(dtype)
                for (dtype, moment), master in set(zip(kinds, with_master, strict=True))
            )
        )

    def _prepare(self, param: Tensor, grad: Tensor) -> None:
        """Check the gradient of a parameter and fit the state to the parameter."""
        shape, dtype, state = param.shape, param.dtype, self.state[param]
        if grad.layout != torch.strided:
            raise ValueError("gptfast.AdamW takes dense gradients, got a sparse one")
        if grad.shape != shape:
            raise ValueError(
                f"a parameter has the shape {tuple(shape)}, but its gradient has "
                f"{tuple(grad.shape)}; call zero_grad() after changing a shape"
            )
        moment = state.get("exp_avg")
        if (
            moment is None
            or moment.shape != shape
            or not _fits(moment.dtype, dtype)
            or ("master" in state) != self._wants_master(dtype)
        ):
            self._fit_state(param)

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
        norm_limit: Tensor | None,
    ) -> Tensor | None:
        """Set `grad_norm`; return the norm for the kernels, NaN above the limit, None without."""
        if self.max_norm is None:
            return None
        norm = None
        present = [grad for grad in grads if grad is not None]
        if split:
            norm = dtensor.global_norm(params, grads)
        elif present:
            norm = grad_norm(present)
        if norm is None:
            return None
        self.grad_norm = norm
        if norm_limit is None:
            return norm
        return norm.where(norm <= norm_limit.to(norm.device), torch.nan)

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
        # Nothing is updated before all checks have passed.
        for dtype in set(map(_dtype, params)):
            self._check_dtype(dtype)
        grads = [p.grad for p in params]
        used = [p for p, g in zip(params, grads, strict=True) if g is not None]
        present = [g for g in grads if g is not None]
        if present and not self._fits_as_it_is(used, present):
            for param, grad in zip(used, present, strict=True):
                self._prepare(param, grad)
        split = dtensor.any_in(params)
        if split:
            grads = [dtensor.local_gradient(p, g) for p, g in zip(params, grads, strict=True)]
        norm = self._measure(params, grads, split, norm_limit)
        first_id = 0
        for group in self.param_groups:
            n = len(group["params"])
            self._step_group(group, grads[first_id : first_id + n], first_id, norm, split)
            first_id += n
        return loss

    def _step_group(
        self,
        group: dict[str, Any],
        grads: list[Tensor | None],
        first_id: int,
        norm: Tensor | None,
        split: bool,
    ) -> None:
        """Update the parameters of a group, all of one device and dtype at a time.

        grads: of the group; first_id: the number of parameters in the groups before; norm: of all
        gradients; split: whether there are DTensors.
        """
        with_grad = [i for i, grad in enumerate(grads) if grad is not None]
        for (device, dtype), kind in _by_kind(group["params"], with_grad):
            params = [group["params"][i] for i in kind]
            states = [self.state[p] for p in params]
            stochastic = dtype == torch.bfloat16 and self.bf16_update == "stochastic"
            ids = [first_id + i for i in kind]
            if stochastic and split:
                ids = [self._id_of_part(i, p) for i, p in zip(ids, params, strict=True)]
            lr = group["lr"]
            if not isinstance(lr, Tensor):
                # On the CPU: a copy to the GPU would wait for it and break a CUDA graph's capture.
                lr = torch.tensor(lr, dtype=torch.float64, device="cpu")
            local: Callable[[list[Tensor]], list[Tensor]] = dtensor.local if split else list
            adamw(
                local(params),
                [grads[i] for i in kind],
                local([s["exp_avg"] for s in states]),
                local([s["exp_avg_sq"] for s in states]),
                local([s["master"] for s in states if "master" in s]),
                [s["step"] for s in states],
                lr,
                norm if norm is None else norm.to(device),
                self.max_norm or 0.0,
                *group["betas"],
                group["eps"],
                group["weight_decay"],
                ids,
                stochastic,
                self.seed,
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


def _by_kind(
    params: list[Tensor], places: list[int]
) -> Iterable[tuple[tuple[torch.device, torch.dtype], list[int]]]:
    """Return the places of the parameters of each device and dtype."""
    used = [params[i] for i in places]
    devices, dtypes = set(map(_device, used)), set(map(_dtype, used))
    if len(devices) == len(dtypes) == 1:
        return [((devices.pop(), dtypes.pop()), places)]
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, param in zip(places, used, strict=True):
        kinds.setdefault((param.device, param.dtype), []).append(i)
    return kinds.items()


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
