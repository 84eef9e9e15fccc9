"""SinKD: the loss of both kinds of model written out, neutral settings that are other methods, and real architectures."""

import json

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import Gemma2Config, LlamaConfig, Qwen3Config

from potstill import recipe as recipes
from potstill.contracts.batch import ImageBatch, TokenBatch
from potstill.contracts.errors import ModelError, RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.divergences import ForwardKL, JensenShannon
from potstill.dry_run import describe
from potstill.methods.language.sinkd import Classifiers, LanguageModels, SinKD, SinkhornKD, temperature_at
from potstill.models.causal import CausalLM
from potstill.models.tokenizers import character_tokenizer
from potstill.objectives.logits import KD, LogitDistillation
from potstill.objectives.token_terms import RowTransport, SinkhornTerm
from potstill.objectives.tokens import TokenDistillation
from potstill.run import Run, open_folder
from potstill.teachers import LocalTeacher

TEXT = "A pot still boils the wash, and what rises is lighter than what stays. Then it drips, clear and strong."
IMAGES = {
    "data": {"task": "digits", "size": 120, "test_size": 40},
    "student": {"name": "mlp", "options": {"width": 8, "depth": 1}},
    "teacher": {"name": "mlp", "options": {"width": 16, "depth": 1}},
    "train": {"steps": 2, "batch": 16, "trackers": [], "device": "cpu"},
}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sinkhorn_distance(z, v, tau=2.0, epsilon=0.1, iterations=20):
    """The paper's algorithm as it stands there."""
    s, t = (z / tau).softmax(-1), (v / tau).softmax(-1)
    D = (s[:, None] - t[None]).abs().sum(-1)
    K = (-D / epsilon).exp()
    for _ in range(iterations):
        K = K / K.sum(1, keepdim=True)
        K = K / K.sum(0, keepdim=True)
    return (K * D).sum()


# ---------------------------------------------------------------- classifiers


class Table(torch.nn.Module):
    """A classifier of a table: the logits of a batch are its rows."""

    kind, name = "image_classifier", "table"

    def __init__(self, table):
        super().__init__()
        self.table = torch.nn.Parameter(table.clone())

    def forward(self, images):
        return self.table[images[:, 0, 0, 0].long()]


def classified(z, v, loss, anneal=0, step=0, cls=Classifiers, **weights):
    """(value, gradient in the student's logits) of a batch of all rows, with labels 0, 1, ..."""
    student = Table(z)
    more = {"anneal": anneal} if cls is Classifiers else {}
    made = cls(student, LocalTeacher(Table(v)), loss, optimizer=OptimizerSpec(), **weights, **more)
    rows = torch.arange(len(z))
    value = made.loss("student", ImageBatch(rows, rows[:, None, None, None].double(), rows % z.shape[1]), step).value()
    return value, torch.autograd.grad(value, student.table)[0]


def test_the_papers_whole_loss_of_classifiers():
    """(1 - alpha) CE + alpha soft-label CE (less the teacher's entropy) + beta c SD, the last a sum over the batch."""
    z, v = normal(6, 5, seed=0), normal(6, 5, seed=1)
    weights = {"cross_entropy": 0.2, "distillation": 1.0}
    value, gradient = classified(z, v, SinkhornKD(0.8, 3.0, sinkhorn=0.8 * 0.05), **weights)
    free = z.clone().requires_grad_()
    t = (v / 3).softmax(-1)
    soft = -(t * (free / 3).log_softmax(-1)).sum(-1).mean()
    ce = F.cross_entropy(free, torch.arange(6) % 5)
    expected = 0.2 * ce + 0.8 * soft + 0.8 * 0.05 * sinkhorn_distance(free, v)
    entropy = -(t * t.log()).sum(-1).mean()
    assert_close(value, expected - 0.8 * entropy, rtol=0, atol=1e-6)
    assert_close(gradient, torch.autograd.grad(expected, free)[0], rtol=0, atol=1e-6)


