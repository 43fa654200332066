"""Captured activations: pooled as asked, against slow references in float64."""

import copy
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from support.captured_batches import FEATURES, IDS, POOL, batch_loss, exact
from support.language_models import MADE_OF_NUMBERS, MODULES, D, Mixer, R, routed_mixer
from support.models import routed_tower
from torch import Tensor, nn

import gradroute as gr

pytestmark = pytest.mark.touches_peft

REFUSED = (gr.GradRouteError, TypeError)


def unpooled(model: Mixer, ids: Tensor) -> dict[str, dict[str, Tensor]]:
    """Every token's features of every module, module -> feature -> (batch, seq, d)."""
    seen: dict[str, dict[str, Tensor]] = {}

    def keep(name: str, layer: gr.QuarantineLoRA):
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            (x,) = args
            seen[name] = {"input": x, "output": output, "bottleneck": x @ layer.deployed.A.T}

        return hook

    handles = [model.get_submodule(n).register_forward_hook(keep(n, model.get_submodule(n))) for n in MODULES]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


def pooled_by_hand(tokens: Tensor, pool: Tensor, reduction: str) -> Tensor:
    rows = []
    for row, weights in zip(tokens, pool.tolist(), strict=True):
        kept = [(w, row[t]) for t, w in enumerate(weights) if w > 0]
        total = sum(w * x for w, x in kept)
        rows.append({"sum": total, "mean": total / sum(w for w, _ in kept), "last": kept[-1][1]}[reduction])
    return torch.stack(rows)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("reduction", ["mean", "sum", "last"])
@pytest.mark.parametrize("features", FEATURES)
def test_features_equal_those_pooled_by_hand(features: str, reduction: str) -> None:
    model = routed_mixer()
    with gr.capture_activations(model, pool=POOL, features=features, reduction=reduction) as acts:
        model(IDS)
    expected = unpooled(model, IDS)
    assert list(acts) == MODULES
    for name in MODULES:
        exact(acts[name], pooled_by_hand(expected[name][features], POOL, reduction))


@pytest.mark.parametrize("reduction", ["mean", "sum", "last"])
@pytest.mark.parametrize("features", ["bottleneck", "input", "output"])
def test_rollouts_packed_into_one_sequence_have_the_features_of_each_alone(features: str, reduction: str) -> None:
    layers = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    model = gr.attach(layers, target_modules=["0", "2"], r=2, lora_alpha=4)
    rollouts = [torch.randn(1, tokens, 6, dtype=torch.float64) for tokens in (3, 5, 2)]
    pools = [torch.tensor([weights]) for weights in ([0.0, 1.0, 2.0], [0.0, 0.0, 1.0, 1.0, 1.0], [1.0, 0.0])]
    settings = {"features": features, "reduction": reduction}
    with gr.capture_activations(model, pool=torch.block_diag(*pools), **settings) as packed:
        model(torch.cat(rollouts, dim=1))
    for row, (rollout, pool) in enumerate(zip(rollouts, pools, strict=True)):
        with gr.capture_activations(model, pool=pool, **settings) as alone:
            model(rollout)
        for name in alone:
            torch.testing.assert_close(packed[name][row : row + 1], alone[name])


def test_a_token_that_no_packed_rollout_reads_does_not_count() -> None:
    model = gr.attach(nn.Sequential(nn.Linear(6, 6)), target_modules=["0"], r=2, lora_alpha=4)
    x = torch.randn(1, 5, 6)
    x[0, 2] = torch.nan
    pool = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0]])
    with gr.capture_activations(model, pool=pool) as acts:
        model(x)
    assert acts["0"].isfinite().all()


def test_bottleneck_is_A_times_the_pooled_input() -> None:
    model = routed_mixer()
    with gr.capture_activations(model, pool=POOL) as h, gr.capture_activations(model, pool=POOL, features="input") as x:
        model(IDS)
    for name in MODULES:
        assert h[name].shape == (3, R)
        exact(h[name], x[name] @ model.get_submodule(name).deployed.A.T)


def test_boolean_and_integer_pools_mean_the_same_as_floats() -> None:
    model, results = routed_mixer(), []
    for pool in (POOL > 0, (POOL > 0).long(), (POOL > 0).bfloat16()):
        with gr.capture_activations(model, pool=pool) as acts:
            model(IDS)
        results.append(acts["out"])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_several_forwards_concatenate_in_order() -> None:
    model, pool = routed_mixer(), POOL[:1].expand(3, -1)
    with gr.capture_activations(model, pool=pool) as batched:
        model(IDS)
    with gr.capture_activations(model, pool=pool[:1]) as one_by_one:
        for i in (2, 0, 1):
            model(IDS[i : i + 1])
    for name in MODULES:
        assert not torch.allclose(batched[name][0], batched[name][1])
        exact(one_by_one[name], batched[name][[2, 0, 1]])


