import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from scipy import stats
from tests.rollouts.test_local import EOS, model_of
from torch import nn
from torch.testing import assert_close

from potstill.contracts import keyed
from potstill.contracts.batch import PromptBatch
from potstill.contracts.errors import DataError, ModelError, RecipeError
from potstill.rollouts.local import completions_of, sample
from potstill.rollouts.speculative import Lenience, Speculation, speculative_generate, speculative_step

KINDS = ["f_lin", "f_sq", "f_exp"]


def laws(seed: int, *shape: int, spread: float = 2.0, zeros: bool = False) -> torch.Tensor:
    p = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(spread).softmax(-1)
    if zeros:
        p = torch.where(p < p.median(-1, keepdim=True).values / 2, 0.0, p)
    return p / p.sum(-1, keepdim=True)


class Table(nn.Module):
    """A model whose next-token law depends on the last token alone: no network, so that thousands of runs are cheap."""

    name, stop_ids, device = "table", (), torch.device("cpu")

    def __init__(self, law_VV: torch.Tensor) -> None:
        super().__init__()
        self.law_VV, self.vocabulary = law_VV, len(law_VV)
        self.tokenizer = SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(len(law_VV))})

    def hidden(self, tokens, attention=None, cache=None):
        return tokens

    def head(self, hidden):
        return self.law_VV.log()[hidden]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_accept_or_resample_is_the_target(kind, zeros):
    p, q = laws(0, 20, 9, zeros=zeros), laws(1, 20, 9, zeros=zeros)
    lossless = Lenience(kind, e=1.0)
    assert_close(lossless.law(p, q), p, rtol=0, atol=1e-15)
    drafted = (q * lossless.accept(p, q)).sum(-1)
    assert_close(drafted, 1 - (p - q).abs().sum(-1) / 2, rtol=0, atol=1e-15)
    assert_close(lossless.law(p, p), p, rtol=0, atol=1e-15)
    assert lossless.after_rejection(p, p).isfinite().all()


@pytest.mark.parametrize("residual", ["f", "p", "sample_p"])
@pytest.mark.parametrize("kind", KINDS)
def test_lenient_laws(kind, residual):
    p, q = laws(0, 50, 9, zeros=True), laws(1, 50, 9, zeros=True)
    strict, acceptance, distance = Lenience(), [], []
    for e in (1.0, 0.8, 0.5):
        lenient = Lenience(kind, e, residual)
        assert (lenient.f(p) >= p).all()
        by_hand = torch.minimum(lenient.f(p), q)
        by_hand = by_hand + (1 - by_hand.sum(-1, keepdim=True)) * lenient.after_rejection(p, q)
        assert_close(lenient.law(p, q), by_hand)
        assert_close(by_hand.sum(-1), torch.ones(50, dtype=torch.float64))
        assert (by_hand >= 0).all()
        rejected = q * (1 - lenient.accept(p, q))
        assert_close(rejected.sum(-1) + torch.minimum(lenient.f(p), q).sum(-1), torch.ones(50, dtype=torch.float64))
        acceptance.append((q * lenient.accept(p, q)).sum(-1).mean().item())
        distance.append((lenient.law(p, q) - p).abs().sum(-1).mean().item())
    assert acceptance == sorted(acceptance)
    assert acceptance[2] > acceptance[0] + 0.05
    if residual != "sample_p":
        assert_close(Lenience(kind, 1.0, residual).law(p, q), strict.law(p, q))
        assert distance == sorted(distance)


def test_lenience_by_hand():
    """p = (.2, .8), q = (.6, .4), e = 1/2."""
    p, q = torch.tensor([0.2, 0.8]), torch.tensor([0.6, 0.4])
    assert_close(Lenience().accept(p, q), torch.tensor([1 / 3, 1.0]))
    assert_close(Lenience("f_lin", 0.5).accept(p, q), torch.tensor([2 / 3, 1.0]))
    assert_close(Lenience("f_sq", 0.5).accept(p, q), torch.tensor([1.0, 1.0]))
    assert_close(Lenience("f_exp", 0.5).accept(p, q), torch.tensor([0.2**0.5 / 0.6, 1.0]))
    third = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.2, 0.7, 0.1])
    assert_close(Lenience("f_lin", 0.5, "f").after_rejection(*third), torch.tensor([0.8, 0.0, 0.4]) / 1.2)
    assert_close(Lenience("f_lin", 0.5, "p").after_rejection(*third), torch.tensor([0.3, 0.0, 0.15]) / 0.45)
    assert_close(Lenience("f_lin", 0.5, "sample_p").after_rejection(*third), third[0])
    leviathan = (third[0] - 0.5 * third[1]).clamp_min(0)  # norm(max(0, p - e q))
    assert_close(Lenience("f_lin", 0.5).after_rejection(*third), leviathan / leviathan.sum())


