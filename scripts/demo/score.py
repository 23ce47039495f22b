"""Score the requests of three users from the package alone, next to what the training model said.

usage: python -m scripts.demo.score demo_run/package demo_run/requests.json

This is the work of a serving process: raw features -> ids (the feature generator), ids -> rows (the package's tables),
rows -> blocks (pooling), blocks -> outputs (the exported program). No code of the model is imported.
"""

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_export import open_package
from scripts.demo.features import PAD, generate_features

TOLERANCE = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("requests", type=Path)
    args = parser.parse_args()

    requests = json.loads(args.requests.read_text())
    scores = score(args.package, requests)
    differences = {
        name: np.abs(column - [request["scores"][name] for request in requests]) for name, column in scores.items()
    }
    print_scores(requests, scores, differences)
    largest = max(column.max() for column in differences.values())
    is_same = bool(largest <= TOLERANCE)  # NaN is not
    print(f"\nlargest difference {largest:.1e}: {'within' if is_same else 'OUTSIDE'} the tolerance of {TOLERANCE:.0e}")
    return 0 if is_same else 1


def score(directory: Path, examples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return output name -> scores (B,) of raw examples."""
    package = open_package(directory)
    fg = json.loads((directory / "fg.json").read_text())
    blocks = json.loads((directory / "fx_user_model" / "input_columns.json").read_text())

    features = generate_features(fg, examples)
    for entry in fg["features"]:
        if entry["gen_val_type"] == "lookup":
            name = entry["feature_name"]
            features[name] = pool_rows(package, find_table(package, entry["shared_name"]), features[name])
    inputs = {
        block: torch.from_numpy(np.concatenate([features[name] for name in names], axis=1))
        for block, names in blocks.items()
    }
    outputs = package.load_program().module()(**inputs)
    if isinstance(outputs, torch.Tensor):
        outputs = (outputs,)
    dense = package.manifest.dense
    assert dense is not None, "the demo exports its dense arch"
    names = [output.name for output in dense.outputs]
    return {name: output.detach().numpy()[:, 0] for name, output in zip(names, outputs, strict=True)}


def find_table(package: Any, name: str) -> Any:
    """Return the manifest's entry of the table that fg names: in full, or by the module of which it is the weight."""
    return next(
        entry for entry in package.manifest.tables if entry.name == name or entry.name.endswith(f".{name}.weight")
    )


def pool_rows(package: Any, table: Any, ids: np.ndarray) -> np.ndarray:
    """Return the mean (B, dim) over each bag of ids (B, L); an id without a row counts as zeros.

    Where rows go by number, an id's row is the id modulo the table's rows.
    """
    is_id = ids != PAD
    rows, is_found = package.lookup(table.name, ids[is_id] % table.rows_out if table.is_hashed is False else ids[is_id])
    bags = np.zeros((*ids.shape, rows.shape[1]), np.float32)
    bags[is_id] = np.where(is_found[:, None], rows, 0)
    pooled: np.ndarray = bags.sum(axis=1) / is_id.sum(axis=1, keepdims=True, dtype=np.float32).clip(min=1)
    return pooled


def print_scores(
    requests: list[dict[str, Any]], scores: dict[str, np.ndarray], differences: dict[str, np.ndarray]
) -> None:
    """Print a table a user: for each movie and output the package's score, the training model's, the difference."""
    columns = "".join(f"  {name + ': package':>13} {'trainer':>8} {'diff':>7}" for name in scores)
    numbered = enumerate(requests)
    for (user, age, gender, occupation), group in groupby(
        numbered, key=lambda pair: tuple(pair[1][key] for key in ("user_id", "age", "gender", "occupation"))
    ):
        print(f"\n{f'user {user} ({gender}, {age}, {occupation})':<34} rating{columns}")
        for row, request in group:
            cells = "".join(
                f"  {scores[name][row]:>13.5f} {request['scores'][name]:>8.5f} {differences[name][row]:>7.0e}"
                for name in scores
            )
            print(f"  {request['title'][:32]:<32} {request['rating']:>6}{cells}")


if __name__ == "__main__":
    sys.exit(main())
