"""GReg: its penalty by hand, its schedule, the script from its command line."""
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import channels
import data
import modelfile
import models
import prune_greg
from harness import runfolder
from helpers import assert_same_run, lines, one_line, random_net, stop_after

# ---- the penalty by hand -------------------------------------------------------------------------


def greg_weight(value=1.0, filters=2):
    weight = torch.full((filters, 1, 1, 1), value, requires_grad=True)
    weight.data[1:] = 5
    return weight


def greg_run(method, weights, plan, steps, ratio=0.5, lr=0.1):
    """Steps of plain SGD with a loss gradient of 0; yields (step, state) after each."""
    state = prune_greg.no_penalty(weights, method, ratio)
    for step in range(steps):
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
        if step % plan.interval == 0 and step < plan.stop:
            prune_greg.grow(state, weights, plan, ratio)
        prune_greg.penalise(state, weights)
        for weight in weights.values():
            weight.data -= lr * weight.grad
        yield step, state


def test_greg_by_hand():
    weight = greg_weight()  # a penalty of 0.5, lr 0.1
    plan = SimpleNamespace(interval=10**6, stop=10, grow=0.5, pick=0)
    values = [float(weight.detach()[0]) for _ in greg_run("greg1", {"a": weight}, plan, 2)]
    assert values == pytest.approx([0.95, 0.9025])
    weight = greg_weight()  # K = 2, delta 0.25, limit 1
    plan = SimpleNamespace(interval=2, stop=100, grow=0.25, pick=0)
    penalties, values, done = [], [], []
    for _, state in greg_run("greg1", {"a": weight}, plan, 10):
        penalties.append(float(state["a"]["penalty"][0]))
        values.append(float(weight.detach()[0]))
        done.append(state["a"]["done"])
        assert state["a"]["penalty"][1] == 0  # what stays is left alone
    assert penalties == [.25, .25, .5, .5, .75, .75, 1, 1, 1.25, 1.25]
    assert values[:8] == pytest.approx(
        [0.975, 0.950625, 0.903094, 0.857939, 0.793594, 0.734074, 0.660667, 0.594600], abs=1e-6)
    assert done == [False] * 8 + [True] * 2 and float(weight.detach()[1]) == 5


def test_greg_is_held_when_it_is_time_to_stabilise():
    plan = SimpleNamespace(interval=1, stop=3, grow=0.1, pick=0)
    penalties = [float(state["a"]["penalty"][0])
                 for _, state in greg_run("greg1", {"a": greg_weight()}, plan, 6)]
    assert penalties == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3, 0.3])


def test_greg_counts_filters_by_layer():
    for filters, ratio, gone in ((5, 0.5, 3), (5, 1.0, 4), (4, 0.5, 2), (1, 0.5, 0), (8, 0.01, 1)):
        size = torch.arange(filters, 0, -1).float()
        goes = prune_greg.smallest(size, ratio)
        assert goes.tolist() == [False] * (filters - gone) + [True] * gone


def test_greg1_chooses_before_and_greg2_after_all_have_shrunk():
    sizes = torch.tensor([3.0, 1.0, 2.0, 4.0])
    weight = sizes.view(4, 1, 1, 1).clone().requires_grad_()
    state = prune_greg.no_penalty({"a": weight}, "greg1", 0.5)
    assert state["a"]["goes"].tolist() == [False, True, True, False]
    plan = SimpleNamespace(interval=2, stop=100, grow=0.1, pick=0.004)
    seen = []
    for step, state in greg_run("greg2", {"a": weight}, plan, 12, lr=0):
        if step == 3:
            weight.data[:, 0, 0, 0] = torch.tensor([1.0, 3.0, 2.0, 4.0])  # some resisted
        seen.append(state["a"]["penalty"].tolist())
        assert (state["a"]["goes"] is None) == (step < 4)  # 0.004, 0.008, then 0.012 >= 0.01
    assert seen[0] == pytest.approx([0.004] * 4) and seen[4] == pytest.approx([0.012] * 4)
    assert state["a"]["goes"].tolist() == [True, False, True, False]
    assert seen[6] == pytest.approx([0.112, -1e-4, 0.112, -1e-4])
    assert seen[10] == pytest.approx([0.312, -1e-4, 0.312, -1e-4])  # recover is set, not added


