"""Command: generate text from a prompt of any length up to the model's reach.

Takes the options of `mlx_lm.generate` and uses its generation functions. Adds the scale policy,
prompts from files, a progress bar, and errors in one line.

Not covered: images, and `--max-kv-size`, which would drop the start of a long text.
"""

import argparse
import contextlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import try_to_load_from_cache
from mlx_lm.generate import DEFAULT_PROMPT, setup_arg_parser, stream_generate

from .bundled import DEFAULT, OPENING, PREFIX
from .checkpoint.fingerprint import fingerprint
from .checkpoint.folder import check_hub_id
from .checkpoint.prompt_cache import is_ours, load_cache, metadata_of, quantised
from .checkpoint.tokenizer import end_token
from .commands.memory_check import MemoryCheck, add_force, cache_fields
from .commands.options import (
    add_shared,
    check_cache_options,
    check_default_template,
    check_ranges,
    loading_options,
    sampler_at,
)
from .commands.progress import reading_bar
from .commands.run_command import command
from .errors import InputError, generating, reading, say
from .loading import load, resolve
from .model.plans import plan_at, plan_of, planned_caches, single_caches
from .model.scaled_model import make_prompt_cache, scaled
from .model.sharding import one_voice, shared_seed
from .model.stock import config_value, stock_caches
from .serving.prompt import (
    cap_max_tokens,
    encode_prompt,
    pass_size,
    say_if_past_training,
    template_options,
)
from .serving.saved_conversation import is_conversation

_LONG_PROMPT = 256  # tokens, above which a bar shows how much is read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add options that `mlx_lm.generate` does not have or defines differently."""
    parser.add_argument(
        "--model",
        default=None,
        help="A folder with a model, a .gguf file, or a Hugging Face id. Published CLEX and "
        "GeNE checkpoints are converted on the fly, once. Default: the model of "
        f"--prompt-cache-file, else {DEFAULT}, a tiny model that comes with the package.",
    )
    parser.add_argument(
        "--prompt",
        "-p",
        default=None,
        help=f"Message to be processed by the model ('-' reads from stdin; default: "
        f"{DEFAULT_PROMPT!r}, or for the default model {OPENING!r}). With --prompt-file it "
        "follows the file's text.",
    )
    add_shared(parser, "--prompt-file", "--max-kv-size")
    add_shared(
        parser,
        "--scale",
        help="prompt (default): the scale of the whole prompt from its first token on; it grows "
        "with the text. grow: the scale of the text read so far. NUMBER: a fixed scale.",
    )
    parser.add_argument(
        "--pipeline",
        action="store_true",
        help="Under mlx.launch, split the layers among the processes instead of the heads.",
    )
    add_force(parser)


def run(args: argparse.Namespace) -> None:
    """Generate, streaming the text to stdout.

    Raises:
        InputError: an option, file or length cannot be used.
    """
    _check(args)
    group = mx.distributed.init()
    with one_voice(group):
        _run(args, group)


def _run(args: argparse.Namespace, group: mx.distributed.Group) -> None:
    if group.size() > 1 and (args.prompt_cache_file or args.draft_model):
        raise InputError(
            f"--prompt-cache-file and --draft-model need one process, but mlx.launch started "
            f"{group.size()}. Run without mlx.launch, or leave them out."
        )
    if args.seed is not None:
        mx.random.seed(args.seed)
    elif group.size() > 1:
        mx.random.seed(shared_seed(group))
    if args.model is None:
        args.model = _default_model(args)
    source = resolve(args.model)
    check = MemoryCheck(force=args.force, processes=group.size())
    fields = cache_fields(args)
    model, tokenizer = load(
        source,
        **loading_options(args),
        model_config={"quantize_activations": True} if args.quantize_activations else None,
        tokenizer_config=_saved_tokenizer_config(args),
        group=group,
        pipeline=args.pipeline,
        before_reading=check.at_load(partial(check.reading, args.max_tokens, **fields)),
    )
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(str(_end_token(tokenizer, token, model)))
    draft = _load_draft(args, tokenizer) if args.draft_model is not None else None

    saved = _saved_cache(args, model, Path(source)) if args.prompt_cache_file else None
    continues, limit = saved is not None, scaled(model).limit
    prompt = encode_prompt(args, tokenizer, continues=continues, limit=limit)
    read = max((getattr(c, "offset", 0) for c in single_caches(saved or [])), default=0)
    max_tokens = cap_max_tokens(model, read + len(prompt), args.max_tokens)
    if draft is not None:
        max_tokens = cap_max_tokens(draft, len(prompt), max_tokens, draft=True)
    if draft is not None and max_tokens == -1:
        raise InputError(
            "--draft-model drafts no more tokens than are left, which --max-tokens -1 leaves open. "
            "Give --max-tokens a number."
        )
    check.reading(read + len(prompt) + max(0, max_tokens), **fields)
    say_if_past_training(model, read + len(prompt))
    fixed_by = None
    if args.kv_bits is not None or (saved is not None and quantised(saved) is not None):
        fixed_by = "--kv-bits"  # quantised keys lose precision each time they are rotated
    elif draft is not None:
        fixed_by = "--draft-model"  # a rejected draft token must not have changed the scale
    planned = max((cache.expected_length for cache in planned_caches(saved or [])), default=0)
    expected = _expected_length(args, model, read + len(prompt), max_tokens, fixed_by, planned)
    if saved is None:
        caches = make_prompt_cache(model, expected)
        if draft is not None:
            caches += make_prompt_cache(draft, expected)
    else:
        caches = saved
        _plan_on(model, caches, expected)
    step = args.prefill_step_size
    if args.scale != "grow" and args.kv_bits is None:  # there, the answer depends on the passes
        step = pass_size(len(prompt), step)

    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "sampler": sampler_at(args.temp, args, tokenizer),
        "prompt_cache": caches,
        "prefill_step_size": step,
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size,
        "quantized_kv_start": args.quantized_kv_start,
        "draft_model": draft,
        "num_draft_tokens": args.num_draft_tokens,
    }
    _stream(args, model, tokenizer, prompt, options)


