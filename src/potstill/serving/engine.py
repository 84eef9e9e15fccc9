"""The model's side of the server: requests as jobs, and the thread that reads and continues them in batches.

What arrives within a few milliseconds is one batch: padded on the left, read by one forward pass, continued together with
a cache, each row by its own temperature, truncation and seed.

Sampling is keyed as in `rollouts.local`: token v at place t of a choice is drawn with Gumbel noise of (seed, t, v), so it
depends on no batch and no clock. The first choice takes the request's seed, choice i a seed made of it and i.

B rows, T tokens, V vocabulary, K log-probs a place.
"""

import math
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.errors import ModelError
from potstill.models.causal import CausalLM
from potstill.models.sampling import truncated

CHUNK = 2**22  # log-probs that are held at once for the places of a prompt
WAITING = 4096  # choices that may wait before more are turned away
Mode = Literal["raw_logprobs", "processed_logprobs"]


class Completions(BaseModel):
    """The body of POST /v1/completions. The second block is accepted at the values that change nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=0)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0)
    prompt_logprobs: int | None = Field(None, ge=0)
    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    return_tokens_as_token_ids: bool | None = False
    return_token_ids: bool | None = False

    stream: Literal[False] | None = False
    best_of: int | None = Field(1, ge=1, le=1)
    suffix: None = None
    presence_penalty: float | None = Field(0.0, ge=0, le=0)
    frequency_penalty: float | None = Field(0.0, ge=0, le=0)
    repetition_penalty: float | None = Field(1.0, ge=1, le=1)
    min_p: float | None = Field(0.0, ge=0, le=0)
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        return [s for s in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if s]

    @property
    def prompt_k(self) -> int | None:
        """How many log-probs a place of the prompt needs; None where none are asked for."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((k for k in asked if k is not None), default=None)


class Refusal(Exception):
    """A request that is not answered, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Place:
    """The log-probs at one place: those of its own token, and of the likeliest, best first. (id, log-prob, rank)"""

    own: tuple[int, float, int]
    top: list[tuple[int, float, int]]

    def first(self, k: int) -> dict[int, tuple[float, int]]:
        """The k likeliest and the place's own token, by id."""
        return {token: (logp, rank) for token, logp, rank in (self.own, *self.top[:k])}


@dataclass
class Job:
    """One choice: a prompt to read, and to continue by up to `limit` tokens."""

    ids: list[int]
    asked: Completions
    seed: int
    limit: int
    future: "Future[Answer]" = field(default_factory=Future)


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    places: list[Place] = field(default_factory=list)  # of the new tokens
    prompt: list[Place] | None = None  # of the prompt's second token and those after
    finish: Literal["stop", "length"] = "length"
    stop: int | str | None = None  # the token or the text that ended it; None for the model's own end
    failed: Refusal | None = None


def places(logp_NV: Tensor, tokens_N: Tensor, k: int) -> list[Place]:
    """What is known of each place from its log-probs. Ranks count from 1; a tie takes the later one."""
    own_N = logp_NV.gather(1, tokens_N[:, None])
    rank_N = (logp_NV >= own_N).sum(1)
    top = logp_NV.topk(min(k, logp_NV.shape[-1]), dim=-1)
    rows = zip(tokens_N.tolist(), own_N[:, 0].tolist(), rank_N.tolist(), top.indices.tolist(), top.values.tolist())
    return [
        Place((token, logp, rank), [(i, value, r + 1) for r, (i, value) in enumerate(zip(ids, values))])
        for token, logp, rank, ids, values in rows
    ]


def processed(logits_BV: Tensor, temperature_B: Tensor, top_p_B: Tensor, top_k_B: Tensor) -> Tensor:
    """Log-probs that are sampled from, each row by its own settings."""
    return truncated(logits_BV, temperature_B[:, None], top_p_B[:, None], top_k_B[:, None])


def not_finite(where: str) -> Refusal:
    return Refusal(
        500,
        f"The model gives NaN at {where}. Its weights are broken, or too large for this dtype: serve it in float32.",
        code="not_finite",
    )


