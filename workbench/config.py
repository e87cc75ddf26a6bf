"""The only reader of environment variables and of the settings file; the only place where secrets are."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from workbench.errors import Invalid


@dataclass(frozen=True)
class Config:
    """Settings: environment `WORKBENCH_<NAME>` over `<home>/settings.toml` over the defaults here.

    home               everything the embedded parts keep: blobs, repositories, databases, logs
    *_url              an outside server instead of the embedded part; empty means embedded
    *_port             loopback ports of the embedded parts
    host               where the embedded parts listen; 0.0.0.0 only behind something that checks who comes in
    allowed_hosts      names besides loopback under which the HTTP parts may be addressed, comma-separated
    service_token      what the HTTP service asks for as a bearer token; empty: nothing
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
    allowed_hosts: str = ""

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
