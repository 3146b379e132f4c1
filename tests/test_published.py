"""The published code's networks, its choice of channels, and --as-published from the command line.
Its update of weights and its neuron: test_core.py."""
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import channels
import compact
import data
import metrics
import modelfile
import models
import plans
import prune_structured
import prune_unstructured
from channels import Choice
from harness import published, setup
from helpers import assert_same_run, lines, one_line, random_images, rng, stop_after
from masks import Masks

FIRSTS = (0, 3, 6)  # the blocks of resnet19-pre that halve the map


def lively(name="resnet19-pre", factor=0.05, side=10, seed=0, time_steps=3, **more):
    """A narrow network in float64 and eval mode, all of whose layers fire."""
    torch.manual_seed(seed)
    net = models.build(name, 5, 2, side, time_steps, plans.default_widths(name, factor),
                       **more).double()
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for bn in norms:
        torch.nn.init.uniform_(bn.weight, 0.5, 1.5)
        torch.nn.init.uniform_(bn.bias, 0.2, 1.2)
        bn.momentum = 1.0
    net.train()(images(net, 6, seed=99))  # BN's statistics are those of a batch
    for bn in norms:
        bn.momentum = 0.1
    if name == "resnet19":  # no BN before its hidden layer
        net.fc1.bias.data.fill_(1.5)
    return net.eval()


def images(net, n, seed=1):
    side = net.config["image_size"]
    return torch.randn(n, 2, side, side, generator=rng(seed), dtype=torch.float64)


def random_kept(net, seed, empty=()):
    """About 60 % of each group's channels; of the blocks `empty` no inner one. What goes would
    fire."""
    kept = {}
    for name, size in zip(*channels.layers(net)):
        keep = torch.rand(size, generator=rng(seed + size)) < 0.6
        keep[seed % size] = True
        if name in [f"blocks.{i}.conv1" for i in empty]:
            keep[:] = False
        kept[name] = keep
        net.get_submodule(models.removable(net)[name].bn).bias.data[~keep] = 2.0
    return kept


def emptied(net, *blocks):
    """The network whose blocks have lost their inner channels."""
    groups = models.removable(net)
    return channels.remove(net, {
        f"blocks.{i}.conv1": torch.zeros(net.config["widths"][groups[f"blocks.{i}.conv1"].place],
                                         dtype=torch.bool) for i in blocks})


# ---- the pre-activation ResNet-19 ----------------------------------------------------------------


def plain_forward(net, frames):
    """The network in eval mode as a loop over time, written out: [T, N, C, H, W] -> logits."""
    potentials, logits = {}, []

    def bn(norm, x):
        mean, var, scale, shift = (tensor.view(-1, 1, 1) for tensor in (
            norm.running_mean, norm.running_var, norm.weight, norm.bias))
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    def lif(name, x):
        v = potentials.get(name, 0.0)
        h = v + (x - v) / (4 / 3)
        s = (h >= 1).double()
        potentials[name] = h * (1 - s)
        return s

    for x in frames:
        stream = F.conv2d(x, net.stem.weight, padding=1)
        for i, block in enumerate(net.blocks):
            stride = 2 if i in FIRSTS else 1
            spikes = lif((i, 1), bn(block.norm1.bn, stream))
            inner = F.conv2d(spikes, block.conv1.conv.weight, padding=1, stride=stride)
            added = F.conv2d(lif((i, 2), bn(block.conv1.bn, inner)), block.conv2.weight, padding=1)
            if stride == 2:
                stream = F.conv2d(stream, block.shortcut.weight, stride=2)
            stream = stream + added
        logits.append(lif("last", bn(net.norm.bn, stream)).mean((2, 3)) @ net.fc.weight.T
                      + net.fc.bias)
    return torch.stack(logits)


@pytest.mark.parametrize("side", [9, 16])
@torch.no_grad()
def test_the_preactivation_resnet_is_a_plain_loop(side):
    net = lively(side=side)
    x = images(net, 4)
    assert torch.allclose(net(x), plain_forward(net, [x] * 3), rtol=0, atol=1e-12)
    frames = torch.stack([images(net, 4, seed) for seed in (5, 6)])  # fewer than 3 steps
    assert torch.allclose(net(frames), plain_forward(net, frames), rtol=0, atol=1e-12)
    with metrics.firing(net) as counts:
        net(frames)
    assert all(0.02 < rate < 0.95 for rate in metrics.rates(counts)[1].values())


@torch.no_grad()
def test_what_sees_an_image_once():
    net, seen = lively(), {}
    for x, once in ((images(net, 4), 4), (images(net, 4).expand(3, 4, 2, 10, 10), 12)):
        with metrics.hooks(metrics.prunable_layers(net),
                           before=lambda name, x: seen.update({name: len(x)})):
            net(x)
        assert seen.pop("stem") == seen.pop("blocks.0.shortcut") == once
        assert len(seen) == 19 and set(seen.values()) == {12}
    net, seen = emptied(net, 0, 1, 2), {}  # then the second shortcut sees the stem alone
    with metrics.hooks(metrics.prunable_layers(net),
                       before=lambda name, x: seen.update({name: len(x)})):
        net(images(net, 4))
    assert [name for name, n in seen.items() if n == 4] == [
        "stem", "blocks.0.shortcut", "blocks.3.shortcut"]


@torch.no_grad()
def test_a_weight_is_scored_by_the_next_lif_that_it_changes():
    """Row 1 of each weight changes the current of one channel of one LIF, and of none before."""
    net = lively()
    x, scored = images(net, 2), models.scored_by(net)
    assert list(scored) == [name for name, p in net.named_parameters() if p.dim() > 1]

    def currents():
        found = {}
        with metrics.hooks(models.lifs(net), before=found.__setitem__):
            net(x)
        return found

    before = currents()
    assert scored.pop("fc.weight") == ("lif", 1, 1)  # it feeds none: the channels that it reads
    for name, (lif, dim, repeat) in scored.items():
        weight = net.get_parameter(name)
        weight[1] += 0.5
        changed = {lif: (now - before[lif]).abs().amax((0, 1, 3, 4)) > 1e-9
                   for lif, now in currents().items()}
        weight[1] -= 0.5
        first = next(lif for lif, rows in changed.items() if rows.any())
        assert first == lif and changed[first].nonzero().flatten().tolist() == [1]
        assert (dim, repeat) == (0, 1)
    assert [scored[name].lif for name in (
        "stem.weight", "blocks.0.conv1.conv.weight", "blocks.0.conv2.weight",
        "blocks.0.shortcut.weight", "blocks.7.conv2.weight")] == [
        "blocks.0.lif1", "blocks.0.lif2", "blocks.1.lif1", "blocks.1.lif1", "lif"]


