"""Which rows use the quarantine, and which block each row trains.

| zone   | m (quarantine in the forward) | g_d (gradient into deployed) | g_q (gradient into quarantine) |
|--------|---|---|---|
| keep   | 0 | 1 | 0 |
| absorb | 1 | 1 | 1 |
| route  | 1 | 0 | 1 |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradroute.errors import RouteError

_ZONES = ("keep", "absorb", "route")
_ZONE_WEIGHTS = ((0.0, 1.0, 0.0), (1.0, 1.0, 1.0), (1.0, 0.0, 1.0))

Floats = float | Sequence[float] | Tensor


@dataclass(frozen=True, eq=False)
class RouteMask:
    """Three floats per row `(batch,)`, per token `(batch, seq)`, or per token of a packed batch `(1, tokens)`.

    Args:
        m: weight of the quarantine in the forward.
        g_d: weight of the gradient into the deployed block; may be negative or above 1.
        g_q: weight of the gradient into the quarantine; it multiplies the true derivative, which carries m.

    The gradient that flows on to lower layers is not weighted. Raises `RouteError` on weights that are not finite,
    of different shapes, or that require a gradient themselves.
    """

    m: Float[Tensor, "*rows"]
    g_d: Float[Tensor, "*rows"]
    g_q: Float[Tensor, "*rows"]

    def __post_init__(self) -> None:
        for name in ("m", "g_d", "g_q"):
            values = getattr(self, name)
            if not isinstance(values, Tensor) or not values.is_floating_point():
                raise RouteError(f"`{name}` should be a floating point tensor. Found {_describe(values)}.")
            if values.ndim not in (1, 2) or values.numel() == 0:
                raise RouteError(
                    f"`{name}` should have shape (batch,), (batch, seq) or (1, tokens) with at least one row. "
                    f"Found {tuple(values.shape)}."
                )
            if values.requires_grad:
                raise RouteError(f"`{name}` should not require a gradient: masks are data. Fix: pass {name}.detach().")
            if not torch.isfinite(values).all():
                where = (~torch.isfinite(values)).nonzero()[0].tolist()
                raise RouteError(f"`{name}` should be finite. Found {values[tuple(where)].item()} at index {where}.")
        if not self.m.shape == self.g_d.shape == self.g_q.shape:
            shapes = [tuple(t.shape) for t in (self.m, self.g_d, self.g_q)]
            raise RouteError(f"`m`, `g_d` and `g_q` should have one shape. Found {shapes}.")
        for name in ("m", "g_d", "g_q"):
            # A copy: what the caller writes into the tensor later must not reach a route that is open.
            object.__setattr__(self, name, getattr(self, name).clone())

    @classmethod
    def zones(cls, zones: Sequence[Any] | Tensor) -> "RouteMask":
        """keep = (0, 1, 0), absorb = (1, 1, 1), route = (1, 0, 1) as (m, g_d, g_q).

        Args:
            zones: "keep" / "absorb" / "route" per row (or nested, per token), or an integer tensor with
                0 = keep, 1 = absorb, 2 = route.
        """
        if not isinstance(zones, Tensor):
            zones = torch.tensor(_zone_numbers(zones), dtype=torch.long)
        if zones.dtype == torch.bool or zones.is_floating_point() or zones.is_complex():
            raise RouteError(
                f"`zones` should hold integers (0 keep, 1 absorb, 2 route) or their names. Found {_describe(zones)}. "
                "Fix: use RouteMask.classic(flags) or .exclusive(flags) for booleans."
            )
        if ((zones < 0) | (zones > 2)).any():
            raise RouteError(
                f"`zones` should be 0 (keep), 1 (absorb) or 2 (route). Found {int(zones.min())} to {int(zones.max())}."
            )
        weights = torch.tensor(_ZONE_WEIGHTS, device=zones.device)[zones.long()]
        return cls(*weights.unbind(-1))

    @classmethod
    def classic(cls, flags: Sequence[bool] | Tensor) -> "RouteMask":
        """Clean rows train both blocks (absorb), flagged rows the quarantine only (route)."""
        return cls.zones(1 + _flags(flags).long())

    @classmethod
    def exclusive(cls, flags: Sequence[bool] | Tensor) -> "RouteMask":
        """Clean rows train the deployed block only (keep), flagged rows the quarantine only (route)."""
        return cls.zones(2 * _flags(flags).long())

    @classmethod
    def weights(cls, m: Floats, g_d: Floats, g_q: Floats) -> "RouteMask":
        """Any finite floats, broadcast against each other: soft gates, advantages, size compensation.

        At least one of the three must have rows. Over a loss of plain log-probabilities, g_d = b and g_q = a train
        the deployed block with advantage b and the quarantine with advantage a in a single backward.
        """
        tensors = [_float_tensor(name, values) for name, values in (("m", m), ("g_d", g_d), ("g_q", g_q))]
        devices = {t.device for t in tensors if t.ndim}
        if not devices:
            raise RouteError("At least one of `m`, `g_d`, `g_q` should have one value per row. Found three scalars.")
        if len(devices) > 1:
            raise RouteError(f"`m`, `g_d` and `g_q` should be on one device. Found {sorted(map(str, devices))}.")
        device = devices.pop()
        shapes = {name: tuple(t.shape) for name, t in zip(("m", "g_d", "g_q"), tensors, strict=True)}
        if max(t.ndim for t in tensors) == 2:
            # Aligned on the left, as everywhere: one value per row serves all tokens of the row.
            tensors = [t.unsqueeze(1) if t.ndim == 1 else t for t in tensors]
        if len({t.shape[0] for t in tensors if t.ndim}) > 1:
            raise RouteError(f"`m`, `g_d` and `g_q` should have the same rows. Found {shapes}.")
        try:
            spread = torch.broadcast_tensors(*(t.to(device) for t in tensors))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise RouteError(f"`m`, `g_d` and `g_q` should broadcast to one shape. Found {shapes}.") from error
        return cls(*spread)

    @property
    def shape(self) -> torch.Size:
        """(batch,), (batch, seq) or (1, tokens)."""
        return self.m.shape

    @property
    def is_binary(self) -> bool:
        """Whether every weight is 0 or 1, as in the zones; nothing needs to be multiplied then."""
        return all(bool(((values == 0) | (values == 1)).all()) for values in (self.m, self.g_d, self.g_q))

    @property
    def routed(self) -> Tensor:
        """True where a row is in the route zone: the quarantine is on and learns, the deployed block does not."""
        return (self.m != 0) & (self.g_d == 0) & (self.g_q != 0)

    def __or__(self, other: "RouteMask") -> "RouteMask":
        """The higher zone of each row, keep < absorb < route: routed is what either routes.

        A mask of rows, `(batch,)`, holds for all tokens of a mask `(batch, seq)`.

        Raises:
            RouteError: weights that are no zones, other rows, or another device.
        """
        return self._with_zones_of(other, torch.maximum) if isinstance(other, RouteMask) else NotImplemented

    def __and__(self, other: "RouteMask") -> "RouteMask":
        """The lower zone of each row, keep < absorb < route: routed is what both route. Errors: see `|`."""
        return self._with_zones_of(other, torch.minimum) if isinstance(other, RouteMask) else NotImplemented

    def __len__(self) -> int:
        return self.m.shape[0]

    def __getitem__(self, rows: slice | Tensor | Sequence[int] | int) -> "RouteMask":
        """The mask of some rows: a slice, a tensor of indices or a boolean tensor (for micro-batches)."""
        if isinstance(rows, int):
            raise RouteError(f"A mask keeps its row axis. Found the index {rows}. Fix: mask[{rows}:{rows + 1}].")
        index = rows if isinstance(rows, slice | Tensor) else torch.as_tensor(rows)
        if isinstance(index, Tensor) and index.ndim != 1:
            raise RouteError(f"`rows` should be one index or flag per row. Found the shape {tuple(index.shape)}.")
        return type(self)(self.m[index], self.g_d[index], self.g_q[index])

    def _in_zones(self) -> Bool[Tensor, "zones *rows"]:
        """Which rows are in keep, absorb and route; weighted rows are in none."""
        weights = torch.stack([self.m, self.g_d, self.g_q], dim=-1)
        return torch.stack([(weights == weights.new_tensor(zone)).all(-1) for zone in _ZONE_WEIGHTS])

    def _with_zones_of(self, other: "RouteMask", choose: Callable[[Tensor, Tensor], Tensor]) -> "RouteMask":
        sides = [self, other]
        for side in sides:
            weighted = ~side._in_zones().any(0)
            if weighted.any():
                raise RouteError(
                    "Masks that are combined by | or & should consist of zones: keep, absorb or route. Found weights "
                    f"in {int(weighted.sum())} of {side!r}. Fix: combine the flags, then weigh."
                )
        numbers = [side._in_zones().long().argmax(0) for side in sides]
        if {number.ndim for number in numbers} == {1, 2}:
            numbers = [number[:, None] if number.ndim == 1 else number for number in numbers]
        rows, tokens = ({number.shape[axis:][:1] for number in numbers} for axis in (0, 1))
        if len(rows) > 1 or len(tokens - {torch.Size([1])}) > 1 or self.m.device != other.m.device:
            raise RouteError(
                "Masks that are combined by | or & should be of the same rows, on one device. Found "
                f"{tuple(self.shape)} on {self.m.device} and {tuple(other.shape)} on {other.m.device}."
            )
        return RouteMask.zones(choose(*torch.broadcast_tensors(*numbers)))  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        unit = "rows" if self.m.ndim == 1 else "tokens"
        zones = self._in_zones()
        counts = [f"{int(zone.sum())} {name}" for name, zone in zip(_ZONES, zones, strict=True)]
        other = self.m.numel() - sum(int(zone.sum()) for zone in zones)
        if other:
            counts.append(f"{other} weighted")
        return f"RouteMask({tuple(self.shape)}, {unit}: {', '.join(counts)})"


def _describe(values: Any) -> str:
    if isinstance(values, Tensor):
        return f"a {str(values.dtype).removeprefix('torch.')} tensor of shape {tuple(values.shape)}"
    return f"{type(values).__name__} {values!r}"


def _zone_numbers(zones: Any) -> Any:
    if isinstance(zones, str):
        if zones not in _ZONES:
            raise RouteError(f'`zones` should hold "keep", "absorb" or "route". Found {zones!r}.')
        return _ZONES.index(zones)
    if isinstance(zones, Sequence):
        return [_zone_numbers(zone) for zone in zones]
    if isinstance(zones, int) and not isinstance(zones, bool):
        return zones
    raise RouteError(f"`zones` should hold zone names or integers. Found {_describe(zones)}.")


def _flags(flags: Sequence[bool] | Tensor) -> Tensor:
    tensor = flags if isinstance(flags, Tensor) else torch.tensor(flags)
    if tensor.dtype != torch.bool:
        raise RouteError(
            f"`flags` should be booleans, True where a row looks like a hack. Found {_describe(flags)}. "
            "Fix: compare a score with a threshold, or pass flags.bool()."
        )
    return tensor


def _float_tensor(name: str, values: Floats) -> Tensor:
    try:
        # In float64, as Python's floats are: the default type may be bf16, where 0.3 is off by 0.2 %.
        tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RouteError(f"`{name}` should hold floats, one per row or token. Found {_describe(values)}.") from error
    if not tensor.is_floating_point():
        raise RouteError(f"`{name}` should hold floats. Found {_describe(cast(Any, values))}.")
    return tensor
