"""Tuning layer by layer: each layer's gains bring its output back to the full model's, behind the layers before.

The compressed stream enters a layer with the errors of all layers so far, and the target is what the full model
has behind the same layer, so a layer also repairs what earlier ones lost. It is quick, since one layer runs at a
time, and it is the starting point of the tuning from end to end.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewbit.checkpoint.damage import damage_named
from fewbit.checkpoint.store import read_tensors, write_tensors
from fewbit.pipeline.calibrate import LayerStream

LEARNED, HELD = 8, 2  # batches to learn from, and to accept the result by
EPOCHS = 2
RATE = 1e-3
STATE = "tuning-layers.safetensors"


class LayerTuner:
    """Walks both models layer by layer; `compressed` holds gains, `full` loads one layer at a time."""

    def __init__(
        self,
        full: LayerStream,
        compressed: LayerStream,
        gains: dict[str, nn.Parameter],
        embed: Callable[[int], torch.Tensor],
        batches: int,
        work: Path,
    ) -> None:
        """`embed` gives the compressed model's hidden states of a batch in front of the first layer. The first
        `batches` may be used; the last of them decide whether a layer is better."""
        self.full = full
        self.compressed = compressed
        self.gains = gains
        self.embed = embed
        self.batches = batches
        self.path = work / STATE

    def run(self) -> Iterator[dict[str, float]]:
        """Tune the layers in order; yields for each the held-out error before and after."""
        count = min(LEARNED + HELD, self.batches)
        if count < 2:
            return
        done = self._restore()
        held = max(1, count * HELD // (LEARNED + HELD))
        with torch.no_grad():
            targets = [batch for _, batch in zip(range(count), self.full.embed(), strict=False)]
            states = [self.embed(number) for number in range(count)]
        for index in range(len(self.full)):
            targets = self._full_layer(index, targets)
            if index >= len(done):
                done.append(self._layer(index, states, targets, held))
                self._save(done)
            with torch.no_grad():
                states = [self.compressed.call_layer(index, state) for state in states]
            yield done[index]

    def _full_layer(self, index: int, states: list[torch.Tensor]) -> list[torch.Tensor]:
        prefix = f"{self.full.family.layers}.{index}"
        self.full.load(prefix)
        found = [self.full.run_layer(index, state) for state in states]
        self.full.unload(prefix)
        return found

    def _layer(
        self, index: int, states: list[torch.Tensor], targets: list[torch.Tensor], held: int
    ) -> dict[str, float]:
        """Tune one layer; the last `held` batches decide whether the result is kept."""
        prefix = f"{self.full.family.layers}.{index}."
        own = [gain for name, gain in self.gains.items() if name.startswith(prefix)]
        # Some channels and the first tokens are a thousand times larger than the rest and would drown it.
        channel = torch.cat(targets).square().mean((0, 1)).sqrt().clamp_min(1e-6)

        def loss(number: int) -> torch.Tensor:
            target = targets[number] / channel
            error = self.compressed.call_layer(index, states[number]) / channel - target
            return (error.square().sum(-1) / target.square().sum(-1)).mean()

        def held_loss() -> float:
            with torch.no_grad():
                numbers = range(len(states) - held, len(states))
                return sum(float(loss(number)) for number in numbers) / held

        before = held_loss()
        optimizer = torch.optim.Adam(own, lr=RATE)
        steps = EPOCHS * (len(states) - held)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - step / steps)
            loss(step % (len(states) - held)).backward()
            optimizer.step()
            optimizer.zero_grad()
        after = held_loss()
        if not after < before:
            for gain in own:
                gain.data.fill_(1.0)
        return {"layer": index, "before": before, "after": min(before, after)}

    def _save(self, done: list[dict[str, float]]) -> None:
        tensors = {name: gain.detach() for name, gain in self.gains.items()}
        write_tensors(self.path, tensors, {"done": json.dumps(done)})

    def _restore(self) -> list[dict[str, float]]:
        """Take over the gains of an earlier process; what it found about its layers."""
        if not self.path.exists():
            return []
        tensors, metadata = read_tensors(self.path)
        with damage_named(self.path, "delete it and run again"):
            for name, gain in self.gains.items():
                gain.data.copy_(tensors[name])
            done: list[dict[str, Any]] = json.loads(metadata["done"])
        return done
