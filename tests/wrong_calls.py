"""Every public function, called wrongly in the ways that are likely, and the word that the message has to have.

Run as a program it prints each message: `python tests/wrong_calls.py`.
"""

import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import gradroute as gr


class Wrong(NamedTuple):
    """A call of one public function that must raise, and the words that its message needs to have."""

    function: str
    named: str
    call: Callable[[], Any]


class Tiny(nn.Module):
    """Embedding, two linears, head; called with token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.v = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.v(torch.tanh(self.q(self.embed(ids)))))


def ids_only(model: nn.Module, ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return model(ids)


torch.manual_seed(0)
MODEL = gr.attach(Tiny(), r=2, lora_alpha=4, target_modules=["q", "v"])
PLAIN = Tiny()
IDS = torch.randint(16, (4, 6))
POOL = torch.ones(4, 6)
PAIRS = [gr.ContrastivePair([1, 5], [7, 8], [9, 10]), gr.ContrastivePair([2, 3], [7, 12], [13, 14])]
FLAGS = torch.tensor([True, False, True, False])
MASK = gr.RouteMask.classic(FLAGS)
HACK = gr.extract_activation_directions(MODEL, PAIRS, forward_fn=ids_only)
GRADIENT = gr.extract_gradient_directions(MODEL, PAIRS, forward_fn=ids_only, features="parameter")
TRAINED = gr.attach(Tiny(), r=2, lora_alpha=4, target_modules=["q"])
with torch.no_grad():
    TRAINED.q.lora_B_quarantine.fill_(1.0)
OPTIMIZER = torch.optim.AdamW([p for p in MODEL.parameters() if p.requires_grad], lr=1e-3)
STRANGER = torch.optim.AdamW(PLAIN.parameters(), lr=1e-3)
RECORD = gr.EvalRecord("file", False, 0, True, False)
REPORT = gr.evaluate_on_off(MODEL, lambda _: [RECORD])
NAN = float("nan")


def extract() -> gr.Directions:
    return gr.extract_activation_directions(MODEL, PAIRS, forward_fn=ids_only)


def outcomes(k: int) -> gr.ModeOutcomes:
    return gr.ModeOutcomes(False, gr.Rate(k, 10), gr.Rate(1, 10), gr.Rate(5, 10))


ROUTE = gr.ArmRuns("route", {s: {"file": outcomes(9)} for s in range(3)})
SHUFFLE = gr.ArmRuns("shuffle", {s: {"file": outcomes(8)} for s in range(3)})
RANDOM = gr.ArmRuns("random", {s: {"file": outcomes(6)} for s in range(3)})
OTHER = gr.ArmRuns("shuffle", {s: {"stdout": outcomes(8)} for s in range(3)})


def entered(context: Any, body: Callable[[], Any] = lambda: None) -> Any:
    with context:
        return body()


def written(text: str, suffix: str = ".jsonl") -> Path:
    folder = Path(tempfile.mkdtemp())
    (folder / f"file{suffix}").write_text(text)
    return folder / f"file{suffix}"


def backward() -> None:
    MODEL.zero_grad()
    MODEL(IDS).square().mean().backward()


def empty_folder() -> str:
    return tempfile.mkdtemp()


def wrong_calls() -> Iterator[Wrong]:
    """All of them."""
    for function, table in TABLE.items():
        for named, call in table:
            yield Wrong(function, named, call)


NOT_A_MODEL: list[Any] = [None, "model", 3]
UNADAPTED = [*NOT_A_MODEL, PLAIN]

TABLE: dict[str, list[tuple[str, Callable[[], Any]]]] = {
    "attach": [
        ("q_porj", lambda: gr.attach(Tiny(), target_modules=["q_porj"])),
        ("embed", lambda: gr.attach(Tiny(), target_modules=["embed"])),
        ("`r`", lambda: gr.attach(Tiny(), r=0)),
        ("`lora_alpha`", lambda: gr.attach(Tiny(), lora_alpha=-1)),
        ("`model`", lambda: gr.attach(MODEL)),
        ("`model`", lambda: gr.attach("model")),
        ("`parametrization`", lambda: gr.attach(Tiny(), parametrization="dora")),
    ],
    "detach": [
        ("`model`", lambda: gr.detach(PLAIN)),
        ("`model`", lambda: gr.detach(None)),
        ("`model`", lambda: gr.detach(MODEL.q)),
        ("detach(model)", lambda: entered(gr.ablate_quarantine(MODEL), lambda: gr.detach(MODEL))),
        ("detach(model)", lambda: entered(gr.route(MODEL, MASK), lambda: gr.detach(MODEL))),
    ],
    "QuarantineLoRA": [
        ("`base_layer`", lambda: gr.QuarantineLoRA(nn.Conv1d(2, 2, 1), r=2, lora_alpha=4)),
        ("`r`", lambda: gr.QuarantineLoRA(nn.Linear(2, 2), r=1.5, lora_alpha=4)),
        ("`r_quarantine`", lambda: gr.QuarantineLoRA(nn.Linear(2, 2), r=1, r_quarantine=0, lora_alpha=4)),
        ("`lora_alpha`", lambda: gr.QuarantineLoRA(nn.Linear(2, 2), r=1, lora_alpha=math.inf)),
        ("`stop_gradient`", lambda: gr.QuarantineLoRA(nn.Linear(2, 2), r=1, lora_alpha=1, stop_gradient="output")),
    ],
    "SvdGain": [
        ("`base_layer`", lambda: gr.SvdGain(nn.Conv1d(2, 2, 1), r=2, lora_alpha=4)),
        ("`r`", lambda: gr.SvdGain(nn.Linear(2, 2), r=0, lora_alpha=4)),
        ("lower r", lambda: gr.SvdGain(nn.Linear(2, 2), r=5, lora_alpha=4)),
        ("`rotate", lambda: gr.SvdGain(nn.Linear(2, 2), r=1, lora_alpha=4, rotate=True)),
        ("`lora_alpha`", lambda: gr.SvdGain(nn.Linear(2, 2), r=1, lora_alpha=0)),
    ],
    "RouteMask": [
        ("`zones`", lambda: gr.RouteMask.zones(["keep", "rout"])),
        ("`zones`", lambda: gr.RouteMask.zones(torch.tensor([0, 3]))),
        ("`zones`", lambda: gr.RouteMask.zones(FLAGS)),
        ("`flags`", lambda: gr.RouteMask.classic(torch.tensor([0.2, 0.9]))),
        ("`g_d`", lambda: gr.RouteMask.weights(1.0, [1.0, NAN], 1.0)),
        ("`m`", lambda: gr.RouteMask.weights(1.0, 1.0, 1.0)),
        ("rows", lambda: gr.RouteMask.weights([1.0, 1.0], [1.0, 1.0, 1.0], 1.0)),
    ],
    "route": [
        ("`mask`", lambda: gr.route(MODEL, FLAGS)),
        ("`model`", lambda: gr.route(PLAIN, MASK)),
        ("`model`", lambda: gr.route("model", MASK)),
        ("mask of shape", lambda: entered(gr.route(MODEL, MASK), lambda: MODEL(IDS[:3]))),
        ("routed layers", lambda: entered(gr.route(MODEL, MASK))),
    ],
    "set_route": [
        ("`mask`", lambda: gr.set_route(MODEL, [True, False])),
        ("`model`", lambda: gr.set_route(PLAIN, MASK)),
        ("`model`", lambda: gr.set_route(None, MASK)),
        ("route", lambda: entered(gr.route(MODEL, MASK), lambda: gr.set_route(MODEL, MASK))),
        ("`mask`", lambda: gr.set_route(MODEL, None)),
    ],
    "clear_route": [
        ("clear_route", lambda: gr.clear_route(MODEL)),
        ("`model`", lambda: gr.clear_route(PLAIN)),
        ("`model`", lambda: gr.clear_route(None)),
        ("`model`", lambda: gr.clear_route(nn.Linear(2, 2))),
        ("route", lambda: entered(gr.route(MODEL, MASK), lambda: gr.clear_route(MODEL))),
    ],
    "ablate_quarantine": [
        ("`model`", lambda: gr.ablate_quarantine(PLAIN)),
        ("`model`", lambda: gr.ablate_quarantine(None)),
        ("`scale`", lambda: gr.ablate_quarantine(MODEL, 1.5)),
        ("`rows`", lambda: gr.ablate_quarantine(MODEL, rows=torch.tensor([0, 1]))),
        ("`scale`", lambda: gr.ablate_quarantine(MODEL, FLAGS)),
    ],
    "disable_adapters": [("`model`", lambda m=m: gr.disable_adapters(m)) for m in UNADAPTED],
    "deployed_parameters": [("`model`", lambda m=m: list(gr.deployed_parameters(m))) for m in UNADAPTED],
    "quarantine_parameters": [("`model`", lambda m=m: list(gr.quarantine_parameters(m))) for m in UNADAPTED],
    "parameter_summary": [("`model`", lambda m=m: gr.parameter_summary(m)) for m in UNADAPTED],
    "check_model": [("`model`", lambda model=m: gr.check_model(model)) for m in NOT_A_MODEL],
    "merge_deployed": [
        ("`model`", lambda: gr.merge_deployed(PLAIN)),
        ("`model`", lambda: gr.merge_deployed(None)),
        ("merge_deployed", lambda: entered(gr.ablate_quarantine(MODEL), lambda: gr.merge_deployed(MODEL))),
        ("merge_deployed", lambda: entered(gr.route(MODEL, MASK), lambda: gr.merge_deployed(MODEL))),
        ("merge_deployed", lambda: entered(gr.disable_adapters(MODEL), lambda: gr.merge_deployed(MODEL))),
    ],
    "export_deployed": [
        ("`model`", lambda: gr.export_deployed(PLAIN, empty_folder())),
        ("`model`", lambda: gr.export_deployed(None, empty_folder())),
        ("`path`", lambda: gr.export_deployed(MODEL, None)),
        ("`card`", lambda: gr.export_deployed(MODEL, empty_folder(), card="nowhere.md")),
        ("`path`", lambda: gr.export_deployed(MODEL, written("a file"))),
    ],
    "export_full": [
        ("`model`", lambda: gr.export_full(PLAIN, empty_folder())),
        ("`model`", lambda: gr.export_full(None, empty_folder())),
        ("`path`", lambda: gr.export_full(MODEL, None)),
        ("`path`", lambda: gr.export_full(MODEL, written("a file"))),
    ],
    "load_quarantined": [
        ("adapter_config.json", lambda: gr.load_quarantined(PLAIN, empty_folder())),
        ("adapter_config.json", lambda: gr.load_quarantined(PLAIN, "no/such/folder")),
        ("`model`", lambda: gr.load_quarantined(MODEL, empty_folder())),
        ("`model`", lambda: gr.load_quarantined(None, empty_folder())),
        ("`path`", lambda: gr.load_quarantined(PLAIN, None)),
    ],
    "QuarantineLoraConfig": [
        ("`r_quarantine`", lambda: gr.QuarantineLoraConfig(r=2, r_quarantine=0)),
        ("`use_dora=True`", lambda: gr.QuarantineLoraConfig(r=2, use_dora=True)),
        ("`bias='all'`", lambda: gr.QuarantineLoraConfig(r=2, bias="all")),
        ("`init_lora_weights`", lambda: gr.QuarantineLoraConfig(r=2, init_lora_weights="pissa")),
        ("`stop_gradient`", lambda: gr.QuarantineLoraConfig(r=2, stop_gradient="output")),
    ],
    "init": [
        ("`model`", lambda: gr.init.pissa_(PLAIN)),
        ("`model`", lambda: gr.init.gaussian_(None, seed=0)),
        ("`differences`", lambda: gr.init.signed_seed_(MODEL, {}, seed=0)),
        ("`differences`", lambda: gr.init.contrastive_covariance_(MODEL, {"p": torch.ones(2, 8)}, seed=0)),
        ("`niter`", lambda: gr.init.pissa_(MODEL, niter=-1)),
    ],
    "ContrastivePair": [
        ("`hack`", lambda: gr.ContrastivePair("a", "", "b")),
        ("`hack`", lambda: gr.ContrastivePair("a", "b", "b")),
        ("`prompt`", lambda: gr.ContrastivePair(3, "b", "c")),
        ("`clean`", lambda: gr.ContrastivePair("a", "b", [1.5])),
        ("`clean`", lambda: gr.ContrastivePair("a", "b", None)),
    ],
    "load_pairs": [
        ("nowhere.jsonl", lambda: gr.load_pairs("nowhere.jsonl")),
        ("prompt, hack, clean", lambda: gr.load_pairs(written('{"prompt": "a", "hacked": "b", "clean": "c"}'))),
        ("JSON", lambda: gr.load_pairs(written('{"prompt": '))),
        (".jsonl", lambda: gr.load_pairs(written("prompt,hack,clean", ".csv"))),
        ("at least one pair", lambda: gr.load_pairs(written(""))),
    ],
    "capture_activations": [
        ("`pool`", lambda: entered(gr.capture_activations(MODEL, pool=POOL[:, :5]), lambda: MODEL(IDS))),
        ("`pool`", lambda: entered(gr.capture_activations(MODEL, pool=None), lambda: MODEL(IDS))),
        ("`pool`", lambda: entered(gr.capture_activations(MODEL, pool=torch.zeros(4, 6)), lambda: MODEL(IDS))),
        ("`model`", lambda: entered(gr.capture_activations(PLAIN, pool=POOL), lambda: PLAIN(IDS))),
        ("`features`", lambda: entered(gr.capture_activations(MODEL, pool=POOL, features="hidden"))),
        ("captured module", lambda: entered(gr.capture_activations(MODEL, pool=POOL))),
        ("`modules`", lambda: entered(gr.capture_activations(MODEL, pool=POOL, modules=["k"]))),
    ],
    "capture_gradients": [
        ("captured module", lambda: entered(gr.capture_gradients(MODEL), lambda: MODEL(IDS))),
        ("`model`", lambda: entered(gr.capture_gradients(PLAIN), lambda: PLAIN(IDS))),
        ("`features`", lambda: entered(gr.capture_gradients(MODEL, features="hidden"))),
        ("gradients off",
         lambda: entered(torch.no_grad(), lambda: entered(gr.capture_gradients(MODEL), lambda: MODEL(IDS)))),
        ("`directions`", lambda: entered(gr.capture_gradients(MODEL, directions=GRADIENT))),
    ],
    "extract_activation_directions": [
        ("`tokenizer`", lambda: gr.extract_activation_directions(MODEL, [gr.ContrastivePair("a", "b", "c")])),
        ("`pairs`", lambda: gr.extract_activation_directions(MODEL, [])),
        ("`pairs`", lambda: gr.extract_activation_directions(MODEL, [("a", "b", "c")])),
        ("`model`", lambda: gr.extract_activation_directions(PLAIN, PAIRS, forward_fn=ids_only)),
        ("`estimator`", lambda: gr.extract_activation_directions(MODEL, PAIRS, estimator="pca", forward_fn=ids_only)),
        ("`batch_size`", lambda: gr.extract_activation_directions(MODEL, PAIRS, batch_size=0, forward_fn=ids_only)),
    ],
    "extract_gradient_directions": [
        ("B is zero", lambda: gr.extract_gradient_directions(MODEL, PAIRS, forward_fn=ids_only)),
        ("`forward_fn`", lambda: gr.extract_gradient_directions(MODEL, PAIRS, forward_fn=lambda *_: None)),
        ("`loss_fn`",
         lambda: gr.extract_gradient_directions(MODEL, PAIRS, forward_fn=ids_only, loss_fn=lambda *_: 0.0)),
        ("`pairs`", lambda: gr.extract_gradient_directions(MODEL, [], forward_fn=ids_only)),
        ("`model`", lambda: gr.extract_gradient_directions(PLAIN, PAIRS, forward_fn=ids_only)),
    ],
    "Directions": [
        ("`features`", lambda: HACK.score({"q": torch.zeros(2, 2)})),
        ("directions", lambda: gr.Directions.load(written("not safetensors", ".safetensors"))),
        ("nowhere", lambda: gr.Directions.load("nowhere.safetensors")),
        ("`labels`", lambda: HACK.validate(torch.zeros(4), torch.ones(4, dtype=torch.bool))),
        ("`fresh`", lambda: HACK.update_(HACK, step=1)),
        ("control", lambda: HACK.random_like(0).random_like(1)),
    ],
    "DirectionCache": [
        ("`extractor`",
         lambda: gr.DirectionCache(empty_folder()).extract(lambda model, pairs: extract(), MODEL, PAIRS)),
        ("`pairs`", lambda: gr.DirectionCache(empty_folder()).extract(gr.extract_activation_directions, MODEL, [])),
        ("`model`", lambda: gr.DirectionCache(empty_folder()).extract(gr.extract_activation_directions, PLAIN, PAIRS)),
        ("`forward_fn`", lambda: gr.DirectionCache(empty_folder()).extract(
            gr.extract_activation_directions, MODEL, PAIRS, forward_fn=lambda model, ids, mask: model(ids))),
        ("`folder`", lambda: gr.DirectionCache(None)),
    ],
    "shuffled_flags": [
        ("`flags`", lambda: gr.shuffled_flags(torch.tensor([0.5, 0.1]), seed=0)),
        ("`flags`", lambda: gr.shuffled_flags([True, False], seed=0)),
        ("`group_size`", lambda: gr.shuffled_flags(FLAGS, seed=0, group_size=3)),
        ("`group_size`", lambda: gr.shuffled_flags(FLAGS, seed=0, group_size=0)),
    ],
    "MeanDifference": [("`n_heldout`", lambda: gr.MeanDifference(n_heldout=2)(HACK.hack, HACK.clean))],
    "TStatistic": [("`clamp`", lambda: gr.TStatistic(clamp=-1.0)(HACK.hack, HACK.clean))],
    "Svd": [
        ("`k`", lambda: gr.Svd(k=0)(HACK.hack, HACK.clean)),
        ("`k`", lambda: gr.Svd(k=9)(HACK.hack, HACK.clean)),
        ("`axis_floor`", lambda: gr.Svd(axis_floor=2.0)(HACK.hack, HACK.clean)),
    ],
    "Ridge": [("`penalty`", lambda: gr.Ridge(penalty=-1.0)(HACK.hack, HACK.clean))],
    "BandGate": [
        ("`directions`", lambda: gr.BandGate("hack")),
        ("`threshold`", lambda: gr.BandGate(HACK, threshold=NAN)),
        ("`below`", lambda: gr.BandGate(HACK, below="drop")),
        ("`threshold`", lambda: gr.BandGate(HACK, soft=True, threshold=0.5)),
        ("`scores`", lambda: gr.BandGate(HACK)(torch.tensor([0.0, NAN]))),
        ("`scores`", lambda: gr.BandGate(HACK)([0.1, 0.2])),
    ],
    "ThresholdGate": [
        ("`threshold`", lambda: gr.ThresholdGate("high")),
        ("`below`", lambda: gr.ThresholdGate(0.0, below="drop")),
        ("`window`", lambda: gr.ThresholdGate(0.0, window=0)),
        ("`scores`", lambda: gr.ThresholdGate(0.0)(torch.tensor([NAN]))),
        ("`scores`", lambda: gr.ThresholdGate(0.0)([0.1, 0.2])),
    ],
    "LabelGate": [
        ("`flags`", lambda: gr.LabelGate()(torch.tensor([0.0, 1.0]))),
        ("`flags`", lambda: gr.LabelGate()([True, False])),
        ("`recall`", lambda: gr.LabelGate(recall=50)),
        ("`false_positive_rate`", lambda: gr.LabelGate(false_positive_rate=-0.1)),
        ("`below`", lambda: gr.LabelGate(below="route")),
    ],
    "QuantileGate": [
        ("`features`", lambda: gr.QuantileGate(HACK)(torch.zeros(4))),
        ("`tails`", lambda: gr.QuantileGate(HACK, tails=(0.9, 0.1))),
        ("`directions`", lambda: gr.QuantileGate(None)),
        ("`half_life`", lambda: gr.QuantileGate(HACK, half_life=0)),
        ("`warm_up`", lambda: gr.QuantileGate(HACK, warm_up=100, capacity=10)),
    ],
    "Refresher": [
        ("`directions`", lambda: gr.Refresher(None, extract, model=MODEL)),
        ("`extract`", lambda: gr.Refresher(HACK, HACK, model=MODEL)),
        ("`every`", lambda: gr.Refresher(HACK, extract, model=MODEL, every=0)),
        ("`every`", lambda: gr.Refresher(HACK, extract, model=MODEL, every=None)),
        ("`model`", lambda: gr.Refresher(HACK, extract, model=PLAIN)),
        ("`extract`", lambda: gr.Refresher(HACK, lambda: None, model=MODEL).refresh()),
        ("`watched`", lambda: gr.Refresher(HACK, extract, model=MODEL).watch("optimizer")),
    ],
    "clean_baseline_advantages": [
        ("`rewards`", lambda: gr.clean_baseline_advantages(torch.zeros(4), FLAGS, 3)),
        ("`group_size`", lambda: gr.clean_baseline_advantages(torch.zeros(4), FLAGS, 1)),
        ("`rewards`", lambda: gr.clean_baseline_advantages(torch.full((4,), NAN), FLAGS, 2)),
        ("flagged", lambda: gr.clean_baseline_advantages(torch.zeros(4), torch.zeros(4), 2)),
        ("flagged", lambda: gr.clean_baseline_advantages(torch.zeros(4), FLAGS[:3], 2)),
    ],
    "graft_mask": [
        ("`flagged`", lambda: gr.graft_mask(torch.zeros(4))),
        ("`strength`", lambda: gr.graft_mask(FLAGS, strength=-1)),
        ("`sizes`", lambda: gr.graft_mask(FLAGS, sizes=(0, 1))),
        ("`cap`", lambda: gr.graft_mask(FLAGS, cap=0.5)),
        ("`scheme`", lambda: gr.graft_mask(FLAGS, scheme="clasic")),
    ],
    "sgtm_mask": [
        ("`forget`", lambda: gr.sgtm_mask(torch.zeros(4))),
        ("`forget`", lambda: gr.sgtm_mask([True, False])),
        ("`unlabelled`", lambda: gr.sgtm_mask(FLAGS, FLAGS)),
        ("`unlabelled`", lambda: gr.sgtm_mask(FLAGS, torch.zeros(4))),
        ("`unlabelled`", lambda: gr.sgtm_mask(FLAGS, FLAGS[:2])),
    ],
    "expand_route_ablate_mask": [
        ("`forget`", lambda: gr.expand_route_ablate_mask(torch.zeros(4))),
        ("`forget`", lambda: gr.expand_route_ablate_mask([True])),
        ("`old_rate`", lambda: gr.expand_route_ablate_mask(FLAGS, old_rate=NAN)),
    ],
    "detach_mix_mask": [
        ("`g_d`", lambda: gr.detach_mix_mask(torch.tensor([NAN]), torch.ones(1))),
        ("rows", lambda: gr.detach_mix_mask(torch.ones(2), torch.ones(3))),
        ("`g_d`", lambda: gr.detach_mix_mask(None, torch.ones(3))),
    ],
    "ProjectionFilter": [
        ("`directions`", lambda: gr.ProjectionFilter(None, mode="erase")),
        ("`mode`", lambda: gr.ProjectionFilter(GRADIENT, mode="remove")),
        ("`side`", lambda: gr.ProjectionFilter(GRADIENT, mode="erase", side="left")),
        ("`overshoot`", lambda: gr.ProjectionFilter(GRADIENT, mode="erase", overshoot=0)),
        ("`preserve_magnitude", lambda: gr.ProjectionFilter(GRADIENT, mode="route", preserve_magnitude=True)),
    ],
    "RolloutFilter": [
        ("`directions`", lambda: gr.RolloutFilter(HACK)),
        ("`directions`", lambda: gr.RolloutFilter(None)),
        ("`gate`", lambda: gr.RolloutFilter(GRADIENT, "positive")),
        ("`score`", lambda: gr.RolloutFilter(GRADIENT, score="cos")),
        ("record", lambda: gr.apply_filter(MODEL, gr.RolloutFilter(GRADIENT))),
    ],
    "apply_filter": [
        ("gradient",
         lambda: (MODEL.zero_grad(), gr.apply_filter(MODEL, gr.ProjectionFilter(GRADIENT, mode="measure")))),
        ("`model`", lambda: gr.apply_filter(PLAIN, gr.ProjectionFilter(GRADIENT, mode="measure"))),
        ("`f`", lambda: gr.apply_filter(MODEL, GRADIENT)),
        ("`model`", lambda: gr.apply_filter(None, gr.ProjectionFilter(GRADIENT, mode="measure"))),
        ("filter", lambda: (backward(), [gr.apply_filter(MODEL, ERASE) for _ in range(2)])),
    ],
    "attach_filter": [
        ("`f`", lambda: gr.attach_filter(OPTIMIZER, GRADIENT, model=MODEL)),
        ("`model`", lambda: gr.attach_filter(OPTIMIZER, ERASE, model=PLAIN)),
        ("`optimizer`", lambda: gr.attach_filter(STRANGER, ERASE, model=MODEL)),
        ("`optimizer`", lambda: gr.attach_filter(None, ERASE, model=MODEL)),
        ("`model`", lambda: gr.attach_filter(OPTIMIZER, ERASE, model=None)),
    ],
    "audit_updates": [
        ("`optimizer`", lambda: gr.audit_updates(MODEL, None)),
        ("`model`", lambda: gr.audit_updates(PLAIN, OPTIMIZER)),
        ("step", lambda: entered(gr.audit_updates(MODEL, OPTIMIZER))),
        ("step", lambda: gr.audit_updates(MODEL, OPTIMIZER).read()),
        ("`directions`", lambda: gr.audit_updates(MODEL, OPTIMIZER, "hack")),
    ],
    "project_updates": [
        ("`optimizer`", lambda: gr.project_updates(MODEL, None, GRADIENT)),
        ("`model`", lambda: gr.project_updates(PLAIN, OPTIMIZER, GRADIENT)),
        ("`side`", lambda: gr.project_updates(MODEL, OPTIMIZER, GRADIENT, side="left")),
        ("`directions`", lambda: gr.project_updates(MODEL, OPTIMIZER, None)),
    ],
    "purge_moments": [
        ("`optimizer`", lambda: gr.purge_moments(MODEL, None, GRADIENT)),
        ("`model`", lambda: gr.purge_moments(PLAIN, OPTIMIZER, GRADIENT)),
        ("`side`", lambda: gr.purge_moments(MODEL, OPTIMIZER, GRADIENT, side="left")),
        ("`directions`", lambda: gr.purge_moments(MODEL, OPTIMIZER, None)),
        ("moment", lambda: gr.purge_moments(MODEL, OPTIMIZER, GRADIENT)),
    ],
    "decay_toward_start": [
        ("`weight_decay`", lambda: gr.decay_toward_start(MODEL, OPTIMIZER, -0.1)),
        ("`optimizer`", lambda: gr.decay_toward_start(MODEL, None, 0.1)),
        ("`model`", lambda: gr.decay_toward_start(PLAIN, OPTIMIZER, 0.1)),
        ("weight_decay", lambda: gr.decay_toward_start(MODEL, OPTIMIZER, 0.1)),
    ],
    "skip_idle_blocks": [
        ("`optimizer`", lambda: gr.skip_idle_blocks(MODEL, None)),
        ("`model`", lambda: gr.skip_idle_blocks(PLAIN, OPTIMIZER)),
        ("`optimizer`", lambda: gr.skip_idle_blocks(MODEL, STRANGER)),
    ],
    "assert_ablation_reaches": [
        ("`model`", lambda: gr.assert_ablation_reaches(PLAIN, lambda _: ["text"])),
        ("`model`", lambda: entered(
            gr.ablate_quarantine(MODEL), lambda: gr.assert_ablation_reaches(MODEL, lambda _: ["text"]))),
        ("quarantine", lambda: gr.assert_ablation_reaches(gr.attach(Tiny()), lambda _: ["text"])),
        ("`generate_fn`", lambda: gr.assert_ablation_reaches(TRAINED, lambda _: ["text"])),
        ("`generate_fn`", lambda: gr.assert_ablation_reaches(TRAINED, lambda _: "text")),
    ],
    "evaluate_on_off": [
        ("`eval_fn`", lambda: gr.evaluate_on_off(MODEL, lambda _: [])),
        ("`eval_fn`", lambda: gr.evaluate_on_off(MODEL, lambda _: 0.3)),
        ("`eval_fn`", lambda: gr.evaluate_on_off(MODEL, lambda _: [{"hacked": True}])),
        ("`model`", lambda: gr.evaluate_on_off(PLAIN, lambda _: [RECORD])),
        ("`model`",
         lambda: entered(gr.ablate_quarantine(MODEL), lambda: gr.evaluate_on_off(MODEL, lambda _: [RECORD]))),
    ],
    "dose_curve": [
        ("`scales`", lambda: gr.dose_curve(MODEL, lambda _: [RECORD], scales=(0.0, 2.0))),
        ("`scales`", lambda: gr.dose_curve(MODEL, lambda _: [RECORD], scales=(1.0,))),
        ("`eval_fn`", lambda: gr.dose_curve(MODEL, lambda _: [])),
        ("`model`", lambda: gr.dose_curve(PLAIN, lambda _: [RECORD])),
        ("`model`", lambda: entered(gr.ablate_quarantine(MODEL), lambda: gr.dose_curve(MODEL, lambda _: [RECORD]))),
    ],
    "plot_training": [
        ("`reports`", lambda: gr.plot_training({})),
        ("`reports`", lambda: gr.plot_training([REPORT])),
        ("`reports`", lambda: gr.plot_training({0: 0.3})),
        ("`group`", lambda: gr.plot_training({0: REPORT}, group="heldout")),
        ("`group`", lambda: gr.plot_training({0: REPORT}, group="monitored")),
    ],
    "write_card": [
        ("`report`", lambda: gr.write_card(MODEL, 0.3, empty_folder(), routed_by="labels", masks="classic")),
        ("`masks`", lambda: gr.write_card(MODEL, REPORT, empty_folder(), routed_by="labels")),
        ("`routed_by`", lambda: gr.write_card(MODEL, REPORT, empty_folder(), routed_by=0.5)),
        ("`model`", lambda: gr.write_card(PLAIN, REPORT, empty_folder(), routed_by="labels", masks="classic")),
        ("`caveats`", lambda: gr.write_card(
            MODEL, REPORT, empty_folder(), routed_by="labels", masks="classic", caveats="one")),
    ],
    "Rate": [
        ("`k`", lambda: gr.Rate(3, 2)),
        ("`k`", lambda: gr.Rate(0.5, 2)),
        ("`value`", lambda: gr.Rate.from_value(0.333, 10)),
    ],
    "ModeOutcomes": [
        ("Rate", lambda: gr.ModeOutcomes(True, 0.5, 0.1, 0.3)),
        ("n of", lambda: gr.ModeOutcomes(True, gr.Rate(1, 2), gr.Rate(1, 3), gr.Rate(1, 2))),
        ("`prompts`", lambda: gr.ModeOutcomes(True, gr.Rate(1, 2), gr.Rate(1, 2), gr.Rate(1, 2), {})),
    ],
    "ArmRuns": [
        ("`runs`", lambda: gr.ArmRuns("route", {})),
        ("`runs`", lambda: gr.ArmRuns("route", {0: REPORT})),
        ("`name`", lambda: gr.ArmRuns("", {0: {"file": outcomes(9)}})),
        ("report", lambda: gr.ArmRuns.from_reports("route", {0: gr.OnOffReport(REPORT.on, REPORT.ablated)})),
        ("modes", lambda: gr.ArmRuns("route", {0: {"file": outcomes(9)}, 1: {"stdout": outcomes(9)}})),
    ],
    "Controls": [
        ("`controls`", lambda: gr.Controls("shuffle")),
        ("`controls`", lambda: gr.Controls(SHUFFLE, ["random"])),
    ],
    "Criteria": [
        ("`effect`", lambda: gr.Criteria(effect=0.0)),
        ("`level`", lambda: gr.Criteria(level=95)),
        ("`over`", lambda: gr.Criteria(over="runs")),
        ("`power`", lambda: gr.Criteria(power=0.0)),
        ("`margin`", lambda: gr.Criteria(margin="small")),
    ],
    "compare": [
        ("modes", lambda: gr.compare(ROUTE, gr.Controls(OTHER))),
        ("name", lambda: gr.compare(ROUTE, gr.Controls(ROUTE))),
        ("`controls.random`", lambda: gr.compare(ROUTE, gr.Controls(SHUFFLE, [RANDOM]))),
        ("`modes`", lambda: gr.compare(ROUTE, gr.Controls(SHUFFLE), modes="monitored")),
        ("`resamples`", lambda: gr.compare(ROUTE, gr.Controls(SHUFFLE), resamples=1)),
    ],
    "compare_all": [
        ("`contests`", lambda: gr.compare_all([])),
        ("`contests`", lambda: gr.compare_all([(ROUTE, gr.Controls(SHUFFLE))] * 2)),
        ("`resamples`", lambda: gr.compare_all([(ROUTE, gr.Controls(SHUFFLE))], resamples=0)),
    ],
}  # fmt: skip
ERASE = gr.ProjectionFilter(GRADIENT, mode="erase")


def answers() -> Iterator[dict[str, str]]:
    """What each call raised."""
    for wrong in wrong_calls():
        kind, message = "nothing", ""
        try:
            wrong.call()
        except Exception as error:
            kind, message = type(error).__name__, str(error)
        yield {"function": wrong.function, "named": wrong.named, "type": kind, "message": message}


def reprs() -> tuple[list[str], list[str]]:
    """Those of public objects that are lines, and those that are tables."""
    with torch.no_grad(), gr.capture_activations(MODEL, pool=POOL) as acts:
        MODEL(IDS)
    backward()
    stats = gr.apply_filter(MODEL, ERASE)
    with gr.audit_updates(MODEL, OPTIMIZER) as audits:
        OPTIMIZER.step()
        audit = audits.read()
    refresher = gr.Refresher(HACK, extract, model=MODEL, every=5)
    validation = HACK.validate(torch.tensor([2.0, 1.0]), torch.tensor([True, False]))
    lines: list[Any] = [
        MASK, HACK, HACK.provenance, acts, stats, audit, audits, refresher, refresher.refresh(), ERASE, PAIRS[0],
        gr.RolloutFilter(GRADIENT), gr.RolloutFilter(GRADIENT, lambda scores: scores > 0), gr.BandGate(HACK),
        gr.ThresholdGate(0.5), gr.LabelGate(), gr.QuantileGate(HACK), gr.Rate(1, 2), RECORD, ROUTE, gr.Criteria(),
        gr.Controls(SHUFFLE), gr.Controls(SHUFFLE, [RANDOM]), gr.Svd(k=2), gr.Ridge(), gr.MeanDifference(),
        gr.TStatistic(), gr.DirectionCache("directions"), gr.parameter_summary(MODEL), outcomes(3), validation,
        gr.check_model(MODEL), gr.check_model(nn.MultiheadAttention(4, 2)),
    ]  # fmt: skip
    tables = [REPORT, HACK.summary(), gr.dose_curve(MODEL, lambda _: [RECORD])]
    return [repr(each) for each in lines], [repr(each) for each in tables]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found = list(answers())
    if "--json" in sys.argv:
        as_lines, as_tables = reprs()
        print(json.dumps({"answers": found, "lines": as_lines, "tables": as_tables}))
    else:
        for each in found:
            print(f"{each['function']} ({each['named']}): {each['type']}: {each['message']}")
