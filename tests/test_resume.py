"""Runs killed, starved of disk and damaged: resumed, they end to the bit where a run never interrupted ends."""

import dataclasses
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import image_folders
import pytest
import timm
import training_runs as runs
from training_runs import SMALL, assert_same, assert_same_run

from glattn.files import write_text
from glattn.training import loop
from glattn.training.checkpoint import export, list_states, load_state, save_state
from glattn.training.config import TrainConfig
from glattn.training.progress import refuse_changed

# everything that draws random numbers or keeps a state of its own; a checkpoint after every step: 3 an epoch
RICH = (*SMALL, "epochs=2", "lr=0.03", "workers=1", "ema_decay=0.5", "drop_path_rate=0.2", "drop_rate=0.1", "mixup=0.4",
        "cutmix=1", "random_erase=0.3", "auto_augment=rand-m5-inc1", "layer_decay=0.8", "accumulate=2",
        "checkpoint_minutes=0")  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Of each colour eight and four, one of each kind unreadable."""
    folder = image_folders.write_folder(tmp_path_factory.mktemp("images"))
    image_folders.spoil(folder / "train" / "red" / "003.png", "truncated")
    image_folders.spoil(folder / "val" / "blue" / "001.png", "truncated")
    return f"data={folder}"


@pytest.fixture(scope="module")
def reference(images, tmp_path_factory):
    """A run of RICH that nothing interrupts."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    ended = runs.run(folder, *RICH, images, "resume=auto")  # in a new folder, that starts
    assert ended.status == 0, ended.output
    assert "resumed" not in ended.output
    assert runs.best_metrics(folder)["epoch"] == 2, "the tests count on best/ being written twice"
    assert len((folder / "skipped.txt").read_text().splitlines()) == 2
    return folder


@pytest.fixture
def halted(reference, tmp_path):
    """A copy of the reference, to be set back: its last checkpoints are of steps 5 and 6, of 6."""
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    return folder


def finish(folder, images, *options):
    """Resume a run of RICH to its end and return what it said."""
    ended = runs.run(folder, *RICH, images, "resume=auto", *options)
    assert ended.status == 0, ended.output
    return ended.output


# --- killed ----------------------------------------------------------------------------------------------------------


def test_killed_again_and_again(reference, images, tmp_path):
    """One run, killed in each of its phases; the numbers count from where it was resumed."""
    folder = tmp_path / "run"
    for hook, arguments, resumed in (
        (runs.die_in_batch, (2,), None),  # before the first checkpoint: it starts anew
        (runs.die_writing_state, (3,), None),  # the epoch's last, after its model was exported
        (runs.die_in_validation, (1,), "epoch 0, step 2"),
        (runs.die_moving, (8, "before"), "epoch 0, step 2"),  # saved, but metrics.csv not written
        (runs.die_in_batch, (4,), "epoch 1, step 0"),  # with half a step's gradient accumulated
        (runs.die_moving, (6, "after"), "epoch 1, step 1"),  # new weights in best/ beside the metrics of the old
    ):
        ended = runs.run(folder, *RICH, images, "resume=auto", hook=hook, arguments=arguments)
        assert ended.status == -9, ended.output
        assert (f"resumed from {resumed}" in ended.output) if resumed else ("resumed" not in ended.output)
    assert "resumed from epoch 1, step 2" in finish(folder, images)
    assert_same_run(folder, reference)


def test_killed_between_the_last_checkpoint_and_its_metrics(reference, images, halted):
    states = halted / "checkpoints"
    save_state(states, {"step": 4}, step=4, keep=9)  # not yet dropped, either
    shutil.copy(next((reference / "checkpoints").glob("*5.*.pt")), states)
    shutil.copy(next((reference / "checkpoints").glob("*6.*.pt")), states)
    lines = (halted / "metrics.csv").read_text().splitlines(keepends=True)
    (halted / "metrics.csv").write_text("".join(lines[:-1]))
    before = (halted / "best" / "model.safetensors").stat().st_mtime_ns
    finish(halted, images)
    assert_same_run(halted, reference)
    assert (halted / "best" / "model.safetensors").stat().st_mtime_ns == before, "there was nothing left to train"


