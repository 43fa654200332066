"""P8: how what routing adds grows; a grid of measured steps; and the plan for models that do not fit here.

    exponent in q = slope of log(added) over log(q),     added = routed step - base step, everything else fixed

The plan, per rank of n under FSDP2, weights in bf16, blocks and AdamW in float32, checkpointing every layer:

    base      2 P / n, and two gathered layers of 2 P_layer
    blocks    16 K / n (value, gradient, two moments) and 2 gathered layers of 4 K_layer,   K = R sum(d_in + d_out)
    kept      2 N d per layer of checkpoints, and of the layer that is recomputed the inputs of its linears (2 bytes)
              and their bottlenecks (4 bytes)
    traffic   2 all-gathers of base and blocks, one reduce-scatter of the blocks' gradients
"""

import math
from functools import partial

import torch
from torch import nn

import gradroute as gr
from benchmarks import models
from benchmarks.counts import Counts, counted, floors
from benchmarks.models import Shape, scaled
from benchmarks.row import Row
from benchmarks.timing import Clock, interleaved, ratio

LLAMA = {
    "7B": Shape(hidden=4096, mlp=11008, layers=32, heads=32, kv_heads=32, vocab=32000, batch=4, seq=2048),
    "70B": Shape(hidden=8192, mlp=28672, layers=80, heads=64, kv_heads=8, vocab=32000, batch=1, seq=2048),
}


def from_embeddings(model: nn.Module, shape: Shape, route: gr.RouteMask | None = None) -> None:
    """A step with a gradient to the embeddings, so that the lowest layer costs what the others do."""
    ids = models.token_ids(shape)
    x = model.get_input_embeddings()(ids).detach().requires_grad_()

    def forward() -> None:
        logits = model(inputs_embeds=x, use_cache=False).logits[:, :-1].float()
        (-logits.log_softmax(-1).gather(-1, ids[:, 1:, None])).mean().backward()

    if route is None:
        forward()
    else:
        with gr.route(model, route):
            forward()
    model.zero_grad()


def three(shape: Shape) -> dict[str, Counts]:
    """Counts of a step of the base, with LoRA of both ranks, and routed."""
    base, lora, routed = models.base(shape).requires_grad_(False), models.lora(shape, 2 * shape.r), models.routed(shape)
    return {
        "base": counted(base, partial(from_embeddings, base, shape)),
        "LoRA": counted(lora, partial(from_embeddings, lora, shape)),
        "routed": counted(routed, partial(from_embeddings, routed, shape, models.mask(shape))),
    }


def exponents(shape: Shape, factor: int = 2) -> list[Row]:
    """P8: what is added to the base, between `shape` and a shape of twice the batch, layers, rank; pairs likewise."""
    rows = []
    small = three(shape)
    for name in ("batch", "layers", "r"):
        large = three(scaled(shape, **{name: factor * getattr(shape, name)}))
        for measure in ("flops", "bytes"):
            added = [getattr(each["routed"].minus(each["base"]), measure) for each in (small, large)]
            what = f"exponent of added {measure} in {'rank' if name == 'r' else name}"
            rows.append(Row("P8", what, math.log(added[1] / added[0], factor), 1.00, unit="exponent"))
    model = models.routed(shape).eval()
    sizes = (4, 4 * factor)
    by_pairs = [counted(model, partial(_extracted, model, models.pairs(shape, count))) for count in sizes]
    for measure in ("flops", "bytes"):
        few, many = (getattr(each, measure) for each in by_pairs)
        what = f"exponent of {measure} of an extraction in pairs"
        rows.append(Row("P8", what, math.log(many / few, factor), 1.00, unit="exponent"))
    return rows


def _extracted(model: nn.Module, pairs: list[gr.ContrastivePair]) -> None:
    # Of one length each: which lengths were drawn would otherwise be measured.
    equal = [gr.ContrastivePair(p.prompt, p.hack[:8], p.clean[:8]) for p in pairs]
    with gr.ablate_quarantine(model):
        gr.extract_activation_directions(model, equal, batch_size=4)


def count_table(shape: Shape) -> dict[str, dict[str, float]]:
    """Counted operations, moved and kept bytes of a step, and the floors by formula."""
    found = three(shape)
    floor = floors(shape, 2 * shape.r)
    return {
        **{name: {**vars(counts)} for name, counts in found.items()},
        "floor base": floor["base"],
        "floor LoRA": {key: floor["base"][key] + floor["LoRA"][key] for key in floor["base"]},
    }


