"""generate, chat and bench on a tiny checkpoint, and their errors."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from fewbit.chat import Chat, typed_lines
from fewbit.errors import UsageError
from fewbit.runtime import bench, decoder
from fewbit.runtime.bench import (
    BenchSettings,
    Operations,
    arithmetic_share,
    bandwidth_share,
    bytes_per_token,
    packed_operations,
)
from fewbit.runtime.engine import Engine
from fewbit.runtime.sampling import SamplingParams

TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}a "


@pytest.fixture(scope="module")
def plain(tiny_models, tmp_path_factory) -> Path:
    """A checkpoint without a chat template."""
    from fewbit.pipeline.options import QuantizeOptions
    from fewbit.pipeline.run import quantize

    out = tmp_path_factory.mktemp("run") / "out"
    quantize(tiny_models["tied"], out, QuantizeOptions(rounding="nearest"), [])
    return out


@pytest.fixture(scope="module")
def checkpoint(plain, tmp_path_factory) -> Path:
    """The same with one."""
    out = shutil.copytree(plain, tmp_path_factory.mktemp("run") / "chat")
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


def test_generate_streams_text_and_tells_the_speed(run, checkpoint):
    arguments = ("generate", checkpoint, "-p", "the quick", "--max-tokens", 8, "--temperature", 1, "--seed", 1)
    code, stdout, stderr = run(*arguments)
    assert code == 0
    assert stdout.strip()
    assert "tokens/s" in stderr
    assert run(*arguments)[1] == stdout, "the seed decides"


def test_the_summary_has_a_line_of_its_own_where_both_streams_go_to_one_file(checkpoint):
    command = [sys.executable, "-c", "from fewbit.cli import main; main()", "generate", str(checkpoint)]
    command += ["-p", "the quick", "--max-tokens", "4", "--temperature", "1", "--seed", "1"]
    # As users have it: what is written waits in a buffer.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    found = subprocess.run(command, **both, env=env, text=True, check=True).stdout
    assert re.match(r"\d+ tokens?, ", found.rstrip("\n").rpartition("\n")[2])


def test_one_token_has_no_rate(run, checkpoint):
    stderr = run("generate", checkpoint, "-p", "the quick", "--max-tokens", 1)[2]
    assert "1 token, the first after" in stderr
    assert "tokens/s" not in stderr


def test_generate_reports_json_with_the_promised_keys(run, checkpoint):
    code, stdout, _ = run("generate", checkpoint, "-p", "the quick", "--max-tokens", 8, "--json")
    report = json.loads(stdout)
    assert code == 0
    assert {"text", "prompt_tokens", "tokens", "seconds_to_first_token", "tokens_per_second"} <= set(report)
    assert (report["tokens"], report["prompt_tokens"], report["finish_reason"]) == (8, 9, "length")
    assert len(report["token_ids"]) == 8


def test_sampling_options_reach_the_sampler_and_drafts_change_nothing(run, checkpoint):
    arguments = ("generate", checkpoint, "-p", "the quick the quick", "--max-tokens", 30, "--temperature", 0.4,
                 "--top-k", 5, "--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty", 1.1, "--seed", 3,
                 "--json")  # fmt: skip
    plain = json.loads(run(*arguments)[1])
    drafted = json.loads(run(*arguments, "--draft", 6, "--kv", "bf16", "--threads", 1, "--context", 100)[1])
    assert plain["token_ids"] == drafted["token_ids"]
    greedy = json.loads(run("generate", checkpoint, "-p", "the quick the quick", "--max-tokens", 30, "--json")[1])
    assert greedy["token_ids"] != plain["token_ids"]
    stopped = json.loads(run(*arguments, "--stop", plain["text"][4:6])[1])
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == plain["text"][: plain["text"].index(plain["text"][4:6])]


def test_a_prompt_can_go_through_the_chat_template(run, checkpoint):
    code, stdout, _ = run("generate", checkpoint, "-p", "hi", "--chat", "--max-tokens", 3, "--json")
    assert (code, json.loads(stdout)["prompt_tokens"]) == (0, len("u hi a "))


def test_bench_prints_the_promised_keys(run, checkpoint):
    sizes = ("--prompt-tokens", "8,20", "--batch", "1,3", "--gen-tokens", 4, "--repeats", 2)
    code, stdout, _ = run("bench", checkpoint, *sizes, "--threads", 1, "--json")
    report = json.loads(stdout)
    assert code == 0
    assert [set(entry) for entry in report["prefill"]] == [{"prompt_tokens", "tokens_per_second", "stdev"}] * 2
    assert [entry["batch"] for entry in report["decode"]] == [1, 3]
    assert all(entry["tokens_per_second"] > 0 for entry in report["prefill"] + report["decode"])
    assert (report["threads"], bool(report["isa"])) == (1, True)
    assert report["bandwidth_share"] > 0
    assert Operations(report["operations_per_token"], report["operations_per_logits"]) == packed_operations(checkpoint)
    assert report["operations_per_second"] > 0
    assert report["arithmetic_share"] > 0
    code, stdout, _ = run("bench", checkpoint, *sizes)
    assert code == 0
    assert "decoding, 3 together" in stdout
    assert "% of the memory's" in stdout
    assert "% of the processor's" in stdout


def run_small(path: Path) -> dict:
    return bench.run_bench(path, BenchSettings((8,), (1,), 2, 1), 1, "bf16", lambda done, total: None)


ARITHMETIC = ("operations_per_token", "operations_per_logits", "operations_per_second", "arithmetic_share")


def test_the_arithmetic_is_unknown_without_native_code_and_no_limit_for_weights_of_16_bits(
    run, checkpoint, tiny_models, monkeypatch
):
    report = run_small(tiny_models["tied"])
    assert [report[key] for key in ARITHMETIC] == [None, None, report["operations_per_second"], None]
    assert report["operations_per_second"] > 0
    for module in (bench, decoder):
        monkeypatch.setattr(module, "load_native", lambda: None)
    report = run_small(checkpoint)
    assert [report[key] for key in ARITHMETIC] == [None] * 4
    printed = run("bench", checkpoint, "--prompt-tokens", 8, "--gen-tokens", 2, "--repeats", 1)[1]
    assert "processor's" not in printed


def test_the_bytes_of_a_token_leave_out_what_is_only_looked_up(tiny_models, plain):
    # Qwen2 of the fixtures has a head of its own; the tied LLaMA's table is its head.
    def numbers(table: int, biases: int) -> int:
        return 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 128 + 2 * 64) + biases + 64 + table

    assert bytes_per_token(tiny_models["tied"]) == 2 * numbers(96 * 64, 0)
    assert bytes_per_token(tiny_models["biased"]) == 2 * numbers(96 * 64, 2 * 128)
    assert 0 < bytes_per_token(plain) < 0.4 * bytes_per_token(tiny_models["tied"])
    decode = [{"batch": 4, "tokens_per_second": 40.0}, {"batch": 2, "tokens_per_second": 30.0}]
    assert bandwidth_share(decode, 1000, 60_000.0) == 0.25
    assert bandwidth_share(decode, 1000, 0.0) is None


def test_the_operations_of_a_token_are_two_for_each_packed_weight_that_it_meets(
    plain, branched_dir, make_mixture, add_tokenizer, tmp_path
):
    from fewbit.pipeline.options import QuantizeOptions
    from fewbit.pipeline.run import quantize

    def operations(source: Path, **options) -> Operations | None:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        quantize(source, out, QuantizeOptions(rounding="nearest", **options), [])
        return packed_operations(out)

    # Two layers of hidden size 64, and a tied table of 96 rows.
    assert packed_operations(plain) == Operations(2 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128), 2 * 96 * 64)
    # q, o, gate, up and down have branches of rank 32; a head of its own in 16 bits is none of 8-bit products.
    square, wide, narrow = 160 * 160, 288 * 160, 32 * 160
    branches = 32 * (2 * (160 + 160) + 3 * (288 + 160))
    found = operations(branched_dir, format="twinquant", head="bf16")
    assert found == Operations(2 * 2 * (2 * square + 2 * narrow + 3 * wide + branches), 0)
    # A token meets two of four experts; their router is no packed matrix.
    mixture = tmp_path / "mixture"
    make_mixture("mixtral").save_pretrained(mixture)
    add_tokenizer(mixture)
    attention, expert = 2 * 64 * 64 + 2 * 32 * 64, 3 * 64 * 64
    assert operations(mixture) == Operations(2 * 2 * (attention + 2 * expert), 2 * 96 * 64)
    assert packed_operations(branched_dir) is None


def test_the_longest_prompt_s_share_counts_its_tokens_and_one_row_of_logits():
    prefill = [{"prompt_tokens": 100, "tokens_per_second": 50.0}, {"prompt_tokens": 10, "tokens_per_second": 80.0}]
    assert arithmetic_share(prefill, Operations(1000, 5000), 105_000.0) == 0.5
    assert arithmetic_share(prefill, None, 105_000.0) is None
    assert arithmetic_share(prefill, Operations(1000, 5000), 0.0) is None


def chat(engine, lines, **settings) -> tuple[Chat, str]:
    """A conversation of these lines, and what it printed."""
    screen = io.StringIO()
    out = Console(file=screen, width=200)
    talk = Chat(engine, SamplingParams(**{"max_tokens": 6, "ignore_eos": True, **settings}), "", out)
    talk.run(lines)
    return talk, screen.getvalue()


@pytest.fixture
def engine(checkpoint):
    with Engine(checkpoint, slots=1) as engine:
        yield engine


def test_a_conversation_keeps_its_turns_and_their_cache(engine):
    talk, printed = chat(engine, ["hello\n", "", "and then\n"])
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[0]["content"] == "hello"
    assert all(message["content"] in printed for message in talk.messages if message["role"] == "assistant")
    assert "0 of 10 prompt tokens cached" in printed
    # "u hello a " and five tokens of the answer, which the template puts there again
    assert "15 of 30 prompt tokens cached" in printed


def test_commands_change_the_conversation(engine, tmp_path):
    talk, printed = chat(engine, ["/help", "/set max_tokens 2", "one", "/settings", "/system Be brief.", "/retry",
                                  f"/save {tmp_path / 'talk.jsonl'}", "/quit", "never"])  # fmt: skip
    assert "/save FILE" in printed
    assert "max_tokens 2" in printed
    assert talk.messages[0] == {"role": "system", "content": "Be brief."}
    assert len(talk.messages) == 3
    assert len(talk.messages[2]["content"]) == 2
    assert json.loads((tmp_path / "talk.jsonl").read_text()) == {"messages": talk.messages}
    talk.run(["/reset"])
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    talk.run(["/system"])
    assert talk.messages == []


def test_errors_are_shown_and_the_conversation_goes_on(engine):
    lines = ["/nothing", "/retry", "/save", "/set speed 3", "/set top_p 7", "x" * 200, "hello"]
    talk, printed = chat(engine, lines)
    for words in ("unknown command /nothing", "no answer yet", "name of a file", "unknown setting 'speed'",
                  "top_p must be between", "the context of 128"):  # fmt: skip
        assert words in printed
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_what_looks_like_markup_or_no_number_is_an_error_like_others(engine, tmp_path):
    lines = ["/etc[/b]", f"/save {tmp_path}/no/[/x]", "/set stop 5", f"/set max_tokens 1{'0' * 400}", "caf\udce9", "hi"]
    talk, printed = chat(engine, lines)
    for words in ("unknown command /etc[/b]", "cannot write", "stop takes a string", "max_tokens must", "half a char"):
        assert words in printed
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]


def test_settings_are_set_as_they_are_shown(engine):
    talk, printed = chat(engine, ["/set ignore_eos False", "/set seed None", "/settings"])
    assert "ignore_eos must" not in printed
    assert (talk._params.ignore_eos, talk._params.seed) == (False, None)
    talk.run(["/set ignore_eos True"])
    assert talk._params.ignore_eos is True


def test_the_oldest_turns_make_room(engine):
    talk, printed = chat(engine, ["/system S", *(f"message number {index} of some" for index in range(6))])
    assert "the oldest turn is forgotten" in printed
    assert talk.messages[0] == {"role": "system", "content": "S"}
    assert talk.messages[-2]["content"] == "message number 5 of some"
    assert 3 <= len(talk.messages) < 13


def test_an_interrupt_stops_the_answer_and_keeps_what_there_is(engine, monkeypatch):
    pieces = []
    decoder = engine._loop.decoder
    forward = decoder.forward

    def slow(batch):
        time.sleep(0.01)  # or all of the answer is there before the third piece is shown
        return forward(batch)

    monkeypatch.setattr(decoder, "forward", slow)

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            if len(pieces) == 3:
                raise KeyboardInterrupt
            return super().write(text)

    talk = Chat(engine, SamplingParams(max_tokens=100, ignore_eos=True), "", Console(file=Screen()), quiet=True)
    talk.run(["hello"])
    assert 0 < len(talk.messages[1]["content"]) < 100
    talk.run(["again"])
    assert len(talk.messages) == 4


def test_typed_lines_end_with_the_input_and_survive_an_interrupt(monkeypatch, capsys):
    answers: list[object] = ["one", KeyboardInterrupt(), "two", EOFError()]

    def answer(prompt: str) -> str:
        found = answers.pop(0)
        if isinstance(found, BaseException):
            raise found
        return str(found)

    monkeypatch.setattr("builtins.input", answer)
    assert list(typed_lines()) == ["one", "two"]
    assert "Ctrl-D ends" in capsys.readouterr().out


def test_chat_reads_a_pipe(checkpoint):
    program = "from fewbit.cli import main; main()"
    command = [sys.executable, "-c", program, "chat", str(checkpoint), "--max-tokens", "4", "--seed", "1"]
    done = subprocess.run(command, input="hi\nthere\n", capture_output=True, text=True, timeout=120, check=True)
    assert len(done.stdout.splitlines()) == 2
    assert done.stdout.strip()


def test_silly_requests_get_one_line_with_a_remedy_and_a_code(run, plain, tmp_path):
    cases = [
        (("generate", plain, "-p", " "), "empty"),
        (("generate", plain, "-p", "x", "--chat"), "chat template"),
        (("generate", plain, "-p", "x", "--max-tokens", 0), "max_tokens must be between 1"),
        (("generate", plain, "-p", "x", "--temperature", -1), "temperature must be between"),
        (("generate", plain, "-p", "x" * 200), "128 must hold it"),
        (("generate", plain, "-p", "x", "--kv", "fp4"), "fp4"),
        (("generate", plain, "-p", "x", "--draft", 1000), "draft must be between 0 and 64"),
        (("generate", tmp_path / "nothing", "-p", "x"), "nothing"),
        (("generate", plain, "-p", "x", "--threads", 0), "threads must be between 1"),
        (("generate", plain, "-p", "x", "--context", 1), "2 tokens at least"),
        (("bench", plain, "--threads", -1), "threads must be between 1"),
        (("chat", plain), "chat template"),
        (("bench", plain, "--prompt-tokens", "many"), "whole numbers"),
        (("bench", plain, "--batch", "0"), "--batch must be between 1"),
    ]
    for arguments, words in cases:
        code, stdout, stderr = run(*arguments)
        message = [line for line in stderr.splitlines() if line.startswith("error:")]
        assert code == 2, (arguments, stderr)
        assert len(message) == 1, (arguments, stderr)
        assert words in message[0], (arguments, stderr)
        assert "Traceback" not in stderr + stdout


def test_settings_of_a_measurement_are_checked():
    with pytest.raises(UsageError, match="--gen-tokens must be between"):
        BenchSettings(gen_tokens=0)
