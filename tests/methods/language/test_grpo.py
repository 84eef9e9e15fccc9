"""GRPO: what its options optimise, and that it runs from a recipe on real architectures."""

import pytest
import torch
from torch.testing import assert_close
from transformers import GemmaConfig, LlamaConfig, Qwen3Config

from potstill import recipe as recipes
from potstill.contracts.batch import PromptBatch
from potstill.contracts.errors import RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.methods.language.grpo import GRPO, OnlineRFT
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.policy import Clip, PolicyGradient
from potstill.objectives.tokens import RolloutSpec
from potstill.rollouts.groups import group_advantages
from potstill.run import Run, open_folder
from potstill.teachers import FrozenStart

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 +-=.:\n"
TOKENIZER = character_tokenizer(["abcdefg "])


def model(seed: int) -> CausalLM:
    torch.manual_seed(seed)
    net = CausalLM.PACKAGED["llama-tiny"](tokenizer=TOKENIZER, layers=1, width=32).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return net


def prompts() -> PromptBatch:
    extra = {"rows": [{"prompt": "a"}, {"prompt": "b"}]}
    tokens = torch.tensor([[0, 4, 5], [6, 7, 8]])
    return PromptBatch(torch.arange(2), tokens, torch.tensor([[False, True, True], [True] * 3]), None, extra)


def objective(kind=PolicyGradient, **options) -> PolicyGradient:
    options = {"average": "sequence"} | options
    return kind(
        model(0), rollouts=RolloutSpec(max_new_tokens=5, samples_per_prompt=4), optimizer=OptimizerSpec(), seed=0,
        reward=lambda row, text: float("a" in text), **options,
    )  # fmt: skip


def parameters(method) -> list[torch.Tensor]:
    return list(method.student.parameters())


def by_row(method, batch) -> list[torch.Tensor]:
    log_q = method.student.counted_logits(batch).log_softmax(-1).gather(-1, batch.tokens_counted[:, None])[:, 0]
    return list(log_q.split(batch.counted_BT.sum(1).tolist()))


def test_grpo_is_the_papers_objective():
    """Equation 3 at ratio 1: sequence means of A log q, minus beta k3 to the start."""
    method = objective(reference=FrozenStart(model(5)), reference_kl=0.04)
    batch = method.collect(prompts(), 0)
    A = group_advantages(batch.extra["reward"], 4)
    assert 0 < batch.extra["reward"].mean() < 1 and (A != 0).any()
    with torch.no_grad():
        log_ref = method.reference.model.counted_logits(batch).log_softmax(-1)
        log_ref = log_ref.gather(-1, batch.tokens_counted[:, None])[:, 0].split(batch.counted_BT.sum(1).tolist())
    rows = by_row(method, batch)
    expected = torch.stack([
        -a * x.mean() + 0.04 * ((r - x).exp() - 1 - (r - x)).mean() for a, x, r in zip(A, rows, log_ref, strict=True)
    ]).mean()  # fmt: skip
    found = torch.autograd.grad(method.loss("student", batch, 0).value(), parameters(method), allow_unused=True)
    for x, y in zip(found, torch.autograd.grad(expected, parameters(method), allow_unused=True), strict=True):
        assert_close(x, y, rtol=1e-3, atol=1e-6)


def test_online_rft_imitates_what_was_right_and_nothing_else():
    method = objective(OnlineRFT)
    batch = method.collect(prompts(), 0)
    right = batch.extra["reward"]
    assert 0 < right.sum() < len(right)
    expected = -torch.stack([r * x.mean() for r, x in zip(right, by_row(method, batch), strict=True)]).mean()
    found = torch.autograd.grad(method.loss("student", batch, 0).value(), parameters(method), allow_unused=True)
    for x, y in zip(found, torch.autograd.grad(expected, parameters(method), allow_unused=True), strict=True):
        assert_close(x, y, rtol=1e-3, atol=1e-6)


def plan_of(student, **overrides):
    raw = {
        "method": {"name": "grpo", "rollouts": {"max_new_tokens": 12, "samples_per_prompt": 4}, "samples": 2},
        "student": str(student),
        "data": {"task": "arithmetic", "size": 60, "test_size": 8, "length": 64, "prompt_length": 16},
        "train": {"steps": 2, "batch": 4, "lr": 1e-3, "trackers": [], "device": "cpu"},
        "eval": {"limit": 4, "batch": 4},
    }
    return recipes.resolve(recipes.apply(raw, overrides))


def run(folder, *args, **overrides):
    plan = plan_of(*args, **overrides)
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder).execute()


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, GemmaConfig])
def test_real_architectures(config, tmp_path, tiny_lm):
    student = tiny_lm(3, config, character_tokenizer(ALPHABET))
    result = run(tmp_path / "run", student, **{"method.warm_start": 1})
    assert {"accuracy", "sampled_accuracy", "before_sampled_accuracy"} <= set(result.metrics)


def test_its_siblings_run(tmp_path, tiny_lm):
    student = tiny_lm(3, tokenizer=character_tokenizer(ALPHABET))
    dapo = {"method.clip": {"low": 0.2, "high": 0.28}, "method.average": "token", "method.reference_kl": 0}
    doctor = {"method.normalise": False, "method.average": "constant", "method.updates_per_rollout": 2}
    for i, options in enumerate((dapo, doctor, {"method.signal": "online_rft"})):
        run(tmp_path / str(i), student, **options)


def test_the_defaults_are_the_papers_and_errors_say_what_to_do(tmp_path, tiny_lm):
    paper = GRPO()
    assert (paper.rollouts.samples_per_prompt, paper.reference_kl, paper.average) == (64, 0.04, "sequence")
    assert paper.clip == Clip(low=0.2, high=0.2) and paper.normalise
    student = tiny_lm(1)
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"prompt": "a", "completion": "b"}\n' * 30)
    with pytest.raises(RecipeError, match=r"grpo: .* has no score of its own"):
        run(tmp_path / "a", student, data={"jsonl": str(lines), "length": 16, "prompt_length": 4})
    with pytest.raises(RecipeError, match=r"within a group: set rollouts\.samples_per_prompt"):
        run(
            tmp_path / "b", tiny_lm(1, tokenizer=character_tokenizer(ALPHABET)),
            **{"method.rollouts.samples_per_prompt": 1},
        )  # fmt: skip
    with pytest.raises(RecipeError, match="low"):
        plan_of(student, **{"method.clip.low": 1.5})
