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


def test_the_commit_is_the_last_that_changed_the_package(tmp_path):
    package = tmp_path / "glattn"
    shutil.copytree(Path(provenance.__file__).parent, package, ignore=lambda *_: ["__pycache__"])

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    def said():
        code = "from glattn.provenance import commit; print(commit(12))"
        environment = os.environ | {"PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
        )
        return done.stdout.strip()

    git("init", "-q")
    git("add", "glattn")
    git("commit", "-qm", "package")
    first = git("rev-parse", "HEAD")[:12]
    assert said() == first
    (tmp_path / "rows.csv").touch()
    assert said() == first
    git("add", "rows.csv")
    git("commit", "-qm", "results")
    assert said() == first
    (package / "new.py").touch()
    assert said() == f"{first}-dirty"


def test_no_git_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.commit(12) == ""
