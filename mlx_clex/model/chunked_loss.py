"""Compute cross-entropy in chunks, without all logits at once.

A model is split at the output of its body (the module with the layers). The body runs once, the
head once per chunk of tokens. Both run the code of the family, so tied, untied, quantised and
adapted heads, biases, scaled and capped logits need no code here.

The gradient for the output of the body is computed together with the loss of each chunk, while
the logits of that chunk exist. No chunk is computed twice, and the largest array is the logits of
one chunk, (chunk, V).

Not covered: families whose body ends in logits (GPT-NeoX); their loss is computed at once.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..errors import InputError
from .stock import config_value, stock_class

_CHUNK_ELEMENTS = 1 << 22  # elements in the logits of a chunk: 16 MiB in float32
_SMALLEST_CHUNK = 64  # tokens


def chunk_length(vocabulary: int) -> int:
    """Return the number of tokens in a chunk, for a vocabulary of this size."""
    return max(_SMALLEST_CHUNK, _CHUNK_ELEMENTS // vocabulary)


def chunk_for(model: nn.Module) -> int:
    """Return the number of tokens in a chunk of a model; a wrong guess only moves a chunk."""
    return chunk_length(config_value(model, "vocab_size") or 32_000)


def hidden_states(model: nn.Module, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
    """Return the output of the body for tokens (B, L): (B, L, hidden)."""
    seen: list[mx.array] = []

    def capture(body: Callable[..., mx.array], *args: Any, **kwargs: Any) -> mx.array:
        out = body(*args, **kwargs)
        seen.append(out)
        # The head gets one token, and its output is never evaluated.
        return out[:, -1:]

    with _replaced_body(model, capture):
        model(tokens, cache=cache)
    return seen[0] if len(seen) == 1 else mx.concatenate(seen, axis=1)


def logits_of(model: nn.Module, hidden: mx.array, tokens: mx.array) -> mx.array:
    """Return the logits of the head, float32, (B, L, V).

    Args:
        model: any model of mlx-lm.
        hidden: output of `hidden_states`, or a part of it, (B, L, hidden).
        tokens: the ids that it was computed from, (B, L).
    """
    return _run_head(model, hidden, tokens).astype(mx.float32)


def token_losses(logits: mx.array, targets: mx.array) -> mx.array:
    """Return the cross-entropy of each token, nats, (B, L)."""
    return nn.losses.cross_entropy(logits, targets, reduction="none")


def summed_loss(
    model: nn.Module, tokens: mx.array, targets: mx.array, weights: mx.array, chunk: int
) -> mx.array:
    """Return the weighted sum of the tokens' losses, without a gradient.

    Args:
        model: any model of mlx-lm.
        tokens: ids, (B, L).
        targets: the ids that follow them, (B, L).
        weights: weight of each target's loss, (B, L).
        chunk: number of tokens whose logits are computed at once.
    """
    hidden = hidden_states(model, tokens)
    total = mx.array(0.0)
    for start, stop in _chunks(tokens.shape, chunk):
        part, _ = mx.depends([hidden[:, start:stop], total], [total])
        logits = logits_of(model, part, tokens[:, start:stop])
        losses = token_losses(logits, targets[:, start:stop])
        total = total + (losses * weights[:, start:stop]).sum()
    return total


def loss_for_gradient(
    model: nn.Module, tokens: mx.array, targets: mx.array, weights: mx.array, chunk: int
) -> tuple[mx.array, mx.array]:
    """Return a scalar with the gradient of the loss, and the loss itself.

    Args:
        model, tokens, targets, weights, chunk: as in `summed_loss`.

    Returns:
        A scalar to differentiate, whose gradient is that of the loss and whose value has no
        meaning; and the weighted sum of the tokens' losses, whose gradient is zero.
    """
    hidden = hidden_states(model, tokens)
    if _is_logits(model, hidden, tokens):
        loss = (token_losses(hidden.astype(mx.float32), targets) * weights).sum()
        return loss, mx.stop_gradient(loss)
    names = _head_parameters(model)
    every = dict(_flat(model.trainable_parameters()))
    parameters = {name: every[name] for name in names}
    fixed = mx.stop_gradient(hidden)

    def of_chunk(part: mx.array, parameters: dict[str, mx.array], start: int) -> mx.array:
        stop = start + part.shape[1]
        with _parameters(model, parameters):
            logits = logits_of(model, part, tokens[:, start:stop])
        return (token_losses(logits, targets[:, start:stop]) * weights[:, start:stop]).sum()

    gradient = mx.value_and_grad(of_chunk, argnums=(0, 1))
    total = mx.array(0.0)
    parts: list[mx.array] = []
    summed = tree_map(mx.zeros_like, parameters)
    frozen = tree_map(mx.stop_gradient, parameters)
    for start, stop in _chunks(tokens.shape, chunk):
        part = fixed[:, start:stop]
        if parts:
            # One chunk after the other: in parallel, the logits of all chunks would exist at once.
            part = mx.depends([part], [parts[-1], total])[0]
        loss, (of_part, of_parameters) = gradient(part, frozen, start)
        total = total + loss
        parts.append(of_part)
        summed = tree_map(mx.add, summed, of_parameters)
    # Linear in `hidden` and the parameters, with the gradients as factors.
    surrogate = _inner(mx.concatenate(parts, axis=1), hidden)
    for name, of_parameter in summed.items():
        surrogate = surrogate + _inner(of_parameter, parameters[name])
    return surrogate, mx.stop_gradient(total)


def _inner(factor: mx.array, variable: mx.array) -> mx.array:
    factor = mx.stop_gradient(factor).astype(mx.float32)
    return (factor * variable.astype(mx.float32)).sum()


def _chunks(shape: tuple[int, ...], chunk: int) -> Iterator[tuple[int, int]]:
    """Yield the start and stop of parts of L, with `chunk` tokens in all B rows together."""
    rows, length = shape
    part = max(1, chunk // rows)
    for start in range(0, length, part):
        yield start, min(start + part, length)


def _is_logits(model: nn.Module, hidden: mx.array, tokens: mx.array) -> bool:
    """Return whether the output of the body is the logits."""
    return _run_head(model, hidden, tokens) is hidden


def _run_head(model: nn.Module, hidden: mx.array, tokens: mx.array) -> mx.array:
    stock: Any = stock_class(model)
    with _replaced_body(model, lambda *_, **__: hidden):
        return stock.__call__(model, tokens)


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    return cast(list, tree_flatten(tree))


def _head_parameters(model: nn.Module) -> list[str]:
    """Return the names of the trainable arrays outside the layers, which the head may use."""
    layers = {id(array) for layer in model.layers for _, array in _flat(layer.parameters())}
    scaling = model.get("scaling")
    if scaling is not None:
        layers |= {id(array) for _, array in _flat(scaling.parameters())}
    flat = _flat(model.trainable_parameters())
    return [name for name, array in flat if id(array) not in layers]


@contextlib.contextmanager
def _parameters(model: nn.Module, flat: dict[str, mx.array]) -> Iterator[None]:
    """Give the model these arrays inside the block."""
    every = dict(_flat(model.parameters()))
    model.update(tree_unflatten(list(flat.items())) if flat else {})
    try:
        yield
    finally:
        before = [(name, every[name]) for name in flat]
        model.update(tree_unflatten(before) if before else {})


def _body(model: nn.Module) -> nn.Module:
    """Return the child of the model that has its layers."""
    first = model.layers[0]
    for child in model.children().values():
        if isinstance(child, nn.Module) and any(inner is first for inner in child.modules()):
            return child
    raise InputError(
        f"{type(model).__module__}.{type(model).__name__} has no submodule that holds its layers, "
        "so mlx_clex cannot train it."
    )


@contextlib.contextmanager
def _replaced_body(model: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Run `call(body, *args)` where the model calls its body, inside the block."""
    body = _body(model)
    kind = type(body)

    def instead(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def original(*args: Any, **kwargs: Any) -> Any:
            return kind.__call__(self, *args, **kwargs)

        return call(original, *args, **kwargs)

    # Python looks up __call__ on the class, so the body gets a subclass.
    body.__class__ = type(kind.__name__, (kind,), {"__call__": instead})
    try:
        yield
    finally:
        body.__class__ = kind
