"""The client over real sockets, against servers that are slow, false, broken or away: what is asked again, what is believed,
and in which words it gives up."""

import asyncio
import json
import math
import re
import threading
import time
from types import SimpleNamespace

import pytest
from starlette.responses import Response
from tests.serving.servers import failure, free_port, serving

from potstill.contracts.errors import RecipeError
from potstill.models.causal import CausalLM
from potstill.serving.client import Client, ServerError

pytestmark = pytest.mark.needs("httpx", "starlette", "uvicorn")
ROWS = [[5 + i, 7, 9 + i, 11] for i in range(6)]
PLACES = [[1, 3]] * len(ROWS)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("potstill.serving.client.WAIT", 0.02)
    monkeypatch.delenv("POTSTILL_API_KEY", raising=False)


@pytest.fixture(scope="module")
def model(tiny_lm):
    return CausalLM.from_pretrained(tiny_lm(1))


def says(server, message):
    """One sentence from this server: its address, and what."""
    return re.escape(f"{server.url} {message}")


def client_of(server, **options):
    return Client(server.url, **{"rows": 1, "patience": 10.0, "timeout": 10.0} | options)


@pytest.fixture(scope="module")
def truth(model):
    with serving(model) as served:
        return Client(served.url).score(ROWS, PLACES, 4)


def same(found, truth):
    for one, other in zip(found, truth, strict=True):
        assert one.own == pytest.approx(other.own, abs=1e-5) and one.ids == other.ids
        for a, b in zip(one.top, other.top, strict=True):
            assert a == pytest.approx(b, abs=1e-5)


def test_rows_of_any_length_come_back_in_their_order(model):
    rows = [list(range(5, 5 + n)) for n in (2, 9, 4, 7, 3)]
    with serving(model) as served:
        together = Client(served.url, rows=2).score(rows, [[len(row) - 1] for row in rows], 3)
        assert sorted(len(post["prompt"]) for post in served.posts) == [1, 2, 2]
        assert [len(row) for row in served.posts[0]["prompt"]] in ([9, 7], [4, 3], [2])
        alone = [Client(served.url).score([row], [[len(row) - 1]], 3)[0] for row in rows]
    same(together, alone)


def test_no_more_at_once_than_allowed(model):
    now, most, lock = 0, 0, threading.Lock()

    async def slow(answer):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        await asyncio.sleep(0.05)
        with lock:
            now -= 1
        return answer

    with serving(model, lambda count, answer: slow(answer)) as served:
        client_of(served, concurrency=3).score(ROWS * 2, PLACES * 2, 1)
    assert most == 3


@pytest.mark.parametrize(
    "broken",
    [
        lambda: failure(500),
        lambda: failure(503, headers={"retry-after": "0.1"}),
        lambda: failure(429),
        lambda: Response(b'{"choices": [{"ind', media_type="application/json"),
        lambda: Response(b"<html>Bad gateway</html>", 502),
    ],
    ids=["500", "503", "429", "truncated", "502"],
)
def test_only_what_failed_is_asked_again(model, truth, broken):
    with serving(model, lambda count, answer: broken() if count in (1, 3) else None) as served:
        client = client_of(served)
        same(client.score(ROWS, PLACES, 4), truth)
        asked = [json.dumps(post["prompt"]) for post in served.posts]
    assert len(asked) == len(ROWS) + 2 and len(set(asked)) == len(ROWS)
    assert client.kept == {}


def test_the_server_says_how_long_to_wait(model):
    waits = []
    with serving(
        model, lambda count, answer: failure(503, headers={"retry-after": "0.4"}) if count < 2 else None
    ) as served:
        client = client_of(served)
        client.post("completions", client._payload([5, 6], max_tokens=1), halt=SimpleNamespace(wait=waits.append))
    assert waits == [0.4, 0.4]


def test_waits_double(model, monkeypatch):
    waits = []
    halt = SimpleNamespace(wait=waits.append)
    monkeypatch.setattr("potstill.serving.client.time", SimpleNamespace(monotonic=lambda: sum(waits)))
    monkeypatch.setattr("potstill.serving.client.random", SimpleNamespace(uniform=lambda low, high: low))
    monkeypatch.setattr("potstill.serving.client.WAIT", 1.0)
    with serving(model, lambda count, answer: failure(500)) as served:
        client = client_of(served)
        with pytest.raises(ServerError, match=says(served, "failed (500: no reason). It was asked 8 times. Look at")):
            client.post("completions", client._payload([5, 6], max_tokens=1), patience=60.0, halt=halt)
    # halved by the draw, 30 at most before that; one more would pass the 60 seconds
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0]


