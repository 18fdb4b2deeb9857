"""Parts of a run: one clock at a time, and their sum is the whole."""

from __future__ import annotations

from tgate_trt.bench.spread import in_rounds, ratios, spread
from tgate_trt.bench.stopwatch import Stopwatch


class Clock:
    """A clock whose time passes when the test lets it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_part_stands_still_while_another_runs_inside_it() -> None:
    clock = Clock()
    watch = Stopwatch(clock=clock)
    with watch.time("outer"):
        clock.now += 1
        with watch.time("inner"):
            clock.now += 4
        clock.now += 2
    assert watch.seconds() == {"outer": 3, "inner": 4}
    assert watch.calls == {"outer": 1, "inner": 1}


def test_what_is_between_parts_is_of_none() -> None:
    clock = Clock()
    watch = Stopwatch(clock=clock)
    for _ in range(2):
        with watch.time("part"):
            clock.now += 1
        clock.now += 8
    assert watch.seconds() == {"part": 2}
    assert watch.calls["part"] == 2


def test_watching_ends_with_its_block() -> None:
    class Clerk:
        def add(self, a: int, b: int) -> int:
            return a + b

    clerk, watch = Clerk(), Stopwatch()
    with watch.watching(clerk, "add", "sums"):
        assert clerk.add(1, b=2) == 3
    assert clerk.add(2, 2) == 4
    assert watch.calls == {"sums": 1}
    assert vars(clerk) == {}


def test_a_ratio_is_taken_within_a_round() -> None:
    assert ratios([0.5, 5.0, 1.0], [1.0, 10.0, 2.0]) == {"median": 0.5, "p10": 0.5, "p90": 0.5, "samples": [0.5, 0.5, 0.5]}
    assert spread([3.0]) == {"median": 3.0, "p10": 3.0, "p90": 3.0, "samples": [3.0]}


def test_rounds_go_forwards_and_backwards() -> None:
    order: list[str] = []

    def sample(name: str) -> float:
        order.append(name)
        return float(len(order))

    assert in_rounds({"a": lambda: sample("a"), "b": lambda: sample("b")}, 3) == {"a": [1.0, 4.0, 5.0], "b": [2.0, 3.0, 6.0]}
    assert "".join(order) == "abbaab"
