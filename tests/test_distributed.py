"""Two processes train as one would: the same curve, every validation image counted once, one writer, resumed."""

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import image_folders
import pytest
import timm
import torch
import training_runs as runs
from accelerate.utils import DistributedType
from training_runs import SMALL, assert_same

from glattn.training import distributed
from glattn.training.config import TrainConfig

# nothing is drawn for a whole batch (mixup, dropout): that is drawn by each process for its share
OPTIONS = (*SMALL, "epochs=3", "schedule=constant", "lr=0.002", "warmup_epochs=0", "workers=1", "ema_decay=0.5",
           "auto_augment=rand-m5-inc1")  # fmt: skip
LAUNCHERS = {
    # accelerate starts several processes on CPUs by MPI alone; its launcher for GPUs does as well with device=cpu
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
                   "--num_cpu_threads_per_process=1", "--mixed_precision=no", "--dynamo_backend=no",
                   "--main_process_port=0"],
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Nine validation images: five and four a process, in two batches and one."""
    return f"data={image_folders.write_folder(tmp_path_factory.mktemp('images'), val=3)}"


def command(launcher, folder, *options):
    device = "device=auto" if launcher == "torchrun" else "device=cpu"  # accelerate's own launcher asks for it
    train = ["-m", "glattn", "train", f"run={folder}", *OPTIONS, device, *options]
    return [sys.executable, "-m", *LAUNCHERS[launcher], *train]


ENVIRONMENT = {**runs.one_thread(), "CUDA_VISIBLE_DEVICES": ""}


def launch(launcher, folder, *options):
    """Train in two processes and return what they printed."""
    ended = subprocess.run(command(launcher, folder, *options), capture_output=True, text=True, check=False,
                           env=ENVIRONMENT, timeout=500)  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_a_bad_image_that_the_second_process_reads_is_refused_by_both(tmp_path):
    root = image_folders.write_folder(tmp_path / "images", train=4, val=2)
    bad = image_folders.spoil(root / "train" / "blue" / "001.png", "text")
    options = (f"data={root}", "bad_images=refuse", "workers=0")
    ended = subprocess.run(command("torchrun", tmp_path / "run", *options), capture_output=True, text=True, check=False,
                           env=ENVIRONMENT, timeout=500)  # fmt: skip
    assert ended.returncode != 0
    assert ended.stderr.count(f"1 image(s) cannot be read, e.g. {bad}") == 2
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def one(images, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    ended = runs.run(folder, *OPTIONS, images)
    assert ended.status == 0, ended.output
    return folder


@pytest.fixture(scope="module")
def two(images, tmp_path_factory):
    """The run of two processes, and what it printed."""
    folder = tmp_path_factory.mktemp("two") / "run"
    return folder, launch("accelerate", folder, images)


def assert_close_runs(folder, other):
    """Assert the same curve: the sums of two shares round otherwise than one sum does, and no more."""
    rows, others = runs.metrics(folder), runs.metrics(other)
    assert len(rows) == len(others) == 3
    for row, wanted in zip(rows, others, strict=True):
        assert (row["epoch"], row["lr"]) == (wanted["epoch"], wanted["lr"])
        for name in ("train_loss", "val_loss"):
            assert float(row[name]) == pytest.approx(float(wanted[name]), rel=2e-4), (row, wanted)
    model, wanted = (runs.last_state(place)["model"] for place in (folder, other))
    statistics = [name for name in model if name.endswith(("running_mean", "running_var"))]
    assert statistics
    for name in statistics:
        assert (model[name] - wanted[name]).abs().max() <= 2e-3 * wanted[name].abs().max() + 1e-4, name


def test_two_processes_train_as_one(one, two):
    folder, output = two
    assert_close_runs(folder, one)
    assert runs.best_metrics(folder)["images"] == 9
    assert [float(row["top1"]) for row in runs.metrics(folder)] == [float(row["top1"]) for row in runs.metrics(one)]
    assert "2 process(es) on cpu" in output
    for epoch in (1, 2, 3):
        assert output.count(f"epoch {epoch}/3") == 1, output
    assert runs.files(folder) == runs.files(one) | {"report.html", "samples.png", "curve.png"}


def children(process: int) -> list[int]:
    """Return the processes that a process started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = status.read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has ended
            continue
        if int(parent) == process:
            found.append(int(status.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1])