def test_leftovers_of_killed_runs_are_swept(reference, images, halted):
    (halted / ".metrics.csv-a1b2c3d4").write_text("half")
    (halted / ".best-a1b2c3d4" / "model").mkdir(parents=True)
    (halted / "checkpoints" / ".state-a1b2c3d4").mkdir()
    (halted / "checkpoints" / ".state-a1b2c3d4" / "state.pt").write_bytes(b"half")
    persons = [halted / ".notes", halted / ".env-template", halted / ".vscode-settings" / "x"]
    for path in persons:
        path.parent.mkdir(exist_ok=True)
        path.write_text("a person's")
    finish(halted, images)
    for path in persons:
        assert path.read_text() == "a person's"
        path.unlink()
    persons[-1].parent.rmdir()
    assert_same_run(halted, reference)
    assert not list(halted.rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", range(1, 16))
def test_killed_at_every_move_of_a_file(number, when, reference, images, tmp_path):
    folder = tmp_path / "run"
    ended = runs.run(folder, *RICH, images, hook=runs.die_moving, arguments=(number, when))
    assert ended.status == -9, ended.output
    finish(folder, images)
    assert_same_run(folder, reference)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_instants(seed, reference, images, tmp_path):
    folder, rng = tmp_path / "run", random.Random(seed)
    limit = 1.0
    for _ in range(12):
        process, log = runs.start(folder, *RICH, images, "resume=auto", "workers=2")
        delay = rng.uniform(0, limit)
        process.join(delay)
        process.kill()
        process.join()
        if process.exitcode == 0:  # it was through before
            break
        assert process.exitcode == -9, log.read_text()
        limit *= 1.3  # in the end it comes through, however slow the machine
    finish(folder, images)
    assert_same_run(folder, reference)


def test_early_stop_counts_on(images, tmp_path):
    options = (*SMALL, images, "epochs=9", "early_stop=2", "workers=0", "lr=1e-12", "warmup_lr=1e-12", "min_lr=0",
               "resume=auto")  # fmt: skip
    whole = runs.run(tmp_path / "whole", *options)
    assert (whole.status, len(runs.metrics(tmp_path / "whole"))) == (0, 3), whole.output
    killed = runs.run(tmp_path / "run", *options, hook=runs.die_in_validation, arguments=(3,))
    assert killed.status == -9
    assert runs.best_metrics(tmp_path / "run")["epoch"] == 1
    for _ in range(2):  # the second time, there is nothing left to do
        ended = runs.run(tmp_path / "run", *options)
        assert ended.status == 0, ended.output
        assert "stopped early: no better top-1 for 2 epochs" in ended.output
        assert_same_run(tmp_path / "run", tmp_path / "whole")


# --- damaged ---------------------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, reference, images, halted):
    last = list_states(halted / "checkpoints")[-1]
    damage(last)
    output = finish(halted, images)
    assert f"{last} is damaged (its content does not match its digest); trying the one before" in output
    assert "resumed from epoch 1, step 2" in output
    assert_same_run(halted, reference)


def test_nothing_but_damaged_checkpoints_is_refused(images, halted):
    for path in list_states(halted / "checkpoints"):
        truncate(path)
    best = (halted / "best" / "model.safetensors").read_bytes()
    ended = runs.run(halted, *RICH, images, "resume=auto")
    assert ended.status == 1
    assert ended.output.splitlines()[-1] == (
        f"glattn train: every checkpoint in {halted / 'checkpoints'} is damaged; remove that folder to start anew"
    )
    assert (halted / "best" / "model.safetensors").read_bytes() == best


def test_the_best_epochs_weights_are_whole_or_refused(tmp_path):
    model = timm.create_model("test_glattn", num_classes=2)
    config = timm.data.resolve_model_data_config(model)
    export(model, tmp_path / "best", class_names=("a", "b"), data_config=config, metrics={})
    file = tmp_path / "best" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 64  # one bit of one weight
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True)


def test_a_damaged_checkpoint_does_not_push_out_the_new_one(tmp_path):
    for step in (3, 6):
        save_state(tmp_path, {"step": step}, step=step, keep=2)
    truncated = list_states(tmp_path)[-1]
    truncated.write_bytes(b"")
    assert load_state(tmp_path, say=lambda text: None) == {"step": 3}
    save_state(tmp_path, {"step": 4}, step=4, keep=1)
    assert [path.name[:14] for path in list_states(tmp_path)] == ["step-000000004"]
    assert load_state(tmp_path) == {"step": 4}


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_last_checkpoints_are_kept(keep, tmp_path):
    for step in range(1, 6):
        save_state(tmp_path, {"step": step}, step=step, keep=keep)
        kept = [int(path.name[5:14]) for path in list_states(tmp_path)]
        assert kept == list(range(max(1, step - keep + 1), step + 1))
    assert load_state(tmp_path) == {"step": 5}
    assert load_state(tmp_path / "none") is None


