"""Hosts are asked for what they have: A1111, Forge and Neo (`predictor`), reForge (`model_sampling`)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from extension_a1111.architecture import prediction_of
from extension_a1111.folders import CHECKPOINT_OPTIONS, LORA_OPTIONS, option_folders
from extension_a1111.forge_models import replace_ours
from extension_a1111.options import Options
from extension_a1111.schedules import get_sigmas_padded
from lcm_core.diffusion.process import RectifiedFlow
from lcm_core.diffusion.schedule import get_alphas_cumprod
from lcm_core.errors import InputError

ALPHAS = get_alphas_cumprod()
SIGMAS = ((1 - ALPHAS) / ALPHAS).sqrt()


class EPS:
    """The mixins of ComfyUI's and reForge's model_sampling, with their inheritance."""


class V_PREDICTION(EPS):
    pass


class EDM(V_PREDICTION):
    pass


class CONST:
    pass


class X0(EPS):
    pass


class Discrete(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sigmas", SIGMAS.clone())


class Wrapper(nn.Module):
    """Around the network, as `forge_objects.unet.model`."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.diffusion_model = nn.ModuleDict({"time_embed": nn.Linear(1, 1)})
        for name, part in parts.items():
            setattr(self, name, part)


def sampling(*kinds: type) -> Any:
    return type("ModelSampling", (Discrete, *kinds), {})()


def predictor(kind: str) -> Any:
    found = Discrete()
    found.prediction_type = kind
    return found


def load(fake_host: Any, wrapper: Wrapper | None) -> None:
    info = SimpleNamespace(filename="/models/mine.safetensors")
    if wrapper is None:
        plain = SimpleNamespace(diffusion_model=Wrapper().diffusion_model)
        fake_host.shared.sd_model = SimpleNamespace(
            sd_checkpoint_info=info, model=plain, parameterization="v", alphas_cumprod=ALPHAS
        )
    else:
        objects = SimpleNamespace(unet=SimpleNamespace(model=wrapper))
        fake_host.shared.sd_model = SimpleNamespace(sd_checkpoint_info=info, forge_objects=objects)


@pytest.mark.parametrize(
    "wrapper",
    [
        Wrapper(predictor=predictor("v_prediction")),
        Wrapper(model_sampling=sampling(V_PREDICTION)),
        Wrapper(model_sampling=sampling(EPS)),
        None,
    ],
    ids=["forge and neo", "reforge", "reforge, epsilon", "a1111"],
)
def test_network_and_noise_levels_are_found_in_every_host(fake_host: Any, wrapper: Wrapper | None) -> None:
    load(fake_host, wrapper)
    host = fake_host.load("extension_a1111.host")
    assert isinstance(host.unet().get_submodule("time_embed"), nn.Linear)
    host.check_supported()
    torch.testing.assert_close(host.noise_process().alphas_cumprod.double(), ALPHAS.double(), rtol=1e-5, atol=1e-7)


def flow_predictor(levels: torch.Tensor) -> Any:
    found = predictor("const")
    found.sigmas = levels
    return found


def discrete_flow(shift: float) -> torch.Tensor:
    """Forge's table for SD3 and its kin, and for Flux with shift e^mu."""
    even = torch.arange(1, 1001) / 1000
    return shift * even / (1 + (shift - 1) * even)


@pytest.mark.parametrize("shift", [1.0, 3.0, 3.158])
def test_flow_models_are_known_by_their_predictor(fake_host: Any, shift: float) -> None:
    """Also without the layers that Stable Diffusion's network has."""
    wrapper = Wrapper(predictor=flow_predictor(discrete_flow(shift)))
    wrapper.diffusion_model = nn.ModuleDict()
    load(fake_host, wrapper)
    host = fake_host.load("extension_a1111.host")
    host.check_supported()
    process = host.noise_process()
    assert isinstance(process, RectifiedFlow)
    assert process.shift == pytest.approx(shift, rel=1e-5)
    wanted = [shift * u / (1 + (shift - 1) * u) for u in (1, 0.75, 0.5, 0.25)]
    torch.testing.assert_close(get_sigmas_padded(process, 4, 4), torch.tensor([*wanted, 0.0]), rtol=1e-5, atol=0)


def test_flow_models_are_refused_where_noise_cannot_be_mixed(fake_host: Any) -> None:
    """reForge adds noise to the picture, whatever the model; an unknown table is refused everywhere."""
    load(fake_host, Wrapper(model_sampling=sampling(CONST)))
    host = fake_host.load("extension_a1111.host")
    with pytest.raises(InputError, match=r"mine is no model for LCM or TCD, .* or use Forge"):
        host.check_supported()
    load(fake_host, Wrapper(predictor=predictor("const")))
    with pytest.raises(InputError, match="mine has noise levels that LCM and TCD do not know"):
        host.check_supported()


def test_prediction_by_class_and_by_name() -> None:
    """EDM and X0 derive from classes that mean something else."""
    kinds = {"epsilon": EPS, "v_prediction": V_PREDICTION, "EDM": EDM, "X0": X0, "CONST": CONST, "other": object}
    assert {wanted: prediction_of(type("M", (kind,), {})()) for wanted, kind in kinds.items()} == {k: k for k in kinds}
    assert prediction_of(SimpleNamespace(prediction_type="const")) == "const"


