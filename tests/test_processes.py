"""Several processes on one run, as torchrun starts them: two ranks, and three, by gloo on the CPU.

Starting a rank takes seconds: what can be seen within one start is done in one (`exercises`), by
this file itself, which torchrun runs as a script; the tests look at what the ranks have left.
"""
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import analyze
import data
import helpers
import metrics
import modelfile
import models
import prune_granet
import prune_greg
import prune_lottery
import prune_ndsnn
import prune_sca
import prune_structured
import prune_unstructured
import training
from harness import files, meters, plots, processes, records, runfolder, setup

ROOT = Path(__file__).parent.parent
# 9 steps an epoch, the last of one image: a rank without one; 6 updates
SHORT = ["--train-limit", "201", "--epochs-prune", "2", "--epochs-finetune", "1", "--interval", "3",
         "--width", "0.25", "--batch-size", "25"]
SLIM = ["--train-limit", "300", "--epochs-pretrain", "3", "--epochs-finetune", "1", "--width",
        "0.25", "--batch-size", "25"]
STOP_AT = 11  # in the second epoch


def torchrun(*command, ranks=2):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # for this file, as a script
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc-per-node={ranks}", *map(str, command)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": path}, timeout=600)  # the machine may be busy


# ---- what the ranks do ---------------------------------------------------------------------------


def small_net(images, dtype):
    torch.manual_seed(0)
    net = models.build("small", 10, 1, 28, 4, models.default_widths("small", 0.25)).to(dtype)
    net.set_normalisation(images.mean, images.std)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # away from its start: so are its statistics
            module.running_var.uniform_(0.2, 0.6)
    return net


def settings(**given):
    return prune_unstructured.parse_args([*SHORT, "--device", "cpu"]).__class__(
        **dict(batch_size=50, precision="fp32", device="cpu", compile=False, sync_bn=False,
               loss="ce", encoding="direct") | given)


def in_float64(logits, labels, kind):  # where loss_over_time is in float32
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))


def gradients_and_scores(n):
    """Return the gradient and the LIFs' scores of a batch of n images, in float64, BN in eval."""
    images = data.load("fashion-mini")
    net = small_net(images, torch.float64)
    forward = setup.forward_of(settings(), net.eval())
    x, y = next(data.batches(images.x_train[:n], images.y_train[:n], n, 0, 0, flip=True,
                             rank=processes.rank(), size=processes.size()))
    run = SimpleNamespace(
        net=net, forward=forward, args=settings(), weight=processes.weight(n), iteration=1,
        share=processes.weight(n) / processes.size(), total=processes.total,
        meter=meters.Meter(torch.device("cpu")))
    with mock.patch.object(training, "loss_over_time", in_float64):
        scores = training.backward(run, x, y, "max")
    return (torch.cat([p.grad.flatten() for p in net.parameters()]),
            torch.cat(list(scores.values())))


def passes_over_the_data(batch_size):
    """Return the results of evaluation and of both scores over the training set, in float64."""
    images = data.load("fashion-mini", train_limit=130)
    images = images._replace(x_test=images.x_test[:110], y_test=images.y_test[:110])
    net, args = small_net(images, torch.float64), settings(batch_size=batch_size)
    batches = processes.share(images.pairs("test", 4 * batch_size))
    scored = [training.score_channels(net, images.pairs("train", batch_size), args, metric,
                                      mine=processes.share, total=processes.total)
              for metric in ("criticality", "gradient")]
    return [training.evaluate(net, net, batches, args, processes.total), *scored]


