"""Clients that other people wrote, unchanged, against the real server."""

from __future__ import annotations

import base64
import io

import pytest
from PIL import Image
from serving import picture


def test_openai_s_own_client_gets_no_picture(server: str) -> None:
    openai = pytest.importorskip("openai", reason="needs the package openai")
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    assert "emoji" in [model.id for model in client.models.list()]
    answer = client.images.generate(model="emoji", prompt="a red apple", n=2, size="64x64", extra_body={"steps": 1})
    images = [Image.open(io.BytesIO(base64.b64decode(item.b64_json))) for item in answer.data]
    assert [image.size for image in images] == [(64, 64)] * 2
    with pytest.raises(openai.NotFoundError, match="model 'dall-e-3' is unknown"):
        client.images.generate(model="dall-e-3", prompt="a red apple")


def test_an_a1111_client_gets_no_picture(server: str) -> None:
    webuiapi = pytest.importorskip("webuiapi", reason="needs the package webuiapi")
    api = webuiapi.WebUIApi(host="127.0.0.1", port=int(server.rpartition(":")[2]))
    assert api.txt2img(prompt="a red apple", seed=1, steps=1).image.size == (512, 512)
    small = {"width": 64, "height": 64, "steps": 2, "seed": 1}
    first = Image.open(io.BytesIO(base64.b64decode(picture())))
    result = api.img2img(images=[first], prompt="a red apple", denoising_strength=0.6, **small)
    assert result.image.size == (64, 64)
    assert result.info["seed"] == 1
    assert api.get_progress()["state"]["job"] == ""
    assert api.interrupt() == {}
    assert "LCM" in [sampler["name"] for sampler in api.get_samplers()]
    api.util_set_model("emoji (teacher)")
    assert api.util_get_current_model() == "emoji (teacher)"
    api.util_set_model("emoji")
