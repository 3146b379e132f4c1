"""How many epochs fit into some minutes: --minutes M of the scripts and of compare.py.

    planning.choose(words, args, minutes, is_fit, since)  # {"epochs_prune": 3, ...}
    planning.choose_for_all(plan, usual, asked, kept)  # the same for all runs
    length = planning.try_out(words)    # a few steps, in a process of its own
    length.seconds(12)                  # how long a run of 12 epochs takes

A trial is the script itself, with its flags, in a folder that is thrown away. It ends
when it has measured some steps and an evaluation. So the run that follows is the run
that has these epochs by flags, bit by bit.
"""
import heapq
import itertools
import json
import math
import os
import runpy
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from harness.files import write_json
from harness.machine import environment_for

ROOT = Path(__file__).parent.parent

# The share of the minutes that is planned: methods have work, such as updates of the
# masks, that a trial does not see
PLANNED = 0.9

RESULTS = 3.0  # seconds that the results of a run take, beside evaluations

# Flags of a command that a trial leaves out, and whether a value follows each
LEFT_OUT = {"--minutes": True, "--run-dir": True, "--resume": False,
            "--overwrite": False, "--tensorboard": False}


class Length(NamedTuple):
    """What a trial has measured, in seconds, and the epochs of the run that it tried.
    """

    load: float        # from the start of the process to its first step
    step: float
    evaluation: float
    steps: int         # of an epoch
    epochs: int        # of all stages, as the flags of the trial ask for
    interval: int = 0  # steps between two updates; 0: the script has no such flag
    evaluate_every: int = 1  # epochs
    stages: int = 1    # each ends with an evaluation

    def seconds(self, epochs):
        """Return how long a run of so many epochs takes."""
        once = self.load + RESULTS + 4 * self.evaluation
        evaluations = min(epochs, epochs / self.evaluate_every + self.stages)
        return once + epochs * self.steps * self.step + evaluations * self.evaluation


# ---- the epochs of a run -------------------------------------------------------------


def choose(words, args, minutes, is_fit, since):
    """Return {flag: value}, the epochs of all stages and --interval, such that a run
    ends within so many minutes.

    The epochs are in the proportion that they have in args, and a stage that has one
    there keeps at least one. The interval is in the same proportion to the pruning
    stage, so that the number of updates stays as it is.
    words: the command, from the script on. args: the flags that it has without
    --minutes. is_fit(chosen): whether the script takes them. since: the time.monotonic
    of the start. Raises ValueError if the time does not suffice.
    """
    usual = epochs_in(vars(args))
    length = try_out([sys.executable, *words])
    budget = PLANNED * (60 * minutes - (time.monotonic() - since))
    # a flag may be an upper bound, or count for several trainings
    factor = length.epochs / sum(usual.values())

    def seconds(chosen):
        return length.seconds(factor * sum(epochs_in(chosen).values()))

    def at(total):
        return with_interval(in_proportion(usual, total), vars(args))

    least = sum(count > 0 for count in usual.values())
    most = largest(lambda total: seconds(at(total)) <= budget, least)
    bound = most + 2 * sum(usual.values())
    fit = next((total for total in range(most, bound) if is_fit(at(total))), most)
    if seconds(at(fit)) <= budget:
        return at(fit)
    most = fit
    needed = (seconds(at(most)) / PLANNED + time.monotonic() - since) / 60
    shown = ", ".join(f"{flag.replace('epochs_', '')} {count}"
                      for flag, count in epochs_in(at(most)).items())
    raise ValueError(f"--minutes is {minutes:g}, expected at least "
                     f"{math.ceil(10 * needed) / 10:g} on this machine, for the fewest "
                     f"epochs ({shown}). Raise it, or lower --train-limit or --width")


def epochs_in(values):
    """Return the flags of values, a dict, that are lengths of stages: {flag: epochs}.
    """
    return {flag: value for flag, value in values.items() if flag.startswith("epochs_")}


