"""docs/serving.md says what the server does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx2

from fewbit.serve.limits import OPEN
from fewbit.serve.schemas import IGNORED, REFUSED_CHAT, REFUSED_COMPLETION, ChatRequest, CompletionRequest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def test_every_field_is_on_the_page():
    fields = {*CompletionRequest.model_fields, *ChatRequest.model_fields, *IGNORED, *REFUSED_CHAT, *REFUSED_COMPLETION}
    assert {field for field in fields if f"`{field}`" not in PAGE} == set()


def test_every_metric_is_on_the_page_and_the_other_way_round(shared):
    kinds = re.findall(r"^# TYPE (\w+) (\w+)$", httpx2.get(shared.url + "/metrics").text, re.MULTILINE)
    names = {name for name, _ in kinds if not name.endswith("_created")}
    assert set(re.findall(r"`(fewbit_\w+)`", PAGE)) == names


def test_every_route_is_on_the_page(shared):
    routes = {route.path.replace("{name:path}", "NAME") for route in shared.app.routes} - (OPEN - {"/", "/health"})
    listed = {route for routes in re.findall(r"^\| (`(?:GET|POST) .+?) \|", PAGE, re.MULTILINE)
              for route in re.findall(r"`(?:GET|POST) (\S+)`", routes)}  # fmt: skip
    assert listed == routes


def test_the_examples_are_served(shared):
    examples = re.findall(r"curl http://127.0.0.1:8000(\S+) .*?-d '(.+?)'", PAGE, re.DOTALL)
    assert len(examples) == 2
    for path, body in examples:
        assert httpx2.post(shared.url + path, json=json.loads(body)).status_code == 200
