"""prune_sdsnn.py: ranges, counters, rates and their order, by worked examples and plain loops; then
the script from its command line, on tiny budgets."""
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import channels
import data
import modelfile
import models
import prune_sdsnn
from harness import runfolder
import training
from helpers import assert_same_run, lines, refused, stop_after
from masks import Masks, computing_with, seeded
from harness.presets import CIFAR_RULES, MNIST_RULES
from prune_sdsnn import (advance, develop, make_schedule, masked, mute_dead_neurons, n_left,
                         next_percent, prunable_layers, prune_neurons, regenerate_synapses,
                         start_layer, start_layers, trim, update_ranges)

# 4 steps an epoch, structure from epoch 4 on
SHORT = ["--dataset", "mine.npz", "--epochs-prune", "7", "--epochs-finetune", "1",
         "--width", "0.25", "--batch-size", "20", "--rate-conv", "0.3"]


@pytest.fixture(autouse=True)
def the_name_of_the_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prune_sdsnn.py"])


@pytest.fixture
def mine():
    """A data set of two classes, in the folder of the test: 80 images of 12 x 12 pixels."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 128, (80, 12, 12), dtype=np.uint8), np.arange(80) % 2
    x[y == 1, :6] += 100
    np.savez("mine.npz", x_train=x, y_train=y, x_test=x[:30], y_test=y[:30])


@pytest.fixture
def easy_growth(monkeypatch):
    """The percentile of growth stays low, so that a short run regenerates."""
    def schedule(*given):
        return replace(make_schedule(*given), scale=0.1)

    monkeypatch.setattr(prune_sdsnn, "make_schedule", schedule)


def run(*given, short=True):
    return prune_sdsnn.main([*(SHORT if short else []), *map(str, given)])


def layer_of(weight, percent=0.0, official=False):
    return start_layer(torch.as_tensor(weight, dtype=torch.float32), percent, official)


def row(*values):
    return torch.tensor([values], dtype=torch.float32)


# ---- (a) ranges and their counters ---------------------------------------------------------------


def with_range(weight, upper=1.0, lower=-1.0):
    layer = layer_of(weight)
    layer["upper"].fill_(upper)
    layer["lower"].fill_(lower)
    return layer


def test_where_ranges_begin():
    weight = torch.tensor([[0.5, -0.9], [0.2, 0.1]])
    layer = layer_of(weight)
    assert layer["upper"].unique().tolist() == [0.5]
    assert layer["lower"].unique().tolist() == pytest.approx([-0.9])  # the layer's own minimum
    assert layer_of(weight, official=True)["lower"].unique().tolist() == [-0.5]  # -max(w)
    assert torch.equal(layer["previous"], weight.abs())
    assert not layer["ever_pruned"].any() and layer["ever_pruned"].shape == (2,)
    assert layer_of(-weight.abs())["upper"].unique().tolist() == [0]  # never below 0


@pytest.mark.parametrize("sign, bound", [(1, "upper"), (-1, "lower")])
def test_a_range_grows_by_the_mean_excess(sign, bound):
    layer = with_range(row(sign * 1.0))
    runs, ranges = [], []
    for value in (1.2, 1.3, 1.5, 1.5):  # epoch 0 does not count, nor does the first epoch outside
        update_ranges(layer, row(sign * value), window=2)
        runs.append(int(layer[f"run_{bound}"]) - 1)
        ranges.append(sign * float(layer[bound]))
    assert runs == [0, 1, 0, 1]  # the third would be a count of 2: it fires
    assert ranges == pytest.approx([1, 1, 1.4, 1.4])  # 1 + (0.3 + 0.5) / 2; the 0.2 is left out
    assert float(layer[f"sum_{bound}"]) == pytest.approx(sign * 0.1)
    assert float(layer["lower" if bound == "upper" else "upper"]) == -sign  # the other one stays
    update_ranges(layer, row(sign * 1.6), window=2)  # n epochs after it fired, not n + 1
    assert sign * float(layer[bound]) == pytest.approx(1.4 + (0.1 + 0.2) / 2)


def test_an_epoch_inside_starts_the_count_again():
    layer = with_range(row(1.0))
    for value in (1.2, 1.3, 0.9, 1.2, 1.3):
        update_ranges(layer, row(value), window=2)
    assert float(layer["upper"]) == 1 and int(layer["run_upper"]) == 2
    assert float(layer["sum_upper"]) == pytest.approx(0.3)
    update_ranges(layer, row(1.0), window=2)  # equal is outside: w >= r+
    assert float(layer["upper"]) == pytest.approx(1 + 0.3 / 2)


def test_a_range_shrinks_with_its_weight():
    layer = with_range(row(0.8))
    seen = []
    for value in (0.7, 0.6, 0.5, 0.4, 0.3):
        update_ranges(layer, row(value), window=2)
        seen.append((float(layer["upper"]), float(layer["lower"])))
    assert seen == [(1, -1), (1, -1), (0.75, -0.75), (0.75, -0.75), (0.5625, -0.5625)]


def test_a_masked_weight_and_a_vanishing_drift_never_shrink():
    layer = with_range(row(0.8, 0.5, 0.5))
    for epoch in range(1, 10):
        update_ranges(layer, row(0.0, 0.5, 0.5 * (1 - 1e-5 * epoch)), window=2)
    assert layer["upper"].tolist() == [[1, 1, 1]]
    layer = with_range(row(0.5))
    for epoch in range(1, 4):  # the published rule has no tolerance
        update_ranges(layer, row(0.5 * (1 - 1e-5 * epoch)), window=2, tolerance=0)
    assert float(layer["upper"]) == 0.75


def test_advance_is_the_published_count():
    """A count of the places that are in the set now and were in it at the last epoch."""
    rng = np.random.default_rng(0)
    run_, count, was, n = torch.zeros(50, dtype=torch.int8), np.zeros(50), np.zeros(50, bool), 3
    fired_ever = 0
    for _ in range(60):
        inside = rng.random(50) < 0.8
        fired = advance(run_, torch.from_numpy(inside), n)
        count = np.where(inside & was, count + 1, 0)
        assert fired.tolist() == (count >= n).tolist()
        fired_ever += fired.sum()
        count[count >= n], was = 0, inside
        assert torch.equal((run_ - 1).clamp(min=0), torch.from_numpy(count).to(torch.int8))
    assert fired_ever > 100


# ---- the schedule --------------------------------------------------------------------------------


def times(schedule):
    return schedule.window, schedule.clamp, schedule.start, schedule.late, schedule.scale


def test_the_published_schedule_and_its_scaling():
    schedule = make_schedule(300, MNIST_RULES)
    assert times(schedule) == (18, 19, 37, 60, 1)
    assert schedule.count == dict(conv=18, fc=10) and schedule.few == dict(conv=10, fc=20)
    schedule = make_schedule(600, CIFAR_RULES)
    assert (schedule.window, schedule.start, schedule.late, schedule.scale) == (18, 37, 60, 1)
    assert schedule.count == dict(conv=18, fc=18) and schedule.alpha == (0.5, 5e-4)
    schedule = make_schedule(150, MNIST_RULES)
    assert times(schedule) == (9, 10, 19, 42, 1)
    assert schedule.count == dict(conv=9, fc=5)
    schedule = make_schedule(8, MNIST_RULES)
    assert (schedule.window, schedule.clamp, schedule.start, schedule.scale) == (1, 2, 3, 37.5)
    assert schedule.count == dict(conv=1, fc=1)
    assert make_schedule(99, MNIST_RULES).scale > make_schedule(100, MNIST_RULES).scale == 1


@pytest.mark.parametrize("epochs, mnist, cifar", [
    (300, 19, 6), (600, 19, 6), (150, 10, 3), (50, 4, 1), (8, 2, 1)])
def test_the_official_mode_is_that_of_one_repository(epochs, mnist, cifar):
    """On CIFAR-10: a first rate of 3 %, 20 live synapses, the constraint from epoch 6 on. The
    other mode has it after n epochs, from which on ranges can move."""
    for rules, first in ((MNIST_RULES, mnist), (CIFAR_RULES, cifar)):
        schedule = make_schedule(epochs, rules, official=True)
        assert schedule.clamp == first
        usual = make_schedule(epochs, rules)
        assert usual.clamp == usual.window + 1 == mnist and usual.moves == ("conv", "fc")
        assert replace(schedule, clamp=usual.clamp, moves=usual.moves) == usual
    assert CIFAR_RULES["few"] == dict(conv=20, fc=20)
    args = prune_sdsnn.parse_args(["--dataset", "cifar10", "--mode", "official"])
    assert (args.rate_conv, args.rate_fc) == (0.005, 0.03)


def test_the_mode_reaches_the_schedule(mine, monkeypatch):
    seen = []

    def schedule(*given):
        seen.append(given)
        raise KeyboardInterrupt

    for mode in ("fixed", "official"):
        args = prune_sdsnn.parse_args([*SHORT, "--mode", mode, "--run-dir", mode])
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(prune_sdsnn, "parse_args", lambda argv: args)
            patch.setattr(prune_sdsnn, "make_schedule", schedule)
            prune_sdsnn.main([])
    assert [given[2] for given in seen] == [False, True]


def test_equal_filters_go_by_the_seed():
    """Where ranges never move, filters with as many live synapses tie."""
    gone = set()
    for seed in range(20):
        layer, mask = layer_of(torch.randn(8, 4, 3, 3), 25.0), torch.ones(8, 4, 3, 3).bool()
        prune_neurons(layer, mask, seeded(seed))
        gone.add(tuple((~mask.flatten(1).any(1)).nonzero().flatten().tolist()))
    assert all(len(filters) == 2 for filters in gone) and len(gone) > 5


# ---- (d) pruning and its rate --------------------------------------------------------------------


def follow(neurons, percent, epochs, rules, conv=None, fc_first=False):
    """The counts of pruned neurons of a fully connected layer of constant ranges from the first
    structure epoch on, nothing regenerated; with conv, a convolution of 40 before it, from P = 5.
    Returns (counts, P by epoch, P of the convolution in the end, its count)."""
    schedule, counts, percents = make_schedule(epochs, rules), [], []
    fc, mask = layer_of(torch.ones(neurons, 25), percent), torch.ones(neurons, 25, dtype=torch.bool)
    other, other_mask = layer_of(torch.ones(40, 15, 3, 3), conv or 0.0), torch.ones(
        40, 15, 3, 3, dtype=torch.bool)
    for epoch in range(schedule.start, epochs):
        def develop_fc():
            prune_neurons(fc, mask, seeded(epoch))
            fc["percent"] = next_percent(fc["percent"], mask, None, epoch, schedule)

        if fc_first:
            develop_fc()
        if conv is not None:
            prune_neurons(other, other_mask, seeded(epoch))
            other["percent"] = next_percent(other["percent"], other_mask, mask, epoch, schedule)
        if not fc_first:
            develop_fc()
        counts.append(int((~mask.any(1)).sum()))
        percents.append(fc["percent"])
    return counts, percents, other["percent"], int((~other_mask.flatten(1).any(1)).sum())


def test_published_counts_mnist():
    counts, percents, conv, conv_count = follow(300, 35.0, 300, MNIST_RULES, conv=5.0)
    assert counts[:6] == [105, 163, 178, 183, 185, 185]
    assert [counts[epoch - 37] for epoch in (60, 97, 299)] == [186, 187, 192]
    assert percents[:3] == pytest.approx([54.5, 59.5399, 61.1910], abs=1e-4)
    assert conv == pytest.approx(6.46, abs=0.005) and conv_count == 2  # 3 would need 7.5
    assert 192 * 1960 / 596_535 == pytest.approx(0.631, abs=1e-3)  # fc1's share of all weights
    # convolutions come first: they divide by the fc count of before this epoch's pruning
    assert follow(300, 35.0, 300, MNIST_RULES, conv=5.0, fc_first=True)[2] > conv + 0.05


def test_published_counts_n_mnist_and_dvs():
    counts, *_ = follow(300, 45.0, 300, MNIST_RULES)
    assert counts[:6] == [135, 184, 197, 201, 202, 203]
    assert [counts[epoch - 37] for epoch in (60, 299)] == [203, 208]
    rules = MNIST_RULES | dict(divisor=11)
    counts, percents, conv, conv_count = follow(300, 60.0, 300, rules, conv=5.0)
    assert counts[:6] == [180, 212, 221, 224, 225, 225]
    assert [counts[epoch - 37] for epoch in (60, 299)] == [226, 229]
    assert percents[:2] == pytest.approx([70.9091, 73.8521], abs=1e-4)
    assert conv == pytest.approx(7.20, abs=0.005) and conv_count == 2


def test_published_counts_cifar10():
    counts, percents, *_ = follow(512, 3.0, 600, CIFAR_RULES)
    assert counts[:6] == [15, 142, 177, 189, 193, 194]
    assert [counts[epoch - 37] for epoch in (61, 599)] == [195, 236]
    assert percents[:2] == pytest.approx([27.85, 34.656], abs=1e-3)


def test_the_rate_of_a_convolution_by_hand():
    schedule = make_schedule(300, CIFAR_RULES)
    mask, reader = torch.ones(8, 4, 3, 3, dtype=torch.bool), torch.ones(16, 8, 3, 3,
                                                                        dtype=torch.bool)
    mask[:2], reader[:6] = False, False
    assert next_percent(1.0, mask, reader, 37, schedule) == pytest.approx(1 + 6 / 10)
    assert next_percent(1.0, mask, reader, 42, schedule) == pytest.approx(1 + math.exp(-1) * 6 / 10)
    # read by the output
    assert next_percent(1.0, mask, None, 37, schedule) == pytest.approx(1 + 6 / 8)
    reader[:] = False
    assert next_percent(1.0, mask, reader, 37, schedule) == pytest.approx(1 + 6)  # not divided by 0
    scaled = make_schedule(8, CIFAR_RULES)  # exponents in epochs of 300
    assert next_percent(1.0, mask, None, 4, scaled) == pytest.approx(
        1 + math.exp(-37.5 / 5) * 6 / 8)


def test_when_a_neuron_counts_as_pruned():
    schedule = make_schedule(300, MNIST_RULES)
    fc, conv = torch.zeros(3, 30, dtype=torch.bool), torch.zeros(3, 4, 3, 3, dtype=torch.bool)
    fc[0, :19], fc[1, :20], fc[2] = True, True, True
    assert n_left(fc, schedule) == 2  # 20 live synapses, each weight one
    for neuron, live in enumerate((9, 10, 36)):
        conv[neuron].view(-1)[:live] = True
    assert n_left(conv, schedule) == 2 and n_left(conv, make_schedule(300, CIFAR_RULES)) == 1
    assert n_left(torch.ones(5, 8, dtype=torch.bool), schedule) == 5  # all that it can have


def widths(*rows):
    """A layer whose r+ + |r-| is this, [C, C_in]."""
    layer = layer_of(torch.tensor(rows, dtype=torch.float32) / 2)
    layer["upper"], layer["lower"] = layer["previous"].clone(), -layer["previous"]
    return layer


def test_neurons_of_the_smallest_normalised_widths_go():
    # widths 2, 3, 4 -> 0, 0.5, 1. D: 0, 1, 1.5; as they are, 6, 4 and 9
    layer = widths([2, 2, 2], [4, 4, 4], [3, 3, 3])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    layer["percent"] = 34.0
    prune_neurons(layer, mask, seeded(0))
    assert mask.any(1).tolist() == [False, True, True]
    layer["percent"] = 67.0  # cumulative: the one that is pruned fills the bottom
    prune_neurons(layer, mask, seeded(0))
    assert mask.any(1).tolist() == [False, False, True]
    layer = widths(*[[5, 5, 5]] * 3)  # constant: 0.5 everywhere, so that live synapses are counted
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    layer["percent"] = 34.0
    prune_neurons(layer, mask, seeded(0))
    assert mask.any(1).tolist() == [True, False, True]


def test_dead_neurons_fill_the_bottom_before_live_ones_of_width_0():
    for seed in range(20):
        layer = widths([2, 2], [2, 2], [2, 2], [4, 4])
        mask = torch.ones(4, 2, dtype=torch.bool)
        layer["percent"] = 25.0
        for epoch in range(3):
            prune_neurons(layer, mask, seeded(seed, epoch))
        assert int(mask.any(1).sum()) == 3


def test_a_neuron_is_pruned_once_only():
    layer, mask = widths([1, 1], [2, 2], [3, 3], [4, 4]), torch.ones(4, 2, dtype=torch.bool)
    layer["percent"] = 25.0
    prune_neurons(layer, mask, seeded(0))
    mask[0, 0] = True  # it comes back
    for _ in range(3):
        prune_neurons(layer, mask, seeded(0))
    assert mask.tolist() == [[True, False], [True] * 2, [True] * 2, [True] * 2]
    layer["percent"] = 50.0
    prune_neurons(layer, mask, seeded(0))
    assert mask.any(1).tolist() == [True, False, True, True]


def test_one_neuron_is_always_left():
    schedule = make_schedule(300, MNIST_RULES)
    layer, mask = layer_of(torch.rand(6, 30), 100 - 1e-9), torch.ones(6, 30, dtype=torch.bool)
    for epoch in range(37, 60):
        prune_neurons(layer, mask, seeded(epoch))
        layer["percent"] = next_percent(layer["percent"], mask, None, epoch, schedule)
        assert layer["percent"] == pytest.approx(100 * 5 / 6)
    assert int(mask.any(1).sum()) == 1


# ---- (c) regeneration ----------------------------------------------------------------------------


def candidates(weight, percentile, **given):
    mask = torch.zeros_like(weight, dtype=torch.bool)
    layer = layer_of(weight)
    regenerate_synapses(layer, weight, mask, percentile, 5, **given)
    return layer["run_growth"].flatten().bool().tolist()


def test_candidates_are_above_the_percentile_of_all():
    assert np.percentile([0, 1, 2, 3, 4], 65) == pytest.approx(2.6)
    assert candidates(row(0, 1, 2, 3, 4), 65) == [False] * 3 + [True] * 2
    assert candidates(row(0, 1, 2, 2.75, 10), 65) == [False] * 3 + [True] * 2  # above 2.45
    assert candidates(row(*range(1, 11)), 61) == [False] * 6 + [True] * 4  # above 6.49
    assert candidates(row(1, 2, 3, 3), 75) == [False] * 4  # strictly: the percentile is 3
    assert candidates(row(-9, -1, 2, 3, 1), 65) == [False, False, True, True, False]
    assert candidates(row(-9, -1, 2, 3, 1), 65, signed=False) == [True, False, False, True, False]


def test_only_masked_synapses_grow_and_live_ones_make_the_percentile_too():
    weight, mask = row(5, 4, 3, 2, 1, 0), torch.tensor([[1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    layer = layer_of(weight)
    # above 2.5; of the masked ones alone: above 1.5
    regenerate_synapses(layer, weight, mask, 50, 5)
    assert layer["run_growth"].tolist() == [[0, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize("count", [1, 2, 18])
def test_a_synapse_returns_at_a_count_above_c(count):
    weight, mask = row(0, 0, 0, 3), torch.zeros(1, 4, dtype=torch.bool)
    layer = layer_of(weight)
    for epoch in range(count + 2):  # the first epoch does not count, and c is not enough
        assert not mask.any()
        regenerate_synapses(layer, weight, mask, 60, count)
    assert mask.tolist() == [[False, False, False, True]]
    regenerate_synapses(layer, weight, mask, 60, count)
    assert int(layer["run_growth"].sum()) == 0  # count 0, alive
    layer, mask = layer_of(weight), torch.zeros(1, 4, dtype=torch.bool)
    for epoch in range(3 * count + 3):  # a break in the row
        now = weight if epoch % (count + 2) <= count else -weight
        regenerate_synapses(layer, now, mask, 60, count)
    assert not mask.any()


def test_a_kernel_is_the_unit_of_a_convolution():
    weight = torch.zeros(2, 3, 3, 3)
    weight[0, 1] = 0.1  # sum 0.9
    weight[1, 2, 0, 0] = 0.8  # the largest weight, but not the largest kernel
    weight[1, 0] = -1.0
    mask, layer = torch.zeros(2, 3, 3, 3, dtype=torch.bool), layer_of(weight)
    before = weight.clone()
    for _ in range(3):
        regenerate_synapses(layer, weight, mask, 85, 1)  # sums -9 0 0 0 0.8 0.9: above 0.825
    assert mask[0, 1].all() and int(mask.sum()) == 9
    assert torch.equal(weight, before)  # it keeps its value


# ---- the end of an epoch: the order of (a) to (d) ------------------------------------------------


class Tiny(nn.Module):
    """A convolution, a fully connected layer and an output."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(4, 6, 3), nn.Linear(24, 8), nn.Linear(8, 3)

    def scored_by(self):
        return dict.fromkeys(("conv.weight", "fc.weight", "out.weight"), models.Scored("x", 0))


