"""Writes `public-api.md` and the pages of `reference/` from what each subpackage exports and from its docstrings.

    python docs/make_reference.py

Names stand in the order in which a training loop meets them. `reference/index.md` and `reference/integrations.md` are
written by hand.
"""

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import gradroute

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from formulas import with_mathematics

COMMAND = "python docs/make_reference.py"
MODULES = (
    "gradroute.adapters", "gradroute.adapters.init", "gradroute.directions", "gradroute.directions.estimators",
    "gradroute.gates", "gradroute.schemes", "gradroute.advantages", "gradroute.refresh", "gradroute.filters",
    "gradroute.optim", "gradroute.evaluation", "gradroute.errors",
)  # fmt: skip
"""The modules whose exported names are public."""

PAGES: dict[str, tuple[str, dict[str, str]]] = {
    "adapters": ("Blocks, masks and views", {
        "Add the blocks": "attach detach",
        "Add the blocks, with PEFT": "QuarantineLoraConfig",
        "The routed layer": "QuarantineLoRA quarantine_lora",
        "Masks": "RouteMask",
        "Masks that are decided after the forward": "PendingMask",
        "Routes": "route set_route clear_route",
        "Views": "ablate_quarantine disable_adapters frozen_quarantine",
        "Look at a model": "check_model Finding parameter_summary ParameterSummary deployed_parameters "
        "quarantine_parameters",
        "Gains instead of LoRA": "SvdGain",
        "Oriented starts": "pissa_ contrastive_covariance_ signed_seed_ gaussian_",
    }),
    "directions": ("Directions", {
        "Pairs": "ContrastivePair load_pairs",
        "Extract": "extract_activation_directions extract_gradient_directions",
        "Directions": "Directions Provenance",
        "Features of rollouts": "capture_activations capture_gradients Capture",
        "Are they any good?": "summary DirectionsSummary validate Validation",
        "Controls": "shuffled_pairs placebo_pairs reversed_sign shuffled_flags",
        "Estimators": "MeanDifference TStatistic Svd Ridge Estimator",
    }),
    "gates": ("Gates and advantages", {
        "A direction, on the scale of its pairs": "BandGate",
        "A direction, among recent rollouts": "QuantileGate",
        "Given scores and labels": "ThresholdGate LabelGate",
        "What the quarantine has learned": "LogRatioGate",
        "Common to all gates": "Gate ScoreFigures",
        "Advantages": "clean_baseline_advantages weighted_baseline_advantages GroupAdvantages",
        "Published schemes": "graft_mask sgtm_mask expand_route_ablate_mask detach_mix_mask",
    }),
    "refresh": ("Refreshing", {"Refresh": "Refresher RefreshReport Watch"}),
    "filters": ("Filters", {
        "Run a filter": "apply_filter attach_filter AttachedFilter",
        "By rollouts": "RolloutFilter RolloutRecord",
        "By projection": "ProjectionFilter",
        "Figures": "FilterStats HackwardShare",
        "Common to all filters": "GradientFilter FilteredGradients",
    }),
    "optim": ("Optimizers", {
        "A learning rate for each block": "block_groups slow_start SlowStart",
        "Blocks that no row trains": "skip_idle_blocks IdleBlockSkip",
        "Audits": "audit_updates UpdateAudits UpdateAudit BlockUpdate",
        "Corrections": "project_updates UpdateProjection purge_moments decay_toward_start DecayTowardStart",
    }),
    "evaluation": ("Evaluation", {
        "On and ablated": "EvalRecord evaluate_on_off OnOffReport ViewRates Rate Records",
        "Over training and over the dose": "plot_training dose_curve DoseCurve",
        "Does the engine follow?": "assert_ablation_reaches assert_engine_follows",
        "Verdicts": "compare compare_all Verdict Controls Criteria",
        "Runs of an arm": "ArmRuns ModeOutcomes",
        "Was a second block earned?": "OneBlock",
    }),
    "export": ("Export", {
        "Write a checkpoint": "export_deployed export_full",
        "Merge": "merge_deployed",
        "Load both blocks": "load_quarantined",
        "Model card": "write_card",
    }),
    "errors": ("Errors", {
        "Errors and warnings": "GradRouteError RouteError RefreshError DeadDirectionError TargetError FileFormatError "
        "GradRouteWarning",
    }),
}  # fmt: skip
"""Page -> its title, and its sections with their names, in the order of use."""


