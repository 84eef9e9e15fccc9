"""`train` of a recipe."""

from typing import Literal

from pydantic import Field

from potstill.contracts.players import OptimizerSpec


class TrainSpec(OptimizerSpec):
    """How a run trains. The optimizer's fields are the student's; other players have theirs in the method's options."""

    steps: int = Field(1000, gt=0)
    seconds: float | None = Field(None, gt=0)  # stop a stage after this long, should its steps not be done by then
    batch: int = Field(64, gt=0)  # samples a step, over all micro-batches and processes
    micro_batch: int | None = Field(None, gt=0)  # samples a process sees at once; default: its share of the batch
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"  # autocast
    device: Literal["auto", "cpu"] = "auto"  # auto takes an accelerator where there is one
    evaluate_every: int | None = Field(None, gt=0)
    checkpoint_every: int | None = Field(None, gt=0)  # steps; besides, at least once a minute
    sharded: bool = False  # trained weights, gradients and optimizer state split over the processes; one ignores it
    keep: int = Field(2, gt=0)  # checkpoints kept a stage
    log_every: int = Field(1, gt=0)
    trackers: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    batch_norm: Literal["refuse", "local"] = (
        "refuse"  # local: statistics of each micro-batch, as most trainers do silently
    )

    def optimizer_spec(self, **changes: object) -> OptimizerSpec:
        """The student's optimizer alone."""
        fields = {name: getattr(self, name) for name in OptimizerSpec.model_fields}
        return OptimizerSpec(**{**fields, **changes})
