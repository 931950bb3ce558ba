"""`diffmae studio`: what `render-inpaint` does, by hand in a browser, on this machine only."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

from diffmae_video.errors import UsageError
from diffmae_video.pipelines.console import say
from diffmae_video.pipelines.job import Job


def studio(job: Job, clip: Path | None, *, port: int, folder: Path, megabytes: int) -> None:
    """Open the page and serve it until Ctrl-C; a dry run says what it would do.

    Args:
        job: what renders take: checkpoint, recipe, device, seed.
        clip: opened at the start.
        port: of this machine; 0 takes a free one.
        folder: where masks and opened clips are kept.
        megabytes: largest clip that may be uploaded.

    Raises:
        UsageError: Gradio is not installed, or the port is taken.
        DataError: the clip cannot be read.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UsageError("The studio needs Gradio; install it: pip install 'diffmae-video[studio]'.")
    from diffmae_video.studio.quiet import silence_gradio

    silence_gradio()
    from diffmae_video.studio.session import Session, job_words

    if job.dry_run:
        begins = "no clip" if clip is None else str(clip)
        say(
            f"Port {port} of this machine only; begins with {begins}; takes up to {megabytes} MB and keeps it in "
            f"{folder}. Run does: {shlex.join(['diffmae', 'render-inpaint', 'CLIP', *job_words(job)])}"
        )
        return
    from diffmae_video.studio.server import serve

    session = Session(job, folder)
    if clip is not None:
        say(session.open(clip))
    serve(session, port, megabytes * 1_000_000, lambda address: say(f"The studio is at {address} (Ctrl-C ends it)."))
