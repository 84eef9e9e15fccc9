"""TSD-KD: each term where the paper has it, neutral settings that are GKD, the code's slips by name, real architectures."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import Gemma2Config, LlamaConfig, Qwen3Config

from potstill import recipe as recipes
from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import ModelError, RecipeError, SignalError
from potstill.contracts.players import OptimizerSpec
from potstill.contracts.signals import FullLogits, TopKLogp
from potstill.divergences import ForwardKL, JensenShannon
from potstill.methods.language.tsd_kd import TSDKD, BatchOpener
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.token_terms import EntropyTerm, RankingTerm
from potstill.objectives.tokens import RolloutSpec, TokenDistillation
from potstill.run import Run, open_folder
from potstill.teachers import LocalTeacher
from potstill.weighting import EntropyTop, Opener, Positions, RelativeConfidence, SampledShare, Uniform

TOKENIZER = character_tokenizer(["abcdefg "])


def lm(seed, scale=1.0):
    torch.manual_seed(seed)
    made = CausalLM.PACKAGED["llama-tiny"](tokenizer=TOKENIZER).double()
    with torch.no_grad():
        made.network.get_output_embeddings().weight.mul_(scale)
    return made


def batch():
    """Rows of 10, 6 and 1 counted tokens."""
    tokens = torch.randint(4, TOKENIZER.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    attention = torch.arange(12)[None] < torch.tensor([12, 8, 3])[:, None]
    return TokenBatch(torch.arange(3), tokens, attention, attention & (torch.arange(12) >= 2))


def objective(config: TSDKD, student=None, teacher=None) -> TokenDistillation:
    """What the method builds of a config."""
    return TokenDistillation(
        student or lm(0, 20.0), LocalTeacher(teacher or lm(1, 20.0)), config.divergence, optimizer=OptimizerSpec(), seed=0,
        weighting=RelativeConfidence(config.tau) if config.gate else Uniform(), distillation=config.direct,
        average=config.average, extras=config.terms(),
    )  # fmt: skip


def by_hand(made, rows):
    """(log p, log q) a row, with the student's graph."""
    z, v = made.student.counted_logits(rows), made.teacher.model.counted_logits(rows).detach()
    lengths = rows.counted_BT.sum(1).tolist()
    return v.log_softmax(-1).split(lengths), z.log_softmax(-1).split(lengths)


