"""Kills, full disks, locks, damaged files, wrong input: nothing is lost and nothing silently wrong.

    pytest tests/test_faults.py               # three kills a script, all other faults
    python tests/test_faults.py --kills 20    # kills at random moments, of the main scripts
"""
import argparse
import fcntl
import importlib
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import channels
import data
import helpers
import masks
import metrics
import modelfile
import models
import neurons
import training
from harness import files, machine, meters, records, runfolder
from helpers import assert_same_run, lines, one_line

ROOT = Path(__file__).parent.parent
TINY = "--dataset tiny.npz --width 0.25 --batch-size 10 --lr 0.05".split()  # 6 steps an epoch
SHORT = {  # the scripts, on tiny budgets
    "prune_unstructured": "--epochs-prune 2 --epochs-finetune 1 --interval 3 --regen 0.5",
    "prune_granet": "--epochs-prune 2 --epochs-finetune 1 --interval 3",
    "prune_structured": "--epochs-pretrain 2 --epochs-finetune 2 --l1 0.001",
    "prune_greg": "--epochs-pretrain 2 --epochs-prune 1 --epochs-finetune 2",
    "prune_sca": "--epochs-prune 2 --epochs-finetune 1 --interval 4",
    "prune_lottery": "--epochs-prune 3 --epochs-finetune 2 --rounds 2",
    "prune_gradr": "--epochs-prune 2 --epochs-finetune 1 --interval 4 --method deepr",
    "prune_sdsnn": "--epochs-prune 5 --epochs-finetune 1 --rate-conv 0.3",
    "prune_stds": "--epochs-prune 2 --epochs-finetune 1 --interval 4",
    "prune_ndsnn": "--epochs-prune 2 --epochs-finetune 1 --interval 3",
    "prune_pq": "--epochs-prune 2 --epochs-finetune 1 --interval 3",
    "prune_upr": "--epochs-prune 2 --epochs-finetune 1 --neurons"}
MAIN = "prune_unstructured"
pytestmark = pytest.mark.usefixtures("usual_signals")


def write_tiny(folder):
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.integers(0, 100, (60, 8, 8)) + 70 * y[:, None, None]  # brighter by class
    np.savez(Path(folder, "tiny.npz"), x_train=x.astype(np.uint8), y_train=y,
             x_test=x[:30].astype(np.uint8), y_test=y[:30])


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    write_tiny(".")
    monkeypatch.setattr(sys, "argv", ["prune.py"])


def command(script, *given):
    return [*TINY, *SHORT[script].split(), *map(str, given)]


def run(script, *given):
    return importlib.import_module(script).main(command(script, *given))


def resume(script, *given):
    return importlib.import_module(script).main(["--resume", "--run-dir", "r", *map(str, given)])


def fails(capsys, code, function, *given):
    """Return the one line on stderr of a call that must end with this exit code."""
    with pytest.raises(SystemExit) as stop:
        function(*given)
    assert stop.value.code == code, capsys.readouterr()
    return one_line(capsys)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """Return a function that gives the folder of a script's run that nothing has disturbed."""
    made = {}

    def folder_of(script):
        if script not in made:
            before, made[script] = Path.cwd(), tmp_path_factory.mktemp(script)
            os.chdir(made[script])
            write_tiny(".")
            run(script, "--run-dir", "r")
            os.chdir(before)
        return made[script] / "r"

    return folder_of


# ---- processes that die --------------------------------------------------------------------------


def nth_call(owner, name, n, act, after=False):
    """Let the n-th call of owner.name act first; after: act when it has returned."""
    function, calls = getattr(owner, name), []

    def counted(*arguments, **named):
        calls.append(None)
        if len(calls) == n and not after:
            act(*arguments)
        result = function(*arguments, **named)
        if len(calls) == n and after:
            act(*arguments)
        return result

    setattr(owner, name, counted)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def tear(descriptor, *_):
    """Leave half of a file and die."""
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    die()


def kill_at(place, n):
    """Prepare this process to be killed at the n-th moment of a kind."""
    if place == "step":  # the weights have moved; masks, log and counters do not know yet
        for optimizer in (torch.optim.SGD, torch.optim.Adam):
            nth_call(optimizer, "step", n, die, after=True)
    elif place == "update":  # the masks have changed; weights, momentum and log do not know yet
        nth_call(masks.Masks, "record_update", n, die)
    elif place == "removal":
        nth_call(channels, "choice_record", n, die)
    elif place == "scoring":
        nth_call(training, "score_channels", n, die)
    elif place == "writing":
        nth_call(os, "fsync", n, tear)
    elif place == "written":
        nth_call(os, "replace", n, die, after=True)
    elif place == "counting":
        nth_call(metrics, "count", n, die)


def stop_itself(_, n):
    for optimizer in (torch.optim.SGD, torch.optim.Adam):
        nth_call(optimizer, "step", n, lambda *_: os.kill(os.getpid(), signal.SIGSTOP))


def limit_files(size, n):
    """No file may grow beyond a size from the n-th flush on: a disk that is full."""
    nth_call(os, "fsync", n, lambda *_: resource.setrlimit(
        resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)), after=True)


def child(folder, script, given, prepare, how):
    """What a process of its own does: it runs a script after some preparation."""
    os.chdir(folder)
    Path("out.txt").unlink(missing_ok=True)
    helpers.write_to("out.txt")
    sys.argv = [f"{script}.py"]
    prepare(*how)
    importlib.import_module(script).main(given)


def start(script, given, prepare, *how):
    return helpers.fork(child, os.getcwd(), script, given, prepare, how)


KILLS = {  # place, its n-th moment, minutes between checkpoints (0: after each step)
    "prune_unstructured": [("step", 9, 0), ("update", 3, 10), ("writing", 14, 0)],
    "prune_granet": [("step", 9, 0), ("update", 3, 10), ("writing", 14, 0)],
    "prune_structured": [("step", 16, 0), ("removal", 1, 10), ("scoring", 1, 10)],
    "prune_greg": [("step", 16, 0), ("removal", 1, 10), ("writing", 12, 0)],
    "prune_sca": [("step", 10, 0), ("removal", 1, 10), ("writing", 12, 0)],
    "prune_lottery": [("step", 21, 0), ("update", 2, 0), ("writing", 26, 0)],
    "prune_gradr": [("step", 10, 0), ("update", 3, 0), ("counting", 1, 10)],
    "prune_sdsnn": [("step", 27, 0), ("update", 1, 10), ("written", 22, 0)],
    "prune_stds": [("step", 10, 0), ("update", 3, 0), ("writing", 14, 0)],
    "prune_ndsnn": [("step", 10, 10), ("update", 4, 0), ("writing", 21, 0)],
    "prune_pq": [("step", 10, 10), ("update", 4, 0), ("writing", 21, 0)],
    "prune_upr": [("step", 9, 0), ("update", 1, 10), ("writing", 14, 0)]}


@pytest.mark.parametrize("script, place, n, minutes", [
    (script, *kill) for script, kills in KILLS.items() for kill in kills])
