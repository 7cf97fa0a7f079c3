"""Runs that go on from an earlier one, and those that must not."""

import json
import shutil

import mlx.core as mx
import pytest

from mlx_clex import load

from ..conftest import GOLDEN, as_peft, stock_folder
from ..test_own_rope import LLAMA3
from .commands import WORDS, argv_for, arrays, call, equal

pytestmark = pytest.mark.usefixtures("eager")


def test_resume_without_a_save_and_after_the_end(base, texts, tmp_path, capsys):
    """The one starts at 0 and says so, the other has nothing to do."""
    argv = argv_for(base, texts, tmp_path / "a", "--iters 2", "--resume")
    assert call(argv) == 0
    assert "no save yet" in capsys.readouterr().err
    assert call(argv) == 0
    assert "has all 2 iterations" in capsys.readouterr().err


def test_resume_refuses_another_run(base, converted, texts, tmp_path, capsys):
    """What differs is said; starting over in the folder is refused too."""
    assert call(argv_for(base, texts, tmp_path / "a", "--iters 2")) == 0
    model = converted("clex_llama_gqa_log_scale")
    assert call(argv_for(model, texts, tmp_path / "a", "--iters 4", "--resume")) == 2
    assert "the model was" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text(WORDS * 50)
    assert call(argv_for(base, tmp_path / "other", tmp_path / "a", "--iters 4", "--resume")) == 2
    assert "the training data was" in capsys.readouterr().err
    other = argv_for(base, texts, tmp_path / "a", "--iters 4 --seed 5", "--resume")
    assert call(other) == 2
    assert "seed was 0 and is 5" in capsys.readouterr().err
    assert call(argv_for(base, texts, tmp_path / "a", "--iters 2")) == 2
    assert "go on with --resume" in capsys.readouterr().err


def test_a_base_of_the_same_shape_is_another_model(converted, texts, tmp_path, capsys):
    """A run went on with weights it had not begun with, since only sizes were looked at."""
    base = tmp_path / "base"
    shutil.copytree(converted("clex_llama"), base)
    assert call(argv_for(base, texts, tmp_path / "a", "--iters 1")) == 0
    file = base / "model.safetensors"
    weights = mx.load(str(file))
    name = "model.layers.0.self_attn.q_proj.weight"
    mx.save_safetensors(str(file), weights | {name: weights[name] + 1}, {"format": "mlx"})
    assert call(argv_for(base, texts, tmp_path / "a", "--iters 2", "--resume")) == 2
    assert "the model was" in capsys.readouterr().err


def test_more_iterations_bend_a_cosine(base, texts, tmp_path, capsys):
    """The rate jumped up again at the old end."""
    argv = argv_for(base, texts, tmp_path / "a", "--iters 2 --cosine", "--resume")
    assert call(argv) == 0
    assert call([*argv, "--iters", "4"]) == 2
    assert "iters was 2 and is 4" in capsys.readouterr().err


def test_more_iterations_of_a_rising_schedule(base, texts, tmp_path, capsys):
    """The scaling's rate is a share of the highest one within the iterations, which grew."""
    config = tmp_path / "c.yaml"
    config.write_text("lr_schedule: {name: linear_schedule, arguments: [0.0, 0.01, 100]}\n")
    for more, status in (("", 0), ("--scaling-learning-rate 1e-3", 2)):
        options = f"--iters 2 -c {config} {more}"
        argv = argv_for(base, texts, tmp_path / f"a{status}", options, "--resume")
        assert call(argv) == 0
        assert call([*argv, "--iters", "4"]) == status
    assert "iters was 2 and is 4" in capsys.readouterr().err


def test_a_run_from_adapters_resumes(base, texts, tmp_path, capsys):
    """Its save has what it was started from; the file need not even be there any more."""
    start = str(tmp_path / "a" / "adapters.safetensors")
    assert call(argv_for(base, texts, tmp_path / "a", "--iters 2")) == 0
    folder = str(tmp_path / "a")
    whole = argv_for(base, texts, tmp_path / "b", "--iters 4", "--resume-adapter-file", folder)
    assert call(whole) == 0
    half = argv_for(base, texts, tmp_path / "c", "--iters 2", "--resume-adapter-file", start)
    assert call(half) == 0
    shutil.rmtree(tmp_path / "a")
    rest = argv_for(base, texts, tmp_path / "c", "--iters 4 --grad-checkpoint", "--resume")
    assert call([*rest, "--resume-adapter-file", start]) == 0
    ours, theirs = arrays(tmp_path / "c"), arrays(tmp_path / "b")
    for name in ours:
        for key, value in ours[name].items():
            assert mx.allclose(value, theirs[name][key], atol=1e-6), key


