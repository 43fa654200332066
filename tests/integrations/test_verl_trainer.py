"""verl's trainer under a local Ray: sampling, log-probabilities, reference, updates, LoRA sync, checkpoint, resume."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.doc_pages import ROOT, fenced
from support.verl_models import load_model, write_models

import gradroute as gr

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed: see .ci/verl"),
]

COLUMNS = ["gradroute_g_d", "gradroute_g_q", "gradroute_m", "gradroute_score"]


def trained(folder: Path, *overrides: str) -> str:
    """What verl printed."""
    script = Path(__file__).parents[1] / "support" / "verl_trainer_run.py"
    root = Path(gr.__file__).parents[1]
    environment = {
        "PYTHONPATH": f"{root}:{script.parent.parent}:{folder}", "HOME": str(folder), "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1", "VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "support.verl_cpu",
        "GRADROUTE_TEST_FOLDER": str(folder), "HF_HUB_OFFLINE": "1", "RAY_DEDUP_LOGS": "0",
        "RAY_raylet_start_wait_time_s": "120",
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", str(script), str(folder), *overrides]
    options = {"env": environment, "cwd": folder, "capture_output": True, "text": True, "timeout": 1800}
    for _ in range(4):
        run = subprocess.run(command, check=False, **options)
        printed = run.stdout + run.stderr
        # On a busy machine the processes of Ray may start too late for each other, and then there is no run.
        if run.returncode == 0 or "TaskRunner" in printed:
            break
    assert run.returncode == 0, printed[-5000:]
    return printed


def seen(folder: Path, name: str) -> list[list[Any]]:
    """What each worker noted of the calls of a method of the engine."""
    return [torch.load(folder / f"{name} {rank}.pt") for rank in (0, 1)]


def logged(printed: str, step: int) -> dict[str, float]:
    (line,) = re.findall(rf"step:{step} - (.*)", printed)
    return {name: float(value) for name, value in re.findall(r"(\S+?):([-+.\de]+)(?: - |$)", line)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and the module of the documentation."""
    path = tmp_path_factory.mktemp("verl_trainer")
    write_models(path)
    pairs = [{"prompt": f"w{i} w6", "hack": f"w7 w8 w{i}", "clean": f"w{i} w14"} for i in (9, 11, 13)]
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (module,) = fenced((ROOT / "docs" / "verl.md").read_text(encoding="utf-8"), "py")
    for asked, here in (("/data", str(path)), ("refresh_every=5", "refresh_every=2, r_quarantine=3")):
        assert asked in module
        module = module.replace(asked, here)
    (path / "my_routing.py").write_text(module)
    return path


@pytest.fixture(scope="module")
def first(folder: Path) -> dict[str, Any]:
    """Two steps of verl's trainer, four of the optimizer."""
    printed = trained(folder)
    methods = ("infer_batch", "optimizer_step", "get_per_tensor_param")
    return {"printed": printed, **{name: seen(folder, name) for name in methods}}


def test_the_log_prob_pass_scores_and_the_reference_pass_does_not(first: dict[str, Any]) -> None:
    for calls in first["infer_batch"]:
        assert calls == [["entropy", *COLUMNS, "log_probs"], ["log_probs"]] * 2


def test_directions_are_refreshed_after_every_second_step_of_the_optimizer(first: dict[str, Any]) -> None:
    one, other = first["optimizer_step"]
    assert one == other
    assert [(steps, refreshes) for _, steps, refreshes in one] == [(1, 0), (2, 1), (3, 1), (4, 2)]
    figures = logged(first["printed"], 2)
    assert figures["actor/routing/age"] == 0.5
    assert figures["actor/routing/refreshes"] == 1.5
    assert 0 < figures["actor/routing/routed"] < 1


def test_each_sync_sends_weights_that_moved_and_what_samples_is_the_policy_that_trains(first: dict[str, Any]) -> None:
    for syncs in first["get_per_tensor_param"]:
        assert len(syncs) == 3  # before the first step, and after each
        for before, after in pairwise(syncs):
            assert max(float((after[name] - before[name]).abs().max()) for name in before) > 1e-3
    # The server samples by stock PEFT from plain LoRA; verl compares its probabilities with the trainer's.
    for step in (1, 2):
        assert logged(first["printed"], step)["training/rollout_probs_diff_max"] < 1e-5


def test_a_server_that_knew_the_deployed_block_alone_would_sample_from_another_policy(folder: Path) -> None:
    base = load_model(folder / "untied")
    ids = torch.randint(3, 32, (4, 6))
    with torch.no_grad():
        on = base(ids).logits.softmax(-1)
        with gr.ablate_quarantine(base):
            ablated = base(ids).logits.softmax(-1)
    assert (on - ablated).abs().max() > 1e-2


def test_the_trainer_resumes(folder: Path, first: dict[str, Any]) -> None:
    printed = trained(folder, "trainer.total_training_steps=3")
    assert "step:3" in printed
    assert "step:2 " not in printed
    for calls in seen(folder, "optimizer_step"):
        assert [(steps, refreshes) for _, steps, refreshes in calls] == [(5, 2), (6, 3)]