def test_a_killed_run_of_two_is_resumed(processes, images, one, two, tmp_path):
    """By two processes to the bit; by one as near as one process is to two."""
    folder = tmp_path / "run"
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command("torchrun", folder, images), stdout=log, stderr=log, env=ENVIRONMENT)
        while not (folder / "metrics.csv").exists():
            assert launcher.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
        os.kill(children(launcher.pid)[-1], signal.SIGKILL)
        assert launcher.wait(120) != 0, "it came to its end before it was killed"
    if processes == 2:
        assert "resumed from epoch" in launch("torchrun", folder, images, "resume=auto")
        assert_same(runs.last_state(folder), runs.last_state(two[0]))
        assert runs.metrics(folder) == runs.metrics(two[0])
    else:
        ended = runs.run(folder, *OPTIONS, images, "resume=auto")
        assert ended.status == 0, ended.output
        assert "resumed from epoch" in ended.output
        assert_close_runs(folder, one)


@pytest.mark.slow
def test_two_processes_go_on_with_a_run_of_one(images, one, two, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(one, folder)
    for path in sorted((folder / "checkpoints").glob("*.pt"))[1:]:
        path.unlink()
    assert "resumed from epoch 2, step 0" in launch("torchrun", folder, images, "resume=auto")
    assert_close_runs(folder, one)


@pytest.mark.slow
def test_a_refusal_ends_both_processes(images, two):
    ended = subprocess.run(command("torchrun", two[0], images), capture_output=True, text=True, check=False,
                           env=ENVIRONMENT, timeout=200)  # fmt: skip
    assert ended.returncode != 0
    assert f"glattn train: {two[0]} holds a run already" in ended.stderr


@pytest.mark.parametrize(
    ("kind", "launched", "message"),
    [
        ("FSDP", 1, "training with FSDP is not supported: every process holds the whole model; leave it out"),
        ("NO", 2, "2 processes were launched, but each would train alone on mps; device=cpu trains them together"),
    ],
)
def test_launches_that_would_go_wrong_are_refused(kind, launched, message, monkeypatch):
    made = SimpleNamespace(distributed_type=DistributedType[kind], num_processes=1, device=torch.device("mps"))
    monkeypatch.setattr(distributed, "Accelerator", lambda **options: made)
    monkeypatch.setenv("WORLD_SIZE", str(launched))
    with pytest.raises(ValueError, match=message):
        distributed.start_accelerator(TrainConfig())


def test_another_precision_of_the_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match=r"mixed_precision=bf16, the run precision=no; give precision=bf16"):
        distributed.start_accelerator(TrainConfig())


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("asked", ["", "no", "bf16"])
def test_a_launcher_that_asks_for_no_other_precision_is_taken(monkeypatch, asked):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    accelerator = distributed.start_accelerator(TrainConfig(precision="bf16", tracker="none"))
    assert accelerator.mixed_precision == "bf16"


@pytest.mark.usefixtures("one_process")
def test_parts_of_a_batch_are_as_many_as_the_recipe_says(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = distributed.start_accelerator(TrainConfig(accumulate=2, tracker="none"))
    assert accelerator.gradient_accumulation_steps == 2


@pytest.mark.usefixtures("one_process")
def test_a_checkpointed_batch_counts_once():
    model = timm.create_model("test_glattn").train()
    distributed.convert_batch_norm(model, torch.device("cpu"))
    other, image = copy.deepcopy(model), torch.randn(2, 3, 64, 64)
    other.set_grad_checkpointing()
    for each in (model, other):
        each(image).square().mean().backward()
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=name)
