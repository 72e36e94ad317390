"""Packed modules: whatever the machine does to their layout, they compute and save the same."""

from __future__ import annotations

import pytest
import torch

from fewbit.checkpoint.artifact import QuantizedModule
from fewbit.formats import get_format
from fewbit.math.hadamard import pack_signs, random_signs
from fewbit.math.rounding import quantize_rotated
from fewbit.modules import FewbitEmbedding, FewbitLinear
from fewbit.ops.extension import load_native

native = load_native()
ISAS = [*native.available_isas(), *native.emulated_isas()] if native else []
needs_native = pytest.mark.skipif(native is None, reason="the native extension is not built")


@pytest.fixture
def isa():
    """`isa(name)` switches the instruction set until the test ends."""
    before = native.isa()
    yield native.select_isa
    native.select_isa(before)


def packed(kind, rows: int, cols: int, bits: int):
    weight_format = get_format("trellis")
    spec = weight_format.spec(rows, cols, bits)
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)) * 0.05
    description = QuantizedModule("layer", spec, "linear")
    module = kind(description, False, torch.float32) if kind is FewbitLinear else kind(description, torch.float32)
    parts = quantize_rotated(weight_format, weight, spec).parts
    module.load_state_dict({**parts, "signs": pack_signs(random_signs(cols, 1))})
    return module


@needs_native
@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("rows", "cols", "bits"), [(40, 256, 3), (17, 192, 4), (96, 64, 2), (33, 96, 3)])
def test_placing_changes_neither_products_nor_what_is_saved(isa, name, rows, cols, bits):
    isa(name)
    module = packed(FewbitLinear, rows, cols, bits)
    x = torch.randn(5, cols, generator=torch.Generator().manual_seed(2))
    y, saved = module(x), {key: part.clone() for key, part in module.state_dict().items()}
    module.place()
    module.place()
    assert (module.code == "lanes") == (native.lane_groups() > 1 and cols % 64 == 0)
    assert torch.equal(module(x), y)
    assert all(torch.equal(part, saved[key]) for key, part in module.state_dict().items())
    assert torch.equal(module.plain_weight(), packed(FewbitLinear, rows, cols, bits).plain_weight())


@needs_native
def test_a_placed_module_works_under_another_instruction_set_and_takes_a_new_state(isa):
    isa("avx2" if "avx2" in ISAS else native.available_isas()[-1])
    module = packed(FewbitLinear, 40, 256, 3)
    x = torch.randn(3, 256)
    y, state = module(x), module.state_dict()
    module.place()
    isa("portable")
    assert torch.equal(module(x), y)
    module.load_state_dict(state)
    assert module.code == "trellis"
    assert torch.equal(module(x), y)


@needs_native
@pytest.mark.parametrize("name", ISAS)
def test_rows_looked_up_in_a_placed_table_are_the_stored_ones(isa, name):
    isa(name)
    table = packed(FewbitEmbedding, 50, 192, 4)
    ids = torch.tensor([[49, 0, 17], [17, 33, 16]])
    rows = table(ids)
    table.place()
    assert torch.equal(table(ids), rows)
