"""How long a run takes and says so, --minutes, --optimizer and --schedule, --tensorboard."""
import importlib
import json
import os
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import compare
import models
import prune_gradr
import prune_unstructured
import training
from harness import jobs, meters, planning, presets, processes, records, runfolder
from harness.planning import Length, in_proportion, with_interval
from harness.runfolder import Run, span
from helpers import assert_same_run, lines, one_line, random_net, refused, stop_after
from masks import Masks, momenta

pytestmark = pytest.mark.usefixtures("few_test_images")
ROOT = Path(__file__).parent.parent
TINY = ["--train-limit", "100", "--width", "0.2", "--batch-size", "25"]  # 4 steps an epoch
SHORT = [*TINY, "--epochs-prune", "2", "--epochs-finetune", "1", "--interval", "3"]
# 4 steps of 0.1 s and an evaluation of 0.1 s: half a second an epoch
QUICK = Length(load=1.0, step=0.1, evaluation=0.1, steps=4, epochs=12)


@pytest.fixture(autouse=True)
def the_name_of_the_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prune_unstructured.py"])


def run(*given, script=prune_unstructured):
    return script.main([*map(str, given)])


def resolved(script, *given):
    return importlib.import_module(f"prune_{script}").parse_args([*map(str, given)])


def test_an_evaluation_of_every_few_epochs_and_at_the_end_of_each_stage():
    """12 epochs of 4 steps; 12 / 4 evaluations and one of each stage, but no more than epochs."""
    once = 1.0 + planning.RESULTS + 4 * 0.1
    assert QUICK.seconds(12) == pytest.approx(once + 12 * 0.4 + 12 * 0.1)
    seldom = QUICK._replace(evaluate_every=4, stages=2)
    assert seldom.seconds(12) == pytest.approx(once + 12 * 0.4 + 5 * 0.1)
    assert seldom.seconds(1) == pytest.approx(once + 0.4 + 0.1)


def minutes_for(epochs, length=QUICK):
    """The --minutes into which so many epochs fit, and not one more."""
    return (length.seconds(epochs + 0.5) / planning.PLANNED) / 60


@pytest.fixture
def tried(monkeypatch):
    """Let a trial measure QUICK. The commands that were tried."""
    found = []
    monkeypatch.setattr(planning, "measure",
                        lambda words, environment=None: found.append(words) or QUICK)
    return found


# ---- how long a run takes ------------------------------------------------------------------------


def test_the_first_line_after_the_header_says_how_long_it_takes(capsys):
    run(*SHORT, "--run-dir", "r")
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].startswith("epochs: ")
    # the update after step 3 ends the measuring: 9 of 12 steps are left, and 3 evaluations
    assert printed[3].startswith("takes about ")
    assert ": 9 steps of " in printed[3] and "3 evaluations of " in printed[3]
    assert sum("takes about" in line for line in printed) == 1


def test_a_resumed_run_says_what_is_left(monkeypatch, capsys):
    stop_after(5, monkeypatch, run, *SHORT, "--run-dir", "r")
    capsys.readouterr()
    run("--resume", "--run-dir", "r")
    printed = capsys.readouterr().out.splitlines()
    assert printed[3] == "resumed after iteration 5 of 12"
    line, = (line for line in printed if line.startswith("takes about "))
    assert ": 4 steps of " in line and "2 evaluations of " in line  # at the end of the epoch


def test_measuring_changes_no_bit(monkeypatch, once):
    """It comes within the step of the first update, and evaluates."""
    given = [*SHORT, "--encoding", "rate"]
    measured = once(run, *given)
    monkeypatch.setattr(Run, "_say_length", lambda self: None)
    run(*given, "--run-dir", "r")
    assert_same_run("r", measured)


def test_a_long_run_on_a_cpu_is_told_what_makes_it_shorter(monkeypatch, capsys):
    monkeypatch.setattr(runfolder, "LONG_SECONDS", 0)
    run(*SHORT, "--run-dir", "r")
    out = capsys.readouterr().out
    assert "on this machine; --train-limit, --width, or a GPU makes it shorter" in out


