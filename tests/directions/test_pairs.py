"""Pairs: reading them, refusing bad ones, tokenising them, and padding them into batches."""

import json
from pathlib import Path

import pytest
import torch

import gradroute as gr
from gradroute.directions.pairs import TokenizedRollout, batched, padded_batches, pair_hash, tokenize_pairs

# Under the import hook a wrong type is refused by the type checker, before gradroute sees it.
REFUSED = (gr.GradRouteError, TypeError)
GOOD = {"prompt": "sort", "hack": "stub", "clean": "ret"}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def words(text: str) -> list[int]:
    """A plain tokenizer: one id per word, its length."""
    return [len(word) for word in text.split()]


def hugging_face_tokenizer(template: str = "<bos> $A"):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<unk>", "<bos>", "<eos>", "sort", "these", "ret", "stub"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


# Files


def test_json_and_jsonl_hold_the_same_pairs(tmp_path: Path) -> None:
    entries = [GOOD, {**GOOD, "prompt": [1, 2], "clean_prompt": [3]}]
    array = gr.load_pairs(write(tmp_path / "pairs.json", json.dumps(entries)))
    lines = gr.load_pairs(write(tmp_path / "pairs.jsonl", "\n\n".join(map(json.dumps, entries)) + "\n"))
    assert (
        array == lines == [gr.ContrastivePair("sort", "stub", "ret"), gr.ContrastivePair((1, 2), "stub", "ret", (3,))]
    )


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    assert len(gr.load_pairs(str(write(tmp_path / "pairs.json", json.dumps([GOOD]))))) == 1


def test_a_line_separator_inside_a_text_does_not_end_a_jsonl_line(tmp_path: Path) -> None:
    entry = {**GOOD, "prompt": "one\u2028two\x85three"}
    path = write(tmp_path / "pairs.jsonl", json.dumps(entry, ensure_ascii=False) + "\n")
    assert gr.load_pairs(path)[0].prompt == entry["prompt"]


def test_a_truncated_jsonl_names_file_and_line(tmp_path: Path) -> None:
    text = json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:-9]
    path = write(tmp_path / "pairs.jsonl", text)
    with pytest.raises(gr.errors.FileFormatError, match=r"pairs\.jsonl, line 3: expected JSON.*truncated"):
        gr.load_pairs(path)


def test_a_truncated_json_names_file_and_position(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.json", json.dumps([GOOD, GOOD], indent=1)[:-12])
    with pytest.raises(gr.errors.FileFormatError, match=r"pairs\.json.*line \d+ column \d+.*truncated"):
        gr.load_pairs(path)


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        ({"prompt": "sort", "hack": "stub"}, r"prompt, hack, clean.*Found \['hack', 'prompt'\]"),
        ({**GOOD, "completion": "ret"}, "Found .*'completion'"),
        ("sort", "Found str"),
        (None, "Found NoneType"),
        ({**GOOD, "hack": "ret"}, "`hack` and `clean` should differ"),
        ({**GOOD, "hack": ""}, "`hack` should have at least one token"),
        ({**GOOD, "clean": []}, "`clean` should have at least one token"),
        ({**GOOD, "hack": [1, -1]}, r"`hack` should be a text or a sequence of token ids. Found \[1, -1\]"),
    ],
)
def test_a_bad_entry_is_named_with_what_was_found(tmp_path: Path, entry: object, found: str) -> None:
    array = write(tmp_path / "pairs.json", json.dumps([GOOD, entry]))
    lines = write(tmp_path / "pairs.jsonl", json.dumps(GOOD) + "\n" + json.dumps(entry))
    with pytest.raises(gr.errors.FileFormatError, match=f"entry 1: .*{found}"):
        gr.load_pairs(array)
    with pytest.raises(gr.errors.FileFormatError, match=f"line 2: .*{found}"):
        gr.load_pairs(lines)


