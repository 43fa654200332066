"""Initialisations from paired differences: `contrastive_covariance_` and `signed_seed_`."""

from collections.abc import Callable

import pytest
import torch
from support.language_models import MODULES, PAIRS, ids_only, routed_mixer
from support.models import gradients, normal
from support.oriented_blocks import D_IN, U, V, attached, blocks, cosine, differences, layers, same_up_to_sign, values
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradroute as gr

# contrastive_covariance_


def dense_contrastive(W: Tensor, D: Tensor, a: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V^T C^(-1/2) of W C^(1/2), through the d_in x d_in matrix."""
    C = D.T @ D / len(D) + a * torch.eye(D.shape[1], dtype=D.dtype)
    eigenvalues, E = torch.linalg.eigh(C)
    left, s, right = torch.linalg.svd(W @ (E * eigenvalues.sqrt()) @ E.T, full_matrices=False)
    return left, s, right @ (E * eigenvalues.rsqrt()) @ E.T


@pytest.mark.parametrize("pairs", [1, 6, 40])
@pytest.mark.parametrize("niter", [None, 4])
@pytest.mark.parametrize("ridge", [1e-3, 0.2])
def test_contrastive_covariance_is_the_dense_formula(pairs: int, niter: int | None, ridge: float) -> None:
    D = differences(pairs=pairs)
    model = gr.adapters.init.contrastive_covariance_(attached(), D, niter=niter, ridge=ridge)
    for name, layer in zip(D, layers(model), strict=True):
        left, s, right = dense_contrastive(layer.weight, D[name], ridge * D[name].square().mean())
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


def test_planted_contrastive_directions_come_first_the_stronger_in_the_deployed_block() -> None:
    model = square()
    strong, weak = torch.linalg.qr(normal(12, 2, seed=8)).Q.T
    D = 3 * normal(50, 1, seed=3) * strong + normal(50, 1, seed=4) * weak + 0.02 * normal(50, 12, seed=5)
    gr.adapters.init.contrastive_covariance_(model, {"0": D, "1": D})
    for layer in model:
        for block, direction in ((layer.deployed, strong), (layer.quarantine, weak)):
            assert cosine(V(block)[0], direction) > 0.99
            assert cosine(U(block)[:, 0], layer.weight.detach() @ direction) > 0.99
            assert all(cosine(other, direction) < 0.1 for other in V(block)[1:])
    gr.adapters.init.pissa_(model)
    assert all(cosine(v, strong) < 0.9 for block in (model[0].deployed, model[0].quarantine) for v in V(block))


def test_a_planted_mean_difference_is_the_first_slot_of_the_quarantine() -> None:
    model, planted = square(), normal(12, seed=8)
    D = planted + 0.2 * normal(50, 12, seed=5)
    gr.adapters.init.signed_seed_(model, {"0": D, "1": D}, seed=0)
    for layer in model:
        assert cosine(V(layer.quarantine)[0], planted) > 0.99
        assert cosine(U(layer.quarantine)[:, 0], layer.weight.detach() @ planted) > 0.99
        assert all(cosine(v, planted) < 0.1 for v in (*V(layer.quarantine)[1:], *V(layer.deployed)))


def test_the_scale_and_sign_of_the_differences_do_not_matter() -> None:
    D = differences()
    scaled = {name: -100 * d for name, d in D.items()}
    first, second = (values(gr.adapters.init.contrastive_covariance_(attached(), d, ridge=0.1)) for d in (D, scaled))
    assert all(torch.allclose(now.abs(), second[name].abs(), atol=1e-3) for name, now in first.items())


def test_a_large_ridge_gives_the_directions_of_pissa() -> None:
    pissa, ridged = (
        gr.adapters.init.pissa_(attached()),
        gr.adapters.init.contrastive_covariance_(attached(), differences(), ridge=1e9),
    )
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
        gr.adapters.init.contrastive_covariance_(model, {"0": normal(5, d_in, dtype=torch.float32)})
    assert (8, d_in) in shapes.seen
    assert (d_in, d_in) not in shapes.seen


@pytest.mark.parametrize("ridge", [0.0, float("inf")])
def test_a_ridge_that_is_not_positive_raises(ridge: float) -> None:
    with pytest.raises(gr.GradRouteError, match=f"`ridge`.*{ridge}"):
        gr.adapters.init.contrastive_covariance_(attached(), differences(), ridge=ridge)


# signed_seed_


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("r", "r_quarantine"), [(4, 4), (2, 5), (5, 2), (2, 2)])
def test_the_seed_is_the_first_slot_of_its_block_and_all_else_is_orthogonal(
    r: int, r_quarantine: int, reverse: bool
) -> None:
    D = differences()
    model = gr.adapters.init.signed_seed_(attached(r=r, r_quarantine=r_quarantine), D, seed=0, reverse=reverse)
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
    first, second = (gr.adapters.init.signed_seed_(attached(), differences(), seed=seed) for seed in (0, 1))
    for a, b in zip(layers(first), layers(second), strict=True):
        assert torch.equal(V(a.quarantine)[0], V(b.quarantine)[0])
        assert torch.equal(U(a.quarantine)[:, 0], U(b.quarantine)[:, 0])
        assert abs(V(a.quarantine)[1] @ V(b.quarantine)[1]) < 0.99
        assert abs(V(a.deployed)[0] @ V(b.deployed)[0]) < 0.99


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1)])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_first_update_is_even_in_the_signed_seed(optimizer: Callable, reverse: bool) -> None:
    def first_update(D: dict[str, Tensor]) -> Tensor:
        model = gr.adapters.init.signed_seed_(attached(), D, seed=0, reverse=reverse)
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
        model = gr.adapters.init.signed_seed_(attached(), D, seed=0, reverse=reverse)
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
    gr.adapters.init.contrastive_covariance_(model, D)
    gr.adapters.init.signed_seed_(model, D, seed=0)
    for name in MODULES:
        torch.testing.assert_close(model.get_submodule(name).quarantine.A[0].detach(), directions.rows[name][0])


# What differences must be


need_differences = pytest.mark.parametrize(
    "initialise",
    [gr.adapters.init.contrastive_covariance_, lambda m, d: gr.adapters.init.signed_seed_(m, d, seed=0)],
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
        (lambda D: D["upper"].zero_(), gr.errors.DeadDirectionError, "`upper`: .*Fix"),
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
    gr.adapters.init.contrastive_covariance_(attached(), D)
    with pytest.raises(gr.errors.DeadDirectionError, match="`upper`: the paired input differences have mean zero"):
        gr.adapters.init.signed_seed_(attached(), D, seed=0)


def test_a_difference_that_the_weight_does_not_pass_has_no_signed_seed() -> None:
    model, D = attached(), differences()
    with torch.no_grad():
        u = D["upper"].mean(0) / D["upper"].mean(0).norm()
        model.upper.weight.sub_(torch.outer(model.upper.weight @ u, u))
    with pytest.raises(gr.errors.DeadDirectionError, match="`upper`: W maps the mean"):
        gr.adapters.init.signed_seed_(model, D, seed=0)
