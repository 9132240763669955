"""What to run next: probes, the default recipe, then the sampler; all derived from what is recorded."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tlauto import joined
from tlauto.again import LARGER, MIRRORED, Screening, joined_points
from tlauto.allocation import cost_of, pick_next
from tlauto.config import SearchConfig
from tlauto.contracts import TrialSpec, trains_backbone
from tlauto.joined import is_joined, partners
from tlauto.larger import proposable_scales
from tlauto.pace import (
    FEWEST_EPOCHS,
    FEWEST_IMAGES,
    FIRST_PROBES,
    PROBE_STRATEGY,
    Begun,
    Sizes,
    affordable_epochs,
    next_to_screen,
)
from tlauto.ranking import rank, to_beat
from tlauto.recipe import BESIDE, PROBE_EPOCHS, SCALE, scale_of
from tlauto.searchspace import SearchSpace
from tlauto.space import Scalar
from tlauto.study import TrialRecord
from tlauto.warm import Past, screening_order, warm_points

KEEP_TOP = 3
"""Backbones that stay after screening: the best probes, the default and a wild card beside them."""

PROBE_PATIENCE = 15
PROBE_EPOCH_IMAGES = 8192
"""Most images of an epoch of a head on cached features that is trained in steps: of many images it does not
have to see all before it is looked at, and a trial's time does not grow with them."""
PROBE_HEAD = "linear"

INIT_FILES = ("start.safetensors", "checkpoint.safetensors")
"""Where a trial left a head that fine-tuning can start from: one on pooled features, where there are two."""


