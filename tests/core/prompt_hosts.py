"""Run with a web UI's or ComfyUI's own Python: what their code makes of prompts, as JSON on the standard output.

python prompt_hosts.py a1111 CHECKOUT TEXT_ENCODER TOKENIZER RESULT.safetensors < prompts.json
python prompt_hosts.py comfyui CHECKOUT < prompts.json
"""

from __future__ import annotations

import json
import sys
import types
from typing import Any

STEPS = 10


def a1111(prompts: list[str], encoder: str, tokenizer: str, result: str) -> dict[str, Any]:
    """Segments, texts by step, parts, tokens with weights; and the encodings into a file."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    # what the encoder's module imports of a whole running web UI
    for name in ("devices", "sd_hijack", "shared"):
        sys.modules[f"modules.{name}"] = types.ModuleType(f"modules.{name}")
    from modules import devices, sd_hijack, shared

    shared.opts = types.SimpleNamespace(
        emphasis="Original",
        comma_padding_backtrack=20,
        CLIP_stop_at_last_layers=1,
        use_old_emphasis_implementation=False,
        textual_inversion_add_hashes_to_infotext=False,
    )
    devices.device, devices.torch_npu_set_device = torch.device("cpu"), lambda: None
    none = types.SimpleNamespace(find_embedding_at_position=lambda *_: (None, None))
    sd_hijack.model_hijack = types.SimpleNamespace(embedding_db=none, fixes=None, extra_generation_params={})
    from modules import prompt_parser, sd_hijack_clip

    config = CLIPTextConfig.from_pretrained(encoder)
    model = CLIPTextModel(config).eval()
    weights = load_file(f"{encoder}/model.safetensors")
    weights = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in weights.items()}
    model.load_state_dict(weights, strict=False)
    wrapped = types.SimpleNamespace(tokenizer=CLIPTokenizer.from_pretrained(tokenizer), transformer=model)
    host = sd_hijack_clip.FrozenCLIPEmbedderWithCustomWords(wrapped, sd_hijack.model_hijack)
    found, states = [], {}
    for number, prompt in enumerate(prompts):
        schedule = prompt_parser.get_learned_conditioning_prompt_schedules([prompt], STEPS)[0]
        indexes, texts, _ = prompt_parser.get_multicond_prompt_list([prompt])
        chunks = host.tokenize_line(prompt)[0]
        with torch.no_grad():
            states[str(number)] = host([prompt])
        found.append(
            {
                "segments": prompt_parser.parse_prompt_attention(prompt),
                "steps": [next(text for end, text in schedule if step <= end) for step in range(1, STEPS + 1)],
                "parts": [[texts[index], weight] for index, weight in indexes[0]],
                "chunks": [
                    [list(pair) for pair in zip(chunk.tokens, chunk.multipliers, strict=True)] for chunk in chunks
                ],
            }
        )
    save_file({key: value.contiguous() for key, value in states.items()}, result)
    return {"prompts": found}


def comfyui(prompts: list[str]) -> dict[str, Any]:
    """Tokens with weights, in CLIP's own words."""
    from comfy import options

    options.enable_args_parsing()  # so that it reads --cpu
    from comfy import sd1_clip

    tokenizer = sd1_clip.SDTokenizer()
    return {"prompts": [{"chunks": tokenizer.tokenize_with_weights(prompt)} for prompt in prompts]}


if __name__ == "__main__":
    kind, checkout, *rest = sys.argv[1:]
    sys.path.insert(0, checkout)
    sys.argv = ["main.py", "--cpu"]
    read = json.load(sys.stdin)
    print(json.dumps(a1111(read, *rest) if kind == "a1111" else comfyui(read)))
