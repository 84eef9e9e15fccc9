"""DiDi-Instruct on a tabular student that can be enumerated, and on real architectures."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from potstill import recipe as recipes
from potstill.contracts.batch import TokenBatch
from potstill.contracts.errors import DataError, ModelError, RecipeError
from potstill.contracts.players import OptimizerSpec
from potstill.methods.masked_diffusion.didi_instruct import DiDi, DiDiInstruct, Duel, Guidance, RewardGuided
from potstill.models.masked import MaskedLM, mlm_tiny
from potstill.models.tokenizers import character_tokenizer
from potstill.noise.masked import BetaTime, LogLinear, UniformTime, ancestral, subs_log_probs
from potstill.objectives.masked import TokenDiscriminator
from potstill.run import Run, open_folder
from potstill.training.spec import TrainSpec
from potstill.training.trainer import Trainer

WORDS, MASK, L = 3, 3, 2
STATES = torch.tensor(list(itertools.product(range(WORDS + 1), repeat=L)))  # z
TEXTS = STATES[(STATES != MASK).all(1)]  # x
CERTAIN = LogLinear(rest=0.0)


class Tabular(nn.Module):
    mask_id, vocabulary, name = MASK, WORDS + 1, "tabular"

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn((WORDS + 1) ** L, L, WORDS + 1, generator=generator, dtype=torch.float64)
        self.table = nn.Parameter(table)

    def logits(self, tokens_BL, attention_BL=None):
        return self.table[tokens_BL[:, 0] * (WORDS + 1) + tokens_BL[:, 1]]

    def log_probs(self, tokens_BL, attention_BL=None):
        return subs_log_probs(self.logits(tokens_BL), tokens_BL, MASK)


class Lookup(nn.Module):
    """A discriminator with logits of its own for every state and position."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros((WORDS + 1) ** L, L, dtype=torch.float64))

    def forward(self, tokens_BL, attention_BL=None):
        return self.table[tokens_BL[:, 0] * (WORDS + 1) + tokens_BL[:, 1]]

    def refresh(self):
        pass


def didi(cls=DiDi, seed=0, discriminator=None, **options) -> DiDi:
    config = DiDiInstruct(**{"schedule": CERTAIN, "entropy_beta": 0.0, "kl_beta": 0.0, "ema": None, **options})
    discriminator = discriminator or Lookup()
    return cls(Tabular(seed), Tabular(seed + 100), discriminator, config, optimizer=OptimizerSpec(), seed=0)


def texts(count: int, tokens=(0, 1)) -> TokenBatch:
    rows = torch.tensor([tokens]).expand(count, -1).contiguous()
    yes = torch.ones_like(rows, dtype=torch.bool)
    return TokenBatch(torch.arange(count), rows, yes, yes)


def duel(states_SBL, alphas, time, fake_BL, real_BL) -> Duel:
    count = states_SBL.shape[1]
    alphas_SB = torch.tensor(alphas, dtype=torch.float64)[:, None].expand(-1, count)
    time_B = torch.full((count,), time, dtype=torch.float64)
    yes = torch.ones_like(fake_BL, dtype=torch.bool)
    return Duel(torch.arange(count), states_SBL, alphas_SB, time_B, fake_BL, real_BL, yes)


def corruption(x, z, alpha) -> float:
    """q(z | x)."""
    p = 1.0
    for a, b in zip(x.tolist(), z.tolist()):
        p *= (1 - alpha) if b == MASK else alpha * (a == b)
    return p


# ---------------------------------------------------------------- the gradient identity


class Exact(DiDi):
    """The exact reward -R(z_t) of each row, times the row's probability."""

    def advantages(self, duel):
        return self.reward_B, self.probability_B * self.reward_B


