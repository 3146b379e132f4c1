"""What data sets are read from: errors of one line, notes, room, and caches that know
their sources.

    for path in sources.caches(data_dir, "tiny-imagenet.npz"):  # where it lies
        ... == sources.signature(data_dir, files)               # is it of these files?
    sources.write(data_dir, "tiny-imagenet.npz", make)          # whole, or not there
    sources.require_room(folder, count, 3 * 64 * 64, "images")  # before decoding
"""
import errno
import hashlib
import importlib
import os
import secrets
import shutil
import struct
import zipfile
import zlib
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

# what numpy, Pillow and torchvision raise on missing, short or damaged files
BAD_FILE = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError,
            AssertionError, SyntaxError, RuntimeError, MemoryError, struct.error,
            zlib.error, HTTPException, zipfile.BadZipFile)

READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
CACHE = "snn-pruning"  # the folder of this project's caches in the user's cache folder


# ---- what the data are ---------------------------------------------------------------


def digest(array):
    """Return the shape and a hash of the values of a contiguous array, in a text such
    as "60000x28x28x1 0f3a...". 180 MB take a third of a second."""
    shape = "x".join(map(str, array.shape))
    return f"{shape} {hashlib.sha256(memoryview(array).cast('B')).hexdigest()[:32]}"


def signature(root, files):
    """Return a hash of the paths below root, the sizes and the times of change of
    files, text of 32 digits: that of other or changed files is another."""
    # of a folder the paths are the same, however its name is written
    found, length = hashlib.sha256(), len(os.path.abspath(root))
    for file in sorted(map(os.path.abspath, files)):
        state = os.stat(file)
        row = f"{file[length:]}\n{state.st_size} {state.st_mtime_ns}\n"
        found.update(os.fsencode(row))
    return found.hexdigest()[:32]


# ---- caches --------------------------------------------------------------------------


def cache_places(data_dir, name):
    """Return the paths where a cache of data_dir may lie: beside its sources, and, for
    sources that are read-only, in the user's own cache folder, if there is a user."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(home):
        return [Path(data_dir, name)]
    real = os.path.realpath(data_dir)
    key = hashlib.sha256(os.fsencode(real)).hexdigest()[:12]
    stem, dot, suffix = name.partition(".")
    return [Path(data_dir, name), Path(home, CACHE, f"{stem}-{key}{dot}{suffix}")]


def caches(data_dir, name):
    """Return the paths at which a cache is there, at most two."""
    return [path for path in cache_places(data_dir, name) if path.exists()]


def write(data_dir, name, make):
    """Write a cache, a file or a folder, and return its path; it is whole or not there,
    even if several processes write it at once.

    make(path): writes it under a temporary name. A data_dir that is read-only is said
    in a line, and the second place taken. Raises OSError if nothing can be written.
    """
    refused, places = None, cache_places(data_dir, name)
    for path in places:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            if refused is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            make(temporary)
            _put(temporary, path)
        except OSError as wrong:
            if path != places[-1] and wrong.errno in READ_ONLY:
                refused = wrong
                continue
            if refused is not None:  # what is wrong with the second place too
                wrong.strerror = f"{reason(refused)}; {path}: {reason(wrong)}"
            raise
        finally:
            _remove(temporary)
        if refused is not None:
            print(f"note: {data_dir} cannot be written to ({reason(refused)}): {name} "
                  f"is kept as {path}")
        return path


def _put(temporary, path):
    """Put a file or folder in its place; an older folder there is replaced."""
    if not (temporary.is_dir() and path.is_dir()):
        os.replace(temporary, path)
        return
    old = temporary.with_name(f"{temporary.name}.old.tmp")
    try:
        with suppress(FileNotFoundError):  # another process has just taken it away
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.exists():  # else another process was faster
                raise
    finally:
        _remove(old)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # there may be none, in a folder that is read-only
            path.unlink()


# ---- room ----------------------------------------------------------------------------


def available_memory():
    """Return how many bytes of memory are free for this process; None if unknown."""
    found = []
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    group = Path("/sys/fs/cgroup")  # of a container, which may have less
    with suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text())
        cached = 0
        for line in (group / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):  # given back when memory is short
                cached = int(line.split()[1])
        found.append(limit - int((group / "memory.current").read_text()) + cached)
    return min(found, default=None)


def require_room(source, count, each, what, fix="Use fewer by --train-limit, or make "
                 "them smaller"):
    """Raise ValueError if `count` images of `each` bytes do not fit into memory.

    what: the images, in words. fix: what the user can do about it."""
    has, wants = available_memory(), count * each
    if has is not None and wants > has:
        raise error(ValueError, f"{source}: {what} take {in_words(wants)} of memory, "
                    f"but {in_words(has)} are free",
                    "that they fit: all images stay in memory, as uint8", fix)


def in_words(size):
    """Return a number of bytes in words, "2.5 GB"."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:,} bytes"


# ---- errors --------------------------------------------------------------------------


def import_module(module, expected, fix):
    """Return a module that only some data sets need. Raises ValueError: `expected` says
    which package has it, `fix` how to install that."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as wrong:
        raise error(ValueError, f"{module} cannot be imported ({reason(wrong)})",
                    expected, fix) from wrong


def reason(wrong):
    """Return the first sentence of the last line of an error's text."""
    text = (getattr(wrong, "strerror", None) or str(wrong)).strip()
    text = text or type(wrong).__name__
    return text.splitlines()[-1].split(". ")[0].rstrip(".")


def unreadable(path, wrong, expected, fix):
    """Make the exception for a file that raised the exception `wrong`."""
    kind = FileNotFoundError if isinstance(wrong, FileNotFoundError) else ValueError
    return error(kind, f"{path} cannot be read ({reason(wrong)})", expected, fix)


def error(kind, wrong, expected, fix):
    """Make an exception whose message is one line, even if a path is not."""
    return kind(" ".join(f"{wrong}, expected {expected}. {fix}".splitlines()))
