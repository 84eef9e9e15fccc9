"""How a model of each kind is trained without a teacher: for teachers themselves, and for controls."""

from typing import Any

from potstill.contracts.errors import RecipeError
from potstill.contracts.players import Objective
from potstill.training.spec import TrainSpec


def objective_from_scratch(model: Any, train: TrainSpec) -> Objective:
    """Cross-entropy, next-token prediction, the masked-diffusion bound, or denoising score matching."""
    optimizer = train.optimizer_spec()
    match model.kind:
        case "image_classifier":
            from potstill.objectives.logits import Supervised

            return Supervised(model, optimizer=optimizer)
        case "causal_lm":
            from potstill.objectives.tokens import TokenDistillation

            return TokenDistillation(model, None, cross_entropy=1.0, optimizer=optimizer, seed=train.seed)
        case "masked_lm":
            from potstill.objectives.masked import MaskedDiffusion

            return MaskedDiffusion(model, optimizer=optimizer, seed=train.seed)
        case "denoiser":
            from potstill.objectives.matching import DenoisingScoreMatching

            return DenoisingScoreMatching(model, optimizer=optimizer, seed=train.seed)
    raise RecipeError(f"No way to train a {model.kind} from scratch is known: give a trained one as a folder or an id.")
