"""NDSNN: drop and grow with ever fewer weights, from a sparse start. Also SET and RigL.

Paper: Huang et al. 2023, "Neurogenesis Dynamics-inspired Spiking Neural Network
Training Acceleration", DAC, arXiv 2304.12214. The network is sparse from the start.
Every so many iterations some of the alive weights of each layer are dropped, those with
the smallest |w|, and dead ones grow. Each time fewer grow than were dropped, until the
final sparsity is met. In the last epochs the mask is fixed. No dense network is ever
trained.

    python prune_ndsnn.py                                   # a run on embedded data
    python prune_ndsnn.py --sparsity 0.98 --density 0.3     # from 30 % to 2 % alive
    python prune_ndsnn.py --density 0.1 --growth random     # SET: the density stays
    python prune_ndsnn.py --density 0.1                     # RigL: the density stays
    python prune_ndsnn.py --dataset cifar100 --sparsity 0.9
    torchrun --nproc-per-node=2 prune_ndsnn.py              # two processes, a GPU each

A fair rival, no replication: no code of NDSNN is known, and this file rests on the
abstract. The abstract has: training from scratch with dynamic sparsity; drop and grow,
with a number of weights that decreases; SET and RigL among the rivals. All else is
INTERPRETATION:

    layers      ERK densities at the start and in the end, as in RigL and GraNet
    ramp        the cubic of all methods here, in each layer by itself
    drop        the smallest |w| of a layer, as in SET and RigL; a share that falls by a
                cosine from 0.5 to 0.005, as in GraNet
    grow        the largest |dL/dw| of the batch, as in RigL; what was just dropped may
                come back
    fixed mask  from the last update on, as in all methods here; the paper may change
                the mask to the end of its 300 epochs

With --density 1 - SPARSITY the density is constant. The run is then SET (Mocanu et al.
2018, arXiv 1707.04780) under --growth random, and RigL (Evci et al. 2020, arXiv
1911.11134) under --growth gradient. Three things are as in NDSNN here, and other than
in their papers. The share that is dropped starts at 0.5; theirs starts at 0.3, as under
--drop-rate 0.3. It falls until the last update; SET's is constant. A weight that grows
starts at 0; in SET it starts at a random value.

The run folder is that of prune_unstructured.py. In updates.jsonl each row has the drop
rate too. After the last update a line names the layers that grew nothing in some
updates: there the ramp asked for more than the drop rate.
"""
from collections import Counter
from pathlib import Path

import harness  # first: what is not installed is then one line

import torch

import training
from harness import flags, presets, setup
from harness.runfolder import Run, finished
from masks import (DENSITIES, Masks, Update, apportion, ceil_share, count, select,
                   start_sparse)

LOWEST_RATE = 0.005  # INTERPRETATION: d_min, the last drop rate, is that of GraNet

# ---- how many weights of each layer are alive ----------------------------------------


def layer_sparsities(first, final, update, num_updates):
    """Return the sparsity of each layer after an update, a list:

        theta_l(q) = final_l + (first_l - final_l) (1 - q / n)^3

    first, final: sparsities of the layers, at the start and in the end. update: q, from
    0 to n.
    INTERPRETATION: the abstract has a decreasing number of weights; this is the cubic
    ramp of all methods here, in each layer by itself.
    """
    if update == 0:
        return first
    return [training.sparsity_at(update, num_updates, last, start)
            for start, last in zip(first, final)]


def layer_counts(sizes, sparsities, keep):
    """Return how many weights of each layer are alive, a list of whole numbers:

        keep_l = N_l - round(theta_l N_l), at least 1, with `keep` in all

    sizes: N_l. sparsities: theta_l. Where rounding leaves the sum too small, the layers
    that lost most by it get what is missing; where it is too large, those that gained
    most give it back.
    """
    sizes = torch.tensor(sizes)
    dead = torch.tensor(sparsities, dtype=torch.float64) * sizes
    counts = (sizes - dead.round().long()).clamp(min=1)
    # what rounding took from a layer, in units of 2^-20: apportion takes whole numbers
    lost = ((sizes - dead - counts) * 2**20).long()
    left = keep - int(counts.sum())
    counts = counts + apportion(max(left, 0), lost.clamp(min=0), sizes - counts)
    counts = counts - apportion(max(-left, 0), (-lost).clamp(min=0), counts - 1)
    return counts.tolist()


# ---- how many are dropped, and how many grow -----------------------------------------


def drop_rate(first, update, num_updates):
    """Return the share of the alive weights that an update drops, 0..1:

        d(q) = d_min + (d_0 - d_min) (1 + cos(pi q / n)) / 2

    first: d_0. update: q, 1..n.
    INTERPRETATION: the cosine of SET's successors, RigL and GraNet; d_0 is GraNet's.
    """
    return LOWEST_RATE + training.cosine(first - LOWEST_RATE, update, num_updates)


