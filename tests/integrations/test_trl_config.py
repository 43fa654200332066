"""An option that is a value means the same as a keyword of the trainer and as a field of its config, wherever kept."""

import json
import pickle
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.models import randomize_blocks
from support.trl_runs import PAIRS, WORDS, arguments, extract, flags, quiet, tokenizer, trained, trainer, wrapped
from transformers import HfArgumentParser
from trl import GRPOConfig, GRPOTrainer, TrlParser

import gradroute as gr
from gradroute.integrations.trl import (
    GradRouteGRPOConfig,
    GradRouteGRPOTrainer,
    GradRouteMixin,
    directions_from,
)
from gradroute.integrations.trl.grpo_config import CHECKS

pytestmark = [
    *quiet,
    # PEFT cannot ask for the config of a base model that has no name.
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]
NAMES = tuple(CHECKS)
# A value of each, all of which go together.
VALUES: dict[str, Any] = {
    "directions": "pairs.jsonl", "refresher": 2, "log_ratio_gate": 16.0, "ablated_fraction": 0.25, "ablated_from": 2,
    "detector_recall": 1.0, "slow_start_steps": 1, "slow_start_fraction": 0.5, "score_view": "sampled",
    "clean_baseline": False,
}  # fmt: skip
ENGINE: dict[str, Any] = {"engine": {"dtype": "float32", "enforce_eager": True}, "engine_check": 0.05}


def as_fields(options: dict[str, Any]) -> dict[str, Any]:
    """For `trainer`: a config with these fields."""
    return {"config": GradRouteGRPOConfig, **{f"args_{name}": value for name, value in options.items()}}


def routing_of(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in NAMES}


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """`VALUES`, with a file of pairs that is there."""
    rows = [
        {side: " ".join(WORDS[i - 3] for i in getattr(pair, side)) for side in ("prompt", "hack", "clean")}
        for pair in PAIRS
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {**VALUES, "directions": str(file)}


def test_every_field_is_a_keyword_of_the_trainer_with_help_and_none_is_trls() -> None:
    of_trl = {field.name for field in fields(GRPOConfig)}
    own = [field for field in fields(GradRouteGRPOConfig) if field.name not in of_trl]
    assert [field.name for field in own] == list(NAMES)
    assert set(NAMES) <= set(signature(GradRouteMixin.__init__).parameters)
    assert {*VALUES, *ENGINE} == set(NAMES)
    assert all(field.default is None and field.metadata["help"] for field in own)
    assert set(routing_of(GradRouteGRPOConfig("out", use_cpu=True, bf16=False)).values()) == {None}


@pytest.mark.parametrize("parser", [TrlParser, HfArgumentParser])
def test_a_config_comes_from_yaml_and_goes_into_a_dictionary(parser: Any, tmp_path: Path) -> None:
    asked = {**VALUES, **ENGINE}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"output_dir": "out", "use_cpu": True, "bf16": False, **asked}))
    if parser is TrlParser:
        command = ["--config", str(file), "--slow_start_steps", "3"]
        (config,) = TrlParser(GradRouteGRPOConfig).parse_args_and_config(command)
        asked["slow_start_steps"] = 3  # the command line is read after the file
    else:
        (config,) = HfArgumentParser(GradRouteGRPOConfig).parse_yaml_file(str(file))
    assert routing_of(config) == asked
    as_json = json.loads(config.to_json_string())
    assert {name: as_json[name] for name in NAMES} == asked
    again = GradRouteGRPOConfig("out", use_cpu=True, bf16=False, **{name: config.to_dict()[name] for name in NAMES})
    assert routing_of(again) == asked


def test_every_field_can_be_given_on_the_command_line() -> None:
    parser = TrlParser(GradRouteGRPOConfig)
    asked = {**VALUES, **ENGINE}
    words = {**asked, "engine": json.dumps(asked["engine"])}
    command = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    plain = ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false"]
    assert routing_of(parser.parse_args_into_dataclasses([*plain, *command])[0]) == asked
    for text, value in (("false", False), ("True", True), ("2", 2)):
        (config,) = parser.parse_args_into_dataclasses([*plain, "--engine_check", text])
        assert config.engine_check is value or config.engine_check == value != 1
    assert all(f"--{name}" in parser.format_help() for name in NAMES)
    with pytest.raises(ValueError, match="ablate_fraction"):
        parser.parse_args_into_dataclasses([*plain, "--ablate_fraction", "0.25"])


