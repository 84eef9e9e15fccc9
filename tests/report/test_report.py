"""What a reader of the report relies on: all is there, nothing is fetched or run, odd values and odd files break nothing."""

import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from potstill.contracts.errors import RunError
from potstill.report import build_report, numbers
from potstill.report.build import collect, facts, metric_view, timing_view
from potstill.report.charts import POINTS, SMOOTH_FROM, Series, line_chart, wide_range
from potstill.report.records import record_view

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Checks that tags close in order; collects the text, the tags and what they refer to."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.links, self.words = [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [(tag, k, v) for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action")]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


@pytest.fixture
def page(finished_run):
    path = build_report(finished_run)
    assert path == finished_run / "report.html"
    return Page(path.read_text())


def test_everything_of_a_finished_run_is_there(page):
    for expected in (
        "vOPD: KL for a KL",
        "arXiv 2605.07865",
        "finished",
        "teacher_share: 0.1",
        "cut from teacher, layers 2",
        "Stage warm up, 40 steps",
        "Stage distil, 400 steps",
        "evaluation",
        "critic: gradient norm",
        "Stage distil was interrupted and repeated 10 steps.",
        "model.safetensors",
        "last rollouts",
        "Three seeds each.",
        "5.2.0",
    ):
        assert expected in page.text
    assert "potstill resume" not in page.text


def test_nothing_is_fetched_and_no_script_runs(page):
    assert "script" not in page.tags
    for tag, key, target in page.links:
        inside = target.startswith(("data:", "#"))
        assert inside or (tag == "a" and key == "href"), (tag, key, target)
    assert "<script>alert('&')</script>" in page.text  # shown as text


def test_style_and_svg_refer_to_nothing_outside(finished_run):
    html = build_report(finished_run).read_text()
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ET.fromstring(svg.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1))
        for target in re.findall(r'xlink:href="#([^"]*)"', svg) + re.findall(r"url\(#([^)]*)\)", svg):
            assert f'id="{target}"' in svg  # what is referred to survived the cleaning


def test_an_unfinished_run_says_how_far_it_came(unfinished_run):
    page = Page(build_report(unfinished_run).read_text())
    assert "unfinished" in page.text
    assert "stage distil, step 130 of 400" in page.text
    assert f"potstill resume {unfinished_run}" in page.text
    assert "Result" not in page.text


def test_a_run_that_has_only_begun(tmp_path):
    (tmp_path / "recipe.yaml").write_text("method: vopd\ndata: tiny_stories\n")
    page = Page(build_report(tmp_path).read_text())
    assert "no step logged yet" in page.text
    (tmp_path / "metrics.jsonl").write_text('{"stage": "distil", "step": 1, "student/loss": NaN}\n{"stage": "dis')
    assert "step 1" in Page(build_report(tmp_path).read_text()).text


def test_a_method_that_the_catalogue_does_not_know(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"method": {"name": "of_my_own"}, "data": {"text": "a.txt"}}))
    assert "of_my_own" in Page(build_report(tmp_path).read_text()).text


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("english", "english"),
        ({"task": "english", "length": 64}, "english"),
        ({"length": 64, "jsonl": "a.jsonl"}, "jsonl:a.jsonl"),
        ({"length": 64}, numbers.NONE),
    ],
)
def test_the_data_is_named(data, name):
    assert facts({"method": "vopd", "data": data}, [], None) == {"data": name}


def test_a_folder_of_no_run(tmp_path):
    with pytest.raises(RunError, match=r"holds no recipe.yaml, so it is no run folder"):
        build_report(tmp_path)


def test_tables_come_first_and_file_names_order_the_rest(finished_run):
    assert [r["id"][:2] for r in collect(finished_run)["records"]] == [
        "30",
        "10",
        "20",
        "25",
        "40",
        "45",
        "50",
        "60",
        "70",
        "80",
    ]


def test_the_same_folder_gives_the_same_page(finished_run):
    assert build_report(finished_run).read_text() == build_report(finished_run).read_text()


def test_unknown_and_malformed_records_are_shown_as_they_are(finished_run, tmp_path):
    new = record_view(finished_run / "records" / "70_new.json", finished_run)
    assert new["type"] == "json" and '"depth"' in new["body"]
    broken = record_view(finished_run / "records" / "80_broken.json", finished_run)
    assert broken["type"] == "json" and "'rows' is missing" in broken["note"]
    (tmp_path / "half.json").write_text('{"type": "tab')
    assert record_view(tmp_path / "half.json", tmp_path)["body"] == '{"type": "tab'
    (tmp_path / "list.json").write_text("[1, 2]")
    assert record_view(tmp_path / "list.json", tmp_path)["type"] == "json"


def view(tmp_path, **record):
    (tmp_path / "r.json").write_text(json.dumps({"title": "t", **record}))
    return record_view(tmp_path / "r.json", tmp_path)


