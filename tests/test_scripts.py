"""Each script from its command line, on tiny budgets: files, resume, wrong flags."""
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import helpers
import modelfile
import models
import prune_unstructured
import training
from harness import meters, runfolder
from helpers import TIMES, assert_same_run, lines, one_line, refused, stop_after
from masks import Masks

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("few_test_images")
SHORT = ["--train-limit", "400", "--epochs-prune", "2", "--epochs-finetune", "1", "--interval", "6",
         "--width", "0.25", "--batch-size", "25"]  # 16 steps an epoch, 5 updates


@pytest.fixture(autouse=True)
def the_name_of_the_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prune_unstructured.py"])


def run(*given, short=True):
    return prune_unstructured.main([*(SHORT if short else []), *map(str, given)])


def command(*given):
    return [sys.executable, str(ROOT / "prune_unstructured.py"), *SHORT, *given]


def wrong(capsys, *given, code=2, short=True):
    """Run a command that must fail; return its one line on stderr."""
    return refused(capsys, partial(run, short=short), *given, code=code)


# ---- what a run leaves ---------------------------------------------------------------------------


def test_a_run_and_its_folder(capsys):
    summary = run("--run-dir", "r", "--sparsity", 0.8)
    assert {path.name for path in Path("r").iterdir()} == {
        "config.json", "metrics.jsonl", "updates.jsonl", "checkpoint.pt", "model.pt",
        "compact.pt", "summary.json", "curves.png"}
    assert json.loads(Path("r/summary.json").read_text()) == summary
    assert list(summary) == runfolder.SUMMARY_KEYS
    assert (summary["method"], summary["dataset"], summary["regen"]) == (
        "criticality", "fashion-mini", 0.5)
    total = sum(layer["weights"] for layer in summary["layers"])
    alive = sum(layer["alive"] for layer in summary["layers"])
    assert alive == total - round(0.8 * total) and summary["sparsity"] == 1 - alive / total
    assert summary["test_accuracy"] == lines("r", "metrics")[-1]["test_accuracy"]  # not the best
    assert summary["pruned_accuracy"] == lines("r", "metrics")[1]["test_accuracy"]
    assert 0 < summary["survived_by_regeneration"] <= 1 and summary["sops"] > 0
    rows = lines("r", "metrics")
    assert [(row["stage"], row["epoch"], row["iteration"]) for row in rows] == [
        ("prune", 1, 16), ("prune", 2, 32), ("finetune", 3, 48)]
    assert set(rows[0]) == {"stage", "epoch", "iteration", "lr", "train_loss", "train_accuracy",
                            "test_loss", "test_accuracy", "sparsity", "firing_rate", "seconds"}
    densities = [1.0] + [1 - row["sparsity"] for row in rows[:2]]
    assert summary["training_cost"] == pytest.approx(sum(densities) / 3)

    updates = lines("r", "updates")
    assert [row["iteration"] for row in updates] == [6, 12, 18, 24, 30]
    for k, row in enumerate(updates, 1):
        assert row["target"] == training.sparsity_at(k, 5, 0.8)
        assert sum(layer["alive"] for layer in row["layers"]) == (
            total - round(row["target"] * total))
        assert row["sparsity"] == pytest.approx(row["target"], abs=1 / total)
        assert row["before"] == pytest.approx(row["target"] + 0.5 * (1 - row["target"]),
                                              abs=1 / total)
        assert sum(layer["regenerated"] for layer in row["layers"]) == row["regenerated"]

    config = json.loads(Path("r/config.json").read_text())
    assert (config["interval"] == 6 and config["lr"] == 0.1
            and torch.__version__.startswith(config["version_torch"]))
    assert Path("r/curves.png").read_bytes().startswith(b"\x89PNG")
    net, masks = models.load("r/model.pt"), modelfile.read("r/model.pt")["masks"]
    assert all(net.get_parameter(name)[~mask].count_nonzero() == 0 for name, mask in masks.items())
    images = data.load("fashion-mini")
    right = net(images.x_test).sum(0).argmax(1) == images.y_test
    assert right.double().mean().item() == pytest.approx(summary["test_accuracy"])
    printed = capsys.readouterr().out
    assert (f"{100 * summary['test_accuracy']:.2f} % test accuracy at 80.0 % sparsity -> r"
            in printed)
    assert "\r" not in printed  # no progress bar where the output is no terminal


