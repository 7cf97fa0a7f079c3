"""Check single values of a request: JSON, numbers, and what an error says of them."""

import json
import math
from collections.abc import Mapping
from typing import Any

from ..errors import InputError

DEPTH = 64  # levels of lists and objects within each other
CHOICES = 128  # answers to one request
INT = 1 << 31
# Lowest and highest value of each number, in mlx-lm's names. Other values crash its sampler.
NUMBERS: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 100),
    "top_p": (float, 0, 1),
    "top_k": (int, 0, INT),
    "min_p": (float, 0, 1),
    "max_tokens": (int, 1, INT),
    "num_draft_tokens": (int, 0, 1000),
    "repetition_penalty": (float, 0, 1e6),
    "repetition_context_size": (int, 0, INT),
    "presence_penalty": (float, -1e6, 1e6),
    "presence_context_size": (int, 0, INT),
    "frequency_penalty": (float, -1e6, 1e6),
    "frequency_context_size": (int, 0, INT),
    "xtc_probability": (float, 0, 1),
    "xtc_threshold": (float, 0, 0.5),
    "seed": (int, -1 << 63, (1 << 63) - 1),
    "top_logprobs": (int, 0, 20),
    "n": (int, 1, CHOICES),
}


class RequestError(InputError):
    """A request that cannot be answered; the message says what is allowed."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        """`param`, `code`: in OpenAI's words; `status`: of HTTP."""
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def parse_json(data: bytes | str, what: str, param: str | None = None) -> Any:
    """Return the value of a JSON text; `what` and `param` name it in an error.

    Raises:
        RequestError: it is no JSON, or has a number that JSON does not have.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number of JSON")

    try:
        text = data.decode() if isinstance(data, bytes) else data
        return json.loads(text, parse_constant=refuse)
    except UnicodeDecodeError as error:
        message = f"{what} is no UTF-8: {error.reason} at {error.start}."
    except ValueError as error:
        message = f"{what} is no JSON: {error}."
    except RecursionError:
        message = f"{what} is nested too deeply: {DEPTH} levels are allowed."
    raise RequestError(message, param=param)


def check_tree(body: Any) -> None:
    """Refuse deep nesting, and text or numbers that no tokenizer and no template can take.

    Raises:
        RequestError: the message has the field.
    """
    waiting: list[tuple[Any, int, str]] = [(body, 1, "")]
    while waiting:
        value, depth, field = waiting.pop()
        if depth > DEPTH:
            raise RequestError(
                f"{field or 'The body'} is nested too deeply: {DEPTH} levels are allowed.",
                param=field or None,
            )
        if isinstance(value, dict):
            waiting += [(key, depth, field or key) for key in value]
            waiting += [(inner, depth + 1, field or key) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(inner, depth + 1, field) for inner in value]
        elif isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                field = field.encode(errors="replace").decode()
                raise RequestError(
                    f"{field} has half of a surrogate pair, {value[error.start]!a}, which is no "
                    "character.",
                    param=field,
                ) from error
        elif isinstance(value, float) and not math.isfinite(value):
            raise RequestError(f"{field} has a number that is too large.", param=field)


def number(body: Mapping[str, Any], name: str, default: Any, *, like: str | None = None) -> Any:
    """Return a number of the body, within its bounds; True and False are no numbers."""
    kind, low, high = NUMBERS[like or name]
    value = body.get(name, default)
    if value is None:
        return None
    if not within(value, kind, low, high):
        what = "a whole number" if kind is int else "a number"
        raise wrong(name, f"{what} within {low:g}..{high:g}", value)
    return kind(value)


def within(value: Any, kind: type, low: float, high: float) -> bool:
    """Return whether a value is a number of this kind and within these bounds."""
    kinds = (int,) if kind is int else (int, float)
    return type(value) in kinds and low <= value <= high


def boolean(body: Mapping[str, Any], name: str) -> bool:
    """Return true or false of the body; false where it has neither."""
    value = body.get(name, False)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise wrong(name, "true or false", value)


def wrong(name: str, wanted: str, value: Any) -> RequestError:
    """Return the error of a field that has a wrong value."""
    return RequestError(
        f"{name} must be {wanted}; got {shown(value)}.", param=name.partition("[")[0]
    )


def same(value: Any, other: Any) -> bool:
    """Return whether two values of JSON are the same; true is not 1."""
    return type(value) is type(other) and value == other


def shown(value: Any) -> str:
    """Return a value as JSON, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
