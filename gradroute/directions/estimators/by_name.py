"""Estimators by what `str` of them gives: "ridge", "svd(k=2)"."""

import ast

from gradroute.directions.estimators.base import Estimator
from gradroute.directions.estimators.mean_difference import MeanDifference
from gradroute.directions.estimators.ridge import Ridge
from gradroute.directions.estimators.svd import Svd
from gradroute.directions.estimators.t_statistic import TStatistic
from gradroute.errors import GradRouteError


def as_estimator(estimator: "str | Estimator") -> Estimator:
    """An estimator from itself, or from what `str` of it gives: "ridge", "svd(k=2)".

    Raises:
        GradRouteError: no such estimator or setting.
    """
    if isinstance(estimator, Estimator):
        return estimator
    kinds = {kind.name: kind for kind in (MeanDifference, TStatistic, Svd, Ridge)}
    try:
        parsed = ast.parse(estimator, mode="eval").body
        call = parsed if isinstance(parsed, ast.Call) else ast.Call(parsed, [], [])
        settings = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        return kinds[call.func.id](*map(ast.literal_eval, call.args), **settings)  # type: ignore[attr-defined]
    except (SyntaxError, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, GradRouteError):
            raise
        raise GradRouteError(
            f"`estimator` should be an Estimator or one of {', '.join(kinds)}. Found {estimator!r}."
        ) from error
