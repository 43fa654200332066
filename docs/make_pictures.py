"""Makes the pictures of the documentation from one run of the main job's `route` arm.

    python docs/make_pictures.py            # about a minute on one core; writes docs/pictures/*.png

Nothing is drawn here: every picture is what a `plot` of the library gives for this run.
"""

import sys
from pathlib import Path

import matplotlib
import torch

import gradroute as gr

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))

from loopholes.arms import ARMS
from loopholes.base_model import load_base
from loopholes.environment import ENVIRONMENTS
from loopholes.evaluation import evaluate, records
from loopholes.grpo import Recipe, make_detector, train
from loopholes.sampling import sample

STEPS, EVERY, N_PER_MODE = 150, 10, 64


def main() -> None:
    """Train, and draw."""
    matplotlib.use("agg")
    torch.set_num_threads(1)
    environment, recipe = ENVIRONMENTS["C"], Recipe(steps=STEPS)
    model = load_base(environment, 0)
    reports: dict[int, gr.evaluation.OnOffReport] = {}

    def on_step(step: int) -> None:
        if step == 1 or step % EVERY == 0:
            reports[step] = evaluate(model, environment, N_PER_MODE, 0)

    entry = train(model, environment, "route", 0, recipe, on_step)
    report = evaluate(model, environment, recipe.n_per_mode, 0)
    pictures = {
        "report": report.plot(),
        "training": gr.evaluation.plot_training(reports, refreshed_at=[each["step"] for each in entry["refreshes"]]),
        "dose": gr.evaluation.dose_curve(model, lambda policy: records(policy, environment, 256, 0)).plot(),
    }
    with gr.ablate_quarantine(model):  # as a refresh would see it
        detector = make_detector(model, environment, ARMS["route"], recipe, 0)
    assert detector is not None
    assert detector.gate is not None
    pictures["directions"] = gr.directions.summary(detector.directions).plot()
    prompts, _ = environment.sample_prompts(512, torch.Generator().manual_seed(1), no_hint=recipe.no_hint)
    completions = sample(model, prompts, torch.Generator().manual_seed(2), environment.completion_length)
    hacked = environment.grade(prompts, completions).hacked
    with gr.ablate_quarantine(model):
        pictures["gate"] = detector.gate.plot(detector.scores(prompts, completions), hacked)
    (DOCS / "pictures").mkdir(exist_ok=True)
    for name, (figure, _) in pictures.items():
        figure.savefig(DOCS / "pictures" / f"{name}.png", dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
