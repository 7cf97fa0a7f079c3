"""The page of a conversation: a place to drop a document, settings, a meter of the context.

Not covered: serving it (`web.py`), and more than one user.
"""

import html
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..data.text import decode_text
from ..errors import InputError, RunError
from .conversation import Context, Conversation, Stopped
from .turns import Tell, Turns

# The columns have the height of the window. gradio's own button to clear the talk is hidden:
# "New conversation" does it.
CSS = """
footer, #talk button[aria-label="Clear"], #talk button[title="Clear"] { display: none !important }
.main.fillable { padding: 12px !important }
#columns { height: calc(100vh - 24px); flex-wrap: nowrap }
#left { height: 100%; flex-wrap: nowrap; min-width: 0 !important }
#talk { flex: 1 1 0 !important; min-height: 0 }
#talk .placeholder { padding: 0 24px }
#left > .row, #note { flex: 0 0 auto }
#note { padding: 0 12px !important; min-height: 24px !important }
#note .html-container { padding: 0 }
#right { flex: 0 0 280px !important; flex-wrap: nowrap; overflow-y: auto }
#right > * { flex: none }
#system textarea:disabled { background: var(--background-fill-secondary); opacity: 0.6 }
#stop { flex: 0 0 90px; min-width: 90px }
progress { appearance: none; width: 100%; height: 8px; border: 0; border-radius: 4px;
  background: var(--border-color-primary); overflow: hidden }
progress::-webkit-progress-bar { background: var(--border-color-primary) }
progress::-webkit-progress-value { background: var(--color-accent) }
progress::-moz-progress-bar { background: var(--color-accent) }
"""

_SEND = "Send"

# Seconds between what the page is sent: a browser draws the whole answer each time, and one that
# falls behind no longer hears clicks.
_PAUSE = 0.1

# Puts the time of a click, in seconds, into the last input. Clock and server are of one machine.
_STAMP = "(...values) => [...values.slice(0, -1), Date.now() / 1000]"
# A refused message goes back into the box, before what was written meanwhile.
_GIVE_BACK = "(box, refused) => refused && box ? refused + '\\n' + box : refused || box"

# A text may hold a link to a picture; fetching it would tell its owner who reads the text.
HEAD = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'self' 'unsafe-inline' "
    "'unsafe-eval' data: blob:\">"
)


@dataclass(frozen=True)
class Read:
    """How far reading is."""

    done: int  # tokens
    total: int  # tokens
    seconds: float  # since it began

    def bar(self) -> str:
        """Return a bar and its figures."""
        rate = f", {self.done / self.seconds:,.0f} tokens/s" if self.done else ""
        return (
            f"Reading: {self.done:,} of {self.total:,} tokens{rate}"
            f'<progress value="{self.done}" max="{self.total}"></progress>'
        )


@dataclass
class _Since:
    """When things happened, in seconds; what was asked for before them is not done."""

    begun: float = 0.0  # "New conversation" was pressed
    failed: float = 0.0  # a document was not read: messages behind it wait


def reading(tell: Tell) -> Callable[[int, int], None]:
    """Return a progress callback that tells `Read`s, timed from now on."""
    begun = time.perf_counter()
    return lambda done, total: tell(Read(done, total, time.perf_counter() - begun))


def meter(context: Context) -> str:
    """Return the context as HTML: a bar where it has an end, and its figures."""
    bar, reach = "", "tokens, no limit"
    if context.reach is not None:
        bar = f'<progress value="{context.tokens}" max="{context.reach}"></progress>'
        reach = f"of {context.reach:,} tokens, {context.tokens / context.reach:.0%}"
    return (
        f'Context {bar}<div class="figures"><b>{context.tokens:,}</b> {reach}<br>'
        f"Scale <b>{context.scale:.3g}</b><br>"
        f"{context.nbytes / 1e6:,.1f} MB of keys and values</div>"
    )


