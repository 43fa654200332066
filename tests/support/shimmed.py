"""Run a script with the shims that make accelerate and DeepSpeed shard on a CPU: `shimmed.py SCRIPT ARGUMENTS...`."""

import os
import runpy
import sys
from pathlib import Path

from support.sharding_shims import deepspeed_on_cpu, fsdp_on_cpu

if __name__ == "__main__":
    (deepspeed_on_cpu if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else fsdp_on_cpu)()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
