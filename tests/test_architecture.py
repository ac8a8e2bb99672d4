"""Imports go one way, and the package is light to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

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
