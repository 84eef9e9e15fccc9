"""The network's side of the server: OpenAI's `/v1/completions` as vLLM speaks it, over any transformers model.

For laptops, tests and one machine; for many requests at once take vLLM.

As vLLM does: `prompt_logprobs=K` gives the K likeliest tokens at each place of the prompt and the prompt's own, always at
temperature 1; `logprobs=K` those of the new tokens, before temperature and truncation ("raw_logprobs") unless the server
was started with "processed_logprobs"; -inf travels as -9999, for JSON has no infinity. Unlike vLLM, a field that is not
understood is refused, and so is a NaN: the request fails and says where.
"""

import asyncio
import hmac
import json
import os
import secrets
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args

import torch
from pydantic import ValidationError

from potstill.contracts.errors import PotstillError, RecipeError, RunError, did_you_mean, require
from potstill.models.build import DTYPES, location
from potstill.models.causal import CausalLM
from potstill.serving.engine import Answer, Completions, Engine, Job, Mode, Place, Refusal, seed_of

LOWEST = -9999.0  # what -inf is sent as
KEY = "POTSTILL_API_KEY"  # the environment variable that holds the key of servers and clients


def application(
    engine: Engine,
    name: str,
    *,
    key: str | None = None,
    max_logprobs: int = 1024,
    refresh_from: Path | None = None,
) -> Any:
    """The ASGI application of an engine. `key`: what a client must send; `refresh_from`: the folder below which weights
    may be taken on demand (None: nowhere)."""
    starlette = require("starlette.applications", "serve")
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    began = int(time.time())
    room: int | None = getattr(engine.model.network.config, "max_position_embeddings", None)
    tokenizer, vocabulary = engine.model.tokenizer, engine.model.vocabulary
    word = cache(lambda token: tokenizer.decode([token]))

    async def body(request: Request) -> dict[str, Any]:
        try:
            value = json.loads(await request.body())
        except ValueError as cause:
            raise Refusal(400, f"The body is not valid JSON: {cause}.") from cause
        if not isinstance(value, dict):
            raise Refusal(400, "The body must be a JSON object.")
        return value

    async def completions(request: Request) -> Response:
        asked = parsed(await body(request))
        if asked.model not in (None, name):
            raise Refusal(
                404,
                f"There is no model {asked.model} here. This server has {name}.",
                param="model",
                code="model_not_found",
            )
        for field_, k in (("logprobs", asked.logprobs), ("prompt_logprobs", asked.prompt_logprobs)):
            if k is not None and k > max_logprobs:
                raise Refusal(
                    400,
                    f"{field_} is {k}, and this server gives {max_logprobs} at most (--max-logprobs).",
                    param=field_,
                )
        prompts = [checked(prompt, asked) for prompt in prompts_of(asked, tokenizer)]
        seed = asked.seed if asked.seed is not None else secrets.randbits(63)
        jobs = [
            Job(ids, asked, seed_of(seed, i * asked.n + g), limit_of(ids, asked))
            for i, ids in enumerate(prompts)
            for g in range(asked.n)
        ]
        answers = await answered(request, jobs)
        return JSONResponse(
            {
                "id": f"cmpl-{uuid.uuid4().hex}",
                "object": "text_completion",
                "created": int(time.time()),
                "model": name,
                "choices": [choice(i, job, answer) for i, (job, answer) in enumerate(zip(jobs, answers))],
                "usage": usage(prompts, answers),
            }
        )

    def checked(ids: list[int], asked: Completions) -> list[int]:
        if not ids:
            raise Refusal(
                400, "A prompt is empty, so nothing predicts its next token. Start it with a token.", param="prompt"
            )
        wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
        if wrong is not None:
            raise Refusal(
                400, f"Token id {wrong} is out of vocabulary: {name} has {vocabulary} tokens.", param="prompt"
            )
        new = asked.max_tokens or 0
        if room is not None and len(ids) + new > room:
            raise Refusal(
                400,
                f"A prompt of {len(ids)} tokens and {new} new ones exceed the {room} positions of {name}.",
                param="prompt",
                code="context_length_exceeded",
            )
        if asked.max_tokens == 0 and not asked.echo:
            raise Refusal(400, "max_tokens must be at least 1 without echo.", param="max_tokens")
        return ids

    def limit_of(ids: list[int], asked: Completions) -> int:
        return asked.max_tokens if asked.max_tokens is not None else (16 if room is None else room - len(ids))

    async def answered(request: Request, jobs: list[Job]) -> list[Answer]:
        """Wait for the engine; whoever hangs up meanwhile leaves the queue."""
        engine.submit(jobs)
        work = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
        while not (await asyncio.wait([work], timeout=1.0))[0]:
            if await request.is_disconnected():
                for job in jobs:
                    job.future.cancel()
                raise Refusal(499, "The client has gone.")
        return work.result()

    def choice(index: int, job: Job, answer: Answer) -> dict[str, Any]:
        asked = job.asked
        made: dict[str, Any] = {"index": index, "text": answer.text, "logprobs": None}
        if asked.echo:
            prompt = asked.prompt if isinstance(asked.prompt, str) else engine.decode(job.ids, asked)
            made["text"] = prompt + answer.text
        if asked.logprobs is not None:
            ids, found = answer.tokens, list[Place | None](answer.places)
            if asked.echo:
                ids, found = job.ids + ids, [None, *(answer.prompt or []), *found]
            made["logprobs"] = logprobs(ids, found, asked)
        made["finish_reason"], made["stop_reason"] = answer.finish, answer.stop
        made["prompt_logprobs"] = None
        if asked.prompt_logprobs is not None:
            made["prompt_logprobs"] = [None, *(entry(p, asked.prompt_logprobs) for p in answer.prompt or [])]
        if asked.return_token_ids:
            made["prompt_token_ids"], made["token_ids"] = job.ids, answer.tokens
        return made

    def entry(place: Place, k: int) -> dict[str, Any]:
        return {
            str(token): {"logprob": max(logp, LOWEST), "rank": rank, "decoded_token": word(token)}
            for token, (logp, rank) in place.first(k).items()
        }

    def logprobs(ids: list[int], found: list[Place | None], asked: Completions) -> dict[str, Any]:
        as_text = (lambda t: f"token_id:{t}") if asked.return_tokens_as_token_ids else word
        offsets, at = [], 0
        for token in ids:
            offsets.append(at)
            at += len(word(token))
        k = asked.logprobs or 0
        return {
            "tokens": [as_text(token) for token in ids],
            "token_logprobs": [None if p is None else max(p.own[1], LOWEST) for p in found],
            "top_logprobs": [
                None if p is None else {as_text(t): max(logp, LOWEST) for t, (logp, _) in p.first(k).items()}
                for p in found
            ],
            "text_offset": offsets,
        }

    async def models(request: Request) -> Response:
        about = {"id": name, "object": "model", "created": began, "owned_by": "potstill", "max_model_len": room}
        return JSONResponse({"object": "list", "data": [about]})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"}) if engine.thread.is_alive() else JSONResponse({"status": "dead"}, 503)

    async def refresh(request: Request) -> Response:
        folder = (await body(request)).get("folder")
        if refresh_from is None:
            raise Refusal(403, "This server takes no new weights. Start it with --refresh-from FOLDER.")
        if not isinstance(folder, str) or not Path(folder).resolve().is_relative_to(refresh_from.resolve()):
            raise Refusal(403, f"folder must lie in {refresh_from}, from where this server takes new weights.")
        try:
            await run_in_threadpool(engine.refresh, Path(folder))
        except PotstillError as error:
            raise Refusal(400, str(error), param="folder") from error
        return JSONResponse({"model": name, "folder": folder})

    async def refused(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = Refusal(error.status_code, f"{error.detail}: {request.method} {request.url.path}.")
        elif not isinstance(error, Refusal):
            error = Refusal(500, f"{type(error).__name__}: {error}")
        return JSONResponse(error.body, error.status)

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/refresh", refresh, methods=["POST"]),
        Route("/health", health),
    ]
    app = starlette.Starlette(
        routes=routes, exception_handlers={Refusal: refused, HTTPException: refused, Exception: refused}
    )
    return app if key is None else locked(app, key)


