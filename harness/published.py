"""--as-published: what the published code does instead of the paper's text, as items.

    published.add_flag(add, "unstructured")    # --as-published [ITEM ...]
    published.complete(args, explicit, "unstructured")    # in the script's complete()
    "cosine" in args.as_published              # in the script: True if it was asked for

Of "unstructured" and "structured" the published code is the public repository
MmPple/pruning-criticality (commit ee3170e, 15 May 2024). It names no paper, but its
scripts, flags and figures are in all likelihood those of the experiments of arXiv
2311.16141. It has no licence: facts of it are used here, and none of its code.
docs/interpretations.md lists the differences. Of other scripts it is that of their
paper's authors.

An item that is nothing but other flags sets them. The others are a few lines in the
script, in masks.py or in models.py, tagged "published code".
"""
import argparse
from types import SimpleNamespace

import plans

# Mean and deviation of CIFAR-10, which the published code also has for CIFAR-100
CIFAR10 = ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
CIFAR = ("cifar10", "cifar100")

# items of "unstructured" that change an update of the masks; all but "ties" act only on
# what is regenerated
ITEMS_OF_AN_UPDATE = {"score", "classifier", "zero", "momentum", "ties"}

# {script: {item: (what it does, the flags that it sets)}}
ITEMS = {
    "unstructured": {
        "neuron": (
            "input not decayed, fires above 0.5, tanh surrogate, gradient through the "
            "reset", dict(surrogate="tanh", threshold=0.5, detach_reset=False,
                          decay_input=False, strict=True)),
        "pooling": ("average pooling instead of maximum (vgg16, small)", {}),
        "score": ("the value of the surrogate, which grows with the potential, instead "
                  "of its derivative", {}),
        "classifier": ("the last layer keeps what a plain cut to the target leaves it: "
                       "it is neither cut further nor regenerated", {}),
        "zero": ("a weight that comes back is always 0", {}),
        "momentum": ("dead weights keep their momentum, which goes on collecting their "
                     "gradient", {}),
        "ties": ("equal scores all come back, so that the target is missed by up to a "
                 "channel, and counts are truncated", {}),
        "cosine": ("one cosine over both stages, a step an epoch",
                   dict(schedule="cosine")),
        "loss": ("cross-entropy of the mean output, divided by T",
                 dict(loss="mean-ce")),
        "cutout": ("a hole of 16 pixels in training images (without a name: on CIFAR)",
                   dict(cutout=16)),
        "network": ("the pre-activation ResNet-19 (resnet19)", {}),
    },
    "structured": {
        "neuron": ("gradient through the reset", dict(detach_reset=False)),
        "pooling": ("average pooling instead of maximum (vgg16, small)", {}),
        "bn": ("batch normalisation of each time step by itself", {}),
        "count": ("counts are truncated, equal scores all come back", {}),
        "decay": ("no weight decay", dict(weight_decay=0.0)),
        "network": ("the pre-activation ResNet-19, of which all channels behind a BN "
                    "are ranked (resnet19)", {}),
        "normalisation": ("CIFAR-100 normalised as CIFAR-10", {}),
    },
    "stds": {
        "cut": ("what the dead zone leaves is the result", dict(mode="paper")),
        "optimizer": ("Adam, as on CIFAR-10",
                      dict(optimizer="adam", lr=1e-4, weight_decay=0.0,
                           schedule="constant")),
        "loss": ("mean square error of the mean output", dict(loss="mse")),
    },
    "upr": {
        "cut": ("weights are alive where alpha > 0", dict(mode="paper")),
        "optimizer": ("Adam for weights and masks, as on CIFAR-10",
                      dict(optimizer="adam", lr=1e-4, weight_decay=0.0,
                           schedule="constant", mask_lr=1e-4)),
        "loss": ("mean square error of the mean output", dict(loss="mse")),
    },
}


