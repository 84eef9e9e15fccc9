"""Real servers on real sockets, some of which spoil their answers."""

import contextlib
import json
import socket
from dataclasses import dataclass

from starlette.responses import JSONResponse, Response

from potstill.models.causal import CausalLM
from potstill.serving.engine import Engine
from potstill.serving.server import application, running


@dataclass
class Served:
    url: str
    engine: Engine
    posts: list  # the bodies of POST /v1/completions, in the order in which they came

    @property
    def model(self) -> CausalLM:
        return self.engine.model


@contextlib.contextmanager
def serving(model, spoil=None, *, port=0, name="tiny", batch=32, wait=0.005, mode="raw_logprobs", **options):
    """A model's server. `spoil(count, answer)` may give another response to the count-th POST /v1/completions."""
    model = model if isinstance(model, CausalLM) else CausalLM.from_pretrained(model)
    engine, posts = Engine(model, batch=batch, wait=wait, mode=mode), []
    app = application(engine, name, **options)

    async def between(scope, receive, send):
        if scope["type"] != "http" or scope["path"] != "/v1/completions":
            await app(scope, receive, send)
            return
        chunks, heard = [], []

        async def hear():
            message = await receive()
            heard.append(message.get("body", b""))
            return message

        async def keep(message):
            chunks.append(message)

        count = len(posts)
        posts.append(None)
        await app(scope, hear, keep)
        with contextlib.suppress(ValueError):
            posts[count] = json.loads(b"".join(heard))
        body = b"".join(m.get("body", b"") for m in chunks[1:])
        status = chunks[0]["status"]
        response = spoil(count, json.loads(body)) if spoil and status == 200 else None
        if hasattr(response, "__await__"):
            response = await response
        if isinstance(response, dict):
            response = Response(json.dumps(response), media_type="application/json")  # NaN too, as some servers do
        await (response or Response(body, status, media_type="application/json"))(scope, receive, send)

    with running(between, port=port) as url:
        yield Served(url, engine, posts)
    engine.close()


def failure(status, message="no reason", code=None, headers=None):
    return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": code}}, status, headers)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as place:
        return place.getsockname()[1]
