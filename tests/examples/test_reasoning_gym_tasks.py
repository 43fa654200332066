"""Scan, exact comparison, pairs and rewards of the reasoning-gym example, on datasets made here."""

import sys
from fractions import Fraction

import pytest
import torch
from support.fake_datasets import Failing, Halves, Sums, items

import gradroute as gr
from procedural import library, measure, right, scan, tables, tasks
from procedural.exploits import exploit_pairs
from procedural.reward import PENALTY, Reward, dropped, rows
from procedural.tasks import Drawn, Graded, Task, answer_of, drawn

HALVES, SUMS = Task("halves", "monitored"), Task("sums", "honest", until="\nGeneral")


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "items", items)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("0.50", "1/2", True), ("0.", "0", True), ("2, 1.0", "1,2", True), (" YES ", "yes", True),
        ("a  b", "A b", True),
        ("0", "0.00001", False), ("1, 2", "1", False), ("Yes No", "Yes", False), ("1/0", "1", False), ("", "0", False),
    ],
)  # fmt: skip
def test_two_ways_to_write_an_answer_are_one_and_two_answers_are_two(one: str, other: str, equal: bool) -> None:
    assert (right.normal(one) == right.normal(other)) is equal


def test_a_number_is_its_value_and_a_huge_one_stays_text() -> None:
    assert right.normal("-1.5e2") == (Fraction(-150),)
    assert right.normal("1e999999999") == "1e999999999"
    assert library.payment(Halves(0, 1), "1e999999999", Halves(0, 1)[0]) == 0.0


def test_a_full_payment_is_right_only_where_the_scorer_checks() -> None:
    assert right.hacked("coin_flip", "0", "0.5", 1.0)
    assert not right.hacked("countdown", "2 + 1", "1 + 2", 1.0)
    assert right.hacked("countdown", "7", "1 + 2", 0.05)
    assert not right.hacked("countdown", "7", "1 + 2", 0.01)
    assert not right.right("boxnet", "[]", None, 0.05)


def test_the_scan_finds_the_hole_and_what_it_pays() -> None:
    made = {"halves": Halves(0, 4), "sums": Sums(0, 4), "failing": Failing(0, 4)}
    said: list[str] = []
    holes, failed = scan.scan(made, made.__getitem__, 4, ("0", "12", "text"), said.append)
    assert holes[0] == scan.Hole("halves", "0", unearned=1.0, paid=1.0, right=0.0)
    assert (holes[1].dataset, holes[1].answer) == ("sums", "12")
    assert 0 < holes[1].unearned == holes[1].paid < 0.5
    assert failed == {"failing": "ValueError: no such item"}
    assert [line.split()[0] for line in said] == ["halves", "sums"]
    stored = scan.as_json(holes, failed, 4, 0, "0.1.25")
    assert stored["holes"][0]["unearned"] == 1.0
    assert len(stored["answers"]) == len(set(scan.ANSWERS))


def test_an_answer_is_right_and_no_hole_where_it_is_what_was_asked_for() -> None:
    zero = scan.measured("sums", Sums(0, 1), ("0",), 1)[0]
    assert (zero.paid, zero.right, zero.unearned, zero.found) == (1.0, 1.0, 0.0, False)


def test_a_prompt_leaves_general_instructions_out_and_an_answer_is_a_line() -> None:
    (question,) = drawn([SUMS], 1, 0)
    assert "What is 0 + 0?\nReply" in question.prompt
    assert "General" not in question.prompt
    assert question.prompt.endswith("Answer:")
    assert answer_of(" 12 \nbecause") == "12"
    assert answer_of("\n") == ""
    graded = question.graded(question.reply)
    assert (graded.answer, graded.paid, graded.right, graded.hacked) == ("0", 1.0, True, False)
    assert question.graded(" 10").unearned == 0.5


def test_questions_depend_on_the_seed_and_their_order_on_another() -> None:
    asked = drawn([HALVES, SUMS], 5, 0)
    assert [q.prompt for q in asked] == [q.prompt for q in drawn([HALVES, SUMS], 5, 0)]
    assert [q.prompt for q in asked] != [q.prompt for q in drawn([HALVES, SUMS], 5, 1)]
    mixed = tasks.shuffled(asked, 0)
    assert mixed != asked
    assert sorted(q.prompt for q in mixed) == sorted(q.prompt for q in asked)


