"""SCA: channels whose neurons stay near rest are cut, and others grow back, while the
network trains.

Paper: "Towards Efficient Deep Spiking Neural Networks Construction with Spiking
Activity based Pruning", Li et al., ICML 2024, arXiv 2406.01072. There is one training
from fresh weights. At each update the channels with the smallest activity are cut, and
of all dead channels those grow back whose scale gamma of batch normalisation has the
largest gradient: they would lower the loss most. In the end what is dead is removed
physically, and the small network is fine-tuned.

    python prune_sca.py                              # the whole job on embedded data
    python prune_sca.py --prune-ratio 0.7            # 70 % of the channels go
    python prune_sca.py --target-macs 0.7            # 70 % of the MACs go
    python prune_sca.py --regen 0                    # by activity alone
    python prune_sca.py --potential pre              # activity before the reset
    torchrun --nproc-per-node=2 prune_sca.py         # two processes, a GPU each

At update q of n, with C channels in all, p the share that is gone in the end and r the
regeneration rate:

    p_q = p (1 - (1 - q/n)^3)                                    the ramp
    n_final = round(p_q C)     n_temp = round((p_q + r (1 - p_q)) C)
    1  the C - n_temp live channels with the largest activity a_c stay
    2  of all dead channels, the n_temp - n_final with the largest |dL/dgamma| return
    3  a layer without a live channel keeps its largest |gamma|

A dead channel computes with gamma = beta = 0: its spikes are exactly 0. Its filter, its
gamma and its beta are stored and do not move, and it returns with them. Channels that
can die are all of a VGG, and the inner ones of ResNet-19's blocks.

A fair rival, no replication: the authors have published no code, and the paper gives no
optimiser, learning rate, interval or ratios. How sure each part is:

    a_c from the membrane potential       reviews and notes on the paper
    growth by the gradient of gamma       reviews and notes on the paper
    the score s v_th + |v|, one ranking   third-party code, github yudi-mars/Soul
    over all layers, the last batch
    the ramp, the interval, the fate of   INTERPRETATION, at the line concerned
    a dead channel, r, fine-tuning

Differences from that third-party code. There a tenth of the channels is dead from the
first epoch to the last. What is cut gets a filter, gamma and beta of 0, and trains on
without a mask: its beta drifts, and its gamma has no gradient by which it could return.
Of equal scores at the edge all go. A layer may lose all channels. Nothing is
fine-tuned, and the best test epoch is saved.

Its run folder is that of prune_structured.py, and updates.jsonl, a line an update. A
line's `silent` counts the channels that stayed by their activity and had no spike in
the batch: neurons that are strongly inhibited are far from rest too.
"""
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import harness  # first: what is not installed is then one line

import torch
from torch import Tensor

import channels
import models
import training
from channels import Choice
from harness import flags, removal, setup
from harness.runfolder import finished
from masks import computing_with, count, momenta, prune_further, select

# ---- the scores ----------------------------------------------------------------------


class Scores(NamedTuple):
    """What ranks the channels at an update. Rows are [M], on the CPU."""

    activity: Tensor  # a_c, float64
    growth: Tensor    # |dL/dgamma|
    fired: Tensor     # bool, False where a channel was silent in the batch


def backward_and_score(run, living, x, y, potential):
    """Compute the gradient of a batch, as training.backward. Return its Scores.

    potential: what the activity is taken of, neurons.activity:
        post    a_c = mean over T, N, H, W of s v_th + |v|, v after the reset
        pre     a_c = mean over T, N, H, W of |h|, h before the reset

    INTERPRETATION: the paper says membrane potential, and not which one. "post" is the
    third-party code's. |v| alone would give 0 to a channel that always fires. The
    samples are those of the update's batch, as in the third-party code.
    """
    with living.computing():  # with gamma m and beta m
        recorded = training.backward(run, x, y, "mean", potential)
    groups = models.removable(run.net).values()
    activity, rate = torch.cat([recorded[group.lif].cpu() for group in groups], dim=1)
    # of dead channels too: their filter computes, and only gamma and beta are 0
    growth = torch.cat([scale.grad.abs().cpu() for scale in channels.scales(run.net)])
    return Scores(activity, growth, fired=rate > 0)


# ---- an update -----------------------------------------------------------------------


