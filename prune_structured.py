"""Structured pruning of a spiking network with criticality-based regeneration: Algorithm 2.

Paper: "Brain-Inspired Efficient Pruning: Exploiting Criticality in Spiking Neural Networks",
arXiv 2311.16141. Network slimming (Liu et al. 2017) trains with an L1 penalty on the scale gamma of
batch normalisation (BN), cuts the channels with the smallest |gamma| over all layers, and
fine-tunes. Here more is cut than asked, and those cut channels come back whose neurons are kept
nearest to their threshold. What is cut is removed physically: the network is smaller and faster.

    python prune_structured.py                            # the whole job, embedded data, 2 minutes
    python prune_structured.py --dataset cifar100         # the paper's: p = 0.4522, r = 0.1
    python prune_structured.py --method slimming          # the baseline; also: greg1, greg2
    python prune_structured.py --target-macs 0.5          # the ratio that removes half of the MACs
    python prune_structured.py --prune-ratio 0            # the dense reference, same schedule

GReg (Wang et al. 2021, arXiv 2012.09243) instead pretrains without L1, and lets an L2 penalty grow
on the filters to be removed, in a stage of its own, `prune`. greg1 chooses them before, by mean |w|
in each layer; greg2 lets it grow on all filters first, and removes those that resist least.
"""
import math
from pathlib import Path
from types import SimpleNamespace

import torch

import channels
from harness import files
from harness import flags
import metrics
import models
from harness import processes
from harness import runfolder
import training
from masks import prune_further, seeded

# criticality paper: 160 + 160 epochs, l1 1e-4, and r for each p. GReg's stage is as long as
# published: 100,000 iterations of growing and 10,000 of stabilising at batch 128. A short run needs
# a stronger l1: over the stage it pulls a gamma by l1 * sum(lr) / (1 - momentum), from 1 to 0
PAPER = dict(epochs_pretrain=160, epochs_prune=282, epochs_finetune=160, l1=1e-4)
SHORT = dict(epochs_pretrain=6, epochs_prune=3, epochs_finetune=6, l1=1e-3)
SETTINGS = {  # the defaults by data set; "all" holds for each of them
    "all": dict(method="criticality", metric="criticality", regen_base="kept", prune_ratio=None,
                regen=None, target_macs=None, finetune_l1=False, weight_decay=None),
    "fashion-mini": dict(epochs_pretrain=8, epochs_prune=4, epochs_finetune=8, l1=3e-3),
    **dict.fromkeys(("mnist", "fashion-mnist", "n-mnist"), SHORT),
    **dict.fromkeys(("cifar10", "cifar100", "tiny-imagenet", "dvs-gesture", "cifar10-dvs"), PAPER),
    "smoke": dict(epochs_pretrain=1, epochs_prune=1, epochs_finetune=1),  # upper bounds
}
REGEN = {"vgg16": {0.4522: 0.1, 0.6764: 0.05}, "resnet19": {0.512: 0.3, 0.658: 0.1},
         "small": {0.5: 0.3}}  # {p: r}; the first p is the default; of other networks as of small


# ---- which channels stay -------------------------------------------------------------------------


def prune_and_regenerate(gamma, scores, sizes, ratio, regen, base="kept", scope="global",
                         threshold="exact"):
    """Choose the channels that stay, as Algorithm 2 does; regen = 0 is network slimming.

    gamma, scores: |gamma| and the score of every channel, [M], on the CPU; sizes: channels of each
    layer. ratio: p, the share that is pruned in the end. scope, threshold: see channels.py.
    Returns (kept, regenerated, rescued by the guard), [M] bool each."""
    # INTERPRETATION of Eq. 7: as in Algorithm 1, so that a share r of the channels that stay came
    # back. "pruned" takes r as a share of what is cut, nearer to the 42.60 % of the paper
    further = prune_further(ratio, regen) if base == "kept" else min(1, ratio / (1 - regen))
    kept = channels.largest(gamma, further, threshold)
    count = int(channels.largest(gamma, ratio, threshold).sum() - kept.sum())
    # Eq. 5: regenerate the highest-scored pruned channels, until the ratio is p
    regenerated = channels.regenerate(kept, count, scores, gamma, sizes, scope)
    rescued = channels.guard(kept | regenerated, gamma, sizes)
    return kept | regenerated | rescued, regenerated, rescued


