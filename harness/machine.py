"""The machine of a run: versions of the packages, the device, the memory."""
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

VERSIONED = "torch", "torchvision", "numpy"

# torch's CPU allocator raises a RuntimeError with one of these phrases
NO_MEMORY = ("out of memory", "not enough memory", "allocate memory", "bad_alloc",
             "ALLOC_FAILED")


def versions():
    """Return the versions of the packages and of Python, the commit of this repository,
    and whether its files are as in that commit, a flat dict for config.json. What is
    unknown is None."""
    found = {f"version_{name}": None for name in VERSIONED}
    for name in VERSIONED:
        with suppress(PackageNotFoundError):  # only some data sets need torchvision
            found[f"version_{name}"] = version(name)
    # without its lock, other git commands of the user go on meanwhile
    changed = git("--no-optional-locks", "status", "--porcelain",
                  "--untracked-files=no")
    return found | dict(version_python=platform.python_version(),
                        commit=git("rev-parse", "HEAD"),
                        commit_clean=None if changed is None else changed == "")


def git(*words):
    """Return what a git command says of this repository; None without git or without a
    repository."""
    if not shutil.which("git"):
        return None
    root = Path(__file__).parent.parent
    done = subprocess.run(["git", *words], cwd=root, text=True, capture_output=True)
    return done.stdout.strip() if done.returncode == 0 else None


def device_name(device):
    """Return the name of the GPU, or of the processor if the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, where platform says only "x86_64"
    if cpuinfo.exists():
        name = re.search(r"model name\s*: (.*)", cpuinfo.read_text())
        if name:
            return name[1]
    return platform.processor() or platform.machine()


def peak_memory_mib(device):
    """Return the peak memory in MiB, of the GPU or, on a CPU, of this process; None if
    unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # in bytes there, in KiB elsewhere
        return peak / 2**20
    return peak / 2**10


def threads_each(at_a_time):
    """Return {"OMP_NUM_THREADS": a process's part}, of the processors that this one may
    use, where so many processes run side by side."""
    usable = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # fewer, in an allocation of a cluster
        usable = len(os.sched_getaffinity(0))
    return {"OMP_NUM_THREADS": str(max(1, usable // at_a_time))}


def environment_for(at_a_time):
    """Return the environment of processes of which so many run side by side. An
    OMP_NUM_THREADS that is set stays."""
    return threads_each(at_a_time) | os.environ


def set_precision():
    """Let a GPU compute float32 in float32, the reference for other precisions, and
    the same each time.

    Without this, cuDNN convolutions round their inputs to the 10 bits of TF32 on NVIDIA
    cards since 2020, and torch's settings or the environment may let matmul do so.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def is_out_of_memory(error):
    """Return whether an exception says that memory is short.

    A GPU has a class of its own. numpy and Python raise MemoryError, and torch's CPU
    allocator a RuntimeError.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    is_runtime = isinstance(error, RuntimeError)
    return is_runtime and any(phrase in str(error) for phrase in NO_MEMORY)


def is_missing_on_mps(error):
    """Return whether an exception says that Apple's GPU has no such operation, or no
    float64."""
    is_of_kind = isinstance(error, (NotImplementedError, TypeError))
    return is_of_kind and "MPS" in str(error)
