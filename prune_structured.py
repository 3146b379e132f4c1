"""Structured pruning of a spiking network with criticality-based regeneration:
Algorithm 2.

Paper: "Brain-Inspired Efficient Pruning: Exploiting Criticality in Spiking Neural
Networks", arXiv 2311.16141. Network slimming (Liu et al. 2017) trains with an L1
penalty on the scale gamma of batch normalisation, cuts the channels with the smallest
|gamma| over all layers, and fine-tunes. Here more channels are cut than asked, and
those of them come back whose neurons are kept nearest to their threshold. What is cut
is removed physically: the network is smaller and faster.

    python prune_structured.py                       # the whole job, embedded data
    python prune_structured.py --dataset cifar100    # the paper's: p = 0.4522, r = 0.1
    python prune_structured.py --method slimming     # the baseline
    python prune_structured.py --target-macs 0.5     # remove half of the MACs
    python prune_structured.py --prune-ratio 0       # dense, on the same schedule
    python prune_structured.py --metric random       # other ways to regenerate
    python prune_structured.py --as-published        # as the published code has it
    torchrun --nproc-per-node=2 prune_structured.py  # two processes, a GPU each

The L1 penalty acts on the gamma of those layers whose channels can go. In network
slimming's code it acts on every BN. That differs for resnet19, where only the inner
channels of blocks can go; the other networks have no other BN.

A run leaves its folder, runs/NAME/: config.json, metrics.jsonl (a line an epoch),
channels.json (which channels stay, and why), gamma.npz (gamma after each epoch of
fine-tuning), checkpoint.pt, model.pt, curves.png and, last, summary.json.
"""
from pathlib import Path

import harness  # first: what is not installed is then one line

import torch

import channels
import training
from channels import Choice
from harness import flags, presets, published, removal
from harness.runfolder import finished
from masks import prune_further, select

# ---- the scores ----------------------------------------------------------------------
# A score function returns (scores, spiked). scores: a number for each channel, [M] in
# float64; the pruned channels with the highest ones are regenerated. spiked: [M] bool,
# False where a channel never spiked; None: not recorded.
# run: has the network `net` and the data set `images`.
# INTERPRETATION: the dense network is scored, before channels are cut. In the pruned
# network all pruned channels are silent and would tie. Confirmed by the published code.


def criticality(run):
    """Score by the criticality of each channel, a mean over the samples (Eq. 6): how
    near its neurons are to their threshold."""
    return run.score_channels("criticality")


def gradient(run):
    """Score by |dL/dgamma| of each channel, a mean over the batches."""
    return run.score_channels("gradient")


def random(run):
    """Score at random, as a control."""
    count = len(channels.gammas(run.net))
    return torch.rand(count, generator=run.generator()).double(), None


SCORES = {"criticality": criticality, "gradient": gradient, "random": random}


def prune_and_regenerate(gamma, scores, sizes, ratio, regen, may_be_empty=None,
                         base="kept"):
    """Choose the channels that stay, as Algorithm 2 does; without regeneration this is
    network slimming.

    gamma, scores: |gamma| and the score of every channel, [M]; None where regen is 0.
    sizes: the number of channels of each layer. ratio: p, the share that is gone in the
    end. regen: r. may_be_empty: for each layer whether all its channels may go; None:
    no layer may. base: what r is a share of, "kept" | "pruned". Returns a Choice.
    """
    # INTERPRETATION: Eq. 7 as in Algorithm 1, so that a share r of the channels that
    # stay came back. Confirmed by the published code. "pruned" takes r as a share of
    # what is cut at first: that is nearer to the 42.60 % that the paper reports
    if base == "kept":
        further = prune_further(ratio, regen)  # Eq. 7
    else:
        further = min(1, ratio / (1 - regen))
    kept = channels.largest(gamma, further)

    # INTERPRETATION of "re-sort all pruned units": one ranking over all layers. Of
    # equal scores the larger |gamma| comes first, then the earlier channel
    count = round(further * len(gamma)) - round(ratio * len(gamma))
    keys = [scores, gamma, -torch.arange(len(gamma)).double()]
    regenerated = select(~kept, count, keys, None)  # Eq. 5

    # No layer ends empty. Nothing goes elsewhere for it: the ratio may be missed
    kept = kept | regenerated
    rescued = channels.largest_of_empty_layers(kept, gamma, sizes, may_be_empty)
    return Choice(kept | rescued, regenerated, rescued)


