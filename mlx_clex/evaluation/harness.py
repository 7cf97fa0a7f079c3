"""Run lm-evaluation-harness on our models: mlx-lm's harness class, one plan for each request.

Each request uses the scale and gain of its whole length (prompt and answer). A prompt is cut
only if `max_length` is set; it then loses its middle, as in LongBench.

This module needs the extra `evaluate`.

Not covered: sampling (answers are greedy), batches, and several processes.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import lm_eval
import mlx.core as mx
import mlx.nn as nn
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from mlx_lm.evaluate import MLXLM, chat_template_fn
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from tqdm import tqdm

from ..data.stop_strings import cut
from ..data.text import TextTokenizer, encode_text, without_bos
from ..errors import InputError, RunError, generating, say
from ..model.plans import plan_at, single_caches
from ..model.scaled_model import make_prompt_cache
from .harness_tasks import Tasks, first_line
from .reader import Reader, advancing

_STEP = 512  # tokens whose logits are in memory together
_ANSWER_TOKENS = 256  # for tasks without max_gen_toks; the harness's own default


class PlannedLM(MLXLM, TemplateLM):
    """mlx-lm's harness class for a loaded model; each request has the plan of its own length."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        use_chat_template: bool = False,
        chat_template_args: Mapping[str, Any] | None = None,
        max_length: int | None = None,
    ) -> None:
        """Wrap a model and its tokenizer.

        Args:
            model: from `load`.
            tokenizer: mlx-lm's wrapper.
            use_chat_template: prompts are rendered with the chat template.
            chat_template_args: settings of the chat template.
            max_length: upper bound of prompt and answer together, tokens; longer prompts are cut.
        """
        # MLXLM.__init__ would load the model a second time.
        TemplateLM.__init__(self)
        self._model = model
        self.tokenizer = tokenizer
        self.use_chat_template = use_chat_template
        self.apply_chat_template = MethodType(
            chat_template_fn(**chat_template_args or {}),
            SimpleNamespace(tokenizer=TextTokenizer(tokenizer)),
        )
        self.max_length = max_length
        self.prompts = 0
        self.cut = 0  # prompts that were cut
        self._reader = Reader(model, tokenizer)

    # TemplateLM's encodes pairs as the harness defines it; MLXLM's drops long contexts.
    loglikelihood = TemplateLM.loglikelihood

    @property
    def eot_token_id(self) -> int:
        """Return the id of the end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Return the id that stands in for an empty context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text; a rendered chat template already has its special tokens."""
        if add_special_tokens is None:
            add_special_tokens = not self.use_chat_template
        return encode_text(self.tokenizer, string, begins=add_special_tokens)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a greedy answer for each request."""
        prompts = []
        for request in requests:
            context, options = request.args
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            settings: Any = normalize_gen_kwargs(options, _ANSWER_TOKENS)
            count, until = settings["max_gen_toks"], [stop for stop in settings["until"] if stop]
            prompts.append((self._cut(tokens, count), count, until))
        think_end = self.tokenizer.think_end if self.tokenizer.has_thinking else None
        replies = []
        total = sum(len(tokens) for tokens, _, _ in prompts)
        with tqdm(total=total, unit="tok", desc="Answering", disable=disable_tqdm) as bar:
            for request, (tokens, count, until) in zip(requests, prompts, strict=True):
                # A stop text inside the model's thinking does not end the answer.
                stops = () if think_end else until
                reply = self._reader.answer(tokens, count, advancing(bar), stops)
                reply = postprocess_generated_text(reply, None, think_end)
                replies.append(cut(reply, until))
                self.cache_hook.add_partial("generate_until", request.args, replies[-1])
        return replies

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text, read in one window unless `max_length` is set."""
        totals = []
        for request in requests:
            text = without_bos(self.tokenizer, request.args[0])  # behind the prefix token
            tokens = self.tok_encode(text, add_special_tokens=False)
            windows = get_rolling_token_windows(
                token_list=tokens,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length or max(1, len(tokens)),
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            scores = self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)
            totals.append(sum(score for score, _ in scores))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, is greedy) of each continuation.

        Continuations with the same context and plan share one pass over the context.
        """
        # The model predicts the last token of a continuation and does not read it.
        pairs = [(self._cut(context, len(end) - 1), end) for _, context, end in requests]
        together: dict[Any, list[int]] = defaultdict(list)
        for index, (context, end) in enumerate(pairs):
            plan = plan_at(self._model, len(context) + len(end) - 1)
            together[tuple(context), plan].append(index)
        answers: dict[int, tuple[float, bool]] = {}
        bar = tqdm(
            total=sum(len(context) for context, _ in together),
            unit="tok",
            desc="Scoring",
            disable=options.get("disable_tqdm", False),
        )
        with bar, generating(lambda: f"after {bar.n} tokens"):
            for (context, _), members in together.items():
                ends = [pairs[index][1] for index in members]
                scores = self._score_ends(list(context), ends)
                for index, answer in zip(members, scores, strict=True):
                    answers[index] = answer
                    # A window of a longer text has no (context, continuation) key.
                    if words := requests[index][0]:
                        self.cache_hook.add_partial("loglikelihood", words, answer)
                bar.update(len(context))
        return [answers[index] for index in range(len(pairs))]

    def _score_ends(
        self, context: list[int], ends: Sequence[list[int]]
    ) -> Iterator[tuple[float, bool]]:
        """Yield (log-likelihood, is greedy) of continuations that share a context and a plan."""
        length = len(context) + max(map(len, ends)) - 1
        caches = make_prompt_cache(self._model, length)
        tokens = mx.array([context])
        for start in range(0, len(context) - 1, 4 * _STEP):
            self._model(tokens[:, start : min(start + 4 * _STEP, len(context) - 1)], cache=caches)
            mx.eval([cache.state for cache in caches])
            mx.clear_cache()
        logits = self._model(tokens[:, -1:], cache=caches)[0, -1].astype(mx.float32)
        first = nn.log_softmax(logits)
        likeliest = first.argmax().item()
        for end in ends:
            score, greedy = first[end[0]].item(), end[0] == likeliest
            if len(end) > 1:
                # Trimming avoids a copy, which would double the memory of a long context.
                trims = can_trim_prompt_cache(caches) and not _overwritten(caches, len(end) - 1)
                own = caches if trims else copy.deepcopy(caches)
                scores, _, chosen = self._score_fn([end], cache=own, step_size=_STEP)
                score += scores.sum().item()
                greedy &= chosen.all().item()
                if trims:
                    trim_prompt_cache(caches, len(end) - 1)
            if math.isnan(score):
                raise RunError(
                    "The model gives no finite numbers. Check its weights, or convert it with "
                    "--dtype float32."
                )
            yield score, greedy

    def _cut(self, prompt: list[int], answer_tokens: int) -> list[int]:
        """Return the prompt, without its middle if prompt and answer exceed `max_length`.

        Source: LongBench (arXiv 2308.14508), pred.py, `get_pred`.
        """
        self.prompts += 1
        if self.max_length is None or len(prompt) + answer_tokens <= self.max_length:
            return prompt
        half = (self.max_length - answer_tokens) // 2
        if half < 1:
            raise InputError(
                f"--max-length {self.max_length} leaves no room for a prompt: the answer alone may "
                f"have {answer_tokens} tokens. Raise --max-length."
            )
        self.cut += 1
        return prompt[:half] + prompt[-half:]


def _overwritten(caches: Sequence[Any], tokens: int) -> bool:
    """Return whether a window would lose its oldest keys to so many more tokens."""
    sizes = ((cache, getattr(cache, "max_size", None)) for cache in single_caches(caches))
    return any(size is not None and cache.offset + tokens >= size for cache, size in sizes)


def run_tasks(
    lm: PlannedLM,
    tasks: Tasks,
    *,
    num_fewshot: int | None,
    limit: int | None,
    confirm_run_unsafe_code: bool = False,
    answers: Path | None = None,
) -> list[dict[str, Any]]:
    """Run tasks and return a row for each score.

    Args:
        lm: the model.
        tasks: from `load_tasks`.
        num_fewshot: examples in each prompt; None takes the task's own number.
        limit: largest number of documents for each task and length.
        confirm_run_unsafe_code: run tasks that execute code written by the model.
        answers: prefix of the harness's file of answers. Each answer is stored at once, and
            stored answers are not generated again.

    Returns:
        Rows with task, metric, value, stderr, samples and length (tokens; None for tasks
        without lengths).
    """
    documents = tasks.documents(limit)
    for name, task in tasks.tasks.items():
        if (task.get_config("generation_kwargs") or {}).get("do_sample"):
            say(f"{name} asks for sampling; answers are greedy.")
        if num_fewshot and task.get_config("num_fewshot") == 0:
            say(f"{name} allows no examples: --num-shots {num_fewshot} has no effect on it.")
    try:
        found: Any = lm_eval.simple_evaluate(
            model=lm,
            tasks=tasks.objects,
            task_manager=tasks.manager,
            num_fewshot=num_fewshot,
            apply_chat_template=lm.use_chat_template,
            fewshot_as_multiturn=False,
            samples=None
            if limit is None
            else {
                name: sorted(index for some in by_length.values() for index in some)
                for name, by_length in documents.items()
            },
            log_samples=False,
            use_cache=None if answers is None else str(answers),
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        )
    except (InputError, RunError):
        raise
    except ValueError as error:
        raise InputError(
            f"The harness refuses: {first_line(error)}"
            + (" (--confirm-run-unsafe-code)" if "unsafe" in str(error) else "")
        ) from error
    rows = []
    for name, figures in found["results"].items():
        by_length = documents.get(name, {})
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or not filtered or metric.endswith("_stderr"):
                continue
            if metric.isdigit() and value == -1:
                continue  # RULER scores a length without documents as -1
            if not math.isfinite(value):  # such as a correlation of equal answers
                say(f"{name}: {metric} is {value:g} and is left out.")
                continue
            mine = [by_length[metric]] if metric in by_length else by_length.values()
            samples = sum(map(len, mine))
            stderr = figures.get(f"{metric}_stderr,{filtered}")
            if not (isinstance(stderr, int | float) and math.isfinite(stderr)):
                stderr = None  # "N/A", or NaN for a single sample
            rows.append(
                {
                    "task": name,
                    "metric": metric if filtered == "none" else key,
                    "value": value,
                    "stderr": stderr,
                    "samples": samples or None,
                    # A group has no documents here: its score is the mean of its tasks' rows.
                    "length": int(metric) if metric.isdigit() and by_length else None,
                }
            )
    return rows
