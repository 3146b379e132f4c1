"""Algorithm 1: gradual magnitude pruning, with regeneration of weights by criticality.

Paper: "Brain-Inspired Efficient Pruning: Exploiting Criticality in Spiking Neural
Networks", arXiv 2311.16141. Gradual magnitude pruning (GMP, Zhu & Gupta 2017) raises
the sparsity while the network trains. Here each update prunes further than asked, and
regenerates those pruned weights whose neurons are nearest to their threshold. Then the
network is fine-tuned with the mask fixed.

    python prune_unstructured.py               # a whole run on embedded data, 2 minutes
    python prune_unstructured.py --dataset cifar100 --sparsity 0.9 --regen 0.5
                                               # the paper's setting
    python prune_unstructured.py --regen 0               # GMP, the baseline
    python prune_unstructured.py --sparsity 0            # dense, on the same schedule
    python prune_unstructured.py --metric random         # other ways to regenerate
    python prune_unstructured.py --as-published          # as the published code has it
    torchrun --nproc-per-node=2 prune_unstructured.py    # two processes, a GPU each

A run writes its folder, runs/NAME/: config.json, metrics.jsonl (a line an epoch),
updates.jsonl (a line a mask update), checkpoint.pt, model.pt, compact.pt (model.pt
without the channels that change nothing, if there are any), curves.png and, last,
summary.json.
"""
from pathlib import Path

import harness  # first: what is not installed is then one line

import torch

import training
from harness import flags, presets, published, setup
from harness.runfolder import Run, finished
from masks import Masks, Update, prune_further, select

# ---- the scores ----------------------------------------------------------------------
# A score function returns a number for each weight, [M]. The pruned weights with the
# highest scores are regenerated.
# masks: of the network. scores: {LIF name: [C]}, the criticality of each channel on the
# batch of the update (Eq. 6). generator: of the update.


def criticality(masks, scores, generator):
    """Return the criticality of each weight's channel: how near its neurons are to
    their threshold."""
    return masks.spread(scores)


def gradient(masks, scores, generator):
    """Return |dL/dw| of the batch, the score of RigL and GraNet."""
    return masks.gradients()


def random(masks, scores, generator):
    """Return random scores, as a control."""
    return torch.rand(masks.total, generator=generator).to(masks.device)


SCORES = {"criticality": criticality, "gradient": gradient, "random": random}

# ---- one update ----------------------------------------------------------------------


def prune_and_regenerate(masks, target, regen, score, candidates, generator):
    """Do one update of Algorithm 1: bring the masks to exactly the target sparsity.
    Return a masks.Update.

    target: the sparsity s, 0..1. regen: the regeneration rate r, 0..1. score: [M].
    candidates: which weights may be regenerated, "all" dead ones, or the "new" ones,
    which this update has pruned.
    """
    magnitudes = masks.magnitudes()  # |w| before the update
    # for the log alone, Fig. 2(a): what GMP would cut
    plain = masks.cut_at(masks.keep_at(target), magnitudes)
    # Eq. 7: prune further than asked, to leave room for the regeneration
    keep = masks.keep_at(prune_further(target, regen))
    pruned = masks.prune(keep, magnitudes, generator)
    between = masks.sparsity

    # Eq. 5: regenerate the highest-scored pruned weights, until the sparsity is s.
    # INTERPRETATION: "all pruned units in the pruned model" are candidates, those of
    # earlier updates too. Confirmed by the published code. With "new" the schedule
    # would fix how many of the pruned weights survive.
    # All weights of a channel have one score: the larger |w| comes first
    dead = ~masks.flat if candidates == "all" else pruned
    count = masks.keep_at(target) - masks.n_alive
    regenerated = masks.regenerate(count, dead, [score, magnitudes], generator)
    return Update(pruned, between, regenerated, masks.rescue_empty_layers(), plain)


# ---- the same, as published ----------------------------------------------------------
# published code: the update of the public repository with the paper's experiments. It
# differs from the text's in three items of --as-published, each of which can be done
# alone. With none of them it is the text's update, but for the rounding of one count

PUBLISHED_UPDATE = {"classifier", "zero", "ties"}