# --- disks -----------------------------------------------------------------------------------------------------------


def test_a_disk_full_for_a_while_costs_nothing(reference, images, tmp_path):
    ended = runs.run(tmp_path / "run", *RICH, images, hook=runs.fill_disk, arguments=(2, 4))
    assert ended.status == 0, ended.output
    assert ended.output.count("no checkpoint written") == 3
    assert_same(runs.last_state(tmp_path / "run"), runs.last_state(reference))
    assert runs.metrics(tmp_path / "run") == runs.metrics(reference)


def test_a_disk_that_stays_full_ends_in_one_line_and_the_run_is_resumed(reference, images, tmp_path):
    folder = tmp_path / "run"
    ended = runs.run(folder, *RICH, images, hook=runs.fill_disk, arguments=(4,))
    assert ended.status == 1
    lines = ended.output.splitlines()
    assert "Traceback" not in ended.output
    assert lines[-1] == f"glattn train: cannot write a checkpoint in {folder / 'checkpoints'}: File too large"
    assert any(line.startswith("warning: ") and line.endswith("best/ keeps the model before") for line in lines)
    assert runs.files(folder) <= runs.files(reference) | {"checkpoints/step-000000002", "checkpoints/step-000000003"}
    assert runs.best_metrics(folder)["epoch"] == 1
    assert "resumed from epoch 1, step 0" in finish(folder, images)
    assert_same_run(folder, reference)


def test_a_read_only_folder_is_one_line_and_untouched(reference, images, halted, tmp_path):
    list_states(halted / "checkpoints")[-1].unlink()
    before = {path: path.stat().st_mtime_ns for path in halted.rglob("*")}
    places = [halted, halted / "checkpoints", halted / "best"]
    for place in places:
        place.chmod(0o555)
    fresh = tmp_path / "locked"
    fresh.mkdir(mode=0o555)
    try:
        for folder in (halted, fresh / "run"):
            ended = runs.run(folder, *RICH, images, "resume=auto", hook=runs.obey_permissions)
            assert ended.status == 1
            assert "Traceback" not in ended.output
            assert ended.output.splitlines()[-1].startswith("glattn train: [Errno 13] Permission denied: ")
    finally:
        for place in places:
            place.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in halted.rglob("*")} == before
    finish(halted, images)
    assert_same_run(halted, reference)


# --- another run, other options --------------------------------------------------------------------------------------


def _another_at_the_start():
    loop.gather_object = lambda mine: [*mine, (0, 0)]


def test_machines_that_see_different_folders_do_not_go_on(images, halted):
    ended = runs.run(halted, *RICH, images, "resume=auto", hook=_another_at_the_start)
    assert ended.status == 1
    assert "processes would go on from 2 different (epoch, step), [(0, 0), (2, 0)]" in ended.output
    assert "where all machines see it" in ended.output


def test_what_a_link_points_to_is_replaced_and_no_pipe_is(tmp_path):
    (tmp_path / "link").symlink_to("target")
    for _ in range(2):
        write_text(tmp_path / "link", "text")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no plain file"):
        write_text(tmp_path / "pipe", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]


def test_a_run_is_never_overwritten(images, reference):
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    ended = runs.run(reference, *RICH, images)
    assert ended.status == 1
    assert ended.output.splitlines() == [
        f"glattn train: {reference} holds a run already; --resume auto goes on with it, or give another run=FOLDER"
    ]
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*")} == before


def test_a_run_of_both_starts_goes_on_with_the_one_that_counted():
    """Once, nothing refused both."""
    state = {
        "config": dataclasses.asdict(TrainConfig(checkpoint="a.safetensors", run="runs/mine")) | {"pretrained": True}
    }
    refuse_changed(state, TrainConfig(checkpoint="a.safetensors", run="runs/mine"), {})
    with pytest.raises(ValueError, match=r"started with other options: checkpoint"):
        refuse_changed(state, TrainConfig(pretrained=True, run="runs/mine"), {})


