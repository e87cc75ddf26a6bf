"""OptunaSearch: Optuna's samplers and pruners behind our own record of the trials."""

from __future__ import annotations

import warnings
from typing import Any

from workbench.errors import Invalid, Unavailable
from workbench.search_space import Choice, Range, Space

SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("median", "halving", "none")
# Below so many finished trials an importance is a guess.
FOR_IMPORTANCE = 10
# The first epoch tells of warming up, not of the parameters.
FIRST_JUDGED = 2
REPEATS = 20  # draws of something that was tried already, after which it is tried again


class OptunaSearch:
    """A Search in memory. Optuna's own storages are not used: what a trial was given and gave is recorded by the caller
    in one place, so a kill cannot leave the two of them telling different stories.

    Each draw has a seed of its own, made of `seed` and the trial's number: what is drawn depends on the trials told so
    far and not on how often the search was opened anew.

    Raises Invalid for a sampler or pruner that does not exist and for a grid over what cannot be counted.
    """

    def __init__(self, space: Space, *, trials: int, sampler: str = "tpe", pruner: str = "median", seed: int = 0,
                 is_maximized: bool = True) -> None:
        if sampler not in SAMPLERS:
            raise Invalid(f"Sampler {sampler!r} does not exist; choose {', '.join(SAMPLERS)}.")
        if pruner not in PRUNERS:
            raise Invalid(f"Pruner {pruner!r} does not exist; choose {', '.join(PRUNERS)}.")
        self._grid = space.grid(seed, trials) if sampler == "grid" else None
        try:
            import optuna
        except ImportError as error:
            raise Unavailable("The package optuna is not installed; it chooses the trials. `pip install "
                              "optuna`.") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._seed, self._sampler = optuna, seed, sampler
        self._space = {name: _distribution(optuna, one) for name, one in space.parameters.items()}
        # Of a small budget a quarter is drawn blindly; Optuna's own figure is 10.
        self._blind = min(10, max(3, trials // 4))
        pruners = {"median": lambda: optuna.pruners.MedianPruner(n_startup_trials=min(5, self._blind),
                                                                 n_warmup_steps=FIRST_JUDGED),
                   "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(reduction_factor=3),
                   "none": optuna.pruners.NopPruner}
        self._study = optuna.create_study(direction="maximize" if is_maximized else "minimize",
                                          pruner=pruners[pruner](), sampler=optuna.samplers.RandomSampler(seed))
        self._trials: dict[int, Any] = {}

    def ask(self, number: int) -> dict[str, Any]:
        if self._grid is not None:
            self.begin(number, self._grid[number])
            return self._grid[number]
        tried = [trial.params for trial in self._trials.values()]
        self._study.sampler = self._new_sampler(number)
        for _ in range(REPEATS):
            trial = self._study.ask(self._space)
            if trial.params not in tried:
                break
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        else:
            trial = self._study.ask(self._space)
        self._trials[number] = trial
        return dict(trial.params)

    def begin(self, number: int, params: dict[str, Any]) -> None:
        self._study.enqueue_trial(params)
        self._trials[number] = self._study.ask(self._space)

    def report(self, number: int, epoch: int, value: float) -> bool:
        trial = self._trials[number]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an epoch told twice stays as it was told first
            trial.report(value, epoch)
        return trial.should_prune()

    def tell(self, number: int, state: str, value: float | None = None) -> None:
        states = self._optuna.trial.TrialState
        if state == "complete":
            self._study.tell(self._trials[number], value)
        else:
            self._study.tell(self._trials[number], state=states.PRUNED if state == "pruned" else states.FAIL)

    def importance(self) -> dict[str, float]:
        finished = self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.COMPLETE,))
        if len(finished) < FOR_IMPORTANCE or len({trial.value for trial in finished}) < 2:
            return {}
        # A parameter of a single value decides nothing, and Optuna does not measure it.
        varied = [name for name, one in self._space.items() if not one.single()]
        if not varied:
            return {}
        return {name: float(share) for name, share in
                self._optuna.importance.get_param_importances(self._study, params=varied).items()}

    def _new_sampler(self, number: int) -> Any:
        seed = (self._seed * 1_000_003 + number) % 2**32
        if self._sampler == "random":
            return self._optuna.samplers.RandomSampler(seed)
        return self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=self._blind, constant_liar=True)


def _distribution(optuna: Any, one: Choice | Range) -> Any:
    if isinstance(one, Choice):
        return optuna.distributions.CategoricalDistribution(one.values)
    if one.is_whole:
        return optuna.distributions.IntDistribution(one.low, one.low + (one.size - 1) * (one.step or 1), log=one.is_log,
                                                    step=one.step or 1)
    high = one.high if one.step is None else one.values[-1]
    return optuna.distributions.FloatDistribution(one.low, high, log=one.is_log, step=one.step)
