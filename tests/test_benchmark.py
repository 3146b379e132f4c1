"""benchmark.py: the same work in all rows, and a table and a JSON that hold together."""
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import benchmark
import models
from harness import frameworks
from kernels import FastLIF
from masks import Masks
from neurons import LIF

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = {"vgg16": (3, 32, 5, 3, 2), "small": (1, 8, 5, 3, 4)}


def installed(*names):
    return all(importlib.util.find_spec(name) for name in names)


def neurons_at_hand():
    return [LIF] + [neuron for neuron, name in (
        (frameworks.SpikingJelly, "spikingjelly"), (frameworks.SnnTorch, "snntorch"))
        if installed(name)]


@pytest.mark.parametrize("neuron", neurons_at_hand())
@pytest.mark.parametrize("repeated", [False, True])
def test_other_neurons_do_the_same_work(neuron, repeated):
    shape = (1 if repeated else 4, 3, 2, 5, 5)
    x = (2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).double()
    results = []
    for lif in (FastLIF(), neuron().double()):
        leaf = x.clone().requires_grad_()
        spikes = lif(leaf, 4 if repeated else None)
        if neuron is not frameworks.SnnTorch:  # its reset is not detached: another gradient
            (spikes * torch.arange(spikes.numel()).view(spikes.shape)).sum().backward()
            results.append((spikes, leaf.grad))
        else:
            results.append((spikes, torch.zeros(())))
    (ours, grad), (theirs, their_grad) = results
    assert 0 < ours.mean() < 1 and torch.equal(ours, theirs)
    assert torch.allclose(grad, their_grad, rtol=1e-9)


@pytest.fixture
def narrow(monkeypatch):
    """Networks of a tenth of the width: this is about the rows, and not about the times."""
    build = models.build

    def narrower(name, classes, channels, side, time_steps, widths=None):
        return build(name, classes, channels, side, time_steps, models.default_widths(name, 0.1))

    monkeypatch.setattr(models, "build", narrower)


def test_rows_share_weights_and_images(monkeypatch):
    monkeypatch.setattr(benchmark, "SIZES", TINY)
    ours, plain, floor = (benchmark.Candidate("small", row, CPU) for row in (
        "this project, fp32", "plain autograd, fp32", "ReLU floor, fp32"))
    assert torch.equal(ours.x, plain.x) and torch.equal(ours.y, plain.y)
    for one, other in zip(ours.net.parameters(), plain.net.parameters()):
        assert torch.equal(one, other)
    before = {k: v.clone() for k, v in ours.net.state_dict().items()}
    for a, b in zip(ours.spikes(), plain.spikes(), strict=True):
        assert torch.equal(a, b) and a.any() and not a.all()
    assert all(torch.equal(v, ours.net.state_dict()[k]) for k, v in before.items())
    assert not any(isinstance(module, LIF) for module in floor.net.modules())
    for candidate in (ours, plain):
        candidate.step(), candidate.predict()
        assert candidate.net.training
    for one, other in zip(ours.net.parameters(), plain.net.parameters()):
        assert torch.allclose(one, other, atol=1e-5) and not torch.equal(one, before["fc.weight"])


def test_rounds_are_interleaved_and_ratios_paired():
    order = []
    times = benchmark.take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")},
                                 0, CPU, at_least=3)
    assert "".join(order) == "abababab" and [len(t) for t in times.values()] == [3, 3]
    assert benchmark.ratio([2, 8, 9], [1, 2, 3]) == 3
    assert benchmark.median_and_middle_half([0.001, 0.002, 0.003], "step") == pytest.approx(
        dict(step_ms=2, step_low_ms=1, step_high_ms=3))


def test_an_update_ends_at_the_target():
    net = models.build("small", 5, 1, 8, 2)
    masks = Masks(net)
    scores = {name: torch.rand(net.get_submodule(name.replace("lifs", "convs")).conv.out_channels)
              for name in models.lifs(net)}
    benchmark.update_masks(masks, scores)
    assert masks.n_alive == masks.keep_at(0.5) and masks.share_regenerated > 0.2
    benchmark.mask_update_of(net)()


