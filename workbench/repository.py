"""Repository: another git repository that a recipe may come from; addresses checked, fetched into private mirrors."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from urllib.parse import unquote, urlsplit

from workbench.errors import Invalid, NotFound, Unavailable
from workbench.recipe import NO_PROGRAMS, git

FETCH_S = 300
FORMS = "https://host/path, ssh://git@host/path or an absolute path of this machine"
# Nothing that a URL, a shell or an option parser gives a meaning to.
_SEGMENT = re.compile(r"[A-Za-z0-9._~][A-Za-z0-9._~+-]*")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_SHA = re.compile(r"[0-9a-f]{40}")
# Proxies, certificates and the key agent of whoever runs the workbench; no tokens.
_PASSED_ON = ("PATH", "HOME", "SSH_AUTH_SOCK", "SSL_CERT_FILE", "http_proxy", "https_proxy", "HTTPS_PROXY", "no_proxy",
              "NO_PROXY")


@dataclass(frozen=True)
class Repository:
    """address: as git is given it, never with credentials; scheme: https, ssh or file; parts: what lists compare."""

    address: str
    scheme: str
    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.parts[-1]

    def lies_below(self, other: Repository) -> bool:
        return self.parts[:len(other.parts)] == other.parts


def read_address(text: str) -> Repository:
    """Raises Invalid for what is no address of a git repository in one of FORMS.

    The sentence never repeats the address: it may hold a password.
    """
    if not text or len(text) > 1000 or not text.isprintable():
        raise Invalid(f"git_uri must be one line that reads {FORMS}.")
    if text.startswith("/"):
        return _local(text)
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError as error:
        raise Invalid(f"git_uri is no address ({error}); write {FORMS}.") from None
    if url.scheme == "file" and text.startswith("file://"):
        if url.netloc not in ("", "localhost") or url.query or url.fragment:
            raise Invalid("A file:// git_uri names a path of this machine: file:///path, without host, ? and #.")
        return _local(unquote(url.path))
    if url.scheme not in ("https", "ssh") or "://" not in text:
        raise Invalid(f"git_uri must read {FORMS}; other transports, options and git@host:path are not taken.")
    if url.password is not None or (url.scheme == "https" and "@" in url.netloc):
        raise Invalid("git_uri carries credentials. Leave them out and give them to git on the worker's machine (a "
                      "credential helper or an ssh key); they would be stored with the job and the run.")
    if url.query or url.fragment or "?" in text or "#" in text:
        raise Invalid("git_uri has a ? or #; leave it out, the commit goes into commit_hash.")
    path = url.path.strip("/")
    segments = path.split("/") if path else []
    host = url.hostname or ""
    place = (f"[{host}]" if ":" in host else host) + (f":{port}" if port is not None else "")
    # What stands around brackets is passed over by urlsplit.
    is_host = _HOST.fullmatch(host) or _is_ipv6(host)
    if (not is_host or "[" in url.netloc and url.netloc.rpartition("@")[2].lower() != place
            or url.username is not None and not _USER.fullmatch(url.username)
            or any(one in (".", "..") or not _SEGMENT.fullmatch(one) for one in segments)):
        raise Invalid(f"git_uri has a host, user or path that git could read as something else; write {FORMS} with "
                      "letters, digits, . _ ~ + - only.")
    user = f"{url.username}@" if url.username else ""
    return Repository(f"{url.scheme}://{user}{place}/{path}", url.scheme, _bare(url.scheme, place, *segments))


def allowed_list(setting: str) -> tuple[Repository, ...]:
    """The setting retrain_repositories, read. Raises Invalid."""
    found = []
    for number, entry in enumerate((one.strip() for one in setting.split(",") if one.strip()), start=1):
        try:
            found.append(read_address(entry))
        except Invalid as error:
            raise Invalid(f"Setting retrain_repositories, entry {number}: {error}") from error
    return tuple(found)


def permitted(text: str, allowed: str, project: Path) -> Repository:
    """The repository at an address, when it is the project's own checkout or lies below an entry of `allowed`, the
    setting retrain_repositories. Raises Invalid."""
    repository = read_address(text)
    if repository.parts == _local(str(project)).parts or any(map(repository.lies_below, allowed_list(allowed))):
        return repository
    raise Invalid("This git_uri is not among the repositories that may be trained from. Add it, or the folder or host "
                  "it lies in, to the setting retrain_repositories and start the workbench again.")


def check_commit(commit: str) -> str:
    """Raises Invalid unless it is a full SHA-1; a branch moves, and a short one may come to mean another commit."""
    if not _SHA.fullmatch(commit):
        raise Invalid("commit_hash must be a full commit hash, 40 lower-case hexadecimal digits, no branch or tag: "
                      "see `git rev-parse HEAD`. Repositories whose hashes are SHA-256 are not taken.")
    return commit


def check_location(location: str) -> str:
    """The folder of an MLproject inside its repository; "." for the top. Raises Invalid."""
    location = location.strip("/") if not location.startswith("/") else location
    if location in ("", "."):
        return "."
    for segment in location.split("/"):
        if segment in (".", "..") or segment.lower() == ".git" or not _SEGMENT.fullmatch(segment):
            raise Invalid("MLproject_location must be a folder inside the repository (models/student, or . for its "
                          "top), without '..' and not from '/', of letters, digits, . _ ~ + -.")
    return location


def fetch(repository: Repository, commit: str, location: str, mirrors: Path, check: Callable[[], None]) -> Path:
    """The private bare mirror of a repository below `mirrors`, with the commit in it.

    Only branches and tags are fetched: a host's refs of pull requests are by strangers. A commit that is there already
    is not asked for again. `check` is called while git works and may raise.

    Raises Invalid when git fails, the repository has no such commit on a branch or tag or it has submodules, NotFound
    when it has no MLproject there, Unavailable when git takes longer than FETCH_S.
    """
    check_commit(commit)
    mirrors.mkdir(parents=True, exist_ok=True)
    mirror = mirrors / f"outside-{sha256(repository.address.encode()).hexdigest()[:16]}.git"
    with open(mirror.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not mirror.exists():
            half = mirror.with_suffix(".half")
            shutil.rmtree(half, ignore_errors=True)
            try:
                git(mirrors, "init", "--quiet", "--bare", "--template=", "--", str(half))
                _fetch(repository, half, check)
                half.rename(mirror)
            finally:
                shutil.rmtree(half, ignore_errors=True)
        elif not _has(mirror, commit):
            _fetch(repository, mirror, check)
        if not _has(mirror, commit):
            raise Invalid(f"{repository.address} has no commit {commit} on a branch or tag. Push it, and give the hash "
                          "that `git rev-parse HEAD` tells.")
    listed = git(mirror, "ls-tree", "-r", "-z", "--full-tree", commit, "--").split("\0")
    submodules = [entry.partition("\t")[2] for entry in listed if entry.startswith("160000 ")]
    if submodules:
        raise Invalid(f"Commit {commit[:12]} of {repository.address} has submodules ({', '.join(submodules[:5])}), "
                      "which are not fetched. Commit what the training needs into the repository itself.")
    file = "MLproject" if location == "." else f"{location}/MLproject"
    if not any(entry.startswith("100") and entry.partition("\t")[2] == file for entry in listed):
        raise NotFound(f"Commit {commit[:12]} of {repository.address} has no file {file}. Name the folder that has it "
                       "as MLproject_location.")
    return mirror


def _local(path: str) -> Repository:
    if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise Invalid("A git_uri on this machine must be an absolute path without '..'.")
    # Links are followed before lists are asked, and git gets what they led to.
    real = os.path.realpath(path)
    return Repository(real, "file", ("file", *Path(real).parts[1:]))


def _is_ipv6(host: str) -> bool:
    try:
        return isinstance(ip_address(host), IPv6Address) and "%" not in host
    except ValueError:
        return False


def _bare(scheme: str, place: str, *segments: str) -> tuple[str, ...]:
    """x and x.git are one repository."""
    return (scheme, place.lower(), *segments[:-1], *(one.removesuffix(".git") for one in segments[-1:]))


def _has(mirror: Path, commit: str) -> bool:
    try:
        return git(mirror, "cat-file", "-t", commit).strip() == "commit"
    except Invalid:
        return False


def _fetch(repository: Repository, mirror: Path, check: Callable[[], None]) -> None:
    refs = ["+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*"]
    # Redirects could lead from a listed host to one that is not.
    command = [*NO_PROGRAMS, "-c", "http.followRedirects=false", "-c", "http.lowSpeedLimit=1000",
               "-c", "http.lowSpeedTime=60", "-C", str(mirror), "fetch", "--quiet", "--no-prune", "--no-tags",
               "--force", "--no-recurse-submodules", "--", repository.address, *refs]
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment |= {"LC_ALL": "C.UTF-8", "GIT_TERMINAL_PROMPT": "0", "GIT_PROTOCOL_FROM_USER": "0",
                    # Before any protocol.*.allow in a configuration file; the worker's insteadOf may not change it.
                    "GIT_ALLOW_PROTOCOL": repository.scheme,
                    "GIT_SSH_COMMAND": "ssh -oBatchMode=yes -oConnectTimeout=20"}
    with open(mirror / "fetch.log", "w+b") as said:
        try:
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                                       start_new_session=True)
        except FileNotFoundError as error:
            raise Unavailable("git is not installed; install it (Debian, Ubuntu: apt-get install git).") from error
        until = time.monotonic() + FETCH_S
        try:
            while process.poll() is None:
                check()
                if time.monotonic() > until:
                    raise Unavailable(f"Fetching {repository.address} did not end within {FETCH_S} s; try again.")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # git fetches through processes of its own
                process.wait()
        if process.returncode:
            said.seek(max(0, said.seek(0, os.SEEK_END) - 600))
            text = re.sub(r"://[^/@\s]+@", "://***@", said.read().decode(errors="replace")).strip(" .\n")
            raise Invalid(f"git could not fetch {repository.address}: {text}. Look at the address, and whether the "
                          "worker's machine may read it (`git ls-remote` there).")
