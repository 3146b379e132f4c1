"""What belongs to a network and travels with it: normalisation, names, masks. Its use: predict,
keep_zeros, what it refuses, and --init from a pruned network or one of other classes."""
import contextlib
import copy
import gc
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import channels
import compact
import data
import inputs
import metrics
import modelfile
import models
import prune_granet
import prune_gradr
import prune_greg
import prune_sca
import prune_lottery
import prune_ndsnn
import prune_pq
import prune_sdsnn
import prune_structured
import prune_unstructured
import training
from harness import chip, meters, setup
from harness.runfolder import Run
from helpers import assert_same_run, let_fire, lines, refused, stop_after
from masks import Masks
from plans import default_widths

SHORT = ["--train-limit", "200", "--epochs-prune", "2", "--epochs-finetune", "1", "--interval", "3",
         "--width", "0.25", "--batch-size", "25"]  # 8 steps an epoch, 5 updates
pytestmark = pytest.mark.usefixtures("few_test_images")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(name="small", side=16, in_channels=1, classes=3, **more):
    """A network whose neurons fire, with a normalisation, in eval mode."""
    torch.manual_seed(0)
    net = models.build(name, classes, in_channels, side, 3, default_widths(name, 0.1), **more)
    let_fire(net)
    net.set_normalisation([0.3] * in_channels, [0.2] * in_channels)
    return net.eval()


def pixels(n=5, side=16, in_channels=1, seed=0):
    return torch.randint(0, 256, (n, in_channels, side, side), generator=generator(seed),
                         dtype=torch.uint8)


def sparse(net, share=0.8):
    masks = Masks(net)
    masks.prune(masks.keep_at(share), masks.magnitudes(), generator())
    masks.rescue_empty_layers()
    masks.apply(torch.optim.SGD(net.parameters(), 0.1))
    return masks


def loaded(net, path="model.pt", masks=None):
    torch.save(modelfile.pack(net, masks), path)
    return models.load(path)


# ---- what travels with the weights ---------------------------------------------------------------


@pytest.mark.parametrize("name", models.NAMES)
def test_a_state_dict_has_the_normalisation(name):
    net = network(name)
    torch.save(net.state_dict(), "weights.pth")
    twin = models.build(**net.config).eval()
    twin.load_state_dict(torch.load("weights.pth"))
    x = pixels()
    assert torch.equal(net(x), twin(x)) and torch.equal(twin.mean, net.mean)
    old = {key: net.state_dict()[key] for key in net.state_dict() if key not in modelfile.NO_WEIGHTS}
    with pytest.raises(RuntimeError, match='"mean", "std".*"_extra_state"'):  # absence is named
        twin.load_state_dict(old)


def test_a_state_dict_has_the_class_names():
    net = network(classes=3)
    net.class_names = ["cat", "Hündin", "鳥"]
    tensors = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    twin = models.build(**net.config).eval()
    twin.load_state_dict(tensors)  # a plain dict of tensors
    assert twin.class_names == net.class_names
    assert set(models.predict(twin, pixels()).names) <= set(net.class_names)
    loose = models.build(**net.config)
    del tensors["_extra_state"]
    with pytest.raises(RuntimeError, match='Missing key.*"_extra_state"'):
        loose.load_state_dict(tensors)
    loose.load_state_dict(tensors, strict=False)
    assert loose.class_names is None

    net.class_names = None
    twin.load_state_dict(net.state_dict())
    assert twin.class_names is None


def test_a_class_name_that_is_no_text():
    """A folder may have a name in Latin-1: Python has it as a letter without a code of its own."""
    net = network(classes=3)
    net.class_names = ["cat", os.fsdecode(b"caf\xe9"), "鳥"]
    twin = models.build(**net.config).eval()
    twin.load_state_dict(net.state_dict())
    assert twin.class_names == net.class_names
    torch.save(modelfile.pack(net), "model.pt")
    assert models.load("model.pt").class_names == net.class_names


@pytest.mark.parametrize("state, words", [
    (torch.tensor([1, 2], dtype=torch.uint8), "expected the class names as JSON"),
    (torch.zeros(3), "expected the class names as JSON"), (None, "expected the class names"),
    (torch.tensor([*b'{"class_names": ["a"]}'], dtype=torch.uint8), "a list of 3 strings")])
def test_class_names_of_a_state_dict_that_do_not_fit(state, words):
    net = network(classes=3)
    with pytest.raises(ValueError, match=words):
        net.load_state_dict(net.state_dict() | {"_extra_state": state})


def test_a_model_file_without_it_in_the_state_dict_is_read_as_before():
    net = network()
    packed = modelfile.pack(net)
    for key in ("mean", "std", "_extra_state"):
        del packed["state_dict"][key]
    del packed["class_names"]
    torch.save(packed, "old.pt")
    old, x = models.load("old.pt"), pixels()
    assert torch.equal(old(x), net(x)) and old.class_names is None
    assert old.mean.tolist() == net.mean.tolist()


@pytest.mark.parametrize("mean, std", [([0.3, 0.3], [0.2, 0.2]), ([0.3], [0.0]), ([0.3], [-1.0]),
                                       ([float("nan")], [0.2]), ([0.3], [float("inf")]),
                                       (0.3, 0.2)])
def test_a_normalisation_that_does_not_fit(mean, std):
    with pytest.raises(ValueError, match="expected 1 finite numbers each"):
        network().set_normalisation(mean, std)


