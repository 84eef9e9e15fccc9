"""Sequence-level distillation: the teacher writes, the student learns to write the same (arXiv 1606.07947).

    y^ = what the teacher answers to x;   L = -mean_t log q(y^_t | x, y^_<t)                                  (Eq. 9)

The paper's mode of the teacher, found by a beam of 5, is here its greedy answer; `decoding: sample` draws from it instead,
`samples` a prompt, which estimates Eq. 8, the cross-entropy of whole sequences, without bias. `best` keeps of several
samples the one that the data's own scorer likes best (rejection sampling, where there is a scorer). `word` adds
token-level distillation on the same text, (1 - word) NLL + word KL(p || q): the paper's best is both together.
Departs: no sequence interpolation (the beam's entry nearest to the reference).
"""

from typing import Literal

from pydantic import Field

from potstill.contracts.errors import DataError, RecipeError
from potstill.contracts.spec import MethodConfig
from potstill.methods import method
from potstill.methods.language.comparison import compared, start_of
from potstill.methods.language.writing import written
from potstill.objectives.tokens import TokenDistillation
from potstill.run import Result, Run
from potstill.tasks.tokens import Prompts, TokenRows, pad_id


class SeqKD(MethodConfig):
    decoding: Literal["greedy", "sample"] = "greedy"
    samples: int = Field(1, ge=1)  # answers a prompt, with decoding "sample"
    temperature: float = Field(1.0, gt=0)  # of the teacher's sampling
    best: bool = False  # keep the best scored of the samples
    max_new_tokens: int = Field(64, ge=1)
    word: float = Field(0.0, ge=0, le=1)  # share of token-level KD on the written text


@method("seq_kd", student="causal_lm", teacher="causal_lm", data=("prompts", "text", "chat"))
def seq_kd(run: Run, config: SeqKD) -> Result:
    if config.samples > 1 and config.decoding == "greedy":
        raise RecipeError(
            "method.samples: greedy answers are all the same. Set method.decoding to sample, or samples to 1."
        )
    if config.best and (run.source.grade is None or config.samples < 2):
        raise RecipeError(
            f"method.best needs several samples and a score, which {run.source.name} may not have. Leave it out."
        )
    student, teacher = run.student(), run.teacher()
    before = start_of(student)
    prompts = run.prompts()
    answers = written(
        run, teacher.model, prompts, "written", max_new_tokens=config.max_new_tokens, samples=config.samples,
        temperature=config.temperature if config.decoding == "sample" else None,
    )  # fmt: skip
    objective = TokenDistillation(
        student,
        teacher if config.word else None,
        optimizer=run.train.optimizer_spec(),
        seed=run.seed,
        distillation=config.word,
        cross_entropy=1 - config.word,
    )
    run.fit(objective, _text(run, config, prompts, answers))
    return compared(run, before=before)


def _text(run: Run, config: SeqKD, prompts: Prompts, answers: list[list[list[int]]]) -> TokenRows:
    """Prompts with what the teacher wrote behind them, which counts; empty answers teach nothing and are left out."""
    tokenizer = run.context["tokenizer"]
    rows = []
    for (prompt, _, row), said in zip(prompts.rows, answers, strict=True):
        if config.best:
            texts = tokenizer.batch_decode(said, skip_special_tokens=True)
            marks = [run.source.grade(row, text) for text in texts]  # type: ignore[misc]
            said = [said[marks.index(max(marks))]]
        rows += [([*prompt, *tokens], [False] * len(prompt) + [True] * len(tokens)) for tokens in said if tokens]
    if not rows:
        raise DataError("seq_kd: the teacher wrote nothing but empty answers. Check its chat template.")
    return TokenRows(rows, pad_id(tokenizer))
