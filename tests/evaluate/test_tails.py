"""Tails of weights: known distributions, and what a rotation does to outliers."""

from __future__ import annotations

import pytest
import torch

from fewbit.evaluate.tails import (
    RotatedLayer,
    density,
    heaviest_tails,
    kurtosis,
    outlier_map,
    rounding_errors,
    tails,
    unit_groups,
)
from fewbit.formats import get_format
from fewbit.math.hadamard import random_signs


def test_density_integrates_to_the_share_inside_the_range():
    values = torch.tensor([-3.0, -0.5, 0.5, 0.6, 100.0])
    assert sum(density(values, edge=4.0, bins=8)) == pytest.approx(4 / 5)


def test_kurtosis_of_known_distributions():
    generator = torch.Generator().manual_seed(0)
    assert kurtosis(torch.randn(200_000, generator=generator)) == pytest.approx(3.0, abs=0.1)
    assert kurtosis(torch.tensor([-1.0, 1.0])) == pytest.approx(1.0)


def test_unit_groups_have_mean_square_one_and_survive_zeros():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    weight[2] = 0
    squares = unit_groups(weight, 32).square().view(4, 2, 32).mean(-1)
    assert torch.allclose(squares[[0, 1, 3]], torch.ones(3, 2))
    assert (squares[2] == 0).all()


def test_rotation_makes_outliers_normal_and_lowers_the_error():
    spec = get_format("ternary").spec(64, 256, 3)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    weight[:, 17] *= 12
    layer = RotatedLayer("layer.weight", spec, random_signs(256, 3))
    found = {**tails(layer, weight), **rounding_errors(layer, weight)}
    assert found["kurtosis_before"] > 10
    assert abs(found["kurtosis_after"] - 3) < 0.5
    assert found["error_after"] < found["error_before"]
    assert len(found["centers"]) == len(found["before"]) == len(found["after"])
    assert found["largest_before"] > 2 * found["largest_after"]


def test_outlier_maps_show_where_the_largest_weights_are():
    weight = torch.ones(96, 64)
    weight[90, 7] = -20.0
    found = torch.tensor(outlier_map(weight, cells=16))
    assert found.shape == (16, 16)
    assert found.argmax() == 15 * 16 + 1
    scale = weight.square().mean().sqrt()
    assert found.max() == pytest.approx(float(20 / scale), abs=0.01)
    assert found.min() == pytest.approx(float(1 / scale), abs=0.01)
    assert [len(row) for row in outlier_map(torch.ones(3, 5))] == [5, 5, 5]


def test_the_layer_with_the_heaviest_tails_is_found_and_every_layer_is_read():
    class Weights:
        def tensor(self, name: str) -> torch.Tensor:
            weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(int(name)))
            if name == "2":
                weight[:, 5] *= 9
            return weight

    spec = get_format("ternary").spec(32, 64, 3)
    layers = [RotatedLayer(str(number), spec, random_signs(64, number)) for number in range(4)]
    steps: list[tuple[int, int]] = []
    assert heaviest_tails(Weights(), layers, lambda *step: steps.append(step)).name == "2"
    assert steps == [(done, 4) for done in range(5)]
