"""The probe of TensorRT: a try that fails is a row of the result."""

from __future__ import annotations

import pytest
import torch

from tgate_trt.bench import probe
from tgate_trt.engines.tensorrt_flavours import FLAVOURS


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the try may succeed")
def test_what_cannot_be_built_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "FLAVOURS", {"tensorrt": FLAVOURS["tensorrt"]})
    (row,) = probe.probe()
    assert (row["backend"], row["capability"]) == ("tensorrt", "this GPU")
    assert "an NVIDIA GPU" in row["error"]
