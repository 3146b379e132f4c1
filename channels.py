"""The channels of a network that can be removed: choosing, silencing, removing, and
what is said of it.

    names, sizes = layers(net)                  # the layers, in the network's order
    kept = largest(gammas(net), ratio=0.5)      # [M] bool, True = kept: the larger half
    kept = dict(zip(names, kept.split(sizes)))
    small = remove(net, kept)                   # a new network, smaller and faster
    masked = silence(net, kept)                 # the old one, with the others silent
    differences(masked, small, kept, images)    # shows that both are the same function

A row has a value for each of the M channels that can be removed, layer after layer:
[M], on the CPU.

Removing is our own code. A general graph tracer confuses channels where time is folded
into the batch.
"""
import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

import metrics
import models
from masks import select


class Choice(NamedTuple):
    """Which channels stay, and why. Rows are [M] bool."""

    kept: Tensor         # those that stay, the two below included
    regenerated: Tensor  # pruned, then brought back
    rescued: Tensor      # kept since their layer would have lost all its channels


def layers(net):
    """Return (names, numbers of channels) of the layers that can lose channels."""
    return list(models.removable(net)), [len(scale) for scale in scales(net)]


def scales(net):
    """Return the scales gamma of those layers' batch normalisation, a list of [C]
    parameters."""
    return [net.get_submodule(group.bn).weight
            for group in models.removable(net).values()]


def gammas(net):
    """Return |gamma| of every channel that can be removed, [M], on the CPU."""
    return torch.cat([scale.detach().abs().cpu() for scale in scales(net)])


# ---- choosing ------------------------------------------------------------------------


def largest(gamma, ratio):
    """Return the channels that stay when the share `ratio` with the smallest |gamma| is
    cut, [M] bool.

    gamma: |gamma| of all layers, [M]. Exactly round(ratio * M) are cut; of equal ones
    the first layer, and in it the lowest index, goes first.

    INTERPRETATION: the code of network slimming cuts whatever is not above the value at
    index floor(ratio * M) of the sorted row. That is one channel more than asked for,
    and more with ties.
    """
    all_channels = torch.ones_like(gamma, dtype=torch.bool)
    keys = [gamma, torch.arange(len(gamma)).double()]
    keep = len(gamma) - round(ratio * len(gamma))
    return select(all_channels, keep, keys, None)


def may_be_empty(net):
    """Return for each layer that can lose channels whether it can lose all of them, a
    list of bools."""
    return [group.may_be_empty for group in models.removable(net).values()]


def largest_of_empty_layers(kept, gamma, sizes, may_be_empty=None):
    """Return the channel with the largest |gamma| of each layer that keeps none, [M]
    bool; of equal ones the lowest index.

    kept: [M] bool. gamma: |gamma|, [M]. sizes: the number of channels of each layer.
    may_be_empty: for each layer whether it may keep none; None: no layer may.
    """
    added = torch.zeros_like(kept)
    allowed = may_be_empty or [False] * len(sizes)
    rows = zip(kept.split(sizes), gamma.split(sizes), added.split(sizes), allowed)
    for keep, value, new, is_allowed in rows:
        if not keep.any() and not is_allowed:
            new[value.argmax()] = True
    return added


def fewest(net):
    """Return the channels that stay where as many go as can, [M] bool: one of each
    layer, and none where a layer may be empty, or feeds one that may be."""
    groups = models.removable(net)
    rows = []
    for group, size in zip(groups.values(), layers(net)[1]):
        fed = group  # the layer that it feeds; itself where it feeds no other
        if group.feeds in groups:
            fed = groups[group.feeds]
        row = torch.zeros(size, dtype=torch.bool)
        row[0] = not (group.may_be_empty or fed.may_be_empty)
        rows.append(row)
    return torch.cat(rows)


