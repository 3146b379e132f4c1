"""The files of a run: written whole, checked when read, by one process at a time.

    write_json(path, value)            # under a temporary name, then renamed
    state = read_checkpoint(folder)    # checked key by key
    lock = acquire(folder)             # an error if another process has the folder
    release(lock)

A wrong file is a ValueError of one line. Where the system refuses a file it is an
OSError of one line.
"""
import io
import json
import os
import secrets
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout

from harness import processes
from harness.output import in_a_line
from modelfile import read_tensors

CHECKPOINT_FORMAT = 3  # raised when older files can no longer be read

CHECKPOINT_KEYS = {  # {entry of checkpoint.pt: its type}
    "position": list, "flags": dict, "widths": list, "parts": dict, "masks_hold": bool,
    "metrics": int, "updates": int, "notes": dict, "meter": torch.Tensor,
    "statistics": torch.Tensor, "seconds": float}

DATA_WORDS = {  # {what a run remembers of its data: in words}
    "num_classes": "the number of classes", "class_names": "the names of the classes",
    "x_train": "training images", "y_train": "training labels",
    "x_test": "test images", "y_test": "test labels"}


# ---- writing -------------------------------------------------------------------------


def write_json(path, value, before=None):
    """Write a JSON file. before: see write_whole."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text), before=before)


def write_lines(path, rows):
    """Write a JSON file with a line for each row."""
    lines = [json.dumps(row) + "\n" for row in rows]
    write_whole(path, lambda file: file.writelines(lines))


def save_tensors(path, value):
    """Write what torch.save writes.

    It is made in memory first: on a full disk torch's own writer raises errors of
    several classes, some of them only when the process ends.
    """
    content = io.BytesIO()
    torch.save(value, content)
    write_whole(path, lambda file: file.write(content.getbuffer()), "wb")


def save_arrays(path, arrays):
    """Write what numpy.savez writes. It is made in memory first, as in save_tensors."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(path, lambda file: file.write(content.getbuffer()), "wb")


def write_whole(path, write, mode="w", before=None):
    """Write a file under a temporary name, flush it, and rename it.

    So the file is whole at any moment, even if the process is killed. A killed one may
    leave NAME.*.tmp; that of a run's file goes when the run goes on.

    write(file): writes the content. before(): called when all is written and nothing is
    replaced yet. Only rank 0 writes. Raises OSError of one line; then the old file is
    kept and the temporary one removed.
    """
    if processes.rank() > 0:
        return
    # its own: of two processes that write a file, each writes it whole
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    encoding = {}
    if "b" not in mode:  # a name that is no text, of a file, is written as its bytes
        encoding = dict(encoding="utf-8", errors="backslashreplace")
    try:
        with open(temporary, mode, **encoding) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            before()
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(f"{path} cannot be written ({error.strerror or error}), "
                          f"expected a folder to write to, with room. What it held "
                          f"before is kept. Make room or allow writing, then go on (a "
                          f"run by --resume)") from None
        raise


def why_not_drawn(path, draw):
    """Call draw(), which draws a picture into a path. Return None, or in a line why
    matplotlib cannot; an older picture of this path is then removed. Raises OSError if
    the file cannot be written."""
    try:
        draw()
    except OSError:
        raise
    except Exception as error:  # of matplotlib, its fonts, its settings
        path.unlink(missing_ok=True)
        return in_a_line(error)
    return None


def remove_unfinished(path):
    """Remove what write_whole has left of a file where it was killed."""
    for temporary in path.parent.glob(f"{path.name}*.tmp"):
        with suppress(OSError):
            temporary.unlink()


# ---- reading -------------------------------------------------------------------------


def read_checkpoint(folder):
    """Return the checkpoint of a run, a dict with CHECKPOINT_KEYS; None without one.

    Raises ValueError if it is damaged or of another version.
    """
    path = Path(folder, "checkpoint.pt")
    if not path.exists():
        return None
    with fits(path):
        state = read_tensors(path)
        if not isinstance(state, dict) or "format" not in state:
            raise ValueError("it holds no state of a run")
        if state["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"format {state['format']}, expected {CHECKPOINT_FORMAT}: "
                             f"it was written by another version of this project")
        for key, kind in CHECKPOINT_KEYS.items():
            if not isinstance(state.get(key), kind):
                raise ValueError(f"its entry {key} is missing or no {kind}")
        return state


def saved_widths(args):
    """Return the widths of the network in the checkpoint that --resume starts from, a
    list; None without --resume or without a checkpoint."""
    state = read_checkpoint(args.run_dir) if args.resume else None
    return None if state is None else state["widths"]


