"""Lottery tickets in a spiking network (LTH-SNN): IMP, Early-Bird (EB) and Early-Time (ET) tickets.

Paper: "Exploring Lottery Ticket Hypothesis in Spiking Neural Networks", Kim et al., ECCV 2022,
arXiv 2207.01382. A ticket is a mask on the weights that the network had early on; trained from
there, it should do as well as the dense network.

Iterative magnitude pruning (IMP): train, cut the same share of what is left by magnitude, rewind
the others to their values of an early epoch, train again, k times. EB: train dense until the mask
that magnitudes give no longer changes, then train the ticket from the initial weights. ET: search,
by either, with the first T' of the T time steps; the final ticket is trained with all of them.

    python prune_lottery.py                               # IMP on embedded data, 2 minutes
    python prune_lottery.py --method eb                   # Early-Bird, at the same budget
    python prune_lottery.py --method et --search eb       # Early-Time, with EB or IMP
    python prune_lottery.py --dataset cifar100            # the paper's: 300 + 8 * 280 epochs
    python prune_lottery.py --dataset cifar100 --budget matched   # 500 epochs, as the others

Not copied from the published code: biases and BN parameters that alias the stored weights, so that
only the first rewind is one; BN statistics that are never rewound; a rewind point one epoch late;
"alive" found by |w| >= 1e-6; a second step of the scheduler in each epoch of EB's final training
(lr 0 half-way); T' measured in train mode, and a loss over T' steps divided by T; a last evaluation
that comes before the last epochs. What is printed as sparsity is over the prunable weights: 89.99 %
of them is what the paper's tables, over all parameters, call 89.91 %.
"""
from pathlib import Path

import torch
import torch.nn.functional as F

from harness import flags
import metrics
import training
from masks import Masks, seeded, select
from harness.runfolder import Run, finished

# Matched: the epochs of the criticality paper. Full: LTH-SNN's code, in rounds of about 25 %
PAPER = dict(epochs_prune=200, epochs_finetune=300, rounds=4, budget="full")
SHORT = dict(epochs_prune=6, epochs_finetune=4, rounds=4, budget="matched")
EVENTS = SHORT | dict(epochs_prune=80, epochs_finetune=120)
EB, ET = dict(epsilon=0.02, distance="entries"), dict(kl_ratio=0.6)
SETTINGS = {  # the defaults by data set; "all" holds for each of them
    "all": dict(method="imp", search="imp", sparsity=0.9) | EB | ET,
    "fashion-mini": SHORT | dict(epochs_prune=8), "mnist": SHORT, "fashion-mnist": SHORT,
    "cifar10": PAPER, "cifar100": PAPER, "n-mnist": SHORT, "dvs-gesture": EVENTS,
    "cifar10-dvs": EVENTS, "tiny-imagenet": SHORT | dict(epochs_prune=50, epochs_finetune=100),
    "smoke": dict(epochs_prune=4, epochs_finetune=1, rounds=2),  # upper bounds
}
FULL_EPOCHS, FULL_ROUNDS = 300, {0.90: 8, 0.95: 11, 0.98: 14}
REWIND = 15  # IMP rewinds to the weights after 1/15 of its first training: epoch 20 of 300
QUEUE = 5  # masks that EB compares
SEARCH_LR = 2  # EB searches at twice the learning rate
TIME_AFTER, TIME_IMAGES = 2, 1000  # ET measures after this many epochs, on this many images


# ---- IMP -----------------------------------------------------------------------------------------


def left_after(alive, rate):
    """Return how many of `alive` weights a cut leaves: the integer part of alive * rate goes."""
    return alive - int(alive * (rate + 1e-9))  # 1e-9: 8 * 0.25 may come out as 1.9999999999999998


def alive_by_round(total, sparsity, rounds):
    """Return how many weights are alive in each of the k + 1 trainings, from all to exactly K."""
    rate = 1 - (1 - sparsity) ** (1 / rounds)  # of what is left, each time
    alive = [total]
    for _ in range(rounds - 1):
        alive.append(left_after(alive[-1], rate))
    return alive + [total - round(sparsity * total)]


