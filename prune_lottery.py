"""Lottery tickets: iterative magnitude pruning (IMP), Early-Bird (EB), Early-Time (ET).

Paper: "Exploring Lottery Ticket Hypothesis in Spiking Neural Networks", Kim et al.,
ECCV 2022, arXiv 2207.01382, and its code, LTH-SNN. A ticket is a mask on the weights
that the network had early on. Trained from there, it should do as well as the dense
network.

IMP  k times: train, cut the same share of what is left by magnitude, rewind the others
     to their values of an early epoch. Then train the ticket.
EB   Train dense until the mask that magnitudes give no longer changes. Then train this
     ticket from the initial weights.
ET   Search by either of them with the first T' of the T time steps. Then train the
     ticket with all of them.

    python prune_lottery.py                          # IMP on embedded data
    python prune_lottery.py --method eb              # Early-Bird, at the same budget
    python prune_lottery.py --method et --search eb  # Early-Time, with EB or IMP
    python prune_lottery.py --dataset cifar100       # the paper's 300 + 8 * 280 epochs
    python prune_lottery.py --dataset cifar100 --budget matched  # 500 epochs, as others

Not copied from the published code:
- biases and BN parameters share memory with the stored weights, so that only the first
  rewind is one; BN statistics are never rewound;
- the rewind point comes one epoch late;
- a weight counts as alive by |w| >= 1e-6;
- EB's final training steps the scheduler twice an epoch, so that lr is 0 half-way;
- T' is measured in train mode, and a loss over T' steps is divided by T;
- the last evaluation comes before the last epochs.

Sparsity is that of the prunable weights: 89.99 % of them are the 89.91 % of the paper's
tables, which count all parameters.
"""
from pathlib import Path

import harness  # first: what is not installed is then one line

import torch
import torch.nn.functional as F

import modelfile
import models
import training
from harness import flags, presets, setup
from harness.runfolder import Run, finished
from masks import Masks, Update, count, seeded, select
from neurons import widest

FULL_EPOCHS = 300  # of the first training, in a full budget
FULL_ROUNDS = {0.90: 8, 0.95: 11, 0.98: 14}  # {sparsity: k} of the paper
REWIND = 15  # IMP rewinds to 1/15 of its first training: epoch 20 of 300
QUEUE = 5  # masks that EB compares
SEARCH_LR = 2  # EB searches at twice the learning rate
TIME_AFTER, TIME_IMAGES = 2, 1000  # ET measures after this epoch, on so many images

# ---- tickets -------------------------------------------------------------------------


def largest_alive(masks, keep, generator):
    """Return the mask of the `keep` largest |w| over all layers, [M] bool. Only alive
    weights are ranked. The masks of the network stay as they are."""
    return select(masks.flat, keep, [masks.magnitudes()], generator)


def snapshot(net):
    """Return a copy of all parameters and buffers, on the CPU. Later training does not
    reach it."""
    return {name: tensor.detach().to("cpu", copy=True)
            for name, tensor in net.state_dict().items()}


def take_ticket(run, ticket, target):
    """Make `ticket`, [M] bool, the mask, and rewind: W <- theta_r * m, all else
    <- theta_r. target: the sparsity, for the log."""
    masks, optimizer = run.masks, run.optimizer
    pruned = masks.flat & ~ticket
    masks.flat.copy_(ticket)
    rescued = masks.rescue_empty_layers()  # by the magnitudes of before the rewind
    # INTERPRETATION: the whole state is rewound, BN statistics included
    state = modelfile.complete_state(run.net, run.notes["rewind"])
    run.net.load_state_dict(state)
    optimizer.state.clear()  # a fresh optimiser: no momentum
    masks.apply(optimizer)
    nothing = torch.zeros_like(pruned)
    change = Update(pruned, masks.sparsity, nothing, rescued)
    run.log_update(target, change, keep=count(ticket))


# ---- iterative magnitude pruning -----------------------------------------------------


def alive_by_round(total, sparsity, rounds):
    """Return how many weights are alive in each of the k + 1 trainings, a list: from
    all to exactly M - round(sparsity * M)."""
    rate = 1 - (1 - sparsity) ** (1 / rounds)  # of what is left, each time
    alive = [total]
    for _ in range(rounds - 1):
        alive.append(left_after(alive[-1], rate))
    return alive + [total - round(sparsity * total)]


def left_after(alive, rate):
    """Return how many of `alive` weights a cut leaves: int(alive * rate) go."""
    # 1e-9: 8 * 0.25 may come out as 1.9999999999999998
    return alive - int(alive * (rate + 1e-9))


def rewind_point(stages):
    """Return the iteration whose weights IMP rewinds to.

    INTERPRETATION: after exactly 20 epochs of 300, and after as large a share of any
    other first training.
    """
    return max(1, round(stages.steps("round0") / REWIND))