READERS = {"conv.weight": "fc.weight", "fc.weight": None}


RATES = dict(conv=0.34, fc=0.25)


def plain_develop(epoch, schedule, state, weights, masks):
    """The same with plain numpy, element by element, as the sheet tells it: counters and the sets
    of the last epoch, kept apart. weights, masks: {kind: array}."""
    n = schedule.window
    if epoch == 0:
        for kind, w in weights.items():
            state[kind] = dict(
                up=np.full(w.shape, w.max()), low=np.full(w.shape, w.min()), previous=abs(w),
                count={s: np.zeros(w.shape, int) for s in "ABD"},
                was={s: np.zeros(w.shape, bool) for s in "ABD"},
                sums={s: np.zeros(w.shape) for s in "AB"},
                grow_count={}, candidates=set(), ever=set(), P=dict(conv=34.0, fc=25.0)[kind])
        return
    for kind, w in weights.items():
        s = state[kind]
        for i in np.ndindex(w.shape):
            x = w[i] * masks[kind][i]
            inside = dict(A=x >= s["up"][i], B=x <= s["low"][i], D=abs(x) < s["previous"][i])
            for name, bound in (("A", "up"), ("B", "low"), ("D", None)):
                if inside[name] and s["was"][name][i]:
                    s["count"][name][i] += 1
                    if bound:
                        s["sums"][name][i] += x - s[bound][i]
                else:
                    s["count"][name][i] = 0
                    if bound:
                        s["sums"][name][i] = 0
                if s["count"][name][i] >= n:
                    s["count"][name][i] = 0
                    if bound:
                        s[bound][i] += s["sums"][name][i] / n
                        s["sums"][name][i] = 0
                    else:
                        s["up"][i] *= 0.75
                        s["low"][i] *= 0.75
                s["was"][name][i] = inside[name]
            s["previous"][i] = abs(x)
        if epoch >= n + 1:
            np.clip(w, s["low"], s["up"], out=w)
    if epoch < 2 * n + 1:
        return
    time = (epoch - 2 * n - 1) * schedule.scale
    for kind, w in weights.items():
        s, base = state[kind], dict(conv=65, fc=60)[kind]
        size = w.sum((2, 3)) if kind == "conv" else w
        ordered, place = sorted(size.ravel()), min(99, base + 1.1**time) / 100 * (size.size - 1)
        below = int(place)
        threshold = ordered[below] + (place - below) * (
            ordered[min(below + 1, size.size - 1)] - ordered[below])
        now = {i for i in np.ndindex(size.shape)
               if size[i] > threshold and not np.any(masks[kind][i])}
        for i in np.ndindex(size.shape):
            s["grow_count"][i] = s["grow_count"].get(i, 0) + 1 if i in now & s["candidates"] else 0
            if s["grow_count"][i] > schedule.count[kind]:
                masks[kind][i] = True
                s["grow_count"][i] = 0
        s["candidates"] = now

    def left(kind):
        return sum(int(mask.sum()) >= dict(conv=10, fc=20)[kind] for mask in masks[kind])

    for kind in weights:
        s, mask, C = state[kind], masks[kind], len(masks[kind])
        u = s["up"] + abs(s["low"])
        u = (u - u.min()) / (u.max() - u.min()) if u.max() > u.min() else np.full(u.shape, 0.5)
        drive = (u * mask).reshape(C, -1).sum(1)
        order = sorted(range(C), key=lambda i: (drive[i], bool(mask[i].any())))
        for i in order[:int(C * s["P"] / 100)]:
            if i not in s["ever"]:
                s["ever"].add(i)
                mask[i] = False
        if kind == "conv":
            s["P"] += math.exp(-time / 5) * left("conv") / left("fc")
        else:
            s["P"] += (math.exp(-time) if epoch <= 2 * n + 24 else 7.5e-4) * left("fc") / 10


