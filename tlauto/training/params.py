"""What a trial's parameters say, read once, before any work; none may be left over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tlauto import recipe
from tlauto.contracts import FreezeStrategy, Task, TaskHead, TrialSpec, is_linear, trains_backbone
from tlauto.errors import ConfigError, TrialError, did_you_mean
from tlauto.space import Scalar, Space, complete


@dataclass(frozen=True)
class Settings:
    """The checked parameters of one trial.

    Attributes:
        freeze, head, loss: of the strategy, the head and the task's loss.
        optimizer: its name; `optim` holds its own parameters, `lr` (of the head) among them.
        warmup: fraction of all steps.
        batch_size: images a step.
        backbone_lr: multiplier of `lr` for the backbone; 0 when it does not learn.
        train_mode: whether the backbone runs in training mode while it learns.
        augment: a level of `recipe.AUGMENT_LEVELS`.
        solver: `path` or `lbfgs` when the head's optimum is computed, else `minibatch`.
        l2: the penalty of `lbfgs`.
        features: of the backbone that a head gets instead of pooled ones; a `recipe.FEATURES`.
        mirror: whether they are the mean of those of an image and of its mirror image.
        beside: ids of further backbones, whose features a solved head reads beside them.
    """

    freeze: Mapping[str, Scalar]
    head: Mapping[str, Scalar]
    loss: Mapping[str, Scalar]
    optimizer: str
    optim: Mapping[str, float]
    warmup: float
    batch_size: int
    backbone_lr: float
    train_mode: bool
    augment: str
    solver: str = "minibatch"
    l2: float = 0.0
    features: str = "pooled"
    mirror: bool = False
    beside: tuple[str, ...] = ()


class Params:
    """A trial's parameters that remembers which were read."""

    def __init__(self, values: Mapping[str, Scalar]) -> None:
        self.values = dict(values)
        self.known: set[str] = set()

    def take(self, owner: str, space: Space) -> dict[str, Scalar]:
        """Values of `owner.*` for every name of `space`, defaults where the trial gives none."""
        self.known |= {f"{owner}.{name}" for name in space}
        given = {name: self.values[f"{owner}.{name}"] for name in space if f"{owner}.{name}" in self.values}
        return complete(space, given, owner=owner)

    def check_all_read(self) -> None:
        """Raise ConfigError when a parameter was given that nothing reads."""
        unread = sorted(set(self.values) - self.known)
        if unread:
            raise ConfigError(
                f"nothing in this trial reads the parameter '{unread[0]}'"
                f"{did_you_mean(unread[0], self.known)} "
                f"({len(unread)} unread: {', '.join(unread)}; read here: {', '.join(sorted(self.known))})"
            )


def read(spec: TrialSpec, strategy: FreezeStrategy, head: TaskHead, task: Task) -> Settings:
    """The settings of a trial. Raises: TrialError for a value out of range or a name nobody reads."""
    params = Params(spec.params)
    try:
        settings = _read(params, strategy, head, task)
        params.take("image", recipe.IMAGE_SPACE)  # read where the backbone is loaded
        params.check_all_read()
    except ConfigError as error:
        raise TrialError(str(error)) from None
    return settings


def _read(params: Params, strategy: FreezeStrategy, head: TaskHead, task: Task) -> Settings:
    if is_linear(head) and not trains_backbone(strategy):
        solver = str(params.take("probe", recipe.LINEAR_SPACE)["solver"])
        if solver != "minibatch":
            return _solved(params, solver, strategy, head, task)
    optim = params.take("optim", recipe.OPTIM_SPACE)
    name = str(optim["name"])
    own = params.take(f"optim.{name}", recipe.OPTIMIZER_SPACES[name])
    own_head = params.take(f"head.{head.name}", head.space)
    features, mirror = "pooled", False
    if trains_backbone(strategy):
        finetune = params.take("finetune", recipe.FINETUNE_SPACE)
        augment = params.take("augment", recipe.AUGMENT_SPACE)
    else:
        finetune = {"backbone_lr": 0.0, "train_mode": False, **params.take("probe", recipe.PROBE_SPACE)}
        augment, mirror = {"level": "none"}, _mirror(params)
        if head.features(own_head) == "pooled":
            features = str(params.take("probe", recipe.FEATURES_SPACE)["features"])
    return Settings(
        freeze=params.take(f"freeze.{strategy.name}", strategy.space),
        head=own_head,
        loss=params.take("loss", task.space),
        optimizer=name,
        optim={key: _number(value) for key, value in own.items()},
        warmup=_number(optim["warmup"]),
        batch_size=int(_number(finetune["batch_size"])),
        backbone_lr=_number(finetune["backbone_lr"]),
        train_mode=bool(finetune["train_mode"]),
        augment=str(augment["level"]),
        features=features,
        mirror=mirror,
    )


def _solved(params: Params, solver: str, strategy: FreezeStrategy, head: TaskHead, task: Task) -> Settings:
    """The settings of a head whose optimum is computed: no optimizer, no batches, no epochs."""
    is_given = solver == "lbfgs"  # else cross-validation chooses
    probe = params.take("probe", {**recipe.L2_SPACE, **recipe.FEATURES_SPACE}) if is_given else {}
    return Settings(
        freeze=params.take(f"freeze.{strategy.name}", strategy.space),
        head=complete(head.space, {}, owner=f"head.{head.name}"),
        loss=params.take("loss", task.space),
        optimizer="lbfgs", optim={}, warmup=0.0, batch_size=1, backbone_lr=0.0, train_mode=False,
        augment="none", solver=solver, l2=_number(probe.get("l2", 0.0)),
        features=str(probe.get("features", "pooled")), mirror=_mirror(params), beside=_beside(params),
    )  # fmt: skip


def _mirror(params: Params) -> bool:
    return bool(params.take("probe", recipe.MIRROR_SPACE)["mirror"])


def _beside(params: Params) -> tuple[str, ...]:
    most = int(_number(params.take("probe", recipe.joined_space())["joined"]))
    params.known.add(recipe.BESIDE)
    found = recipe.beside(params.values)
    if len(found) >= most:
        names = ", ".join(found)
        raise ConfigError(f"'{recipe.BESIDE}' names {names} besides, though 'probe.joined' is {most}")
    return found


def _number(value: Scalar) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    raise ConfigError(f"{value!r} is not a number")