class Engine:
    """A model and the thread that works for it: jobs in, futures out."""

    def __init__(self, model: CausalLM, *, batch: int = 32, wait: float = 0.005, mode: Mode = "raw_logprobs") -> None:
        self.model, self.batch, self.wait, self.mode = model.eval(), batch, wait, mode
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.busy = threading.Lock()
        self.batches = 0
        self.thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self.thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        if self.jobs.qsize() + len(jobs) > WAITING:
            raise Refusal(503, f"More than {WAITING} choices are waiting. Ask again later, or ask for fewer at once.")
        for job in jobs:
            self.jobs.put(job)

    def close(self) -> None:
        self.jobs.put(None)
        self.thread.join()

    def refresh(self, folder: Path) -> None:
        """Take the weights of a folder, in place, between two batches; what does not fit leaves the old ones."""
        fresh = CausalLM.from_pretrained(folder, dtype=self.model.dtype)
        new, old = fresh.network.state_dict(), self.model.network.state_dict()
        if fresh.tokenizer.get_vocab() != self.model.tokenizer.get_vocab():
            raise ModelError(f"{folder} has another tokenizer than the served {self.model.name}.")
        if {k: v.shape for k, v in new.items()} != {k: v.shape for k, v in old.items()}:
            raise ModelError(f"{folder} holds a model of another shape than the served {self.model.name}.")
        with self.busy:
            self.model.network.load_state_dict(new)

    def _work(self) -> None:
        while jobs := self._collect():
            live = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            with self.busy:
                self._answer(live)

    def _collect(self) -> list[Job]:
        """The next batch: the first job, and what follows it within `wait` seconds. Empty when the engine closes."""
        jobs: list[Job] = []
        deadline = math.inf
        while len(jobs) < self.batch:
            try:
                job = self.jobs.get(timeout=max(0.0, deadline - time.monotonic()) if jobs else None)
            except queue.Empty:
                break
            if job is None:
                self.jobs.put(None)
                break
            jobs.append(job)
            deadline = min(deadline, time.monotonic() + self.wait)
        return jobs

    def _answer(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        try:
            answers = self.run(jobs)
        except Exception as error:  # it is the clients' to hear, and the engine's to go on
            if len(jobs) > 1:  # of a batch that fails, only those fail that fail alone
                for job in jobs:
                    self._answer([job])
                return
            answers = [Answer(failed=Refusal(500, f"{type(error).__name__}: {str(error) or 'no message'}"))]
        for job, answer in zip(jobs, answers, strict=True):
            if answer.failed is not None:
                job.future.set_exception(answer.failed)
            else:
                job.future.set_result(answer)

    @torch.no_grad()
    def run(self, jobs: list[Job]) -> list[Answer]:
        """Read the prompts of some jobs together, then continue those that are to be continued."""
        self.batches += 1
        model, answers = self.model, [Answer() for _ in jobs]
        width = max(len(job.ids) for job in jobs)
        pad = [width - len(job.ids) for job in jobs]
        tokens_BT = torch.tensor([[model.pad_id] * n + job.ids for n, job in zip(pad, jobs)], device=model.device)
        attention_BT = torch.arange(width, device=model.device) >= torch.tensor(pad, device=model.device)[:, None]
        cache: Any = model.new_cache() if any(job.limit > 1 for job in jobs) else None
        hidden_BTD = model.hidden(tokens_BT, attention_BT, cache)
        for b, (job, answer) in enumerate(zip(jobs, answers)):
            if job.asked.prompt_k is not None:
                self._read(job, answer, hidden_BTD[b, pad[b] :], tokens_BT[b, pad[b] :])
        going = [b for b, job in enumerate(jobs) if job.limit and answers[b].failed is None]
        rows, last_BD, place = going, hidden_BTD[:, -1][going], 0
        while going:
            chosen_B = self._step([jobs[b] for b in going], [answers[b] for b in going], last_BD, place)
            ended = [answers[b].failed is not None or self._ended(jobs[b], answers[b]) for b in going]
            on = [i for i, end in enumerate(ended) if not end]
            rows, going, place = [rows[i] for i in on], [going[i] for i in on], place + 1
            if going:
                if len(rows) < len(attention_BT):  # only the rows that still grow stay in the cache
                    cache.reorder_cache(torch.tensor(rows, device=model.device))
                    attention_BT = attention_BT[rows]
                rows = list(range(len(rows)))
                attention_BT = torch.cat([attention_BT, attention_BT.new_ones(len(rows), 1)], 1)
                last_BD = model.hidden(chosen_B[on][:, None], attention_BT, cache)[:, -1]
        return answers

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self.model.head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _read(self, job: Job, answer: Answer, hidden_TD: Tensor, tokens_T: Tensor) -> None:
        """The log-probs of a prompt's own tokens and of the likeliest, for all but its first."""
        answer.prompt = []
        step = max(1, CHUNK // self.model.vocabulary)
        for start in range(0, len(tokens_T) - 1, step):
            end = min(start + step, len(tokens_T) - 1)
            logp = self._logits(hidden_TD[start:end]).log_softmax(-1)
            broken = logp.isnan().any(-1)
            if broken.any():
                answer.failed = not_finite(f"token {start + int(broken.nonzero()[0]) + 1} of the prompt")
                return
            answer.prompt += places(logp, tokens_T[start + 1 : end + 1], job.asked.prompt_k or 0)

    def _step(self, jobs: list[Job], answers: list[Answer], last_BD: Tensor, place: int) -> Tensor:
        """Draw the next token of each row and keep its log-probs. [B]"""
        logits_BV = self._logits(last_BD)
        settings = [(job.asked.temperature, job.asked.top_p, job.asked.top_k) for job in jobs]
        as_row = lambda values: torch.tensor(values, device=logits_BV.device)
        heat_B = as_row([1.0 if t is None else float(t) for t, _, _ in settings])
        top_p_B = as_row([1.0 if p is None else float(p) for _, p, _ in settings])
        top_k_B = as_row([max(k or 0, 0) for _, _, k in settings])
        greedy_B = heat_B == 0
        raw_BV = logits_BV.log_softmax(-1)
        drawn_BV = processed(logits_BV, torch.where(greedy_B, 1.0, heat_B), top_p_B, top_k_B)
        words_V = torch.arange(logits_BV.shape[-1], device=logits_BV.device)
        chosen = []
        for b, job in enumerate(jobs):
            noise = 0.0 if greedy_B[b] else keyed.gumbel(job.seed, torch.tensor(place), words_V)
            chosen.append((drawn_BV[b] + noise).argmax(-1))
        chosen_B = torch.stack(chosen)
        shown_BV = torch.where(greedy_B[:, None], raw_BV, drawn_BV) if self.mode == "processed_logprobs" else raw_BV
        found = places(shown_BV, chosen_B, max((job.asked.logprobs or 0 for job in jobs), default=0))
        broken = raw_BV.isnan().any(-1).tolist()
        for b, answer in enumerate(answers):
            if broken[b]:
                answer.failed = not_finite(f"token {place + 1} after the prompt")
            answer.tokens.append(int(chosen_B[b]))
            answer.places.append(found[b])
        return chosen_B

    def _ended(self, job: Job, answer: Answer) -> bool:
        """Whether a row is done, with its text when it is."""
        asked, token = job.asked, answer.tokens[-1]
        ends = () if asked.ignore_eos else self.model.stop_ids
        stopped = token in ends or token in (asked.stop_token_ids or ())
        done = stopped or len(answer.tokens) == job.limit
        if not done and not asked.stops:
            return False
        text = self.decode(answer.tokens[:-1] if stopped else answer.tokens, asked)
        cut, word = min(((text.find(s), s) for s in asked.stops if s in text), default=(len(text), ""))
        if word:
            answer.finish, answer.stop = "stop", word
        elif stopped:
            answer.finish, answer.stop = "stop", None if token in ends else token
        answer.text = text[:cut]
        return done or bool(word)

    def decode(self, ids: Sequence[int], asked: Completions) -> str:
        return str(self.model.tokenizer.decode(list(ids), skip_special_tokens=asked.skip_special_tokens))


def seed_of(seed: int, index: int) -> int:
    """The seed of a request's choice."""
    return seed if index == 0 else int(keyed.bits(seed, torch.tensor(index)))
