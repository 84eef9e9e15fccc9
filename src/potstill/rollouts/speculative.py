"""Speculative decoding, exact and lenient: a small draft proposes a block of tokens, one target call judges it.

p target, q draft, V vocabulary, G = gamma drafted tokens a block, f = f(p, e) >= p the lenient target (f = p: lossless).

    accept v ~ q with probability min(1, f(v) / q(v)); at the first rejection draw from norm(max(0, f - q)) and end the
    block; when all G are accepted, draw one more token from p.

One token of a block then follows min(q, f) + (1 - sum min(q, f)) residual, which is p itself when f = p (Leviathan et
al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). The lenience functions are those of DistillSpec, arXiv 2310.08461.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from potstill.contracts import keyed
from potstill.contracts.errors import DataError, ModelError, RecipeError
from potstill.models.causal import CausalLM, evaluating, shared_vocabulary
from potstill.rollouts.local import sampling_logp


@dataclass(frozen=True)
class Lenience:
    """f(p, e) of the acceptance test: f_lin = p / e, f_sq = p / e^2, f_exp = p^e; smaller e accepts more, 1 is lossless.

    `residual` is what a rejection draws from: "f" norm(max(0, f - q)), "p" norm(max(0, p - q)), "sample_p" p itself.
    The source does not say which; "f" gives Leviathan et al.'s lenient rule for f_lin.
    """

    kind: Literal["f_lin", "f_sq", "f_exp"] = "f_lin"
    e: float = 1.0
    residual: Literal["f", "p", "sample_p"] = "f"

    def __post_init__(self) -> None:
        if not 0 < self.e <= 1:
            raise RecipeError(f"Lenience.e must lie in (0, 1], got {self.e}; 1 is lossless.")
        if self.kind not in ("f_lin", "f_sq", "f_exp") or self.residual not in ("f", "p", "sample_p"):
            raise RecipeError(
                f"Lenience has the kinds f_lin, f_sq, f_exp and the residuals f, p, sample_p, not {self.kind} and "
                f"{self.residual}."
            )

    def f(self, p: Tensor) -> Tensor:
        """The lenient target, [*, V] -> [*, V]; at least p, not normalised."""
        return p**self.e if self.kind == "f_exp" else p / self.e ** (2 if self.kind == "f_sq" else 1)

    def accept(self, p: Tensor, q: Tensor) -> Tensor:
        """Probability of accepting each drafted token, [*, V] -> [*, V]; 1 where the draft never goes."""
        return torch.where(q > 0, self.f(p) / q, 1.0).clamp(max=1.0)

    def after_rejection(self, p: Tensor, q: Tensor) -> Tensor:
        """The law drawn from after a rejection, [*, V] -> [*, V]; p where rounding leaves it no mass."""
        if self.residual == "sample_p":
            return p
        spare = ((self.f(p) if self.residual == "f" else p) - q).clamp_min(0.0)
        mass = spare.sum(-1, keepdim=True)
        return torch.where(mass > 0, spare / mass.clamp_min(torch.finfo(p.dtype).tiny), p)

    def law(self, p: Tensor, q: Tensor) -> Tensor:
        """The law of one emitted token, [*, V] -> [*, V]: p itself when e = 1."""
        kept = torch.minimum(self.f(p), q)
        return kept + (1 - kept.sum(-1, keepdim=True)) * self.after_rejection(p, q)


LOSSLESS = Lenience()


def speculative_step(
    p_SV: Tensor,
    q_GV: Tensor,
    drafted_G: Tensor,
    uniform_G: Tensor,
    gumbel_SV: Tensor,
    lenience: Lenience = LOSSLESS,
) -> tuple[int, int]:
    """One block: how many drafted tokens are accepted, and the token that follows them.

    Target probabilities at S = G + 1 positions, draft probabilities at the G drafted ones, a uniform number for each
    test and Gumbel noise for the token that the target adds at each place where the block may end.
    """
    place = torch.arange(len(drafted_G), device=p_SV.device)
    accept_G = lenience.accept(p_SV[:-1], q_GV)[place, drafted_G]
    rejected = (uniform_G >= accept_G).nonzero()
    accepted = int(rejected[0, 0]) if len(rejected) else len(drafted_G)
    law = lenience.after_rejection(p_SV[accepted], q_GV[accepted]) if len(rejected) else p_SV[accepted]
    return accepted, int((law.log() + gumbel_SV[accepted]).argmax())


@dataclass
class Speculation:
    """What one speculative decoding did. A block is one target call."""

    tokens: list[int] = field(default_factory=list)  # the completion
    accepted: list[int] = field(default_factory=list)  # accepted draft tokens, a block
    drafted: list[int] = field(default_factory=list)  # proposed draft tokens, a block
    draft_calls: int = 0

    @property
    def target_calls(self) -> int:
        return len(self.drafted)

    @property
    def tests(self) -> int:
        """How many drafted tokens were judged: all up to the first rejection of each block."""
        return sum(min(a + 1, d) for a, d in zip(self.accepted, self.drafted, strict=True))

    @property
    def block_efficiency(self) -> float:
        """Emitted tokens a target call."""
        return len(self.tokens) / max(self.target_calls, 1)


class _Reader:
    """Probabilities after each of a text's last positions, from a cached model that is told only what is new."""

    def __init__(self, model: CausalLM, words: int, temperature: float, greedy: bool, cached: bool) -> None:
        self.model, self.words, self.temperature, self.greedy = model, words, temperature, greedy
        cache: Any = model.new_cache() if cached else None
        if cached and hasattr(cache, "activate_past_recording"):
            cache.activate_past_recording()  # sliding windows keep what a rejection may bring back
        self.cache = cache
        self.read = 0  # tokens in the cache
        self.calls = 0

    def probabilities(self, text: list[int], last: int) -> Tensor:
        """Laws of the next token after the last `last` prefixes of `text`, float64 [last, V]; one-hot when greedy."""
        self.calls += 1
        new = torch.tensor([text[self.read :]], device=self.model.device)
        hidden = self.model.hidden(new, None, self.cache)[0, -last:]
        if self.cache is not None:
            self.read = len(text)
        logits = self.model.head(hidden)[:, : self.words].double()
        if self.greedy:
            return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        return sampling_logp(logits, temperature=self.temperature).exp()

    def forget(self, length: int) -> None:
        """Drop what was read beyond the first `length` tokens."""
        if self.cache is None:
            return
        if not getattr(self.cache, "is_croppable", True):
            raise ModelError(
                f"{self.model.name} keeps a recurrent state, which cannot be rolled back after a rejection. "
                "Use cached=False, or a model with attention alone."
            )
        self.cache.crop(-max(self.read - length, 0))
        self.read = min(self.read, length)


