"""The records of a run (`Run.record`) as the template shows them. A record of unknown form is shown as its JSON."""

import base64
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from potstill.report import numbers
from potstill.report.charts import Series, line_chart

IMAGES = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".gif": "gif", ".webp": "webp", ".svg": "svg+xml"}
TOP_SHARE = 0.95  # the colour scale of token values ends here, so that one outlier does not fade the rest


def record_view(path: Path, folder: Path) -> dict[str, Any]:
    """A record's file: type, title, note, and what its type shows."""
    try:
        record = json.loads(path.read_text())
        head = {"id": path.stem, "type": record["type"], "title": str(record["title"]), "note": record.get("note")}
    except (ValueError, KeyError, TypeError, AttributeError):
        return _raw({"id": path.stem, "title": path.stem, "note": f"{path.name} is no record."}, path.read_text())
    if head["type"] not in VIEWS:
        return _raw(head, json.dumps(record, indent=1, ensure_ascii=False))
    try:
        return {**head, **VIEWS[head["type"]](record, folder)}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as cause:
        why = f"{cause} is missing" if isinstance(cause, KeyError) else str(cause)
        problem = f"This is not of the form of a {head['type']} record: {why}."
        return _raw({**head, "note": problem}, json.dumps(record, indent=1, ensure_ascii=False))


def _raw(head: Mapping[str, Any], body: str) -> dict[str, Any]:
    return {**head, "type": "json", "body": body}


def table(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    columns, rows = [str(c) for c in record["columns"]], [list(row) for row in record["rows"]]
    if any(len(row) != len(columns) for row in rows):
        raise ValueError(f"rows must have {len(columns)} cells")
    by_column = [list(values) for values in zip(*rows)] if rows else [[] for _ in columns]
    numeric = [any(map(numbers.is_number, c)) and all(v is None or numbers.is_number(v) for v in c) for c in by_column]
    cells = [
        numbers.column(values) if number else list(map(numbers.shown, values))
        for values, number in zip(by_column, numeric)
    ]
    return {"columns": list(zip(columns, numeric)), "rows": [list(zip(row, numeric)) for row in zip(*cells)]}


def texts(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    columns = [str(c) for c in record["columns"]]
    rows = [
        {"prompt": str(row.get("prompt", "")), "cells": [str(row.get(c, "")) for c in columns]}
        for row in record["rows"]
    ]
    return {"columns": columns, "rows": rows}


def token_values(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Tokens with a share in -1..1 of the colour scale that all sentences have in common, and so their weights, if any."""
    finite = sorted(abs(v) for s in record["sentences"] for v in s["values"] if v is not None and math.isfinite(v))
    top = finite[min(len(finite) - 1, int(TOP_SHARE * len(finite)))] if finite else 0.0
    heaviest = max((w for s in record["sentences"] for w in s.get("weights", ())), default=0.0)
    unit = str(record.get("unit", ""))
    sentences = []
    for sentence in record["sentences"]:
        if len(sentence["tokens"]) != len(sentence["values"]):
            raise ValueError("a sentence needs one value a token")
        weights = sentence.get("weights", [None] * len(sentence["tokens"]))
        if len(weights) != len(sentence["tokens"]):
            raise ValueError("a sentence needs one weight a token, or none at all")
        tokens = []
        for token, value, weight in zip(sentence["tokens"], sentence["values"], weights):
            known = value is not None and not math.isnan(value)
            share = max(-1.0, min(1.0, value / top)) if known and top else 0.0
            hover = f"{numbers.shown(float(value))} {unit}".strip() if known else "no value"
            if weight is not None:
                hover += f", weight {numbers.shown(float(weight))}"
            heavy = round(max(0.0, weight) / heaviest, 3) if weight is not None and heaviest > 0 else 0.0
            look = {"share": round(abs(share), 3), "below": share < 0, "known": known, "heavy": heavy}
            tokens.append({"text": str(token), "hover": hover, **look})
        sentences.append({"label": sentence.get("label"), "tokens": tokens})
    signed = any(v < 0 for s in record["sentences"] for v in s["values"] if v is not None)
    capped = bool(finite) and finite[-1] > top
    scale = {"top": top, "signed": signed, "capped": capped, "heaviest": heaviest}
    return {"sentences": sentences, "unit": unit, **scale}


def images(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Files below the run folder, embedded."""
    views = []
    for file in record["files"]:
        path, form = folder / file["path"], IMAGES.get(Path(file["path"]).suffix.lower())
        data = None
        if form and path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            data = f"data:image/{form};base64,{base64.b64encode(path.read_bytes()).decode()}"
        views.append({"data": data, "caption": str(file.get("caption", "")), "path": str(file["path"])})
    return {"files": views}


def curves(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    series = [Series(str(s["label"]), _numbers(s["x"]), _numbers(s["y"])) for s in record["series"]]
    if any(len(s.x) != len(s.y) for s in series):
        raise ValueError("a series needs as many y as x")
    svg, remark = line_chart(
        series,
        width=8.0,
        height=3.4,
        x_label=str(record.get("x_label", "")),
        y_label=str(record.get("y_label", "")),
        log_x=bool(record.get("log_x")),
        log_y=bool(record.get("log_y")),
    )
    return {"svg": Markup(svg), "labels": [s.label for s in series], "remark": remark}


def text(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {"body": str(record["body"])}


def _numbers(values: list[Any]) -> list[float]:
    return [math.nan if v is None else float(v) for v in values]


VIEWS: dict[str, Callable[[Mapping[str, Any], Path], dict[str, Any]]] = {
    "table": table, "texts": texts, "token_values": token_values, "images": images, "curves": curves, "text": text,
}  # fmt: skip
