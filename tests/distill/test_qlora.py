"""A student with 4-bit base weights and LoRA adapters. Skipped where bitsandbytes is missing (pip
install bitsandbytes).
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from effopd import EffOPDCallback, EffOPDConfig, OPDConfig, OPDTrainer
from effopd.common.files import read_rows
from effopd.extrapolate.lora_weights import LoraWeights, adapted
from effopd.tasks import builtin_models as testbed

modules = pytest.importorskip(
    "bitsandbytes.nn.modules", reason="bitsandbytes is not installed (pip install bitsandbytes)"
)


@pytest.fixture
def student(monkeypatch):
    """On AVX-512 CPUs bitsandbytes 0.50 repacks the weights for evaluation, and saving does not
    bring them back whole.
    """
    initialize = modules.Linear4bit.__init__

    def without_repacking(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        self.support_avx512bf16_for_cpu = False

    monkeypatch.setattr(modules.Linear4bit, "__init__", without_repacking)

    def build():
        torch.manual_seed(0)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(
            testbed.student_path(), quantization_config=config, device_map="cpu"
        )
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))

    return build


def base(model):
    found = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    assert any(p.dtype == torch.uint8 for p in found.values())
    return found


def test_adapters_move_and_the_quantized_base_stays(student):
    model = student()
    before, weights = base(model), LoraWeights(model)
    start = {name: (b @ a).detach() for name, (a, b), _ in adapted(model)}
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    now = {name: (b @ a).detach() for name, (a, b), _ in adapted(model)}
    weights.begin()
    weights.move_to(4.0)
    for name, (a, b), _ in adapted(model):
        assert torch.allclose(b @ a, now[name] + 4 * (now[name] - start[name]), atol=1e-5)
    weights.commit()
    assert all(torch.equal(value, before[name]) for name, value in base(model).items())


def test_a_quantized_student_looks_ahead_and_goes_on(student, tmp_path):
    task = testbed.family_task("chain_sum", "train", size=64)

    def trainer():
        model = student()
        arguments = OPDConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=8,
            max_completion_length=24,
            learning_rate=3e-4,
            save_strategy="steps",
            save_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            activation_checkpointing=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(testbed.student_path(), padding_side="left")
        made = OPDTrainer(
            model, str(testbed.teacher_path()), arguments, train_dataset=task.to_dataset(), processing_class=tokenizer
        )
        made.add_callback(EffOPDCallback(made, EffOPDConfig("line_search", score_rollouts=8)))
        return made, base(model)

    first, before = trainer()
    first.train()
    assert any(row["accepted_scale"] > 1 for row in read_rows(tmp_path / "searches.jsonl"))
    assert all(torch.equal(value, before[name]) for name, value in base(first.model).items())
    again, _ = trainer()  # not bit for bit: TRL trains these adapters in bfloat16, PEFT loads them in float32
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "step-000002"))
    assert again.state.global_step == 3
    assert all(torch.equal(value, before[name]) for name, value in base(again.model).items())
