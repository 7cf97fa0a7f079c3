"""Command: an OpenAI-compatible server for long contexts.

It takes the options of mlx_lm.server and runs its generation thread. Models are loaded by
`mlx_clex.load`; every request is planned for its whole prompt; a cached prefix is reused only
where all of it was computed at the scale and gain of the new request, so an answer never
depends on what was served before. Clients are not trusted: a request is checked wholly before
it is admitted, and gets only the models that the server was started with.

Under mlx.launch the first process listens and shares every request with the others; all of
them make the same tokens, each from its part of the model.

Not covered: other models, adapters and draft models over several processes.
"""

import argparse
import json
import logging
import os
import sys
from functools import partial

import mlx.core as mx

from .commands.memory_check import MemoryCheck, add_force, cache_fields
from .commands.options import add_shared, check_cache_options, check_default_template, check_least
from .commands.run_command import command
from .diagnosis.machine import parse_size
from .errors import InputError
from .serving.access import Access
from .serving.generation import ScaledModelProvider
from .serving.http import serve
from .serving.prompt import check_variables
from .serving.requests import Served, read_request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add mlx_lm.server's options, and ours."""
    parser.add_argument("--draft-model", help="A small model that drafts tokens for the model.")
    parser.add_argument("--num-draft-tokens", type=int, default=3, help="Tokens drafted at once.")
    add_shared(
        parser,
        *(
            "--model",
            "--adapter-path",
            "--prefill-step-size",
            "--kv-group-size",
            "--quantized-kv-start",
        ),
    )
    add_shared(parser, "--trust-remote-code", help="Let the checkpoint run its own Python code.")
    add_shared(
        parser,
        "--scale",
        metavar="prompt|NUMBER",
        help="prompt (default): each request has the scale of its whole prompt, which then "
        "grows with the answer. NUMBER: a fixed scale.",
    )

    parser.add_argument(
        "--chat-template", default="", help="A chat template to use instead of the tokenizer's."
    )
    parser.add_argument(
        "--use-default-chat-template",
        action="store_true",
        help="Refused: transformers no longer has default templates.",
    )
    parser.add_argument(
        "--chat-template-args",
        type=json.loads,
        default="{}",
        metavar="JSON",
        help="Variables of the chat template, such as '{\"enable_thinking\": false}'.",
    )

    parser.add_argument(
        "--temp",
        type=float,
        default=0.0,
        help="Temperature of requests that give none; 0 takes the likeliest token.",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="Nucleus sampling of requests that give none; 1 turns it off.",
    )
    parser.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="Lowest probability sampled, as a share of the highest; 0 turns it off.",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, help="Likeliest tokens that are sampled from; 0 takes all."
    )
    parser.add_argument("--max-tokens", type=int, default=512, help="Tokens of an answer, at most.")

    parser.add_argument(
        "--decode-concurrency", type=int, default=32, help="Answers generated at once."
    )
    parser.add_argument("--prompt-concurrency", type=int, default=8, help="Prompts read at once.")
    parser.add_argument(
        "--prompt-cache-size",
        type=int,
        default=10,
        help="Prompts whose keys and values are kept.",
    )
    parser.add_argument(
        "--prompt-cache-bytes",
        type=parse_size,
        metavar="SIZE",
        help="Bytes of keys and values that are kept, such as 8GB.",
    )
    add_shared(
        parser,
        "--kv-bits",
        help="Bits of the KV cache; requests are then served one by one. Default: not quantised.",
    )
    parser.add_argument(
        "--pipeline",
        action="store_true",
        help="Under mlx.launch, share out layers among the processes instead of heads.",
    )

    add_force(parser)

    access = parser.add_argument_group("access")
    access.add_argument("--host", default="127.0.0.1", help="The address to listen on.")
    access.add_argument("--port", type=int, default=8080, help="The port to listen on.")
    access.add_argument(
        "--api-key",
        metavar="KEY",
        help="The key that clients must send. Default: MLX_CLEX_API_KEY, or none.",
    )
    access.add_argument(
        "--allow-model",
        action="append",
        default=[],
        metavar="DIR_OR_ID",
        help="Another model that a request may ask for by this name. May be given several times.",
    )
    access.add_argument(
        "--allow-adapters",
        action="append",
        default=[],
        metavar="DIR",
        help="Adapters that a request may ask for by this name. May be given several times.",
    )
    access.add_argument(
        "--allowed-origins",
        type=lambda text: text.split(","),
        default=[],
        metavar="ORIGIN,...",
        help="Origins whose web pages may send requests, or * for all. Default: this machine's.",
    )
    parser.add_argument(
        "--log-level",
        default="INFO",
        choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
        help="What is logged.",
    )


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted.

    Raises:
        InputError: the model, an option or the address cannot be used.
    """
    if args.scale == "grow":
        raise InputError("--scale grow would let an answer depend on how its prompt arrives.")
    if not 0 <= args.port < 1 << 16:
        raise InputError(f"--port must be within 0..65535, got {args.port}.")
    if args.model is None and not args.allow_model:
        raise InputError("Nothing is to be served: give --model, or --allow-model.")
    check_cache_options(args)
    check_default_template(args)
    for name in ("prompt_concurrency", "decode_concurrency", "prefill_step_size"):
        check_least(args, name, 1)
    check_least(args, "prompt_cache_size", 0)
    if not isinstance(args.chat_template_args, dict):
        raise InputError("--chat-template-args must be a JSON object.")
    check_variables(args.chat_template_args, "--chat-template-args")
    served = Served(
        args.model, args.adapter_path, args.draft_model, args.allow_model, args.allow_adapters
    )
    # The values for requests that give none are held to the same ranges.
    body = json.dumps({"prompt": "", "model": args.model or args.allow_model[0]}).encode()
    read_request(body, chat=False, served=served, defaults=args)
    key = args.api_key or os.environ.get("MLX_CLEX_API_KEY")
    group = mx.distributed.init()
    check_processes(args, group.size())
    logging.basicConfig(
        level=args.log_level if group.rank() == 0 else "ERROR",
        format="%(asctime)s - %(levelname)s - %(message)s",
    )
    provider = ScaledModelProvider(args)
    check = MemoryCheck(force=args.force, processes=group.size())
    provider.check_length = partial(check.reading, **cache_fields(args))
    provider.before_reading = check.at_load(partial(provider.check_length, args.max_tokens))
    provider.scale = args.scale if isinstance(args.scale, float) else None
    serve(args.port, provider, Access(args.host, args.allowed_origins, key or None), served)


def check_processes(args: argparse.Namespace, size: int) -> None:
    """Refuse what several processes cannot do.

    Raises:
        InputError: the message says which option, and why.
    """
    if size == 1:
        return
    if args.model is None:
        raise InputError(f"mlx.launch started {size} processes: give their model as --model.")
    if args.allow_model or args.allow_adapters:
        raise InputError(
            f"--allow-model and --allow-adapters are for one process; mlx.launch started {size}."
        )
    if args.draft_model is not None:
        raise InputError(f"--draft-model is for one process; mlx.launch started {size}.")
    if args.pipeline and args.prompt_cache_bytes is not None:
        raise InputError(
            "--prompt-cache-bytes would make processes with unequal numbers of layers forget "
            "different prompts: leave it out, or --pipeline; --prompt-cache-size counts prompts."
        )


main = command("server", add_arguments, run, "--model my-model --port 8080")


if __name__ == "__main__":
    sys.exit(main())