def test_adapters_of_another_rank_do_not_start_a_run(base, texts, tmp_path, capsys):
    """They trained to the end, and the result could not be loaded."""
    config = tmp_path / "c.yaml"
    config.write_text("lora_parameters: {rank: 4, scale: 20.0, dropout: 0.0}\n")
    assert call(argv_for(base, texts, tmp_path / "a", f"--iters 1 -c {config}")) == 0
    file = str(tmp_path / "a" / "adapters.safetensors")
    argv = argv_for(base, texts, tmp_path / "b", "--iters 1", "--resume-adapter-file", file)
    assert call(argv) == 2
    assert "which this run trains as" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "more"),
    [("lora_parameters: {rank: 8, scale: 10.0, dropout: 0.0}", ""), ("", "--fine-tune-type dora")],
)
def test_adapters_that_would_be_another_model_do_not_start_a_run(
    base, texts, tmp_path, config, more, capsys
):
    """Their scale and kind were read and dropped."""
    file = tmp_path / "c.yaml"
    file.write_text(config)
    assert call(argv_for(base, texts, tmp_path / "a", "--iters 1")) == 0
    for given in (tmp_path / "a", tmp_path / "a" / "adapters.safetensors"):
        argv = argv_for(base, texts, tmp_path / "b", f"--iters 1 {more} -c {file}")
        assert call([*argv, "--resume-adapter-file", str(given)]) == 2
        assert "has lora adapters of scale 20, but this run" in capsys.readouterr().err


def test_another_scaling_than_that_of_the_adapters_is_told(texts, tmp_path, capsys):
    """It may be wanted, and it may be an option that was forgotten."""
    folder = stock_folder(tmp_path, GOLDEN / "clex_llama", vocab_size=512)
    more = "--iters 1 --scaling clex --trained-length 32 --max-factor"
    assert call(argv_for(folder, texts, tmp_path / "a", f"{more} 8 --log-gain")) == 0
    capsys.readouterr()
    argv = argv_for(folder, texts, tmp_path / "b", f"{more} 4")
    assert call([*argv, "--resume-adapter-file", str(tmp_path / "a")]) == 0
    said = "max_factor was 8 and is 4, log_gain was True and is False"
    assert f"were trained with another scaling: {said}." in capsys.readouterr().err


def test_a_network_that_is_not_trained_goes_along(base, texts, tmp_path):
    """A run from it was refused, or would have saved a model without it."""
    options = "--iters 1 --learning-rate 1e-2 --scaling-learning-rate"
    assert call(argv_for(base, texts, tmp_path / "a", f"{options} 1e-2")) == 0
    first = arrays(tmp_path / "a")["scaling.safetensors"]
    more = argv_for(base, texts, tmp_path / "b", f"{options} 0")
    more += ["--resume-adapter-file", str(tmp_path / "a")]
    for iters in ("1", "2"):  # the second goes on with a save
        assert call([*more, "--iters", iters, "--resume"]) == 0
        network = arrays(tmp_path / "b")["scaling.safetensors"]
        assert equal({"": first}, {"": network})
    model, _ = load(base, adapter_path=tmp_path / "b")
    assert mx.array_equal(model.scaling.down_proj, first["scaling.down_proj"])


def test_a_scaling_is_trained_on_top_of_adapters_as_they_are(texts, tmp_path, capsys):
    """Its save said nothing of the scaling, and did not load; other options were ignored."""
    config = {"vocab_size": 512, "max_position_embeddings": 256, "rope_scaling": LLAMA3}
    folder = stock_folder(tmp_path, GOLDEN / "clex_llama", **config)
    below, adapters = tmp_path / "a", tmp_path / "b"
    scaling = "--scaling clex --max-factor 8 --own-rope drop"
    assert call(argv_for(folder, texts, below, f"--iters 1 {scaling}")) == 0
    alone = argv_for(
        folder, texts, adapters, "--iters 1 --fine-tune-type scaling --train-norms-and-embeddings"
    )
    on_top = [*alone, "--resume-adapter-file", str(below)]
    for more, differing in (
        ("--scaling clex --max-factor 4", "max_factor was 8 and is 4"),
        ("--scaling gene", "type was 'clex' and is 'gene'"),
        ("--scaling clex --trained-length 32", "trained_length was 64 and is 32"),
        ("--scaling clex --own-rope keep", "own_rope was 'drop' and is 'keep'"),
    ):
        assert call([*on_top, *more.split()]) == 2
        assert f"which this run trains: {differing}" in capsys.readouterr().err
    assert call(on_top) == 0
    settings = [json.loads((it / "adapter_config.json").read_text()) for it in (below, adapters)]
    for key in ("rope_scaling", "trained_length", "own_rope", "lora_parameters"):
        assert settings[1][key] == settings[0][key], key
    load(folder, adapter_path=adapters)
    assert call([*alone, "--iters", "2", "--resume"]) == 2
    assert f"go on with --resume-adapter-file {below}" in capsys.readouterr().err
    assert call([*on_top, "--iters", "2", "--resume"]) == 0


