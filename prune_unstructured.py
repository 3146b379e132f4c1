"""Unstructured pruning of a spiking network with criticality-based regeneration: Algorithm 1.

Paper: "Brain-Inspired Efficient Pruning: Exploiting Criticality in Spiking Neural Networks",
arXiv 2311.16141. Gradual magnitude pruning (GMP, Zhu & Gupta 2017) ramps the sparsity up while the
network trains; at each update it prunes further than asked, and brings back those pruned weights
whose neurons are kept nearest to their threshold. Then the network is fine-tuned with the mask
fixed.

    python prune_unstructured.py                         # the whole job on embedded data, 2 minutes
    python prune_unstructured.py --dataset cifar100 --sparsity 0.9 --regen 0.5
                                                         # the paper's setting
    python prune_unstructured.py --regen 0               # GMP, the baseline
    python prune_unstructured.py --sparsity 0            # the dense reference, same schedule
    python prune_unstructured.py --metric random         # also: gradient, granet
    python prune_unstructured.py --sparsity 0.98 --compact
                                                         # fine-tuned without its unread channels
    torchrun --nproc-per-node=2 prune_unstructured.py    # two processes, a GPU each (see harness/processes.py)

The run's folder, runs/NAME/, holds config.json, metrics.jsonl (a line an epoch), updates.jsonl (a
line a mask update), checkpoint.pt, model.pt, compact.pt (model.pt without the channels that change
nothing, where there are such), curves.png and summary.json, written last.
"""
import math
from pathlib import Path

import torch

import channels
import compact
from harness import flags
import metrics
import models
from harness import processes
import training
from masks import Masks, prune_further, seeded, select
from harness.runfolder import Run, finished, save_tensors

# criticality paper, unstructured settings: epochs, interval in iterations, and r for each sparsity
PAPER = dict(epochs_prune=200, epochs_finetune=300, interval=2000)
SETTINGS = {  # the defaults by data set; "all" holds for each of them
    "all": dict(sparsity=0.9, regen=None, metric="criticality", aggregate="max", candidates="all",
                compact=False),
    "fashion-mini": dict(epochs_prune=8, epochs_finetune=4, interval=25),
    "mnist": dict(epochs_prune=6, epochs_finetune=4, interval=90),
    "fashion-mnist": dict(epochs_prune=6, epochs_finetune=4, interval=90),
    "cifar10": PAPER, "cifar100": PAPER,
    # INTERPRETATION: the main text says 150 epochs of fine-tuning, the appendix 100
    "tiny-imagenet": dict(epochs_prune=50, epochs_finetune=100, interval=1000),
    # INTERPRETATION: the paper has no events; as mnist, and 40 updates in 2 epochs of 5
    "n-mnist": dict(epochs_prune=6, epochs_finetune=4, interval=90),
    "dvs-gesture": dict(epochs_prune=80, epochs_finetune=120, interval=136),
    "cifar10-dvs": dict(epochs_prune=80, epochs_finetune=120, interval=282),
    "smoke": dict(epochs_prune=1, epochs_finetune=1, interval=4),  # upper bounds
}
REGEN = {0.90: 0.5, 0.95: 0.2, 0.98: 0.1}
REGEN_TINY_IMAGENET = {0.90: 0.3, 0.95: 0.1, 0.98: 0.05}
GRANET_RATE, GRANET_LOWEST_RATE = 0.5, 0.005  # GraNet's code (arXiv 2106.10404), at any sparsity


def sparsity_at(update, num_updates, final_sparsity):
    """Return the sparsity after an update (Eq. 9): a cubic from 0 to final_sparsity,
    update = 1..n."""
    if not 1 <= update <= num_updates:
        raise ValueError(f"update is {update}, expected 1 to {num_updates}")
    return final_sparsity * (1 - (1 - update / num_updates) ** 3)  # Eq. 9


