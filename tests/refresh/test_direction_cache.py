"""`DirectionCache`: a hit is what an extraction would have been, and everything that matters is in the key."""

import copy
import warnings

import pytest
import torch
from support.language_models import MODULES, PAIRS, VOCAB, Mixer, ids_only, routed_mixer
from torch import Tensor, nn

import gradroute as gr
from gradroute.refresh.direction_cache import DirectionCache

CALLS: list[str] = []


def counted(model: nn.Module, pairs: list, *, forward_fn=ids_only, reduction: str = "mean", pad: int = 0):
    CALLS.append(reduction)
    return gr.extract_activation_directions(model, pairs, forward_fn=forward_fn, reduction=reduction)


def of_other_pairs(model: nn.Module, pairs: list) -> gr.Directions:
    return gr.extract_activation_directions(model, pairs[:2], forward_fn=ids_only)


def nothing(model: nn.Module, pairs: list) -> None:
    return None


def ids_shifted(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return model((input_ids + 1) % 12)


@pytest.fixture
def cache(tmp_path) -> DirectionCache:
    CALLS.clear()
    return DirectionCache(tmp_path / "made" / "here")


def equal(a: gr.Directions, b: gr.Directions) -> bool:
    return a.provenance == b.provenance and all(
        torch.equal(x[name], y[name])
        for x, y in ((a.rows, b.rows), (a.hack, b.hack), (a.clean, b.clean))
        for name in MODULES
    )


def test_the_second_call_reads_what_the_first_one_wrote(cache: DirectionCache) -> None:
    model = routed_mixer()
    made, found = (cache.extract(counted, model, PAIRS) for _ in range(2))
    assert len(CALLS) == 1
    assert made is not found
    assert equal(made, found)
    assert (cache.hits, cache.misses) == (1, 1)
    assert "1 hits, 1 misses" in repr(cache)
    again = DirectionCache(cache.folder)
    assert equal(again.extract(counted, copy.deepcopy(model), list(PAIRS)), made)
    assert len(CALLS) == 1
    assert [path.suffix for path in cache.folder.iterdir()] == [".safetensors"]


def other_base(model: Mixer) -> Mixer:
    with torch.no_grad():
        model.head.weight.add_(1e-3)
    return model


def other_block(model: Mixer, block: str) -> Mixer:
    with torch.no_grad():
        getattr(model.q, block)[0, 0] += 1e-12
    return model


CHANGES = {
    "other pairs": lambda m: (m, PAIRS[:3], {}),
    "order of pairs": lambda m: (m, PAIRS[::-1], {}),
    "base model": lambda m: (other_base(m), PAIRS, {}),
    "deployed block": lambda m: (other_block(m, "lora_A"), PAIRS, {}),
    "quarantine block": lambda m: (other_block(m, "lora_B_quarantine"), PAIRS, {}),
    "reduction": lambda m: (m, PAIRS, {"reduction": "last"}),
    "any setting": lambda m: (m, PAIRS, {"pad": 1}),
    "forward function": lambda m: (m, PAIRS, {"forward_fn": ids_shifted}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_directions_changes_the_key(cache: DirectionCache, change: str) -> None:
    cache.extract(counted, routed_mixer(), PAIRS)
    model, pairs, settings = CHANGES[change](routed_mixer())
    found = cache.extract(counted, model, pairs, **settings)
    assert len(CALLS) == 2
    assert equal(found, counted(model, pairs, **settings))


@pytest.mark.parametrize("block", ["lora_A", "lora_B_quarantine"])
def test_blocks_that_are_frozen_are_part_of_the_key_too(cache: DirectionCache, block: str) -> None:
    keys = [
        cache.key(counted, model.requires_grad_(False), PAIRS)
        for model in (routed_mixer(), other_block(routed_mixer(), block), routed_mixer())
    ]
    assert keys[0] == keys[2] != keys[1]


def test_the_view_is_part_of_the_key(cache: DirectionCache) -> None:
    model = routed_mixer()
    on = cache.extract(counted, model, PAIRS)
    with gr.ablate_quarantine(model):
        ablated = cache.extract(counted, model, PAIRS)
    assert (on.provenance.view, ablated.provenance.view, len(CALLS)) == ("on", "ablated", 2)


def test_a_default_and_the_same_value_given_are_one_key(cache: DirectionCache) -> None:
    model = routed_mixer()
    assert cache.key(counted, model, PAIRS) == cache.key(counted, model, PAIRS, reduction="mean", pad=0)
    assert cache.key(counted, model, PAIRS) != cache.key(gr.extract_activation_directions, model, PAIRS)


def test_the_library_s_extractors_can_be_cached(cache: DirectionCache) -> None:
    model = routed_mixer()
    for extractor in (gr.extract_activation_directions, gr.extract_gradient_directions):
        made, found = (cache.extract(extractor, model, PAIRS, forward_fn=ids_only, batch_size=3) for _ in range(2))
        assert equal(made, found)
        assert equal(made, extractor(model, PAIRS, forward_fn=ids_only, batch_size=3))
    assert (cache.hits, cache.misses) == (2, 2)


def test_a_tokenizer_is_known_by_the_ids_it_makes(cache: DirectionCache) -> None:
    model, pairs = routed_mixer(), [gr.ContrastivePair("ab", "cd", "dc"), gr.ContrastivePair("b", "ca", "dd")]

    class Letters:
        def __init__(self, shift: int) -> None:
            self.shift = shift

        def __call__(self, text: str) -> list[int]:
            return [(ord(letter) + self.shift) % VOCAB for letter in text]

    def key(shift: int) -> str:
        return cache.key(gr.extract_activation_directions, model, pairs, tokenizer=Letters(shift), forward_fn=ids_only)

    assert key(0) == key(0)
    assert key(0) == key(VOCAB)
    assert key(0) != key(1)
    made, found = (
        cache.extract(gr.extract_activation_directions, model, pairs, tokenizer=Letters(s), forward_fn=ids_only)
        for s in (0, 0)
    )
    assert equal(made, found)
    assert cache.hits == 1


def damage(cache: DirectionCache, kind: str, model: Mixer) -> None:
    (path,) = cache.folder.iterdir()
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        of_other_pairs(model, PAIRS).save(path)


@pytest.mark.parametrize("kind", ["truncated", "empty", "of other pairs"])
def test_a_file_that_is_not_what_its_name_says_is_made_again(cache: DirectionCache, kind: str) -> None:
    model = routed_mixer()
    made = cache.extract(counted, model, PAIRS)
    damage(cache, kind, model)
    with pytest.warns(gr.GradRouteWarning, match="is of no use and is made again"):
        assert equal(cache.extract(counted, model, PAIRS), made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(cache.extract(counted, model, PAIRS), made)
    assert len(CALLS) == 2


def test_a_failed_write_leaves_no_file_to_be_found(cache: DirectionCache, monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed_mixer()
    monkeypatch.setattr(gr.Directions, "save", lambda self, path: path.write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cache.extract(counted, model, PAIRS)
    monkeypatch.undo()
    cache.extract(counted, model, PAIRS)
    assert len(CALLS) == 2
    assert cache.hits == 0


@pytest.mark.parametrize("extractor", [of_other_pairs, nothing])
def test_an_extractor_that_took_something_else_raises_and_writes_nothing(cache: DirectionCache, extractor) -> None:
    message = "pair_hash .* it took something else" if extractor is of_other_pairs else "Found NoneType"
    with pytest.raises(gr.GradRouteError, match=message):
        cache.extract(extractor, routed_mixer(), PAIRS)
    assert not list(cache.folder.iterdir())


def test_an_extractor_that_measured_another_model_raises(cache: DirectionCache) -> None:
    other = routed_mixer(seed=1)
    global stranger  # noqa: PLW0603
    stranger = other
    with pytest.raises(gr.GradRouteError, match="should have the model "):
        cache.extract(of_a_stranger, routed_mixer(), PAIRS)


stranger: Mixer | None = None


def of_a_stranger(model: nn.Module, pairs: list) -> gr.Directions:
    return gr.extract_activation_directions(stranger, pairs, forward_fn=ids_only)


def test_settings_without_a_content_that_can_be_told_raise(cache: DirectionCache) -> None:
    model, offset = routed_mixer(), 3

    def closure(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        return model((ids + offset) % 12)

    for wrong in (lambda m, i, a: m(i), closure, {1, 2}, object()):
        with pytest.raises(gr.GradRouteError, match="`forward_fn` should be a value or a named function"):
            cache.extract(counted, model, PAIRS, forward_fn=wrong)
    with pytest.raises(gr.GradRouteError, match="`extractor` should be a value or a named function"):
        cache.extract(lambda model, pairs: None, model, PAIRS)
    with pytest.raises(TypeError, match="no_such_setting"):
        cache.extract(counted, model, PAIRS, no_such_setting=1)
    assert not CALLS


def test_a_function_is_known_by_its_code_and_not_by_its_name_alone(cache: DirectionCache) -> None:
    def variant(source: str):
        space: dict = {}
        exec(source, space)
        return space["forward"]

    sources = [
        "def forward(m, i, a): return m((i + 1) % 12)",
        "def forward(m, i, a): return m((i + 2) % 12)",
        "def forward(m, i, a): return m((i - 1) % 12)",
        "def forward(m, i, a, shift=1): return m((i + shift) % 12)",
        "def forward(m, i, a, shift=2): return m((i + shift) % 12)",
        "def forward(m, i, a): return [m((j + 1) % 12) for j in i]",
        "def forward(m, i, a): return [m((j + 2) % 12) for j in i]",
        "def forward(m, i, a): return m.half((i + 1) % 12)",
    ]
    model = routed_mixer()
    keys = [cache.key(counted, model, PAIRS, forward_fn=variant(source)) for source in sources]
    assert len(set(keys)) == len(sources)
    assert cache.key(counted, model, PAIRS, forward_fn=variant(sources[0])) == keys[0]


def test_estimators_are_known_by_their_settings(cache: DirectionCache) -> None:
    from gradroute.directions.estimators.mean_difference import MeanDifference
    from gradroute.directions.estimators.svd import Svd

    model = routed_mixer()
    other, turned = (
        gr.extract_activation_directions(m, PAIRS, forward_fn=ids_only) for m in (model, routed_mixer(seed=1))
    )
    estimators = [
        "mean_difference", MeanDifference(n_heldout=1), MeanDifference(n_heldout=1, seed=1), Svd(k=1), Svd(k=2),
        MeanDifference(orthogonal_to=other), MeanDifference(orthogonal_to=turned),
    ]  # fmt: skip
    extract = gr.extract_activation_directions
    keys = [cache.key(extract, model, PAIRS, forward_fn=ids_only, estimator=each) for each in estimators]
    assert len(set(keys)) == len(estimators)
    again = gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)
    assert (
        cache.key(extract, model, PAIRS, forward_fn=ids_only, estimator=MeanDifference(orthogonal_to=again)) == keys[5]
    )
    made, found = (cache.extract(extract, model, PAIRS, forward_fn=ids_only, estimator=Svd(k=2)) for _ in range(2))
    assert equal(made, found)
    assert cache.hits == 1


def test_a_refresher_may_extract_through_a_cache(cache: DirectionCache) -> None:
    """Deployed blocks that moved have another key, so no refresh is stale."""
    model = routed_mixer()
    with gr.ablate_quarantine(model):
        directions = cache.extract(counted, model, PAIRS)
    made = gr.Refresher(directions, lambda: cache.extract(counted, model, PAIRS), model=model, every=1)
    assert not made.step().moved
    assert (cache.hits, cache.misses) == (1, 1)
    with torch.no_grad():
        model.q.lora_A.add_(0.1)
    assert made.step().moved
    assert (cache.hits, cache.misses) == (1, 2)
