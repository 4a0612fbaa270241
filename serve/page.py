"""The page at /demo: a prompt in, the plain and the speculative answer side by side out, as they come.

It has no way to the model but the API, which it asks as any client would, with the API key that its reader gives it.
"""

import json
import os
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

# Before Gradio is imported, which otherwise reports home.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import httpx
from fastapi import FastAPI
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.answer import Answer
from serve.drawing import draw_answer, draw_chart, draw_choice, draw_figures, draw_legend, draw_verdict
from serve.errors import BodyLimit
from serve.inside import InsideTransport
from serve.race import Question, race
from specdecode.decoding.sequence import VerifierName

PATH = "/demo"
MAX_TOKENS, _MAX_MAX_TOKENS = 96, 512
# Readers whose answers run at the same time, and that wait for that; who comes then is told so.
_MAX_RUNNING, _MAX_WAITING = 16, 64
_COMPLETION, _CHAT = "completion", "chat"
# All of Gradio's that the page needs; files, uploads, proxies and histories are none of it.
_OPEN = re.compile(
    r"/(|config|theme\.css|favicon\.ico|(assets|static|svelte)/.*|gradio_api/(info|startup-events|queue/(data|join)|cancel|reset))/?"
)
_ICON = "/favicon.ico"  # browsers ask for one before they have read the page
_HEARTBEAT = re.compile(r"/gradio_api/heartbeat/.*")


@dataclass(frozen=True)
class Offer:
    """What the page offers to choose from, and what is chosen to begin with.

    Attributes:
        model: the model's name over HTTP.
        drafts: who may draft, auto and none included.
        draft, k, verifier: the defaults.
        max_k: the most tokens that a request may have drafted in a round.
        needs_key: whether the API asks for a key.
        max_body_bytes: the largest request body.
    """

    model: str
    drafts: list[str]
    draft: str
    k: int
    verifier: VerifierName
    max_k: int
    needs_key: bool
    max_body_bytes: int


class _Example(NamedTuple):
    title: str
    kind: str
    prompt: str


EXAMPLES = (
    _Example(
        "Code: a file", _COMPLETION, 'def read_lines(path):\n    """Return the lines of a text file as a list of strings."""\n'
    ),
    _Example(
        "Code: a class",
        _COMPLETION,
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    ),
    _Example("Chat: coffee", _CHAT, "Can I order a large latte with oat milk please?"),
    _Example("Chat: pizza", _CHAT, "Hi, I would like to order a pizza for tonight."),
    _Example(
        "Reasoning: apples",
        _CHAT,
        "Tom has 12 apples. He buys 3 bags with 5 apples each and gives 7 apples to Ann. How many apples does Tom have now?",
    ),
    _Example(
        "Reasoning: pages",
        _CHAT,
        "Mia reads 14 pages a day. Her book has 210 pages. She has read for 6 days. How many pages are left?",
    ),
)


def with_page(api: FastAPI, offer: Offer) -> FastAPI:
    """The API, and before it the page at `/demo`."""
    whole = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    client = httpx.AsyncClient(transport=InsideTransport(api), base_url="http://inside", timeout=None)
    gr.mount_gradio_app(
        whole,
        build_page(client, offer),
        PATH,
        footer_links=[],
        run_history=False,
        show_error=True,
        max_file_size=1,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(),
        css_paths=Path(__file__).with_suffix(".css"),
    )
    whole.add_middleware(_Gate, max_body_bytes=offer.max_body_bytes)
    whole.mount("/", api)
    return whole


def _theme() -> gr.themes.Base:
    """The reader's own fonts, and greys that can be read: 4.5:1 for text, 3:1 for the frames of what can be changed."""
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.blue, font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    soft, soft_dark, frame, frame_dark = "#475569", "#b4c0cf", "#7b8798", "#8592a3"
    return theme.set(
        body_text_color_subdued=soft,
        body_text_color_subdued_dark=soft_dark,
        block_info_text_color=soft,
        block_info_text_color_dark=soft_dark,
        block_title_text_color=soft,
        block_title_text_color_dark=soft_dark,
        input_border_color=frame,
        input_border_color_dark=frame_dark,
        input_border_width="1px",
        checkbox_border_color=frame,
        checkbox_border_color_dark=frame_dark,
        button_secondary_border_color=frame,
        button_secondary_border_color_dark=frame_dark,
        button_border_width="1px",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
    )


