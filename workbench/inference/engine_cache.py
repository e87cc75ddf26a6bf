"""EngineCache: the engines built on this machine, and nothing else; whoever deserialises one runs what it holds.

An engine is a program. So a file is handed out only when it was written here (its sidecar is sealed with a secret of
this folder), for exactly this key, and still has the digest it was written with. Everything else is refused and built
again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from workbench.errors import Invalid

logger = logging.getLogger("workbench.engines")


@dataclass(frozen=True)
class EngineKey:
    """All that an engine depends on; an engine of another key is another engine.

    onnx_sha256         of the graph with its weights
    library             "tensorrt 10.16.1.11"
    gpu, driver         as the driver names them; an engine is tuned for one card and one driver
    compute_capability  "8.6"
    profile, flags      how it was built (workbench.inference.engine.EngineOptions)
    """

    onnx_sha256: str
    library: str
    gpu: str
    compute_capability: str
    driver: str
    profile: str
    flags: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def of_timings(self) -> EngineKey:
        """The key of what was timed on this card: it holds for every graph."""
        return replace(self, onnx_sha256="", profile="")


class EngineCache:
    """Engines ("engine") and timing caches ("timing") in one private folder, which may be deleted at any time.

    Raises Invalid when the folder belongs to somebody else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.geteuid():
            raise Invalid(f"{self.folder} belongs to another user, who could place programs there as engines. Run: "
                          f"sudo chown -R $(id -u) {self.folder}")
        self.folder.chmod(0o700)

    def read(self, key: EngineKey, kind: str = "engine") -> bytes | None:
        """The bytes written for this key, or None when there are none; damaged or foreign ones are told in the log,
        taken away and None."""
        if not self._sidecar(key, kind).exists():
            return None
        record = self._record(key, kind)
        if not record:
            return self._refuse(key, kind, "it was not written by this workbench; engines are only built here")
        if record.get("key") != asdict(key):
            return self._refuse(key, kind, "it was written for another key")
        try:
            data = self._file(key, kind, record["sha256"]).read_bytes()
        except FileNotFoundError:
            return None  # another process is just replacing it
        found = hashlib.sha256(data).hexdigest()
        if found != record["sha256"]:
            return self._refuse(key, kind, f"its file has sha256 {found}, {record['sha256']} was written")
        return data

    def write(self, key: EngineKey, data: bytes, kind: str = "engine") -> None:
        """Puts `data` in place of what this key had. Whoever reads meanwhile gets the old or the new, never a mixture:
        the file is named by its own digest and the sidecar that names it comes last."""
        digest, before = hashlib.sha256(data).hexdigest(), self._record(key, kind).get("sha256", "")
        self._place(self._file(key, kind, digest), data)
        record: dict[str, Any] = {"key": asdict(key), "sha256": digest, "size_bytes": len(data)}
        self._place(self._sidecar(key, kind), json.dumps({**record, "seal": self._seal(record)}, indent=1).encode())
        if before not in ("", digest):
            self._file(key, kind, before).unlink(missing_ok=True)

    def forget(self, key: EngineKey, kind: str = "engine") -> None:
        self._sidecar(key, kind).unlink(missing_ok=True)
        for old in self.folder.glob(f"{key.digest[:32]}-*.{kind}"):
            old.unlink(missing_ok=True)

    def _record(self, key: EngineKey, kind: str) -> dict[str, Any]:
        """What the sidecar says; empty when there is none or it was not sealed here."""
        try:
            record = json.loads(self._sidecar(key, kind).read_bytes())
        except (OSError, ValueError):
            return {}
        if not isinstance(record, dict):
            return {}
        fits = hmac.compare_digest(str(record.get("seal")).encode(), self._seal(record).encode())
        return record if fits else {}

    def _refuse(self, key: EngineKey, kind: str, why: str) -> None:
        logger.warning("%s of %s is refused: %s. It is built again.", kind, self._sidecar(key, kind), why)
        self.forget(key, kind)

    def _sidecar(self, key: EngineKey, kind: str) -> Path:
        return self.folder / f"{key.digest[:32]}.{kind}.json"

    def _file(self, key: EngineKey, kind: str, digest: str) -> Path:
        return self.folder / f"{key.digest[:32]}-{digest[:32]}.{kind}"

    def _place(self, path: Path, data: bytes) -> None:
        handle, half = tempfile.mkstemp(dir=self.folder, prefix=".half-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(half, path)
        except BaseException:
            Path(half).unlink(missing_ok=True)
            raise

    def _seal(self, record: dict[str, Any]) -> str:
        told = json.dumps({name: value for name, value in record.items() if name != "seal"}, sort_keys=True)
        return hmac.new(self._secret(), told.encode(), "sha256").hexdigest()

    def _secret(self) -> bytes:
        """32 bytes that only this folder knows: who can write a file here but not read one cannot seal it."""
        path = self.folder / ".secret"
        if not path.exists():
            handle, half = tempfile.mkstemp(dir=self.folder, prefix=".half-")
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(32))
            try:
                os.link(half, path)  # unlike a rename it never replaces another process' secret
            except FileExistsError:
                logger.debug("%s was made by another process", path)
            finally:
                os.unlink(half)
        return path.read_bytes()