def statistics():
    """Running statistics that differ between ranks: what is saved of them, and their mean."""
    net = small_net(data.load("fashion-mini"), torch.float32)
    for bn in (module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        bn.running_mean.fill_(1.0 + processes.rank())
    own = net.state_dict()["convs.0.bn.running_mean"].clone()
    rows = processes.statistics(net)
    processes.average_statistics(net)
    mean = net.state_dict()["convs.0.bn.running_mean"].clone()
    processes.restore_statistics(net, rows)
    again = net.state_dict()["convs.0.bn.running_mean"].clone()
    processes.restore_statistics(net, torch.cat([rows, rows, rows])[:3])  # of three ranks
    return own, mean, again, net.state_dict()["convs.0.bn.running_mean"].clone(), net.mean


def sums_of_an_epoch():
    meter, logits = meters.Meter(torch.device("cpu")), torch.eye(3)[None]
    meter.add(torch.tensor(1.0 + processes.rank()), logits[:, :2 + processes.rank()],
              torch.tensor([0, 1, 0])[:2 + processes.rank()], 1)
    meter.counts = False
    meter.add(torch.tensor(100.0), logits, torch.tensor([0, 1, 0]), 2)
    rows, found = meter.state(), [meter.means()]
    for saved in (rows, rows[:1], torch.cat([rows, rows])):
        other = meters.Meter(torch.device("cpu"))
        other.restore(saved)
        found += [other.means(), other.samples]
    return found


def watching(seen, masks):
    """Patch the run so that the images of each batch, and the masks of each update, are noted."""
    def batches(*given, **more):
        for x, y in yielding(*given, **more):
            flat = x.contiguous()
            seen.append([min(image.numpy().tobytes(), image.flip(2).contiguous().numpy().tobytes())
                         for image in flat])
            yield x, y

    def log_update(self, *given, **more):
        masks.append(self.masks.flat.clone())
        logging(self, *given, **more)

    yielding, data.batches = data.batches, batches
    logging, runfolder.Run.log_update = runfolder.Run.log_update, log_update
    return yielding, logging


def frozen_bn(self, x):  # a variance at which all layers fire
    return torch.nn.functional.batch_norm(x, self.running_mean, 0.03 * self.running_var,
                                          self.weight, self.bias, False, 0.0, self.eps)


def with_frozen_bn():
    """An epoch of each script in which no image depends on the others of its batch."""
    short = ["--train-limit", "201", "--width", "0.25", "--batch-size", "25", "--lr", "1e-4"]
    forward, torch.nn.BatchNorm2d.forward = torch.nn.BatchNorm2d.forward, frozen_bn
    prune_unstructured.main([*short, "--sparsity", "0", "--epochs-prune", "1",
                             "--epochs-finetune", "0", "--run-dir", "frozen"])
    prune_structured.main([*short, "--prune-ratio", "0", "--epochs-pretrain", "1",
                           "--epochs-finetune", "0", "--run-dir", "frozen-slim"])
    torch.nn.BatchNorm2d.forward = forward


def at_iteration(act):
    """Call act() on each rank when it has done STOP_AT steps."""
    add = meters.Meter.add

    def patched(self, loss, logits, labels, at=0):
        add(self, loss, logits, labels, at)
        if at == STOP_AT:
            meters.Meter.add = add
            act()
    meters.Meter.add = patched


def ends_with(main, *given):
    """Run a script that must end early; return its exit code and what it wrote to stderr."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        try:
            main([*given])
        except SystemExit as stop:
            return stop.code, error.getvalue()
    return 0, error.getvalue()


def with_other_data():
    """Replace a finished run, with a file of each rank that differs in a pixel."""
    images = data.load("fashion-mini", train_limit=300)
    arrays = {key: getattr(images, key).numpy() for key in data.KEYS}
    x_train, x_test = arrays["x_train"][:, 0].copy(), arrays["x_test"][:, 0]
    x_train[0, 0, 0] = processes.rank()
    path = f"of{processes.rank()}.npz"
    np.savez(path, **arrays | dict(x_train=x_train, x_test=x_test))
    speaks, processes.speaks = processes.speaks, lambda code: True
    end = ends_with(prune_unstructured.main, *SHORT, "--dataset", path, "--run-dir", "granet",
                    "--overwrite")
    processes.speaks = speaks
    return end


def exercises():
    found, main = {}, prune_unstructured.main
    processes.start(torch.device("cpu"))
    found["gradients"] = {n: gradients_and_scores(n) for n in (8, 7, 1)}
    found["passes"] = {size: passes_over_the_data(size) for size in (50, 1000)}
    found["statistics"], found["meters"] = statistics(), sums_of_an_epoch()
    found["largest"] = processes.largest(3 - 2 * processes.rank())
    processes.agree("numbers", torch.arange(5))
    processes.end = processes.rank  # the ranks meet again: one group for all the runs here

    seen, masks = [], []
    original = watching(seen, masks)
    main([*SHORT, "--run-dir", "whole"])
    data.batches, runfolder.Run.log_update = original
    found |= dict(seen=seen, masks=masks)

    at_iteration(lambda: processes.rank() == 1 and os.kill(os.getpid(), signal.SIGTERM))
    found["stopped"] = ends_with(main, *SHORT, "--run-dir", "stopped")
    found["saved"] = files.read_checkpoint("stopped")["position"]
    main(["--resume", "--run-dir", "stopped"])
    main([*SHORT, "--run-dir", "seldom", "--evaluate-every", "3"])
    metrics.speedup = lambda *_, **__: 1.0  # it takes seconds
    with_frozen_bn()
    prune_structured.main([*SLIM, "--run-dir", "slim"])
    prune_greg.main([*SLIM, "--run-dir", "greg", "--smoke"])
    prune_granet.main([*SHORT, "--run-dir", "granet"])
    prune_ndsnn.main([*SHORT, "--run-dir", "ndsnn", "--growth", "random"])
    prune_sca.main([*SHORT, "--run-dir", "sca"])

    found["other data"] = with_other_data()
    update = prune_unstructured.prune_and_regenerate

    def differ(masks, *given):
        result = update(masks, *given)
        if processes.rank() == 1 and masks.sparsity > 0.6:
            masks.flat[0] = ~masks.flat[0]
        return result

    prune_unstructured.prune_and_regenerate = differ
    found["mismatch"] = ends_with(main, *SHORT, "--run-dir", "mismatch")
    torch.save(found, f"rank{processes.rank()}.pt")


def dies():
    at_iteration(lambda: processes.rank() == 1 and os.kill(os.getpid(), signal.SIGKILL))
    prune_unstructured.main([*SHORT, "--run-dir", "killed"])


def node_dies():
    """Rank 1 goes with its agent, as a node does."""
    def die():
        if processes.rank() == 1:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    at_iteration(die)
    prune_unstructured.main([*SHORT, "--run-dir", "nodes"])


def three():
    """Go on with three ranks; and once more, stopped under way."""
    processes.end = processes.rank
    prune_unstructured.main(["--resume", "--run-dir", "with3"])
    at_iteration(lambda: processes.rank() == 2 and os.kill(os.getpid(), signal.SIGTERM))
    assert ends_with(prune_unstructured.main, "--resume", "--run-dir", "stop3") == (143, "")
    prune_unstructured.main(["--resume", "--run-dir", "stop3"])


# ---- one start of two ranks ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two ranks did their exercises, and what each of them found."""
    folder = tmp_path_factory.mktemp("two")
    with contextlib.chdir(folder):
        done = torchrun(__file__, "exercises")
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Warning" not in done.stderr, done.stderr
    return folder, done, [torch.load(folder / f"rank{number}.pt", weights_only=False)
                          for number in range(2)]


def test_gradients_and_scores_are_those_of_the_whole_batch(two):
    """An even batch, an uneven one, and one image, for two ranks."""
    _, _, found = two
    for n in (8, 7, 1):
        gradient, scores = gradients_and_scores(n)
        for rank in found:
            assert (rank["gradients"][n][0] - gradient).abs().max() < 1e-12
            assert (rank["gradients"][n][1] - scores).abs().max() < 1e-12
        assert torch.equal(found[0]["gradients"][n][0], found[1]["gradients"][n][0])
        assert torch.equal(found[0]["gradients"][n][1], found[1]["gradients"][n][1])
        assert gradient.abs().max() > 1e-3


def test_passes_over_the_data_are_those_of_one_process(two):
    """Evaluation and scores over the training set; with one batch in all, a rank has none."""
    _, _, found = two
    for size in (50, 1000):
        test, *scored = passes_over_the_data(size)
        for rank in found:
            other, *others = rank["passes"][size]
            assert (other["accuracy"], other["rate"], other["silent"]) == (
                test["accuracy"], test["rate"], test["silent"])
            assert other["loss"] == pytest.approx(test["loss"], rel=1e-12)
            for (scores, spiked), (same, also) in zip(scored, others):
                assert torch.allclose(scores, same, rtol=1e-10, atol=0) and scores.max() > 0
                assert torch.equal(spiked, also) and spiked.any()


def test_without_bn_a_run_is_that_of_one_process(two, monkeypatch):
    folder, _, _ = two
    monkeypatch.setattr(metrics, "speedup", lambda *_, **__: 1.0)
    with_frozen_bn()
    torch.manual_seed(0)
    start = models.build("small", 10, 1, 28, 4, models.default_widths("small", 0.25)).state_dict()
    for name in ("frozen", "frozen-slim"):
        one, two = (modelfile.read(root / name / "model.pt")["state_dict"]
                    for root in (Path(), folder))
        for key in start.keys() - {"_extra_state"}:
            step = (one[key] - start[key]).double()
            apart = (one[key] - two[key]).double().norm()
            assert apart <= 2e-3 * step.norm(), (name, key, apart / step.norm())
        assert not torch.equal(one["fc.weight"], start["fc.weight"])
        rows = [helpers.lines(root / name, "metrics")[0] for root in (Path(), folder)]
        assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], rel=1e-5)
        assert rows[0]["train_accuracy"] == rows[1]["train_accuracy"]


