"""A training loop that can be killed at any moment and goes on to the same weights.

Every step draws its randomness from the seed, the stage's name and the step's number alone, so a checkpoint needs no state of
a random generator. Checkpoints are written beside their place and moved there, so one is always whole.
"""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tgate_trt.demo.training.reporting import Reporter
from tgate_trt.errors import InputError

SECONDS_BETWEEN_CHECKPOINTS = 60.0

Loss = Callable[[int, torch.Generator], torch.Tensor]
"""The loss of a step, a scalar; all its randomness comes from the generator, which is on the CPU."""


@dataclass(frozen=True)
class Recipe:
    """How one stage is optimised: AdamW, a linear warm-up, a cosine to zero, gradients clipped."""

    steps: int
    batch_size: int
    learning_rate: float
    warm_up: int = 100
    """Steps until the learning rate is reached."""
    weight_decay: float = 1e-4
    clip: float = 1.0
    """The largest norm of the gradient of all parameters together; without it the autoencoder hardly learns."""
    average: float = 0.0
    """Decay of an exponential moving average of the weights, which is then the result; 0 for none."""

    def rate(self, step: int) -> float:
        """The learning rate of a step, 0-based."""
        return self.learning_rate * min(1.0, (step + 1) / self.warm_up) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """The randomness of one step: independent of every other step's, and of what ran before."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def fit(module: nn.Module, loss: Loss, recipe: Recipe, *, stage: str, seed: int, checkpoint: Path, reporter: Reporter) -> None:
    """Trains `module` in place, from its checkpoint if there is one; it ends with the averaged weights if the recipe averages.

    Args:
        module: on its device already; what `loss` reads.
        loss: the loss of one step.
        recipe: how to optimise.
        stage: the stage's name, for the randomness and the report.
        seed: of the randomness.
        checkpoint: the file to go on from and to write to.
        reporter: told of each step.

    Raises:
        InputError: when the checkpoint was written under another recipe or seed.
    """
    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    average = AveragedModel(module, avg_fn=_towards(recipe.average)) if recipe.average else None
    stateful = {"module": module, "optimizer": optimizer} | ({"average": average} if average else {})
    settings = {**asdict(recipe), "seed": seed}
    first = _restore(checkpoint, stateful, settings)
    module.train()
    written = time.monotonic()
    with reporter.stage(stage, total=recipe.steps, done=first) as progress:
        for step in range(first, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            optimizer.zero_grad()
            value = loss(step, step_generator(seed, stage, step))
            torch.autograd.backward(value)
            nn.utils.clip_grad_norm_(module.parameters(), recipe.clip)
            optimizer.step()
            if average:
                average.update_parameters(module)
            progress.advance(value)
            if time.monotonic() - written > SECONDS_BETWEEN_CHECKPOINTS or step + 1 == recipe.steps:
                _write(checkpoint, stateful, settings, step + 1)
                written = time.monotonic()
    if average:
        module.load_state_dict(average.module.state_dict())
    module.eval()


def _towards(decay: float) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | int], torch.Tensor]:
    return lambda average, latest, updates: average.lerp(latest, 1 - decay)


def _restore(checkpoint: Path, stateful: dict[str, Any], settings: dict[str, Any]) -> int:
    """Loads what a checkpoint holds; the number of steps it has behind it, 0 without one."""
    if not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if state["settings"] != settings:
        changed = sorted(name for name in settings if state["settings"].get(name) != settings[name])
        raise InputError(f"{checkpoint} was written with another {', '.join(changed)}; take another --work folder, or remove it")
    for name, part in stateful.items():
        part.load_state_dict(state[name])
    return int(state["step"])


def _write(checkpoint: Path, stateful: dict[str, Any], settings: dict[str, Any], step: int) -> None:
    state = {name: part.state_dict() for name, part in stateful.items()}
    write_atomically(checkpoint, lambda path: torch.save({**state, "settings": settings, "step": step}, path))


def write_atomically(target: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` make a file beside `target`, then moves it there in one step."""
    temporary = target.with_name(f".{target.name}.partial")
    write(temporary)
    temporary.replace(target)
