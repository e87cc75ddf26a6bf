"""MlflowTracker: training runs and registered models on an MLflow tracking server."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from workbench.errors import Conflict, Invalid, NotFound, Unavailable, WorkbenchError
from workbench.ports import RegisteredModel

# MLflow's own defaults (7 retries with doubling pauses, 120 s each) keep a page waiting for minutes on an absent
# server.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
# Else each end of a run is a print, and one more request for what is in it.
QUIET = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
STATUSES = ("FINISHED", "FAILED", "KILLED")
PER_REQUEST = {"params": 100, "metrics": 800, "tags": 100}  # MLflow's REST API, "Request Limits": 1000 together
PAGE = 200
# Codes by what they mean to a person; every other one is a server in trouble.
NOT_FOUND = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "ENDPOINT_NOT_FOUND")
INVALID = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "MALFORMED_REQUEST")
CONFLICT = ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS", "RESOURCE_CONFLICT")


class MlflowTracker:
    """A Tracker on the MLflow server at `url`; credentials in it go to MLflow's client and leave the address."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
        self._login = (unquote(parts.username or ""), unquote(parts.password or ""))
        self._opened: Any = None
        # Run id -> (its experiment's id, where its files lie): neither changes, and asking costs as much as storing.
        self._places: dict[str, tuple[str, str]] = {}

    def start_run(self, experiment: str, name: str, tags: dict[str, str], parent: str | None = None,
                  is_first: bool = False) -> str:
        with self._asking(f"start run {name!r}") as client:
            whole = self._places.get(parent or "")
            experiment_id = whole[0] if whole else self._experiment(client, experiment, create=True)
            if "job" in tags and not is_first:
                found = client.search_runs([experiment_id], f"tags.job = {_quoted(tags['job'])}", max_results=1,
                                           order_by=["attributes.start_time ASC"])
                if found:
                    return self._place(found[0])
            nested = {} if parent is None else {"mlflow.parentRunId": parent}
            return self._place(client.create_run(experiment_id, tags={**tags, **nested}, run_name=name))

    def log(self, run_id: str, params: dict[str, Any] | None = None, metrics: dict[str, float] | None = None,
            tags: dict[str, str] | None = None, step: int = 0) -> None:
        with self._asking(f"log to run {run_id}") as client:
            from mlflow.entities import Metric, Param, RunTag
            now = int(time.time() * 1000)
            rows = {"params": [Param(key, str(value)) for key, value in (params or {}).items()],
                    "metrics": [Metric(key, float(value), now, step) for key, value in (metrics or {}).items()],
                    "tags": [RunTag(key, str(value)) for key, value in (tags or {}).items()]}
            while any(rows.values()):
                client.log_batch(run_id, **{kind: rows[kind][:limit] for kind, limit in PER_REQUEST.items()})
                rows = {kind: rows[kind][limit:] for kind, limit in PER_REQUEST.items()}

    def log_steps(self, run_id: str, rows: dict[int, dict[str, float]]) -> None:
        with self._asking(f"log to run {run_id}") as client:
            from mlflow.entities import Metric
            now, limit = int(time.time() * 1000), PER_REQUEST["metrics"]
            metrics = [Metric(key, float(value), now, step) for step, row in rows.items() for key, value in row.items()]
            for start in range(0, len(metrics), limit):
                client.log_batch(run_id, metrics=metrics[start:start + limit])

    def log_files(self, run_id: str, files: Path, folder: str) -> None:
        if not files.exists():
            raise Invalid(f"There is no file or folder {files} to store with run {run_id}.")
        with self._asking(f"store {files.name!r} with run {run_id}") as client:
            kept = self._files(client, run_id)
            (kept.log_artifacts if files.is_dir() else kept.log_artifact)(str(files), folder)

    def delete_files(self, run_id: str, folder: str) -> None:
        with self._asking(f"remove {folder!r} of run {run_id}") as client:
            # MLflow's client has no word for it; its `mlflow gc` deletes the same way.
            kept = self._files(client, run_id)
            if kept.list_artifacts(folder):
                kept.delete_artifacts(folder)

    def runs(self, experiment: str, limit: int = 50) -> list[dict[str, Any]]:
        with self._asking(f"list the runs of {experiment!r}") as client:
            experiment_id = self._experiment(client, experiment, create=False)
            if experiment_id is None or limit < 1:
                return []
            runs, token = [], None
            while len(runs) < limit:
                page = client.search_runs([experiment_id], max_results=min(PAGE, limit - len(runs)), page_token=token,
                                          order_by=["attributes.start_time DESC"])
                runs += page
                token = page.token
                if not token:
                    break
        return [_run(run) for run in runs]

    def run(self, run_id: str) -> dict[str, Any]:
        with self._asking(f"read run {run_id}") as client:
            return _run(client.get_run(run_id))

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        with self._asking(f"read {metric!r} of run {run_id}") as client:
            client.get_run(run_id)  # the history of a run that does not exist would come back empty
            points = client.get_metric_history(run_id, metric)
        return [(point.step, point.value) for point in sorted(points, key=lambda point: (point.step, point.timestamp))]

    def finish_run(self, run_id: str, status: str) -> None:
        if status not in STATUSES:
            raise Invalid(f"A run ends as one of {', '.join(STATUSES)}, not {status!r}.")
        with self._asking(f"finish run {run_id}") as client:
            client.set_terminated(run_id, status)

    def artifacts(self, run_id: str, folder: str, to: Path) -> Path:
        with self._asking(f"fetch {folder!r} of run {run_id}") as client:
            if not client.list_artifacts(run_id, folder):
                raise NotFound(f"Run {run_id} has no files under {folder!r}. See {self.url} for what it stored.")
            to.mkdir(parents=True, exist_ok=True)
            return Path(client.download_artifacts(run_id, folder, str(to)))

    def register(self, name: str, run_id: str, folder: str, tags: dict[str, str]) -> RegisteredModel:
        with self._asking(f"register {name!r} from run {run_id}") as client:
            run = client.get_run(run_id)
            try:
                client.create_registered_model(name)
            except _exception() as error:
                if error.error_code not in CONFLICT:
                    raise
            found = client.search_model_versions(f"name = {_quoted(name)} and run_id = {_quoted(run_id)}")
            made = found[0] if found else client.create_model_version(
                name, f"{run.info.artifact_uri.rstrip('/')}/{folder}", run_id, tags=dict(tags))
            return _registered(made, client.get_registered_model(name).aliases)

    def versions(self, name: str) -> list[RegisteredModel]:
        with self._asking(f"list the versions of {name!r}") as client:
            try:
                aliases = client.get_registered_model(name).aliases
            except _exception() as error:
                if error.error_code in NOT_FOUND:
                    return []
                raise
            versions, token = [], None
            while True:
                page = client.search_model_versions(f"name = {_quoted(name)}", max_results=PAGE, page_token=token)
                versions += page
                token = page.token
                if not token:
                    break
        versions.sort(key=lambda version: int(version.version), reverse=True)
        return [_registered(version, aliases) for version in versions]

    def set_alias(self, name: str, alias: str, version: str) -> None:
        with self._asking(f"make {name!r} version {version} the {alias}") as client:
            client.set_registered_model_alias(name, alias, str(version))

    def by_alias(self, name: str, alias: str) -> RegisteredModel | None:
        return next((version for version in self.versions(name) if alias in version.aliases), None)

    def run_url(self, run_id: str) -> str:
        with self._asking(f"find run {run_id}") as client:
            return f"{self.url}/#/experiments/{client.get_run(run_id).info.experiment_id}/runs/{run_id}"

    def _files(self, client: Any, run_id: str) -> Any:
        """MLflow's ArtifactRepository of a run."""
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
        if run_id not in self._places:
            self._place(client.get_run(run_id))
        return get_artifact_repository(self._places[run_id][1], tracking_uri=self.url)

    def _place(self, run: Any) -> str:
        self._places[run.info.run_id] = (run.info.experiment_id, run.info.artifact_uri)
        return run.info.run_id

    def _experiment(self, client: Any, name: str, create: bool) -> str | None:
        found = client.get_experiment_by_name(name)
        if found is None and create:
            try:
                return client.create_experiment(name)
            except _exception() as error:
                if error.error_code not in CONFLICT:
                    raise
                found = client.get_experiment_by_name(name)  # somebody made it between our two questions
        if found is not None and found.lifecycle_stage == "deleted" and create:
            raise Conflict(f"MLflow's experiment {name!r} was deleted. Restore it (`mlflow experiments restore -x "
                           f"{found.experiment_id}`) or use another name.")
        return None if found is None else found.experiment_id

    @contextmanager
    def _asking(self, what: str) -> Iterator[Any]:
        """MLflow's client, with its errors told in our words."""
        import requests
        client, failure = self._client(), _exception()
        try:
            yield client
        except WorkbenchError:
            raise
        except failure as error:
            raise self._told(what, error.error_code, str(error.message)) from error
        except requests.RequestException as error:
            status = getattr(error.response, "status_code", None)
            raise self._told(what, "NOT_FOUND" if status == 404 else "", str(error)) from error

    def _told(self, what: str, code: str, text: str) -> WorkbenchError:
        text = " ".join(text.split())[:400]
        if code in NOT_FOUND:
            return NotFound(f"Cannot {what}: MLflow at {self.url} does not have it. {text}")
        if code in INVALID:
            return Invalid(f"Cannot {what}: MLflow refuses it. {text}")
        if code in CONFLICT:
            return Conflict(f"Cannot {what}: it is there already. {text}")
        return Unavailable(f"Cannot {what}: MLflow at {self.url} does not answer as it should. Start it "
                           f"(`workbench up`) or mend the setting mlflow_url, then try again. {text}")

    def _client(self) -> Any:
        if self._opened is None:
            for name, value in {**PATIENCE, **QUIET}.items():
                os.environ.setdefault(name, value)
            # The only way into MLflow's client that keeps a password out of addresses, and so out of its error texts.
            for name, value in zip(("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"), self._login):
                if value:
                    os.environ[name] = value
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            try:
                from mlflow import MlflowClient
            except ImportError as error:
                raise Unavailable("The package mlflow is not installed; it keeps the runs. `pip install mlflow`.") from error
            self._opened = MlflowClient(tracking_uri=self.url, registry_uri=self.url)
        return self._opened