def test_token_values_share_one_scale_and_outliers_do_not_fade_it(tmp_path):
    ordinary = {"tokens": ["a"] * 99, "values": [1.0] * 98 + [0.5]}
    odd = {"tokens": ["x", "y", "z"], "values": [100.0, math.inf, math.nan]}
    shown = view(tmp_path, type="token_values", unit="nats", sentences=[ordinary, odd])
    assert shown["top"] == 1.0 and shown["capped"]
    first, second = (s["tokens"] for s in shown["sentences"])
    assert first[0]["share"] == 1.0 and first[-1]["share"] == 0.5  # half the value, half the colour, in any sentence
    assert [t["share"] for t in second] == [1.0, 1.0, 0.0]
    assert [t["hover"] for t in second] == ["100 nats", "∞ nats", "no value"]


def test_negative_token_values_get_the_other_colour(tmp_path):
    shown = view(tmp_path, type="token_values", sentences=[{"tokens": ["a", "b"], "values": [-2.0, 1.0]}])
    assert shown["signed"] and not shown["capped"]
    assert [(t["share"], t["below"]) for t in shown["sentences"][0]["tokens"]] == [(1.0, True), (0.5, False)]


def test_token_values_need_one_value_a_token(tmp_path):
    shown = view(tmp_path, type="token_values", sentences=[{"tokens": ["a", "b"], "values": [1.0]}])
    assert "a sentence needs one value a token" in shown["note"]


def test_weights_stand_over_the_tokens(tmp_path):
    """Their height is a share of the heaviest of all sentences; sentences without weights have no bars."""
    whole = {"tokens": ["a", "b", "c"], "values": [1.0, 0.0, math.nan], "weights": [0.5, 2.0, 0.0]}
    other = {"tokens": ["d", "e"], "values": [1.0, 1.0], "weights": [4.0, -1.0]}
    bare = {"tokens": ["f"], "values": [1.0]}
    shown = view(tmp_path, type="token_values", unit="nats", sentences=[whole, other, bare])
    assert shown["heaviest"] == 4.0
    assert [[t["heavy"] for t in s["tokens"]] for s in shown["sentences"]] == [[0.125, 0.5, 0.0], [1.0, 0.0], [0.0]]
    hovers = [t["hover"] for s in shown["sentences"] for t in s["tokens"]]
    assert hovers[:4] == [
        "1.000 nats, weight 0.5000",
        "0 nats, weight 2.000",
        "no value, weight 0",
        "1.000 nats, weight 4.000",
    ]
    assert hovers[-1] == "1.000 nats"
    wrong = view(tmp_path, type="token_values", sentences=[{"tokens": ["a"], "values": [1.0], "weights": [1.0, 2.0]}])
    assert "one weight a token, or none at all" in wrong["note"]


def test_a_page_shows_weights_only_where_there_are_some(finished_run):
    place, one = finished_run / "records" / "26_weights.json", {"tokens": ["a", "b"], "values": [1.0, 2.0]}
    for weights, bars, words in (({"weights": [0.0, 3.0]}, 1, True), ({}, 0, False)):
        place.write_text(json.dumps({"type": "token_values", "title": "t", "sentences": [{**one, **weights}]}))
        page = build_report(finished_run).read_text()
        assert page.count("--w:1.0") == bars and ("bar over a token is its weight; the highest is 3." in page) is words


def test_images_are_embedded_and_only_from_the_run_folder(finished_run):
    (finished_run.parent / "outside.png").write_bytes((finished_run / "records" / "a.png").read_bytes())
    files = record_view(finished_run / "records" / "50_images.json", finished_run)["files"]
    assert [bool(f["data"]) for f in files] == [True, True, False]
    assert files[0]["data"].startswith("data:image/png;base64,iVBOR")


def test_rows_of_a_table_must_fit_its_columns(tmp_path):
    assert "rows must have 2 cells" in view(tmp_path, type="table", columns=["a", "b"], rows=[[1]])["note"]
    empty = view(tmp_path, type="table", columns=["a", "b"], rows=[])
    assert empty["rows"] == [] and [name for name, _ in empty["columns"]] == ["a", "b"]


def test_metrics_of_several_models_become_a_table():
    several = metric_view(
        {"speed_up": 3.0, "teacher/accuracy": 0.9, "student/accuracy": 0.8, "student/reverse_kl": 0.1}
    )
    assert list(several["single"]) == ["speed_up"]
    assert several["table"] == {
        "columns": ["accuracy", "reverse KL"],
        "rows": [["teacher", "0.9000", numbers.NONE], ["student", "0.8000", "0.1000"]],
    }
    assert metric_view({"student/accuracy": 0.8}) == {"single": {"student/accuracy": 0.8}, "table": None}
    plain = metric_view({"nll": 2.0, "before_nll": 3.0, "teacher_nll": 1.0, "before_all": 5.0, "bytes": 9.0})
    assert plain["single"] == {"before_all": 5.0, "bytes": 9.0}
    assert plain["table"] == {"columns": ["NLL"], "rows": [["teacher", "1"], ["before", "3"], ["student", "2"]]}
    assert metric_view({}) == {"single": {}, "table": None}


