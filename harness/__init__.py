"""What makes a run reliable and belongs to no algorithm: flags and presets, the run's
folder and its files, the processes that share a run, runs to be made (jobs), finished
runs (records) and their tables (groups, latex), plots, reports.

    import harness  # in a script, before torch

So what goes wrong while a script is imported is one line: a package that is missing,
torch that cannot be loaded, Ctrl-C. Exit code 2; 130 for Ctrl-C. In somebody's program,
which imports harness too, errors stay as they are.
"""
import os
import sys
from pathlib import Path

from harness import output

# The packages of requirements.txt that a script needs, and those that they bring
NEEDED = ("torch", "torchvision", "numpy", "matplotlib", "tqdm", "PIL", "filelock")
# The scripts besides prune_*.py
OTHERS = ("analyze.py", "compare.py", "benchmark.py", "compact.py", "export.py")

# OpenMP reads this when torch is loaded. Threads that wait for each other then sleep.
# By default they spin, and two runs side by side take two to four times as long. A run
# that is alone on its machine loses some 12 % (docs/runs.md)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def is_script():
    """Return whether one of this project's scripts was started."""
    path = Path((sys.argv or [""])[0]).resolve()
    is_ours = path.name.startswith("prune_") or path.name in OTHERS
    return is_ours and path.parent == Path(__file__).resolve().parent.parent


def end_in_a_line(code, line):
    """Exit with a line on stderr. (flags.leave needs torch.)"""
    script = os.path.basename(sys.argv[0])
    print(f"{script}: {line}", file=sys.stderr)
    raise SystemExit(code)


def on_uncaught(kind, error, trace):
    """Print an uncaught exception: a line for Ctrl-C and for a package that is missing,
    the usual traceback for all others."""
    if issubclass(kind, KeyboardInterrupt):
        end_in_a_line(130, "interrupted")
    package = (getattr(error, "name", None) or "").split(".")[0]
    if issubclass(kind, ModuleNotFoundError) and package in NEEDED:
        end_in_a_line(2, missing(package))
    usual_hook(kind, error, trace)


def missing(package):
    """Return the error for a package that this Python does not have."""
    return (f"error: {package} is not installed for {sys.executable}, expected the "
            f"packages of requirements.txt. Activate the environment: . "
            f".venv/bin/activate (README.md, Start, makes it)")


usual_hook = sys.excepthook
if is_script():
    sys.excepthook = on_uncaught
output.open_missing()
try:
    import torch  # noqa: F401
except ModuleNotFoundError as wrong:
    if wrong.name != "torch" or not is_script():  # a package that torch needs
        raise
    end_in_a_line(2, missing("torch"))
except (ImportError, OSError) as wrong:  # a library of torch that cannot be loaded
    if not is_script():
        raise
    end_in_a_line(2, f"error: torch cannot be loaded ({' '.join(str(wrong).split())}), "
                     f"expected a whole installation. Install it again: pip install "
                     f"--force-reinstall torch")