def prune_and_regenerate_as_published(gamma, scores, sizes, ratio, regen,
                                      may_be_empty=None):
    """Choose the channels as the published code does ("count" of --as-published).
    Arguments as in prune_and_regenerate. Returns a Choice."""
    total = len(gamma)
    if ratio == 0:  # the dense reference
        all_channels = torch.ones_like(gamma, dtype=torch.bool)
        return Choice(all_channels, ~all_channels, ~all_channels)
    gone = int(ratio * total)  # published code: counts are truncated
    count = int((total - gone) * regen)
    # published code: the channel at the threshold goes too, and all that equal it
    threshold = gamma.sort().values[min(gone + count, total - 1)]
    kept = gamma > threshold

    # published code: all come back that equal the last one
    regenerated = torch.zeros_like(kept)
    if count > 0:
        regenerated = ~kept & (scores >= scores[~kept].topk(count).values[-1])
    kept = kept | regenerated
    rescued = channels.largest_of_empty_layers(kept, gamma, sizes, may_be_empty)
    return Choice(kept | rescued, regenerated, rescued)


# ---- the script ----------------------------------------------------------------------


def method_of(args):
    """Return the name of the method that the flags make."""
    if args.prune_ratio == 0:
        return "dense"
    return "slimming" if args.regen == 0 else args.metric


def run_name(args):
    """Return the name of the run, and of its folder."""
    name = f"{Path(args.dataset).stem}-{args.model}-structured-{method_of(args)}"
    if args.target_macs is not None:
        name += f"-macs{args.target_macs:g}"
    elif args.prune_ratio > 0:
        name += f"-{args.prune_ratio:g}"
    if args.regen > 0:
        name += f"-r{args.regen:g}"
        # readings that are not the default have names of their own
        name += "-pruned" * (args.regen_base == "pruned")
    name += "-l1" * args.finetune_l1 + published.suffix(args, "structured")
    return f"{name}-seed{args.seed}"


def complete(args, explicit):
    """Fill in the defaults that depend on other flags; refuse flags that contradict
    each other."""
    rates = presets.channel_rates(args.model)  # {p: r}
    ratio = next(iter(rates)) if args.prune_ratio is None else args.prune_ratio
    args.prune_ratio = ratio if args.target_macs is None else None
    no_regeneration = dict(regen=0.0, metric="criticality", regen_base="kept")
    if args.method == "slimming":
        flags.set_unused(args, explicit, no_regeneration, "--method slimming")
    elif ratio == 0:
        flags.set_unused(args, explicit, no_regeneration, "--prune-ratio 0")
    elif args.regen == 0:
        flags.set_unused(args, explicit, no_regeneration, "--regen 0")
    elif args.regen is None:
        args.regen = presets.nearest(rates, ratio)

    removal.complete_pretraining(args, explicit)
    if args.l1 == 0:
        flags.set_unused(args, explicit, dict(finetune_l1=False), "--l1 0")
    if args.epochs_finetune == 0:
        flags.set_unused(args, explicit, dict(finetune_l1=False), "--epochs-finetune 0")
    if args.epochs_pretrain == 0 and not args.finetune_l1:
        usual = presets.of(args.dataset, "structured")["l1"]
        flags.set_unused(args, explicit, dict(l1=usual),
                         "a run without pretraining and without --finetune-l1")
    published.complete(args, explicit, "structured")
    if "count" in args.as_published and args.regen_base == "pruned":
        raise ValueError("--regen-base is pruned, which --as-published count does not "
                         "use. Leave one of them out")
    too_much = args.target_macs is None and ratio > 1 - args.regen
    if args.regen_base == "pruned" and too_much:
        raise ValueError(f"--regen is {args.regen:g}, which prunes more than all "
                         f"channels first, expected at most {1 - ratio:g} with "
                         f"--regen-base pruned. Lower it")