def costs_by_hand(widths, in_channels, side, classes):
    """Return (weights, MACs of a step, numbers in BN) of resnet19-pre; the first two by layer."""
    weights, macs, norms = {}, {}, 0

    def layer(name, size):
        weights[name], macs[name] = size, size * side**2

    stream, *rows, last = widths
    layer("stem", 9 * in_channels * stream)
    for i in range(8):
        picked, inner, out = rows[3 * i:3 * i + 3]
        side = math.ceil(side / 2) if i in FIRSTS else side
        if inner:
            layer(f"blocks.{i}.conv1.conv", 9 * picked * inner)
            layer(f"blocks.{i}.conv2", 9 * inner * out)
            norms += 2 * (picked + inner)
        if i in FIRSTS:
            layer(f"blocks.{i}.shortcut", stream * out)
        stream = out
    side = 1
    layer("fc", last * classes)
    return weights, macs, norms + 2 * last


def test_sizes_of_the_preactivation_resnet():
    """At 32x32: weights, parameters, MACs, and the channels that are ranked."""
    with torch.device("meta"):
        net = models.build("resnet19-pre", 100, 3, 32, 5)
    widths = [64, 64, 128, 128, *[128] * 6, 128, 256, 256, *[256] * 6, 256, 512, 512, *[512] * 3,
              512]
    assert net.config["widths"] == widths
    weights, macs, norms = costs_by_hand(widths, 3, 32, 100)
    assert {name.removesuffix(".weight"): net.get_parameter(name).numel()
            for name in models.scored_by(net)} == weights
    assert sum(p.numel() for p in net.parameters()) == sum(weights.values()) + norms + 100
    assert sum(weights.values()) == 12_537_536 and norms == 8_832
    assert metrics.macs(net.config) == macs and sum(macs.values()) == 555_468_800
    names, sizes = channels.layers(net)
    # what the blocks read, their inner channels, what the output layer reads
    assert sum(sizes) == (64 + 3 * 128 + 3 * 256 + 512) + (3 * 128 + 3 * 256 + 2 * 512) + 512
    assert names == [f"blocks.{i}.{part}" for i in range(8) for part in ("norm1", "conv1")] + [
        "norm"]
    assert channels.may_be_empty(net) == [False, True] * 8 + [False]


USUAL = plans.default_widths("resnet19-pre", 0.05)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("place, width", [
    (None, []), (None, USUAL[:-1]), (0, 0), (0, 2.0), (1, 0), (1, 4), (2, -1), (3, 0), (3, -6),
    (6, 5), (13, 0), (25, 0), (25, 27), (2, 0), (slice(0, 3), [0, 0, 0])])
def test_wrong_widths(place, width):
    """Of a stem without channels, blocks that read none or too many, unequal outputs in a stage."""
    widths = list(USUAL) if place is not None else width
    if place is not None:
        widths[place] = width
    with pytest.raises(ValueError, match="expected") as error:
        models.build("resnet19-pre", 5, 2, 10, 3, widths)
    assert "\n" not in str(error.value)


def test_a_small_network_through_a_file(tmp_path):
    net = lively()
    small = channels.remove(net, random_kept(net, 3, empty=(1, 6))).float()
    torch.save(modelfile.pack(small), tmp_path / "model.pt")
    again, x = models.load(tmp_path / "model.pt"), images(net, 4).float()
    assert again.config == small.config and torch.equal(again(x), small(x))
    name, stream = "blocks.5.norm1", small.blocks[5].norm1.stream
    picked = small.get_buffer(f"{name}.picked")
    assert 1 < len(picked) < stream
    below, beyond = picked.clone(), picked.clone()
    below[0], beyond[-1] = -1, stream
    for wrong in (below, beyond, picked.flip(0), picked[:1].repeat(len(picked)), picked[1:]):
        packed = modelfile.read(tmp_path / "model.pt")
        packed["state_dict"][f"{name}.picked"] = wrong
        with pytest.raises(ValueError, match=name) as error:
            modelfile.unpack(packed, "model.pt")
        assert "\n" not in str(error.value)


# ---- removing ------------------------------------------------------------------------------------


REMOVED = [("resnet19-pre", 0.05, 10, 0, ()), ("resnet19-pre", 0.05, 9, 1, (0, 4, 7)),
           ("resnet19-pre", 0.05, 10, 2, range(8)), ("vgg16-avg", 0.04, 32, 0, ()),
           ("small-avg", 0.3, 16, 1, ())]


