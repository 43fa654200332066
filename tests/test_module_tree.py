"""A walk of a model's modules is kept for as long as another walk would find the same, and no longer."""

import copy
import gc
import random
import weakref
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from support.models import Tower, routed_tower
from support.tiny_models import config, peft_model, token_ids
from torch import nn

import gradroute as gr
from gradroute._module_tree import named_modules
from gradroute._protocol import routed_layers
from gradroute.errors import GradRouteError, TargetError


def is_current(model: nn.Module) -> bool:
    """Whether the walk that is kept finds what a walk finds now, in its order."""
    kept, walked = list(named_modules(model).items()), list(model.named_modules())
    return len(kept) == len(walked) and all(
        a == b and mine is theirs for (a, mine), (b, theirs) in zip(kept, walked, strict=True)
    )


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(Tower(), nn.ModuleList([nn.Linear(2, 2) for _ in range(3)]), nn.ModuleDict({"a": Tower()}))
    made.register_module("nothing", None)
    made.shared = made[0].upper
    assert is_current(made)
    return made


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "added": lambda m: m.add_module("more", nn.Linear(1, 1)),
    "added below a leaf": lambda m: setattr(m[0].lower, "more", nn.Linear(1, 1)),
    "added past nn.Module": lambda m: m[0]._modules.update(more=nn.Linear(1, 1)),
    "replaced": lambda m: setattr(m[0], "lower", nn.Linear(5, 6)),
    "replaced past nn.Module": lambda m: m[2]["a"]._modules.update(lower=nn.Linear(5, 6)),
    "replaced by None": lambda m: setattr(m[0], "lower", None),
    "None replaced": lambda m: setattr(m, "nothing", nn.Linear(1, 1)),
    "removed": lambda m: delattr(m[0], "lower"),
    "popped from a list": lambda m: m[1].pop(0),
    "popped from a dictionary": lambda m: m[2].pop("a"),
    "inserted into a list": lambda m: m[1].insert(1, nn.Linear(1, 1)),
    "renamed": lambda m: m[2].update({"b": m[2].pop("a")}),
    "exchanged": lambda m: m[1]._modules.update({"0": m[1][1], "1": m[1][0]}),
    "moved to another parent": lambda m: (m[1].append(m[0].lower), delattr(m[0], "lower")),
    "moved from the end of one parent to the start of the next": lambda m: setattr(
        m[1], "_modules", {"upper": m[0]._modules.pop("upper"), **m[1]._modules}
    ),
    "of another class": lambda m: setattr(m[0].lower, "__class__", nn.Identity),
    "parametrized": lambda m: nn.utils.parametrizations.weight_norm(m[0].lower),
    "shared with another parent": lambda m: setattr(m[2]["a"], "upper", m[0].upper),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_tree_is_noticed(model: nn.Module, change: str) -> None:
    CHANGES[change](model)
    assert is_current(model)
    kinds = [type(module) for module in named_modules(model).values()]
    assert kinds == [type(module) for _, module in model.named_modules()]


def test_any_sequence_of_changes_is_noticed() -> None:
    draw = random.Random(0)
    for _ in range(20):
        model = nn.ModuleDict({"a": nn.ModuleDict()})
        for _ in range(20):
            holders = [module for module in model.modules() if isinstance(module, nn.ModuleDict)]
            holder, name = draw.choice(holders), draw.choice("abc")
            if name in holder and draw.random() < 0.5:
                del holder[name]  # and its address is free for the next module
            else:
                holder[name] = draw.choice([nn.Identity(), nn.ModuleDict(), draw.choice(list(model.modules()))])
            if len(holders) > 30 or _has_cycle(model):
                break
            if draw.random() < 0.7:
                assert is_current(model)


def _has_cycle(module: nn.Module, above: tuple[nn.Module, ...] = ()) -> bool:
    return module in above or any(_has_cycle(child, (*above, module)) for child in module._modules.values())


def test_a_copy_a_shallow_copy_and_a_wrapper_have_walks_of_their_own(model: nn.Module) -> None:
    for other in (copy.deepcopy(model), copy.copy(model), nn.Sequential(model)):
        assert is_current(other)
    layer = copy.deepcopy(model)
    layer[0].lower = nn.Linear(5, 6)
    assert is_current(layer)
    assert is_current(model)


