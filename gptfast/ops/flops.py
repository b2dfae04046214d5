"""The operations per call that torch.utils.flop_counter.FlopCounterMode counts for our operators.

They are those of the matrix products, 2 M N K each, as PyTorch counts its own operators. So a
gptfast model counts as the same model in plain PyTorch does: attention is counted without regard to
its mask, and a backward's products once each, whatever a kernel computes again.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"


def _product(rows: Sequence[int], weight: Sequence[int]) -> int:
    """Return the operations of rows (N, K) times the transpose of weight (M, K)."""
    return 2 * rows[0] * weight[0] * weight[1]


def _scores(q: Sequence[int], k: Sequence[int]) -> int:
    """Return the operations of q (B, H, Tq, D) times the transpose of k (B, H, Tk, D)."""
    B, H, Tq, D = q
    return 2 * B * H * Tq * k[2] * D


def _packed_scores(qkv: Sequence[int]) -> int:
    """Return `_scores` for a packed qkv (B, T, 3C)."""
    B, T, C3 = qkv
    return 2 * B * T * T * (C3 // 3)


def _linear_bwd(dy, x, norm_weight, norm_bias, eps, weight, bias, stats, *rest) -> int:  # type: ignore[no-untyped-def]
    need_dx, need_dweight, _ = rest
    return (need_dx + need_dweight) * _product(x, weight)


def _mlp_fwd(x, norm_weight, norm_bias, eps, fc_weight, fc_bias, proj_weight, *rest) -> int:  # type: ignore[no-untyped-def]
    return _product(x, fc_weight) + _product(x, proj_weight)


def _mlp_bwd(dy, x, h, stats, norm_weight, norm_bias, eps, fc_weight, fc_bias, proj_weight, *rest):  # type: ignore[no-untyped-def]
    need_dx, need_dfc, need_dproj, _ = rest[-4:]
    # The gradient of the GELU's output is needed for every gradient but proj_weight's own.
    proj = (need_dx or need_dfc) + need_dproj
    return (need_dx + need_dfc) * _product(x, fc_weight) + proj * _product(x, proj_weight)


def _linear_cross_entropy_fwd_bwd(input, weight, *rest) -> int:  # type: ignore[no-untyped-def]
    # After target, dloss and four options; a default may be left out.
    need_dweight = rest[6] if len(rest) > 6 else True
    # The logits, and the gradients of the input and of the weight.
    return (2 + need_dweight) * _product(input, weight)


# By operator, for its arguments with shapes in place of tensors.
_FORMULAS: dict[str, Callable[..., int]] = {
    "attention_fwd": lambda q, k, *_: 2 * _scores(q, k),
    # The scores again, dv, dp, dq and dk.
    "attention_bwd": lambda dout, q, k, *_: 5 * _scores(q, k),
    "attention_qkv_fwd": lambda qkv, *_: 2 * _packed_scores(qkv),
    "attention_qkv_bwd": lambda dout, qkv, *_: 5 * _packed_scores(qkv),
    "linear_fwd": lambda x, norm_weight, norm_bias, eps, weight, *_: _product(x, weight),
    "linear_bwd": _linear_bwd,
    "mlp_fwd": _mlp_fwd,
    "mlp_bwd": _mlp_bwd,
    "decode_linear": lambda x, norm_weight, norm_bias, eps, weight, *_: _product(x, weight),
    "linear_cross_entropy_fwd": lambda input, weight, *_: _product(input, weight),
    "linear_cross_entropy_fwd_bwd": _linear_cross_entropy_fwd_bwd,
}


def _register(counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():

        def flops(*args: Any, formula: Callable[..., int] = formula, **_: Any) -> int:
            return formula(*args)

        counter.register_flop_formula(getattr(torch.ops.gptfast, name))(flops)


class _Finder(MetaPathFinder):
    """Registers the formulas when somebody imports PyTorch's counter.

    To import it here would cost every start 0.14 s, because it imports Triton.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        loader: Any = spec and spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register(module)

        loader.exec_module = exec_module
        return spec


def register_formulas() -> None:
    """Make FlopCounterMode count our operators, now or when it is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())
