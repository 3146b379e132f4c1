"""Two-stage dynamic structure learning: the PQ index says how many weights are rewired.

Paper: Shen, Xu, Pan, Chen 2025, arXiv 2502.13572, of which no code is known. The index
is from Diao et al., ICLR 2023, arXiv 2302.05601. The network is sparse from the start.
Every so many iterations Stage I measures how compressible the alive weights of each
scope are, a layer or a neuron, by the PQ index. This gives the number of weights to
prune. Stage II prunes that many by magnitude, and grows others by momentum. Training
goes on all the while. In the last epochs the mask is fixed.

    python prune_pq.py                           # the whole job on embedded data
    python prune_pq.py --scope neuron            # an index for each neuron or filter
    python prune_pq.py --mode adaptive           # the index alone sets the density
    python prune_pq.py --growth random           # also: gradient
    python prune_pq.py --dataset cifar10-dvs     # the paper's settings, as far as known

Four things differ from the code of the PQ index. A scope without an alive weight, or
with zeros alone, has index 0, where that code divides 0 by 0. Counts are exact, free of
the rounding of floating point. Weights are not set back to their start after an update.
No epoch is picked by its test accuracy.

The momentum that ranks is an average of its own, over all places. That of the optimiser
is masked, and so 0 at each dead weight.

The run folder is that of prune_unstructured.py. In updates.jsonl each layer has its
mean index beside its counts.
"""
from pathlib import Path
from typing import NamedTuple

import harness  # first: what is not installed is then one line

import torch
from torch import Tensor

import training
from harness import flags, presets, setup
from harness.runfolder import Run, finished
from masks import DENSITIES, Masks, Update, apportion, select, start_sparse
from neurons import widest

P, Q = 0.5, 1.0  # of the index, as both papers have them
GAMMA, BETA = 1.0, 0.9  # INTERPRETATION: those of the PQ index's code
DECAY = 0.9  # of the momentum that ranks what grows

# ---- Stage I: the PQ index -----------------------------------------------------------


class Scopes(NamedTuple):
    """What Stage I found in the S scopes of the network: rows of [S] int64, on the CPU.
    """

    n_alive: Tensor   # d
    n_dead: Tensor
    n_rewire: Tensor  # c, how many alive weights the index says to prune


def in_scopes(masks, flat, scope):
    """Return views of an [M] tensor, one a layer: [1, weights] for the scope "layer",
    [neurons or filters, weights of each] for "neuron"."""
    parts = zip(flat.split(masks.sizes), masks.weights.values())
    if scope == "layer":
        return [part.view(1, -1) for part, _ in parts]
    return [part.view(len(weight), -1) for part, weight in parts]


def pq_index(magnitudes, alive, p=P, q=Q):
    """Return the PQ index of each row, [R] in float64 (on mps in float32), in [0, 1).

        I = 1 - d^(1/q - 1/p) * |w|_p / |w|_q          (Diao et al., Definition 1)

    magnitudes: |w|, [R, n]. alive: [R, n] bool; d counts them in a row, zeros included.
    0: all are equal, none is alive, or all are 0. The norms over powers of d are power
    means, whose ratio cannot overflow.
    """
    weights = magnitudes.to(widest(magnitudes.device)) * alive
    d = alive.sum(1).clamp(min=1)
    mean_p = weights.pow(p).sum(1).div(d).pow(1 / p)
    mean_q = weights.pow(q).sum(1).div(d).pow(1 / q)
    index = torch.where(mean_q == 0, 0.0, 1 - mean_p / mean_q)
    return index.clamp(0, 1 - torch.finfo(index.dtype).eps / 2)


def retention_bound(index, d, eta, p=P, q=Q):
    """Return the bound m: at least so many of d weights are to stay, [R] int64.

        m = ceil(d * (1 + eta)^(-q / (q - p)) * (1 - I)^(p q / (q - p)))
    """
    m = (1 - index) ** (p * q / (q - p)) * (1 + eta) ** (-q / (q - p)) * d  # in float64
    return torch.minimum(torch.ceil(m - 1e-9 * d).long(), d)  # 4.0000001 is 4, not 5


