"""The README's first screen, its quickstart and its commands; that its Python runs is `test_docs.py`'s to see."""

from support.doc_pages import ROOT, blocks, fenced

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_first_screen_holds_the_picture_and_the_two_commands() -> None:
    first_screen = "\n".join(README.splitlines()[:25])
    commands = [block.strip() for block in fenced(README, "bash")[:2]]
    assert commands == [
        'pip install -e ".[examples]" && python examples/grpo_loopholes.py',
        'pip install -e ".[dev]" && pytest -n 2',
    ]
    assert all(command in first_screen for command in commands)
    assert "](docs/curves.png)" in first_screen


def test_the_quickstart_is_fifteen_lines_and_shows_its_output() -> None:
    _, quickstart, *_ = blocks(README)
    assert quickstart.code.startswith("gr.attach(")
    assert quickstart.output is not None
    *routed, printed = quickstart.code.splitlines()
    assert len(routed) <= 15
    assert printed.startswith("print(")


def test_every_file_that_is_linked_is_there() -> None:
    links = [part.split(")")[0] for part in README.split("](")[1:]]
    assert links
    missing = [link for link in links if "://" not in link and not (ROOT / link.partition("#")[0]).exists()]
    assert not missing


def test_the_trl_diff_is_the_one_that_is_run() -> None:
    page = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
    assert len(fenced(README, "diff")) == 1
    assert fenced(README, "diff") == fenced(page, "diff")[:1]
