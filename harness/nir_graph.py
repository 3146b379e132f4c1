"""A network as a graph of NIR, the neuromorphic intermediate representation (Pedersen
et al. 2024, arXiv 2311.14641), which simulators and the tools of chips read.

    graph = to_nir(net)                            # a nir.NIRGraph
    values = run(graph, graph_input(net, images))  # {node: [T, N, ...]}
    lines = export_nir(net, folder, images)        # model.nir, read back and run

The nodes have the names of the network's layers. Convolution and batch normalisation
(BN) are one Conv2d; what a residual block adds is two edges into one node, whose inputs
NIR sums. Weights that are 0 stay 0.

NIR describes a neuron in continuous time, tau dv/dt = (v_leak - v) + r I. One step of
length dt by the forward Euler method is

    h = v + ((v_leak - v) + r I) / (tau / dt)

which is Eq. 1 with tau = dt * LIF.tau, r = 1 and v_leak = v_reset. An input that is not
decayed has r = LIF.tau. dt is 1e-4 s: snnTorch reads files with no other, and it is
SpikingJelly's default. NIR says nothing of the potential at the start, which is v_reset
here and 0 elsewhere. So potentials are counted from v_reset: in a file v_leak and
v_reset are 0, and the threshold is v_threshold - v_reset.

A neuron of NIR fires at h > v_threshold, those of this project at h >= v_threshold
(unless they are strict). The file has the threshold as it is; export_nir() counts the
spikes that depend on it. The surrogate matters in training alone.
"""
import contextlib
import copy
import graphlib
import importlib
import importlib.metadata
import io
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import nir
import numpy as np
import torch
import torch.nn.functional as F

import inputs
import models
from harness import files
from harness.output import in_a_line
from neurons import LIF

DT = 1e-4  # seconds, the length of a time step
BATCH = 32  # images at a time, so that the spikes of all layers fit into memory
MOST = 0.001  # of the spikes may differ: by rounding, and what follows from it
LEAST = 0.9  # of the predictions must be equal


# ---- a network as a graph ------------------------------------------------------------


class Draft(NamedTuple):
    """A graph that is being made: {name: node}, and edges (from, to)."""

    nodes: dict
    edges: list


class Signal(NamedTuple):
    """What enters a node: the sum of what other nodes put out.

    sources: their names. shape: of one image at one step, (C, H, W) or (features,).
    """

    sources: tuple
    shape: tuple


def to_nir(net):
    """Return a network of models.build or models.load as a nir.NIRGraph.

    The graph reads what graph_input() makes of images, a step at a time, and puts out
    the logits of the step. The class is the largest of their sum over T. Its metadata
    say so, with all that it takes to feed the graph: see metadata_of().
    Raises ValueError for neurons that NIR does not have.
    """
    for name, lif in models.lifs(net).items():
        if lif.reset != "hard":
            raise ValueError(f"{name} has a {lif.reset} reset, expected a hard one: "
                             f"NIR has no neuron that subtracts its threshold. Export "
                             f"to another format, or train with the hard reset")
    shape = (len(net.mean), *(net.image_size + -net.image_size % pad_to(net),) * 2)
    draft = Draft({"input": nir.Input(np.array(shape))}, [])
    kinds = {models.VGG: vgg, models.ResNet19: resnet,
             models.PreResNet19: preactivation_resnet}
    out = kinds[type(net)](draft, net, Signal(("input",), shape))
    add(draft, "output", nir.Output(np.array(out.shape)), out, out.shape)
    return nir.NIRGraph(*draft, metadata=metadata_of(net))


def vgg(draft, net, signal):
    """Add the layers of a models.VGG. Return its output."""
    lifs = dict(enumerate(net.lifs))
    for i, (layer, pooled) in enumerate(zip(net.convs, net.pooled)):
        signal = add_conv_bn(draft, f"convs.{i}", signal, layer)
        signal = add_lif(draft, f"lifs.{i}", signal, lifs[i])
        if pooled == "P":
            signal = add_max_pool(draft, f"pools.{i}", signal)
        elif pooled == "A":
            signal = add_average(draft, f"pools.{i}", signal, 2)
    signal = add_flatten(draft, signal)
    for i, layer in enumerate(net.hidden):
        signal = add_linear(draft, f"hidden.{i}", signal, layer)
        number = len(net.convs) + i
        signal = add_lif(draft, f"lifs.{number}", signal, lifs[number])
    signal = add_linear(draft, "fc", signal, net.fc)
    if net.lif_out is not None:
        signal = add_lif(draft, "lif_out", signal, net.lif_out)
    if net.votes > 1:
        classes = signal.shape[0] // net.votes
        mean = np.kron(np.eye(classes), np.full(net.votes, 1 / net.votes))
        node = nir.Linear(weight=mean.astype(np.float32))
        signal = add(draft, "votes", node, signal, (classes,))
    return signal


