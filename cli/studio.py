"""`diffmae studio`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from diffmae_video.cli.options import job_of, shares


@shares("checkpoint", "recipe", "overrides", "seed", "device", "dry_run")
def studio(
    clip: Annotated[
        Path | None, typer.Argument(metavar="CLIP", help="Clip to begin with; one may also open it in the page.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0: a free one.")] = 7860,
    folder: Annotated[Path, typer.Option("--folder", help="Where masks and opened clips are kept.")] = Path("studio"),
    megabytes: Annotated[
        int,
        typer.Option("--max-upload", min=1, metavar="MB", help="Largest clip to open."),
    ] = 2000,
    **options: Any,
) -> None:
    """Remove things from a clip by hand: a page in the browser, for this machine only.

    Example: diffmae studio clip.mp4
    """
    from diffmae_video.studio import studio as start

    start(job_of(options), clip, port=port, folder=folder, megabytes=megabytes)


COMMANDS = {"studio": studio}
