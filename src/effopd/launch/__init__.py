"""From settings to a trainer: checks that take seconds before work that takes hours, a dry run, the
memory a run needs.

opd.py, rl.py       settings → checks → models → trainer
settings_yaml.py    the settings as `config.yaml`
run_checks.py       what both kinds of run check alike: packages, folders, disk
run_models.py       their models and tokenizer
prompts.py          their prompts
preflight.py        single checks: a model's name, two models, a task, the disk
host_settings.py    what the host libraries would refuse late
adapters.py         LoRA by flags
meta_model.py       a model without weights
dry_run.py          `--dry_run`: what a run would do and need
memory_estimate.py  = model_states.py + step_memory.py, from the sizes in model_size.py
"""
