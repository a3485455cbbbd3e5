"""The plan of `--dry-run` beside what is really allocated and written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lcm_core.diffusion.diffusion import Diffusion
from lcm_core.errors import InputError
from lcm_core.files.checkpoint import read_component
from lcm_core.files.lora import save_lora
from lcm_core.files.safetensors import write_json
from lcm_core.networks import frozen
from lcm_core.networks.lora_layers import lora_state_dict
from trainer import estimate_unet, students
from trainer.cli.main import main
from trainer.config import DistillConfig, LoopConfig, StudentConfig
from trainer.data.cache import prepare
from trainer.data.settings import DataConfig
from trainer.distill import Latents, distill
from trainer.distributed import Processes
from trainer.estimate import (
    GUESSED,
    caching_left,
    make_plan,
    print_plan,
    scoring_left,
    to_text,
    training_left,
)
from trainer.estimate_unet import LIBRARIES
from trainer.memory import rehearsal
from trainer.methods.config import LcdConfig, method_config
from trainer.methods.gan import make_head
from trainer.students import full_student, lora_student, prepare_unet, unet_network

from .conftest import WIDTH, build_unet

CPU = torch.device("cpu")


@pytest.fixture
def config(teachers, photos, tmp_path):
    """A LoRA run of 2 pictures at a time on the tiny teacher."""
    return DistillConfig(
        teacher=str(teachers()),
        output=str(tmp_path / "out"),
        device="cpu",
        data=DataConfig(path=str(photos), resolution=64),
        student=StudentConfig(rank=4, precision="float32"),
        training=LoopConfig(steps=2, batch_size=2, learning_rate=1e-3, tensorboard=False),
    )


def real_student(config):
    component = read_component(f"{config.teacher}/unet", "unet")
    unet = build_unet()
    prepare_unet(unet, config.student, (8, 8))
    critic = config.method.kind == "dmd2"
    if config.student.kind == "full":
        return full_student(component, unet_network(unet), config.student, device=CPU, with_critic=critic)
    return lora_student(unet, unet_network(unet), config.student, with_critic=critic)


def count(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("method", ["lcd", "dmd2"])
def test_weights_are_counted_exactly(config, kind, method):
    """A critic's too."""
    config = replace(config, student=replace(config.student, kind=kind), method=method_config(method))
    student, memory = real_student(config), make_plan(config).memory
    trainable = count(student.trained) + (0 if student.critic is None else count(student.critic))
    assert trainable == count(student.trained) * (2 if method == "dmd2" else 1)
    assert memory["trainable parameters"] == 4 * trainable
    assert memory["their moving average"] == 4 * count(student.trained)
    assert memory["optimiser"] == 8 * trainable
    assert memory["frozen weights"] == 4 * count(build_unet())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_critics_head_is_counted_and_its_calls_take_memory(config, kind):
    config = replace(config, student=replace(config.student, kind=kind), method=method_config("dmd2"))
    with_head = replace(config, method=method_config("dmd2", gan_weight=0.1))
    plain, headed = make_plan(config).memory, make_plan(with_head).memory
    head = count(make_head(build_unet().config.block_out_channels[-1]))
    assert headed["trainable parameters"] - plain["trainable parameters"] == 4 * head
    assert headed["optimiser"] - plain["optimiser"] == 8 * head
    assert headed["their moving average"] == plain["their moving average"]
    assert headed["activations and gradients"] > 1.1 * plain["activations and gradients"]


def test_the_state_and_the_lora_are_as_large_as_planned(config, tmp_path):
    student, plan = real_student(config), make_plan(config)
    words = torch.randn(3, 77, WIDTH)
    data = Latents(torch.randn(2, 4, 8, 8), {"encoder_hidden_states": words[:2]}, {"encoder_hidden_states": words[2:]})
    distill(student, data, Diffusion(), LcdConfig(), config.training, tmp_path)
    save_lora(tmp_path / "lora.safetensors", lora_state_dict(student.unet, ema=True, dtype=torch.float16))
    # names and shapes of a tiny network's many small tensors weigh more than 2 percent, so they are taken off
    for name, file, copies in (("state", "state.safetensors", 2), ("result", "lora.safetensors", 1)):
        with open(tmp_path / file, "rb") as stream:
            header = int.from_bytes(stream.read(8), "little") + 8
        assert (tmp_path / file).stat().st_size - header == pytest.approx(plan.disk[name] / copies, rel=0.02), name