def _exception() -> type[Exception]:
    from mlflow.exceptions import MlflowException
    return MlflowException


def _run(run: Any) -> dict[str, Any]:
    return {"run_id": run.info.run_id, "name": run.info.run_name, "status": run.info.status,
            "started_at": _iso(run.info.start_time), "finished_at": _iso(run.info.end_time),
            "params": dict(run.data.params), "metrics": dict(run.data.metrics),
            "tags": {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")}}


def _registered(version: Any, aliases: dict[str, str]) -> RegisteredModel:
    # The aliases of the registered model: a search's model versions may come without theirs (MlflowClient's docs).
    ours = tuple(sorted(alias for alias, number in aliases.items() if str(number) == str(version.version)))
    return RegisteredModel(name=version.name, version=str(version.version), run_id=version.run_id or "", aliases=ours,
                           tags=dict(version.tags), created_at=_iso(version.creation_timestamp))


def _quoted(value: str) -> str:
    """A string in MLflow's filter language, which knows no escape for the quote around it."""
    for quote in ("'", '"'):
        if quote not in value:
            return f"{quote}{value}{quote}"
    raise Invalid(f"MLflow cannot search for {value!r}: it has both kinds of quotes.")


def _iso(milliseconds: int | None) -> str:
    if not milliseconds:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).isoformat(timespec="milliseconds")