def test_epochs_between_evaluations(capsys):
    """--evaluate-every evaluates at each N-th epoch of a stage and at its end, and changes nothing
    of what is trained."""
    given = ["--train-limit", 300, "--epochs-prune", 5, "--epochs-finetune", 2, "--interval", 5,
             "--as-published", "zero"]
    run("--run-dir", "each", *given)
    each = capsys.readouterr().out
    run("--run-dir", "some", *given, "--evaluate-every", 2)
    some = capsys.readouterr().out
    rows, fewer = lines("each", "metrics"), lines("some", "metrics")
    tested = {"test_loss", "test_accuracy", "firing_rate"}
    assert [row["epoch"] for row in fewer if row["test_accuracy"] is not None] == [2, 4, 5, 7]
    for row, other in zip(rows, fewer, strict=True):
        if other["test_accuracy"] is None:
            row |= dict.fromkeys(tested)
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
    weights, others = (models.load(f"{name}/model.pt").state_dict() for name in ("each", "some"))
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    # what is printed: the evaluations that are planned, and of the last epoch its accuracy
    assert " 7 evaluations of" in each and " 4 evaluations of" in some
    assert "of 1 that were evaluated" in some and "the published code reports" not in some
    assert each.count("  test ") == 7 and some.count("  test ") == 4
    assert "the published code reports" in each


def test_a_resumed_run_may_be_evaluated_more_seldom(monkeypatch):
    given = ["--run-dir", "r", "--epochs-prune", 4]
    stop_after(20, monkeypatch, run, *given)  # in the second epoch
    run(*given, "--resume", "--evaluate-every", 3)
    assert [row["test_accuracy"] is None for row in lines("r", "metrics")] == [
        False, True, False, False, False]


@pytest.mark.parametrize("given, method", [
    (["--metric", "gradient"], "gradient"), (["--metric", "random"], "random"),
    (["--candidates", "new", "--aggregate", "mean"], "criticality"),
    (["--regen", "0"], "gmp"), (["--regen", "0", "--metric", "criticality"], "gmp"),
    (["--precision", "bf16", "--cutout", "6", "--crop", "2", "--no-flip"], "criticality")])
def test_all_methods(given, method):
    summary = run(*given)
    assert summary["method"] == method
    total = sum(layer["weights"] for layer in summary["layers"])
    assert sum(layer["alive"] for layer in summary["layers"]) == total - round(0.9 * total)
    assert math.isfinite(lines(next(Path("runs").iterdir()), "metrics")[-1]["train_loss"])


@pytest.mark.parametrize("given, words", [
    ("--regen 0 --metric gradient", "--metric is gradient, which --regen 0 does not use"),
    ("--regen 0 --aggregate mean", "--aggregate is mean, which --regen 0 does not use"),
    ("--regen 0 --candidates new", "--candidates is new, which --regen 0 does not use"),
    ("--sparsity 0 --regen 0.5", "--regen is 0.5, which --sparsity 0 does not use"),
    ("--sparsity 0 --metric random", "--metric is random, which --sparsity 0 does not use"),
    ("--sparsity 0 --candidates new", "--candidates is new, which --sparsity 0 does not use"),
    ("--metric gradient --aggregate mean", "--aggregate is mean, which --metric gradient does"),
    ("--metric random --aggregate mean", "--aggregate is mean, which --metric random does not")])
def test_flags_without_effect(given, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*given.split())
    assert stop.value.code == 2 and words in one_line(capsys)
    assert not list(Path().rglob("*"))  # nothing was written


def test_flags_without_effect_may_say_what_holds_anyway():
    usual = ["--metric", "criticality", "--aggregate", "max", "--candidates", "all"]
    for given in (["--regen", "0"], ["--sparsity", "0"], ["--sparsity", "0", "--regen", "0"]):
        args = prune_unstructured.parse_args([*given, *usual])
        assert (args.regen, args.metric, args.aggregate, args.candidates) == (
            0, "criticality", "max", "all")


