"""What `effopd.distill.trl_host` relies on inside the host libraries; one check per private name.

If one of these fails after an upgrade, read the new source first.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from helpers.host_names import uses
from helpers.tiny_models import make_model, make_task, make_tokenizer
from transformers import GenerationMixin, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager
from trl import DistillationConfig, DistillationTrainer, GRPOTrainer, RLOOTrainer
from trl.experimental.gold import GOLDTrainer
from trl.experimental.iw_opd import IWOPDTrainer

from effopd.distill import trl_host
from effopd.distill.trl_host.models import inside_forward
from effopd.distill.trl_host.state import accelerate_undisturbed
from effopd.models.logit_path import forward_without_autocast


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_door_and_its_contract_name_the_same_things():
    """Every private name in `distill/trl_host` has its check here, and nothing else has."""
    in_door = {name for path in Path(trl_host.__file__).parent.glob("*.py") for name, _ in uses(path)}
    assert in_door == {name for _, name in METHODS} | {name for _, name in SET_BY} | set(IMPORTS) | set(SPECIAL)


RL = (GRPOTrainer, RLOOTrainer)
TRLS = (DistillationTrainer, *RL)
TURN = ["self", "prompt_ids", "images", "multimodal_fields"]
#: Methods that we override, replace or call, with the parameters that we rely on: the leading ones
#: if the last is `...`.
METHODS: dict[tuple[Any, str], list[Any]] = {
    (DistillationTrainer, "_compute_loss"): ["self", "unwrapped_student", "inputs", "num_items_in_batch"],
    (RL, "_compute_loss"): ["self", "model", "inputs"],
    (RL, "_get_per_token_logps_and_entropies"): ["self", "model", "input_ids", "attention_mask", ...],
    (DistillationTrainer, "_get_last_hidden_state"): [
        "self", "unwrapped_model", "input_ids", "attention_mask", "logits_to_keep", ...,
    ],
    (TRLS, "_generate_and_score_completions"): ["self", "inputs"],
    (TRLS, "_generate_single_turn"): [*TURN, ...],
    (TRLS, "_get_train_sampler"): ["self", "dataset"],
    (TRLS, "_prepare_inputs"): ["self", "generation_batch"],
    (TRLS, "_save_checkpoint"): ["self", "model", "trial"],
    (Trainer, "_get_output_dir"): ["self", "trial"],
    (Trainer, "_get_learning_rate"): ["self"],
    (Trainer, "_run_epoch"): ["self", "model", "epoch", ...],
    (Trainer, "_maybe_log_save_evaluate"): ["self", "tr_loss", "grad_norm", "model", ...],
    (Trainer, "_init_training_state"): [
        "self", "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial",
    ],
    (Trainer, "_determine_best_metric"): ["self", "metrics", "trial"],
    (Trainer, "_load_best_model"): ["self"],
    (Trainer, "_load_from_checkpoint"): ["self", "resume_from_checkpoint", "model"],
    (TRLS, "_load_optimizer_and_scheduler"): ["self", "checkpoint"],
    (Trainer, "_load_scaler"): ["self", "checkpoint"],
    (Trainer, "_load_rng_state"): ["self", "checkpoint"],
    (Trainer, "_issue_warnings_after_load"): ["self", "load_result"],
    (Trainer, "_save"): ["self", "output_dir", ...],
    (Trainer, "_save_optimizer_and_scheduler"): ["self", "output_dir"],
    (Trainer, "_save_scaler"): ["self", "output_dir"],
    (GenerationMixin, "_get_logits_processor"): ["self", ...],
    (GenerationMixin, "_update_model_kwargs_for_generation"): ["self", "outputs", "model_kwargs", ...],
    (PreTrainedModel, "_from_config"): ["config", ...],
}  # fmt: skip
#: Attributes, and the class whose code sets or reads them.
SET_BY = {
    (TRLS, "_buffered_inputs"): "self._buffered_inputs = None",
    (TRLS, "_metrics"): 'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}',
    (TRLS, "_logs"): "self._logs = {",
    (TRLS, "_last_loaded_step"): "if self.state.global_step != self._last_loaded_step:",
    (
        GOLDTrainer,
        "_last_vllm_sync_step",
    ): "self.state.global_step >= self._last_vllm_sync_step + self.vllm_sync_frequency",
    (IWOPDTrainer, "_last_vllm_sync_step"): "self.state.global_step != self._last_vllm_sync_step",
    (TRLS, "_step"): "self._step += 1",
    (TRLS, "_tokenizer"): "self._tokenizer = ",
    (TRLS, "_is_vlm"): "self._is_vlm = ",
    (TRLS, "_tag_names"): "model.add_model_tags(self._tag_names)",
    (TRLS, "_name"): "_name = ",
    (TRLS, "_paper"): "_paper = ",
    (Accelerator, "_models"): "self._models.append(model)",
    (CheckpointManager, "_original_sigterm_handler"): "self._original_sigterm_handler = signal.signal(",
}
#: Imported from a private place → parameters, again the leading ones if the last is `...`; `None`:
#: no function.
IMPORTS: dict[str, tuple[str, list[Any] | None]] = {
    "_ForwardRedirection": ("trl.models.utils", []),
    "split_pixel_values_by_grid": ("trl.trainer.utils", ["batch"]),
    "split_tensor_dict": ("trl.trainer.utils", ["tensor_dict", "num_chunks"]),
    "unsplit_pixel_values_by_grid": ("trl.trainer.utils", ["batch"]),
    "_chunked_divergence_loss": (
        "trl.trainer.distillation_trainer",
        [
            "student_hidden_states",
            "teacher_hidden_states",
            "student_lm_head_weight",
            "teacher_lm_head_weight",
            "completion_mask",
            "beta",
            "num_items_in_batch",
            "student_lm_head_bias",
            "teacher_lm_head_bias",
            "student_logit_scale",
            "teacher_logit_scale",
            "student_final_logit_softcapping",
            "teacher_final_logit_softcapping",
            "temperature",
        ],
    ),
    "ChunkedDivergenceFunction": (
        "trl.kernels.chunked_divergence",
        [
            "ctx",
            "student_hidden",
            "student_weight",
            "student_bias",
            "teacher_hidden",
            "teacher_weight",
            "teacher_bias",
            "beta",
            "temperature",
            "student_logit_scale",
            "student_final_logit_softcapping",
            "teacher_logit_scale",
            "teacher_final_logit_softcapping",
        ],
    ),
    "ChunkedLogProbFunction": ("trl.kernels.chunked_logprob", ["ctx", ...]),
    "TOKEN_CHUNK_SIZE": ("trl.kernels.chunked_divergence", None),
    "VOCAB_CHUNK_SIZE": ("trl.kernels.chunked_divergence", None),
    "create_model_from_path": ("trl.trainer.utils", ["model_id", ...]),
    "get_config_model_id": ("trl.trainer.utils", ["config"]),
    "get_comet_experiment_url": ("trl.trainer.utils", []),
    "get_trackio_space_url": ("trl.trainer.utils", []),
}
#: Names with a test of their own.
SPECIAL = {"_inner_training_loop", "_shared_state"}


def agrees(function, expected: list[Any]) -> bool:
    names = parameters(function)
    return names[: len(expected) - 1] == expected[:-1] if expected[-1:] == [...] else names == expected


def each(hosts) -> tuple[Any, ...]:
    return hosts if isinstance(hosts, tuple) else (hosts,)


@pytest.mark.parametrize(("hosts", "name"), METHODS)
def test_methods_take_what_we_give_and_expect(hosts, name):
    for host in each(hosts):
        assert agrees(getattr(host, name), METHODS[hosts, name]), parameters(getattr(host, name))


@pytest.mark.slow
@pytest.mark.parametrize(("hosts", "name"), SET_BY)
def test_attributes_are_set_where_we_read_them(hosts, name):
    for host in each(hosts):
        assert SET_BY[hosts, name] in inspect.getsource(host)


@pytest.mark.parametrize("name", IMPORTS)
def test_functions_of_private_modules_take_what_we_give(name):
    module, expected = IMPORTS[name]
    value = getattr(importlib.import_module(module), name)
    if expected is None:
        assert isinstance(value, int)
    else:
        assert agrees(getattr(value, "forward", value), expected), parameters(getattr(value, "forward", value))


def test_a_log_probability_kernel_call_is_what_its_definition_says():
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    from effopd.distill.divergence import Head, token_logprobs

    assert len(parameters(ChunkedLogProbFunction.forward)) >= 10
    hidden, weight, bias = torch.randn(5, 4), torch.randn(11, 4), torch.randn(11)
    head, targets = Head(weight, bias, 1.5, 3.0), torch.tensor([0, 3, 10, 5, 5])
    logp, entropy = token_logprobs(hidden, head, targets, 0.7)
    dense = head.logits(hidden, 0.7).log_softmax(-1)
    torch.testing.assert_close(logp, dense.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(dense.exp() * dense).sum(-1))


def test_the_loop_calls_what_we_replace():
    assert "self._prepare_inputs(inputs)" in inspect.getsource(Trainer.training_step)
    assert "self._run_epoch(" in inspect.getsource(Trainer._inner_training_loop)
    run_epoch = inspect.getsource(Trainer._run_epoch)
    assert "batch_samples, num_items_in_batch = self.get_batch_samples(" in run_epoch
    step = inspect.getsource(Trainer.training_step)  # what `TrainerLoss` does alike
    assert "self.model_accepts_loss_kwargs and num_items_in_batch is not None" in step
    assert "loss = loss / self.current_gradient_accumulation_steps" in step
    assert "learning_rate = self._get_learning_rate()" in run_epoch  # before the scheduler's step
    assert "self._maybe_log_save_evaluate(" in run_epoch
    assert "resume_from_checkpoint" in parameters(Trainer._inner_training_loop)  # what `resumed_checkpoint` reads
    assert parameters(DistillationTrainer.__init__)[:4] == ["self", "model", "teacher_model", "args"]


def test_redirection_runs_the_work_in_the_wrappers_forward():
    calls = []

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            calls.append("wrapper")
            return self.module(*args, **kwargs)

    inner = torch.nn.Linear(2, 2)
    x = torch.ones(1, 2)
    result = inside_forward(Wrapper(inner), inner, lambda module, x, *, factor: factor * module(x), inner, x, factor=2)
    assert calls == ["wrapper"] and torch.equal(result, 2 * inner(x))


def test_what_reads_evaluations_logs_no_training_metrics():
    """`log_evaluation` calls the `log` below TRL's trainers."""
    assert all(
        "log" not in vars(base) for base in DistillationTrainer.__mro__[1 : DistillationTrainer.__mro__.index(Trainer)]
    )
    for host in TRLS:
        assert "self._metrics[mode].clear()" in inspect.getsource(host.log)


