"""Rewiring while training: Grad R (gradient rewiring) and Deep R.

Grad R: "Pruning of Deep Spiking Neural Networks through Gradient Rewiring", arXiv 2105.04916.
Deep R: "Deep Rewiring: Training very sparse deep networks", arXiv 1711.05136.
A weight is w = sign * max(theta, 0). The sign is that of the start, the strength theta is learned,
and theta <= 0 is a dormant connection. Grad R moves all strengths, dormant ones too, by the dense
gradient and a Laplacian prior: connectivity is an outcome, steered by the prior's scale. Deep R
keeps exactly K connections: those whose theta falls below 0 go, and as many dormant ones, drawn at
random, come. Then Grad R is trimmed to the K largest theta, and both train on with the mask fixed.

    python prune_gradr.py                                # Grad R, the whole job on embedded data
    python prune_gradr.py --method deepr                 # Deep R; both also with --optimizer sgd
    python prune_gradr.py --dataset mnist                # the paper's settings; also: cifar10

To find --prior for another network, bisect with --epochs-finetune 0 and another seed: a run says
how many connections its structure epochs ended with. Other than in Grad R's code a weight that is 0
at the start can wake up, and N epochs are N, not N + 1; and its Deep R had no noise, set new
connections back to 0 before they saw a gradient, and counted them by |w|. Kept: the target of the
prior, --sparsity, moves nothing while the prior's centre is out of reach; a run tells.
"""
import math
from pathlib import Path

import numpy as np
import torch

from harness import flags
import metrics
import training
from masks import Masks, seeded, select
from harness.runfolder import Run, finished

# Grad R's own. INTERPRETATION: shifts by 0.15 of the side are crops by 4 pixels, and images are not
# scaled (0.85 to 1.11 there); elsewhere network and epochs are those of all methods
GRADR = dict(mode="paper", sparsity=0.95, time_steps=8, loss="mse", epochs_finetune=0, lr=None)
LONG = dict(epochs_prune=200, epochs_finetune=300, interval=2000, lr=None)
SHORT = dict(epochs_prune=6, epochs_finetune=4, interval=90, lr=None)
SETTINGS = {  # the defaults by data set; "all" holds for each of them
    "all": dict(method="gradr", mode="matched", sparsity=0.9, optimizer="adam", prior=None,
                temperature=None, weight_decay=None),
    "mnist": GRADR | dict(model="gradr-linear", epochs_prune=512, interval=2000, crop=4, rotate=30),
    "cifar10": GRADR | dict(model="gradr-conv", epochs_prune=2048, interval=20_000, batch_size=16),
    "fashion-mini": SHORT | dict(epochs_prune=8, interval=25), "fashion-mnist": SHORT,
    "cifar100": LONG, "n-mnist": SHORT,
    "tiny-imagenet": LONG | dict(epochs_prune=50, epochs_finetune=100, interval=1000),
    **dict.fromkeys(("dvs-gesture", "cifar10-dvs"), LONG | dict(interval=300)),
    "smoke": dict(epochs_prune=1, epochs_finetune=1, interval=4),  # upper bounds
}
PAPER_PRIOR = 1e-3  # a, with which the target p = 0.95 moves nothing: see `centre`
# INTERPRETATION: elsewhere 1e-3, as Grad R's MNIST script has; its README says 1e-4
ADAM_LR = {"cifar10": 1e-4, "cifar100": 1e-4, "tiny-imagenet": 1e-4}
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam, Grad R's code
ADAM_START = 27  # sum over t of 0.9^t / (1 - 0.9^t): what its bias correction adds, in steps

# {share of the weights that is active after the structure epochs: scale a of Grad R's prior}, as
# measured on fashion-mini with `small`, 752 steps, seed 3
PRIOR = {"adam": {0.0214: 0.8, 0.0938: 0.4, 0.2785: 0.2, 0.5110: 0.1},
         "sgd": {0.1019: 0.006, 0.2111: 0.003, 0.5250: 0.001}}
DEEP_R = 1e-5  # Bellec's script: L1 and noise of a step are both 1e-5 times the learning rate
REVIVED = 1e-12  # and the strength of a connection that was just activated


def centre(target, prior):
    """Return the centre c of the Laplacian prior, p(theta) ~ exp(-a |theta - c|), under which a
    share `target` >= 0.5 of theta lies below 0: ln(2 (1 - target)) / a, never above 0."""
    return math.log(2 * (1 - target)) / prior if prior > 0 else -math.inf


