"""The Python API: `tlauto.search(...)` and `tlauto.load(...)`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlauto.config import SearchConfig, parse_seconds, resolve
from tlauto.errors import StoreError, did_you_mean
from tlauto.events import Emit, ignore

if TYPE_CHECKING:
    from tlauto.results.bundle import Bundle
    from tlauto.results.leaderboard import Row
    from tlauto.results.screening import Screening


@dataclass(frozen=True)
class Search:
    """A search in a workspace, running, interrupted or finished. Reads the database when asked.

    Attributes:
        name: of the study.
        out: the workspace folder.
        storage: database URL when it is not in the workspace.
        interrupted: whether this run was stopped before its totals were reached.
    """

    name: str
    out: Path
    storage: str | None = None
    interrupted: bool = False

    @property
    def best(self) -> Row:
        """The best trial. Raises: StoreError when none has a score yet."""
        for row in self.leaderboard():
            if row.is_best:
                return row
        raise StoreError(f"no trial of study '{self.name}' has a score yet")

    def leaderboard(self) -> list[Row]:
        """All trials, best first."""
        from tlauto.results.leaderboard import leaderboard

        with self._store() as store, closing(self._study(store)) as study:
            return leaderboard(store, study)

    @property
    def screening(self) -> Screening:
        """How the backbones were ranked so far, and which earlier studies the search learned from."""
        from tlauto.results.screening import screening

        with self._store() as store:
            row = store.search(self.name)
            with closing(self._study(store)) as study:
                trials = study.trials()
        return screening(row["plan"], trials, seed=json.loads(row["config"])["seed"])

    @property
    def model(self) -> Path:
        """Folder of the model bundle: the winner, or the best so far when interrupted."""
        return self.out / self.name / "model"

    @property
    def test(self) -> dict[str, Any] | None:
        """Test metrics of the model, name to {"value", "low", "high"}; None before the final test."""
        found = self._record()
        return found["metrics"] if found else None

    @property
    def comparison(self) -> dict[str, Any] | None:
        """Winner against default recipe on the test part, or None."""
        found = self._record()
        return found["comparison"] if found else None

    @property
    def members(self) -> dict[str, float]:
        """What answers together: folder of a bundle, `.` for the model itself, to weight."""
        from tlauto.results.manifest import MANIFEST_FILE, read_manifest

        file = self.model / MANIFEST_FILE
        found = read_manifest(file).ensemble if file.is_file() else None
        return {".": found.weight, **found.members} if found else {".": 1.0}

    def info(self) -> dict[str, Any]:
        """Config, plan, dataset report, state and active seconds, as recorded."""
        with self._store() as store:
            row = store.search(self.name) or {}
            dataset = store.dataset(self.name)
        data = {"report": json.loads(dataset["report"]), "fingerprint": dataset["fingerprint"]}
        return {**row, "config": json.loads(row["config"]), "dataset": data}

    def _record(self) -> dict[str, Any] | None:
        with self._store() as store:
            found: dict[str, Any] | None = store.model(self.name)
            return found

    def _study(self, store: Any) -> Any:
        """The newest version of the study; the older ones' trials are in it too."""
        from tlauto.study import Study

        row = store.search(self.name) or {}
        return Study(store.url, self.name, seed=0, create=False, version=row.get("version", 1))

    def _store(self) -> AbstractContextManager[Any]:
        from tlauto.store import Store, storage_url

        return closing(Store(storage_url(self.out, self.storage), create=False))


def search(
    data: str | Path,
    *,
    trials: int | None = None,
    time: float | str | None = None,
    backbones: str | Sequence[str] | None = None,
    strategies: str | Sequence[str] | None = None,
    heads: str | Sequence[str] | None = None,
    track: str | Sequence[str] | None = None,
    params: Mapping[str, Any] | None = None,
    emit: Emit = ignore,
    **settings: Any,
) -> Search:
    """Search for the best model and return it with its leaderboard.

    Args:
        data: folder of class folders, of `train/ [val/] test/`, or a CSV or JSONL manifest.
        trials: total number of trials.
        time: total time, seconds or text such as `"30m"`.
        backbones: ids or globs, such as `["timm:resnet18", "keras:MobileNet*"]`.
        strategies, heads: names; those of the preset by default. A text holds one, or several with
            commas between them, as on the command line.
        track: trackers, as `--track` names them, such as `["tensorboard", "mlflow=http://host:5000"]`.
        params: fixed parameters by dotted name, such as `{"optim.name": "sgd"}`.
        emit: called with the values of `tlauto.events` as the search goes on.
        settings: any other field of `tlauto.config.SearchConfig`: out, study, task, metric, preset,
            devices, workers, per_device, seed, weights, weights_dir, offline, pretrained, new, storage, ….

    Raises: TlautoError of the fitting kind; each message says what to do.
    """
    from tlauto.coordinator import run

    flags: dict[str, Any] = {
        **settings,
        "data": str(data),
        "trials": trials,
        "time_s": parse_seconds(str(time)) if time is not None else None,
        "backbones": _names(backbones),
        "strategies": _names(strategies),
        "heads": _names(heads),
        "track": (track,) if isinstance(track, str) else None if track is None else tuple(track),
        "params": None if params is None else dict(params),
    }
    known = SearchConfig.__dataclass_fields__
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise TypeError(f"search() has no setting '{unknown[0]}'{did_you_mean(unknown[0], known)}")
    config = resolve(flags)
    session, interrupted = run(config, emit=emit)
    return Search(session.name, Path(config.out), config.storage, interrupted)


def open_search(
    out: str | Path = "./tlauto-runs", study: str | None = None, storage: str | None = None
) -> Search:
    """The search of a study in a workspace, the newest by default, without running anything.

    Raises: StoreError when there is no workspace or no such study.
    """
    from tlauto.connections import shown_url
    from tlauto.store import Store, storage_url, workspace_exists

    folder = Path(out).resolve()
    place = shown_url(storage) if storage else str(folder)
    if not workspace_exists(folder, storage):
        raise StoreError(
            f"there is no workspace at {place}; run 'tlauto search --data PATH' or name one with --out"
        )
    with closing(Store(storage_url(folder, storage), create=False)) as store:
        names = store.studies()
    if not names:
        raise StoreError(f"the workspace {place} holds no study yet; run 'tlauto search --data PATH'")
    if study is not None and study not in names:
        hint = did_you_mean(study, names)
        raise StoreError(f"no study '{study}' in {place}{hint} (it has {', '.join(names)})")
    return Search(study or names[0], folder, storage)


def load(folder: str | Path, *, device: str = "cpu") -> Bundle:
    """The model of a bundle folder, ready for `.predict(paths)` and `.evaluate(data)`.

    Uses neither pickle nor the network. Raises: TlautoError when the folder is no bundle of ours.
    """
    from tlauto.results.bundle import load_bundle

    return load_bundle(Path(folder), device=device)


def _names(given: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    return tuple(name.strip() for name in given.split(",")) if isinstance(given, str) else tuple(given)
