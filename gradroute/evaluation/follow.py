"""Does an engine sample from the model as it is now, in the view that it is in? Found out by moving both blocks far.

    | log p_engine(y | x) - log p_model(y | x; view now) |  ~ 0       while every other view and older weights are far

`assert_ablation_reaches` shows that an engine's views differ. A stale prefix cache, an old adapter and a row in the
wrong view can pass it, and early in training the views are too close to be told apart from rounding.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradroute._checks import positive_integer, positive_number
from gradroute._optimized import block_parameters
from gradroute._restore import left_as_found
from gradroute._sharding import overwrite, reshard, whole
from gradroute._typing import typechecked
from gradroute.adapters.views import ablate_quarantine, disable_adapters
from gradroute.errors import GradRouteError
from gradroute.evaluation._views import Views

Prompts = Sequence[Sequence[int]]
Generate = Callable[[Prompts], tuple[Sequence[Sequence[int]], Sequence[Sequence[float]]]]

# How many tolerances the states lie apart after the move, on prompts; and have to on what is sampled then. Sampled
# tokens are likelier, and so the states are closer on them: where they are too close, the move is repeated, further.
_FAR, _APART, _MOVES = 5, 2, 3
# Of the noise, as a share of a parameter's size: of the first move, and of one that changes nothing more.
_SCALE, _LARGEST = 0.25, 2.0**12
_ROWS = 4


class _Row(NamedTuple):
    """One row that the engine sampled, and what the model says of it in both views: [on, ablated]."""

    ablated: bool
    prompt: Sequence[int]
    completion: Sequence[int]
    found: Tensor
    own: list[Tensor]
    call: str

    @property
    def error(self) -> float:
        return _distance(self.found, self.own[self.ablated])


@typechecked
def assert_engine_follows(
    model: nn.Module,
    generate: Callable[..., Any],
    *,
    mixed: bool = True,
    prompts: Sequence[Sequence[int]] | int = 160,
    temperature: float = 1.0,
    tolerance: float = 0.2,
    seed: int = 0,
) -> float:
    """Raise unless the engine's log-probabilities are the model's own, in both views, before and after its blocks move.

    Args:
        model: with routed layers, in its on view and under no route. Blocks, modes, gradients and random numbers are
            put back bitwise, also after an exception.
        generate: called with prompts (token ids); syncs the engine with `model`, samples a completion of each in the
            model's present view, and returns (token ids, log-probabilities) per row. It decodes greedily, or samples
            without truncation (top-p, top-k, min-p, penalties). A few tokens are enough.
        mixed: whether some rows of one call are ablated and others not, as `ablate_quarantine(model, rows=...)` says.
            False, for an engine that shows one view per call.
        prompts: two or more if `mixed`; or how many tokens random ones have, which should be more than a block of the
            engine's prefix cache has.
        temperature: by which the engine divides logits before it takes log-probabilities.
        tolerance: nats, the mean over a row's tokens; bfloat16 engines are off by about 0.1.
        seed: of the prompts and of the move.

    Returns:
        The largest difference of a row, in nats.

    Raises:
        GradRouteError: a row whose log-probabilities are not the model's, with the state that they do fit (another
            view, the blocks before they moved, the base model); outputs of another form. Blocks are put back, but the
            engine may still hold moved ones: sync it.
        RouteError: an open route.
    """
    positive_number("tolerance", tolerance)
    positive_number("temperature", temperature)
    Views(model)  # for its checks of the model
    generator = torch.Generator().manual_seed(seed)
    asked = _random_prompts(model, prompts, generator) if isinstance(prompts, int) else prompts
    # Of one row, no call shows both views.
    if len(asked) < 1 + mixed or any(len(prompt) < 2 for prompt in asked):
        least = "at least two, or one with mixed=False," if mixed else "at least one,"
        raise GradRouteError(f"`prompts` should be {least} of two tokens or more. Found {asked!r}.")
    calls = ["on", "ablated", *(["both views"] if mixed else [])]
    few = calls[-1:] if mixed else calls
    check = _Check(model, generate, asked, temperature)
    with left_as_found(model), torch.no_grad():
        rows = [row for call in few for row in check.sampled(call)]
        scale = _SCALE
        for _ in range(_MOVES):
            with _moved(model, check, _FAR * tolerance, scale, generator) as scale:
                moved = [row for call in calls for row in check.sampled(call)]
            check.judge(moved, tolerance, moved=True)
            apart, scale = check.apart(moved), 2 * scale
            if apart >= _APART * tolerance:
                break
        else:
            raise GradRouteError(
                f"The sampled tokens should tell the views apart by {_APART * tolerance:g} nats. Found {apart:.3g}. "
                "Fix: a smaller `tolerance`, or more prompts or sampled tokens."
            )
        rows += [row for call in few for row in check.sampled(call)]
        check.judge(rows, tolerance, moved=False)
    return max(row.error for row in rows + moved)


class _Check:
    def __init__(self, model: nn.Module, generate: Generate, prompts: Prompts, temperature: float) -> None:
        self._model, self._generate, self.prompts, self._temperature = model, generate, prompts, temperature
        self._device = next(model.parameters()).device

    def sampled(self, call: str) -> list[_Row]:
        """What the engine samples in one call, beside what the model says of it now."""
        ablated = [call == "ablated" or (call == "both views" and i % 2 == 0) for i in range(len(self.prompts))]
        rows = None if call == "ablated" else torch.tensor(ablated, device=self._device)
        with nullcontext() if call == "on" else ablate_quarantine(self._model, rows=rows):
            ids, logps = _output(self._generate(self.prompts), len(self.prompts))
        return [
            _Row(ablated[i], self.prompts[i], ids[i], torch.tensor(logps[i]), self.both_views(prompt, ids[i]), call)
            for i, prompt in enumerate(self.prompts)
        ]

    def both_views(self, prompt: Sequence[int], completion: Sequence[int]) -> list[Float[Tensor, " tokens"]]:
        """The model's log-probabilities of a completion, on and ablated."""
        on = self._logps(prompt, completion)
        with ablate_quarantine(self._model):
            return [on, self._logps(prompt, completion)]

    def judge(self, rows: Sequence[_Row], tolerance: float, *, moved: bool) -> None:
        """Raise for the first row whose log-probabilities are not those of its view and time; the blocks are back."""
        for row in rows:
            # Not `>`: what is not a number is not right.
            if not row.error <= tolerance:
                raise GradRouteError(self._fault(row, moved))

    def apart(self, moved: Sequence[_Row]) -> float:
        """How far other views and the blocks before their move are from what was sampled; the blocks are back.

        The least of each call and view: an engine may be wrong in one of them alone.
        """
        gaps: dict[tuple[str, bool], list[float]] = defaultdict(list)
        for row in moved:
            old = self.both_views(row.prompt, row.completion)
            gap = min(_distance(row.own[0], row.own[1]), _distance(row.own[row.ablated], old[row.ablated]))
            gaps[row.call, row.ablated].append(gap)
        return min(sum(each) / len(each) for each in gaps.values())

    def _fault(self, row: _Row, moved: bool) -> str:
        own, older = row.own, self.both_views(row.prompt, row.completion)
        with disable_adapters(self._model):
            base = self._logps(row.prompt, row.completion)
        others = {_WRONG_VIEW: own[not row.ablated], _NO_ADAPTER: base}
        if moved:
            others |= {_STALE: older[row.ablated], _STALE_AND_WRONG: older[not row.ablated]}
        (why, fix), nearest = min(others.items(), key=lambda item: _distance(row.found, item[1]))
        distance = _distance(row.found, nearest)
        if not distance < row.error / 4:
            (why, fix) = _UNKNOWN
        view = "ablated" if row.ablated else "on"
        where = f"a row sampled {view}" + (f", in a call with {row.call}" if row.call == "both views" else "")
        return (
            "`generate` should sample from the model as it is, in its present view. Found log-probabilities of "
            f"{where}, {'after' if moved else 'without'} a move of the blocks, that are {row.error:.3g} nats from the "
            f"model's; {why.format(distance=distance)}. Fix: {fix}."
        )

    def _logps(self, prompt: Sequence[int], completion: Sequence[int]) -> Float[Tensor, " tokens"]:
        ids = torch.tensor([[*prompt, *completion]], device=self._device)
        logits: Tensor = self._model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / self._temperature
        return logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1).cpu()


