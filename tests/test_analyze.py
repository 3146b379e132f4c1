"""analyze.py, records.py, plots.py: statistics by hand, each figure from tiny runs of the demo's
own list, broken folders, commands that make the runs again."""
import base64
import csv
import html.parser
import importlib
import json
import math
import re
import shutil
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

import analyze
import metrics
import models
import prune_unstructured
from harness import files
from harness import jobs
from harness import plots
from harness import records
from harness import report
from harness import runfolder
from harness import verdicts
from helpers import one_line
from neurons import LIF

ROOT = Path(__file__).parent.parent


# ---- statistics ----------------------------------------------------------------------------------


class Given(LIF):
    """A LIF whose spikes are what comes in."""

    def forward(self, x):
        return x


class Reads(nn.Module):
    """A classifier that reads spikes [N, C, H, W] at each of T = 2 steps, at the second one three
    times as many. LIFs follow its output."""

    def __init__(self, features):
        super().__init__()
        self.lif, self.fc = Given(), nn.Linear(features, 2)
        self.lif_out = Given()

    def scored_by(self):
        return {"fc.weight": None}

    def forward(self, x):
        return self.lif_out(self.fc(self.lif(torch.stack([x, 3 * x])).flatten(2).flatten(0, 1)))


def test_class_statistics_of_three_points_and_two_classes():
    points, labels = torch.tensor([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]]), torch.tensor([0, 0, 1])
    mean, variance = metrics.class_statistics(Reads(2), [(points, labels)], 2)["unit"]
    # unit vectors (0.6, 0.8), (0, 1) and (1, 0)
    assert mean.tolist() == [pytest.approx([0.3, 0.9]), [1, 0]]
    assert variance.tolist() == pytest.approx([0.1, 0])
    other = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # cosine of (0.3, 0.9) and (0, 1)
    assert torch.cosine_similarity(mean, other).tolist() == pytest.approx([3 / math.sqrt(10), 1])


def test_published_statistics_by_hand():
    """Three channels, maps of two pixels. The spikes over T and map: (0, 8, 16) and (4, 4, 12) of
    class 0, inverted (1, 1/2, 0) and (1, 1, 0); a silent sample of class 1."""
    maps = torch.tensor([[[0, 0], [2, 0], [1, 3]], [[1, 0], [0, 1], [3, 0]], [[0, 0]] * 3]).float()
    batch = maps[:, :, None], torch.tensor([0, 0, 1])
    mean, variance = metrics.class_statistics(Reads(6), [batch], 2)["published"]
    assert mean.tolist() == [[1, 0.75, 0], [1, 1, 1]]
    assert variance[0] == pytest.approx((0 + 1 / 8 + 0) / 3)  # of 1/2 and 1, unbiased: 1/8
    assert variance[1].isnan()  # one sample
    other = torch.tensor([[1.0, 0.0, 0.0]])
    assert torch.cosine_similarity(mean[:1], other).item() == pytest.approx(1 / 1.25)


def test_inverted_rows():
    rows = torch.tensor([[1.0, 3, 5], [0, 0, 0], [2, 2, 2], [4, 0, 0]]).double()
    assert metrics.inverted(rows).tolist() == [[1, 0.5, 0], [1, 1, 1], [1, 1, 1], [0, 1, 1]]


def test_class_statistics_agree_with_numpy_however_they_are_batched():
    x = torch.rand(50, 7, generator=torch.manual_seed(0))
    x[3] = 0  # a feature without a spike
    y = torch.arange(50) % 3
    unit = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)).double().numpy()
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    published = ((high - x) / (high - low)).double().numpy()
    published[3] = 1
    for size in (50, 7):
        found = metrics.class_statistics(Reads(7), zip(x.split(size), y.split(size)), 4)
        for k in range(3):
            mean, variance = found["unit"]
            mine = unit[y.numpy() == k]
            assert mean[k].numpy() == pytest.approx(mine.mean(0))
            assert variance[k] == pytest.approx(((mine - mine.mean(0)) ** 2).sum(1).mean())
            mean, variance = found["published"]
            mine = published[y.numpy() == k]
            assert mean[k].numpy() == pytest.approx(mine.mean(0), rel=1e-5)
            assert variance[k] == pytest.approx(mine.var(0, ddof=1).mean(), rel=1e-5)
        for mean, variance in found.values():
            assert mean[3].isnan().all() and variance[3].isnan()  # a class without a sample


@pytest.mark.parametrize("counts, bits", [
    ([1, 1, 1, 1, 1], math.log2(5)), ([0, 9, 0, 0, 0], 0), ([4, 0, 0, 0, 4], 1),
    ([1, 1, 2, 0, 0], 1.5)])
def test_entropy_of_known_distributions(counts, bits):
    assert metrics.entropy(torch.tensor(counts)[:, None]).item() == pytest.approx(bits)


class Spikes(nn.Module):
    """One LIF that sees the images as they are, at each step."""

    def __init__(self, time_steps):
        super().__init__()
        self.lif, self.time_steps = LIF(), time_steps

    def forward(self, x):
        return self.lif(x[None], self.time_steps)


def test_spike_counts_are_those_of_a_plain_count():
    x = 4 * torch.rand(30, 3, 2, 2, generator=torch.manual_seed(0))
    net = Spikes(4)
    (bits, score), = metrics.spike_counts(net, x.split(8)).values()
    counts = net(x).sum(0).int().numpy()
    for c in range(3):
        expected = 0
        for neuron in counts[:, c].reshape(30, 4).T:
            share = np.bincount(neuron, minlength=5) / 30
            expected -= sum(p * np.log2(p) for p in share if p) / 4
        assert bits[c] == pytest.approx(expected) and expected > 0.5
    net.lif.start_recording("max")
    net(x)
    assert score.tolist() == pytest.approx(net.lif.stop_recording().tolist())


def test_a_neuron_that_takes_all_counts_alike_has_the_greatest_entropy():
    # tau 4/3, threshold 1: a constant current of 1.05 charges to 0.79, 0.98, 1.03: a spike in 3
    currents = torch.tensor([0.5, 1.05, 2.0])
    net = Spikes(3)
    assert net(currents[:, None]).sum(0).flatten().tolist() == [0, 1, 3]
    (bits, _), = metrics.spike_counts(net, [currents[:, None, None, None]]).values()
    assert bits.tolist() == [pytest.approx(math.log2(3))]


def test_spearman():
    assert metrics.spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert metrics.spearman([1, 2, 3], [9, 5, 2]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5 of deviations 4.5 and 5
    assert metrics.spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(22.5))
    assert math.isnan(metrics.spearman([1, 1], [1, 2]))


# ---- which runs are compared ---------------------------------------------------------------------


def fake(method, seed=0, regen=0.0, accuracy=0.5, script="prune_unstructured", **config):
    base = dict.fromkeys(records.SAME["weights"]) | dict(dataset="d", model="m", sparsity=0.9)
    return SimpleNamespace(folder=Path(f"{method}{seed}"), files={}, method=method, seed=seed,
                           regen=regen, script=script, pruned="weights",
                           config=base | config | dict(seed=seed),
                           summary=dict(test_accuracy=accuracy, method=method))


def test_runs_are_compared_at_equal_settings_and_shared_seeds():
    runs = [fake("gmp", 0), fake("gmp", 1), fake("gmp", 2, dataset="other"),
            fake("dense", 1, sparsity=0.0, interval=7),
            fake("criticality", 1, 0.5), fake("criticality", 2, 0.5)]
    assert records.compared(runs, "criticality", "baseline") == {
        "weights": dict(gmp=[runs[1]], criticality=[runs[4]])}
    assert records.compared(runs, "dense", "criticality") == {
        "weights": dict(dense=[runs[3]], criticality=[runs[4]])}
    assert records.compared(runs[:4], "criticality") == {}
    assert records.compared(runs, "greg1") == {}
    (_, methods), = records.compared(runs).items()  # none named: all of the group
    assert {name: len(mine) for name, mine in methods.items()} == dict(
        dense=1, gmp=2, criticality=2)


