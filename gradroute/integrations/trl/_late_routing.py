"""When `trainer.routing` is made of the trainer's keywords: at once, or once the model is sharded.

    FSDP2, ZeRO-3, and `directions` a function     before the first rollouts, on every rank
    else                                           when the trainer is built

Before a model is sharded a rank need not hold its weights: those that are not the main process may have loaded none.
"""

from typing import Any

from gradroute.errors import GradRouteError
from gradroute.integrations.trl._flagging import Flagging
from gradroute.integrations.trl._options import Options
from gradroute.integrations.trl._recall import check_recall
from gradroute.integrations.trl._requirements import group_share, shards
from gradroute.integrations.trl.from_pairs import extracted_from
from gradroute.integrations.trl.routing import Routing, is_function, resolve


class LateRouting:
    """Holds the keywords until they can be resolved.

    Args:
        trainer: whose keywords they are; it gets a `_flagging` when they are resolved.
        options: those that are values.
        objects: the others, as `resolve` takes them.
    """

    def __init__(self, trainer: Any, options: Options, **objects: Any) -> None:
        template = getattr(trainer.args, "chat_template_kwargs", None)
        directions = extracted_from(options.directions, trainer.processing_class, template)
        self._trainer, self._keywords = (
            trainer,
            {
                **objects,
                "directions": directions,
                "refresher": options.refresher,
                "detector_recall": options.detector_recall,
                "log_ratio_gate": options.log_ratio_gate,
                "score_view": options.score_view,
                "clean_baseline": options.clean_baseline,
                "ablated_per_group": group_share(options.ablated_fraction, trainer.num_generations),
                "autocast": trainer.accelerator.autocast,
            },
        )
        self._resolved: Routing | None = None
        if not (shards(trainer) and is_function(directions)):
            self.resolve()

    def resolve(self) -> Routing:
        """The routing, made now unless it is there; on a sharded model all ranks come here together."""
        if self._resolved is None:
            resolved = resolve(self._trainer.model, **self._keywords)
            check_recall(resolved)
            self._trainer._flagging = Flagging(self._trainer, resolved)
            self._resolved = resolved
        return self._resolved

    def get(self) -> Routing:
        """The routing.

        Raises:
            GradRouteError: it is not made yet.
        """
        if self._resolved is None:
            raise GradRouteError(
                "`trainer.routing` should be read after train() has begun: the model is sharded then, and `directions` "
                "are extracted from it. Found that it has not. Fix: read it later, or give Directions that are made."
            )
        return self._resolved