def snapshot(net):
    """Return a copy of all parameters and buffers on the CPU: later training must not reach it."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in net.state_dict().items()}


# ---- Early-Bird ----------------------------------------------------------------------------------


def mask_distance(queue):
    """Return the largest share of entries in which the newest mask differs from one before it, None
    while there are fewer than 5. queue: list of [M] bool, the newest last."""
    if len(queue) < QUEUE:
        return None
    return max(int((queue[-1] ^ mask).count_nonzero()) for mask in queue[:-1]) / len(queue[-1])


def overlap(distance, density):
    """Return the share o of their kept weights that two masks of density D have in common: they
    differ in 2 D (1 - o) of all entries, so that at 99 % sparsity any two are within 2 %."""
    return 1 - distance / (2 * density)


def settled(distance, density, epsilon, kind="entries"):
    """Return whether EB stops: kind "entries" is the paper's rule, "kept" asks 1 - o < epsilon."""
    return distance is not None and (
        distance if kind == "entries" else 1 - overlap(distance, density)) < epsilon


# ---- Early-Time ----------------------------------------------------------------------------------


def divergences(logits):
    """Return KL(softmax z_T || softmax z_t') for t' = 2 ... T - 1 as a list, averaged over images.

    logits: [T, N, K]. z_t': their mean over the first t' steps.
    """
    steps = torch.arange(1, len(logits) + 1, device=logits.device).view(-1, 1, 1)
    log_p = (logits.double().cumsum(0) / steps).log_softmax(2)
    kl = F.kl_div(log_p[1:-1], log_p[-1:].expand_as(log_p[1:-1]), reduction="none", log_target=True)
    return kl.sum(2).mean(1).tolist()


def early_time(kl, ratio):
    """Return T': the first t' whose KL over the largest is below `ratio`, else T.

    kl: for t' = 2 ... T - 1. t' = 2 wins only if a later one diverges more, or none at all.
    """
    largest = max(kl)
    return next((t for t, value in enumerate(kl, 2) if largest <= 0 or value / largest < ratio),
                len(kl) + 2)


@torch.no_grad()
def measure_time(run, images):
    """Return T' of the network as it is, from 1000 training images that the seed draws."""
    args, net = run.args, run.parts["net"]
    chosen = torch.randperm(len(images.x_train), generator=seeded(args.seed, run.iteration))
    chosen = chosen[:TIME_IMAGES].to(run.device)
    net.eval()  # in train mode the batch would set its own statistics, and the running ones
    with training.autocast(args):
        some = images._replace(x_train=images.x_train[chosen])
        logits = torch.cat([net(x) for x in some.inputs("train", args.batch_size)], 1)
    net.train()
    kl = divergences(logits)
    found = early_time(kl, args.kl_ratio)
    run.say(f"  T' = {found} of {args.time_steps} steps; KL at t' = 2, ...: "
            + ", ".join(f"{value:.3g}" for value in kl))
    return found


# ---- the parts of the loop -----------------------------------------------------------------------


def stages_of(args, images, used=None):
    """Return the Stages of a run. used: epochs that EB has searched for, none while it searches."""
    first, last, rounds = args.epochs_prune, args.epochs_finetune, args.rounds
    if args.search == "eb":
        used = first if used is None else used
        spare = first - used if args.budget == "matched" else 0  # matched: the sum is fixed
        return training.stages(args, images, search=used, finetune=last + spare)
    if args.budget == "full":
        lengths = [first] + [first - round(first / REWIND)] * (rounds - 1) + [last]
    else:  # INTERPRETATION: whole epochs; the last trainings have those that a division leaves over
        share, over = divmod(first + last, rounds + 1)
        lengths = [share + (j > rounds - over) for j in range(rounds + 1)]
    names = [f"round{j}" for j in range(rounds)] + ["finetune"]
    return training.stages(args, images, **dict(zip(names, lengths)))


def set_stages(run, stages):
    """Replace the stages of a run: the length of EB's search is known only when it ends."""
    run.stages = stages
    run.total_steps = run.bar.total = stages.epochs * stages.steps_per_epoch


def take_ticket(run, chosen, target):
    """Make `chosen`, [M] bool, the mask, and rewind: W <- theta_r * m, all else <- theta_r."""
    net, masks, optimizer = (run.parts[name] for name in ("net", "masks", "optimizer"))
    pruned = masks.flat & ~chosen
    masks.flat.copy_(chosen)
    for name in masks.guard():  # by the magnitudes that chose, which the rewind overwrites
        run.say(f"  note: {name} would have lost all weights; its largest one is kept")
    # INTERPRETATION: the whole state is rewound, BN statistics included
    net.load_state_dict(run.notes["rewind"])
    optimizer.state.clear()  # a fresh optimiser: no momentum
    masks.apply(optimizer)
    run.add_update(dict(update=len(run.updates) + 1, iteration=run.iteration, target=target,
                        before=masks.sparsity, **masks.account(pruned, torch.zeros_like(pruned))))


# ---- the script ----------------------------------------------------------------------------------


