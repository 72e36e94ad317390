#!/bin/sh
# Damages files by what the interpreter covers, with atheris, in an environment of its own (build/fuzz): the readers that
# run in one process, safetensors headers, indices, configurations, plans and GGUF headers.
# Usage: fuzz.sh [SECONDS], 600 by default. A finding is written to build/fuzz/crash-* and ends the run.
set -eu

build=$PWD/build/fuzz
mkdir -p "$build/corpus"
if [ ! -x "$build/venv/bin/python" ]; then
    # .venv lends its packages; atheris has wheels for some versions of Python only.
    .venv/bin/python -m venv "$build/venv"
    site='import sysconfig; print(sysconfig.get_path("platlib"))'
    .venv/bin/python -c "$site" >"$("$build/venv/bin/python" -c "$site")/lent.pth"
    echo "$PWD/src" >>"$("$build/venv/bin/python" -c "$site")/lent.pth"
    "$build/venv/bin/pip" install --quiet atheris || {
        rm -rf "$build/venv"
        echo "fuzz: atheris has no wheel for this Python; benchmarks/robustness.py files needs none" >&2
        exit 1
    }
fi
"$build/venv/bin/python" tests/robustness/fuzz_readers.py "$build/corpus" -max_total_time="${1:-600}" -timeout=5 \
    -rss_limit_mb=2048 -artifact_prefix="$build/"
