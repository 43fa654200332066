"""Wrong calls of what is done to a model: blocks, routes, views, merging, files, initialisations."""

import math
from typing import Any

import torch
from torch import nn

import gradroute as gr
from support.call_arguments import FLAGS, IDS, MASK, MODEL, NAN, PLAIN, Calls, Tiny, empty_folder, entered, written

NOT_A_MODEL: list[Any] = [None, "model", 3]
UNADAPTED = [*NOT_A_MODEL, PLAIN]

MODEL_CALLS: Calls = {
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
        ("`base_layer`", lambda: gr.adapters.SvdGain(nn.Conv1d(2, 2, 1), r=2, lora_alpha=4)),
        ("`r`", lambda: gr.adapters.SvdGain(nn.Linear(2, 2), r=0, lora_alpha=4)),
        ("lower r", lambda: gr.adapters.SvdGain(nn.Linear(2, 2), r=5, lora_alpha=4)),
        ("`rotate", lambda: gr.adapters.SvdGain(nn.Linear(2, 2), r=1, lora_alpha=4, rotate=True)),
        ("`lora_alpha`", lambda: gr.adapters.SvdGain(nn.Linear(2, 2), r=1, lora_alpha=0)),
    ],
    "PendingMask": [
        ("`rows`", lambda: gr.adapters.PendingMask.on(2.5)),
        ("`m`", lambda: gr.adapters.PendingMask(torch.tensor([1, 1]))),
        ("`m`", lambda: gr.adapters.PendingMask([1.0, 1.0])),
        ("`mask`", lambda: gr.adapters.PendingMask.on(4).decide(FLAGS)),
        ("`mask`", lambda: gr.adapters.PendingMask.on(4).decide(gr.RouteMask.exclusive([True, False, False, True]))),
        ("`mask`", lambda: gr.adapters.PendingMask.on(4).decide(gr.RouteMask.classic([True]))),
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
        ("`mask`", lambda: gr.adapters.set_route(MODEL, [True, False])),
        ("`model`", lambda: gr.adapters.set_route(PLAIN, MASK)),
        ("`model`", lambda: gr.adapters.set_route(None, MASK)),
        ("route", lambda: entered(gr.route(MODEL, MASK), lambda: gr.adapters.set_route(MODEL, MASK))),
        ("`mask`", lambda: gr.adapters.set_route(MODEL, None)),
    ],
    "clear_route": [
        ("clear_route", lambda: gr.adapters.clear_route(MODEL)),
        ("`model`", lambda: gr.adapters.clear_route(PLAIN)),
        ("`model`", lambda: gr.adapters.clear_route(None)),
        ("`model`", lambda: gr.adapters.clear_route(nn.Linear(2, 2))),
        ("route", lambda: entered(gr.route(MODEL, MASK), lambda: gr.adapters.clear_route(MODEL))),
    ],
    "ablate_quarantine": [
        ("`model`", lambda: gr.ablate_quarantine(PLAIN)),
        ("`model`", lambda: gr.ablate_quarantine(None)),
        ("`scale`", lambda: gr.ablate_quarantine(MODEL, 1.5)),
        ("`rows`", lambda: gr.ablate_quarantine(MODEL, rows=torch.tensor([0, 1]))),
        ("`scale`", lambda: gr.ablate_quarantine(MODEL, FLAGS)),
    ],
    "frozen_quarantine": [
        *[("`model`", lambda m=m: gr.adapters.frozen_quarantine(m)) for m in UNADAPTED],
        ("`model`", lambda: gr.adapters.frozen_quarantine(MODEL)),
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
        ("`scale`", lambda: gr.export_deployed(MODEL, empty_folder(), scale=2)),
        ("`scale`", lambda: gr.export_deployed(MODEL, empty_folder(), scale="0.5")),
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
    "pissa_": [
        ("`model`", lambda: gr.adapters.init.pissa_(PLAIN)),
        ("`niter`", lambda: gr.adapters.init.pissa_(MODEL, niter=-1)),
    ],
    "gaussian_": [("`model`", lambda: gr.adapters.init.gaussian_(None, seed=0))],
    "signed_seed_": [("`differences`", lambda: gr.adapters.init.signed_seed_(MODEL, {}, seed=0))],
    "contrastive_covariance_": [
        ("`differences`", lambda: gr.adapters.init.contrastive_covariance_(MODEL, {"p": torch.ones(2, 8)}, seed=0)),
    ],
}  # fmt: skip
