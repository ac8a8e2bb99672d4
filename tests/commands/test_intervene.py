"""`effopd intervene` as a user runs it, on the testbed's student and teacher."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import yaml
from helpers.tiny_models import make_model, make_tokenizer
from safetensors.torch import load_file

from effopd.commands import intervene as intervene_command
from effopd.commands.intervene import run_intervene
from effopd.errors import CheckpointError, CompatibilityError, ConfigError, EffOPDError, TaskError
from effopd.interventions.kinds import INTERVENTIONS
from effopd.models import files as model_files
from effopd.tasks.builtin_models import teacher_path

TASK = ["--task", "testbed:chain_sum", "--eval_size", "16", "--max_new_tokens", "24"]
PAIR = ["--base", "testbed:student", "--trained", "rl=testbed:teacher"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """base/, and a run directory with steps 0, 2 and 4: random models."""
    root = tmp_path_factory.mktemp("tiny")
    make_tokenizer().save_pretrained(root / "base")
    make_model(0).save_pretrained(root / "base")
    for seed, step in enumerate((0, 2, 4)):
        make_model(seed).save_pretrained(root / "run" / "trajectory" / f"step-{step:06d}")
    return root


@pytest.fixture
def no_model(monkeypatch):
    forbid_loading(monkeypatch)


def forbid_loading(monkeypatch):
    """Loading a model is an error."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(model_files.AutoModelForCausalLM, "from_pretrained", refuse)