def seldom(directions: gr.Directions) -> gr.BandGate:
    """Or all rollouts would be routed, and the deployed block would learn nothing."""
    return gr.BandGate(directions, threshold=2.0)


def outcome(made: Any) -> dict[str, torch.Tensor]:
    """Parameters and what was logged; not times."""
    found = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    for i, entry in enumerate(made.state.log_history):
        found |= {
            f"{i}.{name}": torch.tensor(float(value))
            for name, value in entry.items()
            if "time" not in name and "runtime" not in name and "per_second" not in name
        }
    return found


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    shared = [name for name in a.keys() & b.keys() if not torch.equal(a[name], b[name])]
    return [*shared, *(a.keys() ^ b.keys())]


@pytest.mark.slow
def test_a_run_is_the_same_bit_for_bit_by_either_spelling(tmp_path: Path, values: dict[str, Any]) -> None:
    run = {"detector": flags, "gate": seldom, "args_max_steps": 3}
    by_keywords = outcome(trained(tmp_path, **run, **values))
    by_config = trained(tmp_path, **run, **as_fields(values))
    assert not differing(by_keywords, outcome(by_config))
    assert not differing(by_keywords, outcome(trained(tmp_path, **run, **values, **as_fields(values))))
    assert by_config.routing.refresher.every == 2
    # Each of them counts. What a recall does is a warning.
    for left_out in values.keys() - {"detector_recall", "directions"}:
        rest = {name: value for name, value in values.items() if name != left_out}
        if left_out == "ablated_fraction":
            del rest["ablated_from"]
        if left_out == "slow_start_steps":
            del rest["slow_start_fraction"]
        assert differing(by_keywords, outcome(trained(tmp_path, **run, **as_fields(rest)))), left_out


def test_the_saved_arguments_hold_the_fields(tmp_path: Path) -> None:
    asked = {"ablated_fraction": 0.25, "detector_recall": 1.0}
    made = trained(tmp_path, detector=flags, **as_fields(asked), args_max_steps=1)
    made.save_model(str(tmp_path / "saved"))
    saved = torch.load(tmp_path / "saved" / "training_args.bin", weights_only=False)
    assert type(saved) is GradRouteGRPOConfig
    assert routing_of(saved) == {**dict.fromkeys(NAMES), **asked}
    assert trainer(tmp_path, detector=flags, config=lambda **_: saved).routing.ablated_per_group == 1  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_of_keywords_is_resumed_by_a_config(tmp_path: Path, values: dict[str, Any]) -> None:
    run = {"detector": flags, "gate": seldom, "args_max_steps": 4, "args_num_iterations": 2}
    run |= {"args_save_strategy": "steps", "args_save_steps": 3}
    values |= {"slow_start_steps": 4, "ablated_from": 0}
    whole = trained(tmp_path, **run, **values)
    rest = trainer(tmp_path / "rest", randomize_blocks(wrapped(), 7, std=0.3), **run, **as_fields(values))
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    expected = {name: parameter for name, parameter in whole.model.named_parameters() if parameter.requires_grad}
    found = dict(rest.model.named_parameters())
    assert not [name for name, parameter in expected.items() if not torch.equal(parameter, found[name])]
    other = {**values, "slow_start_steps": None, "slow_start_fraction": None}
    with pytest.raises(gr.errors.FileFormatError, match="with the same keywords"):
        trainer(tmp_path / "other", **run, **as_fields(other)).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-3")
        )


OTHERS: dict[str, Any] = {
    "directions": "other.jsonl", "refresher": 3, "log_ratio_gate": 1, "ablated_fraction": 0.0, "detector_recall": 0.5,
    "slow_start_steps": 0, "slow_start_fraction": 0.25, "ablated_from": 0, "score_view": "ablated",
    "clean_baseline": True, "engine": {"dtype": "float32"}, "engine_check": True,
}  # fmt: skip


@pytest.mark.corner(
    "an option is given to the TRL trainer and, with another value, in its config", "`GradRouteError` that names both"
)
@pytest.mark.parametrize("name", NAMES)
def test_a_keyword_and_a_field_that_differ_are_refused(name: str, tmp_path: Path) -> None:
    keyword, field = OTHERS[name], {**VALUES, **ENGINE}[name]
    with pytest.raises(gr.GradRouteError, match="should be the same in both") as refused:
        trainer(tmp_path, detector=flags, **{name: keyword}, **as_fields({name: field}))
    message = str(refused.value)
    assert message.startswith(f"`{name}` ")
    assert f"the keyword {name}={keyword!r} and the field {name}={field!r}. Fix:" in message


