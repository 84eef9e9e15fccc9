"""How well a draft serves its target in speculative decoding: acceptance, block efficiency, speed.

p target, q draft, t positions of a text, X prompts, B sampled texts, T tokens. TVD = (1/2) sum |p - q|.
Source: DistillSpec, arXiv 2310.08461, equation 3 and its theorem; the closed forms are Leviathan et al., arXiv 2211.17192.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from potstill.contracts.batch import PromptBatch, TokenBatch
from potstill.contracts.errors import DataError
from potstill.divergences import TotalVariation, log_probs
from potstill.evaluation.text import watched
from potstill.models.causal import CausalLM, evaluating, shared_vocabulary
from potstill.rollouts.local import sample
from potstill.rollouts.speculative import LOSSLESS, Lenience, Speculation, speculative_generate


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """Probability that a token drafted from q is accepted, sum min(p, q) = 1 - TVD(p, q). [*, V] -> [*]."""
    return torch.minimum(p, q).sum(-1)


def block_efficiency(alpha: float, gamma: int) -> float:
    """Tokens emitted a target call when each drafted token is accepted with probability alpha, independently.

    (1 - alpha^(gamma + 1)) / (1 - alpha), from 1 at alpha = 0 to gamma + 1 at alpha = 1.
    """
    if not 0 <= alpha <= 1 or gamma < 1:
        raise DataError(f"Block efficiency needs 0 <= alpha <= 1 and gamma >= 1, got {alpha} and {gamma}.")
    return sum(alpha**k for k in range(gamma + 1))  # the same sum, and right at alpha = 1


def speedup(tau: float, cost: float, gamma: int) -> float:
    """Speed over plain decoding, tau / (cost * gamma + 1); cost = time of one draft step over one target step."""
    return tau / (cost * gamma + 1)


def sequence_acceptance(tvd_BT: Tensor, counted_BT: Tensor, samples_per_prompt: int = 1) -> Tensor:
    """Equation 3, 1 - E_{y~p}[sum_t TVD_t] / E_{y~p}[|y|], for each prompt, from texts sampled by the TARGET. [X]."""
    tvd_XG, length_XG = _sums(tvd_BT, counted_BT, samples_per_prompt)
    return 1 - tvd_XG.mean(1) / length_XG.mean(1)


def theorem_bound(eps: float | Tensor, longest: int, target_length_X: Tensor) -> Tensor:
    """The theorem: E_x[alpha(x)] >= 1 - T E_x[T / L_p(x)] eps, T = longest, L_p = mean target length. Scalar.

    eps bounds, for every prompt, the mean over texts sampled by the DRAFT of their mean TVD a token. With texts of T
    tokens it is 1 - T eps: it says nothing for long texts.
    """
    return 1 - longest * (longest / target_length_X).mean() * eps


def sharper_bound(tvd_BT: Tensor, counted_BT: Tensor, longest: int, target_length_X: Tensor) -> Tensor:
    """The proof's middle form, E_x[alpha(x)] >= 1 - E_x[sum_s (T - s + 1) E_{y~q}[TVD_s] / L_p(x)]. Scalar.

    From texts sampled by the DRAFT, the same number for each prompt; s counts a text's own tokens from 1.
    """
    step_BT = counted_BT.long().cumsum(1)
    weighted = torch.where(counted_BT, tvd_BT, 0.0) * (longest - step_BT + 1)
    return 1 - (weighted.sum(1).view(len(target_length_X), -1).mean(1) / target_length_X).mean()


@torch.no_grad()
def token_tvd(
    target: CausalLM, draft: CausalLM, batch: TokenBatch, *, temperature: float = 1.0, rows: int = 8
) -> Tensor:
    """TVD(p, q) at every counted token of a batch, 0 elsewhere; `rows` rows of logits at a time. [B, T], on the target."""
    words = shared_vocabulary(target, draft)
    tvd_BT = torch.zeros(batch.tokens_BT.shape, device=target.device)
    with evaluating(target, draft):
        for start in range(0, len(batch), rows):
            cut = slice(start, start + rows)
            part = TokenBatch(batch.ids_B[cut], batch.tokens_BT[cut], batch.attention_BT[cut], batch.counted_BT[cut])
            log_p, log_q = (
                log_probs(model.counted_logits(part.to(model.device))[:, :words], temperature).to(target.device)
                for model in (target, draft)
            )
            tvd_BT[cut][part.counted_BT.to(target.device)] = TotalVariation()(teacher_logp=log_p, student_logp=log_q)
    return tvd_BT


def analytic_acceptance(
    target: CausalLM,
    draft: CausalLM,
    prompts: Sequence[PromptBatch],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    samples_per_prompt: int = 4,
    seed: int = 0,
) -> dict[str, float]:
    """Acceptance without decoding, from texts of the target and texts of the draft.

    acceptance_target_texts, acceptance_draft_texts: mean over tokens of 1 - TVD. sequence_acceptance: equation 3, mean
    over prompts. draft_tvd: eps of the theorem, the largest over prompts. bound, sharper_bound: the theorem's lower
    bounds on the sequence acceptance, with draft texts.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in ("p_tvd", "p_len", "q_tvd", "q_len", "alpha", "eps")}
    sharper: list[Tensor] = []
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    for batch in watched(prompts, "acceptance"):
        texts, drafts = (
            sample(model, batch, samples_per_prompt=samples_per_prompt, **options) for model in (target, draft)
        )
        drafts = drafts.to(target.device)
        p_tvd, q_tvd = (token_tvd(target, draft, b, temperature=temperature).double() for b in (texts, drafts))
        tvd, length = _sums(p_tvd, texts.counted_BT, samples_per_prompt)
        found["p_tvd"].append(tvd.mean(1))
        found["p_len"].append(length.mean(1))
        found["alpha"].append(sequence_acceptance(p_tvd, texts.counted_BT, samples_per_prompt))
        tvd, length = _sums(q_tvd, drafts.counted_BT, samples_per_prompt)
        found["q_tvd"].append(tvd.mean(1))
        found["q_len"].append(length.mean(1))
        found["eps"].append((tvd / length).mean(1))
        sharper.append(
            sharper_bound(q_tvd, drafts.counted_BT, max_new_tokens, found["p_len"][-1]) * len(batch)
        )  # a sum over prompts
    if not sharper:
        raise DataError("There is no prompt to measure acceptance on.")
    all_of = {name: torch.cat(values) for name, values in found.items()}
    eps = all_of["eps"].max()
    return {
        "acceptance_target_texts": 1 - (all_of["p_tvd"].sum() / all_of["p_len"].sum()).item(),
        "acceptance_draft_texts": 1 - (all_of["q_tvd"].sum() / all_of["q_len"].sum()).item(),
        "sequence_acceptance": all_of["alpha"].mean().item(),
        "draft_tvd": eps.item(),
        "bound": theorem_bound(eps, max_new_tokens, all_of["p_len"]).item(),
        "sharper_bound": (torch.stack(sharper).sum() / len(all_of["alpha"])).item(),
    }