def data_of(images):
    """Return what a run remembers of its data.Dataset: shapes and hashes of the images
    and labels it trains and tests on, the classes, a dict of plain values."""
    classes = dict(num_classes=images.num_classes, class_names=images.class_names)
    return (images.hashes or {}) | classes


def saved_config(folder):
    """Return the config.json of a run, a dict; an empty one if it cannot be read. Its
    "data" is what data_of() returned; older runs lack it."""
    with suppress(OSError, ValueError):
        config = json.loads(Path(folder, "config.json").read_text())
        return config if isinstance(config, dict) else {}
    return {}


def require_same_data(folder, saved, now, name):
    """Raise ValueError if a run was made with other data than are there now.

    saved, now: what data_of() returns, of the run and of today; saved None: unknown, as
    in older runs, and nothing is required. name: of today's data set.
    """
    changes = data_changes(saved, now)
    if changes:
        raise ValueError(f"{folder} was made with other data than {name} holds now "
                         f"(changed: {'; '.join(changes)}), expected the same. Name "
                         f"them by --dataset or --data-dir, or start again with "
                         f"--overwrite or in another --run-dir")


def data_changes(saved, now):
    """Return what differs between two results of data_of(), a list of words; saved may
    be None, then nothing does."""
    if not isinstance(saved, dict):
        return []
    changes = []
    for key, words in DATA_WORDS.items():
        one, other = saved.get(key), now.get(key)
        if one == other or None in (one, other):
            continue
        if key == "num_classes":
            words += f", {one} then, {other} now"
        elif key != "class_names":
            shape, new = (str(value).partition(" ")[0] for value in (one, other))
            if shape != new:
                words += f", {shape} then, {new} now"
        changes.append(words)
    return changes


@contextmanager
def fits(path):
    """Turn any error that a bad checkpoint raises into one ValueError of one line."""
    try:
        yield
    except Exception as error:  # torch.load raises errors of zipfile, pickle and others
        raise ValueError(f"{path} does not fit this run or is damaged "
                         f"({in_a_line(error)}). Give the flags that it was made with, "
                         f"or start again with --overwrite") from None


def require_alike(name, saved, own):
    """Raise ValueError unless two dicts of tensors and numbers have the same keys,
    shapes and types. name: of the part, for the message."""
    if not isinstance(saved, dict) or saved.keys() != own.keys():
        raise ValueError(f"its {name} is of another network or script")
    for key, value in own.items():
        found, wanted = _form(saved[key]), _form(value)
        if found != wanted:
            raise ValueError(f"{key} of its {name} is {found}, expected {wanted}")


def _form(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, list(value.shape)
    return type(value)


class Disagrees(Exception):
    """What was made of a network does not do what the network does."""


# ---- one process at a time -----------------------------------------------------------


class Lock(NamedTuple):
    """The lock of a run folder. The system frees it when the process ends."""

    path: Path
    file: os.stat_result  # of the lock's file, to recognise that file again
    lock: FileLock


def acquire(folder):
    """Make a run folder if there is none, lock it, and return its Lock.

    Where the file system has no locks, it prints a note and goes on without one. Raises
    ValueError if another process holds the lock, and OSError if the folder cannot be
    written to.
    """
    path = folder / ".lock"
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise OSError(f"{folder} cannot be written to ({error.strerror}), expected "
                          f"a folder for the files of the run. Name another --run-dir"
                          ) from None
        # a soft lock is a file alone: it would stay after a run that was killed
        lock = FileLock(path, timeout=0, fallback_to_soft=False)
        try:
            lock.acquire()
        except Timeout:
            if path.exists():
                raise ValueError(f"{folder} is in use by another process, expected one "
                                 f"at a time. Wait for it, stop it, or name another "
                                 f"--run-dir") from None
            continue  # the other process has just ended and removed the file
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            print(f"note: {folder} cannot be locked ({reason}). Start no second run in "
                  f"it: nothing prevents that")
        try:
            return Lock(path, os.stat(path), lock)
        except FileNotFoundError:  # removed after it was opened here: try again
            lock.release()


def holds(lock):
    """Return whether a Lock is still that of its folder, which a user may have deleted
    or replaced. True for None, which all ranks but the first have."""
    if lock is None:
        return True
    try:
        return os.path.samestat(lock.file, os.stat(lock.path))
    except FileNotFoundError:
        return False


def release(lock):
    """Free a Lock, and remove its file if that is still the folder's own."""
    if lock is None:
        return
    if holds(lock):
        with suppress(OSError):  # Windows removes no open file: there FileLock does it
            os.unlink(lock.path)
    lock.lock.release()
