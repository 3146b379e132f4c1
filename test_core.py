"""The algorithms, pinned by worked examples, brute force and plain loops; short runs of Algorithm 1
on the embedded images."""
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import masks as masks_file
import kernels
import metrics
import modelfile
import models
import neurons
import prune_unstructured as script
import training
from harness.meters import Meter
from kernels import FastLIF
from masks import Masks, prune_further, select
from neurons import LIF, SURROGATES, criticality, surrogate, surrogate_grad


def generator(seed=0):
    return masks_file.seeded(seed)


def test_generators_depend_on_all_of_their_numbers():
    draws = {tuple(torch.rand(3, generator=masks_file.seeded(seed, iteration)).tolist())
             for seed in range(5) for iteration in (0, 1, 25, 2**32)}
    assert len(draws) == 20
    assert torch.equal(torch.rand(3, generator=masks_file.seeded(4, 2)),
                       torch.rand(3, generator=masks_file.seeded(4, 2)))


def channels_last_seq(x_seq):
    T, N = x_seq.shape[:2]
    return x_seq.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (T, N))


# ---- neurons -------------------------------------------------------------------------------------


def plain_loop(x_seq, tau=4 / 3, v_threshold=1.0, v_reset=0.0, alpha=2.0, surrogate="arctan",
               reset="hard", detach_reset=True, decay_input=True, strict=False, weights=None):
    """Eqs. 1-4 forward, and backward by the chain rule, number by number, in Python.

    x_seq: [T], float64. weights: dL/ds_t. Returns lists: spikes, potentials h, dL/dx."""
    v, s_seq, h_seq = v_reset, [], []
    for x in x_seq.tolist():
        leak = v - v_reset
        h = v + (x - leak) / tau if decay_input else v + x - leak / tau
        s = float(h > v_threshold if strict else h >= v_threshold)
        v = h - s * v_threshold if reset == "soft" else (1 - s) * h + s * v_reset
        s_seq.append(s)
        h_seq.append(h)
    to_v, to_x = 0.0, []
    for h, s, g in reversed(list(zip(h_seq, s_seq, weights))):
        u = torch.tensor(h - v_threshold, dtype=torch.float64)
        slope = float(surrogate_grad(u, alpha, surrogate))
        through = 1.0 if reset == "soft" else 1 - s  # dv/dh, the spike held
        if not detach_reset:
            through += (-v_threshold if reset == "soft" else v_reset - h) * slope
        to_h = g * slope + to_v * through
        to_x.append(to_h / tau if decay_input else to_h)
        to_v = to_h * (1 - 1 / tau)
    return s_seq, h_seq, to_x[::-1]


def recorded(lif, x_seq, aggregate="max", time_steps=None):
    lif.start_recording(aggregate)
    spikes = lif(x_seq, time_steps)
    return spikes, lif.stop_recording()


@pytest.mark.parametrize("neuron", [LIF, FastLIF])
def test_lif_worked_example(neuron):
    x = torch.tensor([1.2, 1.2, 0.4, 2.0], dtype=torch.float64).view(4, 1, 1).requires_grad_()
    spikes, score = recorded(neuron(), x)
    spikes.sum().backward()
    assert spikes.flatten().tolist() == [0, 1, 0, 1]
    assert x.grad.flatten().tolist() == pytest.approx(
        [0.8450758, 0.6497937, 0.1724920, 0.1759267], abs=1e-6)
    assert score.tolist() == pytest.approx([0.5456194], abs=1e-6)
    _, h, _ = plain_loop(x.detach().flatten(), weights=[1] * 4)
    assert h == pytest.approx([0.9, 1.125, 0.3, 1.575], abs=1e-12)
    assert surrogate_grad(torch.tensor(h, dtype=torch.float64) - 1).tolist() == pytest.approx(
        [0.9101698, 0.8663915, 0.1713471, 0.2345690], abs=1e-6)


def test_the_published_neuron_by_hand():
    """u = v / 4 + x, fires above 1/2, tanh surrogate, the reset not detached."""
    x = torch.tensor([0.3, 0.45, 0.2, 0.9], dtype=torch.float64).view(4, 1, 1).requires_grad_()
    lif = LIF(v_threshold=0.5, surrogate="tanh", decay_input=False, strict=True,
              detach_reset=False)
    spikes = lif(x)
    spikes.sum().backward()
    assert spikes.flatten().tolist() == [0, 1, 0, 1]
    assert x.grad.flatten().tolist() == pytest.approx(
        [1.4143886, 1.4556387, 0.8889189, 0.3911473], abs=1e-6)
    u = torch.tensor([0.3, 0.525, 0.2, 0.95], dtype=torch.float64) - 0.5
    assert surrogate_grad(u, name="tanh").tolist() == pytest.approx(
        [1.1792175, 1.6479003, 0.8069132, 0.3911473], abs=1e-6)
    assert surrogate_grad(torch.tensor([-0.51, 0.0, 0.51]), name="tanh").tolist() == pytest.approx(
        [0, 1.657187, 0], abs=1e-6)  # on [0, 1] of the potential


@pytest.mark.parametrize("neuron", [LIF, FastLIF])
def test_the_published_score_by_hand(neuron):
    """The value of the surrogate, which grows beyond the threshold; beside it the derivative."""
    x = torch.tensor([0.3, 0.45, 0.2, 0.9], dtype=torch.float64).view(4, 1, 1)
    found = {}
    for by in ("value", "derivative"):
        lif = neuron(v_threshold=0.5, surrogate="tanh", decay_input=False, strict=True,
                     detach_reset=False)
        lif.start_recording("max", by)
        lif(x)
        found[by] = lif.stop_recording().item()
    assert found == pytest.approx(dict(value=0.4579579, derivative=1.0062945), abs=1e-6)
    u = torch.tensor([0.3, 0.525, 0.2, 0.95, 1e9, -1e9], dtype=torch.float64) - 0.5
    assert surrogate(u, name="tanh").tolist() == pytest.approx(
        [0.2033362, 0.5413522, 0.1043201, 0.9828233, 1.0523957, -0.0523957], abs=1e-6)
    with pytest.raises(ValueError, match="expected .derivative. or .value"):
        criticality(torch.zeros(1, 1, 1), by="nearness")


PUBLISHED = dict(v_threshold=0.5, surrogate="tanh", decay_input=False, strict=True,
                 detach_reset=False)