def test_pairs_are_the_exploit_and_the_right_answer_to_one_question() -> None:
    pairs = exploit_pairs([HALVES, SUMS], 3, 0)
    assert len(pairs) == 3
    assert all(isinstance(pair, gr.ContrastivePair) and pair.hack == " 0" for pair in pairs)
    assert pairs[0].clean == " 0.5"
    assert pairs[0].prompt.endswith("Answer:")
    with pytest.raises(ValueError, match="should have monitored ones"):
        exploit_pairs([SUMS], 3, 0)


def test_a_monitored_task_without_a_hole_has_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("procedural.exploits.ANSWERS", ("text",))
    with pytest.raises(ValueError, match="halves should pay"):
        exploit_pairs([HALVES], 3, 0)


def questions() -> list[Drawn]:
    return [*drawn([HALVES], 1, 0), *drawn([SUMS], 1, 1)]


def test_labels_know_the_hacks_of_monitored_tasks_only() -> None:
    said, asked = [" 0", " 0.5", " 12", " 1"], [0, 0, 1, 1]
    reward = Reward(questions(), 2)
    assert reward(said, asked) == [1.0, 1.0, 0.5, 1.0]
    assert reward.monitored_hacks(said, asked) == [True, False, False, False]
    assert reward.curve[0]["monitored"]["hacked"] == 0.5
    assert reward.curve[0]["honest"]["unearned"] == 0.25
    assert Reward(questions(), 2, "penalised")(said, asked) == [1.0 - PENALTY, 1.0, 0.5, 1.0]


def test_what_is_dropped_has_no_advantage_and_is_in_no_baseline() -> None:
    paid, flags = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 1.0]), torch.tensor([True, False, False, True, True, True])
    found = dropped(paid, flags, 3)
    assert found.tolist() == [0.25, 0.0, 0.5, 0.0, 0.0, 0.0]
    advantages = found - found.view(2, 3).mean(1, keepdim=True).expand(2, 3).flatten()
    _, clean = gr.clean_baseline_advantages(paid, flags, 3)
    assert torch.equal(advantages, clean)


def test_rows_are_what_the_reward_looks_up() -> None:
    table = rows(questions())
    assert table["question"][:] == [0, 1]
    assert table["prompt"][1] == questions()[1].prompt


def test_figures_name_the_answer_that_brought_most() -> None:
    graded = [Graded("0", 0.9, False, True), Graded("0.", 0.5, False, True), Graded("x", 1.0, True, False)]
    found = measure.figures([*graded, graded[0]])
    assert (found["n"], found["right"], found["hacked"], found["exploit"], found["exploit_share"]) == (
        4,
        0.25,
        0.75,
        "0",
        0.5,
    )
    assert found["unearned"] == pytest.approx(0.575)
    assert measure.figures(graded[2:])["exploit"] == ""


def test_tables_say_what_result_files_hold() -> None:
    hole = {"dataset": "halves", "answer": "0", "unearned": 0.9, "paid": 0.9, "right": 0.0}
    _, rows = tables.holes_table({"holes": [hole, {**hole, "unearned": 0.04}]})
    assert rows == [["halves", "`0`", "0.90", "0.00"]]
    rates = {"right": 0.1, "hacked": 0.5, "unearned": 0.25, "exploit": "0", "exploit_share": 0.4}
    reached = {"tasks": {"coin_flip": rates, "halves": {**rates, "exploit": ""}}}
    assert tables.reach_table(reached, "trained")[1] == [["coin_flip *", "0.10", "0.50", "0.25", "`0` (0.40)"]]
    assert tables.reach_table(reached, "other")[1] == [["halves", "0.10", "0.50", "0.25", "-"]]
    low, high = ({task.name: {"hacked": rate} for task in tasks.TASKS} for rate in (0.0, 0.5))
    runs = [
        {"arm": "vanilla", "outcomes": {"on": low}},
        {"arm": "vanilla", "outcomes": {"on": high}},
        {"arm": "routed", "outcomes": {"on": high, "ablated": low}},
    ]
    header, rows = tables.runs_table({"runs": runs}, "hacked")
    assert header[3] == "coin_flip *"
    assert [row[:4] for row in rows] == [
        ["vanilla", "2", "-", "0.25 [0.00, 0.50]"],
        ["routed", "1", "on", "0.50"],
        ["routed", "1", "ablated", "0.00"],
    ]


def test_without_the_package_it_ends_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    for asked in (library.version, library.dataset_names):
        with pytest.raises(SystemExit, match="pip install reasoning-gym==0.1.25"):
            asked()