def resnet(draft, net, signal):
    """Add the layers of a models.ResNet19. Return its output."""
    signal = add_conv_bn(draft, "stem", signal, net.stem)
    signal = add_lif(draft, "lif", signal, net.lif)
    for i, block in enumerate(net.blocks):
        name, shortcut = f"blocks.{i}", signal
        if block.shortcut is not None:
            shortcut = add_conv_bn(draft, f"{name}.shortcut", signal, block.shortcut)
        inner = add_conv_bn(draft, f"{name}.conv1", signal, block.conv1)
        inner = add_lif(draft, f"{name}.lif1", inner, block.lif1)
        outer = add_conv_bn(draft, f"{name}.conv2", inner, block.conv2)
        signal = add_lif(draft, f"{name}.lif2", summed(outer, shortcut), block.lif2)
    signal = add_average(draft, "pool", signal, signal.shape[1])
    signal = add_linear(draft, "fc1", add_flatten(draft, signal), net.fc1)
    signal = add_lif(draft, "lif_fc", signal, net.lif_fc)
    return add_linear(draft, "fc2", signal, net.fc2)


def preactivation_resnet(draft, net, signal):
    """Add the layers of a models.PreResNet19. Return its output.

    The stream between the blocks is a sum of nodes, which each of its readers sums
    anew.
    """
    stream = add_conv(draft, "stem", signal, net.stem)
    for i, block in enumerate(net.blocks):
        name, shortcut = f"blocks.{i}", stream
        if block.shortcut is not None:
            shortcut = add_conv(draft, f"{name}.shortcut", stream, block.shortcut)
        if block.is_empty:
            stream = shortcut
            continue
        inner = add_picked(draft, f"{name}.norm1", stream, block.norm1)
        inner = add_lif(draft, f"{name}.lif1", inner, block.lif1)
        inner = add_conv_bn(draft, f"{name}.conv1", inner, block.conv1)
        inner = add_lif(draft, f"{name}.lif2", inner, block.lif2)
        outer = add_conv(draft, f"{name}.conv2", inner, block.conv2)
        stream = summed(outer, shortcut)
    signal = add_picked(draft, "norm", stream, net.norm)
    signal = add_lif(draft, "lif", signal, net.lif)
    signal = add_average(draft, "pool", signal, signal.shape[1])
    return add_linear(draft, "fc", add_flatten(draft, signal), net.fc)


def summed(one, other):
    """Return the sum of two signals of one shape: edges of both enter what reads it."""
    return Signal(one.sources + other.sources, one.shape)


def add(draft, name, node, signal, shape):
    """Add a node that reads a signal. Return its output, of the given shape."""
    draft.nodes[name] = node
    draft.edges.extend((source, name) for source in signal.sources)
    return Signal((name,), tuple(shape))


def array(tensor):
    """Return a tensor as an array of float32."""
    return tensor.detach().cpu().numpy().astype(np.float32)


def add_conv_bn(draft, name, signal, layer):
    """Add a models.ConvBN as one convolution."""
    return add_conv(draft, name, signal, layer.conv, getattr(layer, "bn", None))


def add_conv(draft, name, signal, conv, bn=None):
    """Add a convolution, with the BN behind it where there is one."""
    weight = conv.weight.detach().double()
    bias = weight.new_zeros(len(weight))
    if conv.bias is not None:
        bias = conv.bias.detach().double()
    if bn is not None:
        scale, shift = scale_and_shift(bn)
        weight, bias = weight * scale.view(-1, 1, 1, 1), bias * scale + shift
    return add_kernel(draft, name, signal, weight, bias, conv.stride, conv.padding)


def scale_and_shift(bn):
    """Return what BN does in eval mode, x * scale + shift: two [C] tensors of
    float64."""
    scale = bn.weight.detach().double() / (bn.running_var.double() + bn.eps).sqrt()
    return scale, bn.bias.detach().double() - bn.running_mean.double() * scale