def test_without_transport_it_is_kd_without_the_square():
    z, v = normal(6, 5, seed=0), normal(6, 5, seed=1)
    weights = {"cross_entropy": 0.1, "distillation": 1.0}
    plain = classified(z, v, SinkhornKD(1.0, 4.0, sinkhorn=0.0), **weights)
    for mine, theirs in zip(
        plain, classified(z, v, KD(4.0, temperature_squared=False), cls=LogitDistillation, **weights)
    ):
        assert torch.equal(mine, theirs)
    assert SinkhornKD(sinkhorn=0.0).couples == "position" and SinkhornKD().couples == "batch"


def test_problems_of_a_size_count_as_their_mean():
    z, v = normal(6, 5, seed=0), normal(6, 5, seed=1)
    loss = SinkhornKD(0.0, sinkhorn=0.3, transport=RowTransport(size=3))
    value, _ = classified(z, v, loss, cross_entropy=0.0, distillation=1.0)
    odd, even = slice(0, None, 2), slice(1, None, 2)
    assert_close(value, 0.3 / 2 * (sinkhorn_distance(z[odd], v[odd]) + sinkhorn_distance(z[even], v[even])),
                 rtol=0, atol=1e-6)  # fmt: skip


def test_the_temperature_of_the_kl_falls_to_one_and_that_of_the_transport_stays():
    assert [temperature_at(s, 4.0, 4) for s in range(5)] == [4.0, 3.0, 2.0, 1.0, 1.0]
    assert temperature_at(7, 4.0, 0) == 4.0 and temperature_at(0, 4.0, 1) == 4.0
    z, v = normal(6, 5, seed=0), normal(6, 5, seed=1)
    weights = {"cross_entropy": 0.0, "distillation": 1.0}
    for step, temperature in ((0, 4.0), (2, 2.0), (3, 1.0)):
        annealed, _ = classified(z, v, SinkhornKD(1.0, 4.0), anneal=4, step=step, **weights)
        assert_close(annealed, classified(z, v, SinkhornKD(1.0, temperature), **weights)[0])


# ---------------------------------------------------------------- language models

TOKENIZER = character_tokenizer(["abcdefg "])


def lm(seed):
    torch.manual_seed(seed)
    return CausalLM.PACKAGED["llama-tiny"](tokenizer=TOKENIZER).double()


def batch():
    """Rows of several lengths, padded on the right, whose first two tokens do not count."""
    tokens = torch.randint(4, TOKENIZER.vocab_size, (3, 7), generator=torch.Generator().manual_seed(0))
    attention = torch.arange(7)[None] < torch.tensor([7, 5, 3])[:, None]
    return TokenBatch(torch.arange(3), tokens, attention, attention & (torch.arange(7) >= 2))


def of_tokens(anneal=0, divergence=ForwardKL(), cls=LanguageModels, **options):
    more = {"anneal": anneal} if cls is LanguageModels else {}
    return cls(lm(0), LocalTeacher(lm(1)), divergence, optimizer=OptimizerSpec(), seed=0, **options, **more)