@dataclass(frozen=True)
class Plan:
    """What is fixed before trial 0.

    Attributes:
        device: kind of device the epochs are sized for, `cpu` or a GPU.
        folder: of the study.
        sizes: images in each part.
        past: what is known of earlier searches, None when nothing is to be learned from them.
        begun: where this version of the study began.
        slots: trials that run at once.
    """

    config: SearchConfig
    space: SearchSpace
    task: str
    metric: str
    dataset_file: str
    folder: Path
    cache: Path
    device: str
    sizes: Sizes
    past: Past | None = None
    begun: Begun = field(default_factory=Begun)
    slots: int = 1

    @property
    def screened(self) -> tuple[str, ...]:
        """Backbones in the order in which they are screened, as far as the budget goes."""
        backbones = self.space.backbones
        return screening_order(backbones, self.past) if self.past else backbones

    def first_points(self, max_trials: int | None) -> list[tuple[dict[str, Scalar], str]]:
        """Points to run before the sampler: a probe a backbone, then the default recipe.

        A small budget gets fewer probes: at most half of it, and none when it is one trial. With a
        limit of time the first few come here, the others as `next_probe` allows.
        """
        probes = list(self.screened) if self._can_probe() else []
        if max_trials is not None:
            probes = probes[: max_trials // 2]
        if self.config.time_s is not None:
            probes = probes[:FIRST_PROBES]
        points = [(self._probe(backbone), "probe") for backbone in probes]
        default = self.default_recipe()
        if default not in [point for point, _ in points]:
            points.append((default, "default"))
        return points

    def next_probe(self, trials: Sequence[TrialRecord], *, spent: float) -> dict[str, Scalar] | None:
        """A further backbone to screen, when a limit of time was set and there is time for it, or when
        this version of the study has backbones that are not screened.

        Args:
            spent: active seconds so far.
        """
        if not self._can_probe() or any(t.state == "waiting" for t in trials):
            return None
        limit, most = self.config.time_s, self.config.max_trials
        backbone = next_to_screen(self.screened, trials, self.begun, spent=spent, limit=limit, most=most)
        return None if backbone is None else self._probe(backbone)

    def next_warm(
        self, trials: Sequence[TrialRecord], left: float | None
    ) -> list[tuple[dict[str, Scalar], str]]:
        """Points that won on similar datasets, each with its study: once, when every probe has ended.

        Args:
            left: as for `spec`.
        """
        is_early = any(t.state == "waiting" or (t.state == "running" and _is_probe(t)) for t in trials)
        since = trials[self.begun.trials :]
        if not self.past or is_early or any(t.attrs.get("purpose") == "warm" for t in since):
            return []
        return warm_points(
            self.space,
            self.past,
            probe_scores(trials),
            kept=self.kept(trials),
            strategies=self.affordable(trials, left),
            tried=[t.params for t in trials],
            trials=self.config.max_trials,
        )

    def next_again(
        self, trials: Sequence[TrialRecord], left: float | None
    ) -> tuple[list[dict[str, Scalar]], str]:
        """The best probes once more, and to what purpose, each once, when every probe has ended: with mirror
        images, then on several backbones at once, then on larger images.

        Args:
            left: as for `spec`.
        """
        screening = self._screening(trials, left)
        if found := screening.points(MIRRORED):
            return found, MIRRORED.purpose
        if found := joined_points(screening):
            return found, joined.PURPOSE
        return screening.points(LARGER, among=self.space.larger), LARGER.purpose

    def _screening(self, trials: Sequence[TrialRecord], left: float | None) -> Screening:
        most, since = self.config.max_trials, self.begun.trials
        return Screening(self.space, trials, ranked_probes(trials), self.sizes, left, most, since)

    def default_recipe(self) -> dict[str, Scalar]:
        """What one would do without a search: fine-tune the best-known backbone, on a CPU its last stages."""
        names = [strategy.name for strategy in self.space.strategies]
        # On a CPU nobody trains all of a network to see whether it is worth it.
        wanted = ("partial", "full") if self.device == "cpu" else ("full", "partial")
        strategy = next((n for n in wanted if n in names), names[0])
        heads = [head.name for head in self.space.heads]
        head = PROBE_HEAD if PROBE_HEAD in heads else heads[0]
        return self.space.defaults(backbone=self.space.backbones[0], strategy=strategy, head=head)

    def kept(self, trials: Sequence[TrialRecord]) -> tuple[str, ...]:
        """Backbones that the sampler may propose; all of them until a probe is complete."""
        return kept_backbones(self.space.backbones, trials, seed=self.config.seed)

    def affordable(self, trials: Sequence[TrialRecord], left: float | None) -> tuple[str, ...]:
        """Freezing strategies that there is time for: frozen ones only when it is short."""
        names = tuple(strategy.name for strategy in self.space.strategies)
        frozen = tuple(s.name for s in self.space.strategies if not trains_backbone(s))
        if left is None or not frozen:
            return names
        kept = self.kept(trials)
        return names if any(self._epochs(backbone, trials, left) for backbone in kept) else frozen

    def proposable(self, trials: Sequence[TrialRecord], left: float | None) -> dict[str, tuple[Scalar, ...]]:
        """What the sampler may propose next: the kept backbones, the strategy that promises most, and
        larger images where they pay.

        Args:
            left: as for `spec`.
        """
        kept = self.kept(trials)
        affordable = self.affordable(trials, left)
        costs = {s.name: cost_of(s, self.device) for s in self.space.strategies if s.name in affordable}
        seed, most = f"{self.config.seed}/strategy", self.config.max_trials
        picked = pick_next(trials, costs, kept, seed=seed, most=most, slots=self.slots)
        scales = proposable_scales(self._screening(trials, left), kept=kept)
        return {"backbone": kept, "strategy": (picked,), SCALE: scales}

    def spec(
        self, record: TrialRecord, trials: Sequence[TrialRecord], *, left: float | None = None
    ) -> TrialSpec:
        """The specification of a proposed trial.

        Args:
            left: seconds that trials may still take; None without a limit.
        """
        params = dict(record.params)
        backbone, strategy, head = (str(params.pop(name)) for name in ("backbone", "strategy", "head"))
        trains = trains_backbone(next(s for s in self.space.strategies if s.name == strategy))
        # A fixed scale is that of all trials, of those too by which seconds are reckoned.
        scale = 1.0 if SCALE in self.space.fixed else scale_of(params)
        epochs, images = self._epochs(backbone, trials, left, scale) or (FEWEST_EPOCHS, FEWEST_IMAGES)
        ranked = [
            t for t in ranked_probes(trials) if scale == 1.0 or t.params["backbone"] in self.space.larger
        ]
        if beside := partners(record, ranked):
            params[BESIDE] = " ".join(beside)
        return TrialSpec(
            number=record.number,
            dataset=self.dataset_file,
            task=self.task,
            metric=self.metric,
            backbone=backbone,
            strategy=strategy,
            head=head,
            params=params,
            weights=self.config.weights_options,
            seed=trial_seed(self.config.seed, record.number),
            epochs=epochs if trains else PROBE_EPOCHS,
            patience=max(2, epochs // 3) if trains else PROBE_PATIENCE,
            epoch_images=images if trains else self._probe_images(),
            init_head=self._init_head(backbone, head, scale, trials) if trains else None,
            folder=str(self.trial_folder(record.number)),
            cache=str(self.cache),
            purpose=record.attrs.get("purpose", "search"),
            prove_above=None if trains else to_beat(backbone, trials),
        )

    def _probe_images(self) -> int | None:
        """Images of an epoch of a frozen trial; None for all."""
        return PROBE_EPOCH_IMAGES if self.sizes.train > PROBE_EPOCH_IMAGES else None

    def _epochs(
        self, backbone: str, trials: Sequence[TrialRecord], left: float | None, scale: float = 1.0
    ) -> tuple[int, int | None] | None:
        """Epochs and images an epoch (None for all) of a fine-tuning; None when there is no time."""
        preset = self.config.recipe
        images = preset.cpu_epoch_images if self.device == "cpu" else None
        if left is None:
            return preset.finetune_epochs, images
        most = min(images or self.sizes.train, self.sizes.train)
        found = affordable_epochs(
            backbone, trials, self.sizes, left=left, epochs=preset.finetune_epochs, images=most, scale=scale
        )
        return found if found is None or found[1] < most else (found[0], images)

    def _probe(self, backbone: str) -> dict[str, Scalar]:
        return self.space.defaults(backbone=backbone, strategy=PROBE_STRATEGY, head=PROBE_HEAD)

    def trial_folder(self, number: int) -> Path:
        """Where a trial keeps its checkpoint and predictions."""
        return self.folder / "trials" / str(number)

    def _can_probe(self) -> bool:
        strategies = [strategy.name for strategy in self.space.strategies]
        return PROBE_STRATEGY in strategies and PROBE_HEAD in [head.name for head in self.space.heads]

    def _init_head(self, backbone: str, head: str, scale: float, trials: Sequence[TrialRecord]) -> str | None:
        """The checkpoint of the best frozen trial on a backbone, one on images as large and the same head
        first (LP-FT).

        Source: Kumar et al. 2022 (arXiv:2202.10054): a fine-tuning that starts from a trained head
        distorts the pretrained features less.
        """
        frozen = {s.name for s in self.space.strategies if not trains_backbone(s)}
        on_it = [t for t in trials if t.state == "complete" and t.params["backbone"] == backbone]
        probes = [t for t in on_it if t.params["strategy"] in frozen and not is_joined(t)]
        probes.sort(
            key=lambda t: (scale_of(t.params) == scale, t.params["head"] == head, *rank(t)), reverse=True
        )
        files = [self.trial_folder(t.number) / name for t in probes for name in INIT_FILES]
        return next((str(file) for file in files if file.is_file()), None)


def kept_backbones(backbones: Sequence[str], trials: Sequence[TrialRecord], *, seed: int) -> tuple[str, ...]:
    """The backbones with the best probes, the default and a wild card; all until a probe is complete.

    Args:
        backbones: of the search, the default first.
    """
    ranked = [str(t.params["backbone"]) for t in ranked_probes(trials)]
    if not ranked:
        return tuple(backbones)
    failed = {str(t.params["backbone"]) for t in trials if _failed_probe(t)}
    kept = [*ranked[:KEEP_TOP], *({backbones[0]} - failed)]
    rest = [b for b in backbones if b not in kept and b not in failed]
    if rest:
        kept.append(random.Random(f"{seed}/wild card").choice(rest))
    return tuple(dict.fromkeys(kept))


def ranked_probes(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The complete probes, the best first."""
    return sorted((t for t in trials if _is_probe(t) and t.state == "complete"), key=rank, reverse=True)


def probe_scores(trials: Sequence[TrialRecord]) -> dict[str, float]:
    """The score of each backbone's complete probe."""
    return {str(t.params["backbone"]): t.score for t in ranked_probes(trials) if t.score is not None}


def trial_seed(seed: int, number: int) -> int:
    """The seed of a trial: a function of the study's seed and the trial's number."""
    return random.Random(f"{seed}/trial/{number}").randrange(2**31)


def counts(trials: Sequence[TrialRecord]) -> Mapping[str, int]:
    """Trials that count, by state, and their `total`."""
    counted = [t for t in trials if t.counts]
    by_state = {state: sum(t.state == state for t in counted) for state in ("complete", "pruned", "failed")}
    return {**by_state, "total": len(counted)}


def _is_probe(trial: TrialRecord) -> bool:
    return trial.attrs.get("purpose") == "probe"


def _failed_probe(trial: TrialRecord) -> bool:
    """Not one that was cut off: it runs again."""
    return _is_probe(trial) and trial.state == "failed" and trial.counts