def welcome(conversation: Conversation) -> str:
    """Return what an empty page says, as Markdown."""
    context = conversation.context()
    reach = "any number of" if context.reach is None else f"up to {context.reach:,}"
    lines = [
        "### Ask about a long document",
        "1. Drop a text file on the right. The model reads it once.",
        "2. Write a question below and press Enter.",
        "",
        f"A conversation holds {reach} tokens. You can also start without a document.",
    ]
    if not conversation.templated:
        lines += ["", "This model has no chat template: it continues the text that you write."]
    return "\n".join(lines)


def _excerpt(text: str) -> str:
    """Return the two ends of a long text: a page that shows a whole book is slow.

    The end may be a question about it, so more of it is shown.
    """
    return text if len(text) <= 4000 else f"{text[:300]}\n\n[...]\n\n{text[-3000:]}"


def build_page(
    turns: Turns,
    title: str,
    *,
    temperature: float,
    sampler_at: Callable[[float], Callable[[mx.array], mx.array]],
) -> Any:
    """Return the page as gradio Blocks.

    Args:
        turns: has the conversation, whose settings the page starts with.
        title: of the page.
        temperature: at which the conversation samples now.
        sampler_at: returns the sampler of a temperature.
    """
    import gradio as gr

    conversation = turns.conversation
    since, last_heat = _Since(), temperature

    def shown() -> list[dict[str, str]]:
        return [
            {"role": message["role"], "content": _excerpt(message["content"])}
            if message["role"] == "user"
            else dict(message)
            for message in conversation.messages
        ]

    def view(text: str = "", *, busy: bool = False) -> dict[Any, Any]:
        """Show the conversation as it is, with a note."""
        return {
            talk: shown(),
            figures: meter(conversation.context()),
            note: html.escape(text),
            stop: gr.update(interactive=busy),
            # It stands before the first message, so it cannot change later.
            system: gr.update(interactive=not (busy or conversation.tokens)),
        }

    def opened() -> dict[Any, Any]:
        """Show the conversation and its settings in a page that was loaded again."""
        now = {**view(), heat: last_heat, most: conversation.max_tokens}
        now[system]["value"] = conversation.system_prompt or ""
        return now

    def take(wanted: str) -> None:
        """Start with this system prompt if nothing has been read yet."""
        if not conversation.tokens and conversation.templated:
            conversation.begin(wanted.strip())

    def send(
        message: str, wanted: str, warmth: float, longest: float, asked: float | None
    ) -> Iterator[dict]:
        """Stream the answer to a message, sent at the time `asked`."""
        nonlocal last_heat
        asked = asked or time.time()
        if not message.strip() or asked < since.begun:
            yield view()
            return
        if asked < since.failed:
            yield view("The document was not read. Send the message again to ask without it.")
            return
        if longest is None or (longest < 1 and longest != -1):
            yield view("The longest answer must be at least 1 token, or -1 for no limit.")
            return

        def turn(tell: Tell) -> Iterator[str]:
            take(wanted)
            conversation.sampler = sampler_at(warmth)
            conversation.max_tokens = int(longest)
            yield from conversation.answer(message.strip(), reading(tell))

        said = [*shown(), {"role": "user", "content": message}]
        # gradio drops a second Enter until the answer has ended, so there is no button to press.
        sending = gr.update(value="", submit_btn=False)
        yield {**view("Reading ...", busy=True), talk: said, box: sending}
        last_heat = warmth
        text, ended, back = "", "", ""
        try:
            for came in turns.run(turn, _PAUSE):
                text += "".join(piece for piece in came if not isinstance(piece, Read))
                if text:
                    yield {talk: [*said, {"role": "assistant", "content": text}], note: ""}
                elif isinstance(came[-1], Read):
                    yield {note: came[-1].bar()}
        except (Stopped, InputError, RunError) as error:  # nothing of the turn is kept
            ended, back = str(error) or "Stopped.", message
        ends = {
            "stopped": "Stopped.",
            "length": "Cut at the longest answer.",
            "reach": "Cut at the reach of the model.",
        }
        sendable = {box: gr.update(submit_btn=_SEND)}  # keeps what was written meanwhile
        ended = ended or ends.get(conversation.finish or "", "")
        yield {**view(ended), **sendable, refused: back}

    def drop(files: list[str] | None, wanted: str, asked: float | None) -> Iterator[dict]:
        """Read documents into the context, dropped at the time `asked`."""
        asked = asked or time.time()
        if not files or asked < since.begun:
            yield {**view(), document: None}
            return
        told: list[str] = []  # of each document

        def turn(tell: Tell) -> Iterator[Any]:
            take(wanted)
            for number, file in enumerate(map(Path, files)):
                try:
                    text = decode_text(file.read_bytes(), file.name)
                    count = conversation.read(text, reading(tell))
                except (Stopped, InputError, RunError) as error:
                    since.failed = time.time()
                    told.append(str(error) or "Stopped.")
                    if left := [Path(other).name for other in files[number + 1 :]]:
                        told.append(f"Not read: {', '.join(left)}.")
                    return
                told.append(f"Read {count:,} tokens of {file.name}.")
                yield None

        names = ", ".join(Path(file).name for file in files)
        yield {**view(f"Reading {names} ...", busy=True), document: None}
        for came in turns.run(turn, _PAUSE):
            if isinstance(came[-1], Read):
                yield {note: came[-1].bar()}
        yield view(" ".join(told))

    def end() -> None:
        """End what runs; what waits behind it ends when its time comes."""
        since.begun = time.time()
        conversation.stop.set()

    def reset() -> dict[Any, Any]:
        """Start anew."""

        def forgetting(_: Tell) -> Iterator[None]:
            conversation.reset()
            yield None

        list(turns.run(forgetting))
        return view()

    with gr.Blocks(analytics_enabled=False, title=title, fill_height=True, fill_width=True) as page:
        with gr.Row(elem_id="columns"):
            with gr.Column(elem_id="left"):
                talk = gr.Chatbot(
                    label=title,
                    elem_id="talk",
                    height="100%",
                    buttons=["copy"],
                    placeholder=welcome(conversation),
                )
                note = gr.HTML(elem_id="note", padding=False)
                with gr.Row(equal_height=True):
                    box = gr.Textbox(
                        label="Message",
                        elem_id="message",
                        placeholder="Write a message; Enter sends it",
                        submit_btn=_SEND,
                        lines=1,
                        max_lines=8,
                        autofocus=True,
                    )
                    stop = gr.Button("Stop", elem_id="stop", interactive=False)
            with gr.Column(elem_id="right"):
                document = gr.File(
                    label="Drop a document",
                    elem_id="document",
                    height=150,
                    file_count="multiple",
                )
                figures = gr.HTML(elem_id="meter")
                system = gr.Textbox(
                    conversation.system_prompt or "",
                    label="System prompt",
                    info="Put before the first message",
                    elem_id="system",
                    lines=2,
                    max_lines=6,
                    visible=conversation.templated,
                )
                heat = gr.Slider(
                    0,
                    max(2, temperature),
                    temperature,
                    step=0.05,
                    label="Temperature",
                    info="0: always the likeliest token",
                    elem_id="temperature",
                )
                most = gr.Number(
                    conversation.max_tokens,
                    precision=0,
                    label="Longest answer (tokens)",
                    info="-1: no limit",
                    elem_id="most",
                )
                new = gr.Button("New conversation", elem_id="new")
        asked_at, refused = gr.Number(0, visible=False), gr.Textbox(visible=False)
        state = [talk, figures, note, stop, system]
        page.load(opened, None, [*state, heat, most], show_progress="hidden")
        inputs = [box, system, heat, most, asked_at]
        # One group: what ends first must also be shown first, or an answer's end hides the note of
        # a document dropped meanwhile.
        one_by_one = {"concurrency_id": "turns", "concurrency_limit": 1, "show_progress": "hidden"}
        sent = box.submit(send, inputs, [*state, box, refused], js=_STAMP, **one_by_one)
        sent.then(None, [box, refused], box, js=_GIVE_BACK, queue=False, show_progress="hidden")
        # "multiple": a document dropped while another is read is read next.
        document.upload(
            drop,
            [document, system, asked_at],
            [*state, document],
            trigger_mode="multiple",
            js=_STAMP,
            **one_by_one,
        )
        stop.click(conversation.stop.set, queue=False)
        new.click(end, queue=False).then(reset, None, state, **one_by_one)
    return page
