"""Find plugins, keep broken ones apart, and collect what they offer with its provenance."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pluggy

from tlauto import hookspecs
from tlauto.contracts import BackboneProvider, FreezeStrategy, TaskHead
from tlauto.errors import ConfigError, DuplicateNameError, PluginLoadError, UnknownNameError, did_you_mean
from tlauto.executors import Executor
from tlauto.space import Parameter
from tlauto.trackers import Tracker

ENTRY_POINT_GROUP = "tlauto"
BUILTIN = ("tlauto.builtin.timm_provider", "tlauto.builtin.torchvision_provider",
           "tlauto.builtin.keras_provider", "tlauto.builtin.freezing", "tlauto.builtin.heads",
           "tlauto.builtin.executors")  # fmt: skip
CORE_HOOKS = {
    "backbone_providers": "provider",
    "freeze_strategies": "strategy",
    "task_heads": "head",
    "trackers": "tracker",
    "executors": "executor",
}
"""Hooks and the word for what each offers."""
CONTRACTS: dict[str, type] = {
    "backbone_providers": BackboneProvider,
    "freeze_strategies": FreezeStrategy,
    "task_heads": TaskHead,
    "trackers": Tracker,
    "executors": Executor,
}


@dataclass(frozen=True)
class Plugin:
    """One plugin: its distribution, version, the names it offers by hook, and why it is broken."""

    name: str
    version: str
    module: str
    offers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Offer:
    """One object that a plugin's hook returned, with its provenance."""

    hook: str
    name: str
    value: Any
    plugin: str
    version: str

    @property
    def source(self) -> str:
        """`distribution version`, as recorded with each trial."""
        return f"{self.plugin} {self.version}"


class Registry:
    """All plugins of this process and what they offer. Build it with `load_plugins`."""

    def __init__(self, plugins: Iterable[Plugin], offers: Iterable[Offer]) -> None:
        self.plugins = tuple(plugins)
        self.offers = tuple(offers)

    def provider(self, name: str) -> BackboneProvider:
        """The provider of that name; raises UnknownNameError."""
        value: BackboneProvider = self._get("backbone_providers", name).value
        return value

    def strategy(self, name: str) -> FreezeStrategy:
        """The freezing strategy of that name; raises UnknownNameError."""
        value: FreezeStrategy = self._get("freeze_strategies", name).value
        return value

    def head(self, name: str) -> TaskHead:
        """The head of that name; raises UnknownNameError."""
        value: TaskHead = self._get("task_heads", name).value
        return value

    def tracker(self, name: str) -> Tracker:
        """The tracker of that name; raises UnknownNameError."""
        value: Tracker = self._get("trackers", name).value
        return value

    def executor(self, name: str) -> Executor:
        """The executor of that name; raises UnknownNameError."""
        value: Executor = self._get("executors", name).value
        return value

    def names(self, hook: str) -> tuple[str, ...]:
        """Names offered for a hook, each once, built-ins first, in order of registration."""
        return tuple(dict.fromkeys(offer.name for offer in self.offers if offer.hook == hook))

    def source(self, hook: str, name: str) -> str:
        """`distribution version` of what offers a name; raises UnknownNameError."""
        return self._get(hook, name).source

    def clashes(self) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
        """Hook, name and distributions of each name that more than one plugin offers."""
        owners: dict[tuple[str, str], list[str]] = {}
        for offer in self.offers:
            owners.setdefault((offer.hook, offer.name), []).append(offer.plugin)
        return tuple((hook, name, tuple(who)) for (hook, name), who in owners.items() if len(who) > 1)

    def _get(self, hook: str, name: str) -> Offer:
        found = [o for o in self.offers if o.hook == hook and o.name == name]
        if len(found) > 1:
            both = " and ".join(f"'{o.plugin}'" for o in found)
            raise DuplicateNameError(
                f"{both} both offer the {CORE_HOOKS[hook]} '{name}'; uninstall one, or name the "
                f"plugins to load in TLAUTO_PLUGINS",
                plugin=found[-1].plugin,
            )
        if not found:
            broken = sorted({p.name for p in self.plugins if p.error})
            hint = f" (broken plugins: {', '.join(broken)})" if broken else ""
            raise UnknownNameError(
                f"no {CORE_HOOKS[hook]} '{name}'{did_you_mean(name, self.names(hook))} "
                f"('tlauto plugins' lists them){hint}"
            )
        return found[0]


def load_plugins(*, trace: Callable[[str], None] | None = None) -> Registry:
    """Load the built-ins and every installed plugin, each by itself.

    `TLAUTO_PLUGINS=a,b` loads only those distributions besides the built-ins, an empty value none.
    `trace` receives a line for each hook call. Raises: ConfigError when TLAUTO_PLUGINS names what is
    not installed.
    """
    manager = pluggy.PluginManager("tlauto")
    manager.add_hookspecs(hookspecs)
    if trace:
        manager.trace.root.setwriter(trace)
        manager.enable_tracing()
    plugins: list[Plugin] = []
    offers: list[Offer] = []
    for source in _sources():
        made, error = _load(manager, source)
        by_hook = {hook: tuple(offer.name for offer in made if offer.hook == hook) for hook in CORE_HOOKS}
        shown = {hook: names for hook, names in by_hook.items() if names}
        plugins.append(Plugin(source.plugin, source.version, source.module, shown, error))
        offers += made
    return Registry(plugins, offers)


@functools.cache
def registry() -> Registry:
    """The plugins of this process, loaded on first use."""
    return load_plugins()


# --- where plugins are ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """One module to load and the distribution it comes from."""

    plugin: str
    version: str
    module: str
    load: Callable[[], Any]