def test_names_masks_and_normalisation_of_smaller_networks():
    net = network(classes=3)
    net.class_names = ["cat", "dog", "eel"]
    kept = {name: torch.arange(size) > 0 for name, size in zip(*channels.layers(net))}
    small = channels.remove(net, kept)
    assert small.class_names == net.class_names and small.masks is None
    assert torch.equal(small.mean, net.mean) and torch.equal(small.std, net.std)
    again = loaded(net)
    assert again.class_names == net.class_names and copy.deepcopy(again).class_names
    masks = sparse(net, 0.95)
    small, alive, _ = compact.make(net, masks.alive)
    assert loaded(small, masks=alive).class_names == net.class_names


@pytest.mark.parametrize("names", [["a", "b"], "abc", ["a", "b", 3], {"a": 0}])
def test_class_names_that_do_not_fit(names):
    packed = modelfile.pack(network())
    torch.save(packed | {"class_names": names}, "bad.pt")
    with pytest.raises(ValueError, match="expected a list of 3 strings"):
        models.load("bad.pt")


@pytest.mark.parametrize("content, says", [
    (lambda net: net.state_dict(), "convs.0.conv.weight.*load_state_dict"),
    (lambda net: {"parts": {}, "flags": {}}, "keys parts, flags.*model.pt of a run that is fin"),
    (lambda net: {"weights": 1, "arch": "vgg"}, "the keys weights, arch,"),
    (lambda net: [1, 2], "it holds a list"), (lambda net: {}, "an empty dict"),
    (lambda net: {str(k): k for k in range(9)}, "0, 1, 2, 3, 4 and 4 more")])
def test_a_foreign_file_is_named_by_what_it_holds(content, says):
    torch.save(content(network()), "other.pt")
    with pytest.raises(ValueError, match=says) as error:
        models.load("other.pt")
    assert "\n" not in str(error.value) and "no model.pt of this project" in str(error.value)


# ---- predict -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.NAMES)
def test_prediction_of_all_forms_of_images(name):
    net, x = network(name, side=20, in_channels=2), pixels(7, 20, 2)
    with torch.no_grad():
        logits = net(x)
    classes, probabilities, names = found = models.predict(net, x)
    assert torch.equal(classes, logits.sum(0).argmax(1)) and found.names is names is None
    assert torch.allclose(probabilities, logits.mean(0).softmax(1))
    assert torch.allclose(probabilities.sum(1), torch.ones(7)) and not probabilities.requires_grad
    others = [x.float() / 255, x.numpy(), x.double() / 255, x.numpy() / 255,
              np.ascontiguousarray(x.numpy()[::-1])[::-1]]
    for other in others:
        same = models.predict(net, other, batch_size=3)
        assert torch.equal(same.classes, classes)
        assert torch.allclose(same.probabilities, probabilities, atol=1e-5)
    assert torch.equal(models.predict(net, x[2]).classes, classes[2:3])


def test_prediction_by_spikes_and_of_events():
    net, x = network(encoding="rate"), pixels(6)
    with torch.no_grad():
        wanted = net(x).sum(0).argmax(1)
    assert torch.equal(models.predict(net, x).classes, wanted)
    assert torch.equal(models.predict(net, x.double() / 255, batch_size=1).classes, wanted)
    net = network(encoding="events", in_channels=2)
    frames = torch.randint(0, 4, (6, 3, 2, 16, 16), generator=generator(), dtype=torch.uint8)
    with torch.no_grad():
        wanted = net(frames.transpose(0, 1)).sum(0).argmax(1)
    for given in (frames, frames.float(), frames.numpy()):
        assert torch.equal(models.predict(net, given).classes, wanted)
    assert torch.equal(models.predict(net, frames[1]).classes, wanted[1:2])
    with pytest.raises(ValueError, match=re.escape("[N, 3, 2, 16, 16]")):
        models.predict(net, frames.transpose(0, 1))  # [T, N, ...]


def test_prediction_leaves_the_network_as_it_was():
    net = network().train()
    net.convs[0].bn.eval()  # as a user freezes it
    modes = [module.training for module in net.modules()]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    models.predict(net, pixels())
    with pytest.raises(ValueError):
        models.predict(net, pixels(side=8))
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    net.class_names = ["cat", "dog", "eel"]
    found = models.predict(net, pixels())
    assert found.names == [net.class_names[k] for k in found.classes]


ARGS = SimpleNamespace(precision="fp32", device="cpu", loss="ce")
LABELS = torch.tensor([0, 1, 2, 0, 1])
USES = {  # each looks at a network in eval mode
    "predict": lambda net: models.predict(net, pixels()),
    "count": lambda net: metrics.count(net, [pixels()]),
    "evaluate": lambda net: training.evaluate(net, net, [(pixels(), LABELS)], ARGS),
    "score_channels": lambda net: training.score_channels(net, [(pixels(), LABELS)], ARGS),
    "traffic": lambda net: chip.traffic(net, pixels()),
    "seconds_of_evaluation": lambda net: meters.seconds_of_evaluation(
        net, net, SimpleNamespace(x_test=pixels(), inputs=lambda *_: iter([pixels()])), 5,
        contextlib.nullcontext())}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_each_module_is_in_its_own_mode_after_a_look_at_the_network(use):
    net = network().train()
    net.convs[0].bn.eval()  # as a user freezes it
    modes, seen = [module.training for module in net.modules()], []
    handle = net.register_forward_pre_hook(lambda *_: seen.append(net.training))
    use(net)
    assert [module.training for module in net.modules()] == modes
    assert seen and not any(seen)

    def fail(*_):
        raise RuntimeError("broken")

    handle.remove()
    net.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        use(net)
    assert [module.training for module in net.modules()] == modes