@pytest.mark.parametrize("name, factor, side, seed, empty", REMOVED)
@torch.no_grad()
def test_silenced_and_removed_networks_agree(name, factor, side, seed, empty):
    net = lively(name, factor, side, seed)
    kept = random_kept(net, seed, empty)
    for mode in (False, True):
        masked, small = channels.silence(net.train(mode), kept), channels.remove(net, kept)
        assert small.training == mode
        found = channels.differences(masked, small, kept, images(net, 6))
        assert found["logits_differ_by"] <= 1e-10 and found["spikes_that_differ"] == 0
        assert found["spikes_compared"] > 500
    with metrics.firing(small.eval()) as counts:  # a silent network would agree with anything
        small(images(net, 6))
    assert all(rate > 0 for rate in metrics.rates(counts)[1].values())
    assert small.config["widths"] == channels.kept_widths(net, kept)
    for i in empty:
        assert not any(key.startswith(f"blocks.{i}.") and "shortcut" not in key
                       for key in small.state_dict())
        x = torch.randn(2, 3, *small.blocks[i].shortcut.weight.shape[1:2] if i in FIRSTS else (6,),
                        5, 5, dtype=torch.float64)
        expected = x if i not in FIRSTS else torch.stack(
            [F.conv2d(step, small.blocks[i].shortcut.weight, stride=2) for step in x])
        assert torch.allclose(small.blocks[i](x, 2), expected, rtol=0, atol=1e-12)
    macs, seen = metrics.macs(small.config), {}
    layers = metrics.prunable_layers(small)
    with metrics.hooks(layers, after=lambda n, y: seen.update({n: y.shape[2:].numel()})):
        small(images(net, 1))
    assert macs == {n: layer.weight.numel() * seen[n] for n, layer in layers.items()}
    if name == "resnet19-pre":
        weights, by_hand, norms = costs_by_hand(small.config["widths"], 2, side, 5)
        assert macs == by_hand
        assert sum(p.numel() for p in small.parameters()) == sum(weights.values()) + norms + 5
        dense = sum(metrics.macs(net.config).values())
        assert channels.macs_removed(net, kept) == 1 - sum(by_hand.values()) / dense
        alive = {row["name"]: row["alive"] for row in channels.compared_with_dense(
            net, small)["layers"]}
        assert alive == {f"{n}.weight": weights.get(n, 0) for n in metrics.prunable_layers(net)}


@torch.no_grad()
def test_removing_twice_is_removing_at_once():
    net = lively()
    first = random_kept(net, 3, empty=(2,))
    once = channels.remove(net, first)
    second = random_kept(once, 8, empty=(5,))
    twice, at_once = channels.remove(once, second), {}
    for name, keep in first.items():
        at_once[name] = keep.clone()
        if name in second:
            at_once[name][keep.nonzero().flatten()[~second[name]]] = False
    straight = channels.remove(net, at_once)
    assert twice.config == straight.config and twice.state_dict().keys() == (
        straight.state_dict().keys())
    changed = {name for name, tensor in straight.state_dict().items()
               if not torch.equal(tensor, twice.state_dict()[name])}
    assert not changed, changed
    read = [sum(len(tensor) for name, tensor in one.state_dict().items() if "picked" in name)
            for one in (net, once, twice)]
    assert read[0] > read[1] > read[2]
    found = channels.differences(channels.silence(once, second), twice, second, images(net, 5))
    assert found["logits_differ_by"] <= 1e-10 and found["spikes_that_differ"] == 0


def test_an_emptied_block_in_the_record():
    """What is counted as kept is what is stored: a block that is its shortcut reads nothing."""
    net = lively()
    names, sizes = channels.layers(net)
    kept = torch.cat([keep for keep in random_kept(net, 0, empty=(1, 6)).values()])
    rescued, back = torch.zeros_like(kept), kept.clone()
    first = sum(sizes[:names.index("blocks.1.norm1")])
    rescued[first + int(kept[first:].nonzero()[0])] = True
    record = channels.choice_record(net, 0.4, Choice(kept, back, rescued))
    of_layer = {layer["name"]: layer for layer in record["layers"]}
    assert of_layer["blocks.1.norm1"]["kept"] == of_layer["blocks.1.norm1"]["rescued"] == []
    stored = sum(len(layer["kept"]) for layer in record["layers"])
    assert record["kept"] == record["regenerated"] == stored < int(kept.sum())
    assert record["rescued"] == 0 and record["reached"] == 1 - stored / len(kept)
    small = channels.remove(net, dict(zip(names, kept.split(sizes))))
    assert stored == sum(channels.layers(small)[1])


# ---- the choice of channels ----------------------------------------------------------------------


GAMMA = [.50, .11, .40, .12, .30, .60, .13, .20, .70, .14, .15, .80]  # three layers of 4
SCORES = [.10, .90, .20, .80, .30, .05, .70, .60, .40, .15, .50, .02]


def chosen(ratio, regen, gamma=GAMMA, scores=SCORES, may_be_empty=None, sizes=(4, 4, 4)):
    """Return the places that stay, came back, were rescued."""
    score = None if scores is None else torch.tensor(scores, dtype=torch.float64)
    choice = prune_structured.prune_and_regenerate_as_published(
        torch.tensor(gamma), score, list(sizes), ratio, regen, may_be_empty)
    return [row.nonzero().flatten().tolist() for row in choice]


def test_the_published_counts_of_channels_by_hand():
    # q = int(6) = 6, g = int(6 * 0.5) = 3: cut is all up to the tenth smallest, 0.60; three return
    assert chosen(0.5, 0.5) == [[1, 3, 6, 8, 11], [1, 3, 6], []]
    # q = int(7.8) = 7, g = int(5 * 0.39) = 1: up to the ninth smallest, 0.50; one returns
    assert chosen(0.65, 0.39) == [[1, 5, 8, 11], [1], []]
    # r = 0: q = 6; the seventh smallest, 0.30, goes as well
    assert chosen(0.5, 0, scores=None) == [[0, 2, 5, 8, 11], [], []]
    # all that equal the threshold, 0.60, go; they have low scores
    tied = [.60 if value in (.70, .80) else value for value in GAMMA]
    assert chosen(0.5, 0.5, tied) == [[1, 3, 6, 8], [1, 3, 6], [8]]
    # all that equal the third highest score among the cut return, and no survivor counts
    tied = [.70 if value in (.60, .30) else value for value in SCORES]
    tied[8] = tied[11] = .99
    assert chosen(0.5, 0.5, scores=tied) == [[1, 3, 4, 6, 7, 8, 11], [1, 3, 4, 6, 7], []]


