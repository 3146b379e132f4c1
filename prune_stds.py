"""STDS: a dead zone that grows while the network trains decides which weights exist.

Paper: "State Transition of Dendritic Spines Improves Learning of Sparse Spiking Neural
Networks", Chen et al., ICML 2022 (PMLR 162, chen22ac), and its code. A weight is a
spine of size theta, of either sign. While |theta| <= D it is a filopodium, and its
weight is 0; beyond D it is a synapse:

    w = sign(theta) * max(|theta| - D, 0)

The network computes with w. The gradient dL/dw moves theta, in the dead zone too: so a
weight can go, come back, and change its sign. The dead zone D grows from 0 to
--dead-zone on a sine. An alive weight is thus pulled to 0 by as much as D grows, in all
by exactly D, whatever the learning rate. After these structure epochs exactly the K
largest |theta| of all layers stay, and w trains on with the mask fixed.

    python prune_stds.py                      # the whole job on embedded data
    python prune_stds.py --optimizer adam     # the published optimiser
    python prune_stds.py --ramp linear        # the paper's other ramp
    python prune_stds.py --dead-zone 0.5      # another width
    python prune_stds.py --dataset cifar10    # the paper's setting
    python prune_stds.py --as-published       # Adam, mean square error, no exact cut

How many weights the dead zone leaves is an outcome of D, and a run prints it beside K.
The default of --dead-zone is tuned on the embedded data. To find one for another
network, bisect in runs with --epochs-finetune 0 and another --seed. Halfway the
sparsity may be above that of the end: the last epochs of the ramp hardly pull, and
weights come back.

The rule is that of the authors' code: one D for all layers, all convolutions and linear
layers, the first and the last too, moments of the optimiser untouched. --mode paper
makes no exact cut: what D leaves is the result. With --epochs-finetune 0, as on
cifar10, it ends where that code ends.

Differences from that code: N epochs are N, not N + 1; a run that is resumed goes on
with its D, where the code starts again from 0; the mask says which weights are alive,
not w == 0; a theta of 0 moves, where the code keeps it for ever; no layer ends empty;
on CIFAR-10 its network has a dropout before the second linear layer too.
"""
import math
from contextlib import nullcontext
from pathlib import Path

import harness  # first: what is not installed is then one line

import torch

import training
from harness import flags, presets, published, setup
from harness.runfolder import Run, finished
from masks import Masks, TooFew, change_since, computing_with, count, select, write

# ---- the dead zone -------------------------------------------------------------------
# A ramp gives the share of D that is reached when a share x of the steps is done.


def sine(x):
    """Return sin^2(pi x / 2): it hardly grows at both ends, and most at half time."""
    return math.sin(math.pi * x / 2) ** 2


def linear(x):
    """Return x: it pulls alike to the end."""
    return x


RAMPS = {"sine": sine, "linear": linear}


def dead_zone_after(step, steps, width, ramp):
    """Return D_i = D * ramp(i / N), the dead zone after step i of N.

    step: i, 0 before the first one. steps: N. width: D. ramp: a key of RAMPS.
    """
    return width * RAMPS[ramp](step / steps)


# ---- a step of the structure epochs --------------------------------------------------
# theta: the parameters, a list of tensors. In these epochs the optimiser holds theta.


@torch.no_grad()
def synapses(theta, dead_zone):
    """Return the weights w = sign(theta) * max(|theta| - D, 0), a list of tensors.

    What is on the edge, |theta| = D, is dead. INTERPRETATION: so is a theta of 0, and
    it takes its gradient as all others do. In the code such a weight stays 0 for ever.
    """
    return [spine.sign() * (spine.abs() - dead_zone).clamp(min=0) for spine in theta]


@torch.no_grad()
def decay_synapses(theta, w, decay, kind, lr):
    """Add weight decay, after the backward pass and before the optimiser's step.

    INTERPRETATION: it acts on w, and so not on spines in the dead zone, as a weight
    that is 0 has no decay. The published code has no decay.
    w: what the network has computed with. kind: --optimizer; AdamW's decay passes by
    its moments, that of the others is part of the gradient.
    """
    if decay == 0:
        return
    for spine, weight in zip(theta, w):
        if kind == "adamw":
            spine.sub_(weight, alpha=lr * decay)
        else:
            spine.grad.add_(weight, alpha=decay)


def share_alive(masks, dead_zone):
    """Return the share of the spines that are synapses, |theta| > D."""
    return count(masks.magnitudes() > dead_zone) / masks.total


def follow(masks, dead_zone):
    """Let the masks be the spines that are synapses now. Return what has changed since
    the last time, an Update."""
    before = masks.flat.clone()
    masks.flat.copy_(masks.magnitudes() > dead_zone)
    return change_since(before, masks)


# ---- from spines to weights ----------------------------------------------------------


