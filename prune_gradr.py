"""Grad R (gradient rewiring) and Deep R: which weights exist is learned while training.

Grad R: "Pruning of Deep Spiking Neural Networks through Gradient Rewiring", Chen et al.
2021, arXiv 2105.04916, and its code. Deep R: "Deep Rewiring: Training very sparse deep
networks", Bellec et al. 2018, arXiv 1711.05136, and its code.

A weight is w = sign * max(theta, 0). Its sign is that of the start. Its strength theta
is learned, and a connection with theta <= 0 is dormant. Grad R moves all strengths,
dormant ones too, by the dense gradient and the pull of a Laplacian prior: how many
connections are active is an outcome, which the scale of the prior steers. Deep R has
exactly K active connections: those whose theta falls below 0 become dormant, and as
many dormant ones, drawn at random, become active. After these structure epochs Grad R
is cut to the K largest theta, and both train on with the mask fixed.

    python prune_gradr.py                      # Grad R, the whole job on embedded data
    python prune_gradr.py --method deepr       # Deep R
    python prune_gradr.py --optimizer sgd      # either of them by SGD
    python prune_gradr.py --dataset mnist      # Grad R's own setting; also: cifar10

The default of --prior is tuned on the embedded data. To find one for another network,
bisect in runs with --epochs-finetune 0 and another --seed: each run says how many
connections its structure epochs ended with.

Differences from Grad R's code: a weight that is 0 at the start can become active; N
epochs are N, not N + 1. Its version of Deep R has no noise, sets new connections to 0
before their first gradient, and counts connections by |w|; here Deep R is the paper's.
That version's Adam scales L1 and noise by the bias correction; here their rate is lr.
It keeps moments of all weights, dormant ones too; here a connection that becomes
dormant loses them. It revives connections at 1e-8; here they start at 1e-12, as in Deep
R's own code.
One property is kept: as long as the centre of the prior is out of reach, its target,
--sparsity, changes nothing. The first lines of a run say whether it is.
"""
import math
from pathlib import Path

import harness  # first: what is not installed is then one line

import torch

import training
from harness import flags, presets, setup
from harness.runfolder import Run, finished
from masks import Masks, TooFew, change_since, count, select

BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam, Grad R's code
REVIVED = 1e-12  # the strength of a new connection, Deep R's code


class Connections:
    """Sign, strength and optimiser moments of the prunable weights, in the order of the
    masks.

    sign: [M], +1 or -1. theta: [M], the strength. active: [M] bool; in Grad R
    theta > 0, in Deep R the set of K, whose theta may be 0. first, second: [M], the
    optimiser's moments of the gradient. optimizer: "adam" | "adamw" | "sgd", with its
    momentum. decay: the weight decay. That of adamw passes by its moments; that of the
    others is part of the gradient.
    """

    def __init__(self, masks, optimizer="adam", momentum=0.0, decay=0.0):
        self.optimizer, self.momentum = optimizer, momentum
        self.decay = decay
        self.weights, self.sizes = list(masks.weights.values()), masks.sizes
        w = torch.cat([weight.detach().reshape(-1) for weight in self.weights])
        self.sign = torch.where(w < 0, -1.0, 1.0)  # never 0: w would stay 0 for ever
        self.theta = w.abs()
        self.active = self.theta > 0
        self.first, self.second = torch.zeros_like(w), torch.zeros_like(w)
        self.steps = 0

    @property
    def density(self):
        """Active / all connections."""
        return count(self.active) / len(self.active)

    def gradients(self):
        """Return dL/dw, dense, [M], with the gradient of weight decay, which acts on w
        and so not on dormant strengths."""
        decay = 0.0 if self.optimizer == "adamw" else self.decay  # see move()
        return torch.cat([(weight.grad + decay * weight.detach()).reshape(-1)
                          for weight in self.weights])

    def move(self, g, lr):
        """Update the moments by a gradient g, [M]. Return what the optimiser takes off
        w, [M], and the rate at which Grad R's prior pulls.

        INTERPRETATION of SGD: with momentum, as all methods have. At momentum 0 it is
        the bare formula.
        """
        if self.optimizer == "sgd":
            self.first.mul_(self.momentum).add_(g)
            return lr * self.first, lr
        self.steps += 1
        b1, b2 = BETAS
        self.first.lerp_(g, 1 - b1)  # u <- b1 u + (1 - b1) g
        self.second.mul_(b2).addcmul_(g, g, value=1 - b2)  # v <- b2 v + (1 - b2) g^2
        rate = lr / (1 - b1 ** self.steps)
        root = self.second.sqrt() / math.sqrt(1 - b2 ** self.steps)
        move = rate * self.first / (root + EPSILON)
        if self.optimizer == "adamw":
            move += lr * self.decay * self.sign * self.theta.clamp(min=0) * self.active
        return move, rate

    @torch.no_grad()
    def write(self):
        """Set the weights of the network: w = sign * max(theta, 0)."""
        w = self.sign * self.theta.clamp(min=0) * self.active
        for weight, part in zip(self.weights, w.split(self.sizes)):
            weight.copy_(part.view(weight.shape))

    def fix(self, alive):
        """Let the connections of `alive`, [M] bool, be active, at theta >= 0, and all
        others dead."""
        self.active = alive.clone()
        self.theta = self.theta.clamp(min=0) * alive
        self.first, self.second = self.first * alive, self.second * alive
        self.write()

    def state_dict(self):
        tensors = {name: getattr(self, name).cpu()
                   for name in ("sign", "theta", "active", "first", "second")}
        return {"steps": self.steps} | tensors

    def load_state_dict(self, state):
        self.steps = state["steps"]
        for name in state.keys() - {"steps"}:
            setattr(self, name, state[name].to(self.theta.device, copy=True))


