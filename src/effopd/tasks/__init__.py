"""Tasks: prompts, reference answers and verifiers.

base.py          Example, Task and the verifier contract
config.py        TaskConfig, for Python, the command line and YAML
load.py          load_task: config → train or eval split
rows.py          math rows as examples
row_files.py     rows from JSON, Parquet or the Hub
row_columns.py   which of their columns are question and answer
row_faults.py    what is wrong with rows
prompts.py       prompts as token ids; their lengths
gym_tasks.py     reasoning-gym questions and their verifier
reference.py     reference answers as text
math_grading.py  the math verifier
math_equality.py when two math answers are the same
math_text.py     one way of writing, before answers are parsed
math_numbers.py  when two numbers are the same answer
math_rules.py    what math-verify does otherwise when it grades here
units.py         units of answers
reasoning.py     reasoning and answer apart
worker.py        grading in a process that can be killed
grading_process.py  … what runs there
sampling.py      Sampling: how answers are drawn
generate.py      sample answers
evaluate.py      grade them: accuracy, pass@k, intervals
verify.py        the user's own verifier; does a verifier tell right from wrong
"""

from __future__ import annotations

from effopd.tasks.base import Example, Prompt, Task, Verifier
from effopd.tasks.config import TaskConfig
from effopd.tasks.gym_tasks import ReasoningGymVerifier
from effopd.tasks.load import load_task, needs_network
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
    "check_prompt_lengths",
    "check_score",
    "check_verifier",
    "extract_boxed",
    "load_task",
    "load_verifier",
    "needs_network",
    "read_math_rows",
]