def rewiring_count(m, d, gamma=GAMMA, beta=BETA):
    """Return c, how many of d weights to prune, at most d - 1, [R] int64.

        c = floor(d * clip(gamma * (1 - m / d), 0, beta))
    """
    c = torch.minimum(gamma * (d - m).double(), beta * d.double())
    return torch.minimum(torch.floor(c + 1e-9 * d).long(), d - 1).clamp(min=0)


def measure_scopes(masks, scope, eta):
    """Stage I: the index of what is alive, its bound, how many weights to rewire.

    Returns (Scopes, the mean index of each layer, a list).
    """
    magnitudes = masks.magnitudes()
    masks.require_finite(magnitudes, "the weights")
    index, n_alive, n_dead, has_weight = [], [], [], []
    for size, alive in zip(in_scopes(masks, magnitudes, scope),
                           in_scopes(masks, masks.flat, scope)):
        index.append(pq_index(size, alive))
        n_alive.append(alive.sum(1))
        n_dead.append((~alive).sum(1))
        has_weight.append(size.any(1))
    by_layer = [float(rows.mean()) for rows in index]
    index, n_alive, n_dead, has_weight = (
        torch.cat(rows).cpu() for rows in (index, n_alive, n_dead, has_weight))

    c = rewiring_count(retention_bound(index.double(), n_alive, eta), n_alive)
    c = torch.where(has_weight, c, 0)  # of zeros alone none is the smallest
    return Scopes(n_alive, n_dead, c), by_layer


# ---- how many are pruned, and how many grow ------------------------------------------
# Each function returns two [S] int64: the counts of each scope.


def counts_at_ratio(scopes, rho):
    """--mode adaptive: prune what the index says, and grow the share rho of it."""
    # 1e-9: 0.29 * 100 is 28.999999999999996
    n_grow = torch.floor(scopes.n_rewire.double() * rho + 1e-9 * scopes.n_rewire).long()
    return scopes.n_rewire, torch.minimum(n_grow, scopes.n_dead)


def counts_at_target(scopes, keep):
    """--mode matched: `keep` weights are alive after the update. The index sets how
    many are pruned.

    INTERPRETATION: as many grow as were pruned, less the surplus over the target: one
    rho for all scopes that meets the ramp. Where that number would be negative, more
    are pruned, in proportion to what the index says. Where fewer are dead than should
    grow, fewer are pruned.
    """
    surplus = int(scopes.n_alive.sum()) - keep
    total = max(int(scopes.n_rewire.sum()), surplus)
    total = min(total, surplus + int(scopes.n_dead.sum()))
    spare = (scopes.n_alive - 1).clamp(min=0)  # no scope loses its last weight
    n_prune = apportion(total, scopes.n_rewire, spare)
    return n_prune, apportion(total - surplus, n_prune, scopes.n_dead)


# ---- Stage II: rewiring --------------------------------------------------------------
# A score gives each weight a number, [M]; the dead weights with the highest grow.
# velocity: V, [M]. generator: of this update.


def momentum(masks, velocity, generator):
    """Rank by |V|, the paper's way."""
    return velocity.abs()


def gradient(masks, velocity, generator):
    """Rank by |dL/dw| of the batch, as RigL does."""
    return masks.gradients()


def random(masks, velocity, generator):
    """Draw what grows: the control, as SET does."""
    return torch.rand(masks.total, generator=generator).to(masks.device)


GROWTH = {"momentum": momentum, "gradient": gradient, "random": random}


def accumulate(masks, velocity):
    """V <- 0.9 V + g for all places, the dead ones included. velocity: V, [M], changed
    in place."""
    velocity.mul_(DECAY)
    for part, weight in zip(velocity.split(masks.sizes), masks.weights.values()):
        part.view(weight.shape).add_(weight.grad)


def rewire(masks, scope, n_prune, n_grow, score, generator):
    """Stage II: in each scope prune the alive weights with the smallest |w|, and grow
    the dead ones with the highest score.

    n_prune, n_grow: [S] int64, the counts of each scope. score: [M]. Returns an Update.

    What is pruned in this update does not grow in it. It moved until now, so that its
    momentum would bring it straight back. What grows is 0, and so is its momentum.
    """
    magnitudes = masks.magnitudes()
    masks.require_finite(magnitudes, "the weights")
    masks.require_finite(score, "the scores")
    alive_by_layer = in_scopes(masks, masks.flat, scope)
    n_scopes = [len(alive) for alive in alive_by_layer]
    pruned, grown = [], []
    for alive, size, rank, cut, grow in zip(
            alive_by_layer, in_scopes(masks, magnitudes, scope),
            in_scopes(masks, score, scope), n_prune.split(n_scopes),
            n_grow.split(n_scopes)):
        pruned.append(largest_in_rows(alive, cut, -size, generator).flatten())
        grown.append(largest_in_rows(~alive, grow, rank, generator).flatten())
    pruned, grown = torch.cat(pruned), torch.cat(grown)

    masks.flat &= ~pruned
    between = masks.sparsity
    masks.flat |= grown
    return Update(pruned, between, grown, rescued=[])  # each scope has kept a weight


