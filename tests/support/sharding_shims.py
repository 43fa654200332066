"""What makes accelerate and DeepSpeed shard on a CPU, which neither does of itself; for tests only.

accelerate 1.15     enters FSDP on accelerators alone: on a CPU, ACCELERATE_USE_FSDP=true silently gives DDP
DeepSpeed 0.19.8    compiles an operation of its own for the CPU when it starts, for minutes; gloo needs none
"""

import os
import sys
from typing import Any


def fsdp_on_cpu() -> None:
    """accelerate: FSDP, with the settings of the environment (`FSDP_VERSION=2`), also on a CPU."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    make = AcceleratorState.__init__

    def made(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin or self.__dict__.get("fsdp_plugin")

    AcceleratorState.__init__ = made


def deepspeed_on_cpu() -> None:
    """DeepSpeed: gloo, without its own operation for shared memory; with DS_ACCELERATOR=cpu."""
    import accelerate.state
    import deepspeed.comm  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    choose = accelerate.state.PartialState._prepare_backend

    def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        backend, kind = choose(self, *args, **kwargs)
        return ("gloo" if backend == "ccl" else backend), kind

    accelerate.state.PartialState._prepare_backend = chosen
