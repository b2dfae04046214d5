"""The guard against NumPy's own z-scores, and its state."""

import json
import math

import pytest
from seeds import numpy_generator

from gptfast import TrainConfig
from gptfast.training.guard import ENOUGH, WINDOW, Guard

NAMES = ("loss", "grad_norm")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("zscore", [None, 3.0])
def test_what_is_not_finite_is_at_fault(name: str, value: float, zscore: float | None) -> None:
    guard = Guard(TrainConfig(skip_zscore=zscore))
    fault = guard.fault(name, value)
    assert fault.reason == f"{name} is {value}" and not fault.finite
    assert not guard.skips(fault)
    assert Guard(TrainConfig(nonfinite="skip")).skips(fault)


def test_outliers_are_those_numpy_finds() -> None:
    rng = numpy_generator(0)
    values = rng.normal(3.0, 0.2, 500)
    values[[60, 200, 201, 350]] += 2.0
    values[400] -= 2.0  # a low one is no harm
    guard = Guard(TrainConfig(skip_zscore=5.0))
    found = [i for i, value in enumerate(values) if guard.fault("loss", float(value))]
    wanted = []
    for i in range(ENOUGH, 500):
        past = values[max(0, i - WINDOW) : i]
        if values[i] > past.mean() + 5.0 * past.std():
            wanted.append(i)
    assert found == wanted
    assert {60, 200, 201, 350} <= set(found) and 400 not in found


def test_loss_and_norm_have_windows_of_their_own() -> None:
    guard = Guard(TrainConfig(skip_zscore=3.0))
    for i in range(ENOUGH):
        assert guard.fault("loss", 1.0 + 0.01 * (i % 2)) is None
        assert guard.fault("grad_norm", 100.0 + i % 2) is None
    assert guard.fault("grad_norm", 101.0) is None
    assert "outlier, above" in guard.fault("loss", 101.0).reason


def test_a_lasting_change_is_an_outlier_for_a_while_only() -> None:
    guard = Guard(TrainConfig(skip_zscore=4.0))
    levels = [1.0 + 0.01 * (i % 3) for i in range(WINDOW)] + [2.0] * WINDOW
    faults = [guard.fault("loss", level) is not None for level in levels]
    assert faults[WINDOW] and not any(faults[WINDOW + 20 :])


def test_without_the_option_nothing_finite_is_at_fault() -> None:
    guard = Guard(TrainConfig())
    assert all(guard.fault("loss", 10.0**i) is None for i in range(30))
    assert not guard.past["loss"]


def test_it_gives_up_on_a_run_of_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptfast.training.guard.GIVE_UP", 3)
    guard = Guard(TrainConfig(nonfinite="skip"))
    fault = guard.fault("loss", math.nan)
    assert [guard.skips(fault) for _ in range(2)] == [True, True]
    guard.accept()
    assert [guard.skips(fault) for _ in range(3)] == [True, True, False]
    assert (guard.skipped, guard.in_a_row) == (5, 3)


def test_state_goes_through_json() -> None:
    config = TrainConfig(skip_zscore=3.0, nonfinite="skip")
    guard, other = Guard(config), Guard(config)
    for i in range(WINDOW + 9):
        guard.fault("loss", 1.0 + (i % 7) / 10)
        guard.fault("grad_norm", 5.0 + (i % 5) / 10)
    guard.skips(guard.fault("loss", math.nan))
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.state_dict() == guard.state_dict()
    for name in NAMES:
        for value in (1.5, 2.0, 9.0, 5.2):
            assert guard.fault(name, value) == other.fault(name, value)
