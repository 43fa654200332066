"""What a checkpoint carries in addition to TRL's files, so that a resumed run goes on as if it had never stopped.

    gradroute_directions_<i>.safetensors      each Directions in use
    gradroute_rank_<rank>.pt                  gates, refresher, slow start, and the rollouts that are not used up yet

TRL itself starts a new batch of rollouts when it resumes; here the rest of the old one is trained first.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device

from gradroute.directions.directions import Directions
from gradroute.errors import FileFormatError
from gradroute.gates.base import Gate
from gradroute.integrations._taken_over import take_over
from gradroute.integrations.trl.routing import Routing

_FORMAT = "gradroute-trl-1"


def save(folder: Path, trainer: Any, routing: Routing) -> None:
    """Write both files; directions on the main process only."""
    if trainer.args.should_save:
        for i, directions in enumerate(routing.all_directions):
            directions.save(_directions_file(folder, i))
    unfinished = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0
    state = {
        "format": _FORMAT,
        "directions": len(routing.all_directions),
        "gates": [gate.state_dict() for gate in _gates(routing)],
        "refresher": None if routing.refresher is None else routing.refresher.state_dict(),
        "log_ratios": None if trainer._flagging.log_ratios is None else trainer._flagging.log_ratios.state_dict(),
        "slow_start": trainer._schedule.state_dict(),
        "step": trainer._step,
        "rollouts": trainer._buffered_inputs if unfinished else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, _state_file(folder, trainer))


def load(folder: Path, trainer: Any, routing: Routing) -> None:
    """Put back what `save` wrote, into the objects that the trainer was built with.

    Raises:
        FileFormatError: no such files, files of another format, or of a run with other keywords.
    """
    file = _state_file(folder, trainer)
    if not file.is_file():
        raise FileFormatError(
            f"{folder} should hold {file.name}. Found none: it was not saved by a routed trainer, or with "
            "save_only_model=True, or by fewer processes. Fix: load its adapter as `model` and start a new run."
        )
    state = torch.load(file, map_location="cpu", weights_only=True)
    gates = _gates(routing)
    # Checkpoints from before there was a gate on log ratios, or a slow start, know of neither.
    held = [state.get(each) is not None for each in ("refresher", "log_ratios", "slow_start")]
    found = (state.get("format"), state.get("directions"), len(state.get("gates", ())), *held)
    held = [routing.refresher is not None, routing.log_ratio_gate is not None, trainer._schedule.steps > 0]
    expected = (_FORMAT, len(routing.all_directions), len(gates), *held)
    if found != expected:
        raise FileFormatError(
            f"{file} should be of a run with the same keywords: (format, directions, gates, refreshed, log_ratio_gate, "
            f"slow start) = {expected}. Found {found}."
        )
    for i, directions in enumerate(routing.all_directions):
        stored = Directions.load(_directions_file(folder, i), model=trainer.model)
        take_over(directions, stored, folder, [*gates, routing.filter])
    for gate, saved in zip(gates, state["gates"], strict=True):
        gate.load_state_dict(saved)
    if routing.refresher is not None:
        routing.refresher.load_state_dict(state["refresher"])
    if trainer._flagging.log_ratios is not None:
        trainer._flagging.log_ratios.load_state_dict(state["log_ratios"])
    trainer._schedule.load_state_dict(state.get("slow_start"))
    trainer._step = state["step"]
    trainer._buffered_inputs = send_to_device(state["rollouts"], trainer.accelerator.device)


def _gates(routing: Routing) -> list[Gate]:
    inside = getattr(routing.filter, "gate", None)
    return [gate for gate in (routing.gate, routing.log_ratio_gate, inside) if isinstance(gate, Gate)]


def _state_file(folder: Path, trainer: Any) -> Path:
    return folder / f"gradroute_rank_{trainer.args.process_index}.pt"


def _directions_file(folder: Path, i: int) -> Path:
    return folder / f"gradroute_directions_{i}.safetensors"
