"""Check the settings of a run, build its trainer, and estimate the memory it needs.

opd.py, rl.py       settings → checks → models → trainer
settings_yaml.py    the settings as `config.yaml`
run_checks.py       checks shared by OPD and RL runs: packages, folders, disk space
run_models.py       models and tokenizer of a run
prompts.py          training and held-out prompts of a run
preflight.py        single checks: a model's name, student against teacher, a task, disk space
host_settings.py    values that the host libraries reject only during setup
adapters.py         LoRA flags
meta_model.py       models without weights
dry_run.py          `effopd train --dry_run`: the plan of a run and its memory
rl_dry_run.py       the same for `effopd rl`
memory_estimate.py  = model_states.py + step_memory.py, from the sizes in model_size.py
"""