@torch.no_grad()
def speculative_generate(
    target: CausalLM,
    draft: CausalLM,
    prompt: Sequence[int],
    *,
    gamma: int = 7,
    max_new_tokens: int,
    temperature: float = 1.0,
    greedy: bool = False,
    lenience: Lenience = LOSSLESS,
    seed: int = 0,
    sample_id: int = 0,
    stop_ids: Sequence[int] | None = None,
    cached: bool = True,
) -> Speculation:
    """Continue one prompt with the target's law (lossless) or near it, until a stop token (kept) or `max_new_tokens`.

    Greedy laws are one-hot, so that a drafted token is accepted iff both arg-maxima agree. Noise is keyed by (seed,
    sample, position, word): a position's draft noise decides an emitted token only once, so reuse after a rejection
    is exact. Where heads are padded to different widths, both laws live on the words that they share.
    `cached=False` reads everything anew at each call: the reference that the caches are tested against.
    """
    if not len(prompt) or gamma < 1 or max_new_tokens < 1:
        raise DataError(
            "Speculative decoding needs a prompt of at least one token, gamma >= 1 and max_new_tokens >= 1."
        )
    vocabulary = shared_vocabulary(target, draft)
    stops = set(target.stop_ids if stop_ids is None else stop_ids)
    device = target.device
    words = torch.arange(vocabulary, device=device)
    who = torch.full((), sample_id, device=device)
    drafts, tests, extras = (keyed.key(seed, "speculative", name) for name in ("draft", "test", "target"))
    noise = lambda key, first, count: keyed.gumbel(
        key, who, torch.arange(first, first + count, device=device)[:, None], words[None]
    )

    text, done = list(prompt), Speculation()
    with evaluating(target, draft):
        judge, scribe = (_Reader(model, vocabulary, temperature, greedy, cached) for model in (target, draft))
        while True:
            start = len(done.tokens)
            ahead = min(gamma, max_new_tokens - start - 1)  # the target adds one more
            laws: list[Tensor] = []
            block: list[int] = []
            for i in range(ahead):
                laws.append(scribe.probabilities(text + block, 1)[0].to(device))
                block.append(int((laws[-1].log() + noise(drafts, start + i, 1)[0]).argmax()))
                if block[-1] in stops:
                    break
            size = len(block)
            p_SV = judge.probabilities(text + block, size + 1)
            q_GV = torch.stack(laws) if laws else p_SV[:0]
            uniform_G = keyed.uniform(tests, who, torch.arange(start, start + size, device=device))
            drafted_G = torch.tensor(block, dtype=torch.int64, device=device)
            accepted, extra = speculative_step(
                p_SV, q_GV, drafted_G, uniform_G, noise(extras, start, size + 1), lenience
            )
            done.accepted.append(accepted)
            done.drafted.append(size)
            new = [*block[:accepted], extra]
            stop = next((i for i, token in enumerate(new) if token in stops), None)
            new = new if stop is None else new[: stop + 1]
            done.tokens += new
            text += new
            if stop is not None or len(done.tokens) >= max_new_tokens:
                break
            for reader in (judge, scribe):
                reader.forget(len(text) - 1)  # the last token is not read yet; what was rejected must go
    done.draft_calls = scribe.calls
    return done