def exported(module: str) -> list[str]:
    """`__all__`, or the public functions and classes that a module without it defines."""
    found = vars(import_module(module))
    own = [name for name, value in found.items() if getattr(value, "__module__", "") == module and name[0] != "_"]
    return list(found.get("__all__", sorted(own)))


def path_of(name: str) -> str:
    """What a user imports: `gradroute.attach`, `gradroute.adapters.set_route`.

    Raises:
        ValueError: nothing exports it.
    """
    module = next((module for module in MODULES if name in exported(module)), None)
    if module is None:
        raise ValueError(f"Every name of `PAGES` should be exported. Found {name!r}. Fix: remove it, or export it.")
    return f"gradroute.{name}" if name in gradroute.__all__ else f"{module}.{name}"


def check_pages() -> None:
    """Every exported name is on one page.

    Raises:
        ValueError: on none, or on more.
    """
    placed = [name for _, sections in PAGES.values() for names in sections.values() for name in names.split()]
    public = {name for module in MODULES for name in exported(module)}
    if sorted(placed) != sorted(public):
        wrong = sorted(name for name in public | set(placed) if placed.count(name) != 1)
        raise ValueError(f"`PAGES` should hold every public name once. Found otherwise: {', '.join(wrong)}.")


def thing(path: str) -> Any:
    """What a path names."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def defined_as(path: str) -> str:
    """Where it is written: `gradroute.attach` alone would name the file `attach.py`, to one that does not import it."""
    named = thing(path)
    return f"{named.__module__}.{named.__qualname__}"


def head(path: str) -> str:
    """The first line of its docstring; for an alias of a type, the type."""
    named = thing(path)
    if inspect.isclass(named) or inspect.isroutine(named) or inspect.ismodule(named):
        line = with_mathematics((inspect.getdoc(named) or "").partition("\n")[0])
    else:
        line = f"`{named}`"
    return line.replace("|", "\\|")


def introductions(names: str, seen: set[str]) -> list[str]:
    """Docstrings of the subpackages of these names, and of the files that define them where these hold a formula."""
    found = []
    for name in names.split():
        defined_in = getattr(thing(path_of(name)), "__module__", "")
        packages = [module for module in MODULES if name in exported(module)]
        for module in [*packages, *([defined_in] if defined_in.startswith("gradroute") else [])]:
            text = (import_module(module).__doc__ or "").strip()
            if module not in seen and (module in packages or re.search(r"^    |^\|", text, re.MULTILINE)):
                found.append(with_mathematics(text))
            seen.add(module)
    return found


def references() -> dict[str, str]:
    """The pages of the reference: in each section the formulas, then an entry for each name."""
    texts, seen = {}, set[str]()
    for page, (title, sections) in PAGES.items():
        lines = [f"# {title}"]
        for heading, names in sections.items():
            intro = introductions(names, seen)
            if len(lines) == 1 and intro:
                lines += ["", intro.pop(0)]
            lines += ["", f"## {heading}"]
            lines += [line for text in intro for line in ("", text)]
            for path in map(path_of, names.split()):
                name = path.rpartition(".")[2]
                lines += ["", f"::: {defined_as(path)}", "    options:"]
                lines += [f"      heading: {path}", f"      toc_label: {name}"]
        texts[page] = "\n".join(lines) + "\n"
    return texts


def public_api() -> str:
    """Every public name, with the first line of its docstring."""
    lines = ["# Every public name", "", f"Written by `{COMMAND}`: the first line of each docstring, in order of use."]
    lines += [
        "",
        f"After `import gradroute as gr`, {len(gradroute.__all__)} names are at the top, as `gr.attach`. The others "
        "are in their subpackage, as",
        "`gr.adapters.set_route`: what is subclassed, returned, or seldom needed.",
    ]
    for page, (title, sections) in PAGES.items():
        lines += ["", f"## [{title}](reference/{page}.md)", "", "| name | what it is |", "|---|---|"]
        paths = [path_of(name) for names in sections.values() for name in names.split()]
        lines += [f"| `{path.replace('gradroute', 'gr', 1)}` | {head(path)} |" for path in paths]
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """Every page that this script writes."""
    check_pages()
    return {
        DOCS / "public-api.md": public_api(),
        **{DOCS / "reference" / f"{page}.md": text for page, text in references().items()},
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
