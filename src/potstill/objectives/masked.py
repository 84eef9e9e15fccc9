"""Masked diffusion language models: the bound they are trained by, and policy gradients along their trajectories.

    -log p(x) <= E_t [ weight(t) sum over masked i of -log p(x_i | x_t) ],  weight = -alpha' / (1 - alpha)

MDLM (arXiv 2406.07524), the continuous-time bound. A few-step sampler is a policy: each jump of `noise.masked` has an
exact log-probability, whose gradient `trajectory_logp` gives at the states that the policy itself drew. B batch, L
length, V vocabulary, S jumps, D features.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from potstill.contracts import keyed
from potstill.contracts.batch import Batch, TokenBatch
from potstill.contracts.players import Objective, OptimizerSpec, Player
from potstill.contracts.terms import Loss, Term
from potstill.noise.masked import (
    LogLinear,
    MaskSchedule,
    Predict,
    TimeSampler,
    UniformTime,
    corrupt,
    jump,
    jump_logp,
    masked_nll,
    subs_log_probs,
)
from potstill.objectives.blocks import TokenHead

Learnt = Literal["text", "counted"]


def free_positions(batch: TokenBatch, learnt: Learnt = "text") -> Tensor:
    """What may be masked: every token that is no padding, or only those that count (prompts stay visible). [B, L]."""
    return batch.attention_BT if learnt == "text" else batch.counted_BT


class MaskedDiffusion(Objective):
    """Train a MaskedLM by the continuous-time bound, in nats per token.

    learnt: "text" models every token, "counted" only completions given their prompts. times: where t is drawn; its
    density is divided out. Times near 0 are left out by default (MDLM's 1e-3): they are rare and of unbounded weight.
    """

    def __init__(
        self,
        model: Any,
        *,
        optimizer: OptimizerSpec,
        seed: int,
        schedule: MaskSchedule = LogLinear(),
        times: TimeSampler = UniformTime(low=1e-3),
        learnt: Learnt = "text",
    ) -> None:
        super().__init__()
        self.model, self.optimizer, self.seed = model, optimizer, seed
        self.schedule, self.times, self.learnt = schedule, times, learnt

    @property
    def players(self) -> dict[str, Player]:
        return {"student": Player([self.model], self.optimizer)}

    def loss(self, player: str, batch: Batch, step: int) -> Loss:
        assert isinstance(batch, TokenBatch)
        tokens_BL, free_BL = batch.tokens_BT, free_positions(batch, self.learnt)
        t_B = self.times(keyed.key(self.seed, "bound"), batch.ids_B)
        alpha_B, mask_id = self.schedule.alpha(t_B), self.model.mask_id
        noisy_BL = corrupt(tokens_BL, alpha_B, mask_id, keyed.key(self.seed, "bound"), batch.ids_B, free_BL)
        log_p_BLV = subs_log_probs(self.model.logits(noisy_BL, batch.attention_BT), noisy_BL, mask_id)
        nll_BL = masked_nll(log_p_BLV, tokens_BL, noisy_BL, mask_id)
        weight_B = (self.schedule.weight(t_B) / self.times.log_density(t_B).exp()).to(nll_BL.dtype)
        masked_BL = (noisy_BL == mask_id) & free_BL
        terms = {"bound": Term.over(weight_B[:, None] * nll_BL, free_BL, unit="token")}
        return Loss(terms, {"masked_nll": Term.over(nll_BL.detach(), masked_BL)})


@torch.no_grad()
def trajectory(predict: Predict, start_BL: Tensor, alphas_SB: Tensor, mask_id: int, seed: int, ids_B: Tensor) -> Tensor:
    """Jump from `start_BL` through the visible shares alphas_SB [S + 1, B], the first that of the start. [S + 1, B, L]."""
    states = [start_BL]
    for s in range(len(alphas_SB) - 1):
        log_p_BLV, here = predict(states[-1]), keyed.key(seed, "trajectory", s)
        states.append(jump(log_p_BLV, states[-1], alphas_SB[s], alphas_SB[s + 1], mask_id, here, ids_B))
    return torch.stack(states)


def trajectory_logp(
    predict: Predict, states_SBL: Tensor, alphas_SB: Tensor, mask_id: int
) -> tuple[Tensor, list[Tensor]]:
    """log-probability of each row's jumps, with gradient, and the predictions it came from: [B], S of [B, L, V]."""
    predictions = [predict(state_BL) for state_BL in states_SBL[:-1]]
    logp = [
        jump_logp(p, states_SBL[s], states_SBL[s + 1], alphas_SB[s], alphas_SB[s + 1], mask_id).sum(1)
        for s, p in enumerate(predictions)
    ]
    return torch.stack(logp).sum(0), predictions


class TokenDiscriminator(nn.Module):
    """A copy of a masked model's trunk, frozen but for its last blocks, with one logit per token on top.

    model: a MaskedLM. blocks: how many of the last are trained, with what comes behind them (a final norm).
    The head's spectral norms stand still within a step (evaluation mode) and move by `refresh` alone, so that the number
    of forward passes, and with it the batch layout, changes nothing. The trunk has no dropout.
    """

    def __init__(self, model: Any, blocks: int = 4) -> None:
        super().__init__()
        self.trunk = model.copied()
        self.trunk.requires_grad_(False)
        own = self.trunk.last_blocks(blocks)
        for module in own:
            module.requires_grad_(True)
        self.head = TokenHead(self.trunk.network.config.hidden_size)
        self.eval()

    def forward(
        self, tokens_BL: Tensor, attention_BL: Tensor | None = None, *, embedded_BLD: Tensor | None = None
    ) -> Tensor:
        """Logits [B, L]; `embedded_BLD` is a soft input in place of the tokens' embeddings."""
        hidden_BLD = self.trunk.hidden(tokens_BL, attention_BL, embedded_BLD=embedded_BLD)
        return self.head(hidden_BLD.to(torch.promote_types(hidden_BLD.dtype, torch.float32)))

    def train(self, mode: bool = True) -> "TokenDiscriminator":
        return super().train(False)

    @torch.no_grad()
    def refresh(self) -> None:
        """One power iteration of each spectral norm, after an update."""
        for layer in self.head.layers:
            if isinstance(layer, nn.Linear):
                layer.train()
                _ = layer.weight  # reading the weight in training mode is what moves the iteration
                layer.eval()


@torch.no_grad()
def clipped_mean(logits_BL: Tensor, where_BL: Tensor, limit: float) -> Tensor:
    """Mean of the log-odds, each clipped to +- limit, over `where_BL`; 0 for a row without any. [B]."""
    clipped_BL = torch.where(where_BL, logits_BL.clamp(-limit, limit), 0.0)
    return clipped_BL.sum(1) / where_BL.sum(1).clamp_min(1)


def predictor(log_probs: Callable[[Tensor, Tensor | None], Tensor], attention_BL: Tensor | None = None) -> Predict:
    """`log_probs(tokens, attention)` of a MaskedLM as a function of the tokens alone.

    Equal rows, as all trajectories begin with, are asked once.
    """

    def predict(tokens_BL: Tensor) -> Tensor:
        rows = [tokens_BL] if attention_BL is None else [tokens_BL, attention_BL]
        if len(tokens_BL) > 1 and all(torch.equal(x, x[:1].expand_as(x)) for x in rows):
            one = None if attention_BL is None else attention_BL[:1]
            return log_probs(tokens_BL[:1], one).expand(len(tokens_BL), -1, -1)
        return log_probs(tokens_BL, attention_BL)

    return predict
