"""PACED: neutral weights are plain distillation, rates come from the student's own answers, and stages follow each other."""

import json

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Gemma2Config, LlamaConfig, Qwen3Config

from potstill import recipe as recipes
from potstill.contracts.batch import PromptBatch, TokenBatch
from potstill.contracts.errors import DataError, RecipeError
from potstill.contracts.files import read_json
from potstill.contracts.players import OptimizerSpec
from potstill.divergences import Adaptive, ForwardKL, JensenShannon, ReverseKL
from potstill.methods.language.paced import PACED, Frozen, signal_over_noise, weights_of
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.run import Run, open_folder
from potstill.teachers import LocalTeacher
from potstill.weighting import BetaKernel, CorrectOnly, HardBand, RewardItself, RewardSoftmax, Uniform, Weighting

TOKENIZER = character_tokenizer(["abcdefg "])
ROLLOUTS = RolloutSpec(max_new_tokens=5, samples_per_prompt=4)


def model(seed: int) -> CausalLM:
    torch.manual_seed(seed)
    net = CausalLM.PACKAGED["llama-tiny"](tokenizer=TOKENIZER, layers=1, width=32).double()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
    return net


def prompts(rows: int = 3, first: int = 0) -> PromptBatch:
    tokens_BT = torch.tensor([[4 + i, 5 + i, 6] for i in range(rows)])
    ids = torch.arange(first, first + rows)
    return PromptBatch(ids, tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool), extra={"rows": list(range(rows))})


def grader():
    """A grade for each answer in its order: problems solved 1, 4 and 0 times of 4."""
    grades = iter([1.0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0] * 3)
    return lambda row, text: next(grades)


def objective(weighting: Weighting, estimator=ForwardKL(), cls=TokenDistillation, **options) -> TokenDistillation:
    graded = {"reward": grader(), "advantage": 0.0} if cls is TokenDistillation else {}
    return cls(
        model(0), LocalTeacher(model(1)), estimator, optimizer=OptimizerSpec(), seed=0, rollouts=ROLLOUTS,
        average="sequence", weighting=weighting, **graded, **options,
    )  # fmt: skip


def value_and_gradient(made: TokenDistillation, rows: TokenBatch) -> tuple[Tensor, list[Tensor]]:
    value = made.loss("student", rows, 0).value()
    return value, list(torch.autograd.grad(value, list(made.student.parameters())))


@pytest.mark.parametrize("neutral", [BetaKernel(0.0, 0.0), BetaKernel(0.0, 0.0, mean_one=True), HardBand(0.0, 1.0),
                                     RewardItself(mean_one=True)], ids=repr)  # fmt: skip