def test_a_last_batch_of_one_image(capsys):
    """resnet19 on 8 x 8 images ends in one pixel. More steps help, but not where each step is
    normalised by itself."""
    x, y = np.zeros((33, 8, 8), np.uint8), np.arange(33) % 3
    x[:, 0] = 255
    np.savez("mine.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    given = ["--dataset", "mine.npz", "--model", "resnet19", "--width", "0.05", "--batch-size",
             "16"]
    with pytest.raises(SystemExit) as stop:
        run(*given, "--time-steps", 1, "--interval", 1, short=False)
    assert stop.value.code == 2
    assert "Change --batch-size or --time-steps" in one_line(capsys)
    channels = importlib.import_module("prune_structured")
    for steps in (1, 4):
        with pytest.raises(SystemExit) as stop:
            channels.main([*given, "--time-steps", str(steps), "--as-published", "bn"])
        error = one_line(capsys)
        assert stop.value.code == 2 and "Change --batch-size or leave out bn" in error
        assert "--time-steps" not in error
    assert {path.name for path in Path().iterdir()} == {"mine.npz"}


def test_dense_training_and_init():
    dense = run("--sparsity", 0, "--run-dir", "dense", "--interval", 10**6)  # no interval check
    assert (dense["method"] == "dense" and dense["sparsity"] == 0
            and not Path("dense/updates.jsonl").exists())
    assert dense["dense_accuracy"] == dense["test_accuracy"] and dense["pruned_accuracy"] is None
    pruned = run("--init", "dense/model.pt", "--run-dir", "pruned")
    assert pruned["dense_accuracy"] == dense["test_accuracy"]
    assert pruned["training_cost"] < dense["training_cost"] == 1


