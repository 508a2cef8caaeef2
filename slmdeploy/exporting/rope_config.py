"""The rotary embeddings that a config.json asks for, in all of the forms in which transformers has written them.

rope_parameters (one, or one per layer type) since transformers 5; rope_theta with rope_scaling before; GPT-NeoX's
rotary_pct and rotary_emb_base; Gemma 3's rope_local_base_freq; Phi-3's original_max_position_embeddings beside them.
Defaults are those of transformers' modeling_rope_utils. The mathematics is in rope.py.
"""

from collections.abc import Mapping
from typing import Any

from slmdeploy.exporting.config import Fields
from slmdeploy.exporting.families import Family
from slmdeploy.exporting.spec import Rope

GIVEN = frozenset({"rope_parameters", "rope_scaling", "rope_theta"})
_ORIGINAL = "original_max_position_embeddings"
_REQUIRED: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset(),
    "longrope": frozenset({"short_factor", "long_factor"}),
}
_OPTIONAL: dict[str, frozenset[str]] = {
    "llama3": frozenset({_ORIGINAL}),
    "yarn": frozenset(
        {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", _ORIGINAL}
    ),
    "longrope": frozenset({"factor", "attention_factor", _ORIGINAL}),
}
_NAMES = {"su": "longrope"}
_ANYWHERE = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def read_ropes(fields: Fields, family: Family, head_dim: int, trained: int) -> tuple[Rope, ...]:
    """The rotary embeddings by index: the one that all layers share, or that of full layers and that of windows.

    trained: max_position_embeddings, the original context where the config gives no other.
    """
    if family.rope == "none":
        return ()
    reader = _Reader(fields, family, head_dim, trained)
    if family.rope != "two":
        return (reader.rope(*reader.given()),)
    field, given = reader.given()
    if _GLOBAL in given or _LOCAL in given:
        return tuple(
            reader.rope(f"{field}.{kind}", reader.mapping(f"{field}.{kind}", given.get(kind)))
            for kind in (_GLOBAL, _LOCAL)
        )
    theta = fields.number("rope_theta", 1e6)
    local = Rope(fields.number("rope_local_base_freq", 1e4), "default", head_dim)
    return reader.rope(field, {"rope_theta": theta} | dict(given)), local


def longest(ropes: tuple[Rope, ...], trained: int) -> int:
    """The longest context that some scaling of the ropes was made for, in tokens; `trained` without one."""
    reach = [trained]
    for rope in ropes:
        factor = dict(rope.parameters).get("factor", 1.0)
        assert isinstance(factor, float)
        reach.append(int(factor * (rope.original or trained)))
    return max(reach)


class _Reader:
    def __init__(self, fields: Fields, family: Family, head_dim: int, trained: int) -> None:
        self.fields, self.family, self.head_dim, self.trained = fields, family, head_dim, trained

    def given(self) -> tuple[str, Mapping[str, Any]]:
        """The field that describes rotary embedding, and what it holds."""
        nested, scaling = (self.fields.values.get(name) for name in ("rope_parameters", "rope_scaling"))
        if nested is not None and scaling is not None:
            raise self.fields.refusal("rope_scaling", "rope_parameters is there too; keep one of them")
        field = "rope_parameters" if nested is not None else "rope_scaling"
        return field, self.mapping(field, nested if nested is not None else scaling or {})

    def mapping(self, field: str, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.fields.refusal(field, "it must be an object", value)
        return value

    def rope(self, field: str, given: Mapping[str, Any]) -> Rope:
        kind = given.get("rope_type", given.get("type", "default"))
        kind = _NAMES.get(kind, kind)
        if kind not in _REQUIRED:
            raise self.fields.refusal(f"{field}.rope_type", f"only {', '.join(_REQUIRED)} are implemented", kind)
        known = _REQUIRED[kind] | _OPTIONAL.get(kind, frozenset()) | _ANYWHERE
        for key, value in given.items():
            # transformers writes the original context into every kind, where it says nothing
            if key not in known and value is not None and key != _ORIGINAL:
                raise self.fields.refusal(f"{field}.{key}", f"this key is not known for rope_type {kind!r}", value)
        dims = int(self.head_dim * self._share(field, given))
        parameters = {key: given.get(key) for key in sorted(known - _ANYWHERE - {_ORIGINAL})}
        checked = {
            key: self._parameter(f"{field}.{key}", value, dims)
            for key, value in parameters.items()
            if value is not None or key in _REQUIRED[kind]
        }
        original = self._original(field, given, kind)
        if kind in ("yarn", "longrope"):
            checked.setdefault("factor", self.trained / original)
        theta = self.fields.positive("rope_theta", self._theta(given))
        return Rope(theta, kind, dims, tuple(sorted(checked.items())), original)

    def _original(self, field: str, given: Mapping[str, Any], kind: str) -> int:
        """The context before scaling; 0 for a kind that has none."""
        if kind in ("default", "linear"):
            return 0
        beside = self.fields.values.get(_ORIGINAL) if _ORIGINAL in self.family.read else None
        value = self.trained if kind == "dynamic" else beside or given.get(_ORIGINAL) or self.trained
        return int(self.fields.positive(f"{field}.{_ORIGINAL}", value))

    def _theta(self, given: Mapping[str, Any]) -> Any:
        values = self.fields.values
        old = values.get("rotary_emb_base") if "rotary_emb_base" in self.family.read else None
        found = (given.get("rope_theta"), values.get("rope_theta"), old)
        return next((value for value in found if value is not None), self.family.theta)

    def _share(self, field: str, given: Mapping[str, Any]) -> float:
        """The part of a head that is rotated."""
        if "partial_rotary_factor" in given:
            where, value = f"{field}.partial_rotary_factor", given["partial_rotary_factor"]
        else:
            names = [name for name in ("partial_rotary_factor", "rotary_pct") if name in self.family.read]
            where = next((name for name in names if self.fields.values.get(name) is not None), "partial_rotary_factor")
            value = self.fields.values.get(where, self.family.rotary_share) if where in names else None
        share = self.fields.positive(where, self.family.rotary_share if value is None else value)
        if share > 1:
            raise self.fields.refusal(where, "it is a share of the head and at most 1", value)
        return share

    def _parameter(self, name: str, value: Any, dims: int) -> float | tuple[float, ...]:
        if name.endswith(("short_factor", "long_factor")):
            if not isinstance(value, list) or len(value) != dims // 2:
                raise self.fields.refusal(name, f"it must be a list of {dims // 2} numbers", value)
            return tuple(self.fields.positive(name, one) for one in value)
        if name.endswith(".truncate"):
            if not isinstance(value, bool):
                raise self.fields.refusal(name, "it must be true or false", value)
            return float(value)
        return self.fields.positive(name, value)