def test_logits_are_summed_as_float32():
    """In bfloat16 two sums of 8 bits would be equal."""
    net = network().bfloat16()
    logits = torch.tensor([[256.0, 256.0, 0.0], [0.25, 0.5, 0.0], [0.25, 0.25, 0.0]])
    net.forward = lambda x: logits.bfloat16()[:, None].expand(3, len(x), 3)
    found = models.predict(net, pixels())
    assert found.classes.tolist() == [1] * 5 and found.probabilities.dtype == torch.float32
    assert torch.equal(found.probabilities, (logits.sum(0) / 3).softmax(0).expand(5, 3))


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_batch_size_that_does_not_fit(size):
    with pytest.raises(ValueError, match="batch_size is .*, expected a whole number of at least 1"):
        models.predict(network(), pixels(), batch_size=size)


@pytest.mark.parametrize("name", models.NAMES)
def test_floats_that_are_normalised_are_the_same_images(name):
    """Also where the sides are padded: black is not 0 then."""
    net, x = network(name, side=20), pixels(side=20)
    assert torch.equal(net((x.float() / 255 - net.mean) / net.std), net(x))


X = pixels(4).float() / 255
BAD = {  # images: what predict says
    "normalised": (X * 4 - 1, "values from -1 to 3, expected uint8, or floats in 0..1. Do not"),
    "0..255": (X * 255, "values from 0 to 255, expected uint8, or floats in 0..1. Divide"),
    "NaN": (X / X.new_tensor(0), "expected finite numbers"),
    "infinite": (torch.where(X > 0.9, torch.inf, X), "expected finite numbers"),
    "one 0..255": (pixels()[0].numpy().astype(np.int64), "images.astype(np.uint8)"),
    "int64": (pixels().long(), "are torch.int64, expected torch.uint8, or floats in 0..1. If they "
              "are 0..255: images.to(torch.uint8)"),
    "bool": (pixels() > 9, "are torch.bool, expected torch.uint8, or floats in 0..1. Convert them "
             "by images.float()"),
    "uint16": (pixels().to(torch.uint16), "by images.float() / 65535"),
    "longdouble": (X.numpy().astype(np.longdouble), "images.astype(np.float32)"),
    "big-endian": (X.numpy().astype(">f4"), "array of >f4, expected uint8"),
    "complex": (X.cfloat(), "are torch.complex64"),
    "another size": (pixels(side=20), "expected [N, 1, 16, 16] with N of at least 1, or [1, 16, "
                     "16]. Resize them to the 16 x 16"),
    "channels": (pixels(in_channels=3), "Give as many channels as it was trained with, 1"),
    "channels last": (pixels().movedim(1, -1), "x.permute(0, 3, 1, 2), of an array x.transpose(0"),
    "one, channels last": (pixels()[0].movedim(0, -1), "x.permute(2, 0, 1), of an array"),
    "grey": (pixels()[:, 0], "x[..., None, :, :]"), "one grey": (pixels()[0, 0], "x[..., None, :"),
    "time": (pixels()[None], "x.reshape(-1, 1, 16, 16)"), "none": (pixels()[:0], "Give at least one"),
    "a number": (torch.tensor(1.0), "shape (), expected"),
    "a list": ([pixels()[0], pixels()[1]], "are a list, expected a tensor"),
    "objects": (np.array([None, 1]), "are an array of object"),
    "strings": (np.array(["a"]), "are an array of <U1"),
    "int64 array": (pixels().numpy().astype(np.int64), "are torch.int64")}


@pytest.mark.parametrize("kind", BAD)
def test_images_that_are_refused(kind):
    images, says = BAD[kind]
    net = network()
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        models.predict(net, images)
    assert "\n" not in str(error.value) and "expected" in str(error.value)


@pytest.mark.parametrize("kind", ["channels last", "one, channels last", "grey", "one grey",
                                  "time"])
@pytest.mark.parametrize("is_array", [False, True])
def test_the_way_that_the_error_names_works(kind, is_array):
    net, x = network(), BAD[kind][0]
    x = x.numpy() if is_array else x
    with pytest.raises(ValueError) as error:
        models.predict(net, x)
    way = re.findall(r"x(?:\.\w+\(.*?\)|\[.*?\])", str(error.value))[-1 if is_array else 0]
    images = eval(way, {"x": x})
    assert models.predict(net, images).classes.tolist() == models.predict(
        net, pixels()[:len(images)] if images.ndim == 4 else pixels()[0]).classes.tolist()


def test_events_that_are_refused():
    net = network(encoding="events", in_channels=2)
    frames = torch.zeros(4, 3, 2, 16, 16)
    for images, says in [(frames - 1, "floats of at least 0"), (frames[:, :2], "each of T = 3"),
                         (frames[:, :, :1], "expected [N, 3, 2, 16, 16]"),
                         (frames[0, 0], "expected [N, 3, 2, 16, 16]")]:
        with pytest.raises(ValueError, match=re.escape(says)):
            models.predict(net, images)


# ---- what the network itself refuses -------------------------------------------------------------

NETWORK_REFUSES = {
    "0..255": (X * 255, "values from 0 to 255, expected floats that are normalised"),
    "NaN": (X / 0, "expected finite numbers"), "-inf": (X.log(), "expected finite numbers")}
