"""Oriented initialisations: what holds for every scheme, in layers of PEFT too, and `gaussian_`."""

from collections.abc import Callable

import pytest
import torch
from support.models import Tower, normal, randomize_blocks
from support.oriented_blocks import D_HIDDEN, D_IN, D_OUT, U, V, attached, blocks, cosine, differences, layers, values
from support.tiny_models import peft_model, token_ids
from torch import Tensor, nn

import gradroute as gr
from gradroute._protocol import routed_layers

SCHEMES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "gaussian": lambda model: gr.adapters.init.gaussian_(model, seed=3),
    "pissa": gr.adapters.init.pissa_,
    "pissa_randomised": lambda model: gr.adapters.init.pissa_(model, niter=2, seed=3),
    "contrastive_covariance": lambda model: gr.adapters.init.contrastive_covariance_(model, differences()),
    "contrastive_randomised": lambda model: gr.adapters.init.contrastive_covariance_(
        model, differences(), niter=2, seed=3
    ),
    "signed_seed": lambda model: gr.adapters.init.signed_seed_(model, differences(), seed=3),
    "signed_seed_reversed": lambda model: gr.adapters.init.signed_seed_(model, differences(), seed=3, reverse=True),
}
every_scheme = pytest.mark.parametrize("initialise", SCHEMES.values(), ids=SCHEMES.keys())
every_oriented_scheme = pytest.mark.parametrize(
    "initialise", [f for name, f in SCHEMES.items() if name != "gaussian"], ids=list(SCHEMES)[1:]
)


# Every scheme


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("r", "r_quarantine"), [(4, 4), (3, 2), (2, 5)])
def test_the_net_delta_is_zero_bitwise(initialise: Callable, dtype: torch.dtype, r: int, r_quarantine: int) -> None:
    x = normal(7, D_IN, seed=5, dtype=dtype)
    model = randomize_blocks(attached(dtype, r, r_quarantine))
    with gr.disable_adapters(model):
        base = model(x)
    before = values(model)
    assert not torch.equal(model(x), base)
    assert initialise(model) is model
    assert all(not torch.equal(now, before[name]) for name, now in values(model).items())
    assert all(now.any() and now.dtype == dtype for now in values(model).values())
    assert torch.equal(model(x), base)
    with gr.ablate_quarantine(model), torch.no_grad():
        assert torch.equal(model(x), base)


@every_scheme
@pytest.mark.parametrize(("r", "n"), [(2, 1), (3, 2), (4, 2), (5, 3)])
def test_V_has_the_first_half_of_the_rank_rounded_up_and_U_the_rest(initialise: Callable, r: int, n: int) -> None:
    for block in blocks(initialise(attached(r=r))):
        assert block.A[:n].any(1).all()
        assert not block.A[n:].any()
        assert not block.B[:, :n].any()
        assert block.B[:, n:].any(0).all()


@every_scheme
def test_each_half_learns_on_the_side_that_is_zero(initialise: Callable) -> None:
    model = initialise(attached())
    model(normal(7, D_IN)).square().sum().backward()
    for layer in layers(model):
        for A, B in ((layer.lora_A, layer.lora_B), (layer.lora_A_quarantine, layer.lora_B_quarantine)):
            assert B.grad[:, :2].any(0).all()
            assert A.grad[2:].any(1).all()
            assert not B.grad[:, 2:].any()
            assert not A.grad[:2].any()


@every_oriented_scheme
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_all_directions_have_length_one(initialise: Callable, dtype: torch.dtype) -> None:
    for block in blocks(initialise(attached(dtype))):
        lengths = torch.cat([V(block).norm(dim=1), U(block).norm(dim=0)])
        torch.testing.assert_close(
            lengths, torch.ones_like(lengths), atol=1e-2 if dtype == torch.bfloat16 else 1e-9, rtol=0
        )


@every_scheme
def test_no_direction_is_in_both_blocks(initialise: Callable) -> None:
    for layer in layers(initialise(attached())):
        for frame in (
            torch.cat([V(layer.deployed), V(layer.quarantine)]),
            torch.cat([U(layer.deployed), U(layer.quarantine)], 1),
        ):
            assert torch.linalg.svdvals(frame).min() > 0.1


@every_scheme
def test_the_same_call_gives_the_same_blocks_and_leaves_the_global_generator_alone(initialise: Callable) -> None:
    first, second = attached(), randomize_blocks(attached(), seed=7)
    state = torch.get_rng_state()
    first, second = values(initialise(first)), values(initialise(second))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(now, second[name]) for name, now in first.items())


@every_scheme
def test_parameters_stay_the_same_objects_and_the_rest_is_not_touched(initialise: Callable) -> None:
    model = attached()
    objects = dict(model.named_parameters())
    frozen = {name: p.clone() for name, p in objects.items() if not p.requires_grad}
    storage = {name: p.data_ptr() for name, p in objects.items()}
    initialise(model)
    assert all(p is objects[name] for name, p in model.named_parameters())
    assert storage == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert all(torch.equal(objects[name], p) for name, p in frozen.items())
    assert {name for name, p in objects.items() if p.requires_grad} == values(model).keys()
    assert all(p.grad is None and p.grad_fn is None for p in objects.values())


@every_scheme
def test_half_precision_is_the_rounding_of_the_float32_result(initialise: Callable) -> None:
    half = attached(torch.bfloat16)
    single = attached(torch.float32)
    with torch.no_grad():
        for a, b in zip(layers(single), layers(half), strict=True):
            a.base_layer.weight.copy_(b.base_layer.weight)
    expected, found = values(initialise(single)), values(initialise(half))
    assert all(torch.equal(found[name], now.bfloat16()) for name, now in expected.items())