def test_another_target_or_schedule_is_another_group():
    runs = [fake("gmp"), fake("criticality", 0, 0.5, sparsity=0.95),
            fake("criticality", 0, 0.5, epochs_prune=3)]
    assert records.compared(runs, "criticality", "baseline") == {}
    assert len(records.comparable_groups(runs, "weights")) == 2
    free, = (group for group in records.comparable_groups(runs, "weights", ["epochs_prune"])
             if runs[2] in group)
    assert runs[0] in free and runs[1] not in free


def test_the_rate_with_the_most_seeds_counts_then_the_usual_one_and_never_the_best():
    rates = [fake("criticality", 0, r, a) for r, a in ((0.1, 0.9), (0.4, 0.1), (0.9, 0.95))]
    assert records.runs_of(rates, "criticality") == [rates[1]]
    more = [*rates, fake("criticality", 1, 0.9)]
    assert [run.seed for run in records.runs_of(more, "criticality")] == [0, 1]
    assert records.runs_of(rates, "gmp") == []
    sparser = [fake("criticality", 0, r, sparsity=0.95) for r in (0.1, 0.3, 0.5)]
    assert records.runs_of(sparser, "criticality") == [sparser[1]]  # as near to 0.2 as 0.1


def test_the_paper_s_rate_counts_before_the_number_of_seeds():
    """At 95 % it is 0.2: three seeds of 0.5 and of 0.3 do not take its place."""
    runs = [fake("criticality", seed, r, sparsity=0.95)
            for r, seeds in ((0.2, 1), (0.3, 3), (0.5, 3)) for seed in range(seeds)]
    baseline = [fake("gmp", seed, sparsity=0.95) for seed in range(3)]
    assert records.runs_of(runs, "criticality") == runs[:1]
    assert records.compared([*runs, *baseline], "criticality", "baseline") == {
        "weights": dict(gmp=baseline[:1], criticality=runs[:1])}
    assert {run.regen for run in records.runs_of(runs[1:], "criticality")} == {0.3}


def test_updates_in_words():
    def with_updates(count, **config):
        run = fake("criticality", 0, 0.5, **config)
        run.files["updates.jsonl"] = [{}] * count
        return run

    runs = [fake("gmp", interval=7), with_updates(30, interval=25), with_updates(8, interval=94)]
    assert records.updates_of(runs) == "8, 30 updates, one every 25, 94 steps"
    assert records.updates_of(runs[:2]) == "30 updates, one every 25 steps"
    assert records.updates_of(runs[:1]) == ""
    del runs[1].files["updates.jsonl"]
    assert records.updates_of(runs[:2]) == "an update every 25 steps"
    assert "r = 0.5; an update every 25 steps; seeds 0" in records.describe(runs[:2])


@pytest.mark.parametrize("item, together", [("zero", True), ("score", True), ("momentum", True),
                                            ("classifier", True), ("ties", False),
                                            ("cosine", False), ("loss", False)])
def test_an_item_that_does_nothing_to_gmp_keeps_it_a_baseline(item, together):
    """--as-published zero --regen 0 is refused: the GMP of the text is that run."""
    runs = [fake("gmp", as_published=[]), fake("criticality", 0, 0.5, as_published=[item])]
    runs[0].config["regen"] = 0.0
    assert bool(records.compared(runs, "criticality", "baseline")) == together


def test_the_usual_rate_is_the_paper_s_for_the_target():
    def rate(**config):
        return records.paper_rate(fake("criticality", **config))

    assert [rate(sparsity=s) for s in (0.9, 0.94, 0.98, 0.99)] == [0.5, 0.2, 0.1, 0.1]
    assert rate(dataset="tiny-imagenet", sparsity=0.95) == 0.1
    assert rate(script="prune_granet", sparsity=0.98) == 0.5  # its death rate
    for model, target, expected in (("vgg16", 0.7, 0.05), ("resnet19", 0.5, 0.3),
                                    ("resnet19", None, 0.3), ("mine", 0.9, 0.3)):
        run = fake("criticality", model=model, prune_ratio=target)
        run.pruned = "channels"
        assert records.paper_rate(run) == expected


def test_the_text_and_the_published_code_are_groups_of_their_own():
    """A run without the key is one of the text. What the items imply keeps nobody apart."""
    neuron = dict(surrogate="tanh", threshold=0.5, detach_reset=False)
    runs = [fake("gmp", as_published=[]), fake("criticality", 0, 0.5, as_published=[]),
            fake("criticality", 0, 0.5, as_published=["neuron"], **neuron),
            fake("gmp", as_published=["neuron"], **neuron),
            fake("criticality", 0, 0.5, as_published=["zero"]),
            fake("granet", 0, 0.5, script="prune_granet", as_published=[])]
    groups = records.comparable_groups(runs, "weights")
    assert sorted(groups, key=len) == [[runs[4]], runs[2:4], [*runs[:2], runs[5]]]
    for text, published in (([], ["zero"]), (["zero"], [])):
        apart = [fake("gmp", as_published=text), fake("criticality", 0, 0.5,
                                                      as_published=published)]
        assert records.compared(apart, "criticality", "baseline") == {}


@pytest.mark.parametrize("flag", ["decay_input", "strict", "detach_reset"])
def test_runs_of_another_neuron_are_not_compared(flag):
    runs = [fake("gmp"), fake("criticality", 0, 0.5, **{flag: False})]
    assert records.compared(runs, "criticality", "baseline") == {}


def saved(folder, method, script="prune_unstructured", regen=0.5, seed=0, accuracy=0.8,
          without=(), **config):
    """Write a finished run of weights with the usual keys, but those `without`."""
    config = dict(dataset="fashion-mini", model="small", time_steps=4, batch_size=64, lr=0.1,
                  sparsity=0.9, regen=regen, metric=method, aggregate="max", candidates="all",
                  interval=25, epochs_prune=8, epochs_finetune=4, seed=seed) | config
    for flag in without:
        del config[flag]
    layers = [dict(name=name, alive=10, weights=100) for name in ("convs.0.conv.weight", "fc")]
    summary = dict.fromkeys(runfolder.SUMMARY_KEYS, 1) | dict(
        script=script, method=method, seed=seed, regen=regen, test_accuracy=accuracy,
        layers=layers, sparsity=0.9, survived_by_regeneration=None)
    folder = Path(folder)
    folder.mkdir(parents=True)
    for name, value in dict(config=config, summary=summary).items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_runs_are_found_at_any_depth_in_the_order_of_their_paths():
    for name in ("b/study/x", "b/a", "b/study/deep/er/y", "c"):
        saved(f"all/{name}", "gmp")
    Path("all/b/empty").mkdir()
    found = ["all/b/a", "all/b/study/deep/er/y", "all/b/study/x", "all/c"]
    assert records.find_runs("all") == [Path(name) for name in found]
    assert records.find_runs("all/c") == [Path("all/c")]
    assert records.find_runs("absent") == []
    named = ["all/c", "all/b/study", "all/b"]  # in the order named, each once
    assert list(map(str, records.folders_of(named, analyze.DEMO))) == [
        "all/c", "all/b/study/deep/er/y", "all/b/study/x", "all/b/a"]


# GraNet's flags and GReg's, as they were written before they had scripts of their own
OLD_GRANET = dict(metric="granet", compact=False)
NO_GRANET = ("regen", "metric", "aggregate", "candidates")


