"""Imports go one way, and the package is light to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import effopd

ROOT = Path(effopd.__file__).parent
#: A module may import from its own layer (first column equal) and from lower ones, at module level.
LAYERS = {
    "errors": 0, "restore": 0, "files": 0, "versions": 0, "precision": 0, "command_help": 1, "optional": 1, "logit_path": 1, "sampler_check": 2, "weights": 2, "dynamics": 3,
    "tasks": 3, "evaluation": 4, "extrapolate": 5, "distill": 6,
    "testbed": 7, "bench": 7, "report": 8, "scan_results": 7, "scan": 8, "evaluate_command": 8,
    "train_command": 8, "analyze_command": 9, "intervene_command": 9, "compare_command": 9, "report_command": 9, "quickstart": 9, "cli": 10, "__main__": 11,
}  # fmt: skip


def layer_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def test_imports_go_downwards():
    wrong = []
    for path in ROOT.rglob("*.py"):
        source = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if source == "__init__":
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("effopd"):
                names = [node.module] if node.module != "effopd" else [f"effopd.{a.name}" for a in node.names]
                for target in (layer_of(name) for name in names):
                    if target in LAYERS and target != source and LAYERS[target] >= LAYERS[source]:
                        wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert not wrong


def test_every_module_has_a_layer():
    names = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert names - {"__init__"} == set(LAYERS)


def test_import_is_light():
    code = "import effopd, effopd.commands.main, sys; print(sorted(m for m in ('torch', 'transformers', 'trl') if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_resolve():
    for name in effopd.__all__:
        assert getattr(effopd, name) is not None


#: Private names of a host that a class of ours has for itself, by file, and what it is there.
OURS_TOO = {("interventions/results.py", "_models"): "results by the model they are of"}


def test_private_names_of_hosts_stay_behind_the_door():
    from helpers.host_names import uses  # loads the hosts

    strays = []
    for path in sorted(ROOT.rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        if not where.startswith("distill/trl_host/"):
            strays += [f"{where}:{line} {name}" for name, line in uses(path) if (where, name) not in OURS_TOO]
    assert not strays
    for where, name in OURS_TOO:  # no excuse outlives its reason
        assert name in {each for each, _ in uses(ROOT / where)}


@pytest.mark.parametrize(
    "code",
    [
        "trainer._buffered_inputs = None",
        "getattr(trainer, '_metrics', None)",
        "class T(Trainer):\n    def _run_epoch(self): ...",
        "class T(Trainer):\n    _tag_names = []",
        "def f():\n    from trl.models.utils import _ForwardRedirection",
        "from trl.kernels.chunked_divergence import ChunkedDivergenceFunction",
    ],
)
def test_a_private_name_outside_the_door_is_seen(code, tmp_path):
    from helpers.host_names import uses

    (tmp_path / "stray.py").write_text(code)
    assert uses(tmp_path / "stray.py")
    (tmp_path / "ours.py").write_text("self._model = f'{name}_metrics'\ndef _step(): ...\nfrom trl import GRPOTrainer")
    assert not uses(tmp_path / "ours.py")


def test_look_ahead_knows_no_trainer():
    """`extrapolate` imports neither TRL nor the trainer of transformers, not even through what it imports."""
    code = "import pkgutil, importlib, sys, effopd.extrapolate as room\n"
    code += "[importlib.import_module(each.name) for each in pkgutil.walk_packages(room.__path__, 'effopd.extrapolate.')]\n"
    code += "print(sorted(m for m in ('trl', 'transformers.trainer', 'transformers.trainer_callback') if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
