"""seq_kd and opd_survey: what the teacher writes is what is learnt, and the survey's special cases are other methods."""

import pytest
import torch
from torch.testing import assert_close
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

from potstill import recipe as recipes
from potstill.catalogue import systems
from potstill.contracts.batch import PromptBatch
from potstill.contracts.errors import DataError, RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.divergences import Alpha, Exact, ForwardKL, JensenShannon, ReverseKL, log_probs
from potstill.methods.language.opd_survey import OPDSurvey
from potstill.methods.language.taxonomy import TAGS, recommend
from potstill.methods.language.writing import written
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.rollouts.local import completions_of, sample
from potstill.run import Run, open_folder
from potstill.teachers import FrozenStart, LocalTeacher, Panel


def plan_of(name, /, **overrides):
    raw = {
        "method": {"name": name},
        "student": {"name": "llama-tiny"},
        "teacher": {"name": "llama-tiny"},
        "data": {"task": "arithmetic", "size": 40, "test_size": 8, "length": 48, "prompt_length": 24},
        "train": {"steps": 2, "batch": 4, "lr": 1e-3, "trackers": [], "device": "cpu"},
        "eval": {"limit": 8, "batch": 4},
    }
    return recipes.resolve(recipes.apply(raw, overrides))


def run_of(folder, *args, **overrides) -> Run:
    plan = plan_of(*args, **overrides)
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder)


@pytest.fixture
def pair(tmp_path, tiny_lm):
    folder = str(tiny_lm(1))
    return {"teacher": {"name": folder}, "student": {"from": "teacher", "layers": 1}}


def test_the_student_reads_what_the_teacher_wrote(tmp_path, pair, monkeypatch):
    fitted = {}
    monkeypatch.setattr(Run, "fit", lambda self, objective, data, **k: fitted.update(objective=objective, data=data))
    run = run_of(tmp_path / "run", "seq_kd", **pair, **{"method.max_new_tokens": 5})
    run.execute()
    prompts, teacher = run.prompts(), run.model("teacher")
    for i in (0, 7):
        out = sample(teacher, prompts.batch(torch.tensor([i])), max_new_tokens=5, greedy=True)
        row = fitted["data"].batch(torch.tensor([i]))
        assert completions_of(row) == completions_of(out)
        assert row.tokens_BT[0].tolist() == out.tokens_BT[0][out.attention_BT[0]].tolist()
    assert fitted["objective"].teacher is None and fitted["objective"].cross_entropy == 1


def test_samples_are_several_and_the_best_scored_is_kept(tmp_path, pair, monkeypatch):
    fitted = {}
    monkeypatch.setattr(Run, "fit", lambda self, objective, data, **k: fitted.update(data=data, objective=objective))
    options = {"method.decoding": "sample", "method.samples": 3, "method.max_new_tokens": 5, "method.word": 0.25}
    run_of(tmp_path / "a", "seq_kd", **pair, **options).execute()
    assert len(fitted["data"]) == 3 * 40
    assert (fitted["objective"].distillation, fitted["objective"].cross_entropy) == (0.25, 0.75)
    run = run_of(tmp_path / "b", "seq_kd", **pair, **options, **{"method.best": True})
    marks = iter(range(10**6))
    run.source.grade = lambda row, text: (next(marks) % 3 == 1) * 1.0  # the second sample of each
    run.execute()
    assert len(fitted["data"]) == 40
    said = written(run, None, run.prompts(), "written", max_new_tokens=5)  # kept by the stage: nobody writes again
    assert completions_of(fitted["data"].batch(torch.arange(2))) == [said[0][1], said[1][1]]


@pytest.mark.parametrize("name", ["seq_kd", "opd_survey"])
@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, Gemma3TextConfig])
def test_real_architectures_run(tmp_path, tiny_lm, name, config):
    short = {"seq_kd": {"max_new_tokens": 4}, "opd_survey": {"rollouts": {"max_new_tokens": 4}, "lengths": [2, 8]}}
    roles = {"teacher": {"name": str(tiny_lm(1, config))}, "student": {"from": "teacher", "layers": 1}}
    result = run_of(tmp_path / "run", name, **roles, **{f"method.{k}": v for k, v in short[name].items()}).execute()
    assert {"reverse_kl", "top_overlap", "accuracy"} <= result.metrics.keys()
    assert name != "opd_survey" or {"teacher_nll_2", "teacher_nll_8"} <= result.metrics.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method.samples": 3}, "greedy answers are all the same"),
        ({"method.best": True, "method.decoding": "sample"}, "needs several samples and a score"),
        ({"method.decoding": "beam"}, "decoding"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path, pair, options, message):
    with pytest.raises(RecipeError, match=message):
        run_of(tmp_path / "run", "seq_kd", **pair, **options).execute()


