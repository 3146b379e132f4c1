"""GReg: an L2 penalty grows on filters until their removal changes little.

Paper: "Neural Pruning via Growing Regularization", Wang et al. 2021, arXiv 2012.09243,
and its code. In each layer the same share of the filters goes, those with the smallest
mean |w|. The dense network is trained; then the penalty grows while it trains on; then
the channels are removed physically, and the small network is fine-tuned. GReg-1 chooses
the filters that go before the penalty grows. GReg-2 lets it grow on all filters first,
since those that matter to the loss resist, and then chooses.

    python prune_greg.py                             # the whole job on embedded data
    python prune_greg.py --method greg2
    python prune_greg.py --target-macs 0.7           # remove 70 % of the MACs
    python prune_greg.py --dataset cifar100
    torchrun --nproc-per-node=2 prune_greg.py        # two processes, a GPU each

Its stages and run folder are those of prune_structured.py, with a stage `prune` between
the two, in which the penalty grows.

Differences from GReg's code. One optimiser goes through pretraining and growing; there
the stage of growing starts a new SGD, without momentum from before. Fine-tuning starts
at --lr, as in prune_structured.py; there at 0.01. GReg-2's moving average of the ratio
of what stays to what goes starts when it has chosen; there while it still picks.
"""
from pathlib import Path
from typing import NamedTuple

import harness  # first: what is not installed is then one line

import torch

import channels
import models
import training
from channels import Choice
from harness import flags, removal
from harness.runfolder import finished
from masks import ceil_share

# ---- which filters go ----------------------------------------------------------------


def prunable(net):
    """Return {layer: weight} of what GReg prunes: in VGGs all convolutions but the
    first, in ResNets the first of each block."""
    return {name: net.get_parameter(group.weight)
            for name, group in models.removable(net).items()
            if group.weight is not None and name != "convs.0"}


def mean_size(weight):
    """Return the mean |w| of each filter of a convolution, [C]."""
    return weight.detach().abs().mean((1, 2, 3))


def how_many(n_filters, ratio):
    """Return how many of so many filters go: ceil(ratio * C), but not all."""
    return min(ceil_share(ratio, n_filters), n_filters - 1)


def smallest(size, ratio):
    """Return the filters that go, [C] bool: the smallest ones.

    size: [C]. Of equal ones the lower index goes.
    """
    goes = torch.zeros_like(size, dtype=torch.bool)
    goes[size.sort(stable=True).indices[:how_many(len(size), ratio)]] = True
    return goes


def choose(net, ratio):
    """Return {layer: [C] bool}, True = goes, by the weights as they are."""
    return {name: smallest(mean_size(weight), ratio)
            for name, weight in prunable(net).items()}


def fewest(net):
    """Return the channels that stay at any ratio, [M] bool: one of each layer that is
    pruned, and all of the others."""
    return without(net, choose(net, 1.0)).kept


def without(net, goes):
    """Return the channels.Choice that leaves out `goes`, {layer: [C] bool}."""
    kept = []
    for name, size in zip(*channels.layers(net)):
        all_filters = torch.ones(size, dtype=torch.bool)
        kept.append(~goes[name].cpu() if name in goes else all_filters)
    kept = torch.cat(kept)
    none = torch.zeros_like(kept)
    return Choice(kept, regenerated=none, rescued=none)


# ---- the penalty ---------------------------------------------------------------------

# As published
LIMIT = 1.0  # where the penalty of what goes ends
PICK_LIMIT = 0.01  # where that of all filters ends, and GReg-2 chooses
RECOVER = -1e-4  # GReg-2: the penalty of what stays, from then on
ENOUGH = 1000  # a layer is done where what stays is so many times as large as what goes


class Schedule(NamedTuple):
    """How the penalty grows over a stage."""

    interval: int    # K, iterations between two updates of the penalty
    stop: int        # the step of the stage from which it grows no more
    grow: float      # what an update adds to the penalty of what goes
    pick: float      # what it adds to all filters before GReg-2 chooses; 0 with GReg-1
    lr: float        # the learning rate of the stage
    exponent: float  # E: what goes shrinks to about exp(-E) of itself


