"""The interface as an OpenAPI document, and as a page that needs nothing from elsewhere."""
from __future__ import annotations

import html
from typing import Any

from mindformers_ixc.serving.settings import ServerSettings
from mindformers_ixc.serving.wire import FIELDS, NEUTRAL
from mindformers_ixc.version import __version__

_PART = {"oneOf": [
    {"type": "object", "required": ["type", "text"],
     "properties": {"type": {"const": "text"}, "text": {"type": "string"}}},
    *({"type": "object", "required": ["type", kind],
       "properties": {"type": {"const": kind}, kind: {
           "type": "object", "required": ["url"], "properties": {"url": {"type": "string", "description": said}}}}}
      for kind, said in (("image_url", "data:image/png;base64,... ; a path below --image_root; an address of a host of "
                          "--fetch_images"), ("video_url", "data:video/mp4;base64,..., as image_url")))]}

_MESSAGE = {"type": "object", "required": ["role", "content"], "properties": {
    "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
    "content": {"oneOf": [{"type": "string"}, {"type": "array", "items": _PART}]}}}

_ERROR = {"type": "object", "properties": {"error": {"type": "object", "properties": {
    "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
    "code": {"type": ["string", "null"]}}}}}

# What there is beside the chat: path, method, meaning.
_OTHERS = (("/v1/models", "get", "the model and its modes"), ("/v1/models/{name}", "get", "one of them"),
           ("/v1/ixc/tiles", "post", "a picture's tiles as the model sees them"),
           ("/health", "get", "200 while requests are taken"), ("/metrics", "get", "counts in Prometheus' text form"))


def document(settings: ServerSettings) -> dict:
    """The interface as OpenAPI 3.1 has it."""
    properties: dict[str, Any] = {"messages": {"type": "array", "minItems": 1, "items": _MESSAGE}}
    for name, field in FIELDS.items():
        properties[name] = {**field.schema, "description": field.meaning}
    for name, (_, wanted) in NEUTRAL.items():
        properties[name] = {"description": f"only {wanted}"}
    properties["model"]["enum"] = list(settings.models)
    chat = {"type": "object", "required": ["messages"], "properties": properties, "additionalProperties": False}
    tiles = {"type": "object", "required": ["image"], "properties": {
        "image": {"type": "string", "description": "as image_url.url"}, "hd_num": {"type": "integer", "minimum": 1},
        "pictures": {"type": "integer", "minimum": 1, "description": "pictures of the question (default 1)"}}}
    paths: dict[str, Any] = {"/v1/chat/completions": {"post": _operation("answers a conversation", chat)}}
    for path, method, meaning in _OTHERS:
        paths[path] = {method: _operation(meaning, tiles if path.endswith("tiles") else None)}
    return {"openapi": "3.1.0", "info": {"title": f"mindformers_ixc: {settings.name}", "version": __version__},
            "paths": paths,
            **({"components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
                "security": [{"key": []}]} if settings.api_key else {})}


def _operation(meaning: str, body: dict | None) -> dict:
    found: dict[str, Any] = {"summary": meaning, "responses": {
        "200": {"description": "done"},
        "default": {"description": "an error", "content": {"application/json": {"schema": _ERROR}}}}}
    if body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return found


_STYLE = ("body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color-scheme:light dark}"
          "td,th{text-align:left;vertical-align:top;padding:.2em .8em .2em 0;border-bottom:1px solid #8884}"
          "code,pre{font-family:monospace}pre{overflow:auto;padding:.8em;border:1px solid #8884}")


def page_of(settings: ServerSettings) -> str:
    """The interface as a page to read."""
    name = html.escape(settings.name)
    rows = "".join(f"<tr><td><code>{field}</code></td><td>{html.escape(rule.meaning)}</td></tr>"
                   for field, rule in FIELDS.items())
    neutral = "".join(f"<tr><td><code>{field}</code></td><td>{html.escape(wanted)}</td></tr>"
                      for field, (_, wanted) in NEUTRAL.items())
    others = "".join(f"<tr><td>{method.upper()}</td><td><code>{path}</code></td><td>{meaning}</td></tr>"
                     for path, method, meaning in _OTHERS)
    models = ", ".join(f"<code>{html.escape(one)}</code>" for one in settings.models)
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>
<meta name="viewport" content="width=device-width">
<h1>{name}</h1><p>OpenAI's chat interface, by mindformers_ixc {__version__}. Models: {models}.
<a href="openapi.json">openapi.json</a></p>
<pre>from openai import OpenAI
client = OpenAI(base_url="http://HOST:PORT/v1", api_key="KEY")
client.chat.completions.create(model="{name}", messages=[{{"role": "user", "content": [
    {{"type": "image_url", "image_url": {{"url": "data:image/png;base64,..."}}}},
    {{"type": "text", "text": "What is shown?"}}]}}], extra_body={{"hd_num": 9}})</pre>
<h2>POST /v1/chat/completions</h2><table><tr><td><code>messages</code></td><td>roles system, user, assistant; content a
text, or parts: text, image_url, video_url</td></tr>{rows}</table>
<h2>Accepted where it asks for nothing</h2><table>{neutral}</table>
<h2>Beside it</h2><table>{others}</table></html>
"""
