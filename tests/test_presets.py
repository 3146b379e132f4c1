"""The table of presets: complete, without a misspelt setting, and open for a new row."""
import importlib
from importlib.util import find_spec

import pytest

import data
from helpers import one_line
from harness import flags, presets

SCRIPTS = [script for script in presets.LENGTH if find_spec(f"prune_{script}")]
COLUMNS = {"data", "weights", "channels", *presets.LENGTH}


def resolved(script, *given):
    """Return the flags of a script as its parse_args resolves them: {flag: value}."""
    return vars(importlib.import_module(f"prune_{script}").parse_args([*map(str, given)]))


def flags_of(script, monkeypatch):
    """Return the names of a script's flags, and the column whose defaults it asks for."""
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(flags, "parse", lambda *given: asked.extend(given))
        importlib.import_module(f"prune_{script}").parse_args([])
    parser, _, column, *_ = asked
    return {action.dest for action in parser._actions} - {"help"}, column


def test_every_data_set_has_a_row():
    assert {"default", *data.NAMES} == {*presets.ROWS, "fashion-mini"}
    assert presets.of("default")["dataset"] == "fashion-mini"
    for row in (*presets.ROWS.values(), presets.SMOKE):
        assert row.keys() <= COLUMNS
    assert COLUMNS == presets.ROWS["default"].keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_are_flags_and_flags_have_defaults(script, monkeypatch):
    known, column = flags_of(script, monkeypatch)
    assert column == script
    aside = presets.NOT_FLAGS.get(script, set())
    # what `channels` calls pretraining is their stage `prune`
    only = {"epochs_pretrain"} if script in presets.FROM_THE_START else set()
    for name, row in (*presets.ROWS.items(), ("smoke", presets.SMOKE)):
        assert row.get(script, {}).keys() <= known | aside, name
        assert row.get("data", {}).keys() <= known, name
        if presets.LENGTH[script] in row:  # not every script has updates at an interval
            assert row[presets.LENGTH[script]].keys() <= known | {"interval"} | only, name
    usual = presets.of("default", script)
    assert known | aside <= usual.keys() <= known | aside | {"interval"}
    assert not aside & known
    assert resolved(script).keys() == known


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_new_data_set_is_one_row(script, monkeypatch, capsys):
    monkeypatch.setitem(presets.ROWS, "birds", dict(
        data=dict(model="resnet19", time_steps=6, crop=3),
        weights=dict(epochs_prune=30, epochs_finetune=40, interval=50),
        channels=dict(epochs_pretrain=20, epochs_finetune=40)))
    args = resolved(script, "--dataset", "birds")
    assert (args["model"], args["time_steps"], args["crop"]) == ("resnet19", 6, 3)
    assert args["epochs_finetune"] == 40 and args["batch_size"] == 64
    if presets.LENGTH[script] == "weights":
        assert args["epochs_prune"] == 30 and args.get("interval", 50) == 50
    else:
        assert args.get("epochs_pretrain", args.get("epochs_prune")) == 20
    assert resolved(script, "--dataset", "a/path.npz")["epochs_finetune"] != 40

    monkeypatch.setattr(data, "NAMES", (*data.NAMES, "birds"))  # its reader in data.py
    with pytest.raises(SystemExit):
        resolved(script, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "birds, or a path" in shown
    assert "6: birds)" in shown and "None" not in shown


def test_settings_of_the_papers():
    args = resolved("unstructured", "--dataset", "cifar100")
    assert (args["model"], args["time_steps"], args["batch_size"]) == ("vgg16", 5, 128)
    assert (args["epochs_prune"], args["epochs_finetune"], args["interval"]) == (200, 300, 2000)
    assert (args["lr"], args["weight_decay"], args["regen"]) == (0.3, 5e-4, 0.5)
    args = resolved("unstructured", "--dataset", "tiny-imagenet", "--sparsity", 0.98)
    assert (args["epochs_prune"], args["epochs_finetune"], args["regen"]) == (50, 100, 0.05)
    args = resolved("structured", "--dataset", "cifar100")
    assert (args["epochs_pretrain"], args["epochs_finetune"], args["l1"]) == (160, 160, 1e-4)
    args = resolved("gradr", "--dataset", "cifar10")
    assert (args["model"], args["epochs_prune"], args["lr"]) == ("gradr-conv", 2048, 1e-4)
    assert resolved("gradr", "--dataset", "mnist")["lr"] == 1e-3
    args = resolved("gradr", "--dataset", "cifar100", "--optimizer", "sgd")
    assert (args["lr"], args["weight_decay"]) == (0.3, 5e-4)
    args = resolved("sdsnn", "--dataset", "mnist")
    assert (args["encoding"], args["optimizer"], args["lr"]) == ("rate", "adam", 1e-3)
    rules = {name: presets.of(name, "sdsnn")["rules"] for name in data.NAMES}
    assert rules["n-mnist"]["alpha"] == (1, 7.5e-4) and rules["cifar100"]["few"]["conv"] == 20
    assert rules["dvs-gesture"]["percentile"] == dict(conv=65, fc=55)
    assert resolved("lottery", "--dataset", "cifar10")["budget"] == "full"
    assert resolved("pq", "--dataset", "cifar10-dvs")["mode"] == "adaptive"


def test_columns_of_the_scripts_beside_the_papers():
    """GraNet trains as long as Algorithm 1, GReg as long as Algorithm 2 and one stage more."""
    lengths = "epochs_prune", "epochs_finetune", "interval"
    for name in data.NAMES:
        granet, greg = presets.of(name, "granet"), presets.of(name, "greg")
        alone = presets.of(name, "unstructured")
        assert {flag: granet[flag] for flag in lengths} == {flag: alone[flag] for flag in lengths}
        assert (granet["sparsity"], granet["death_rate"]) == (0.9, 0.5)
        assert not granet.keys() & {"regen", "metric", "aggregate", "candidates"}
        alone = presets.of(name, "structured")
        for flag in ("epochs_pretrain", "epochs_finetune"):
            assert greg[flag] == alone[flag]
        assert (greg["method"], greg["prune_ratio"], greg["weight_decay"]) == ("greg1", None, 5e-4)
        assert not greg.keys() & {"l1", "regen", "metric", "regen_base"}
    assert presets.of("cifar100", "greg")["epochs_prune"] == 282
    assert presets.of("default", "greg")["epochs_prune"] == 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_trial_is_bounded(script):
    # the epochs of lottery's full budget follow from each other after the bounds
    budget = ["--budget", "matched"] if script == "lottery" else []
    for name in data.NAMES:
        args = resolved(script, "--dataset", name, "--smoke", *budget)
        for flag, bound in presets.smoke(script).items():
            if flag in args:
                assert args[flag] <= bound, (name, flag)
        assert args["width"] == 0.25 and args["epochs_finetune"] <= 1


def test_flags_of_the_surrogate_and_the_reset(capsys):
    args = resolved("unstructured")
    assert args["alpha"] is None and args["detach_reset"] is None
    args = resolved("unstructured", "--alpha", "4", "--no-detach-reset")
    assert (args["alpha"], args["detach_reset"]) == (4.0, False)
    assert args["run_dir"] == resolved("unstructured")["run_dir"]
    assert resolved("unstructured", "--detach-reset")["detach_reset"] is True
    for wrong in ("0", "-1", "nan", "x"):
        with pytest.raises(SystemExit) as stop:
            resolved("unstructured", "--alpha", wrong)
        assert stop.value.code == 2
        assert f"--alpha is {wrong}, expected a finite number above 0" in one_line(capsys)
