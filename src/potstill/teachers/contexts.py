"""What a teacher is shown besides the prompt: the row's own solution, other rows, an instruction, a wrong answer.

A context is a function (prompt row, the student's completion as text) -> the prompt in words that the teacher reads, for
`PrivilegedContext`. It picks examples, and a `Layout` puts them around the prompt. Rows are dictionaries with a prompt and
a completion (or an answer). What is random is keyed by the row's words, so that a row sees the same context every time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch

from potstill.contracts import keyed
from potstill.contracts.errors import DataError, MissingExtra, RecipeError, require
from potstill.rollouts.local import completions_of, sample
from potstill.tasks.tokens import prompt_batch, prompt_tokens

Row = Mapping[str, Any]
Rank = Callable[[Row, int], list[int]]  # a row and how many -> at most so many numbers of pool rows, the best first


def solution(row: Any, field: str = "completion") -> str:
    """A row's reference solution: its `field`, and where it has no completion its answer."""
    names = ("completion", "answer") if field == "completion" else (field,)
    found = next((row[name] for name in names if row.get(name)), None) if isinstance(row, Mapping) else None
    if not found or "prompt" not in row:
        raise DataError(
            f"Contexts are made of rows with a prompt and a {' or an '.join(names)}, and this one is "
            f"{sorted(row) if isinstance(row, Mapping) else type(row).__name__}. Give such data, or name another field."
        )
    return str(found)


@dataclass(frozen=True)
class Layout:
    """How examples, each written as `example`, stand before the prompt. The words are ours; the paper's are not sourced."""

    example: str = "Question: {prompt}\nAnswer: {completion}"
    between: str = "\n\n"
    whole: str = "Study this example:\n\n{examples}\n\nNow solve the next one, in your own way.\n\n{prompt}"

    def __post_init__(self) -> None:
        for option, fields in (("example", ("prompt", "completion")), ("whole", ("examples", "prompt"))):
            try:
                filled = getattr(self, option).format(**{field: f"\0{field}" for field in fields})
            except (KeyError, IndexError, ValueError) as cause:
                raise RecipeError(
                    f"The layout's {option} may name {{{'}, {'.join(fields)}}} alone: {cause}."
                ) from cause
            if missing := [field for field in fields if f"\0{field}" not in filled]:
                raise RecipeError(f"The layout's {option} leaves {{{missing[0]}}} out: {getattr(self, option)!r}.")

    def shown(self, row: Row, completion: str | None = None) -> str:
        """One example: a row's prompt and its solution, or another completion of it."""
        return self.example.format(prompt=row["prompt"], completion=completion or solution(row))

    def __call__(self, examples: Sequence[str], prompt: str) -> str:
        """The teacher's prompt; without examples it is the student's."""
        return self.whole.format(examples=self.between.join(examples), prompt=prompt) if any(examples) else prompt


@dataclass(frozen=True)
class Context:
    """Base: a subclass says which examples a row is shown."""

    layout: Layout = Layout()

    def examples(self, row: Any, completion: str) -> list[str]:
        raise NotImplementedError

    def __call__(self, row: Any, completion: str = "") -> str:
        return self.layout(self.examples(row, completion), row["prompt"])


@dataclass(frozen=True)
class Demonstration(Context):
    """The row's own reference solution."""

    field: str = "completion"

    def examples(self, row: Any, completion: str) -> list[str]:
        return [self.layout.shown(row, solution(row, self.field))]


@dataclass(frozen=True, kw_only=True)
class FewShot(Context):
    """`shots` rows of a pool, those ranked first for the row after the `skip` first ones."""

    pool: Sequence[Row]
    rank: Rank
    shots: int = 1
    skip: int = 0

    def examples(self, row: Any, completion: str) -> list[str]:
        chosen = _enough(self.rank(row, self.skip + self.shots), self.skip + self.shots)[self.skip :]
        return [self.layout.shown(self.pool[i]) for i in chosen]


def few_shots(pool: Sequence[Row], rank: Rank, contexts: int, shots: int, layout: Layout) -> list[Context]:
    """K contexts of `shots` examples each that share none: the first takes the best ranked, the next those after them."""
    return [FewShot(layout, pool=pool, rank=rank, shots=shots, skip=k * shots) for k in range(contexts)]


@dataclass(frozen=True, kw_only=True)
class Instruction(Context):
    """An instruction in place of examples, the same for all rows."""

    text: str

    def examples(self, row: Any, completion: str) -> list[str]:
        return [self.text]


@dataclass(frozen=True, kw_only=True)
class Negative(Context):
    """A plausible wrong answer: the row's field `wrong`, else the solution of the most similar row that has another one."""

    pool: Sequence[Row]
    rank: Rank
    field: str = "wrong"
    looked_at: int = 50  # ranked rows that are tried

    def examples(self, row: Any, completion: str) -> list[str]:
        wrong = row.get(self.field)
        if not wrong:
            right = {solution(row), row.get("answer")}
            near = (solution(self.pool[i]) for i in self.rank(row, self.looked_at))
            wrong = next((text for text in near if text not in right), None)
        if not wrong:
            raise DataError(
                f"No wrong answer for {row['prompt']!r}: the row has no {self.field}, and the rows like it have its own "
                f"solution. Give the rows a field {self.field}."
            )
        return [self.layout.shown(row, wrong)]


