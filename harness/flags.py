"""Flags: those that all scripts share, and where their values come from.

    parser = flags.make_parser(__doc__)    # the shared flags; a script adds its own
    args = flags.parse(parser, argv, "unstructured", complete, run_name)

The defaults are in presets.py. A wrong flag or file ends the script with exit code 2,
before anything is written. One line on stderr says what is wrong, what was expected and
how to fix it.
"""
import argparse
import difflib
import json
import math
import os
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import data
import events
import models
import training
from harness import output, planning, presets, processes
from harness.machine import is_missing_on_mps, is_out_of_memory
from neurons import RESETS, SURROGATES

# Flags that a resumed run may change
MAY_DIFFER = {"device", "evaluate_every", "save_every", "tensorboard"}
PLACES = {"dataset", "data_dir"}  # these too, if the hash of the data agrees

# {flag: its word in the name of a run's folder}, for sizes that are not the default
NAMED_SIZES = dict(width="width", train_limit="limit", time_steps="time",
                   minutes="minutes")

# What a config.json holds beside flags and version_*; "compact" is of older versions
NO_FLAGS = {"script", "commit", "commit_clean", "device_name", "threads", "processes",
            "compact", "data"}

SMALLER = "Try a smaller --width or --train-limit"  # the advice for too little memory

SMOKE_IMAGES = 256  # at most, of the training set and of the test set, under --smoke


# ---- the flags -----------------------------------------------------------------------