@pytest.mark.parametrize("epochs, scale", [(40, 0.5), (100, 1)])
def test_develop_against_plain_loops(epochs, scale):
    """Weights that drift at random, over all epochs: the same masks, ranges, rates and weights."""
    torch.manual_seed(epochs)
    net, plain = Tiny(), {}
    masks, schedule = Masks(net), replace(make_schedule(epochs, MNIST_RULES), scale=scale)
    weights = {kind: getattr(net, kind).weight.detach().double().numpy() for kind in ("conv", "fc")}
    plain_masks = {kind: np.ones(w.shape, bool) for kind, w in weights.items()}
    drift = {kind: 0.05 * torch.randn(w.shape) for kind, w in weights.items()}
    regenerated = pruned = fired = 0
    for epoch in range(epochs):
        for kind in weights:  # on a grid that both precisions hold exactly
            step = ((drift[kind] + 0.02 * torch.randn_like(drift[kind])) * 2**12).round() / 2**12
            weight = getattr(net, kind).weight.detach()
            weight.copy_(((weight + step) * 2**12).round() / 2**12)
            weights[kind] = weight.double().numpy()
        if epoch == 0:
            state, change = start_layers(masks, READERS, RATES), None
        else:
            change = develop(epoch, schedule, state, READERS, masks, seeded(epoch))
        assert (change is None) == (epoch < schedule.start)
        if change is not None:
            regenerated += int(change.regenerated.sum())
            pruned += int(change.pruned.sum())
        plain_develop(epoch, schedule, plain, weights, plain_masks)
        for kind, w in weights.items():
            mine = state[f"{kind}.weight"]
            assert np.array_equal(masks.alive[f"{kind}.weight"].numpy(), plain_masks[kind]), epoch
            for key, other in (("upper", "up"), ("lower", "low")):
                assert np.allclose(mine[key].numpy(), plain[kind][other], atol=1e-5), (epoch, key)
            assert np.allclose(masks.weights[f"{kind}.weight"].detach().numpy(), w, atol=1e-5)
            assert mine["percent"] == pytest.approx(plain[kind]["P"])
            fired += int((mine["upper"] != mine["upper"].max()).any())
            with torch.no_grad():  # masked synapses start the next epoch from 0
                masks.weights[f"{kind}.weight"].mul_(masks.alive[f"{kind}.weight"])
    assert pruned > 100 and regenerated > (10 if scale < 1 else 4) and fired > 20


