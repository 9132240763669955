"""Checkpoints: the tensors of a trial that differ from the pretrained weights, as safetensors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from tlauto import recipe
from tlauto.contracts import TrialSpec
from tlauto.errors import TrialError
from tlauto.training.model import Kind, Readout

FILE = "checkpoint.safetensors"
START = "start.safetensors"
"""Beside a checkpoint whose head reads several stages: the best head on pooled features alone."""

State = Mapping[str, torch.Tensor]


def save_checkpoint(folder: Path, state: State, spec: TrialSpec, kind: str, *, file: str = FILE) -> Path:
    """Write a checkpoint, whole or not at all, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path, temporary = folder / file, folder / f".{file}.part"
    # Cloned, because safetensors refuses tensors that share memory (tied weights).
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, temporary, {"backbone": _backbones(spec), "head": spec.head, "features": kind})
    os.replace(temporary, path)
    return path


def load_checkpoint(model: Readout, path: Path, spec: TrialSpec) -> None:
    """Put a checkpoint's tensors into a classifier or a readout; raises TrialError when they do not fit."""
    state, about = _read(path)
    _check_backbone(path, about, spec)
    mine = model.state_dict()
    needed = {name for name in mine if not name.startswith("backbone.")}
    wrong = sorted(needed - set(state)) + [
        name for name, tensor in state.items() if name not in mine or mine[name].shape != tensor.shape
    ]
    if wrong:
        raise TrialError(f"the checkpoint {path} is of another model: look at '{wrong[0]}'")
    model.load_state_dict(state, strict=False)


def kind_of(path: Path) -> Kind:
    """What of the backbone the head of a checkpoint reads. Raises: TrialError when it cannot be read."""
    _, about = _read(path)
    said = about.get("features", "")
    for kind in get_args(Kind):
        if said == kind:
            known: Kind = kind
            return known
    raise TrialError(f"the checkpoint {path} does not say which features its head reads")


def start_from(readout: Readout, path: Path, spec: TrialSpec) -> bool:
    """Start a head from another trial's (LP-FT, Kumar et al. 2022, arXiv:2202.10054).

    Its feature scaling is taken when it read the same features; its head and output scaling too,
    when the head is of the same type and shape. Returns whether the scaling was taken. Raises:
    TrialError when the checkpoint cannot be read or is of another backbone.
    """
    state, about = _read(path)
    _check_backbone(path, about, spec)
    if about.get("features") != readout.kind:
        return False
    mine = readout.state_dict()
    taken = {name: tensor for name, tensor in state.items() if name.startswith("norm.")}
    top = {name: tensor for name, tensor in state.items() if name.startswith(("head.", "output."))}
    expected = {name: mine[name].shape for name in mine if name.startswith(("head.", "output."))}
    if about.get("head") == spec.head and {n: t.shape for n, t in top.items()} == expected:
        taken |= top
    readout.load_state_dict(taken, strict=False)
    return True


def digests(module: nn.Module) -> dict[str, bytes]:
    """A hash of each tensor of a module's state, to tell later which of them changed."""
    return {name: _digest(tensor) for name, tensor in module.state_dict().items()}


def changed(state: State, before: Mapping[str, bytes]) -> dict[str, torch.Tensor]:
    """The tensors that are new or differ from `before`, as `digests` took it."""
    return {name: tensor for name, tensor in state.items() if _digest(tensor) != before.get(name)}


def _digest(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).digest()


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()  # not iterable itself
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise TrialError(f"cannot read the checkpoint {path}: {error}") from None


def _check_backbone(path: Path, about: Mapping[str, str], spec: TrialSpec) -> None:
    if about.get("backbone") != _backbones(spec):
        raise TrialError(f"the checkpoint {path} is of {about.get('backbone')}, not of {_backbones(spec)}")


def _backbones(spec: TrialSpec) -> str:
    """All that a trial reads: a head on several is of no use to a trial on one of them."""
    return " ".join((spec.backbone, *recipe.beside(spec.params)))
