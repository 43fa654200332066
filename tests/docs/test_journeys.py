"""The files that CONTRIBUTING.md names for a reader's three journeys are those that run, no more and no fewer."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from support import trl_runs
from support.doc_pages import ROOT
from support.models import randomize_blocks
from support.tiny_models import base_model
from transformers import TrainerCallback

import gradroute as gr

pytestmark = trl_runs.quiet
PACKAGE = Path(gr.__file__).parent


def listed(journey: str) -> set[str]:
    """The files of one journey in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = re.search(rf"^\*\*{re.escape(journey)}\*\*(.*?)(?=^\*\*|^## )", text, re.MULTILINE | re.DOTALL)
    assert section is not None, journey
    return set(re.findall(r"`([\w/]+\.py)`", section[1]))


@contextmanager
def recorded() -> Iterator[set[str]]:
    """The files in which a function is called inside the block, without the shared ones at the root of the package."""
    found: set[str] = set()

    def profile(frame: Any, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE) and path.parent != PACKAGE:
            found.add(path.relative_to(PACKAGE).as_posix())

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(before)


def routed_model() -> torch.nn.Module:
    return randomize_blocks(gr.attach(base_model("llama", seed=0), r=2, lora_alpha=4.0))


def step(model: torch.nn.Module, flags: list[bool]) -> None:
    with gr.route(model, gr.RouteMask.classic(flags)):
        model(torch.tensor([[3, 4, 5], [6, 7, 8]]), use_cache=False).logits.square().mean().backward()


def test_a_forward_under_a_route() -> None:
    model = routed_model()
    with recorded() as files:
        step(model, [True, False])
    assert files == listed("A forward under a route, and its backward.")


def test_a_refresh() -> None:
    model = routed_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with gr.ablate_quarantine(model):
        directions = trl_runs.extract(model)
    refresher = gr.Refresher(directions, lambda: trl_runs.extract(model), model=model, every=1)
    refresher.watch(optimizer)
    step(model, [True, False])
    optimizer.step()
    with recorded() as files:
        refresher.step()
    assert directions.version == 1
    assert files == listed("A refresh.")


def test_a_step_of_trl(tmp_path: Path) -> None:
    model, files = trl_runs.wrapped(), set()

    class SecondStep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                self.recording = recorded()
                self.files = self.recording.__enter__()

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2 and not files:
                self.recording.__exit__(None, None, None)
                files.update(self.files)

    with gr.ablate_quarantine(model):
        directions = trl_runs.extract(model)
    refresher = gr.Refresher(directions, lambda: trl_runs.extract(model), model=model, every=1)
    options = {"directions": directions, "gate": gr.BandGate(directions), "refresher": refresher}
    trainer = trl_runs.trainer(tmp_path, model, args_max_steps=2, **options)
    trainer.add_callback(SecondStep())
    trainer.train()
    journeys = "A forward under a route, and its backward.", "A refresh.", "A step of TRL."
    assert files <= set().union(*map(listed, journeys))
    assert listed("A step of TRL.") <= files
