"""The looks at the rules that start trainings by themselves: a thread of the service, in each of its processes."""

from __future__ import annotations

import logging

from workbench.errors import Invalid, WorkbenchError
from workbench.service.looks import Looks
from workbench.steps.rules import RULES, look
from workbench.wiring import Workbench

LOG = logging.getLogger(__name__)


class RuleLooks(Looks):
    """Looks every `retrain_look_s` seconds while the service runs; what several processes decide at once is done once.

    Raises Invalid for a setting below 0.
    """

    def __init__(self, workbench: Workbench) -> None:
        every_s = workbench.config.retrain_look_s
        if every_s < 0:
            raise Invalid(f"Setting retrain_look_s must be 0 or more, is {every_s}.")
        super().__init__("the rules", every_s)
        self._workbench = workbench

    def look_once(self) -> None:
        """One look at every data set that has a rule; a failure is told in the log and costs the others nothing."""
        workbench = self._workbench
        for dataset in sorted({entry.dataset for entry in workbench.records.entries(RULES, limit=10_000)}):
            if self.is_ending:
                return
            try:
                for event in look(dataset, store=workbench.datasets, models=workbench.models, records=workbench.records,
                                  submit=self._submit, find=self._is_there, waiting=self._waiting):
                    LOG.info("%s: %s", dataset, event.facts["told"])
            except WorkbenchError as error:
                LOG.warning("The rules of %s: %s", dataset, error)

    def _submit(self, kind: str, args: dict, person: str, key: str) -> str:
        return self._workbench.jobs.submit(kind, args, person=person, key=key)

    def _is_there(self, kind: str, key: str) -> bool:
        return self._workbench.jobs.find(kind, key) is not None

    def _waiting(self) -> list[dict]:
        return [job.args for state in ("queued", "running")
                for job in self._workbench.jobs.list(1000, "retrain", state)]
