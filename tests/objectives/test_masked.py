"""The bound and the trajectory policy gradient on a tabular masked model that can be enumerated."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, ModernBertConfig, ModernBertForMaskedLM

from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import DataError, ModelError
from potstill.contracts.players import OptimizerSpec
from potstill.evaluation.masked import evaluate_masked_model
from potstill.models.masked import MaskedLM, mlm_tiny
from potstill.models.tokenizers import character_tokenizer
from potstill.noise.masked import LogLinear, UniformTime, subs_log_probs
from potstill.objectives.masked import (
    MaskedDiffusion,
    TokenDiscriminator,
    clipped_mean,
    predictor,
    trajectory,
    trajectory_logp,
)

WORDS, MASK, L = 3, 3, 2


class Tabular(nn.Module):
    """A masked model with logits of its own for every state of two positions: three words and the mask."""

    mask_id, vocabulary, name, device = MASK, WORDS + 1, "tabular", torch.device("cpu")

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn((WORDS + 1) ** L, L, WORDS + 1, generator=generator, dtype=torch.float64)
        self.table = nn.Parameter(table)

    def logits(self, tokens_BL, attention_BL=None):
        return self.table[tokens_BL[:, 0] * (WORDS + 1) + tokens_BL[:, 1]]

    def log_probs(self, tokens_BL, attention_BL=None):
        return subs_log_probs(self.logits(tokens_BL), tokens_BL, MASK)


def rows(text, count: int) -> TokenBatch:
    tokens = torch.tensor([text]).expand(count, -1).contiguous()
    return TokenBatch(
        torch.arange(count),
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        torch.zeros_like(tokens, dtype=torch.bool),
    )


def exact_bound(model: Tabular, text: tuple[int, int], low: float = 0.0) -> float:
    """With alpha = 1 - t: integral over t in (low, 1) of 1/t sum over masked sets S of t^|S| (1-t)^(2-|S|) nll_S."""
    nll = lambda state, i: -model.log_probs(torch.tensor([state]))[0, i, text[i]].item()
    one = (1 - low) ** 2 / 2 * (nll((MASK, text[1]), 0) + nll((text[0], MASK), 1))
    both = (1 - low**2) / 2 * (nll((MASK, MASK), 0) + nll((MASK, MASK), 1))
    return one + both


@pytest.mark.parametrize("low", [0.0, 0.5])
def test_the_loss_is_the_bound_in_closed_form(low):
    """Half of the times alone, at twice their density, gives that half of the integral: 1 / pi(t) is applied."""
    model, text = Tabular(0), (2, 0)
    objective = MaskedDiffusion(
        model, optimizer=OptimizerSpec(), seed=0, schedule=LogLinear(0.0), times=UniformTime(low, 1.0)
    )
    loss = objective.loss("student", rows(text, 40000), 0)
    assert loss.terms["bound"].count == 2 * 40000  # per token
    assert 2 * loss.value().item() == pytest.approx(exact_bound(model, text, low), rel=0.02)


def test_the_bound_bounds_the_likelihood_and_its_gradient_reaches_masked_states_only():
    model, text = Tabular(1), (1, 1)
    objective = MaskedDiffusion(model, optimizer=OptimizerSpec(), seed=0)
    objective.loss("student", rows(text, 2000), 0).value().backward()
    moved = model.table.grad.abs().sum(-1) > 0
    visible = torch.tensor(list(itertools.product(range(WORDS + 1), repeat=2))) != MASK
    assert not moved[visible].any()
    assert moved[-1].all()  # both masked


def test_prompts_stay_visible_and_padding_does_not_count():
    model = Tabular(2)
    batch = rows((1, 2), 500)
    batch.counted_BT[:, 1] = True
    loss = MaskedDiffusion(model, optimizer=OptimizerSpec(), seed=0, learnt="counted").loss("student", batch, 0)
    loss.value().backward()
    moved = model.table.grad.abs().sum(-1) > 0
    assert moved.nonzero().tolist() == [[1 * (WORDS + 1) + MASK, 1]]  # the state (1, mask), its second position
    assert loss.terms["bound"].count == 500
    batch.attention_BT[:, 0] = False
    assert (
        MaskedDiffusion(model, optimizer=OptimizerSpec(), seed=0).loss("student", batch, 0).terms["bound"].count == 500
    )


class Same:
    """A dataset of one text."""

    def __init__(self, text, count):
        self.text, self.count = text, count

    def __len__(self):
        return self.count

    def batch(self, chosen, epoch=0):
        batch = rows(self.text, len(chosen))
        batch.ids_B = chosen
        return batch


def test_evaluation_is_the_bound_whatever_the_batches():
    model, text = Tabular(3), (0, 2)
    numbers = evaluate_masked_model(model, Same(text, 20000), batch=7000, times=4, schedule=LogLinear(0.0))
    assert 2 * numbers["nll_bound"] == pytest.approx(exact_bound(model, text), rel=0.02)
    assert numbers["perplexity_bound"] == pytest.approx(math.exp(numbers["nll_bound"]))
    again = evaluate_masked_model(model, Same(text, 20000), batch=900, times=4, schedule=LogLinear(0.0))
    assert again["nll_bound"] == pytest.approx(numbers["nll_bound"], rel=1e-9)
    with pytest.raises(DataError, match="no text to evaluate"):
        evaluate_masked_model(model, Same(text, 0), batch=1)


# ---------------------------------------------------------------- trajectories

ALPHAS = torch.tensor([0.0, 0.4, 0.9], dtype=torch.float64)
STATES = list(itertools.product(range(WORDS + 1), repeat=2))


def all_trajectories():
    both = torch.tensor([(middle, last) for middle in STATES for last in STATES])
    start = torch.full((len(both), 1, L), MASK)
    return torch.cat([start, both], 1).transpose(0, 1), ALPHAS[:, None].expand(-1, len(both))


def test_trajectory_probabilities_sum_to_one_and_their_scores_to_zero():
    model = Tabular(4)
    states, alphas = all_trajectories()
    logp, predictions = trajectory_logp(predictor(model.log_probs), states, alphas, MASK)
    possible = logp > -math.inf
    p = logp.exp()
    assert len(predictions) == 2
    assert p.sum().item() == pytest.approx(1.0)
    (score,) = torch.autograd.grad((p.detach() * logp)[possible].sum(), model.table)
    assert_close(score, torch.zeros_like(score), atol=1e-12, rtol=0)


def test_drawn_trajectories_follow_their_log_probability():
    model, count = Tabular(5), 20000
    start, alphas = torch.full((count, L), MASK), ALPHAS[:, None].expand(-1, count)
    drawn = trajectory(predictor(model.log_probs), start, alphas, MASK, 0, torch.arange(count))
    states, alphas = all_trajectories()
    exact = trajectory_logp(predictor(model.log_probs), states, alphas, MASK)[0].exp().detach()
    code = lambda s: ((s[1, :, 0] * 4 + s[1, :, 1]) * 4 + s[2, :, 0]) * 4 + s[2, :, 1]
    frequency = torch.bincount(code(drawn), minlength=256) / count
    assert_close(frequency.double()[code(states)], exact, rtol=0, atol=0.012)


def test_equal_rows_are_asked_once():
    asked = []
    model = Tabular(6)
    predict = predictor(lambda tokens, attention: asked.append(len(tokens)) or model.log_probs(tokens))
    masks, mixed = torch.full((5, L), MASK), torch.tensor([[MASK, 0], [MASK, MASK]])
    assert_close(predict(masks), model.log_probs(masks))
    assert_close(predict(mixed), model.log_probs(mixed))
    assert asked == [1, 2]
    attention = torch.tensor([[True, True], [True, False]])
    predict = predictor(lambda tokens, attention: asked.append(len(tokens)) or model.log_probs(tokens), attention)
    predict(masks[:2])
    assert asked[-1] == 2


# ---------------------------------------------------------------- the discriminator

TEXT = "abcdefgh "
COMMON = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def build(kind):
    torch.manual_seed(0)
    tokenizer, spare = character_tokenizer(TEXT), {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "bert":
        return mlm_tiny(tokenizer=tokenizer, layers=3)
    size = len(tokenizer)
    if kind == "modernbert":
        config = ModernBertConfig(vocab_size=size, **COMMON, **spare, cls_token_id=1, sep_token_id=2)
        return MaskedLM(ModernBertForMaskedLM(config), tokenizer)
    return MaskedLM(LlamaForCausalLM(LlamaConfig(vocab_size=size, num_key_value_heads=1, **COMMON, **spare)), tokenizer)


@pytest.mark.parametrize(("kind", "norm"), [("bert", None), ("modernbert", "final_norm"), ("llama", "norm")])
def test_the_discriminator_trains_its_last_blocks_and_the_final_norm(kind, norm):
    model = build(kind)
    discriminator = TokenDiscriminator(model, blocks=2)
    trained = {n for n, p in discriminator.trunk.network.base_model.named_parameters() if p.requires_grad}
    numbers = {int(part) for n in trained for part in n.split(".") if part.isdigit() and f"layers.{part}." in n}
    numbers |= {int(n.split("layer.")[1].split(".")[0]) for n in trained if "layer." in n}
    assert numbers == {1, 2}
    assert not any("embed" in n for n in trained)
    assert any(n.startswith(f"{norm}.") for n in trained) == (norm is not None)
    tokens = torch.tensor([[5, 6, model.mask_id, 8]])
    logits = discriminator(tokens)
    assert logits.shape == (1, 4)
    assert_close(discriminator(tokens, embedded_BLD=discriminator.trunk.embeddings(tokens)), logits)
    assert all(p.requires_grad for p in model.parameters())  # the teacher's own weights are not touched
    with pytest.raises(ModelError, match="has 3 blocks: 1 to 3"):
        TokenDiscriminator(model, blocks=4)


def test_spectral_norms_move_by_refresh_alone():
    discriminator = TokenDiscriminator(build("bert"), blocks=1)
    tokens = torch.tensor([[5, 6, 7, 8]])
    state = {k: v.clone() for k, v in discriminator.state_dict().items()}
    discriminator.train()
    first, second = discriminator(tokens), discriminator(tokens)
    assert torch.equal(first, second)
    assert all(torch.equal(v, state[k]) for k, v in discriminator.state_dict().items())
    with torch.no_grad():
        for p in discriminator.head.parameters():
            p += 1.0
    discriminator.refresh()
    moved = {k for k, v in discriminator.state_dict().items() if not torch.equal(v, state[k]) and k.endswith("_u")}
    assert moved
    for _ in range(50):
        discriminator.refresh()
    assert torch.linalg.matrix_norm(discriminator.head.layers[0].weight, 2).item() == pytest.approx(1.0, abs=1e-3)


def test_clipped_mean_by_hand():
    logits = torch.tensor([[1.0, 20.0, -3.0], [-20.0, 5.0, 5.0], [1.0, 2.0, 3.0]])
    where = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert clipped_mean(logits, where, 8.0).tolist() == [4.5, -8.0, 0.0]


def test_generate_is_keyed_by_sample():
    model = build("bert").eval()
    texts = model.generate(count=3, seed=1, length=8)
    assert model.generate(count=2, seed=1, length=8) == texts[:2]
    assert model.generate(count=3, seed=2, length=8) != texts
    assert not (model.samples(torch.arange(3), seed=1, length=8, steps=2) == model.mask_id).any()
    with pytest.raises(ModelError, match="1 to 64 tokens, not 65"):
        model.generate(length=65)
