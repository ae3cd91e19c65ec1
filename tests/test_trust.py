"""What may run code: files from elsewhere are data, and nothing in the sources makes code of them. See SECURITY.md."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("docs", "experiments", "models", "optim", "pallas_kernels", "parallel", "ranges")
# Modules that make objects or code of bytes.
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "code",
    "codeop",
}
# What runs a text, or reads objects of it.
CALLS = {
    "eval", "exec", "compile", "__import__", "execfile", "import_module", "run_module", "run_path", "system", "popen",
    "spec_from_file_location", "literal_eval", "unsafe_load", "full_load", "getoutput", "getstatusoutput",
}  # fmt: skip
LISTED = {
    ("docs/conf.py", "import_module"): "of modules that are files of this package",
    ("experiments/__main__.py", "import_module"): "of commands, whose names are files of this package",
    ("experiments/benchmarks/peers/__init__.py", "import_module"): "of peers, whose names are files of this package",
    ("experiments/configs/explain.py", "literal_eval"): "reads numbers and texts, and runs nothing",
    ("experiments/configs/factories.py", "import_module"): "of modules that are files of this package",
    ("experiments/configs/own_modules.py", "import_module"): "of what --module names, or --allow-imports lets in",
    ("experiments/papers/__init__.py", "import_module"): "of papers, whose names are files of this package",
    ("experiments/trainer/observers.py", "import_module"): "of WRITERS, a table in the source",
    ("models/describe.py", "run_module"): "of one name, written there",
    ("optim/plot.py", "literal_eval"): "reads numbers and texts, and runs nothing",
    ("optim/__init__.py", "import_module"): "of modules that are files of this package",
    ("pallas_kernels/__init__.py", "import_module"): "of modules that are files of this package",
    ("pallas_kernels/bench.py", "import_module"): "of kernels, whose names are folders of this package",
    ("pallas_kernels/op.py", "import_module"): "of implementations, a table in the source",
    ("parallel/describe.py", "run_module"): "of one name, written there",
}
METHODS = {"compile", "system", "literal_eval"}  # names that harmless methods have too: `lowered.compile()`


def dangers(tree: ast.AST) -> Iterator[str]:
    """What in a module's source could run, or make objects of, what it is given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name for alias in node.names if (name := alias.name.partition(".")[0]) in MODULES)
        elif isinstance(node, ast.ImportFrom):
            top = (node.module or "").partition(".")[0]
            if top in MODULES:
                yield top
        elif isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            owner = getattr(getattr(node.func, "value", None), "id", "")
            if name in CALLS and not (
                name in METHODS and isinstance(node.func, ast.Attribute) and owner not in ("os", "ast")
            ):
                yield name
            if name == "load" and owner in ("torch", "pickle", "yaml"):
                yield f"{owner}.load"
            for word in node.keywords:
                given = getattr(word.value, "value", None)
                if (word.arg == "allow_pickle" and given is not False) or (word.arg == "shell" and given is not False):
                    yield word.arg
                if word.arg == "weights_only" and given is not True:
                    yield word.arg


def test_sources_make_no_code_of_what_they_read():
    found = {
        (str(path.relative_to(ROOT)), danger)
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for danger in dangers(ast.parse(path.read_text()))
    }
    assert found - set(LISTED) == set(), "read SECURITY.md: is it of a name from data?"
    assert set(LISTED) - found == set(), "leave out what isn't there any more"


def test_the_search_finds_each_kind():
    source = """
import pickle, os.path
from yaml import safe_load
eval("1"); exec("1"); compile("1", "", "eval"); __import__("x"); importlib.import_module(name); os.system("x")
os.popen("x"); numpy.load(path, allow_pickle=True); subprocess.run("x", shell=True); torch.load(path)
torch.load(path, weights_only=False)
numpy.load(path, allow_pickle=False); lowered.compile(); platform.system(); runpy.run_path(path)
ast.literal_eval(text)
"""
    assert sorted(set(dangers(ast.parse(source)))) == sorted(
        {
            "pickle", "yaml", "eval", "exec", "compile", "__import__", "import_module", "system", "popen",
            "allow_pickle", "shell", "torch.load", "weights_only", "run_path", "literal_eval",
        }
    )  # fmt: skip


def test_security_says_what_is_trusted():
    text = (ROOT / "SECURITY.md").read_text()
    for word in (
        "--module",
        "--allow-imports",
        "configs",
        "checkpoints",
        "run folder",
        "Notebooks",
        "moduleName",
        "report",
    ):
        assert word in text, word