@pytest.mark.parametrize("weight", ["constant", "simplified", "complete"])
def test_the_policy_gradient_is_that_of_the_kl_of_the_corrupted_marginals(weight):
    t, times = 0.3, BetaTime(2.0, 2.0)
    objective = didi(Exact, jumps=1, last_time=0.0, weight=weight, times=times)
    mask_L = torch.full((1, L), MASK)
    log_nu = objective.student.log_probs(mask_L)[0]
    log_theta = Tabular(7).log_probs(mask_L)[0].detach()
    of = lambda table, x: table[0, x[0]] + table[1, x[1]]
    q = torch.tensor([[corruption(x, z, 1 - t) for z in STATES] for x in TEXTS], dtype=torch.float64)  # [X, Z]
    p_nu, p_theta = (torch.stack([of(table, x) for x in TEXTS]).exp() for table in (log_nu, log_theta))
    q_nu, q_theta = p_nu @ q, p_theta @ q
    kl = (q_nu * (q_nu / q_theta).log()).sum()
    (expected,) = torch.autograd.grad(kl, objective.student.table, retain_graph=True)

    pairs = [(i, j) for i in range(len(TEXTS)) for j in range(len(STATES)) if q[i, j] > 0]
    i, j = torch.tensor(pairs).T
    objective.probability_B = (p_nu[i] * q[i, j]).detach()
    objective.reward_B = -(q_nu / q_theta).log()[j].detach()
    states = torch.stack([mask_L.expand(len(i), -1), TEXTS[i]])
    loss = objective.loss("student", duel(states, [0.0, 1.0], t, STATES[j], TEXTS[i]), 0)
    (got,) = torch.autograd.grad(loss.terms["policy"].total, objective.student.table)
    omega, pi = 1 / t, 6 * t * (1 - t)
    assert_close(got, expected * {"constant": 1.0, "simplified": omega, "complete": omega / pi}[weight])
    assert got.abs().max() > 1e-3
    assert loss.terms["policy"].count == len(i)


def test_omega_is_clamped_before_the_density_divides():
    objective = didi(times=BetaTime(2.0, 2.0))
    t = torch.tensor([0.02, 0.5], dtype=torch.float64)
    assert_close(objective.weights(t), torch.tensor([10.0, 2.0]).double() / (6 * t * (1 - t)))


# ---------------------------------------------------------------- the discriminator and the reward


@pytest.mark.parametrize("smooth", [0.0, 0.1])
def test_the_discriminators_optimum_is_the_log_ratio_of_real_to_fake(smooth):
    """Counts of states stand for probabilities; at the analytical optimum the gradient vanishes, elsewhere it does not."""
    objective = didi(label_smoothing=smooth)
    z = torch.tensor([[MASK, 0], [MASK, 1], [MASK, 2]])
    real, fake = torch.tensor([1, 5, 2]), torch.tensor([4, 1, 3])
    real_BL, fake_BL = z.repeat_interleave(real, 0), z.repeat_interleave(fake, 0)
    batch = duel(torch.zeros(1, 8, L, dtype=torch.long), [0.0], 0.5, fake_BL, real_BL)
    best = ((1 - smooth) * real + smooth * fake) / (real + fake)
    code = z[:, 0] * (WORDS + 1) + z[:, 1]
    for shift, zero in ((0.0, True), (0.3, False)):
        with torch.no_grad():
            objective.discriminator.table[code, 0] = (best / (1 - best)).log().double() + shift
        loss = objective.loss("discriminator", batch, 0)
        (slope,) = torch.autograd.grad(loss.value(), objective.discriminator.table)
        assert (slope[code, 0].abs() < 1e-6).all() == zero
        assert (slope[code, 1] == 0).all()  # visible positions are not asked
    if smooth == 0:
        assert_close((best / (1 - best)).log(), (real / fake).log())
    assert [t.unit for t in loss.terms.values()] == ["real token", "fake token"]
    assert loss.terms["real"].coefficient == loss.terms["fake"].coefficient == 0.5


def test_rewards_favour_what_looks_real_and_sum_to_zero_in_a_group():
    objective = didi(samples_per_group=4, advantage_clip=10.0)
    fake = torch.tensor([[MASK, 0], [MASK, 1], [MASK, MASK], [2, 2], [MASK, 0], [MASK, 0], [MASK, 0], [MASK, 0]])
    with torch.no_grad():
        objective.discriminator.table[MASK * 4 + 0] = torch.tensor([1.0, 99.0])
        objective.discriminator.table[MASK * 4 + 1] = torch.tensor([-20.0, 99.0])
        objective.discriminator.table[MASK * 4 + MASK] = torch.tensor([2.0, 6.0])
    batch = duel(torch.zeros(1, 8, L, dtype=torch.long), [0.0], 0.5, fake, fake)
    reward, advantage = objective.advantages(batch)
    assert reward[:4].tolist() == [1.0, -8.0, 4.0, 0.0]
    r = reward[:4]
    assert_close(advantage[:4], (r - r.mean()) / r.std())
    assert advantage[:4].sum().abs() < 1e-6
    assert advantage[2] > 0 > advantage[1]
    assert advantage[4:].tolist() == [0.0] * 4  # equal rewards teach nothing
    objective.config = objective.config.model_copy(update={"advantage_clip": 0.5})
    assert objective.advantages(batch)[1].abs().max() == 0.5


