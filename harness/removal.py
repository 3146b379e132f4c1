"""A run that removes channels: its start, the cut, the end of its epochs, its end.

    run, dense = removal.set_up(args, pretrain=8, finetune=8)
    ...                                                 # train the dense network
    if not removal.is_done(run):
        ratio = removal.ratio_for(run, choose)        # choose(ratio): a channels.Choice
        removal.remove(run, ratio, choose(ratio))       # run.net is the small one now
    ...                                                 # train it
    removal.finish(run, dense, "prune_x", "method")

Which channels go is the script's to choose. channels.py has the steps on a network;
here they meet the run, its folder and its processes.
"""
import torch

import channels
import metrics
import training
from harness import files, flags, presets, processes, setup
from harness.runfolder import Run
from masks import count


def complete_share(args):
    """Set --prune-ratio to that of the paper for the network, where neither it nor
    --target-macs is given."""
    if args.target_macs is not None:
        args.prune_ratio = None
    elif args.prune_ratio is None:
        args.prune_ratio = next(iter(presets.channel_rates(args.model)))


def complete_pretraining(args, explicit):
    """Set --epochs-pretrain to 0 with --init. Raise ValueError if nothing would be
    trained before the cut."""
    if args.init is not None and "epochs_pretrain" not in explicit:
        args.epochs_pretrain = 0
    if args.epochs_pretrain == 0 and args.init is None:
        raise ValueError("--epochs-pretrain is 0, expected at least 1, or a network by "
                         "--init")


def share_name(args):
    """Return what is to be removed, for the name of a run."""
    if args.target_macs is not None:
        return f"macs{args.target_macs:g}"
    return f"{args.prune_ratio:g}"


def set_up(args, least=channels.fewest, check=None, **epochs):
    """Return the run, and a network of the dense widths to compare with. Flags that
    cannot work end the script with exit code 2, before anything is written.

    least(net): returns the channels that stay at any ratio, [M] bool.
    check(stages): may raise ValueError; None: there is nothing more to check.
    epochs: the length of each stage.
    """
    with flags.exits(2, ValueError, OSError, no_memory=flags.SMALLER):
        device = setup.start(args, shared=True)
        images = setup.load(args, device)
        net = setup.build(args, images, files.saved_widths(args))
        dense = setup.build(args, images)
        channels.check_ratio(dense, args.prune_ratio or 0.0, args.target_macs or 0.0,
                             least)
        stages = setup.stages(args, images, **epochs)
        if check is not None:
            check(stages)
        run = Run(args, device, images, stages, net=net,
                  optimizer=training.optimizer(args, net.parameters()))
    return run, dense


def goal(args):
    """Return what is to be removed, in words."""
    if args.target_macs is not None:
        return f"{100 * args.target_macs:g} % of the MACs go"
    return f"{100 * args.prune_ratio:g} % of the channels go"


def is_done(run):
    """Return whether the network of a run is the small one already."""
    return "gamma" in run.notes


def ratio_for(run, choose):
    """Return the share of the channels that goes: --prune-ratio, or what --target-macs
    takes. choose(ratio): returns the channels.Choice at a ratio."""
    if run.args.target_macs is None:
        return run.args.prune_ratio
    return channels.ratio_for(run.net, run.args.target_macs, choose)


def remove(run, ratio, choice, scores=None, spiked=None):
    """Replace the network of a run by one of the kept channels alone, and its optimiser
    by a new one. Show that it is the same function as the old network with the other
    channels silent. Write channels.json and a checkpoint.

    ratio: as asked for. choice: a channels.Choice. scores, spiked: what the score
    function returned, written to channels.json; None: there is no score.
    """
    args, net, notes = run.args, run.net, run.notes
    processes.agree("the channels that stay", choice.kept)
    if vars(args).get("epochs_pretrain"):  # else that of --init, which is noted already
        notes["dense_accuracy"] = run.last_accuracy("pretrain")

    names, sizes = channels.layers(net)
    kept = dict(zip(names, choice.kept.split(sizes)))
    masked, small = channels.silence(net, kept), channels.remove(net, kept)
    record = channels.choice_record(net, ratio, choice, scores, spiked)
    record |= channels.differences(masked.eval(), small.eval(), kept,
                                   next(run.images.inputs("test", args.batch_size)))
    record["accuracy_silenced"] = run.evaluate(masked)["accuracy"]
    record["accuracy_removed"] = run.evaluate(small)["accuracy"]
    files.write_json(run.folder / "channels.json", record)
    run.say(channels.record_lines(record))
    if args.target_macs is not None:
        missed = abs(record["macs_removed"] - args.target_macs)
        if missed > 0.005:
            run.say(f"  note: asked to remove {100 * args.target_macs:g} % of the "
                    f"MACs; no ratio comes nearer than {100 * missed:.2f} points")

    notes |= dict(prune_ratio=ratio, sparsity=channels.sparsity(net, small), gamma=[],
                  pruned_accuracy=record["accuracy_removed"],
                  survived_by_regeneration=record["regenerated"] / record["kept"])
    run.hold(net=small.train(),
             optimizer=training.optimizer(args, small.parameters()))
    run.save()


