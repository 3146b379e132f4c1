"""The other papers' networks and neurons against their formulas, encodings, counts, and presets."""
import importlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import channels
import compact
import compare
import data
import metrics
import modelfile
import models
import neurons
import plans
import prune_gradr
import prune_pq
import prune_sdsnn
import prune_structured
import prune_unstructured
from harness import presets, records
import training
from helpers import assert_same_run, let_fire, lines, one_line, stop_after
from masks import Masks, momenta
from kernels import FastLIF
from neurons import LIF

NEW = [name for name in models.NAMES if name not in ("vgg16", "resnet19", "small")]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(name, size=16, in_channels=2, factor=0.05, classes=3, time_steps=3, **more):
    """A narrow network, whose neurons fire."""
    torch.manual_seed(0)
    net = models.build(name, classes, in_channels, size, time_steps,
                       plans.default_widths(name, factor), **more)
    let_fire(net)
    with torch.no_grad():
        for layer in (*getattr(net, "hidden", ()), *([net.fc] if hasattr(net, "fc") else ())):
            layer.weight.abs_()
    return net


# ---- neurons -------------------------------------------------------------------------------------


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, strict, derivative):
        ctx.save_for_backward(u)
        ctx.derivative = derivative
        return (u > 0 if strict else u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.derivative(*ctx.saved_tensors), None, None


def by_hand(x_seq, tau, threshold, v_reset, derivative, soft, decay_input, strict):
    """The plain loop, differentiated by autograd; tau: a number or a tensor."""
    v, spikes = torch.full_like(x_seq[0], v_reset), []
    for x in x_seq:
        h = v - (v - v_reset) / tau + (x / tau if decay_input else x)
        s = Step.apply(h - threshold, strict, derivative)
        spikes.append(s)
        kept = s.detach()  # the reset is detached
        v = h - threshold * kept if soft else h * (1 - kept) + v_reset * kept
    return torch.stack(spikes)


def arctan(u):
    return 1 / (1 + (math.pi * u) ** 2)


def rectangle(u):
    return (u.abs() < 0.5).to(u.dtype)


@pytest.mark.parametrize("surrogate, derivative", [("arctan", arctan), ("rectangular", rectangle)])
@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("learn_tau", [True, False])
@pytest.mark.parametrize("v_reset", [0.0, -0.25])
def test_other_neurons_are_their_formulas(surrogate, derivative, reset, decay_input, learn_tau,
                                          v_reset):
    x = (torch.randn(7, 2, 3, 4, 5, generator=generator()).double() * 2).requires_grad_()
    g = torch.randn(7, 2, 3, 4, 5, generator=generator(1)).double()
    lif = LIF(1.6, 0.75, v_reset, surrogate=surrogate, reset=reset, decay_input=decay_input,
              strict=True, learn_tau=learn_tau).double()
    spikes = lif(x)
    (spikes * g).sum().backward()
    got, x.grad = x.grad, None
    w, tau = None, 1.6
    if learn_tau:
        assert lif.w.sigmoid().item() == pytest.approx(1 / 1.6)
        w = lif.w.detach().clone().requires_grad_()
        tau = 1 / w.sigmoid()
    want = by_hand(x, tau, 0.75, v_reset, derivative, reset == "soft", decay_input, True)
    (want * g).sum().backward()
    assert torch.equal(spikes, want) and 0.05 < spikes.mean() < 0.9
    assert torch.allclose(got, x.grad, atol=1e-10) and got.count_nonzero() > 100
    if learn_tau:
        assert lif.w.grad.item() == pytest.approx(w.grad.item(), rel=1e-6, abs=1e-6)
    else:
        assert not list(lif.parameters())


def test_sd_snn_by_hand():
    """h = 0.2 v (1 - s) + x, a spike where h > 0.5."""
    lif = LIF(**plans.NETWORKS["sdsnn-small"].neuron).double()
    x = torch.tensor([0.5, 0.4, 0.1, 0.6, 0.3]).double().view(5, 1, 1)
    # h: .5 (not above), .5 (0.1 + 0.4: not above, up to rounding), .2, .64 (fires), .3
    assert lif(x).flatten().tolist()[2:] == [0, 1, 0] and lif(x[:1]).item() == 0
    assert LIF(1.25, 0.5, decay_input=False)(x[:1]).item() == 1  # not strict: on the threshold
    assert neurons.surrogate_grad(torch.tensor([-0.5, -0.49, 0, 0.49, 0.5]), 2.0,
                                  "rectangular").tolist() == [0, 1, 1, 1, 0]


def mem_update(x_seq):
    """The update of SD-SNN's code, under autograd: the gradient flows through (1 - spike)."""
    mem = spike = torch.zeros_like(x_seq[0])
    spikes = []
    for x in x_seq:
        mem = 0.2 * mem * (1 - spike) + x
        near = (mem - 0.5).abs() < 0.5
        spike = (mem > 0.5).double().detach() + (mem - mem.detach()) * near
        spikes.append(spike)
    return torch.stack(spikes)


def gradients_of(forward, x):
    leaf = x.clone().requires_grad_()
    spikes = forward(leaf)
    (spikes * torch.cos(torch.arange(spikes.numel()).double()).view(x.shape)).sum().backward()
    return spikes.detach(), leaf.grad


def test_the_reset_of_sd_snn_passes_the_gradient():
    x = torch.rand(20, 6, 9, generator=generator()).double() * 1.2
    spikes, want = gradients_of(mem_update, x)
    assert 0.2 < spikes.mean() < 0.8
    for name, lif in models.lifs(models.build("sdsnn-small", 3, 1, 8, 2)).items():
        got = gradients_of(lif.double(), x)
        assert torch.equal(got[0], spikes) and torch.allclose(got[1], want, atol=1e-12), name
    detached = models.build("sdsnn-small", 3, 1, 8, 2, neuron=dict(detach_reset=True))
    got = gradients_of(detached.lifs[0].double(), x)  # --detach-reset
    assert torch.equal(got[0], spikes) and not torch.allclose(got[1], want, rtol=0.01)


def test_the_neurons_of_sdsnn_large():
    """PLIF with threshold 1 behind convolutions, LIF with 0.5 behind linear layers, all of them
    strictly above it."""
    net = small("sdsnn-large", 8, 3)
    convs, linear = list(net.lifs)[:6], [net.lifs[6], net.lif_out]
    for lif in convs:
        assert lif.learn_tau and lif.v_threshold == 1 and lif.w.sigmoid().item() == 0.5
    for lif in linear:
        assert not lif.learn_tau and lif.v_threshold == 0.5 and lif.tau == 2
    for lif, threshold in [*((lif, 1.0) for lif in convs), *((lif, 0.5) for lif in linear)]:
        x = torch.tensor([2.0, 0, 0, 2.0, 2.1]).view(5, 1, 1) * threshold
        # h, in thresholds: 1 (on it), .5, .25, 1.125 (fires), 1.05 (fires)
        assert lif(x).flatten().tolist() == [0, 0, 0, 1, 1]
    other = small("sdsnn-large", 8, 3, neuron=dict(v_threshold=0.7, tau=3.0))  # of all layers
    found = {name: lif.v_threshold for name, lif in models.lifs(other).items()}
    assert len(found) == 8 and set(found.values()) == {0.7}
    assert other.lif_out.tau == 3 and not other.lif_out.learn_tau and other.lifs[0].learn_tau


@pytest.mark.parametrize("given", [None, dict(v_threshold=0.7), dict(tau=3.0, alpha=1.0)])
def test_a_network_with_two_neurons_goes_through_a_file(given, tmp_path):
    net = small("sdsnn-large", 8, 3, neuron=given)
    again = models.build(**net.config)
    assert again.config == net.config
    torch.save(modelfile.pack(net), tmp_path / "model.pt")
    loaded = models.load(tmp_path / "model.pt")
    assert loaded.config == net.config
    for one, other, third in zip(*(models.lifs(n).values() for n in (net, again, loaded))):
        assert repr(one) == repr(other) == repr(third)


@pytest.mark.parametrize("name, was", [
    ("sdsnn-small", dict(tau=1.25, v_threshold=0.5, surrogate="rectangular", decay_input=False,
                         strict=True)),
    ("sdsnn-large", dict(tau=2.0, v_threshold=0.5, learn_tau=True))])
def test_a_file_older_than_a_neuron_keeps_its_own(name, was, monkeypatch):
    """As it was trained: its reset was detached, its PLIF everywhere, on the threshold it fires."""
    row = plans.NETWORKS[name]._replace(neuron=was, linear_neuron={})
    with monkeypatch.context() as patch:
        patch.setitem(plans.NETWORKS, name, row)
        net = small(name, 16, 2, time_steps=5)
        packed = modelfile.pack(net)
    assert packed["neuron"] == was
    loaded = modelfile.unpack(packed)
    for one, other in zip(*(models.lifs(n).values() for n in (net, loaded)), strict=True):
        assert repr(one) == repr(other)
        assert other.detach_reset and other.strict == was.get("strict", False)
    x = torch.rand(3, 2, 16, 16) * 5
    assert torch.equal(net.eval()(x), loaded(x))


def test_the_soft_reset_by_hand():
    lif = LIF(2.0, reset="soft").double()
    x = torch.tensor([3.0, 0.0, 0.0]).double().view(3, 1, 1)  # h: 1.5, 0.25, 0.125
    assert lif(x).flatten().tolist() == [1, 0, 0]
    x[0] = 8  # h: 4, v 3; 1.5, v 0.5; 0.25
    assert lif(x).flatten().tolist() == [1, 1, 0]


def test_the_usual_neuron_takes_the_usual_path(monkeypatch):
    usual, other = FastLIF(), FastLIF(tau=2.0, v_threshold=0.5, alpha=3.0)
    monkeypatch.setattr(LIF, "forward", lambda *_: pytest.fail("the slow path"))
    usual(torch.rand(3, 2, 4))
    other(torch.rand(3, 2, 4))


@pytest.mark.parametrize("wrong", [dict(surrogate="tent"), dict(reset="none"),
                                   dict(tau=1.0, learn_tau=True)])
def test_wrong_neurons(wrong):
    with pytest.raises(ValueError, match="expected"):
        LIF(**wrong)


@pytest.mark.parametrize("name", ["resnet19", "resnet19-pre"])
def test_neurons_behind_linear_layers_are_no_others_in_a_resnet(name):
    with pytest.raises(ValueError, match="neuron has the key linear.*expected.*Leave it out"):
        models.build(name, 3, 1, 16, 2, neuron={"linear": dict(v_threshold=0.5)})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_other_neurons_keep_the_memory_format(layout):
    maps = torch.randn(2, 3, 4, 5, generator=generator()).to(memory_format=layout)
    lif = LIF(surrogate="rectangular", reset="soft")
    once = lif(maps.expand(4, *maps.shape))
    assert torch.equal(once, lif(maps.expand(4, *maps.shape).contiguous()))
    assert once[0].is_contiguous(memory_format=layout)
    assert lif(maps.expand(4, *maps.shape).bfloat16()).dtype == torch.bfloat16


def test_criticality_of_a_rectangular_surrogate():
    """The share of the steps at which a neuron is near its threshold."""
    lif = LIF(1.25, 0.5, surrogate="rectangular", decay_input=False)
    lif.start_recording("max")
    x = torch.tensor([[0.3, 2.0], [0.0, 2.0]]).view(2, 1, 2)  # h: .3, .06 | 2, 2
    lif(x)
    assert lif.stop_recording().tolist() == [1.0, 0.0]  # |.3 - .5| and |.06 - .5| are below .5


def test_a_network_under_compile_equals_eager(monkeypatch):
    """Of two layers: a layer takes seconds to compile, and all but the first are alike."""
    monkeypatch.setitem(plans.NETWORKS, "small", plans.NETWORKS["small"]._replace(
        layers=[16, "P", 32, "P"]))
    net = models.build("small", 4, 1, 8, 3, widths=[3, 4]).double()
    x, y = torch.randn(6, 1, 8, 8, generator=generator()).double(), torch.arange(6) % 4
    results = []
    for forward in (net, torch.compile(net, fullgraph=True)):
        net.zero_grad()
        with models.recording(net, "max") as scores:
            logits = forward(x)
        training.loss_over_time(logits, y).backward()
        results.append([p.grad.clone() for p in net.parameters()] + [*scores.values()])
        assert len(scores) == 2
    for eager, compiled in zip(*results):
        assert torch.allclose(eager, compiled, atol=1e-6)


def test_macs_that_were_counted_are_not_those_of_another_plan(monkeypatch):
    config = models.build("small", 4, 1, 8, 3, widths=[3, 4, 5, 4]).config
    first = metrics.macs(config)
    assert first == metrics.macs(config | dict(encoding="rate"))
    metrics.macs(config).clear()
    assert metrics.macs(config) == first
    assert metrics.macs(config, 2)["convs.1.conv"] == 2 * first["convs.1.conv"]
    monkeypatch.setitem(plans.NETWORKS, "small", plans.NETWORKS["small"]._replace(
        layers=[16, 32, "P", 64, 64, "P"]))
    assert metrics.macs(config)["convs.1.conv"] == 4 * first["convs.1.conv"]


# ---- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, channels_in, size, sizes, total", [
    ("sdsnn-small", 1, 28, [135, 5400, 588_000, 3000], 596_535 + 15 + 40 + 300 + 10),
    ("sdsnn-large", 3, 32, [3456, 147_456, 294_912, 589_824, 1_179_648, 2_359_296,
                            32_768 * 512, 5120], None),
    ("gradr-linear", 1, 28, [784 * 800, 8000], 635_200),
    ("gradr-conv", 3, 32, [6912, *[589_824] * 5, 33_554_432, 204_800], 36_718_336),
    ("vggsnn", 2, 48, [1152, 73_728, 294_912, 589_824, 1_179_648, 2_359_296, 2_359_296, 2_359_296,
                       512 * 9 * 10], None)])
