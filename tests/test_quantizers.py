"""What llama.cpp's quantizer is asked to do to a model, and (slow: its sources are fetched) what it then does."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from fewbit.assets import default_cache_dir
from fewbit.checkpoint.plain import load_plain
from fewbit.checkpoint.source import open_source
from fewbit.models import get_family
from fewbit.pipeline.calibrate import InputAxes, InputCollector

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TYPES = ("Q4_0", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ3_XXS", "IQ3_S", "F16")


@pytest.fixture(scope="module")
def quantizers():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("benchmark_quantizers", BENCHMARKS / "quantizers.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture(scope="module")
def ggml(quantizers):
    """The module with ggml's quantizers built."""
    try:
        quantizers.peers.fetch(default_cache_dir() / "peers")
    except SystemExit as error:
        if "not the one expected" in str(error):
            raise
        pytest.skip(str(error))
    quantizers.library()
    return quantizers


@pytest.fixture
def without_ggml(quantizers, monkeypatch):
    """The module with a quantizer that leaves the weights as they are and writes blocks of zeros."""

    def leave(kind, weights, importance):
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        return np.zeros((weights.shape[0], weights.shape[1] // block * size), dtype=np.uint8), weights

    monkeypatch.setattr(quantizers, "quantize_rows", leave)
    return quantizers


def open_tiny(directory):
    source = open_source(directory)
    return load_plain(source, torch.float32), source


def even_importance(quantizers, model, source):
    """Every channel of every linear alike."""
    names = [name for _, name in quantizers.linears(get_family(source.config.model_type), len(model.model.layers))]
    return {name: torch.ones(model.get_submodule(name).in_features) for name in names}


@pytest.fixture(scope="module")
def weights():
    return 0.02 * torch.randn(48, 512, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def importance():
    return torch.rand(512, generator=torch.Generator().manual_seed(2)) ** 4 + 0.01


# The counts are those of llama.cpp's own function for a LLaMA and a Qwen2 with these layers and heads.
@pytest.mark.parametrize(
    ("mix", "layers", "queries_per_key", "counts"),
    [
        ("Q2_K", 30, 3, {"Q2_K": 120, "Q3_K": 90}),
        ("Q2_K", 28, 6, {"Q2_K": 112, "Q3_K": 56, "Q4_K": 28}),
        ("IQ2_M", 30, 3, {"IQ2_S": 147, "IQ3_S": 63}),
        ("IQ2_M", 28, 6, {"IQ2_S": 137, "IQ3_S": 31, "Q4_K": 28}),
        ("IQ4_XS", 30, 3, {"IQ4_XS": 210}),
        ("IQ4_XS", 28, 6, {"IQ4_XS": 168, "Q5_K": 28}),
        ("Q3_K_M", 30, 3, {"Q3_K": 120, "Q4_K": 87, "Q5_K": 3}),
        ("Q3_K_M", 28, 6, {"Q3_K": 112, "Q4_K": 81, "Q5_K": 3}),
        ("IQ3_S", 30, 3, {"IQ3_S": 210}),
        ("IQ3_S", 28, 6, {"IQ3_S": 168, "Q4_K": 28}),
        ("Q4_K_M", 30, 3, {"Q4_K": 182, "Q6_K": 28}),
        ("Q4_K_M", 28, 6, {"Q4_K": 168, "Q6_K": 28}),
        ("pure IQ3_XXS", 28, 6, {"IQ3_XXS": 196}),
    ],
)
def test_types_of_a_mix_are_llama_cpps(quantizers, mix, layers, queries_per_key, counts):
    linears = quantizers.linears(get_family("qwen2"), layers)
    roles = [(layer, name.rpartition(".")[2]) for layer, name in linears]
    found = Counter(quantizers.mixed_type(mix, role, layer, layers, queries_per_key) for layer, role in roles)
    assert found == counts


def test_larger_types_go_to_the_first_and_last_layers_and_every_third_between(quantizers):
    larger = [layer for layer in range(30) if quantizers.mixed_type("Q4_K_M", "down_proj", layer, 30, 3) == "Q6_K"]
    assert larger == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]


def test_an_unknown_mix_is_refused_with_the_known_ones(quantizers):
    with pytest.raises(ValueError, match=r"no mix 'Q9_K': known are Q2_K"):
        quantizers.mixed_type("Q9_K", "q_proj", 0, 30, 3)


@pytest.mark.parametrize(
    ("kind", "cols", "expected"),
    [
        ("Q3_K", 1536, "Q3_K"),
        ("Q3_K", 576, "Q4_0"),
        ("IQ3_S", 576, "IQ4_NL"),
        ("IQ2_S", 576, "IQ4_NL"),
        ("Q2_K", 576, "Q4_0"),
        ("Q6_K", 576, "Q8_0"),
        ("Q4_K", 72, "F16"),
        ("F16", 72, "F16"),
    ],
)
def test_rows_that_blocks_do_not_divide_have_smaller_blocks(quantizers, kind, cols, expected):
    assert quantizers.fitting_type(kind, cols) == expected


@pytest.mark.parametrize("pad", [False, True])
def test_bits_are_bytes_of_blocks_over_weights(without_ggml, tiny_models, pad):
    model, source = open_tiny(tiny_models["odd"])
    importance = even_importance(without_ggml, model, source)
    facts = without_ggml.requantize(model, source, without_ggml.Recipe("Q4_K_M", pad), importance)
    size = weights = 0
    layers = len(model.model.layers)
    for layer in range(layers):
        for name, linear in model.model.layers[layer].named_modules():
            if not isinstance(linear, torch.nn.Linear):
                continue
            rows, cols = linear.weight.shape
            assert cols in (64, 72)
            kind = without_ggml.mixed_type("Q4_K_M", name.rpartition(".")[2], layer, layers, 1)
            if pad:
                size += rows * {"Q4_K": 144, "Q6_K": 210}[kind]
            else:
                size += rows * (2 * 72 if cols == 72 else 2 * {"Q4_K": 22, "Q6_K": 34}[kind])
            weights += linear.weight.numel()
    bits = facts["bits_per_weight"]
    assert bits["body"] == 8 * size / weights
    assert (bits["body_without_padding"] < bits["body"]) == pad
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert bits["total"] == (8 * size + 16 * (everything - weights)) / everything
    assert sum(facts["types"].values()) == 7 * layers


def test_only_the_layers_linears_are_replaced_and_the_rest_stays(without_ggml, tiny_models):
    model, source = open_tiny(tiny_models["biased"])
    importance = even_importance(without_ggml, model, source)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    original = dict(model.named_parameters())
    without_ggml.requantize(model, source, without_ggml.Recipe("Q3_K_M"), importance)
    replaced = {f"{name}.weight" for name in importance}
    for name, parameter in model.named_parameters():
        assert (parameter is original[name]) == (name not in replaced)
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("name", ["tied", "biased"])
def test_importance_is_the_mean_square_of_every_input_channel(quantizers, tiny_models, name):
    model, source = open_tiny(tiny_models[name])
    family = get_family(source.config.model_type)
    windows = torch.randint(5, 20, (3, 16), generator=torch.Generator().manual_seed(3))
    found = quantizers.importance_matrix(model, family, windows)
    linears = [(key, model.get_submodule(key)) for key in found]
    with InputCollector(linears, dict.fromkeys(found, InputAxes(None, 1))) as collector, torch.no_grad():
        hidden = model(windows, output_hidden_states=True).hidden_states
    for layer, states in zip(model.model.layers, hidden, strict=False):
        direct = layer.input_layernorm(states).square().mean((0, 1))
        torch.testing.assert_close(found[f"model.layers.{layer.self_attn.layer_idx}.self_attn.k_proj"], direct)
    assert len(found) == 7 * len(model.model.layers)
    for key, channels in found.items():
        torch.testing.assert_close(channels, collector.take(key, channels.numel()).hessian.diagonal())


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_blocks_decode_as_the_gguf_package_decodes_them(ggml, weights, importance, kind):
    blocks, decoded = ggml.quantize_rows(kind, weights, importance)
    assert np.array_equal(dequantize(blocks, GGMLQuantizationType[kind]), decoded.numpy())


@pytest.mark.slow
def test_more_bits_are_closer_and_importance_makes_what_matters_closer(ggml, weights, importance):
    def error(kind, by=importance):
        return (importance * (ggml.quantize_rows(kind, weights, by)[1] - weights).square()).sum()

    assert error("Q6_K") < error("Q4_K") < error("IQ3_S") < error("Q3_K") < 0.05 * (importance * weights**2).sum()
    assert error("IQ3_S") < error("IQ3_XXS")
    for kind in ("Q3_K", "IQ3_S", "Q4_K"):
        assert error(kind) < 0.95 * error(kind, by=None)


@pytest.mark.slow
def test_two_threads_write_the_bytes_of_one(ggml, weights, importance):
    threads = torch.get_num_threads()
    written = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            written.append(ggml.quantize_rows("IQ3_S", weights[:41], importance)[0])
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(*written)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ3_XXS", "IQ3_S"])
def test_zeros_beside_weights_do_them_no_harm(ggml, weights, importance, kind):
    full = ggml.quantize_rows(kind, weights, importance)[1]
    cut = slice(0, 320)
    _, decoded = ggml.quantize_rows(kind, ggml.padded(weights[:, cut], 256), ggml.padded(importance[cut], 256))
    assert decoded.shape == weights.shape
    wanted, beside = weights[:, 256:320], importance[256:320]
    errors = [(beside * (found[:, 256:320] - wanted).square()).sum() for found in (decoded, full)]
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.slow
def test_a_type_that_does_not_fit_the_rows_is_refused(ggml, weights, importance):
    with pytest.raises(ValueError, match="no valid Q3_K of rows of 320 weights, which have blocks of 256"):
        ggml.quantize_rows("Q3_K", weights[:, :320], importance[:320])


@pytest.mark.slow
def test_a_model_holds_what_ggml_decodes(ggml, tiny_models):
    model, source = open_tiny(tiny_models["biased"])
    importance = even_importance(ggml, model, source)
    exact = model.get_submodule("model.layers.1.mlp.down_proj").weight.clone()
    facts = ggml.requantize(model, source, ggml.Recipe("pure Q4_K", pad=True), importance)
    name = "model.layers.1.mlp.down_proj"
    decoded = ggml.quantize_rows("Q4_K", ggml.padded(exact, 256), ggml.padded(importance[name], 256))[1]
    assert torch.equal(model.get_submodule(name).weight, decoded[:, : exact.shape[1]])
    assert facts["bits_per_weight"]["body_without_padding"] == 4.5


@pytest.mark.parametrize(
    ("model", "widths", "padded", "pure"), [("odd", {64, 96}, True, False), ("tied", {256}, False, True)]
)
def test_padding_is_for_rows_that_blocks_do_not_divide(
    quantizers, monkeypatch, tiny_models, model, widths, padded, pure
):
    _, source = open_tiny(tiny_models[model])
    monkeypatch.setattr(quantizers, "input_widths", lambda _: widths)
    recipes = {name: quantizers.Recipe(name, pad) for name, pad in (("IQ3_S", False), ("pure Q4_K", False))}
    recipes |= {f"{name}, padded": replace(recipe, pad=True) for name, recipe in recipes.items()}
    names = quantizers.fitting(recipes, source)
    assert "IQ3_S" in names
    assert ("IQ3_S, padded" in names) is padded
    assert ("pure Q4_K" in names) is pure
    assert ("pure Q4_K, padded" in names) is padded