# ---- Grad R --------------------------------------------------------------------------


def centre(target, prior):
    """Return the centre c <= 0 of the Laplacian prior p(theta) ~ exp(-a |theta - c|).

    Under it a share `target` >= 0.5 of all theta lies below 0:
    c = ln(2 (1 - target)) / a. prior: its scale a; at 0 there is no prior, and c is
    -infinity.
    """
    return math.log(2 * (1 - target)) / prior if prior > 0 else -math.inf


def grad_r_step(wires, g, lr, prior, target):
    """Take one step of Grad R (its Algorithm 1): all strengths move, dormant ones too.

    g: dL/dw, [M]. prior: the scale a. target: the share of dormant connections under
    the prior.
    """
    move, rate = wires.move(g, lr)
    # published code: Adam's bias correction scales the prior, its denominator does not
    pull = prior * (wires.theta - centre(target, prior)).sign()
    z = wires.sign * wires.theta - move - rate * pull * wires.sign
    wires.theta = wires.sign * z
    wires.active = wires.theta > 0


# ---- Deep R --------------------------------------------------------------------------


def choose_at_random(candidates, number, most, spare):
    """Choose `number` of the candidates, [M] bool, each with equal chance, without
    replacement. Return [M] bool.

    number: a tensor, so that the host does not wait for the device. most: at least
    `number`. spare: how many candidates are left where `most` are chosen, or fewer.
    Places are drawn with replacement. What is no candidate, or was drawn before, is
    passed over, until there are enough. This takes far less than an order of all M.
    """
    places, device = len(candidates), candidates.device
    n_draws = enough_draws(places, most, spare)
    if n_draws >= places:  # few of the places are candidates: the first of an order
        order = torch.randperm(places, device=device)
        n_draws = places
    else:
        order = torch.randint(places, (n_draws,), device=device)
    draw = torch.arange(n_draws, dtype=torch.int32, device=device)
    # first: [M], the draw that takes a place first; n_draws: none
    first = torch.full((places,), n_draws, dtype=torch.int32, device=device)
    first.scatter_reduce_(0, order, draw, "amin")
    is_new = candidates[order] & (first[order] == draw)
    enough = (is_new.cumsum(0) <= number).sum()  # the draws that count
    return candidates & (first < enough)


def enough_draws(places, most, spare):
    """Return how many draws with replacement meet `most` different candidates, where
    at least `spare` more are left: the mean of this number, 8 of its standard
    deviations, and some. They are too few less than once in 10^13 times.
    """
    if spare == 0:
        return math.inf
    chance = spare / places  # of a new candidate, at the last draw; before it is larger
    mean = places * math.log1p(most / spare)
    deviation = math.sqrt(most * (1 - chance)) / chance  # at most
    return math.ceil(mean + 8 * deviation + 64 / chance)