ALWAYS_REFUSED = {
    "int64": (pixels().long(), "got torch.int64, expected torch.uint8 in 0..255 or floating point. "
              "Give them to models.predict"),
    "int32": (pixels().int(), "got torch.int32"), "bool": (pixels() > 9, "got torch.bool"),
    "int8": (pixels().to(torch.int8), "got torch.int8"), "complex": (X.cfloat(), "complex64"),
    "another size": (pixels(side=20), "Resize them to the 16 x 16 pixels"),
    "a wide one": (pixels()[..., :8], "expected [N, 1, 16, 16]"),
    "channels": (pixels(in_channels=3), "Give as many channels"),
    "one image": (pixels()[0], "Give a single image as x[None]"),
    "channels last": (pixels().movedim(1, -1), "x.permute(0, 3, 1, 2)")}


@pytest.mark.parametrize("name", ["small", "resnet19", "resnet19-pre"])
@pytest.mark.parametrize("kind", NETWORK_REFUSES | ALWAYS_REFUSED)
def test_input_that_the_network_refuses(kind, name):
    x, says = (NETWORK_REFUSES | ALWAYS_REFUSED)[kind]
    net = network(name)
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        net(x)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=re.escape(says)):
        net.train()(x)


@pytest.mark.parametrize("x", [X.numpy(), [X], None])
def test_what_is_no_tensor_is_refused(x):
    with pytest.raises(ValueError, match="expected a tensor. Give it to models.predict"):
        network()(x)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_another_width_are_converted(kind):
    net, x = network(), ((X - 0.3) / 0.4).to(kind)
    assert torch.equal(net(x), net(x.float()))


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.nn.Sequential, lambda net: "m.pt"])
def test_prediction_by_something_else_is_refused(wrap):
    with pytest.raises(ValueError, match="expected a network of models.load"):
        models.predict(wrap(network()), X)


def test_prediction_of_a_network_whose_weights_are_not_finite_is_refused():
    net = network()
    net.fc.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the network's output is not finite"):
        models.predict(net, X)


def test_pixels_that_rounding_has_made_larger_than_1():
    x = X.clone()
    x[0, 0, 0, 0] = 1.00001
    assert models.predict(network(), x).classes.shape == (4,)


def test_a_state_dict_without_normalisation_is_said():
    net, state = network(), network().state_dict()
    del state["mean"], state["std"]
    with pytest.warns(UserWarning, match="the state_dict has no mean and no std: the network keeps"):
        net.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict(state)
    again = copy.deepcopy(net)  # has the hook too
    with pytest.warns(UserWarning, match="no mean"):
        again.load_state_dict(state, strict=False)
    torch.save(net, "whole.pt")
    with pytest.raises(ValueError, match="it holds pickled objects.*modelfile.pack"):
        models.load("whole.pt")


def test_values_of_which_nobody_has_said_what_they_are():
    """Events by direct coding, or a scale of one's own, with mean 0 and std 1."""
    net = network()
    net.set_normalisation([0.0], [1.0])
    with torch.no_grad():
        assert net(X * 40).isfinite().all()
    with pytest.raises(ValueError, match="expected finite numbers"):
        net(X / 0)


def test_a_training_step_reads_no_value_of_its_input():
    """On the meta device there are no values: whatever reads one raises."""
    for images in (X, pixels(4)):
        net = network().to("meta").train()
        assert net(images.to("meta")).shape == (3, 4, 3)
        assert net.eval()(images.to("meta")).shape == (3, 4, 3)


def test_tensors_without_values_pass():
    net = network().requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert net(mode.from_tensor(X)).shape == (3, 4, 3)
    torch.vmap(lambda x: inputs.check(net, x[None]) or x)(X)


@pytest.mark.parametrize("encoding, x, says", [
    ("rate", X * 255, "the chances of a spike"), ("rate", X - 1, "the chances of a spike"),
    ("rate", X / 0, "expected finite"), ("events", X.expand(3, *X.shape) - 1, "counts of events"),
    ("events", X / 0, "Put their time axis first"),
    ("events", X.expand(3, *X.shape) / 0, "expected finite")])
def test_other_encodings_refuse_too(encoding, x, says):
    with pytest.raises(ValueError, match=says):
        network(encoding=encoding)(x)


def test_pixels_in_0_to_1_are_warned_of():
    net = network()
    x = X.clone()
    x[0, 0, 0, 0] = 0
    with pytest.warns(UserWarning, match="look like pixels in 0..1.*models.predict"):
        net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.predict(net, x)
        net((x - 0.3) / 0.2)
        net(pixels())
        net(torch.zeros(1, 1, 16, 16))
        net.set_normalisation([0.0], [1.0])
        net(x)
        net.set_normalisation([0.5], [0.5])
        models.predict(net, 0.5 + x / 2)  # normalised they are 0..1
    assert net.checks_values


def test_checks_do_not_break_a_compiled_or_exported_network():
    for x in (pixels(2), X[:2] + 0.1):
        net = network().requires_grad_(False)
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), net(x))
        program = torch.export.export(net, (x,))
        assert torch.equal(program.module()(x), net(x))


# ---- zeros that stay -----------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3)}


def train(net, optimizer, steps=3):
    net.train()
    for step in range(steps):
        x = pixels(6, seed=step)
        optimizer.zero_grad()
        F.cross_entropy(net(x).mean(0), torch.arange(6) % 3).backward()
        optimizer.step()