def make_parser(doc):
    """Return a parser with the flags that all scripts share."""
    parser = Parser(doc)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", type=path, metavar="NAME|FILE.npz|FOLDER",
        help=f"{', '.join(data.NAMES)}, or a path: an .npz file with x_train, y_train, "
             f"x_test, y_test, or a folder with train/CLASS/* and test/CLASS/* (a path "
             f"has the defaults of fashion-mini)")
    add("--data-dir", type=path, metavar="DIR",
        help="where named sets lie, as NAME.npz or in their official layout, and where "
             "they are downloaded to if they are not there")
    add("--train-limit", type=whole(1), metavar="N",
        help="use only the first N training images, balanced over the classes")
    add("--crop", type=whole(0), metavar="PIXELS",
        help="pad training images by so many pixels and crop them back at random; 0: "
             "not at all")
    add("--flip", action=argparse.BooleanOptionalAction,
        help="mirror training images at random")
    add("--cutout", type=whole(0), metavar="PIXELS",
        help="side of a square hole in each training image (LTH-SNN's code has 16 on "
             "CIFAR)")
    add("--rotate", type=number(0, 180), metavar="DEGREES",
        help="turn training images at random by up to so many degrees, either way; 0: "
             "not at all")
    add("--encoding", choices=models.ENCODINGS,
        help="the input of the network at each time step. direct: the image; rate: "
             "spikes, drawn with the pixels as probabilities; events: a frame of an "
             "event camera")
    add("--event-split", choices=events.SPLITS,
        help="how the recordings of an event camera become frames. number: each frame "
             "has as many events; time: each frame is as long")

    group = parser.add_argument_group(
        "model", "The flags of the neuron, --tau to --strict, have the network's "
        "own values as defaults:\nthose of plans.py, else those of neurons.py.")
    add = group.add_argument
    add("--model", choices=models.NAMES, help="the network")
    add("--width", type=number(0, 100, above=True), metavar="FACTOR",
        help="a factor on all widths of the network")
    add("--time-steps", type=whole(1, 10_000), metavar="T",
        help="time steps of the simulation")
    add("--tau", type=number(1, above=True), metavar="STEPS",
        help="time constant of the membrane: a time step without input leaves a share "
             "of 1 - 1 / tau of the potential")
    add("--threshold", type=number(0, above=True), metavar="V",
        help="the potential from which a neuron fires")
    add("--alpha", type=number(0, above=True), metavar="A",
        help="steepness of the surrogate: a larger one makes the gradient at the "
             "threshold higher and narrower")
    add("--surrogate", choices=list(SURROGATES),
        help="the smooth function that the backward pass takes in place of the step "
             "function of a spike")
    add("--reset", choices=list(RESETS),
        help="the potential after a spike. hard: 0; soft: lower by the threshold")
    add("--detach-reset", action=argparse.BooleanOptionalAction,
        help="no gradient flows through the spike in the reset")
    add("--decay-input", action=argparse.BooleanOptionalAction,
        help="the input current is divided by tau as well")
    add("--strict", action=argparse.BooleanOptionalAction,
        help="a neuron fires above its threshold, and not on it")
    add("--init", type=path, metavar="MODEL.pt",
        help="start from this network, for instance a trained dense one")

    add = parser.add_argument_group("training").add_argument
    add("--batch-size", type=whole(1), metavar="N",
        help="images a step, over all processes")
    add("--lr", type=number(0, above=True),
        help="learning rate at the start of a stage")
    add("--loss", choices=training.LOSSES,
        help="ce: cross-entropy of the output at each time step; mean-ce: that of the "
             "mean output, divided by T; mse: squared distance of the output's firing "
             "rate to the label")
    add("--schedule", choices=training.SCHEDULES,
        help="the learning rate within a stage. cosine: from lr to 0; step: a tenth "
             "from half of the steps on, a hundredth from three quarters on; constant: "
             "lr")
    add("--optimizer", choices=presets.OPTIMIZERS,
        help="what moves the weights; adam and adamw have their own --lr and "
             "--weight-decay")  # parse() adds which
    add("--momentum", type=number(0, 1), help="momentum of SGD, a fraction in [0, 1)")
    add("--weight-decay", type=number(0),
        help="L2 decay of all parameters; of adamw: decay that bypasses its moments")

    add = parser.add_argument_group("run").add_argument
    add("--device", type=device, metavar="DEVICE",
        help="cpu, cuda, cuda:1 (the second GPU) or mps; default: the GPU where there "
             "is one")
    add("--precision", choices=("fp32", "bf16"),
        help="bf16: mixed precision by autocast")
    add("--compile", action="store_true",
        help="compile the network with torch.compile")
    add("--sync-bn", action="store_true",
        help="under torchrun, on GPUs: batch normalisation over the whole batch, and "
             "not over the share of each process")
    add("--seed", type=whole(0), help="seed of weights, order of the images and ties")
    add("--run-dir", type=path, metavar="DIR",
        help="the run's folder (default: runs/ and a name made of the flags)")
    add("--minutes", type=number(0, above=True), metavar="M",
        help="choose the epochs of all stages, in the proportion of the defaults, and "
             "the interval so that the run ends within so many minutes on this "
             "machine; a trial of a few steps is measured first")
    add("--evaluate-every", type=whole(1), metavar="EPOCHS",
        help="evaluate on the test set every so many epochs of a stage, and at its "
             "planned end; the network stays the same, bit by bit")
    add("--save-every", type=number(0), metavar="MINUTES",
        help="save a checkpoint inside an epoch too, every so many minutes; a run that "
             "is killed loses no more than these, and no more than an epoch and 20 "
             "times what a checkpoint takes to write")
    add("--tensorboard", action="store_true",
        help="write the numbers of metrics.jsonl and updates.jsonl for TensorBoard "
             "too, into the run's folder (needs the package tensorboard)")
    add("--resume", action="store_true",
        help="go on where this run was stopped, or begin it")
    add("--overwrite", action="store_true",
        help="replace the run that is in the folder")
    add("--smoke", action="store_true",
        help="a trial of the whole script in seconds: a quarter of the width, a few "
             "batches, one epoch a stage, in a folder of its own")
    return parser


class Parser(argparse.ArgumentParser):
    """argparse without its usage lines: a wrong flag is one line and exit code 2.

    A flag that has no default here is in the result only where it was given. parse()
    adds the others.
    """

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False,
                         argument_default=argparse.SUPPRESS,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, argv=None):
        """Return the flags that were given. One that is not known is compared with
        those that are."""
        output.protect()
        argv = sys.argv[1:] if argv is None else list(argv)
        for word in argv:
            flag = word.split("=")[0]
            if flag.startswith("--") and flag not in self._option_string_actions:
                self.refuse(flag)
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.refuse(unknown[0])
        return args

    def refuse(self, flag):
        """Exit because of a flag that is not known."""
        near = []
        if len(flag) > 3:  # "--" is near to all short flags
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
        hint = f"Did you mean {near[0]}?" if near else "--help lists all flags"
        self.error(f"unrecognized arguments: {flag}, expected a flag of this script. "
                   f"{hint}")

    def error(self, message):
        message = message.removeprefix("argument ").replace(": is ", " is ", 1)
        message = message.replace(": ignored explicit argument", ": expected no value, "
                                  "leave out")
        leave(2, f"error: {' '.join(message.split())}", self.prog)


