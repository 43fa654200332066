"""What a checkpoint of verl carries in addition: directions, gate and refresher, the same on all ranks.

<actor folder>/gradroute/directions.safetensors, state.pt
"""

from pathlib import Path
from typing import Any

import torch

from gradroute._all_ranks import written_by_one
from gradroute.directions.directions import Directions
from gradroute.errors import FileFormatError
from gradroute.integrations._taken_over import take_over

_FORMAT = "gradroute-verl-1"


def save(local_path: str, engine: Any) -> None:
    """Write both files, on the first rank."""
    with written_by_one("save_checkpoint", engine.module) as writes:
        if not writes:
            return
        folder = Path(local_path) / "gradroute"
        folder.mkdir(parents=True, exist_ok=True)
        engine.directions.save(folder / "directions.safetensors")
        refresher = engine.refresher
        state = {
            "format": _FORMAT,
            "gate": engine.gate.state_dict(),
            "refresher": None if refresher is None else refresher.state_dict(),
        }
        torch.save(state, folder / "state.pt")


def load(local_path: str, engine: Any) -> None:
    """Put back what `save` wrote, into the objects that the engine made.

    Raises:
        FileFormatError: no such files, or those of a run with other settings.
    """
    folder = Path(local_path) / "gradroute"
    if not (folder / "state.pt").is_file():
        raise FileFormatError(
            f"`{local_path}` should hold gradroute/state.pt. Found none: it was not saved by a routed engine. Fix: "
            "trainer.resume_mode=disable, and its adapter as model.lora_adapter_path."
        )
    state = torch.load(folder / "state.pt", weights_only=True)
    found, expected = (state.get("format"), state.get("refresher") is not None), (_FORMAT, engine.refresher is not None)
    if found != expected:
        raise FileFormatError(f"`{folder}` should be of (format, refreshed) = {expected}. Found {found}.")
    saved = Directions.load(folder / "directions.safetensors", model=engine.module)
    take_over(engine.directions, saved, folder, [engine.gate])
    engine.gate.load_state_dict(state["gate"])
    if engine.refresher is not None:
        engine.refresher.load_state_dict(state["refresher"])
