"""Where this code comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit(digits: int) -> str:
    """Return the last commit that changed this package, "-dirty" behind it if its files are not as committed.

    Nothing for an installed package, whatever repository lies around the environment, and where there is no git.
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not git("ls-files", Path(__file__).name):
            return ""
        changed = git("status", "--porcelain", "--", ".")
        return git("log", "-1", f"--abbrev={digits}", "--format=%h", "--", ".") + ("-dirty" if changed else "")
    except FileNotFoundError:
        return ""