def test_a_killed_run_goes_on_bit_by_bit(script, place, n, minutes, unbroken):
    whole = unbroken(script)
    process = start(script, command(script, "--run-dir", "r", "--save-every", minutes),
                    kill_at, place, n)
    process.join()
    assert process.exitcode == -signal.SIGKILL, Path("out.txt").read_text()
    assert Path("r/.lock").exists() and not Path("r/summary.json").exists()
    state = files.read_checkpoint("r")
    if minutes == 0 and place == "step":
        assert state["position"][1] > 0 and state["position"][2] == n - 1  # inside an epoch
    resume(script, "--save-every", 10)  # which may differ
    assert_same_run(whole, "r")


def test_killed_again_and_again(unbroken):
    for n in range(1, 8):
        process = start(MAIN, command(MAIN, "--run-dir", "r", "--resume", "--save-every", 0),
                        kill_at, *(("step", 4), ("writing", n))[n % 2])
        process.join()
        assert process.exitcode == -signal.SIGKILL
    Path("r/mine.tmp").write_text("")
    Path("r/model.pt.tmp").write_text("")  # of an older version
    assert len(list(Path("r").glob("*.tmp"))) > 2
    resume(MAIN)
    assert [path.name for path in Path("r").glob("*.tmp")] == ["mine.tmp"]
    Path("r/mine.tmp").unlink()
    assert_same_run(unbroken(MAIN), "r")


def test_two_processes_that_write_one_file_at_once():
    """No lock guards figures and tables: the last one counts, and it is whole."""
    path = Path("table.csv")

    def slow(file):
        file.write("one")
        files.write_whole(path, lambda other: other.write("another"))
        file.write(" and whole")

    files.write_whole(path, slow)
    assert path.read_text() == "one and whole" and not list(Path().glob("*.tmp"))


def test_killed_while_it_replaces_another_run(unbroken):
    """What is left is never an old summary, or an old checkpoint, beside new flags."""
    unlink, gone = Path.unlink, []
    for n in (1, 2, 5):
        run(MAIN, "--run-dir", "r", "--overwrite", "--seed", 7)

        def dies(path, missing_ok=False):
            if path.parent.name == "r" and path.suffix != ".tmp":
                gone.append(path.name)
                if len(gone) == n:
                    raise KeyboardInterrupt
            unlink(path, missing_ok)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "unlink", dies)
            with pytest.raises(SystemExit):
                run(MAIN, "--run-dir", "r", "--overwrite")
        assert json.loads(Path("r/config.json").read_text())["seed"] == 7
        assert n == 1 or not Path("r/summary.json").exists()
        assert n < 3 or not Path("r/checkpoint.pt").exists()
        gone.clear()
    run(MAIN, "--run-dir", "r", "--overwrite")
    assert_same_run(unbroken(MAIN), "r")


def test_checkpoints_inside_an_epoch(monkeypatch, unbroken):
    saved, save, now = [], runfolder.Run.save, [0.0]

    def watch(self):
        saved.append((self.epoch, self.step))
        save(self)

    monkeypatch.setattr(runfolder.Run, "save", watch)
    run(MAIN, "--run-dir", "often", "--save-every", 0)
    assert saved == [at for epoch in range(3)
                     for at in (*((epoch, step) for step in range(1, 7)), (epoch + 1, 0))]
    assert_same_run(unbroken(MAIN), "often")
    saved.clear()
    run(MAIN, "--run-dir", "never")
    assert saved == [(1, 0), (2, 0), (3, 0)]
    saved.clear()

    def look(self, iteration, look=meters.Watch.look):  # a minute passes at each step
        now[0] = max(now[0], 60.0 * iteration)
        look(self, iteration)

    monkeypatch.setattr(meters.Watch, "look", look)
    monkeypatch.setattr(runfolder.time, "monotonic", lambda: now[0])
    run(MAIN, "--run-dir", "sometimes", "--save-every", 4)
    assert saved == [(0, 4), (1, 0), (1, 4), (2, 0), (2, 4), (3, 0)]


EIGHT_AND_ONE = ["--epochs-prune", 8, "--epochs-finetune", 1]


@pytest.fixture
def slow_disk(monkeypatch):
    """Let each step take a second, and each checkpoint another. Return where checkpoints are
    saved, a list that grows: (epoch, step)."""
    saved, now, save_tensors, add = [], [0.0], runfolder.save_tensors, meters.Meter.add

    def step(self, *given):
        now[0] += 1
        add(self, *given)

    def write(path, value):
        save_tensors(path, value)
        if path.name == "checkpoint.pt":
            now[0] += 1
            saved.append(tuple(value["position"][:2]))

    monkeypatch.setattr(meters.Meter, "add", step)
    monkeypatch.setattr(runfolder, "save_tensors", write)
    monkeypatch.setattr(runfolder.time, "monotonic", lambda: now[0])
    return saved


def test_short_epochs_are_saved_where_the_last_checkpoint_is_old(slow_disk):
    """After the first epoch, then 20 times later than one takes, and at the end of each stage."""
    run(MAIN, "--run-dir", "r", *EIGHT_AND_ONE)
    assert slow_disk == [(1, 0), (5, 0), (8, 0), (9, 0)]
    slow_disk.clear()
    run(MAIN, "--run-dir", "minutes", *EIGHT_AND_ONE, "--save-every", 0.2)  # 12 s
    assert slow_disk == [(1, 0), (2, 6), (4, 6), (6, 6), (8, 0), (9, 0)]
    assert_same_run("minutes", "r")


@pytest.mark.parametrize("iteration, kept", [(5, None), (29, (1, 0)), (35, (5, 0)), (50, (8, 0))])
def test_what_a_kill_costs_between_checkpoints_of_epochs(iteration, kept, slow_disk, monkeypatch):
    run(MAIN, "--run-dir", "unbroken", *EIGHT_AND_ONE)
    slow_disk.clear()
    add = meters.Meter.add

    def die(self, loss, logits, labels, at=0):
        add(self, loss, logits, labels, at)
        if at == iteration:
            raise KeyboardInterrupt

    monkeypatch.setattr(meters.Meter, "add", die)
    with pytest.raises(SystemExit):
        run(MAIN, "--run-dir", "r", *EIGHT_AND_ONE)
    state = files.read_checkpoint("r")
    assert (state and tuple(state["position"][:2])) == kept
    if kept:  # six steps an epoch, a second each: an epoch and 20 s at most
        assert iteration - 6 * kept[0] <= 6 + 20
    monkeypatch.setattr(meters.Meter, "add", add)
    resume(MAIN) if kept else run(MAIN, "--run-dir", "r", *EIGHT_AND_ONE, "--resume")
    assert_same_run("unbroken", "r")


@pytest.mark.parametrize("epoch", [3, 4])
def test_a_signal_at_the_end_of_an_epoch_that_is_not_saved(epoch, slow_disk, monkeypatch):
    run(MAIN, "--run-dir", "unbroken", *EIGHT_AND_ONE)
    evaluate = training.evaluate
    ends = []

    def interrupted(*given):
        ends.append(None)
        if len(ends) == epoch:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*given)

    monkeypatch.setattr(training, "evaluate", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(MAIN, "--run-dir", "r", *EIGHT_AND_ONE)
    assert stop.value.code == 143
    assert files.read_checkpoint("r")["position"][:2] == [epoch, 0]
    resume(MAIN)
    assert_same_run("unbroken", "r")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_the_result_is_counted(number, monkeypatch, capsys, unbroken):
    """All is saved by then: it ends at once, and only the end is left to do."""
    whole = unbroken(MAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "count", lambda *_: (os.kill(os.getpid(), number), time.sleep(60)))
        started = time.monotonic()
        with pytest.raises(SystemExit) as stop:
            run(MAIN, "--run-dir", "r")
    assert stop.value.code == 128 + number and time.monotonic() - started < 30
    assert "saved. Go on with: python" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "loss_over_time", None)  # no step is done again
        resume(MAIN)
    assert_same_run(whole, "r")


