"""OPSD: identical contexts teach nothing, options reduce to plain divergences, and real architectures run."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

from potstill import recipe as recipes
from potstill.contracts.errors import DataError, RecipeError
from potstill.divergences import ForwardKL, JensenShannon, ReverseKL, log_probs
from potstill.methods.language.opsd import OPSD
from potstill.run import Run, open_folder


def plan_of(student, /, **overrides):
    raw = {
        "method": {
            "name": "opsd", "rollouts": {"max_new_tokens": 6}, "context": 96,
            "solution": {"field": "solution", "template": "{solution} {prompt}"},
        },
        "student": student,
        "data": {"task": "arithmetic", "size": 40, "test_size": 8, "length": 80, "prompt_length": 24},
        "train": {"steps": 2, "batch": 4, "lr": 1e-3, "trackers": [], "device": "cpu"},
        "eval": {"limit": 8, "batch": 4},
    }  # fmt: skip
    return recipes.resolve(recipes.apply(raw, overrides))


def run(folder, *args, **overrides):
    plan = plan_of(*args, **overrides)
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder).execute()


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(log_probs(2 * torch.randn(6, 9, generator=draw, dtype=torch.float64)) for _ in range(2))


def value(config: OPSD, log_p, log_q):
    tokens = torch.zeros(len(log_p), dtype=torch.int64)
    return config.part().per_position(log_p, log_q, tokens)


def test_the_clip_bounds_each_outcome_as_the_paper_or_as_a_divergence_does():
    log_p, log_q = rows()
    raw = (log_p.exp() * (log_p - log_q)).clamp(max=0.05).sum(-1)
    safe = (log_p.exp() * (log_p - log_q) + log_q.exp() - log_p.exp()).clamp(max=0.05).sum(-1)
    assert_close(value(OPSD(), log_p, log_q), raw)
    assert_close(value(OPSD(clipping="non-negative"), log_p, log_q), safe)
    assert (safe >= 0).all() and (raw < 0).any()


def test_the_cards_example_of_a_raw_clip_below_zero():
    log_p, log_q = (torch.tensor([x], dtype=torch.float64).log() for x in ((0.7, 0.2, 0.1), (0.005, 0.66, 0.335)))
    assert value(OPSD(), log_p, log_q).item() == pytest.approx(-0.31, abs=0.01)
    assert value(OPSD(clipping="non-negative"), log_p, log_q).item() > 0


def test_without_a_clip_it_is_the_divergence_and_a_wide_clip_is_none():
    log_p, log_q = rows()
    for divergence in (ForwardKL(), ReverseKL(), JensenShannon(0.5)):
        plain = divergence(teacher_logp=log_p, student_logp=log_q)
        assert_close(value(OPSD(divergence=divergence, clip=None), log_p, log_q), plain)
        assert_close(value(OPSD(divergence=divergence, clip=1e9), log_p, log_q), plain)


def test_top_k_keeps_the_teachers_likeliest_renormalised_in_both():
    log_p, log_q = rows()
    kept = log_p.topk(3).indices
    p, q = (x.gather(1, kept).log_softmax(-1) for x in (log_p, log_q))
    assert_close(value(OPSD(top_k=3, clip=None), log_p, log_q), (p.exp() * (p - q)).sum(-1))


def test_sampled_tokens_have_the_reverse_kls_gradient_on_average():
    log_p, _ = rows()
    free = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    mean = torch.zeros_like(free)
    for token in range(9):
        log_q = log_probs(free)
        tokens = torch.full((6,), token)
        values = OPSD(estimator="sampled").part().per_position(log_p, log_q, tokens)
        mean += torch.autograd.grad((log_q[:, token].exp().detach() * values).sum(), free)[0]
    exact = torch.autograd.grad(ReverseKL()(teacher_logp=log_p, student_logp=log_probs(free)).sum(), free)[0]
    assert_close(mean, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, Gemma3TextConfig])
def test_real_architectures_learn_from_themselves(tmp_path, tiny_lm, config):
    result = run(tmp_path / "run", {"name": str(tiny_lm(0, config))})
    assert {"accuracy", "before_accuracy", "perplexity", "rollout_reverse_kl"} <= result.metrics.keys()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["student_kind"] == "causal_lm"


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_weights": "ema"},
        {"teacher_weights": "live"},
        {"reason_first": 4},
        {"estimator": "sampled", "temperature": 1.0, "rollouts": {"max_new_tokens": 6}},
    ],
    ids=str,
)
def test_every_option_runs(tmp_path, options):
    student = {"name": "llama-tiny"}
    result = run(tmp_path / "run", student, **{f"method.{k}": v for k, v in options.items()})
    assert all(map(lambda v: v == v, (result.metrics["perplexity"], result.metrics["accuracy"])))


def test_the_teachers_context_is_what_teaches(tmp_path):
    """Weights of the start and the student's own prompt: nothing moves; with the solution before it, something does."""
    student, same = {"name": "llama-tiny"}, {"method.solution.template": "{prompt}"}
    losses = {}
    for name, changes in {"same": same, "solution": {}}.items():
        run(tmp_path / name, student, **{"train.steps": 1, "method.clip": None, **changes})
        rows = [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = rows[0]["student/divergence"]
    assert abs(losses["same"]) < 1e-6 < losses["solution"]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"method.estimator": "sampled"}, RecipeError, "unbiased only on untruncated samples"),
        ({"method.context": 8}, DataError, "tokens, and between 1 and 8 are allowed"),
        ({"method.solution.field": "proof"}, DataError, "rows with a prompt and a proof"),
        ({"method.solution.filed": "x"}, RecipeError, "filed"),
        ({"method.clip": -1.0}, RecipeError, "clip"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path / "run", {"name": "llama-tiny"}, **overrides)
