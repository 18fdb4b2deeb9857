"""The figure of a search: time against distance to vanilla, and the curve of the best."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tgate_trt.analysis.plotting import BLUE, VERMILION, drawing


def draw_front(record: Mapping[str, Any], path: Path) -> None:
    """Draw every candidate of a search, and the curve of those to which no faster one is as near.

    Raises:
        UnsupportedError: if matplotlib is not installed.
        InputError: if the file cannot be written.
    """
    results, settings = record["results"], record["settings"]
    with drawing(path, 7, 4.2) as figure:
        axes = figure.subplots()
        axes.scatter([row["share"] for row in results["candidates"]], [row["distance"] for row in results["candidates"]], s=14, color="0.7")
        front = results["front"]
        axes.step(
            [row["share"] for row in front], [row["distance"] for row in front], where="post", color=BLUE, label="nearest within a budget"
        )
        for row in front:
            axes.annotate(f"  {row['gate']}", (row["share"], row["distance"]), fontsize=6.5, rotation=30)
        axes.axvline(settings["budget"], color=VERMILION, label=f"budget, {settings['budget']:.0%}")
        if "found" in results:
            found = results["found"]
            axes.scatter([found["share"]], [found["distance"]], color=VERMILION, zorder=3, label=f"found: {found['gate']}")
        axes.set_xlabel("share of vanilla's denoising time, by measured times of the actions")
        axes.set_ylabel("perceptual distance to vanilla")
        axes.set_title(
            f"{record['subject']['model']}: {settings['samples']} pictures a gate, {settings['steps']} steps, {settings['backend']}"
        )
        axes.set_ylim(0, 1.6 * max(row["distance"] for row in results["candidates"]))
        axes.set_xlim(right=1.1)
        axes.legend(loc="upper right")
