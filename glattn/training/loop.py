"""Training: epochs of steps and validation, interrupted and resumed at any instant with nothing lost."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from tqdm import tqdm

from glattn.files import plain, write_text
from glattn.hub.card import epoch_score
from glattn.training import augment, batches, build, checkpoint, data, optim, run_folder
from glattn.training.check import refuse_bad, refuse_unreadable
from glattn.training.config import TrainConfig
from glattn.training.distributed import convert_batch_norm, start_accelerator
from glattn.training.progress import Progress, refuse_changed
from glattn.training.validation import Predictions, predict_all


class Trainer:
    """One run: what `config` describes, its state, and its folder.

    Everything random is seeded from the place where it is used (see `glattn.training.batches`), so the state
    needs no generator: weights, optimiser, average and `Progress` are all there is.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.accelerator = start_accelerator(config)
        self.main = self.accelerator.is_main_process
        with contextlib.ExitStack() as claimed:
            chosen = [str(run_folder.claim(config, claimed)) if self.main else ""]
            self.folder = Path(broadcast_object_list(chosen)[0])
            self._build(config)
            self.claimed = claimed.pop_all()  # the folder is this run's until it has run

    def _build(self, config: TrainConfig) -> None:
        self.accelerator.project_configuration.logging_dir = str(self.folder)
        self.config = config = dataclasses.replace(config, run=str(self.folder))
        self.train_source, self.val_source = data.open_sources(config)
        refuse_unreadable(training=self.train_source, validation=self.val_source)
        if config.bad_images == "refuse":
            rank, world = self.accelerator.process_index, self.accelerator.num_processes
            refuse_bad(self.train_source, self.val_source, rank=rank, world=world)
        self.class_names = self.train_source.class_names
        self.images = {  # what a run is resumed on, and on nothing else
            "class_names": list(self.class_names),
            "images": len(self.train_source),
            "digests": [self.train_source.digest(), self.val_source.digest()],
        }
        batches.seed_everything(config.seed)
        device = self.accelerator.device
        goes_on = config.resume == "auto" and bool(checkpoint.list_states(self.folder / "checkpoints"))
        self.model = build.build_model(config, len(self.class_names), start=not goes_on)
        if self.accelerator.num_processes > 1:
            self.model = convert_batch_norm(self.model, device)
        self.model = self.model.to(device)
        self.frozen = build.frozen_modules(self.model)
        self.data_config = build.data_config_of(self.model, config)
        counts = self.train_source.class_counts()
        self.task = build.build_task(config, self.model, self.class_names, counts, device).to(device)
        self.optimizer = optim.build_optimizer(config, self.model, self.task)
        trainable = self.task.get_trainable_module()
        assert trainable is not None
        self.trainable = trainable  # as it is before any wrapping
        self.parameters = list(trainable.parameters())  # to walk through the modules takes a small model's step longer
        self.augment = augment.BatchAugment(config, len(self.class_names), device)
        self._make_loaders()
        if config.ema_decay:
            self.task.setup_ema(decay=config.ema_decay, use_warmup=config.ema_warmup)
        self.scheduler = optim.make_scheduler(config, self.optimizer, self.steps)
        self.progress = Progress()
        self.seen: list[torch.Tensor] = []  # [asked, given] of the batches since `note_bad`
        self._restore()
        self._check_shared()
        self.eval_model = self._evaluated()
        if config.compile:
            self.task.compile(mode=config.compile_mode)
        self.task.trainable_module = self.accelerator.prepare(self.task.trainable_module)
        self.stepper = self.accelerator.prepare(self.optimizer)
        self.saved_at, self.saved = time.monotonic(), True

    def _make_loaders(self) -> None:
        config, rank, world = self.config, self.accelerator.process_index, self.accelerator.num_processes
        self.batches = batches.TrainingBatches(
            len(self.train_source), config.batch_size, seed=config.seed, rank=rank, world=world, parts=config.accumulate
        )
        self.steps = self.batches.steps
        shared: dict[str, Any] = {"workers": config.workers, "device": self.accelerator.device}
        self.train_loader = self.train_source.loader(
            self.batches, self.data_config, replace=True, **shared, **augment.augmentation_of(config)
        )
        at_once = max(1, self.batches.batch_size // (world * config.accumulate))  # what memory is known to hold
        val_batches = batches.ValidationBatches(len(self.val_source), at_once, rank=rank, world=world)
        self.val_loader = self.val_source.loader(val_batches, self.data_config, **shared)

    def _evaluated(self) -> nn.Module:
        """Return what is validated and exported: the averaged model, if any, else the model."""
        model = self.task.get_eval_model(ema=bool(self.config.ema_decay))
        assert model is not None
        return getattr(model, "module", model) if self.config.ema_decay else model

    # --- state -------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Go on from the last whole checkpoint, if that is asked for and there is one."""
        states = self.folder / "checkpoints"
        if self.config.resume != "auto" or not states.is_dir():
            return
        state = checkpoint.load_state(states, say=self.say)
        if state is None:
            self.say(f"no whole checkpoint in {states}: starting anew")
            return
        refuse_changed(state, self.config, self.images)
        self.trainable.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.config.ema_decay:
            self.task.trainable_module_ema.module.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.progress.bad = [number for number in self.progress.bad if isinstance(number, int)]  # once they were names
        self.say(f"resumed from epoch {self.progress.epoch}, step {self.progress.step}")

    def _check_shared(self) -> None:
        """Refuse to go on from different places, where machines do not see the same run folder."""
        places = set(gather_object([(self.progress.epoch, self.progress.step)]))
        if len(places) > 1:
            raise ValueError(
                f"run={self.folder}: processes would go on from {len(places)} different (epoch, step), "
                f"{sorted(places)}; put the run's folder where all machines see it"
            )

    def save(self) -> None:
        """Write a training checkpoint; a full or read-only disk is reported, and training goes on."""
        self.saved_at = time.monotonic()
        if self.main:
            self.saved = False
            with self.survive("no checkpoint written"):
                self.write_state()

    def write_state(self) -> None:
        """Write a training checkpoint."""
        state = {
            "config": dataclasses.asdict(self.config),
            **self.images,
            "progress": dataclasses.asdict(self.progress),
            "model": self.trainable.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.task.trainable_module_ema.module.state_dict() if self.config.ema_decay else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
        }
        step = self.progress.epoch * self.steps + self.progress.step
        checkpoint.save_state(self.folder / "checkpoints", state, step=step, keep=self.config.keep)
        self.saved = True

    def survive(self, consequence: str) -> Survive:
        """Return a context in which a failing disk is reported, not fatal."""
        return Survive(self, consequence)

    def say(self, text: str) -> None:
        """Print one line, on the main process, without breaking a progress bar."""
        if self.main:
            tqdm.write(text)
            sys.stdout.flush()

    def bar(self, what: str, total: int) -> Any:
        """Return a progress bar over images: on a terminal only, and of the main process."""
        quiet = not (self.main and sys.stderr.isatty())
        return tqdm(total=total, desc=what, unit="img", disable=quiet, leave=False, dynamic_ncols=True)

    # --- the loop ----------------------------------------------------------------------------------------

    def train_epoch(self) -> float:
        """Do what is left of the current epoch and return its mean loss."""
        accelerator, progress, parts = self.accelerator, self.progress, self.config.accumulate
        self.batches.epoch, self.batches.start = progress.epoch, progress.step
        self.task.train()
        for module in self.frozen:
            module.eval()
        wide = torch.float32 if accelerator.device.type == "mps" else torch.float64
        device_sum = torch.zeros((), dtype=wide, device=accelerator.device)
        size = self.batches.batch_size
        memory_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        with self.bar(f"epoch {progress.epoch + 1}/{self.config.epochs}", self.steps * size) as bar:
            bar.update(progress.step * size)
            for number, (images, places) in enumerate(self.train_loader, progress.step * parts):
                batches.seed_everything(self.config.seed, progress.epoch, number, accelerator.process_index)
                self.seen.append(places[:, 1:3])
                classes = torch.cat([places[:, :1], places[:, 3:]], dim=1)
                images, targets = self.augment(images, classes, progress.epoch)
                with accelerator.accumulate(self.task.trainable_module):
                    with accelerator.autocast():
                        loss = self.task(images.to(memory_format=memory_format), targets)["loss"]
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and self.config.clip_grad:
                        accelerator.clip_grad_norm_(self.parameters, self.config.clip_grad)
                    self.stepper.step()
                    self.stepper.zero_grad()
                device_sum += loss.detach()
                if not accelerator.sync_gradients:
                    continue
                progress.step += 1
                done = progress.epoch * self.steps + progress.step
                if self.scheduler is not None:
                    self.scheduler.step_update(done)
                self.task.update_ema(done)
                if bar.update(size):
                    bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{self.lr:.1e}", refresh=False)
                if self.checkpoint_due() and progress.step < self.steps:
                    progress.loss_sum += self.mean_over_processes(device_sum)
                    device_sum.zero_()
                    self.refuse_infinite(progress.loss_sum)
                    self.note_bad()
                    self.save()
        loss_sum = progress.loss_sum + self.mean_over_processes(device_sum)
        self.refuse_infinite(loss_sum)
        self.note_bad()
        return loss_sum / (self.steps * parts)

    def run(self) -> Path:
        """Train to the end, and return the run's folder."""
        with self.claimed:
            return self._run()

    def _run(self) -> Path:
        config, progress, states = self.config, self.progress, self.folder / "checkpoints"
        if self.main:
            checkpoint.sweep(self.folder)
            checkpoint.sweep(states)
            environment = run_folder.describe_environment(self.accelerator.device.type, self.accelerator.num_processes)
            environment["images_per_epoch"] = self.steps * self.batches.batch_size
            run_folder.write_start(self.folder, config, environment)
        self.announce()
        self.accelerator.init_trackers("tracker", {k: str(v) for k, v in dataclasses.asdict(config).items()})
        while progress.epoch < config.epochs and not self.stale():
            begun, first = time.monotonic(), progress.step
            train_loss = self.train_epoch()
            seconds = time.monotonic() - begun
            predictions = self.validate()
            metrics = predictions.metrics()
            self.refuse_infinite(metrics["loss"], "validation loss")
            progress.rows.append({
                "epoch": progress.epoch + 1, "lr": self.lr, "train_loss": train_loss, "val_loss": metrics["loss"],
                "top1": metrics["top1"], "top5": metrics["top5"], "ece": metrics["ece"],
                "images_per_second": round((self.steps - first) * self.batches.batch_size / seconds, 1),
            })  # fmt: skip
            self.finish_epoch(predictions)
        with self.survive("the tracker misses the end"):
            self.accelerator.end_training()
        if self.main:  # what a full disk did not take has its last chance; metrics.csv may also wait since a kill
            if not self.saved:
                self.write_state()
            checkpoint.prune(states, step=progress.epoch * self.steps, keep=config.keep)
            run_folder.write_metrics(self.folder, progress.rows)
        return self.folder

    def finish_epoch(self, predictions: Predictions) -> None:
        """Report an epoch, export its model if it is the best so far, and save."""
        progress = self.progress
        row = progress.rows[-1]
        metric = self.config.eval_metric
        best = progress.best is None or epoch_score(row, metric) > epoch_score(progress.best, metric)
        progress.bad = sorted(set(progress.bad).union(*gather_object([progress.bad])))
        self.say(
            f"epoch {row['epoch']}/{self.config.epochs}  loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}"
            f"  top-1 {row['top1']:.2f}%  top-5 {row['top5']:.2f}%  {row['images_per_second']:.0f} img/s"
            + ("  best" if best else "")
        )
        values = {name: value for name, value in row.items() if name != "epoch"}
        with self.survive("the tracker misses this epoch"):
            self.accelerator.log(values, step=row["epoch"])
        if self.main and best:
            with self.survive("best/ keeps the model before"):
                self.export(predictions)
                progress.best = row
        if self.main:
            with self.survive("skipped.txt is behind"):
                self.list_bad(predictions)
        progress.epoch, progress.step, progress.loss_sum = progress.epoch + 1, 0, 0.0
        self.save()  # what comes before is done again if it was cut off; what comes after, at the end of `run`
        if self.main:
            with self.survive("metrics.csv and curve.png are behind"):
                run_folder.write_metrics(self.folder, progress.rows)
        progress.best = broadcast_object_list([progress.best])[0]

    def export(self, predictions: Predictions) -> None:
        """Write best/."""
        metrics = predictions.metrics()
        checkpoint.export(
            self.eval_model,
            self.folder / "best",
            class_names=self.class_names,
            data_config=self.data_config,
            metrics={"epoch": self.progress.epoch + 1, **metrics},
        )

    # --- small things ------------------------------------------------------------------------------------

    @property
    def lr(self) -> float:
        """The largest learning rate of any group."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def validate(self) -> Predictions:
        """Run the evaluated model over all validation images."""
        with self.bar("validating", len(self.val_source)) as bar:

            def watched(loader: Any) -> Any:
                for images, places in loader:
                    yield images, places
                    bar.update(len(images) * self.accelerator.num_processes)

            return predict_all(self.eval_model, self.val_loader, self.accelerator, watched)

    def refuse_infinite(self, loss: float, name: str = "loss") -> None:
        """Raise before what is no number any more replaces the checkpoints that are."""
        if not math.isfinite(loss):
            raise ValueError(f"the {name} is {loss} in epoch {self.progress.epoch + 1}: lower lr, or train in fp32")

    def stale(self) -> bool:
        """Whether no epoch was better for as many as `early_stop` allows."""
        best, patience = self.progress.best, self.config.early_stop
        stop = bool(patience and best and self.progress.epoch - best["epoch"] >= patience)
        if stop:
            metric = {"top1": "top-1", "loss": "validation loss"}[self.config.eval_metric]
            self.say(f"stopped early: no better {metric} for {patience} epochs")
        return stop

    def checkpoint_due(self) -> bool:
        """Whether all processes agree that it is time for a checkpoint."""
        due = time.monotonic() - self.saved_at >= 60 * self.config.checkpoint_minutes
        if self.accelerator.num_processes > 1 and self.progress.step % 50 == 0:
            return bool(broadcast_object_list([due])[0])
        return due and self.accelerator.num_processes == 1

    def mean_over_processes(self, value: torch.Tensor) -> float:
        """Return the mean of a number over the processes."""
        return float(self.accelerator.reduce(value.clone(), reduction="mean"))

    def note_bad(self) -> None:
        """Remember which of the images seen since the last call could not be read.

        Not after each step: to look would make the device wait.
        """
        if self.seen:
            asked, given = torch.cat(self.seen).unbind(1)
            self.seen.clear()
            self.progress.bad = sorted({*asked[asked != given].tolist(), *self.progress.bad})

    def list_bad(self, predictions: Predictions) -> None:
        """Write and announce which images were left out."""
        seen = ((self.train_source, self.progress.bad), (self.val_source, predictions.bad))
        bad = [source.name(int(index)) for source, indices in seen for index in indices]
        listing = self.folder / "skipped.txt"
        text = plain("".join(f"{name}\n" for name in bad))
        if bad and (not listing.exists() or listing.read_text(encoding="utf-8") != text):
            write_text(listing, text)
            self.say(f"{len(bad)} image(s) could not be read and were left out; they are listed in {listing}")

    def announce(self) -> None:
        """Say what is about to be trained on what."""
        trained = sum(p.numel() for p in self.parameters if p.requires_grad)
        size = "x".join(str(edge) for edge in self.data_config["input_size"][1:])
        self.say(
            f"{self.config.model}: {trained / 1e6:.2f}M trained parameters, {len(self.class_names)} classes, "
            f"{len(self.train_source)} + {len(self.val_source)} images at {size}, "
            f"{self.accelerator.num_processes} process(es) on {self.accelerator.device.type}; run folder {self.folder}"
        )
        absent = int((self.train_source.class_counts() == 0).sum())
        if absent and self.config.instances == 1:  # drawn, fewer than there are classes; several show others as well
            self.say(f"classes without a training image: {absent}")


class Survive:
    """Report an `OSError` in one line and go on."""

    def __init__(self, trainer: Trainer, consequence: str) -> None:
        self.trainer, self.consequence = trainer, consequence

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        """Swallow what the disk did."""
        if isinstance(error, OSError):
            self.trainer.say(f"warning: {error}: {self.consequence}")
            return True
        return False


def train(config: TrainConfig) -> Accelerator:
    """Train, then report; return the accelerator, whose process group is the caller's to end."""
    from glattn.training.report import write_report

    trainer = Trainer(config)
    trainer.run()
    if trainer.main:
        write_report(trainer.folder, trainer.val_source, say=trainer.say)
    return trainer.accelerator