def test_the_published_counts(name, channels_in, size, sizes, total):
    with torch.device("meta"):
        net = models.build(name, 10, channels_in, size, 4)
    assert [net.get_parameter(weight).numel() for weight in models.scored_by(net)] == sizes
    assert list(models.scored_by(net)) == [n for n, p in net.named_parameters() if p.dim() > 1]
    if total:
        assert sum(p.numel() for p in net.parameters()) == total
    if name == "gradr-conv":
        assert sum(sizes) == 36_715_264
    taus = [n for n, p in net.named_parameters() if p.dim() == 0]
    assert len(taus) == (6 if name == "sdsnn-large" else 0)  # a tau of each convolution's neurons


def test_sd_snn_on_gestures_has_the_published_layer():
    with torch.device("meta"):
        net = models.build("sdsnn-small", 11, 2, 128, 64, encoding="events")
    assert net.hidden[0].weight.shape == (300, 40_960)


def test_a_new_network_is_one_row(monkeypatch):
    plan = plans.Plan([4, "P", 6, "A", "F", 5], norm=False, votes=2, pad_to=4, neuron=dict(tau=3.0))
    monkeypatch.setitem(plans.NETWORKS, "own", plan)
    assert plans.default_widths("own", 0.5) == [2, 3, 2]
    net = models.build("own", 3, 1, 10, 2)
    assert net(torch.rand(5, 1, 10, 10)).shape == (2, 5, 3)
    shapes = [list(net.get_parameter(name).shape) for name in models.scored_by(net)]
    assert shapes == [[4, 1, 3, 3], [6, 4, 3, 3], [5, 54], [6, 5]]
    assert {lif.tau for lif in models.lifs(net).values()} == {3.0}
    # 12x12 after padding, then 6x6
    assert list(metrics.macs(net.config).values()) == [36 * 144, 216 * 36, 270, 30]


