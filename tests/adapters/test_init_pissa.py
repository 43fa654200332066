"""`pissa_`, and the singular triplets that it takes, exact or randomised."""

from collections.abc import Callable

import pytest
import torch
from support.models import normal
from support.oriented_blocks import U, V, attached, differences, layers, same_up_to_sign
from torch import Tensor, nn

import gradroute as gr
from gradroute.adapters._singular import top_singular_triplets

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
    model = gr.adapters.init.pissa_(attached(r=r, r_quarantine=r_quarantine), niter=niter)
    for layer in layers(model):
        left, _, right = torch.linalg.svd(layer.weight, full_matrices=False)
        for block, ranks in ((layer.deployed, deployed), (layer.quarantine, quarantine)):
            columns = ranks[: len(block.A) // 2]
            assert same_up_to_sign(V(block), right[ranks], atol=1e-6)
            assert same_up_to_sign(U(block).T, left.T[columns], atol=1e-6)


def test_the_weight_is_the_sum_of_all_pissa_directions() -> None:
    model = gr.adapters.init.pissa_(attached(r=8))
    W = model.upper.weight
    triplets = [
        (u, v) for b in (model.upper.deployed, model.upper.quarantine) for u, v in zip(U(b).T, V(b), strict=True)
    ]
    torch.testing.assert_close(sum((u @ W @ v) * torch.outer(u, v) for u, v in triplets), W.detach(), rtol=0, atol=1e-9)


def test_the_randomised_svd_depends_on_the_seed_and_the_exact_one_does_not() -> None:
    def A(**settings: int | None) -> Tensor:
        torch.manual_seed(0)
        return gr.adapters.init.pissa_(gr.attach(nn.Sequential(nn.Linear(60, 80)), r=2), **settings)[0].deployed.A

    assert torch.equal(A(seed=0), A(seed=1))
    assert not torch.equal(A(niter=0, seed=0), A(niter=0, seed=1))
    assert torch.equal(A(niter=0, seed=1), A(niter=0, seed=1))


@pytest.mark.parametrize(
    "initialise",
    [gr.adapters.init.pissa_, lambda m, **k: gr.adapters.init.contrastive_covariance_(m, differences(), **k)],
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
    with pytest.raises(gr.errors.TargetError, match=r"3 singular.* of rank 2, shape \(9, 7\)"):
        top_singular_triplets(matrix, 3, niter=niter)
    with pytest.raises(gr.errors.TargetError, match="of rank 0"):
        top_singular_triplets(torch.zeros(3, 3), 1, niter=niter)
    with pytest.raises(gr.errors.TargetError, match=r"8 singular.* \(9, 7\), which has 7"):
        top_singular_triplets(matrix, 8, niter=niter)
