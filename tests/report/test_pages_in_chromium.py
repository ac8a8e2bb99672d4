"""Every page in a headless Chromium: no console error, no horizontal scroll bar at 380 px, a name
for every figure; values on hover, zoom, legend and sorting work.
"""

from __future__ import annotations

import pandas as pd
import pytest
from helpers.chromium import Chromium, executable
from helpers.tiny_checkpoints import save_base, save_trained, save_trajectory
from report.test_compare_page import grid
from report.test_run_page import EVALS, METRICS, SEARCHES, write_rows

from effopd.analysis.analyze import analyze
from effopd.report.compare_html import write_compare_page
from effopd.report.dynamics_page import write_analysis_page
from effopd.report.intervention_page import write_intervention_page
from effopd.report.run_page import write_run_page

PROGRAM = executable()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed (apt-get install chromium)"),
    pytest.mark.usefixtures("one_thread"),
]
#: Longest page that fits the promise of one file below 3 MB.
LARGEST = 3_000_000


@pytest.fixture(scope="module")
def browser():
    opened = Chromium(PROGRAM)
    yield opened
    opened.close()


def run_page(root):
    runs = [
        write_rows(root / name, EVALS, METRICS, searches, f"effopd: {{strategy: {strategy}}}\n")
        for name, strategy, searches in (("a-run-with-a-rather-long-name/seed-0", "line_search", SEARCHES),
                                         ("b", "line_search", SEARCHES), ("c", "none", ()))
    ]  # fmt: skip
    return write_run_page(runs, root / "run.html")


def compare_page(root):
    return write_compare_page(grid(2, ("sums",)), root / "compare.html", root / "results.json")


def analysis_page(root):
    base = save_base(root / "base")
    save_trajectory(root / "opd", base, 1)
    save_trained(root / "sft", base, 2)
    metrics = ["norms", "spectrum", "subspaces", "directions", "embeddings"]
    runs = {"opd": root / "opd", "sft": root / "sft"}
    done = analyze(root / "base", runs, root / "out", k=2, metrics=metrics)
    return write_analysis_page(done.out, root / "analysis.html")


