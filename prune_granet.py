"""GraNet: gradual magnitude pruning with a swap of weights in each layer.

Paper: "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration", Liu et
al. 2021, arXiv 2106.10404, and its code. Each update first prunes the smallest |w| of
all layers, to the sparsity of a cubic ramp. Then it swaps weights in each layer: a
share of the alive weights, the death rate, dies, those with the smallest |w|. As many
dead ones grow, those with the largest gradient. Finally the network is fine-tuned with
the mask fixed.

    python prune_granet.py                            # a whole run on embedded data
    python prune_granet.py --death-rate 0.3
    python prune_granet.py --dataset cifar100 --sparsity 0.9
    torchrun --nproc-per-node=2 prune_granet.py       # two processes, a GPU each

The stages and the run folder are those of prune_unstructured.py.

Differences from GraNet's code. The network starts dense, or as sparse as the one of
--init; there half of the weights are alive at the start by default, spread by ERK. The
last update reaches --sparsity exactly; there the ramp ends one update early, short of
it by s / n^3 for n updates (9.0e-4 at s = 0.9, n = 10). Swaps end with the pruning
stage; there they go on to the last iteration. An update keeps as many weights as asked;
there one fewer, and fewer still where |w| are equal.
"""
from pathlib import Path

import harness  # first: what is not installed is then one line

import torch

import training
from harness import flags, setup
from harness.runfolder import Run, finished
from masks import Masks, Update, ceil_share, count, select

LOWEST_RATE = 0.005  # the last death rate, in GraNet's code


def death_rate(first, step, steps):
    """Return the death rate of a step, 0..1: a cosine from `first` to 0.005.

    INTERPRETATION: it falls over the pruning stage, since the mask is fixed in
    fine-tuning. steps: of that stage.
    """
    return LOWEST_RATE + training.cosine(first - LOWEST_RATE, step, steps)


def swap(masks, rate, magnitudes, gradients, generator):
    """In each layer, let the smallest share `rate` of the alive weights die, and as
    many grow. Return (died, grown), [M] bool each.

    The weights with the largest |gradient| grow, of the dead ones and of those that
    have just died. A weight that dies and grows at once keeps its value.
    magnitudes, gradients: [M].
    """
    died, grown = [], []
    layers = zip(*(flat.split(masks.sizes)
                   for flat in (masks.flat, magnitudes, gradients)))
    for alive, magnitude, gradient in layers:
        n_alive = count(alive)
        n_swap = ceil_share(rate, n_alive)
        stays = select(alive, n_alive - n_swap, [magnitude], generator)
        died.append(alive & ~stays)
        grown.append(select(~stays, n_swap, [gradient, magnitude], generator))
    died, grown = torch.cat(died), torch.cat(grown)
    masks.flat.copy_((masks.flat & ~died) | grown)
    return died, grown


def prune_and_swap(masks, optimizer, target, rate, generator):
    """Do one update: bring the masks to exactly the target sparsity. Return a
    masks.Update.

    rate: the death rate, 0..1; at 0 this is gradual magnitude pruning.
    """
    magnitudes = masks.magnitudes()  # |w| before the update
    pruned = masks.prune(masks.keep_at(target), magnitudes, generator)
    rescued = masks.rescue_empty_layers()
    # GraNet's code applies the masks before the swap, so that a weight that was just
    # cut grows again only at 0
    masks.apply(optimizer)
    died, grown = swap(masks, rate, magnitudes, masks.gradients(), generator)
    between = 1 - count(masks.flat & ~grown) / masks.total
    return Update(pruned | died, between, grown, rescued)


# ---- the script ----------------------------------------------------------------------


def run_name(args):
    """Return the name of the run's folder."""
    return (f"{Path(args.dataset).stem}-{args.model}-granet-{args.sparsity:g}"
            f"-d{args.death_rate:g}-seed{args.seed}")


def complete(args, explicit):
    """Refuse a rate that would rise. One from the config.json of an older run goes
    on."""
    if args.death_rate < LOWEST_RATE and "death_rate" not in explicit.kept:
        raise ValueError(
            f"--death-rate is {args.death_rate:g}, expected at least {LOWEST_RATE:g}, "
            f"to which it falls. Raise it")


def parse_args(argv):
    """Return all flags, a Namespace."""
    parser = flags.make_parser(__doc__)
    add = parser.add_argument_group("pruning (GraNet)").add_argument
    add("--sparsity", type=flags.number(0, 1, above=True),
        help="share of the prunable weights that are dead in the end, a fraction above "
             "0 and below 1")
    add("--death-rate", type=flags.number(0, 1, above=True), metavar="RATE",
        help="share of the alive weights of each layer that an update swaps at the "
             "start, a fraction of at least 0.005 and below 1; it falls to 0.005")
    add("--interval", type=flags.whole(1), metavar="STEPS",
        help="iterations between two updates")
    add("--epochs-prune", type=flags.whole(1), metavar="N",
        help="epochs of the pruning stage")
    add("--epochs-finetune", type=flags.whole(0), metavar="N",
        help="epochs with the mask fixed")
    return flags.parse(parser, argv, "granet", complete, run_name)


def set_up(args):
    """Return (the run, its number of mask updates). Flags that cannot work end the
    script with exit code 2, before anything is written."""
    with flags.exits(2, ValueError, OSError, no_memory=flags.SMALLER):
        device = setup.start(args, shared=True)
        images = setup.load(args, device)
        net = setup.build(args, images, takes_masks=True)
        masks = Masks(net)
        optimizer = training.optimizer(args, net.parameters())
        stages = setup.stages(args, images, prune=args.epochs_prune,
                              finetune=args.epochs_finetune)
        masks.check_sparsity(args.sparsity)
        setup.check_start(args, masks)
        num_updates = setup.num_updates(args, stages)
        run = Run(args, device, images, stages, net=net, optimizer=optimizer,
                  masks=masks)
    return run, num_updates


def main(argv=None):
    """Run the script. Return its summary, a dict; None in a process that writes none.
    """
    args = parse_args(argv)
    if (summary := finished(args)) is not None:
        return summary
    run, num_updates = set_up(args)
    masks, optimizer = run.masks, run.optimizer

    plan = (f"GraNet: {num_updates} updates to {100 * args.sparsity:g} % sparse, "
            f"death rate {args.death_rate:g}")
    with run.under_way(plan):
        for epoch in run.epochs():
            for x, y in run.batches(epoch):
                lr = training.lr_at(args.schedule, args.lr, *run.position)
                training.step(run, x, y, lr)
                masks.apply(optimizer)  # w <- w * m, and its momentum

                update, rest = divmod(run.iteration, args.interval)
                if rest == 0 and update <= num_updates:
                    target = training.sparsity_at(update, num_updates, args.sparsity,
                                                  run.first_sparsity)
                    rate = death_rate(args.death_rate, run.iteration,
                                      run.stages.steps("prune"))
                    change = prune_and_swap(masks, optimizer, target, rate,
                                            run.generator())
                    masks.apply(optimizer)
                    run.log_update(target, change, keep=masks.keep_at(target))
            run.end_epoch()

        return run.finish("prune_granet", "granet",
                          pruned_accuracy=run.last_accuracy("prune"),
                          survived_by_regeneration=masks.share_regenerated)


if __name__ == "__main__":
    main()