def in_proportion(usual, total):
    """Share `total` epochs out among stages in the proportion of `usual`, {flag:
    epochs}, at least one to each that has one there. Return {flag: epochs}.

    Fractions go to the largest remainders, the first stage first.
    """
    whole = sum(usual.values())
    chosen = {flag: max(min(1, count), total * count // whole)
              for flag, count in usual.items()}
    while sum(chosen.values()) > total:  # by the stages that have one at least
        chosen[max(chosen, key=chosen.get)] -= 1
    while sum(chosen.values()) < total:
        # the stage that is farthest behind its share
        behind = {flag: total * count / whole - chosen[flag]
                  for flag, count in usual.items()}
        chosen[max(behind, key=behind.get)] += 1
    return chosen


def largest(fits, least):
    """Return the largest whole number from `least` on that fits; `least` where none
    does. fits(number): true up to a number, and false from there on."""
    low, high = least, least + 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def with_interval(chosen, usual):
    """Return the chosen epochs with an interval in proportion to those of the stage
    `prune`, where the script has one."""
    if usual.get("interval") is None or "epochs_prune" not in chosen:
        return chosen
    share = chosen["epochs_prune"] / usual["epochs_prune"]
    return chosen | dict(interval=max(1, round(share * usual["interval"])))


# ---- the epochs of several methods ---------------------------------------------------


LEAST_PRUNE = 4  # structure epochs, which some methods need


def choose_for_all(plan, usual, asked, kept, at_a_time=1):
    """Return {"epochs_prune": n, "epochs_finetune": m}, the same for all runs, such
    that all of them together end within asked["minutes"].

    plan(epochs): returns the jobs.Job of all runs with these epochs. Each command names
    the epochs of all its stages. usual: the epochs of a run without --minutes.
    asked: {flag: value} of what the time of all runs depends on, plain values. kept:
    the path of a file with the choice and with what was asked: the same command goes on
    with the same epochs. at_a_time: how many runs side by side, which share the
    processors.
    Raises ValueError if the time does not suffice, or if the file does not fit.
    """
    minutes = asked["minutes"]
    chosen = read_choice(kept, asked, usual)
    if chosen is not None:
        print(f"minutes {minutes:g}: {in_words(chosen)} for each run, as {kept} says")
        return chosen

    since = time.monotonic()
    jobs = plan(usual)
    trials = try_all(jobs, at_a_time)
    least = max(LEAST_PRUNE, *(math.ceil(trial.interval / trial.steps)
                               for trial, _ in trials.values()))

    def at(total):
        shared = in_proportion(usual, total)
        return shared | dict(epochs_prune=max(least, shared["epochs_prune"]))

    def seconds(total):
        return seconds_of_all(plan(at(total)), trials, at_a_time)

    passed = time.monotonic() - since
    budget = PLANNED * (60 * minutes - passed)
    total = largest(lambda total: seconds(total) <= budget, len(usual))
    chosen, needed = at(total), seconds(total)
    if needed > budget:
        raise ValueError(f"--minutes is {minutes:g}, expected at least "
                         f"{math.ceil((needed / PLANNED + passed) / 60)} on this "
                         f"machine, for {len(jobs)} runs of {in_words(chosen)}. Raise "
                         f"it, or lower --seeds or --train-limit")
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_json(kept, asked | chosen)
    print(f"minutes {minutes:g}: {in_words(chosen)} for each of {len(jobs)} runs, "
          f"about {needed / 60:.0f} min in all")
    return chosen


def in_words(chosen):
    """Return "4 + 2 epochs" of {flag: epochs}."""
    return f"{' + '.join(map(str, chosen.values()))} epochs"


def read_choice(path, asked, flags):
    """Return {flag: epochs} that a file holds; None where there is no file, or where no
    run has begun and something else is asked for now, which is then printed.

    asked: see choose_for_all. flags: those of the epochs. An older file does not say
    all that it was for. Raises ValueError if the file is damaged or for something else.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        chosen = {flag: found[flag] for flag in flags}
        is_whole = found["minutes"] > 0 and all(
            type(count) is int and count > 0 for count in chosen.values())
    except (OSError, ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{path} is damaged, expected the epochs that --minutes has "
                         f"chosen. Remove it; if runs beside it have begun, give their "
                         f"epochs in place of --minutes")
    for flag, value in asked.items():
        if flag in found and found[flag] != value:
            break
    else:
        return chosen
    change = (f"{path} is for {as_flag(flag, found[flag])}, this command has "
              f"{as_flag(flag, value)}")
    if any(path.parent.glob("*/config.json")):
        epochs = " ".join(as_flag(flag, count) for flag, count in chosen.items())
        raise ValueError(f"{change}, expected the same. Leave it as it was, name "
                         f"another --out, or write {epochs} in place of --minutes")
    print(f"note: {change}. No run has begun: the epochs are chosen anew")
    return None


def as_flag(flag, value):
    """Return a flag and its value as on a command line, in words if it is left out."""
    name = f"--{flag.replace('_', '-')}"
    if value is None:
        return f"no {name}"
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return f"{name} {value}"


def try_all(jobs, at_a_time):
    """Try a job of each method. Return {method: (Length, epochs that the script makes
    of one epoch of its flags)}.

    As many trials run side by side as runs will: they share the processors, and some
    methods are tried again beside the last ones. Of two trials the slower one counts.
    If one fails, its line is printed and its exit code taken.
    """
    firsts = {}
    for job in jobs:
        firsts.setdefault(job.method, job)
    side = min(at_a_time, len(jobs))
    count = math.ceil(len(firsts) / side) * side
    tried = list(itertools.islice(itertools.cycle(firsts.values()), count))
    environment = environment_for(at_a_time)
    with ThreadPoolExecutor(side) as pool:
        try:
            measured = list(pool.map(lambda job: measure(job.words, environment),
                                     tried))
        except BaseException as error:
            pool.shutdown(cancel_futures=True)
            leave_if_failed(error)
            raise
    trials = {}
    for job, length in zip(tried, measured):
        trial = length, length.epochs / epochs_of(job.words)
        trials[job.method] = max(trial, trials.get(job.method, trial),
                                 key=lambda trial: trial[0].step)
    return trials


def seconds_of_all(jobs, trials, at_a_time):
    """Return how long all runs take, so many side by side, each begun as soon as
    another ends. trials: see try_all."""
    ends = [0.0] * at_a_time
    for job in jobs:
        length, factor = trials[job.method]
        heapq.heapreplace(ends, ends[0] + length.seconds(factor * epochs_of(job.words)))
    return max(ends)


def epochs_of(words):
    """Return the sum of the epochs that a command gives its stages."""
    return sum(int(value) for flag, value in zip(words, words[1:])
               if flag.startswith("--epochs-"))


# ---- a trial -------------------------------------------------------------------------


class Failed(Exception):
    """A trial that failed: Failed(what it wrote to stderr, its exit code)."""


def try_out(words, environment=None):
    """Return the Length that measure() returns. If the trial fails, its own line is
    printed and its exit code taken."""
    try:
        return measure(words, environment)
    except Failed as error:
        leave_if_failed(error)


def leave_if_failed(error):
    """End as a trial has ended, if the error is Failed."""
    if isinstance(error, Failed):
        text, code = error.args
        sys.stderr.write(text)
        raise SystemExit(code) from None


def measure(words, environment=None):
    """Run a command until it has measured some steps and an evaluation. Return its
    Length. It is a process of its own, in a folder of its own, which is thrown away.

    words: the interpreter, the script, its flags. Raises Failed.
    """
    interpreter, script, *flags = words
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
            f"from harness import planning; planning.trial()")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "length.json")
        made = [interpreter, "-c", code, str(time.time()), str(result), script,
                *without(flags), "--run-dir", str(Path(folder, "run"))]
        done = subprocess.run(made, env=environment, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, text=True)
        if not result.exists():
            raise Failed(done.stderr, done.returncode or 1)
        return Length(**json.loads(result.read_text()))


def without(flags):
    """Return the words of a command line without those of LEFT_OUT."""
    kept, words = [], iter(flags)
    for word in words:
        name, has_value, _ = word.partition("=")
        if name not in LEFT_OUT:
            kept.append(word)
        elif LEFT_OUT[name] and not has_value:
            next(words, None)
    return kept


def trial():
    """What the process of a trial does: argv is the time of its start, the file of the
    result, the script, its flags. It ends when the Length is written."""
    from harness import runfolder  # torch takes seconds to import

    began, result, *sys.argv = sys.argv[1:]

    def end(run, step, evaluation):
        trained = time.monotonic() - run.started
        length = Length(time.time() - float(began) - trained, step, evaluation,
                        run.stages.steps_per_epoch, run.stages.epochs,
                        vars(run.args).get("interval", 0), run.args.evaluate_every,
                        len(run.stages.by_name))
        Path(result).write_text(json.dumps(length._asdict()))
        sys.stdout.flush()
        os._exit(0)  # nothing of this run is kept

    runfolder.Run.measured = end
    runpy.run_path(sys.argv[0], run_name="__main__")