def test_the_published_counts_at_the_edges():
    assert chosen(0, 0, scores=None) == [list(range(12)), [], []]  # the dense network
    assert chosen(0.08, 0.05) == [[0, 2, 3, *range(4, 12)], [], []]  # q = g = 0: the smallest goes
    assert chosen(0.08, 0.99) == [[*range(11)], [*range(11)], []]  # g = 11 of 12 that are cut
    # q = 11, g = 0: all go, and each layer that must not be empty keeps its largest
    assert chosen(0.95, 0.9) == [[0, 5, 11], [], [0, 5, 11]]
    assert chosen(0.95, 0.9, may_be_empty=[True, False, True]) == [[5], [], [5]]
    for ratio in np.linspace(0, 0.999, 12):
        for regen in (0, 0.01, 0.5, 0.999):
            for gamma in (GAMMA, [0.0] * 12, [1.0, 0.0] * 6):
                for score in (SCORES, [0.5] * 12):
                    kept, back, rescued = chosen(ratio, regen, gamma, score)
                    q = int(ratio * 12)
                    g = int((12 - q) * regen)
                    edge = sorted(gamma)[q + g]
                    cut = [i for i in range(12) if gamma[i] <= edge] if ratio > 0 else []
                    low = sorted((score[i] for i in cut), reverse=True)[:g]
                    came = [i for i in cut if low and score[i] >= low[-1]]
                    assert back == came
                    assert set(kept) == set(range(12)) - set(cut) | set(came) | set(rescued)
                    assert all(set(kept) & set(range(i, i + 4)) for i in (0, 4, 8))


# ---- batch normalisation of each time step -------------------------------------------------------


@pytest.mark.parametrize("kind", ["conv", "pick"])
def test_batch_normalisation_of_each_step_by_hand(kind):
    torch.manual_seed(0)
    layer = models.ConvBN(4, 3) if kind == "conv" else models.PickBN(4, 3)
    layer.double().bn_per_step = True
    torch.nn.init.uniform_(layer.bn.weight)
    x_seq = torch.randn(5, 2, 4, 6, 6, generator=rng(), dtype=torch.float64) * torch.arange(
        1, 6).view(-1, 1, 1, 1, 1)
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    expected = []
    for x in x_seq:
        x = F.conv2d(x, layer.conv.weight, padding=1) if kind == "conv" else x[:, :3]
        rows = x.transpose(0, 1).flatten(1)  # [C, N * H * W]
        mean, var = 0.9 * mean + 0.1 * rows.mean(1), 0.9 * var + 0.1 * rows.var(1)
        scaled = (x - rows.mean(1).view(-1, 1, 1)) / (
            rows.var(1, correction=0).view(-1, 1, 1) + 1e-5).sqrt()
        expected.append(scaled * layer.bn.weight.view(-1, 1, 1))
    assert torch.allclose(layer(x_seq), torch.stack(expected))
    assert torch.allclose(layer.bn.running_mean, mean)
    assert torch.allclose(layer.bn.running_var, var)
    assert layer.bn.num_batches_tracked == 5
    layer.eval()
    per_step = layer(x_seq)
    layer.bn_per_step = False
    assert torch.equal(per_step, layer(x_seq))  # one function in eval mode
    at_once = layer.train()(x_seq)
    assert not torch.allclose(at_once, torch.stack(expected)) and layer.bn.num_batches_tracked == 6


def test_batch_normalisation_sees_the_convolution_s_layout():
    """Of a single channel two layouts are possible, which round differently: the text's bits."""
    layer, strides = models.ConvBN(3, 1).to(memory_format=torch.channels_last), []
    x = torch.randn(8, 3, 6, 6).to(memory_format=torch.channels_last)
    with metrics.hooks({"": layer.conv}, after=lambda _, y: strides.append(y.stride())):
        with metrics.hooks({"": layer.bn}, before=lambda _, y: strides.append(y.stride())):
            layer(x.unflatten(0, (4, 2)))
    assert strides[0] == strides[1] == (36, 1, 6, 1)