@pytest.mark.parametrize("name", NEW)
def test_shapes_and_round_trip(name, tmp_path):
    net = small(name, 16, encoding="events", neuron=dict(reset="soft"))
    masks = Masks(net)
    masks.prune(masks.total // 2, masks.magnitudes(), generator())
    masks.rescue_empty_layers()
    masks.apply(torch.optim.SGD(net.parameters(), 0.1))
    torch.save(modelfile.pack(net, masks.alive), tmp_path / "model.pt")
    x = torch.poisson(torch.full((3, 4, 2, 16, 16), 2.0)).to(torch.uint8)
    loaded = models.load(tmp_path / "model.pt")
    out = net.eval()(x)
    assert out.shape == (3, 4, 3) and torch.equal(out, loaded(x)) and out.any()
    assert loaded.config == net.config and loaded.config["neuron"]["reset"] == "soft"
    assert torch.equal(out[:2], net(x[:2]))
    net.time_steps = 2  # the first steps, as an early-time ticket is searched for with
    assert torch.equal(net(x), out[:2])
    old = {k: v for k, v in modelfile.pack(models.build("small", 3, 1, 8, 2)).items()
           if k not in ("encoding", "neuron")}
    assert modelfile.unpack(old).encoding == "direct"  # files of before there were others


def test_votes_by_hand():
    """Each class is the mean of 10 neighbouring outputs."""
    net = small("gradr-conv", 8, classes=2, time_steps=1).eval()
    fired = torch.zeros(1, 1, 20)
    fired[..., [0, 3, 9, 10]] = 1
    net.lif_out.forward = lambda current: fired
    assert net(torch.rand(1, 2, 8, 8)).flatten().tolist() == pytest.approx([0.3, 0.1])
    assert net.fc.out_features == 20 and net.fc.bias is None


def test_dropout_has_one_mask_for_all_steps():
    net = small("gradr-conv", 8, time_steps=4)
    net.train()
    seen = {}
    with metrics.hooks({"": net.hidden[0]}, before=seen.__setitem__):
        net(torch.rand(2, 2, 8, 8, generator=generator()) * 5)
        dropped = seen[""].unflatten(0, (4, 2))
        assert set(dropped.unique().tolist()) == {0.0, 2.0}  # spikes, twice as large
        net.eval()(torch.rand(2, 2, 8, 8, generator=generator()) * 5)
        assert set(seen[""].unique().tolist()) == {0.0, 1.0}
    # with a spike at each step everywhere, what is silent is silent for all T
    net.train()
    for lif in net.lifs:
        lif.v_threshold = -1e9
    with metrics.hooks({"": net.hidden[0]}, before=seen.__setitem__):
        net(torch.rand(2, 2, 8, 8))
    kept = seen[""].unflatten(0, (4, 2)) > 0
    assert (kept == kept[:1]).all() and 0.3 < kept.double().mean() < 0.7
    assert not torch.equal(kept[0, 0], kept[0, 1])


# ---- encodings and losses ------------------------------------------------------------------------


def test_rate_coding_has_the_mean_of_the_pixels_and_a_seed():
    net = small("sdsnn-small", 8, 1, encoding="rate", time_steps=2000)
    pixels = torch.tensor([0, 51, 128, 255], dtype=torch.uint8).view(1, 1, 2, 2).repeat(1, 1, 4, 4)
    spikes = net.eval()._spikes(pixels)
    assert spikes.shape == (2000, 1, 1, 8, 8) and set(spikes.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(spikes.mean(0), pixels / 255, atol=0.05)
    assert (spikes.mean(0)[pixels == 0] == 0).all() and (spikes.mean(0)[pixels == 255] == 1).all()
    assert torch.allclose(spikes.mean(), (pixels / 255).mean(), atol=0.005)
    assert torch.equal(spikes, net._spikes(pixels))  # a prediction is always the same
    several = torch.cat([255 - pixels, pixels])  # and depends on nothing beside it
    assert torch.equal(spikes, net._spikes(several)[:, 1:])
    net.train()
    torch.manual_seed(3)
    one, other = net._spikes(pixels), net._spikes(pixels)
    torch.manual_seed(3)
    assert torch.equal(one, net._spikes(pixels)) and not torch.equal(one, other)
    seen = {}
    with metrics.hooks({"": net.convs[0].conv}, before=seen.__setitem__):
        net.eval()(pixels)
    assert torch.equal(seen[""], spikes.flatten(0, 1))  # that is what the network sees


def test_counts_of_events_come_as_they_are():
    net = small("vggsnn", 16, encoding="events")
    net.set_normalisation([0.3, 0.3], [0.1, 0.1])  # which counts have no use for
    frames = torch.randint(0, 9, (3, 2, 2, 16, 16), dtype=torch.uint8)
    seen = {}
    with metrics.hooks({"": net.convs[0].conv}, before=seen.__setitem__):
        net.eval()(frames)
    assert torch.equal(seen[""].unflatten(0, (3, 2)), frames.float())


def test_the_squared_distance_of_the_rate_by_hand():
    spikes = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 0.0]], [[1.0, 0.0]]])  # [T, 1, K]
    loss = training.loss_over_time(spikes, torch.tensor([0]), "mse")
    assert loss.item() == pytest.approx(((0.75 - 1) ** 2 + 0.25**2) / 2)


