"""The reinforcement-learning baselines: TRL's updates, this package's run directory."""

from __future__ import annotations

import dataclasses

import pytest
from helpers.tiny_models import make_model, make_task, make_tokenizer
from helpers.traces import parameters, same
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from effopd import EffOPDCallback, EffOPDConfig
from effopd.commands.main import main
from effopd.commands.rl import parse_rl
from effopd.common.files import read_rows
from effopd.distill.rl import TaskGRPOTrainer, TaskRLOOTrainer, correct_reward
from effopd.distill.rl_config import PRESETS, TaskGRPOConfig, TaskRLOOConfig
from effopd.errors import CheckpointError, ConfigError, TaskError
from effopd.launch import rl as launch_rl
from effopd.launch.memory_estimate import estimate_rl_memory
from effopd.launch.rl import rl_yaml
from effopd.tasks.base import Example, Task

SHARED = {
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "beta": 0.0,
    "max_completion_length": 5,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "activation_checkpointing": False,
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "max_steps": 4,
    "dataloader_pin_memory": False,
}


def make_trainer(output_dir, kind=TaskGRPOTrainer, config=TaskGRPOConfig, **settings):
    args = config(output_dir=str(output_dir), **(SHARED | settings))
    task = make_task(32)
    return kind(make_model(0), args, task, task.sample(8, 1), processing_class=make_tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config", "host", "host_config"),
    [
        (TaskGRPOTrainer, TaskGRPOConfig, GRPOTrainer, GRPOConfig),
        (TaskRLOOTrainer, TaskRLOOConfig, RLOOTrainer, RLOOConfig),
    ],
)
def test_trains_bit_for_bit_like_trl(tmp_path, kind, config, host, host_config):
    settings = {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 1, "trajectory": "1"}
    ours = make_trainer(tmp_path / "ours", kind, config, **settings)
    ours.train()
    task = make_task(32)
    theirs = host(
        make_model(0),
        correct_reward(task),
        host_config(output_dir=str(tmp_path / "trl"), save_strategy="no", **SHARED),
        task.to_dataset(),
        processing_class=make_tokenizer(),
    )
    theirs.train()
    assert same(parameters(ours), parameters(theirs))
    assert not same(parameters(ours), dict(make_model(0).named_parameters()))
    saved = [path.name for path in sorted((tmp_path / "ours" / "trajectory").iterdir())]
    assert saved == [f"step-{step:06d}" for step in range(5)]
    assert same(
        load_file(tmp_path / "ours" / "trajectory" / "step-000004" / "model.safetensors"),
        {n: p for n, p in parameters(ours).items() if n != "lm_head.weight"},
    )