def prepared(official=False, signed=True, rules=MNIST_RULES, **rates):
    """A tiny network after epoch 0, and all that develop() takes but the epoch."""
    torch.manual_seed(0)
    net = Tiny()
    masks, schedule = Masks(net), make_schedule(300, rules, official)
    state = start_layers(masks, READERS, RATES | rates, official)
    return net, (schedule, state, READERS, masks, seeded(0), official, signed)


def test_ranges_see_the_weights_before_the_constraint():
    """The other way round no weight is ever above its range, and none would grow."""
    net, rest = prepared()
    state, masks = rest[1], rest[3]
    weight = masks.weights["fc.weight"].detach()
    top = float(state["fc.weight"]["upper"].max())
    for epoch in range(20, 20 + 19):  # past the clamp's first epoch; n + 1 epochs in a row
        weight[0, 0] = top + 1  # it trains past its range in each epoch
        develop(epoch, *rest)
        grown = epoch == 38
        # the clamp is to the range that was just moved
        assert float(weight[0, 0]) == pytest.approx(top + grown) == float(
            state["fc.weight"]["upper"][0, 0])


def test_the_constraint_begins_after_n_epochs():
    net, rest = prepared()
    weight, layer = rest[3].weights["conv.weight"].detach(), rest[1]["conv.weight"]
    for epoch, held in ((1, False), (18, False), (19, True)):
        weight[0, 0, 0, 0], weight[1, 0, 0, 0] = 2.0, -2.0
        layer["upper"].fill_(1.4)
        layer["lower"].fill_(-1.3)
        assert develop(epoch, *rest) is None
        assert weight[:2, 0, 0, 0].tolist() == pytest.approx([1.4, -1.3] if held else [2, -2])
    assert rest[3].flat.all()  # no structure before epoch 37


