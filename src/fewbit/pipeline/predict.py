"""Predicts what a plan will take, from a short measurement on this machine.

Time is counted in the two things a run spends it on, matrix products of calibration and encoding of
weights; memory is the largest set of tensors that exist at once. Both are estimates, to plan by.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fewbit.formats import GroupFormat, get_format, group_format
from fewbit.math.rounding import inverse_factor, quantize_rotated
from fewbit.pipeline.calibrate import WINDOWS_PER_BATCH, bfloat16_products
from fewbit.pipeline.descent import WINDOWS_PER_STEP
from fewbit.pipeline.learn import moved_bytes, weight_bytes
from fewbit.pipeline.memory import activation_bytes, computed_again, rounding_bytes
from fewbit.pipeline.plan import Plan, PlannedTensor
from fewbit.pipeline.tune_layers import EPOCHS, LEARNED
from fewbit.resident import resident_bytes

SAMPLE_ROWS, SAMPLE_COLS = 256, 512
SAMPLE_TOKENS, SAMPLE_SIDE = 1024, 2048
REPEATS = 5
PRODUCT_SHARE = 0.5  # of the time of what is counted as products; fitted to benchmarks/cost.py with AVX2


def predict(plan: Plan, windows: torch.Tensor | None) -> dict[str, Any]:
    """`seconds` and `peak_memory_bytes` of running `plan` with calibration `windows` int64 `[n, window]`."""
    weights: dict[tuple[str, int], int] = {}
    for tensor in plan.quantized:
        if tensor.spec is not None:
            kind = (tensor.spec.format, tensor.spec.bits)
            weights[kind] = weights.get(kind, 0) + tensor.weights
    encode = sum(count / _encoding_rate(*kind, windows is not None) for kind, count in weights.items())
    products = 0.0
    if windows is not None:
        products = _calibration_operations(plan, windows.numel()) + _tuning_operations(plan, windows.shape[1])
        products += _learning_operations(plan, windows.shape[1])
    dtype = getattr(torch, plan.options["calib_dtype"]) if windows is not None else torch.float32
    rate = PRODUCT_SHARE * _product_rate(plan, dtype) if products else 1.0
    return {"seconds": round(encode + products / rate, 4), "peak_memory_bytes": _memory(plan, windows)}


def _calibration_operations(plan: Plan, tokens: int) -> float:
    """Floating-point operations of running every layer, its first half once more, and of the Hessians, of which half
    is computed."""
    body = [tensor for tensor in plan.tensors if tensor.kind == "body"]
    hessians = {tensor.shared_input: tensor.shape[1] ** 2 for tensor in body}
    return 2.0 * tokens * (1.3 * sum(tensor.weights for tensor in body) + 0.5 * sum(hessians.values()))


def _tuning_operations(plan: Plan, window: int) -> float:
    """The full model once over all tokens, three products per weight and token on the way there and back, and the
    layers' own tuning."""
    tokens = int(plan.options["tune_steps"]) * WINDOWS_PER_STEP * window
    body = sum(tensor.weights for tensor in plan.tensors if tensor.kind == "body")
    head = max((tensor.weights for tensor in plan.tensors if tensor.kind in ("embed", "head")), default=0)
    alone = (3 * EPOCHS + 3) * LEARNED * WINDOWS_PER_STEP * window if tokens else 0
    return 2.0 * (4 * body + 3 * head) * tokens + 2.0 * body * alone


def _learning_operations(plan: Plan, window: int) -> float:
    """The full model once over all tokens; for each step a weight's turn and its product with every token, both
    computed again on the way back, and their gradients."""
    steps = int(plan.options["learn_steps"])
    tokens = steps * WINDOWS_PER_STEP * window
    body = [tensor for tensor in plan.tensors if tensor.kind == "body"]
    weights = sum(tensor.weights for tensor in body)
    table = next(tensor for tensor in plan.tensors if tensor.kind == "embed")
    turns = steps * 3 * weights * table.shape[1]
    return 2.0 * (5 * weights + 3 * table.weights) * tokens + 2.0 * turns


def _memory(plan: Plan, windows: torch.Tensor | None) -> int:
    layers: dict[str, int] = {}
    for tensor in plan.tensors:
        if tensor.kind == "body":
            layer = tensor.shared_input.partition(".")[0]
            layers[layer] = layers.get(layer, 0) + 4 * tensor.weights
    rounding = max(map(rounding_bytes, plan.quantized), default=0)
    hidden = 0
    hessian = 0
    if windows is not None:
        table = next(tensor for tensor in plan.tensors if tensor.kind == "embed")
        widest = max((tensor.shape[1] for tensor in plan.quantized), default=0)
        hidden = 4 * WINDOWS_PER_BATCH * windows.shape[1] * (table.shape[1] + 4 * widest)
        hessian = max((_factor_bytes(tensor) for tensor in plan.quantized), default=0)
    largest_layer = max(layers.values(), default=0)
    table_bytes = max((4 * t.weights for t in plan.tensors if t.kind in ("embed", "head")), default=0)
    present = resident_bytes()
    if windows is not None and (plan.options["tune"] or plan.options["learn"]):
        # The whole model in float32, half of it once more beside it, and what a step keeps for the way back.
        whole = sum(4 * tensor.weights for tensor in plan.tensors)
        kept = activation_bytes(plan, WINDOWS_PER_STEP * windows.shape[1])
        if plan.options["learn"]:
            kept += weight_bytes(plan)
        if computed_again(kept):
            moved = moved_bytes(plan) if plan.options["learn"] else 0
            kept = kept // len(layers) + (0 if computed_again(moved) else moved)
        return int(present + 1.5 * whole + kept)
    return int(present + hidden + max(largest_layer, table_bytes) + hessian + rounding)


def _factor_bytes(tensor: PlannedTensor) -> int:
    # The Hessian and its factor, both in float32.
    return 2 * 4 * tensor.shape[1] ** 2


def _seconds(work: Callable[[], object]) -> float:
    """The median of a few runs."""
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _encoding_rate(name: str, bits: int, feedback: bool) -> float:
    """Weights per second of a format on a small sample."""
    found = get_format(name)
    weight_format = found if isinstance(found, GroupFormat) else group_format("int4")
    spec = weight_format.spec(SAMPLE_ROWS, SAMPLE_COLS, bits)
    weight = torch.randn(SAMPLE_ROWS, SAMPLE_COLS)
    factor = inverse_factor(torch.eye(SAMPLE_COLS)) if feedback else None
    return weight.numel() / _seconds(lambda: quantize_rotated(weight_format, weight, spec, factor))


def _product_rate(plan: Plan, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product such as calibration runs: the largest of a layer, which for
    small models is small enough to be slower than others."""
    shape = max((tensor for tensor in plan.tensors if tensor.kind == "body"), key=lambda tensor: tensor.weights).shape
    rows, cols = (min(size, SAMPLE_SIDE) for size in shape)
    x, weight = torch.randn(SAMPLE_TOKENS, cols), torch.randn(rows, cols)
    with bfloat16_products(dtype):
        return 2.0 * x.numel() * rows / _seconds(lambda: x @ weight.T)
