"""The page at `/docs`: what /openapi.json says, as plain HTML, of which nothing is loaded from elsewhere."""

from __future__ import annotations

import json
from html import escape
from typing import Any

_REFUSED = """What cannot be done is refused with a status of 400 or more and says why:
<code>{"error": {"message": …, "type": …, "param": …, "code": …}}</code>."""
_TOKEN = "Needs <code>Authorization: Bearer TOKEN</code> where the service has tenants."
_PAGE = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <title>lina-ray: interface</title>
  <link rel="icon" href="/favicon.ico" type="image/svg+xml">
  <link rel="stylesheet" href="/static/style.css">
</head>
<body>
  <header>
    <h1>lina-ray</h1>
    <p>The interface for programs. <a href="/openapi.json">As OpenAPI</a> · <a href="/">The page</a></p>
  </header>
  <main>
    <p>{about}</p>
    <p>{refused}</p>
{operations}
  </main>
</body>
</html>
"""


def page(described: dict[str, Any]) -> str:
    """The page of an OpenAPI description."""
    schemas = described["components"]["schemas"]
    operations = "\n".join(
        _operation(f"{method.upper()} {path}", operation, schemas)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    )
    return _PAGE.format(about=escape(described["info"]["description"]), refused=_REFUSED, operations=operations)


def _operation(name: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    about, tables = escape(operation.get("description", "")), ""
    if operation.get("security"):
        about += f" {_TOKEN}"
    if parameters := operation.get("parameters"):
        rows = [_row(one["name"], one["schema"], one["required"], schemas) for one in parameters]
        tables += _table("In the address", rows)
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        body = _found(content["schema"], schemas)
        rows = [_row(field, one, field in body["required"], schemas) for field, one in body["properties"].items()]
        tables += _table(f"Body: {media}", rows)
    done = next(status for status in operation["responses"] if status.startswith("2"))
    media = " · ".join(operation["responses"][done]["content"])
    answer = f"<p>Answered with {done}: {escape(media)}</p>"
    return f'<section class="card"><h2><code>{escape(name)}</code></h2><p>{about}</p>{tables}{answer}</section>'


def _table(title: str, rows: list[str]) -> str:
    return f"<table><caption>{escape(title)}</caption>{''.join(rows)}</table>"


def _row(name: str, schema: dict[str, Any], needed: bool, schemas: dict[str, Any]) -> str:
    default = schema.get("default")
    left_out = "" if default in (None, "") else f", {json.dumps(default)} where it is left out"
    kind = _kind(schema, schemas) + (", needed" if needed else left_out)
    cells = f"<td>{escape(kind)}</td><td>{escape(schema.get('description', ''))}</td>"
    return f'<tr><th scope="row"><code>{escape(name)}</code></th>{cells}</tr>'


def _kind(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """What a value is, in a few words."""
    schema = _found(schema, schemas)
    if "anyOf" in schema:
        return " or ".join(_kind(one, schemas) for one in schema["anyOf"])
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"any number of: {_kind(schema['items'], schemas)}"
    if kind == "object":
        fields = (f"{name}: {_kind(one, schemas)}" for name, one in schema["properties"].items())
        return f"{{{', '.join(fields)}}}"
    return "file" if schema.get("format") == "binary" else kind


def _found(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """A schema, or the one that it refers to."""
    return schemas[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
