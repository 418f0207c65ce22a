"""Rules about who may import, name or read what, checked on the source text of the whole project.

Each rule has planted violations below, so that a rule which stops seeing anything turns red.
"""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Package -> the packages of ours that it may import. Data flows one way.
LAYERS = {
    "pallas_kernels": set(),
    "dskjax": {"pallas_kernels"},
    "serve": {"dskjax"},
    "train_mtp": {"dskjax"},
}
# The oracles are a second opinion, so they share nothing with what they judge.
ORACLES = ("tests/oracles/", "tests/goldens/")
SOURCES = [*LAYERS, "tests", "scripts", "benchmarks", "examples", "notebooks"]

COMPOSITION_ROOT = "dskjax/cli"  # dskjax/cli.py, or the modules of a folder of that name
FLAX_HOME = "dskjax/params.py"
JAX_PRIVATE_HOME = "pallas_kernels/testing/interpret.py"
MESH_HOME = "dskjax/mesh.py"
MESH_AXES = {"dp", "ep", "tp"}
PICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
MAX_LINES = 400


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported module, as a dotted name, and whether only a call can trigger it."""

    name: str
    line: int
    lazy: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


@dataclasses.dataclass(frozen=True)
class Source:
    """A parsed file; `path` is relative to the root and uses forward slashes."""

    path: str
    text: str
    tree: ast.Module
    imports: list[Import]

    @property
    def package(self) -> str | None:
        top = self.path.partition("/")[0]
        return top if top in LAYERS else None


def read(root: Path, path: Path) -> Source:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, filename=str(path))
    relative = path.relative_to(root).as_posix()
    return Source(relative, text, tree, list(find_imports(tree, relative)))


def find_imports(tree: ast.AST, path: str, lazy: bool = False) -> Iterator[Import]:
    """Every import statement and every `import_module("literal")`, relative ones resolved."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            folder = path.split("/")[: -node.level] if node.level else []
            base = ".".join([*folder, *filter(None, [node.module])])
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, lazy)
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield Import(str(node.args[0].value), node.lineno, lazy)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from find_imports(node, path, lazy or inside)


def called_name(call: ast.Call) -> str:
    """`f` for both f(...) and module.f(...)."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def dotted(node: ast.AST) -> str:
    """`a.b.c` for that chain of attributes, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def is_composition_root(path: str) -> bool:
    return path.startswith((f"{COMPOSITION_ROOT}.", f"{COMPOSITION_ROOT}/"))


def is_entry_point(path: str) -> bool:
    return is_composition_root(path) or path.endswith("/__main__.py")


def check_layers(source: Source) -> Iterator[tuple[int, str]]:
    """Packages import downwards only; the composition root also upwards, inside functions."""
    for found in source.imports:
        if found.top not in LAYERS or found.top == source.package:
            continue
        if source.path.startswith(ORACLES):
            yield found.line, f"an oracle may not import {found.top}"
        elif source.package and found.top not in LAYERS[source.package]:
            if is_composition_root(source.path):
                if not found.lazy:
                    yield found.line, f"import {found.top} inside the command that needs it"
            else:
                yield found.line, f"{source.package} may not import {found.top}"


def check_flax(source: Source) -> Iterator[tuple[int, str]]:
    """Flax is a declaration layer behind one module, so that it can be swapped there."""
    for found in source.imports:
        if found.top == "flax" and source.package and source.path != FLAX_HOME:
            yield found.line, f"only {FLAX_HOME} may import flax"


def check_pickle(source: Source) -> Iterator[tuple[int, str]]:
    """Loading a file must not be able to run code."""
    for found in source.imports:
        if found.top in PICKLERS:
            yield found.line, f"{found.top} runs code from files; use safetensors, npz or json"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                allowed = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "allow_pickle" and not allowed:
                    yield node.lineno, "allow_pickle may only be False"


def check_jax_private(source: Source) -> Iterator[tuple[int, str]]:
    """Private JAX moves without notice, so one helper holds all of it."""
    if source.path == JAX_PRIVATE_HOME:
        return
    uses = [(found.line, found.name) for found in source.imports]
    uses += [(n.lineno, dotted(n)) for n in ast.walk(source.tree) if isinstance(n, ast.Attribute)]
    for line, name in uses:
        # An attribute chain contains its shorter chains; report only the one that ends in _src.
        if name == "jax._src" or (name.startswith("jax._src.") and (line, "jax._src") not in uses):
            yield line, f"only {JAX_PRIVATE_HOME} may use {name}"


def check_mesh_names(source: Source) -> Iterator[tuple[int, str]]:
    """Layers speak of logical axes; the mesh's own names are mentioned in one place."""
    if source.package and source.path != MESH_HOME:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and node.value in MESH_AXES:
                yield node.lineno, f"only {MESH_HOME} may name the mesh axis {node.value!r}"


def check_environment(source: Source) -> Iterator[tuple[int, str]]:
    """Behaviour comes from arguments; only a command may read the environment."""
    if not source.package or is_entry_point(source.path):
        return
    names = {f"os.{name}" for name in ENVIRONMENT}
    uses = [(found.line, found.name) for found in source.imports]
    uses += [(n.lineno, dotted(n)) for n in ast.walk(source.tree) if isinstance(n, ast.Attribute)]
    for line, name in uses:
        if name in names:
            yield line, f"{name} belongs in {COMPOSITION_ROOT}.py or a __main__.py"


