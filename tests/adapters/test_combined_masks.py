"""Masks combined by | and &: zones in the order keep < absorb < route."""

import itertools

import pytest
import torch

import gradroute as gr
from gradroute.errors import RouteError

ZONES = ("keep", "absorb", "route")
PAIRS = list(itertools.product(ZONES, ZONES))


def mask(zones: object) -> gr.RouteMask:
    return gr.RouteMask.zones(zones)


def same(a: gr.RouteMask, b: gr.RouteMask) -> bool:
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("m", "g_d", "g_q"))


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_or_takes_the_higher_zone_and_and_the_lower(a: str, b: str) -> None:
    higher, lower = (choose((a, b), key=ZONES.index) for choose in (max, min))
    assert same(mask([a]) | mask([b]), mask([higher]))
    assert same(mask([a]) & mask([b]), mask([lower]))


def test_routed_by_either_and_by_both() -> None:
    a, b = mask([x for x, _ in PAIRS]), mask([y for _, y in PAIRS])
    assert torch.equal((a | b).routed, a.routed | b.routed)
    assert torch.equal((a & b).routed, a.routed & b.routed)
    assert not torch.equal(a.routed, b.routed)


def test_a_mask_of_rows_holds_for_all_tokens_of_the_row() -> None:
    rows = mask(["route", "absorb"])
    tokens = mask([["absorb", "absorb", "keep"], ["absorb", "route", "keep"]])
    assert same(rows | tokens, mask([["route"] * 3, ["absorb", "route", "absorb"]]))
    assert same(tokens & rows, rows & tokens)


@pytest.mark.parametrize("other", [mask(["keep"] * 3), mask([["keep"] * 4]), mask([["keep"] * 4] * 3)])
def test_masks_of_other_rows_are_refused(other: gr.RouteMask) -> None:
    with pytest.raises(RouteError, match="of the same rows"):
        mask(["route", "absorb"]) | other
    with pytest.raises(RouteError, match="of the same rows"):
        other & mask([["route"] * 5] * 2)


def test_a_packed_batch_is_not_a_batch_of_one_row() -> None:
    with pytest.raises(RouteError, match="of the same rows"):
        mask(["route"] * 4) | mask([["keep"] * 4])


def test_weighted_masks_are_refused() -> None:
    weighted = gr.RouteMask.weights(m=[1.0, 1.0], g_d=[0.5, 1.0], g_q=1.0)
    for combine in (lambda: weighted | mask(["keep", "keep"]), lambda: mask(["keep", "keep"]) & weighted):
        with pytest.raises(RouteError, match="weights in 1 of"):
            combine()


def test_only_masks_are_combined() -> None:
    with pytest.raises(TypeError):
        mask(["keep"]) | True
