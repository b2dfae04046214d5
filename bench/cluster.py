"""GPUs, the links between them, and what collectives take on them: alpha and beta.

A collective of NCCL passes pieces around a ring, or up and down a tree. It takes

    bytes that the slowest link carries / its rate (beta)  +  hops one after the other * latency
    (alpha)

A ring over several nodes is as slow as a node's network. The rates are published measurements of
nccl-tests ("busbw"); the latencies are assumed, of the order of NCCL's own tables.
"""

import math
from dataclasses import dataclass

NVLINK_HOP_S, NETWORK_HOP_S, COLLECTIVE_S = 3.4e-6, 14e-6, 8e-6
"""Assumed: seconds of a hop inside a node, of one between nodes, and to start a collective."""
TREE_RATE = 0.92
"""Assumed: the share of a ring's rate that a tree reaches."""


@dataclass(frozen=True)
class GPU:
    """A kind of GPU in nodes of eight."""

    name: str
    flops_per_s: float
    """Of bf16 products, as NVIDIA states them."""
    products: float
    """The share of it that products reach; fitted, see scaling.py."""
    bytes_per_s: float
    """Of its memory: nine tenths of what NVIDIA states."""
    memory: float
    """Bytes."""
    nvlink: float
    """Bytes per second of a ring inside a node."""
    network: float
    """Bytes per second between two nodes, of all eight GPUs together."""
    per_node: int = 8


# NVLink: NVIDIA/nccl-tests issues 175 (232 GB/s) and 212 (370 GB/s). Network: issue 175 (86 GB/s of
# four ports of 200 Gb/s) and 290 (46 to 48 GB/s for each of eight ports of 400 Gb/s).
A100 = GPU("A100 80GB SXM", 312e12, 0.70, 0.9 * 2.039e12, 80e9, 232e9, 86e9)
A100_40GB = GPU("A100 40GB SXM", 312e12, 0.70, 0.9 * 1.555e12, 40e9, 232e9, 86e9)
H100 = GPU("H100 80GB SXM", 989e12, 0.55, 0.9 * 3.35e12, 80e9, 370e9, 370e9)
GPUS = {"a100": A100, "h100": H100}


@dataclass(frozen=True)
class Group:
    """n GPUs that talk to one another. spread: each stands on a node of its own, and the other
    GPUs of the nodes use the network at the same time."""

    gpu: GPU
    n: int
    spread: bool = False

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return self.n if self.spread else math.ceil(self.n / self.gpu.per_node)

    @property
    def _rate(self) -> float:
        if self.nodes == 1:
            return self.gpu.nvlink
        shared = self.gpu.network / self.gpu.per_node if self.spread else self.gpu.network
        return min(self.gpu.nvlink, shared)

    def scatter(self, n_bytes: float) -> float:
        """Return the seconds of a reduce-scatter or an all-gather of n_bytes, by a ring."""
        if self.n == 1:
            return 0.0
        between = self.nodes - 1
        hops = between * NETWORK_HOP_S + (self.n - 1 - between) * NVLINK_HOP_S
        return COLLECTIVE_S + hops + (self.n - 1) / self.n * n_bytes / self._rate

    def all_reduce(self, n_bytes: float) -> float:
        """Return the seconds of an all-reduce of n_bytes, by a ring or by a tree."""
        if self.n == 1:
            return 0.0
        ring = 2 * self.scatter(n_bytes) - COLLECTIVE_S
        inside = 0 if self.spread else min(self.n, self.gpu.per_node) - 1
        hops = math.log2(self.nodes) * NETWORK_HOP_S + inside * NVLINK_HOP_S
        tree = COLLECTIVE_S + 2 * hops + 2 * n_bytes / (TREE_RATE * self._rate)
        return min(ring, tree)