def run_name(args):
    name = f"{Path(args.dataset).stem}-{args.model}-{args.method}"
    name += f"-{args.search}" * (args.method == "et") + f"-{args.sparsity:g}"
    name += f"-k{args.rounds}" * (args.search == "imp") + "-kept" * (args.distance == "kept")
    return f"{name}-{args.budget}-seed{args.seed}"


def complete(args, explicit):
    """Fill in the defaults that depend on other flags; refuse flags that contradict each other."""
    search = args.search if args.method == "et" else args.method
    unused = {} if args.method == "et" else ET | dict(search=args.method)
    unused |= EB if search == "imp" else dict(rounds=1)  # EB is one cut
    for flag, value in unused.items():
        if explicit.get(flag, value) != value:
            raise ValueError(f"--{flag.replace('_', '-')} is {explicit[flag]}, which --method "
                             f"{args.method}{f' --search {search}' * (args.method == 'et')} does "
                             f"not use. Leave one of them out")
        setattr(args, flag, value)
    if args.budget == "full":
        if "epochs_prune" not in explicit and not args.smoke:
            args.epochs_prune = FULL_EPOCHS
        if "rounds" not in explicit and search == "imp" and not args.smoke:
            args.rounds = FULL_ROUNDS[min(FULL_ROUNDS, key=lambda s: abs(s - args.sparsity))]
        if "epochs_finetune" not in explicit:  # IMP's ticket starts at the rewind point, EB's at 0
            rewound = round(args.epochs_prune / REWIND) if search == "imp" else 0
            args.epochs_finetune = args.epochs_prune - rewound
    epochs = args.epochs_prune + args.epochs_finetune
    if args.budget == "matched" and args.rounds >= epochs:
        raise ValueError(f"--rounds is {args.rounds}, expected at most {epochs - 1}: an epoch each "
                         f"and one before them, of the {epochs} of --epochs-prune and "
                         f"--epochs-finetune. Lower it or raise these")
    if args.method == "et" and args.time_steps < 4:  # of one KL, the largest, the ratio is 1
        raise ValueError(f"--time-steps is {args.time_steps}, expected at least 4 for --method et, "
                         f"which could not choose fewer otherwise. Raise it")