@pytest.mark.parametrize("settings", [{}, dict(tau=2.5), dict(alpha=1.0, v_threshold=0.8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_published_neuron_is_fast_and_the_same(settings, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "CPU_BLOCK", 70)
    plain, fast = LIF(**PUBLISHED | settings), FastLIF(**PUBLISHED | settings)
    assert fast.path is kernels.TanhLIF
    x_seq = channels_last_seq(torch.randn(5, 3, 4, 6, 5, generator=generator()) * 1.5).to(dtype)
    x_seq[:, :, 0, 0] = settings.get("v_threshold", 0.5)  # on the threshold
    x_seq[:, :, 0, 1] = 0.0
    for x, steps in ((x_seq, None), (x_seq[:1], 5)):
        rows = []
        for lif in (plain, fast):
            leaf = x.clone().requires_grad_()
            spikes = lif(leaf, steps)
            weights = torch.cos(torch.arange(spikes.numel(), dtype=dtype)).view(spikes.shape)
            (spikes * weights).sum().backward()
            rows.append((spikes.detach(), leaf.grad))
        (s, g), (fast_s, fast_g) = rows
        assert torch.equal(s, fast_s) and fast_s.stride() == s.stride()
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.25}[dtype]
        assert torch.allclose(g, fast_g, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert torch.equal(fast(x_seq), plain(x_seq))


@pytest.mark.parametrize("tau, current, spikes", [
    (2.0, 1.5, [0, 1, 0, 1, 0, 1, 0, 1]), (4 / 3, 1.05, [0, 0, 1, 0, 0]),
    (4 / 3, 1.2, [0, 1, 0, 1, 0]), (4 / 3, 1.4, [1, 1, 1, 1, 1])])
@pytest.mark.parametrize("neuron", [LIF, FastLIF])
def test_lif_constant_currents(neuron, tau, current, spikes):
    x = torch.full((len(spikes), 1), current)
    assert neuron(tau=tau)(x).flatten().tolist() == spikes


@pytest.mark.parametrize("neuron", [LIF, FastLIF])
def test_lif_fires_exactly_on_the_threshold(neuron):
    x = torch.tensor([[2.0], [1.9999999]])
    assert neuron(tau=2.0)(x).flatten().tolist() == [1, 0]
    assert neuron(tau=2.0, strict=True)(x[:1]).item() == 0


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("alpha", [1.0, 2.0, 4.0])
def test_surrogate_grad_is_the_derivative(name, alpha):
    u = torch.linspace(-2, 2, 80, dtype=torch.float64)  # not on the corner of a ramp
    if name == "tanh":
        u = u[u.abs() < 0.5]  # beyond, training has no gradient
    numeric = (surrogate(u + 1e-6, alpha, name) - surrogate(u - 1e-6, alpha, name)) / 2e-6
    assert torch.allclose(numeric, surrogate_grad(u, alpha, name), atol=1e-8)
    assert surrogate(torch.zeros(()), alpha, name) == 0.5


def test_the_peak_of_arctan():
    for alpha in (1.0, 2.0, 4.0):
        assert surrogate_grad(torch.zeros(()), alpha) == alpha / 2
    assert surrogate_grad(torch.tensor([0.25, 0.5, 1.0])).tolist() == pytest.approx(
        [0.6184865, 0.2884004, 0.0919997], abs=1e-6)


SETTINGS = [dict(reset=reset, detach_reset=detach, decay_input=decay, strict=strict,
                 surrogate=name)
            for reset in ("hard", "soft") for detach in (True, False) for decay in (True, False)
            for strict in (True, False) for name in SURROGATES]


@pytest.mark.parametrize("v_reset", [0.0, -0.25])
def test_every_lif_equals_a_loop_over_numbers(v_reset):
    x = torch.randn(5, 12, generator=generator(), dtype=torch.float64) * 2
    weights = torch.randn(5, 12, generator=generator(1), dtype=torch.float64)
    for settings in SETTINGS:
        settings = settings | dict(tau=1.7, v_threshold=0.9, v_reset=v_reset, alpha=3.0)
        leaf = x.view(5, 3, 4).clone().requires_grad_()
        spikes, score = recorded(LIF(**settings), leaf)
        (spikes * weights.view(5, 3, 4)).sum().backward()
        columns = [plain_loop(x[:, i], weights=weights[:, i].tolist(), **settings)
                   for i in range(12)]
        want, h, gradient = torch.tensor(columns, dtype=torch.float64).permute(1, 2, 0)
        assert torch.equal(spikes.detach().view(5, 12), want), settings
        assert torch.allclose(leaf.grad.view(5, 12), gradient, atol=1e-12), settings
        expected = criticality(h.reshape(5, 3, 4), 0.9, 3.0, name=settings["surrogate"])
        assert torch.allclose(score, expected, atol=1e-12), settings


def test_a_learnt_tau_gets_the_gradient_of_autograd():
    """d loss / d w by autograd against a difference, where no spike changes."""
    x = torch.randn(4, 2, 6, generator=generator(), dtype=torch.float64)
    weights = torch.randn(4, 2, 6, generator=generator(1), dtype=torch.float64)

    def potentials(w):
        lif = LIF(tau=2.0, learn_tau=True, v_threshold=50.0).double()
        lif.w.data.fill_(w)
        v = torch.zeros(2, 6, dtype=torch.float64)
        h_seq = []
        for x_t in x:
            v = v + (x_t - v) * lif.w.sigmoid()
            h_seq.append(v)
        return lif, torch.stack(h_seq)

    lif, h = potentials(0.3)
    spikes = lif(x)
    assert lif.extra_repr() and spikes.count_nonzero() == 0
    (spikes * weights).sum().backward()
    slope = surrogate_grad(h - 50.0).detach()
    up, down = (potentials(0.3 + sign * 1e-6)[1].detach() for sign in (1, -1))
    numeric = (weights * slope * (up - down) / 2e-6).sum()
    assert lif.w.grad.item() == pytest.approx(numeric.item(), rel=1e-6)


@pytest.mark.parametrize("layout", [
    "contiguous", "channels_last", "repeated", "permuted", "linear"])
@pytest.mark.parametrize("v_reset", [0.0, -0.25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_fast_lif_equals_the_plain_one(layout, v_reset, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "CPU_BLOCK", 50)  # several blocks, the last one not full
    settings = dict(tau=1.7, v_threshold=0.9, v_reset=v_reset, alpha=3.0)
    fast, plain = FastLIF(**settings), LIF(**settings)
    assert fast.is_fast
    base = torch.randn(5, 2, 3, 4, 5, generator=generator(), dtype=torch.float64).to(dtype) * 2
    weights = torch.randn(5, 2, 3, 4, 5, generator=generator(1), dtype=torch.float64).to(dtype)
    if layout == "repeated":
        base = base[:1]
    if layout == "linear":
        base, weights = base[..., 0, 0], weights[..., 0, 0]
    results = []
    for lif in (fast, plain):
        leaf = base.clone().requires_grad_()
        x = leaf
        if layout == "channels_last":
            x = channels_last_seq(leaf)
        elif layout == "permuted":
            x = leaf.transpose(2, 4).contiguous().transpose(2, 4)
        spikes, score = recorded(lif, x, time_steps=5)
        (spikes * weights).sum().backward()
        with torch.no_grad():  # h is not kept
            assert torch.equal(lif(x, 5), spikes)
        if layout in ("channels_last", "permuted"):
            assert spikes.stride() == x.stride()
        results.append((spikes, score, leaf.grad))
    (ours, score, grad), (spikes, plain_score, plain_grad) = results
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.1}[dtype]
    assert ours.shape == spikes.shape and ours.dtype == dtype
    assert 0.02 < ours.float().mean() < 0.9
    assert torch.equal(ours, spikes)
    assert torch.allclose(grad, plain_grad, atol=tolerance, rtol=tolerance)
    assert torch.allclose(score, plain_score, atol=max(1e-12, tolerance / 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_lif_fires_as_the_plain_one_among_many(dtype):
    x = (torch.randn(5, 40, 50, 49, generator=generator()) * 2).to(dtype)
    for settings in (dict(), dict(tau=1.7, v_threshold=0.9, v_reset=-0.25)):
        assert torch.equal(FastLIF(**settings)(x), LIF(**settings)(x))


@pytest.mark.parametrize("v_reset", [0.0, -0.25])
def test_lif_keeps_h_bit_by_bit(v_reset, monkeypatch):
    settings = dict(tau=1.7, v_threshold=0.9, v_reset=v_reset)
    x = torch.randn(6, 2, 30, generator=generator()) * 2
    (h,) = FastLIF(**settings)(x.clone().requires_grad_()).grad_fn.saved_tensors
    seen = []
    monkeypatch.setattr(neurons, "criticality", lambda h_seq, *_: seen.append(h_seq))
    recorded(LIF(**settings), x)
    assert torch.equal(h.view(x.shape), seen[0])  # a true division by tau


@pytest.mark.parametrize("settings", [
    dict(surrogate="tanh"), dict(surrogate="rectangular"), dict(reset="soft"),
    dict(detach_reset=False), dict(decay_input=False), dict(strict=True),
    dict(learn_tau=True)])
def test_another_neuron_runs_the_plain_loop(settings):
    assert FastLIF().is_fast and not FastLIF(**settings).is_fast
    x = torch.randn(4, 2, 3, generator=generator())
    assert torch.equal(FastLIF(**settings)(x), LIF(**settings)(x))


def changed_charge(self, x_seq, time_steps=None):
    return LIF.original(self, 0.9 * x_seq, time_steps)


def faded(self, x_seq, time_steps=None):
    x_seq = LIF.repeated(self, x_seq, time_steps)
    return x_seq * torch.linspace(1, 0.5, len(x_seq)).view(-1, *[1] * (x_seq.dim() - 1))


def per_neuron_threshold(self, x_seq, time_steps=None):
    return LIF.original(self, x_seq - 0.1 * torch.arange(64), time_steps)


@pytest.mark.parametrize("change", [
    lambda patch: patch(LIF, "over_time", faded),
    lambda patch: patch(LIF, "forward", per_neuron_threshold),  # of another shape than any probe
    lambda patch: patch(neurons.Spike, "backward", staticmethod(
        lambda ctx, g: (0.5 * g, None, None, None))),
    lambda patch: patch(neurons, "surrogate_grad", lambda u, alpha=2.0, name="arctan": (
        u.abs() < 8) * neurons.arctan_grad(u, alpha))])
def test_a_changed_neuron_is_never_fast(change, monkeypatch):
    LIF.original, LIF.repeated = LIF.forward, LIF.over_time
    assert FastLIF().is_fast
    change(monkeypatch.setattr)
    assert not FastLIF().is_fast


CHANGES = {  # what a reader may change in neurons.py
    "derivative": lambda patch: patch(
        neurons, "surrogate_grad", lambda u, alpha=2.0, name="arctan": 1 / (1 + u.abs()) ** 2),
    "pair": lambda patch: patch(neurons, "SURROGATES", SURROGATES | {
        "arctan": (neurons.arctan, lambda u, alpha=2.0: 1.1 * neurons.arctan_grad(u, alpha))}),
    "loop": lambda patch: patch(LIF, "forward", changed_charge),
    "score": lambda patch: patch(neurons, "criticality", lambda h_seq, v_threshold, *_: (
        h_seq.mean((0, 1)).flatten(1).mean(1).double() if h_seq.dim() > 3
        else h_seq.mean((0, 1)).double()))}


def short_run(folder):
    script.main(["--smoke", "--run-dir", str(folder), "--train-limit", "100", "--device", "cpu"])
    return modelfile.read(folder / "model.pt")


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    return short_run(tmp_path_factory.mktemp("unchanged") / "r")


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_neurons_changes_a_training_run(change, unchanged, tmp_path, monkeypatch):
    LIF.original = LIF.forward
    CHANGES[change](monkeypatch.setattr)
    assert not FastLIF().is_fast
    changed = short_run(tmp_path / "r")
    part, name = ("masks" if change == "score" else "state_dict"), "convs.0.conv.weight"
    assert not torch.equal(unchanged[part][name], changed[part][name])


def test_lif_reads_an_input_of_one_step_without_a_copy():
    x = torch.randn(1, 2, 3, 4, 4)
    rows = kernels._as_rows(x, [1, 2, 3, 4])
    assert rows.data_ptr() == x.data_ptr()
    y = channels_last_seq(torch.randn(2, 2, 3, 4, 4))
    assert kernels._as_rows(y, [1, 3, 4, 2]).data_ptr() == y.data_ptr()
    for lif in (LIF(), FastLIF()):
        for shape, steps in (((5,), None), ((3, 2), 4)):
            with pytest.raises(ValueError, match="expected .T, N"):
                lif(torch.zeros(shape), steps)


def test_lif_keeps_no_state_and_saves_only_h():
    lif, x = FastLIF(), torch.randn(4, 3, 5, requires_grad=True)
    first = lif(x)
    assert torch.equal(first, lif(x))
    assert lif(torch.randn(4, 7, 5)).shape == (4, 7, 5)  # another batch size in between
    assert torch.equal(first, lif(x))
    (saved,) = first.grad_fn.next_functions[0][0].saved_tensors if first.grad_fn.name().startswith(
        "View") else first.grad_fn.saved_tensors
    assert saved.numel() == x.numel()
    with torch.no_grad():
        assert torch.equal(first, lif(x)) and not lif(x).requires_grad
    assert lif.stop_recording() is None  # nothing is recorded unless asked for


@pytest.mark.parametrize("arguments, word", [
    (dict(tau=1), "tau"), (dict(tau=math.nan), "tau"), (dict(v_reset=1.0), "v_reset"),
    (dict(alpha=0), "alpha"), (dict(v_threshold=math.inf), "v_threshold"),
    (dict(surrogate="step"), "surrogate"), (dict(reset="never"), "reset")])
def test_lif_refuses_bad_settings(arguments, word):
    for neuron in (LIF, FastLIF):
        with pytest.raises(ValueError, match=word):
            neuron(**arguments)


def test_scores_are_a_value():
    net = small_net()
    x = torch.randn(6, 1, 8, 8, generator=generator()) * 3
    with models.recording(net, "max") as scores:
        net(x)
    assert list(scores) == list(models.lifs(net))
    assert [len(score) for score in scores.values()] == [3, 4, 5, 4]
    assert all(score.dtype == torch.float64 for score in scores.values())
    with models.recording(net, None) as nothing:
        net(x)
    assert nothing == {}
    with models.recording(net, "mean") as nobody_ran:
        pass
    assert nobody_ran == {}


def test_criticality_by_hand():
    # two steps, one map of two pixels: mean over T first, then max (or mean) over the pixels
    h = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=torch.float64).view(2, 1, 1, 1, 2)
    assert criticality(h).tolist() == pytest.approx([0.6442002], abs=1e-6)
    assert criticality(h, aggregate="mean").tolist() == pytest.approx([0.5951000], abs=1e-6)
    with pytest.raises(ValueError, match="aggregate"):
        criticality(h, aggregate="sum")


@pytest.mark.parametrize("aggregate", ["max", "mean"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 2, 6), (3, 4, 5)])
def test_criticality_equals_loops(aggregate, shape):
    h = torch.randn(shape, generator=generator(), dtype=torch.float64)
    T, N, C = shape[:3]
    maps = h.reshape(T, N, C, -1)
    expected = []
    for c in range(C):
        of_samples = []
        for n in range(N):
            neurons_ = [sum(float(surrogate_grad(maps[t, n, c, i] - 0.8, 3.0))
                            for t in range(T)) / T for i in range(maps.shape[3])]
            of_samples.append(max(neurons_) if aggregate == "max"
                              else sum(neurons_) / len(neurons_))
        expected.append(sum(of_samples) / N)
    assert criticality(h, 0.8, 3.0, aggregate).tolist() == pytest.approx(expected, abs=1e-12)
    x = torch.randn(shape, generator=generator(1), dtype=torch.float64)
    _, fast = recorded(FastLIF(), x, aggregate)
    _, plain = recorded(LIF(), x, aggregate)
    assert torch.allclose(fast, plain, atol=1e-12, rtol=0)


def test_a_channel_on_the_threshold_scores_highest():
    h = torch.stack([torch.full((4, 8, 3, 3), value) for value in (-2.0, 1.0, 4.0)], dim=2)
    below, on, above = criticality(h).tolist()
    assert on == 1 and below < 0.2 and above < 0.2


# ---- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, classes, prunable, total", [
    ("vgg16", 10, 14_715_584, 14_724_042), ("vgg16", 100, 14_761_664, 14_770_212),
    ("resnet19", 10, 12_619_968, 12_630_858), ("resnet19", 100, 12_643_008, 12_653_988)])
def test_parameter_counts_of_the_papers(name, classes, prunable, total):
    net = models.build(name, classes, 3, 32, 5)
    sizes = {n: p.numel() for n, p in net.named_parameters() if p.dim() > 1}
    assert list(models.scored_by(net)) == list(sizes)  # every conv and linear weight, in order
    assert sum(sizes.values()) == prunable == Masks(net).total
    assert (sum(p.numel() for p in net.parameters()) == total
            == metrics.parameters(net)["parameters"])


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("size", [28, 32, 64])
def test_shapes_and_direct_coding(name, size):
    net = models.build(name, 7, 2, size, 3, models.default_widths(name, 0.06)).eval().double()
    x = torch.randn(2, 2, size, size, generator=generator()).double()
    seen = []
    first = net.get_submodule(next(iter(models.scored_by(net))).removesuffix(".weight"))
    with metrics.hooks({"first": first}, before=lambda _, inputs: seen.append(len(inputs))):
        once = net(x)
        assert once.shape == (3, 2, 7)
        repeated = net(x.expand(3, *x.shape))  # a time axis: the same image at each step
    assert seen == [2, 6]  # once for direct coding, T times for data with a time axis
    assert torch.allclose(once, repeated, atol=1e-12)
    with pytest.raises(ValueError, match="expected"):
        net(x[0])


def test_uint8_images_are_normalised_and_padded_with_black():
    net = models.build("vgg16", 3, 1, 28, 1, [2] * 13).eval()
    net.set_normalisation([0.25], [0.5])
    image = torch.randint(0, 256, (2, 1, 28, 28), generator=generator(), dtype=torch.uint8)
    padded = F.pad(image, (2, 2, 2, 2)).double() / 255
    seen = []
    with metrics.hooks({"": net.convs[0].conv}, before=lambda _, inputs: seen.append(inputs)):
        net(image)
    assert torch.allclose(seen[0].double(), (padded - 0.25) / 0.5, atol=1e-6)


def test_resnet_block_adds_before_the_neuron():
    block = models.Block(2, 3, 4, stride=2).eval().double()
    x = (torch.rand(3, 2, 2, 6, 6, generator=generator()) > 0.5).double()

    def at_each_step(layer, maps):
        return torch.stack([layer(step[None])[0] for step in maps])

    inner = block.lif1(at_each_step(block.conv1, x))
    current = at_each_step(block.conv2, inner) + at_each_step(block.shortcut, x)
    assert torch.equal(block(x), block.lif2(current))
    assert models.Block(4, 3, 4, stride=1).shortcut is None
    assert models.Block(4, 3, 4, stride=2).shortcut is not None


def test_a_strided_1x1_convolution_is_torchs():
    conv = models.ConvBN(3, 5, kernel=1, stride=2).conv.double()
    plain = torch.nn.Conv2d(3, 5, 1, 2, bias=False).double()
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 3, 7, 8, generator=generator(), dtype=torch.float64)
    outputs = conv(x), plain(x)
    assert torch.allclose(*outputs, atol=1e-14)
    for out in outputs:
        out.square().sum().backward()
    assert torch.allclose(conv.weight.grad, plain.weight.grad, atol=1e-12)


def test_few_channels_in_channels_last_leave_the_memory_whole():
    """A strided 1x1 convolution of torch 2.14 ends such a run by corrupting the heap."""
    net = models.build("resnet19", 3, 1, 8, 2, models.default_widths("resnet19", 0.1))
    net = net.to(memory_format=torch.channels_last)
    x = torch.randint(0, 256, (24, 1, 8, 8), generator=generator(), dtype=torch.uint8)
    for _ in range(8):
        net.zero_grad()
        training.loss_over_time(net(x), torch.arange(24) % 3).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_who_scores_which_weight():
    net = models.build("small", 5, 1, 16, 2, [2, 3, 4, 3])  # last map 2 x 2: 12 inputs of fc
    assert models.scored_by(net)["convs.1.conv.weight"] == ("lifs.1", 0, 1)
    assert models.scored_by(net)["fc.weight"] == ("lifs.3", 1, 4)
    masks = Masks(net)
    scores = {f"lifs.{i}": 10.0 * i + torch.arange(n) for i, n in enumerate([2, 3, 4, 3])}
    parts = dict(zip(masks.weights, masks.spread(scores).split(masks.sizes)))
    assert (parts["convs.2.conv.weight"].view(4, 3, 9) == scores["lifs.2"].view(4, 1, 1)).all()
    assert (parts["fc.weight"].view(5, 3, 4) == scores["lifs.3"].view(1, 3, 1)).all()
    scored = models.scored_by(
        models.build("resnet19", 5, 1, 16, 2, models.default_widths("resnet19", .1)))
    assert scored["blocks.0.conv1.conv.weight"].lif == "blocks.0.lif1"
    for feeds_lif2 in ("blocks.0.conv2.conv.weight", "blocks.0.shortcut.conv.weight"):
        assert scored[feeds_lif2] == ("blocks.0.lif2", 0, 1)
    assert scored["fc1.weight"] == ("lif_fc", 0, 1) and scored["fc2.weight"] == ("lif_fc", 1, 1)


def test_flattened_map_belongs_to_its_channel():
    """A spike of the last LIF's channel c meets just those columns of fc
    that c is said to score."""
    net = models.build("small", 5, 1, 16, 1, [2, 3, 4, 3]).eval()
    spikes = torch.zeros(1, 1, 3, 4, 4)
    spikes[:, :, 1] = 1
    pooled = models.fused(lambda maps: F.max_pool2d(maps, 2), spikes).flatten(2)
    assert pooled.flatten().nonzero().flatten().tolist() == [4, 5, 6, 7]
    assert models.scored_by(net)["fc.weight"].repeat == 4


def test_batch_statistics_are_taken_over_time_and_batch():
    net = models.build("small", 3, 1, 8, 4, [2, 2, 2, 2]).double()
    outputs = []
    with metrics.hooks({"": net.convs[1].bn}, after=lambda _, out: outputs.append(out)):
        net(torch.randn(5, 1, 8, 8, generator=generator()).double() * 4)
    assert outputs[0].shape[0] == 20
    assert torch.allclose(outputs[0].mean((0, 2, 3)), torch.zeros(2).double(), atol=1e-9)


@pytest.mark.parametrize("name", models.NAMES)
def test_model_file_round_trip(name, tmp_path):
    net = models.build(name, 4, 1, 16, 2, models.default_widths(name, 0.05))
    net.set_normalisation([0.3], [0.2])
    masks = Masks(net)
    masks.prune(masks.total // 2, masks.magnitudes(), generator())
    masks.rescue_empty_layers()
    masks.apply(torch.optim.SGD(net.parameters(), 0.1))
    torch.save(modelfile.pack(net, masks.alive), tmp_path / "model.pt")
    loaded = models.load(tmp_path / "model.pt")
    x = torch.randint(0, 256, (3, 1, 16, 16), generator=generator(), dtype=torch.uint8)
    assert torch.equal(net.eval()(x), loaded(x)) and not loaded.training
    packed = modelfile.read(tmp_path / "model.pt")
    assert all(torch.equal(packed["masks"][n], masks.alive[n]) for n in masks.alive)
    assert {n for n, t in packed["state_dict"].items() if t.dim() > 1} == set(packed["masks"])


def test_model_files_that_are_none(tmp_path):
    net = models.build("small", 3, 1, 8, 2, [2, 2, 2, 2])
    good, path = modelfile.pack(net), tmp_path / "model.pt"
    name = "convs.1.conv.weight"

    def masks(**changed):
        return good | {"masks": {n: mask for n, mask in (good["masks"] | changed).items()
                                 if mask is not None}}

    cases = [
        ("format", good | {"format": 0}), ("keys", {"a": 1}), ("keys", [1, 2]),
        ("widths", good | {"widths": [2, 2]}), ("tensors", good | {"widths": [2, 2, 2, 3]}),
        ("tensors", good | {"widths": 3}), ("tensors", good | {"state_dict": [1]}),
        ("tensors", good | {"normalisation": {}}), ("tensors", good | {"name": "vgg19"}),
        ("tensors", good | {"normalisation": {"mean": [0, 0, 0], "std": [1]}}),
        ("tensors", masks(**{name: "all"})), ("no mask that fits", masks(**{name: None})),
        ("no mask that fits", masks(**{name: torch.ones(2, 2, dtype=torch.bool)})),
        ("no mask that fits", masks(**{name: torch.ones(2, 2, 3, 3)})),
        ("masks of no weight", masks(other=torch.ones(2, dtype=torch.bool))),
        ("pruned are not 0", masks(**{name: torch.zeros(2, 2, 3, 3, dtype=torch.bool)}))]
    for word, content in cases:
        torch.save(content, path)
        with pytest.raises(ValueError, match=word):
            models.load(path)
    path.write_bytes(b"not a file of torch")
    with pytest.raises(ValueError, match="cannot be read"):
        models.load(path)
    with pytest.raises(FileNotFoundError, match="expected"):
        models.load(tmp_path / "absent.pt")

    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was_run",))
    torch.save({"format": Code()}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        models.load(path)
    assert not (tmp_path / "was_run").exists()


def test_build_refuses_what_makes_no_network():
    for arguments in [("vgg17", 3, 1, 8, 2), ("small", 0, 1, 8, 2), ("small", 3, 1, 4, 2),
                      ("small", 3, 1, 8, 2, [1, 2]), ("small", 3, 1, 8, 2, [1, 2, 0, 2]),
                      ("resnet19", 3, 1, 8, 2, [4] * 4 + [5] + [4] * 13)]:
        with pytest.raises(ValueError, match="expected"):
            models.build(*arguments)


# ---- masks ---------------------------------------------------------------------------------------


def brute_force(eligible, k, keys):
    """Places in the order of (key, next key, ...), largest first, and whether the k-th is a tie."""
    places = [i for i, e in enumerate(eligible.tolist()) if e]
    rank = {i: tuple(-float(key[i]) for key in keys) for i in places}
    places.sort(key=rank.get)
    tied = 0 < k < len(places) and rank[places[k - 1]] == rank[places[k]]
    return places[:k], rank, tied


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_select_equals_brute_force(data):
    n = data.draw(st.integers(1, 30))
    eligible = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    values = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), min_size=n, max_size=n)
    keys = [torch.tensor(data.draw(values)) for _ in range(data.draw(st.integers(0, 3)))]
    k = data.draw(st.integers(0, int(eligible.sum())))
    chosen = select(eligible, k, keys, generator())
    assert chosen.sum() == k and not (chosen & ~eligible).any()
    best, rank, _ = brute_force(eligible, k, keys)
    picked = chosen.nonzero().flatten().tolist()
    assert sorted(rank[i] for i in picked) == sorted(rank[i] for i in best)


def test_select_is_seeded_fair_and_strict():
    eligible = torch.ones(8, dtype=torch.bool)
    zeros = torch.zeros(8)
    same = [select(eligible, 2, [zeros], generator(5)).tolist() for _ in range(2)]
    assert same[0] == same[1]
    counts = sum(select(eligible, 2, [], generator(seed)).int() for seed in range(400))
    assert ((counts > 60) & (counts < 140)).all()  # 100 each, expected
    with pytest.raises(ValueError):
        select(eligible, 9, [zeros], generator())
    for bad in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match="finite"):
            select(eligible, 4, [torch.tensor([bad, 1, 1, 1, 1, 1, 0, 0])], generator())


