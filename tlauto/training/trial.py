"""What the two ways of training share: the trial at hand, its evaluation, its best epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from tlauto import metrics
from tlauto.contracts import FreezeStrategy, Task, TaskHead, TrialSpec
from tlauto.data import Dataset
from tlauto.errors import Diverged, TrialError
from tlauto.losses import Loss
from tlauto.plugins import Registry
from tlauto.training.checkpoint import start_from
from tlauto.training.features import FeatureSource, sample_indices
from tlauto.training.kept import kept
from tlauto.training.model import GRID, LEVELS, Kind, Readout, build_readout
from tlauto.training.params import Settings, read
from tlauto.training.rows import Rows
from tlauto.training.stored import Features, SideBySide
from tlauto.training.tasks import find_task


@dataclass(frozen=True)
class Trial:
    """One trial, read and checked.

    Attributes:
        train_targets, valid_targets: of `spec.fit_on` and `spec.evaluate_on`, as the task encodes
            them.
        loss: the task's, of (logits, targets).
        beside: further backbones whose features the head reads beside those of `source`.
    """

    spec: TrialSpec
    task: Task
    strategy: FreezeStrategy
    head: TaskHead
    settings: Settings
    source: FeatureSource
    num_outputs: int
    train_targets: np.ndarray
    valid_targets: np.ndarray
    loss: Loss
    beside: tuple[FeatureSource, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.source.device

    @property
    def kind(self) -> Kind:
        """What of the backbone the head reads, as the parameters say and the backbone can offer."""
        own = self.head.features(self.settings.head)
        wanted = {"levels": LEVELS, "grid": GRID}.get(self.settings.features)
        return wanted if wanted and own == "pooled" and self.has_levels else own

    @property
    def has_levels(self) -> bool:
        """Whether every backbone that the head reads offers the features of all its stages."""
        return all(source.facts.widths.levels for source in (self.source, *self.beside))

    def compute(self) -> None:
        """See that what the head reads is in the cache, and let go of all that computed it."""
        for source in (self.source, *self.beside):
            source.compute([*self.spec.fit_on, self.spec.evaluate_on], self.kind)

    def features(self, splits: Sequence[str], kind: Kind) -> Features:
        """What the head reads of the images of these splits, split after split."""
        own = self.source.features(splits, kind)
        others = tuple(source.features(splits, kind) for source in self.beside)
        return SideBySide((own, *others)) if others else own

    def readout(self, kind: Kind) -> Readout:
        """A new readout with the trial's head on these features."""
        widths, *others = [source.facts.widths for source in (self.source, *self.beside)]
        return build_readout(widths, self.head, self.settings.head, self.num_outputs, kind, beside=others)

    def initialise(self, readout: Readout, train: Features) -> None:
        """Measure the scaling of features and targets, or take it over from another trial."""
        if self.task.name == "regression":
            readout.output.measure(torch.from_numpy(self.train_targets))
        init = self.spec.init_head
        if init is not None and start_from(readout, Path(init), self.spec):
            return

        def measured() -> Mapping[str, torch.Tensor]:
            readout.norm.measure(train.take(torch.tensor(sample_indices(len(train)))))
            return {name: tensor.clone() for name, tensor in readout.norm.state_dict().items()}

        key = train.key and ("norm", train.key)
        readout.norm.load_state_dict(kept(key, measured, lambda state: sum(t.nbytes for t in state.values())))

    def rows(self, readout: Readout, features: Features, *, of: Features) -> Rows:
        """Features scaled for a readout on the trial's device.

        Args:
            of: those that the readout was initialised with.
        """
        is_measured = self.spec.init_head is None and of.key and features.key
        key = ("rows", of.key, features.key) if is_measured else None
        return kept(key, lambda: Rows(features, readout.norm, self.device), lambda rows: rows.bytes)

    @property
    def selects(self) -> bool:
        """Whether epochs may be compared; never on the test part, which is looked at once."""
        return self.spec.evaluate_on != "test"

    def evaluate(self, logits: torch.Tensor, epoch: int) -> Evaluation:
        """Score, loss and predictions of logits (N, K) of `evaluate_on`, in order.

        Raises: Diverged when they are not finite.
        """
        logits = logits.float().cpu()
        loss = self.loss(logits, torch.from_numpy(self.valid_targets)).item()
        if not np.isfinite(loss) or not bool(torch.isfinite(logits).all()):
            raise Diverged(f"the validation loss became {loss} in epoch {epoch}", epoch=epoch)
        predictions = self.task.predict(logits.numpy())
        score = metrics.score(self.spec.metric, self.valid_targets, predictions)
        return Evaluation(float(score), loss, predictions)


