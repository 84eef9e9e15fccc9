"""Words rewritten letter by letter, by a rule with exceptions and free choices: a world in which it is known what is hard.

Each row has a second completion by somebody who never heard of the exceptions, so that a model can be made that is sure
and wrong in known places; letters that may be rewritten in several ways leave every model unsure; and a share of the
prompts has nothing to learn from, because their answers were drawn at random.
"""

from collections.abc import Mapping
from typing import Any

from potstill.contracts import keyed
from potstill.contracts.errors import DataError
from potstill.tasks.base import Source

MODELS: dict[str, dict[str, Any]] = {
    "teacher": {"name": "llama-tiny", "options": {"layers": 2, "width": 96}},
    "student": {"name": "llama-tiny", "options": {"layers": 2, "width": 48}},
}
RING = "cdefghijklmn"  # plain letters: each becomes the next one, or the fourth next behind a marker
MARKER, FREE, CHOICES = "a", "b", "wxyz"  # the marker stays as it is; a free letter becomes any of the choices
LOST = 4  # letters of an answer that no rule gives


def rewriting(
    size: int = 4000,
    test_size: int = 200,
    letters: int = 12,
    exceptions: float = 0.1,
    free: float = 0.15,
    hopeless: float = 0.0,
    seed: int = 0,
) -> Source:
    """Prompts such as "!cadbe>", completed by "dahxf": c -> d, a marker a, d -> h (an exception), b free, e -> f.

    letters: of a word. exceptions: how often a letter is the marker, behind which the exception holds. free: how often it
    is the free letter. hopeless: the share of prompts, told by a "?" before them, that no rule answers; they are graded
    against random letters, four or as many as the word has.
    Rows have prompt, completion, answer and mistaken, the completion without exceptions. The test rows are of words that
    no training row holds.
    """
    total = size + test_size
    if size < 1 or test_size < 1 or letters < 2 or not 0 <= exceptions + free <= 1 or min(exceptions, free) < 0:
        raise DataError(
            "data of rewriting needs size and test_size of at least 1, letters of at least 2, exceptions and free of at least 0 "
            f"and together at most 1, got {size}, {test_size}, {letters}, {exceptions}, {free}."
        )
    if not 0 <= hopeless <= 1:
        raise DataError(f"data of rewriting: hopeless is a share in [0, 1], got {hopeless}.")
    import torch

    number, place = torch.arange(2 * total)[:, None], torch.arange(letters)[None]
    kind, letter, choice = (
        keyed.uniform(keyed.key(name, seed), number, place) for name in ("kind", "letter", "choice")
    )
    lost = (keyed.uniform(keyed.key("hopeless", seed), number)[:, 0] < hopeless).tolist()
    rows: dict[str, dict[str, str]] = {}
    for kinds, plain, choices, hope in zip(kind.tolist(), letter.tolist(), choice.tolist(), lost, strict=True):
        word = "".join(
            MARKER if k < exceptions else FREE if k < exceptions + free else RING[int(u * len(RING))]
            for k, u in zip(kinds, plain, strict=True)
        )
        rows.setdefault(word, _row(word, choices, hope))
    if len(rows) < total:
        raise DataError(f"rewriting has only {len(rows)} different words here. Ask for fewer rows, or longer words.")
    made = list(rows.values())[:total]
    settings = {"causal_lm": {"steps": 600, "batch": 64, "lr": 4e-3, "schedule": "cosine", "warmup": 30, "clip": 1.0}}
    return Source(
        "rewriting", "prompts", made[test_size:], made[:test_size], models=MODELS, teacher=settings, grade=grade
    )


def rewritten(word: str, choices: list[float], exceptions: bool = True) -> str:
    """A word by the rule; `choices` in (0, 1) settle what the free letters become."""
    out = []
    for i, letter in enumerate(word):
        if letter == FREE:
            out.append(CHOICES[int(choices[i] * len(CHOICES))])
        elif letter == MARKER:
            out.append(MARKER)
        else:
            step = 4 if exceptions and i and word[i - 1] == MARKER else 1
            out.append(RING[(RING.index(letter) + step) % len(RING)])
    return "".join(out)


def _row(word: str, choices: list[float], hopeless: bool) -> dict[str, str]:
    if hopeless:
        answer = "".join(RING[int(u * len(RING))] for u in choices[:LOST])
        return {"prompt": f"?{word}>", "completion": answer, "answer": answer, "mistaken": answer}
    right, mistaken = rewritten(word, choices), rewritten(word, choices, exceptions=False)
    return {"prompt": f"!{word}>", "completion": right, "answer": right, "mistaken": mistaken}


def grade(row: Mapping[str, Any], text: str) -> float:
    """1 where every letter is right, whichever of its choices a free one became; of a hopeless row, its own answer alone."""
    word, answer = row["prompt"][1:-1], row["answer"]
    if row["prompt"][0] == "?":
        return float(text == answer)
    fits = lambda said, letter, wanted: said in CHOICES if letter == FREE else said == wanted
    return float(len(text) == len(word) and all(map(fits, text, word, answer)))
