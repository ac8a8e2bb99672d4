"""What one mistypes or forgets on a command line is answered at once, in the words of the
command.
"""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from transformers.training_args import OptimizerNames

from effopd.commands.main import main
from effopd.commands.rl import parse_rl
from effopd.commands.train import parse_command, parse_train
from effopd.common import optional
from effopd.errors import ConfigError, EffOPDError, MissingDependencyError
from effopd.extrapolate.config import EffOPDConfig
from effopd.launch import host_settings
from effopd.launch import opd as launch
from effopd.launch.adapters import adapter_config
from effopd.launch.dry_run import plan_tables
from effopd.launch.preflight import check_model_name
from effopd.launch.run_checks import resume_argument
from effopd.runs.records import METRICS

PAIR = ["--model_name_or_path", "testbed:student", "--teacher_model_name_or_path", "testbed:teacher", "--use_cpu"]
TESTBED = ["--task", "testbed:chain_sum"]
PLAIN = ["--prompt_suffix", "", "--as_chat", "false"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current directory with rows with answers, without, and a finished run."""
    for name, column in (("test.jsonl", "answer"), ("noans.jsonl", "solution")):
        rows = [{"problem": f"what is {n} + {n}", column: str(2 * n)} for n in range(40)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / METRICS).write_text('{"step": 1}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys, *argv: str) -> str:
    """The message of a command that fails as it should."""
    try:
        status = main(argv)
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


# -- what a run refuses, its dry run refuses -------------------------------------------------------

MISSING = {"vllm", "wandb", "liger_kernel", "bitsandbytes", "kernels"}
REFUSED = [
    (["--task", "testbed:foo"], "expected one of chain_sum"),
    (["--task", "math:nofile.jsonl"], "no such file"),
    ([*TESTBED, "--model_name_or_path", "./nope"], "--model_name_or_path './nope': no such folder in"),
    ([*TESTBED, "--teacher_model_name_or_path", "/nope"], "--teacher_model_name_or_path '/nope': no such folder"),
    ([*TESTBED, "--output_dir", "used"], "already holds a run"),
    (
        ["--task", "math:test.jsonl", "--per_device_train_batch_size", "64"],
        "a step takes 64 prompts, but the task has only 36",
    ),
    (["--task", "math:noans.jsonl", "--effopd.strategy", "effopd"], "because of --effopd.strategy effopd."),
    (
        ["--task", "math:noans.jsonl", "--eval_strategy", "steps", "--eval_steps", "2"],
        "because of --eval_strategy steps.",
    ),
    (
        ["--task", "math:test.jsonl", "--effopd.strategy", "effopd"],
        "50 validation prompts are drawn from the training prompts but there are 36",
    ),
    (
        [*TESTBED, "--effopd.strategy", "line_search", "--per_device_train_batch_size", "1"],
        "at least 2 rollouts per step",
    ),
    ([*TESTBED, "--use_vllm"], "pip install 'effopd[vllm]'"),
    ([*TESTBED, "--report_to", "wandb"], "--report_to wandb needs the package 'wandb'"),
    ([*TESTBED, "--report_to", "wandbb"], "--report_to: wandbb is not supported"),
    ([*TESTBED, "--verifier", "nomod:f"], "an importable module 'nomod'"),
    ([*TESTBED, "--resume_from_checkpoint", "nowhere"], "nowhere is no checkpoint"),
    (["--task", "math:test.jsonl", *PLAIN, "--max_prompt_length", "3"], "at most 3 prompt tokens"),
    (
        [*TESTBED, "--teacher_model_init_kwargs", '{"dtype": "bf16"}'],
        "one of auto, bfloat16, float16, float32; got 'bf16'",
    ),
    ([*TESTBED, "--teacher_model_init_kwargs", '{"load_in_8bit": true}'], '"quantization_config": {"quant_method"'),
    ([*TESTBED, "--model_init_kwargs", '{"load_in_8bit": true}'], "--load_in_8bit true (with --use_peft true)"),
    ([*TESTBED, "--model_init_kwargs", '{"dtyp": "bfloat16"}'], "--model_init_kwargs: expected loading arguments"),
    (
        [*TESTBED, "--teacher_model_init_kwargs", '{"foo": 1}'],
        "--teacher_model_init_kwargs: expected loading arguments",
    ),
    (
        [*TESTBED, "--teacher_model_init_kwargs", "{'dtype': 'bfloat16'}"],
        "--teacher_model_init_kwargs: expected a JSON object",
    ),
    ([*TESTBED, "--chat_template_kwargs", "enable_thinking=false"], "--chat_template_kwargs: expected a JSON object"),
    (
        [*TESTBED, "--attn_implementation", "flash_attention_2"],
        "--attn_implementation flash_attention_2 needs the package",
    ),
    ([*TESTBED, "--attn_implementation", "spda"], "--attn_implementation: expected one of eager"),
    (
        [*TESTBED, "--teacher_model_init_kwargs", '{"attn_implementation": "spda"}'],
        "--teacher_model_init_kwargs: expected one of eager",
    ),
    ([*TESTBED, "--attn_implementation", "kernels-community/flash-attn"], "needs the package 'kernels'"),
    ([*TESTBED, "--use_liger_kernel", "true"], "--use_liger_kernel needs the package 'liger_kernel'"),
    ([*TESTBED, "--load_in_4bit", "true"], "'bitsandbytes'"),
    ([*TESTBED, "--optim_args", "lr"], "Expected --optim_args NAME=VALUE"),
    ([*TESTBED, "--lr_scheduler_type", "cosine_with_min_lr"], "--lr_scheduler_type cosine_with_min_lr"),
    ([*TESTBED, "--lr_scheduler_type", "cosin"], "--lr_scheduler_type cosin"),
    ([*TESTBED, "--temperature", "0"], "--temperature: expected a finite number above 0, got 0.0"),
    ([*TESTBED, "--generation_kwargs", '{"temperature": 0}'], "--generation_kwargs"),
    ([*TESTBED, "--fp16", "true"], "--fp16 true: this run is on the CPU"),
    ([*TESTBED, "--use_peft", "true", "--lora_target_modules", "q_proj", "lm_head"], "includes the output head"),
    (
        [*TESTBED, "--use_peft", "true", "--lora_target_modules", "q_prj", "v_proj"],
        "has no module 'q_prj'. Did you mean q_proj",
    ),
    ([*TESTBED, "--use_peft", "true", "--lora_target_modules", "q_prj"], "has no module 'q_prj'. Did you mean q_proj"),
    ([*TESTBED, "--use_peft", "true", "--lora_target_modules", ".*q_prj"], "--lora_target_modules .*q_prj"),
    (
        [*TESTBED, "--use_peft", "true", "--lora_modules_to_save", "embed"],
        "--lora_modules_to_save: the model has no module",
    ),
    ([*TESTBED, "--use_peft", "true", "--lora_target_parameters", "q.weights"], "has no parameter 'q.weights'"),
    ([*TESTBED, "--lora_r", "4"], "--lora_r: no effect without --use_peft true"),
    (
        [*TESTBED, "--effopd.strategy", "effopd", "--effopd.parameters", "nothing"],
        "matches no trained parameter of the student",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "run"])
@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_dry_run_refuses_what_the_run_refuses_before_it_loads(flags, message, dry, folder, capsys, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("the models would have been loaded")

    monkeypatch.setattr(launch, "OPDTrainer", loaded)
    monkeypatch.setattr(optional, "is_available", lambda module: module not in MISSING)  # wherever the tests run
    before = sorted(folder.rglob("*"))
    assert message in said(capsys, "train", *PAIR, *flags, *["--dry_run"] * dry)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.slow
def test_a_dry_run_counts_the_rows_of_a_file(folder, capsys):
    assert main(["train", *PAIR, "--task", "math:test.jsonl", *PLAIN, "--dry_run"]) == 0
    assert "training prompts: 36; no evaluation" in capsys.readouterr().out
    flags = ["--eval_strategy", "steps", "--eval_steps", "2", "--effopd.strategy", "line_search"]
    assert main(["train", *PAIR, "--task", "math:test.jsonl", *PLAIN, *flags, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "training prompts: 36, evaluated on: 4" in out and "not checked" not in out
    assert "scores 4 rollouts per candidate, samples nothing" in " ".join(out.split())
    several = [*flags[:-1], "newton_search", "--updates_per_rollouts", "2"]
    assert main(["train", *PAIR, "--task", "math:test.jsonl", *PLAIN, *several, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "scores 4 rollouts per candidate (8 in the first search), samples nothing" in " ".join(out.split())
    flags += ["--effopd.score_rollouts", "32"]
    assert main(["train", *PAIR, "--task", "math:test.jsonl", *PLAIN, *flags, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "scores 8 rollouts per candidate (all of a step, instead of 32)" in " ".join(out.split())


def test_a_dry_run_goes_to_no_network_and_says_what_it_left_out(folder, capsys, monkeypatch):
    import datasets
    import huggingface_hub

    def asked(*args, **kwargs):
        raise AssertionError("asked the Hub")

    monkeypatch.setattr(datasets, "load_dataset", asked)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)
    monkeypatch.setattr(huggingface_hub.file_download, "get_hf_file_metadata", asked)
    flags = ["--model_name_or_path", "org/model-1.7B", "--teacher_model_name_or_path", "org/model-4B"]
    assert main(["train", *flags, "--task", "math:org/set", "--dry_run", "--use_cpu"]) == 0
    out = capsys.readouterr().out
    assert "not checked" in out and "a Hub dataset" in out and "tokenizers" in out
    message = said(capsys, "train", *flags, "--task", "math:org/set", "--dry_run", "--verifier", "nomod:f")
    assert "an importable module 'nomod'" in message


# -- settings that nothing reads -------------------------------------------------------------------

STUDENT, EVAL_BATCH = PAIR[:2], ["--per_device_eval_batch_size", "16"]
UNREAD = [
    (["--eval_steps", "5"], "--eval_steps: no effect without --eval_strategy steps. Add"),
    (["--eval_strategy", "epoch", "--eval_steps", "5"], "--eval_steps: no effect without --eval_strategy steps"),
    (["--eval_delay", "5"], "--eval_delay: no effect without --eval_strategy steps"),
    (["--metric_for_best_model", "kl"], "--metric_for_best_model: no effect without --eval_strategy steps"),
    (["--greater_is_better", "true"], "--greater_is_better: no effect without --eval_strategy steps"),
    (["--eval_temperature", "0.7"], "--eval_temperature: no effect without --eval_strategy steps. Add"),
    (["--eval_greedy", "false", "--eval_seed", "5"], "--eval_greedy, --eval_seed: no effect without --eval_strategy"),
    (["--eval_accumulation_steps", "5"], "--eval_accumulation_steps: no effect without --eval_strategy steps"),
    (["--bf16_full_eval", "true", "--use_cpu"], "--bf16_full_eval: no effect without --eval_strategy steps"),
    (["--do_eval", "true"], "--do_eval: no effect without --eval_strategy steps"),
    (["--vllm_mode", "server"], "--vllm_mode: no effect without --use_vllm true"),
    (
        ["--vllm_server_port", "8001", "--vllm_gpu_memory_utilization", "0.5"],
        "--vllm_gpu_memory_utilization: no effect",
    ),
    (["--optim", "sgd", "--adam_beta1", "0.5"], "--adam_beta1 0.5: --optim sgd does not read it. Leave it out."),
    (["--optim", "adafactor", "--adam_epsilon", "1e-6"], "--adam_epsilon 1e-06: --optim adafactor does not read it"),
    (["--warmup_steps", "2"], "--warmup_steps 2: the schedule 'constant' has no warm-up"),
]


@pytest.mark.parametrize("parse", [parse_train, parse_rl])
@pytest.mark.parametrize(("flags", "message"), UNREAD, ids=[" ".join(flags) for flags, _ in UNREAD])
def test_a_setting_that_nothing_reads_is_refused(parse, flags, message):
    settings = parse([*(PAIR if parse is parse_train else [*STUDENT, "--use_cpu", *EVAL_BATCH]), *TESTBED, *flags])
    args = settings.opd if parse is parse_train else settings.rl
    with pytest.raises(ConfigError, match=re.escape(message)):
        host_settings.check_host_settings(settings.model, args)


def test_an_unread_setting_at_its_default_passes():
    flags = ["--vllm_mode", "colocate", "--adam_beta1", "0.9", "--warmup_steps", "0", "--eval_delay", "0"]
    settings = parse_train([*PAIR, *TESTBED, "--optim", "sgd", *flags])
    host_settings.check_host_settings(settings.model, settings.opd)
    settings = parse_train([*PAIR, *TESTBED, "--adam_beta1", "0.5"])
    host_settings.check_host_settings(settings.model, settings.opd)


@pytest.mark.parametrize("reader", [["--eval_on_start", "true"], ["--eval_strategy", "epoch"]])
def test_an_evaluation_before_the_first_step_reads_its_settings_too(reader):
    settings = parse_train([*PAIR, *TESTBED, "--eval_temperature", "0.7", "--eval_greedy", "false", *reader])
    host_settings.check_host_settings(settings.model, settings.opd)


def test_a_flag_that_turns_a_reader_off_replaces_what_the_file_sets_for_it(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "eval_strategy: steps\neval_steps: 5\nmetric_for_best_model: kl\nvllm_mode: server\nuse_vllm: true\n"
        "effopd: {strategy: line_search}\n"
    )
    settings = parse_train([*PAIR, *TESTBED, "--config", str(file)])
    assert (settings.opd.eval_steps, settings.opd.vllm_mode) == (5, "server")
    off = ["--eval_strategy", "no", "--use_vllm", "false"]
    settings = parse_train([*PAIR, *TESTBED, "--config", str(file), *off])
    host_settings.check_host_settings(settings.model, settings.opd)
    assert settings.effopd.strategy == "line_search"
    settings = parse_train([*PAIR, *TESTBED, "--config", str(file), "--use_vllm", "--eval_strategy", "epoch"])
    assert settings.opd.use_vllm and settings.opd.vllm_mode == "server" and settings.opd.eval_steps is None
    assert settings.opd.metric_for_best_model == "kl"


@pytest.mark.parametrize(
    ("file", "flags", "temperature"),
    [
        ("eval_strategy: steps\neval_steps: 5", [], 0.7),
        ("eval_strategy: steps\neval_steps: 5", ["--eval_strategy", "no"], 1.0),
        ("eval_strategy: steps\neval_steps: 5\neval_on_start: true", ["--eval_strategy", "no"], 0.7),
        ("eval_strategy: 'no'\neval_on_start: true", ["--eval_on_start", "false"], 1.0),
        ("eval_strategy: no\neval_on_start: true", ["--eval_strategy", "no", "--eval_on_start", "false"], 1.0),
        ("eval_strategy: no", ["--eval_on_start", "true"], 0.7),
    ],
)
def test_flags_that_end_all_evaluations_replace_the_files_evaluation_settings(tmp_path, file, flags, temperature):
    path = tmp_path / "c.yaml"
    path.write_text(f"{file}\neval_temperature: 0.7\n")
    settings = parse_train([*PAIR, *TESTBED, "--config", str(path), *flags])
    host_settings.check_host_settings(settings.model, settings.opd)
    assert settings.opd.eval_temperature == temperature


# -- models ----------------------------------------------------------------------------------------


def test_a_model_that_is_nowhere(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    where = f"'./nope': no such folder in {tmp_path}, and not a valid Hub id."
    assert where in said(capsys, "rl", "--model_name_or_path", "./nope", *TESTBED, "--use_cpu")
    assert where in said(capsys, "eval", "--model", "./nope", *TESTBED)
    for command in (
        ["train", "--model_name_or_path", "testbed:techer", "--teacher_model_name_or_path", "x", *TESTBED],
        ["rl", "--model_name_or_path", "testbed:techer", *TESTBED],
        ["eval", "--model", "testbed:techer", *TESTBED],
    ):
        message = said(capsys, *command)
        assert "expected one of testbed:student, testbed:teacher, testbed:smollm2, testbed:wide_teacher" in message
        assert "got 'testbed:techer'" in message
    (tmp_path / "empty").mkdir()
    message = said(capsys, "train", *PAIR, *TESTBED, "--model_name_or_path", "empty")
    assert "--model_name_or_path 'empty' has no config.json" in message
    check_model_name("--model", "org/model")  # may be on the Hub


# -- flags and keys --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--line_search"],
            "unknown flag --line_search. Did you mean --effopd.strategy line_search? (`effopd train --help`",
        ),
        (["--warmup_ratio", "0.1"], "unknown flag --warmup_ratio. Did you mean --warmup_steps SHARE? ("),
        (["--torch_dtype", "bfloat16"], "unknown flag --torch_dtype. Did you mean --dtype? ("),
        (["--evaluation_strategy", "steps"], "unknown flag --evaluation_strategy. Did you mean --eval_strategy? ("),
        (
            ["--learning_rte", "1e-4"],
            "unknown flag --learning_rte. Did you mean --learning_rate? (`effopd train --help` lists all)",
        ),
        (["--learning_rte=1e-4"], "unknown flag --learning_rte. Did you mean --learning_rate?"),
        (["--trainsize", "4", "--zzz"], "unknown flag --trainsize. Did you mean --train_size? unknown flag --zzz. ("),
        (["--score_rollouts", "2"], "Did you mean --effopd.score_rollouts?"),
        (["--batch_size", "2"], "--per_device_train_batch_size"),
        (["--effopd", "line_search"], "unknown flag --effopd. Did you mean --effopd.strategy"),
        (
            ["recipe.yaml"],
            "'recipe.yaml' belongs to no flag: expected --FLAG VALUE; write --config before a YAML file.",
        ),
        (["--config"], "expected a YAML file after it"),
        (["--config", "gone.yaml"], "--config gone.yaml: no such file (working directory: /"),
        (["--config", "/"], "--config /: is a folder. Expected the path of a YAML file."),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config is given twice"),
        (["--lr", "1"], "ConfigError: unknown flag --lr. Did you mean --learning_rate? ("),
        (["--eval_s", "1"], "unknown flag --eval_s. Did you mean --eval_size or --eval_strategy or --eval_steps? ("),
        (["--effopd.strategy", "line_serach"], "'relex'). Did you mean line_search?"),
        (["--loss_type", "xyz"], "'discord')\n"),
        (
            ["--teacher_server", "http://localhost:9"],
            "Leave out --teacher_model_name_or_path, or leave out --teacher_server.",
        ),
        (["--steps_per_generation", "4"], "Did you mean --updates_per_rollouts?"),
    ],
)
def test_an_unknown_flag_comes_back_with_what_was_meant(flags, message, capsys):
    assert message in said(capsys, "train", *PAIR, *TESTBED, *flags)


def test_rl_explains_its_flags_too(capsys):
    base = ["rl", "--model_name_or_path", "testbed:student", *TESTBED]
    message = said(capsys, *base, "--learning_rte", "1e-4", "--grpo")
    assert "Did you mean --learning_rate?" in message and "Did you mean --algorithm grpo?" in message


@pytest.mark.parametrize("command", ["train", "rl"])
def test_an_unknown_yaml_key_is_named_as_written_with_its_file(command, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rte: 1\nwarmup_step: 2\n")
    message = said(capsys, command, "--config", str(file), *TESTBED)
    assert "c.yaml: unknown setting learning_rte. Did you mean learning_rate?" in message
    assert "unknown setting warmup_step. Did you mean warmup_steps?" in message and "dataclass" not in message


def test_yaml_blocks_and_dotted_keys(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    flags = [*PAIR, *TESTBED, "--config", str(file)]
    file.write_text("effopd: {strategi: line_search}\n")
    assert "c.yaml: unknown setting effopd.strategi. Did you mean effopd.strategy?" in said(capsys, "train", *flags)
    file.write_text("effopd: line_search\n")
    assert "c.yaml: effopd: expected a block, {strategy: …}, got 'line_search'" in said(capsys, "train", *flags)
    file.write_text("effopd: [\n")
    assert "c.yaml" in said(capsys, "train", *flags)
    for text in ("effopd: {strategy: line_search}", "effopd.strategy: line_search", "effopd_strategy: line_search"):
        file.write_text(text)
        assert parse_train(flags).effopd.strategy == "line_search"
    file.write_text("effopd:\n")
    assert not parse_train(flags).effopd.enabled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: fast", "learning_rate: expected another value, got 'fast'"),
        ("max_steps: 1.5", "max_steps: expected another value, got 1.5"),
        ("bf16: maybe", "bf16: expected another value, got 'maybe'"),
        (
            "loss_type: half",
            "loss_type: expected one of full, sampled, teacher_top_k, negative_advantage, discord; got 'half'",
        ),
        ("effopd: {gate: nearly}", "effopd.gate: expected one of"),
        ("learning_rate: [1, 2]", "learning_rate: expected one value, got [1, 2]"),
        ("learning_rate: {a: 1}", "learning_rate: expected a finite number"),
        ("learning_rate: null", "--learning_rate: expected a number, got nothing"),
        ("lora_target_modules: [1.5]\nuse_peft: true", "has no module '1.5'"),
        ("chat_template_kwargs: [1]", "--chat_template_kwargs: expected a JSON object"),
        ("- 1", "must contain a YAML mapping"),
        ("seed: 1\nlearning_rate: 1\nseed: 2", "c.yaml: seed is set twice, in lines 1 and 3"),
        ("effopd: {seed: 1, seed: 1}", "c.yaml: seed is set twice"),
        ("effopd: {strategy: effopd}\neffopd.strategy: effopd", "c.yaml: effopd.strategy is set twice, in two"),
        ("yes: 1", "c.yaml: YAML reads a key as True"),
        ("learning-rate: 1", "unknown setting learning-rate. Did you mean learning_rate?"),
    ],
)
def test_a_bad_value_in_yaml_is_refused_like_one_of_a_flag(text, message, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert message in said(capsys, "train", *PAIR, *TESTBED, "--config", str(file), "--dry_run")


@pytest.mark.parametrize("command", ["train", "rl", "eval", "cache"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1\nb: 2", '"c.yaml", line 2'),
        ("output_dir: Läufe".encode("latin-1"), "c.yaml: expected text in utf-8, got the byte 0xe4 at position 13"),
    ],
)
def test_a_settings_file_that_is_no_yaml_is_named(command, content, message, tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    assert message in said(capsys, command, "--config", str(file))


def test_values_in_yaml_are_taken_as_written(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "learning_rate: 1e-4\nmax_steps: 3\nuse_peft: true\nlora_target_modules: q_proj\ntrajectory: 8\n"
        "chat_template_kwargs: {enable_thinking: false}\neffopd: {strategy: effopd, args: "
        "{scales: [2, 4]}}\nmodel_revision: 1\nsave_strategy: no\n"
    )
    settings = parse_train([*PAIR, *TESTBED, "--config", str(file)])
    assert settings.opd.save_strategy == "no"
    assert (settings.opd.learning_rate, settings.opd.max_steps, settings.opd.trajectory) == (1e-4, 3, "8")
    assert settings.opd.chat_template_kwargs == {"enable_thinking": False} and settings.effopd.args["scales"] == [2, 4]
    assert adapter_config(settings.model).target_modules == {"q_proj"} and settings.model.model_revision == "1"


@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
def test_an_optimizer_is_built_or_refused_by_name(optim):
    settings = parse_train([*PAIR, *TESTBED, "--optim", optim, "--max_steps", "2"])
    try:
        host_settings.check_host_settings(settings.model, settings.opd)
    except EffOPDError as error:
        assert "--optim" in str(error)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "nan"], "--temperature must be >= 0"),
        (["--temperature", "inf"], "--temperature must be >= 0"),
        (["--top_p", "nan"], "--top_p in (0, 1]"),
        (["--seed", "-1"], "--seed must be"),
        (["--dtype", "bf16"], "--dtype: expected auto"),
        (["--n", "0"], "--n must be at least 1"),
        (["--max_new_tokens", "1" + "0" * 30], "--max_new_tokens must be at least 1 and below 2^31"),
    ],
)
def test_eval_refuses_values_out_of_range(flags, message, capsys):
    assert message in said(capsys, "eval", "--model", "testbed:student", *TESTBED, *flags)


def test_analyze_refuses_a_seed_out_of_range(capsys, tmp_path):
    pair = ["--base", "testbed:student", "--trained", "rl=testbed:teacher", "--out", str(tmp_path / "out")]
    assert "--seed: expected a whole number" in said(capsys, "analyze", *pair, "--seed", "-1")


def test_everything_that_is_missing_is_named(capsys):
    message = said(capsys, "train")
    assert all(flag in message for flag in ("--model_name_or_path", "--teacher_model_name_or_path", "--task"))
    message = said(capsys, "rl")
    assert "missing: --model_name_or_path, --task" in message
    assert "unknown flag --tsk. Did you mean --task?" in said(capsys, "train", "--tsk", "x")


def test_messages_about_the_lookahead_name_its_flags_in_one_spelling(capsys):
    flags = ["train", *PAIR, *TESTBED, "--effopd.strategy"]
    assert "EffOPDConfig.min_z (--effopd.min_z) must be" in said(capsys, *flags, "line_search", "--effopd.min_z", "-1")
    message = said(capsys, *flags, "efopd")
    assert "argument --effopd.strategy: invalid choice" in message and "--effopd_strategy" not in message


def test_an_unknown_command_comes_back_with_what_was_meant(capsys):
    assert "unknown command 'tran'. Did you mean train? Expected one of quickstart" in said(capsys, "tran")
    assert "unknown command 'xyz'. Expected one of" in said(capsys, "xyz")


@pytest.mark.parametrize("words", [["report", "gone"], ["compare", "--report", "gone"]])
def test_a_folder_that_does_not_exist_is_called_so(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert f"gone: no such folder (working directory: {tmp_path})" in said(capsys, *words)


def test_a_dry_run_is_a_switch_like_those_of_fields():
    base = [*PAIR, *TESTBED]
    words = (["--dry_run"], ["--dry_run", "true"], ["--dry_run", "false"], [])
    assert [parse_command([*base, *each])[1] for each in words] == [True, True, False, False]


def test_resuming_needs_no_word():
    assert parse_train([*PAIR, *TESTBED, "--resume_from_checkpoint"]).opd.resume_from_checkpoint == "true"
    assert parse_train([*PAIR, *TESTBED, "--resume_from_checkpoint", "--seed", "1"]).opd.seed == 1
    assert parse_train([*PAIR, *TESTBED, "--resume_from_checkpoint", "x"]).opd.resume_from_checkpoint == "x"
    assert parse_train([*PAIR, *TESTBED]).opd.resume_from_checkpoint is None
    rl = parse_rl(["--model_name_or_path", "testbed:student", *TESTBED, "--use_cpu", "--resume_from_checkpoint"]).rl
    assert resume_argument(rl) is True


def test_deepspeed_settings_are_checked_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(optional, "is_available", lambda module: module != "deepspeed")
    (tmp_path / "ds.json").write_text("{}")
    flags = [*PAIR, *TESTBED, "--deepspeed", str(tmp_path / "ds.json")]
    with pytest.raises(EffOPDError, match=r"--deepspeed needs the package 'deepspeed'.*pip install 'deepspeed'"):
        parse_train(flags)
    settings = parse_train([*PAIR, *TESTBED, "--effopd.strategy", "line_search"])
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    settings.opd.deepspeed_plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=config))
    for check in (launch.check_settings, plan_tables):  # the run, and its dry run
        with pytest.raises(ConfigError, match=r"offload_optimizer\.device='cpu' cannot be combined with a look-ahead"):
            check(settings)
    del config["zero_optimization"]["offload_optimizer"]
    launch.check_settings(settings)
    for name, value, default in (("average_weights", "ema", "none"), ("k_step_lookahead", 5, 0)):
        setattr(settings.opd, name, value)
        with pytest.raises(ConfigError, match=f"{name}={value!r} needs whole weights"):
            launch.check_settings(settings)
        setattr(settings.opd, name, default)
    settings.model.use_peft = True
    with pytest.raises(ConfigError, match="look-ahead on LoRA adapters needs whole factors"):
        launch.check_settings(settings)
    settings.effopd = EffOPDConfig("none")
    launch.check_settings(settings)


@pytest.mark.parametrize("present", ["tensorboard", "tensorboardX", None])
def test_either_tensorboard_will_do(present, monkeypatch):
    settings = parse_train([*PAIR, *TESTBED, "--report_to", "tensorboard"])
    monkeypatch.setattr(optional, "is_available", lambda module: module == present)
    missing = nullcontext() if present else pytest.raises(MissingDependencyError, match="pip install 'tensorboard'")
    with missing:
        host_settings.require_packages(settings.model, settings.opd)


# -- eval ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "prompts", "part"),
    [
        (
            ["--task", "math:test.jsonl"],
            4,
            "4 of 40 rows (held out with --task_seed 0, perhaps not as in training; --eval_size 40 for all)",
        ),
        (["--task", "math:test.jsonl", "--eval_size", "40"], 40, None),
        (["--eval_task", "math:test.jsonl"], 40, None),
        (
            ["--eval_task", "math:test.jsonl", "--eval_size", "5"],
            5,
            "5 of 40 rows (--eval_size 5; --eval_size 40 for all)",
        ),
        (["--task", "testbed:chain_sum", "--eval_size", "6"], 6, None),
    ],
)
def test_eval_says_when_it_is_a_part(flags, prompts, part, folder, capsys):
    plain = PLAIN if "testbed:chain_sum" not in flags else []
    assert main(["eval", "--model", "testbed:student", *flags, *plain, "--max_new_tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert f"over {prompts} prompts" in out
    assert part in out if part else "rows" not in out


def test_eval_needs_a_task_of_some_kind(folder, capsys):
    message = said(capsys, "eval", "--model", "testbed:student")
    assert "--task and --eval_task are missing" in message
    message = said(capsys, "eval", "--model", "testbed:student", "--eval_task", "math:noans.jsonl")
    assert """--eval_task_args '{"answer_column": "solution"}'""" in message


def test_several_trackers(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("report_to: [tensorboard, trackio]\n")
    for flags in (["--report_to", "tensorboard", "trackio"], ["--config", str(file)]):
        assert parse_train([*PAIR, *TESTBED, *flags]).opd.report_to == ["tensorboard", "trackio"]
    assert parse_train([*PAIR, *TESTBED, "--report_to", "none"]).opd.report_to == []


@pytest.mark.parametrize(
    "command",
    [
        "eval --model testbed:student --task testbed:chain_sum --output",
        "report used --out",
        "compare plan.yaml --out",
        "analyze --base testbed:student --trained t=testbed:teacher --out",
        "intervene alpha --base testbed:student --trained t=testbed:teacher --task testbed:chain_sum --out",
        "intervene alpha --base testbed:student --trained t=testbed:teacher --save_dir",
        "init --out",
    ],
)
def test_results_that_could_not_be_written_are_refused_before_the_work(command, folder, capsys):
    message = said(capsys, *command.split(), "test.jsonl/below.yaml")
    assert "test.jsonl is a file: expected a folder" in message


def test_a_grid_in_a_file_is_refused(folder, capsys):
    (folder / "plan.yaml").write_text(
        "{output_dir: test.jsonl, reference_learning_rate: 1.0e-4, tasks: [t], seeds: [0], base: {}, "
        "strategies: {plain: {}}}"
    )
    assert "output_dir: " in said(capsys, "compare", "plan.yaml") and (folder / "test.jsonl").is_file()


def test_a_page_is_no_folder(tmp_path, capsys):
    assert f"Write --out {tmp_path}/report.html" in said(capsys, "report", str(tmp_path), "--out", str(tmp_path))


@pytest.mark.parametrize("content", ["{}\n{}\n", "[]", '{"runs": []}'])
def test_files_that_are_something_else(tmp_path, capsys, content):
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    assert "expected a results.json" in said(capsys, "compare", "--report", str(file), "--out", str(tmp_path / "out"))
    assert "is a file" in said(capsys, "testbed", "build", "--output_dir", str(file))
    file.write_text("a: [\nb")
    assert "is not YAML" in said(capsys, "compare", str(file))
    assert not (tmp_path / "out").exists()
