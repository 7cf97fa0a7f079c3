"""The compiled step: its loss and gradients, one trace for all scales, checkpointing."""

import argparse
import os

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gpt_neox, phi
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_clex import lora
from mlx_clex.model.chunked_loss import loss_for_gradient, summed_loss, token_losses
from mlx_clex.model.planner import given_pass
from mlx_clex.model.scaled_model import attach
from mlx_clex.training.draws import Draw
from mlx_clex.training.step import Batch, TrainingStep, checkpointed_layers

from ..conftest import CONFIGS, randomise, scaled_llama, tiny_llama
from ..tiny_families import tiny

LENGTH = 40


def batch_of(rows=2, length=LENGTH, seed=0, vocabulary=64):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
    weights = (rng.random((rows, length)) < 0.7).astype(np.float32)
    return Batch(ids[:, :-1], ids[:, 1:], weights)


def drawn(scale, length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    positions = np.sort(rng.choice(int(16 * scale) + length, length, replace=False))
    return Draw(scale, positions.astype(np.float32))


def make_step(name="clex", lora=False, lr=0.0, model=None, **options):
    model = model or scaled_llama(name)
    if lora:
        model.freeze()
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
        model.scaling.unfreeze()
    model.train()
    return TrainingStep(model, optim.SGD(learning_rate=lr), **options)


def heads():
    """Models with every kind of head: untied, tied, quantised, with a bias, none apart."""
    untied = scaled_llama("clex")
    tied = tiny_llama()
    tied.args.tie_word_embeddings = True
    tied.pop("lm_head")
    quantised_tied = tiny_llama()
    quantised_tied.args.tie_word_embeddings = True
    quantised_tied.pop("lm_head")
    nn.quantize(quantised_tied, 32, 8)
    quantised = tiny_llama()
    nn.quantize(quantised, 32, 8)
    lora = tiny_llama()
    lora.freeze()
    linear_to_lora_layers(
        lora, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["lm_head", "self_attn.q_proj"]}
    )
    lora.lm_head.lora_b = mx.random.normal(lora.lm_head.lora_b.shape)
    mx.random.seed(0)
    biased = phi.Model(
        phi.ModelArgs(
            vocab_size=64,
            hidden_size=64,
            num_attention_heads=4,
            num_hidden_layers=2,
            num_key_value_heads=4,
            intermediate_size=64,
            max_position_embeddings=16,
        )
    )
    inside = gpt_neox.Model(
        gpt_neox.ModelArgs(
            model_type="gpt_neox",
            max_position_embeddings=16,
            hidden_size=64,
            num_attention_heads=4,
            num_hidden_layers=2,
            layer_norm_eps=1e-5,
            vocab_size=64,
            rotary_emb_base=10_000,
            rotary_pct=0.5,
        )
    )
    models = {
        "tied": tied,
        "quantised": quantised,
        "quantised tied": quantised_tied,
        "adapted": lora,
        "biased": biased,
        "inside the body": inside,
    }
    return {"untied": untied} | {k: attach(m, {"type": "clex"}) for k, m in models.items()}


def freeze_quantised(model):
    for _, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            module.freeze(recurse=False)


def plain_loss(model, tokens, targets, weights):
    return (token_losses(model(tokens).astype(mx.float32), targets) * weights).sum()


@pytest.mark.parametrize("chunk", [7, 8, 10, 40, 100])
@pytest.mark.parametrize("head", heads())
def test_the_loss_in_chunks_is_the_plain_loss(head, chunk):
    """Loss and every gradient, at lengths that are and are not multiples of the chunk."""
    model = heads()[head]
    freeze_quantised(model)
    tokens, targets, weights = (mx.array(a) for a in batch_of())

    def chunked(*arrays):
        return loss_for_gradient(model, *arrays, chunk)

    ours = nn.value_and_grad(model, chunked)
    theirs = nn.value_and_grad(model, lambda *arrays: plain_loss(model, *arrays))
    (_, loss), gradient = ours(tokens, targets, weights)
    wanted_loss, wanted = theirs(tokens, targets, weights)

    assert abs(loss.item() / wanted_loss.item() - 1) < 1e-5
    evaluated = summed_loss(model, tokens, targets, weights, chunk)
    assert abs(evaluated.item() / wanted_loss.item() - 1) < 1e-5
    wanted = dict(tree_flatten(wanted))
    gradient = dict(tree_flatten(gradient))
    assert gradient.keys() == wanted.keys()
    largest = max(mx.abs(g).max().item() for g in wanted.values())
    for name, theirs_ in wanted.items():
        error = mx.abs(gradient[name] - theirs_).max().item() / largest
        assert error < 1e-5, f"{name}: {error:.1e}"