def test_old_and_new_runs_of_granet_are_alike(capsys):
    for rate in (0.3, 0.5):
        saved(f"runs/c{rate}", "criticality", regen=rate)
        saved(f"runs/old{rate}", "granet", regen=rate, accuracy=0.6, **OLD_GRANET)
        new = saved(f"runs/new{rate}", "granet", script="prune_granet", regen=None, seed=1,
                    accuracy=0.7, without=NO_GRANET, death_rate=rate)
    old, new = records.read_run("runs/old0.5"), records.read_run(new)
    assert old.script == new.script == "prune_granet" and old.regen == new.regen == 0.5
    assert {**old.config, "seed": 1, "script": None} == {**new.config, "script": None}
    assert records.command_of(old) == ("python prune_granet.py --sparsity 0.9 --interval 25 "
                                       "--epochs-prune 8 --epochs-finetune 4 --death-rate 0.5")
    analyze.main(["ratio"])
    _, rows = table("figures/ratio.csv")
    drawn = {(row["method"], row["regen"]): row for row in rows}
    for rate in ("0.3", "0.5"):
        row = drawn["granet", rate]
        assert (float(row["accuracy"]), row["seeds"]) == (pytest.approx(65), "2")


def test_old_and_new_runs_of_greg_are_alike():
    shared = dict(target_macs=0.7, prune_ratio=None, epochs_pretrain=8)
    saved("old", "greg1", "prune_structured", 0.0, regen_base="kept", l1=0.0,
          finetune_l1=False, **shared)
    saved("new", "greg1", "prune_greg", None, without=("regen", "metric"), **shared)
    saved("slimming", "slimming", "prune_structured", 0.0, regen_base="kept", l1=0.003,
          finetune_l1=False, **shared)
    runs = [records.read_run(name) for name in ("old", "new", "slimming")]
    assert {run.script for run in runs[:2]} == {"prune_greg"}
    assert {run.pruned for run in runs} == {"channels"}
    old, new = ({**run.config, "script": None} for run in runs[:2])
    assert old == new
    for some in (runs, runs[::2], runs[1:]):  # of the two alike the first counts
        group = records.comparable_groups(some, "channels")[0]
        assert group == [some[0], runs[2]]


def with_strangers(folder):
    """Runs of Algorithm 1 beside a metric and a script that no table here names."""
    for seed in (0, 1):
        saved(f"{folder}/gmp{seed}", "gmp", regen=0.0, seed=seed)
        for rate in (0.2, 0.5):
            for method in ("criticality", "random", "magnitude"):
                saved(f"{folder}/{method}{rate}{seed}", method, regen=rate, seed=seed)
        saved(f"{folder}/foo{seed}", "foo", "prune_foo", None, seed, 0.9, rounds=3,
              without=("regen", "metric", "aggregate", "candidates"))


def test_a_metric_and_a_method_of_ones_own_are_drawn_without_an_edit():
    with_strangers("runs/mine")
    drawn = analyze.main([])
    assert {"ratio", "layers"} <= set(drawn)
    _, rows = table("figures/ratio.csv")
    assert list(dict.fromkeys(row["method"] for row in rows)) == [
        "criticality", "random", "magnitude", "gmp"]
    assert [row["regen"] for row in rows if row["method"] == "magnitude"] == ["0.2", "0.5"]
    _, rows = table("figures/layers.csv")  # all methods, those of nobody's table last
    assert list(dict.fromkeys(row["method"] for row in rows)) == [
        "gmp", "criticality", "random", "foo", "magnitude"]
    runs = [records.read_run(folder) for folder in records.find_runs("runs")]
    assert records.rankings(runs) == ["criticality", "random", "magnitude"]
    panels = records.compared(runs, "criticality", "baseline")
    assert list(records.with_controls(runs, panels)["weights"]) == [
        "gmp", "criticality", "random", "magnitude"]


def test_methods_that_no_table_names_have_looks_of_their_own(monkeypatch):
    monkeypatch.setattr(plots, "given", {})
    names = [f"method{i}" for i in range(10)]
    plots.give_styles([*names[::-1], "gmp"])
    looks = [plots.style_of(name) for name in names]
    assert looks == plots.SPARE[:10] and "gmp" not in plots.given  # in the order of names
    assert len({*looks, *plots.STYLE.values()}) == 10 + len({*plots.STYLE.values()})
    assert looks == [plots.style_of(name) for name in names]
    for i in range(len(plots.SPARE)):
        plots.style_of(f"more{i}")  # more than there are: they begin again


def test_what_a_figure_says_names_its_rates(capsys):
    with_strangers("runs")
    analyze.main(["layers"])
    assert ("figures/layers.png  of 10 runs, r = 0.5, an update every 25 steps: "
            in capsys.readouterr().out)
    notes, _ = table("figures/layers.csv")
    assert ("; 90 % of the weights pruned; r = 0.5; an update every 25 steps; seeds 0, 1; "
            "10 runs" in notes[0])
    runs = [fake("criticality", 0, 0.5), fake("gmp"), fake("criticality", 0, 0.2)]
    assert records.rates_of(runs) == "r = 0.2, 0.5" and records.rates_of(runs[1:2]) == ""
    runs[2].pruned = "channels"
    assert records.rates_of(runs) == "r = 0.5 (weights), 0.2 (channels)"


def test_what_a_figure_says_names_the_reading(capsys):
    for seed in (0, 1):
        for method, rate in (("gmp", 0.0), ("criticality", 0.5)):
            saved(f"text/{method}{seed}", method, regen=rate, seed=seed)
            saved(f"zero/{method}{seed}", method, regen=rate, seed=seed, as_published=["zero"])
    analyze.main(["layers", "--runs", "zero", "--out", "a"])
    analyze.main(["layers", "--runs", "text", "--out", "b"])
    out = capsys.readouterr().out
    steps = "an update every 25 steps"
    assert f"of 4 runs, r = 0.5, {steps}, published zero: " in out
    assert f"of 4 runs, r = 0.5, {steps}: " in out
    assert f"; published zero; r = 0.5; {steps}; seeds 0, 1" in table("a/layers.csv")[0][0]
    assert "; 90 % of the weights pruned; r = 0.5; " in table("b/layers.csv")[0][0]
    analyze.main(["layers", "--runs", "text", "zero"])  # the two do not mix
    assert "zero" not in Path("figures/layers.csv").read_text()
    runs = [records.read_run("zero/gmp0"), records.read_run("text/gmp0")]
    assert records.readings_of(runs) == "published zero, as the text"
    runs[1].pruned = "channels"
    assert records.readings_of(runs) == "published zero (weights), as the text (channels)"


def test_a_run_as_published_from_its_flags_to_its_figure():
    """The command of a run has its items, and not the flags that these imply."""
    given = "--smoke --as-published --interval 2 --sparsity 0.5".split()
    for rate in ("0", "0.3"):
        prune_unstructured.main([*given, "--regen", rate, "--run-dir", f"runs/r{rate}"])
    prune_unstructured.main([*given[:1], *given[2:], "--as-published", "zero", "neuron",
                             "--run-dir", "runs/items"])
    runs = [records.read_run(f"runs/{name}") for name in ("r0.3", "items")]
    whole, part = map(records.command_of, runs)
    assert ("--as-published neuron pooling score classifier zero momentum ties cosine loss --"
            in whole and "mean-ce" not in whole)
    assert "--as-published neuron zero --" in part
    assert not re.search("tanh|detach|threshold|strict|decay-input", whole + part)
    for run in runs:
        assert_made_again(run)
    text = fake("gmp", as_published=[])
    text.config["dataset"] = "fashion-mini"
    assert "published" not in records.command_of(text)
    drawn = analyze.main(["survival", "--runs", "runs"])
    assert drawn["survival"][2][0].folder == Path("runs/r0.3")
    assert "; as published; r = 0.3; " in table("figures/survival.csv")[0][0]


# ---- survival by hand ----------------------------------------------------------------------------


