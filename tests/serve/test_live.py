"""The page's websocket: the newest message wins, and nothing that a page sends ends it."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image, ImageChops
from serving import LIMITS, picture

from lcm_core.pipeline import Pipeline
from lcm_core.pipeline.image import SETTINGS_KEY
from lcm_core.serve import live
from lcm_core.serve.painter import Painted
from lcm_core.serve.service import Service

LIVE = "ws://127.0.0.1:7000/live"
MESSAGE = {"prompt": "a red apple", "steps": 1, "seed": 3, "guidance": 2.0}


def receive(socket: Any) -> tuple[dict[str, Any], Image.Image]:
    return socket.receive_json(), Image.open(io.BytesIO(socket.receive_bytes()))


def test_a_stroke_changes_nothing(client: Any) -> None:
    with client.websocket_connect(LIVE) as socket:
        images = []
        for number, colour in enumerate(("red", "blue")):
            socket.send_json({**MESSAGE, "id": number, "image": picture(colour), "strength": 0.6})
            header, image = receive(socket)
            assert header["id"] == number
            assert header["seconds"] >= header["every"] > 0
            images.append(image.convert("RGB").tobytes())
            assert json.loads(image.info[SETTINGS_KEY])["strength"] == 0.6
    assert images[0] != images[1]


def test_a_draft_is_no_picture_of_the_tiny_vae(client: Any, shelf: Any) -> None:
    """With "draft" the pixels are those of `vae="tiny"`, and the settings say so; without it, of the full VAE."""
    with client.websocket_connect(LIVE) as socket:
        found = {}
        for draft in (True, False):
            socket.send_json({**MESSAGE, "draft": draft})
            found[draft] = receive(socket)[1]
    for draft, vae in ((True, "tiny"), (False, None)):
        pipe = Pipeline.load("emoji", device="cpu", dtype="float32", vae=vae)
        expected = pipe(MESSAGE["prompt"], num_inference_steps=1, seed=3, guidance_scale=2.0).images[0]
        assert json.loads(found[draft].info[SETTINGS_KEY]).get("vae") == vae
        assert ImageChops.difference(found[draft].convert("RGB"), expected).getextrema() == ((0, 0),) * 3
    assert shelf.pipeline("emoji").model.unet is shelf.pipeline("emoji", draft=True).model.unet


def test_old_strokes_are_painted_before_the_newest(client: Any) -> None:
    """Of twenty strokes that come faster than pictures, few are painted, in order, and the last one always is."""
    with client.websocket_connect(LIVE) as socket:
        for number in range(20):
            socket.send_json({**MESSAGE, "steps": 4, "id": number})
        seen = [receive(socket)[0]["id"]]
        while seen[-1] != 19:
            seen.append(receive(socket)[0]["id"])
    assert len(seen) < 10
    assert seen == sorted(seen)


def test_a_fault_of_ours_leaves_the_page_waiting(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = []

    class Socket:
        async def send_json(self, values: dict[str, Any]) -> None:
            sent.append(values)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(live, "read_live", fail)
    asyncio.run(live._read(live._Page(cast("Any", Socket())), service, '{"id": 1}'))
    assert sent == [{"id": 1, "error": "the server failed; its terminal says why"}]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_draft_that_was_overtaken_is_shown(service: Service) -> None:
    """Of two drafts that were painted side by side, the older one ends last."""
    sent = []

    class Socket:
        async def send_json(self, values: dict[str, Any]) -> None:
            sent.append(values["id"])

        async def send_bytes(self, png: bytes) -> None:
            sent.append(png)

    async def show() -> None:
        page = live._Page(cast("Any", Socket()))
        asked = [await live._read(page, service, json.dumps({**MESSAGE, "id": number})) for number in range(3)]
        for number in (1, 0, 2):
            painted = Painted(str(number).encode(), {"seed": 1, "width": 8, "height": 8})
            await page.show(cast("live._Asked", asked[number]), [painted])

    asyncio.run(show())
    assert sent == [1, b"1", 2, b"2"]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "[" * 5000, '{"id": "a", "steps": 99}', '{"model": "../x"}', '{"lora": "x"}'),
        *('{"image": "x"}', '{"image": 4}', '{"draft": 1}', '{"width": 65, "height": 64}'),
        json.dumps({"strength": 0, "image": picture()}),
    ],
    ids=lambda text: text[:30],
)
def test_a_bad_message_ends_the_page(client: Any, text: str) -> None:
    with client.websocket_connect(LIVE) as socket:
        socket.send_text(text)
        assert "\n" not in socket.receive_json()["error"]
        socket.send_bytes(b"\0\1")
        assert "error" in socket.receive_json()
        socket.send_json({**MESSAGE, "id": 5})
        assert receive(socket)[0]["id"] == 5


def test_a_strip_of_seeds_is_one_picture(client: Any) -> None:
    with client.websocket_connect(LIVE) as socket:
        socket.send_json({**MESSAGE, "id": 1, "count": 3})
        answers = [receive(socket) for _ in range(3)]
        assert [header["seed"] for header, _ in answers] == [3, 4, 5]
        socket.send_json({**MESSAGE, "id": 2, "seed": 5})
        assert receive(socket)[1].tobytes() == answers[2][1].tobytes()


def test_a_blend_is_one_of_its_ends(client: Any) -> None:
    with client.websocket_connect(LIVE) as socket:
        pixels = []
        for number, blend in enumerate((0, 0.5, 1)):
            socket.send_json({**MESSAGE, "id": number, "second_prompt": "a green pear", "blend": blend})
            image = receive(socket)[1]
            pixels.append(image.tobytes())
            assert json.loads(image.info[SETTINGS_KEY])["blend"] == blend
        assert len(set(pixels)) == 3
        socket.send_json({**MESSAGE, "id": 4, "prompt": "a green pear"})
        assert receive(socket)[1].tobytes() == pixels[2]


def test_what_is_to_be_avoided_changes_nothing(client: Any) -> None:
    """Of the embedded model, which has no negative pass."""
    with client.websocket_connect(LIVE) as socket:
        pixels = []
        for number, more in enumerate(({}, {"nag": 1}, {"nag": 4})):
            socket.send_json({**MESSAGE, "id": number, "negative_prompt": "red", **more})
            pixels.append(receive(socket)[1].tobytes())
        assert pixels[0] == pixels[1] != pixels[2]
        socket.send_json({**MESSAGE, "nag": "much"})
        assert socket.receive_json()["error"] == "nag is 'much'; give a number from 0 to 100"


def test_a_loop_does_not_move(client: Any) -> None:
    with client.websocket_connect(LIVE) as socket:
        for number, more in enumerate(({}, {"second_prompt": "a green pear"})):
            socket.send_json({**MESSAGE, "id": number, "frames": 4, **more})
            header, loop = receive(socket)
            assert (header["seed"], loop.format, loop.n_frames, loop.info["loop"]) == (3, "WEBP", 4, 0)
            frames = []
            for place in range(4):
                loop.seek(place)
                frames.append(np.asarray(loop.convert("RGB"), dtype=float))
            moved = [np.abs(frame - frames[1]).mean() for frame in frames]
            # the way back passes the way out, but for what WebP loses
            assert moved[3] < 0.2 * min(moved[0], moved[2])
        socket.send_json({**MESSAGE, "frames": 1})
        assert "frames is 1; give a whole number from 2" in socket.receive_json()["error"]


def test_a_page_that_goes_away_leaves_its_work(client: Any, service: Any) -> None:
    for _ in range(3):
        with client.websocket_connect(LIVE) as socket:
            socket.send_json({**MESSAGE, "steps": LIMITS.steps})
    with client.websocket_connect(LIVE) as socket:
        socket.send_json({**MESSAGE, "id": 9})
        assert receive(socket)[0]["id"] == 9
    assert service.painter.running is None