def parse_args(argv):
    """Return all flags, a Namespace."""
    parser = flags.make_parser(__doc__)
    group = parser.add_argument_group("pruning (Algorithm 2)")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--method", choices=("criticality", "slimming"), help="Algorithm 2, or network "
        "slimming, which is the same without regeneration")
    either("--prune-ratio", type=flags.number(0, 1), metavar="P", help="share of the "
           "prunable channels that is gone in the end, a fraction in [0, 1); 0 trains "
           "the dense reference (default: the paper's, vgg16: 0.4522, resnet19: 0.512; "
           "others: 0.5)")
    either("--target-macs", type=flags.number(0, 1, above=True), metavar="SHARE",
           help="find the ratio that removes this share of the MACs (the paper's "
           "FLOPs), by bisection")
    add("--regen", type=flags.number(0, 1), help="regeneration rate r, a fraction in "
        "[0, 1); 0 is slimming (default: the paper's, vgg16: 0.1, 0.05; resnet19: 0.3, "
        "0.1; others: 0.3)")
    add("--metric", choices=SCORES,
        help="what ranks the pruned channels that come back")
    add("--regen-base", choices=("kept", "pruned"), help="what r is a share of: the "
        "channels that stay, or those that are cut at first")
    add("--l1", type=flags.number(0), help="weight of the L1 penalty on gamma")
    add("--finetune-l1", action="store_true", help="keep the penalty while fine-tuning")
    add("--epochs-pretrain", type=flags.whole(0), metavar="N",
        help="epochs of the dense network (with --init: 0)")
    add("--epochs-finetune", type=flags.whole(0), metavar="N",
        help="epochs of the small network")
    published.add_flag(add, "structured")
    return flags.parse(parser, argv, "structured", complete, run_name)


def main(argv=None):
    """Run the script. Return its summary; None in a process that writes none."""
    args = parse_args(argv)
    if (summary := finished(args)) is not None:
        return summary
    run, dense = removal.set_up(args, pretrain=args.epochs_pretrain,
                                finetune=args.epochs_finetune)

    reading = published.words(vars(args), "structured")
    plan = f"{method_of(args)}: {removal.goal(args)}, r = {args.regen:g}"
    with run.under_way(f"{plan}, {reading}" if reading else plan):
        # Algorithm 2. Pretrain on L + l1 * sum |gamma|
        for epoch in run.epochs("pretrain"):
            for x, y in run.batches(epoch):
                training.backward(run, x, y)  # Eqs. 1-4
                for scale in channels.scales(run.net):
                    scale.grad += args.l1 * scale.detach().sign()  # Eq. 10
                lr = training.lr_at(args.schedule, args.lr, *run.position)
                training.descend(run.optimizer, lr)
            removal.end_epoch(run)

        if not removal.is_done(run):
            gamma, (_, sizes) = channels.gammas(run.net), channels.layers(run.net)
            scores, spiked = None, None
            if args.regen > 0:
                scores, spiked = SCORES[args.metric](run)  # Eq. 6, of all channels

            def choose(ratio):
                settings = (gamma, scores, sizes, ratio, args.regen,
                            channels.may_be_empty(run.net))
                if "count" in args.as_published:
                    return prune_and_regenerate_as_published(*settings)
                return prune_and_regenerate(*settings, args.regen_base)

            ratio = removal.ratio_for(run, choose)
            choice = choose(ratio)  # prune further, Eq. 7; regenerate, Eq. 5
            removal.remove(run, ratio, choice, scores, spiked)

        # Fine-tune the small network, on the same schedule of the learning rate
        for epoch in run.epochs("finetune"):
            for x, y in run.batches(epoch):
                training.backward(run, x, y)
                if args.finetune_l1:
                    for scale in channels.scales(run.net):
                        scale.grad += args.l1 * scale.detach().sign()
                lr = training.lr_at(args.schedule, args.lr, *run.position)
                training.descend(run.optimizer, lr)
            removal.end_epoch(run)

        return removal.finish(run, dense, "prune_structured", method_of(args),
                              regen=args.regen)


if __name__ == "__main__":
    main()
