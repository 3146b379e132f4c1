"""Two-stage dynamic structure learning of a sparse spiking network: the PQ index sets the rewiring.

Paper: Shen, Xu, Pan, Chen 2025, arXiv 2502.13572 (no published code); the index is from Diao et
al., ICLR 2023, arXiv 2302.05601. The network is sparse from the start. Every so many iterations
Stage I measures with the PQ index how compressible the alive weights of each scope are, a layer or
a neuron: so many are to go; Stage II prunes that many by magnitude and grows others by momentum.
Training goes on all the while, and then on with the mask fixed.

    python prune_pq.py                                   # the whole job on embedded data, 2 minutes
    python prune_pq.py --scope neuron                    # the index of each output neuron or filter
    python prune_pq.py --mode adaptive                   # the index sets all; density is an outcome
    python prune_pq.py --growth random                   # also: gradient
    python prune_pq.py --dataset cifar10-dvs             # the paper's settings, as far as known

Other than in published code, an empty or all-zero scope has index 0 (0/0 there); counts are exact,
free of the rounding of floating point; the momentum that ranks is an average of its own over all
places, as an optimizer's, masked as it is, is 0 at every dead weight; nothing is rewound, and no
epoch is picked by its test accuracy.

The run's folder is that of prune_unstructured.py, with each layer's mean index in updates.jsonl.
"""
from math import prod
from pathlib import Path

import torch

from harness import flags
import metrics
import training
from masks import Masks, seeded, select
from harness.runfolder import Run, finished

# INTERPRETATION of "every so many iterations": rewiring stops at 3/4 of the epochs, and there are
# some 34 updates. In adaptive mode a Gaussian layer loses (1 - rho) * 15.3 % an update, so that 34
# lead from 50 % to the reported connectivity of 30 %; one an epoch of 500 would empty the network.
# The reported results are of ResNet-19 with T = 2; of the two networks of that name, LTH-SNN's; on
# CIFAR10-DVS of VGGSNN with T = 10, where here the index sets all, in 300 epochs.
PAPER = dict(model="resnet19", time_steps=2, epochs_prune=375, epochs_finetune=125, interval=4000)
SHORT = dict(epochs_prune=7, epochs_finetune=3, interval=95)
SETTINGS = {  # the defaults by data set; "all" holds for each of them
    # INTERPRETATION: the paper's rewiring coefficient alpha_r = 0.001 takes the place of eta
    "all": dict(mode="matched", sparsity=0.9, rho=0.9, scope="layer", growth="momentum", start="er",
                density=0.5, eta=0.001),
    "fashion-mini": dict(epochs_prune=9, epochs_finetune=3, interval=25),
    **dict.fromkeys(("mnist", "fashion-mnist", "n-mnist"), SHORT), "cifar10": PAPER,
    "cifar100": PAPER, "tiny-imagenet": dict(epochs_prune=112, epochs_finetune=38, interval=2500),
    "dvs-gesture": dict(epochs_prune=150, epochs_finetune=50, interval=300),
    "cifar10-dvs": dict(epochs_prune=225, epochs_finetune=75, interval=930, mode="adaptive"),
    "smoke": dict(epochs_prune=1, epochs_finetune=1, interval=4),  # upper bounds
}
P, Q = 0.5, 1.0  # of the index, as both papers have them
GAMMA, BETA = 1.0, 0.9  # INTERPRETATION: those of the PQ code
DECAY = 0.9  # of the momentum that ranks what grows


def layer_densities(shapes, density, start):
    """Return the density of each layer, so that density * M weights are alive in all.

    "er": one for all layers (INTERPRETATION of the paper's Erdős–Rényi start at 0.50). "erk", as
    in GraNet (arXiv 2106.10404): proportional to sum(shape) / prod(shape); a layer that would
    exceed 1 is dense, and the others share the rest.
    """
    if start == "er" or density >= 1:
        return [density] * len(shapes)
    sizes, raw = [prod(shape) for shape in shapes], [sum(shape) / prod(shape) for shape in shapes]
    dense, over = set(), set(range(len(shapes)))
    while over:
        sparse = set(range(len(shapes))) - dense
        scale = ((density * sum(sizes) - sum(sizes[i] for i in dense))
                 / sum(raw[i] * sizes[i] for i in sparse))
        over = {i for i in sparse if scale * raw[i] > 1}
        dense |= over
    return [1.0 if i in dense else scale * raw[i] for i in range(len(shapes))]


