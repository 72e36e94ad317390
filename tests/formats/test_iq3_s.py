"""The iq3_s code: ggml's block bit by bit, and an encoder that weighs all weights alike."""

import numpy as np
import pytest
import torch
from gguf.quants import IQ3_S

from fewbit.formats import get_format
from fewbit.formats.iq3_s import block_bytes, grid, nearest_points
from fewbit.math.rounding import inverse_factor, quantize_rotated

FMT = get_format("iq3_s")


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _ggml(blocks: torch.Tensor, rows: int) -> torch.Tensor:
    IQ3_S.init_grid()
    decoded = IQ3_S.dequantize_blocks(np.ascontiguousarray(blocks.reshape(-1, 110).numpy()))
    return torch.from_numpy(decoded).view(rows, -1)


def test_encoded_blocks_of_256_are_what_ggml_decodes_to_the_same_numbers():
    weight = _random(0, 9, 1024) * 0.03
    done = quantize_rotated(FMT, weight, FMT.spec(9, 1024, 3))
    assert done.parts["blocks"].shape == (9, 4, 110)
    assert torch.equal(_ggml(done.parts["blocks"], 9), done.values)


def test_arbitrary_blocks_decode_as_in_ggml():
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (5, 2, 110), generator=generator).to(torch.uint8)
    blocks[:, :, 1] &= 0b0011_1111  # a positive, finite fp16 scale
    decoded = FMT.dequantize({"blocks": blocks}, FMT.spec(5, 512, 3))
    assert torch.equal(decoded, _ggml(blocks, 5))


@pytest.mark.parametrize(("group", "size"), [(32, 16), (64, 29), (128, 56), (192, 83), (224, 97), (256, 110)])
def test_block_sizes(group, size):
    assert block_bytes(group) == size


def test_bits_per_weight_in_groups_of_256():
    assert FMT.storage_bytes(FMT.spec(16, 4096, 3)) * 8 / (16 * 4096) == 3.4375


@pytest.mark.parametrize("cols", [576, 1024])
def test_the_error_on_gaussian_weights_is_below_that_of_a_flat_ggml_encoder(cols):
    done = quantize_rotated(FMT, _random(2, 128, cols), FMT.spec(128, cols, 3))
    assert done.relative_error <= 0.0175


def test_the_error_does_not_depend_on_the_unit_of_the_weights():
    weight = _random(3, 16, 512)
    errors = [quantize_rotated(FMT, weight * unit, FMT.spec(16, 512, 3)).relative_error for unit in (0.01, 1.0, 100.0)]
    assert max(errors) < 1.02 * min(errors)


def test_a_group_with_an_odd_number_of_sub_blocks_leaves_the_last_nibble_empty():
    spec = FMT.spec(8, 32, 3)
    done = quantize_rotated(FMT, _random(4, 8, 32), spec)
    assert spec.group == 32
    assert not (done.parts["blocks"][:, :, -1] >> 4).any()
    assert torch.equal(FMT.dequantize(done.parts, spec), done.values)


def test_zeros_decode_to_zeros():
    done = quantize_rotated(FMT, torch.zeros(2, 256), FMT.spec(2, 256, 3))
    assert not done.values.any()
    assert done.relative_error == 0.0


def test_the_pruned_search_finds_the_nearest_grid_point():
    magnitudes = (_random(5, 20_000, 4) * 6.5).abs()
    distances = torch.cdist(magnitudes, grid())
    numbers, points = nearest_points(magnitudes)
    assert torch.equal(points, grid()[numbers])
    found = (magnitudes - points).norm(dim=1)
    assert float((found > distances.amin(1) + 1e-4).float().mean()) < 1e-3


def test_sub_scales_are_set_before_feedback_begins():
    weight = _random(6, 4, 256)
    mixing = _random(7, 256, 256)
    factor = inverse_factor(mixing @ mixing.t())
    spec = FMT.spec(4, 256, 3)
    plain, fed_back = quantize_rotated(FMT, weight, spec), quantize_rotated(FMT, weight, spec, factor)
    for field in (slice(0, 2), slice(106, 110)):
        assert torch.equal(plain.parts["blocks"][..., field], fed_back.parts["blocks"][..., field])
    assert not torch.equal(plain.parts["blocks"], fed_back.parts["blocks"])


def test_the_stored_bytes_are_those_of_format_version_1(fixed_weight, fingerprint):
    done = quantize_rotated(FMT, fixed_weight(17, 576), FMT.spec(17, 576, 3))
    assert fingerprint(done.parts) == "cc7e05e3c705f0b4"