def moved(net, masks):
    return sum(int((net.get_parameter(name)[~mask] != 0).sum()) for name, mask in masks.items())


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zeros_stay_through_a_users_own_training(kind):
    net = network()
    net = loaded(net, masks=sparse(net).alive)
    optimizer = OPTIMIZERS[kind](net.parameters())
    train(net, optimizer)  # momentum of before
    assert moved(net, net.masks) > 0
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}

    # gradients that are masked do not hold: momentum still moves the dead weights
    twin = copy.deepcopy(net)
    past = OPTIMIZERS[kind](twin.parameters())
    past.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for name, mask in twin.masks.items():
            twin.get_parameter(name).mul_(mask)
            twin.get_parameter(name).register_hook(lambda g, mask=mask: g * mask)
    train(twin, past)
    if kind != "rmsprop":  # which has none here
        assert moved(twin, twin.masks) > 0

    handle = models.keep_zeros(net)
    assert moved(net, net.masks) == 0
    for _ in range(3):
        train(net, optimizer, 1)
        assert moved(net, net.masks) == 0
    assert all(not torch.equal(before[name], weight) for name, weight in net.named_parameters()
               if name != "convs.0.conv.bias")  # the others train
    packed = modelfile.pack(net)  # it has the masks still
    assert all(torch.equal(packed["masks"][name], mask) for name, mask in net.masks.items())
    handle.remove()
    train(net, optimizer)
    assert moved(net, net.masks) > 0


def test_zeros_of_a_network_without_masks_and_of_two_at_once():
    net, other = loaded(network()), network()  # a dense file: all that it says is alive
    sparse(net)
    zeros = {name: net.get_parameter(name) != 0 for name in models.scored_by(net)}
    with models.keep_zeros(net):  # torch's own handle
        train(net, OPTIMIZERS["adam"](net.parameters()))
        train(other, OPTIMIZERS["adam"](other.parameters()))
        assert moved(net, zeros) == 0 and moved(other, zeros) > 0
    train(net, OPTIMIZERS["adam"](net.parameters()))
    assert moved(net, zeros) > 0


def test_the_handle_lets_a_deleted_network_go():
    net = network()
    sparse(net)
    models.keep_zeros(net)
    weight = torch.utils.weak.WeakTensorKeyDictionary()
    weight[net.convs[1].conv.weight] = 1
    del net
    gc.collect()
    assert len(weight) == 0
    other = network()
    train(other, OPTIMIZERS["sgd"](other.parameters()))


def test_masks_that_do_not_fit_are_refused():
    net = loaded(network())
    net.fc = torch.nn.Linear(net.fc.in_features, 7)
    for use in (modelfile.pack, Masks, lambda net: models.keep_zeros(net, net.masks)):
        with pytest.raises(ValueError, match="the mask of fc.weight has shape .*expected"):
            use(net)
    with models.keep_zeros(net, {name: net.masks[name] for name in net.masks
                                 if name != "fc.weight"}):
        assert "fc.weight" not in net.masks  # it was of the layer before
    assert Masks(net).alive["fc.weight"].shape == net.fc.weight.shape
    with pytest.raises(ValueError, match="fc.weight has shape .*as net.config says"):
        modelfile.pack(net)
    net.config["num_classes"] = 7
    assert loaded(net).config["num_classes"] == 7


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "c", "d"], ("a", "b", "c"),
                                   np.array(["a", "b", "c"]), [1, 2, 3]])
def test_class_names_that_do_not_fit_are_refused(names):
    net = network()
    net.class_names = names
    for use in (modelfile.pack, lambda net: models.predict(net, pixels())):
        with pytest.raises(ValueError, match="the network has the class names .*expected a list of"):
            use(net)


@pytest.mark.parametrize("name, mask, says", [
    ("fc.bias", torch.ones(3) > 0, "a mask of fc.bias, expected names of prunable weights"),
    ("nothing", torch.ones(3) > 0, "a mask of nothing, expected"),
    ("fc.weight", torch.ones(3, 4), "the mask of fc.weight is torch.float32, expected a bool"),
    ("fc.weight", [True], "the mask of fc.weight is list, expected a bool"),
    ("fc.weight", torch.ones(2) > 0, "the mask of fc.weight has shape")])
def test_masks_of_a_user_that_do_not_fit(name, mask, says):
    net = network()
    before = {name: weight.clone() for name, weight in net.named_parameters()}
    for use in (models.keep_zeros, modelfile.pack):
        with pytest.raises(ValueError, match=says):
            use(net, {name: mask})
    assert net.masks is None
    assert all(torch.equal(before[name], weight) for name, weight in net.named_parameters())


def test_masks_of_a_user_count_where_all_are_true():
    net = network()
    net = loaded(net, masks=sparse(net).alive)
    alive = {name: torch.ones_like(mask) for name, mask in net.masks.items()}
    dead = {name: ~mask for name, mask in net.masks.items()}
    with models.keep_zeros(net, alive):
        train(net, OPTIMIZERS["sgd"](net.parameters()))
    assert sum(int(net.get_parameter(name)[places].count_nonzero())
               for name, places in dead.items()) > 0


def count_alive(masks):
    return sum(int(mask.count_nonzero()) for mask in masks.values())


