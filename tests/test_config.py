"""Test the configurations: defaults, presets, and the values they refuse."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptfast import GPTConfig, TrainConfig


def test_defaults_are_the_124m_model() -> None:
    assert GPTConfig() == GPTConfig.preset("gpt2")
    assert dataclasses.astuple(GPTConfig()) == (50257, 1024, 12, 12, 768, 0.0, True, True)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gpt2-medium", (24, 16, 1024)),
        ("gpt2-large", (36, 20, 1280)),
        ("gpt2-xl", (48, 25, 1600)),
    ],
)
def test_preset_sizes(name: str, sizes: tuple[int, int, int]) -> None:
    config = GPTConfig.preset(name)
    assert (config.n_layer, config.n_head, config.n_embd) == sizes


def test_preset_takes_overrides() -> None:
    config = GPTConfig.preset("gpt2-medium", dropout=0.1, block_size=64, n_layer=3)
    assert (config.dropout, config.block_size, config.n_layer, config.n_embd) == (0.1, 64, 3, 1024)


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown preset 'gpt3'.*gpt2, gpt2-medium"):
        GPTConfig.preset("gpt3")


@pytest.mark.parametrize("name", ["vocab_size", "block_size", "n_layer", "n_head", "n_embd"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "2"], ids=repr)
def test_model_sizes_are_positive_integers(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer from 1 to .*, got {value!r}"):
        GPTConfig(**{name: value})


def test_n_embd_is_divisible_by_n_head() -> None:
    with pytest.raises(ValueError, match="divisible by n_head, got n_embd=10, n_head=3"):
        GPTConfig(n_embd=10, n_head=3)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, float("nan")])
def test_dropout_range(dropout: float) -> None:
    with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\), got {dropout}"):
        GPTConfig(dropout=dropout)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", 0),
        ("epochs", 0),
        ("eval_batches", 0),
        ("checkpoint_interval", -1),
        ("eval_interval", 0),
        ("log_interval", 0),
        ("keep", 0),
        ("lr", 0.0),
        ("lr", -1e-3),
        ("lr", float("inf")),
        ("lr", float("nan")),
        ("min_lr", -1e-5),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("weight_decay", float("nan")),
        ("sample_tokens", -1),
        ("seed", -1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("max_norm", 0.0),
        ("skip_below", 1.0),
        ("skip_below", -1e-9),
        ("max_norm", float("nan")),
        ("min_lr", float("inf")),
        ("weight_decay", float("inf")),
    ],
)
def test_train_config_refuses(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*got {value}"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [
        ("lr", "x", "must be a number, got 'x'"),
        ("lr", None, "must be a number, got None"),
        ("lr", True, "must be a number, got True"),
        ("lr", 10**400, r"must be .* below 2\*\*63 in size, got 1000"),
        ("max_steps", "none", "must be an integer or none, got 'none'"),
        ("max_steps", 5.0, "must be an integer or none, got 5.0"),
        ("eval_batches", 2**63, r"must be .* below 2\*\*63 in size, got 9223372036854775808"),
        ("seed", -(2**63) - 1, r"must be .* below 2\*\*63 in size, got -9223372036854775809"),
        ("keep_best", 1, "must be true or false, got 1"),
        ("schedule", "cos", "must be one of 'cosine', 'linear', .*got 'cos'"),
        ("device", ["cpu"], r"must be one of 'auto', 'cpu', 'cuda', got \['cpu'\]"),
        ("freeze", "wte.*", "must be a list of strings, got 'wte"),
        ("freeze", ("wte.*", 3), "must be a list of strings, got "),
        ("out", b"runs", "must be a string, got b'runs'"),
        ("out", "", "must name a directory, got ''"),
    ],
)
def test_train_config_checks_types(name: str, value: object, must: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} {must}"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [
        ("n_layer", True, "must be an integer from 1 to 10000, got True"),
        ("n_layer", 10**9, "must be an integer from 1 to 10000, got 1000000000"),
        ("n_embd", 10**30, "must be an integer from 1 to 2147483647, got 1000"),
        ("vocab_size", 2**31, "must be an integer from 1 to 2147483647, got 2147483648"),
        ("dropout", "0", "must be a number, got '0'"),
        ("qkv_bias", None, "must be true or false, got None"),
    ],
)
def test_gpt_config_checks_types(name: str, value: object, must: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} {must}"):
        GPTConfig(**{name: value})


ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400])
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=3)
    | st.sampled_from(["cosine", "bf16", "skip", "none", "auto", "exponential"])
    | st.lists(st.text(max_size=3) | st.integers(), max_size=3)
    | st.just(...)
)


@pytest.mark.parametrize("cls", [GPTConfig, TrainConfig])
@given(data=st.data())
def test_any_value_is_taken_or_a_value_error(cls: Any, data: st.DataObject) -> None:
    names = [field.name for field in dataclasses.fields(cls)]
    values = data.draw(st.dictionaries(st.sampled_from(names), ANYTHING, max_size=4))
    try:
        config = cls(**values)
    except ValueError as error:
        assert any(name in str(error) for name in names)
        assert "\n" not in str(error)
    else:
        assert dataclasses.asdict(config).items() >= values.items()


def test_steps_and_epochs_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="max_steps or epochs, not both: got 5 and 2"):
        TrainConfig(max_steps=5, epochs=2)


@pytest.mark.parametrize("config", [GPTConfig(), TrainConfig()], ids=["model", "train"])
def test_configs_are_frozen(config: GPTConfig | TrainConfig) -> None:
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, 1)


def test_matmul_precision_is_for_fp32() -> None:
    assert TrainConfig(matmul_precision="high").matmul_precision == "high"
    with pytest.raises(ValueError, match="matmul_precision high is for precision fp32"):
        TrainConfig(matmul_precision="high", precision="bf16")