def check_length(source: Source) -> Iterator[tuple[int, str]]:
    """One file, one noun."""
    lines = len(source.text.splitlines())
    if lines > MAX_LINES:
        yield MAX_LINES + 1, f"{lines} lines; split it at {MAX_LINES}"


RULES = [
    check_layers,
    check_flax,
    check_pickle,
    check_jax_private,
    check_mesh_names,
    check_environment,
    check_length,
]


def sources(root: Path) -> list[Source]:
    paths = (path for folder in SOURCES for path in sorted((root / folder).rglob("*.py")))
    return [read(root, path) for path in paths]


def violations(rule, found: list[Source]) -> list[str]:
    return [f"{s.path}:{line}: {problem}" for s in found for line, problem in sorted(rule(s))]


@pytest.fixture(scope="module")
def project() -> list[Source]:
    return sources(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__.removeprefix("check_"))
def test_project_keeps(rule, project):
    assert not (found := violations(rule, project)), "\n".join(found)


def test_every_package_is_looked_at(project):
    assert {source.package for source in project} >= set(LAYERS)


PLANTED = [
    (check_layers, "pallas_kernels/quant.py", "import dskjax.config"),
    (check_layers, "pallas_kernels/a/b.py", "from serve import engine"),
    (check_layers, "dskjax/model.py", "from train_mtp.loss import depth_loss"),
    (check_layers, "dskjax/model.py", "def f():\n    import serve"),
    (check_layers, "dskjax/climate.py", "def f():\n    import serve"),
    (check_layers, "dskjax/model.py", "import importlib\nimportlib.import_module('serve.engine')"),
    (check_layers, "dskjax/cli.py", "import serve.engine"),
    (check_layers, "dskjax/cli.py", "if True:\n    from train_mtp import loop"),
    (check_layers, "serve/engine.py", "import pallas_kernels.quant"),
    (check_layers, "serve/engine.py", "import numpy, train_mtp"),
    (check_layers, "train_mtp/http/loop.py", "from serve import blocks"),
    (check_layers, "tests/oracles/mla.py", "from dskjax import ModelConfig"),
    (check_flax, "dskjax/layers/norm.py", "from flax import nnx"),
    (check_flax, "serve/engine.py", "def f():\n    import flax.linen as nn"),
    (check_pickle, "scripts/goldens.py", "import pickle"),
    (check_pickle, "tests/test_a.py", "from dill import load"),
    (check_pickle, "dskjax/data.py", "np.load(path, allow_pickle=True)"),
    (check_pickle, "dskjax/data.py", "np.load(path, allow_pickle=trust)"),
    (check_jax_private, "dskjax/model.py", "import jax._src.core"),
    (check_jax_private, "tests/test_a.py", "from jax._src import core"),
    (check_jax_private, "tests/test_a.py", "from jax import _src"),
    (check_jax_private, "serve/engine.py", "x = jax._src.core.Jaxpr"),
    (check_mesh_names, "dskjax/layers/mla.py", "P = spec(None, 'tp')"),
    (check_mesh_names, "train_mtp/step.py", "axes = ('dp',)"),
    (check_environment, "dskjax/model.py", "flag = os.environ['FLAG']"),
    (check_environment, "serve/config.py", "def f():\n    return os.getenv('PORT')"),
    (check_environment, "pallas_kernels/select.py", "from os import environ"),
    (check_length, "dskjax/model.py", "x = 1\n" * (MAX_LINES + 1)),
]


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED)
def test_planted_violation_is_reported(rule, path, text, tmp_path):
    found = violations(rule, plant(tmp_path, path, text))
    assert len(found) == 1 and found[0].startswith(f"{path}:"), found


ALLOWED = [
    ("pallas_kernels/mla_decode/api.py", "from . import reference\nfrom ..quant import QTensor"),
    ("dskjax/layers/mla.py", "from pallas_kernels import mla_decode\nimport jax.numpy as jnp"),
    ("dskjax/cli.py", "import os\ndef run():\n    from serve import engine\n    os.environ['A']"),
    ("dskjax/cli/serve.py", "def run():\n    from serve import engine"),
    ("dskjax/params.py", "from flax import nnx"),
    ("dskjax/mesh.py", "AXES = ('dp', 'ep', 'tp')"),
    ("dskjax/data.py", "np.load(path, allow_pickle=False)"),
    ("serve/__main__.py", "import os\nfrom dskjax.cli import serve\nport = os.environ['PORT']"),
    ("serve/engine.py", "from dskjax.decode import step\nfrom serve import blocks\nimport os.path"),
    ("pallas_kernels/testing/interpret.py", "from jax._src.pallas import mosaic_gpu"),
    ("tests/serve/test_a.py", "import os, serve, train_mtp\nos.environ['A']\naxes = 'tp'"),
    ("tests/oracles/mla.py", "import numpy as np\nfrom tests.oracles import rope"),
    ("dskjax/model.py", "x = 1\n" * MAX_LINES),
]


@pytest.mark.parametrize(("path", "text"), ALLOWED)
def test_allowed_code_is_not_reported(path, text, tmp_path):
    found = plant(tmp_path, path, text)
    assert not [problem for rule in RULES for problem in violations(rule, found)]


def plant(root: Path, path: str, text: str) -> list[Source]:
    file = root / path
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return sources(root)
