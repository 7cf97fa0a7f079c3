"""One training step, compiled once for all scales.

Scale, frequencies and positions enter the compiled step as arrays; a Python number would
be drawn once for ever. With gradient checkpointing each layer is recomputed in the
backward pass, with its parameters, frequencies and positions as explicit arguments:
`mx.checkpoint` gives no gradient to what a function merely closes over.

Not covered: drawing (`draws.py`), batches, and when to update or save.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from ..data.batch import Batch
from ..model.chunked_loss import chunk_for, loss_for_gradient
from ..model.finite import check_like
from ..model.planner import given_pass
from ..model.rotary import Pass, Rope
from ..scaling import PREFIX, Scaling
from .draws import Draw


def compute_in_depth() -> None:
    """Make MLX compute each array as late as it can, from the first evaluation of a process on.

    By default MLX evaluates up to 20 arrays side by side, and gradients that nothing waits for
    after the whole backward pass; what they need stays in memory until then. The variable keeps a
    value that the user has set.
    """
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1")


class Result(NamedTuple):
    """What a step reports, summed over all processes."""

    loss: float  # sum over the tokens counted, nats
    tokens: int  # how many were counted
    norm: float  # norm of the gradient before clipping; 0 without an update


class Inputs(NamedTuple):
    """What the compiled step takes of a micro-batch; the text as in `Batch`."""

    tokens: mx.array
    targets: mx.array
    weights: mx.array
    frequencies: mx.array  # or the scale, where they are computed inside the step
    positions: mx.array
    gain: mx.array | None  # on queries, where it follows the scale


class TrainingStep:
    """Forward, backward and update of a model with a scaling."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        *,
        grad_checkpoint: bool = False,
        max_grad_norm: float = 0.0,
        chunk: int | None = None,
        group: mx.distributed.Group | None = None,
    ) -> None:
        """Compile for this model and optimizer.

        Args:
            model: from `load` or `attach`; its trainable parameters are trained.
            optimizer: updates the weights.
            grad_checkpoint: recompute each layer in the backward pass.
            max_grad_norm: clip the gradient to this norm, the scaling's and all others' each;
                0: no clipping.
            chunk: tokens whose logits are computed at once; None: as many as fit 16 MiB.
            group: processes that share a step, each with its own rows; every token has the
                same weight.
        """
        self.model = model
        self.scaling: Scaling = model.scaling
        self.optimizer = optimizer
        self.grad_checkpoint = grad_checkpoint
        self.max_grad_norm = max_grad_norm
        self.chunk = chunk
        self.group = group
        self.parts = group.size() if group else 1
        trained: Any = tree_flatten(model.trainable_parameters())
        self.learns_model = any(not name.startswith(PREFIX) for name, _ in trained)
        self.traces = 0  # how often a step was traced
        self._carried: Any = None  # gradients and token count of earlier micro-batches
        optimizer.init(model.trainable_parameters())
        self._compile()

    def __call__(self, batch: Batch, draw: Draw, *, update: bool = True) -> Result:
        """Run one micro-batch.

        Args:
            batch: the text.
            draw: its scale and positions.
            update: change the weights; False keeps the gradient for the next call, which
                weights it by its number of tokens.
        """
        loss, count, norm, self._carried = self._compiled(
            self.inputs(batch, draw), self._carried, update
        )
        mx.eval(self._state, loss, count, norm, self._carried)
        return Result(float(loss), int(count), float(norm))

    def inputs(self, batch: Batch, draw: Draw) -> Inputs:
        """The arrays of a micro-batch."""
        tokens, targets, weights = map(mx.array, batch.cut(draw.pieces))
        frequencies, gain = self._frequencies(draw.scale), self._gain(draw.scale)
        return Inputs(tokens, targets, weights, frequencies, mx.array(draw.positions), gain)

    def optimizer_arrays(self) -> dict[str, mx.array]:
        """The optimizer's state by name, for a save."""
        return dict(tree_flatten(self.optimizer.state))

    def restore(self, arrays: Mapping[str, mx.array]) -> None:
        """Set the optimizer's state from what `optimizer_arrays` returned.

        Raises:
            InputError: they are of another optimizer, or not finite.
        """
        check_like(arrays, self.optimizer_arrays())
        state = tree_map_with_path(lambda name, _: arrays[name], self.optimizer.state)
        self.optimizer.state = state
        self._compile()

    def _compile(self) -> None:
        self._state = [self.model.state, self.optimizer.state, mx.random.state]
        compiled: Any = partial(mx.compile, inputs=self._state, outputs=self._state)
        self._apart: Any = self._gradient, self._update
        self._compiled: Any = self._step
        if self.parts == 1:
            self._compiled = compiled(self._step)
        else:
            # macOS ends GPU work that waits for another process for five seconds.
            self._apart = compiled(self._gradient), compiled(self._update)

    @property
    def learns_scaling(self) -> bool:
        """Whether the scaling's own tensors are trained."""
        return bool(self.scaling.trainable_parameters())

    def _frequencies(self, scale: float) -> mx.array:
        if self.learns_scaling or self.scaling.by_layer:
            return mx.array(scale, mx.float32)
        return self.scaling.inv_freq(scale)

    def _gain(self, scale: float) -> mx.array | None:
        # CLEX's log_scale follows the length, and is for inference.
        if self.scaling.gain_follows != "scale":
            return None
        return mx.array(self.scaling.query_gain(None, 0, scale), mx.float32)

    def pass_for(self, inputs: Inputs) -> Pass:
        """The pass of a step."""
        scaling = self.scaling
        if inputs.frequencies.ndim:
            inv_freq = [inputs.frequencies]
        else:
            inv_freq = self.model._planner.differentiable(inputs.frequencies)
        by_position = self.scaling.gain_follows == "position"
        return Pass(
            inv_freq=inv_freq,
            positions=inputs.positions,
            rotary_gain=scaling.rotary_gain(scaling.scale_at(1) if scaling.static else 1.0),
            query_gain=inputs.gain,
            # GeNE's log_scale is part of its training.
            position_gain=self._position_gain if by_position else None,
        )

    def _position_gain(self, positions: mx.array) -> Any:
        return self.scaling.query_gain(positions, 0, 1.0)

    def _objective(self, inputs: Inputs) -> tuple[mx.array, mx.array]:
        model = self.model
        checkpointing = checkpointed_layers(model) if self.grad_checkpoint else nullcontext()
        chunk = self.chunk or chunk_for(model)
        with given_pass(model, self.pass_for(inputs)), checkpointing:
            return loss_for_gradient(model, inputs.tokens, inputs.targets, inputs.weights, chunk)

    def _step(
        self, inputs: Inputs, carried: Any, update: bool
    ) -> tuple[mx.array, mx.array, mx.array, Any]:
        gradient_of, update_with = self._apart
        count = self._summed(inputs.weights.sum())
        loss, gradient, counted = gradient_of(inputs, count, carried, update)
        loss = self._summed(loss) * count
        if not update:
            return loss, count, mx.array(0.0), (gradient, counted)
        return loss, count, update_with(self._summed(gradient)), None

    def _gradient(
        self, inputs: Inputs, count: mx.array, carried: Any, update: bool
    ) -> tuple[mx.array, Any, mx.array]:
        """This process's part of the loss and the gradient, and the tokens the gradient is of."""
        self.traces += 1
        objective = nn.value_and_grad(self.model, self._objective)
        # The mean over the tokens of all processes, of which each has a part.
        mean = inputs.weights / mx.maximum(count, 1)
        (_, loss), gradient = objective(inputs._replace(weights=mean))
        if carried is None and update:
            return loss, gradient, count
        gradient = tree_map(lambda g: g * count, gradient)
        if carried is not None:
            before, counted = carried
            gradient, count = tree_map(mx.add, before, gradient), counted + count
        if update:
            gradient = tree_map(lambda g: g / mx.maximum(count, 1), gradient)
        return loss, gradient, count

    def _update(self, gradient: Any) -> mx.array:
        """Change the weights; return the gradient's norm before clipping."""
        gradient, norm = self._clipped(gradient)
        self.optimizer.update(self.model, gradient)
        return norm

    def _clipped(self, gradient: dict[str, Any]) -> tuple[dict[str, Any], mx.array]:
        """The gradient within its limits, and its norm before."""
        limit = self.max_grad_norm or float("inf")
        # In bfloat16 the sum over tensors stops growing, and with it the norm.
        gradient = tree_map(lambda g: g.astype(mx.float32), gradient)
        # That of CLEX's network is 100 times the model's at large scales: clipped together,
        # these steps would leave the model as it was.
        own = {name: part for name, part in gradient.items() if name == "scaling"}
        rest = {name: part for name, part in gradient.items() if name != "scaling"}
        own, of_own = optim.clip_grad_norm(own, limit)
        rest, of_rest = optim.clip_grad_norm(rest, limit)
        return rest | own, mx.sqrt(of_own**2 + of_rest**2)

    def _summed(self, tree: Any) -> Any:
        """Over all processes, while the GPU has nothing to do."""
        if self.parts == 1:
            return tree
        mx.eval(tree)
        with mx.stream(mx.cpu):
            stream = mx.default_stream(mx.cpu)
            average = nn.average_gradients({"all": tree}, self.group, communication_stream=stream)
            tree = tree_map(lambda value: value * self.parts, average["all"])
        mx.eval(tree)
        return tree


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Recompute each layer's inside in the backward pass, within the block."""
    kinds = []
    for layer in model.layers:
        kind = type(layer)
        kinds.append((layer, kind))
        ropes = (inner for inner in layer.modules() if isinstance(inner, Rope))
        index = next((rope.layer for rope in ropes), 0)
        layer.__class__ = _checkpointed(kind, model, index)
    try:
        yield
    finally:
        for layer, kind in kinds:
            layer.__class__ = kind


