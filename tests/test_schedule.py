"""Test learning-rate schedules: known values, and rates that stay in their bounds."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast import TrainConfig
from gptfast.training.schedule import learning_rate

SCHEDULES = ["cosine", "linear", "constant", "wsd", "exponential"]


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"warmup_steps": 4}, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 12: 0.55, 20: 0.1}),
        ({"warmup_steps": 0, "min_lr": 0.0}, {0: 1.0, 10: 0.5, 20: 0.0}),
        ({"warmup_steps": 10, "min_lr": 0.5}, {9: 1.0, 10: 1.0, 15: 0.75, 20: 0.5}),
        ({"warmup_steps": 100}, {0: 0.01, 20: 0.21}),
        (
            {"warmup_steps": 4, "schedule": "linear", "min_lr": 0.2},
            {0: 0.25, 3: 1.0, 4: 1.0, 12: 0.6, 20: 0.2},
        ),
        (
            {"warmup_steps": 4, "schedule": "constant", "min_lr": 0.2},
            {0: 0.25, 3: 1.0, 4: 1.0, 12: 1.0, 20: 1.0},
        ),
        (
            {"warmup_steps": 4, "schedule": "wsd", "decay_steps": 8, "min_lr": 0.2},
            {0: 0.25, 3: 1.0, 4: 1.0, 12: 1.0, 14: 0.8, 16: 0.6, 20: 0.2},
        ),
        # A fifth of 21 steps is four.
        ({"warmup_steps": 0, "schedule": "wsd"}, {0: 1.0, 16: 1.0, 18: 0.55, 20: 0.1}),
        # Nothing is left of the stable part.
        (
            {"warmup_steps": 10, "schedule": "wsd", "decay_steps": 100, "min_lr": 0.0},
            {9: 1.0, 10: 1.0, 15: 0.5, 20: 0.0},
        ),
        (
            {"warmup_steps": 0, "schedule": "exponential", "min_lr": 1e-4},
            {0: 1e-4, 5: 1e-3, 10: 1e-2, 15: 1e-1, 20: 1.0},
        ),
        # A twentieth of 21 steps is one.
        ({}, {0: 1.0, 1: 1.0, 20: 0.1}),
    ],
    ids=[
        "warm-up",
        "no-warm-up",
        "min-lr",
        "warm-up-only",
        "linear",
        "constant",
        "wsd",
        "wsd-default",
        "wsd-all-decay",
        "exponential",
        "defaults",
    ],
)
def test_learning_rate(changes: dict[str, Any], rates: dict[int, float]) -> None:
    config = TrainConfig(lr=1.0, **changes)
    got = {step: learning_rate(step, 21, config) for step in rates}
    assert got == pytest.approx(rates)


def test_learning_rate_of_one_step() -> None:
    assert learning_rate(0, 1, TrainConfig(lr=2.0)) == 2.0


@settings(max_examples=300, deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES),
    steps=st.integers(1, 60),
    warmup=st.none() | st.integers(0, 70),
    decay=st.none() | st.integers(1, 70),
    min_lr=st.none() | st.floats(1e-6, 1.0),
)
def test_rates_lie_between_their_bounds(
    schedule: str, steps: int, warmup: int | None, decay: int | None, min_lr: float | None
) -> None:
    config = TrainConfig(
        lr=1.0, schedule=schedule, warmup_steps=warmup, decay_steps=decay, min_lr=min_lr
    )
    rates = [learning_rate(step, steps, config) for step in range(steps)]
    warm = min(steps, warmup if warmup is not None else max(1, steps // 20))
    assert rates[:warm] == pytest.approx(
        [(step + 1) / (warmup or max(1, steps // 20)) for step in range(warm)]
    )
    after = rates[warm:]
    floor = 0.1 if min_lr is None else min_lr
    assert all(floor - 1e-12 <= rate <= 1 + 1e-12 for rate in after)
    up = schedule == "exponential"
    assert after == sorted(after, reverse=not up)
    if len(after) > 1 and schedule != "constant":
        assert after[-1] == pytest.approx(1.0 if up else floor)
