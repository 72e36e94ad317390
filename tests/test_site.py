"""The documentation's site builds without a warning, and asks nobody for anything."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    # Not with --quiet, which takes the warnings away before they are counted.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return out


def test_every_page_of_the_docs_the_readme_and_the_changes_are_there(site):
    names = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"changes", "examples", "reference"}
    assert {path.parent.name for path in site.glob("*/index.html")} >= names
    assert "Your own model" in (site / "index.html").read_text(encoding="utf-8")


def test_the_reference_has_what_the_package_exports(site):
    import fewbit

    page = (site / "reference" / "index.html").read_text(encoding="utf-8")
    for name in set(fewbit.__all__) - {"__version__"}:
        assert re.search(rf'id="fewbit\.[\w.]*\.?{name}"', page), name


def test_the_reference_has_every_module_that_is_listed(site):
    listed = re.findall(r'"(fewbit\.[\w.]+)"', (ROOT / "scripts" / "site_pages.py").read_text(encoding="utf-8"))
    page = (site / "reference" / "index.html").read_text(encoding="utf-8")
    assert listed
    for module in listed:
        assert re.search(rf'id="{re.escape(module)}\.\w+"', page), module


def test_links_to_examples_lead_to_their_code(site):
    examples = (site / "examples" / "index.html").read_text(encoding="utf-8")
    linked = set()
    for page in ("index.html", "quantizing/index.html", "serving/index.html", "hosts/index.html"):
        found = re.findall(r'href="(?:\.\./)?examples/#(\w+)"', (site / page).read_text(encoding="utf-8"))
        assert found, page
        linked.update(found)
    assert linked == {path.name.replace(".", "") for path in (ROOT / "examples").glob("*.py")}
    assert all(f'id="{name}"' in examples for name in linked)


def test_pages_load_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="(https?:[^"]+)"', text)
        loaded += re.findall(r'<link[^>]*rel="(?:stylesheet|preconnect|preload)"[^>]*href="(https?:[^"]+)"', text)
        assert not loaded, f"{path}: {loaded}"
