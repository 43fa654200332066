"""Both views of a model in a `vllm.LLM` of this process.

requests(rows)[i] = the LoRARequest of row i's view
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradroute._protocol import BLOCKS
from gradroute._typing import typechecked
from gradroute.errors import GradRouteError
from gradroute.integrations.vllm._synced import REFUSED, SyncedViews
from gradroute.integrations.vllm.options import check_version, served_lora

# Ids are an engine's, but one counter for all of them keeps each new.
_IDS = itertools.count(1)


class EngineViews(SyncedViews):
    """Both views of a model in a `vllm.LLM` of this process; synced when made.

    Args:
        model: with routed layers, whose base model the engine serves.
        llm: a `vllm.LLM` made with `**lora_options(model)`.
        folder: for the files that vLLM reads; it is made if it is not there. None: /dev/shm, which lies in memory, or
            the temporary folder where /dev/shm is missing or too small.

    Raises:
        GradRouteError: vLLM older than 0.22, an engine without LoRA, too few adapters or too low a rank, or an adapter
            that vLLM refuses.
    """

    @typechecked
    def __init__(self, model: nn.Module, llm: Any, *, folder: str | Path | None = None) -> None:
        check_version()
        self._llm = llm
        self._config = _lora_config(llm)
        plain = served_lora(model)
        needed = {"max_loras": 2, "max_lora_rank": plain.rank(BLOCKS)}
        for name, least in needed.items():
            if getattr(self._config, name) < least:
                raise GradRouteError(
                    f"`llm` should be made with {name} of {least} at least. Found {getattr(self._config, name)}. "
                    "Fix: LLM(..., **lora_options(model))."
                )
        super().__init__(plain, folder)

    def requests(self, rows: int, *, group: Any = None) -> list[Any]:
        """The `LoRARequest` of each row, for `llm.generate(prompts, lora_request=...)`.

        Args:
            rows: as many as this process has prompts.
            group: the processes that share a tensor-parallel engine, which has the prompts of all of them in order.

        Raises:
            GradRouteError: blocks that changed since the last sync, a view that is neither on nor ablated in each row,
                or of another number of rows.
        """
        views = self.views_of_rows(rows)
        if group is not None:
            gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(gathered, views, group=group)
            views = [view for part in gathered for view in part]
        return [self.held[view] for view in views]

    def _dtype(self) -> torch.dtype | None:
        dtype = self._config.lora_dtype
        return dtype if isinstance(dtype, torch.dtype) else None

    def _load(self, name: str, path: Path) -> Any:
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        # An engine answers an id that it knows with the adapter that it has, also with a user's own.
        known = self._llm.llm_engine.list_loras()
        request = LoRARequest(name, next(each for each in _IDS if each not in known), str(path))
        try:
            loaded = self._llm.llm_engine.add_lora(request)
        except Exception as error:  # whatever vLLM raises, in this process or carried over from a worker
            raise GradRouteError(REFUSED.format(reason=str(error).partition("\n")[0][:300])) from error
        if loaded is False or request.lora_int_id not in self._llm.llm_engine.list_loras():
            raise GradRouteError(REFUSED.format(reason="it does not list the adapter after loading it"))
        return request

    def _unload(self, held: Any) -> None:
        # It may be gone already: vLLM drops the adapter used longest ago where another one needs its place.
        self._llm.llm_engine.remove_lora(held.lora_int_id)


def _lora_config(llm: Any) -> Any:
    config = getattr(getattr(getattr(llm, "llm_engine", None), "vllm_config", None), "lora_config", None)
    if config is None:
        raise GradRouteError(
            f"`llm` should be a vllm.LLM with LoRA. Found a {type(llm).__name__} without it. "
            "Fix: LLM(..., **lora_options(model))."
        )
    return config
