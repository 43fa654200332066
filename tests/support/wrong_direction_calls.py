"""Wrong calls of what makes directions: pairs, captures, extraction, estimators, controls."""

import torch

import gradroute as gr
from gradroute.directions.estimators import MeanDifference, Ridge, Svd, TStatistic
from support.call_arguments import (
    FLAGS,
    GRADIENT,
    HACK,
    IDS,
    MODEL,
    PAIRS,
    PLAIN,
    POOL,
    Calls,
    entered,
    ids_only,
    written,
)
from support.chat import byte_tokenizer

ENTRY = {"prompt": "a", "hack": "b", "clean": "c"}
CHAT = {**ENTRY, "prompt": [{"role": "user", "content": "a"}]}

DIRECTION_CALLS: Calls = {
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
        ("`source`", lambda: gr.load_pairs(3)),
        ("`source`", lambda: gr.load_pairs({"train": [ENTRY]})),
        ("row 1", lambda: gr.load_pairs([ENTRY, {"prompt": "a", "chosen": "b", "rejected": "c"}])),
        ("bad", lambda: gr.load_pairs([ENTRY], hack="bad")),
        ("`tokenizer`", lambda: gr.load_pairs([CHAT])),
        ("`tokenizer`", lambda: gr.load_pairs([CHAT], tokenizer=len)),
        ("`chat_template_kwargs`", lambda: gr.load_pairs([CHAT], chat_template_kwargs={"enable_thinking": False})),
        ("`prompt`", lambda: gr.load_pairs([ENTRY], tokenizer=byte_tokenizer())),
        ("`hack`", lambda: gr.load_pairs([{**CHAT, "hack": CHAT["prompt"]}], tokenizer=byte_tokenizer())),
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
        ("`forward_fn`", lambda: gr.extract_activation_directions(MODEL, PAIRS)),
        ("`tokenizer`", lambda: gr.extract_activation_directions(
            MODEL, [gr.ContrastivePair("a", "b", "c")], forward_fn=ids_only)),
        ("`pairs`", lambda: gr.extract_activation_directions(MODEL, [], forward_fn=ids_only)),
        ("`pairs`", lambda: gr.extract_activation_directions(MODEL, [("a", "b", "c")], forward_fn=ids_only)),
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
        ("`fresh`", lambda: HACK.update_(HACK, step=1)),
        ("control", lambda: HACK.random_like(0).random_like(1)),
    ],
    "validate": [
        ("`labels`", lambda: gr.directions.validate(torch.zeros(4), torch.ones(4, dtype=torch.bool))),
        ("`labels`", lambda: gr.directions.validate(torch.zeros(4), FLAGS[:3])),
    ],
    "summary": [("`draws`", lambda: gr.directions.summary(HACK, draws=0))],
    "shuffled_pairs": [("control", lambda: gr.directions.shuffled_pairs(HACK.random_like(0), 1))],
    "placebo_pairs": [("control", lambda: gr.directions.placebo_pairs(HACK.random_like(0), 1))],
    "reversed_sign": [("control", lambda: gr.directions.reversed_sign(HACK.random_like(0)))],
    "shuffled_flags": [
        ("`flags`", lambda: gr.directions.shuffled_flags(torch.tensor([0.5, 0.1]), seed=0)),
        ("`flags`", lambda: gr.directions.shuffled_flags([True, False], seed=0)),
        ("`group_size`", lambda: gr.directions.shuffled_flags(FLAGS, seed=0, group_size=3)),
        ("`group_size`", lambda: gr.directions.shuffled_flags(FLAGS, seed=0, group_size=0)),
    ],
    "MeanDifference": [("`n_heldout`", lambda: MeanDifference(n_heldout=2)(HACK.hack, HACK.clean))],
    "TStatistic": [("`clamp`", lambda: TStatistic(clamp=-1.0)(HACK.hack, HACK.clean))],
    "Svd": [
        ("`k`", lambda: Svd(k=0)(HACK.hack, HACK.clean)),
        ("`k`", lambda: Svd(k=9)(HACK.hack, HACK.clean)),
    ],
    "Ridge": [("`penalty`", lambda: Ridge(penalty=-1.0)(HACK.hack, HACK.clean))],
}  # fmt: skip