def with_updates(folder, rows, classifier=False, **given):
    """A finished run with two layers; rows: (alive of the layers, regenerated, survived,
    survived_plain or None without it)."""
    items = ["classifier"] if classifier else []
    saved(folder, "criticality", as_published=items, **given)
    text = ""
    for update, (alive, back, survived, plain) in enumerate(rows, 1):
        row = dict(update=update, regenerated=back, survived=survived,
                   layers=[dict(alive=n) for n in alive])
        text += json.dumps(row | ({} if plain is None else dict(survived_plain=plain))) + "\n"
    Path(folder, "updates.jsonl").write_text(text)
    path = Path(folder, "summary.json")
    layers = [dict(name="a", alive=30, weights=90), dict(name="b", alive=10, weights=10)]
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(
        survived_by_regeneration=0.6, layers=layers)))


def shares_drawn(folder):
    drawn = analyze.main(["survival", "--runs", folder])
    _, rows = table("figures/survival.csv")
    found = {}
    for row in rows:
        found.setdefault(row["what"], []).append(float(row["share"]))
    return found, drawn["survival"][3]


def test_survival_by_both_definitions():
    with_updates("a", [([60, 20], 40, 0.8, 0.75), ([30, 10], 20, 0.5, 0.25)])
    found, says = shares_drawn("a")
    assert found == {"pruned in update": [80, 50], "plain cut": [75, 25],
                     "alive after update": [50, 50], "alive weights": [60], "r of weights": [50]}
    assert "would take: alive after it, 25 to 75 %" in says
    assert "back in it, r by construction, 50 %" in says
    assert "what the last update brought back, 50 %, equals r by construction" in says


def test_survival_of_logs_without_the_plain_cut():
    with_updates("a", [([60, 20], 40, 0.8, None), ([30, 10], 20, None, None)])
    found, says = shares_drawn("a")
    assert found["pruned in update"] == [80, pytest.approx(math.nan, nan_ok=True)]
    assert "plain cut" not in found and found["alive after update"] == [50, 50]
    assert "what a plain cut would take is not in these logs" in says


def test_a_classifier_that_is_not_regenerated_is_no_part_of_r():
    """r = 0.5 of 30 of the 40 weights that are alive in the end: 37.5 %."""
    with_updates("a", [([60, 20], 30, 0.8, 0.75), ([30, 10], 15, 0.5, 0.25)], classifier=True)
    found, says = shares_drawn("a")
    assert found["alive after update"] == [50, 50] and found["r of weights"] == [37.5]
    assert "37.5 %, equals r by construction (but the classifier)" in says


# ---- the demo's runs, shrunk, and their figures --------------------------------------------------


def start(words, **_):
    """Run a script of the demo in this process, on few images."""
    script, folder, given = Path(words[1]).stem, words[-2], [str(word) for word in words[2:]]
    small = " --width 0.5 --time-steps 2 --batch-size 16 --dataset few.npz --train-limit 96"
    given = " ".join(given).replace("--train-limit 3000", "").replace("l1 0.01", "l1 0.001")
    given = re.sub(r"--epochs-(pretrain|finetune) \d", r"--epochs-\1 2", given)
    importlib.import_module(script).main((given + small).split())
    assert Path(folder, "summary.json").exists()
    return SimpleNamespace(returncode=0)


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """A folder in which the demo has run, with its figures and report."""
    folder = tmp_path_factory.mktemp("shop")
    x = np.random.default_rng(0).integers(0, 256, (160, 16, 16), dtype=np.uint8)
    y = np.arange(160) % 4
    x[np.arange(160), 4 * y, :] = 255
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        np.savez("few.npz", x_train=x[:96], y_train=y[:96], x_test=x[96:], y_test=y[96:])
        patch.setattr(jobs, "subprocess", SimpleNamespace(run=start))
        patch.setattr(metrics, "speedup", lambda *_, **__: 1.0)
        patch.setattr(plots, "draw_curves", lambda rows, path: path.touch())  # it takes long
        drawn = analyze.main(["report", "--demo"])
        assert list(drawn) == list(analyze.FIGURES)  # the demo suffices for all
    return folder


@pytest.fixture
def there(shop, tmp_path, monkeypatch):
    """A copy of it, to break things in."""
    shutil.copytree(shop, tmp_path / "shop")
    monkeypatch.chdir(tmp_path / "shop")
    return tmp_path / "shop"


def table(path):
    """Return the comments of a CSV and its rows."""
    text = Path(path).read_text().splitlines()
    notes = [line for line in text if line.startswith("#")]
    return notes, list(csv.DictReader(text[len(notes):]))


@pytest.mark.parametrize("name", analyze.FIGURES)
def test_each_figure_of_the_demo(shop, name):
    out = shop / "figures" / "demo"
    picture = plt.imread(out / f"{name}.png")
    assert picture.shape[0] >= 400 and picture.std() > 0.02
    assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    notes, rows = table(out / f"{name}.csv")
    assert notes[0].startswith(f"# {name}: demo, short runs; few.npz") and "seeds 0" in notes[0]
    assert "runs/demo/" in notes[1] and len(rows) >= 3
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("name", analyze.FIGURES)
def test_no_panel_is_empty_and_all_axes_are_named(shop, name, monkeypatch):
    monkeypatch.chdir(shop)
    runs = [records.read_run(folder) for folder in sorted(Path("runs/demo").iterdir())]
    figure, _, used, says = analyze.FIGURES[name][0](runs)
    for axis in figure.axes:
        assert axis.get_xlabel() or len(axis.get_xticklabels()) == 2  # or bars with names
        assert axis.get_ylabel() and (axis.lines or axis.patches)
    assert any(axis.get_legend() for axis in figure.axes)
    assert used and says and not any(run.method == "dense" for run in used) * (name == "layers")
    note = plots.note_of(figure)
    assert ("inverted" in note) == (name in ("importance", "variance", "similarity"))
    assert len(figure.axes) == {"importance": 2, "variance": 4, "similarity": 4}.get(
        name, len(figure.axes))
    plt.close(figure)


def summary(shop, name):
    return json.loads((shop / "runs" / "demo" / name / "summary.json").read_text())


def test_ratio_and_epochs_draw_what_the_summaries_say(shop):
    _, rows = table(shop / "figures/demo/ratio.csv")
    found = {(row["method"], float(row["regen"])): float(row["accuracy"]) for row in rows}
    assert len(found) == 18
    for (method, rate), accuracy in found.items():
        name = {"dense": "dense", "gmp": "epochs4-r0"}.get(method, f"{method}-r{rate:g}")
        name = "epochs4-r0.5" if name == "criticality-r0.5" else name
        assert accuracy == pytest.approx(100 * summary(shop, name)["test_accuracy"])
    _, rows = table(shop / "figures/demo/epochs.csv")
    assert {(row["method"], row["epochs_prune"]): float(row["accuracy"]) for row in rows} == {
        (method, length): pytest.approx(100 * summary(
            shop, f"epochs{length}-r{rate}")["test_accuracy"])
        for method, rate in (("gmp", 0), ("criticality", 0.5)) for length in "248"}


def test_interval_draws_what_the_summaries_say(shop):
    _, rows = table(shop / "figures/demo/interval.csv")
    names = {"5": "interval5", "10": "epochs4", "20": "interval20"}
    assert {(row["method"], row["interval"]): float(row["accuracy"]) for row in rows} == {
        (method, steps): pytest.approx(100 * summary(shop, f"{name}-r{rate}")["test_accuracy"])
        for method, rate in (("gmp", 0), ("criticality", 0.5)) for steps, name in names.items()}


def test_interval_draws_other_rankings_at_the_same_rate():
    for steps in (5, 10):
        for method, rate in (("gmp", 0.0), ("criticality", 0.5), ("random", 0.5),
                             ("random", 0.1), ("gradient", 0.3)):
            saved(f"runs/{method}{rate}{steps}", method, regen=rate, interval=steps)
    saved("runs/longer", "random", interval=5, epochs_prune=9)
    saved("runs/once", "magnitude", interval=5)
    drawn = analyze.main(["interval"])
    assert [run.folder.name for run in drawn["interval"][2]] == [
        "gmp0.010", "gmp0.05", "criticality0.510", "criticality0.55", "random0.510",
        "random0.55"]


