"""Peak memory of a call: live bytes above what was there before it, from the allocator's own record.

On the CPU the profiler's memory events are added up: exact, and the same at every run. CUDA counts by itself.
"""

import gc
import resource
from collections.abc import Callable

import torch


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes alive at once during `call`, less those alive before."""
    call()  # whatever is made once is made now
    if device == "cuda":
        torch.cuda.synchronize()
        gc.collect()  # a cycle that dies in the middle would be taken for memory that was not needed
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    if not events:
        raise RuntimeError("The profiler recorded no memory events.")
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def process_peak_bytes() -> int:
    """Peak resident memory of this process."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