class Connections:
    """Sign, strength and optimiser moments of the prunable weights, [M] each, in masks' order.
    active: [M] bool; Grad R: theta > 0; Deep R: the set of K, in which theta may be 0."""

    def __init__(self, masks):
        self.weights, self.sizes = list(masks.weights.values()), masks.sizes
        w = torch.cat([weight.detach().reshape(-1) for weight in self.weights])
        self.sign = torch.where(w < 0, -1.0, 1.0)  # never 0, which would be dead for ever
        self.theta = w.abs()
        self.active = self.theta > 0
        self.first, self.second = torch.zeros_like(w), torch.zeros_like(w)
        self.steps = 0

    def gradients(self, decay):
        """Return dL/dw, dense, [M]. Weight decay acts on w, and so not on dormant strengths."""
        return torch.cat([(w.grad + decay * w.detach()).reshape(-1) for w in self.weights])

    @torch.no_grad()
    def write(self):
        """Set the weights of the network: w = sign * max(theta, 0)."""
        w = self.sign * self.theta.clamp(min=0) * self.active
        for weight, part in zip(self.weights, w.split(self.sizes)):
            weight.copy_(part.view(weight.shape))

    def fix(self, alive):
        """Let the weights of `alive`, [M] bool, be active, at theta >= 0; the others are dead."""
        self.active = alive.clone()
        self.theta = self.theta.clamp(min=0) * alive
        self.first, self.second = self.first * alive, self.second * alive
        self.write()

    def state_dict(self):
        return {"steps": self.steps} | {name: getattr(self, name).cpu() for name in (
            "sign", "theta", "active", "first", "second")}

    def load_state_dict(self, state):
        self.steps = state["steps"]
        for name in state.keys() - {"steps"}:
            setattr(self, name, state[name].to(self.theta.device, copy=True))


# ---- one step ------------------------------------------------------------------------------------


def optimizer_move(wires, g, lr, args):
    """Return what the optimiser takes off w, [M], and the rate at which Grad R's prior pulls.
    INTERPRETATION of SGD: with momentum, as all methods have; 0 is the bare formula."""
    if args.optimizer == "sgd":
        wires.first.mul_(args.momentum).add_(g)
        return lr * wires.first, lr
    wires.steps += 1
    b1, b2 = BETAS
    wires.first.lerp_(g, 1 - b1)  # u <- b1 u + (1 - b1) g
    wires.second.mul_(b2).addcmul_(g, g, value=1 - b2)  # v <- b2 v + (1 - b2) g^2
    rate = lr / (1 - b1 ** wires.steps)
    denominator = wires.second.sqrt() / math.sqrt(1 - b2 ** wires.steps) + EPSILON
    return rate * wires.first / denominator, rate


def grad_r_step(wires, g, lr, args):
    """One step of Grad R, which moves all strengths, dormant ones too."""
    move, rate = optimizer_move(wires, g, lr, args)
    # the prior is outside Adam's normalisation, but inside its bias correction
    pull = args.prior * (wires.theta - centre(args.sparsity, args.prior)).sign()
    z = wires.sign * wires.theta - move - rate * pull * wires.sign
    wires.theta = wires.sign * z
    wires.active = wires.theta > 0


def draw(candidates, count):
    """Choose `count` of the candidates uniformly at random; return [M] bool. count: a tensor, so
    that the host waits for nothing: the first ones of a random order are taken."""
    order = torch.randperm(len(candidates), device=candidates.device)
    shuffled = candidates[order]
    chosen = torch.empty_like(candidates)
    chosen[order] = shuffled & (shuffled.cumsum(0) <= count)
    return chosen


def deep_r_step(wires, g, lr, args):
    """One step of Deep R, on the active connections; their number stays the same. INTERPRETATION:
    in this order, which Bellec's script leaves open; and one K over all layers, as in the paper,
    where the script has one a matrix. The sign of a new connection is that of the start."""
    move, _ = optimizer_move(wires, g * wires.active, lr, args)
    theta = wires.theta - wires.sign * move                                  # gradient
    theta -= lr * args.prior                                                 # L1
    theta += math.sqrt(2 * lr * args.temperature) * torch.randn_like(theta)  # noise
    stays = wires.active & ~(theta < 0)                                      # prune
    # rewire: any dormant one, those that were just pruned among them, until K are active again
    born = draw(~stays, (wires.active & ~stays).count_nonzero())
    wires.theta = torch.where(born, REVIVED, torch.where(stays, theta, 0.0))
    wires.active = stays | born  # the set after the rewiring, so that the next step moves the new
    wires.first, wires.second = wires.first * stays, wires.second * stays  # the new have no past


def fixed_mask_step(wires, g, lr, args):
    """One step with the mask fixed and theta >= 0. INTERPRETATION: without prior, L1 and noise,
    whose work, to choose connections, is done."""
    move, _ = optimizer_move(wires, g * wires.active, lr, args)
    wires.theta = (wires.theta - wires.sign * move).clamp(min=0) * wires.active


# ---- the script ----------------------------------------------------------------------------------