def test_survival_draws_what_the_logs_say(shop):
    _, rows = table(shop / "figures/demo/survival.csv")
    updates = [json.loads(line) for line in (
        shop / "runs/demo/epochs4-r0.5/updates.jsonl").read_text().splitlines()]
    for what, key in (("pruned in update", "survived"), ("plain cut", "survived_plain")):
        drawn = [float(row["share"]) for row in rows if row["what"] == what]
        assert drawn == pytest.approx([100 * row[key] for row in updates])
    drawn = [float(row["share"]) for row in rows if row["what"] == "alive after update"]
    assert drawn == pytest.approx([50] * len(updates), abs=0.1)  # r, to a weight
    final = {row["what"]: float(row["share"]) for row in rows}
    assert (final["r of weights"], final["r of channels"]) == (50, 30)
    for what, name in (("weights", "epochs4-r0.5"), ("channels", "channels-criticality")):
        assert final[f"alive {what}"] == pytest.approx(
            100 * summary(shop, name)["survived_by_regeneration"])


def test_importance_follows_the_channels_that_only_one_kept(shop):
    _, rows = table(shop / "figures/demo/importance.csv")
    drawn = {(row["method"], int(row["epoch"])): float(row["importance"]) for row in rows
             if row["normalisation"] == "share of the mean"}
    published = {(row["method"], int(row["epoch"])): float(row["importance"]) for row in rows
                 if row["normalisation"] == "published code"}
    kept, gammas, start = {}, {}, {}
    for method in ("criticality", "slimming"):
        folder = shop / "runs/demo" / f"channels-{method}-l1"
        layers = json.loads((folder / "channels.json").read_text())["layers"]
        kept[method] = {(row["name"], c) for row in layers for c in row["kept"]}
        start[method] = {(row["name"], c): row["gamma"][c] for row in layers for c in row["kept"]}
        with np.load(folder / "gamma.npz") as file:
            gammas[method] = {(row["name"], c): np.abs(file[row["name"]][:, i])
                              for row in layers for i, c in enumerate(row["kept"])}
    for method, other in (("criticality", "slimming"), ("slimming", "criticality")):
        only = kept[method] - kept[other]
        assert only
        for epoch in (0, 1, 2):
            now = start[method]
            if epoch:
                now = {c: gamma[epoch - 1] for c, gamma in gammas[method].items()}
            mine, high, low = [now[c] for c in only], max(now.values()), min(now.values())
            assert drawn[method, epoch] == pytest.approx(
                np.mean(mine) / np.mean(list(now.values())))
            assert published[method, epoch] == pytest.approx(
                np.mean([(high - gamma) / (high - low) for gamma in mine]))
    assert drawn["criticality", 0] < drawn["slimming", 0]  # slimming keeps the largest


def test_variance_and_similarity_of_a_run_are_those_of_numpy(shop, monkeypatch):
    monkeypatch.chdir(shop)
    folder = Path("runs/demo/channels-criticality")
    net, features, spikes = models.load(folder / "model.pt"), [], []
    net.fc.register_forward_pre_hook(lambda _, given: features.append(given[0]))
    net.lifs[-1].register_forward_hook(lambda *given: spikes.append(given[2]))
    images = np.load("few.npz")
    means, published = {}, {}
    for part in ("train", "test"):
        features.clear()
        spikes.clear()
        with torch.no_grad():
            net(torch.from_numpy(images[f"x_{part}"])[:, None])
        counts = spikes[0].sum((0, 3, 4)).double().numpy()
        high, low = counts.max(1, keepdims=True), counts.min(1, keepdims=True)
        inverted = np.where(high > low, (high - counts) / np.maximum(high - low, 1), 1)
        rows = [inverted[images[f"y_{part}"] == k] for k in range(4)]
        published[part] = [row.mean(0) for row in rows]
        published["variance"] = [row.var(0, ddof=1).mean() for row in rows]
        found = features[0].unflatten(0, (2, -1)).mean(0).double().numpy()
        found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
        classes = [found[images[f"y_{part}"] == k] for k in range(4)]
        means[part] = [rows.mean(0) for rows in classes]
    look = records.analysis_of(records.read_run(folder))
    assert look["variance"] == pytest.approx(
        [((rows - rows.mean(0)) ** 2).sum(1).mean() for rows in classes])
    assert (look["variance"] > 0).all() and (look["similarity"] > 0).all()
    assert look["similarity"] == pytest.approx([
        a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in zip(means["train"], means["test"])])
    assert look["variance_published"] == pytest.approx(published["variance"])
    assert look["similarity_published"] == pytest.approx([
        a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for a, b in zip(published["train"], published["test"])])
    for name in ("variance", "similarity"):
        _, rows = table(f"figures/demo/{name}.csv")
        for kind, key in (("unit length", name), ("published code", f"{name}_published")):
            drawn = {int(row["label"]): float(row["mean"]) for row in rows
                     if (row["normalisation"], row["pruned"], row["method"])
                     == (kind, "channels", "criticality")}
            assert drawn == {k: pytest.approx(v) for k, v in enumerate(look[key])}
    _, rows = table("figures/demo/variance.csv")
    rows = [row for row in rows if row["normalisation"] == "unit length"]
    for pruned, methods in (("weights", {"gmp", "criticality", "gradient", "random"}),
                            ("channels", {"slimming", "criticality"})):
        assert {row["method"] for row in rows if row["pruned"] == pruned} == methods
    control = records.analysis_of(records.read_run("runs/demo/random-r0.5"))["variance"]
    assert {int(row["label"]): float(row["mean"]) for row in rows if row["method"] == "random"} == {
        k: pytest.approx(v) for k, v in enumerate(control)}


def without_published(folder):
    """Make analysis.npz of a run one of before there were features of the published code."""
    path = folder / "analysis.npz"
    with np.load(path) as file:
        old = {name: value for name, value in file.items() if not name.endswith("_published")}
    np.savez(path, **old)
    return old


def test_an_older_analysis_is_made_again_where_the_network_is(there):
    folder = Path("runs/demo/channels-slimming")
    with np.load(folder / "analysis.npz") as file:
        before = dict(file)
    without_published(folder)
    found = records.analysis_of(records.read_run(folder))
    with np.load(folder / "analysis.npz") as file:
        kept = dict(file)
    assert found.keys() == kept.keys() == before.keys()
    for name in before:
        assert np.array_equal(found[name], before[name])
        assert np.array_equal(kept[name], before[name])


def test_a_damaged_analysis_is_made_again_where_the_network_is(there, capsys):
    folder = Path("runs/demo/channels-slimming")
    before = records.analysis_of(records.read_run(folder))
    (folder / "analysis.npz").write_text("PK")
    found = records.analysis_of(records.read_run(folder))
    assert all(np.array_equal(found[name], before[name]) for name in before)
    assert capsys.readouterr().out == f"note: {folder}/analysis.npz is damaged: made anew\n"


def test_an_analysis_is_computed_in_float32_and_the_same_each_time(there, monkeypatch):
    """Of a process that has started no run: torch lets cuDNN take TF32."""
    folder = Path("runs/demo/channels-slimming")
    (folder / "analysis.npz").unlink()
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    monkeypatch.setattr(cudnn, "deterministic", False)
    records.analysis_of(records.read_run(folder))
    assert not cudnn.allow_tf32 and cudnn.deterministic


def test_an_analysis_that_cannot_be_kept_is_used(there, monkeypatch, capsys):
    folder = Path("runs/demo/channels-slimming")
    kept = records.analysis_of(records.read_run(folder))
    path = folder / "analysis.npz"
    path.unlink()

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files.os, "replace", refuse)
    capsys.readouterr()
    found = records.analysis_of(records.read_run(folder))
    assert capsys.readouterr().out == (f"note: {path} cannot be written (Read-only file system); "
                                       f"the analysis is not kept\n")
    assert found.keys() == kept.keys() and not path.exists()
    assert all(np.array_equal(found[name], kept[name]) for name in kept)