def test_greg_ends_early_when_the_weights_are_small_enough():
    for method, ended in (("greg1", [False, False]), ("greg2", [True, False])):
        small, other = greg_weight(1e-4), greg_weight(1.0)  # kept / pruned is 50,000 and 5
        plan = SimpleNamespace(interval=1, stop=100, grow=0.01, pick=0.01 * (method == "greg2"))
        for _, state in greg_run(method, {"a": small, "b": other}, plan, 3, lr=0):
            pass
        assert [state[name]["done"] for name in "ab"] == ended  # greg1 waits for all layers
    for _, state in greg_run("greg1", {"a": greg_weight(1e-4), "b": greg_weight(2e-4)}, plan, 1):
        assert [state[name]["done"] for name in "ab"] == [True, True]
    weight = greg_weight(1.0)  # the ratio is a moving average: 5, then 0.9 * 5 + 0.1 * 5000
    ratios = []
    for _, state in greg_run("greg1", {"a": weight}, plan, 2, lr=0):
        ratios.append(state["a"]["mean_ratio"])
        weight.data[0] = 1e-3
    assert ratios == pytest.approx([5, 4.5 + 500])


@pytest.mark.parametrize("steps, method, interval, updates, lr, exponent", [
    (111_111, "greg1", 10, 10_000, 1e-3, 500), (8689, "greg1", 10, 782, 1e-3, 39.1),
    (2222, "greg1", 5, 400, 1e-3, 10), (556, "greg1", 1, 500, 1e-2, 25),
    (1000, "greg2", 2, 400, 1e-2, 40)])
