"""The studio's page: what stands where, and which button does what. All work is done by the session."""

from __future__ import annotations

import html
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import gradio

from diffmae_video.errors import DiffmaeError, Stopped
from diffmae_video.pipelines.console import Step
from diffmae_video.studio.session import Session, describe

INTRO = """# diffmae studio
Open a clip, draw a box around what should go or brush over it, let the mask follow, correct it on any frame, run."""
CANVAS = '<div id="studio-canvas"></div>'
COMPARE = '<div id="studio-compare"></div>'
REFRESH = "() => { window.studio && window.studio.refresh(); }"
FOLLOWS, STAYS = "follows the object", "stays where it is"


def look() -> dict[str, Any]:
    """Theme and scripts of the page; nothing of them comes from another host."""
    font = ["system-ui", "sans-serif"]
    return {
        "theme": gradio.themes.Default(font=font, font_mono=["ui-monospace", "monospace"]),
        "head": '<link rel="stylesheet" href="/studio/canvas.css"><script defer src="/studio/canvas.js"></script>',
    }


def build_page(session: Session) -> gradio.Blocks:
    """The page of a session."""
    stop = threading.Event()

    def open_clip(path: str | None) -> str:
        return _told(lambda: session.open(path, keep=True) if path else "Choose a clip.")

    def follow(way: str) -> Iterator[tuple[str, str]]:
        def done(notes: list[str]) -> str:
            return "\n\n".join(notes) or "Followed through the whole clip. Scrub through it and correct what is wrong."

        stop.clear()
        yield from _work(lambda told: done(session.follow(way == STAYS, told)), stop)

    def run(dilate: int, way: str) -> Iterator[tuple[str, str]]:
        def work(told: Callable[[Step], None]) -> str:
            result = session.run(int(dilate), way == STAYS, told)
            links = ", ".join(
                f'<a href="/studio/download/{what}" download id="download-{what}">{text}</a>'
                for what, text in (("video", "video"), ("mask", "mask"), ("report", "report"))
            )
            command = html.escape(session.command(int(dilate)))
            return (
                f"Done in {result.seconds:.0f} s. Download: {links}.\n\nThe same on the command line:\n\n"
                f'<pre id="command">{command}</pre>'
            )

        stop.clear()
        yield from _work(work, stop)

    with gradio.Blocks(title="diffmae studio", analytics_enabled=False) as page:
        gradio.Markdown(INTRO)
        upload = gradio.UploadButton("Open a clip", file_count="single", elem_id="open", size="sm")
        status = gradio.Markdown(
            "No clip is open." if session.clip is None else "Mark what should go.", elem_id="status"
        )
        gradio.HTML(CANVAS)
        with gradio.Row():
            way = gradio.Radio([FOLLOWS, STAYS], value=FOLLOWS, label="The mask")
            dilate = gradio.Slider(0, 32, value=4, step=1, label="Grow it by pixels")
        with gradio.Row():
            follow_button = gradio.Button("Follow", elem_id="follow")
            run_button = gradio.Button("Run", variant="primary", elem_id="run")
            stop_button = gradio.Button("Stop", elem_id="stop")
        bar = gradio.HTML(elem_id="bar")
        gradio.HTML(COMPARE)
        upload.upload(open_clip, upload, status, api_visibility="private").then(None, js=REFRESH)
        for button, work, inputs in ((follow_button, follow, [way]), (run_button, run, [dilate, way])):
            button.click(
                work, inputs, [bar, status], show_progress="hidden", api_visibility="private", concurrency_id="work",
                concurrency_limit=1,
            ).then(None, js=REFRESH)  # fmt: skip
        stop_button.click(stop.set, api_visibility="private", queue=False)
    return page


def _told(work: Callable[[], str]) -> str:
    """What work says, or the sentence of its error."""
    try:
        return work()
    except DiffmaeError as error:
        return f"**{html.escape(str(error))}**"


def _work(work: Callable[[Callable[[Step], None]], str], stop: threading.Event) -> Iterator[tuple[str, str]]:
    """Do work in a thread of its own; yields the bar and the status as they change."""
    steps: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
    said: list[str] = []

    def told(step: Step) -> None:
        steps.put(step)
        if stop.is_set():
            raise Stopped("Stopped. The same button goes on from there.")

    def whole() -> None:
        try:
            said.append(_told(lambda: work(told)))
        except Exception as error:  # a page must not stay without an answer
            said.append(f"**{html.escape(f'Unexpected {type(error).__name__}: {error}')}**")
        finally:
            steps.put(None)

    threading.Thread(target=whole, daemon=True).start()
    yield _bar(None), "Working ..."
    while (step := steps.get()) is not None:
        while not steps.empty():  # a page need not see each
            later = steps.get()
            if later is None:
                steps.put(None)
                break
            step = later
        yield _bar(step), "Working ..."
    yield "", said[0]


def _bar(step: Step | None) -> str:
    if step is None:
        return "<progress></progress>"
    value = f' value="{step.done}" max="{step.total}"' if step.total else ""
    return f'<progress{value} style="width: 100%"></progress><div>{html.escape(describe(step))}</div>'