def test_an_older_analysis_without_its_network_is_drawn_by_one_normalisation(there, capsys):
    folder = Path("runs/demo/channels-slimming")
    old = without_published(folder)
    (folder / "model.pt").unlink()
    before = [row for row in table("figures/demo/variance.csv")[1]
              if row["normalisation"] == "unit length"]
    drawn = analyze.main(["variance", "--runs", "runs/demo"])
    assert table("figures/variance.csv")[1] == before
    assert ("not drawn as the published code: analysis.npz of 1 runs is older, and model.pt or the "
            "images are missing" in capsys.readouterr().out)
    assert re.fullmatch(r"r = [^.]*\.\d.*\.", plots.note_of(drawn["variance"][0]))
    assert "inverted" not in plots.note_of(drawn["variance"][0])
    assert records.analysis_of(records.read_run(folder)).keys() == old.keys()


def test_controls_are_of_the_same_runs_and_rate(there):
    def panels():
        runs = [records.read_run(folder) for folder in sorted(Path("runs/demo").iterdir())]
        found = records.with_controls(runs, records.compared(runs, "criticality", "baseline"))
        return {pruned: list(methods) for pruned, methods in found.items()}

    channels = {records.CHANNELS: ["slimming", "criticality"]}
    assert panels() == channels | {
        records.WEIGHTS: ["gmp", "criticality", "gradient", "random"]}
    shutil.rmtree("runs/demo/gradient-r0.5")  # other rates of it are still there
    assert panels() == channels | {records.WEIGHTS: ["gmp", "criticality", "random"]}
    shutil.copytree("runs/demo/random-r0.5", "runs/demo/random-seed1")
    for name in ("epochs4-r0", "epochs4-r0.5"):
        shutil.copytree(f"runs/demo/{name}", f"runs/demo/{name}-seed1")
    for folder in Path("runs/demo").glob("epochs4-r0*-seed1"):  # two seeds, of random only one
        for name in ("config", "summary"):
            values = json.loads((folder / f"{name}.json").read_text()) | dict(seed=1)
            (folder / f"{name}.json").write_text(json.dumps(values))
    assert panels() == channels | {records.WEIGHTS: ["gmp", "criticality"]}


def test_what_is_seen_of_a_layer_adds_up_to_what_the_run_measured(shop):
    for name in ("epochs4-r0", "channels-slimming"):
        run = records.read_run(shop / "runs/demo" / name)
        assert sum(records.layers_of(run, "sops").values()) == pytest.approx(run.summary["sops"])
        assert set(records.layers_of(run, "rate")) == set(records.layers_of(run, "entropy"))
    _, rows = table(shop / "figures/demo/layers.csv")
    mine = [row for row in rows if (row["pruned"], row["method"]) == ("weights", "gmp")]
    assert [float(row["mean"]) for row in mine] == [
        pytest.approx(100 * layer["alive"] / layer["weights"])
        for layer in summary(shop, "epochs4-r0")["layers"]]


def test_several_seeds_give_a_mean_and_a_spread(there):
    for method, rate in (("gmp", "0"), ("criticality", "0.5")):
        source = there / f"runs/demo/epochs4-r{rate}"
        copy = shutil.copytree(source, there / f"runs/{method}-seed1")
        for name in ("config", "summary"):
            values = json.loads((copy / f"{name}.json").read_text()) | dict(seed=1)
            if name == "summary":
                values["test_accuracy"] += 0.02
            (copy / f"{name}.json").write_text(json.dumps(values))
    analyze.main(["ratio", "--runs", *map(str, Path("runs/demo").iterdir()), "runs/gmp-seed1",
                  "runs/criticality-seed1"])
    _, rows = table("figures/ratio.csv")
    found = {(row["method"], float(row["regen"])): row for row in rows}
    for key in (("gmp", 0.0), ("criticality", 0.5)):
        assert found[key]["seeds"] == "2"
        assert float(found[key]["std"]) == pytest.approx(2 / math.sqrt(2))
    assert float(found["random", 0.5]["std"]) == 0


# ---- the command line ----------------------------------------------------------------------------


def test_runs_in_the_default_folder_are_found(there, capsys):
    for name in ("epochs4-r0", "epochs4-r0.5"):
        shutil.copytree(there / "runs/demo" / name, there / "runs" / name)
    drawn = analyze.main([])
    assert set(drawn) == {"survival", "variance", "similarity", "curves", "layers"}
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(analyze.FIGURES)  # one line each
    assert "importance  not drawn; the runs that it needs: python prune_structured.py " in out
    assert "--dataset few.npz" in out and "--width 0.5" in out
    assert sorted(path.name for path in Path("figures").glob("*.png")) == [
        f"{name}.png" for name in sorted(drawn)]


def test_one_figure_of_the_runs_named(there, capsys):
    drawn = analyze.main(["layers", "--runs", "runs/demo/epochs4-r0", "--out", "elsewhere"])
    assert list(drawn) == ["layers"] and drawn["layers"][2][0].method == "gmp"
    assert {path.name for path in Path("elsewhere").iterdir()} == {
        "layers.png", "layers.pdf", "layers.csv"}


def test_results_are_drawn_without_weights_or_data(there, monkeypatch):
    before = Path("figures/demo/variance.csv").read_text()
    Path("few.npz").unlink()
    for path in Path("runs/demo").glob("*/model.pt"):
        path.unlink()
    analyze.main(["variance", "--runs", *map(str, sorted(Path("runs/demo").iterdir()))])
    assert Path("figures/variance.csv").read_text() == before


def test_what_is_no_run_is_named_and_skipped(there, capsys):
    Path("runs/demo/dense/summary.json").unlink()
    Path("runs/demo/random-r0.1/config.json").write_text('{"data')
    Path("runs/demo/random-r0.3/summary.json").write_text('{"method": "random"}')
    Path("runs/demo/random-r0.5/summary.json").write_text("[]")
    analyze.main(["layers", "--runs", *map(str, sorted(Path("runs/demo").iterdir())), "figures",
                  "few.npz", "absent"])
    found = re.findall("skipped (.*?): (.*)", capsys.readouterr().out)
    skipped = {name: why for names, why in found for name in names.split(", ")}
    assert skipped == {
        "runs/demo/dense": "the run is not finished: it has no summary.json",
        "runs/demo/random-r0.1": "config.json is damaged",
        "runs/demo/random-r0.3": skipped["runs/demo/random-r0.3"],
        "runs/demo/random-r0.5": "summary.json is damaged",
        **dict.fromkeys(("figures", "few.npz", "absent"),
                        "it is no run: it has no config.json")}
    assert "summary.json has no script, dataset" in skipped["runs/demo/random-r0.3"]


@pytest.mark.parametrize("figure, name, damage, says", [
    ("survival", "updates.jsonl", None, "it has no updates.jsonl"),
    ("survival", "updates.jsonl", "5\n", "updates.jsonl is damaged"),
    ("survival", "updates.jsonl", '{"layers": []}\n', "a row of updates.jsonl has no survived"),
    ("curves", "metrics.jsonl", "{", "metrics.jsonl is damaged"),
    ("variance", "analysis.npz", "PK", "analysis.npz is damaged")])  # and model.pt is gone
def test_a_run_with_a_bad_file_is_named_and_left_out(there, capsys, figure, name, damage, says):
    path = Path("runs/demo/epochs4-r0.5") / name
    path.unlink() if damage is None else path.write_text(damage)
    path.with_name("model.pt").unlink()
    drawn = analyze.main([figure, "--runs", *map(str, sorted(Path("runs/demo").iterdir()))])
    assert f"{figure:<12}without runs/demo/epochs4-r0.5: {says}\n" in capsys.readouterr().out
    used = {run.folder.name for run in drawn[figure][2]}
    assert "epochs4-r0.5" not in used and used & {"criticality-r0.3", "criticality-r0.7"}


