"""What we rely on inside the host libraries. If one of these fails after an upgrade, read the new source first."""

from __future__ import annotations

import inspect

import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer
from transformers import Trainer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer, GRPOTrainer, RLOOTrainer

from effopd.distill.trainer import OPDTrainer


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_private_methods_we_override_have_their_signatures():
    assert parameters(DistillationTrainer._compute_loss) == [
        "self",
        "unwrapped_student",
        "inputs",
        "num_items_in_batch",
    ]
    assert parameters(DistillationTrainer._generate_and_score_completions) == ["self", "inputs"]
    assert parameters(DistillationTrainer._get_train_sampler) == ["self", "dataset"]
    assert parameters(DistillationTrainer._get_last_hidden_state)[:5] == [
        "self", "unwrapped_model", "input_ids", "attention_mask", "logits_to_keep",
    ]  # fmt: skip
    assert parameters(DistillationTrainer._prepare_inputs) == ["self", "generation_batch"]
    assert "self._prepare_inputs(inputs)" in inspect.getsource(Trainer.training_step)
    assert parameters(Trainer._save_checkpoint) == ["self", "model", "trial"]
    assert parameters(Trainer._get_output_dir) == ["self", "trial"]
    assert parameters(Trainer._load_from_checkpoint)[1] == "resume_from_checkpoint"
    assert "self._run_epoch(" in inspect.getsource(Trainer._inner_training_loop)
    assert parameters(DistillationTrainer.__init__)[:4] == ["self", "model", "teacher_model", "args"]


def test_private_names_we_read_exist():
    source = inspect.getsource(DistillationTrainer)
    for name in ("_last_loaded_step", "_buffered_inputs", "_metrics", "_forward_redirection", "eos_token_ids"):
        assert f"self.{name}" in source
    assert "self._last_loaded_step" in inspect.getsource(GRPOTrainer)
    assert "learning_rate = self._get_learning_rate()" in inspect.getsource(
        Trainer._run_epoch
    )  # before the scheduler's step


def test_which_rollouts_several_steps_share():
    for host in (GRPOTrainer, RLOOTrainer):
        source = inspect.getsource(host._prepare_inputs)
        assert "generate_every = self.args.steps_per_generation * self.num_iterations" in source
        assert "self._step % generate_every == 0 or self._buffered_inputs is None" in source
        assert "self._step += 1" in inspect.getsource(host.training_step)
    source = inspect.getsource(DistillationTrainer._prepare_inputs)
    assert "generate_every = self.args.gradient_accumulation_steps" in source  # never more than one step


def test_our_multimodal_keys_are_trls():
    from effopd.distill.divergence import MULTIMODAL_KEYS

    source = inspect.getsource(DistillationTrainer._compute_loss)
    assert all(f'"{key}"' in source for key in MULTIMODAL_KEYS)
    assert source.count("image_grid_thw") == 1


def test_generate_ends_its_processors_where_the_recorder_is_added():
    from transformers import GenerationMixin

    assert "self._get_logits_processor(" in inspect.getsource(GenerationMixin.generate)
    assert inspect.getsource(GenerationMixin._get_logits_processor).rstrip().endswith("return processors")


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
    """Common random numbers rest on this: one exponential per entry, argmax of p/noise, independent of p."""
    p = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    torch.manual_seed(3)
    drawn = torch.multinomial(p, 1)[:, 0]
    torch.manual_seed(3)
    noise = torch.empty_like(p).exponential_()
    assert torch.equal(drawn, (p / noise).argmax(-1))


def test_trainer_class_is_a_distillation_trainer():
    assert issubclass(OPDTrainer, DistillationTrainer)


def test_accelerate_keeps_its_state_where_we_put_it_back():
    """`accelerate_undisturbed`: another TrainingArguments must not change what the first one set up."""
    from accelerate.state import AcceleratorState, PartialState
    from transformers import TrainingArguments

    from effopd.launch.settings_yaml import accelerate_undisturbed

    TrainingArguments(output_dir="x", use_cpu=True)
    before = [dict(state._shared_state) for state in (PartialState, AcceleratorState)]
    assert before[0], "accelerate keeps its state elsewhere now"
    with accelerate_undisturbed():
        TrainingArguments(output_dir="y")
    assert [dict(state._shared_state) for state in (PartialState, AcceleratorState)] == before
