"""`docs/loops.md`: its Python runs as written, and with two processes as with one."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gradroute as gr

PAGE = Path(__file__).parents[2] / "docs" / "loops.md"
TEXT = PAGE.read_text(encoding="utf-8")
PLAIN, PENDING, TRAINER, ACCELERATE = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
LAUNCH = re.search(r"```bash\naccelerate launch (.*?) loop\.py\n```", TEXT)
SAVED = '\ntorch.save(dict(model.named_parameters()), f"weights{accelerator.process_index}.pt")\n'


# transformers 5 renames it; the page's name works in every version.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")


def run(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "loop"}
    with torch.random.fork_rng():
        exec(compile(block, PAGE.name, "exec"), names)
    return names


def test_the_plain_loop_refreshes_on_its_steps_and_trains_both_blocks() -> None:
    names = run(PLAIN)
    assert len(names["refresher"].reports) == 6
    assert all((p != 0).any() for block in names["blocks"] for p in block)


def test_scores_of_the_losss_forward_decide_its_mask() -> None:
    names = run(PLAIN + PENDING.replace("optimizer.zero_grad()", ""))
    late = [p.grad.clone() for block in names["blocks"] for p in block]
    names["optimizer"].zero_grad()
    with gr.route(names["model"], names["pending"].decided):
        logp = names["logprobs"](names["ids"], names["completion"]).sum(1)
        rewards = names["rewards"]
        (-(rewards - rewards.mean()) * logp).mean().backward()
    given = [p.grad for block in names["blocks"] for p in block]
    assert any((gradient != 0).any() for gradient in given)
    assert all(torch.equal(*pair) for pair in zip(late, given, strict=True))


def test_a_route_that_does_not_enclose_backward_is_refused_in_the_plain_loop() -> None:
    """The page says that checkpointing needs nothing but this."""
    inside = "                (-(ratio * completion[rows, 1:]).sum() / 64).backward()\n"
    assert inside in PLAIN
    with pytest.raises(gr.errors.RouteError, match="after its route was closed"):
        run(PLAIN.replace(inside, inside.replace(" " * 16, " " * 12, 1)))


@pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator is found:UserWarning")
def test_the_trainer_filters_and_refreshes() -> None:
    names = run(TRAINER)
    assert names["trainer"].filtered == 4
    assert names["trainer"].filter_stats.cout < 1e-6 < names["trainer"].filter_stats.cin
    assert len(names["refresher"].reports) == 2


def started(folder: Path, *command: str) -> dict[int, dict[str, torch.Tensor]]:
    """The weights that each rank of a command leaves, by rank."""
    folder.mkdir()
    (folder / "loop.py").write_text(ACCELERATE + SAVED, encoding="utf-8")
    root = str(Path(__file__).parents[2])
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "HOME": str(folder), "GLOO_SOCKET_IFNAME": "lo"}
    if sys.platform != "linux":
        del environment["GLOO_SOCKET_IFNAME"]
    whole = [sys.executable, *command, "loop.py"]
    ended = subprocess.run(whole, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    files = sorted(folder.glob("weights*.pt"))
    assert f"{len(files)} processes, 2 refreshes" in ended.stdout
    return {rank: torch.load(file) for rank, file in enumerate(files)}


@pytest.mark.slow
def test_two_processes_of_accelerate_launch_end_with_the_weights_of_one(tmp_path: Path) -> None:
    assert LAUNCH is not None
    options = LAUNCH[1].split()
    assert options[:3] == ["--multi_gpu", "--num_processes", "2"]
    one = started(tmp_path / "one")
    # Port 0: any that is free.
    two = started(tmp_path / "two", "-m", "accelerate.commands.launch", "--main_process_port", "0", *options)
    assert (list(one), list(two)) == ([0], [0, 1])
    start = dict(run(ACCELERATE.split("optimizer = ")[0])["model"].named_parameters())
    blocks = [name for name in start if "lora_" in name]
    for name in blocks:
        assert not torch.equal(one[0][name], start[name]) or "lora_A" in name
        for weights in two.values():
            torch.testing.assert_close(weights[name], one[0][name], rtol=1e-9, atol=1e-12)


def test_other_masks_give_other_weights() -> None:
    """The test above would notice rows under each other's masks."""
    routed = dict(run(ACCELERATE)["model"].named_parameters())
    shifted = dict(
        run(ACCELERATE.replace("torch.arange(32) % 3", "torch.arange(1, 33) % 3"))["model"].named_parameters()
    )
    differing = [name for name in routed if not torch.allclose(routed[name], shifted[name], rtol=1e-6)]
    assert any("lora_B_quarantine" in name for name in differing)
