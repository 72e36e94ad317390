"""The rotation: what makes it a rotation, what it preserves, and how its sizes follow from a tensor's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.math.hadamard import (
    fwht,
    pack_signs,
    random_signs,
    rotate,
    rotate_hessian,
    rotate_moment,
    rotation_block,
    scale_group,
    unpack_signs,
    unrotate,
)

BLOCKS = st.sampled_from([1, 2, 4, 8, 32, 64, 128, 256])
SEEDS = st.integers(0, 2**31 - 1)


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(BLOCKS)
@settings(deadline=None)
def test_the_transform_is_an_orthonormal_symmetric_matrix(block):
    matrix = fwht(torch.eye(block, dtype=torch.float64), block)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(block, dtype=torch.float64))
    assert torch.equal(matrix, matrix.t())
    assert torch.equal(matrix.abs(), torch.full_like(matrix, 1 / math.sqrt(block)))


@given(SEEDS, BLOCKS, st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None)
def test_it_is_its_own_inverse_and_preserves_norms(seed, block, blocks, rows):
    x = _random(seed, rows, block * blocks)
    y = fwht(x, block)
    torch.testing.assert_close(fwht(y, block), x)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))


@given(SEEDS, BLOCKS, st.floats(-10, 10), st.floats(-10, 10))
@settings(deadline=None)
def test_it_is_linear(seed, block, a, b):
    x, y = _random(seed, 2, 2, 2 * block)
    torch.testing.assert_close(fwht(a * x + b * y, block), a * fwht(x, block) + b * fwht(y, block))


@given(SEEDS, st.sampled_from([64, 96, 256, 576, 896, 1536]))
@settings(deadline=None, max_examples=25)
def test_rotated_weights_times_rotated_inputs_are_the_plain_product(seed, cols):
    block = rotation_block(cols)
    signs = random_signs(cols, seed)
    weight, x = _random(seed, 5, cols).float(), _random(seed + 1, 3, cols).float()
    product = x @ weight.t()
    rotated = rotate(x, signs, block) @ rotate(weight, signs, block).t()
    assert float((rotated - product).norm() / product.norm()) < 1e-5


@given(SEEDS, st.sampled_from([32, 64, 256]), st.integers(0, 2))
@settings(deadline=None)
def test_a_block_reaches_no_other_block(seed, block, touched):
    x = _random(seed, 3 * block)
    y = x.clone()
    y[touched * block : (touched + 1) * block] += 1.0
    changed = (fwht(x, block) != fwht(y, block)).view(3, block).any(1)
    assert changed.tolist() == [index == touched for index in range(3)]


@given(SEEDS, st.sampled_from([32, 576, 4096]))
@settings(deadline=None, max_examples=25)
def test_unrotate_undoes_rotate(seed, cols):
    signs = random_signs(cols, seed)
    weight = _random(seed, 2, cols).float()
    back = unrotate(rotate(weight, signs, rotation_block(cols)), signs, rotation_block(cols))
    torch.testing.assert_close(back, weight, rtol=0, atol=1e-5)


def test_without_signs_a_constant_block_collapses_onto_one_coefficient():
    y = fwht(torch.full((256,), 0.5), 256)
    assert float(y[0]) == 8.0
    assert not y[1:].any()


def test_with_signs_a_constant_block_spreads():
    y = rotate(torch.full((256,), 0.5), random_signs(256, 1), 256)
    torch.testing.assert_close(y.norm(), torch.tensor(8.0))
    assert float(y.abs().max()) < 8.0 / 4
    assert int((y != 0).sum()) > 200


@pytest.mark.parametrize(
    ("cols", "block", "group"),
    [(576, 64, 192), (896, 128, 128), (1536, 256, 256), (4096, 256, 256), (8960, 256, 256), (64, 64, 64)],
)
def test_blocks_and_groups_of_real_layer_widths(cols, block, group):
    assert rotation_block(cols) == block
    assert scale_group(cols, block) == group


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least one input"):
        rotation_block(0)
    with pytest.raises(ValueError, match="does not divide"):
        scale_group(100, 64)
    with pytest.raises(ValueError, match="power of two"):
        fwht(torch.zeros(96), 96)
    with pytest.raises(ValueError, match="multiple of the rotation block"):
        fwht(torch.zeros(96), 64)


@given(st.integers(1, 300), SEEDS)
@settings(deadline=None)
def test_signs_survive_packing(cols, seed):
    signs = random_signs(cols, seed)
    packed = pack_signs(signs)
    assert packed.shape == ((cols + 7) // 8,)
    assert torch.equal(unpack_signs(packed, cols), signs)


def test_signs_are_packed_least_significant_bit_first():
    signs = torch.ones(10)
    signs[[0, 3, 9]] = -1
    assert pack_signs(signs).tolist() == [0b1001, 0b10]


def test_signs_follow_from_their_seed():
    assert torch.equal(random_signs(512, 7), random_signs(512, 7))
    assert not torch.equal(random_signs(512, 7), random_signs(512, 8))
    assert set(random_signs(512, 7).tolist()) == {1.0, -1.0}


def test_the_rotated_hessian_is_the_second_moment_of_rotated_inputs():
    x, signs = _random(3, 500, 192), random_signs(192, 3)
    rotated = rotate(x, signs, 64)
    torch.testing.assert_close(rotate_hessian(x.t() @ x, signs, 64), rotated.t() @ rotated)


@pytest.mark.parametrize(("cols", "block"), [(576, 64), (512, 256), (1024, 512)])
def test_a_moment_is_turned_in_its_own_place_as_a_hessian_is(cols, block):
    x = torch.randn(700, cols, generator=torch.Generator().manual_seed(3))
    signs, moment = random_signs(cols, 4), x.T @ x / 700
    expected = rotate_hessian(moment, signs, block)
    rotate_moment(moment, signs, block)
    torch.testing.assert_close(moment, expected, rtol=1e-5, atol=1e-5)
