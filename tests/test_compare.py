"""compare.py: the commands that it starts, its table against the summaries, failures, resuming."""
import colorsys
import csv
import importlib
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

import compare
import data
import helpers
from harness import groups
from harness import jobs
from harness import records
from harness import runfolder
from helpers import one_line

ROOT = Path(__file__).parent.parent
TINY = ("--dataset few.npz --width 0.25 --time-steps 2 --batch-size 16 --epochs-prune 1 "
        "--epochs-finetune 1 ").split()


@pytest.fixture
def few():
    x = np.random.default_rng(0).integers(0, 256, (96, 16, 16), dtype=np.uint8)
    y = np.arange(96) % 4
    np.savez("few.npz", x_train=x[:64], y_train=y[:64], x_test=x[64:], y_test=y[64:])


@pytest.fixture
def two_methods(monkeypatch):
    """Two methods, whose runs are processes in which torch is imported already."""
    def run(words, stdout, stderr, env):
        assert words[0] == sys.executable and stderr == "with stdout"
        assert int(env["OMP_NUM_THREADS"]) >= 1
        process = helpers.fork(helpers.run_as_typed, words[1:], Path.cwd(), stdout.name)
        process.join()
        return SimpleNamespace(returncode=process.exitcode)

    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(run=run, STDOUT="with stdout"))
    monkeypatch.setattr(compare, "WEIGHTS", dict(
        dense=compare.WEIGHTS["dense"] + " --interval 2",
        gmp=compare.WEIGHTS["gmp"] + " --interval 2"))
    monkeypatch.setattr(compare, "CHANNELS", {})


def test_a_log_takes_a_name_that_is_no_text():
    words = [sys.executable, "-c", "pass", "caf\udce9.npz"]
    jobs.run_all([jobs.Job(Path("one"), words, "one")], 1)
    assert "caf" in Path("one.log").read_text(encoding="utf-8")


def test_the_commands_are_those_of_the_scripts():
    small = ("--dataset few.npz --width 0.25 --time-steps 4 --epochs-prune 4 "
             "--epochs-finetune 2 --sparsity 0.9 0.95 --seeds 2").split()
    args = compare.parse_args(small)
    jobs = [job[:2] for job in compare.plan(args)]
    assert len({folder for folder, _ in jobs}) == len(jobs) == 2 * (1 + 2 * 18 + 6)
    methods = set()
    for folder, words in jobs:
        script = importlib.import_module(Path(words[1]).stem)
        parsed = script.parse_args(words[2:])
        assert parsed.run_dir == str(folder) and parsed.resume and parsed.dataset == "few.npz"
        assert folder.name.endswith(f"-seed{parsed.seed}") and parsed.time_steps == 4
        if folder.name.startswith("channels-"):
            assert Path(words[1]).stem in ("prune_structured", "prune_greg", "prune_sca")
            assert parsed.target_macs == (None if "dense" in folder.name else 0.7)
            first = "epochs_prune" if "sca" in folder.name else "epochs_pretrain"
            assert getattr(parsed, first) == parsed.epochs_finetune == 4
        else:
            wanted = 0 if "dense" in folder.name else 0.95 if "-0.95-" in folder.name else 0.9
            assert parsed.sparsity == wanted
            if Path(words[1]).stem == "prune_ndsnn":  # SET and RigL: at a constant density
                assert script.method_of(parsed) == folder.name.partition("-")[0]
            assert (parsed.epochs_prune, parsed.epochs_finetune) == (4, 2)
        methods.add(folder.name.rsplit("-seed")[0].split("-0.9")[0])
    assert methods == {*compare.WEIGHTS, "channels-dense", *(
        f"channels-{name}-macs0.7" for name in compare.CHANNELS if name != "dense")}


def test_the_budget_and_the_network_are_equal_where_papers_differ():
    for folder, words, _ in compare.plan(compare.parse_args(["--dataset", "cifar100"])):
        parsed = importlib.import_module(Path(words[1]).stem).parse_args(words[2:])
        assert (parsed.model, parsed.time_steps) == ("vgg16", 5)
        if not folder.name.startswith("channels"):
            assert (parsed.epochs_prune, parsed.epochs_finetune) == (200, 300)