def start_sparse(args, masks):
    """Draw the masks of the start. INTERPRETATION: exact counts, where GraNet's code tosses a coin
    for each place."""
    shapes = [weight.shape for weight in masks.weights.values()]
    densities = layer_densities(shapes, args.density, args.start)
    generator = seeded(args.seed, 0)  # updates have iterations from 1
    for part, density in zip(masks.flat.split(masks.sizes), densities):
        count = max(1, round(density * len(part)))
        part.copy_(select(torch.ones_like(part), count, [], generator))


# ---- Stage I: the PQ index -----------------------------------------------------------------------


def in_scopes(masks, flat, scope):
    """Return views of an [M] tensor, one a layer: [1, weights] for the scope "layer",
    [neurons or filters, weights of each] for "neuron"."""
    return [part.view(len(weight) if scope == "neuron" else 1, -1)
            for part, weight in zip(flat.split(masks.sizes), masks.weights.values())]


def pq_index(magnitudes, alive, p=P, q=Q):
    """Return I = 1 - d^(1/q - 1/p) * |w|_p / |w|_q of each row, [R] in float64, in [0, 1).

    magnitudes: |w|, [R, n]. alive: [R, n] bool; d counts them in a row, those that are 0 included.
    0: all are equal, none is alive, or all are 0. Computed as 1 minus a ratio of power means, which
    is the same and cannot overflow.
    """
    weights = magnitudes.double() * alive
    d = alive.sum(1).clamp(min=1)
    of_p, of_q = (weights.pow(power).sum(1).div(d).pow(1 / power) for power in (p, q))
    index = torch.where(of_q == 0, 0.0, 1 - of_p / of_q)
    return index.clamp(0, 1 - 2**-53)


def retained(index, d, eta, p=P, q=Q):
    """Return the bound m: how many of d weights are to be retained at least, [R] int64."""
    m = (1 - index) ** (p * q / (q - p)) * (1 + eta) ** (-q / (q - p)) * d  # in float64
    return torch.minimum(torch.ceil(m - 1e-9 * d).long(), d)  # 4.0000001 is 4 and not 5


def to_prune(m, d, gamma=GAMMA, beta=BETA):
    """Return c = floor(d * clip(gamma * (1 - m / d), 0, beta)), at most d - 1, [R] int64."""
    c = torch.minimum(gamma * (d - m).double(), beta * d.double())
    return torch.minimum(torch.floor(c + 1e-9 * d).long(), d - 1).clamp(min=0)


# ---- Stage II: rewiring --------------------------------------------------------------------------


def apportion(total, weights, caps):
    """Share out `total` units in proportion to weights, to the largest remainders first, and to
    none beyond its cap; what the weights cannot place goes evenly to the others.

    weights, caps: [S] int64, caps with at least `total` in all. Returns [S] int64 with exactly it.
    """
    share = torch.zeros_like(caps)
    while (left := total - int(share.sum())) > 0:
        is_open = share < caps
        by = weights * is_open if (weights * is_open).any() else is_open.long()
        share, rest = share + left * by // by.sum(), left * by % by.sum()
        share[rest.argsort(descending=True, stable=True)[:total - int(share.sum())]] += 1
        share = torch.minimum(share, caps)
    return share


def turnover(args, c, d, dead, keep):
    """Return how many weights to prune and how many to grow in each scope: two [S] int64.

    c: what the index says. d, dead: alive and dead weights of before. keep: how many are to be
    alive in all, None in adaptive mode.
    """
    if keep is None:  # 0.29 * 100 is 28.999999999999996; a dense layer has no place to grow
        return c, torch.minimum(torch.floor(c.double() * args.rho + 1e-9 * c).long(), dead)
    # INTERPRETATION of "matched": the rho that meets the ramp, one for all scopes: grown = pruned -
    # surplus. Were that negative, c is raised to what the ramp needs, in proportion: the index
    # still says where. c is lowered where fewer are dead than should grow
    surplus = int(d.sum()) - keep
    total = min(max(int(c.sum()), surplus), surplus + int(dead.sum()))
    cut = apportion(total, c, (d - 1).clamp(min=0))  # no scope loses its last weight
    return cut, apportion(total - surplus, cut, dead)


def choose(eligible, counts, keys, generator):
    """Return which places have the largest key in their row, [R, n] bool: counts[r] of the eligible
    ones of row r; ties are broken at random.

    eligible: [R, n] bool. counts: [R] int64. keys: [R, n], finite. generator: a CPU generator.
    """
    if len(counts) == 1:
        return select(eligible[0], int(counts), [keys[0]], generator)[None]
    # each row has a count of its own, so this is a sort, of all rows in one call
    places = torch.randperm(eligible.shape[1], generator=generator).to(keys.device)
    ranked = torch.where(eligible, keys, -torch.inf)[:, places]
    order = places[ranked.argsort(dim=1, descending=True, stable=True)]
    first = torch.arange(len(places), device=keys.device) < counts.to(keys.device)[:, None]
    return torch.zeros_like(eligible).scatter_(1, order, first)


