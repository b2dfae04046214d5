"""How much arithmetic training is, how much the machine can do, and the share that is used.

A weight that multiplies a token costs 2 FLOPs forward and 4 backward (Kaplan et al., 2020, section
2.1), so a step costs 6 FLOPs per token and weight. Attention's two products, q k^T and p v, cost
another 12 n_layer n_embd T per token for all T keys (Chowdhery et al., 2022, PaLM, appendix B);
causal attention computes half of them:

    6 (12 n_layer n_embd^2 + vocab_size n_embd)  +  6 n_layer n_embd T
"""

from gptfast.config import GPTConfig


def flops_per_token(config: GPTConfig, T: int) -> float:
    """FLOPs of one training step, forward and backward, per token of a sequence of T tokens.

    Counts every matrix that is multiplied: four per block and the head, tied or not. Embedding
    look-ups, biases, norms, softmax and the optimizer are left out, as in PaLM's appendix B.
    Raises ValueError for a T outside [1, block_size].
    """
    if not 1 <= T <= config.block_size:
        raise ValueError(f"T must be in [1, block_size={config.block_size}], got {T}")
    C = config.n_embd
    weights = 12 * config.n_layer * C * C + config.vocab_size * C
    return 6.0 * weights + 6.0 * config.n_layer * C * T


def mfu(tokens_per_second: float, config: GPTConfig, T: int, peak: float) -> float:
    """Model FLOPs utilisation (PaLM, appendix B): the share of `peak` FLOP/s that training uses."""
    if not peak > 0:
        raise ValueError(f"peak must be a number of FLOP/s > 0, got {peak}")
    return tokens_per_second * flops_per_token(config, T) / peak
