"""What a neuromorphic chip needs for a network: neurons, synapses, memory, traffic and
cores, layer by layer.

    lines = chip.report(net, images, "runs/NAME/export")    # report.json, .md, .png
    found = chip.needs(net, images)                         # the same numbers, a dict

On a chip there are no tensors. A neuron has its own synapses, one for each alive weight
that it reads inside the map, borders exact. So a kernel of 9 weights makes 9 synapses
for each neuron of a channel, and fewer at the border. What is assumed:

- Batch normalisation is folded into the weights before it and a bias for each channel.
  Biases, thresholds and other state of a neuron are not counted as synapses or bytes.
- A maximum over spikes takes neurons of its own: one a window, which fires when any of
  its neurons does. These are the rows "pool". A chip that pools spikes on their way
  needs none of them.
- An average takes none, since it is linear. The layer behind it reads the neurons of
  the window themselves, each by a synapse with its part of the weight.
- The identity of a residual block is one synapse a neuron.
- A spike that arrives at one of these synapses is a synaptic operation too. So the
  total is above `sops` of summary.json, which holds none of poolings and identities,
  and MACs for layers behind averages.
- The first layer of direct coding reads real-valued pixels, the same at each step. Its
  synapses are counted like all others, and do MACs, once, instead of synaptic
  operations.
- The outputs without a neuron, the logits, are a neuron each, which only adds up.
- The pre-activation ResNet-19 passes real numbers between its blocks. For it there are
  no cores, and its rows are the layers as they stand: fan-in is that of a place of the
  stream, of which the neurons behind it may read some channels alone.

Cores. The neurons of a layer fill one core after the other, in the order of the map,
channel after channel. A core is full when its neurons or the synapses of these reach
the limit. No core has neurons of two layers. Without weight sharing a core stores each
synapse of its neurons. With it, as some chips have it for convolutions, a core stores
the alive weights of a channel once for all its neurons of this channel. Not counted:
the cores' limits of other things, such as axons, and the addresses of sparse weights.

The default core is that of Loihi (Davies et al. 2018, IEEE Micro 38(1), pp. 82-99): a
chip has 128 cores, a core 1,024 neurons and 128 KB of synaptic memory, which are
131,072 synapses at 8 bits each. What a synapse needs beside its weight, such as the
address of its neuron, comes on top there, so that fewer fit. (Its 4,096 input and 4,096
output axons a core are not checked.)
"""
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import inputs
import metrics
import models
from harness.files import why_not_drawn, write_json, write_whole

CORE_NEURONS, CORE_SYNAPSES, CHIP_CORES = 1024, 128 * 1024, 128  # Loihi
BITS = (32, 8, 4)
BATCH = 64  # images that run at a time


# ---- what the network is -------------------------------------------------------------


class Traffic(NamedTuple):
    """What layers read and neurons fire, summed over all steps of some images."""

    images: int
    inputs: dict  # {layer: [C, H, W] or [C], what it reads}
    runs: dict    # {layer: on how many maps it ran}
    spikes: dict  # {LIF: [C, H, W] or [C]}
    source: dict  # {layer: the LIF that it reads, at once or through a pooling; None of
                  # the first layer}


@torch.inference_mode()
def traffic(net, images):
    """Run a network over images and return the Traffic. images: as models.predict takes
    them, batch first."""
    seen, last = Traffic(len(images), {}, {}, {}, {}), None

    def arrive(name, x):
        seen.inputs[name] = seen.inputs.get(name, 0) + metrics.summed(x).cpu()
        seen.runs[name] = seen.runs.get(name, 0) + len(x)
        seen.source[name] = last  # a network runs a layer right behind what it reads

    def fire(name, spikes):
        nonlocal last
        last = name
        total = metrics.summed(spikes.flatten(0, 1)).cpu()
        seen.spikes[name] = seen.spikes.get(name, 0) + total

    with (models.evaluating(net),
          metrics.hooks(metrics.prunable_layers(net), before=arrive),
          metrics.hooks(models.lifs(net), after=fire)):
        for x in images.split(BATCH):
            last = None
            net(inputs.as_input(net, x))
    return seen


