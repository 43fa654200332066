"""How far apart two sets of rows of one module are: principal angles of their spans, overlap of row with row."""

import torch
from jaxtyping import Float
from torch import Tensor

from gradroute.directions.estimators.base import unit


def principal_angles(V: Float[Tensor, "k d"], W: Float[Tensor, "l d"]) -> Float[Tensor, " n"]:
    """arccos of the singular values of Q_V^T Q_W, smallest first; min(k, l) angles between 0 and pi / 2.

    The rows are on a device with float64.
    """
    Q_V, Q_W = (torch.linalg.qr(rows.double().T).Q for rows in (V, W))
    angles: Tensor = torch.linalg.svdvals(Q_V.T @ Q_W).clamp(max=1).arccos()
    return angles


def overlap(V: Float[Tensor, "k d"], W: Float[Tensor, "l d"]) -> Float[Tensor, ""]:
    """Sum over rows of <v_i, w_i> over the larger number of rows; rows that only one side has overlap with nothing."""
    shared = min(len(V), len(W))
    return (unit(V[:shared]) * unit(W[:shared].to(V))).sum() / max(len(V), len(W))
