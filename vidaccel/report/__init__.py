"""Reports: data, Markdown and HTML of one run."""

from __future__ import annotations

from .record import Report

__all__ = ["Report"]
