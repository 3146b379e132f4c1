"""benchmark.py: the same work in all rows, and a table and a JSON that hold together."""
import importlib.util
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import benchmark
import metrics
import models
from harness import frameworks, roofline
from helpers import one_line
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
        (frameworks.SpikingJelly, "spikingjelly"),
        (frameworks.SpikingJellyFused, "spikingjelly"), (frameworks.SnnTorch, "snntorch"))
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


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_memory_that_cannot_be_measured_is_a_line(monkeypatch, capsys):
    """The process that measures it may be killed, for its memory."""
    monkeypatch.setattr(benchmark, "_peak", die)
    assert benchmark.peak_memory("small", benchmark.OURS, CPU, 3) is None
    assert one_line(capsys).startswith("this project, fp32, T = 3: memory not measured: A process")
    monkeypatch.setattr(benchmark, "peak_memory",
                        lambda network, row, *_: None if row == benchmark.OURS else 9.0)
    monkeypatch.setattr(benchmark, "STATUS", Path())
    rows = [benchmark.OURS, benchmark.FLOOR]
    found = benchmark.memory_of("small", rows, CPU, False, dict.fromkeys(rows, {}))
    assert found == {(benchmark.FLOOR, T): 9.0 for T in (4, 1, 8)}


@pytest.mark.parametrize("failing", ["write_json", "measure_pruned_inference"])
def test_a_late_error_leaves_the_table(failing, monkeypatch, capsys):
    def fail(*_):
        raise OSError("no room is left")

    row = dict(network="small", row="the first", step_ms=3.0, step_low_ms=2.0, step_high_ms=4.0)
    monkeypatch.setattr(benchmark, "measure", lambda *_: ([row], dict(some_ratio=2.5)))
    monkeypatch.setattr(benchmark, failing, fail)
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--networks", "small", "--device", "cpu", "--json", "all.json"])
    said = capsys.readouterr()
    assert stopped.value.code == 1 and said.err.endswith("error: no room is left\n")
    assert "| the first | 3.00 (2.00-4.00) |" in said.out and "small_some_ratio" in said.out


def test_scaling_is_drawn(monkeypatch, tmp_path):
    rows = [dict(scaling=key, row="this project, fp32", **{key: n}, images_per_second=10 * n)
            for key in ("batch", "time_steps", "processes") for n in (1, 2)]
    rows += [dict(scaling="weights", row="mask update", weights=n, seconds=n / 1e9)
             for n in (10**5, 10**6)]
    benchmark.draw_scaling(rows, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "scaling.png", "scaling.pdf", "scaling.csv"}


# ---- what a step needs ---------------------------------------------------------------------------


def test_the_work_of_a_layer_counted_by_hand():
    conv = torch.nn.Conv2d(2, 4, 3, padding=1, bias=False)  # 4 x 2 x 3 x 3 = 72 weights
    x, y = 2 * 5 * 5, 4 * 5 * 5
    parts = roofline.of_layer("c", conv, x, y, 2)
    # an output is a sum of 2 x 3 x 3 products
    assert [part.flops for part in parts] == [2 * 100 * 18] * 3
    assert [part.bytes for part in parts] == [2 * (50 + 72 + 100)] * 3
    assert [part.what for part in parts] == [
        "c, forward", "c, backward for the weights", "c, backward for the input"]
    assert roofline.of_layer("c", conv, x, y, 2, needs_input_gradient=False) == parts[:2]
    linear = torch.nn.Linear(6, 3)
    assert roofline.of_layer("l", linear, 4 * 6, 4 * 3, 4)[0] == (
        "l, forward", 2 * 4 * 6 * 3, 4 * (24 + 18 + 12))
    grouped = torch.nn.Conv2d(4, 4, 1, groups=4)
    assert roofline.of_layer("g", grouped, 4, 4, 4)[0].flops == 2 * 4
    assert [part.bytes for part in roofline.of_layer("b", torch.nn.BatchNorm2d(4), 10, 10, 4)] == [
        120, 200]
    # five steps of an input that is the same at each
    assert [part.bytes for part in roofline.of_layer("s", LIF(), 10, 50, 2)] == [120, 140]
    assert roofline.of_layer("d", torch.nn.Flatten(), 10, 10, 4) == []
    assert [part.bytes for part in roofline.of_pooling(40, 10, 2)] == [100, 100]
    assert roofline.of_optimizer(10, 4) == [("optimizer", 0, 200)]
    assert roofline.of_optimizer(10, 2) == [("optimizer", 0, 320)]


