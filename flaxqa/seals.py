"""JSON with a checksum of its content, for what is read again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def as_json(content: Any) -> bytes:
    return json.dumps(content, indent=1).encode() + b"\n"


def checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sealed(content: Mapping[str, Any]) -> bytes:
    """A JSON file with a checksum of its content."""
    return as_json({**content, "checksum": checksum(content)})


def unsealed(content: bytes) -> dict[str, Any] | None:
    """What was sealed; None if it is damaged."""
    try:
        found = json.loads(content)
        told = found.pop("checksum")
        return found if checksum(found) == told else None
    except (ValueError, RecursionError, LookupError, AttributeError, TypeError):
        return None
