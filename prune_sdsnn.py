"""SD-SNN: a spiking network whose structure develops while it trains, neuron by neuron.

Paper: arXiv 2211.12219, and its code. Each synapse owns a range (a dendritic spine) that limits its
weight, grows where the weight presses against it, shrinks where the weight does. Neurons whose
ranges are small are pruned, at a rate that adapts; synapses that keep wanting to grow come back.

    python prune_sdsnn.py                        # embedded data, trimmed to 90 %, in 2 minutes
    python prune_sdsnn.py --sparsity 0           # what the method itself comes to: it has no target
    python prune_sdsnn.py --dataset mnist        # the paper's; also: n-mnist, dvs-gesture, cifar10

To compare it at a matched budget, --sparsity ends the structure epochs with one exact top-K by
magnitude; then the mask is fixed. Elsewhere optimiser, network and loss are those of all scripts.
The published code never moves the ranges of CIFAR-10's convolutions, masks at epoch ends alone, so
that training is dense, leaves pruned neurons their bias, so that they may fire, starts r- at
-max(w), and lets a drift of any size shrink a range: --mode official does so too. Not copied: small
convolutions prune what was regenerated, the output layer is clamped, the best epoch is reported.
"""
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from harness import flags
import metrics
import models
import plans
import training
from masks import Masks, computing_with, momenta, seeded, select, trim
from harness.runfolder import Run, finished

# The shares of neurons that the first update prunes: the paper's for MNIST, and for CIFAR-10
SMALL = dict(epochs_prune=6, epochs_finetune=4, rate_conv=0.05, rate_fc=0.35)
CIFAR = dict(epochs_prune=600, epochs_finetune=0, rate_conv=0.005, rate_fc=0.03, sparsity=0.0)
PAPER = SMALL | dict(model="sdsnn-small", loss="mse", optimizer="adam", time_steps=20, crop=0,
                     epochs_prune=300, epochs_finetune=0, batch_size=100, sparsity=0.0)
SETTINGS = {  # the defaults by data set; "all" holds for each of them
    "all": dict(sparsity=0.9, mode="fixed", growth="signed", optimizer="sgd"),
    "fashion-mini": SMALL | dict(epochs_prune=8), "fashion-mnist": SMALL,
    "mnist": PAPER | dict(encoding="rate"), "n-mnist": PAPER | dict(rate_fc=0.45, crop=4),
    "dvs-gesture": PAPER | dict(rate_fc=0.6, crop=16, time_steps=64, batch_size=4),
    "cifar10": CIFAR | dict(model="sdsnn-large", loss="mse", optimizer="adamw", time_steps=8,
                            batch_size=50),
    "cifar100": CIFAR | dict(time_steps=8), "cifar10-dvs": CIFAR | dict(epochs_prune=300),
    "tiny-imagenet": CIFAR | dict(epochs_prune=50, epochs_finetune=100, sparsity=0.9, time_steps=8),
    "smoke": dict(epochs_prune=5, epochs_finetune=1),  # upper bounds
}
# What else differs: alpha at first and late (they drive the rate of fully connected layers), c (how
# often a synapse must be a candidate), live synapses below which a neuron counts as pruned
MNIST_RULES = dict(alpha=(1, 7.5e-4), count=dict(conv=18, fc=10), few=dict(conv=10, fc=20))
CIFAR_RULES = dict(alpha=(0.5, 5e-4), count=dict(conv=18, fc=18), few=dict(conv=20, fc=20))
DIVISOR, PERCENTILE = 10, dict(conv=65, fc=60)
RULES = dict.fromkeys(("cifar10", "cifar100", "tiny-imagenet", "cifar10-dvs"), CIFAR_RULES) | {
    "dvs-gesture": MNIST_RULES | dict(divisor=11, percentile=dict(conv=65, fc=55))}
ADAM = dict(adam=dict(lr=1e-3, weight_decay=0.0), adamw=dict(lr=2.44e-4, weight_decay=0.01))
STEP_DOWN, WARM_UP = 40, 5  # epochs: of Adam, and of AdamW
WINDOW, EPOCHS = 18, 300  # n, the epochs in a row that move a range, and of training: as published
TOLERANCE = 1e-4  # INTERPRETATION: of |w|; a smaller fall in an epoch is no shrinking