def test_the_papers_whole_loss_of_language_models():
    """CE + 0.1 KL at T = 1 a token + 0.0008 SD over the counted positions, flattened; padding is no row."""
    rows = batch()
    made = of_tokens(distillation=0.1, cross_entropy=1.0, extras=(SinkhornTerm(0.0008),))
    z, v = made.student.counted_logits(rows), made.teacher.model.counted_logits(rows)
    assert len(z) == 9
    log_q, log_p = z.log_softmax(-1), v.log_softmax(-1)
    ce = F.cross_entropy(z, rows.tokens_counted)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    expected = ce + 0.1 * kl + 0.0008 * sinkhorn_distance(z, v)
    value = made.loss("student", rows, 0).value()
    assert_close(value.double(), expected, rtol=0, atol=1e-6)
    mine, theirs = (torch.autograd.grad(x, list(made.student.parameters())) for x in (value, expected))
    for a, b in zip(mine, theirs, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_without_transport_it_is_token_distillation():
    options = {"distillation": 0.1, "cross_entropy": 1.0, "temperature": 2.0}
    a, b = (
        of_tokens(cls=cls, **options).loss("student", batch(), 3).value() for cls in (LanguageModels, TokenDistillation)
    )
    assert torch.equal(a, b)


def test_the_temperature_falls_at_tokens_too():
    annealed = of_tokens(anneal=4, temperature=4.0, extras=(SinkhornTerm(0.1),))
    for step, temperature in ((0, 4.0), (2, 2.0), (3, 1.0)):
        plain = of_tokens(temperature=temperature, extras=(SinkhornTerm(0.1),))
        assert_close(annealed.loss("student", batch(), step).value(), plain.loss("student", batch(), 0).value())


# ---------------------------------------------------------------- the method


@pytest.fixture
def lines(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(f"{TEXT} {i}" for i in range(40)))
    return file


def text_recipe(lines, student, teacher):
    return {
        "method": {"name": "sinkd"},
        "student": str(student),
        "teacher": str(teacher),
        "data": {"text": str(lines), "length": 16, "prompt_length": 6},
        "train": {"steps": 2, "batch": 4, "lr": 1e-3, "trackers": [], "device": "cpu"},
        "eval": {"limit": 4, "batch": 4},
    }


def run_of(folder, raw, **overrides):
    plan = recipes.resolve(recipes.apply({"method": {"name": "sinkd"}, **raw}, overrides))
    open_folder(folder, recipes.write(plan))
    return Run(plan, folder)


def objective_of(run, monkeypatch):
    """The objective that the method hands to the trainer."""

    class Enough(Exception):
        pass

    def stop(objective, dataset, **_):
        raise Enough(objective, dataset)

    monkeypatch.setattr(run, "fit", stop)
    with pytest.raises(Enough) as found:
        run.plan.method.run(run, run.config)
    return found.value.args


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POTSTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.needs("sklearn")
@pytest.mark.parametrize(
    "options, loss, cross_entropy, anneal",
    [
        ({}, SinkhornKD(0.9, 2.0), 0.1, 0),
        ({"kl": 1.0, "temperature": 4.0, "anneal": True}, SinkhornKD(1.0, 4.0), 0.0, 2),
        ({"cross_entropy": 1.0, "kl": 0.0, "sinkhorn": 0.01}, SinkhornKD(0.0, 2.0, sinkhorn=0.01), 1.0, 0),
        ({"divergence": "JensenShannon"}, SinkhornKD(0.9, 2.0, JensenShannon()), 0.1, 0),
    ],
)
def test_defaults_of_classifiers(cache, tmp_path, monkeypatch, options, loss, cross_entropy, anneal):
    run = run_of(tmp_path / "run", IMAGES, **{f"method.{k}": v for k, v in ({"rows": 50} | options).items()})
    objective, rows = objective_of(run, monkeypatch)
    assert objective.logit_loss == loss
    assert objective.cross_entropy == pytest.approx(cross_entropy)
    assert (objective.distillation, objective.anneal, len(rows)) == (1.0, anneal, 50)


def test_defaults_of_language_models_and_options(tmp_path, lines, tiny_lm, monkeypatch):
    raw = text_recipe(lines, tiny_lm(1), tiny_lm(2))
    objective, _ = objective_of(run_of(tmp_path / "a", raw), monkeypatch)
    assert objective.extras == (SinkhornTerm(0.0008, RowTransport(2.0)),)
    assert (objective.distillation, objective.cross_entropy, objective.temperature) == (0.1, 1.0, 1.0)
    assert (objective.anneal, objective.couples) == (0, "batch")
    config = SinKD(sinkhorn_temperature=3, epsilon=0.2, iterations=5, norm=2, marginals="uniform", gradient="detached",
                   over="classes", size=7)  # fmt: skip
    made = config.transport()
    assert (made.temperature, made.over, made.size) == (3, "classes", 7)
    s = made.sinkhorn
    assert (s.epsilon, s.iterations, s.norm, s.marginals, s.gradient) == (0.2, 5, 2, "uniform", "detached")
    changed = {"method.of": "sequences", "method.anneal": True, "method.sinkhorn": 0.5, "method.temperature": 3.0}
    objective, _ = objective_of(run_of(tmp_path / "b", raw, **changed), monkeypatch)
    assert objective.extras == (SinkhornTerm(0.5, RowTransport(2.0), of="sequences"),)
    assert (objective.anneal, objective.temperature) == (2, 3.0)
    objective, _ = objective_of(run_of(tmp_path / "c", raw, **{"method.sinkhorn": 0}), monkeypatch)
    assert objective.extras == () and objective.couples == "position"


@pytest.mark.needs("sklearn")
def test_a_dry_run_builds_what_the_data_asks_for(cache, lines, tiny_lm, capsys):
    """Classifiers for images, language models for text; sizes are those of the networks."""
    plan = recipes.resolve({"method": {"name": "sinkd"}, **IMAGES})
    found = describe(plan)
    assert found["parameters"] == {"student": 64 * 8 + 8 + 8 * 10 + 10, "teacher": 64 * 16 + 16 + 16 * 10 + 10}
    assert found["seconds"] > 0 and capsys.readouterr().out.count("image_classifier") == 2
    small = CausalLM.from_pretrained(tiny_lm(1))
    found = describe(recipes.resolve(text_recipe(lines, tiny_lm(1), tiny_lm(2))))
    assert found["parameters"]["student"] == sum(p.numel() for p in small.parameters())
    assert capsys.readouterr().out.count("causal_lm") == 2


@pytest.mark.needs("sklearn")
def test_images_end_to_end(cache, tmp_path):
    run = run_of(tmp_path / "run", IMAGES)
    result = run.execute()
    assert result.student.kind == "image_classifier"
    assert 0 <= result.metrics["accuracy"] <= 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["student_kind"] == "image_classifier"


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config, Gemma2Config])
def test_real_architectures(config, tmp_path, lines, tiny_lm):
    raw = text_recipe(lines, tiny_lm(3, config), tiny_lm(4, config, hidden_size=48))
    result = run_of(
        tmp_path / "run", raw, **{"method.size": 16, "method.anneal": True, "method.temperature": 2}
    ).execute()
    assert result.metrics["forward_kl"] > 0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert any(key.endswith("sinkhorn") for key in first)