def parse_args(argv):
    parser = flags.make_parser(__doc__)
    add = parser.add_argument_group("pruning (lottery tickets)").add_argument
    add("--method", choices=("imp", "eb", "et"), help="iterative magnitude pruning, Early-Bird or "
        "Early-Time tickets")
    add("--search", choices=("imp", "eb"), help="what et searches by")
    add("--sparsity", type=flags.number(0, 1, above=True), help="share of the prunable weights "
        "that is dead in the end, a fraction above 0 and below 1")
    add("--budget", choices=("matched", "full"), help="epochs: matched to the other methods', or "
        "the paper's, imp: 300 + 280 a round, eb: up to 300, then 300")
    add("--rounds", type=flags.whole(1), metavar="K", help="cuts of imp, each of the same share of "
        "what is left (full: the paper's for the nearest sparsity: 0.9: 8, 0.95: 11, 0.98: 14)")
    add("--epsilon", type=flags.number(0, 1, above=True), help="eb stops when its masks differ by "
        "less, a fraction")
    add("--distance", choices=("entries", "kept"), help="what eb's masks differ by: a share of all "
        "entries, which is loose at high sparsity, or of those that they keep")
    add("--kl-ratio", type=flags.number(0, 1, above=True), metavar="LAMBDA", help="et searches "
        "with the fewest time steps whose KL, over the largest, is below it")
    add("--epochs-prune", type=flags.whole(1), metavar="N", help="of the first training (300) in a "
        "full budget, of eb's search at most; matched: part of the epochs that all trainings share")
    add("--epochs-finetune", type=flags.whole(1), metavar="N", help="of the final training (imp: "
        "280, eb: 300) in a full budget; matched: the other part")
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
        stages, keep = stages_of(args, images), masks.keep_at(args.sparsity)
        masks.check(args.sparsity)
        search = stages.epochs - stages.by_name["finetune"]
        if args.method == "et" and search <= TIME_AFTER:
            raise ValueError(f"--method et would search for {search} epochs, expected more than "
                             f"the {TIME_AFTER} after which it measures T'. Raise --epochs-prune")
        run = Run(args, device, stages, net=net, optimizer=optimizer, masks=masks)
        if "used" in run.notes:  # an Early-Bird was found before the run was stopped
            set_stages(run, stages_of(args, images, run.notes["used"]))

    forward = torch.compile(net) if args.compile else net
    alive = alive_by_round(masks.total, args.sparsity, args.rounds)
    # INTERPRETATION: exactly 20 epochs of 300, and as large a share of any other first training
    rewind_at = max(1, round(stages.steps("round0") / REWIND)) if args.search == "imp" else 0
    with run.under_way():
        run.header(images, net, f"{args.method}, 0 -> {100 * args.sparsity:g} % sparse, " + (
            f"{args.rounds} cuts, rewinds to iteration {rewind_at}" if args.search == "imp" else
            f"one cut when masks differ by less than {args.epsilon:g}, from the initial weights"))
        if run.iteration == 0:
            run.notes["costs"] = []  # of each epoch: density * time steps / T
            if args.init is not None:
                test = training.evaluate(forward, net, images, args)
                run.notes["dense_accuracy"] = test["accuracy"]
            if args.search == "eb":
                run.notes["rewind"] = snapshot(net)  # EB: epoch 0, no late rewinding

        while (epoch := run.epoch) < run.stages.epochs:
            name, within, _ = run.stages.place(epoch)
            ties = seeded(args.seed, run.iteration)
            if run.step > 0:
                pass  # a run goes on within an epoch: what stands before it was done
            elif args.search == "imp" and within == 0 and epoch > 0:
                # IMP: the smallest |W| over all layers go, as the round that ends has trained them;
                # then the rewind. Only the alive are ranked, and the last cut leaves exactly K
                done = len(run.updates) + 1
                take_ticket(run, select(masks.flat, alive[done], [masks.magnitudes()], ties),
                            1 - (1 - args.sparsity) ** (done / args.rounds))
                run.verify(alive[done])
            elif args.search == "eb" and "used" not in run.notes:
                # EB: mask_e of the dense weights as they are, before epoch e; it is not applied
                queue = run.notes.setdefault("queue", [])
                queue.append(select(masks.flat, keep, [masks.magnitudes()], ties).cpu())
                del queue[:-QUEUE]
                distance, density = mask_distance(queue), keep / masks.total
                if distance is not None:
                    run.say(f"  after epoch {epoch}: masks differ in up to {distance:.4f} of the "
                            f"entries, share {overlap(distance, density):.3f} of the kept weights")
                # INTERPRETATION: where the masks never settle, the last one is the ticket
                if epoch == args.epochs_prune or settled(distance, density, args.epsilon,
                                                         args.distance):
                    run.notes["used"] = epoch
                    set_stages(run, stages_of(args, images, epoch))
                    take_ticket(run, run.notes.pop("queue")[-1].to(device), args.sparsity)
                    run.verify(keep)
                    name = "finetune"

            # ET: the search sees T' steps once they are known, the final ticket all T.
            # INTERPRETATION: so does the test set after each epoch
            net.time_steps = (args.time_steps if name == "finetune"
                              else run.notes.get("early_time", args.time_steps))
            lr = args.lr * (SEARCH_LR if name == "search" else 1)
            for x, y in run.track(images, epoch):
                with training.autocast(args):
                    logits = forward(x)  # [T', N, K]
                loss = training.loss_over_time(logits, y, args.loss)  # the mean over T', not T
                optimizer.zero_grad()
                loss.backward()
                # INTERPRETATION: one cosine a training, each from the full lr to 0
                training.set_lr(optimizer,
                                training.cosine(lr, *run.stages.position(run.iteration)))
                optimizer.step()
                masks.apply(optimizer)  # w <- w * m, and its momentum
                run.meter.add(loss, logits, y, run.iteration)
                if run.iteration == rewind_at:
                    run.notes["rewind"] = snapshot(net)  # theta_r

            test = training.evaluate(forward, net, images, args)
            run.notes["costs"].append((1 - masks.sparsity) * net.time_steps / args.time_steps)
            if args.method == "et" and epoch + 1 == TIME_AFTER:
                run.notes["early_time"] = measure_time(run, images)
            run.end_epoch(optimizer.param_groups[0]["lr"], test, masks.sparsity)

        # What came of it
        with training.autocast(args):
            counts = metrics.count(net, images.inputs("test", args.batch_size), masks.alive)
        costs, final = run.notes["costs"], run.stages.by_name["finetune"]
        run.say(f"  epochs                  {len(costs) - final} of search + {final} = "
                f"{len(costs)}\n  each * density * T' / T {sum(costs[:-final]):.1f} of search + "
                f"{sum(costs[-final:]):.1f} = {sum(costs):.1f}, in theory: masks save no time")
        return run.finish(net, masks.alive, counts, script="prune_lottery", method=args.method,
                          macs_dense=counts["macs"], training_cost=sum(costs) / len(costs),
                          dense_accuracy=run.notes.get("dense_accuracy"))


if __name__ == "__main__":
    main()
