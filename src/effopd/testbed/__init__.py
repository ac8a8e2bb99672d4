"""Recipe for the built-in student and teacher: `effopd testbed build --output_dir OUT_DIR`.

    tokenizer.py      tokenizer: bytes, pairs and constant phrases
    base_training.py  random Qwen3 → base student, trained on partly falsified reasoning
    rl.py             base student → teacher, by GRPO
    measure.py        accuracies, and plain distillation as the reference run
    recipe.py         all steps in order
    assets/           output for the default seed: student/, teacher/, card.json, build.log

`effopd.tasks.builtin_models` returns the paths of the pair; `effopd.tasks.testbed_families` holds
its two task families.
"""
