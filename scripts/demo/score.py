"""Score the requests of three users from the package alone, next to what the training model said.

usage: python -m scripts.demo.score demo_run/package demo_run/requests.json

This is the work of a serving process: raw features -> ids (the feature generator), ids -> scores (the package's score program).
No code of the model is imported.
"""

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from dist_export import open_package
from scripts.demo.features import generate_features

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
    fg = json.loads((directory / "fg.json").read_text())
    scores = open_package(directory).score(generate_features(fg, examples))
    return {name: column[:, 0] for name, column in scores.items()}


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