# ---- Early-Bird ----------------------------------------------------------------------


def mask_distance(queue):
    """Return the largest share of entries in which the newest mask differs from one
    before it; None for fewer than 5 masks. queue: list of [M] bool, the newest last."""
    if len(queue) < QUEUE:
        return None
    newest = queue[-1]
    return max(count(newest ^ mask) for mask in queue[:-1]) / len(newest)


def overlap(distance, density):
    """Return the share o of their kept weights that two masks of density D have in
    common.

    They differ in 2 D (1 - o) of all entries. So at 99 % sparsity any two differ in at
    most 2 %.
    """
    return 1 - distance / (2 * density)


def settled(distance, density, epsilon, kind="entries"):
    """Return whether EB stops. kind "entries": d < epsilon, the paper's rule; "kept":
    1 - o < epsilon."""
    if distance is None:
        return False
    if kind == "kept":
        distance = 1 - overlap(distance, density)
    return distance < epsilon


def say_distance(run, queue, density):
    distance = mask_distance(queue)
    if distance is not None:
        shared = overlap(distance, density)
        run.say(f"  after epoch {run.epoch + 1}: masks differ in up to {distance:.4f} "
                f"of the entries, share {shared:.3f} of the kept weights")


# ---- Early-Time ----------------------------------------------------------------------


def divergences(logits):
    """Return KL(softmax z_T || softmax z_t') for t' = 2 ... T - 1, a list, each a mean
    over the images.

    logits: [T, N, K]. z_t': their mean over the first t' steps.
    """
    steps = torch.arange(1, len(logits) + 1, device=logits.device).view(-1, 1, 1)
    log_p = (logits.to(widest(logits.device)).cumsum(0) / steps).log_softmax(2)
    early, last = log_p[1:-1], log_p[-1:]
    kl = F.kl_div(early, last.expand_as(early), reduction="none", log_target=True)
    return kl.sum(2).mean(1).tolist()


def early_time(kl, ratio):
    """Return T': the first t' whose KL over the largest is below `ratio`, else T.

    kl: for t' = 2 ... T - 1. T' is 2 only if a later t' diverges more, or if none
    diverges.
    """
    largest = max(kl)
    for t, value in enumerate(kl, 2):
        if largest <= 0 or value / largest < ratio:
            return t
    return len(kl) + 2


@torch.no_grad()
def measure_time(run):
    """Return T' of the network as it is, from 1000 training images that the seed
    draws."""
    args, net, images = run.args, run.net, run.images
    order = torch.randperm(len(images.x_train),
                           generator=seeded(args.seed, run.iteration))
    chosen = order[:TIME_IMAGES].to(run.device)
    sample = images._replace(x_train=images.x_train[chosen])
    # in train mode the batch would set its statistics, and the running ones
    with models.evaluating(net), training.autocast(args):
        logits = torch.cat([net(x) for x in sample.inputs("train", args.batch_size)], 1)
    kl = divergences(logits)
    found = early_time(kl, args.kl_ratio)
    run.say(f"  T' = {found} of {args.time_steps} steps; KL at t' = 2, ...: "
            + ", ".join(f"{value:.3g}" for value in kl))
    return found


def steps_seen(args, notes, stage, epoch):
    """Return how many time steps an epoch (from 0) trains with: T; T' in a search that
    has measured it."""
    if stage == "finetune" or epoch < TIME_AFTER:
        return args.time_steps
    return notes.get("early_time", args.time_steps)


# ---- the trainings -------------------------------------------------------------------


def train_epoch(run, epoch, lr, rewind_at=None):
    """Train for an epoch. lr: at the start of its stage.

    rewind_at: the iteration whose weights are kept for the rewind.
    """
    # ET. INTERPRETATION: the test set after the epoch sees as many steps
    run.net.time_steps = steps_seen(run.args, run.notes, run.stage, epoch)
    for x, y in run.batches(epoch):
        # INTERPRETATION: one cosine a training, each from the full lr. The loss is a
        # mean over T', not over T
        lr_now = training.lr_at(run.args.schedule, lr, *run.position)
        training.step(run, x, y, lr_now)
        run.masks.apply(run.optimizer)  # w <- w * m, and its momentum
        if run.iteration == rewind_at:
            run.notes["rewind"] = snapshot(run.net)  # theta_r
    if run.args.method == "et" and epoch + 1 == TIME_AFTER:
        run.notes["early_time"] = measure_time(run)


def stages_of(args, images, used=None):
    """Return the Stages of a run. used: the epochs of EB's search; None while it
    searches."""
    if args.search == "imp":
        names = [f"round{j}" for j in range(args.rounds)] + ["finetune"]
        return setup.stages(args, images, **dict(zip(names, imp_epochs(args))))
    finetune = args.epochs_finetune
    if used is None:
        used = args.epochs_prune
    elif args.budget == "matched":  # the sum is fixed: the ticket gets what is left
        finetune += args.epochs_prune - used
    return setup.stages(args, images, search=used, finetune=finetune)