def test_patience_ends(model):
    with serving(model, lambda count, answer: failure(500, "out of memory.")) as served:
        message = says(served, "failed (500: out of memory). It was asked ") + r"\d+ times\. Look at the server's log\."
        with pytest.raises(ServerError, match=message):
            client_of(served, patience=0.2).score(ROWS, PLACES, 1)


def test_too_slow(model):
    async def slow(answer):
        await asyncio.sleep(0.5)
        return answer

    with serving(model, lambda count, answer: slow(answer)) as served:
        message = (
            says(served, "gave no answer within 0.1 s. It was asked ")
            + r"\d+ times\. Give it longer \(served\.timeout\)"
        )
        client = client_of(served, timeout=0.1, patience=0.3)
        with pytest.raises(ServerError, match=message):
            client.score(ROWS[:1], PLACES[:1], 1)


def test_nobody_there():
    url = f"http://127.0.0.1:{free_port()}/v1"
    message = (
        r"cannot be reached \(.*refused.*\)\. Correct the address, or start the server: potstill serve MODEL, or vllm"
    )
    with pytest.raises(ServerError, match=message):
        Client(url)


def test_what_was_told_is_kept_for_the_next_call(model, truth):
    """A refusal in the middle ends the call; made again, it asks for the rest only."""
    with serving(model, lambda count, answer: failure(400, "no") if count == 3 else None) as served:
        client = client_of(served, concurrency=1)
        with pytest.raises(ServerError, match=says(served, "refuses the request (400: no).")):
            client.score(ROWS, PLACES, 4)
        assert len(served.posts) == 4 and len(client.kept) == 3
        same(client.score(ROWS, PLACES, 4), truth)
        assert len(served.posts) == 4 + 3
        same(client.score(ROWS, PLACES, 4), truth)
        assert len(served.posts) == 4 + 3 + 6, "what a finished call was told is no cache"


def test_one_refusal_ends_the_waits_of_the_others(model):
    def spoil(count, answer):
        return failure(400, "no") if count == 5 else failure(500)

    with serving(model, spoil) as served:
        client = client_of(served, concurrency=6, patience=60.0)
        began = time.monotonic()
        with pytest.raises(ServerError, match=says(served, "refuses the request (400: no).")):
            client.score(ROWS, PLACES, 1)
        assert time.monotonic() - began < 10


def change(place, value):
    """Answers whose first choice has another value at a place, a path of keys."""

    def spoil(count, answer):
        at = answer["choices"][0]
        *way, last = place
        for key in way:
            at = at[key]
        at[last] = value(at[last]) if callable(value) else value
        return answer

    return spoil


def twice(choices):
    return [*choices, choices[0]]


LOGP = ("prompt_logprobs", 3, "11", "logprob")
FALSE = [
    (change(LOGP, math.nan), "sent nan where a log-probability belongs"),
    (change(LOGP, -math.inf), "sent -inf where a log-probability belongs"),
    (change(LOGP, None), "sent None where a log-probability belongs"),
    (change(LOGP, "-1"), "sent '-1' where a log-probability belongs"),
    (change(LOGP, True), "sent True where a log-probability belongs"),
    (change(LOGP, 0.1), "sent 0.1 where a log-probability belongs"),
    (change(("prompt_logprobs",), lambda v: v[:-1]), "sent log-probs of 3 tokens where 4 were asked for"),
    (change(("prompt_logprobs",), None), "sent an answer without prompt_logprobs"),
    (change(("prompt_logprobs", 3), None), "sent no log-probs of token 3 of a row"),
    (
        change(("prompt_logprobs", 3), lambda v: {f"{int(k) + 40}": x for k, x in v.items()}),
        "sent log-probs of other tokens at place 3 of a row, where 11 was asked for",
    ),
    (
        change(("prompt_logprobs", 3), lambda v: {"11": v["11"]}),
        "sent the 1 likeliest tokens at place 3 of a row, not the 4 asked for",
    ),
    (
        change(("prompt_logprobs", 3), lambda v: {t: {"logprob": -float(t)} for t in ("11", "12", "13", "14", "15")}),
        "sent the 5 likeliest tokens at place 3 of a row, not the 4 asked for",
    ),
    (
        change(("prompt_logprobs", 3), lambda v: {k: x | {"logprob": -0.5} for k, x in v.items()}),
        "sent probabilities that add up to more than 1 at place 3 of a row",
    ),
    (change(("prompt_logprobs", 3), lambda v: v | {"the": v["11"]}), "names a token 'the' instead of by its id"),
    (change(("index",), 1), "numbers its 1 choices ['1']"),
    (lambda count, answer: answer | {"choices": twice(answer["choices"])}, "sent 2 choices where 1 were asked for"),
    (lambda count, answer: answer | {"choices": []}, "sent 0 choices where 1 were asked for"),
    (lambda count, answer: {"object": "error"}, "sent an answer without choices"),
]