def test_statistics_and_meters(two):
    _, _, found = two
    for number, rank in enumerate(found):
        own, mean, again, of_three, pixels = rank["statistics"]
        assert (own == 1 + number).all() and (mean == 1.5).all()
        assert (again == 1 + number).all()  # as many ranks as had saved them
        assert torch.allclose(of_three, torch.full_like(of_three, 4 / 3))  # the mean of 1, 2, 1
        assert torch.allclose(pixels, torch.tensor(data.load("fashion-mini").mean))
        # 2 images of loss 1, both right; 3 of loss 2, two right
        whole = (8 / 5, 4 / 5)
        assert rank["meters"] == [
            whole, whole, 2 + number, (1.0, 1.0), 2 * (number == 0), whole, 10 * (number == 0)]
        assert rank["largest"] == 3


def test_each_image_is_seen_once_an_epoch(two):
    folder, _, found = two
    images = data.load("fashion-mini", train_limit=201)
    every = sorted(min(x.numpy().tobytes(), x.flip(2).contiguous().numpy().tobytes())
                   for x in images.x_train.contiguous())
    for epoch in range(3):
        steps = [rank["seen"][9 * epoch:9 * epoch + 9] for rank in found]
        assert [[len(step) for step in rank] for rank in steps] == [
            [13] * 8 + [1], [12] * 8 + [1]]
        assert steps[0][-1] == steps[1][-1]  # one image for two ranks: rank 1's weighs nothing
        assert sorted(sum(steps[0], []) + sum(steps[1][:-1], [])) == every
    for row in helpers.lines(folder / "whole", "metrics"):
        assert row["train_accuracy"] * 201 == pytest.approx(round(row["train_accuracy"] * 201))
    assert len(found[0]["seen"]) == len(found[1]["seen"]) == 27


