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

# What transformers 4 has beside `rope_scaling`.
BASE_AND_SHARE = ("rope_theta", "partial_rotary_factor")
GENERIC, GENERIC_OF_4 = "TokenizersBackend", "PreTrainedTokenizerFast"


def for_transformers_4(folder: Path) -> None:
    """Add to a saved model what transformers 4 calls otherwise; transformers 5 reads the same as before."""
    rewrite_json(folder / "config.json", _config_of_4)
    rewrite_json(folder / "tokenizer_config.json", _tokenizer_of_4)


def needs_transformers_5(config: dict[str, Any]) -> bool:
    """Whether a config.json has rotations that transformers 4 has no words for, or not the usual ones."""
    text = config.get("text_config", config)
    return bool(text.get("rope_parameters")) and "rope_theta" not in text


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the object that a model's JSON file holds with what `change` makes of it."""
    content = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config_of_4(config: dict[str, Any]) -> dict[str, Any]:
    """With the rotations in transformers 4's words, too, unless these mean others."""
    from transformers import CONFIG_MAPPING

    words = dict(config)
    if "dtype" in words:
        words["torch_dtype"] = words["dtype"]
    rope = words.pop("rope_parameters", None)
    # Phi 3's scaling has keys of its own, at which transformers 4 raises.
    if not rope or "rope_theta" not in rope or config["model_type"] not in {*CONFIG_MAPPING} - {"phi3"}:
        return config | words
    said = {key: rope[key] for key in BASE_AND_SHARE if key in rope}
    if rope["rope_type"] != "default":
        said["rope_scaling"] = {key: value for key, value in rope.items() if key not in BASE_AND_SHARE}
    # transformers 5 reads transformers 4's words, too, where its own are not there (and writes into them).
    read = CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(words | said)).rope_parameters
    return config | words | (said if read == rope else {})


def _tokenizer_of_4(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("tokenizer_class") == GENERIC:
        config["tokenizer_class"] = GENERIC_OF_4
    if isinstance(config.get("extra_special_tokens"), list):  # a dict in transformers 4
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
