"""Makes the shards of a plan: decoder layers in order, then the tables.

A shard that is there and belongs to the same plan is not made again.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fewbit.checkpoint.source import Source
from fewbit.checkpoint.store import write_tensors
from fewbit.math.hadamard import rotate_hessian
from fewbit.math.rounding import inverse_factor
from fewbit.models import get_family
from fewbit.pipeline.body import Body
from fewbit.pipeline.calibrate import LayerStream
from fewbit.pipeline.damping import USUAL
from fewbit.pipeline.executors import Executor
from fewbit.pipeline.jobs import RoundJob, read_shard, tensor_signs
from fewbit.pipeline.plan import Plan, PlannedTensor
from fewbit.pipeline.progress import Progress


class ShardMaker:
    """Rounds what a plan wants rounded; everything that must survive this process is in files."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        windows: torch.Tensor | None,
        work: Path,
        executor: Executor,
        progress: Progress,
    ) -> None:
        self.source = source
        self.plan = plan
        self.work = work
        self.executor = executor
        self.progress = progress
        self.resumed = 0
        self._body: Body | None = None
        if windows is not None:
            dtype = getattr(torch, plan.options["calib_dtype"])
            stream = LayerStream(source, get_family(plan.model_type), windows, dtype)
            self._body = Body(stream, plan, work, executor, progress)

    def layers(self) -> None:
        """Quantize the decoder layers, in order."""
        if self._body is None:
            body = [tensor for tensor in self.plan.quantized if tensor.kind == "body"]
            self._round_all("rounding the layers", body, "")
            return
        self._body.run()
        self.resumed += self._body.resumed

    def tables(self) -> None:
        """Quantize the output head and the embeddings."""
        tables = [tensor for tensor in self.plan.quantized if tensor.kind in ("head", "embed")]
        # A tied table is read by the head as well, and the head's error is what reaches the logits.
        fed_back = [tensor for tensor in tables if tensor.kind == "head" or self.source.tied_embeddings]
        if self._body is not None and fed_back:
            missing = [tensor for tensor in fed_back if read_shard(self.work, self.plan, tensor) is None]
            calibration = self._head_calibration(self._body, missing[0]) if missing else ""
            self._round_all("rounding the output head", fed_back, calibration)
            if calibration:
                (self.work / calibration).unlink()
            tables = [tensor for tensor in tables if tensor not in fed_back]
        if tables:
            self._round_all("rounding the embeddings", tables, "")

    def _head_calibration(self, body: Body, tensor: PlannedTensor) -> str:
        assert tensor.spec is not None
        hessian, signs = body.head_hessian(), tensor_signs(tensor)
        if signs is not None:
            hessian = rotate_hessian(hessian, signs, tensor.spec.block)
        damping = self.plan.options["damping"]
        name = "calibration-head.safetensors"
        factor = inverse_factor(hessian, USUAL if damping == "auto" else damping)
        write_tensors(self.work / name, {"factor": factor})
        return name

    def _round_all(self, title: str, tensors: list[PlannedTensor], calibration: str) -> None:
        """Round tensors that do not wait for one another."""
        self.progress.stage(title, len(tensors))
        missing = [tensor for tensor in tensors if read_shard(self.work, self.plan, tensor) is None]
        self.resumed += len(tensors) - len(missing)
        self.progress.advance(len(tensors) - len(missing))
        jobs = [RoundJob(str(self.work), tensor.name, calibration) for tensor in missing]
        for record in self.executor.run(jobs):
            self.progress.tensor(record)
            self.progress.advance()