def default_regen(metric, sparsity, dataset):
    """Return the paper's regeneration rate for the nearest sparsity that it lists."""
    if sparsity == 0:
        return 0.0
    if metric == "granet":
        return GRANET_RATE
    table = REGEN_TINY_IMAGENET if dataset == "tiny-imagenet" else REGEN
    return table[min(table, key=lambda listed: abs(listed - sparsity))]


def granet_rate(first, progress):
    """Return GraNet's death rate: a cosine from `first` to 0.005 as progress goes from 0 to 1.

    INTERPRETATION: the time axis is the pruning stage, since the mask is fixed in fine-tuning.
    """
    return (GRANET_LOWEST_RATE
            + (first - GRANET_LOWEST_RATE) * (1 + math.cos(math.pi * progress)) / 2)


def granet_swap(masks, rate, magnitudes, gradients, generator):
    """GraNet's regeneration: in each layer the smallest share `rate` of the alive weights dies, and
    as many grow at the largest |gradient| among the dead, those that just died included.

    Returns (died, grown), [M] bool each. A weight that dies and grows at once keeps its value.
    """
    before = masks.flat.clone()
    died, grown = torch.zeros_like(before), torch.zeros_like(before)
    start = 0
    for size in masks.sizes:
        layer = slice(start, start + size)
        start += size
        alive, n_alive = before[layer], int(before[layer].count_nonzero())
        drop = math.ceil(rate * n_alive)
        stay = select(alive, n_alive - drop, [magnitudes[layer]], generator)
        died[layer] = alive & ~stay
        grown[layer] = select(~stay, drop, [gradients[layer], magnitudes[layer]], generator)
    masks.flat.copy_((before & ~died) | grown)
    return died, grown


def ranking(args, masks, lifs, magnitudes, generator):
    """Return the keys by which pruned weights are brought back, best first: [M] tensors.

    Ties are broken by |w| before the update, then at random: within a channel all scores tie.
    """
    if args.metric == "criticality":
        return [masks.spread({name: lif.score for name, lif in lifs.items()}), magnitudes]
    if args.metric == "gradient":
        return [masks.gradients(), magnitudes]
    return [torch.rand(masks.total, generator=generator).to(masks.device)]  # random


def prune_and_regenerate(args, masks, optimizer, lifs, target, progress, generator):
    """One update of Algorithm 1: from the masks as they are to exactly the target sparsity.

    progress: share of the pruning stage that is over. Returns (pruned, before, regenerated,
    rescued): [M] bool, the sparsity between the two steps, [M] bool, names of layers that would
    have lost all weights.
    """
    magnitudes = masks.magnitudes()  # of before the update
    keep = masks.keep_at(target)
    if args.metric == "granet" and args.regen > 0:
        pruned = masks.prune(keep, magnitudes, generator)
        rescued = masks.guard()
        masks.apply(optimizer)  # as GraNet's code runs: what this step cut can come back at 0 only
        died, regenerated = granet_swap(masks, granet_rate(args.regen, progress), magnitudes,
                                        masks.gradients(), generator)
        n_between = int((masks.flat & ~regenerated).count_nonzero())
        return pruned | died, 1 - n_between / masks.total, regenerated, rescued

    # Eq. 7: prune further, to leave room for the regeneration
    pruned = masks.prune(masks.keep_at(prune_further(target, args.regen)), magnitudes, generator)
    before = masks.sparsity
    # INTERPRETATION of Eq. 5: "all pruned units in the pruned model", so long-dead weights may
    # return; `new` is the other reading, under which the share that is rescued follows from the
    # schedule
    candidates = pruned if args.candidates == "new" else ~masks.flat
    count = keep - masks.n_alive
    keys = ranking(args, masks, lifs, magnitudes, generator) if count else []  # none for GMP
    # Eq. 5: regenerate the highest-scored pruned weights, until the sparsity is the target
    regenerated = masks.regenerate(count, candidates, keys, generator)
    return pruned, before, regenerated, masks.guard()


# ---- the script ----------------------------------------------------------------------------------


def method_of(args):
    return "dense" if args.sparsity == 0 else "gmp" if args.regen == 0 else args.metric


