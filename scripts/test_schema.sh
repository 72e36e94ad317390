#!/bin/sh
# Starts a server with a toy model and lets schemathesis, in an environment of its own, send what its OpenAPI schema
# allows and what it forbids; any 5xx fails. Usage: test_schema.sh [EXAMPLES]
set -eu
cd "$(dirname "$0")/.."
venv=build/schema-venv
tester=schemathesis==4.32.5
python=$(.venv/bin/python -c 'import sys; print(sys._base_executable)')

[ -x "$venv/bin/schemathesis" ] || "$python" -m venv --clear "$venv"
"$venv/bin/python" -m pip -qq --disable-pip-version-check install "$tester"
[ -f build/toy/config.json ] || .venv/bin/python benchmarks/toy.py build/toy
port=$(.venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
.venv/bin/fewbit serve build/toy --port "$port" --slots 4 --context 256 --timeout 60 &
server=$!
trap 'kill "$server"; wait "$server"' EXIT
until "$python" -c "import urllib.request as r; r.urlopen('http://127.0.0.1:$port/health')" 2>/dev/null; do
    kill -0 "$server"
    sleep 1
done
"$venv/bin/schemathesis" run "http://127.0.0.1:$port/openapi.json" --checks not_a_server_error --seed 1 \
    --max-examples "${1:-200}" --request-timeout 120 --report junit --report-junit-path build/schema.xml
