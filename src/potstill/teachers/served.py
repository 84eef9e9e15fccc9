"""A teacher that is asked over HTTP: the log-probs of the tokens, and of its k likeliest, from a server's prompt log-probs.

Any server that speaks vLLM's `/v1/completions` (vLLM, `potstill serve`). What it gives is at temperature 1, for that is
what such servers compute of a prompt. Where k is the whole vocabulary, it gives logits like any other teacher.
N counted positions, K the k likeliest tokens, V vocabulary.
"""

import math

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from potstill.contracts.batch import Batch, TokenBatch
from potstill.contracts.errors import DataError, ModelError, SignalError
from potstill.contracts.signals import FullLogits, Signal, TokenLogp, TopKLogp
from potstill.models.spec import ServedSpec
from potstill.serving.client import Client, ServerError

# What tokenizers differ in: capitals, runs of blanks, digits, accents, other scripts, signs.
TEXT = "The  Quick\tfox's 12,345.678 naïve café -- Straße, Привет 你好 مرحبا 👍\n\n  def f(x): return x**2  # {}[]\\"


class ServedTeacher:
    """A model behind an address, asked for the counted tokens of a batch.

    url, served: where it is and how it is asked. tokenizer: the student's, which must be the server's too.
    """

    temperature = 1.0

    def __init__(self, url: str, tokenizer: PreTrainedTokenizerBase, served: ServedSpec = ServedSpec()) -> None:
        self.tokenizer, self.vocabulary = tokenizer, len(tokenizer)
        self.k = min(served.k, self.vocabulary)
        self.gives: frozenset[type[Signal]] = frozenset({TokenLogp, TopKLogp})
        if self.k == self.vocabulary:
            self.gives |= {FullLogits}
        options = served.model_dump(exclude={"k"})
        self.client = Client(url, **options)
        self.name = f"{self.client.model} at {self.client.url}"
        self._check()

    def to(self, device: torch.device | str) -> "ServedTeacher":
        """Signals come to wherever the batch is."""
        return self

    @torch.no_grad()
    def score(self, batch: Batch, need: type[Signal]) -> Signal:
        """The signal at the N counted tokens. One answer of the server holds both kinds; a batch is asked for once."""
        if need not in self.gives:
            raise SignalError(
                f"{self.name} is served: it gives the log-probs of tokens and of its {self.k} likeliest, no {need.__name__}. "
                "Use a divergence over the top k (TopKLogp) or the sampled gradient (TokenLogp), or load the teacher here: "
                "a folder or an id."
            )
        if not isinstance(batch, TokenBatch):
            raise SignalError(f"{self.name} scores tokens and cannot score a {type(batch).__name__}.")
        both = ("served", id(self), self.k)
        if need is TokenLogp and both not in batch.memo:
            return batch.remember(("served", id(self), 0), lambda: self._ask(batch, 0))[0]
        own, top = batch.remember(both, lambda: self._ask(batch, self.k))
        if need is FullLogits:
            empty = top.logp_NK.new_full((len(top.logp_NK), self.vocabulary), -math.inf)
            return FullLogits(empty.scatter(1, top.indices_NK, top.logp_NK))
        return own if need is TokenLogp else top

    def _ask(self, batch: TokenBatch, k: int) -> tuple[TokenLogp, TopKLogp]:
        rows, wanted = [], []
        for tokens_T, attention_T, counted_T in zip(batch.tokens_BT, batch.attention_BT, batch.counted_BT):
            if (counted_T & ~attention_T).any():
                raise DataError("A token that counts is padding (attention_BT is false there).")
            counted = counted_T[attention_T].nonzero()[:, 0].tolist()
            if counted and counted[0] == 0:
                raise DataError("A first token cannot count: nothing before it predicts it. Clear counted_BT[:, 0].")
            if counted:  # a row without counted tokens has nothing to ask for
                rows.append(tokens_T[attention_T][: counted[-1] + 1].tolist())  # nothing after the last one is needed
                wanted.append(counted)
        longest = max(map(len, rows), default=0)
        if self.client.room is not None and longest >= self.client.room:
            raise DataError(
                f"A row of {longest} tokens and a new one exceed the {self.client.room} that {self.name} reads. Shorten the "
                "rows (data.length), or serve it with a longer context."
            )
        scores = self.client.score(rows, wanted, k)
        own_N = _tensor([logp for s in scores for logp in s.own], batch, torch.float32)
        ids_NK = _tensor([row for s in scores for row in s.ids], batch, torch.int64).reshape(len(own_N), k)
        top_NK = _tensor([row for s in scores for row in s.top], batch, torch.float32).reshape(len(own_N), k)
        if ids_NK.numel() and int(ids_NK.max()) >= self.vocabulary:
            raise ModelError(
                f"{self.name} has token {int(ids_NK.max())} among its {k} likeliest, and the student has {self.vocabulary} "
                "tokens. Use a student of the teacher's family."
            )
        return TokenLogp(own_N), TopKLogp(top_NK, ids_NK)

    def _check(self) -> None:
        """Before any work: the server reads text as the student does, knows its last token, and gives the k likeliest."""
        step = max(1, self.vocabulary // 256)
        some = self.tokenizer.decode(list(range(0, self.vocabulary, step)), skip_special_tokens=True)
        text = str(some) + TEXT
        read = lambda some: list(self.tokenizer(some, add_special_tokens=False)["input_ids"])
        room = self.client.room or 2**31
        while len(ours := read(text)) > min(room - 1, 1024):
            text = text[: len(text) // 2]
        theirs = self.client.tokens_of(text)
        if theirs != ours[1:]:
            at = next((i for i, (a, b) in enumerate(zip(ours[1:], theirs)) if a != b), min(len(ours) - 1, len(theirs)))
            say = lambda ids: f"token {ids[at]}" if at < len(ids) else "nothing"
            raise ModelError(
                f"{self.name} has another tokenizer than the student: where the student reads {say(ours[1:])} in a probe, it "
                f"reads {say(theirs)}. Use a student of the teacher's family, or a teacher loaded here, which can be aligned."
            )
        last = self.vocabulary - 1
        try:
            self.client.score([[last, last]], [[1]], self.k)
        except ServerError as cause:
            raise ServerError(
                f"{str(cause).rstrip('.')}. This was a probe for the {self.k} likeliest tokens and the student's last token, "
                f"{last}: lower served.k or raise the server's --max-logprobs, and use a student of the teacher's family."
            ) from cause


def _tensor(values: list, batch: Batch, dtype: torch.dtype) -> Tensor:  # type: ignore[type-arg]
    return torch.tensor(values, dtype=dtype, device=batch.ids_B.device)
