"""fewbit checkpoints inside vLLM; `make test-vllm` makes the environment for it. Engines run in processes of their own.

Every token of vLLM is checked against what transformers predicts when it takes the same steps. It has to be the most
probable one, but for ties: inputs are rounded to 8 bits, so that where two engines add floats in another order, some of
them fall to the other side. What that is worth is measured with transformers alone, whose looked-up embeddings are
changed by 1e-7 of themselves: on toys up to a hundredth of a nat, but on SmolLM2 rounded to 3 bits, not calibrated,
up to 0.4 nats, and one token in six becomes another.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)

from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from fewbit.checkpoint.store import FORMAT_VERSION
from fewbit.errors import CorruptFile
from fewbit.formats import get_format
from fewbit.integrations.vllm import FewbitVllmConfig, register
from fewbit.loading import load
from fewbit.pipeline.options import QuantizeOptions
from fewbit.pipeline.run import quantize
from pages import ROOT, blocks

pytestmark = pytest.mark.slow

HERE = Path(__file__).resolve().parent
PAGE = ROOT / "docs" / "hosts.md"
START_SECONDS = 1500  # for an engine to start, compile and answer on a busy machine
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [40, 3, 50]]
TEXTS = [[504, 3575, 282, 4649, 314], [12615, 36411, 418]]  # "The capital of France is", "Water boils at" in SmolLM2
TOKENS = 12
TIE = 0.02  # nats by which a token may be worse than the best, where float noise is worth less
NOISE = 1e-7
TRACED = {"VLLM_CPU_CI_ENV": "1"}  # graphs are traced and run as they are: to compile them takes minutes
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}


def environment(**changes: str) -> dict[str, str]:
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(START_SECONDS),  # the first step may trace or compile
        "OMP_WAIT_POLICY": "PASSIVE",
        "RAY_ADDRESS": "local",  # no cluster that somebody else has started here
        **changes,
    }
    # Set for the tests of kernels; vLLM would take it as a wish of its user.
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | settings


def ask(path: Path, changes: dict[str, str] | None = None, prompts=PROMPTS, **engine) -> subprocess.CompletedProcess:
    settings = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 4, "skip_tokenizer_init": True, **engine}
    asked = {"engine": {"model": str(path), **settings}, "prompts": prompts, "tokens": TOKENS}
    ranks = engine.get("tensor_parallel_size", 1)
    # One memory node with a core for each rank; vLLM leaves a core free by itself and would find too few.
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))} if ranks > 1 else {}
    return subprocess.run(
        [sys.executable, HERE / "ask_vllm.py", json.dumps(asked)],
        env=environment(**binding, **(changes or {})),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=START_SECONDS,
    )


def answers_of(path: Path, changes: dict[str, str] | None = None, prompts=PROMPTS, **engine) -> list[dict]:
    done = ask(path, changes, prompts, **engine)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))


def predictions(model, prompt: list[int], tokens: list[int], noise: float = 0.0) -> torch.Tensor:
    """Log-probabilities `[tokens, vocabulary]` where each token is chosen: the prompt at once, then step by step."""
    found, cache = [], None
    table = model.get_input_embeddings()
    hook = table.register_forward_hook(lambda _module, _ids, rows: rows * (1 + noise * torch.randn_like(rows)))
    for ids in (prompt, *([token] for token in tokens[:-1])):
        with torch.inference_mode():
            output = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits[0, -1].float().log_softmax(-1))
    hook.remove()
    return torch.stack(found)


def check_answers(path: Path, answers: list[dict], prompts=PROMPTS, tie: float = TIE) -> None:
    """Every token is the one that transformers finds most probable after the ones before it, but for ties."""
    model, _ = load(path, torch.float32)
    torch.manual_seed(0)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer["tokens"]) == TOKENS
        chosen = torch.tensor(answer["tokens"])[:, None]
        expected = predictions(model, prompt, answer["tokens"])
        found = expected.gather(1, chosen)
        noisy = [predictions(model, prompt, answer["tokens"], NOISE).gather(1, chosen) - found for _ in range(4)]
        noise = float(torch.stack(noisy).abs().max())
        lost = (expected.amax(-1, keepdim=True) - found).max()
        apart = (torch.tensor(answer["logprobs"])[:, None] - found).abs().max()
        print(f"{path.name}: worse by {lost:.4f}, apart by {apart:.4f}, float noise is {noise:.4f} nats")
        assert lost <= max(tie, 2 * noise)
        assert apart <= 2 * max(tie, noise)


@pytest.fixture(scope="module")
def toys(make_tiny, add_tokenizer, calibration_text, tmp_path_factory) -> dict[str, Path]:
    """Random models whose widths can be cut in two.

    "mixed" has biases, a head of its own and trellis tensors of several widths; "learned" has branches, means of inputs
    taken off, learned axes and a tied head behind a rotation; "ternary" is a control without kernels on the CPU.
    """
    root = tmp_path_factory.mktemp("toys")
    text = {"calib": (calibration_text,), "calib_tokens": 1024, "calib_window": 64, "tune": False}
    kinds = {
        "mixed": ("qwen2", False, {"bits": 3.25, **text}),
        "learned": ("llama", True, {"format": "twinquant", "learn": True, "learn_steps": 2, **text}),
        "ternary": ("llama", True, {"code": "ternary", "rounding": "nearest"}),
    }
    for name, (kind, tied, options) in kinds.items():
        source = root / f"{name}-source"
        make_tiny(kind, tied, head_dim=64, **WIDE).save_pretrained(source)
        add_tokenizer(source)
        calibration = options.pop("calib", ())
        quantize(source, root / name, QuantizeOptions(**options), calibration)
    return {name: root / name for name in kinds}


@pytest.fixture(scope="module")
def smollm2_dirs(smollm2_source, tmp_path_factory) -> Path:
    """A directory with SmolLM2 135M as "smollm2-3bit" (itq3_s) and "smollm2-4bit" (twinquant), without calibration."""
    root = tmp_path_factory.mktemp("smollm2")
    source = smollm2_source.path
    quantize(source, root / "smollm2-3bit", QuantizeOptions(rounding="nearest"))
    quantize(source, root / "smollm2-4bit", QuantizeOptions(format="twinquant", rounding="nearest"))
    return root


def config_of(modules: dict[str, dict]) -> FewbitVllmConfig:
    config = FewbitVllmConfig.from_config({"format_version": FORMAT_VERSION, "modules": modules})
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return config


def described(bits: int = 3, rows: int = 64, **changes) -> dict:
    spec = get_format("trellis").spec(rows, 256, bits)
    return {"kind": "body", **replace(spec, **changes).to_json()}


class Linear(LinearBase):
    """A layer of vLLM's kind without the process groups that a real one wants."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)


