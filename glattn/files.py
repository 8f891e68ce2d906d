"""Files and folders that are whole or absent: written aside, moved into place; and packed text, alike everywhere."""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name in the folder of `path`; what is written there takes its place, whole and on disk.

    Of a link, what it points to is replaced.

    Raises:
        OSError: There is no writing in that folder, or `path` is a folder, a device or a pipe.
    """
    given, path = path, Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "no plain file", str(given))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(given)) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        os.chmod(temporary, mode())
        os.replace(temporary, path)
        with suppress(OSError):  # not every file system lets a folder be synchronised
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def user_path(text: str | os.PathLike[str]) -> Path:
    """Return a path as a user gives it: ``~`` is the home folder, but where it only begins a name."""
    path = Path(text)
    try:
        return path.expanduser()
    except RuntimeError:  # nobody's home
        return path


def plain(text: str) -> str:
    """Return text with ``\\udce9``, spelt out, for a byte of a file's name that is no UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def one_line(error: BaseException) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def write_text(path: Path, text: str) -> None:
    """Write a text file, `plain`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(plain(text), encoding="utf-8")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content, whole or not at all."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which is then moved to `folder`.

    Raises:
        FileExistsError: There is one by then; it is left as it is.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        yield made
        try:
            if not folder.exists():
                os.rename(made, folder)
                return
        except OSError:
            if not folder.is_dir():
                raise
        raise FileExistsError(f"{folder} exists already; remove it, or give another")


def mode() -> int:
    """Return the permissions of a file that is made in the usual way; temporary files are for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def sync(path: Path) -> None:
    """Have a file, or a folder's list of files, reach the disk; Windows does so with files that are open to write."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def gzipped(text: str) -> bytes:
    """Return text as a .gz file's content: without a date, and the same on every version of Python."""
    packed = bytearray(gzip.compress(text.encode(), 9, mtime=0))
    packed[9] = 3  # the header's operating system: Unix, whichever this is
    return bytes(packed)
