"""Predict what a training step of GPT-2 takes on a number of GPUs: no measurement.

One GPU computes for as long as its products and its memory traffic take, one after the other, and
at least for as long as its kernels take to be launched. Collectives take what cluster.py says. They
overlap with the computation as PyTorch lets them, which is simulated block by block:

    ddp     each block's gradient is summed while the blocks before it compute their backward; the
            token embedding, tied to the head, is complete at the end only
    fsdp    the next block's weights are gathered while one computes, in forward and backward;
            gradients are summed as under ddp, but each process keeps its part
    hsdp    as fsdp within a node; then each part is summed over the nodes

Four numbers are fitted to published runs (scaling.py): the share of their peak that products reach
on an A100 and on an H100, of which PyTorch reached some share more, and how often a layer of llm.c
moves its activations. Left out: contention of communication with computation, stragglers, the
data, checkpoints.
"""

import math
from dataclasses import dataclass, field, replace

from cluster import GPU, Group

from gptfast.config import GPTConfig, parameter_shapes
from gptfast.training.flops import flops_per_token

LAYOUTS = ("ddp", "fsdp", "hsdp")
T = 1024
"""Tokens of a row."""
LAUNCHES_PER_BLOCK, LAUNCH_S = 36, 5e-6
"""Assumed: kernels of a block, forward and backward, and the host's seconds for each."""
ACTIVATION_BYTES = 34
"""Kept per token, channel and layer in bf16, without scores (Korthikanti et al., 2022, 4.1)."""
SPARE = 0.9
"""The share of a GPU's memory that may be planned."""
ODD_VOCABULARY = 0.3
"""The share of a head's products per second that is left with an odd number of tokens: padding it
made nanoGPT's step a quarter faster (its commit of 2023-02-04)."""
ADAMW_PASSES = 8
"""How often a fused AdamW and its norm go through an fp32 tensor of the parameters' size."""


@dataclass(frozen=True)
class Software:
    """How a program moves activations, in passes over a bf16 tensor, forward and backward."""

    name: str
    layer_passes: float
    """Over (tokens, C), per layer."""
    logit_passes: float
    """Over (tokens, V)."""
    score_passes: float = 0.0
    """Over (H, T, T) per row and layer: 0 with fused attention."""
    adamw_passes: float = ADAMW_PASSES
    gradient_bytes: int = 4
    """Of an element of a gradient that is summed."""
    products: float = 1.0
    """The share of the GPU's products per second that it reaches."""


# The passes of the first are fitted, and so is PyTorch's share of the products. The other passes
# were counted in nanoGPT's code of 2022-12-30, which has scores in memory and dropout.
LLM_C = Software("llm.c", 60, 6, gradient_bytes=2)
COMPILED = Software("compiled", 80, 12, 17, 14, products=0.65)
EAGER = Software("eager", 190, 20, 45, 20, products=0.65)
FUSED = replace(COMPILED, name="compiled, fused attention", score_passes=0)


@dataclass(frozen=True)
class Work:
    """A step to predict. rows: of all GPUs together. micro: rows that a GPU computes at once; 0
    takes as many as fit its memory."""

    config: GPTConfig
    gpu: GPU
    n: int
    layout: str
    rows: int
    micro: int = 0
    T: int = T
    software: Software = LLM_C

    @property
    def per_gpu(self) -> int:
        """Rows of a step on each GPU."""
        return self.rows // self.n

    @property
    def shards(self) -> int:
        """The number of parts that weights, gradients and state are cut into."""
        return {"ddp": 1, "fsdp": self.n, "hsdp": min(self.n, self.gpu.per_node)}[self.layout]


def parameters(config: GPTConfig) -> tuple[int, int]:
    """Return the number of a block's parameters, and of all others."""
    sizes = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
    block = sum(size for name, size in sizes.items() if name.startswith("h.0."))
    return block, sum(sizes.values()) - config.n_layer * block


def memory(work: Work, micro: int) -> float:
    """Return the bytes that a GPU holds at its peak."""
    block, others = parameters(work.config)
    total = work.config.n_layer * block + others
    held = 16.0 * total / work.shards  # fp32 weights, gradients and two moments
    if work.shards > 1:
        held += 2 * 2 * block + 4 * others  # two gathered blocks in bf16, and the rest
        held += 4.0 * total if micro < work.per_gpu else 4.0 * block  # sums over micro-batches
    layers = work.config.n_layer * work.config.n_embd
    return held + micro * work.T * (ACTIVATION_BYTES * layers + 4.0 * work.config.n_embd)


def micro_batch(work: Work) -> int:
    """Return the most rows, halved from a GPU's share, that fit its memory; 0 if one does not."""
    micro = work.per_gpu
    while micro and memory(work, micro) > SPARE * work.gpu.memory:
        micro //= 2
    return micro


