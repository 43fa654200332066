"""P7: the example, cold. P9: importing."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.row import Row, compared
from benchmarks.timing import Clock, interleaved

ROOT = Path(__file__).parents[1]


def example(quick: bool) -> list[Row]:
    """P7: the four default arms of `examples/grpo_loopholes.py`, one seed, with its base model not cached."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--arms", "vanilla,route", "--steps", "5"] if quick else []
        command = [sys.executable, "examples/grpo_loopholes.py", "--no-progress", "--out", f"{folder}/out", *options]
        start = time.perf_counter()
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(f"The example failed:\n{done.stderr[-2000:]}")
    return [Row("P7", "`examples/grpo_loopholes.py`, four arms, cold", seconds, 90.0, threads=2, unit="seconds")]


def imports(rounds: int) -> list[Row]:
    """P9: in fresh interpreters, by the processor time that they take."""

    def run(module: str) -> None:
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True, capture_output=True)

    class Children(Clock):
        def now(self) -> float:
            times = os.times()
            return times.children_user + times.children_system

    arms = {"gradroute": lambda: run("gradroute"), "peft": lambda: run("peft")}
    clock = Children()
    return [
        compared("P9", "`import gradroute` / `import peft`", interleaved(arms, rounds, clock), ("gradroute", "peft"),
                 1.02, clock)
    ]  # fmt: skip