# ---- counting, masks, channels -------------------------------------------------------------------


def sops_by_brute_force(net, images, alive):
    """Each input of a layer that is not 0, times the alive weights that it meets, one by one."""
    layers = {name.removesuffix(".weight"): net.get_submodule(name.removesuffix(".weight"))
              for name in models.scored_by(net)}
    seen, total = {}, 0.0
    with metrics.hooks(layers, before=seen.__setitem__):
        net(images)
    n = images.shape[-4]
    for i, (name, x) in enumerate(seen.items()):
        if (i == 0 and net.encoding == "direct") or name in net.reads_numbers:
            continue
        module, mask = layers[name], alive[f"{name}.weight"].double()
        x = x.double()
        assert torch.equal(x, x.round()), name  # whole spikes
        out = (F.linear(x, mask) if x.dim() == 2 else
               F.conv2d(x, mask, None, module.stride, module.padding))
        total += out.sum().item() / n
    return total


@pytest.mark.parametrize("size", [16, 31, 48])
@pytest.mark.parametrize("name", models.NAMES)
def test_macs_are_weights_times_output_positions(name, size):
    """The FLOPs that torch counts against the formula: each weight works at each position."""
    net = small(name, size, factor=0.1).to("meta")
    positions = {}
    with metrics.hooks(metrics.prunable_layers(net),
                       after=lambda layer, y: positions.update({layer: y.shape[2:].numel()})):
        net(torch.zeros(1, 2, size, size, device="meta"))
    want = {layer: net.get_parameter(f"{layer}.weight").numel() * count
            for layer, count in positions.items()}
    assert metrics.macs(net.config) == want and len(want) == len(models.scored_by(net))


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("encoding", plans.ENCODINGS)
def test_synaptic_operations(name, encoding):
    net = small(name, 16, encoding=encoding).eval()
    masks = Masks(net)
    masks.prune(masks.total // 2, masks.magnitudes(), generator())
    masks.apply(torch.optim.SGD(net.parameters(), 0.1))
    images = (torch.randint(0, 4, (3, 4, 2, 16, 16), dtype=torch.uint8) if encoding == "events"
              else torch.randint(0, 256, (4, 2, 16, 16), dtype=torch.uint8))
    counts = metrics.count(net, [images], masks.alive)
    want = sops_by_brute_force(net, images, masks.alive)
    assert counts["sops"] == pytest.approx(want) and want > 0
    macs = metrics.macs(net.config)
    times = dict.fromkeys(net.reads_numbers, 3)  # T; an image that does not change is seen once
    if encoding == "direct":
        times |= dict.fromkeys({next(iter(macs)), "blocks.0.shortcut"} & macs.keys(), 1)
    # the first layer counts whole, the others by their alive weights
    share = {layer: float(masks.alive[f"{layer}.weight"].double().mean()) for layer in times}
    share[next(iter(macs))] = 1
    energy = 0.9 * counts["sops"] + 4.6 * sum(macs[layer] * n * share[layer]
                                              for layer, n in times.items())
    assert counts["energy_mj"] == pytest.approx(energy * 1e-9)
    assert (counts["macs_first_once"] == counts["macs_every_step"]) == (encoding != "direct")
    assert list(counts["layer_sops"]) == [layer for layer in macs if layer not in times]
    reads = [lif for lif in models.lifs(net)]
    assert reads == list(counts["firing_rates"])


@pytest.mark.parametrize("name", NEW)
def test_criticality_of_every_weight(name):
    net = small(name, 16, encoding="rate")
    masks = Masks(net)
    with models.recording(net, "max") as scores:
        net(torch.randint(0, 256, (4, 2, 16, 16), dtype=torch.uint8))
    spread = masks.spread(scores)
    assert spread.shape == (masks.total,) and spread.isfinite().all()
    last = dict(zip(masks.weights, spread.split(masks.sizes)))["fc.weight"]
    if getattr(net, "lif_out", None) is not None:  # the neuron that it feeds, and not the one that it reads
        want = scores["lif_out"].float()[:, None].expand(net.fc.weight.shape)
        assert torch.equal(last.view(net.fc.weight.shape), want)


@pytest.mark.parametrize("name", ["vggsnn", "sdsnn-large", "gradr-conv"])
def test_channels_are_removed_exactly(name):
    net = small(name, 16, factor=0.04, encoding="events").double()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.3, 2)
            torch.nn.init.uniform_(module.bias, -0.2, 1)
    names, sizes = channels.layers(net)
    assert names == [f"convs.{i}" for i in range(len(net.convs))]
    kept = {n: torch.rand(size, generator=generator(i)) < 0.6 for i, (n, size) in enumerate(
        zip(names, sizes))}
    for keep in kept.values():
        keep[0] = True
    masked, tiny = channels.silence(net, kept).eval(), channels.remove(net, kept).eval()
    frames = torch.randint(0, 3, (3, 4, 2, 16, 16)).double()
    found = channels.differences(masked, tiny, kept, frames)
    assert found["spikes_that_differ"] == 0 and found["logits_differ_by"] < 1e-10
    assert sum(p.numel() for p in tiny.parameters()) < sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", ["vggsnn", "sdsnn-small", "sdsnn-large", "gradr-conv"])