def alive_weights(net, name):
    """Return which weights of a layer are alive, on the CPU: by net.masks, or without a
    mask those that are not 0."""
    mask = (net.masks or {}).get(f"{name}.weight")
    if mask is None:
        mask = net.get_submodule(name).weight != 0
    return mask.cpu()


def pooled_side(net, spikes, read):
    """Return the side of the windows that a layer reads a map of neurons through, 1
    without a pooling. spikes: [C, H, W] or [C], of the neurons. read: [C, h, w] or
    [C * h * w], what the layer reads."""
    if spikes.numel() == read.numel():
        return 1
    return 2 if isinstance(net, models.VGG) else spikes.shape[1]  # the whole map


def synapses_of(module, mask, read):
    """Return (fan-in of each output [C', H', W'] or [C'], fan-out of each input), whole
    numbers in int64: the alive weights inside the map.

    mask: bool, like the weight. read: a tensor of the shape of the layer's input, [C,
    H, W] or [C].
    """
    if isinstance(module, nn.Linear):
        return mask.sum(1), mask.sum(0)
    # exact: float32 holds whole numbers to 2**24
    weight, ones = mask.float(), torch.ones(1, *read.shape)
    fan_in = F.conv2d(ones, weight, None, module.stride, module.padding)
    fan_out = nn.grad.conv2d_input(ones.shape, weight, torch.ones_like(fan_in),
                                   module.stride, module.padding)
    return fan_in[0].long(), fan_out[0].long()


# ---- what it takes -------------------------------------------------------------------


def needs(net, images, core_neurons=CORE_NEURONS, core_synapses=CORE_SYNAPSES):
    """Return what a chip needs for a network, a dict: `layers`, a list of rows, and
    `total`, `busiest`, `cores`.

    images: a tensor or array as models.predict takes it; they give spikes and
    operations. core_neurons, core_synapses: how many a core holds.
    A row has these keys; numbers of operations and spikes are those of an image over
    all T steps:
        layer, kind     its name; "convolution", "linear", "pool" or "identity"
        reads, feeds    the neurons that it reads, and those that it feeds, by LIF
        neurons         that it feeds; 0 where the row of another layer has them
        weights, alive  stored weights, and those of them that are alive
        bytes           {bits: of the alive weights}, without addresses
        synapses, synapses_dense      alive; if all weights were
        fan_in_mean, fan_in_max       synapses of this layer of a neuron that it feeds
        fan_out_mean, fan_out_max     synapses of this layer of a neuron that it reads
        spikes          of the neurons that it feeds; None where there are none
        sops, macs      synaptic operations; multiply-accumulates where it reads real
                        numbers
        cores, cores_shared     for all synapses of the neurons that it feeds, without
                        and with weight sharing; None where another row has them, or no
                        core holds one of the neurons
    Raises ValueError for images of another kind and sizes below 1.
    """
    for name, value in (("core_neurons", core_neurons),
                        ("core_synapses", core_synapses)):
        if type(value) is not int or value < 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{name} is {value!r}, expected a whole number of at "
                             f"least 1, such as 1024. Change {flag}")
    seen = traffic(net, inputs.images_for(net, images))
    rows, groups = [], {}  # the neurons of a group are fed by several rows
    has_cores = not isinstance(net, models.PreResNet19)
    for row, fan_in, kernels in connections(net, seen):
        if any(row["feeds"] == other["feeds"] for other in rows):
            row.update(neurons=0, spikes=None)  # they are counted already
        rows.append(row)
        if has_cores:
            group = groups.setdefault(row["feeds"], dict(row=row, fan_in=0, kernels=0))
            group["fan_in"] = group["fan_in"] + fan_in.flatten()
            group["kernels"] = group["kernels"] + kernels

    for group in groups.values():
        group["row"].update(
            cores=cores(group["fan_in"], core_neurons, core_synapses),
            cores_shared=cores_shared(group["kernels"], len(group["fan_in"]),
                                      core_neurons, core_synapses))
    busiest = max(rows, key=lambda row: row["sops"])
    found = dict(images=seen.images, time_steps=net.time_steps, layers=rows,
                 total=total(rows), busiest=busiest["layer"])
    found["cores"] = dict(
        core_neurons=core_neurons, core_synapses=core_synapses,
        without_sharing=sum_of_cores(groups, "cores"),
        with_sharing=sum_of_cores(groups, "cores_shared"),
        too_large=[name for name, group in groups.items()
                   if group["row"]["cores"] is None])
    return found