@pytest.mark.parametrize("features", FEATURES)
def test_a_callable_pool_gets_the_input_of_each_module(features: str) -> None:
    model, seen = routed_mixer(), []

    def pool(x: Tensor) -> Tensor:
        seen.append(x)
        return POOL[:, : x.shape[1]]

    with gr.capture_activations(model, pool=pool, features=features) as acts:
        model(IDS)
        model(IDS[:, :4])
    tokens = unpooled(model, IDS), unpooled(model, IDS[:, :4])
    for name in MODULES:
        parts = [pooled_by_hand(t[name][features], POOL[:, : t[name]["input"].shape[1]], "mean") for t in tokens]
        exact(acts[name], torch.cat(parts))
    inputs = [t[name]["input"] for t in tokens for name in MODULES]
    for x, expected in zip(seen, inputs, strict=True):
        exact(x, expected)


def test_inputs_without_a_token_axis_need_no_pool() -> None:
    model, x = routed_tower(), torch.randn(3, 5, dtype=torch.float64)
    with gr.capture_activations(model, pool=None) as acts:
        model(x)
    exact(acts["lower"], x @ model.lower.deployed.A.T)


def test_named_modules_need_not_be_routed_and_come_in_the_order_asked() -> None:
    model = routed_mixer()
    with gr.capture_activations(model, pool=POOL, features="output", modules=["head", "q"]) as acts:
        logits = model(IDS)
    assert list(acts) == ["head", "q"]
    exact(acts["head"], pooled_by_hand(logits.detach(), POOL, "mean"))


def test_a_module_called_with_keywords_is_captured() -> None:
    model, x = routed_tower(), torch.randn(3, 5, dtype=torch.float64)
    with gr.capture_activations(model, pool=None, modules=["lower"]) as acts:
        model.lower(x=x)
    exact(acts["lower"], x @ model.lower.deployed.A.T)


def test_low_precision_models_have_float32_features() -> None:
    model = routed_mixer(torch.bfloat16)
    with gr.capture_activations(model, pool=POOL) as acts:
        model(IDS)
    assert {acts[name].dtype for name in MODULES} == {torch.float32}


def test_capture_changes_no_output_and_stays_out_of_the_graph() -> None:
    model = routed_mixer()
    plain = model(IDS)
    with gr.capture_activations(model, pool=POOL, features="output") as acts:
        captured = model(IDS)
    assert torch.equal(plain, captured)
    assert not any(acts[name].requires_grad for name in MODULES)


def test_no_input_is_kept_alive() -> None:
    model, inputs = routed_mixer(), []
    model.out.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    with torch.no_grad(), gr.capture_activations(model, pool=POOL, features="input") as acts:
        model(IDS)
        assert inputs[0]() is None
    assert acts["out"].untyped_storage().nbytes() == 3 * D * 8


def test_checkpointing_captures_activations_once() -> None:
    model = routed_mixer()
    with gr.capture_activations(model, pool=POOL) as plain:
        model(IDS)
    model.reentrant = False
    with gr.capture_activations(model, pool=POOL) as recomputed:
        batch_loss(model, IDS).backward()
    assert all(torch.equal(plain[name], recomputed[name]) for name in MODULES)


# What is refused


@pytest.mark.parametrize("shape", [(3, 4), (2, 5), (5, 3)])
def test_a_pool_of_another_shape_raises(shape: tuple[int, int]) -> None:
    model = routed_mixer()
    with pytest.raises(
        gr.GradRouteError, match=r"`pool` should have the shape \(3, 5\) .*`q`. Found \(" + str(shape[0])
    ):
        with gr.capture_activations(model, pool=torch.ones(shape)):
            model(IDS)


def test_a_row_without_a_pooled_token_raises() -> None:
    pool = POOL.clone()
    pool[1] = 0
    with pytest.raises(gr.GradRouteError, match="`pool` should keep a token in every row. Found none in row 1"):
        with gr.capture_activations(routed_mixer(), pool=pool):
            pass


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_pool_weights_that_are_negative_or_not_finite_raise(bad: float) -> None:
    pool = POOL.clone()
    pool[0, 0] = bad
    with pytest.raises(gr.GradRouteError, match="`pool` should hold finite weights >= 0"):
        with gr.capture_activations(routed_mixer(), pool=pool):
            pass


@pytest.mark.parametrize("pool", [POOL[0], POOL[None], [[1, 1]]])
def test_a_pool_that_is_no_matrix_raises(pool: object) -> None:
    with pytest.raises(REFUSED, match="pool"), gr.capture_activations(routed_mixer(), pool=pool):
        pass


def test_tokens_without_a_pool_raise() -> None:
    model = routed_mixer()
    with pytest.raises(gr.GradRouteError, match=r"`pool` is needed for `q`, whose input has shape \(3, 5, 6\)"):
        with gr.capture_activations(model, pool=None):
            model(IDS)


@pytest.mark.parametrize(
    ("modules", "found"),
    [(["q", "w"], r"`modules` .*\['w'\]"), ("q", "`modules` should be a list"), ([], "`modules` should be a list")],
)
def test_unknown_modules_raise(modules: object, found: str) -> None:
    for capture in (gr.capture_gradients, lambda *a, **k: gr.capture_activations(*a, pool=POOL, **k)):
        with pytest.raises(gr.GradRouteError, match=found), capture(routed_mixer(), modules=modules):
            pass