def test_weights_of_one_are_plain_distillation_bit_for_bit(neutral):
    plain = objective(Uniform())
    rows = plain.collect(prompts(), 0)
    if isinstance(neutral, RewardItself):
        rows.extra["reward"] = torch.full((12,), 0.125)
    value, gradient = value_and_gradient(plain, rows)
    assert "reward" not in plain.loss("student", rows, 0).terms  # graded for the weights alone
    weighted, found = value_and_gradient(objective(neutral), rows)
    assert torch.equal(weighted, value)
    assert all(map(torch.equal, found, gradient))


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon(0.3)], ids=repr)
def test_the_loss_is_the_weighted_mean_over_answers_of_their_means_over_tokens(divergence):
    made = objective(BetaKernel(mean_one=True), divergence)
    rows = made.collect(prompts(), 0)
    value, gradient = value_and_gradient(made, rows)
    log_q, log_p = (net.counted_logits(rows).log_softmax(-1) for net in (made.student, made.teacher.model))
    means = [
        x.mean()
        for x in divergence(teacher_logp=log_p.detach(), student_logp=log_q).split(rows.counted_BT.sum(1).tolist())
    ]
    rates = rows.extra["reward"].view(3, 4).mean(1).double()
    w = (rates * (1 - rates)).repeat_interleave(4)  # only the first problem is at the frontier
    expected = (w * torch.stack(means)).sum() / w.sum()
    assert w.count_nonzero() == 4
    assert_close(value, expected, rtol=1e-6, atol=0)
    for a, b in zip(gradient, torch.autograd.grad(expected, list(made.student.parameters())), strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_an_answer_a_problem_has_no_frontier():
    grades_B1 = torch.tensor([[0.0], [1.0], [1.0]])
    assert_close(weights_of(BetaKernel(), grades_B1), torch.zeros(3))
    assert weights_of(BetaKernel(prior=1.0), grades_B1).min() > 0


def test_frozen_weights_go_to_their_problems_in_every_epoch():
    made = objective(RewardItself(), cls=Frozen)
    made.weights_P = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    rows = made.collect(prompts(2, first=3), 0)
    assert_close(rows.extra["reward"], torch.tensor([0.4] * 4 + [0.5] * 4))
    again = made.collect(prompts(2, first=3 + 5), 7)
    assert_close(again.extra["reward"], rows.extra["reward"])
    weights = made.loss("student", rows, 0).positions["weights"]
    assert_close(weights[:, 0], rows.extra["reward"])


def test_weights_are_frozen_by_problem_and_over_the_whole_data_set():
    grades_PK = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    assert_close(weights_of(BetaKernel(), grades_PK), torch.tensor([3 / 16, 0, 1 / 4]))
    assert_close(weights_of(BetaKernel(mean_one=True), grades_PK), torch.tensor([3 / 16, 0, 1 / 4]) / (7 / 48))
    for of_answers in (RewardSoftmax(0.5), CorrectOnly()):
        with pytest.raises(RecipeError, match=f"{type(of_answers).__name__} weighs answers, not problems"):
            weights_of(of_answers, grades_PK)


def test_signal_over_noise_is_of_the_gradients_of_problems_with_one_pass_rate():
    """By hand: gradients of single problems, grouped by the rate of their answers; a rate of one problem has no noise."""
    grades = iter([1.0, 0, 0, 0] + [0, 0, 0, 1.0] + [1, 1, 1, 1] + [0, 1, 0, 0.0] + [0] * 4 + [1] * 4)
    made = objective(Uniform())
    made.reward = lambda row, text: next(grades)
    problems = [(prompts(i + 1, 0), -1) for i in range(6)]
    problems = [
        (PromptBatch(p.ids_B[-1:], p.tokens_BT[-1:], p.attention_BT[-1:], extra={"rows": [0]}), s) for p, s in problems
    ]
    bins = signal_over_noise(made, iter(problems))
    assert [(b["rate"], b["problems"]) for b in bins] == [(0.25, 3.0), (1.0, 2.0)]
    made.reward = lambda row, text: 0.0
    flat = []
    for i in (0, 1, 3):
        loss = made.loss("student", made.collect(problems[i][0], -1), -1).value()
        flat.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(made.student.parameters()))]))
    g = torch.stack(flat)
    variance = g.var(0, correction=1).sum()
    assert bins[0]["snr"] == pytest.approx(float((g.mean(0).square().sum() - variance / 3) / variance), rel=1e-6)


def test_the_papers_defaults():
    config = PACED()
    assert config.weighting == BetaKernel(1.0, 1.0, mean_one=True)
    assert (config.divergences, config.teacher, config.refresh) == ((ForwardKL(),), "model", "step")
    assert (config.rollouts.max_new_tokens, config.rollouts.samples_per_prompt, config.estimate) == (8192, 8, 8)


def plan_of(student, teacher, /, **overrides):
    raw = {
        "method": {"name": "paced", "rollouts": {"max_new_tokens": 6, "samples_per_prompt": 2}},
        "student": str(student),
        **({"teacher": str(teacher)} if teacher else {}),
        "data": {"task": "arithmetic", "size": 40, "test_size": 8, "length": 60, "prompt_length": 16},
        "train": {"steps": 2, "batch": 4, "lr": 1e-3, "trackers": [], "device": "cpu"},
        "eval": {"limit": 4, "batch": 4},
    }
    return recipes.resolve(recipes.apply(raw, overrides))