@pytest.mark.slow
def test_alpha_with_a_teacher_then_again_then_another_intervention(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    flags = [*PAIR, *TASK, "--teacher", "testbed:teacher", "--out", str(out)]
    assert run_intervene(["alpha", *flags, "--alphas", "0", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "alpha: 16 prompts" in printed and "KL to the teacher" in printed and "results.csv" in printed
    frame = pd.read_parquet(out / "results.parquet")
    assert list(frame["point"]) == ["reference/base", "reference/rl", "alpha/rl/alpha=0", "alpha/rl/alpha=0.5"]
    assert list(frame.columns[:5]) == ["intervention", "run", "group", "point", "step"]
    assert frame["kl"].iloc[1] == pytest.approx(0, abs=1e-9) and frame["kl"].iloc[0] > frame["kl"].iloc[3] > 0.001
    assert frame["accuracy_change"].iloc[1] > 0.2 and frame["accuracy_change_low"].iloc[1] > 0
    assert (out / "figures" / "alpha.png").stat().st_size > 10_000
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert (
        settings["interventions"] == {"alpha": {"alphas": [0.0, 0.5]}} and settings["sampling"]["max_new_tokens"] == 24
    )
    assert "# torch" in (out / "config.yaml").read_text()

    before = {path: path.read_bytes() for path in (out / "results.jsonl", out / "config.yaml")}
    with monkeypatch.context() as patch:
        forbid_loading(patch)
        assert run_intervene(["alpha", *flags, "--alphas", "0", "0.5"]) == 0
        assert "all 4 points are already in" in capsys.readouterr().out
        for changed, name in (
            (["--alphas", "0", "0.7"], r"alphas = \[0.0, 0.5\]"),
            (["--seed", "1"], "sampling.seed = 0"),
        ):
            with pytest.raises(ConfigError, match=name):
                run_intervene(["alpha", *flags, "--alphas", "0", "0.5", *changed])
    assert before == {path: path.read_bytes() for path in before}

    assert run_intervene(["embedding", *flags]) == 0
    assert "ties its head to its embeddings" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows[4:]] == ["embedding/rl/replaced=embedding"]
    assert set(yaml.safe_load((out / "config.yaml").read_text())["interventions"]) == {"alpha", "embedding"}


@pytest.mark.slow
def test_every_intervention_has_a_table_and_a_figure(tmp_path, tiny, monkeypatch):
    run = tiny / "run"
    runs = ["--base", str(tiny / "base"), "--trained", f"opd={run}", f"opd={run}", "--trained", f"rl={run}"]
    monkeypatch.setattr(intervene_command.Evaluator, "measure", fake_measure)
    out = tmp_path / "out"
    graded = [name for name, kind in INTERVENTIONS.items() if kind.graded]
    for name in graded:
        flags = ["--alphas", "0", "1", "2", "--percents", "10", "100", "--betas", "0", "1", "--rank_norm", "shared"]
        assert run_intervene([name, *runs, *TASK, *flags, "--out", str(out)]) == 0
        assert (out / "figures" / f"{name}.png").stat().st_size > 10_000
    page = (out / "report.html").read_text()
    assert all(f'id="{name}" data-alt="' in page for name in graded) and "random, highest accuracy: opd#0 0." in page
    frame = pd.read_csv(out / "results.csv")
    assert set(frame["intervention"]) == {"reference", *graded} and set(frame["run"]) == {
        "base",
        "opd#0",
        "opd#1",
        "rl",
    }
    assert set(frame["group"]) == {"base", "opd", "rl"} and frame["point"].is_unique
    window = frame[frame["intervention"] == "window"]
    assert (window["half_width"] == 1).all() and (window["layer_norm"] > 0).all()
    assert frame["update_norm"].notna().all() and frame["accuracy_low"].notna().all()


def fake_measure(self) -> dict:
    total = sum(float(p.detach().abs().sum()) for p in self.model.parameters())
    right = [float((int(total * 100) >> i) % 2) for i in range(16)]
    accuracy = sum(right) / 16
    return {"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1, "n": 16,
            "accuracies": right, "kl": total, "kl_low": total - 1, "kl_high": total + 1}  # fmt: skip


def test_without_matplotlib_there_are_tables(tmp_path, capsys, monkeypatch, tiny):
    monkeypatch.setattr(intervene_command.Evaluator, "measure", fake_measure)
    monkeypatch.setattr(intervene_command, "is_available", lambda module: False)
    models = ["--base", str(tiny / "base"), "--trained", f"rl={tiny / 'run'}"]
    assert run_intervene(["random", *models, *TASK, "--random_seeds", "3", "--out", str(tmp_path / "out")]) == 0
    assert "pip install 'effopd[plots]'" in capsys.readouterr().out
    assert (tmp_path / "out" / "results.csv").exists() and not (tmp_path / "out" / "figures").exists()


def test_only_writing_checkpoints_needs_no_task_and_no_model(tmp_path, no_model, capsys, tiny):
    models = ["--base", str(tiny / "base"), "--trained", f"rl={tiny / 'run'}"]
    flags = ["swap", *models, "--save_dir", str(tmp_path / "models")]
    assert run_intervene(flags) == 0
    assert "checkpoints: 12 in" in capsys.readouterr().out
    written = tmp_path / "models/swap/rl/unit=mlp,side=only"
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {path.name for path in written.iterdir()}
    last = tiny / "run/trajectory/step-000004"
    base, trained, new = (load_file(path / "model.safetensors") for path in (tiny / "base", last, written))
    assert all((new[n] == (trained[n] if ".mlp." in n else base[n])).all() for n in base)
    shutil.rmtree(written)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "models").rglob("*.safetensors")}
    assert run_intervene(flags) == 0 and written.exists()  # only what is missing is written
    assert times == {path: path.stat().st_mtime_ns for path in times}
    with pytest.raises(ConfigError, match="dtype = 'float32', this run has 'bfloat16'"):
        run_intervene([*flags, "--dtype", "bfloat16"])


