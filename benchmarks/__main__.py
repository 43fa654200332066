"""Every cost that a user pays, as a ratio to what they would use instead, measured within one run.

python -m benchmarks                                # everything, in about ten minutes on two quiet cores
python -m benchmarks --only P1,P5 --threads 1
python -m benchmarks --write-docs                   # also docs/results/performance.json and docs/performance.md
python -m benchmarks --device cuda --report         # the same on a GPU, with versions, as Markdown to paste
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import commands, extraction, inference, scale, training
from benchmarks.memory import process_peak_bytes
from benchmarks.models import TINY, Shape, scaled
from benchmarks.report import pasted, table, write_docs
from benchmarks.row import Row
from benchmarks.timing import Clock

GOALS = ("P1", "P2", "P3", "P4", "P5", "P6", "P7", "P8", "P9", "counts", "scale")
# Rounds that fit about ten minutes together; the first round of each does not count.
ROUNDS = {"P1": 9, "P2": 15, "P3": 7, "P4": 15, "P6": 5, "P9": 5, "scale": 5}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The checked command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(GOALS), help="comma-separated, of %(default)s")
    parser.add_argument("--threads", help="numbers of threads for P1; default 1,2, on a GPU 1")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="P7 and P9 run on the CPU anyway")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the base; default float32, on a GPU bfloat16"
    )
    parser.add_argument("--rounds", type=float, default=1.0, help="times as many rounds; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and two rounds: does it run?")
    parser.add_argument(
        "--report", action="store_true", help="print Markdown to paste; a part that fails is in it, and the exit code 1"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--write-docs", action="store_true", help="write docs/results/performance.json and the page")
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    unknown = [name for name in args.only if name not in GOALS]
    if unknown:
        parser.error(f"--only: unknown {', '.join(unknown)}; choose from {', '.join(GOALS)}")
    on_gpu = args.device == "cuda"
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.threads = args.threads or ("1" if on_gpu else "1,2")
    try:
        args.threads = [int(number) for number in args.threads.split(",")]
    except ValueError:
        parser.error(f"--threads: expected comma-separated integers, found {args.threads!r}")
    if min(args.threads) < 1 or args.rounds <= 0:
        parser.error("--threads, --rounds: expected positive numbers")
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if args.write_docs and (args.quick or set(args.only) != set(GOALS)):
        parser.error("--write-docs: the page holds all figures, of the full shapes; leave out --quick and --only")
    if args.write_docs and on_gpu:
        parser.error("--write-docs: the page is of a CPU; paste what --report prints")
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All that was asked for: rows of the goal table, counts, the grid and the plan."""
    shape = scaled(TINY if args.quick else Shape(), device=args.device, dtype=args.dtype)
    short = shape if args.quick else scaled(shape, layers=4)
    one = Clock(args.device, 1)

    def rounds(name: str) -> int:
        return 2 if args.quick else max(2, round(args.rounds * ROUNDS[name]))

    def by_threads(run: Callable[[Shape, Clock, int], list[Row]], name: str, of: Shape) -> list[Row]:
        rows = []
        for threads in args.threads:
            torch.set_num_threads(threads)
            rows += run(of, Clock(args.device, threads), rounds(name))
        torch.set_num_threads(1)
        return rows

    # Half the shape where ratios hardly depend on depth: time goes into rounds.
    parts: dict[str, Callable[[], list[Row]]] = {
        "P1": lambda: by_threads(training.steps, "P1", shape),
        "P2": lambda: inference.views(short, one, rounds("P2")),
        "P3": lambda: extraction.extraction(short, one, rounds("P3")),
        "P4": lambda: training.filtered(short, one, rounds("P4")),
        "P5": lambda: training.memory(shape),
        "P6": lambda: training.gates(short, one, rounds("P6")),
        "P7": lambda: commands.example(args.quick),
        "P8": lambda: scale.exponents(short if args.quick else scaled(shape, layers=2, batch=2)),
        "P9": lambda: commands.imports(rounds("P9")),
    }
    torch.set_num_threads(1)
    rows: list[Row] = []
    found: dict[str, Any] = {"version": 1, "machine": machine(args), "shape": asdict(shape), "wall_s": {}}

    def run(name: str) -> None:
        if name in parts:
            rows.extend(parts[name]())
        elif name == "counts":
            found["counts"] = scale.count_table(short)
            rows.extend(scale.checked_formulas(short))
        else:
            found["grid"], found["plan"] = scale.grid(shape, one, rounds("scale"), args.quick), scale.plan()

    for name in args.only:
        start = time.perf_counter()
        try:
            run(name)
        except Exception as error:
            if not args.report:
                raise
            # Whoever pastes a report has run the rest for minutes.
            found.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"
        found["wall_s"][name] = round(time.perf_counter() - start, 1)
        print(f"{name}: {found['wall_s'][name]} s", file=sys.stderr, flush=True)
    found["rows"] = [asdict(row) | {"met": row.met} for row in rows]
    found["process_peak_MB"] = round(process_peak_bytes() / 1e6)
    return found


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures were measured on, in general terms."""
    device = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()}"
    if args.device == "cuda":
        gigabytes = torch.cuda.get_device_properties().total_memory / 1e9
        device = f"{torch.cuda.get_device_name()}, {gigabytes:.0f} GB, CUDA {torch.version.cuda}"
    return {"device": device, "dtype": args.dtype, "torch": torch.__version__}


def versions() -> dict[str, str]:
    """Of Python and of the packages whose speed is measured."""
    return {"Python": platform.python_version()} | {
        name: version(name) for name in ("gradroute", "torch", "transformers", "peft")
    }


def main(argv: list[str]) -> None:
    """Measure, print, write."""
    args = parse_arguments(argv)
    found = measure(args)
    print(pasted(found, ["python", "-m", "benchmarks", *argv], versions()) if args.report else table(found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.write_docs:
        write_docs(found)
    if "failed" in found:
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