def test_a_log_of_updates_that_is_cut_off_is_not_averaged_with_a_whole_one():
    runs = [fake("criticality", seed, 0.5, as_published=[]) for seed in range(3)]
    row = dict(layers=[dict(alive=10)], survived=0.5, survived_plain=0.4, regenerated=5)
    for run, count in zip(runs, (4, 3, 4)):
        run.files["updates.jsonl"] = [row] * count
    _, ((axis,),) = plots.canvas(1)
    with pytest.raises(records.Unfit, match="has 3 updates, another run's 4") as short:
        analyze.survival_of_updates(axis, runs)
    assert short.value.args[0] is runs[1]
    rows, _ = analyze.survival_of_updates(axis, runs[::2])
    assert [row["share"] for row in rows] == [50] * 4 + [40] * 4 + [50] * 4


def test_curves_over_epochs_that_were_not_all_evaluated():
    """The test set's are of the epochs that all runs were evaluated in."""
    runs = [fake("gmp", seed, 0.0) for seed in range(2)]
    for run, every in zip(runs, (1, 2)):
        run.files["metrics.jsonl"] = [
            dict(stage="finetune", train_loss=1.0, train_accuracy=0.5)
            | {f"test_{key}": None if epoch % every else epoch / 10 + every
               for key in ("loss", "accuracy")} for epoch in range(1, 5)]
    _, (axes,) = plots.canvas(2)
    rows = analyze.curves_of(axes, runs, "gmp")
    test = [(row["epoch"], row["mean"]) for row in rows
            if (row["set"], row["quantity"]) == ("test", "loss")]
    assert test == [(2, pytest.approx(1.7)), (4, pytest.approx(1.9))]
    assert len(rows) == 2 * 4 + 2 * 2
    del runs[1].files["metrics.jsonl"][3:]
    with pytest.raises(records.Unfit, match="has 3 epochs of fine-tuning, another one 4") as short:
        analyze.curves_of(axes, runs, "gmp")
    assert short.value.args[0] is runs[1]


def test_verdicts_are_written_and_printed(capsys):
    for seed, accuracy in enumerate((0.85, 0.851)):
        saved(f"runs/g{seed}", "gmp", regen=0.0, seed=seed, accuracy=0.84)
        for rate in (0.1, 0.5):
            saved(f"runs/c{rate}{seed}", "criticality", regen=rate, seed=seed, accuracy=accuracy)
    analyze.main(["verdicts"])
    text, printed = Path("figures/verdicts.md").read_text(), capsys.readouterr().out
    assert text.startswith("| the paper says | verdict | here |\n")
    assert text.count("\n") == 8 and printed.endswith("verdicts    figures/verdicts.md\n")
    ((letter, setting),) = re.findall(r"^- (\*\*A\*\*) weights: (.*)$", text, re.M)
    for line in text.splitlines()[2:4]:
        claim, verdict, here = line.strip("| ").split(" | ")
        assert f"\n{claim}: {verdict}. {here.replace(letter, setting)}\n" in printed
    for folder in Path("runs").glob("c*"):
        shutil.rmtree(folder)
    for seed in (0, 1):  # a figure can be drawn of these, and no verdict can be given
        saved(f"runs/r{seed}", "random", regen=0.5, seed=seed)
    with pytest.raises(SystemExit) as stopped:
        analyze.main(["verdicts"])
    assert stopped.value.code == 2 and "say nothing of a claim of the paper" in one_line(capsys)


def test_a_run_without_weights_and_analysis_is_named(there, capsys):
    for name in ("model.pt", "analysis.npz"):
        Path("runs/demo/channels-slimming", name).unlink()
    analyze.main(["variance", "--runs", *map(str, sorted(Path("runs/demo").iterdir()))])
    assert ("without runs/demo/channels-slimming: there is no file "
            "runs/demo/channels-slimming/model.pt" in capsys.readouterr().out)
    assert {row["pruned"] for row in table("figures/variance.csv")[1]} == {"weights", "channels"}


def test_importance_refuses_networks_that_began_differently(there, capsys):
    path = Path("runs/demo/channels-slimming-l1/channels.json")
    changed = json.loads(path.read_text())
    changed["layers"][0]["gamma"][0] += 0.1
    path.write_text(json.dumps(changed))
    with pytest.raises(SystemExit) as stopped:
        analyze.main(["importance", "--runs", *map(str, Path("runs/demo").iterdir())])
    assert stopped.value.code == 2
    assert "was pruned from another network" in capsys.readouterr().out


@pytest.mark.parametrize("given", [[], ["variance"], ["report"], ["--runs", "nowhere"]])
def test_nothing_to_draw(given, capsys):
    with pytest.raises(SystemExit) as stopped:
        analyze.main(given)
    assert stopped.value.code == 2 and not Path("figures").exists()
    assert "Make some first: python analyze.py --demo" in one_line(capsys)


@pytest.mark.parametrize("given, says", [
    (["survivals"], "invalid choice: 'survivals'"), (["--demo", "--runs", "a"], "exclude"),
    (["--runs"], "expected at least one argument"), (["--speed"], "unrecognized")])
def test_wrong_flags(given, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        analyze.main(given)
    assert stopped.value.code == 2 and says in one_line(capsys)


def test_the_demo_goes_on_where_it_was_and_stops_at_what_fails(there, monkeypatch, capsys):
    shutil.rmtree("runs/demo/random-r0.3")
    started = []

    def fail(words, **_):
        started.append(words)
        return SimpleNamespace(returncode=1, stderr="prune_unstructured.py: error: disk full\n")

    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(run=fail))
    with pytest.raises(SystemExit) as stopped:
        analyze.main(["--demo"])
    assert stopped.value.code == 1 and len(started) == 1
    assert started[0][-3:] == ["--run-dir", Path("runs/demo/random-r0.3"), "--resume"]
    error = capsys.readouterr().err
    assert "disk full. Go on with: python analyze.py --demo" in error and "Traceback" not in error


def test_the_report_is_one_file_with_all_figures(shop):
    text = (shop / "figures/demo/report.html").read_text()
    images = re.findall(r'<img alt="(\w+)" width="\d+" src="data:image/png;base64,([^"]+)"', text)
    assert [name for name, _ in images] == list(analyze.FIGURES)
    for name, image in images:
        assert base64.b64decode(image) == (shop / f"figures/demo/{name}.png").read_bytes()
    assert "python prune_structured.py" in text and "of the classes" in text
    # what stands under the pictures is not said again under the table of the claims
    _, _, below = text.partition("</table>")
    for words in ("the cosine is near 1 for any network", "updates, one every", "no error bars",
                  "a higher value means a smaller |gamma| in that network"):
        assert words not in below
    assert text.count('<p class="note">demo, short runs; few.npz') == len(analyze.FIGURES)
    assert not re.search(r'(src|href)="(?!data:|#)', text)  # it needs no other file
    assert text.count("<section") == text.count("</section>") == len(analyze.FIGURES)
    # a verdict a claim, in one table; contents; a table a figure
    page = Page(text)
    summary, *tables = page.tables
    assert summary[0] == verdicts.HEAD and len(tables) == len(analyze.FIGURES)
    claims = {claim.says: claim for claim in verdicts.CLAIMS}
    assert len(summary) > 8
    for says, verdict, _, figure in summary[1:]:  # the runs have one seed
        assert figure == claims[says].figure
        assert verdict == (verdicts.EMPTY if "had come back" in says else verdicts.UNTOLD), says
    assert page.ids >= {"summary", "contents", *analyze.FIGURES} and page.links <= page.ids
    rates = tables[0]
    assert rates[0] == ["", "0", "0.1", "0.3", "0.5", "0.7"]
    ratio = {(row["method"], row["regen"]): row for row in table(
        shop / "figures/demo/ratio.csv")[1]}
    for row in rates[1:]:
        for rate, cell in zip(rates[0][1:], row[1:]):
            known = ratio.get((row[0], f"{float(rate):.1f}"))
            assert cell == (f"{float(known['accuracy']):.1f}" if known else "-")


