"""`attach(..., parametrization="svd_gain")`: gains on singular directions, with everything that LoRA blocks can do."""

import copy
import io

import pytest
import torch
from language_models import PAIRS, Mixer, ids_only
from models import Tower, gradients, randomize_blocks, reference_gradients
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradroute as gr
from gradroute.adapters.svd_gain import cayley
from gradroute.directions.identity import model_identity

R, R_Q, ALPHA = 2, 3, 4.0
ZONES = ["keep", "absorb", "route", "absorb"]
MASK = gr.RouteMask.zones(ZONES)
both_rotations = pytest.mark.parametrize("rotate", [False, True])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


X, UPSTREAM = normal(4, 5, seed=1), normal(4, 4, seed=2)


def attached(dtype: torch.dtype = torch.float64, **settings: object) -> Tower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tower().to(dtype)
    defaults = {"r": R, "r_quarantine": R_Q, "lora_alpha": ALPHA, "parametrization": "svd_gain"}
    return gr.attach(model, **{**defaults, **settings})


def trained(rotate: bool = False, **settings: object) -> Tower:
    """Gains, and the rotation's entries, drawn at random."""
    return randomize_blocks(attached(rotate=rotate, **settings), seed=3)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {**dict(gr.deployed_parameters(model)), **dict(gr.quarantine_parameters(model))}


def dense(layer: gr.SvdGain, x: Tensor, m: Tensor) -> Tensor:
    """The formula, with a decomposition of its own where signs do not matter; m has a value per row."""
    W = layer.base_layer.weight.detach()
    left, s, right = torch.linalg.svd(W, full_matrices=False)
    rotation = torch.eye(R_Q, dtype=torch.float64)
    if layer.rotate:
        # K reads the frozen directions with the signs that the layer has; its rows differ from `right` in sign alone.
        signs = (right[:R_Q] * layer.Vh[:R_Q]).sum(1).sign()
        K = torch.zeros(R_Q, R_Q, dtype=torch.float64)
        K = K.index_put((torch.tensor([1, 2, 2]), torch.tensor([0, 0, 1])), layer.rotation_quarantine)
        K, identity = K - K.T, torch.eye(R_Q, dtype=torch.float64)
        rotation = signs[:, None] * ((identity - K) @ torch.linalg.inv(identity + K)) * signs
    y = x @ W.T + layer.base_layer.bias
    y = y + ALPHA / R * (x @ right[:R].T * (s[:R] * layer.gain.tanh())) @ left[:, :R].T
    read = x @ (rotation @ right[:R_Q]).T
    return y + m[:, None] * (ALPHA / R_Q * (read * (s[:R_Q] * layer.gain_quarantine.tanh())) @ left[:, :R_Q].T)


# Values