def test_ranks_share_the_batches_of_one_process():
    """Order and augmentation of an image do not depend on the number of ranks."""
    x = torch.arange(23 * 64, dtype=torch.int32).remainder(251).to(torch.uint8).view(23, 1, 8, 8)
    given = dict(pad=2, flip=True, cutout=3)
    whole = list(data.batches(x, torch.arange(23), 7, 3, 5, **given))
    for size in (2, 3, 5):
        parts = [list(data.batches(x, torch.arange(23), 7, 3, 5, **given, rank=rank, size=size))
                 for rank in range(size)]
        for step, (images, labels) in enumerate(whole):
            for rank in range(size):
                share = slice(rank if rank < len(labels) else 0, None, size)
                assert torch.equal(parts[rank][step][1], labels[share][:len(parts[rank][step][1])])
                assert torch.equal(parts[rank][step][0], images[share])


def test_both_ranks_have_the_same_masks(two):
    folder, _, found = two
    assert len(found[0]["masks"]) == len(found[1]["masks"]) == 6
    for one, other in zip(found[0]["masks"], found[1]["masks"]):
        assert torch.equal(one, other) and not one.all()
    updates = helpers.lines(folder / "whole", "updates")
    total = len(found[0]["masks"][0])
    for mask, row in zip(found[0]["masks"], updates, strict=True):
        assert int(mask.sum()) == total - round(row["target"] * total)
    assert records.command_of(records.read_run(folder / "whole")).startswith(
        "torchrun --nproc-per-node=2 prune_unstructured.py --train-limit 201 ")


def test_one_rank_writes_and_prints(two):
    folder, done, _ = two
    assert len(re.findall("test accuracy at .* sparsity -> whole$", done.stdout, re.M)) == 1
    assert len(re.findall(r"^ +update +6 ", done.stdout, re.M)) == 6  # of six runs
    assert not list(folder.glob("*/*.tmp"))


def test_a_signal_to_one_rank_stops_both_at_the_same_step_and_resume_is_exact(two):
    folder, done, found = two
    assert [rank["stopped"] for rank in found] == [(143, "")] * 2
    assert found[0]["saved"] == [1, STOP_AT - 9, STOP_AT]
    assert done.stdout.count(f"stopped after iteration {STOP_AT}, saved.") == 1
    helpers.assert_same_run(folder / "whole", folder / "stopped")