def test_a_smoke_run_bounds_what_is_given():
    x, y = np.zeros((60, 16, 16), np.uint8), np.arange(60) % 3
    np.savez("mine.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    given = "--dataset mine.npz --smoke --interval 50 --batch-size 128 --epochs-prune 9"
    summary = run(*given.split(), short=False)
    assert (summary["epochs"], summary["widths"]) == (2, [4, 8, 16, 16])
    assert Path("runs/smoke-mine-small-criticality-0.9-r0.5-seed0/summary.json").exists()


def test_names_of_runs():
    names = {flags_: prune_unstructured.parse_args(flags_.split()).run_dir for flags_ in (
        "", "--candidates new", "--aggregate mean", "--regen 0", "--sparsity 0", "--seed 1",
        "--sparsity 0.95", "--regen 0.3", "--metric random", "--dataset a/mine.npz")}
    assert len(set(names.values())) == len(names)
    assert names[""] == "runs/fashion-mini-small-criticality-0.9-r0.5-seed0"


def test_no_finetuning():
    summary = run("--epochs-finetune", 0)
    assert summary["epochs"] == 2 and summary["pruned_accuracy"] == summary["test_accuracy"]


def test_the_paper_setting_on_cifar100_data():
    rng = np.random.default_rng(0)
    Path("data").mkdir()
    x = rng.integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
    y = np.arange(300) % 100
    np.savez("data/cifar100.npz", x_train=x, y_train=y, x_test=x[:100], y_test=y[:100])
    summary = run(*"--dataset cifar100 --sparsity 0.9 --regen 0.5 --smoke --width 0.1".split(),
                  short=False)
    assert summary["model"] == "vgg16" and summary["time_steps"] == 5
    assert len(lines(next(Path("runs").glob("smoke-cifar100-*")), "updates")) == 4


def test_the_defaults_are_the_paper_s(capsys):
    defaults = vars(prune_unstructured.parse_args(["--dataset", "cifar100"]))
    for flag, value in dict(
            epochs_prune=200, epochs_finetune=300, lr=0.3, interval=2000, weight_decay=5e-4,
            batch_size=128, time_steps=5, model="vgg16", momentum=0.9, regen=0.5).items():
        assert defaults[flag] == value, flag
    tiny = prune_unstructured.parse_args(["--dataset", "tiny-imagenet", "--sparsity", "0.95"])
    assert (tiny.epochs_prune, tiny.epochs_finetune, tiny.interval, tiny.regen) == (
        50, 100, 1000, 0.1)
    with pytest.raises(SystemExit) as stop:
        prune_unstructured.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "epochs of the pruning stage (default 8; 6: mnist, fashion-mnist, n-mnist; 200: " in shown
    assert "a fraction in [0, 1) (default 0.9)" in shown
    assert "None" not in shown


# ---- the algorithm, end to end -------------------------------------------------------------------


def test_no_regeneration_is_gmp_bit_by_bit():
    """Gradual magnitude pruning, written separately:
    a sort, plain masks, no library of this project."""
    run("--regen", 0, "--run-dir", "r", "--sparsity", 0.7)
    images = data.load("fashion-mini", train_limit=400)
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 28, 4, [4, 8, 16, 16]).to(memory_format=torch.channels_last)
    net.set_normalisation(images.mean, images.std)
    weights = {name: p for name, p in net.named_parameters() if p.dim() > 1}
    alive = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    total = sum(w.numel() for w in weights.values())
    sgd = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4)
    iteration = 0
    for epoch in range(3):
        for x, y in data.batches(images.x_train, images.y_train, 25, 0, epoch, flip=True):
            step, steps = (iteration, 32) if epoch < 2 else (iteration - 32, 16)
            sgd.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * step / steps)) / 2
            iteration += 1
            logits = net(x)
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 10), torch.cat([y] * 4))
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            if epoch < 2 and iteration % 6 == 0:
                k = iteration // 6
                keep = total - round(0.7 * (1 - (1 - k / 5) ** 3) * total)
                magnitudes = torch.cat([torch.where(alive[n], w.detach().abs(), -1).flatten()
                                        for n, w in weights.items()])
                threshold = magnitudes.sort(descending=True).values[keep - 1]
                alive = {n: alive[n] & (w.detach().abs() >= threshold) for n, w in weights.items()}
                assert sum(int(m.sum()) for m in alive.values()) == keep  # no ties, no empty layer
            for name, w in weights.items():
                w.data *= alive[name]
                sgd.state[w]["momentum_buffer"] *= alive[name]
    packed = modelfile.read("r/model.pt")
    net.class_names = packed["class_names"]
    for name, tensor in net.state_dict().items():
        assert torch.equal(packed["state_dict"][name], tensor), name
    assert all(torch.equal(packed["masks"][name], alive[name]) for name in alive)


def test_the_same_seed_gives_the_same_run(once):
    run("--run-dir", "a")
    run("--run-dir", "c", "--seed", 1)
    assert_same_run("a", once(run))
    weights = [models.load(f"{folder}/model.pt").convs[1].conv.weight for folder in "ac"]
    assert not torch.equal(*weights)


def test_dead_weights_stay_dead_while_fine_tuning():
    run("--run-dir", "r", "--epochs-finetune", 2)
    masks = modelfile.read("r/model.pt")["masks"]
    after_pruning = {layer["name"]: layer["alive"] for layer in lines("r", "updates")[-1]["layers"]}
    assert {name: int(mask.sum()) for name, mask in masks.items()} == after_pruning
    state = torch.load("r/checkpoint.pt", weights_only=True)["parts"]["optimizer"]
    names = [name for name, _ in models.load("r/model.pt").named_parameters()]
    for index, name in enumerate(names):
        if name in masks:
            assert state["state"][index]["momentum_buffer"][~masks[name]].count_nonzero() == 0


def test_ties_depend_on_the_seed_and_the_update(monkeypatch):
    seeded, drawn = runfolder.seeded, []

    def watch(*numbers):
        if len(numbers) == 2:  # a third one is that of a step
            drawn.append(numbers)
        return seeded(*numbers)

    monkeypatch.setattr(runfolder, "seeded", watch)
    run("--seed", 3, "--epochs-finetune", 0)
    assert drawn == [(3, 6), (3, 12), (3, 18), (3, 24), (3, 30)]


