"""The page of a run says what its rows say, needs nothing else, and survives unfinished and unusual
runs.
"""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest

from effopd.commands.main import main
from effopd.errors import ConfigError
from effopd.report.run_charts import run_looks, search_chart, training_chart
from effopd.report.run_data import read_runs
from effopd.report.run_figures import quality_figure
from effopd.report.run_page import write_run_page
from effopd.report.run_summary import sentences
from effopd.report.style import Look
from effopd.runs.records import EvaluationRecord, SearchRecord


def cost(step, **more):
    phases = {
        f"cost/{phase}_seconds": step * share for phase, share in (("rollout", 1.0), ("update", 2.0), ("eval", 1.0))
    }
    return {
        "step": step,
        **phases,
        "cost/net_seconds": 3.0 * step,
        "cost/net_generated_tokens": 100 * step,
        "cost/net_forward_tokens": 500 * step,
        **more,
    }


def search(step, accepted, trials):
    return {
        "step": step,
        "delta_norm": 0.125,
        "accepted_scale": accepted,
        "seconds": 0.5,
        "learning_rate_factor": 2.0,
        "trials": trials,
    }


def trial(scale, score, per_example=()):
    return {"scale": scale, "verdict": "rejected", "score": score, "per_example": list(per_example)}


def write_rows(root, evals=(), metrics=(), searches=(), config="learning_rate: 3.0e-05\n"):
    """A run directory of given rows."""
    root.mkdir(parents=True)
    for file, rows in (("evals", evals), ("metrics", metrics), ("searches", searches)):
        if rows:
            (root / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "config.yaml").write_text(config)
    return root


@pytest.fixture
def make_run(tmp_path):
    """Writes a run directory of given rows."""
    return lambda name, *rows, **more: write_rows(tmp_path / name, *rows, **more)