def test_channels_that_change_nothing_are_left_out_exactly(name):
    """Unread ones, and ones without input that stay silent: whether they do is the neuron's own."""
    net = small(name, 16, factor=0.5 if name == "sdsnn-small" else 0.1, time_steps=30).eval()
    masks, draw = Masks(net), generator(1)
    for i, (layer, group) in enumerate(models.removable(net).items()):
        conv, size = net.get_submodule(layer).conv, net.config["widths"][group.place]
        masks.alive[f"{layer}.conv.weight"][torch.arange(size) % 3 == 1] = False
        masks.alive[group.reader].unflatten(1, (size, -1))[:, torch.arange(size) % 4 == 2] = False
        currents = torch.rand(size, generator=draw) * 1.2  # some fire, some do not
        bias = conv.bias if conv.bias is not None else net.get_submodule(layer).bn.bias
        bias.data.copy_(currents)
    masks.apply(torch.optim.SGD(net.parameters(), 0.1))
    read, kept = compact.drop_unread(net, masks.alive), compact.needed(net, masks.alive)
    counts = [sum(int(keep.sum()) for keep in found.values()) for found in (read, kept)]
    assert 0 < counts[1] < counts[0] < sum(net.config["widths"])
    unfed = [int((~masks.alive[f"{layer}.conv.weight"][keep].flatten(1).any(1)).sum())
             for layer, keep in kept.items()]
    assert sum(unfed) > 0  # some fire by their constant current, and stay
    tiny, _ = compact.without(net.double(), masks.alive, kept)
    frames = torch.rand(4, 2, 16, 16, generator=draw).double()
    found = channels.differences(net, tiny, kept, frames)
    assert found["spikes_that_differ"] == 0 and found["logits_differ_by"] < 1e-10


@pytest.mark.parametrize("neuron, fires", [
    (dict(tau=1.25, v_threshold=0.5, decay_input=False), 0.4),
    (dict(tau=2.0, v_threshold=0.5), 0.5), (dict(tau=2.0, learn_tau=True, decay_input=False), 0.5), (dict(reset="soft"), 1.0)])
def test_the_limit_of_a_potential_is_what_a_loop_tends_to(neuron, fires):
    """`fires` by hand: the threshold, over tau where the input does not decay."""
    lif = LIF(**neuron)
    for current in (0.98 * fires, 1.02 * fires):
        spikes = lif(torch.full((60, 1, 1), current))
        assert bool(spikes.any()) == (current > fires)
        assert bool(lif.limit(torch.tensor(current)) >= lif.v_threshold) == (current > fires)


def test_a_network_without_convolutions_keeps_its_neurons(capsys):
    prune_unstructured.main(["--smoke", "--model", "gradr-linear", "--run-dir", "r"])
    assert "gradr-linear has no convolutions: only their channels can go" in (
        capsys.readouterr().out)
    assert not Path("r/compact.pt").exists()


@pytest.mark.parametrize("name", ["sdsnn-small", "gradr-linear"])
def test_networks_without_bn_cannot_be_slimmed(name, capsys):
    with pytest.raises(SystemExit) as stop:
        prune_structured.main(["--model", name])
    assert stop.value.code == 2
    assert f"{name} has no channels with batch normalisation, expected some" in one_line(capsys)
    assert not Path("runs").exists()


