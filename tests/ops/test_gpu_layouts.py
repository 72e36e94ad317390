"""Layouts of graphics processors hold the stored numbers, and the reference reads them."""

from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fewbit import modules
from fewbit.checkpoint.artifact import QuantizedModule
from fewbit.formats import get_format
from fewbit.math.hadamard import pack_signs, random_signs
from fewbit.math.rounding import quantize_rotated
from fewbit.modules import FewbitLinear
from fewbit.ops import reference
from fewbit.ops.gpu_layouts import gpu_matrix

CASES = [
    ("trellis", 2, 17, 192),
    ("trellis", 3, 40, 512),
    ("trellis", 4, 16, 96),
    ("int4", 4, 33, 256),
    ("ternary", 3, 17, 96),
    ("ternary", 3, 48, 512),
    ("iq3_s", 3, 17, 192),
    ("iq3_s", 3, 32, 256),
]


@pytest.mark.parametrize(("name", "bits", "rows", "cols"), CASES)
def test_layouts_decode_to_the_stored_weights(name, bits, rows, cols):
    fmt = get_format(name)
    spec = fmt.spec(rows, cols, bits)
    parts = quantize_rotated(fmt, torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)), spec, None)
    matrix = gpu_matrix(parts.parts, spec)
    stored = (matrix.codes, matrix.scales, matrix.tensor_scale, matrix.tables)
    found = reference.float_weights(*stored, cols, bits, matrix.code)
    torch.testing.assert_close(found, fmt.dequantize(parts.parts, spec), rtol=1e-6, atol=0)
    assert matrix.scales.stride(1) == rows or spec.groups == 1  # neighbouring rows are neighbours in memory


@pytest.mark.parametrize(("name", "bits", "choices"), [
    ("trellis", 3, {}), ("ternary", 3, {}), ("iq3_s", 3, {}),
    ("twinquant", 4, {"rank": 32, "act_bits": 8}), ("twinquant", 4, {"act_bits": 4}),
    ("twinquant", 4, {"rank": 32, "act_bits": 16}),
])  # fmt: skip
def test_a_module_gives_with_these_layouts_what_its_weights_say(name, bits, choices):
    rows, cols = 128, 160
    fmt = get_format(name)
    spec = fmt.spec(rows, cols, bits, **choices)
    generator = torch.Generator().manual_seed(0)
    signs = random_signs(cols, 1)
    parts = fmt.quantize(torch.randn(rows, cols, generator=generator), spec, signs, {}).parts
    module = FewbitLinear(QuantizedModule("a.linear", spec, "linear"), bias=False, dtype=torch.float32)
    for part, tensor in {**parts, "signs": pack_signs(signs)}.items():
        setattr(module, part, tensor)
    x = torch.randn(5, cols, generator=generator)
    exact = torch.nn.functional.linear(x, module.plain_weight())
    error = (module.gpu_product(x, None) - exact).norm() / exact.norm()
    assert error < {4: 0.2, 8: 0.02, 16: 1e-5}[spec.act_bits or 8]


def test_a_format_without_a_layout_is_refused():
    spec = get_format("lloyd8").spec(16, 64, 3)
    with pytest.raises(ValueError, match="no kernel layout for format lloyd8"):
        gpu_matrix({}, spec)


@pytest.mark.parametrize(
    ("name", "bits"), [("trellis", 3), ("ternary", 3), ("iq3_s", 3), ("twinquant", 4), ("lloyd8", 3), ("int8", 8)]
)
def test_a_module_is_placed_wherever_its_parts_are(name, bits, monkeypatch):
    """The meta device stands for a graphics processor here; formats without kernels stay as they are there."""
    monkeypatch.setattr(modules, "KERNEL_DEVICES", {"cpu", "meta"})
    spec = get_format(name).spec(32, 160, bits)
    module = FewbitLinear(QuantizedModule("a.linear", spec, "linear"), bias=False, dtype=torch.float32)
    module.place()
    module.to("meta").place()
    assert module.code == spec.format  # no lanes
    assert bool(module._gpu) == (name in modules.GPU_FORMATS)
    assert {part.device.type for part in module.parts().values()} == {"meta"}


def test_what_accelerate_takes_away_after_every_pass_is_not_kept(monkeypatch):
    monkeypatch.setattr(modules, "KERNEL_DEVICES", {"cpu", "meta"})
    spec = get_format("trellis").spec(32, 160, 3)
    module = FewbitLinear(QuantizedModule("a.linear", spec, "linear"), bias=False, dtype=torch.float32).to("meta")
    module._hf_hook = SimpleNamespace(offload=True)
    module.place()
    assert module._gpu == ()
    module._hf_hook = SimpleNamespace(offload=False)
    module.place()
    assert module._gpu


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a graphics processor."""

    device = property(lambda self: torch.device("cuda"))


class NoWaiting(TorchFunctionMode):
    """Makes reading a value an error, and what goes to a graphics processor on the CPU."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        assert function.__name__ not in ("__bool__", "__index__", "__int__", "item", "tolist"), "a value was read"
        keywords = dict(keywords or {})
        if str(keywords.get("device")) == "cuda":
            keywords["device"] = "cpu"
        return function(*arguments, **keywords)


@pytest.mark.parametrize(("name", "bits"), [("trellis", 4), ("int8", 8), ("int4", 4)])
def test_looking_rows_up_on_a_graphics_processor_waits_for_no_value(name, bits):
    fmt = get_format(name)
    spec = fmt.spec(96, 64, bits)
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(5))
    parts = fmt.quantize(weight, spec, None, {}).parts
    rows = torch.tensor([3, 95, 17])
    expected = fmt.dequantize_rows(parts, spec, rows)
    elsewhere = {part: tensor.as_subclass(Elsewhere) for part, tensor in parts.items()}
    with NoWaiting():
        found = fmt.dequantize_rows(elsewhere, spec, rows)
    assert torch.equal(found.as_subclass(torch.Tensor), expected)