def H(logp):
    return -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_the_papers_whole_loss(average):
    """alpha L_ind + L_dir + L_EM, written out position by position."""
    config = TSDKD(k=3, opener=0.3, uncertain=0.25, tau=0.7, ranking=0.2, average=average)
    made, rows = objective(config), batch()
    direct, ranking, least = [], [], []
    for log_p, log_q in zip(*by_hand(made, rows), strict=True):
        h, L = H(log_q).detach(), len(log_q)
        g = torch.sigmoid((h - H(log_p)) / 0.7)
        log_m = (0.9 * log_p.exp() + 0.1 * log_q.exp()).log()
        jsd = 0.9 * (log_p.exp() * (log_p - log_m)).sum(-1) + 0.1 * (log_q.exp() * (log_q - log_m)).sum(-1)
        direct.append(g * jsd)
        m = next(m for m in range(1, L + 1) if h[:m].sum() >= 0.3 * h.sum() - 1e-12)
        for t in range(m):
            candidates = log_q[t].detach().topk(3).indices
            pi = candidates[log_p[t][candidates].argsort(descending=True)]
            z = log_q[t][pi]
            ranking.append(-sum(z[j] - z[j:].logsumexp(0) for j in range(3)))
        least.append(H(log_q)[h.topk(max(1, L // 4)).indices])
    assert 3 < len(ranking) < 17
    mean = torch.cat(direct).mean() if average == "token" else torch.stack([d.mean() for d in direct]).mean()
    expected = 0.2 * torch.stack(ranking).mean() + mean + torch.cat(least).mean()
    value = made.loss("student", rows, 0).value()
    assert_close(value, expected, rtol=1e-6, atol=1e-7)
    parameters = list(made.student.parameters())
    for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (value, expected)), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)  # the network rounds its norms to float32
    assert all(p.grad is None for p in made.teacher.model.parameters())


def test_without_gate_ranking_and_entropy_it_is_gkd():
    rows = batch()
    made = objective(TSDKD(gate=False, ranking=0, entropy=0))
    gkd = TokenDistillation(
        lm(0, 20.0), LocalTeacher(lm(1, 20.0)), JensenShannon(0.9), optimizer=OptimizerSpec(), seed=0
    )
    a, b = made.loss("student", rows, 0).value(), gkd.loss("student", rows, 0).value()
    assert torch.equal(a, b)
    pairs = zip(*(torch.autograd.grad(x, list(o.student.parameters())) for x, o in ((a, made), (b, gkd))), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_equal_entropies_gate_half():
    """A teacher that is the student with its words shuffled is as sure everywhere, and says something else."""
    rows = batch()
    teacher = lm(0, 20.0)
    with torch.no_grad():
        head = teacher.network.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.flip(0).clone())  # untied, so that the embeddings stay
    half, whole = (objective(TSDKD(gate=gate, ranking=0, entropy=0), teacher=teacher) for gate in (True, False))
    a, b = half.loss("student", rows, 0).value(), whole.loss("student", rows, 0).value()
    assert b > 1e-3
    assert_close(a, b / 2)


def test_each_term_is_switched_alone():
    rows = batch()
    names = lambda **o: set(objective(TSDKD(**o)).loss("student", rows, 0).terms)
    assert names() == {"divergence", "ranking", "entropy"}
    assert names(ranking=0) == {"divergence", "entropy"}
    assert names(entropy=0) == {"divergence", "ranking"}
    off = objective(TSDKD(direct=0, entropy=0)).loss("student", rows, 0)
    assert off.value() == off.terms["ranking"].mean()


def test_the_parts_of_a_config():
    assert TSDKD().terms() == (RankingTerm(0.1, Opener(0.1), 10), EntropyTerm(1.0, EntropyTop(0.1)))
    assert TSDKD().divergence == JensenShannon(0.9) and TSDKD().rollouts.max_new_tokens == 128
    code = TSDKD(variant="code", k=5, opener=0.2).terms()
    assert code == (RankingTerm(0.1, BatchOpener(0.2), 5, "code"), EntropyTerm(1.0, EntropyTop(0.9, scope="batch")))
    drawn = TSDKD(random=True, uncertain=0.3).terms()
    assert drawn == (RankingTerm(0.1, SampledShare(0.1, alpha=0.0)), EntropyTerm(1.0, SampledShare(0.3, alpha=0.0)))
    assert objective(TSDKD()).couples == "position" and objective(TSDKD(variant="code")).couples == "batch"


def test_the_codes_uncertain_tokens_are_those_above_the_tenth_percentile():
    entropies = torch.rand(4, 25, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, 25, dtype=torch.bool)
    kept = TSDKD(variant="code").terms()[1].selection(Positions(mask, student_entropy_BR=entropies)).bool()
    assert kept.sum() == 90
    assert torch.equal(kept, entropies >= entropies.flatten().quantile(0.1))
    paper = TSDKD().terms()[1].selection(Positions(mask, student_entropy_BR=entropies)).bool()
    assert paper.sum(1).tolist() == [2, 2, 2, 2]


def test_the_codes_opener_is_one_place_for_all_rows():
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    h = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 1.0, 4.0, 99.0]])  # in all 20, along the rows 1 3 6 10 15 16 20
    kept = lambda share: BatchOpener(share)(Positions(mask, student_entropy_BR=h)).sum(1).tolist()
    assert kept(0.15) == [1, 1]  # 3 is reached at place 1, which stays out
    assert kept(0.16) == [2, 2]
    assert kept(0.05) == [0, 0]  # reached at once: nothing is ranked
    assert kept(0.9) == [4, 3]
    assert kept(1.0) == [4, 3]
    assert Opener(0.15)(Positions(mask, student_entropy_BR=h)).sum(1).tolist() == [2, 1]


def test_an_empty_opener_of_the_code_teaches_nothing():
    rows = batch()
    made = objective(TSDKD(variant="code", opener=1e-6, direct=0, entropy=0))
    loss = made.loss("student", rows, 0)
    assert loss.terms["ranking"].count == 0
    assert not any(
        g.any()
        for g in torch.autograd.grad(loss.value(), list(made.student.parameters()), allow_unused=True)
        if g is not None
    )


def test_a_teacher_that_gives_its_top_k_alone_cannot_rank():
    class Few(LocalTeacher):
        def __init__(self, model):
            super().__init__(model)
            self.gives = frozenset({TopKLogp})

        def score(self, rows, need):
            logp = LocalTeacher(self.model).score(rows, FullLogits).logits.log_softmax(-1).topk(3)
            return TopKLogp(logp.values, logp.indices)

    made = TokenDistillation(lm(0), Few(lm(1)), ForwardKL(), optimizer=OptimizerSpec(), seed=0, extras=TSDKD().terms())
    with pytest.raises(SignalError, match="needs the teacher's whole logits, and it gives TopKLogp"):
        made.loss("student", batch(), 0)


