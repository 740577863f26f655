"""A table row is one model, or a statistic over single clients' models; files hold its name as text.

    base                     the untuned base model
    federated · FedIT        the shared model of the experiment's algorithm, or of one in `compare.methods`
    centralised              one owner of everything
    Local-1                  an owner of a few categories (`compare.local`)
    local:client-003         the model of a client that trains alone
    FedPIT personal:a        the model that a client keeps beside the shared one
    local mean · local best  over the clients

The text is parsed here and nowhere else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

Model = Literal["base", "global", "personal", "pooled"]
Statistic = Literal["mean", "best"]

BASE, FEDERATED, CENTRALISED, LOCAL = "base", "federated", "centralised", "local"

_TEXT = re.compile(
    r"(?P<label>.*?)(?P<beside> personal)?(?::(?P<client>.+)| (?P<statistic>mean|best))?", re.S
)


@dataclass(frozen=True)
class Row:
    """Whose model it is, and what made it."""

    label: str  # of the training that made it: "federated", "local", a method's, an owner's
    of: Model
    client: str | None = None  # whose own model this is
    statistic: Statistic | None = None  # over the clients' own models; the best is chosen metric by metric
    beside: bool = False  # of clients' own models: kept beside a shared one, not in its place

    @classmethod
    def parse(cls, text: str) -> Row:
        """The inverse of `str`. Any text is a row: what nothing else fits is the label of a shared model."""
        found = _TEXT.fullmatch(text)
        assert found is not None  # the pattern takes every text
        label, client = found["label"], found["client"]
        statistic = cast("Statistic | None", found["statistic"])
        personal = client or statistic or found["beside"] or re.fullmatch(r"Local-\d+", label)
        of: Model = "base" if label == BASE else "pooled" if label == CENTRALISED else "global"
        return cls(label, "personal" if personal else of, client, statistic, found["beside"] is not None)

    def __str__(self) -> str:
        end = f":{self.client}" if self.client else f" {self.statistic}" if self.statistic else ""
        return f"{self.label}{' personal' if self.beside else ''}{end}"

    @property
    def specialist(self) -> bool:
        """Is this the model of an owner of a few categories?"""
        return self.of == "personal" and not (self.client or self.statistic or self.beside)

    @property
    def alone(self) -> bool:
        """Is this the model of a client of the local-only baseline?"""
        return self.label == LOCAL and self.client is not None

    def over(self, statistic: Statistic) -> Row:
        """The statistic of this and the other clients' models."""
        return Row(self.label, self.of, None, statistic, self.beside)


def local(client: str) -> Row:
    """The model of a client that trains alone."""
    return Row(LOCAL, "personal", client)


def is_single(row: str) -> bool:
    """Is this the model of a single client?"""
    return Row.parse(row).client is not None
