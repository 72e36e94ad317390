"""The documentation is true where a machine can tell: links, commands, code, quoted errors, stored parts."""

import ast
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
import typer.main

from fewbit import __version__
from fewbit.checkpoint.store import FORMAT_VERSION
from fewbit.cli import app
from fewbit.dtypes import name_of, torch_dtype
from fewbit.formats import base, format_names, get_format
from fewbit.math.rounding import inverse_factor, quantize_rotated
from pages import PAGES, ROOT, blocks, prose_of, text_of, words_of

VERBS = typer.main.get_command(app).commands
PLACEHOLDER = "\0"


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose_of(page))


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a page's shell blocks, without the variables set in front."""
    found = [words_of(command) for block in blocks(page, "sh") for command in block.commands()]
    return [list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words)) for words in found]


def options(verb: str) -> set[str]:
    return {option for parameter in VERBS[verb].params for option in (*parameter.opts, *parameter.secondary_opts)} | {
        "--help",
        "-h",
    }


def messages() -> list[str]:
    """Every text in the package's source, with a placeholder for what is put in at run time."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(getattr(value, "value", "") if isinstance(value, ast.Constant) else PLACEHOLDER
                                     for value in node.values))  # fmt: skip
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def pages(*names: str):
    chosen = [page for page in PAGES if not names or page.name in names]
    return pytest.mark.parametrize("page", chosen, ids=lambda page: page.name)


@pages()
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pages()
def test_commands_in_code_blocks_are_understood(page):
    for program, *arguments in commands(page):
        if program == "fewbit":
            VERBS[arguments[0]].make_context(arguments[0], arguments[1:]).close()
        for argument in arguments:
            assert not argument.endswith(".py") or (ROOT / argument).exists(), argument


@pages()
def test_commands_and_options_in_running_text_exist(page):
    everywhere = set().union(*map(options, VERBS))
    for code in inline_code(page):
        match = re.match(r"fewbit ([a-z]\w*)", code)
        assert match is None or match[1] in VERBS, code
        if match or code.startswith("--"):
            known = options(match[1]) if match else everywhere
            assert set(re.findall(r"(?<!\S)--[a-z-]+", code)) <= known, code


@pages()
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z0-9-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    mentioned = "\n".join([*inline_code(page), *map(" ".join, commands(page))])
    assert set(re.findall(r"^make ([a-z0-9-]+)", mentioned, re.MULTILINE)) <= targets


@pages()
def test_code_stands_in_fences_with_a_language(page):
    prose = prose_of(page)
    assert not re.findall(r"^(?: {4}|\t).*", prose, re.MULTILINE)
    assert not re.findall(r"^.*(?:```|~~~).*", prose, re.MULTILINE)
    assert all(block.language for block in blocks(page))


@pages()
def test_pages_name_no_paths_of_somebodys_machine(page):
    assert not re.findall(r"(?<![\w.~])/(?:root|home|work|opt|tmp|mnt|Users)\b", text_of(page))


@pages()
def test_files_named_in_running_text_exist(page):
    for code in inline_code(page):
        if re.fullmatch(r"(fewbit|tests|docs|scripts|benchmarks)/[\w./]+", code):
            assert (ROOT / "src" / code).exists() or (ROOT / code).exists(), code


def test_every_error_in_the_troubleshooting_page_is_one_that_the_program_gives():
    known = [*messages(), *map(text_of, (ROOT / "scripts").glob("*.sh"))]
    quoted = re.findall(r"^### `(.+)`$", text_of(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    assert quoted
    for heading in quoted:
        pattern = re.compile(".+".join(map(re.escape, heading.strip(".").split("..."))), re.DOTALL)
        assert any(pattern.search(message) for message in known), heading


@pytest.mark.parametrize("name", format_names())
def test_the_checkpoint_page_lists_the_parts_that_a_format_stores(name):
    listed = re.findall(rf"^\| `{name}` \| `(\w+)` \| (\w+) \|", text_of(ROOT / "docs" / "checkpoint.md"), re.MULTILINE)
    fmt = get_format(name)
    layout = fmt.layout(fmt.spec(32, 256, fmt.bits[0]))
    assert listed == [(part, str(torch_dtype(dtype)).removeprefix("torch.")) for part, (_, dtype) in layout.items()]


def test_the_checkpoint_page_s_example_is_what_a_format_writes():
    (block,) = blocks(ROOT / "docs" / "checkpoint.md", "json")
    written = json.loads(f"{{{block.code}}}")["quantization_config"]
    ((_, module),) = written.pop("modules").items()
    assert module == {"kind": "body", **get_format("trellis").spec(576, 576, 3).to_json()}
    assert written == {"quant_method": "fewbit", "format_version": FORMAT_VERSION, "requires": f"fewbit>={__version__}"}


def test_the_ranks_of_the_twinquant_page_give_branches():
    ranks = [int(words[words.index("--rank") + 1])
             for words in commands(ROOT / "docs" / "twinquant.md") if "--rank" in words]  # fmt: skip
    assert ranks
    for rank in ranks:
        assert get_format("twinquant").spec(4096, 4096, 4, rank=rank).rank == rank


def test_the_example_format_works(reader, monkeypatch):
    monkeypatch.setattr(base, "_FORMATS", dict(base._FORMATS))
    reader.read(blocks(ROOT / "docs" / "add-a-format.md"))
    fmt = base.get_format("row4")
    spec = fmt.spec(17, 576, 4)
    weight = torch.randn(17, 576, generator=torch.Generator().manual_seed(0))
    for factor in (None, inverse_factor(weight.t() @ weight)):
        done = quantize_rotated(fmt, weight, spec, factor)
        assert {name: (tuple(part.shape), name_of(part.dtype)) for name, part in done.parts.items()} == fmt.layout(spec)
        assert torch.equal(fmt.dequantize(done.parts, spec), done.values)
    assert "row4" not in format_names()


def test_the_example_family_is_the_one_in_the_package():
    example = blocks(ROOT / "docs" / "add-a-model.md", "python")[0]
    assert example.code == text_of(ROOT / "src" / "fewbit" / "models" / "qwen.py")
