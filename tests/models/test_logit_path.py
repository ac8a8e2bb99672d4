"""Logits are what each model's own forward makes of its hidden states; padding changes no row;
other models are refused.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import make_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM

from effopd.distill.divergence import Head, reverse_kl_of_completions
from effopd.errors import CompatibilityError
from effopd.models.checks import check_models
from effopd.models.logit_path import completion_hidden_states, hidden_states, logit_path
from effopd.models.sampler_check import batching, check_sampler, generate_groups
from effopd.tasks.generate import generate
from effopd.tasks.sampling import Sampling

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("architectures", ROOT / "benchmarks" / "architectures.py")
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("qwen3", {"scale": 1.0, "softcap": None, "inner": False, "batching": "any"}),
        ("gpt2", {"batching": "any"}),
        ("gpt_neo", {"batching": "any"}),
        ("codegen", {"batching": "any"}),
        ("opt", {"batching": "any"}),
        ("bart", {"batching": "length"}),  # a table of positions, and a forward without position_ids
        ("gemma2", {"softcap": 30.0}),
        ("recurrent_gemma", {"softcap": 1.0, "batching": "length"}),
        ("granite", {"scale": 0.25}),
        ("cohere", {"scale": 0.0625}),
        ("modernbert-decoder", {"inner": True}),
        ("falcon_h1", {"scale": 0.5}),
        ("mamba", {"batching": "any"}),
        ("rwkv", {"batching": "single"}),
    ],
)
def test_a_type_is_exact(kind, form):
    row = architectures.row_of(kind)
    assert row["result"] == "exact", row
    assert {name: row[name] for name in form} == form


@pytest.mark.parametrize(
    ("kind", "why"), [("cpmant", "depend on the tokens after it"), ("roberta", "`generate` samples")]
)
def test_a_type_is_refused(kind, why):
    row = architectures.row_of(kind)
    assert row["result"] == "refused" and why in row["why"]


def test_an_encoder_is_refused():
    bert = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("bert", vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    )
    with pytest.raises(CompatibilityError, match=r"depend on the tokens after it.*is_decoder"):
        logit_path(bert)


class Changed(Qwen3ForCausalLM):
    """What follows the output layer is `change`."""

    change = staticmethod(lambda logits: logits)

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = type(self).change(out.logits)
        return out


def changed(function, seed=0):
    model = make_model(seed)
    model.__class__ = type("Changed", (Changed,), {"change": staticmethod(function)})
    return model


def mask_a_row(logits):
    logits = logits.clone()
    logits[..., 7] = -1e4
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "scale", "softcap"),
    [
        (lambda z: z / 13, 1 / 13, None),
        (lambda z: 2.5 * torch.tanh(z * 0.3 / 2.5), 0.3, 2.5),
        (lambda z: 50.0 * torch.tanh(z / 50.0), 1.0, 50.0),
    ],
)
def test_what_follows_the_output_layer_is_measured(function, scale, softcap, dtype):
    path = logit_path(changed(function).to(dtype))
    assert path.scale == pytest.approx(scale, rel=1e-9) and path.softcap == softcap


@pytest.mark.parametrize(
    "function", [lambda z: z + torch.arange(64.0), mask_a_row, lambda z: z.relu(), lambda z: z.log_softmax(-1).pow(2)]
)
def test_other_logits_are_refused(function):
    with pytest.raises(CompatibilityError, match="neither a factor nor a soft cap"):
        logit_path(changed(function))


class Odd(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden.sin())


def test_an_output_layer_that_is_no_matrix_is_refused():
    model = make_model(0)
    odd = Odd(16, 64, bias=False)
    odd.weight = model.lm_head.weight
    model.lm_head = odd
    with pytest.raises(CompatibilityError, match=r"differ from those of the model's own forward by \d"):
        logit_path(model)


def test_the_role_is_named():
    with pytest.raises(CompatibilityError, match="the reference cannot be used"):
        check_models(make_model(0), {"teacher": make_model(1), "reference": changed(mask_a_row)}, generates=True)


def gpt2(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=64, bos_token_id=1, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    return model.to(dtype)


def draw(lengths, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("adapter", [False, True])
def test_a_batch_of_unequal_prompts_has_the_kl_of_its_rows(adapter):
    models = [gpt2(0), gpt2(1)]
    if adapter:
        from peft import LoraConfig, get_peft_model

        models[0] = get_peft_model(
            models[0], LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
        ).eval()
    prompts, answers = draw((4, 15, 9)), draw((6, 2, 5), 8)
    together, _ = reverse_kl_of_completions(*models, prompts, answers, vocab_size=64, pad_token_id=0)
    for i, found in enumerate(together):
        ids, start = torch.tensor([prompts[i] + answers[i]]), len(prompts[i])
        with torch.no_grad():
            logp, logq = (model(ids).logits[0, start - 1 : -1].double().log_softmax(-1) for model in models)
        assert found == pytest.approx(float((logp.exp() * (logp - logq)).sum()), rel=1e-5)


def test_padding_anywhere_gives_each_row_its_own_states_and_gradients():
    model, rows = gpt2(0), draw((7, 15, 9))
    width, keep = 24, 5
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for i, row in enumerate(rows):  # padded on both sides, as rollouts are
        end = width - i
        ids[i, end - len(row) : end], mask[i, end - len(row) : end] = torch.tensor(row), 1
    found = completion_hidden_states(model, ids, mask, keep)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)) * mask[:, -keep:, None]
    (found * weight).sum().backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i, row in enumerate(rows):
        alone = hidden_states(model, torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long))[0]
        kept = keep - i
        torch.testing.assert_close(found[i, :kept], alone[-kept - 1 : -1], rtol=1e-5, atol=1e-5)
        (alone[-kept - 1 : -1] * weight[i, :kept]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_position_tables_are_no_reason_to_sample_one_length_at_a_time(dtype):
    assert batching(gpt2(0, dtype)) == "any" and check_sampler(gpt2(0, dtype)) < (
        1e-4 if dtype == torch.float32 else 0.1
    )


def rwkv(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "rwkv",
        hidden_size=32,
        attention_hidden_size=32,
        num_hidden_layers=2,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(6)
    return model.to(dtype)


def recurrent_gemma():
    return architectures.build("recurrent_gemma")


@pytest.mark.parametrize(("make", "groups"), [(rwkv, [[0], [1], [2], [3]]), (recurrent_gemma, [[1, 3], [0], [2]])])
def test_prompts_that_change_each_other_are_sampled_apart(make, groups, tokenizer):
    model, prompts = make(), ["1 + 1 =", "2 =", "3 + 4 + 5 =", "9 ="]
    assert generate_groups(model, tokenizer(prompts)["input_ids"]) == groups
    settings = {"max_new_tokens": 6, "temperature": 0}
    together = generate(model, tokenizer, prompts, Sampling(**settings))
    assert together == [generate(model, tokenizer, [prompt], Sampling(**settings))[0] for prompt in prompts]


def test_a_recurrent_model_in_bf16_is_found():
    assert batching(rwkv(0, torch.bfloat16)) == "single"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_only_the_student_has_are_not_sampled(tokenizer, temperature):
    student = make_model(0, vocab_size=80)
    student.lm_head.weight = nn.Parameter(student.lm_head.weight.detach().clone())
    student.lm_head.bias = nn.Parameter(torch.cat([torch.zeros(64), torch.full((16,), 50.0)]))
    settings = {"max_new_tokens": 8, "temperature": temperature, "seed": 0}
    free = generate(student, tokenizer, ["1 + 1 =", "2 ="], Sampling(**settings))
    cut = generate(student, tokenizer, ["1 + 1 =", "2 ="], Sampling(**settings), vocab_size=64)
    assert max(max(one.completion_ids) for one in free) >= 64 > max(max(one.completion_ids) for one in cut)


def test_head_reads_the_bias():
    model = make_model(0)
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 64))
    assert torch.equal(Head.of(model, 50).bias, model.lm_head.bias[:50])


def with_large_logits():
    """GPT-2 whose logits are all near -200, as softmax allows: in half precision that costs half a
    nat.
    """
    model = gpt2(0)
    model.transformer.wte.weight.data[:, 0] = 1.0
    model.transformer.ln_f.weight.data[0], model.transformer.ln_f.bias.data[0] = 0.0, -200.0
    return model.to(torch.bfloat16)


def small(kind):
    """A type with logits below 1: in half precision, shifted positions move them by less than half
    a nat.
    """
    model = architectures.build(kind, seed=1)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.div_(6)
    return model.to(torch.bfloat16)


def test_in_half_precision_rounding_grows_with_the_logits():
    model = with_large_logits()
    assert check_sampler(model) > 0.3 and batching(model) == "any"
    assert batching(small("bart")) == "length"
    with pytest.raises(CompatibilityError, match="`generate` samples"):
        check_sampler(small("roberta"))


@pytest.mark.parametrize("where", ["lm_head", "q_proj"])
def test_an_adapter_on_the_output_layer_is_refused_before_it_has_learned(where):
    from peft import LoraConfig, get_peft_model

    model = make_model(0)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[where]))
    if where == "q_proj":
        assert logit_path(adapted).error < 1e-5
    else:
        with pytest.raises(CompatibilityError, match="adapter on its output layer"):
            logit_path(adapted)


def test_layers_before_the_output_layer_are_seen_in_a_model_of_zeros():
    model = architectures.build("modernbert-decoder")
    for parameter in model.parameters():
        parameter.data.zero_()
    assert logit_path(model).inner