def test_scores_are_taken_from_the_batch_of_the_update(monkeypatch):
    """The criticality that ranks is that of the forward pass just before, and of no other batch."""
    ranked, spread = [], Masks.spread

    def spy(masks, scores):
        ranked.append({name: score.clone() for name, score in scores.items()})
        return spread(masks, scores)

    monkeypatch.setattr(Masks, "spread", spy)
    run("--run-dir", "r", "--epochs-finetune", 0)
    assert len(ranked) == 5
    images = data.load("fashion-mini", train_limit=400)  # the first update again, by hand
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 28, 4, [4, 8, 16, 16]).to(memory_format=torch.channels_last)
    net.set_normalisation(images.mean, images.std)
    sgd = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=5e-4)
    batches = data.batches(images.x_train, images.y_train, 25, 0, 0, flip=True)
    for i, (x, y) in enumerate(batches):
        sgd.param_groups[0]["lr"] = training.cosine(0.1, i, 32)
        with models.recording(net, "max" if i == 5 else None) as scores:
            loss = training.loss_over_time(net(x), y)
        if i == 5:
            break
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    assert scores.keys() == ranked[0].keys() == models.lifs(net).keys()
    for name, score in scores.items():
        assert torch.equal(ranked[0][name], score)


# ---- stopping and going on -----------------------------------------------------------------------


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive() and time.monotonic() < end, Path("out.txt").read_text()
        time.sleep(0.01)