@pytest.mark.parametrize("options", [{"e": 0.0}, {"e": 1.5}, {"kind": "f_log"}, {"residual": "q"}], ids=str)
def test_lenience_refuses(options):
    with pytest.raises(RecipeError, match="Lenience"):
        Lenience(**options)


def test_a_block_follows_its_law():
    """Blocks of two: where they end and what follows, against P(k accepted) times the law after it (chi-square)."""
    p, q, n = laws(2, 3, 4), laws(3, 2, 4), 6000
    runs = torch.arange(n)
    drafted = (q.log() + keyed.gumbel(1, runs[:, None, None], torch.arange(2)[:, None], torch.arange(4))).argmax(-1)
    uniform = keyed.uniform(2, runs[:, None], torch.arange(2))
    noise = keyed.gumbel(3, runs[:, None, None], torch.arange(3)[:, None], torch.arange(4))
    seen = torch.zeros(3, 4)
    for i in range(n):
        seen[speculative_step(p, q, drafted[i], uniform[i], noise[i])] += 1
    rule, alpha = Lenience(), torch.minimum(p[:2], q).sum(-1)
    expected = torch.stack(
        [
            (1 - alpha[0]) * rule.after_rejection(p[0], q[0]),
            alpha[0] * (1 - alpha[1]) * rule.after_rejection(p[1], q[1]),
            alpha[0] * alpha[1] * p[2],
        ]
    )
    assert (seen[expected == 0] == 0).all()
    cells = expected * n >= 5
    assert stats.chisquare(seen[cells], expected[cells] * n, sum_check=False).pvalue > 1e-3
    assert cells.sum() > 6


@pytest.mark.parametrize("gamma", [1, 3])
def test_output_is_distributed_as_the_target_alone(gamma):
    """Every text of three tokens, whatever the draft: chi-square against p's own law."""
    p, q, n = laws(4, 3, 3, spread=1.0), laws(5, 3, 3, spread=1.0), 1000
    target, draft = Table(p), Table(q)
    runs = [
        tuple(speculative_generate(target, draft, [0], gamma=gamma, max_new_tokens=3, sample_id=i, cached=False).tokens)
        for i in range(n)
    ]
    law = {(a, b, c): (p[0, a] * p[a, b] * p[b, c]).item() for a, b, c in itertools.product(range(3), repeat=3)}
    big = [text for text in law if law[text] * n >= 5]
    observed, expected = [runs.count(text) for text in big], [law[text] * n for text in big]
    assert stats.chisquare([*observed, n - sum(observed)], [*expected, n - sum(expected)]).pvalue > 1e-3
    assert len(big) > 8


def test_the_token_after_a_rejection_is_drawn_afresh():
    """Noise shared with the rejected draw would bend the residual law: here word 1 just lost to word 0."""
    p, q, n = torch.tensor([0.0, 0.6, 0.4]).double(), torch.tensor([0.62, 0.379, 0.001]).double(), 800
    target, draft = Table(p.expand(3, 3)), Table(q.expand(3, 3))
    options = {"gamma": 1, "max_new_tokens": 2, "cached": False}
    firsts = [speculative_generate(target, draft, [0], sample_id=i, **options).tokens[0] for i in range(n)]
    assert 0 not in firsts
    assert stats.binomtest(firsts.count(1), n, 0.6).pvalue > 1e-3


