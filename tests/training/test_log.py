"""The log of a run that starts, goes on, or was cut off."""

import pytest

from mlx_clex.errors import InputError
from mlx_clex.training.log import Log, read_log

from .commands import argv_for, call

pytestmark = pytest.mark.usefixtures("eager")


def test_the_log_of_a_run_that_starts_anew(tmp_path):
    """What a run left that was killed before its first save, and a line cut off by it."""
    path = tmp_path / "log.jsonl"
    for resumed, text, left in [
        (0, '{"iteration": 0}\n{"iteration": 1}\n', []),
        (1, '{"iteration": 0}\n{"iteration": 1}\n{"iteration": 2}\n', [0, 1]),
        (2, '{"iteration": 0}\n{"iteration": 1}\n{"iteration": 2}', [0, 1]),
    ]:
        path.write_text(text)
        with Log(path, resumed) as log:
            log.write({"iteration": 7})
        assert [line["iteration"] for line in read_log(path)] == [*left, 7]


@pytest.mark.parametrize(
    "line",
    [
        '{"iteration": "1", "loss": 1.0}',
        '{"iteration": -1, "loss": 1.0}',
        '{"iteration": 1, "loss": "b"}',
        '{"iteration": 1, "perplexity": [1]}',
        '{"iteration": 1, "perplexity": {"a": 1.0}}',
        f'{{"iteration": {10**400}, "loss": 1.0}}',
    ],
)
def test_a_line_that_no_run_writes_is_refused(tmp_path, line):
    """plot ended with a traceback."""
    (tmp_path / "log.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"is no log of mlx_clex lora"):
        read_log(tmp_path / "log.jsonl")


def test_a_log_that_leads_out_of_its_folder_is_not_touched(tmp_path):
    """plot read the file outside, and a resumed run emptied it."""
    outside, folder = tmp_path / "outside.jsonl", tmp_path / "run"
    outside.write_text('{"iteration": 1, "loss": 1.0}\n')
    folder.mkdir()
    (folder / "log.jsonl").symlink_to(outside)
    for use in (lambda path: read_log(path), lambda path: Log(path, 0)):
        with pytest.raises(InputError, match="leads out of its folder"):
            use(folder / "log.jsonl")
    assert outside.read_text() == '{"iteration": 1, "loss": 1.0}\n'


def test_a_log_that_a_power_cut_broke_does_not_stop_a_resume(base, texts, tmp_path):
    """Saves are on the disk for certain, the log is not."""
    adapters = tmp_path / "a"
    assert call(argv_for(base, texts, adapters, "--iters 2")) == 0
    with (adapters / "log.jsonl").open("ab") as log:
        log.write(b"\0" * 20 + b"\n")
    assert call(argv_for(base, texts, adapters, "--iters 3", "--resume")) == 0
    assert [line["iteration"] for line in read_log(adapters / "log.jsonl")][-2:] == [3, 3]
