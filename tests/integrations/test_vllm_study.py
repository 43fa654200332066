"""The study of rollouts from vLLM prints the parts of a sync."""

import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: .ci/vllm")

from support import vllm_engine as ve
from support.doc_pages import ROOT

SCRIPT = ROOT / "examples" / "studies" / "vllm_rollouts.py"


def test_the_parts_of_a_sync_are_printed() -> None:
    made = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), "sync", ve.base_folder(), "--r", "4"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]
    lines = made.stdout.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["sync", "on", "ablated", "export_full"]
