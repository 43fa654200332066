"""A GPU emulated on the CPU: it says of each tensor where it would lie, and counts what moves between host and device.

    read      the host waits for a value of the device: item, tolist, bool, float, .cpu(), nonzero, x[mask], equal ...
    upload    host values go to the device: .to(device), torch.tensor(values, device=device), copy_

Tensors that were there before, and results of what lies on the device, lie on the device. What is made inside without a
device lies on the host, and so does what was read. `x.device` is cuda:0: code that asks takes the GPU's branch.
One operation on tensors of both sides raises, as CUDA does. `lenient`: tensors made without a device lie on the device,
as with `torch.set_default_device`, and nothing raises: for libraries that ask something else for the device.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

import gradroute

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")
PACKAGE, TORCH = str(Path(gradroute.__file__).parent), str(Path(torch.__file__).parent)

_SCALARS = {"item", "__bool__", "__float__", "__int__", "__index__", "__complex__", "is_nonzero", "__contains__"}
_READS = _SCALARS | {
    "tolist", "numpy", "__array__", "nonzero", "argwhere", "masked_select", "equal", "allclose", "unique",
    "unique_consecutive", "bincount",
}  # fmt: skip
_MOVES = {"to", "cpu", "cuda"}
_MIXES = {"copy_", "__getitem__", "__setitem__", "index_put_", "__set__", "type_as", "backward"} | _MOVES


class EmulatedGpu(TorchFunctionMode):
    """Use it in `with`; `reads` and `uploads` count by place in gradroute, "elsewhere" what other libraries do."""

    def __init__(self, *, lenient: bool = False) -> None:
        super().__init__()
        self.lenient = lenient
        self.reads: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self._on_host: Any = WeakTensorKeyDictionary()

    def forget(self) -> None:
        """Count from zero."""
        self.reads.clear()
        self.uploads.clear()

    def on_host(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory of the host."""
        return tensor in self._on_host

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args)
        if name == "__set__" and func.__self__.__name__ == "data":
            self._put(args[0], host=self.on_host(args[1]))
            return func(*args)
        if func is Tensor.backward:
            if len(args) > 1:
                kwargs["grad_tensors"] = args[1]
            elif "gradient" in kwargs:
                kwargs["grad_tensors"] = kwargs.pop("gradient")
            return torch.autograd.backward(args[0], **kwargs)
        if func in (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook):
            return func(args[0], self._inside(args[1]))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        sides = {self.on_host(tensor) for tensor in tensors}
        if name in _MOVES:
            return self._moved(func, args, kwargs)
        if len(sides) == 2 and name not in _MIXES and not self.lenient:
            self._check_one_side(name, tensors)
        if sides == {False} and (name in _READS or _reads_a_mask(name, args)):
            self._count(self.reads)
        if name == "__format__" and sides == {False} and args[0].ndim == 0:
            self._count(self.reads)
        if name == "copy_" and len(sides) == 2:
            self._count(self.reads if self.on_host(args[0]) else self.uploads)
        target = kwargs.get("device")
        host = self._goes_to_host(target) if target is not None else sides == {True} or not (tensors or self.lenient)
        if target is not None:
            kwargs["device"] = HOST
            if name in ("tensor", "as_tensor") and not host:
                self._count(self.uploads)
        out = func(*args, **kwargs)
        return self._marked(out, host=host, but=tensors)

    def _inside(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, called by the engine of autograd, which leaves modes."""

        @wraps(function)
        def inside(*args: Any) -> Any:
            with self:
                return function(*args)

        return inside

    def _attribute(self, func: Any, args: Any) -> Any:
        attribute = func.__self__.__name__
        if attribute in ("device", "is_cuda", "is_cpu"):
            host = self.on_host(args[0])
            return {"device": HOST if host else GPU, "is_cuda": not host, "is_cpu": host}[attribute]
        out = func(*args)
        return self._marked(out, host=self.on_host(args[0]), but=[args[0]]) if isinstance(out, Tensor) else out

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        tensor, host = args[0], self.on_host(args[0])
        others = [each for each in (*args[1:], *kwargs.values()) if isinstance(each, str | torch.device | Tensor | int)]
        others = [each for each in others if not isinstance(each, bool)]
        target = host
        if func.__name__ != "to":
            target = func.__name__ == "cpu"
        elif others:
            first = others[0]
            target = self.on_host(first) if isinstance(first, Tensor) else self._goes_to_host(first)
        if target is not host:
            self._count(self.reads if target else self.uploads)
        replaced = tree_map_only((str, torch.device), lambda _: HOST, (args[1:], kwargs))
        with torch._C.DisableTorchFunction():
            out = tensor.to(*replaced[0], **replaced[1]) if func.__name__ == "to" else tensor
            # What is moved is another tensor; the same memory would show writes on both sides.
            out = out.clone() if out is tensor and target is not host else out
        return self._marked(out, host=target, but=[tensor])

    def _goes_to_host(self, device: Any) -> bool:
        if self.lenient:
            # What another library calls its device, an object, is the GPU.
            return device == "cpu" if isinstance(device, str) else device == HOST and _place().startswith("_transfers")
        return torch.device(device).type == "cpu"

    def _marked(self, out: Any, *, host: bool, but: list[Tensor]) -> Any:
        for leaf in tree_leaves(out) if host else ():
            if isinstance(leaf, Tensor) and not any(leaf is tensor for tensor in but):
                self._put(leaf, host=True)
        return out

    def _put(self, tensor: Tensor, *, host: bool) -> None:
        if host:
            self._on_host[tensor] = True
        else:
            self._on_host.pop(tensor, None)

    def _check_one_side(self, name: str, tensors: list[Tensor]) -> None:
        with torch._C.DisableTorchFunction():
            shapes = [tuple(tensor.shape) for tensor in tensors if self.on_host(tensor) and tensor.ndim]
        if shapes:
            raise RuntimeError(f"{name} of tensors on cuda:0 and, of shape {shapes[0]}, on the CPU, in {_place()}")

    def _count(self, counts: Counter[str]) -> None:
        counts[_place()] += 1


@contextmanager
def emulated_gpu(*, lenient: bool = False) -> Iterator[EmulatedGpu]:
    """An `EmulatedGpu`, without the generators of a GPU, which nothing can emulate."""
    fork: Callable[..., Any] = torch.random.fork_rng
    backward = BackwardCFunction.apply
    gpu = EmulatedGpu(lenient=lenient)
    torch.random.fork_rng = lambda *_, **__: fork(devices=[])  # type: ignore[assignment]
    BackwardCFunction.apply = gpu._inside(backward)  # type: ignore[method-assign]
    try:
        with gpu:
            yield gpu
    finally:
        torch.random.fork_rng, BackwardCFunction.apply = fork, backward  # type: ignore[method-assign]


def _reads_a_mask(name: str, args: Any) -> bool:
    """x[mask] waits to know how many there are; x[mask] = number does not."""
    if name not in ("__getitem__", "__setitem__") or (name == "__setitem__" and not isinstance(args[2], Tensor)):
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(each, Tensor) and each.dtype == torch.bool for each in index)


def _place() -> str:
    """The innermost function outside of torch and of this file, if it is gradroute's."""
    frame: Any = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename.startswith(TORCH) or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    code = frame.f_code if frame is not None else None
    # einops and the checks of types stand between the library and torch.
    while frame is not None and any(each in frame.f_code.co_filename for each in ("einops", "jaxtyping", "beartype")):
        frame = frame.f_back
        code = frame.f_code if frame is not None else None
    if code is None or not code.co_filename.startswith(PACKAGE):
        return "elsewhere"
    return f"{Path(code.co_filename).relative_to(PACKAGE)}:{code.co_qualname}"
