"""Oriented initialisations: zero net delta for every scheme, and each scheme's own directions."""

import math
from collections.abc import Callable

import pytest
import torch
from language_models import MODULES, PAIRS, ids_only, routed_mixer
from models import Tower, gradients, randomize_blocks
from tiny_models import peft_model, token_ids
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradroute as gr
from gradroute.adapters.singular import top_singular_triplets
from gradroute.protocol import Block, routed_layers

D_IN, D_HIDDEN, D_OUT = 12, 10, 8


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def attached(dtype: torch.dtype = torch.float64, r: int = 4, r_quarantine: int | None = None, **settings) -> Tower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tower(D_IN, D_HIDDEN, D_OUT).to(dtype)
    return gr.attach(model, r=r, r_quarantine=r_quarantine, lora_alpha=6.0, **settings)


def differences(seed: int = 0, pairs: int = 6) -> dict[str, Tensor]:
    """Paired input differences with a mean of their own."""
    return {
        name: normal(pairs, d, seed=seed + i) + 2 * normal(1, d, seed=seed + 10 + i)
        for i, (name, d) in enumerate({"lower": D_IN, "upper": D_HIDDEN}.items())
    }


SCHEMES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "gaussian": lambda model: gr.init.gaussian_(model, seed=3),
    "pissa": gr.init.pissa_,
    "pissa_randomised": lambda model: gr.init.pissa_(model, niter=2, seed=3),
    "contrastive_covariance": lambda model: gr.init.contrastive_covariance_(model, differences()),
    "contrastive_randomised": lambda model: gr.init.contrastive_covariance_(model, differences(), niter=2, seed=3),
    "signed_seed": lambda model: gr.init.signed_seed_(model, differences(), seed=3),
    "signed_seed_reversed": lambda model: gr.init.signed_seed_(model, differences(), seed=3, reverse=True),
}
every_scheme = pytest.mark.parametrize("initialise", SCHEMES.values(), ids=SCHEMES.keys())
every_oriented_scheme = pytest.mark.parametrize(
    "initialise", [f for name, f in SCHEMES.items() if name != "gaussian"], ids=list(SCHEMES)[1:]
)


def layers(model: nn.Module) -> list[gr.QuarantineLoRA]:
    return [model.lower, model.upper]


def blocks(model: nn.Module) -> list[Block]:
    return [block for layer in layers(model) for block in (layer.deployed, layer.quarantine)]


def values(model: nn.Module) -> dict[str, Tensor]:
    both = (*gr.deployed_parameters(model), *gr.quarantine_parameters(model))
    return {name: p.detach().clone() for name, p in both}


def V(block: Block) -> Tensor:
    """Input directions, as rows."""
    return block.A.detach()[: math.ceil(len(block.A) / 2)]


def U(block: Block) -> Tensor:
    """Output directions, as columns."""
    return block.B.detach()[:, math.ceil(len(block.A) / 2) :]


def same_up_to_sign(found: Tensor, expected: Tensor, atol: float = 1e-9) -> bool:
    """Row by row."""
    cosines = (found * expected).sum(1).sign()[:, None]
    return torch.allclose(found, cosines * expected, rtol=0, atol=atol)


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
    with pytest.raises(gr.RouteError, match=f"`lower`.*{message}"), opened(model):
        initialise(model)
    assert all(torch.equal(now, before[name]) for name, now in values(model).items())


@every_scheme
@pytest.mark.parametrize(("ranks", "block"), [((1, 4), "deployed"), ((4, 1), "quarantine")])
def test_rank_one_raises(initialise: Callable, ranks: tuple[int, int], block: str) -> None:
    with pytest.raises(gr.TargetError, match=f"`lower`: the {block} block.*rank 2 or more.*Found 1"):
        initialise(attached(r=ranks[0], r_quarantine=ranks[1]))