def cut_and_regrow(live, ratio, regen, activity, growth, gamma, sizes,
                   may_be_empty=None):
    """Return (the Choice of the channels that live from now on, what stays by its
    activity [M] bool).

    live: those that lived so far, [M] bool. ratio: p_q, the share that is dead after
    the update. regen: r. activity: a_c, [M]. growth: |dL/dgamma|, [M]. gamma: |gamma|
    as stored, [M]. sizes: the number of channels of each layer. may_be_empty: for each
    layer whether all its channels may go; None: no layer may.

    INTERPRETATION (r): Eq. 7 of the criticality paper, so that r is a share of the
    channels that live. The third-party code returns a tenth of all and keeps nine
    tenths, which is r = 0.111; the default is 0.1.
    """
    total = len(live)
    n_final = round(ratio * total)
    n_temp = round(prune_further(ratio, regen) * total)
    order = -torch.arange(total).double()  # of equal ones the earlier channel

    # 1. By activity, over all layers. Where fewer live than could stay, all of them do,
    # and more return: under --target-macs p_q may be lower than at the last update
    n_stay = min(total - n_temp, count(live))
    stays = select(live, n_stay, [activity, gamma, order], None)

    # 2. By the gradient of gamma: any dead channel, just cut or long dead
    n_back = total - n_final - n_stay
    back = select(~stays, n_back, [growth, gamma, order], None)

    # 3. No layer ends empty. Nothing goes elsewhere for it: the ratio may be missed
    kept = stays | back
    rescued = channels.largest_of_empty_layers(kept, gamma, sizes, may_be_empty)
    return Choice(kept | rescued, back, rescued), stays


def ratio_at(run, update, num_updates, choose):
    """Return p_q, the share of the channels that is dead after an update.

    choose(ratio): returns what cut_and_regrow does. INTERPRETATION: the cubic ramp of
    all methods here, in channels, or in MACs under --target-macs.
    """
    args = run.args
    if args.target_macs is None:
        return training.sparsity_at(update, num_updates, args.prune_ratio)
    removed = training.sparsity_at(update, num_updates, args.target_macs)
    return channels.ratio_for(run.net, removed, lambda ratio: choose(ratio)[0])


def do_update(run, living, scores, update, num_updates):
    """Do an update after a step: choose the channels that live from now on, and log it.

    living: the Living of the network. scores: those of the step's batch. update: q,
    1..n.
    """
    net, before, gamma = run.net, living.live, channels.gammas(run.net)
    may_be_empty = channels.may_be_empty(net)

    def choose(ratio):
        return cut_and_regrow(before, ratio, run.args.regen, scores.activity,
                              scores.growth, gamma, living.sizes, may_be_empty)

    target = ratio_at(run, update, num_updates, choose)
    choice, stays = choose(target)
    living.take(choice, scores, run.optimizer)
    removal.log_update(run, target, before, before & ~stays, choice,
                       silent=count(stays & ~scores.fired))


# ---- dead channels -------------------------------------------------------------------


class Living:
    """The channels of a network that live, and the values that the dead ones keep.

    net: with all channels. state: what a checkpoint holds, a dict of rows over the M
    channels, on the CPU:

        live        bool, those that compute
        returned    bool, live ones whose latest entry was a return
        rescued     bool, kept by the last update since their layer would be empty
        activity    a_c at the last update
        fired       bool, False where a channel was silent in the batch of that update

    INTERPRETATION (a dead channel keeps its filter): with filter, gamma and beta 0 the
    normalised input is 0, and so is dL/dgamma: nothing could return by its gradient.
    Its statistics of batch normalisation go on, and so do the weights that read it,
    which belong to living channels.
    """

    def __init__(self, net, state):
        self.net, self.state = net, state
        self.sizes = channels.layers(net)[1]
        own = dict(net.named_parameters())
        groups = models.removable(net).values()
        # of each layer: the parameters that a dead channel keeps
        self.rows = [[own[name] for name in group.rows if name in own]
                     for group in groups]
        # and those of them that compute as 0: gamma and beta
        self.norms = [(own[f"{group.bn}.weight"], own[f"{group.bn}.bias"])
                      for group in groups]
        self._hold()

    @property
    def live(self):
        """[M] bool, on the CPU."""
        return self.state["live"]

    def _hold(self):
        """Take note of the values of the dead channels, as they are."""
        self.dead, self.factors = [], []
        parts = self.live.split(self.sizes)
        for live, rows, (gamma, _) in zip(parts, self.rows, self.norms):
            self.factors.append(live.to(gamma))  # m
            index = (~live).nonzero().squeeze(1).to(gamma.device)
            for parameter in rows:
                stored = parameter.detach().index_select(0, index)
                self.dead.append((parameter, index, stored))

    def computing(self):
        """Return the context in which the network computes with gamma m and beta m."""
        parameters, values = [], []
        for (gamma, beta), factor in zip(self.norms, self.factors):
            parameters += [gamma, beta]
            values += [gamma.detach() * factor, beta.detach() * factor]
        return computing_with(parameters, values)

    @torch.no_grad()
    def put_back(self, optimizer):
        """Undo what a step did to dead channels, by decay and by gradient: filter,
        gamma and beta are as stored, and their momentum is 0. Call it after a step."""
        for parameter, index, stored in self.dead:
            parameter.index_copy_(0, index, stored)
            for momentum in momenta(optimizer, parameter):
                momentum.index_fill_(0, index, 0)

    def take(self, choice, scores, optimizer):
        """Let the channels of a Choice live from now on. One that returns has what it
        had when it died, and starts without momentum.

        scores: those of the update.
        """
        returned = (self.state["returned"] | choice.regenerated) & choice.kept
        self.state |= dict(live=choice.kept, returned=returned, rescued=choice.rescued,
                           activity=scores.activity, fired=scores.fired)
        self._hold()
        self.put_back(optimizer)  # the momentum of what has died now


