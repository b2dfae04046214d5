"""The two configurations: what a model is, and how it is trained. Flat, frozen, checked once."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from gptfast.checks import convert, describe

PRESETS = {
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(what)


def _check_types(config: Any) -> None:
    """ValueError for the first field whose value is not of its type."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        try:
            convert(value, hint)
        except TypeError:
            raise ValueError(f"{name} must be {describe(hint)}, got {value!r:.100}") from None
        except OverflowError:
            raise ValueError(f"{name} must be below 2**63 in size, got {value!r:.100}") from None


def to_toml(values: Mapping[str, Any]) -> str:
    """A flat configuration as TOML, which has no null: None is written as "none"."""
    import tomli_w

    for name, value in values.items():
        if re.search("[\ud800-\udfff]", str(value)):
            raise ValueError(f"{name} is not UTF-8 text: {value!r}")
    return tomli_w.dumps({name: "none" if x is None else x for name, x in values.items()})


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2 (Radford et al., 2019). The defaults are the 124M model."""

    vocab_size: int = 50257
    """Number of token ids; `gptfast train` raises it to the tokenizer's."""
    block_size: int = 1024
    """Context length in tokens."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Attention heads per block; divides n_embd."""
    n_embd: int = 768
    """Width of the residual stream."""
    dropout: float = 0.0
    """Dropout probability on embeddings, attention and residual branches, in [0, 1)."""
    qkv_bias: bool = True
    """Whether the query, key and value projection has a bias."""
    tie_weights: bool = True
    """Whether the head shares the token embedding's weight."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            _require(
                type(value) is int and value >= 1, f"{name} must be an integer >= 1, got {value!r}"
            )
            # A typing error; torch would try, block by block, or overflow.
            limit = 10**4 if name == "n_layer" else 2**31 - 1
            _require(value <= limit, f"{name} must be at most {limit}, got {value}")
        _check_types(self)
        _require(
            self.n_embd % self.n_head == 0,
            f"n_embd must be divisible by n_head, got n_embd={self.n_embd}, n_head={self.n_head}",
        )
        _require(0.0 <= self.dropout < 1.0, f"dropout must be in [0, 1), got {self.dropout}")

    @classmethod
    def preset(cls, name: str, **overrides: object) -> "GPTConfig":
        """One of OpenAI's sizes: gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. One of max_steps and epochs ends the run."""

    out: str = "runs/latest"
    """Directory for checkpoints, metrics.jsonl, samples.txt and the loss plot."""
    max_steps: int | None = None
    """Optimizer steps in all."""
    epochs: int | None = None
    """Passes over the training data, where max_steps is not given (default 5)."""
    accumulation_steps: int = 1
    """Batches per optimizer step; their gradients are averaged over all tokens."""
    lr: float = 1e-3
    """Peak learning rate, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "exponential"] = "cosine"
    """How the rate goes on after the warm-up: down to min_lr (cosine, linear), not at all
    (constant), down in the last decay_steps only (wsd: warm-up, stable, decay), or up from min_lr
    to lr (exponential: a learning-rate range test)."""
    min_lr: float | None = None
    """Learning rate at the end of the decay (default lr / 10)."""
    warmup_steps: int | None = None
    """Steps of linear warm-up (default a twentieth of the run)."""
    decay_steps: int | None = None
    """Steps of decay at the end of schedule wsd (default a fifth of the run)."""
    weight_decay: float = 0.1
    """Decay of matrices and embeddings; biases and norms have none."""
    beta1: float = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: float = 0.95
    """AdamW's decay rate of the second moment."""
    max_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by name or pattern: wte.* h.0.* 'h.*.attn.*'."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products and kernels in bfloat16 by autocast, parameters in fp32."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward instead of keeping them: less memory,
    a third more time."""
    skip_below: float = 0.0
    """Leave out entries of the logits' gradient up to this times their row's share of the loss,
    saving products late in training; 6e-8 is what fp32 rounds to nothing beside a sure token."""
    compile: bool = False
    """Compile the training step's forward and backward with torch.compile."""
    eval_interval: int = 100
    """Steps between evaluations of training and validation loss."""
    eval_batches: int | None = None
    """Batches per evaluation (default all of the validation data)."""
    early_stopping: int | None = None
    """End the run after this many evaluations in a row without a lower validation loss."""
    log_interval: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_interval: int | None = None
    """Steps between checkpoints (default eval_interval); one is always written at the end."""
    keep: int = 2
    """How many of the latest checkpoints to keep."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss too, as checkpoints/best."""
    save_optimizer: bool = True
    """Save all that --resume needs; without, checkpoints hold the model only."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when a loss or gradient norm is not finite: save and stop, or pass the step over.
    The weights stay as they were either way."""
    skip_zscore: float | None = None
    """Pass over steps whose loss or gradient norm is this many standard deviations above the mean
    of the 128 steps before (6, say)."""
    sample_prompt: str = "This is"
    """What the text sample of each epoch starts with."""
    sample_tokens: int = 100
    """Tokens per text sample; 0 for none."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into tensorboard/ of the run."""
    profile: bool = False
    """Write trace.json, a profile of three steps, for ui.perfetto.dev or chrome://tracing."""
    seed: int = 0
    """Fixes initialisation, data order and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.out != "", "out must name a directory, got ''")
        _require(
            self.max_steps is None or self.epochs is None,
            f"give max_steps or epochs, not both: got {self.max_steps} and {self.epochs}",
        )
        optional = ("max_steps", "epochs", "eval_batches", "checkpoint_interval")
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
        _require(self.max_norm > 0, f"max_norm must be > 0, got {self.max_norm}")
        _require(
            self.schedule != "exponential" or self.min_lr != 0,
            "schedule exponential rises from min_lr, which must be > 0, got 0",
        )
        _require(
            self.skip_zscore is None or self.skip_zscore > 0,
            f"skip_zscore must be > 0, got {self.skip_zscore}",
        )


def parameter_names(config: GPTConfig) -> list[str]:
    """GPT's parameters in the order in which they are packed; c_attn.bias may be absent."""
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    modules = [f"h.{i}.{part}" for i in range(config.n_layer) for part in parts]
    names = ["wte.weight", "wpe.weight"]
    names += [f"{module}.{leaf}" for module in (*modules, "ln_f") for leaf in ("weight", "bias")]
    return names if config.tie_weights else [*names, "lm_head.weight"]