@pytest.mark.parametrize("name", ["small-avg", "resnet19-pre"])
def test_batch_normalisation_of_each_step_in_a_network(name):
    nets = [lively(name, 0.1 if name == "small-avg" else 0.05, 16, bn_per_step=per_step)
            for per_step in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = images(nets[0], 4)
    with torch.no_grad():
        assert torch.equal(*[net(x) for net in nets])
        logits = [net.train()(x) for net in nets]
        assert not torch.allclose(*logits)
    tracked = [[int(m.num_batches_tracked) for m in net.modules()
                if isinstance(m, torch.nn.BatchNorm2d)] for net in nets]
    extra = [b - a for a, b in zip(*tracked)]
    assert extra[0] == 0 and set(extra[1:]) == {2}  # an image is seen once, spikes at 3 steps
    again = modelfile.unpack(modelfile.pack(nets[1]))
    assert again.config["bn_per_step"] and all(
        m.bn_per_step for m in again.modules() if isinstance(m, (models.ConvBN, models.PickBN)))
    small = channels.remove(nets[1], random_kept(nets[1], 0))
    assert small.config["bn_per_step"]


# ---- what a masked network can do without --------------------------------------------------------


def masked(seed, empty=None):
    """resnet19-pre with a random half of its weights; in each group some channels unread, some
    without input, of which some fire. Block `empty` has no way through its inner channels."""
    net, draw = lively(factor=0.08, seed=seed), rng(seed)
    masks = Masks(net)
    for mask in masks.alive.values():
        mask.copy_(torch.rand(mask.shape, generator=draw) < 0.5)
    for layer, group in models.removable(net).items():
        size = net.config["widths"][group.place]
        unread, unfed = (torch.rand(size, generator=draw) < 0.3 for _ in range(2))
        unread[0] = unfed[0] = False
        masks.alive[group.reader][:, unread] = False
        if group.weight is not None:
            masks.alive[group.weight][unfed] = False
            bn = net.get_submodule(group.bn)
            bn.running_mean[unfed] = 0
            bn.bias.data[unfed] = 1.6 * torch.rand(int(unfed.sum()), generator=draw).double()
    convs = [[masks.alive[f"blocks.{i}.{name}.weight"] for name in ("conv1.conv", "conv2")]
             for i in range(8)]
    for into, out_of in convs:  # what a block reads: inner channel 1 alone reads 1, and is not read
        into[:, 1] = out_of[:, 1] = False
        into[1, 1] = True
    if empty is not None:
        (into, out_of), bn = convs[empty], net.blocks[empty].conv1.bn
        if seed % 2:
            into[:, 0], out_of[:] = True, False  # none is read
        else:
            into[::2] = False  # silent,
            bn.bias.data.zero_()
            bn.running_mean.zero_()
            out_of[:, 1::2] = False  # or not read
    masks.apply(torch.optim.SGD(net.parameters(), 0.1))
    return net, masks


@pytest.mark.parametrize("seed, empty", [(0, None), (1, None), (2, 2), (3, 3), (4, 7)])
@torch.no_grad()
def test_a_masked_preactivation_resnet_without_what_it_does_not_need(seed, empty):
    net, masks = masked(seed, empty)
    x, groups = images(net, 6), models.removable(net)
    read, kept = compact.drop_unread(net, masks.alive), compact.needed(net, masks.alive)
    dense = sum(channels.layers(net)[1])
    counts = [sum(int(keep.sum()) for keep in found.values()) for found in (read, kept)]
    assert counts[1] < counts[0] < dense
    assert any((~masks.alive[group.weight].flatten(1).any(1) & kept[name]).any()
               for name, group in groups.items() if group.weight)  # by a constant that fires
    for name, group in groups.items():
        if group.weight is None:  # all that feeds the stream feeds them
            assert torch.equal(kept[name], read[name])
            assert name == "norm" or not read[name][1]
    small, text = compact.make(net, masks.alive)[::2]
    found = channels.differences(net, small, kept, x)
    assert found["logits_differ_by"] <= 1e-10 and found["spikes_that_differ"] == 0
    assert f"channels {dense} -> {sum(channels.layers(small)[1])}, MACs a step " in text
    assert [i for i, block in enumerate(small.blocks) if block.is_empty] == (
        [] if empty is None else [empty])
    _, alive = compact.without(net, masks.alive, kept)
    assert list(alive) == list(models.scored_by(small))
    for name, mask in alive.items():
        weight = small.get_parameter(name)
        assert mask.shape == weight.shape and torch.equal(mask, weight != 0)
    assert compact.make(small, alive)[0] is None  # no more to be found
    for mode in (True, False):  # the unread alone: in training too
        part, _ = compact.without(net.train(mode), masks.alive, read)
        found = channels.differences(net, part, read, x)
        assert found["logits_differ_by"] <= 1e-10 and found["spikes_that_differ"] == 0
    # one channel fewer, the liveliest of a block, is another function
    name, spikes = "blocks.0.conv1", {}
    with metrics.hooks({"": small.blocks[0].lif2}, after=spikes.__setitem__):
        small(x)
    fewer = kept | {name: kept[name].clone()}
    fewer[name][kept[name].nonzero()[spikes[""].sum((0, 1, 3, 4)).argmax()]] = False
    found = channels.differences(net.eval(), channels.remove(net, fewer), fewer, x)
    assert found["logits_differ_by"] > 1e-6 or found["spikes_that_differ"] > 0


# ---- what reads real numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("name, encoding, empty", [
    ("small-avg", "direct", ()), ("resnet19-pre", "direct", ()), ("resnet19-pre", "direct", (0, 4)),
    ("resnet19-pre", "events", ()), ("vgg16-avg", "direct", ()), ("resnet19", "direct", ())])
@torch.no_grad()
def test_layers_that_read_no_spikes_do_macs(name, encoding, empty):
    """Counted one by one: MACs of what reads other numbers than 0 and 1, as often as it runs;
    spikes that meet alive weights elsewhere. A first layer counts n events as n."""
    side = 32 if name == "vgg16-avg" else 16
    net = lively(name, 0.3 if name == "small-avg" else 0.06, side, time_steps=2)
    net = emptied(net, *empty) if empty else net
    net.encoding = encoding
    masks = Masks(net)
    for mask in masks.alive.values():
        mask.copy_(torch.rand(mask.shape, generator=rng(3)) < 0.7)
    masks.apply(torch.optim.SGD(net.parameters(), 0.1))
    x = images(net, 3)
    if encoding == "events":
        x = torch.poisson(torch.ones(2, 3, 2, side, side, dtype=torch.float64), rng(4))
    layers, inputs, places = metrics.prunable_layers(net), {}, {}
    with metrics.hooks(layers, before=inputs.__setitem__,
                       after=lambda n, y: places.update({n: y.shape[2:].numel()})):
        net(x)
    real = {n for n, seen in inputs.items() if not ((seen == 0) | (seen == 1)).all()}
    first = next(iter(layers))
    assert first in real
    assert net.reads_numbers == real - {first}
    if encoding == "events":
        real.remove(first)
    sops = {n: float((F.conv2d(seen, masks.alive[f"{n}.weight"].double(), None,
                               layers[n].stride, layers[n].padding) if seen.dim() == 4
                      else seen @ masks.alive[f"{n}.weight"].double().T).sum()) / 3
            for n, seen in inputs.items() if n not in real}
    weights = {n: int(masks.alive[f"{n}.weight"].count_nonzero()) for n in real}
    if first in real:
        weights[first] = layers[first].weight.numel()  # it counts whole
    macs = sum(weights[n] * places[n] * len(inputs[n]) / 3 for n in real)
    counts = metrics.count(net, [x[..., :2, :, :, :], x[..., 2:, :, :, :]], masks.alive)
    assert counts["layer_sops"] == pytest.approx(sops) and all(sops.values())
    assert counts["energy_mj"] == pytest.approx((4.6 * macs + 0.9 * sum(sops.values())) * 1e-9)