def test_a_signal_between_the_stages(monkeypatch, unbroken):
    whole = unbroken("prune_structured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "score_channels",
                      lambda *_, **__: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)))
        with pytest.raises(SystemExit) as stop:
            run("prune_structured", "--run-dir", "r")
    assert stop.value.code == 143
    resume("prune_structured")
    assert_same_run(whole, "r")


# ---- disks and folders ---------------------------------------------------------------------------


@pytest.mark.parametrize("name, code", [
    ("config.json", 2), ("updates.jsonl", 1), ("metrics.jsonl", 1), ("checkpoint.pt", 1),
    ("model.pt", 1), ("summary.json", 1)])
def test_a_write_that_fails(name, code, capsys):
    """The disk is full at the second time that a file is written (or the first)."""
    replace, seen = os.replace, []

    def full(source, target):
        seen.extend([None] * (Path(target).name == name))
        if len(seen) == (2 if name in ("updates.jsonl", "metrics.jsonl", "checkpoint.pt") else 1):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", full)
        error = fails(capsys, code, run, MAIN, "--run-dir", "r")
    assert f"r/{name} cannot be written (No space left on device), expected a folder" in error
    if code == 2:
        assert not Path("r").exists()
        return
    assert not list(Path("r").glob("*.tmp")) and not Path("r/.lock").exists()
    if name == "updates.jsonl":  # in the first epoch, before any checkpoint
        assert len(lines("r", "updates")) == 1
    else:
        assert files.read_checkpoint("r")["position"][0] == dict(
            metrics=1, checkpoint=1).get(name.split(".")[0], 3)


def test_a_disk_that_is_full_for_a_while(unbroken, capsys):
    process = start(MAIN, command(MAIN, "--run-dir", "r", "--save-every", 0), limit_files, 2000, 9)
    process.join()
    text = Path("out.txt").read_text().splitlines()
    assert process.exitcode == 1 and "Traceback" not in " ".join(text)
    assert "checkpoint.pt cannot be written (File too large)" in text[-1]
    assert not list(Path("r").glob("*.tmp"))
    assert files.read_checkpoint("r")["position"] == [1, 0, 6] or files.read_checkpoint("r")
    resume(MAIN)
    assert_same_run(unbroken(MAIN), "r")


@pytest.fixture
def disk():
    """A disk of 250 kB; tests that need one are skipped where mounting is not allowed."""
    Path("disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=250k", "tmpfs", "disk"],
                             capture_output=True) if shutil.which("mount") else None
    if mounted is None or mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", "disk"], check=True)
    subprocess.run(["umount", "disk"], check=True)


def test_a_small_disk(disk, capsys, unbroken):
    error = fails(capsys, 1, run, MAIN, "--run-dir", "disk/r", "--width", 0.5)
    assert "cannot be written (No space left on device)" in error
    assert not list(Path("disk/r").glob("*.tmp"))
    disk("size=9m")
    importlib.import_module(MAIN).main(["--resume", "--run-dir", "disk/r"])
    run(MAIN, "--run-dir", "whole", "--width", 0.5)
    assert_same_run("whole", "disk/r")


def test_a_disk_that_is_read_only(disk, capsys):
    disk("size=9m")
    run(MAIN, "--run-dir", "disk/r")
    Path("disk/r/summary.json").unlink()
    before = helpers.everything_in(Path("disk"))
    disk("ro")
    for given in (["disk/r", "--resume"], ["disk/r", "--overwrite"], ["disk/new"]):
        error = fails(capsys, 2, run, MAIN, "--run-dir", *given)
        assert "cannot be written to (Read-only file system), expected" in error
    assert helpers.everything_in(Path("disk")) == before
    disk("rw")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
def test_a_folder_that_nobody_may_write_to(capsys):
    """Permission bits do not stop root, /proc does."""
    assert "/proc/r cannot be written to" in fails(capsys, 2, run, MAIN, "--run-dir", "/proc/r")


@pytest.mark.skipif(os.geteuid() == 0, reason="root ignores permission bits")
def test_a_folder_without_write_permission(capsys):
    Path("r").mkdir(mode=0o555)
    assert "r cannot be written to (Permission denied)" in fails(
        capsys, 2, run, MAIN, "--run-dir", "r")


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_is_deleted_under_a_run(again, capsys, monkeypatch):
    def delete(self, *_):
        if self.iteration == 7 and not deleted:
            shutil.rmtree("r")
            deleted.append(None)
            if again:
                Path("r").mkdir()
                Path("r/config.json").write_text("of another run")

    deleted, check = [], runfolder.Run.check
    monkeypatch.setattr(runfolder.Run, "check", lambda self: (delete(self), check(self)))
    error = fails(capsys, 1, run, MAIN, "--run-dir", "r", "--save-every", 0)
    assert "r was deleted or replaced under the run" in error
    left = [path.name for path in Path("r").rglob("*")]
    assert left == ["config.json"] * again  # the other run's is left alone


def test_one_process_at_a_time(capsys, unbroken):
    process = start(MAIN, command(MAIN, "--run-dir", "r", "--save-every", 0), stop_itself, 0, 8)
    try:
        end = time.monotonic() + 60
        while "T (stopped)" not in Path(f"/proc/{process.pid}/status").read_text():
            assert time.monotonic() < end and process.is_alive()
            time.sleep(0.02)
        before = helpers.everything_in(Path("r"))
        for given in ("--resume", "--overwrite"):
            error = fails(capsys, 2, run, MAIN, "--run-dir", "r", given)
            assert "r is in use by another process, expected one at a time. Wait for it" in error
        assert helpers.everything_in(Path("r")) == before
    finally:
        process.kill()
        process.join()
    resume(MAIN)  # the system has freed the lock
    assert_same_run(unbroken(MAIN), "r")


def test_a_lock_whose_file_was_just_removed(monkeypatch):
    """Between opening and locking the file its owner removes it: the lock would guard nothing."""
    flock, locked = fcntl.flock, []

    def late(file, how):
        if not locked:
            os.unlink("r/.lock")
        flock(file, how)
        if how != fcntl.LOCK_UN:
            locked.append(os.fstat(file))

    monkeypatch.setattr(fcntl, "flock", late)
    lock = files.acquire(Path("r"))
    assert len(locked) == 2 and files.holds(lock)
    assert os.path.samestat(locked[1], os.stat("r/.lock"))
    with pytest.raises(ValueError, match="in use by another process"):
        files.acquire(Path("r"))
    files.release(lock)
    assert list(Path("r").iterdir()) == []