def test_the_network_does_not_depend_on_when_it_is_evaluated(two):
    """Also the running statistics, which ranks share before an evaluation, bit by bit."""
    folder, _, _ = two
    assert [row["test_accuracy"] is None for row in helpers.lines(folder / "seldom", "metrics")] == [
        True, False, False]
    one, other = (modelfile.read(folder / name / "model.pt")["state_dict"]
                  for name in ("whole", "seldom"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_ranks_that_differ_stop(two):
    folder, _, found = two
    assert [rank["mismatch"][0] for rank in found] == [1, 1]
    lines = "".join(rank["mismatch"][1] for rank in found)
    assert lines.count("\n") == 1 and (
        "the masks after iteration 6 of rank 1 differ from those of rank 0" in lines), lines
    assert len(helpers.lines(folder / "mismatch", "updates")) == 1  # nothing of it is kept


def test_ranks_with_other_data_stop_before_anything_is_removed(two):
    folder, _, found = two
    for code, line in (rank["other data"] for rank in found):
        assert code == 2 and "the data of rank 1 differ from those of rank 0" in line
    config = json.loads((folder / "granet/config.json").read_text())
    assert config["dataset"] == "fashion-mini" and (folder / "granet/summary.json").exists()


def test_it_learns_like_one_process(two, monkeypatch):
    folder, _, _ = two
    monkeypatch.setattr(metrics, "speedup", lambda *_, **__: 1.0)
    single = prune_structured.main([*SLIM, "--run-dir", "slim"])
    rows, others = helpers.lines("slim", "metrics"), helpers.lines(folder / "slim", "metrics")
    for row, other in zip(rows, others, strict=True):
        assert row["iteration"] == other["iteration"] and row["lr"] == other["lr"]
        assert row["train_loss"] == pytest.approx(other["train_loss"], abs=0.25)
    assert rows[2]["train_loss"] < 0.8 * rows[0]["train_loss"]
    shared = json.loads((folder / "slim/summary.json").read_text())
    assert shared["test_accuracy"] == pytest.approx(single["test_accuracy"], abs=0.15)
    assert shared["prune_ratio"] == single["prune_ratio"] and shared["speedup_batch1"] > 0
    assert (folder / "slim/channels.json").exists() and (folder / "greg/summary.json").exists()


@pytest.mark.parametrize("method", ["granet", "ndsnn"])
def test_methods_that_grow_over_two_ranks(method, two):
    folder, _, _ = two
    summary = json.loads((folder / method / "summary.json").read_text())
    updates = helpers.lines(folder / method, "updates")
    assert summary["method"] == method and len(updates) == 6
    total = sum(layer["weights"] for layer in summary["layers"])
    for row in updates:
        assert sum(layer["alive"] for layer in row["layers"]) == (
            total - round(row["target"] * total))


def test_channels_that_are_cut_and_return_over_two_ranks(two):
    """An update is of a batch of one image too, of which a rank has none."""
    folder, _, _ = two
    updates = helpers.lines(folder / "sca", "updates")
    assert [row["iteration"] for row in updates] == [3, 6, 9, 12, 15, 18]
    for q, row in enumerate(updates, 1):
        assert sum(layer["alive"] for layer in row["layers"]) >= 44 - round(
            0.5 * (1 - (1 - q / 6) ** 3) * 44)
        assert row["regenerated"] > 0
    summary = json.loads((folder / "sca/summary.json").read_text())
    assert summary["widths"] == [layer["alive"] for layer in updates[-1]["layers"]]


# ---- ranks that die ------------------------------------------------------------------------------


def test_a_killed_rank_ends_the_other_and_one_or_three_go_on(two, tmp_path):
    folder, _, _ = two
    started = time.monotonic()
    killed = torchrun(__file__, "dies")
    assert killed.returncode != 0 and time.monotonic() - started < 60
    assert killed.stderr.count(": error: another rank is gone") == 1, killed.stderr[-3000:]
    assert not Path("killed/summary.json").exists()
    for name in ("with1", "with3", "stop3"):
        shutil.copytree("killed", name)
    done = torchrun(__file__, "three", ranks=3)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("resumed after iteration 9 of 27") == 2  # printed by one rank
    helpers.assert_same_run("with3", "stop3")
    prune_unstructured.main(["--resume", "--run-dir", "with1"])
    whole = json.loads((folder / "whole/summary.json").read_text())
    for name in ("with1", "with3"):
        summary = json.loads(Path(name, "summary.json").read_text())
        assert (summary["sparsity"], summary["epochs"]) == (whole["sparsity"], 3)
        rows = helpers.lines(name, "metrics")
        first = helpers.lines(folder / "whole", "metrics")[0]
        assert {**rows[0], "seconds": 0} == {**first, "seconds": 0}
        for row, other in zip(rows, helpers.lines(folder / "whole", "metrics"), strict=True):
            assert row["train_loss"] == pytest.approx(other["train_loss"], abs=0.25)


def two_nodes(*command):
    """Run a command on two nodes, as two agents of torchrun, a rank each, that meet at a port of
    this machine. Return their exit codes and what they wrote."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
             "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=night"]
    agents = [subprocess.Popen([*words, *map(str, command)], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": path})
              for _ in range(2)]
    try:
        with ThreadPoolExecutor(2) as pool:  # both are read, so that none waits for its pipe
            texts = list(pool.map(lambda agent: agent.communicate(timeout=300)[0], agents))
    finally:
        for agent in agents:
            agent.kill()
    return [agent.returncode for agent in agents], "".join(texts)


def test_a_node_that_is_gone_ends_the_other_and_two_nodes_go_on(two):
    """SIGKILL to an agent and its rank. Resumed, the run is that of two ranks on one node."""
    folder, _, _ = two
    codes, said = two_nodes(__file__, "node_dies")
    assert sorted(codes) == [-signal.SIGKILL, 1], said[-3000:]
    assert said.count(": error: another rank is gone") == 1, said[-3000:]
    assert not Path("nodes/summary.json").exists()
    codes, said = two_nodes(ROOT / "prune_unstructured.py", "--resume", "--run-dir", "nodes")
    assert codes == [0, 0], said[-3000:]
    assert said.count("resumed after iteration 9 of 27") == 1
    helpers.assert_same_run(folder / "whole", "nodes")


def test_a_wrong_file_is_one_line_and_code_2_on_each_rank():
    done = torchrun(ROOT / "prune_unstructured.py", "--dataset", "nowhere.npz", "--run-dir", "r")
    assert done.returncode != 0
    assert done.stderr.count("prune_unstructured.py: error: ") == 1, done.stderr
    assert "nowhere.npz" in done.stderr
    assert len(re.findall(r"exitcode +: 2 ", done.stderr)) == 2, done.stderr
    assert not Path("r").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_script_of_one_process_says_so(rank, monkeypatch, capsys):
    for name, value in dict(WORLD_SIZE="2", RANK=rank, LOCAL_WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        analyze.main(["--runs", "r"])
    assert stop.value.code == 2
    assert "WORLD_SIZE is 2, as torchrun sets it, expected one process" in helpers.one_line(capsys)


# ---- what is refused before any rank joins -------------------------------------------------------


def refused(monkeypatch, capsys, main, *given, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        main([*given, "--run-dir", "r"])
    assert stop.value.code == 2 and not Path("r").exists()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return helpers.one_line(capsys)


def test_what_is_refused(monkeypatch, capsys):
    two = dict(WORLD_SIZE="2", RANK="0", LOCAL_WORLD_SIZE="2")
    assert "--sync-bn is given, but --device is cpu" in refused(
        monkeypatch, capsys, prune_unstructured.main, "--sync-bn", "--device", "cpu")
    assert "WORLD_SIZE is 2, as torchrun sets it, expected one process" in refused(
        monkeypatch, capsys, prune_lottery.main, **two)
    assert "--compile is given, but torchrun started 2 processes" in refused(
        monkeypatch, capsys, prune_unstructured.main, "--compile", **two)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "torchrun started 2 processes here, but torch sees 1 GPUs" in refused(
        monkeypatch, capsys, prune_structured.main, "--device", "cuda")
    monkeypatch.undo()
    args = settings(batch_size=1, crop=0, cutout=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--batch-size is 1, but torchrun started 2 processes"):
        setup.build(args, data.load("fashion-mini", train_limit=10))


if __name__ == "__main__":
    end = processes.end  # exercises put it off
    plots.draw_curves = lambda rows, path: path.touch()  # it takes longer than such a run
    {"exercises": exercises, "dies": dies, "node_dies": node_dies,
     "three": three}[sys.argv[1]]()
    end()
    processes._exit_at_once()  # also rank 0, which has nothing left to do: see end()
