"""What language methods report alike: the picture of what counts."""

import json

import pytest
import torch
from torch.testing import assert_close

from potstill import recipe as recipes
from potstill.divergences import ForwardKL, ReverseKL, SampledReverseKL, log_probs
from potstill.methods.language import comparison
from potstill.objectives.policy import PolicyGradient
from potstill.objectives.states import Rows
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.report.build import build_report
from potstill.rollouts.local import completions_of
from potstill.run import Run, open_folder
from potstill.weighting import EarlyPrefix, Positions

TEXT = "A pot still boils the wash, and what rises is lighter than what stays. Then it drips, clear and strong."


@pytest.fixture
def run(tmp_path, tiny_lm):
    """`run(method)`: a Run on lines of text with its folder open."""
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(f"{TEXT} {i}" for i in range(40)))
    student, teacher = str(tiny_lm(1)), str(tiny_lm(2))

    def make(**method):
        plan = recipes.resolve({
            "method": method, "student": student, "teacher": teacher,
            "data": {"text": str(file), "length": 16, "prompt_length": 6},
            "train": {"steps": 3, "batch": 4, "lr": 1e-3, "trackers": [], "device": "cpu"},
            "eval": {"limit": 4, "batch": 4},
        })  # fmt: skip
        folder = tmp_path / "run"
        open_folder(folder, recipes.write(plan))
        return Run(plan, folder)

    return make


def divergences(run, batch):
    """KL(q || p) and log p - log q of the tokens at every counted place, [N] each."""
    with torch.no_grad():
        log_q, log_p = (log_probs(m.counted_logits(batch)) for m in (run.student(), run.model("teacher")))
    apart = ReverseKL()(teacher_logp=log_p, student_logp=log_q)
    return apart, (log_p - log_q).gather(1, batch.tokens_counted[:, None])[:, 0]


def rows_of(sentences, name):
    return torch.tensor([x for sentence in sentences for x in sentence[name]])


@pytest.mark.parametrize("estimator", [ForwardKL(), SampledReverseKL()], ids=repr)
def test_the_picture_is_of_own_samples_with_their_divergences_and_weights(estimator, run, monkeypatch):
    run, rollouts = run(name="gkd"), RolloutSpec(max_new_tokens=8, samples_per_prompt=2)
    objective = TokenDistillation(
        run.student(), run.teacher(), estimator, rollouts=rollouts, weighting=EarlyPrefix(1.0),
        optimizer=run.train.optimizer_spec(), seed=run.seed,
    )  # fmt: skip
    asked, collect = [], objective.collect
    monkeypatch.setattr(objective, "collect", lambda batch, step: asked.append(collect(batch, step)) or asked[-1])
    found, tokenizer = comparison._weights(run, objective, run.prompts()), run.context["tokenizer"]
    (batch,) = asked
    assert len(batch) == 8 and len(found) == comparison.TEXTS, "one sample of each prompt"
    apart_N, log_ratio_N = divergences(run, batch)
    rows = Rows.of(batch.counted_BT)
    weights_BR = EarlyPrefix(1.0)(Positions(rows.mask_BR, log_ratio_BR=rows.spread(log_ratio_N)))
    kept = rows.mask_BR[::2]
    assert_close(rows_of(found, "values"), rows.spread(apart_N)[::2][kept])
    assert_close(rows_of(found, "weights"), weights_BR[::2][kept])
    assert ["".join(s["tokens"]) for s in found] == tokenizer.batch_decode(completions_of(batch)[::2])
    assert [s["label"] for s in found] == [TEXT[: len(s["label"])] for s in found] and found[0]["label"]
    monkeypatch.setattr(comparison, "LONGEST", 3)
    shown = comparison._weights(run, objective, run.prompts())
    assert [max(len(sentence[name]) for sentence in shown) for name in ("tokens", "values", "weights")] == [3, 3, 3]


def test_the_picture_of_a_policy_gradient_has_what_it_samples_anew(run):
    """log q - log p of the tokens, at a step where new rollouts are due."""
    run, rollouts = run(name="gkd"), RolloutSpec(max_new_tokens=8)
    objective = PolicyGradient(
        run.student(), run.teacher(), rollouts=rollouts, weighting=EarlyPrefix(1.0), task_coefficient=0.0,
        optimizer=run.train.optimizer_spec(), seed=run.seed, updates_per_rollout=2,
    )  # fmt: skip
    found = comparison._weights(run, objective, run.prompts())
    assert objective._at[0] == 4, "3 steps, in pairs"
    batch = objective._kept[0]
    _, log_ratio_N = divergences(run, batch)
    assert_close(rows_of(found, "values"), -log_ratio_N, rtol=0, atol=1e-5)
    objective.teacher_coefficient = 0.0
    assert comparison._weights(run, objective, run.prompts()) == [], "nothing is weighed"


@pytest.mark.parametrize(("weighting", "shown"), [({"name": "EarlyPrefix", "gamma": 1.0}, True), ("Uniform", False)])
def test_reports_show_weights_where_they_differ(weighting, shown, run):
    run = run(name="token_kd", weighting=weighting)
    run.execute()
    record = run.folder / "records" / "3-weights.json"
    assert record.is_file() is shown
    page = build_report(run.folder).read_text()
    assert ("What counts" in page) is shown and ("--w:1.0" in page) is shown
    if shown:
        sentences = json.loads(record.read_text())["sentences"]
        assert all(s["weights"][0] == pytest.approx(2.0) and min(s["weights"]) >= 1.0 for s in sentences)
        assert all(len(s["tokens"]) == 15 for s in sentences), "texts of 16 tokens, of which the first is given"