def test_masks_of_a_network_stay_those_of_now():
    net = network()
    net = loaded(net, masks=sparse(net, 0.5).alive)
    masks = Masks(net)
    masks.prune(masks.keep_at(0.9), masks.magnitudes(), generator())
    masks.apply(torch.optim.SGD(net.parameters(), 0.1))
    assert count_alive(modelfile.pack(net)["masks"]) == masks.n_alive == count_alive(net.masks)
    with models.keep_zeros(net):
        train(net, OPTIMIZERS["sgd"](net.parameters()))
        assert moved(net, masks.alive) == 0
    restored = Masks(net)
    restored.load_state_dict(masks.state_dict())
    assert net.masks is restored.alive and count_alive(net.masks) == masks.n_alive


def test_masks_that_were_kept_are_packed():
    net = network()
    net = loaded(net, masks=sparse(net, 0.5).alive)
    own = {name: mask & (torch.rand(mask.shape, generator=generator()) > 0.5)
           for name, mask in net.masks.items()}
    models.keep_zeros(net, own)
    assert count_alive(modelfile.pack(net)["masks"]) == count_alive(own)


def test_a_weight_that_has_moved_is_alive_in_a_new_file():
    net = network()
    net = loaded(net, masks=sparse(net).alive)
    train(net, OPTIMIZERS["sgd"](net.parameters()))
    again = loaded(net, "again.pt")
    zeros = sum(int((~mask).sum()) for mask in again.masks.values())
    assert zeros < sum(int((~mask).sum()) for mask in net.masks.values())
    assert moved(again, again.masks) == 0


# ---- --init --------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prune_unstructured.py"])


def run(*given, module=prune_unstructured):
    return module.main([*SHORT, *map(str, given)])


def wrong(capsys, *given, module=prune_unstructured, short=SHORT):
    capsys.readouterr()
    return refused(capsys, module.main, [*short, *map(str, given)])


@pytest.fixture
def first(script, once):
    """A run that has pruned 70 %, in first/."""
    shutil.copytree(once(run, "--sparsity", 0.7), "first")


def dead_of(path):
    return {name: ~mask for name, mask in modelfile.read(path)["masks"].items()}


@pytest.mark.parametrize("given", [[], ["--regen", 0], ["--candidates", "new"],
                                   ["--as-published", "zero", "classifier", "ties"]])
def test_init_from_a_pruned_network(given, first, capsys):
    capsys.readouterr()
    summary = run("--run-dir", "r", "--sparsity", 0.9, "--init", "first/model.pt", *given)
    said = capsys.readouterr().out
    assert "init first/model.pt: 70.00 % sparse, its masks are taken over\n" in said
    total = sum(layer["weights"] for layer in summary["layers"])
    targets = [row["target"] for row in lines("r", "updates")]
    first = 1 - (total - round(0.7 * total)) / total
    assert targets == pytest.approx([first + (0.9 - first) * (1 - (1 - k / 5) ** 3)
                                     for k in range(1, 6)])
    assert [row["sparsity"] for row in lines("r", "metrics")][0] > 0.7
    # ties of the published code bring back more
    assert summary["sparsity"] == pytest.approx(0.9, abs=5e-3 if "ties" in given else 1e-3)
    assert summary["dense_accuracy"] is None  # that of --init is not
    densities = [1 - first] + [1 - row["sparsity"] for row in lines("r", "metrics")[:-1]]
    assert summary["training_cost"] == pytest.approx(sum(densities) / len(densities))
    before, after = dead_of("first/model.pt"), dead_of("r/model.pt")
    back = sum(int((before[name] & ~after[name]).sum()) for name in before)
    if given and given[0] in ("--regen", "--candidates"):
        assert back == 0  # what --init has pruned stays so
    else:
        assert back > 0  # or it may be regenerated, as what earlier updates have pruned


def test_init_starts_from_the_very_weights_and_masks(first):
    args = prune_unstructured.parse_args([*SHORT, "--init", "first/model.pt", "--sparsity", "0.9"])
    images = setup.load(args, torch.device("cpu"))
    net, old = setup.build(args, images, takes_masks=True), models.load("first/model.pt")
    masks = Masks(net)
    for name, tensor in old.state_dict().items():
        assert torch.equal(net.state_dict()[name], tensor), name
    assert all(torch.equal(masks.alive[name], old.masks[name]) for name in old.masks)
    assert not masks.returned.any() and masks.violation(torch.optim.SGD(net.parameters())) is None


def test_the_normalisation_after_init_is_that_of_the_images(script):
    run("--run-dir", "first", "--sparsity", 0)
    run("--run-dir", "r", "--init", "first/model.pt", "--train-limit", 60)
    a, b = (models.load(f"{folder}/model.pt") for folder in ("first", "r"))
    args = prune_unstructured.parse_args([*SHORT, "--train-limit", "60"])
    images = setup.load(args, torch.device("cpu"))
    assert b.mean.tolist() == torch.tensor(images.mean).tolist() != a.mean.tolist()


def test_a_run_from_a_pruned_network_is_resumed(first, monkeypatch, capsys):
    given = ["--init", "first/model.pt", "--sparsity", 0.9]
    run("--run-dir", "unbroken", *given)
    stop_after(2, monkeypatch, run, "--run-dir", "r", *given)
    Path("first/model.pt").unlink()
    capsys.readouterr()
    prune_unstructured.main(["--resume", "--run-dir", "r"])
    assert "70.00 % sparse, its masks are taken over" in capsys.readouterr().out
    assert_same_run("unbroken", "r")