def grid(base: Shape, clock: Clock, rounds: int, quick: bool) -> dict[str, object]:
    """Measured steps over width x depth x batch on the device of `base`, and the exponents fitted to them."""
    widths, depths, batches = ((64, 128), (1, 2), (1, 2)) if quick else ((192, 384, 768), (2, 4), (2, 8))
    points, rows = [], []
    for width in widths:
        for depth in depths:
            for batch in batches:
                shape = Shape(hidden=width, mlp=width * 8 // 3, layers=depth, heads=width // 64 * 2 or 2,
                              kv_heads=max(width // 64, 1), batch=batch, seq=32 if quick else 128,
                              device=base.device, dtype=base.dtype)  # fmt: skip
                lora, routed = models.lora(shape, 2 * shape.r), models.routed(shape)
                arms = {
                    "LoRA": partial(from_embeddings, lora, shape),
                    "routed": partial(from_embeddings, routed, shape, models.mask(shape)),
                }
                seconds = interleaved(arms, rounds, clock)
                found = ratio(seconds, "routed", "LoRA")
                rows.append([1.0, math.log(width), math.log(depth), math.log(batch)])
                points.append({"width": width, "depth": depth, "batch": batch, "ratio": found.median,
                               "routed_ms": 1e3 * found.seconds, "LoRA_ms": 1e3 * found.baseline_seconds})  # fmt: skip
    fitted = {}
    for arm in ("routed_ms", "LoRA_ms"):
        target = torch.tensor([math.log(point[arm]) for point in points], dtype=torch.float64)
        slopes = torch.linalg.lstsq(torch.tensor(rows, dtype=torch.float64), target[:, None]).solution[1:, 0]
        fitted[arm.removesuffix("_ms")] = dict(zip(("width", "depth", "batch"), slopes.tolist(), strict=True))
    return {"points": points, "exponents": fitted}


def block_parameters(shape: Shape, R: int) -> int:
    """K of the formulas."""
    return R * shape.layers * sum(d_in + d_out for d_in, d_out in shape.linears)


def kept_by_blocks(shape: Shape, R: int) -> int:
    """What the blocks keep for backward without checkpointing: u of each linear, x of each that no other keeps."""
    inputs = 2 * shape.hidden + shape.mlp  # of q k v, of gate and up, of down; that of o is kept by the attention
    return shape.tokens * shape.layers * (shape.bytes_per_number * inputs + 4 * R * len(shape.linears))


def plan(ranks: int = 8) -> dict[str, dict[str, float]]:
    """GB per rank and per step for the large models, without and with the quarantine."""
    plans = {}
    for name, shape in LLAMA.items():
        weights = shape.layers * sum(d_in * d_out for d_in, d_out in shape.linears) + 2 * shape.vocab * shape.hidden
        layer = sum(d_in * d_out for d_in, d_out in shape.linears)
        N, made = shape.tokens, {}
        for label, R in (("LoRA r", shape.r), ("routed r + r", 2 * shape.r)):
            K = block_parameters(shape, R)
            checkpoints = 2 * N * shape.hidden * shape.layers
            recomputed = 2 * N * (3 * shape.hidden + shape.mlp) + 4 * N * R * len(shape.linears)
            gathered = 2 * (2 * layer + 4 * K // shape.layers)
            made[label] = {
                "base GB per rank": (2 * weights / ranks) / 1e9,
                "blocks GB per rank": 16 * K / ranks / 1e9,
                "gathered GB": gathered / 1e9,
                "activations GB": (checkpoints + recomputed) / 1e9,
                "traffic GB per step": (2 * (2 * weights + 4 * K) + 4 * K) * (ranks - 1) / ranks / 1e9,
            }
        plans[name] = {
            f"{label}: {key}": value for label, figures in made.items() for key, value in figures.items()
        } | {f"quarantine adds {key}": made["routed r + r"][key] - made["LoRA r"][key] for key in made["LoRA r"]}
    return plans


def checked_formulas(shape: Shape) -> list[Row]:
    """The plan's formulas against what small models have and keep."""
    found, routed = three(shape), models.routed(shape)
    parameters = sum(p.numel() for p in routed.parameters() if p.requires_grad)
    kept = found["routed"].saved - found["base"].saved
    return [
        Row("", "parameters of the blocks, formula / counted", block_parameters(shape, 2 * shape.r) / parameters),
        Row("", "kept by the blocks, formula / counted", kept_by_blocks(shape, 2 * shape.r) / kept),
    ]
