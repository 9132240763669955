"""What others would do with the same trials: Optuna as its documentation shows it, over a recorded table."""

from __future__ import annotations

from collections.abc import Callable

import optuna
from curves import Recorded
from replay import Account, Ended, Recordings, Simulated

from tlauto.space import Choice, Float, Int, Parameter, Scalar

Samplers = Callable[[int], optuna.samplers.BaseSampler]
Pruners = Callable[[int], optuna.pruners.BasePruner]

OPPONENTS: dict[str, tuple[Samplers, Pruners]] = {
    "tpe+hyperband": (
        lambda seed: optuna.samplers.TPESampler(seed=seed),
        lambda epochs: optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs),
    ),
    "tpe": (lambda seed: optuna.samplers.TPESampler(seed=seed), lambda _: optuna.pruners.NopPruner()),
    "random": (lambda seed: optuna.samplers.RandomSampler(seed=seed), lambda _: optuna.pruners.NopPruner()),
}
"""Samplers by seed and pruners by the most epochs. Everything that is not said is Optuna's default."""


def search(name: str, recordings: Recordings, *, seed: int, budget: float) -> Simulated:
    """A search by one of `OPPONENTS` until its budget of seconds is used up.

    It ships the completed trial with the best validation score; before one is completed, the best of
    the pruned ones.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler, pruner = OPPONENTS[name]
    study = optuna.create_study(
        study_name=f"{name}-{seed}",  # Hyperband draws its brackets by it
        direction="maximize",
        sampler=sampler(seed),
        pruner=pruner(recordings.table.header["epochs"]),
    )
    loop = _Loop(Simulated([], Account(recordings, budget)))
    while True:
        trial = study.ask()
        try:
            study.tell(trial, loop.objective(trial))
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        except _Failed:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        except Ended:
            return loop.simulated


class _Failed(Exception):
    """The recorded trial failed."""


class _Loop:
    """An objective that looks up what it would measure, and what it has to offer so far."""

    def __init__(self, simulated: Simulated) -> None:
        self.simulated = simulated
        self.best = (False, float("-inf"))

    def objective(self, trial: optuna.Trial) -> float:
        """Validation score of a trial's best epoch; every epoch is reported, and may be the last."""
        account = self.simulated.account
        row = account.take(account.recordings.space.walk(lambda name, p: suggest(trial, name, p)))
        before = account.seconds
        if row.failed is not None:
            account.seconds += row.seconds
            account.trials.append((row.number, 0, 0, row.seconds))
            raise _Failed(row.failed[1])
        best, is_pruned, epoch = float("-inf"), False, 0
        for score, _, seconds in row.epochs:
            epoch += 1
            account.seconds += seconds
            best = max(best, score)
            trial.report(score, epoch)
            is_pruned = trial.should_prune()
            if is_pruned:
                break
        is_complete = epoch == len(row.epochs)
        if is_complete:
            account.seconds += max(0.0, row.seconds - sum(seconds for _, _, seconds in row.epochs))
        account.trials.append((row.number, 1, epoch, account.seconds - before))
        self._offer(row, is_complete, best)
        if is_pruned:
            raise optuna.TrialPruned
        return best

    def _offer(self, row: Recorded, is_complete: bool, score: float) -> None:
        """Ship a trial if it is better than what was there."""
        if (is_complete, score) > self.best:
            self.best = (is_complete, score)
            self.simulated.curve.append((self.simulated.account.seconds, row))


def suggest(trial: optuna.Trial, name: str, parameter: Parameter) -> Scalar:
    """A parameter's value as Optuna proposes it."""
    match parameter:
        case Float(low, high, _, log):
            return trial.suggest_float(name, low, high, log=log)
        case Int(low, high, _, log):
            return trial.suggest_int(name, low, high, log=log)
        case Choice(values):
            value: Scalar = trial.suggest_categorical(name, values)
            return value
