"""Presets: the defaults of all flags. A row is a data set, a column a script.

    presets.of("cifar100", "unstructured")    # {flag: default} of prune_unstructured.py
    presets.of("cifar100")                    # of the flags that all scripts share
    presets.smoke("unstructured")             # {flag: upper bound} under --smoke

A row is a dict of columns, and a column is a dict of settings:

    data       the flags that all scripts share
    weights    the length of a run that prunes weights: epochs with a changing mask and
               with a fixed one, iterations between two updates
    channels   the length of a run that prunes channels: epochs before and after the cut
    NAME       the settings of prune_NAME.py alone; they override the columns above

The row "default" has every setting. It is the row of fashion-mini (the embedded
images), of paths, and of data sets without a row of their own. Another row has the
settings that differ from it.

To add a data set, add its name to data.NAMES, with a reader there if its format is its
own, and write a row with `data`, `weights` and `channels`. Settings that a paper gives
for the data set go into that paper's column.
"""
# {script: the column with the length of its runs}
LENGTH = {"unstructured": "weights", "granet": "weights", "lottery": "weights",
          "gradr": "weights", "sdsnn": "weights", "pq": "weights",
          "stds": "weights", "upr": "weights", "ndsnn": "weights",
          "structured": "channels", "greg": "channels", "sca": "channels"}

# Scripts that prune channels from the start: their stage `prune` is as long as the
# others' pretraining
FROM_THE_START = ("sca",)

# {script: its settings that are no flags}. --help and config.json do not show them. The
# script reads them: presets.of(args.dataset, "sdsnn")["rules"]
#   regen_rates  the regeneration rate r of the paper for each sparsity that it lists
#   adam_lr      the learning rate under --optimizer adam; adamw_lr: under adamw
#   rules        the numbers of SD-SNN's rules
NOT_FLAGS = {"unstructured": {"regen_rates"}, "gradr": {"adam_lr"},
             "sdsnn": {"adamw_lr", "rules"}, "stds": {"adam_lr"}}

# {optimizer: its settings}, where no column has others. INTERPRETATION: the papers'
# baselines use SGD; these are torch's own defaults
OPTIMIZERS = {"sgd": {},  # those of the data set
              "adam": dict(lr=1e-3, weight_decay=0.0),
              "adamw": dict(lr=1e-3, weight_decay=0.01)}

# The paper's regeneration rate r for each share p of the channels that it lists, by
# network: {network: {p: r}}. The first p is the default of prune_structured.py.
# Networks that are not here have the values of `small`
CHANNEL_RATES = {"vgg16": {0.4522: 0.1, 0.6764: 0.05},
                 "resnet19": {0.512: 0.3, 0.658: 0.1},
                 "small": {0.5: 0.3}}
CHANNEL_RATES |= {"vgg16-avg": CHANNEL_RATES["vgg16"],
                  "resnet19-pre": CHANNEL_RATES["resnet19"]}

# SD-SNN's rules, those of its own repository, by kind of layer: convolution or fully
# connected. Brain-Cog's copy for CIFAR-10 has other numbers: a first rate of 2 % for
# fully connected layers, `few` = 50, a constraint from epoch 19 on
#   alpha        early and late factor on the growth of a fully connected layer's rate
#   divisor      that growth is divided by it
#   percentile   a masked synapse above this percentile of its layer may come back
#   count        (c) once it was above for so many epochs in a row
#   few          a neuron with fewer live synapses counts as pruned
# and of --mode official alone:
#   clamp        the first epoch with the synaptic constraint, in runs of 300 epochs or
#                more; None: 19, as in all modes
#   moves        the kinds of layers whose ranges move
MNIST_RULES = dict(alpha=(1, 7.5e-4), divisor=10, percentile=dict(conv=65, fc=60),
                   count=dict(conv=18, fc=10), few=dict(conv=10, fc=20),
                   clamp=None, moves=("conv", "fc"))
CIFAR_RULES = dict(alpha=(0.5, 5e-4), divisor=10, percentile=dict(conv=65, fc=60),
                   count=dict(conv=18, fc=18), few=dict(conv=20, fc=20),
                   clamp=6, moves=("fc",))

