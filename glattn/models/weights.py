"""Files of weights: where timm takes them from, whether they are whole, and how ours are written.

Nothing here runs code from a file: safetensors, or pickles that torch reads with ``weights_only``.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import load_state_dict, resolve_pretrained_cfg
from timm.models._hub import _EXT_PRIORITY, _PREFERRED_FILES, hf_split
from torch import Tensor, nn

from glattn.files import one_line, replacing

WEIGHTS, CONFIG = "model.safetensors", "config.json"
HUB = "glattn"  # organisation whose repositories are named like the variants
# What the Hub's client raises where no answer came: httpx's or, in older versions, requests' base class.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
DIGEST = "sha256"  # key of the safetensors metadata
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order: averaged weights first


def unwrap(state_dict: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """Return the tensors without containers and wrappers' prefixes (``module.``, ``_orig_mod.``).

    Raises:
        ValueError: Something else than tensors is there, or a key twice.
    """
    for name in CONTAINERS:
        if isinstance(state_dict.get(name), Mapping):
            return unwrap(state_dict[name], source)
    tensors: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if key == "n_averaged":  # torch.optim.swa_utils.AveragedModel's counter
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"{source}: {key} is a {type(value).__name__}, not a tensor; give a state_dict")
        plain = str(key).replace("_orig_mod.", "")
        while plain.startswith("module."):
            plain = plain.removeprefix("module.")
        if plain in tensors:
            raise ValueError(f"{source}: {plain} is there twice, with and without a wrapper's prefix")
        tensors[plain] = value
    if not tensors:
        raise ValueError(f"{source}: holds no tensors")
    return tensors


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise a ``ValueError`` that names the first tensor with a value that is not finite."""
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise ValueError(f"{source}: {key} has {bad} of {value.numel()} values that are NaN or infinite")


def weights_file(cfg: Mapping[str, Any], cache_dir: str | Path | None = None) -> tuple[Path | None, str]:
    """Return the file that timm takes the weights from, if it is on this disk, and its name for errors."""
    file, repo = cfg.get("file"), cfg.get("hf_hub_id")
    if cfg.get("source") == "local-dir" and file:
        folder = Path(file)
        loose = [path.name for ext in _EXT_PRIORITY for path in sorted(folder.glob(f"*{ext}"))]
        names = [name for name in (*_PREFERRED_FILES, *loose) if (folder / name).is_file()]
        return (folder / names[0], str(folder / names[0])) if names else (None, str(folder))
    if cfg.get("state_dict"):
        return None, "state_dict"
    if cfg.get("source") != "hf-hub" and file:
        return Path(file), str(file)
    if repo:
        name, revision = hf_split(repo)
        filename = cfg.get("hf_hub_filename") or WEIGHTS
        cached = try_to_load_from_cache(name, filename, cache_dir, revision)
        return Path(cached) if isinstance(cached, str) else None, f"hf-hub:{repo}/{filename}"
    return None, "checkpoint"


