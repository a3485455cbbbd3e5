"""What a distillation is guided by: a ControlNet, an IP-Adapter, and control pictures for the photos."""

import pytest
from PIL import Image

from tests.core.test_ip_adapter import make_adapter, make_encoder
from tests.trainer.conftest import build_unet
from tests.trainer.control.models import make_controlnet


@pytest.fixture(scope="module")
def controlnet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("control") / "net"
    make_controlnet().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An IP-Adapter with its image encoder beside it."""
    folder = tmp_path_factory.mktemp("ip")
    make_encoder(folder / "image_encoder")
    return make_adapter(folder / "ip.safetensors", build_unet())


@pytest.fixture(scope="module")
def hints(tmp_path_factory):
    """Control pictures for the six photos, in another format and size."""
    folder = tmp_path_factory.mktemp("hints")
    for number in range(6):
        Image.effect_noise((80, 80), 90).convert("RGB").save(folder / f"{number}.webp", lossless=True)
    return folder