def test_quick_writes_every_row_and_ratio(monkeypatch, narrow, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "SIZES", TINY)
    monkeypatch.setattr(benchmark, "SECONDS", {"quick": 0, "full": 0})
    monkeypatch.setattr(benchmark, "peak_memory", lambda *_: 100.0)
    monkeypatch.setitem(sys.modules, "snntorch", None)  # not installed
    benchmark.main(["--quick", "--device", "cpu", "--json", str(tmp_path / "all.json")])
    result = json.loads((tmp_path / "all.json").read_text())
    rows = {row["row"]: row for row in result["rows"]}
    assert set(benchmark.ROWS) - set(rows) == {row for row in benchmark.ROWS if "compiled" in row}
    assert rows["snnTorch, fp32"]["note"] == benchmark.INSTALL
    assert rows["this project, fp32"]["spikes_differing"] == 0
    assert rows["plain autograd, fp32"]["spikes_differing"] == 0
    assert rows["this project, fp32"]["step_low_ms"] <= rows["this project, fp32"]["step_ms"]
    wanted = {"step_fp32_vs_relu_floor", "step_bf16_vs_relu_floor", "criticality_overhead",
              "update_vs_step"}
    if installed("spikingjelly"):
        wanted |= {"step_fp32_vs_spikingjelly", "step_bf16_vs_spikingjelly",
                   "memory_vs_spikingjelly", "step_fp32_like_for_like", "step_bf16_like_for_like"}
    assert wanted <= set(result["ratios"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*rows, *wanted])


def test_scaling_is_drawn(monkeypatch, tmp_path):
    rows = [dict(scaling=key, row="this project, fp32", **{key: n}, images_per_second=10 * n)
            for key in ("batch", "time_steps", "processes") for n in (1, 2)]
    rows += [dict(scaling="weights", row="mask update", weights=n, seconds=n / 1e9)
             for n in (10**5, 10**6)]
    benchmark.draw_scaling(rows, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "scaling.png", "scaling.pdf", "scaling.csv"}


@pytest.mark.parametrize("argv", [["--quick", "--figures", "x"], ["--json", "nowhere/x.json"],
                                  ["--fast"]])
def test_bad_flags(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(argv)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


RATIOS = (  # of the README's table: the text, the key, the unit
    ("step, fp32: SpikingJelly / ours", "step_fp32_vs_spikingjelly", "x"),
    ("step, bf16: SpikingJelly in fp32 / ours", "step_bf16_vs_spikingjelly", "x"),
    ("step, fp32, like for like", "step_fp32_like_for_like", "x"),
    ("step, bf16, like for like", "step_bf16_like_for_like", "x"),
    ("inference, fp32: SpikingJelly / ours", "infer_fp32_vs_spikingjelly", "x"),
    ("inference, bf16, like for like", "infer_bf16_like_for_like", "x"),
    ("step, fp32: ours / ReLU floor", "step_fp32_vs_relu_floor", "x"),
    ("step, bf16: ours / ReLU floor", "step_bf16_vs_relu_floor", "x"),
    ("step, fp32: eager / compiled", "step_fp32_compiled", "x"),
    ("recording criticality in each step costs", "criticality_overhead", "%"),
    ("a mask update, in steps", "update_vs_step", "x"),
    ("peak memory of training: ours / SpikingJelly", "memory_vs_spikingjelly", "x"))


def ratio_rows():
    """The rows of the README's table of ratios, from the logs in results/."""
    full, small, *quick = (
        json.loads((ROOT / f"results/speed/benchmark{name}.json").read_text())["ratios"]
        for name in ("", "-small", "-quick1", "-quick2", "-quick3"))

    def cell(value, unit):
        return f"{100 * value:.1f} %" if unit == "%" else f"{value:.2f}"

    for text, key, unit in RATIOS:
        cells = [cell(run[prefix + key], unit) for run, prefix in (
            (full, ""), (full, "resnet19_"), (small, "small_"))]
        runs = [cell(run[key], unit) for run in quick if key in run]
        yield f"| {text} | {', '.join(runs) or '-'} | {' | '.join(cells)} |"


def test_the_ratios_in_the_readme_are_those_of_the_logs():
    text = (ROOT / "docs/speed.md").read_text().splitlines()
    for row in ratio_rows():
        assert row in text
