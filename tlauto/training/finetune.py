"""Train the head and what the freezing strategy lets learn of the backbone, on augmented images.

Stages that never learn run once, where the backbone can be split (`prefix`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tlauto import pulse
from tlauto.contracts import EpochResult, TrainPlan
from tlauto.errors import Diverged
from tlauto.training.augment import LEVELS, mixup
from tlauto.training.checkpoint import changed, digests, start_from
from tlauto.training.inputs import Images, Inputs, autocast, autocast_dtype
from tlauto.training.model import Classifier, assemble
from tlauto.training.optim import MAX_GRADIENT, backbone_groups, head_groups, make_optimizer, set_rates
from tlauto.training.prefix import prefixed
from tlauto.training.resume import Keeper, recall
from tlauto.training.trial import Best, Fitted, Trial

MIXES = ("multiclass", "multilabel")  # a mixture of two regression images has no known value


def fine_tune(trial: Trial, on_epoch: Callable[[EpochResult], bool]) -> Fitted:
    """Train epoch by epoch until done, stale or stopped by `on_epoch`; return the best epoch."""
    spec = trial.spec
    pretrained, classifier = _initialised(trial)
    plans = plans_of(trial)
    inputs = prefixed(trial, classifier.kind, plans) or Images(trial)
    run, best, is_pruned = Run(trial, classifier, inputs, plans), Best(spec.patience), False
    keeper = Keeper(spec, pretrained)
    for epoch in range(keeper.find(run, best) + 1, spec.epochs + 1):
        started = time.perf_counter()
        train_loss = run.epoch(epoch)
        if not trial.selects and epoch < spec.epochs:
            continue  # the test part is looked at once, at the end
        now = trial.evaluate(answers(classifier, inputs), epoch)
        best.add(epoch, now, classifier)
        seconds = time.perf_counter() - started
        goes_on = on_epoch(EpochResult(spec.number, epoch, now.score, train_loss, now.loss, seconds))
        is_pruned = not goes_on and epoch < spec.epochs
        if best.is_stale or epoch == spec.epochs:
            break
        keeper.after_epoch(run, best, is_stopped=is_pruned)
        if is_pruned:
            break
    if not is_pruned:
        keeper.forget()
    state = changed(best.state, pretrained)
    return Fitted(best.epoch, best.winner, state, classifier.kind, best.seen, run.trainable, is_pruned)


def _initialised(trial: Trial) -> tuple[dict[str, bytes], Classifier]:
    """Digests of the pretrained backbone, and the classifier that starts from it, on the device."""
    spec, source = trial.spec, trial.source
    classifier = assemble(source.backbone, trial.head, trial.settings.head, trial.num_outputs)
    pretrained = {f"backbone.{name}": digest for name, digest in digests(classifier.backbone).items()}
    if trial.task.name == "regression":
        classifier.output.measure(torch.from_numpy(trial.train_targets))
    if spec.init_head is None or not start_from(classifier, Path(spec.init_head), spec):
        classifier.norm.measure(source.sample(spec.fit_on, classifier.kind))
    return pretrained, classifier.to(trial.device)


def plans_of(trial: Trial) -> list[TrainPlan]:
    """What learns in each epoch, as the strategy says."""
    stages, params = trial.source.backbone.stages, trial.settings.freeze
    return [trial.strategy.plan(stages, epoch, params) for epoch in range(trial.spec.epochs)]


@dataclass
class Run:
    """The moving parts of one fine-tuning run.

    Attributes:
        plans: of each epoch.
        memories: what the optimizer of a run that goes on remembers, by parameter.
        trainable: numbers that have learned so far, head included.
    """

    trial: Trial
    classifier: Classifier
    inputs: Inputs
    plans: Sequence[TrainPlan]
    plan: TrainPlan | None = None
    optimizer: torch.optim.Optimizer | None = None
    memories: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    trainable: int = 0
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        device = self.trial.device
        is_scaled = device.type == "cuda" and autocast_dtype(device) is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=is_scaled)

    @property
    def batch_size(self) -> int:
        """Images a step."""
        return min(self.trial.settings.batch_size, len(self.trial.train_targets))

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        count = len(self.trial.train_targets)
        images = self.trial.spec.epoch_images or count
        return math.ceil(min(images, count) / self.batch_size)

    def epoch(self, epoch: int) -> float:
        """Train one epoch (from 1) and return its mean loss; raises Diverged when that is not finite."""
        # Dropout draws from torch's own generator; an epoch's draws are to depend on nothing before it.
        torch.manual_seed(int(np.random.SeedSequence((self.trial.spec.seed, epoch)).generate_state(1)[0]))
        optimizer = self._follow_plan(epoch - 1)
        self.inputs.prepare(epoch - 1)
        self.classifier.train()
        if not self.trial.settings.train_mode:
            self.classifier.source.set_training(False)
        seed, settings = self.trial.spec.seed, self.trial.settings
        total = torch.zeros((), device=self.trial.device)
        prepared = self.inputs.batches(epoch - 1, steps=self.steps, size=self.batch_size)
        for step, (indices, batch) in enumerate(prepared):
            done = (epoch - 1) * self.steps + step
            set_rates(optimizer, done, self.trial.spec.epochs * self.steps, settings.warmup)
            total += self._step(optimizer, indices, batch, np.random.default_rng((seed, epoch, step)))
        mean = total.item() / self.steps
        if not math.isfinite(mean):
            raise Diverged(f"the training loss became {mean} in epoch {epoch}", epoch=epoch)
        return mean

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        indices: list[int],
        batch: torch.Tensor,
        random: np.random.Generator,
    ) -> torch.Tensor:
        """One step; the loss stays on the device, so that a GPU need not be waited for."""
        trial = self.trial
        targets = torch.from_numpy(trial.train_targets[indices]).to(trial.device)
        alpha = LEVELS[trial.settings.augment].mixup
        if alpha and trial.task.name in MIXES:
            soft = soft_targets(targets, trial.num_outputs)
            # Of activations: manifold mixup at a fixed layer (Verma et al. 2019, arXiv:1806.05236).
            batch, targets = mixup(batch, soft, alpha, random)
        optimizer.zero_grad()
        loss = self._gradients(batch, targets)
        self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(_learning(optimizer), MAX_GRADIENT)
        self.scaler.step(optimizer)
        self.scaler.update()
        return loss

    def _gradients(self, batch: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Add up the gradients of the batch's mean loss, part after part, and return that loss.

        A task's loss is a mean over images, so that of the batch is the parts' by their shares of it.
        """
        device, count = self.trial.device, len(batch)
        total = torch.zeros((), device=device)
        for part in parts_of(count, self.trial.spec.micro_batch):
            with autocast(device):
                logits = self.classifier.read(self.inputs.features(batch[part], self.classifier.kind))
            loss = self.trial.loss(logits.float(), targets[part]) * ((part.stop - part.start) / count)
            torch.autograd.backward(self.scaler.scale(loss))
            total += loss.detach()
            pulse.tick()
        return total

    def _follow_plan(self, epoch: int) -> torch.optim.Optimizer:
        """Let learn what the plan of this epoch (from 0) says; rebuild the groups if that changed."""
        trial, backbone, plan = self.trial, self.classifier.source, self.plans[epoch]
        if self.optimizer is None or plan != self.plan:
            backbone.set_trainable(plan.trainable)
            parameters = dict(backbone.module.named_parameters())
            groups = head_groups(self.classifier.head, trial.settings)
            groups += backbone_groups(parameters, backbone.stages, plan, trial.settings)
            self.optimizer = make_optimizer(groups, trial.settings, self.optimizer)
            recall(self.optimizer, dict(self.classifier.named_parameters()), self.memories)
            self.memories = {}
            self.plan = plan
            learning = sum(parameter.numel() for parameter in _learning(self.optimizer))
            self.trainable = max(self.trainable, learning)
        return self.optimizer


def parts_of(count: int, most: int | None) -> list[slice]:
    """A batch of `count` images in as few parts of at most `most` as it takes, of about the same size."""
    parts = math.ceil(count / most) if most else 1
    return [slice(i * count // parts, (i + 1) * count // parts) for i in range(parts)]


def soft_targets(targets: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """Targets (N, K) float32 of classes (N,), or the multi-hot targets (N, K) themselves."""
    if targets.ndim == 2:
        return targets
    return nn.functional.one_hot(targets, num_outputs).float()


@torch.inference_mode()
def answers(classifier: Classifier, inputs: Inputs) -> torch.Tensor:
    """Logits (N, K) of what there is to validate on, in order."""
    classifier.eval()
    outputs = []
    for batch in inputs.valid():
        outputs.append(classifier.read(inputs.features(batch, classifier.kind)))
        pulse.tick()
    return torch.cat(outputs)


def _learning(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
