"""The layer of gains around its base: names, copies, state, detaching; and what it cannot be put around."""

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.gain_towers import ALPHA, MASK, R_Q, R, X, attached, both_rotations, parameters, trained
from support.models import Tower, randomize_blocks
from torch import nn

import gradroute as gr

# The layer around its base


@both_rotations
def test_parameters_are_named_after_their_blocks_and_the_rest_is_frozen(rotate: bool) -> None:
    model = attached(rotate=rotate)
    quarantine = {"gain_quarantine", "rotation_quarantine"} if rotate else {"gain_quarantine"}
    assert dict(gr.deployed_parameters(model)).keys() == {"lower.gain", "upper.gain"}
    assert dict(gr.quarantine_parameters(model)).keys() == {f"{n}.{p}" for n in ("lower", "upper") for p in quarantine}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == parameters(model).keys()
    assert [p.shape for p in model.lower.block_parameters("quarantine")] == [(3,), (3,)][: 1 + rotate]


def test_a_layer_answers_like_the_linear_it_wraps() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = Tower().lower
    layer = gr.adapters.SvdGain(linear.eval(), r=2, lora_alpha=2.0)
    assert layer.weight is linear.weight
    assert not any(p.requires_grad for p in linear.parameters())
    assert layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (5, 6)
    assert torch.equal(layer.base_weight(), linear.weight)
    assert layer.r_quarantine == 2
    assert not layer.training


def test_the_decomposition_is_in_the_dtype_of_the_weight_and_computed_in_float32() -> None:
    layer = attached(torch.bfloat16, r=4, r_quarantine=4).upper
    assert {t.dtype for t in (layer.U, layer.S, layer.Vh)} == {torch.bfloat16}
    expected = torch.linalg.svdvals(layer.weight.float())
    assert torch.equal(layer.S, expected.bfloat16())
    reconstructed = (layer.U.float() * layer.S.float()) @ layer.Vh.float()
    torch.testing.assert_close(reconstructed, layer.weight.detach().float(), rtol=0, atol=0.02)


@both_rotations
def test_state_dict_round_trip_restores_gains_and_directions(rotate: bool) -> None:
    model = trained(rotate)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        fresh = gr.attach(
            Tower().double(), r=R, r_quarantine=R_Q, lora_alpha=ALPHA, parametrization="svd_gain", rotate=rotate
        )
    assert not torch.equal(model(X), fresh(X))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(X), fresh(X))
    assert {"lower.U", "lower.S", "lower.Vh"} <= model.state_dict().keys()


@both_rotations
def test_copies_and_pickles_made_inside_an_ablation_are_not_stuck_in_it(rotate: bool) -> None:
    model = trained(rotate)
    on, buffer = model(X), io.BytesIO()
    with torch.no_grad(), gr.ablate_quarantine(model), gr.route(model, MASK):
        copied = copy.deepcopy(model)
        torch.save(model, buffer)
        assert not torch.equal(model(X), on)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copied, loaded):
        assert torch.equal(twin(X), on)
        randomize_blocks(twin, seed=9)
        assert not torch.equal(twin(X), on)
    assert torch.equal(model(X), on)


def test_detach_restores_modules_and_flags() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tower().double()
    linear, expected = model.lower, model(X)
    model.upper.bias.requires_grad_(False)
    gr.attach(model, r=2, parametrization="svd_gain")
    randomize_blocks(model)
    assert isinstance(model.lower, gr.adapters.SvdGain)
    assert gr.detach(model) is model
    assert model.lower is linear
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert torch.equal(model(X), expected)


def test_a_linear_used_in_two_places_stays_one_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.append(model[0])
    gr.attach(model, r=2, parametrization="svd_gain")
    assert model[0] is model[2]
    assert type(gr.detach(model)[2]) is nn.Linear


