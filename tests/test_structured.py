"""Structured pruning: removal against masking, the choice against brute force, the steps of
Algorithm 2, the script from its command line. GReg: test_greg.py."""
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

import channels
import data
import metrics
import modelfile
import models
import prune_structured
import training
from harness import removal, runfolder
from harness.meters import Meter
from helpers import (NETS, assert_same_run, lines, one_line, random_net, real_images, rng,
                     stop_after)
from masks import Masks, seeded


def random_kept(net, seed=0, drive=True):
    """Keep about half of each layer's channels, one at least; the others get a beta that fires."""
    kept = {}
    for name, size in zip(*channels.layers(net)):
        keep = torch.rand(size, generator=rng(seed + size)) < 0.5
        keep[seed % size] = True
        kept[name] = keep
        if drive:  # a constant current of 1.5 or more crosses the threshold
            net.get_submodule(name).bn.bias.data[~keep] = 1.5 + torch.rand(
                int((~keep).sum()), generator=rng(seed), dtype=net.mean.dtype)
    return kept


# ---- removing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name, factor", NETS)
def test_silenced_and_rebuilt_networks_agree(name, factor, mode, seed):
    net = random_net(name, factor, seed)
    kept = random_kept(net, seed)
    net.train(mode == "train")
    masked, small = channels.silence(net, kept), channels.remove(net, kept)
    assert masked.training == small.training == (mode == "train")
    for offset in (0, 16):
        found = channels.differences(masked, small, kept, real_images(offset=offset))
        assert found["logits_differ_by"] <= 1e-10 and found["spikes_that_differ"] == 0
        assert found["spikes_compared"] > 10_000
    for one in (net, small):  # a silent network would agree with anything
        with metrics.firing(one) as counts, torch.inference_mode():
            one.eval()(real_images())
        rate, by_layer = metrics.rates(counts)
        assert 0.05 < rate < 0.9 and all(r > 0 for r in by_layer.values())


@pytest.mark.parametrize("name, factor", NETS)
def test_float32_rounds_few_spikes(name, factor, capsys):
    net = random_net(name, factor, dtype=torch.float32)
    kept = random_kept(net)
    found = channels.differences(channels.silence(net, kept), channels.remove(net, kept), kept,
                                 real_images())
    with capsys.disabled():
        print(f"\n{name}, float32: {found['spikes_that_differ']} of {found['spikes_compared']} "
              f"spikes differ, logits by {found['logits_differ_by']:.2g}", end=" ")
    assert found["spikes_that_differ"] <= 1e-4 * found["spikes_compared"]
    if found["spikes_that_differ"] == 0:
        assert found["logits_differ_by"] <= 1e-5


def tampered(net, kept, change):
    """The rebuilt network with a mistake: change(state of the small, state of the net, kept)."""
    small = channels.remove(net, kept)
    state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    change(state, net.state_dict())
    small.load_state_dict(state)
    return small


@pytest.mark.parametrize("place", [1, -2])
@pytest.mark.parametrize("name, factor", NETS)
def test_the_comparison_sees_mistakes(name, factor, place):
    """Negative controls: each of the usual mistakes must show, in a layer with many after it in the
    spikes, and in one of the last also in the logits."""
    net = random_net(name, factor)
    kept = random_kept(net, 2)
    masked, images = channels.silence(net, kept), real_images()
    layer, group = list(models.removable(net).items())[place]
    n = int(kept[layer].sum())
    assert not kept[layer][:n].all()

    def statistics(state, dense):
        for part in ("running_mean", "running_var"):
            state[f"{layer}.bn.{part}"] = dense[f"{layer}.bn.{part}"][:n]

    def columns(state, dense):
        state[group.reader] = state[group.reader].roll(1, dims=1)

    def rows(state, dense):
        width = state[f"{layer}.conv.weight"].shape[1]
        state[f"{layer}.conv.weight"] = dense[f"{layer}.conv.weight"][:n, :width].clone()

    def beta(state, dense):
        state[f"{layer}.bn.bias"] = dense[f"{layer}.bn.bias"][:n]

    driven = channels.silence(net, kept)  # gamma only: beta still drives the channels
    for other in kept:
        driven.get_submodule(other).bn.bias.data.copy_(net.get_submodule(other).bn.bias)
    cases = [(masked, tampered(net, kept, mistake)) for mistake in (statistics, columns, rows, beta)]
    for one, other in [*cases, (driven, channels.remove(net, kept))]:
        found = channels.differences(one, other, kept, images)
        assert found["spikes_that_differ"] > 0
        assert place == 1 or found["logits_differ_by"] > 1e-3


@pytest.mark.parametrize("name, factor", [("small", 0.5), ("vgg16", 0.15)])
def test_columns_of_a_flattened_map_are_channel_major(name, factor):
    torch.manual_seed(0)
    side = 3 if name == "small" else 2
    net = models.build(name, 10, 1, 28 if name == "small" else 64, 4,
                       models.default_widths(name, factor)).double()
    kept = random_kept(net, 3, drive=False)
    small, last = channels.remove(net, kept), list(kept)[-1]
    assert net.fc.in_features == len(kept[last]) * side**2
    maps = net.fc.weight.unflatten(1, (-1, side, side))[:, kept[last]]
    assert torch.equal(small.fc.weight.unflatten(1, (-1, side, side)), maps)
    minor = net.fc.weight[:, torch.cat([kept[last]] * side**2)]  # the usual mistake
    assert minor.shape == small.fc.weight.shape and not torch.equal(minor, small.fc.weight)
    assert torch.equal(small.fc.bias, net.fc.bias)