def test_the_same_sparsity_again_and_a_lower_one(first, capsys):
    again = run("--run-dir", "r", "--sparsity", 0.7, "--regen", 0, "--init", "first/model.pt")
    assert again["sparsity"] == pytest.approx(0.7, abs=1e-3)
    before, after = dead_of("first/model.pt"), dead_of("r/model.pt")
    assert all(torch.equal(before[name], after[name]) for name in before)
    for module in (prune_unstructured, prune_granet):
        error = wrong(capsys, "--run-dir", "new", "--sparsity", 0.5, "--init", "first/model.pt",
                      module=module)
        assert "--sparsity is 0.5, but first/model.pt is 70.00 % sparse, expected at least" in error
        # what it names is not refused again
        least = re.search("expected at least ([0-9.]+):", error)[1]
        args = prune_unstructured.parse_args([*SHORT, "--sparsity", least])
        setup.check_start(args, Masks(models.load("first/model.pt")))
    assert "--sparsity is 0," in wrong(capsys, "--run-dir", "new", "--sparsity", 0,
                                       "--init", "first/model.pt")
    assert not Path("new").exists()


def test_granet_goes_on_from_a_pruned_network(first, capsys):
    summary = run("--run-dir", "r", "--sparsity", 0.9, "--init", "first/model.pt",
                  module=prune_granet)
    assert "its masks are taken over" in capsys.readouterr().out
    assert lines("r", "updates")[0]["target"] > 0.7
    assert summary["sparsity"] == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("module, drops", [
    (prune_structured, ["--interval"]), (prune_greg, ["--interval"]),
    (prune_lottery, ["--interval"]), (prune_gradr, []), (prune_sdsnn, ["--interval"]),
    (prune_pq, []), (prune_ndsnn, []), (prune_sca, ["--interval"])])
def test_scripts_that_start_from_all_weights_refuse_a_pruned_network(module, drops, first, capsys):
    short = ["--train-limit", "200", "--width", "0.25", "--batch-size", "25"]
    error = wrong(capsys, "--run-dir", "new", "--init", "first/model.pt", module=module,
                  short=short)
    assert "first/model.pt is a pruned network, expected a dense one" in error
    assert "prune_granet.py" in error and not Path("new").exists()


def make_set(path, classes, n=100):
    r = np.random.default_rng(0)
    y = np.arange(n) % classes
    x = r.integers(0, 60, (n, 16, 16), dtype=np.uint8)
    x[np.arange(n), 4 * y] += 150
    np.savez(path, x_train=x, y_train=y, x_test=x[:24], y_test=y[:24])


SMALL = ["--width", "0.25", "--batch-size", "20", "--epochs-prune", "1", "--epochs-finetune", "1",
         "--interval", "2"]


@pytest.mark.parametrize("sparsity", [0, 0.7])
def test_init_from_other_classes_draws_a_new_classifier(sparsity, script, capsys):
    make_set("two.npz", 2)
    make_set("three.npz", 3)
    main = prune_unstructured.main
    main(["--dataset", "two.npz", *SMALL, "--sparsity", str(sparsity), "--run-dir", "two"])
    capsys.readouterr()
    given = ["--dataset", "three.npz", *SMALL, "--init", "two/model.pt"]
    summary = main([*given, "--run-dir", "three"])
    said = capsys.readouterr().out
    assert "2 classes there, 3 here: the classifier is drawn anew\n" in said
    assert ("its masks are taken over; 2 classes" in said) == (sparsity > 0)
    assert summary["dense_accuracy"] is None and summary["sparsity"] == pytest.approx(0.9, abs=1e-2)
    assert models.load("three/model.pt").config["num_classes"] == 3

    args = prune_unstructured.parse_args([*given, "--run-dir", "new"])
    images = setup.load(args, torch.device("cpu"))
    torch.manual_seed(0)
    net, old = setup.build(args, images, takes_masks=True), models.load("two/model.pt")
    torch.manual_seed(0)
    args.init = None
    drawn = setup.build(args, images)
    assert torch.equal(net.fc.weight, drawn.fc.weight) and torch.equal(net.fc.bias, drawn.fc.bias)
    assert torch.equal(net.convs[1].conv.weight, old.convs[1].conv.weight)
    if sparsity:
        assert net.masks["fc.weight"].all() and not net.masks["convs.3.conv.weight"].all()


@pytest.mark.parametrize("module", [prune_structured, prune_greg])
def test_a_new_classifier_is_trained_before_channels_are_chosen(module, script, capsys):
    make_set("three.npz", 3)
    torch.save(modelfile.pack(models.build("small", 2, 1, 16, 4, default_widths("small", 0.25))),
               "two.pt")
    given = ["--dataset", "three.npz", "--width", "0.25", "--batch-size", "20", "--init", "two.pt",
             "--epochs-finetune", "1", "--run-dir", "new"]
    error = wrong(capsys, module=module, short=given)
    assert "2 classes there, 3 here" in error and "Add --epochs-pretrain 1" in error
    assert not Path("new").exists()
    if module is prune_structured:
        summary = module.main([*given, "--epochs-pretrain", "1"])
        assert summary["dense_accuracy"] is not None


def test_other_names_are_other_classes():
    one, other = network(), network()
    for a, b, says in [(None, None, ""), (["x", "y", "z"], None, ""),
                       (["x", "y", "z"], ["x", "y", "z"], ""),
                       (["x", "y", "z"], ["x", "z", "y"], "'y' there, 'z' here")]:
        one.class_names, other.class_names = a, b
        found = setup.other_classes(one, other)
        assert says in found and bool(found) == bool(says)


