"""The full model as a teacher: its last hidden states for every window of calibration text, and what a student's
predictions differ from its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fewbit.pipeline.batches import BatchFiles
from fewbit.pipeline.calibrate import LayerStream
from fewbit.pipeline.progress import Progress

POSITIONS = 128  # positions whose logits exist at once


class Teacher:
    """What the full model's head reads for every batch of a stream's windows; through files, one layer in memory."""

    def __init__(self, stream: LayerStream, directory: Path, progress: Progress) -> None:
        """The states go into `directory`, which nothing else uses: they are of these windows and this model."""
        self.stream = stream
        self.progress = progress
        self._states = BatchFiles(directory)

    def run(self) -> None:
        """Run the full model; goes on where an earlier process stopped, and does nothing where that is done."""
        latest = self._states.latest()
        if latest is None:
            latest = 0
            with self._states.writing(0) as write:
                for number, batch in enumerate(self.stream.embed()):
                    write(number, {"hidden": batch})
        else:
            self.stream.prepare()
        self.progress.stage("running the full model", len(self.stream))
        self.progress.advance(min(latest, len(self.stream)))
        for index in range(latest, len(self.stream)):
            prefix = f"{self.stream.family.layers}.{index}"
            self.stream.load(prefix)
            self._next_states(index, partial(self.stream.run_layer, index))
            self.stream.unload(prefix)
            self.progress.advance()
        if latest <= len(self.stream):
            self._next_states(len(self.stream), self.stream.load(self.stream.family.final_norm))

    def _next_states(self, generation: int, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with torch.no_grad(), self._states.writing(generation + 1) as write:
            for number in range(len(self.stream.batches)):
                write(number, {"hidden": function(self._states.read(generation, number)["hidden"])})
        self._states.discard(generation)

    def hidden(self, batch: int) -> torch.Tensor:
        """The states of a batch in front of the head, float32 `[positions, H]`."""
        return self._states.read(len(self.stream) + 1, batch)["hidden"].flatten(0, 1)

    def discard(self) -> None:
        """Free the states' space."""
        shutil.rmtree(self._states.directory, ignore_errors=True)


class Divergence(torch.autograd.Function):
    """Mean KL(full || compressed) in nats from both models' last hidden states `[n, H]` and heads `[V, H]`,
    `POSITIONS` at a time.

    The gradient is computed on the way where one is asked for, so no logits outlive their positions.
    """

    @staticmethod
    def forward(
        context: Any, hidden: torch.Tensor, head: torch.Tensor, full: torch.Tensor, full_head: torch.Tensor
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden) if context.needs_input_grad[0] else None
        total = 0.0
        for start in range(0, hidden.shape[0], POSITIONS):
            part = slice(start, start + POSITIONS)
            expected = (full[part] @ full_head.T).log_softmax(-1)
            found = (hidden[part] @ head.T).log_softmax(-1)
            chance = expected.exp()
            total += float((chance * expected.sub_(found)).sum(dtype=torch.float64))
            if gradient is not None:
                gradient[part] = found.exp_().sub_(chance) @ head
        if gradient is not None:
            context.save_for_backward(gradient.div_(hidden.shape[0]))
        return torch.tensor(total / hidden.shape[0])

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return context.saved_tensors[0] * gradients[0], None, None, None