def imp_epochs(args):
    """Return the epochs of IMP's k + 1 trainings, a list."""
    first, last, rounds = args.epochs_prune, args.epochs_finetune, args.rounds
    if args.budget == "full":
        rewound = round(first / REWIND)
        return [first] + [first - rewound] * (rounds - 1) + [last]
    # INTERPRETATION: whole epochs. The last trainings have those that a division leaves
    share, over = divmod(first + last, rounds + 1)
    return [share] * (rounds + 1 - over) + [share + 1] * over


def end_search(run):
    """End EB's search after the epochs that it has used, and plan the ticket's."""
    run.notes["used"] = run.epoch
    run.replan(stages_of(run.args, run.images, used=run.epoch))


# ---- the script ----------------------------------------------------------------------


def run_name(args):
    name = f"{Path(args.dataset).stem}-{args.model}-{args.method}"
    if args.method == "et":
        name += f"-{args.search}"
    name += f"-{args.sparsity:g}"
    if args.search == "imp":
        name += f"-k{args.rounds}"
    if args.distance == "kept":
        name += "-kept"
    return f"{name}-{args.budget}-seed{args.seed}"


def complete(args, explicit):
    """Fill in the defaults that depend on other flags; refuse flags that contradict
    each other."""
    set_unused(args, explicit)
    if args.budget == "full":
        fill_full_budget(args, explicit)
    epochs = args.epochs_prune + args.epochs_finetune
    if args.budget == "matched" and args.rounds >= epochs:
        raise ValueError(
            f"--rounds is {args.rounds}, expected at most {epochs - 1}: an epoch each "
            f"and one before them, of the {epochs} of --epochs-prune and "
            f"--epochs-finetune. Lower it or raise these")
    if args.method == "et" and args.time_steps < 4:
        # with T = 3 there is one KL, the largest, and its ratio is 1
        raise ValueError(
            f"--time-steps is {args.time_steps}, expected at least 4 for --method et, "
            f"which could not choose fewer otherwise. Raise it")


def set_unused(args, explicit):
    """Give the flags that the method does not use their fixed values; raise ValueError
    if one is given."""
    usual = presets.of("default", "lottery")
    search = args.search if args.method == "et" else args.method
    unused = {}
    if args.method != "et":
        unused |= dict(search=search, kl_ratio=usual["kl_ratio"])
    if search == "imp":
        unused |= dict(epsilon=usual["epsilon"], distance=usual["distance"])
    else:
        unused |= dict(rounds=1)  # EB is one cut
    method = f"--method {args.method}"
    if args.method == "et":
        method += f" --search {search}"
    flags.set_unused(args, explicit, unused, method)


def fill_full_budget(args, explicit):
    """Fill in the paper's epochs and rounds where no flag gives them."""
    if "epochs_prune" not in explicit and not args.smoke:
        args.epochs_prune = FULL_EPOCHS
    if "rounds" not in explicit and args.search == "imp" and not args.smoke:
        args.rounds = presets.nearest(FULL_ROUNDS, args.sparsity)
    if "epochs_finetune" not in explicit:
        # IMP's ticket starts at the rewind point, EB's at 0
        rewound = round(args.epochs_prune / REWIND) if args.search == "imp" else 0
        args.epochs_finetune = args.epochs_prune - rewound


def parse_args(argv):
    parser = flags.make_parser(__doc__)
    add = parser.add_argument_group("pruning (lottery tickets)").add_argument
    add("--method", choices=("imp", "eb", "et"),
        help="iterative magnitude pruning, Early-Bird or Early-Time tickets")
    add("--search", choices=("imp", "eb"), help="what et searches by")
    add("--sparsity", type=flags.number(0, 1, above=True), help="share of the prunable "
        "weights that is dead in the end, a fraction above 0 and below 1")
    add("--budget", choices=("matched", "full"), help="epochs: matched to the other "
        "methods', or the paper's, imp: 300 + 280 a round, eb: up to 300, then 300")
    add("--rounds", type=flags.whole(1), metavar="K", help="cuts of imp, each of the "
        "same share of what is left (full: the paper's for the nearest sparsity: 0.9: "
        "8, 0.95: 11, 0.98: 14)")
    add("--epsilon", type=flags.number(0, 1, above=True),
        help="eb stops when its masks differ by less, a fraction")
    add("--distance", choices=("entries", "kept"), help="what eb's masks differ by: a "
        "share of all entries, which is loose at high sparsity, or of those that they "
        "keep")
    add("--kl-ratio", type=flags.number(0, 1, above=True), metavar="LAMBDA",
        help="et searches with the fewest time steps whose KL, over the largest, is "
        "below it")
    add("--epochs-prune", type=flags.whole(1), metavar="N", help="of the first "
        "training (300) in a full budget, of eb's search at most; matched: part of the "
        "epochs that all trainings share")
    add("--epochs-finetune", type=flags.whole(1), metavar="N", help="of the final "
        "training (imp: 280, eb: 300) in a full budget; matched: the other part")
    return flags.parse(parser, argv, "lottery", complete, run_name)


