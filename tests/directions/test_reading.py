"""What is read: the residual stream, modules by name, any loss, padding on either side, and at what cost."""

import pytest
import torch
from support.language_models import MODULES, PAIRS, ids_only, routed_mixer, tiny_llama
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gradroute as gr
from gradroute.directions.pairs import PaddedBatch, batched, padded_batches, tokenize_pairs

EXTRACTORS = [gr.extract_activation_directions, gr.extract_gradient_directions]
each_extractor = pytest.mark.parametrize("extract", EXTRACTORS, ids=["activation", "gradient"])


class Stack(nn.Module):
    """Blocks in a ModuleList, each with experts in a list of its own; blocks may return tuples."""

    class Block(nn.Module):
        def __init__(self, in_tuple: bool) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
            self.in_tuple = in_tuple

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, str]:
            x = x + torch.tanh(self.experts[0](x)) * self.experts[1](x)
            return (x, "cache") if self.in_tuple else x

    def __init__(self, in_tuple: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 6), nn.Linear(6, 12)
        self.blocks = nn.ModuleList([self.Block(in_tuple) for _ in range(3)])
        self.other = nn.ModuleList([nn.Linear(6, 6)])
        self.seen: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        self.seen = []
        for block in self.blocks:
            x = block(x)
            assert isinstance(x, tuple) == block.in_tuple
            x = x[0] if block.in_tuple else x
            x.retain_grad() if x.requires_grad else None
            self.seen.append(x)
        return self.head(x.cumsum(1))


def stack(in_tuple: bool = False, target: str = r"blocks\.1\.experts\.\d") -> Stack:
    torch.manual_seed(0)
    model = Stack(in_tuple).double()
    return gr.attach(model, r=2, target_modules=target)


@pytest.mark.parametrize("in_tuple", [False, True])
def test_residual_features_are_the_outputs_of_the_outermost_blocks(in_tuple: bool) -> None:
    model = stack(in_tuple)
    pool, ids = torch.ones(2, 4), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    with gr.capture_activations(model, pool=pool, features="residual") as acts:
        model(ids)
    assert list(acts) == ["blocks.0", "blocks.1", "blocks.2"]
    for name, x in zip(acts, model.seen, strict=True):
        torch.testing.assert_close(acts[name], x.mean(1).detach())
    with gr.capture_gradients(model, features="residual") as grads:
        model(ids).pow(2).sum().backward()
    for name, x in zip(grads, model.seen, strict=True):
        assert x.grad.abs().min() > 0
        torch.testing.assert_close(grads[name], x.grad.sum(1))
    assert model(ids).shape == (2, 4, 12)


@each_extractor
def test_the_residual_stream_of_a_hugging_face_model(extract) -> None:
    model = tiny_llama()
    found = extract(model, PAIRS, features="residual")
    assert list(found.rows) == ["model.layers.0", "model.layers.1"]
    assert {rows.shape for rows in found.rows.values()} == {(1, 8)}
    single = extract(model, PAIRS, features="residual", batch_size=1)
    for name in found.rows:
        torch.testing.assert_close(found.hack[name], single.hack[name], rtol=1e-3, atol=1e-5)
    hack, clean = found.pair_scores()
    assert hack.mean() > clean.mean()


def test_residual_activations_are_the_hidden_states_of_the_model() -> None:
    model = tiny_llama().eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad(), gr.capture_activations(model, pool=torch.ones(1, 4), features="residual") as acts:
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(acts["model.layers.0"], hidden[1].mean(1))


@each_extractor
def test_blocks_can_be_named(extract) -> None:
    found = extract(tiny_llama(), PAIRS, features="residual", modules=["model.layers.1"])
    assert list(found.rows) == ["model.layers.1"]
    assert list(extract(routed_mixer(), PAIRS, forward_fn=ids_only, modules=["v", "q"]).rows) == ["v", "q"]


def test_no_list_of_blocks_and_two_of_them_raise() -> None:
    with pytest.raises(gr.GradRouteError, match=r"one list of transformer blocks.*Found \[\].*modules="):
        gr.extract_activation_directions(routed_mixer(), PAIRS, forward_fn=ids_only, features="residual")
    both = stack(target=r"(blocks\.1\.experts|other)\.\d")
    with pytest.raises(gr.GradRouteError, match=r"Found \['blocks', 'other'\]"):
        gr.extract_activation_directions(both, PAIRS, forward_fn=ids_only, features="residual")


def test_a_block_that_returns_no_tensor_raises() -> None:
    model = stack()
    model.blocks[1].forward = lambda x: {"hidden": x}
    with pytest.raises(gr.GradRouteError, match="`blocks.1` should return a tensor"):
        with gr.capture_activations(model, pool=torch.ones(1, 2), features="residual"):
            model(torch.tensor([[1, 2]]))


# Any loss


def first_token_nll(output: Tensor, batch: PaddedBatch) -> Tensor:
    start = batch.completion_mask.long().argmax(1)
    rows = torch.arange(len(start))
    return -output.log_softmax(-1)[rows, start - 1, batch.input_ids[rows, start]]


