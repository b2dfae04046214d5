"""Weights by their meaning: wrapped and respelled names, heads of other tasks, what a file states.

Each test varies one kind of file that people bring; the expected model is always the one that was
written. The book's, nanoGPT's and transformers' plain files are in test_weights.py.
"""

import argparse
import dataclasses
import enum
import json
import logging
from collections import defaultdict, deque
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from helpers import differing, parameters, random_model
from safetensors.torch import save_file
from torch import Tensor

from gptfast import GPT
from gptfast.weights.lazy_tensor import CheckpointError
from gptfast.weights.pretrained import hf_tensors

State = dict[str, Tensor]


def model_of(**changes: Any) -> GPT:
    return random_model(std=0.1, **{"n_embd": 128, "n_head": 2, **changes})


def plain(model: GPT) -> State:
    """Return transformers' state dictionary of a model."""
    return {name: t.clone() for name, t in hf_tensors(model.config, model.state_dict()).items()}


def loaded(content: Any, tmp_path: Path, **options: Any) -> GPT:
    torch.save(content, tmp_path / "m.pt")
    return GPT.from_pretrained(tmp_path / "m.pt", **options)


def assert_loads(content: Any, model: GPT, tmp_path: Path) -> None:
    found = loaded(content, tmp_path)
    assert dataclasses.replace(found.config, dropout=0.0) == model.config
    assert differing(parameters(found), parameters(model)) == []


WRAPPERS = [
    "model.",
    "_module.",
    "module.",
    "_orig_mod.",
    "gpt2.",
    "transformer.",
    "base_model.model.",
    "pretrained_model.",
    "module._orig_mod.",
    "_forward_module.model.gpt2.",
    "my_lightning_module.net.",
]


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_a_prefix_before_every_name(prefix: str, tmp_path: Path) -> None:
    model = model_of()
    state = {prefix + name: t for name, t in plain(model).items()}
    assert_loads(state, model, tmp_path)
    assert_loads({"state_dict": state, "epoch": 3}, model, tmp_path)


@pytest.mark.parametrize(
    "inner", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"]
)
def test_a_wrapper_inside_a_name(inner: str, tmp_path: Path) -> None:
    """FSDP and activation checkpointing wrap each block; torch.compile may wrap a part of it."""
    model = model_of()
    state = {}
    for name, t in plain(model).items():
        part = name.replace(".h.0.", f".h.0.{inner}.").replace(".attn.", f".attn.{inner}.{inner}.")
        state[f"{inner}.{part}"] = t
    assert_loads(state, model, tmp_path)


