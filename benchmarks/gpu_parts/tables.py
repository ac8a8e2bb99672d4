"""Tables of `docs/gpu.md` from the result files: `python -m gpu_parts.tables runs/gpu`."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pages import DOCS, rewrite

from gpu_parts.plan import PARTS
from gpu_parts.results import read

PAGE = DOCS / "gpu.md"
#: Text of a block whose part has no result.
NOTHING = "Not measured yet."
_GB = 1e9

Units = Mapping[str, Mapping[str, Any]]


def blocks(folder: Path) -> dict[str, str]:
    """Name of a block of the page → its text, from the results in `folder`; they may be partial."""
    contents = {part: read(folder, part) for part in PARTS}
    units = {part: content["units"] for part, content in contents.items()}
    texts = {
        "machine": machine(contents.values()),
        "tests": tests(units["tests"]),
        "steps": steps({"1.7B, random": units["steps_random"], "SmolLM2-135M": units["steps_smollm2"]}),
        "moves": moves(units["steps_random"]),
        "comparison": comparison(units["comparison"]),
        "spectra": spectra(units["spectra"]),
        "errors": errors(units),
    }
    return {name: text or NOTHING for name, text in texts.items()}


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; empty without rows."""
    heads, rows = list(heads), [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows]) if rows else ""


def machine(contents: Iterable[Mapping[str, Any]]) -> str:
    """The device and versions of the results, once each."""
    lines = []
    for content in contents:
        if not (found := content.get("machine")):
            continue
        names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        memory = f", {found['memory_bytes'] / _GB:.0f} GB" if found["memory_bytes"] else ""
        line = f"{found['device']}{memory}, {found['cores']} cores, {found['date']}: {names}."
        lines.append(f"Rehearsal with tiny sizes, not a measurement. {line}" if content["rehearsal"] else line)
    return "\n\n".join(dict.fromkeys(lines))


def tests(units: Units) -> str:
    """Counts of `pytest -m gpu`, and the failed tests."""
    result = _result(units, "pytest")
    if not result:
        return ""
    failed = [f"`{name}`" for name, test in result["tests"].items() if test["outcome"] == "failed"]
    counts = [f"{result[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped") if result[outcome]]
    return f"{', '.join(counts)}." + (f" Failed: {', '.join(failed)}." if failed else "")


def steps(students: Mapping[str, Units]) -> str:
    """Median seconds per step by category; seconds and memory of the searches."""
    rows = []
    for student, units in students.items():
        for unit in units:
            if (result := _result(units, unit)) is None or "rollouts" not in result:
                continue
            seconds, searches = result["seconds"], result["searches"]
            rows.append(
                [
                    student, unit, f"{result['rollouts']} × {result['mean_length']:.0f}",
                    *(f"{seconds[name]:.2f}" for name in ("rollout", "teacher", "update", "search", "net")),
                    _search(searches),
                    f"{result['peak_bytes'] / _GB:.1f}" if result["peak_bytes"] else "–",
                    f"{max(s['memory_bytes'] for s in searches) / _GB:.2f}" if searches else "–",
                ]
            )  # fmt: skip
    heads = ["student", "run", "rollouts × tokens", "rollouts, s", "teacher, s", "update, s", "search, s", "step, s"]
    return table([*heads, "a search", "peak, GB", "beside the model, GB"], rows)


def _search(searches: list[Mapping[str, Any]]) -> str:
    """Median seconds of a search, its candidates, and the share that is not spent in scoring."""
    if not searches:
        return "–"
    seconds = statistics.median(s["seconds"] for s in searches)
    candidates = statistics.median(s["candidates"] for s in searches)
    beyond = statistics.median(1 - s["scored"] / s["seconds"] for s in searches)
    return f"{seconds:.2f} s, {candidates:.0f} candidates, {beyond:.0%} beyond scoring"