def largest_in_rows(eligible, counts, keys, generator):
    """Choose counts[r] of the eligible places of each row r: those with the largest
    keys, ties at random.

    eligible: [R, n] bool. counts: [R] int64. keys: [R, n], finite. generator: a CPU
    generator. Returns [R, n] bool.
    """
    if len(counts) == 1:
        return select(eligible[0], int(counts), [keys[0]], generator)[None]
    # each row has a count of its own, so this is a sort, of all rows in one call
    places = torch.randperm(eligible.shape[1], generator=generator).to(keys.device)
    ranked = torch.where(eligible, keys, -torch.inf)[:, places]
    order = places[ranked.argsort(dim=1, descending=True, stable=True)]
    ranks = torch.arange(len(places), device=keys.device)
    is_first = ranks < counts.to(keys.device)[:, None]
    return torch.zeros_like(eligible).scatter_(1, order, is_first)


def counts_at_start(masks, start, density):
    """Return how many weights of each layer are alive at the start, a list: exactly
    round(D N), and at least one.

    start: a key of DENSITIES. INTERPRETATION: the paper's Erdős–Rényi start at a
    density of 0.50 is one density for all layers.
    """
    shapes = [weight.shape for weight in masks.weights.values()]
    return [max(1, round(share * size)) for share, size in zip(
        DENSITIES[start](shapes, density), masks.sizes)]


# ---- the script ----------------------------------------------------------------------


def run_name(args):
    name = f"{Path(args.dataset).stem}-{args.model}-pq-"
    if args.mode == "matched":
        name += f"{args.sparsity:g}"
    else:
        name += f"adaptive-rho{args.rho:g}"
    usual = presets.of(args.dataset, "pq")
    for flag in ("scope", "growth", "start"):  # readings that are not the default
        if getattr(args, flag) != usual[flag]:
            name += f"-{getattr(args, flag)}"
    return f"{name}-seed{args.seed}"


def complete(args, explicit):
    """Check the flags that depend on each other. The one that a mode does not have is
    None."""
    absent = "rho" if args.mode == "matched" else "sparsity"
    if explicit.get(absent) is not None:
        raise ValueError(
            f"--{absent} is {explicit[absent]:g}, expected none: with --mode "
            f"{args.mode} it is an outcome. Leave it out, or change --mode")
    setattr(args, absent, None)
    if args.mode == "adaptive" and args.rho == 0:  # nothing grows
        usual = presets.of(args.dataset, "pq")["growth"]
        flags.set_unused(args, explicit, dict(growth=usual), "--rho 0")
    if args.mode == "matched" and args.sparsity < 1 - args.density - 1e-9:
        raise ValueError(
            f"--sparsity is {args.sparsity:g}, expected at least the "
            f"{1 - args.density:g} of the start. Raise it or --density")


def parse_args(argv):
    parser = flags.make_parser(__doc__)
    add = parser.add_argument_group("rewiring (PQ index)").add_argument
    add("--mode", choices=("matched", "adaptive"),
        help="matched: the density follows a cubic to 1 - sparsity, and the index sets "
        "how many are rewired; adaptive: the index sets both")
    add("--sparsity", type=flags.number(0, 1), help="matched: share of the prunable "
        "weights that is dead in the end, a fraction in [0, 1)")
    add("--rho", type=flags.number(0, 1), help="adaptive: connections grown for each "
        "one pruned, a fraction in [0, 1); for a rho of 1 take --mode matched with "
        "--sparsity 1 - density")
    add("--scope", choices=("layer", "neuron"), help="what has an index of its own")
    add("--growth", choices=GROWTH, help="what ranks the dead weights")
    add("--density", type=flags.number(0, 1, above=True),
        help="share of the prunable weights that is alive at the start")
    add("--start", choices=DENSITIES,
        help="density of each layer at the start. er: the same; erk: by its shape")
    add("--eta", type=flags.number(0), help="slack of the bound, the paper's alpha_r")
    add("--interval", type=flags.whole(1), metavar="STEPS",
        help="iterations between two updates")
    add("--epochs-prune", type=flags.whole(1), metavar="N", help="epochs with rewiring")
    add("--epochs-finetune", type=flags.whole(0), metavar="N",
        help="epochs with the mask fixed")
    return flags.parse(parser, argv, "pq", complete, run_name)