def fix_mask(keep, dead_zone, masks, optimizer, generator):
    """End the structure epochs: exactly the `keep` largest |theta| are alive from now
    on, and the parameters are w. Return what that changes, an Update.

    keep: None: those that D leaves. masks: those of D (see follow).

    INTERPRETATION, since the published code has no target: D is one number for all
    layers, and a ranking of |theta| over all layers moves that number. A weight that
    comes back, because D has left too few, starts at 0. What is dead loses its
    momentum. Each layer keeps at least one.
    """
    before, magnitudes = masks.flat.clone(), masks.magnitudes()  # |theta|
    if keep is not None:
        everywhere = torch.ones_like(before)
        masks.flat.copy_(select(everywhere, keep, [magnitudes], generator))
    rescued = masks.rescue_empty_layers(magnitudes)
    theta = masks.weights.values()
    write(theta, synapses(theta, dead_zone))
    masks.apply(optimizer)  # w <- w * m, and its momentum
    return change_since(before, masks, rescued)


# ---- the default of the dead zone ----------------------------------------------------

# Of the CIFAR-10 runs D = 1 ... 5 the one that prunes least, and the sum of its rates:
# 2048 epochs of 3,125 steps at 1e-4
PAPER_DEAD_ZONE, PAPER_SUM = 1.0, 2048 * 3125 * 1e-4

# {share of the weights that D leaves: D}, measured on fashion-mini with `small`,
# TUNED_STEPS steps, TUNED_LR:
#     python prune_stds.py --dead-zone 0.14 --epochs-finetune 0 --seed 3
DEAD_ZONE = {"sgd": {0.0188: 0.65, 0.0247: 0.5, 0.0652: 0.2, 0.1033: 0.14},
             "adam": {0.0238: 0.16, 0.4655: 0.05}}
TUNED_STEPS, TUNED_LR = 752, {"sgd": 0.1, "adam": 1e-3}
DEAD_ZONE["adamw"] = DEAD_ZONE["adam"]
TUNED_LR["adamw"] = TUNED_LR["adam"]


def default_dead_zone(args, steps):
    """Return the D that should leave a share 1 - sparsity of the weights, by DEAD_ZONE.
    With --mode paper it is the paper's.

    INTERPRETATION: with another number of steps or another lr, D is to the sum of the
    rates as in these runs, since it works against what the gradients move. That holds
    for runs of a like length: in the 6.4 million steps of the published ones D = 1
    leaves 4.6 %, where this rule has D = 200. So a run on other data says where its D
    is from.
    """
    total = training.sum_of_rates(args.schedule, args.lr, steps)
    if args.mode == "paper":
        return PAPER_DEAD_ZONE * total / PAPER_SUM
    if args.sparsity == 0:
        return 0.0
    width = training.setting_for(1 - args.sparsity, DEAD_ZONE[args.optimizer])
    tuned = training.sum_of_rates("cosine", TUNED_LR[args.optimizer], TUNED_STEPS)
    return width * total / tuned


# ---- the script ----------------------------------------------------------------------


def run_name(args):
    """Return the name of the run's folder."""
    name = f"{Path(args.dataset).stem}-{args.model}-stds"
    name += "-paper" if args.mode == "paper" else f"-{args.sparsity:g}"
    if args.ramp != presets.of(args.dataset, "stds")["ramp"]:
        name += f"-{args.ramp}"
    if args.dead_zone is not None:
        name += f"-D{args.dead_zone:g}"
    return f"{name}{published.suffix(args, 'stds')}-seed{args.seed}"


def complete(args, explicit):
    """Fill in the defaults that depend on other flags; refuse what does not fit."""
    published.complete(args, explicit, "stds")
    if args.mode == "matched":
        return
    if explicit.get("sparsity") is not None:
        cause = "--as-published cut" if "cut" in args.as_published else "--mode paper"
        remedy = "" if "cut" in args.as_published else ", or write --mode matched"
        raise ValueError(
            f"--sparsity is {explicit['sparsity']:g}, expected none: with {cause} it "
            f"is an outcome of --dead-zone. Leave it out{remedy}")
    args.sparsity = None


def parse_args(argv):
    """Return all flags, a Namespace."""
    parser = flags.make_parser(__doc__)
    add = parser.add_argument_group("dead zone (STDS)").add_argument
    add("--mode", choices=("matched", "paper"),
        help="matched: exactly --sparsity in the end; paper: what --dead-zone leaves "
             "is the result")
    add("--sparsity", type=flags.number(0, 1),
        help="matched: share of the prunable weights that is dead in the end, a "
             "fraction in [0, 1)")
    add("--dead-zone", type=flags.number(0), metavar="D",
        help="width of the dead zone after the structure epochs, in units of a weight; "
             "0: none (default: tuned to --sparsity on the embedded data; with --mode "
             "paper 1, in a shorter run as much less)")
    add("--ramp", choices=RAMPS,
        help="how D grows over the structure epochs. sine: hardly in the first and "
             "last ones; linear: alike, to the end")
    add("--interval", type=flags.whole(1), metavar="STEPS",
        help="iterations between two lines that say how many weights D leaves")
    add("--epochs-prune", type=flags.whole(1), metavar="N",
        help="structure epochs: D grows")
    add("--epochs-finetune", type=flags.whole(0), metavar="N",
        help="epochs with the mask fixed, without D")
    published.add_flag(add, "stds")
    return flags.parse(parser, argv, "stds", complete, run_name)


