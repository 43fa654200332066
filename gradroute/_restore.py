"""Leaving a user's model as it was found: modes, gradients, random numbers, `use_cache`."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from gradroute._module_tree import named_modules
from gradroute._sharding import reshard


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; on leaving, also by an exception, everything that a measurement may touch is put back.

    That is: each module's `training` flag, each parameter's `.grad` (the same tensor, bitwise) and `requires_grad`,
    Python's, numpy's and torch's random state (CPU and the model's CUDA devices), `model.config.use_cache`, and the
    shards of FSDP2.
    """
    reshard(model)
    training = {module: module.training for module in named_modules(model).values()}
    gradients = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            for parameter, _, _ in gradients:
                parameter.grad = None
            yield
        finally:
            reshard(model)
            for module, flag in training.items():
                module.training = flag
            for parameter, gradient, requires_grad in gradients:
                parameter.grad = gradient
                parameter.requires_grad_(requires_grad)
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            if use_cache is not None:
                config.use_cache = use_cache  # type: ignore[union-attr]
