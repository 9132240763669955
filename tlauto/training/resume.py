"""The state of a fine-tuning between two epochs, as a file from which another process goes on.

What goes on gives, bit for bit, what an uninterrupted run gives: every draw of an epoch depends on the
trial's seed and the epoch's number alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tlauto.contracts import TrialSpec
from tlauto.rungs import STATE_FILE
from tlauto.training.checkpoint import changed
from tlauto.training.model import Classifier
from tlauto.training.trial import Best, Evaluation

SHARE = 0.05
"""Most of the time that writing states may take; a trial that is stopped writes its own in any case."""

OTHER_FIELDS = (
    "number", "dataset", "weights", "folder", "cache", "purpose", "init_head", "resume_from", "micro_batch",
)  # fmt: skip
"""What may differ between the trial that wrote a state and the one that goes on from it."""

PART = f".{STATE_FILE}.part"

_log = logging.getLogger(__name__)


class Run(Protocol):
    """What of a run has to be kept."""

    classifier: Classifier
    trainable: int
    scaler: torch.amp.GradScaler
    optimizer: torch.optim.Optimizer | None
    memories: Mapping[str, Mapping[str, torch.Tensor]]


@dataclass
class Keeper:
    """Writes the state of a run when that costs little, and finds it again.

    Attributes:
        pretrained: digests of the backbone's tensors; those that have not changed are not written.
    """

    spec: TrialSpec
    pretrained: Mapping[str, bytes]
    cost_s: float = 0.1
    written: float = field(default_factory=time.monotonic)

    def after_epoch(self, run: Run, best: Best, *, is_stopped: bool) -> None:
        """Write the state after an epoch, if it is the last before a stop or not too soon again."""
        started = time.monotonic()
        if not is_stopped and self.cost_s > SHARE * (started - self.written):
            return
        try:
            self._write(run, best)
        except (OSError, SafetensorError) as error:  # a full disk, say
            Path(self.spec.folder, PART).unlink(missing_ok=True)
            _log.warning("the state of trial %d could not be written: %s", self.spec.number, error)
        self.written = time.monotonic()
        self.cost_s = self.written - started

    def find(self, run: Run, best: Best) -> int:
        """Put the state that `spec.resume_from` names into `run` and `best`.

        Returns: epochs that are done; 0 when there is no such file or it is of another trial, which
        then starts from the beginning and comes to the same.
        """
        path = Path(self.spec.resume_from or "")
        if not path.is_file():
            return 0
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("state", "{}"))
                if about.get("of") != identity(self.spec):
                    raise ValueError("it is of another trial")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError) as error:
            _log.warning("trial %d starts from the beginning; %s: %s", self.spec.number, path, error)
            return 0
        _restore(run, best, about, tensors)
        return best.seen

    def forget(self) -> None:
        """Delete the state of a trial that is complete."""
        Path(self.spec.folder, STATE_FILE).unlink(missing_ok=True)

    def _write(self, run: Run, best: Best) -> None:
        winner, optimizer = best.winner, run.optimizer
        tensors = {f"model/{n}": t for n, t in changed(run.classifier.state_dict(), self.pretrained).items()}
        tensors |= {f"best/{n}": t for n, t in changed(best.state, self.pretrained).items()}
        if optimizer is not None:
            for name, parameter in run.classifier.named_parameters():
                memory = optimizer.state.get(parameter, {})
                kept = {key: value for key, value in memory.items() if isinstance(value, torch.Tensor)}
                tensors |= {f"optimizer/{name}/{key}": value for key, value in kept.items()}
        tensors["predictions"] = torch.from_numpy(np.ascontiguousarray(winner.predictions))
        about = {
            "of": identity(self.spec), "trainable": run.trainable, "scaler": run.scaler.state_dict(),
            "best": {"epoch": best.epoch, "lowest_loss": best.lowest_loss, "improved": best.improved},
            "seen": best.seen, "score": winner.score, "loss": winner.loss,
        }  # fmt: skip
        folder = Path(self.spec.folder)
        folder.mkdir(parents=True, exist_ok=True)
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(own, folder / PART, {"state": json.dumps(about)})
        os.replace(folder / PART, folder / STATE_FILE)


def identity(spec: TrialSpec) -> str:
    """A hash of what decides a trial's course."""
    decisive = {name: value for name, value in vars(spec).items() if name not in OTHER_FIELDS}
    text = json.dumps(decisive, sort_keys=True, default=dict)
    return hashlib.sha256(text.encode()).hexdigest()


def _restore(run: Run, best: Best, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if rest:
            parts[part][rest] = tensor
    run.classifier.load_state_dict(parts["model"], strict=False)
    memories: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        parameter, _, key = name.rpartition("/")
        memories.setdefault(parameter, {})[key] = tensor
    run.memories, run.trainable = memories, int(about["trainable"])
    run.scaler.load_state_dict(about["scaler"])
    best.epoch, best.improved = int(about["best"]["epoch"]), int(about["best"]["improved"])
    best.lowest_loss, best.seen = float(about["best"]["lowest_loss"]), int(about["seen"])
    best.evaluation = Evaluation(about["score"], about["loss"], tensors["predictions"].numpy())
    best.state = parts["best"]


def recall(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    memories: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """Give an optimizer the memories (momentum and the like) of the parameters that it trains.

    Args:
        memories: tensors by key, by parameter's name, as a state file holds them.
    """
    learning = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, memory in memories.items():
        parameter = parameters[name]
        if id(parameter) in learning:
            optimizer.state[parameter] = {
                # Laid out like the parameter, where it is one number for each of its numbers.
                key: torch.empty_like(parameter, requires_grad=False).copy_(value)
                if value.shape == parameter.shape
                else value
                for key, value in memory.items()
            }