def sum_of_cores(groups, key):
    """Return the cores of all neurons; None where one of them fits into no core, and
    for a network without cores."""
    counts = [group["row"][key] for group in groups.values()]
    return sum(counts) if counts and None not in counts else None


def total(rows):
    """Return the sums over the rows, a dict."""
    keys = ("neurons", "weights", "alive", "synapses", "synapses_dense", "sops", "macs")
    sums = {key: sum(row[key] for row in rows) for key in keys}
    sums["spikes"] = sum(row["spikes"] for row in rows if row["spikes"] is not None)
    sums["bytes"] = bytes_of(sums["alive"])
    return sums


def bytes_of(weights):
    """Return {bits: bytes} of a number of weights."""
    return {bits: math.ceil(weights * bits / 8) for bits in BITS}


def connections(net, seen):
    """Yield (row, fan-in of each neuron that it feeds, stored weights of each of their
    channels) for all layers, poolings and identities, in the order of the network."""
    for name in metrics.prunable_layers(net):
        source, side = seen.source[name], 1
        reads_stream = name in net.reads_numbers and name.endswith("shortcut")
        if source is not None and not reads_stream:
            side = pooled_side(net, seen.spikes[source], seen.inputs[name])
        if side > 1 and name not in net.reads_numbers:  # a maximum
            yield pool_row(name, source, side, seen)
            source, side = f"pool of {source}", 1
        if reads_stream:
            source = "stream"
        elif source is None:
            source = {"direct": "pixels", "rate": "spikes of pixels",
                      "events": "events"}[net.encoding]
        yield layer_row(net, name, source, side, seen)
        block = name.removesuffix(".conv2.conv")
        if block != name and isinstance(net, models.ResNet19):
            if net.get_submodule(block).shortcut is None:
                yield identity_row(net, block, seen)


def fed_by(net, name):
    """Return the LIF that a layer feeds; "output" for logits, which feed none."""
    scored = models.scored_by(net)[f"{name}.weight"]
    return scored.lif if scored.dim == 0 else "output"


def layer_row(net, name, source, side, seen):
    """Return what connections() yields for a layer. source: what it reads. side: of the
    windows whose averages it reads; 1: it reads no averages."""
    module, mask = net.get_submodule(name), alive_weights(net, name)
    read = arriving = seen.inputs[name]
    sources = read.numel()
    if side > 1:
        spikes = seen.spikes[source]
        sources = spikes.numel()
        arriving = F.avg_pool2d(spikes[None], side, divisor_override=1)  # their sum
        arriving = arriving.reshape(read.shape)
    fan_in, fan_out = synapses_of(module, mask, read)
    dense, _ = synapses_of(module, torch.ones_like(mask), read)
    fan_in, dense = fan_in * side**2, int(dense.sum()) * side**2
    sops, macs = metrics.fan_out(module, mask, arriving) / seen.images, 0
    if source in ("stream", "pixels"):
        sops, macs = 0, int(fan_in.sum()) * seen.runs[name] / seen.images
    feeds, spikes = fed_by(net, name), None
    if feeds in seen.spikes:
        spikes = float(seen.spikes[feeds].sum()) / seen.images
    row = row_of(name, "linear" if mask.dim() == 2 else "convolution", source, feeds,
                 fan_in, dense, sources, int(fan_out.max()), spikes, sops, macs, mask)
    if feeds in seen.spikes:  # of a stream that the layer adds to, they may read less
        row["neurons"] = seen.spikes[feeds].numel()
    return row, fan_in, mask.flatten(1).sum(1)