# ---------------------------------------------------------------- trajectories and corruption


def test_collect_couples_the_time_of_corruption_to_the_trajectory():
    objective = didi(samples_per_group=4, times=UniformTime(0.1, 0.9))
    got = objective.collect(texts(500), 0)
    assert got.states_SBL.shape == (3, 2000, L)
    assert_close(got.time_B, 1 - got.alphas_SB[1])
    assert len(got.ids_B.unique()) == 2000 == len(got.time_B.unique())  # members of a group have their own times
    assert got.ids_B[:5].tolist() == [0, 1, 2, 3, 4]
    masked = lambda x: (x == MASK).double().mean(1)
    for x in (got.states_SBL[1], got.fake_BL, got.real_BL):
        assert (masked(x) - got.time_B).mean().abs() < 0.03
        late, early = got.time_B > 0.6, got.time_B < 0.4
        assert masked(x)[late].mean() > masked(x)[early].mean() + 0.3
    assert (got.states_SBL[0] == MASK).all()
    assert masked(got.states_SBL[2]).mean() < 0.01
    same = ((got.fake_BL == MASK) == (got.real_BL == MASK)).double().mean()
    assert same < 0.8  # masks of their own
    assert torch.equal(got.fake_BL[got.fake_BL != MASK], got.states_SBL[2][got.fake_BL != MASK])
    apart = didi(samples_per_group=4, times=UniformTime(0.1, 0.9), coupled_time=False).collect(texts(500), 0)
    assert torch.equal(apart.alphas_SB, got.alphas_SB)
    assert torch.corrcoef(torch.stack([apart.time_B, 1 - apart.alphas_SB[1]]))[0, 1].abs() < 0.1
    assert (masked(apart.fake_BL) - apart.time_B).mean().abs() < 0.03
    one = didi(samples_per_group=4, jumps=1).collect(texts(50), 0)
    assert len(one.states_SBL) == 2


def test_padding_is_neither_written_nor_compared():
    objective = didi(samples_per_group=2)
    batch = texts(50)
    batch.attention_BT[:, 1] = False
    got = objective.collect(batch, 0)
    for x in (*got.states_SBL, got.fake_BL, got.real_BL):
        assert (x[:, 1] == 1).all()
    loss = objective.loss("discriminator", got, 0)
    assert loss.terms["fake"].count == (got.fake_BL[:, 0] == MASK).sum()


# ---------------------------------------------------------------- regularisers


def regularised(**options):
    objective = didi(kl_beta=1.0, samples_per_group=2, **options)
    return objective, objective.collect(texts(8), 0)