def rewire(args, masks, keep, scores, generator):
    """One update, Stage I and Stage II. keep: how many weights are alive after it, None in adaptive
    mode. scores: [M], by which the dead are ranked.

    Returns (pruned, grown, before, index): [M] bool, [M] bool, the sparsity between the two steps,
    the mean index of each layer. No layer ends empty: each scope keeps a weight.
    """
    magnitudes = masks.magnitudes()
    masks.require_finite(magnitudes, "the weights")
    masks.require_finite(scores, "the scores")
    layers = list(zip(*(in_scopes(masks, flat, args.scope)
                        for flat in (magnitudes, masks.flat, scores))))
    d, dead, has_weight = (torch.cat(rows).cpu() for rows in zip(*(
        (alive.sum(1), (~alive).sum(1), size.any(1)) for size, alive, _ in layers)))

    # Stage I: the index of what is alive -> the bound -> how many connections to rewire
    index = torch.cat([pq_index(size, alive) for size, alive, _ in layers]).cpu()
    c = torch.where(has_weight, to_prune(retained(index, d, args.eta), d), 0)
    cut, grow = turnover(args, c, d, dead, keep)

    # Stage II: prune the smallest |w| of the alive; grow at the largest scores of the dead, those
    # just pruned not among them: they moved until now, and would come straight back
    sizes, pruned, grown = [len(alive) for _, alive, _ in layers], [], []
    for (size, alive, score), n_cut, n_grow in zip(layers, cut.split(sizes), grow.split(sizes)):
        pruned.append(choose(alive, n_cut, -size, generator).flatten())
        grown.append(choose(~alive, n_grow, score, generator).flatten())
    pruned, grown = torch.cat(pruned), torch.cat(grown)
    masks.flat.copy_((masks.flat & ~pruned) | grown)  # what grows is 0, and so is its momentum
    before = 1 - int(d.sum() - cut.sum()) / masks.total
    return pruned, grown, before, [float(rows.mean()) for rows in index.split(sizes)]


def sparsity_at(progress, first, final):
    """Return the sparsity of the ramp: a cubic from first to final as progress goes from 0 to 1."""
    return first + (final - first) * (1 - (1 - progress) ** 3)


def accumulate(masks, velocity):
    """V <- 0.9 V + g for all places, the dead ones included. velocity: [M], changed in place."""
    velocity.mul_(DECAY)
    for part, weight in zip(velocity.split(masks.sizes), masks.weights.values()):
        part.view(weight.shape).add_(weight.grad)


# ---- the script ----------------------------------------------------------------------------------


def run_name(args):
    name = f"{Path(args.dataset).stem}-{args.model}-pq-"
    name += f"{args.sparsity:g}" if args.mode == "matched" else f"adaptive-rho{args.rho:g}"
    for flag in ("scope", "growth", "start"):  # readings that are not the default
        if (value := getattr(args, flag)) != SETTINGS["all"][flag]:
            name += f"-{value}"
    return f"{name}-seed{args.seed}"


def complete(args, explicit):
    """Check the flags that depend on each other; the one that a mode does not have is None."""
    absent = "rho" if args.mode == "matched" else "sparsity"
    if explicit.get(absent) is not None:
        raise ValueError(f"--{absent} is {explicit[absent]:g}, expected none: with --mode "
                         f"{args.mode} it is an outcome. Leave it out, or change --mode")
    setattr(args, absent, None)
    if args.mode == "matched" and args.sparsity < 1 - args.density - 1e-9:
        raise ValueError(f"--sparsity is {args.sparsity:g}, expected at least the "
                         f"{1 - args.density:g} of the start. Raise it or --density")


