"""`docs/howto/sharded.md`: its loop under torchrun, on two processes as on one; its commands, with the tests' shims."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.doc_pages import ROOT, blocks
from support.sandboxing import needs_sandbox

import grpo_trl

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

PAGE = ROOT / "docs" / "howto" / "sharded.md"
assert PAGE.name == "sharded.md"
TEXT = PAGE.read_text(encoding="utf-8")
LOOP = "\n".join(block.code for block in blocks(TEXT))
SAVED = """
torch.save({n: p.detach().full_tensor() for n, p in model.named_parameters() if "lora_" in n}, f"weights{rank}.pt")
dist.destroy_process_group()
"""
COMMANDS = {"FSDP2": "--use_fsdp", "ZeRO-3": "--use_deepspeed"}


def environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'examples'}"
    made = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HOME": str(folder), "CI": "true"}
    return {**made, "GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else made


def ended(command: list[str], folder: Path, seconds: int = 500, **more: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**environment(folder), **more}, capture_output=True, text=True, timeout=seconds,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_two_processes_of_torchrun_end_with_the_weights_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = re.search(r"```bash\ntorchrun (.*) loop\.py\n```", TEXT)
    assert command is not None
    (tmp_path / "loop.py").write_text(LOOP + SAVED, encoding="utf-8")
    printed = ended([sys.executable, "-m", "torch.distributed.run", *command[1].split(), "loop.py"], tmp_path)
    assert "2 processes, 2 refreshes, ['adapter_config.json', 'adapter_model.safetensors']" in printed
    two = [torch.load(tmp_path / f"weights{rank}.pt") for rank in (0, 1)]

    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**environment(tmp_path), **alone}.items():
        monkeypatch.setenv(name, value)
    with torch.random.fork_rng():
        exec(compile(LOOP + SAVED, PAGE.name, "exec"), {"__name__": "loop"})
    assert "1 processes, 2 refreshes" in capsys.readouterr().out
    one = torch.load("weights0.pt")
    assert any((values != 0).any() for name, values in one.items() if "lora_B" in name)
    for name, values in one.items():
        for found in two:
            torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-12)


@needs_sandbox
@pytest.mark.parametrize("engine", COMMANDS)
def test_the_example_runs_under_accelerate_launch(engine: str, tmp_path: Path) -> None:
    if engine == "ZeRO-3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed here; .ci/sharded runs this in an environment of its own")
    pattern = rf"^accelerate launch ({COMMANDS[engine]}.*) examples/grpo_trl.py (.*)$"
    found = re.search(pattern, TEXT, flags=re.MULTILINE)
    assert found is not None
    # A port that is free, no questions about the machine, and the shims.
    launch = ["--main_process_port", "0", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    script = [str(ROOT / "tests" / "support" / "shimmed.py"), str(ROOT / "examples" / "grpo_trl.py")]
    options = [*found[2].split(), "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    options += ["--use_cpu"] if engine == "FSDP2" else []
    more = {"ACCELERATE_USE_CPU": "true"} if engine == "FSDP2" else {"DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *found[1].split(), *launch, *script, *options]
    printed = ended(command, tmp_path, **more)
    for view in ("on", "ablated"):
        assert f"eval_{view}_reward " in printed
    base = grpo_trl.policy(grpo_trl.ModelConfig(), smoke=True)[0]
    deployed = PeftModel.from_pretrained(base, tmp_path / "out" / "deployed")
    assert any(p.any() for name, p in deployed.named_parameters() if "lora_B" in name)
