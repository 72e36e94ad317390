"""The routes: OpenAI's `/v1`, `/health`, `/metrics`, and the chat page."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from fewbit import __version__
from fewbit.errors import UsageError
from fewbit.serve.answers import Answer, ChatAnswer, CompletionAnswer
from fewbit.serve.api_errors import ApiError, validation_error
from fewbit.serve.limits import Admission, Guard
from fewbit.serve.metrics import Metrics
from fewbit.serve.schemas import ChatRequest, CompletionRequest, GenerationRequest
from fewbit.serve.settings import Settings
from fewbit.serve.streaming import STALLED_SECONDS, ClientGone, EventStream, Generation, unless_gone

PAGE = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/markdown.js": ("markdown.js", "text/javascript"),
}


class Service:
    """What the routes share: the engine, the limits and the counters."""

    def __init__(self, engine: Any, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.name = settings.model_name or engine.name
        self.created = int(time.time())
        self.metrics = Metrics(engine)
        self.admission = Admission(engine.stats()["slots"], settings.queue)
        # Twice what a text of the longest tokens alone would have: some tokenizers shorten texts before they cut them.
        self.most_characters = 2 * engine.context * max(map(len, engine.tokenizer.get_vocab()))

    def model(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "fewbit",
            "max_model_len": self.engine.context,
        }

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"the model '{name}' is not here; this server has '{self.name}'",
                code="model_not_found",
                param="model",
            )

    def check_length(self, characters: int) -> None:
        """Refuse a text that cannot fit before it is tokenized, which takes hundreds of times its memory."""
        if characters > self.most_characters:
            raise ApiError(
                400,
                f"the context holds {self.engine.context} tokens, the prompt has {characters} characters; shorten it",
                code="context_length_exceeded",
            )

    def tokens(self, prompt: str | list[int]) -> list[int]:
        """The ids of a prompt, checked. Called by several threads."""
        if isinstance(prompt, str):
            self.check_length(len(prompt))
        ids: list[int] = self.engine.encode(prompt)
        if not ids:
            raise ApiError(400, "the prompt has no tokens; give at least one", code="invalid_value", param="prompt")
        if min(ids) < 0 or max(ids) >= self.engine.vocabulary:
            raise ApiError(
                400,
                f"token ids must be from 0 to {self.engine.vocabulary - 1}",
                code="invalid_value",
                param="prompt",
            )
        return ids

    def room(self, prompts: list[list[int]], wanted: int | None) -> int:
        """The most tokens that each prompt may get: what was asked for, or all that the context holds."""
        longest = max(map(len, prompts))
        context = self.engine.context
        if longest + (wanted or 1) > context:
            asked = f" and {wanted} were asked for" if wanted else ""
            raise ApiError(
                400,
                f"the context holds {context} tokens, the prompt has {longest}{asked}; shorten it"
                + (" or ask for fewer" if wanted else ""),
                code="context_length_exceeded",
                param="max_tokens" if wanted and longest < context else None,
            )
        return wanted or context - longest

    async def answer(
        self,
        request: Request,
        body: GenerationRequest,
        prompts: int,
        tokenize: Callable[[], list[list[int]]],
        answer: Answer,
    ) -> Response:
        """Run a request of so many prompts to its end, or give back the stream that will."""
        self.check_model(body.model)
        if body.choices > self.settings.max_choices:
            limit = self.settings.max_choices
            raise ApiError(400, f"this server gives up to {limit} choices", code="invalid_value", param="n")
        generation = Generation(self.engine, self.admission, self.metrics, self.settings.request_timeout)
        # Before the prompt is read, which is work too.
        generation.enter(prompts * body.choices, "prompt" if prompts > 1 else "n")
        try:
            tokens = await asyncio.to_thread(tokenize)
            room = self.room(tokens, body.token_limit())
            generation.start(tokens, [body.sampling(room, choice) for choice in range(body.choices)])
        except BaseException:
            generation.close()
            raise
        if body.stream:
            return EventStream(generation, lambda: answer.stream(generation, body.wants_usage))
        try:
            time_left = generation.time_left + STALLED_SECONDS
            return JSONResponse(await unless_gone(request.receive, answer.whole(generation), time_left))
        except ClientGone:
            return Response(status_code=499)
        finally:
            generation.close()


def create_app(engine: Any, settings: Settings | None = None) -> FastAPI:
    """The server as an ASGI application over an `Engine`, which stays the caller's to close.

    `app.state.service.admission` is what a graceful shutdown talks to.
    """
    settings = settings or Settings()
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.admission.abort()

    # The interactive documentation would load scripts from elsewhere, which the security headers forbid.
    app = FastAPI(title="fewbit", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(Guard, settings=settings, admission=service.admission, metrics=service.metrics)
    _add_error_handlers(app)
    _add_api(app, service)
    _add_operations(app, service)
    if settings.page:
        _add_page(app)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return validation_error(error.errors()).response()

    @app.exception_handler(UsageError)
    async def misused(_: Request, error: UsageError) -> Response:
        return ApiError(400, str(error), code="invalid_value").response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        messages = {
            404: (f"there is nothing at {request.url.path}", "not_found"),
            405: (f"{request.method} is not for {request.url.path}", "method_not_allowed"),
        }
        message, code = messages.get(error.status_code, (str(error.detail), "invalid_request"))
        return ApiError(error.status_code, message, code=code, headers=error.headers).response()


def _add_api(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model()

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        answer = CompletionAnswer(service.name, body.alternatives() is not None)

        def tokenize() -> list[list[int]]:
            return [service.tokens(prompt) for prompt in body.prompt]

        return await service.answer(request, body, len(body.prompt), tokenize, answer)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        messages = [message.for_template() for message in body.messages]
        service.check_length(sum(len(message["content"]) for message in messages))
        answer = ChatAnswer(service.name, body.alternatives() is not None)

        def tokenize() -> list[list[int]]:
            return [service.tokens(service.engine.encode_chat(messages))]

        return await service.answer(request, body, 1, tokenize, answer)


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        draining = service.admission.draining
        stats = service.engine.stats()
        body = {
            "status": "draining" if draining else "ok",
            "model": service.name,
            "running": stats["running"],
            "waiting": stats["waiting"],
            "key_required": service.settings.api_key is not None,
        }
        return JSONResponse(body, 503 if draining else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI) -> None:
    folder = files("fewbit.serve") / "page"

    def add(path: str, name: str, kind: str) -> None:
        # Read once, from fixed names: no request's path ever reaches a file system.
        content = (folder / name).read_bytes()

        @app.get(path, include_in_schema=False)
        async def page() -> Response:
            return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    for path, (name, kind) in PAGE.items():
        add(path, name, kind)
