"""The layers of the package: who may import whom, and what importing it may not cause."""

import ast
import importlib.util
import pathlib
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "dec_diffusion"
CONFIGS = PACKAGE.parent / "configs"
FILES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")
} | {f"configs.{p.stem}": p for p in CONFIGS.glob("*.py")}

# Modules that know no other part of the package but each other.
LEAVES = {
    "types",
    "plain",
    "spread",
    "schedule",
    "gmm",
    "products",
    "kmeans",
    "communities",
    "targets",
    "sampling",
    "search",
    "pca",
    "views",
}

# Where a library may be imported: names of modules, or of packages with all they hold.
CONFINED = {
    "flax": {"networks"},
    "orbax": {"checkpoints"},
    "tensorflow_datasets": {"data"},
    "h5py": {"data"},
    "pyarrow": {"data"},
    "imagecodecs": {"data"},
    "safetensors": {"networks.diffusers"},
    "tensorboardX": {"loggers"},
    "absl": {"main", "options"},
    "tensorflow": set(),
    "torch": set(),
}

# What may not be imported from where, in the package itself: arrows point one way only.
HOST = {"parallel", "evaluate", "trained", "train", "main", "workdir", "checkpoints", "data"}
FORBIDDEN = {
    "networks": {"method", "methods", "engine", *HOST},
    "method": {"methods", "networks", "engine", *HOST},
    "methods": {"engine", *HOST, "estimator"},
    "engine": {"methods", "networks", *HOST, "feed", "placement"},
    "stream": {"methods", "networks", "engine", *HOST, "feed", "placement"},
    "interrupt": {"methods", "networks", "engine", *HOST, "feed", "placement"},
    "distributed": {"methods", "networks", "engine", *HOST, "feed", "placement"},
    "placement": {"methods", "networks", *HOST, "feed"},
    "feed": {"methods", "networks", *HOST},
    "parallel": {"methods", "networks", *HOST - {"parallel"}},
    "metrics": {"methods", "networks", "engine", *HOST},
    "data": {"methods", "networks", "engine", *HOST - {"data"}},
    "checkpoints": {"methods", "networks", "engine", *HOST - {"checkpoints"}},
    "workdir": {"methods", "networks", "engine", *HOST - {"workdir", "checkpoints"}},
    "evaluate": {"trained", "train", "estimator", "main"},
    "report": {"trained", "train", "estimator", "main"},
    "page": {"trained", "train", "estimator", "main"},
    "prototypes": {"trained", "train", "estimator", "main"},
    "trained": {"results", "train", "seeds", "estimator", "main"},
    "results": {"train", "seeds", "estimator", "main"},
    "train": {"seeds", "estimator", "main"},
    "seeds": {"estimator", "main"},
    "estimator": {"main"},
}


def within(module: str, places: set[str]) -> bool:
    """Whether a module is one of these, or lies in one of these packages."""
    return any(module == place or module.startswith(f"{place}.") for place in places)


def imports(path: pathlib.Path, module: str) -> set[str]:
    """The dotted names a file imports, anywhere in it; ``from a import b`` gives ``a.b``."""
    package = f"dec_diffusion.{module}".split(".")
    if path.name != "__init__.py":
        package.pop()
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def own(names: set[str]) -> set[str]:
    """Of these names, those in the package, without its name."""
    return {n.removeprefix("dec_diffusion.") for n in names if n.startswith("dec_diffusion.")}


def others(names: set[str]) -> set[str]:
    """The top-level packages of these names, without the package itself and the stdlib."""
    return {n.split(".")[0] for n in names} - {"dec_diffusion"} - set(sys.stdlib_module_names)


def test_reading_imports_sees_every_form(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "import a.b as c\nfrom d import e, f\nfrom . import g\nfrom ..h import i\n"
        "def later():\n    import j\n"
    )
    assert imports(path, "sub.x") == {
        "a.b", "d.e", "d.f", "dec_diffusion.sub.g", "dec_diffusion.h.i", "j",
    }  # fmt: skip


@pytest.mark.parametrize("module", sorted(FILES))
def test_libraries_stay_where_they_belong(module):
    used = others(imports(FILES[module], module))
    stray = {lib for lib in used & CONFINED.keys() if not within(module, CONFINED[lib])}
    assert not stray


@pytest.mark.parametrize("module", sorted(LEAVES & FILES.keys()))
def test_leaves_need_only_jax_and_each_other(module):
    names = imports(FILES[module], module)
    assert others(names) <= {"jax", "numpy", "jaxtyping"}
    assert {name for name in own(names) if not within(name, LEAVES)} == set()


@pytest.mark.parametrize("module", ["metrics", "num_clusters"])
def test_some_need_no_jax(module):
    names = imports(FILES[module], module)
    assert others(names) <= {"numpy", "scipy", "sklearn"}
    assert {name for name in own(names) if not within(name, {"types"})} == set()


@pytest.mark.parametrize("module", sorted(m for m in FILES if within(m, set(FORBIDDEN))))
def test_imports_point_one_way(module):
    layer = module.split(".")[0]
    used = own(imports(FILES[module], module))
    assert {name for name in used if within(name, FORBIDDEN[layer])} == set()


@pytest.mark.parametrize("module", ["dec_diffusion", "dec_diffusion.main"])
def test_importing_is_light_and_starts_no_backend(run_python, module):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not there")
    code = f"""
import sys, {module}
from jax._src import xla_bridge
print([m for m in ("tensorflow", "tensorflow_datasets", "torch", "matplotlib") if m in sys.modules])
print(xla_bridge.backends_are_initialized())
"""
    assert run_python(code).stdout.split("\n")[:2] == ["[]", "False"]


def test_training_is_imported_without_what_only_scores_need(run_python):
    code = """
import sys, dec_diffusion.command
print([m for m in ("scipy.optimize", "scipy.stats", "sklearn", "matplotlib") if m in sys.modules])
"""
    assert run_python(code).stdout.strip() == "[]"
