"""`tlauto rerun`: run one trial again from its stored specification."""

from __future__ import annotations

import dataclasses
import json
from contextlib import closing
from pathlib import Path

import click

from tlauto.cli.workspace import workspace_options
from tlauto.contracts import TrialSpec


@click.command()
@click.argument("study")
@click.argument("number", type=int)
@workspace_options
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--spec", "spec_only", is_flag=True, help="Print the specification and run nothing.")
@click.option("--devices", default="auto", show_default=True, help="Where to run it.")
def command(
    study: str, number: int, out: str, storage: str | None, as_json: bool, spec_only: bool, devices: str
) -> None:
    """Run trial NUMBER of STUDY again and compare its score with the recorded one.

    The same seed, data and device give the same score. The study is not changed.
    Example: tlauto rerun images 7
    """
    from tlauto.api import open_search
    from tlauto.contracts import spec_from_json, to_json
    from tlauto.errors import StoreError
    from tlauto.store import Store, storage_url

    search = open_search(out, study, storage)
    with closing(Store(storage_url(search.out, storage), create=False)) as store:
        row = store.trials(study).get(number)
        dataset = store.dataset(study)["content"]
    if row is None:
        raise StoreError(f"study '{study}' has no trial {number} ('tlauto leaderboard {study}' lists them)")
    folder = search.out / study / "rerun" / str(number)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(dataset, encoding="utf-8")
    spec = dataclasses.replace(
        spec_from_json(row["spec"]),
        dataset=str(folder / "dataset.json"),
        folder=str(folder),
        purpose="rerun",
        resume_from=None,
    )
    if spec_only:
        click.echo(to_json(spec))
        return
    recorded = row["result"]["score"] if row["result"] else None
    pruned_at = row["result"]["epochs"] if row["result"] and row["result"]["is_pruned"] else None
    score = _run(spec, devices, folder, pruned_at)
    if as_json:
        click.echo(
            json.dumps({"number": number, "score": score, "recorded": recorded, "folder": str(folder)})
        )
    else:
        was = "no score" if recorded is None else f"{recorded:.6f}"
        click.echo(f"trial {number}  score {score:.6f}, recorded {was}  ({folder})")


def _run(spec: TrialSpec, devices: str, folder: Path, pruned_at: int | None) -> float:
    """The score of the trial, run in a worker set up as the search's are, pruned where it was."""
    from tlauto.contracts import EpochResult, TrialDone, TrialFailed
    from tlauto.devices import make_slots
    from tlauto.errors import TrialError, WorkerDied
    from tlauto.pool.local import LocalPool
    from tlauto.pool.protocol import Answer, RunTrial

    offline = {"HF_HUB_OFFLINE": "1"} if spec.weights.offline else {}
    slot = make_slots(devices, None)[0]
    pool = LocalPool([slot], logs=folder, env=offline)
    try:
        pool.send(slot.name, RunTrial(spec))
        while True:
            for event in pool.wait(1.0):
                match event.message:
                    case TrialDone() as done:
                        return done.score
                    case TrialFailed(_, kind, message):
                        raise TrialError(f"the trial failed again: {kind}: {message}")
                    case EpochResult() as result:
                        pool.send(slot.name, Answer(go_on=result.epoch != pruned_at))
                    case None:
                        raise WorkerDied(event.ending, exitcode=event.exitcode)
    finally:
        pool.close()