def test_a_comparison_from_end_to_end(few, two_methods, monkeypatch, capfd):
    tables = compare.main([*TINY, "--seeds", "2", "--jobs", "2", "--out", "out"])
    (rows,) = tables.values()
    summaries = {}
    for row in rows:
        name = row["method"] + "-0.9" * (row["method"] == "gmp")
        mine = [json.loads(Path(f"out/{name}-seed{seed}/summary.json").read_text())
                for seed in (0, 1)]
        assert row["seeds"] == "0 1" and all(list(one) == runfolder.SUMMARY_KEYS for one in mine)
        accuracies = [100 * one["test_accuracy"] for one in mine]
        assert row["accuracy"] == pytest.approx(statistics.mean(accuracies))
        assert row["std"] == pytest.approx(statistics.stdev(accuracies))
        for key, factor in dict(sparsity=100, sops=1e-3, macs=1e-6, energy_mj=1e3).items():
            mean = factor * statistics.mean(one[key] for one in mine)
            assert row[key.removesuffix("_mj")] == pytest.approx(mean)
        summaries[row["method"]] = mine
    cost = {name: statistics.mean(one["training_cost"] for one in mine)
            for name, mine in summaries.items()}
    assert {row["method"]: row["training_cost"] for row in rows} == {
        "dense": 1, "gmp": pytest.approx(cost["gmp"] / cost["dense"])}
    text = Path("out/compare.md").read_text()
    assert text.count("| gmp | 90 % sparse | ") == 1 and text in capfd.readouterr().out
    assert "not finished" not in text
    with open("out/compare.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == [row["method"] for row in rows]
    assert {row["test accuracy (%)"] for row in table} == {str(row["accuracy"]) for row in rows}
    assert {row["rescued (%)"] for row in table} == {""}  # "-" in the table
    assert Path("out/compare.png").exists() and Path("out/compare.pdf").exists()

    def never(*_, **__):
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr(jobs, "subprocess", SimpleNamespace(run=never, STDOUT=-2))
    assert compare.main([*TINY, "--seeds", "2", "--out", "out"]) == tables
    assert compare.main(["--runs", "out"]) == tables


def words_of(*given):
    return [(job.folder.name, job.words) for job in compare.plan(compare.parse_args(given))]


@pytest.mark.parametrize("dataset", ["cifar10", "fashion-mini"])
def test_a_run_that_is_there_has_the_flags_of_its_command(dataset):
    """Whatever a script makes of them: for each method, config.json holds what was typed."""
    planned = compare.plan(compare.parse_args(["--dataset", dataset, "--seeds", "1"]))
    for folder, words, _ in planned:
        config = vars(importlib.import_module(Path(words[1]).stem).parse_args(words[2:]))
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
    jobs.require_same_flags(planned)


@pytest.mark.parametrize("given, flag, made, now", [
    ("--epochs-prune 4", "epochs-prune", 8, 4), ("--epochs-finetune 9", "epochs-finetune", 4, 9),
    ("--dataset mnist", "dataset", "fashion-mini", "mnist"), ("--width 0.5", "width", "1.0", 0.5),
    ("--train-limit 300", "train-limit", None, 300), ("--precision bf16", "precision", "fp32",
                                                      "bf16")])
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_of_other_flags_is_not_taken_for_one_of_these(given, flag, made, now, is_finished,
                                                            capsys, monkeypatch):
    monkeypatch.setattr(jobs, "run_all", None)  # nothing is started
    images = SimpleNamespace(x_train=torch.zeros(1, 1, 1, 1))
    monkeypatch.setattr(data, "load", lambda *_, **__: images)
    given = given.split()
    for first, then, before, after in (([], given, made, now), (given, [], now, made)):
        shutil.rmtree("out", ignore_errors=True)
        common = "--methods gmp --seeds 1 --out out".split()
        ((_, words),) = words_of(*common, *first)
        config = vars(importlib.import_module("prune_unstructured").parse_args(words[2:]))
        folder = Path("out/gmp-0.9-seed0")
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        if is_finished:
            (folder / "summary.json").write_text("{}")
        for more in ([], ["--dry-run"]):
            with pytest.raises(SystemExit) as stopped:
                compare.main([*common, *then, *more])
            error = one_line(capsys)
            assert stopped.value.code == 2 and f"error: {folder} was made with --" in error
            assert f"--{flag} {before}, this command has {after}, expected the same. " in error


def test_moved_data_and_another_device_are_no_other_flags():
    ((name, words),) = words_of(*"--methods gmp --seeds 1 --dataset few.npz --device cpu".split())
    config = vars(importlib.import_module("prune_unstructured").parse_args(words[2:]))
    folder = Path("runs/compare", name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | dict(
        dataset="there/few.npz", data_dir="x", device="cuda")))
    jobs.require_same_flags([jobs.Job(folder, words, "gmp")])


def test_targets_that_differ_have_names_and_rows_that_differ():
    values = ["0.9", "0.9000001", "0.99999999", "0.999999", "1e-7"]
    names = [name for name, _ in words_of(*"--methods gmp --seeds 1 --sparsity".split(), *values)]
    assert names == [f"gmp-{value}-seed0" for value in (*values[:4], "1e-07")]
    (name, _), = words_of(*"--methods slimming --seeds 1 --target-macs 0.70000001".split())
    assert name == "channels-slimming-macs0.70000001-seed0"
    for value in values:
        written(f"g{value}", sparsity=float(value))
        written(f"s{value}", "slimming", target_macs=float(value), script="prune_structured")
    tables = groups.tabulate(groups.gather(Path("logs"))[0])
    shown = [[row["target"] for row in rows] for rows in tables.values()]
    digits = ["0.00001", "90", "90.00001", "99.9999", "99.999999"]
    assert sorted(shown) == [[f"-{number} % MACs" for number in digits],
                             [f"{number} % sparse" for number in digits]]


def test_a_run_that_fails_is_a_row_and_the_rest_goes_on(few, two_methods, monkeypatch, capfd):
    monkeypatch.setitem(compare.WEIGHTS, "random", "prune_unstructured --metric random --lr inf")
    tables = compare.main([*TINY, "--seeds", "1", "--out", "out"])
    ((setting, rows),) = tables.items()
    assert setting == ("weights: few, small, T = 2, 1 + 1 epochs, width 0.25, batch size 16")
    assert {row["method"] for row in rows} == {"dense", "gmp"}
    text = Path("out/compare.md").read_text()
    assert ("- out/random-0.9-seed0: not finished: it is no run: it has no config.json; "
            "see out/random-0.9-seed0.log" in text)
    log = Path("out/random-0.9-seed0.log").read_text()
    assert log.startswith("python prune_unstructured.py --metric random --lr inf")
    assert "error: --lr is inf" in log
    assert "failed with exit code 2: out/random-0.9-seed0, see" in "".join(capfd.readouterr())


OF_CHANNELS = ("prune_structured", "prune_greg", "prune_bar")


def written(folder, method="gmp", seed=0, accuracy=0.8, script="prune_unstructured", cost=1,
            **config):
    """Write a finished run's config.json and summary.json."""
    folder = Path("logs", folder)
    folder.mkdir(parents=True)
    usual = dict(dataset="fashion-mini", model="small", time_steps=4, batch_size=64, lr=0.1,
                 sparsity=0.9, regen=None, seed=seed, aggregate="max", commit=folder.name)
    usual |= (dict(epochs_pretrain=8, target_macs=0.7, prune_ratio=None)
              if script in OF_CHANNELS else dict(epochs_prune=8))
    config = usual | dict(epochs_finetune=4) | config
    summary = dict.fromkeys(runfolder.SUMMARY_KEYS, 1) | dict(
        script=script, method=method, seed=seed, test_accuracy=accuracy, regen=config["regen"],
        survived_by_regeneration=None, training_cost=cost, speedup_batch1=2, speedup_batch32=3)
    for name, value in dict(config=config, summary=summary).items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def test_tables_hold_what_may_be_compared():
    written("a")
    written("b", sparsity=0.95)
    written("c", "dense", sparsity=0)
    written("d", epochs_prune=9)
    written("e", width=0.5, precision="bf16")
    written("f", "greg1", script="prune_structured")
    found, notes = groups.gather(Path("logs"))
    usual = "fashion-mini, small, T = 4, 8 + 4 epochs"
    assert list(found) == [
        (f"weights: {usual}", "90 % sparse", "gmp"), (f"weights: {usual}", "95 % sparse", "gmp"),
        (f"weights: {usual}", "-", "dense"),
        (f"weights: {usual.replace('8', '9')}", "90 % sparse", "gmp"),
        (f"weights: {usual}, width 0.5, precision bf16", "90 % sparse", "gmp"),
        (f"channels: {usual}", "-70 % MACs", "greg1")]
    assert notes == {}


