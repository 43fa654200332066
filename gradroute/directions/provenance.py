"""The origin of directions; most of it has to be the same for one set to refresh another."""

from dataclasses import dataclass

from gradroute.directions._draws import Control
from gradroute.errors import RefreshError


@dataclass(frozen=True)
class Provenance:
    """The origin of directions.

    Args:
        source: "activation" or "gradient".
        feature, reduction: see `capture_activations`.
        estimator: `str` of the estimator, such as "mean_difference"; "random" for random controls.
        pair_hash: SHA-256 of the pairs.
        model: identity of the frozen base model.
        view: the view of the model that was measured, as `RoutedLayer.view` names it.
        seed: of a control.
        control: None for the real thing; see `gradroute.directions.controls`.
    """

    source: str
    feature: str
    reduction: str
    estimator: str
    pair_hash: str
    model: str
    view: str
    seed: int | None = None
    control: Control | None = None

    def check_refreshed_by(self, fresh: "Provenance") -> None:
        """Raise `RefreshError` unless directions of this origin can be updated with those of the origin `fresh`."""
        same = ["source", "feature", "reduction", "pair_hash", "model"]
        # A control takes the real thing and makes itself of it; a random one of whatever estimator.
        if fresh.control is not None:
            same += ["estimator", "control", "seed"]
        elif self.estimator != "random":
            same += ["estimator"]
        for name in same:
            if getattr(self, name) != getattr(fresh, name):
                raise RefreshError(
                    f"`fresh` should have the {name} of the directions it refreshes, {getattr(self, name)!r}. "
                    f"Found {getattr(fresh, name)!r}. Fix: extract from the same pairs and model, as before."
                )
