"""Decoding as an operator: the formats' own results, under opcheck."""

from __future__ import annotations

import pytest
import torch

from fewbit.checkpoint.artifact import QuantizedModule
from fewbit.formats import get_format
from fewbit.math.hadamard import pack_signs, random_signs, unrotate
from fewbit.math.rounding import quantize_rotated
from fewbit.modules import FewbitEmbedding
from fewbit.ops.decode import spec_text


@pytest.fixture(params=["trellis", "int8", "int4"])
def table(request):
    """An embedding `[50, 256]`, loaded but not placed yet, and its values, un-rotated."""
    fmt = get_format(request.param)
    spec = fmt.spec(50, 256, fmt.bits[-1])
    weight = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    done = quantize_rotated(fmt, weight, spec, None)
    module = FewbitEmbedding(QuantizedModule("table", spec, "embed"), torch.float32)
    signs, values = random_signs(256, 1), done.values
    module.load_state_dict({**done.parts, **({"signs": pack_signs(signs)} if spec.block > 1 else {})})
    return module, done.values, unrotate(values, signs, spec.block) if spec.block > 1 else values


@pytest.mark.parametrize("placed", [False, True])
def test_the_operator_gives_what_the_format_decodes(table, placed):
    module, rotated, plain = table
    if placed:
        module.place()
    rows = torch.tensor([49, 0, 17, 17, 3])
    stored = module.parts()
    in_order = [stored[name] for name in get_format(module.spec.format).layout(module.spec)]
    decode = (in_order, spec_text(module.spec))
    assert torch.equal(torch.ops.fewbit.decode(*decode), rotated)
    torch.testing.assert_close(module(rows), plain[rows], rtol=0, atol=1e-6)
    torch.library.opcheck(torch.ops.fewbit.decode, decode)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("ids", [[-1, 3], [0, 50]])
def test_ids_outside_the_table_are_refused(table, placed, ids):
    module, *_ = table
    if placed:
        module.place()
    with pytest.raises(IndexError, match="not in a table of 50 rows"):
        module(torch.tensor(ids))
    assert module(torch.tensor([], dtype=torch.long)).shape == (0, 256)
