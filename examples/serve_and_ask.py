"""Serve a checkpoint and ask it: python serve_and_ask.py OUT "Once upon a time"

Any client of OpenAI's API does the same; this one needs nothing but Python. The server stays on this machine and ends
with the program.
"""

import argparse
import json
import os
import socket
import subprocess
import time
import urllib.request

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("checkpoint")
parser.add_argument("prompt")
parser.add_argument("--max-tokens", type=int, default=32)
arguments = parser.parse_args()

# A proxy that the environment names would look for the address on its own machine.
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
address = f"http://127.0.0.1:{port}"
server = subprocess.Popen(["fewbit", "serve", arguments.checkpoint, "--port", str(port)])
try:
    while True:
        try:
            opener.open(f"{address}/health", timeout=10).close()
            break
        except OSError:  # refused, reset, too late, or not ready yet
            if server.poll() is not None:
                raise SystemExit("the server did not start") from None
            time.sleep(0.1)
    question = {"prompt": arguments.prompt, "max_tokens": arguments.max_tokens, "temperature": 0, "stream": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('FEWBIT_API_KEY', '')}"}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(question).encode(), headers)
    # The server gives a sign of life every 15 seconds.
    with opener.open(request, timeout=60) as answer:
        for line in answer:
            # Each event is a line that starts with "data: ", and the last one is no JSON; other lines are comments.
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise SystemExit(event["error"]["message"])
            print(event["choices"][0]["text"], end="", flush=True)
    print()
finally:
    server.terminate()
    server.wait()