def moves(units: Units) -> str:
    """Milliseconds of the moves of all weights, by place of the anchor."""
    result = _result(units, "moves")
    if not result:
        return ""
    names = ("begin", "candidate", "restore", "commit", "norm")
    places = ("anchor on the device", "anchor in host memory")
    rows = [[place, *(f"{1e3 * result[place][name]:.1f}" for name in names)] for place in places]
    text = (
        f"{result['parameters'] / 1e9:.2f} B parameters. A copy on the device reads and writes "
        f"{result['copy_bytes_per_second'] / 1e9:.0f} GB/s; a candidate reaches {result['share']:.0%} of that."
    )
    return f"{text}\n\n" + table(["", *(f"{name}, ms" for name in names)], rows)


def comparison(units: Units) -> str:
    """Accuracies of the teacher, and held-out KL of every run by step."""
    lines = []
    if teacher := _result(units, "teacher"):
        before, after = (teacher["accuracy"][when] for when in ("before", "after"))
        interval = f"{after['low']:.2f} to {after['high']:.2f}, {after['n']} prompts"
        lines.append(
            f"Teacher: {teacher['steps']} supervised steps of {teacher['batch_size']} worked answers; accuracy "
            f"{before['mean']:.2f} → {after['mean']:.2f} ({interval})."
        )
    runs = {unit: _result(units, unit) for unit in units if unit != "teacher"}
    runs = {unit: result for unit, result in runs.items() if result and result["curve"]}
    at = sorted({row["step"] for result in runs.values() for row in result["curve"]})
    rows = []
    for unit, result in runs.items():
        kls = {row["step"]: f"{row['kl']:.3f}" for row in result["curve"]}
        last = result["curve"][-1]
        jumps = sum(scale > 0 for _, scale, _ in result["searches"])
        back = sum(scale < 0 for _, scale, _ in result["searches"])
        made = f"{jumps} jumps, {back} back, of {len(result['searches'])}" if "line_search" in unit else "–"
        name = unit if units[unit]["complete"] else f"{unit} (stopped)"
        rows.append([name, *(kls.get(step, "–") for step in at), f"{last['accuracy']:.2f}", made])
    heads = ["KL at step", *map(str, at), "last accuracy", "searches"]
    return "\n\n".join(filter(None, [*lines, table(heads, rows)]))


def spectra(units: Units) -> str:
    """Seconds of the SVD and speed-ups against it, with the accuracy where it was measured."""
    rows = []
    for unit in units:
        if not (result := _result(units, unit)):
            continue
        seconds = {name: statistics.median(times) for name, times in result["seconds"].items()}
        others = [f"{seconds['svd'] / seconds[name]:.1f}×" for name in ("spectrum", "all values", "top 20")]
        exact = "–"
        if "metric_error" in result:
            exact = (
                f"metrics within {result['metric_error']:.0e}; directions within {result['angle']:.0e} rad "
                f"(own bound {result['angle_bound']:.0e})"
            )
        rows.append([unit, f"{seconds['svd']:.2f} s", *others, exact])
    return table(["update", "SVD", "spectrum", "all values", "20 directions", "against float64"], rows)


def errors(parts: Mapping[str, Units]) -> str:
    """Last line of every unit's error; "None." if there are results without errors."""
    lines = [
        f"- {part}, {unit}: `{entry['error'].strip().splitlines()[-1][:200]}`"
        for part, units in parts.items()
        for unit, entry in units.items()
        if "error" in entry
    ]
    return "\n".join(lines) or ("None." if any(parts.values()) else "")


def _result(units: Units, unit: str) -> Any:
    return units.get(unit, {}).get("result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="folder with the JSON files")
    parser.add_argument("--write", action="store_true", help="rewrite the tables of docs/gpu.md")
    arguments = parser.parse_args()
    made = blocks(arguments.results)
    print("\n\n".join(f"## {name}\n\n{text}" for name, text in made.items()))
    if arguments.write:
        rewrite(PAGE, made)


if __name__ == "__main__":
    main()