@dataclass
class Line:
    """Two queues: what a GPU computes and what its links carry, each in the order that it came."""

    computed: float = 0.0
    carried: float = 0.0
    work: float = field(default=0.0)
    """Seconds of computation alone."""

    def compute(self, seconds: float, after: float = 0.0) -> float:
        """Queue a computation that needs something at a time; return when it began."""
        begin = max(self.computed, after)
        self.computed, self.work = begin + seconds, self.work + seconds
        return begin

    def carry(self, seconds: float, after: float) -> float:
        """Queue a collective that can begin at a time; return when it ends."""
        self.carried = max(self.carried, after) + seconds
        return self.carried


@dataclass(frozen=True)
class Prediction:
    """A step's time. `exposed` is what one GPU alone would not take for its rows."""

    seconds: float
    exposed: float
    micro: int
    memory: float
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Of all GPUs."""
        return self.tokens / self.seconds


def _times(work: Work, micro: int) -> tuple[float, float]:
    """Return the seconds, forward and backward, of a block and of the head for a micro-batch."""
    config, software, gpu = work.config, work.software, work.gpu
    tokens, C, V = micro * work.T, config.n_embd, config.vocab_size
    flops = flops_per_token(config, work.T) * tokens
    head_flops = 6.0 * C * V * tokens
    rate = gpu.flops_per_s * gpu.products * software.products
    scores = software.score_passes * config.n_head * work.T
    moved = 2.0 * tokens * (software.layer_passes * C + scores)
    block = (flops - head_flops) / config.n_layer / rate + moved / gpu.bytes_per_s
    head = (
        head_flops / (rate * (ODD_VOCABULARY if V % 2 else 1.0))
        + 2.0 * tokens * V * software.logit_passes / gpu.bytes_per_s
    )
    return max(block, LAUNCHES_PER_BLOCK * LAUNCH_S), head


def _reduce(work: Work, count: int) -> float:
    """Return the seconds in which a gradient of so many elements is summed."""
    n_bytes, gpu = count * work.software.gradient_bytes, work.gpu
    if work.layout == "ddp":
        return Group(gpu, work.n).all_reduce(n_bytes)
    seconds = Group(gpu, work.shards).scatter(n_bytes)
    if work.n > work.shards:
        over = Group(gpu, work.n // work.shards, spread=True)
        seconds += over.all_reduce(n_bytes / work.shards)
    return seconds


def _simulate(work: Work, micro: int) -> Line:
    """Return the queues after all micro-batches of a step, without the update."""
    block, head = _times(work, micro)
    count, others = parameters(work.config)
    sharded, shards = work.shards > 1, Group(work.gpu, work.shards)
    gather = shards.scatter(2.0 * count) if sharded else 0.0
    line, layers, steps = Line(), work.config.n_layer, max(1, work.per_gpu // micro)
    for step in range(steps):
        ready = line.carry(shards.scatter(4.0 * others), line.computed) if sharded else 0.0
        ready = line.carry(gather, ready)
        for _ in range(layers):
            begin = line.compute(block / 3, ready)
            ready = line.carry(gather, begin)  # the next block's, meanwhile
        line.compute(head)
        for _ in range(layers):
            begin = line.compute(block * 2 / 3, ready)
            ready = line.carry(gather, begin)
            if step == steps - 1:
                line.carry(_reduce(work, count), line.computed)
        if step == steps - 1:
            line.carry(_reduce(work, others), line.computed)
    return line


def predict(work: Work) -> Prediction:
    """Return the prediction of a step. Raises ValueError if it cannot be taken."""
    if work.per_gpu < 1 or work.rows % work.n:
        raise ValueError(f"{work.n} GPUs cannot share {work.rows} rows")
    micro = work.micro or micro_batch(work)
    if not micro:
        raise ValueError(f"one row does not fit {work.gpu.memory / 1e9:.0f} GB under {work.layout}")
    line = _simulate(work, micro)
    block, others = parameters(work.config)
    total = work.config.n_layer * block + others
    update = work.software.adamw_passes * 4.0 * total / work.shards / work.gpu.bytes_per_s
    update += Group(work.gpu, work.n).all_reduce(8)  # the norm
    seconds = max(line.computed, line.carried) + update
    held = memory(work, micro)
    return Prediction(seconds, seconds - update - line.work, micro, held, work.rows * work.T)


def recommended(predictions: dict[str, Prediction]) -> str:
    """Return the fastest layout; of those within 1% of it, the simplest."""
    least = min(p.seconds for p in predictions.values())
    return next(name for name in LAYOUTS if _within(predictions, name, least))


def _within(predictions: dict[str, Prediction], name: str, least: float) -> bool:
    return name in predictions and predictions[name].seconds <= 1.01 * least