def test_a_tolerance_of_one_is_not_true(tmp_path: Path) -> None:
    with pytest.raises(gr.GradRouteError, match="engine_check=True and the field engine_check=1.0"):
        trainer(tmp_path, detector=flags, engine_check=True, **as_fields({"engine_check": 1.0}))


def test_an_object_agrees_with_the_field_that_says_its_number(tmp_path: Path) -> None:
    model = wrapped()
    with gr.ablate_quarantine(model):
        directions = extract(model)
    refresher = gr.Refresher(directions, lambda: extract(model), model=model, every=2, warm_up=1)
    gate = gr.LogRatioGate(0.3, empty_calls=3)
    objects = {"refresher": refresher, "log_ratio_gate": gate}
    made = trainer(tmp_path, model, **objects, **as_fields({"refresher": 2, "log_ratio_gate": 0.3}))
    assert made.routing.refresher is refresher
    assert made.routing.log_ratio_gate is gate
    for name in objects:
        with pytest.raises(gr.GradRouteError, match=f"`{name}` is a keyword .*the field {name}=5"):
            trainer(tmp_path, model, **objects, **as_fields({name: 5}))


WRONG: dict[str, list[Any]] = {
    "refresher": [0, -1, True],
    "log_ratio_gate": [0.0, -1.0, float("nan"), True],
    "ablated_fraction": [1.0, -0.1, 0.3, True],
    "detector_recall": [1.5, True],
    "slow_start_steps": [-1, True],
    "slow_start_fraction": [1.0, 2.0],
    "ablated_from": [-1],
    "score_view": ["on", "Ablated"],
    "engine_check": [0.0, -1.0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_out_of_range_is_refused_by_both_in_the_same_words(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(gr.GradRouteError, match=f"`{name}` should be .* Found ") as by_config:
        arguments(tmp_path, GradRouteGRPOConfig, **{name: value})
    with pytest.raises(gr.GradRouteError) as by_keyword:
        trainer(tmp_path, detector=flags, **{name: value})
    assert str(by_keyword.value) == str(by_config.value)


@pytest.mark.parametrize("value", [1, "yes"])
def test_a_clean_baseline_that_is_no_truth_value_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(gr.GradRouteError, match=f"`clean_baseline` should be True or False, .*Found {value!r}"):
        arguments(tmp_path, GradRouteGRPOConfig, clean_baseline=value)


@pytest.mark.parametrize("value", ["slowly", "nan"])
def test_text_that_is_no_value_is_refused(value: str, tmp_path: Path) -> None:
    for name in ("engine", "engine_check"):
        with pytest.raises(gr.GradRouteError, match=f"`{name}` should be a .*Found"):
            arguments(tmp_path, GradRouteGRPOConfig, **{name: value})


def test_an_object_in_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gr.GradRouteError, match="`engine` of a GradRouteGRPOConfig .*torch.float32.*Fix: give it to"):
        arguments(tmp_path, GradRouteGRPOConfig, engine={"dtype": torch.float32})


def test_what_is_read_together_may_be_given_apart(tmp_path: Path) -> None:
    made = trainer(tmp_path, detector=flags, slow_start_steps=1, **as_fields({"slow_start_fraction": 0.5}))
    assert made._schedule.steps == 1
    for name, read_with in (
        ("slow_start_fraction", "slow_start_steps"), ("ablated_from", "ablated_fraction"), ("engine", "use_vllm=True"),
        ("refresher", "Found no function"), ("clean_baseline", "Found nothing that flags"),
    ):  # fmt: skip
        given = {"ablated_fraction": 0.25} if name == "clean_baseline" else {"detector": flags}
        value = True if name == "clean_baseline" else {**VALUES, **ENGINE}[name]
        with pytest.raises(gr.GradRouteError, match=f"`{name}.*{read_with}"):
            trainer(tmp_path, **given, **as_fields({name: value}))


def test_a_threshold_makes_a_gate_of_the_zone_that_the_other_gate_has(tmp_path: Path) -> None:
    gates: dict[str, Any] = {
        "absorb": {"detector": flags},
        "keep": {"detector": flags, "gate": gr.LabelGate(below="keep")},
    }
    for below, given in gates.items():
        gate = trainer(tmp_path, **given, log_ratio_gate=0.3).routing.log_ratio_gate
        assert (gate.threshold, gate.below) == (0.3, below)
    quantile = {"directions": extract, "gate": lambda directions: gr.QuantileGate(directions, warm_up=4)}
    assert trainer(tmp_path, **quantile, log_ratio_gate=2).routing.log_ratio_gate.below == "keep"
    assert trainer(tmp_path, log_ratio_gate=0.3).routing.log_ratio_gate.below == "absorb"


def test_directions_may_be_a_file_of_pairs(tmp_path: Path, values: dict[str, Any]) -> None:
    for given in ({"directions": Path(values["directions"])}, as_fields({"directions": values["directions"]})):
        model = wrapped()
        made = trainer(tmp_path, model, **given)
        with gr.ablate_quarantine(model):
            expected = gr.extract_activation_directions(
                model, gr.load_pairs(values["directions"]), tokenizer=tokenizer()
            )
        assert made.routing.directions.rows.keys() == expected.rows.keys()
        for module, rows in expected.rows.items():
            torch.testing.assert_close(made.routing.directions.rows[module], rows)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        trainer(tmp_path, **as_fields({"directions": str(tmp_path / "none.jsonl")}))


TEMPLATE = (
    "{% if loud %}w26 {% endif %}{% for message in messages %}w27 {{ message['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}w27{% endif %}"
)


@pytest.mark.parametrize("options", [None, {"loud": True}])
@pytest.mark.parametrize("given_as", ["keyword", "field", "directions_from"])
def test_a_file_of_pairs_may_hold_chat_messages(
    given_as: str, options: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the trainer's own prompts: with its template, and with its options for the template."""
    chats = tokenizer()
    chats.chat_template = TEMPLATE
    monkeypatch.setattr("support.trl_runs.tokenizer", lambda: chats)
    file = tmp_path / "chats.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"w{3 + i} w5"}], "hack": "w20", "clean": "w21"} for i in (0, 1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "keyword": {"directions": file},
        "field": as_fields({"directions": str(file)}),
        "directions_from": {"directions": directions_from(file, chats)},
    }[given_as]
    model = wrapped()
    made = trainer(tmp_path, model, args_chat_template_kwargs=options, **given)
    read = None if given_as == "directions_from" else options  # it does not know the trainer
    pairs = gr.load_pairs(file, tokenizer=chats, chat_template_kwargs=read)
    assert (pairs[0].prompt[0] == 26) == bool(read)
    with gr.ablate_quarantine(model):
        expected = gr.extract_activation_directions(model, pairs)
    assert made.routing.directions.provenance.pair_hash == expected.provenance.pair_hash
    for module, rows_of_module in expected.rows.items():
        torch.testing.assert_close(made.routing.directions.rows[module], rows_of_module)


def test_chat_messages_without_a_template_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": "w5"}], "hack": "w20", "clean": "w21"}))
    with pytest.raises(gr.GradRouteError, match="`tokenizer` should have a chat template"):
        trainer(tmp_path, **as_fields({"directions": str(file)}))


def test_a_config_that_was_not_given_to_the_trainer_is_refused(tmp_path: Path) -> None:
    """A class below the mixin may make one of its own: then nothing of it has been read."""

    class Remade(GradRouteGRPOTrainer.__mro__[2]):  # type: ignore[misc,name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["args"] = arguments(tmp_path, GradRouteGRPOConfig, ablated_fraction=0.25)
            super().__init__(*args, **kwargs)

    class Mine(GradRouteMixin, Remade):  # type: ignore[misc]
        pass

    with pytest.raises(gr.GradRouteError, match="`ablated_fraction`. Found None there and 0.25"):
        trainer(tmp_path, detector=flags, cls=Mine)
    fine = trainer(tmp_path, detector=flags, detector_recall=1.0, cls=Mine, **as_fields({"ablated_fraction": 0.25}))
    assert fine.routing.ablated_per_group == 1


def test_a_trainer_that_does_not_route_refuses_fields_of_the_routing(tmp_path: Path) -> None:
    asked = {"ablated_fraction": 0.25, "detector_recall": 1.0}
    plain = trainer(tmp_path, cls=GRPOTrainer, **as_fields(asked), args_max_steps=1)
    with pytest.raises(gr.GradRouteError, match="trainer that routes. Found one that does not read its `ablated_frac"):
        plain.train()
    trained(tmp_path, cls=GRPOTrainer, **as_fields({}), args_max_steps=1)
    routed = trained(tmp_path, detector=flags, **as_fields(asked), args_max_steps=1)
    # What is saved, or copied, was read by nobody.
    with pytest.raises(gr.GradRouteError, match="does not read its"):
        pickle.loads(pickle.dumps(routed.args)).get_warmup_steps(1)