def test_a_teacher_that_says_nothing_teaches_nothing(tmp_path, pair, monkeypatch):
    monkeypatch.setattr(
        "potstill.methods.language.seq_kd.written", lambda run, model, prompts, *a, **k: [[[]]] * len(prompts)
    )
    with pytest.raises(DataError, match="wrote nothing but empty answers"):
        run_of(tmp_path / "run", "seq_kd", **pair).execute()


# ---- the survey's identities


def rows(seed: int, count: int = 3) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [log_probs(2 * torch.randn(5, 7, generator=draw, dtype=torch.float64)) for _ in range(count)]


def test_the_kl_constrained_view_is_a_reverse_kl_to_a_product_of_experts():
    log_p, log_ref, log_q = rows(0)
    for alpha in (0.5, 1.0, 1.5):
        objective = (log_q.exp() * (alpha * (log_p - log_ref) - (log_q - log_ref))).sum(-1)  # Eq. 14 at a state
        best = log_probs((1 - alpha) * log_ref + alpha * log_p)
        normaliser = ((1 - alpha) * log_ref + alpha * log_p).logsumexp(-1)
        assert_close(objective, normaliser - ReverseKL()(teacher_logp=best, student_logp=log_q))
    assert_close((log_q.exp() * (log_p - log_q)).sum(-1), -ReverseKL()(teacher_logp=log_p, student_logp=log_q))


def test_the_surveys_jensen_shannon_is_twice_ours():
    log_p, log_q, _ = rows(1)
    r = (log_p - log_q).exp()
    f = r * r.log() - (r + 1) * ((r + 1) / 2).log()
    assert_close((log_q.exp() * f).sum(-1), 2 * JensenShannon(0.5)(teacher_logp=log_p, student_logp=log_q))


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon(0.5), Alpha(0.3)])
def test_every_divergence_is_an_expectation_under_the_student(divergence):
    log_p, log_q, _ = rows(2)
    by_samples = (log_q.exp() * divergence.f(log_p - log_q)).sum(-1)
    assert_close(by_samples, divergence(teacher_logp=log_p, student_logp=log_q))


def test_swapping_arguments_is_the_perspective_of_the_generator():
    log_p, log_q, _ = rows(3)
    perspective = lambda u: u.exp() * ForwardKL().f(-u)  # r f(1 / r)
    swapped = (log_q.exp() * perspective(log_p - log_q)).sum(-1)
    assert_close(swapped, ForwardKL()(teacher_logp=log_q, student_logp=log_p))
    assert_close(swapped, ReverseKL()(teacher_logp=log_p, student_logp=log_q))


TOKENIZER = character_tokenizer(["abcdefg "])


def model(seed: int) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM.PACKAGED["llama-tiny"](tokenizer=TOKENIZER).double()


def test_beyond_the_teacher_the_target_is_the_normalised_product():
    student, teacher = model(0), LocalTeacher(model(1))
    beyond = Panel([FrozenStart(student), teacher], (1 - 1.5, 1.5), "product")
    objective = TokenDistillation(
        student, beyond, ReverseKL(), optimizer=OptimizerSpec(), seed=0, rollouts=RolloutSpec(max_new_tokens=4)
    )
    ids = torch.tensor([[4, 5, 6]])
    out = objective.collect(PromptBatch(torch.arange(1), ids, torch.ones_like(ids, dtype=torch.bool)), 0)
    log_q, log_p = (m.counted_logits(out).log_softmax(-1) for m in (student, teacher.model))
    target = (-0.5 * log_q + 1.5 * log_p).log_softmax(-1).detach()
    assert_close(objective.loss("student", out, 0).value(), (log_q.exp() * (log_q - target)).sum(-1).mean())


def test_the_estimators_are_named_by_one_option():
    assert OPDSurvey(divergence=ForwardKL()).part() == Exact(ForwardKL())
    assert OPDSurvey(estimator="sampled").part().on_policy


# ---- the survey's taxonomies and rule


def test_every_built_language_method_has_its_tags():
    built = {row.name for row in systems().values() if row.family == "language" and row.built}
    assert built <= TAGS.keys()


@pytest.mark.parametrize(
    ("situation", "kind"),
    [
        ({"capacity_ratio": 20, "multi_step": False}, "off-policy"),
        ({"capacity_ratio": 20, "multi_step": True}, "on-policy"),
        ({"capacity_ratio": 4, "multi_step": False, "plateaued": True, "reward_rises": True}, "on-policy"),
        ({"capacity_ratio": 4, "multi_step": False, "plateaued": True}, "hybrid"),
        ({"capacity_ratio": 4, "multi_step": False}, "hybrid"),
    ],
)
def test_the_decision_rule(situation, kind):
    assert recommend(**situation)[0] == kind


def test_a_ratio_of_nothing_is_refused():
    with pytest.raises(RecipeError, match="capacity_ratio must be positive"):
        recommend(capacity_ratio=0, multi_step=False)
