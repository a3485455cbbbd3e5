"""For tests: says what the U-Net was asked, and reloads the page."""

import torch
from modules import script_callbacks, scripts, shared

_NETWORKS = ("UNetModel", "IntegratedUNet2DConditionModel", "OpenAIWrapper")  # the last is around SDXL's UNetModel
_calls = []
_comments = []


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
    taken = list(_calls)
    _calls.clear()
    return taken


def _say():
    return _comments


def _reload():
    shared.state.request_restart()
    return {}


def _add_routes(demo, app):
    app.add_api_route("/probe/calls", _take, methods=["GET"])
    app.add_api_route("/probe/comments", _say, methods=["GET"])
    app.add_api_route("/probe/reload", _reload, methods=["GET"])


for _old in getattr(shared, "probe_handles", []):
    _old.remove()
shared.probe_handles = [torch.nn.modules.module.register_module_forward_pre_hook(_note)]
script_callbacks.on_app_started(_add_routes)
