"""Count the FLOPs of training and the share of the machine's peak that it uses (MFU).

A weight that multiplies a token costs 2 FLOPs forward and 4 backward (Kaplan et al., 2020, section
2.1), so a step costs 6 FLOPs per token and weight. Attention's two products, q k^T and p v, cost
another 12 n_layer n_embd T per token for all T keys (Chowdhery et al., 2022, PaLM, appendix B);
causal attention computes half of them:

    6 (12 n_layer n_embd^2 + vocab_size n_embd)  +  6 n_layer n_embd T
"""

import functools

import torch

from gptfast import ops
from gptfast.config import GPTConfig
from gptfast.device import measured_peak, peak_memory


def flops_per_token(config: GPTConfig, T: int) -> float:
    """Return the FLOPs of a training step, forward and backward, per token of a sequence of T.

    Counts all matrix products: four matrices per block, attention, and the head, tied or not.
    Embeddings, biases, norms, softmax and the optimizer are left out, as in PaLM's appendix B.
    Raises ValueError for a T outside [1, block_size].
    """
    if not 1 <= T <= config.block_size:
        raise ValueError(f"T must be in [1, block_size={config.block_size}], got {T}")
    C = config.n_embd
    weights = 12 * config.n_layer * C * C + config.vocab_size * C
    return 6.0 * weights + 6.0 * config.n_layer * C * T


def mfu(tokens_per_second: float, config: GPTConfig, T: int, peak: float) -> float:
    """Return the model FLOPs utilisation (PaLM, appendix B): the share of `peak` FLOP/s used."""
    if not peak > 0:
        raise ValueError(f"peak must be a number of FLOP/s > 0, got {peak}")
    return tokens_per_second * flops_per_token(config, T) / peak


def speed(
    tokens_per_second: float, config: GPTConfig, T: int, peak: float, device: torch.device
) -> dict[str, float]:
    """Return the speed, the MFU and the peak memory on a device, for the row of a step."""
    share = mfu(tokens_per_second, config, T, peak)
    # Above 1, the peak was measured while the machine was busy, and the MFU means nothing.
    share_if_known = {"mfu": round(share, 4)} if share <= 1 else {}
    return {
        "tokens_per_second": round(tokens_per_second, 1),
        **share_if_known,
        "memory_mb": round(peak_memory(device) / 2**20),
    }


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large product of training on a device, measured once a process.

    It depends on the dtype and, for fp32, on `torch.set_float32_matmul_precision`.
    """
    backend = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    return _peak_of(device, dtype, backend.matmul.fp32_precision)


@functools.cache
def _peak_of(device: torch.device, dtype: torch.dtype, fp32_products: str) -> float:
    # With the matrix product of training, which is twice as fast as PyTorch's on some CPUs.
    return measured_peak(device, dtype, product=ops.linear)