def test_regeneration_comes_before_pruning():
    """A synapse is no candidate yet in the epoch in which its neuron goes."""
    net, rest = prepared(conv=0.5, fc=0.5)
    masks, state = rest[3], rest[1]
    for name in READERS:
        masks.weights[name].detach().abs_()
    pruned, between, regenerated, *_ = develop(37, *rest)
    assert between == 0 and pruned.any() and not regenerated.any()
    assert all(not state[name]["run_growth"].any() for name in READERS)
    for name in READERS:
        weight, mask = masks.weights[name].detach(), masks.alive[name]
        weight.mul_(mask)
        weight[(~mask.flatten(1).any(1)).nonzero()[0]] = state[name]["upper"].max()
    develop(38, *rest)
    assert all(state[name]["run_growth"].any() for name in READERS)


def test_what_returns_counts_in_the_pruning_of_the_same_epoch():
    net, rest = prepared(conv=0.0, fc=0.0)
    state, masks = rest[1], rest[3]
    mask = masks.alive["fc.weight"]
    mask[:4] = False
    state["fc.weight"]["ever_pruned"][:4] = True
    with torch.no_grad():
        masks.weights["fc.weight"][:] = -0.1
        masks.weights["fc.weight"][0, :20] = 0.2
    state["fc.weight"]["run_growth"][0, :20] = 11  # a count of 10: the next one is above c
    develop(37, *rest)
    assert mask[0, :20].all() and int(mask[:4].sum()) == 20
    assert state["fc.weight"]["percent"] == pytest.approx((8 - 3) / 10)  # N_p = 3, not 4


def test_the_percentile_of_growth(monkeypatch):
    seen = {}

    def note(layer, weight, mask, percentile, *_):
        seen.setdefault(weight.dim(), []).append(percentile)

    monkeypatch.setattr(prune_sdsnn, "regenerate_synapses", note)
    net, rest = prepared()
    for epoch in range(37, 300):
        develop(epoch, *rest)
    assert seen[4][:3] == pytest.approx([66, 66.1, 66.21]) and seen[2][0] == pytest.approx(61)
    assert (37 + seen[4].index(99), 37 + seen[2].index(99)) == (74, 76)
    assert set(seen[4][74 - 37:]) == {99}
    seen.clear()
    rest[0].percentile = dict(conv=55, fc=55)
    for epoch in range(37, 80):
        develop(epoch, *rest)
    assert 37 + seen[2].index(99) == 77


@pytest.mark.parametrize("rules, official, moves", [
    (MNIST_RULES, False, True), (MNIST_RULES, True, True), (CIFAR_RULES, False, True),
    (CIFAR_RULES, True, False)])
def test_the_official_code_never_moves_the_ranges_of_cifars_convolutions(rules, official, moves):
    """That for MNIST and events moves them."""
    net, rest = prepared(official, rules=rules)
    state, masks = rest[1], rest[3]
    before = {name: state[name]["upper"].clone() for name in READERS}
    for epoch in range(1, 25):
        for name in READERS:
            masks.weights[name].detach().mul_(0.99)
        develop(epoch, *rest)
    moved = {name: not torch.equal(state[name]["upper"], before[name]) for name in READERS}
    assert moved == {"conv.weight": moves, "fc.weight": True}


def test_growth_by_magnitude_is_an_option():
    for signed in (True, False):
        net, rest = prepared(signed=signed)
        masks, state = rest[3], rest[1]
        masks.alive["fc.weight"][0] = False
        masks.weights["fc.weight"].detach()[0] = -float(state["fc.weight"]["upper"].max())
        state["fc.weight"]["lower"].fill_(-1)
        develop(37, *rest)
        assert bool(state["fc.weight"]["run_growth"][0].all()) != signed


# ---- the exact end -------------------------------------------------------------------------------


def test_trim_keeps_the_largest_of_those_alive():
    torch.manual_seed(0)
    masks = Masks(Tiny())
    masks.alive["fc.weight"][:4] = False
    with torch.no_grad():
        masks.weights["fc.weight"][:4] = 9.0  # a dead synapse may have drifted far
    sizes, alive = masks.magnitudes(), masks.flat.clone()
    pruned, between, regenerated, rescued, _ = trim(0.8, masks, seeded(0))
    keep = masks.total - round(0.8 * masks.total)
    wanted = torch.where(alive, sizes, -1).topk(keep).indices
    assert set(masks.flat.nonzero().flatten().tolist()) == set(wanted.tolist())
    assert rescued == [] and not regenerated.any()
    assert int(pruned.sum()) == int(alive.sum()) - keep
    assert between == pytest.approx(1 - int(alive.sum()) / masks.total)


