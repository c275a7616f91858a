"""What the README says of the code is true: the details table's lines are where it says, the commands' flags exist."""

import ast
import re

import pytest
from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def test_details_stand_where_the_table_says():
    """Line numbers rot with every edit above them; a reader who lands elsewhere stops trusting the table."""
    rows = re.findall(r"\[(\d+)\]\(ppo_rlhf\.py#L(\d+)\): `(.*)` \|", README)
    lines = (REPOSITORY / "ppo_rlhf.py").read_text().splitlines()
    assert len(rows) >= 20
    assert [(number, snippet) for number, anchor, snippet in rows if number != anchor or snippet not in lines[int(number) - 1]] == []


@pytest.mark.parametrize("script", ["sft.py", "reward_model.py", "ppo_rlhf.py"])
def test_flags_in_commands_exist(script):
    """A command that is copied from the README must not end in `unrecognized option`."""
    tree = ast.parse((REPOSITORY / script).read_text())
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    known = {node.target.id for node in args.body if isinstance(node, ast.AnnAssign)}
    commands = re.findall(rf"python {re.escape(script)}([^&\n`]*)", README)
    assert commands and {flag for command in commands for flag in re.findall(r"--(\w+)", command)} <= known | {"help"}


def test_ci_runs_the_test_command():
    """The command that users are told to run is the one that is known to pass."""
    command = re.search(r"^    (pip install .*pytest.*)$", README, re.MULTILINE)[1]
    assert command.replace("pip install", "pip install -q") in (REPOSITORY / ".ci/run").read_text()


def test_readme_is_read_in_five_minutes():
    """At 250 words a minute; commands, outputs and pictures are looked at, not read, and what is folded is for later."""
    text = re.sub(r"<details>.*?</details>|```.*?```|^    .*?$|!\[.*?\]\(.*?\)", "", README, flags=re.DOTALL | re.MULTILINE)
    assert len(re.findall(r"\w\S*", re.sub(r"\]\(\S*?\)", "]", text))) <= 1250


@pytest.mark.parametrize("page", ["README.md", "benchmark/README.md", "data/README.md"])
def test_links_lead_somewhere(page):
    """Every relative link is a file of the repository, and every #anchor a heading of the page that it is on."""
    here = REPOSITORY / page
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", here.read_text()):
        target = (here.parent / path).resolve() if path else here
        assert target.exists(), path
        if target.suffix == ".md" and anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor
