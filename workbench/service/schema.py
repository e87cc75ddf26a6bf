"""What POST /v1/predict takes and gives, as OpenAPI describes it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from workbench.service.reading import Settings, SettingsAndImages


class Object(BaseModel):
    """One thing seen."""

    label: str
    xyxy: tuple[float, float, float, float] | None = Field(
        None, description="Corners in pixels of the upright image; null for a tag, which is about the whole image."
    )
    confidence: float = Field(ge=0, le=1)
    track: int | None = Field(
        None,
        description="The same number as long as it is the same thing in a stream's images; null "
        "without a stream, and until a thing was seen twice.",
    )
    polygon: list[tuple[float, float]] | None = Field(
        None, description="Its outline, from a model that draws polygons."
    )


class Looked(BaseModel):
    """One image: its objects, most confident first, or the error."""

    name: str | None = Field(None, description="What the caller called it.")
    width: int | None = Field(None, description="Upright, in pixels; null when it could not be read.")
    height: int | None = None
    objects: list[Object]
    error: str | None = Field(
        None, description="Why there is no answer for this image; the others are not touched by it."
    )
    decode_ms: float
    wait_ms: float
    infer_ms: float = Field(description="Time of the run it took part in.")


class Predictions(BaseModel):
    """Answers in the order of the images."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "student@1",
                    "task": "boxes",
                    "backend": "openvino",
                    "device": "Intel(R) Xeon(R)",
                    "precision": "f32",
                    "library": "openvino 2026.4.1",
                    "total_ms": 14.2,
                    "images": [
                        {
                            "name": "a.jpg",
                            "width": 640,
                            "height": 480,
                            "error": None,
                            "decode_ms": 3.1,
                            "wait_ms": 0.4,
                            "infer_ms": 9.8,
                            "objects": [
                                {
                                    "label": "car",
                                    "xyxy": [12.5, 40.0, 200.25, 160.0],
                                    "confidence": 0.91,
                                    "track": None,
                                    "polygon": None,
                                }
                            ],
                        }
                    ],
                }
            ]
        }
    )
    model: str
    task: Literal["boxes", "polygons", "tags"]
    backend: str
    device: str
    precision: str
    library: str
    total_ms: float
    images: list[Looked]


class Problem(BaseModel):
    """What happened, where, and what to do next."""

    error: str


# A form has no null: what is not set is left out.
_SETTINGS = {
    name: {**one["anyOf"][0], "description": one["description"]}
    for name, one in Settings.model_json_schema()["properties"].items()
}
REQUEST_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {
                    "images": {
                        "type": "array",
                        "items": {"type": "string", "format": "binary"},
                        "minItems": 1,
                        "description": "Image files; parts of any name that carry a file count.",
                    },
                    **_SETTINGS,
                },
            }
        },
        "image/*": {"schema": {"type": "string", "format": "binary", "description": "One image file."}},
        "application/json": {"schema": SettingsAndImages.model_json_schema()},
    },
}
RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds until there is room, at the rate measured.",
        "schema": {"type": "integer", "minimum": 1},
    }
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "description": "No such model."},
    408: {"model": Problem, "description": "The body did not arrive in time."},
    409: {"model": Problem, "description": "Tracking needs another setting of the service."},
    413: {"model": Problem, "description": "The body is too large, or holds too many images."},
    415: {"model": Problem, "description": "The body is of no type that is read here."},
    422: {
        "model": Problem,
        "description": "A setting is wrong, the only image cannot be read, or the model may not look: "
        "an INT8 model needs a certificate.",
    },
    429: {"model": Problem, "description": "No room for the images now.", "headers": RETRY_AFTER},
    503: {
        "model": Problem,
        "description": "Too many models are in use, or the service is ending.",
        "headers": RETRY_AFTER,
    },
}
