"""LoRA students: the point on the ray of the update, in the adapter's rank, against the dense
truth.
"""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import make_model, make_task, make_tokenizer, small_scores
from peft import LoraConfig, get_peft_model

from effopd import EffOPD, EffOPDCallback, EffOPDConfig, OPDConfig, OPDTrainer
from effopd.common.files import read_rows
from effopd.errors import ConfigError, NonFiniteWeightsError
from effopd.extrapolate.lora_weights import LoraWeights, adapted, move_factors

SCALES = (-0.5, 0.3, 1.0, 2.0, 10.0, 64.0)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def factors(seed, m=12, n=20, r=3, moved=0.3):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((r, n), (m, r)))
    step_a, step_b = (moved * torch.randn(t.shape, generator=generator) for t in (a, b))
    return a + step_a, b + step_b, a, b


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_best_approximation_of_the_point_on_the_ray(seed, scale):
    a, b, anchor_a, anchor_b = factors(seed)
    target = (1 + scale) * b @ a - scale * anchor_b @ anchor_a
    u, s, vh = torch.linalg.svd(target.double())
    best = (u[:, :3] * s[:3]) @ vh[:3]
    new_a, new_b, lost = move_factors(a, b, anchor_a, anchor_b, scale)
    assert new_a.shape == a.shape and new_b.shape == b.shape
    assert torch.allclose((new_b @ new_a).double(), best, atol=2e-5 * float(s[0]))
    assert float(lost) == pytest.approx(float(s[3:].norm()), rel=1e-3)


@pytest.mark.parametrize("scale", SCALES)
def test_nothing_is_lost_while_a_stands_still_or_b_was_zero(scale):
    a, b, anchor_a, anchor_b = factors(0)
    for start_a, start_b in ((a, anchor_b), (anchor_a, torch.zeros_like(b))):
        new_a, new_b, lost = move_factors(a, b, start_a, start_b, scale)
        target = (1 + scale) * b @ a - scale * start_b @ start_a
        assert torch.allclose(new_b @ new_a, target, atol=1e-5 * float(target.norm()))
        assert float(lost) < 1e-5 * float(target.norm())
        assert torch.allclose(new_a, a, atol=1e-4)  # the rows that training knows


def test_factors_stay_near_the_present_ones():
    a, b, anchor_a, anchor_b = factors(1, moved=1e-3)
    same_a, same_b, _ = move_factors(a, b, anchor_a, anchor_b, 0.0)
    assert torch.allclose(same_a, a, atol=1e-5) and torch.allclose(same_b, b, atol=1e-5)
    new_a, new_b, _ = move_factors(a, b, anchor_a, anchor_b, 1.0)
    assert (new_a - a).norm() < 0.02 * a.norm() and (new_b - b).norm() < 0.02 * b.norm()


def test_unused_directions_stay_trainable():
    a, b, anchor_a, _ = factors(2)
    b[:, 1:] = 0  # only one direction of A is used
    new_a, new_b, lost = move_factors(a, b, anchor_a, torch.zeros_like(b), 2.0)
    assert torch.allclose(new_b @ new_a, 3 * b @ a, atol=1e-4) and float(lost) < 1e-4
    assert torch.linalg.svdvals(new_a)[-1] > 0.1 * torch.linalg.svdvals(a)[-1]


def test_rows_that_left_the_present_ones_get_balanced_factors():
    a, b = torch.zeros(1, 4), torch.ones(3, 1)
    a[0, 0] = 1e-6  # what is there now is negligible beside what was there: going back goes to other rows
    anchor_a, anchor_b = torch.zeros(1, 4), torch.ones(3, 1)
    anchor_a[0, 1] = 1.0
    new_a, new_b, _ = move_factors(a, b, anchor_a, anchor_b, -0.5)
    assert torch.allclose(new_b @ new_a, 0.5 * anchor_b @ anchor_a, atol=1e-5)


def student(r=3, **config):
    model = get_peft_model(make_model(0), LoraConfig(**{"r": r, "lora_alpha": 5, "target_modules": LINEAR} | config))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def nudge(model, seed=2):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))


def updates(model):
    return {name: scaling * (b @ a).detach().clone() for name, (a, b), scaling in adapted(model)}