# ---- the values ----------------------------------------------------------------------


def parse(parser, argv, script, complete, run_name):
    """Return all flags of a script, a Namespace. Exit with code 2 if one is wrong.

    A value comes from the command line; else from the config.json of the run that is
    resumed; else from presets.py. --smoke then bounds some of them from above.

    script: the name of its column in presets.ROWS.
    complete(args, explicit): sets the flags whose defaults depend on other flags. It
    may raise ValueError. explicit: an Explicit.
    run_name(args): returns the name of the run's folder.
    """
    tables = {name: defaults_of(parser, name, script) for name in data.NAMES}
    for action in parser._actions:
        if action.dest == "optimizer":
            action.help += f". {presets.words_of_adam(script, data.NAMES)}"
    explain_defaults(parser, tables)
    since = time.monotonic()
    given = vars(parser.parse_args(argv))
    for one, other in (("init", "resume"), ("resume", "overwrite"),
                       ("minutes", "smoke"), *(("minutes", flag) for flag in given
                                               if flag.startswith("epochs_"))):
        if given.get(one) and given.get(other) is not None:
            other = other.replace("_", "-")
            parser.error(f"--{one} and --{other} exclude each other, expected one of "
                         f"them. Leave one out")

    args = resolve(parser, given, {}, script, complete)
    folder = Path(args.run_dir or Path("runs", folder_name(args, script, run_name)))
    if args.resume and (folder / "config.json").is_file():
        with exits(2, ValueError, OSError):
            config = read_config(folder, parser)
        for flag, value in given.items():
            may_differ = flag in MAY_DIFFER or flag == "run_dir"
            may_differ |= flag in PLACES and bool(config.get("data"))
            agrees = config.get(flag, value) in (value, getattr(args, flag))
            if not agrees and not may_differ:
                parser.error(
                    f"{folder} was made with --{flag.replace('_', '-')} "
                    f"{config[flag]}, this command says {value}. Leave the flag out, "
                    f"or name another --run-dir")
        not_kept = ("resume", "overwrite", "device", "run_dir")
        config = {flag: config[flag] for flag in vars(args).keys() & config.keys()
                  if flag not in not_kept}
        args = resolve(parser, given, config, script, complete)
    elif args.minutes is not None and may_be_made(folder, args):
        words = [str(planning.ROOT / f"prune_{script}.py"),
                 *(sys.argv[1:] if argv is None else map(str, argv))]

        def is_fit(chosen):
            try:
                attempt(parser, chosen | given, {}, script, complete)
            except ValueError:
                return False
            return True

        with exits(2, ValueError, OSError):
            require_one_process()
            chosen = planning.choose(words, args, args.minutes, is_fit, since)
        args = resolve(parser, chosen | given, {}, script, complete)
    args.run_dir = str(folder)
    if args.smoke and "run_dir" not in given and not args.resume:
        args.overwrite = True  # its folder holds nothing but such trials
    return args


def defaults_of(parser, dataset, script):
    """Return {flag: default} for a data set, of the flags that the parser knows."""
    known = {action.dest for action in parser._actions}
    return {flag: value for flag, value in presets.of(dataset, script).items()
            if flag in known}


def may_be_made(folder, args):
    """Return whether a new run may be made in a folder: it holds none, or one that
    --overwrite replaces."""
    return args.overwrite or not (folder / "config.json").exists()


def require_one_process():
    """Raise ValueError if torchrun started several processes, which a trial is not."""
    if processes.size() > 1:
        raise ValueError(f"--minutes is given, but torchrun started "
                         f"{processes.size()} processes, expected one: a trial "
                         f"measures one alone. Give the epochs by their flags")


def resolve(parser, given, config, script, complete):
    """Return all flags as a Namespace. Exit with code 2 if one is wrong."""
    with exits(2, ValueError):
        return attempt(parser, given, config, script, complete)


def attempt(parser, given, config, script, complete):
    """Return all flags as a Namespace. Raise ValueError if they do not fit together.

    given: {flag: value} of the command line. config: {flag: value} of the run that is
    resumed.
    """
    explicit = Explicit(given, config)
    dataset = explicit.get("dataset", presets.of("default")["dataset"])
    args = argparse.Namespace(**defaults_of(parser, dataset, script) | explicit)
    if args.smoke:
        for flag, bound in presets.smoke(script).items():
            if flag in args:
                setattr(args, flag, min(getattr(args, flag), bound))
    complete_optimizer(args, explicit, script)
    complete(args, explicit)
    return args