def parse_args(argv):
    parser = flags.make_parser(__doc__)
    add = parser.add_argument_group("rewiring").add_argument
    add("--mode", choices=("matched", "adaptive"), help="matched: the density follows a cubic to 1 "
        "- sparsity, the index sets the turnover; adaptive: the index sets all")
    add("--sparsity", type=flags.number(0, 1), help="matched: share of the prunable weights that "
        "is dead in the end, a fraction in [0, 1)")
    add("--rho", type=flags.number(0, 1), help="adaptive: connections grown for each one pruned, a "
        "fraction in [0, 1) (for 1: matched, with --sparsity 1 - density)")
    add("--scope", choices=("layer", "neuron"), help="what has an index of its own")
    add("--growth", choices=("momentum", "gradient", "random"), help="what ranks the dead weights")
    add("--density", type=flags.number(0, 1, above=True), help="share that is alive at the start")
    add("--start", choices=("er", "erk"), help="density of each layer then: the same, or by shape")
    add("--eta", type=flags.number(0), help="slack of the bound, the paper's alpha_r")
    add("--interval", type=flags.whole(1), metavar="STEPS", help="iterations between two updates")
    add("--epochs-prune", type=flags.whole(1), metavar="N", help="epochs with rewiring")
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
        masks, optimizer = Masks(net), training.sgd(args, net)
        stages = training.stages(args, images, prune=args.epochs_prune,
                                 finetune=args.epochs_finetune)
        num_updates = stages.steps("prune") // args.interval
        n_scopes = sum(map(len, in_scopes(masks, masks.flat, args.scope)))
        if args.mode == "matched" and masks.keep_at(args.sparsity) < n_scopes:
            raise ValueError(f"--sparsity is {args.sparsity:g}: {masks.keep_at(args.sparsity)} of "
                             f"{masks.total} weights alive, expected at least one for each of the "
                             f"{n_scopes} {args.scope}s. Lower --sparsity or raise --width")
        if num_updates == 0:
            raise ValueError(f"no update would ever run: --interval is {args.interval}, expected "
                             f"at most {stages.steps('prune')}. Lower it or raise --epochs-prune")
        run = Run(args, device, stages, net=net, optimizer=optimizer, masks=masks)

    forward = torch.compile(net) if args.compile else net
    with run.under_way():
        if run.iteration == 0:
            dense = training.evaluate(forward, net, images, args)["accuracy"] if args.init else None
            # Sparse from the start: the weights that any method has at this seed, masked. V = 0
            start_sparse(args, masks)
            masks.apply(optimizer)
            run.notes |= dict(dense_accuracy=dense, density=1 - masks.sparsity,
                              velocity=torch.zeros(masks.total))
        velocity = run.notes["velocity"] = run.notes["velocity"].to(device)  # saved with the run
        run.header(images, net, f"{num_updates} updates from {100 * run.notes['density']:.1f} % "
                   f"dense, {args.mode}, index by {args.scope}, growth by {args.growth}")

        for epoch in range(run.epoch, stages.epochs):
            for x, y in run.track(images, epoch):
                update = run.iteration // args.interval
                is_update = update <= num_updates and run.iteration == update * args.interval

                with training.autocast(args):
                    logits = forward(x)  # [T, N, K]
                loss = training.loss_over_time(logits, y, args.loss)
                optimizer.zero_grad()
                loss.backward()
                if args.growth == "momentum" and run.iteration <= num_updates * args.interval:
                    accumulate(masks, velocity)
                training.set_lr(optimizer,
                                training.cosine(args.lr, *stages.position(run.iteration)))
                optimizer.step()
                masks.apply(optimizer)  # w <- w * m, and its momentum
                run.meter.add(loss, logits, y, run.iteration)

                if is_update:
                    run.check()
                    generator = seeded(args.seed, run.iteration)
                    scores = (velocity.abs() if args.growth == "momentum" else
                              masks.gradients() if args.growth == "gradient" else
                              torch.rand(masks.total, generator=generator).to(device))
                    target = keep = None
                    if args.mode == "matched":
                        target = sparsity_at(update / num_updates, 1 - args.density, args.sparsity)
                        keep = masks.keep_at(target)
                    pruned, grown, before, index = rewire(args, masks, keep, scores, generator)
                    masks.apply(optimizer)
                    row = dict(update=update, iteration=run.iteration, target=target,
                               before=before, **masks.account(pruned, grown))
                    for layer, value in zip(row["layers"], index):
                        layer["index"] = value
                    run.add_update(row)
                    run.verify(keep)
            run.end_epoch(optimizer.param_groups[0]["lr"],
                          training.evaluate(forward, net, images, args), masks.sparsity)

        # What came of it
        with training.autocast(args):
            counts = metrics.count(net, images.inputs("test", args.batch_size), masks.alive)
        densities = [run.notes["density"]] + [1 - row["sparsity"] for row in run.rows[:-1]]
        return run.finish(net, masks.alive, counts, script="prune_pq", method="pq",
                          macs_dense=counts["macs"], dense_accuracy=run.notes["dense_accuracy"],
                          pruned_accuracy=run.rows[args.epochs_prune - 1]["test_accuracy"],
                          training_cost=sum(densities) / len(densities),
                          survived_by_regeneration=masks.share_regenerated)


if __name__ == "__main__":
    main()
