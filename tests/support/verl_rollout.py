"""A rollout engine for verl on a CPU: a server that knows plain LoRA alone, and samples from what is sent to it.

It stands in for vLLM: verl's trainer, its agent loop and its LoRA sync are verl's own. Stock PEFT loads the adapter.
"""

from typing import Any

import ray
import torch
from verl.workers.rollout import base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

NAME = "plain_lora_cpu"


@ray.remote
class Server:
    """Samples with the adapter that was sent last."""

    def __init__(self, path: str) -> None:
        torch.set_num_threads(1)
        self.path, self.model, self.steps = path, None, 0

    def load(self, tensors: dict[str, torch.Tensor], config: dict[str, Any], global_steps: int) -> None:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
        from transformers import AutoModelForCausalLM

        plain = LoraConfig(r=config["r"], lora_alpha=config["lora_alpha"], target_modules=config["target_modules"])
        self.model = get_peft_model(AutoModelForCausalLM.from_pretrained(self.path), plain).eval()
        found = set_peft_model_state_dict(self.model, tensors)
        assert not found.unexpected_keys
        assert len(tensors) == sum("lora_" in name for name, _ in self.model.named_parameters())
        self.steps = global_steps

    @torch.no_grad()
    def generate(self, request_id: str, prompt_ids: Any, sampling_params: Any, **_: Any) -> TokenOutput:
        ids, log_probs = list(map(int, prompt_ids)), []
        for _ in range(4 + hash(request_id) % 4):
            logits = self.model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            temperature = sampling_params["temperature"] or 1.0
            every = (logits / temperature).log_softmax(-1)
            token = int(torch.multinomial(every.exp(), 1))
            ids.append(token)
            log_probs.append(float(every[token]))
        return TokenOutput(
            token_ids=ids[len(prompt_ids) :], log_probs=log_probs, stop_reason="completed",
            extra_fields={"global_steps": self.steps},
        )  # fmt: skip

    def nothing(self) -> None: ...

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = resume_generation = nothing
    abort_all_requests = nothing


class Rollout(BaseRollout):
    """In the trainer's workers: gives what the engine sends to the server."""

    async def resume(self, tags: list[str]) -> None: ...

    async def release(self) -> None: ...

    async def update_weights(self, weights: Any, wire_format: str = "named_tensors", **kwargs: Any) -> None:
        tensors = dict(weights)
        if torch.distributed.get_rank() == 0:
            await ray.get_actor(NAME).load.remote(tensors, kwargs["peft_config"], kwargs["global_steps"])


class Replica(RolloutReplica):
    """One server for all workers."""

    async def launch_servers(self) -> None:
        if self.replica_rank == 0:
            server = Server.options(name=NAME).remote(self.model_config.path)
        else:
            server = ray.get_actor(NAME)
        self.servers = [server]
        self._server_handle, self._server_address = server, f"{NAME}:{self.replica_rank}"


RolloutReplicaRegistry.register(NAME, lambda: Replica)
base._ROLLOUT_REGISTRY[NAME, "async"] = f"{__name__}.Rollout"