@every_scheme
def test_layers_of_gains_raise(initialise: Callable) -> None:
    with pytest.raises(gr.TargetError, match='`lower`: a SvdGain.*parametrization="lora"'):
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
    with pytest.raises(gr.TargetError, match="`upper`: its frozen weight"):
        initialise(model)
    assert all(torch.equal(now, before[name]) for name, now in values(model).items())


@every_scheme
def test_a_weight_on_the_meta_device_raises(initialise: Callable) -> None:
    with pytest.raises(gr.TargetError, match="meta"):
        initialise(attached().to("meta"))


@every_oriented_scheme
def test_more_directions_than_the_weight_has_raise(initialise: Callable) -> None:
    initialise(attached(r=8))
    with pytest.raises(gr.TargetError, match="`upper`: 9 .*Fix: lower r"):
        initialise(attached(r=9, r_quarantine=8))


# gaussian_


def test_gaussian_directions_have_length_one_in_the_mean_and_no_rank_limit() -> None:
    model = gr.init.gaussian_(attached(r=4000), seed=0)
    for block in blocks(model):
        assert V(block).square().sum(1).mean().item() == pytest.approx(1, abs=0.03)
        assert U(block).square().sum(0).mean().item() == pytest.approx(1, abs=0.03)
        assert abs(V(block).mean().item()) < 0.01


def test_gaussian_seeds_differ_and_do_not_depend_on_the_dtype() -> None:
    first, second = (values(gr.init.gaussian_(attached(), seed=seed)) for seed in (0, 1))
    assert all(not torch.equal(now, second[name]) for name, now in first.items())
    single = values(gr.init.gaussian_(attached(torch.float32), seed=0))
    assert all(torch.allclose(now.float(), single[name]) for name, now in first.items())


# pissa_