def test_the_best_is_held_against_the_same_validation(base, texts, tmp_path, capsys):
    """A best at one length stood against losses at another."""
    argv = argv_for(base, texts, tmp_path / "a", "--keep-best --resume --iters")
    assert call([*argv, "1", "--eval-lengths", "32", "64"]) == 0
    assert call([*argv, "2", "--eval-lengths", "32", "96"]) == 2
    assert "eval_lengths was [32, 64] and is [32, 96]" in capsys.readouterr().err
    shutil.copytree(texts, tmp_path / "texts")
    (tmp_path / "texts" / "valid" / "a.txt").write_text(WORDS * 30)
    argv[argv.index(str(texts))] = str(tmp_path / "texts")
    assert call([*argv, "2", "--eval-lengths", "32", "64"]) == 2
    assert "the validation data was" in capsys.readouterr().err


def test_adapters_to_start_from_bring_what_lies_beside_them(base, texts, tmp_path, capsys):
    """The old adapters met a scaling and norms that had never been trained with them."""
    options = "--iters 3 --learning-rate 1e-2 --scaling-learning-rate 1e-2"
    whole = f"{options} --train-norms-and-embeddings"
    assert call(argv_for(base, texts, tmp_path / "a", whole)) == 0
    first = arrays((tmp_path / "a").resolve())
    still = "--iters 1 --learning-rate 1e-30 --scaling-learning-rate 1e-30"
    file = str(tmp_path / "a" / "adapters.safetensors")
    argv = argv_for(base, texts, tmp_path / "b", f"{still} --train-norms-and-embeddings")
    assert call([*argv, "--resume-adapter-file", file]) == 0
    assert equal(first, arrays(tmp_path / "b"))
    argv = argv_for(base, texts, tmp_path / "c", still)
    capsys.readouterr()
    assert call([*argv, "--resume-adapter-file", file]) == 2
    assert "which this run does not train" in capsys.readouterr().err


def test_a_run_starts_from_adapters_of_peft(base, texts, tmp_path, capsys):
    """At the scale that they were made with: at another one they are another model."""
    still = "--iters 1 --learning-rate 1e-30 --scaling-learning-rate 0"
    assert call(argv_for(base, texts, tmp_path / "a", "--iters 2 --scaling-learning-rate 0")) == 0
    for name, more, status in (("b", {}, 0), ("c", {"lora_alpha": 7}, 2)):
        peft = as_peft(tmp_path / "a", tmp_path / f"peft-{name}", **more)
        argv = argv_for(base, texts, tmp_path / name, still, "--resume-adapter-file", str(peft))
        capsys.readouterr()
        assert call(argv) == status
    assert "this run trains some of scale 20. Give lora_parameters" in capsys.readouterr().err
    ours, theirs = (arrays(tmp_path / name)["adapters.safetensors"] for name in "ba")
    assert all(mx.array_equal(value, theirs[key]) for key, value in ours.items())
    alone = argv_for(base, texts, tmp_path / "d", "--iters 1 --fine-tune-type scaling")
    assert call([*alone, "--resume-adapter-file", str(peft)]) == 2
    assert "cannot keep the PEFT adapters" in capsys.readouterr().err


def test_adapters_of_another_program_are_left_alone(base, texts, tmp_path, capsys):
    """A link took the place of what mlx_lm.lora had saved in the same default folder."""
    file = tmp_path / "a" / "adapters.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"theirs")
    assert call(argv_for(base, texts, file.parent, "--iters 1")) == 2
    assert "is of another program" in capsys.readouterr().err
    assert file.read_bytes() == b"theirs"