@pytest.mark.parametrize("name, factor", NETS)
def test_every_tensor_is_copied(name, factor):
    net = random_net(name, factor)
    kept = random_kept(net, 5, drive=False)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    drawn_before = torch.get_rng_state()
    small = channels.remove(net, kept)
    assert torch.equal(drawn_before, torch.get_rng_state())
    state, groups = small.state_dict(), models.removable(net)
    assert state.keys() == before.keys()
    readers = {group.reader: name for name, group in groups.items()}
    for key, tensor in before.items():
        assert torch.equal(net.state_dict()[key], tensor)  # the old network is as it was
        expected = tensor
        layer = key.rsplit(".", 2)[0]
        if layer in kept and tensor.dim() > 0:
            expected = expected[kept[layer]]
        if key in readers:
            columns = kept[readers[key]].repeat_interleave(groups[readers[key]].repeat)
            expected = expected[:, columns]
        assert torch.equal(state[key], expected), key
        if tensor.is_floating_point():
            assert state[key].data_ptr() != net.state_dict()[key].data_ptr()
    assert torch.equal(small.mean, net.mean) and torch.equal(small.std, net.std)
    assert small.config["widths"] == channels.kept_widths(net, kept)
    assert small.reads_numbers == net.reads_numbers and not small.training
    assert all(parameter.requires_grad for parameter in small.parameters())
    again = modelfile.unpack(modelfile.pack(small)).double()  # through a file: widths and tensors
    with torch.inference_mode():
        assert torch.equal(again(real_images()), small.float().double()(real_images()))


def test_removing_twice_is_removing_at_once():
    net = random_net("small", 1)
    names, sizes = channels.layers(net)
    first = {name: torch.arange(size) % 4 != 0 for name, size in zip(names, sizes)}
    once = channels.remove(net, first)
    second = {name: torch.arange(int(keep.sum())) % 3 != 1 for name, keep in first.items()}
    twice = channels.remove(once, second)
    at_once = {}
    for name, keep in first.items():
        at_once[name] = keep.clone()
        at_once[name][keep.nonzero().squeeze(1)[~second[name]]] = False
    straight = channels.remove(net, at_once)
    assert all(torch.equal(a, b) for a, b in zip(twice.state_dict().values(),
                                                 straight.state_dict().values(), strict=True))


def test_what_cannot_be_removed():
    net = random_net("resnet19", 0.12)
    size = net.blocks[0].conv1.conv.out_channels
    for kept, words in [({"blocks.0.conv2": torch.ones(15, dtype=torch.bool)}, "cannot be removed"),
                        ({"blocks.0.conv1": torch.zeros(size, dtype=torch.bool)}, "at least one"),
                        ({"blocks.0.conv1": torch.ones(size + 1, dtype=torch.bool)}, "bools"),
                        ({"blocks.0.conv1": torch.ones(size)}, "bools")]:
        with pytest.raises(ValueError, match=words):
            channels.remove(net, kept)
    alone = {"blocks.0.conv1": torch.arange(size) == 2}  # layers that are not named keep all
    assert channels.remove(net, alone).config["widths"] == [
        *net.config["widths"][:1], 1, *net.config["widths"][2:]]


# ---- what is saved -------------------------------------------------------------------------------


def test_a_worked_block():
    """layer1's second block, 128 -> 128 at 16x16, with 62 inner channels."""
    net = models.build("resnet19", 10, 3, 32, 5)
    kept = {"blocks.1.conv1": torch.arange(128) < 62}
    small = channels.remove(net, kept)
    before, after = metrics.macs(net.config), metrics.macs(small.config)
    assert small.blocks[1].conv1.conv.weight.numel() == 71_424
    assert small.blocks[1].conv2.conv.weight.numel() == 71_424
    layers = ("blocks.1.conv1.conv", "blocks.1.conv2.conv")
    assert sum(before[name] for name in layers) == 75_497_472
    assert sum(after[name] for name in layers) == 36_569_088
    assert {name: n for name, n in before.items() if name not in layers} == {
        name: n for name, n in after.items() if name not in layers}
    assert channels.macs_removed(net, kept) == pytest.approx(
        (75_497_472 - 36_569_088) / 555_551_232)


@pytest.mark.parametrize("name, ratio, only, removed, reported", [
    ("resnet19", 0.512, None, 50.56, 49.46), ("resnet19", 0.658, None, 64.70, 69.47),
    ("resnet19-pre", 0.512, None, 61.62, 49.46), ("resnet19-pre", 0.658, None, 74.68, 69.47),
    ("vgg16", 0.4522, None, 69.95, 43.76), ("vgg16", 0.6764, None, 89.37, 58.02),
    ("vgg16", 0.4522, 512, 32.13, 43.76), ("vgg16", 0.6764, 512, 38.59, 58.02)])
def test_the_macs_of_the_paper_s_ratios(name, ratio, only, removed, reported, capsys):
    """In every layer alike, or falling on the widest layers alone."""
    net = models.build(name, 100, 3, 32, 5)
    names, sizes = channels.layers(net)
    share = ratio if only is None else ratio * sum(sizes) / sum(n for n in sizes if n == only)
    kept = {layer: torch.arange(n) >= (round(share * n) if only in (None, n) else 0)
            for layer, n in zip(names, sizes)}
    small = channels.remove(net, kept)
    savings = {key: 100 * (1 - after / before)
               for key, (before, after) in channels.savings(net, small).items()}
    with capsys.disabled():
        print(f"\n{name} p = {ratio} in {'every layer alike' if only is None else only}: "
              + ", ".join(f"{key} -{value:.2f} %" for key, value in savings.items()),
              f"(paper {reported} %)", end=" ")
    assert savings["macs"] == pytest.approx(removed, abs=0.01)
    assert abs(savings["macs"] - savings["macs_first_once"]) < 0.6
    assert savings["macs_every_step"] == pytest.approx(savings["macs"])
    assert 100 * channels.macs_removed(net, kept) == pytest.approx(savings["macs"])


def test_macs_of_a_removed_network_are_those_that_run():
    net = channels.remove(random_net("resnet19", 0.12), random_kept(random_net("resnet19", 0.12)))
    counted = {}

    def seen(name, output):
        counted[name] = modules[name].weight.numel() * (
            output.shape[2] * output.shape[3] if output.dim() == 4 else 1)

    modules = {name.removesuffix(".weight"): net.get_submodule(name.removesuffix(".weight"))
               for name in models.scored_by(net)}
    with metrics.hooks(modules, after=seen), torch.inference_mode():
        net(real_images(2))
    assert metrics.macs(net.config) == counted


def test_speedup_is_the_median_of_interleaved_pairs(monkeypatch):
    clock, calls = [0.0], []
    costs = {"dense": [9, 9, 6, 4, 8, 4, 40], "small": [1, 1, 2, 2, 2, 1, 2]}

    def net(name):
        def forward(_):
            calls.append(name)
            clock[0] += costs[name][calls.count(name) - 1]
        forward.eval = lambda: None
        return forward

    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    found = metrics.speedup(net("dense"), net("small"), torch.zeros(1), seconds=0)
    assert found == 4  # of 3, 2, 4, 4, 20; the first two pairs only warm up
    assert calls == ["dense", "small"] * 7