@pytest.mark.parametrize("levels", [None, 50, 1])
def test_selection_among_many_equals_a_sort(levels):
    size = 300_000
    eligible = torch.rand(size, generator=generator()) < 0.7
    key = torch.rand(size, generator=generator(1))
    key = key if levels is None else (key * levels).floor()
    second = torch.randperm(size, generator=generator(2)).float()
    order = torch.from_numpy(np.lexsort((-second, -key, ~eligible)))  # the last key counts first
    available = int(eligible.sum())
    for k in (1, 2, 10_000, available // 2, available - 1):
        chosen = select(eligible, k, [key, second], generator())
        assert flat_indices(chosen) == sorted(order[:k].tolist())


class TwoLayers(torch.nn.Module):
    """Two linear layers with given weights, for examples by hand."""

    def __init__(self, first, second):
        super().__init__()
        self.a = torch.nn.Linear(len(first[0]), len(first), bias=False)
        self.b = torch.nn.Linear(len(second[0]), len(second), bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor(first))
            self.b.weight.copy_(torch.tensor(second))

    def scored_by(self):
        return {"a.weight": models.Scored("lif_a", 0), "b.weight": models.Scored("lif_a", 1)}


def flat_indices(flat):
    return flat.nonzero().flatten().tolist()


def test_global_magnitude_pruning_by_hand():
    masks = Masks(TwoLayers([[0.9, -0.1, 0.4]], [[0.05, -0.6], [0.2, 0.3]]))
    assert masks.keep_at(3 / 7) == 4
    pruned = masks.prune(4, masks.magnitudes(), generator())
    assert flat_indices(masks.flat) == [0, 2, 4, 6] and flat_indices(pruned) == [1, 3, 5]
    assert masks.alive["b.weight"].tolist() == [[False, True], [False, True]]
    assert masks.prune(2, masks.magnitudes(), generator()).sum() == 2
    assert flat_indices(masks.flat) == [0, 4]


def test_pruning_ranks_alive_weights_only():
    net = TwoLayers([[0.0, 0.0, 0.9]], [[0.5, 0.0]])
    masks = Masks(net)
    masks.flat.copy_(torch.tensor([False, True, True, True, False]))  # place 1 came back at 0
    masks.prune(3, masks.magnitudes(), generator())
    assert flat_indices(masks.flat) == [1, 2, 3]


def test_regeneration_by_hand():
    # scores of the three channels of the first layer; the classifier's weights take those they read
    net = TwoLayers([[0.5, -0.1], [0.4, 0.3], [0.2, 0.6]], [[0.7, 0.05, 0.15]])
    masks = Masks(net)
    magnitudes = masks.magnitudes()
    pruned = masks.prune(3, magnitudes, generator())  # 0.5 0.6 0.7 stay
    assert flat_indices(masks.flat) == [0, 5, 6]
    scores = masks.spread({"lif_a": torch.tensor([0.2, 0.9, 0.9])})
    keys = [scores, magnitudes]
    back = masks.regenerate(3, ~masks.flat, keys, generator())
    assert flat_indices(back) == [2, 3, 4]  # the 0.9s by |w|: 0.4, 0.3, then 0.2 before 0.15, 0.05
    net.a.weight.data.add_(0)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    masks.apply(optimizer)
    assert net.a.weight.flatten().tolist() == pytest.approx([0.5, 0, 0.4, 0.3, 0.2, 0.6])  # kept
    row = masks.record_update(pruned, back)
    assert (row["pruned"], row["regenerated"], row["survived"]) == (6, 3, 0.5)
    assert [layer["alive"] for layer in row["layers"]] == [5, 1]
    assert masks.share_regenerated == 0.5
    masks.record_update(masks.prune(3, masks.magnitudes(), generator()), torch.zeros_like(back))
    assert not (masks.returned & ~masks.flat).any()  # whoever leaves is forgotten


def test_prune_further_leaves_room():
    assert prune_further(0.6, 0.5) == pytest.approx(0.8)
    assert prune_further(0.9, 0.0) == 0.9
    assert prune_further(0.7959338, 0.5) == pytest.approx(0.8979669, abs=1e-7)


def small_net(seed=0, equal=False):
    torch.manual_seed(seed)
    net = models.build("small", 4, 1, 8, 2, [3, 4, 5, 4])
    if equal:
        for name in models.scored_by(net):
            net.get_parameter(name).data.fill_(0.5)
    return net


def train_a_little(net, masks, optimizer, seed):
    """One step of training; return the scores of its batch."""
    x = torch.randn(6, 1, 8, 8, generator=generator(seed)) * 3
    with models.recording(net, "max") as scores:
        logits = net(x)
    optimizer.zero_grad()
    training.loss_over_time(logits, torch.arange(6) % 4).backward()
    optimizer.step()
    masks.apply(optimizer)
    return scores


def update_by(metric, masks, scores, target, regen, candidates, seed):
    """One update as main has it: the score, then prune_and_regenerate."""
    rng = generator(seed)
    score = script.SCORES[metric](masks, scores, rng)
    return script.prune_and_regenerate(masks, target, regen, score, candidates, rng)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("candidates", ["all", "new"])
@pytest.mark.parametrize("metric", script.SCORES)
@pytest.mark.parametrize("regen", [0.0, 0.5, 0.9])
def test_algorithm_1_counts_are_exact(metric, regen, candidates, equal):
    net = small_net(equal=equal)
    masks = Masks(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9, weight_decay=0.1)
    for update in range(1, 7):
        scores = train_a_little(net, masks, optimizer, update)
        before, magnitudes = masks.flat.clone(), masks.magnitudes()
        momentum = torch.cat([optimizer.state[w]["momentum_buffer"].flatten()
                              for w in masks.weights.values()])
        target = training.sparsity_at(update, 6, 0.9)
        pruned, between, back, *_ = update_by(metric, masks, scores, target, regen, candidates,
                                             update)
        survivors = before & ~pruned
        assert survivors.sum() == (masks.total
                                   - round(prune_further(target, regen) * masks.total))
        assert between == 1 - int(survivors.sum()) / masks.total
        assert back.sum() == (round(prune_further(target, regen) * masks.total)
                              - round(target * masks.total))
        masks.apply(optimizer)
        assert masks.n_alive == masks.total - round(target * masks.total)
        assert all(masks.per_layer(masks.flat))
        now = masks.magnitudes()
        assert now[~masks.flat].count_nonzero() == 0
        for name, weight in masks.weights.items():
            dead = ~masks.alive[name]
            assert optimizer.state[weight]["momentum_buffer"][dead].count_nonzero() == 0
        kept = before & masks.flat  # survivors and those back at once keep value and momentum
        assert torch.equal(now[kept], magnitudes[kept])
        after = torch.cat([optimizer.state[w]["momentum_buffer"].flatten()
                           for w in masks.weights.values()])
        assert torch.equal(after[kept], momentum[kept])
        assert now[masks.flat & ~before].count_nonzero() == 0  # the long dead come back at 0
    assert masks.sparsity == pytest.approx(0.9, abs=1 / masks.total)


@pytest.mark.parametrize("metric", ["criticality", "gradient"])
@pytest.mark.parametrize("candidates", ["all", "new"])
def test_regeneration_equals_brute_force(metric, candidates):
    net = small_net(3)
    masks = Masks(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    checked = 0
    for update in range(1, 6):
        scores = train_a_little(net, masks, optimizer, 10 + update)
        before, magnitudes = masks.flat.clone(), masks.magnitudes()
        if metric == "criticality":  # each weight's own score, written out
            per_weight = []
            for i in range(4):
                weight = net.convs[i].conv.weight
                per_weight += [float(scores[f"lifs.{i}"][o]) for o in range(len(weight))
                               for _ in range(weight[0].numel())]
            per_weight += [float(scores["lifs.3"][c]) for _ in range(4) for c in range(4)]
            ranked = torch.tensor(per_weight, dtype=torch.float32)
        else:
            ranked = torch.cat([w.grad.flatten() for w in masks.weights.values()]).abs()
        target = training.sparsity_at(update, 5, 0.8)
        pruned, _, back, rescued, _ = update_by(metric, masks, scores, target, 0.4, candidates, 0)
        cut, _, tie_in_cut = brute_force(before, int((before & ~pruned).sum()), [magnitudes])
        competing = pruned if candidates == "new" else ~(before & ~pruned)
        best, rank, _ = brute_force(competing, int(back.sum()), [ranked, magnitudes])
        if not tie_in_cut:
            assert flat_indices(before & ~pruned) == sorted(cut)
        assert sorted(rank[i] for i in flat_indices(back)) == sorted(rank[i] for i in best)
        if not rescued:
            assert torch.equal(masks.flat, (before & ~pruned) | back)
        checked += len(best)
        masks.apply(optimizer)
    assert checked > 50


def test_candidates_all_and_new_differ():
    net = TwoLayers([[0.5, 0.4], [0.3, 0.2]], [[0.9, 0.8]])
    scores = {"lif_a": torch.tensor([0.1, 0.9])}
    back = {}
    for candidates in ("all", "new"):
        masks = Masks(net)
        masks.flat[3] = False  # 0.2, of the channel with the higher score, died long ago
        masks.flat[2] = False
        pruned, _, back[candidates], *_ = update_by("criticality", masks, scores, 1 / 3, 0.5,
                                                   candidates, 0)
        assert flat_indices(pruned) == [0, 1]
    assert flat_indices(back["all"]) == [2, 3] and flat_indices(back["new"]) == [0, 1]


# 20 weights: four channels of four weights, and a classifier that reads them
TWENTY = ([[.20, .18, .16, .14], [.12, .10, .08, .06], [.40, .38, .36, .34], [.32, .30, .28, .26]],
          [[.50, .35, .05, .02]])
TWENTY_SCORES = {"lif_a": torch.tensor([.1, .8, .5, .3])}


def update_of_twenty(items, **settings):
    """One update; items None: the text's. Return (masks, network, counts)."""
    net = TwoLayers(*TWENTY)
    masks = Masks(net, keep_momentum="momentum" in (items or ()))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    settings = dict(target=0.52, regen=0.2, score=masks.spread(TWENTY_SCORES), candidates="all",
                    generator=generator()) | settings
    if items is None:
        change = script.prune_and_regenerate(masks, **settings)
    else:
        change = script.prune_and_regenerate_as_published(masks, **settings, items=items,
                                                          optimizer=optimizer)
    masks.apply(optimizer)
    return masks, net, masks.record_update(change.pruned, change.regenerated, change.plain)


@pytest.mark.parametrize("items", [None, set(), {"zero"}])
def test_an_update_of_twenty_weights_in_the_text_s_reading(items):
    masks, net, counts = update_of_twenty(items)
    # of 20 - round(10.4) = 10 weights the 20 - round(12.32) = 8 largest stay; then two return by
    # the score and |w|
    assert flat_indices(masks.flat) == [4, 5, 8, 9, 10, 11, 12, 13, 16, 17]
    assert (counts["pruned"], counts["regenerated"]) == (12, 2)
    assert (counts["survived"], counts["survived_plain"]) == (2 / 12, 2 / 10)
    assert net.a.weight[1].tolist() == ([0] * 4 if items else pytest.approx([.12, .10, 0, 0]))


PUBLISHED_UPDATE = {"classifier", "zero", "ties"}


def test_an_update_of_twenty_weights_as_published():
    masks, net, counts = update_of_twenty(PUBLISHED_UPDATE)
    # T1: int(9.6) = 9, and strictly above the ninth: the classifier keeps 0.50 and 0.35. The rest
    # is 7, g = int(1.4) = 1; T2: strictly above the sixth of the others: five. One is to return,
    # but all four of its channel have its score
    assert flat_indices(masks.flat) == [4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 17]
    assert masks.n_alive == 9 + 2  # the target is overshot
    assert (counts["pruned"], counts["regenerated"]) == (13, 4)
    assert (counts["survived"], counts["survived_plain"]) == (4 / 13, 4 / 11)
    assert net.a.weight[1].tolist() == [0] * 4  # they return at 0
    assert net.a.weight[2].tolist() == pytest.approx([.40, .38, .36, .34])
    # r = 1: nothing but what returns, beside the classifier
    all_return, *_ = update_of_twenty(PUBLISHED_UPDATE, regen=1.0)
    assert flat_indices(all_return.flat) == [4, 5, 6, 7, 8, 9, 10, 11, 16, 17]
    gmp, *_ = update_of_twenty(PUBLISHED_UPDATE, regen=0.0)  # K = 7, strictly above the seventh
    assert flat_indices(gmp.flat) == [8, 9, 10, 11, 12, 13, 16, 17]


def test_each_item_of_the_published_update_by_itself():
    masks, *_ = update_of_twenty({"classifier"})
    # exact counts: 10 stay in a plain cut, 0.50 and 0.35 of them in the classifier; of the other 8
    # round(1.6) = 2 return
    assert flat_indices(masks.flat) == [4, 5, 8, 9, 10, 11, 12, 13, 16, 17]
    favoured = masks.spread(TWENTY_SCORES)
    favoured[18:] = 9.0  # the classifier's dead weights have the highest scores
    assert flat_indices(update_of_twenty(None, score=favoured)[0].flat)[-4:] == [16, 17, 18, 19]
    fixed, *_ = update_of_twenty({"classifier"}, score=favoured)
    assert flat_indices(fixed.flat)[-2:] == [16, 17] and fixed.n_alive == 10
    ties, *_ = update_of_twenty({"ties"})
    # K = 9, g = int(1.8) = 1; strictly above the eighth of all: seven, and a channel of four
    assert flat_indices(ties.flat) == [4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 17]
    new, *_ = update_of_twenty(PUBLISHED_UPDATE, candidates="new")
    assert flat_indices(new.flat) == [4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 17]


def test_a_published_update_beside_a_classifier_that_is_nearly_all():
    """T1 keeps three, strictly above the fourth; one of them is the classifier's. The rest is
    three, and there are two others: both stay."""
    net = TwoLayers([[.9, .8]], [[.5, .4], [.3, .2]])
    masks = Masks(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    change = script.prune_and_regenerate_as_published(
        masks, 0.3, 0.0, torch.rand(6), "all", generator(0), PUBLISHED_UPDATE, optimizer)
    assert flat_indices(masks.flat) == [0, 1, 2] and flat_indices(change.pruned) == [3, 4, 5]


def test_a_published_update_that_cuts_nothing_brings_nothing_new_back():
    """With a tenth alive and 80 % to be kept all weights that could come back died earlier."""
    for candidates, grows in (("new", False), ("all", True)):
        net = small_net(5)
        masks = Masks(net)
        masks.flat.fill_(False)
        masks.flat[:masks.total // 10] = True
        optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
        masks.apply(optimizer)
        score = torch.rand(masks.total, generator=generator(0))
        change = script.prune_and_regenerate_as_published(
            masks, 0.2, 0.2, score, candidates, generator(1), {"ties"}, optimizer)
        assert not change.pruned.any() and bool(change.regenerated.any()) == grows


@pytest.mark.parametrize("items", [set(), {"zero"}, {"classifier"}, {"classifier", "zero"}])
def test_published_items_without_ties_keep_the_counts(items):
    net = small_net(5)
    masks = Masks(net)
    optimizer, rescued = torch.optim.SGD(net.parameters(), 0.1, 0.9), 0
    for update in range(1, 7):
        scores = train_a_little(net, masks, optimizer, update)
        score = masks.spread(scores)
        target = training.sparsity_at(update, 6, 0.9)
        twin = Masks(net)
        twin.load_state_dict(masks.state_dict())
        before = masks.magnitudes()
        expected = script.prune_and_regenerate(twin, target, 0.5, score, "all", generator(update))
        found = script.prune_and_regenerate_as_published(
            masks, target, 0.5, score, "all", generator(update), items, optimizer)
        assert masks.n_alive == masks.keep_at(target)
        if "classifier" not in items and not found.rescued + expected.rescued:
            # one count may be rounded the other way
            assert int((masks.flat ^ twin.flat).sum()) <= 2
            assert torch.equal(found.plain, expected.plain)
        masks.apply(optimizer)
        now = masks.magnitudes()
        came_back = found.regenerated & masks.flat & (before > 0)
        rescued += int(came_back.sum())
        assert bool(now[came_back].any()) == ("zero" not in items and bool(came_back.any()))
    assert rescued > 10


@pytest.mark.parametrize("keep_momentum", [False, True])
def test_momentum_of_a_dead_weight_moves_it_on_its_return(keep_momentum):
    net = TwoLayers([[1.0, 2.0]], [[3.0]])
    masks = Masks(net, keep_momentum=keep_momentum)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
    masks.flat[0] = False
    for gradient in (1.0, 2.0):  # momentum 1, then 0.9 + 2
        net.a.weight.grad = torch.tensor([[gradient, 0.0]])
        optimizer.step()
        masks.apply(optimizer)
        assert net.a.weight[0].tolist() == [0, 2]
    assert masks.violation(optimizer) is None
    masks.flat[0] = True
    net.a.weight.grad = torch.zeros(1, 2)
    optimizer.step()
    momentum = 0.9 * 2.9 if keep_momentum else 0.0
    assert net.a.weight[0].tolist() == pytest.approx([-0.1 * momentum, 2])


def test_the_plain_cut_equals_brute_force():
    masks = Masks(TwoLayers(*TWENTY))
    masks.flat[[9, 16]] = False
    magnitudes = masks.magnitudes()
    for keep in range(19):
        alive = flat_indices(masks.flat)
        gone = sorted(alive, key=lambda i: float(magnitudes[i]))[:max(0, 18 - keep)]
        assert flat_indices(masks.cut_at(keep, magnitudes)) == sorted(gone)


def test_one_cosine_over_both_stages():
    """500 epochs: two thirds of the rate are left when pruning ends after 200."""
    rates = [training.cosine(0.3, epoch, 500) for epoch in (0, 200, 499)]
    assert rates == pytest.approx([0.3, 0.15 * (1 + math.cos(0.4 * math.pi)), 2.96e-6], abs=1e-8)
    assert rates[1] / 0.3 == pytest.approx(0.6545, abs=1e-4)


def test_the_published_loss():
    """The cross-entropy of the mean output, divided by T: a T-th of its gradient."""
    logits = torch.randn(5, 3, 4, generator=generator(), requires_grad=True)
    labels = torch.tensor([0, 3, 2])
    loss = training.loss_over_time(logits, labels, "mean-ce")
    expected = F.cross_entropy(logits.mean(0), labels) / 5
    assert loss.item() == pytest.approx(expected.item())
    assert training.loss_over_time(logits[:1], labels, "mean-ce").item() == pytest.approx(
        training.loss_over_time(logits[:1], labels).item())


def test_the_steps_of_an_update_have_one_order():
    """Regenerating before the cut, or by the |w| that the cut has left, ends in other masks."""
    net = TwoLayers([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]], [[0.6, 0.5, 0.4]])
    masks = Masks(net)
    scores = {"lif_a": torch.tensor([0.9, 0.5, 0.1])}
    change = update_by("criticality", masks, scores, 3 / 9, 0.5, "all", 0)
    # s = 3/9, s' = 6/9: the three largest stay, then three of the six best come back by score
    assert flat_indices(change.pruned) == [1, 3, 5, 6, 7, 8]
    assert flat_indices(change.regenerated) == [1, 6, 7]  # channel 0: 0.6, 0.1; channel 1: 0.5
    assert change.between == pytest.approx(6 / 9) and flat_indices(masks.flat) == [0, 1, 2, 4, 6, 7]


def test_a_run_of_the_script_is_algorithm_1(tmp_path, monkeypatch):
    """Each update of a run, replayed by brute force from what it began with."""
    seen = []

    def replay(masks, target, regen, score, candidates, rng):
        before, magnitudes = masks.flat.clone(), masks.magnitudes()
        change = original(masks, target, regen, score, candidates, rng)
        n = len(before)
        cut, _, tied = brute_force(before, n - round((target + regen * (1 - target)) * n),
                                   [magnitudes])
        left = torch.zeros(n, dtype=torch.bool)
        left[cut] = True
        best, _, also = brute_force(~left, n - round(target * n) - len(cut), [score, magnitudes])
        left[best] = True
        if not (tied or also or change.rescued):
            assert torch.equal(masks.flat, left)
            seen.append(target)
        return change

    original = script.prune_and_regenerate
    monkeypatch.setattr(script, "prune_and_regenerate", replay)
    script.main(["--run-dir", str(tmp_path / "r"), "--train-limit", "200", "--epochs-prune", "3",
                 "--epochs-finetune", "0", "--interval", "4", "--width", "0.25", "--batch-size",
                 "25", "--sparsity", "0.6", "--device", "cpu"])
    wanted = [0.6 * (1 - (1 - k / 6) ** 3) for k in range(1, 7)]
    assert len(seen) >= 3 and all(min(abs(t - w) for w in wanted) < 1e-12 for t in seen)


def ten_and_one():
    """Ten weights of 0.1 to 1.0 and a layer with one large weight: no layer is ever emptied."""
    net = TwoLayers([[0.1 * i for i in range(1, 11)]], [[5.0]])
    for weight in (net.a.weight, net.b.weight):
        weight.grad = torch.zeros_like(weight)
    return net, Masks(net)


def test_random_brings_back_each_with_the_same_chance():
    counts = torch.zeros(11)
    for seed in range(400):
        _, masks = ten_and_one()
        update_by("random", masks, {}, 6 / 11, 0.5, "all", seed)
        assert masks.n_alive == 5 and masks.flat[8:].all()  # 3 survive, 2 come back
        counts += masks.flat
    assert ((counts[:8] > 65) & (counts[:8] < 135)).all()  # 100 each, expected: 2 of 8


def test_gradients_of_zero_still_bring_back_the_count():
    _, masks = ten_and_one()
    update_by("gradient", masks, {}, 6 / 11, 0.5, "all", 0)
    assert flat_indices(masks.flat) == [6, 7, 8, 9, 10]  # all scores tie: by |w|


def test_rescue_keeps_every_layer_and_the_count():
    net = TwoLayers([[0.01, -0.03, 0.02]], [[0.5, 0.6], [0.7, 0.8]])
    masks = Masks(net)
    masks.prune(2, masks.magnitudes(), generator())
    assert masks.per_layer(masks.flat) == [0, 2]
    assert masks.rescue_empty_layers() == ["a.weight"]
    assert flat_indices(masks.flat) == [1, 6] and masks.n_alive == 2
    assert masks.rescue_empty_layers() == []


def test_momentum_and_decay_do_not_revive_dead_weights():
    net = small_net()
    masks = Masks(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.5, 0.9, weight_decay=0.1)
    train_a_little(net, masks, optimizer, 0)
    masks.flat.copy_(torch.rand(masks.total, generator=generator()) < 0.3)
    masks.apply(optimizer)
    dead = ~masks.flat
    for seed in range(4):
        train_a_little(net, masks, optimizer, seed)
        assert masks.magnitudes()[dead].count_nonzero() == 0
        assert masks.gradients()[dead].count_nonzero() > 0  # the dense gradient is still there


def test_masks_state_round_trip():
    masks = Masks(small_net())
    masks.prune(50, masks.magnitudes(), generator())
    masks.returned[:10] = True
    other = Masks(small_net())
    other.load_state_dict(masks.state_dict())
    assert torch.equal(other.flat, masks.flat) and torch.equal(other.returned, masks.returned)
    other.flat.fill_(True)
    assert other.alive["fc.weight"].all() and not masks.flat.all()  # views of its own vector


# ---- schedules -----------------------------------------------------------------------------------


def test_cubic_schedule():
    values = [training.sparsity_at(k, 39, 0.9) for k in range(1, 40)]
    for k, expected in {1: 0.067471, 2: 0.131482, 3: 0.192126, 13: 0.6333333, 20: 0.7959338,
                        26: 0.8666667, 38: 0.899985}.items():
        assert values[k - 1] == pytest.approx(expected, abs=1e-6)
    assert values[-1] == 0.9 and values == sorted(values)
    assert [training.sparsity_at(k, 2, 0.9, first=0.5) for k in (1, 2)] == pytest.approx(
        [0.85, 0.9])
    assert [training.sparsity_at(k, 4, 0.9) for k in (1, 2, 3, 4)] == pytest.approx(
        [0.5203125, 0.7875, 0.8859375, 0.9])
    for wrong in (0, 40):
        with pytest.raises(ValueError):
            training.sparsity_at(wrong, 39, 0.9)


def test_default_regeneration_rates():
    assert [script.default_regen(s, "cifar100")
            for s in (0.9, 0.95, 0.98, 0.5, 0.999)] == [0.5, 0.2, 0.1, 0.5, 0.1]
    assert [script.default_regen(s, "tiny-imagenet") for s in (0.9, 0.95, 0.98)] == [
        0.3, 0.1, 0.05]
    assert script.default_regen(0, "cifar10") == 0


# ---- training and metrics ------------------------------------------------------------------------


def test_loss_is_the_mean_over_time_of_cross_entropy():
    logits, labels = torch.randn(3, 5, 4, generator=generator()), torch.tensor([0, 1, 2, 3, 0])
    by_step = [F.cross_entropy(step, labels) for step in logits]
    assert training.loss_over_time(logits, labels) == pytest.approx(
        float(sum(by_step) / 3), abs=1e-6)


def test_cosine_and_stages():
    assert [training.cosine(0.3, step, 4) for step in range(4)] == pytest.approx(
        [0.3, 0.2560660, 0.15, 0.0439340], abs=1e-6)
    stages = training.Stages(10, prune=2, finetune=3)
    assert [stages.position(i) for i in (1, 20, 21, 50)] == [(0, 20), (19, 20), (0, 30), (29, 30)]
    assert stages.place(0) == ("prune", 0, 2) and stages.place(4) == ("finetune", 2, 3)
    assert (stages.epochs, stages.steps("prune")) == (5, 20)


def test_meter_finds_the_iteration_of_the_first_bad_loss():
    meter, logits, labels = (
        Meter(torch.device("cpu")), torch.eye(3)[None], torch.tensor([0, 1, 0]))
    meter.add(torch.tensor(0.5), logits, labels, 1)
    meter.check()
    assert meter.means() == (0.5, pytest.approx(2 / 3))
    for iteration, loss in ((2, math.nan), (3, 1.0), (4, math.inf)):
        meter.add(torch.tensor(loss), logits, labels, iteration)
    with pytest.raises(FloatingPointError, match="iteration 2"):
        meter.check()


@pytest.mark.parametrize("name, size, macs, once, every", [
    ("vgg16", 10, 313_201_664, 1_558_930_432, 1_566_008_320),
    ("vgg16", 100, 313_247_744, 1_559_160_832, 1_566_238_720),
    ("resnet19", 10, 555_551_232, 2_770_678_272, 2_777_756_160),
    ("resnet19", 100, 555_574_272, 2_770_793_472, 2_777_871_360)])
def test_macs_of_the_papers(name, size, macs, once, every):
    counts = metrics.count(models.build(name, size, 3, 32, 5), [torch.zeros(1, 3, 32, 32)])
    assert (counts["macs"], counts["macs_first_once"], counts["macs_every_step"]) == (
        macs, once, every)


def conv(mask, stride=1, padding=1):
    layer = torch.nn.Conv2d(mask.shape[1], mask.shape[0], mask.shape[2], stride, padding,
                            bias=False)
    return layer, mask


def test_synaptic_operations_by_hand():
    full = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    holed = full.clone()
    holed[..., 1, 1] = False
    ones, spikes = torch.ones(1, 4, 4), torch.zeros(1, 4, 4)
    for y, x in ((0, 0), (1, 1), (0, 2)):
        spikes[0, y, x] = 1
    assert metrics.fan_out(*conv(full), ones) == 100 and metrics.fan_out(*conv(holed), ones) == 84
    assert metrics.fan_out(*conv(full), spikes) == 19
    assert metrics.fan_out(*conv(full, stride=2), spikes) == 6
    two = full.expand(2, 1, 3, 3)
    assert metrics.fan_out(*conv(two), torch.ones(1, 2, 2)) == 32
    half = two.clone()
    half[1] = False
    assert metrics.fan_out(*conv(half), torch.ones(1, 2, 2)) == 16
    linear = torch.tensor([[True, False, True], [True, True, False]])
    assert metrics.fan_out(torch.nn.Linear(3, 2), linear, torch.tensor([2.0, 3.0, 5.0])) == 12


def synaptic_operations_one_by_one(net, alive, images):
    """Every spike, every alive weight it meets at an output inside the map: plain loops."""
    total, modules = 0, dict(net.named_modules())
    inputs = {}
    names = [n.removesuffix(".weight") for n in models.scored_by(net)]
    with metrics.hooks({n: modules[n] for n in names},
                       before=lambda n, x: inputs.setdefault(n, x.detach())):
        net(images)
    for name in names[1:]:
        if name in net.reads_numbers:
            continue
        module, x = modules[name], inputs[name]
        mask = alive[f"{name}.weight"]
        if isinstance(module, torch.nn.Linear):
            total += sum(float(x[n, i]) for n, i, o in itertools.product(
                range(len(x)), range(x.shape[1]), range(len(mask))) if mask[o, i])
            continue
        stride, pad, k = module.stride[0], module.padding[0], module.kernel_size[0]
        side = (x.shape[2] + 2 * pad - k) // stride + 1
        for n, c, y, z in x.nonzero().tolist():
            for dy, dx in itertools.product(range(k), range(k)):
                oy, ox = y + pad - dy, z + pad - dx
                if (oy % stride == ox % stride == 0 and 0 <= oy // stride < side
                        and 0 <= ox // stride < side):
                    total += int(mask[:, c, dy, dx].sum())
    return total / len(images)


def make_lively(net, name):
    """Let the neurons of a network fire, in eval mode. Return masks of half of its weights."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.bias.data.fill_(1.2 if name == "small-avg" else 0.6)
    if name == "resnet19":
        net.fc1.bias.data.fill_(1.5)
    net.eval()
    masks = Masks(net)
    masks.prune(masks.total // 2, masks.magnitudes(), generator())
    return masks


@pytest.mark.parametrize("name", ["small", "resnet19", "small-avg", "resnet19-pre"])
def test_synaptic_operations_equal_loops(name):
    """Layers that read averages, or the real-valued stream, do MACs and no synaptic operations."""
    torch.manual_seed(0)
    factor = 0.03 if name.startswith("resnet19") else 0.2
    net = models.build(name, 3, 1, 10, 2, models.default_widths(name, factor))
    masks = make_lively(net, name)
    images = torch.randn(3, 1, 10, 10, generator=generator())
    counts = metrics.count(net, images.split(2), masks.alive)  # two batches, the last one smaller
    assert counts["sops"] == pytest.approx(synaptic_operations_one_by_one(net, masks.alive, images))
    assert counts["sops"] > 100 and counts["sops"] < counts["sops_nominal"]
    layers, times = metrics.macs(net.config), dict.fromkeys(net.reads_numbers, 2)  # T = 2
    first, *_ = layers
    times |= {first: 1}
    if name == "resnet19-pre":
        times["blocks.0.shortcut"] = 1  # its stream is the same at each step
    whole = layers[first]  # the input layer counts whole, the others with their alive weights
    density = {layer: float(masks.alive[f"{layer}.weight"].double().mean()) for layer in times}
    real = whole + sum(layers[layer] * n * density[layer]
                       for layer, n in times.items() if layer != first)
    assert net.reads_numbers == set() or min(density.values()) < 1
    assert layers[first] == counts_first(net)
    once = {first, "blocks.0.shortcut"} if name == "resnet19-pre" else {first}
    assert counts["macs_first_once"] == sum(
        count if layer in once else 2 * count for layer, count in layers.items())
    assert counts["energy_mj"] == pytest.approx((4.6 * real + 0.9 * counts["sops"]) * 1e-9)


@pytest.mark.parametrize("name, expected", [("vgg16", 245_617_664), ("resnet19", 468_167_168)])
def test_synaptic_operations_at_rate_one(name, expected):
    """All inputs of all layers but the first spike: the sheet's totals, borders exact."""
    net, inputs = models.build(name, 10, 3, 32, 1).eval(), {}
    layers = {n: net.get_submodule(n) for n in
              (weight.removesuffix(".weight") for weight in models.scored_by(net))}
    with metrics.hooks(layers, before=lambda n, x: inputs.update({n: x[0].shape})):
        net(torch.zeros(1, 3, 32, 32))
    total = sum(metrics.fan_out(module, torch.ones_like(module.weight, dtype=torch.bool),
                                torch.ones(inputs[n]))
                for n, module in list(layers.items())[1:] if n not in net.reads_numbers)
    assert total == expected


def test_neurobench_by_hand():
    """4 pixels, one of them 0, into one neuron that fires at all 3 steps, into two that are silent."""
    net = models.build("gradr-linear", 2, 1, 2, 3, [1]).eval()
    with torch.no_grad():
        net.hidden[0].weight.copy_(torch.tensor([[9.0, 1.0, 0.0, 0.0]]))
        net.fc.weight.copy_(torch.tensor([[0.1], [0.0]]))
    image = torch.tensor([[[[5.0, 0.0], [2.0, 3.0]]]])
    counts = metrics.count(net, [image])
    assert counts["neurobench"] == dict(
        Footprint=4 * 6 + 4 * 2,  # the weights; mean and std
        ConnectionSparsity=3 / 6, ActivationSparsity=1 - 3 / 9,
        SynapticOperations=dict(Effective_MACs=1, Effective_ACs=3, Dense=4 + 3 * 2))
    assert counts["footprint_bytes"] == 32
    assert counts["sops"] == 2 * 3  # with a weight that is alive, and 0
    assert metrics.footprint(net.double()) == 64


def operations_of_each_image(net, images):
    """[effective MACs, effective ACs, dense]: a nonzero input that meets a nonzero weight, image by
    image and step by step, by a convolution of zeros and ones."""
    found, one_by_one = [0, 0, 0], {}

    def look(name, x):
        one_by_one.setdefault(name, []).append(x)

    with metrics.hooks(metrics.prunable_layers(net), before=look):
        net(images)
    for name, (x,) in one_by_one.items():
        module = net.get_submodule(name)
        weight = (module.weight != 0).double()

        def apply(x, weight):
            if x.dim() == 2:
                return float((x @ weight.T).sum())
            return float(F.conv2d(x, weight, None, module.stride, module.padding).sum())

        is_binary = set(x.unique().tolist()) <= {-1, 0, 1}
        found[int(is_binary)] += apply((x != 0).double(), weight)
        found[2] += apply(torch.ones_like(x).double(), torch.ones_like(weight))
    return [count / (images.shape[1] if images.dim() == 5 else len(images)) for count in found]


@pytest.mark.parametrize("name, encoding", [
    ("small", "direct"), ("small-avg", "direct"), ("small", "rate"), ("small", "events"),
    ("resnet19", "direct"), ("resnet19-pre", "direct")])
def test_neurobench_equals_each_image_by_itself(name, encoding):
    torch.manual_seed(0)
    factor = 0.03 if name.startswith("resnet19") else 0.2
    channels = 2 if encoding == "events" else 1
    net = models.build(name, 3, channels, 10, 2, models.default_widths(name, factor), encoding)
    masks = make_lively(net, name)
    for weight, mask in masks.alive.items():
        net.get_parameter(weight).data.mul_(mask)
    draw = torch.rand if encoding == "rate" else torch.randn
    images = draw(3, 1, 10, 10, generator=generator())
    batches = images.split(2)  # the last one smaller
    if encoding == "events":
        images = torch.poisson(torch.full((2, 3, 2, 10, 10), 0.4), generator())
        batches = images.split(2, 1)
    counts = metrics.count(net, batches, masks.alive)
    found = counts["neurobench"]
    operations = found["SynapticOperations"]
    assert list(operations.values()) == pytest.approx(operations_of_each_image(net, images))
    assert found["ConnectionSparsity"] == pytest.approx(counts["sparsity"])
    assert found["ActivationSparsity"] == 1 - counts["firing_rate"]
    # a count of n is n synaptic operations, and one effective MAC; the averages that this ResNet-19
    # reads are all 0 or 1
    if encoding != "events" and name != "resnet19":
        assert operations["Effective_ACs"] == pytest.approx(counts["sops"])
    assert (operations["Effective_MACs"] > 0) == (encoding != "rate")
    assert 0 < operations["Effective_ACs"] < operations["Dense"] < counts["macs_first_once"]


@pytest.mark.parametrize("count", [1, 255])
def test_sums_of_spikes_are_exact_under_autocast(count):
    """bfloat16 has 8 bits: a sum of 257 ones is 256 there."""
    net = models.build("small", 3, 2, 8, 1, [1, 1, 1, 1], "events").eval()
    frames = torch.full((1, 257, 2, 8, 8), count, dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16):
        found = metrics.count(net, [frames])
    mask = torch.ones_like(net.convs[0].conv.weight, dtype=torch.bool)
    assert found["layer_sops"]["convs.0.conv"] == metrics.fan_out(
        net.convs[0].conv, mask, torch.full((2, 8, 8), float(count)))
    assert found["layer_sops"]["convs.0.conv"] == count * 2 * 22 * 22  # 22: 3 taps but at an edge


def test_predictions_are_exact_under_autocast():
    """4 + 1/64 and 4 have one sum over time in bfloat16: the later class would lose the tie."""
    logits = torch.tensor([[[4, 4]], [[0, 1 / 64]]], dtype=torch.bfloat16)  # [T, N, K]
    images, labels = torch.zeros(1, 1, 8, 8), torch.tensor([1])
    meter = Meter(torch.device("cpu"))
    meter.add(torch.tensor(0.0), logits, labels)
    assert meter.sums[1] == 1
    net = models.build("small", 2, 1, 8, 2, [1, 1, 1, 1])
    args = SimpleNamespace(device="cpu", precision="bf16", loss="ce")
    found = training.evaluate(lambda x: net(x) * 0 + logits, net, [(images, labels)], args)
    assert found["accuracy"] == 1


@pytest.mark.parametrize("empty, once", [((), ["blocks.0"]), ((0,), ["blocks.0"]),
                                         ((0, 1, 2), ["blocks.0", "blocks.3"])])
def test_what_reads_the_constant_stream_runs_once(empty, once):
    """A block without inner channels is its shortcut: the stream behind it is constant as well."""
    widths = models.default_widths("resnet19-pre", 0.03)
    for block in empty:
        widths[1 + 3 * block] = widths[2 + 3 * block] = 0
    net = models.build("resnet19-pre", 3, 1, 8, 4, widths).eval()
    times = {}
    with metrics.hooks(metrics.prunable_layers(net),
                       before=lambda name, x: times.update({name: len(x)})):
        net(torch.zeros(1, 1, 8, 8))
    assert [name for name, n in times.items() if n == 1] == [
        "stem", *(f"{name}.shortcut" for name in once)]
    layers = metrics.macs(net.config)
    assert metrics.conventions(net.config, 4)["macs_first_once"] == sum(
        count * times[name] for name, count in layers.items())
    rate = net.config | dict(encoding="rate")
    found = metrics.conventions(rate, 4)
    assert found["macs_first_once"] == found["macs_every_step"] == 4 * sum(layers.values())


def counts_first(net):
    first = net.get_parameter(next(iter(models.scored_by(net))))
    return first.numel() * 100  # a 10 x 10 map


def test_firing_rate_is_over_all_neurons():
    net = models.build("small", 3, 1, 8, 2, [1, 1, 1, 1]).eval()
    spikes = []
    with metrics.hooks(models.lifs(net), after=lambda _, out: spikes.append(out)):
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.bias.data.fill_(0.8)
        net(torch.randn(4, 1, 8, 8, generator=generator()))
    with metrics.firing(net) as counted:
        net(torch.randn(4, 1, 8, 8, generator=generator()))
    rate, by_layer = metrics.rates(counted)
    assert rate == pytest.approx(
        sum(int(s.count_nonzero()) for s in spikes) / sum(s.numel() for s in spikes))
    assert list(by_layer.values()) == pytest.approx([s.detach().mean().item() for s in spikes])
    assert not any(lif._forward_hooks for lif in models.lifs(net).values())


def test_sparsities():
    net = small_net()
    masks = Masks(net)
    masks.prune(masks.keep_at(0.75), masks.magnitudes(), generator())
    counts = metrics.parameters(net, masks.alive)
    total = sum(p.numel() for p in net.parameters())
    assert counts["sparsity"] == pytest.approx(masks.sparsity)
    assert counts["parameters_alive"] == total - (masks.total - masks.n_alive)
    assert counts["sparsity_all"] == pytest.approx((masks.total - masks.n_alive) / total)
    assert sum(layer["alive"] for layer in counts["layers"]) == masks.n_alive


# ---- the text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("equation, file", [
    ("1", "neurons.py"), ("2", "neurons.py"), ("3", "neurons.py"), ("4a", "neurons.py"),
    ("4b", "neurons.py"), ("5", "masks.py"), ("6", "neurons.py"), ("7", "masks.py"),
    ("8", "masks.py"), ("9", "training.py"), ("10", "prune_structured.py")])
def test_each_equation_has_its_line(equation, file):
    text = (Path(__file__).parent / file).read_text()
    assert len(re.findall(
        rf"^\s*[^#\s].*# Eq\. {equation}\b|^\s*# Eq\. {equation}\.", text, re.M)) == 1