def _check(args: argparse.Namespace) -> None:
    """Refuse options before anything is loaded."""
    check_cache_options(args)
    check_default_template(args)
    template_options(args)
    if args.image:
        raise InputError("--image is not supported: mlx_clex reads text only.")
    check_ranges(args)
    if args.draft_model is not None and args.prompt_cache_file is not None:
        raise InputError("--draft-model cannot be used with --prompt-cache-file.")
    if args.system_prompt is not None and args.prompt_cache_file is not None:
        raise InputError(
            "--system-prompt would stand before the text in --prompt-cache-file, which is read "
            "already: leave it out."
        )


def _saved_tokenizer_config(args: argparse.Namespace) -> dict[str, str]:
    """Return the end token that --prompt-cache-file was written with, for the tokenizer."""
    name = args.prompt_cache_file
    if name is None:
        return {}
    with reading(f"{name} is no saved cache", always=True):
        given = json.loads(metadata_of(name).get("tokenizer_config", "{}"))
        if not isinstance(given, dict):
            raise ValueError("its tokenizer_config is no JSON object")
    end = given.get("eos_token")
    return {"eos_token": end} if isinstance(end, str) else {}  # a stranger's file gives no more


def _end_token(tokenizer: Any, given: str, model: nn.Module) -> int:
    """Return the id that --extra-eos-token gives; as in mlx-lm, a number is an id."""
    with contextlib.suppress(ValueError):
        number = int(given)
        given = next((name for name, i in tokenizer.get_vocab().items() if i == number), given)
    return end_token(tokenizer, given, config_value(model, "vocab_size"))


def _default_model(args: argparse.Namespace) -> str:
    """Return the model named in --prompt-cache-file, or the bundled model."""
    if args.prompt_cache_file is None:
        return DEFAULT
    model = metadata_of(args.prompt_cache_file).get("model")
    if model is None:
        raise InputError(
            f"{args.prompt_cache_file} does not name the model that wrote it: give it as --model."
        )
    here = model.startswith(PREFIX) or Path(model).exists()
    if not here and not try_to_load_from_cache(check_hub_id(model), "config.json"):
        # A stranger's file must not choose what is downloaded.
        raise InputError(
            f"{args.prompt_cache_file} was written with {model}, which is not on this machine. "
            f"Give --model {model} to download it."
        )
    return model


def _expected_length(
    args: argparse.Namespace,
    model: nn.Module,
    prompt_length: int,
    max_tokens: int,
    fixed_by: str | None,
    planned: int,
) -> int | None:
    """Return the length that sets the scale, in tokens; None: the length read so far.

    `fixed_by` is the option that forbids a change of the scale, or None. `planned` is the length
    that saved caches were read for, or 0.
    """
    scaling = scaled(model).scaling
    if scaling is None or isinstance(args.scale, float):
        return None
    if fixed_by is None or scaling.static:
        return prompt_length if args.scale == "prompt" else None
    if max_tokens == -1:
        raise InputError(
            f"{fixed_by} fixes the scale for the length of the prompt plus --max-tokens, which "
            "--max-tokens -1 leaves open. Give --max-tokens a number, or give --scale NUMBER."
        )
    expected = max(planned, prompt_length + max_tokens)
    say(
        f"{fixed_by}: the scale is fixed at {model.scale_at(expected):g}, the scale of "
        f"{expected} tokens."
    )
    return expected