def test_continuous_noise_is_no_table_of_timesteps() -> None:
    """reForge's V_PREDICTION_EDM and Forge's PredictionContinuousV predict v, but at no timestep that we know."""
    continuous = type("ModelSamplingContinuousEDM", (nn.Module,), {})
    assert prediction_of(type("ModelSampling", (continuous, V_PREDICTION), {})()) == "ModelSamplingContinuousEDM"
    edm = type("PredictionContinuousEDM", (), {"prediction_type": "v_prediction"})
    assert prediction_of(type("PredictionContinuousV", (edm,), {})()) == "PredictionContinuousEDM"


def test_samplers_say_that_they_use_the_noise_seed_delta(fake_host: Any) -> None:
    """Or the host leaves ENSD out of the infotext, and a pasted picture differs."""
    host = fake_host.load("extension_a1111.host")
    for _ in range(2):  # the second time is "Reload UI"
        host.register_samplers([("LCM Suite", object, ["lcm_suite"]), ("TCD Suite", object, ["tcd_suite"])])
    assert [(data.name, data.options["uses_ensd"]) for data in fake_host.sd_samplers.all_samplers] == [
        ("LCM Suite", True),
        ("TCD Suite", True),
    ]


def test_a_setting_that_a_host_may_not_name_is_named(fake_host: Any) -> None:
    """Else a picture of reForge, whose first step has been painted without CFG, does not come back."""
    host = fake_host.load("extension_a1111.host")
    assert host.unnamed_settings() == {}
    fake_host.shared.opts.skip_early_cond = 0.4
    assert host.unnamed_settings() == {"Skip Early CFG": 0.4}


def test_a_requests_own_noise_multiplier_counts(fake_host: Any) -> None:
    """The host takes the page's, before the request's own settings are in force: a pasted picture differed."""
    host = fake_host.load("extension_a1111.host")
    p = SimpleNamespace(override_settings={"initial_noise_multiplier": 0.8}, initial_noise_multiplier=1.0)
    host.apply_noise_multiplier(p)
    assert p.initial_noise_multiplier == 0.8
    for settings in ({}, None):
        p = SimpleNamespace(override_settings=settings, initial_noise_multiplier=0.5)
        host.apply_noise_multiplier(p)
        assert p.initial_noise_multiplier == 0.5
    host.apply_noise_multiplier(SimpleNamespace(override_settings={"initial_noise_multiplier": 0.8}))  # text to image


def test_a_lora_that_has_just_been_written_is_found(fake_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's list is of its start, or of the last refresh; it reads the folder again itself for unknown names."""
    networks: Any = ModuleType("networks")
    networks.available_networks = {"old": SimpleNamespace(filename="/lora/old.safetensors")}
    networks.available_network_aliases = {}
    new = {"new": SimpleNamespace(filename="/lora/new.safetensors")}
    networks.list_available_networks = lambda: networks.available_networks.update(new)
    monkeypatch.setitem(sys.modules, "networks", networks)
    host = fake_host.load("extension_a1111.host")
    assert host.lora_file("old") == Path("/lora/old.safetensors")
    assert "new" not in networks.available_networks
    assert host.lora_file("new") == Path("/lora/new.safetensors")
    assert host.lora_file("none") is None


def test_a_report_is_registered_with_the_host_and_its_link_survives_odd_names(
    fake_host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[str] = []
    served: Any = ModuleType("modules.ui_tempdir")
    served.register_tmp_file = lambda demo, file: registered.append(file)
    monkeypatch.setitem(sys.modules, "modules.ui_tempdir", served)
    sys.modules["modules"].ui_tempdir = served  # type: ignore[attr-defined]
    fake_host.shared.demo = object()
    link = fake_host.load("extension_a1111.host").file_link(Path("/runs/50% #1/report.html"))
    assert registered == ["/runs/50% #1/report.html"]
    assert link == "file=/runs/50%25%20%231/report.html"


def test_folders_of_every_form_of_option(tmp_path: Path) -> None:
    """A1111: one folder, or None; Neo: lists, and the option of the others is not there."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert option_folders(SimpleNamespace(ckpt_dir=None), *CHECKPOINT_OPTIONS) == []
    assert option_folders(SimpleNamespace(ckpt_dir=str(one)), *CHECKPOINT_OPTIONS) == [one]
    assert option_folders(SimpleNamespace(ckpt_dirs=[one, str(two)]), *CHECKPOINT_OPTIONS) == [one, two]
    neo = SimpleNamespace(lora_dir=str(tmp_path), lora_dirs=[str(two), str(tmp_path)])
    assert option_folders(neo, *LORA_OPTIONS) == [two, tmp_path]  # the user's own before the default


def test_the_host_shows_a_mistake_in_the_language_of_its_page(fake_host: Any) -> None:
    host = fake_host.load("extension_a1111.host")
    for language, words in (("None", "TCD gamma 2 is out of range"), ("zh_CN", "TCD gamma 的值 2 超出范围")):
        fake_host.shared.opts.localization = language
        with pytest.raises(InputError, match=words), host.told():
            Options(gamma=2)


def test_a_reload_replaces_our_models_and_keeps_the_hosts() -> None:
    """Neo asks for exact types: without ours in its second table the emoji model is "not recognized"."""
    theirs = type("SD15", (), {})
    old, new = (type("SD15OwnSize", (theirs,), {"lcm_suite": True}) for _ in range(2))
    table: list[Any] = [old, theirs]
    replace_ours(table, [new])
    assert table == [new, theirs]
