"""Runs that go on from an earlier one, and those that must not."""

import shutil

import mlx.core as mx
import pytest

from ..conftest import as_peft
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