# ---- choosing ------------------------------------------------------------------------------------


def test_the_worked_example_of_slimming():
    gamma = torch.tensor([0.9, 0.05, 0.4, 0.3, 0.3, 0.02, 0.7])
    kept = channels.largest(gamma, 0.3)  # round(2.1) = 2
    assert kept.tolist() == [True, False, True, True, True, False, True]
    kept = channels.largest(gamma, 0.45)  # round(3.15) = 3: of a tie the lower index goes
    assert kept.tolist() == [True, False, True, False, True, False, True]
    gamma, sizes = torch.tensor([0.9, 0.8, 0.1, 0.2]), [2, 2]
    kept = channels.largest(gamma, 0.75)
    assert kept.tolist() == [True, False, False, False]
    assert channels.largest_of_empty_layers(kept, gamma, sizes).tolist() == [
        False, False, False, True]
    assert channels.largest_of_empty_layers(kept, torch.ones(4), sizes).tolist() == [
        False, False, True, False]
    kept, back, rescued = prune_structured.prune_and_regenerate(gamma, None, sizes, 0.5, 0)
    assert kept.tolist() == [True, True, False, True] and rescued.tolist() == [False] * 3 + [True]
    assert not back.any()


@pytest.mark.parametrize("total, ratio, regen, exact, cut", [
    (4224, 0.4522, 0.1, 1910, 2141), (4224, 0.6764, 0.05, 2857, 2925),
    (2176, 0.512, 0.3, 1114, 1433), (2176, 0.658, 0.1, 1432, 1506)])
def test_counts_of_the_published_ratios(total, ratio, regen, exact, cut):
    name = "vgg16" if total == 4224 else "resnet19"
    with torch.device("meta"):
        _, sizes = channels.layers(models.build(name, 100, 3, 32, 5))
    assert sum(sizes) == total
    gamma = torch.rand(total, generator=rng(), dtype=torch.float64)
    assert int((~channels.largest(gamma, ratio)).sum()) == exact
    kept, back, rescued = prune_structured.prune_and_regenerate(
        gamma, torch.rand(total, generator=rng(1)).double(), sizes, ratio, regen)
    assert not rescued.any()
    assert (int((~kept).sum()), int(back.sum())) == (exact, cut - exact)
    assert int((~channels.largest(gamma, ratio + regen * (1 - ratio))).sum()) == cut


@drawn(st.floats(0, 0.999), st.floats(0, 0.999), st.lists(st.integers(1, 9), min_size=1, max_size=5),
       st.integers(0, 99), st.sampled_from(["kept", "pruned"]), st.booleans())
@settings(deadline=None, max_examples=200)
def test_kept_counts_are_exact_and_regenerated_channels_are_brute_force(
        ratio, regen, sizes, seed, base, ties):
    total = sum(sizes)
    if base == "pruned" and ratio / (1 - regen) > 1:
        return
    gamma = torch.rand(total, generator=rng(seed), dtype=torch.float64)
    scores = torch.rand(total, generator=rng(seed + 1), dtype=torch.float64)
    if ties:
        gamma, scores = (3 * gamma).floor() / 3, (3 * scores).floor() / 3
    kept, back, rescued = prune_structured.prune_and_regenerate(
        gamma, scores, sizes, ratio, regen, base=base)
    further = ratio + regen * (1 - ratio) if base == "kept" else ratio / (1 - regen)
    cut = sorted(range(total), key=lambda i: (float(gamma[i]), i))[:round(further * total)]
    assert int((kept & ~rescued).sum()) == total - round(ratio * total)
    assert all(keep.any() for keep in kept.split(sizes)) and not (back & rescued).any()
    count = round(further * total) - round(ratio * total)
    assert int(back.sum()) == count and set(back.nonzero().flatten().tolist()) <= set(cut)
    order = sorted(cut, key=lambda i: (-float(scores[i]), -float(gamma[i]), i))
    assert back.nonzero().flatten().tolist() == sorted(order[:count])
    for start, size in zip(np.cumsum([0, *sizes]), sizes):  # rescued: the largest gamma of a layer
        layer = slice(start, start + size)
        if rescued[layer].any():
            assert int(rescued[layer].sum()) == int(kept[layer].sum()) == 1
            assert int(rescued[layer].nonzero()) == int(gamma[layer].argmax())


def test_the_worked_example_of_regeneration():
    gamma = torch.arange(1, 11).double() / 10
    scores = torch.full((10,), 0.1).double()
    scores[3], scores[5] = 0.9, 0.8
    for survivors in (0.1, 1.0):  # their scores do not matter
        scores[7:] = survivors
        kept, back, _ = prune_structured.prune_and_regenerate(gamma, scores, [10], 0.5, 0.4)
        assert back.nonzero().flatten().tolist() == [3, 5]
        assert kept.nonzero().flatten().tolist() == [3, 5, 7, 8, 9]
    _, back, _ = prune_structured.prune_and_regenerate(gamma, scores, [10], 0.5, 0.4, base="pruned")
    assert int(back.sum()) == round(0.5 / 0.6 * 10) - 5 == 3


def test_the_ratio_for_a_target_is_the_nearest():
    net = random_net("small", 0.5)
    gamma = channels.gammas(net)
    names, sizes = channels.layers(net)

    def choose(n):
        return prune_structured.prune_and_regenerate(gamma, None, sizes, n / len(gamma), 0)

    removed = [channels.macs_removed(net, dict(zip(names, choose(n).kept.split(sizes))))
               for n in range(len(gamma) - len(names) + 1)]
    assert removed == sorted(removed)
    for target in (0.001, 0.3, 0.5, 0.77):
        ratio = channels.ratio_for(net, target, lambda p: choose(round(p * len(gamma))))
        best = min(range(len(removed)), key=lambda n: abs(removed[n] - target))
        assert removed[round(ratio * len(gamma))] == removed[best]


# ---- scoring -------------------------------------------------------------------------------------