def make_plan(epochs, rules):
    """Return the schedule of `epochs` structure epochs, counted from 0: window (n), first epochs of
    the constraint (clamp) and of pruning (start), last of the falling alpha (late), scale of time.
    INTERPRETATION: the code's 18, 19, 37, 60 are n, n + 1, 2 n + 1, 2 n + 24 for 300 epochs; fewer
    take n = round(18 E / 300), more keep 18; its CIFAR-10 clamps from 6, Brain-Cog's from 19."""
    n = max(1, round(WINDOW * min(epochs, EPOCHS) / EPOCHS))
    count = {kind: round(c * n / WINDOW) for kind, c in rules["count"].items()}
    return SimpleNamespace(**dict(divisor=DIVISOR, percentile=PERCENTILE) | rules | dict(
        count=count, window=n, clamp=n + 1, start=2 * n + 1, late=2 * n + 24,
        scale=EPOCHS / epochs if epochs < 100 else 1))


def kind_of(weight):
    return "conv" if weight.dim() == 4 else "fc"


def synapses(weight):
    """Return [C, C_in]: the kernel of a convolution, summed, is the unit of regeneration."""
    return weight.flatten(2).sum(2) if weight.dim() == 4 else weight


def start_layer(weight, percent, mode="fixed"):
    """Return the state of a layer at the end of epoch 0: a dict of tensors shaped like the weight,
    but for run_growth [C, C_in], ever_pruned [C], percent (P, a number). run_*: see advance()."""
    lowest = -weight.max() if mode == "official" else weight.min()
    return dict(
        upper=torch.full_like(weight, weight.max().clamp(min=0)),
        lower=torch.full_like(weight, lowest.clamp(max=0)), previous=weight.abs(), percent=percent,
        **{f"sum_{bound}": torch.zeros_like(weight) for bound in ("upper", "lower")},
        **{f"run_{what}": torch.zeros_like(weight, dtype=torch.int8)
           for what in ("upper", "lower", "shrink")},
        run_growth=torch.zeros_like(synapses(weight), dtype=torch.int8),
        ever_pruned=torch.zeros_like(weight.flatten(1)[:, 0], dtype=torch.bool))


def advance(run, inside, needed):
    """Count the epochs in a row that places are `inside` a set; return who fires, bool: at a count
    of `needed`; it counts from 0 again. run: int8, changed in place, the count + 1: 0 outside, 1 in
    the first epoch, which does not count."""
    run.add_(1).mul_(inside)
    fired = run > needed
    run[fired] = 1
    return fired


def update_ranges(layer, weight, window, tolerance=TOLERANCE):
    """(a) Move the ranges of a layer. weight: w * m, from before the constraint."""
    outside = dict(upper=weight >= layer["upper"], lower=weight <= layer["lower"])
    for bound in outside:
        run, excess = layer[f"run_{bound}"], layer[f"sum_{bound}"]
        excess.add_(weight - layer[bound]).mul_(outside[bound] & (run > 0))
        fired = advance(run, outside[bound], window)
        layer[bound] += excess / window * fired  # outwards: the excess over r- is negative
        excess[fired] = 0
    # |0| < |0| is false: a masked weight never shrinks
    fired = advance(layer["run_shrink"], weight.abs() < (1 - tolerance) * layer["previous"], window)
    for bound in outside:
        layer[bound][fired] *= 0.75
    layer["previous"] = weight.abs()


def regenerate(layer, weight, mask, percentile, count, signed=True):
    """(c) Revive masked synapses that are above the percentile of their layer for the count + 1st
    time in a row. INTERPRETATION: signed, as in the code: in effect only positive ones return."""
    size = synapses(weight) if signed else synapses(weight).abs()
    above = size > float(np.percentile(size.cpu().numpy(), percentile))  # of all, masked or not
    back = advance(layer["run_growth"], above & (synapses(mask) == 0), count + 1)
    mask |= back.view(*back.shape, *[1] * (mask.dim() - 2))


