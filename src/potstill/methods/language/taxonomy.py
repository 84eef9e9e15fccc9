"""Where a method of on-policy distillation stands, and which kind of distillation a situation asks for.

Both taxonomies of the survey (arXiv 2604.00626): of v1, the feedback signal, the access to the teacher and the
granularity; of v3, what is optimised, where the signal comes from and how it is kept stable. A method has one main class
of each; the tags of the methods here are our reading of their papers.
"""

from dataclasses import dataclass
from typing import Literal

from potstill.contracts.errors import RecipeError


@dataclass(frozen=True)
class Tags:
    """One method in both taxonomies."""

    feedback: Literal["logit", "outcome", "self-play"]
    access: Literal["white-box", "black-box", "self"]
    granularity: Literal["token", "sequence", "hybrid"]
    optimised: Literal["fixed divergence", "adaptive divergence", "reward-augmented"]
    signal: Literal["white-box", "black-box", "privileged self", "pure self", "external feedback"]
    stabilised: tuple[Literal["weighting", "curriculum", "compute"], ...] = ()


TAGS: dict[str, Tags] = {
    "token_kd": Tags("logit", "white-box", "token", "fixed divergence", "white-box"),
    "seq_kd": Tags("logit", "black-box", "sequence", "fixed divergence", "black-box"),
    "gkd": Tags("logit", "white-box", "token", "fixed divergence", "white-box"),
    "minillm": Tags("logit", "white-box", "sequence", "fixed divergence", "white-box"),
    "grpo": Tags("outcome", "black-box", "sequence", "reward-augmented", "external feedback"),
    "vopd": Tags("logit", "white-box", "token", "fixed divergence", "white-box", ("weighting",)),
    "opd_survey": Tags("logit", "white-box", "token", "reward-augmented", "white-box"),
    "opsd": Tags("logit", "self", "token", "fixed divergence", "privileged self"),
    "unisd": Tags("logit", "self", "hybrid", "fixed divergence", "privileged self", ("weighting",)),
    "tip": Tags("logit", "white-box", "token", "fixed divergence", "white-box", ("weighting", "compute")),
    "paced": Tags("logit", "white-box", "hybrid", "fixed divergence", "white-box", ("weighting", "curriculum")),
    "tsd_kd": Tags("logit", "white-box", "hybrid", "adaptive divergence", "white-box", ("weighting",)),
    "tcod": Tags("logit", "white-box", "hybrid", "fixed divergence", "white-box", ("curriculum",)),
    "sod": Tags("logit", "white-box", "hybrid", "reward-augmented", "white-box", ("weighting",)),
    "mad_opd": Tags("logit", "white-box", "token", "fixed divergence", "white-box", ("weighting",)),
    "sinkd": Tags("logit", "white-box", "sequence", "fixed divergence", "white-box"),
}


def recommend(
    *, capacity_ratio: float, multi_step: bool, plateaued: bool = False, reward_rises: bool = False
) -> tuple[Literal["off-policy", "on-policy", "hybrid"], str]:
    """Which kind of distillation, and why (the survey's rule, its section 7.4).

    capacity_ratio: parameters of the teacher over those of the student. multi_step: whether errors compound over many
    steps of reasoning or turns. plateaued, reward_rises: the loss on given text no longer falls while the reward of the
    student's own answers still rises.
    """
    if not capacity_ratio > 0:
        raise RecipeError(f"capacity_ratio must be positive (teacher's size over student's), got {capacity_ratio}.")
    if multi_step or (plateaued and reward_rises):
        why = (
            "errors compound over steps that given text never shows"
            if multi_step
            else "given text has no more to teach"
        )
        return "on-policy", f"{why}: learn on the student's own states (gkd with on_policy 1, vopd, opsd)"
    if capacity_ratio > 10:
        return (
            "off-policy",
            "the student is far smaller and the reasoning shallow: learn on the teacher's text (seq_kd)",
        )
    return "hybrid", "neither side is clear: mix given text and rollouts (gkd with on_policy 0.5)"