def complete_optimizer(args, explicit, script):
    """Set the flags that depend on --optimizer: Adam's lr and weight decay. Refuse
    --momentum beside it."""
    if args.optimizer == "sgd":
        return
    for flag, value in presets.of_adam(args.optimizer, args.dataset, script).items():
        if flag not in explicit:
            setattr(args, flag, value)
    usual = presets.of(args.dataset)["momentum"]
    set_unused(args, explicit, dict(momentum=usual), f"--optimizer {args.optimizer}")


class Explicit(dict):
    """{flag: value} of the command line, and of the config.json of a run that is
    resumed. kept: the flags of that run, which are not refused: it goes on as it
    began, also with a flag that is refused today."""

    def __init__(self, given, config):
        super().__init__(config | given)
        self.kept = config.keys()


def set_unused(args, explicit, unused, by):
    """Give flags that a run does not use their fixed values. Raise ValueError if one is
    given with another value: it would change nothing but the name of the run.

    explicit: an Explicit. unused: {flag: its fixed value}. by: what does not use them,
    in words. A flag of a run that is resumed keeps its value, which is in the name of
    the run.
    """
    for flag, value in unused.items():
        if flag in explicit.kept:
            continue
        if explicit.get(flag, value) != value:
            raise ValueError(f"--{flag.replace('_', '-')} is {explicit[flag]}, which "
                             f"{by} does not use. Leave one of them out")
        setattr(args, flag, value)


def folder_name(args, script, run_name):
    """Return the name of the run's folder: run_name(args), with the optimizer, the
    schedule and each size that is not the default before the seed. So runs of different
    sizes have different folders."""
    usual = presets.of(args.dataset, script)
    if args.smoke:
        usual |= presets.smoke(script)
    stem, seed = run_name(args).rsplit("-seed", 1)
    for flag in ("optimizer", "schedule"):
        value = getattr(args, flag)
        if value != usual[flag]:
            stem += f"-{value}"
    for flag, word in NAMED_SIZES.items():
        value = getattr(args, flag)
        if value != usual[flag]:
            stem += f"-{word}{value:g}"
    prefix = "smoke-" if args.smoke else ""
    return f"{prefix}{stem}-seed{seed}"


def explain_defaults(parser, tables):
    """Add the defaults to the help of each flag.

    First comes the default of the first data set, which all sets without a mention
    share, and then each other default with its data sets.
    tables: {data set: {flag: default}}.
    """
    for action in parser._actions:
        names_of = {}  # {default: data sets}
        for name, table in tables.items():
            value = table.get(action.dest)
            names_of.setdefault(None if value == [] else value, []).append(name)
        usual, *others = names_of
        if others or (usual is not None and usual is not False):
            shown = [] if usual is None else [str(usual)]
            shown += [f"{value}: {', '.join(names_of[value])}" for value in others]
            action.help += f" (default {'; '.join(shown)})"
        action.help = action.help.replace("%", "%%")


def read_config(folder, parser):
    """Return the config.json of a run, a dict, with its flags checked as on a command
    line.

    Raises ValueError if it is damaged or of another program, OSError if it cannot be
    read.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is damaged, expected a JSON object. Start again with "
                         f"--overwrite")
    known = NO_FLAGS | {action.dest for action in parser._actions}
    foreign = [key for key in config
               if key not in known and not key.startswith("version_")]
    made_by = config.get("script") or "something else"
    if foreign and made_by == Path(parser.prog).stem:  # flags of an older version
        if processes.rank() == 0:
            print(f"note: {file} holds {', '.join(foreign)}, which {parser.prog} no "
                  f"longer has: left out")
    elif foreign:
        raise ValueError(f"{file} holds {', '.join(foreign)}, which {parser.prog} does "
                         f"not know, expected the flags of a run of it; it was made by "
                         f"{made_by}. Go on by the script that made it, or name "
                         f"another --run-dir")
    config = presets.of_earlier(config)
    for action in parser._actions:
        wrong = wrong_in(action, config.get(action.dest))
        if wrong:
            raise ValueError(f"{file}: {action.dest} {wrong}. Correct it there, or "
                             f"name another --run-dir")
    return config


def wrong_in(action, value):
    """Return in words what is wrong with the value of a flag in a config.json, "is 3,
    expected ..."; "" where it could stand on a command line. None: it was not given."""
    if value is None:
        return ""
    is_list = action.nargs == "*"
    if is_list and not isinstance(value, list):
        return f"is {value}, expected a list"
    for item in value if is_list else [value]:
        try:
            if action.type is not None:
                action.type(str(item))
        except argparse.ArgumentTypeError as error:
            return str(error)
        if action.choices and item not in list(action.choices):
            return f"is {item}, expected one of {', '.join(action.choices)}"
        if action.type is None and not action.choices and not isinstance(item, bool):
            return f"is {item}, expected true or false"
    return ""


