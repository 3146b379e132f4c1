"""The channels of a network that can be removed: choosing, silencing, removing, accounting.

    names, sizes = layers(net)                       # the layers, in the order of the network
    kept = largest(gammas(net), ratio=0.5)           # [M] bool, True = kept: the larger half stays
    kept = dict(zip(names, kept.split(sizes)))
    small = remove(net, kept)                        # a new network, smaller and faster
    masked = silence(net, kept)                      # its masked twin: the same function
    differences(masked, small, kept, images)         # shows that it is

Rows over the channels of all layers, [M], lie on the CPU, layer after layer. Removing is ours and
not that of a graph tracer: those mis-map channels where time is folded into the batch.
"""
import copy
import math

import numpy as np
import torch

import metrics
import models
from masks import reactivate, select

PARTS = ("conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def layers(net):
    """Return (names, numbers of channels) of the layers whose channels can be removed."""
    names = list(models.removable(net))
    return names, [len(net.get_submodule(name).bn.weight) for name in names]


def gammas(net):
    """Return |gamma| of every channel that can be removed, [M], on the CPU."""
    return torch.cat([net.get_submodule(name).bn.weight.detach().abs().cpu()
                      for name in models.removable(net)])


# ---- choosing ------------------------------------------------------------------------------------


def largest(gamma, ratio, threshold="exact"):
    """Return the channels that slimming keeps at a pruned share `ratio`, [M] bool.

    gamma: |gamma| of all layers, [M]. threshold: "exact" cuts round(ratio * M), in the order of
    (|gamma|, layer, index). "official" is the rule of the published code, which cuts one more, and
    more with ties: keep what is larger than the value at index floor(ratio * M) of the sorted row.
    """
    if threshold == "official":
        return gamma > gamma.sort().values[math.floor(ratio * len(gamma))]
    return select(torch.ones_like(gamma, dtype=torch.bool), len(gamma) - round(ratio * len(gamma)),
                  [gamma, torch.arange(len(gamma)).double()], None)


def regenerate(kept, count, scores, gamma, sizes, scope="global"):
    """Return the `count` highest-scored channels out of those that are not kept, [M] bool; ties by
    larger |gamma|, then in the order of layers and indices.

    scores: [M], None where count is 0. INTERPRETATION: the ranking is over all layers ("re-sort all
    pruned units"). scope "layer" gives each layer its part of `count`, in proportion to its loss.
    """
    if count == 0:
        return torch.zeros_like(kept)
    keys = [scores, gamma, -torch.arange(len(gamma)).double()]
    if scope == "global":
        return reactivate(~kept, count, keys)
    lost = np.array([int((~keep).count_nonzero()) for keep in kept.split(sizes)])
    shares = lost * count / max(1, lost.sum())
    parts = np.floor(shares).astype(int)
    parts[np.argsort(parts - shares, kind="stable")[:count - parts.sum()]] += 1
    rows = zip(kept.split(sizes), parts, *(key.split(sizes) for key in keys))
    return torch.cat([reactivate(~keep, int(part), list(key)) for keep, part, *key in rows])


def guard(kept, gamma, sizes, k_min=1):
    """Return the channels that a layer with fewer than k_min needs, [M] bool: its largest |gamma|,
    ties by the lower index. Nothing makes up for them elsewhere."""
    added = torch.zeros_like(kept)
    for keep, value, new in zip(kept.split(sizes), gamma.split(sizes), added.split(sizes)):
        if keep.count_nonzero() < k_min:
            new[value.sort(descending=True, stable=True).indices[:k_min]] = True
    return added & ~kept


def check(net, ratio, target=0.0):
    """Raise ValueError if a ratio leaves fewer channels than there are layers, or if a share of the
    MACs cannot be removed."""
    groups = models.removable(net)
    if not groups or not all(hasattr(net.get_submodule(name), "bn") for name in groups):
        raise ValueError(f"{net.config['name']} has no channels with batch normalisation, expected "
                         f"some, since its gamma ranks what is removed. Take another --model, or "
                         f"prune_unstructured.py")
    names, sizes = layers(net)
    kept = sum(sizes) - round(ratio * sum(sizes))
    if kept < len(names):
        raise ValueError(f"--prune-ratio is {ratio:g}, which leaves {kept} of {sum(sizes)} "
                         f"channels, expected at least one for each of the {len(names)} layers. "
                         f"Lower --prune-ratio or raise --width")
    most = macs_removed(net, dict.fromkeys(names, torch.ones(1, dtype=torch.bool)))
    if target > most:
        raise ValueError(f"--target-macs is {target:g}, expected at most {most:.4f}: that is "
                         f"removed where one channel a layer is left. Lower it")


def ratio_for(net, target, choose):
    """Return the ratio p = n / M, by bisection over n, that removes the target share of the MACs
    most nearly. choose(p): what stays at p, [M] bool."""
    names, sizes = layers(net)
    total = sum(sizes)

    def removed(n):
        return macs_removed(net, dict(zip(names, choose(n / total).split(sizes))))

    low, high = 0, total - len(names)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if removed(middle) < target else (low, middle)
    return min((low, high), key=lambda n: abs(removed(n) - target)) / total


# ---- silencing and removing ----------------------------------------------------------------------


@torch.no_grad()
def silence(net, kept):
    """Return a copy of a network in which gamma and beta of all channels but the kept ones are 0.

    Their current is then 0 and they never fire. With gamma alone they would be driven by beta, and
    one above the threshold fires. kept: {layer: bool [C], True = kept}.
    """
    masked = copy.deepcopy(net)
    for name, keep in kept.items():
        bn = masked.get_submodule(name).bn
        for parameter in (bn.weight, bn.bias):
            parameter.mul_(keep.to(parameter.device))
    return masked


def kept_widths(net, kept):
    """Return the list of widths of the network that remove(net, kept) makes."""
    groups, widths = models.removable(net), list(net.config["widths"])
    for name, keep in kept.items():
        widths[groups[name].width] = int(keep.count_nonzero())
    return widths


def macs_removed(net, kept):
    """Return the share of the MACs of one time step that remove(net, kept) saves."""
    before, after = (sum(metrics.macs(net.config | dict(widths=widths)).values())
                     for widths in (net.config["widths"], kept_widths(net, kept)))
    return 1 - after / before


def places(net, kept):
    """Return {name of a tensor of the state_dict: an index of what remove(net, kept) keeps of it}:
    full[index] reads it, full[index] = small puts it back.

    kept: {layer: bool [C], True = kept}; layers that are not named keep all.
    """
    rows, columns = {}, {}
    for name, keep in kept.items():
        group, keep = models.removable(net)[name], keep.to(net.mean.device)
        rows |= {f"{name}.{part}": keep for part in PARTS}
        # a flattened map is channel-major: each channel owns `repeat` columns in a row
        columns[group.reader] = keep.repeat_interleave(group.repeat).nonzero().T
    index = {}
    for name, tensor in net.state_dict().items():
        index[name] = (rows[name],) if name in rows else (...,)
        if name in columns:
            index[name] = (rows.get(name, tensor.new_ones(len(tensor))).nonzero(), columns[name])
    return index


@torch.no_grad()
def remove(net, kept):
    """Return a new network with the kept channels only: models.build() with the kept widths, every
    tensor copied exactly, on the same device, in the same mode.

    kept: {layer: bool [C], True = kept}; layers that are not named keep all.
    Raises ValueError for unknown layers, wrong shapes, and a layer that would be left empty.
    """
    groups = models.removable(net)
    for name, keep in kept.items():
        if name not in groups:
            raise ValueError(f"the channels of {name!r} cannot be removed, expected a layer out of "
                             f"{', '.join(groups)}")
        size = net.config["widths"][groups[name].width]
        if keep.dtype != torch.bool or keep.shape != (size,) or not keep.any():
            raise ValueError(f"kept[{name!r}] is {keep.dtype} of shape {tuple(keep.shape)}, "
                             f"{int(keep.count_nonzero())} not 0, expected {size} bools with at "
                             f"least one True")
    state, index = net.state_dict(), places(net, kept)
    with torch.device("meta"):  # no memory, and no draw from torch's generator
        small = models.build(**net.config | dict(widths=kept_widths(net, kept)))
    small.load_state_dict({name: state[name][place].clone() for name, place in index.items()},
                          assign=True)
    small.mean, small.std = net.mean.clone(), net.std.clone()
    return small.train(net.training).to(memory_format=torch.channels_last)


@torch.inference_mode()
def differences(masked, small, kept, images):
    """Compare a silenced network with its smaller twin, in the mode in which they are: they are the
    same function, up to the rounding of their kernels.

    kept: what remove() got. Returns a dict: the largest difference of the logits, how many spikes
    differ, and how many places were compared.
    """
    spikes, logits = ({}, {}), []
    for net, seen in zip((masked, small), spikes):
        with metrics.hooks(models.lifs(net), after=seen.__setitem__):
            logits.append(net(images))
    index = {group.lif: kept[name].to(images.device)
             for name, group in models.removable(masked).items() if name in kept}
    unequal = places = 0
    for name, other in spikes[1].items():
        mine = spikes[0][name]
        mine = mine[:, :, index[name]] if name in index else mine
        unequal, places = unequal + int((mine != other).sum()), places + other.numel()
    return dict(logits_differ_by=float((logits[0] - logits[1]).abs().max()),
                spikes_that_differ=unequal, spikes_compared=places)


# ---- the account ---------------------------------------------------------------------------------


def account(net, ratio, kept, regenerated, rescued, scores=None, spiked=None):
    """Return what channels.json says of the choice of channels, a dict.

    net: the dense network. ratio: as asked. Rows over the channels, [M]: kept, regenerated, rescued
    (by the guard), scores, spiked (False: never in the pass that scored).
    """
    names, sizes = layers(net)
    alike = {name: torch.arange(size) >= min(size - 1, round(ratio * size))
             for name, size in zip(names, sizes)}
    rows = [row.split(sizes) for row in (kept, regenerated, rescued, gammas(net))]
    scores = [None] * len(names) if scores is None else [s.tolist() for s in scores.split(sizes)]
    return dict(
        ratio=ratio, reached=1 - int(kept.sum()) / len(kept), channels=len(kept),
        kept=int(kept.sum()), regenerated=int(regenerated.sum()), rescued=int(rescued.sum()),
        regenerated_never_spiked=None if spiked is None else int((regenerated & ~spiked).sum()),
        macs_removed=macs_removed(net, dict(zip(names, kept.split(sizes)))),
        macs_removed_if_alike=macs_removed(net, alike),
        layers=[dict(name=name, channels=len(keep), kept=keep.nonzero().flatten().tolist(),
                     regenerated=came.nonzero().flatten().tolist(),
                     rescued=held.nonzero().flatten().tolist(), gamma=gamma.tolist(), score=score)
                for name, keep, came, held, gamma, score in zip(names, *rows, scores)])


def describe(record):
    """Return what channels.json holds as lines for the screen: account(), differences() and the
    accuracies of the silenced and of the rebuilt network."""
    silent = record["regenerated_never_spiked"]
    lines = [f"  kept {record['kept']:,} of {record['channels']:,} channels, "
             f"{record['regenerated']:,} of them ("
             f"{100 * record['regenerated'] / record['kept']:.1f} %) by regeneration" + (f"; {silent:,} of these never spiked" if silent is not None
                                       else "")]
    for row in record["layers"]:
        back = len(row["regenerated"])
        lines.append(f"    {row['name']:<16}{row['channels']:>4} -> {len(row['kept']):>4}"
                     + f"   {back:>3} regenerated" * (back > 0))
        if row["rescued"]:
            lines.append(f"  note: {row['name']} would have lost all channels; its largest |gamma| "
                         f"stays, and nothing goes in its place")
    if record["rescued"]:
        lines.append(f"  note: asked for a ratio of {record['ratio']:.4f}, reached "
                     f"{record['reached']:.4f}")
    lines.append(f"  MACs removed: {100 * record['macs_removed']:.2f} % (the same ratio in every "
                 f"layer: {100 * record['macs_removed_if_alike']:.2f} %)")
    lines.append(
        f"  silenced {100 * record['accuracy_silenced']:.2f} %, removed "
        f"{100 * record['accuracy_removed']:.2f} % test accuracy; logits differ by "
        f"{record['logits_differ_by']:.2g}, {record['spikes_that_differ']:,} of "
        f"{record['spikes_compared']:,} spikes do")
    return "\n".join(lines)


def sparsity(dense, small):
    """Return the share of the prunable weights that a smaller network does without."""
    before, after = (sum(layer["weights"] for layer in metrics.parameters(net)["layers"])
                     for net in (dense, small))
    return 1 - after / before


def savings(dense, small):
    """Return {what: (of the dense network, of the small one)}: parameters, and MACs by the three
    conventions of metrics.py."""
    found = [dict(parameters=metrics.parameters(net)["parameters"])
             | metrics.conventions(metrics.macs(net.config), net.time_steps, net.encoding)
             for net in (dense, small)]
    return {key: (found[0][key], found[1][key]) for key in found[0]}


def summary(dense, small):
    """Return the keys of summary.json that compare a small network with the dense one: its layers
    with the weights that they had, the sparsity over all parameters, the MACs before."""
    before, after = metrics.parameters(dense), metrics.parameters(small)
    return dict(layers=[layer | dict(alive=now["weights"])
                        for layer, now in zip(before["layers"], after["layers"])],
                macs_dense=sum(metrics.macs(dense.config).values()),
                sparsity_all=1 - after["parameters"] / before["parameters"])
