"""LocalModels: model versions in a folder, <name>/<version>/card.json beside the version's files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from workbench.errors import Conflict, Invalid, NotFound
from workbench.inference.graph import check_files
from workbench.model import MODEL_NAME, ModelCard, parse_model_ref

CARD = "card.json"


class LocalModels:
    """ModelStore in one folder. A version is written in a hidden folder beside the others and renamed into place."""

    def __init__(self, folder: Path) -> None:
        self._root = Path(folder)

    def refs(self) -> list[str]:
        return sorted(f"{file.parent.parent.name}@{file.parent.name}" for file in self._root.glob(f"*/*/{CARD}")
                      if MODEL_NAME.fullmatch(file.parent.parent.name) and MODEL_NAME.fullmatch(file.parent.name))

    def card(self, ref: str) -> ModelCard:
        name, version = parse_model_ref(ref)
        file = self._root / name / version / CARD
        try:
            record = json.loads(file.read_bytes())
        except FileNotFoundError as error:
            raise NotFound(
                f"Model {ref} is not registered. Registered are: {', '.join(self.refs()) or 'none'}."
            ) from error
        except ValueError as error:
            raise Invalid(
                f"{file} is damaged: {error}. Restore it from backup, or remove its folder and register again."
            ) from error
        card = ModelCard.from_json(record)
        if card.ref != ref:
            raise Invalid(f"{file} describes {card.ref}, not {ref}. Restore it from backup.")
        return card

    def folder(self, ref: str) -> Path:
        card = self.card(ref)
        folder = self._root / card.name / card.version
        check_files(card, folder)
        return folder

    def register(self, card: ModelCard, folder: Path) -> ModelCard:
        if CARD in card.files:
            raise Invalid(f"Model {card.ref}: {CARD} is the card's own name; call the file otherwise.")
        final = self._root / card.name / card.version
        if final.exists():
            return self._same(card)
        self._root.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(dir=self._root, prefix=".half-"))
        try:
            for name in card.files:
                self._copy(Path(folder) / name, half / name, card)
            check_files(card, half)
            self._write(half / CARD, json.dumps(card.to_json(), indent=1, sort_keys=True, allow_nan=False).encode())
            half.chmod(0o755)
            final.parent.mkdir(exist_ok=True)
            try:
                # A folder is only replaced when it is empty, so two that register at once cannot mix.
                os.rename(half, final)
            except OSError:
                if not final.exists():
                    raise
                return self._same(card)
        finally:
            shutil.rmtree(half, ignore_errors=True)
        _sync(final.parent)
        return self.card(card.ref)

    def _same(self, card: ModelCard) -> ModelCard:
        """The version that is there, when it is this one."""
        there = self.card(card.ref)
        if there.to_json() != json.loads(json.dumps(card.to_json())):
            raise Conflict(
                f"Model {card.ref} is registered with another content. A version never changes: give this one a "
                "new version."
            )
        return there

    def _copy(self, source: Path, target: Path, card: ModelCard) -> None:
        if not source.is_file():
            raise NotFound(
                f"{source.name} of {card.ref} is not in {source.parent}. Give the folder that holds the card's files."
            )
        self._write(target, source.read_bytes())

    @staticmethod
    def _write(target: Path, data: bytes) -> None:
        with target.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        target.chmod(0o444)


def _sync(folder: Path) -> None:
    """Makes a rename inside the folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