def schedule_of(method, steps, momentum):
    """Return the published Schedule, scaled to a stage of so many steps.

    INTERPRETATION: the last 10 % of the steps stabilise, with GReg-2 the first 10 %
    pick, and in the rest the penalty grows to the published limit. Where the published
    learning rate, 1e-3, does not reach E = 7, it is ten times higher.
    """
    stop = max(1, steps - round(0.1 * steps))
    picking = round(0.1 * steps) if method == "greg2" else 0
    growing = max(1, stop - picking)
    interval = min(10, max(1, growing // 400))
    grow = LIMIT / max(1, growing // interval)
    pick = PICK_LIMIT / max(1, picking // interval) if method == "greg2" else 0.0
    lr = 1e-3
    exponent = growing / 2 * LIMIT * lr / (1 - momentum)
    if exponent < 7:
        lr, exponent = 10 * lr, 10 * exponent
    return Schedule(interval, stop, grow, pick, lr, exponent)


def no_penalty(weights, method, ratio):
    """Return the state before the penalty grows, {layer: dict}.

    penalty: [C]. goes: [C] bool; None: not chosen yet. mean_ratio: the moving average
    of mean |w| of what stays / of what goes; 0: not known yet. done: the layer's
    penalty grows no more.
    """
    state = {}
    for name, weight in weights.items():
        size = mean_size(weight)
        goes = smallest(size, ratio) if method == "greg1" else None
        state[name] = dict(penalty=torch.zeros_like(size), goes=goes, mean_ratio=0.0,
                           done=False)
    return state


def grow(state, weights, schedule, ratio):
    """One update of the penalties, in layers that are not done.

    The host reads one tensor for all layers: on a GPU it waits once.
    """
    growing = {name: layer for name, layer in state.items() if not layer["done"]}
    if not growing:
        return
    sizes = {name: mean_size(weights[name]) for name in growing}
    # of each layer: the ratio of mean |w|, and whether its penalty has reached the
    # limit of picking, and has passed that of growing
    rows = []
    for name, layer in growing.items():
        penalty, goes, size = layer["penalty"], layer["goes"], sizes[name]
        now = torch.zeros_like(size[0])
        if goes is None:  # GReg-2: all shrink, and those that matter to the loss resist
            penalty += schedule.pick
        else:
            rest = RECOVER if schedule.pick else 0.0  # set, not added
            penalty.copy_(torch.where(goes, penalty + schedule.grow, rest))
            now = ratio_of_means(size, goes, how_many(len(size), ratio))
        largest = penalty.max()
        rows.append(torch.stack([now, largest >= PICK_LIMIT, largest > LIMIT]))

    found = dict(zip(growing, torch.stack(rows).tolist()))
    for name, layer in growing.items():
        now, is_picked, _ = found[name]
        if layer["goes"] is not None:
            past = layer["mean_ratio"]
            layer["mean_ratio"] = 0.9 * past + 0.1 * now if past else now
        elif is_picked:
            layer["goes"] = smallest(sizes[name], ratio)

    least = min(layer["mean_ratio"] for layer in state.values())
    for name, layer in growing.items():
        # GReg-1 waits for all layers, GReg-2 for its own
        reached = layer["mean_ratio"] if schedule.pick else least
        layer["done"] = bool(found[name][2]) or reached >= ENOUGH


def ratio_of_means(size, goes, count):
    """Return the mean size of the filters that stay / of the `count` ones that go."""
    # of a mask the host would ask how many it has, and wait for the answer
    order = (~goes).byte().sort(stable=True).indices
    return size[order[count:]].mean() / size[order[:count]].mean()


def penalise(state, weights):
    """Add the gradient of the penalty, penalty * w, on top of weight decay."""
    for name, weight in weights.items():
        penalty = state[name]["penalty"].view(-1, 1, 1, 1)
        weight.grad.addcmul_(weight.detach(), penalty)


# ---- the script ----------------------------------------------------------------------


def run_name(args):
    """Return the name of the run, and of its folder."""
    return (f"{Path(args.dataset).stem}-{args.model}-{args.method}"
            f"-{removal.share_name(args)}-seed{args.seed}")


def complete(args, explicit):
    """Fill in the defaults that depend on other flags; refuse what leaves nothing to
    train."""
    removal.complete_share(args)
    removal.complete_pretraining(args, explicit)


def parse_args(argv):
    """Return all flags, a Namespace."""
    parser = flags.make_parser(__doc__)
    group = parser.add_argument_group("pruning (GReg)")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--method", choices=("greg1", "greg2"), help="greg1 chooses what goes before "
        "the penalty grows, greg2 after it has grown on all")
    either("--prune-ratio", type=flags.number(0, 1, above=True), metavar="P",
           help="share of the filters of each layer that goes, a fraction above 0 and "
           "below 1 (default: that of prune_structured.py, vgg16: 0.4522, resnet19: "
           "0.512; others: 0.5)")
    either("--target-macs", type=flags.number(0, 1, above=True), metavar="SHARE",
           help="find the ratio that removes this share of the MACs, by bisection")
    add("--epochs-pretrain", type=flags.whole(0), metavar="N",
        help="epochs of the dense network (with --init: 0)")
    add("--epochs-prune", type=flags.whole(1), metavar="N",
        help="epochs in which the penalty grows")
    add("--epochs-finetune", type=flags.whole(0), metavar="N",
        help="epochs of the small network")
    return flags.parse(parser, argv, "greg", complete, run_name)


def state_of(run, weights, ratio):
    """Return the state of the penalties: the checkpoint's, or a new one."""
    state = run.notes.setdefault("greg", no_penalty(weights, run.args.method, ratio))
    for layer in state.values():  # a checkpoint is read to the CPU
        for key, value in layer.items():
            if isinstance(value, torch.Tensor):
                layer[key] = value.to(run.device)
    return state


def say_schedule(run, schedule):
    """Print the learning rate and how far the penalty shrinks a filter."""
    line = (f"  {run.args.method}: lr {schedule.lr:g}, shrinkage exponent E = "
            f"{schedule.exponent:.1f}")
    if run.args.optimizer != "sgd":
        line = f"  {run.args.method}: lr {schedule.lr:g}"
    elif schedule.exponent < 7:
        line += ". Raise --epochs-prune: it should reach 7"
    run.say(line)


def say_ratios(run, state):
    """Print how much larger the filters that stay are than those that go."""
    ratios = ", ".join(f"{layer['mean_ratio']:.3g}" for layer in state.values())
    run.say(f"  {run.args.method}: mean |w| of what stays / of what goes, by layer: "
            f"{ratios}")


def main(argv=None):
    """Run the script. Return its summary; None in a process that writes none."""
    args = parse_args(argv)
    if (summary := finished(args)) is not None:
        return summary
    run, dense = removal.set_up(args, fewest, pretrain=args.epochs_pretrain,
                                prune=args.epochs_prune, finetune=args.epochs_finetune)
    schedule = schedule_of(args.method, run.stages.steps("prune"), args.momentum)
    if args.optimizer != "sgd":  # the published lr and its exponent are those of SGD
        schedule = schedule._replace(lr=args.lr)

    with run.under_way(f"{args.method}: {removal.goal(args)}"):
        for epoch in run.epochs("pretrain"):
            for x, y in run.batches(epoch):
                lr = training.lr_at(args.schedule, args.lr, *run.position)
                training.step(run, x, y, lr)
            removal.end_epoch(run)

        if not removal.is_done(run):
            weights = prunable(run.net)
            # after a resume it is the same: it depends on how many filters go
            ratio = removal.ratio_for(
                run, lambda ratio: without(run.net, choose(run.net, ratio)))
            state = state_of(run, weights, ratio)
            say_schedule(run, schedule)
            for epoch in run.epochs("prune"):
                for x, y in run.batches(epoch):
                    training.backward(run, x, y)
                    step, _ = run.position
                    if step % schedule.interval == 0 and step < schedule.stop:
                        grow(state, weights, schedule, ratio)
                    penalise(state, weights)
                    training.descend(run.optimizer, schedule.lr)
                removal.end_epoch(run)
            say_ratios(run, state)
            del run.notes["greg"]
            goes = {name: layer["goes"] for name, layer in state.items()}
            removal.remove(run, ratio, without(run.net, goes))

        for epoch in run.epochs("finetune"):
            for x, y in run.batches(epoch):
                lr = training.lr_at(args.schedule, args.lr, *run.position)
                training.step(run, x, y, lr)
            removal.end_epoch(run)

        return removal.finish(run, dense, "prune_greg", args.method, regen=0.0)


if __name__ == "__main__":
    main()
