"""Train the head and what the freezing strategy lets learn of the backbone, on augmented images."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tlauto.contracts import EpochResult, TrainPlan
from tlauto.errors import Diverged
from tlauto.training.augment import Augment, mixup
from tlauto.training.batches import Stream, augmented_batches, centre_batches, normalise
from tlauto.training.checkpoint import changed, digests, start_from
from tlauto.training.model import Classifier, assemble
from tlauto.training.optim import backbone_groups, head_groups, make_optimizer, set_rates
from tlauto.training.pixels import Pixels
from tlauto.training.trial import Best, Fitted, Trial

MAX_GRADIENT = 1.0  # norm to which gradients are clipped
MIXES = ("multiclass", "multilabel")  # a mixture of two regression images has no known value


def fine_tune(trial: Trial, on_epoch: Callable[[EpochResult], bool]) -> Fitted:
    """Train epoch by epoch until done, stale or stopped by `on_epoch`; return the best epoch."""
    spec = trial.spec
    pretrained, classifier = _initialised(trial)
    train, valid = trial.source.pixels(spec.fit_on), trial.source.pixels([spec.evaluate_on])
    run, best, is_pruned = Run(trial, classifier, train), Best(spec.patience), False
    for epoch in range(1, spec.epochs + 1):
        started = time.perf_counter()
        train_loss = run.epoch(epoch)
        if not trial.selects and epoch < spec.epochs:
            continue  # the test part is looked at once, at the end
        now = trial.evaluate(_logits(classifier, valid, trial.device), epoch)
        best.add(epoch, now, classifier)
        seconds = time.perf_counter() - started
        goes_on = on_epoch(EpochResult(spec.number, epoch, now.score, train_loss, now.loss, seconds))
        is_pruned = not goes_on and epoch < spec.epochs
        if is_pruned or best.is_stale:
            break
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


@dataclass
class Run:
    """The moving parts of one fine-tuning run.

    Attributes:
        trainable: numbers that have learned so far, head included.
    """

    trial: Trial
    classifier: Classifier
    pixels: Pixels
    plan: TrainPlan | None = None
    optimizer: torch.optim.Optimizer | None = None
    trainable: int = 0
    stream: Stream = field(init=False)
    augment: Augment = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        device = self.trial.device
        self.stream = Stream(len(self.pixels), self.trial.spec.seed)
        self.augment = Augment(self.trial.settings.augment, self.pixels.input)
        is_scaled = device.type == "cuda" and autocast_dtype(device) is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=is_scaled)

    @property
    def batch_size(self) -> int:
        """Images a step."""
        return min(self.trial.settings.batch_size, len(self.pixels))

    @property
    def steps(self) -> int:
        """Steps an epoch."""
        images = self.trial.spec.epoch_images or len(self.pixels)
        return math.ceil(min(images, len(self.pixels)) / self.batch_size)

    def epoch(self, epoch: int) -> float:
        """Train one epoch (from 1) and return its mean loss; raises Diverged when that is not finite."""
        optimizer = self._follow_plan(epoch - 1)
        self.classifier.train()
        if not self.trial.settings.train_mode:
            self.classifier.source.set_training(False)
        batches = [self.stream.take(self.batch_size) for _ in range(self.steps)]
        seed, settings = self.trial.spec.seed, self.trial.settings
        total = torch.zeros((), device=self.trial.device)
        prepared = augmented_batches(self.pixels, batches, self.augment, seed=(seed, epoch))
        for step, (indices, crops) in enumerate(prepared):
            done = (epoch - 1) * self.steps + step
            set_rates(optimizer, done, self.trial.spec.epochs * self.steps, settings.warmup)
            total += self._step(optimizer, indices, crops, np.random.default_rng((seed, epoch, step)))
        mean = total.item() / self.steps
        if not math.isfinite(mean):
            raise Diverged(f"the training loss became {mean} in epoch {epoch}", epoch=epoch)
        return mean

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        indices: list[int],
        crops: torch.Tensor,
        random: np.random.Generator,
    ) -> torch.Tensor:
        """One step; the loss stays on the device, so that a GPU need not be waited for."""
        trial, device = self.trial, self.trial.device
        images = normalise(crops, self.pixels.input, device)  # (B, 3, S, S)
        targets = torch.from_numpy(trial.train_targets[indices]).to(device)
        if self.augment.level.mixup and trial.task.name in MIXES:
            soft = soft_targets(targets, trial.num_outputs)
            images, targets = mixup(images, soft, self.augment.level.mixup, random)
        with autocast(device):
            logits = self.classifier(images)
        loss = trial.loss(logits.float(), targets)
        optimizer.zero_grad()
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(_learning(optimizer), MAX_GRADIENT)
        self.scaler.step(optimizer)
        self.scaler.update()
        return loss.detach()

    def _follow_plan(self, epoch: int) -> torch.optim.Optimizer:
        """Ask the strategy what learns in this epoch (from 0) and rebuild the groups if that changed."""
        trial, backbone = self.trial, self.classifier.source
        plan = trial.strategy.plan(backbone.stages, epoch, trial.settings.freeze)
        if self.optimizer is None or plan != self.plan:
            backbone.set_trainable(plan.trainable)
            parameters = dict(backbone.module.named_parameters())
            groups = head_groups(self.classifier.head, trial.settings)
            groups += backbone_groups(parameters, backbone.stages, plan, trial.settings)
            self.optimizer = make_optimizer(groups, trial.settings, self.optimizer)
            self.plan = plan
            learning = sum(parameter.numel() for parameter in _learning(self.optimizer))
            self.trainable = max(self.trainable, learning)
        return self.optimizer


def autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Half precision on a GPU; full precision elsewhere, where half is slower."""
    dtype = autocast_dtype(device)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 on GPUs that compute in it, float16 on older ones, None elsewhere."""
    if device.type != "cuda":
        return None
    # Emulated bfloat16 would be slower than float16.
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def soft_targets(targets: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """Targets (N, K) float32 of classes (N,), or the multi-hot targets (N, K) themselves."""
    if targets.ndim == 2:
        return targets
    return nn.functional.one_hot(targets, num_outputs).float()


@torch.inference_mode()
def _logits(classifier: Classifier, pixels: Pixels, device: torch.device) -> torch.Tensor:
    classifier.eval()
    return torch.cat([classifier(images) for images in centre_batches(pixels, device)])


def _learning(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