def run_name(args):
    name = f"{Path(args.dataset).stem}-{args.model}-{method_of(args)}"
    if args.sparsity > 0:
        name += f"-{args.sparsity:g}" + (f"-r{args.regen:g}" if args.regen > 0 else "")
    if args.regen > 0:  # readings that are not the default have names of their own
        name += "-new" * (args.candidates == "new") + "-mean" * (args.aggregate == "mean")
    return f"{name}{'-compact' * args.compact}-seed{args.seed}"


def complete(args, _):
    """Fill in the defaults that depend on other flags."""
    if args.regen is None:
        args.regen = default_regen(args.metric, args.sparsity, args.dataset)


def parse_args(argv):
    parser = flags.make_parser(__doc__)
    add = parser.add_argument_group("pruning (Algorithm 1)").add_argument
    add("--sparsity", type=flags.number(0, 1), help="share of the prunable weights that is dead in "
        "the end, a fraction in [0, 1); 0 trains the dense reference")
    add("--regen", type=flags.number(0, 1), help="regeneration rate r, a fraction in [0, 1); 0 is "
        "GMP (default: the paper's for the nearest sparsity: 0.9: 0.5, 0.95: 0.2, 0.98: 0.1; "
        "tiny-imagenet: 0.3, 0.1, 0.05; granet: 0.5)")
    add("--metric", choices=("criticality", "gradient", "random", "granet"),
        help="what ranks the pruned weights that come back")
    add("--aggregate", choices=("max", "mean"), help="how the neurons of a channel make one score")
    add("--candidates", choices=("all", "new"), help="who may come back: all dead weights, or only "
        "those pruned in this update")
    add("--interval", type=flags.whole(1), metavar="STEPS", help="iterations between two updates")
    add("--epochs-prune", type=flags.whole(1), metavar="N", help="epochs of the pruning stage")
    add("--epochs-finetune", type=flags.whole(0), metavar="N", help="epochs with the mask fixed")
    add("--compact", action="store_true",
        help="fine-tune without the channels that no alive weight reads: the same, in less work")
    return flags.parse(parser, argv, SETTINGS, complete, run_name)


def deploy(run, images):
    """Save compact.pt, the network without the channels that change nothing, if it has such; return
    how many times faster it predicts than the masked network, for summary.json."""
    args, net, alive = run.args, run.parts["net"], run.parts["masks"].alive
    kept = compact.needed(net, alive)
    if channels.kept_widths(net, kept) == net.config["widths"]:
        run.say("  no channel can be left out: alive weights read each one, and each may fire"
                if kept else f"  {args.model} has no convolutions: only their channels can go")
        return {}
    small, small_alive = compact.without(net, alive, kept)
    save_tensors(run.folder / "compact.pt", models.pack(small, small_alive))
    with training.autocast(args):
        speed = {n: metrics.speedup(net, small, images.copies(n), seconds=0.2) for n in (1, 32)}
    run.say(f"  compact.pt: {compact.describe(net, small)}; {speed[1]:.2f} times as fast at "
            f"batch 1, {speed[32]:.2f} at batch 32")
    return dict(speedup_batch1=speed[1], speedup_batch32=speed[32])


