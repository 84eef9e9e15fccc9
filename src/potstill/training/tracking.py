"""Metrics of a run: `metrics.jsonl` (no wall clock: a resumed run writes the same bytes) and `timing.jsonl`."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from potstill.contracts.files import disk_errors


class Journal:
    """Appends rows to a run folder's journals; can be cut back to where a checkpoint stood."""

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self.metrics, self.timing, self.writes = folder / "metrics.jsonl", folder / "timing.jsonl", writes
        if writes:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self.metrics.touch()

    def write(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if self.writes and values:
            self._append(self.metrics, {"stage": stage, "step": step, **values})

    def clock(self, stage: str, step: int, seconds: float, samples: int) -> None:
        if self.writes:
            row = {
                "stage": stage,
                "step": step,
                "seconds": round(seconds, 4),
                "samples": samples,
                "at": round(time.time(), 1),
            }
            self._append(self.timing, row)

    def position(self) -> int:
        """How many bytes of metrics stand on disk."""
        return self.metrics.stat().st_size if self.metrics.is_file() else 0

    def cut(self, position: int) -> None:
        """Forget what was written after a checkpoint, and any half-written line."""
        if self.writes and self.metrics.is_file() and self.position() > position:
            os.truncate(self.metrics, position)

    def forget(self, stage: str) -> None:
        """Cut back to before the first row of a stage: it died before its first checkpoint."""
        at = 0
        for line in self.metrics.read_bytes().splitlines(keepends=True) if self.metrics.is_file() else []:
            if not line.endswith(b"\n") or json.loads(line)["stage"] == stage:
                break
            at += len(line)
        self.cut(at)

    @staticmethod
    def _append(path: Path, row: Mapping[str, Any]) -> None:
        with disk_errors(path), path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The rows of a journal; a half-written last line is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
