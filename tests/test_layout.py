"""The layout: what stands in the root, what imports what, which files name no method, how wide
lines are."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each library file and the library files that it may import
MODELS = {"neurons", "kernels", "plans", "inputs", "models"}
BELOW = {
    "neurons": set(),
    "kernels_triton": set(),
    "kernels": {"neurons", "kernels_triton"},
    "plans": set(),
    "inputs": set(),
    "models": {"neurons", "kernels", "plans", "inputs"},
    "modelfile": MODELS,
    "sources": set(),
    "data": {"events", "folders", "sources"},
    "events": {"sources"},
    "folders": {"sources"},
    "metrics": MODELS,
    "masks": MODELS,
    "sparsefile": MODELS | {"modelfile"},
    "channels": MODELS | {"metrics", "masks"},
    "training": MODELS | {"data", "metrics", "masks", "channels"},
}
LIBRARY = set(BELOW)
SCRIPTS = {path.stem for path in ROOT.glob("prune_*.py")} | {
    "analyze", "compare", "benchmark", "compact", "export"}
HARNESS = {path.stem for path in (ROOT / "harness").glob("*.py")}


def product_files():
    return sorted([*ROOT.glob("*.py"), *(ROOT / "harness").glob("*.py")])


def modules_of(node):
    """Return the modules that an import statement names, with "harness.x" for what `from harness
    import x` takes."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "no relative imports"
        return ([f"harness.{alias.name}" for alias in node.names] if node.module == "harness"
                else [node.module])
    return []


def imports(path, ignored=()):
    """Return the project's modules that a file imports, anywhere but in functions of the names
    `ignored`, and in what only the script does, if __name__ == "__main__":
    {"masks", "harness.flags"}."""
    skipped = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in ignored:
            skipped.update(map(id, ast.walk(node)))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            skipped.update(map(id, ast.walk(node)))
    found = {module for node in ast.walk(tree) if id(node) not in skipped
             for module in modules_of(node)}
    return {module for module in found if module.split(".")[0] in LIBRARY | SCRIPTS | {"harness"}}


def test_the_root_holds_the_library_the_scripts_and_the_reader_s_test():
    assert {path.stem for path in ROOT.glob("*.py")} == LIBRARY | SCRIPTS | {"test_core"}
    assert {path.name for path in ROOT.iterdir() if path.is_dir()} >= {
        "harness", "tests", "assets", "results"}
    for name in ("README.md", "LICENSE", "requirements.txt", "pytest.ini"):
        assert (ROOT / name).is_file()


def test_what_is_imported_at_the_start_is_in_the_requirements():
    """Each with a lower bound: a package that another one brings may be too old for us."""
    found = set()
    for path in product_files():
        for node in ast.parse(path.read_text()).body:
            found |= {module.split(".")[0] for module in modules_of(node)}
    found -= sys.stdlib_module_names | LIBRARY | SCRIPTS | {"harness"}
    bounded = {"triton"}  # torch brings its own
    for path in ROOT.glob("requirements*.txt"):
        bounded |= set(re.findall(r"^(\w+)>=", path.read_text(), re.M))
    assert {"torch", "filelock"} <= found <= bounded


def test_triton_is_imported_by_one_file_that_is_imported_where_it_is_needed():
    """Not every machine has Triton, and few that have it need it."""
    for path in product_files():
        tree = ast.parse(path.read_text())
        found = {module for node in ast.walk(tree) for module in modules_of(node)}
        assert path.stem == "kernels_triton" or not {module for module in found
                                                     if module.split(".")[0] == "triton"}
        at_import = {module for node in tree.body for module in modules_of(node)}
        assert "kernels_triton" not in at_import


@pytest.mark.parametrize("name", sorted(LIBRARY))
def test_a_library_file_imports_only_what_is_below_it(name):
    ignored = ("load",) if name == "models" else ()  # it reads a file by modelfile.py
    assert imports(ROOT / f"{name}.py", ignored) <= BELOW[name]


