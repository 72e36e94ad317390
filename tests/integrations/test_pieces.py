"""What ranks hold of packed matrices, and layers of several of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fewbit.checkpoint.artifact import QuantizedModule
from fewbit.checkpoint.parallel import Span, cut
from fewbit.errors import CorruptFile
from fewbit.formats import get_format
from fewbit.integrations.pieces import DecodedMatrix, Fused, Piece, ready
from fewbit.math.hadamard import pack_signs, random_signs
from fewbit.modules import FewbitLinear, PackedTensor
from fewbit.ops.extension import has_native

COLS = 512


def stored(name: str, rows: int, seed: int = 0, **choices) -> tuple[QuantizedModule, dict[str, torch.Tensor]]:
    """A random matrix `[rows, 512]`; those of different seeds have the same signs."""
    fmt = get_format(name)
    spec = fmt.spec(rows, COLS, choices.pop("bits", fmt.bits[-1]), **choices)
    generator = torch.Generator().manual_seed(seed)
    signs = random_signs(COLS, 1)
    parts = fmt.quantize(torch.randn(rows, COLS, generator=generator), spec, signs, {}).parts
    parts["signs"] = pack_signs(signs)
    if "shift" in parts:
        parts["shift"] = torch.randn(COLS, generator=generator).half()
        parts["offset"] = torch.randn(rows, generator=generator)
    return QuantizedModule(f"layer.{seed}", spec, "body"), parts


def whole(module: QuantizedModule, parts: dict[str, torch.Tensor]) -> FewbitLinear:
    linear = FewbitLinear(module, False, torch.float32)
    linear.load_state_dict(parts)
    return linear


def held(module, parts, ranks: int, rank: int, columns: bool) -> PackedTensor:
    """The loaded matrix of one rank."""
    spec = module.spec
    rows, cols = (spec.rows, spec.cols // ranks) if columns else (spec.rows // ranks, spec.cols)
    piece = Piece(module, cut(module, Span(0, rows), Span(0, cols)), torch.float32)
    for part, tensor in parts.items():
        (piece.load_columns if columns else piece.load_rows)(part, tensor, rank)
    piece.check_complete()
    return piece.packed


CODES = {
    "trellis": ("trellis", {"bits": 3}),
    "twinquant": ("twinquant", {"rank": 128}),
    "without branch": ("twinquant", {}),
    "plain inputs": ("twinquant", {"rank": 128, "act_bits": 16}),
    "ternary": ("ternary", {}),
}


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_ranks_together_compute_what_the_whole_matrix_computes(kind, columns):
    name, choices = CODES[kind]
    module, parts = stored(name, 512, **choices)
    x = torch.randn(5, COLS, generator=torch.Generator().manual_seed(9)) + 1
    expected = whole(module, parts).product(x, None)
    matrices = [ready(held(module, parts, 2, rank, columns), torch.float32) for rank in range(2)]
    if not columns:
        found = torch.cat([m.product(x, None) for m in matrices], 1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        return
    found = sum(m.product(part, None) for m, part in zip(matrices, x.split(COLS // 2, 1), strict=True))
    if kind != "twinquant":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    # Each rank rounds its own part of the branch's inputs to 8 bits, which may cost more than rounding all of them.
    exact = DecodedMatrix(whole(module, parts), torch.float32).product(x, None)
    assert (found - exact).norm() < 1.5 * (expected - exact).norm() + 1e-5 * exact.norm()


def test_a_layer_of_several_matrices_computes_what_each_of_them_computes():
    x = torch.randn(5, COLS, generator=torch.Generator().manual_seed(9))
    for kinds in (
        [("trellis", 64, {"bits": 3}), ("trellis", 24, {"bits": 3}), ("trellis", 40, {"bits": 4})],
        [("twinquant", 512, {"rank": 128}), ("twinquant", 64, {"rank": 128})],
        [("ternary", 64, {}), ("ternary", 24, {})],
    ):
        matrices = [stored(name, rows, seed, **choices) for seed, (name, rows, choices) in enumerate(kinds)]
        linears = [whole(*matrix) for matrix in matrices]
        fused = Fused([ready(whole(*matrix), torch.float32) for matrix in matrices])
        assert fused.joint == (kinds[0][0] == "trellis")
        bias = torch.arange(sum(fused.rows)).float()
        expected = [linear.product(x, b) for linear, b in zip(linears, bias.split(fused.rows), strict=True)]
        torch.testing.assert_close(fused.product(x, bias), torch.cat(expected, 1), rtol=1e-4, atol=1e-3)


def test_matrices_with_other_signs_are_multiplied_each_by_itself():
    first, second = (stored("trellis", 32, seed) for seed in range(2))
    second[1]["signs"] = pack_signs(random_signs(COLS, 2))
    fused = Fused([ready(whole(*matrix), torch.float32) for matrix in (first, second)])
    assert not fused.joint
    x = torch.randn(2, COLS, generator=torch.Generator().manual_seed(9))
    expected = torch.cat([whole(*matrix).product(x, None) for matrix in (first, second)], 1)
    assert torch.equal(fused.product(x, None), expected)


@pytest.mark.parametrize(
    ("name", "choices", "kernel"),
    [
        ("trellis", {}, True),
        ("twinquant", {"rank": 128}, True),
        ("twinquant", {"act_bits": 16}, False),
        ("ternary", {}, False),
    ],
)
def test_what_has_no_kernel_is_decoded(name, choices, kernel):
    matrix = ready(whole(*stored(name, 32, **choices)), torch.bfloat16)
    assert isinstance(matrix, PackedTensor) == kernel
    assert isinstance(matrix, DecodedMatrix) != kernel


def test_rows_behind_the_last_one_are_zeros():
    module, parts = stored("trellis", 40)
    padded = replace(module, kind="embed", spec=replace(module.spec, rows=64))
    piece = Piece(module, padded, torch.float32)
    piece.packed.codes.fill_(77)
    piece.packed.scales.fill_(7)
    for part, tensor in parts.items():
        piece.load_rows(part, tensor, 0)
    rows = piece.packed(torch.arange(64))
    torch.testing.assert_close(rows[:40], whole(module, parts).plain_weight())
    assert not rows[40:].any()


def test_parts_that_are_wrong_or_missing_are_named():
    module, parts = stored("trellis", 32)
    piece = Piece(module, module, torch.float32)
    with pytest.raises(CorruptFile, match=r"layer\.0\.scales arrived as F16 \(32, 1\) instead of F16 \(32, 2\)"):
        piece.load_rows("scales", parts["scales"][:, :1], 0)
    for part in set(parts) - {"tables"}:
        piece.load_rows(part, parts[part], 0)
    with pytest.raises(CorruptFile, match=r"lacks the tensor layer\.0\.tables"):
        piece.check_complete()


@pytest.mark.skipif(
    not has_native() or not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs the native extension and two cores",
)
@pytest.mark.parametrize(
    ("variable", "value"),
    [("GOMP_CPU_AFFINITY", "{0} {1}"), ("KMP_AFFINITY", "granularity=fine,explicit,proclist=[{0},{1}]")],
)
def test_threads_use_the_cores_that_openmp_was_given_though_the_caller_is_bound_to_one(variable, value):
    first, second, *_ = sorted(os.sched_getaffinity(0))
    program = (
        "import json, os, sys\n"
        "import fewbit.ops.cpu\n"
        "from pathlib import Path\n"
        "from fewbit import _native\n"
        "from fewbit.integrations.pieces import use_all_cores\n"
        f"os.sched_setaffinity(0, {{{first}}})\n"
        "before = set(os.listdir('/proc/self/task'))\n"
        "use_all_cores()\n"
        "started = [int(task) for task in set(os.listdir('/proc/self/task')) - before]\n"
        "print(json.dumps([_native.num_threads(), sorted(os.sched_getaffinity(0)),\n"
        "                  [sorted(os.sched_getaffinity(task)) for task in started]]))\n"
    )
    settings = {**os.environ, variable: value.format(first, second), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=settings, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [2, [first], [[first, second]]]