def intervention_page(root):
    def row(kind, run, accuracy, **place):
        ends = {"accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1}
        change = {"accuracy_change": 0.0, "accuracy_change_low": -0.1, "accuracy_change_high": 0.1}
        measured = {
            "accuracy": accuracy,
            "kl": 1 - accuracy,
            "kl_low": 0.1,
            "kl_high": 0.9,
            "n": 16,
            "update_norm": 1.0,
        }
        return {"intervention": kind, "run": run, "group": run, **place, **measured, **ends, **change}

    rows = [row("reference", "base", 0.3), row("reference", "rl", 0.7)]
    rows += [row("alpha", "rl", 0.3 + a / 3, alpha=a) for a in (0.0, 0.5, 1.0, 1.5)]
    rows += [row("swap", "rl", 0.5, unit=u, side=s) for u in ("layer_0", "mlp") for s in ("only", "without")]
    rows += [row("norm_scaling", "rl", 0.5 + b / 5, beta=b, step=t) for b in (0.0, 1.0) for t in (1, 2)]
    coordinates = {"alpha": ["alpha"], "swap": ["unit", "side"], "norm_scaling": ["step", "beta"]}
    return write_intervention_page(pd.DataFrame(rows), coordinates, root / "interventions.html", [])


PAGES = {"run": run_page, "compare": compare_page, "analysis": analysis_page, "interventions": intervention_page}
#: Elements that need a name for readers who do not see them, without one.
NAMELESS = """[...document.querySelectorAll("img, svg[role=img], figure.chart")].filter(
    (one) => !(one.alt || one.getAttribute("aria-label") || one.dataset.alt))
    .map((one) => one.outerHTML.slice(0, 200))"""
#: Elements that reach beyond the right edge, outside boxes that scroll by themselves.
TOO_WIDE = """[...document.querySelectorAll("body *")].filter((one) => !one.closest(".wide") &&
    one.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
    .map((one) => one.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module", params=PAGES)
def page(request, tmp_path_factory):
    return PAGES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("width, dark", [(380, False), (380, True), (1200, False)])
def test_a_page_is_whole(browser, page, width, dark):
    browser.open(page, width, dark=dark)
    assert browser.problems == []
    assert browser.run("document.documentElement.scrollWidth") <= width and browser.run(TOO_WIDE) == []
    assert browser.run(NAMELESS) == []
    figures = browser.run('document.querySelectorAll("figure.chart").length')
    drawn = browser.run(
        '[...document.querySelectorAll("figure.chart")].filter((f) => f.querySelector("svg .s")).length'
    )
    assert figures == drawn >= 3
    assert browser.run('document.querySelector("#summary li").textContent.length') > 20
    assert page.stat().st_size < LARGEST
    dark_ground = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 30)"
    assert dark_ground == dark


def middle(browser, script):
    """Center of an element's box in the window, after scrolling to it."""
    return browser.run(f"""(() => {{ const one = {script}; one.scrollIntoView({{block: "center"}});
        const box = one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; }})()""")


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    browser.open(run_page(tmp_path_factory.mktemp("hands")), 1200)
    return browser


def test_a_point_shows_its_values(opened):
    x, y = middle(opened, 'document.querySelector("#quality .plot .point:last-child")')
    opened.mouse("mouseMoved", x, y)
    text = opened.run('document.querySelector(".tip").innerText')
    assert "step 2" in text and "reverse KL, nats per token: 0.1 [0.09608, 0.1039]" in text


def test_the_legend_hides_a_run_in_every_figure(opened):
    lines = '[...document.querySelectorAll("figure.chart")].map((f) => f.querySelectorAll("path.line.s").length)'
    before = opened.run(lines)
    key = "document.querySelector('#quality .key[data-label=\"c\"]')"
    opened.run(f"{key}.click()")
    hidden = opened.run(lines)
    assert all(a < b for a, b in zip(hidden[:1], before[:1], strict=True)) and hidden[-1] < before[-1]
    assert opened.run(f"{key}.getAttribute('aria-pressed')") == "false"
    opened.run(f"{key}.click()")
    assert opened.run(lines) == before


def test_dragging_zooms_panels_of_one_axis_and_a_double_click_resets(opened):
    labels = (
        '[...document.querySelectorAll("#quality .plot")].map((p) => p.querySelectorAll("text").length && p.innerText)'
    )
    before = opened.run(labels)
    x, y = middle(opened, 'document.querySelector("#quality .plot")')
    opened.drag((x - 60, y), (x + 60, y))
    zoomed = opened.run(labels)
    changed = [a != b for a, b in zip(before, zoomed, strict=True)]
    assert changed == [True, False, True, False]  # both panels over steps
    assert not opened.run('document.querySelector("#quality .tool").hidden')
    opened.run('document.querySelector("#quality .plot").dispatchEvent(new MouseEvent("dblclick", {bubbles: true}))')
    assert opened.run(labels) == before


def test_tables_sort_by_value(opened):
    column = '[...document.querySelectorAll("main table")[0].tBodies[0].rows].map((r) => r.cells[0].textContent)'
    button = 'document.querySelectorAll("main table")[0].tHead.rows[0].cells[0].querySelector("button")'
    opened.run(f"{button}.click()")
    rising = opened.run(column)
    opened.run(f"{button}.click()")
    assert rising == sorted(rising) and opened.run(column) == rising[::-1]


@pytest.mark.parametrize(
    "cells, order",
    [
        (["10", "9", "–", "1,234"], ["9", "10", "1,234", "–"]),
        (["> any", "1.92× [1.70, 3.43]", "never", "16.00×"], ["never", "1.92× [1.70, 3.43]", "16.00×", "> any"]),
        (["3e-05", "1e-4", "−0.5"], ["−0.5", "3e-05", "1e-4"]),
        (["+0.2", "b", "a"], ["+0.2", "a", "b"]),
    ],
)
def test_the_order_of_cells(browser, tmp_path, cells, order):
    from effopd.report.compare_lookup import Table
    from effopd.report.html_parts import html_table
    from effopd.report.pages import TEMPLATES

    page = tmp_path / "table.html"
    table = html_table(Table(["x"], [[cell] for cell in cells]))
    page.write_text(f"<meta charset=utf-8><nav></nav>{table}<script>{(TEMPLATES / 'page.js').read_text()}</script>")
    browser.open(page, 400)
    browser.run('document.querySelector("th button").click()')
    assert browser.run('[...document.querySelectorAll("td")].map((cell) => cell.textContent)') == order


def test_printing_opens_folded_parts_and_is_light(browser, page):
    browser.open(page, 1200, dark=True)
    browser.run('document.querySelectorAll("details").forEach((part) => { part.open = false; })')
    assert browser.pdf().startswith(b"%PDF") and browser.problems == []
    assert browser.run('[...document.querySelectorAll("details")].every((part) => part.open)')
    browser._call("Emulation.setEmulatedMedia", media="print")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser._call("Emulation.setEmulatedMedia", media="")