def scored(net, metric="criticality", batch_size=7, count=20, aggregate="max"):
    images = data.load("fashion-mini")
    images = images._replace(x_train=images.x_train[:count], y_train=images.y_train[:count])
    args = SimpleNamespace(batch_size=batch_size, device="cpu", precision="fp32", loss="ce")
    pairs = images.pairs("train", batch_size)
    return images, training.score_channels(net, pairs, args, metric, aggregate)


@pytest.mark.parametrize("name, factor", [("small", 0.5), ("resnet19", 0.12)])
@pytest.mark.parametrize("aggregate", ["max", "mean"])
def test_scores_are_means_over_the_training_set_whatever_the_batches(name, factor, aggregate):
    net = random_net(name, factor).train()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    images, (scores, spiked) = scored(net, aggregate=aggregate)
    assert net.training
    assert all(lif.stop_recording() is None for lif in models.lifs(net).values())
    potentials = {}
    with metrics.hooks({group.lif: net.get_submodule(group.lif)
                        for group in models.removable(net).values()},
                       before=potentials.__setitem__), torch.inference_mode():
        net.eval()(images.x_train)
    expected, fired = [], []
    for current in potentials.values():  # a plain loop over time: charge, fire, reset, score
        v, total, any_spike = 0.0, 0.0, 0.0
        current = current.expand(net.time_steps, *current.shape[1:])  # direct coding: one step
        for x in current:
            h = v + (x - v) / (4 / 3)
            s = (h >= 1).double()
            v, any_spike = (1 - s) * h, any_spike + s
            total = total + 1 / (1 + (math.pi * (h - 1)) ** 2)
        per_pixel = (total / len(current)).flatten(2)
        expected.append((per_pixel.amax(2) if aggregate == "max" else per_pixel.mean(2)).mean(0))
        fired.append(any_spike.sum((0, 2, 3)) > 0)
    assert torch.allclose(scores, torch.cat(expected), rtol=0, atol=1e-12)
    assert torch.equal(spiked, torch.cat(fired)) and scores.dtype == torch.float64
    for batch_size in (1, 20, 64):
        _, (other, _) = scored(net, batch_size=batch_size, aggregate=aggregate)
        assert torch.allclose(scores, other, rtol=0, atol=1e-12)
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())


def test_scoring_streams_its_batches():
    net = random_net("small", 0.25)
    sizes = []
    with metrics.hooks({"": net}, before=lambda _, x: sizes.append(len(x))):
        scored(net, batch_size=8, count=20)
    assert sizes == [8, 8, 4]


def test_gradient_scores_are_means_over_batches():
    net = random_net("small", 0.5)
    images, (scores, spiked) = scored(net, "gradient", batch_size=8)
    total = 0
    for start in (0, 8, 16):
        net.zero_grad()
        logits = net(images.x_train[start:start + 8])
        labels = images.y_train[start:start + 8]
        torch.stack([torch.nn.functional.cross_entropy(step, labels) for step in logits]
                    ).mean().backward()
        total = total + torch.cat([conv.bn.weight.grad.abs() for conv in net.convs])
    assert torch.allclose(scores, total / 3) and spiked.any()


def test_a_channel_that_never_spikes_is_named():
    net = random_net("small", 0.5)
    net.convs[1].bn.weight.data[3], net.convs[1].bn.bias.data[3] = 0, -5
    _, (scores, spiked) = scored(net)
    silent = channels.layers(net)[1][0] + 3
    assert not spiked[silent] and spiked[silent - 1]
    assert scores[silent] < 0.1


# ---- the script ----------------------------------------------------------------------------------

SHORT = ["--train-limit", "400", "--epochs-pretrain", "2", "--epochs-finetune", "2", "--width", "0.5",
         "--batch-size", "25"]  # 16 steps an epoch
TINY = ["--train-limit", "100", "--epochs-pretrain", "1", "--epochs-finetune", "1", "--width", "0.25",
        "--batch-size", "25"]  # 4 steps an epoch
pytestmark = pytest.mark.usefixtures("few_test_images")


@pytest.fixture(autouse=True)
def the_name_of_the_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prune_structured.py"])


def run(*given, short=SHORT):
    return prune_structured.main([*short, *map(str, given)])


def record(folder):
    return json.loads(Path(folder, "channels.json").read_text())


def row(folder, key):
    return torch.tensor([value for layer in record(folder)["layers"] for value in layer[key]],
                        dtype=torch.float64)


def test_a_run_and_its_folder(capsys):
    summary = run("--run-dir", "r", "--prune-ratio", 0.4)
    assert {path.name for path in Path("r").iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoint.pt", "model.pt", "summary.json", "curves.png",
        "channels.json", "gamma.npz"}
    assert json.loads(Path("r/summary.json").read_text()) == summary
    assert list(summary) == runfolder.SUMMARY_KEYS
    assert (summary["script"], summary["method"], summary["regen"], summary["prune_ratio"]) == (
        "prune_structured", "criticality", 0.3, 0.4)

    net, found = models.load("r/model.pt"), record("r")
    dense = models.build("small", 10, 1, 28, 4, models.default_widths("small", 0.5))
    assert net.config["widths"] == summary["widths"] == [
        len(layer["kept"]) for layer in found["layers"]]
    assert (sum(summary["widths"]) == found["kept"]
            == 88 - round(0.4 * 88) + found["rescued"])
    before, after = metrics.parameters(dense), metrics.parameters(net)
    assert summary["parameters"] == summary["parameters_alive"] == after["parameters"]
    assert [layer["weights"] for layer in summary["layers"]] == [
        layer["weights"] for layer in before["layers"]]
    assert [layer["alive"] for layer in summary["layers"]] == [
        layer["weights"] for layer in after["layers"]]
    kept = sum(layer["alive"] for layer in summary["layers"])
    total = sum(layer["weights"] for layer in summary["layers"])
    assert summary["sparsity"] == pytest.approx(1 - kept / total)
    assert summary["sparsity_all"] == pytest.approx(1 - after["parameters"] / before["parameters"])
    assert summary["macs"] == sum(metrics.macs(net.config).values())
    assert summary["macs_dense"] == sum(metrics.macs(dense.config).values())
    assert found["macs_removed"] == pytest.approx(1 - summary["macs"] / summary["macs_dense"])
    assert summary["speedup_batch1"] > 0 and summary["speedup_batch32"] > 0
    assert summary["survived_by_regeneration"] == found["regenerated"] / found["kept"]
    assert summary["sops"] > 0 and summary["energy_mj"] > 0

    rows = lines("r", "metrics")
    assert [(r["stage"], r["epoch"], r["iteration"], r["lr"]) for r in rows] == [
        ("pretrain", 1, 16, 0.1), ("pretrain", 2, 32, pytest.approx(0.001)),
        ("finetune", 3, 48, 0.1), ("finetune", 4, 64, pytest.approx(0.001))]
    assert [r["sparsity"] for r in rows] == [0, 0, summary["sparsity"], summary["sparsity"]]
    assert summary["training_cost"] == pytest.approx((2 + 2 * (1 - summary["sparsity"])) / 4)
    assert summary["dense_accuracy"] == rows[1]["test_accuracy"]
    assert summary["pruned_accuracy"] == found["accuracy_removed"]
    assert summary["test_accuracy"] == rows[-1]["test_accuracy"]
    assert found["spikes_that_differ"] == 0 and found["accuracy_silenced"] == (
        found["accuracy_removed"])
    images = data.load("fashion-mini")
    right = net(images.x_test).sum(0).argmax(1) == images.y_test
    assert right.double().mean().item() == pytest.approx(summary["test_accuracy"])

    gammas = np.load("r/gamma.npz")
    assert gammas.files == [layer["name"] for layer in found["layers"]]
    for layer in found["layers"]:
        assert gammas[layer["name"]].shape == (2, len(layer["kept"]))  # a row an epoch
        assert np.array_equal(gammas[layer["name"]][-1],
                              net.get_submodule(layer["name"]).bn.weight.detach().numpy())
    printed = capsys.readouterr().out
    for words in (f"kept {found['kept']} of 88 channels", "MACs removed", "macs_first_once",
                  "macs_every_step", "at batch 32", "synaptic operations", "uJ"):
        assert words in printed
    assert "\r" not in printed