def add_picked(draft, name, signal, norm):
    """Add a models.PickBN: a 1x1 convolution with one weight a channel, that which it
    picks. (BN cannot be part of the convolutions before it: the shortcut reads them
    too.)"""
    scale, shift = scale_and_shift(norm.bn)
    weight = scale.new_zeros(len(scale), norm.stream, 1, 1)
    weight[torch.arange(len(scale)), norm.picked, 0, 0] = scale
    return add_kernel(draft, name, signal, weight, shift, (1, 1), (0, 0))


def add_kernel(draft, name, signal, weight, bias, stride, padding):
    """Add a convolution with these weights [C', C, K, K] and biases [C']."""
    node = nir.Conv2d(input_shape=signal.shape[1:], weight=array(weight), stride=stride,
                      padding=padding, dilation=(1, 1), groups=1, bias=array(bias))
    return add(draft, name, node, signal, node.output_type["output"].tolist())


def add_linear(draft, name, signal, linear):
    """Add a linear layer, with a bias or without."""
    weight = array(linear.weight)
    if linear.bias is None:
        node = nir.Linear(weight)
    else:
        node = nir.Affine(weight, array(linear.bias))
    return add(draft, name, node, signal, (len(weight),))


def add_flatten(draft, signal):
    """Add the flattening of a map. Its dimensions are counted from the last one: so it
    is right with and without a batch, which readers treat differently."""
    node = nir.Flatten({"input": np.array(signal.shape)},
                       start_dim=-len(signal.shape), end_dim=-1)
    return add(draft, "flatten", node, signal, (int(np.prod(signal.shape)),))


def add_average(draft, name, signal, size):
    """Add an average pooling over squares of `size` pixels."""
    node = nir.AvgPool2d(**square(size))
    return add(draft, name, node, signal, pooled_shape(signal.shape, size))


def square(size):
    """Return the arguments of a pooling over squares that do not overlap."""
    return dict(kernel_size=np.array([size, size]), stride=np.array([size, size]),
                padding=np.array([0, 0]))


