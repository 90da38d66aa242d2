"""Model folders that transformers 4 reads as transformers 5, which writes them, does.

Rewardbench, vLLM, ONNX's exporters and TRL to 0.24 come with transformers 4. It does not know
`rope_parameters` and takes its default in their place, silently; nor does it know the generic tokenizer by
its new name. So both are said in its words, too.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

# What transformers 4 calls the base of the rotations, and the share of a head that rotates.
BASE_AND_SHARE = ("rope_theta", "partial_rotary_factor")
OF_KIND = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "modernbert": ("global_rope_theta", "partial_rotary_factor"),
}
# The base in layers of a sliding window, where a model has two kinds of layers.
SLIDING = {"gemma3_text": "rope_local_base_freq", "modernbert": "local_rope_theta"}
# All that Phi 3's scaling may hold in transformers 4.
PHI3 = ("type", "short_factor", "long_factor")
# Kinds of which tiny models, saved so, gave the same rewards in transformers 4.57 as in 5.23, to 1e-6.
READ_ALIKE = (
    "albert bert biogpt deberta-v2 distilbert electra gemma gemma2 gemma3_text glm gpt2 gpt_bigcode gpt_neox "
    "gptj helium llama mistral mixtral modernbert mpnet opt persimmon phi phi3 qwen2 qwen2_moe qwen3 roberta "
    "smollm3 stablelm starcoder2 xlm-roberta"
)
GENERIC, GENERIC_OF_4 = "TokenizersBackend", "PreTrainedTokenizerFast"


def for_transformers_4(folder: Path) -> None:
    """Add to a saved model what transformers 4 calls otherwise; transformers 5 reads the same as before."""
    rewrite_json(folder / "config.json", _config_of_4)
    rewrite_json(folder / "tokenizer_config.json", _tokenizer_of_4)


def needs_transformers_5(config: dict[str, Any]) -> bool:
    """Whether a config.json has rotations that transformers 4 has no words for."""
    base, _ = OF_KIND.get(config.get("model_type", ""), BASE_AND_SHARE)
    unsaid = bool(config.get("rope_parameters")) and base not in config
    return unsaid or any(needs_transformers_5(part) for part in config.values() if _is_config(part))


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the object that a model's JSON file holds with what `change` makes of it."""
    content = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config_of_4(config: dict[str, Any]) -> dict[str, Any]:
    parts = {key: _config_of_4(part) for key, part in config.items() if _is_config(part)}
    dtype = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    return config | parts | dtype | _rope_of_4(config)


def _is_config(part: Any) -> bool:
    return isinstance(part, dict) and "model_type" in part


def _rope_of_4(config: dict[str, Any]) -> dict[str, Any]:
    """The rotations in transformers 4's words; nothing if these mean others."""
    from transformers import CONFIG_MAPPING

    kind, rope = config["model_type"], config.get("rope_parameters") or {}
    full, sliding = rope.get("full_attention", rope), rope.get("sliding_attention")
    if "rope_theta" not in full or kind not in CONFIG_MAPPING:
        return {}
    base, share = OF_KIND.get(kind, BASE_AND_SHARE)
    said = {base: full["rope_theta"]}
    if "partial_rotary_factor" in full:
        said[share] = full["partial_rotary_factor"]
    if full["rope_type"] != "default":
        said["rope_scaling"] = {key: value for key, value in full.items() if key not in BASE_AND_SHARE}
    if kind == "phi3" and "rope_scaling" in said:
        said["rope_scaling"] = {key: (rope | {"type": rope["rope_type"]})[key] for key in PHI3}
    if sliding and kind in SLIDING:
        said[SLIDING[kind]] = sliding["rope_theta"]
    # transformers 5 reads transformers 4's words, too, where its own are not there (and writes into them).
    words = {key: value for key, value in config.items() if key != "rope_parameters"} | said
    read = CONFIG_MAPPING[kind].from_dict(deepcopy(words)).rope_parameters
    read.pop("type", None)  # an older name of `rope_type`, which stands beside it
    return said if read == rope else {}


def _tokenizer_of_4(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("tokenizer_class") == GENERIC:
        config["tokenizer_class"] = GENERIC_OF_4
    if isinstance(config.get("extra_special_tokens"), list):  # a dict in transformers 4
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