def test_the_scaled_schedule(steps, method, interval, updates, lr, exponent):
    plan = prune_greg.schedule_of(method, steps, 0.9)
    assert (plan.interval, plan.lr) == (interval, lr)
    assert 1 / plan.grow == pytest.approx(updates, rel=2e-3)
    assert plan.exponent == pytest.approx(exponent, rel=2e-3)
    assert plan.stop == steps - round(0.1 * steps)
    if method == "greg2":
        assert plan.pick * (round(0.1 * steps) // interval) == pytest.approx(0.01)
    else:
        assert plan.pick == 0


def test_greg_leaves_the_first_convolution_of_a_vgg_alone():
    assert list(prune_greg.prunable(random_net("small", 0.5))) == [
        "convs.1", "convs.2", "convs.3"]
    assert list(prune_greg.prunable(random_net("resnet19", 0.12))) == [
        f"blocks.{i}.conv1" for i in range(8)]


# ---- the script ----------------------------------------------------------------------------------

SHORT = ["--train-limit", "400", "--epochs-pretrain", "2", "--epochs-finetune", "2",
         "--width", "0.5", "--batch-size", "25"]  # 16 steps an epoch
TINY = ["--train-limit", "100", "--epochs-pretrain", "1", "--epochs-finetune", "1",
        "--width", "0.25", "--batch-size", "25"]  # 4 steps an epoch
pytestmark = pytest.mark.usefixtures("few_test_images")


@pytest.fixture(autouse=True)
def the_name_of_the_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prune_greg.py"])


def run(*given, short=SHORT):
    return prune_greg.main([*short, *map(str, given)])


def record(folder):
    return json.loads(Path(folder, "channels.json").read_text())


@pytest.mark.parametrize("given, method", [
    ([], "greg1"), (["--method", "greg2", "--epochs-prune", "2"], "greg2"),
    (["--target-macs", "0.6"], "greg1"), (["--precision", "bf16"], "greg1")])
def test_all_methods(given, method):
    summary = run("--run-dir", "r", *given, short=TINY)
    found = record("r")
    assert {path.name for path in Path("r").iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "model.pt", "summary.json", "curves.png",
        "channels.json", "gamma.npz"}
    assert list(summary) == runfolder.SUMMARY_KEYS
    assert (summary["script"], summary["method"], summary["regen"]) == ("prune_greg", method, 0)
    assert math.isfinite(lines("r", "metrics")[-1]["train_loss"])
    assert summary["survived_by_regeneration"] == found["regenerated"] == found["rescued"] == 0
    assert summary["widths"] == [len(layer["kept"]) for layer in found["layers"]]
    assert models.load("r/model.pt").config["widths"] == summary["widths"]
    rows = lines("r", "metrics")
    assert summary["dense_accuracy"] == rows[0]["test_accuracy"]
    assert [r["sparsity"] for r in rows[:-1]] == [0] * (len(rows) - 1)
    assert rows[-1]["sparsity"] == summary["sparsity"] > 0
    if "--target-macs" in given:
        assert found["macs_removed"] == pytest.approx(0.6, abs=0.05)
        assert summary["prune_ratio"] == found["ratio"]
    else:
        assert summary["widths"] == [4, 4, 8, 8]  # all but the first


def test_the_ratio_is_that_of_each_layer(monkeypatch):
    """Smallest mean |w| of each layer, as the weights were when the choice was made."""
    chosen, remove = {}, channels.remove
    no_penalty = prune_greg.no_penalty

    def watch(weights, method, ratio):
        for name, weight in weights.items():
            size = weight.detach().abs().mean((1, 2, 3))
            count = math.ceil(0.3 * len(size))
            chosen[name] = sorted(size.argsort(stable=True)[count:].tolist())
        return no_penalty(weights, method, ratio)

    monkeypatch.setattr(prune_greg, "no_penalty", watch)
    run("--run-dir", "r", "--prune-ratio", 0.3, short=TINY)
    kept = {layer["name"]: layer["kept"] for layer in record("r")["layers"]}
    assert kept.pop("convs.0") == [0, 1, 2, 3] and kept == chosen
    assert remove is channels.remove


def test_greg_shrinks_what_goes(monkeypatch, capsys):
    """At the end of its stage, what is removed is a small part of what stays. It is larger than
    exp(-E): BN divides the scale out again, so that the loss pulls harder on smaller filters."""
    seen, remove = {}, channels.remove

    def watch(net, kept):
        for name, keep in kept.items():
            size = prune_greg.mean_size(net.get_submodule(name).conv.weight)
            seen[name] = float(size[keep].mean() / size[~keep].mean()) if not keep.all() else None
        return remove(net, kept)

    monkeypatch.setattr(channels, "remove", watch)
    run("--run-dir", "r", "--method", "greg1", "--epochs-prune", 8, "--epochs-finetune", 0)
    assert seen.pop("convs.0") is None
    assert all(5 < ratio < 100 for ratio in seen.values()), seen
    assert lines("r", "metrics")[2]["lr"] == 0.01
    rows = lines("r", "metrics")
    assert [r["stage"] for r in rows] == ["pretrain"] * 2 + ["prune"] * 8
    config = json.loads(Path("r/config.json").read_text())
    assert config["weight_decay"] == 5e-4 and not {"l1", "regen", "metric"} & config.keys()
    printed = capsys.readouterr().out
    assert "E = 5.8. Raise --epochs-prune" in printed and "of what stays / of what goes" in printed


def test_init_skips_the_pretraining():
    dense = run("--run-dir", "dense", short=TINY)  # the file of a small network is no dense one
    with pytest.raises(SystemExit):
        run("--run-dir", "r", "--init", "dense/model.pt", short=TINY[:2] + TINY[4:])
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 28, 4, [4, 8, 16, 16])
    torch.save(modelfile.pack(net), "net.pt")
    summary = run("--run-dir", "r", "--init", "net.pt", "--epochs-prune", 1,
                  short=TINY[:2] + TINY[4:])
    assert [r["stage"] for r in lines("r", "metrics")] == ["prune", "finetune"]
    assert 0 < summary["dense_accuracy"] < 0.5 < 1 < dense["epochs"]


# ---- stopping and going on -----------------------------------------------------------------------


@pytest.mark.parametrize("given, steps", [
    (["--epochs-prune", "2"], (3, 5, 10)),
    (["--method", "greg2", "--epochs-prune", "2"], (4, 5, 8, 12, 13))])
def test_resume_from_any_step(given, steps, monkeypatch):
    """Stop in each stage, at its first and at its last step; go on in one process."""
    run("--run-dir", "unbroken", *given, short=TINY)
    for step in steps:
        stop_after(step, monkeypatch, lambda *a: run(*a, short=TINY),
                   "--run-dir", f"r{step}", *given)
        run("--run-dir", f"r{step}", "--resume", short=[])
        assert_same_run("unbroken", f"r{step}")


# ---- what a wrong command gets -------------------------------------------------------------------


