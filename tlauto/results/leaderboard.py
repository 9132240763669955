"""The trials of a study as rows, best first: what `tlauto leaderboard` prints and `--json` promises."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tlauto.ranking import best_trial, rank
from tlauto.space import Scalar
from tlauto.store import Store
from tlauto.study import ENDED, INTERRUPTED, OUT_OF_TIME, Study, TrialRecord


@dataclass(frozen=True)
class Row:
    """One trial.

    Attributes:
        state: waiting, running, complete, pruned, failed, or shelved: it has a score, but a backbone,
            strategy or head that the study does not search any more.
        score: what it is ranked by, higher is better (`ranking.estimate`); None when it has none.
        seconds: wall time of the trial, None while it runs.
        params: every parameter it ran with, by dotted name.
        from_study: the earlier study that a `warm` trial was taken over from.
        features: what of the backbone the head reads, None until the trial ended.
        metrics: on validation, name to {"value", "low", "high"}.
        error: `kind: sentence` of a failed trial.
        detail: its traceback, or the last lines of its worker's log.
        retried: whether it was tried again after it failed, which does not count.
        retry_of: the failed or interrupted trial that this one is another attempt at.
        micro_batch: images that the network took at once, where memory did not allow a whole batch.
    """

    number: int
    backbone: str
    strategy: str
    head: str
    state: str
    score: float | None
    seconds: float | None
    params: Mapping[str, Scalar]
    purpose: str
    from_study: str | None
    epochs: int | None
    seed: int | None
    slot: str | None
    trainable_params: int | None
    features: str | None
    metrics: Mapping[str, Mapping[str, float]]
    error: str | None
    detail: str | None = None
    retried: bool = False
    retry_of: int | None = None
    micro_batch: int | None = None
    is_best: bool = False

    @property
    def is_interrupted(self) -> bool:
        """Whether it was cut off with its search, which does not count."""
        kinds = (f"{INTERRUPTED}:", f"{OUT_OF_TIME}:")
        return self.state == "failed" and (self.error or "").startswith(kinds)

    @property
    def counts(self) -> bool:
        """Whether it counts towards the total of trials."""
        is_over = self.state in ENDED
        return is_over and not self.is_interrupted and not self.retried


def leaderboard(store: Store, study: Study) -> list[Row]:
    """Rows of all trials: by score, complete, pruned, then shelved ones, then those without one by number."""
    records = study.trials()
    rows = store.trials(study.name)
    best = best_trial(records)
    ordered = sorted(records, key=_order)
    return [
        _row(r, rows.get(r.number), is_best=best is not None and r.number == best.number) for r in ordered
    ]


def _order(trial: TrialRecord) -> tuple[int, float, float, int]:
    place = {"complete": 0, "pruned": 1, "shelved": 2, "running": 3, "waiting": 4}.get(trial.state, 5)
    score, loss = rank(trial)
    return (
        (place, -score, -loss, trial.number) if trial.score is not None else (place, 0.0, 0.0, trial.number)
    )


def _row(record: TrialRecord, stored: Mapping[str, Any] | None, *, is_best: bool) -> Row:
    spec = json.loads(stored["spec"]) if stored else {}
    result = (stored or {}).get("result") or {}
    params = dict(spec.get("params") or record.params)
    chosen = {
        name: str(spec.get(name) or record.params.get(name, "")) for name in ("backbone", "strategy", "head")
    }
    kind, error = record.attrs.get("error_kind"), record.attrs.get("error")
    return Row(
        number=record.number,
        **chosen,
        state=record.state,
        score=record.score,
        seconds=result.get("seconds", record.attrs.get("seconds")),
        params={name: value for name, value in params.items() if name not in chosen},
        purpose=str(record.attrs.get("purpose", spec.get("purpose", "search"))),
        from_study=record.attrs.get("from_study"),
        epochs=result.get("epochs"),
        seed=spec.get("seed"),
        slot=stored["slot"] if stored else None,
        trainable_params=result.get("trainable"),
        features=result.get("features"),
        metrics=result.get("metrics", {}),
        error=f"{kind}: {error}" if kind else None,
        detail=(stored or {}).get("detail") or None,
        retried=bool(record.attrs.get("retried")),
        retry_of=record.attrs.get("retry_of"),
        micro_batch=spec.get("micro_batch"),
        is_best=is_best,
    )