def prune_neurons(layer, mask, generator):
    """(d) Mask the floor(C P / 100) neurons of smallest incoming ranges, each of them only once."""
    width, n = layer["upper"] + layer["lower"].abs(), len(mask)
    low, high = width.min(), width.max()
    width = (width - low) / (high - low) if high > low else torch.full_like(width, 0.5)
    drive = (width * mask).flatten(1).sum(1, dtype=torch.float64)  # D
    dead = ~mask.flatten(1).any(1)  # they have D = 0 and fill the bottom, before live ones
    count = min(n - 1, math.floor(n * layer["percent"] / 100 + 1e-9))
    smallest = select(torch.ones_like(dead), count, [-drive, dead.double()], generator)
    mask[smallest & ~layer["ever_pruned"]] = False
    layer["ever_pruned"] |= smallest


def n_left(mask, plan):
    """Return C - N_p: the neurons with `few` live synapses, or with all (INTERPRETATION)."""
    live, few = mask.flatten(1).count_nonzero(1), plan.few[kind_of(mask)]
    return int((live >= min(few, mask[0].numel())).count_nonzero())


def next_percent(percent, mask, reader, epoch, plan):
    """Return P of the next epoch ("neurotrophic" adaptation): the more neurons are left, the faster
    it grows. reader: the mask of the layer that reads a convolution, not pruned yet this epoch.
    INTERPRETATION: where the output does, which the paper has nowhere, one of the same width."""
    time = (epoch - plan.start) * plan.scale
    if kind_of(mask) == "conv":
        beyond = len(mask) if reader is None else max(1, n_left(reader, plan))
        percent += math.exp(-time / 5) * n_left(mask, plan) / beyond
    else:
        alpha = plan.alpha[0] * math.exp(-time) if epoch <= plan.late else plan.alpha[1]
        percent += alpha * n_left(mask, plan) / plan.divisor
    return min(percent, 100 * (len(mask) - 1) / len(mask))  # INTERPRETATION: the code has no cap


def prunable_layers(net):
    """Return {name of a weight: name of the hidden one that reads its neurons, or None}, in the
    network's order: all but the output and, in the small networks, the first convolution.
    INTERPRETATION for ResNet-19: inner channels and fc1; a whole stage reads a block's sum."""
    *hidden, output = models.scored_by(net)
    readers = {f"{name}.conv.weight": group.reader if group.reader != output else None
               for name, group in models.removable(net).items()
               if net.config["name"] not in ("small", "sdsnn-small") or name != "convs.0"}
    return readers | {name: None for name in hidden if net.get_parameter(name).dim() == 2}


def develop(epoch, plan, args, readers, state, masks, generator):
    """What SD-SNN does at the end of an epoch, in its order. The weights are w, not w * m: masked
    synapses have trained from 0. Yields mask updates: target, sparsity between their two steps,
    pruned and regenerated weights, [M] bool each, layers that the guard has saved."""
    before, official = masks.flat.clone(), args.mode == "official"
    layers = [(name, masks.weights[name].detach(), masks.alive[name]) for name in readers]
    if epoch == 0:
        rates = dict(conv=100 * args.rate_conv, fc=100 * args.rate_fc)
        state |= {name: start_layer(w, rates[kind_of(w)], args.mode) for name, w, _ in layers}
        return
    for name, weight, mask in layers:
        # (a) ranges, by w * m. The official CIFAR-10 code never moves those of convolutions
        if not (official and kind_of(weight) == "conv"):
            update_ranges(state[name], weight * mask, plan.window, 0 if official else TOLERANCE)
        if epoch >= plan.clamp:  # (b) synaptic constraint, of masked synapses too
            weight.clamp_(state[name]["lower"], state[name]["upper"])
    if epoch >= plan.start:
        growth = 1.1 ** min(100, (epoch - plan.start) * plan.scale)
        for name, weight, mask in layers:  # (c) regeneration, of what earlier epochs pruned
            percentile = min(99, plan.percentile[kind_of(weight)] + growth)
            regenerate(state[name], weight, mask, percentile, plan.count[kind_of(weight)],
                       args.growth == "signed")
        regenerated, between = masks.flat & ~before, masks.sparsity
        for name, _, mask in layers:  # (d) pruning, then its rate; convolutions come first
            prune_neurons(state[name], mask, generator)
            state[name]["percent"] = next_percent(state[name]["percent"], mask,
                                                  masks.alive.get(readers[name]), epoch, plan)
        yield None, between, before & ~masks.flat, regenerated, []
    if epoch == args.epochs_prune - 1 and args.sparsity > 0:
        yield trim(args.sparsity, masks, generator)


