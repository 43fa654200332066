"""The module that `actor_rollout_ref.model.external_lib` names in the test of verl's trainer."""

import os
from pathlib import Path
from typing import Any

import torch
from support import verl_rollout  # noqa: F401  (registers it)
from support.verl_batches import PAIRS

import gradroute as gr
from gradroute.integrations.verl import register


def extract(model: Any, tokenizer: Any) -> gr.Directions:
    assert tokenizer is not None
    return gr.extract_activation_directions(model, PAIRS)


Engine: Any = register(directions=extract, gate=lambda directions: gr.BandGate(directions, threshold=0.0), refresh_every=2)
FOLDER = Path(os.environ["GRADROUTE_TEST_FOLDER"])


def watched(name: str, read: Any) -> None:
    """Write what a call of the engine took and gave, one file for each."""
    inner, calls = getattr(Engine, name), []

    def outer(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = inner(self, *args, **kwargs)
        calls.append(read(self, args, output))
        torch.save(calls, FOLDER / f"{name} {torch.distributed.get_rank()}.pt")
        return output

    setattr(Engine, name, outer)


watched("infer_batch", lambda engine, args, output: sorted(output["model_output"]))
watched("optimizer_step", lambda engine, args, output: (output, engine.refresher.steps, len(engine.refresher.reports)))
watched(
    "get_per_tensor_param",
    lambda engine, args, output: {name: tensor.clone() for name, tensor in output[0]} if output[1] else None,
)