def decode(
    target: CausalLM,
    draft: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    gamma: int = 7,
    max_new_tokens: int,
    temperature: float = 1.0,
    greedy: bool = False,
    lenience: Lenience = LOSSLESS,
    seed: int = 0,
) -> dict[str, float]:
    """Speculative decoding of each prompt against plain decoding of the same length.

    acceptance: accepted drafted tokens over judged ones. block_efficiency: tokens a target call. cost: one draft step
    over one target step, measured. predicted_speedup: tau / (cost gamma + 1). measured_speedup: wall clock of plain over
    speculative decoding, a token. tokens: how many were emitted. Warm the models up first where times matter.
    """
    runs: list[Speculation] = []
    seconds = {"speculative": 0.0, "target": 0.0, "draft": 0.0}
    tokens = {"target": 0, "draft": 0}
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "greedy": greedy, "seed": seed}
    for i, prompt in enumerate(watched(prompts, "speculative decoding")):
        start = time.perf_counter()
        runs.append(speculative_generate(target, draft, prompt, gamma=gamma, lenience=lenience, sample_id=i, **how))
        seconds["speculative"] += time.perf_counter() - start
        one = torch.tensor([prompt])
        batch = PromptBatch(torch.tensor([i]), one, torch.ones_like(one, dtype=torch.bool))
        for name, model in (("target", target), ("draft", draft)):
            start = time.perf_counter()
            tokens[name] += int(sample(model, batch, **how).counted_BT.sum())
            seconds[name] += time.perf_counter() - start
    if not runs:
        raise DataError("There is no prompt to decode.")
    emitted, calls = sum(len(run.tokens) for run in runs), sum(run.target_calls for run in runs)
    plain, tau = seconds["target"] / tokens["target"], emitted / calls
    cost = seconds["draft"] / tokens["draft"] / plain
    return {
        "acceptance": sum(sum(run.accepted) for run in runs) / max(sum(run.tests for run in runs), 1),
        "block_efficiency": tau,
        "cost": cost,
        "predicted_speedup": speedup(tau, cost, gamma),
        "measured_speedup": plain / (seconds["speculative"] / emitted),
        "tokens": float(emitted),
    }


@torch.no_grad()
def assisted_generation(
    target: CausalLM,
    draft: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    gamma: int = 7,
    max_new_tokens: int,
    temperature: float = 1.0,
    greedy: bool = True,
    seed: int = 0,
) -> dict[str, float]:
    """transformers' own assisted generation (`generate(assistant_model=...)`) with blocks of `gamma`: another witness.

    block_efficiency (tokens a target call), tokens, tokens_per_second. Sampling draws from torch's generator, seeded here.
    """
    shared_vocabulary(target, draft)
    calls, emitted, seconds = 0, 0, 0.0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    config = draft.network.generation_config
    wanted = {
        "num_assistant_tokens": gamma,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    before = {name: getattr(config, name, None) for name in wanted}
    how: dict[str, Any] = (
        {"do_sample": False} if greedy else {"do_sample": True, "temperature": temperature, "top_k": 0}
    )
    network: Any = target.network
    hook = network.register_forward_hook(count)
    try:
        for name, value in wanted.items():
            setattr(config, name, value)
        with evaluating(target, draft), torch.random.fork_rng():
            torch.manual_seed(seed)
            for prompt in watched(prompts, "assisted generation"):
                ids = torch.tensor([prompt], device=target.device)
                start = time.perf_counter()
                text = network.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    assistant_model=draft.network,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=target.pad_id,
                    **how,
                )
                seconds += time.perf_counter() - start
                emitted += text.shape[1] - len(prompt)
    finally:
        hook.remove()
        for name, value in before.items():
            setattr(config, name, value)
    if not calls:
        raise DataError("There is no prompt to decode.")
    return {
        "block_efficiency": emitted / calls,
        "tokens": float(emitted),
        "tokens_per_second": emitted / seconds,
    }


def _sums(values_BT: Tensor, counted_BT: Tensor, samples_per_prompt: int) -> tuple[Tensor, Tensor]:
    """Sums of the values and numbers of counted tokens of each text, [X, G] twice."""
    total_B = torch.where(counted_BT, values_BT, 0.0).sum(1)
    return total_B.view(-1, samples_per_prompt), counted_BT.sum(1).to(total_B).view(-1, samples_per_prompt)