def test_trim_where_the_method_has_left_less():
    torch.manual_seed(0)
    masks = Masks(Tiny())
    masks.alive["fc.weight"][:7] = False
    masks.alive["conv.weight"][:5] = False
    alive, sizes = masks.flat.clone(), masks.magnitudes()
    pruned, between, regenerated, *_ = trim(0.2, masks, seeded(0))
    assert masks.n_alive == masks.total - round(0.2 * masks.total)
    assert not pruned.any() and torch.equal(alive | regenerated, masks.flat)
    assert sizes[regenerated].min() >= sizes[~masks.flat].max()
    assert between == masks.sparsity


def test_trim_leaves_no_layer_empty():
    torch.manual_seed(0)
    masks = Masks(Tiny())
    masks.weights["out.weight"].detach().mul_(1e-3)
    change = trim(0.85, masks, seeded(0))
    assert change.rescued == ["out.weight"] and int(masks.alive["out.weight"].sum()) == 1
    assert masks.n_alive == masks.total - round(0.85 * masks.total)


# ---- the network: masked forward, silent neurons -------------------------------------------------


def small_net():
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 16, 3, [4, 6, 8, 8])
    return net, torch.randint(256, (12, 1, 16, 16), dtype=torch.uint8), torch.arange(12) % 10


def test_which_layers_have_neurons_to_prune():
    assert prunable_layers(small_net()[0]) == {
        "convs.1.conv.weight": "convs.2.conv.weight", "convs.2.conv.weight": "convs.3.conv.weight",
        "convs.3.conv.weight": None}
    vgg = prunable_layers(models.build("vgg16", 10, 3, 32, 2, [4] * 13))
    assert list(vgg) == [f"convs.{i}.conv.weight" for i in range(13)]  # the first one included
    assert vgg["convs.0.conv.weight"] == "convs.1.conv.weight"
    assert vgg["convs.12.conv.weight"] is None
    net = models.build("resnet19", 10, 3, 32, 2, models.default_widths("resnet19", 0.05))
    resnet = prunable_layers(net)
    assert list(resnet) == [f"blocks.{i}.conv1.conv.weight" for i in range(8)] + ["fc1.weight"]
    assert resnet["blocks.3.conv1.conv.weight"] == "blocks.3.conv2.conv.weight"


def test_the_forward_pass_is_masked_and_masked_synapses_train():
    net, x, y = small_net()
    masks, name = Masks(net), "convs.2.conv.weight"
    masks.alive[name][:3, 1:] = False
    twin = small_net()[0]
    twin.get_parameter(name).data.mul_(masks.alive[name])
    before = net.get_parameter(name).detach().clone()
    with computing_with(*masked(masks, prunable_layers(net))):
        training.loss_over_time(net(x), y).backward()
    training.loss_over_time(twin(x), y).backward()
    assert torch.equal(net.get_parameter(name), before)  # w again, bit for bit
    for (other, a), b in zip(net.named_parameters(), twin.parameters()):
        assert torch.equal(a.grad, b.grad), other
    assert net.get_parameter(name).grad[:3, 1:].count_nonzero() > 0


def test_a_pruned_neuron_cannot_fire_and_can_be_removed():
    net, x, _ = small_net()
    masks, optimizer = Masks(net), torch.optim.SGD(net.parameters(), 0.1)
    name = "convs.1.conv.weight"
    bn, lif = net.convs[1].bn, net.lifs[1]
    with torch.no_grad():
        bn.bias[:] = 1.5  # above the threshold: with its weights gone alone it would always fire
        bn.running_mean[:] = -3
    net(x)
    masks.alive[name][2] = False
    masks.apply(optimizer)
    spikes = []
    handle = lif.register_forward_hook(lambda _, __, out: spikes.append(out[:, :, 2].sum().item()))
    net.train()(x), net.eval()(x)
    mute_dead_neurons(net, masks, prunable_layers(net), optimizer, for_good=False)
    gamma = bn.weight.detach().clone()
    net.train()(x), net.eval()(x)
    handle.remove()
    assert spikes[0] > 0 and spikes[1] > 0 and spikes[2:] == [0, 0]
    assert torch.equal(bn.weight, gamma)  # the gradient needs it
    net.train()
    optimizer.zero_grad()
    training.loss_over_time(net(x), torch.arange(12) % 10).backward()
    assert net.get_parameter(name).grad[2].count_nonzero() > 0
    mute_dead_neurons(net, masks, prunable_layers(net), optimizer, for_good=True)
    assert bn.running_var[2] == 1 and (bn.running_var != 1).sum() == 5  # as new, if it returns
    kept = {"convs.1": torch.tensor([True, True, False, True, True, True])}
    small = channels.remove(net, kept)
    assert torch.equal(net.eval()(x), small.eval()(x))
    assert (bn.weight != 0).tolist() == kept["convs.1"].tolist() == (bn.bias != 0).tolist()


