"""`effopd compare` as a user runs it: a small real grid, then everything that can be done with its
folder.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers.processes import forking_python
from helpers.tiny_models import make_model, make_tokenizer

from effopd.commands.compare import distinct, faults, matching
from effopd.commands.main import main
from effopd.commands.train import parse_train
from effopd.compare.grid import load_grid
from effopd.compare.runner import DONE, LOG
from effopd.distill.offline_store import RolloutStore
from effopd.errors import CheckpointError, ConfigError
from effopd.report import compare_figures
from effopd.tasks.builtin_models import OTHER_MODELS, WEIGHTS, other_models_path, smollm2_path

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"
#: Beginning of the folders of stored answers that recipes read.
STORED = "runs/neighbour-traces"


def plan_of(root: Path, **changes) -> Path:
    values = {
        "output_dir": str(root / "grid"),
        "reference_learning_rate": 1.0e-3,
        "tasks": [f"math:{root / 'math.jsonl'}"],
        "seeds": [0],
        "workers": 2,
        "threads": 1,
        "base": {
            "model_name_or_path": str(root / "student"), "teacher_model_name_or_path": str(root / "teacher"),
            "prompt_suffix": "", "eval_size": 12, "max_steps": 4, "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 12, "max_completion_length": 6, "eval_strategy": "steps", "eval_steps": 1,
            "eval_on_start": True, "eval_greedy": False, "save_strategy": "no", "activation_checkpointing": False,
            "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        },
        "strategies": {
            "plain": {"learning_rate_factors": [1, 3]},
            "effopd": {"effopd": {"strategy": "effopd", "validation_size": 8}},
        },
    } | changes  # fmt: skip
    path = root / "plan.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("compare")
    for seed, name in enumerate(("student", "teacher")):
        make_model(seed).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    rows = [{"problem": f"what is {a} + {b}", "answer": str(a + b)} for a in range(9) for b in range(9)]
    (root / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def launcher():
    with forking_python() as command:
        yield command


@pytest.fixture(scope="module")
def grid(root, launcher):
    """A finished grid of three real runs."""
    assert main(["compare", str(plan_of(root, launcher=launcher))]) == 0
    return root / "grid"


def test_a_dry_run_checks_and_shows_and_writes_nothing(root, capsys):
    plan = plan_of(root, output_dir=str(root / "dry"))
    assert main(["compare", str(plan), "--dry_run"]) == 0
    assert "3 runs" in capsys.readouterr().out
    assert not (root / "dry").exists()


def test_strategies_that_evaluate_at_other_steps_are_named(root, capsys):
    plan = yaml.safe_load(plan_of(root, output_dir=str(root / "dry")).read_text())
    plan["strategies"]["effopd"]["eval_steps"] = plan["base"]["eval_steps"] + 1
    path = root / "uneven.yaml"
    path.write_text(yaml.safe_dump(plan))
    assert main(["compare", str(path), "--dry_run"]) == 0
    assert "Not evaluated at the same steps" in capsys.readouterr().out


def test_only_chooses_runs_by_their_folder_in_the_order_of_the_patterns(root):
    grid = load_grid(plan_of(root, output_dir=str(root / "dry"), seeds=[0, 1]))
    runs = grid.runs()
    assert matching(grid, runs, []) == runs
    chosen = matching(grid, runs, ["*/seed-1", "*/plain/lr-0.001/*", "*/plain/*"])
    assert [(run.seed, run.strategy, run.learning_rate) for run in chosen] == [
        (1, "effopd", 1e-3), (1, "plain", 1e-3), (1, "plain", 3e-3), (0, "plain", 1e-3), (0, "plain", 3e-3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["math:nowhere.jsonl"]}, "task 'math:nowhere.jsonl': no such file"),
        ({"strategies": {"plain": {}, "few": {"train_size": 4}}}, "strategy 'few', .* a step takes 8 prompts"),
        ({"strategies": {"plain": {}, "far": {"teacher_model_name_or_path": "./no/such"}}}, "'far'.*no such folder"),
    ],
)
def test_a_run_that_cannot_start_is_found_before_the_grid_starts(root, changes, message):
    grid = load_grid(plan_of(root, output_dir=str(root / "dry"), **changes))
    with pytest.raises(ConfigError, match=message):
        raise next(error for _, error in faults(grid.runs()))


def test_only_the_selected_runs_need_their_models(root, tmp_path, capsys, monkeypatch):
    """The dry run mentions what the others lack; without --only it is an error."""
    monkeypatch.setenv("EFFOPD_CACHE", str(tmp_path))
    here, other = f"math:{root / 'math.jsonl'}", f"math:{root / 'other.jsonl'}"
    lacking = {"teacher_model_name_or_path": "testbed:wide_teacher"}
    strategies = {"plain": {}, "broken": {"eval_steps": "many"}}
    plan = str(plan_of(root, output_dir=str(root / "dry"), tasks={here: {}, other: lacking}, strategies=strategies))
    grid = load_grid(plan)
    assert not list(faults(matching(grid, grid.runs(), ["*math.jsonl/plain/*"])))
    assert main(["compare", plan, "--only", "*math.jsonl/plain/*", "--dry_run"]) == 0
    steps, wide = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Left out by --only")]
    assert f"({here} broken, {other} broken): " in steps and "eval_steps" in steps
    assert f"({other} plain): testbed:wide_teacher" in wide and "testbed other wide_teacher" in wide
    for only in ([], ["--only", "*other.jsonl/plain/*"]):
        assert main(["compare", plan, *only, "--dry_run"]) == 2
    assert f"strategy 'plain', task '{other}': testbed:wide_teacher" in capsys.readouterr().err


def test_a_finished_run_needs_nothing(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EFFOPD_CACHE", str(tmp_path))
    base = {"teacher_model_name_or_path": "testbed:wide_teacher", "model_name_or_path": str(root / "student")}
    plan = plan_of(tmp_path, base=base, strategies={"plain": {}})
    (run,) = load_grid(plan).runs()
    run.path.mkdir(parents=True)
    (run.path / DONE).write_text("{}")
    assert main(["compare", str(plan), "--dry_run"]) == 0
    assert "Left out" not in capsys.readouterr().out


def test_results_hold_every_run_and_the_page_says_so(grid, capsys):
    results = json.loads((grid / "results.json").read_text())
    found = {(row["strategy"], row["learning_rate"], row["seed"]) for row in results["runs"]}
    assert found == {("plain", 1e-3, 0), ("plain", 3e-3, 0), ("effopd", 1e-3, 0)}
    for row in results["runs"]:
        target = row["targets"]["reference_kl"]
        assert set(target) >= {"steps", "seconds", "generated_tokens", "forward_tokens", "reached"}
    own = next(r for r in results["runs"] if r["strategy"] == "plain" and r["learning_rate"] == 1e-3)
    assert own["targets"]["reference_kl"]["reached"]
    page = (grid / "results.md").read_text()
    for image in (grid / "results").glob("*.png"):
        assert image.name in page and image.stat().st_size > 10_000
    assert len(list((grid / "results").glob("*.png"))) >= 2


def test_nothing_is_run_twice(grid, root):
    stamps = {path: path.stat().st_mtime_ns for path in grid.rglob(DONE)}
    assert len(stamps) == 3
    assert main(["compare", str(plan_of(root))]) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in grid.rglob(DONE)}


def test_a_broken_run_fails_alone_and_the_others_are_not_run_again(grid, root, launcher, capsys):
    before = {path: path.stat().st_mtime_ns for path in grid.rglob(DONE)}
    strategies = {"plain": {"learning_rate_factors": [1, 3]}, "broken": {"max_prompt_length": 1}}
    assert main(["compare", str(plan_of(root, strategies=strategies, launcher=launcher))]) == 1
    out = capsys.readouterr().out
    assert "failed" in out and "broken" in out and "max_prompt_length" in out  # its last words
    log = next(path for path in grid.rglob(LOG) if "broken" in str(path))
    assert "max_prompt_length" in log.read_text()
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    page = (grid / "results.md").read_text()
    assert "Failed and excluded: " in page and "broken" in page and "max_prompt_length" in page
    plan_of(root)
    (grid / "plan.yaml").write_text((root / "plan.yaml").read_text())


def test_report_redraws_the_same_from_the_folder_and_from_the_json(grid, tmp_path, capsys):
    assert main(["compare", "--report", str(grid), "--out", str(tmp_path / "a")]) == 0
    assert main(["compare", "--report", str(tmp_path / "a" / "results.json"), "--out", str(tmp_path / "b")]) == 0
    for name in ("results.json", "results.md"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    assert "effopd" in capsys.readouterr().out


def test_a_grid_goes_on_from_the_results_of_another_machine(grid, root, launcher, tmp_path, capsys, monkeypatch):
    plan = plan_of(root, output_dir=str(tmp_path / "grid"), launcher=launcher)
    assert main(["compare", "--report", str(grid)]) == 0
    monkeypatch.setattr(compare_figures, "draw", lambda results, folder: {})
    there = ["--runs_from", str(grid / "results.json")]
    assert main(["compare", str(plan), *there, "--dry_run"]) == 0
    assert "1 to run here" in capsys.readouterr().out and not (tmp_path / "grid").exists()
    assert main(["compare", str(plan), *there]) == 0
    (done,) = (tmp_path / "grid").rglob(DONE)
    assert "plain" in str(done)
    assert main(["compare", str(plan)]) == 0  # the folder remembers
    assert len(list((tmp_path / "grid").rglob(DONE))) == 1
    assert main(["compare", "--report", str(tmp_path / "grid")]) == 0
    before, after = (json.loads((folder / "results.json").read_text()) for folder in (grid, tmp_path / "grid"))
    assert [row["curve"]["kl"] for row in after["runs"]] == [row["curve"]["kl"] for row in before["runs"]]
    (note,) = after["settings"]["merges"]
    assert note["runs"] == 2 and note["n"] == 1
    assert "2 of the 3 runs were made on other machines" in (tmp_path / "grid" / "results.md").read_text()
    plan_of(root)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"strategies": {"plain": {}, "typo": {"effopd": {"strateggy": "effopd"}}}}, "typo.*strateggy"),
        ({"strategies": {"plain": {}, "typo": {"effopd": {"strategy": "fixd"}}}}, "typo.*fixd"),
        ({"strategies": {"plain": {}, "exopd": {"lambda_extrapolation": 1.25}}}, "exopd.*reference"),
        ({"base": {"model_name_or_path": "s", "teacher_model_name_or_path": "t"}}, "must evaluate"),
        ({"seeds": [0, -1]}, "seeds' has -1: expected whole numbers"),
        ({"seeds": [0, 2**32]}, "seed 4294967296: .*seed"),
        ({"seeds": [0, "two"]}, "seeds' has 'two'"),
        ({"seeds": [0, 1.5]}, "seeds' has 1.5"),
        (
            {"strategies": {"plain": {"learning_rate_factors": [1, float("inf")]}}},
            "list of positive numbers",
        ),
        (
            {
                "strategies": {
                    "plain": {
                        "learning_rate_factors": [1, 0.1],
                        "lr_scheduler_type": "polynomial",
                        "lr_scheduler_kwargs": {"lr_end": 5e-4},
                    }
                }
            },
            "rate 0.0001, seed 0: .*lr_end",
        ),
        (
            {
                "seeds": [0, 1],
                "strategies": {
                    "plain": {},
                    "other": {"reference_model_name_or_path": "{seed}/a/b", "lambda_extrapolation": 1.25},
                },
            },
            "other.*--reference_model_name_or_path '0/a/b'",
        ),
        ({"strategies": {"plain": {}, "other": {"effopd": "line_search"}}}, "other.*effopd"),
    ],
)
def test_a_typo_is_found_before_anything_runs(root, changes, message, capsys):
    plan = plan_of(root, output_dir=str(root / "never"), **changes)
    assert main(["compare", str(plan)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (root / "never").exists()


def test_each_configuration_is_checked_once(tmp_path):
    """Learning rates and texts with `{seed}` make configurations; a seed alone is checked once."""
    strategies = {
        "plain": {"learning_rate_factors": [1, 3]},
        "effopd": {"effopd": {"strategy": "line_search"}},
        "read": {"prompt_suffix": "{seed}", "learning_rate_factors": [1, 3]},
    }
    runs = load_grid(plan_of(tmp_path, seeds=[0, 1, 2], strategies=strategies)).runs()
    found = [(run.strategy, run.learning_rate, run.seed) for run in distinct(runs)]
    every = [("plain", 1e-3), ("plain", 3e-3), ("read", 1e-3), ("read", 3e-3)]
    assert found[:5] == [("effopd", 1e-3, 0), *((*arm, 0) for arm in every)]
    for seed, rest in ((1, found[5:9]), (2, found[9:])):
        assert rest == [("effopd", 1e-3, seed), ("plain", 1e-3, seed), *((*arm, seed) for arm in every[2:])]
    assert not list(distinct([]))


def test_stored_rollouts_of_every_seed_must_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    offline = {"rollouts": "cache/seed-{seed}", "evaluation_teacher": True}
    plan = plan_of(tmp_path, seeds=[0, 1], strategies={"plain": {}, "offline": offline})
    checked = []
    monkeypatch.setattr(RolloutStore, "header", lambda store: checked.append(store.folder.name) or missing(store))

    def missing(store):
        if store.folder.name == "seed-1":
            raise CheckpointError(f"--rollouts {store.folder} is not a folder")
        return SimpleNamespace(sampler="student", sampling={}, task={})

    monkeypatch.setattr("effopd.launch.offline.check_sampling", lambda opd, header: None)
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "math.jsonl").touch()
    ((run, error),) = faults(load_grid(plan).runs())
    assert (run.strategy, run.seed) == ("offline", 1) and checked == ["seed-0", "seed-1"]
    assert "seed 1: --rollouts cache/seed-1 is not a folder" in str(error)


def test_wrong_calls_are_explained(root, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    for flags, message in (
        ([], "either a plan"),
        (["--report", str(tmp_path)], "is not a grid"),
        (["--report", str(tmp_path), "--runs_from", "a.json"], "--runs_from needs a plan"),
        (["--report", str(tmp_path), "--only", "*"], "--only needs a plan"),
        ([str(plan_of(tmp_path / "other")), "--only", "plain"], "--only plain: expected a pattern of the plan's runs"),
        ([str(tmp_path / "none.yaml")], "no plan"),
    ):
        assert main(["compare", *flags]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "plan.yaml").write_text(plan_of(root, output_dir=str(tmp_path)).read_text())
    assert main(["compare", "--report", str(tmp_path)]) == 2
    assert "finished yet" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(path.name for path in RECIPES.glob("compare-*.yaml")))
def test_the_shipped_plans_pass_a_dry_run(recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFOPD_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # no stored answers here
    for folder in (smollm2_path(), *(other_models_path() / name for name in OTHER_MODELS)):
        folder.mkdir(parents=True)
        for name in ("source.json", "config.json", WEIGHTS):  # as if there; a dry run reads none of them
            (folder / name).write_text("{}")
    plan = yaml.safe_load((RECIPES / recipe).read_text())
    for name in re.findall(r"\bruns/(?:held-out|smollm2)/[\w/.-]+", str(plan)):
        Path(name).mkdir(parents=True, exist_ok=True)
    lacking = {name for name, settings in plan["strategies"].items() if not available(settings)}
    if lacking:  # optional optimizers that are not installed here, or stored answers
        assert main(["compare", str(RECIPES / recipe), "--dry_run"]) != 0
        error = capsys.readouterr().err
        assert "pip install" in error or STORED in error
    plan["strategies"] = {name: settings for name, settings in plan["strategies"].items() if name not in lacking}
    plan["baselines"] = [name for name in plan.get("baselines", []) if name not in lacking]
    (tmp_path / recipe).write_text(yaml.safe_dump(plan))
    assert main(["compare", str(tmp_path / recipe), "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert f"runs into {plan['output_dir']}" in shown
    assert "plain" in shown or "plain" not in plan["strategies"]


def available(settings):
    """Whether an arm reads no stored answers and the package of its optimizer is installed."""
    if STORED in json.dumps(settings):
        return False
    return importlib.util.find_spec(settings.get("optimizer_class", "torch").partition(":")[0]) is not None


def test_the_testbed_plan_is_the_reference(tmp_path):
    from effopd.tasks import builtin_models as testbed

    plan = load_grid(RECIPES / "compare-testbed.yaml")
    run = next(r for r in plan.runs() if r.strategy == "plain" and r.learning_rate == plan.reference_learning_rate)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.settings))
    opd = parse_train(["--config", str(tmp_path / "run.yaml")]).opd
    for name, value in testbed.reference_settings().items():
        assert getattr(opd, name) == value, name
    assert len(plan.seeds) >= 5 and len(plan.tasks) == 2


def test_plan_errors_are_typed():
    with pytest.raises(ConfigError):
        load_grid(RECIPES / "testbed.yaml")
