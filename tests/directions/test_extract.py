"""Extraction: planted directions, batches against pairs one by one, and models left as they were found."""

import random

import pytest
import torch
from support.language_models import (
    MODULES,
    PAIRS,
    VOCAB,
    Mixer,
    completion_nll,
    gain_gradients,
    ids_only,
    routed_mixer,
    tiny_llama,
)
from support.models import randomize_blocks
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import gradroute as gr

pytestmark = pytest.mark.touches_peft

EXTRACTORS = [gr.extract_activation_directions, gr.extract_gradient_directions]
each_extractor = pytest.mark.parametrize("extract", EXTRACTORS, ids=["activation", "gradient"])


def exact(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


# Planted directions


class Planted(nn.Module):
    """logits = head(probe(embed(ids))): one module, whose features are known from the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.probe, self.head = nn.Embedding(VOCAB, 16), nn.Linear(16, 16), nn.Linear(16, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.probe(self.embed(ids)))


HACK_TOKEN, CLEAN_TOKEN = 1, 2
DIRECTION = torch.tensor([3.0, -1.0, 2.0, 0.5])


def planted_model() -> tuple[Planted, gr.QuarantineLoRA]:
    torch.manual_seed(0)
    model = Planted()
    gr.attach(model, r=4, lora_alpha=4.0, target_modules=["probe"])
    randomize_blocks(model)
    return model, model.probe


def planted_pairs(length: int) -> list[gr.ContrastivePair]:
    """Random tokens throughout, but for one token of the completion, which says what the side is."""
    generator = random.Random(0)

    def noise(n: int) -> list[int]:
        return [generator.randrange(3, VOCAB) for _ in range(n)]

    sides = [(noise(3), noise(length), noise(length)) for _ in range(32)]
    return [gr.ContrastivePair(p, [HACK_TOKEN, *hack], [CLEAN_TOKEN, *clean]) for p, hack, clean in sides]


def test_activations_recover_a_planted_direction() -> None:
    model, layer = planted_model()
    with torch.no_grad():
        # h = A x: the two side tokens are embedded so that A (x_hack - x_clean) is the planted direction.
        model.embed.weight.mul_(0.05)
        model.embed.weight[HACK_TOKEN] = (
            model.embed.weight[CLEAN_TOKEN] + torch.linalg.pinv(layer.deployed.A) @ DIRECTION
        )
    found = gr.extract_activation_directions(model, planted_pairs(2), forward_fn=ids_only)
    assert cosine_similarity(found.rows["probe"][0], DIRECTION, dim=0) > 0.99
    swapped = [gr.ContrastivePair(p.prompt, p.clean, p.hack) for p in planted_pairs(2)]
    reversed_ = gr.extract_activation_directions(model, swapped, forward_fn=ids_only)
    assert cosine_similarity(reversed_.rows["probe"][0], DIRECTION, dim=0) < -0.99


def test_gradients_recover_a_planted_direction() -> None:
    model, layer = planted_model()
    A, B, _ = layer.deployed
    with torch.no_grad():
        # Every token has h = A x = 1 up to noise; raising the logit of the clean token over that of the hack token
        # pulls on the bottleneck by B^T (head_clean - head_hack), and the loss does so for clean, not for hack.
        model.embed.weight.copy_(torch.linalg.pinv(A) @ torch.ones(4) + 0.05 * torch.randn(VOCAB, 16))
        model.head.weight[HACK_TOKEN] = model.head.weight[CLEAN_TOKEN] - torch.linalg.pinv(B.T) @ DIRECTION
    found = gr.extract_gradient_directions(model, planted_pairs(0), forward_fn=ids_only)
    assert cosine_similarity(found.rows["probe"][0], DIRECTION, dim=0) > 0.99


# What is computed


def inputs_of(model: Mixer, ids: list[int]) -> dict[str, Tensor]:
    """module -> (seq, d): the input of every token of one rollout."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0][0]}))
        for name in MODULES
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def test_activation_features_are_the_completion_means_of_each_side() -> None:
    model = routed_mixer()
    found = gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)
    for i, pair in enumerate(PAIRS):
        for side, completion in ((found.hack, pair.hack), (found.clean, pair.clean)):
            for name, x in inputs_of(model, [*pair.prompt, *completion]).items():
                h = x[len(pair.prompt) :] @ model.get_submodule(name).deployed.A.T
                exact(side[name][i], h.mean(0).detach())
    for name, rows in found.rows.items():
        difference = (found.hack[name] - found.clean[name]).mean(0)
        exact(rows[0], difference / difference.norm())