# ---- types of values -----------------------------------------------------------------
# argparse calls them with the text of a flag. A wrong value is an ArgumentTypeError.


def path(text):
    """Return a path, in which ~ is the user's own folder, also where the shell left it
    as it was."""
    if not text:
        raise argparse.ArgumentTypeError("is empty, expected a path")
    return os.path.expanduser(text)


def folder(text):
    """Return the path of a folder for results, which may not be there yet."""
    found = path(text)
    if os.path.exists(found) and not os.path.isdir(found):
        raise argparse.ArgumentTypeError(f"is {text}, a file, expected a folder")
    return found


def device(text):
    """Return the name of a device as torch takes it."""
    if not re.fullmatch(r"cpu|mps|cuda(:(0|[1-9]\d?))?", text):
        raise argparse.ArgumentTypeError(f"is {text}, expected cpu, cuda, cuda:0, "
                                         f"cuda:1 and so on, or mps")
    return text


def whole(low, high=2**31):
    """Return an argparse type: a whole number in [low, high)."""
    def convert(text):
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value < high:
            wanted = f"a whole number of at least {low}"
            if value >= high:
                wanted += f", below {high}"
            raise argparse.ArgumentTypeError(f"is {text}, expected {wanted}")
        return value
    return convert


def number(low, high=math.inf, above=False):
    """Return an argparse type: a finite number in [low, high), (low, high) if above."""
    if high < math.inf and above:
        wanted = f"a number above {low:g} and below {high:g}"
    elif high < math.inf:
        wanted = f"a fraction in [{low:g}, {high:g})"
    elif above:
        wanted = f"a finite number above {low:g}"
    else:
        wanted = f"a finite number of at least {low:g}"

    def convert(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        is_inside = math.isfinite(value) and low <= value < high
        if not is_inside or (above and value == low):
            hint = ""
            if high == 1 < value < 100:
                hint = f". For {value:g} % write {value / 100:g}"
            raise argparse.ArgumentTypeError(f"is {text}, expected {wanted}{hint}")
        return value
    return convert


# ---- errors --------------------------------------------------------------------------


@contextmanager
def exits(code, *errors, no_memory="Free some memory, or use another machine"):
    """Turn errors inside into one line on stderr and an exit code.

    errors: the classes of exceptions that count. Besides them, four always count: a
    process that is gone or disagrees, too little memory, what a device lacks, and
    Ctrl-C (exit code 130).
    no_memory: the advice for too little memory; SMALLER, where the script has these
    flags.
    """
    try:
        yield
    except (processes.Mismatch, *errors, MemoryError, RuntimeError,
            TypeError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if processes.is_loss(error):
            text = ("another rank is gone, expected all of them to the end. The last "
                    "checkpoint is kept: go on with --resume")
        elif is_out_of_memory(error):
            text = (f"the memory does not suffice ({text[:200]}), expected more of it. "
                    f"{no_memory}")
        elif is_missing_on_mps(error):
            text = (f"--device is mps, which lacks something that this run needs "
                    f"({text[:200]}), expected a device that has it. Set "
                    f"PYTORCH_ENABLE_MPS_FALLBACK=1, or write --device cpu")
        elif not isinstance(error, (processes.Mismatch, *errors)):
            raise
        leave(code, f"error: {text}")
    except KeyboardInterrupt:
        leave(130, "interrupted, nothing more is saved")


def leave(code, line, name=None):
    """Exit with a line on stderr, which one process writes for all.

    name: of the script, at the start of the line; None: of the one that runs.
    """
    if processes.speaks(code):
        print(f"{name or Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    raise SystemExit(code)
