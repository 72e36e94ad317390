"""The documentation is true where a machine can tell: links, commands, code, quoted errors, stored parts."""

import ast
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import torch
import typer.main

from fewbit.cli import app
from fewbit.dtypes import name_of, torch_dtype
from fewbit.formats import base, format_names, get_format
from fewbit.math.rounding import inverse_factor, quantize_rotated

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
VERBS = typer.main.get_command(app).commands
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
PLACEHOLDER = "\0"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in some languages."""
    return [textwrap.dedent(body) for _, language, body in FENCE.findall(text_of(page)) if language in languages]


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text_of(page)))


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks that call fewbit."""
    lines = "\n".join(blocks(page, "sh", "bash", "console", "")).replace("\\\n", " ").splitlines()
    return [line.strip().removeprefix("$ ") for line in lines if re.match(r"\s*(\$ )?fewbit ", line)]


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
    for command in commands(page):
        _, verb, *arguments = shlex.split(command, comments=True)
        VERBS[verb].make_context(verb, arguments).close()


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
    mentioned = "\n".join([*inline_code(page), *blocks(page, "sh")])
    assert set(re.findall(r"^make ([a-z0-9-]+)", mentioned, re.MULTILINE)) <= targets


@pages()
def test_python_blocks_compile(page):
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


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


def test_the_example_format_works(monkeypatch):
    monkeypatch.setattr(base, "_FORMATS", dict(base._FORMATS))
    (example,) = blocks(ROOT / "docs" / "add-a-format.md", "python")
    exec(compile(example, "add-a-format.md", "exec", dont_inherit=True), {"__name__": "example"})
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
    assert example == text_of(ROOT / "src" / "fewbit" / "models" / "qwen.py")