@every_scheme
@pytest.mark.parametrize(
    ("opened", "message"),
    [
        (gr.ablate_quarantine, "view ablated"),
        (lambda model: gr.ablate_quarantine(model, 0.5), "view scaled"),
        (gr.disable_adapters, "view disabled"),
        (lambda model: gr.route(model, gr.RouteMask.zones(["keep"])), "route open True"),
    ],
)
def test_inside_a_route_or_view_it_raises_and_writes_nothing(
    initialise: Callable, opened: Callable, message: str
) -> None:
    model = attached()
    before = values(model)
    with pytest.raises(gr.errors.RouteError, match=f"`lower`.*{message}"), opened(model):
        initialise(model)
    assert all(torch.equal(now, before[name]) for name, now in values(model).items())


@every_scheme
@pytest.mark.parametrize(("ranks", "block"), [((1, 4), "deployed"), ((4, 1), "quarantine")])
def test_rank_one_raises(initialise: Callable, ranks: tuple[int, int], block: str) -> None:
    with pytest.raises(gr.errors.TargetError, match=f"`lower`: the {block} block.*rank 2 or more.*Found 1"):
        initialise(attached(r=ranks[0], r_quarantine=ranks[1]))


@every_scheme
def test_layers_of_gains_raise(initialise: Callable) -> None:
    with pytest.raises(gr.errors.TargetError, match='`lower`: a SvdGain.*parametrization="lora"'):
        initialise(attached(parametrization="svd_gain"))


@every_scheme
def test_a_model_without_blocks_raises(initialise: Callable) -> None:
    with pytest.raises(gr.GradRouteError, match="routed layers"):
        initialise(Tower(D_IN, D_HIDDEN, D_OUT))


@every_scheme
def test_a_weight_that_is_not_finite_raises_and_nothing_is_written(initialise: Callable) -> None:
    model = attached()
    with torch.no_grad():
        model.upper.weight[0, 0] = float("nan")
    before = values(model)
    with pytest.raises(gr.errors.TargetError, match="`upper`: its frozen weight"):
        initialise(model)
    assert all(torch.equal(now, before[name]) for name, now in values(model).items())


@every_scheme
def test_a_weight_on_the_meta_device_raises(initialise: Callable) -> None:
    with pytest.raises(gr.errors.TargetError, match="meta"):
        initialise(attached().to("meta"))


@every_oriented_scheme
def test_more_directions_than_the_weight_has_raise(initialise: Callable) -> None:
    initialise(attached(r=8))
    with pytest.raises(gr.errors.TargetError, match="`upper`: 9 .*Fix: lower r"):
        initialise(attached(r=9, r_quarantine=8))


# gaussian_


def test_gaussian_directions_have_length_one_in_the_mean_and_no_rank_limit() -> None:
    model = gr.adapters.init.gaussian_(attached(r=4000), seed=0)
    for block in blocks(model):
        assert V(block).square().sum(1).mean().item() == pytest.approx(1, abs=0.03)
        assert U(block).square().sum(0).mean().item() == pytest.approx(1, abs=0.03)
        assert abs(V(block).mean().item()) < 0.01


def test_gaussian_seeds_differ_and_do_not_depend_on_the_dtype() -> None:
    first, second = (values(gr.adapters.init.gaussian_(attached(), seed=seed)) for seed in (0, 1))
    assert all(not torch.equal(now, second[name]) for name, now in first.items())
    single = values(gr.adapters.init.gaussian_(attached(torch.float32), seed=0))
    assert all(torch.allclose(now.float(), single[name]) for name, now in first.items())


# Layers of PEFT


def peft_differences(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: normal(5, layer.base_weight().shape[1], seed=i) + 1
        for i, (name, layer) in enumerate(routed_layers(model).items())
    }


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("scheme", ["gaussian", "pissa", "contrastive_covariance", "signed_seed"])
def test_layers_of_peft_start_at_zero_net_delta_in_the_directions_of_their_weight(
    scheme: str, architecture: str
) -> None:
    model = peft_model(architecture)
    ids = token_ids()
    with torch.no_grad(), gr.disable_adapters(model):
        base = model(input_ids=ids).logits
    assert not torch.equal(model(input_ids=ids).logits, base)
    D = peft_differences(model)
    {
        "gaussian": lambda: gr.adapters.init.gaussian_(model, seed=0),
        "pissa": lambda: gr.adapters.init.pissa_(model),
        "contrastive_covariance": lambda: gr.adapters.init.contrastive_covariance_(model, D),
        "signed_seed": lambda: gr.adapters.init.signed_seed_(model, D, seed=0),
    }[scheme]()
    assert torch.equal(model(input_ids=ids).logits, base)
    for name, layer in routed_layers(model).items():
        W = layer.base_weight()  # (d_out, d_in), also where the layer stores it transposed
        if scheme == "pissa":
            s = torch.linalg.svdvals(W)
            torch.testing.assert_close((W @ V(layer.deployed)[0]).norm(), s[0])
            torch.testing.assert_close((W @ V(layer.quarantine)[0]).norm(), s[1])
        if scheme == "signed_seed":
            assert cosine(V(layer.quarantine)[0], D[name].mean(0).float()) > 0.9999


def test_merged_layers_of_peft_raise() -> None:
    model = peft_model("llama")
    model.merge_adapter()
    with pytest.raises(gr.errors.RouteError, match="unmerge"):
        gr.adapters.init.pissa_(model)
    model.unmerge_adapter()
    gr.adapters.init.pissa_(model)