def locked(app: Any, key: str) -> Any:
    """The application behind a key; only /health is open."""
    from starlette.responses import JSONResponse

    wanted = f"Bearer {key}".encode()
    refusal = Refusal(
        401, "The API key is missing or wrong. Send it as Authorization: Bearer KEY.", code="invalid_api_key"
    )

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        shut = scope["type"] == "http" and scope["path"] != "/health" and not hmac.compare_digest(given, wanted)
        await (JSONResponse(refusal.body, 401) if shut else app)(scope, receive, send)

    return guarded


def parsed(value: dict[str, Any]) -> Completions:
    """A request's body, or a Refusal that names the first field that is wrong."""
    try:
        return Completions.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        message = f"{name} is not a field of a completion request.{did_you_mean(name, Completions.model_fields)}"
    elif name == "prompt":
        message = "prompt must be a string, a list of strings, a list of token ids or a list of such lists."
    else:
        message = f"{name}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}."
    raise Refusal(400, message, param=name)


def prompts_of(asked: Completions, tokenizer: Any) -> list[list[int]]:
    """The prompts of a request as token ids."""
    given: list[Any] = asked.prompt if isinstance(asked.prompt, list) else [asked.prompt]
    rows = [given] if given and isinstance(given[0], int) else given
    if not rows:
        raise Refusal(400, "prompt is an empty list.", param="prompt")
    read = lambda text: tokenizer(text, add_special_tokens=asked.add_special_tokens)["input_ids"]
    return [list(read(row) if isinstance(row, str) else row) for row in rows]