def main(argv=None):
    args = parse_args(argv)
    with flags.exits(2, ValueError, OSError):  # all that can be checked, before anything is written
        if (summary := finished(args)) is not None:
            return summary
        device = training.set_up(args, shared=True)
        images = training.load(args, device)
        net = training.build(args, images)
        masks, optimizer = Masks(net), training.sgd(args, net)
        stages = training.stages(args, images, prune=args.epochs_prune,
                                 finetune=args.epochs_finetune)
        num_updates = stages.steps("prune") // args.interval if args.sparsity > 0 else 0
        masks.check(args.sparsity)
        if args.sparsity > 0 and num_updates == 0:
            raise ValueError(f"no update would ever run: --interval is {args.interval}, the "
                             f"pruning stage has {stages.steps('prune')} iterations. Lower "
                             f"--interval or raise --epochs-prune")
        run = Run(args, device, stages, net=net, optimizer=optimizer, masks=masks)

    lifs = models.lifs(net)
    with run.under_way():
        forward = training.forward_of(args, net)
        run.header(images, net, "dense, no updates" if args.sparsity == 0 else
                   f"{num_updates} updates, 0 -> {100 * args.sparsity:g} % sparse, " +
                   (f"regeneration {100 * args.regen:g} % by {args.metric}" if args.regen > 0
                    else "no regeneration (GMP)"))
        if args.init is not None and run.iteration == 0:
            run.notes["dense_accuracy"] = training.evaluate(forward, net, images, args)["accuracy"]

        # Algorithm 1. The masks start as all ones
        for epoch in range(run.epoch, stages.epochs):
            if args.compact and epoch >= args.epochs_prune and net is run.parts["net"]:
                # the masks are fixed: go on without the channels that no alive weight reads
                net, optimizer, masks = compact.for_finetuning(net, optimizer, masks)
                run.say(f"  fine-tuning on {compact.describe(run.parts['net'], net)}")
                forward = training.forward_of(args, net)
            for x, y in run.track(images, epoch):
                update = run.iteration // args.interval
                is_update = update <= num_updates and run.iteration == update * args.interval
                # INTERPRETATION: the samples that are scored are this batch
                scored = is_update and args.regen > 0 and args.metric == "criticality"
                if scored:
                    models.record(net, args.aggregate)

                with training.autocast(args):
                    logits = forward(x)  # [T, N, K]
                loss = training.loss_over_time(logits, y, args.loss)
                optimizer.zero_grad()
                (loss * run.weight).backward()  # 1, or by this process's share of the images
                # INTERPRETATION of "cosine": one a stage, from lr to 0
                training.set_lr(optimizer,
                                training.cosine(args.lr, *stages.position(run.iteration)))
                optimizer.step()
                masks.apply(optimizer)  # w <- w * m, and its momentum
                run.meter.add(loss, logits, y, run.iteration)

                if is_update:
                    run.check()
                    if scored:
                        processes.average_scores(list(lifs.values()), run.weight)
                    target = sparsity_at(update, num_updates, args.sparsity)
                    pruned, before, regenerated, rescued = prune_and_regenerate(
                        args, masks, optimizer, lifs, target, run.iteration / stages.steps("prune"),
                        seeded(args.seed, run.iteration))
                    processes.agree(f"the masks after iteration {run.iteration}", masks.flat)
                    models.record(net, None)
                    for name in rescued:
                        run.say(f"  note: {name} would have lost all weights; its largest one "
                                f"is kept")
                    masks.apply(optimizer)
                    run.add_update(dict(update=update, iteration=run.iteration, target=target,
                                        before=before, **masks.account(pruned, regenerated)))
                    run.verify(masks.keep_at(target))  # exactly, or the run stops
            run.end_epoch(optimizer.param_groups[0]["lr"],
                          training.evaluate(forward, net, images, args),
                          run.parts["masks"].sparsity)

        # What came of it: one process's work
        if processes.end() > 0:
            return None
        net, masks = run.parts["net"], run.parts["masks"]  # in full: see compact.for_finetuning
        with training.autocast(args):
            counts = metrics.count(net, images.inputs("test", args.batch_size), masks.alive)
        own = dict(script="prune_unstructured", method=method_of(args), macs_dense=counts["macs"])
        if args.sparsity > 0:
            own |= dict(regen=args.regen,
                        pruned_accuracy=run.rows[args.epochs_prune - 1]["test_accuracy"],
                        dense_accuracy=run.notes.get("dense_accuracy"),
                        survived_by_regeneration=masks.share_regenerated,
                        **deploy(run, images))
        else:
            own |= dict(dense_accuracy=run.rows[-1]["test_accuracy"])
        return run.finish(net, masks.alive, counts, **own)


if __name__ == "__main__":
    main()
