"""Runs to be made: their commands, which of them are left, and the processes.

    planned = jobs.plan(args, weights, channels)  # of all methods, targets and seeds
    jobs.require_same_flags(planned)              # as those that are there have
    jobs.print_commands(planned)                  # of those that are left
    jobs.run_all(planned, at_a_time=4)
"""
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from tqdm import tqdm

import data
from harness import planning
from harness import presets
from harness.files import saved_config
from harness.machine import environment_for

# Flags that the runs get as they are
PASSED_ON = ("dataset", "data_dir", "width", "train_limit", "precision", "device")
# Flags that the time of all runs depends on, beside the methods: the epochs that
# --minutes has chosen hold for these
TIMED = ("minutes", "dataset", "model", "width", "time_steps", "batch_size",
         "train_limit", "precision", "device", "sparsity", "target_macs", "seeds",
         "jobs")


class Job(NamedTuple):
    """A run to be made: its folder, the words of its command, the name of its method,
    "channels-gmp" say."""

    folder: Path
    words: list
    method: str


# ---- the commands -------------------------------------------------------------------


def epochs_of_weights(args):
    """Return {flag: epochs}, the budget of all methods that prune weights: epochs that
    change the mask, and epochs with it fixed.

    Without flags it is that of prune_unstructured.py: other scripts' defaults are their
    own papers'.
    """
    usual = presets.of(args.dataset, "unstructured")
    return {flag: usual[flag] if getattr(args, flag) is None else getattr(args, flag)
            for flag in ("epochs_prune", "epochs_finetune")}


def epochs_of_channels(args, script):
    """Return {flag: epochs} of all stages of a script that prunes channels.

    --epochs-prune is the length of its first stage, mostly a pretraining, and of its
    fine-tuning. A stage between the two keeps its proportion to the first. Without the
    flag all are the script's own.
    """
    own = planning.epochs_in(presets.of(args.dataset, script.removeprefix("prune_")))
    if args.epochs_prune is None:
        return own
    first = "epochs_pretrain" if "epochs_pretrain" in own else "epochs_prune"
    factor = args.epochs_prune / own[first]
    chosen = {flag: max(1, round(factor * count)) for flag, count in own.items()}
    return chosen | {first: args.epochs_prune, "epochs_finetune": args.epochs_prune}


def as_words(values):
    """Return {flag: value} as words of a command line, without those that are None."""
    words = []
    for flag, value in values.items():
        if value is not None:
            words += [f"--{flag.replace('_', '-')}", str(value)]
    return words


def frames_of(args, images):
    """Return how many frames a recording of an own set of events has; None for images
    and for named sets, whose presets say it. Raises ValueError if --time-steps is
    another number."""
    if images.x_train.dim() != 5 or args.dataset in data.NAMES:
        return None
    frames = images.x_train.shape[1]
    if args.time_steps not in (None, frames):
        raise ValueError(f"--time-steps is {args.time_steps}, but {args.dataset} has "
                         f"{frames} frames a recording, expected as many. Leave it out")
    return frames


def plan(args, weights, channels, frames=None):
    """Return the Jobs of all runs.

    weights, channels: {name of a method: script and flags, beside those that all
    methods share}, in which {density} is 1 - sparsity. frames: see frames_of.
    """
    usual = presets.of(args.dataset)
    shared = {flag: getattr(args, flag) for flag in PASSED_ON}
    for flag in ("batch_size", "model", "time_steps"):
        shared[flag] = getattr(args, flag) or usual[flag]
    # Some scripts have their own paper's network on some data sets, with its input
    for flag in ("encoding", "loss", "crop", "rotate"):
        shared[flag] = usual[flag]
    if frames is not None:
        shared |= dict(encoding="events", time_steps=frames)

    commands = {}  # name of the run: (method, words)
    for seed in range(args.seeds):
        for method, command in weights.items():
            for sparsity in args.sparsity if method != "dense" else [None]:
                name = method if sparsity is None else f"{method}-{sparsity!r}"
                words = command.format(density=round(1 - (sparsity or 0), 12)).split()
                commands[f"{name}-seed{seed}"] = method, words + as_words(
                    dict(sparsity=sparsity) | epochs_of_weights(args) | dict(seed=seed))
        for method, command in channels.items():
            target = None
            name = method = f"channels-{method}"
            if method != "channels-dense":
                target = args.target_macs
                name = f"{method}-macs{target!r}"
            epochs = epochs_of_channels(args, command.split()[0])
            commands[f"{name}-seed{seed}"] = method, command.split() + as_words(
                dict(target_macs=target) | epochs | dict(seed=seed))

    jobs = []
    for name, (method, (script, *own)) in commands.items():
        path = planning.ROOT / f"{script}.py"
        words = [sys.executable, str(path), *own, *as_words(shared), "--run-dir",
                 str(args.out / name), "--resume"]
        jobs.append(Job(args.out / name, words, method))
    return jobs