@pytest.mark.slow
def test_rows(tmp_path):
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=2, eval_on_start=True, save_strategy="no")
    trainer.train()
    rows, evals = list(read_rows(tmp_path / "metrics.jsonl")), list(read_rows(tmp_path / "evals.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in evals] == [0, 2, 4]
    for row in rows:
        assert 0 <= row["rewards/correct/mean"] <= 1
    last = rows[-1]
    assert last["cost/rollout_generated_tokens"] > 0 and last["cost/update_forward_tokens"] > 0
    parts = [last[f"cost/{name}_seconds"] for name in ("rollout", "teacher", "update", "search", "other")]
    assert last["cost/net_seconds"] == pytest.approx(sum(parts))
    assert {"eval_accuracy", "eval_accuracy_low", "eval_accuracy_greedy"} <= evals[0].keys()
    assert "eval_kl" not in evals[0]


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}])
def test_resume_ends_with_the_same_weights(tmp_path, extra):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6} | extra
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    first = make_trainer(tmp_path / "cut", **settings)
    first.add_callback(_StopAt(3))
    first.train()
    with pytest.raises(CheckpointError, match="already holds a run"):
        make_trainer(tmp_path / "cut", **settings).train()
    again = make_trainer(tmp_path / "cut", **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert same(parameters(whole), parameters(again))


CYCLES = [
    {"num_iterations": 2},
    {"steps_per_generation": 2},
    # a cycle is a step and a half, and the last of the 8 steps of an epoch is half of one
    {"steps_per_generation": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [(TaskGRPOTrainer, TaskGRPOConfig), (TaskRLOOTrainer, TaskRLOOConfig)])
@pytest.mark.parametrize("cycle", CYCLES)
def test_a_resume_inside_rollouts_that_several_steps_share(tmp_path, kind, cycle):
    """Wherever in a cycle a run is cut off, it ends with the same weights; also twice."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 11, **cycle}
    whole = make_trainer(tmp_path, *kind, **settings)
    whole.train()
    saved = [path.parent.name for path in sorted(tmp_path.glob("checkpoints/*/effopd_rollouts-00000-of-00001.pt"))]
    assert saved and "step-000006" not in saved  # between two cycles there is nothing to keep
    for step, saves in ((9, "no"), (7, "no"), (1, "steps"), (4, "no")):  # a resume takes the later checkpoints away
        again = make_trainer(tmp_path, *kind, **settings | {"save_strategy": saves})
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / f"step-{step:06d}"))
        assert again.state.global_step == 11 and same(parameters(whole), parameters(again)), step


@pytest.mark.slow
def test_a_jump_inside_a_cycle_drops_its_rollouts_and_the_run_resumes(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8, "num_iterations": 2}

    def trainer(folder):
        made = make_trainer(tmp_path / folder, **settings)
        start = parameters(made)

        def distance(model):
            moved = (a.detach() - b for a, b in zip(model.parameters(), start.values(), strict=True))
            return sum(float(each.square().sum()) for each in moved)

        look_ahead = EffOPDConfig("effopd", args={"scales": [2.0]}, parameters="all", schedule="every_step")
        made.add_callback(EffOPDCallback(made, look_ahead, scorer=distance))
        sampled, real = [], made._generate_and_score_completions

        def sample(inputs):
            sampled.append(made.state.global_step + 1)
            return real(inputs)

        made._generate_and_score_completions = sample
        return made, sampled

    whole, sampled = trainer("whole")
    whole.train()
    jumps = [row["step"] for row in read_rows(tmp_path / "whole/searches.jsonl") if row["accepted_scale"]]
    assert any(step % 2 for step in jumps)
    # the ratios of the loss need rollouts of the present weights
    assert sampled == [step for step in range(1, 9) if step % 2 or step - 1 in jumps]
    for after in jumps:
        again, later = trainer(f"from-{after}")
        again.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoints/step-{after:06d}"))
        assert later == [step for step in sampled if step > after], after
        assert same(parameters(whole), parameters(again)), after


@pytest.mark.slow
def test_a_resume_without_the_shared_rollouts_says_so_and_stays_in_phase(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "num_iterations": 2}
    make_trainer(tmp_path, **settings).train()
    checkpoint = tmp_path / "checkpoints" / "step-000003"
    (checkpoint / "effopd_rollouts-00000-of-00001.pt").unlink()
    again, sampled = make_trainer(tmp_path, **settings), []
    real = again._generate_and_score_completions
    again._generate_and_score_completions = lambda inputs: sampled.append(again.state.global_step + 1) or real(inputs)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert sampled == [4, 5] and "this run will differ" in caplog.text


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(tmp_path, caplog, capsys):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3, "num_iterations": 2}
    trainer = make_trainer(tmp_path, **settings)
    trainer.train(resume_from_checkpoint=True)  # as each time the command is queued
    assert f"no checkpoint in {tmp_path}: starting at step 0" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for _ in range(2):
        again = make_trainer(tmp_path, **settings)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 3 and same(parameters(trainer), parameters(again))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert caplog.text.count("is finished (step 3 of 3); nothing was trained") == 2


class _StopAt(TrainerCallback):
    """Ends a run early, after its last checkpoint at step 2 is complete."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop, control.should_save = True, False
        return control


def test_reward_is_verified_correctness():
    task = make_task(8)
    reward = correct_reward(task)
    answers = [[{"role": "assistant", "content": text}] for text in ("xa", "xb", "b")]
    assert reward(completions=answers, id=["0", "0", "1"], prompts=None) == [1.0, 0.0, 1.0]
    assert reward(completions=["a", "z"], id=["0", "0"]) == [1.0, 0.0]


def test_an_answer_without_a_token_is_wrong_and_not_cut(tmp_path):
    """A `rollout_func` can return one."""
    trainer = make_trainer(tmp_path, save_strategy="no", max_steps=1)
    seen = []
    trainer.answer_watch.see = lambda task, counts, effect: seen.append(counts)
    assert trainer.reward_funcs[0](completions=["", "c"], id=["0", "0"], completion_ids=[[], [7]]) == [0.0, 0.0]
    assert (seen[0].answers, seen[0].empty, seen[0].cut) == (2, 1, 1)


def test_overlong_answers_are_punished(tmp_path):
    trainer = make_trainer(tmp_path, overlong_cache=0.4, save_strategy="no", max_steps=1)
    assert len(trainer.reward_funcs) == 2
    punish = trainer.reward_funcs[1]
    assert punish(completion_ids=[[1] * 3, [1] * 4, [1] * 5]) == [0.0, -0.5, -1.0]


def flags(output_dir, *extra):
    return ["--model_name_or_path", "testbed:student", "--task", "testbed:chain_sum", "--output_dir", str(output_dir),
            "--train_size", "64", "--eval_size", "8", "--max_completion_length", "12", "--report_to", "none",
            "--per_device_train_batch_size", "32", "--activation_checkpointing", "false", *extra]  # fmt: skip


@pytest.mark.parametrize("algorithm", PRESETS)
def test_presets_are_defaults_that_flags_override(tmp_path, algorithm):
    bare = ["--model_name_or_path", "testbed:student", "--task", "testbed:chain_sum", "--output_dir", str(tmp_path)]
    rl = parse_rl(
        [*bare, "--algorithm", algorithm]
    ).rl  # whose defaults fit together: 16 answers a prompt and a device
    assert {name: getattr(rl, name) for name in PRESETS[algorithm]} == PRESETS[algorithm]
    assert parse_rl(flags(tmp_path, "--algorithm", algorithm, "--beta", "0.5")).rl.beta == 0.5


@pytest.mark.parametrize("algorithm", PRESETS)
def test_the_written_yaml_is_the_run_again(tmp_path, algorithm):
    extra = ["--algorithm", algorithm, "--gradient_accumulation_steps", "2", "--trajectory", "8", "--seed", "3"]
    settings = parse_rl(flags(tmp_path, *extra))
    (tmp_path / "c.yaml").write_text(rl_yaml(settings))
    again = parse_rl(["--config", str(tmp_path / "c.yaml")])
    assert type(again.rl) is type(settings.rl)
    assert rl_yaml(again) == rl_yaml(settings)
    for field in dataclasses.fields(settings.task):
        assert getattr(again.task, field.name) == getattr(settings.task, field.name)


@pytest.mark.parametrize(
    "extra",
    [
        # TRL's defaults, which are not the preset's
        ("--beta", "0", "--num_generations", "8", "--per_device_train_batch_size", "8", "--loss_type", "dapo"),
        ("--gradient_accumulation_steps", "2", "--steps_per_generation", "1"),
        ("--steps_per_generation", "2", "--num_iterations", "2"),
        ("--debug", "underflow_overflow"),
    ],
)
def test_the_written_yaml_has_every_setting(tmp_path, extra):
    settings = parse_rl(flags(tmp_path, *extra))
    (tmp_path / "c.yaml").write_text(rl_yaml(settings))
    again = parse_rl(["--config", str(tmp_path / "c.yaml")])
    apart = [
        field.name
        for field in dataclasses.fields(settings.rl)
        if getattr(again.rl, field.name) != getattr(settings.rl, field.name)
    ]
    assert not apart


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    assert (
        main(["rl", *flags(tmp_path / "run", "--max_steps", "2", "--algorithm", "grpo", "--num_generations", "4")])
        == 0
    )
    assert "Done: step 2" in capsys.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert "algorithm: grpo" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_dry_run_shows_rows_and_memory_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch_rl, "TaskDGRPOTrainer", None)  # no trainer is built
    teacher = ["--algorithm", "dgrpo", "--teacher_model_name_or_path", "testbed:teacher"]
    batch = ["--num_generations", "4", "--gradient_accumulation_steps", "2", "--max_steps", "3"]
    assert main(["rl", *flags(tmp_path / "run", *teacher, *batch, "--eval_strategy", "epoch", "--dry_run")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "dgrpo, beta 1 × KL to the teacher",
        "training prompts: 64, evaluated on: 8",
        "64 answers = 32 × 2 accumulated × 1 process(es); answers up to 12 tokens",
        "16 prompts × 4 answers, used for 2 forward pass(es) per process",
        "3 steps, learning rate 1e-06",
        "longest prompt:",
    ):
        assert part in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("extra", [["--beta", "0.1"], ["--beta", "0"], ["--beta", "0.1", "--use_peft", "true"]])
def test_memory_counts_the_reference_and_what_is_sampled_at_once(tmp_path, extra):
    def estimate(*more):
        estimated = estimate_rl_memory(parse_rl(flags(tmp_path, *extra, *more)), 20)
        return estimated.columns[0], estimated.peaks[0]

    column, peak = estimate()
    assert column.get("frozen", 0) == (column["weights"] if extra == ["--beta", "0.1"] else 0)
    more, higher = estimate("--gradient_accumulation_steps", "4", "--steps_per_generation", "4")
    assert more["sampling"] == 4 * column["sampling"] and higher > peak


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
def test_mistakes_are_refused_before_training(tmp_path, capsys, dry_run):
    assert main(["rl", *flags(tmp_path / "run", "--algorithm", "ppo"), *dry_run]) == 2
    assert "grpo, dapo, rloo" in capsys.readouterr().err
    assert main(["rl", *flags(tmp_path / "run", "--train_size", "1"), *dry_run]) == 2
    assert "a generation batch takes 2 prompts" in capsys.readouterr().err
    assert main(["rl", *flags(tmp_path / "run", "--max_prompt_length", "9"), *dry_run]) == 2
    assert "max_prompt_length" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_configs_and_trainers_refuse_what_they_cannot_use(tmp_path):
    with pytest.raises(ConfigError, match="overlong_cache"):
        TaskGRPOConfig(overlong_cache=1.5)
    unanswered = Task("open", (Example("0", "hi"),), lambda text, example: 1.0)
    with pytest.raises(TaskError, match="cannot give a reward"):
        TaskGRPOTrainer(make_model(0), TaskGRPOConfig(output_dir=str(tmp_path), **SHARED), unanswered)
