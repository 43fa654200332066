"""Both views of a model in a vLLM server, which loads and drops adapters over HTTP.

names(rows)[i] = the adapter of row i's view: the `model` of a request
"""

import json
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from torch import nn

from gradroute._checks import one_of
from gradroute._typing import typechecked
from gradroute.errors import GradRouteError
from gradroute.integrations.vllm._synced import BLOCKS_OF, REFUSED, SyncedViews
from gradroute.integrations.vllm.options import served_lora


class ServerViews(SyncedViews):
    """Both views of a model in a vLLM server, under the names that a request gives as its `model`; synced when made.

    The server runs with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora, --max-loras 2 and a --max-lora-rank as
    `lora_options(model)` says.

    Args:
        model: with routed layers, whose base model the server serves.
        url: such as "http://localhost:8000".
        folder: that this process writes and the server reads under the same path; it is made if it is not there. None:
            /dev/shm or the temporary folder, for a server on this machine.
        api_key: that the server was started with.
        timeout: of one request to load, in seconds.

    Raises:
        GradRouteError: the server does not answer, does not load adapters at run time, or refuses these.
    """

    @typechecked
    def __init__(
        self,
        model: nn.Module,
        url: str,
        *,
        folder: str | Path | None = None,
        api_key: str | None = None,
        timeout: float = 240.0,
    ) -> None:
        self._url, self._timeout = url.rstrip("/"), timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        super().__init__(served_lora(model), folder)

    def names(self, rows: int) -> list[str]:
        """The adapter's name for each row: the `model` of a request to the server.

        Args:
            rows: as many as prompts.

        Raises:
            GradRouteError: as `EngineViews.requests`.
        """
        return [self.held[view] for view in self.views_of_rows(rows)]

    def name_of(self, view: str) -> str:
        """The name of the adapter that holds one view.

        Args:
            view: "on" or "ablated".
        """
        self.check_current()
        name: str = self.held[one_of("view", view, tuple(BLOCKS_OF))]
        return name

    def _load(self, name: str, path: Path) -> str:
        self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        return name

    def _unload(self, held: str) -> None:
        # It is gone already where the server was started again.
        self._post("/v1/unload_lora_adapter", {"lora_name": held}, may_lack=True)

    def _post(self, endpoint: str, body: dict[str, str], may_lack: bool = False) -> None:
        request = Request(self._url + endpoint, json.dumps(body).encode(), self._headers)
        try:
            with urlopen(request, timeout=self._timeout):
                return
        except HTTPError as error:
            reason = error.read().decode(errors="replace")[:300]
            # vLLM answers 404 as well where it does not find an adapter or its files, and then names the adapter.
            named = body["lora_name"] in reason
            if may_lack and error.code == 404 and named:
                return
            if error.code == 405 or (error.code == 404 and not named):
                reason = f"there is no {endpoint}: start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"
            raise GradRouteError(REFUSED.format(reason=reason)) from error
        except (URLError, TimeoutError) as error:
            raise GradRouteError(
                f"A vLLM server should answer at `url`. Found none at {self._url}: {error}."
            ) from error