def test_which_rollouts_several_steps_share():
    for host in RL:
        source = inspect.getsource(host._prepare_inputs)
        assert "generate_every = self.args.steps_per_generation * self.num_iterations" in source
        assert "self._step % generate_every == 0 or self._buffered_inputs is None" in source
        assert "self._step += 1" in inspect.getsource(host.training_step)
    source = inspect.getsource(DistillationTrainer._prepare_inputs)
    assert "generate_every = self.args.gradient_accumulation_steps" in source  # never more than one step


def test_accelerates_autocast_is_where_measurements_leave_it_out():
    model = make_model(0)
    assert forward_without_autocast(model) is None
    with accelerate_undisturbed():
        for state in (PartialState, AcceleratorState):
            state._shared_state.clear()
        Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    assert forward_without_autocast(model) == model._original_forward


def test_our_multimodal_keys_are_trls():
    from effopd.distill.divergence import MULTIMODAL_KEYS

    source = inspect.getsource(DistillationTrainer._compute_loss)
    assert all(f'"{key}"' in source for key in MULTIMODAL_KEYS)
    assert source.count("image_grid_thw") == 1


def test_generate_ends_its_processors_where_the_recorder_is_added():
    assert "self._get_logits_processor(" in inspect.getsource(GenerationMixin.generate)
    assert inspect.getsource(GenerationMixin._get_logits_processor).rstrip().endswith("return processors")


