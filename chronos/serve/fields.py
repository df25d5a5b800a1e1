"""Fields of a request: their types and ranges as one table, which requests are checked against and
the OpenAPI page is written from.

A field that no table names is ignored; one that is named and not supported is refused unless its
value asks for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chronos.serve.problem import Problem

_TYPES: dict[str, tuple[type, ...]] = {
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
}


@dataclass(frozen=True)
class Field:
    """kinds: JSON types, the first that fits. low, high: of numbers, of lengths for others.
    choices: of a string. required: else null and absence are the same."""

    name: str
    kinds: tuple[str, ...]
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    required: bool = False

    def check(self, value: Any) -> None:
        if not any(_is(value, kind) for kind in self.kinds):
            raise self._wrong(value)
        size = value if _is(value, "number") else None
        if isinstance(value, str | list | dict):
            size = len(value)
        if size is not None and not (
            (self.low is None or size >= self.low) and (self.high is None or size <= self.high)
        ):
            raise self._wrong(value)
        if self.choices and isinstance(value, str) and value not in self.choices:
            raise self._wrong(value)

    def schema(self) -> dict[str, Any]:
        """As JSON Schema has it; null is what absence is."""
        kinds = list(self.kinds) if self.required else [*self.kinds, "null"]
        found: dict[str, Any] = {"type": kinds}
        names = {"string": "Length", "array": "Items", "object": "Properties"}
        for kind in self.kinds:
            if kind in ("number", "integer"):
                low, high = "minimum", "maximum"
            elif kind in names:
                low, high = f"min{names[kind]}", f"max{names[kind]}"
            else:
                continue
            found |= {low: self.low} if self.low is not None else {}
            found |= {high: self.high} if self.high is not None else {}
        if self.choices and self.kinds == ("string",):
            found["enum"] = [*self.choices] if self.required else [*self.choices, None]
        return found

    def _range(self) -> str:
        length = not {"number", "integer"} & {*self.kinds}
        low, high = (None if end is None else f"{end:.17g}" for end in (self.low, self.high))
        if low is None and high is None:
            return ""
        if low is None or high is None:
            ends = f"at most {high}" if low is None else f"at least {low}"
            return f" of length {ends}" if length else f" of {ends}"
        return f" of length {low} to {high}" if length else f" from {low} to {high}"

    def _wrong(self, value: Any) -> Problem:
        if self.choices and isinstance(value, str):
            wanted = "one of " + ", ".join(self.choices)
        else:
            wanted = " or ".join(map(_article, self.kinds)) + self._range()
        return Problem(
            400,
            f"{self.name} must be {wanted}, not {_shown(value)}",
            code="invalid_value",
            param=self.name,
        )


def _article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aio' else 'a'} {kind}"


def read(
    body: Any, fields: Sequence[Field], refused: Mapping[str, Sequence[Any]] = {}
) -> dict[str, Any]:
    """The values of known fields that are there and not null. refused: fields that are known and
    not supported, with the values beside null that ask for nothing. Raises Problem."""
    if not isinstance(body, dict):
        raise Problem(400, f"the body must be a JSON object, not {_shown(body)}")
    for name, neutral in refused.items():
        value = body.get(name)
        if value is not None and value not in neutral:
            raise Problem(400, f"{name} is not supported", code="unsupported_parameter", param=name)
    values = {}
    for field in fields:
        value = body.get(field.name)
        if value is None:
            if field.required:
                raise Problem(
                    400, f"{field.name} is missing", code="missing_parameter", param=field.name
                )
            continue
        field.check(value)
        values[field.name] = value
    return values


def parse(raw: bytes) -> Any:
    """JSON of a request. Raises Problem for what is none, for NaN, for half a character and for
    nesting without end."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
        if b"\\u" in raw:  # only an escape can spell half a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise Problem(400, "the body is nested too deeply") from None
    except UnicodeEncodeError:
        raise Problem(400, "the body holds a lone surrogate, which is no text") from None
    except ValueError as error:
        raise Problem(400, f"the body is not JSON: {str(error)[:100]}") from None


def schema(fields: Sequence[Field]) -> dict[str, Any]:
    """Of a request's body."""
    return {
        "type": "object",
        "properties": {field.name: field.schema() for field in fields},
        "required": [field.name for field in fields if field.required],
    }


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) and kind != "boolean":
        return False
    return isinstance(value, _TYPES[kind])


def _shown(value: Any) -> str:
    """A value in a few characters."""
    if isinstance(value, list | dict):
        return f"{'an array' if isinstance(value, list) else 'an object'} of {len(value)}"
    try:
        text = json.dumps(value)
    except ValueError:  # an integer of thousands of digits
        return "such a number"
    return text if len(text) <= 40 else text[:37] + "..."