@pytest.mark.parametrize(("spoil", "message"), FALSE, ids=[m for _, m in FALSE])
def test_what_cannot_be_true_is_not_believed_and_not_asked_again(model, spoil, message):
    with serving(model, spoil) as served:
        client = client_of(served)
        with pytest.raises(
            ServerError, match=says(served, message) + r"\. It is no server that can teach: vLLM and potstill"
        ):
            client.score(ROWS[:1], PLACES[:1], 4)
        assert len(served.posts) == 1


def test_minus_infinity_and_the_tokens_own_entry(model):
    """What stands for -inf becomes it; the token's own entry beside the k likeliest goes; order is by log-prob, then id."""

    def spoil(count, answer):
        answer["choices"][0]["prompt_logprobs"] = [
            None,
            {t: {"logprob": v} for t, v in {"7": -9999.0, "3": -1.5, "9": -1.5, "4": -1.0}.items()},
            {t: {"logprob": v} for t, v in {"8": -0.1, "3": -3.0, "9": -4.0}.items()},
        ]
        return answer

    with serving(model, spoil) as served:
        (found,) = client_of(served).score([[5, 7, 8]], [[1, 2]], 3)
    assert found.own == [-math.inf, -0.1]
    assert found.ids == [[4, 3, 9], [8, 3, 9]] and found.top == [[-1.0, -1.5, -1.5], [-0.1, -3.0, -4.0]]


def test_keys(model, monkeypatch):
    with serving(model, key="sesame") as served:
        message = says(
            served, "refuses to answer (401: The API key is missing or wrong. Send it as Authorization: Bearer KEY). "
        )
        with pytest.raises(
            ServerError, match=message + r".* environment variable POTSTILL_API_KEY, and it is not set\."
        ):
            Client(served.url)
        monkeypatch.setenv("MINE", "wrong")
        with pytest.raises(
            ServerError, match=message + r".* variable MINE, and its key is not the server's\."
        ) as failed:
            Client(served.url, key="MINE")
        assert "wrong." not in str(failed.value).replace("missing or wrong.", "")
        monkeypatch.setenv("MINE", "sesame")
        assert Client(served.url, key="MINE").score(ROWS[:1], PLACES[:1], 1)


def test_addresses_and_names(model):
    with serving(model, name="smollm") as served:
        assert Client(served.url + "/").model == Client(served.url, model="smollm").model == "smollm"
        with pytest.raises(ServerError, match=says(served, "serves no model smolm. Did you mean smollm?")):
            Client(served.url, model="smolm")
        bare = served.url.removesuffix("/v1")
        with pytest.raises(ServerError, match=re.escape(f"Did you mean {bare}/v1?")):
            Client(bare)
    for wrong in ("localhost:8000/v1", "ftp://host/v1", "http://me:secret@host/v1"):
        with pytest.raises(
            RecipeError, match=r"no address of a server\. Write it as http://host:8000/v1, without a key\."
        ):
            Client(wrong)


def test_several_models(model, monkeypatch):
    monkeypatch.setattr(
        Client, "post", lambda self, *a, **b: {"data": [{"id": "one"}, {"id": "two", "max_model_len": 9}]}
    )
    with pytest.raises(ServerError, match=r"serves 2 models: one, two\. Say which \(served\.model\)\."):
        Client("http://host/v1")
    assert Client("http://host/v1", model="two").room == 9


def test_a_model_that_gives_nan_is_not_asked_again(model):
    head = model.head
    model.head = lambda hidden: head(hidden) * math.nan
    try:
        with serving(model) as served:
            client = client_of(served)
            message = says(served, "failed (500: The model gives NaN at token 1 of the prompt.")
            with pytest.raises(ServerError, match=message + ".* The run cannot go on with this teacher's weights"):
                client.score(ROWS[:1], PLACES[:1], 1)
            assert len(served.posts) == 1
    finally:
        del model.head