def build_page(client: httpx.AsyncClient, offer: Offer) -> gr.Blocks:
    """The page itself: what there is on it, and what happens when its button is pressed."""
    with gr.Blocks(title="SpecDecode", analytics_enabled=False) as page:
        gr.HTML(
            "<h1>SpecDecode</h1><p>Small drafts guess, the target decides. Both answers below are the target's own; "
            "the right one comes with fewer of its passes.</p>",
            elem_classes="sd-head",
        )
        key = gr.Textbox(label="API key", type="password", visible=offer.needs_key, elem_id="key")
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                prompt, kind, run, stop = _question()
            with gr.Column(scale=2, min_width=320):
                controls = _controls(offer)
        gr.HTML(draw_legend(), padding=True)
        verdict = gr.HTML("", elem_id="verdict")
        with gr.Row():
            plain = _pane("Target alone", "plain")
            speculative = _pane("With a draft", "speculative")
        choice = gr.HTML("", elem_id="choice", padding=True)
        gr.HTML("<h2>Accepted length of each round</h2>", elem_classes="sd-head")
        chart = gr.HTML(draw_chart([]), elem_id="chart")

        async def answer(*values: Any) -> AsyncGenerator[tuple[str, ...], None]:
            question, in_turns = _read(offer.model, *values)
            async for plain, speculative in race(client, question, in_turns=in_turns):
                yield draw(plain, speculative, is_greedy=question.temperature == 0)

        shown = [verdict, *plain, *speculative, choice, chart]
        running = gr.on(
            [run.click, prompt.submit],
            answer,
            [key, prompt, kind, *controls],
            shown,
            show_progress="hidden",
            concurrency_limit=_MAX_RUNNING,
            trigger_mode="once",
            api_visibility="private",
        )
        stop.click(None, cancels=[running], api_visibility="private")
    page.queue(max_size=_MAX_WAITING, api_open=False)
    return page


def draw(plain: Answer, speculative: Answer, *, is_greedy: bool) -> tuple[str, ...]:
    """All that the page shows of two answers, in the order of its parts."""
    verdict = draw_verdict(plain, speculative, is_greedy=is_greedy)
    panes = [part for answer in (plain, speculative) for part in (draw_figures(answer), draw_answer(answer))]
    return (verdict, *panes, draw_choice(speculative), draw_chart(speculative.drafts))


def _question() -> tuple[gr.Textbox, gr.Radio, gr.Button, gr.Button]:
    """Where the prompt is written, with examples of it."""
    first = EXAMPLES[0]
    prompt = gr.Textbox(first.prompt, label="Prompt", lines=5, max_lines=12, elem_id="prompt", info="Shift+Enter runs it")
    kind = gr.Radio([_COMPLETION, _CHAT], value=first.kind, label="Asked as", elem_id="kind")
    with gr.Row(elem_id="examples"):
        for example in EXAMPLES:
            button = gr.Button(example.title, size="sm", min_width=130)
            values = json.dumps([example.prompt, example.kind])
            button.click(None, None, [prompt, kind], js=f"() => {values}", api_visibility="private")
    with gr.Row():
        run = gr.Button("Run", variant="primary", elem_id="run")
        stop = gr.Button("Stop", elem_id="stop")
    return prompt, kind, run, stop


def _controls(offer: Offer) -> list[gr.components.Component]:
    """What a request may choose, in the order of `_read`."""
    return [
        gr.Radio(offer.drafts, value=offer.draft, label="Draft", elem_id="draft"),
        gr.Slider(0, offer.max_k, offer.k, step=1, label="K: drafted in a round, at the most", elem_id="k"),
        gr.Radio(list(get_args(VerifierName)), value=offer.verifier, label="Verifier", elem_id="verifier"),
        gr.Slider(0, 2, 0, step=0.1, label="Temperature", elem_id="temperature"),
        gr.Slider(1, _MAX_MAX_TOKENS, MAX_TOKENS, step=1, label="Tokens, at the most", elem_id="max-tokens"),
        gr.Checkbox(False, label="One after the other: at once, both share each of the target's passes", elem_id="in-turns"),
    ]


def _pane(title: str, name: str) -> tuple[gr.HTML, gr.HTML]:
    """Where an answer appears: its figures, and its text."""
    with gr.Column(min_width=320, elem_id=name):
        gr.HTML(f"<h2>{title}</h2>", elem_classes="sd-head")
        return gr.HTML(draw_figures(Answer())), gr.HTML(draw_answer(Answer(is_done=True)))


def _read(
    model: str,
    key: str | None,  # hidden, it has no value
    prompt: str,
    kind: str,
    draft: str,
    k: float,
    verifier: str,
    temperature: float,
    max_tokens: float,
    in_turns: bool,
) -> tuple[Question, bool]:
    """What the page's fields ask, and whether for one answer after the other."""
    question = Question(
        model, prompt, kind == _CHAT, draft, int(k), verifier, float(temperature), int(max_tokens), (key or "").strip()
    )
    return question, in_turns


class _Gate:
    """ASGI middleware that lets through what the page needs of Gradio, and all that is not Gradio's."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._limited = BodyLimit(app, max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        root = scope.get("root_path", "")
        path = scope.get("path", "").removeprefix(root)
        if scope["type"] == "http" and path == _ICON:
            await Response(status_code=204)(scope, receive, send)
        elif scope["type"] != "http" or not (path + "/").startswith(PATH + "/"):
            await self._app(scope, receive, send)
        elif path == PATH:
            await RedirectResponse(f"{root}{PATH}/")(scope, receive, send)
        elif _HEARTBEAT.fullmatch(path[len(PATH) :]):
            # An open page would keep a router that is to end from ending; there is no state for it to keep.
            await Response(status_code=204)(scope, receive, send)
        elif _OPEN.fullmatch(path[len(PATH) :]):
            await self._limited(scope, receive, send)
        else:
            await PlainTextResponse("not here", 404)(scope, receive, send)
