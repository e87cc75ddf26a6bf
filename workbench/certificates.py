"""Certificates: what a workbench keeps about its INT8 models, and whether one of them may annotate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.errors import Invalid
from workbench.inference import certificate
from workbench.records import Records


class Certificates:
    """The ledger "certificates" and the key that seals its entries; entries are only ever added.

    key_file  made on first use, readable by its owner alone
    """

    def __init__(self, records: Records, key_file: Path) -> None:
        self._records, self._key_file = records, Path(key_file)

    def of(self, model: str) -> list[dict[str, Any]]:
        """All certificates of a model version, newest first, in today's words (certificate.as_now)."""
        return [certificate.as_now(one) for one in self._sealed(model)]

    def add(self, facts: Mapping[str, Any], person: str) -> dict[str, Any]:
        """Seals the facts, keeps them and returns the certificate."""
        sealed = certificate.sign(facts, certificate.key(self._key_file))
        dataset = str(facts["on"]).partition("@")[0]
        self._records.add("certificates", dataset, facts["model"], person, sealed)
        return sealed

    def check(self, model: str, *, file_sha256: str, calibration_digest: str, report: Any) -> dict[str, Any]:
        """The newest certificate of this file on the backend and device of `report` (a BackendReport).

        Raises Invalid, naming the next step, when there is none or it does not allow the model to annotate.
        """
        kept = self._sealed(model)
        if not kept:
            raise Invalid(f"{model} is an INT8 model without a certificate, so it may not annotate. Run `workbench "
                          f"certify {model} --version DATASET@VERSION`, or annotate with the FP32 version.")
        here = [one for one in kept if (one.get("file_sha256"), one.get("backend"), one.get("device")) == (
            file_sha256, report.backend, report.device)]
        found = (here or kept)[0]
        certificate.verify(found, certificate.key(self._key_file), model=model, file_sha256=file_sha256,
                           backend=report.backend, device=report.device, library=report.library,
                           calibration_digest=calibration_digest)
        return certificate.as_now(found)

    def _sealed(self, model: str) -> list[dict[str, Any]]:
        """As they were signed."""
        return [entry.facts for entry in self._records.entries("certificates", subject=model)]
