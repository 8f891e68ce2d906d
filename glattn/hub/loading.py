"""`create_model`: timm's, with the family registered, and errors of one line that say what to do."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import timm
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import is_model, load_checkpoint, resolve_pretrained_cfg
from timm.models._factory import parse_model_name
from timm.models._hub import hf_split, load_model_config_from_hf, load_model_config_from_path
from timm.models._registry import split_model_name_tag
from torch import Tensor, nn

from glattn.config import did_you_mean
from glattn.files import one_line
from glattn.models.checkpoint import checkpoint_filter_fn
from glattn.models.glattn import GLAttn
from glattn.models.weights import (
    HTTP_ERROR,
    WEIGHTS,
    ask_hub,
    check_digest,
    check_file,
    check_finite,
    checkpoint_errors,
    missing_weights,
    source_overlay,
    weights_file,
)

T = TypeVar("T")
_logger = logging.getLogger(__name__)

TRANSIENT = (429, 500, 502, 503, 504)


def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create a model as `timm.create_model` does: by name, ``hf-hub:org/name[@revision]`` or ``local-dir:``.

    Importing this registers the family, so that one import is enough. Weights are read from safetensors
    first, and otherwise only from pickles without code; those of a ``checkpoint_path`` too.

    Args:
        model_name: A model's name, with a source or a tag if wanted.
        pretrained: Load the weights.
        kwargs: As `timm.create_model` takes them.

    Raises:
        OSError: The Hub or a file is out of reach; one line says which and why.
        ValueError: The name is unknown, or the checkpoint is damaged, unsafe or of another model; one line.
    """
    checkpoint_path = kwargs.pop("checkpoint_path", None)
    source, model_id = parse_model_name(model_name)
    if source is None and not is_model(split_model_name_tag(model_id)[0]):
        raise ValueError(f"unknown model {model_name!r}{did_you_mean(model_id, timm.list_models())}")
    what = (_fetch(model_name, source, model_id, kwargs) if pretrained else None) or model_name
    with plain_errors(what):
        if source == "local-dir":
            _made(model_name, source, model_id)
        try:
            model = patiently(lambda: timm.create_model(model_name, pretrained, **kwargs))
        except TypeError as error:
            unknown = re.search(r"(?:argument|option) '(\w+)'", str(error))
            made = _made(model_name, source, model_id, kwargs.get("cache_dir"))
            if unknown is None or unknown[1] in kwargs or unknown[1] not in made:  # it is not the file that asks for it
                raise
            raise ValueError(
                f"{model_name}: its config.json asks for {unknown[1]!r}, which the model of this version does not know"
            ) from error
    if checkpoint_path:
        _load_exactly(model, Path(checkpoint_path))
    return model


def _made(model_name: str, source: str | None, model_id: str, cache_dir: str | None = None) -> Mapping[str, Any]:
    """Return the arguments that a model was made with, as its config.json has them.

    Raises:
        ValueError: It is none of timm's.
    """
    if source is None:
        return {}
    local = source == "local-dir"
    try:
        read = load_model_config_from_path(model_id) if local else load_model_config_from_hf(model_id, cache_dir)
        cfg, architecture, made = read
        classes, made = cfg.get("num_classes", 0), made or {}
        if isinstance(architecture, str) and isinstance(classes, int) and isinstance(made, dict):
            return made
    except (AttributeError, TypeError):
        pass
    raise ValueError(f"{model_name}: its config.json is not one of timm's")


def _load_exactly(model: nn.Module, path: Path) -> None:
    """Fill a model from a file of its very own sizes."""
    check_file(path)
    checks = None
    if isinstance(model, GLAttn):
        # no other source, number of classes or of channels is what errors, digest and adaptation are about
        cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        size = (model.in_chans, *cfg["input_size"][1:])
        cfg.update(file=str(path), source=None, num_classes=model.num_classes, input_size=size)
        checks = partial(checkpoint_filter_fn, named=True)
    with plain_errors(str(path)):
        load_checkpoint(model, str(path), filter_fn=checks)


def check_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise a ``ValueError`` if a file's tensors have values that are not finite, or are not those that were saved."""
    check_finite(tensors, str(path))
    check_digest(tensors, path)