def check_ratio(net, ratio, target=0.0, least=fewest):
    """Raise ValueError if a ratio leaves fewer channels than must stay, or if a share
    `target` of the MACs cannot be removed.

    least(net): returns the channels that a method keeps at any ratio, [M] bool.
    """
    groups = models.removable(net)
    if not groups or any(group.bn is None for group in groups.values()):
        raise ValueError(f"{net.config['name']} has no channels with batch "
                         f"normalisation, expected some, since its gamma ranks what is "
                         f"removed. Take another --model, or prune_unstructured.py")
    names, sizes = layers(net)
    kept, must_stay = sum(sizes) - round(ratio * sum(sizes)), int(fewest(net).sum())
    if kept < must_stay:
        raise ValueError(f"--prune-ratio is {ratio:g}, which leaves {kept} of "
                         f"{sum(sizes)} channels, expected at least one for each of "
                         f"the {must_stay} layers that cannot be empty. Lower "
                         f"--prune-ratio or raise --width")
    most = macs_removed(net, dict(zip(names, least(net).split(sizes))))
    if target > most:
        # rounded down: what is named here can be asked for
        raise ValueError(f"--target-macs is {target:g}, expected at most "
                         f"{math.floor(1e4 * most) / 1e4:g}: that is what goes where "
                         f"each layer keeps its fewest channels. Lower --target-macs")


def ratio_for(net, target, choose):
    """Return the ratio n / M that removes the share `target` of the MACs most nearly.

    The search bisects n: the more channels go, the more MACs go. choose(ratio) returns
    the Choice at a ratio.
    """
    names, sizes = layers(net)
    total = sum(sizes)

    def removed(n):
        kept = choose(n / total).kept.split(sizes)
        return macs_removed(net, dict(zip(names, kept)))

    low, high = 0, total - len(names)
    if removed(high) < target:  # some layers still have more than they must keep
        low, high = high, total
    while high - low > 1:
        middle = (low + high) // 2
        if removed(middle) < target:
            low = middle
        else:
            high = middle
    nearest = min((low, high), key=lambda n: abs(removed(n) - target))
    return nearest / total


# ---- silencing and removing ----------------------------------------------------------


@torch.no_grad()
def silence(net, kept):
    """Return a copy of a network in which gamma and beta of all channels but the kept
    ones are 0.

    Their current is then 0, and they never fire. Were gamma alone 0, beta would drive
    them: one above the threshold fires. kept: {layer: [C] bool, True = kept}.
    """
    masked = copy.deepcopy(net)
    for name, keep in kept.items():
        bn = masked.get_submodule(models.removable(net)[name].bn)
        for parameter in (bn.weight, bn.bias):
            parameter.mul_(keep.to(parameter.device))
    return masked


def stored(net, kept):
    """Return the channels that remove(net, kept) stores, as `kept`: those that stay,
    without the ones that feed nothing any more."""
    found, groups = dict(kept), models.removable(net)
    for name, group in groups.items():
        fed = kept.get(group.feeds)
        if fed is not None and not fed.any():
            size = net.config["widths"][group.place]
            found[name] = torch.zeros(size, dtype=torch.bool, device=fed.device)
    return found


def kept_widths(net, kept):
    """Return the list of widths of the network that remove(net, kept) makes."""
    groups, widths = models.removable(net), list(net.config["widths"])
    for name, keep in stored(net, kept).items():
        widths[groups[name].place] = int(keep.count_nonzero())
    return widths


def macs_removed(net, kept):
    """Return the share of the MACs of one time step that remove(net, kept) saves."""
    before = sum(metrics.macs(net.config).values())
    small = net.config | dict(widths=kept_widths(net, kept))
    return 1 - sum(metrics.macs(small).values()) / before


