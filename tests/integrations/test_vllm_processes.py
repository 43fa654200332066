"""Two processes with an engine each, two that share a tensor-parallel one, and a server: each row in its own view."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: .ci/vllm")

import torch
from support import vllm_engine as ve

import gradroute as gr
from gradroute.evaluation import assert_engine_follows
from gradroute.integrations.vllm import ServerViews, lora_options

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SCRIPT = Path(__file__).parents[1] / "support" / "distributed_vllm.py"
SHARED = {
    **os.environ, "PYTHONPATH": f"{Path(gr.__file__).parents[1]}:{SCRIPT.parent.parent}", "MASTER_ADDR": "127.0.0.1",
    "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
}  # fmt: skip


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run(folder: Path, engine: str, processes: int = 2) -> list[dict[str, Any]]:
    shared = {**SHARED, "MASTER_PORT": free_port(), "WORLD_SIZE": str(processes)}
    if engine == "sharded":
        wrapped = {"ACCELERATE_USE_FSDP": "true", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        shared |= {**wrapped, "FSDP_VERSION": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), engine],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank in range(processes)
    ]  # fmt: skip
    for process in started:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors.decode()[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def check(ranks: list[dict[str, Any]]) -> None:
    """Each row's log-probabilities are the engine's, in its own view and in no other one; parameters agree bitwise."""
    for rank in ranks:
        assert len(rank["batches"]) == 2
        for step, batch in enumerate(rank["batches"]):
            assert batch["ablated"].tolist() == [True, True, False, False]
            sampled, mask = batch["sampling_per_token_logps"], batch["completion_mask"]
            own, other = (((batch[name] - sampled).abs() * mask).amax(1) for name in ("old_per_token_logps", "other"))
            print(f"step {step}: own view {own.max():.1e}, other view {other.min():.2f}")
            assert own.max() < 1e-4
            # Before the first step both views are one model.
            assert (other.min() > 0.1) == (step > 0)
        for name, parameter in rank["parameters"].items():
            assert torch.equal(parameter, ranks[0]["parameters"][name]), name
    seen = [tuple(row) for rank in ranks for row in rank["batches"][0]["completion_ids"].tolist()]
    assert len(set(seen)) > 1


@pytest.mark.parametrize("engine", ["each", "sharded", "tensor_parallel"])
def test_two_processes(engine: str, tmp_path: Path) -> None:
    check(run(tmp_path, engine))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", ve.base_folder(), "--port", port,
        "--dtype", "float32", "--enforce-eager", "--block-size", str(ve.BLOCK), "--max-model-len", "256",
        "--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--logprobs-mode", "processed_logprobs",
        "--disable-log-stats",
    ]  # fmt: skip
    shared = {**SHARED, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with subprocess.Popen(command, env=shared, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as server:
        for _ in range(300):
            assert server.poll() is None, server.stderr.read().decode()[-3000:]  # type: ignore[union-attr]
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except (URLError, TimeoutError, ConnectionError):
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
        server.terminate()
        server.wait(30)


def test_a_server_follows_a_loop_of_ones_own(url: str) -> None:
    from trl.generation.vllm_client import VLLMClient

    model = ve.randomized(gr.attach(ve.base_model(), r=4, r_quarantine=4, target_modules=["q_proj", "down_proj"]))
    assert lora_options(model)["max_lora_rank"] == 8
    views, client = ServerViews(model, url), VLLMClient(url)

    def generate(prompts: Any) -> Any:
        views.sync()
        names, made = views.names(len(prompts)), []
        for prompt, client.model in zip(prompts, names, strict=True):
            made.append(
                client.generate([list(prompt)], temperature=0.0, max_tokens=8, generation_kwargs={"ignore_eos": True})
            )
        ids = [each["completion_ids"][0] for each in made]
        return ids, [[first[0] for first in each["logprobs"][0]] for each in made]

    assert assert_engine_follows(model, generate, prompts=80) < 1e-4
    views.close()


@pytest.mark.parametrize("processes", [1, 2])
def test_trl_against_a_server(url: str, processes: int, tmp_path: Path) -> None:
    check(run(tmp_path, url, processes))