def prune_and_regenerate_as_published(masks, target, regen, score, candidates,
                                      generator, items, optimizer):
    """Do one update of Algorithm 1 as the published code does. Return a masks.Update.

    items: of --as-published; "classifier", "zero" and "ties" count here. optimizer:
    whose momentum masks.apply masks. The others: as in prune_and_regenerate.
    """
    has_ties = "ties" in items
    magnitudes, alive_before = masks.magnitudes(), masks.flat.clone()
    masks.require_finite(magnitudes, "the weights")
    masks.require_finite(score, "the scores")
    # published code, "ties": counts are truncated
    keep = int(masks.total * (1 - target)) if has_ties else masks.keep_at(target)
    in_classifier = torch.zeros_like(masks.flat)
    in_classifier[masks.total - masks.sizes[-1]:] = True
    plain = masks.cut_at(keep, magnitudes)  # for Fig. 2(a)

    def largest(places, count):
        """Return the `count` places of the largest |w|. published code, "ties": those
        strictly above the last of them, one fewer or more."""
        if not has_ties:
            return select(places & masks.flat, count, [magnitudes], generator)
        if count == 0:
            return torch.zeros_like(places)
        if count > int(places.count_nonzero()):  # beside a large classifier: all stay
            return places & masks.flat
        return places & (magnitudes > magnitudes[places].topk(count).values[-1])

    # published code, "classifier": it keeps what a plain cut to the target leaves it
    fixed = torch.zeros_like(masks.flat)
    if "classifier" in items:
        fixed = largest(torch.ones_like(fixed), keep) & in_classifier
        others = ~in_classifier
    else:
        others = torch.ones_like(fixed)

    # Eq. 7: keep of the others the rest, less a share r
    rest = keep - int(fixed.count_nonzero())
    count = int(rest * regen) if has_ties else round(rest * regen)
    masks.flat.copy_(fixed | largest(others, rest - count))
    pruned, between = alive_before & ~masks.flat, masks.sparsity
    # published code: what comes back now has lost its value. So an update sets a share
    # r of the weights to 0, from the first one on. In the paper they have 2,000 steps
    # to grow again; with 2 steps a network falls to chance, by this item alone
    if "zero" in items:
        masks.apply(optimizer)

    # Eq. 5: regenerate the highest-scored pruned weights
    dead = others & ~masks.flat
    if candidates == "new":
        dead &= pruned
    count = min(count, int(dead.count_nonzero()))
    if has_ties and count > 0:  # published code: all that equal the last one return
        regenerated = dead & (score >= score[dead].topk(count).values[-1])
        masks.flat |= regenerated
    else:
        regenerated = masks.regenerate(count, dead, [score, magnitudes], generator)
    return Update(pruned, between, regenerated, masks.rescue_empty_layers(), plain)


# ---- the script ----------------------------------------------------------------------


def default_regen(sparsity, dataset):
    """Return the paper's regeneration rate for the nearest sparsity that it lists."""
    if sparsity == 0:
        return 0.0
    rates = presets.of(dataset, "unstructured")["regen_rates"]  # {sparsity: r}
    return presets.nearest(rates, sparsity)


def method_of(args):
    """Return the name of the method in summary.json: "dense", "gmp", or the metric."""
    if args.sparsity == 0:
        return "dense"
    if args.regen == 0:
        return "gmp"
    return args.metric


def run_name(args):
    """Return the name of the run's folder."""
    name = f"{Path(args.dataset).stem}-{args.model}-{method_of(args)}"
    if args.sparsity > 0:
        name += f"-{args.sparsity:g}"
    if args.regen > 0:
        name += f"-r{args.regen:g}"
        if args.candidates == "new":
            name += "-new"
        if args.aggregate == "mean":
            name += "-mean"
    return f"{name}{published.suffix(args, 'unstructured')}-seed{args.seed}"


def complete(args, explicit):
    """Set the flags that depend on other flags: --regen, and those that --as-published
    implies. Refuse flags that would change nothing but the name of the run."""
    if args.regen is None:
        args.regen = default_regen(args.sparsity, args.dataset)
    # of a dense run --interval stays: it is a flag of the schedule that it shares
    no_choice = dict(metric="criticality", aggregate="max", candidates="all")
    if args.sparsity == 0:
        flags.set_unused(args, explicit, dict(regen=0.0) | no_choice, "--sparsity 0")
    elif args.regen == 0:
        flags.set_unused(args, explicit, no_choice, "--regen 0")
    elif args.metric != "criticality":
        flags.set_unused(args, explicit, dict(aggregate="max"),
                         f"--metric {args.metric}")
    published.complete(args, explicit, "unstructured")


def parse_args(argv):
    """Return all flags, a Namespace."""
    parser = flags.make_parser(__doc__)
    add = parser.add_argument_group("pruning (Algorithm 1)").add_argument
    add("--sparsity", type=flags.number(0, 1),
        help="share of the prunable weights that are dead in the end, a fraction in "
             "[0, 1); 0 trains the dense reference")
    add("--regen", type=flags.number(0, 1),
        help="regeneration rate r, a fraction in [0, 1); 0 is GMP (default: the "
             "paper's for the nearest sparsity: 0.9: 0.5, 0.95: 0.2, 0.98: 0.1; "
             "tiny-imagenet: 0.3, 0.1, 0.05)")
    add("--metric", choices=SCORES,
        help="the score by which pruned weights are regenerated, highest first")
    add("--aggregate", choices=("max", "mean"),
        help="how the neurons of a channel make one score")
    add("--candidates", choices=("all", "new"),
        help="which weights may be regenerated: all dead ones, or only the new ones, "
             "which the same update has pruned")
    add("--interval", type=flags.whole(1), metavar="STEPS",
        help="iterations between two updates")
    add("--epochs-prune", type=flags.whole(1), metavar="N",
        help="epochs of the pruning stage")
    add("--epochs-finetune", type=flags.whole(0), metavar="N",
        help="epochs with the mask fixed")
    published.add_flag(add, "unstructured")
    return flags.parse(parser, argv, "unstructured", complete, run_name)