def start_with(keep, masks, wires, generator):
    """Let `keep` connections, drawn at random, be active: Deep R is sparse from its
    start."""
    masks.flat.copy_(select(masks.flat, keep, [], generator))
    masks.rescue_empty_layers()
    wires.fix(masks.flat)


def deep_r_step(wires, g, lr, l1, temperature, keep):
    """Take one step of Deep R (its Algorithm 1) on the active connections, whose number
    stays the same.

    g: dL/dw, [M]. keep: that number, K. INTERPRETATION: the order of the terms, which
    its code leaves open; and one K over all layers, as in the paper, where its code has
    one a matrix. A new connection has the sign of the start.
    """
    move, _ = wires.move(g * wires.active, lr)
    theta = wires.theta - wires.sign * move  # gradient
    theta -= lr * l1  # L1
    theta += math.sqrt(2 * lr * temperature) * torch.randn_like(theta)  # noise
    stays = wires.active & ~(theta < 0)  # prune
    # rewire: any dormant one, those that were just pruned too, until K are active again
    n_lost = (wires.active & ~stays).count_nonzero()
    most = keep
    if theta.device.type == "cpu":  # where a look at the number costs nothing
        most = int(n_lost)
    born = choose_at_random(~stays, n_lost, most, spare=len(theta) - keep)
    wires.theta = torch.where(born, REVIVED, torch.where(stays, theta, 0.0))
    wires.active = stays | born  # the next step moves the new ones too
    # the new ones have no past
    wires.first, wires.second = wires.first * stays, wires.second * stays


# ---- both: from structure to a fixed mask --------------------------------------------


def follow(masks, wires):
    """Let the masks be the connections that are active now. Return what has changed
    since the last time, an Update."""
    before = masks.flat.clone()
    masks.flat.copy_(wires.active)
    return change_since(before, masks)


def fix_mask(keep, masks, wires, generator):
    """End the structure epochs: exactly the `keep` largest strengths are alive from now
    on. Return what that changes, an Update, or None if nothing.

    Where fewer are active, the dormant ones nearest to 0 become active. The K of Deep R
    stay as they are. Each layer keeps at least one.
    """
    before = masks.flat.clone()
    if masks.n_alive != keep:
        everywhere = torch.ones_like(before)
        masks.flat.copy_(select(everywhere, keep, [wires.theta], generator))
    rescued = masks.rescue_empty_layers(wires.theta)
    wires.fix(masks.flat)
    if torch.equal(before, masks.flat):
        return None
    return change_since(before, masks, rescued)


def fixed_mask_step(wires, g, lr):
    """Take one step with the mask fixed and theta >= 0.

    INTERPRETATION: without prior, L1 and noise. They choose connections, which is done.
    """
    move, _ = wires.move(g * wires.active, lr)
    wires.theta = (wires.theta - wires.sign * move).clamp(min=0) * wires.active


# ---- the defaults of prior and noise -------------------------------------------------

PAPER_PRIOR = 1e-3  # a in Grad R's code. With it the target 0.95 moves nothing
DEEP_R = 1e-5  # Deep R's code: L1 and noise of a step are both 1e-5 times the rate
ADAM_START = 27  # the sum over t of 0.9^t / (1 - 0.9^t): its bias correction, in steps

# {share of the weights that is active after the structure epochs: scale a of Grad R's
# prior}, measured on fashion-mini with `small`, TUNED_STEPS steps, TUNED_LR, seed 3
PRIOR = {"adam": {0.0214: 0.8, 0.0938: 0.4, 0.2785: 0.2, 0.5110: 0.1},
         "sgd": {0.0213: 0.03, 0.0496: 0.012, 0.1019: 0.006, 0.2111: 0.003,
                 0.5250: 0.001}}
TUNED_STEPS, TUNED_LR = 752, {"adam": 1e-3, "sgd": 0.1}
PRIOR["adamw"], TUNED_LR["adamw"] = PRIOR["adam"], TUNED_LR["adam"]


