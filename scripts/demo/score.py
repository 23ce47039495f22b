"""Score the requests of three users from the package alone, next to what the training model said.

usage: python -m scripts.demo.score demo_run/package demo_run/requests.json

This is the work of a serving process: raw features -> ids (the feature generator), ids -> scores (the package's score program).
No code of the model is imported. The serving contract must give the same: ids -> dense inputs with numpy -> the dense program.
"""

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_export import Package, open_package
from scripts.demo.features import generate_features

TOLERANCE = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("requests", type=Path)
    args = parser.parse_args()

    requests = json.loads(args.requests.read_text())
    package = open_package(args.package)
    ids = generate_features(json.loads((args.package / "fg.json").read_text()), requests)
    scores = {name: column[:, 0] for name, column in package.score(ids).items()}
    differences = compare(scores, requests)
    print_scores(requests, scores, differences)
    print()
    is_same = [
        say_largest("the score program", differences),
        say_largest("the serving contract", compare(score_by_contract(package, ids), requests)),
    ]
    return 0 if all(is_same) else 1


def score_by_contract(package: Package, ids: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return output name -> scores (B,), by way of the dense inputs."""
    dense = package.manifest.dense
    assert dense is not None
    blocks = package.build_dense_inputs(ids)
    with torch.no_grad():
        outputs = package.load_program().module()(**{name: torch.from_numpy(block) for name, block in blocks.items()})
    return {entry.name: output.numpy()[:, 0] for entry, output in zip(dense.outputs, outputs, strict=True)}


def compare(scores: dict[str, np.ndarray], requests: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return by output how far the scores are from the trainer's."""
    return {name: np.abs(column - [request["scores"][name] for request in requests]) for name, column in scores.items()}


def say_largest(what: str, differences: dict[str, np.ndarray]) -> bool:
    """Print the largest difference. Return whether it is within the tolerance."""
    largest = max(column.max() for column in differences.values())
    is_same = bool(largest <= TOLERANCE)  # NaN is not
    print(
        f"{what}: largest difference {largest:.1e}, {'within' if is_same else 'OUTSIDE'} the tolerance of {TOLERANCE:.0e}"
    )
    return is_same


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
