"""Read weights files without ever unpickling an object, and copy them into a network strictly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from tlauto.errors import WeightsError

# What torch.load was seen to raise for text, truncated, foreign and refused files.
_BAD_FILE = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    UnpicklingError,
)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a weights file, without the wrappers of a checkpoint.

    Raises: WeightsError when it cannot be read.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:  # reads the header alone
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from None
    return {name: tuple(tensor.shape) for name, tensor in read_tensors(path).items()}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` or PyTorch file by name.

    A checkpoint's `state_dict` or `model` is unwrapped and the prefix `module.` removed. Raises:
    WeightsError when the file is damaged, holds no tensors or would have to be unpickled.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _BAD_FILE as error:
        raise _unreadable(path, error) from None
    return _unwrap(content, path)


def load_strictly(module: nn.Module, tensors: Mapping[str, torch.Tensor], *, id: str, path: Path) -> None:
    """Copy tensors into a module; raises WeightsError when any is missing, unknown or misshapen."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    # Files from before PyTorch 0.4.1 lack BatchNorm's counter, which inference never reads.
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    reason = first_mismatches({n: s for n, s in expected.items() if n not in optional - found.keys()}, found)
    if reason:
        raise WeightsError(f"'{path}' does not hold weights of {id}: {reason}")
    # The version marks of the module itself: names and shapes were just found to be the current ones,
    # and safetensors keeps no marks (MNASNet refuses to load without).
    state: Any = module.state_dict()
    for name, tensor in tensors.items():
        state[name] = tensor
    module.load_state_dict(state)


def first_mismatches(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> str | None:
    """A clause that names the first tensors that differ, or None when all agree."""
    differ = [n for n in expected if n in found and expected[n] != found[n]]
    lacking = [n for n in expected if n not in found]
    unknown = [n for n in found if n not in expected]
    clauses = []
    if differ:
        shapes = f"{_shape(found[differ[0]])} instead of {_shape(expected[differ[0]])}"
        clauses.append(f"'{differ[0]}' is {shapes}{_more(differ)}")
    if lacking:
        clauses.append(f"it lacks '{lacking[0]}'{_more(lacking)}")
    if unknown:
        clauses.append(f"it has an unknown '{unknown[0]}'{_more(unknown)}")
    return "; ".join(clauses) or None


def _unwrap(content: Any, path: Path) -> dict[str, torch.Tensor]:
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise WeightsError(f"'{path}' holds a {type(content).__name__}, not tensors by name")
    tensors = {str(n).removeprefix("module."): t for n, t in content.items() if isinstance(t, torch.Tensor)}
    if not tensors:
        raise WeightsError(f"'{path}' holds no tensors")
    return tensors


def _unreadable(path: Path, error: BaseException) -> WeightsError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    hint = "; get the file again"
    if "weights_only" in str(error) or "WeightsUnpickler" in str(error):
        reason = "it is damaged, or holds pickled objects, which are never loaded"
        hint = "; save its state_dict() alone, best as .safetensors"
    return WeightsError(f"the weights file '{path}' cannot be read: {reason}{hint}")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
