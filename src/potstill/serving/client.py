"""Asking a served language model: vLLM, `potstill serve`, or what else speaks `/v1/completions` with `prompt_logprobs`.

Requests go out side by side, a bounded number at a time. What fails and may succeed later (no connection, no answer in
time, 408, 429, 5xx, half an answer) is asked again, alone, after a wait that doubles and is drawn at random in its upper
half, for as long as `patience` lasts. What a server says is checked to the last number before it is believed; an answer
that is false is never asked again. Whatever a call that fails has already been told is kept: the same call, made again,
asks for the rest only.

Needs no torch. The key comes from an environment variable, whose name alone a recipe knows.
"""

import json
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from potstill.contracts.errors import PotstillError, RecipeError, did_you_mean, require

T = TypeVar("T")
Payload = Mapping[str, Any]
LOWEST = -9999.0  # what servers send for -inf
SLACK = 1e-3  # by how much a log-probability, or a sum of probabilities, may pass its bound through rounding
WAIT, LONGEST = 0.5, 30.0  # seconds before the second try, and at most


class ServerError(PotstillError, ConnectionError):
    """A server cannot be reached, refuses, or answers what cannot be true."""


class _Again(Exception):
    """A failure that may pass: what happened, the way out if it does not, and how long the server asks to wait."""

    def __init__(self, what: str, way: str, after: float = 0.0) -> None:
        super().__init__(what)
        self.what, self.way, self.after = what, way, after


@dataclass(frozen=True)
class Scores:
    """Log-probs at some places of a row: of the tokens that stand there, and of the k likeliest, best first."""

    own: list[float]
    ids: list[list[int]]
    top: list[list[float]]


@dataclass(frozen=True)
class Continuation:
    tokens: list[int]
    logps: list[float]
    finished: bool  # by a token that ends a text, which is then the last


