"""Which ways to draw are compared, and with what."""

from __future__ import annotations

import pytest

from tgate_trt.bench.settings import CFG_DROP, EAGER, OFFICIAL, TGATE, VANILLA, Setting, settings_of
from tgate_trt.errors import InputError


def test_every_gate_has_vanilla_and_cfg_drop_beside_it() -> None:
    settings = settings_of(["onnxruntime"], [5, 0.4], ["negative", "positive"], [])
    assert [setting.label(25) for setting in settings] == [
        "vanilla",
        "cfg-drop g=5",
        "cfg-drop g=10",
        "T-GATE g=5",
        "T-GATE g=5 positive",
        "T-GATE g=10",
        "T-GATE g=10 positive",
    ]
    assert {setting.baseline for setting in settings} == {Setting(VANILLA, "onnxruntime")}


def test_a_ratio_stays_within_an_engine() -> None:
    settings = settings_of(["onnxruntime", "pytorch"], [10], ["negative"], ["official"])
    assert {setting.baseline for setting in settings} == {Setting(VANILLA, "onnxruntime"), Setting(VANILLA, "pytorch"), Setting(EAGER)}
    assert set(settings) >= {setting.baseline for setting in settings}
    assert all(setting.baseline.backend == setting.backend for setting in settings)


def test_graphs_do_a_ways_work() -> None:
    assert Setting(TGATE, "onnxruntime", 5).graphs == Setting(OFFICIAL, None, 5).graphs == ("planning", "fidelity")
    assert Setting(CFG_DROP, "onnxruntime", 5).graphs == Setting(EAGER).graphs == ("vanilla", "vanilla")


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(InputError, match="--beside takes eager, graphs, channels-last, cutoff, compile, official, got 'magic'"):
        settings_of(["onnxruntime"], [10], ["negative"], ["magic"])
    with pytest.raises(InputError, match="takes counts, fractions and noise levels here, got none; vanilla is always measured"):
        settings_of(["onnxruntime"], ["none"], ["negative"], [])