def set_up(args):
    """Return (the run, its number of mask updates). Flags that cannot work end the
    script with exit code 2, before anything is written."""
    with flags.exits(2, ValueError, OSError, no_memory=flags.SMALLER):
        device = setup.start(args, shared=True)
        images = setup.load(args, device)
        net = setup.build(args, images, takes_masks=True)
        # published code: dead weights keep their momentum
        masks = Masks(net, keep_momentum="momentum" in args.as_published)
        optimizer = training.optimizer(args, net.parameters())
        stages = setup.stages(args, images, prune=args.epochs_prune,
                              finetune=args.epochs_finetune)
        masks.check_sparsity(args.sparsity)
        setup.check_start(args, masks)
        num_updates = 0
        if args.sparsity > 0:
            num_updates = setup.num_updates(args, stages)
        run = Run(args, device, images, stages, net=net, optimizer=optimizer,
                  masks=masks)
    return run, num_updates


def plan_of(args, num_updates):
    """Return what the run does, in a line."""
    reading = published.words(vars(args), "unstructured")
    reading = f", {reading}" if reading else ""
    return (f"{method_of(args)}: {num_updates} updates to {100 * args.sparsity:g} % "
            f"sparse, r = {args.regen:g}{reading}")


def results(args, run):
    """Return the keys of summary.json that only this script knows, a dict."""
    if args.sparsity == 0:
        return dict(dense_accuracy=run.rows[-1]["test_accuracy"])
    return dict(regen=args.regen, pruned_accuracy=run.last_accuracy("prune"),
                survived_by_regeneration=run.masks.share_regenerated)


def main(argv=None):
    """Run the script. Return its summary; None in a process that writes none."""
    args = parse_args(argv)
    if (summary := finished(args)) is not None:
        return summary
    run, num_updates = set_up(args)
    masks, optimizer, items = run.masks, run.optimizer, set(args.as_published)
    # Eq. 6: the score is f'. published code: f, which grows with the potential
    by = "value" if "score" in items else "derivative"

    with run.under_way(plan_of(args, num_updates)):
        # Algorithm 1. All weights are alive at the start, or those that --init has.
        # INTERPRETATION: then the ramp of Eq. 9 starts at its sparsity, and what it has
        # pruned is as if pruned by earlier updates: it may be regenerated at 0
        first = run.first_sparsity
        # Both stages: after the last update the mask stays, which is the fine-tuning
        for epoch in run.epochs():
            for x, y in run.batches(epoch):
                update, rest = divmod(run.iteration, args.interval)
                is_update = rest == 0 and update <= num_updates
                # INTERPRETATION: the samples of Eq. 6 are those of this batch.
                # Confirmed by the published code
                record = args.aggregate if is_update else None
                # INTERPRETATION of "cosine": one for each stage, from lr to 0
                lr = training.lr_at(args.schedule, args.lr, *run.position)
                if "cosine" in items:  # published code: one over both, a step an epoch
                    lr = training.cosine(args.lr, epoch, run.stages.epochs)
                scores = training.step(run, x, y, lr, record, by)  # Eqs. 1-4, 6
                masks.apply(optimizer)  # w <- w * m, and its momentum

                if is_update:
                    # Eq. 9: the sparsity to reach
                    target = training.sparsity_at(update, num_updates, args.sparsity,
                                                  first)
                    generator = run.generator()
                    score = SCORES[args.metric](masks, scores, generator)
                    # Eqs. 7, 5: prune further, then regenerate by the score
                    if items & PUBLISHED_UPDATE:
                        change = prune_and_regenerate_as_published(
                            masks, target, args.regen, score, args.candidates,
                            generator, items, optimizer)
                    else:
                        change = prune_and_regenerate(
                            masks, target, args.regen, score, args.candidates,
                            generator)
                    masks.apply(optimizer)
                    keep = None if "ties" in items else masks.keep_at(target)
                    run.log_update(target, change, keep)
            run.end_epoch()
        return run.finish("prune_unstructured", method_of(args), **results(args, run))


if __name__ == "__main__":
    main()
