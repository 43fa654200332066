"""Gains on the singular directions of the frozen weight: `attach(..., parametrization="svd_gain")`.

    W ~ U diag(S) Vh,   top k = max(r, r_quarantine) triplets, frozen
    y = W x + b + s_d U diag(S tanh g_d) Vh x + m s_q U diag(S tanh g_q) R Vh x,      s = lora_alpha / r
    R = (I - K) (I + K)^-1,   K skew-symmetric (with `rotate=True`; otherwise R = I)

Each block takes its first r rows of Vh and columns of U. g = 0 and K = 0: at initialisation y = W x + b, bitwise.

Without rotation both blocks scale the *same* axes, and ablating the quarantine only shrinks what the deployed block
scales too; published as "route v1". The rotation lets the quarantine read other axes, within the span of Vh. Its
gradient is proportional to tanh g_q: the gain moves first.
Source: antipasto (wassname); Cayley transform: Helfrich et al. 2018 (arXiv:1707.09520).
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradroute._protocol import Block, BlockName
from gradroute._sharding import readable, whole, wide
from gradroute.adapters._singular import top_singular_triplets
from gradroute.adapters.layer import StopGradient, WrappedLinear
from gradroute.errors import TargetError


class SvdGain(WrappedLinear):
    """y = base_layer(x) + s_d U diag(S tanh g_d) Vh x + m s_q U diag(S tanh g_q) R Vh x around a frozen `nn.Linear`.

    Args:
        base_layer: the linear to adapt; its parameters are frozen and stay where they are.
        r: number of deployed gains.
        r_quarantine: number of quarantine gains; None means r.
        lora_alpha: s_d = lora_alpha / r, s_q = lora_alpha / r_quarantine.
        rotate: give the quarantine the trainable rotation R.
        stop_gradient: see `quarantine_lora`.

    Parameters: `gain` (r,), `gain_quarantine` (r_quarantine,), `rotation_quarantine` (entries of K below its diagonal).
    U, S and Vh are buffers in the `state_dict`: with a rotation, the signs of another SVD would change what K means.
    All have the dtype and device of the base weight; the SVD and R are computed in float32 or wider.

    Raises:
        TargetError: more gains than the weight has singular values above rounding noise, a weight that is not finite
            or on the meta device, or a rotation of a single gain.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    def __init__(
        self,
        base_layer: nn.Linear,
        *,
        r: int,
        r_quarantine: int | None = None,
        lora_alpha: float,
        rotate: bool = False,
        stop_gradient: StopGradient = "parameters",
    ) -> None:
        super().__init__(base_layer, r=r, r_quarantine=r_quarantine, lora_alpha=lora_alpha, stop_gradient=stop_gradient)
        if rotate and self.r_quarantine == 1:
            raise TargetError("`rotate` with `r_quarantine=1`: one axis cannot be rotated. Fix: r_quarantine >= 2.")
        weight = whole(base_layer.weight)
        if weight.is_meta or not torch.isfinite(weight).all():
            found = "a weight on the meta device" if weight.is_meta else "values that are not finite"
            raise TargetError(f"`base_layer` should have a finite weight to decompose. Found {found}.")
        triplets = top_singular_triplets(wide(weight), max(self.r, self.r_quarantine))
        for name, values in zip(("U", "S", "Vh"), triplets, strict=True):
            self.register_buffer(name, values.to(weight))
        self.rotate = rotate
        self.gain = nn.Parameter(weight.new_zeros(self.r))
        self.gain_quarantine = nn.Parameter(weight.new_zeros(self.r_quarantine))
        if rotate:
            self.rotation_quarantine = nn.Parameter(weight.new_zeros(self.r_quarantine * (self.r_quarantine - 1) // 2))

    @property
    def deployed(self) -> Block:
        """A = Vh, B = U diag(S tanh g_d)."""
        return Block(self.Vh[: self.r], self._scaled_U(self.gain), self.lora_alpha / self.r)

    @property
    def quarantine(self) -> Block:
        """A = R Vh, B = U diag(S tanh g_q)."""
        A = self.Vh[: self.r_quarantine]
        if self.rotate:
            R = cayley(readable(self.rotation_quarantine, self.name), self.r_quarantine)
            A = (R @ A.to(R.dtype)).to(A.dtype)
        return Block(A, self._scaled_U(self.gain_quarantine), self.lora_alpha / self.r_quarantine)

    @property
    def gain_readout(self) -> Float[Tensor, "d_out r"]:
        """s_d U diag(S (1 - tanh^2 g_d)), so that h * (delta @ gain_readout) = dL/dg_d: not zero at g_d = 0."""
        slope = wide(self.S[: self.r]) * (1 - torch.tanh(wide(readable(self.gain, self.name))).square())
        return self.lora_alpha / self.r * wide(self.U[:, : self.r]) * slope

    def _scaled_U(self, gain: Float[Tensor, " r"]) -> Float[Tensor, "d_out r"]:
        gain = readable(gain, self.name)
        return self.U[:, : len(gain)] * (self.S[: len(gain)] * torch.tanh(gain))

    def block_parameters(self, block: BlockName) -> Iterator[nn.Parameter]:
        if block == "deployed":
            yield self.gain
            return
        yield self.gain_quarantine
        if self.rotate:
            yield self.rotation_quarantine

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rotate=True" if self.rotate else super().extra_repr()


def cayley(below_diagonal: Float[Tensor, " entries"], r: int) -> Float[Tensor, "r r"]:
    """R = (I - K) (I + K)^-1, orthogonal of determinant 1, for the skew-symmetric K with these entries; R(0) = I.

    Args:
        below_diagonal: the r (r - 1) / 2 entries of K below its diagonal, row by row.
        r: number of rows.

    In float32 or wider. I + K is never singular: the eigenvalues of K are imaginary.
    """
    entries = wide(below_diagonal)
    rows, columns = torch.tril_indices(r, r, offset=-1, device=entries.device)
    lower = entries.new_zeros(r, r).index_put((rows, columns), entries)
    K, identity = lower - lower.T, torch.eye(r, dtype=entries.dtype, device=entries.device)
    # The two factors commute.
    R: Tensor = torch.linalg.solve(identity + K, identity - K)
    return R