def source_overlay(overlay: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a ``pretrained_cfg_overlay`` whose URL or repository, if any, comes before the variant's own weights."""
    given = dict(overlay or {})
    if given.get("url"):
        return {"file": None, "hf_hub_id": None, **given}
    if given.get("hf_hub_id") or given.get("hf_hub_filename"):
        return {"file": None, **given}
    return given


def missing_weights(variant: str, cfg: Mapping[str, Any]) -> str | None:
    """Return how to begin an error if the Hub does not have a variant's own weights and the package has none."""
    if cfg.get("source") or cfg.get("file") or cfg.get("state_dict") or cfg.get("hf_hub_id") != f"{HUB}/{variant}":
        return None
    todo = "use pretrained=False, or weights of yours: pretrained_cfg_overlay=dict(file=PATH)"
    return f"{variant}: no pretrained weights of it in this package; {todo}; hf-hub:{cfg['hf_hub_id']}"


def ask_hub(repo: str) -> None:
    """Raise the client's error if the Hub has no such repository or does not answer: at once; timm tries a minute."""
    name, revision = hf_split(repo)
    with suppress(EntryNotFoundError):
        get_hf_file_metadata(hf_hub_url(name, WEIGHTS, revision=revision))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the tensors' names, types, shapes and bytes."""
    hashed = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        hashed.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        hashed.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's weights as safetensors, with their digest, whole or not at all.

    Every tensor is copied, so that channels_last and shared memory, which safetensors refuses, do not matter.

    Raises:
        ValueError: A weight is not finite.
    """
    state = unwrap(model.state_dict(), "model")
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in state.items()}
    check_finite(tensors, "model")
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", DIGEST: digest(tensors)})
        _order_metadata(temporary)


def _order_metadata(path: Path) -> None:
    """Sort a safetensors header's metadata: the same weights are the same bytes, then."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length
        file.seek(8)
        file.write(text)


def check_digest(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise a ``ValueError`` if the file names a digest of its tensors and this is not theirs."""
    if path.suffix != ".safetensors" or not path.is_file():
        return
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if DIGEST in metadata and digest(tensors) != metadata[DIGEST]:
        raise ValueError(f"{path}: damaged: its tensors are not those that were saved; copy or download it anew")


def check_file(path: Path) -> None:
    """Raise an error of one line that names the file, unless it is there and whole.

    That is: safetensors with a right header, a zip archive with right checksums, or an older pickle, which
    carries no checksum.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    with checkpoint_errors(str(path)):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return
        with open(path, "rb") as file:
            archived = zipfile.is_zipfile(path) or file.read(2) == b"PK"
        try:
            if not archived:
                load_state_dict(str(path))
                return
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except (RuntimeError, OSError):
            raise
        except Exception as error:  # readers raise of any kind where a file is damaged
            raise pickle.UnpicklingError(f"{type(error).__name__} {error}") from error
        if broken is not None:
            raise zipfile.BadZipFile(f"the checksum of its {broken} is wrong")


@contextmanager
def checkpoint_errors(source: str) -> Iterator[None]:
    """Turn what readers of checkpoints raise into a ``ValueError`` of one line that names the file."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{source}: damaged, or no safetensors file: {one_line(error)}") from error
    except (pickle.UnpicklingError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
        raise ValueError(f"{source}: damaged, or no checkpoint: {one_line(error)}") from error
    except RuntimeError as error:
        message = one_line(error)
        if "weights_only" in message:
            found = re.search(r"Unsupported globals: (.*?)\. No automatic", message)
            what = f"code ({found[1]})" if found else "something else than tensors, or is damaged"
            raise ValueError(
                f"{source}: refused: its pickle holds {what}, which is never run; save it as safetensors"
            ) from error
        if re.search(r"PytorchStreamReader|storage|archive|file", message, re.IGNORECASE):
            raise ValueError(f"{source}: damaged, or no checkpoint: {message}") from error
        raise


@contextmanager
def reading_checkpoint(
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: str | Path | None = None,
) -> Iterator[None]:
    """Around a model's making: its weights' file is checked before, and errors of reading it name it.

    Args:
        variant: The model's name.
        pretrained: Weights are wanted; nothing is done without.
        pretrained_cfg: timm's.
        pretrained_cfg_overlay: timm's.
        cache_dir: Where the Hub's files are kept, if not in the Hub's own cache.
    """
    if not pretrained:
        yield
        return
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay).to_dict()
    path, source = weights_file(cfg, cache_dir)
    if path is not None:
        check_file(path)
    elif missing := missing_weights(variant, cfg):
        try:
            ask_hub(cfg["hf_hub_id"])
        except (HTTP_ERROR, OSError) as error:
            raise OSError(f"{missing}: {one_line(error)}") from error
    with checkpoint_errors(source):
        yield
