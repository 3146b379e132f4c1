"""The files of a run: written whole, read with suspicion, and by one process at a time.

    write_json(path, value)                          # whole under a temporary name, then renamed
    state = read_tensors(path)                       # checked, with weights_only=True
    lock = acquire(folder)                           # or an error, if another process is at work
    release(lock)

What is wrong with a file is one line: a ValueError, an OSError where the system refuses.
"""
import io
import json
import os
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from harness import processes

try:
    import fcntl
except ImportError:  # Windows, which has msvcrt in its place
    fcntl = None
    import msvcrt

CHECKPOINT_FORMAT = 3  # of checkpoint.pt; raised when old files can no longer be read
CHECKPOINT_KEYS = {  # what it holds, and of what type
    "position": list, "flags": dict, "widths": list, "parts": dict, "masks_hold": bool,
    "metrics": int, "updates": int, "notes": dict, "meter": torch.Tensor,
    "statistics": torch.Tensor, "seconds": float}


# ---- writing -------------------------------------------------------------------------------------


def write_whole(path, write, mode="w", before=None):
    """Write a file to a temporary name, flush it, and rename it: it is whole or it is not there.

    before: called when all is written and nothing replaced yet. Raises OSError, one line, with the
    old file in place and no temporary one left. Of several ranks one writes.
    """
    if processes.rank() > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, mode) as file:
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
            raise OSError(f"{path} cannot be written ({error.strerror or error}), expected a "
                          f"folder to write to, with room. What it held before is kept; see to "
                          f"that and go on (a run by --resume)") from None
        raise


def write_json(path, value, before=None):
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text), before=before)


def write_lines(path, rows):
    write_whole(path, lambda file: file.writelines(json.dumps(row) + "\n" for row in rows))


def save_tensors(path, value):
    """Write what torch.save writes. It goes through memory: where a disk is full, torch's own
    writer raises what it likes, and some of it only when the process ends."""
    content = io.BytesIO()
    torch.save(value, content)
    write_whole(path, lambda file: file.write(content.getbuffer()), "wb")


def save_arrays(path, arrays):
    """Write what numpy.savez writes; through memory, for the same reason."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_whole(path, lambda file: file.write(content.getbuffer()), "wb")


# ---- reading -------------------------------------------------------------------------------------


def read_tensors(path):
    """Return what a file of torch.save holds, on the CPU: plain types and tensors, no code, which
    would be refused and not run. Raises whatever zipfile, pickle and the system raise."""
    with zipfile.ZipFile(path) as archive:  # torch itself compares no checksums
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the checksum of its part {damaged} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(folder):
    """Return what the checkpoint of a run holds, None if there is none."""
    path = Path(folder, "checkpoint.pt")
    if not path.exists():
        return None
    with fits(path):
        state = read_tensors(path)
        if not isinstance(state, dict) or "format" not in state:
            raise ValueError("it holds no state of a run")
        if state["format"] != CHECKPOINT_FORMAT:
            raise ValueError(f"format {state['format']}, expected {CHECKPOINT_FORMAT}: it was "
                             f"written by another version of this project")
        for key, kind in CHECKPOINT_KEYS.items():
            if not isinstance(state.get(key), kind):
                raise ValueError(f"its entry {key} is missing or no {kind}")
        return state


def saved_widths(args):
    """Return the widths of the network that --resume goes on with, None if it starts anew."""
    state = read_checkpoint(args.run_dir) if args.resume else None
    return state["widths"] if state else None


@contextmanager
def fits(path):
    """Turn whatever a bad checkpoint raises into one ValueError that says what to do."""
    try:
        yield
    except Exception as error:  # torch.load raises what zipfile, pickle and the system raise
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} does not fit this run or is damaged ({detail}). Give the flags "
                         f"that it was made with, or start again with --overwrite") from None


def require_alike(name, saved, own):
    """Raise ValueError unless two dicts of tensors and numbers have equal keys, shapes, types."""
    if not isinstance(saved, dict) or saved.keys() != own.keys():
        raise ValueError(f"its {name} is of another network or script")
    for key, value in own.items():
        form, wanted = ((x.dtype, list(x.shape)) if isinstance(x, torch.Tensor) else type(x)
                        for x in (saved[key], value))
        if form != wanted:
            raise ValueError(f"{key} of its {name} is {form}, expected {wanted}")


# ---- one process at a time -----------------------------------------------------------------------


def acquire(folder):
    """Make a run folder if need be, and return its open lock file. The system frees the lock when
    the process ends, however it ends. Raises ValueError if another process holds it."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / ".lock", "a+")
        except OSError as error:
            raise OSError(f"{folder} cannot be written to ({error.strerror}), expected a folder "
                          f"for the files of the run. Name another --run-dir") from None
        try:
            if fcntl is None:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise ValueError(f"{folder} is in use by another process, expected one at a time. "
                             f"Wait for it, stop it, or name another --run-dir") from None
        except OSError as error:
            print(f"note: {folder} cannot be locked ({error.strerror}); nothing but you keeps a "
                  f"second process out of it")
        if holds(file):
            return file
        file.close()  # its owner has just ended and removed it: there is a new one, or none


def holds(file):
    """Return whether a lock file is still the one of its folder; None: another rank has it."""
    if file is None:
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


def release(file):
    """Free a lock and leave no file. Windows removes none that is open; there it stays, unlocked.
    """
    if file is None:
        return
    if holds(file):
        with suppress(OSError):
            os.unlink(file.name)
    file.close()