def test_momentum_brings_no_bias_back():
    net, x, y = small_net()
    masks = Masks(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        training.loss_over_time(net(x), y).backward()
        optimizer.step()
        if step == 1:
            masks.alive["convs.3.conv.weight"][1] = False
        mute_dead_neurons(net, masks, prunable_layers(net), optimizer, for_good=False)
    bias = net.convs[3].bn.bias
    assert bias[1] == 0 == optimizer.state[bias]["momentum_buffer"][1] and bias[0] != 0


# ---- the script ----------------------------------------------------------------------------------


def test_a_run_and_its_folder(mine, easy_growth, capsys):
    summary = run("--run-dir", "r", "--sparsity", 0.8)
    assert {path.name for path in Path("r").iterdir()} == {
        "config.json", "metrics.jsonl", "updates.jsonl", "checkpoint.pt", "model.pt",
        "compact.pt", "summary.json", "curves.png"}
    assert list(summary) == runfolder.SUMMARY_KEYS
    assert (summary["script"], summary["method"], summary["epochs"]) == ("prune_sdsnn", "sdsnn", 8)
    total = sum(layer["weights"] for layer in summary["layers"])
    alive = sum(layer["alive"] for layer in summary["layers"])
    assert alive == total - round(0.8 * total) and summary["sparsity"] == 1 - alive / total
    rows, updates = lines("r", "metrics"), lines("r", "updates")
    assert [row["stage"] for row in rows] == ["prune"] * 7 + ["finetune"]
    assert summary["pruned_accuracy"] == rows[6]["test_accuracy"]
    assert [row["sparsity"] for row in rows[:3]] == [0, 0, 0] and rows[3]["sparsity"] > 0
    assert summary["training_cost"] == pytest.approx(
        (1 + sum(1 - row["sparsity"] for row in rows[:-1])) / 8)
    # four structure epochs, at their ends, and the top-K
    assert [row["iteration"] for row in updates] == [16, 20, 24, 28, 28]
    assert [row["target"] for row in updates] == [None] * 4 + [0.8]
    assert set(updates[0]) == {"update", "iteration", "target", "before", "sparsity", "pruned",
                               "regenerated", "survived", "survived_plain", "layers"}
    first = {layer["name"]: layer for layer in updates[0]["layers"]}
    assert [first[f"convs.{i}.conv.weight"]["pruned"] for i in range(4)] == [
        0, 2 * 4 * 9, 4 * 8 * 9, 4 * 16 * 9]  # floor(0.3 C) whole neurons
    assert first["fc.weight"]["pruned"] == 0  # nor in the output layer
    n_alive = total - updates[0]["pruned"]
    for row in updates[1:]:
        n_alive += row["regenerated"] - row["pruned"]
        assert n_alive == sum(layer["alive"] for layer in row["layers"])
    assert sum(row["regenerated"] for row in updates) > 0 and n_alive == alive
    net, masks = models.load("r/model.pt"), modelfile.read("r/model.pt")["masks"]
    state = torch.load("r/checkpoint.pt", weights_only=True)
    momenta = state["parts"]["optimizer"]["state"]
    assert state["notes"]["layers"] == {}  # nothing of it is kept beyond the structure epochs
    for index, (name, weight) in enumerate(net.named_parameters()):
        if name in masks:
            assert weight[~masks[name]].count_nonzero() == 0
            assert momenta[index]["momentum_buffer"][~masks[name]].count_nonzero() == 0
    images = data.load("mine.npz")
    right = net(images.x_test).sum(0).argmax(1) == images.y_test
    assert right.double().mean().item() == pytest.approx(summary["test_accuracy"])
    assert "80.0 % sparsity -> r" in capsys.readouterr().out


def test_without_a_target_the_method_decides(mine, easy_growth):
    summary = run("--run-dir", "r", "--sparsity", 0, "--epochs-finetune", 0)
    updates = lines("r", "updates")
    assert len(updates) == 4 and {row["target"] for row in updates} == {None}
    last = lines("r", "metrics")[-1]
    assert summary["sparsity"] == updates[-1]["sparsity"] == last["sparsity"] > 0
    back = sum(row["regenerated"] for row in updates)  # none of it is pruned a second time
    alive = sum(layer["alive"] for layer in summary["layers"])
    assert summary["survived_by_regeneration"] == back / alive > 0
    masks = modelfile.read("r/model.pt")["masks"]
    net = models.load("r/model.pt")
    for i in range(1, 4):  # neurons without a synapse are gone for good, their BN with them
        gone = ~masks[f"convs.{i}.conv.weight"].flatten(1).any(1)
        assert gone.any()
        for tensor in (net.convs[i].bn.weight, net.convs[i].bn.bias, net.convs[i].bn.running_mean):
            assert tensor[gone].count_nonzero() == 0 and tensor[~gone].count_nonzero() > 0
    kept = {f"convs.{i}": masks[f"convs.{i}.conv.weight"].flatten(1).any(1) for i in range(1, 4)}
    small, x = channels.remove(net, kept), data.load("mine.npz").x_test
    assert torch.allclose(net(x), small.eval()(x), atol=1e-4)


def test_the_official_mode(mine):
    summary = run("--run-dir", "r", "--mode", "official", "--sparsity", 0.8)
    net, masks = models.load("r/model.pt"), modelfile.read("r/model.pt")["masks"]
    gone = ~masks["convs.1.conv.weight"].flatten(1).any(1)
    assert gone.any() and net.convs[1].bn.bias[gone].count_nonzero() > 0
    assert summary["training_cost"] == pytest.approx((7 + 0.2) / 8, abs=1e-3)  # dense in training
    assert summary["sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_the_training_forward_is_masked(mine, monkeypatch):
    """Inside a structure epoch masked synapses have drifted, and the network does not show it."""
    loss_over_time, live = training.loss_over_time, []
    masks_seen = []

    class Watched(Masks):
        def __init__(self, net):
            super().__init__(net)
            masks_seen.append(self)

    def watch(logits, labels, kind):
        masks = masks_seen[-1]
        drifted = sum(int((masks.weights[n][~m] != 0).sum()) for n, m in masks.alive.items())
        if logits.requires_grad:
            live.append(drifted)
        else:
            assert drifted == 0  # at the end of each epoch, where the network is evaluated
        return loss_over_time(logits, labels, kind)

    monkeypatch.setattr(prune_sdsnn, "Masks", Watched)
    monkeypatch.setattr(training, "loss_over_time", watch)
    run("--run-dir", "fixed", "--sparsity", 0.5)
    assert len(live) == 32 and not any(live)
    live.clear()
    run("--run-dir", "official", "--sparsity", 0.5, "--mode", "official")
    assert not any(live[:17]) and all(live[17:20]) and not any(live[28:])


def test_a_fully_connected_layer():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (48, 8, 8), dtype=np.uint8), np.arange(48) % 3
    np.savez("mine.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    given = "--dataset mine.npz --model resnet19 --width 0.125 --batch-size 24 --time-steps 2 " \
            "--epochs-prune 5 --epochs-finetune 0 --rate-fc 0.37 --rate-conv 0.2 --sparsity 0.5"
    summary = run(*given.split(), "--run-dir", "r", short=False)
    first = {layer["name"]: layer["pruned"] for layer in lines("r", "updates")[0]["layers"]}
    assert first["fc1.weight"] == math.floor(0.37 * 32) * 64
    assert first["blocks.0.conv1.conv.weight"] == math.floor(0.2 * 16) * 8 * 9
    assert first["blocks.0.conv2.conv.weight"] == first["fc2.weight"] == 0
    second = {layer["name"]: layer["pruned"] for layer in lines("r", "updates")[1]["layers"]}
    P = 37 + (32 - 11) / 10  # the published numbers for MNIST, since mine.npz has its defaults
    assert second["fc1.weight"] == (math.floor(32 * P / 100) - 11) * 64 > 0
    assert summary["sparsity"] == pytest.approx(0.5, abs=1e-4)


def test_a_smoke_run():
    summary = run("--smoke", "--epochs-prune", 50, short=False)
    assert (summary["epochs"], summary["widths"]) == (6, [4, 8, 16, 16])
    assert Path("runs/smoke-fashion-mini-small-sdsnn-0.9-seed0/summary.json").exists()


def test_the_commands_in_the_text_run():
    x = np.random.default_rng(0).integers(0, 256, (100, 28, 28), dtype=np.uint8)
    y = np.arange(100) % 10
    Path("data").mkdir()
    np.savez("data/mnist.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    found = [line.split("#")[0].split()[2:] for line in prune_sdsnn.__doc__.splitlines()
             if line.startswith("    python prune_sdsnn.py")]
    assert len(found) >= 3
    for arguments_ in found:
        summary = run(*arguments_, "--smoke", "--train-limit", 100, "--time-steps", 2, short=False)
        assert list(summary) == runfolder.SUMMARY_KEYS


def test_defaults_and_names(capsys):
    args = prune_sdsnn.parse_args([])
    assert (args.epochs_prune, args.epochs_finetune, args.sparsity) == (8, 4, 0.9)
    assert (args.rate_conv, args.rate_fc, args.mode) == (0.05, 0.0, "fixed")  # small has no fc
    assert prune_sdsnn.parse_args(["--model", "resnet19"]).rate_fc == 0.35
    args = prune_sdsnn.parse_args(["--dataset", "cifar100", "--model", "resnet19"])
    assert (args.epochs_prune, args.epochs_finetune, args.sparsity) == (600, 0, 0)
    assert (args.rate_conv, args.rate_fc, args.time_steps) == (0.005, 0.03, 8)
    names = {given: prune_sdsnn.parse_args(given.split()).run_dir for given in (
        "", "--sparsity 0", "--mode official", "--growth unsigned", "--seed 1",
        "--dataset cifar10")}
    assert len(set(names.values())) == len(names)
    assert names[""] == "runs/fashion-mini-small-sdsnn-0.9-seed0"
    with pytest.raises(SystemExit):
        prune_sdsnn.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "then it adapts (default 0.05; " in shown and "0.005: cifar10" in shown
    assert "None" not in shown


@pytest.mark.parametrize("step, given", [
    (2, []), (4, []), (15, []), (17, []), (22, []), (27, []), (28, []), (30, []),
    (18, ["--mode", "official", "--growth", "unsigned"]),
    (26, ["--sparsity", "0", "--momentum", 0])])
def test_resume_from_any_step(step, given, mine, easy_growth, monkeypatch, once):
    """Stop inside an epoch whose masked synapses drift, at an epoch's end, in fine-tuning."""
    stop_after(step, monkeypatch, run, "--run-dir", "r", *given)
    assert not Path("r/summary.json").exists()
    run("--run-dir", "r", "--resume", short=False)
    assert_same_run(once(run, *given), "r")
    before = Path("r/summary.json").read_text()
    assert run("--run-dir", "r", "--resume", short=False) == json.loads(before)


def test_the_same_seed_gives_the_same_run_and_another_one_another(mine):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("--run-dir", folder, "--seed", seed)
    assert_same_run("a", "b")
    weights = [models.load(f"{folder}/model.pt").convs[1].conv.weight for folder in "ac"]
    assert not torch.equal(*weights)


def test_ties_depend_on_the_seed_and_the_epoch(mine, monkeypatch):
    drawn = []
    monkeypatch.setattr(runfolder, "seeded", lambda *given: drawn.append(given) or seeded(*given))
    run("--seed", 3)
    # those of three numbers are of the steps
    at_ends = [given for given in drawn if len(given) == 2]
    assert at_ends == [(3, 4 * epoch) for epoch in range(1, 8)]


def test_init_from_a_dense_network(mine):
    torch.save(modelfile.pack(models.build("small", 2, 1, 12, 4, [4, 8, 16, 16])), "dense.pt")
    summary = run("--init", "dense.pt", "--overwrite")
    assert summary["dense_accuracy"] is not None


@pytest.mark.parametrize("given, words", [
    ("--sparsity 90", "--sparsity is 90, expected a fraction in [0, 1). For 90 % write 0.9"),
    ("--rate-conv 5", "--rate-conv is 5, expected a fraction in [0, 1). For 5 % write 0.05"),
    ("--rate-conv nan", "--rate-conv is nan"), ("--rate-fc 1", "--rate-fc is 1"),
    ("--rate-fc 0.3", "--rate-fc is 0.3, which --model small does not use"),
    ("--optimizer adam --momentum 0.5", "--momentum is 0.5, which --optimizer adam does not use. "
                                        "Leave one of them out"),
    ("--optimizer adamw --momentum 0", "--momentum is 0.0, which --optimizer adamw does not use"),
    ("--epochs-prune 3", "--epochs-prune is 3, expected at least 4"),
    ("--epochs-prune 0", "--epochs-prune is 0"),
    ("--epochs-finetune -1", "--epochs-finetune is -1"),
    ("--mode other", "invalid choice: 'other'"), ("--growth any", "invalid choice: 'any'"),
    ("--sparsity 0.9999", "expected at least one for each of the 5 layers"),
    ("--interval 5", "unrecognized arguments"), ("--batch-size 81", "--batch-size is 81"),
    ("--dataset no/such.npz", "no/such.npz"), ("--init absent.pt", "absent.pt"),
    ("--resume --overwrite", "exclude each other")])
def test_wrong_commands(given, words, mine, capsys):
    error = refused(capsys, run, *given.split())
    assert words in error and error.startswith("prune_sdsnn.py: error: ")
    assert [path.name for path in Path().iterdir()] == ["mine.npz"]  # nothing was written


def test_an_existing_run_is_never_replaced_silently(mine, capsys):
    run("--run-dir", "r")
    for given, words in (([], "--resume, replace it by --overwrite"),
                         (["--resume", "--sparsity", 0.5], "was made with --sparsity 0.9")):
        assert words in refused(capsys, run, "--run-dir", "r", *given)
    run("--run-dir", "r", "--overwrite", "--seed", 3)
    assert json.loads(Path("r/summary.json").read_text())["seed"] == 3


# in an epoch; at the end of one before, and of one in which the structure changes
@pytest.mark.parametrize("iteration, done", [(18, 4), (8, 1), (20, 4)])
def test_a_loss_that_is_not_finite_stops_the_run(iteration, done, mine, capsys, monkeypatch):
    loss_over_time, trained = training.loss_over_time, []

    def explode(logits, labels, kind):
        trained.extend([None] * logits.requires_grad)
        return loss_over_time(logits, labels, kind) * (math.nan if len(trained) == iteration else 1)

    monkeypatch.setattr(training, "loss_over_time", explode)
    monkeypatch.setattr(runfolder, "SAVING_RATIO", 0)  # each epoch is saved, however short
    error = refused(capsys, run, "--run-dir", "r", code=1)
    assert f"iteration {iteration}" in error and "not finite" in error
    state = torch.load("r/checkpoint.pt", weights_only=True)
    assert state["position"] == [done, 0, 4 * done]
