"""Taxonomy: the ordered label names of a data set or a model, and the mapping of one onto another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from workbench.errors import Invalid


@dataclass(frozen=True)
class Taxonomy:
    """Label names in the order that gives each its class_id.

    Raises Invalid when a name is empty, has leading or trailing blanks or control characters, or stands twice.
    """

    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        for label in self.labels:
            if not isinstance(label, str) or not label or label != label.strip() or not label.isprintable():
                raise Invalid(f"Label {label!r} is not usable: give it a printable name without blanks at its ends.")
        twice = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if twice:
            raise Invalid(f"Taxonomy has {', '.join(map(repr, twice))} more than once; every label must be unique.")

    def __len__(self) -> int:
        return len(self.labels)

    def __contains__(self, label: object) -> bool:
        return label in self.labels

    def class_id(self, label: str) -> int:
        """Raises Invalid when the label is not in the taxonomy."""
        try:
            return self.labels.index(label)
        except ValueError:
            raise Invalid(f"Label {label!r} is not in the taxonomy ({', '.join(self.labels)}).") from None

    def with_labels(self, labels: Iterable[str]) -> Taxonomy:
        """This taxonomy followed by those of `labels` it does not have yet, in the order given."""
        return Taxonomy(self.labels + tuple(label for label in dict.fromkeys(labels) if label not in self.labels))

    def map_to(self, other: Taxonomy, renames: dict[str, str] | None = None) -> LabelMap:
        """Maps by equal name, or by `renames` (ours -> theirs) where a person gave one; never by guess.

        Raises Invalid when a rename names a label that one of the two sides lacks.
        """
        renames = renames or {}
        for ours, theirs in renames.items():
            if ours not in self.labels or theirs not in other.labels:
                raise Invalid(f"Cannot map {ours!r} to {theirs!r}: one of them does not exist on its side.")
        pairs = {label: renames.get(label, label) for label in self.labels}
        pairs = {ours: theirs for ours, theirs in pairs.items() if theirs in other.labels}
        reached = set(pairs.values())
        return LabelMap(
            pairs=pairs,
            unmatched=tuple(label for label in self.labels if label not in pairs),
            unreached=tuple(label for label in other.labels if label not in reached),
        )


@dataclass(frozen=True)
class LabelMap:
    """pairs: source label -> target label; unmatched: source labels with no target; unreached: targets no source gives."""

    pairs: dict[str, str]
    unmatched: tuple[str, ...]
    unreached: tuple[str, ...]

    def __call__(self, label: str) -> str | None:
        """The target label, or None when there is none."""
        return self.pairs.get(label)