def _load_draft(args: argparse.Namespace, tokenizer: Any) -> nn.Module:
    draft, its_tokenizer = load(args.draft_model, trust_remote_code=args.trust_remote_code)
    if its_tokenizer.vocab_size != tokenizer.vocab_size:
        raise InputError(
            f"The draft model has {its_tokenizer.vocab_size} tokens and the model "
            f"{tokenizer.vocab_size}. Use a draft model with the same tokenizer."
        )
    return draft


def _saved_cache(args: argparse.Namespace, model: nn.Module, folder: Path) -> list[Any]:
    """Return the caches of --prompt-cache-file; refuse those of another model."""
    here = fingerprint(model, folder, args.adapter_path)
    caches, metadata = load_cache(args.prompt_cache_file, model, here)
    if is_conversation(metadata):
        raise InputError(
            f"--prompt-cache-file {args.prompt_cache_file} is a conversation of `mlx_clex chat`: "
            "go on with it there, with /restore."
        )
    if not is_ours(metadata):
        say(
            f"{args.prompt_cache_file} does not name its model and scaling, so they are not "
            "checked. mlx_clex cache_prompt writes files that name them."
        )
    kept = quantised(caches)
    asked = (args.kv_bits, args.kv_group_size)
    if None not in (kept, args.kv_bits) and (kept.bits, kept.group_size) != asked:
        raise InputError(
            f"--prompt-cache-file {args.prompt_cache_file} is quantised with --kv-bits "
            f"{kept.bits} --kv-group-size {kept.group_size}: give the same, or leave both out."
        )
    return caches


def _plan_on(model: nn.Module, caches: list[Any], expected: int | None) -> None:
    """Set the expected length of saved caches; print a note if the scale changes.

    After a change, the answer differs from one pass over the whole text. A cache with a larger
    expected length keeps it.
    """
    planned = planned_caches(caches)
    if not planned:
        return
    length = max(planned[0].expected_length, expected or 0)
    if expected and _other_plan(model, caches, length):
        say(
            f"The saved text was read at the scale of fewer than {length} tokens. Its cached keys "
            "are rotated to the new scale; its cached values are not recomputed. For the answer of "
            f"one pass, cache it with --expected-length {length}."
        )
    for cache in planned:
        cache.expected_length = length


def _other_plan(model: nn.Module, caches: list[Any], length: int) -> bool:
    """Return whether saved keys have another scale or gain than a text of this length."""
    saved, plan = planned_caches(caches)[0], plan_at(model, length)
    if saved.expected_length:
        return plan_of(model, caches) != plan
    # Read with --scale grow: the scale rose to that of the text read, from that of one token.
    return not plan_at(model, 1) == plan_at(model, saved.offset) == plan


def _stream(
    args: argparse.Namespace,
    model: nn.Module,
    tokenizer: Any,
    prompt: list[int],
    options: dict[str, Any],
) -> None:
    """Run mlx-lm's generation and print what comes, then the figures."""
    long = len(prompt) > _LONG_PROMPT and options["draft_model"] is None
    text, last = "", None
    if args.verbose:
        print("=" * 10)
    with (
        reading_bar(len(prompt), enabled=long and args.verbose) as progress,
        generating(lambda: f"after {len(text)} characters"),
    ):
        for last in stream_generate(
            model, tokenizer, prompt, prompt_progress_callback=progress, **options
        ):
            text += last.text
            if args.verbose:
                print(last.text, end="", flush=True)
    if not args.verbose:
        print(text)
    elif last is not None:
        print(f"\n{'=' * 10}")
        print(f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.3f} tokens-per-sec")
        print(
            f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.3f} tokens-per-sec"
        )
        print(f"Peak memory: {last.peak_memory:.3f} GB")
        if scaled(model).scaling is not None:
            print(
                f"Scale: {_final_scale(model, options['prompt_cache']):g}, reach: {_reach(model)}"
            )


def _final_scale(model: Any, caches: list[Any]) -> float:
    """Return the scale after the last pass; the draft model's caches are behind the model's."""
    own = planned_caches(caches[: len(stock_caches(model))])
    scales = [cache.scale for cache in own if cache.scale is not None]
    return scales[0] if scales else model.scale_at(1)


def _reach(model: Any) -> str:
    if model.reach is None:
        return "any length"
    grows = model.scaling.grows and model.fixed_scale is None
    return f"{model.reach} tokens{', past which the scale grows' if grows else ''}"


main = command(
    "generate",
    add_arguments,
    run,
    "--model my-model --prompt-file book.txt --prompt 'Who tells it?'",
    parent=setup_arg_parser,
)


if __name__ == "__main__":
    sys.exit(main())
