"""A run of fine-tuning from its command line: what it does, prints and leaves."""

import mlx.core as mx
import pytest

from mlx_clex import load
from mlx_clex.training.log import read_log

from .commands import argv_for, call

pytestmark = pytest.mark.usefixtures("eager")


def test_a_run_trains_reports_and_saves(base, texts, tmp_path, capsys):
    """Losses fall, perplexities by length are printed, and adapters change the answers."""
    mx.enable_compile()
    adapters = tmp_path / "adapters"
    more = "--iters 30 --save-every 15 --steps-per-eval 30 --eval-lengths 32 64 --grad-checkpoint"
    more += " --scaling-learning-rate 1e-5"
    assert call(argv_for(base, texts, adapters, more, "--test")) == 0

    lines = read_log(adapters / "log.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["iteration"] for line in steps] == list(range(1, 31))
    assert sum(line["loss"] for line in steps[-5:]) < sum(line["loss"] for line in steps[:5])
    assert len({line["scale"] for line in steps}) > 3
    assert steps[-1]["learning_rate"] == pytest.approx(1e-3)
    assert steps[-1]["tokens"] == 30 * 2 * 32
    first, last = (line for line in lines if "valid_loss" in line)
    assert (first["iteration"], last["iteration"]) == (0, 30)
    assert last["valid_loss"] < first["valid_loss"]
    assert last["perplexity"].keys() == {"32", "64"}
    printed = capsys.readouterr().out
    assert "Iter 30: Train loss" in printed
    assert "Iter 30: Perplexity at 32 tokens" in printed
    assert "Test ppl" in printed
    saves = sorted(path.name for path in (adapters / "checkpoints").iterdir())
    assert saves == ["0000015", "0000030"]
    before, after = load(base)[0], load(base, adapter_path=adapters)[0]
    ids = mx.arange(40)[None]
    assert mx.abs(before(ids) - after(ids)).max().item() > 0
    assert not mx.array_equal(before.scaling.down_proj, after.scaling.down_proj)


def test_a_run_tells_its_plan_and_what_it_made(base, texts, tmp_path, capsys):
    """The draw of scales and positions decided the result, and was not printed."""
    adapters = tmp_path / "a"
    more = "--iters 3 --grad-accumulation-steps 2 --max-seq-length 64 --eval-lengths 64"
    assert call(argv_for(base, texts, adapters, more)) == 0
    printed, progress = capsys.readouterr()
    plan, _, end = printed.partition("Iter 0: ")
    lines = dict(line.split(": ", 1) for line in plan.splitlines())
    told = {name: text.strip() for name, text in lines.items()}
    assert told["model"] == f"{base}: clex, trained length 32 tokens, reach 256 tokens"
    assert told["trained"].startswith("lora of all 2 layers: ")
    assert told["scale"].startswith("uniform, at most 8: ")
    assert told["positions"].startswith("cream: ")
    assert told["plain steps"] == "25% of the steps, in rows of at most 32 tokens"
    assert "(valid), " in told["held out"]
    assert told["tokens"].startswith("128 an iteration (2 x 64), 384 in all, ")
    for text in ("Validating", "Perplexity at 64 tokens"):
        assert f"{text}:   0%" in progress, "shown before the first of it is done"
    assert f"the result is in {adapters}" in end
    for command in ("generate", "fuse"):
        assert f"mlx_clex {command} --model {base} --adapter-path {adapters} --" in end


def test_stock_mlx_lm_reads_the_adapters(base, texts, tmp_path):
    """Its loader refuses every leaf it does not know."""
    from mlx_lm.tuner.utils import load_adapters

    for kind in ("lora", "dora", "scaling", "full"):
        adapters = tmp_path / kind
        more = f"--iters 1 --scaling-learning-rate 1e-5 --fine-tune-type {kind}"
        assert call(argv_for(base, texts, adapters, more)) == 0
        model = load(base)[0]
        load_adapters(model, str(adapters))
        assert (adapters / "scaling.safetensors").is_file()