def turnover(n_alive, keep, rate):
    """Return how many weights of a layer are dropped, and how many grow:

        drop = max(ceil(d N), N - keep)      grow = keep - (N - drop)

    n_alive: N. keep: how many are alive afterwards. rate: d.
    INTERPRETATION: one drop serves both, the ramp and the search. Late in a steep ramp
    the rate asks for less than the ramp: then nothing grows, and this is pruning.
    """
    n_drop = max(ceil_share(rate, n_alive), n_alive - keep)
    return n_drop, keep - (n_alive - n_drop)


# ---- which ---------------------------------------------------------------------------
# A score gives each weight a number, [M]; the dead weights with the highest grow.
# generator: of this update.


def gradient(masks, generator):
    """Rank by |dL/dw| of the batch of this iteration, as RigL does."""
    return masks.gradients()


def random(masks, generator):
    """Draw what grows, as SET does."""
    return torch.rand(masks.total, generator=generator).to(masks.device)


GROWTH = {"gradient": gradient, "random": random}


def drop_and_grow(masks, keeps, rate, score, generator):
    """Do one update: in each layer drop the alive weights with the smallest |w|, and
    grow dead ones with the highest score, so that keeps[l] are alive. Return an Update.

    keeps: how many weights of each layer are alive afterwards, a list. rate: the drop
    rate, 0..1. score: [M], of which the highest grow.

    What grows is 0, and so is its momentum. INTERPRETATION: what was just dropped may
    grow at once, as in RigL; it then keeps its value and its momentum. So a layer that
    is dense, and is to stay so, is left alone.
    """
    magnitudes = masks.magnitudes()
    masks.require_finite(magnitudes, "the weights")
    masks.require_finite(score, "the scores")
    dropped, grown = [], []
    layers = zip(*(flat.split(masks.sizes) for flat in (masks.flat, magnitudes, score)))
    for (alive, magnitude, rank), keep in zip(layers, keeps):
        n_alive = count(alive)
        n_drop, n_grow = turnover(n_alive, keep, rate)
        stays = select(alive, n_alive - n_drop, [magnitude], generator)
        dropped.append(alive & ~stays)
        grown.append(select(~stays, n_grow, [rank, magnitude], generator))
    dropped, grown = torch.cat(dropped), torch.cat(grown)

    masks.flat &= ~dropped
    between = masks.sparsity
    masks.flat |= grown
    return Update(dropped, between, grown, rescued=[])  # keeps are at least 1


def without_growth(updates):
    """Return {layer: number of updates in which it grew nothing}, of those where there
    are such updates. updates: rows of updates.jsonl."""
    return Counter(layer["name"] for row in updates for layer in row["layers"]
                   if layer["regenerated"] == 0)


# ---- the script ----------------------------------------------------------------------


def is_constant(args):
    """Return whether the density stays as it is at the start."""
    return abs(1 - args.density - args.sparsity) < 1e-9


def method_of(args):
    """Return the method's name, for the summary."""
    if is_constant(args):
        return {"random": "set", "gradient": "rigl"}[args.growth]
    return "ndsnn"


def run_name(args):
    """Return the name of the run's folder."""
    method, usual = method_of(args), presets.of(args.dataset, "ndsnn")
    name = f"{Path(args.dataset).stem}-{args.model}-{method}-{args.sparsity:g}"
    if method == "ndsnn" and args.density != usual["density"]:
        name += f"-from{args.density:g}"
    if method == "ndsnn" and args.growth != usual["growth"]:
        name += f"-{args.growth}"
    if args.drop_rate != usual["drop_rate"]:
        name += f"-d{args.drop_rate:g}"
    if args.densities != usual["densities"]:
        name += f"-{args.densities}"
    return f"{name}-seed{args.seed}"


def complete(args, explicit):
    """Check the flags that depend on each other."""
    if args.sparsity < 1 - args.density - 1e-9:
        raise ValueError(
            f"--sparsity is {args.sparsity:g}, expected at least the "
            f"{1 - args.density:g} of the start. Raise it or --density")
    if args.drop_rate < LOWEST_RATE:
        raise ValueError(
            f"--drop-rate is {args.drop_rate:g}, expected at least {LOWEST_RATE:g}, to "
            f"which it falls. Raise it")


