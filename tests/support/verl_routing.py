"""The module that `actor_rollout_ref.model.external_lib` names in the test of verl's trainer.

It notes what calls of the engine gave. The engine is that of the documentation, which is written to
`my_routing.py`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from my_routing import Engine

from support import verl_rollout  # noqa: F401  (registers it)

FOLDER = Path(os.environ["GRADROUTE_TEST_FOLDER"])


def note(name: str, read: Callable[[Any, Any], Any]) -> None:
    """Keep what `read` makes of each call of a method and its output, in a file for each worker."""
    inner, calls = getattr(Engine, name), []

    def outer(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = inner(self, *args, **kwargs)
        calls.append(read(self, output))
        torch.save(calls, FOLDER / f"{name} {torch.distributed.get_rank()}.pt")
        return output

    setattr(Engine, name, outer)


note("infer_batch", lambda engine, output: sorted(output["model_output"]))
note("optimizer_step", lambda engine, norm: (norm, engine.refresher.steps, len(engine.refresher.reports)))
note("get_per_tensor_param", lambda engine, output: {name: tensor.clone() for name, tensor in output[0]})
