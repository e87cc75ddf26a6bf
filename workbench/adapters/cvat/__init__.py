"""AnnotationServer on CVAT: a project per data set, a task per upload, edited in CVAT by its people."""

from workbench.adapters.cvat.connection import Connection
from workbench.adapters.cvat.server import CvatServer
from workbench.adapters.cvat.tools import AiTools, CvatTask, Tool, ToolFailed

__all__ = ["AiTools", "Connection", "CvatServer", "CvatTask", "Tool", "ToolFailed"]
