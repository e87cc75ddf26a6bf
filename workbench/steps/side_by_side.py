"""Side by side: the trials of one sweep while they run, as many at once as the machine holds."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workbench.blobs import Blobs
from workbench.capacity import LEAST_BYTES, free_memory, memory_of, slots, visible_gpus
from workbench.dataset import DatasetVersion, Manifest
from workbench.errors import Cancelled, Invalid, Unavailable
from workbench.ports import Job, ModelStore, Search, Tracker
from workbench.recipe import Recipe, discard
from workbench.steps.environments import CURRENT, current
from workbench.steps.facts import keep
from workbench.steps.limits import MIB, Limits
from workbench.steps.retrain import arguments_for, start
from workbench.steps.trained import log_epochs, results
from workbench.steps.training import Training
from workbench.steps.trials import Ends, Left, Trial, Watch, curve, folder_of, read_trials, trim, value_of, write_trial

POLL_S = 0.25
TELL_S = 2.0
# So many failures before anything went well are no bad luck.
FAILURES_AT_FIRST = 8
# A tracker that is away for longer than this ends the sweep.
PATIENCE_S, AGAIN_S = 600, 5
# What PyTorch's and NumPy's libraries are told about threads.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
RUN_STATUS = {"complete": "FINISHED", "failed": "FAILED", "pruned": "KILLED", "stopped": "KILLED"}
WHY_STOPPED = {"time": "The sweep's time was over.", "cancelled": "The sweep was cancelled.",
               "failed": "The sweep failed."}


@dataclass(frozen=True)
class Shared:
    """What all trials of a sweep have in common.

    fixed    parameters that are not searched for
    project  git repository the recipe is checked out from, by way of a mirror in `mirrors`
    run_id   the sweep's own run, of which theirs are part
    most     trials at once; need: bytes one needs, until it is measured; cores: threads of all together
    environment, limits, secrets  of each training, as in retrain
    facts    what `rerun` has to know of each run (steps/facts), besides its parameters
    """

    recipe: Recipe
    fixed: dict[str, Any]
    name: str
    base_model: str | None
    project: Path
    mirrors: Path
    version: DatasetVersion
    manifest: Manifest
    experiment: str
    run_id: str
    metric: str
    is_maximized: bool
    trials: int
    time_limit_s: float
    most: int
    need: int
    cores: int
    environment: str
    limits: Limits
    secrets: tuple[str, ...]
    facts: dict[str, Any]


class SideBySide:
    """This worker's threads, one for each training process it follows.

    trials  all of the sweep, by number, as they are recorded
    spent   seconds, all workers' together
    """

    def __init__(self, whole: Training, shared: Shared, search: Search, job: Job, *, tracker: Tracker,
                 models: ModelStore, blobs: Blobs) -> None:
        self._whole, self._shared, self._search, self._job = whole, shared, search, job
        self._tracker, self._models, self._blobs = tracker, models, blobs
        self._gpus, self._slots = visible_gpus(), None
        self._lock = threading.RLock()
        self._forgetting = threading.Lock()  # two trials that end together may both let go of one whose model lost
        self._news = threading.Event()  # a training ended, or all that there was to do for a trial
        self._new: set[int] = set()  # trials that nobody has begun a run for, because they were not there before
        # Once for all: to read what is installed takes as long as a small training.
        self._current = current() if shared.environment == CURRENT else None
        self._order = ""  # a key of WHY_STOPPED, or "leave", once the running trials are to end
        self.trials = read_trials(whole.folder)
        self._heavy = {one.number for one in self.trials if one.is_settled}  # with weights, as far as is known
        self.spent: float = (whole.read("now.json") or {}).get("spent_s", 0.0)

    def run(self) -> None:
        """Returns when no trial is left to run. Raises what ended it before, with no thread left."""
        self._remember()
        # What is there for all trials together, those that already run included.
        self._memory = free_memory() + sum(memory_of(self._training(one).processes()) for one in self.trials
                                           if one.state == "running")
        pool = ThreadPoolExecutor(self._shared.trials, thread_name_prefix="trial")
        followed: set[Future[None]] = set()
        began, told, limit = time.monotonic() - self.spent, 0.0, self._shared.time_limit_s

        def follow(number: int) -> None:
            future = pool.submit(self._follow, number)
            future.add_done_callback(lambda _: self._news.set())
            followed.add(future)

        try:
            # Those of an earlier worker first: still running, or decided but not yet settled.
            for trial in [one for one in self.trials if not one.is_settled]:
                follow(trial.number)
            while True:
                self._news.clear()
                self._job.check()
                self.spent = time.monotonic() - began
                if time.monotonic() - told > TELL_S:
                    self._tell()
                    told = time.monotonic()
                if limit and self.spent >= limit and not self._order:
                    self._job.log(f"The sweep's {limit:g} s are over; trials that run are ended.")
                    self._order = "time"
                for future in [one for one in followed if one.done()]:
                    followed.remove(future)
                    future.result()
                # What a trial leaves is put in order while the next one trains.
                while not self._order and self._has_more() and self._has_place():
                    follow(self._new_trial())
                if not followed:
                    return
                self._news.wait(POLL_S)
        except (Exception, KeyboardInterrupt) as error:
            self._order = "cancelled" if isinstance(error, (Cancelled, KeyboardInterrupt)) else "failed"
            raise
        except BaseException:
            # The worker ends; the trainings go on and the next one finds them.
            self._order = "leave"
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self._tell()

    def best(self) -> Trial | None:
        """The complete trial with the best value, the first of equals."""
        sign = -1 if self._shared.is_maximized else 1
        return min((one for one in self.trials if one.state == "complete"), default=None,
                   key=lambda one: (sign * one.value, one.number))

    def counts(self) -> dict[str, int]:
        """State -> how many trials ended in it."""
        return {state: sum(one.state == state for one in self.trials) for state in RUN_STATUS}

    def forget_models(self) -> None:
        """No trial's model is wanted, not even the best one's."""
        for trial in self.trials:
            self._forget(trial)

    def _remember(self) -> None:
        """Tells the search every trial begun so far."""
        for trial in self.trials:
            self._search.begin(trial.number, trial.params)
            for epoch, value in curve(self._training(trial), self._shared.metric):
                if math.isfinite(value):
                    self._search.report(trial.number, epoch, value)
            if trial.state != "running":
                self._search.tell(trial.number, trial.state, trial.value)
        if self.trials:
            self._job.log(f"{len(self.trials)} trials were begun before; "
                          f"{sum(one.state == 'running' for one in self.trials)} of them go on.")

    def _has_more(self) -> bool:
        if len(self.trials) >= self._shared.trials:
            return False
        over = [one for one in self.trials if one.state != "running"]
        return len(over) < FAILURES_AT_FIRST or any(one.state != "failed" for one in over)

    def _has_place(self) -> bool:
        """Asks anew what fits: what a trial needs is known better with each one that ends."""
        # A tenth more than was seen: the peak lies between two looks.
        measured = max((one.memory for one in self.trials), default=0)
        need = max(LEAST_BYTES, int(1.1 * measured)) if measured else self._shared.need
        found = slots(self._shared.most, cores=self._shared.cores, memory=self._memory, need=need, gpus=self._gpus)
        if self._slots is None or (found.trials, found.threads) != (self._slots.trials, self._slots.threads):
            self._job.log(found.why)
        self._slots = found
        return sum(one.state == "running" for one in self.trials) < found.trials

    def _new_trial(self) -> int:
        taken = {one.gpu for one in self.trials if one.state == "running"}
        gpu = next((one for one in self._gpus if one not in taken), "")
        with self._lock:
            number = len(self.trials)
            trial = Trial(number, self._search.ask(number), gpu=gpu, threads=self._slots.threads, started_at=time.time())
            # Recorded before anything of it runs: a trial that is not in the records has left no process either.
            write_trial(self._whole.folder, trial)
            self.trials.append(trial)
            self._new.add(number)
        return number

    def _follow(self, number: int) -> None:
        """A thread's work: one trial until it is settled. A tracker that does not answer is waited for."""
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                if self.trials[number].state == "running":
                    self._record(self._train(self.trials[number]))
                    self._news.set()
                self._settle(self.trials[number])
                return
            except Left:
                return
            except Unavailable as error:
                if self._order or time.monotonic() > until:
                    raise
                self._job.log(f"Trial {number} waits {AGAIN_S} s and tries again: {error}")
                time.sleep(AGAIN_S)

    def _train(self, trial: Trial) -> Trial:
        """The trial as it is once its training is over and no process of it is left, so that its place is free."""
        training = self._training(trial)
        ended = self._ended(trial, training)
        try:
            return replace(ended, memory=int(MIB * float((training.read("usage.json") or {}).get("memory_mb", 0))))
        except (Invalid, ValueError, TypeError, OverflowError) as error:  # one that ended its keeper may have written it
            return trial.ended("failed", f"What the training used cannot be read: {error}")

    def _ended(self, trial: Trial, training: Training) -> Trial:
        """Follows the training of a trial, which it starts where it does not run yet."""
        watch = Watch(trial, training, self._shared.metric, self._end_if_told,
                      lambda epoch, value: self._judge(trial.number, epoch, value))
        try:
            if training.exit_code() is None:
                watch.check()
                if trial.number in self._new or not training.processes():
                    self._launch(trial, training, watch)
            training.follow(watch)
            watch.catch_up()
            return trial.ended("complete", value=value_of(training, results(training), self._shared.metric))
        except Ends as ends:
            training.stop()  # those of an earlier worker, that were not followed any more
            return ends.trial
        except Invalid as error:
            return trial.ended("failed", str(error))

    def _launch(self, trial: Trial, training: Training, watch: Watch) -> None:
        """Starts the training process of a trial, with its run in the tracker and its share of the machine."""
        shared, link = self._shared, training.folder / "data"
        if not link.is_symlink():
            link.symlink_to(self._whole.folder / "data")
        given = {**shared.fixed, **trial.params}
        if "threads" in shared.recipe.parameters:
            given.setdefault("threads", trial.threads)
        arguments = arguments_for(shared.recipe, training, given, shared.name, shared.base_model, self._models)
        is_first = trial.number in self._new
        self._new.discard(trial.number)  # whoever asks again may have been heard the first time
        run_id = self._tracker.start_run(shared.experiment, trial.name, {
            "job": f"{self._job.id}/{trial.number}", "kind": "trial", "recipe": shared.recipe.name,
            "commit": shared.recipe.commit, "dataset": shared.version.ref}, parent=shared.run_id, is_first=is_first)
        self._record(replace(trial, run_id=run_id))
        environment = dict.fromkeys(THREADS, str(trial.threads))
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = trial.gpu
        start(training, shared.recipe, arguments, shared.project, shared.mirrors, shared.manifest, shared.version,
              self._blobs, self._tracker, run_id, watch, shared.experiment, environment,
              choice=shared.environment, own=self._current, direct=True,
              ready=lambda built: keep(self._tracker, run_id, training, {
                  **shared.facts, "params": given, "seed": arguments.get("seed", shared.recipe.parameters.get(
                      "seed", ("", None))[1])}, built),
              # What a training may hold alone, trials side by side may hold together.
              limits=replace(shared.limits, memory_mb=shared.limits.memory_mb // self._slots.trials
                             if self._slots else shared.limits.memory_mb))

    def _settle(self, trial: Trial) -> None:
        """Closes what a decided trial has open; may be repeated."""
        training = self._training(trial)
        if trial.run_id:
            log_epochs(training, self._tracker, trial.run_id)
            self._tracker.log(trial.run_id, tags={"state": trial.state, "reason": trial.reason[:500]},
                              metrics={} if trial.value is None else {"objective": trial.value})
            self._tracker.finish_run(trial.run_id, RUN_STATUS[trial.state])
        if trial.state == "failed":
            self._job.fail_item(trial.name, trial.reason)
        with self._lock:
            best = self.best()
            self._heavy.add(trial.number)
            # The best one's weights are needed in the end; whoever was the best before gives its up.
            rest = [self.trials[number] for number in self._heavy if best is None or number != best.number]
        for one in rest:
            self._forget(one)
        with self._lock:
            self._heavy -= {one.number for one in rest}
        discard(self._shared.project, self._shared.mirrors, training.folder / "code")
        self._record(replace(trial, is_settled=True))

    def _forget(self, trial: Trial) -> None:
        """Removes a trial's weights, here and in the tracker."""
        training = self._training(trial)
        with self._forgetting:
            if (training.output / "model.onnx").exists() and trial.run_id:
                self._tracker.delete_files(trial.run_id, "model")
            trim(training)

    def _record(self, trial: Trial) -> None:
        """Writes a trial down; only its own thread calls this. What was found out meanwhile is kept."""
        with self._lock:
            before = self.trials[trial.number]
            trial = replace(trial, run_id=trial.run_id or before.run_id)
            write_trial(self._whole.folder, trial)
            self.trials[trial.number] = trial
            if before.state == "running" != trial.state:
                self._search.tell(trial.number, trial.state, trial.value)

    def _judge(self, number: int, epoch: int, value: float) -> bool:
        with self._lock:
            return self._search.report(number, epoch, value)

    def _end_if_told(self, trial: Trial) -> None:
        if self._order == "leave":
            raise Left
        if self._order:
            raise Ends(trial.ended("stopped", WHY_STOPPED[self._order]))

    def _training(self, trial: Trial) -> Training:
        return Training(folder_of(self._whole.folder, trial.number), secrets=self._shared.secrets)

    def _tell(self) -> None:
        """Progress for whoever watches, and the time spent so far for the next worker."""
        with self._lock:
            best, counts = self.best(), self.counts()
            running = sum(one.state == "running" for one in self.trials)
        note = f"{running} running" + (f", {counts['pruned']} pruned" if counts["pruned"] else "")
        if best is not None:
            note += f", best {self._shared.metric} {best.value:.4g} in {best.name}"
        self._job.progress(sum(counts.values()), self._shared.trials, note)
        self._whole.write("now.json", {"spent_s": round(self.spent, 1), "slots": self._slots.why if self._slots else ""})
