"""The routes: requests checked, handed to a backend, and answered as OpenAI's interface has it."""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response

from ternlm.infer.worker import Load
from ternlm.serve.backend import Backend, ServedModel
from ternlm.serve.checked import Checked, check_chat, check_completion, check_model, encode_messages
from ternlm.serve.choices import ChatChoice, Choice, CompletionChoice, Speller, places_of
from ternlm.serve.errors import ApiError, handle_errors, json_response
from ternlm.serve.exchange import Exchange
from ternlm.serve.guard import Gate, Guard, Rules
from ternlm.serve.metrics import Metrics
from ternlm.serve.requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": {}, "code": {}},
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def make_app(served: ServedModel, backend: Backend, rules: Rules | None = None, gate: Gate | None = None) -> FastAPI:
    """Return the application. gate: closed, it refuses what is new."""
    rules, gate = rules or Rules(), gate or Gate()
    metrics = Metrics(backend.load)
    errors: dict[int | str, dict[str, Any]] = {
        "4XX": {"description": "refused", "content": {"application/json": {"schema": _ERROR}}}
    }
    app = FastAPI(title="TernLM", docs_url=None, redoc_url=None, responses=errors, separate_input_output_schemas=False)
    handle_errors(app)
    front = Front(served, backend, metrics)
    app.post("/v1/chat/completions")(front.chat)
    app.post("/v1/completions")(front.complete)
    app.get("/v1/models")(front.list_models)
    app.get("/v1/models/{name:path}")(front.show_model)
    app.post("/tokenize")(front.tokenize)
    app.post("/detokenize")(front.detokenize)
    app.get("/health")(front.health)
    app.get("/metrics")(front.tell_metrics)
    routes = [route.path for route in app.routes if hasattr(route, "path")]
    app.add_middleware(Guard, rules=rules, gate=gate, answered=metrics.answered, routes=routes)
    return app


class Front:
    """What the routes do."""

    def __init__(self, served: ServedModel, backend: Backend, metrics: Metrics) -> None:
        self._served, self._backend, self._metrics = served, backend, metrics
        self._speller = Speller(served.tokenizer)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        served = self._served
        check_model(served, body.model)
        checked = await asyncio.to_thread(check_chat, served, body)
        logprobs, form = bool(body.logprobs), checked.tool_format
        choices = [ChatChoice(index, self._speller, logprobs=logprobs, form=form) for index in range(len(checked.jobs))]
        names = {"prefix": "chatcmpl", "whole": "chat.completion", "chunk": "chat.completion.chunk"}
        return await self._answer(request, body, checked, choices, names)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Continue texts."""
        check_model(self._served, body.model)
        checked, choices = await asyncio.to_thread(self._completion, body)
        names = {"prefix": "cmpl", "whole": "text_completion", "chunk": "text_completion"}
        return await self._answer(request, body, checked, choices, names)

    def _completion(self, body: CompletionRequest) -> tuple[Checked, list[CompletionChoice]]:
        checked = check_completion(self._served, body)
        num, tokenizer = body.n or 1, self._served.tokenizer
        choices: list[CompletionChoice] = []
        for given, prompt in zip(body.prompts, checked.prompts, strict=True):
            echo = None
            if body.echo:
                text = given if isinstance(given, str) else tokenizer.decode(prompt)
                echo = text, prompt, places_of(tokenizer, prompt) if body.logprobs is not None else []
            for _ in range(num):
                choices.append(
                    CompletionChoice(
                        len(choices),
                        self._speller,
                        logprobs=body.logprobs is not None,
                        echo=echo,
                        prompt_alone=body.max_tokens == 0,
                    )
                )
        return checked, choices

    async def _answer(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        checked: Checked,
        choices: Sequence[Choice],
        names: dict[str, str],
    ) -> Response:
        watches = [self._metrics.watch(len(job.prompt)) for job in checked.jobs]
        answers = await self._backend.start(checked.jobs)
        lengths = [len(prompt) for prompt in checked.prompts]
        exchange = Exchange(answers, choices, watches, lengths, {**names, "model": self._served.name})
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        return await exchange.respond(request, bool(body.stream), include_usage)

    async def list_models(self) -> Response:
        """List the model that is served."""
        return json_response({"object": "list", "data": [self._model()]})

    async def show_model(self, name: str) -> Response:
        """Tell of the model that is served."""
        check_model(self._served, name)
        return json_response(self._model())

    def _model(self) -> dict[str, Any]:
        served = self._served
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "ternlm",
            "max_model_len": served.max_tokens,
        }

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """Encode a text or a conversation."""
        check_model(self._served, body.model)
        ids = await asyncio.to_thread(self._encode, body)
        return json_response({"count": len(ids), "max_model_len": self._served.max_tokens, "tokens": ids})

    def _encode(self, body: TokenizeRequest) -> list[int]:
        if body.messages is not None:
            answered = body.add_generation_prompt is not False
            return list(encode_messages(self._served, body.messages, body.tools, answered))
        tokenizer = self._served.tokenizer
        begin = body.add_special_tokens is not False and tokenizer.bos_id is not None
        ids = tokenizer.encode(body.prompt or "")
        return [tokenizer.bos_id, *ids] if begin and tokenizer.bos_id is not None else ids

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """Decode token ids."""
        check_model(self._served, body.model)
        text = await asyncio.to_thread(self._served.tokenizer.decode, body.tokens)
        return json_response({"prompt": text})

    async def health(self) -> Response:
        """Say whether requests are served."""
        if not self._backend.is_alive:
            raise ApiError(503, "the engine has ended; start the server anew", code="engine_dead")
        load: Load = self._backend.load()
        return json_response({"status": "ok", "running": load.running, "waiting": load.waiting})

    async def tell_metrics(self) -> Response:
        """Tell what was measured, as Prometheus reads it."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
