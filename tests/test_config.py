"""The configurations: defaults, presets, and every value they refuse."""

import dataclasses

import pytest

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
    with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got {value!r}"):
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
        ("max_norm", float("nan")),
    ],
)
def test_train_config_refuses(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*got {value}"):
        TrainConfig(**{name: value})


def test_steps_and_epochs_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="max_steps or epochs, not both: got 5 and 2"):
        TrainConfig(max_steps=5, epochs=2)


@pytest.mark.parametrize("config", [GPTConfig(), TrainConfig()], ids=["model", "train"])
def test_configs_are_frozen(config: GPTConfig | TrainConfig) -> None:
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, 1)
