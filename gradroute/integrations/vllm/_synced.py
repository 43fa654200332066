"""Both views of a model written as adapters under new names, and the view of each row.

    on        A = [A_d; A_q],  B = [s_d B_d, s_q B_q]         ablated   A = A_d,  B = s_d B_d

Name, id and path of an adapter are new at each sync: vLLM keeps adapters under their id and cached prefixes under their
name, and answers for the old weights where one of them stays.
"""

import itertools
import os
import shutil
import tempfile
import uuid
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gradroute._hashing import bits_of
from gradroute._protocol import BLOCKS, BlockName
from gradroute._sharding import held
from gradroute.adapters.peft.export import checked_folder
from gradroute.adapters.peft.plain_lora import PlainLora
from gradroute.errors import GradRouteError
from gradroute.integrations.vllm.rows import rows_in_view

BLOCKS_OF: dict[str, Sequence[BlockName]] = {"on": BLOCKS, "ablated": ("deployed",)}

REFUSED = (
    "vLLM should load the model's two adapters. Found that it refuses: {reason}. Fix: targets that vLLM adapts, and an "
    "engine started with `lora_options(model)`."
)

_SYNCS = itertools.count(1)


class SyncedViews(ABC):
    """What both kinds of engine share: exports under new names, and the view of each row."""

    def __init__(self, plain: PlainLora, folder: str | Path | None) -> None:
        self._plain = plain
        # Of this run: a server may still hold the adapters, and cached prefixes, of another one.
        self._run = f"gradroute-{uuid.uuid4().hex[:8]}"
        if folder is None:
            folder = _fast_folder(plain)
        else:
            checked_folder(folder, "folder").mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{self._run}-", dir=folder))
        self._remove_folder = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self.held: dict[str, Any] = {}
        self._synced: list[tuple[float, ...]] | None = None
        self.sync()

    def sync(self) -> None:
        """Give the engine the blocks as they are now, as two new adapters; then remove the old ones.

        Raises:
            GradRouteError: blocks that are not finite, layers that were replaced, or an adapter that vLLM refuses. The
                engine then holds no view until a sync succeeds.
        """
        if not self._remove_folder.alive:
            raise GradRouteError("The views should be open. Found that close() was called. Fix: make others.")
        self._synced, written = None, self._written()
        number = next(_SYNCS)
        paths = {view: self._folder / f"{view}-{number}" for view in BLOCKS_OF}
        for view, blocks in BLOCKS_OF.items():
            self._plain.write(paths[view], self._plain.factors(blocks, self._dtype()), {})
        self._unload_all()
        for view, path in paths.items():
            # One by one: where the second is refused, the next sync removes the first.
            self.held[view] = self._load(f"{self._run}-{path.name}", path)
        for folder in self._folder.iterdir():
            if folder not in paths.values():
                shutil.rmtree(folder)
        self._synced = written

    @property
    def is_current(self) -> bool:
        """Whether the engine holds the blocks as they are: nothing of them has changed since the last sync."""
        return self._synced == self._written()

    def close(self) -> None:
        """Remove both adapters and their files."""
        self._synced = None
        self._unload_all()
        self._remove_folder()

    def _unload_all(self) -> None:
        for view in list(self.held):
            self._unload(self.held[view])
            del self.held[view]

    def views_of_rows(self, rows: int) -> list[str]:
        """The view of each row that is sampled now."""
        self.check_current()
        ablated = rows_in_view(list(self._plain.layers.values()), rows)
        return ["ablated" if row else "on" for row in ablated]

    def check_current(self) -> None:
        """Raise unless the engine holds both views of the blocks as they are."""
        if self._synced is None:
            raise GradRouteError(
                "The engine should hold both views. Found none: it was closed, or its last sync failed."
            )
        if not self.is_current:
            raise GradRouteError(
                "The engine should hold the model's blocks as they are. Found blocks that have changed since the last "
                "sync. Fix: call sync() after each optimizer step, before sampling."
            )

    def _written(self) -> list[tuple[float, ...]]:
        """Changes with every write: the address of each parameter, torch's count of writes, and the sum of its bits.

        torch does not count writes of fused optimizers and writes through `.data`.
        """
        self._plain.reshard()
        layers = self._plain.layers.values()
        parameters = [held(p) for layer in layers for block in BLOCKS for p in layer.block_parameters(block)]
        sums = [bits_of(p).sum(dtype=torch.int64) for p in parameters]
        # One wait for a device, and not one for each parameter.
        bits = torch.stack([each.to(sums[0].device) for each in sums]).tolist()
        scalings = [(layer.deployed.scaling, layer.quarantine.scaling) for layer in layers]
        return [*((p.data_ptr(), p._version, b) for p, b in zip(parameters, bits, strict=True)), *scalings]

    def _dtype(self) -> torch.dtype | None:
        """What the engine rounds factors to; None where that is not known."""
        return None

    @abstractmethod
    def _load(self, name: str, path: Path) -> Any:
        """Load an adapter; what a row is sampled with to use it."""

    @abstractmethod
    def _unload(self, held: Any) -> None:
        """Remove an adapter that `_load` loaded."""


def _fast_folder(plain: PlainLora) -> str | None:
    """A folder in memory, if there is one with room for both views twice: new ones are written before old ones go."""
    shared = "/dev/shm"
    if not os.access(shared, os.W_OK):
        return None
    numbers = sum(plain.numbers(blocks) for blocks in BLOCKS_OF.values())
    return shared if shutil.disk_usage(shared).free > 2 * 4 * numbers else None
