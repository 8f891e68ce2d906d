"""A Python process of its own, for code that reads the Hub's address and cache when it is first imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from hub_server import WRITER

LOOP = """
import contextlib, io, json, sys
answers = sys.stdout
for line in sys.stdin:
    names = {}
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(json.loads(line), names)
        answer = {"result": names.get("result"), "printed": printed.getvalue()}
    except BaseException as error:
        answer = {"error": [c.__name__ for c in type(error).__mro__], "message": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
"""


class Failed(Exception):  # noqa: N818
    """What the code in the other process raised: ``kinds`` has the names of its classes."""

    def __init__(self, kinds: list[str], message: str) -> None:
        super().__init__(f"{kinds[0]}: {message}")
        self.kinds, self.message = kinds, message


def environment(endpoint: str, home: Path, token: str | None = WRITER, **more: str) -> dict[str, str]:
    """Return the environment of a client: this Hub and no other, its own cache and token, one thread."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
    mine |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    mine |= {
        "NO_PROXY": "127.0.0.1,localhost",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if token is not None:
        mine["HF_TOKEN"] = token
    return mine | more


class Client:
    """A process that runs snippets one after the other: ``result`` of each comes back as JSON."""

    def __init__(self, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, bufsize=1,
        )  # fmt: skip

    def start(self, code: str) -> None:
        self.process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the client's process ended")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"], answer["message"])
        return answer

    def run(self, code: str):
        self.start(code)
        return self.answer()["result"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
