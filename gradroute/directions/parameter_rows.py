"""Directions in the space of a deployed block's parameters: one row v of a module, as wide as those together.

    row of a module = concat(p.flatten() for p in layer.block_parameters("deployed"))

LoRA: A then B, width r d_in + d_out r. Gains: width r.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradroute._hashing import known_identity
from gradroute._logging import warn
from gradroute._protocol import RoutedLayer
from gradroute._sharding import wide
from gradroute._transfers import read_together
from gradroute.directions.directions import Directions
from gradroute.directions.estimators.base import unit
from gradroute.errors import GradRouteError

# Above this cosine between two rows, the hack-ward orthant of the rows and that of an orthonormal basis differ.
_OBLIQUE = 1e-3


def check_directions(directions: Directions, layers: Mapping[str, RoutedLayer], filter_name: str) -> None:
    """Raise unless `directions` were extracted from exactly these layers.

    A layer that they were extracted from and that has no rows was dropped as noise, by an estimator that was asked to.
    """
    missing = [name for name in layers if name not in directions.hack]
    unknown = [name for name in directions.hack if name not in layers]
    if missing or unknown:
        raise GradRouteError(
            f"`directions` of the {filter_name} should name every routed layer of `model` and nothing else. Without a "
            f"direction: {missing[:5] or 'none'}; not in the model: {unknown[:5] or 'none'}. Fix: extract from this "
            "very model object, wrapped or unwrapped alike, and with modules=None."
        )


def check_base_model(directions: Directions, model: nn.Module) -> None:
    """Raise unless `directions` were extracted from the base model of `model`; modules of others may be named alike."""
    if known_identity(model) != directions.provenance.model:
        raise GradRouteError(
            "`directions` should have been extracted from the base model whose gradients they are used on. Found those "
            "of another one, whose modules have the same names. Fix: extract from this model."
        )


def warn_without_sign(directions: Directions) -> None:
    """Warn that of directions of activations nobody knows which side is hack-ward; random ones have none anyway."""
    provenance = directions.provenance
    if provenance.source != "gradient" and provenance.estimator != "random":
        warn(
            f"`directions` of {provenance.source}s have no sign in gradient space: what passes for hack-ward may be "
            'the opposite. Fix: extract_gradient_directions, or side="two".'
        )


def scaled_rows(directions: Directions, name: str) -> Float[Tensor, "k d"]:
    """v / s, the weights of module `name` in a score; no rows where an estimator has dropped them."""
    rows = directions.rows.get(name)
    if rows is None:
        return wide(directions.hack[name].detach()[:0])
    rows = wide(rows.detach())
    return rows if directions.scale is None else rows / directions.scale[name].to(rows)


def orthonormal_rows(
    rows_by_module: Mapping[str, Float[Tensor, "_ _"]], *, signs_matter: bool
) -> dict[str, Float[Tensor, "_ _"]]:
    """Gram-Schmidt in the order of the rows of each module, which keeps their signs.

    Raises:
        GradRouteError: dependent rows, or rows that are not orthogonal although the signs of `V g` matter.
    """
    bases: dict[str, Tensor] = {}
    checked: dict[str, list[Tensor]] = {}
    for name, given in rows_by_module.items():
        if not len(given):
            bases[name] = wide(given)
            continue
        rows = unit(wide(given))
        Q, R = torch.linalg.qr(rows.T)
        lengths = torch.diagonal(R)
        bases[name] = (Q * lengths.sign()).T.contiguous()
        # More rows than coordinates have no length of their own.
        least = lengths.abs().min() if rows.shape[0] <= rows.shape[1] else torch.zeros_like(lengths[0])
        checked[name] = [(rows @ rows.T).fill_diagonal_(0).abs().max(), least]
    found = iter(read_together(value for values in checked.values() for value in values))
    for name in checked:
        oblique, least_length = next(found), next(found)
        if signs_matter and oblique > _OBLIQUE:
            raise GradRouteError(
                f"`directions` of `{name}` should have orthogonal rows: of oblique ones, removing what is hack-ward "
                f"along one changes the others. Found a cosine of {oblique:.3g}. Fix: orthogonalise them, or "
                'side="two".'
            )
        if least_length < 1e-4:
            raise GradRouteError(f"`directions` of `{name}` should have independent rows. Fix: drop the repeated ones.")
    return bases
