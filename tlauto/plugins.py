"""Find plugins, keep broken ones apart, and collect what they offer with its provenance."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pluggy

from tlauto import hookspecs
from tlauto.contracts import BackboneProvider, FreezeStrategy, TaskHead
from tlauto.errors import ConfigError, DuplicateNameError, PluginLoadError, UnknownNameError, did_you_mean

ENTRY_POINT_GROUP = "tlauto"
BUILTIN = ("tlauto.builtin.timm_provider", "tlauto.builtin.torchvision_provider",
           "tlauto.builtin.keras_provider", "tlauto.builtin.freezing", "tlauto.builtin.heads")  # fmt: skip
CORE_HOOKS = {"backbone_providers": "backbone", "freeze_strategies": "strategy", "task_heads": "head"}


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

    def names(self, hook: str) -> tuple[str, ...]:
        """Names offered for a hook, built-ins first, in order of registration."""
        return tuple(offer.name for offer in self.offers if offer.hook == hook)

    def source(self, hook: str, name: str) -> str:
        """`distribution version` of what offers a name; raises UnknownNameError."""
        return self._get(hook, name).source

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
            known = self.names(hook)
            broken = [p.name for p in self.plugins if p.error]
            hint = f" (broken plugins: {', '.join(broken)})" if broken else ""
            raise UnknownNameError(
                f"no {CORE_HOOKS[hook]} '{name}'{did_you_mean(name, known)} "
                f"('tlauto plugins' lists them){hint}"
            )
        return found[0]


def load_plugins(*, trace: Callable[[str], None] | None = None) -> Registry:
    """Load the built-ins and every installed plugin, each by itself.

    `TLAUTO_PLUGINS=a,b` loads only those distributions besides the built-ins. `trace` receives a
    line for each hook call. Raises: ConfigError when TLAUTO_PLUGINS names what is not installed.
    """
    manager = pluggy.PluginManager("tlauto")
    manager.add_hookspecs(hookspecs)
    if trace:
        manager.trace.root.setwriter(trace)
        manager.enable_tracing()
    plugins: list[Plugin] = []
    offers: list[Offer] = []
    for name, version, module, load in _sources():
        try:
            loaded = load()
            manager.register(loaded, name=module)
            _check_hooks(manager, module, name)
            made = _ask(manager, module, name, version)
        except Exception as error:  # noqa: BLE001 a plugin may raise anything; it must not stop the rest
            if manager.get_plugin(module) is not None:
                manager.unregister(name=module)
            plugins.append(Plugin(name, version, module, error=_reason(error)))
            continue
        offers += made
        by_hook = {h: tuple(o.name for o in made if o.hook == h) for h in CORE_HOOKS}
        plugins.append(Plugin(name, version, module, {h: n for h, n in by_hook.items() if n}))
    return Registry(plugins, offers)


@functools.cache
def registry() -> Registry:
    """The plugins of this process, loaded on first use."""
    return load_plugins()


def _sources() -> Iterable[tuple[str, str, str, Callable[[], Any]]]:
    core = _own_version()
    for module in BUILTIN:
        yield "tlauto", core, module, functools.partial(importlib.import_module, module)
    wanted = _restriction()
    entry_points = list(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))
    installed = {_distribution(ep) for ep in entry_points}
    for name in sorted((wanted or set()) - installed):
        raise ConfigError(
            f"TLAUTO_PLUGINS names '{name}', which is not an installed plugin"
            f"{did_you_mean(name, installed)} (installed: {', '.join(sorted(installed)) or 'none'})"
        )
    seen: set[tuple[str, str]] = set()
    for ep in sorted(entry_points, key=lambda e: (_distribution(e), e.name)):
        key = (_distribution(ep), ep.value)
        # The same distribution may be found twice on sys.path (an editable install beside a copy).
        if key in seen or (wanted is not None and key[0] not in wanted):
            continue
        seen.add(key)
        yield key[0], ep.dist.version if ep.dist else "unknown", ep.value, ep.load


def _restriction() -> set[str] | None:
    text = os.environ.get("TLAUTO_PLUGINS")
    return None if text is None else {name.strip() for name in text.split(",") if name.strip()}


def _distribution(entry_point: importlib.metadata.EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist else entry_point.name


def _own_version() -> str:
    try:
        return importlib.metadata.version("tlauto")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _check_hooks(manager: pluggy.PluginManager, module: str, plugin: str) -> None:
    """Refuse a plugin that implements nothing, or a hook that does not exist (check_pending)."""
    manager.check_pending()
    if not manager.get_hookcallers(manager.get_plugin(module)):
        raise PluginLoadError("it implements no hook; mark one with @tlauto.hookimpl", plugin=plugin)


def _ask(manager: pluggy.PluginManager, module: str, plugin: str, version: str) -> list[Offer]:
    others = [p for p in manager.get_plugins() if p is not manager.get_plugin(module)]
    made: list[Offer] = []
    for hook in CORE_HOOKS:
        for answer in manager.subset_hook_caller(hook, others)():
            if not isinstance(answer, (list, tuple)):
                raise PluginLoadError(f"{hook}() returned {type(answer).__name__}, not a list", plugin=plugin)
            for value in answer:
                name = getattr(value, "name", None)
                if not isinstance(name, str) or not name:
                    raise PluginLoadError(f"{hook}() returned an object without a name", plugin=plugin)
                made.append(Offer(hook, name, value, plugin, version))
    return made


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, PluginLoadError) else f"{type(error).__name__}: {text}"


def loaded_libraries() -> dict[str, str]:
    """Versions of the libraries that shape results and are loaded in this process."""
    names = ("torch", "torchvision", "timm", "keras", "numpy", "PIL", "sklearn", "optuna", "safetensors")
    versions = {}
    for name in names:
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "__version__"):
            versions[name] = str(module.__version__)
    return versions
