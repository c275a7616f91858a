"""What the README says of commands and files is true."""

import re

from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_test_command():
    """The two commands to install and run, and to test; the second is what CI runs, in an environment of its
    own."""
    run, test = re.findall(r"^(?:    )?(pip install .*)$", README, re.MULTILINE)[:2]
    for script in ("sft.py", "reward_model.py", "ppo_rlhf.py"):
        assert f"python {script}" in run
    ci = (REPOSITORY / ".ci/run").read_text().splitlines()[-1]
    assert test.replace("pip install", "pip install -q") == ci


def test_files_that_it_names_exist():
    """Links, and paths in code, that are of this repository."""
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", README)
    code = re.findall(
        r"`((?:data|benchmark|tests)/[\w./-]+|(?:sft|reward_model|ppo_rlhf)\.py|requirements\.txt)`", README
    )
    assert {"sft.py", "reward_model.py", "ppo_rlhf.py"} <= {*links, *code}
    assert [name for name in {*links, *code} if not (REPOSITORY / name).exists()] == []