def test_other_options_are_refused(images, halted, tmp_path):
    ended = runs.run(halted, *RICH, images, "resume=auto", "lr=0.02", "seed=3")
    assert ended.status == 1
    assert ended.output.splitlines() == [
        f"glattn train: {halted} was started with other options: lr (was 0.03, is 0.02), seed (was 0, is 3); "
        "give another run=FOLDER"
    ]
    other = image_folders.write_folder(tmp_path / "other", train=7)
    ended = runs.run(halted, *RICH, f"data={other}", "resume=auto")
    assert (ended.status, ended.output.splitlines()) == (
        1, [f"glattn train: {halted} was started on other images; give another run=FOLDER"],
    )  # fmt: skip


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="a folder that takes no files, whoever asks")
def test_a_file_that_cannot_be_written_is_named_itself():
    with pytest.raises(OSError, match=r"'/proc/metrics.csv'$"):
        write_text(Path("/proc/metrics.csv"), "")


def test_options_that_did_nothing_need_not_be_given_again(reference, images, halted):
    states = halted / "checkpoints"
    before, newest = list_states(states)
    newest.unlink()
    state = load_state(states)
    state["config"] |= {"distill_weight": 0.9, "val_split": "tset"}
    save_state(states, state, step=int(before.name[5:14]), keep=2)
    finish(halted, images)
    assert_same_run(halted, reference)


def test_the_same_images_may_have_moved(reference, images, halted, tmp_path):
    folder = images.removeprefix("data=")
    shutil.copytree(f"{folder}/train", tmp_path / "moved" / "train")
    shutil.copytree(f"{folder}/val", tmp_path / "moved" / "validation")
    list_states(halted / "checkpoints")[-1].unlink()
    assert "resumed from epoch 1, step 2" in finish(halted, f"data={tmp_path / 'moved'}")
    assert runs.metrics(halted) == runs.metrics(reference)
    listed = (halted / "skipped.txt").read_text().splitlines()
    assert len(listed) == 2
    assert all(Path(path).is_relative_to(tmp_path / "moved") for path in listed)


@pytest.mark.parametrize(("split", "move"), [
    ("train", "red/000.png red/900.png"), ("train", "red/000.png blue/900.png"), ("val", "red/000.png blue/900.png"),
])  # fmt: skip
def test_as_many_other_images_are_refused(split, move, images, halted, tmp_path):
    other = shutil.copytree(images.removeprefix("data="), tmp_path / "other")
    old, new = move.split()
    (other / split / old).rename(other / split / new)
    ended = runs.run(halted, *RICH, f"data={other}", "resume=auto")
    assert (ended.status, ended.output.splitlines()) == (
        1, [f"glattn train: {halted} was started on other images; give another run=FOLDER"],
    )  # fmt: skip


def test_a_checkpoint_that_tells_less_of_its_images_is_gone_on_with(images, halted):
    states = halted / "checkpoints"
    state = load_state(states)
    del state["digests"]
    state["progress"]["bad"] = ["train/red/000.png"]  # which stood as a name, once
    save_state(states, state, step=6, keep=1)
    assert "resumed from epoch 2, step 0" in finish(halted, images)


def test_more_epochs_are_as_if_asked_for_at_once(images, tmp_path):
    options = (*SMALL, images, "workers=0", "schedule=constant", "resume=auto")
    for folder, all_epochs in (("run", (1, 3)), ("whole", (3,))):
        for epochs in all_epochs:
            ended = runs.run(tmp_path / folder, *options, f"epochs={epochs}")
            assert ended.status == 0, ended.output
    assert_same(runs.last_state(tmp_path / "run"), runs.last_state(tmp_path / "whole"))
    assert len(runs.metrics(tmp_path / "run")) == 3


# --- the same seed ---------------------------------------------------------------------------------------------------


def test_the_command_repeats_to_the_bit_with_other_workers(reference, images, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "glattn", "train", f"run={folder}", *RICH, images, "workers=2"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=runs.one_thread())
    assert (ended.returncode, ended.stderr) == (0, "")
    assert_same(runs.last_state(folder), runs.last_state(reference))
    assert runs.metrics(folder) == runs.metrics(reference)
    assert {"report.html", "samples.png", "curve.png"} <= runs.files(folder)


def test_another_seed_is_another_run(reference, images, tmp_path):
    ended = runs.run(tmp_path / "run", *RICH, images, "epochs=1", "seed=1")
    assert ended.status == 0, ended.output
    assert runs.metrics(tmp_path / "run")[0]["train_loss"] != runs.metrics(reference)[0]["train_loss"]