@both_rotations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_equals_the_base_bitwise_at_initialisation(dtype: torch.dtype, rotate: bool) -> None:
    x = X.to(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = Tower().to(dtype)(x)
    model = attached(dtype, rotate=rotate)
    assert torch.equal(model(x), expected)
    randomize_blocks(model)
    assert all(p.dtype == dtype and p.any() for p in parameters(model).values())
    assert not torch.equal(model(x), expected)


@both_rotations
def test_output_is_the_formula(rotate: bool) -> None:
    layer = trained(rotate).lower
    torch.testing.assert_close(layer(X), dense(layer, X, torch.ones(4)), rtol=0, atol=1e-12)
    with gr.ablate_quarantine(layer, scale=0.3):
        torch.testing.assert_close(
            layer(X), dense(layer, X, torch.full((4,), 0.3, dtype=torch.float64)), rtol=0, atol=1e-12
        )
    assert not torch.allclose(layer(X), dense(layer, X, torch.zeros(4)))


@pytest.mark.parametrize("r_quarantine", [1, 4])
def test_the_larger_rank_decides_how_many_triplets_are_kept(r_quarantine: int) -> None:
    layer = trained(r=2, r_quarantine=r_quarantine).upper
    k = max(2, r_quarantine)
    assert (layer.U.shape, layer.S.shape, layer.Vh.shape) == ((4, k), (k,), (k, 6))
    assert layer.deployed.A.shape == (2, 6)
    assert layer.quarantine.B.shape == (4, r_quarantine)
    assert (layer.deployed.scaling, layer.quarantine.scaling) == (2.0, 4.0 / r_quarantine)


def test_all_gains_at_a_large_value_scale_the_whole_weight() -> None:
    layer = attached(r=4, r_quarantine=4, lora_alpha=2.0).upper
    with torch.no_grad():
        layer.gain.fill_(20.0)
    deployed = layer.deployed
    torch.testing.assert_close(deployed.B @ deployed.A, layer.base_weight(), rtol=0, atol=1e-12)


def test_without_rotation_the_quarantine_scales_the_deployed_axes_and_with_it_reads_others() -> None:
    for rotate in (False, True):
        layer = trained(rotate, r=3, r_quarantine=3).lower
        quarantine = layer.quarantine.B @ layer.quarantine.A
        in_singular_basis = layer.U.T @ quarantine @ layer.Vh.T
        off_diagonal = in_singular_basis - in_singular_basis.diagonal().diag()
        assert (off_diagonal.abs().max() < 1e-12) is not rotate
        torch.testing.assert_close(quarantine @ layer.Vh.T @ layer.Vh, quarantine, rtol=0, atol=1e-12)


@pytest.mark.parametrize("r", [2, 3, 6])
@pytest.mark.parametrize("size", [0.1, 1.0, 100.0])
def test_the_cayley_transform_is_a_rotation_and_zero_the_identity(r: int, size: float) -> None:
    entries = size * normal(r * (r - 1) // 2)
    rotation = cayley(entries, r)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(r).double(), rtol=0, atol=1e-10)
    assert torch.linalg.det(rotation).item() == pytest.approx(1)
    assert not torch.allclose(rotation, torch.eye(r).double(), atol=1e-3)
    torch.testing.assert_close(cayley(-entries, r), rotation.T)
    assert torch.equal(cayley(torch.zeros_like(entries), r), torch.eye(r).double())
    assert torch.autograd.gradcheck(lambda e: cayley(e, r), 0.5 * normal(len(entries)).requires_grad_())


def test_each_entry_of_the_rotation_turns_its_own_plane() -> None:
    for i, (row, column) in enumerate([(1, 0), (2, 0), (2, 1)]):
        rotation = cayley(torch.eye(3).double()[i], 3)
        other = ({0, 1, 2} - {row, column}).pop()
        assert rotation[other, other] == 1
        assert rotation[row, column].item() == pytest.approx(-1)  # tan(90 degrees / 2) = 1


def test_a_bf16_rotation_is_computed_in_float32() -> None:
    entries = normal(6, dtype=torch.bfloat16)
    assert torch.equal(cayley(entries, 4), cayley(entries.float(), 4))
    model = trained(True, dtype=torch.bfloat16)
    layer = model.lower
    expected = (cayley(layer.rotation_quarantine, R_Q) @ layer.Vh[:R_Q].float()).bfloat16()
    assert torch.equal(layer.quarantine.A, expected)


# Gradients and gates


@both_rotations
def test_routed_gradients_are_those_of_every_row_weighted_by_its_gates(rotate: bool) -> None:
    model = trained(rotate)
    m, g_d, g_q = (torch.tensor(row).double() for row in ([0, 1, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]))
    total = {name: torch.zeros_like(p) for name, p in parameters(model).items()}
    deployed = dict(gr.deployed_parameters(model)).keys()
    for i in range(4):
        row = slice(i, i + 1)
        y = dense(model.upper, torch.tanh(dense(model.lower, X[row], m[row])), m[row])
        row_gradients = torch.autograd.grad((y * UPSTREAM[row]).sum(), list(parameters(model).values()))
        for name, gradient in zip(total, row_gradients, strict=True):
            total[name] += (g_d if name in deployed else g_q)[i] * gradient
    with gr.route(model, MASK):
        (model(X) * UPSTREAM).sum().backward()
    found = gradients(model)
    assert found.keys() == total.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, total[name], rtol=0, atol=1e-12)
        assert gradient.any()
    reference = reference_gradients(model, X, UPSTREAM, m, g_d, g_q)
    assert all(torch.allclose(reference[name], total[name]) for name in total)


@both_rotations
@pytest.mark.parametrize(("zone", "idle"), [("keep", "quarantine"), ("route", "deployed")])
def test_a_zone_leaves_the_other_block_without_gradient(zone: str, idle: str, rotate: bool) -> None:
    model = trained(rotate)
    with gr.route(model, gr.RouteMask.zones([zone] * 4)):
        model(X).square().sum().backward()
    quarantine = dict(gr.quarantine_parameters(model)).keys()
    for name, gradient in gradients(model).items():
        assert bool(gradient.any()) is ((name in quarantine) != (idle == "quarantine"))


def test_gains_learn_from_zero_and_the_rotation_once_they_have_moved() -> None:
    model = attached(rotate=True)
    optimizer = torch.optim.SGD(parameters(model).values(), lr=0.1)
    model(X).square().sum().backward()
    moving = {name: bool(gradient.any()) for name, gradient in gradients(model).items()}
    assert moving == {name: "rotation" not in name for name in parameters(model)}
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        model(X).square().sum().backward()
    assert all(gradient.any() for gradient in gradients(model).values())
    assert not torch.allclose(model.lower.quarantine.A, model.lower.Vh[:R_Q], atol=1e-6)