def kept_indices(net, kept):
    """Return what remove(net, kept) keeps of each tensor of the state_dict, {its name:
    index}.

    full[index] reads it, and full[index] = small puts it back. kept: {layer: [C] bool,
    True = kept}; a layer that is not named keeps all.
    """
    groups, rows, columns = models.removable(net), {}, {}
    for name, keep in stored(net, kept).items():
        group, keep = groups[name], keep.to(net.mean.device)
        rows |= dict.fromkeys(group.rows, keep)
        # a flattened map is channel-major: each channel owns `repeat` columns in a row
        columns[group.reader] = keep.repeat_interleave(group.repeat).nonzero().T
    indices = {}
    for name, tensor in net.state_dict().items():
        if name in columns:
            keep = rows.get(name, tensor.new_ones(len(tensor)))
            indices[name] = keep.nonzero(), columns[name]
        elif name in rows:
            indices[name] = (rows[name],)
        else:
            indices[name] = (...,)
    return indices


@torch.no_grad()
def remove(net, kept):
    """Return a new network with the kept channels only.

    It is what models.build() makes of the kept widths, with every tensor copied
    exactly, on the same device and in the same mode.

    kept: {layer: [C] bool, True = kept}; a layer that is not named keeps all.
    Raises ValueError for unknown layers, wrong shapes, a layer that would be left empty
    but must not be, and neurons that are masked one by one.
    """
    groups = models.removable(net)
    if models.neuron_masks(net):
        raise ValueError("the network has neurons that are masked one by one, expected "
                         "one without: the removal of channels does not keep them")
    for name, keep in kept.items():
        if name not in groups:
            raise ValueError(f"the channels of {name!r} cannot be removed, expected a "
                             f"layer out of {', '.join(groups)}")
        size = net.config["widths"][groups[name].place]
        is_left = keep.any() or groups[name].may_be_empty
        if keep.dtype != torch.bool or keep.shape != (size,) or not is_left:
            raise ValueError(f"kept[{name!r}] is {keep.dtype} of shape "
                             f"{tuple(keep.shape)}, {int(keep.count_nonzero())} not 0, "
                             f"expected {size} bools with at least one True")
    with torch.device("meta"):  # no memory, and no draw from torch's generator
        small = models.build(**net.config | dict(widths=kept_widths(net, kept)))
    state, indices = net.state_dict(), kept_indices(net, kept)
    small.load_state_dict({name: state[name][indices[name]].clone()
                           for name in small.state_dict()}, assign=True)
    small.class_names = net.class_names
    return small.train(net.training).to(memory_format=torch.channels_last)


@torch.inference_mode()
def differences(masked, small, kept, images):
    """Compare a silenced network with the smaller one, in the mode in which they are.

    They are the same function, up to the rounding of their kernels. kept: what remove()
    got. images: a batch. Returns a dict: the largest difference of the logits, how many
    spikes differ, and how many were compared.
    """
    spikes, logits = ({}, {}), []
    for net, seen in zip((masked, small), spikes):
        with metrics.hooks(models.lifs(net), after=seen.__setitem__):
            logits.append(net(images))
    of_masked, of_small = spikes
    index = {group.lif: kept[name].to(images.device)
             for name, group in models.removable(masked).items() if name in kept}
    unequal = compared = 0
    for name, other in of_small.items():
        mine = of_masked[name]
        if name in index:
            mine = mine[:, :, index[name]]
        unequal += int((mine != other).sum())
        compared += other.numel()
    return dict(logits_differ_by=float((logits[0] - logits[1]).abs().max()),
                spikes_that_differ=unequal, spikes_compared=compared)


# ---- what is said of it --------------------------------------------------------------


