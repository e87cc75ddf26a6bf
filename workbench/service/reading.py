"""What a caller sent to predict: settings and images, from a multipart form, an image or JSON, read within limits."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from workbench.errors import Invalid
from workbench.formats.images import NOT_STORED, OPENED, ORIENTATION_TAG, read_image
from workbench.formats.limits import Limits
from workbench.inference.detector import Detector, Prepared
from workbench.inference.pixels import decode_frame, decode_image
from workbench.service.refusals import Busy, Refusal

# A body of the default size in this time is a line of a megabyte a second; slower callers send fewer images at once.
READ_S = 60
# Bodies of the largest size that may be in memory at once.
BODIES = 8
SETTINGS_IN_FORM = 16
SETTING_BYTES = 4096
# What a caller's own name of an image is cut to in answers.
NAME_LENGTH = 200


class Settings(BaseModel):
    """How to look: in the query, or in the body beside the images (the body's word counts)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    model: Annotated[
        str | None,
        Field(
            max_length=200,
            description="Model reference name@version; without it the model deployed for `dataset`.",
            examples=["student@1"],
        ),
    ] = None
    dataset: Annotated[str | None, Field(max_length=200, description="Data set whose deployed model looks.")] = None
    confidence: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            description="Least confidence of an object; without it as the model's card says, label by label.",
        ),
    ] = None
    max_detections: Annotated[
        int | None, Field(ge=1, le=100_000, description="Most objects an image, the most confident ones.")
    ] = None
    stream: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}$",
            description="Name of a camera: its images, sent in order, are tracked and objects carry a track id.",
        ),
    ] = None


class SettingsAndImages(Settings):
    """The JSON body."""

    images: list[str] = Field(min_length=1, description="Image files in base64.", examples=[["iVBORw0KGgo="]])


@dataclass
class Sent:
    """One request's content. images: each a name of the caller's own or None, and the file's bytes or its base64."""

    settings: Settings
    images: list[tuple[str | None, bytes | str]] = field(default_factory=list)

    def name(self, index: int) -> str:
        """How sentences call an image."""
        name = self.images[index][0]
        return f"Image {index}" + (f" ({_printable(name)})" if name else "")


class Reader:
    """Reads bodies of up to `body_bytes`; those of all callers together stay within BODIES times that."""

    def __init__(self, body_bytes: int, most_images: int, read_s: float = READ_S) -> None:
        self._body_bytes, self._most_images, self._read_s = body_bytes, most_images, read_s
        self._held_bytes = 0

    @asynccontextmanager
    async def read(self, request: Request, query: Settings, retry_after_s: Callable[[], int]) -> AsyncIterator[Sent]:
        """Gives what was sent; its bytes count as held until the context is left.

        Raises Refusal (408 too slow, 413 too large, 415 of no known type), Busy, RequestValidationError, Invalid.
        """
        size = 0

        async def chunks() -> AsyncIterator[bytes]:
            nonlocal size
            async for chunk in request.stream():
                size += len(chunk)
                self._held_bytes += len(chunk)
                if size > self._body_bytes:
                    raise self._too_large()
                if self._held_bytes > BODIES * self._body_bytes:
                    raise Busy("Too many large requests are being read.", retry_after_s(), full="memory")
                yield chunk

        try:
            # A length that is a lie is met while reading.
            if int(request.headers.get("content-length") or 0) > self._body_bytes:
                raise self._too_large()
            try:
                async with asyncio.timeout(self._read_s):
                    sent = await self._parse(request, query, chunks())
            except TimeoutError as error:
                raise Refusal(
                    408,
                    f"The body did not arrive within {self._read_s:g} s. Send fewer images a request.",
                    {"Connection": "close"},
                ) from error
            if not sent.images:
                raise Invalid("The request holds no image. Send image files as parts of a multipart form.")
            if len(sent.images) > self._most_images:
                raise self._too_many()
            yield sent
        finally:
            self._held_bytes -= size

    async def _parse(self, request: Request, query: Settings, chunks: AsyncIterator[bytes]) -> Sent:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        is_packed = request.headers.get("content-encoding", "identity").lower() != "identity"
        if kind == "multipart/form-data" and not is_packed:
            return await self._form(request, query, chunks)
        if kind == "application/json" and not is_packed:
            body = b"".join([chunk async for chunk in chunks])
            return await asyncio.to_thread(self._json, body, query)
        if kind.startswith("image/") and not is_packed:
            return Sent(query, [(None, b"".join([chunk async for chunk in chunks]))])
        raise Refusal(
            415,
            f"Content-Type {_printable(kind) or 'none'}{', compressed,' * is_packed} is not read here. Send "
            "image files as multipart/form-data, one image as image/jpeg (or image/png, ...), or "
            'application/json {"images": [base64, ...]}.',
        )

    async def _form(self, request: Request, query: Settings, chunks: AsyncIterator[bytes]) -> Sent:
        parser = _Form(
            request.headers,
            chunks,
            max_files=self._most_images,
            max_fields=SETTINGS_IN_FORM,
            max_part_size=SETTING_BYTES,
        )
        parser.spool_max_size = self._body_bytes + 1  # bodies stay in memory, which is accounted for
        try:
            form = await parser.parse()
        except MultiPartException as error:
            if parser.has_too_many_files:
                raise self._too_many() from error
            raise Invalid(f"The form cannot be read: {error.message}") from error
        except FormParserError as error:
            raise Invalid(f"The form cannot be read: {error}") from error
        if not parser.is_whole:
            raise Invalid("The form ends before its last boundary. Send it again.")
        sent = Sent(query)
        given: dict[str, Any] = {}
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                await value.seek(0)
                sent.images.append((value.filename or None, await value.read()))
            elif value:
                given[name] = value
        sent.settings = _settings(query, given)
        return sent

    def _json(self, body: bytes, query: Settings) -> Sent:
        # Neither base64 nor settings have many commas: a list of a million empty texts is refused before it takes
        # fifty times its size in memory. Each image may have one, as "data:image/png;base64,...".
        if body.count(b",") > 2 * self._most_images + SETTINGS_IN_FORM:
            raise self._too_many()
        try:
            read = SettingsAndImages.model_validate_json(body)
        except ValidationError as error:
            raise _not_as_it_should_be(error) from error
        given = read.model_dump(exclude={"images"}, exclude_none=True)
        return Sent(_settings(query, given), [(None, text) for text in read.images])

    def _too_large(self) -> Refusal:
        return Refusal(
            413,
            f"The body is larger than the {self._body_bytes / 2**20:g} MiB taken at once (setting "
            "predict_body_mb). Send fewer images a request.",
            {"Connection": "close"},
        )

    def _too_many(self) -> Refusal:
        return Refusal(
            413,
            f"A request may hold {self._most_images} images at most (setting predict_queue). Send more "
            "requests with fewer images.",
            {"Connection": "close"},
        )


