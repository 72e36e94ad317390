"""fewbit checkpoints inside transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from fewbit.checkpoint.plain import load_plain
from fewbit.checkpoint.source import open_source
from fewbit.errors import CorruptFile, UsageError
from fewbit.loading import load
from fewbit.modules import FewbitEmbedding, FewbitLinear, PackedTensor, TiedHead
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize


@pytest.fixture(autouse=True)
def compiled_anew():
    """What other tests compiled of the same code counts against PyTorch's limit of variants."""
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def checkpoints(tiny_models, branched_dir, tmp_path_factory):
    """Directories "tied" (LLaMA) and "biased" (Qwen2), and by TwinQuant "tied-twin", without branches, and
    "branched-twin" (Qwen2)."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("tied", "biased"):
        quantize(tiny_models[name], root / name, QuantizeOptions(rounding="nearest"))
    for name, source in (("tied", tiny_models["tied"]), ("branched", branched_dir)):
        quantize(source, root / f"{name}-twin", QuantizeOptions(format="twinquant", rounding="nearest"))
    return root


ALL = pytest.mark.parametrize("name", ["tied", "biased", "tied-twin", "branched-twin"])
IDS = torch.arange(24).view(2, 12) % 90 + 3


def from_pretrained(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **options})


def outside(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own; whether that ends well is the caller's question."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def plain_copy(source_path, packed):
    """The full model with every packed weight replaced by its plain, un-rotated value."""
    model = load_plain(open_source(source_path), torch.float32)
    for name, module in packed.named_modules():
        if isinstance(module, PackedTensor):
            model.get_submodule(name).weight.data = module.plain_weight()
    return model


@pytest.mark.parametrize("name", ["tied", "biased"])
def test_rotated_inputs_and_unrotated_weights_give_the_same_logits(tiny_models, checkpoints, name):
    packed, _ = load(checkpoints / name, torch.float32)
    ids = torch.arange(40)[None] % 90 + 3
    torch.testing.assert_close(
        packed(ids).logits, plain_copy(tiny_models[name], packed)(ids).logits, rtol=1e-4, atol=1e-4
    )


def test_importing_fewbit_is_enough_whatever_comes_first(checkpoints):
    for first, second in (("fewbit", "transformers"), ("transformers", "fewbit")):
        program = (
            f"import {first}, {second}\n"
            "from transformers import AutoModelForCausalLM\n"
            f"model = AutoModelForCausalLM.from_pretrained({str(checkpoints / 'biased')!r})\n"
            "assert type(model.model.layers[0].mlp.up_proj).__name__ == 'FewbitLinear'\n"
        )
        assert outside(program).returncode == 0


def test_modules_stay_packed_and_keep_their_bits_under_dtype_changes(checkpoints):
    model, _ = load(checkpoints / "biased")
    linear = model.model.layers[0].self_attn.q_proj
    assert isinstance(linear, FewbitLinear)
    assert isinstance(model.model.embed_tokens, FewbitEmbedding)
    assert linear.bias.dtype == torch.bfloat16
    before = {name: part.clone() for name, part in linear.parts().items()}
    model.to(torch.float64)
    after = linear.parts()
    assert {name: part.dtype for name, part in after.items()} == {name: part.dtype for name, part in before.items()}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert linear.bias.dtype == torch.float64


def test_a_tied_table_is_stored_once_and_read_by_both_ends(checkpoints):
    model, _ = load(checkpoints / "tied")
    assert isinstance(model.lm_head, TiedHead)
    assert model.lm_head.table is model.model.embed_tokens
    assert not any(name.startswith("lm_head") for name in model.state_dict())
    model.tie_weights()
    assert isinstance(model.lm_head, TiedHead)


@torch.no_grad()
@ALL
def test_saving_again_gives_a_checkpoint_that_everything_takes(checkpoints, tmp_path, name):
    from safetensors.torch import load_file

    from fewbit import Engine
    from fewbit.checkpoint.artifact import Artifact

    model, again = from_pretrained(checkpoints / name), tmp_path / "again"
    model.save_pretrained(again, max_shard_size="40KB" if name == "biased" else "50GB")
    load(checkpoints / name)[1].save_pretrained(again)
    first, second = ({}, {})
    for directory, tensors in ((checkpoints / name, first), (again, second)):
        for file in directory.glob("model*.safetensors"):
            tensors |= load_file(file)
    assert set(second) == set(first)
    wider = {key for key in first if first[key].dtype == torch.bfloat16}  # plain matrices, loaded as float32
    assert all(second[key].dtype == first[key].dtype for key in set(first) - wider)
    assert all(torch.equal(first[key].to(second[key].dtype), second[key]) for key in first)
    assert not any(problem for _, problem in Artifact.open(again).verify())
    assert (
        Artifact.open(again).inspect()["bits_per_weight"]
        == Artifact.open(checkpoints / name).inspect()["bits_per_weight"]
    )
    assert torch.equal(load(again, torch.float32)[0](IDS).logits, model(IDS).logits)
    answers = []
    for directory in (checkpoints / name, again):
        with Engine(directory) as engine:
            answers.append("".join(piece.text for piece in engine.stream("the quick")))
    assert answers[0] == answers[1]


def test_a_copy_in_another_dtype_records_its_own_tensors(checkpoints, tmp_path):
    from fewbit.checkpoint.artifact import Artifact

    load(checkpoints / "biased")[0].save_pretrained(tmp_path / "again")  # norms and biases become bfloat16
    assert not any(problem for _, problem in Artifact.open(tmp_path / "again").verify())
    assert load(tmp_path / "again")[0](IDS).logits.dtype == torch.bfloat16


@torch.no_grad()
@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_generate_is_greedy_over_the_models_own_logits(checkpoints, name, dtype):
    model = from_pretrained(checkpoints / name, dtype=dtype)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = model.generate(IDS, **options)
    assert torch.equal(ids, model.generate(IDS, **options, use_cache=False))
    if dtype == torch.float32:
        expected = IDS
        for _ in range(6):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(ids, expected[:, : ids.shape[1]])


def test_padding_does_not_change_what_is_generated(checkpoints):
    model = from_pretrained(checkpoints / "tied")
    short = IDS[1:, :7]
    batch = torch.cat([IDS[:1], torch.nn.functional.pad(short, (5, 0))])
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **options)
    alone = model.generate(short, attention_mask=torch.ones_like(short), **options)
    assert torch.equal(together[1, 12:], alone[0, 7:])


@ALL
def test_the_forward_compiles_as_one_graph(checkpoints, name):
    model = from_pretrained(checkpoints / name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("code", ["ternary", "iq3_s"])
def test_formats_without_kernels_compile_too(tiny_models, tmp_path, code):
    quantize(tiny_models["tied"], tmp_path / "out", QuantizeOptions(code=code, rounding="nearest", head="int8"))
    model = from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(IDS).logits
        torch.testing.assert_close(found, model(IDS).logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "branched-twin"])
def test_compiled_machine_code_generates_the_same_tokens(checkpoints, name):
    model = from_pretrained(checkpoints / name)
    options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected, logits = model.generate(IDS, **options), model(IDS).logits
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=True)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, logits, rtol=0, atol=1e-5)
    assert torch.equal(model.generate(IDS, **options, cache_implementation="static"), expected)


OFFLOADED = {
    "everything on disk": {"": "disk"},
    "a layer on disk": {"model.layers.1": "disk"},
    "the table on disk": {"model.embed_tokens": "disk", "lm_head": "disk"},
}


@torch.no_grad()
@ALL
@pytest.mark.parametrize("where", ["cpu", "auto", *OFFLOADED])
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_device_maps_do_not_change_the_logits(checkpoints, tmp_path, name, where, offload_buffers):
    expected = from_pretrained(checkpoints / name)(IDS).logits
    device_map = where
    if where in OFFLOADED:
        parts = ("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb", "model.layers.0", "model.layers.1")
        device_map = {} if where == "everything on disk" else dict.fromkeys(parts, "cpu")
        device_map |= OFFLOADED[where]
    model = from_pretrained(
        checkpoints / name, device_map=device_map, offload_folder=tmp_path, offload_buffers=offload_buffers
    )
    # Offloaded codes stay as they are stored, and without lanes the sums have another order.
    torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=1e-5)


@ALL
def test_shapes_are_known_on_the_meta_device(checkpoints, name):
    for model in (from_pretrained(checkpoints / name, device_map="meta"), from_pretrained(checkpoints / name)):
        model.to("meta")
        assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
        assert model(IDS.to("meta")).logits.shape == (2, 12, 96)


def test_a_model_follows_its_new_dtype_as_a_whole(checkpoints):
    model = from_pretrained(checkpoints / "tied").to(torch.float16)
    assert model(IDS).logits.dtype == torch.float16
    with pytest.raises(ValueError, match="not supported for quantized"):
        model.half()  # which transformers refuses for every quantized model


def test_gradients_pass_through_with_checkpointing(checkpoints):
    model = from_pretrained(checkpoints / "tied")
    found = []
    for checkpointing in (False, True):
        embedded = model.get_input_embeddings()(IDS).requires_grad_()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        model(inputs_embeds=embedded, labels=IDS).loss.backward()
        found.append(embedded.grad)
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1])


LOAD = "import sys\nfrom transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained(sys.argv[1])\n"


@pytest.mark.parametrize("name", ["tied", "branched-twin"])
def test_transformers_stops_without_fewbit(checkpoints, name):
    done = outside("import sys\nsys.modules['fewbit'] = None\n" + LOAD, checkpoints / name)
    assert done.returncode == 1
    assert "import-fewbit-first.safetensors" in done.stderr.splitlines()[-1]


def test_the_checkpoint_says_what_it_needs(checkpoints):
    config = json.loads((checkpoints / "tied" / "config.json").read_text())
    assert config["quantization_config"]["requires"].startswith("fewbit>=")
    assert "import fewbit" in (checkpoints / "tied" / "README.md").read_text().splitlines()[0]
    model = from_pretrained(checkpoints / "tied")
    assert not hasattr(model.config, "transformers_weights")


def test_a_module_that_the_model_lacks_is_refused(checkpoints, tmp_path):
    import shutil

    copy = shutil.copytree(checkpoints / "biased", tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    modules["model.layers.7.mlp.up_proj"] = modules["model.layers.0.mlp.up_proj"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptFile, match=r"model.layers.7.mlp.up_proj"):
        AutoModelForCausalLM.from_pretrained(copy)


@pytest.mark.parametrize("name", ["tied", "biased"])
def test_a_model_without_its_head_is_not_called_damage(checkpoints, name):
    with pytest.raises(UsageError, match="load it with AutoModelForCausalLM, whose attribute base_model"):
        AutoModel.from_pretrained(checkpoints / name)
    assert isinstance(from_pretrained(checkpoints / name).base_model.layers[0].mlp.up_proj, FewbitLinear)