def test_a_pruned_network_with_an_empty_layer_is_refused(first, capsys):
    packed = modelfile.read("first/model.pt")
    packed["masks"]["convs.1.conv.weight"][:] = False
    packed["state_dict"]["convs.1.conv.weight"][:] = 0
    torch.save(packed, "empty.pt")
    error = wrong(capsys, "--run-dir", "new", "--init", "empty.pt")
    assert "empty.pt has no weight alive in convs.1.conv.weight, expected at least one" in error


def test_names_of_the_classes_are_in_what_a_run_leaves(script, monkeypatch):
    load = setup.load

    names = [f"class {k}" for k in range(10)]
    monkeypatch.setattr(setup, "load", lambda *given: load(*given)._replace(class_names=names))
    run("--run-dir", "r")
    assert modelfile.read("r/model.pt")["class_names"] == names
    assert models.load("r/compact.pt").class_names == names
    assert json.loads(Path("r/config.json").read_text())["data"]["class_names"] == names
    net = models.load("r/model.pt")
    found = models.predict(net, data.load("fashion-mini").x_test[:4])
    assert found.names == [names[k] for k in found.classes]


def test_an_older_checkpoint_is_resumed(script, monkeypatch):
    """Its networks, and the rewind point of a ticket, have no mean and std."""
    short = ["--train-limit", "200", "--width", "0.25", "--batch-size", "25", "--rounds", "2",
             "--epochs-prune", "4", "--epochs-finetune", "2"]

    def lottery(*given):
        return prune_lottery.main([*short, *map(str, given)])

    lottery("--run-dir", "unbroken")
    stop_after(10, monkeypatch, lottery, "--run-dir", "r")
    state = modelfile.read_tensors("r/checkpoint.pt")
    for saved in (state["parts"]["net"], state["notes"]["rewind"]):
        del saved["mean"], saved["std"]
    torch.save(state, "r/checkpoint.pt")
    lottery("--run-dir", "r", "--resume")
    assert_same_run("unbroken", "r")


def test_an_older_run_with_flags_that_are_refused_today_goes_on(script, monkeypatch, capsys):
    """Its flags change nothing but its name, which stays."""
    error = wrong(capsys, "--run-dir", "new", "--regen", 0, "--candidates", "new")
    assert "--candidates is new, which --regen 0 does not use" in error
    given = ["--sparsity", 0.9, "--regen", 0]
    run("--run-dir", "unbroken", *given)
    stop_after(2, monkeypatch, run, "--run-dir", "r", *given)
    old = dict(candidates="new", as_published=["zero"])  # neither does anything here
    config = json.loads(Path("r/config.json").read_text())
    Path("r/config.json").write_text(json.dumps(config | old))
    state = modelfile.read_tensors("r/checkpoint.pt")
    state["flags"] |= old
    torch.save(state, "r/checkpoint.pt")
    summary = prune_unstructured.main(["--resume", "--run-dir", "r"])
    config = json.loads(Path("r/config.json").read_text())
    assert config["candidates"] == "new" and summary["as_published"] == ["zero"]
    assert prune_unstructured.main(["--resume", "--run-dir", "r"]) == summary  # finished
    # a flag of the command line is another run's
    assert "does not use" in wrong(capsys, "--run-dir", "new", "--resume", *given,
                                   "--candidates", "new")


def test_a_run_whose_neurons_were_others_cannot_go_on(monkeypatch, capsys):
    """The linear layers of sdsnn-large had learnt time constants."""
    monkeypatch.setattr(sys, "argv", ["prune_sdsnn.py"])
    net = models.build("sdsnn-large", 3, 1, 16, 2, default_widths("sdsnn-large", 0.05),
                       neuron=dict(learn_tau=True))
    now = models.build("sdsnn-large", 3, 1, 16, 2, default_widths("sdsnn-large", 0.05))
    owner = SimpleNamespace(net=now, args=SimpleNamespace(model="sdsnn-large"))
    with pytest.raises(ValueError, match="learnt time constants .*lif_out.w.* fixed in sdsnn-large"):
        Run._restore_parts(owner, {"parts": {"net": net.state_dict()}})


def test_an_older_run_of_the_official_mode_cannot_go_on(script, monkeypatch, capsys):
    """What the mode does has changed since."""
    given = ["--run-dir", "r", "--train-limit", "40", "--width", "0.25", "--batch-size", "20",
             "--epochs-prune", "4", "--epochs-finetune", "1", "--mode", "official"]
    stop_after(3, monkeypatch, prune_sdsnn.main, given)
    state = modelfile.read_tensors("r/checkpoint.pt")
    del state["flags"]["event_split"]
    torch.save(state, "r/checkpoint.pt")
    error = wrong(capsys, *given, "--resume", module=prune_sdsnn, short=[])
    assert "what --mode official does has changed since; only the version" in error


def test_sync_bn_of_one_process_is_refused(script, monkeypatch, capsys):
    monkeypatch.setattr(setup, "choose_device", lambda name: torch.device("cuda"))
    error = wrong(capsys, "--run-dir", "new", "--sync-bn")
    assert "--sync-bn is given, but there is one process, expected several" in error


def test_what_grows_is_no_choice_where_nothing_grows(capsys):
    error = wrong(capsys, "--mode", "adaptive", "--rho", 0, "--growth", "random", module=prune_pq,
                  short=[])
    assert "--growth is random, which --rho 0 does not use" in error
