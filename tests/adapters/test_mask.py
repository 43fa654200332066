"""`RouteMask`: constructors, indexing, refusals."""

import pytest
import torch
from support.models import routed_tower

import gradroute as gr

ZONES = {"keep": (0.0, 1.0, 0.0), "absorb": (1.0, 1.0, 1.0), "route": (1.0, 0.0, 1.0)}


def triples(mask: gr.RouteMask) -> list[tuple[float, ...]]:
    return [tuple(row) for row in torch.stack([mask.m, mask.g_d, mask.g_q], -1).reshape(-1, 3).tolist()]


def test_zones_by_name_and_by_number() -> None:
    expected = [ZONES["keep"], ZONES["absorb"], ZONES["route"]]
    assert triples(gr.RouteMask.zones(["keep", "absorb", "route"])) == expected
    assert triples(gr.RouteMask.zones(torch.tensor([0, 1, 2]))) == expected


def test_zones_per_token() -> None:
    mask = gr.RouteMask.zones([["keep", "route"], ["absorb", "absorb"]])
    assert mask.shape == (2, 2)
    assert triples(mask) == [ZONES["keep"], ZONES["route"], ZONES["absorb"], ZONES["absorb"]]


def test_classic_absorbs_and_exclusive_keeps_what_is_not_flagged() -> None:
    assert triples(gr.RouteMask.classic([True, False])) == [ZONES["route"], ZONES["absorb"]]
    assert triples(gr.RouteMask.exclusive(torch.tensor([True, False]))) == [ZONES["route"], ZONES["keep"]]


def test_weights_broadcast_and_may_be_negative() -> None:
    mask = gr.RouteMask.weights(m=1.0, g_d=[-0.5, 2.0], g_q=torch.tensor([3.0, -1.0]))
    assert triples(mask) == [(1.0, -0.5, 3.0), (1.0, 2.0, -1.0)]


def test_weights_keep_float64() -> None:
    third = torch.tensor([1 / 3], dtype=torch.float64)
    assert gr.RouteMask.weights(1.0, third, third).g_d.item() == 1 / 3


def test_a_mask_does_not_change_with_the_tensors_it_was_made_of() -> None:
    values = torch.ones(2)
    mask = gr.RouteMask(values, values, values)
    values.zero_()
    assert triples(mask) == [ZONES["absorb"]] * 2


def test_one_value_per_row_serves_all_tokens_of_the_row() -> None:
    m = torch.tensor([0.0, 1.0, 1.0])
    mask = gr.RouteMask.weights(m, torch.ones(3, 3), torch.arange(9.0).view(3, 3))
    assert torch.equal(mask.m, m[:, None].expand(3, 3))
    with pytest.raises(gr.errors.RouteError, match=r"same rows.*\(1, 4\)"):
        gr.RouteMask.weights(m, torch.ones(1, 4), 1.0)


def test_routed_marks_the_route_zone() -> None:
    assert gr.RouteMask.zones(["keep", "absorb", "route"]).routed.tolist() == [False, False, True]


def test_rows_can_be_selected_for_micro_batches() -> None:
    mask = gr.RouteMask.zones(["keep", "absorb", "route"])
    assert len(mask) == 3
    assert triples(mask[1:]) == triples(mask[torch.tensor([1, 2])]) == triples(mask[torch.tensor([False, True, True])])
    assert triples(mask[[2, 0]]) == [ZONES["route"], ZONES["keep"]]


def test_repr_counts_zones() -> None:
    assert repr(gr.RouteMask.zones(["keep", "route", "route"])) == ("RouteMask((3,), rows: 1 keep, 0 absorb, 2 route)")
    assert "1 weighted" in repr(gr.RouteMask.weights(1.0, [0.5, 1.0], 1.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gr.RouteMask.zones(["keep", "rout"]), "'rout'"),
        (lambda: gr.RouteMask.zones(torch.tensor([0, 3])), "0 to 3"),
        (lambda: gr.RouteMask.zones(torch.tensor([True])), "classic"),
        (lambda: gr.RouteMask.zones(torch.tensor([1.0])), "float32"),
        (lambda: gr.RouteMask.zones([]), "at least one row"),
        (lambda: gr.RouteMask.classic(torch.tensor([0.0, 1.0])), "booleans"),
        (lambda: gr.RouteMask.classic(torch.tensor([0, 1])), "booleans"),
        (lambda: gr.RouteMask.weights(1.0, 1.0, 0.0), "three scalars"),
        (lambda: gr.RouteMask.weights(1.0, torch.ones(2), torch.ones(3)), r"\(2,\).*\(3,\)"),
        (lambda: gr.RouteMask.weights(1.0, torch.tensor([1.0, float("nan")]), 1.0), r"`g_d`.*nan.*\[1\]"),
        (lambda: gr.RouteMask.weights(torch.tensor([float("inf")]), 1.0, 1.0), "`m`.*inf"),
        (lambda: gr.RouteMask.weights(1.0, torch.ones(2, requires_grad=True), 1.0), "`g_d`.*detach"),
        (lambda: gr.RouteMask.weights(1.0, torch.tensor([1, 2]), 1.0), "`g_d` should hold floats"),
        (lambda: gr.RouteMask.weights(1.0, torch.ones(2, 2, 2), 1.0), r"\(2, 2, 2\)"),
        (lambda: gr.RouteMask.zones(["keep"])[0], r"mask\[0:1\]"),
        (lambda: gr.RouteMask.zones(["keep"])[1:], "at least one row"),
        (lambda: gr.RouteMask.zones([["keep"]])[torch.tensor([[True]])], r"\(1, 1\)"),
    ],
)
def test_what_is_no_mask_is_refused(make: object, message: str) -> None:
    with pytest.raises(gr.errors.RouteError, match=message):
        make()


@pytest.mark.corner("mask weights are Python floats, under a half-precision default", "they are not rounded")
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float32, torch.float64])
def test_python_floats_are_not_rounded_to_the_default_type(default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        mask = gr.RouteMask.weights(m=[0.3, 0.7], g_d=1 / 3, g_q=[0.1, 2.0])
    finally:
        torch.set_default_dtype(before)
    assert mask.m.tolist() == [0.3, 0.7]
    assert mask.g_d.tolist() == [1 / 3, 1 / 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_a_wider_type_than_the_layer_do_not_make_it_compute_in_theirs(dtype: torch.dtype) -> None:
    rewards, x = torch.tensor([0.5, -0.25, 2.0], dtype=torch.float64), torch.zeros(3, 5, dtype=dtype)
    model = routed_tower(dtype)
    with gr.route(model, gr.RouteMask.weights(m=rewards, g_d=rewards, g_q=1.0)):
        gates = model.lower.state.gates(x, "lower")
        model(x)
    assert {gates.m.dtype, gates.g_d.dtype, gates.g_q.dtype} == {torch.float32}
    assert {columns.weights.dtype for columns in gates.columns(2, 3, dtype)} == {torch.float32}