def choice_record(net, ratio, choice, scores=None, spiked=None):
    """Return what channels.json says of a choice of channels, a dict.

    net: the dense network. ratio: as asked for. choice: a Choice. scores: [M]. spiked:
    [M] bool, False where a channel never spiked while it was scored. None: there are no
    such numbers.
    """
    names, sizes = layers(net)
    left = stored(net, dict(zip(names, choice.kept.split(sizes))))
    in_left = torch.cat([left[name] for name in names])
    kept, regenerated, rescued = (row & in_left for row in choice)
    alike = {name: torch.arange(size) >= min(size - 1, round(ratio * size))
             for name, size in zip(names, sizes)}  # the same ratio in each layer
    never_spiked = None
    if spiked is not None:
        never_spiked = int((regenerated & ~spiked).sum())
    record = dict(
        ratio=ratio, reached=1 - int(kept.sum()) / len(kept), channels=len(kept),
        kept=int(kept.sum()), regenerated=int(regenerated.sum()),
        rescued=int(rescued.sum()), regenerated_never_spiked=never_spiked,
        macs_removed=macs_removed(net, dict(zip(names, kept.split(sizes)))),
        macs_removed_if_alike=macs_removed(net, alike), layers=[])
    gamma_of, start = gammas(net), 0
    for name, size in zip(names, sizes):
        of_layer = slice(start, start + size)
        start += size
        record["layers"].append(dict(
            name=name, channels=size,
            kept=left[name].nonzero().flatten().tolist(),
            regenerated=regenerated[of_layer].nonzero().flatten().tolist(),
            rescued=rescued[of_layer].nonzero().flatten().tolist(),
            gamma=gamma_of[of_layer].tolist(),
            score=None if scores is None else scores[of_layer].tolist()))
    return record


def record_lines(record):
    """Return the lines for the screen on what channels.json holds: choice_record(),
    differences(), and the accuracies of the silenced and of the smaller network."""
    first = (f"  kept {record['kept']:,} of {record['channels']:,} channels, "
             f"{record['regenerated']:,} of them "
             f"({100 * record['regenerated'] / record['kept']:.1f} %) by regeneration")
    if record["regenerated_never_spiked"] is not None:
        first += f"; {record['regenerated_never_spiked']:,} of these never spiked"
    lines = [first]
    for layer in record["layers"]:
        line = (f"    {layer['name']:<16}{layer['channels']:>4} -> "
                f"{len(layer['kept']):>4}")
        if layer["regenerated"]:
            line += f"   {len(layer['regenerated']):>3} regenerated"
        lines.append(line)
        if layer["rescued"]:
            lines.append(f"  note: {layer['name']} would have lost all channels; its "
                         f"largest |gamma| stays, and nothing goes in its place")
    if record["rescued"]:
        lines.append(f"  note: asked for a ratio of {record['ratio']:.4f}, reached "
                     f"{record['reached']:.4f}")
    lines.append(f"  MACs removed: {100 * record['macs_removed']:.2f} % (the same "
                 f"ratio in every layer: {100 * record['macs_removed_if_alike']:.2f} "
                 f"%)")
    lines.append(f"  silenced {100 * record['accuracy_silenced']:.2f} %, removed "
                 f"{100 * record['accuracy_removed']:.2f} % test accuracy; logits "
                 f"differ by {record['logits_differ_by']:.2g}, "
                 f"{record['spikes_that_differ']:,} of {record['spikes_compared']:,} "
                 f"spikes do")
    return "\n".join(lines)


def sparsity(dense, small):
    """Return the share of the prunable weights that a smaller network does without."""
    before, after = (metrics.parameters(net)["layers"] for net in (dense, small))
    left = sum(layer["weights"] for layer in after)
    return 1 - left / sum(layer["weights"] for layer in before)


def savings(dense, small):
    """Return {what: (of the dense network, of the small one)}: parameters, and MACs by
    the three conventions of metrics.py."""
    found = []
    for net in (dense, small):
        found.append(dict(parameters=metrics.parameters(net)["parameters"])
                     | metrics.conventions(net.config, net.time_steps))
    return {key: (found[0][key], found[1][key]) for key in found[0]}


def compared_with_dense(dense, small):
    """Return the keys of summary.json that compare a small network with the dense one:
    its layers with the weights that they had, the sparsity over all parameters, the
    MACs before."""
    before, after = metrics.parameters(dense), metrics.parameters(small)
    left = {layer["name"]: layer["weights"] for layer in after["layers"]}
    return dict(layers=[layer | dict(alive=left.get(layer["name"], 0))
                        for layer in before["layers"]],
                macs_dense=sum(metrics.macs(dense.config).values()),
                sparsity_all=1 - after["parameters"] / before["parameters"])