@pytest.mark.parametrize("niter", [None, 3])
@pytest.mark.parametrize(
    ("r", "r_quarantine", "deployed", "quarantine"),
    [
        (4, 4, [0, 2], [1, 3]),
        (6, 6, [0, 2, 4], [1, 3, 5]),
        (5, 3, [0, 2, 4], [1, 3]),
        (2, 6, [0], [1, 2, 3]),
        (8, 2, [0, 2, 3, 4], [1]),
    ],
)
def test_pissa_gives_even_ranks_to_deployed_and_odd_ones_to_the_quarantine(
    r: int, r_quarantine: int, deployed: list[int], quarantine: list[int], niter: int | None
) -> None:
    model = gr.init.pissa_(attached(r=r, r_quarantine=r_quarantine), niter=niter)
    for layer in layers(model):
        left, _, right = torch.linalg.svd(layer.weight, full_matrices=False)
        for block, ranks in ((layer.deployed, deployed), (layer.quarantine, quarantine)):
            columns = ranks[: len(block.A) // 2]
            assert same_up_to_sign(V(block), right[ranks], atol=1e-6)
            assert same_up_to_sign(U(block).T, left.T[columns], atol=1e-6)


def test_the_weight_is_the_sum_of_all_pissa_directions() -> None:
    model = gr.init.pissa_(attached(r=8))
    W = model.upper.weight
    triplets = [
        (u, v) for b in (model.upper.deployed, model.upper.quarantine) for u, v in zip(U(b).T, V(b), strict=True)
    ]
    torch.testing.assert_close(sum((u @ W @ v) * torch.outer(u, v) for u, v in triplets), W.detach(), rtol=0, atol=1e-9)


def test_the_randomised_svd_depends_on_the_seed_and_the_exact_one_does_not() -> None:
    def A(**settings: int | None) -> Tensor:
        torch.manual_seed(0)
        return gr.init.pissa_(gr.attach(nn.Sequential(nn.Linear(60, 80)), r=2), **settings)[0].deployed.A

    assert torch.equal(A(seed=0), A(seed=1))
    assert not torch.equal(A(niter=0, seed=0), A(niter=0, seed=1))
    assert torch.equal(A(niter=0, seed=1), A(niter=0, seed=1))


@pytest.mark.parametrize(
    "initialise", [gr.init.pissa_, lambda m, **k: gr.init.contrastive_covariance_(m, differences(), **k)]
)
def test_a_negative_niter_raises(initialise: Callable) -> None:
    with pytest.raises(gr.GradRouteError, match=r"`lower`: `niter`.*-1"):
        initialise(attached(), niter=-1)


# Singular triplets


def decaying(d_out: int = 80, d_in: int = 60) -> Tensor:
    left, right = torch.linalg.qr(normal(d_out, d_in)).Q, torch.linalg.qr(normal(d_in, d_in, seed=1)).Q
    return (left * 0.9 ** torch.arange(d_in)) @ right


@pytest.mark.parametrize("matrix", [decaying(), decaying().T], ids=["tall", "wide"])
def test_power_iterations_make_the_randomised_triplets_exact(matrix: Tensor) -> None:
    def error(niter: int | None) -> float:
        left, s, right = top_singular_triplets(matrix, 3, niter=niter, generator=torch.Generator().manual_seed(0))
        assert left.shape == (len(matrix), 3)
        assert right.shape == (3, matrix.shape[1])
        return (matrix @ right.T - left * s).norm().item() + (s - torch.linalg.svdvals(matrix)[:3]).norm().item()

    assert error(None) < 1e-12
    assert error(0) > 1e-6
    assert error(2) < error(0) / 50
    assert error(12) < 1e-9


def test_triplets_do_not_keep_the_whole_decomposition_alive() -> None:
    for tensor in top_singular_triplets(decaying(), 3):
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == 8 * tensor.numel()


@pytest.mark.parametrize("niter", [None, 2])
def test_a_matrix_of_lower_rank_offers_only_that_rank(niter: int | None) -> None:
    matrix = normal(9, 2) @ normal(2, 7, seed=1)
    assert top_singular_triplets(matrix, 2, niter=niter)[1].shape == (2,)
    with pytest.raises(gr.TargetError, match=r"3 singular.* of rank 2, shape \(9, 7\)"):
        top_singular_triplets(matrix, 3, niter=niter)
    with pytest.raises(gr.TargetError, match="of rank 0"):
        top_singular_triplets(torch.zeros(3, 3), 1, niter=niter)
    with pytest.raises(gr.TargetError, match=r"8 singular.* \(9, 7\), which has 7"):
        top_singular_triplets(matrix, 8, niter=niter)


# contrastive_covariance_


def dense_contrastive(W: Tensor, D: Tensor, a: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T C^(-1/2) of W C^(1/2), through the d_in x d_in matrix."""
    C = D.T @ D / len(D) + a * torch.eye(D.shape[1], dtype=D.dtype)
    eigenvalues, E = torch.linalg.eigh(C)
    left, s, right = torch.linalg.svd(W @ (E * eigenvalues.sqrt()) @ E.T, full_matrices=False)
    return left, s, right @ (E * eigenvalues.rsqrt()) @ E.T


@pytest.mark.parametrize("pairs", [1, 6, 40])
@pytest.mark.parametrize("niter", [None, 4])
@pytest.mark.parametrize("a", ["mean square of D", "given"])
def test_contrastive_covariance_is_the_dense_formula(pairs: int, niter: int | None, a: str) -> None:
    D = differences(pairs=pairs)
    given = {"lower": 0.3, "upper": 40.0}
    settings = {} if a == "mean square of D" else {"ridge": 0.2, "input_variance": given}
    model = gr.init.contrastive_covariance_(attached(), D, niter=niter, **settings)
    for name, layer in zip(D, layers(model), strict=True):
        ridge = 1e-3 * D[name].square().mean() if a == "mean square of D" else 0.2 * given[name]
        left, s, right = dense_contrastive(layer.weight, D[name], ridge)
        torch.testing.assert_close((left * s) @ right, layer.weight.detach(), rtol=0, atol=1e-9)
        unit_right = right / right.norm(dim=1, keepdim=True)
        for block, ranks in ((layer.deployed, [0, 2]), (layer.quarantine, [1, 3])):
            assert same_up_to_sign(V(block), unit_right[ranks], atol=1e-6)
            assert same_up_to_sign(U(block).T, left.T[ranks], atol=1e-6)


def square(d: int = 12) -> nn.Module:
    """Two linears with orthogonal weights, which have no directions of their own."""
    model = nn.Sequential(nn.Linear(d, d), nn.Linear(d, d)).double()
    with torch.no_grad():
        for i, linear in enumerate(model):
            linear.weight.copy_(torch.linalg.qr(normal(d, d, seed=i)).Q)
    return gr.attach(model, r=4)


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a, b, dim=0).abs().item()


def test_planted_contrastive_directions_come_first_the_stronger_in_the_deployed_block() -> None:
    model = square()
    strong, weak = torch.linalg.qr(normal(12, 2, seed=8)).Q.T
    D = 3 * normal(50, 1, seed=3) * strong + normal(50, 1, seed=4) * weak + 0.02 * normal(50, 12, seed=5)
    gr.init.contrastive_covariance_(model, {"0": D, "1": D})
    for layer in model:
        for block, direction in ((layer.deployed, strong), (layer.quarantine, weak)):
            assert cosine(V(block)[0], direction) > 0.99
            assert cosine(U(block)[:, 0], layer.weight.detach() @ direction) > 0.99
            assert all(cosine(other, direction) < 0.1 for other in V(block)[1:])
    gr.init.pissa_(model)
    assert all(cosine(v, strong) < 0.9 for block in (model[0].deployed, model[0].quarantine) for v in V(block))


def test_a_planted_mean_difference_is_the_first_slot_of_the_quarantine() -> None:
    model, planted = square(), normal(12, seed=8)
    D = planted + 0.2 * normal(50, 12, seed=5)
    gr.init.signed_seed_(model, {"0": D, "1": D}, seed=0)
    for layer in model:
        assert cosine(V(layer.quarantine)[0], planted) > 0.99
        assert cosine(U(layer.quarantine)[:, 0], layer.weight.detach() @ planted) > 0.99
        assert all(cosine(v, planted) < 0.1 for v in (*V(layer.quarantine)[1:], *V(layer.deployed)))


def test_the_scale_of_differences_matters_only_against_given_variances() -> None:
    D = differences()
    scaled = {name: -100 * d for name, d in D.items()}
    variances = {"lower": 1.0, "upper": 1.0}
    for settings, same in (({}, True), ({"input_variance": variances}, False)):
        first, second = (
            values(gr.init.contrastive_covariance_(attached(), d, ridge=0.1, **settings)) for d in (D, scaled)
        )
        assert all(torch.allclose(now.abs(), second[name].abs(), atol=1e-3) for name, now in first.items()) is same


def test_a_large_ridge_gives_the_directions_of_pissa() -> None:
    pissa, ridged = gr.init.pissa_(attached()), gr.init.contrastive_covariance_(attached(), differences(), ridge=1e9)
    for expected, found in zip(blocks(pissa), blocks(ridged), strict=True):
        assert same_up_to_sign(V(found), V(expected), atol=1e-6)


def test_no_d_in_by_d_in_matrix_is_formed() -> None:
    d_in = 64

    class Shapes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[tuple[int, ...]] = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = result if isinstance(result, tuple | list) else [result]
            self.seen |= {tuple(t.shape) for t in tensors if isinstance(t, Tensor)}
            return result

    model = gr.attach(nn.Sequential(nn.Linear(d_in, 8)), r=4)
    with Shapes() as shapes:
        gr.init.contrastive_covariance_(model, {"0": normal(5, d_in, dtype=torch.float32)})
    assert (8, d_in) in shapes.seen
    assert (d_in, d_in) not in shapes.seen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ridge": 0.0}, "`ridge`.*0.0"),
        ({"ridge": float("inf")}, "`ridge`.*inf"),
        ({"input_variance": {"lower": 1.0, "upper": -1.0}}, r"`input_variance\['upper'\]`.*-1"),
        ({"input_variance": {"lower": float("nan"), "upper": 1.0}}, r"`input_variance\['lower'\]`.*nan"),
        ({"input_variance": {"lower": 1.0}}, r"`input_variance` should name.*Missing: \['upper'\]"),
        ({"input_variance": {"lower": 1.0, "upper": 1.0, "head": 1.0}}, r"unknown: \['head'\]"),
    ],
)
def test_a_ridge_that_is_not_positive_raises(settings: dict, message: str) -> None:
    with pytest.raises(gr.GradRouteError, match=message):
        gr.init.contrastive_covariance_(attached(), differences(), **settings)


# signed_seed_


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("r", "r_quarantine"), [(4, 4), (2, 5), (5, 2), (2, 2)])
def test_the_seed_is_the_first_slot_of_its_block_and_all_else_is_orthogonal(
    r: int, r_quarantine: int, reverse: bool
) -> None:
    D = differences()
    model = gr.init.signed_seed_(attached(r=r, r_quarantine=r_quarantine), D, seed=0, reverse=reverse)
    for name, layer in zip(D, layers(model), strict=True):
        u_in = D[name].mean(0) / D[name].mean(0).norm()
        u_out = layer.weight.detach() @ u_in
        u_out = u_out / u_out.norm()
        seeded, other = (layer.deployed, layer.quarantine) if reverse else (layer.quarantine, layer.deployed)
        torch.testing.assert_close(V(seeded)[0], u_in)
        torch.testing.assert_close(U(seeded)[:, 0], u_out)
        for frame in (torch.cat([V(seeded), V(other)]), torch.cat([U(seeded), U(other)], 1).T):
            torch.testing.assert_close(frame @ frame.T, torch.eye(len(frame)).double(), rtol=0, atol=1e-9)


def test_the_seed_of_the_frames_moves_all_but_the_signed_seed() -> None:
    first, second = (gr.init.signed_seed_(attached(), differences(), seed=seed) for seed in (0, 1))
    for a, b in zip(layers(first), layers(second), strict=True):
        assert torch.equal(V(a.quarantine)[0], V(b.quarantine)[0])
        assert torch.equal(U(a.quarantine)[:, 0], U(b.quarantine)[:, 0])
        assert abs(V(a.quarantine)[1] @ V(b.quarantine)[1]) < 0.99
        assert abs(V(a.deployed)[0] @ V(b.deployed)[0]) < 0.99


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1)])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_first_update_is_even_in_the_signed_seed(optimizer: Callable, reverse: bool) -> None:
    def first_update(D: dict[str, Tensor]) -> Tensor:
        model = gr.init.signed_seed_(attached(), D, seed=0, reverse=reverse)
        trained = [p for p in model.parameters() if p.requires_grad]
        step = optimizer(trained, lr=0.1)
        model(normal(7, D_IN, seed=5)).square().sum().backward()
        step.step()
        return torch.cat([(b.scaling * b.B @ b.A).detach().flatten() for b in blocks(model)])

    D = differences()
    update = first_update(D)
    assert update.abs().max() > 0.01
    torch.testing.assert_close(first_update({name: -d for name, d in D.items()}), update, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(first_update(differences(seed=5)), update, atol=0.01)


def test_only_the_quarantine_moves_along_a_signed_seed() -> None:
    D = differences()
    for reverse in (False, True):
        model = gr.init.signed_seed_(attached(), D, seed=0, reverse=reverse)
        u_in = D["lower"].mean(0) / D["lower"].mean(0).norm()
        model(u_in[None]).square().sum().backward()
        moved = {
            name: gradient.abs().max() > 1e-9 for name, gradient in gradients(model).items() if "lower.lora_B" in name
        }
        assert moved == {"lower.lora_B": reverse, "lower.lora_B_quarantine": not reverse}


def test_differences_of_directions_are_what_the_schemes_take() -> None:
    model = routed_mixer()
    with gr.ablate_quarantine(model):
        directions = gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only, features="input")
    D = directions.differences()
    assert list(D) == MODULES
    assert all(torch.equal(D[name], directions.hack[name] - directions.clean[name]) for name in MODULES)
    gr.init.contrastive_covariance_(model, D)
    gr.init.signed_seed_(model, D, seed=0)
    for name in MODULES:
        torch.testing.assert_close(model.get_submodule(name).quarantine.A[0].detach(), directions.rows[name][0])


# What differences must be


need_differences = pytest.mark.parametrize(
    "initialise",
    [gr.init.contrastive_covariance_, lambda m, d: gr.init.signed_seed_(m, d, seed=0)],
    ids=["contrastive_covariance", "signed_seed"],
)


@need_differences
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda D: D.pop("upper"), gr.GradRouteError, r"`differences`.*Missing: \['upper'\]"),
        (lambda D: D.update(head=D["upper"]), gr.GradRouteError, r"unknown: \['head'\].*Fix"),
        (lambda D: D.update(upper=D["lower"]), gr.GradRouteError, r"`upper`: .*10 wide.*\(6, 12\).*features=\"input\""),
        (lambda D: D.update(upper=D["upper"][:0]), gr.GradRouteError, "`upper`: .*Found 0 pairs"),
        (lambda D: D["upper"][1, 2:4].fill_(float("nan")), gr.GradRouteError, "`upper`: .*6 pairs, 2 bad"),
        (lambda D: D["upper"][1, 2].fill_(float("inf")), gr.GradRouteError, "`upper`: .*1 bad"),
        (lambda D: D["upper"].zero_(), gr.DeadDirectionError, "`upper`: .*Fix"),
    ],
)
def test_unfit_differences_raise_by_name_and_nothing_is_written(
    initialise: Callable, change: Callable, error: type[Exception], message: str
) -> None:
    model, D = attached(), differences()
    change(D)
    before = values(model)
    with pytest.raises(error, match=message) as caught:
        initialise(model, D)
    assert type(caught.value) is error
    assert all(torch.equal(now, before[name]) for name, now in values(model).items())


@need_differences
def test_differences_of_another_number_of_axes_raise(initialise: Callable) -> None:
    for name in ("lower", "upper"):
        with pytest.raises((gr.GradRouteError, TypeError)):
            initialise(attached(), {**differences(), name: differences()[name][0]})


def test_pairs_that_cancel_have_no_signed_seed() -> None:
    D = differences()
    D["upper"] = torch.cat([D["upper"], -D["upper"]]) + 1e-9
    gr.init.contrastive_covariance_(attached(), D)
    with pytest.raises(gr.DeadDirectionError, match="`upper`: the paired input differences have mean zero"):
        gr.init.signed_seed_(attached(), D, seed=0)


def test_a_difference_that_the_weight_does_not_pass_has_no_signed_seed() -> None:
    model, D = attached(), differences()
    with torch.no_grad():
        u = D["upper"].mean(0) / D["upper"].mean(0).norm()
        model.upper.weight.sub_(torch.outer(model.upper.weight @ u, u))
    with pytest.raises(gr.DeadDirectionError, match="`upper`: W maps the mean"):
        gr.init.signed_seed_(model, D, seed=0)


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
        "gaussian": lambda: gr.init.gaussian_(model, seed=0),
        "pissa": lambda: gr.init.pissa_(model),
        "contrastive_covariance": lambda: gr.init.contrastive_covariance_(model, D),
        "signed_seed": lambda: gr.init.signed_seed_(model, D, seed=0),
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
    with pytest.raises(gr.RouteError, match="unmerge"):
        gr.init.pissa_(model)
    model.unmerge_adapter()
    gr.init.pissa_(model)