@pytest.mark.parametrize("changed", ["base", "run/trajectory/step-000002", "teacher"])
def test_results_of_weights_that_have_changed_are_refused(tmp_path, tiny, monkeypatch, capsys, changed):
    monkeypatch.setattr(intervene_command.Evaluator, "measure", fake_measure)
    monkeypatch.setattr(intervene_command, "is_available", lambda module: False)
    for name in ("base", "run"):
        shutil.copytree(tiny / name, tmp_path / name)
    shutil.copytree(tiny / "base", tmp_path / "teacher")
    models = ["--base", str(tmp_path / "base"), "--trained", f"rl={tmp_path / 'run'}"]
    flags = ["alpha", *models, "--alphas", "0.5"]
    measure = [*flags, *TASK, "--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path / "out")]
    write = [*flags, "--save_dir", str(tmp_path / "models")]
    for argv in (measure, write):
        assert run_intervene(argv) == 0 and run_intervene(argv) == 0
    assert "already in" in capsys.readouterr().out
    make_model(9).save_pretrained(tmp_path / changed)
    for argv in (measure, *([] if changed == "teacher" else [write])):
        with pytest.raises(ConfigError, match=f"of other weights: the files in .*{changed} have changed"):
            run_intervene(argv)
    for config in (tmp_path / "out" / "config.yaml", tmp_path / "models" / "config.yaml"):  # as before the marks
        settings = yaml.safe_load(config.read_text())
        config.write_text(yaml.safe_dump({k: v for k, v in settings.items() if not k.endswith("files")}))
    assert run_intervene(measure) == 0 and run_intervene(write) == 0


def test_settings_from_yaml(tmp_path):
    file = tmp_path / "intervention.yaml"
    file.write_text("base: testbed:student\ntrained: [rl=testbed:teacher]\nsave_dir: x\nalphas: [0, 1]\n")
    request = intervene_command.parse_intervene(["alpha", "--config", str(file)])
    assert request.models.runs() == {"rl": [str(teacher_path())]} and request.options.alphas == [0, 1]
    request = intervene_command.parse_intervene(
        ["alpha", "--config", str(file), "--trained", "a=x", "b=y", "--trained", "a=z"]
    )
    assert request.models.runs() == {"a": ["x", "z"], "b": ["y"]}
    file.write_text("bass: testbed:student\n")
    with pytest.raises(ConfigError, match="bass"):
        intervene_command.parse_intervene(["alpha", *PAIR, "--save_dir", "x", "--config", str(file)])


def test_help_teaches_every_intervention(capsys):
    with pytest.raises(SystemExit, match="0"):
        run_intervene(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in INTERVENTIONS) and "Example: effopd intervene alpha" in printed


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (["beta", *PAIR, *TASK], SystemExit, "2"),
        (["alpha", *PAIR, *TASK, "--alphas", "0", "half"], SystemExit, "2"),
        (["alpha", *PAIR, *TASK, "--alphas", "nan"], ConfigError, "alphas"),
        (["alpha", "--base", "testbed:student", "--trained", "testbed:teacher", *TASK], ConfigError, "LABEL=DIR"),
        (
            ["alpha", "--base", "testbed:student", "--trained", "a/b=x", *TASK],
            ConfigError,
            "label 'a/b' cannot be used",
        ),
        (
            ["alpha", "--base", "testbed:student", "--trained", "base=x", *TASK],
            ConfigError,
            "base, final, first are reserved",
        ),
        (["alpha", "--base", "nowhere", "--trained", "rl=testbed:teacher", *TASK], CheckpointError, "nowhere"),
        (["alpha", "--base", "testbed:student", "--trained", "rl=nowhere", *TASK], CheckpointError, "nowhere"),
        (["trajectory", *PAIR, *TASK], ConfigError, "single checkpoint"),
        (["norm_scaling", *PAIR, *TASK], ConfigError, "single checkpoint"),
        (["alpha", *PAIR], ConfigError, "--task is missing"),
        (["alpha", *PAIR, "--task", "testbed:nothing"], TaskError, "nothing"),
        (["alpha", *PAIR, "--task", "chain_sum"], ConfigError, "task"),
        (["alpha", *PAIR, *TASK, "--dtype", "int8"], ConfigError, "dtype"),
        (["alpha", *PAIR, *TASK, "--n", "0"], ConfigError, "--n"),
        (["alpha", *PAIR, *TASK, "--teacher", "nowhere"], CompatibilityError, "nowhere"),
        (["rank", *PAIR, *TASK, "--percents", "200"], ConfigError, "percents"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(argv, error, message, tmp_path, no_model, capsys):
    out = tmp_path / "out"
    with pytest.raises(error, match=message):
        run_intervene([*argv, "--out", str(out)])
    assert not out.exists()


def test_a_task_without_answers_is_refused(tmp_path, no_model):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"problem": f"what is {i} + 1?"}) + "\n" for i in range(30)))
    with pytest.raises(EffOPDError, match="answer"):
        run_intervene(["alpha", *PAIR, "--task", f"math:{rows}", "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="--out is missing"):
        run_intervene(["alpha", *PAIR, *TASK])
    with pytest.raises(ConfigError, match="--out is missing"):
        run_intervene(["alpha", *PAIR, *TASK, "--save_dir", str(tmp_path / "x")])
    with pytest.raises(ConfigError, match="two different folders"):
        run_intervene(["alpha", *PAIR, *TASK, "--save_dir", str(tmp_path / "x"), "--out", str(tmp_path / "x")])