def reach(optimizer, schedule, lr, steps):
    """Return how far a prior of scale 1 moves a strength in the structure epochs."""
    total = training.sum_of_rates(schedule, lr, steps)
    if optimizer != "sgd":
        total += lr * ADAM_START
    return total


def default_prior(args, steps):
    """Return the scale a under which Grad R should end at a density of 1 - sparsity, by
    PRIOR.

    INTERPRETATION: with another number of steps or another lr, a is such that the prior
    moves a strength as far as in PRIOR's runs.
    """
    a = training.setting_for(1 - args.sparsity, PRIOR[args.optimizer])
    tuned = reach(args.optimizer, "cosine", TUNED_LR[args.optimizer], TUNED_STEPS)
    return a * tuned / reach(args.optimizer, args.schedule, args.lr, steps)


# ---- the script ----------------------------------------------------------------------


def run_name(args):
    name = f"{Path(args.dataset).stem}-{args.model}-{args.method}-{args.sparsity:g}"
    if args.mode == "paper":
        name += "-paper"
    if args.prior is not None:
        name += f"-a{args.prior:g}"
    if args.temperature is not None:
        name += f"-T{args.temperature:g}"
    return f"{name}-seed{args.seed}"


def complete(args, explicit):
    """Fill in the defaults that depend on other flags; refuse what does not fit."""
    usual = presets.of(args.dataset)
    if args.method == "gradr":
        flags.set_unused(args, explicit, dict(temperature=None), "--method gradr")
    if args.mode == "paper":
        flags.set_unused(args, explicit, dict(schedule=usual["schedule"]),
                         "--mode paper")
    if args.method == "gradr" and args.sparsity < 0.5:
        raise ValueError(f"--sparsity is {args.sparsity:g}, expected at least 0.5 with "
                         f"--method gradr, whose prior has no centre for less. Raise "
                         f"it, or take --method deepr")
    if args.method == "gradr" and args.mode == "paper" and args.prior is None:
        args.prior = PAPER_PRIOR
    if args.lr is None:  # by SGD
        args.lr = usual["lr"]
    if args.weight_decay is None:
        args.weight_decay = usual["weight_decay"]


def parse_args(argv):
    parser = flags.make_parser(__doc__)
    add = parser.add_argument_group("rewiring").add_argument
    add("--method", choices=("gradr", "deepr"), help="Grad R or Deep R")
    add("--mode", choices=("matched", "paper"), help="matched: exactly --sparsity in "
        "the end; paper: the connectivity of the structure epochs is the result, their "
        "lr is constant, and gradr's prior is 1e-3")
    add("--sparsity", type=flags.number(0, 1, above=True), help="share of the prunable "
        "weights that is dead in the end; gradr: also the target of the prior, at "
        "least 0.5")
    add("--prior", type=flags.number(0), metavar="A", help="pull on the strengths, 0: "
        "none. gradr: the scale a of the prior (default: tuned to --sparsity); deepr: "
        "L1 (default: 1e-5)")
    add("--temperature", type=flags.number(0), metavar="T", help="of deepr's noise, "
        "sqrt(2 lr T) a step, 0: none (default: such that it is 1e-5 lr at the start)")
    add("--interval", type=flags.whole(1), metavar="STEPS",
        help="steps between two log lines")
    add("--epochs-prune", type=flags.whole(1), metavar="N",
        help="structure epochs: with rewiring")
    add("--epochs-finetune", type=flags.whole(0), metavar="N",
        help="epochs with the mask fixed")
    return flags.parse(parser, argv, "gradr", complete, run_name)


def set_up(args):
    """Return the run. What cannot work is exit code 2, before anything is written."""
    with flags.exits(2, ValueError, OSError, no_memory=flags.SMALLER):
        device = setup.start(args)
        images = setup.load(args, device)
        net = setup.build(args, images)
        masks = Masks(net)
        wires = Connections(masks, args.optimizer, args.momentum, args.weight_decay)
        # BN and biases have a plain optimiser of their own
        others = [parameter for name, parameter in net.named_parameters()
                  if name not in masks.weights]
        # in a group, since torch refuses an empty list
        optimizer = training.optimizer(args, [dict(params=others)])
        stages = setup.stages(args, images, prune=args.epochs_prune,
                              finetune=args.epochs_finetune)
        masks.check_sparsity(args.sparsity)
        if args.prior is None and args.method == "gradr":
            args.prior = default_prior(args, stages.steps("prune"))
        elif args.prior is None:
            args.prior = DEEP_R
        if args.method == "deepr" and args.temperature is None:
            args.temperature = DEEP_R ** 2 * args.lr / 2  # sqrt(2 lr T) = 1e-5 lr
        return Run(args, device, images, stages, net=net, optimizer=optimizer,
                   masks=masks, wires=wires)


