"""ONNX, written with torch.export: one graph for a prompt and for each token after it.

Inputs, as optimum and onnxruntime name them: input_ids (B, T), attention_mask (B, P + T) and
position_ids (B, T), int64; past_key_values.N.key and .value (B, H, P, D) of each block. Outputs:
logits (B, T, V), present.N.key and .value (B, H, P + T, D). B, T and P are free; P is 0 at first.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast.config import GPTConfig
from gptfast.installed import DISTRIBUTION, has_library

DATA = ".data"
"""What follows the name of the file in that of the file with its weights."""
_MAX_FILE_BYTES = 2**31 - 2**26
"""Of weights in the file itself, which protobuf limits to 2 GiB; more go to a file beside it."""


def need_libraries(what: str) -> None:
    """Raise ValueError if a library that writes ONNX is missing. what: what needs it."""
    for name in ("onnx", "onnxscript"):
        if not has_library(name):
            raise ValueError(f"{what} needs {name}: pip install '{DISTRIBUTION}[onnx]'")


class _Block(nn.Module):
    """One block in plain PyTorch, with the names of GPT's parameters."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(C, 3 * C, bias=config.qkv_bias), "c_proj": nn.Linear(C, C)}
        )
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})

    def forward(
        self, x: Tensor, past: tuple[Tensor, Tensor], visible: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return x (B, T, C) after the block, and keys and values (B, H, P + T, D)."""
        B, T, C = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # (B, H, T, D)
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        # Scaled first: fp16 ends at 65,504.
        scores = q * (C // self.n_head) ** -0.5 @ k.transpose(2, 3)  # (B, H, T, P + T)
        # Not -inf: a row of padding sees nothing at all, and shall not be NaN.
        scores = scores.float().masked_fill(~visible, torch.finfo(torch.float32).min)
        out = scores.softmax(-1).to(x.dtype) @ v
        x = x + self.attn["c_proj"](out.transpose(1, 2).reshape(B, T, C))
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](hidden), k, v


class _Decoder(nn.Module):
    """GPT in plain PyTorch, with the inputs and outputs of the graph."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(_Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = None
        if not config.tie_weights:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        T, n_keys = input_ids.shape[1], past_key_values[0][0].shape[2] + input_ids.shape[1]
        time = torch.arange(n_keys, dtype=torch.int64, device=input_ids.device)
        causal = time <= time[n_keys - T :, None]  # (T, P + T)
        visible = causal & (attention_mask[:, None, None, :] != 0)  # (B, 1, T, P + T)
        x = self.wte(input_ids) + self.wpe(position_ids)
        present = []
        for block, past in zip(self.h, past_key_values, strict=True):
            x, k, v = block(x, past, visible)
            present.append((k, v))
        x = self.ln_f(x)
        head = self.wte.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(x, head), present


def _decoder(config: GPTConfig, state: Mapping[str, Tensor]) -> _Decoder:
    """Return the decoder with GPT's own tensors, on the CPU."""
    with torch.device("meta"):
        decoder = _Decoder(config).eval()
    tensors = {name: tensor.detach().cpu() for name, tensor in state.items()}
    decoder.load_state_dict(tensors, assign=True)
    return decoder.requires_grad_(False)


def _names(config: GPTConfig, kind: str) -> list[str]:
    return [f"{kind}.{i}.{part}" for i in range(config.n_layer) for part in ("key", "value")]


def _example(config: GPTConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return inputs of sizes that torch.export takes for free ones: none is 0 or 1, no two equal.

    Their values do not matter, but no tensor is there twice: it would be taken for one input.
    """
    B, T, P = 2, 3, 4
    shape = (B, config.n_head, P, config.n_embd // config.n_head)
    past = [
        (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype))
        for _ in range(config.n_layer)
    ]
    return {
        "input_ids": torch.zeros(B, T, dtype=torch.int64),
        "attention_mask": torch.ones(B, P + T, dtype=torch.int64),
        "position_ids": torch.zeros(B, T, dtype=torch.int64),
        "past_key_values": past,
    }


def write(config: GPTConfig, state: Mapping[str, Tensor], directory: Path, name: str) -> None:
    """Write GPT's state dictionary as ONNX, in its dtype, into a directory.

    Beyond 2 GiB the weights go to a file beside it, named with DATA. Raises ValueError for bf16,
    which onnxruntime does not compute with on a CPU, and if a library is missing.
    """
    need_libraries("writing ONNX")
    dtype = state["wte.weight"].dtype
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"ONNX is written in fp32 or fp16, but the model is {dtype}: give --dtype")
    # Text for a free size: torch.export finds out which of them are the same.
    past = {0: "batch", 2: "past"}
    shapes = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "past_and_sequence"},
        "position_ids": {0: "batch", 1: "sequence"},
        "past_key_values": [(past, past)] * config.n_layer,
    }
    inputs = _example(config, dtype)
    decoder = _decoder(config, state)
    with _quiet(), torch.no_grad():
        program: Any = torch.onnx.export(
            decoder,
            (),
            kwargs=inputs,
            dynamo=True,
            verbose=False,
            dynamic_shapes=shapes,
            input_names=[*list(inputs)[:3], *_names(config, "past_key_values")],
            output_names=["logits", *_names(config, "present")],
        )
        for node in program.model.graph:  # where in which file of this machine each came from
            node.metadata_props.clear()
        nbytes = sum(tensor.nbytes for tensor in state.values())
        program.save(str(directory / name), external_data=nbytes > _MAX_FILE_BYTES)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch and onnxscript tell about themselves; errors still come."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
