"""Optimizers, and their learning rates and precision."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_clex.errors import InputError
from mlx_clex.training.setup import OPTIMIZERS, build_optimizer, choose_trained

from ..conftest import scaled_llama


def test_half_precision_weights_train(tmp_path):
    """At 1e-5 a norm's bfloat16 weight of 1 stayed 1 for ever; accumulating made it float32."""
    weight = {"norm": mx.ones((4,), mx.bfloat16), "adapter": mx.ones((4,))}
    gradient = {"norm": mx.ones((4,)), "adapter": mx.ones((4,))}
    file = str(tmp_path / "optimizer.safetensors")
    for part in range(2):
        optimizer = build_optimizer("adam", {}, 1e-5, scaling_share=1.0)
        optimizer.init(weight)
        if part == 1:  # as a resumed run does
            optimizer.state = tree_unflatten(list(mx.load(file).items()))
        for _ in range(200):
            weight = optimizer.apply_gradients(gradient, weight)
        mx.save_safetensors(file, dict(tree_flatten(optimizer.state)))
    assert (weight["norm"].dtype, weight["adapter"].dtype) == (mx.bfloat16, mx.float32)
    assert weight["adapter"][0].item() < 1 - 400e-5
    assert mx.array_equal(weight["norm"], weight["adapter"].astype(mx.bfloat16)).item()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_minds_its_learning_rate(name):
    """adafactor took one of its own, for the model and for the scaling."""

    def moved(share):
        optimizer = build_optimizer(name, {}, 1e-3, scaling_share=share)
        before = {"scaling": {"up_proj": mx.ones((4, 4))}, "rest": mx.ones((4, 4))}
        after = optimizer.apply_gradients(tree_map(mx.ones_like, before), before)
        return [mx.abs(after[k] - before[k]).max().item() for k in ("rest",)] + [
            mx.abs(after["scaling"]["up_proj"] - 1).max().item()
        ]

    (rest, whole), (same, tenth) = moved(1.0), moved(0.1)
    assert rest == pytest.approx(whole, rel=1e-3)
    assert same == rest
    assert tenth == pytest.approx(whole / 10, rel=0.01)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"kays": ["mlp.up_proj"]}, "lora_parameters has 'kays', which is none of: dropout"),
        (
            {"keys": ["q_proj", "v_proj"]},
            "keys has q_proj, v_proj.* Names here: .*self_attn.q_proj",
        ),
        ({"keys": ["self_attn.q_proj", "self_attn.v_porj"]}, "keys has self_attn.v_porj, which"),
    ],
)
def test_unknown_settings_of_adapters_are_refused(more, match):
    """A misspelt `keys` was ignored, and other modules, or none, were trained."""
    options = {
        "fine_tune_type": "lora",
        "num_layers": 1,
        "scaling": False,
        "norms_and_embeddings": False,
    }
    parameters = {"rank": 2, "scale": 1.0, "dropout": 0.0, **more}
    with pytest.raises(InputError, match=match):
        choose_trained(scaled_llama("clex"), lora_parameters=parameters, **options)


def test_adapters_of_modules_outside_the_layers():
    """mlx-lm finds them by their whole name."""
    choose_trained(
        model := scaled_llama("clex"),
        fine_tune_type="lora",
        num_layers=1,
        scaling=False,
        norms_and_embeddings=False,
        lora_parameters={"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["model.embed_tokens"]},
    )
    trained = dict(tree_flatten(model.trainable_parameters()))
    assert {name.rpartition(".")[0] for name in trained} == {"model.embed_tokens"}
