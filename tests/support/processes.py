"""Processes over gloo that run a script of `tests/support`; their output is shown if one of them fails."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch

import gradroute as gr

TESTS = Path(__file__).parents[1]


def leave() -> NoReturn:
    """End this rank once all have written what they found: taking gloo down now and then aborts the process."""
    torch.distributed.barrier()
    os._exit(0)


def run_ranks(
    script: str, folder: Path, arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None, *,
    size: int = 2, seconds: float = 900,
) -> None:  # fmt: skip
    """Run `tests/support/SCRIPT FOLDER ARGUMENTS...` as ranks 0 to `size` - 1.

    Raises:
        RuntimeError: a process failed, or hangs; the others are ended, which would wait for it for ever.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "PYTHONPATH": f"{Path(gr.__file__).parents[1]}:{TESTS}", "HOME": str(folder), "PATH": os.environ["PATH"],
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1", "CI": "true",
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}), **(environment or {}),
    }  # fmt: skip
    logs = [folder / f"rank {rank}.log" for rank in range(size)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-W", "ignore", str(TESTS / "support" / script), str(folder), *arguments]
        with log.open("wb") as output:
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
    deadline = time.monotonic() + seconds
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    time.sleep(0.5)  # for the others, which may be about to say why
    codes = [process.poll() for process in processes]
    for process in processes:
        process.kill()
        process.wait()
    if any(codes) or None in codes:
        text = "\n".join(f"rank {rank}:\n{log.read_text()[-3000:]}" for rank, log in enumerate(logs))
        raise RuntimeError(f"The processes should end with 0. Found {codes} (None: still running).\n{text}")
