"""Oriented starts of both blocks, in the style of `torch.nn.init`: `gradroute.adapters.init.pissa_(model)`.

    A = [V; 0],  B = [0, U]:      B A = 0 exactly, and the frozen weight is untouched

V holds input directions as rows, U output directions as columns, all of length one (for `gaussian_`, on average).
Values of A and B are overwritten, trained ones too: make the optimizer afterwards. If a function raises, nothing was
written.
"""

from gradroute.adapters.init.contrastive_covariance import contrastive_covariance_
from gradroute.adapters.init.gaussian import gaussian_
from gradroute.adapters.init.pissa import pissa_
from gradroute.adapters.init.signed_seed import signed_seed_

__all__ = ["contrastive_covariance_", "gaussian_", "pissa_", "signed_seed_"]