@dataclass(frozen=True)
class Evaluation:
    """How one epoch's model does on `evaluate_on`: `score` higher is better."""

    score: float
    loss: float
    predictions: np.ndarray

    def is_better(self, other: Evaluation) -> bool:
        """By score; of equal scores, by lower loss."""
        return (self.score, -self.loss) > (other.score, -other.loss)


@dataclass
class Best:
    """The best epoch so far, and how long nothing has improved.

    Attributes:
        patience: epochs without improvement, in loss or in score, before `is_stale`; 0 is never.
        state: copies of the model's tensors at the best epoch.
    """

    patience: int
    epoch: int = 0
    evaluation: Evaluation | None = None
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    lowest_loss: float = float("inf")
    improved: int = 0
    seen: int = 0

    def add(self, epoch: int, evaluation: Evaluation, model: Readout) -> None:
        """Take note of an epoch (from 1), and of its model when it is the best."""
        self.seen = epoch
        if evaluation.loss < self.lowest_loss:
            self.lowest_loss, self.improved = evaluation.loss, epoch
        if self.evaluation is None or evaluation.is_better(self.evaluation):
            self.epoch, self.evaluation, self.improved = epoch, evaluation, epoch
            self.state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @property
    def is_stale(self) -> bool:
        """Whether to stop early."""
        return 0 < self.patience <= self.seen - self.improved

    @property
    def winner(self) -> Evaluation:
        """The best epoch's evaluation; raises TrialError before the first."""
        if self.evaluation is None:
            raise TrialError("the trial ended before its first epoch was evaluated")
        return self.evaluation


@dataclass(frozen=True)
class Fitted:
    """A trained model at its best epoch.

    Attributes:
        state: what a checkpoint needs of the model's tensors.
        kind: which features the head reads.
        epochs: that were trained.
        trainable: numbers that learned, head included.
        held_out: predictions (N, …) for the rows of `fit_on`, each by a head that has not seen it;
            None when there was no cross-validation.
        start: tensors of the best head on pooled features, for fine-tuning to start from, where `kind`
            is another.
        penalty: L2 penalty of a solved head that cross-validation chose.
    """

    best_epoch: int
    evaluation: Evaluation
    state: Mapping[str, torch.Tensor]
    kind: Kind
    epochs: int
    trainable: int
    is_pruned: bool = False
    held_out: np.ndarray | None = None
    start: Mapping[str, torch.Tensor] | None = None
    penalty: float | None = None


def prepare(spec: TrialSpec, registry: Registry, dataset: Dataset, device: torch.device) -> Trial:
    """The trial that a specification describes. Raises: TrialError when it is impossible."""
    _check(spec, dataset)
    task, head, strategy = find_task(spec.task), registry.head(spec.head), registry.strategy(spec.strategy)
    if task.name not in head.tasks:
        raise TrialError(f"the head '{head.name}' cannot do {task.name} (it does {', '.join(head.tasks)})")
    settings = read(spec, strategy, head, task)
    num_outputs = task.num_outputs(dataset.classes)
    source, *others = [
        FeatureSource(replace(spec, backbone=backbone), registry, dataset, device, mirror=settings.mirror)
        for backbone in (spec.backbone, *settings.beside)
    ]
    train_targets = _targets(task, dataset, spec.fit_on)
    return Trial(
        spec=spec,
        task=task,
        strategy=strategy,
        head=head,
        settings=settings,
        source=source,
        beside=tuple(others),
        num_outputs=num_outputs,
        train_targets=train_targets,
        valid_targets=_targets(task, dataset, (spec.evaluate_on,)),
        loss=task.loss(train_targets, num_outputs, settings.loss),
    )


def _targets(task: Task, dataset: Dataset, splits: Sequence[str]) -> np.ndarray:
    values = [item.target for split in splits for item in dataset.part(split)]
    return task.targets(values, dataset.classes)


def _check(spec: TrialSpec, dataset: Dataset) -> None:
    if spec.epochs < 1:
        raise TrialError(f"a trial needs at least one epoch, not {spec.epochs}")
    if spec.evaluate_on in spec.fit_on:
        raise TrialError(f"the part '{spec.evaluate_on}' cannot serve for training and for evaluation")
    for split in (*spec.fit_on, spec.evaluate_on):
        if not dataset.part(split):
            raise TrialError(f"the dataset's part '{split}' is empty")