def test_lenient_output_follows_its_law():
    p, q, n, lenient = laws(4, 4, 4), laws(6, 4, 4), 800, Lenience("f_exp", 0.4)
    target, draft = Table(p), Table(q)
    options = {"gamma": 1, "max_new_tokens": 2, "lenience": lenient, "cached": False}
    firsts = [speculative_generate(target, draft, [0], sample_id=i, **options).tokens[0] for i in range(n)]
    law = lenient.law(p[0], q[0])
    assert (law - p[0]).abs().sum() > 0.2  # far from lossless
    observed = torch.bincount(torch.tensor(firsts), minlength=4)
    assert stats.chisquare(observed, law * n, sum_check=False).pvalue > 1e-3


def near(model, spread: float = 0.05, seed: int = 9):
    """A draft that often, not always, agrees."""
    draft, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return draft


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_caches_change_nothing(family, gamma, greedy):
    """With sliding windows too: what a rejection drops must leave no trace."""
    target = model_of(family)
    draft = near(target)
    options = {"gamma": gamma, "max_new_tokens": 24, "greedy": greedy, "seed": 3, "stop_ids": ()}
    cached = speculative_generate(target, draft, [2, 3, 4], **options)
    assert cached == speculative_generate(target, draft, [2, 3, 4], cached=False, **options)
    assert len(cached.tokens) == 24
    assert 0 < sum(cached.accepted) < sum(cached.drafted)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_greedy_output_is_the_targets_own(family):
    target = model_of(family)
    draft = near(target)
    one = PromptBatch(torch.tensor([0]), torch.tensor([[2, 3, 4]]), torch.ones(1, 3, dtype=torch.bool))
    plain = completions_of(sample(target, one, max_new_tokens=20, greedy=True))[0]
    assert speculative_generate(target, draft, [2, 3, 4], gamma=3, max_new_tokens=20, greedy=True).tokens == plain


@pytest.mark.parametrize("greedy", [True, False])
def test_a_perfect_draft_is_always_accepted(greedy):
    target = model_of()
    run = speculative_generate(target, target, [2], gamma=3, max_new_tokens=20, greedy=greedy, stop_ids=(), seed=5)
    assert run.accepted == run.drafted == [3] * 5
    assert (run.block_efficiency, run.draft_calls, run.tests) == (4.0, 15, 15)


def test_stops_at_the_stop_token_and_at_the_length():
    target = model_of(seed=2)
    draft, lengths = near(target), []
    for i in range(30):
        options = {"gamma": 3, "max_new_tokens": 7, "sample_id": i}
        run = speculative_generate(target, draft, [2], **options)
        endless = speculative_generate(target, draft, [2], stop_ids=(), **options).tokens
        assert EOS not in run.tokens[:-1]
        assert len(run.tokens) == 7 or run.tokens[-1] == EOS
        assert len(endless) == 7
        cut = endless.index(EOS) + 1 if EOS in endless else 7
        assert run.tokens == endless[:cut]  # keyed noise: stopping does not change what came before
        lengths.append(len(run.tokens))
    assert 7 in lengths
    assert min(lengths) < 7


def test_counts():
    run = Speculation(tokens=[1] * 7, accepted=[2, 0, 1], drafted=[2, 3, 3], draft_calls=8)
    assert (run.target_calls, run.tests) == (3, 2 + 1 + 2)
    assert run.block_efficiency == pytest.approx(7 / 3)


def test_modes_are_restored_and_bad_input_is_refused():
    target, draft = model_of().train(), model_of()
    speculative_generate(target, draft, [2], gamma=2, max_new_tokens=3)
    assert target.training
    with pytest.raises(DataError, match="a prompt of at least one token"):
        speculative_generate(target, draft, [], max_new_tokens=3)
    with pytest.raises(ModelError, match=r"different tokenizers \(11 and 13 tokens\)"):
        speculative_generate(target, model_of(vocabulary=13), [2], max_new_tokens=3)


def test_heads_of_different_widths_share_their_words():
    target, draft = model_of(), model_of(seed=1)
    draft.network.resize_token_embeddings(16)
    assert draft.vocabulary == 16
    with torch.no_grad():
        draft.network.get_output_embeddings().weight[11:] += 5.0  # a draft that would love padding words
    run = speculative_generate(target, draft, [2], gamma=3, max_new_tokens=20, stop_ids=())
    assert max(run.tokens) < 11