ROWS = {
    # Augmentation is LTH-SNN's crop and flip. In a short run on centred 28x28 images
    # the accuracy is higher without crops
    "default": dict(
        data=dict(
            dataset="fashion-mini", data_dir="data", train_limit=None,
            crop=0, flip=True, cutout=0, rotate=0.0, encoding="direct",
            event_split=None,  # of recordings alone
            model="small", width=1.0, time_steps=4, init=None,
            # the neuron; None: the network's own
            tau=None, threshold=None, alpha=None, surrogate=None, reset=None,
            detach_reset=None, decay_input=None, strict=None,
            batch_size=64, lr=0.1, loss="ce", schedule="cosine", optimizer="sgd",
            momentum=0.9, weight_decay=5e-4,
            device=None, precision="fp32", compile=False, sync_bn=False, seed=0,
            run_dir=None, minutes=None, evaluate_every=1, save_every=10.0,
            tensorboard=False, resume=False, overwrite=False, smoke=False),
        weights=dict(epochs_prune=8, epochs_finetune=4, interval=25),
        channels=dict(epochs_pretrain=8, epochs_finetune=8),
        unstructured=dict(
            sparsity=0.9, regen=None, metric="criticality", aggregate="max",
            candidates="all", as_published=[],
            regen_rates={0.90: 0.5, 0.95: 0.2, 0.98: 0.1}),  # {sparsity: r}
        # GraNet's code (arXiv 2106.10404) has the death rate 0.5 at any sparsity
        granet=dict(sparsity=0.9, death_rate=0.5),
        # l1: a short run needs more than the paper's 1e-4. Over a stage the penalty
        # moves a gamma by l1 * sum(lr) / (1 - momentum), and a gamma starts at 1 and
        # must reach 0. INTERPRETATION of weight_decay: the paper gives none here; this
        # is that of network slimming. published code: 0
        structured=dict(
            method="criticality", metric="criticality", regen_base="kept",
            prune_ratio=None, regen=None, target_macs=None, l1=3e-3, finetune_l1=False,
            weight_decay=1e-4, schedule="step", as_published=[]),
        greg=dict(
            method="greg1", prune_ratio=None, target_macs=None, epochs_prune=4,
            schedule="step"),
        # interval None: an epoch. INTERPRETATION of regen: what third-party code
        # returns, a tenth of all channels, with nine tenths kept
        sca=dict(prune_ratio=None, target_macs=None, regen=0.1, potential="post",
                 interval=None),
        # matched: the epochs of the criticality paper. full: those of LTH-SNN's code
        lottery=dict(
            method="imp", search="imp", budget="matched", sparsity=0.9, rounds=4,
            epsilon=0.02, distance="entries",  # of EB
            kl_ratio=0.6),  # of ET
        # lr None: adam_lr; under --optimizer sgd the lr of the data set.
        # INTERPRETATION of adam_lr: 1e-3, as in Grad R's MNIST script; its README says
        # 1e-4
        gradr=dict(
            method="gradr", mode="matched", sparsity=0.9, optimizer="adam", prior=None,
            temperature=None, lr=None, weight_decay=None, adam_lr=1e-3),
        # SGD, as all methods here; Adam is the published optimiser
        stds=dict(
            mode="matched", sparsity=0.9, dead_zone=None, ramp="sine", adam_lr=1e-3,
            as_published=[]),
        # rate_conv, rate_fc: shares of the neurons that the first update prunes. The
        # paper has these values for MNIST and those of the row "cifar10" for CIFAR-10
        sdsnn=dict(
            mode="fixed", growth="signed", sparsity=0.9, rate_conv=0.05, rate_fc=0.35,
            adamw_lr=2.44e-4, rules=MNIST_RULES),
        upr=dict(sparsity=0.9, neurons=False, mode="matched", price=None, mask_lr=None,
                 as_published=[]),
        # INTERPRETATION of "every so many iterations": rewiring stops at 3/4 of the
        # epochs, after some 34 updates. In adaptive mode an update removes
        # (1 - rho) * 15.3 % of a layer with Gaussian weights, so that 34 updates lead
        # from a connectivity of 50 % to the reported 30 %. An update in each of 500
        # epochs would empty the network.
        # INTERPRETATION of eta: the paper's rewiring coefficient alpha_r = 0.001
        pq=dict(
            mode="matched", sparsity=0.9, rho=0.9, scope="layer", growth="momentum",
            start="er", density=0.5, eta=0.001,
            epochs_prune=9, epochs_finetune=3, interval=25),
        # INTERPRETATION: the paper's numbers are not known. Those of GraNet from a
        # sparse start; epochs and interval are those of all methods
        ndsnn=dict(
            sparsity=0.9, density=0.5, growth="gradient", drop_rate=0.5,
            densities="erk")),

    "mnist": dict(
        data=dict(batch_size=128, crop=2, flip=False),  # digits must not be mirrored
        weights=dict(epochs_prune=6, epochs_finetune=4, interval=90),
        channels=dict(epochs_pretrain=6, epochs_finetune=6),
        structured=dict(l1=1e-3),
        greg=dict(epochs_prune=3),
        # Grad R's own. INTERPRETATION: its shifts by 0.15 of the side are crops by 4
        # pixels, and images are not scaled (0.85 to 1.11 there)
        gradr=dict(
            mode="paper", sparsity=0.95, model="gradr-linear", time_steps=8, loss="mse",
            crop=4, rotate=30, epochs_prune=512, epochs_finetune=0, interval=2000),
        # SD-SNN's own
        sdsnn=dict(
            model="sdsnn-small", encoding="rate", time_steps=20, loss="mse", crop=0,
            optimizer="adam", batch_size=100, epochs_prune=300, epochs_finetune=0,
            sparsity=0.0),
        pq=dict(epochs_prune=7, epochs_finetune=3, interval=95)),

    "fashion-mnist": dict(
        data=dict(batch_size=128),
        weights=dict(epochs_prune=6, epochs_finetune=4, interval=90),
        channels=dict(epochs_pretrain=6, epochs_finetune=6),
        structured=dict(l1=1e-3),
        greg=dict(epochs_prune=3),
        pq=dict(epochs_prune=7, epochs_finetune=3, interval=95)),

    # cifar10, cifar100, tiny-imagenet: the settings of the criticality paper; `data` is
    # its Table 4
    "cifar10": dict(
        data=dict(model="vgg16", time_steps=5, batch_size=128, lr=0.3, crop=4),
        weights=dict(epochs_prune=200, epochs_finetune=300, interval=2000),
        channels=dict(epochs_pretrain=160, epochs_finetune=160),
        structured=dict(l1=1e-4),
        # GReg's 100,000 iterations of growing and 10,000 of stabilising, at batch 128
        greg=dict(epochs_prune=282),
        lottery=dict(budget="full"),
        gradr=dict(  # Grad R's own
            mode="paper", sparsity=0.95, model="gradr-conv", time_steps=8, loss="mse",
            batch_size=16, epochs_prune=2048, epochs_finetune=0, interval=20_000,
            adam_lr=1e-4),
        stds=dict(  # STDS's own
            mode="paper", model="gradr-conv", time_steps=8, loss="mse", batch_size=16,
            epochs_prune=2048, epochs_finetune=0, interval=20_000, optimizer="adam",
            schedule="constant", adam_lr=1e-4),
        # SD-SNN's own. loss: its code has UnilateralMse, which discards what it clips:
        # it equals mse, that of the rate. Its images are augmented further there
        # (RandAugment, jittered colours, erased patches)
        sdsnn=dict(
            model="sdsnn-large", time_steps=8, loss="mse", optimizer="adamw",
            batch_size=50, epochs_prune=600, epochs_finetune=0, sparsity=0.0,
            rate_conv=0.005, rate_fc=0.03, rules=CIFAR_RULES),
        # The reported results are of ResNet-19 and T = 2. INTERPRETATION: of the two
        # networks of that name, LTH-SNN's
        pq=dict(
            model="resnet19", time_steps=2, epochs_prune=375, epochs_finetune=125,
            interval=4000)),

    "cifar100": dict(
        data=dict(model="vgg16", time_steps=5, batch_size=128, lr=0.3, crop=4),
        weights=dict(epochs_prune=200, epochs_finetune=300, interval=2000),
        channels=dict(epochs_pretrain=160, epochs_finetune=160),
        structured=dict(l1=1e-4),
        greg=dict(epochs_prune=282),
        lottery=dict(budget="full"),
        gradr=dict(adam_lr=1e-4),
        sdsnn=dict(
            time_steps=8, epochs_prune=600, epochs_finetune=0, sparsity=0.0,
            rate_conv=0.005, rate_fc=0.03, rules=CIFAR_RULES),
        pq=dict(
            model="resnet19", time_steps=2, epochs_prune=375, epochs_finetune=125,
            interval=4000)),

    "tiny-imagenet": dict(
        data=dict(model="vgg16", time_steps=5, batch_size=128, lr=0.3, crop=8),
        # INTERPRETATION: 100 epochs of fine-tuning, as in the appendix; the main text
        # says 150
        weights=dict(epochs_prune=50, epochs_finetune=100, interval=1000),
        channels=dict(epochs_pretrain=160, epochs_finetune=160),
        unstructured=dict(regen_rates={0.90: 0.3, 0.95: 0.1, 0.98: 0.05}),
        structured=dict(l1=1e-4),
        greg=dict(epochs_prune=282),
        gradr=dict(adam_lr=1e-4),
        sdsnn=dict(
            time_steps=8, rate_conv=0.005, rate_fc=0.03, rules=CIFAR_RULES),
        pq=dict(epochs_prune=112, epochs_finetune=38, interval=2500)),

    # Event cameras: frames of counts. The criticality paper has no such data.
    # INTERPRETATION of `weights`: n-mnist as mnist; the others make some 40 updates, in
    # two fifths of the epochs
    "n-mnist": dict(
        # T and the split by number are SD-SNN's. Its code names this crop and rotation
        data=dict(encoding="events", event_split="number", time_steps=20,
                  batch_size=100, crop=4, flip=False, rotate=10.0),
        weights=dict(epochs_prune=6, epochs_finetune=4, interval=90),
        channels=dict(epochs_pretrain=6, epochs_finetune=6),
        structured=dict(l1=1e-3),
        greg=dict(epochs_prune=3),
        # published code: the crop and the rotation are never passed to the data set
        sdsnn=dict(
            model="sdsnn-small", loss="mse", optimizer="adam", epochs_prune=300,
            epochs_finetune=0, sparsity=0.0, rate_fc=0.45, crop=0, rotate=0.0),
        pq=dict(epochs_prune=7, epochs_finetune=3, interval=95)),

    "dvs-gesture": dict(
        # T, the split by number, crop and rotation are SD-SNN's
        data=dict(encoding="events", event_split="number", time_steps=64,
                  batch_size=16, crop=16, flip=False, rotate=5.0),
        weights=dict(epochs_prune=80, epochs_finetune=120, interval=136),
        channels=dict(epochs_pretrain=160, epochs_finetune=160),
        structured=dict(l1=1e-4),
        greg=dict(epochs_prune=282),
        gradr=dict(epochs_prune=200, epochs_finetune=300, interval=300),
        sdsnn=dict(
            model="sdsnn-small", loss="mse", optimizer="adam", batch_size=4,
            epochs_prune=300, epochs_finetune=0, sparsity=0.0, rate_fc=0.6,
            rules=MNIST_RULES | dict(divisor=11, percentile=dict(conv=65, fc=55))),
        pq=dict(epochs_prune=150, epochs_finetune=50, interval=300)),

    "cifar10-dvs": dict(
        # T and the network are PQ's. INTERPRETATION of its augmentation: crops and
        # flips, as with CIFAR; of its frames: by number, as in TET's code
        data=dict(encoding="events", event_split="number", model="vggsnn",
                  time_steps=10, crop=4),
        weights=dict(epochs_prune=80, epochs_finetune=120, interval=282),
        channels=dict(epochs_pretrain=160, epochs_finetune=160),
        structured=dict(l1=1e-4),
        greg=dict(epochs_prune=282),
        gradr=dict(epochs_prune=200, epochs_finetune=300, interval=300),
        sdsnn=dict(
            epochs_prune=300, epochs_finetune=0, sparsity=0.0, rate_conv=0.005,
            rate_fc=0.03, rules=CIFAR_RULES),
        # the paper's setting: its index decides how much is pruned, in 300 epochs
        pq=dict(
            mode="adaptive", epochs_prune=225, epochs_finetune=75, interval=930)),
}