@dataclass(frozen=True, kw_only=True)
class ContextDropout(Context):
    """Another context that loses, with probability `rate`, its examples ("all") or a run of words of them ("span").

    The coin and the place are keyed by the row and the student's completion: another rollout is another draw. share: of the
    words, that a span takes (rounded, at least one). Rate and share are unsourced.
    """

    of: Context
    rate: float = 0.1
    drop: Literal["all", "span"] = "all"
    share: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1 or not 0 < self.share <= 1 or self.drop not in ("all", "span"):
            raise RecipeError(
                "ContextDropout takes a rate in [0, 1], a share in (0, 1] and drop 'all' or 'span', got "
                f"{self.rate}, {self.share} and {self.drop!r}."
            )

    def examples(self, row: Any, completion: str) -> list[str]:
        found = self.of.examples(row, completion)
        name = keyed.key(self.seed, "context dropout", row["prompt"], completion)
        coin, place = keyed.uniform(name, torch.arange(2)).tolist()
        if coin >= self.rate:
            return found
        return [] if self.drop == "all" else [without_span(text, self.share, place) for text in found]

    def __call__(self, row: Any, completion: str = "") -> str:
        return self.of.layout(self.examples(row, completion), row["prompt"])


def without_span(text: str, share: float, place: float) -> str:
    """The text without a contiguous `share` of its words (split at single spaces); `place` in (0, 1) says which."""
    words = text.split(" ")
    length = max(1, round(share * len(words)))
    start = min(int(place * (len(words) - length + 1)), len(words) - length)
    return " ".join(words[:start] + words[start + length :])


@dataclass(frozen=True)
class ByChance:
    """Rows of the pool in an order keyed by the asked prompt; rows with that very prompt are left out."""

    pool: Sequence[Row]
    seed: int = 0

    def __call__(self, row: Row, count: int) -> list[int]:
        order = keyed.permutation(keyed.key(self.seed, "few shots", row["prompt"]), len(self.pool)).tolist()
        return [i for i in order if self.pool[i]["prompt"] != row["prompt"]][:count]


@dataclass(frozen=True)
class BySimilarity:
    """Rows of the pool by the similarity of their prompts to the asked one: the cosine of two vectors, ties in order.

    embedding: "tfidf" (words and signs, of the pool; scikit-learn), or a model of sentence-transformers (UniSD's code has
    MiniLM). own: whether a row with the very prompt may be found, whose solution is then the row's demonstration.
    """

    pool: Sequence[Row]
    embedding: str = "tfidf"
    own: bool = False

    @cached_property
    def _vectors(self) -> tuple[Callable[[Sequence[str]], Any], Any, dict[str, list[int]]]:
        prompts = [str(row["prompt"]) for row in self.pool]
        embed = embedder(self.embedding, prompts)
        return embed, embed(prompts), {}  # and what was found already

    def __call__(self, row: Row, count: int) -> list[int]:
        embed, vectors, found = self._vectors
        prompt = row["prompt"]
        if len(found.get(prompt, ())) < count:
            like = vectors @ embed([prompt]).T
            like = torch.as_tensor(like.toarray() if hasattr(like, "toarray") else like).flatten()
            order = like.argsort(descending=True, stable=True).tolist()
            found[prompt] = [i for i in order if self.own or self.pool[i]["prompt"] != prompt][:count]
        return found[prompt][:count]


def embedder(name: str, texts: Sequence[str]) -> Callable[[Sequence[str]], Any]:
    """Texts to unit vectors [n, D]: TF-IDF with the weights of `texts`, or a model of sentence-transformers by its name."""
    if name == "tfidf":
        text = require("sklearn.feature_extraction.text", "data")
        made: Callable[[Sequence[str]], Any] = text.TfidfVectorizer(token_pattern=r"\w+|[^\w\s]").fit(texts).transform
        return made
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as cause:
        raise MissingExtra(
            f"The embedding {name} needs sentence-transformers, which is not installed. Install it with: pip install "
            "sentence-transformers. Or take the embedding tfidf."
        ) from cause
    model = SentenceTransformer(name, trust_remote_code=False)
    return lambda texts: model.encode(list(texts), normalize_embeddings=True)


def induce(
    model: Any,
    pool: Sequence[Row],
    contexts: int,
    *,
    layout: Layout,
    examples: int = 4,
    ask: str = "What instruction do these examples follow? Say it in one sentence.",
    temperature: float = 0.7,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> list[str]:
    """K instructions that a model makes of `examples` rows each, drawn at random: for `Instruction` contexts.

    Source: UniSD's code, 3 to 5 demonstrations at temperature 0.7. Once for all rows (unsourced).
    """
    drawn = [keyed.permutation(keyed.key(seed, "induction", k), len(pool)).tolist()[:examples] for k in range(contexts)]
    questions = [
        layout.between.join([*(layout.shown(pool[i]) for i in _enough(rows, examples)), ask]) for rows in drawn
    ]
    tokens = [prompt_tokens(question, model.tokenizer, None) for question in questions]
    prompts = prompt_batch(tokens, model.tokenizer, torch.arange(contexts))
    said = sample(
        model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=keyed.key(seed, "induced")
    )
    return [model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in completions_of(said)]


def _enough(found: list[int], count: int) -> list[int]:
    if len(found) < count:
        raise DataError(f"{count} other rows are wanted as examples, and there are {len(found)}. Ask for fewer.")
    return found
