"""A deployment for a real Nuclio: its function object with our handler inside, or the same as a folder in a zip."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from workbench.errors import Invalid
from workbench.formats.nuclio import DETECTOR, Function
from workbench.model import ModelCard

HANDLER = Path(__file__).with_name("nuclio_handler.py")
# CVAT sends base64 of the original picture; fasthttp's own limit of 4 MiB is less than a photograph.
MOST_BYTES = 32 << 20
README = """# {ref} as a Nuclio function for CVAT

The model stays in the workbench; this function asks it over HTTP. Deploy with

    nuctl create project cvat --platform local
    nuctl deploy --project-name cvat --path . --platform local

- `WORKBENCH_URL` in function.yaml is where the function's container reaches the workbench's HTTP service: {url}
- `WORKBENCH_TOKEN` must be the workbench's `service_token`, when it has one. It is not in this file.
- The name in that address must be among the workbench's `allowed_hosts`, unless it is localhost or 127.0.0.1.
"""


def nuclio_function(function: Function, card: ModelCard, url: str, token: str = "") -> dict[str, Any]:
    """What POST /api/functions of Nuclio takes: the function with its source inside. url: the workbench's HTTP service.

    Raises Invalid for a tracker and for masks: this function speaks /v1/predict, which knows boxes, polygons and tags.
    """
    if function.kind != DETECTOR or function.draws == "mask":
        raise Invalid(
            "A Nuclio function draws boxes, polygons or tags. Trackers and masks are served by the workbench's "
            "own gateway: deploy to CVAT without Nuclio."
        )
    made = deepcopy(function.described(card, 0))
    del made["status"]
    made["spec"] |= {
        "eventTimeout": "115s",
        "env": [
            {"name": "WORKBENCH_URL", "value": url},
            {"name": "WORKBENCH_MODEL", "value": card.ref},
            {"name": "WORKBENCH_RENAMES", "value": json.dumps(function.renames)},
            {"name": "WORKBENCH_TOKEN", "value": token},
        ],
        "triggers": {
            "http": {
                "kind": "http",
                "numWorkers": 2,
                "maxWorkers": 2,
                "workerAvailabilityTimeoutMilliseconds": 60_000,
                "attributes": {"maxRequestBodySize": MOST_BYTES},
            }
        },
        "build": {"functionSourceCode": base64.b64encode(HANDLER.read_bytes()).decode()},
    }
    return made


def bundle(function: Function, card: ModelCard, url: str) -> bytes:
    """A zip of function.yaml, main.py and README.md, for `nuctl deploy`. It holds no secret."""
    made = nuclio_function(function, card, url)
    del made["spec"]["build"]
    files = {
        "function.yaml": yaml.safe_dump(made, sort_keys=False, allow_unicode=True),
        "main.py": HANDLER.read_text(),
        "README.md": README.format(ref=card.ref, url=url),
    }
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            # A fixed time, so that the same deployment is the same file.
            archive.writestr(zipfile.ZipInfo(f"{function.name}/{name}", (2020, 1, 1, 0, 0, 0)), text)
    return packed.getvalue()