def test_the_cache_is_as_large_as_planned(config, tmp_path):
    plan = make_plan(config)
    prepare(config.data, config.teacher, tmp_path / "cache", CPU)
    written = 0
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        with open(file, "rb") as stream:
            written += file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
    assert written == pytest.approx(plan.disk["cache"], rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_rehearsed_step_takes_the_memory_of_a_real_one(config, checkpointing):
    """What a real backward pass keeps, as torch's profiler saw it allocated."""
    config = replace(config, student=replace(config.student, gradient_checkpointing=checkpointing))
    student = real_student(config)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 500])
    cond = {"encoder_hidden_states": torch.randn(2, 77, WIDTH)}
    student.networks.online(x, t, cond, None)  # what is made once is not counted
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = student.networks.online(x, t, cond, None)
    kept = sum(event.self_cpu_memory_usage for event in profile.events())
    with rehearsal(CPU) as memory:
        unet = build_unet()
        unet.to = lambda **_: unet  # as in the estimate
        prepare_unet(unet, config.student, (8, 8))
        rehearsed = lora_student(unet, unet_network(unet), config.student, with_average=False)
        x, t = torch.empty(2, 4, 8, 8), torch.zeros(2, dtype=torch.int64)
        cond = {"encoder_hidden_states": torch.empty(2, 77, WIDTH)}
        before = memory.live
        assert rehearsed.networks.online(x, t, cond, None).shape == output.shape
        planned = memory.peak - before
    assert planned >= 0.9 * kept
    assert planned <= 1.6 * kept + 2**20


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_plans_operations_are_about_those_of_a_real_step(config, monkeypatch, kind, checkpointing):
    """Not all of whose calls are rehearsed."""
    told = []
    monkeypatch.setattr(estimate_unet, "rough_seconds", lambda operations, *_: told.append(operations) or 1.0)
    config = replace(config, student=replace(config.student, kind=kind, gradient_checkpointing=checkpointing))
    make_plan(config)
    student = real_student(config)
    networks = student.networks
    if kind == "full":
        prepare_unet(student.trained, config.student, (8, 8))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 500])
    cond = {"encoder_hidden_states": torch.randn(2, 77, WIDTH)}
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad():
            for _ in range(2):  # both halves of its guidance
                networks.teacher(x, t, cond, None)
            networks.target(x, t, cond, None)
        networks.online(x, t, cond, None).square().mean().backward()
    assert told == [pytest.approx(config.training.steps * counter.get_total_flops(), rel=0.15)]


def test_a_rehearsal_holds_no_memory_and_forgets_what_is_gone():
    with rehearsal(CPU) as memory:
        huge = torch.empty(1 << 40)  # 4 TiB
        assert memory.live == 4 << 40
        view = huge[1:]
        del huge
        assert memory.live == 4 << 40
        del view
        assert memory.live == 0
        assert memory.peak == 4 << 40
    assert torch.get_default_dtype() == torch.float32


def test_more_pictures_at_once_take_more_and_checkpointing_takes_less(config):
    def activations(batch, accumulation=1, checkpointing=False):
        training = replace(config.training, batch_size=batch, accumulation=accumulation)
        student = replace(config.student, gradient_checkpointing=checkpointing)
        plan = make_plan(replace(config, training=training, student=student), Processes(CPU))
        return plan.memory["activations and gradients"]

    plain = activations(16)
    assert plain > 1.5 * activations(16, accumulation=4)
    assert activations(16, checkpointing=True) < plain


def test_weights_in_main_memory_take_no_place_on_the_device(config, monkeypatch):
    """But for the largest, while its layer runs; in int8 they take a quarter of float32's main memory."""
    monkeypatch.setattr(frozen, "_FEW", 64)
    monkeypatch.setattr(students, "use_matrix_products", lambda _: None)  # as on CUDA
    large = [layer.weight.numel() for layer in frozen.large_layers(build_unet())]
    for kind, bits in (("", 32), ("int8", 8)):
        plan = make_plan(replace(config, student=replace(config.student, offload=True, base_dtype=kind)))
        assert plan.memory["frozen weights"] == 4 * (count(build_unet()) - sum(large) + max(large))
        assert plan.resting == sum(large) * bits // 8
        assert "of main memory beside that" in to_text(plan)
    assert "of main memory beside that" not in to_text(make_plan(config))


def test_the_text_names_every_part_and_time_only_once_steps_were_measured(config, tmp_path):
    plan = make_plan(config)
    text = to_text(plan)
    assert plan.memory["libraries"] == LIBRARIES
    for part in ("frozen weights", "activations and gradients", "cache", "state", "result", "6 pictures", "unknown"):
        assert part in text
    (tmp_path / "out" / "run").mkdir(parents=True)
    lines = [f'{{"step": {i}, "loss": 1, "seconds": {s}}}\n' for i, s in enumerate((9.0, 2.0, 2.0))]
    (tmp_path / "out" / "run" / "log.jsonl").write_text("".join(lines))
    longer = replace(config, training=replace(config.training, steps=103))
    plan.seconds["training"] = training_left(longer)
    assert plan.seconds["training"] == pytest.approx(200)
    assert "3 min from here on" in to_text(plan)