def test_a_chunk_is_of_all_rows_together(monkeypatch):
    """With a batch of four the logits took four times the memory that a chunk is given."""
    shapes = []

    def seen(logits, targets):
        shapes.append(logits.shape)
        return token_losses(logits, targets)

    monkeypatch.setattr("mlx_clex.model.chunked_loss.token_losses", seen)
    model = heads()["untied"]
    tokens, targets, weights = (mx.array(a) for a in batch_of())
    mx.eval(loss_for_gradient(model, tokens, targets, weights, 10))
    rows = len(tokens)
    assert rows > 1
    assert max(b * length for b, length, _ in shapes) == 10
    assert sum(length for _, length, _ in shapes) == tokens.shape[1]


@pytest.mark.parametrize("checkpoint", [False, True])
def test_ten_scales_ten_losses_one_trace(checkpoint):
    """A scale that became a constant of the compiled step would give one loss."""
    step = make_step(grad_checkpoint=checkpoint)
    losses = {step(batch_of(), drawn(float(t))).loss for t in range(1, 11)}
    assert len(losses) == 10
    assert step.traces == 1


@pytest.mark.filterwarnings("ignore:.*past the 16")
@pytest.mark.parametrize(
    ("name", "gains"),
    [
        *(
            (name, {})
            for name in ("clex", "gene", "gene-param", "dynamic", "yarn", "yarn-t", "none")
        ),
        ("clex", {"log_gain": True}),
    ],
)
def test_the_step_rotates_as_the_model_does(name, gains):
    """Loss of the compiled step against the model's own, at the scale of the length."""
    _check_loss(make_step(model=scaled_llama(name, **gains)))


@pytest.mark.filterwarnings("ignore:.*past the 16")
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_scaled_layer_after_others_has_its_own_frequencies(checkpoint):
    """Training gave the first scaled layer the coefficients of the first layer of all."""
    scaling = {"type": "gene-param", "factor": 4}
    model = attach(tiny("olmo3", num_key_value_heads=4), scaling, trained_length=16)
    randomise(model.scaling)
    _check_loss(make_step(model=model, grad_checkpoint=checkpoint))


def _check_loss(step):
    """Hold the loss of a step at a length against the model's own."""
    model, batch = step.model, batch_of()
    length_draw = Draw(model.scaling.scale_at(LENGTH), np.arange(LENGTH, dtype=np.float32))
    loss = step(batch, length_draw).loss
    model.eval()
    tokens, targets, weights = (mx.array(a) for a in batch)
    assert abs(loss / plain_loss(model, tokens, targets, weights).item() - 1) < 1e-5


@pytest.mark.parametrize("name", ["clex", "gene-param"])
@pytest.mark.parametrize("log_scale", [False, True])
def test_checkpointing_changes_no_gradient(name, log_scale):
    """Frequencies that a checkpointed layer closes over get gradient zero, silently."""
    model = scaled_llama(name, log_scale=log_scale)
    model.train()
    step = TrainingStep(model, optim.SGD(learning_rate=0.0))
    inputs = step.inputs(batch_of(), drawn(5.0))

    def gradient(checkpointed):
        step.grad_checkpoint = checkpointed
        objective = nn.value_and_grad(model, step._objective)
        return dict(tree_flatten(objective(inputs)[1]))

    plain, recomputed = gradient(False), gradient(True)
    for key, value in plain.items():
        error = mx.abs(value - recomputed[key]).max().item()
        assert error < 1e-5 * max(1.0, mx.abs(value).max().item()), f"{key}: {error:.1e}"
    learned = [value for key, value in plain.items() if key.startswith("scaling.")]
    assert learned
    assert all(mx.abs(value).max().item() > 1e-4 for value in learned)