def test_gradient_features_are_those_of_each_completions_mean_nll() -> None:
    model = routed_mixer()
    found = gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only)
    for side, completions in ((found.hack, [p.hack for p in PAIRS]), (found.clean, [p.clean for p in PAIRS])):
        losses = [
            lambda p=pair.prompt, c=completion: completion_nll(model, [*p], [*c])
            for pair, completion in zip(PAIRS, completions, strict=True)
        ]
        for name, rows in gain_gradients(model, losses).items():
            assert rows.abs().min() > 1e-9
            exact(side[name], rows)


@each_extractor
@pytest.mark.parametrize("features", ["bottleneck", "input", "output"])
def test_batches_equal_pairs_one_by_one(extract, features: str) -> None:
    model = routed_mixer()
    whole = extract(model, PAIRS, forward_fn=ids_only, features=features)
    single = [extract(model, [pair], forward_fn=ids_only, features=features, batch_size=1) for pair in PAIRS]
    for name in MODULES:
        exact(whole.hack[name], torch.cat([one.hack[name] for one in single]))
        exact(whole.clean[name], torch.cat([one.clean[name] for one in single]))
        assert not torch.allclose(whole.rows[name], single[0].rows[name], rtol=1e-3)


@each_extractor
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batch_size_does_not_matter(extract, batch_size: int) -> None:
    model = routed_mixer()
    reference = extract(model, PAIRS, forward_fn=ids_only)
    found = extract(model, PAIRS, forward_fn=ids_only, batch_size=batch_size)
    for name in MODULES:
        exact(found.rows[name], reference.rows[name])


@each_extractor
def test_features_follow_the_order_of_the_pairs(extract) -> None:
    model, order = routed_mixer(), [2, 0, 3, 1]
    found = extract(model, PAIRS, forward_fn=ids_only, batch_size=3)
    permuted = extract(model, [PAIRS[i] for i in order], forward_fn=ids_only, batch_size=3)
    for name in MODULES:
        exact(permuted.hack[name], found.hack[name][order])
        exact(permuted.rows[name], found.rows[name])
    assert permuted.provenance.pair_hash != found.provenance.pair_hash


@each_extractor
def test_a_hugging_face_model_needs_no_forward_fn_and_padding_does_not_matter(extract) -> None:
    model = tiny_llama()
    batched, single = extract(model, PAIRS), extract(model, PAIRS, batch_size=1)
    assert len(batched.rows) == 14
    for name in batched.rows:
        torch.testing.assert_close(batched.hack[name], single.hack[name], rtol=1e-3, atol=1e-5)
        assert cosine_similarity(batched.rows[name], single.rows[name]) > 0.999


@each_extractor
def test_texts_are_tokenised(extract) -> None:
    model = routed_mixer()
    texts = [gr.ContrastivePair(*("".join(map(chr, side)) for side in (p.prompt, p.hack, p.clean))) for p in PAIRS]
    found = extract(model, texts, forward_fn=ids_only, tokenizer=lambda text: [ord(character) for character in text])
    reference = extract(model, PAIRS, forward_fn=ids_only)
    assert all(torch.equal(found.rows[name], reference.rows[name]) for name in MODULES)


@each_extractor
def test_checkpointed_models_have_the_same_directions(extract) -> None:
    model = routed_mixer()
    plain = extract(model, PAIRS, forward_fn=ids_only)
    model.reentrant = False
    recomputed = extract(model, PAIRS, forward_fn=ids_only)
    for name in MODULES:
        exact(recomputed.rows[name], plain.rows[name])


