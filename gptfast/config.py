"""The configurations of a model and of a training run: flat, frozen, checked when they are made.

Also the names and shapes of the parameters that a model of a configuration has.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from gptfast import checks

PRESETS = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}


MAX_SIZE = 2**31 - 1
"""The most tokens, positions or channels of a model. A larger number is a typing error, which
torch would follow until it runs out of memory."""
FINETUNING_LR = 3e-4
"""The peak learning rate of `gptfast train --init`. At the rates that suit random weights, a
pretrained model forgets in 20 steps what it knew."""


def _require(valid: bool, message: str) -> None:
    if not valid:
        raise ValueError(message)


def _check_types(config: Any) -> None:
    """Raise ValueError for the first field whose value is not of its type."""
    for name, hint in get_type_hints(type(config)).items():
        checks.field(name, getattr(config, name), hint)


def to_toml(values: Mapping[str, Any]) -> str:
    """Return a flat configuration as TOML. TOML has no null: None is written as "none"."""
    import tomli_w

    for name, value in values.items():
        if re.search("[\ud800-\udfff]", str(value)):
            raise ValueError(f"{name} is not UTF-8 text: {value!r}")
    return tomli_w.dumps({name: "none" if x is None else x for name, x in values.items()})


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2 (Radford et al., 2019). The defaults are the 124M model."""

    vocab_size: int = 50257
    """Number of tokens in the vocabulary; `gptfast train` raises it to that of the tokenizer."""
    block_size: int = 1024
    """Context length: the largest number of tokens that the model sees."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Number of attention heads per block; n_embd must be divisible by it."""
    n_embd: int = 768
    """Number of channels: the width of embeddings and residual stream."""
    dropout: float = 0.0
    """Dropout probability of embeddings, attention and residual branches, from 0 to below 1."""
    qkv_bias: bool = True
    """Give the projection to queries, keys and values a bias."""
    tie_weights: bool = True
    """Use the weights of the token embedding for the output head too."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            limit = 10**4 if name == "n_layer" else MAX_SIZE
            checks.integer(name, getattr(self, name), 1, limit)
        _check_types(self)
        _require(
            self.n_embd % self.n_head == 0,
            f"n_embd must be divisible by n_head, got n_embd={self.n_embd}, n_head={self.n_head}",
        )
        _require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout}")

    @classmethod
    def preset(cls, name: str, **overrides: object) -> "GPTConfig":
        """Return one of OpenAI's sizes: gpt2, gpt2-medium, gpt2-large or gpt2-xl.

        Raises ValueError for another name.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
        values: dict[str, Any] = {**PRESETS[name], **overrides}
        return cls(**values)


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. The run ends after max_steps steps or after epochs epochs."""

    out: str = "runs/latest"
    """The run directory, with checkpoints, metrics, text samples and a picture of the losses."""
    max_steps: int | None = None
    """Total number of optimizer steps (default: from --epochs)."""
    epochs: int | None = None
    """Number of passes over the training data, instead of max_steps (default: 5)."""
    accumulation_steps: int = 1
    """Number of batches per optimizer step; gradients are averaged over all their tokens."""
    lr: float = 1e-3
    """Peak learning rate, reached after the warm-up. A model that has learnt already, such as that
    of --init, wants less: 3e-4 (FINETUNING_LR)."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "exponential"] = "cosine"
    """How the learning rate changes after the warm-up. cosine and linear: it falls to min_lr.
    constant: it stays. wsd (warm-up, stable, decay): it falls in the last decay_steps only.
    exponential: it rises from min_lr to lr, for a learning-rate range test."""
    min_lr: float | None = None
    """Learning rate at the end of the decay. If only lr is given, it is lr / 10."""
    warmup_steps: int | None = None
    """Number of steps of linear warm-up (default: 5% of the run)."""
    decay_steps: int | None = None
    """Number of steps of decay at the end of schedule wsd (default: 20% of the run)."""
    weight_decay: float = 0.1
    """AdamW's weight decay of matrices and embeddings; biases and norms have none."""
    beta1: float = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: float = 0.95
    """AdamW's decay rate of the second moment."""
    max_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to this norm."""
    freeze: tuple[str, ...] = ()
    """Names or patterns of parameters not to train, for example wte.* h.0.* 'h.*.attn.*'."""
    lora_rank: int | None = None
    """Train an adapter of this rank (LoRA) instead of the weights, which stay as they are. 8 is
    usual. Checkpoints hold the adapter alone, as peft writes it."""
    lora_alpha: float = 16.0
    """The adapter's product is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Dropout probability of the adapter's input, from 0 to below 1."""
    lora_targets: tuple[str, ...] = ("c_attn", "c_proj")
    """The layers that get an adapter: c_attn, c_fc, c_proj (attention's and the perceptron's), or
    one of the last two as attn.c_proj and mlp.c_proj."""
    lora_base_dtype: Literal["int8"] | None = None
    """Keep the frozen weights of the blocks' layers in int8, with a scale for each output: a
    quarter of their memory in fp32. They are rounded as they are read (default: kept as they
    are)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Data type of matrix products and kernels, by autocast. Parameters are always fp32."""
    matmul_precision: Literal["highest", "high", "medium"] | None = None
    """How exact fp32 products are, in the words of torch.set_float32_matmul_precision (default: as
    PyTorch is set, which is highest). high and medium may be faster: with Intel's matrix engine
    (AMX) they add three products of bf16 parts, or one, and on a GPU they take TF32."""
    activation_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass. This saves memory and takes a
    third more time."""
    skip_below: float = 0.0
    """Skip entries of the logits' gradient that are at most this fraction of their row's share of
    the loss. This saves time late in training. 6e-8 skips only what fp32 would round away."""
    compile: bool = False
    """Compile the forward and backward pass with torch.compile."""
    cuda_graph: bool = True
    """On a GPU, replay each step as one CUDA graph, which spares the host the launches of its
    kernels. Steps run without it under compile, under activation_checkpointing with dropout, and
    where batches have another shape."""
    eval_interval: int = 100
    """Number of steps between evaluations of training and validation loss."""
    eval_batches: int | None = None
    """Number of batches per evaluation (default: all of the validation data)."""
    early_stopping: int | None = None
    """End the run after this many evaluations in a row without a lower validation loss (default:
    never)."""
    log_interval: int = 10
    """Number of steps between log lines, which also go to metrics.jsonl."""
    checkpoint_interval: int | None = None
    """Number of steps between checkpoints (default: eval_interval). The last step is always
    saved."""
    keep: int = 2
    """Number of latest checkpoints to keep."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss, as checkpoints/best."""
    save_optimizer: bool = True
    """Save what --resume needs. Without it, checkpoints are smaller and hold the model only."""
    async_save: bool = False
    """Go on with training while a checkpoint is written, from a copy in main memory that takes as
    much as weights and optimizer state together. An error of the disk ends the run at the next
    step."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do if a loss or gradient norm is not finite. stop: save a checkpoint and end the run.
    skip: continue with the next step. The weights do not change in either case."""
    skip_zscore: float | None = None
    """Skip steps whose loss or gradient norm is this many standard deviations above the mean of the
    128 steps before, for example 6 (default: skip none)."""
    sample_prompt: str = "This is"
    """The prompt of the text sample at the end of each epoch."""
    sample_tokens: int = 120
    """Number of tokens per text sample; 0 for no samples."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, to tensorboard/ in the run directory."""
    profile: bool = False
    """Write a profile of three steps to trace.json, for ui.perfetto.dev or chrome://tracing."""
    seed: int = 0
    """Seed of the initial weights, the order of the data and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    parallel: Literal["ddp", "fsdp", "hsdp"] | None = None
    """How the processes that torchrun starts share the work (default: ddp). Each computes some rows
    of each batch. ddp: each has the whole model. fsdp: each keeps a part of the weights and of the
    optimizer's state. hsdp: fsdp in several groups of processes.
    docs/distributed.md."""
    replicas: int | None = None
    """Number of groups of processes in hsdp, each of which has the whole model in parts (default:
    2)."""
    dist_timeout: float = 60.0
    """Seconds of silence after which the processes of a run give up one of them."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.out != "", "out must name a directory, got ''")
        _require(
            self.max_steps is None or self.epochs is None,
            f"give max_steps or epochs, not both: got {self.max_steps} and {self.epochs}",
        )
        _require(
            self.replicas is None or self.parallel == "hsdp",
            f"replicas is for parallel hsdp, got parallel {self.parallel}",
        )
        _require(
            self.matmul_precision is None or self.precision == "fp32",
            f"matmul_precision {self.matmul_precision} is for precision fp32, and precision "
            f"{self.precision} multiplies in bf16: leave one out",
        )
        optional = ("max_steps", "epochs", "eval_batches", "checkpoint_interval", "replicas")
        for name in (*optional, "early_stopping", "decay_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be >= 1, got {value}")
        for name in ("eval_interval", "log_interval", "keep", "accumulation_steps"):
            _require(getattr(self, name) >= 1, f"{name} must be >= 1, got {getattr(self, name)}")
        _require(
            self.lr > 0 and math.isfinite(self.lr), f"lr must be a finite number > 0, got {self.lr}"
        )
        for name in ("min_lr", "warmup_steps", "weight_decay", "sample_tokens", "seed"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"{name} must be >= 0, got {value}")
            _require(value != math.inf, f"{name} must be finite, got {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0.0 <= value < 1.0, f"{name} must be in [0, 1), got {value}")
        _require(
            0.0 <= self.skip_below < 1.0, f"skip_below must be in [0, 1), got {self.skip_below}"
        )
        _require(
            2 <= self.dist_timeout < math.inf,
            f"dist_timeout must be at least 2 (seconds), got {self.dist_timeout}",
        )
        self._check_adapter()
        _require(self.max_norm > 0, f"max_norm must be > 0, got {self.max_norm}")
        _require(
            self.schedule != "exponential" or self.min_lr != 0,
            "schedule exponential rises from min_lr, which must be > 0, got 0",
        )
        _require(
            self.skip_zscore is None or self.skip_zscore > 0,
            f"skip_zscore must be > 0, got {self.skip_zscore}",
        )

    def _check_adapter(self) -> None:
        rank, alpha, dropout = self.lora_rank, self.lora_alpha, self.lora_dropout
        _require(rank is None or rank >= 1, f"lora_rank must be at least 1, got {rank}")
        _require(0 < alpha < math.inf, f"lora_alpha must be a finite number > 0, got {alpha}")
        _require(0.0 <= dropout < 1.0, f"lora_dropout must be in [0, 1), got {dropout}")
        _require(bool(self.lora_targets), "lora_targets must name at least one layer")
        base = self.lora_base_dtype
        _require(
            base is None or rank is not None,
            f"lora_base_dtype {base} is for the base of an adapter: give lora_rank too, or leave "
            "it out",
        )
        _require(
            base is None or not self.compile,
            f"lora_base_dtype {base} is not for compile, which keeps wide copies of the weights: "
            "leave one of the two out",
        )


def parameter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of GPT's parameters by name, in the model's order.

    Matrices are (out, in). A tied head is no parameter of its own.
    """
    C = config.n_embd
    block = {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (4 * C, C),
        "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (C, 4 * C),
        "mlp.c_proj.bias": (C,),
    }
    if not config.qkv_bias:
        del block["attn.c_attn.bias"]
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, C),
        "wpe.weight": (config.block_size, C),
    }
    for i in range(config.n_layer):
        shapes |= {f"h.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    return shapes if config.tie_weights else {**shapes, "lm_head.weight": (config.vocab_size, C)}
