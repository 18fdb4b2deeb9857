"""The table of models is one, and what README, docs and ``--help`` show of it is made from it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tgate_trt.models.architectures import ARCHITECTURES, names, short_table, table
from tgate_trt.models.resolve import resolve

ROOT = Path(__file__).parents[3]

PARAMETERS = {
    "svd": 1_524_623_082,
    "sdxl-refiner": 2_259_526_660,
    "sdxl-turbo": 2_567_463_684,
    "playground-v2.5": 2_567_463_684,
    "kolors": 2_579_458_820,
    "sana": 1_604_462_752,
    "hunyuan-dit": 1_499_952_032,
    "wan-1.3b": 1_418_996_800,
    "cosmos-predict2": 1_956_405_248,
    "stable-audio": 1_056_939_136,
    "lcm-pixart": 611_349_152,
}
"""Of the real architectures: published as 1.52, 2.3, 2.6, 2.6, 2.6, 1.6, 1.5, 1.42, 2, 1.06 and 0.6 billion."""


def test_the_pages_show_the_table() -> None:
    assert table() in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert short_table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_help_names_every_model() -> None:
    from typer.main import get_command

    from tgate_trt.cli.build import app

    (option,) = (each for each in get_command(app).params if each.name == "model")
    assert names() in str(getattr(option, "help", ""))
    assert set(names().split(", ")) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", PARAMETERS)
def test_architectures_have_their_published_sizes(name: str) -> None:
    shapes = resolve(name, random_weights=True).tensor_shapes()
    assert sum(map(math.prod, shapes.values())) == PARAMETERS[name]


def test_a_base_lends_what_a_model_lacks() -> None:
    assert set(ARCHITECTURES["sdxl-refiner"].shared) >= {"vae", "text_encoder_2", "scheduler"}
    assert "unet" not in ARCHITECTURES["sdxl-refiner"].shared
    assert resolve("sdxl-refiner", random_weights=True).time_ids == 5
