"""For tests: says what the U-Net was asked and what a paste would fill in, reloads the page, repeats requests.

It can also turn the loaded model into a flow with a predictor of Forge's own and a network that knows the picture.
"""

import inspect
from types import SimpleNamespace

import torch
from modules import infotext_utils, script_callbacks, scripts, shared

_NETWORKS = ("UNetModel", "IntegratedUNet2DConditionModel", "OpenAIWrapper")  # the last is around SDXL's UNetModel
_calls = []
_comments = []
_fed = []
_predictors = []


class Probe(scripts.Script):
    def title(self):
        return "Probe"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def postprocess(self, p, processed):
        _comments[:] = [getattr(processed, "comments", "")]


def _note(module, inputs):
    if type(module).__name__ in _NETWORKS and len(inputs) > 1:  # SDXL's own gets its timesteps by name
        _calls.append([float(t) for t in inputs[1]])


def _take():
    torch.manual_seed(0)  # what the host draws an input picture's latents from, and no seed of a request sets
    taken = list(_calls)
    _calls.clear()
    return taken


def _say():
    return _comments


def _reload():
    shared.state.request_restart()
    return {}


def _paste(request: dict):
    """What the page's button "Paste" fills in, by the ids of the components, and the settings that it overrides."""
    params = infotext_utils.parse_generation_parameters(request["infotext"])
    script_callbacks.infotext_pasted_callback(request["infotext"], params)
    values = {}
    for component, key, *_ in infotext_utils.paste_fields[request["tab"]]["fields"]:
        value = key(params) if callable(key) else params.get(key)
        if isinstance(value, dict):  # gr.update
            value = value.get("value")
        if value is None:
            continue
        kind = type(component.value)
        if kind is not type(None) and not isinstance(value, kind):
            value = value == "True" if kind is bool and isinstance(value, str) else kind(value)
        values[str(component.elem_id)] = value
    overridden = infotext_utils.get_override_settings(params)
    return {"values": values, "settings": {name: value for _, name, value in overridden}}


def _become_flow(request: dict):
    """`{"kind": class of the predictor, "shift", "x0": each value of the picture's latents}`; without a kind: undo."""
    model = shared.sd_model.forge_objects.unet.model
    if _predictors:
        model.predictor = _predictors.pop()
        del model.diffusion_model.forward
    if request.get("kind"):
        _predictors.append(model.predictor)
        model.predictor = _predictor(**request)
        model.diffusion_model.forward = _velocity(model.predictor, request["x0"])
    return {}


def _predictor(kind, shift, x0):
    from backend.modules import k_prediction

    made = getattr(k_prediction, kind)
    if "model_config" in inspect.signature(made).parameters:  # Neo
        return made(SimpleNamespace(sampling_settings={"shift": shift}))
    return made() if kind == "PredictionFlux" else made(shift=shift)


def _velocity(predictor, x0):
    def forward(x, t, *args, **options):
        half = torch.tensor([0.5])
        s = t / float(predictor.timestep(half) / half)
        _fed.append([float(s[0]), float(x.mean()), float(x.std())])
        return (x - x0) / s.reshape(-1, 1, 1, 1)

    return forward


def _take_fed():
    taken = list(_fed)
    _fed.clear()
    return taken


def _add_routes(demo, app):
    app.add_api_route("/probe/calls", _take, methods=["GET"])
    app.add_api_route("/probe/comments", _say, methods=["GET"])
    app.add_api_route("/probe/paste", _paste, methods=["POST"])
    app.add_api_route("/probe/flow", _become_flow, methods=["POST"])
    app.add_api_route("/probe/fed", _take_fed, methods=["GET"])
    app.add_api_route("/probe/reload", _reload, methods=["GET"])


for _old in getattr(shared, "probe_handles", []):
    _old.remove()
shared.probe_handles = [torch.nn.modules.module.register_module_forward_pre_hook(_note)]
script_callbacks.on_app_started(_add_routes)