def test_checkpointing_gives_the_gradient_of_differences():
    """Against the loss itself, for one entry of the network's second matrix."""
    model = scaled_llama("clex")
    step = make_step(model=model)
    inputs = step.inputs(batch_of(), drawn(5.0))

    def loss(delta):
        before = model.scaling.down_proj
        model.scaling.down_proj = before.at[3, 5].add(delta)
        with given_pass(model, step.pass_for(inputs)):
            out = plain_loss(model, *inputs[:3]).item()
        model.scaling.down_proj = before
        return out

    step.grad_checkpoint = True
    objective = nn.value_and_grad(model, step._objective)
    _, gradient = objective(inputs)
    ours = gradient["scaling"]["down_proj"][3, 5].item()
    differences = (loss(2e-3) - loss(-2e-3)) / 4e-3
    assert abs(ours - differences) < 0.02 * abs(differences) + 0.02


@pytest.mark.parametrize("checkpoint", [False, True])
def test_training_leaves_the_model_usable(checkpoint):
    """An array of the trace left behind breaks the next pass outside the step."""
    step = make_step(lora=True, lr=0.05, grad_checkpoint=checkpoint, max_grad_norm=0.5)
    model = step.model
    before = model.scaling.inv_freq(4.0)
    losses = [step(batch_of(), drawn(4.0)).loss for _ in range(4)]
    assert losses[-1] < losses[0]
    model.eval()
    ids = mx.array(batch_of().tokens)
    assert mx.isfinite(model(ids)).all().item()
    assert mx.abs(model.scaling.inv_freq(4.0) - before).max().item() > 0


def test_a_frozen_scaling_is_solved_exactly_and_stays():
    """Without training of its own it enters the step as frequencies."""
    model = scaled_llama("clex")
    model.scaling.freeze()
    step = make_step(model=model, lr=0.1)
    assert not step.learns_scaling
    before = mx.array(model.scaling.down_proj)
    losses = {step(batch_of(), drawn(float(t))).loss for t in (1, 2, 3)}
    assert len(losses) == 3
    assert step.traces == 1
    assert mx.array_equal(model.scaling.down_proj, before)


def test_micro_batches_weigh_by_their_tokens():
    """Two micro-batches must move the weights as one batch of all their tokens does."""
    together, apart = make_step(lr=0.1), make_step(lr=0.1)
    one, two = batch_of(rows=1, seed=1), batch_of(rows=1, seed=2)
    two = two._replace(weights=two.weights * (np.arange(LENGTH) < 5))
    both = Batch(*(np.concatenate([a, b]) for a, b in zip(one, two, strict=True)))
    draw = drawn(3.0)
    together(both, draw)
    apart(one, draw, update=False)
    apart(two, draw, update=True)
    ours = dict(tree_flatten(apart.model.parameters()))
    for name, value in tree_flatten(together.model.parameters()):
        assert mx.abs(value - ours[name]).max().item() < 1e-5, name
    assert apart._carried is None


def moved_by(limit, learns=True):
    """What one step of plain descent changes, by name, and the norm that it reports."""
    model = scaled_llama("clex")
    if not learns:
        model.scaling.freeze()
    before = {k: mx.array(v) for k, v in tree_flatten(model.parameters())}
    step = make_step(model=model, lr=1.0, max_grad_norm=limit)
    norm = step(batch_of(), drawn(8.0)).norm
    return {k: v - before[k] for k, v in tree_flatten(model.parameters())}, norm


def norm_of(arrays):
    return sum(mx.square(v).sum().item() for v in arrays) ** 0.5


def test_clipping_bounds_the_update():
    """The scaling's and the rest's; the norm is reported as it was before."""
    moved, norm = moved_by(0.01)
    unclipped, same = moved_by(0.0)
    assert norm == same == pytest.approx(norm_of(unclipped.values()), rel=1e-3)
    assert norm > 0.1
    own = [v for k, v in moved.items() if k.startswith("scaling.")]
    rest = [v for k, v in moved.items() if not k.startswith("scaling.")]
    assert norm_of(own) == pytest.approx(0.01, rel=1e-2)
    assert norm_of(rest) == pytest.approx(0.01, rel=1e-2)