@pytest.mark.slow
def test_order_of_a_step(tmp_path):
    """optimizer.step → global_step += 1 → on_step_end → log → evaluate → save."""
    events = []

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            events.append(("optimizer", state.global_step))

        def on_step_end(self, args, state, control, **kwargs):
            events.append(("step_end", state.global_step))

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}):
                events.append(("log", state.global_step))

        def on_evaluate(self, args, state, control, **kwargs):
            events.append(("evaluate", state.global_step))

        def on_save(self, args, state, control, **kwargs):
            events.append(("save", state.global_step))

    args = DistillationConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, per_device_eval_batch_size=4,
        max_completion_length=3, report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=1,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, activation_checkpointing=False,
    )  # fmt: skip
    data = make_task(8).to_dataset()
    trainer = DistillationTrainer(
        make_model(0), make_model(1), args, train_dataset=data, eval_dataset=data,
        processing_class=make_tokenizer(), callbacks=[Spy()],
    )  # fmt: skip
    trainer.train()
    assert events == [("optimizer", 0), ("step_end", 1), ("log", 1), ("evaluate", 1), ("save", 1)]


def test_cpu_sampling_is_exponential_race():
    """Common random numbers rest on this: one exponential per entry, argmax of p/noise, independent
    of p.
    """
    p = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    torch.manual_seed(3)
    drawn = torch.multinomial(p, 1)[:, 0]
    torch.manual_seed(3)
    noise = torch.empty_like(p).exponential_()
    assert torch.equal(drawn, (p / noise).argmax(-1))


def test_accelerate_keeps_its_state_where_we_put_it_back():
    """`accelerate_undisturbed`: another TrainingArguments must not change what the first one set
    up.
    """
    from transformers import TrainingArguments

    TrainingArguments(output_dir="x", use_cpu=True)
    before = [dict(state._shared_state) for state in (PartialState, AcceleratorState)]
    assert before[0], "accelerate keeps its state elsewhere now"
    with accelerate_undisturbed():
        TrainingArguments(output_dir="y")
    assert [dict(state._shared_state) for state in (PartialState, AcceleratorState)] == before