def test_compact_is_a_script_that_the_run_may_import():
    """The run writes compact.pt by it; only its main needs flags and files."""
    found = imports(ROOT / "compact.py", ignored=("main", "parse_args"))
    assert found <= LIBRARY


def test_compact_leaves_the_program_that_imports_it_alone():
    code = ("import sys; hook = sys.excepthook; import compact; "
            "assert sys.excepthook is hook and 'harness' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_scripts_import_no_script(name):
    assert not imports(ROOT / f"{name}.py") & (SCRIPTS - {name})


@pytest.mark.parametrize("name", sorted(HARNESS))
def test_the_harness_imports_no_script_but_compact(name):
    found = imports(ROOT / "harness" / f"{name}.py")
    assert not found & (SCRIPTS - {"compact"})
    assert {module.split(".")[1] for module in found if module.startswith("harness.")} <= HARNESS


def test_nothing_imports_a_test_but_its_helpers():
    for path in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(path.read_text())
        found = {module for node in ast.walk(tree) for module in modules_of(node)}
        assert not {module for module in found if module.startswith(("test_", "conftest"))}
    for path in product_files():
        if path.name != "test_core.py":
            assert not re.search(r"^ *(?:import|from) (?:test_|helpers|pytest|conftest)",
                                 path.read_text(), re.M), path.name


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]),
                         ids=lambda path: path.name)
def test_no_name_is_given_to_two_functions(path):
    """Of two tests of one name the first would never run."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef)):
            names = [item.name for item in node.body
                     if isinstance(item, (ast.FunctionDef, ast.ClassDef))
                     and not any("setter" in ast.unparse(mark) for mark in item.decorator_list)]
            assert len(names) == len(set(names)), [n for n in names if names.count(n) > 1]


NO_METHOD = [ROOT / f"{name}.py" for name in (
    "neurons", "kernels", "kernels_triton", "inputs", "models", "modelfile", "data", "masks", "channels",
    "metrics", "training")]
NO_METHOD += [ROOT / "harness" / f"{name}.py" for name in (
    "runfolder", "setup", "files", "meters", "processes", "machine", "jobs", "groups", "latex")]
METHODS = re.compile(r"\b(?:SD-?SNN|Grad[- ]?R|GraNet|GReg[12]?|Deep[- ]?R|lottery|PQ|STDS|NDSNN|RigL)\b",
                     re.I)
NETWORKS = re.compile(r"(?:sdsnn|gradr)-[a-z]+")  # plans that bear the name of a paper


@pytest.mark.parametrize("path", NO_METHOD, ids=lambda path: path.name)
def test_library_and_run_name_no_method(path):
    text = NETWORKS.sub("", path.read_text())
    found = [f"{path.name}:{number}: {line.strip()}"
             for number, line in enumerate(text.splitlines(), 1) if METHODS.search(line)]
    assert not found, "\n".join(found)


WIDTH = 88


def test_lines_of_product_code_are_narrow():
    wide = {}
    for path in product_files():
        if path.name != "test_core.py":
            lines = path.read_text().splitlines()
            numbers = [number for number, line in enumerate(lines, 1) if len(line) > WIDTH]
            if numbers:
                wide[str(path.relative_to(ROOT))] = numbers
    assert not wide, "\n".join(f"{name}: lines {numbers}" for name, numbers in wide.items())


def test_each_test_file_says_what_it_covers():
    text = (ROOT / "tests/README.md").read_text()
    for path in (ROOT / "test_core.py", *(ROOT / "tests").glob("test_*.py")):
        assert f"`{path.name}`" in text, path.name
        assert ast.get_docstring(ast.parse(path.read_text())), path.name
    assert all((ROOT / "tests" / name).exists() or (ROOT / name).exists()
               for name in re.findall(r"`(\w+\.py)`", text))