def test_speed_is_that_of_the_median_step():
    rows = [{"stage": "s", "step": i + 1, "seconds": t, "samples": 8, "at": 0.0} for i, t in enumerate([9.0, 0.5, 0.5])]
    (only,) = timing_view(rows)
    assert (only["rate"], only["samples"], only["slowest"], only["seconds"], only["repeated"]) == (
        2.0,
        16.0,
        9.0,
        10.0,
        0,
    )


def test_a_loss_of_one_term_is_not_drawn_twice(finished_run):
    warm_up, distil = collect(finished_run)["stages"]
    assert [c["title"] for c in warm_up["players"]["student"]] == ["cross entropy"]
    assert [c["title"] for c in distil["players"]["student"]][:2] == ["loss", "divergence"]
    assert {c["key"] for c in distil["folded"]} == {
        f"{p}/{m}" for p in ("student", "critic") for m in ("lr", "gradient_norm")
    }


def lines(svg):
    """The drawn lines: (opacity, number of points)."""
    drawn = re.findall(r'<path d="(M[^"]*)"[^>]*style="fill: none; stroke: var\(--series-\d\)([^"]*)"', svg)
    return [("stroke-opacity" in style, path.count("M") + path.count("L")) for path, style in drawn]


def test_what_cannot_be_drawn_is_counted():
    _, remark = line_chart([Series("", [1, 2, 3], [1.0, math.nan, math.inf])])
    assert remark == "2 values not drawn (not finite)."
    _, remark = line_chart([Series("", [1, 2, 3], [1.0, 0.0, 2.0])], log_y=True)
    assert remark == "1 value not drawn (not finite, or not above 0)."
    svg, remark = line_chart([Series("", [1, 2], [math.nan, math.nan])], log_y=True)
    assert remark.startswith("2 values") and svg.startswith("<svg")
    assert line_chart([])[0].startswith("<svg")


def test_many_points_are_thinned_and_noise_is_smoothed():
    random = np.random.default_rng(0)
    many = Series("", list(range(4000)), list(random.normal(size=4000)))
    drawn = lines(line_chart([many], smooth=True)[0])
    assert [faint for faint, _ in drawn] == [True, False]
    assert max(points for _, points in drawn) <= POINTS
    few = Series("", list(range(SMOOTH_FROM - 1)), list(random.normal(size=SMOOTH_FROM - 1)))
    assert [faint for faint, _ in lines(line_chart([few], smooth=True)[0])] == [False]


def test_labels_are_text_and_never_formulas():
    svg, _ = line_chart([Series("", [1, 2], [1, 2])], x_label="$x$ <&>", y_label="$\\bad")
    assert "$x$ &lt;&amp;&gt;" in svg and "$\\bad" in svg


def test_wide_ranges():
    assert wide_range([1.0, 101.0]) and not wide_range([1.0, 99.0])
    assert not wide_range([0.0, 1e6]) and not wide_range([math.nan])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.91234, "0.9123"), (12.3456, "12.35"), (1234567.0, "1,234,567"), (-0.5, "−0.5000"), (0, "0"), (0.0, "0"),
        (3.2e-6, "3.200e-6"), (math.nan, "NaN"), (math.inf, "∞"), (-math.inf, "−∞"), (None, "–"), (True, "yes"),
        (12345, "12,345"), ("text", "text"), (1.0, "1.000"), (2.5e12, "2.500e12"),
    ],
)  # fmt: skip
def test_numbers(value, text):
    assert numbers.shown(value) == text


def test_a_column_lines_up():
    assert numbers.column([8.1234, 11.9, None, math.nan]) == ["8.12", "11.90", "–", "NaN"]
    assert numbers.column([0.5, 20000.0]) == ["0.5000", "20,000"]  # too far apart for one precision
    assert numbers.column([1.0, 250.0]) == ["1", "250"]
    assert numbers.column([]) == []


def test_sizes_and_durations():
    assert [numbers.size(n) for n in (1000, 2048, 1536 * 1024, 200 * 1024)] == [
        "1000 bytes",
        "2.0 KiB",
        "1.5 MiB",
        "200 KiB",
    ]
    assert [numbers.duration(s) for s in (3.21, 75, 3720)] == ["3.2 s", "1 min 15 s", "1 h 2 min"]
    assert [numbers.signed(v) for v in (0.5, -0.5, 0.0)] == ["+0.5000", "−0.5000", "0"]


def test_the_claim_and_its_verdict(tmp_path, claims):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("method: {name: gkd}\ndata: tiny\n")
    assert "Not verified yet: potstill verify gkd" in Page(build_report(run).read_text()).text
    claims([-0.3, -0.2, -0.25])
    text = Page(build_report(run).read_text()).text
    assert "Sampling from the student beats the data's text." in text and "section 4" in text
    assert "reproduced. It comes from runs of its own, not from this one." in text
    assert "own over given reverse KL +0.2500 +0.1258 to +0.3742 3 reproduced" in re.sub(r"\s+", " ", _cells(run))


def _cells(run):
    return re.sub(r"<[^>]+>", " ", (run / "report.html").read_text())
