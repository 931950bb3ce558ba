"""Settings of Gradio that must stand before it is imported."""

from __future__ import annotations

import os


def silence_gradio() -> None:
    """It calls no server, and shares nothing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_SHARE"] = "False"