def test_the_kl_is_forward_and_vanishes_at_the_teacher():
    objective, batch = regularised(kl_shares=(0.5, 0.25))
    terms = objective.loss("student", batch, 0).terms
    for s, share in ((0, 0.5), (1, 0.25)):
        where = batch.states_SBL[s] == MASK
        log_q = objective.student.log_probs(batch.states_SBL[s])[where][:, :WORDS]
        log_p = Tabular(100).log_probs(batch.states_SBL[s])[where][:, :WORDS]
        assert terms[f"kl_{s + 1}"].mean().item() == pytest.approx(
            share * (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-5
        )
    objective.teacher_logits = objective.student.logits
    terms = objective.loss("student", batch, 0).terms
    assert terms["kl_1"].total.abs() < 1e-6
    assert terms["kl_2"].total.abs() < 1e-6


def test_directions_of_the_regulariser():
    p, q = torch.tensor([[0.7, 0.2, 0.1]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
    forward, reverse = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    assert (forward - reverse).abs() > 0.01
    assert_close(didi(regularization="forward").divergence(p, q), forward)
    assert_close(didi(regularization="reverse").divergence(p, q), reverse)
    assert_close(didi(regularization="jeffreys", reverse_share=0.3).divergence(p, q), 0.7 * forward + 0.3 * reverse)


def test_a_raw_teacher_weighs_each_position_by_its_mass_off_the_mask():
    def gradient(raw):
        objective, batch = regularised(raw_teacher=raw, jumps=1)
        term = objective.loss("student", batch, 0).terms["kl_1"]
        return torch.autograd.grad(term.mean(), objective.student.table)[0][-1]

    off = 1 - Tabular(100).logits(torch.full((1, L), MASK)).softmax(-1)[0, :, MASK:]
    usual, raw = gradient(False), gradient(True)
    # sum_v p_v (log p_v - log q_v) with p off the mask: the gradient scales, since SUBS of p is p / off
    assert_close(raw, usual * off, rtol=1e-5, atol=1e-9)


def test_entropy_is_rewarded():
    objective, batch = regularised(entropy_beta=0.3)
    terms = objective.loss("student", batch, 0).terms
    q = objective.student.log_probs(torch.full((1, L), MASK))[0, :, :WORDS].exp()
    assert terms["entropy_1"].mean().item() == pytest.approx(-0.15 * -(q * q.log()).sum(-1).mean().item(), rel=1e-5)


# ---------------------------------------------------------------- the guided sampler

ALPHABET = "abcdefgh "


def small(seed=0) -> MaskedLM:
    torch.manual_seed(seed)
    return mlm_tiny(tokenizer=character_tokenizer(ALPHABET), layers=2, length=16).eval()


def test_without_tilt_and_choice_guided_sampling_is_ancestral_sampling():
    model = small()
    plain = RewardGuided(TokenDiscriminator(small(1), 1), Guidance(tilt=(0.0, 0.0), candidates=1))
    for steps in (1, 3, 8):
        a, b = (model.samples(torch.arange(6), seed=2, length=8, steps=steps, sampler=s) for s in (plain, ancestral))
        assert torch.equal(a, b)
    guided = RewardGuided(plain.discriminator, Guidance(tilt=(40.0, 40.0), tilted=1.0))
    assert not torch.equal(model.samples(torch.arange(6), seed=2, length=8, steps=3, sampler=guided), a)


def test_the_tilt_is_the_slope_of_the_soft_score():
    discriminator = TokenDiscriminator(small(1), 1).double()
    tokens = torch.tensor([[5, 4, 7, 4]])
    log_p = small().double().log_probs(tokens)
    assert small().mask_id == 4
    slope = RewardGuided(discriminator).slope(log_p, tokens, 4)
    assert (slope[0, [0, 2]] == 0).all()
    assert (slope[0, :, 4] == 0).all()

    def score(log_p):
        table = discriminator.trunk.network.get_input_embeddings().weight
        soft = torch.where((tokens == 4)[..., None], log_p.exp() @ table, table[tokens])
        return discriminator(tokens, embedded_BLD=soft)[0, [1, 3]].sum().item()

    step = torch.zeros_like(log_p)
    step[0, 1, 6] = 1e-5
    assert slope[0, 1, 6].item() == pytest.approx((score(log_p + step) - score(log_p - step)) / 2e-5, rel=1e-4)


def test_candidates_are_chosen_by_the_softmax_of_their_summed_logits():
    lookup = Lookup()
    with torch.no_grad():
        lookup.table[0 * 4 + 0] = torch.tensor([0.4, 0.6])
        lookup.table[1 * 4 + 1] = torch.tensor([0.0, -0.5])
    count = 20000
    candidates = torch.tensor([[0, 0], [1, 1], [2, 2]])[:, None].expand(-1, count, -1)
    chosen = RewardGuided(lookup).chosen(candidates, 0, torch.arange(count))
    frequency = torch.bincount(chosen[:, 0], minlength=3) / count
    assert_close(frequency, torch.tensor([1.0, -0.5, 0.0]).softmax(0), rtol=0, atol=0.012)


# ---------------------------------------------------------------- training and runs


class Rows:
    def __len__(self):
        return 32

    def batch(self, rows, epoch=0):
        tokens = 5 + (rows[:, None] * 7 + torch.arange(8)[None] * 3) % 9
        yes = torch.ones_like(tokens, dtype=torch.bool)
        return TokenBatch(rows + epoch * 32, tokens, yes, yes)


def fitted(folder=None, micro=None, fail_at=None, steps=4) -> DiDi:
    teacher = small()
    torch.manual_seed(3)
    config = DiDiInstruct(
        discriminator=OptimizerSpec(lr=1e-2, optimizer="sgd", momentum=0.0), discriminator_blocks=1, ema=0.9,
        samples_per_group=2,
    )  # fmt: skip
    spec = TrainSpec(
        steps=steps, batch=4, micro_batch=micro, lr=1e-2, optimizer="sgd", momentum=0.0, checkpoint_every=1, trackers=[]
    )
    objective = DiDi(small(), teacher, TokenDiscriminator(teacher, 1), config, optimizer=spec.optimizer_spec(), seed=0)
    collect = objective.collect

    def failing(batch, step):
        if step == fail_at:
            raise KeyboardInterrupt
        return collect(batch, step)

    objective.collect = failing
    Trainer(spec, folder).fit(objective, Rows())
    return objective


def test_micro_batches_change_nothing():
    whole, pieces = fitted().state_dict(), fitted(micro=1).state_dict()
    start = DiDi(small(), small(), TokenDiscriminator(small(), 1), DiDiInstruct(), optimizer=OptimizerSpec(), seed=0)
    moved = [k for k, v in start.state_dict().items() if v.is_floating_point() and not torch.equal(v, whole[k])]
    assert any(k.startswith("student.") for k in moved)
    assert any(k.startswith("discriminator.trunk") for k in moved)
    for name, value in whole.items():
        assert_close(pieces[name], value, rtol=1e-4, atol=2e-6)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path, fail_at=2)
    resumed, straight = fitted(tmp_path).state_dict(), fitted().state_dict()
    assert all(torch.equal(resumed[k], v) for k, v in straight.items())


def test_the_student_waits_for_the_discriminator():
    players = didi(discriminator_warmup=3).players
    assert list(players) == ["discriminator", "student"]
    assert [players["student"].when(s) for s in range(5)] == [False, False, False, True, True]


COMMON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SPARE = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def network(kind, size):
    if kind == "bert":
        return BertForMaskedLM(BertConfig(vocab_size=size, max_position_embeddings=32, **COMMON, pad_token_id=0))
    if kind == "modernbert":
        return ModernBertForMaskedLM(
            ModernBertConfig(vocab_size=size, **COMMON, **SPARE, cls_token_id=1, sep_token_id=2)
        )
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=size, num_key_value_heads=1, **COMMON, **SPARE))
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=size, num_key_value_heads=1, head_dim=8, **COMMON, **SPARE))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"row {i} of a text with words {i * 7 % 13}" for i in range(40)))
    return path