# ---------------------------------------------------------------- the method


def recipe_of(student, teacher, data=None):
    return {
        "method": {"name": "tsd_kd", "rollouts": {"max_new_tokens": 6}, "k": 4},
        "student": str(student),
        "teacher": str(teacher),
        "data": data
        or {"task": "arithmetic", "size": 20, "test_size": 6, "terms": 2, "length": 40, "prompt_length": 12},
        "train": {"steps": 2, "batch": 4, "lr": 1e-3, "trackers": [], "device": "cpu"},
        "eval": {"limit": 4, "batch": 4},
    }


def run_of(folder, raw, **overrides):
    plan = recipes.resolve(recipes.apply(raw, overrides))
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, Gemma2Config])
def test_real_architectures(config, tmp_path, tiny_lm):
    raw = recipe_of(tiny_lm(3, config), tiny_lm(4, config, hidden_size=48))
    changed = {"method.warm_start": 1} if config is LlamaConfig else {"method.variant": "code"}
    found = run_of(tmp_path / "run", raw, **changed).execute().metrics
    assert -1 <= found["kendall_tau"] <= 1 and found["sample_entropy"] > 0
    assert 0 <= found["sampled_accuracy"] <= found["pass_at_4"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == (
        {"warm start", "distil"} if "method.warm_start" in changed else {"distil"}
    )
    assert any(key.endswith("ranking") for key in lines[-1]) and any(key.endswith("entropy") for key in lines[-1])


def test_a_student_that_is_its_teacher_agrees_with_it_on_every_pair(tmp_path, tiny_lm):
    from potstill.methods.language.tsd_kd import own_samples

    model = tiny_lm(3)
    run = run_of(tmp_path / "run", recipe_of(model, model))
    found = own_samples(run, run.student(), run.teacher(), run.config)
    assert found["kendall_tau"] == pytest.approx(1.0)
    shuffled = run_of(tmp_path / "other", recipe_of(model, tiny_lm(4)))
    other = own_samples(shuffled, shuffled.student(), shuffled.teacher(), shuffled.config)
    assert abs(other["kendall_tau"]) < 0.5
    assert other["sample_entropy"] == pytest.approx(found["sample_entropy"])


def test_options_reach_the_objective(tmp_path, tiny_lm, monkeypatch):
    model = tiny_lm(1)
    run = run_of(tmp_path / "run", recipe_of(model, model), **{
        "method.on_policy": 0.25, "method.direct": 0.5, "method.tau": 2.0, "method.average": "sequence", "method.k": 2,
    })  # fmt: skip

    class Enough(Exception):
        pass

    def stop(objective, dataset, **_):
        raise Enough(objective)

    monkeypatch.setattr(run, "fit", stop)
    with pytest.raises(Enough) as found:
        run.execute()
    made = found.value.args[0]
    assert (made.on_policy, made.distillation, made.average) == (0.25, 0.5, "sequence")
    assert made.weighting == RelativeConfidence(2.0)
    assert made.rollouts == RolloutSpec(max_new_tokens=6)
    assert made.extras[0].k == 2


def test_what_cannot_work_is_refused(tmp_path, tiny_lm):
    student = tiny_lm(1)
    raw = recipe_of(student, student)
    with pytest.raises(RecipeError, match=r"method\.direct, method\.ranking and method\.entropy are all 0"):
        run_of(tmp_path / "a", raw, **{"method.direct": 0, "method.ranking": 0, "method.entropy": 0}).execute()
    with pytest.raises(RecipeError, match=r"method\.opener"):
        run_of(tmp_path / "b", raw, **{"method.opener": 0})
    with pytest.raises(RecipeError, match="'paper' or 'code'"):
        run_of(tmp_path / "c", raw, **{"method.variant": "codes"})
    with pytest.raises(RecipeError, match="couples the samples of a batch"):
        run_of(tmp_path / "d", raw, **{"method.variant": "code", "train.micro_batch": 2}).execute()
    with pytest.raises(ModelError, match="different vocabularies"):
        run_of(
            tmp_path / "e", recipe_of(student, tiny_lm(2, tokenizer=character_tokenizer("abc 0123456789+=")))
        ).execute()