@pytest.mark.needs("sklearn")
def test_what_cannot_work_is_refused(cache, tmp_path, lines, tiny_lm):
    student = tiny_lm(1)
    raw = text_recipe(lines, student, student)
    nothing = {"method.cross_entropy": 0, "method.kl": 0, "method.sinkhorn": 0}
    with pytest.raises(RecipeError, match=r"method\.cross_entropy, method\.kl and method\.sinkhorn are all 0"):
        run_of(tmp_path / "a", raw, **nothing).execute()
    with pytest.raises(RecipeError, match=r"method\.rows belongs to images, and text:.* gives text"):
        run_of(tmp_path / "b", raw, **{"method.rows": 5}).execute()
    with pytest.raises(RecipeError, match=r"method\.of: sequences belongs to text, and digits gives images"):
        run_of(tmp_path / "c", IMAGES, **{"method.of": "sequences"}).execute()
    with pytest.raises(RecipeError, match="couples the samples of a batch"):
        run_of(tmp_path / "d", raw, **{"train.micro_batch": 2}).execute()
    with pytest.raises(RecipeError, match="couples the samples of a batch"):
        run_of(tmp_path / "e", IMAGES, **{"train.micro_batch": 8}).execute()
    with pytest.raises(RecipeError, match="'ones' or 'uniform'"):
        run_of(tmp_path / "f", raw, **{"method.marginals": "one"})
    with pytest.raises(ModelError, match="different vocabularies"):
        other = text_recipe(lines, student, tiny_lm(2, tokenizer=character_tokenizer("abc ")))
        run_of(tmp_path / "g", other).execute()
