"""The README's table of systems, from the catalogue and the claims' verdicts: python -m potstill.report.readme README.md"""

import sys
from pathlib import Path

from potstill.catalogue import System, systems
from potstill.contracts.errors import RunError
from potstill.contracts.files import write_text

BEGIN, END = "<!-- systems: begin, written by python -m potstill.report.readme README.md -->", "<!-- systems: end -->"


def table() -> str:
    """The numbered systems, then the baselines they compare with."""
    rows = list(systems().values())
    numbered = [row for row in rows if row.number is not None]
    built = sum(row.built for row in numbered)
    verdicts = [row.verdict() for row in numbered]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in ("reproduced", "not reproduced", "inconclusive"))
    lines = [
        f"{built} of {len(numbered)} systems are built. Claims that were run: {counts}.",
        "",
        "| # | method | paper | family | built | claim |",
        "|--:|---|---|---|---|---|",
        *(_row(row) for row in rows),
    ]
    return "\n".join(lines)


def _row(system: System) -> str:
    paper = f"[{_cell(system.title)}](https://arxiv.org/abs/{system.arxiv})" if system.arxiv else _cell(system.title)
    claim = system.verdict() or ("not run yet" if system.has_claim else "")
    cells = (
        str(system.number or ""),
        f"`{system.name}`",
        paper,
        system.family.replace("_", " "),
        "yes" if system.built else "not yet",
        claim,
    )
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("[", "\\[").replace("]", "\\]")


def updated(readme: str) -> str:
    """The README with the table between its two marks made anew."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise RunError(f"The README has lost the marks between which the table of systems stands: {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "README.md")
    write_text(path, updated(path.read_text()))