def with_flags(args, values):
    """Return a copy of the flags with other values, {flag: value}, of some."""
    return SimpleNamespace(**vars(args) | values)


def log_of(folder):
    return folder.with_name(f"{folder.name}.log")


def is_finished(folder):
    return (folder / "summary.json").exists()


def flags_of(run):
    """Return the data set, network and sizes of a run as flags, " --width 0.5" say."""
    usual = presets.of(run.config["dataset"])
    shown = ("dataset", "model", "width", "train_limit", "time_steps")
    return "".join(f" --{flag.replace('_', '-')} {run.config[flag]}" for flag in shown
                   if flag in run.config and run.config[flag] != usual[flag])


# ---- what is there already ----------------------------------------------------------


def require_same_flags(jobs):
    """Raise ValueError if a run that is there, finished or not, was made with another
    value of a flag than its command has now, or would have by default.

    Its data may have moved, and its device may be another one.
    """
    for job in jobs:
        config = saved_config(job.folder)
        for flag, wanted in flags_in(job.words).items():
            made = config.get(flag, wanted)  # older runs do not say all
            if not is_value(flag, made, wanted):
                name = f"--{flag.replace('_', '-')}"
                raise ValueError(
                    f"{job.folder} was made with {name} {made}, this command has "
                    f"{wanted}, expected the same. Give the flags that it was made "
                    f"with, or name another --out")


def flags_in(words):
    """Return {flag: its word, or its default} of what decides a run: the flags that a
    command has, and those of PASSED_ON that it leaves out."""
    given = {}
    for flag, value in zip(words, [*words[1:], "--"]):
        if flag.startswith("--"):  # one without a word is a switch
            name = flag[2:].replace("-", "_")
            given[name] = True if value.startswith("--") else value
    usual = presets.of(given["dataset"])
    found = {flag: usual[flag] for flag in PASSED_ON} | given
    return {flag: value for flag, value in found.items()
            if flag not in ("data_dir", "device", "run_dir", "resume")}


def is_value(flag, made, wanted):
    """Return whether a value of a config.json is the one of a command, a word or a
    default. Of a data set the name counts: it may have moved."""
    if flag == "dataset":
        return Path(made).name == Path(wanted).name
    try:
        return float(made) == float(wanted)
    except (TypeError, ValueError):
        return str(made) == str(wanted)


# ---- making the runs ----------------------------------------------------------------


def print_commands(jobs):
    """Print the commands of the runs that are not finished, one a line; on stderr, how
    many they are."""
    left = [job.words for job in jobs if not is_finished(job.folder)]
    for _, script, *rest in left:
        script = Path(script)
        if script.is_relative_to(Path.cwd()):
            script = script.relative_to(Path.cwd())
        print(shlex.join(["python", str(script), *rest]))
    print(f"compare.py: {len(left)} of {len(jobs)} runs are to be run",
          file=sys.stderr)


def run_all(jobs, at_a_time):
    """Run all commands that are not finished, some at a time. One that fails is named,
    and the others go on."""
    environment = environment_for(at_a_time)
    bar = tqdm(total=len(jobs), desc="compare", unit="run", dynamic_ncols=True)

    def start(job):
        folder, words, _ = job
        if not is_finished(folder):
            shown = shlex.join(["python", Path(words[1]).name, *words[2:]])
            with open(log_of(folder), "w", encoding="utf-8",
                      errors="backslashreplace") as log:
                print(shown, file=log, flush=True)
                code = subprocess.run(words, stdout=log, stderr=subprocess.STDOUT,
                                      env=environment).returncode
            if code:
                bar.write(f"failed with exit code {code}: {folder}, see "
                          f"{log_of(folder)}")
        bar.update()

    with ThreadPoolExecutor(at_a_time) as pool, bar:
        try:
            list(pool.map(start, jobs))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            bar.write("stopped, and saved: the same command goes on")
            raise


def make(commands, folder, again):
    """Make runs below a folder, one after the other, go on with those that were
    stopped, and return their folders.

    commands: {name of the run: script and flags}. again: the command that goes on, for
    the message. Raises RuntimeError if a run fails.
    """
    for name in tqdm(commands, folder.name, unit="run", dynamic_ncols=True):
        place = folder / name
        if is_finished(place):
            continue
        script, *given = commands[name].split()
        path = planning.ROOT / f"{script}.py"
        done = subprocess.run(
            [sys.executable, path, *given, "--run-dir", place, "--resume"],
            capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{place} failed: {done.stderr.strip()[-500:]}. Go on "
                               f"with: {again}")
    return [folder / name for name in commands]
