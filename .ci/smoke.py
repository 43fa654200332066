"""Run by an installed gradroute, away from its repository: the shape of a user's hour in a few lines."""

import sys
import tempfile
from pathlib import Path

import torch

import gradroute as gr

here = Path(gr.__file__)
if "site-packages" not in here.parts:
    sys.exit(f"expected the installed package; found {here}")
if not (here.parent / "py.typed").is_file():
    sys.exit("expected py.typed in the package, or type checkers ignore its annotations")
missing = [name for name in gr.__all__ if not hasattr(gr, name)]
if missing:
    sys.exit(f"names of __all__ that are not there: {missing}")


class Tiny(torch.nn.Module):
    """A language model as far as gradroute is concerned."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = torch.nn.Embedding(16, 8), torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(torch.tanh(self.linear(self.embed(ids))))


torch.manual_seed(0)
model = gr.attach(Tiny(), r=2, lora_alpha=4, target_modules=["linear"])
pairs = [gr.ContrastivePair([1, 5], [7, 8], [9, 10]), gr.ContrastivePair([2, 3], [7, 12], [13, 14])]


def extract() -> gr.Directions:
    """From the pairs."""
    with gr.ablate_quarantine(model):
        return gr.extract_activation_directions(model, pairs, forward_fn=lambda model, ids, _: model(ids))


directions = extract()
gate = gr.BandGate(directions)
refresher = gr.Refresher(directions, extract, model=model, every=1)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
ids = torch.randint(16, (4, 6))
for _ in range(2):
    with torch.no_grad(), gr.ablate_quarantine(model), gr.capture_activations(model, pool=torch.ones(4, 6)) as acts:
        model(ids)
    with gr.route(model, gate(directions.score(acts))):
        model(ids).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    refresher.step()
report = gr.evaluate_on_off(model, lambda _: [gr.EvalRecord("file", False, 0, True, False)])
with tempfile.TemporaryDirectory() as folder:
    card = gr.write_card(model, report, f"{folder}/card.md", routed_by=gate, refresher=refresher)
    gr.export_deployed(model, f"{folder}/deployed", card=card)
    written = sorted(path.name for path in Path(folder, "deployed").iterdir())
if written != ["README.md", "adapter_config.json", "adapter_model.safetensors"]:
    sys.exit(f"expected an adapter and its card; found {written}")
print(f"gradroute {gr.__version__} on Python {sys.version.split()[0]}, torch {torch.__version__}: {refresher}")