def usage(prompts: list[list[int]], answers: list[Answer]) -> dict[str, int]:
    read, made = sum(map(len, prompts)), sum(len(answer.tokens) for answer in answers)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


# ---------------------------------------------------------------- running it


def listening(host: str, port: int) -> socket.socket:
    """A socket that is bound already, so that a port in use is one sentence and port 0 a free one."""
    try:
        return socket.create_server((host, port))
    except OSError as cause:
        raise RunError(
            f"{host}:{port} cannot be listened on ({cause.strerror}). Choose another with --port."
        ) from cause


def server_of(app: Any) -> Any:
    uvicorn = require("uvicorn", "serve")
    return uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=60)
    )


@contextmanager
def running(app: Any, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """An application served by a thread of this process for as long as the block lasts. Gives its base URL."""
    server = server_of(app)
    with listening(host, port) as place:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        try:
            yield f"http://{host}:{place.getsockname()[1]}/v1"
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


def serve(
    model: str,
    *,
    host: str,
    port: int,
    name: str | None,
    dtype: str,
    device: str,
    batch: int,
    wait: float,
    max_logprobs: int,
    mode: str,
    refresh_from: Path | None,
) -> None:
    """Load a model and serve it until interrupted. The key is read from the environment variable POTSTILL_API_KEY."""
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype} is unknown.{did_you_mean(dtype, DTYPES)}")
    if mode not in get_args(Mode):
        raise RecipeError(f"--logprobs-mode {mode} is unknown.{did_you_mean(mode, get_args(Mode))}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    server = server_of(None)  # what is not installed is said before the weights are read
    with listening(host, port) as place:
        folder = Path(model) / "student"
        loaded = CausalLM.from_pretrained(folder if folder.is_dir() else location(model), dtype=DTYPES[dtype])
        key = os.environ.get(KEY) or None
        engine = Engine(loaded.to(device), batch=batch, wait=wait, mode=cast(Mode, mode))
        name = name or model
        server.config.app = application(engine, name, key=key, max_logprobs=max_logprobs, refresh_from=refresh_from)
        address = f"http://{host}:{place.getsockname()[1]}/v1"
        print(f"{name} at {address}, {'with the key of ' + KEY if key else 'without a key'}.", flush=True)
        if not key and host not in ("127.0.0.1", "localhost", "::1"):
            print(f"potstill: anyone who reaches {host} may ask this server. Set {KEY}.", file=sys.stderr, flush=True)
        server.run(sockets=[place])
        engine.close()
