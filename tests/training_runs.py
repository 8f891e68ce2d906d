"""Runs of ``glattn train`` in processes of their own, stopped where a test wants them to, and compared to the bit.

A process is forked from one that has imported everything, so that a run costs a second; what is killed is the
real command in a real process.
"""

import csv
import ctypes
import json
import multiprocessing
import os
import resource
import signal
import struct
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from glattn.training.checkpoint import list_states

SMALL = ("model=test_glattn", "image_size=32", "batch_size=8", "lr=0.01", "tracker=none", "device=cpu")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["training_runs", "glattn.training.command", "glattn.training.loop",
                                 "glattn.training.report", "matplotlib.backends.backend_agg",
                                 "matplotlib.figure"])  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status (negative: the signal), and what it printed."""

    status: int
    output: str


def start(folder: Path, *options: str, hook=None, arguments=(), report=False):
    """Start ``glattn train run=FOLDER OPTIONS``; `hook(*arguments)` is called in its process first.

    The report and the curve, which nothing else hangs on, are left out unless asked for.
    """
    log = folder.parent / f"{folder.name}.log"
    log.write_text("")
    argv = ["train", f"run={folder}", *options]
    process = _CONTEXT.Process(target=_main, args=(argv, str(log), hook, arguments, report))
    process.start()
    return process, log


def run(folder: Path, *options: str, **how) -> Ended:
    """Do a run to its end, however it comes."""
    process, log = start(folder, *options, **how)
    process.join(300)
    assert process.exitcode is not None, f"still running: {log.read_text()}"
    return Ended(process.exitcode, log.read_text())


def _main(argv, log, hook, arguments, report):
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in the command itself
    torch.set_num_threads(1)
    from glattn.cli import main
    from glattn.training import report as last_words
    from glattn.training import run_folder

    if not report:
        last_words.write_report = lambda *args, **options: None
        run_folder.draw_curve = lambda *args: None
    if hook is not None:
        hook(*arguments)
    try:
        status = main(argv)
    except BaseException:
        traceback.print_exc()
        status = 99
    sys.stdout.flush()
    sys.exit(status)


def one_thread() -> dict[str, str]:
    """Return the environment for a command that uses one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


# --- where a run is killed -----------------------------------------------------------------------------------


def die():
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_batch(number):
    """Die after batch `number` of the run has been loaded, before its step."""
    from glattn.training import batches

    seed, seen = batches.seed_everything, []

    def seed_everything(*place):
        seen.append(place)
        if sum(len(p) > 1 for p in seen) == number:
            die()
        seed(*place)

    batches.seed_everything = seed_everything


def die_in_validation(number):
    """Die in the middle of validation `number`."""
    from glattn.training import loop

    whole, calls = loop.predict_all, []

    def predict_all(model, loader, accelerator, progress):
        calls.append(1)

        def watched(batches):
            for place, batch in enumerate(batches):
                if len(calls) == number and place == 1:
                    die()
                yield batch

        return whole(model, loader, accelerator, watched)

    loop.predict_all = predict_all


def die_writing_state(number):
    """Die with half of checkpoint `number` written."""
    save, calls = torch.save, []

    def half(state, file):
        save(state, file)
        calls.append(1)
        if len(calls) == number:
            file.truncate(file.tell() // 2)
            die()

    torch.save = half


def die_moving(number, when):
    """Die right before or after file `number` is moved to its place."""
    replace, calls = os.replace, []

    def counted(source, target):
        calls.append(1)
        if len(calls) == number and when == "before":
            die()
        replace(source, target)
        if len(calls) == number:
            die()

    os.replace = counted


# --- disks that fail -----------------------------------------------------------------------------------------------


def fill_disk(first, last=10**9):
    """Refuse files over 100 kB from the writing of checkpoint `first` to that of `last`: the kernel itself does."""
    save, calls = torch.save, []
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(state, file):
        calls.append(1)
        full = first <= len(calls) <= last
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else whole[0], whole[1]))
        save(state, file)

    torch.save = limited


def obey_permissions():
    """Give up root's right to write where a folder's mode says no (tests may run as root)."""
    header = struct.pack("Ii", 0x20080522, 0)  # version 3, this thread
    assert ctypes.CDLL(None, use_errno=True).capset(header, struct.pack("6I", *[0] * 6)) == 0


# --- what a run leaves -----------------------------------------------------------------------------------------


def metrics(folder: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv, timing aside."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def last_state(folder: Path):
    """Return the last checkpoint, timing and the folder's own name aside."""
    state = torch.load(list_states(folder / "checkpoints")[-1], weights_only=True)
    for row in [*state["progress"]["rows"], state["progress"]["best"]]:
        row.pop("images_per_second", None)
    for name in ("run", "resume", "workers", "device"):
        del state["config"][name]
    return state


def assert_same(one, other, where="state"):
    """Assert that two states are equal to the bit, naming the place where they are not."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), f"{where}: differs by {(one - other).abs().max()}"
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for name in one:
            assert_same(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    else:
        assert one == other, f"{where}: {one!r} is not {other!r}"


def assert_same_run(folder: Path, reference: Path):
    """Assert that a run left what another did: state, exported model, metrics, and nothing half-written."""
    assert_same(last_state(folder), last_state(reference))
    assert metrics(folder) == metrics(reference)
    if (reference / "skipped.txt").exists():
        assert (folder / "skipped.txt").read_text() == (reference / "skipped.txt").read_text()
    for name in ("model.safetensors", "config.json", "metrics.json"):
        assert (folder / "best" / name).read_bytes() == (reference / "best" / name).read_bytes(), name
    assert files(folder) == files(reference)
    assert [p.name[:14] for p in list_states(folder / "checkpoints")] == [
        p.name[:14] for p in list_states(reference / "checkpoints")
    ]


def files(folder: Path) -> set[str]:
    """Return the names of all files of a run; checkpoints by their steps."""
    return {str(p.relative_to(folder)).partition(".")[0] if p.suffix == ".pt" else str(p.relative_to(folder))
            for p in folder.rglob("*") if p.is_file()}  # fmt: skip


def best_metrics(folder: Path):
    """Return what the exported model was measured to have."""
    return json.loads((folder / "best" / "metrics.json").read_text())