def test_clipping_does_not_let_the_scaling_hold_up_the_model():
    """CLEX's network has a far larger gradient than the model, most of all at large scales.

    Clipped together, steps at these scales left the model nearly as it was: its perplexity
    rose from 8 times the trained length on, whatever else was tried.
    """
    (held, alone), (moved, together) = moved_by(0.01, learns=False), moved_by(0.01)
    assert together > 1.5 * alone
    for name in held:
        if not name.startswith("scaling."):
            assert mx.abs(held[name] - moved[name]).max().item() < 1e-6, name


def test_the_norm_of_half_precision_gradients_is_their_own():
    """Summed in bfloat16, 300 gradients of norm 1 had one of 16, and 1,000 too."""
    gradient = {str(i): mx.ones((1,), mx.bfloat16) for i in range(1000)}
    clipped, norm = make_step(max_grad_norm=1.0)._clipped(gradient)
    assert norm.item() == pytest.approx(1000**0.5, rel=1e-3)
    assert norm_of(clipped.values()) == pytest.approx(1.0, rel=1e-2)


def test_plain_steps_cut_rows_into_pieces():
    """Positions 0..L0-1 again for every piece, and no token lost."""
    step = make_step()
    batch = batch_of(length=32)
    pieces = Draw(1.0, np.arange(16, dtype=np.float32), pieces=2)
    result = step(batch, pieces)
    assert result.tokens == batch.weights.sum()
    cut = batch.cut(2)
    assert cut.tokens.shape == (4, 16)
    whole = step(cut, Draw(1.0, np.arange(16, dtype=np.float32)))
    assert abs(result.loss - whole.loss) < 1e-3


def test_no_mask_array_is_built():
    """On Metal only mask="causal" has a blocked backward pass."""
    model = scaled_llama("gene")
    masks = []
    kind = type(model.layers[0].self_attn)

    class Spy(kind):
        def __call__(self, x, mask=None, cache=None):
            masks.append(mask)
            return super().__call__(x, mask, cache)

    for layer in model.layers:
        layer.self_attn.__class__ = Spy
    step = make_step(model=model, grad_checkpoint=True)
    step(batch_of(), drawn(3.0))
    assert masks
    assert set(masks) == {"causal"}


def test_checkpointing_ends_with_its_block():
    """A class left behind would recompute layers for ever."""
    model = scaled_llama("clex")
    kind = type(model.layers[0])
    with checkpointed_layers(model):
        assert type(model.layers[0]) is not kind
    with pytest.raises(ZeroDivisionError), checkpointed_layers(model):
        _ = 1 // 0
    assert type(model.layers[0]) is kind


def test_fresh_clex_learns_its_second_matrix_first():
    """At W_down = 0 the gradient of W_up is zero and that of W_down is not."""
    model = attach(tiny_llama(), {"type": "clex", **CONFIGS["clex"]})
    step = make_step(model=model, lr=0.1)
    step(batch_of(), drawn(5.0))
    assert mx.abs(model.scaling.down_proj).max().item() > 0
    randomise(model.scaling)


@pytest.mark.parametrize(("given", "used"), [(None, "1"), ("20", "20")])
def test_fine_tuning_computes_in_depth(given, used, monkeypatch):
    """MLX left the gradients of frequencies to the end of a step, with what they need of every
    layer: 1.17 times the memory of mlx_lm.lora, now 0.79 (SmolLM2, 512 tokens)."""
    monkeypatch.setattr(lora, "Ranks", Stop)
    monkeypatch.setenv("MLX_BFS_MAX_WIDTH", "")  # so that it is restored after the test
    monkeypatch.delenv("MLX_BFS_MAX_WIDTH")
    if given:
        monkeypatch.setenv("MLX_BFS_MAX_WIDTH", given)
    with pytest.raises(Stop):
        lora.run(argparse.Namespace())
    assert os.environ["MLX_BFS_MAX_WIDTH"] == used


class Stop(Exception):  # noqa: N818 - ends a run where its work would begin
    def __init__(self, *_):
        raise self
