"""The locks: complete, hashed, in agreement with constraints.txt; the audit's reader; the wheel's contents."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("requirements.lock", "requirements-cuda.lock")


def locked(name: str) -> dict[str, tuple[Requirement, list[str]]]:
    """Requirement and hashes of every package of a lock."""
    text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    blocks = [block for block in re.split(r"\n(?=\S)", text.strip()) if block]
    found = {}
    for block in blocks:
        first, *rest = block.replace("\\\n", "\n").splitlines()
        requirement = Requirement(first.strip())
        key = canonicalize_name(requirement.name)
        found[f"{key} {requirement.marker or ''}"] = (requirement, [line.strip() for line in rest])
    return found


def wanted(name: str) -> dict[str, Requirement]:
    """The lines of a requirements file that hold for this interpreter."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    every = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(entry.name): entry for entry in every if not entry.marker or entry.marker.evaluate()}


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_one_version_and_hashes(name):
    entries = locked(name)
    assert entries
    for requirement, hashes in entries.values():
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), requirement
        assert hashes, requirement
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in hashes), requirement
        assert len(set(hashes)) == len(hashes), requirement


@pytest.mark.parametrize("name", LOCKS)
def test_locks_name_no_place_to_fetch_from(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"://|--(extra-)?index-url|--find-links|--trusted-host| @ ", text)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the lock is for Python 3.11 and later")
def test_the_lock_holds_what_constraints_say():
    packages = {key.split(" ")[0]: entry for name in LOCKS for key, (entry, _) in locked(name).items()
                if not entry.marker or entry.marker.evaluate({"sys_platform": "linux"})}  # fmt: skip
    for name, constraint in wanted("constraints.txt").items():
        assert name in packages, f"{name} is not locked: make lock"
        assert packages[name].specifier == constraint.specifier, f"{name}: make lock"


def test_the_lock_holds_what_the_project_depends_on():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = [re.search(rf"^{key} = \[\n?(.*?)\]\n", text, re.MULTILINE | re.DOTALL)
             for key in ("dependencies", "demo", "serve", "dev")]  # fmt: skip
    entries = [entry for found in lists for entry in re.findall(r'"(.+?)"', found[1].replace("[python]", ""))]
    names = {canonicalize_name(Requirement(entry).name) for entry in entries}
    assert len(names) > 20
    assert names <= {key.split(" ")[0] for key in locked("requirements.lock")}


def test_nothing_of_cuda_is_in_the_lock_that_everybody_gets():
    assert not [key for key in locked("requirements.lock") if key.startswith(("nvidia", "cuda", "triton"))]


def audit(tmp_path, *packages: dict) -> int:
    spec = importlib.util.spec_from_file_location("audit_report", ROOT / "scripts" / "audit_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    report = tmp_path / "audit.json"
    report.write_text(json.dumps({"dependencies": packages}))
    return module.main(str(report))


def test_packages_that_were_not_looked_at_are_not_called_clean(tmp_path, capsys):
    clean = {"name": "a", "version": "1", "vulns": []}
    assert audit(tmp_path, clean) == 0
    assert audit(tmp_path, clean, {"name": "b", "skip_reason": "not found"}) == 2
    assert "1 of 2 packages were not audited" in capsys.readouterr().out
    bad = {"name": "c", "version": "2", "vulns": [{"id": "X-1", "fix_versions": ["3"]}]}
    assert audit(tmp_path, clean, bad) == 1
    assert "c 2: X-1, mended in 3" in capsys.readouterr().out


def test_the_build_of_torch_without_cuda_is_the_same_version():
    line = (ROOT / "requirements-cpu.lock").read_text(encoding="utf-8").splitlines()[-1]
    found = re.fullmatch(r"torch==(\S+)\+cpu --hash=sha256:[0-9a-f]{64}", line)
    assert found
    assert f"=={found[1]}" == str(locked("requirements.lock")["torch "][0].specifier)
