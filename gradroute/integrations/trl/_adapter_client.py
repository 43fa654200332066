"""TRL's client of a vLLM server, with an adapter for each view.

rows of a prompt, k ablated of n     ->     a request for k under one adapter, a request for n - k under the other
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from trl.generation.vllm_client import VLLMClient

from gradroute.errors import GradRouteError
from gradroute.integrations.vllm import ServerViews

PAST_VIEWS = (
    "The engine should be asked through the trainer, which says in which view each row is sampled: without an adapter "
    "the base model answers. Found a call of `{what}`. Fix: trainer.vllm_generation.generate(prompts, None, 1)."
)
_PER_ROW = ("completion_ids", "logprobs", "logprob_token_ids")
_Client: Any = VLLMClient


class AdapterClient(_Client):  # type: ignore[misc]
    """TRL's client of a server: adapters are loaded from files, and each row is sampled by the adapter of its view."""

    model: str
    views: ServerViews
    ablated: Sequence[bool] = ()

    def max_model_len(self) -> int:
        """Tokens of the longest prompt with its completion."""
        return int(self._get(f"{self.base_url}/v1/models")["data"][0]["max_model_len"])

    def init_communicator(self, device: Any = 0) -> None:
        """No weights are sent to the server."""

    def generate(self, prompts: Any, features: None = None, n: int = 1, **sampling: Any) -> dict[str, Any]:
        """TRL's, of `n` rows per prompt, some of them ablated: one request per view and number of rows."""
        if not hasattr(self, "model"):
            raise GradRouteError(
                "`vllm_mode='server'` should speak to vLLM's own server, which knows adapters. Found a trl that speaks "
                "to another one. Fix: trl 1.16 or newer, or vllm_mode='colocate'."
            )
        if len(self.ablated) != n * len(prompts):
            raise GradRouteError(PAST_VIEWS.format(what="vllm_client.generate"))
        groups: dict[tuple[bool, int], list[int]] = defaultdict(list)
        for i in range(len(prompts)):
            off = sum(self.ablated[i * n : (i + 1) * n])
            for ablated, count in ((True, off), (False, n - off)):
                if count:
                    groups[ablated, count].append(i)
        rows: dict[str, list[Any]] = {name: [None] * (n * len(prompts)) for name in _PER_ROW}
        base = self.model
        try:
            for (ablated, count), chosen in groups.items():
                self.model = self.views.name_of("ablated" if ablated else "on")
                made = super().generate([prompts[i] for i in chosen], features, n=count, **sampling)
                places = [j for i in chosen for j in range(i * n, (i + 1) * n) if self.ablated[j] == ablated]
                for name, values in rows.items():
                    for place, value in zip(places, made[name], strict=True):
                        values[place] = value
        finally:
            self.model = base
        return {"prompt_ids": [list(prompt) for prompt in prompts], **rows}

    def chat(self, *_: Any, **__: Any) -> Any:
        """Refused: TRL's would be answered by the base model."""
        raise GradRouteError(PAST_VIEWS.format(what="vllm_client.chat"))