def test_the_gradient_extractor_works_inside_no_grad() -> None:
    model = routed_mixer()
    plain = gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only)
    with torch.no_grad():
        found = gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only)
    assert all(torch.equal(found.rows[name], plain.rows[name]) for name in MODULES)


@each_extractor
def test_dropout_is_off(extract) -> None:
    model = routed_mixer(dropout=0.5).train()
    assert not torch.equal(model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[1, 2, 3]])))
    found, reference = (extract(m, PAIRS, forward_fn=ids_only) for m in (model, routed_mixer()))
    assert all(torch.equal(found.rows[name], reference.rows[name]) for name in MODULES)


@each_extractor
def test_the_view_is_measured_and_recorded(extract) -> None:
    model = routed_mixer()
    on = extract(model, PAIRS, forward_fn=ids_only)
    with gr.ablate_quarantine(model):
        ablated = extract(model, PAIRS, forward_fn=ids_only)
    with gr.ablate_quarantine(model, 0.5):
        scaled = extract(model, PAIRS, forward_fn=ids_only)
    assert [d.provenance.view for d in (on, ablated, scaled)] == ["on", "ablated", "scaled 0.5"]
    assert not torch.allclose(on.rows["out"], ablated.rows["out"], rtol=1e-3)


def test_provenance_says_how_directions_were_made() -> None:
    model = routed_mixer()
    found = gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only, features="input", reduction="last")
    made = found.provenance
    assert (made.source, made.feature, made.reduction, made.estimator) == (
        "activation",
        "input",
        "last",
        "mean_difference",
    )
    assert "mean_difference of activation input, 4 modules x 1 x 6, 4 pairs" in repr(found)
    assert gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only).provenance.source == "gradient"


# What is refused


def test_zero_B_has_no_bottleneck_gradient_and_the_reason_is_named() -> None:
    model = routed_mixer()
    with torch.no_grad():
        for name in MODULES:
            model.get_submodule(name).deployed.B.zero_()
    with pytest.raises(
        gr.errors.DeadDirectionError, match="in 4 of 4 modules: `q`.*every deployed B is zero.*optimizer steps"
    ):
        gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only)
    assert gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only, features="output").n_pairs == 4
    assert gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only).n_pairs == 4


def test_one_module_with_zero_B_is_named_alone() -> None:
    model = routed_mixer()
    with torch.no_grad():
        model.k.deployed.B.zero_()
    with pytest.raises(gr.errors.DeadDirectionError, match="in 1 of 4 modules: `k`.* B is zero"):
        gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only)


@each_extractor
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_that_the_model_cannot_tell_apart_raise(extract, dtype: torch.dtype) -> None:
    model = routed_mixer(dtype)
    with torch.no_grad():
        model.embed.weight[5] = model.embed.weight[4]
        model.head.weight[5], model.head.bias[5] = model.head.weight[4], model.head.bias[4]
    pairs = [gr.ContrastivePair([1, 2], [4, 3], [5, 3]), gr.ContrastivePair([1], [3, 3, 5], [3, 3, 4])]
    with pytest.raises(gr.errors.DeadDirectionError, match="same features in 4 of 4 modules: `q`.*pairs differ"):
        extract(model, pairs, forward_fn=ids_only)


@each_extractor
def test_opposite_differences_that_cancel_raise(extract) -> None:
    there, back = gr.ContrastivePair([1], [4], [5]), gr.ContrastivePair([1], [5], [4])
    with pytest.raises(gr.errors.DeadDirectionError, match="same features in 4 of 4 modules"):
        extract(routed_mixer(), [there, back], forward_fn=ids_only)


@each_extractor
def test_no_pairs_raise(extract) -> None:
    with pytest.raises(gr.GradRouteError, match="`pairs` should hold at least one ContrastivePair"):
        extract(routed_mixer(), [], forward_fn=ids_only)