def test_the_work_of_a_network_is_that_of_its_layers():
    """VGG-16 on a batch of 2, T = 3: MACs as metrics counts them; and the parts by name."""
    parts = roofline.count("vgg16", 10, 3, 32, 3, 2, 4, models.default_widths("vgg16", 0.1))
    by_name = {part.what: part for part in parts}
    config = dict(name="vgg16", num_classes=10, in_channels=3, image_size=32, time_steps=3,
                  widths=models.default_widths("vgg16", 0.1))
    macs = metrics.macs(config)
    first, *others = macs
    assert len(macs) == 14 and by_name[f"{first}, forward"].flops == 2 * 2 * macs[first]
    for name in others:  # the first layer sees the image once, and the others 3 steps
        for way in ("forward", "backward for the weights", "backward for the input"):
            assert by_name[f"{name}, {way}"].flops == 2 * 2 * 3 * macs[name]
    assert f"{first}, backward for the input" not in by_name  # the image needs none
    kinds = [sum(word in part.what for part in parts) for word in (".bn,", "lifs", "pooling")]
    assert kinds == [2 * 13, 2 * 13, 2 * 5]
    neuron = by_name["lifs.0, forward"]  # of 6 channels: 2 images of 32 x 32, then 3 steps
    assert neuron.bytes == 4 * 6 * 32 * 32 * (2 + 6)
    half = roofline.count("vgg16", 10, 3, 32, 3, 2, 2, models.default_widths("vgg16", 0.1))
    assert [part.flops for part in half] == [part.flops for part in parts]
    assert half[0].bytes == parts[0].bytes / 2


@pytest.mark.parametrize("name", ["resnet19", "resnet19-pre", "small-avg"])
def test_other_networks_are_counted_whole(name):
    widths = models.default_widths(name, 0.1)
    parts = roofline.count(name, 10, 3, 32, 2, 2, 4, widths)
    with torch.device("meta"):
        net = models.build(name, 10, 3, 32, 2, widths)
    forward = {part.what.removesuffix(", forward") for part in parts}
    layers = {key for key, module in net.named_modules()
              if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear, torch.nn.BatchNorm2d, LIF))}
    assert layers <= forward
    assert sum("pooling" in part.what for part in parts) == (6 if name == "small-avg" else 0)


def test_a_part_takes_the_longer_of_its_two_times():
    parts = [roofline.Part("a", 100, 1), roofline.Part("b", 10, 300)]
    assert roofline.seconds(parts, 10, 100) == 100 / 10 + 300 / 100


def test_the_rates_are_those_of_the_fastest_round():
    times = iter([0.5, 2, 1, 4, 8, 2] * 2)  # the first is to warm up
    calls = []

    def timed(action):
        action()
        calls.append(1)
        return next(times)

    assert roofline.copy_rate(timed, CPU, 100) == 2 * 400 / 1
    assert roofline.matmul_rate(timed, CPU, 8, torch.float32) == 2 * 8**3 / 1
    assert len(calls) == 12


def test_the_speed_of_a_row():
    work = dict(gflop=1.0, gigabytes=2.0, roofline_ms=4.0)
    cells = benchmark.speed_of([0.01, 0.01, 0.01], 128, work)
    assert cells["steps_per_second"] == pytest.approx(100) and cells["gflop"] == 1
    assert cells["epochs_per_minute"] == pytest.approx(60 / 3.91)  # 391 steps
    assert cells["times_roofline"] == pytest.approx(2.5)
    cells = benchmark.speed_of([0.01, 0.01], 128, work | dict(roofline_ms=None))
    assert cells["times_roofline"] is None
    found = benchmark.work_of("vgg16", CPU, dict(copy=1e11, fp32=1e12, bf16=2e12), 4)
    parts = roofline.count("vgg16", 100, 3, 32, 5, 32, 4)
    assert found["roofline_ms"] == pytest.approx(1e3 * roofline.seconds(parts, 1e12, 1e11))
    assert found["gflop"] == pytest.approx(299.2, abs=0.1)
    assert benchmark.measure_rates(CPU) == {}