def sum_of_rates(optimizer, lr, steps, mode="matched"):
    """Return the sum of the rates over a stage: how far a prior of scale 1 moves a strength."""
    return lr * ((steps + 1) / (2 if mode == "matched" else 1) + ADAM_START * (optimizer == "adam"))


def default_prior(args, steps):
    """Return the scale a that should end at 1 - sparsity: from PRIOR, by log density.
    INTERPRETATION: where the steps or the lr are others, the prior moves as far as there."""
    optimizer, tuned_lr = args.optimizer, dict(adam=1e-3, sgd=0.1)[args.optimizer]
    densities, scales = np.log(sorted(PRIOR[optimizer].items())).T
    a = math.exp(np.interp(math.log(1 - args.sparsity), densities, scales))
    return a * sum_of_rates(optimizer, tuned_lr, 752) / sum_of_rates(optimizer, args.lr, steps)


def log_update(run, masks, before, target):
    """Log what came and went since the masks were `before`, [M] bool. target: a sparsity, or None
    where Grad R is on its way: its connectivity is an outcome."""
    both = int((before & masks.flat).count_nonzero())
    run.add_update(dict(update=len(run.updates) + 1, iteration=run.iteration, target=target,
                        before=1 - both / masks.total,
                        **masks.account(before & ~masks.flat, masks.flat & ~before)))


def fix_mask(run, masks, wires, keep):
    """End the structure epochs: exactly the `keep` largest strengths are alive from now on, the
    dormant ones nearest to 0 among them if too few are active. Deep R's K stay as they are."""
    before, found = masks.flat.clone(), masks.n_alive
    run.say(f"  the structure epochs ended with {found:,} connections" + (
        f", {keep:,} are asked for" * (keep != found)
        + ": more than 20 % off. --prior moves it" * (abs(found - keep) > 0.2 * keep)))
    eligible = before if run.args.method == "deepr" else torch.ones_like(before)
    masks.flat.copy_(select(eligible, keep, [wires.theta], seeded(run.args.seed, run.iteration)))
    for name in masks.guard(wires.theta):
        run.say(f"  note: {name} would have lost all weights; its largest one is kept")
    wires.fix(masks.flat)
    if not torch.equal(before, masks.flat):
        log_update(run, masks, before, run.args.sparsity if run.args.mode == "matched" else None)
    run.verify(keep)


def run_name(args):
    name = f"{Path(args.dataset).stem}-{args.model}-{args.method}-{args.sparsity:g}"
    name += "-sgd" * (args.optimizer == "sgd") + "-paper" * (args.mode == "paper")
    for letter, value in (("a", args.prior), ("T", args.temperature)):
        name += "" if value is None else f"-{letter}{value:g}"
    return f"{name}-seed{args.seed}"


def complete(args, _):
    """Fill in the defaults that depend on other flags; refuse what does not fit together."""
    adam, gradr = args.optimizer == "adam", args.method == "gradr"
    for flag, unused, user in (("temperature", None, gradr and "method gradr"), (
            "momentum", flags.COMMON["momentum"], adam and "optimizer adam")):
        if user and getattr(args, flag) != unused:
            raise ValueError(f"--{flag} is {getattr(args, flag):g}, which --{user} does not use. "
                             f"Leave one of them out")
    if gradr and args.sparsity < 0.5:
        raise ValueError(f"--sparsity is {args.sparsity:g}, expected at least 0.5 with --method "
                         f"gradr, whose prior has no centre for less. Raise it, or take deepr")
    if (args.mode, args.method, args.prior) == ("paper", "gradr", None):
        args.prior = PAPER_PRIOR
    if args.weight_decay is None:
        args.weight_decay = 0.0 if adam else flags.COMMON["weight_decay"]
    if args.lr is None:
        args.lr = (ADAM_LR.get(args.dataset, 1e-3) if adam else
                   flags.DATASETS.get(args.dataset, flags.SMALL)["lr"])


