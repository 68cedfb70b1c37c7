"""The rotary fields of config.json: four spellings in, one dictionary inside, both spellings out.

transformers 4.57 writes `rope_theta`, `partial_rotary_factor` and `rope_scaling` at the top level; transformers 5
writes one `rope_parameters`. Inside this package there is only the latter, always complete. Engines that know just one
of the spellings read ours because `Qwen3NextConfig.to_dict` writes both.
"""

import math
from typing import Any, NoReturn

from qwen3_next.errors import ConfigError

__all__ = [
    "read_rope",
    "refuse",
    "replace_rope",
    "require_served_rope_type",
    "rope_scaling_of",
    "validate_rope_parameters",
]

DEFAULTS: dict[str, Any] = {"rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
SPELLINGS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
# What each served rope type may hold beside rope_type, rope_theta and partial_rotary_factor.
SCALING_FIELDS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}
COMMON_FIELDS = frozenset({"rope_type", "rope_theta", "partial_rotary_factor"})


def refuse(field: str, value: object, allowed: str, remedy: str) -> NoReturn:
    """Raise the `ConfigError` that names the field, the value found, what is allowed and the remedy."""
    raise ConfigError(f"{field} = {value!r} cannot be served. Allowed: {allowed}. {remedy}")


def read_rope(
    fields: dict[str, Any], max_position_embeddings: int, defaults: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Take every rotary spelling out of `fields` and return the one complete `rope_parameters`.

    What no spelling says about theta and width is taken from `defaults`, by default those of transformers.

    A `rope_scaling` that is given wins over a `rope_parameters` that merely states the default type: that is what a
    config looks like whose owner followed the model card's YaRN recipe. Anything else that is said twice must agree.

    Raises:
        ConfigError: a value that is no dictionary, or two spellings that contradict each other.
    """
    raw = {name: fields.pop(name, None) for name in SPELLINGS}
    parameters = _canonical("rope_parameters", raw["rope_parameters"])
    scaling = _canonical("rope_scaling", raw["rope_scaling"])
    for name in DEFAULTS:
        said = [
            value for value in (scaling.pop(name, None), parameters.pop(name, None), raw[name]) if value is not None
        ]
        if any(value != said[0] for value in said[1:]):
            refuse(
                name, said, "one value", "The spellings of the rotary fields contradict each other: keep one of them."
            )
        raw[name] = said[0] if said else (defaults or DEFAULTS)[name]
    if scaling and parameters.get("rope_type", "default") != "default" and scaling != parameters:
        refuse(
            "rope_scaling",
            scaling,
            f"the same as rope_parameters, which is {parameters}",
            "Keep one of the two fields.",
        )
    chosen = scaling or parameters
    chosen.setdefault("rope_type", "default")
    if chosen["rope_type"] == "yarn":
        chosen.setdefault("original_max_position_embeddings", max_position_embeddings)
    return {"rope_theta": raw["rope_theta"], "partial_rotary_factor": raw["partial_rotary_factor"], **chosen}


def replace_rope(stored: dict[str, Any], given: dict[str, Any], max_position_embeddings: int) -> dict[str, Any]:
    """Return complete rope parameters in which `given`, in any spelling, replaces what `stored` says."""
    scaling_given = "rope_parameters" in given or "rope_scaling" in given
    kept = {} if scaling_given else {"rope_parameters": {k: v for k, v in stored.items() if k not in given}}
    return read_rope({**kept, **given}, max_position_embeddings, defaults=stored)


def rope_scaling_of(rope_parameters: dict[str, Any]) -> dict[str, Any] | None:
    """Return the 4.57 spelling `rope_scaling` of complete `rope_parameters`: None where nothing is scaled."""
    if rope_parameters["rope_type"] == "default":
        return None
    return {
        name: value for name, value in rope_parameters.items() if name not in ("rope_theta", "partial_rotary_factor")
    }


def validate_rope_parameters(rope: dict[str, Any], head_dim: int) -> None:
    """Check complete `rope_parameters` for heads of width `head_dim`.

    Raises:
        ConfigError: an unknown rope type or field, a missing or impossible scaling value, or a rotary width
            `int(head_dim * partial_rotary_factor)` that is odd, zero or larger than the head.
    """
    rope_type = rope["rope_type"]
    require_served_rope_type(rope_type)
    for name in rope.keys() - COMMON_FIELDS - SCALING_FIELDS[rope_type]:
        allowed = ", ".join(sorted(COMMON_FIELDS | SCALING_FIELDS[rope_type]))
        refuse(f"rope_parameters.{name}", rope[name], f"for rope type {rope_type!r}: {allowed}", "Remove the field.")
    _require_number("rope_theta", rope["rope_theta"], above=0.0)
    _validate_rotary_width(rope["partial_rotary_factor"], head_dim, 4 if rope_type == "dynamic" else 2)
    if rope_type != "default":
        _validate_factor(rope_type, rope.get("factor"))
    if rope_type == "yarn":
        _validate_yarn(rope)


def require_served_rope_type(rope_type: Any) -> None:
    """Refuse a rope type that is not served, also one that was written into a finished configuration.

    Raises:
        ConfigError: names the types that are served.
    """
    if not isinstance(rope_type, str) or rope_type not in SCALING_FIELDS:
        refuse(
            "rope_parameters.rope_type",
            rope_type,
            ", ".join(SCALING_FIELDS),
            "For long contexts use the published recipe: "
            '{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}.',
        )


def _canonical(name: str, value: Any) -> dict[str, Any]:
    """Copy one spelling without its empty fields, and with `rope_type` for the older `type`."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        refuse(name, value, "a dictionary or null", "See the model card's YaRN recipe.")
    given: dict[str, Any] = {str(key): item for key, item in value.items() if item is not None}  # pyright: ignore[reportUnknownVariableType]
    older = given.pop("type", None)
    if older is not None and given.setdefault("rope_type", older) != older:
        refuse(f"{name}.type", older, f"the same as rope_type, which is {given['rope_type']!r}", "Keep one of the two.")
    return given


def _validate_rotary_width(partial_rotary_factor: Any, head_dim: int, at_least: int) -> None:
    _require_number("partial_rotary_factor", partial_rotary_factor, above=0.0)
    width = int(head_dim * partial_rotary_factor)
    if width % 2 or not at_least <= width <= head_dim:
        refuse(
            "partial_rotary_factor",
            partial_rotary_factor,
            f"a fraction of head_dim = {head_dim} that rotates an even number of dimensions, at least {at_least} "
            f"(not {width})",
            "The published model rotates a quarter: 0.25.",
        )


def _validate_factor(rope_type: str, factor: Any) -> None:
    if factor is None or not _is_number(factor) or factor < 1:
        refuse(
            "rope_parameters.factor",
            factor,
            f"a number of at least 1 for rope type {rope_type!r}",
            "It is the length wanted over the length trained: 4.0 turns 262,144 into 1,048,576 tokens.",
        )


def _validate_yarn(rope: dict[str, Any]) -> None:
    original = rope["original_max_position_embeddings"]
    if isinstance(original, bool) or not isinstance(original, int) or original < 1:
        refuse("rope_parameters.original_max_position_embeddings", original, "a positive integer", "Published: 262144.")
    for name in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if name in rope:
            _require_number(f"rope_parameters.{name}", rope[name], above=0.0)
    if rope.get("beta_fast", 32) < rope.get("beta_slow", 1):
        refuse(
            "rope_parameters.beta_fast",
            rope.get("beta_fast", 32),
            f"at least beta_slow, which is {rope.get('beta_slow', 1)}",
            "Leave both out for the paper's 32 and 1.",
        )
    if ("mscale" in rope) != ("mscale_all_dim" in rope):
        given = "mscale" if "mscale" in rope else "mscale_all_dim"
        refuse(
            f"rope_parameters.{given}",
            rope[given],
            "both mscale and mscale_all_dim, or neither",
            "Alone it has no effect.",
        )
    if not isinstance(rope.get("truncate", True), bool):
        refuse("rope_parameters.truncate", rope["truncate"], "true or false", "Leave it out for true.")


def _require_number(field: str, value: Any, *, above: float) -> None:
    if not _is_number(value) or value <= above:
        refuse(field, value, f"a finite number above {above:g}", "Correct the value or leave it out.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
