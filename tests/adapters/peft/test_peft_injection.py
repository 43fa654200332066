"""Roads by which PEFT puts an adapter into a model without its wrapper; meta-device loading; directions and gates."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from support.language_models import PAIRS as MIXER_PAIRS
from support.models import randomize_blocks
from support.peft_cases import (
    ATTENTION,
    Case,
    X,
    assert_near,
    assert_same_tensors,
    assert_views_equal,
    both_blocks_train,
    far,
    logits,
    tensors_of,
    unnamed_base,
    views,
)
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

import gradroute as gr
from gradroute._protocol import routed_layers

pytestmark = [pytest.mark.touches_peft, unnamed_base]


def transformers_takes_this_peft() -> bool:
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError:
        return False
    return True


# transformers 5.24 asks for peft 0.22, which is newer than the newest that is tested here.
by_transformers = pytest.mark.skipif(
    not transformers_takes_this_peft(), reason=f"transformers' own adapters need peft >= {MIN_PEFT_VERSION}"
)
CASES = [
    Case("llama"),
    Case("gpt2", options={"rank_pattern": {"c_attn": 5}, "use_rslora": True}),
    Case("moe", torch.bfloat16),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def injected(case: Case) -> nn.Module:
    model = inject_adapter_in_model(case.config(), case.base())
    assert torch.equal(logits(model), logits(case.base()))
    return randomize_blocks(model, std=0.2).eval()


def added(case: Case) -> nn.Module:
    model = case.base()
    model.add_adapter(case.config())
    assert torch.equal(logits(model), logits(case.base()))
    return randomize_blocks(model, std=0.2).eval()


each_road = pytest.mark.parametrize(
    "road",
    [
        pytest.param(injected, id="inject_adapter_in_model"),
        pytest.param(added, id="add_adapter", marks=by_transformers),
    ],
)
Road = Callable[[Case], nn.Module]


@each_case
@each_road
def test_an_injected_adapter_computes_what_a_wrapped_one_does(case: Case, road: Road) -> None:
    model = road(case)
    assert not isinstance(model, PeftModel)
    assert both_blocks_train(model)
    assert_views_equal(model, case.views())


@each_road
def test_a_routed_step_trains_one_block_of_an_injected_adapter(road: Road) -> None:
    model = road(CASES[0]).train()
    before = tensors_of(model)
    with gr.route(model, gr.RouteMask.zones(["route"] * len(X))):
        model(X, labels=X).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    after = tensors_of(model)
    assert all(torch.equal(after[name], before[name]) for name, _ in gr.deployed_parameters(model))
    assert not any(torch.equal(after[name], before[name]) for name, _ in gr.quarantine_parameters(model))


@each_case
def test_the_state_dict_of_an_injected_adapter_goes_into_a_new_one(case: Case) -> None:
    state = get_peft_model_state_dict(injected(case))
    assert len([name for name in state if "quarantine" in name]) == len(state) / 2
    for options in ({}, {"low_cpu_mem_usage": True}, {"state_dict": state}):
        model = inject_adapter_in_model(case.config(), case.base(), **options)
        meta = {p.device.type for _, p in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]}
        assert meta == ({"meta"} if "low_cpu_mem_usage" in options else {"cpu"})
        set_peft_model_state_dict(model, state, low_cpu_mem_usage="low_cpu_mem_usage" in options)
        assert_views_equal(model.eval(), case.views())
        assert both_blocks_train(model)


@each_case
def test_from_pretrained_by_way_of_the_meta_device_restores_both_blocks(case: Case, tmp_path: Path) -> None:
    case.model().save_pretrained(tmp_path)
    config = gr.QuarantineLoraConfig.from_pretrained(tmp_path)
    options = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": False}
    loaded = PeftModel.from_pretrained(case.base(), tmp_path, config=config, **options)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert_views_equal(loaded, case.views())


# transformers' own methods


@by_transformers
def test_transformers_saves_both_blocks_and_loads_them_with_our_config(tmp_path: Path) -> None:
    case = CASES[0]
    added(case).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len([name for name in saved if "quarantine" in name]) == len(saved) / 2
    assert_views_equal(gr.load_quarantined(case.base(), tmp_path).eval(), case.views())
    for is_trainable in (True, False):
        model, config = case.base(), gr.QuarantineLoraConfig.from_pretrained(tmp_path)
        model.load_adapter(tmp_path, peft_config=config, is_trainable=is_trainable)
        assert_views_equal(model.eval(), case.views())
        both = [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]
        assert {p.requires_grad for _, p in both} == {is_trainable}


@by_transformers
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")
def test_transformers_alone_loads_the_deployed_block(tmp_path: Path) -> None:
    case = CASES[0]
    added(case).save_pretrained(tmp_path)
    model = case.base()
    model.load_adapter(tmp_path)
    assert not [name for name in tensors_of(model) if "quarantine" in name]
    assert torch.equal(logits(model), case.views().ablated)


@by_transformers
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model:UserWarning")
def test_transformers_switches_keep_both_blocks() -> None:
    case = CASES[0]
    model = added(case)
    model.disable_adapters()
    assert torch.equal(logits(model), case.views().base)
    model.enable_adapters()
    assert both_blocks_train(model)
    assert_views_equal(model, case.views())
    model.add_adapter(case.config(), "second")
    assert model.active_adapters() == ["second"]
    randomize_blocks(model, seed=1, std=0.2)
    assert far(logits(model), case.views().on)
    model.set_adapter("default")
    assert both_blocks_train(model)
    model.delete_adapter("second")
    assert not [name for name in tensors_of(model) if "second" in name]
    assert_views_equal(model, case.views())


# Directions, gates and evaluation, as on an attached model of the same parameters

PAIRS = [gr.ContrastivePair([t + 3 for t in p.prompt], p.hack, p.clean) for p in MIXER_PAIRS]


def attached_and_peft() -> tuple[nn.Module, nn.Module]:
    """The same base weights and blocks, once by `attach` and once by `get_peft_model`."""
    case = Case("llama", options={"target_modules": ATTENTION})
    model = case.model()
    attached = gr.attach(case.base(), r=3, r_quarantine=4, lora_alpha=6, target_modules=ATTENTION)
    theirs = {base_name(name).replace(".default.weight", ""): p for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in [*gr.deployed_parameters(attached), *gr.quarantine_parameters(attached)]:
            parameter.copy_(theirs[name])
    for mine, wanted in zip(views(attached.eval()), case.views(), strict=True):
        assert_near(mine, wanted)
    return attached, model


def base_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


def assert_same_directions(ours: gr.Directions, expected: gr.Directions) -> None:
    assert [base_name(name) for name in ours.rows] == list(expected.rows)
    for found, wanted in ((ours.rows, expected.rows), (ours.hack, expected.hack), (ours.clean, expected.clean)):
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[base_name(name)], rtol=1e-4, atol=1e-6)
    assert ours.provenance == expected.provenance


@pytest.mark.parametrize("view", ["on", "ablated"])
@pytest.mark.parametrize(
    "extract", [gr.extract_activation_directions, gr.extract_gradient_directions], ids=["activation", "gradient"]
)
def test_directions_and_gates_are_those_of_an_attached_model(extract: Callable[..., gr.Directions], view: str) -> None:
    found = []
    for model in attached_and_peft():
        before = tensors_of(model)
        with gr.ablate_quarantine(model, scale=float(view == "on")):
            directions = extract(model, PAIRS)
            with torch.no_grad(), gr.capture_activations(model, pool=torch.ones_like(X)) as acts:
                model(X)
        assert_same_tensors(tensors_of(model), before)
        assert directions.provenance.view == view
        gate = gr.BandGate(directions)
        scores = directions.score(acts if extract is gr.extract_activation_directions else directions.hack)
        found.append((directions, gate, scores, gate(scores)))
    (expected, gate, scores, mask), (ours, our_gate, our_scores, our_mask) = found
    assert_same_directions(ours, expected)
    assert our_gate.ends == pytest.approx(gate.ends, rel=1e-4)
    torch.testing.assert_close(our_scores, scores, rtol=1e-4, atol=1e-6)
    assert torch.equal(our_mask.routed, mask.routed)


def test_the_quarantine_changes_what_is_extracted() -> None:
    _, model = attached_and_peft()
    on = gr.extract_activation_directions(model, PAIRS)
    with gr.ablate_quarantine(model):
        ablated = gr.extract_activation_directions(model, PAIRS)
    assert on.overlap(ablated) < 0.999


def test_a_refresh_follows_a_peft_model_as_it_does_an_attached_one() -> None:
    reports = []
    for model in attached_and_peft():
        with gr.ablate_quarantine(model):
            directions = gr.extract_activation_directions(model, PAIRS)
        refresher = gr.Refresher(
            directions, lambda model=model: gr.extract_activation_directions(model, PAIRS), model=model, every=2
        )
        assert refresher.step() is None
        with torch.no_grad():
            for _, parameter in gr.deployed_parameters(model):
                parameter.add_(0.1)
        reports.append((refresher.step(), directions))
    (expected, directions), (report, ours) = reports
    assert (report.step, report.age, report.moved, report.version) == (2, 2, True, 1)
    assert report.overlap == pytest.approx(expected.overlap, abs=1e-5)
    assert report.overlap < 0.999
    assert_same_directions(ours, directions)


def test_a_refresh_that_moved_nothing_but_the_quarantine_says_so() -> None:
    _, model = attached_and_peft()
    with gr.ablate_quarantine(model):
        directions = gr.extract_activation_directions(model, PAIRS)
    refresher = gr.Refresher(directions, lambda: gr.extract_activation_directions(model, PAIRS), model=model, every=1)
    with torch.no_grad():
        for _, parameter in gr.quarantine_parameters(model):
            parameter.add_(0.1)
    assert not refresher.step().moved


def test_an_evaluation_sees_the_on_and_the_ablated_view() -> None:
    seen: dict[str, list[torch.Tensor]] = {"attached": [], "peft": []}

    def record(name: str) -> Callable[[nn.Module], list[gr.EvalRecord]]:
        def evaluate(model: nn.Module) -> list[gr.EvalRecord]:
            seen[name].append(logits(model))
            hacked = bool(seen[name][-1].sum() > seen[name][0].sum() - 1e-3)
            return [gr.EvalRecord("exploit", True, 0, hacked=hacked, solved=True)]

        return evaluate

    attached, model = attached_and_peft()
    model.train()
    reports = [
        gr.evaluate_on_off(attached, record("attached")),
        gr.evaluate_on_off(model, record("peft")),
    ]
    expected = Case("llama", options={"target_modules": ATTENTION}).views()
    assert torch.equal(seen["peft"][0], expected.on)
    assert torch.equal(seen["peft"][1], expected.ablated)
    assert repr(reports[0]) == repr(reports[1])
    assert model.training


def test_a_capture_names_modules_as_the_model_does() -> None:
    _, model = attached_and_peft()
    with torch.no_grad(), gr.capture_activations(model, pool=torch.ones_like(X)) as acts:
        model(X)
    assert list(acts) == list(routed_layers(model))
    name, layer = next(iter(routed_layers(model).items()))
    twice = copy.deepcopy(model)
    with torch.no_grad(), gr.capture_activations(twice, pool=torch.ones_like(X), modules=[name]) as one:
        twice(X)
    assert acts[name].shape == (len(X), len(layer.deployed.A))
    assert torch.equal(one[name], acts[name])


def test_what_a_wrapper_holds_under_an_earlier_name_is_checked_too() -> None:
    plain = {"r": 2, "target_modules": ["q_proj"]}
    routed = {"r": 2, "lora_alpha": 4, "target_modules": r".*layers\.\d+\.self_attn\.(q_proj|v_proj)"}
    model = get_peft_model(Case("llama").base(), LoraConfig(**plain), adapter_name="first")
    model.add_adapter("second", gr.QuarantineLoraConfig(**routed))
    model.set_adapter("second")

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = model.get_base_model().model.layers
            self.peft = model

    for wrapped in (model, Wrapper()):
        with pytest.raises(gr.errors.TargetError, match="Found plain LoRA"):
            routed_layers(wrapped)
