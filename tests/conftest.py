"""Settings and fixtures of all tests; what else they share is in helpers.py. Tests run on one
thread: their networks are tiny, and a busy machine then slows them far less."""
import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; scripts that tests start inherit it

import urllib.error

import pytest

pytest.register_assert_rewrite("helpers")

# The files that take longest. A file is one worker's (--dist loadfile): of two workers the one that
# gets a long file last lets the other wait. By itself xdist begins with the files of most tests.
LONGEST = ("triton structured scripts processes faults analyze networks lottery use planning export docs gradr "
           "sdsnn pq sca stds upr gpu_path published events surroundings greg ndsnn").split()


def pytest_configure(config):
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / f"{tmp_path.name}-c"))


@pytest.fixture
def usual_signals():
    """What a terminal gives a process, however pytest was started: nohup ignores SIGHUP. What a
    test starts inherits it."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL,
             signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def drawn():
    """The pictures that were drawn in this process, by the name of the file."""
    return {}


@pytest.fixture(autouse=True)
def curves_are_drawn_once(drawn, monkeypatch):
    """Each run leaves curves.png, which takes longer than a tiny run: draw it once, and let other
    runs write the same bytes. Scripts that tests start as processes draw their own."""
    from harness import files, plots

    draw_curves = plots.draw_curves

    def draw(rows, path):
        if path.name in drawn:
            files.write_whole(path, lambda file: file.write(drawn[path.name]), "wb")
        else:
            draw_curves(rows, path)
            drawn[path.name] = path.read_bytes()

    monkeypatch.setattr(plots, "draw_curves", draw)


@pytest.fixture(autouse=True)
def speeds_are_measured_briefly(monkeypatch):
    """A run that removes channels measures for 4 s how much faster the network is: let it be 5
    pairs of passes."""
    import metrics

    speedup = metrics.speedup
    monkeypatch.setattr(metrics, "speedup", lambda *given, seconds=2.0: speedup(*given, seconds=0))


@pytest.fixture
def offline(monkeypatch):
    """Make each try to download fail, and return the list of addresses."""
    import torchvision

    tried = []

    def fail(request, *args, **kwargs):
        tried.append(getattr(request, "full_url", request))
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(torchvision.datasets.utils.urllib.request, "urlopen", fail)
    return tried


@pytest.fixture
def few_test_images(monkeypatch):
    """fashion-mini with 100 of its 1,000 test images: tiny runs would evaluate longer than they
    train. Scripts that a test starts as processes have all of them."""
    import data
    import helpers

    monkeypatch.setattr(data, "_read", helpers.read_few)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """once(run, *given) returns the folder of run(*given, "--run-dir", folder), which is made for
    the first test of a file that asks for it. No test changes it."""
    folders = {}

    def folder_of(run, *given, **named):
        key = repr((run.__module__, run.__name__, given, named))
        if key not in folders:
            folder = tmp_path_factory.mktemp("once") / "r"
            run(*given, "--run-dir", folder, **named)
            folders[key] = folder
        return folders[key]

    return folder_of
