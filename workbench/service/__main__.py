"""The HTTP service as a process: `python -m workbench.service`, what `workbench up` starts.

Not uvicorn's own command line: it listens on one port only, and cannot write a sentence into a status line.
"""

from __future__ import annotations

import argparse
import socket
import sys
from dataclasses import replace

import uvicorn
from uvicorn.supervisors import Multiprocess

from workbench.config import Config
from workbench.errors import Conflict, WorkbenchError
from workbench.supervise.guard import STOP_S


def main() -> None:
    """Serves until it is told to end."""
    config, parser = Config.read(), argparse.ArgumentParser(prog="python -m workbench.service")
    parser.add_argument("--host", default=config.host)
    parser.add_argument("--port", type=int, default=config.service_port)
    given = parser.parse_args()
    config = replace(config, host=given.host, service_port=given.port)
    # Requests that are being answered are, before the supervisor's patience ends.
    settings = uvicorn.Config(
        "workbench.service.app:create",
        factory=True,
        host=config.host,
        port=config.service_port,
        # By its name: the processes of several workers open it anew.
        http="workbench.service.sentences:Speaking",
        workers=config.service_workers,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=STOP_S - 3,
    )
    listening = [_listen(config.host, config.service_port, "service_port")]
    if config.gateway_port:
        listening.append(_listen(config.gateway_host or config.host, config.gateway_port, "gateway_port"))
    if config.service_workers > 1:
        Multiprocess(settings, sockets=listening).run()
    else:
        server = uvicorn.Server(settings)
        server.run(sockets=listening)
        if not server.started:
            sys.exit(3)


def _listen(host: str, port: int, setting: str) -> socket.socket:
    try:
        opened = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        raise Conflict(
            f"The service cannot listen on port {port} of {host or 'all addresses'} ({error.strerror}). Free "
            f"it, or change the setting {setting}."
        ) from error
    # Inherited by the connections. asyncio sets it only on sockets made with proto=IPPROTO_TCP; without it the second
    # packet of every answer waits 40 ms for the client's delayed acknowledgement.
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    opened.set_inheritable(True)
    return opened


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except WorkbenchError as error:
        sys.exit(str(error))