def test_adam_forgets_dead_weights():
    net = small("gradr-linear", 8, 1)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    masks = Masks(net)
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.rand(2, 1, 8, 8) * 9).sum().backward()
        optimizer.step()
        masks.prune(masks.total // 3, masks.magnitudes(), generator())
        masks.apply(optimizer)
        for name, weight in masks.weights.items():
            (first,) = momenta(optimizer, weight)
            assert not weight[~masks.alive[name]].any() and not first[~masks.alive[name]].any()


# ---- presets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script, dataset, want", [
    (prune_sdsnn, "mnist", dict(
        model="sdsnn-small", encoding="rate", time_steps=20, loss="mse", optimizer="adam", lr=1e-3,
        weight_decay=0.0, batch_size=100, epochs_prune=300, epochs_finetune=0, rate_conv=0.05,
        rate_fc=0.35, crop=0, rotate=0.0, flip=False, sparsity=0.0)),
    (prune_sdsnn, "n-mnist", dict(
        model="sdsnn-small", encoding="events", time_steps=20, optimizer="adam", batch_size=100,
        epochs_prune=300, rate_fc=0.45, event_split="number", crop=0, rotate=0.0)),
    (prune_unstructured, "n-mnist", dict(event_split="number", crop=4, rotate=10.0)),
    (prune_sdsnn, "dvs-gesture", dict(
        model="sdsnn-small", encoding="events", time_steps=64, optimizer="adam", batch_size=4,
        epochs_prune=300, rate_conv=0.05, rate_fc=0.6, event_split="number", crop=16,
        rotate=5.0)),
    (prune_sdsnn, "cifar10", dict(
        model="sdsnn-large", encoding="direct", time_steps=8, loss="mse", optimizer="adamw",
        lr=2.44e-4, weight_decay=0.01, batch_size=50, epochs_prune=600, rate_conv=0.005,
        rate_fc=0.03, crop=4, flip=True)),
    (prune_gradr, "mnist", dict(
        model="gradr-linear", time_steps=8, batch_size=128, epochs_prune=512, epochs_finetune=0,
        lr=1e-3, optimizer="adam", weight_decay=0.0, loss="mse", sparsity=0.95, prior=1e-3,
        mode="paper", crop=4, rotate=30, flip=False)),
    (prune_gradr, "cifar10", dict(
        model="gradr-conv", time_steps=8, batch_size=16, epochs_prune=2048, lr=1e-4, loss="mse",
        sparsity=0.95, prior=1e-3, mode="paper", crop=4, flip=True)),
    (prune_pq, "cifar10-dvs", dict(
        model="vggsnn", encoding="events", event_split="number", time_steps=10, density=0.5,
        eta=0.001, start="er",
        growth="momentum", mode="adaptive", sparsity=None))])
def test_the_papers_settings(script, dataset, want):
    args = vars(script.parse_args(["--dataset", dataset]))
    assert {flag: args[flag] for flag in want} == want


def test_logged_runs_of_sd_snn_are_read_as_they_were():
    """Their config.json is older than --event-split and the reset of sdsnn-small."""
    folder = Path(records.__file__).parent.parent / "results/runs"
    run = records.read_run(folder / "networks/fashion-mnist-sdsnn-small")
    assert run.config["detach_reset"] is True and run.config["event_split"] is None
    command = records.command_of(run).split()
    assert command[:2] == ["python", "prune_sdsnn.py"] and "--detach-reset" in command
    args = vars(prune_sdsnn.parse_args(command[2:]))
    asked = ("model", "detach_reset", "event_split", "rate_conv", "rate_fc", "lr", "loss")
    assert {flag: args[flag] for flag in asked} == {flag: run.config[flag] for flag in asked}
    others = [records.read_run(path) for path in (folder / "methods").glob("*sdsnn*")]
    assert len(others) == 6 and all(run.method == "sdsnn" for run in others)
    assert all(run.config["detach_reset"] is None for run in others)


def test_a_resumed_run_keeps_the_neuron_that_it_had():
    for model, was in (("sdsnn-small", dict(detach_reset=True, threshold=None)),
                       ("sdsnn-large", dict(detach_reset=None, threshold=0.5, strict=False)),
                       ("small", dict(detach_reset=None, threshold=None, strict=None))):
        config = vars(prune_unstructured.parse_args(["--model", model]))
        for folder, older in (("old", True), ("new", False)):
            gone = {"resume", "overwrite", *(["event_split"] if older else [])}
            Path(model, folder).mkdir(parents=True)
            Path(model, folder, "config.json").write_text(json.dumps(
                {flag: value for flag, value in config.items() if flag not in gone}))
            args = vars(prune_unstructured.parse_args(
                ["--resume", "--run-dir", f"{model}/{folder}"]))
            assert {flag: args[flag] for flag in was} == (was if older else dict.fromkeys(was))


def test_sd_snn_rules_of_gestures():
    schedule = prune_sdsnn.make_schedule(300, presets.of("dvs-gesture", "sdsnn")["rules"])
    assert schedule.divisor == 11 and schedule.percentile == dict(conv=65, fc=55)
    mask = torch.ones(300, 30, dtype=torch.bool)
    mask[:180] = False
    assert prune_sdsnn.next_percent(60.0, mask, None, 37, schedule) == pytest.approx(
        70.9091, abs=1e-4)


def test_learning_rates_of_sd_snn():
    stages = training.Stages(10, prune=100)
    args = prune_sdsnn.parse_args(["--dataset", "mnist"])
    assert prune_sdsnn.learning_rate(args, stages, 1) == 1e-3
    assert prune_sdsnn.learning_rate(args, stages, 501) == pytest.approx(0.5e-3)  # a cosine
    args.mode = "official"
    # published code: after 41 epochs, then every 40
    at = {1: 1e-3, 401: 1e-3, 410: 1e-3, 411: 1e-4, 810: 1e-4, 811: 1e-5, 1000: 1e-5}
    assert [prune_sdsnn.learning_rate(args, stages, i) for i in at] == pytest.approx([*at.values()])
    args = prune_sdsnn.parse_args(["--dataset", "cifar10"])
    assert prune_sdsnn.learning_rate(args, stages, 1) == pytest.approx(2.44e-4 / 50)
    assert prune_sdsnn.learning_rate(args, stages, 501) == pytest.approx(1.22e-4)


