"""From the pooled features of pairs to directions, one estimator a file; D = f_hack - f_clean, a row per pair.

    mean_difference   v = mean D                                  with standardise: z = (f - c) / s first
    t_statistic       v = clamp(mean D / (std D / sqrt P), -3, 3)
    svd               v_1 ... v_k = top right singular vectors of D, sign by majority vote of sign(D v)
    ridge             w = argmin sum_i (y_i - b - sum_modules <w, z_i>)^2 + penalty |w|^2,   y = +1 hack, -1 clean

All return unit rows, and can hold pairs out. Your own estimator is a subclass of `Estimator`.
"""

from gradroute.directions.estimators.base import Estimator
from gradroute.directions.estimators.mean_difference import MeanDifference
from gradroute.directions.estimators.ridge import Ridge
from gradroute.directions.estimators.svd import Svd
from gradroute.directions.estimators.t_statistic import TStatistic

__all__ = [
    "Estimator",
    "MeanDifference",
    "Ridge",
    "Svd",
    "TStatistic",
]