def test_the_choice_of_a_run_is_that_of_its_own_numbers():
    run("--run-dir", "r", "--prune-ratio", 0.6, "--regen", 0.4, "--l1", 0.01)
    found = record("r")
    gamma, score = row("r", "gamma"), row("r", "score")
    total, sizes = len(gamma), [layer["channels"] for layer in found["layers"]]
    order = sorted(range(total), key=lambda i: (float(gamma[i]), i))
    cut = order[:round((0.6 + 0.4 * 0.4) * total)]
    back = sorted(cut, key=lambda i: (-float(score[i]), -float(gamma[i]), i))[
        :len(cut) - round(0.6 * total)]
    kept = set(order[len(cut):]) | set(back)
    start = 0
    for layer, size in zip(found["layers"], sizes):
        mine = {i - start for i in kept if start <= i < start + size}
        assert set(layer["kept"]) - set(layer["rescued"]) == mine
        assert set(layer["regenerated"]) == {i - start for i in back if start <= i < start + size}
        start += size


def test_scores_and_gammas_of_a_run_are_those_of_the_dense_network(monkeypatch):
    """The dense network, trained again by hand: L1 as a subgradient, scored before anything goes."""
    run("--run-dir", "r", "--l1", 0.02, short=TINY)
    images = data.load("fashion-mini", train_limit=100)
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 28, 4, [4, 8, 16, 16]).to(memory_format=torch.channels_last)
    net.set_normalisation(images.mean, images.std)
    sgd = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=1e-4)
    for step, (x, y) in enumerate(data.batches(images.x_train, images.y_train, 25, 0, 0, flip=True)):
        sgd.param_groups[0]["lr"] = [0.1, 0.1, 0.01, 0.001][step]
        loss = training.loss_over_time(net(x), y)
        sgd.zero_grad()
        loss.backward()
        for conv in net.convs:
            conv.bn.weight.grad.add_(torch.sign(conv.bn.weight.detach()), alpha=0.02)
        sgd.step()
    assert torch.equal(row("r", "gamma"), channels.gammas(net).double())
    args = SimpleNamespace(batch_size=25, device="cpu", precision="fp32", loss="ce")
    scores, _ = training.score_channels(net, images.pairs("train", 25), args)
    assert torch.equal(row("r", "score"), scores)


@pytest.mark.parametrize("stage, given, expected", [
    ("pretrain", [], [1.9, -2.9, 0.0]), ("finetune", ["--finetune-l1"], [1.9, -2.9, 0.0]),
    ("finetune", [], [2.0, -3.0, 0.0])])
def test_the_l1_step_by_hand(stage, given, expected, monkeypatch):
    """gamma = [2, -3, 0], no gradient of the loss, l1 0.1, lr 1: [1.9, -2.9, 0]. Through main's own
    lines, with a run that has one batch of zeros."""
    net = models.build("small", 2, 1, 8, 1, [3, 1, 1, 1])
    net.convs[0].bn.weight.data = torch.tensor([2.0, -3.0, 0.0])
    net.fc.weight.data.zero_()  # no gradient reaches the layers below
    batch = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    args = SimpleNamespace(device="cpu", precision="fp32", loss="ce")
    fake = SimpleNamespace(
        args=args, net=net, forward=net, optimizer=torch.optim.SGD(net.parameters(), 1.0),
        epochs=lambda name: [0] if name == stage else [], batches=lambda _: [batch], iteration=1,
        notes=dict(gamma=[]), position=(0, 9), meter=Meter(net.mean.device), weight=1.0, share=1.0,
        under_way=lambda _: nullcontext(), end_epoch=lambda *_: None)
    monkeypatch.setattr(removal, "set_up", lambda *_, **__: (fake, None))
    monkeypatch.setattr(removal, "finish", lambda *_, **__: None)
    run("--lr", 1, "--l1", 0.1, *given)
    assert net.convs[0].bn.weight.tolist() == pytest.approx(expected)
    assert net.convs[1].bn.weight.tolist() == pytest.approx([1 if expected[0] == 2 else 0.9])