# --smoke: upper bounds, in the columns of a row
SMOKE = dict(
    data=dict(width=0.25, batch_size=16),
    weights=dict(epochs_prune=1, epochs_finetune=1, interval=4),
    channels=dict(epochs_pretrain=1, epochs_finetune=1),
    greg=dict(epochs_prune=1),
    sca=dict(epochs_prune=2),
    lottery=dict(epochs_prune=4, rounds=2),
    sdsnn=dict(epochs_prune=5))


def of(dataset, script=None):
    """Return {setting: default} of a script for a data set.

    dataset: a name or a path. script: its column, such as "unstructured" for
    prune_unstructured.py; None: only the flags that all scripts share. Raises KeyError
    for an unknown script. The row's `data` comes before the script's column in
    "default": where that sets lr or weight_decay, the row must do so in that column.
    """
    default, row = ROWS["default"], ROWS.get(dataset, {})
    settings = default["data"] | row.get("data", {})
    if script is None:
        return settings
    # the row comes last: its `weights` override the script's column in "default"
    for columns in (default, row):
        settings |= columns.get(LENGTH[script], {}) | columns.get(script, {})
    if script in FROM_THE_START:
        settings["epochs_prune"] = settings.pop("epochs_pretrain")
    return settings


def of_adam(optimizer, dataset, script):
    """Return {flag: default} of the flags that depend on the optimizer, "adam" or
    "adamw": lr and weight_decay."""
    own = of(dataset, script).get(f"{optimizer}_lr")
    settings = dict(OPTIMIZERS[optimizer])
    if own is not None:
        settings["lr"] = own
    return settings