def save(name, channels_in, size):
    Path("data").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    y = np.arange(80) % 10
    shape = (size, size) if channels_in == 1 else (size, size, channels_in)
    x = rng.integers(0, 128, (80, *shape)) + 12 * y.reshape(-1, *[1] * len(shape))
    x = x.astype(np.uint8)
    np.savez(f"data/{name}.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])


@pytest.mark.parametrize("script, dataset, channels_in, size", [
    (prune_sdsnn, "mnist", 1, 28), (prune_gradr, "mnist", 1, 28), (prune_sdsnn, "cifar10", 3, 32),
    (prune_gradr, "cifar10", 3, 32)])
def test_presets_of_images(script, dataset, channels_in, size):
    save(dataset, channels_in, size)
    summary = script.main(["--dataset", dataset, "--smoke", "--run-dir", "r", "--width", "0.02",
                           "--time-steps", "3"])
    name = dict(mnist=("sdsnn-small", "gradr-linear"), cifar10=("sdsnn-large", "gradr-conv"))
    assert summary["model"] == name[dataset][script is prune_gradr]
    net = models.load("r/model.pt")
    images = data.load(dataset, "data")
    right = torch.cat([net(x).sum(0).argmax(1) == y for x, y in images.pairs("test", 16)])
    # rate coding draws the same spikes for the same batches
    assert right.double().mean().item() == pytest.approx(summary["test_accuracy"])


def run(*given):
    return prune_unstructured.main([*map(str, given)])


@pytest.mark.parametrize("at", [3, 7])
@pytest.mark.parametrize("model, encoding", [("sdsnn-small", "rate"), ("gradr-conv", "direct")])
def test_a_run_that_draws_in_each_step_goes_on_bit_by_bit(model, encoding, at, monkeypatch, once):
    """Spikes of rate coding, and dropout: in the first epoch, and in the second."""
    save("mnist", 1, 16)
    given = ["--dataset", "mnist", "--model", model, "--encoding", encoding, "--width", "0.03",
             "--time-steps", "2", "--batch-size", "20", "--epochs-prune", "2", "--crop", "0",
             "--epochs-finetune", "1", "--interval", "2"]
    monkeypatch.setattr("sys.argv", ["prune_unstructured.py"])
    whole = once(run, *given)
    stop_after(at, monkeypatch, run, *given, "--run-dir", "stopped")
    torch.rand(7)  # where the generator is does not matter
    run("--resume", "--run-dir", "stopped")
    assert_same_run(whole, "stopped")


def test_grad_r_as_in_the_paper():
    """A constant rate; connectivity is what comes out; the target p moves nothing at a = 1e-3."""
    save("mnist", 1, 28)
    given = ["--dataset", "mnist", "--width", "0.02", "--time-steps", "3", "--epochs-prune", "2",
             "--interval", "2", "--batch-size", "20"]
    one = prune_gradr.main([*given, "--run-dir", "a"])
    two = prune_gradr.main([*given, "--run-dir", "b", "--sparsity", "0.6"])
    assert {row["lr"] for row in lines("a", "metrics")} == {1e-3}
    a, b = (modelfile.read(f"{run}/model.pt")["state_dict"] for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert one["sparsity"] == two["sparsity"] not in (0.95, 0.6) and 0 < one["sparsity"] < 0.5
    exact = prune_gradr.main([*given, "--run-dir", "c", "--mode", "matched", "--prior", "0.001"])
    assert exact["sparsity"] == pytest.approx(0.95, abs=1e-3)


def test_the_paper_mode_of_grad_r_fine_tunes_as_all_do(capsys):
    save("mnist", 1, 16)
    prune_gradr.main(["--dataset", "mnist", "--epochs-prune", "2", "--width", "0.05", "--crop", "2",
                      "--epochs-finetune", "2", "--run-dir", "r", "--batch-size", "16"])
    rates = [row["lr"] for row in lines("r", "metrics")]
    assert rates[0] == rates[1] == 1e-3 > rates[2] > rates[3]
    assert "asked for" not in capsys.readouterr().out  # the mode has no target


def test_flags_of_the_neurons(capsys):
    given = ["--smoke", "--run-dir", "r", "--tau", "2", "--threshold", "0.7", "--reset", "soft",
             "--surrogate", "rectangular", "--encoding", "rate", "--loss", "mse"]
    prune_unstructured.main(given)
    packed = modelfile.read("r/model.pt")
    assert packed["neuron"] == dict(tau=2.0, v_threshold=0.7, surrogate="rectangular", reset="soft")
    assert packed["encoding"] == "rate"
    lif = models.load("r/model.pt").lifs[0]
    assert (lif.tau, lif.v_threshold, lif.surrogate, lif.reset) == (
        2.0, 0.7, "rectangular", "soft")
    config = json.loads(Path("r/config.json").read_text())
    assert (config["tau"], config["threshold"], config["loss"]) == (2.0, 0.7, "mse")
    for wrong in (["--tau", "1"], ["--threshold", "0"], ["--reset", "none"]):
        with pytest.raises(SystemExit) as stop:
            prune_unstructured.main(wrong)
        assert stop.value.code == 2
        assert wrong[0] in one_line(capsys)


@pytest.mark.parametrize("dataset", ["mnist", "cifar10", "n-mnist", "cifar10-dvs"])
def test_a_comparison_has_one_protocol(dataset):
    """compare.py takes the same network, input and loss for all, whatever a script's preset is."""
    seen = set()
    for _, words, _ in compare.plan(compare.parse_args(["--dataset", dataset])):
        args = importlib.import_module(Path(words[1]).stem).parse_args(words[2:])
        seen.add(tuple(getattr(args, flag) for flag in (
            "model", "time_steps", "batch_size", "encoding", "loss", "crop", "rotate", "flip")))
        if "structured" not in words[1] or "unstructured" in words[1]:
            assert args.lr == presets.of(dataset)["lr"], words
            assert getattr(args, "mode", "matched") in ("matched", "fixed")
    assert len(seen) == 1


@pytest.mark.usefixtures("few_test_images")
@pytest.mark.parametrize("name", NEW)
def test_every_network_is_pruned_and_looked_into(name):
    """Algorithm 1 with its scores, then what analyze.py reads of a run."""
    summary = prune_unstructured.main([
        "--smoke", "--model", name, "--width", "0.04", "--time-steps", "2", "--run-dir", "r"])
    total = sum(layer["weights"] for layer in summary["layers"])
    assert sum(layer["alive"] for layer in summary["layers"]) == total - round(0.9 * total)
    found = records.analysis_of(records.read_run(Path("r")))
    assert {f"criticality/{lif}" for lif in models.lifs(models.load("r/model.pt"))} <= set(found)
    assert found["variance"].shape == (10,)


def test_channels_of_other_networks_are_removed_in_a_run():
    prune_structured.main(["--smoke", "--model", "gradr-conv", "--width", "0.04", "--time-steps",
                           "2", "--run-dir", "r"])
    record = json.loads(Path("r/channels.json").read_text())
    assert record["spikes_that_differ"] == 0 and record["kept"] < record["channels"]


# ---- docs/data.md--------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
README = (ROOT / "docs/data.md").read_text()


@pytest.mark.parametrize("name", NEW)
def test_the_weights_in_the_readme(name):
    (found,) = re.findall(rf"^\| `{name}` \|.*\| ([\d,]+) \((\d+)×\d+×(\d)\) \|", README, re.M)
    weights, side, in_channels = (int(number.replace(",", "")) for number in found)
    with torch.device("meta"):
        net = models.build(name, 10, in_channels, side, 2)
    assert sum(layer["weights"] for layer in metrics.parameters(net)["layers"]) == weights


@pytest.mark.parametrize("name", ["gradr-linear", "sdsnn-small"])
def test_the_runs_in_the_readme(name):
    """Their figures are those of the logs."""
    (run,) = (ROOT / "results/runs/networks").glob(f"*{name}*")
    summary, config = (json.loads((run / f"{file}.json").read_text())
                       for file in ("summary", "config"))
    assert (summary["model"], config["model"], config["dataset"]) == (name, name, "fashion-mnist")
    assert (f"| `{name}` | {config['train_limit'] or 60_000:,} | {config['epochs_prune']} | "
            f"{100 * summary['test_accuracy']:.2f} % | {100 * summary['sparsity']:.2f} % | "
            f"{summary['sops']:,.0f} |") in README


# ---- NeuroBench ----------------------------------------------------------------------------------


def by_neurobench(net, images, labels, batch_size):
    """What NeuroBench's own harness says of a network."""
    from neurobench.benchmarks import Benchmark
    from neurobench.metrics.static import ConnectionSparsity, Footprint
    from neurobench.metrics.workload import ActivationSparsity, SynapticOperations
    from neurobench.models import TorchModel

    model = TorchModel(net)
    model.add_activation_module(LIF)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size)
    before = []
    if net.encoding == "events":
        before = [lambda pair: (pair[0].transpose(0, 1), pair[1])]
    return Benchmark(model, loader, before, [lambda logits: logits.sum(0).argmax(1)], [
        [Footprint, ConnectionSparsity], [ActivationSparsity, SynapticOperations]]).run(quiet=True)


@pytest.mark.filterwarnings("ignore")
def test_the_recipe_for_neurobench_in_the_text(monkeypatch):
    pytest.importorskip("neurobench", reason="NeuroBench is optional: pip install neurobench")
    monkeypatch.chdir(ROOT)
    found = {}
    exec((ROOT / "docs/metrics.md").read_text().split("```python")[1].split("```")[0], found)
    net, images = found["net"], found["images"].x_test[:64]
    ours = metrics.count(net, images.split(32), net.masks)["neurobench"]
    assert found["results"] == ours | dict(
        ConnectionSparsity=round(ours["ConnectionSparsity"], 4),
        ActivationSparsity=pytest.approx(ours["ActivationSparsity"], abs=1e-12),
        SynapticOperations=pytest.approx(ours["SynapticOperations"], rel=1e-6))  # in float32


@pytest.mark.parametrize("name, encoding", [
    (None, "direct"), ("small-avg", "direct"), ("resnet19", "direct"), ("resnet19-pre", "direct"),
    ("small", "rate"), ("small", "events")])
@pytest.mark.filterwarnings("ignore")
def test_neurobench_s_own_harness_counts_the_same(name, encoding, tmp_path):
    pytest.importorskip("neurobench", reason="NeuroBench is optional: pip install neurobench")
    x = data.load("fashion-mini").x_test[:12]
    if name is None:  # the network of results/, as its file has it
        net = models.load(ROOT / "results/runs/start/default/model.pt")
    else:
        torch.manual_seed(0)
        channels = 2 if encoding == "events" else 1
        widths = plans.default_widths(name, 0.1)
        net = models.build(name, 10, channels, 28, 3, widths, encoding)
        let_fire(net)
        masks = Masks(net)
        masks.prune(masks.total // 3, masks.magnitudes(), generator())
        for weight, mask in masks.alive.items():
            net.get_parameter(weight).data.mul_(mask)
        torch.save(modelfile.pack(net, masks.alive), tmp_path / "model.pt")
        net = models.load(tmp_path / "model.pt")
    if encoding == "events":
        x = torch.poisson(torch.full((12, 3, 2, 28, 28), 0.2), generator()).to(torch.uint8)
    theirs = by_neurobench(net, x, torch.zeros(12, dtype=torch.long), 6)
    batches = [batch.transpose(0, 1) if encoding == "events" else batch for batch in x.split(6)]
    ours = metrics.count(net, batches, net.masks)["neurobench"]
    operations = ours.pop("SynapticOperations")
    assert operations == theirs.pop("SynapticOperations")  # whole numbers, to the last one
    assert operations["Effective_ACs"] > 0
    assert theirs == ours | dict(  # it rounds the one, and sums the other by batch
        ConnectionSparsity=round(ours["ConnectionSparsity"], 4),
        ActivationSparsity=pytest.approx(ours["ActivationSparsity"], abs=1e-12))