def _fetch(model_name: str, source: str | None, model_id: str, kwargs: dict[str, Any]) -> str | None:
    """Check the file that timm will read, and return its name; or bring the Hub's to the cache.

    timm takes a Hub that does not answer for one that has no safetensors, and would go on to a pickle.
    """
    cfg: dict[str, Any] = {"source": source, "file": model_id, "hf_hub_id": model_id}
    variant, tag = split_model_name_tag(model_id)
    with plain_errors(model_name):
        if source is None:
            overlay = source_overlay(kwargs.get("pretrained_cfg_overlay"))
            cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg") or tag, overlay).to_dict()
        path, name = weights_file(cfg, kwargs.get("cache_dir"))
        repo = cfg.get("hf_hub_id")
        if source == "local-dir" or (source is None and cfg.get("file")):
            if path is not None:
                check_file(path)
            return name
        if not repo or cfg.get("hf_hub_filename") or cfg.get("state_dict"):
            return None
        repo_id, revision = hf_split(repo)
    missing = missing_weights(variant, cfg)
    with plain_errors(missing or model_name):
        if missing and path is None:
            patiently(lambda: ask_hub(repo))
        try:
            patiently(lambda: hf_hub_download(repo_id, WEIGHTS, revision=revision, cache_dir=kwargs.get("cache_dir")))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            _logger.info("%s has no %s", repo, WEIGHTS)
    return None


def patiently(call: Callable[[], T], tries: int = 4) -> T:
    """Return what ``call`` does, trying again where the Hub says that it is busy or broken for the moment."""
    for attempt in range(tries - 1):
        try:
            return call()
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
            if response is None or response.status_code not in TRANSIENT:
                raise
            wait = str(response.headers.get("Retry-After", ""))
            seconds = float(wait) if wait.isdigit() else float(2**attempt)
            _logger.warning("the Hub answered %d; trying again in %.0f s", response.status_code, seconds)
            time.sleep(seconds)
    return call()


@contextmanager
def plain_errors(what: str) -> Iterator[None]:
    """Turn what timm and huggingface_hub raise into a ``ValueError`` or ``OSError`` of one line."""
    try:
        with checkpoint_errors(what):
            yield
    except json.JSONDecodeError as error:
        raise ValueError(f"{what}: its config.json is no JSON: {one_line(error)}") from error
    except KeyError as error:
        if is_model(split_model_name_tag(what)[0]):
            raise ValueError(f"{what}: {one_line(error)} is none of what an option of it takes") from error
        raise ValueError(f"{what}: its config.json is not one of timm's: {one_line(error)} is missing") from error
    except (HTTP_ERROR, OSError) as error:
        if isinstance(error, FileNotFoundError) and not isinstance(error, EntryNotFoundError):
            raise FileNotFoundError(one_line(error) if str(error) else f"{what}: no such checkpoint") from error
        raise OSError(f"{what}: {_hub_error(error)}") from error
    except ValueError as error:
        if "\n" in str(error):
            raise ValueError(one_line(error)) from error
        raise
    except RuntimeError as error:
        raise ValueError(f"{what}: {one_line(error)}") from error


def _hub_error(error: Exception) -> str:
    """Return in one line what a Hub or the way to it says, and what to do."""
    endpoint = constants.ENDPOINT
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
    if isinstance(cause, OfflineModeIsEnabled):
        return "not in the cache, and HF_HUB_OFFLINE forbids to fetch it; unset it, or fetch once while online"
    if isinstance(cause, GatedRepoError):
        return f"gated: ask for access at {endpoint}, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(cause, RepositoryNotFoundError):
        login = "; if it is private, log in with `hf auth login` or set HF_TOKEN"
        return f"no such repository at {endpoint}{login}"
    if isinstance(cause, RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        said = cause.response.headers.get("X-Error-Message") or cause.server_message or ""
        if isinstance(cause, EntryNotFoundError):
            return f"the repository has no such file: {cause.response.url}"
        todo = {
            401: "; log in with `hf auth login` or set HF_TOKEN",
            403: "; the token has no right to this",
            429: "; wait, then try again",
        }.get(status, "")
        return f"{endpoint} answered {status}{f' ({said})' if said else ''}{todo}"
    if isinstance(cause, HTTP_ERROR) or isinstance(error, LocalEntryNotFoundError):
        return f"not in the cache, and {endpoint} cannot be reached: {one_line(cause or error)}"
    return one_line(error)