@pytest.mark.parametrize("number, code", [
    (signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_goes_on_bit_by_bit(number, code, usual_signals, once):
    longer = ["--epochs-prune", "6", "--epochs-finetune", "4", "--train-limit", "500"]
    unbroken = once(run, *longer)
    process = helpers.fork(
        helpers.run_as_typed, command("--run-dir", "r", *longer)[1:], Path.cwd(), "out.txt",
        helpers.with_few_test_images)
    wait_for(lambda: Path("r/metrics.jsonl").exists() and len(lines("r", "metrics")) >= 3, process)
    os.kill(process.pid, number)
    process.join(60)
    out = Path("out.txt").read_text()
    assert process.exitcode == code, out
    if number != signal.SIGKILL:
        assert ("saved. Go on with: python" in out and "--resume --run-dir r" in out
                and "Traceback" not in out)
    assert not Path("r/summary.json").exists()
    assert 0 < torch.load("r/checkpoint.pt", weights_only=True)["position"][2] < 200
    run("--run-dir", "r", "--resume", short=False)  # all other flags come from its config.json
    assert_same_run(unbroken, "r")


@pytest.mark.parametrize("step", [0, 5, 15, 23, 31, 40])
def test_resume_from_any_step(step, monkeypatch, once):
    """Stop inside an epoch, at an update, at the end of an epoch, in fine-tuning;
    go on in one process."""
    stop_after(step + 1, monkeypatch, run, "--run-dir", "r")
    run("--run-dir", "r", "--resume")
    assert_same_run(once(run), "r")


def test_work_after_the_last_checkpoint_is_done_again(monkeypatch, capsys, once):
    """Die inside the second epoch, after updates that no checkpoint knows, without saving."""
    unbroken = once(run)
    add = meters.Meter.add

    def die(self, loss, logits, labels, at=0):
        add(self, loss, logits, labels, at)
        if at == 31:
            raise KeyboardInterrupt

    monkeypatch.setattr(meters.Meter, "add", die)
    assert "interrupted" in wrong(capsys, "--run-dir", "r", code=130)
    assert len(lines("r", "updates")) == 5 and len(lines("r", "metrics")) == 1
    monkeypatch.setattr(meters.Meter, "add", add)
    run("--run-dir", "r", "--resume")
    assert_same_run(unbroken, "r")


@pytest.mark.parametrize("given", [
    ["--no-flip"], ["--metric", "random", "--candidates", "new"],
    ["--precision", "bf16", "--width", "0.125", "--time-steps", "2", "--crop", "3",
     "--cutout", "5"],
    ["--metric", "gradient"], ["--init", "dense.pt"]])
def test_resume_of_other_runs_with_a_smaller_last_batch(given, monkeypatch):
    given = [*given, "--batch-size", "57", "--interval", "3", "--epochs-finetune", "0"]
    if "--init" in given:
        run("--sparsity", 0, "--run-dir", "dense", "--epochs-prune", 1, "--epochs-finetune", 0)
        Path("dense/model.pt").rename("dense.pt")
    run("--run-dir", "unbroken", *given)
    stop_after(10, monkeypatch, run, "--run-dir", "r", *given)
    Path("dense.pt").unlink(missing_ok=True)  # a run that goes on does not need it again
    run("--run-dir", "r", "--resume", short=False)
    assert_same_run("unbroken", "r")


def test_a_signal_in_the_evaluation_stops_the_run_too(monkeypatch, once, usual_signals):
    unbroken = once(run)
    evaluate = training.evaluate

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(*arguments)

    for _ in range(3):  # in each epoch, the last one included
        monkeypatch.setattr(training, "evaluate", interrupted)
        with pytest.raises(SystemExit) as stop:
            run("--run-dir", "r", "--resume")
        assert stop.value.code == 130
    monkeypatch.setattr(training, "evaluate", evaluate)
    run("--run-dir", "r", "--resume")
    assert_same_run(unbroken, "r")


def test_resume_without_a_checkpoint_and_of_a_finished_run(capsys):
    summary = run("--run-dir", "r", "--resume")  # nothing there: from the beginning
    before = {path: path.stat().st_mtime_ns for path in Path("r").iterdir()}
    capsys.readouterr()
    assert run("--run-dir", "r", "--resume") == summary
    assert "r is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in Path("r").iterdir()}
    Path("r/summary.json").unlink()
    Path("r/checkpoint.pt").unlink()
    again = run("--run-dir", "r", "--resume")
    assert {k: v for k, v in again.items() if k not in TIMES} == {
        k: v for k, v in summary.items() if k not in TIMES}


def test_a_loss_that_is_not_finite_stops_the_run(capsys, monkeypatch):
    loss_over_time, trained = training.loss_over_time, []

    def explode(logits, labels, kind):
        trained.extend([None] * logits.requires_grad)
        return loss_over_time(logits, labels, kind) * (math.nan if len(trained) == 21 else 1)

    monkeypatch.setattr(training, "loss_over_time", explode)
    error = wrong(capsys, "--run-dir", "r", code=1)
    assert "not finite" in error and "iteration 21" in error and "checkpoint" in error
    state = torch.load("r/checkpoint.pt", weights_only=True)
    assert state["position"] == [1, 0, 16]
    assert all(tensor.isfinite().all() for tensor in state["parts"]["net"].values())
    monkeypatch.setattr(training, "loss_over_time", loss_over_time)
    run("--run-dir", "r", "--resume")


def test_a_weight_that_is_not_finite_replaces_no_checkpoint(capsys, monkeypatch):
    """A NaN potential is below every threshold: the loss alone would not tell."""
    evaluate, epochs = training.evaluate, []

    def spoil(forward, net, *rest):
        epochs.append(None)
        if len(epochs) == 2:
            net.convs[1].conv.weight.data[0, 0, 0, 0] = math.nan
        return evaluate(forward, net, *rest)

    monkeypatch.setattr(training, "evaluate", spoil)
    error = wrong(capsys, "--run-dir", "r", "--sparsity", 0, code=1)
    assert "convs.1" in error and "not finite after iteration 32" in error
    assert torch.load("r/checkpoint.pt", weights_only=True)["position"] == [1, 0, 16]


# ---- what a wrong command gets -------------------------------------------------------------------


@pytest.mark.parametrize("given, words", [
    ("--sparsity 90", "--sparsity is 90, expected a fraction in [0, 1). For 90 % write 0.9"),
    ("--sparsity 1", "expected a fraction in [0, 1)"), ("--sparsity -0.1", "expected a fraction"),
    ("--sparsity nan", "--sparsity is nan"), ("--sparsity many", "--sparsity is many"),
    ("--regen 1", "--regen is 1,"), ("--regen inf", "--regen is inf"),
    ("--regen -1", "--regen is -1"),
    ("--interval 0", "--interval is 0, expected a whole number of at least 1"),
    ("--interval 2.5", "--interval is 2.5"), ("--batch-size 0", "--batch-size is 0"),
    ("--time-steps 0", "--time-steps is 0"), ("--epochs-prune 0", "--epochs-prune is 0"),
    ("--epochs-finetune -1", "--epochs-finetune is -1"),
    ("--lr 0", "--lr is 0, expected a finite number above"),
    ("--lr nan", "--lr is nan"), ("--lr -1", "--lr is -1"), ("--momentum 1", "--momentum is 1"),
    ("--weight-decay -1", "--weight-decay is -1"), ("--width 0", "--width is 0"),
    ("--width inf", "--width is inf"), ("--seed -1", "--seed is -1"),
    ("--seed 99999999999999999999", "--seed is"), ("--train-limit 0", "--train-limit is 0"),
    ("--train-limit 5", "--train-limit is 5, expected 10"),
    ("--train-limit 10000", "expected 10"), ("--crop 28", "--crop is 28, expected less than the 28"),
    ("--cutout 99", "--cutout is 99"), ("--width 100", "--width is 100, expected a number above 0"),
    ("--time-steps 10000", "--time-steps is 10000"), ("--crop -1", "--crop is -1"),
    ("--model vgg11", "invalid choice: 'vgg11'"), ("--metric magic", "invalid choice: 'magic'"),
    ("--aggregate sum", "invalid choice"), ("--candidates some", "invalid choice"),
    ("--precision fp8", "invalid choice"), ("--device tpu", "is tpu, expected cpu, cuda"),
    ("--dataset imagenet", "data set imagenet"), ("--dataset no/such.npz", "no/such.npz"),
    ("--sparcity 0.9", "unrecognized arguments"), ("--sparsity", "expected one argument"),
    ("--resume --init x.pt", "exclude each other"), ("--resume --overwrite", "exclude each other"),
    ("--init absent.pt", "absent.pt"), ("--init other.npz", "other.npz"),
    ("--init broken.pt", "broken.pt"),
    ("--interval 33",
     "no update would ever run: --interval is 33, the pruning stage has 32 iterations"),
    ("--sparsity 0.9999", "expected at least one for each of the 5 layers"),
    ("--batch-size 401", "--batch-size is 401, but fashion-mini has 400"),
    ("--run-dir a_file", "a_file is a file"), ("--run-dir a_file/deeper", "a_file is a file"),
    ("--run-dir full", "holds no run"), ("--data-dir a_file --dataset cifar10", "a_file"),
    ("--dataset other.npz", "other.npz"), ("--dataset a_file", "a_file"),
    ("--dataset full", "full"),
])
def test_wrong_commands(given, words, capsys, monkeypatch):
    def no_download(*_, **__):
        raise OSError("there is no network in tests")

    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", no_download)
    Path("a_file").write_text("text")
    Path("broken.pt").write_bytes(b"PK\x03\x04")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("text")
    np.savez("other.npz", x_train=np.zeros((3, 8, 8)))
    before = sorted(Path().rglob("*"))
    assert words in wrong(capsys, *given.split())
    assert sorted(Path().rglob("*")) == before  # nothing was written


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(capsys):
    assert "torch sees no GPU" in wrong(capsys, "--device", "cuda")


def test_an_existing_run_is_never_replaced_silently(capsys):
    run("--run-dir", "r", "--epochs-finetune", 0)
    before = {path: path.read_bytes() for path in Path("r").iterdir()}
    assert "--resume, replace it by --overwrite" in wrong(capsys, "--run-dir", "r")
    assert "was made with --lr 0.1, this command says 0.2" in wrong(
        capsys, "--run-dir", "r", "--resume", "--lr", 0.2, "--epochs-finetune", 0)
    assert "was made with --model small" in wrong(
        capsys, "--run-dir", "r", "--resume", "--model", "resnet19", "--epochs-finetune", 0)
    assert before == {path: path.read_bytes() for path in Path("r").iterdir()}
    Path("r/mine.txt").write_text("kept")
    run("--run-dir", "r", "--overwrite", "--seed", 3, "--epochs-finetune", 0)
    assert json.loads(Path("r/summary.json").read_text())["seed"] == 3
    assert Path("r/mine.txt").exists()


def test_checkpoints_that_do_not_fit(capsys):
    run("--run-dir", "r", "--epochs-finetune", 0)
    run("--run-dir", "other", "--epochs-finetune", 0, "--width", 0.5)
    Path("r/summary.json").unlink()
    good = Path("r/checkpoint.pt").read_bytes()
    for bad in (good[:len(good) // 2], b"", Path("other/checkpoint.pt").read_bytes(), b"text"):
        Path("r/checkpoint.pt").write_bytes(bad)
        error = wrong(capsys, "--run-dir", "r", "--resume", short=False)
        assert ("checkpoint.pt does not fit this run or is damaged" in error
                and "--overwrite" in error)
    config = json.loads(Path("r/config.json").read_text())
    Path("r/checkpoint.pt").write_bytes(good)
    images = data.load("fashion-mini")
    arrays = {key: getattr(images, key).numpy() for key in data.KEYS}
    arrays |= {key: arrays[key].transpose(0, 2, 3, 1) for key in ("x_train", "x_test")}
    np.savez("mine.npz", **arrays | dict(y_train=(arrays["y_train"] + 1) % 10))
    for changed, words in ((dict(seed=1), "seed"), (dict(lr=0.2), "lr"),
                           (dict(dataset="mine.npz"), "other data")):
        Path("r/config.json").write_text(json.dumps(config | changed))
        error = wrong(capsys, "--run-dir", "r", "--resume", short=False)
        assert f"made with {words}" in error
    for text, words in (("{", "config.json is damaged"), ("[]", "config.json is damaged"),
                        (json.dumps(config | {"epochs_prune": "x"}), "epochs_prune is x, expected"),
                        (json.dumps(config | {"model": "vgg11"}), "model is vgg11, expected")):
        Path("r/config.json").write_text(text)
        assert words in wrong(capsys, "--run-dir", "r", "--resume", short=False)
    Path("r/config.json").write_text(json.dumps(config))
    for text in ("{", "{}", "[]"):
        Path("r/summary.json").write_text(text)
        assert "summary.json is damaged" in wrong(capsys, "--run-dir", "r", "--resume", short=False)


def test_init_of_another_network(capsys):
    run("--run-dir", "r", "--epochs-finetune", 0)
    error = wrong(capsys, "--init", "r/model.pt", "--width", 0.5, "--run-dir", "new")
    assert "widths [4, 8, 16, 16], expected [8, 16, 32, 32]" in error and not Path("new").exists()
    run("--run-dir", "r", "--epochs-finetune", 0, "--sparsity", 0, "--overwrite")
    error = wrong(capsys, "--init", "r/model.pt", "--width", 0.5, "--run-dir", "new")
    assert "widths [4, 8, 16, 16], expected [8, 16, 32, 32]" in error and not Path("new").exists()


def test_errors_from_the_real_command():
    done = subprocess.run(command("--sparsity", "90"), capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == ("prune_unstructured.py: error: --sparsity is 90, expected a fraction "
                           "in [0, 1). For 90 % write 0.9\n")


# ---- all scripts ---------------------------------------------------------------------------------


METHODS = ("dense gmp criticality gradient random granet imp eb et gradr deepr sdsnn pq stds upr ndsnn "
           "slimming greg1 greg2 sca").split()


@pytest.mark.parametrize("script", sorted(path.stem for path in ROOT.glob("prune_*.py")))
def test_all_scripts_leave_the_same_summary(script):
    summary = importlib.import_module(script).main(["--smoke", "--run-dir", "r"])
    assert list(summary) == runfolder.SUMMARY_KEYS and summary["script"] == script
    assert json.loads(Path("r/summary.json").read_text()) == summary
    assert summary["method"] in METHODS
    alive = sum(layer["alive"] for layer in summary["layers"])
    assert summary["sparsity"] == pytest.approx(
        1 - alive / sum(layer["weights"] for layer in summary["layers"]))
    assert 0 < summary["training_cost"] <= 1 + 1e-9 and summary["seconds"] > 0
    for number in ("test_accuracy", "sops", "energy_mj", "macs", "macs_dense", "epochs"):
        assert summary[number] is not None
