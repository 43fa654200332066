"""Wrong calls of what routes by directions or labels: gates, refreshes, masks, filters, optimizers."""

import torch

import gradroute as gr
from gradroute.advantages import weighted_baseline_advantages
from support.call_arguments import (
    ERASE,
    FLAGS,
    GRADIENT,
    HACK,
    MODEL,
    NAN,
    OPTIMIZER,
    PLAIN,
    STRANGER,
    Calls,
    backward,
    entered,
    extract,
)

LOGPS = torch.full((2, 3), -1.0)

ROUTING_CALLS: Calls = {
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
    "LogRatioGate": [
        ("`threshold`", lambda: gr.LogRatioGate(0.0)),
        ("`per`", lambda: gr.LogRatioGate(per="batch")),
        ("`below`", lambda: gr.LogRatioGate(below="drop")),
        ("`empty_calls`", lambda: gr.LogRatioGate(empty_calls=1.5)),
        ("`mask`", lambda: gr.LogRatioGate()(LOGPS, 2 * LOGPS, [[1, 1]])),
        ("`on`", lambda: gr.LogRatioGate()(LOGPS.exp(), LOGPS, torch.ones(2, 3))),
        ("`on`", lambda: gr.LogRatioGate()(LOGPS[:, 1:], LOGPS, torch.ones(2, 3))),
        ("`ablated`", lambda: gr.LogRatioGate()(LOGPS, LOGPS.tolist(), torch.ones(2, 3))),
        ("`ablated`", lambda: gr.LogRatioGate(empty_calls=0)(LOGPS, LOGPS, torch.ones(2, 3))),
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
    "weighted_baseline_advantages": [
        ("`rewards`", lambda: weighted_baseline_advantages(torch.zeros(4), torch.ones(4), 3)),
        ("`weights`", lambda: weighted_baseline_advantages(torch.zeros(4), torch.full((4,), NAN), 2)),
    ],
    "graft_mask": [
        ("`flagged`", lambda: gr.schemes.graft_mask(torch.zeros(4))),
        ("`strength`", lambda: gr.schemes.graft_mask(FLAGS, strength=-1)),
        ("`sizes`", lambda: gr.schemes.graft_mask(FLAGS, sizes=(0, 1))),
        ("`cap`", lambda: gr.schemes.graft_mask(FLAGS, cap=0.5)),
        ("`scheme`", lambda: gr.schemes.graft_mask(FLAGS, scheme="clasic")),
    ],
    "sgtm_mask": [
        ("`forget`", lambda: gr.schemes.sgtm_mask(torch.zeros(4))),
        ("`forget`", lambda: gr.schemes.sgtm_mask([True, False])),
        ("`unlabelled`", lambda: gr.schemes.sgtm_mask(FLAGS, FLAGS)),
        ("`unlabelled`", lambda: gr.schemes.sgtm_mask(FLAGS, torch.zeros(4))),
        ("`unlabelled`", lambda: gr.schemes.sgtm_mask(FLAGS, FLAGS[:2])),
    ],
    "expand_route_ablate_mask": [
        ("`forget`", lambda: gr.schemes.expand_route_ablate_mask(torch.zeros(4))),
        ("`forget`", lambda: gr.schemes.expand_route_ablate_mask([True])),
        ("`old_rate`", lambda: gr.schemes.expand_route_ablate_mask(FLAGS, old_rate=NAN)),
    ],
    "detach_mix_mask": [
        ("`g_d`", lambda: gr.schemes.detach_mix_mask(torch.tensor([NAN]), torch.ones(1))),
        ("rows", lambda: gr.schemes.detach_mix_mask(torch.ones(2), torch.ones(3))),
        ("`g_d`", lambda: gr.schemes.detach_mix_mask(None, torch.ones(3))),
    ],
    "ProjectionFilter": [
        ("`directions`", lambda: gr.ProjectionFilter(None, mode="erase")),
        ("`mode`", lambda: gr.ProjectionFilter(GRADIENT, mode="remove")),
        ("`side`", lambda: gr.ProjectionFilter(GRADIENT, mode="erase", side="left")),
        ("`overshoot`", lambda: gr.ProjectionFilter(GRADIENT, mode="erase", overshoot=0)),
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
        ("`optimizer`", lambda: gr.optim.project_updates(MODEL, None, GRADIENT)),
        ("`model`", lambda: gr.optim.project_updates(PLAIN, OPTIMIZER, GRADIENT)),
        ("`side`", lambda: gr.optim.project_updates(MODEL, OPTIMIZER, GRADIENT, side="left")),
        ("`directions`", lambda: gr.optim.project_updates(MODEL, OPTIMIZER, None)),
    ],
    "purge_moments": [
        ("`optimizer`", lambda: gr.optim.purge_moments(MODEL, None, GRADIENT)),
        ("`model`", lambda: gr.optim.purge_moments(PLAIN, OPTIMIZER, GRADIENT)),
        ("`side`", lambda: gr.optim.purge_moments(MODEL, OPTIMIZER, GRADIENT, side="left")),
        ("`directions`", lambda: gr.optim.purge_moments(MODEL, OPTIMIZER, None)),
        ("moment", lambda: gr.optim.purge_moments(MODEL, OPTIMIZER, GRADIENT)),
    ],
    "decay_toward_start": [
        ("`weight_decay`", lambda: gr.optim.decay_toward_start(MODEL, OPTIMIZER, -0.1)),
        ("`optimizer`", lambda: gr.optim.decay_toward_start(MODEL, None, 0.1)),
        ("`model`", lambda: gr.optim.decay_toward_start(PLAIN, OPTIMIZER, 0.1)),
        ("weight_decay", lambda: gr.optim.decay_toward_start(MODEL, OPTIMIZER, 0.1)),
    ],
    "block_groups": [
        ("`model`", lambda: gr.optim.block_groups(PLAIN)),
        ("`groups`", lambda: gr.optim.block_groups(MODEL, list(MODEL.parameters()))),
        ("of the blocks", lambda: gr.optim.block_groups(MODEL, [{"params": list(PLAIN.parameters())}])),
    ],
    "slow_start": [
        ("`optimizer`", lambda: gr.optim.slow_start(MODEL, None, steps=5)),
        ("`optimizer`", lambda: gr.optim.slow_start(MODEL, STRANGER, steps=5)),
        ("`model`", lambda: gr.optim.slow_start(PLAIN, OPTIMIZER, steps=5)),
        ("`steps`", lambda: gr.optim.slow_start(MODEL, OPTIMIZER, steps=0)),
        ("`fraction`", lambda: gr.optim.slow_start(MODEL, OPTIMIZER, steps=5, fraction=25)),
    ],
    "skip_idle_blocks": [
        ("`optimizer`", lambda: gr.skip_idle_blocks(MODEL, None)),
        ("`model`", lambda: gr.skip_idle_blocks(PLAIN, OPTIMIZER)),
        ("`optimizer`", lambda: gr.skip_idle_blocks(MODEL, STRANGER)),
    ],
}  # fmt: skip
