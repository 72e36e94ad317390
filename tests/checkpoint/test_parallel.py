"""Matrices cut for tensor parallelism."""

from __future__ import annotations

import pytest
import torch

from fewbit.checkpoint.artifact import QuantizedModule
from fewbit.checkpoint.parallel import Span, allowed_sizes, column_step, cut, cut_part
from fewbit.errors import UnsupportedShape
from fewbit.formats import format_names, get_format
from fewbit.math.hadamard import pack_signs, random_signs
from fewbit.models import get_family

ROWS, COLS = 72, 512
FAMILY = get_family("llama")


def packed(name: str) -> tuple[QuantizedModule, dict[str, torch.Tensor]]:
    fmt = get_format(name)
    choices = {"rank": 64} if name in ("twinquant", "svdquant") else {}
    rows = 288 if choices else ROWS
    spec = fmt.spec(rows, COLS, fmt.bits[-1], **choices)
    weight = torch.randn(rows, COLS, generator=torch.Generator().manual_seed(0))
    signs = random_signs(COLS, 1)
    parts = fmt.quantize(weight, spec, signs if spec.block > 1 else None, {}).parts
    if spec.block > 1:
        parts["signs"] = pack_signs(signs)
    if "offset" in parts:
        parts["offset"] = torch.arange(rows).float()
    return QuantizedModule("model.layers.0.mlp.down_proj", spec, "body"), parts


@pytest.mark.parametrize("name", format_names())
def test_what_ranks_hold_decodes_to_their_rows_and_columns(name):
    module, parts = packed(name)
    spec = module.spec
    whole = get_format(name).dequantize(parts, spec)
    step = column_step(spec)
    for rows in (Span(0, 32), Span(32, spec.rows)):
        for cols in (Span(0, step), Span(step, COLS)):
            own = cut(module, rows, cols)
            taken = {part: cut_part(module, part, tensor, rows, cols) for part, tensor in parts.items()}
            assert {part: tuple(tensor.shape) for part, tensor in taken.items()} == {
                part: shape for part, (shape, _) in own.layout().items()
            }
            found = get_format(name).dequantize(taken, own.spec)
            assert torch.equal(found, whole[rows.start : rows.stop, cols.start : cols.stop]) or torch.allclose(
                found, whole[rows.start : rows.stop, cols.start : cols.stop], rtol=1e-5, atol=1e-6
            )


def test_signs_follow_their_columns_and_offsets_are_added_once():
    module, parts = packed("twinquant")
    rows = Span(0, module.spec.rows)
    halves = [Span(0, 256), Span(256, 512)]
    signs = torch.cat([cut_part(module, "signs", parts["signs"], rows, half) for half in halves])
    assert torch.equal(signs, parts["signs"])
    first, second = (cut_part(module, "offset", parts["offset"], rows, half) for half in halves)
    assert torch.equal(first, parts["offset"])
    assert not second.any()


@pytest.mark.parametrize(
    ("rows", "cols", "said"),
    [
        (Span(0, 24), Span(0, 512), "rows cannot be cut at 0 and 24, only at multiples of 16"),
        (Span(0, 72), Span(0, 128), "512 inputs cannot be cut at 0 and 128, only at multiples of 256"),
        (Span(0, 88), Span(0, 512), "rows 0 to 88 of 72 do not exist"),
    ],
)
def test_a_cut_that_splits_what_decodes_together_is_refused(rows, cols, said):
    module, _ = packed("trellis")
    with pytest.raises(UnsupportedShape, match=rf"layers\.0\.mlp\.down_proj: .*{said}"):
        cut(module, rows, cols)


def modules_of(hidden: int, inner: int, kv_rows: int, vocabulary: int, name: str = "trellis") -> list[QuantizedModule]:
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    fmt = get_format(name)
    body = [QuantizedModule(f"model.layers.0.{n}", fmt.spec(*s, fmt.bits[-1]), "body") for n, s in shapes.items()]
    table = QuantizedModule("model.embed_tokens", get_format("trellis").spec(vocabulary, hidden, 4), "embed")
    return [*body, table]


@pytest.mark.parametrize(
    ("shapes", "heads", "kv_heads", "expected"),
    [
        ((4096, 14336, 1024, 128256), 32, 8, [1, 2, 4, 8]),  # LLaMA 3 8B
        ((576, 1536, 192, 49152), 9, 3, [1, 3]),  # SmolLM2 135M: o_proj has groups of 192 inputs
        ((896, 4864, 128, 151936), 14, 2, [1]),  # Qwen2.5 0.5B
        ((1024, 2048, 128, 1000), 8, 1, [1, 2, 4]),  # one head of keys and values, on every rank
    ],
)
def test_the_allowed_sizes_of_known_shapes(shapes, heads, kv_heads, expected):
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    assert allowed_sizes(modules_of(*shapes), FAMILY, config) == expected


def test_a_model_without_grouped_heads_needs_no_number_of_them():
    assert allowed_sizes(modules_of(1024, 2048, 1024, 1024), FAMILY, {"num_attention_heads": 8}) == [1, 2, 4]