def test_the_steps_come_in_the_order_of_algorithm_2(monkeypatch):
    """Pretrain, score the dense network, prune further than asked, regenerate out of what was
    pruned, remove, fine-tune."""
    order, dense = [], [4, 8, 16, 16]

    def watch(owner, name, note):
        function = getattr(owner, name)

        def watched(*arguments, **named):
            order.append(note(*arguments))
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, watched)

    watch(training, "backward", lambda run, *_: (
        "backward", run.stage, run.net.training, run.net.config["widths"] == dense))
    watch(training, "descend", lambda *_: "descend")
    watch(training, "score_channels", lambda net, *_: ("score", net.config["widths"] == dense))
    watch(channels, "largest", lambda gamma, ratio: ("prune", round(ratio, 9), len(gamma)))
    watch(prune_structured, "select", lambda eligible, count, *_: (
        "regenerate", int(eligible.sum()), count))
    watch(channels, "remove", lambda net, kept: (
        "remove", sum(int(keep.sum()) for keep in kept.values())))
    run("--run-dir", "r", "--prune-ratio", 0.5, "--regen", 0.3, "--l1", 0.02, short=TINY)
    found = record("r")
    assert order == (
        [("backward", "pretrain", True, True), "descend"] * 4
        + [("score", True), ("prune", 0.65, 44), ("regenerate", 29, 29 - 22),
           ("remove", 22 + found["rescued"])]
        + [("backward", "finetune", True, False), "descend"] * 4)


def test_a_metric_of_one_s_own_is_a_function_and_a_row(monkeypatch, capsys):
    monkeypatch.setitem(prune_structured.SCORES, "mine", lambda run: (
        torch.arange(44).double(), None))
    summary = run("--run-dir", "r", "--metric", "mine", short=TINY)
    assert summary["method"] == "mine" and row("r", "score").equal(torch.arange(44).double())
    assert record("r")["regenerated_never_spiked"] is None
    assert "mine" in prune_structured.parse_args(["--metric", "mine"]).run_dir
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["prune_structured.py"])
    with pytest.raises(SystemExit) as stop:
        run("--run-dir", "q", "--metric", "mine", short=TINY)
    assert stop.value.code == 2 and "invalid choice: 'mine'" in one_line(capsys)


def test_no_regeneration_is_slimming_bit_by_bit(once):
    run("--run-dir", "a", "--regen", 0, short=TINY)
    run("--run-dir", "b", "--method", "slimming", short=TINY)
    unbroken = once(run, short=TINY)
    assert_same_run("a", "b")
    assert json.loads(Path("a/summary.json").read_text())["method"] == "slimming"
    assert row("a", "gamma").equal(row(unbroken, "gamma"))  # the same dense network
    assert record("a")["regenerated"] == 0 < record(unbroken)["regenerated"]


def test_the_same_seed_gives_the_same_run():
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("--run-dir", folder, "--seed", seed, "--metric", "random", short=TINY)
    assert_same_run("a", "b")
    assert not row("a", "gamma").equal(row("c", "gamma"))
    assert not row("a", "score").equal(row("c", "score"))


@pytest.mark.parametrize("given, method", [
    (["--metric", "gradient"], "gradient"), (["--metric", "random"], "random"),
    (["--regen-base", "pruned"], "criticality"), (["--finetune-l1"], "criticality"),
    (["--prune-ratio", "0"], "dense"), (["--target-macs", "0.6"], "criticality"),
    (["--precision", "bf16", "--crop", "2"], "criticality"),
    (["--model", "resnet19", "--time-steps", "2", "--width", "0.1"], "criticality"),
    (["--model", "vgg16", "--time-steps", "2", "--width", "0.1", "--epochs-finetune", "0"],
     "criticality")])
def test_all_methods(given, method):
    summary = run("--run-dir", "r", *given, short=TINY)
    found = record("r")
    assert summary["method"] == method and math.isfinite(lines("r", "metrics")[-1]["train_loss"])
    channels_ = found["channels"]
    gone = round(found["ratio"] * channels_) - found["rescued"]
    assert found["kept"] == channels_ - gone
    if method == "dense":
        assert summary["sparsity"] == 0 and summary["macs"] == summary["macs_dense"]
    if "--target-macs" in given:
        assert found["macs_removed"] == pytest.approx(0.6, abs=0.05)
        assert summary["prune_ratio"] == found["ratio"]
    if "pruned" in given:  # round(0.5 / 0.7 * 44) are cut, 22 stay
        assert found["regenerated"] == 31 - 22
    if method == "random":
        assert row("r", "score").equal(torch.rand(44, generator=seeded(
            0, 4)).double())


def test_l1_in_the_fine_tuning():
    for folder, given in (("without", []), ("with", ["--finetune-l1"])):
        run("--run-dir", folder, *given, "--l1", 0.05, short=TINY)
    assert record("without") == record("with")
    sizes = [sum(np.abs(gamma[-1]).sum() for gamma in np.load(f"{folder}/gamma.npz").values())
             for folder in ("with", "without")]
    assert sizes[0] < sizes[1]


@pytest.fixture
def dense(once):
    """The folder of a run that has removed nothing."""
    return once(run, "--prune-ratio", 0, short=TINY)


def test_init_skips_the_pretraining(dense):
    found = run("--run-dir", "r", "--init", dense / "model.pt", "--prune-ratio", 0.5,
                short=TINY[:2] + TINY[4:])
    assert [r["stage"] for r in lines("r", "metrics")] == ["finetune"]
    assert found["dense_accuracy"] == lines(dense, "metrics")[-1]["test_accuracy"]
    assert row("r", "gamma").equal(channels.gammas(models.load(dense / "model.pt")).double())


def accuracy_of(path):
    """The test accuracy of a stored network, by its own predictions."""
    images = data.load("fashion-mini")
    with torch.inference_mode():
        return float((models.load(path)(images.x_test).sum(0).argmax(1)
                      == images.y_test).float().mean())


def test_without_fine_tuning_the_result_is_that_of_the_small_network():
    dense = run("--run-dir", "dense", "--prune-ratio", 0, "--epochs-finetune", 0)
    given = ["--run-dir", "r", "--prune-ratio", 0.9, "--epochs-finetune", 0]
    found = run(*given)
    assert found["test_accuracy"] == pytest.approx(accuracy_of("r/model.pt"), abs=1e-6)
    assert found["test_accuracy"] == found["pruned_accuracy"] != found["dense_accuracy"]
    assert found["dense_accuracy"] == dense["test_accuracy"] == lines("r", "metrics")[-1][
        "test_accuracy"]
    assert found["training_cost"] == 1 and found["epochs"] == 2  # of the dense network
    assert all(len(gamma) == 0 for gamma in np.load("r/gamma.npz").values())
    assert run(*given, "--resume") == json.loads(Path("r/summary.json").read_text())


