"""The rule of imports in docs/architecture.md, held by reading every import statement of the project."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
WORDS = {"taxonomy", "annotation", "boxes", "dataset", "model", "run", "errors", "blobs", "config", "records", "quickstart",
         "certificates", "hooks", "notifications", "search_space", "capacity",
         "inference", "evaluation", "formats"}
# Who may import what of the workbench; a layer may always import itself unless it says otherwise.
ALLOWED = {
    "words": WORDS,
    "ports": WORDS,
    "steps": WORDS | {"ports", "steps", "recipe", "repository"},
    "recipe": WORDS | {"ports"},
    "repository": WORDS | {"recipe"},
    "adapters": WORDS | {"ports", "adapters"},  # only itself: test_adapters_do_not_import_each_other
    "wiring": WORDS | {"ports", "adapters", "jobs", "kinds"},
    "jobs": WORDS | {"ports", "jobs"},
    "kinds": WORDS | {"ports", "steps", "recipe", "repository", "wiring"},
    "outer": WORDS | {"ports", "steps", "recipe", "repository", "wiring", "jobs", "kinds", "supervise", "doctor", "service", "demo", "cli"},
}
# A vendor's library is imported only where it is driven.
VENDORS = {
    "fiftyone": {"workbench/adapters/fiftyone"}, "mlflow": {"workbench/adapters/mlflow", "models/"},
    "openvino": {"workbench/adapters/openvino"}, "onnxruntime": {"workbench/adapters/onnxruntime", "models/"},
    "torch": {"models/"}, "torchvision": {"models/"}, "timm": {"models/"}, "dbos": {"workbench/jobs"},
    "streamlit": {"app/", "pages/"}, "pymongo": {"workbench/adapters/fiftyone"}, "bson": {"workbench/adapters/fiftyone"},
    "fastapi": {"workbench/service/"}, "faster_coco_eval": {"workbench/evaluation/", "models/"},
    "tensorrt": {"workbench/adapters/tensorrt"}, "tensorrt_rtx": {"workbench/adapters/tensorrt"},
    "tensorrt_rtx_bindings": {"workbench/adapters/tensorrt"}, "pycuda": {"workbench/adapters/tensorrt"},
    "cuda": {"workbench/adapters/tensorrt"},
    "optuna": {"workbench/adapters/optuna"}, "apprise": {"workbench/adapters/apprise"}, "cvat_sdk": {"workbench/adapters/cvat"}, "github": {"workbench/adapters/github"},
}
HEAVY = ("torch", "fiftyone", "mlflow", "tensorrt", "pycuda", "streamlit", "openvino", "onnxruntime", "cv2", "dbos", "sqlalchemy")


def sources() -> list[Path]:
    return [path for folder in ("workbench", "app", "pages", "models") for path in sorted((PROJECT / folder).rglob("*.py"))]


def layer_of(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    if parts[0] != "workbench":
        return "outer"
    if parts[1] in WORDS or parts == ("workbench", "__init__"):
        return "words"
    return parts[1] if parts[1] in ALLOWED else "outer"


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is imported when the module is) of every import in a file."""
    tree = ast.parse(path.read_text())
    inner = {id(node) for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
             for node in ast.walk(function)}
    for node in ast.walk(tree):
        at_import = id(node) not in inner
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", at_import


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PROJECT)))
def test_a_file_imports_only_what_its_layer_may(path: Path) -> None:
    layer = layer_of(path)
    for name, _ in imports(path):
        parts = name.split(".")
        if path.is_relative_to(PROJECT / "models"):
            assert parts[0] not in ("workbench", "app", "pages"), f"a recipe stands alone, it imports {name}"
        elif parts[0] == "workbench" and len(parts) > 1 and parts[1] != "__version__":
            assert parts[1] in ALLOWED[layer], f"{layer} may not import {name}"
        elif parts[0] in ("app", "pages"):
            assert layer == "outer" and not path.is_relative_to(PROJECT / "workbench"), f"workbench may not import {name}"


def test_adapters_do_not_import_each_other() -> None:
    """An adapter may be a package; its files are one adapter."""
    for path in sorted((PROJECT / "workbench/adapters").rglob("*.py")):
        own = path.relative_to(PROJECT / "workbench/adapters").with_suffix("").parts[0]
        others = [name for name, _ in imports(path) if name.startswith("workbench.adapters.") and name.split(".")[2] != own]
        assert others == [], f"{path} imports {others}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PROJECT)))
def test_a_vendor_s_library_is_imported_only_where_it_is_driven(path: Path) -> None:
    place = path.relative_to(PROJECT).as_posix()
    for name, _ in imports(path):
        allowed = VENDORS.get(name.split(".")[0])
        assert allowed is None or any(place.startswith(prefix) for prefix in allowed), f"{place} imports {name}"


def test_only_config_reads_the_environment() -> None:
    readers = set()
    for path in sorted((PROJECT / "workbench").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.getenv", "os.environ.get"):
                readers.add(path.relative_to(PROJECT).as_posix())
    assert readers <= {"workbench/config.py"}


def test_importing_the_workbench_is_light_and_quick() -> None:
    script = ("import sys, time; start = time.process_time(); import workbench, workbench.ports, workbench.wiring; "
              f"print(time.process_time() - start, [name for name in {HEAVY!r} if name in sys.modules])")
    seconds, _, heavy = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                                       cwd=PROJECT).stdout.partition(" ")
    assert heavy.strip() == "[]"
    assert float(seconds) < 0.5