# ---- on a GPU ------------------------------------------------------------------------------------


class Clock:
    """An event of a GPU that is the processor."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        assert self.at

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def stand_in(monkeypatch):
    """The processor stands in for a GPU: the code for GPUs runs, and its numbers mean nothing."""
    monkeypatch.setattr(benchmark, "on_gpu", lambda device: True)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None),
                        ("memory_allocated", 2**20), ("max_memory_allocated", 3 * 2**20)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(benchmark, "SIZES", TINY)
    for name, value in (("GPU_BATCH", 3), ("GPU_SECONDS", {"quick": 0, "full": 0}),
                        ("CALLS", 2), ("COPIED", 100), ("SIDE", 8)):
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(benchmark, "profiled", lambda step: benchmark.counts_of(EVENTS, 2))


def event(name, device, microseconds=0, is_user_annotation=False):
    return SimpleNamespace(name=name, device_type=device, device_time_total=microseconds,
                           is_user_annotation=is_user_annotation)


HOST, DEVICE = benchmark.DeviceType.CPU, benchmark.DeviceType.CUDA
EVENTS = [event("aten::convolution", HOST, 3000), event("aten::cudnn_convolution", HOST, 3000),
          event("aten::convolution_backward", HOST, 5000), event("aten::add", HOST, 100),
          event("conv_kernel", DEVICE, 3000), event("wgrad", DEVICE, 5000),
          event("add_kernel", DEVICE, 100), event("Memcpy DtoD (Device -> Device)", DEVICE, 50),
          event("Memset (Device)", DEVICE, 1),
          event("Optimizer.step#SGD.step", DEVICE, 9000, is_user_annotation=True)]


def test_kernels_are_counted_and_nothing_else():
    assert benchmark.counts_of(EVENTS, 2) == dict(launches=1.5, kernels_ms=4.05, convolutions_ms=4)


def test_the_profiler_gives_what_is_counted():
    """Its events have the attributes that counts_of reads; a processor has no kernels."""
    conv, x = torch.nn.Conv2d(1, 1, 3), torch.randn(1, 1, 5, 5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        conv(x).sum().backward()
    names = [found.name for found in profile.events()]
    assert "aten::convolution" in names and "aten::convolution_backward" in names
    assert benchmark.counts_of(profile.events(), 1) == dict(
        launches=0, kernels_ms=0, convolutions_ms=0)


def test_a_gpu_is_timed_between_events(stand_in, monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def action():
        calls.append(1)
        now[0] += 3

    assert benchmark.timed(action, CPU) == 3  # of one call; the first is not timed
    assert len(calls) == 1 + benchmark.CALLS
    assert benchmark.launch_ms(action, rounds=3) == 3000


def test_what_fails_in_turns_leaves_the_others():
    def fail():
        raise RuntimeError("no\n  memory")

    failed, order = {}, []
    times = benchmark.take_turns({"a": fail, "b": lambda: order.append("b")}, 0, CPU, 3, failed)
    assert failed == {"a": "not measured: no memory"}
    assert list(times) == ["b"] and len(times["b"]) == 3
    with pytest.raises(RuntimeError):
        benchmark.take_turns({"a": fail}, 0, CPU)
    assert benchmark.take_turns({"a": fail}, 0, CPU, 3, failed) == {}


def test_rows_without_triton_need_triton_first(monkeypatch):
    net = models.build("small", 5, 1, 8, 2)
    lifs = [net.get_submodule(name) for name in models.lifs(net)]
    for lif in lifs:
        monkeypatch.setattr(lif, "triton_devices", (), raising=False)
    with pytest.raises(ValueError, match="no neuron runs in Triton"):
        benchmark.leave_out_triton(net)
    for lif in lifs:
        monkeypatch.setattr(lif, "triton_devices", ("cuda",))
    benchmark.leave_out_triton(net)
    assert [lif.triton_devices for lif in lifs] == [()] * len(lifs)


def test_quick_on_a_gpu_has_every_column(stand_in, narrow, monkeypatch, tmp_path, capsys):
    class Failing(benchmark.Candidate):
        def step(self):
            if self.row.neuron is LIF:
                raise RuntimeError("the kernel failed")
            super().step()

    monkeypatch.setattr(benchmark, "Candidate", Failing)
    monkeypatch.setattr(torch, "compile", lambda net: net)  # the compiler takes minutes
    monkeypatch.setitem(sys.modules, "snntorch", None)  # not installed
    monkeypatch.setattr(benchmark, "measure_pruned_inference", lambda *_: [])
    report = tmp_path / "new" / "report"
    benchmark.main(["--quick", "--networks", "small", "--device", "cpu", "--report", str(report)])
    result = json.loads((report / "benchmark.json").read_text())
    rows = {row["row"]: row for row in result["rows"]}
    assert set(benchmark.GPU_ROWS) - set(rows) == {"this project, fp32, compiled"}
    assert rows["plain autograd, fp32"]["note"] == "not measured: the kernel failed"
    assert rows["snnTorch, bf16"]["note"] == benchmark.INSTALL
    ours = rows["this project, bf16"]
    assert ours["batch"] == 3 and ours["memory_mib"] == 2 and ours["launches"] == 1.5
    assert ours["host_ms"] > 0 and ours["build_seconds"] > 0 and ours["times_roofline"] > 0
    assert set(result["rates"]) == {"copy", "fp32", "bf16"}
    compiled = rows["this project, bf16, compiled"]
    assert compiled["launches"] == 1.5 and compiled["step_ms"] > 0 and "infer_ms" not in compiled
    assert {"small_step_bf16_compiled", "small_step_bf16_vs_relu_floor"} <= set(result["ratios"])
    text = (report / "benchmark.md").read_text()
    assert all(title in text for title in benchmark.COLUMNS)
    assert all(row in text for row in rows) and "the kernel failed" in text
    assert all(f"- {title}:" in text for title in benchmark.LEGEND)
    assert {path.name for path in report.iterdir()} == {
        "benchmark.json", "benchmark.md", "steps.png", "steps.pdf", "steps.csv"}
    assert text.split("\n\n")[1] in capsys.readouterr().out


def test_nothing_is_lost_if_ours_fails(stand_in, narrow, monkeypatch, tmp_path):
    step = benchmark.Candidate.step

    def fail(self):
        if self.row.neuron is FastLIF:
            raise RuntimeError("the kernel failed")
        step(self)

    monkeypatch.setattr(benchmark.Candidate, "step", fail)
    rates = dict(copy=1e9, fp32=1e9, bf16=1e9)
    rows, ratios = benchmark.measure("small", CPU, True, rates)
    rows = {row["row"]: row for row in rows}
    assert rows[benchmark.FLOOR]["step_ms"] > 0 and ratios == {}
    assert rows[benchmark.OURS]["note"] == "not measured: the kernel failed"
    rows, ratios = benchmark.measure_compiled("small", CPU, True, rates)
    assert rows == [dict(network="small", row="this project, bf16, compiled",
                         note="not measured: the kernel failed")] and ratios == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
def test_a_step_on_a_real_gpu_is_measured(monkeypatch):
    monkeypatch.setattr(benchmark, "GPU_SECONDS", {"quick": 1, "full": 1})
    device = torch.device("cuda")
    rows, ratios = benchmark.measure("small", device, True, benchmark.measure_rates(device))
    ours = {row["row"]: row for row in rows}["this project, bf16"]
    assert ours["launches"] > 10 and 0 < ours["convolutions_ms"] < ours["kernels_ms"]
    assert 0 < ours["roofline_ms"] < ours["step_ms"] and ours["memory_mib"] > 1


def test_a_table_has_the_columns_that_it_has_cells_for():
    table = benchmark.markdown([dict(row="a", step_ms=3.0, step_low_ms=1.234, step_high_ms=45.67),
                                dict(row="b", note="not installed")])
    assert table.splitlines()[:4] == [
        "| row | step, ms         |", "| --- | ---------------- |",
        "| a   | 3.00 (1.23-45.7) |", "| b   | not installed    |"]
    assert table.splitlines()[5].startswith("- step, ms:") and len(table.splitlines()) == 6


def test_the_picture_is_drawn_from_what_there_is(tmp_path):
    """Invented numbers, of a GPU and of a processor; and of a result without rows."""
    row = dict(network="small", batch=128, time_steps=4, step_ms=3.0, step_low_ms=2.9,
               step_high_ms=3.2, steps_per_second=333.3, roofline_ms=None)
    result = dict(device="invented", threads=1, torch="0", rates={}, rows=[])
    benchmark.draw_steps(result, tmp_path)
    assert not list(tmp_path.iterdir())
    names = ["this project, fp32", "SpikingJelly, fp32", "ReLU floor, fp32", "another"]
    result["rows"] = [row | dict(row=name) for name in names]
    benchmark.draw_steps(result, tmp_path / "cpu")
    gpu = result | dict(rates=dict(copy=1e12, fp32=1e13, bf16=1e14), rows=[
        row | dict(row=name, network=network, roofline_ms=1.0, launches=99, memory_mib=9)
        for name in names for network in ("small", "vgg16")])
    benchmark.draw_steps(gpu, tmp_path / "gpu")
    for folder in ("cpu", "gpu"):
        assert {path.name for path in (tmp_path / folder).iterdir()} == {
            "steps.png", "steps.pdf", "steps.csv"}


def test_a_report_is_a_folder_and_json_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--quick", "--report", str(tmp_path / "file")])
    assert stopped.value.code == 2 and "expected a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--quick", "--json", str(tmp_path)])
    assert stopped.value.code == 2 and "a folder, expected a file" in one_line(capsys)


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


def test_the_estimates_in_the_docs_are_those_of_the_count():
    """docs/speed.md: times of the paper's schedules, by half of the FLOPs and 80 % of the bytes a
    second that a card's data sheet promises."""
    text = (ROOT / "docs/speed.md").read_text()
    counted = [roofline.count(name, 100, 3, 32, 5, 128, 2) for name in ("vgg16", "resnet19")]
    rows = re.findall(r"^\| (.+) \| ([\d.]+), (\d+) \| (.+) \|$", text, re.M)
    assert len(rows) == 6
    for _, terabytes, teraflops, cells in rows:
        expected = []
        for parts in counted:
            step = roofline.seconds(parts, 0.5e12 * float(teraflops), 0.8e12 * float(terabytes))
            minutes = 500 * 391 * step / 60
            whole = f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
            expected += [f"{1e3 * step:.1f}", f"{391 * step:.1f}", whole]
        assert cells == " | ".join(expected)
    totals = [(sum(p.flops for p in parts) / 1e12, sum(p.bytes for p in parts) / 1e9)
              for parts in counted]
    for words in ("has {:.2f} TFLOP", "at least {:.1f} GB"):
        assert words.format(totals[0]["GB" in words]) in " ".join(text.split())
    assert "has {:.2f} TFLOP and {:.1f} GB".format(*totals[1]) in text


def test_ratios_that_matter_on_a_gpu():
    ours, default = "this project, bf16", "SpikingJelly, bf16"
    fused = f"{default}, channels_last, fused"
    times = {ours: [0.002, 0.004, 0.002], default: [0.006, 0.012, 0.006], fused: [0.003, 0.006, 0.003]}
    found = benchmark.gpu_ratios(times, {ours: 600, fused: 1000}, {ours: dict(convolutions_ms=1.6)})
    assert found == pytest.approx(dict(
        step_bf16_vs_spikingjelly_bf16_default=3, step_bf16_vs_spikingjelly_bf16_fused=1.5,
        memory_bf16_vs_spikingjelly_fused=0.6, step_bf16_vs_convolutions=1.25))
    assert benchmark.gpu_ratios({}, {}, {}) == {}
    assert benchmark.gpu_ratios({ours: [1.0]}, {ours: 1}, {ours: {}}) == {}