def test_the_energy_of_tiny_networks_by_hand():
    net = models.build("small-avg", 3, 1, 8, 4, [2, 3, 4, 5]).eval()
    for bn in (conv.bn for conv in net.convs):
        torch.nn.init.constant_(bn.bias, 9)  # each neuron fires at each step
    counts = metrics.count(net, [torch.zeros(1, 1, 8, 8)])
    # 8x8 once; behind a pooling 4x4, 2x2 and the output layer, at four steps
    macs = 9 * 2 * 64 + 4 * (9 * 2 * 3 * 16 + 9 * 3 * 4 * 4 + 5 * 3)
    # 2x2: each place meets 4 of the 9 taps
    assert counts["layer_sops"] == {"convs.3.conv": 4 * (4 * 4) * 4 * 5}
    assert counts["energy_mj"] == pytest.approx((4.6 * macs + 0.9 * 1280) * 1e-9)

    net = models.build("resnet19-pre", 3, 1, 4, 2, [1] * 26).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.bias, 9)
    counts = metrics.count(net, [torch.zeros(1, 1, 4, 4)])
    # stem at 4x4 and the first shortcut at 2x2 once; two shortcuts at 1x1 and the output layer
    macs = 9 * 16 + 4 + 2 * (1 + 1 + 3)
    # blocks 0, 1, 2 are 2x2, the others 1x1. A map of 4x4 that is halved meets (2 + 3)^2 taps in
    # rows and columns, 2x2 without stride 16, 2x2 halved 4, 1x1 one
    sops = 2 * (25 + 16 + 2 * 32 + 4 + 1 + 4 * 2)
    assert counts["sops"] == sops
    assert counts["energy_mj"] == pytest.approx((4.6 * macs + 0.9 * sops) * 1e-9)


# ---- the scripts ---------------------------------------------------------------------------------


SCRIPTS = dict(structured=prune_structured, unstructured=prune_unstructured)
RESNET = ["--model", "resnet19", "--width", "0.05", "--time-steps", "2"]
ALL = dict(
    structured=["neuron", "pooling", "bn", "count", "decay"],
    unstructured=["neuron", "pooling", "score", "classifier", "zero", "momentum", "ties", "cosine",
                  "loss"])


