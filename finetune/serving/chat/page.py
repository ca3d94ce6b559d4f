"""The chat page: one model, or two side by side that answer the same messages.

The page loads nothing from elsewhere: system fonts, no analytics, and a content security policy that makes
the browser refuse whatever a library might still ask for. Who may ask it for what is `finetune.serving.chat.guard`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import gradio as gr
from fastapi import FastAPI

from finetune.serving.chat.guard import Access, Guard
from finetune.serving.chat.page_words import PageWords
from finetune.serving.chat.panel import ChatPanel, Side
from finetune.serving.chat.texts import TEXTS
from finetune.serving.decoding.settings import DecodingSettings

_MAX_WAITING = 32
_FONTS = (
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "sans-serif",
)
_CSS = """
footer { display: none !important }
.gradio-container { width: 100% !important; max-width: 1200px !important; margin: 0 auto !important }
#header { align-items: center; flex-wrap: nowrap }
#header h1 { margin: 0 }
#language { flex-grow: 0; min-width: 6em }
[id^=answers] { border: 1px solid var(--border-color-primary) }
"""


class Page(Protocol):
    """What `build_app` serves.

    Attributes:
        blocks: Its components.
        css: Rules beside those of every page.
    """

    blocks: gr.Blocks
    css: str


class ChatPage:
    """The chat alone.

    Args:
        sides: One model or two.
        defaults: Where the controls stand at first.
        language: Of the page at first; the browser's own is taken when it asks for one.
    """

    css = ""

    def __init__(self, sides: Sequence[Side], defaults: DecodingSettings, language: str = "en"):
        words = PageWords(TEXTS, language)
        with gr.Blocks(title="Chat 对话", analytics_enabled=False) as self.blocks:
            words.build_header()
            self.panel = ChatPanel(sides, defaults, words)
            words.connect(self.blocks)


def build_app(page: Page, access: Access | None = None) -> FastAPI:
    """The page as a web application.

    Args:
        page: What it shows.
        access: Who may use it; by default who calls it by an address or as localhost.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    app.add_middleware(Guard, access=access or Access())
    theme = gr.themes.Soft(font=_FONTS, font_mono=("ui-monospace", "Consolas", "monospace"))
    page.blocks.queue(api_open=False, max_size=_MAX_WAITING)
    served: FastAPI = gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        footer_links=[],
        ssr_mode=False,
        theme=theme,
        css=_CSS + page.css,
        pwa=False,
    )
    return served
