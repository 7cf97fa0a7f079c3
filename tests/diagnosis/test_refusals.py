"""What load refuses is a problem in doctor's report, in one line."""

import pytest
from mlx_clex.convert import convert

from mlx_clex import load
from mlx_clex.diagnosis.model_report import report
from mlx_clex.errors import InputError

from ..conftest import GOLDEN, stock_folder
from ..published_configs import tiny_folder

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
REFUSED = {
    "gptq without a tensor": ({"quantization_config": GPTQ}, "quantised with gptq, but no tensor"),
    "awq without a tensor": (
        {"quantization_config": {**GPTQ, "quant_method": "awq"}},
        "quantised with awq, but no tensor",
    ),
    "fewer layers": ({"num_hidden_layers": 1, "layer_types": None}, "not in model"),
    "a narrower MLP": ({"intermediate_size": 32}, "mlp"),
    "fewer key heads": ({"num_key_value_heads": 1}, "k_proj"),
    "llama3 without its bounds": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "low_freq_factor",
    ),
    "longrope without its factors": (
        {"rope_scaling": {"type": "longrope"}},
        "'short_factor' is missing",
    ),
    "yarn without a factor": ({"rope_scaling": {"type": "yarn"}}, "'factor' is missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_load_and_doctor_refuse_the_same(name, tmp_path):
    """doctor described a folder that load refused, and UnboundLocalError was the reason."""
    change, words = REFUSED[name]
    folder = stock_folder(tmp_path, GOLDEN / "clex_llama", vocab_size=512, **change)
    with pytest.raises(InputError) as error:
        load(folder)
    (problem,) = [text for row, text in report(str(folder)) if row == "problem"]
    for message in (problem, str(error.value)):
        assert words in message, message
        assert "\n" not in message


def test_a_folder_that_loads_has_no_problem(tmp_path):
    """The report of a good model must not send people looking."""
    folder = stock_folder(tmp_path, GOLDEN / "clex_llama", vocab_size=512)
    assert [text for row, text in report(str(folder)) if row == "problem"] == []


@pytest.mark.parametrize("method", ["clex", "yarn"])
@pytest.mark.parametrize("name", ["phi-3.5-mini", "phi-3.5-moe"])
def test_a_converted_phi_is_described(name, method, tmp_path):
    """transformers refused the rope_scaling of converted Phi-3 folders, and doctor fell over."""
    source = tiny_folder(name, tmp_path / "source")
    made = convert(source, tmp_path / "made", scaling={"type": method})
    rows = report(str(made))
    assert all("mlx-lm uses the long_factor" in text for row, text in rows if row == "problem")
    assert any(method in text for row, text in rows if row not in ("model", "weights")), rows
