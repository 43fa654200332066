"""A run that is saved and resumed goes on bit for bit: model, optimizer, directions, gates, refresher, handles, RNG."""

import warnings
from pathlib import Path

import pytest
import torch
from support.language_models import MODULES, PAIRS, VOCAB, ids_only, routed_mixer
from torch.nn.functional import cross_entropy

import gradroute as gr
from gradroute.gates.quantile import QuantileGate
from gradroute.optim.audit import audit_updates
from gradroute.optim.corrections import decay_toward_start
from gradroute.optim.idle_blocks import skip_idle_blocks


class Run:
    """A small loop that uses everything with a state; dropout and sampled tokens use the global generator."""

    def __init__(self, folder: Path | None = None) -> None:
        self.model = routed_mixer(dropout=0.2).train()
        trained = [*gr.deployed_parameters(self.model), *gr.quarantine_parameters(self.model)]
        self.optimizer = torch.optim.AdamW([p for _, p in trained], lr=0.02, weight_decay=0.0)
        saved = {} if folder is None else torch.load(folder / "run.pt", weights_only=False)
        if saved:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        decay = decay_toward_start(self.model, self.optimizer, 0.1)
        if folder is None:
            with gr.ablate_quarantine(self.model):
                self.directions = self.extract()
        else:
            self.directions = gr.Directions.load(folder / "directions.safetensors", model=self.model)
        self.gate = QuantileGate(self.directions, tails=(0.3, 0.7), half_life=8.0, capacity=20, warm_up=6, window=2)
        self.band = gr.BandGate(self.directions)
        self.labels = gr.LabelGate(recall=0.7, false_positive_rate=0.05, seed=1)
        self.refresher = gr.Refresher(self.directions, self.extract, model=self.model, every=2)
        self.refresher.watch(self.optimizer, self.gate, self.band)
        self.skip = skip_idle_blocks(self.model, self.optimizer)
        self.stateful = {
            "gate": self.gate, "band": self.band, "labels": self.labels, "refresher": self.refresher, "decay": decay
        }  # fmt: skip
        for name, each in self.stateful.items():
            if saved:
                each.load_state_dict(saved[name])
        self.audits = audit_updates(self.model, self.optimizer)
        self.trace: list[object] = []
        torch.manual_seed(0)
        if saved:
            torch.set_rng_state(saved["rng"])

    def extract(self) -> gr.Directions:
        return gr.extract_activation_directions(self.model, PAIRS, forward_fn=ids_only)

    def save(self, folder: Path) -> None:
        self.directions.save(folder / "directions.safetensors")
        states = {name: each.state_dict() for name, each in self.stateful.items()}
        own = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
        torch.save({**own, **states}, folder / "run.pt")

    def step(self) -> None:
        ids = torch.randint(VOCAB, (6, 5))
        with (
            torch.no_grad(),
            gr.ablate_quarantine(self.model),
            gr.capture_activations(self.model, pool=torch.ones(6, 5)) as acts,
        ):
            self.model(ids)
        mask = self.gate(acts)
        z = self.band.z(self.directions.score(acts))
        noisy = self.labels(torch.rand(6) < 0.5)
        with gr.route(self.model, gr.RouteMask.weights(mask.m, mask.g_d, mask.g_q * noisy.g_q)):
            cross_entropy(self.model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        report = self.refresher.step()
        self.trace += [mask.g_d.tolist(), mask.m.tolist(), z.tolist(), noisy.g_d.tolist(), report, self.gate.thresholds]
        audit = self.audits.read()
        self.trace += [audit.deployed, audit.quarantine]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


@pytest.fixture
def ran(tmp_path: Path):
    """The run to step 6, and what its first half left on disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gr.GradRouteWarning)
        whole = Run()
        for step in range(6):
            if step == 3:
                whole.save(tmp_path)
                middle = weights(whole), len(whole.trace)
            whole.step()
        yield whole, middle, tmp_path


def test_a_resumed_run_continues_bit_identically(ran) -> None:
    whole, (middle, seen), folder = ran
    resumed = Run(folder)
    torch.testing.assert_close(weights(resumed), middle, rtol=0, atol=0)
    for _ in range(3):
        resumed.step()
    assert any(not torch.equal(weights(whole)[name], value) for name, value in middle.items())
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert resumed.trace == whole.trace[seen:]
    for mine, its in (
        (resumed.directions.rows, whole.directions.rows),
        (resumed.directions.hack, whole.directions.hack),
    ):
        assert all(torch.equal(mine[name], its[name]) for name in MODULES)
    assert (resumed.directions.version, resumed.directions.step) == (whole.directions.version, whole.directions.step)
    assert resumed.refresher.reports == whole.refresher.reports
    assert [report.step for report in whole.refresher.reports][-1] > 3


@pytest.mark.parametrize("lost", ["gate", "labels", "refresher", "decay", "optimizer", "rng"])
def test_each_state_is_needed(ran, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the test above would hold without it."""
    whole, (_, seen), folder = ran
    saved = torch.load(folder / "run.pt", weights_only=False)
    fresh = Run()
    if lost in ("optimizer", "rng"):
        saved[lost] = fresh.optimizer.state_dict() if lost == "optimizer" else torch.get_rng_state()
        torch.save(saved, folder / "run.pt")
        resumed = Run(folder)
    else:
        with monkeypatch.context() as patched:
            patched.setattr(type(fresh.stateful[lost]), "load_state_dict", lambda self, state: None)
            resumed = Run(folder)
    try:
        for _ in range(3):
            resumed.step()
    except gr.errors.RefreshError:
        assert lost == "refresher"
        return
    different = resumed.trace != whole.trace[seen:] or resumed.refresher.reports != whole.refresher.reports
    assert different or any(not torch.equal(weights(resumed)[n], v) for n, v in weights(whole).items())


@pytest.mark.parametrize("name", ["gate", "band", "refresher"])
def test_a_state_without_its_directions_raises(ran, name: str) -> None:
    _, _, folder = ran
    saved = torch.load(folder / "run.pt", weights_only=False)
    fresh = Run()
    with pytest.raises(gr.errors.FileFormatError, match="saved with version=1. Found 0 here.*load the Directions"):
        fresh.stateful[name].load_state_dict(saved[name])
