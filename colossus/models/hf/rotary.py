"""Rotary positions as `config.json` says them, in the way of `transformers` 5 and in the older one.

Source: huggingface/transformers, `modeling_rope_utils.py`, and for what DeepSeek's attention makes of it
`models/deepseek_v3/modeling_deepseek_v3.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colossus.architecture import Architecture, RopeScaling
from colossus.errors import UserError
from colossus.models.hf.config import Config, Term, Values

KINDS = ("default", "llama3", "yarn")


@dataclass(frozen=True)
class Rotary(Term):
    """theta: where none is given. missing: the parameters where none are given at all.

    partial: the share of a head that turns where none is given; None: the family always turns all of it.
    scales_scores: `mscale_all_dim` multiplies the scores, too.
    """

    theta: float = 10_000.0
    missing: Mapping[str, Any] | None = None
    partial: float | None = None
    scales_scores: bool = False

    def read(self, config: Config) -> Values:
        given = config.get("rope_scaling") or config.get("rope_parameters") or self.missing or {}
        if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
            raise UserError.field("rope_parameters", given, "not supported; one table for all layers")
        theta = given.get("rope_theta") or config.get("rope_theta") or self.theta
        kind = given.get("rope_type") or given.get("type") or "default"
        if kind not in KINDS:
            raise UserError.field("rope_type", kind, f"not supported; one of {', '.join(KINDS)}", KINDS)
        found: Values = {"rope_theta": float(theta)}
        if kind != "default":
            scaling = _scaling(kind, given, config)
            found["rope_scaling"] = scaling.model_dump()
            if self.scales_scores and given.get("mscale_all_dim"):
                width = (config.get("qk_nope_head_dim") or 128) + (config.get("qk_rope_head_dim") or 64)
                m = mscale(scaling.factor, given["mscale_all_dim"])
                found["attention_scale"] = width**-0.5 * m * m
        share = given.get("partial_rotary_factor", config.get("partial_rotary_factor", self.partial))
        if self.partial is None and share not in (None, 1):
            raise UserError.field("partial_rotary_factor", share, "not supported in this family; 1.0")
        if share not in (None, 1):
            head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            found["rotary_dim"] = int(head_dim * share)
        return found

    def write(self, arch: Architecture) -> dict[str, Any]:
        given: dict[str, Any] = {"rope_type": "default"}
        scaling = arch.rope_scaling
        if scaling is not None:
            given = {
                "rope_type": scaling.kind,
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            }
        if scaling is not None and scaling.kind == "llama3":
            given |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
            }
        elif scaling is not None:
            given |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
            given |= ({} if scaling.truncate else {"truncate": False}) | self._magnitudes(arch, scaling)
        theta = {"rope_theta": arch.rope_theta if arch.rope_theta is not None else self.theta}
        partial = {}
        if self.partial is not None:
            partial["partial_rotary_factor"] = (arch.rotary_dim or arch.head_dim) / arch.head_dim
        return {
            **theta,
            **partial,
            "rope_scaling": None if scaling is None else given,  # that older releases and other programs read
            "rope_parameters": given | theta | partial,
        }

    def _magnitudes(self, arch: Architecture, scaling: RopeScaling) -> dict[str, Any]:
        """The parameters of which `read` makes the same magnitude, and the same scale of scores."""
        log = 0.1 * math.log(scaling.factor)
        of_scores = 1.0
        if self.scales_scores and arch.attention_scale is not None:
            of_scores = math.sqrt(arch.attention_scale * math.sqrt(arch.head_dim))
        if log > 0 and of_scores > 1:
            mscale_all_dim = _nice((of_scores - 1) / log)
            above = _nice((scaling.magnitude * of_scores - 1) / log)
            found = {"mscale": above, "mscale_all_dim": mscale_all_dim}
            return found if above > 0 else found | {"attention_factor": scaling.magnitude}
        usual = math.isclose(scaling.magnitude, mscale(scaling.factor, 1.0), rel_tol=1e-12)
        return {} if usual else {"attention_factor": scaling.magnitude}


def mscale(factor: float, weight: float) -> float:
    """Of YaRN (Peng et al. 2023, equation 22; weighted as by DeepSeek)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _scaling(kind: Any, given: Mapping[str, Any], config: Config) -> RopeScaling:
    longest: Any = config.get("max_position_embeddings")
    original: Any = config.get("original_max_position_embeddings") or given.get(
        "original_max_position_embeddings", longest
    )
    factor: Any = given.get("factor")
    try:
        if factor is None and kind == "yarn":
            factor = longest / original
        if kind == "llama3":
            names = {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
            fields = {field: given[key] for key, field in names.items()}
        else:
            magnitude = given.get("attention_factor")
            if magnitude is None:
                magnitude = _magnitude(factor, given.get("mscale"), given.get("mscale_all_dim"))
            fields = {
                "beta_fast": given.get("beta_fast") or 32.0,
                "beta_slow": given.get("beta_slow") or 1.0,
                "truncate": given.get("truncate", True),
                "magnitude": magnitude,
            }
        return RopeScaling.model_validate(
            {"kind": kind, "factor": factor, "original_max_seq_len": original, **fields}
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError.field(
            "rope_scaling", dict(given), f"no complete {kind} scaling ({error!r:.200})"
        ) from None


def _magnitude(factor: float, m: float | None, m_all_dim: float | None) -> float:
    return mscale(factor, m) / mscale(factor, m_all_dim) if m and m_all_dim else mscale(factor, 1.0)


def _nice(value: float) -> float:
    """The short number that a computed one is but for rounding: 1.0 rather than 0.9999999999999998."""
    short = round(value, 9)
    return short if math.isclose(value, short, rel_tol=1e-12) else value