def plan_of(args, keep, steps):
    """Say in a line what will run. keep: K. steps: of the structure epochs."""
    if args.method == "deepr":
        return (f"Deep R, K = {keep:,}, L1 {args.prior:.4g}, "
                f"T {args.temperature:.4g}")
    c = centre(args.sparsity, args.prior)
    schedule = "constant" if args.mode == "paper" else args.schedule
    pull = args.prior * reach(args.optimizer, schedule, args.lr, steps)
    where = "within" if pull >= -c else "out of"
    return (f"Grad R, prior a = {args.prior:.4g} pulls by {pull:.3g} in all; its "
            f"centre, {c:.3g}, is {where} reach")


def ending(found, keep):
    """Say in a line how many connections the structure epochs have found, where `keep`
    are asked for."""
    text = f"  the structure epochs ended with {found:,} connections"
    if found != keep:
        text += f", {keep:,} are asked for"
    if abs(found - keep) > 0.2 * keep:
        text += ": more than 20 % off. --prior moves it"
    return text


def main(argv=None):
    args = parse_args(argv)
    if (summary := finished(args)) is not None:
        return summary
    run = set_up(args)
    masks, wires = run.masks, run.parts["wires"]
    keep, last = masks.keep_at(args.sparsity), run.stages.steps("prune")
    target, expected = args.sparsity, keep
    if args.method == "gradr":  # an outcome, until the mask is fixed
        target, expected = None, None

    with run.under_way(plan_of(args, keep, last)):
        if run.iteration == 0:
            if args.method == "deepr":
                start_with(keep, masks, wires, run.generator())
            run.notes["first_sparsity"] = 1 - wires.density

        for epoch in run.epochs("prune"):
            for x, y in run.batches(epoch):
                lr = args.lr  # constant, as in Grad R's code
                if args.mode == "matched":
                    # INTERPRETATION: a cosine a stage, as in all scripts
                    lr = training.lr_at(args.schedule, lr, *run.position)
                training.step(run, x, y, lr)  # dL/dw, and a step of BN and biases
                g = wires.gradients()
                if args.method == "gradr":
                    grad_r_step(wires, g, lr, args.prior, args.sparsity)
                else:
                    deep_r_step(wires, g, lr, args.prior, args.temperature, keep)
                wires.write()  # w = sign * max(theta, 0)

                if run.iteration % args.interval == 0 or run.iteration == last:
                    change = follow(masks, wires)
                    run.log_update(target, change, expected, may_be_empty=True)

            if run.iteration == last:  # the K largest theta stay
                found = masks.n_alive
                if args.mode == "paper":
                    keep = found
                run.say(ending(found, keep))
                if keep < len(masks.sizes):
                    raise TooFew(f"the structure epochs end with {found} connections, "
                                 f"expected at least one for each of the "
                                 f"{len(masks.sizes)} layers. Start again with a lower "
                                 f"--prior")
                change = fix_mask(keep, masks, wires, run.generator())
                if change is not None:
                    final = args.sparsity if args.mode == "matched" else None
                    run.log_update(final, change, keep)
            run.end_epoch(1 - wires.density, masks_hold=run.iteration == last)

        for epoch in run.epochs("finetune"):
            for x, y in run.batches(epoch):
                lr = training.lr_at(args.schedule, args.lr, *run.position)
                training.step(run, x, y, lr)
                fixed_mask_step(wires, wires.gradients(), lr)
                wires.write()
            run.end_epoch()

        return run.finish("prune_gradr", args.method,
                          pruned_accuracy=run.last_accuracy("prune"),
                          survived_by_regeneration=masks.share_regenerated)


if __name__ == "__main__":
    main()
