"""`push`: a model or a training's run folder to the Hub, in one commit, or to a folder to look at first."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils._validators import validate_repo_id
from timm.utils.model import unwrap_model
from torch import nn

from glattn.files import copy_file, user_path, write_text
from glattn.hub.card import CURVE, Record, is_untouched, model_card, read_record
from glattn.hub.loading import create_model, patiently, plain_errors
from glattn.hub.local_dir import all_names, model_folder, save_model
from glattn.models.checkpoint import is_folded

_logger = logging.getLogger(__name__)
README = "README.md"


def push(
    source: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    label_names: Sequence[str] | None = None,
    record: Record | None = None,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload model",
    dry_run: str | os.PathLike[str] | None = None,
) -> str:
    """Publish a model on the Hub, as ``hf-hub:repo_id`` loads it; return where it lies.

    Weights (safetensors only), config.json, model card and curve go up in one commit, so that a push that is
    interrupted leaves the repository as it was. Pushing again updates them; an edited card stays.

    Args:
        source: A model, a run folder (its ``best``) or a folder as `timm.models.save_for_hf` writes it.
        repo_id: ``org/name`` on the Hub; made if it is not there.
        label_names: The classes' names in their order, or each under its index, if the model does not carry them.
        record: What the card says of the training, if the run folder does not.
        private: Make a new repository private, and push to no public one.
        revision: Branch to commit to, made if it is not there; ``main`` if not given.
        token: The Hub's token; that of ``HF_TOKEN`` or ``hf auth login`` if not given.
        message: The commit's message.
        dry_run: Write the files to this folder instead; nothing is sent.

    Raises:
        FileNotFoundError: The folder holds no model.
        OSError: The Hub refuses or is out of reach; one line says why.
        ValueError: The weights are not right, the model is folded, the names do not fit the classes, or a repository
            that is to be private is there and public.
    """
    validate_repo_id(repo_id)
    if "/" not in repo_id:  # the card's commands name it in full
        raise ValueError(f"{repo_id!r}: give org/name, or your user name before the /")
    model, record = _load(source, record)
    name = f"{repo_id}@{revision}" if revision else repo_id
    with TemporaryDirectory(prefix="glattn-push-") as folder:
        _write(model, Path(folder), name, label_names, record)
        if dry_run is not None:
            return _keep(Path(folder), user_path(dry_run))
        with plain_errors(repo_id):
            return _send(Path(folder), repo_id, private, revision, token, message)


def _load(source: nn.Module | str | os.PathLike[str], record: Record | None) -> tuple[nn.Module, Record]:
    """Return the model and what is known of it."""
    if isinstance(source, nn.Module):
        model = unwrap_model(source)
        if not getattr(model, "pretrained_cfg", None):
            raise ValueError(f"{type(model).__name__} is not one of timm's models: it has no pretrained_cfg")
        if not hasattr(model, "num_classes"):
            raise ValueError(f"{type(model).__name__} gives features alone; push the whole model")
        if is_folded(model):
            raise ValueError(
                "the model is folded: its weights fit none that can be created; push the one that it was folded from"
            )
        return model, record or Record()
    run = user_path(source)
    return create_model(f"local-dir:{model_folder(run)}", pretrained=True), record or read_record(run)


def _write(model: nn.Module, folder: Path, name: str, label_names: Sequence[str] | None, record: Record) -> None:
    """Write everything that the repository is to hold, and load it back to see that it does."""
    cfg: Mapping[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    count: int = model.num_classes  # type: ignore[assignment]
    if label_names and all_names(label_names, count) is None:
        said = " that are not under 0, 1, 2 and so on" if len(label_names) == count else ""
        raise ValueError(f"{len(label_names)} label_names{said} for a model of {count} classes")
    labels = all_names(label_names or cfg.get("label_names"), count)  # it may have others' that it was started from
    config = save_model(model, folder, label_names=labels)
    write_text(folder / README, model_card(model, name, config, record))
    if record.curve is not None:
        shutil.copyfile(record.curve, folder / CURVE)
    create_model(f"local-dir:{folder}", pretrained=True)


def _keep(folder: Path, target: Path) -> str:
    """Move the files into ``target``, each whole, over an earlier dry run's; an edited card stays."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir()):
        kept = target / path.name
        if path.name == README and kept.is_file() and _is_edited(kept.read_text(encoding="utf-8"), str(target)):
            continue
        copy_file(path, kept)
    return str(target)


def _is_edited(card: str, where: str) -> bool:
    """Tell, and say, whether a card is a person's, and stays."""
    if is_untouched(card):
        return False
    _logger.warning("%s has a README.md that somebody wrote or edited; it is left as it is", where)
    return True


def _send(folder: Path, repo_id: str, private: bool, revision: str | None, token: str | None, message: str) -> str:
    """Commit the folder's files, and return the commit's address."""
    api = HfApi(token=token, library_name="timm", library_version=timm.__version__)
    repo_id = patiently(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True)).repo_id
    if private and not patiently(lambda: api.repo_info(repo_id)).private:
        raise ValueError(f"{repo_id} is there and public; make it private first, or leave --private out")
    if revision is not None:
        patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
    there = _card_there(api, repo_id, revision)
    edited = there is not None and _is_edited(there, repo_id)
    paths = [path for path in sorted(folder.iterdir()) if path.name != README or not edited]

    def commit() -> str:
        # what an earlier try left behind is found by the client, so that trying again adds no second commit
        files = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in paths]
        return api.create_commit(repo_id, files, commit_message=message, revision=revision).commit_url

    try:
        return patiently(commit)
    except ConnectionError as error:
        if "xet-write-token" not in str(error) or "404" not in str(error):
            raise
    with _lfs_only():
        return patiently(commit)


@contextmanager
def _lfs_only() -> Iterator[None]:
    """Let the client upload by LFS: it takes any Hub for one with Xet storage, which mirrors have not."""
    before, constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET, True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def _card_there(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    with TemporaryDirectory(prefix="glattn-card-") as cache:
        try:
            path = patiently(lambda: api.hf_hub_download(repo_id, README, revision=revision, cache_dir=cache))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None
        return Path(path).read_text(encoding="utf-8")
