"""AdamW with the global-norm clip inside the step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gptfast.ops.adamw import adamw, grad_norm

# torch.optim.AdamW's other keywords: those that choose an implementation change nothing here, those
# that change the mathematics are refused.
_IGNORED = {"foreach": None, "fused": None, "capturable": False}
_REFUSED = {"amsgrad": False, "maximize": False, "differentiable": False}


def _refuse(options: dict[str, Any]) -> None:
    for name in _REFUSED:
        if options.get(name):
            raise ValueError(f"gptfast.AdamW has no {name}; use torch.optim.AdamW for it")


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay Adam (Loshchilov & Hutter, 2019), drop-in for `torch.optim.AdamW`.

    params, lr, betas, eps, weight_decay, param groups and `state_dict` are torch's, in both
    directions. One call updates all tensors of a group; the arithmetic is fp32.

    max_norm: clip the gradients of all groups together to this 2-norm inside the step, as
    `clip_grad_norm_` would (coefficient max_norm / (norm + 1e-6)), leaving `.grad` untouched.
    `grad_norm` then holds the last norm, 0-d on the parameters' device (None before the first step
    or without max_norm; `max_norm=float("inf")` measures without clipping). With max_norm, a step
    whose norm is not finite leaves parameters, moments and step counts as they were.
    A step on the GPU can be captured in a CUDA graph once one has been taken: replays follow lr
    where that is a tensor on the GPU (a number is captured as it was).
    bf16_update: for 16-bit parameters, "master" keeps an fp32 copy in the state, "stochastic"
    (bf16 only) rounds stochastically, with `seed` fixing the stream.
    moment_dtype: of the moments; None is fp32 (fp64 for fp64 parameters). torch.bfloat16, for
    bfloat16 parameters only, halves their memory.

    Raises ValueError for values out of range and for amsgrad, maximize and differentiable.
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
        # decoupled_weight_decay marks AdamW among torch's Adams in a shared state_dict.
        super().__init__(
            params, {**defaults, **_IGNORED, **_REFUSED, "decoupled_weight_decay": True}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, after checking its values."""
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
            if param.is_complex():
                raise ValueError("gptfast.AdamW takes real parameters, got a complex one")
            if self.moment_dtype == torch.bfloat16 and param.dtype != torch.bfloat16:
                raise ValueError(
                    f"moment_dtype=torch.bfloat16 needs bfloat16 parameters, got {param.dtype}"
                )
            if self.bf16_update == "stochastic" and param.dtype == torch.float16:
                raise ValueError(
                    "bf16_update='stochastic' is for bfloat16; use 'master' for float16"
                )

    def __getstate__(self) -> dict[str, Any]:
        # The base class would leave out what is not in the groups, and copies could not step.
        own = ("max_norm", "bf16_update", "moment_dtype", "seed", "grad_norm")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def _init_state(self, param: Tensor) -> None:
        state = self.state[param]
        widest = torch.promote_types(param.dtype, torch.float32)
        dtype = torch.bfloat16 if self.moment_dtype == torch.bfloat16 else widest
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
        state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)

    def _init_master(self, param: Tensor) -> None:
        if param.dtype.itemsize == 2 and self.bf16_update == "master":
            # Also after loading torch's state, which has no master.
            if "master" not in self.state[param]:
                self.state[param]["master"] = param.detach().float()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; closure, if given, recomputes the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        present = [grad for grad in grads if grad is not None]
        if any(grad.layout != torch.strided for grad in present):
            raise ValueError("gptfast.AdamW takes dense gradients, got a sparse one")
        norm = None
        if self.max_norm is not None and present:
            norm = self.grad_norm = grad_norm(present)
        first_id = 0
        for group in self.param_groups:
            self._step_group(group, first_id, norm)
            first_id += len(group["params"])
        return loss

    def _step_group(self, group: dict[str, Any], first_id: int, norm: Tensor | None) -> None:
        ids = [i for i, p in enumerate(group["params"]) if p.grad is not None]
        by_kind: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i in ids:
            param = group["params"][i]
            by_kind.setdefault((param.device, param.dtype), []).append(i)
            if "step" not in self.state[param]:
                self._init_state(param)
            self._init_master(param)
        for (device, dtype), kind in by_kind.items():
            params = [group["params"][i] for i in kind]
            states = [self.state[p] for p in params]
            lr = group["lr"]
            if not isinstance(lr, Tensor):
                # Never on the GPU: the copy there would wait, and break a CUDA graph's capture.
                lr = torch.tensor(lr, dtype=torch.float64, device="cpu")
            adamw(
                params,
                [p.grad for p in params],
                [s["exp_avg"] for s in states],
                [s["exp_avg_sq"] for s in states],
                [s["master"] for s in states if "master" in s],
                [s["step"] for s in states],
                lr,
                norm if norm is None else norm.to(device),
                self.max_norm or 0.0,
                *group["betas"],
                group["eps"],
                group["weight_decay"],
                [first_id + i for i in kind],
                dtype == torch.bfloat16 and self.bf16_update == "stochastic",
                self.seed,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load our own or torch's AdamW state, each moment and master in the dtype it was saved in.

        The base class would round fp32 moments to a 16-bit parameter's dtype.
        """
        for group in state_dict["param_groups"]:
            _refuse(group)
        super().load_state_dict(state_dict)
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for saved_id, param in zip(saved_ids, params, strict=True):
            for name, saved in state_dict["state"].get(saved_id, {}).items():
                if isinstance(saved, Tensor) and name != "step":
                    self.state[param][name] = saved.to(param.device, copy=True)
                elif name == "step":
                    step = torch.as_tensor(saved, dtype=torch.float32)
                    self.state[param][name] = step.to(param.device, copy=True)
