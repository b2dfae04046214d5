"""Compare the guard with NumPy's z-scores, and test its state."""

import json
import math

import pytest
from seeds import numpy_generator

from gptfast import TrainConfig
from gptfast.training.guard import MAX_PAST_STEPS, MIN_PAST_STEPS, Fault, Guard

NAMES = ("loss", "grad_norm")


def judged(guard: Guard, name: str, value: float) -> Fault | None:
    """Judge a value and record it, as a step does."""
    fault = guard.judge(name, value)
    guard.record(name, value)
    return fault


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("zscore", [None, 3.0])
def test_non_finite_values_are_faults(name: str, value: float, zscore: float | None) -> None:
    guard = Guard(TrainConfig(skip_zscore=zscore))
    fault = judged(guard, name, value)
    assert fault.reason == f"{name} is {value}" and not fault.finite
    assert not guard.may_skip(fault)
    assert Guard(TrainConfig(nonfinite="skip")).may_skip(fault)


def test_outliers_are_those_numpy_finds() -> None:
    rng = numpy_generator(0)
    values = rng.normal(3.0, 0.2, 500)
    values[[60, 200, 201, 350]] += 2.0
    values[400] -= 2.0  # a low outlier is harmless
    guard = Guard(TrainConfig(skip_zscore=5.0))
    found = [i for i, value in enumerate(values) if judged(guard, "loss", float(value))]
    wanted = []
    for i in range(MIN_PAST_STEPS, 500):
        past = values[max(0, i - MAX_PAST_STEPS) : i]
        if values[i] > past.mean() + 5.0 * past.std():
            wanted.append(i)
    assert found == wanted
    assert {60, 200, 201, 350} <= set(found) and 400 not in found


def test_the_limit_is_where_judging_begins() -> None:
    """A GPU that compares with the limit decides as the guard does."""
    rng = numpy_generator(1)
    guard = Guard(TrainConfig(skip_zscore=3.0))
    assert guard.limit("loss") == guard.limit("grad_norm") == math.inf
    for value in rng.normal(3.0, 0.2, MIN_PAST_STEPS):
        assert guard.limit("loss") == math.inf
        judged(guard, "loss", float(value))
    limit = guard.limit("loss")
    assert guard.judge("loss", limit) is None
    assert guard.judge("loss", math.nextafter(limit, math.inf)) is not None
    assert Guard(TrainConfig()).limit("loss") == math.inf


def test_loss_and_norm_have_windows_of_their_own() -> None:
    guard = Guard(TrainConfig(skip_zscore=3.0))
    for i in range(MIN_PAST_STEPS):
        assert judged(guard, "loss", 1.0 + 0.01 * (i % 2)) is None
        assert judged(guard, "grad_norm", 100.0 + i % 2) is None
    assert judged(guard, "grad_norm", 101.0) is None
    assert "outlier, above" in judged(guard, "loss", 101.0).reason


def test_a_lasting_change_is_an_outlier_for_a_while_only() -> None:
    guard = Guard(TrainConfig(skip_zscore=4.0))
    levels = [1.0 + 0.01 * (i % 3) for i in range(MAX_PAST_STEPS)] + [2.0] * MAX_PAST_STEPS
    faults = [judged(guard, "loss", level) is not None for level in levels]
    assert faults[MAX_PAST_STEPS] and not any(faults[MAX_PAST_STEPS + 20 :])


def test_without_the_option_nothing_finite_is_at_fault() -> None:
    guard = Guard(TrainConfig())
    assert all(judged(guard, "loss", 10.0**i) is None for i in range(30))
    assert not guard.past["loss"]


def test_it_gives_up_on_a_run_of_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptfast.training.guard.MAX_SKIPS_IN_A_ROW", 3)
    guard = Guard(TrainConfig(nonfinite="skip"))

    def gives_up_after_skip() -> bool:
        guard.record_skip()
        return guard.gives_up

    assert [gives_up_after_skip() for _ in range(2)] == [False, False]
    guard.record_step()
    assert [gives_up_after_skip() for _ in range(3)] == [False, False, True]
    assert (guard.skipped, guard.in_a_row) == (5, 3)


def test_judging_does_not_change_the_state() -> None:
    guard = Guard(TrainConfig(skip_zscore=3.0, nonfinite="skip"))
    for i in range(MAX_PAST_STEPS):
        judged(guard, "loss", 1.0 + (i % 7) / 10)
    before = guard.state_dict()
    for value in (1.0, 100.0, math.nan):
        if fault := guard.judge("loss", value):
            guard.may_skip(fault)
    assert guard.state_dict() == before


def test_state_goes_through_json() -> None:
    config = TrainConfig(skip_zscore=3.0, nonfinite="skip")
    guard, other = Guard(config), Guard(config)
    for i in range(MAX_PAST_STEPS + 9):
        judged(guard, "loss", 1.0 + (i % 7) / 10)
        judged(guard, "grad_norm", 5.0 + (i % 5) / 10)
    judged(guard, "loss", math.nan)
    guard.record_skip()
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.state_dict() == guard.state_dict()
    for name in NAMES:
        for value in (1.5, 2.0, 9.0, 5.2):
            assert judged(guard, name, value) == judged(other, name, value)
