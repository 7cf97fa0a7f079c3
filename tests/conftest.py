"""Tiny models, golden checkpoints, and settings of all tests."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests that need a hub start their own server
# On M5 and CUDA, MLX multiplies float32 in TF32, of three digits, unless told before it first does.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx_clex  # noqa: F401, I001 - first, so that OpenBLAS is found
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import save_model

from mlx_clex.model.scaled_model import attach
from mlx_clex.convert import convert
from mlx_clex.loading import load
from mlx_clex.scaling import SCALINGS

# A shell that runs the tests in the background makes them ignore SIGINT, and with them every
# program they start and stop by it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Whether the fused rotation takes fast cosines and sines.
FAST_ROPE = mx.default_device() != mx.cpu or "tests.emulate_metal" in sys.modules

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())

L0 = 16  # trained length of the tiny models, tokens

# For every method, an entry under which a tiny model crosses scales within 300 tokens,
# or stands at a scale that is not 1.
CONFIGS: dict[str, dict[str, Any]] = {
    "none": {},
    "linear": {"factor": 4},
    "ntk": {"factor": 4},
    "dynamic": {"factor": 2},
    "yarn": {"factor": 4, "beta_fast": 4, "beta_slow": 0.5},
    "yarn-t": {"factor": 4, "beta_fast": 4, "beta_slow": 0.5},
    "clex": {"max_factor": 20},
    "gene": {"factor": 2, "training_seq_len": 32},
    "gene-param": {"factor": 2, "training_seq_len": 32},
}
assert CONFIGS.keys() == SCALINGS.keys(), "a new method needs an entry here"


def tiny_llama(*, key_heads: int = 4, seed: int = 0, layers: int = 2, vocabulary: int = 64):
    """A random two-layer LLaMA of mlx-lm, 4 heads of 32 dimensions, vocabulary 64."""
    mx.random.seed(seed)
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=layers,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        head_dim=32,
        rms_norm_eps=1e-5,
        vocab_size=vocabulary,
        max_position_embeddings=L0,
        tie_word_embeddings=False,
    )
    model = llama.Model(args)
    # Sharper attention than fresh weights give, so that a wrong rotation shows.
    for layer in model.layers:
        layer.self_attn.q_proj.weight *= 4
        layer.self_attn.k_proj.weight *= 4
    mx.eval(model.parameters())
    model.eval()
    return model


def randomise(scaling, size: float = 0.2) -> None:
    """Set the learned tensors of a scaling to random values that change the answers."""
    for index, name in enumerate(scaling.learned):
        key = mx.random.key(index + 1)
        spread = mx.random.uniform(-size, size, scaling[name].shape, key=key)
        scaling[name] = spread
    mx.eval(scaling.parameters())


def scaled_llama(name: str, *, log_scale=False, log_gain=False, scale=None, **kwargs):
    """A tiny LLaMA with a method attached and random learned tensors."""
    gains = {"log_scale": log_scale, "log_gain": log_gain}
    entry = {"type": name, **CONFIGS[name], **{key: True for key, on in gains.items() if on}}
    model = attach(tiny_llama(**kwargs), entry, scale=scale)
    randomise(model.scaling)
    return model


def stock_folder(tmp_path, tokenizer_from, **config):
    """A plain LLaMA as mlx-lm saves one."""
    folder = tmp_path / "stock"
    model = tiny_llama(vocabulary=config.get("vocab_size", 512))  # the golden tokenizer's
    save_model(folder, model)
    entries = {k: v for k, v in vars(model.args).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(entries | config))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        source = tokenizer_from / name
        if source.exists():
            shutil.copy(source, folder)
    return folder


def scaled_folders(tmp_path_factory, *, factor):
    """Return a function from a method's name to a folder; "-log" adds log_scale.

    Trained at 64 tokens; clex and yarn reach `factor` times that.
    """
    made = {}
    tokenizer = GOLDEN / "clex_llama"
    config = {"vocab_size": 512, "max_position_embeddings": 64}
    made["stock"] = stock_folder(tmp_path_factory.mktemp("base"), tokenizer, **config)
    reach = {"clex": {"max_factor": factor}, "yarn": {"factor": factor}}

    def folder(name):
        if name not in made:
            method, *log = name.split("-")
            options = {**reach.get(method, {}), **({"log_scale": True} if log else {})}
            target = tmp_path_factory.mktemp("models") / name
            made[name] = convert(made["stock"], target, scaling={"type": method, **options})
        return made[name]

    return folder


def random_adapters(model, folder, seed):
    """Write adapters in the format of training."""
    loaded, _ = load(model)
    settings = {"rank": 2, "scale": 4.0, "dropout": 0.0}
    loaded.freeze()
    linear_to_lora_layers(loaded, 2, settings)
    weights = dict(tree_flatten(loaded.trainable_parameters()))
    mx.random.seed(seed)
    lora = {k: mx.random.normal(v.shape) * 0.1 for k, v in weights.items() if "lora" in k}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), lora)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def as_peft(adapters, folder, **settings):
    """Write adapters of mlx-lm in the layout of PEFT."""
    lora = json.loads((adapters / "adapter_config.json").read_text())["lora_parameters"]
    folder.mkdir()
    tensors = {}
    for name, tensor in mx.load(str(adapters / "adapters.safetensors")).items():
        peft = name.replace("lora_a", "lora_A.weight").replace("lora_b", "lora_B.weight")
        tensors[f"base_model.model.{peft}"] = mx.contiguous(tensor.T)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    config = {"peft_type": "LORA", "r": lora["rank"], "lora_alpha": lora["scale"] * lora["rank"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


@pytest.fixture(scope="session", autouse=True)
def transformers_without_torch(tmp_path_factory):
    """In programs that tests start, transformers does not find torch, as on most machines.

    Importing it is half of the time that a command takes to start. Whoever imports it himself, to
    read a .bin file, still can.
    """
    folder = tmp_path_factory.mktemp("start")
    (folder / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'torch' else find(name, *more)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield


@pytest.fixture(scope="session")
def tokens():
    """(4, 300) token ids below 64."""
    return mx.random.randint(0, 64, (4, 300), key=mx.random.key(7))


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """A function from a golden checkpoint's name to its converted folder."""
    from mlx_clex.convert import convert

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("converted") / name
            convert(str(GOLDEN / name), made[name])
        return made[name]

    return folder


def pytest_terminal_summary(terminalreporter):
    """Print which model files and published configurations passed, and why others did not."""
    from . import configuration_table, family_table

    tables = {
        "test_find_ropes.py": family_table.summary,
        "test_configurations.py": configuration_table.summary,
    }
    for file, summary in tables.items():
        outcomes: dict[str, set[str]] = {}
        for outcome in ("passed", "failed"):
            for report in terminalreporter.getreports(outcome):
                if file in report.nodeid and report.nodeid.endswith("]"):
                    name = report.nodeid.rsplit("[", 1)[1][:-1]
                    outcomes.setdefault(name, set()).add(outcome)
        for line in summary(outcomes):
            terminalreporter.write_line(line)
