"""Descent that can be interrupted: parameters, moments, the best state so far and its history, in one file.

Learning and tuning both descend over batches of calibration windows; the last batches are held out, and decide when to
stop and which state to keep.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from fewbit.checkpoint.damage import damage_named
from fewbit.checkpoint.store import read_tensors, write_tensors

WINDOWS_PER_STEP = 2
HELD_BATCHES = 4  # batches of windows that are never learned from, unless that is more than a quarter of all
CHECK_EVERY = 16  # steps between two looks at the held-out batches, each followed by a saved state
PATIENCE = 2  # looks without a gain after which learning ends
BETAS = (0.9, 0.95)
WARM_UP = 8


def share_of_rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step: a short rise, then half a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def descent_windows(steps: int) -> int:
    """How many windows so many steps read without reading one twice, the held-out ones included."""
    return WINDOWS_PER_STEP * (steps + HELD_BATCHES)


def held_batches(batches: int) -> range:
    """The numbers of the batches that are held out, of so many."""
    return range(batches - max(1, min(HELD_BATCHES, batches // 4)), batches)


@torch.no_grad()
def mean_loss(loss: Callable[[int], torch.Tensor], batches: Sequence[int]) -> float:
    """The mean over batches of a loss that is given by batch."""
    return sum(float(loss(batch)) for batch in batches) / len(batches)


class Descent:
    """Everything that learning needs to go on: gains, moments, the best gains so far and the history."""

    def __init__(
        self, gains: dict[str, nn.Parameter], rate: float, path: Path, factors: dict[str, float] | None = None
    ) -> None:
        """`rate` is Adam's; `factors` are what it is times for some of the parameters."""
        self.gains = gains
        self.rate = rate
        self.path = path
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._recent: list[float] = []
        self._factors = [(factors or {}).get(name, 1.0) for name in gains]
        self.optimizer = torch.optim.Adam([{"params": [gain]} for gain in gains.values()], lr=rate, betas=BETAS)
        self.best = {name: gain.detach().clone() for name, gain in gains.items()}

    @property
    def stale(self) -> bool:
        """Whether the last `PATIENCE` looks brought nothing."""
        held = [entry["held"] for entry in self.history]
        return len(held) > PATIENCE and min(held[-PATIENCE:]) >= min(held[:-PATIENCE])

    def run(
        self,
        loss: Callable[[int], torch.Tensor],
        batches: int,
        steps: int,
        stepped: Callable[[], None],
        looked: Callable[[float], None],
    ) -> None:
        """Descend until the steps are used up or the held-out batches gain no more; leaves the best state in place.

        `loss` is that of one of `batches`; `stepped` is called after every step, `looked` with every held-out loss.
        """
        held = held_batches(batches)

        def look() -> None:
            self.look(mean_loss(loss, held))
            looked(self.history[-1]["held"])

        if not self.history:
            look()
        while self.step < steps and not self.stale:
            generator = torch.Generator().manual_seed(self.step // held.start)
            order = torch.randperm(held.start, generator=generator)
            found = loss(int(order[self.step % held.start]))
            found.backward()
            self.descend(float(found.detach()), share_of_rate(self.step, steps))
            stepped()
            if self.step % CHECK_EVERY == 0 or self.step == steps:
                look()
        self.take_best()

    def descend(self, loss: float, share: float) -> None:
        for group, factor in zip(self.optimizer.param_groups, self._factors, strict=True):
            group["lr"] = self.rate * factor * share
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._recent.append(loss)

    def look(self, held: float) -> None:
        """Note the held-out divergence, keep the gains where it is the least, and save everything."""
        if all(held < entry["held"] for entry in self.history):
            self.best = {name: gain.detach().clone() for name, gain in self.gains.items()}
        learned = sum(self._recent) / len(self._recent) if self._recent else held
        self.history.append({"step": self.step, "held": held, "learned": learned})
        self._recent = []
        tensors = {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, gain in self.gains.items():
            tensors[f"gain.{name}"] = gain.detach()
            for moment, value in self.optimizer.state.get(gain, {}).items():
                tensors[f"{moment}.{name}"] = value
        write_tensors(self.path, tensors, {"step": str(self.step), "history": json.dumps(self.history)})

    def restore(self) -> None:
        """Go on from the last look, if there is one."""
        if not self.path.exists():
            return
        tensors, metadata = read_tensors(self.path)
        with damage_named(self.path, "delete it and run again"):
            self.step, self.history = int(metadata["step"]), json.loads(metadata["history"])
            for name, gain in self.gains.items():
                gain.data.copy_(tensors[f"gain.{name}"])
                self.best[name] = tensors[f"best.{name}"]
                if f"exp_avg.{name}" in tensors:
                    moments = ("step", "exp_avg", "exp_avg_sq")
                    self.optimizer.state[gain] = {moment: tensors[f"{moment}.{name}"] for moment in moments}

    def take_best(self) -> None:
        for name, gain in self.gains.items():
            gain.data.copy_(self.best[name])
