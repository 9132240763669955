"""Who may import whom, read from the syntax trees: the table of docs/architecture.md."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYER_0 = frozenset(
    {"errors", "space", "contracts", "splits", "levels", "rungs", "pulse", "events", "trackers"}
    | {"executors", "losses", "scales"}
)
LAYER_1 = frozenset(
    {"hookspecs", "plugins", "config", "recipe", "searchspace", "metrics", "intervals", "data", "devices"}
    | {"locks", "caches", "database", "memory"}
)
NETWORKS = frozenset({"backbone", "keras_network"})
DATABASE = frozenset({"connections", "migrations"})
OPTUNA = frozenset({"study", "versions", "sampler", "writethrough", "rows", "tables"})
LAYER_2 = frozenset({"store", "training", "builtin"}) | OPTUNA | NETWORKS | DATABASE
LAYER_3 = frozenset({"worker", "pool", "preflight"})
LAYER_4 = frozenset(
    {"coordinator", "prepare", "candidates", "pace", "allocation", "schedule", "warm", "history", "results"}
    | {"continuing", "executing", "failures", "growing", "joined", "loop", "outcomes", "room"}
    | {"again", "batching", "larger", "proposing", "ranking", "settling", "starting", "tracking"}
)
LAYER_5 = frozenset({"cli", "api"})
BELOW_2 = LAYER_0 | LAYER_1
IMAGES = frozenset({"PIL", "numpy", "sklearn", "scipy"})
LIBRARIES = IMAGES | {"torch", "torchvision", "timm", "keras", "safetensors", "h5py", "huggingface_hub"}
ENGINES = frozenset({"openvino", "onnxruntime"})  # optional: never at the top


@dataclass(frozen=True)
class Rule:
    """Which parts of tlauto and which libraries a part may import, at the top and inside functions."""

    top: frozenset[str]
    libraries: frozenset[str] = frozenset()
    inside: frozenset[str] = frozenset()
    inside_libraries: frozenset[str] = frozenset()


def _rules() -> dict[str, Rule]:
    none: frozenset[str] = frozenset()
    rules = dict.fromkeys(LAYER_0, Rule(LAYER_0))
    rules |= dict.fromkeys(LAYER_1, Rule(BELOW_2, frozenset({"pluggy"}), none, IMAGES | {"rich"}))
    rules |= dict.fromkeys(DATABASE | {"store"}, Rule(BELOW_2 | DATABASE, frozenset({"sqlalchemy"})))
    rules["study"] = Rule(
        BELOW_2 | {"connections", "sampler", "tables", "writethrough"}, frozenset({"optuna"})
    )
    rules["tables"] = Rule(BELOW_2 | {"connections", "writethrough"}, frozenset({"optuna"}))
    rules["versions"] = Rule(BELOW_2 | {"study", "tables"}, frozenset({"optuna"}))
    rules["writethrough"] = Rule(BELOW_2 | {"connections", "rows"}, frozenset({"optuna", "sqlalchemy"}))
    rules["rows"] = Rule(BELOW_2, frozenset({"optuna", "sqlalchemy"}))
    rules["sampler"] = Rule(BELOW_2, frozenset({"optuna", "numpy"}))
    rules |= dict.fromkeys(
        NETWORKS, Rule(BELOW_2, frozenset({"torch", "numpy", "safetensors"}), none, LIBRARIES)
    )
    # Tasks are no plugins: training finds them by name, inside functions.
    rules["training"] = Rule(BELOW_2 | NETWORKS, LIBRARIES, frozenset({"builtin.tasks"}), LIBRARIES | ENGINES)
    rules["builtin"] = Rule(BELOW_2, none, NETWORKS | {"pool"}, LIBRARIES)
    rules |= dict.fromkeys(LAYER_3, Rule(BELOW_2 | LAYER_3, none, frozenset({"training"}), LIBRARIES))
    # The worker is an entry of its own: it also writes the bundle, where torch already is.
    rules["worker"] = Rule(BELOW_2 | LAYER_3, none, frozenset({"training", "results.bundle"}), LIBRARIES)
    below_4 = BELOW_2 | {"connections", "store", "study", "versions", "builtin"} | LAYER_3 | LAYER_4
    rules |= dict.fromkeys(LAYER_4, Rule(below_4, none, LAYER_2, LIBRARIES))
    everything = BELOW_2 | LAYER_2 | LAYER_3 | LAYER_4 | LAYER_5 | {"testing"}
    shown = LIBRARIES | {"rich", "optuna_dashboard"}
    rules |= dict.fromkeys(LAYER_5, Rule(BELOW_2 | LAYER_5, frozenset({"click"}), everything, shown))
    suites = BELOW_2 | NETWORKS | {"pool", "testing"}
    rules["testing"] = Rule(suites, LIBRARIES | {"pytest"}, LAYER_2, LIBRARIES)
    rules["__init__"] = Rule(LAYER_0 | {"hookspecs"}, none, frozenset({"api"}))
    rules["__main__"] = Rule(frozenset({"cli"}))
    return rules


RULES = _rules()
PLUGIN_PARTS = frozenset(
    {"", "space", "contracts", "events", "trackers", "errors", "backbone", "testing"}
    | {"executors", "pool", "devices"}
)


@dataclass(frozen=True)
class Import:
    """One import: the dotted module, its line, and where it stands."""

    module: str
    line: int
    is_inside: bool
    is_typing: bool


def _part(file: Path) -> str:
    relative = file.relative_to(ROOT / "tlauto")
    return relative.parts[0].removesuffix(".py")


def _imports(file: Path) -> Iterator[Import]:
    yield from _walk(ast.parse(file.read_text(encoding="utf-8")), is_inside=False, is_typing=False)


def _walk(node: ast.AST, *, is_inside: bool, is_typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, is_inside, is_typing)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"a relative import at line {child.lineno}; write it out"
            for module in _targets(child):
                yield Import(module, child.lineno, is_inside, is_typing)
        else:
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            yield from _walk(child, is_inside=is_inside or function, is_typing=is_typing or typing)


def _targets(node: ast.ImportFrom) -> Iterator[str]:
    # `from tlauto import study` imports the module tlauto.study: the part is in the name.
    for alias in node.names:
        dotted = f"{node.module}.{alias.name}"
        is_module = node.module == "tlauto" and _exists(alias.name)
        yield dotted if is_module else str(node.module)


def _exists(name: str) -> bool:
    return (ROOT / "tlauto" / f"{name}.py").exists() or (ROOT / "tlauto" / name).is_dir()


def _refusal(part: str, found: Import) -> str | None:
    top, *rest = found.module.split(".")
    if top in sys.stdlib_module_names or found.is_typing:
        return None
    rule = RULES[part]
    if top == "tlauto":
        target = rest[0] if rest else "__init__"
        allowed = rule.top | {part} | (rule.inside if found.is_inside else frozenset())
        return None if allowed & {target, ".".join(rest[:2])} else found.module
    libraries = rule.libraries | (rule.inside_libraries if found.is_inside else frozenset())
    return None if top in libraries else top


SOURCES = sorted((ROOT / "tlauto").rglob("*.py"))
PLUGIN_SOURCES = sorted(f for f in (ROOT / "plugins").glob("*/*/**/*.py") if "tests" not in f.parts)


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_module_imports_only_what_its_layer_allows(file: Path) -> None:
    part = _part(file)
    assert part in RULES, f"{part} is in no layer; add it to the table here and in docs/architecture.md"
    wrong = [f"line {i.line}: {name}" for i in _imports(file) if (name := _refusal(part, i))]
    assert not wrong, f"{file.relative_to(ROOT)} (part '{part}') may not import {', '.join(wrong)}"


@pytest.mark.parametrize("file", PLUGIN_SOURCES, ids=lambda f: str(f.relative_to(ROOT / "plugins")))
def test_a_plugin_imports_the_public_api_and_its_library_inside_functions(file: Path) -> None:
    own = file.relative_to(ROOT / "plugins").parts[0].replace("-", "_")
    wrong = []
    for found in _imports(file):
        top, *rest = found.module.split(".")
        if top in sys.stdlib_module_names or top == own or found.is_typing:
            continue
        if top == "tlauto":
            target = rest[0] if rest else ""
            if target not in PLUGIN_PARTS or (target == "backbone" and not found.is_inside):
                wrong.append(f"line {found.line}: {found.module}")
        elif not found.is_inside:
            wrong.append(f"line {found.line}: {found.module}")
    assert not wrong, f"{file.relative_to(ROOT)} may not import {', '.join(wrong)} here"


def test_only_study_imports_optuna_and_only_the_store_imports_sqlalchemy() -> None:
    users: dict[str, set[str]] = {"optuna": set(), "sqlalchemy": set()}
    for file in SOURCES:
        for found in _imports(file):
            top = found.module.partition(".")[0]
            if top in users and not found.is_typing:
                users[top].add(_part(file))
    assert users["optuna"] <= OPTUNA
    assert users["sqlalchemy"] <= {"store", "writethrough", "rows"} | DATABASE


def test_the_walk_sees_imports_inside_functions_and_under_type_checking(tmp_path: Path) -> None:
    source = "import os\nif TYPE_CHECKING:\n    import torch\ndef f():\n    from tlauto import errors\n"
    file = tmp_path / "module.py"
    file.write_text(source)
    found = {i.module: (i.is_inside, i.is_typing) for i in _imports(file)}
    assert found == {"os": (False, False), "torch": (False, True), "tlauto.errors": (True, False)}


def test_a_forbidden_import_is_refused() -> None:
    assert _refusal("contracts", Import("torch", 1, is_inside=True, is_typing=False)) == "torch"
    assert _refusal("builtin", Import("timm.models", 1, is_inside=False, is_typing=False)) == "timm"
    assert _refusal("builtin", Import("timm.models", 1, is_inside=True, is_typing=False)) is None
    assert _refusal("training", Import("tlauto.builtin.tasks", 1, is_inside=True, is_typing=False)) is None
    assert _refusal("training", Import("tlauto.builtin.heads", 1, is_inside=True, is_typing=False))
    assert _refusal("store", Import("tlauto.study", 1, is_inside=False, is_typing=False)) == "tlauto.study"