def test_a_bottleneck_needs_routed_layers() -> None:
    with pytest.raises(gr.GradRouteError, match=r"`features=\"bottleneck\"` needs routed layers. Found .*'head'"):
        with gr.capture_activations(routed_mixer(), pool=POOL, modules=["q", "head"]):
            pass
    with pytest.raises(gr.GradRouteError, match=r"`model` should contain routed layers.*Mixer.*attach"):
        with gr.capture_activations(Mixer(), pool=POOL):
            pass


@pytest.mark.parametrize("argument", ["features", "reduction"])
def test_unknown_features_and_reductions_raise(argument: str) -> None:
    with pytest.raises(REFUSED, match=argument):
        with gr.capture_activations(routed_mixer(), pool=POOL, **{argument: "median"}):
            pass


def test_a_module_that_did_not_run_raises_at_the_end() -> None:
    model = routed_mixer()
    with pytest.raises(gr.GradRouteError, match=r"run forward inside .*these did not: `k`, `v`, `out`"):
        with gr.capture_activations(model, pool=POOL):
            model.q(model.embed(IDS))


def test_modules_that_saw_different_numbers_of_rollouts_raise() -> None:
    model = routed_mixer()
    with pytest.raises(gr.GradRouteError, match=r"same rollouts. Found .*'q': 6, 'k': 3"):
        with gr.capture_activations(model, pool=POOL):
            model.q(model.embed(IDS))
            model(IDS)


def test_features_that_are_not_finite_raise_with_module_and_row() -> None:
    model = routed_mixer()
    with torch.no_grad():
        model.embed.weight[8] = float("inf")
    pool = torch.ones(3, 5)
    with pytest.raises(gr.GradRouteError, match="activation features of `q` are not finite in row 1"):
        with gr.capture_activations(model, pool=pool):
            model(IDS)


@pytest.mark.parametrize("kind", ["activations", "gradients"])
def test_an_exception_inside_comes_through_and_leaves_no_hook(kind: str) -> None:
    model = routed_mixer()
    before = hooks_of(model)
    block = gr.capture_activations(model, pool=POOL) if kind == "activations" else gr.capture_gradients(model)
    with pytest.raises(KeyboardInterrupt), block as capture:
        assert hooks_of(model) > before
        model.q(model.embed(IDS))
        raise KeyboardInterrupt
    assert hooks_of(model) == before
    model(IDS)
    with pytest.raises(gr.GradRouteError, match="Found that these did not: "):
        capture["out"]


def test_reading_before_anything_ran_raises() -> None:
    model = routed_mixer()
    with gr.capture_activations(model, pool=POOL) as acts:
        with pytest.raises(gr.GradRouteError, match="Found that these did not: `q`"):
            acts["q"]
        model(IDS)
    assert acts["q"].shape == (3, R)


def test_a_pool_of_one_row_serves_no_larger_batch() -> None:
    """Broadcasting would pool every rollout with the first one's mask."""
    model = routed_mixer()
    with pytest.raises(gr.GradRouteError, match=r"`pool` should have the shape \(3, 5\)"):
        with gr.capture_activations(model, pool=POOL[:1]):
            model(IDS)


def test_residuals_are_read_from_blocks_whose_first_argument_is_no_tensor() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(6, 6)

        def forward(self, mask: None, x: Tensor) -> Tensor:
            return x + self.q(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(None, x=x)
            return x

    torch.manual_seed(0)
    model, x = gr.attach(Model(), r=2, lora_alpha=4.0, target_modules=["q"]), torch.randn(3, 4, 6)
    with torch.no_grad(), gr.capture_activations(model, pool=torch.ones(3, 4), features="residual") as capture:
        y = model(x)
    torch.testing.assert_close(capture["layers.1"], y.mean(1))


@pytest.mark.corner("a model is copied or saved inside a capture", "the copy is not captured")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_inside_a_capture_adds_nothing_to_it(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = routed_mixer()
    with gr.capture_activations(model, pool=POOL) as activations, gr.capture_gradients(model) as gradients:
        batch_loss(model, IDS).backward()
        other = copied(model)
        batch_loss(other, IDS).backward()
    batch_loss(other, IDS).backward()
    for capture in (activations, gradients):
        assert all(len(rows) == len(IDS) for rows in capture.values())


def test_features_that_were_captured_through_a_wrapper_are_refused_with_the_fix() -> None:
    model = routed_mixer()
    wrapped = nn.Sequential(model)
    with torch.no_grad(), gr.capture_activations(wrapped, pool=POOL) as activations:
        wrapped(IDS)
    directions = gr.Directions(*3 * ({name: torch.eye(R)[:1].double() for name in MODULES},), MADE_OF_NUMBERS)
    with pytest.raises(gr.GradRouteError, match="Fix: capture from the model that .* wrapper"):
        directions.score(dict(activations))