def test_what_differs_is_in_the_name():
    for seed in (0, 1):
        for rate in (0.1, 0.3):
            written(f"c{rate}{seed}", "criticality", seed, regen=rate)
        written(f"m{seed}", "criticality", seed, regen=0.3, aggregate="mean")
        written(f"g{seed}", seed=seed)
    written("z", seed=1, accuracy=0.1)  # of two that differ in nothing the first counts: g1
    found, _ = groups.gather(Path("logs"))
    shown = {name: sorted(runs) for (_, _, name), runs in found.items()}
    assert shown == dict.fromkeys(("gmp", "criticality, regen 0.1", "criticality, regen 0.3",
                                   "criticality, regen 0.3, aggregate mean"), [0, 1])
    (rows,) = groups.tabulate(found).values()
    assert [row["accuracy"] for row in rows if row["method"] == "gmp"] == [pytest.approx(80)]


# What --as-published implies of --loss and the neuron, in config.json
LOSS = dict(as_published=["loss"], loss="mean-ce")
NEURON = dict(surrogate="tanh", threshold=0.5, detach_reset=False, decay_input=False, strict=True)
WHOLE = NEURON | LOSS | dict(as_published=(
    "neuron pooling score classifier zero momentum ties cosine loss").split())


def test_runs_as_published_are_rows_of_their_own_in_the_table_of_the_text():
    for seed in (0, 1):
        for method, regen, ours, theirs in (("gmp", None, 0.8, 0.82),
                                            ("criticality", 0.5, 0.79, 0.85)):
            old = seed == 0  # of a version that had no such flag
            written(f"t{method}{seed}", method, seed, ours, regen=regen, loss="ce",
                    **({} if old else dict(as_published=[])))
            written(f"p{method}{seed}", method, seed, theirs, regen=regen, **WHOLE)
        written(f"c{seed}", "criticality", seed, 0.8, regen=0.5, as_published=["cosine"],
                loss="ce")
        written(f"l{seed}", "criticality", seed, 0.7, regen=0.5, cutout=0, **LOSS)
        written(f"d{seed}", "dense", seed, 0.9, sparsity=0, cost=3, **WHOLE)
    tables = compare.main(["--runs", "logs", "--baseline", "gmp, as published"])
    ((setting, rows),) = tables.items()
    assert setting == "weights: fashion-mini, small, T = 4, 8 + 4 epochs"
    assert {row["method"]: row["seeds"] for row in rows} == dict.fromkeys((
        "gmp", "criticality", "gmp, as published", "criticality, as published",
        "criticality, published cosine", "criticality, published loss",
        "dense, as published"), "0 1")
    differences = {row["method"]: row["against"] for row in rows}
    assert differences["criticality, as published"] == pytest.approx(3)
    assert differences["gmp"] == pytest.approx(-2)
    assert "gmp, as published" in Path("logs/compare-gmp-as-published.md").read_text()
    # the dense network of either reading is what the training cost is a share of
    assert {row["training_cost"] for row in rows} == {1 / 3, 1}
    figure = compare.plot_tables(tables)  # all rows, each with a look of its own
    bars = figure.axes[0].containers
    assert {one.get_label() for one in bars} == {row["method"] for row in rows}
    assert len({(one.lines[0].get_color(), one.lines[0].get_marker()) for one in bars}) == 7
    only = {setting: [row for row in rows if "as published" in row["method"]]}
    left, right = compare.plot_tables(only).axes
    assert {line.get_color() for line in right.lines} == {
        compare.plots.style_of(name)[0] for name in ("dense", "gmp", "criticality")}
    assert [line.get_xdata()[0] for line in left.lines
            if line.get_linestyle() == ":"] == [pytest.approx(90)]
    differences = {row["method"]: row["against"] for row in groups.tabulate(
        groups.gather(Path("logs"))[0], "dense, as published")[setting]}
    assert differences["gmp"] == pytest.approx(-10)  # of any target


def test_a_row_as_published_is_named_after_other_flags_as_well():
    """Flags that the items imply are no difference, in either direction; a rate is one."""
    written("a", "criticality", regen=0.5, loss="ce", cutout=0)
    written("b", "criticality", regen=0.5, **WHOLE)
    written("c", "criticality", regen=0.2, **WHOLE)
    written("d", "criticality", regen=0.2, cutout=16, as_published=["cutout"], loss="ce")
    found, _ = groups.gather(Path("logs"))
    assert {name for _, _, name in found} == {
        "criticality, regen 0.5", "criticality, as published, regen 0.5",
        "criticality, as published, regen 0.2", "criticality, published cutout, regen 0.2"}
    assert len({setting for setting, _, _ in found}) == 1
    written("e", "criticality", regen=0.5, loss="ce", cutout=16)  # now the text's differ in it
    found, _ = groups.gather(Path("logs"))
    assert {name for _, _, name in found} >= {
        "criticality, cutout 0, regen 0.5", "criticality, cutout 16, regen 0.5",
        "criticality, published cutout, regen 0.2"}


def test_a_neuron_of_the_text_with_other_settings_is_another_table():
    written("a")
    written("b", strict=True)
    written("c", decay_input=False)
    found, _ = groups.gather(Path("logs"))
    usual = "weights: fashion-mini, small, T = 4, 8 + 4 epochs"
    assert [setting for setting, _, _ in found] == [
        usual, f"{usual}, strict True", f"{usual}, decay input False"]


def test_runs_are_found_at_any_depth_and_in_several_folders():
    for seed in (0, 1):
        written(f"study/one/g{seed}", seed=seed, accuracy=0.8)
        written(f"again/g{seed}", seed=seed, accuracy=0.7)
        written(f"deep/er/r{seed}", "random", seed, regen=0.5)
    for log in ("logs/deep/er/stopped.log", "logs/again/er/stopped.log"):
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        Path(log).write_text("")
    found, notes = groups.gather(Path("logs/study"), Path("logs/deep"), Path("logs/again"))
    assert {name: sorted(runs) for (_, _, name), runs in found.items()} == dict(
        gmp=[0, 1], random=[0, 1])
    (gmp,) = (runs for (_, _, name), runs in found.items() if name == "gmp")
    assert gmp[0].folder == Path("logs/study/one/g0")  # of two alike that of the first folder
    why = "not finished: it is no run: it has no config.json; see"
    assert notes == {place: f"{why} {place}.log"
                     for place in ("logs/deep/er/stopped", "logs/again/er/stopped")}
    compare.main(["--runs", "logs/study", "logs/deep"])
    made = Path("logs/study/compare.csv").read_text()
    assert not Path("logs/deep/compare.csv").exists()
    compare.main(["--runs", "logs/study", "logs/deep", "--out", "out"])
    assert Path("out/compare.csv").read_text() == made


