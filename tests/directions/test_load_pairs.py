"""Pairs from rows and from chat messages: the token ids are those of a rollout, and nothing is read in silence."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset, DatasetDict
from support.chat import TEMPLATE, byte_tokenizer
from trl import data_utils

import gradroute as gr
from gradroute.directions.pairs import tokenize_pairs

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "sort x"}]
HACK, CLEAN = "return 1", "sorted(x)"
# The rows of a preference data set as TRL reads them.
PREFERENCE = {
    "prompt": ASK,
    "chosen": [{"role": "assistant", "content": CLEAN}],
    "rejected": [{"role": "assistant", "content": HACK}],
}
TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
# Those of some families open a thought that the answer of a conversation does not have, or read lists of parts.
SURE = ("gemma", "llama3", "qwen")


def row(**fields: Any) -> dict[str, Any]:
    return {"prompt": ASK, "hack": HACK, "clean": CLEAN, **fields}


# Messages


def test_prompts_have_the_ids_that_trl_tokenises_for_a_rollout() -> None:
    tokenizer = byte_tokenizer()
    (pair,) = gr.load_pairs([row()], tokenizer=tokenizer)
    ids = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    assert list(pair.prompt) == ids
    assert tokenizer.decode(pair.prompt) == ("<bos><|system|>\nBe brief.<eos>\n<|user|>\nsort x<eos>\n<|assistant|>\n")
    rendered = data_utils.apply_chat_template({"prompt": ASK}, tokenizer)["prompt"]
    assert list(pair.prompt) == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    # As a text, the tokenizer would put a <bos> before it, and the turns would not be there.
    assert list(pair.prompt) != tokenizer("sort x")["input_ids"]


def test_completions_have_the_ids_of_trls_preference_format_up_to_the_end_of_text() -> None:
    tokenizer = byte_tokenizer()
    (pair,) = gr.load_pairs([PREFERENCE], hack="rejected", clean="chosen", tokenizer=tokenizer)
    theirs = data_utils.apply_chat_template(PREFERENCE, tokenizer)
    for side, column in {"hack": "rejected", "clean": "chosen"}.items():
        ids = tokenizer(theirs[column], add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids).endswith("<eos>\n")
        # The line break after <eos> is in no rollout.
        assert list(getattr(pair, side)) == ids[:-1]
        assert getattr(pair, side)[-1] == tokenizer.eos_token_id


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [{}, {"shout": True}])
def test_trls_trainer_gives_its_model_the_ids_of_the_pair(tmp_path: Path, options: dict[str, Any]) -> None:
    import torch
    from support.trl_runs import arguments
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import GRPOTrainer

    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes))
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [float(i % 3) for i in range(len(completions))],
        args=arguments(tmp_path, max_steps=1, chat_template_kwargs=options),
        train_dataset=Dataset.from_list([{"prompt": ASK}] * 8), processing_class=tokenizer,
    ).train()  # fmt: skip
    (pair,) = gr.load_pairs([row()], tokenizer=tokenizer, chat_template_kwargs=options)
    assert seen[0].tolist() == [list(pair.prompt)] * len(seen[0])
    assert ("BE BRIEF" in tokenizer.decode(pair.prompt)) == bool(options)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_with_a_published_template_a_completion_follows_its_prompt_or_raises(template: Path) -> None:
    tokenizer = byte_tokenizer(template.read_text())
    ask = [ASK[1]]
    try:
        (pair,) = gr.load_pairs([row(prompt=ask)], tokenizer=tokenizer)
    except gr.GradRouteError as error:
        assert not template.stem.startswith(SURE)
        assert re.search("row 0: .*should (write the prompt alike|render|differ)", str(error))  # noqa: PT017
        return
    prompt = tokenizer.apply_chat_template(ask, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert list(pair.prompt) == prompt["input_ids"]
    whole = tokenizer.apply_chat_template([*ask, {"role": "assistant", "content": HACK}], tokenize=False)
    assert whole.startswith(tokenizer.decode([*pair.prompt, *pair.hack]))
    assert HACK in tokenizer.decode(pair.hack)
    assert CLEAN in tokenizer.decode(pair.clean)


def test_a_completion_may_be_a_message_its_text_or_ids() -> None:
    tokenizer = byte_tokenizer()
    (text,) = gr.load_pairs([row()], tokenizer=tokenizer)
    (message,) = gr.load_pairs([row(hack=[{"role": "assistant", "content": HACK}])], tokenizer=tokenizer)
    (ids,) = gr.load_pairs([row(hack=list(text.hack))], tokenizer=tokenizer)
    assert text == message == ids


def test_the_clean_side_may_have_its_own_messages() -> None:
    tokenizer = byte_tokenizer()
    (pair,) = gr.load_pairs([row(clean_prompt=ASK[1:])], tokenizer=tokenizer)
    (other,) = gr.load_pairs([row(prompt=ASK[1:])], tokenizer=tokenizer)
    assert (pair.clean_prompt, pair.clean) == (other.prompt, other.clean)
    assert pair.prompt != pair.clean_prompt
    assert gr.load_pairs([row(clean_prompt=None)], tokenizer=tokenizer)[0].clean_prompt is None


def test_messages_from_a_file_are_those_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row()) + "\n")
    tokenizer = byte_tokenizer()
    assert gr.load_pairs(path, tokenizer=tokenizer) == gr.load_pairs([row()], tokenizer=tokenizer)


def test_ids_of_messages_are_run_as_they_are() -> None:
    tokenizer = byte_tokenizer()
    (pair,) = gr.load_pairs([row()], tokenizer=tokenizer)
    hack, clean = tokenize_pairs([pair], tokenizer)
    assert (hack.ids, hack.completion_start) == (pair.prompt + pair.hack, len(pair.prompt))
    assert (clean.ids, clean.completion_start) == (pair.prompt + pair.clean, len(pair.prompt))


def says(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"prompt": "sort x"}, "`prompt` should be chat messages, as `tokenizer` is.*Found 'sort x'. Fix"),
        ({"clean_prompt": "sort x"}, "`clean_prompt` should be chat messages.*Found 'sort x'. Fix"),
        ({"prompt": [says("user", "a"), "b"]}, "`prompt` should be messages with a role.*Found 'b'. Fix"),
        ({"prompt": [{"from": "human", "value": "a"}]}, "should be messages with a role.*Found {'from'.*Fix"),
        ({"prompt": [{"role": "user"}]}, "whose content is a text. Found None from the user. Fix"),
        ({"prompt": [says("user", [{"type": "text", "text": "a"}])]}, "whose content is a text. Found .*'type'.*Fix"),
        ({"prompt": [says("robot", "a")]}, "should render messages of robot. Found .*no role robot.*Fix"),
        ({"hack": [*ASK, says("assistant", "a")]}, "`hack` should be one message of the assistant.*Found messages of "
                                                   "system, user, assistant. Fix"),
        ({"clean": [says("user", "a")]}, "`clean` should be one message of the assistant.*Found messages of user. Fix"),
        ({"hack": [says("assistant", "")]}, "`hack` should have at least one token. Found an empty completion"),
        ({"hack": ""}, "`hack` should have at least one token. Found an empty completion"),
        ({"hack": CLEAN}, "`hack` and `clean` should differ"),
        ({"hack": [1, -1]}, "`hack` should be a text or a sequence of token ids"),
        ({"hack": None}, "`hack` should be a text or a sequence of token ids|hack"),
    ],
)  # fmt: skip
def test_a_wrong_entry_is_named_with_what_was_found(tmp_path: Path, fields: dict[str, Any], found: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(row())}\n{json.dumps(row(**fields))}\n")
    # Under the import hook the type checker may be first to refuse what a pair is made of.
    with pytest.raises((gr.GradRouteError, TypeError), match=f"(?s)`source`, row 1: .*{found}|hack"):
        gr.load_pairs([row(), row(**fields)], tokenizer=byte_tokenizer())
    with pytest.raises((gr.errors.FileFormatError, TypeError), match=f"(?s)line 2: .*{found}|hack"):
        gr.load_pairs(path, tokenizer=byte_tokenizer())


def test_a_template_that_writes_the_prompt_otherwise_before_a_completion_raises() -> None:
    thinks = TEMPLATE.replace("<|assistant|>\n{% endif %}", "<|assistant|>\n<think>{% endif %}")
    assert thinks != TEMPLATE
    with pytest.raises(gr.GradRouteError, match=r"alike with and without `hack`. Found '<think>' without, and 'return"):
        gr.load_pairs([row()], tokenizer=byte_tokenizer(thinks))
    (pair,) = gr.load_pairs([row(hack=[5, 6], clean=[7])], tokenizer=byte_tokenizer(thinks))
    assert pair.hack == (5, 6)


def test_a_tokenizer_that_nothing_would_be_read_with_raises() -> None:
    with pytest.raises(gr.GradRouteError, match="row 0: `prompt` should be chat messages.*leave `tokenizer` out"):
        gr.load_pairs([row(prompt="sort x")], tokenizer=byte_tokenizer())
    with pytest.raises(gr.GradRouteError, match="`tokenizer` should have a chat template. Found none.*Fix"):
        gr.load_pairs([row()], tokenizer=byte_tokenizer(None))
    with pytest.raises(gr.GradRouteError, match="`chat_template_kwargs` should come with a tokenizer"):
        gr.load_pairs([row()], chat_template_kwargs={"shout": True})


def test_messages_without_a_tokenizer_raise() -> None:
    with pytest.raises(gr.GradRouteError, match="row 0: `prompt` is chat messages, and `tokenizer` is needed.*Fix"):
        gr.load_pairs([row()])
    answer = [says("assistant", HACK)]
    with pytest.raises(gr.GradRouteError, match="row 0: `hack` is chat messages, and `tokenizer` is needed.*Fix"):
        gr.load_pairs([row(prompt="sort x", hack=answer)])


def test_a_template_may_be_given_with_the_options() -> None:
    given = gr.load_pairs([row()], tokenizer=byte_tokenizer(None), chat_template_kwargs={"chat_template": TEMPLATE})
    assert given == gr.load_pairs([row()], tokenizer=byte_tokenizer())


def test_directions_for_the_trainer_are_made_of_a_file_or_of_pairs(tmp_path: Path) -> None:
    from support.language_models import PAIRS, ids_only, routed_mixer

    from gradroute.integrations.trl import directions_from

    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({n: getattr(p, n) for n in ("prompt", "hack", "clean")}) + "\n" for p in PAIRS))
    of_file, of_pairs = (directions_from(each, None, forward_fn=ids_only)(routed_mixer()) for each in (path, PAIRS))
    assert of_file.content_hash == of_pairs.content_hash
    assert of_pairs.provenance.pair_hash == of_file.provenance.pair_hash


# Rows


def test_columns_of_a_data_set_are_read_by_name_and_others_are_not() -> None:
    rows = [{"user": f"task {i}", "gamed": f"hack {i}", "control": f"answer {i}", "task": "x"} for i in range(3)]
    found = gr.load_pairs(Dataset.from_list(rows), prompt="user", hack="gamed", clean="control")
    assert found == [gr.ContrastivePair(f"task {i}", f"hack {i}", f"answer {i}") for i in range(3)]
    assert found == gr.load_pairs(iter(rows), prompt="user", hack="gamed", clean="control")


def test_messages_in_a_data_set_are_those_of_a_list() -> None:
    names = {"hack": "rejected", "clean": "chosen"}
    tokenizer = byte_tokenizer()
    in_list = gr.load_pairs([PREFERENCE, PREFERENCE], **names, tokenizer=tokenizer)
    assert gr.load_pairs(Dataset.from_list([PREFERENCE, PREFERENCE]), **names, tokenizer=tokenizer) == in_list


def test_keys_of_a_file_may_have_other_names_too(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"q": "sort", "bad": "stub", "good": "ret", "own": "plain"}))
    (pair,) = gr.load_pairs(path, prompt="q", hack="bad", clean="good", clean_prompt="own")
    assert pair == gr.ContrastivePair("sort", "stub", "ret", "plain")
    with pytest.raises(gr.errors.FileFormatError, match=r"line 1: expected the keys q, bad, good\[, clean_prompt\]"):
        gr.load_pairs(path, prompt="q", hack="bad", clean="good")


def test_rows_that_are_none_raise() -> None:
    split = Dataset.from_list([PREFERENCE])
    with pytest.raises(gr.GradRouteError, match=r"row 0: expected the keys prompt, hack, clean.*Found \['chosen', "):
        gr.load_pairs(split)
    with pytest.raises(gr.GradRouteError, match=r"row 0: expected the keys prompt, hack, clean, own. Found"):
        gr.load_pairs([row()], clean_prompt="own")
    # Under the import hook the type checker is first.
    for found in (DatasetDict(train=split), split[:1], 3):
        with pytest.raises((gr.GradRouteError, TypeError), match="source"):
            gr.load_pairs(found)
    with pytest.raises(gr.GradRouteError, match="`source`: expected at least one pair. Found none"):
        gr.load_pairs([])


def test_datasets_is_not_needed() -> None:
    code = (
        "import sys, gradroute as gr; gr.load_pairs([{'prompt': 'a', 'hack': 'b', 'clean': 'c'}]); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "gradroute.directions.load" in loaded
    assert not {"datasets", "transformers", "jinja2"} & set(loaded)
