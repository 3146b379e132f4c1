"""compare.py: the commands that it starts, its table against the summaries, failures, resuming."""
import csv
import importlib
import json
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import compare
import runfolder
from conftest import one_line

ROOT = Path(__file__).parent
TINY = ("--dataset few.npz --width 0.25 --time-steps 2 --batch-size 16 --epochs-prune 1 "
        "--epochs-finetune 1 ").split()


@pytest.fixture
def few():
    x = np.random.default_rng(0).integers(0, 256, (96, 16, 16), dtype=np.uint8)
    y = np.arange(96) % 4
    np.savez("few.npz", x_train=x[:64], y_train=y[:64], x_test=x[64:], y_test=y[64:])


@pytest.fixture
def two_methods(monkeypatch):
    monkeypatch.setattr(compare, "WEIGHTS", dict(
        dense=compare.WEIGHTS["dense"] + " --interval 2",
        gmp=compare.WEIGHTS["gmp"] + " --interval 2"))
    monkeypatch.setattr(compare, "CHANNELS", {})


def test_the_commands_are_those_of_the_scripts():
    small = ("--dataset few.npz --width 0.25 --time-steps 4 --epochs-prune 4 "
             "--epochs-finetune 2 --sparsity 0.9 0.95 --seeds 2").split()
    args = compare.parse_args(small)
    jobs = compare.plan(args)
    assert len({folder for folder, _ in jobs}) == len(jobs) == 2 * (1 + 2 * 12 + 5)
    methods = set()
    for folder, words in jobs:
        script = importlib.import_module(Path(words[1]).stem)
        parsed = script.parse_args(words[2:])
        assert parsed.run_dir == str(folder) and parsed.resume and parsed.dataset == "few.npz"
        assert folder.name.endswith(f"-seed{parsed.seed}") and parsed.time_steps == 4
        if words[1].endswith("prune_structured.py"):
            assert parsed.target_macs == (None if "dense" in folder.name else 0.7)
            assert parsed.epochs_pretrain == parsed.epochs_finetune == 4
        else:
            wanted = 0 if "dense" in folder.name else 0.95 if "-0.95-" in folder.name else 0.9
            assert parsed.sparsity == wanted
            assert (parsed.epochs_prune, parsed.epochs_finetune) == (4, 2)
        methods.add(folder.name.rsplit("-seed")[0].split("-0.9")[0])
    assert methods == {*compare.WEIGHTS, "channels-dense", *(
        f"channels-{name}-macs0.7" for name in compare.CHANNELS if name != "dense")}


def test_the_budget_and_the_network_are_equal_where_papers_differ():
    for folder, words in compare.plan(compare.parse_args(["--dataset", "cifar100"])):
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
        for key, factor in dict(sparsity=100, sops=1e-3, macs=1e-6, seconds=1).items():
            assert row[key] == pytest.approx(factor * statistics.mean(one[key] for one in mine))
        summaries[row["method"]] = mine
    cost = {name: statistics.mean(one["training_cost"] for one in mine)
            for name, mine in summaries.items()}
    assert {row["method"]: row["training_cost"] for row in rows} == {
        "dense": 1, "gmp": pytest.approx(cost["gmp"] / cost["dense"])}
    text = Path("out/compare.md").read_text()
    assert text.count("| gmp | 90 % sparse | ") == 1 and text in capfd.readouterr().out
    assert "not finished" not in text
    table = [line for line in Path("out/compare.csv").read_text().splitlines() if line[0] != "#"]
    assert [row["method"] for row in csv.DictReader(table)] == [row["method"] for row in rows]
    assert Path("out/compare.png").exists() and Path("out/compare.pdf").exists()

    def never(*_, **__):
        raise AssertionError("a finished run was started again")

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=never, STDOUT=-2))
    assert compare.main([*TINY, "--seeds", "2", "--out", "out"]) == tables
    assert compare.main(["--runs", "out"]) == tables


def test_a_run_that_fails_is_a_row_and_the_rest_goes_on(few, two_methods, monkeypatch, capfd):
    monkeypatch.setitem(compare.WEIGHTS, "random", "prune_unstructured --metric random --lr inf")
    tables = compare.main([*TINY, "--seeds", "1", "--out", "out"])
    assert {row["method"] for row in tables["weights"]} == {"dense", "gmp"}
    text = Path("out/compare.md").read_text()
    assert ("| random-0.9-seed0 | not finished: it is no run: it has no config.json; "
            "see out/random-0.9-seed0.log | |" in text)
    log = Path("out/random-0.9-seed0.log").read_text()
    assert log.startswith("python prune_unstructured.py --metric random --lr inf")
    assert "error: --lr is inf" in log
    assert "failed with exit code 2: out/random-0.9-seed0, see" in "".join(capfd.readouterr())


def test_other_targets_are_other_rows():
    def run(method, seed, **config):
        base = dict(sparsity=0.9, target_macs=None, prune_ratio=None)
        return SimpleNamespace(
            script="prune_structured" if "target_macs" in config else "prune_unstructured",
            method=method, seed=seed, config=base | config, summary={})

    assert compare.target_of(run("gmp", 0)) == ("weights", "90 % sparse")
    assert compare.target_of(run("gmp", 0, sparsity=0.95)) == ("weights", "95 % sparse")
    assert compare.target_of(run("dense", 0, sparsity=0)) == ("weights", "-")
    assert compare.target_of(run("greg1", 0, target_macs=0.7)) == ("channels", "-70 % MACs")


@pytest.mark.parametrize("given, says", [
    (["--runs", "nowhere"], "nowhere holds no finished run"), (["--sparsity", "90"], "write 0.9"),
    (["--dataset", "nothing.npz"], "nothing.npz"), (["--seeds", "0"], "at least 1"),
    (["--jobs", "x"], "whole number"), (["--sparsity", "0"], "above 0")])
def test_bad_input(given, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main(given)
    assert stopped.value.code == 2 and says in one_line(capsys)
    assert not Path("runs").exists()


def test_the_table_in_the_readme_is_that_of_the_logs():
    shutil.copytree(ROOT / "results" / "compare", "logs")
    compare.main(["--runs", "logs"])
    readme = (ROOT / "README.md").read_text()
    rows = Path("logs/compare.md").read_text().splitlines()
    assert len([row for row in rows if " ± " in row]) == len(compare.WEIGHTS) + len(compare.CHANNELS)
    assert all(row in readme for row in rows)
    assert (ROOT / "results/compare/compare.md").read_text().splitlines() == rows