def test_nothing_is_drawn() -> None:
    state = torch.get_rng_state()
    first, second = attached(seed=0, rotate=True), attached(seed=1, rotate=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_repr_says_what_it_is() -> None:
    assert "SvdGain(" in repr(attached())
    assert "r=2, r_quarantine=3, lora_alpha=4\n" in repr(attached().lower)
    assert "lora_alpha=4, stop_gradient='branch', rotate=True" in repr(
        attached(rotate=True, stop_gradient="branch").lower
    )


def test_branch_detaching_reaches_the_layer() -> None:
    found = []
    for stop_gradient in ("parameters", "branch"):
        model = trained(stop_gradient=stop_gradient)
        with gr.route(model, gr.RouteMask.zones(["route"] * 4)):
            model(X).square().sum().backward()
        found.append(model.lower.gain_quarantine.grad)
    assert not torch.allclose(*found)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parametrization": "dora"}, "`parametrization`.*'dora'"),
        ({"parametrization": "lora", "rotate": True}, '`rotate=True`.*parametrization="svd_gain"'),
        ({"r": 5}, r"Module `lower`: .*5 singular|Module `upper`: 5 singular.*which has 4.*lower r"),
        ({"r_quarantine": 5}, "Module `upper`: 5 singular"),
        ({"r_quarantine": 1, "rotate": True}, "Module `lower`: `rotate` with `r_quarantine=1`"),
        ({"r": 0}, "`r`.*0"),
        ({"r_quarantine": -1}, "`r_quarantine`.*-1"),
        ({"lora_alpha": float("nan")}, "`lora_alpha`.*nan"),
        ({"stop_gradient": "output"}, "`stop_gradient`.*output"),
    ],
)
def test_bad_settings_raise_and_leave_the_model_as_it_was(settings: dict[str, object], message: str) -> None:
    model = Tower()
    # Types are the import hook's to refuse; values are refused with or without it.
    with pytest.raises((gr.errors.TargetError, TypeError)) as caught:
        gr.attach(model, **{"r": R, "r_quarantine": R_Q, "parametrization": "svd_gain", **settings})
    if isinstance(caught.value, gr.errors.TargetError):
        assert caught.match(message)
    assert type(model.lower) is type(model.upper) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight[:, 1:].copy_(weight[:, :1]), "`upper`: 3 singular.*of rank 1"),
        (lambda weight: weight.zero_(), "`upper`: 3 singular.*of rank 0"),
        (lambda weight: weight[0, 0].fill_(float("nan")), "`upper`: .*not finite"),
    ],
)
def test_a_weight_without_enough_singular_directions_is_refused(change, message: str) -> None:
    model = Tower()
    with torch.no_grad():
        change(model.upper.weight)
    with pytest.raises(gr.errors.TargetError, match=message):
        gr.attach(model, r=R, r_quarantine=R_Q, parametrization="svd_gain")
    assert all(p.requires_grad for p in model.parameters())


def test_a_weight_on_the_meta_device_is_refused() -> None:
    with pytest.raises(gr.errors.TargetError, match="`lower`: .*meta device"):
        gr.attach(Tower().to("meta"), r=2, parametrization="svd_gain")


def test_what_is_no_plain_linear_is_refused() -> None:
    with pytest.raises(gr.errors.TargetError, match=r"self_attn\.out_proj.*never calls"):
        gr.attach(nn.TransformerDecoderLayer(8, 2, 16), r=2, parametrization="svd_gain")


@pytest.mark.parametrize("second", ["lora", "svd_gain"])
def test_attaching_twice_raises(second: str) -> None:
    with pytest.raises(gr.errors.TargetError, match="already.*detach"):
        gr.attach(attached(), r=2, parametrization=second)


@pytest.mark.parametrize("config", [LoraConfig, gr.QuarantineLoraConfig])
@pytest.mark.parametrize("parametrization", ["lora", "svd_gain"])
def test_a_model_with_lora_layers_of_peft_is_refused(parametrization: str, config: type[LoraConfig]) -> None:
    model = get_peft_model(Tower(), config(r=2, target_modules=["lower"]))
    flags = [p.requires_grad for p in model.parameters()]
    for adapted in (model, model.base_model.model):
        with pytest.raises(gr.errors.TargetError, match="lower`.*QuarantineLoraConfig"):
            gr.attach(adapted, r=2, parametrization=parametrization, target_modules=["upper"])
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(isinstance(module, gr.QuarantineLoRA | gr.adapters.SvdGain) for module in model.modules())