@pytest.mark.parametrize("bad", [7, None, [1, 2.5]])
def test_an_entry_of_another_type_raises(tmp_path: Path, bad: object) -> None:
    path = write(tmp_path / "pairs.json", json.dumps([{**GOOD, "prompt": bad}]))
    with pytest.raises(REFUSED, match="prompt"):
        gr.load_pairs(path)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("pairs.json", "[]", "at least one pair"),
        ("pairs.json", "", "expected JSON"),
        ("pairs.json", json.dumps(GOOD), "expected a JSON array of pairs. Found a dict"),
        ("pairs.jsonl", "\n \n", "at least one pair"),
        ("pairs.csv", "prompt,hack,clean", "Found the suffix '.csv'"),
    ],
)
def test_a_file_without_pairs_raises(tmp_path: Path, name: str, text: str, found: str) -> None:
    with pytest.raises(gr.errors.FileFormatError, match=f"{name}.*{found}"):
        gr.load_pairs(write(tmp_path / name, text))


def test_a_file_that_is_not_utf8_is_a_format_error(tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_bytes(b'[{"prompt": "caf\xe9"}]')
    with pytest.raises(gr.errors.FileFormatError, match=r"pairs\.json"):
        gr.load_pairs(tmp_path / "pairs.json")


# Pairs


@pytest.mark.parametrize("ids", [[1, 2], (1, 2), torch.tensor([1, 2])])
def test_token_ids_of_any_kind_make_the_same_pair(ids: object) -> None:
    pair = gr.ContrastivePair(ids, [3], [4], ids)
    assert pair == gr.ContrastivePair((1, 2), (3,), (4,), (1, 2))
    assert hash(pair) == hash(gr.ContrastivePair((1, 2), (3,), (4,), (1, 2)))


@pytest.mark.parametrize("bad", [[1, -1], [True], [1.0], [[1]], 3, b"ab", torch.tensor([1.0])])
@pytest.mark.parametrize("side", ["prompt", "hack", "clean", "clean_prompt"])
def test_what_is_neither_text_nor_ids_raises(side: str, bad: object) -> None:
    with pytest.raises(REFUSED, match=side):
        gr.ContrastivePair(**{**GOOD, side: bad})


def test_equal_sides_raise_also_as_list_and_tensor() -> None:
    with pytest.raises(gr.GradRouteError, match=r"`hack` and `clean` should differ. Found \(1, 2\)"):
        gr.ContrastivePair("sort", [1, 2], torch.tensor([1, 2]))


def test_equal_completions_need_different_prompts() -> None:
    assert gr.ContrastivePair("hinted", "ret", "ret", "plain").clean_prompt == "plain"
    with pytest.raises(gr.GradRouteError, match="should differ"):
        gr.ContrastivePair("plain", "ret", "ret", "plain")


def test_the_hash_sees_content_order_and_kind() -> None:
    a, b = gr.ContrastivePair("p", "h", "c"), gr.ContrastivePair("p", "h", "d")
    ids = gr.ContrastivePair([1], [2], [3])
    assert pair_hash([a, b]) == pair_hash([gr.ContrastivePair("p", "h", "c"), b])
    hashes = {pair_hash(pairs) for pairs in ([a], [b], [a, b], [b, a], [ids], [gr.ContrastivePair("p", "h", "c", "q")])}
    assert len(hashes) == 6


# Tokenisation


def test_prompt_and_completion_are_joined_exactly_hack_sides_first() -> None:
    pairs = [gr.ContrastivePair([1, 2], [3], [4, 5]), gr.ContrastivePair([6], [7, 8], [9])]
    assert tokenize_pairs(pairs, None) == [
        TokenizedRollout((1, 2, 3), 2),
        TokenizedRollout((6, 7, 8), 1),
        TokenizedRollout((1, 2, 4, 5), 2),
        TokenizedRollout((6, 9), 1),
    ]


def test_each_side_has_its_own_prompt_where_one_is_given() -> None:
    rollouts = tokenize_pairs([gr.ContrastivePair([1, 2], [3], [3], clean_prompt=[4])], None)
    assert rollouts == [TokenizedRollout((1, 2, 3), 2), TokenizedRollout((4, 3), 1)]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_a_tokenizer_may_be_any_function_from_text_to_ids(kind: object) -> None:
    hack, clean = tokenize_pairs([gr.ContrastivePair("a bb ", "ccc", [9])], lambda text: kind(words(text)))
    assert (hack, clean) == (TokenizedRollout((1, 2, 3), 2), TokenizedRollout((1, 2, 9), 2))


def test_a_token_that_merges_over_the_boundary_belongs_to_the_completion() -> None:
    """Longest common prefix: "a bb" + "cc dd" has the token "bbcc", which neither text alone has."""
    pair = gr.ContrastivePair("a bb", "cc dd", " ccc")
    assert words(pair.prompt) == [1, 2]
    hack, clean = tokenize_pairs([pair], words)
    assert hack == TokenizedRollout((1, 4, 2), 1)
    assert clean == TokenizedRollout((1, 2, 3), 2)


def test_a_real_bpe_that_merges_over_the_boundary() -> None:
    from tokenizers import Tokenizer, models

    vocab = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc"])}
    bpe = Tokenizer(models.BPE(vocab, [("b", "c"), ("a", "b")]))

    def ids(text: str) -> list[int]:
        return bpe.encode(text).ids

    assert (ids("ab"), ids("ca"), ids("abca")) == ([3], [2, 0], [0, 4, 0])
    hack, clean = tokenize_pairs([gr.ContrastivePair("cab", "ca", "a")], ids)
    # "c ab" + "ca" becomes "c a bc a": the first token that is not the prompt's own is "a".
    assert hack == TokenizedRollout((2, 0, 4, 0), 1)
    assert clean == TokenizedRollout((2, 3, 0), 2)


def test_a_tokenizer_that_puts_a_space_before_each_text_puts_none_inside() -> None:
    """As sentencepiece does: tokenised apart, the completion would start with a token that is not in the text."""

    def spaced(text: str) -> list[int]:
        return [0, *map(ord, text)]

    hack, _ = tokenize_pairs([gr.ContrastivePair("ab", "cd", "e")], spaced)
    assert hack == TokenizedRollout((0, *map(ord, "abcd")), 3)


def test_prompts_that_are_tokenised_otherwise_with_their_completion_raise() -> None:
    def backwards(text: str) -> list[int]:
        return [ord(character) for character in reversed(text)]

    with pytest.raises(gr.GradRouteError, match="A prompt should be tokenised alike.*Found 7 others before 'x'"):
        tokenize_pairs([gr.ContrastivePair("a prompt", "x", "y")], lambda text: [0, *backwards(text)][:8])


def test_a_hugging_face_tokenizer_puts_one_bos_before_the_prompt_and_none_before_the_completion() -> None:
    tokenizer = hugging_face_tokenizer()
    assert tokenizer("ret")["input_ids"] == [1, 5]
    hack, clean = tokenize_pairs([gr.ContrastivePair("sort these ", "stub", "ret ret")], tokenizer)
    assert hack == TokenizedRollout((1, 3, 4, 6), 3)
    assert clean == TokenizedRollout((1, 3, 4, 5, 5), 3)
    hack, _ = tokenize_pairs([gr.ContrastivePair("sort these", [6], [5])], tokenizer)
    assert hack == TokenizedRollout((1, 3, 4, 6), 3)


def test_a_prompt_that_starts_with_bos_gets_no_second_one() -> None:
    tokenizer = hugging_face_tokenizer()
    assert tokenizer("<bos> sort")["input_ids"] == [1, 1, 3]
    hack, _ = tokenize_pairs([gr.ContrastivePair("<bos> sort ", "stub", "ret")], tokenizer)
    assert hack == TokenizedRollout((1, 3, 6), 2)


def test_no_eos_stands_between_prompt_and_completion_or_is_added_to_it() -> None:
    tokenizer = hugging_face_tokenizer("<bos> $A <eos>")
    assert tokenizer("sort")["input_ids"] == [1, 3, 2]
    hack, clean = tokenize_pairs([gr.ContrastivePair("sort ", "stub", "ret <eos>")], tokenizer)
    assert hack == TokenizedRollout((1, 3, 6), 2)
    assert clean == TokenizedRollout((1, 3, 5, 2), 2)


def spaced_tokenizer() -> object:
    """Like Llama 2's: every text begins with a token for a space."""
    from tokenizers import Tokenizer, models, normalizers

    vocab = {token: i for i, token in enumerate(["<unk>", "\u2581", *"abc"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Prepend("\u2581")
    return lambda text: tokenizer.encode(text).ids


@pytest.mark.corner("a pair of a prompt in token ids and a completion in text", "`GradRouteError`")
def test_a_completion_of_text_after_a_prompt_of_ids_raises() -> None:
    """Its own tokens would begin with a space that stood between prompt and completion in no rollout."""
    tokenizer = spaced_tokenizer()
    texts, _ = tokenize_pairs([gr.ContrastivePair("ab", "ca", "b")], tokenizer)
    assert texts == TokenizedRollout((1, 2, 3, 4, 2), 3)
    assert tokenizer("ca") == [1, 4, 2]
    for pair in (gr.ContrastivePair([1, 2, 3], "ca", "b"), gr.ContrastivePair("ab", "ca", "b", clean_prompt=[1, 2, 3])):
        with pytest.raises(
            gr.GradRouteError, match="completion should be token ids where its prompt is.*Fix: give both"
        ):
            tokenize_pairs([pair], tokenizer)
    ids, _ = tokenize_pairs([gr.ContrastivePair("ab", [4, 2], [3])], tokenizer)
    assert ids == texts


def test_texts_without_a_tokenizer_raise() -> None:
    with pytest.raises(gr.GradRouteError, match="`tokenizer` is needed for pairs of text"):
        tokenize_pairs([gr.ContrastivePair("sort", "stub", "ret")], None)


@pytest.mark.parametrize("output", [[[1, 2]], "ids", [1.5], None])
def test_a_tokenizer_that_returns_no_flat_list_of_ids_raises(output: object) -> None:
    with pytest.raises(gr.GradRouteError, match="`tokenizer` should return a flat list of ids.*Found"):
        tokenize_pairs([gr.ContrastivePair("sort", "stub", "ret")], lambda text: output)


def test_a_completion_without_tokens_raises() -> None:
    with pytest.raises(gr.GradRouteError, match="The completion ' ' has no tokens"):
        tokenize_pairs([gr.ContrastivePair("sort ", " ", "ret")], words)


def test_no_pairs_and_other_objects_raise() -> None:
    with pytest.raises(gr.GradRouteError, match="`pairs` should hold at least one"):
        tokenize_pairs([], None)
    with pytest.raises(REFUSED, match="pairs"):
        tokenize_pairs([("sort", "stub", "ret")], words)


# Batches


def rollouts(lengths: list[int]) -> list[TokenizedRollout]:
    """Rollout i holds the token 10 + i alone; its completion is the last two tokens."""
    return [TokenizedRollout((10 + i,) * n, n - 2) for i, n in enumerate(lengths)]


def test_every_rollout_is_in_one_batch_longest_first_padded_to_its_own_batch() -> None:
    made = rollouts([3, 7, 4, 6, 5])
    batches = list(padded_batches(made, batched(made, 2), torch.device("cpu")))
    assert [batch.index.tolist() for batch in batches] == [[1, 3], [4, 2], [0]]
    assert [batch.input_ids.shape[1] for batch in batches] == [7, 5, 3]


def test_masks_mark_the_rollout_and_its_completion() -> None:
    (batch,) = padded_batches(rollouts([3, 5]), [[1, 0]], torch.device("cpu"))
    assert batch.index.tolist() == [1, 0]
    assert batch.input_ids.tolist() == [[11, 11, 11, 11, 11], [10, 10, 10, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.completion_mask.tolist() == [[False, False, False, True, True], [False, True, True, False, False]]


@pytest.mark.parametrize("batch_size", [0, -1, True])
def test_a_batch_size_below_one_raises(batch_size: int) -> None:
    with pytest.raises(gr.GradRouteError, match=f"`batch_size` should be a positive integer. Found {batch_size}"):
        batched(rollouts([3]), batch_size)
    with pytest.raises(gr.GradRouteError, match=f"`batch_tokens` should be a positive integer. Found {batch_size}"):
        batched(rollouts([3]), 8, batch_size)


@pytest.mark.parametrize("budget", [7, 8, 14, 25, 1000])
def test_a_budget_of_tokens_holds_with_padding_and_is_used_up(budget: int) -> None:
    made = rollouts([3, 7, 4, 6, 5, 3, 3])
    batches = batched(made, 4, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    lengths = [[len(made[i].ids) for i in batch] for batch in batches]
    assert [n for batch in lengths for n in batch] == [7, 6, 5, 4, 3, 3, 3]
    for batch in lengths:
        assert len(batch) * batch[0] <= budget
        assert len(batch) <= 4
    for batch in lengths[:-1]:
        assert len(batch) == 4 or (len(batch) + 1) * batch[0] > budget


def test_a_rollout_longer_than_the_budget_raises() -> None:
    with pytest.raises(gr.GradRouteError, match="longest rollout, 7. Found 6"):
        batched(rollouts([3, 7]), 8, 6)