@contextmanager
def _moved(model: nn.Module, check: _Check, far: float, scale: float, generator: torch.Generator) -> Iterator[float]:
    """Add noise to every parameter of both blocks, as much as puts the states `far` nats apart on the prompts.

    The scale of the noise is at least `scale`; yields it.
    """
    parameters = [parameter for _, parameter in block_parameters(model)]
    saved = [whole(parameter).clone() for parameter in parameters]
    noise = [torch.randn(p.shape, generator=generator).to(p) * _size(p) for p in saved]

    def states() -> list[Tensor]:
        halves = [(list(prompt)[: len(prompt) // 2], list(prompt)[len(prompt) // 2 :]) for prompt in check.prompts]
        both = [check.both_views(*half) for half in halves]
        return [torch.cat([views[i] for views in both]) for i in range(2)]

    try:
        before, scale, gap, largest = states(), scale / 2, 0.0, 0.0
        # Not `<`: what overflowed is not far away.
        while not gap >= far:
            scale *= 2
            if scale > _LARGEST:
                raise GradRouteError(
                    f"Moved blocks should change log-probabilities by {far:g} nats. Found {largest:.3g} "
                    f"at most. Fix: tolerance={largest / _FAR:.1g}, for an engine in float32."
                )
            reshard(model)
            for parameter, values, direction in zip(parameters, saved, noise, strict=True):
                overwrite(parameter, values + scale * direction)
            now = states()
            gap = min(_distance(now[0], now[1]), *(_distance(now[i], before[i]) for i in range(2)))
            largest = max(largest, gap)
        yield scale
    finally:
        reshard(model)
        for parameter, values in zip(parameters, saved, strict=True):
            overwrite(parameter, values)


def _size(parameter: Tensor) -> float:
    size = float(parameter.detach().float().square().mean().sqrt())
    return size if size > 0 else 0.02


def _distance(first: Tensor, second: Tensor) -> float:
    return float((first.float() - second.float()).abs().mean())


def _random_prompts(model: nn.Module, tokens: int, generator: torch.Generator) -> list[list[int]]:
    positive_integer("prompts", tokens)
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None:
        raise GradRouteError(
            "`prompts` should be lists of token ids where the model does not say how large its vocabulary is. Found "
            f"{tokens}. Fix: give the prompts."
        )
    size = embeddings.weight.shape[0]
    return torch.randint(size, (_ROWS, tokens), generator=generator).tolist()


def _output(output: Any, rows: int) -> tuple[list[list[int]], list[list[float]]]:
    if not isinstance(output, tuple) or len(output) != 2:
        raise GradRouteError(
            "`generate` should return (token ids, log-probabilities), a list per row of each. Found "
            f"{type(output).__name__}."
        )
    ids = [torch.as_tensor(row).tolist() for row in output[0]]
    # Some engines leave a token without a log-probability.
    logps = [[float("nan") if each is None else float(each) for each in row] for row in output[1]]
    lengths = [(len(row), len(numbers)) for row, numbers in zip(ids, logps, strict=False)]
    if len(ids) != rows or len(logps) != rows or any(n == 0 or n != m for n, m in lengths):
        raise GradRouteError(
            f"`generate` should return at least one token for each of {rows} prompts, and as many log-probabilities. "
            f"Found {len(ids)} and {len(logps)} rows, (tokens, log-probabilities) {lengths}."
        )
    return ids, logps


_WRONG_VIEW = (
    "they fit the other view, to {distance:.2g}",
    "give every row the adapter of its view",
)
_NO_ADAPTER = (
    "they fit the base model, to {distance:.2g}",
    "give every row an adapter; the engine may also know its layers by other names",
)
_STALE = (
    "they fit the blocks before the move, to {distance:.2g}",
    "sync in `generate`, under a name, an id and a path that are new each time, or reset the engine's prefix cache",
)
_STALE_AND_WRONG = (
    "they fit the other view of the blocks before the move, to {distance:.2g}",
    "sync in `generate` under new names, ids and paths, and give every row the adapter of its view",
)
_UNKNOWN = (
    "they fit no other view either",
    "the same scaling, weights, temperature and type in the engine, without truncation or penalties; or, if the engine "
    "rounds more, a larger `tolerance`",
)