def test_runs_of_before_and_after_a_flag_are_one_row():
    """A flag that is off is as one that was not there; GraNet's and GReg's old runs are alike."""
    for seed, more in ((0, dict(compact=False, metric="granet", candidates="all", regen=0.5)),
                       (1, dict(script="prune_granet", death_rate=0.5))):
        written(f"n{seed}", "granet", seed, **more)
    for seed, more in ((0, dict(script="prune_structured", metric="criticality", l1=0.0,
                                regen=0.0, regen_base="kept", finetune_l1=False)),
                       (1, dict(script="prune_greg"))):
        written(f"c{seed}", "greg1", seed, epochs_prune=4, **more)
    for seed, more in ((0, {}), (1, dict(looks_new=False, evaluate_every=5))):
        written(f"g{seed}", seed=seed, **more)
    found, _ = groups.gather(Path("logs"))
    assert {name: sorted(runs) for (_, _, name), runs in found.items()} == dict.fromkeys(
        ("granet", "greg1", "gmp"), [0, 1])
    (granet,) = (runs for (_, _, name), runs in found.items() if name == "granet")
    assert {run.regen for run in granet.values()} == {0.5}


def test_methods_that_no_table_names_are_rows_and_points_without_an_edit():
    for seed in (0, 1):
        written(f"g{seed}", seed=seed, accuracy=0.8)
        written(f"m{seed}", "magnitude", seed, 0.85, regen=0.5)  # a metric of one's own
        written(f"f{seed}", "foo", seed, 0.9, script="prune_foo", rounds=3)
        written(f"b{seed}", "bar", seed, script="prune_bar")
        written(f"z{seed}", "baz", seed, 0.7, script="prune_bar")
    tables = compare.main(["--runs", "logs"])
    weights, channels = tables.values()
    assert [row["method"] for row in weights] == ["foo", "magnitude", "gmp"]
    assert [row["method"] for row in channels] == ["bar", "baz"] and channels[0]["faster"] == 3
    figure = compare.plot_tables(tables)
    for axis, names in zip((figure.axes[0], figure.axes[2]), (["foo", "magnitude", "gmp"],
                                                              ["bar", "baz"])):
        assert [bars.get_label() for bars in axis.containers] == names
        looks = {(bars.lines[0].get_color(), bars.lines[0].get_marker())
                 for bars in axis.containers}
        assert len(looks) == len(names)


@pytest.mark.parametrize("accuracies, word", [
    ([0.82, 0.83, 0.84], " above"), ([0.79, 0.79, 0.788], " below"), ([0.78, 0.83, 0.80], "")])
def test_differences_are_paired_by_seed(accuracies, word):
    """By hand: differences 2, 3, 4 have mean 3, deviation 1: 3 -+ 4.302653 / sqrt(3)."""
    for seed, accuracy in enumerate(accuracies):
        written(f"g{seed}", seed=seed, accuracy=0.8)
        written(f"r{seed}", "random", seed, accuracy, regen=0.5)
    written("r9", "random", 9, 0.99, regen=0.5)  # with no partner
    found, notes = groups.gather(Path("logs"))
    tables = groups.tabulate(found)
    row = {row["method"]: row for rows in tables.values() for row in rows}["random"]
    differences = 100 * np.array(accuracies) - 80
    half = 4.302653 * statistics.stdev(differences) / 3 ** 0.5
    assert (row["against"], row["half"]) == pytest.approx((differences.mean(), half))
    if word == " above":
        assert (row["against"], row["half"]) == pytest.approx((3, 4.302653 / 3 ** 0.5))
    low, high = row["against"] - half, row["against"] + half
    text = compare.markdown(tables, notes)
    assert f"| {row['against']:+.1f} ({low:+.1f} to {high:+.1f}){word} | 0 1 2 9 |" in text
    assert "| gmp | 90 % sparse | 80.0 ± 0.0 | - | 0 1 2 |" in text


def test_speed_is_that_of_channels_at_batch_32():
    written("g")
    written("s", "slimming", script="prune_structured")
    tables = groups.tabulate(groups.gather(Path("logs"))[0])
    faster = {row["method"]: row["faster"] for rows in tables.values() for row in rows}
    assert faster["slimming"] == 3 and np.isnan(faster["gmp"])


def test_differences_to_another_row():
    for seed in (0, 1):
        written(f"d{seed}", "dense", seed, accuracy=0.9, sparsity=0)
        written(f"g{seed}", seed=seed, accuracy=0.8)
        written(f"c{seed}", "criticality", seed, 0.85 + 0.01 * seed, regen=0.5)
        written(f"m{seed}", "criticality", seed, 0.87, regen=0.5, aggregate="mean")
    found, _ = groups.gather(Path("logs"))
    ((setting, rows),) = groups.tabulate(found, "criticality").items()
    differences = {row["method"]: row["against"] for row in rows}
    assert np.isnan(differences.pop("criticality"))  # to itself
    assert np.isnan(differences.pop("dense"))  # of another target
    assert differences == dict(gmp=pytest.approx(-5.5), **{
        "criticality, aggregate mean": pytest.approx(1.5)})
    ((_, rows),) = groups.tabulate(found, "dense").items()
    differences = {row["method"]: row["against"] for row in rows}
    assert np.isnan(differences.pop("dense")) and differences == dict(
        gmp=pytest.approx(-10), criticality=pytest.approx(-4.5), **{
            "criticality, aggregate mean": pytest.approx(-3)})
    before = compare.main(["--runs", "logs"])
    text = Path("logs/compare.md").read_text()
    compare.main(["--runs", "logs", "--baseline", "criticality, aggregate mean"])
    assert text == Path("logs/compare.md").read_text() and list(before) == [setting]
    assert "| gmp | 90 % sparse | 80.0 ± 0.0 | -7.0 | 0 1 |" in Path(
        "logs/compare-criticality-aggregate-mean.md").read_text()