def test_progress_is_printed_where_there_is_no_terminal(monkeypatch, capsys):
    run(*SHORT, "--run-dir", "r")
    assert "iteration 2 of 12" not in capsys.readouterr().out
    monkeypatch.setattr(runfolder, "PROGRESS_SECONDS", 0)
    run(*SHORT, "--run-dir", "r", "--overwrite")
    out = capsys.readouterr().out
    assert "  prune 1/2, step 2 of 4; iteration 2 of 12, left 0:0" in out
    assert "  finetune 1/1, step 4 of 4; iteration 12 of 12, left 0:00" in out


@pytest.mark.parametrize("seconds, words", [
    (0.085, "85 ms"), (0.0042, "4.2 ms"), (1.24, "1.2 s"), (40, "40 s"), (210, "3.5 min"),
    (3 * 3600, "3.0 h"), (19 * 86400, "19 days"), (3e9, "34,722 days")])
def test_times_in_words(seconds, words):
    assert span(seconds) == words


def test_the_pace_leaves_out_the_first_steps(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(meters.time, "monotonic", lambda: clock[0])

    def steps(pace, *seconds):
        for passed in seconds:
            clock[0] += passed
            if pace.step():
                return

    pace = meters.Pace(torch.device("cpu"))
    steps(pace, 2, 1, 1, *[0.5] * 20)
    assert pace.seconds == 0.5
    pace = meters.Pace(torch.device("cpu"))  # within a minute where a step takes 14 s
    began = clock[0]
    steps(pace, *[14] * 9)
    assert pace.seconds == 14 and clock[0] - began <= 60
    pace = meters.Pace(torch.device("cpu"))  # an epoch of two steps
    steps(pace, 3, 1)
    pace.stop()
    assert pace.seconds == 2
    waited = []  # of each accelerator: it works on while the clock is read
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    steps(meters.Pace(torch.device("mps")), 2, 1, 1, *[0.5] * 20)
    assert waited == [torch.device("mps")] * 2


# ---- --minutes -----------------------------------------------------------------------------------


def test_a_run_of_some_minutes_is_the_run_of_these_epochs(tried, monkeypatch, capsys, once):
    monkeypatch.setattr(presets, "ROWS", presets.ROWS | dict(default=presets.ROWS["default"] | dict(
        weights=dict(epochs_prune=8, epochs_finetune=4, interval=6))))
    run(*TINY, "--minutes", minutes_for(3), "--run-dir", "r")
    config = json.loads(Path("r/config.json").read_text())
    # 8 : 4 epochs and an interval of 6 become 2 : 1 and, to a quarter of the steps, 2
    assert (config["epochs_prune"], config["epochs_finetune"], config["interval"]) == (2, 1, 2)
    assert config["minutes"] == pytest.approx(minutes_for(3))
    out = capsys.readouterr().out
    assert "epochs: prune 2, finetune 1, 4 steps each" in out
    assert ": these epochs and --interval 2 were chosen for it" in out
    run(*SHORT[:-1], 2, "--run-dir", "flags")
    assert_same_run("r", "flags")
    assert len(tried) == 1 and tried[0][1] == str(ROOT / "prune_unstructured.py")


def test_a_resumed_run_keeps_what_it_chose(tried, monkeypatch):
    given = [*TINY, "--interval", 2, "--minutes", f"{minutes_for(3):.4f}"]
    stop_after(5, monkeypatch, run, *given)
    folder, = Path("runs").iterdir()
    assert f"-minutes{minutes_for(3):.3g}"[:12] in folder.name
    monkeypatch.setattr(planning, "try_out", None)  # to call it fails
    run("--resume", *given)
    run("--resume", "--run-dir", folder)
    assert [row["stage"] for row in lines(folder, "metrics")] == ["prune", "prune", "finetune"]


def test_minutes_are_refused(tried, monkeypatch, capsys):
    for given in (["--epochs-prune", 2], ["--epochs-finetune", 0], ["--smoke"]):
        error = refused(capsys, run, *TINY, "--minutes", 1, *given)
        assert f"--minutes and {given[0]} exclude each other" in error
    error = refused(capsys, run, *TINY, "--minutes", 0.02)
    assert "--minutes is 0.02, expected at least 0.2 on this machine, for the fewest epochs " \
           "(prune 1, finetune 1). Raise it" in error
    monkeypatch.setattr(processes, "size", lambda: 2)
    assert "torchrun started 2 processes" in refused(capsys, run, *TINY, "--minutes", 1)
    assert not Path("runs").exists()


def test_a_run_that_is_there_is_not_tried(tried, capsys):
    run(*SHORT, "--run-dir", "r")
    assert "holds a run already" in refused(capsys, run, *TINY, "--minutes", 1, "--run-dir", "r")
    assert not tried


@pytest.mark.parametrize("script, epochs", [
    ("unstructured", dict(epochs_prune=8, epochs_finetune=4)),
    ("structured", dict(epochs_pretrain=6, epochs_finetune=6)),
    ("greg", dict(epochs_pretrain=5, epochs_prune=2, epochs_finetune=5)),
    ("sca", dict(epochs_prune=6, epochs_finetune=6)),
    ("lottery", dict(epochs_prune=8, epochs_finetune=4)),
    ("sdsnn", dict(epochs_prune=8, epochs_finetune=4)),
    ("ndsnn", dict(epochs_prune=8, epochs_finetune=4)),
    ("upr", dict(epochs_prune=8, epochs_finetune=4)),
    ("pq", dict(epochs_prune=9, epochs_finetune=3))])
def test_all_scripts_choose_in_their_own_proportion(script, epochs, tried, monkeypatch):
    usual = presets.of("fashion-mini", script)
    length = QUICK._replace(epochs=sum(planning.epochs_in(usual).values()))
    monkeypatch.setattr(planning, "try_out", lambda words, environment=None: length)
    args = resolved(script, "--minutes", minutes_for(12))
    assert planning.epochs_in(vars(args)) == epochs


def test_what_a_method_needs_is_the_least(tried, capsys):
    """SD-SNN needs 4 structure epochs."""
    assert resolved("sdsnn", "--minutes", minutes_for(6)).epochs_prune == 4
    error = refused(capsys, resolved, "sdsnn", "--minutes", minutes_for(4))
    assert "for the fewest epochs (prune 4, finetune 2)" in error


def test_epochs_in_proportion():
    usual = dict(epochs_prune=200, epochs_finetune=300)
    assert in_proportion(usual, 2) == dict(epochs_prune=1, epochs_finetune=1)
    assert in_proportion(usual, 5) == dict(epochs_prune=2, epochs_finetune=3)
    assert in_proportion(usual, 1000) == dict(epochs_prune=400, epochs_finetune=600)
    assert in_proportion(dict(a=0, b=3), 5) == dict(a=0, b=5)
    for total in range(3, 60):
        chosen = in_proportion(dict(a=8, b=4, c=8), total)
        assert sum(chosen.values()) == total and min(chosen.values()) >= 1
        assert all(abs(chosen[key] - total * share) < 1.01
                   for key, share in dict(a=0.4, b=0.2, c=0.4).items())
    assert in_proportion(dict(a=1, b=1, c=98), 5) == dict(a=1, b=1, c=3)
    assert in_proportion(dict(a=1, b=1, c=98), 10**9)["c"] == 98 * 10**7
    for most in (3, 4, 7, 1000, 10**9):
        assert planning.largest(lambda number: number <= most, 3) == most
    assert planning.largest(lambda number: False, 3) == 3
    # 39 updates in 200 epochs stay 39
    chosen = with_interval(dict(epochs_prune=4), dict(epochs_prune=200, interval=2000))
    assert chosen["interval"] == 40 and 391 * 4 // 40 == 391 * 200 // 2000
    assert with_interval(dict(epochs_prune=1), dict(epochs_prune=99, interval=2))["interval"] == 1


def commands(*names):
    """plan(epochs) of runs of these scripts, each of which is a method."""
    def plan(epochs):
        return [jobs.Job(Path("out", name), [
            "python", f"{name}.py", "--epochs-prune", str(epochs["epochs_prune"]),
            "--epochs-finetune", str(epochs["epochs_finetune"])], name) for name in names]
    return plan


EPOCHS = dict(epochs_prune=8, epochs_finetune=4)
KEPT = Path("out/minutes.json")


def choose(plan, minutes, at_a_time=1, **asked):
    """The epochs that planning.choose_for_all returns."""
    chosen = planning.choose_for_all(plan, EPOCHS, dict(minutes=minutes) | asked, KEPT, at_a_time)
    return chosen["epochs_prune"], chosen["epochs_finetune"]


def test_one_budget_for_all_methods(tried, monkeypatch, capsys):
    plan = commands("a", "b", "c", "a")
    assert choose(plan, 4 * minutes_for(6)) == (4, 2)
    assert len(tried) == 3  # one trial a method
    assert "4 + 2 epochs for each of 4 runs, about 0 min in all" in capsys.readouterr().out
    assert choose(plan, 4 * minutes_for(6)) == (4, 2)
    assert len(tried) == 3  # the choice is kept, and said
    assert "4 + 2 epochs for each run, as out/minutes.json says" in capsys.readouterr().out
    Path("out/a").mkdir()
    Path("out/a/config.json").touch()
    with pytest.raises(ValueError, match="json is for --minutes .*, this command has --minutes 9, "):
        choose(plan, 9)
    KEPT.unlink()
    assert choose(plan, 2 * minutes_for(6), at_a_time=2) == (4, 2)
    KEPT.unlink()
    with pytest.raises(ValueError, match="expected at least 1 on .* for 4 runs of 4 [+] 1 epochs"):
        choose(plan, 0.1)
    assert not KEPT.exists()
    # an interval of 22 steps needs 6 epochs of 4
    monkeypatch.setattr(planning, "measure", lambda *given: QUICK._replace(interval=22))
    assert choose(plan, 4 * minutes_for(8.5)) == (6, 2)


def test_a_kept_choice_is_for_what_was_asked(tried, capsys):
    plan, minutes = commands("a", "b"), 2 * minutes_for(6)
    asked = dict(seeds=2, methods=["a", "b"], jobs=1, width=None, dataset="mnist")
    assert choose(plan, minutes, **asked) == (4, 2)
    # nothing has begun: it is chosen anew
    assert choose(plan, minutes, **asked | dict(width=0.5)) == (4, 2) and len(tried) == 4
    assert ("note: out/minutes.json is for no --width, this command has --width 0.5. No run has "
            "begun: the epochs are chosen anew\n") in capsys.readouterr().out
    Path("out/a").mkdir()
    Path("out/a/config.json").touch()
    for flag, value in dict(seeds=3, methods=["a"], jobs=2, width=1.0, dataset="x.npz").items():
        with pytest.raises(ValueError, match=f"this command has --{flag} .*, expected the same. "
                                             f".* --epochs-prune 4 --epochs-finetune 2 in place"):
            choose(plan, minutes, **asked | dict(width=0.5) | {flag: value})
    KEPT.write_text(json.dumps(dict(minutes=minutes, epochs_prune=7, epochs_finetune=1)))
    assert choose(plan, minutes, **asked) == (7, 1)  # of an older version: it does not say


@pytest.mark.parametrize("text", ["{}", "[]", "", "four", "3", "\xff", '{"minutes": 3}',
                                  '{"minutes": 3, "epochs_prune": "4", "epochs_finetune": 2}',
                                  '{"minutes": null, "epochs_prune": 4, "epochs_finetune": 2}'])
def test_a_damaged_choice_is_one_line(text, capsys):
    KEPT.parent.mkdir()
    KEPT.write_text(text, encoding="latin-1")
    error = refused(capsys, compare.main, ["--minutes", "3", "--out", "out", "--methods", "gmp"])
    assert "error: out/minutes.json is damaged, expected the epochs that --minutes " in error
    assert KEPT.read_text(encoding="latin-1") == text


@pytest.mark.parametrize("names, at_a_time, trials", [
    ("abc", 1, "abc"), ("abcde", 2, "abcdea"), ("aaaa", 4, "aaaa"), ("ab", 4, "ab")])
def test_trials_run_side_by_side_as_the_runs_will(names, at_a_time, trials, monkeypatch):
    started, side = [], min(at_a_time, len(names))
    monkeypatch.delenv("OMP_NUM_THREADS")  # of conftest.py
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    together = threading.Barrier(side)

    def measured(words, environment):
        together.wait(timeout=20)  # as many as the runs will be
        started.append(Path(words[1]).stem)
        assert int(environment["OMP_NUM_THREADS"]) == 6 // at_a_time
        return QUICK

    monkeypatch.setattr(planning, "measure", measured)
    choose(commands(*names), 60, at_a_time)
    assert sorted(started) == sorted(trials)


def test_each_method_is_tried(tried, monkeypatch):
    """Also those that share a script; their lengths are told apart."""
    args = compare.parse_args("--methods imp eb et greg1 greg2 gradr deepr --out out".split())

    def plan(epochs):
        return compare.plan(jobs.with_flags(args, epochs))

    planning.choose_for_all(plan, EPOCHS, dict(minutes=600), KEPT, 2)
    methods = [words[words.index("--method") + 1] for words in tried]
    assert {*methods} == {"imp", "eb", "et", "greg1", "greg2", "gradr", "deepr"}
    slow = QUICK._replace(step=3 * QUICK.step)
    trials = {"a": (QUICK, 1), "b": (slow, 2)}
    planned = commands("a", "b", "a")(EPOCHS)
    one, other = QUICK.seconds(12), slow.seconds(24)
    assert planning.seconds_of_all(planned, trials, 1) == pytest.approx(2 * one + other)
    assert planning.seconds_of_all(planned, trials, 2) == pytest.approx(max(2 * one, other))


def test_trials_that_fail_together_are_one_line(monkeypatch, capsys):
    def failing(words, environment):
        raise planning.Failed("prune_x.py: error: no GPU\n", 2)

    monkeypatch.setattr(planning, "measure", failing)
    assert "no GPU" in refused(capsys, choose, commands(*"abcd"), 60, 2)


def test_the_epochs_of_all_stages_are_counted(monkeypatch, capsys):
    """GReg's own stage is scaled too, and what is printed is the time of the commands."""
    def measured(words, environment=None):
        return QUICK._replace(epochs=planning.epochs_of(words))

    monkeypatch.setattr(planning, "measure", measured)
    args = compare.parse_args("--dataset cifar100 --methods gmp greg1 --seeds 1 --out o".split())

    def plan(epochs):
        return compare.plan(jobs.with_flags(args, epochs))

    usual = [script_of(job.words) for job in plan(dict(epochs_prune=None, epochs_finetune=None))]
    assert [planning.epochs_in(vars(one)) for one in usual] == [
        dict(epochs_prune=200, epochs_finetune=300),
        dict(epochs_pretrain=160, epochs_prune=282, epochs_finetune=160)]
    chosen = planning.choose_for_all(plan, dict(epochs_prune=200, epochs_finetune=300),
                                     dict(minutes=1), Path("o/minutes.json"))
    gmp, greg = [script_of(job.words) for job in plan(chosen)]
    of_greg = planning.epochs_in(vars(greg))
    assert of_greg == dict(epochs_pretrain=gmp.epochs_prune, epochs_finetune=gmp.epochs_prune,
                           epochs_prune=round(282 / 160 * gmp.epochs_prune))
    needed = sum(QUICK.seconds(sum(planning.epochs_in(vars(one)).values()))
                 for one in (gmp, greg))
    assert 0.8 * 54 < needed <= 54 and "about 1 min in all" in capsys.readouterr().out


def script_of(words):
    """The flags of a command, as its script reads them."""
    return importlib.import_module(Path(words[1]).stem).parse_args(words[2:])


def test_words_of_a_trial():
    assert planning.without(["--minutes", "3", "--lr", "1", "--resume", "--run-dir=x", "--flip",
                             "--overwrite", "--minutes=2", "--run-dir", "y"]) == [
        "--lr", "1", "--flip"]


def test_a_trial(tmp_path):
    """A process of its own: it measures, and leaves nothing."""
    script = str(ROOT / "prune_structured.py")
    length = planning.try_out([sys.executable, script, *TINY, "--minutes", "3"])
    assert length.steps == 4 and length.epochs == 16
    assert 0 < length.step < length.load and length.evaluation > 0
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_fails_says_why(capfd):
    script = str(ROOT / "prune_unstructured.py")
    with pytest.raises(SystemExit) as stop:
        planning.try_out([sys.executable, script, "--dataset", "nowhere.npz"])
    assert stop.value.code == 2
    assert "prune_unstructured.py: error: nowhere.npz" in one_line(capfd)


# ---- --optimizer and --schedule ------------------------------------------------------------------


def test_schedules():
    for step in range(8):
        assert training.lr_at("cosine", 0.3, step, 8) == training.cosine(0.3, step, 8)
        assert training.lr_at("step", 0.3, step, 8) == training.step_down(0.3, step, 8)
        assert training.lr_at("constant", 0.3, step, 8) == 0.3


@pytest.mark.parametrize("script", presets.LENGTH)
def test_each_script_has_optimizer_and_schedule(script, capsys):
    usual, adam = resolved(script), resolved(script, "--optimizer", "adam")
    adamw = resolved(script, "--optimizer", "adamw", "--schedule", "constant")
    assert usual.optimizer == ("adam" if script == "gradr" else "sgd")
    assert usual.schedule == ("step" if script in ("structured", "greg") else "cosine")
    assert (adam.lr, adam.weight_decay) == (1e-3, 0.0)
    assert (adamw.lr, adamw.weight_decay) == (2.44e-4 if script == "sdsnn" else 1e-3, 0.01)
    given = resolved(script, "--optimizer", "adamw", "--lr", 0.5, "--weight-decay", 0.2)
    assert (given.lr, given.weight_decay) == (0.5, 0.2)
    assert adamw.run_dir == usual.run_dir.replace("-seed0", "-adamw-constant-seed0")
    error = refused(capsys, resolved, script, "--optimizer", "adam", "--momentum", 0.5)
    assert "--momentum is 0.5, which --optimizer adam does not use" in error


def test_sgd_of_grad_r_is_named_as_before():
    args = resolved("gradr", "--optimizer", "sgd")
    assert args.run_dir == "runs/fashion-mini-small-gradr-0.9-sgd-seed0"
    assert (args.lr, args.weight_decay, args.momentum) == (0.1, 5e-4, 0.9)
    assert resolved("gradr", "--dataset", "cifar10").lr == 1e-4


@pytest.mark.parametrize("script, given, by", [
    ("gradr", ["--mode", "paper"], "--mode paper"),
    ("sdsnn", ["--mode", "official", "--optimizer", "adam"], "--mode official with --optimizer ad"),
    ("unstructured", ["--as-published", "cosine"], "--as-published cosine sets it")])
def test_a_schedule_that_is_not_used_is_refused(script, given, by, capsys):
    error = refused(capsys, resolved, script, *given, "--schedule", "step")
    assert "--schedule is step" in error and by in error
    assert resolved(script, *given, "--schedule", "cosine").schedule == "cosine"


def test_the_runs_that_are_compared_agree_in_both():
    for same in records.SAME.values():
        assert {"optimizer", "schedule"} <= set(same)
    earlier = dict(epochs_prune=8, event_split=None)
    assert presets.of_earlier(earlier)["optimizer"] == "sgd"
    assert presets.of_earlier(earlier)["schedule"] == "cosine"
    assert presets.of_earlier(dict(epochs_pretrain=8))["schedule"] == "step"
    assert presets.of_earlier(earlier | dict(optimizer="adam"))["optimizer"] == "adam"
    config = vars(resolved("structured")) | dict(script="prune_structured", minutes=3.0)
    words = records.command_of(SimpleNamespace(
        config=config, pruned=records.CHANNELS, script="prune_structured"))
    assert "--schedule" not in words and "--minutes" not in words


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_dead_weights_stay_dead_under_adam(name):
    """With decay, and with gradients on dead weights; what comes back makes a first step of the
    usual size, since its second moment has gone on."""
    net = random_net("small", 0.3, dtype=torch.float32)
    args = SimpleNamespace(optimizer=name, lr=1e-2, weight_decay=0.1, device="cpu")
    optimizer, masks = training.optimizer(args, net.parameters()), Masks(net)
    masks.prune(masks.total // 10, masks.magnitudes(), torch.Generator().manual_seed(0))
    masks.rescue_empty_layers()
    masks.apply(optimizer)
    for seed in range(40):
        torch.manual_seed(seed)
        for parameter in net.parameters():
            parameter.grad = torch.randn_like(parameter)
        training.descend(optimizer, args.lr)
        weight = next(iter(masks.weights.values()))
        dead = ~next(iter(masks.alive.values()))
        assert weight[dead].any()  # the step has moved them
        masks.apply(optimizer)
        assert masks.violation(optimizer) is None
        assert not weight[dead].any() and not momenta(optimizer, weight)[0][dead].any()
    assert (optimizer.state[weight]["exp_avg_sq"][dead] > 0).all()
    masks.regenerate(50, ~masks.flat, [torch.rand(masks.total)], None)
    before = masks.magnitudes()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    training.descend(optimizer, args.lr)
    masks.apply(optimizer)
    back = masks.flat & (before == 0)
    assert 0 < masks.magnitudes()[back].max() < 2 * args.lr


@pytest.mark.parametrize("module, given", [
    ("unstructured", SHORT), ("gradr", [*SHORT, "--method", "deepr"]),
    ("structured", [*TINY, "--epochs-pretrain", 1, "--epochs-finetune", 1]),
    ("lottery", [*TINY, "--rounds", 1, "--epochs-prune", 2, "--epochs-finetune", 1])])
def test_runs_by_adamw(module, given, monkeypatch):
    """With decay; exactly as many weights are alive as asked for. A resumed run is the same."""
    script = importlib.import_module(f"prune_{module}")
    given = [*given, "--optimizer", "adamw", "--schedule", "constant", "--weight-decay", 0.3]
    summary = run(*given, "--run-dir", "r", script=script)
    rows = lines("r", "metrics")
    assert {row["lr"] for row in rows} == {1e-3}
    if module != "structured":
        weights = sum(layer["weights"] for layer in summary["layers"])
        alive = sum(layer["alive"] for layer in summary["layers"])
        assert alive == weights - round(0.9 * weights)
        assert sum(int(mask.sum()) for mask in models.load("r/model.pt").masks.values()) == alive
    stop_after(5, monkeypatch, lambda: run(*given, "--run-dir", "again", script=script))
    run("--resume", "--run-dir", "again", script=script)
    assert_same_run("r", "again")


def test_decay_of_adamw_passes_by_the_moments_of_a_strength():
    net = random_net("small", 0.2, dtype=torch.float32)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    wires = prune_gradr.Connections(Masks(net), "adamw", decay=0.1)
    before = wires.theta.clone()
    prune_gradr.fixed_mask_step(wires, wires.gradients(), 0.5)
    assert torch.allclose(wires.theta, before * (1 - 0.5 * 0.1), rtol=1e-6)
    assert not wires.first.any() and not wires.second.any()


def test_the_prior_is_scaled_by_the_schedule():
    """A prior moves a strength as far under each schedule."""
    args = dict(optimizer="sgd", sparsity=0.9, lr=0.1)
    moved = []
    for schedule in training.SCHEDULES:
        rates = sum(training.lr_at(schedule, 0.1, step, 4000) for step in range(4000))
        assert training.sum_of_rates(schedule, 0.1, 4000) == pytest.approx(rates, rel=1e-3)
        moved.append(rates * prune_gradr.default_prior(
            SimpleNamespace(**args, schedule=schedule), 4000))
    assert moved == pytest.approx(moved[:1] * 3, rel=1e-3)


# ---- --tensorboard -------------------------------------------------------------------------------


def test_without_the_package_it_is_one_line(monkeypatch, capsys):
    from harness import board

    monkeypatch.setattr(board, "find_spec", lambda name: None)
    error = refused(capsys, run, *SHORT, "--tensorboard")
    assert "Install it by: python -m pip install tensorboard" in error
    assert not Path("runs").exists()


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_the_numbers_of_the_logs(monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = [*SHORT, "--save-every", 0, "--tensorboard", "--run-dir", "r"]
    stop_after(7, monkeypatch, run, *given)
    run("--resume", "--run-dir", "r")
    assert len(list(Path("r").glob("events.out.*"))) == 1
    found = EventAccumulator("r", size_guidance={"scalars": 0})
    found.Reload()

    def curve(tag):
        return [(event.step, event.value) for event in found.Scalars(tag)]

    for name, key in (("metrics", "test_accuracy"), ("metrics", "lr"), ("updates", "pruned")):
        assert curve(f"{name}/{key}") == [(row["iteration"], pytest.approx(row[key], rel=1e-6))
                                          for row in lines("r", name)]
    layer = lines("r", "updates")[0]["layers"][0]
    assert curve(f"layers/alive/{layer['name']}")[0] == (3, layer["alive"])
    run(*SHORT, "--run-dir", "r", "--overwrite")
    assert not list(Path("r").glob("events.out.*"))
