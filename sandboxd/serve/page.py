"""The page of /ui: one file, and a policy under which a browser runs nothing but what is in it."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

HTML = "text/html; charset=utf-8"
FILE = Path(__file__).with_name("ui.html")


@functools.cache
def page() -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """The page and its headers.

    Its script and its style are named by their digests, so that no other runs, whatever a job is
    called (CSP Level 3); nothing may be loaded, framed or sent but requests to where it came from;
    and text becomes no markup even by mistake (Trusted Types).
    """
    text = FILE.read_text()
    script, style = (_digest(text, tag) for tag in ("script", "style"))
    rules = {
        "default-src": "'none'",
        "script-src": script,
        "style-src": style,
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    policy = "; ".join(f"{name} {value}" for name, value in rules.items())
    headers = (
        ("Content-Security-Policy", policy),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        ("X-Frame-Options", "DENY"),
    )
    return text.encode(), headers


def _digest(text: str, tag: str) -> str:
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"
