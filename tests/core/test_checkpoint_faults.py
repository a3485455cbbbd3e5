"""What model files say of themselves, and one clear line for each broken one."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from lcm_core.errors import InputError
from lcm_core.files import architecture, ldm_convert
from lcm_core.files.checkpoint import (
    CONFIG_KEY,
    ModelInfo,
    check_finite,
    detect_architecture,
    read_component,
    read_info,
    read_safetensors,
    save_diffusers,
    save_single_file,
    write_safetensors,
)
from tests.core.test_checkpoint import component, tiny_unet, tiny_vae


@pytest.mark.parametrize(
    ("family", "marks", "metadata", "spread", "expected"),
    [
        ("sd1", (), {}, 0.5, ("epsilon", False)),  # the spread counts for SD 2.x only
        ("sd2", (), {}, 0.02, ("epsilon", False)),
        ("sd2", (), {}, 0.5, ("v_prediction", False)),
        ("sd2", (), {"modelspec.prediction_type": "epsilon"}, 0.5, ("epsilon", False)),
        ("sd2", (), {"modelspec.prediction_type": "v"}, 0.02, ("v_prediction", False)),
        ("sdxl", ("v_pred",), {"modelspec.prediction_type": "epsilon"}, 0.02, ("v_prediction", False)),
        ("sdxl", ("v_pred", "ztsnr"), {}, 0.02, ("v_prediction", True)),
    ],
)
def test_prediction_type_of_foreign_files(
    family: str,
    marks: tuple[str, ...],
    metadata: dict[str, str],
    spread: float,
    expected: tuple[str, bool],
    tmp_path: Path,
) -> None:
    """A v-prediction model that is taken for epsilon paints nothing but noise, and the other way round."""
    unet = component(tiny_unet(family)).tensors
    key = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
    if key in unet:
        unet[key] = torch.linspace(-spread, spread, unet[key].numel()) * 3**0.5
    state = ldm_convert.diffusers_to_ldm({"unet": unet}, family) | {mark: torch.tensor([]) for mark in marks}
    write_safetensors(tmp_path / "one.safetensors", state, metadata)
    info = read_info(tmp_path / "one.safetensors")
    assert (info.prediction_type, info.zero_terminal_snr) == expected
    assert read_info(tmp_path / "one.safetensors", prediction_type="sample").prediction_type == "sample"


def test_v_prediction_and_schedule_survive_both_formats(tmp_path: Path) -> None:
    """Exported without its marks, a v-prediction model would be taken for epsilon by the hosts, and by us."""
    info = ModelInfo("sd2", "v_prediction", True, "linear", 0.001, 0.02, 500)
    parts = {"unet": component(tiny_unet("sd2"))}
    save_single_file(tmp_path / "one.safetensors", parts, info)
    tensors, metadata = read_safetensors(tmp_path / "one.safetensors")
    assert {"v_pred", "ztsnr"} <= tensors.keys()
    assert metadata["modelspec.prediction_type"] == "v"
    save_diffusers(tmp_path / "folder", parts, info)
    assert read_info(tmp_path / "one.safetensors") == read_info(tmp_path / "folder") == info


def test_unused_weights_are_named(tmp_path: Path) -> None:
    """A control network inside a checkpoint that is dropped without a word would be a riddle for its user."""
    state = ldm_convert.diffusers_to_ldm({"unet": component(tiny_unet("sd1")).tensors}, "sd1")
    write_safetensors(tmp_path / "one.safetensors", state | {"control_model.zero.weight": torch.zeros(2)})
    with pytest.warns(UserWarning, match="1 weights are not used.*control_model"):
        read_info(tmp_path / "one.safetensors")


def _broken(kind: str, folder: Path) -> Path:
    file = folder / "model.safetensors"
    write_safetensors(file, {"a": torch.arange(1000.0)})
    content = file.read_bytes()
    if kind == "truncated":
        file.write_bytes(content[:-100])
    elif kind == "truncated header":
        file.write_bytes(content[:20])
    elif kind == "random":
        file.write_bytes(
            torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(0)).byte().numpy().tobytes()
        )
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "text":
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif kind == "header of another format":
        file.write_bytes((16).to_bytes(8, "little") + b'{"a": [1, 2, 3]}' + b"0" * 64)
    elif kind == "pickle inside":
        torch.save({"a": torch.zeros(3)}, file)
    elif kind == "missing":
        file.unlink()
    else:
        torch.save({"a": torch.zeros(3)}, folder / f"model{kind}")
        return folder / f"model{kind}"
    return file


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "truncated .3,900 of 4,000 bytes"),
        ("truncated header", "truncated"),
        ("random", "not a safetensors file"),
        ("empty", "not a safetensors file"),
        ("text", "not a safetensors file"),
        ("header of another format", "not a safetensors file"),
        ("pickle inside", "is a pickle.*convert"),
        ("missing", "does not exist"),
        (".ckpt", "is a pickle.*convert"),
        (".pt", "is a pickle.*convert"),
        (".bin", "is a pickle.*convert"),
    ],
)
def test_broken_files_give_one_clear_line(kind: str, words: str, tmp_path: Path) -> None:
    """A stack of library errors tells an artist nothing; the line must name the file and what to do."""
    file = _broken(kind, tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        read_safetensors(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_broken_weights_are_found(bad: float, dtype: torch.dtype) -> None:
    """A checkpoint with NaN weights loads without complaint and paints black."""
    tensors = {"fine": torch.full((3,), 6e4, dtype=dtype), "numbers": torch.arange(3), "none": torch.tensor([])}
    tensors["large"] = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)  # finite, though its sum is not
    check_finite(tensors, "model")
    with pytest.raises(InputError, match="model: weight 'bad' is NaN or infinite"):
        check_finite({**tensors, "bad": torch.tensor([1.0, bad, 2.0], dtype=dtype)}, "model")


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    """A Flux or SD3 file must not be half read as something that it is not."""
    write_safetensors(tmp_path / "flux.safetensors", {"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)})
    for read in (read_info, lambda path: read_component(path, "unet")):
        with pytest.raises(InputError, match=r"flux.safetensors.*double_blocks.*give"):
            read(tmp_path / "flux.safetensors")
    state = ldm_convert.diffusers_to_ldm({"unet": component(tiny_unet("sd1")).tensors}, "sd1")
    with pytest.raises(InputError, match=r"unknown architecture.*input_blocks.1.2.mystery"):
        detect_architecture(state | {"model.diffusion_model.input_blocks.1.2.mystery.weight": torch.zeros(1)})
    for number in ("99999999999", "9" * 5000):  # layers that were counted up to, without end
        with pytest.raises(InputError, match=r"unknown architecture.*input_blocks.9"):
            detect_architecture(state | {f"model.diffusion_model.input_blocks.{number}.0.weight": torch.zeros(1)})
    parts = component(tiny_unet("sdxl")).tensors
    thinned = {k: v for k, v in parts.items() if ".attentions.1.transformer_blocks.2." not in k}
    with pytest.raises(InputError, match="differ in depth"):
        architecture.unet_config(thinned)


def test_a_missing_network_says_what_is_there(tmp_path: Path) -> None:
    """The user should see at once that the file is only a VAE."""
    save_single_file(tmp_path / "vae.safetensors", {"vae": component(tiny_vae())}, ModelInfo("sd1"))
    with pytest.raises(InputError, match=r"vae.safetensors has no unet .it has: vae."):
        read_component(tmp_path / "vae.safetensors", "unet")
    (tmp_path / "folder" / "vae").mkdir(parents=True)
    with pytest.raises(InputError, match=r"folder has no unet folder .it has: vae."):
        read_component(tmp_path / "folder", "unet")
    with pytest.raises(InputError, match=r"config.json does not exist"):
        read_component(tmp_path / "folder", "vae")
    (tmp_path / "folder" / "vae" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no weights"):
        read_component(tmp_path / "folder", "vae")
    torch.save({}, tmp_path / "folder" / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="is a pickle"):
        read_component(tmp_path / "folder", "vae")
    (tmp_path / "folder" / "vae" / "config.json").write_text("{not json")
    with pytest.raises(InputError, match="not readable JSON"):
        read_component(tmp_path / "folder", "vae")
    write_safetensors(tmp_path / "odd.safetensors", {"conv_in.weight": torch.zeros(1)}, {CONFIG_KEY: "{"})
    with pytest.raises(InputError, match=r"odd\.safetensors"):
        read_component(tmp_path / "odd.safetensors", "unet")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """A full disk or a crash must not cost the file that was there."""
    write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(3)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # what a full disk does to a writer
    try:
        with pytest.raises(InputError, match=r"cannot write .*a\.safetensors.*free some space"):
            write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    assert torch.equal(read_safetensors(tmp_path / "a.safetensors")[0]["a"], torch.ones(3))
    with pytest.raises(InputError, match="cannot write"):
        write_safetensors("/proc/nowhere/a.safetensors", {"a": torch.ones(3)})