def check_scopes(args, masks):
    """Raise ValueError if the sparsity leaves fewer weights than there are scopes."""
    n_scopes = sum(map(len, in_scopes(masks, masks.flat, args.scope)))
    keep = masks.keep_at(args.sparsity)
    if keep < n_scopes:
        raise ValueError(
            f"--sparsity is {args.sparsity:g}: {keep} of {masks.total} weights alive, "
            f"expected at least one for each of the {n_scopes} {args.scope}s. Lower "
            f"--sparsity or raise --width")


def set_up(args):
    """Return the run and its number of updates. What cannot work is exit code 2, before
    anything is written."""
    with flags.exits(2, ValueError, OSError, no_memory=flags.SMALLER):
        device = setup.start(args)
        images = setup.load(args, device)
        net = setup.build(args, images)
        masks = Masks(net)
        optimizer = training.optimizer(args, net.parameters())
        stages = setup.stages(args, images, prune=args.epochs_prune,
                              finetune=args.epochs_finetune)
        if args.mode == "matched":
            check_scopes(args, masks)
        num_updates = setup.num_updates(args, stages)
        run = Run(args, device, images, stages, net=net, optimizer=optimizer,
                  masks=masks)
    return run, num_updates


def main(argv=None):
    args = parse_args(argv)
    if (summary := finished(args)) is not None:
        return summary
    run, num_updates = set_up(args)
    masks, optimizer = run.masks, run.optimizer

    with run.under_way(f"PQ: {num_updates} updates from {100 * args.density:g} % "
                       f"dense, {args.mode}, index by {args.scope}, growth by "
                       f"{args.growth}"):
        if run.iteration == 0:
            # The weights that any method has at this seed, masked; V = 0.
            keeps = counts_at_start(masks, args.start, args.density)
            start_sparse(masks, keeps, run.generator())
            masks.apply(optimizer)
            run.notes["first_sparsity"] = masks.sparsity
            run.notes["velocity"] = torch.zeros(masks.total)
        velocity = run.notes["velocity"].to(run.device)
        run.notes["velocity"] = velocity  # each checkpoint has it
        last_update = num_updates * args.interval  # its iteration

        for epoch in run.epochs():
            for x, y in run.batches(epoch):
                lr = training.lr_at(args.schedule, args.lr, *run.position)
                training.step(run, x, y, lr)
                masks.apply(optimizer)  # w <- w * m, and its momentum
                if args.growth == "momentum" and run.iteration <= last_update:
                    accumulate(masks, velocity)  # V <- 0.9 V + g

                update, rest = divmod(run.iteration, args.interval)
                if rest == 0 and update <= num_updates:
                    # Stage I: how many of the alive weights are to be rewired?
                    scopes, index = measure_scopes(masks, args.scope, args.eta)
                    if args.mode == "matched":
                        target = training.sparsity_at(
                            update, num_updates, args.sparsity, first=1 - args.density)
                        keep = masks.keep_at(target)
                        n_prune, n_grow = counts_at_target(scopes, keep)
                    else:
                        target = keep = None  # outcomes
                        n_prune, n_grow = counts_at_ratio(scopes, args.rho)

                    # Stage II: prune the smallest |w|, grow the largest |V|
                    generator = run.generator()
                    score = GROWTH[args.growth](masks, velocity, generator)
                    change = rewire(masks, args.scope, n_prune, n_grow, score,
                                    generator)
                    masks.apply(optimizer)
                    run.log_update(target, change, keep, layers=dict(index=index))
            run.end_epoch()

        return run.finish("prune_pq", "pq", pruned_accuracy=run.last_accuracy("prune"),
                          survived_by_regeneration=masks.share_regenerated)


if __name__ == "__main__":
    main()