def _sources() -> Iterator[_Source]:
    core = _own_version()
    for module in BUILTIN:
        yield _Source("tlauto", core, module, functools.partial(importlib.import_module, module))
    installed = list(_installed())
    wanted = _restriction({source.plugin for source in installed})
    for source in sorted(installed, key=lambda source: (source.plugin, source.module)):
        if wanted is None or _canonical(source.plugin) in wanted:
            yield source


def _installed() -> Iterator[_Source]:
    """Every entry point of our group, of the first distribution of each name on sys.path."""
    seen: set[str] = set()
    for distribution in importlib.metadata.distributions():
        # Only ours are parsed: another project's damaged metadata is none of our business.
        if f"[{ENTRY_POINT_GROUP}]" not in (distribution.read_text("entry_points.txt") or "").split():
            continue
        name, version = str(distribution.name or "unknown"), str(distribution.version or "unknown")
        if _canonical(name) in seen:
            continue
        seen.add(_canonical(name))
        try:
            entry_points = distribution.entry_points.select(group=ENTRY_POINT_GROUP)
        except (TypeError, ValueError) as error:
            yield _Source(name, version, "entry_points.txt", functools.partial(_unreadable, error))
            continue
        for entry_point in entry_points:
            yield _Source(name, version, entry_point.value, entry_point.load)


def _unreadable(error: Exception) -> None:
    raise PluginLoadError(f"its entry_points.txt cannot be read ({error}); install it again")


def _restriction(installed: Iterable[str]) -> set[str] | None:
    """Canonical names in TLAUTO_PLUGINS, None when it is not set."""
    text = os.environ.get("TLAUTO_PLUGINS")
    if text is None:
        return None
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    known = {_canonical(name) for name in installed}
    for name in wanted:
        if _canonical(name) not in known:
            raise ConfigError(
                f"TLAUTO_PLUGINS names '{name}', which is not an installed plugin"
                f"{did_you_mean(name, installed)} (installed: {', '.join(sorted(installed)) or 'none'})"
            )
    return {_canonical(name) for name in wanted}


def _canonical(name: str) -> str:
    """A distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _own_version() -> str:
    try:
        return importlib.metadata.version("tlauto")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


# --- loading one, whatever it does ------------------------------------------------------------------


def _load(manager: pluggy.PluginManager, source: _Source) -> tuple[list[Offer], str | None]:
    """What one source offers, or nothing and the reason why it is broken."""
    key = f"{source.plugin}:{source.module}"
    try:
        manager.register(source.load(), name=key)
        _check_hooks(manager, key)
        return _ask(manager, key, source), None
    # A plugin may raise anything, even exit, and must not stop the rest.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        if manager.get_plugin(key) is not None:
            manager.unregister(name=key)
        return [], _reason(error)


def _check_hooks(manager: pluggy.PluginManager, key: str) -> None:
    """Refuse a plugin that implements nothing, or a hook that does not exist."""
    callers = manager.get_hookcallers(manager.get_plugin(key)) or []
    for caller in callers:
        if not caller.has_spec():
            raise PluginLoadError(f"it implements '{caller.name}', which is no hook{_hint(caller.name)}")
    manager.check_pending()
    if not callers:
        raise PluginLoadError("it implements no hook; mark its functions with @tlauto.hookimpl")


def _hint(name: str) -> str:
    return did_you_mean(name, CORE_HOOKS) or f" (hooks: {', '.join(CORE_HOOKS)})"


def _ask(manager: pluggy.PluginManager, key: str, source: _Source) -> list[Offer]:
    plugin = manager.get_plugin(key)
    others = [other for other in manager.get_plugins() if other is not plugin]
    made: list[Offer] = []
    for caller in manager.get_hookcallers(plugin) or []:
        answers = manager.subset_hook_caller(caller.name, others)()
        # pluggy leaves out an answer of None.
        for answer in answers or [None]:
            if not isinstance(answer, (list, tuple)):
                raise PluginLoadError(f"{caller.name}() returned {_kind(answer)}, not a list")
            for value in answer:
                _check_offer(caller.name, value, {offer.name for offer in made if offer.hook == caller.name})
                made.append(Offer(caller.name, value.name, value, source.plugin, source.version))
    return made


def _check_offer(hook: str, value: Any, taken: set[str]) -> None:
    """Refuse what does not fulfil its contract now, instead of in the middle of a search."""
    contract = CONTRACTS[hook]
    members = {*contract.__annotations__, *(name for name in vars(contract) if not name.startswith("_"))}
    name = getattr(value, "name", None)
    label = f"'{name}'" if isinstance(name, str) else f"a {_kind(value)}"
    if isinstance(value, type):
        raise PluginLoadError(f"{hook}() returned the class {value.__name__}, not an instance of it")
    if missing := sorted(member for member in members if not hasattr(value, member)):
        raise PluginLoadError(f"{hook}() returned {label} without {', '.join(missing)}")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise PluginLoadError(f"{hook}() offers the name {name!r}; use letters, digits, '_' and '-' only")
    if name in taken:
        raise PluginLoadError(f"{hook}() offers '{name}' twice")
    space = getattr(value, "space", {})
    if not isinstance(space, Mapping) or not all(isinstance(entry, Parameter) for entry in space.values()):
        raise PluginLoadError(f"the space of '{name}' is not a dict of Float, Int and Choice")


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, PluginLoadError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def loaded_libraries() -> dict[str, str]:
    """Versions of the libraries that shape results and are loaded in this process."""
    names = ("torch", "torchvision", "timm", "keras", "numpy", "PIL", "sklearn", "optuna", "safetensors")
    versions = {}
    for name in names:
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "__version__"):
            versions[name] = str(module.__version__)
    return versions
