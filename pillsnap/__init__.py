"""PillSnap: from AI Hub's pill photos to a pill identifier.

The names to use in a notebook; each is imported when it is first used.

    load_config      settings: a preset or a YAML file, and overrides
    run              run one job, or all of them, in a run folder
    load_run         a run folder: its scorecard and its pictures
    load_splits      which photos train, validate, calibrate and test
    load_bundle      an exported identifier: `load_bundle("_runs/demo").predict("photo.png")`
    predict_photos   answers for many photos, folders or globs
    identify         an app in JupyterLab: photos in, cards out
    Client           asks a PillSnap server from Python
    read_manifest    the photos of a delivery, one row a pill
    write_delivery   render a synthetic delivery
    open_image_safely  a photo as [height, width, 3] uint8, or the reason why it cannot be read
    PillsnapError    the error that says what happened, where, and what to do
"""

import os as _os
from importlib import import_module as _import_module

# onnxruntime reports its use to its maker unless this is set before it is imported
_os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

_HOME = {  # public name → the module that defines it
    "load_config": "core.config",
    "run": "runs",
    "load_run": "runs",
    "load_splits": "dataset.splitfiles",
    "load_bundle": "deployment.runtime",
    "predict_photos": "deployment.batch",
    "identify": "deployment.identify",
    "Client": "client",
    "read_manifest": "delivery.index",
    "write_delivery": "synth.writer",
    "open_image_safely": "photos.images",
    "PillsnapError": "core.errors",
}
__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]  # the names of the table above


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'pillsnap' has no attribute {name!r}; it offers {', '.join(_HOME)}")
    try:
        return getattr(_import_module(f"pillsnap.{_HOME[name]}"), name)
    except ModuleNotFoundError as e:
        from pillsnap.core.errors import missing_extra

        raise (missing_extra(e) or e) from None


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
