"""The commit that results name is this code's, or none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from glattn import provenance


def test_the_commit_is_this_packages_and_no_other_repositorys(tmp_path):
    around = tmp_path / "project"
    shutil.copytree(Path(provenance.__file__).parent, around / ".venv" / "glattn", ignore=lambda *_: ["__pycache__"])
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(["git", *command], cwd=around, check=True)
    said = subprocess.run(
        [sys.executable, "-c", "from glattn.provenance import commit; print(repr(commit(12)))"],
        cwd=around / ".venv", capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": "."},
    )  # fmt: skip
    assert said.stdout.strip() == "''"


def test_no_git_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.commit(12) == ""
