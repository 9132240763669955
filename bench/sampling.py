"""What tlauto's sampler finds on spaces whose best point is known, against Optuna's TPE and random search.

    python bench/sampling.py
    python bench/sampling.py --quick

A space is drawn by a seed: eight backbones, each with a learning rate of its own that is best, three heads of
which two have parameters, and noise on every score. Regret is the best score there is minus the true score
of the best trial so far. Optuna's TPE is `multivariate` with `group`, which is made for such spaces. The
samplers see the same spaces, and one of their own makes each proposal of tlauto's, as in a search. The last
line of standard output is one JSON object: for each sampler the mean regret after so many trials, the
processor's milliseconds a trial, and as `less_N` the mean of Optuna's regret minus tlauto's in the same
space, with its standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable

import optuna

from tlauto.sampler import Ended, make_sampler

BACKBONES = tuple("abcdefgh")
HEADS = ("linear", "mlp", "cosine")
AFTER = (30, 100, 300, 600)
QUICK_AFTER = (30, 100)

SamplerOf = Callable[[int, int, Ended], optuna.samplers.BaseSampler | None]
"""The sampler of a space's trial of that number; None goes on with the one before."""


class Space:
    """A space of a seed, with a known best point."""

    def __init__(self, seed: int) -> None:
        self._chance = chance = random.Random(seed)
        self._backbone = {name: chance.gauss(0, 0.1) for name in BACKBONES}
        self._rate = {name: chance.uniform(-4, -1) for name in BACKBONES}
        self._head = dict(zip(HEADS, (0.0, 0.15, 0.1), strict=True))
        self._decay, self._hidden = chance.uniform(-5, -2), chance.uniform(5, 9)
        self._dropout, self._scale = chance.uniform(0, 0.7), chance.uniform(0.3, 1.7)
        self.best = max(self._backbone.values()) + max(self._head.values())

    def score(self, trial: optuna.Trial) -> float:
        """The true score of a trial's parameters, which it draws."""
        backbone = trial.suggest_categorical("backbone", BACKBONES)
        head = trial.suggest_categorical("head", HEADS)
        rate = trial.suggest_float("rate", 1e-5, 1, log=True)
        decay = trial.suggest_float("decay", 1e-6, 0.1, log=True)
        score = self._backbone[backbone] + self._head[head]
        score -= 0.15 * abs(math.log10(rate) - self._rate[backbone])
        score -= 0.05 * abs(math.log10(decay) - self._decay)
        match head:
            case "mlp":
                hidden = trial.suggest_int("mlp.hidden", 16, 1024, log=True)
                dropout = trial.suggest_float("mlp.dropout", 0, 0.8)
                score -= 0.05 * abs(math.log2(hidden) - self._hidden) + 0.3 * abs(dropout - self._dropout)
            case "cosine":
                scale = trial.suggest_float("cosine.scale", 1, 100, log=True)
                score -= 0.2 * abs(math.log10(scale) - self._scale)
        return score

    def noisy(self, score: float) -> float:
        """A score as a search would see it."""
        return score + self._chance.gauss(0, 0.02)


def ours(seed: int, number: int, ended: Ended) -> optuna.samplers.BaseSampler:
    return make_sampler(seed * 100_003 + number, {}, ended, is_alone=True)


def theirs(seed: int, number: int, _: Ended) -> optuna.samplers.BaseSampler | None:
    if number:
        return None
    return optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=False, seed=seed)


def by_chance(seed: int, number: int, _: Ended) -> optuna.samplers.BaseSampler | None:
    return None if number else optuna.samplers.RandomSampler(seed=seed)


SAMPLERS: dict[str, SamplerOf] = {"tlauto": ours, "optuna": theirs, "random": by_chance}


def search(sampler_of: SamplerOf, seed: int, after: tuple[int, ...]) -> list[float]:
    """The regret of one search after so many trials."""
    space, ended, best, regrets = Space(seed), Ended(), -math.inf, []
    study = optuna.create_study(direction="maximize")
    for number in range(max(after)):
        study.sampler = sampler_of(seed, number, ended) or study.sampler
        trial = study.ask()
        score = space.score(trial)
        study.tell(trial, space.noisy(score))
        best = max(best, score)
        if number + 1 in after:
            regrets.append(space.best - best)
    return regrets


def main() -> None:
    args = parse()
    after, seeds = (QUICK_AFTER if args.quick else AFTER), range(args.seeds)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    figures: dict[str, float] = {}
    regrets: dict[str, list[list[float]]] = {}
    print(f"{'regret after':<14}" + "".join(f"{number:>9}" for number in after) + f"{'ms a trial':>12}")
    for name, sampler_of in SAMPLERS.items():
        started = time.process_time()
        regrets[name] = [search(sampler_of, seed, after) for seed in seeds]
        cost = 1000 * (time.process_time() - started) / (len(seeds) * max(after))
        means = [statistics.mean(column) for column in zip(*regrets[name], strict=True)]
        print(f"{name:<14}" + "".join(f"{mean:>9.4f}" for mean in means) + f"{cost:>12.1f}", flush=True)
        figures |= {f"{name}_{number}": round(mean, 4) for number, mean in zip(after, means, strict=True)}
        figures[f"{name}_ms"] = round(cost, 2)
    for i, number in enumerate(after):
        less = [other[i] - own[i] for own, other in zip(regrets["tlauto"], regrets["optuna"], strict=True)]
        figures[f"less_{number}"] = round(statistics.mean(less), 4)
        figures[f"less_{number}_error"] = round(statistics.stdev(less) / len(less) ** 0.5, 4)
    print(json.dumps(figures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="up to a hundred trials, in a few minutes")
    parser.add_argument("--seeds", type=int, default=30, help="spaces")
    return parser.parse_args()


if __name__ == "__main__":
    main()