def run(folder, *args, **overrides):
    plan = plan_of(*args, **overrides)
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder).execute()


def stages(folder) -> dict[str, int]:
    """How many steps each stage took, in their order."""
    found: dict[str, int] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        found[json.loads(line)["stage"]] = found.get(json.loads(line)["stage"], 0) + 1
    return found


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, Gemma2Config])
def test_real_architectures_in_two_stages_with_frozen_rates(config, tmp_path, tiny_lm):
    result = run(
        tmp_path / "run", tiny_lm(3, config), tiny_lm(4, config, hidden_size=48),
        **{"method.divergences": ["ForwardKL", "ReverseKL"], "method.refresh": "stage", "method.estimate": 2,
           "method.warm_start": 1, "method.weighting": {"name": "BetaKernel", "prior": 1.0}},
    )  # fmt: skip
    assert {"before_pass_rate", "pass_rate", "accuracy", "rollout_reverse_kl"} <= result.metrics.keys()
    assert stages(tmp_path / "run") == {"warm start": 1, "distil-1": 1, "distil-2": 1}
    assert (tmp_path / "run" / "stages" / "distil-2-weights").is_dir()


def test_the_student_teaches_itself_with_the_solution_before_it(tmp_path, tiny_lm):
    base = tiny_lm(5)
    result = run(
        tmp_path / "run", base, None,
        **{"method.teacher": "self", "method.weighting": "Uniform", "method.snr": 6, "method.divergences": ["ReverseKL"]},
    )  # fmt: skip
    assert result.metrics["before_rollout_reverse_kl"] == pytest.approx(
        0.0, abs=1e-6
    )  # the same weights without context
    assert result.metrics["rollout_reverse_kl"] > 1e-6  # and the context has moved it
    record = read_json(tmp_path / "run" / "records" / "5-snr.json")
    assert record["series"][0]["x"] == [0.0]


def test_baselines_are_parts():
    written = {"name": "paced", "divergences": ["Adaptive"], "weighting": {"name": "HardBand", "low": 0.1, "high": 0.9}}
    plan = recipes.resolve({"method": written, "data": {"task": "arithmetic"}})
    assert plan.config.divergences == (Adaptive(),)
    assert plan.config.weighting == HardBand(0.1, 0.9)


def test_what_cannot_work_is_refused(tmp_path, tiny_lm):
    student = tiny_lm(1)
    text = tmp_path / "lines.txt"
    text.write_text("\n".join(f"A pot still boils {i} times." for i in range(40)))
    with pytest.raises(RecipeError, match="paced weighs problems by how often they are solved, and text:.* grades no"):
        run(tmp_path / "a", student, student, data={"text": str(text), "length": 16, "prompt_length": 6})
    with pytest.raises(RecipeError, match="BetaKernel takes powers and a prior of at least 0"):
        plan_of(student, student, **{"method.weighting": {"name": "BetaKernel", "alpha": -1}})
    with pytest.raises(RecipeError, match="method.divergences"):
        plan_of(student, student, **{"method.divergences": []})
    with pytest.raises(RecipeError, match="RewardSoftmax weighs answers, not problems"):
        run(tmp_path / "b", student, student, **{"method.weighting": "RewardSoftmax", "method.refresh": "stage"})
    with pytest.raises(RecipeError, match="samples_per_prompt to 2 or more"):
        run(tmp_path / "c", student, student, **{"method.rollouts.samples_per_prompt": 1})
    with pytest.raises(DataError, match="rows with a prompt and a hint, and this one is"):
        run(tmp_path / "d", student, student, **{"method.teacher": "self", "method.solution": "hint"})