def parse_args(argv):
    parser = flags.make_parser(__doc__)
    add = parser.add_argument_group("rewiring").add_argument
    add("--method", choices=("gradr", "deepr"), help="Grad R or Deep R")
    add("--mode", choices=("matched", "paper"), help="paper: constant lr in the structure epochs, "
        "their connectivity is the result, gradr's prior is 1e-3; matched: exactly --sparsity")
    add("--sparsity", type=flags.number(0, 1, above=True), help="share of the prunable weights "
        "that is dead in the end; gradr: also the target of the prior, at least 0.5")
    add("--optimizer", choices=("adam", "sgd"), help="adam: lr 1e-3 (cifar*, tiny-imagenet: 1e-4), "
        "no weight decay; sgd: with the defaults of prune_unstructured.py")
    add("--prior", type=flags.number(0), metavar="A", help="pull on the strengths, 0: none. gradr: "
        "the scale a of the prior (default: tuned to --sparsity); deepr: L1 (default: 1e-5)")
    add("--temperature", type=flags.number(0), metavar="T", help="of deepr's noise, sqrt(2 lr T) a "
        "step, 0: none (default: such that it is 1e-5 lr at the start)")
    add("--interval", type=flags.whole(1), metavar="STEPS", help="steps between two log lines")
    add("--epochs-prune", type=flags.whole(1), metavar="N", help="structure epochs: with rewiring")
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
        masks = Masks(net)
        wires = Connections(masks)
        # BN and biases have a plain optimiser of their own
        others = [p for name, p in net.named_parameters() if name not in masks.weights]
        optimizer = training.optimizer(args, [dict(params=others)])  # an empty list is a mistake
        stages = training.stages(args, images, prune=args.epochs_prune,
                                 finetune=args.epochs_finetune)
        keep, last = masks.keep_at(args.sparsity), stages.steps("prune")
        masks.check(args.sparsity)
        if args.prior is None:
            args.prior = default_prior(args, last) if args.method == "gradr" else DEEP_R
        if args.method == "deepr" and args.temperature is None:
            args.temperature = DEEP_R ** 2 * args.lr / 2  # sqrt(2 lr T) = 1e-5 lr
        run = Run(args, device, stages, net=net, optimizer=optimizer, masks=masks, wires=wires)

    plan = f"Deep R, K = {keep:,}, L1 {args.prior:.4g}, T {args.temperature or 0:.4g}"
    if args.method == "gradr":
        c = centre(args.sparsity, args.prior)
        pull = args.prior * sum_of_rates(args.optimizer, args.lr, last, args.mode)
        plan = (f"Grad R, prior a = {args.prior:.4g} pulls by {pull:.3g} in all; its centre, "
                f"{c:.3g}, is {'within' if pull >= -c else 'out of'} reach")
    forward = torch.compile(net) if args.compile else net
    with run.under_way():
        run.header(images, net, plan)
        if run.iteration == 0:
            if args.init is not None:
                run.notes["dense_accuracy"] = training.evaluate(
                    forward, net, images, args)["accuracy"]
            if args.method == "deepr":  # K connections from the start, drawn at random
                masks.flat.copy_(select(masks.flat, keep, [], seeded(args.seed, 0)))
                masks.guard()
                wires.fix(masks.flat)
            run.notes["first_density"] = int(wires.active.count_nonzero()) / masks.total

        structure_step = grad_r_step if args.method == "gradr" else deep_r_step
        for epoch in range(run.epoch, stages.epochs):
            rewires = stages.place(epoch)[0] == "prune"
            step = structure_step if rewires else fixed_mask_step
            for x, y in run.track(images, epoch):
                with training.autocast(args):
                    logits = forward(x)  # [T, N, K]
                loss = training.loss_over_time(logits, y, args.loss)
                net.zero_grad()
                loss.backward()
                # INTERPRETATION: a cosine a stage, as all methods have; Grad R's code has none
                lr = args.lr if rewires and args.mode == "paper" else training.cosine(
                    args.lr, *stages.position(run.iteration))
                training.set_lr(optimizer, lr)
                optimizer.step()
                step(wires, wires.gradients(args.weight_decay), lr, args)
                wires.write()
                run.meter.add(loss, logits, y, run.iteration)

                if rewires and (run.iteration % args.interval == 0 or run.iteration == last):
                    run.check()
                    before = masks.flat.clone()
                    masks.flat.copy_(wires.active)
                    log_update(run, masks, before,
                               None if args.method == "gradr" else args.sparsity)
                    run.verify(None if args.method == "gradr" else keep, may_be_empty=True)
                if run.iteration == last:
                    fix_mask(run, masks, wires, keep if args.mode == "matched" else masks.n_alive)
            run.end_epoch(optimizer.param_groups[0]["lr"],
                          training.evaluate(forward, net, images, args),
                          1 - int(wires.active.count_nonzero()) / masks.total,
                          masks_hold=not rewires)

        # What came of it
        with training.autocast(args):
            counts = metrics.count(net, images.inputs("test", args.batch_size), masks.alive)
        densities = [run.notes["first_density"], *(1 - row["sparsity"] for row in run.rows[:-1])]
        return run.finish(
            net, masks.alive, counts, script="prune_gradr", method=args.method,
            macs_dense=counts["macs"], dense_accuracy=run.notes.get("dense_accuracy"),
            pruned_accuracy=run.rows[args.epochs_prune - 1]["test_accuracy"],
            training_cost=sum(densities) / len(densities),
            survived_by_regeneration=masks.share_regenerated)


if __name__ == "__main__":
    main()
