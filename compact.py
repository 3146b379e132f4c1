"""Channels of a masked network that need not be computed, and the same network without them.

    kept = drop_unread(net, masks.alive)             # {layer: [C] bool}, True = kept: for training
    kept = needed(net, masks.alive)                  # fewer, for a network that is trained no more
    small, alive = without(net, masks.alive, kept)   # the same function, and its masks
    small, optimizer, masks = for_finetuning(net, optimizer, masks)  # as its full network trains

After unstructured pruning some channels have lost all their outgoing weights: whatever they do
changes nothing, neither forward nor in a gradient. What they read goes with them, so that channels
before them may lose their last reader as well. Other channels have lost all their incoming weights:
their input current is what BN makes of 0, the same everywhere and always. Below the threshold such
a neuron never fires, and a network that is trained no more does as well without it. In training its
beta moves and may lift it above: there it stays.

One that fires is kept. Its spikes are no bias that BN could take up: they come and go over the T
steps, and at the border the zeros of the padding are not read as its spikes are.

The masks decide, not the values: an alive weight may be 0 and grow. channels.py removes.
"""
import torch
import torch.nn.functional as F

import channels
import metrics
import models
from masks import Masks


def _hold(keep, before, alive):
    """Let a layer that would lose all its channels keep one of those that it had, `before`: one
    that needs the fewest alive weights, and with them the fewest channels before it."""
    if not keep.any():
        inputs = alive.flatten(1).count_nonzero(1)
        keep[torch.where(before, inputs, inputs.max() + 1).argmin()] = True
    return keep


def drop_unread(net, alive):
    """Return the channels that some alive weight reads, {layer: [C] bool}, True = kept.

    alive: {name of a weight: bool tensor, True = alive}. From the last layer to the first, since a
    weight into a channel that goes reads nothing any more: no further round finds more. A layer
    keeps at least one channel. Exact in training and in evaluation.
    """
    kept = dict.fromkeys(models.removable(net))  # in the order of the network
    for name, group in reversed(models.removable(net).items()):
        readers = alive[group.reader]
        if (layer := group.reader.removesuffix(".conv.weight")) in kept:
            readers = readers[kept[layer]]
        # a flattened map is channel-major: each channel owns `repeat` columns in a row
        read = readers.flatten(1).any(0).view(readers.shape[1] // group.repeat, -1).any(1)
        kept[name] = _hold(read, torch.ones_like(read), alive[f"{name}.conv.weight"])
    return kept


def constant(net, name):
    """Return the input current of a layer's channels where no weight brings any, [C]: what BN makes
    of 0 in eval mode; without BN the bias of the convolution, or 0."""
    layer = net.get_submodule(name)
    if not hasattr(layer, "bn"):
        bias = layer.conv.bias
        return layer.conv.weight.new_zeros(len(layer.conv.weight)) if bias is None else bias
    bn = layer.bn
    zeros = torch.zeros_like(bn.weight).view(1, -1, 1, 1)
    return F.batch_norm(zeros, bn.running_mean, bn.running_var, bn.weight, bn.bias,
                        eps=bn.eps).flatten()


@torch.no_grad()
def drop_silent(net, alive, kept):
    """Return which of the kept channels may fire in eval mode, {layer: [C] bool}, True = kept.

    Those that go have no alive weight from a kept channel, and a constant current with which the
    potential stays below the threshold: they are silent at any T. From the first layer to
    the last, since a weight from a silent channel brings nothing.
    """
    groups, kept = models.removable(net), dict(kept)
    feeders = {group.reader: name for name, group in groups.items()}
    for name, group in groups.items():
        weights = f"{name}.conv.weight"
        inputs = alive[weights]
        if weights in feeders:  # else what it reads is there as a whole
            inputs = inputs[:, kept[feeders[weights]]]
        lif = net.get_submodule(group.lif)
        fires = lif.limit(constant(net, name)) >= lif.v_threshold
        kept[name] = _hold(kept[name] & (inputs.flatten(1).any(1) | fires), kept[name],
                           alive[weights])
    return kept


def needed(net, alive):
    """Return the channels that a network needs which is trained no more, {layer: [C] bool}.

    What is unread goes, then what is silent. A further round finds no more: a silent channel has no
    alive weight from one that stays, which hence loses no reader; an unread one has none into one
    that stays, which loses no input.
    """
    return drop_silent(net, alive, drop_unread(net, alive))


def without(net, alive, kept):
    """Return a network with the kept channels only, and its masks, {name: bool tensor}."""
    places = channels.places(net, kept)
    return channels.remove(net, kept), {name: mask[places[name]] for name, mask in alive.items()}


def for_finetuning(net, optimizer, masks):
    """Return (network, optimizer, masks) without the channels that no alive weight reads.

    Its weights, BN and momentum move as those of the full network would. The full ones take over
    what it learned each time that their state_dict() is asked for, so that checkpoints and model.pt
    stay those of the full network, which go on bit by bit: the masks alone say what is left out.
    What is left out keeps the values that it has now; the full network would decay them, unread.
    """
    kept = drop_unread(net, masks.alive)
    places = channels.places(net, kept)
    small, alive = without(net, masks.alive, kept)
    small_masks = Masks(small)
    for name, mask in small_masks.alive.items():
        mask.copy_(alive[name])
    optimizer.zero_grad()  # frees the gradients of the full network
    small_optimizer = type(optimizer)(small.parameters(), **optimizer.defaults)
    full = dict(net.named_parameters()) | dict(net.named_buffers())
    buffers = []  # of the momentum: (of the small network, of the full one, where it lies there)
    for name, weight in small.named_parameters():
        theirs = optimizer.state.get(full[name], {}).get("momentum_buffer")
        if theirs is not None:
            mine = small_optimizer.state[weight]["momentum_buffer"] = theirs[places[name]].clone()
            buffers.append((mine, theirs, places[name]))

    (group,), (full_group,) = small_optimizer.param_groups, optimizer.param_groups
    group["lr"] = full_group["lr"]  # of the last step

    @torch.no_grad()
    def take_weights(*_):
        for name, tensor in small.state_dict().items():
            full[name][places[name]] = tensor

    @torch.no_grad()
    def take_momentum(*_):
        full_group["lr"] = group["lr"]
        for mine, theirs, place in buffers:
            theirs[place] = mine

    net.register_state_dict_pre_hook(take_weights)
    optimizer.register_state_dict_pre_hook(take_momentum)
    return small, small_optimizer, small_masks


def describe(dense, small):
    """Return how many channels and MACs a small network has of those of the dense one, in words."""
    rows = [[net.config["widths"][group.width] for group in models.removable(net).values()]
            for net in (dense, small)]
    before, after = (sum(metrics.macs(net.config).values()) for net in (dense, small))
    return (f"channels {sum(rows[0]):,} -> {sum(rows[1]):,}, MACs a step {before:,} -> {after:,} "
            f"({100 * (1 - after / before):.2f} % less)")