def set_up(args):
    """Return the run. What cannot work is exit code 2, before anything is written."""
    with flags.exits(2, ValueError, OSError, no_memory=flags.SMALLER):
        device = setup.start(args)
        images = setup.load(args, device)
        net = setup.build(args, images)
        masks = Masks(net)
        optimizer = training.optimizer(args, net.parameters())
        masks.check_sparsity(args.sparsity)
        stages = stages_of(args, images)
        search = stages.epochs - stages.by_name["finetune"]
        if args.method == "et" and search <= TIME_AFTER:
            raise ValueError(
                f"--method et would search for {search} epochs, expected more than the "
                f"{TIME_AFTER} after which it measures T'. Raise --epochs-prune")
        run = Run(args, device, images, stages, net=net, optimizer=optimizer,
                  masks=masks)
        if "used" in run.notes:  # a resumed run, whose search is over
            run.replan(stages_of(args, images, run.notes["used"]))
    return run


def plan_of(args, stages):
    """Return what runs, in a line."""
    plan = f"{args.method}, 0 -> {100 * args.sparsity:g} % sparse, "
    if args.search == "imp":
        return plan + (f"{args.rounds} cuts, rewinds to iteration "
                       f"{rewind_point(stages)}")
    return plan + (f"one cut when masks differ by less than {args.epsilon:g}, from the "
                   f"initial weights")


def costs(run):
    """Return what each epoch costs beside a dense one, a list: density * T' / T."""
    found = []
    for epoch, row in enumerate(run.rows):
        time_steps = steps_seen(run.args, run.notes, row["stage"], epoch)
        found.append((1 - row["sparsity"]) * time_steps / run.args.time_steps)
    return found


def say_costs(run, spent):
    final = run.stages.by_name["finetune"]
    search, ticket = spent[:-final], spent[-final:]
    run.say(f"  epochs                  {len(search)} of search + {len(ticket)} = "
            f"{len(spent)}\n"
            f"  each * density * T' / T {sum(search):.1f} of search + "
            f"{sum(ticket):.1f} = {sum(spent):.1f}, in theory: masks save no time")


def main(argv=None):
    args = parse_args(argv)
    if (summary := finished(args)) is not None:
        return summary
    run = set_up(args)
    masks = run.masks

    with run.under_way(plan_of(args, run.stages)):
        # The search. A resumed run has run.updates, the cuts that it has made
        if args.search == "imp":
            # Train, cut the smallest |W| over all layers, rewind; k times
            alive = alive_by_round(masks.total, args.sparsity, args.rounds)
            for cut in range(len(run.updates) + 1, args.rounds + 1):
                for epoch in run.epochs(f"round{cut - 1}"):
                    train_epoch(run, epoch, args.lr, rewind_point(run.stages))
                    run.end_epoch()
                ticket = largest_alive(masks, alive[cut], run.generator())
                target = 1 - (1 - args.sparsity) ** (cut / args.rounds)
                take_ticket(run, ticket, target)
        elif not run.updates:
            # Early-Bird: train dense until mask_e, which is not applied, has settled
            run.notes.setdefault("rewind", snapshot(run.net))  # the initial weights
            keep = masks.keep_at(args.sparsity)
            density = keep / masks.total
            first = largest_alive(masks, keep, run.generator())
            queue = run.notes.setdefault("queue", [first.cpu()])  # the last 5 masks
            for epoch in run.epochs("search"):
                distance = mask_distance(queue)
                if settled(distance, density, args.epsilon, args.distance):
                    break
                train_epoch(run, epoch, SEARCH_LR * args.lr)
                queue.append(largest_alive(masks, keep, run.generator()).cpu())
                del queue[:-QUEUE]
                say_distance(run, queue, density)
                run.end_epoch()
            # INTERPRETATION: where the masks never settle, the last one is the ticket
            end_search(run)
            ticket = run.notes.pop("queue")[-1]
            take_ticket(run, ticket.to(run.device), args.sparsity)

        # The ticket: train what is left, with all T time steps
        for epoch in run.epochs("finetune"):
            train_epoch(run, epoch, args.lr)
            run.end_epoch()

        spent = costs(run)
        say_costs(run, spent)
        return run.finish("prune_lottery", args.method,
                          training_cost=sum(spent) / len(spent))


if __name__ == "__main__":
    main()
