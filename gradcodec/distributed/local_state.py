"""What a state of local steps must hold, and checks of what ``LocalSteps`` is given."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gradcodec.distributed.anchors import OuterSGD
from gradcodec.distributed.checks import check_count, check_state
from gradcodec.distributed.fragments import Schedule
from gradcodec.errors import ConfigError

COUNTS = ("merged", "every", "fragments", "overlap")
KINDS = ("anchor", "momentum", "flight")


def check_schedule(state: Mapping[str, Tensor | int], schedule: Schedule) -> None:
    """Check that this is a state of ``LocalSteps``, taken with this schedule.

    Raises:
        ConfigError: keys are missing, or the schedule is another one.
    """
    check_state(state, "step", "seed", *COUNTS)
    check_count("step", int(state["step"]))
    for name in COUNTS[1:]:
        if int(state[name]) != getattr(schedule, name):
            raise ConfigError(
                f"the state was taken with {name}={int(state[name])}, expected "
                f"{getattr(schedule, name)}: fragments would be sent in other steps"
            )


def ours_and_rest(
    state: Mapping[str, Tensor | int],
) -> tuple[dict[str, Tensor | int], dict[str, Tensor | int]]:
    """Split a state: anchors and exchanges under way, and the reducer's part."""
    ours: dict[str, Tensor | int] = {}
    rest: dict[str, Tensor | int] = {}
    for key, value in state.items():
        mine = key in COUNTS or key.partition(".")[0] in KINDS
        (ours if mine else rest)[key] = value
    return ours, rest


def fitting(
    state: Mapping[str, Tensor | int], wanted: Mapping[str, Tensor], *, strict: bool
) -> dict[str, Tensor]:
    """Those tensors of a state that are wanted, by key.

    Raises:
        ConfigError: if ``strict``, some are missing, not wanted, or of another shape.
    """
    found: dict[str, Tensor] = {}
    for key, like in wanted.items():
        value = state.get(key)
        if isinstance(value, Tensor) and value.shape == like.shape:
            found[key] = value
        elif strict:
            came = "nothing" if value is None else f"shape {tuple(getattr(value, 'shape', ()))}"
            raise ConfigError(f"{key!r}: expected shape {tuple(like.shape)}, got {came}")
    strange = [k for k in state if k not in wanted and k not in COUNTS]
    if strange and strict:
        raise ConfigError(
            f"a state of other parameters or another outer step: {strange[0]!r} is not of this "
            "one; if the model has changed, load with strict=False"
        )
    return found


def share(name: str, value: object, *, whole: bool = False) -> float:
    """Check a number from 0 to 1, with 1 itself if ``whole``."""
    number = isinstance(value, float | int) and not isinstance(value, bool)
    if number and 0 <= value <= 1 and (whole or value < 1):  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    raise ConfigError(f"expected {name} from 0 to {'' if whole else 'under '}1, got {value!r}")


def check_kinds(optimizer: object, outer: object, offload: object, joining: object) -> None:
    """Check the settings that are no numbers."""
    if not isinstance(outer, OuterSGD):
        raise ConfigError(f"expected outer of OuterSGD(...), got {type(outer).__name__}")
    if optimizer is not None and not callable(getattr(optimizer, "step", None)):
        raise ConfigError(f"expected an optimiser with a step, got {type(optimizer).__name__}")
    for name, value in (("offload", offload), ("joining", joining)):
        if not isinstance(value, bool):
            raise ConfigError(f"expected {name} of True or False, got {value!r}")
