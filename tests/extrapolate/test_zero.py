"""Live weights, moments, learning rate and anchor files under ZeRO, on doubles of DeepSpeed."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.zero_double import ZeroDouble, as_rank, fake_deepspeed

from effopd import EffOPDConfig
from effopd.common.zero import BeforeStep, base_optimizer, reset_adam, zero_optimizer, zero_steps
from effopd.errors import ConfigError, NonFiniteWeightsError, WeightsError
from effopd.extrapolate.anchor_files import read_anchor, write_anchor
from effopd.extrapolate.checks import movable_weights
from effopd.extrapolate.learning_rate import LearningRateMultiplier
from effopd.extrapolate.live_weights import LiveWeights
from effopd.extrapolate.slope_steering import slope_cosine, steering_factor
from effopd.extrapolate.weight_copies import clear_state
from effopd.extrapolate.zero_settings import check_zero, check_zero_optimizer

RANKS = 4  # 39 elements: ranks end inside parameters, and the last ones hold padding


def make() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 2), torch.nn.Linear(2, 1, bias=False))


def gradients(model, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


class Cluster:
    """All ranks of a model under ZeRO, and the same model whole."""

    def __init__(self, stage: int, monkeypatch, dtype=torch.float32):
        self.stage, self.monkeypatch = stage, monkeypatch
        fake_deepspeed(monkeypatch)
        self.plain, shared = make(), None
        self.adam = torch.optim.AdamW(self.plain.parameters(), lr=0.1)
        self.models = [copy.deepcopy(self.plain).to(dtype) for _ in range(RANKS)]
        self.zeros = []
        for rank, model in enumerate(self.models):
            self.zeros.append(ZeroDouble(model, stage, rank, RANKS, shared))
            shared = getattr(self.zeros[0], "shared", None)
        self.whole = LiveWeights(self.plain, "all")
        self.weights = self.on_ranks(lambda rank: LiveWeights(self.models[rank], "all", None, self.zeros[rank]))

    def on_ranks(self, work):
        """Results of `work` on all ranks, one after the other."""
        results = []
        for rank in range(RANKS):
            as_rank(self.monkeypatch, rank, RANKS)
            results.append(work(rank))
        return results

    def train(self, seed: int) -> None:
        taken = gradients(self.plain, seed)
        for parameter, gradient in zip(self.plain.parameters(), taken, strict=True):
            parameter.grad = gradient
        self.adam.step()
        self.on_ranks(lambda rank: self.zeros[rank].take(taken))

    def masters(self) -> torch.Tensor:
        names = self.weights[0].names
        return torch.cat([torch.cat([w._anchored.parameters[name].detach() for w in self.weights]) for name in names])

    def expected(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.plain.parameters()])


@pytest.fixture(params=[2, 3], ids=["zero2", "zero3"])
def cluster(request, monkeypatch):
    return Cluster(request.param, monkeypatch)


def test_a_search_moves_the_masters_like_whole_weights_and_restores_them_bitwise(cluster):
    cluster.train(1)
    origin = cluster.masters()
    for weights in (cluster.whole, *cluster.weights):
        weights.begin()
    for scale in (2.0, -0.5):
        cluster.whole.move_to(scale)
        cluster.on_ranks(lambda rank, scale=scale: cluster.weights[rank].move_to(scale))
        assert torch.equal(cluster.masters(), cluster.expected())
    cluster.on_ranks(lambda rank: cluster.weights[rank].abort())
    assert torch.equal(cluster.masters(), origin)
    squares = sum(cluster.on_ranks(lambda rank: cluster.weights[rank].displacement_norm() ** 2))
    cluster.whole.abort()
    assert squares == pytest.approx(cluster.whole.displacement_norm() ** 2)
    assert {weights.numel for weights in cluster.weights} == {cluster.whole.numel}
    assert sum(weights.nbytes for weights in cluster.weights) == cluster.whole.nbytes


def test_the_next_search_starts_at_the_committed_weights(cluster):
    for seed in (1, 2):
        cluster.train(seed)
        for weights in (cluster.whole, *cluster.weights):
            weights.begin()
        cluster.whole.move_to(1.5)
        cluster.on_ranks(lambda rank: cluster.weights[rank].move_to(1.5))
        for weights in (cluster.whole, *cluster.weights):
            weights.commit()
        assert not any(cluster.on_ranks(lambda rank: cluster.weights[rank].displacement_norm()))
        assert torch.equal(cluster.masters(), cluster.expected())


@pytest.mark.parametrize("stage", [2, 3])
def test_low_precision_copies_follow_the_masters(stage, monkeypatch):
    cluster = Cluster(stage, monkeypatch, torch.bfloat16)
    cluster.train(1)
    for weights in cluster.weights:
        weights.begin()
    cluster.on_ranks(lambda rank: cluster.weights[rank].move_to(3.0))
    masters = dict(zip(cluster.weights[0].names, cluster.models[0].parameters(), strict=True))
    if stage == 2:
        cluster.on_ranks(lambda rank: cluster.zeros[rank].update_lp_params())  # the last rank has moved by now
    for name, parameter in masters.items():
        moved = torch.cat([w._anchored.parameters[name].detach() for w in cluster.weights]).bfloat16()
        if stage == 2:
            assert torch.equal(parameter.detach().flatten(), moved)
        else:
            index = list(masters).index(name)
            shards = [list(model.parameters())[index].ds_tensor for model in cluster.models]
            assert torch.equal(torch.cat(shards)[: moved.numel()], moved)
    if stage == 3:  # whole copies of the old weights are gone, small ones are made again
        assert all(zero.empties == zero.gathers == 1 for zero in cluster.zeros)


def test_a_candidate_that_is_not_finite_is_undone(cluster):
    cluster.train(1)
    origin = cluster.masters()
    for weights in cluster.weights:
        weights.begin()
    for rank in range(RANKS):
        as_rank(cluster.monkeypatch, rank, RANKS)
        with pytest.raises(NonFiniteWeightsError):
            cluster.weights[rank].move_to(3e38)
    assert torch.equal(cluster.masters(), origin)


def test_the_cosine_is_that_of_whole_weights(cluster, monkeypatch):
    cluster.train(1)
    new = gradients(cluster.plain, 2)
    for parameter, gradient in zip(cluster.plain.parameters(), new, strict=True):
        parameter.grad = gradient
    expected = slope_cosine(cluster.adam)

    def sums(rank: int) -> torch.Tensor:
        zero = cluster.zeros[rank]
        zero.gradients = [5.0 * gradient.flatten() for gradient in new]  # neither unscaled nor clipped
        for index, (first, last, place) in enumerate(zero.places):
            zero.gradient[place : place + last - first] = zero.gradients[index][first:last]
        total = torch.zeros(3)
        for grad, state, group in zero_steps(zero):
            move = state["exp_avg"] / ((state["exp_avg_sq"] / (1 - 0.999)).sqrt() + group["eps"])
            total += torch.stack([-(grad * move).sum(), grad.square().sum(), move.square().sum()])
        return total

    product, gradient, step = torch.stack(cluster.on_ranks(sums)).sum(0).tolist()
    assert product / (gradient * step) ** 0.5 == pytest.approx(expected, rel=1e-5)


def test_the_rate_is_steered_once_per_step_and_applied_in_it(monkeypatch):
    cluster = Cluster(2, monkeypatch)
    zero = cluster.zeros[0]
    as_rank(monkeypatch, 0, RANKS)
    cluster.train(1)
    rate = LearningRateMultiplier(zero, by_slope=True)
    applied = []
    zero.optimizer.register_step_pre_hook(lambda *_: applied.append(zero.optimizer.param_groups[0]["lr"]))
    cosine = slope_cosine(zero)
    zero.step()
    assert rate.factor == steering_factor(cosine) and rate.cosine == cosine
    assert applied == [0.1 * rate.factor] and zero.optimizer.param_groups[0]["lr"] == 0.1
    rate.close()
    assert "step" not in vars(zero)
    zero.step()
    assert applied[1] == 0.1


def test_cleared_moments_take_a_first_step_and_keep_the_tensors(cluster):
    cluster.train(1)
    zero = cluster.zeros[0]
    moments = dict(zero.optimizer.state[zero.flat])
    clear_state(zero)
    assert all(zero.optimizer.state[zero.flat][key] is moments[key] for key in ("exp_avg", "exp_avg_sq"))
    fresh = torch.optim.AdamW([torch.nn.Parameter(zero.partition.clone())], lr=0.1)
    fresh.param_groups[0]["params"][0].grad = zero.gradient.clone()
    fresh.step()
    zero.step()
    torch.testing.assert_close(zero.flat, fresh.param_groups[0]["params"][0], rtol=0, atol=0, equal_nan=True)
    number = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    number.state[number.param_groups[0]["params"][0]] = {"step": 7}
    reset_adam(number)
    assert next(iter(number.state.values()))["step"] == 0


def test_the_anchor_is_read_back_by_any_number_of_ranks(cluster, tmp_path):
    cluster.train(1)
    for weights in cluster.weights:
        weights.begin()
        weights.commit()
    shares = [weights.sharded for weights in cluster.weights]
    for weights, share in zip(cluster.weights, shares, strict=True):
        write_anchor(tmp_path, weights.state_dict(), next(iter(share.values())))
    whole = read_anchor(tmp_path, RANKS, list(shares[0]), {})
    assert torch.equal(torch.cat([whole[name] for name in shares[0]]), cluster.expected())
    for weights, share in zip(cluster.weights, shares, strict=True):
        weights.load_state_dict(read_anchor(tmp_path, RANKS, list(share), share))
    with pytest.raises(WeightsError, match="shape"):
        cluster.weights[0].load_state_dict(whole)


def test_masters_that_cannot_be_moved_are_refused(monkeypatch):
    cluster = Cluster(2, monkeypatch)
    as_rank(monkeypatch, 0, RANKS)
    model, zero = cluster.models[0], cluster.zeros[0]
    with pytest.raises(ConfigError, match=r"optimizer=engine\.optimizer"):
        LiveWeights(model, "all")
    with pytest.raises(ConfigError, match="needs full matrices"):
        movable_weights(model, EffOPDConfig("random_direction", parameters="all"), zero)
    next(model.parameters())._dp_group = 2
    with pytest.raises(ConfigError, match="over 2 of 4 processes"):
        LiveWeights(model, "all", None, zero)
    next(model.parameters())._dp_group = None
    half = copy.copy(zero.flat.data)
    zero.flat.data = half.bfloat16()
    with pytest.raises(ConfigError, match="float32 master weights"):
        LiveWeights(model, "all", None, zero)
    zero.optimizer = torch.optim.SGD([zero.flat], lr=0.1)
    with pytest.raises(ConfigError, match="Adam or AdamW"):
        LiveWeights(model, "all", None, zero)


def test_masters_elsewhere_are_refused(monkeypatch):
    cluster = Cluster(3, monkeypatch)
    as_rank(monkeypatch, 0, RANKS)
    monkeypatch.setattr(ZeroDouble, "_part3", lambda self, p, flat: flat[: p.ds_tensor.numel()].clone())
    with pytest.raises(ConfigError, match="offload_optimizer"):
        LiveWeights(cluster.models[0], "all", None, cluster.zeros[0])


def test_wrappers():
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    assert base_optimizer(adam) is adam and zero_optimizer(adam) is None and zero_optimizer(None) is None
    zero = ZeroDouble(torch.nn.Linear(2, 1), 2, 0, 1)
    assert zero_optimizer(zero) is zero and base_optimizer(zero) is zero.optimizer
    hook = BeforeStep(zero, lambda: None)
    hook.remove()
    hook.remove()
    assert "step" not in vars(zero)


GOOD = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"}


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("zero_optimization", {"stage": 0}, r"stage=0: expected 1, 2 or 3"),
        ("zero_optimization", {"stage": 3}, "stage3_gather_16bit_weights_on_model_save"),
        (
            "zero_optimization",
            {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            r"offload_optimizer\.device='cpu'",
        ),
        ("zero_optimization", {"stage": 2, "offload_optimizer": {"device": "nvme"}}, "device='nvme'"),
        ("zero_optimization", {"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param"),
        ("zero_optimization", {"stage": 2, "cpu_offload": True}, "cpu_offload=True"),
        ("zero_optimization", {"stage": 2, "zenflow": {"topk_ratio": 0.1}}, "zenflow"),
        ("zero_optimization", {"stage": 2, "zero_hpz_partition_size": 8}, "hpZ"),
        ("zero_optimization", {"stage": 2, "mics_shard_size": 4}, "MiCS"),
        ("zero_optimization", {"stage": 2, "zero_quantized_weights": True}, "quantized"),
        ("zero_optimization", {"stage": 2, "elastic_checkpoint": True}, "elastic_checkpoint"),
        ("bf16", {"enabled": True, "bf16_master_weights_and_grads": True}, "no float32 master weights"),
        ("fp16", {"fp16_master_weights_and_grads": True}, "no float32 master weights"),
        ("scheduler", {"type": "WarmupLR"}, "--lr_scheduler_type"),
        ("optimizer", {"type": "OneBitAdam"}, r"optimizer\.type='OneBitAdam'"),
        ("tensor_parallel", {"autotp_size": 2}, "tensor parallelism"),
        ("hybrid_engine", {"enabled": True}, "hybrid engine"),
        ("amp", {"enabled": True}, "bf16"),
    ],
)
def test_settings_that_are_refused(section, values, message):
    with pytest.raises(ConfigError, match=message):
        check_zero(GOOD | {section: values})


def test_settings_that_work():
    check_zero(GOOD)
    check_zero(GOOD | {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "fp16": {"enabled": True}})
    zero3 = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, "offload_optimizer": {"device": "none"}}
    check_zero(GOOD | {"zero_optimization": zero3, "scheduler": "auto"})
    check_zero_optimizer("adamw_torch_fused", GOOD)
    check_zero_optimizer("adafactor", GOOD | {"optimizer": {"type": "Adam"}})
    with pytest.raises(ConfigError, match="optim='adafactor'"):
        check_zero_optimizer("adafactor", GOOD)