class Client:
    """One model behind one address.

    url: as in http://host:8000/v1. model: its name there; None where the server has one only.
    key: the environment variable that holds the key; it may be unset where none is asked for.
    rows: prompts a request; concurrency: requests at a time; timeout: seconds an answer may take;
    patience: seconds for which a failing request is asked again.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        key: str = "POTSTILL_API_KEY",
        rows: int = 8,
        concurrency: int = 8,
        timeout: float = 120.0,
        patience: float = 300.0,
    ) -> None:
        httpx = require("httpx", "serve")
        self.url, self.key, self.rows, self.patience, self.timeout = url.rstrip("/"), key, rows, patience, timeout
        self.concurrency = concurrency
        self.secret = os.environ.get(key) or None
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self.http = httpx.Client(
            headers={"Authorization": f"Bearer {self.secret}"} if self.secret else {}, timeout=timeout, limits=limits
        )
        self.kept: dict[str, Any] = {}
        self.asked = 0  # requests sent, those sent again among them
        self.model, self.room = self._find(model)

    def close(self) -> None:
        self.http.close()

    # ---------------------------------------------------------------- what may be asked

    def tokens_of(self, text: str) -> list[int]:
        """The ids of a text under the server's tokenizer, but for the first, which no log-prob names."""
        payload = self._payload(text, max_tokens=1, temperature=0.0, prompt_logprobs=0, add_special_tokens=False)
        (choice,) = self._choices(self.post("completions", payload, patience=0.0), 1)
        entries = self._listed(choice, "prompt_logprobs")[1:]
        if not all(isinstance(e, dict) and len(e) == 1 for e in entries):
            raise self._false("sent other than one log-prob a token where prompt_logprobs was 0")
        return [self._id(name) for entry in entries for name in entry]

    def score(self, rows: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], k: int) -> list[Scores]:
        """Log-probs at the wanted places of each row (its tokens' numbers, from 1), at temperature 1."""
        # rows of like length share a request, so that little is padded
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        parts = [order[i : i + self.rows] for i in range(0, len(order), self.rows)]
        payloads = [
            self._payload([list(rows[i]) for i in part], max_tokens=1, temperature=0.0, prompt_logprobs=k)
            for part in parts
        ]

        def read(index: int, answer: Any) -> list[Scores]:
            choices = self._choices(answer, len(parts[index]))
            return [self._scores(c, rows[i], wanted[i], k) for i, c in zip(parts[index], choices)]

        found: list[Scores | None] = [None] * len(rows)
        for part, scores in zip(parts, self.ask(payloads, read)):
            for i, score in zip(part, scores):
                found[i] = score
        return [score for score in found if score is not None]

    def sample(self, rows: Sequence[Sequence[int]], seeds: Sequence[int], **options: Any) -> list[Continuation]:
        """One continuation of each row, drawn with its seed, and the log-probs of its tokens as the server counts them."""
        neutral = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_p": 0.0}
        shape = {"logprobs": 0, "return_tokens_as_token_ids": True, "skip_special_tokens": False}
        payloads = [
            self._payload(list(row), seed=seed, **neutral, **shape, **options)
            for row, seed in zip(rows, seeds, strict=True)
        ]

        def read(index: int, answer: Any) -> Continuation:
            (choice,) = self._choices(answer, 1)
            return self._continuation(choice, options["max_tokens"])

        return self.ask(payloads, read)

    def top(self, row: Sequence[int], k: int, temperature: float) -> dict[str, float]:
        """The log-probs of the k likeliest next tokens, as the server counts them when it samples at a temperature."""
        payload = self._payload(
            list(row), max_tokens=1, temperature=temperature, logprobs=k, return_tokens_as_token_ids=True, seed=0
        )
        (choice,) = self._choices(self.post("completions", payload, patience=0.0), 1)
        (found,) = self._listed(self._mapping(choice, "logprobs"), "top_logprobs")
        return {name: self._number(value) for name, value in found.items()}

    # ---------------------------------------------------------------- asking

    def ask(self, payloads: Sequence[Payload], read: Callable[[int, Any], T]) -> list[T]:
        """The answers to some requests, each read by `read(its index, JSON)`, in their order."""
        names = [json.dumps(payload, sort_keys=True) for payload in payloads]
        halt = threading.Event()

        def work(index: int) -> None:
            if names[index] in self.kept or halt.is_set():
                return
            try:
                self.kept[names[index]] = read(index, self.post("completions", payloads[index], halt=halt))
            except BaseException:
                halt.set()  # the others end their tries too, and keep what they have
                raise

        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                futures = [pool.submit(work, i) for i in range(len(payloads))]
                failures = [error for future in futures if (error := future.exception()) is not None]
            except BaseException:
                halt.set()
                raise
        if failures:
            raise next((e for e in failures if not isinstance(e, _Halted)), failures[0])
        found = [self.kept[name] for name in names]
        self.kept.clear()
        return found

    def post(
        self, path: str, payload: Payload | None, *, patience: float | None = None, halt: threading.Event | None = None
    ) -> Any:
        """One request (GET where there is no payload), asked again while it may succeed. The JSON of its answer."""
        patience, halt = self.patience if patience is None else patience, halt or threading.Event()
        began, tries = time.monotonic(), 0
        while True:
            try:
                return self._once(path, payload)
            except _Again as failure:
                tries += 1
                wait = min(LONGEST, WAIT * 2 ** (tries - 1)) * random.uniform(0.5, 1.0)
                wait = max(wait, failure.after)
                if time.monotonic() - began + wait > patience:
                    times = f" It was asked {tries} times." if tries > 1 else ""
                    raise ServerError(f"{self.url} {failure.what}.{times} {failure.way}") from failure
            if halt.wait(wait):
                raise _Halted(f"{self.url} was not asked again, because another request failed.")

    def _once(self, path: str, payload: Payload | None) -> Any:
        import httpx

        self.asked += 1
        try:
            if payload is None:
                response = self.http.get(f"{self.url}/{path}")
            else:
                response = self.http.post(f"{self.url}/{path}", json=payload)
        except httpx.TimeoutException as cause:
            way = "Give it longer (served.timeout), or less at once (served.rows, served.concurrency)."
            raise _Again(f"gave no answer within {self.timeout:g} s", way) from cause
        except httpx.TransportError as cause:
            reason = str(cause) or type(cause).__name__
            way = "Correct the address, or start the server: potstill serve MODEL, or vllm serve MODEL."
            raise _Again(f"cannot be reached ({reason})", way) from cause
        if response.status_code == 200:
            try:
                return response.json()
            except ValueError as cause:
                size = len(response.content)
                way = "Something between here and the server cuts answers short: look at its log and at proxies."
                raise _Again(f"sent {size} bytes that are no whole JSON", way) from cause
        raise self._refused(path, response)

    def _refused(self, path: str, response: Any) -> Exception:
        """What a status other than 200 means."""
        status = response.status_code
        try:
            body = response.json()
            body = body.get("error", body) if isinstance(body, dict) else {}
        except ValueError:
            body = {}
        body = body if isinstance(body, dict) else {"message": body}
        said = f"{status}: {str(body.get('message') or response.reason_phrase).rstrip('.')}"
        if body.get("code") == "not_finite":
            return ServerError(f"{self.url} failed ({said}). The run cannot go on with this teacher's weights.")
        if status in (408, 425, 429) or status >= 500:
            after = response.headers.get("retry-after", "")
            seconds = float(after) if re.fullmatch(r"\d+(\.\d+)?", after) else 0.0
            return _Again(f"failed ({said})", "Look at the server's log.", seconds)
        if status in (401, 403) and path != "refresh":
            state = "its key is not the server's" if self.secret else "it is not set"
            return ServerError(
                f"{self.url} refuses to answer ({said}). The key is read from the environment variable {self.key}, and {state}."
            )
        if status == 404 and not self.url.endswith("/v1"):
            return ServerError(f"{self.url}/{path} does not exist ({said}). Did you mean {self.url}/v1?")
        return ServerError(f"{self.url} refuses the request ({said}).")

    def _find(self, model: str | None) -> tuple[str, int | None]:
        """The model's name at the server and how many tokens it reads, where the server says so."""
        if not re.fullmatch(r"https?://[^/@\s]+(/[^\s]*)?", self.url):
            raise RecipeError(f"{self.url} is no address of a server. Write it as http://host:8000/v1, without a key.")
        listed = self._listed(self.post("models", None, patience=0.0), "data")
        known = {str(entry.get("id")): entry for entry in listed if isinstance(entry, dict)}
        if model is None and len(known) != 1:
            raise ServerError(
                f"{self.url} serves {len(known)} models: {', '.join(known) or 'none'}. Say which (served.model)."
            )
        name = model if model is not None else next(iter(known))
        if name not in known:
            raise ServerError(f"{self.url} serves no model {name}.{did_you_mean(name, known)}")
        room = known[name].get("max_model_len")
        return name, room if isinstance(room, int) else None

    def _payload(self, prompt: Any, **options: Any) -> dict[str, Any]:
        return {"model": self.model, "prompt": prompt, **options}

    # ---------------------------------------------------------------- believing

    def _false(self, what: str) -> ServerError:
        return ServerError(f"{self.url} {what}. It is no server that can teach: vLLM and potstill serve are.")

    def _listed(self, value: Any, name: str) -> list[Any]:
        found = value.get(name) if isinstance(value, dict) else None
        if not isinstance(found, list):
            raise self._false(f"sent an answer without {name}")
        return found

    def _mapping(self, value: Any, name: str) -> dict[str, Any]:
        found = value.get(name) if isinstance(value, dict) else None
        if not isinstance(found, dict):
            raise self._false(f"sent an answer without {name}")
        return found

    def _choices(self, answer: Any, count: int) -> list[Any]:
        """The choices of an answer in the order of the prompts."""
        choices = self._listed(answer, "choices")
        if len(choices) != count:
            raise self._false(f"sent {len(choices)} choices where {count} were asked for")
        places = {c.get("index") if isinstance(c, dict) else None: c for c in choices}
        if set(places) != set(range(count)):
            raise self._false(f"numbers its {count} choices {sorted(map(str, places))}")
        return [places[i] for i in range(count)]

    def _number(self, value: Any) -> float:
        """A log-probability: a number that is finite and not above 0; what stands for -inf becomes it."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value > SLACK:
            raise self._false(f"sent {value!r} where a log-probability belongs")
        return -math.inf if value <= LOWEST else min(float(value), 0.0)

    def _id(self, name: str) -> int:
        digits = str(name).removeprefix("token_id:")
        if not digits.isdecimal():
            raise self._false(f"names a token {name!r} instead of by its id")
        return int(digits)

    def _scores(self, choice: Any, row: Sequence[int], wanted: Sequence[int], k: int) -> Scores:
        entries = self._listed(choice, "prompt_logprobs")
        if len(entries) != len(row):
            raise self._false(f"sent log-probs of {len(entries)} tokens where {len(row)} were asked for")
        own, ids, top = [], [], []
        for place in wanted:
            token, entry = row[place], entries[place]
            if not isinstance(entry, dict):
                raise self._false(f"sent no log-probs of token {place} of a row")
            found = {
                self._id(n): self._number(v.get("logprob") if isinstance(v, dict) else v) for n, v in entry.items()
            }
            if token not in found:
                raise self._false(
                    f"sent log-probs of other tokens at place {place} of a row, where {token} was asked for"
                )
            own.append(found[token])
            if k:
                given = len(found)
                if given == k + 1 and found[token] == min(found.values()):
                    del found[token]  # it is none of the k likeliest, and stands beside them
                if len(found) != k:
                    raise self._false(
                        f"sent the {given} likeliest tokens at place {place} of a row, not the {k} asked for"
                    )
                best = sorted(found, key=lambda i: (-found[i], i))
                if sum(map(math.exp, found.values())) > 1 + SLACK:
                    raise self._false(f"sent probabilities that add up to more than 1 at place {place} of a row")
                ids.append(best)
                top.append([found[i] for i in best])
        return Scores(own, ids, top)

    def _continuation(self, choice: Any, limit: int) -> Continuation:
        about = self._mapping(choice, "logprobs")
        tokens = [self._id(name) for name in self._listed(about, "tokens")]
        logps = [self._number(value) for value in self._listed(about, "token_logprobs")]
        finished = choice.get("finish_reason") == "stop"
        if len(tokens) != len(logps) or not 1 <= len(tokens) <= limit or (len(tokens) < limit and not finished):
            raise self._false(
                f"sent {len(tokens)} tokens and {len(logps)} log-probs, ended by {choice.get('finish_reason')!r}, where up to "
                f"{limit} were asked for"
            )
        return Continuation(tokens, logps, finished)


class _Halted(ServerError):
    """A request that was given up because another failed."""
