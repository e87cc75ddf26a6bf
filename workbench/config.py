"""The only reader of environment variables and of the settings file; the only place where secrets are."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import urlsplit

from workbench.errors import Invalid


@dataclass(frozen=True)
class Config:
    """Settings: environment `WORKBENCH_<NAME>` over `<home>/settings.toml` over the defaults here.

    home               everything the embedded parts keep: blobs, repositories, databases, logs
    *_url              an outside server instead of the embedded part; empty means embedded
    *_port             loopback ports of the embedded parts
    host               where the embedded parts listen; 0.0.0.0 only behind something that checks who comes in
    allowed_hosts      names besides loopback under which the HTTP parts may be addressed, comma-separated
    service_workers    processes of the HTTP service; each opens models of its own and has its share of the threads
    predict_queue      images that predict holds at once in each process; a request may have as many at most
    predict_batch_ms   how long a batch waits for images that are just being decoded
    predict_models     models that predict keeps open at once in each process
    predict_body_mb    largest body of a predict request in MiB
    service_token      what the HTTP service asks for as a bearer token; empty: nothing
    gateway_port       a port of its own for CVAT's calls; 0: the HTTP service's
    gateway_host       where that port listens; empty: as `host`
    gateway_allow      addresses CVAT may call from, comma-separated networks (172.18.0.0/16); CVAT sends no password
    gateway_url        how CVAT reaches the gateway, where that is not how this machine does
    gateway_body_mb    largest body of a call by CVAT in MiB
    cvat_look_s        how often CVAT is asked what its webhooks may have missed, in seconds; 0: never
    cvat_publish       what becomes of accepted work: "ask" offers the next version, "publish" publishes it at once
    retrain_repositories  git repositories besides this project's that trainings may run, comma-separated:
                       https://host/path, ssh://host/path or paths, each with all below it
    retrain_queue      trainings that may wait; POST /retrain answers 429 beyond
    retrain_look_s     how often the rules that start trainings by themselves are looked at, in seconds; 0: never
    retrain_environment   what trainings run in: "current", the workbench's own Python, or "locked", built from the lock of
                       their recipe
    retrain_wall_s, retrain_cpu_s, retrain_processes, retrain_disk_mb, retrain_log_mb  what a training may take, with
                       all its processes: seconds, seconds of processor time, processes at once, MiB written, MiB
                       printed; 0: no limit
    retrain_memory_percent  memory a training may hold, of this machine's or container's; 0: no limit
    retrain_free_disk_mb   MiB that stay free on the disk of `home`: trainings end before
    worker_lanes       what this machine's workers take, comma-separated: cpu (all but trainings), train, gpu (trainings
                       that ask for one); empty: all, gpu only where there is an NVIDIA card
    worker_dead_s      silence after which a worker on another machine counts as dead and its jobs are taken up, in
                       seconds; the same for all workers of one database
    machine_name       what workers call this machine; empty: its host name
    nuclio_url         dashboard of a Nuclio server that models can be deployed to instead
    discord_webhook    a Discord channel's webhook that is told of trainings and promotions; a secret; empty: nobody is
    notify_urls        further channels as apprise addresses, separated by commas or spaces; secrets
    public_url         where people's browsers reach MLflow, for links in messages; empty: as this machine does
    person             who acts when nobody has signed in
    """

    home: Path
    host: str = "127.0.0.1"
    ui_port: int = 8501
    service_port: int = 8600
    mlflow_port: int = 8650
    fiftyone_port: int = 8651
    mongo_port: int = 8652
    mlflow_url: str = ""
    mongo_url: str = ""
    fiftyone_url: str = ""
    database_url: str = ""
    blobs_url: str = ""
    person: str = "me"
    backend: str = "openvino"
    threads: int = 0
    cvat_url: str = ""
    cvat_token: str = ""
    service_token: str = ""
    service_workers: int = 1
    predict_queue: int = 128
    predict_batch_ms: int = 2
    predict_models: int = 3
    predict_body_mb: int = 64
    allowed_hosts: str = ""
    gateway_port: int = 0
    gateway_host: str = ""
    gateway_allow: str = "127.0.0.0/8, ::1/128"
    gateway_url: str = ""
    gateway_body_mb: int = 32
    retrain_repositories: str = ""
    retrain_queue: int = 20
    retrain_environment: str = "current"
    retrain_wall_s: int = 86400
    retrain_cpu_s: int = 0
    retrain_memory_percent: int = 80
    retrain_processes: int = 512
    retrain_disk_mb: int = 51200
    retrain_log_mb: int = 64
    retrain_free_disk_mb: int = 1024
    retrain_look_s: int = 15
    worker_lanes: str = ""
    worker_dead_s: int = 30
    machine_name: str = ""
    nuclio_url: str = ""
    cvat_look_s: int = 60
    cvat_publish: str = "ask"
    discord_webhook: str = ""
    notify_urls: str = ""
    public_url: str = ""

    @classmethod
    def read(cls, home: str | Path | None = None, environ: dict[str, str] | None = None) -> Config:
        """Raises Invalid for a setting that does not exist or is not of its type, naming it and where it was set."""
        environ = dict(os.environ if environ is None else environ)
        home = Path(home or environ.get("WORKBENCH_HOME") or Path.home() / ".workbench").expanduser().resolve()
        types = {field.name: field.type for field in fields(cls) if field.name != "home"}
        values: dict[str, object] = {}
        file = home / "settings.toml"
        if file.exists():
            try:
                settings = tomllib.loads(file.read_text())
            except tomllib.TOMLDecodeError as error:
                raise Invalid(f"{file} is not TOML: {error}. Mend the file or remove it.") from error
            for name, value in settings.items():
                if name not in types:
                    raise Invalid(f"{file} sets {name!r}, which is no setting. Settings: {', '.join(types)}.")
                values[name] = _typed(name, types[name], value, str(file))
        for name in types:
            value = environ.get(f"WORKBENCH_{name.upper()}")
            if value is not None:
                values[name] = _typed(name, types[name], value, f"WORKBENCH_{name.upper()}")
        return cls(home=home, **values)

    def __repr__(self) -> str:
        """Secrets and credentials in addresses never show."""
        return f"Config(home={str(self.home)!r}, host={self.host!r}, ui_port={self.ui_port})"

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must never be shown: tokens, addresses that are secrets, passwords in addresses."""
        addresses = (self.mlflow_url, self.mongo_url, self.fiftyone_url, self.database_url, self.blobs_url, self.cvat_url)
        found = {self.service_token, self.cvat_token, self.discord_webhook, *re.split(r"[,\s]+", self.notify_urls),
                 *(urlsplit(one).password or "" for one in addresses)}
        # What is shorter is a word that many a log has.
        return tuple(sorted((one for one in found if len(one) >= 6), key=len, reverse=True))

    @property
    def blobs(self) -> str:
        return self.blobs_url or str(self.home / "blobs")

    @property
    def database(self) -> str:
        """SQLAlchemy URL of jobs and records."""
        return self.database_url or f"sqlite:///{self.home / 'workbench.sqlite'}"

    @property
    def address(self) -> str:
        """Where a part of this machine is reached: 0.0.0.0 is a place to listen, not one to call."""
        return "127.0.0.1" if self.host in ("0.0.0.0", "::", "") else self.host

    @property
    def mlflow(self) -> str:
        return self.mlflow_url or f"http://{self.address}:{self.mlflow_port}"

    @property
    def mongo(self) -> str:
        return self.mongo_url or f"mongodb://{self.address}:{self.mongo_port}"

    @property
    def fiftyone(self) -> str:
        return self.fiftyone_url or f"http://{self.address}:{self.fiftyone_port}"

    @property
    def ui(self) -> str:
        return f"http://{self.address}:{self.ui_port}"

    @property
    def service(self) -> str:
        return f"http://{self.address}:{self.service_port}"

    @property
    def gateway(self) -> str:
        """Where this machine reaches what answers CVAT."""
        if not self.gateway_port:
            return self.service
        host = self.gateway_host or self.host
        return f"http://{'127.0.0.1' if host in ('0.0.0.0', '::', '') else host}:{self.gateway_port}"

    @property
    def service_metrics(self) -> Path:
        """Where several service processes keep the figures they count together; emptied when they start."""
        return self.home / "service-metrics"

    @property
    def worker_threads(self) -> int:
        return self.threads or os.cpu_count() or 1


def _typed(name: str, type_name: object, value: object, where: str) -> object:
    if str(type_name) == "int":
        try:
            return int(str(value))
        except ValueError:
            raise Invalid(f"{where}: {name} must be a whole number, got {value!r}.") from None
    if not isinstance(value, str):
        raise Invalid(f"{where}: {name} must be text, got {value!r}.")
    return value
