"""The KL along Δ of live models, predicted from two forward passes: `RayKL` with `LiveWeights`."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_models import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from effopd.distill.divergence import divergences
from effopd.extrapolate.live_weights import LiveWeights
from effopd.extrapolate.moving_head import line_head, moving_head
from effopd.models.head import Head
from effopd.models.ray import RayKL
from effopd.models.token_batch import TokenBatch

VOCAB = 50  # of 64 rows: the rest is padding


def batch():
    g = torch.Generator().manual_seed(5)
    rows = [
        [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in lengths] for lengths in ((4, 7, 3), (6, 2, 9))
    ]
    return TokenBatch.of(*rows, pad_token_id=0)


def model_of(kind: str, seed: int):
    if kind in ("tied", "untied"):
        model = make_model(seed)
        if kind == "untied":
            model.lm_head.weight = torch.nn.Parameter(make_model(seed + 50).lm_head.weight.detach().clone())
            model.config.tie_word_embeddings = False
        return model.eval()
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
             "initializer_range": 0.3}  # fmt: skip
    own = {
        "softcap": ("gemma2", {"final_logit_softcapping": 3.0}),
        "scale": ("granite", {"logits_scaling": 4.0}),
        "bias": ("phi", {"num_key_value_heads": 2}),
    }
    name, extra = own[kind]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes | extra)).eval()


def moved(model, rule="", size=0.02):
    """A copy of the model whose parameters named by `rule` have moved."""
    g = torch.Generator().manual_seed(9)
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, p in other.named_parameters():
            step = size * torch.randn(p.shape, generator=g)
            if rule in name:
                p.add_(step)
    return other


def line(kind, rule="", frozen=""):
    """A live model at W, its weights with an anchor W − Δ, and a teacher."""
    model = model_of(kind, 0)
    for name, p in model.named_parameters():
        p.requires_grad_(not frozen or frozen not in name)
    before = moved(model, rule)
    weights = LiveWeights(model, "all")
    weights.load_state_dict({name: p.detach() for name, p in before.named_parameters() if name in weights.names})
    return model, weights, moved(model, size=0.3)


def true_kl(model, teacher, rows):
    return divergences(model, teacher, [rows], vocab_size=VOCAB, beta=1.0, temperature=1.0)[0]


@torch.no_grad()
def measured(model, weights, teacher, rows, known, scales):
    """(predicted, true) [K, N]; moves the model and restores it."""
    ray = RayKL(moving_head(model, weights, VOCAB), Head.of(teacher, VOCAB), rows.hidden(teacher))
    true = []
    weights.begin()
    for s in sorted({*known, *scales}):
        weights.move_to(s)
        if s in known:
            ray.add(s, rows.hidden(model))
        if s in scales:
            true.append(true_kl(model, teacher, rows))
    weights.abort()
    return ray.kl(sorted(scales)), torch.stack(true)


@pytest.mark.parametrize("kind", ["tied", "untied", "softcap", "scale", "bias"])
def test_the_prediction_is_the_true_kl_at_known_scales(kind):
    model, weights, teacher = line(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for known in ((0.0, 1.0), (0.0, 8.0)):
        predicted, true = measured(model, weights, teacher, batch(), known, known)
        assert torch.allclose(predicted, true, rtol=1e-4, atol=2e-5)
        assert float((true[1] - true[0]).abs().max()) > 1e-3
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("kind", "rule", "frozen"),
    [
        ("untied", "norm.weight", "layers"),
        ("untied", "lm_head", ""),
        ("bias", "lm_head.bias", ""),
        ("tied", "model.norm", "embed"),
    ],
)
def test_a_move_that_is_linear_in_the_hidden_states_is_predicted_everywhere(kind, rule, frozen):
    """The last norm and the output layer act after all nonlinear layers."""
    model, weights, teacher = line(kind, rule, frozen)
    predicted, true = measured(model, weights, teacher, batch(), (0.0, 1.0), (0.0, 0.5, 1.0, 8.0, 30.0))
    assert torch.allclose(predicted, true, rtol=1e-3, atol=5e-5)
    assert float((true[-1] - true[0]).abs().max()) > 1e-2


def test_a_head_that_does_not_move_is_not_copied():
    model, weights, _ = line("tied", frozen="embed")
    head = moving_head(model, weights, VOCAB)
    assert head.weight_delta is None and head.start.weight.data_ptr() == model.lm_head.weight.data_ptr()
    model, weights, _ = line("tied")
    head = moving_head(model, weights, VOCAB)
    assert head.weight_delta.shape == (VOCAB, 16) and head.start.weight.data_ptr() != model.lm_head.weight.data_ptr()
    delta = dict(weights.displacements())["model.embed_tokens.weight"]
    assert torch.equal(head.weight_delta, delta[:VOCAB])


def test_a_runs_head_needs_the_reverse_kl_and_a_whole_model():
    model, weights, _ = line("tied")
    assert line_head(model, weights, VOCAB, 0.5) is None
    assert torch.equal(
        line_head(model, weights, VOCAB, 1).weight_delta, moving_head(model, weights, VOCAB).weight_delta
    )
    model.lm_head.weight.ds_id = 0  # as under ZeRO-3
    assert line_head(model, weights, VOCAB, 1) is None