@pytest.mark.parametrize("features", ["bottleneck", "output", "parameter"])
def test_gradients_are_of_the_loss_that_is_given(features: str) -> None:
    model = routed_mixer()
    settings = {"forward_fn": ids_only, "features": features}
    short = [gr.ContrastivePair(p.prompt, p.hack[:1], p.clean[:1]) for p in PAIRS]
    expected = gr.extract_gradient_directions(model, short, **settings)
    found = gr.extract_gradient_directions(model, PAIRS, loss_fn=first_token_nll, **settings)
    other = gr.extract_gradient_directions(model, PAIRS, **settings)
    for name in MODULES:
        torch.testing.assert_close(found.rows[name], expected.rows[name], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(found.rows[name], other.rows[name], rtol=1e-3)


def test_a_loss_may_read_what_is_no_logits() -> None:
    def rewards(model: nn.Module, ids: Tensor, attention: Tensor) -> dict[str, Tensor]:
        return {"value": model(ids).sum((1, 2))}

    found = gr.extract_gradient_directions(
        routed_mixer(), PAIRS, forward_fn=rewards, loss_fn=lambda output, batch: output["value"]
    )
    assert found.n_pairs == 4


@pytest.mark.parametrize(
    ("loss_fn", "found"),
    [
        (lambda output, batch: output.sum(), r"a loss per rollout \(8,\). Found torch.float64, \(\)"),
        (lambda output, batch: 1.0, "Found float"),
        (lambda output, batch: output.detach().sum((1, 2)), "should carry a gradient. Found none"),
    ],
)
def test_a_loss_that_is_none_per_rollout_raises(loss_fn, found: str) -> None:
    with pytest.raises(gr.GradRouteError, match=f"`loss_fn`.*{found}"):
        gr.extract_gradient_directions(routed_mixer(), PAIRS, forward_fn=ids_only, loss_fn=loss_fn)


# Padding


def left_padded(batch: PaddedBatch) -> PaddedBatch:
    """The same rollouts with the padding in front."""

    def shift(values: Tensor) -> Tensor:
        lengths = batch.attention_mask.sum(1).tolist()
        return torch.stack([row.roll(len(row) - n) for row, n in zip(values, lengths, strict=True)])

    masks = (batch.input_ids, batch.attention_mask, batch.completion_mask)
    return PaddedBatch(batch.index, *map(shift, masks))


@pytest.mark.parametrize("features", ["bottleneck", "input", "output", "residual", "parameter"])
def test_left_and_right_padding_have_the_same_features(features: str) -> None:
    model = tiny_llama().double().eval()
    tokenized = tokenize_pairs(PAIRS, None)
    (right,) = padded_batches(tokenized, batched(tokenized, 8), torch.device("cpu"))
    left = left_padded(right)
    assert not torch.equal(left.input_ids, right.input_ids)
    assert left.completion_mask[:, -1].all()
    found: dict[str, list] = {"activation": [], "gradient": []}
    for batch in (left, right):
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": positions}
        if features != "parameter":
            with gr.capture_activations(model, pool=batch.completion_mask, features=features) as acts:
                model(**inputs, use_cache=False)
            found["activation"].append(acts)
        with gr.capture_gradients(model, features=features) as grads:
            logps = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
            chosen = logps.gather(2, batch.input_ids[:, 1:, None])[..., 0]
            (chosen * batch.completion_mask[:, 1:]).sum().backward()
        found["gradient"].append(grads)
    for pair in found.values():
        if pair:
            for name in pair[0]:
                assert pair[0][name].any()
                torch.testing.assert_close(pair[0][name], pair[1][name], rtol=1e-8, atol=1e-10)


# Cost


def test_extraction_computes_no_gradient_of_a_weight() -> None:
    """Backward to inputs costs as much as the forward; gradients of the blocks would come on top."""
    model = routed_mixer()
    rollouts = tokenize_pairs(PAIRS, None)
    (batch,) = padded_batches(rollouts, batched(rollouts, 8), torch.device("cpu"))

    def flops(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    model.requires_grad_(True)
    x = model.embed(batch.input_ids).detach().requires_grad_()
    forward = flops(lambda: model.head(model.body(x)))
    trained = flops(lambda: model.head(model.body(x)).sum().backward())
    model.zero_grad()
    extraction = flops(lambda: gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only, features="output"))
    assert trained > 2.8 * forward
    assert extraction <= 2 * forward
    assert all(p.grad is None for p in model.parameters())


@each_extractor
def test_many_pairs_run_in_one_forward_and_one_backward(extract) -> None:
    model, calls = routed_mixer(), {"forward": 0, "backward": 0}

    def forward(model: nn.Module, ids: Tensor, attention: Tensor) -> Tensor:
        calls["forward"] += 1
        logits = model(ids)
        if logits.requires_grad:
            logits.register_hook(lambda _: calls.update(backward=calls["backward"] + 1))
        return logits

    extract(model, PAIRS, forward_fn=forward)
    assert calls == {"forward": 1, "backward": int(extract is gr.extract_gradient_directions)}