def pool_row(name, source, side, seen):
    """Return what connections() yields for the maximum over windows of side x side
    through which a layer, `name`, reads a LIF, `source`."""
    read, spikes = seen.inputs[name], seen.spikes[source]
    fan_in = torch.full((read.numel(),), side**2)
    # each spike inside a window arrives there once; an odd side leaves some out
    arriving = F.avg_pool2d(spikes[None], side, divisor_override=1).sum()
    pool = f"pool of {source}"
    row = row_of(pool, "pool", source, pool, fan_in, int(fan_in.sum()), spikes.numel(),
                 1, float(read.sum()) / seen.images, float(arriving) / seen.images)
    return row, fan_in, torch.ones(len(spikes), dtype=torch.long)


def identity_row(net, block, seen):
    """Return what connections() yields for a shortcut that is the identity."""
    source = seen.source[f"{block}.conv1.conv"]
    spikes = seen.spikes[source]
    fan_in = torch.ones(spikes.numel(), dtype=torch.long)
    row = row_of(f"{block} identity", "identity", source,
                 fed_by(net, f"{block}.conv2.conv"), fan_in, len(fan_in), len(fan_in),
                 1, None, float(spikes.sum()) / seen.images)
    return row, fan_in, torch.ones(len(spikes), dtype=torch.long)


def row_of(layer, kind, reads, feeds, fan_in, dense, sources, fan_out_max, spikes, sops,
           macs=0, mask=None):
    """Return a row, a dict with the keys that needs() lists.

    fan_in: of each neuron that is fed. dense: synapses if all weights were alive.
    sources: how many neurons are read. mask: bool, like the weight; None: it has none.
    """
    weights = n_alive = 0
    if mask is not None:
        weights, n_alive = mask.numel(), int(mask.count_nonzero())
    synapses = int(fan_in.sum())
    return dict(layer=layer, kind=kind, reads=reads, feeds=feeds,
                neurons=fan_in.numel(), weights=weights, alive=n_alive,
                bytes=bytes_of(n_alive), synapses=synapses, synapses_dense=dense,
                fan_in_mean=synapses / fan_in.numel(), fan_in_max=int(fan_in.max()),
                fan_out_mean=synapses / sources, fan_out_max=fan_out_max,
                spikes=spikes, sops=sops, macs=macs, cores=None, cores_shared=None)


def cores(fan_in, core_neurons, core_synapses):
    """Return how many cores neurons fill that come in a row; None if one of them has
    more synapses than a core holds.

    fan_in: the synapses of each neuron, [n] whole numbers.
    """
    until = np.cumsum(fan_in.numpy())  # synapses of the neurons 0..i
    count = start = 0
    while start < len(until):
        before = until[start - 1] if start else 0
        stop = int(np.searchsorted(until, before + core_synapses, side="right"))
        stop = min(stop, start + core_neurons)
        if stop == start:
            return None
        start, count = stop, count + 1
    return count


def cores_shared(kernels, neurons, core_neurons, core_synapses):
    """Return how many cores neurons fill if a core stores the weights of a channel once
    for all its neurons of that channel; None if a core does not hold one channel's.

    kernels: alive weights of each channel, [C]. neurons: of all channels together.
    """
    count = free_neurons = free_synapses = 0
    for kernel in kernels.tolist():
        if kernel > core_synapses:
            return None
        left = neurons // len(kernels)
        while left > 0:
            if free_neurons == 0 or kernel > free_synapses:
                count += 1
                free_neurons, free_synapses = core_neurons, core_synapses
            placed = min(left, free_neurons)
            left, free_neurons = left - placed, free_neurons - placed
            free_synapses -= kernel
    return count


# ---- the report ----------------------------------------------------------------------