class Items(argparse.Action):
    """An argparse action: a flag without a value has the value ["all"]."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values or ["all"])


def add_flag(add, script):
    """Add --as-published to a group of flags. add: its add_argument."""
    texts = []
    for item, (text, implied) in ITEMS[script].items():
        flags = " ".join(as_flag(*pair) for pair in implied.items())
        texts.append(f"{item}: {text}" + (f"; it sets {flags}" if flags else ""))
    add("--as-published", nargs="*", action=Items, choices=ITEMS[script],
        metavar="ITEM",
        help=f"do these items, or without a name all that fit network and data set, as "
             f"the published code does instead of the paper's text. {'. '.join(texts)}")


def as_flag(flag, value):
    """Return a flag with its value, as on a command line."""
    name = flag.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}"


def complete(args, explicit, script):
    """Resolve args.as_published into a list of items, and set the flags that they
    imply. Raise ValueError for an item without a meaning, and for a flag that
    contradicts one.

    explicit: {flag: value} from the command line and config.json, see flags.Explicit.
    """
    named, known = args.as_published, ITEMS[script]
    # a resumed run goes on as it began, also with an item that is refused today
    is_resumed = "as_published" in getattr(explicit, "kept", ())
    unfit = reasons(misfit, args, known)
    whole = [item for item in known if item not in unfit]
    if args.dataset not in CIFAR and "cutout" in whole:
        whole.remove("cutout")  # Tiny-ImageNet has none there
    wanted = whole if named == ["all"] else [item for item in known if item in named]
    if wanted != whole:  # the whole is one name for all runs that are compared
        unfit |= reasons(idle, args, wanted)
    for item in wanted:
        if item in unfit and not is_resumed:
            raise ValueError(f"--as-published {item} does nothing with {unfit[item]}. "
                             f"Leave it out")
    args.as_published = wanted
    for item in args.as_published:
        for flag, value in known[item][1].items():
            if explicit.get(flag, value) != value:
                raise ValueError(
                    f"--{flag.replace('_', '-')} is {explicit[flag]}, but "
                    f"--as-published {item} sets it to {value}. Leave it out, or name "
                    f"the other items")
            setattr(args, flag, value)


def reasons(why_not, args, items):
    """Return {item: why_not(args, item)} of the items that have such a reason."""
    found = {item: why_not(args, item) for item in items}
    return {item: reason for item, reason in found.items() if reason is not None}


def misfit(args, item):
    """Return why an item means nothing to a run, in words; None if it fits."""
    renamed = plans.AS_PUBLISHED.get(item)
    if renamed is not None and args.model not in renamed:
        return f"--model {args.model}, expected one of {', '.join(renamed)}"
    if item == "normalisation" and args.dataset != "cifar100":
        return f"--dataset {args.dataset}, expected cifar100"
    if item == "normalisation" and args.encoding != "direct":
        return f"--encoding {args.encoding}, expected direct"
    if item == "cutout" and args.encoding == "events":
        return "events, expected images"
    return None


def idle(args, item):
    """Return why an item changes nothing in what a run prunes, in words; None if it
    changes something. args: the flags, or a namespace of a config.json."""
    flags = vars(args)
    if item == "count" and flags.get("prune_ratio") == 0:
        return "--prune-ratio 0"
    if flags.get("sparsity") == 0 and item in ITEMS_OF_AN_UPDATE:
        return "--sparsity 0"
    if flags.get("regen") == 0 and item in ITEMS_OF_AN_UPDATE - {"ties"}:
        return "--regen 0"
    if item == "score" and flags.get("metric") not in (None, "criticality"):
        return f"--metric {args.metric}"
    return None


def implied(config):
    """Return the flags that a run's items have set, a set. config: its config.json."""
    items = config.get("as_published") or []
    script = config.get("script", "").removeprefix("prune_")
    return {flag for item in items for flag in ITEMS[script][item][1]}


def words(config, script=None):
    """Return how a run differs from the text in words: "as published" where it has all
    items that fit it, else "published cosine + zero"; "" if it does not differ.

    config: its config.json, or its flags. script: a key of ITEMS; None: as config says.
    """
    items = config.get("as_published")
    if not items:
        return ""
    script = script or config["script"].removeprefix("prune_")
    whole = SimpleNamespace(**config | dict(as_published=["all"]))
    complete(whole, {}, script)
    if items == whole.as_published:
        return "as published"
    return f"published {' + '.join(items)}"


def suffix(args, script):
    """Return the words of a run's name for its items: "-published",
    "-published-cosine-zero", or ""."""
    parts = words(vars(args), script).removeprefix("as ").replace("+", "").split()
    return "".join(f"-{part}" for part in parts)
