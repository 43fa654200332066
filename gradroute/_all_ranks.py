"""What all ranks of a sharded model do together: every rank reads, one rank writes, nobody reads half a file.

    rank arrives: count += 1        last one: "all here"        count < ranks after PATIENCE: raise on those that wait
    one writes                      "written", or its error     the others wait for it

A rank that reads alone, as in `if is_main_process: export_deployed(...)`, would wait for the others in the middle of a
gather, for as long as the process group lets it: ten minutes or thirty, and the error would name no cause. The store of
the process group is no collective, so a rank can wait there and say what is wrong. A rank that comes later than
PATIENCE cannot be told from one that never comes; both raise. Models that are not sharded are left alone.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch import nn

from gradroute._sharding import ranks_of, reshard
from gradroute._torch_private import default_store
from gradroute.errors import GradRouteError

PATIENCE = timedelta(minutes=2)
_CALLS: Counter[str] = Counter()


def check_all_ranks(call: str, model: nn.Module) -> str | None:
    """Wait until every rank that holds a shard of `model` makes the same call; returns the key of this occasion.

    Args:
        call: the function that was called.
        model: that is read, sharded or not.

    Returns:
        None where the model is not sharded, or on one rank.

    Raises:
        GradRouteError: some rank did not come.
    """
    reshard(model)
    ranks = ranks_of(model.parameters())
    if len(ranks) < 2:
        return None
    store = default_store()
    occasion = f"gradroute {call} {ranks[0]}-{ranks[-1]}"
    _CALLS[occasion] += 1
    key = f"{occasion} {_CALLS[occasion]}"
    if store.add(f"{key} count", 1) == len(ranks):
        store.set(f"{key} all here", "yes")
    try:
        store.wait([f"{key} all here"], PATIENCE)
    except RuntimeError as error:
        # As if this rank had not come, so that the next call finds the ranks in step.
        came = 1 + store.add(f"{key} count", -1)
        if came == len(ranks):  # the last one came in between
            store.wait([f"{key} all here"])
            return key
        _CALLS[occasion] -= 1
        raise GradRouteError(
            f"`{call}` reads a sharded model, so that all {len(ranks)} ranks which hold a part of it should call it. "
            f"Found that {came} did in {PATIENCE.seconds} seconds. Fix: call it on every rank, outside of `if "
            "is_main_process:`; one rank writes. Where ranks come at very different times, torch.distributed.barrier() "
            "before it."
        ) from error
    return key


@contextmanager
def written_by_one(call: str, model: nn.Module) -> Iterator[bool]:
    """Around reading a model and writing a file: True where this rank writes.

    Args:
        call: the function that was called.
        model: the model that is read. If it is not sharded, every caller writes.

    Raises:
        GradRouteError: some rank did not come, or the rank that writes could not.
    """
    key = check_all_ranks(call, model)
    if key is None:
        yield True
        return
    writes = dist.get_rank() == ranks_of(model.parameters())[0]
    store = default_store()
    try:
        yield writes
    except BaseException as error:
        if writes:
            store.set(f"{key} written", f"{type(error).__name__}: {error}")
        raise
    if writes:
        store.set(f"{key} written", "")
        return
    store.wait([f"{key} written"])
    failed = store.get(f"{key} written").decode()
    if failed:
        raise GradRouteError(f"`{call}` should have written its files on one rank. Found that it raised {failed}")
