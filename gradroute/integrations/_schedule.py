"""Check that a schedule of refreshes fits a run."""

from gradroute.errors import RefreshError
from gradroute.refresh.refresher import Refresher


def check_comes_due(refresher: Refresher, steps_left: int) -> None:
    """Refuse a run in which directions that were never refreshed would stay so, although a refresher was given.

    Raises:
        RefreshError: the first refresh lies behind the last of `steps_left` optimizer steps.
    """
    if refresher.reports:
        return
    due = max(refresher.every - refresher.age, refresher.warm_up - refresher.steps)
    if due > steps_left:
        raise RefreshError(
            f"`refresher` should come due in the {steps_left} optimizer steps of this run. Found the first refresh "
            f"after {due}. Fix: refresh more often, or leave the refresher out for frozen directions."
        )
