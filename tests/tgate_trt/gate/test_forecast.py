"""Forecasts as weighted sums: exact where the predictions are polynomials of the order that a rule has."""

from __future__ import annotations

import pytest
import torch

from tgate_trt.errors import GateError
from tgate_trt.gate.forecast import RULES, weights
from tgate_trt.gate.history import History

TIMES = (981.0, 941.0, 901.0, 861.0, 821.0, 781.0, 741.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", range(1, 8))
def test_weights_add_up_to_one(rule: str, count: int) -> None:
    found = weights(rule, TIMES[:count], 700.0)
    assert len(found) == count
    assert sum(found) == pytest.approx(1, abs=1e-9)
    assert sum(weight != 0 for weight in found) <= RULES[rule]


@pytest.mark.parametrize(("rule", "order"), [("repeat", 0), ("linear", 1), ("quadratic", 2)])
def test_a_polynomial_of_its_order_is_forecast_exactly(rule: str, order: int) -> None:
    coefficients = (2.0, -0.7, 0.3)[: order + 1]

    def value(time: float) -> float:
        return sum(coefficient * (time / 1000) ** power for power, coefficient in enumerate(coefficients))

    found = weights(rule, TIMES, 701.0)
    assert sum(weight * value(time) for weight, time in zip(found, TIMES, strict=True)) == pytest.approx(value(701.0), rel=1e-9)


def test_the_ridge_follows_a_curve_and_is_calmer_than_polynomials_on_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, len(TIMES), generator=generator).double()
    spread = {rule: float((noise @ torch.tensor(weights(rule, TIMES, 701.0)).double()).std()) for rule in ("quadratic", "chebyshev")}
    assert spread["chebyshev"] < spread["quadratic"]
    curve = [(time / 1000) ** 3 for time in TIMES]
    found = sum(weight * value for weight, value in zip(weights("chebyshev", TIMES, 701.0), curve, strict=True))
    assert found == pytest.approx(0.701**3, rel=0.05)


def test_a_history_keeps_one_prediction_a_time_of_one_phase() -> None:
    history = History("linear")
    history.add("planning", 900.0, torch.tensor([1.0]))
    history.add("fidelity", 800.0, torch.tensor([5.0]))
    assert history.forecast("fidelity", 700.0).item() == 5.0, "the other phase's is forgotten"
    history.add("fidelity", 700.0, torch.tensor([7.0]))
    history.add("fidelity", 700.0, torch.tensor([6.0]))
    assert history.forecast("fidelity", 600.0).item() == pytest.approx(7.0), "5 at 800 and 6 at 700"
    with pytest.raises(GateError, match="there is no prediction to forecast from"):
        history.forecast("planning", 600.0)


def test_what_is_kept_is_a_copy() -> None:
    history, prediction = History("repeat"), torch.tensor([1.0])
    history.add(0, 900.0, prediction)
    prediction.fill_(9.0)
    forecast = history.forecast(0, 800.0)
    forecast.fill_(3.0)
    assert history.forecast(0, 700.0).item() == 1.0