def test_the_time_has_caching_and_scoring_too(config, tmp_path):
    """Of a run of minutes, the scores alone may take longer than the training."""
    config = replace(config, report=replace(config.report, samples=10))
    planned = make_plan(config).seconds
    assert (planned["caching"], planned["scoring"]) == (None, None)
    assert planned.keys() == {"caching", GUESSED, "scoring"}
    for kind, seconds in (("latents", 3.0), ("text", 0.5)):
        write_json(tmp_path / "out" / "cache" / f"{kind}-0" / "speed.json", {"seconds": seconds})
    assert caching_left(config, pictures=6, captions=6) == pytest.approx(6 * 3 + 7 * 0.5)
    (tmp_path / "out" / "cache" / "latents-0" / "000000.safetensors").touch()  # all six are in one file
    assert caching_left(config, pictures=6, captions=6) == pytest.approx(7 * 0.5)
    rows = [{"role": "teacher", "model": "teacher", "steps": steps, "images_per_second": 1 / steps} for steps in (1, 2)]
    write_json(tmp_path / "out" / "results.json", {"rows": rows})
    # half a second for each call of the network: two for a step of the teacher, one for the student's
    assert scoring_left(config) == pytest.approx(0.5 * 10 * (2 * (4 + 8 + 25) + 1 + 2 + 4 + 8))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps -5", "steps -5 is out of range"),
        ("--method tcd --clean-share 5", "clean_share 5.0 is out of range"),
        ("--method lcd --phases 4", "phases is not read by method lcd"),
        ("--original-steps 2000", "original_steps=2000"),
        ("--compile", "CUDA only"),
        ("--optimizer sgd", "unknown optimizer 'sgd'"),
        ("--start no/such.safetensors", "no/such.safetensors is not there"),
        ("--tokenizer no/such/folder", "no/such/folder has no vocab.json"),
        ("--data no/such/folder", "no/such/folder does not exist"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(teachers, photos, tmp_path, capsys, words, message):
    output = tmp_path / "out"
    given = ["--teacher", teachers(), "--data", photos, "--resolution", "64", "--output", output, *words.split()]
    for more in (["--dry-run"], []):
        assert main(["distill", *map(str, given), *more]) == 2
        assert message in capsys.readouterr().err
    assert not (output / "run" / "state.safetensors").exists()
    assert not (output / "cache").exists()


@pytest.mark.parametrize(
    "change", [{"in_channels": None}, {"block_out_channels": None}, {"act_fn": 3}, {"norm_num_groups": 7}], ids=str
)
def test_a_teacher_that_says_too_little_or_nonsense_is_named(config, change, tmp_path):
    """None stands for what is left out; diffusers has defaults for it, which are no facts about these weights."""
    teacher = shutil.copytree(config.teacher, tmp_path / "teacher")
    file = teacher / "unet" / "config.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | change).items() if v is not None}))
    with pytest.raises(InputError, match=r"teacher/unet.*get the model again"):
        print_plan(replace(config, teacher=str(teacher)))


def test_a_lora_for_many_guidances_is_told_that_it_cannot_read_them(config, capsys):
    print_plan(config)
    assert "a LoRA cannot read the guidance w" in capsys.readouterr().err
    print_plan(replace(config, method=LcdConfig(w_min=7.5, w_max=7.5)))
    assert "guidance" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_start_of_another_shape_is_found_by_the_plan(config, kind, tmp_path, capsys):
    """Not only after the data were read and the teacher loaded."""
    if kind == "lora":
        start = tmp_path / "rank3.safetensors"
        save_lora(start, lora_state_dict(real_student(replace(config, student=StudentConfig(rank=3))).unet))
        words = r"is \(3, .*instead of \(4, .*give the rank"
    else:
        start, words = tmp_path / "start", "is of another architecture than the teacher"
        shutil.copytree(config.teacher, start, symlinks=True, ignore=shutil.ignore_patterns("unet"))
        build_unet(block_out_channels=(32, 32, 32, 64)).save_pretrained(start / "unet")
    with pytest.raises(InputError, match=words):
        print_plan(replace(config, student=replace(config.student, kind=kind, start=str(start))))
    assert not Path(config.output).exists()
