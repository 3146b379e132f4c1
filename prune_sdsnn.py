"""SD-SNN: a spiking network whose structure develops while it trains, neuron by neuron.

Paper: "Adaptive Sparse Structure Development with Pruning and Regeneration for Spiking
Neural Networks", Han et al. 2022, arXiv 2211.12219, and its code. Each synapse has a
range that limits its weight, as a dendritic spine has a size. The range grows where the
weight exceeds it for many epochs, and shrinks where the weight falls. Neurons whose
ranges are small are pruned, at a rate that adapts. Masked synapses whose weights are
large for many epochs come back.

    python prune_sdsnn.py                   # the whole job on embedded data
    python prune_sdsnn.py --sparsity 0      # as sparse as the method itself makes it
    python prune_sdsnn.py --dataset mnist   # the paper's setting; also: n-mnist,
                                            # dvs-gesture, cifar10

The method has no target. To compare it at a matched budget, --sparsity ends the
structure epochs with one exact top-K by magnitude; then the mask is fixed. On data sets
that the paper has not, optimiser, network and loss are those of all scripts.

--mode official does as the code in the paper's own repository, which differs between
CIFAR-10 and the other data sets (here cifar100, tiny-imagenet and cifar10-dvs go by
CIFAR-10's):
  - it masks at the ends of epochs only, so that training is dense;
  - it leaves pruned neurons their bias, so that they may fire;
  - it starts r- at -max(w), and lets a fall of any size shrink a range;
  - with Adam, lr falls to a tenth after 41 epochs, and every 40 epochs from then on;
  - CIFAR-10: the ranges of convolutions never move, and the synaptic constraint starts
    at epoch 6. All filters with as many live synapses tie, so that which of them go is
    arbitrary: the published code leaves it to argsort, and here the seed decides.
In no mode here, but in the published code: small convolutions prune again what was
regenerated; nothing is regenerated on N-MNIST; the output layer is clamped; the best
epoch is the one reported.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import harness  # first: what is not installed is then one line

import numpy as np
import torch

import models
import plans
import training
from harness import flags, presets, setup
from harness.runfolder import Run, finished
from masks import Masks, Update, computing_with, momenta, select
from neurons import widest

WINDOW, EPOCHS = 18, 300  # n, and the epochs of training that it is published for
TOLERANCE = 1e-4  # INTERPRETATION: a smaller fall of |w| in an epoch is no shrinking


# ---- when: the schedule --------------------------------------------------------------


@dataclass
class Schedule:
    """When the structure develops, in epochs from 0, and the numbers of its rules.

    The last five are those of a data set, see harness/presets.py; with --mode official
    `clamp` and `moves` are too. percentile, count and few have a number for
    convolutions ("conv") and one for fully connected layers ("fc").
    """

    window: int   # n: epochs in a row until a range moves
    clamp: int    # the first epoch with the synaptic constraint
    start: int    # the first epoch with regeneration and pruning
    late: int     # the last epoch with the falling alpha
    scale: float  # of time, in the exponents

    moves: tuple  # the kinds of layers whose ranges move, "conv" and "fc"
    alpha: tuple
    divisor: float
    percentile: dict
    count: dict
    few: dict


def make_schedule(epochs, rules, official=False):
    """Return the Schedule of `epochs` structure epochs.

    rules: the numbers of a data set. INTERPRETATION: the published 18, 19, 37 and 60
    are n, n + 1, 2 n + 1 and 2 n + 24 for 300 epochs. Fewer epochs have
    n = round(18 epochs / 300), more keep 18. The constraint starts at n + 1, before
    which no range can have moved; the code for CIFAR-10 starts it at 6 of 600 epochs.
    """
    n = max(1, round(WINDOW * min(epochs, EPOCHS) / EPOCHS))
    counts = {kind: round(c * n / WINDOW) for kind, c in rules["count"].items()}
    scale = EPOCHS / epochs if epochs < 100 else 1
    clamp, moves = n + 1, ("conv", "fc")
    if official:
        moves = rules["moves"]
        if rules["clamp"] is not None:
            clamp = max(1, round(rules["clamp"] * n / WINDOW))
    return Schedule(window=n, start=2 * n + 1, late=2 * n + 24, scale=scale,
                    **rules | dict(count=counts, clamp=clamp, moves=moves))


# ---- where: the layers, and what each remembers --------------------------------------


def prunable_layers(net):
    """Return {name of a weight: name of the hidden weight that reads its neurons, or
    None}, in the network's order.

    These are all layers but the output and, in the small networks, the first
    convolution. INTERPRETATION for ResNet-19: the inner channels of its blocks, and
    fc1. The output of a block is added to those of its whole stage.
    """
    *hidden, output = models.scored_by(net)
    readers = {}
    for name, group in models.removable(net).items():
        if group.weight is None:  # picked from a stream
            continue
        small = ("small", "small-avg", "sdsnn-small")
        if name == "convs.0" and net.config["name"] in small:
            continue
        is_hidden = group.reader != output
        readers[group.weight] = group.reader if is_hidden else None
    linear = [name for name in hidden if net.get_parameter(name).dim() == 2]
    return readers | dict.fromkeys(linear)


def kind_of(weight):
    return "conv" if weight.dim() == 4 else "fc"


def synapses(weight):
    """Return the units of regeneration, [C, C_in]: kernels of a convolution, summed."""
    return weight.flatten(2).sum(2) if weight.dim() == 4 else weight


def start_layer(weight, percent, official=False):
    """Return the state of a layer at the end of epoch 0, a dict.

    weight: [C, C_in, ...]. percent: P, of the neurons that are pruned.
      upper, lower   r+ and r-, the range of each weight
      previous       |w| at the end of the last epoch
      sum_*          what a weight exceeded its bound by, summed over epochs in a row
      run_*          epochs in a row, as advance() counts them: outside a bound, with a
                     falling |w|, as a candidate to come back ([C, C_in])
      ever_pruned    [C], neurons
    """
    lowest = -weight.max() if official else weight.min()
    no_epochs = torch.zeros_like(weight, dtype=torch.int8)
    return dict(
        upper=torch.full_like(weight, weight.max().clamp(min=0)),
        lower=torch.full_like(weight, lowest.clamp(max=0)),
        previous=weight.abs(),
        percent=percent,
        sum_upper=torch.zeros_like(weight),
        sum_lower=torch.zeros_like(weight),
        run_upper=no_epochs.clone(),
        run_lower=no_epochs.clone(),
        run_shrink=no_epochs.clone(),
        run_growth=torch.zeros_like(synapses(weight), dtype=torch.int8),
        ever_pruned=torch.zeros_like(weight.flatten(1)[:, 0], dtype=torch.bool))


def start_layers(masks, names, rates, official=False):
    """Return {name: state} of layers. rates: {"conv" | "fc": share of the neurons that
    the first update prunes}."""
    weights = {name: masks.weights[name].detach() for name in names}
    return {name: start_layer(weight, 100 * rates[kind_of(weight)], official)
            for name, weight in weights.items()}


def advance(epochs_in_a_row, inside, needed):
    """Count one more epoch. Return where the count has come to `needed`, bool; there it
    starts again from 0.

    inside: bool, where an epoch counts; elsewhere the row breaks. The first epoch of a
    row does not count. epochs_in_a_row: int8, changed in place: the count + 1 within a
    row, 0 outside.
    """
    epochs_in_a_row.add_(1).mul_(inside)
    fired = epochs_in_a_row > needed
    epochs_in_a_row[fired] = 1
    return fired


# ---- the four rules of a layer -------------------------------------------------------


def update_ranges(layer, weight, window, tolerance=TOLERANCE):
    """(a) Move the ranges of a layer.

    weight: w * m, from before the constraint. After `window` epochs in a row outside a
    bound, the bound moves by the mean excess; with a falling |w|, the range shrinks to
    3/4. tolerance: a share of |w|.
    """
    outside = dict(upper=weight >= layer["upper"], lower=weight <= layer["lower"])
    for bound, is_outside in outside.items():
        row, excess = layer[f"run_{bound}"], layer[f"sum_{bound}"]
        excess.add_(weight - layer[bound]).mul_(is_outside & (row > 0))
        fired = advance(row, is_outside, window)
        layer[bound] += excess / window * fired  # outwards: below r- it is negative
        excess[fired] = 0

    # |0| < |0| is false: a masked weight never shrinks
    falls = weight.abs() < (1 - tolerance) * layer["previous"]
    fired = advance(layer["run_shrink"], falls, window)
    layer["upper"][fired] *= 0.75
    layer["lower"][fired] *= 0.75
    layer["previous"] = weight.abs()


def constrain(layer, weight):
    """(b) Keep the weights within their ranges, those of masked synapses too."""
    weight.clamp_(layer["lower"], layer["upper"])


def regenerate_synapses(layer, weight, mask, percentile, count, signed=True):
    """(c) Bring back masked synapses that were above a percentile of their layer for
    more than `count` epochs in a row.

    The percentile is that of all synapses, masked or not. INTERPRETATION: signed, as in
    the code; so in effect only positive ones return.
    """
    size = synapses(weight) if signed else synapses(weight).abs()
    threshold = float(np.percentile(size.cpu().numpy(), percentile))
    candidates = (size > threshold) & (synapses(mask) == 0)
    back = advance(layer["run_growth"], candidates, count + 1)
    if mask.dim() == 4:
        back = back[:, :, None, None]  # whole kernels
    mask |= back


def prune_neurons(layer, mask, generator):
    """(d) Mask the floor(C P / 100) neurons whose live synapses have the smallest
    ranges. A neuron is pruned only once. Of equal ones the generator draws."""
    width, n = layer["upper"] + layer["lower"].abs(), len(mask)
    low, high = width.min(), width.max()
    if high > low:
        width = (width - low) / (high - low)
    else:
        width = torch.full_like(width, 0.5)
    dtype = widest(width.device)
    drive = (width * mask).flatten(1).sum(1, dtype=dtype)  # D, [C]
    # dead neurons have D = 0. They come first, before live ones of the same D
    dead = ~mask.flatten(1).any(1)
    count = min(n - 1, math.floor(n * layer["percent"] / 100 + 1e-9))
    everyone = torch.ones_like(dead)
    smallest = select(everyone, count, [-drive, dead.to(dtype)], generator)
    mask[smallest & ~layer["ever_pruned"]] = False
    layer["ever_pruned"] |= smallest


def n_left(mask, schedule):
    """Return C - N_p, the number of neurons with enough live synapses: `few` or more.

    INTERPRETATION: where a neuron has fewer in all, all of them are enough.
    """
    live = mask.flatten(1).count_nonzero(1)
    enough = min(schedule.few[kind_of(mask)], mask[0].numel())
    return int((live >= enough).count_nonzero())


def next_percent(percent, mask, reader, epoch, schedule):
    """Return P of the next epoch, the paper's "neurotrophic" adaptation: the more
    neurons are left, the faster it grows.

    reader: the mask of the layer that reads a convolution; it is not pruned yet in this
    epoch. INTERPRETATION: where the output layer reads it, which the paper has nowhere,
    a layer of the same width stands in. INTERPRETATION: P has a cap, the code has none.
    """
    time = (epoch - schedule.start) * schedule.scale
    if kind_of(mask) == "conv":
        beyond = len(mask) if reader is None else max(1, n_left(reader, schedule))
        percent += math.exp(-time / 5) * n_left(mask, schedule) / beyond
    else:
        early, late = schedule.alpha
        alpha = early * math.exp(-time) if epoch <= schedule.late else late
        percent += alpha * n_left(mask, schedule) / schedule.divisor
    return min(percent, 100 * (len(mask) - 1) / len(mask))


# ---- the end of an epoch -------------------------------------------------------------


def develop(epoch, schedule, layers, readers, masks, generator, official=False,
            signed=True):
    """Develop the structure at the end of an epoch after the first, in the order of the
    published code.

    layers: {name: state}, changed in place. readers: of prunable_layers(). The weights
    are w, not w * m: masked synapses have trained from 0 in this epoch. Returns the
    Update, or None as long as no structure changes.
    """
    before = masks.flat.clone()
    rows = [(name, layer, masks.weights[name].detach(), masks.alive[name])
            for name, layer in layers.items()]

    for name, layer, weight, mask in rows:
        if kind_of(weight) in schedule.moves:
            tolerance = 0 if official else TOLERANCE
            update_ranges(layer, weight * mask, schedule.window, tolerance)  # (a)
        if epoch >= schedule.clamp:
            constrain(layer, weight)  # (b)
    if epoch < schedule.start:
        return None

    growth = 1.1 ** min(100, (epoch - schedule.start) * schedule.scale)
    for name, layer, weight, mask in rows:
        kind = kind_of(weight)
        percentile = min(99, schedule.percentile[kind] + growth)
        regenerate_synapses(layer, weight, mask, percentile, schedule.count[kind],
                            signed)  # (c)
    regenerated, between = masks.flat & ~before, masks.sparsity

    for name, layer, weight, mask in rows:  # convolutions come first
        prune_neurons(layer, mask, generator)  # (d)
        reader = masks.alive.get(readers[name])
        layer["percent"] = next_percent(layer["percent"], mask, reader, epoch, schedule)
    return Update(before & ~masks.flat, between, regenerated, rescued=[])


def trim(sparsity, masks, generator):
    """End the structure epochs at exactly this sparsity. Return the Update.

    The largest |w| of those alive stay. INTERPRETATION: where fewer are alive, those
    dead ones return that have drifted farthest in this epoch.
    """
    keep, magnitudes = masks.keep_at(sparsity), masks.magnitudes()
    missing = max(0, keep - masks.n_alive)
    regenerated = masks.regenerate(missing, ~masks.flat, [magnitudes], generator)
    between = masks.sparsity
    pruned = masks.prune(keep, magnitudes, generator)
    return Update(pruned, between, regenerated, masks.rescue_empty_layers())


# ---- a step of the structure epochs --------------------------------------------------


def masked(masks, names):
    """Return the weights of `names`, and what the network computes with: w * m.

    INTERPRETATION: w takes the gradient by w * m (straight-through). So masked synapses
    train on, and show whether they grow.
    """
    weights = [masks.weights[name] for name in names]
    return weights, [masks.weights[name].detach() * masks.alive[name] for name in names]


@torch.no_grad()
def mute_dead_neurons(net, masks, names, optimizer, for_good=False):
    """Keep the neurons of `names` that have no live synapse from firing: the shift that
    they would still get, of a bias or of BN, becomes 0.

    for_good: none can return any more. INTERPRETATION: only then gamma becomes 0 too,
    since masked synapses get their gradient through it. The variance of BN becomes 1,
    for those that return.
    """
    for name in names:
        gone = ~masks.alive[name].flatten(1).any(1)
        owner = net.get_submodule(name.removesuffix(".weight").removesuffix(".conv"))
        norm = getattr(owner, "bn", None)
        if norm is not None:
            shifts = [norm.bias, norm.running_mean]
            if for_good:
                shifts.append(norm.weight)
            norm.running_var.masked_fill_(gone, 1)
        else:
            bias = getattr(owner, "conv", owner).bias
            shifts = [] if bias is None else [bias]
        for tensor in shifts:
            tensor.masked_fill_(gone, 0)
            for momentum in momenta(optimizer, tensor):
                momentum.masked_fill_(gone, 0)


# ---- the script ----------------------------------------------------------------------

STEP_DOWN, WARM_UP = 40, 5  # epochs: of Adam, and of AdamW


def learning_rate(args, stages, iteration):
    """Return the lr of an iteration, from 1: a cosine a stage, or what --schedule says,
    warmed up for AdamW.

    INTERPRETATION: Adam has the cosine too. Its x 0.1 after each 40 epochs from the
    second on, which ends at 1e-10, is left to --mode official.
    """
    step, steps = stages.position(iteration)
    if args.optimizer == "adam" and args.mode == "official":
        epoch = step // stages.steps_per_epoch  # from 0
        return args.lr * 0.1 ** (max(0, epoch - 1) // STEP_DOWN)
    lr = training.lr_at(args.schedule, args.lr, step, steps)
    if args.optimizer == "adamw":
        lr *= min(1, (step + 1) / (WARM_UP * stages.steps_per_epoch))
    return lr


def run_name(args):
    name = f"{Path(args.dataset).stem}-{args.model}-sdsnn"
    if args.mode == "official":
        name += "-official"
    if args.sparsity > 0:
        name += f"-{args.sparsity:g}"
    if args.growth == "unsigned":
        name += "-unsigned"
    return f"{name}-seed{args.seed}"


def complete(args, explicit):
    """Fill in the defaults that depend on other flags; refuse what does not fit."""
    usual = presets.of(args.dataset, "sdsnn")
    if args.optimizer == "adam" and args.mode == "official":
        flags.set_unused(args, explicit, dict(schedule=usual["schedule"]),
                         "--mode official with --optimizer adam")
    model = f"--model {args.model}"
    if args.model not in plans.HIDDEN_LINEAR:  # its one linear layer is the output
        flags.set_unused(args, explicit, dict(rate_fc=0.0), model)
    if plans.NETWORKS[args.model].layers[0] == "F":  # it has no convolution
        flags.set_unused(args, explicit, dict(rate_conv=0.0), model)
    if args.epochs_prune <= make_schedule(args.epochs_prune, usual["rules"]).start:
        raise ValueError(f"--epochs-prune is {args.epochs_prune}, expected at least 4: "
                         f"no update would ever run, since the ranges move first. "
                         f"Raise it")


def parse_args(argv):
    parser = flags.make_parser(__doc__)
    add = parser.add_argument_group("pruning (SD-SNN)").add_argument
    add("--sparsity", type=flags.number(0, 1), help="share of the prunable weights "
        "that is dead in the end, a fraction in [0, 1), by a top-K after the structure "
        "epochs; 0: no top-K")
    add("--rate-conv", type=flags.number(0, 1), metavar="P", help="share of the "
        "neurons of each convolution that the first update prunes, a fraction in "
        "[0, 1); then it adapts")
    add("--rate-fc", type=flags.number(0, 1), metavar="P",
        help="the same, of hidden linear layers")
    add("--growth", choices=("signed", "unsigned"),
        help="regenerate the largest w, or |w|")
    add("--mode", choices=("fixed", "official"), help="official: as the published "
        "code, training is dense, pruned neurons keep their bias, with the rules of "
        "CIFAR-10 the ranges of convolutions stay")
    add("--epochs-prune", type=flags.whole(1), metavar="N",
        help="epochs of developing structure")
    add("--epochs-finetune", type=flags.whole(0), metavar="N",
        help="epochs with the mask fixed")
    return flags.parse(parser, argv, "sdsnn", complete, run_name)


def set_up(args):
    """Return the run. What cannot work is exit code 2, before anything is written."""
    with flags.exits(2, ValueError, OSError, no_memory=flags.SMALLER):
        device = setup.start(args)
        images = setup.load(args, device)
        net = setup.build(args, images)
        masks = Masks(net)
        optimizer = training.optimizer(args, net.parameters())
        stages = setup.stages(args, images, prune=args.epochs_prune,
                              finetune=args.epochs_finetune)
        masks.check_sparsity(args.sparsity)
        return Run(args, device, images, stages, net=net, optimizer=optimizer,
                   masks=masks)


def layers_of(run):
    """Return {name: state} of the layers, which checkpoints hold; at first empty."""
    layers = run.notes.setdefault("layers", {})
    for layer in layers.values():  # a checkpoint is read on the CPU
        for key in layer.keys() - {"percent"}:
            layer[key] = layer[key].to(run.device)
    return layers


def training_cost(run):
    """Return the mean density over the epochs, each at its start. Where training is
    dense, structure epochs count 1."""
    dead = [0.0] + [row["sparsity"] for row in run.rows[:-1]]
    sparse_from = run.args.epochs_prune if run.args.mode == "official" else 0
    return 1 - sum(dead[sparse_from:]) / len(dead)


def main(argv=None):
    args = parse_args(argv)
    if (summary := finished(args)) is not None:
        return summary
    run = set_up(args)
    net, masks, optimizer = run.net, run.masks, run.optimizer
    official = args.mode == "official"
    schedule = make_schedule(args.epochs_prune,
                             presets.of(args.dataset, "sdsnn")["rules"], official)
    readers, layers = prunable_layers(net), layers_of(run)
    in_training = () if official else readers  # layers that are masked there too

    with run.under_way(f"structure changes from epoch {schedule.start + 1} on"):
        for epoch in run.epochs("prune"):
            for x, y in run.batches(epoch):
                with computing_with(*masked(masks, in_training)):  # w * m
                    training.backward(run, x, y)
                lr = learning_rate(args, run.stages, run.iteration)
                training.descend(optimizer, lr)  # w, masked synapses too
                mute_dead_neurons(net, masks, in_training, optimizer)

            generator = run.generator()
            if epoch == 0:
                rates = dict(conv=args.rate_conv, fc=args.rate_fc)
                layers |= start_layers(masks, readers, rates, official)
            else:
                change = develop(epoch, schedule, layers, readers, masks, generator,
                                 official, signed=args.growth == "signed")
                if change is not None:
                    run.log_update(None, change, masks_hold=False)

            is_last = epoch == args.epochs_prune - 1
            if is_last and args.sparsity > 0:
                change = trim(args.sparsity, masks, generator)
                masks.apply(optimizer)
                run.log_update(args.sparsity, change, masks.keep_at(args.sparsity))
            masks.apply(optimizer)  # masked synapses start each epoch from 0
            mute_dead_neurons(net, masks, in_training, optimizer, for_good=is_last)
            if is_last:
                layers.clear()  # several times as large as the network, needed no more
            run.end_epoch()

        for epoch in run.epochs("finetune"):
            for x, y in run.batches(epoch):
                lr = learning_rate(args, run.stages, run.iteration)
                training.step(run, x, y, lr)
                masks.apply(optimizer)  # w <- w * m, and its momentum
                mute_dead_neurons(net, masks, in_training, optimizer, for_good=True)
            run.end_epoch()

        return run.finish("prune_sdsnn", "sdsnn", training_cost=training_cost(run),
                          pruned_accuracy=run.last_accuracy("prune"),
                          survived_by_regeneration=masks.share_regenerated)


if __name__ == "__main__":
    main()
