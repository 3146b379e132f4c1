"""What a network costs, and what can be seen inside it.

    counts = metrics.count(net, batches_of_images, masks.alive)
    counts["sops"], counts["energy_mj"], counts["firing_rate"]
    found = metrics.class_statistics(net, labelled_batches, num_classes=10)
    mean, variance = found["unit"]  # or "published"

Costs are parameters, sparsity, MACs, synaptic operations, energy and firing rates.
Inside are features, their spread over each class, and the entropy of spike counts.

What is counted, and how:
- MACs: multiply-accumulates of convolutions and linear layers on the stored shapes,
  taps on the padding included. BN (foldable), bias, pooling, the residual sum and the
  LIF update are not counted. A masked network has the count of the dense one. 1 MAC is
  2 FLOPs. There are three conventions for the first layer, whose input does not change
  over time: `macs` is one time step (what papers call "FLOPs"); `macs_first_once` is
  all T steps with the first layer run once, as models.py does, and with it the first
  shortcut of a pre-activation ResNet, which reads the same stream; `macs_every_step`
  is all T steps of every layer. A first layer whose input does change, spikes drawn
  from pixels or frames of events, runs at all steps in both.
- SOPs: synaptic operations. One is a spike arriving at an alive weight: each input
  spike counts the alive weights that it meets at output positions inside the map,
  borders exact; per image, over all T steps. A layer that reads real numbers and not
  spikes does MACs and no SOPs: the first one, one behind average pooling, and the
  shortcut of a pre-activation ResNet. A first layer that reads spikes or counts of
  events does SOPs, n for a count of n events.
- Energy: 4.6 pJ a MAC of the layers that read real numbers (as often as they run) and
  0.9 pJ a SOP, in mJ an image: 45 nm arithmetic in 32-bit floating point (Horowitz
  2014), no memory traffic. It is a model, not a measurement. INTERPRETATION: a layer
  that reads averages does the MACs of its alive weights, as SOPs count alive weights;
  the first layer counts whole, as papers add its "FLOPs" to the SOPs.
- Firing rate: spikes / (T * N * neurons), of the network over all its neurons, not the
  mean of the layers' rates.
- NeuroBench's metrics (Yik et al. 2025, arXiv 2304.04640), under the names of its
  package: see neurobench(). docs/metrics.md says where they differ from the above.
"""
import math
import statistics
import time
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
import plans
from models import lifs, scored_by
from neurons import widest

PJ_PER_MAC, PJ_PER_SOP = 4.6, 0.9


