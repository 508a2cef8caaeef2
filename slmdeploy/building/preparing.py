"""What is done to a decoder's fp32 graph before it is quantised: rotation, then smoothing, as the profile asks.

The prepared graph computes what the exported one does, and that is measured, not trusted: a preparation that moves the
predictions ends the build. Text and the predictions that a build is compared with stay those of the graph as exported;
ranges and second moments are taken anew, since layers of the prepared graph read other numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir

from slmdeploy.building.calibration import inputs_of
from slmdeploy.building.folding import constant_of
from slmdeploy.building.onnxruntime import open_folder, read_model, write_folder
from slmdeploy.building.quantize import HEAD, parts
from slmdeploy.building.reference import Reference
from slmdeploy.building.rewriting import weight_array
from slmdeploy.building.rotation import rotate
from slmdeploy.building.smooth import Product, blocks_product, smooth, w8a8_product
from slmdeploy.errors import GateError, InputError
from slmdeploy.runtime.bundle import read_runtime
from slmdeploy.specs import Profile, SessionOptions

_LARGEST_KL = 1e-6
"""Nats per token that a preparation may cost by rounding alone (3e-9 measured on the shipped teacher)."""


@contextmanager
def prepared(reference: Reference, profile: Profile) -> Iterator[tuple[Reference, dict[str, Any] | None]]:
    """The reference for the graph that ``profile`` wants to quantise, and what was done; None: nothing.

    What was done: ``rotated``, counts of layers; ``smoothed``, the exponent of each value by its name; ``kl``, what
    both cost in float32. Raises InputError for graphs that cannot be prepared so, GateError where ``kl`` is no
    rounding.
    """
    if not (profile.rotate or profile.smooth):
        yield reference, None
        return
    interface = read_runtime(reference.graph).interface
    if interface != "shared":
        raise InputError(
            f"{reference.graph} is of the {interface} interface, and profile {profile.name!r} smooths or rotates "
            "graphs of the dialect ort: export the checkpoint with --dialect ort"
        )
    with TemporaryDirectory(prefix="slmdeploy-prepared-") as scratch:
        graph, done = reference.graph, dict[str, Any]()
        if profile.rotate:
            graph, done["rotated"] = _rotated(graph, Path(scratch) / "rotated")
        if profile.smooth:
            graph, done["smoothed"] = _smoothed(graph, Path(scratch) / "smoothed", reference, profile)
        done["kl"] = reference.comparison.quality(open_folder(graph)).kl
        if not abs(done["kl"]) <= _LARGEST_KL:
            raise GateError(
                f"profile {profile.name!r}: rotating or smoothing {reference.graph} moves its predictions by "
                f"{done['kl']:.2g} nats per token in fp32: leave rotate and smooth out of the profile"
            )
        yield reference.of(graph), done


def refuse_for_encoders(profile: Profile) -> None:
    """Raise InputError where a profile asks an encoder for what only decoders have."""
    asked = [name for name in ("rounding", "smooth", "rotate") if getattr(profile, name)]
    if asked:
        raise InputError(
            f"profile {profile.name!r} has {', '.join(asked)}, which is for decoders: leave it out for an encoder"
        )


def product_of(profile: Profile) -> Product:
    """What smoothing has to suit: products of 8-bit activations where any phase has them, else weights in blocks."""
    forms = [form for form in (profile.weights, profile.prefill, profile.scoring) if form is not None]
    if any(form.scheme in ("w8a8", "w8a8-static") for form in forms):
        return w8a8_product
    weights = profile.weights
    return blocks_product(weights.bits, weights.block_size, symmetric=weights.symmetric)


def _rotated(graph: Path, folder: Path) -> tuple[Path, dict[str, int]]:
    model = read_model(graph)
    found = rotate(model)
    write_prepared(model, graph, folder)
    return folder, found


def _smoothed(graph: Path, folder: Path, reference: Reference, profile: Profile) -> tuple[Path, dict[str, float]]:
    model = read_model(graph)
    found = smooth(model, inputs_of(graph, reference.calibration_text), product=product_of(profile))
    write_prepared(model, graph, folder)
    return folder, found


def write_prepared(model: ir.Model, graph: Path, folder: Path) -> None:
    """Write ``model``, made from the fp32 ``graph``, into a new folder; its scores come from its own head."""
    runtime, rows = read_runtime(graph), None
    if runtime.score is not None:
        rows = weight_array(constant_of(parts(model)[HEAD], 1))[:, list(runtime.score.label_ids)]
    folder.mkdir()
    write_folder(model, graph, folder, precision="fp32", session=SessionOptions(), label_rows=rows)
