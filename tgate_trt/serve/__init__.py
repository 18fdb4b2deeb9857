"""Serve a bundle to many threads, and behind an HTTP address.

`tgate_trt.serve.service.Service` is the library's way, without HTTP; `tgate-serve` stands on it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tgate_trt.serve.picture import Picture as Picture
    from tgate_trt.serve.picture import Request as Request
    from tgate_trt.serve.service import Service as Service

_LAZY = {"Picture": "picture", "Request": "picture", "Service": "service"}
"""Module of each name that needs PyTorch: the command's ``--help`` loads none of it."""

__all__ = ["Picture", "Request", "Service"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"tgate_trt.serve.{_LAZY[name]}"), name)