@each_extractor
def test_texts_without_a_tokenizer_raise(extract) -> None:
    with pytest.raises(gr.GradRouteError, match="`tokenizer` is needed"):
        extract(routed_mixer(), [gr.ContrastivePair("a", "b", "c")], forward_fn=ids_only)


@each_extractor
def test_a_model_without_blocks_raises(extract) -> None:
    with pytest.raises(gr.GradRouteError, match="`model` should contain routed layers"):
        extract(Mixer(), PAIRS, forward_fn=ids_only)


@each_extractor
def test_an_open_route_raises(extract) -> None:
    model = routed_mixer()
    gr.adapters.set_route(model, gr.RouteMask.classic([True]))
    with pytest.raises(gr.GradRouteError, match="open route.*close the route"):
        extract(model, PAIRS, forward_fn=ids_only)


def test_disabled_adapters_have_no_bottleneck_gradient() -> None:
    """A gain on the bottleneck does nothing to that view, so its gradient is zero and not s_d B^T delta."""
    model = routed_mixer()
    with pytest.raises(gr.GradRouteError, match="disabled"), gr.disable_adapters(model):
        gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only)


def test_gradients_need_prompts() -> None:
    with pytest.raises(gr.GradRouteError, match="`pairs` should have prompts"):
        gr.extract_gradient_directions(routed_mixer(), [gr.ContrastivePair([], [1], [2])], forward_fn=ids_only)


@pytest.mark.parametrize(
    ("forward_fn", "found"),
    [
        (lambda model, ids, attention: model(ids)[0], r"Found torch.float64, \(\d, 12\)"),
        (lambda model, ids, attention: (model(ids),), "Found tuple"),
        (lambda model, ids, attention: model(ids).detach(), "carry a gradient"),
    ],
)
def test_a_forward_fn_without_differentiable_logits_raises(forward_fn, found: str) -> None:
    with pytest.raises(gr.GradRouteError, match=f"`forward_fn` should return logits.*{found}"):
        gr.extract_gradient_directions(routed_mixer(), PAIRS, forward_fn=forward_fn)


# The model is left as it was found


def fails_in_the_second_batch():
    calls = []

    def forward(model: nn.Module, ids: Tensor, attention: Tensor) -> Tensor:
        calls.append(1)
        torch.rand(3)
        random.random()
        logits = model(ids)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return logits

    return forward


@each_extractor
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_found(extract, fails: bool) -> None:
    model = routed_mixer(dropout=0.5).train()
    model.q.eval()
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    grads = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    assert set(trainable.values()) == set(modes.values()) == {True, False}
    assert sum(grad is not None for grad, _ in grads.values()) == 16
    rng = torch.get_rng_state()

    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            extract(model, PAIRS, forward_fn=fails_in_the_second_batch(), batch_size=2)
    else:
        extract(model, PAIRS, forward_fn=ids_only, batch_size=2)

    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    for name, parameter in model.named_parameters():
        grad, copy = grads[name]
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, copy)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@each_extractor
def test_pythons_random_numbers_go_on_as_before(extract) -> None:
    model, state = routed_mixer(), random.getstate()
    extract(model, PAIRS, forward_fn=fails_in_the_second_batch())
    assert random.getstate() == state


@each_extractor
def test_a_budget_of_tokens_bounds_each_forward_and_changes_no_direction(extract) -> None:
    model, shapes = routed_mixer(), []

    def forward(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        shapes.append(ids.shape)
        return ids_only(model, ids, mask)

    whole = extract(model, PAIRS, forward_fn=forward)
    assert [shape.numel() > 16 for shape in shapes] == [True]
    shapes.clear()
    parts = extract(model, PAIRS, forward_fn=forward, batch_tokens=16)
    assert len(shapes) > 2
    assert max(shape.numel() for shape in shapes) <= 16
    for name, rows in whole.hack.items():
        exact(parts.hack[name], rows)
    with pytest.raises(gr.GradRouteError, match="`batch_tokens` should be at least"):
        extract(model, PAIRS, forward_fn=forward, batch_tokens=2)
