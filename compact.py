"""Channels of a masked network that need not be computed, and the network without them.

    python compact.py runs/NAME/model.pt             # writes compact.pt beside it
    python compact.py model.pt --out small.pt

    small, alive, text = make(net, masks.alive)      # the same function, and its masks

After unstructured pruning some channels are unread: all weights that read them are
dead. Whatever they do changes nothing, neither the output nor any other gradient. They
take with them what only they read, so that channels before them may become unread too.

Other channels are unfed: all weights into them are dead. Their input current is what
batch normalisation (BN) makes of 0, the same at each pixel and each step. If it leaves
the potential below the threshold, the neuron is silent, and a network that is trained
no more does without it. While it trains it needs the neuron: beta moves, and may lift
the current.

An unfed channel that fires is kept as well. BN cannot take up its spikes as a bias:
they come and go over the T steps, and at the border the next layer reads the zeros of
its padding and not the channel's spikes.

What is alive decides, not what is 0: an alive weight may be 0.
"""
from pathlib import Path

if __name__ == "__main__":
    import harness  # first: what is not installed is then one line

import torch
import torch.nn.functional as F

import channels
import metrics
import modelfile
import models
from inputs import as_input, random_images


def keep_one(kept, before, alive):
    """Let a layer that would lose all its channels keep one of those that it had: the
    one with the fewest alive weights, which needs the fewest channels before it.

    kept, before: [C] bool, what would stay and what was there. alive: the mask of the
    layer's weight; None: it has none, and the first channel stays. Changes `kept`, and
    returns it.
    """
    if not kept.any():
        inputs = torch.zeros_like(kept, dtype=torch.long)
        if alive is not None:
            inputs = alive.flatten(1).count_nonzero(1)
        kept[torch.where(before, inputs, inputs.max() + 1).argmin()] = True
    return kept


def feeders(net):
    """Return {name of a weight: the layer whose channels are its rows}, of the layers
    that can lose channels."""
    return {group.weight: name for name, group in models.removable(net).items()
            if group.weight is not None}


