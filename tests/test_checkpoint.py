"""Checkpoints: round trips are exact, transformers opens them, and every damage is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    differing,
    parameters,
    random_ids,
    random_model,
)
from safetensors.torch import load_file, save_file
from seeds import shifted
from torch import Tensor

from gptfast import GPT, AdamW
from gptfast.cli.train_weights import load_weights
from gptfast.training.checkpoint import load_checkpoint, save_checkpoint
from gptfast.weights.checkpoint import checkpoints, find_checkpoint, read_state

FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def trained(seed: int = 0, **changes: Any) -> tuple[GPT, AdamW]:
    """Return a random model after two optimizer steps."""
    model = random_model(seed, **changes)
    optimizer = AdamW(model.parameters(), lr=1e-2, max_norm=1.0)
    for step in range(2):
        optimizer.zero_grad()
        model(random_ids(2, 9, seed=step), random_ids(2, 9, seed=step + 5)).backward()
        optimizer.step()
    return model, optimizer


def moments(model: GPT, optimizer: AdamW) -> dict[str, Tensor]:
    return {
        f"{name}.{field}": value
        for name, p in model.named_parameters()
        for field, value in optimizer.state[p].items()
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Save a checkpoint of `trained()` at step 2."""
    return save_checkpoint(tmp_path / "run", *trained(), {"step": 2, "tokens": 36}, keep=2)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_weights": False}, {"qkv_bias": False}, {"n_embd": 30, "n_head": 3, "n_layer": 1}],
    ids=["tied", "untied", "no-qkv-bias", "odd"],
)
def test_round_trip_is_exact(changes: dict[str, Any], tmp_path: Path) -> None:
    model, optimizer = trained(**changes)
    torch.manual_seed(shifted(42))
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 2, "more": [1, "a"]}, keep=1)
    drawn = torch.rand(5)
    other, other_optimizer = trained(seed=1, **changes)
    assert differing(parameters(other), parameters(model))
    state = load_checkpoint(path, other, other_optimizer)
    assert (state["step"], state["more"]) == (2, [1, "a"])
    assert differing(parameters(other), parameters(model)) == []
    assert differing(moments(other, other_optimizer), moments(model, optimizer)) == []
    assert torch.equal(torch.rand(5), drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_save_pretrained_round_trip(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(dropout=0.25, tie_weights=False).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = GPT.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert differing(parameters(loaded), parameters(model)) == []
    assert all(p.requires_grad for p in loaded.parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES[:2]


def test_tied_weights_stay_tied(saved: Path) -> None:
    model = GPT.from_pretrained(saved)
    assert model.head_weight is model.wte.weight
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")


def test_save_pretrained_replaces_a_model(tmp_path: Path) -> None:
    random_model(0).save_pretrained(tmp_path)
    random_model(1, n_layer=1).save_pretrained(tmp_path)
    loaded, model = GPT.from_pretrained(tmp_path), random_model(1, n_layer=1)
    assert differing(parameters(loaded), parameters(model)) == []


def test_transformers_opens_a_checkpoint(saved: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs, report = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    idx = random_ids(2, 16)
    ours = GPT.from_pretrained(saved)
    torch.testing.assert_close(theirs.eval()(idx).logits, ours(idx), rtol=0, atol=1e-4)


def test_extra_tensors_of_old_files_are_ignored(tmp_path: Path) -> None:
    model = random_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    # Older writers left out the prefix, and saved each layer's causal mask and the tied head again.
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16) for i in range(2)}
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert differing(parameters(GPT.from_pretrained(tmp_path)), parameters(model)) == []


def test_keep_and_order(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step in (2, 10, 9, 100):
        save_checkpoint(tmp_path, model, optimizer, {"step": step}, keep=3)
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["step-00000009", "step-00000010", "step-00000100"]
    assert find_checkpoint(tmp_path) == checkpoints(tmp_path)[-1]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == names


def test_saving_a_step_again_replaces_it(saved: Path) -> None:
    model, optimizer = trained(seed=1)
    assert save_checkpoint(saved.parents[1], model, optimizer, {"step": 2}, keep=2) == saved
    assert differing(parameters(GPT.from_pretrained(saved)), parameters(model)) == []


def test_a_failed_save_leaves_the_old_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    before = {name: (saved / name).read_bytes() for name in FILES}
    model, optimizer = trained(seed=1)
    monkeypatch.setattr("gptfast.files.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(saved.parents[1], model, optimizer, {"step": 3}, keep=1)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert {name: (saved / name).read_bytes() for name in FILES} == before


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_a_flipped_bit_is_found_and_its_file_named(saved: Path, file: str, share: float) -> None:
    content = bytearray((saved / file).read_bytes())
    content[int(share * len(content))] ^= 1
    (saved / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file}.* (is damaged|has checkpoint format)"):
        load_checkpoint(saved, *trained())
    if file != "optimizer.safetensors":
        with pytest.raises(ValueError, match=f"{file}.* (is damaged|has checkpoint format)"):
            GPT.from_pretrained(saved)


def test_every_byte_of_the_state_counts(saved: Path) -> None:
    content = (saved / "state.json").read_bytes()
    for i in range(0, len(content), 29):
        damaged = bytearray(content)
        damaged[i] ^= 2
        (saved / "state.json").write_bytes(damaged)
        with pytest.raises(ValueError, match="state.json"):
            read_state(saved)
    (saved / "state.json").write_bytes(content)
    assert read_state(saved)["step"] == 2


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "config.json"])
def test_a_missing_file_is_named(saved: Path, file: str) -> None:
    (saved / file).unlink()
    with pytest.raises(ValueError, match=f"{file}"):
        load_checkpoint(saved, *trained())


def test_weights_alone_cannot_be_resumed(saved: Path) -> None:
    (saved / "state.json").unlink()
    assert GPT.from_pretrained(saved).config.n_embd == 24
    with pytest.raises(ValueError, match="cannot be resumed: it has no state.json"):
        load_checkpoint(saved, *trained())


def test_another_format_version(saved: Path) -> None:
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps(state | {"format": 99}))
    with pytest.raises(ValueError, match="state.json has checkpoint format 99, expected 2"):
        read_state(saved)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 62),
        ("block_size", 8),
        ("n_layer", 3),
        ("n_head", 4),
        ("n_embd", 32),
        ("tie_weights", False),
        ("qkv_bias", False),
    ],
)
def test_another_architecture(saved: Path, name: str, value: int) -> None:
    model = random_model(**{name: value})
    before = parameters(model)
    with pytest.raises(ValueError, match=f"another shape: its {name} is .*, not {value}"):
        load_weights(model, saved)
    assert differing(parameters(model), before) == []


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "config-only", "weights-only"])
def test_no_checkpoint(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model"
    if kind == "file":
        path.write_text("text")
    elif kind != "missing":
        path.mkdir()
    if kind.endswith("-only"):
        random_model().save_pretrained(path)
        (path / FILES[kind == "config-only"]).unlink()
    with pytest.raises(ValueError, match="model is not a checkpoint"):
        GPT.from_pretrained(path)


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value != "delete"}
    (path / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "type 'llama', not GPT-2's architecture"),
        ({"model_type": None}, "type None"),
        ({"n_embd": "delete"}, "has no 'n_embd'"),
        ({"n_embd": None}, "n_embd"),
        ({"n_layer": 2.0}, "n_layer must be an integer from 1 to 10000, got 2.0"),
        ({"n_layer": "2"}, "n_layer"),
        ({"resid_pdrop": None}, r"config.json: dropout must be a number, got None"),
        ({"n_head": 5}, "divisible by n_head"),
        ({"n_inner": 50}, "n_inner is 50"),
        ({"activation_function": "relu"}, "activation_function is 'relu', .*'gelu_new'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"vocab_size": 60}, "wte.weight has shape .*61, 24.*needs .*60, 24"),
        ({"n_layer": 3}, "no tensor 'transformer.h.2.ln_1.weight'"),
        ({"n_layer": 1}, "does not know: 'transformer.h.1.attn.c_attn.bias'"),
        ({"tie_word_embeddings": False}, "no tensor 'lm_head.weight'"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if type(value) is dict else "",
)
def test_config_that_does_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[1]", "not a JSON object"),
        ("\xff", "damaged"),
        ("[" * 10**5, "damaged"),
        ("9" * 5000, "damaged"),
    ],
    ids=["empty", "open", "list", "not-utf-8", "deep", "digits"],
)
def test_config_that_is_no_json(text: str, message: str, tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"config.json is .*{message}"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_truncated_safetensors(tmp_path: Path, share: float) -> None:
    random_model().save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        GPT.from_pretrained(tmp_path)


def test_missing_tensor(tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no tensor 'transformer.h.1.mlp.c_fc.bias'"):
        GPT.from_pretrained(tmp_path)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A pickle with the name of the weights file is refused, not run."""
    random_model().save_pretrained(tmp_path)
    torch.save({"wte.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        GPT.from_pretrained(tmp_path)


def test_a_moved_run_is_found(saved: Path, tmp_path: Path) -> None:
    shutil.move(saved.parents[1], tmp_path / "elsewhere")
    assert find_checkpoint(tmp_path / "elsewhere").name == saved.name
    load_checkpoint(find_checkpoint(tmp_path / "elsewhere"), *trained())