def all_live(net):
    """Return the state of Living before the first update."""
    live = torch.ones(sum(channels.layers(net)[1]), dtype=torch.bool)
    return dict(live=live, returned=~live, rescued=~live, activity=None, fired=None)


# ---- the script ----------------------------------------------------------------------


def run_name(args):
    """Return the name of the run, and of its folder."""
    name = (f"{Path(args.dataset).stem}-{args.model}-sca-{removal.share_name(args)}"
            f"-r{args.regen:g}")
    if args.potential == "pre":
        name += "-pre"
    return f"{name}-seed{args.seed}"


def complete(args, explicit):
    """Fill in the share that goes, where none is given."""
    removal.complete_share(args)


def parse_args(argv):
    """Return all flags, a Namespace."""
    parser = flags.make_parser(__doc__)
    group = parser.add_argument_group("pruning (SCA)")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    either("--prune-ratio", type=flags.number(0, 1, above=True), metavar="P",
           help="share of the prunable channels, of all layers together, that is gone "
                "in the end, a fraction above 0 and below 1 (default: that of "
                "prune_structured.py, vgg16: 0.4522, resnet19: 0.512; others: 0.5)")
    either("--target-macs", type=flags.number(0, 1, above=True), metavar="SHARE",
           help="remove this share of the MACs, a fraction above 0 and below 1: each "
                "update bisects the share of the channels that takes it up the ramp")
    add("--regen", type=flags.number(0, 1),
        help="regeneration rate r, a fraction in [0, 1): the share of the live "
             "channels that have returned in an update; 0: channels are cut by "
             "activity alone")
    add("--potential", choices=("post", "pre"),
        help="the activity of a channel. post: a spike counts the threshold, and the "
             "potential after the reset counts as it is; pre: the potential before the "
             "reset")
    add("--interval", type=flags.whole(1), metavar="STEPS",
        help="iterations between two updates (default: those of an epoch)")
    add("--epochs-prune", type=flags.whole(1), metavar="N",
        help="epochs in which channels are cut and return, from the start")
    add("--epochs-finetune", type=flags.whole(0), metavar="N",
        help="epochs of the small network")
    return flags.parse(parser, argv, "sca", complete, run_name)


def set_interval(args, stages):
    """Set the default of --interval. Raise ValueError if no update would ever run.

    INTERPRETATION: an update at the end of each epoch, as in the third-party code.
    """
    if args.interval is None:
        args.interval = stages.steps_per_epoch
    setup.num_updates(args, stages)


def set_up(args):
    """Return (the run, a network of the dense widths, the number of updates). Flags
    that cannot work end the script with exit code 2, before anything is written."""
    run, dense = removal.set_up(args, check=lambda stages: set_interval(args, stages),
                                prune=args.epochs_prune, finetune=args.epochs_finetune)
    return run, dense, setup.num_updates(args, run.stages)


def main(argv=None):
    """Run the script. Return its summary; None in a process that writes none."""
    args = parse_args(argv)
    if (summary := finished(args)) is not None:
        return summary
    run, dense, num_updates = set_up(args)
    plan = f"sca: {num_updates} updates, {removal.goal(args)}, r = {args.regen:g}"

    with run.under_way(plan):
        if not removal.is_done(run):
            optimizer = run.optimizer
            living = Living(run.net, run.notes.setdefault("sca", all_live(run.net)))
            run.computes = living.computing  # evaluations are without what is dead

            for epoch in run.epochs("prune"):
                for x, y in run.batches(epoch):
                    update, rest = divmod(run.iteration, args.interval)
                    is_update = rest == 0 and update <= num_updates
                    if is_update:
                        scores = backward_and_score(run, living, x, y, args.potential)
                    else:
                        with living.computing():  # with gamma m and beta m
                            training.backward(run, x, y)
                    lr = training.lr_at(args.schedule, args.lr, *run.position)
                    training.descend(optimizer, lr)
                    living.put_back(optimizer)  # what is dead does not move

                    if is_update:
                        do_update(run, living, scores, update, num_updates)
                removal.end_epoch(run)

            state = run.notes.pop("sca")
            run.computes = nullcontext  # the small network has no dead channels
            choice = Choice(state["live"], state["returned"], state["rescued"])
            removal.remove(run, run.updates[-1]["target"], choice, state["activity"],
                           state["fired"])

        for epoch in run.epochs("finetune"):
            for x, y in run.batches(epoch):
                lr = training.lr_at(args.schedule, args.lr, *run.position)
                training.step(run, x, y, lr)
            removal.end_epoch(run)

        densities = [1.0] + [1 - row["sparsity"] for row in run.rows[:-1]]
        return removal.finish(run, dense, "prune_sca", "sca", regen=args.regen,
                              training_cost=sum(densities) / len(densities))


if __name__ == "__main__":
    main()