def prepared(detector: Detector, sent: Sent, index: int, limits: Limits) -> Prepared:
    """An image that was sent, as the detector takes it: upright, its size told from its header before it is decoded.

    Raises Invalid, naming the image.
    """
    name, data = sent.name(index), sent.images[index][1]
    if isinstance(data, str):
        data = _from_base64(name, data)
    if not data:
        raise Invalid(f"{name} has 0 bytes. Send the file's content.")
    if len(data) > limits.image_bytes:
        raise Invalid(f"{name} has more than the {limits.image_bytes / 2**20:g} MiB allowed for an image.")
    try:
        with Image.open(io.BytesIO(data), formats=OPENED) as image:
            size, kind = image.size, image.format
            # Only of a JPEG: Pillow decodes a whole PNG to find its EXIF.
            is_turned = kind in ("JPEG", "MPO") and image.getexif().get(ORIENTATION_TAG, 1) in range(5, 9)
    except UnidentifiedImageError as error:
        raise Invalid(f"{name} is no image (JPEG, PNG, BMP, WebP, TIFF or GIF).") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise Invalid(
            f"{name} has far more than the {limits.pixels / 1e6:g} megapixels allowed. Make it smaller."
        ) from error
    except Exception as error:  # readers of damaged headers raise nearly anything
        raise Invalid(
            f"{name} is damaged ({_printable(str(error)) or type(error).__name__}). Send the file again."
        ) from error
    if size[0] * size[1] > limits.pixels:
        raise Invalid(
            f"{name} has {size[0]} x {size[1]} = {size[0] * size[1] / 1e6:.0f} megapixels, more than the "
            f"{limits.pixels / 1e6:g} allowed. Make it smaller."
        )
    if kind in NOT_STORED:
        try:
            data = read_image(data, "", limits).data
        except Invalid as error:
            raise Invalid(f"{name} {error}") from error
    elif kind in ("JPEG", "MPO"):
        # As the pipeline of annotate does, so that both draw the same boxes.
        upright = size[::-1] if is_turned else size
        try:
            return detector.prepare(decode_frame(data, name, upright, detector.least_size(upright)), upright)
        except Invalid:
            return detector.prepare(decode_image(data, name))  # it is damaged, or read otherwise by OpenCV
    return detector.prepare(decode_image(data, name))


class _Form(MultiPartParser):
    """Says how it ended: a part without the boundary behind it is otherwise left out in silence."""

    is_whole = False

    @property
    def has_too_many_files(self) -> bool:
        return self._current_files > self.max_files

    def on_end(self) -> None:
        self.is_whole = True


def _settings(query: Settings, given: dict[str, Any]) -> Settings:
    try:
        return Settings.model_validate({**query.model_dump(exclude_none=True), **given})
    except ValidationError as error:
        raise _not_as_it_should_be(error) from error


def _not_as_it_should_be(error: ValidationError) -> RequestValidationError:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found])


def _from_base64(name: str, text: str) -> bytes:
    scheme = text[:16].partition(":")[0].lower()
    if scheme in ("http", "https", "ftp", "file", "s3"):
        raise Invalid(f"{name} is an address; this service fetches nothing. Send the file's content in base64.")
    if scheme == "data":
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise Invalid(f"{name} is not base64. Send the file's content in base64.") from error


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in text[:NAME_LENGTH])
