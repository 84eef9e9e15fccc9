"""MAD-OPD: its divergences are what the paper proves of them, its neutral settings the baselines, and real models run."""

import json
import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3Config

from potstill import recipe as recipes
from potstill.contracts.batch import PromptBatch
from potstill.contracts.errors import DataError, RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.divergences import Exact, JensenShannon, ReverseKL, TopK, log_probs
from potstill.methods.language.mad_opd import MADOPD, UnrepeatedPanel, repeated_share, written
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.panels import PanelDistillation
from potstill.objectives.tokens import RolloutSpec
from potstill.run import Run, open_folder
from potstill.teachers import LocalTeacher, PrivilegedTeacher
from potstill.teachers.debate import Debate, DebatePrompts, transcript_context

# ---------------------------------------------------------------- the paper's lemmas (Remark 1)


def gradient(divergence, log_p: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    z = logits.clone().requires_grad_()
    return torch.autograd.grad(divergence(teacher_logp=log_p, student_logp=log_probs(z)).sum(), z)[0]


def test_jensen_shannon_is_bounded_and_so_is_its_gradient():
    """Lemma 1, whatever the supports: log 2, and an infinity norm of at most 2 (a search finds 0.155 at most)."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 10.0, 100.0, 1000.0):
        p, z = (scale * torch.randn(500, 6, generator=generator, dtype=torch.float64) for _ in range(2))
        value = JensenShannon(0.5)(teacher_logp=log_probs(p), student_logp=log_probs(z))
        assert value.max() <= math.log(2) + 1e-12
        steep = gradient(JensenShannon(0.5), log_probs(p), z)
        assert steep.isfinite().all() and steep.abs().max() < 0.16
    apart = JensenShannon(0.5)(
        teacher_logp=torch.tensor([[1.0, 0.0]]).log(), student_logp=torch.tensor([[0.0, 1.0]]).log()
    )
    assert_close(apart, torch.tensor([math.log(2)]))


def test_the_reverse_kl_gradient_is_unbounded():
    """Proposition 1: q_i (log(q_i / p_i) - KL(q || p)), which grows as p_i tends to 0."""
    z = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    q, sizes = z.softmax(-1), []
    for tiny in (1e-3, 1e-6, 1e-12, 1e-24):
        log_p = torch.tensor([tiny, 0.5, 0.5 - tiny], dtype=torch.float64).log()
        kl = (q * (q.log() - log_p)).sum()
        found = gradient(ReverseKL(), log_p, z)
        assert_close(found, q * (q.log() - log_p - kl))
        sizes.append(found.abs().max())
    assert all(b > 1.7 * a for a, b in pairwise(sizes))


@pytest.mark.parametrize("start", [0, 1])
def test_the_reverse_kl_settles_on_the_mode_where_it_starts(start):
    """Proposition 2: on a mixture of teachers with disjoint supports it ends on one mode j, at -log a_j.

    It is so on a student that keeps to one mode; gradient descent on free logits leaves the smaller one only slowly.
    """
    shares, modes = torch.tensor([0.3, 0.7], dtype=torch.float64), [[0.6, 0.4, 0.0, 0.0], [0.0, 0.0, 0.9, 0.1]]
    p = (shares[:, None] * torch.tensor(modes, dtype=torch.float64)).sum(0)
    z = torch.full((4,), -40.0, dtype=torch.float64)
    z[2 * start : 2 * start + 2] = 0.0
    for _ in range(2000):
        z = z - 0.5 * gradient(ReverseKL(), p.log(), z)
    value = ReverseKL()(teacher_logp=p.log(), student_logp=log_probs(z))
    assert value.item() == pytest.approx(-math.log(shares[start].item()), abs=1e-6)
    assert_close(z.softmax(-1), torch.tensor(modes[start], dtype=torch.float64), rtol=0, atol=1e-6)


def test_the_task_says_which_divergence():
    assert MADOPD().estimator() == Exact(JensenShannon(0.5))
    assert MADOPD(task="code").estimator() == Exact(ReverseKL())
    assert MADOPD(task="code", divergence={"name": "JensenShannon", "teacher_share": 0.2}).estimator() == Exact(
        JensenShannon(0.2)
    )
    topk = {"name": "TopK", "k": 5, "tail": "renormalize"}
    assert MADOPD(support=topk).estimator() == Exact(JensenShannon(0.5), TopK(5, tail="renormalize"))


# ---------------------------------------------------------------- the objective

TOKENIZER = character_tokenizer(["abcdefg 0123456789|"])
WORDS = DebatePrompts(
    first="{prompt}", later="{transcript}{prompt}", last="", scored="{transcript}{prompt}", reply="{text}|"
)


def model(seed: int, spread: float = 1.0) -> CausalLM:
    torch.manual_seed(seed)
    made = CausalLM.PACKAGED["llama-tiny"](tokenizer=TOKENIZER, width=16, heads=2).double()
    for parameter in made.parameters():
        parameter.data.mul_(spread if parameter.dim() > 1 else 1.0)
    return made


TEACHERS = [LocalTeacher(model(seed, 6.0)) for seed in (1, 2)]


def prompts() -> PromptBatch:
    encoded = [TOKENIZER(text).input_ids for text in ("abc", "fed")]
    tokens = torch.tensor(encoded)
    rows = [{"prompt": "abc"}, {"prompt": "fed"}]
    return PromptBatch(torch.tensor([0, 1]), tokens, tokens >= 0, extra={"rows": rows})


def debated(say, kind=PanelDistillation, teachers=TEACHERS, **options):
    """An objective whose teachers see a debate in which speaker k says say(k)."""
    speak = lambda k: lambda texts, ids_B, seed: [say(k)] * len(texts)
    seeing = [PrivilegedTeacher(t, transcript_context(WORDS, k, TOKENIZER, 200)) for k, t in enumerate(teachers)]
    debate = Debate([speak(k) for k in range(len(teachers))], prompts=WORDS)
    return kind(model(0), seeing, JensenShannon(0.5), weights="weights", debate=debate, **shared() | options)


def shared() -> dict:
    rollouts = RolloutSpec(max_new_tokens=4)
    return {"optimizer": OptimizerSpec(), "seed": 0, "rollouts": rollouts, "average": "sequence"}


def value_of(objective):
    objective.student.zero_grad()
    loss = objective.loss("student", objective.collect(prompts(), 0), 0).value()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in objective.student.parameters()])


def test_a_debate_in_which_nobody_speaks_is_mt_opd():
    silent, plain = debated(lambda k: ""), PanelDistillation(model(0), TEACHERS, JensenShannon(0.5), **shared())
    assert_close(value_of(silent), value_of(plain))
    one = debated(lambda k: "", teachers=TEACHERS[:1])
    assert_close(value_of(one), value_of(PanelDistillation(model(0), TEACHERS[:1], JensenShannon(0.5), **shared())))


def test_equal_confidences_weigh_as_mt_opd_does_and_others_move_the_loss_to_the_surer():
    """Loss of the debate = sum_k w_k of what each teacher alone, seeing the same transcript, would cost."""
    same = lambda k: "a confidence 40"
    equal = debated(same)
    fixed = debated(same)
    fixed.weights = [0.5, 0.5]
    assert_close(value_of(equal), value_of(fixed))
    told = debated(lambda k: f"a confidence {(100, 0)[k]}")
    w = torch.tensor([1.0, 0.0], dtype=torch.float64).softmax(0)
    parts = []
    for k in range(2):
        one = debated(lambda k: f"a confidence {(100, 0)[k]}")
        one.weights = [float(j == k) for j in range(2)]
        parts.append(value_of(one))
    assert_close(value_of(told)[0], w[0] * parts[0][0] + w[1] * parts[1][0])
    assert_close(value_of(told)[1], w[0] * parts[0][1] + w[1] * parts[1][1], rtol=1e-5, atol=1e-8)
    assert (parts[0][0] - parts[1][0]).abs() > 1e-3
    assert (value_of(equal)[0] - value_of(debated(lambda k: ""))[0]).abs() > 1e-4, "the transcript is seen"


def test_repetition_is_the_share_of_word_trigrams_seen_before():
    assert repeated_share("a b c d e") == 0 == repeated_share("a b") == repeated_share("")
    assert repeated_share("a a a a") == 0.5, "two trigrams, one of them different"
    assert repeated_share("a b a b a b") == 0.5, "aba bab aba bab"


def test_answers_that_repeat_themselves_do_not_count():
    panel = UnrepeatedPanel(model(0), TEACHERS, JensenShannon(0.5), **shared())
    whole = panel.collect(prompts(), 0)
    panel.student.tokenizer = TOKENIZER
    real = TOKENIZER.batch_decode
    said = iter([["a a a a a a", "a b c d"]])
    try:
        TOKENIZER.batch_decode = lambda *args, **options: next(said)
        panel.repetition = 0.6
        kept = panel.collect(prompts(), 0)
    finally:
        TOKENIZER.batch_decode = real
    assert not kept.counted_BT[0].any() and torch.equal(kept.counted_BT[1], whole.counted_BT[1])
    both, one = (panel.loss("student", batch, 0).terms["divergence"] for batch in (whole, kept))
    assert (both.count, one.count) == (2, 1), "the mean is over the answers that count"
    assert 0 < one.total < both.total


# ---------------------------------------------------------------- the method


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"{i} plus {i}?", "completion": f"it is {2 * i}."} for i in range(30)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def plan_of(data, student, teachers, /, **overrides):
    few = {"max_new_tokens": 5, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    raw = {
        "method": {"name": "mad_opd", "rollouts": few, "replies": few, "context": 600},
        "student": student if isinstance(student, dict) else str(student),
        "teachers": [str(t) for t in teachers],
        "data": {"jsonl": str(data), "length": 40, "prompt_length": 20},
        "train": {"steps": 2, "batch": 2, "lr": 1e-3, "trackers": [], "device": "cpu"},
        "eval": {"limit": 4, "batch": 4},
    }
    return recipes.resolve(recipes.apply(raw, overrides))


def run(folder, *args, **overrides):
    plan = plan_of(*args, **overrides)
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder).execute()


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, Gemma3TextConfig])
def test_real_architectures_debate(config, tmp_path, data, tiny_lm):
    """With the default words, which are long, and an adapted student."""
    student, teachers = tiny_lm(1, config), [tiny_lm(2, config, hidden_size=48), tiny_lm(3, config)]
    lora = {"name": str(student), "lora": {"r": 2, "alpha": 4}}
    result = run(tmp_path / "run", data, lora, teachers)
    assert result.metrics["rollout_reverse_kl"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(0 < line["student/divergence"] <= math.log(2) for line in lines)


@pytest.mark.parametrize("variant", ["mt_opd", "opd", "mt_seqkd"])
def test_baselines_run_and_change_the_student(variant, tmp_path, data, tiny_lm):
    teachers = [tiny_lm(2), tiny_lm(3)]
    result = run(tmp_path / "run", data, tiny_lm(1), teachers, **{"method.variant": variant, "method.warm_start": 1})
    assert result.metrics["rollout_reverse_kl"] != result.metrics["before_rollout_reverse_kl"]


def test_one_of_the_teachers_alone_is_the_panel_of_that_one(tmp_path, data, tiny_lm):
    student, teachers = tiny_lm(1), [tiny_lm(2), tiny_lm(3)]
    found = [
        run(tmp_path / name, data, student, given, **{"method.variant": variant, "method.teacher": teacher}).student
        for name, given, variant, teacher in (
            ("second", teachers, "opd", 1), ("alone", teachers[1:], "mt_opd", 0), ("first", teachers, "opd", 0),
        )
    ]  # fmt: skip
    second, alone, first = (torch.cat([p.flatten() for p in net.parameters()]) for net in found)
    assert torch.equal(second, alone) and not torch.equal(first, second)


def test_what_the_teachers_write(tmp_path, data, tiny_lm):
    plan = plan_of(data, tiny_lm(1), [tiny_lm(2), tiny_lm(3)], **{"method.shares": [3, 1]})
    job = Run(plan, tmp_path)
    first, second = (LocalTeacher(m) for m in job.models("teachers"))
    rows = written(job, [first, second], job.config)["rows"]
    asked, n = job.prompts(), len(job.prompts())
    assert len(rows) == n and rows == written(job, [first, second], job.config)["rows"]
    told = {tuple(t for t, c in zip(tokens, counted, strict=True) if not c) for tokens, counted in rows}
    assert told == {tuple(prompt) for prompt, _, _ in asked.rows}, "each prompt once"
    assert all(0 < sum(counted) <= 5 and counted == sorted(counted) for _, counted in rows)
    alone = [written(job, [t], job.config.model_copy(update={"shares": [1.0]}))["rows"] for t in (first, second)]
    by = [sum(row in some for row in rows) for some in alone]
    assert by[0] + by[1] == n and by[0] > by[1] > 0, "three quarters of the prompts are the first one's"
    three = written(job, [first, second, first], job.config.model_copy(update={"shares": [1, 2, 1]}))["rows"]
    assert 0.25 < sum(row in alone[1] for row in three) / n < 0.75, "half of them are the second one's"


def test_what_the_settings_make(tmp_path, data, tiny_lm, monkeypatch):
    class Made(Exception):
        pass

    def fit(self, objective, dataset, **options):
        raise Made(objective)

    monkeypatch.setattr(Run, "fit", fit)
    models = tiny_lm(1), [tiny_lm(2), tiny_lm(3)]

    def objective(**settings):
        plan = plan_of(data, *models, **{f"method.{name}": value for name, value in settings.items()})
        with pytest.raises(Made) as made:
            Run(plan, tmp_path).execute()
        return made.value.args[0]

    whole = objective(tau=0.5, repetition=0.3, rounds=3)
    assert whole.average == "sequence" and whole.repetition == 0.3 and whole.weights == "weights"
    assert (whole.debate.rounds, whole.debate.temperature, len(whole.debate.speakers)) == (3, 0.5, 2)
    assert all(isinstance(teacher, PrivilegedTeacher) for teacher in whole.teachers)
    fixed = objective(confidence=False, weights=[0.2, 0.8])
    assert fixed.weights == [0.2, 0.8] and fixed.debate.temperature is None
    plain = objective(variant="mt_opd", weights=[0.2, 0.8])
    assert plain.weights == [0.2, 0.8] and plain.debate is None
    assert not any(isinstance(teacher, PrivilegedTeacher) for teacher in plain.teachers)
    copied = objective(variant="mt_seqkd")
    assert copied.teacher is None and copied.cross_entropy == 1.0 and copied.average == "sequence"


def test_what_cannot_work_is_refused(tmp_path, data, tiny_lm):
    student, teachers = tiny_lm(1), [tiny_lm(2), tiny_lm(3)]
    with pytest.raises(RecipeError, match="'mad_opd', 'mt_opd', 'opd' or 'mt_seqkd'"):
        plan_of(data, student, teachers, **{"method.variant": "debate"})
    with pytest.raises(RecipeError, match="teachers of mad_opd takes a list of models"):
        plan_of(data, student, teachers, teachers=str(teachers[0]))
    with pytest.raises(RecipeError, match=r"method\.prompts\.later: only \{prompt\}, \{transcript\}, \{name\}"):
        plan_of(data, student, teachers, **{"method.prompts": {"later": "{promt}"}})
    refused = {
        r"method\.weights must have one number a teacher": {"method.weights": [1.0]},
        r"method\.shares must have one number a teacher": {"method.variant": "mt_seqkd", "method.shares": [1, 1, 1]},
        r"method\.teacher 2 is none of the 2 teachers": {"method.variant": "opd", "method.teacher": 2},
        "1 names for 2 speakers": {"method.prompts": {"names": ["a"]}},
    }
    for i, (message, overrides) in enumerate(refused.items()):
        with pytest.raises(RecipeError, match=message):
            run(tmp_path / str(i), data, student, teachers, **overrides)
    text = tmp_path / "text.txt"
    text.write_text("Plain text that nobody asks about.\n" * 9)
    with pytest.raises(DataError, match="about prompts, and this data is plain text"):
        run(tmp_path / "text", data, student, teachers, data={"text": str(text), "length": 16, "prompt_length": 8})
    with pytest.raises(RecipeError, match="has lessons for 2 teachers, and the recipe has 1"):
        job = plan_of(data, student, teachers, data={"task": "debate", "size": 10}, teachers=[{"name": "llama-tiny"}])
        Run(job, tmp_path / "lessons").execute()
