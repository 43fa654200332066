"""The operation of a routed layer as a function, for a layer of your own.

    y = base + s_d B_d A_d x + m s_q B_q A_q x,      parameter gradients weighted by g_d and g_q

`base` is the output of the frozen part, whatever computes it.
"""

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor

from gradroute._checks import one_of
from gradroute._protocol import Block
from gradroute.adapters._gates import Gates
from gradroute.adapters._op import add_lora_blocks
from gradroute.errors import RouteError

StopGradient = Literal["parameters", "branch"]


def quarantine_lora(
    x: Float[Tensor, "*batch d_in"],
    base_output: Float[Tensor, "*batch d_out"],
    deployed: Block,
    quarantine: Block,
    *,
    m: Float[Tensor, "*batch"] | None = None,
    g_d: Float[Tensor, "*batch"] | None = None,
    g_q: Float[Tensor, "*batch"] | None = None,
    stop_gradient: StopGradient = "parameters",
) -> Float[Tensor, "*batch d_out"]:
    """y = base_output + s_d B_d A_d x + m s_q B_q A_q x, with parameter gradients weighted by g_d and g_q.

    Args:
        x: input of the layer.
        base_output: output of the frozen layer; it is not written to.
        deployed, quarantine: `Block(A, B, scaling)` with A (r, d_in), B (d_out, r).
        m, g_d, g_q: one float per leading index of `x`; None means 1 everywhere.
        stop_gradient: "parameters" (exact dx) or "branch" (dx is gated too).

    Raises:
        RouteError: a gate of another shape, not floating point, or that requires a gradient itself; a double backward.
    """
    one_of("stop_gradient", stop_gradient, get_args(StopGradient), RouteError)
    for name, gate in (("m", m), ("g_d", g_d), ("g_q", g_q)):
        if gate is not None and (gate.shape != x.shape[:-1] or not gate.is_floating_point() or gate.requires_grad):
            raise RouteError(
                f"`{name}` should be floating point, of shape {tuple(x.shape[:-1])}, and not require a gradient. Found "
                f"{gate.dtype}, {tuple(gate.shape)}, requires_grad={gate.requires_grad}."
            )
    branch = stop_gradient == "branch"
    return add_lora_blocks(x, base_output, deployed, quarantine, gates=Gates(m, g_d, g_q), branch=branch)
