"""Format --help: options in groups, each with its default, and an example at the end.

An option has the same meaning in every command, so one table groups the options of all commands.
"""

import argparse
from typing import Any

# Title of a group -> the options in it. All other options stay under "options".
GROUPS = {
    "model": (
        "model hf_path mlx_path revision adapter_path save_path draft_model num_draft_tokens "
        "trust_remote_code upload_repo dtype"
    ),
    "text": (
        "prompt prompt_file prompt_cache_file expected_length data split mask_prompt hf_dataset "
        "system_prompt prefill_response ignore_chat_template use_default_chat_template "
        "chat_template_config chat_template chat_template_args apply_chat_template image"
    ),
    "scale": "scale scalings factor own_rope trained_length scale_a scale_b freeze freeze_for",
    "answer": (
        "max_tokens temp top_p min_p top_k min_tokens_to_keep xtc_probability xtc_threshold seed "
        "extra_eos_token eos_token verbose"
    ),
    "quantisation": (
        "quantize dequantize q_bits q_group_size q_mode quant_predicate quantize_activations"
    ),
    "memory and speed": (
        "kv_bits kv_group_size quantized_kv_start max_kv_size prefill_step_size pipeline "
        "decode_concurrency prompt_concurrency prompt_cache_size prompt_cache_bytes memory backend "
        "force"
    ),
    "measurement": (
        "task tasks lengths length depths trials windows protocol chunk stride limit num_shots "
        "max_length include_path metadata effective_length confirm_run_unsafe_code max_scale"
    ),
    "output": "output json dry_run log_level",
}


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Adds the default of an option if its help does not name it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        told = "efault" in text or text.startswith("Refused") or default == argparse.SUPPRESS
        flag = isinstance(default, bool) or action.nargs == 0
        if told or flag or action.required or not action.option_strings:
            return text
        empty = default in (None, "", (), [], "{}")
        return f"{text.removesuffix('.')}. Default: {'none' if empty else '%(default)s'}."


def group_options(parser: argparse.ArgumentParser) -> None:
    """Move the options of a parser into `GROUPS`, in their order."""
    words = [str(a.metavar or a.dest) for a in parser._positionals._group_actions]
    # --help lists the options below; a usage line with all of them fills the screen.
    parser.usage = " ".join(["%(prog)s", *words, "[options]"])
    # argparse has no public way to regroup the options of a parent parser.
    flat: list[Any] = parser._optionals._group_actions
    own = parser._action_groups[2:]  # after positional arguments and options
    for title, names in GROUPS.items():
        here = [action for name in names.split() for action in flat if action.dest == name]
        if here:
            group = next(
                (g for g in parser._action_groups if g.title == title), None
            ) or parser.add_argument_group(title)
            group._group_actions.extend(here)
            for action in here:
                flat.remove(action)
    rest = [group for group in own if group.title not in GROUPS]
    parser._action_groups[:] = [g for g in parser._action_groups if g not in rest] + rest


class _Elsewhere(argparse.Action):
    """An option of mlx-lm's command that has another name here."""

    def __init__(self, *args: Any, advice: str, **kwargs: Any) -> None:
        kwargs |= {"nargs": "?", "metavar": "VALUE", "default": argparse.SUPPRESS}
        super().__init__(*args, **kwargs)
        self.advice = advice

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        parser.error(f"{self.option_strings[0]} is an option of mlx-lm: {self.advice}")


def point_elsewhere(parser: argparse.ArgumentParser, options: dict[str, str]) -> None:
    """Refuse options of mlx-lm with advice.

    Args:
        parser: parser of the command.
        options: option -> a sentence that says what to do instead.
    """
    group = parser.add_argument_group("options of mlx-lm that have another name here")
    for option, advice in options.items():
        group.add_argument(option, action=_Elsewhere, advice=advice, help=advice, dest="_elsewhere")