@both_rotations
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_equal_plain_ones(use_reentrant: bool, rotate: bool) -> None:
    found = []
    for run in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model = trained(rotate)
        with gr.route(model, MASK):
            run(model, X.clone().requires_grad_()).square().sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() == parameters(trained(rotate)).keys()
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_under_autocast_the_output_is_bf16_and_gains_get_float32_gradients() -> None:
    model = trained(True, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(X.float())
    y.square().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(X.float()), rtol=0.05, atol=0.05)
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in parameters(model).values())


# Views


@both_rotations
def test_ablating_and_disabling_take_away_what_they_say(rotate: bool) -> None:
    model = trained(rotate)
    deployed_only = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (deployed_only.lower, deployed_only.upper):
            layer.gain_quarantine.zero_()
    on = model(X)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), gr.ablate_quarantine(model):
            torch.testing.assert_close(model(X), deployed_only(X), rtol=0, atol=1e-12)
    assert not torch.allclose(on, deployed_only(X))
    with gr.disable_adapters(model):
        base = model(X)
    assert torch.equal(base, gr.detach(model)(X))


@both_rotations
def test_merging_keeps_what_the_ablated_view_shows(rotate: bool) -> None:
    model = trained(rotate)
    on = model(X)
    with gr.ablate_quarantine(model):
        ablated = model(X)
    assert not torch.allclose(on, ablated)
    merged = gr.merge_deployed(model)
    assert type(merged.lower) is nn.Linear
    torch.testing.assert_close(merged(X), ablated, rtol=0, atol=1e-12)


def test_directions_can_be_extracted() -> None:
    torch.manual_seed(0)
    model = gr.attach(Mixer().double(), r=2, parametrization="svd_gain", target_modules=["q", "v"])
    with gr.ablate_quarantine(model):
        directions = gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)
        inputs = gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only, features="input")
    assert {name: tuple(rows.shape) for name, rows in directions.rows.items()} == {"q": (1, 2), "v": (1, 2)}
    torch.testing.assert_close(inputs.hack["q"] @ model.q.Vh.T, directions.hack["q"])


def test_the_base_model_is_the_same_before_and_after() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Tower().double()
    assert model_identity(trained(True)) == model_identity(base)


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
    layer = gr.SvdGain(linear.eval(), r=2, lora_alpha=2.0)
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
    with gr.ablate_quarantine(model), gr.route(model, MASK):
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
    assert isinstance(model.lower, gr.SvdGain)
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
    with pytest.raises((gr.TargetError, TypeError)) as caught:
        gr.attach(model, **{"r": R, "r_quarantine": R_Q, "parametrization": "svd_gain", **settings})
    if isinstance(caught.value, gr.TargetError):
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
    with pytest.raises(gr.TargetError, match=message):
        gr.attach(model, r=R, r_quarantine=R_Q, parametrization="svd_gain")
    assert all(p.requires_grad for p in model.parameters())


def test_a_weight_on_the_meta_device_is_refused() -> None:
    with pytest.raises(gr.TargetError, match="`lower`: .*meta device"):
        gr.attach(Tower().to("meta"), r=2, parametrization="svd_gain")


def test_what_is_no_plain_linear_is_refused() -> None:
    with pytest.raises(gr.TargetError, match=r"self_attn\.out_proj.*never calls"):
        gr.attach(nn.TransformerDecoderLayer(8, 2, 16), r=2, parametrization="svd_gain")


@pytest.mark.parametrize("second", ["lora", "svd_gain"])
def test_attaching_twice_raises(second: str) -> None:
    with pytest.raises(gr.TargetError, match="already.*detach"):
        gr.attach(attached(), r=2, parametrization=second)


@pytest.mark.parametrize("config", [LoraConfig, gr.QuarantineLoraConfig])
@pytest.mark.parametrize("parametrization", ["lora", "svd_gain"])
def test_a_model_with_lora_layers_of_peft_is_refused(parametrization: str, config: type[LoraConfig]) -> None:
    model = get_peft_model(Tower(), config(r=2, target_modules=["lower"]))
    flags = [p.requires_grad for p in model.parameters()]
    for adapted in (model, model.base_model.model):
        with pytest.raises(gr.TargetError, match="lower`.*QuarantineLoraConfig"):
            gr.attach(adapted, r=2, parametrization=parametrization, target_modules=["upper"])
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(isinstance(module, gr.QuarantineLoRA | gr.SvdGain) for module in model.modules())