@pytest.mark.parametrize("given, words", [
    ("--epochs-prune 0", "--epochs-prune is 0, expected a whole number of at least 1"),
    ("--prune-ratio 0", "--prune-ratio is 0, expected a number above 0"),
    ("--prune-ratio 50", "--prune-ratio is 50, expected"),
    ("--prune-ratio 0.98", "leaves 1 of 44 channels, expected at least one for each of the 4 "),
    ("--target-macs 0.9999", "--target-macs is 0.9999, expected at most 0.858"),
    ("--target-macs 0.95", "--target-macs is 0.95, expected at most 0.858"),
    ("--target-macs 0.5 --prune-ratio 0.5", "not allowed with argument"),
    ("--method slimming", "invalid choice: 'slimming'"), ("--l1 0.1", "unrecognized arguments"),
    ("--regen 0.1", "unrecognized arguments"), ("--metric random", "unrecognized arguments"),
    ("--epochs-pretrain 0", "--epochs-pretrain is 0, expected at least 1, or a network by --init")])
def test_wrong_commands(given, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*given.split(), short=TINY)
    assert stop.value.code == 2
    assert words in one_line(capsys)
    assert not list(Path().rglob("*"))  # nothing was written


def test_the_defaults():
    for given, expected in {
            "--dataset cifar100": dict(
                method="greg1", prune_ratio=0.4522, target_macs=None, epochs_pretrain=160,
                epochs_prune=282, epochs_finetune=160, weight_decay=5e-4, lr=0.3, model="vgg16"),
            "--dataset cifar100 --model resnet19": dict(prune_ratio=0.512),
            "": dict(prune_ratio=0.5, epochs_pretrain=8, epochs_prune=4, epochs_finetune=8),
            "--target-macs 0.7": dict(prune_ratio=None, target_macs=0.7)}.items():
        args = vars(prune_greg.parse_args(given.split()))
        assert {flag: args[flag] for flag in expected} == expected
        assert not {"l1", "regen", "metric"} & args.keys()


def test_names_of_runs():
    names = {given: prune_greg.parse_args(given.split()).run_dir for given in (
        "", "--method greg2", "--prune-ratio 0.4", "--target-macs 0.7", "--seed 1",
        "--dataset a/mine.npz", "--model resnet19")}
    assert len(set(names.values())) == len(names)
    assert names[""] == "runs/fashion-mini-small-greg1-0.5-seed0"
    assert names["--target-macs 0.7"] == "runs/fashion-mini-small-greg1-macs0.7-seed0"


def test_help(capsys):
    with pytest.raises(SystemExit):
        prune_greg.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "vgg16: 0.4522, resnet19: 0.512; others: 0.5" in shown and "None" not in shown


@pytest.mark.parametrize("name, factor", [("small", 1), ("vgg16", 0.15), ("resnet19", 0.12),
                                          ("resnet19-pre", 0.1)])
def test_the_largest_share_of_the_macs_is_reached(name, factor):
    """The first convolution of a VGG is never cut."""
    net = models.build(name, 10, 1, 28, 1, models.default_widths(name, factor))
    names, sizes = channels.layers(net)

    def removed(ratio):
        kept = prune_greg.without(net, prune_greg.choose(net, ratio)).kept
        return channels.macs_removed(net, dict(zip(names, kept.split(sizes))))

    most = removed(0.9999)
    channels.check_ratio(net, 0.0, most, prune_greg.fewest)
    with pytest.raises(ValueError, match="expected at most"):
        channels.check_ratio(net, 0.0, most + 1e-6, prune_greg.fewest)
    ratio = channels.ratio_for(net, most, lambda ratio: prune_greg.without(
        net, prune_greg.choose(net, ratio)))
    assert removed(ratio) == pytest.approx(most)


@pytest.mark.parametrize("given", [(), ("--epochs-pretrain", 0, "--init", "dense.pt")])
def test_without_fine_tuning_the_result_is_that_of_the_small_network(given):
    torch.manual_seed(0)
    torch.save(modelfile.pack(models.build("small", 10, 1, 28, 4, [8, 16, 32, 32])), "dense.pt")
    found = run("--run-dir", "r", "--epochs-finetune", 0, "--epochs-prune", 1, "--prune-ratio",
                0.9, *given)
    images = data.load("fashion-mini")
    with torch.inference_mode():
        right = models.load("r/model.pt")(images.x_test).sum(0).argmax(1) == images.y_test
    assert found["test_accuracy"] == pytest.approx(float(right.float().mean()), abs=1e-6)
    assert found["test_accuracy"] == found["pruned_accuracy"]
    assert found["training_cost"] == 1
