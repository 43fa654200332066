"""`attach` / `detach` on any module, the layer itself, and what a target must be."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from support.models import Tower, randomize_blocks, routed_tower
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import gradroute as gr

pytestmark = pytest.mark.touches_peft

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_equals_the_base_bitwise_at_initialisation(dtype: torch.dtype) -> None:
    model = Tower().to(dtype)
    x = X.to(dtype)
    expected = model(x)
    gr.attach(model, r=2, lora_alpha=4)
    assert torch.equal(model(x), expected)
    randomize_blocks(model)
    assert not torch.equal(model(x), expected)


def test_attach_returns_the_model_freezes_the_rest_and_trains_both_blocks() -> None:
    model = Tower()
    assert gr.attach(model, r=2) is model
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    deployed, quarantine = dict(gr.deployed_parameters(model)), dict(gr.quarantine_parameters(model))
    assert trainable == deployed.keys() | quarantine.keys()
    assert deployed.keys() == {f"{linear}.lora_{letter}" for linear in ("lower", "upper") for letter in "AB"}
    assert quarantine.keys() == {f"{name}_quarantine" for name in deployed}
    assert all(dict(model.named_parameters())[name] is p for name, p in (deployed | quarantine).items())


def test_what_is_not_adapted_is_frozen_and_thawed_by_detach() -> None:
    model = gr.attach(nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)), r=2)
    assert not any(p.requires_grad for p in model[1].parameters())
    gr.detach(model)
    assert all(p.requires_grad for p in model[1].parameters())


@pytest.mark.parametrize("ends", [gr.detach, gr.merge_deployed])
def test_blocks_that_were_wrapped_since_are_detached_and_merged(ends: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)), nn.Linear(5, 2)).eval()
    frozen = model[1].bias.requires_grad_(False)
    randomize_blocks(gr.attach(model, r=2))
    with torch.no_grad(), gr.disable_adapters(model) if ends is gr.detach else gr.ablate_quarantine(model):
        expected = model(X)
    model[0] = checkpoint_wrapper(model[0])
    ended = ends(model)
    assert not any(isinstance(module, gr.QuarantineLoRA) for module in ended.modules())
    assert {name for name, p in ended.named_parameters() if not p.requires_grad} == {"1.bias"}
    assert not frozen.requires_grad
    torch.testing.assert_close(ended(X), expected)


def test_parameters_that_are_gone_keep_detach_from_starting() -> None:
    model = gr.attach(nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)), r=2)
    model[1] = nn.Identity()
    with pytest.raises(gr.errors.TargetError, match=r"Found none that is called `1.weight`, `1.bias`. Fix"):
        gr.detach(model)
    assert isinstance(model[0], gr.QuarantineLoRA)


def test_ranks_scalings_and_dtype_of_the_blocks() -> None:
    model = gr.attach(Tower().bfloat16(), r=2, r_quarantine=4, lora_alpha=8)
    assert model.lower.deployed.A.shape == (2, 5)
    assert model.lower.quarantine.B.shape == (6, 4)
    assert (model.lower.deployed.scaling, model.lower.quarantine.scaling) == (4.0, 2.0)
    assert model.lower.deployed.A.dtype == torch.bfloat16
    assert gr.attach(Tower(), r=3).lower.quarantine.A.shape == (3, 5)


def test_the_seed_decides_A_and_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    models = [gr.attach(Tower(), r=2, seed=seed) for seed in (0, 0, 1)]
    torch.set_rng_state(state)
    first = [Tower() for _ in range(3)]
    assert all(torch.equal(a.lower.weight, b.lower.base_layer.weight) for a, b in zip(first, models, strict=True))
    same, again, other = (m.lower.deployed.A for m in models)
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert not torch.equal(same, models[0].lower.quarantine.A)


def test_detach_restores_modules_and_flags_and_drops_both_blocks() -> None:
    model = Tower()
    model.lower.bias.requires_grad_(False)
    before = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in before.items()}
    expected = model(X)
    randomize_blocks(gr.attach(model, r=2))
    assert gr.detach(model) is model
    assert type(model.lower) is nn.Linear
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        ("all-linear", {"0.lower", "0.upper", "1.lower", "1.upper"}),
        (["lower"], {"0.lower", "1.lower"}),
        (["0.lower", "upper"], {"0.lower", "0.upper", "1.upper"}),
        (r"1\..*", {"1.lower", "1.upper"}),
        (r".*er", {"0.lower", "0.upper", "1.lower", "1.upper"}),
    ],
)
def test_target_modules_are_names_suffixes_or_a_regular_expression(target_modules: object, expected: set[str]) -> None:
    model = gr.attach(nn.Sequential(Tower(), Tower()), r=2, target_modules=target_modules)
    assert {name for name, m in model.named_modules() if isinstance(m, gr.QuarantineLoRA)} == expected


@pytest.mark.parametrize(
    ("target_modules", "message"),
    [
        (["loewr"], "`loewr`.*Did you mean `lower`"),
        ("lower", "`lower`.*whole module names.*Did you mean"),
        (["nothing_like_it"], "end in `lower`, `upper`"),
        (["lower", "uper"], "`uper`.*`upper`"),
        ([], r"Found \[\]"),
        ("(", "regular expression"),
        (["0"], "`0`, a Tower"),
    ],
)
def test_unmatched_or_unsuitable_targets_raise_and_change_nothing(target_modules: object, message: str) -> None:
    model = nn.Sequential(Tower(), Tower())
    with pytest.raises(gr.errors.TargetError, match=message):
        gr.attach(model, r=2, target_modules=target_modules)
    assert not any(isinstance(m, gr.QuarantineLoRA) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "`r`.*0"),
        ({"r": 2, "r_quarantine": -1}, "`r_quarantine`.*-1"),
        ({"r": True}, "`r`.*True"),
        ({"r": 2, "lora_alpha": float("nan")}, "`lora_alpha`.*nan"),
        ({"r": 2, "lora_alpha": 0}, "`lora_alpha`.*0"),
        ({"r": 2, "stop_gradient": "output"}, "`stop_gradient`.*output"),
    ],
)
def test_bad_sizes_raise_and_leave_the_model_trainable(
    arguments: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Tower()
    # Types are the import hook's to refuse; values are refused with or without it.
    with pytest.raises((gr.errors.TargetError, TypeError)) as caught:
        gr.attach(model, **arguments)
    if isinstance(caught.value, gr.errors.TargetError):
        assert caught.match(message)
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.lower) is nn.Linear


def test_attaching_twice_raises() -> None:
    with pytest.raises(gr.errors.TargetError, match="already"):
        gr.attach(routed_tower(), r=2)


def test_detaching_what_was_never_attached_raises() -> None:
    with pytest.raises(gr.errors.TargetError, match="Tower"):
        gr.detach(Tower())


def test_the_output_projection_of_multihead_attention_is_refused_by_name() -> None:
    model = nn.TransformerDecoderLayer(8, 2, 16)
    with pytest.raises(gr.errors.TargetError, match=r"self_attn\.out_proj.*never calls"):
        gr.attach(model, r=2)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.corner("a target whose weight is read by a fused path and never called", "`TargetError` at `attach`")
def test_linears_that_a_fused_path_reads_without_calling_are_refused() -> None:
    for model in (nn.TransformerEncoderLayer(8, 2, 16), nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))):
        with pytest.raises(gr.errors.TargetError, match=r"linear1`, inside an nn\.TransformerEncoderLayer"):
            gr.attach(model, r=2, target_modules=["linear1"])


def test_a_failure_inside_attach_leaves_the_model_trainable() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.LazyLinear(5))
    with pytest.raises(ValueError, match="uninitialized"):
        gr.attach(model, r=2)
    assert model[0].weight.requires_grad
    assert type(model[0]) is nn.Linear


def test_detaching_a_part_of_what_was_attached_raises_and_detaching_a_parent_works() -> None:
    inner = gr.attach(nn.Sequential(Tower(), Tower()), r=2)
    with pytest.raises(gr.errors.TargetError, match="all 4 layers.*Found 2"):
        gr.detach(inner[0])
    with pytest.raises(gr.errors.TargetError, match="QuarantineLoRA"):
        gr.detach(inner[0].lower)
    outer = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), inner)
    gr.detach(outer)
    assert not outer[0].weight.requires_grad
    assert all(p.requires_grad for p in inner.parameters())


def test_detaching_inside_a_route_or_view_raises() -> None:
    model = routed_tower()
    with gr.ablate_quarantine(model), pytest.raises(gr.errors.RouteError, match="leave it first"):
        gr.detach(model)


def test_detach_thaws_parameters_that_were_assigned_again() -> None:
    model = gr.attach(Tower(), r=2)
    model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
    assert all(p.requires_grad for p in gr.detach(model).parameters())


def test_a_layer_made_under_inference_mode_or_on_meta_trains_later() -> None:
    with torch.device("meta"):
        model = gr.attach(nn.Sequential(nn.Linear(5, 4)), r=2)
    model.to_empty(device="cpu")
    model(X).sum().backward()
    with torch.inference_mode():
        gr.adapters.set_route(model, gr.RouteMask.zones(["keep"] * 3))
        model(X)
        gr.adapters.clear_route(model)
    model.zero_grad()
    model(X).sum().backward()
    assert all(p.grad is not None for _, p in gr.quarantine_parameters(model))


def test_a_linear_used_in_two_places_stays_one_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.append(model[0])
    gr.attach(model, r=2)
    assert model[0] is model[2]
    gr.detach(model)
    assert type(model[0]) is nn.Linear
    assert model[0] is model[2]


def test_the_head_of_a_language_model_is_left_out_of_all_linear() -> None:
    class WithHead(Tower):
        def get_output_embeddings(self) -> nn.Module:
            return self.upper

    model = gr.attach(WithHead(), r=2)
    assert type(model.upper) is nn.Linear
    assert isinstance(model.lower, gr.QuarantineLoRA)


def test_state_dict_round_trip_restores_both_blocks() -> None:
    trained, fresh = routed_tower(), gr.attach(Tower().double(), r=2, r_quarantine=3, lora_alpha=4.0)
    x = X.double()
    assert not torch.equal(trained(x), fresh(x))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(trained(x), fresh(x))


@pytest.mark.corner("a model is copied while a route or an ablation is open", "neither holds for the copy")
def test_copies_made_inside_a_route_or_ablation_are_not_stuck_in_it() -> None:
    model = routed_tower()
    x = X.double()
    on = model(x)
    with gr.ablate_quarantine(model), gr.route(model, gr.RouteMask.zones(["keep"] * 3)):
        copied = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        ablated = model(x)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert not torch.equal(on, ablated)
    assert torch.equal(copied(x), on)
    assert torch.equal(loaded(x), on)


def test_a_detached_copy_thaws_its_own_parameters() -> None:
    model = gr.attach(Tower(), r=2)
    copied = gr.detach(copy.deepcopy(model))
    assert all(p.requires_grad for p in copied.parameters())
    assert not model.lower.base_layer.weight.requires_grad


def test_repr_says_what_it_is() -> None:
    assert "r=2, r_quarantine=3, lora_alpha=4" in repr(routed_tower().lower)
    assert "stop_gradient='branch'" in repr(routed_tower(stop_gradient="branch").lower)


def test_a_layer_can_be_used_on_its_own() -> None:
    layer = gr.QuarantineLoRA(nn.Linear(5, 4), r=2, lora_alpha=2.0)
    randomize_blocks(layer)
    with gr.route(layer, gr.RouteMask.exclusive([True, False, False])):
        layer(X).sum().backward()
    assert layer.lora_A.grad.abs().sum() > 0