def parse_args(argv):
    """Return all flags, a Namespace."""
    parser = flags.make_parser(__doc__)
    add = parser.add_argument_group("drop and grow (NDSNN, SET, RigL)").add_argument
    add("--sparsity", type=flags.number(0, 1, above=True),
        help="share of the prunable weights that is dead in the end, a fraction above "
             "0 and below 1")
    add("--density", type=flags.number(0, 1, above=True), metavar="D0",
        help="share of the prunable weights that is alive at the start; with 1 - "
             "sparsity it stays constant, and the run is SET or RigL by --growth")
    add("--growth", choices=GROWTH,
        help="what ranks the dead weights. gradient: |dL/dw| of the batch, as in RigL; "
             "random: a draw, as in SET")
    add("--drop-rate", type=flags.number(0, 1, above=True), metavar="RATE",
        help="share of the alive weights of each layer that an update drops at the "
             "start, a fraction of at least 0.005 and below 1; it falls by a cosine to "
             "0.005")
    add("--densities", choices=DENSITIES,
        help="density of each layer, at the start and in the end. erk: by its shape, "
             "small layers are denser; er: the same for all")
    add("--interval", type=flags.whole(1), metavar="STEPS",
        help="iterations between two updates")
    add("--epochs-prune", type=flags.whole(1), metavar="N",
        help="epochs in which weights are dropped and grow")
    add("--epochs-finetune", type=flags.whole(0), metavar="N",
        help="epochs with the mask fixed")
    return flags.parse(parser, argv, "ndsnn", complete, run_name)


def set_up(args):
    """Return the run and its number of updates. What cannot work is exit code 2, before
    anything is written."""
    with flags.exits(2, ValueError, OSError, no_memory=flags.SMALLER):
        device = setup.start(args, shared=True)
        images = setup.load(args, device)
        net = setup.build(args, images)
        masks = Masks(net)
        optimizer = training.optimizer(args, net.parameters())
        stages = setup.stages(args, images, prune=args.epochs_prune,
                              finetune=args.epochs_finetune)
        masks.check_sparsity(args.sparsity)
        num_updates = setup.num_updates(args, stages)
        run = Run(args, device, images, stages, net=net, optimizer=optimizer,
                  masks=masks)
    return run, num_updates


def say_without_growth(run):
    """Print in how many updates each layer grew nothing."""
    found = without_growth(run.updates)
    counts = ", ".join(f"{name} in {times}" for name, times in found.items())
    run.say(f"  grew nothing, of {len(run.updates)} updates: "
            f"{counts or 'no layer in any'}")


def main(argv=None):
    """Run the script. Return its summary, a dict; None in a process that writes none.
    """
    args = parse_args(argv)
    if (summary := finished(args)) is not None:
        return summary
    run, num_updates = set_up(args)
    masks, optimizer = run.masks, run.optimizer
    method = method_of(args)

    shapes = [weight.shape for weight in masks.weights.values()]
    first, final = ([1 - density for density in DENSITIES[args.densities](shapes, mean)]
                    for mean in (args.density, 1 - args.sparsity))

    plan = (f"{method}: {num_updates} updates from {100 * args.density:g} % dense to "
            f"{100 * args.sparsity:g} % sparse, growth by {args.growth}")
    with run.under_way(plan):
        if run.iteration == 0:
            # The weights that any method has at this seed, masked
            thetas = layer_sparsities(first, final, 0, num_updates)
            keeps = layer_counts(masks.sizes, thetas, masks.keep_at(1 - args.density))
            start_sparse(masks, keeps, run.generator())
            masks.apply(optimizer)
            run.notes["first_sparsity"] = masks.sparsity

        for epoch in run.epochs():
            for x, y in run.batches(epoch):
                lr = training.lr_at(args.schedule, args.lr, *run.position)
                training.step(run, x, y, lr)
                masks.apply(optimizer)  # w <- w * m, and its momentum

                update, rest = divmod(run.iteration, args.interval)
                if rest == 0 and update <= num_updates:
                    # How many weights of each layer are alive after this update?
                    target = training.sparsity_at(update, num_updates, args.sparsity,
                                                  first=1 - args.density)
                    keep = masks.keep_at(target)
                    thetas = layer_sparsities(first, final, update, num_updates)
                    keeps = layer_counts(masks.sizes, thetas, keep)

                    # Drop the smallest |w|, grow the highest score
                    rate = drop_rate(args.drop_rate, update, num_updates)
                    generator = run.generator()
                    score = GROWTH[args.growth](masks, generator)
                    change = drop_and_grow(masks, keeps, rate, score, generator)
                    masks.apply(optimizer)
                    run.log_update(target, change, keep, drop_rate=rate)
                    if update == num_updates:
                        say_without_growth(run)
            run.end_epoch()

        return run.finish("prune_ndsnn", method,
                          pruned_accuracy=run.last_accuracy("prune"),
                          survived_by_regeneration=masks.share_regenerated)


if __name__ == "__main__":
    main()