def test_a_model_moves_along_its_update_and_comes_back_bit_for_bit():
    model = student()
    base = {name: p.clone() for name, p in model.named_parameters() if "lora_" not in name}
    weights, before = LoraWeights(model, "attention+mlp"), updates(model)
    nudge(model)
    now, bits = updates(model), {name: p.clone() for name, p in model.named_parameters()}
    dense = sum(float((now[name] - before[name]).square().sum()) for name in now) ** 0.5
    assert weights.displacement_norm() == pytest.approx(dense, rel=1e-5)
    weights.begin()
    weights.move_to(4.0)
    moved, shares = updates(model), []
    for name in now:
        target = now[name] + 4 * (now[name] - before[name])
        lost = float((moved[name] - target).norm())
        assert lost == pytest.approx(float(torch.linalg.svdvals(target)[3:].norm()), rel=1e-2)
        shares.append(lost / float(4 * (now[name] - before[name]).norm()))
    assert weights.lost_share == pytest.approx(max(shares), rel=1e-2) and 0 < weights.lost_share < 1
    weights.restore()
    assert all(torch.equal(p, bits[name]) for name, p in model.named_parameters())
    weights.move_to(1.0)
    weights.commit()
    assert weights.displacement_norm() < 1e-5
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


def test_only_what_the_rule_selects_moves():
    model = student()
    weights = LoraWeights(model, r"layers\.1\.mlp")
    nudge(model)
    before = updates(model)
    weights.begin()
    weights.move_to(2.0)
    changed = {name for name, update in updates(model).items() if not torch.equal(update, before[name])}
    assert changed == {f"model.layers.1.mlp.{name}.weight" for name in LINEAR[4:]}


def test_a_point_that_is_not_finite_is_refused_and_undone():
    model = student()
    weights = LoraWeights(model)
    nudge(model)
    weights.begin()
    with torch.no_grad():
        next(iter(weights.state_dict().values())).fill_(float("inf"))
    bits = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(NonFiniteWeightsError, match="adapter"):
        weights.move_to(2.0)
    assert all(torch.equal(p, bits[name]) for name, p in model.named_parameters())


def test_anchor_survives_a_round_trip():
    model, other = student(), student()
    weights = LoraWeights(model)
    nudge(model)
    again = LoraWeights(model)
    again.load_state_dict(weights.state_dict())
    assert again.displacement_norm() == weights.displacement_norm() > 0
    assert weights.nbytes == sum(4 * p.numel() for name, p in other.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "variant of LoRA"),
        ({"target_modules": ["embed_tokens"]}, "embedding"),
        ({"target_modules": None, "target_parameters": ["mlp.up_proj.weight"]}, "stacked experts"),
    ],
)
def test_variants_whose_update_is_not_a_product_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        LoraWeights(student(**config), "all")


def test_what_is_trained_beside_the_factors_is_named(caplog):
    LoraWeights(student(modules_to_save=["lm_head"]), "all")
    assert "lm_head" in caplog.text and "stay" in caplog.text


def test_no_displacement_is_no_displacement():
    model = student()
    nudge(model)
    assert LoraWeights(model).displacement_norm() == 0.0


def test_mistakes_are_explained():
    with pytest.raises(ConfigError, match="matches no adapted weight"):
        LoraWeights(student(), "lm_head")
    for strategy in ("random_direction", "alpha_opd", "relex"):
        target = (lambda: 1.0) if strategy == "alpha_opd" else None
        scorer = None if strategy == "relex" else (lambda model: 0.0)
        with pytest.raises(ConfigError, match="LoRA"):
            EffOPD(student(), scorer, EffOPDConfig(strategy), target=target)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["effopd", "line_search"])
def test_a_lora_student_through_the_trainer_resumed(strategy, tmp_path):
    task = make_task(32)

    def trainer(folder):
        args = OPDConfig(
            output_dir=str(folder), max_steps=6, per_device_train_batch_size=8, max_completion_length=4, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="steps", save_steps=3, learning_rate=1e-2,
        )  # fmt: skip
        made = OPDTrainer(
            make_model(0), make_model(1), args, train_dataset=task.to_dataset(), processing_class=make_tokenizer(),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        )  # fmt: skip
        config = EffOPDConfig(strategy, **small_scores(strategy))
        made.add_callback(EffOPDCallback(made, config, task=task))
        return made

    whole, again = trainer(tmp_path / "whole"), trainer(tmp_path / "again")
    whole.train()
    rows = list(read_rows(tmp_path / "whole" / "searches.jsonl"))
    assert rows and all(0 <= row["lora_lost_share"] < 1 for row in rows)
    assert any(row["accepted_scale"] for row in rows)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoints" / "step-000003"))
    one, other = (dict(made.model.named_parameters()) for made in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_module_counts_only_the_active_adapters_that_it_has():
    model = get_peft_model(make_model(0), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    names = [name for name, *_ in adapted(model)]
    assert len(names) == 2 and all("q_proj" in name for name in names)
    model.add_adapter("apart", LoraConfig(r=2, target_modules=["o_proj"]))
    model.base_model.set_adapter(["default", "apart"])
    assert len(list(adapted(model))) == 4
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match=r"q_proj' has 2: default, other\. Activate the one that is trained"):
        list(adapted(model))