class Page(html.parser.HTMLParser):
    """A page: all tags are closed in order; its tables, lists of rows of texts, ids, and the ids
    that its links name."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.ids, self.links = [], [], set(), set()
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if "id" in attrs:
            assert attrs["id"] not in self.ids
            self.ids.add(attrs["id"])
        if tag == "a":
            self.links.add(attrs["href"].removeprefix("#"))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def test_what_the_report_says_of_the_paper_is_what_the_texts_say():
    texts = " ".join(" ".join((ROOT / name).read_text().split())
                     for name in ("README.md", "docs/results.md"))
    said = " ".join([*(claim.says for claim in verdicts.CLAIMS),
                     *(look_for for _, look_for, _ in analyze.FIGURES.values()),
                     *analyze.INTRO])
    for words in ("stable from r = 0.1 to 0.6", "1.8 points", "200 + 300 epochs",
                  "48.03 % of the final weights", "42.60 % of the final channels",
                  "above GMP, and criticality is above the other two", "by construction"):
        assert words in said and words in texts, words
    assert "there no gain over GMP is shown" in said
    assert "**No gain over GMP is shown here**" in texts


def test_one_failed_seed_does_not_flatten_a_figure():
    for seed, failed in enumerate((0.8, 0.8, 0.33)):
        saved(f"runs/g{seed}", "gmp", regen=0.0, seed=seed, accuracy=0.84 + 0.001 * seed)
        for rate, accuracy in ((0.1, 0.83), (0.5, 0.81), (0.9, failed)):
            saved(f"runs/c{rate}{seed}", "criticality", regen=rate, seed=seed,
                  accuracy=accuracy)
    drawn = analyze.main(["ratio"])
    figure, rows, used, _ = drawn["ratio"]
    low, high = figure.axes[0].get_ylim()
    assert (low, high) == pytest.approx((80, 85.2))
    assert [text.get_text() for text in figure.axes[0].texts] == ["64"]
    note = plots.note_of(figure)
    assert "bars: their standard deviation" in note and "a mean below the panel" in note
    analyze.write_report(Path("figures/report.html"), used, drawn)
    assert "a mean below the panel" not in Path("figures/report.html").read_text()
    Path("figures/ratio.png").unlink()  # it could not be drawn: the page says what it would
    analyze.write_report(Path("figures/report.html"), used, drawn)
    assert "a mean below the panel" in Path("figures/report.html").read_text()


def test_classes_have_names():
    run = fake("gmp", dataset="fashion-mini")
    assert records.class_names_of(run)[:2] == ["T-shirt/top", "Trouser"]
    run.config |= dict(data=dict(class_names=["a", "b"]))
    assert records.class_names_of(run) == ["a", "b"]
    assert records.class_names_of(fake("gmp", dataset="mine.npz")) is None
    names, runs = ["cat", "dog"], []
    for number, method in enumerate(("gmp", "criticality")):
        run = fake(method, regen=0.5 * number, data=dict(class_names=names))
        run.files["analysis"] = dict(variance=np.array([2.0, 1.0]) - 0.1 * number,
                                     variance_published=np.ones(2))
        runs.append(run)
    figure, rows, _, _ = analyze.variance(runs)
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["dog", "cat"]
    assert [(row["label"], row["class"]) for row in rows[:2]] == [(1, "dog"), (0, "cat")]
    assert report.table_of("variance", analyze.TABLES["variance"], rows).head == ["", "dog", "cat"]


def test_a_layer_that_some_runs_have_lost_stands_at_its_own_name():
    def run(method, seed, layers):
        found = fake(method, seed, regen=0.5 * (method == "criticality"))
        found.files["analysis"] = {
            f"{kind}/{name}": np.full(2 if kind == "criticality" else (), value)
            for kind in ("rate", "sops", "criticality") for name, value in layers.items()}
        return found

    whole = dict(lifs_0=1.0, lifs_1=2.0, lifs_2=3.0, lif_fc=4.0)
    runs = [run("criticality", 0, {name: whole[name] for name in ("lifs_0", "lifs_2", "lif_fc")}),
            run("criticality", 1, {name: whole[name] for name in ("lifs_0", "lif_fc")})]
    runs += [run(method, seed, whole) for method in ("dense", "gmp") for seed in (0, 1)]
    for draw in (analyze.activity, analyze.criticality):
        figure, rows, used, _ = draw(runs)
        axis = figure.axes[0]
        assert len(used) >= 4
        assert [text.get_text() for text in axis.get_xticklabels()] == list(whole)
        for row in rows:
            key = "mean" if "mean" in row else "criticality"
            factor = 1e-3 if "(k)" in row.get("quantity", "") else 1
            assert row[key] == factor * whole[row["layer"]] or (
                np.isnan(row[key]) and row["method"] == "criticality"
                and row["layer"] in ("lifs_1", "lifs_2"))
    lost = [dict.fromkeys(names) for names in ("abd", "acd", "abcd")]
    assert plots.names_of(lost) == list("abcd")
    boxes = {(round(line.get_xdata().mean(), 1), line.get_ydata().mean())
             for line in axis.lines if len(line.get_xdata()) > 2}
    assert boxes == {(-0.2, 1), (0.8, 2), (1.8, 3), (2.8, 4), (0.2, 1), (2.2, 3), (3.2, 4)}


# ---- commands ------------------------------------------------------------------------------------


def runs_below(folder):
    return [records.read_run(path) for path in records.find_runs(folder)]


def assert_made_again(run):
    """The command of a run asks for the flags that its config.json holds."""
    words = records.command_of(run).split()
    args = vars(importlib.import_module(run.script).parse_args(words[2:]))
    own = {"resume", "overwrite"} | records.NO_SETTINGS
    assert words[0] == "python" and words[1] == f"{run.script}.py"
    known = args.keys() & run.config.keys() - own  # an older run knows fewer
    assert len(known) > 20 and {flag: args[flag] for flag in known} == {
        flag: run.config[flag] for flag in known}


def test_the_commands_of_the_runs_make_them_again(shop):
    for run in runs_below(shop) + runs_below(ROOT / "results"):
        assert_made_again(run)


def test_the_commands_hold_what_differs_from_the_defaults(tmp_path):
    given = ("--no-flip --precision bf16 --sparsity 0.95 --candidates new --seed 3 --smoke "
             "--run-dir a")
    prune_unstructured.main(given.split())
    run = records.read_run("a")
    assert_made_again(run)
    assert "--no-flip" in records.command_of(run) and "--smoke" in records.command_of(run)
    assert "--lr" not in records.command_of(run)


STUDIES = "methods readings regen-rate fashion-mnist cifar100 items interval demo".split()


def test_the_figures_in_the_readme_are_those_of_the_logs():
    folders = [str(ROOT / "results" / "runs" / study) for study in STUDIES]
    text = (ROOT / "results" / "README.md").read_text()
    assert (f"analyze.py verdicts --out results/figures --runs results/runs/{{{','.join(STUDIES)}}}"
            in text)
    drawn = {}
    for name in ("ratio", "survival", "importance", "variance", "similarity", "interval"):
        drawn |= analyze.main([name, "--runs", *folders, "--out", "out"])
        if name in ("ratio", "survival", "variance", "interval"):
            (_, made), (_, shipped) = (table(folder / f"{name}.csv") for folder in (
                Path("out"), ROOT / "results" / "figures"))
            assert made == shipped
            assert f"results/figures/{name}.png" in (ROOT / "docs/results.md").read_text()
    runs = records.read_runs(records.folders_of(folders, without=None))
    verdicts.write(Path("verdicts.md"), verdicts.table(runs, drawn), runs)
    made = Path("verdicts.md").read_text()
    assert made == (ROOT / "results/figures/verdicts.md").read_text() and made in text