def _checkpointed(kind: type, model: nn.Module, index: int) -> type:
    """A subclass of a layer's class that runs under `mx.checkpoint`."""

    def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        current = model._planner.current
        now = current.now
        inv_freq = now.inv_freq[min(index, len(now.inv_freq) - 1)]
        # Every array that may want a gradient must be an argument; whole numbers must not.
        named: dict[Any, Any] = dict(enumerate(args)) | kwargs
        floats = [key for key, value in named.items() if _is_float(value)]

        def inside(
            parameters: dict, arrays: list[mx.array], inv_freq: mx.array, positions: mx.array
        ) -> Any:
            before = layer.trainable_parameters()
            layer.update(parameters)
            # A pass of its own: the tables of another trace are not to be had, and the
            # first rotation in it is that of the queries again.
            current.count += 1
            current.now = Pass(
                inv_freq=[inv_freq],
                positions=positions,
                rotary_gain=now.rotary_gain,
                query_gain=now.query_gain,
                position_gain=now.position_gain,
            )
            given = named | dict(zip(floats, arrays, strict=True))
            positional = [given.pop(i) for i in range(len(args))]
            try:
                return kind.__call__(layer, *positional, **given)
            finally:
                current.now = now
                layer.update(before)

        arrays = [named[key] for key in floats]
        return mx.checkpoint(inside)(layer.trainable_parameters(), arrays, inv_freq, now.positions)

    return type(kind.__name__, (kind,), {"__call__": call})


def _is_float(value: Any) -> bool:
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