def run(script, monkeypatch, *given):
    """Run a script under --smoke on 60 random images: 4 steps an epoch, two epochs."""
    if not Path("mine.npz").exists():
        x, y = random_images(60, 8), np.arange(60) % 3
        np.savez("mine.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    monkeypatch.setattr(sys, "argv", [f"prune_{script}.py"])
    return SCRIPTS[script].main(["--dataset", "mine.npz", "--smoke", *map(str, given)])


def read_json(path):
    return json.loads(Path(path).read_text())


def stopped_and_resumed(script, monkeypatch, given, again):
    """Stop in fine-tuning, go on with the flags `again`: the run is that of the folder `whole`."""
    stop_after(6, monkeypatch, lambda *a: run(script, monkeypatch, *a), *given, "--run-dir", "r")
    run(script, monkeypatch, *again, "--resume", "--run-dir", "r")
    assert_same_run("whole", "r")
    assert read_json("r/config.json")["as_published"] == read_json(
        "whole/config.json")["as_published"]


def without_new_flags(folder):
    """Make a stopped run one of a version without these flags."""
    new = ("as_published", "decay_input", "strict")
    state = modelfile.read_tensors(f"{folder}/checkpoint.pt")
    state["flags"] = {flag: value for flag, value in state["flags"].items() if flag not in new}
    torch.save(state, f"{folder}/checkpoint.pt")
    config = {flag: value for flag, value in read_json(f"{folder}/config.json").items()
              if flag not in new}
    Path(folder, "config.json").write_text(json.dumps(config))


def test_a_run_that_is_older_than_the_flag_goes_on_as_the_text(monkeypatch, capsys):
    run("unstructured", monkeypatch, "--run-dir", "whole")
    stop_after(6, monkeypatch, lambda *a: run("unstructured", monkeypatch, *a), "--run-dir", "r")
    without_new_flags("r")
    with pytest.raises(SystemExit):  # it cannot become another reading under way
        run("unstructured", monkeypatch, "--as-published", "zero", "--resume", "--run-dir", "r")
    assert "it was made with as_published None, not ['zero']" in capsys.readouterr().err
    run("unstructured", monkeypatch, "--resume", "--run-dir", "r")
    ours, theirs = (modelfile.read(f"{name}/model.pt")["state_dict"] for name in ("r", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("model", ["small", "resnet19"])
def test_weights_as_published_and_a_resume(model, monkeypatch):
    given = [*(RESNET if model == "resnet19" else ()), "--as-published"]
    items = [item for item in published.ITEMS["unstructured"] if item in ALL["unstructured"]
             or (item, model) == ("network", "resnet19")]
    if model == "resnet19":
        items.remove("pooling")
    summary = run("unstructured", monkeypatch, *given, "--run-dir", "whole")
    config, net = read_json("whole/config.json"), models.load("whole/model.pt")
    assert summary["as_published"] == config["as_published"] == items
    assert read_json("whole/summary.json")["as_published"] == items
    assert (summary["model"], net.config["name"]) == (
        model, "small-avg" if model == "small" else "resnet19-pre")
    assert {(lif.surrogate, lif.v_threshold, lif.decay_input, lif.strict, lif.detach_reset)
            for lif in models.lifs(net).values()} == {("tanh", 0.5, False, True, False)}
    assert config["loss"] == "mean-ce" and not net.config["bn_per_step"]
    # one cosine over both stages, a step an epoch
    assert [row["lr"] for row in lines("whole", "metrics")] == pytest.approx([0.1, 0.05])
    state = torch.load("whole/checkpoint.pt", weights_only=True)["parts"]["optimizer"]["state"]
    masks = modelfile.read("whole/model.pt")["masks"]
    dead = [state[i]["momentum_buffer"][~masks[name]]
            for i, (name, _) in enumerate(net.named_parameters()) if name in masks]
    assert sum(int(part.count_nonzero()) for part in dead) > 100  # they go on collecting
    stopped_and_resumed("unstructured", monkeypatch, given, given if model == "small" else [])


def test_channels_as_published_and_a_resume(monkeypatch):
    summary = run("structured", monkeypatch, "--as-published", "--run-dir", "whole")
    config, net = read_json("whole/config.json"), models.load("whole/model.pt")
    assert summary["as_published"] == config["as_published"] == ALL["structured"]
    assert (net.config["name"], net.config["bn_per_step"]) == ("small-avg", True)
    assert not any(lif.detach_reset for lif in models.lifs(net).values())
    groups = torch.load("whole/checkpoint.pt", weights_only=True)["parts"]["optimizer"][
        "param_groups"]
    assert config["weight_decay"] == 0 and {group["weight_decay"] for group in groups} == {0}
    record = read_json("whole/channels.json")
    choice = chosen(0.5, 0.3, *[[value for layer in record["layers"] for value in layer[key]]
                                for key in ("gamma", "score")],
                    sizes=[layer["channels"] for layer in record["layers"]])
    assert [record[key] for key in ("kept", "regenerated", "rescued")] == [
        len(row) for row in choice]
    stopped_and_resumed("structured", monkeypatch, ["--as-published"], ["--as-published"])


def test_a_run_that_empties_a_block(monkeypatch):
    """Through the files: the record, gamma.npz, the summary; stopped after the cut, it goes on."""
    def choose(gamma, scores, sizes, ratio, regen, may_be_empty):
        assert may_be_empty == [False, True] * 8 + [False]
        kept = torch.ones(len(gamma), dtype=torch.bool)
        start = sum(sizes[:5])  # blocks.2.conv1
        kept[start:start + sizes[5]] = kept[0] = False
        return Choice(kept, torch.zeros_like(kept), torch.zeros_like(kept))

    monkeypatch.setattr(prune_structured, "prune_and_regenerate_as_published", choose)
    given = [*RESNET, "--as-published"]
    summary = run("structured", monkeypatch, *given, "--run-dir", "whole")
    assert summary["as_published"] == ["neuron", "bn", "count", "decay", "network"]
    alive = {layer["name"]: layer["alive"] for layer in summary["layers"]}
    assert alive["blocks.2.conv1.conv.weight"] == alive["blocks.2.conv2.weight"] == 0
    assert all(n for name, n in alive.items() if not name.startswith("blocks.2."))
    net, gamma = models.load("whole/model.pt"), np.load("whole/gamma.npz")
    assert net.blocks[2].is_empty and net.config["widths"] == summary["widths"]
    assert net.config["bn_per_step"] and [
        name for name, lif in models.lifs(net).items() if lif.detach_reset] == ["lif"]
    record = read_json("whole/channels.json")
    assert record["kept"] == sum(channels.layers(net)[1]) and record["spikes_that_differ"] == 0
    for layer in record["layers"]:
        assert gamma[layer["name"]].shape == (1, len(layer["kept"]))
    assert gamma["blocks.2.norm1"].size == gamma["blocks.2.conv1"].size == 0
    stopped_and_resumed("structured", monkeypatch, given, [])


def test_one_item_changes_its_own_place_alone(monkeypatch):
    """prune_unstructured: who calls which update, with which items and which score."""
    seen = []

    def watch(owner, name, note):
        function = getattr(owner, name)

        def watched(*arguments, **named):
            seen.append(note(*arguments))
            return function(*arguments, **named)

        monkeypatch.setattr(owner, name, watched)

    watch(prune_unstructured, "prune_and_regenerate", lambda *_: "text")
    watch(prune_unstructured, "prune_and_regenerate_as_published", lambda *a: sorted(a[-2]))
    watch(models, "recording", lambda net, record, by: (
        by if record is None else f"recorded by {by}"))
    for items, update in ((["score"], "text"), (["zero"], ["zero"]), (["cosine"], "text"),
                          (["score", "classifier"], ["classifier", "score"])):
        seen.clear()
        folder = "-".join(items)
        summary = run("unstructured", monkeypatch, "--as-published", *items, "--run-dir", folder,
                      "--epochs-finetune", "0")
        assert summary["as_published"] == items and summary["model"] == "small"
        assert models.load(f"{folder}/model.pt").config["name"] == "small"
        by = "value" if "score" in items else "derivative"
        assert seen == [by] * 3 + [f"recorded by {by}", update]


def test_names_of_runs():
    def name(script, *given):
        return SCRIPTS[script].parse_args(given).run_dir.removeprefix("runs/")

    assert name("unstructured", "--as-published") == (
        "fashion-mini-small-criticality-0.9-r0.5-published-seed0")
    assert name("unstructured", "--as-published", *ALL["unstructured"]) == name(
        "unstructured", "--as-published")
    assert name("unstructured", "--as-published", "zero", "cosine", "zero") == (
        "fashion-mini-small-criticality-0.9-r0.5-published-zero-cosine-seed0")
    assert name("unstructured", "--regen", "0", "--as-published", "loss", "--width", "0.5") == (
        "fashion-mini-small-gmp-0.9-published-loss-width0.5-seed0")
    assert name("structured", "--as-published", "--finetune-l1") == (
        "fashion-mini-small-structured-criticality-0.5-r0.3-l1-published-seed0")
    assert name("structured", "--as-published", "bn", "--model", "resnet19") == (
        "fashion-mini-resnet19-structured-criticality-0.512-r0.3-published-bn-seed0")


@pytest.mark.parametrize("script, given, items", [
    ("unstructured", "--dataset cifar100", [*ALL["unstructured"], "cutout"]),
    ("unstructured", "--dataset tiny-imagenet", ALL["unstructured"]),
    ("unstructured", "--model vgg16", ALL["unstructured"]),
    ("unstructured", "--model vgg16-avg", [i for i in ALL["unstructured"] if i != "pooling"]),
    ("structured", "--dataset cifar100", [*ALL["structured"], "normalisation"]),
    ("structured", "--dataset cifar10", ALL["structured"]),
    ("structured", "--dataset cifar100 --model resnet19",
     ["neuron", "bn", "count", "decay", "network", "normalisation"])])
def test_all_items_that_fit(script, given, items):
    args = SCRIPTS[script].parse_args([*given.split(), "--as-published"])
    assert args.as_published == items
    if "cutout" in items:
        assert args.cutout == 16
    elif script == "unstructured":
        assert args.cutout == 0


@pytest.mark.parametrize("script, given, words", [
    ("structured", "network", "--as-published network does nothing with --model small, expected "
                              "one of resnet19. Leave it out"),
    ("structured", "pooling --model resnet19", "does nothing with --model resnet19, expected one "
                                               "of vgg16, small"),
    ("structured", "normalisation --dataset cifar10", "--dataset cifar10, expected cifar100"),
    ("structured", "normalisation --dataset cifar100 --encoding rate", "does nothing with"),
    ("structured", "cutout", "invalid choice: 'cutout'"),
    ("structured", "all", "invalid choice: 'all'"),
    ("structured", "decay --weight-decay 1e-4", "--weight-decay is 0.0001, but --as-published "
                                                "decay sets it to 0.0"),
    ("structured", "neuron --detach-reset", "--detach-reset is True, but --as-published neuron"),
    ("structured", "--weight-decay 1e-4", "but --as-published decay sets it to 0.0"),
    ("structured", "count --regen-base pruned", "--regen-base is pruned, which --as-published "
                                                "count does not use"),
    ("unstructured", "network --model vgg16", "expected one of resnet19"),
    ("unstructured", "pooling --model small-avg", "expected one of vgg16, small"),
    ("unstructured", "cutout --dataset n-mnist", "--as-published cutout does nothing with events"),
    ("unstructured", "cutout --cutout 8", "--cutout is 8, but --as-published cutout sets it to 16"),
    ("unstructured", "neuron --threshold 1", "--threshold is 1.0, but --as-published neuron sets "
                                             "it to 0.5"),
    ("unstructured", "--loss ce", "--loss is ce, but --as-published loss sets it to mean-ce"),
    ("unstructured", "score --regen 0", "--as-published score does nothing with --regen 0. Leave"),
    ("unstructured", "zero --regen 0", "--as-published zero does nothing with --regen 0"),
    ("unstructured", "loss momentum --regen 0", "--as-published momentum does nothing with"),
    ("unstructured", "classifier --regen 0", "--as-published classifier does nothing with"),
    ("unstructured", "ties --sparsity 0", "--as-published ties does nothing with --sparsity 0"),
    ("unstructured", "score --sparsity 0", "--as-published score does nothing with --sparsity 0"),
    ("unstructured", "score --metric random", "--as-published score does nothing with --metric"),
    ("structured", "count --prune-ratio 0", "--as-published count does nothing with --prune-ratio"),
    ("unstructured", "bn", "invalid choice: 'bn'")])
def test_items_that_do_nothing_or_contradict_a_flag(script, given, words, capsys):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].parse_args(["--as-published", *given.split()])
    assert stop.value.code == 2 and words in one_line(capsys)


@pytest.mark.parametrize("given", ["", "--regen 0", "--sparsity 0", "--metric random"])
def test_the_whole_is_one_name_for_runs_that_are_compared(given):
    """Without a name all items that fit are taken, so that GMP as published is comparable to
    criticality as published; and a resumed run, which names them all, is as it was."""
    args = SCRIPTS["unstructured"].parse_args(["--as-published", *given.split()])
    assert {"score", "zero", "ties"} <= set(args.as_published)
    again = SCRIPTS["unstructured"].parse_args(["--as-published", *args.as_published,
                                                *given.split()])
    assert vars(again) == vars(args)
    for item in ("ties", "cosine"):  # they do something to GMP
        if given != "--sparsity 0" or item == "cosine":
            SCRIPTS["unstructured"].parse_args(["--as-published", item, *given.split()])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_goes_on_with_its_own_items(script, capsys):
    def parse(*given):
        return SCRIPTS[script].parse_args(given)

    for folder, given in (("text", []), ("one", ["--as-published", "neuron"]),
                          ("all", ["--as-published"])):
        Path(folder).mkdir()
        config = vars(parse("--run-dir", folder, *given))
        del config["resume"], config["overwrite"]
        Path(folder, "config.json").write_text(json.dumps(config))
    for folder, given, made_with in (
            ("text", "--as-published", "--as-published []"),
            ("text", "--as-published neuron", "--as-published []"),
            ("one", "--as-published", "--as-published ['neuron']"),
            ("one", "--as-published neuron pooling", "--as-published ['neuron']"),
            ("one", "--detach-reset", "--detach-reset False"),
            ("all", "--as-published neuron", "--as-published ['neuron', 'pooling', ")):
        with pytest.raises(SystemExit) as stop:
            parse("--resume", "--run-dir", folder, *given.split())
        assert stop.value.code == 2 and f"{folder} was made with {made_with}" in one_line(capsys)
    for folder, items, givens in (
            ("text", [], [""]), ("all", ALL[script], ["", "--as-published"]),
            ("one", ["neuron"], ["", "--as-published neuron", "--no-detach-reset"])):
        for given in givens:
            args = parse("--resume", "--run-dir", folder, *given.split())
            assert args.as_published == items
            assert args.detach_reset is (False if items else None)
    for wrong in ("neuron", 5, [["neuron"]], ["nonsense"]):
        Path("all/config.json").write_text(json.dumps(config | dict(as_published=wrong)))
        with pytest.raises(SystemExit) as stop:
            parse("--resume", "--run-dir", "all")
        assert stop.value.code == 2
        assert "config.json: as_published is" in one_line(capsys)


def test_cifar_100_normalised_as_cifar_10():
    Path("data").mkdir()
    x, y = random_images(200, 32), np.arange(200) % 100
    np.savez("data/cifar100.npz", x_train=x, y_train=y, x_test=x[:100], y_test=y[:100])
    found = []
    for items in ([], ["--as-published", "normalisation"]):
        args = prune_structured.parse_args(["--dataset", "cifar100", "--width", "0.05", *items])
        net = setup.build(args, data.load("cifar100"))
        found.append((net.mean.tolist(), net.std.tolist()))
    assert found[1] == (pytest.approx([0.4914, 0.4822, 0.4465]),
                        pytest.approx([0.2023, 0.1994, 0.2010]))
    assert found[0][0] != pytest.approx(found[1][0], abs=1e-3)
