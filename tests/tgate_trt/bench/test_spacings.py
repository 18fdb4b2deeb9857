"""The default gate in several spacings, on the demo model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import Result

import tgate_trt
from tgate_trt.bench import spacings
from tgate_trt.bench.spacings import SPACINGS, STARTS, Spacing, gates_of, recoloured
from tgate_trt.bundle.bundle import Bundle
from tgate_trt.cli.bench import app
from tgate_trt.demo.dataset import examples
from tgate_trt.demo.scorer import read
from tgate_trt.errors import InputError
from tgate_trt.running.drawing import SCHEDULERS


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tgate_trt.build("shapes", tmp_path_factory.mktemp("bundles") / "shapes", verify=False, components=False)


def test_spacings_are_all_that_the_page_shows() -> None:
    assert {spacing.scheduler for spacing in SPACINGS} == {None, *SCHEDULERS}
    assert {spacing.steps for spacing in SPACINGS} == {8, 12, 25, 50}
    assert {(spacing.strength, spacing.start) for spacing in SPACINGS} == {(None, None), *itertools.product((0.4, 0.7), STARTS)}


def test_a_gate_at_a_noise_level_follows_the_spacing(
    run: Callable[..., Result], bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = (
        Spacing("trailing", 10),
        Spacing("Karras", 10, "euler", {"use_karras_sigmas": True}),
        Spacing("image to image", 10, strength=0.5, start="another colour"),
    )
    monkeypatch.setattr(spacings, "SPACINGS", short)
    done = run(app, "spacings", bundle.folder, "--samples", 3, "--json", tmp_path / "a.json", "--markdown", tmp_path / "a.md")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    vanilla, noise, fraction = record["settings"]["gates"]
    assert (vanilla, noise, fraction) == ("none", bundle.manifest.default_gate_step, 0.4)
    steps = [[(gate["steps"], gate["planning_steps"]) for gate in row["gates"]] for row in record["results"]]
    assert steps[0] == [(10, 10), (10, 4), (10, 4)]
    assert steps[1][1][1] > 4 == steps[1][2][1], "Karras spacing has more steps above the level"
    assert steps[2] == [(5, 5), (5, 1), (5, 2)], "image to image begins with less noise"
    assert all(gate["right"]["total"] == 3 for row in record["results"] for gate in row["gates"])
    assert f"| g of {noise} | right with {noise} |" in (tmp_path / "a.md").read_text(encoding="utf-8")


def test_only_the_demo_models_pictures_can_be_read(bundle: Bundle) -> None:
    other = replace(bundle.manifest, model=replace(bundle.manifest.model, name="sdxl"))
    with pytest.raises(InputError, match="spacings are judged by the captions of the model 'shapes', got 'sdxl'"):
        gates_of(Bundle(bundle.folder, other))


def test_image_to_image_starts_from_another_colour() -> None:
    for example in examples(20, held_out=True):
        agreement = read(recoloured(example)).agreement(example.combination)
        assert [name for name, same in agreement.items() if not same] == ["colour"]