@torch.no_grad()
def silence(net, masks, names, optimizer, for_good):
    """Keep neurons without a live synapse from firing: their bias or beta and the mean of BN are 0.
    INTERPRETATION: gamma becomes 0 for_good only, when none can return any more: through it the
    gradient reaches masked synapses. The variance stays 1, for those that return."""
    for name in names:
        gone = ~masks.alive[name].flatten(1).any(1)
        owner = net.get_submodule(name.removesuffix(".weight").removesuffix(".conv"))
        norm = getattr(owner, "bn", None)
        bias = getattr(owner, "conv", owner).bias  # None with BN, and in Grad R's networks
        parts = [norm.bias, norm.running_mean] + [norm.weight] * for_good if norm else [
            bias] * (bias is not None)
        for tensor in parts:
            for part in (tensor, *momenta(optimizer, tensor)):
                part.masked_fill_(gone, 0)
        if norm:
            norm.running_var.masked_fill_(gone, 1)


# ---- the script ----------------------------------------------------------------------------------


def rate(args, stages, iteration):
    """Return the lr of a step: a cosine a stage, warmed up for AdamW. INTERPRETATION: for Adam too,
    whose x 0.1 every 40 epochs (1e-10 in the end) is left to --mode official."""
    step, steps = stages.position(iteration)
    if args.optimizer == "adam" and args.mode == "official":
        return args.lr * 0.1 ** (step // (STEP_DOWN * stages.steps_per_epoch))
    warm = min(1, (step + 1) / (WARM_UP * stages.steps_per_epoch))
    return training.cosine(args.lr, step, steps) * (warm if args.optimizer == "adamw" else 1)


def run_name(args):
    name = f"{Path(args.dataset).stem}-{args.model}-sdsnn" + "-official" * (args.mode == "official")
    name += f"-{args.sparsity:g}" * (args.sparsity > 0) + "-unsigned" * (args.growth == "unsigned")
    return f"{name}-seed{args.seed}"


def complete(args, explicit):
    """Refuse a rate of layers that are not there, and too few epochs for a single update."""
    for flag, value in ADAM.get(args.optimizer, {}).items():
        setattr(args, flag, explicit.get(flag, value))
    if args.model not in plans.HIDDEN_LINEAR:
        if explicit.get("rate_fc", 0) != 0:
            raise ValueError(f"--rate-fc is {explicit['rate_fc']:g}, but the one linear layer of "
                             f"{args.model} is its output. Leave it out, or take another --model")
        args.rate_fc = 0.0
    if args.epochs_prune <= make_plan(args.epochs_prune, MNIST_RULES).start:
        raise ValueError(f"--epochs-prune is {args.epochs_prune}, expected at least 4: no update "
                         f"would ever run, since the ranges move first. Raise it")


def parse_args(argv):
    parser = flags.make_parser(__doc__)
    add = parser.add_argument_group("pruning (SD-SNN)").add_argument
    add("--sparsity", type=flags.number(0, 1), help="share of the prunable weights that is dead in "
        "the end, a fraction in [0, 1), by a top-K after the structure epochs; 0: no top-K")
    add("--rate-conv", type=flags.number(0, 1), metavar="P", help="share of the neurons of each "
        "convolution that the first update prunes, a fraction in [0, 1); then it adapts")
    add("--rate-fc", type=flags.number(0, 1), metavar="P", help="the same, of hidden linear layers")
    add("--optimizer", choices=("sgd", "adam", "adamw"), help="adam: lr 1e-3, no weight decay; "
        "adamw: lr 2.44e-4, weight decay 0.01; sgd: with the defaults of prune_unstructured.py")
    add("--growth", choices=("signed", "unsigned"), help="regenerate the largest w, or |w|")
    add("--mode", choices=("fixed", "official"), help="official: as the published CIFAR-10 code, "
        "ranges of convolutions stay, training is dense, pruned neurons keep their bias")
    add("--epochs-prune", type=flags.whole(1), metavar="N", help="epochs of developing structure")
    add("--epochs-finetune", type=flags.whole(0), metavar="N", help="epochs with the mask fixed")
    return flags.parse(parser, argv, SETTINGS, complete, run_name)


def main(argv=None):
    args = parse_args(argv)
    with flags.exits(2, ValueError, OSError):  # all that can be checked, before anything is written
        if (summary := finished(args)) is not None:
            return summary
        device = training.set_up(args)
        images = training.load(args, device)
        net = training.build(args, images)
        masks, optimizer = Masks(net), training.optimizer(args, net.parameters())
        stages = training.stages(args, images, prune=args.epochs_prune,
                                 finetune=args.epochs_finetune)
        masks.check(args.sparsity)
        run = Run(args, device, stages, net=net, optimizer=optimizer, masks=masks)

    plan = make_plan(args.epochs_prune, RULES.get(args.dataset, MNIST_RULES))
    readers, strict = prunable_layers(net), args.mode == "fixed"
    state = run.notes.setdefault("layers", {})
    for layer in state.values():  # from a checkpoint they come on the CPU
        layer |= {key: layer[key].to(device) for key in layer.keys() - {"percent"}}
    forward = torch.compile(net) if args.compile else net
    with run.under_way():
        run.header(images, net, f"structure changes from epoch {plan.start + 1} on")
        if args.init is not None and run.iteration == 0:
            run.notes["dense_accuracy"] = training.evaluate(forward, net, images, args)["accuracy"]

        for epoch in range(run.epoch, stages.epochs):
            develops, is_last = epoch < args.epochs_prune, epoch == args.epochs_prune - 1
            for x, y in run.track(images, epoch):
                with computing_with(masks, readers if develops and strict else ()):
                    with training.autocast(args):
                        logits = forward(x)  # [T, N, K]
                    loss = training.loss_over_time(logits, y, args.loss)
                    optimizer.zero_grad()
                    loss.backward()
                training.set_lr(optimizer, rate(args, stages, run.iteration))
                optimizer.step()
                if not develops:
                    masks.apply(optimizer)
                if strict:
                    silence(net, masks, readers, optimizer, for_good=not develops)
                run.meter.add(loss, logits, y, run.iteration)

            if develops:
                run.check()
                for target, between, pruned, regenerated, rescued in develop(
                        epoch, plan, args, readers, state, masks, seeded(args.seed, run.iteration)):
                    if rescued:
                        run.say(f"  note: {', '.join(rescued)} kept one weight, or would be empty")
                    run.add_update(dict(update=len(run.updates) + 1, iteration=run.iteration,
                                        target=target, before=between,
                                        **masks.account(pruned, regenerated)))
                masks.apply(optimizer)  # w <- w * m: masked synapses start each epoch from 0
                run.verify(masks.keep_at(args.sparsity) if is_last and args.sparsity > 0 else None)
                if strict:
                    silence(net, masks, readers, optimizer, for_good=is_last)
                if is_last:
                    state.clear()  # several times the size of the network, and of no more use
            run.end_epoch(optimizer.param_groups[0]["lr"],
                          training.evaluate(forward, net, images, args), masks.sparsity)

        with training.autocast(args):
            counts = metrics.count(net, images.inputs("test", args.batch_size), masks.alive)
        dead = [0.0] + [row["sparsity"] for row in run.rows[:-1]]  # in training, at epoch starts
        cost = 1 - sum(dead if strict else dead[args.epochs_prune:]) / len(dead)
        return run.finish(
            net, masks.alive, counts, script="prune_sdsnn", method="sdsnn", training_cost=cost,
            macs_dense=counts["macs"], dense_accuracy=run.notes.get("dense_accuracy"),
            pruned_accuracy=run.rows[args.epochs_prune - 1]["test_accuracy"],
            survived_by_regeneration=masks.share_regenerated)


if __name__ == "__main__":
    main()
