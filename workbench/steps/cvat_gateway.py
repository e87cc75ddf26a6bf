"""Deploy to CVAT: which model versions CVAT's people find among their AI tools."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workbench.certificates import Certificates
from workbench.errors import Invalid, NotFound, WorkbenchError
from workbench.formats.nuclio import DETECTOR, DRAWS, TRACKER, Function
from workbench.inference.detector import OpenBackend
from workbench.inference.graph import read_graph
from workbench.inference.quantize import is_quantized
from workbench.model import ModelCard
from workbench.ports import ModelStore
from workbench.records import Records
from workbench.steps.certify import open_annotator

LOG = logging.getLogger(__name__)
LEDGER = "cvat_deployments"


@dataclass(frozen=True)
class Served:
    """A function deployed to CVAT. why_not: "" when CVAT is shown it, else why it is left out, with the next step.

    card  None when it cannot be read
    """

    function: Function
    card: ModelCard | None
    person: str
    at: str
    why_not: str = ""


def deploy_to_cvat(
    model: str,
    *,
    kind: str = DETECTOR,
    draws: str = "",
    renames: Mapping[str, str] | None = None,
    models: ModelStore,
    records: Records,
    certificates: Certificates,
    open_backend: OpenBackend,
    person: str,
    key: str | None = None,
) -> Function:
    """Opens the model as annotate would, then enters it into the ledger: CVAT is shown it from now on.

    draws    of a detector: default the first of DRAWS for the model's task
    renames  the model's label -> CVAT's, where they differ
    key      of the ledger's entry: one that is there already is not added again

    Deploying again with other settings replaces them. Raises NotFound, Invalid when the model is damaged, may not
    annotate (an INT8 model without a certificate) or cannot be what is asked for.
    """
    card = models.card(model)
    if kind == DETECTOR:
        draws = draws or DRAWS[card.task][0]
    function = Function(card.ref, kind, draws, dict(renames or {}))
    function.described(card, 0)
    with open_annotator(card.ref, models=models, open_backend=open_backend, certificates=certificates):
        is_int8 = bool(card.quantization) or is_quantized(read_graph(models.folder(card.ref) / card.onnx)[1])
    records.add(
        LEDGER,
        function.name,
        card.ref,
        person,
        {"deployed": True, "kind": kind, "draws": draws, "renames": function.renames, "int8": is_int8},
        key=key,
    )
    return function


def withdraw_from_cvat(name: str, *, records: Records, person: str, key: str | None = None) -> None:
    """CVAT is not shown the function any more; withdrawing it again changes nothing. Raises NotFound."""
    entries = records.entries(LEDGER, name, limit=1)
    if not entries:
        raise NotFound(f"Function {name!r} was never deployed to CVAT. The CVAT page lists those that are.")
    if entries[0].facts.get("deployed"):
        records.add(LEDGER, name, entries[0].subject, person, {**entries[0].facts, "deployed": False, "key": key}, key=key)


def served(*, models: ModelStore, records: Records, certificates: Certificates) -> list[Served]:
    """All functions that are deployed, newest first: one that cannot be shown says why and spoils no other."""
    found, names = [], set()
    for entry in records.entries(LEDGER, limit=10_000):
        if entry.dataset in names:
            continue
        names.add(entry.dataset)
        if entry.facts.get("deployed"):
            facts = entry.facts
            function = Function(
                entry.subject, facts.get("kind") or DETECTOR, facts.get("draws") or "", facts.get("renames") or {}
            )
            found.append(_served(function, entry.person, entry.at, facts, models, certificates))
    return found


def _served(
    function: Function, person: str, at: str, facts: dict[str, Any], models: ModelStore, certificates: Certificates
) -> Served:
    card = None
    try:
        card = models.card(function.model)
        function.described(card, 0)
        if facts.get("int8"):
            _check_certificate(card, certificates)
    except WorkbenchError as error:
        return Served(function, card, person, at, str(error))
    except Exception as error:  # a card that somebody edited fails in ways nobody foresaw
        LOG.error("Function %s cannot be described.", function.name, exc_info=error)
        return Served(
            function,
            card,
            person,
            at,
            f"Its card cannot be read ({type(error).__name__}: {error}). Register "
            "the model again under a new version, then deploy that.",
        )
    return Served(function, card, person, at)


def _check_certificate(card: ModelCard, certificates: Certificates) -> None:
    """What can be known without opening the model; the door itself (open_annotator) looks at every call."""
    kept = [one for one in certificates.of(card.ref) if one.get("file_sha256") == card.files[card.onnx]["sha256"]]
    if not kept or not kept[0].get("passed"):
        what = "failed its certificate" if kept else "has no certificate"
        raise Invalid(
            f"{card.ref} is an INT8 model and {what}, so it may not annotate. Run `workbench certify {card.ref} "
            "--version DATASET@VERSION`, or deploy the FP32 version."
        )


__all__ = ["DETECTOR", "TRACKER", "Served", "deploy_to_cvat", "served", "withdraw_from_cvat"]
