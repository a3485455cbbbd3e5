"""The two web APIs: pictures, refusals, limits, token, and who may call."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import subprocess
import sys
from typing import Any

import pytest
from serving import JSON, LIMITS, decoded, picture

from lcm_core.pipeline.image import SETTINGS_KEY
from lcm_core.serve.app import build_app
from lcm_core.serve.service import Service
from lcm_core.serve.shelf import Shelf

TXT2IMG, IMG2IMG, GENERATIONS = "/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/v1/images/generations"
SMALL = {"prompt": "a red apple", "steps": 1, "seed": 3, "width": 64, "height": 64}


def test_a_picture_differs_from_the_pipeline_s(client: Any, shelf: Shelf) -> None:
    """The same settings give the same pixels, and the file says them."""
    answer = client.post(TXT2IMG, json={**SMALL, "cfg_scale": 2, "sampler_name": "LCM"}).json()
    image = decoded(answer["images"][0])
    expected = shelf.pipeline("emoji")(
        "a red apple", num_inference_steps=1, seed=3, guidance_scale=2.0, width=64, height=64
    ).images[0]
    assert image.convert("RGB").tobytes() == expected.tobytes()
    assert json.loads(image.info[SETTINGS_KEY])["seed"] == 3
    assert json.loads(answer["info"])["ignored"] == []


def test_an_input_picture_has_no_effect(client: Any) -> None:
    first, second = (
        client.post(IMG2IMG, json={**SMALL, "init_images": [picture(colour)], "denoising_strength": 0.5}).json()
        for colour in ("red", "blue")
    )
    assert first["images"] != second["images"]


def test_pictures_of_one_request_are_alike_or_their_seeds_are_wrong(client: Any) -> None:
    answer = client.post(TXT2IMG, json={**SMALL, "batch_size": 2}).json()
    assert len(set(answer["images"])) == 2
    assert json.loads(answer["info"])["all_seeds"] == [3, 4]


def test_what_is_not_done_goes_unsaid(client: Any) -> None:
    wish = {**SMALL, "sampler_name": "Euler a", "tiling": True, "enable_hr": True}
    info = json.loads(client.post(TXT2IMG, json=wish).json()["info"])
    assert info["ignored"] == ["enable_hr", "sampler_name", "tiling"]


def test_openai_s_form(client: Any) -> None:
    wish = {"prompt": "a red apple", "n": 2, "size": "64x64", "steps": 1, "seed": 3}
    data = client.post(GENERATIONS, json=wish).json()["data"]
    assert [decoded(item["b64_json"]).size for item in data] == [(64, 64)] * 2
    url = client.post(GENERATIONS, json={**wish, "n": 1, "response_format": "url"}).json()["data"][0]["url"]
    assert base64.b64decode(url.partition(",")[2]) == base64.b64decode(data[0]["b64_json"])


def test_the_lists_of_a1111_s_form(client: Any) -> None:
    titles = [model["title"] for model in client.get("/sdapi/v1/sd-models").json()]
    assert titles == ["emoji", "emoji (teacher)"]
    assert "LCM" in [sampler["name"] for sampler in client.get("/sdapi/v1/samplers").json()]
    assert client.get("/sdapi/v1/progress").json()["progress"] == 0
    assert client.post("/sdapi/v1/options", json={"sd_model_checkpoint": titles[1]}).status_code == 200
    assert client.get("/sdapi/v1/options").json() == {"sd_model_checkpoint": titles[1]}
    assert [lora["name"] for lora in client.get("/sdapi/v1/loras").json()] == ["ink_style", "lcm_lora"]


def test_a_lora_of_the_prompt_is_not_loaded(client: Any) -> None:
    model = {"override_settings": {"sd_model_checkpoint": "emoji (teacher)"}}
    wish = {**SMALL, **model, "prompt": "a red apple <lora:lcm_lora:0.5>"}
    settings = json.loads(decoded(client.post(TXT2IMG, json=wish).json()["images"][0]).info[SETTINGS_KEY])
    assert settings["lora"] == [["lcm_lora", 0.5]]
    assert settings["prompt"] == "a red apple"


MALFORMED: list[tuple[str, Any]] = [
    (TXT2IMG, "not json"),
    (TXT2IMG, "[1, 2]"),
    (TXT2IMG, "[" * 100_000),
    (TXT2IMG, '{"prompt": "\\ud800"}'),
    (TXT2IMG, b"\xff\xfe"),
    (TXT2IMG, {"prompt": 7}),
    (TXT2IMG, {"prompt": "a" * 201}),
    (TXT2IMG, {"prompt": "a\0b"}),
    (TXT2IMG, {"steps": 0}),
    (TXT2IMG, {"steps": 9}),
    (TXT2IMG, {"steps": "four"}),
    (TXT2IMG, {"steps": True}),
    (TXT2IMG, {"steps": 1.5}),
    (TXT2IMG, '{"cfg_scale": NaN}'),
    (TXT2IMG, '{"cfg_scale": 1e999}'),
    (TXT2IMG, {"seed": 2**64}),
    (TXT2IMG, {"seed": -2}),
    (TXT2IMG, {"width": 129}),
    (TXT2IMG, {"width": 10**30}),
    (TXT2IMG, {**SMALL, "width": 65}),
    (TXT2IMG, {"batch_size": 3, "n_iter": 2}),
    (TXT2IMG, {"prompt": "<lora:../../secret:1>"}),
    (TXT2IMG, {"prompt": "<lora:a>" * 9}),
    (TXT2IMG, {"override_settings": []}),
    (TXT2IMG, {"override_settings": {"sd_model_checkpoint": "../secret.safetensors"}}),
    (IMG2IMG, {}),
    (IMG2IMG, {"init_images": []}),
    (IMG2IMG, {"init_images": [None]}),
    (IMG2IMG, {"init_images": ["%%%"]}),
    (IMG2IMG, {"init_images": ["aGVsbG8="]}),
    (IMG2IMG, {"init_images": ["ä"]}),
    (IMG2IMG, {"init_images": [picture(size=(301, 300))]}),
    (IMG2IMG, {"init_images": [picture()], "denoising_strength": 0}),
    (GENERATIONS, {}),
    (GENERATIONS, {"prompt": ["a"]}),
    (GENERATIONS, {"prompt": "a", "n": 5}),
    (GENERATIONS, {"prompt": "a", "size": "64"}),
    (GENERATIONS, {"prompt": "a", "size": "0x64"}),
    (GENERATIONS, {"prompt": "a", "size": "999999x64"}),
    (GENERATIONS, {"prompt": "a", "model": "dall-e-9"}),
    (GENERATIONS, {"prompt": "a", "response_format": "tape"}),
    ("/sdapi/v1/options", {"sd_vae": "x"}),
]


@pytest.mark.parametrize(("path", "body"), MALFORMED, ids=lambda value: str(value)[:40])
def test_a_malformed_request_is_painted_or_kills(client: Any, path: str, body: Any) -> None:
    content = json.dumps(body) if isinstance(body, dict) else body
    answer = client.post(path, content=content, headers=JSON)
    assert 400 <= answer.status_code < 500
    line = answer.json()["detail"]
    assert line == answer.json()["error"]["message"]
    assert 10 < len(line) < 300
    assert "\n" not in line


def test_a_body_over_the_limit_is_read_to_its_end(client: Any) -> None:
    assert client.post(TXT2IMG, content=b" " * (LIMITS.body + 1), headers=JSON).status_code == 413


def test_a_wrong_method_or_path(client: Any) -> None:
    assert client.get(TXT2IMG).status_code == 405
    assert client.post("/sdapi/v1/nothing").status_code == 404
    assert client.get("/../pyproject.toml").status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1:7000"}, 200),
        ({"Host": "localhost:7000"}, 200),
        ({"Host": "[::1]:7000"}, 200),
        ({"Host": "evil.example:7000"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://127.0.0.1:7000"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:7001"}, 403),
        ({"Origin": "null"}, 403),
    ],
    ids=str,
)
def test_a_page_from_elsewhere_drives_the_server(client: Any, headers: dict[str, str], status: int) -> None:
    """By its own address, or by a name that it points at 127.0.0.1."""
    assert client.post("/sdapi/v1/interrupt", headers=headers).status_code == status


def test_a_websocket_from_elsewhere_is_let_in(client: Any) -> None:
    from starlette.websockets import WebSocketDisconnect

    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("ws://127.0.0.1:7000/live", headers=headers):
            pass


def test_the_token_is_not_asked_for(service: Service) -> None:
    from starlette.testclient import TestClient
    from starlette.websockets import WebSocketDisconnect

    app = build_app(service, "s3cret", None)
    with TestClient(app, base_url="http://paint.example") as client:
        assert client.get("/").status_code == 200
        for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic %%"}, {"Authorization": "s3cret"}):
            assert client.get("/sdapi/v1/options", headers=headers).status_code == 401
        basic = base64.b64encode(b"me:s3cret").decode()
        for word in ("Bearer s3cret", f"Basic {basic}"):
            assert client.get("/sdapi/v1/options", headers={"Authorization": word}).status_code == 200
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("ws://paint.example/live?token=no"):
            pass
        with client.websocket_connect("ws://paint.example/live?token=s3cret"):
            pass


def test_an_open_host_without_token_is_served() -> None:
    command = [sys.executable, "-m", "lcm_core", "serve", "--no-browser", "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--token" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_package_ends_in_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from lcm_core.errors import InputError
    from lcm_core.serve.run import serve

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match=r"serve needs uvicorn.*lcm-suite\[serve\]"):
        serve()


def test_small_answers_wait_for_each_other() -> None:
    """The second of two short writes waits 40 ms for the first one's receipt, unless connections have TCP_NODELAY,
    which asyncio sets for sockets that name their protocol."""
    from lcm_core.serve.run import _listen

    async def no_delay() -> int:
        found = asyncio.get_running_loop().create_future()

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted_socket = writer.get_extra_info("socket")
            found.set_result(accepted_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with _listen("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(accepted, sock=listener):
                with socket.create_connection(listener.getsockname(), timeout=10):
                    return int(await asyncio.wait_for(found, 10))

    assert asyncio.run(no_delay()) != 0
