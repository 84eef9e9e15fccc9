"""vOPD: each estimator is what its name says, arms of a seed share their checkpoint, and real architectures run."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Olmo2Config, Qwen3Config

from potstill import recipe as recipes
from potstill.contracts.errors import ModelError, RecipeError
from potstill.divergences import ReverseKL, log_probs
from potstill.methods.language.vopd import VOPD
from potstill.run import Run, open_folder

TEXT = "A pot still boils the wash, and what rises is lighter than what stays. Then it drips, clear and strong."


@pytest.fixture
def lines(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(f"{TEXT} {i}" for i in range(40)))
    return file


def plan_of(lines, student, teacher, /, **overrides):
    raw = {
        "method": {"name": "vopd", "rollouts": {"max_new_tokens": 6}, "k": 4, "probe": 3, "probe_batch": 4},
        "student": str(student),
        "teacher": str(teacher),
        "data": {"text": str(lines), "length": 16, "prompt_length": 6},
        "train": {"steps": 2, "batch": 4, "lr": 1e-3, "trackers": [], "device": "cpu"},
        "eval": {"limit": 4, "batch": 4},
    }
    return recipes.resolve(recipes.apply(raw, overrides))


def run(folder, *args, **overrides):
    plan = plan_of(*args, **overrides)
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder).execute()


def rows(seed: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(2))


def mean_gradient_and_variance(name: str, seed: int, scale: float = 2.0, **options) -> tuple[torch.Tensor, float]:
    """Over all tokens with their probabilities: E g and E |g - E g|^2, with respect to one state's logits."""
    z, teacher = rows(seed, scale)
    part = VOPD(estimator=name, **options).part()
    log_p, probabilities = log_probs(teacher)[None], log_probs(z).exp()
    gradients = []
    for token in range(len(z)):
        free = z.clone().requires_grad_()
        value = part.per_position(
            teacher_logp=log_p, student_logp=log_probs(free)[None], tokens_N=torch.tensor([token])
        )
        gradients.append(torch.autograd.grad(value.sum(), free)[0])
    stacked = torch.stack(gradients)
    mean = (probabilities[:, None] * stacked).sum(0)
    return mean, float((probabilities * (stacked - mean).square().sum(1)).sum())


def analytic(seed: int, scale: float = 2.0) -> torch.Tensor:
    """grad_z KL(q || p) = q (log(q / p) - KL)."""
    z, teacher = rows(seed, scale)
    log_q, log_p = log_probs(z), log_probs(teacher)
    return log_q.exp() * (log_q - log_p - ReverseKL()(teacher_logp=log_p, student_logp=log_q))


@pytest.mark.parametrize("name", ["sampled", "value", "topk_value", "full"])
def test_unbiased_estimators_have_the_analytic_gradient(name):
    for seed in range(3):
        assert_close(mean_gradient_and_variance(name, seed, k=3)[0], analytic(seed), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), [("student_topk", {"k": 3}), ("clipped", {"clip": 0.5})])
def test_biased_estimators_do_not(name, options):
    assert (mean_gradient_and_variance(name, 0, **options)[0] - analytic(0)).abs().max() > 1e-3


def test_the_value_lowers_the_variance_and_the_top_k_value_less():
    """On average over states, not at each of them."""
    mean = lambda name: sum(mean_gradient_and_variance(name, seed, k=3)[1] for seed in range(10)) / 10
    assert mean("full") < 1e-20
    assert mean("value") < mean("topk_value") < mean("sampled")


def test_clipping_bounds_the_reward_where_the_paper_says():
    part = VOPD(estimator="clipped", clip=0.5).part()
    log_p, log_q = torch.tensor([[0.999, 0.001]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert_close(part.advantage(log_p, log_q, torch.tensor([1])), torch.tensor([0.5]).log() / 0.5)


def test_arms_of_a_seed_start_from_one_checkpoint_and_differ_in_noise_alone(tmp_path, lines, tiny_lm):
    student, teacher = tiny_lm(1, spread=0.1), tiny_lm(2)
    found = {
        name: run(
            tmp_path / name, lines, student, teacher,
            **{"method.estimator": name, "method.warm_start": 2, "method.probe": 8},
        ).metrics
        for name in ("sampled", "value", "full")
    }  # fmt: skip
    before = [m["before_rollout_reverse_kl"] for m in found.values()]
    assert before[0] == before[1] == before[2]
    noise = {name: m["gradient_variance"] for name, m in found.items()}
    assert noise["full"] < noise["value"] < noise["sampled"]
    assert found["value"]["adam_variance"] > 0
    stages = {json.loads(line)["stage"] for line in (tmp_path / "value" / "metrics.jsonl").read_text().splitlines()}
    assert stages == {"warm start", "distil"}


@pytest.mark.parametrize("config", [Qwen3Config, Olmo2Config])
def test_real_architectures_with_adapters(config, tmp_path, lines, tiny_lm):
    student, teacher = tiny_lm(3, config), tiny_lm(4, config, hidden_size=48)
    lora = {"name": str(student), "lora": {"r": 4, "alpha": 8}}
    result = run(tmp_path / "run", lines, student, teacher, student=lora, **{"method.probe": 0})
    assert result.metrics["rollout_reverse_kl"] > 0
    start = AutoModelForCausalLM.from_pretrained(student).state_dict()
    ended = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student").state_dict()
    assert start.keys() == ended.keys(), "adapters are merged"
    moved = {name for name in start if not torch.equal(start[name], ended[name])}
    assert moved
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in moved), "only adapters learn"


def test_what_cannot_work_is_refused(tmp_path, lines, tiny_lm):
    from potstill.models.tokenizers import character_tokenizer

    student = tiny_lm(1)
    with pytest.raises(RecipeError, match="'sampled', 'value', 'topk_value'"):
        plan_of(lines, student, student, **{"method.estimator": "valeu"})
    with pytest.raises(RecipeError, match=r"method\.task_reward: text:.* has no score of its own"):
        run(tmp_path / "a", lines, student, student, **{"method.task_reward": True})
    with pytest.raises(RecipeError, match=r"rollouts\.top_p 1, rollouts\.top_k 0 and rollouts\.temperature 1\.0"):
        run(tmp_path / "b", lines, student, student, **{"method.rollouts.temperature": 0.7})
    with pytest.raises(ModelError, match=r"different vocabularies"):
        run(tmp_path / "c", lines, student, tiny_lm(2, tokenizer=character_tokenizer("abc ")))
