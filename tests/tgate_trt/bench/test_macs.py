"""Multiply-accumulates of pictures and parameters of models, beside the paper."""

from __future__ import annotations

import dataclasses
import math

import pytest

from tgate_trt.bench.macs import FURTHER, PUBLISHED, UNMET, ModelCost, cost_of, macs_of_picture
from tgate_trt.export.macs import Macs
from tgate_trt.models.resolve import resolve


def test_a_picture_has_steps_on_both_sides_of_the_gate() -> None:
    assert macs_of_picture(Macs(5, 1), Macs(2), 10, 25) == Macs(10 * 5 + 15 * 2, 10)
    assert macs_of_picture(5, 2, 25, 25) == 125


@pytest.fixture(scope="module")
def sd15() -> ModelCost:
    return cost_of("sd15")


def test_pictures_take_what_the_paper_says(sd15: ModelCost) -> None:
    """The paper's table 1, within a tenth of a percent."""
    assert (sd15.height, sd15.width, sd15.text_tokens, sd15.guided) == (512, 512, 77, True)
    gated = {row.planning_steps: row for row in sd15.pictures() if row.method in ("vanilla", "T-GATE")}
    assert {steps: row.published for steps, row in gated.items()} == PUBLISHED["sd15"]
    for row in gated.values():
        assert row.deviation is not None
        assert abs(row.deviation) < 1e-3
        assert row.macs.linear / 1e12 == pytest.approx(row.published, rel=1e-3)


def test_most_of_the_saving_is_the_half_that_is_dropped(sd15: ModelCost) -> None:
    """A fidelity step is 4.0 % cheaper than a whole one at the same batch, attention's products counted."""
    assert sd15.vanilla == sd15.planning == 2 * sd15.single
    assert 1 - sd15.fidelity.total / sd15.single.total == pytest.approx(0.040, abs=5e-4)
    costs = {(row.method, row.planning_steps): row.macs.total for row in sd15.pictures()}
    for steps in (5, 10):
        vanilla, dropped, gated = costs["vanilla", 25], costs["cfg-drop", steps], costs["T-GATE", steps]
        assert (vanilla - dropped) / (vanilla - gated) == pytest.approx(0.96, abs=5e-3)


def test_parameters_are_those_of_the_state_dict(sd15: ModelCost) -> None:
    state = {name: math.prod(shape) for name, shape in resolve("sd15", random_weights=True).tensor_shapes().items()}
    held = sd15.parameters
    assert held.whole == sum(state.values())
    assert held.cross_attention == sum(size for name, size in state.items() if ".attn2." in name)
    dead = sum(size for name, size in state.items() if ".attn2." in name or (".transformer_blocks." in name and ".norm2." in name))
    assert held.fidelity_graph == held.whole - dead == 815_533_444
    assert held.without_cross_attention == 815_558_404


def test_further_methods_are_counted_on_the_graphs_that_they_run(sd15: ModelCost) -> None:
    costs = {row.method: row.macs.linear for row in sd15.further}
    assert list(costs) == [*FURTHER, UNMET[0]]
    gated = {row.planning_steps: row.macs.linear for row in sd15.pictures() if row.method == "T-GATE"}
    assert costs["10,sp=5,warm=2"] < gated[10] and costs["5,sp=3,warm=1"] < gated[5]
    assert costs[UNMET[0]] < costs["none,deep=3,branch=1"] < sd15.steps * sd15.vanilla.linear / 2
    assert all(row.published is None for row in sd15.further), "the paper has figures of SDXL"


def test_without_guidance_there_is_no_half_to_drop(sd15: ModelCost) -> None:
    lcm = dataclasses.replace(sd15, model="lcm-sdxl", steps=4, guided=False, further=(), vanilla=sd15.single, planning=sd15.single)
    assert [(row.method, row.planning_steps) for row in lcm.pictures()] == [("vanilla", 4), ("T-GATE", 1), ("T-GATE", 2)]
    assert [row.published for row in lcm.pictures()] == [PUBLISHED["lcm-sdxl"][steps] for steps in (4, 1, 2)]
