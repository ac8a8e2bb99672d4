"""The recipe that makes the built-in student and teacher: `effopd testbed build --output_dir
OUT_DIR`.

    tokenizer.py      bytes + pairs + constant phrases
    base_training.py  random Qwen3 → base student, by supervised training on partly falsified
    reasoning
    rl.py             base student → teacher, by GRPO
    measure.py        accuracies, and plain distillation as the reference run
    recipe.py         all of it from nothing
    assets/           what the recipe made with its default seed: student/, teacher/, card.json, build.log

The pair itself, and its two task families, are found by `effopd.tasks.builtin_models` and
`effopd.tasks.testbed_families`.
"""