def test_a_model_and_a_module_that_was_taken_out_are_freed_at_once(model: nn.Module) -> None:
    gc.disable()
    try:
        kept = weakref.ref(model[0].lower)
        model[0].lower = nn.Linear(5, 6)
        assert kept() is None
        routed = routed_tower()
        routed_layers(routed)
        root, layer = weakref.ref(routed), weakref.ref(routed.lower)
        del routed
        assert root() is None
        assert layer() is None
    finally:
        gc.enable()


def test_a_layer_that_was_put_back_or_taken_away_is_no_routed_layer_any_more() -> None:
    model = routed_tower()
    assert list(routed_layers(model)) == ["lower", "upper"]
    upper = model.upper
    model.upper = nn.Linear(6, 4).double()
    assert list(routed_layers(model)) == ["lower"]
    model.upper = upper
    assert routed_layers(model)["upper"] is upper
    gr.detach(model)
    with pytest.raises(GradRouteError, match="Found none"):
        routed_layers(model)
    with pytest.raises(GradRouteError, match="Found none"):
        routed_layers(model)  # what raised is not kept
    gr.attach(model, r=1, target_modules=["lower"])
    assert list(routed_layers(model)) == ["lower"]


def test_a_route_reaches_a_layer_that_replaced_another_between_two_routes() -> None:
    model, x = routed_tower(), torch.randn(2, 5, dtype=torch.float64)
    mask = gr.RouteMask.classic([True, True])
    for layer in (model.lower, copy.deepcopy(model.lower)):
        model.lower = layer
        with gr.route(model, mask):
            model(x).sum().backward()
        assert not layer.lora_B.grad.any()
        assert layer.lora_B_quarantine.grad.any()
        model.zero_grad()


def test_peft_is_checked_again_after_an_adapter_was_added_or_deleted() -> None:
    model = peft_model("llama")
    before = list(routed_layers(model))
    model.add_adapter("second", config(target_modules=["q_proj"]))
    assert list(routed_layers(model)) == before
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    assert list(routed_layers(model)) == before
    model.base_model.peft_config["second"].target_modules = {"q_proj", "o_porj"}
    model.delete_adapter("plain")
    with pytest.raises(TargetError, match="o_porj"):
        routed_layers(model)


def test_peft_is_checked_again_where_only_its_configs_changed() -> None:
    model = peft_model("llama")
    routed_layers(model)
    model.base_model.peft_config["other"] = config(target_modules=["q_proj"])
    with pytest.raises(TargetError, match="'other'"):
        routed_layers(model)


def test_routes_views_and_captures_do_not_walk_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = peft_model("llama"), token_ids()
    mask, pool = gr.RouteMask.classic([True, False, True]), torch.ones(3, 6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    directions = gr.extract_gradient_directions(model, PAIRS, features="parameter")
    by = gr.RolloutFilter(directions)
    gr.attach_filter(optimizer, by, model=model)
    refresher = gr.Refresher(directions, list, model=model, every=10**9)
    walks = []

    def step() -> None:
        with torch.no_grad(), gr.ablate_quarantine(model), gr.capture_activations(model, pool=pool) as capture:
            model(ids)
        with torch.no_grad(), gr.disable_adapters(model):
            model(ids)
        with gr.capture_gradients(model), by.record(model), gr.route(model, mask):
            model(ids).logits.sum().backward()
        assert capture.view == "ablated"
        optimizer.step()
        optimizer.zero_grad()
        refresher.step()

    step()
    walk = nn.Module.named_modules

    def counted(self: nn.Module, *args: object, **kwargs: object) -> object:
        if not args:  # and not below another walk
            walks.append(type(self).__name__)
        return walk(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counted)  # `modules()` calls it too
    step()
    assert not walks, walks
    model.add_adapter("second", config(target_modules=["q_proj"]))
    walks.clear()
    step()
    # Of the model, of what PEFT injected, to check it, and of each layer, for its dropouts.
    assert len(walks) == 2 + len(routed_layers(model))


PAIRS = [gr.ContrastivePair([3, 4], [20, 21], [22, 23]), gr.ContrastivePair([6, 7], [20, 25], [24, 26])]
