"""Estimators equal slow references from their formulas."""

import math

import pytest
import torch
from support.pair_sides import Sides, random_sides
from torch import Tensor

from gradroute.directions.estimators.mean_difference import MeanDifference
from gradroute.directions.estimators.ridge import Ridge
from gradroute.directions.estimators.svd import Svd
from gradroute.directions.estimators.t_statistic import TStatistic


def columns(sides: Sides, name: str) -> tuple[list[list[float]], list[list[float]]]:
    hack, clean = sides
    return hack[name].T.tolist(), clean[name].T.tolist()


def unit(values: list[float]) -> list[float]:
    norm = math.sqrt(sum(v * v for v in values))
    return [v / norm for v in values]


@pytest.mark.parametrize("standardise", [False, True])
def test_the_mean_difference_equals_its_formula(standardise: bool) -> None:
    sides = random_sides()
    made = MeanDifference(standardise=standardise)(*sides)
    for name in sides[0]:
        expected, centres, scales = [], [], []
        for h, c in zip(*columns(sides, name), strict=True):
            both = h + c
            mean = sum(both) / len(both)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in both) / len(both))
            difference = sum(a - b for a, b in zip(h, c, strict=True)) / len(h)
            expected.append(difference / deviation if standardise else difference)
            centres.append(mean)
            scales.append(deviation)
        torch.testing.assert_close(made.rows[name][0].tolist(), unit(expected), rtol=1e-12, atol=1e-12)
        if standardise:
            torch.testing.assert_close(made.centre[name].tolist(), centres, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(made.scale[name].tolist(), scales, rtol=1e-12, atol=1e-12)
    assert (made.scale is not None) == standardise


def test_the_t_statistic_equals_its_formula_and_is_clamped() -> None:
    hack, clean = random_sides(pairs=8)
    hack["m0"][:, 0] += 40
    made = TStatistic()(hack, clean)
    for name in hack:
        t = []
        for h, c in zip(*columns((hack, clean), name), strict=True):
            d = [a - b for a, b in zip(h, c, strict=True)]
            mean = sum(d) / len(d)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in d) / (len(d) - 1))
            t.append(mean / (deviation / math.sqrt(len(d))))
        assert name != "m0" or t[0] > 10
        expected = unit([max(-3.0, min(3.0, x)) for x in t])
        torch.testing.assert_close(made.rows[name][0].tolist(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2])
def test_svd_rows_are_the_top_eigenvectors_of_the_scatter_with_the_sign_of_most_pairs(k: int) -> None:
    sides = random_sides()
    made = Svd(k=k)(*sides)
    for name in sides[0]:
        D = sides[0][name] - sides[1][name]
        _, vectors = torch.linalg.eigh(D.T @ D)
        for i in range(k):
            v = vectors[:, -1 - i]
            votes = [1 if float(d @ v) > 0 else -1 for d in D]
            expected = v if sum(votes) > 0 or (sum(votes) == 0 and float((D @ v).sum()) > 0) else -v
            torch.testing.assert_close(made.rows[name][i], expected, rtol=1e-9, atol=1e-9)


def test_the_majority_decides_and_not_the_size() -> None:
    hack = {"m": torch.tensor([[1.0, 0.0], [1.0, 0.1], [-5.0, 0.1]], dtype=torch.float64)}
    clean = {"m": torch.zeros(3, 2, dtype=torch.float64)}
    assert (hack["m"] - clean["m"]).mean(0)[0] < 0
    assert Svd()(hack, clean).rows["m"][0, 0] > 0.9


def primal_ridge(sides: Sides, penalty: float, standardise: bool) -> Tensor:
    """w from the normal equations over all modules' coordinates and an unpenalised intercept."""
    z = []
    for name in sides[0]:
        f = torch.cat([sides[0][name], sides[1][name]])
        f = f - f.mean(0)
        z.append(f / f.square().mean(0).sqrt() if standardise else f)
    Z = torch.cat([*z, torch.ones(len(z[0]), 1, dtype=torch.float64)], dim=1)
    y = torch.cat([torch.ones(len(Z) // 2), -torch.ones(len(Z) // 2)]).double()
    penalties = torch.full((Z.shape[1],), penalty, dtype=torch.float64)
    penalties[-1] = 0
    return torch.linalg.solve(Z.T @ Z + torch.diag(penalties), Z.T @ y)


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("penalty", [0.1, 30.0])
def test_dual_ridge_equals_the_normal_equations_with_modules_jointly(penalty: float, standardise: bool) -> None:
    sides = random_sides()
    w = primal_ridge(sides, penalty, standardise)[:-1].split([4, 3])
    made = Ridge(penalty=penalty, standardise=standardise)(*sides)
    for expected, name in zip(w, made.rows, strict=True):
        torch.testing.assert_close(made.rows[name][0], expected / expected.norm(), rtol=1e-9, atol=1e-9)
    # The score is <w, z> over the norm of all w: the weights of modules against each other are kept.
    total = torch.cat(w).norm()
    scores = torch.zeros(6, dtype=torch.float64)
    for expected, name in zip(w, made.rows, strict=True):
        f = torch.cat([sides[0][name], sides[1][name]])
        s = f.std(0, correction=0) if standardise else 1.0
        scores += ((sides[0][name] - f.mean(0)) / s) @ expected / total
    torch.testing.assert_close(made.score(sides[0]), scores, rtol=1e-9, atol=1e-9)
    alone = Ridge(penalty=penalty, standardise=standardise)(*({"m0": s["m0"]} for s in sides))
    assert not torch.allclose(alone.rows["m0"], made.rows["m0"], rtol=1e-3)


def test_leave_one_pair_out_residuals_equal_refitting_without_the_pair() -> None:
    from gradroute.directions.estimators.ridge import leave_one_pair_out

    pairs, penalty = 5, 0.7
    Z = torch.randn(2 * pairs, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.cat([torch.ones(pairs), -torch.ones(pairs)]).double()
    found = leave_one_pair_out(Z @ Z.T, y, penalty)
    for i in range(pairs):
        kept = [j for j in range(2 * pairs) if j % pairs != i]
        X = torch.cat([Z[kept], torch.ones(len(kept), 1)], dim=1)
        P = penalty * torch.eye(9, dtype=torch.float64)
        P[8, 8] = 0
        w = torch.linalg.solve(X.T @ X + P, X.T @ y[kept])
        for j in (i, i + pairs):
            assert found[j] == pytest.approx(float(y[j] - Z[j] @ w[:8] - w[8]), rel=1e-9)


def test_the_penalty_with_the_least_left_out_residuals_is_taken() -> None:
    from gradroute.directions.estimators.ridge import best_penalty, leave_one_pair_out

    y = torch.cat([torch.ones(30), -torch.ones(30)]).double()
    chosen = []
    for seed, signal in ((0, 0.05), (0, 3.0), *((seed, 0.4) for seed in range(8))):
        Z = torch.randn(60, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        Z[:, 0] += signal * y
        K = Z @ Z.T
        grid = [float(K.diagonal().mean()) * 10 ** (i / 2) for i in range(-8, 9)]
        errors = [float(leave_one_pair_out(K, y, p).square().sum()) for p in grid]
        assert best_penalty(K, y) == pytest.approx(grid[errors.index(min(errors))])
        chosen.append(best_penalty(K, y))
    assert chosen[0] > 10 * chosen[1]
