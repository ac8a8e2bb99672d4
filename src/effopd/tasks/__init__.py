"""Tasks: prompts, reference answers and verifiers.

base.py             Example, Task and the verifier contract
config.py           TaskConfig, for Python, the command line and YAML
load.py             load_task: config → train or eval split
kinds.py            TASK_KINDS: the kinds of source, and those of other packages
rows.py             math rows as examples
code/               code rows, and programs graded in a sandbox
row_files.py        rows from JSON, Parquet or the Hub
row_columns.py      question and answer columns
row_faults.py       faults in rows, reported together
prompts.py          prompts as token ids; prompt lengths
gym_tasks.py        reasoning-gym questions and their verifier
tagged_answers.py   answers between <answer> tags
testbed_families.py the testbed's two task families
testbed_questions.py their questions and scores, as reasoning-gym's
builtin_models.py   the testbed's student and teacher
reference.py        reference answers as text
math_grading.py     the math verifier
math_equality.py    equality of two math answers
math_text.py        math answers in one notation, before parsing
math_numbers.py     equality of two numbers
math_rules.py       changes to math-verify during grading
units.py            units of answers
reasoning.py        separation of reasoning and answer
worker.py           grading in a process that can be killed
grading_process.py  main loop of that process
sampling.py         Sampling: settings for sampling answers
generate.py         sample answers
evaluate.py         grade answers: accuracy, pass@k, intervals
verify.py           user-defined verifiers; check that a verifier can tell right from wrong
"""

from __future__ import annotations

from effopd.tasks.base import Example, Prompt, Task, Verifier
from effopd.tasks.config import TaskConfig
from effopd.tasks.gym_tasks import ReasoningGymVerifier
from effopd.tasks.load import check_grading, check_packages, check_sources, load_task, needs_network
from effopd.tasks.math_grading import MathVerifier, extract_boxed
from effopd.tasks.prompts import check_prompt_lengths
from effopd.tasks.rows import read_math_rows
from effopd.tasks.verify import VerifierCheck, check_score, check_verifier, load_verifier

__all__ = [
    "Example",
    "MathVerifier",
    "Prompt",
    "ReasoningGymVerifier",
    "Task",
    "TaskConfig",
    "Verifier",
    "VerifierCheck",
    "check_grading",
    "check_packages",
    "check_prompt_lengths",
    "check_score",
    "check_sources",
    "check_verifier",
    "extract_boxed",
    "load_task",
    "load_verifier",
    "needs_network",
    "read_math_rows",
]
