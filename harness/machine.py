"""The machine that a run is on: versions of what it depends on, its device, its memory."""
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

NO_MEMORY = ("out of memory", "not enough memory", "allocate memory", "bad_alloc", "ALLOC_FAILED")


def versions():
    """Return the versions of what a run depends on, flat, for config.json."""
    names = ("torch", "torchvision", "numpy")
    found = dict.fromkeys((f"version_{name}" for name in names))
    for name in names:
        with suppress(PackageNotFoundError):  # torchvision is needed by some data sets only
            found[f"version_{name}"] = version(name)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent.parent, text=True,
                            capture_output=True) if shutil.which("git") else None
    return found | dict(version_python=platform.python_version(),
                        commit=commit.stdout.strip() or None if commit else None)


def peak_memory_mib(device):
    """Return the peak memory of the device (GPU) or of this process (CPU) in MiB,
    None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            / (2**20 if sys.platform == "darwin" else 2**10))


def device_name(device):
    """Return the name of the GPU, or of the processor as far as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")  # Linux, where platform knows no more than "x86_64"
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def is_out_of_memory(error):
    """Tell whether an error is of memory: a GPU has a class of its own, torch's CPU allocator a
    RuntimeError of some wording, numpy and Python a MemoryError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY))
