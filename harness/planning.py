"""How many epochs fit into some minutes: --minutes M of the scripts and of compare.py.

    planning.choose(words, args, minutes, is_fit, since)  # {"epochs_prune": 3, ...}
    planning.choose_for_all(jobs, minutes, (8, 4), kept)  # (3, 2), for all runs
    length = planning.try_out(words)    # a few steps, in a process of its own
    length.seconds(12)                  # how long a run of 12 epochs takes

A trial is the script itself, with its flags, in a folder that is thrown away. It ends
when it has measured some steps and an evaluation. So the run that follows is the run
that has these epochs by flags, bit by bit.
"""
import json
import math
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

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

    def seconds(self, epochs):
        """Return how long a run of so many epochs takes."""
        once = self.load + RESULTS + 4 * self.evaluation
        return once + epochs * (self.steps * self.step + self.evaluation)


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


def choose_for_all(jobs, minutes, epochs, kept, at_a_time=1):
    """Return (epochs_prune, epochs_finetune), the same for all runs, such that all of
    them together end within so many minutes.

    jobs: a list of (folder, words of the command from the interpreter on), with the
    usual epochs. epochs: the usual (epochs_prune, epochs_finetune). kept: the path of a
    file, from which the choice is read if it is there, and to which it is written: so
    the same command goes on with the same epochs. at_a_time: how many runs side by
    side, which share the processors.
    One command of each script is tried. Raises ValueError if the time does not suffice.
    """
    if kept.exists():
        chosen = json.loads(kept.read_text())
        if chosen["minutes"] != minutes:
            raise ValueError(f"{kept.parent} was made with --minutes "
                             f"{chosen['minutes']:g}, this command says {minutes:g}. "
                             f"Leave it as it was, or name another --out")
        return chosen["epochs_prune"], chosen["epochs_finetune"]

    since, lengths = time.monotonic(), {}
    threads = max(1, (os.cpu_count() or 1) // at_a_time)
    environment = os.environ | dict(OMP_NUM_THREADS=str(threads))
    for _, words in jobs:
        if words[1] not in lengths:
            lengths[words[1]] = try_out(words, environment)
    tried = [lengths[words[1]] for _, words in jobs]
    usual = dict(zip(("epochs_prune", "epochs_finetune"), epochs))
    least = max(LEAST_PRUNE, *(math.ceil(length.interval / length.steps)
                               for length in tried))

    def seconds(chosen):
        share = sum(chosen.values()) / sum(epochs)
        work = sum(length.seconds(share * length.epochs) for length in tried)
        return work / min(at_a_time, len(tried))

    def at(total):
        chosen = in_proportion(usual, total)
        return chosen | dict(epochs_prune=max(least, chosen["epochs_prune"]))

    budget = PLANNED * (60 * minutes - (time.monotonic() - since))
    total = 2
    if seconds(at(total)) > budget:
        needed = (seconds(at(total)) / PLANNED + time.monotonic() - since) / 60
        prune, finetune = at(total).values()
        raise ValueError(f"--minutes is {minutes:g}, expected at least "
                         f"{math.ceil(needed)} on this machine, for {len(tried)} runs "
                         f"of {prune} + {finetune} epochs. Raise it, or lower --seeds "
                         f"or --train-limit")
    total = largest(lambda total: seconds(at(total)) <= budget, total)
    chosen = at(total)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(dict(minutes=minutes) | chosen))
    print(f"minutes {minutes:g}: {chosen['epochs_prune']} + "
          f"{chosen['epochs_finetune']} epochs for each of {len(tried)} runs, about "
          f"{seconds(chosen) / 60:.0f} min in all")
    return tuple(chosen.values())


# ---- a trial -------------------------------------------------------------------------


def try_out(words, environment=None):
    """Run a command until it has measured some steps and an evaluation. Return its
    Length. It is a process of its own, in a folder of its own, which is thrown away.

    words: the interpreter, the script, its flags. If it fails, its own line is printed
    and its exit code taken.
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
            sys.stderr.write(done.stderr)
            raise SystemExit(done.returncode or 1)
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
                        vars(run.args).get("interval", 0))
        Path(result).write_text(json.dumps(length._asdict()))
        sys.stdout.flush()
        os._exit(0)  # nothing of this run is kept

    runfolder.Run.measured = end
    runpy.run_path(sys.argv[0], run_name="__main__")