def set_up(args):
    """Return the run. What cannot work is exit code 2, before anything is written."""
    with flags.exits(2, ValueError, OSError, no_memory=flags.SMALLER):
        device = setup.start(args)
        images = setup.load(args, device)
        net = setup.build(args, images)
        masks = Masks(net)
        others = [parameter for name, parameter in net.named_parameters()
                  if name not in masks.weights]
        # the first group is theta, whose weight decay main() sets
        optimizer = training.optimizer(args, [dict(params=[*masks.weights.values()]),
                                              dict(params=others)])
        stages = setup.stages(args, images, prune=args.epochs_prune,
                              finetune=args.epochs_finetune)
        if args.mode == "matched":
            masks.check_sparsity(args.sparsity)
        if args.dead_zone is None:
            args.dead_zone = default_dead_zone(args, stages.steps("prune"))
        return Run(args, device, images, stages, net=net, optimizer=optimizer,
                   masks=masks)


def ending(args, masks):
    """Say in a line how many weights the dead zone has left. Raise TooFew if these are
    the result, and too few."""
    found, n_layers = masks.n_alive, len(masks.sizes)
    text = f"  the dead zone leaves {found:,} weights"
    if args.mode == "paper" and found < n_layers:
        raise TooFew(f"the dead zone leaves {found} weights, expected at least one for "
                     f"each of the {n_layers} layers. Start again with a lower "
                     f"--dead-zone")
    if args.mode == "paper":
        return text
    keep = masks.keep_at(args.sparsity)
    text += f", {keep:,} are asked for"
    if abs(found - keep) > 0.2 * keep:
        text += ": more than 20 % off. --dead-zone moves it"
    return text


def main(argv=None):
    """Run the script. Return its summary, a dict."""
    args = parse_args(argv)
    if (summary := finished(args)) is not None:
        return summary
    is_scaled = args.dead_zone is None and args.sparsity not in (None, 0)
    run = set_up(args)
    masks, optimizer = run.masks, run.optimizer
    theta, last = list(masks.weights.values()), run.stages.steps("prune")
    target, keep = args.sparsity, None
    if args.mode == "matched":
        keep = masks.keep_at(args.sparsity)

    with run.under_way(f"STDS, dead zone 0 to {args.dead_zone:.4g}, {args.ramp}"):
        if run.iteration == 0:
            run.notes["first_sparsity"] = 1 - share_alive(masks, 0.0)
        if is_scaled and args.dataset != presets.of("default")["dataset"]:
            run.say(f"note: D = {args.dead_zone:.4g} is scaled from short runs on the "
                    f"embedded data. If it is far too large, the cut keeps weights of "
                    f"0: try it in a shorter run first, and give --dead-zone")

        optimizer.param_groups[0]["weight_decay"] = 0.0  # see decay_synapses
        dead_zone = dead_zone_after(run.iteration, last, args.dead_zone, args.ramp)
        if run.iteration < last:  # an evaluation is of w, as the steps are
            run.computes = lambda: computing_with(theta, synapses(theta, dead_zone))
        for epoch in run.epochs("prune"):
            for x, y in run.batches(epoch):
                lr = training.lr_at(args.schedule, args.lr, *run.position)
                w = synapses(theta, dead_zone)  # 1: by the D of the step before
                with computing_with(theta, w):
                    training.backward(run, x, y)  # 2: dL/dtheta is dL/dw, dense
                decay_synapses(theta, w, args.weight_decay, args.optimizer, lr)
                training.descend(optimizer, lr)  # 3: theta, in the dead zone too
                dead_zone = dead_zone_after(run.iteration, last, args.dead_zone,
                                            args.ramp)  # 4: it grows

                if run.iteration % args.interval == 0 or run.iteration == last:
                    change = follow(masks, dead_zone)
                    run.log_update(None, change, masks_hold=False, dead_zone=dead_zone)

            if run.iteration == last:  # the K largest |theta| stay
                run.say(ending(args, masks))
                change = fix_mask(keep, dead_zone, masks, optimizer, run.generator())
                run.computes = nullcontext  # theta is w now
                run.log_update(target, change, keep)
                run.end_epoch()
            else:
                run.end_epoch(1 - share_alive(masks, dead_zone), masks_hold=False)

        optimizer.param_groups[0]["weight_decay"] = args.weight_decay
        for epoch in run.epochs("finetune"):
            for x, y in run.batches(epoch):
                lr = training.lr_at(args.schedule, args.lr, *run.position)
                training.step(run, x, y, lr)
                masks.apply(optimizer)  # w <- w * m, and its momentum
            run.end_epoch()

        return run.finish("prune_stds", "stds",
                          pruned_accuracy=run.last_accuracy("prune"),
                          survived_by_regeneration=masks.share_regenerated)


if __name__ == "__main__":
    main()