def test_a_baseline_whose_runs_differ_is_the_one_like_the_row(capsys):
    """Steps between two updates: each row has GMP with its own; without one, none."""
    for seed in (0, 1):
        for interval, gmp, ours in ((25, 0.8, 0.81), (50, 0.7, 0.73), (100, None, 0.6)):
            if gmp:
                written(f"g{interval}{seed}", "gmp", seed, gmp + 0.001 * seed, interval=interval)
            written(f"c{interval}{seed}", "criticality", seed, ours, interval=interval, regen=0.5)
        written(f"p{seed}", "gmp", seed, 0.9, interval=50, as_published=["zero"])
    ((_, rows),) = groups.tabulate(groups.gather(Path("logs"))[0]).items()
    found = {row["method"]: (row["baseline"], round(row["against"], 2)) for row in rows
             if row["method"] != row["baseline"]}
    assert found == {
        "criticality, interval 25": ("gmp, interval 25", 0.95),
        "criticality, interval 50": ("gmp, interval 50", 2.95),
        "criticality, interval 100": ("gmp", pytest.approx(np.nan, nan_ok=True)),
        "gmp, published zero, interval 50": ("gmp, interval 50", 19.95)}
    compare.main(["--runs", "logs"])
    lines = capsys.readouterr().out.splitlines()
    assert sum("| gmp, interval" in line and "| - |" in line for line in lines) == 2


def test_a_baseline_that_is_not_in_the_table(capsys):
    written("g")
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--runs", "logs", "--baseline", "random"])
    assert stopped.value.code == 2 and "one of: gmp" in one_line(capsys)


def test_one_pair_tells_nothing():
    written("g")
    written("r", "random", accuracy=0.9, regen=0.5)
    tables = groups.tabulate(groups.gather(Path("logs"))[0])
    assert all(np.isnan(row["against"]) for rows in tables.values() for row in rows)
    assert "| random | 90 % sparse | 90.0 | - | 0 |" in compare.markdown(tables, {})


def test_two_differences_of_a_table_need_more_than_one():
    """Holm: 2, 3, 4 points above have p = 0.035 (t = 5.2 at two degrees of freedom): enough alone,
    and not in a table with another such row."""
    for seed, accuracy in enumerate((0.82, 0.83, 0.84)):
        written(f"g{seed}", seed=seed, accuracy=0.8)
        written(f"r{seed}", "random", seed, accuracy, regen=0.5)

    def shown():
        tables = groups.tabulate(groups.gather(Path("logs"))[0])
        text = compare.markdown(tables, {})
        (column,) = {row["p, corrected for the table (Holm)"] for row in compare.csv_rows(tables)
                     if row["method"] != "gmp"}
        return text.count("+3.0 (+0.5 to +5.5) above"), column

    assert shown() == (1, pytest.approx(0.0351, abs=1e-4))
    for seed, accuracy in enumerate((0.82, 0.83, 0.84)):
        written(f"c{seed}", "criticality", seed, accuracy, regen=0.5)
    assert shown() == (0, pytest.approx(0.0701, abs=1e-4))


