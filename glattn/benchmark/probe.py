"""Which memory formats a model's step survives: torch ends the whole process in some, and raises nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys

import torch

import glattn  # noqa: F401 (registers the family)
from glattn.benchmark.contestant import FORMATS, Case, prepare

READY = "ready"


def usable_formats(name: str, case: Case, device: torch.device) -> list[str]:
    """Return the memory formats that a case can be measured in: all but where torch was ever seen to end a process.

    That is in training on the CPU.

    Raises:
        RuntimeError: There are none.
    """
    formats = survived(name, case) if case.task == "train" and device.type == "cpu" else list(FORMATS)
    if not formats:
        raise RuntimeError("torch ends the process in its step, in every memory format")
    return formats


def survived(name: str, case: Case) -> list[str]:
    """Return the memory formats in which processes of their own took a model's step and lived, on the CPU.

    A step that raises is survived: whoever takes it meets the exception.

    Raises:
        RuntimeError: A process ended before its first step.
    """
    eager = dataclasses.asdict(dataclasses.replace(case, engine="eager"))
    left, found = list(FORMATS), []
    while left:
        order = json.dumps([name, eager, torch.get_num_threads(), left])
        command = [sys.executable, "-m", __name__, order]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = done.stdout.splitlines()  # by models, too
        if READY not in said:
            why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"the process that was to try memory formats did not begin: {why}")
        passed = [line for line in said if line in left]
        found += passed
        left = left[len(passed) + 1 :]  # the next one ended the process
    return found


def main() -> None:
    """Print the name of each memory format that is asked for, after a step in it."""
    name, case, threads, formats = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    print(READY, flush=True)
    for memory_format in formats:
        with contextlib.suppress(Exception):
            for contestant in prepare(name, Case(**case), torch.device("cpu"), [memory_format]):
                contestant.step()
        print(memory_format, flush=True)


if __name__ == "__main__":
    main()
