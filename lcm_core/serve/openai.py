"""OpenAI's form: `/v1/images/generations` and `/v1/models`."""

from __future__ import annotations

import base64
import re
import time
from typing import Any

from lcm_core.serve.fields import Fields, RequestError
from lcm_core.serve.painter import PictureRequest
from lcm_core.serve.service import Service, read_options, read_seed


async def generate(service: Service, fields: Fields) -> dict[str, Any]:
    """`POST /v1/images/generations`: pictures as `b64_json`, or as a `data:` address where `url` is asked for.

    `steps`, `guidance`, `seed` and `negative_prompt` may be given as further fields.
    """
    as_url = fields.text("response_format", "b64_json", ("b64_json", "url")) == "url"
    fields.text("output_format", "png", ("png",))
    request = _read(service, fields)
    painted = await service.paint(request)
    texts = [base64.b64encode(picture.png).decode() for picture in painted]
    data = [{"url": f"data:image/png;base64,{text}"} if as_url else {"b64_json": text} for text in texts]
    return {"created": int(time.time()), "data": data}


def _read(service: Service, fields: Fields) -> PictureRequest:
    prompt = fields.text("prompt")
    if not prompt:
        raise RequestError("prompt is missing; say what to paint")
    options = read_options(fields)
    options["width"], options["height"] = _size(fields)
    model = fields.text("model") or service.shelf.usual
    service.shelf.check(model, [])
    count = fields.whole("n", 1, fields.limits.pictures) or 1
    return PictureRequest(model, prompt, read_seed(fields), count, options=options)


def _size(fields: Fields) -> tuple[int | None, int | None]:
    text = fields.text("size", "auto")
    if text == "auto":
        return None, None
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    most = fields.limits.side
    if match is None or not all(0 < int(side) <= most for side in match.groups()):
        raise RequestError(f"size {text[:60]!r} cannot be used; write WIDTHxHEIGHT with sides of up to {most}, or auto")
    return int(match[1]), int(match[2])


def models(service: Service) -> dict[str, Any]:
    """`GET /v1/models`."""
    owned = {"object": "model", "created": 0, "owned_by": "local"}
    return {"object": "list", "data": [{"id": name, **owned} for name in service.shelf.models]}