def pooled_shape(shape, size):
    """Return the shape of a map behind a pooling over squares of `size` pixels."""
    channels, *sides = shape
    return (channels, *(side // size for side in sides))


def add_lif(draft, name, signal, lif):
    """Add the neurons of a neurons.LIF, one for each element of the signal."""
    tau = float(1 / lif.w.detach().sigmoid()) if lif.learn_tau else lif.tau
    return add_neurons(draft, name, signal, tau, r=1.0 if lif.decay_input else tau,
                       v_threshold=lif.v_threshold - lif.v_reset)


def add_neurons(draft, name, signal, tau, r, v_threshold):
    """Add LIF neurons that rest at 0 and reset to 0. tau: in time steps.

    Their parameters are float64, so that tau / dt is again tau in float32.
    """
    values = dict(tau=tau * DT, r=r, v_leak=0.0, v_threshold=v_threshold, v_reset=0.0)
    node = nir.LIF(**{key: np.full(signal.shape, value)
                      for key, value in values.items()})
    return add(draft, name, node, signal, signal.shape)


def add_max_pool(draft, name, signal):
    """Add a 2x2 max-pooling of spikes: a sum, and neurons that fire if it is above 0.

    It is exact: the maximum of numbers that are 0 or 1 is 1 exactly if their sum is 1
    or more. With tau = 2 dt a neuron that starts a step at 0 has h = sum / 2, which is
    0, or at least 1/2. It fires above 1/4, and is back at 0 in either case: nothing is
    left for the next step.

    IF neurons, which do not leak, with the threshold 1/2 would do the same. But
    SpikingJelly reads an IF only with r = 1 / dt, and snnTorch only with r = 1, as a
    leaky neuron with a soft reset.
    """
    shape = pooled_shape(signal.shape, 2)
    signal = add(draft, f"{name}.sum", nir.SumPool2d(**square(2)), signal, shape)
    return add_neurons(draft, f"{name}.max", signal, tau=2, r=1.0, v_threshold=0.25)


def metadata_of(net):
    """Return what a graph does not say, a dict of numbers, arrays and strings.

    network, time_steps, dt (seconds). encoding, input and output: what to feed and how
    to read, in words. mean, std: [C], the normalisation. pad: how many pixels of black
    stand on the four sides (left, right, above, below). class_names: a list in JSON,
    or null.
    """
    missing = -net.image_size % pad_to(net)
    before = missing // 2
    feed = {"direct": "at each step the same image, (pixel / 255 - mean) / std, padded "
                      "with black pixels, 0, before that",
            "rate": "at each step spikes, 0 or 1, drawn with the probability pixel / "
                    "255",
            "events": "at step t the counts of events of frame t"}[net.encoding]
    return dict(
        network=net.config["name"], time_steps=net.time_steps, dt=DT,
        encoding=net.encoding, input=feed,
        output="logits of a step; the class is the largest of their sum over all steps",
        mean=array(net.mean), std=array(net.std),
        pad=np.array([before, missing - before] * 2),
        class_names=json.dumps(net.class_names))


def pad_to(net):
    """Return the number whose multiple the sides of an image are, once padded."""
    return getattr(net, "pad_to", 1)


# ---- running a graph -----------------------------------------------------------------


def graph_input(net, images):
    """Return what the graph of a network reads, [T, N, C, H, W].

    images: as models.predict takes them, uint8 [N, C, H, W]; events [N, T, 2, H, W].
    With rate coding they are the spikes of the network's own draw in eval mode.
    """
    x_seq = net._input(inputs.as_input(net, images), pad_to(net))
    return x_seq.expand(net.time_steps, *x_seq.shape[1:])


def run(graph, x_seq):
    """Run a NIR graph without loops, node by node, each over all steps. Return what
    each node puts out, {name: [T, N, ...]}, in the type of x_seq.

    x_seq: [T, N, ...]. The neurons do what NIR says, by the forward Euler method with
    a step of DT.
    """
    readers = {name: [a for a, b in graph.edges if b == name] for name in graph.nodes}
    values = {}
    for name in graph_order(readers):
        node = graph.nodes[name]
        arriving = [values[source] for source in readers[name]]
        total = sum(arriving[1:], arriving[0]) if arriving else x_seq
        values[name] = RUN[type(node).__name__](node, total)
    return values


def graph_order(sources):
    """Return the names of nodes, each behind those that it reads."""
    return list(graphlib.TopologicalSorter(sources).static_order())


def as_tensor(values, like):
    """Return the values of a node, of the type of another tensor."""
    return torch.as_tensor(np.asarray(values)).to(like.device, like.dtype)


def run_lif(node, x_seq):
    """Return the spikes of LIF neurons over time."""
    steps = as_tensor(node.tau / DT, x_seq)  # tau in time steps
    r, v_leak, v_threshold, v_reset = (
        as_tensor(values, x_seq)
        for values in (node.r, node.v_leak, node.v_threshold, node.v_reset))
    v, s_seq = torch.zeros_like(x_seq[0]), []
    for x in x_seq:
        h = v + ((v_leak - v) + r * x) / steps
        s = h > v_threshold
        v = torch.where(s, v_reset, h)
        s_seq.append(s.to(x.dtype))
    return torch.stack(s_seq)


def run_conv(node, x_seq):
    """Return the convolution of each step."""
    weight, bias = as_tensor(node.weight, x_seq), as_tensor(node.bias, x_seq)
    stride, padding, dilation = (tuple(int(n) for n in pair) for pair in (
        node.stride, node.padding, node.dilation))
    return models.fused(
        lambda x: F.conv2d(x, weight, bias, stride, padding, dilation,
                           int(node.groups)), x_seq)


def run_average(node, x_seq):
    """Return the average pooling of each step."""
    size, stride, padding = (tuple(int(n) for n in pair) for pair in (
        node.kernel_size, node.stride, node.padding))
    return models.fused(lambda x: F.avg_pool2d(x, size, stride, padding), x_seq)


def run_sum(node, x_seq):
    """Return the sum pooling of each step."""
    return run_average(node, x_seq) * float(np.prod(node.kernel_size))


def run_flatten(node, x_seq):
    """Return the flattened map; dimensions count without time and batch."""
    first = int(node.start_dim)
    return x_seq.flatten(first + 2 if first >= 0 else first, int(node.end_dim))


def run_linear(node, x_seq):
    """Return a linear map, with a bias or without."""
    bias = getattr(node, "bias", None)
    return F.linear(x_seq, as_tensor(node.weight, x_seq),
                    None if bias is None else as_tensor(bias, x_seq))


RUN = {"Input": lambda node, x_seq: x_seq, "Output": lambda node, x_seq: x_seq,
       "Conv2d": run_conv, "LIF": run_lif, "AvgPool2d": run_average,
       "SumPool2d": run_sum, "Flatten": run_flatten, "Affine": run_linear,
       "Linear": run_linear}


# ---- a file, read back and run -------------------------------------------------------

READERS = {  # {framework: (its package, the module whose import_from_nir reads files)}
    "SpikingJelly": ("spikingjelly", "spikingjelly.activation_based.nir_exchange"),
    "snnTorch": ("snntorch", "snntorch.import_nir")}


def export_nir(net, folder, images):
    """Write a network to folder/model.nir, once it is read back and run. Return what
    came out, a list of lines to print.

    net: on a CPU, in eval mode. images: to run it on, as graph_input() takes them. The
    file is run by the equations of NIR, and by SpikingJelly and snnTorch where they are
    installed; the spikes of all layers are compared, over all steps, with the
    network's. Nothing is written if it raises ValueError, as to_nir() does, or
    files.Disagrees, for a file that does not do what the network does. Raises OSError
    if it cannot be written.
    """
    graph, path = to_nir(net), Path(folder, "model.nir")
    content = io.BytesIO()
    nir.write(content, graph)
    content = content.getvalue()
    weights = [node.weight for node in graph.nodes.values() if hasattr(node, "weight")]
    size, alive = sum(w.size for w in weights), sum(map(np.count_nonzero, weights))
    lines = [f"{path}: {len(content):,} bytes, {len(graph.nodes)} nodes, "
             f"{alive:,} of {size:,} weights are not 0; T = {net.time_steps}, "
             f"dt = {DT:g} s"]
    if net.encoding == "rate":
        lines.append("rate coding: the file takes spikes, and whoever runs it draws "
                     "them; compared on the network's own draw")
    with tempfile.TemporaryDirectory() as trial:
        made = Path(trial, path.name)
        made.write_bytes(content)
        own, runs = nir.read(made), {}
        runs["NIR's equations"] = lambda x_seq: run(own, x_seq)
        for name, (package, module) in READERS.items():
            try:
                version = importlib.metadata.version(package)
                runs[f"{name} {version}"] = through(module, made)
            except Exception as error:  # of any class: it is another project's code
                lines.append(f"not read by {name}: {reason(error)}")
    tallies, ties = compare(net, images, runs)
    for name, one in tallies.items():
        unlike = "" if is_alike(one) else ", which does something else"
        lines.append(f"run by {name}{unlike}: {in_words(one)}")
    tally = tallies["NIR's equations"]
    lines.append(at_threshold(net, ties, tally["spikes"]))
    if not is_alike(tally):
        cause = "Was the neuron of neurons.py or a network of models.py changed?"
        if ties:
            cause = lines[-1]
        raise files.Disagrees(f"{path.name} would not do what the network does and is "
                              f"not written: {in_words(tally)}, expected differences "
                              f"by rounding alone. {cause}")
    files.write_whole(path, lambda file: file.write(content), "wb")
    return lines


def reason(error):
    """Return an error of another project in a few words."""
    name = getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and name and "." not in name:
        return f"{name} is not installed (pip install {name})"
    return in_a_line(error)


def through(module, path):
    """Return a function that runs a file as a framework reads it, x_seq -> {node: [T,
    N, ...]}, of neurons and of the output.

    module: where the framework has import_from_nir.
    """
    graph = nir.read(path)
    names = [name for name, node in graph.nodes.items() if isinstance(node, nir.LIF)]
    with contextlib.redirect_stdout(io.StringIO()):  # snnTorch prints all parameters
        net = importlib.import_module(module).import_from_nir(graph)

    found = {}
    for name in names:
        def keep(part, args, out, name=name):
            found[name].append(out[0] if isinstance(out, tuple) else out)

        net.get_submodule(name.replace(".", "_")).register_forward_hook(keep)

    def outputs(x_seq):
        found.update({name: [] for name in (*names, "output")})
        for part in net.modules():
            if hasattr(part, "reset_mem"):  # snnTorch's neurons keep their potential
                part.reset_mem()
        state = None
        for x in x_seq:
            out, state = net(x, state)
            found["output"].append(out)
        return {name: torch.stack(values) for name, values in found.items()}

    return outputs


@torch.no_grad()
def compare(net, images, runs):
    """Return how runs of a graph differ from the network on images, {name of a run:
    tally}; and how many spikes depend on a neuron that is at its threshold exactly.

    runs: {name: function x_seq -> {node: [T, N, ...]}}.
    A tally has these counts: differ, {layer: spikes that differ}, of so many spikes;
    wrong, images in which some do, and equal, predictions that are equal, of so many
    images. logits: the largest difference of their sum over T. failed: the error that
    the run has raised, None without one.
    """
    tallies = {name: dict(differ=dict.fromkeys(models.lifs(net), 0), spikes=0, wrong=0,
                          equal=0, images=0, logits=0.0, failed=None) for name in runs}
    ties = 0
    for part in images.split(BATCH):
        spikes, logits, tied = run_network(net, part)
        ties += tied
        x_seq = graph_input(net, part)
        for name, tally in tallies.items():
            if tally["failed"] is None:
                try:
                    count(tally, runs[name](x_seq), spikes, logits)
                except Exception as error:  # of any class, as above
                    tally["failed"] = reason(error)
    return tallies, ties


def count(tally, found, spikes, logits):
    """Add to a tally what differs on some images.

    found: what a graph put out, {node: [T, N, ...]}. spikes, logits: of the network, as
    from run_network().
    """
    is_wrong = torch.zeros(len(logits), dtype=torch.bool)
    for layer, own in spikes.items():
        unequal = (found[layer] != own).transpose(0, 1).flatten(1)
        tally["differ"][layer] += int(unequal.sum())
        tally["spikes"] += unequal.numel()
        is_wrong |= unequal.any(1)
    total = found["output"].sum(0)
    tally["wrong"] += int(is_wrong.sum())
    tally["equal"] += int((total.argmax(1) == logits.argmax(1)).sum())
    tally["images"] += len(logits)
    tally["logits"] = max(tally["logits"], float((total - logits).abs().max()))


def is_alike(tally):
    """Return whether rounding explains a tally: at most 0.1 % of the spikes differ,
    and at least 90 % of the predictions are equal."""
    return (tally["failed"] is None
            and sum(tally["differ"].values()) <= MOST * tally["spikes"]
            and tally["equal"] >= LEAST * tally["images"])


def in_words(tally):
    """Return a tally in words."""
    if tally["failed"] is not None:
        return f"an error, {tally['failed']}"
    where = [f"{layer} {n:,}" for layer, n in tally["differ"].items() if n]
    text = f"{sum(tally['differ'].values()):,} of {tally['spikes']:,} spikes differ"
    if where:
        text += (f" ({', '.join(where)}; in {tally['wrong']:,} of {tally['images']:,} "
                 f"images)")
    return (f"{text}, logits by {tally['logits']:.2g} at most; {tally['equal']:,} of "
            f"{tally['images']:,} predictions are equal")


def at_threshold(net, ties, spikes):
    """Return in words how many of the spikes depend on what a neuron does at its
    threshold exactly."""
    is_strict = any(lif.strict for lif in models.lifs(net).values())
    fires, silent = "here and in SpikingJelly", "in NIR and snnTorch"
    if is_strict:
        fires, silent = "in SpikingJelly", "here, in NIR and snnTorch"
    return (f"{ties:,} of {spikes:,} spikes depend on whether a neuron fires at h = "
            f"v_threshold exactly: it does {fires}, not {silent}")


def run_network(net, images):
    """Return what a network does with images: the spikes of each LIF, {name: [T, N,
    ...]}; the sum of its logits over T, [N, K]; and how many spikes differ if a neuron
    fires at h > v_threshold instead of h >= v_threshold, or the other way round if it
    is strict."""
    spikes, tied, hooks = {}, [], []
    for name, lif in models.lifs(net).items():
        other = copy.copy(lif)
        other.strict = not lif.strict

        def keep(lif, args, out, name=name, other=other):
            spikes[name] = out
            tied.append(int((LIF.forward(other, *args) != out).sum()))

        hooks.append(lif.register_forward_hook(keep))
    out = net(inputs.as_input(net, images)).sum(0)
    for hook in hooks:
        hook.remove()
    return spikes, out, sum(tied)