def executed(tmp_path, text, teacher, **overrides):
    raw = recipes.read("didi_instruct")
    raw |= {"teacher": str(teacher), "data": {"text": str(text), "length": 12}, "eval": {"limit": 5}}
    raw["train"] = {"steps": 2, "batch": 2, "trackers": []}
    raw["method"] |= {"eval_samples": 4, "discriminator_blocks": 1, "eval_steps": [2]} | overrides.pop("method", {})
    plan = recipes.resolve(raw | overrides)
    open_folder(tmp_path / "run", recipes.write(plan))
    return Run(plan, tmp_path / "run").execute()


@pytest.mark.parametrize("kind", ["bert", "modernbert", "llama", "qwen3"])
def test_real_architectures(kind, tmp_path, text):
    tokenizer = character_tokenizer(text.read_text(), mask=True)
    torch.manual_seed(0)
    MaskedLM(network(kind, len(tokenizer)), tokenizer).save(tmp_path / "teacher")
    real = {"method": {"real": "teacher", "teacher_samples": 6, "teacher_steps": 2}} if kind == "llama" else {}
    result = executed(tmp_path, text, tmp_path / "teacher", **real)
    assert {"nll_2", "teacher_nll_2", "guided_nll_2", "entropy_drop_2", "nll_bound"} <= set(result.metrics)
    back = MaskedLM.from_pretrained(tmp_path / "run" / "student")
    assert len(back.generate(count=2, length=12, steps=2)) == 2


def test_bad_input(tmp_path, text):
    tokenizer = character_tokenizer(text.read_text(), mask=True)
    mlm_tiny(tokenizer=tokenizer, length=12).save(tmp_path / "teacher")
    mlm_tiny(tokenizer=character_tokenizer("abc"), length=12).save(tmp_path / "other")
    with pytest.raises(ModelError, match="different vocabularies"):
        executed(tmp_path / "a", text, tmp_path / "teacher", student=str(tmp_path / "other"))
    with pytest.raises(DataError, match="length is 13, but the models reach 12"):
        executed(tmp_path / "b", text, tmp_path / "teacher", data={"text": str(text), "length": 13})
    with pytest.raises(ModelError, match="has 1 blocks: 1 to 1 of them"):
        executed(tmp_path / "c", text, tmp_path / "teacher", method={"discriminator_blocks": 3})
    with pytest.raises(RecipeError, match="samples_per_group"):
        executed(tmp_path / "d", text, tmp_path / "teacher", method={"samples_per_group": 1})
