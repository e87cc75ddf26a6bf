"""Search space: what a sweep varies, as JSON: a list of values, or a range of numbers."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workbench.errors import Invalid

VALUES = 100  # of one list; more is a range
FORM = '[4, 8, 16] or {"low": 0.0001, "high": 0.01, "log": true}'
WIDTH = math.sqrt(10)
_RATE = re.compile(r"(^|_)(lr|learning_rate)(_|$)")
_BATCH = re.compile(r"(^|_)(batch|batch_size)(_|$)")
_FROZEN = re.compile(r"(^|_)(freeze|frozen)(_|$)")
_KEYS = {"low", "high", "log", "step", "whole"}


@dataclass(frozen=True)
class Choice:
    """One of these values."""

    values: tuple[Any, ...]

    @property
    def size(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `is_log`: as many between 1 and 10 as between 10 and 100."""

    low: float
    high: float
    is_log: bool = False
    step: float | None = None
    is_whole: bool = False

    @property
    def size(self) -> int | None:
        """How many numbers it has; None: more than anybody tries."""
        step = self.step or (1 if self.is_whole else None)
        # A step of 0.1 fits three times into 0.3 although the quotient of the two floats is below 3.
        return None if step is None else int((self.high - self.low) / step + 1e-9) + 1

    @property
    def values(self) -> tuple[float, ...]:
        """All its numbers, when they can be counted."""
        return tuple(round(self.low + index * (self.step or 1), 12) if not self.is_whole
                     else int(self.low + index * (self.step or 1)) for index in range(self.size or 0))


@dataclass(frozen=True)
class Space:
    """Parameter name -> what it may be."""

    parameters: dict[str, Choice | Range]

    @property
    def size(self) -> int | None:
        """How many different trials there can be; None: no end."""
        sizes = [one.size for one in self.parameters.values()]
        return None if None in sizes else math.prod(sizes)

    def grid(self, seed: int, most: int) -> list[dict[str, Any]]:
        """Combinations, each once, in an order drawn by `seed`, so that the first ones already lie all over the space;
        at most `most`. Raises Invalid when a range has no countable numbers."""
        endless = [name for name, one in self.parameters.items() if one.size is None]
        if endless:
            raise Invalid(f"A grid needs values it can count, and {', '.join(endless)} is a range without a step. Give "
                          'a list or a "step", or choose the sampler tpe or random.')
        names, chance = list(self.parameters), random.Random(seed)
        every = [self.parameters[name].values for name in names]
        size = math.prod(map(len, every))
        if size > 1_000_000:
            raise Invalid(f"This grid has {size} combinations. Take values out, or choose the sampler tpe or random.")
        combinations = list(itertools.product(*every))
        chance.shuffle(combinations)
        return [dict(zip(names, one)) for one in combinations[:most]]


def suggest(parameters: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """A search space, as JSON, of what matters in most trainings, as far as a recipe declares it under a usual name:
    learning rates a decade around their default, batches of half and twice theirs, how many stages stay frozen.

    parameters  name -> (type, default), as Recipe has them
    """
    found: dict[str, Any] = {}
    for name, (kind, default) in parameters.items():
        if kind not in ("float", "int") or isinstance(default, bool) or not isinstance(default, (int, float)):
            continue
        if _RATE.search(name) and default > 0:
            # Two digits: 0.0015 and not 0.0014999999.
            found[name] = {"low": float(f"{default / WIDTH:.2g}"), "high": float(f"{default * WIDTH:.2g}"), "log": True}
        elif _BATCH.search(name) and default >= 2:
            found[name] = [int(default) // 2, int(default), int(default) * 2]
        elif _FROZEN.search(name) and default >= 0:
            found[name] = sorted({0, 2, 4, int(default)})
    return found


def read_space(record: Any) -> Space:
    """A search space from JSON: {"batch_size": [4, 8], "learning_rate": {"low": 1e-4, "high": 1e-2, "log": true}}.

    A range may have "step", and "whole": true for whole numbers only (so it is when both bounds are written as such).
    Raises Invalid, naming the parameter and what is wrong with it.
    """
    if not isinstance(record, dict) or not record:
        raise Invalid(f"A search space is a JSON object of at least one parameter, such as {{\"batch_size\": {FORM}}}.")
    return Space({str(name): _parameter(str(name), one) for name, one in record.items()})


def _parameter(name: str, record: Any) -> Choice | Range:
    if isinstance(record, list):
        return _choice(name, record)
    if not isinstance(record, dict):
        raise Invalid(f"Search space, {name}: write {FORM}, got {record!r}. A single value goes into the "
                      "fixed parameters.")
    foreign = sorted(set(record) - _KEYS)
    if foreign or not {"low", "high"} <= set(record):
        raise Invalid(f"Search space, {name}: a range has low and high and may have "
                      f"{', '.join(sorted(_KEYS - {'low', 'high'}))}; got {', '.join(record) or 'nothing'}.")
    low, high, step = (_number(name, key, record.get(key)) for key in ("low", "high", "step"))
    is_log, is_whole = (_claim(name, key, record.get(key)) for key in ("log", "whole"))
    if is_whole is None:
        is_whole = isinstance(low, int) and isinstance(high, int) and (step is None or isinstance(step, int))
    if low >= high:
        raise Invalid(f"Search space, {name}: low must be below high, got {low} and {high}.")
    if is_log and low <= 0:
        raise Invalid(f"Search space, {name}: a logarithmic range begins above 0, got {low}.")
    if is_log and step is not None:
        raise Invalid(f"Search space, {name}: a logarithmic range has no step; leave one of them out, or give a list.")
    if step is not None and not 0 < step <= high - low:
        raise Invalid(f"Search space, {name}: step must be above 0 and at most {high - low}, got {step}.")
    if is_whole and any(one != int(one) for one in (low, high, step or 1)):
        raise Invalid(f"Search space, {name}: low, high and step of whole numbers must be whole, got {record}.")
    if is_whole:
        low, high, step = int(low), int(high), None if step is None else int(step)
    return Range(low, high, bool(is_log), step, is_whole)


def _choice(name: str, values: list[Any]) -> Choice:
    if not 1 <= len(values) <= VALUES:
        raise Invalid(f"Search space, {name}: a list has 1 to {VALUES} values, got {len(values)}. Write {FORM}.")
    for value in values:
        if not isinstance(value, (str, int, float)) or isinstance(value, float) and not math.isfinite(value):
            raise Invalid(f"Search space, {name}: {value!r} is neither a number nor a word.")
    if len(set(values)) < len(values):
        raise Invalid(f"Search space, {name}: a value stands there twice in {values}.")
    return Choice(tuple(values))


def _number(name: str, key: str, value: Any) -> Any:
    if value is None and key == "step":
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Invalid(f"Search space, {name}: {key} must be a number, got {value!r}.")
    return value


def _claim(name: str, key: str, value: Any) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise Invalid(f"Search space, {name}: {key} must be true or false, got {value!r}.")
    return value
