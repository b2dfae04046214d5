"""What bench/predicted_step.py predicts, at real sizes. All of it runs inside a `Trace`.

A workload makes its tensors and calls `record` with the function whose launches count.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

Record = Callable[[Callable[[], object]], None]

B, T, V = 16, 1024, 50257


def _step(record: Record, bf16_parameters: bool) -> None:
    """A training step of GPT-2 124M, as TrainStep queues it on a GPU."""
    from gptfast import GPT, GPTConfig, TrainConfig
    from gptfast.training.step import TrainStep

    model = GPT(GPTConfig())
    model = model.bfloat16() if bf16_parameters else model
    config = TrainConfig(precision="fp32" if bf16_parameters else "bf16")
    step = TrainStep(model, config, torch.device("cpu"))
    x, y = torch.from_numpy(np.random.default_rng(0).integers(V, size=(2, B, T)))
    inputs = step._inputs([(x, y)], [B * T], 1e-3)
    step._compute(inputs)  # makes the optimizer's state
    record(lambda: step._compute(inputs))


@torch.inference_mode()
def _decode(record: Record, rows: int, dtype: str) -> None:
    """A decode step without sampling, as gpu_rows._Step computes it, with T tokens a row."""
    from gptfast import GPT, GPTConfig
    from gptfast.engine.gpu_model import GpuModel

    model = GpuModel(GPT(GPTConfig()), dtype)
    cache = model.new_cache(rows)
    ids, last = torch.zeros(rows, 1, dtype=torch.int64), torch.full((rows, 1), T - 1)
    kv_len = torch.full((rows,), T)

    def run() -> Tensor:
        x = model.hidden(ids, last, cache, last, kv_len, T)
        return model.head(x[:, 0], fp32_out=True)

    record(run)


def _sample(record: Record, rows: int, top_k: int | None, top_p: float | None) -> None:
    """A token for each row of random logits."""
    from gptfast import ops

    numbers = 3 * np.random.default_rng(0).standard_normal((rows, V), np.float32)
    logits = torch.from_numpy(numbers)
    record(lambda: ops.sample(logits, top_k=top_k, top_p=top_p, seed=1, position=5))


def _cross_entropy(record: Record) -> None:
    """The loss of logits that exist at once, and their gradient."""
    from gptfast.kernels.triton import cross_entropy

    logits, target = torch.empty(B * T, V, dtype=torch.bfloat16), torch.arange(B * T)
    options = (-100, 0.0, 0.0)

    def run() -> Tensor:
        loss, stats = cross_entropy.cross_entropy_fwd(logits, target, *options)
        return cross_entropy.cross_entropy_bwd(loss, logits, target, stats, *options)

    record(run)


STEPS = {
    "step, bf16": "The training step, bf16 parameters with fp32 masters",
    "step, autocast": "The training step, fp32 parameters under autocast "
    "(`gptfast train --precision bf16`)",
}
"""The titles of the training steps."""
WORKLOADS: dict[str, Callable[[Record], None]] = {
    "step, bf16": partial(_step, bf16_parameters=True),
    "step, autocast": partial(_step, bf16_parameters=False),
    "decode, bf16, B=1": partial(_decode, rows=1, dtype="bf16"),
    "decode, int8, B=1": partial(_decode, rows=1, dtype="int8"),
    "decode, bf16, B=64": partial(_decode, rows=64, dtype="bf16"),
    "sampling, top_k=50, B=1": partial(_sample, rows=1, top_k=50, top_p=None),
    "sampling, top_p=0.9, B=1": partial(_sample, rows=1, top_k=None, top_p=0.9),
    "sampling, top_k=50, B=128": partial(_sample, rows=128, top_k=50, top_p=None),
    "cross_entropy": _cross_entropy,
}