def test_layers_get_the_method_that_fits_what_is_stored():
    config = config_of({f"model.{name}_proj": described() for name in "qkv"})
    method = config.get_quant_method(Linear(), "model.qkv_proj")
    assert [module.name for module in method.modules] == [f"model.{name}_proj" for name in "qkv"]
    assert type(config.get_quant_method(Linear(), "model.o_proj")) is UnquantizedLinearMethod
    again = pickle.loads(pickle.dumps(config))
    assert again.modules == config.modules
    register()
    register()


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ({"q": described(), "k": described(4), "v": described()}, "stored alike, .*k_proj: trellis, 4 bits"),
        ({"q": described(), "v": described()}, "quantized or none, but model.k_proj is not"),
    ],
)
def test_parts_of_a_fused_layer_that_differ_are_named(modules, said):
    config = config_of({f"model.{name}_proj": entry for name, entry in modules.items()})
    with pytest.raises(CorruptFile, match=said):
        config.get_quant_method(Linear(), "model.qkv_proj")


MODES = {"eager": {"enforce_eager": True}, "compiled": {}, "two-ranks": {"tensor_parallel_size": 2}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mixed", "learned"])
def test_tokens_are_those_of_transformers(toys, name, mode):
    # Each rank rounds its own part of what goes into twinquant's branch, where one rank rounds the sum.
    tie = 5 * TIE if (name, mode) == ("learned", "two-ranks") else TIE
    check_answers(toys[name], answers_of(toys[name], **MODES[mode]), tie=tie)


def test_a_control_without_kernels_is_decoded_once(toys):
    check_answers(toys["ternary"], answers_of(toys["ternary"], enforce_eager=True))


@pytest.mark.parametrize("name", ["smollm2-3bit", "smollm2-4bit"])
def test_a_real_model_gives_the_tokens_of_transformers(smollm2_dirs, name):
    check_answers(smollm2_dirs / name, answers_of(smollm2_dirs / name, TRACED, prompts=TEXTS), TEXTS)


def test_more_ranks_than_the_checkpoint_allows_are_an_error_that_names_the_allowed(tiny_models, tmp_path):
    quantize(tiny_models["tied"], tmp_path / "narrow", QuantizeOptions(rounding="nearest"))
    done = ask(tmp_path / "narrow", tensor_parallel_size=2, enforce_eager=True)
    assert done.returncode != 0
    said = "o_proj: 64 inputs cannot be cut at 0 and 32, only at multiples of 64"
    assert f"{said}; tensor_parallel_size can be 1 for this checkpoint" in done.stderr + done.stdout


def code_of(section: str, language: str) -> list[str]:
    """The code blocks directly under a heading of the hosts' page."""
    return [block.code for block in blocks(PAGE, language, section=section)]


def run_program(directory: Path, *arguments: object) -> str:
    """Run Python beside the checkpoints; what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=directory,
        env=environment(**TRACED),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=START_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def run_block(program: str, directory: Path) -> str:
    """Run a block of the page as a file beside the checkpoint it names; what it printed."""
    (directory / "block.py").write_text(program)
    return run_program(directory, "block.py")


def test_the_page_s_offline_block_answers(smollm2_dirs):
    assert "Paris" in run_block(code_of("vLLM", "python")[0], smollm2_dirs)


def test_the_example_continues_every_prompt(smollm2_dirs):
    prompts = ["The capital of France is", "Water boils at"]
    said = run_program(smollm2_dirs, ROOT / "examples" / "vllm_offline.py", "smollm2-4bit", *prompts, "--max-tokens", 8)
    lines = said.splitlines()
    assert all(any(line.startswith(prompt) and line != prompt for line in lines) for prompt in prompts), said
    assert "Paris" in said


def test_the_page_s_server_answers_the_page_s_client(smollm2_dirs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (command,), (_, client) = code_of("vLLM", "sh"), code_of("vLLM", "python")
    program = [str(Path(sys.executable).with_name("vllm")), *command.replace("8000", port).split()[1:]]
    log = (smollm2_dirs / "server.log").open("w")
    server = subprocess.Popen(program, cwd=smollm2_dirs, env=environment(**TRACED), stdout=log, stderr=log)
    try:
        give_up = time.monotonic() + START_SECONDS
        while True:
            assert server.poll() is None, (smollm2_dirs / "server.log").read_text(errors="replace")[-6000:]
            assert time.monotonic() < give_up
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            time.sleep(1)
        assert "Paris" in run_block(client.replace("8000", port), smollm2_dirs)
    finally:
        server.terminate()
        server.wait(120)
        log.close()


def test_the_page_s_ray_block_answers_every_prompt(smollm2_dirs):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: make test-vllm")
    said = run_block(code_of("Batch inference through vLLM", "python")[0], smollm2_dirs)
    assert "The capital of France is" in said
    assert "Water boils at" in said