@contextmanager
def hooks(modules, before=None, after=None):
    """While inside, call before(name, input) and after(name, output) for each module.

    modules: {name: module}. before, after: functions, or None.
    """
    handles = []
    for name, module in modules.items():
        if before is not None:
            handles.append(module.register_forward_pre_hook(
                lambda _, inputs, name=name: before(name, inputs[0])))
        if after is not None:
            handles.append(module.register_forward_hook(
                lambda _, __, output, name=name: after(name, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prunable_layers(net):
    """Return {name: layer} of the layers whose weights can be pruned, in order."""
    names = [weight.removesuffix(".weight") for weight in scored_by(net)]
    return {name: net.get_submodule(name) for name in names}


@contextmanager
def firing(net):
    """Count spikes while inside: yield {LIF name: [spikes, a tensor; places where one
    could be, a number]}."""
    counts = {}

    def add(name, spikes):
        seen = counts.setdefault(name, [0, 0])
        # exact, since float32 holds whole numbers to 2**24; much faster than
        # count_nonzero
        by_image = spikes.sum(tuple(range(2, spikes.dim())), dtype=torch.float32)
        seen[0] = seen[0] + by_image.sum(dtype=widest(spikes.device))
        seen[1] += spikes.numel()

    with hooks(lifs(net), after=add):
        yield counts


def rates(counts):
    """Return (rate of the network, {LIF name: rate}) from what firing() counted."""
    totals = torch.stack([spikes for spikes, _ in counts.values()]).tolist()
    spikes = dict(zip(counts, totals))
    places = {name: seen[1] for name, seen in counts.items()}
    by_layer = {name: spikes[name] / places[name] for name in counts}
    return sum(spikes.values()) / sum(places.values()), by_layer


def footprint(net):
    """Return how many bytes a network takes in memory as it is stored: its parameters
    and buffers, zeros included."""
    tensors = [*net.parameters(), *net.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def parameters(net, alive=None):
    """Return sizes and sparsities of a network: a dict with the keys of summary.json.

    alive: {name: bool tensor, True = alive}; None: all weights are alive. `sparsity` is
    over the prunable weights, `sparsity_all` over all parameters, of which BN and
    biases are all alive.
    """
    layers = []
    for name in scored_by(net):
        weights = net.get_parameter(name).numel()
        n_alive = weights if alive is None else int(alive[name].count_nonzero())
        layers.append(dict(name=name, weights=weights, alive=n_alive))
    total = sum(parameter.numel() for parameter in net.parameters())
    prunable = sum(layer["weights"] for layer in layers)
    n_alive = sum(layer["alive"] for layer in layers)
    return dict(parameters=total, parameters_alive=total - prunable + n_alive,
                layers=layers, sparsity=1 - n_alive / prunable,
                sparsity_all=(prunable - n_alive) / total,
                footprint_bytes=footprint(net))


_macs = {}  # what macs() has counted, {repr of the network: {layer: MACs}}


@torch.no_grad()
def macs(config, time_steps=1):
    """Return {layer: MACs} of the network models.build(**config), of one time step, or
    of more with an input that does not change.

    Nothing is computed: the network is built and run on torch's meta device.
    """
    # the encoding of the input changes no count of one step
    direct = config | dict(time_steps=time_steps, encoding="direct")
    # a run asks for the same counts many times, and a network takes some 50 ms
    key = repr((direct, plans.NETWORKS.get(config["name"])))
    if key not in _macs:
        with torch.device("meta"):
            net = models.build(**direct).eval()
            image = torch.empty(1, config["in_channels"], *[config["image_size"]] * 2)
        with FlopCounterMode(display=False) as counter:
            net(image)
        # {"VGG.fc": {operation: FLOPs}}, 2 FLOPs a MAC
        by_module = counter.get_flop_counts()
        _macs[key] = {name: sum(by_module[f"{type(net).__name__}.{name}"].values()) // 2
                      for name in prunable_layers(net)}
    return dict(_macs[key])


def conventions(config, time_steps):
    """Return the three MAC counts of an image, a dict, for models.build(**config).

    macs: one step. macs_first_once: all steps, of the layers before the first LIF once
    where the encoding allows it. macs_every_step: all steps of every layer.
    """
    one_step = macs(config)
    total = sum(one_step.values())
    first_once = every_step = time_steps * total
    if config["encoding"] == "direct":
        two_steps = macs(config, 2)
        once = sum(count for name, count in one_step.items()
                   if two_steps[name] == count)  # a second step does not run them again
        first_once -= (time_steps - 1) * once
    return dict(macs=total, macs_first_once=first_once, macs_every_step=every_step)


def fan_out(module, mask, inputs):
    """Return the synaptic operations that a map of spike counts causes in a layer
    (float).

    inputs: [C, H, W] or [C], spikes summed over steps and images. mask: bool, like the
    weight. It is one convolution with the number of alive weights in place of the
    weights, so that borders come out right.
    """
    # exact: neither autocast nor a GPU rounds float64 on the CPU
    inputs, mask = inputs.cpu().double(), mask.cpu()
    arrivals = mask.sum(0, dtype=inputs.dtype)  # [C, kh, kw]: alive weights that read c
    if isinstance(module, nn.Linear):
        return float((inputs * arrivals).sum())
    reached = F.conv2d(inputs[None], arrivals[None], None, module.stride,
                       module.padding)
    return float(reached.sum())


def summed(x):
    """Return the sum of the spikes [T * N, C, ...] that a layer reads, [C, ...].

    It is a product with ones: many times faster than sum(0) on a CPU, and as exact,
    since float32 holds whole numbers to 2**24. Autocast would round it to the 8 bits of
    bfloat16.
    """
    rows = x.movedim(1, -1)  # as channels_last has it in memory
    flat = rows.flatten(1).float()
    with torch.autocast(flat.device.type, enabled=False):
        spikes = (flat.new_ones(len(flat)) @ flat).to(widest(x.device))
    return spikes.view(rows.shape[1:]).movedim(-1, 0)


def neurobench(net, rate, arrivals, real, runs, images):
    """Return NeuroBench's metrics of a network, a dict, from what count() has seen.

    rate: the firing rate. arrivals: {layer: [C, H, W] or [C], how often each of its
    inputs was not 0}. real: {layer: whether it read any number but 0, 1 and -1}, of the
    layers that may. runs: {layer: on how many maps it ran}. images: their number.

    Footprint: bytes. ConnectionSparsity: the share of the stored weights that are 0.
    ActivationSparsity: 1 - rate. SynapticOperations: an image's over all T, exact at
    borders; a nonzero input that meets a nonzero weight is one, a MAC in a layer that
    reads real numbers, else an AC. Dense has all inputs and weights, zeros included.
    """
    zeros = weights = 0
    totals = dict(Effective_MACs=0.0, Effective_ACs=0.0, Dense=0.0)
    for name, module in prunable_layers(net).items():
        nonzero = module.weight != 0
        weights += nonzero.numel()
        zeros += nonzero.numel() - int(nonzero.count_nonzero())
        kind = "Effective_MACs" if real.get(name) else "Effective_ACs"
        totals[kind] += fan_out(module, nonzero, arrivals[name])
        every_input = torch.ones_like(arrivals[name])
        totals["Dense"] += runs[name] * fan_out(module, torch.ones_like(nonzero),
                                                every_input)
    operations = {kind: total / images for kind, total in totals.items()}
    return dict(Footprint=footprint(net), ConnectionSparsity=zeros / weights,
                ActivationSparsity=1 - rate, SynapticOperations=operations)


@torch.inference_mode()
def count(net, batches, alive=None):
    """Run the network over batches of images and return all counts of this file as a
    dict.

    batches: an iterable of images [N, C, H, W] or [T, N, C, H, W].
    alive: {name: bool tensor, True = alive}; None: all weights are alive. Besides the
    keys of summary.json, of which `neurobench` is a dict (see neurobench):
    `sops_nominal` (rate * MACs * T, which overstates at borders),
    `firing_rates` {LIF name: rate} and `layer_sops` {layer: SOPs}. Memory does not grow
    with the number of images.
    """
    layers = prunable_layers(net)
    layer_macs = macs(net.config)
    reads_numbers, first = set(net.reads_numbers), next(iter(layers))
    if net.encoding == "direct":
        reads_numbers.add(first)
    not_binary = reads_numbers | {first}  # events come as counts
    sums, nonzero, real, runs, images_seen = {}, {}, {}, {}, 0

    def arrive(name, x):
        runs[name] = runs.get(name, 0) + len(x)
        if name not in reads_numbers:
            sums[name] = sums.get(name, 0) + summed(x)
        if name in not_binary:
            nonzero[name] = nonzero.get(name, 0) + summed(x != 0)
            real[name] = real.get(name, False) | ((x != 0) & (x.abs() != 1)).any()

    with (models.evaluating(net), firing(net) as spikes,
          hooks(layers, before=arrive)):
        for images in batches:
            net(images)
            images_seen += len(images) if images.dim() == 4 else images.shape[1]

    rate, by_layer = rates(spikes)
    steps = max(runs.values()) / images_seen
    real_macs, nominal, sops = 0.0, 0.0, {}
    for name, module in layers.items():
        if alive is None:
            mask = torch.ones_like(module.weight, dtype=torch.bool)
        else:
            mask = alive[f"{name}.weight"]
        if name in reads_numbers:
            density = 1.0
            if name in net.reads_numbers:  # averages or a real-valued stream
                density = int(mask.count_nonzero()) / mask.numel()
            # a layer runs once, or at every step
            real_macs += density * layer_macs[name] * runs[name] / images_seen
            continue
        sops[name] = fan_out(module, mask, sums[name]) / images_seen
        share = float(sums[name].sum()) / (runs[name] * sums[name].numel())
        nominal += share * layer_macs[name] * steps
    total = sum(sops.values())
    picojoules = PJ_PER_MAC * real_macs + PJ_PER_SOP * total
    return (parameters(net, alive)
            | conventions(net.config, round(steps))
            | dict(sops=total, sops_nominal=nominal, layer_sops=sops,
                   energy_mj=picojoules * 1e-9, firing_rate=rate,
                   firing_rates=by_layer,
                   neurobench=neurobench(net, rate, sums | nonzero, real, runs,
                                         images_seen)))


def wait(device):
    """Wait until a device has done all that it was given: a GPU works on while the host
    goes on."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.inference_mode()
def speedup(dense, small, images, seconds=2.0):
    """Return how many times faster `small` predicts than `dense`: the median over pairs
    of runs. The two networks take turns, so that what else the machine does slows both.

    images: a batch on the device of the two networks, which are put into eval mode.
    seconds: how long to measure; at least 5 pairs, at most 200, after two that only
    warm up.
    """
    def timed(net):
        started = time.perf_counter()
        net(images)
        wait(images.device)
        return time.perf_counter() - started

    dense.eval()
    small.eval()
    ratios, end = [], math.inf
    while len(ratios) < 7 or (time.perf_counter() < end and len(ratios) < 202):
        if len(ratios) == 2:
            end = time.perf_counter() + seconds
        ratios.append(timed(dense) / timed(small))
    return statistics.median(ratios[2:])


# ---- what can be seen inside ---------------------------------------------------------


def inverted(rows):
    """Return (max - x) / (max - min) within each row of [N, F]: the largest value is
    0, the smallest 1.

    published code: it normalises features and importances like this.
    INTERPRETATION: a row of equal values, such as a silent sample, is 1 throughout,
    as silent channels are; the formula has 0 / 0 there.
    """
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return torch.where(high > low, (high - rows) / (high - low), 1.0)


@torch.inference_mode()
def class_statistics(net, batches, num_classes):
    """Return the mean feature of each class, [K, F], and its intra-cluster variance,
    [K], both float64 (on mps float32), for two kinds of features: {kind: (mean,
    variance)}. A class without a sample gets NaN.

    batches: an iterable of (images, labels). It takes one pass, and memory for classes
    x features. The kinds:

    unit: what enters the classifier, averaged over T and divided by its L2 norm
        (INTERPRETATION of "normalize"; one without a spike stays 0). The variance is
        the mean squared Euclidean distance of the samples to their mean.
    published: published code. The spikes of the last LIF before the classifier, summed
        over T and the map, [C], and inverted(). The variance is that of each feature,
        unbiased, averaged over the features; NaN for a class of one sample.
    """
    classifier = list(prunable_layers(net))[-1]
    dtype = widest(next(net.parameters()).device)
    seen, count = {}, 0

    def enter(_, x):  # a spiking output may follow
        seen["entering"], seen["last"] = x, seen["spikes"]

    sums, squares = dict(unit=0, published=0), dict(unit=0, published=0)
    with (hooks(lifs(net), after=lambda _, spikes: seen.update(spikes=spikes)),
          hooks({classifier: net.get_submodule(classifier)}, before=enter)):
        for images, labels in batches:
            net(images)
            by_step = seen["entering"].unflatten(0, (-1, len(labels)))  # [T, N, F]
            spikes = seen["last"].to(dtype).sum(0)  # [N, C, ...]
            spikes = spikes.flatten(2).sum(2) if spikes.dim() > 2 else spikes
            features = dict(unit=F.normalize(by_step.to(dtype).mean(0)),
                            published=inverted(spikes))
            member = F.one_hot(labels, num_classes).to(dtype).T  # [K, N]
            count = count + member.sum(1)
            for kind, feature in features.items():
                sums[kind] = sums[kind] + member @ feature
                squares[kind] = squares[kind] + member @ feature.square().sum(1)
    found = {}
    for kind in sums:
        mean = sums[kind] / count[:, None]
        # E|x|^2 - |E x|^2, and 0, not -1e-17
        variance = (squares[kind] / count - mean.square().sum(1)).clamp(min=0)
        if kind == "published":
            variance = variance * count / (count - 1) / mean.shape[1]
        found[kind] = mean, variance
    return found


@torch.inference_mode()
def spike_counts(net, batches, aggregate="max"):
    """Return {LIF name: (entropy, criticality)} over batches of images, [C] in float64
    each, on mps in float32.

    entropy: in bits, of the distribution of a neuron's spike count over the T steps of
    an image, averaged over the neurons of a channel: 0 for a neuron that does the same
    for all images, at most log2(T + 1). criticality: Eq. 6. Memory does not grow with
    the number of images.
    """
    histograms, sums, total = {}, {}, 0

    def watch(name, spikes):
        spikes = spikes.sum(0)  # [N, C, ...]
        rows = torch.stack([(spikes == n).sum(0) for n in range(net.time_steps + 1)])
        histograms[name] = histograms.get(name, 0) + rows

    with hooks(lifs(net), after=watch):
        for images in batches:
            with models.recording(net, aggregate) as scores:
                net(images)
            n = images.shape[-4]
            for name, score in scores.items():
                sums[name] = sums.get(name, 0) + score * n
            total += n
    found = {}
    for name, rows in histograms.items():
        bits = entropy(rows)  # [C, ...]
        bits = bits.flatten(1).mean(1) if bits.dim() > 1 else bits
        found[name] = bits, sums[name] / total
    return found


def entropy(histogram):
    """Return the entropy in bits of distributions along dimension 0, given as
    counts."""
    share = histogram.to(widest(histogram.device)) / histogram.sum(0)
    return torch.special.entr(share).sum(0) / math.log(2)


def ranks(values):
    """Return the rank of each value; ties share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def spearman(one, other):
    """Return Spearman's rank correlation of two rows, NaN where one of them is
    constant."""
    one, other = ranks(one), ranks(other)
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return np.nan
    return np.corrcoef(one, other)[0, 1]
