"""Where this code comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit(digits: int) -> str:
    """Return the commit of the checkout that this package lies in, "-dirty" behind it if files were changed since.

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
        return git("describe", "--always", "--dirty", f"--abbrev={digits}", "--exclude=*")
    except FileNotFoundError:
        return ""