@pytest.mark.parametrize("head", ["lm_head", "transformer.lm_head", "head", "output", "out_head"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_head_under_its_aliases(head: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(tie_weights=tied)
    state = plain(model)
    state[f"{head}.weight"] = state.pop("lm_head.weight", state["transformer.wte.weight"])
    state[f"{head}.bias"] = torch.zeros(61)
    assert_loads(state, model, tmp_path)
    state[f"{head}.bias"] += 1
    with pytest.raises(CheckpointError, match="its head has a bias"):
        loaded(state, tmp_path)


@pytest.mark.parametrize("config", [True, False], ids=["config.json", "alone"])
def test_a_tied_weight_under_the_heads_name_alone(config: bool, tmp_path: Path) -> None:
    model = model_of()
    model.save_pretrained(tmp_path)
    state = plain(model)
    state["lm_head.weight"] = state.pop("transformer.wte.weight")
    save_file(state, tmp_path / "model.safetensors")
    if not config:
        (tmp_path / "config.json").unlink()
    found = GPT.from_pretrained(tmp_path / "model.safetensors")
    assert differing(parameters(found), parameters(model)) == []


def test_two_names_of_one_tensor(tmp_path: Path) -> None:
    """The same values twice are one tensor; other values are an error that names both."""
    model = model_of()
    state = plain(model)
    twice = state | {name.replace("transformer.", "module."): t for name, t in state.items()}
    assert_loads(twice, model, tmp_path)
    twice["module.h.1.ln_1.bias"] = twice["module.h.1.ln_1.bias"] + 1
    with pytest.raises(CheckpointError, match="'transformer.h.1.ln_1.bias' and 'module.h.1.ln_1"):
        loaded(twice, tmp_path)


def test_two_models_in_a_file(tmp_path: Path) -> None:
    state = plain(model_of())
    both = {f"{who}.{name}": t for who in ("policy", "reference") for name, t in state.items()}
    with pytest.raises(CheckpointError, match="several models, under 'policy.', 'reference.'"):
        loaded(both, tmp_path)
    with pytest.raises(CheckpointError, match="named tensors under student, teacher"):
        loaded({"student": state, "teacher": dict(state)}, tmp_path)


def book_state(model: GPT, packed: bool, norms: bool) -> State:
    """Return a state dictionary of the book's later chapters: packed qkv, nn.LayerNorm."""
    state: State = {}
    w, b = ("weight", "bias") if norms else ("scale", "shift")
    names = {
        "ln_1": "norm1",
        "ln_2": "norm2",
        "mlp.c_fc": "ff.layers.0",
        "mlp.c_proj": "ff.layers.2",
    }
    names["attn.c_proj"] = "att.proj" if packed else "att.out_proj"
    names |= {"wte": "tok_emb", "wpe": "pos_emb", "ln_f": "final_norm"}
    for name, t in model.state_dict().items():
        path, leaf = name.rpartition(".")[0::2]
        block = (
            ".".join(path.split(".")[:2]).replace("h.", "trf_blocks.") if path[:2] == "h." else ""
        )
        rest = path.split(".", 2)[2] if block else path
        if rest == "attn.c_attn" and packed:
            state[f"{block}.att.qkv.{leaf}"] = t
        elif rest == "attn.c_attn":
            for part, x in zip(("query", "key", "value"), t.chunk(3), strict=True):
                state[f"{block}.att.W_{part}.{leaf}"] = x.clone()
        else:
            is_norm = rest.startswith("ln")
            own = {"weight": w, "bias": b}[leaf] if is_norm else leaf
            state[f"{block}.{names[rest]}.{own}".lstrip(".")] = t
    return state | {"out_head.weight": state["tok_emb.weight"]}


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("norms", [False, True], ids=["scale-shift", "nn.LayerNorm"])
@pytest.mark.parametrize("packed", [False, True], ids=["separate", "packed"])
def test_the_books_spellings(packed: bool, norms: bool, prefix: str, tmp_path: Path) -> None:
    model = model_of()
    state = book_state(model, packed, norms)
    assert_loads({prefix + name: t for name, t in state.items()}, model, tmp_path)
    missing = "trf_blocks.1.att." + ("qkv.weight" if packed else "W_key.weight")
    del state[missing]
    with pytest.raises(CheckpointError, match=f"no tensor '{prefix}{missing}'"):
        loaded({prefix + name: t for name, t in state.items()}, tmp_path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v_head.summary.weight", (1, 128)),
        ("score.weight", (3, 128)),
        ("multiple_choice_head.summary.weight", (1, 128)),
        ("classifier.weight", (5, 128)),
        ("qa_outputs.bias", (2,)),
        ("transformer.my_value_head.0.weight", (7, 128)),
    ],
)
def test_a_head_of_another_task(
    name: str, shape: tuple[int, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of()
    assert_loads(plain(model) | {name: torch.ones(shape)}, model, tmp_path)
    assert f"left out what belongs to another task: {name}" in caplog.text
    book = book_state(model, False, False) | {"out_head.weight": torch.ones(2, 128)}
    caplog.clear()
    assert_loads(book | {"out_head.bias": torch.ones(2)}, model, tmp_path)
    assert "left out what belongs to another task: out_head.weight, out_head.bias" in caplog.text


@pytest.mark.parametrize(
    "missing", ["h.1.ln_1.weight", "h.0.mlp.c_fc.bias", "wpe.weight", "ln_f.weight", "ln_f.bias"]
)
@pytest.mark.parametrize("prefix", ["transformer.", "_orig_mod.transformer.", "a.b."])
def test_what_is_missing_is_named_as_the_file_names_it(
    missing: str, prefix: str, tmp_path: Path
) -> None:
    state = {prefix + name.removeprefix("transformer."): t for name, t in plain(model_of()).items()}
    del state[prefix + missing]
    with pytest.raises(CheckpointError, match=f"has no tensor '{prefix}{missing}'$"):
        loaded(state, tmp_path)


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"], "Llama"),
        (["gpt_neox.embed_in.weight", "gpt_neox.layers.0.attention.dense.weight"], "GPT-NeoX"),
        (["transformer.h.0.attn.attention.q_proj.weight", "transformer.wte.weight"], "GPT-Neo"),
        (["transformer.wte.weight", "transformer.h.0.attn.q_proj.weight"], "GPT-J"),
        (["bert.encoder.layer.0.attention.self.query.weight"], "BERT"),
        (["tokens_embed.weight", "h.0.attn.c_attn.weight"], "GPT-1"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "T5"),
        (["transformer.h.0.attn.c_q.weight", "transformer.wte.weight"], "nanochat"),
        (["model.decoder.embed_positions.weight"], "OPT"),
    ],
)
def test_another_architecture(names: list[str], family: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"is another architecture: {family}"):
        loaded({name: torch.ones(4, 4) for name in names}, tmp_path)


def test_no_other_architecture_is_claimed(tmp_path: Path) -> None:
    for state in ({"conv1.weight": torch.ones(2)}, plain(model_of()) | {"h.0.x": torch.ones(2)}):
        with pytest.raises(CheckpointError) as caught:
            loaded(state, tmp_path)
        assert "architecture" not in str(caught.value).removeprefix(str(tmp_path))
    adapted = {"base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match="adapter of peft that is not merged"):
        loaded(plain(model_of()) | adapted, tmp_path)


# What a file states beside its tensors


@dataclasses.dataclass
class ModelConfig:
    n_head: int = 4
    n_layer: int = 2
    block_size: int = 16


@dataclasses.dataclass
class Slotted:
    __slots__ = ("num_heads",)
    num_heads: int


class Settings(dict):  # as yacs, easydict and others make them
    pass


class Kind(enum.Enum):
    LARGE = 1


STATED = {
    "dict": ("config", {"n_head": 4}),
    "dataclass": ("config", ModelConfig()),
    "slots": ("hparams", Slotted(4)),
    "namespace": ("args", argparse.Namespace(num_attention_heads=4, lr=0.1)),
    "dict-subclass": ("cfg", Settings(n_heads=4)),
    "defaultdict": ("model_config", defaultdict(int, n_head=4)),
    "lightning": ("hyper_parameters", {"config": ModelConfig(), "lr": 1e-3}),
    "numpy": ("hparams", {"n_head": np.int64(4)}),
    "nanogpt": ("model_args", {"n_head": 4, "n_layer": 2, "bias": True}),
    "book": ("GPT_CONFIG_124M", {"n_heads": 4, "emb_dim": 128, "drop_rate": 0.1}),
    "text": ("args", {"n_head": "4"}),
    "json": ("config", '{"n_head": 4}'),
    "top": ("n_head", 4),
}


@pytest.mark.parametrize("kind", STATED)
def test_a_stated_number_of_heads_is_read(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, (place, value) = model_of(n_head=4), STATED[kind]
    assert_loads({"model": plain(model), place: value}, model, tmp_path)
    assert "does not say" not in caplog.text
    with pytest.raises(CheckpointError, match="has 4 heads, not n_head=2"):
        GPT.from_pretrained(tmp_path / "m.pt", n_head=2)


@pytest.mark.parametrize("metadata", [{"n_head": "4"}, {"config": json.dumps({"n_heads": 4})}])
def test_a_number_of_heads_in_the_metadata(metadata: dict[str, str], tmp_path: Path) -> None:
    model = model_of(n_head=4)
    save_file(plain(model), tmp_path / "m.safetensors", metadata=metadata)
    assert GPT.from_pretrained(tmp_path / "m.safetensors").config == model.config


def test_an_assumed_number_of_heads_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert_loads(plain(model_of()), model_of(), tmp_path)
    assert "does not say how many heads it has: 2 are assumed" in caplog.text
    caplog.clear()
    GPT.from_pretrained(tmp_path / "m.pt", n_head=4)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        (
            {"config": {"n_head": 4}, "hparams": {"n_heads": 2}},
            "config.n_head is 4, but hparams.n_heads is 2",
        ),
        ({"config": {"n_layer": 3}}, "config.n_layer is 3, but its tensors have n_layer 2"),
        ({"config": {"context_length": 99}}, "context_length is 99, but .* block_size 16"),
        ({"args": argparse.Namespace(vocab_size=50257)}, "args.vocab_size is 50257, but"),
        ({"hparams": {"emb_dim": 64}}, "emb_dim is 64, but its tensors have n_embd 128"),
        ({"config": {"n_head": 3}}, "n_embd must be divisible by n_head"),
        ({"config": {"activation": "relu"}}, "config.activation is 'relu', but"),
        ({"config": {"activation_function": "gelu"}}, "is 'gelu', but gptfast's GPT needs 'gelu_n"),
        ({"config": {"layer_norm_epsilon": 1e-12}}, "layer_norm_epsilon is 1e-12, but"),
        ({"config": {"bias": False}}, "config.bias is False, but 'transformer.h.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_file_that_contradicts_itself(
    stated: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        loaded({"model": plain(model_of()), **stated}, tmp_path)


def test_what_else_is_used_or_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of()
    other = {"tokenizer_config": {"vocab_size": 9}, "args": {"data": {"block_size": 9}}}
    found = loaded({"model": plain(model), "config": {"drop_rate": 0.2}, **other}, tmp_path)
    assert found.config.dropout == 0.2
    without = {name: t for name, t in plain(model).items() if not name.endswith("bias")}
    found = loaded(without, tmp_path)
    assert not any(p.any() for name, p in found.named_parameters() if name.endswith("bias"))
    assert "it has no biases: zeros are taken" in caplog.text
    caplog.clear()
    args = {"n_head": 2, "bias": False}
    loaded({"model": without, "model_args": args}, tmp_path)
    assert "GPT-2's GELU, by tanh, is taken" in caplog.text and "no biases" not in caplog.text


# Objects beside the tensors


def test_inert_objects_beside_the_tensors(tmp_path: Path) -> None:
    """A pickle may hold any object: it is read as data, and no class of the file is imported."""
    model = model_of()
    beside = {
        "config": ModelConfig(2),
        "kind": Kind.LARGE,
        "by_kind": {Kind.LARGE: {Kind.LARGE}},
        "out_dir": PurePosixPath("/tmp"),
        "losses": np.arange(5.0),
        "best": np.float32(3.5),
        "state": np.random.default_rng(0).bit_generator.state,
        "rng": torch.get_rng_state(),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:0"),
        "recent": deque([1.0, 2.0], maxlen=5),
        "counts": defaultdict(list, a=[1]),
        "range": range(3),
        "slice": slice(1, 2),
        "complex": 1j,
        "set": {1, 2},
        "large": 2**80,
        "bytes": b"abc",
        "types": [int, ModelConfig, np.float64],
        "tensor": torch.zeros(3, requires_grad=True),
    }
    assert_loads({"model": plain(model), **beside}, model, tmp_path)
    assert_loads({**beside, "model": {**plain(model), "extra": Kind.LARGE}}, model, tmp_path)


class Whole(torch.nn.Module):
    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.transformer, self.config = model, ModelConfig(4)


def test_a_module_that_was_saved_whole(tmp_path: Path) -> None:
    model = model_of(n_head=4)
    assert_loads(Whole(model), model, tmp_path)
    assert_loads({"model": Whole(model), "step": 1}, model, tmp_path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_views_and_dtypes_of_a_pickle(dtype: torch.dtype, legacy: bool, tmp_path: Path) -> None:
    """Transposed, sliced and shared tensors are read as they are."""
    model = model_of().to(dtype)
    state = {name: p.detach() for name, p in model.state_dict().items()}
    both = torch.stack([state["h.0.ln_1.weight"], state["h.0.ln_1.bias"]], 1)  # strided
    state["h.0.ln_1.weight"], state["h.0.ln_1.bias"] = both[:, 0], both[:, 1]
    state["wpe.weight"] = state["wpe.weight"].t().contiguous().t()
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    found = GPT.from_pretrained(tmp_path / "m.pt")
    assert found.wte.weight.dtype == dtype
    assert differing(parameters(found), parameters(model)) == []


# A vocabulary that grew


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_tokens_get_the_mean(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(tie_weights=tied).to(dtype)
    model.save_pretrained(tmp_path)
    grown = GPT.from_pretrained(tmp_path, resize_vocab=70)
    assert grown.config == dataclasses.replace(model.config, vocab_size=70)
    old, new = parameters(model), parameters(grown)
    for name in ("wte.weight", "lm_head.weight")[: 1 + (not tied)]:
        mean = old[name].float().mean(0).to(dtype)
        assert torch.equal(new[name][:61], old[name])
        assert torch.equal(new[name][61:], mean.expand(9, -1))
        new[name] = old[name]
    assert differing(new, old) == []
    assert GPT.from_pretrained(tmp_path, resize_vocab=61).config == model.config
    with pytest.raises(ValueError, match="61 tokens, and --resize-vocab only adds, got 60"):
        GPT.from_pretrained(tmp_path, resize_vocab=60)