def test_how_much_of_an_update_is_rescued():
    written("c", "criticality", regen=0.5)
    rows = [dict(survived=0.5), dict(survived=0.7), dict(survived=None)]
    Path("logs/c/updates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ((row,),) = groups.tabulate(groups.gather(Path("logs"))[0]).values()
    assert row["rescued"] == pytest.approx(60)


def test_the_plot_shows_targets_that_compare_and_no_collapse_sets_its_scale():
    for seed in (0, 1):
        written(f"d{seed}", "dense", seed, 0.9, sparsity=0)
        for sparsity in (0.05, 0.1, 0.3):  # only GMP has 30 %
            written(f"g{sparsity}{seed}", seed=seed, accuracy=0.8 - 0.2 * (sparsity == 0.3),
                    sparsity=sparsity, cost=1 - sparsity)
        for sparsity in (0.05, 0.1):
            written(f"r{sparsity}{seed}", "random", seed, 0.7, sparsity=sparsity)
            written(f"c{sparsity}{seed}", "deepr", seed, 0.1 + 0.6 * seed, sparsity=sparsity,
                    script="prune_gradr", epochs_prune=8)
        written(f"s{seed}", "sdsnn", seed, 0.85, sparsity=0, script="prune_sdsnn", epochs_prune=8,
                cost=0.5)
    figure = compare.plot_tables(groups.tabulate(groups.gather(Path("logs"))[0]))
    left, right = figure.axes
    names = ["dense", "sdsnn", "gmp", "random", "deepr"]  # the best one first, above
    assert [tick.get_text() for tick in left.get_yticklabels()] == names
    assert left.get_ylim() == right.get_ylim() == (4.5, -0.5)

    def points(lines):  # of the legend there are none
        return [(line.get_label(), *line.get_xydata()[0], line.get_markerfacecolor() == "white")
                for line in lines if len(line.get_xydata()) == 1]

    bars = [bars.lines[0] for bars in left.containers]
    for bar, container in zip(bars, left.containers):
        bar.set_label(container.get_label())
    assert points(bars) == [(name, pytest.approx(x), names.index(name), is_white)
                            for name, x, is_white in (
        ("dense", 90, False), ("sdsnn", 85, False), ("gmp", 80, False), ("gmp", 80, True),
        ("random", 70, False), ("random", 70, True), ("deepr", 40, False), ("deepr", 40, True))]
    assert [line.get_xdata()[0] for line in left.lines
            if line.get_linestyle() == ":"] == [pytest.approx(90)]  # dense
    assert left.get_xlim() == pytest.approx((69, 91))
    assert [text.get_text() for text in left.texts] == ["40, 40"]
    assert [text.get_text() for text in right.get_legend().get_texts()] == [
        "5 % sparse", "10 % sparse"]
    costs = points(right.lines)
    assert ("gmp", 0.95, 2, False) in costs and ("gmp", 0.9, 2, True) in costs
    assert ("sdsnn", 0.5, 1, False) in costs and len(costs) == 8
    note = compare.plots.note_of(figure)
    assert "bars: their standard deviation" in note and "at an edge: a mean beyond it" in note
    assert "Not drawn: 1 rows" in note  # of GMP at 30 %


@pytest.mark.parametrize("given, says", [
    (["--runs", "nowhere"], "nowhere holds no finished run"), (["--sparsity", "90"], "write 0.9"),
    (["--dataset", "nothing.npz"], "nothing.npz"), (["--seeds", "0"], "at least 1"),
    (["--jobs", "x"], "whole number"), (["--sparsity", "0"], "above 0"),
    (["--baseline", "best"], "expected a method"),
    (["--methods", "gpm"], "Did you mean gmp?"), (["--methods", "slim"], "There are: dense, gmp"),
    (["--methods", "gmp", "chanels-dense"], "Did you mean channels-dense?"),
    (["--methods", "gmp", "--baseline", "random"], "Add random to --methods"),
    (["--precision", "fp16"], "invalid choice: 'fp16'"), (["--device", "gpu"], "expected cpu, cuda"),
    (["--dry-run", "--jobs", "2"], "--jobs and --dry-run exclude each other"),
    (["--dry-run", "--latex"], "--latex and --dry-run exclude each other"),
    (["--dry-run", "--dataset", "nothing.npz"], "nothing.npz"),
    (["--dry-run", "--model", "vgg61"], "invalid choice: 'vgg61'"),
    (["--runs", "x", "--dry-run"], "--dry-run and --runs exclude each other"),
    (["--runs", "x", "--device", "cpu"], "--device and --runs exclude each other"),
    (["--epochs-finetune", "0"], "at least 1"),  # a lottery ticket trains in them
    (["--runs", "x", "--sparsity", "0.5"], "--sparsity and --runs exclude each other"),
    (["--runs", "x", "--seeds", "2"], "--seeds and --runs exclude each other"),
    (["--runs", "x", "--jobs", "2"], "--jobs and --runs exclude each other"),
    (["--runs", "x", "--dataset", "mnist"], "--dataset and --runs exclude each other"),
    (["--runs", "x", "--epochs-prune", "3"], "--epochs-prune and --runs exclude each other")])
def test_bad_input(given, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main(given)
    assert stopped.value.code == 2 and says in one_line(capsys)
    assert not Path("runs").exists()


# ---- some methods, commands alone ----------------------------------------------------------------


def names_of(given):
    """The runs that compare.py would start, without seed and target."""
    jobs = compare.plan(compare.parse_args([*given.split(), "--seeds", "1"]))
    return [re.sub(r"(-0\.9|-macs0\.7)?-seed0$", "", folder.name) for folder, *_ in jobs]


@pytest.mark.parametrize("given, names", [
    ("gmp criticality", ["gmp", "criticality"]), ("dense", ["dense"]),
    ("channels-criticality gmp", ["gmp", "channels-criticality"]),
    ("slimming channels-dense", ["channels-dense", "channels-slimming"])])
def test_the_methods_that_are_named_are_run(given, names):
    assert names_of(f"--methods {given}") == names


def test_precision_and_device_are_passed_on():
    for precision, device in (("bf16", "cuda:1"), (None, None)):
        given = "--methods gmp greg1 --seeds 1".split()
        if precision:
            given += ["--precision", precision, "--device", device]
        for _, words, _ in compare.plan(compare.parse_args(given)):
            parsed = importlib.import_module(Path(words[1]).stem).parse_args(words[2:])
            assert (parsed.precision, parsed.device) == (precision or "fp32", device)


def test_a_dry_run_prints_the_commands_that_are_left(few, monkeypatch, capsys):
    given = [*TINY, "--methods", "gmp", "dense", "--sparsity", "0.9", "0.8", "--seeds", "2",
             "--out", "the runs", "--dry-run"]
    for module, name in ((jobs, "subprocess"), (compare, "write_whole")):
        monkeypatch.delattr(module, name)  # it starts and writes nothing
    assert compare.main(given) is None
    out, err = capsys.readouterr()
    assert not Path("the runs").exists() and "6 of 6 runs" in err
    folders = [shlex.split(line)[-2] for line in out.splitlines()]
    assert folders == [f"the runs/{name}-seed{seed}" for seed in (0, 1)
                       for name in ("dense", "gmp-0.9", "gmp-0.8")]
    for line in out.splitlines():
        words = shlex.split(line)
        assert words[0] == "python" and words[-3:] == ["--run-dir", words[-2], "--resume"]
        importlib.import_module(Path(words[1]).stem).parse_args(words[2:])
    Path("the runs/gmp-0.9-seed0").mkdir(parents=True)
    Path("the runs/gmp-0.9-seed0/summary.json").write_text("{}")
    Path("the runs/dense-seed1").mkdir()  # stopped: it goes on
    compare.main(given)
    left, err = capsys.readouterr()
    assert left == "".join(line for line in out.splitlines(True) if "gmp-0.9-seed0" not in line)
    assert "5 of 6 runs" in err
    monkeypatch.chdir(ROOT)  # there the script's name is enough
    compare.main("--methods gmp --seeds 1 --dry-run --dataset cifar100".split())
    assert capsys.readouterr().out.startswith(
        "python prune_unstructured.py --regen 0 --sparsity 0.9 ")


def test_the_rows_of_some_methods(capsys):
    for seed in (0, 1):
        written(f"g{seed}", seed=seed, accuracy=0.8)
        written(f"c{seed}", "criticality", seed, 0.85, regen=0.5)
        written(f"k{seed}", "criticality", seed, 0.85, "prune_structured", regen=0.3)
        written(f"f{seed}", "foo", seed, 0.9, script="prune_foo")
    tables = groups.tabulate(groups.gather(Path("logs"))[0])

    def shown(*methods):
        return sorted((row["pruned"], row["method"])
                      for rows in compare.rows_of(tables, methods).values() for row in rows)

    assert shown("criticality") == [("weights", "criticality")]
    assert shown("channels-criticality", "foo") == [("channels", "criticality"),
                                                    ("weights", "foo")]
    ((row,),) = compare.rows_of(tables, ["criticality"]).values()
    assert row["against"] == pytest.approx(5)  # to GMP, whose row is not shown
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--runs", "logs", "--methods", "fooo"])
    assert stopped.value.code == 2 and "Did you mean foo?" in one_line(capsys)


# ---- lines over a flag, LaTeX, colours -----------------------------------------------------------


def test_rows_that_differ_in_a_number_are_lines_over_it():
    """The regeneration rate stands in the rows' names, T in the tables'."""
    for seed in (0, 1):
        written(f"g{seed}", seed=seed, accuracy=0.8)
        written(f"n{seed}", "granet", seed, 0.75, "prune_granet", death_rate=0.5)
        for rate, accuracy in ((0.5, 0.7), (0.1, 0.79), (0.3, 0.78), (0.9, 0.1 + 0.6 * seed)):
            written(f"c{rate}{seed}", "criticality", seed, accuracy, regen=rate)
        written(f"m{seed}", "criticality", seed, 0.77, regen=0.3, aggregate="mean")
        for steps in (2, 8):
            written(f"t{steps}{seed}", seed=seed, accuracy=0.6 + 0.01 * steps, time_steps=steps)
    figure = compare.plot_tables(groups.tabulate(groups.gather(Path("logs"))[0]))
    left, right, by_rate, by_steps = figure.axes
    setting = "weights: fashion-mini, small, T = 4, 8 + 4 epochs"
    words = by_rate.get_xlabel().split()  # wrapped
    assert words == f"Regeneration rate r {setting}, 90 % sparse".split()
    (line,) = by_rate.containers
    assert line.get_label() == "criticality"
    assert np.allclose(line.lines[0].get_xydata(), [(0.1, 79), (0.3, 78), (0.5, 70), (0.9, 40)])
    assert by_rate.get_ylim() == pytest.approx((69, 80))  # 40 ± 42 flattens nothing
    assert [text.get_text() for text in by_rate.texts] == ["40"]
    assert [one.get_ydata()[0] for one in by_rate.lines
            if one.get_linestyle() == "--"] == [pytest.approx(80)]  # GMP
    assert by_steps.get_xlabel().split() == (
        f"Time steps T {setting.replace(' T = 4,', '')}, 90 % sparse".split())
    (line,) = by_steps.containers
    assert np.allclose(line.lines[0].get_xydata(), [(2, 62), (4, 80), (8, 68)])
    # left and right: those that are on no line by their names, the variant among them
    assert {tick.get_text() for tick in left.get_yticklabels()} == {
        "gmp", "granet", "criticality, regen 0.3, aggregate mean"}
    assert len(right.lines) == 3
    assert "Not drawn" not in compare.plots.note_of(figure)


def test_points_of_one_method_are_no_panel():
    """A sweep takes all rows but GMP's, which stays on it as a dashed line; channels are one
    method."""
    for seed in (0, 1):
        written(f"g{seed}", seed=seed, accuracy=0.8)
        for rate in (0.1, 0.3, 0.5):
            written(f"c{rate}{seed}", "criticality", seed, 0.8 - rate / 10, regen=rate)
        written(f"s{seed}", "slimming", seed, script="prune_structured")
    figure = compare.plot_tables(groups.tabulate(groups.gather(Path("logs"))[0]))
    (panel,) = figure.axes
    assert panel.get_xlabel().startswith("Regeneration rate r")
    assert [one.get_ydata()[0] for one in panel.lines
            if one.get_linestyle() == "--"] == [pytest.approx(80)]
    assert "Not drawn: 1 rows" in compare.plots.note_of(figure)  # of slimming
    for seed in (0, 1):
        written(f"d{seed}", "dense", seed, 0.9, sparsity=0)
    figure = compare.plot_tables(groups.tabulate(groups.gather(Path("logs"))[0]))
    left, *_ = figure.axes
    assert {bars.get_label() for bars in left.containers} == {"gmp", "dense"}


def test_one_method_alone_is_drawn():
    written("g")
    left, right = compare.plot_tables(groups.tabulate(groups.gather(Path("logs"))[0])).axes
    assert [bars.get_label() for bars in left.containers] == ["gmp"] and len(right.lines) == 1


def test_many_targets_are_lines():
    for seed in (0, 1):
        for sparsity in (0.5, 0.8, 0.9):
            written(f"g{sparsity}{seed}", seed=seed, accuracy=1 - sparsity / 2, sparsity=sparsity)
            written(f"r{sparsity}{seed}", "random", seed, 0.9 - sparsity / 2, sparsity=sparsity)
    left, _ = compare.plot_tables(groups.tabulate(groups.gather(Path("logs"))[0])).axes
    for bars in left.containers:
        assert bars.lines[0].get_linestyle() == "-" and len(bars.lines[0].get_xydata()) == 3
    fills = {(line.get_fillstyle(), line.get_markerfacecolor()) for line in left.lines
             if line.get_linestyle() == "None"}
    assert ("full", "white") in fills and any(part == "left" for part, _ in fills)


def test_methods_are_told_apart_by_looks():
    """A family has one hue, and its methods differ in their markers."""
    looks = {name: look for name, look in compare.plots.STYLE.items() if name != "slimming"}
    assert len(set(looks.values())) == len(looks) >= 19
    assert {*compare.WEIGHTS, *compare.CHANNELS} == {
        *compare.plots.STYLE}
    for family in ("criticality gradient random", "granet pq ndsnn set rigl sca", "imp eb et",
                   "gradr deepr stds", "sdsnn upr upr-neurons", "greg1 greg2"):
        mine = [looks[name] for name in family.split()]
        hues = [colorsys.rgb_to_hls(*to_rgb(colour)) for colour, _ in mine]
        assert len({marker for _, marker in mine}) == len(mine)
        colourful = [hue for hue, _, saturation in hues if saturation > 0.1]
        assert not colourful or max(colourful) - min(colourful) < 0.08, family
    variants = [compare.plots.style_of(f"gmp, {word}") for word in ("a", "b", "a")]
    assert variants[0] == variants[2] != variants[1]
    assert {colour for colour, _ in variants} == {looks["gmp"][0]}


def test_the_tables_for_latex(monkeypatch, capsys):
    monkeypatch.setattr(compare.plots, "make_printable", lambda figure: figure.clear())
    for seed in (0, 1):
        written(f"d{seed}", "dense", seed, 0.9, sparsity=0, dataset="50%_of $NAME.npz")
        written(f"g{seed}", seed=seed, accuracy=0.8, dataset="50%_of $NAME.npz")
        written(f"c{seed}", "my_metric", seed, 0.75 + 0.01 * seed, regen=0.5,
                dataset="50%_of $NAME.npz")
    compare.main(["--runs", "logs", "--latex"])
    text = Path("logs/compare.tex").read_text()
    assert ".pdf, .tex: 6 runs" in capsys.readouterr().out
    assert r"\input{compare}" in text and r"\usepackage" not in text
    assert r"\caption{Weights: 50\%\_of \$NAME, small, T = 4, 8 + 4 epochs." in text
    assert "epochs. Differences to gmp, with 95 \\% intervals. Seeds" in text
    assert "Seeds 0, 1.}" in text and "& sparsity" not in text  # the target says it
    assert (r"my\_metric & 75.5 $\pm$ 0.7 & $-$4.5 ($-$10.9, +1.9) & " in text)
    rows = [line for line in text.splitlines() if line.endswith(r"\\") and "multicol" not in line]
    assert len({line.count("&") for line in rows}) == 1 and len(rows) == 5
    with open("logs/compare.csv") as file:
        assert {row["baseline"] for row in csv.DictReader(file)} == {"gmp"}
    compare.main(["--runs", "logs", "--latex", "--baseline", "dense"])
    assert "Differences to dense, with" in Path("logs/compare-dense.tex").read_text()
    if shutil.which("pdflatex") is None:
        pytest.skip("the rest needs pdflatex")
    Path("logs/all.tex").write_text(r"\documentclass{article}\begin{document}"
                                    r"\input{compare}\end{document}")
    subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"],
                   cwd="logs", check=True, capture_output=True)
    assert Path("logs/all.pdf").stat().st_size > 1000


MINI = "weights: fashion-mini, small, T = 4, 8 + 4 epochs"
MINI_CHANNELS = "channels: fashion-mini, small, T = 4, 8 + 8 epochs"
FULL = "weights: fashion-mnist, small, T = 4, 3 + 2 epochs"
FULL_CHANNELS = "channels: fashion-mnist, small, T = 4, 3 + 2 epochs"
CIFAR = "weights: cifar100, vgg16, T = 2, 3 + 2 epochs, width 0.25, batch size 64, lr 0.1"
VGG = "VGG-16, CIFAR-10", "VGG-16, CIFAR-100"
SLIMMED = {"VGG-16, -58 % FLOPs": 1.40, "ResNet-19, -69 %": 1.67}
BESIDE = [  # the paper's tables 1 and 2, figure 2(a): what, {of what: figure}, and our cell of it
    ("criticality - GMP at 90 %, points", dict(zip(VGG, (0.46, 1.79))), MINI, "90 % sparse",
     "against"),
    ("the same", {VGG[1]: 1.79}, CIFAR, "90 % sparse", "against"),
    ("criticality - GMP at 95 %, points", dict(zip(VGG, (0.46, 0.97))), FULL, "95 % sparse",
     "against"),
    ("criticality - GMP at 98 %, points", dict(zip(VGG, (0.34, 0.56))), MINI, "98 % sparse",
     "against"),
    ("criticality - slimming, channels, points", SLIMMED, MINI_CHANNELS, "-70 % MACs", "against"),
    ("the same", SLIMMED, FULL_CHANNELS, "-70 % MACs", "against"),
    ("of an update's pruned weights, back in it, %", {"more than": 50}, MINI, "90 % sparse",
     "rescued"),
    ("the same", {"more than": 50}, FULL, "95 % sparse", "rescued"),
    ("the same", {"more than": 50}, MINI, "98 % sparse", "rescued"),
    ("final weights that had come back, %", {"VGG-16": 48.03}, MINI, "90 % sparse", "back"),
    ("final channels that had come back, %", {"ResNet-19": 42.60}, MINI_CHANNELS, "-70 % MACs",
     "back")]


def beside_the_paper(tables):
    """Return the rows of results/README.md that hold the paper's figures beside ours."""
    lines = []
    for what, paper, setting, target, column in BESIDE:
        rows = {row["method"]: row for row in tables[setting] if row["target"] == target}
        ours = rows["criticality"]
        here, sign = ours[column], "+" if column == "against" else ""
        if column == "against" and np.isnan(here):  # one seed
            channels = setting.startswith("channels")
            here = ours["accuracy"] - rows["slimming" if channels else "gmp"]["accuracy"]
        spread = "" if column != "against" else " (one seed)" if np.isnan(ours["half"]) else (
            f" ({here - ours['half']:+.1f} to {here + ours['half']:+.1f})")
        lines.append(f"| {what} | {', '.join(f'{x:{sign}.2f} ({of})' for of, x in paper.items())} "
                     f"| {here:{sign}.1f}{spread} | {setting.partition(', T')[0]}, {target} | "
                     f"{', '.join(f'{here - x:+.1f}' for x in paper.values())} |")
    return lines


def test_the_tables_in_the_text_are_those_of_the_logs(monkeypatch):
    """compare.py makes them again from the logs in results/, line by line."""
    text = (ROOT / "results/README.md").read_text()
    (studies,) = re.findall(  # the command in the text, its braces as bash reads them
        r"^    python compare.py --out results/figures --runs results/runs/\{(.*)\}$", text, re.M)
    logs = [str(ROOT / "results/runs" / study) for study in studies.split(",")]
    tables = compare.main(["--out", "out", "--runs", *logs])
    made = Path("out/compare.md").read_text()
    for kind in ("md", "csv"):
        shipped = (ROOT / f"results/figures/compare.{kind}").read_text()
        assert Path(f"out/compare.{kind}").read_text() == shipped
    for line in beside_the_paper(tables):
        assert line in text
    monkeypatch.setattr(compare.plots, "save", lambda *_: None)  # once is enough
    compare.main(["--out", "out", "--runs", *logs, "--baseline", "criticality"])
    known = [set(table.splitlines()) for text in (
        made, Path("out/compare-criticality.md").read_text()) for table in text.split("**\n\n")]
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "docs/results.md"))
    header = f"| {' | '.join(compare.COLUMNS)} |"
    blocks = re.findall(rf"^\*\*(.*)\*\*\n\n({re.escape(header)}\n(?:\|.*\n)+)", text, re.M)
    assert len(blocks) == text.count(header) >= 6
    for title, block in blocks:  # a part of the rows of a table
        assert title in tables and len(block.splitlines()) > 3
        assert any(set(block.splitlines()) <= table for table in known)
    for target in ("90 % sparse", "98 % sparse"):
        assert {row["method"] for row in tables[MINI] if row["target"] in ("-", target)} >= set(
            compare.WEIGHTS)
    assert {row["method"] for row in tables[MINI_CHANNELS]} == set(compare.CHANNELS)


def test_the_logs_are_whole_and_report_the_last_epoch():
    """No best epoch; no weights, no path of a machine."""
    folders = records.find_runs(ROOT / "results")
    assert len(folders) == 345
    for folder in folders:
        assert folder.parent.parent == ROOT / "results/runs"
        run = records.read_run(folder)
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert run.summary["test_accuracy"] == last["test_accuracy"]
        assert run.config["run_dir"].startswith("runs/") and "/" not in run.config["data_dir"]
        assert not list(folder.glob("*.pt")) or folder.name == "default"


def test_the_table_of_studies_counts_their_runs():
    text = (ROOT / "results/README.md").read_text()
    counts = dict(re.findall(r"^\| `([\w-]+)` \| (\d+) \|", text, re.M))
    assert counts == {study.name: str(len(records.find_runs(study)))
                      for study in (ROOT / "results/runs").iterdir()}
