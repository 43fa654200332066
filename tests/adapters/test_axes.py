"""A mask per row where layers have other axes: exact where the rows are certain, refused where they are not."""

import pytest
import torch
from einops import rearrange
from support.models import gradients, randomize_blocks
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import gradroute as gr

pytestmark = pytest.mark.touches_peft

ZONES = ["route", "absorb", "route"]
ROWS = len(ZONES)


class Classifier(nn.Module):
    """Layers over (batch, seq, d), (batch, heads, seq, d) and, in its head, (batch, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.per_head = nn.Linear(6, 6), nn.Linear(3, 3)
        self.pooler, self.classifier = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(x))
        heads = self.per_head(rearrange(hidden, "b t (h d) -> b h t d", h=2))
        hidden = torch.tanh(rearrange(heads, "b h t d -> b t (h d)"))
        return self.classifier(torch.tanh(self.pooler(hidden[:, 0])))


def routed(model: nn.Module) -> nn.Module:
    return randomize_blocks(gr.attach(model.double(), r=2, r_quarantine=3))


def weighted_rows(model: nn.Module, inputs: list[Tensor], loss: object) -> dict[str, Tensor]:
    """The gradients of each row alone, unrouted; the deployed block's only of rows that absorb."""
    total: dict[str, Tensor] = {}
    for zone, row in zip(ZONES, inputs, strict=True):
        model.zero_grad()
        loss(model, row).backward()
        for name, gradient in gradients(model).items():
            weight = 0.0 if zone == "route" and "quarantine" not in name else 1.0
            total[name] = total.get(name, 0.0) + weight * gradient
    model.zero_grad()
    return total


def compare(model: nn.Module, x: Tensor, loss: object) -> None:
    expected = weighted_rows(model, [x[i : i + 1] for i in range(ROWS)], loss)
    with gr.route(model, gr.RouteMask.zones(ZONES)):
        loss(model, x).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12)


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


@pytest.mark.corner("a mask per row in a classifier with a pooled head", "exact")
@pytest.mark.parametrize("seq", [4, ROWS, 1])
def test_a_head_of_pooled_rows_and_layers_of_four_axes_are_exact(seq: int) -> None:
    torch.manual_seed(0)
    compare(routed(Classifier()), torch.randn(ROWS, seq, 6, dtype=torch.float64), squares)


def test_all_linear_layers_of_a_transformers_classifier_are_exact() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, hidden_dropout_prob=0.0, **sizes)).eval()
    gr.attach(model.double(), r=2, target_modules="all-linear")
    assert {"bert.pooler.dense", "classifier"} <= {name for name, m in model.named_modules() if hasattr(m, "deployed")}
    ids = torch.randint(0, 20, (ROWS, 5))
    compare(randomize_blocks(model, std=0.2), ids, lambda model, ids: model(input_ids=ids).logits.square().sum())


def test_ablated_rows_of_a_classifier_are_those_rows_ablated_alone() -> None:
    torch.manual_seed(0)
    model, x, rows = routed(Classifier()), torch.randn(ROWS, 4, 6).double(), torch.tensor([True, False, True])
    with gr.ablate_quarantine(model):
        off = model(x)
    with gr.ablate_quarantine(model, rows=rows):
        found = model(x)
    torch.testing.assert_close(found, torch.where(rows[:, None], off, model(x)), rtol=1e-12, atol=1e-12)


def test_a_mask_per_token_does_not_fit_a_head_of_pooled_rows() -> None:
    model = routed(Classifier())
    tokens = gr.RouteMask.zones(torch.zeros(ROWS, 4, dtype=torch.long))
    with pytest.raises(gr.errors.RouteError, match="should have the same axes"), gr.route(model, tokens):
        model(torch.randn(ROWS, 4, 6).double())


class Branches(nn.Module):
    """A pooled head, and two layers that share the tokens out: as many each as the batch has rows."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.branches = nn.Linear(6, 6), nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.body = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.head(x[:, 0])
        tokens = torch.cat([self.branches[0](x[0]), self.branches[1](x[1])])
        return self.body(x) * gate[:, None] + tokens.sum()


@pytest.mark.corner("a layer that gets a part of the tokens gets as many as there are rows", "`RouteError`")
def test_layers_that_share_out_the_tokens_are_refused_though_a_pooled_head_had_the_same_shape() -> None:
    model = routed(Branches())
    with pytest.raises(gr.errors.RouteError, match="3 axes in `body`, 2 axes in `branches.0`"):
        with gr.route(model, gr.RouteMask.zones(ZONES)):
            model(torch.randn(ROWS, ROWS, 6).double())


def test_an_expert_is_refused_though_it_gets_as_many_tokens_as_there_are_rows() -> None:
    model = routed(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(6, 6)])}))
    with pytest.raises(gr.errors.RouteError, match=r"`experts\.0` is an expert.*Fix: exclude the experts"):
        with gr.route(model, gr.RouteMask.zones(ZONES)):
            model["experts"][0](torch.randn(ROWS, 6).double())


def test_tokens_that_a_module_flattens_do_not_fit_the_rows() -> None:
    class Flattening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.mlp = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.body(x).flatten(0, 1)).view_as(x)

    torch.manual_seed(0)
    model = routed(Flattening())
    with pytest.raises(gr.errors.RouteError, match="leading axes"), gr.route(model, gr.RouteMask.zones(ZONES)):
        model(torch.randn(ROWS, 4, 6).double())
    # Of one token each they are the rows.
    compare(model, torch.randn(ROWS, 1, 6, dtype=torch.float64), squares)