def words_of_adam(script, names):
    """Return the defaults of Adam and AdamW in words, for --help. names: of the data
    sets; those that differ from the first are named."""
    words = []
    for optimizer in ("adam", "adamw"):
        names_of = {}  # {lr: data sets}
        for name in names:
            lr = of_adam(optimizer, name, script)["lr"]
            names_of.setdefault(lr, []).append(name)
        usual, *others = names_of
        rates = "; ".join([f"{usual:g}", *(f"{lr:g}: {', '.join(names_of[lr])}"
                                           for lr in others)])
        decay = OPTIMIZERS[optimizer]["weight_decay"]
        words.append(f"{optimizer}: lr {rates}, weight decay {decay:g}")
    return ". ".join(words)


def of_earlier(config):
    """Return the config.json of an earlier run with the values that its defaults had
    then, where today's differ or depend on the script.

    A run without an optimizer or a schedule had the only one of its script.
    A run whose config.json has no event_split had frames by time, but of cifar10-dvs
    by number, and other neurons in SD-SNN's networks. Those of sdsnn-large had learnt
    time constants behind linear layers too: an unfinished run of it cannot go on.
    """
    of_channels = "epochs_pretrain" in config or "prune_ratio" in config
    only = dict(optimizer="sgd", schedule="step" if of_channels else "cosine")
    config = only | config
    if "event_split" in config:
        return config
    then = {}
    if config.get("dataset") in ("n-mnist", "dvs-gesture"):
        then["event_split"] = "time"
    elif config.get("dataset") == "cifar10-dvs":
        then["event_split"] = "number"
    if config.get("model") == "sdsnn-small":
        then["detach_reset"] = True
    elif config.get("model") == "sdsnn-large":
        then |= dict(threshold=0.5, strict=False)
    given = {flag: value for flag, value in config.items() if value is not None}
    return config | then | given


def changed_since(config):
    """Return what an earlier, unfinished run had that is another thing now, so that it
    cannot go on, in words; "" if there is no such thing."""
    if "event_split" not in config and config.get("mode") == "official":
        return "what --mode official does"
    return ""


def nearest(listed, value):
    """Return what is listed, {number: anything}, for the number nearest to a value."""
    return listed[min(listed, key=lambda number: abs(number - value))]


def channel_rates(model):
    """Return the paper's regeneration rates of the channels of a network, {p: r}."""
    return CHANNEL_RATES.get(model, CHANNEL_RATES["small"])


def smoke(script):
    """Return {flag: upper bound} for the flags of a script under --smoke."""
    return SMOKE["data"] | SMOKE[LENGTH[script]] | SMOKE.get(script, {})