def drop_unread(net, alive):
    """Return the channels that some alive weight reads, {layer: [C] bool}, True = kept.

    alive: {name of a weight: bool tensor, True = alive}. A layer keeps at least one
    channel, but for one that may lose all. Exact in training and in evaluation.

    One pass from the last layer to the first finds all: a weight into a channel that
    goes reads nothing any more.
    """
    kept, made_by = dict.fromkeys(models.removable(net)), feeders(net)  # in order
    for name, group in reversed(models.removable(net).items()):
        readers = alive[group.reader]
        if group.reader in made_by:
            readers = readers[kept[made_by[group.reader]]]
        # a flattened map is channel-major: each channel owns `repeat` columns in a row
        columns = readers.flatten(1).any(0)
        read = columns.view(readers.shape[1] // group.repeat, -1).any(1)
        kept[name] = read
        if not group.may_be_empty:
            all_channels = torch.ones_like(read)
            kept[name] = keep_one(read, all_channels, alive.get(group.weight))
    return kept


def constant_current(net, name):
    """Return the input current of a layer's channels if no weight brings any, [C].

    It is what BN makes of 0 in eval mode; without BN it is the bias of the
    convolution, or 0.
    """
    group = models.removable(net)[name]
    if group.bn is not None:
        bn = net.get_submodule(group.bn)
        zeros = torch.zeros_like(bn.weight).view(1, -1, 1, 1)
        return F.batch_norm(zeros, bn.running_mean, bn.running_var, bn.weight, bn.bias,
                            eps=bn.eps).flatten()
    conv = net.get_submodule(group.weight.removesuffix(".weight"))
    if conv.bias is not None:
        return conv.bias
    return conv.weight.new_zeros(len(conv.weight))


@torch.no_grad()
def drop_silent(net, alive, kept):
    """Return which of the kept channels may fire in eval mode, {layer: [C] bool},
    True = kept.

    A channel goes if it has no alive weight from a kept channel, and if its constant
    current leaves the potential below the threshold at any T. A layer keeps at least
    one channel, but for one that may lose all. Channels that are picked from a stream
    stay: all that feeds the stream feeds them.

    One pass from the first layer to the last finds all: a weight from a silent channel
    brings nothing.
    """
    groups, kept = models.removable(net), dict(kept)
    read_by = {group.reader: name for name, group in groups.items()}
    for name, group in groups.items():
        if group.weight is None:
            continue
        inputs = alive[group.weight]
        if group.weight in read_by:  # else all that it reads is there
            inputs = inputs[:, kept[read_by[group.weight]]]
        is_fed = inputs.flatten(1).any(1)
        lif = net.get_submodule(group.lif)
        fires = lif.limit(constant_current(net, name)) >= lif.v_threshold
        left = kept[name] & (is_fed | fires)
        if not group.may_be_empty:
            left = keep_one(left, kept[name], alive[group.weight])
        kept[name] = left
    return kept


def needed(net, alive):
    """Return the channels that a network needs which is trained no more, {layer: [C]
    bool}: neither unread nor silent.

    A second round would find no more. A silent channel has no alive weight from one
    that stays, which hence loses no reader. An unread one has none into one that stays,
    which loses no input.
    """
    return drop_silent(net, alive, drop_unread(net, alive))


def without(net, alive, kept):
    """Return a network with the kept channels only, and its masks, {name of a weight:
    bool tensor}."""
    indices, small = channels.kept_indices(net, kept), channels.remove(net, kept)
    masks = {name: alive[name][indices[name]] for name in models.scored_by(small)}
    return small, masks


def describe(dense, small):
    """Return how many channels and MACs a small network has of those of the dense one,
    in words."""
    counts, macs = [], []
    for net in (dense, small):
        widths = net.config["widths"]
        groups = models.removable(net).values()
        counts.append(sum(widths[group.place] for group in groups))
        macs.append(sum(metrics.macs(net.config).values()))
    return (f"channels {counts[0]:,} -> {counts[1]:,}, MACs a step {macs[0]:,} -> "
            f"{macs[1]:,} ({100 * (1 - macs[1] / macs[0]):.2f} % less)")


def make(net, alive):
    """Return the network with the channels that it needs, its masks, and what was left
    out, in words: (small, masks, text). Where nothing can be left out it is
    (None, None, why).

    alive: {name of a weight: bool tensor, True = alive}. Both networks are the same
    function in eval mode.
    """
    if models.neuron_masks(net):
        return None, None, ("its neurons are masked one by one, which a network with "
                            "fewer channels does not keep")
    kept = needed(net, alive)
    if not kept:
        return None, None, (f"{net.config['name']} has no convolutions: only their "
                            f"channels can go")
    if channels.kept_widths(net, kept) == net.config["widths"]:
        return None, None, ("no channel can be left out: alive weights read each one, "
                            "and each may fire")
    small, masks = without(net, alive, kept)
    return small, masks, describe(net, small)


# ---- the script ----------------------------------------------------------------------


def main(argv=None):
    # here, since the library imports nothing of harness
    from harness import files, flags, processes

    parser = flags.Parser(__doc__)
    parser.add_argument("model", type=flags.path, metavar="MODEL.pt",
                        help="the network of a run, runs/NAME/model.pt")
    parser.add_argument("--out", type=flags.path, default=None, metavar="FILE",
                        help="where the smaller one goes (default: compact.pt beside "
                        "MODEL.pt)")
    args = parser.parse_args(argv)
    args.model = Path(args.model)
    out = Path(args.out or args.model.with_name("compact.pt"))
    with flags.exits(2, ValueError, OSError):
        processes.require_one()
        packed = modelfile.read(args.model)
        net = modelfile.unpack(packed, args.model)
        small, masks, text = make(net, packed["masks"])
        if small is None:
            print(f"{args.model}: {text}. Nothing is written")
            return
        if out.exists() and out.samefile(args.model):
            raise ValueError(f"{out} is the file that is read, expected another one to "
                             f"write. Name it by --out")
        files.save_tensors(out, modelfile.pack(small, masks))
    speed = {}
    for n in (1, 32):
        images = as_input(net, random_images(net, n))
        speed[n] = metrics.speedup(net, small, images)
    print(f"{out}: {text}; {speed[1]:.2f} times as fast at batch 1, {speed[32]:.2f} at "
          f"batch 32")


if __name__ == "__main__":
    main()