@pytest.mark.parametrize("given", [(), ("--method", "slimming"), ("--target-macs", 0.9),
                                   ("--prune-ratio", 0)])
def test_a_network_of_init_may_be_cut_without_any_epoch(given, dense, capsys):
    found = run("--run-dir", "r", "--init", dense / "model.pt", "--epochs-finetune", 0, *given,
                short=TINY[:2] + TINY[6:])
    assert found["test_accuracy"] == pytest.approx(accuracy_of("r/model.pt"), abs=1e-6)
    assert found["dense_accuracy"] == pytest.approx(accuracy_of(dense / "model.pt"), abs=1e-6)
    assert (found["epochs"], found["training_cost"], found["seconds"]) == (0, 0, 0)
    assert not Path("r/curves.png").exists() and not Path("r/metrics.jsonl").exists()
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name, factor", [*NETS, ("resnet19-pre", 0.1)])
@pytest.mark.parametrize("published", [False, True])
def test_every_share_of_the_macs_that_is_accepted_is_reached(name, factor, published):
    """The largest one is where each layer has lost what it can lose, and is reached."""
    net = models.build(name, 10, 1, 28, 1, models.default_widths(name, factor))
    for scale in channels.scales(net):
        torch.nn.init.uniform_(scale, 0.1, 2, generator=rng(len(scale)))
    (names, sizes), gamma = channels.layers(net), channels.gammas(net)
    may_be_empty = channels.may_be_empty(net)

    def choose(ratio):
        settings = gamma, gamma.flip(0), sizes, ratio, 0.3
        if published:
            return prune_structured.prune_and_regenerate_as_published(*settings, may_be_empty)
        return prune_structured.prune_and_regenerate(*settings, may_be_empty)

    def removed(kept):
        return channels.macs_removed(net, dict(zip(names, kept.split(sizes))))

    most = removed(channels.fewest(net))
    must_stay = 1 if name == "resnet19-pre" else len(names)
    assert channels.fewest(net).sum() == must_stay
    one_a_layer = channels.macs_removed(net, dict.fromkeys(names, torch.ones(1).bool()))
    assert most > one_a_layer if name == "resnet19-pre" else most == one_a_layer
    channels.check_ratio(net, 0.0, most)
    channels.check_ratio(net, 1 - must_stay / sum(sizes))
    for target, ratio in ((most + 1e-6, 0.0), (0.0, 1 - (must_stay - 1) / sum(sizes))):
        with pytest.raises(ValueError, match="expected at"):
            channels.check_ratio(net, ratio, target)
    ratio = channels.ratio_for(net, most, choose)
    assert removed(choose(ratio).kept) == pytest.approx(most)


def test_a_kill_before_the_first_step_after_init(monkeypatch, dense):
    """The cut is saved at iteration 0: going on does not take the small network for --init's."""
    given = ["--init", dense / "model.pt", "--prune-ratio", "0.5"]
    run("--run-dir", "unbroken", *given, short=TINY[:2] + TINY[4:])

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(training, "backward", die)
        run("--run-dir", "r", *given, short=TINY[:2] + TINY[4:])
    assert torch.load("r/checkpoint.pt", weights_only=True)["position"] == [0, 0, 0]
    summary = run("--run-dir", "r", "--resume", short=[])
    assert_same_run("unbroken", "r")
    assert summary["dense_accuracy"] == lines(dense, "metrics")[-1]["test_accuracy"]


# ---- stopping and going on -----------------------------------------------------------------------


@pytest.mark.parametrize("given, steps", [
    (["--finetune-l1"], (1, 3, 4, 5, 6, 8)),
    (["--metric", "gradient", "--target-macs", "0.5"], (4, 5)),
    (["--model", "resnet19", "--width", "0.1", "--time-steps", "2"], (5,))])
def test_resume_from_any_step(given, steps, monkeypatch):
    """Stop in each stage, at its first and at its last step; go on in one process."""
    run("--run-dir", "unbroken", *given, short=TINY)
    for step in steps:
        stop_after(step, monkeypatch, lambda *a: run(*a, short=TINY), "--run-dir", f"r{step}", *given)
        run("--run-dir", f"r{step}", "--resume", short=[])
        assert_same_run("unbroken", f"r{step}")


@pytest.mark.parametrize("where", ["score_channels", "evaluate"])
def test_a_kill_between_the_stages(where, monkeypatch, once):
    """Die while channels are scored, and while the removal is measured: nothing is saved there."""
    unbroken = once(run, short=TINY)
    function, calls = getattr(training, where), []

    def die(*arguments, **named):
        calls.append(None)
        if len(calls) == dict(score_channels=1, evaluate=3)[where]:
            raise KeyboardInterrupt
        return function(*arguments, **named)

    monkeypatch.setattr(training, where, die)
    with pytest.raises(SystemExit) as stop:
        run("--run-dir", "r", short=TINY)
    assert stop.value.code == 130
    assert torch.load("r/checkpoint.pt", weights_only=True)["position"] == [1, 0, 4]
    monkeypatch.setattr(training, where, function)
    run("--run-dir", "r", "--resume", short=[])
    assert_same_run(unbroken, "r")


def test_a_checkpoint_after_the_removal_does_not_choose_again(monkeypatch, once):
    unbroken = once(run, short=TINY)
    stop_after(5, monkeypatch, lambda *a: run(*a, short=TINY), "--run-dir", "r")
    monkeypatch.setattr(training, "score_channels", None)
    run("--run-dir", "r", "--resume", short=[])
    assert_same_run(unbroken, "r")


# ---- what a wrong command gets -------------------------------------------------------------------