def log_update(run, target, before, cut, choice, **more):
    """Print an update of the channels that live, and write it to updates.jsonl. Note
    the sparsity of the network without the dead ones, for the rows of metrics.jsonl.

    target: the share of the channels that is to be gone. before: [M] bool, those that
    lived. cut: [M] bool, those of them that the update cut. choice: a channels.Choice,
    of which `kept` live now. more: further keys of the row.
    """
    processes.agree(f"the channels after iteration {run.iteration}", choice.kept)
    names, sizes = channels.layers(run.net)
    kept = dict(zip(names, choice.kept.split(sizes)))
    rows = zip(names, *(row.split(sizes) for row in (choice.kept, cut,
                                                     choice.regenerated)))
    layers = [dict(name=name, alive=count(alive), pruned=count(pruned),
                   regenerated=count(back)) for name, alive, pruned, back in rows]
    n_cut, total = count(cut), len(cut)
    survived = count(cut & choice.kept) / n_cut if n_cut else None
    row = dict(update=len(run.updates) + 1, iteration=run.iteration, target=target,
               before=1 - count(before & ~cut) / total,
               sparsity=1 - count(choice.kept) / total, pruned=n_cut,
               regenerated=count(choice.regenerated), survived=survived, layers=layers,
               **more)
    run.add_update(row)
    small = channels.remove(run.net, kept)
    run.notes["sparsity"] = channels.sparsity(run.net, small)
    words = "".join(f"  {key} {value:,}" for key, value in more.items())
    run.say(f"  update {row['update']:>3}  cut {n_cut:,}  regrown "
            f"{row['regenerated']:,}  channels {count(choice.kept):,} of {total:,}"
            f"{words}")
    for name, rescued in zip(names, choice.rescued.split(sizes)):
        if rescued.any():
            run.say(f"  note: {name} would have lost all channels; its largest |gamma| "
                    f"stays, and nothing goes in its place")


def end_epoch(run):
    """End an epoch, as Run.end_epoch. Note the small network's gamma, for gamma.npz."""
    if is_done(run):
        row = torch.cat(channels.scales(run.net)).detach().cpu()
        run.notes["gamma"].append(row)
    run.end_epoch(run.notes.get("sparsity", 0.0))


def finish(run, dense, script, method, **own):
    """Compare the small network with the dense one, and write the last files. Return
    the summary, None in a process that does not write.

    dense: a network of the dense widths. own: see Run.finish.
    """
    if not run.is_alone():
        return None
    args, net, notes = run.args, run.net, run.notes
    for name, (before, after) in channels.savings(dense, net).items():
        less = 100 * (1 - after / before)
        run.say(f"  {name:<24}{before:,} -> {after:,} ({less:.2f} % less)")
    speed, seconds = {}, 0 if args.smoke else 2
    with training.autocast(args):
        counts = metrics.count(net, run.images.inputs("test", args.batch_size))
        for n in (1, 32):
            batch = run.images.copies(n)
            speed[n] = metrics.speedup(dense, net, batch, seconds=seconds)
    run.say(f"  dense / small time      {speed[1]:.2f} at batch 1, {speed[32]:.2f} at "
            f"batch 32")

    names, sizes = channels.layers(net)
    rows = torch.zeros(0, sum(sizes))
    if notes["gamma"]:
        rows = torch.stack(notes["gamma"])
    # {layer: [epochs, C]}; a layer that has lost all its channels has none to show
    history = {name: rows[:, :0].numpy() for name in channels.layers(dense)[0]}
    history |= {name: part.numpy()
                for name, part in zip(names, rows.split(sizes, dim=1))}
    files.save_arrays(run.folder / "gamma.npz", history)
    cost = 0.0  # of no epoch
    if run.rows:
        cost = sum(1 - row["sparsity"] for row in run.rows) / len(run.rows)
    if run.stages.by_name["finetune"] == 0:  # the last epoch was of the dense network
        own["test_accuracy"] = notes["pruned_accuracy"]
    own = notes | channels.compared_with_dense(dense, net) | own
    own = dict(training_cost=cost) | own
    return run.finish(script, method, counts, speedup_batch1=speed[1],
                      speedup_batch32=speed[32], **own)