def test_a_file_system_without_locks(monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    run(MAIN, "--run-dir", "r")
    assert "note: r cannot be locked (" in capsys.readouterr().out  # the reason is in filelock's words


# ---- checkpoints from strangers ------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return Path.touch, (Path("was_run"),)


def changed(*path, to=None, by=None):
    """Return a change of a checkpoint: the entry at a path becomes a value, or a function of it."""
    def change(state):
        at = state
        for key in path[:-1]:
            at = at[key]
        if to is None and by is None:
            del at[path[-1]]
        else:
            at[path[-1]] = to if by is None else by(at[path[-1]])
        return state
    return change


MOMENTUM = ("parts", "optimizer", "state", 0, "momentum_buffer")
WEIGHT = ("parts", "net", "convs.1.conv.weight")
BAD_STATES = {
    "no dict": (lambda state: [1], "it holds no state of a run"),
    "another version": (changed("format", to=1), "format 1, expected 3: it was written by another"),
    "code": (changed("notes", to={"x": Code()}), "Weights only load failed"),
    "no masks": (changed("parts", "masks"), "its masks is of another network"),
    "no position": (changed("position"), "its entry position is missing"),
    "widths": (changed("widths", to=4), "its entry widths is missing or no"),
    "beyond the end": (changed("position", to=[9, 0, 54]), "its position is [9, 0, 54]"),
    "before the start": (changed("position", to=[-1, 0, -6]), "its position is [-1"),
    "an epoch without a row": (changed("metrics", to=2), "its position is"),
    "another step": (changed("position", to=[3, 1, 18]), "its position is [3, 1, 18]"),
    "other flags": (changed("flags", "lr", to=0.5), "it was made with lr 0.5, not 0.05"),
    "another network": (changed("parts", "net", by=lambda net: {
        **net, "fc.weight": torch.zeros(5, 5)}), "fc.weight of its net is"),
    "less of a network": (changed("parts", "net", "fc.weight"), "its net is of another"),
    "a shape": (changed(*WEIGHT, by=lambda w: w[:, :2]), "convs.1.conv.weight of its net is"),
    "a type": (changed("parts", "masks", "alive", by=lambda m: m.float()), "alive of its masks is"),
    "masks of another network": (changed("parts", "masks", "alive", by=lambda m: m[:-1]),
                                 "alive of its masks is"),
    "a momentum": (changed(*MOMENTUM, by=lambda m: m[:1]), "momentum_buffer of its optimizer is"),
    "dead weights that are not 0": (changed(*WEIGHT, by=lambda w: w + 1),
                                    "its masks disagree with its weights"),
    "momentum of dead weights": (changed(*MOMENTUM, by=lambda m: m + 1), "its masks disagree"),
    "a mask turned": (changed("parts", "masks", "alive", by=lambda m: ~m), "its masks disagree"),
    "sums": (changed("meter", to=(torch.zeros(3), 0)), "does not fit"),
}


@pytest.fixture(scope="session")
def finished_run(unbroken):
    return unbroken(MAIN)


@pytest.mark.parametrize("change, words", BAD_STATES.values(), ids=BAD_STATES)
def test_bad_checkpoints(change, words, finished_run, capsys):
    shutil.copytree(finished_run, "r")
    Path("r/summary.json").unlink()
    state = modelfile.read_tensors("r/checkpoint.pt")
    torch.save(change(state), "r/checkpoint.pt")
    before = helpers.everything_in(Path("r"))
    error = fails(capsys, 2, resume, MAIN)
    assert "r/checkpoint.pt does not fit this run or is damaged" in error and words in error
    assert "--overwrite" in error and not Path("was_run").exists()
    assert helpers.everything_in(Path("r")) == before


def test_damaged_checkpoints(finished_run, capsys):
    shutil.copytree(finished_run, "r")
    Path("r/summary.json").unlink()
    good = Path("r/checkpoint.pt").read_bytes()
    state = modelfile.read_tensors("r/checkpoint.pt")
    weight = state["parts"]["net"]["fc.weight"].numpy().tobytes()
    at = good.index(weight) + 9
    turned = bytearray(good)
    turned[at] ^= 4  # a bit of a weight
    for bad, words in ((good[:-100], "not a zip"), (good[:len(good) // 2], "not a zip"),
                       (b"", "not a zip"), (b"PK" * 400, "not a zip"),
                       (pickle.dumps(Code()), "not a zip"),
                       (bytes(turned), "the checksum of its part")):
        Path("r/checkpoint.pt").write_bytes(bad)
        error = fails(capsys, 2, resume, MAIN)
        assert "r/checkpoint.pt does not fit this run or is damaged" in error and words in error
    assert not Path("was_run").exists()
    Path("r/checkpoint.pt").write_bytes(good)
    for name in ("metrics", "updates"):
        path = Path(f"r/{name}.jsonl")
        text = path.read_text()
        for bad, words in ((text[:-30], "damaged"), ("", "0 lines, expected")):
            path.write_text(bad)
            error = fails(capsys, 2, resume, MAIN)
            assert f"{name}.jsonl" in error and words in error
        path.write_text(text)
    resume(MAIN)
    assert_same_run(finished_run, "r")


def same_content(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_content(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_content, one, other))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return one == other


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.pt"])
def test_no_turned_bit_goes_unseen(name, finished_run):
    """Of the bits of a file, each is either seen or of no effect (padding, dates)."""
    good = (finished_run / name).read_bytes()
    expected, rng, refused = modelfile.read_tensors(finished_run / name), random.Random(0), 0
    for _ in range(150):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        Path(name).write_bytes(bad)
        try:
            found = files.read_checkpoint(".") if name == "checkpoint.pt" else modelfile.read(name)
        except ValueError as error:
            assert name in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert same_content(found, expected)
    assert refused > 75


BAD_MODELS = {
    "truncated": (lambda good, _: good[:-50], "not a zip"),
    "a bit": (lambda good, packed: good.replace(
        weight := packed["state_dict"]["fc.weight"].numpy().tobytes(),
        bytes([weight[0] ^ 1]) + weight[1:]), "the checksum of its part"),
    "code": (changed("name", to=Code()), "cannot be read"),
    "another version": (changed("format", to=2), "has format 2, expected 1"),
    "another network": (changed("name", to="vgg16"), "widths"),
    "a shape": (changed("state_dict", "fc.weight", by=lambda w: w[:2]), "does not hold the"),
    "a mask": (changed("masks", "fc.weight", by=lambda m: m & False), "its mask says are pruned"),
    "NaN": (changed("state_dict", "fc.weight", by=lambda w: w * math.nan),
            "fc.weight is not finite"),
    "infinite": (changed("state_dict", "convs.1.bn.running_var", by=lambda v: v / 0),
                 "convs.1.bn.running_var is not finite"),
}


@pytest.mark.parametrize("change, words", BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_networks(change, words, capsys):
    net = models.build("small", 3, 1, 8, 4, models.default_widths("small", 0.25))
    torch.save(modelfile.pack(net), "start.pt")
    good, packed = Path("start.pt").read_bytes(), modelfile.read("start.pt")
    if change.__name__ == "change":
        torch.save(change(packed), "start.pt")
    else:
        Path("start.pt").write_bytes(change(good, packed))
    before = helpers.everything_in(Path("."))
    error = fails(capsys, 2, run, MAIN, "--init", "start.pt", "--run-dir", "r")
    assert "start.pt" in error and words in error and not Path("was_run").exists()
    assert helpers.everything_in(Path(".")) == before


# ---- what is not finite, what must hold, memory --------------------------------------------------


@pytest.mark.parametrize("script", SHORT)
@pytest.mark.parametrize("name, value", [("convs.1.conv.weight", math.nan),
                                         ("convs.2.bn.running_var", math.inf)])
def test_numbers_that_are_not_finite(script, name, value, monkeypatch, capsys):
    """At the 8th step; convs.1 is the second layer, whose neurons then only fall silent."""
    look = meters.Watch.look

    def spoil(self, iteration):
        if iteration == 8:
            self.numbers[name][(0,) * self.numbers[name].dim()] = value
        look(self, iteration)

    monkeypatch.setattr(meters.Watch, "look", spoil)
    error = fails(capsys, 1, run, script, "--run-dir", "r")
    assert f"{name} is not finite after iteration 8" in error and "checkpoint" in error
    assert files.read_checkpoint("r")["position"] == [1, 0, 6]
    monkeypatch.setattr(meters.Watch, "look", look)
    resume(script)


def test_scores_that_are_not_finite(monkeypatch, capsys):
    score = neurons.per_channel
    monkeypatch.setattr(neurons, "per_channel", lambda near, how: score(near, how) * (
        math.nan if near.shape[1] == 8 else 1))  # of the second layer alone
    error = fails(capsys, 1, run, MAIN, "--run-dir", "r")
    assert "after iteration 3: the scores of convs.1.conv.weight are not finite" in error
    error = fails(capsys, 1, run, "prune_structured", "--run-dir", "s")
    assert "after iteration 12: the scores of convs.1 are not finite" in error
    assert files.read_checkpoint("s")["position"] == [2, 0, 12]


def test_a_loss_that_is_not_finite_names_what_else(monkeypatch, capsys):
    loss, calls = training.loss_over_time, []

    def explode(logits, labels, kind):
        calls.extend([None] * logits.requires_grad)
        return loss(logits, labels, kind) * (math.inf if len(calls) == 5 else 1)

    monkeypatch.setattr(training, "loss_over_time", explode)
    error = fails(capsys, 1, run, MAIN, "--run-dir", "r")
    assert "the loss is not finite (NaN or infinite) at iteration 5, and then convs.0" in error


def revive(monkeypatch):
    """Masks are applied to the weights no more."""
    monkeypatch.setattr(masks.Masks, "apply", lambda self, optimizer: None)


def revive_momentum(monkeypatch):
    def apply(self, _):
        for name, weight in self.weights.items():
            weight.data.mul_(self.alive[name])
    monkeypatch.setattr(masks.Masks, "apply", apply)


def regenerate_one_less(monkeypatch):
    regenerate = masks.Masks.regenerate
    monkeypatch.setattr(masks.Masks, "regenerate", lambda self, count, *rest: regenerate(
        self, count - 1, *rest))


def empty_a_layer(monkeypatch):
    def rescue(self, *_):
        self.flat[:self.sizes[0]], self.flat[-self.sizes[0]:] = False, True
        extra = self.n_alive - self.keep_at(0.28125)
        self.flat[self.flat.nonzero()[:max(0, extra), 0]] = False
        return []
    monkeypatch.setattr(masks.Masks, "rescue_empty_layers", rescue)


@pytest.mark.parametrize("fault, words", [
    (revive, "are not 0, expected none"), (revive_momentum, "0 dead weights and"),
    (regenerate_one_less, "weights are alive, expected"), (empty_a_layer, "alive, expected")])
def test_what_must_hold_is_looked_at(fault, words, monkeypatch, capsys):
    fault(monkeypatch)
    error = fails(capsys, 1, run, MAIN, "--run-dir", "r", "--sparsity", 0.5)
    assert "error: after iteration 3 " in error and words in error and "checkpoint" in error
    assert not Path("r/model.pt").exists()


@pytest.mark.parametrize("script", [
    script for script in SHORT if script not in ("prune_structured", "prune_greg", "prune_sca")])
def test_each_script_looks(script, monkeypatch, capsys):
    """Something brings a dead weight back after the last update: the end of the epoch tells."""
    test = training.evaluate

    def spoil(forward, net, *rest):
        found = test(forward, net, *rest)
        for run in runs:
            if run.epoch == run.stages.epochs - 1:
                masks = run.parts["masks"]
                name = next(name for name in masks.weights if not masks.alive[name].all())
                masks.weights[name].data[~masks.alive[name]] = 1e-30
        return found

    runs, init = [], runfolder.Run.__init__
    monkeypatch.setattr(runfolder.Run, "__init__", lambda self, *a, **k: (
        init(self, *a, **k), runs.append(self))[0])
    monkeypatch.setattr(training, "evaluate", spoil)
    error = fails(capsys, 1, run, script, "--run-dir", "r")
    assert re.search(r"dead weights and 0 momenta of dead weights of \S+\.weight are not 0", error)


def test_the_saved_network_is_counted_again(monkeypatch, capsys, finished_run):
    shutil.copytree(finished_run, "r")
    Path("r/summary.json").unlink()
    pack = modelfile.pack

    def forget(net, alive=None):
        packed = pack(net, alive)
        packed["masks"]["fc.weight"][:] = True
        return packed

    def move(net, alive=None):
        packed = pack(net, alive)
        packed["state_dict"]["fc.weight"] += 1
        return packed

    for fault, words in ((forget, "weights of fc.weight alive, expected"), (move, "are not 0")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modelfile, "pack", fault)
            error = fails(capsys, 1, resume, MAIN)
        assert "r/model.pt" in error and words in error and not Path("r/summary.json").exists()
    resume(MAIN)
    summary = json.loads(Path("r/summary.json").read_text())
    alive = sum(layer["alive"] for layer in summary["layers"])
    state = modelfile.read("r/model.pt")["state_dict"]
    zeros = sum(int((state[layer["name"]] == 0).sum()) for layer in summary["layers"])
    printed = capsys.readouterr().out
    assert f"counted in model.pt     {alive:,} alive, {zeros:,} zeros" in printed
    assert zeros >= sum(layer["weights"] for layer in summary["layers"]) - alive
    assert f"peak memory             {summary['peak_memory_mib']:,.0f} MiB of the process" in printed


def of_torch():
    torch.empty(2**45)


def of_numpy():
    np.empty(2**50)


def of_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has")


@pytest.mark.parametrize("ask", [of_torch, of_numpy, of_a_gpu])
def test_too_little_memory(ask, monkeypatch, capsys, unbroken):
    with pytest.MonkeyPatch.context() as patch:
        nth = training.loss_over_time
        patch.setattr(training, "loss_over_time", lambda *a: (ask(), nth(*a)))
        error = fails(capsys, 1, run, MAIN, "--run-dir", "r")
        assert "memory does not suffice" in error
        assert "Try --batch-size 5 instead of 10 or --precision bf16" in error
        error = fails(capsys, 1, run, MAIN, "--run-dir", "s", "--precision", "bf16")
        assert "bf16" not in error
        patch.setattr(data, "load", lambda *_: ask())
        error = fails(capsys, 2, run, MAIN, "--run-dir", "t")
        assert "Try a smaller --width or --train-limit" in error and not Path("t").exists()
    resume(MAIN)
    assert_same_run(unbroken(MAIN), "r")


def test_a_mistake_in_the_code_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(training, "loss_over_time", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        run(MAIN, "--run-dir", "r")
    assert not Path("r/.lock").exists()


def test_200_updates_do_not_grow_the_process(monkeypatch):
    sizes, verify = [], runfolder.Run.verify

    def watch(self, *given):
        verify(self, *given)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux")
    monkeypatch.setattr(runfolder.Run, "verify", watch)
    run(MAIN, "--run-dir", "r", "--epochs-prune", 34, "--interval", 1, "--epochs-finetune", 0)
    assert len(lines("r", "updates")) == 204
    assert sizes[-1] - sizes[40] < 8, sizes[::20]  # MiB


# ---- other data under a run ----------------------------------------------------------------------


def rewritten(**changes):
    """Return a function that changes arrays of tiny.npz, {key: function}."""
    def change():
        arrays = dict(np.load("tiny.npz"))
        np.savez("tiny.npz", **{key: changes.get(key, lambda x: x)(x)
                                for key, x in arrays.items()})
    return change


def with_names(*names):
    def change():
        np.savez("tiny.npz", **dict(np.load("tiny.npz")), class_names=np.array(names))
    return change


def one_pixel(x):
    x[7, 3, 3] ^= 1
    return x


OTHER_DATA = {  # what happens to tiny.npz, and what the one line says has changed
    "a pixel": (rewritten(x_train=one_pixel), "(changed: training images)"),
    "a test pixel": (rewritten(x_test=one_pixel), "(changed: test images)"),
    "labels": (rewritten(y_train=lambda y: 2 - y), "(changed: training labels)"),
    "test labels": (rewritten(y_test=lambda y: y[::-1]), "(changed: test labels)"),
    "order": (rewritten(x_train=lambda x: x[::-1], y_train=lambda y: y[::-1]),
              "(changed: training images; training labels)"),
    "a class less": (rewritten(y_train=lambda y: y % 2, y_test=lambda y: y % 2),
                     "the number of classes, 3 then, 2 now"),
    "more images": (rewritten(x_train=lambda x: np.repeat(x, 2, 0),
                              y_train=lambda y: np.repeat(y, 2)),
                    "training images, 60x8x8x1 then, 120x8x8x1 now"),
    "fewer images": (rewritten(x_train=lambda x: x[:6], y_train=lambda y: y[:6]),
                     "training images, 60x8x8x1 then, 6x8x8x1 now"),
    "colours": (rewritten(x_train=lambda x: np.stack([x] * 3, 3),
                          x_test=lambda x: np.stack([x] * 3, 3)), "60x8x8x1 then, 60x8x8x3 now"),
}


@pytest.mark.parametrize("is_finished", [False, True])
@pytest.mark.parametrize("change, words", OTHER_DATA.values(), ids=OTHER_DATA)
def test_other_data_are_refused(change, words, is_finished, finished_run, capsys):
    shutil.copytree(finished_run, "r")
    if not is_finished:
        Path("r/summary.json").unlink()
    change()
    before = helpers.everything_in(Path("r"))
    error = fails(capsys, 2, resume, MAIN)
    assert "r was made with other data than tiny.npz holds now" in error and words in error
    assert "--overwrite" in error and helpers.everything_in(Path("r")) == before


def test_a_finished_run_whose_data_are_damaged(finished_run, capsys):
    shutil.copytree(finished_run, "r")
    rewritten(y_train=lambda y: y + 5)()
    assert "y_train holds 3 different labels from 5 to 7" in fails(capsys, 2, resume, MAIN)
    Path("tiny.npz").write_bytes(b"PK")
    assert "tiny.npz cannot be read" in fails(capsys, 2, resume, MAIN)
    Path("tiny.npz").unlink()  # gone: it is finished all the same
    assert resume(MAIN)["epochs"] == 3


def test_the_checkpoint_knows_its_data_too(finished_run, capsys):
    """As where a config.json was copied from another run."""
    shutil.copytree(finished_run, "r")
    Path("r/summary.json").unlink()
    rewritten(y_test=lambda y: y[::-1])()
    config = json.loads(Path("r/config.json").read_text())
    del config["data"]
    Path("r/config.json").write_text(json.dumps(config))
    assert "r/checkpoint.pt was made with other data" in fails(capsys, 2, resume, MAIN)


def test_other_names_of_classes_are_refused(capsys, unbroken):
    with_names("cat", "dog", "owl")()
    run(MAIN, "--run-dir", "r")
    config = json.loads(Path("r/config.json").read_text())
    assert config["data"]["class_names"] == ["cat", "dog", "owl"]
    assert config["commit_clean"] in (True, False, None)
    Path("r/summary.json").unlink()
    write_tiny(".")  # without names: nothing contradicts
    resume(MAIN)
    Path("r/summary.json").unlink()
    with_names("dog", "cat", "owl")()
    assert "(changed: the names of the classes)" in fails(capsys, 2, resume, MAIN)


def half_done(monkeypatch):
    helpers.stop_after(7, monkeypatch, run, MAIN, "--run-dir", "r")


def test_the_same_data_at_another_place(monkeypatch, unbroken, capsys):
    """By another path, from another folder, in another format; the run keeps its name."""
    half_done(monkeypatch)
    Path("sub").mkdir()
    monkeypatch.chdir("sub")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main = importlib.import_module(MAIN).main
        main(["--resume", "--run-dir", "../r"])
    error = one_line(capsys)
    assert "../r, which was started with --dataset tiny.npz" in error
    assert "name the same data by --dataset" in error and str(Path.cwd()) in error
    Path("../tiny.npz").rename("moved.npz")
    main(["--resume", "--run-dir", "../r", "--dataset", "moved.npz"])
    assert_same_run(unbroken(MAIN), "../r")
    assert json.loads(Path("../r/summary.json").read_text())["dataset"] == "tiny.npz"


def test_the_same_data_in_another_data_dir(monkeypatch, capsys):
    data_dir = Path("one")
    helpers.make_tiny_imagenet(data_dir)
    given = [*"--dataset tiny-imagenet --model small --width 0.1 --batch-size 3 --crop 0".split(),
             *"--epochs-prune 2 --epochs-finetune 0 --interval 1 --run-dir r".split()]
    main = importlib.import_module(MAIN).main
    helpers.stop_after(3, monkeypatch, main, [*given, "--data-dir", "one"])
    data_dir.rename("two")
    main(["--resume", "--run-dir", "r", "--data-dir", "two"])
    assert "done in" in capsys.readouterr().out
    assert json.loads(Path("r/config.json").read_text())["data_dir"] == "one"
    # a folder that was completed meanwhile
    Path("r/summary.json").unlink()
    helpers.save_image(Path("two/tiny-imagenet-200/train/n01/images/new.JPEG"),
                       np.full((64, 64, 3), 9, np.uint8))
    error = fails(capsys, 2, main, ["--resume", "--run-dir", "r", "--data-dir", "two"])
    assert "training images, 6x64x64x3 then, 7x64x64x3 now" in error


def test_other_data_by_another_path(monkeypatch, capsys):
    half_done(monkeypatch)
    shutil.copy("tiny.npz", "other.npz")
    rewritten(y_train=lambda y: 2 - y)()
    Path("tiny.npz").rename("wrong.npz")
    capsys.readouterr()
    error = fails(capsys, 2, resume, MAIN, "--dataset", "wrong.npz")
    assert "than wrong.npz holds now (changed: training labels)" in error
    resume(MAIN, "--dataset", "other.npz")


def test_a_run_without_a_checkpoint_knows_its_data(finished_run, capsys):
    shutil.copytree(finished_run, "r")
    for name in ("summary.json", "checkpoint.pt"):
        Path("r", name).unlink()
    rewritten(x_train=one_pixel)()
    assert "(changed: training images)" in fails(capsys, 2, resume, MAIN)


def test_a_run_of_before_goes_on_with_a_note(monkeypatch, unbroken, capsys):
    half_done(monkeypatch)
    state = modelfile.read_tensors("r/checkpoint.pt")
    del state["data"]
    torch.save(state, "r/checkpoint.pt")
    config = json.loads(Path("r/config.json").read_text())
    del config["data"], config["commit_clean"]
    Path("r/config.json").write_text(json.dumps(config))
    shutil.copy("tiny.npz", "moved.npz")
    capsys.readouterr()
    error = fails(capsys, 2, resume, MAIN, "--dataset", "moved.npz")
    assert "r was made with --dataset tiny.npz" in error  # nothing says that it is the same
    resume(MAIN)
    out = capsys.readouterr().out
    assert "does not say which data it was made with" in out
    assert_same_run(unbroken(MAIN), "r")


def test_the_analysis_knows_its_network_and_its_data(finished_run, unbroken):
    """analysis.npz beside another model.pt is made again; of other data it is refused."""
    shutil.copytree(finished_run, "r")
    first = records.analysis_of(records.read_run("r"))
    made = Path("r/analysis.npz").stat().st_mtime_ns
    assert same_content(records.analysis_of(records.read_run("r")), first)
    assert Path("r/analysis.npz").stat().st_mtime_ns == made
    packed = modelfile.read("r/model.pt")
    packed["state_dict"]["fc.weight"] *= 0.5
    packed["state_dict"]["convs.0.bn.bias"] += 0.5
    files.save_tensors(Path("r/model.pt"), packed)
    second = records.analysis_of(records.read_run("r"))
    assert not same_content(second, first)
    assert same_content(records.analysis_of(records.read_run("r")), second)
    rewritten(x_test=one_pixel)()
    packed["state_dict"]["convs.0.bn.bias"] += 0.5
    files.save_tensors(Path("r/model.pt"), packed)
    with pytest.raises(records.Unfit, match="its data have changed: test images"):
        records.analysis_of(records.read_run("r"))
    Path("r/model.pt").unlink()  # then it counts as it is
    assert same_content(records.analysis_of(records.read_run("r")), second)


def test_runs_of_other_data_under_one_name_are_named(finished_run, monkeypatch):
    for name in ("old", "one", "two", "other", "elsewhere"):
        shutil.copytree(finished_run, name)

    def edit(name, change):
        config = json.loads(Path(name, "config.json").read_text())
        change(config)
        Path(name, "config.json").write_text(json.dumps(config))

    edit("old", lambda config: config.pop("data"))  # it does not say
    edit("other", lambda config: config["data"].update(y_test="30 0123"))
    edit("elsewhere", lambda config: (config.update(dataset="b.npz"),
                                      config["data"].update(x_train="9x8x8x1 0")))
    runs = {name: records.read_run(name) for name in ("old", "one", "two", "other", "elsewhere")}
    assert records.note_of_data([runs[name] for name in ("old", "one", "two", "elsewhere")]) == ""
    assert records.note_of_data(list(runs.values())).startswith(
        "note: 1 of 5 runs were made with other data under the same name: other (test labels). ")
    # by number and by time the same recordings make other frames
    edit("other", lambda config: config.update(event_split="time"))
    edit("two", lambda config: config.update(event_split="number"))
    two = [records.read_run(name) for name in ("two", "other")]
    assert records.note_of_data(two) == ""
    # what a run remembers of its data is no flag, and tells no runs apart
    assert "data" not in shlex.split(records.command_of(runs["one"]).replace("--dataset", ""))
    assert len(records.comparable_groups(list(runs.values()), records.WEIGHTS)) == 2


def test_the_commit_is_clean_or_not(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *words], check=True,
                       capture_output=True, cwd=tmp_path)

    monkeypatch.setattr(machine, "__file__", str(tmp_path / "harness" / "machine.py"))
    assert machine.versions()["commit_clean"] is None
    git("init")
    Path("a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-m", "one")
    found = machine.versions()
    assert len(found["commit"]) == 40 and found["commit_clean"] is True
    Path("mine.npz").write_bytes(b"")  # what git does not know is no part of the code
    assert machine.versions()["commit_clean"] is True
    Path("a.py").write_text("2")
    assert machine.versions()["commit_clean"] is False


# ---- data and flags from strangers ---------------------------------------------------------------


def refused(capsys, *given):
    """Return the one line of a command that must be refused, with nothing written."""
    before = helpers.everything_in(Path("."))
    error = fails(capsys, 2, importlib.import_module(MAIN).main, list(given))
    assert helpers.everything_in(Path(".")) == before
    assert error.startswith("prune.py: error: ") and ", expected " in error
    return error


@pytest.mark.parametrize("damage, text", helpers.BAD_ARRAYS.values(), ids=helpers.BAD_ARRAYS)
def test_bad_arrays(damage, text, capsys):
    arrays = helpers.good_arrays()
    damage(arrays)
    np.savez("bad.npz", **arrays)
    assert text in refused(capsys, "--dataset", "bad.npz")


@pytest.mark.parametrize("damage", helpers.BAD_FILES.values(), ids=helpers.BAD_FILES)
def test_bad_npz_files(damage, capsys):
    np.savez("bad.npz", **helpers.good_arrays())
    Path("bad.npz").write_bytes(damage(Path("bad.npz").read_bytes()))
    assert "bad.npz cannot be read" in refused(capsys, "--dataset", "bad.npz")


def test_objects_in_an_npz_file_are_not_unpickled(capsys):
    np.savez("bad.npz", **helpers.good_arrays() | dict(y_test=np.array([Code()], object)))
    refused(capsys, "--dataset", "bad.npz")
    assert not Path("was_run").exists()


@pytest.mark.parametrize("damage, _, text", helpers.BAD_FOLDERS.values(),
                         ids=helpers.BAD_FOLDERS)
def test_bad_folders(damage, _, text, capsys):
    helpers.make_folder(Path("images"))
    damage(Path("images"))
    assert f"images/{text}" in refused(capsys, "--dataset", "images")


@pytest.mark.parametrize("damage, _, text", helpers.BAD_TINY.values(), ids=helpers.BAD_TINY)
def test_bad_tiny_imagenet(damage, _, text, capsys):
    helpers.make_tiny_imagenet(Path("data"))
    damage(Path("data"))
    assert text in refused(capsys, "--dataset", "tiny-imagenet")


@pytest.mark.parametrize("file, damage", helpers.BAD_IDX.values(), ids=helpers.BAD_IDX)
def test_bad_idx_files(file, damage, capsys, offline):
    helpers.make_mnist(Path("data"))
    path = Path("data/MNIST/raw", file)
    path.write_bytes(damage(path.read_bytes()))
    assert "data/MNIST/raw" in refused(capsys, "--dataset", "mnist")


@pytest.mark.parametrize("name, file", [("cifar10", "data_batch_3"), ("cifar10", "test_batch"),
                                        ("cifar100", "train"), ("cifar100", "meta")])
def test_cifar_files_with_code_in_them(name, file, capsys, offline, monkeypatch):
    """Nothing is unpickled before its official md5 has matched."""
    _, folder, _ = helpers.make_cifar(monkeypatch, Path("data"), name)
    data.load(name, "data")
    (folder / file).write_bytes(pickle.dumps(Code()))
    loaded, load = [], pickle.load
    monkeypatch.setattr(pickle, "load", lambda source, **named: (
        loaded.append(Path(source.name).name), load(source, **named))[1])
    assert f"{folder} is damaged" in refused(capsys, "--dataset", name)
    assert not Path("was_run").exists() and file not in loaded


@pytest.mark.parametrize("damage", [lambda c: c[:-9], lambda c: b"", lambda c: c[:99] + c[98:]])
def test_bad_cifar_archives(damage, capsys, offline, monkeypatch):
    archive, folder, _ = helpers.make_cifar(monkeypatch, Path("data"), "cifar10")
    archive.write_bytes(damage(archive.read_bytes()))
    assert "is not complete and could not be downloaded" in refused(capsys, "--dataset", "cifar10")


@pytest.mark.parametrize("given, words", [
    ("--save-every -1", "--save-every is -1, expected a finite number of at least 0"),
    ("--save-every nan", "--save-every is nan, expected"),
    ("--save-every often", "--save-every is often, expected"),
    ("--dataset tiny.npz --train-limit 2", "--train-limit is 2, expected 3"),
    ("--dataset tiny.npz --batch-size 61", "--batch-size is 61, but tiny.npz has 60"),
    ("--dataset tiny.npz --crop 8 --batch-size 10", "--crop is 8, expected less than the 8"),
    ("--dataset tiny.npz --model resnet19 --width 0.05 --time-steps 1 --batch-size 59",
     "--batch-size is 59, which leaves a batch of one image of 8 pixels, and --time-steps 1: one"),
    ("--dataset tiny.npz --model resnet19 --width 0.05 --time-steps 1 --batch-size 1",
     "--batch-size is 1, which leaves a batch of one image"),
])
def test_bad_flags(given, words, capsys):
    assert words in refused(capsys, *given.split())


def test_a_last_batch_of_one_image_with_more_than_one_value(capsys):
    """With T = 2, or on a larger map, batch normalisation has something to do."""
    for given in ("--model resnet19 --width 0.05 --time-steps 2", "--time-steps 1"):
        run(MAIN, *given.split(), "--batch-size", 59, "--run-dir", "r", "--overwrite",
            "--interval", 2, "--epochs-finetune", 0)


def test_the_real_commands():
    """As typed: exit code 2, one line, no traceback, nothing written."""
    Path("bad.pt").write_bytes(pickle.dumps(Code()))
    np.savez("bad.npz", x_train=np.zeros((3, 8, 8)))
    before = helpers.everything_in(Path("."))
    commands = {"prune_structured": "--dataset bad.npz", "prune_lottery": "--init bad.pt",
                "prune_sdsnn": "--save-every never", "prune_pq": "--dataset absent"}
    started = {script: subprocess.Popen(
        [sys.executable, str(ROOT / f"{script}.py"), *given.split()], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE) for script, given in commands.items()}
    for script, process in started.items():
        out, error = process.communicate(timeout=120)
        assert process.returncode == 2 and not out and error.count("\n") == 1, error
        assert error.startswith(f"{script}.py: error: ") and "expected" in error
    assert helpers.everything_in(Path(".")) == before


def test_runs_of_other_sizes_have_folders_of_their_own():
    parse = importlib.import_module(MAIN).parse_args
    names = [parse(given.split()).run_dir for given in (
        "", "--width 0.5", "--train-limit 500", "--time-steps 2", "--smoke", "--smoke --width 0.1",
        "--width 0.5 --train-limit 500 --time-steps 2", "--dataset cifar10 --time-steps 4")]
    assert len(set(names)) == len(names)
    assert names[0] == "runs/fashion-mini-small-criticality-0.9-r0.5-seed0"
    assert names[4] == "runs/smoke-fashion-mini-small-criticality-0.9-r0.5-seed0"
    assert names[6] == ("runs/fashion-mini-small-criticality-0.9-r0.5-width0.5-limit500-time2"
                        "-seed0")
    assert parse("--time-steps 4 --width 1".split()).run_dir == names[0]
    for script in SHORT:
        module = importlib.import_module(script)
        name = module.parse_args(["--width", "0.5"]).run_dir
        assert name == module.parse_args([]).run_dir.replace("-seed0", "-width0.5-seed0")


# ---- kills at random moments ---------------------------------------------------------------------

LONGER = {
    "prune_unstructured": "--train-limit 500 --width 0.25 --batch-size 25 --epochs-prune 3 "
                          "--epochs-finetune 2 --interval 4",
    "prune_structured": "--train-limit 500 --width 0.25 --batch-size 25 --epochs-pretrain 3 "
                        "--epochs-finetune 2"}


def no_preparation():
    speedup = metrics.speedup  # 2 s of timing both networks would be most of so short a run
    metrics.speedup = lambda *nets, seconds: speedup(*nets, seconds=0)


def timed(script, words):
    """Return the seconds that a run takes to its end, in a process of its own."""
    started, process = time.monotonic(), start(script, words, no_preparation)
    process.join()
    assert process.exitcode == 0, Path("out.txt").read_text()
    return time.monotonic() - started


def kills(count, seed):
    """Kill runs of the two main scripts at random moments, go on, compare; say what came of it."""
    moments = random.Random(seed)
    for script, given in LONGER.items():
        words = [*given.split(), "--save-every", "0.005", "--run-dir"]
        timed(script, [*words, "whole", "--overwrite"])  # the first one warms up
        whole = timed(script, [*words, "whole", "--overwrite"])
        print(f"{script}: {whole:.1f} s in all", flush=True)
        for kill in range(count):
            exit_code = 0
            while exit_code == 0:  # on a busy machine a run may have ended before
                shutil.rmtree("r", ignore_errors=True)
                delay = moments.uniform(0.05, 1) * whole
                process = start(script, [*words, "r"], no_preparation)
                process.join(delay)
                process.kill()
                process.join()
                exit_code = process.exitcode
            state = files.read_checkpoint("r")
            found = sorted(path.name for path in Path("r").glob("*.tmp"))
            timed(script, [*words, "r", "--resume"])
            Path("r/.lock").unlink(missing_ok=True)  # of a run that was killed when it was finished
            assert_same_run("whole", "r")
            print(f"  kill {kill + 1:>2} after {delay:5.2f} s (exit code {exit_code}), saved "
                  f"epoch, step, iteration: {state['position'] if state else 'none'}, unfinished "
                  f"files: {', '.join(found) or 'none'}; resumed: equal", flush=True)
        shutil.rmtree("whole")
        shutil.rmtree("r")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each of the two scripts")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        sys.path.insert(0, str(ROOT))
        os.chdir(place)
        kills(options.kills, options.seed)
