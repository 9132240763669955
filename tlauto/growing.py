"""A study that goes on with other backbones, strategies or heads: what changed, and its new version."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from tlauto import joined
from tlauto.contracts import BackboneInfo
from tlauto.pace import Begun
from tlauto.plugins import Registry, registry
from tlauto.schedule import Plan
from tlauto.searchspace import SearchSpace
from tlauto.space import Choice, Scalar
from tlauto.store import Store
from tlauto.study import Study, TrialRecord
from tlauto.versions import OFFERED, choices_of, copy_trials, waiting_points

PLURAL = {"backbone": "backbones", "strategy": "strategies", "head": "heads"}

Offers = tuple[tuple[str, str], ...]
"""Each what it is (one of `OFFERED`), and its name."""


@dataclass(frozen=True)
class Change:
    """What a space has that it had not, and the other way round.

    Attributes:
        changed: parameters whose choices are others than they were.
    """

    new: Offers
    gone: Offers
    changed: tuple[str, ...]

    def sentence(self, version: int, trials: int) -> str:
        """What changed, and what comes of it."""
        both = (("new", self.new), ("gone", self.gone))
        said = [f"{_named(offers)} {_are(offers)} {what}" for what, offers in both if offers]
        said += [f"'{name}' has other choices" for name in self.changed]
        with_them = f"the {trials} trials" if trials != 1 else "the one trial"
        return f"{', '.join(said)}: going on as version {version} with {with_them} so far"


def choices(space: SearchSpace) -> dict[str, tuple[Scalar, ...]]:
    """The values of every category of a space, by dotted name."""
    return {name: p.values for name, p in space.parameters.items() if isinstance(p, Choice)}


def choices_before(url: str, name: str, stored: Mapping[str, Any]) -> dict[str, tuple[Scalar, ...]]:
    """The same of a study that goes on, by the row of its search."""
    plan = stored["plan"]
    if "choices" in plan:
        return {key: tuple(values) for key, values in plan["choices"].items()}
    # Recorded by a tlauto that did not write them down: its trials tell.
    return {"backbone": tuple(plan["backbones"]), **choices_of(url, name, stored["version"])}


def find_change(
    before: Mapping[str, tuple[Scalar, ...]], space: SearchSpace, plugins: Registry
) -> Change | None:
    """What changed in a space, if anything that a study of Optuna's cannot have changed.

    Raises: UnknownNameError when what is gone may belong to a plugin that is installed but broken.
    """
    now = choices(space)
    known = [name for name in now if name in before and now[name] != before[name]]
    if not known:
        return None
    offered = [name for name in OFFERED if name in known]
    change = Change(
        new=tuple((what, str(name)) for what in offered for name in now[what] if name not in before[what]),
        gone=tuple((what, str(name)) for what in offered for name in before[what] if name not in now[what]),
        # How many backbones a head may read follows from how many there are.
        changed=tuple(name for name in known if name not in (*OFFERED, joined.NAME)),
    )
    if any(plugin.error for plugin in plugins.plugins):
        find: Mapping[str, Callable[[str], object]] = {
            "backbone": lambda id: plugins.provider(id.partition(":")[0]),
            "strategy": plugins.strategy,
            "head": plugins.head,
        }
        for what, name in change.gone:
            find[what](name)  # raises for a name that nobody offers, and says which plugins are broken
    return change


def decided(plan: Plan, infos: Mapping[str, BackboneInfo]) -> dict[str, Any]:
    """What is recorded of a version's space when it begins."""
    return {
        "backbones": list(plan.space.backbones),
        "choices": choices(plan.space),
        "providers": registry().names("backbone_providers"),
        "infos": [dataclasses.asdict(info) for info in infos.values()],
        "begun": dataclasses.asdict(plan.begun),
    }


def begun(stored: Mapping[str, Any] | None) -> Begun:
    """Where a version began, by the recorded plan of a study that goes on."""
    found = (stored or {}).get("begun")
    return Begun(**{**found, "added": tuple(found["added"])}) if found else Begun()


def open_version(
    store: Store, name: str, plan: Plan, infos: Mapping[str, BackboneInfo], change: Change
) -> tuple[Plan, str]:
    """Make the next version of a study that is ours and has no trial running, and switch to it at once.

    A search that is killed before the switch leaves the study as it was; the next one starts over.

    Returns: the plan of the new version, and a sentence on it.
    """
    row = store.search(name) or {}
    before, version = row["version"], row["version"] + 1
    parameters = plan.space.parameters
    copy_trials(store.url, name, before=before, version=version, parameters=parameters, metric=plan.metric)
    with closing(Study(store.url, name, seed=plan.config.seed, create=False, version=version)) as study:
        trials = study.trials()
        added = tuple(id for what, id in change.new if what == "backbone")
        plan = dataclasses.replace(plan, begun=Begun(len(trials), float(row["seconds"]), added))
        waiting = waiting_points(store.url, name, version)
        for point, purpose in _first_points(plan, trials, waiting):
            study.enqueue(point, purpose=purpose)
    gone = [info for info in row["plan"].get("infos", ()) if info["id"] not in infos]
    now = decided(plan, infos)
    store.open_version(name, version, {**row["plan"], **now, "infos": [*now["infos"], *gone]})
    return plan, change.sentence(version, sum(trial.counts for trial in trials))


def _first_points(
    plan: Plan, trials: Sequence[TrialRecord], waiting: Sequence[Mapping[str, Scalar]]
) -> list[tuple[dict[str, Scalar], str]]:
    """What a later version begins with: the default recipe, if it is another now, after its probe.

    What else is to be screened is proposed as the budget allows (`Plan.next_probe`).
    """
    if not trials:
        return []  # it begins like the first one
    tried = [*(dict(trial.params) for trial in trials if trial.counts), *map(dict, waiting)]
    backbone, fixed = plan.default_recipe()["backbone"], plan.space.fixed
    points = [entry for entry in plan.first_points(None) if entry[0]["backbone"] == backbone]
    free = [({k: v for k, v in point.items() if k not in fixed}, purpose) for point, purpose in points]
    return [(point, purpose) for point, purpose in free if point not in tried]


def _are(offers: Offers) -> str:
    return "is" if len(offers) == 1 else "are"


def _named(offers: Offers) -> str:
    """Such as: 2 backbones and the head 'x'."""
    by_kind = {what: [name for kind, name in offers if kind == what] for what in OFFERED}
    said = [
        f"the {what} '{names[0]}'" if len(names) == 1 else f"{len(names)} {PLURAL[what]}"
        for what, names in by_kind.items()
        if names
    ]
    return " and ".join(said) if len(said) < 3 else f"{said[0]}, {said[1]} and {said[2]}"