def report(net, images, folder, core_neurons=CORE_NEURONS, core_synapses=CORE_SYNAPSES):
    """Write report.json, report.md and report.png into a folder, and return the lines
    to print. What matplotlib cannot draw is a note. For the arguments and errors see
    needs()."""
    found = needs(net, images, core_neurons, core_synapses)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*table(found), ""]
    lines += [f"{subject:<25}{text}" for subject, text in sentences(found)]
    write_json(folder / "report.json", found)
    names, picture = ["report.json", "report.md"], folder / "report.png"
    if reason := why_not_drawn(picture, lambda: draw(found, picture)):
        lines.append(f"note: report.png could not be drawn ({reason}). report.json has "
                     f"its numbers")
    else:
        names.append(picture.name)
    text = "\n".join(markdown(found, net, has_picture=reason is None)) + "\n"
    write_whole(folder / "report.md", lambda file: file.write(text))
    return [*lines, f"{'written':<25}{', '.join(names)} in {folder}"]


def number(value, digits=0):
    """Return a number with commas, "-" for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def table(found):
    """Return the rows as lines of text, fit for a terminal."""
    width = max(len(row["layer"]) for row in found["layers"])
    above = f"{'':<{width}}{'':>21}{'fan-in':>15}{'fan-out':>15}{'an image':>20}"
    heads = (f"{'layer':<{width}}{'neurons':>9}{'synapses':>12}{'mean':>9}{'max':>6}"
             f"{'mean':>9}{'max':>6}{'spikes':>9}{'syn. op.':>11}")
    lines = [above, heads]
    for row in found["layers"]:
        sops = "-" if row["macs"] else number(row["sops"])
        lines.append(f"{row['layer']:<{width}}{row['neurons']:>9,}"
                     f"{row['synapses']:>12,}"
                     f"{row['fan_in_mean']:>9,.1f}{row['fan_in_max']:>6,}"
                     f"{row['fan_out_mean']:>9,.1f}{row['fan_out_max']:>6,}"
                     f"{number(row['spikes']):>9}{sops:>11}")
    sums = found["total"]
    lines.append(f"{'total':<{width}}{sums['neurons']:>9,}{sums['synapses']:>12,}"
                 f"{'':>30}{number(sums['spikes']):>9}{number(sums['sops']):>11}")
    return lines


def sentences(found):
    """Return what the report says beside its table: [(subject, text)]."""
    sums = found["total"]
    gone = 100 * (1 - sums["synapses"] / max(1, sums["synapses_dense"]))
    busiest = next(row for row in found["layers"] if row["layer"] == found["busiest"])
    busy = "none, since no spike arrives anywhere"
    if sums["sops"] > 0:
        busy = (f"{found['busiest']}, {number(busiest['sops'])} synaptic operations an "
                f"image, {100 * busiest['sops'] / sums['sops']:.0f} % of all")
    said = [("synapses alive", f"{sums['synapses']:,} of {sums['synapses_dense']:,}: "
                               f"{gone:.1f} % are gone"),
            ("weights alive", f"{sums['alive']:,} of {sums['weights']:,}"),
            ("bytes, each weight once", in_bytes(sums["alive"])),
            ("bytes, each synapse", in_bytes(sums["synapses"])),
            ("busiest layer", busy)]
    for row in found["layers"]:
        if row["macs"]:
            said.append(("real numbers", f"{row['layer']} reads {row['reads']}: "
                                         f"{number(row['macs'])} MACs an image"))
    return said + core_sentences(found["cores"])


def in_bytes(weights):
    """Return in words how many bytes a number of weights takes."""
    sizes = ", ".join(f"{size:,} at {bits} bits"
                      for bits, size in bytes_of(weights).items())
    return f"{sizes}, without addresses"


def core_sentences(found):
    """Return what is said of the cores: [(subject, text)]. found: needs()["cores"]."""
    sizes = found["core_neurons"], found["core_synapses"]
    of = f"of {sizes[0]:,} neurons and {sizes[1]:,} synapses"
    said = []
    for subject, key in (("cores", "without_sharing"),
                         ("cores, weights shared", "with_sharing")):
        count = found[key]
        if count is None:
            continue
        text = f"{count:,} {of}"
        if sizes == (CORE_NEURONS, CORE_SYNAPSES):
            chips = math.ceil(count / CHIP_CORES)
            chips = "one chip" if chips == 1 else f"{chips:,} chips"
            text += f": {chips} of {CHIP_CORES} cores (Loihi)"
        said.append((subject, text))
    if found["too_large"]:
        said.append(("cores", f"none {of} holds a neuron of "
                              f"{', '.join(found['too_large'])} with all its synapses. "
                              f"Give a larger --core-synapses"))
    if found["without_sharing"] is None and not found["too_large"]:
        said.append(("cores", "not counted: this network passes real numbers between "
                              "its blocks, which no spike carries"))
    return said


COLUMNS = {  # of report.md: (head, what stands there)
    "layer": lambda row: row["layer"],
    "reads": lambda row: row["reads"],
    "feeds": lambda row: row["feeds"],
    "neurons": lambda row: number(row["neurons"]),
    "weights alive": lambda row: f"{row['alive']:,} of {row['weights']:,}",
    "bytes at 32 / 8 / 4 bits": lambda row: " / ".join(f"{row['bytes'][bits]:,}"
                                                       for bits in BITS),
    "synapses": lambda row: number(row["synapses"]),
    "fan-in, mean": lambda row: number(row["fan_in_mean"], 1),
    "largest": lambda row: number(row["fan_in_max"]),
    "fan-out, mean": lambda row: number(row["fan_out_mean"], 1),
    "largest ": lambda row: number(row["fan_out_max"]),
    "spikes an image": lambda row: number(row["spikes"], 1),
    "synaptic operations an image": lambda row: number(row["sops"], 1),
    "MACs an image": lambda row: number(row["macs"]),
    "cores": lambda row: number(row["cores"]),
    "cores, weights shared": lambda row: number(row["cores_shared"]),
}


def markdown(found, net, has_picture):
    """Return the lines of report.md."""
    assumed = __doc__.split("What is assumed:")[1].strip("\n")
    heads = [head.strip() for head in COLUMNS]
    rows = [[cell(row) for cell in COLUMNS.values()] for row in found["layers"]]
    return ["# What a chip needs for this network", "",
            f"{net.config['name']}, T = {found['time_steps']}; spikes and operations "
            f"are means over {found['images']:,} images.", "",
            *[f"- {subject}: {text}" for subject, text in sentences(found)], "",
            "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|",
            *["| " + " | ".join(row) + " |" for row in rows], "",
            *["![Neurons, synapses and spikes of each layer](report.png)",
              ""] * has_picture,
            "## What is assumed", "", assumed]


def draw(found, path):
    """Draw neurons, synapses and spikes of each layer into a PNG file."""
    from harness import plots  # not at the top: matplotlib is slow to import

    rows = found["layers"]
    places = np.arange(len(rows))
    figure = plots.Figure(figsize=(8.5, 1.3 + 0.26 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for axis, key, title, colour in zip(
            panels, ("neurons", "synapses", "spikes"),
            ("Neurons", "Synapses", "Spikes an image"),
            (plots.BLUE, plots.GREEN, plots.RED)):
        values = [row[key] or 0 for row in rows]
        longest = max(values)
        if key == "synapses":
            dense = [row["synapses_dense"] for row in rows]
            longest = max(dense)
            axis.barh(places, dense, color=plots.GREY, alpha=0.4)
            axis.barh(places, values, color=colour)
            title = "Synapses (grey: pruned)"
        else:
            axis.barh(places, values, color=colour)
        for place, value, row in zip(places, values, rows):
            if row[key] is not None and (key != "neurons" or value):
                axis.annotate(f"{value:,.0f}", (value, place), (2, 0), fontsize=7,
                              textcoords="offset points", va="center")
        axis.set_xlim(0, 1.25 * max(1, longest))
        axis.set_title(f"{title}: {found['total'][key]:,.0f}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", nbins=4)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    panels[0].set_yticks(places, [row["layer"] for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)  # the first layer on top
    plots.save_picture(figure, path)