@pytest.mark.parametrize("given, words", [
    ("--prune-ratio 50", "--prune-ratio is 50, expected a fraction in [0, 1). For 50 % write 0.5"),
    ("--prune-ratio 1", "--prune-ratio is 1, expected a fraction in [0, 1)"),
    ("--prune-ratio -0.1", "--prune-ratio is -0.1"), ("--prune-ratio nan", "--prune-ratio is nan"),
    ("--regen 1", "--regen is 1, expected a fraction in [0, 1)"), ("--regen -1", "--regen is -1"),
    ("--regen nan", "--regen is nan"),
    ("--target-macs 0", "--target-macs is 0"), ("--target-macs 1", "--target-macs is 1"),
    ("--target-macs 0.9999", "--target-macs is 0.9999, expected at most 0.9616"),
    ("--target-macs 0.5 --prune-ratio 0.5", "not allowed with argument"),
    ("--prune-ratio 0.98", "leaves 1 of 44 channels, expected at least one for each of the 4 layers"),
    ("--l1 -1", "--l1 is -1"), ("--l1 nan", "--l1 is nan"),
    ("--epochs-pretrain 0", "--epochs-pretrain is 0, expected at least 1, or a network by --init"),
    ("--epochs-pretrain -1", "--epochs-pretrain is -1"),
    ("--epochs-finetune -1", "--epochs-finetune is -1"),
    ("--epochs-prune 2", "unrecognized arguments: --epochs-prune, expected a flag"),
    ("--method greg1", "invalid choice: 'greg1'"),
    ("--method slimming --regen 0.3", "--regen is 0.3, which --method slimming does not use"),
    ("--method slimming --metric random", "--metric is random, which --method slimming does not"),
    ("--method slimming --regen-base pruned", "--regen-base is pruned"),
    ("--regen 0 --metric random", "--metric is random, which --regen 0 does not use"),
    ("--regen 0 --regen-base pruned", "--regen-base is pruned, which --regen 0 does not use"),
    ("--prune-ratio 0 --regen 0.3", "--regen is 0.3, which --prune-ratio 0 does not use"),
    ("--prune-ratio 0 --metric random", "--metric is random, which --prune-ratio 0 does not"),
    ("--l1 0 --finetune-l1", "--finetune-l1 is True, which --l1 0 does not use"),
    ("--epochs-finetune 0 --finetune-l1", "--finetune-l1 is True, which --epochs-finetune 0"),
    ("--init other.pt --epochs-pretrain 0 --l1 0.5", "--l1 is 0.5, which a run without pretrain"),
    ("--regen-base pruned --prune-ratio 0.8 --regen 0.3", "which prunes more than all channels"),
    ("--method magic", "invalid choice: 'magic'"), ("--metric granet", "invalid choice: 'granet'"),
    ("--sparsity 0.9", "unrecognized arguments"), ("--batch-size 101", "but fashion-mini has 100"),
    ("--init absent.pt", "absent.pt"), ("--init other.pt", "has widths [2, 3, 6, 6], expected"),
    ("--init masked.pt", "is a pruned network"), ("--run-dir a_file", "a_file is a file"),
    ("--run-dir full", "holds no run"), ("--dataset no/such.npz", "no/such.npz"),
])
def test_wrong_commands(given, words, capsys):
    Path("a_file").write_text("text")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("text")
    net = models.build("small", 10, 1, 28, 4, [4, 8, 16, 16])
    other = models.build("small", 10, 1, 28, 4, [2, 3, 6, 6])
    masks = Masks(net)
    masks.prune(10, masks.magnitudes(), rng())
    masks.apply(torch.optim.SGD(net.parameters(), 0.1))
    torch.save(modelfile.pack(net, masks.alive), "masked.pt")
    torch.save(modelfile.pack(other), "other.pt")
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run(*given.split(), short=TINY)
    assert stop.value.code == 2
    assert words in one_line(capsys)
    assert sorted(Path().rglob("*")) == before  # nothing was written


def test_a_run_of_other_flags_or_of_the_other_script(capsys):
    run("--run-dir", "r", "--epochs-finetune", 0, short=TINY)
    for given, words in ((["--prune-ratio", "0.4"], "was made with --prune-ratio 0.5"),
                         (["--target-macs", "0.4"], "was made with --target-macs None")):
        with pytest.raises(SystemExit) as stop:
            run("--run-dir", "r", "--resume", *given, short=[])
        assert stop.value.code == 2 and words in one_line(capsys)
    Path("r/summary.json").unlink()
    Path("r/checkpoint.pt").write_bytes(Path("r/checkpoint.pt").read_bytes()[:-9000])
    with pytest.raises(SystemExit) as stop:
        run("--run-dir", "r", "--resume", short=[])
    assert stop.value.code == 2 and "does not fit this run or is damaged" in one_line(capsys)


def test_the_defaults_are_the_paper_s(capsys):
    for given, expected in {
            "--dataset cifar100": dict(
                prune_ratio=0.4522, regen=0.1, l1=1e-4, epochs_pretrain=160, epochs_finetune=160,
                lr=0.3, momentum=0.9, batch_size=128, time_steps=5, weight_decay=1e-4,
                model="vgg16", finetune_l1=False),
            "--dataset cifar100 --prune-ratio 0.67": dict(prune_ratio=0.67, regen=0.05),
            "--dataset cifar100 --model resnet19": dict(prune_ratio=0.512, regen=0.3),
            "--model resnet19 --prune-ratio 0.658": dict(regen=0.1),
            "": dict(prune_ratio=0.5, regen=0.3, model="small", method="criticality"),
            "--target-macs 0.5": dict(prune_ratio=None, regen=0.3, target_macs=0.5)}.items():
        args = vars(prune_structured.parse_args(given.split()))
        assert {flag: args[flag] for flag in expected} == expected
    steps = [training.step_down(0.3, epoch * 391, 160 * 391) for epoch in (0, 79, 80, 119, 120, 159)]
    assert steps == pytest.approx([0.3, 0.3, 0.03, 0.03, 0.003, 0.003])
    assert training.step_down(0.3, 80 * 391 - 1, 160 * 391) == 0.3
    with pytest.raises(SystemExit):
        prune_structured.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "default: the paper's, vgg16: 0.4522, resnet19: 0.512; others: 0.5" in shown
    assert "None" not in shown


def test_names_of_runs():
    names = {flags_: prune_structured.parse_args(flags_.split()).run_dir for flags_ in (
        "", "--method slimming", "--prune-ratio 0", "--seed 1",
        "--metric random", "--target-macs 0.5", "--regen 0.2", "--prune-ratio 0.4", "--finetune-l1",
        "--regen-base pruned", "--dataset a/mine.npz", "--model resnet19")}
    assert len(set(names.values())) == len(names)
    assert names[""] == "runs/fashion-mini-small-structured-criticality-0.5-r0.3-seed0"
    assert (prune_structured.parse_args(["--regen", "0"]).run_dir == names["--method slimming"])