# ---- GReg ----------------------------------------------------------------------------------------

# As published: where the penalty ends, where greg2 makes its choice, its penalty of what stays from
# then on (set, not added), and the kept / pruned mean |w| from which a layer is done
GREG_LIMIT, GREG_PICK_LIMIT, GREG_RECOVER, GREG_RATIO = 1.0, 0.01, -1e-4, 1000


def greg_plan(method, steps, momentum):
    """Return the published schedule scaled to a stage of `steps` iterations (from 0).

    INTERPRETATION: 10 % of it stabilise, with greg2 10 % pick, the rest grows to the published
    limits. interval: K, between two updates; stop: growing ends; grow, pick: added at an update to
    what goes, and to all filters before the choice; exponent: E, what goes shrinks to about exp(-E)
    of itself. Where the published learning rate does not reach E = 7, it is ten times higher.
    """
    stop, picking = max(1, steps - round(0.1 * steps)), round(0.1 * steps) * (method == "greg2")
    growing = max(1, stop - picking)
    interval = min(10, max(1, growing // 400))
    pick = GREG_PICK_LIMIT / max(1, picking // interval) if method == "greg2" else 0.0
    exponent = growing / 2 * GREG_LIMIT * 1e-3 / (1 - momentum)
    more = 1 if exponent >= 7 else 10
    return SimpleNamespace(interval=interval, stop=stop, pick=pick, lr=1e-3 * more,
                           grow=GREG_LIMIT / max(1, growing // interval), exponent=exponent * more)


def greg_layers(net):
    """Return {layer: weight} of what GReg prunes: in VGGs all convolutions but the first."""
    return {name: net.get_submodule(name).conv.weight for name in models.removable(net)
            if name != "convs.0"}


def mean_size(weight):
    return weight.detach().abs().mean((1, 2, 3))  # GReg's score of a filter


def smallest(size, ratio):
    """Return the filters to be removed, [C] bool: ceil(ratio * C) of them, at most C - 1."""
    order = size.sort(stable=True).indices[:min(math.ceil(ratio * len(size)), len(size) - 1)]
    return torch.zeros_like(size, dtype=torch.bool).index_fill_(0, order, True)


def greg_start(weights, method, ratio):
    """Return the state of the growing stage for {layer: weight}: the penalty of each filter, who
    goes (None: not chosen yet), the moving average of kept / pruned mean |w|, and done."""
    return {name: dict(penalty=torch.zeros_like(mean_size(weight)), mean_ratio=0.0, done=False,
                       goes=smallest(mean_size(weight), ratio) if method == "greg1" else None)
            for name, weight in weights.items()}


def greg_grow(state, weights, iteration, plan, ratio):
    """One iteration of the growing stage, after the backward pass and before the step.

    Every `interval` iterations the penalties grow, in layers that are not done. Their gradient,
    penalty * w, is added at every iteration, on top of weight decay."""
    growing = {name: layer for name, layer in state.items() if not layer["done"]}
    if iteration % plan.interval == 0 and iteration < plan.stop:
        for name, layer in growing.items():
            goes, past, size = layer["goes"], layer["mean_ratio"], mean_size(weights[name])
            if goes is None:  # GReg-2: all shrink, and those that matter to the loss resist
                layer["penalty"] += plan.pick
                if layer["penalty"].max() >= GREG_PICK_LIMIT:
                    layer["goes"] = smallest(size, ratio)
            else:
                layer["penalty"][goes] += plan.grow
                layer["penalty"][~goes] = GREG_RECOVER if plan.pick else 0
                now = float(size[~goes].mean() / size[goes].mean())
                layer["mean_ratio"] = 0.9 * past + 0.1 * now if past else now
        least = min(layer["mean_ratio"] for layer in state.values())
        for layer in growing.values():  # greg1 waits for all layers, greg2 for its own
            layer["done"] = bool(
                layer["penalty"].max() > GREG_LIMIT
                or (layer["mean_ratio"] if plan.pick else least) >= GREG_RATIO)
    for name, weight in weights.items():
        weight.grad.addcmul_(weight.detach(), state[name]["penalty"].view(-1, 1, 1, 1))


# ---- the script ----------------------------------------------------------------------------------


def method_of(args):
    name = args.method if args.method != "criticality" or args.regen > 0 else "slimming"
    return "dense" if args.prune_ratio == 0 else args.metric if name == "criticality" else name


def run_name(args):
    name = f"{Path(args.dataset).stem}-{args.model}-structured-{method_of(args)}"
    if args.prune_ratio != 0:
        name += f"-macs{args.target_macs:g}" if args.target_macs else f"-{args.prune_ratio:g}"
        name += f"-r{args.regen:g}" * (args.regen > 0) + "-pruned" * (args.regen_base == "pruned")
    return f"{name}{'-l1' * args.finetune_l1}-seed{args.seed}"


def complete(args, explicit):
    """Fill in the defaults that depend on other flags; refuse flags that contradict each other."""
    greg, table = args.method.startswith("greg"), REGEN.get(args.model, REGEN["small"])
    unused = dict(l1=0.0) if greg else dict(epochs_prune=0)
    if args.method != "criticality":
        unused |= dict(regen=0.0, metric="criticality", regen_base="kept")
    for flag, value in unused.items():
        if explicit.get(flag, value) != value:
            raise ValueError(f"--{flag.replace('_', '-')} is {explicit[flag]}, which --method "
                             f"{args.method} does not use. Leave one of them out")
        setattr(args, flag, value)
    ratio = next(iter(table)) if args.prune_ratio is None else args.prune_ratio
    args.prune_ratio = ratio if args.target_macs is None else None
    if args.regen is None or ratio == 0:
        args.regen = table[min(table, key=lambda listed: abs(listed - ratio))] if ratio > 0 else 0.0
    if args.weight_decay is None:  # INTERPRETATION: the paper gives none here; slimming's, GReg's
        args.weight_decay = 5e-4 if greg else 1e-4
    if args.init is not None and "epochs_pretrain" not in explicit:
        args.epochs_pretrain = 0
    if args.regen_base == "pruned" and args.target_macs is None and ratio > 1 - args.regen:
        raise ValueError(f"--regen is {args.regen:g}, which prunes more than all channels first, "
                         f"expected at most {1 - ratio:g} with --regen-base pruned. Lower it")
    if greg and (ratio == 0 or args.epochs_prune == 0):
        raise ValueError(f"--method {args.method} needs a --prune-ratio above 0 and --epochs-prune "
                         f"above 0. The dense reference is --prune-ratio 0 alone")
    if args.epochs_pretrain == 0 and args.init is None:
        raise ValueError("--epochs-pretrain is 0, expected at least 1, or a network by --init")


def parse_args(argv):
    parser = flags.make_parser(__doc__)
    group = parser.add_argument_group("pruning (Algorithm 2)")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--method", choices=("criticality", "slimming", "greg1", "greg2"),
        help="what chooses the channels")
    either("--prune-ratio", type=flags.number(0, 1), metavar="P", help="share of the prunable "
           "channels that is gone in the end, a fraction in [0, 1); 0 trains the dense reference "
           "(default: the paper's, vgg16: 0.4522, resnet19: 0.512; others: 0.5)")
    either("--target-macs", type=flags.number(0, 1, above=True), metavar="SHARE", help="find the "
           "ratio that removes this share of the MACs (the paper's FLOPs), by bisection")
    add("--regen", type=flags.number(0, 1), help="regeneration rate r, a fraction in [0, 1); 0 is "
        "slimming (default: the paper's, vgg16: 0.1, 0.05; resnet19: 0.3, 0.1; others: 0.3)")
    add("--metric", choices=("criticality", "gradient", "random"), help="what ranks who comes back")
    add("--regen-base", choices=("kept", "pruned"),
        help="what r is a share of: the channels that stay, or those that are cut at first")
    add("--l1", type=flags.number(0), help="weight of the L1 penalty on gamma (greg: none)")
    add("--finetune-l1", action="store_true", help="keep the L1 penalty while fine-tuning")
    add("--epochs-pretrain", type=flags.whole(0), metavar="N", help="of the dense net (--init: 0)")
    add("--epochs-prune", type=flags.whole(0), metavar="N", help="in which greg's penalty grows")
    add("--epochs-finetune", type=flags.whole(0), metavar="N", help="of the small network")
    return flags.parse(parser, argv, SETTINGS, complete, run_name)


def train(run, stage, images, l1=0.0, lr=None, greg=None):
    """Train through a stage. lr: constant, or the flag's, in steps. greg(step): its penalty."""
    args, net, optimizer = run.args, run.parts["net"], run.parts["optimizer"]
    forward = training.forward_of(args, net)
    gammas = [net.get_submodule(name).bn.weight for name in models.removable(net)]
    for epoch in run.epochs_of(stage):
        for x, y in run.track(images, epoch):
            with training.autocast(args):
                logits = forward(x)  # [T, N, K]
            loss = training.loss_over_time(logits, y, args.loss)
            optimizer.zero_grad()
            (loss * run.weight).backward()
            if l1 > 0:  # the gradient of l1 * sum |gamma|, which the printed loss leaves out
                for gamma in gammas:
                    gamma.grad.add_(gamma.detach().sign(), alpha=l1)  # Eq. 10
            step, steps = run.stages.position(run.iteration)
            if greg is not None:
                greg(step)
            training.set_lr(optimizer, lr or training.step_down(args.lr, step, steps))
            optimizer.step()
            run.meter.add(loss, logits, y, run.iteration)
        if stage == "finetune":
            run.notes["gamma"].append(torch.cat(gammas).detach().cpu())
        run.end_epoch(optimizer.param_groups[0]["lr"], training.evaluate(
            forward, net, images, args), run.notes.get("sparsity", 0.0))


def greg(run, images, ratio):
    """GReg's stage: train while the penalty grows; return what goes, {layer: [C] bool}."""
    weights, method = greg_layers(run.parts["net"]), run.args.method
    plan = greg_plan(method, run.stages.steps("prune"), run.args.momentum)
    run.say(f"  {method}: lr {plan.lr:g}, shrinkage exponent E = {plan.exponent:.1f}"
            + ". Raise --epochs-prune: it should reach 7" * (plan.exponent < 7))
    state = run.notes.setdefault("greg", greg_start(weights, method, ratio))
    for layer in state.values():  # from a checkpoint they come on the CPU
        layer |= {key: layer[key].to(run.device) for key in ("penalty", "goes")
                  if layer[key] is not None}
    train(run, "prune", images, lr=plan.lr,
          greg=lambda step: greg_grow(state, weights, step, plan, ratio))
    ratios = ", ".join(f"{layer['mean_ratio']:.3g}" for layer in state.values())
    run.say(f"  {method}: mean |w| of what stays / of what goes, by layer: {ratios}")
    return {name: layer["goes"] for name, layer in run.notes.pop("greg").items()}


def prune(run, images):
    """Go from the dense network to the small one: choose, remove, show that both agree."""
    args, net, notes = run.args, run.parts["net"], run.notes
    names, sizes = channels.layers(net)
    gamma, scores, spiked = channels.gammas(net), None, None
    nobody = torch.zeros(len(gamma), dtype=torch.bool)
    if args.metric == "random":
        scores = torch.rand(len(gamma), generator=seeded(args.seed, run.iteration)).double()
    elif args.regen > 0:
        scores, spiked = training.score_channels(net, images, args, args.metric)

    def choose(ratio, goes=None):
        if not args.method.startswith("greg"):
            return prune_and_regenerate(gamma, scores, sizes, ratio, args.regen, args.regen_base)
        goes = goes or {name: smallest(mean_size(weight), ratio)
                        for name, weight in greg_layers(net).items()}
        return torch.cat([~goes[name].cpu() if name in goes else ~nobody[:size]
                          for name, size in zip(names, sizes)]), nobody, nobody

    if "prune_ratio" not in notes:
        notes["prune_ratio"] = args.prune_ratio if args.target_macs is None else channels.ratio_for(
            net, args.target_macs, lambda ratio: choose(ratio)[0])
        notes["dense_accuracy"] = training.evaluate(net, net, images, args)["accuracy"]
    ratio = notes["prune_ratio"]
    rows = choose(ratio, greg(run, images, ratio) if args.epochs_prune else None)
    processes.agree("the channels that stay", rows[0])

    kept = dict(zip(names, rows[0].split(sizes)))
    masked, small = channels.silence(net, kept), channels.remove(net, kept)
    record = channels.account(net, ratio, *rows, scores, spiked) | channels.differences(
        masked.eval(), small.eval(), kept, next(images.inputs("test", args.batch_size)))
    for name, other in dict(silenced=masked, removed=small).items():
        record[f"accuracy_{name}"] = training.evaluate(other, other, images, args)["accuracy"]
    files.write_json(run.folder / "channels.json", record)
    run.say(channels.describe(record))
    notes |= dict(sparsity=channels.sparsity(net, small), gamma=[],
                  pruned_accuracy=record["accuracy_removed"],
                  survived_by_regeneration=record["regenerated"] / record["kept"])
    run.parts |= dict(net=small, optimizer=training.sgd(args, small))
    run.save()


def finish(run, images, dense):
    """Measure what came of it, and write the last files. dense: a net of the dense widths."""
    args, net, notes = run.args, run.parts["net"], run.notes
    for name, (before, after) in channels.savings(dense, net).items():
        run.say(f"  {name:<24}{before:,} -> {after:,} ({100 * (1 - after / before):.2f} % less)")
    with training.autocast(args):
        counts = metrics.count(net, images.inputs("test", args.batch_size))
        speed = {n: metrics.speedup(dense, net, images.copies(n), seconds=0 if args.smoke else 2)
                 for n in (1, 32)}
    run.say(f"  dense / small time      {speed[1]:.2f} at batch 1, {speed[32]:.2f} at batch 32")
    names, sizes = channels.layers(net)
    history = torch.stack(notes["gamma"]).split(sizes, 1) if notes["gamma"] else []
    files.save_arrays(run.folder / "gamma.npz",
                      {name: part.numpy() for name, part in zip(names, history)})
    return run.finish(
        net, None, counts, script="prune_structured", method=method_of(args), regen=args.regen,
        speedup_batch1=speed[1], speedup_batch32=speed[32],
        training_cost=sum(1 - row["sparsity"] for row in run.rows) / len(run.rows),
        **notes, **channels.summary(dense, net))


def main(argv=None):
    args = parse_args(argv)
    with flags.exits(2, ValueError, OSError):  # all that can be checked, before anything is written
        if (summary := runfolder.finished(args)) is not None:
            return summary
        device = training.set_up(args, shared=True)
        images = training.load(args, device)
        net = training.build(args, images, files.saved_widths(args))
        dense = training.build(args, images)
        channels.check(dense, args.prune_ratio or 0.0, args.target_macs or 0.0)
        stages = training.stages(args, images, pretrain=args.epochs_pretrain,
                                 prune=args.epochs_prune, finetune=args.epochs_finetune)
        run = runfolder.Run(args, device, stages, net=net, optimizer=training.sgd(args, net))

    with run.under_way():
        run.header(images, net, method_of(args))
        # Algorithm 2
        train(run, "pretrain", images, args.l1)  # with L + l1 * sum |gamma|
        if "gamma" not in run.notes:
            prune(run, images)
        train(run, "finetune", images, args.l1 if args.finetune_l1 else 0.0)
        return finish(run, images, dense) if processes.end() == 0 else None  # one process's work


if __name__ == "__main__":
    main()