class Page(HTMLParser):
    """Text, tags and addresses of a page; every tag must be closed."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], [], [], ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


KLS = {0: 0.2, 2: 0.1, 4: 0.04321}
EVALS = [cost(step, eval_kl=kl, eval_kl_se=0.002, eval_accuracy=0.5, eval_accuracy_low=0.4, eval_accuracy_high=0.6)
         for step, kl in KLS.items()]  # fmt: skip
EVALUATIONS = [EvaluationRecord.from_row(row) for row in EVALS]
METRICS = [cost(step, loss=1.0 / step, learning_rate=1e-4) for step in range(1, 5)]
SEARCHES = [
    search(
        2,
        4.0,
        [trial(0.0, -1.0, (-2.0, 0.0)), trial(4.0, -0.75, (-1.5, 0.0)), trial(8.0, None) | {"verdict": "non-finite"}],
    ),
    search(4, 0.0, [trial(0.0, -0.5, (-1.0, 0.0)), trial(1.0, -0.625, (-1.25, 0.0))]),
]


def test_the_page_says_what_the_rows_say_and_needs_nothing_else(make_run):
    root = make_run("first", EVALS, METRICS, SEARCHES)
    assert main(["report", str(root)]) == 0
    html = (root / "report.html").read_text()
    page = Page(html)
    assert page.addresses == ["metrics.jsonl", "evals.jsonl", "searches.jsonl", "config.yaml"]  # the raw rows
    assert not {"link", "img"} & set(page.tags) and "http" not in html.replace("http://www.w3.org/2000/svg", "")
    assert re.findall(r'<figure class="[^"]*" id="([^"]*)" data-alt="[^"]+', html) == [
        "quality", "jumps", "searches-0", "training"
    ]  # fmt: skip
    assert "0.04321 ± 0.00200" in page.text and "0.500 [0.400, 0.600]" in page.text
    assert "4: -0.75" in page.text and "8: not finite" in page.text
    assert re.findall(r'<b class="taken">([^<]*)', html) == ["4: -0.75", "0: -0.5"]
    assert "12.0" in page.text and "4.0 s (25%)" in page.text and "8.0 s (50%)" in page.text  # net; rollout and update


def test_panels_show_the_paired_gain_and_where_the_model_went():
    records, look = [SearchRecord.from_row(row) for row in SEARCHES], Look("#000000", "#ffffff")
    first, second = search_chart("x", "run", records, look).drawn
    (line,) = first.series
    assert list(line.x) == [0.0, 4.0] and list(line.y) == [0.0, 0.25]  # gains 0.5 and 0 of the two examples
    assert (line.low[1], line.high[1]) == pytest.approx((0.25 - 2 * 0.25, 0.25 + 2 * 0.25))  # standard error 0.25
    assert [[rule.at for rule in panel.rules if rule.vertical] for panel in (first, second)] == [[4.0], [0.0]]
    start_alone = search(1, 0.0, SEARCHES[0]["trials"][:1])
    assert search_chart("x", "run", [SearchRecord.from_row(start_alone)], look) is None


@pytest.mark.parametrize("examples", [((0.25,), (0.75,)), ((0.25, 0.25), (0.75,))])
def test_a_gain_that_cannot_be_paired_has_no_error(make_run, examples):
    rows = [search(1, 4.0, [trial(0.0, 0.25, examples[0]), trial(4.0, 0.75, examples[1])])]
    records = [SearchRecord.from_row(row) for row in rows]
    (panel,) = search_chart("x", "run", records, Look("#000000", "#ffffff")).drawn
    (line,) = panel.series
    assert list(line.y)[1] == 0.5 and list(line.low)[1] is None and list(line.high)[1] is None
    root = make_run("run", EVALS, METRICS, rows)
    Page(write_run_page([root], root / "page.html").read_text())


@pytest.mark.slow
def test_curves_have_a_point_an_evaluation_and_jumps_are_marked_after_they_happened():
    searches = [SearchRecord.from_row(SEARCHES[0] | {"step": 3})]
    figure = quality_figure({"a": EVALUATIONS}, {"a": searches}, target=0.05)
    by_step, by_seconds = figure.axes[:2]
    raw = next(line for line in by_seconds.get_lines() if line.get_label() == "a")
    assert raw.get_marker() == "o" and not any(line.get_alpha() for line in by_seconds.get_lines())
    assert list(raw.get_xdata()) == [0.0, 6.0, 12.0] and list(raw.get_ydata()) == list(KLS.values())
    marks = [line.get_xdata() for line in by_step.get_lines() if line.get_marker() == "^" and len(line.get_xdata())]
    assert [list(x) for x in marks] == [[4]]
    assert any(line.get_label() == "target" and line.get_ydata()[0] == 0.05 for line in by_step.get_lines())


def test_no_curve_is_smoothed():
    kls = [0.2, 0.02, 0.15, 0.01, 0.1]
    rows = [cost(step, eval_kl=kl, eval_kl_se=0.001) for step, kl in enumerate(kls)]
    for axis in quality_figure({"a": [EvaluationRecord.from_row(row) for row in rows]}, {}).axes:
        assert [list(line.get_ydata()) for line in axis.get_lines() if len(line.get_ydata())] == [kls]


@pytest.mark.slow
def test_seconds_of_a_cpu_clock_are_called_so(make_run):
    cpu = make_run("cpu", EVALS, METRICS, config="cost_clock: cpu\n")
    wall = make_run("wall", EVALS, METRICS)
    one = write_run_page([cpu], cpu / "page.html").read_text()
    assert "net CPU seconds (search charged" in one and "<th>net CPU seconds</th>" in one
    other = write_run_page([wall], wall / "page.html").read_text()
    assert "net seconds (search charged" in other and "CPU" not in other
    both = write_run_page([cpu, wall], cpu / "both.html").read_text()
    assert "net seconds; of CPU time in cpu" in both and "12.0 CPU seconds" in both and "12.0 seconds" in both


@pytest.mark.slow
def test_several_runs_share_axes_and_are_told_apart(make_run):
    roots = [make_run(f"{name}/lr-1/seed-0", EVALS, METRICS) for name in ("plain", "line_search")]
    assert [run.label for run in read_runs(roots)] == ["plain/lr-1/seed-0", "line_search/lr-1/seed-0"]
    runs = read_runs(roots)
    panels = training_chart(runs, run_looks(runs)).drawn
    assert [(panel.title, len(panel.series)) for panel in panels] == [("loss", 2), ("learning rate", 2)]
    page = Page(write_run_page(roots, roots[0] / "both.html").read_text())
    assert "plain/lr-1/seed-0" in page.text and "line_search/lr-1/seed-0" in page.text


def test_settings_are_text_whatever_they_hold(make_run):
    root = make_run("x", EVALS, config="# effopd 0.1.0\nmodel_name_or_path: <script>alert(1)</script>\n")
    page = Page(write_run_page([root], root / "page.html").read_text())
    plain = Page(write_run_page([make_run("y", EVALS)], root / "other.html").read_text())
    assert page.tags.count("script") == plain.tags.count("script")
    assert "<script>alert(1)</script>" in page.text and "effopd 0.1.0" in page.text


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [
        {"metrics": METRICS},  # no evaluation yet
        {"metrics": [cost(1, reward=0.5)], "evals": [cost(0, eval_accuracy=0.5)]},  # reinforcement learning
        {"evals": EVALS[:1]},  # just begun
        {"evals": [{"step": 2, "eval_loss": 1.0, "eval_runtime": 0.5}]},  # the host's own evaluation
        {
            "metrics": METRICS[:1],
            "searches": [search(1, 0.0, [trial(0.0, None), trial(1.0, 1.0)])],
        },  # nothing to compare with
        {
            "metrics": METRICS,
            "searches": [search(1, 1.0, [trial(0.0, 0.5), trial(1.0, None)])],
        },  # a jump without asking
        {"metrics": METRICS, "searches": [search(1, 0.0, [trial(0.0, 0.5), trial(0.0, 0.5)])]},  # one scale twice
        {
            "metrics": METRICS,
            "searches": [search(1, 2.0, [trial(0.0, 0.5), trial(2.0, 0.75)])],
        },  # scores without examples
    ],
)
def test_unfinished_and_unusual_runs(make_run, rows):
    root = make_run("run", **rows)
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # cut short by a kill
    Page(write_run_page([root], root / "page.html").read_text())


def test_what_is_no_run_is_refused_and_nothing_is_written(make_run, capsys, tmp_path):
    root, empty = make_run("run", EVALS), make_run("empty")
    assert main(["report", str(root), str(empty), "--out", str(tmp_path / "page.html")]) == 2
    assert "empty is not a run directory: expected rows in metrics.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(ConfigError, match="each run once"):
        read_runs([root, root])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "metrics.jsonl",
            b'{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n',
            "metrics.jsonl, line 2: expected a JSON object",
        ),
        ("metrics.jsonl", b'{"step": 1}\n[2]\n', "metrics.jsonl, line 2: expected a JSON object, got a list"),
        ("evals.jsonl", b'{"step": 1}\n\xff\xfe\n', "evals.jsonl, line 2: expected a JSON object"),
        ("config.yaml", b"seed: 1\nargs: {a: 1", 'config.yaml", line 2'),
        ("config.yaml", b"seed: 1\ntask: \xff\n", "config.yaml: expected text in utf-8, got the byte 0xff"),
        ("config.yaml", b"- 1\n", "config.yaml, line 1: expected a mapping of settings, got a list"),
        ("config.yaml", b"effopd: [1]\n", "config.yaml: effopd: expected a block, {strategy: \u2026}, got [1]"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(make_run, capsys, file, content, message):
    root = make_run("run", EVALS)
    (root / file).write_bytes(content)
    assert main(["report", str(root)]) == 2
    assert message in capsys.readouterr().err
    assert not (root / "report.html").exists()


def test_a_file_is_no_run(make_run, capsys):
    file = make_run("run", EVALS) / "evals.jsonl"
    assert main(["report", str(file)]) == 2
    said = capsys.readouterr().err
    assert "evals.jsonl: is a file. Expected the output directory" in said and "--out" not in said


def test_the_summary_compares_runs_of_one_task_and_names_the_strategy_of_each(make_run):
    searching = "effopd: {strategy: line_search}\n"
    fast = [cost(step, eval_kl=kl, eval_kl_se=0.001) for step, kl in ((0, 0.2), (1, 0.05), (2, 0.01), (3, 0.01))]
    roots = [make_run("a", EVALS), make_run("b", fast, searches=SEARCHES, config=searching), make_run("c", EVALS[:1])]
    runs = read_runs(roots)
    assert [run.strategy for run in runs] == ["plain", "line_search", "plain"]
    text = sentences(runs)
    assert text[0].startswith(
        "a: held-out reverse KL fell from 0.2 to 0.04321 nats per token; accuracy went from 0.500"
    )
    assert "b: 2 searches, 1 accepted; the longest jump is 4Δ at step 2." in text
    assert (
        "b reached a's final KL (0.1, median of the last three) after 2 steps instead of 4, 2.00× as fast" in text[4]
    )
    assert text[5] == "c did not reach a's final KL (0.1, median of the last three) in 0 steps."
    other_task = make_run("d", EVALS, config="task: gsm8k\n")
    assert not [line for line in sentences(read_runs([roots[0], other_task])) if "reached" in line]


def test_step_0_reaches_no_target_and_a_target_is_finite(make_run):
    def row(step, kl):
        return cost(step, eval_kl=kl, eval_kl_se=0.001)

    fast = make_run("b", [row(0, 0.2), row(1, 0.05), row(2, 0.01)])
    worse = make_run("a", [row(0, 0.2), row(1, 0.3), row(2, 0.3)])
    text = sentences(read_runs([worse, fast]))
    assert any("after 1 steps instead of 1, 1.00× as fast" in line for line in text)
    for name, rows in (("diverged", [row(0, 0.2), row(1, math.nan), row(2, math.nan)]), ("begun", [row(0, 0.2)])):
        text = sentences(read_runs([make_run(name, rows), fast]))
        assert text[-1] == f"Times to a common KL are left out: {name} has no finite KL after step 0."


@pytest.mark.parametrize(
    ("setting", "other"),
    [
        ("task", "gsm8k"),
        ("task_args", "{digits: 3}"),
        ("eval_task", "math:test.jsonl"),
        ("eval_task_args", "{digits: 3}"),
        ("eval_size", "20"),
        ("task_seed", "1"),
        ("model_name_or_path", "other"),
        ("teacher_model_name_or_path", "other"),
        ("max_completion_length", "32"),
        ("eval_temperature", "0.5"),
    ],
)
def test_runs_with_different_models_or_evaluations_have_no_speed_ups(make_run, setting, other):
    roots = [make_run("a", EVALS), make_run("b", EVALS, config=f"{setting}: {other}\n")]
    text = sentences(read_runs(roots))
    assert text[-1] == f"Times to a common KL are left out: the runs differ in {setting}."
    assert not [line for line in text if "reached" in line or "ratios" in line]
